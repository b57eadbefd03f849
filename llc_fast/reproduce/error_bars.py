"""Do the error bars hold λ, and does a length by need save gradients? Deep linear networks with nothing set.

Random deep linear networks of Furman & Lau 2024 (arXiv 2402.03698, and in 2308.12108v2), of seeds that nothing was
developed with, and networks all of whose layers have the rank of their product
(:func:`llc_fast.problems.deep_linear.most_singular`).
Aoyagi's λ is exact for the latter; for the others it is exact where layers happen to have that rank, and else a lower
bound of the local coefficient. So an interval is right that holds λ, or, where λ is a bound, that reaches up to it.

- "by need": `estimate_llc` with nothing set but γ = 1, since these λ are those at global scale;
- "to the budget": the same chains, gone on to 10,000 steps each (``target_error=0``). Their means over the second half
  of shorter lengths say what runs of fixed length would have found;
- "nothing set": γ too is the default, which is local: what that costs in λ̂.

Minibatches are the default's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import mse_loss

from llc_fast.plots import CLASSES, new_figure
from llc_fast.problems.deep_linear import (
    LOCALIZATION,
    SIZE_CLASSES,
    DeepLinearProblem,
    end_to_end,
    make_problem,
    most_singular,
)
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, column, estimate_row, in_words, is_warned, quantile, sizes
from llc_fast.reproduce.study import Study
from llc_fast.settings import DEFAULT_MOST, FIRST_LOOK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BY_NEED, BUDGET, NOTHING = "by need", "to the budget", "nothing set"
FIRST_SEED = 2_700_000
"""Of the first network with seed 0. Those of 820,000 and 1,700,000 on were developed with."""
COVERED, MEDIAN, PERCENTILE_90, TOTAL_ERRORS, SAVED = 0.90, 0.03, 0.10, 5.0, 0.6


@dataclass(frozen=True)
class Settings:
    """What is estimated.

    Attributes:
        random: how many random networks, by class.
        singular: how many whose layers have the rank of their product.
        methods: of the docstring.
        most: steps of a chain of "to the budget".
    """

    random: Mapping[str, int] = field(default_factory=lambda: {"1k": 5})
    singular: Mapping[str, int] = field(default_factory=lambda: {"1k": 1})
    methods: tuple[str, ...] = (BY_NEED, BUDGET)
    most: int = DEFAULT_MOST


SCALES = {
    "small": Settings(),
    "paper": Settings({"1k": 30, "10k": 30}, {"1k": 6, "10k": 6}, (BY_NEED, BUDGET, NOTHING)),
}


def measure(study: Study, settings: Settings) -> None:
    """Network by network, the smallest class first."""
    for size, count in settings.random.items():
        networks = itertools.islice(_random(study, size), count)
        singular = itertools.islice(_singular(study, size), settings.singular.get(size, 0))
        for name, problem in itertools.chain(networks, singular):
            _measure_one(study, settings, size, name, problem)


def _measure_one(study: Study, settings: Settings, size: str, name: str, problem: DeepLinearProblem) -> None:
    known = problem.learning_coefficient
    about = {"size": size, "network": name, "lambda": known, "is_exact": is_exact(problem)}

    def estimate(method: str) -> Row:
        # By need and to the budget are one run, which is called again.
        key = f"{size} {name} {NOTHING if method == NOTHING else BY_NEED}"
        result = study.estimate(key, problem.model, problem.data, mse_loss, **_options(method, settings))
        return about | {
            **estimate_row(result),
            "method": method,
            "widths": problem.widths,
            "rank": problem.rank,
            "below": result.systematic_error[0],
            "above": result.systematic_error[1],
            "extrapolated": result.extrapolated,
            "growth_means": result.diagnostics["growth_means"],
            "ended_by": result.diagnostics["ended_by"],
            "steps": result.schedule.num_steps,
            "error": result.llc_mean / known - 1,
        }

    def all_methods(methods: tuple[str, ...]) -> Row:
        return {"estimates": [estimate(method) for method in methods]}

    study.rows("networks", {f"{size} {name}": settings.methods}, all_methods, _in_words)


def _options(method: str, settings: Settings) -> dict[str, Any]:
    if method == NOTHING:
        return {}
    budget = {"target_error": 0.0} if method == BUDGET else {}
    if settings.most != DEFAULT_MOST:  # in a test
        budget["max_gradients"] = 4 * settings.most
    return {"localization": LOCALIZATION} | budget


def _random(study: Study, size: str) -> Iterator[tuple[str, DeepLinearProblem]]:
    """Networks of a class whose λ is not 0."""
    for seed in itertools.count(FIRST_SEED + 1000 * study.seed):
        problem = make_problem(size, seed, study.device)
        if problem.learning_coefficient > 0:
            yield str(seed), problem


def _singular(study: Study, size: str) -> Iterator[tuple[str, DeepLinearProblem]]:
    """Networks of a class's widths and depths, all of whose layers have the rank of the product."""
    cls = SIZE_CLASSES[size]
    for seed in itertools.count(FIRST_SEED + 1000 * study.seed):
        rng = random.Random(seed)
        widths = tuple(rng.randint(*cls.widths) for _ in range(rng.randint(*cls.layers) + 1))
        rank = rng.randint(1, min(widths))
        yield f"singular {seed}", most_singular(widths, rank, cls.num_samples, seed, study.device)


