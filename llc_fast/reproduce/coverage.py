"""Do error bars hold? How often ``result.interval(0.95)`` covers the exact answer.

The exact answer is nβ·E[L − L(w*)] under ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²), with L over the whole data set: in closed
form where the loss is quadratic, otherwise by quadrature (:mod:`llc_fast.problems.exact_posteriors`):

- "linear, no noise": linear regression with ten inputs;
- "linear, noisy": with noise, at the least-squares solution;
- "(w₁w₂)²": f(x) = w₁w₂x on data from f = 0, at w = 0, which is singular;
- "w⁴": f(x) = w²x likewise;
- "logistic": logistic regression with three parameters, at the maximum of likelihood.

In three ways:

- "defaults": nothing given but the length, 4 chains × (300 + 500) steps with minibatches of 64; the step size comes
  from pilot chains, and its bias is subtracted;
- "by need": not even the length is given, but the total error that chains are to end at, 5 % of λ̂. Stopping when
  it looks good would cost coverage if errors were too small by chance then;
- "small step": ε·(nβ·h_max + γ) = 0.05 and half of the data at every step, so that there is next to no bias (and none
  is subtracted), 4 chains × (500 + 2000) steps, strongly correlated.

The data of a problem are the same in all runs, the seeds of the sampler are not. A 95 % interval of the right width
covers the answer in 95 % of runs; from 200 runs that is known to ± 1.5 %. A bias also costs coverage: in wells steeper
than quadratic the correction subtracts too much (docs/calibration.md). The claims allow for that: coverage between 90
and 99 %. Each row also has what the first chain alone would have said, which no other can contradict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llc_fast import LLCResult
from llc_fast.plots import CLASSES, errorbar_by_warning, new_figure
from llc_fast.problems.exact_posteriors import LOCALIZATION, PROBLEMS, SAMPLES, ExactPosterior
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, numbers, that_count
from llc_fast.reproduce.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBABILITY, LEAST, MOST = 0.95, 0.90, 0.99
"""Of the intervals, and what their coverage must lie between."""
MODES = ("defaults", "by need", "small step")
BATCH, SMALL, TARGET_ERROR = 64, 0.05, 0.05


@dataclass(frozen=True)
class Settings:
    """What is estimated, and how often.

    Attributes:
        problems: of `PROBLEMS`.
        modes: of `MODES`.
        runs: of each problem in each mode.
        block: runs that are kept together; a run that was stopped goes on with the next block.
        length: how many times the draws and the burn-in of the docstring.
        target_error: of "by need".
    """

    problems: tuple[str, ...] = tuple(PROBLEMS)
    modes: tuple[str, ...] = MODES
    runs: int = 40
    block: int = 20
    length: float = 1.0
    target_error: float = TARGET_ERROR


SCALES = {"small": Settings(), "paper": Settings(runs=200)}


def measure(study: Study, settings: Settings) -> None:
    """Every problem in every mode, a block of runs at a time."""
    for name in settings.problems:
        problem = PROBLEMS[name]()

        def block(case: tuple[str, int], name: str = name, problem: ExactPosterior = problem) -> Row:
            mode, first = case
            seeds = range(first, min(first + settings.block, settings.runs))
            results = [_estimate(study, name, problem, mode, study.seed * settings.runs + k, settings) for k in seeds]
            return {"problem": name, "mode": mode, "exact": problem.answer, "runs": [_run_row(r) for r in results]}

        starts = range(0, settings.runs, settings.block)
        cases = {f"{name}, {mode}, from {first}": (mode, first) for mode in settings.modes for first in starts}
        study.rows("blocks", cases, block, lambda row: str(Coverage.of([row])))


def _estimate(study: Study, name: str, problem: ExactPosterior, mode: str, seed: int, settings: Settings) -> LLCResult:
    burnin, draws, batch, lr = (300, 500, BATCH, None)
    if mode == "small step":
        burnin, draws, batch, lr = 500, 2000, SAMPLES // 2, SMALL / problem.stiffness
    given = {"num_burnin": round(settings.length * burnin), "num_draws": round(settings.length * draws)}
    length: dict[str, Any] = {"target_error": settings.target_error} if mode == "by need" else given
    return study.estimate(
        f"{name} {mode} {seed}",
        problem.model,
        problem.data,
        problem.loss_fn,
        lr=lr,
        localization=LOCALIZATION,
        num_chains=4,
        **length,
        batch_size=batch,
        seed=seed,
        progress=False,  # each takes less than a second
    )


def _run_row(result: LLCResult) -> Row:
    """Less than of other estimates: there are thousands."""
    return {
        "llc": result.llc_mean,
        "stderr": result.llc_stderr,
        "interval": list(result.interval(PROBABILITY)),
        "first_chain": list(replace(result, loss_trace=result.loss_trace[:1]).interval(PROBABILITY)),
        "ess": result.diagnostics.get("ess_bulk"),
        "bias_share": result.diagnostics.get("bias_share"),
        "codes": that_count(warning.code for warning in result.warnings),
    }


# ---- what must come out ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """What many runs of a problem in a mode say together.

    Attributes:
        runs: how many.
        covered: in how many the interval held the answer; without an estimate it does not.
        covered_by_first: of the first chain alone.
        bias: of the mean of λ̂, relative to the answer.
        spread: standard deviation of λ̂ over runs, relative to the answer.
        spread_over_stated: `spread` over the root mean square of the stated errors: above 1 they are too small.
        warned: how many had a warning.
    """

    runs: int
    covered: int
    covered_by_first: int
    bias: float
    spread: float
    spread_over_stated: float
    warned: int

    @staticmethod
    def of(blocks: Sequence[Row]) -> Coverage:
        exact, runs = blocks[0]["exact"], [run for block in blocks for run in block["runs"]]
        llc, stated = (numbers(run[name] for run in runs) for name in ("llc", "stderr"))
        llc, stated = llc[np.isfinite(llc)], stated[np.isfinite(stated)]
        mean = float(llc.mean()) if len(llc) else math.nan
        spread = float(llc.std(ddof=1)) if len(llc) > 1 else math.nan
        mean_square = float(np.square(stated).mean()) if len(stated) else math.nan

        def covered(name: str) -> int:
            low, high = (numbers(run[name][k] for run in runs) for k in (0, 1))
            return int(((low <= exact) & (exact <= high)).sum())

        return Coverage(
            runs=len(runs),
            covered=covered("interval"),
            covered_by_first=covered("first_chain"),
            bias=mean / exact - 1,
            spread=spread / exact,
            spread_over_stated=spread / math.sqrt(mean_square),
            warned=sum(bool(run["codes"]) for run in runs),
        )

    @property
    def share(self) -> float:
        return self.covered / self.runs

    def bounds(self) -> tuple[float, float]:
        """95 % interval of the true coverage, of which `share` is a sample (Clopper & Pearson 1934)."""
        from scipy.stats import beta

        missed = self.runs - self.covered
        low = beta.ppf(0.025, self.covered, missed + 1) if self.covered else 0.0
        high = beta.ppf(0.975, self.covered + 1, missed) if missed else 1.0
        return float(low), float(high)

    def is_right(self) -> bool:
        """Whether the true coverage may lie between `LEAST` and `MOST`."""
        low, high = self.bounds()
        return high >= LEAST and low <= MOST

    def __str__(self) -> str:
        return (
            f"{self.covered} of {self.runs} intervals hold the answer, bias {self.bias:+.1%}, "
            f"spread / stated error {self.spread_over_stated:.2f}, {self.warned} with a warning"
        )


def coverages(tables: Tables) -> dict[tuple[str, str], Coverage]:
    """By problem and mode."""
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in tables["blocks"].values():
        blocks.setdefault((row["problem"], row["mode"]), []).append(row)
    return {key: Coverage.of(rows) for key, rows in blocks.items()}


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Coverage in each mode, as far as so many runs tell."""
    found = coverages(tables)
    results = []
    for mode in settings.modes:
        mine = {problem: found[problem, mode] for problem in settings.problems}
        listed = ", ".join(f"{problem} {c.share:.1%}" for problem, c in mine.items())
        wrong = [problem for problem, c in mine.items() if not c.is_right()]
        results.append(
            Claim(
                f"{mode}: {PROBABILITY:.0%} intervals cover the exact answer in {LEAST:.0%} to {MOST:.0%} of runs, as "
                f"far as {settings.runs} runs tell",
                listed + (f"; outside: {', '.join(wrong)}" if wrong else ""),
                not wrong,
            )
        )
    return results


