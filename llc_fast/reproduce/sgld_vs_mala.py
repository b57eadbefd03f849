"""Minibatch SGLD against the full-gradient samplers that it stands in for: does it find the same λ̂, and at what cost?

The setting of Furman & Lau 2024 (arXiv 2402.03698): a ReLU network of 10 inputs and widths 20, 20 and 10, inputs
uniform on [−10, 10], targets from the network itself, mean squared error; ε = 1e-5, γ = 1, minibatches of 32, chains
from w*, λ̂ from all of their steps. Weights are truncated normals of standard deviation 1/√inputs, biases normal.

- "SGLD" is what the paper does;
- "corrected" is the same with ``bias_correction=True``, which subtracts from the loss the bias that step size and
  gradient noise were measured to add, as `estimate_llc` does whenever it chooses ε itself;
- "MALA" accepts or rejects steps of the same ε by the whole data set. It sees the noise ξ that SGLD sees, run by run,
  so that the error of their difference is taken from the differences;
- "HMC" takes MALA's place where that would reject. With h_max the largest curvature at w*, ε·a = ε·nβ·h_max is 2.3 at
  n = 100,000, where a Langevin step is no longer small: SGLD is biased, and MALA would lag behind. A trajectory of
  length τ moves a flat direction as far as a Langevin step of size τ², so T = ε·steps/E[τ²] of them make the same
  stretch of diffusion, with ten leapfrog steps each, which take far less than 1/√a. Draws begin after the first
  trajectory, which takes the stiff directions from w* to where they belong at once. HMC has other noise than SGLD:
  their errors add, from a standard deviation of runs that is pooled over both. At smaller n, MALA tells whether all
  that holds.

Runs are far from equilibrium when they end, in small data sets above all: λ̂ is that of this stretch of diffusion, for
all samplers alike, and warnings say so. It depends on the network, which is random: what carries over from the
published values is their shape, and their agreement.

SGLD as published does not agree at n = 100,000: it is some 10 % too high there, since ε·a = 2.3 inflates the stiffest
direction by 1/(1 − ε·a/4), and minibatches of 32 add their noise. That the two agree is a published claim, so this is a
finding. What is left after the correction is within the error.

A minibatch costs the same whatever n is; a full gradient costs n. Seconds are of one run, the estimate's divided by its
runs, with the pass over all data for L(w*) that every estimate makes once. On a CPU they are processor time, of all
threads, so that it matters little what else the machine is doing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn.functional import mse_loss

import llc_fast
from llc_fast.plots import errorbar_by_warning, new_figure
from llc_fast.problems.relu_network import make_data, make_network
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, estimate_row, is_warned, number, numbers, plus_minus
from llc_fast.reproduce.study import Study
from llc_fast.samplers import HMCSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = (10, 20, 20, 10)
LR, LOCALIZATION, BATCH = 1e-5, 1.0, 32
LEAPFROG, JITTER = 10, 0.2
"""Leapfrog steps of a trajectory, and how much their length varies; see llc_fast.samplers.HMC."""
PUBLISHED = {
    "SGLD": {100: 54.9, 316: 86.7, 1000: 136.9, 3162: 211.2, 10_000: 294.9, 31_623: 349.3, 100_000: 355.8},
    "MALA": {100: 54.3, 316: 86.4, 1000: 140.0, 3162: 215.4, 10_000: 296.2, 31_623: 359.1, 100_000: 349.1},
}
"""Mean λ̂ over five runs of 10,000 steps, of another random network (the paper, and the data of its public code)."""
_CACHED = 10_000  # samples that pass the network at a time: their activations stay in the cache
AGREEMENT, FLAT = 0.05, 2.0
"""How far λ̂ may be from the exact sampler's, and how many times longer SGLD may take at the largest n."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        sizes: n.
        runs, exact_runs: of SGLD, and of MALA and HMC.
        steps: of every run, or what trajectories are worth as many.
        trajectories: T.
        stiff: n from which on MALA is not run.
    """

    sizes: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    runs: int = 8
    exact_runs: int = 3
    steps: int = 6000
    trajectories: int = 300
    stiff: int = 100_000


SCALES = {
    "small": Settings(),
    "paper": Settings(
        sizes=(100, 316, 1000, 3162, 10_000, 31_623, 100_000), runs=20, exact_runs=10, steps=10_000, trajectories=500
    ),
}


def measure(study: Study, settings: Settings) -> None:
    """λ̂ and seconds of every sampler at every n."""
    network = make_network(WIDTHS, study.seed)
    clock = time.process_time if study.device.type == "cpu" else time.perf_counter

    def estimate(case: tuple[str, int]) -> Row:
        name, n = case
        exact = name in ("MALA", "HMC")
        squared = LEAPFROG**2 * (1 + JITTER**2 / 3)  # E[τ²]/δ²
        options: dict[str, dict[str, Any]] = {
            "SGLD": {"sampler": "sgld"},
            "corrected": {"sampler": "sgld", "bias_correction": True},
            "MALA": {"sampler": "mala"},
            "HMC": {
                "sampler": HMCSampler(num_leapfrog=LEAPFROG, jitter=JITTER),
                "lr": LR * settings.steps / settings.trajectories / squared,
                "num_burnin": 1,
                "num_draws": settings.trajectories,
            },
        }
        common: dict[str, Any] = {
            "lr": LR,
            "localization": LOCALIZATION,
            "num_chains": settings.exact_runs if exact else settings.runs,
            "num_burnin": 0,
            "num_draws": settings.steps,
            "batch_size": n if exact else min(BATCH, n),
            "execution": llc_fast.Execution(microbatch_size=_CACHED if exact and n > _CACHED else None),
        }
        data = make_data(network, n, study.seed)
        started = clock()
        result = study.estimate(f"{name} {n}", network, data, mse_loss, **common | options[name])
        spent = clock() - started
        per_run = result.llc_per_chain
        late = max(1, result.schedule.num_draws // 10)
        whole = not result.diagnostics["resumed_steps"]  # else the clock has seen a part of it
        return estimate_row(result) | {
            "name": name,
            "n": n,
            "spread": float(per_run.std(ddof=1)) if len(per_run) > 1 else math.nan,
            "last_tenth": float(result.llc_trace[:, -late:].mean()),
            "acceptance": result.diagnostics.get("acceptance"),
            "seconds_of_run": spent / len(result.loss_trace) if whole else None,
        }

    cases = {
        f"{name}, n = {n}": (name, n)
        for n in settings.sizes
        for name in ("SGLD", "corrected", "MALA", "HMC")
        if name != "MALA" or n < settings.stiff
    }
    study.rows("estimates", cases, estimate, _in_words)
    for name in ("SGLD", "corrected"):
        for n in settings.sizes:
            study.say(f"{name} − exact, n = {n}: {_compared(study.tables, name, n)[2]}")


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Agreement with the exact sampler, and cost."""
    found = []
    for name, label in (("corrected", "bias-corrected SGLD"), ("SGLD", "SGLD as published")):
        compared = {n: _compared(tables, name, n) for n in settings.sizes}
        worst = max(compared, key=lambda n: abs(compared[n][0]) if math.isfinite(compared[n][0]) else math.inf)
        found.append(
            Claim(
                f"{label} and the exact sampler agree within {AGREEMENT:.0%} at every n",
                f"{compared[worst][2]} at n = {worst:,}",
                all(abs(difference) <= 100 * AGREEMENT for difference, _, _ in compared.values()),
                "ours" if name == "corrected" else "published",
            )
        )
    low, high = min(settings.sizes), max(settings.sizes)
    for names, label, wanted in ((("SGLD",), "SGLD", False), (("MALA", "HMC"), "the full-gradient sampler", True)):
        ratio = _slower(tables, names, low, high)
        relation = "more than" if wanted else "at most"
        found.append(
            Claim(
                f"{label} takes {relation} {FLAT:g} times as long at n = {high:,} as at n = {low:,}",
                "not timed in one go: --restart" if ratio is None else f"{ratio:.3g} times",
                ratio is not None and (ratio > FLAT) == wanted,
            )
        )
    return found


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """λ̂ and seconds against n."""
    figure, (left, right) = new_figure(2, width=5.0, height=5.0)
    for name, published in PUBLISHED.items():
        marker = "x" if name == "SGLD" else "+"
        label = f"published, {name} (another network, 10,000 steps)"
        left.plot(list(published), list(published.values()), marker, color="0.65", ms=7, label=label)
    for name, (label, color, marker, shift) in _LOOKS.items():
        rows = [row for row in tables["estimates"].values() if row["name"] == name and row["llc"] is not None]
        left.plot([], [], color=color, marker=marker, ls="", label=label)
        places = [shift * row["n"] for row in rows]
        errors = [figures.SIGMAS * _error(row) for row in rows]
        llc, warned = [row["llc"] for row in rows], map(is_warned, rows)
        errorbar_by_warning(left, places, llc, errors, warned, color=color, marker=marker, ms=6)
        timed = [row for row in rows if row["seconds_of_run"] is not None]
        right.plot(
            [row["n"] for row in timed], [row["seconds_of_run"] for row in timed], color=color, marker=marker, ms=6
        )
        if timed:
            _name_line(right, label, timed[-1], color)
    left.set(
        xscale="log",
        xlabel="n, samples in the data set",
        ylabel="λ̂  (± 2 standard errors over runs; hollow: warned)",
        ylim=(0, None),
        title="SGLD finds what exact samplers find,\nonce its bias is subtracted",
    )
    left.legend(fontsize=8, loc="upper left")
    left.set_ylim(top=1.35 * left.get_ylim()[1])
    right.set(
        xscale="log",
        yscale="log",
        xlabel="n, samples in the data set",
        ylabel=f"seconds for a run of {settings.steps:,} steps (CPU: processor time)",
        title="… and its cost does not grow with the data",
    )
    right.set_xlim(right=right.get_xlim()[1] * 100)  # for the names of the lines
    right.set_xticks([n for n in settings.sizes if math.log10(n).is_integer()])
    right.tick_params(axis="x", which="minor", bottom=False)
    return {"sgld-vs-mala": figure}


