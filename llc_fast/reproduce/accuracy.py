"""How far λ̂ is from λ with nothing tuned, beside samplers whose step size was tuned on these very networks.

Random deep linear networks of Furman & Lau 2024 (arXiv 2402.03698, and in 2308.12108v2), λ by Aoyagi's formula for the
rank of the product (the global one; where single layers have a higher rank than the product, the local coefficient at
w* is larger).
``dln-scaling`` has larger networks and how the error depends on depth; here several methods estimate the same networks:

- "nothing tuned": `estimate_llc` with nothing given but the length, and γ = 1 since λ is the global one. 4 chains ×
  8,800 steps, the pilots' 13 % and some curvature make less than 40,000 gradients;
- "kfac": the same with ``sampler="kfac-sgld"``;
- "defaults": not even the length is given (``error-bars`` looks at this);
- "paper's": SGLD with the step size that the paper chose by hand for the class, one chain of 10,000 steps, the last
  tenth of which are draws;
- "RMSprop, ε = …": RMSprop-SGLD as devinterp 1.3.2 defines it, one chain of 10,000 steps, half of which are draws. Read
  it at the step size of the grid that is best *for these networks*, which nobody knows beforehand.

The last two are run by this package: tests hold its update rules equal to devinterp's, and it takes a fraction of the
time. Minibatches are of 500, as in the paper. Networks whose λ is 0 are left out: their error has no unit. A missing
estimate counts as an infinite error, and a warning excuses nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.nn.functional import mse_loss

from llc_fast.plots import CLASSES, errorbar_by_warning, new_figure
from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, SIZE_CLASSES, DeepLinearProblem, make_problem
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import MEDIAN, PERCENTILE_90, Claim, accuracy_claim, silence_claim
from llc_fast.reproduce.rows import (
    Row,
    Tables,
    column,
    estimate_row,
    in_words,
    is_warned,
    quantile,
    relative_error,
    sizes,
)
from llc_fast.reproduce.study import Study
from llc_fast.samplers import RMSpropSGLDSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 8800
"""Of each of four chains."""
OURS = "nothing tuned"
KFAC = "kfac"
FIRST_SEED = 700_000
"""Of the first network with seed 0: far from those that this package was developed with."""


@dataclass(frozen=True)
class Settings:
    """What is estimated.

    Attributes:
        networks: how many, by class.
        methods: of :func:`options_of`.
        steps: of each chain of "nothing tuned"; half of them are burn-in.
        rival_steps: of the single chain of other methods.
    """

    networks: Mapping[str, int] = field(default_factory=lambda: {"1k": 8, "10k": 3})
    methods: tuple[str, ...] = (OURS, "paper's", "RMSprop, ε = 1e-07")
    steps: int = STEPS
    rival_steps: int = 10_000


SCALES = {
    "small": Settings(),
    "paper": Settings({"1k": 30, "10k": 30}, (OURS, "defaults", "paper's", "RMSprop, ε = 1e-07", "RMSprop, ε = 3e-07")),
}


def measure(study: Study, settings: Settings) -> None:
    """Every method on every network, the smallest class first."""
    for size, count in settings.networks.items():
        for problem, seed in itertools.islice(_networks(study, size), count):

            def estimate(method: str, size: str = size, problem: DeepLinearProblem = problem, seed: int = seed) -> Row:
                result = study.estimate(
                    f"{size} {seed} {method}",
                    problem.model,
                    problem.data,
                    mse_loss,
                    batch_size=BATCH_SIZE,
                    **options_of(method, size, settings),
                )
                about = {"size": size, "network_seed": seed, "method": method, "rank": problem.rank}
                known = problem.learning_coefficient
                row = about | {"widths": problem.widths, "lambda": known} | estimate_row(result)
                return row | {"error": relative_error(row, known)}

            cases = {f"{size} {seed}, {method}": method for method in settings.methods}
            study.rows("estimates", cases, estimate, _in_words)


def _networks(study: Study, size: str) -> Iterator[tuple[DeepLinearProblem, int]]:
    """Networks of a class whose λ is not 0, and their seeds."""
    for seed in itertools.count(FIRST_SEED + 1000 * study.seed):
        problem = make_problem(size, seed, study.device)
        if problem.learning_coefficient > 0:
            yield problem, seed


def options_of(method: str, size: str, settings: Settings) -> dict[str, Any]:
    """What a method gives to estimate_llc.

    Raises:
        ValueError: there is no such method.
    """
    if method in (OURS, KFAC):
        burnin = settings.steps // 2
        sampler = {"sampler": "kfac-sgld"} if method == KFAC else {}
        return {"localization": LOCALIZATION, "num_burnin": burnin, "num_draws": settings.steps - burnin} | sampler
    if method == "defaults":
        return {"localization": LOCALIZATION}
    single: dict[str, Any] = {"localization": LOCALIZATION, "num_chains": 1}
    if method == "paper's":
        burnin = settings.rival_steps * 9 // 10
        draws = settings.rival_steps - burnin
        return single | {"lr": SIZE_CLASSES[size].lr, "num_burnin": burnin, "num_draws": draws}
    if method.startswith("RMSprop, ε = "):
        half = settings.rival_steps // 2
        rule = {"sampler": RMSpropSGLDSampler(adapt_steps=math.inf)}  # it never stops, as in devinterp
        return single | rule | {"lr": float(method.split()[-1]), "num_burnin": half, "num_draws": half}
    raise ValueError(f"method={method!r} is unknown")


def _in_words(row: Row) -> str:
    error = "" if row["error"] is None else f" ({row['error']:+.1%})"
    return f"λ = {row['lambda']:g}, {in_words(row)}{error}"


# ---- what must come out ------------------------------------------------------------------------------------


def _of(tables: Tables, size: str, method: str) -> dict[str, Row]:
    rows = tables["estimates"].items()
    return {key: row for key, row in rows if (row["size"], row["method"]) == (size, method)}


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Accuracy of each class, no silence, and no worse than what was tuned."""
    ours = {size: _of(tables, size, OURS) for size in settings.networks}
    found = [accuracy_claim(f"{size} networks, {OURS}", list(rows.values())) for size, rows in ours.items()]
    found.append(silence_claim({key: row for rows in ours.values() for key, row in rows.items()}))
    for size in settings.networks:
        medians = {
            method: _median(tables, size, method) for method in settings.methods if method not in ("defaults", KFAC)
        }
        best = min(medians, key=lambda method: medians[method])
        listed = ", ".join(f"{method} {median:.1%}" for method, median in medians.items())
        text = f"{size} networks: the median error of {OURS} is no larger than that of any tuned method"
        found.append(Claim(text, listed, medians[OURS] == medians[best]))
    return found