def is_exact(problem: DeepLinearProblem) -> bool:
    """Whether every layer has the rank of the product, so that Aoyagi's λ is the local coefficient."""
    weights = [weight.detach().double().cpu() for weight in problem.model.parameters()]
    rank = int(torch.linalg.matrix_rank(end_to_end(weights), rtol=1e-6))
    return all(int(torch.linalg.matrix_rank(w, rtol=1e-6)) == rank for w in weights)


def _in_words(network: Row) -> str:
    row = network["estimates"][0]
    error = "" if row["error"] is None else f" ({row['error']:+.1%})"
    above = f" +{row['above']:.2g}" if row["above"] else ""
    return f"λ = {row['lambda']:g}, {in_words(row)}{above}{error}, {row['steps']} steps"


# ---- what must come out ------------------------------------------------------------------------------------


def covers(row: Row) -> bool:
    """Whether the interval holds λ, or reaches up to it where it is a lower bound."""
    low, high = row["interval"]
    return None not in (low, high) and row["lambda"] <= high and (low <= row["lambda"] or not row["is_exact"])


def total_errors(row: Row) -> float:
    """How many total errors, standard plus systematic, λ̂ is below λ, or above it where it is exact."""
    if row["llc"] is None:
        return float("inf")
    below = row["lambda"] - row["llc"]
    systematic = row["above"] if below > 0 else row["below"]
    return 0.0 if below < 0 and not row["is_exact"] else abs(below) / (row["stderr"] + systematic)


def _of(tables: Tables, method: str, size: str | None = None) -> list[Row]:
    rows = [row for network in tables["networks"].values() for row in network["estimates"]]
    return [row for row in rows if row["method"] == method and size in (None, row["size"])]


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Coverage, accuracy, no silence, and gradients saved."""
    rows, found = _of(tables, BY_NEED), []
    held, exact = [covers(row) for row in rows], [covers(row) for row in rows if row["is_exact"]]
    found.append(
        Claim(
            f"95 % intervals hold λ, or its lower bound, for at least {COVERED:.0%} of networks",
            f"{sum(held)} of {len(held)}, of those with an exact λ {sum(exact)} of {len(exact)}",
            sum(held) >= COVERED * len(held),
        )
    )
    drawn = [row for row in rows if not row["network"].startswith("singular")]
    errors = sizes(row["error"] for row in drawn)
    median, high = quantile(errors, 0.5), quantile(errors, 0.9)
    by_size = ", ".join(
        f"{size} {quantile(part, 0.5):.1%} and {quantile(part, 0.9):.1%}"
        for size in settings.random
        if len(part := sizes(row["error"] for row in drawn if row["size"] == size))
    )
    found.append(
        Claim(
            f"random networks: |λ̂ − λ|/λ has a median of at most {MEDIAN:.0%} and a 90th percentile of at most "
            f"{PERCENTILE_90:.0%}",
            f"{median:.1%} and {high:.1%} over {len(errors)} ({by_size})",
            median <= MEDIAN and high <= PERCENTILE_90,
        )
    )
    silent = [f"{r['size']} {r['network']}" for r in rows if total_errors(r) > TOTAL_ERRORS and not is_warned(r)]
    worst = max(map(total_errors, rows))
    found.append(
        Claim(
            f"nothing is off by more than {TOTAL_ERRORS:g} of its own total errors without a warning",
            f"{', '.join(silent) or 'none'}; at worst by {worst:.1f}",
            not silent,
        )
    )
    if BUDGET in settings.methods:
        spent, fixed, length = gradients_at_equal_error(tables)
        found.append(
            Claim(
                f"a length by need takes at most {SAVED:g} of the gradients of the shortest fixed length whose median "
                "and 90th percentile are no larger",
                f"{spent:,.0f} against {fixed:,.0f} ({length} steps), {spent / fixed:.2f}",
                spent <= SAVED * fixed,
            )
        )
    return found


def gradients_at_equal_error(tables: Tables) -> tuple[float, float, int]:
    """Mean gradients by need, and of the fixed length that is as accurate; infinite if none is.

    λ̂ of runs of fixed length is that of the second half of as many steps of the chains of "to the budget".
    """
    ours, long = _of(tables, BY_NEED), _of(tables, BUDGET)
    wanted = [quantile(sizes(row["error"] for row in ours), prob) for prob in (0.5, 0.9)]
    spent = float(column(ours, "gradients").mean())
    pilots = float(np.mean([row["gradients"] - 4 * row["steps"] for row in long]))
    halvings = range(min(len(row["growth_means"]) for row in long))
    for k in reversed(halvings):
        errors = sizes(row["growth_means"][-1 - k] / row["lambda"] - 1 for row in long)
        if quantile(errors, 0.5) <= wanted[0] and quantile(errors, 0.9) <= wanted[1]:
            steps = int(long[0]["steps"]) >> k
            return spent, 4 * steps + pilots, steps
    return spent, 4 * float(long[0]["steps"]) + pilots, int(long[0]["steps"])


# ---- figure ------------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Intervals over λ, and errors against gradients, by need and of fixed lengths."""
    figure, (left, right) = new_figure(2, width=6.4, height=5.0)
    _plot_intervals(left, tables, settings)
    _plot_errors(right, tables, settings)
    rows = _of(tables, BY_NEED)
    figure.suptitle(
        f"Deep linear networks: {sum(map(covers, rows))} of {len(rows)} intervals hold λ, with a median error of "
        f"{quantile(sizes(row['error'] for row in rows), 0.5):.1%}"
    )
    return {"error-bars": figure}