# ---- figure ------------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Coverage with its own error bars, and the errors of λ̂ in stated standard errors."""
    figure, (left, right) = new_figure(2, width=5.6, height=4.6)
    found = coverages(tables)
    left.axhspan(100 * LEAST, 100 * MOST, color="0.92", zorder=0, label=f"{LEAST:.0%} to {MOST:.0%}")
    left.axhline(100 * PROBABILITY, color="k", lw=1)
    for place, (mode, (color, marker)) in enumerate(zip(settings.modes, CLASSES, strict=False)):
        mine = [found[problem, mode] for problem in settings.problems]
        at = [k + 0.2 * (place - (len(settings.modes) - 1) / 2) for k in range(len(mine))]
        share = [100 * c.share for c in mine]
        bounds = np.array([c.bounds() for c in mine]).T * 100
        bars, look = [share - bounds[0], bounds[1] - share], {"color": color, "marker": marker}
        errorbar_by_warning(left, at, share, bars, [False] * len(at), ms=6, label=mode, **look)
        first = [100 * c.covered_by_first / c.runs for c in mine]
        left.plot(at, first, "x", color=color, ms=5, label=f"{mode}, first chain alone")
        _plot_errors(right, tables, settings, mode, at, color)
    for axes in (left, right):
        axes.set_xticks(range(len(settings.problems)), settings.problems, rotation=20)
    left.set(ylabel=f"coverage of {PROBABILITY:.0%} intervals, %", title="how often the interval holds the answer")
    left.legend(fontsize=8, loc="lower left")
    right.axhline(0, color="k", lw=1)
    right.set(
        ylabel="(λ̂ − exact) / stated standard error", title="errors of all runs, with their mean and central 95 %"
    )
    worst = min(found, key=lambda key: found[key].share)
    figure.suptitle(
        f"{PROBABILITY:.0%} intervals hold the exact answer in {found[worst].share:.1%} to "
        f"{max(c.share for c in found.values()):.1%} of {settings.runs} runs of a problem;\n"
        f"least often for {worst[0]} ({worst[1]})"
    )
    return {"coverage": figure}


def _plot_errors(axes: Axes, tables: Tables, settings: Settings, mode: str, at: Sequence[float], color: str) -> None:
    """A point for each run, and the mean with the central 95 % of runs."""
    rng = np.random.default_rng(0)
    for place, problem in zip(at, settings.problems, strict=True):
        blocks = [r for r in tables["blocks"].values() if (r["problem"], r["mode"]) == (problem, mode)]
        runs = [run for block in blocks for run in block["runs"]]
        exact = blocks[0]["exact"]
        error = (numbers(run["llc"] for run in runs) - exact) / numbers(run["stderr"] for run in runs)
        axes.plot(place + rng.uniform(-0.07, 0.07, len(error)), error, ".", color=color, ms=3, alpha=0.5)
        known = error[np.isfinite(error)]
        if len(known):
            low, high = np.quantile(known, [0.025, 0.975])
            axes.vlines(place, low, high, color=color, lw=1)
            axes.hlines([known.mean(), -2, 2], place - 0.09, place + 0.09, color=[color, "0.4", "0.4"], lw=1.5)