def _median(tables: Tables, size: str, method: str) -> float:
    return quantile(sizes(row["error"] for row in _of(tables, size, method).values()), 0.5)


# ---- figure ------------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """λ̂ against λ with nothing tuned; and how errors are distributed, method by method."""
    figure, (left, *panels) = new_figure(1 + len(settings.networks), width=5.2, height=4.8)
    rows = [row for row in tables["estimates"].values() if row["method"] == OURS]
    figures.known_against_estimated(left, rows)
    left.set_title(OURS)
    for panel, size in zip(panels, settings.networks, strict=True):
        _plot_errors(panel, tables, settings, size)
    medians = ", ".join(f"{_median(tables, size, OURS):.1%} ({size})" for size in settings.networks)
    figure.suptitle(f"Deep linear networks, nothing tuned: half of the estimates are within {medians} of the exact λ")
    return {"accuracy": figure}


def _plot_errors(axes: Axes, tables: Tables, settings: Settings, size: str) -> None:
    """|λ̂ − λ|/λ of each network, smallest first; missing estimates are crosses at the top."""
    axes.axhspan(0, 100 * MEDIAN, color="0.88", zorder=0)
    axes.axhspan(100 * MEDIAN, 100 * PERCENTILE_90, color="0.95", zorder=0)
    for method, (color, marker) in zip(settings.methods, CLASSES, strict=False):
        rows = sorted(_of(tables, size, method).values(), key=lambda row: sizes([row["error"]])[0])
        share = [100 * (k + 0.5) / len(rows) for k in range(len(rows))]
        errors = 100 * abs(column(rows, "error"))
        axes.plot(share, errors, color=color, lw=1)
        errorbar_by_warning(axes, share, errors, None, map(is_warned, rows), color=color, marker=marker)
        missing = [place for place, row in zip(share, rows, strict=True) if row["error"] is None]
        axes.plot(missing, [0.98] * len(missing), "x", color=color, transform=axes.get_xaxis_transform())
        axes.plot([], [], color=color, marker=marker, label=f"{method}: median {_median(tables, size, method):.1%}")
    figures.label_hollow_in(axes, tables["estimates"].values())
    axes.set(yscale="log", xlim=(0, 100), ylim=(0.05, None), title=f"{size} networks: errors, smallest first")
    axes.set(xlabel="networks, %", ylabel="|λ̂ − λ|/λ, %")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right", fontsize=9)