def _plot_intervals(axes: Axes, tables: Tables, settings: Settings) -> None:
    """Each network's interval and λ̂ as shares of λ, sorted by λ̂."""
    axes.axhline(1, color="k", lw=1)
    start = 0
    for size, (color, marker) in zip(settings.random, CLASSES, strict=False):
        rows = sorted(
            (r for r in _of(tables, BY_NEED, size) if r["llc"] is not None), key=lambda r: r["llc"] / r["lambda"]
        )
        at = np.arange(start, start + len(rows))
        start += len(rows) + 2
        known = column(rows, "lambda")
        low, high = (np.array([row["interval"][k] for row in rows], dtype=float) / known for k in (0, 1))
        axes.vlines(at, low, high, color=color, lw=2, alpha=0.4)
        figures.estimates(
            axes, at, [r | {"llc": r["llc"] / r["lambda"], "stderr": None} for r in rows], color=color, marker=marker
        )
        axes.plot(at, column(rows, "extrapolated") / known, "_", color=color, ms=7)
        missed = [k for k, row in zip(at, rows, strict=True) if not covers(row)]
        axes.plot(missed, [1.28] * len(missed), "x", color="k", ms=5)
        axes.plot([], [], color=color, marker=marker, label=f"{size}: λ̂, its interval and (−) extrapolation")
    figures.label_hollow_in(axes, _of(tables, BY_NEED))
    axes.set(ylim=(0.7, 1.3), xticks=[], xlabel="networks, sorted", ylabel="λ̂ / λ", title="by need; × does not hold λ")
    axes.legend(fontsize=8, loc="lower right")


def _plot_errors(axes: Axes, tables: Tables, settings: Settings) -> None:
    """Median and 90th percentile of errors, of fixed lengths and by need, over the mean of gradients."""
    for size, (color, marker) in zip(settings.random, CLASSES, strict=False):
        long = _of(tables, BUDGET, size)
        ours = _of(tables, BY_NEED, size)
        errors = sizes(row["error"] for row in ours)
        for prob, style in ((0.5, "-"), (0.9, "--")):
            if long:
                count = min(len(row["growth_means"]) for row in long)
                steps = [
                    int(long[0]["steps"]) >> k for k in range(count) if int(long[0]["steps"]) >> k >= FIRST_LOOK // 2
                ]
                values = [
                    quantile(sizes(row["growth_means"][-1 - k] / row["lambda"] - 1 for row in long), prob)
                    for k in range(len(steps))
                ]
                axes.plot([4 * s for s in steps], 100 * np.array(values), style, color=color, lw=1.2)
            axes.plot(column(ours, "gradients").mean(), 100 * quantile(errors, prob), marker, color=color, ms=9)
        axes.plot([], [], "-", marker=marker, color=color, label=f"{size}: median (dashed: 90th percentile)")
    axes.set(xscale="log", yscale="log", xlabel="gradients of a network", ylabel="|λ̂ − λ|/λ, %")
    axes.set_title("fixed lengths (lines, without pilots) and by need (points, with them)")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)