_LOOKS = {
    "SGLD": ("SGLD", figures.ORANGE, "v", 0.88),
    "corrected": ("SGLD, bias-corrected", figures.BLUE, "o", 0.96),
    "MALA": ("MALA, full gradient", figures.GREEN, "s", 1.04),
    "HMC": ("HMC, full gradient", "#000000", "D", 1.12),
}
"""Label, color, marker, and how far apart points of one n are plotted."""


def _name_line(axes: Axes, label: str, last: Row, color: str) -> None:
    right, above = {"SGLD": (8, 7), "corrected": (8, -7), "MALA": (-9, 5)}.get(last["name"], (8, 0))
    place = (last["n"], last["seconds_of_run"])
    side = "left" if right > 0 else "right"
    look: dict[str, Any] = {"color": color, "fontsize": 8, "ha": side, "va": "center"}
    axes.annotate(label, place, (right, above), textcoords="offset points", **look)


def _row(tables: Tables, name: str, n: int) -> Row | None:
    return tables["estimates"].get(f"{name}, n = {n}")


def _exact(tables: Tables, n: int) -> Row | None:
    """MALA's row, or HMC's."""
    return _row(tables, "MALA", n) or _row(tables, "HMC", n)


def _compared(tables: Tables, name: str, n: int) -> tuple[float, float, str]:
    """A sampler's λ̂ less the exact one, in percent of that, its standard error, and both in words."""
    ours, exact = _row(tables, name, n), _exact(tables, n)
    if ours is None or exact is None or ours["llc"] is None or exact["llc"] is None:
        return math.nan, math.nan, "not known"
    # Diverged runs are None: a pair of runs needs both.
    one, other = (numbers(row["llc_per_chain"]) for row in (ours, exact))
    if exact["name"] == "MALA":
        pairs = one[: len(other)] - other
        pairs = pairs[np.isfinite(pairs)]
        difference, error = pairs.mean(), pairs.std(ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    else:
        one, other = one[np.isfinite(one)], other[np.isfinite(other)]
        difference, freedom = one.mean() - other.mean(), len(one) + len(other) - 2
        squares = np.square(one - one.mean()).sum() + np.square(other - other.mean()).sum()
        error = math.sqrt(squares / freedom * (1 / len(one) + 1 / len(other))) if freedom > 0 else math.nan
    unit = 100 / exact["llc"]
    uncertainty = f"{unit * error:.1f}" if math.isfinite(error) else "?"
    words = f"{unit * difference:+.1f} ± {uncertainty} %".replace("-", "−")
    return float(unit * difference), float(unit * error), words


def _error(row: Row) -> float:
    """Standard error over runs; NaN if it is not known."""
    runs = sum(value is not None for value in row["llc_per_chain"])
    return number(row["spread"]) / math.sqrt(runs) if runs else math.nan


def _in_words(row: Row) -> str:
    return f"λ̂ = {plus_minus(row['llc'], _error(row))}"


def _slower(tables: Tables, names: tuple[str, ...], low: int, high: int) -> float | None:
    """How many times longer a run takes at the larger n: of the first of these samplers that was run at it."""
    for name in names:
        rows = [_row(tables, name, n) for n in (low, high)]
        times = [row["seconds_of_run"] for row in rows if row is not None]
        if len(times) == 2:
            return None if None in times else times[1] / times[0]
    return None
