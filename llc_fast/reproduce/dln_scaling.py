"""Deep linear networks of growing size: the estimated learning coefficient λ̂ against the known one, λ.

A deep linear network y = W_L ⋯ W_1·x is the one deep network whose learning coefficient is known in closed form, from
its widths and the rank of the product (Aoyagi 2024, :func:`llc_fast.theory.deep_linear`). So it shows whether an
estimator works, and at which size it stops working. Networks are drawn at random as by Furman & Lau 2024 (arXiv
2402.03698, and in 2308.12108v2): widths and depth uniform, and every second weight matrix of reduced rank. Their true
weights are w*, the data are n samples of what they compute, and

    λ̂ = nβ·(mean of L over draws near w* − L(w*)),    nβ = n / log n,

comes from :func:`llc_fast.estimate_llc` with nothing set for any network: minibatches of 500 as in the paper; step
size, momentum and the correction of λ̂ from short pilot chains.

Three things go wrong, all in networks that are deep and of low rank:

- Some directions are so flat that chains of this length do not cross them, and λ̂ is too low. With the small scale's
  seed 0 the network "10k 1" (six layers, rank 2) gives 47.5 of 64 after 8,800 steps and 60.0 after 70,400.
- Of a product of many random matrices the smaller singular values may be too small for n samples to show, and λ̂ is on
  the way to the λ of a smaller rank. "10k 0" has σ = 0.22 and 0.016, and λ = 59 and 88 for rank 1 and 2.
- The formula is for the most singular weights with that product. Where single layers have a higher rank than the
  product, the local coefficient at w* is larger, and λ̂ is too high until the chains have found more singular places.

Warnings should tell of all of them, and no error above 30 % may come without one.

The small scale has a class of its own, of about 100,000 parameters, and looks at 100 million only for a few steps, in a
process of its own: how much memory an estimate takes, and how long a step. The peak is the largest resident set, as in
``benchmarks/speed/bench_memory.py``. Three parts of it belong to no parameter and are subtracted: what torch and the
library occupy after they have made an estimate of 128 parameters, the activations (batch × sum of widths × 4 bytes),
and the data. What is left are w*, one chain, and gradients, of which only one layer's is there at a time: 8 bytes a
parameter and a layer, to which half a byte is allowed on top. On a GPU it is what torch has allocated at most.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss

import llc_fast
from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, SIZE_CLASSES, SizeClass, make_problem
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import MEDIAN, PERCENTILE_90, Claim, accuracy_claim, median_claim, silence_claim
from llc_fast.reproduce.rows import Row, Tables, column, estimate_row, in_words, is_warned, quantile, sizes
from llc_fast.reproduce.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = {**SIZE_CLASSES, "100k": SizeClass((50, 200), (2, 10), 10**6, 5e-7, 10_000)}
"""The paper's six, and one for computers without a GPU, with n as for the paper's larger networks: 10⁵ samples do not
show the small singular values of such a product, and λ̂ is 15 % low."""
RANK_CORRELATION = 0.99
"""Bound on Spearman's ρ over all networks."""
FEW_MEDIAN = 0.08
"""Bound on the median error of classes that have two or three networks here."""
BYTES_BESIDES_LAYER = 8.5
"""For each parameter, with released gradients: w* and one chain, 4 each, and half a byte for everything else."""


@dataclass(frozen=True)
class Sample:
    """How a class is sampled.

    Attributes:
        networks: how many.
        steps: of each chain; half of them are burn-in.
        chains: of each network.
        median: bound on the median error, of a class of which there are too few networks for more; None: that of
            :func:`llc_fast.reproduce.claims.accuracy_claim`, with one on nine in ten.
    """

    networks: int
    steps: int
    chains: int = 4
    median: float | None = None


@dataclass(frozen=True)
class Large:
    """The network whose memory and time are measured: `layers` square matrices of width `width`."""

    width: int = 2000
    layers: int = 25
    chains: int = 2
    steps: int = 2


@dataclass(frozen=True)
class Settings:
    """Networks by class, and the large one; None: not looked at."""

    samples: Mapping[str, Sample]
    large: Large | None = field(default_factory=Large)


SCALES = {
    "small": Settings(
        {"1k": Sample(10, 8800), "10k": Sample(8, 8800), "100k": Sample(2, 8800, chains=2, median=FEW_MEDIAN)}
    ),
    "hours": Settings({"1M": Sample(3, 4000, chains=2, median=FEW_MEDIAN)}, large=None),
    "paper": Settings(
        {
            size: Sample(networks, SIZE_CLASSES[size].num_steps, chains)
            for size, networks, chains in (
                ("1k", 20, 4),
                ("10k", 20, 4),
                ("1M", 10, 4),
                ("10M", 10, 4),
                ("30M", 5, 2),
                ("100M", 5, 2),
            )
        }
    ),
}


def measure(study: Study, settings: Settings) -> None:
    """Estimate network by network, the smallest class first; then a few steps of the large one."""
    cases = {
        f"{size} {study.seed + k}": (size, study.seed + k, sample)
        for size, sample in settings.samples.items()
        for k in range(sample.networks)
    }
    study.rows("networks", cases, lambda case: _network_row(study, *case), _network_in_words)
    if settings.large is not None:
        spec = vars(settings.large) | {"seed": study.seed, "device": str(study.device)}
        study.rows("large", {"large": spec}, in_own_process, _large_in_words)


# ---- λ̂ -----------------------------------------------------------------------------------------------------


def _network_row(study: Study, size: str, seed: int, sample: Sample) -> Row:
    problem = make_problem(CLASSES[size], seed, study.device)
    known = problem.learning_coefficient
    row: Row = {"size": size, "network_seed": seed, "widths": list(problem.widths), "rank": problem.rank}
    row |= {"num_parameters": problem.num_parameters, "lambda": known}
    try:
        result = study.estimate(
            f"{size} {seed}",
            problem.model,
            problem.data,
            mse_loss,
            localization=LOCALIZATION,
            batch_size=BATCH_SIZE,
            num_chains=sample.chains,
            num_burnin=sample.steps // 2,
            num_draws=sample.steps - sample.steps // 2,
            seed=seed,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:  # of this network: the others can still be measured
        return row | {"llc": None, "stderr": None, "error": None, "warnings": [f"not estimated: {error}"], "codes": []}
    return row | estimate_row(result) | {"error": result.llc_mean / known - 1}


def _network_in_words(row: Row) -> str:
    error = "" if row["error"] is None else f" ({row['error']:+.1%})"
    return f"λ = {row['lambda']:g}, {in_words(row)}{error}"


# ---- memory and time of the large network ------------------------------------------------------------------


def in_own_process(spec: Mapping[str, Any]) -> Row:
    """:func:`measure_large` of a process that has done nothing else; ``{"problem": …}`` if it fails."""
    # With the path of this process: with one of its own it would find a source folder that it is started in.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import measure_large; "
    code += f"measure_large({json.dumps(dict(spec))!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"problem": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure_large(spec: str) -> None:
    """Estimate a square network for a few steps, and print bytes and seconds as JSON.

    λ̂ means nothing after so few steps; the step size is so small that no chain diverges.
    """
    given = json.loads(spec)
    width, layers, device = given["width"], given["layers"], torch.device(given["device"])
    samples, num_parameters = 2 * BATCH_SIZE, width**2 * layers
    _estimate_square(8, 2, samples, given)
    imports = _peak_bytes(device)
    result, model = _estimate_square(width, layers, samples, given)
    peak, seconds = _peak_bytes(device), result.settings["seconds"] - result.diagnostics["seconds_of_setup"]
    found = {
        "num_parameters": num_parameters,
        "layers": layers,
        "diverged_chains": result.diverged_chains,
        "peak_bytes": peak,
        "imports_bytes": imports,
        "activations_bytes": 4 * BATCH_SIZE * width * layers,
        "data_bytes": 4 * 2 * samples * width,
        "seconds_of_step": seconds / result.loss_trace.size,
        "seconds_of_update": _seconds_of_update(model, given["seed"]),
        "strategy": result.settings["strategy"],
    }
    print(json.dumps(found))


def _estimate_square(
    width: int, layers: int, samples: int, given: Mapping[str, Any]
) -> tuple[llc_fast.LLCResult, nn.Module]:
    generator = torch.Generator().manual_seed(given["seed"])
    bound = (3 / width) ** 0.5  # of a uniform law with variance 1/width, drawn in place
    model = nn.Sequential()
    with torch.no_grad():
        for _ in range(layers):
            layer = nn.utils.skip_init(nn.Linear, width, width, bias=False)  # type: ignore[no-untyped-call]
            layer.weight.uniform_(-bound, bound, generator=generator)
            model.append(layer)
        model.to(given["device"])
        x = torch.empty(samples, width).uniform_(-10, 10, generator=generator).to(given["device"])
        data = (x, model(x))
    result = llc_fast.estimate_llc(
        model,
        data,
        mse_loss,
        lr=1e-12,
        localization=LOCALIZATION,
        batch_size=BATCH_SIZE,
        num_chains=given["chains"],
        num_burnin=given["steps"] // 2,
        num_draws=given["steps"] - given["steps"] // 2,
        execution=llc_fast.Execution(release_gradients=True),
        seed=given["seed"],
        device=given["device"],
        progress=False,
    )
    return result, model


def _peak_bytes(device: torch.device) -> int | None:
    """Of this process so far: the largest resident set, on a GPU what torch has allocated; None if unknown.

    Not ``getrusage``: what that gives is inherited from the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _seconds_of_update(model: nn.Module, seed: int, repeats: int = 3) -> float:
    """One SGLD step without its gradient: the median, the first one warms up."""
    parameters = list(model.parameters())
    optimizer = llc_fast.SGLD(parameters, lr=1e-12, nbeta=1.0, localization=LOCALIZATION, seed=seed)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    times = []
    for _ in range(repeats + 1):
        _synchronize(parameters[0].device)
        started = time.perf_counter()
        optimizer.step()
        _synchronize(parameters[0].device)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_parameter(row: Row) -> dict[str, float]:
    """The parts of the peak, by what they are for; empty if it could not be measured."""
    if row.get("peak_bytes") is None:
        return {}
    parts = {
        "torch and libraries": row["imports_bytes"],
        "data": row["data_bytes"],
        "activations": row["activations_bytes"],
    }
    rest = row["peak_bytes"] - sum(parts.values())
    parts = {"parameters, chain, gradients": rest, **parts}
    return {name: size / row["num_parameters"] for name, size in parts.items()}


def _large_in_words(row: Row) -> str:
    if "problem" in row:
        return str(row["problem"])
    parts, count = bytes_per_parameter(row), row["num_parameters"]
    memory = f"{parts['parameters, chain, gradients']:.2f} bytes and " if parts else ""
    step, update = (1e9 * row[name] / count for name in ("seconds_of_step", "seconds_of_update"))
    name = f"{count / 1e6:g} million" if count >= 1e6 else f"{count:,}"
    return f"{name} parameters: {memory}{step:.3g} ns a step for each, of which the update takes {update:.2g}"


# ---- what must come out ------------------------------------------------------------------------------------


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Order, accuracy class by class, warnings where they are due, and memory."""
    from scipy.stats import spearmanr

    rows = list(tables["networks"].values())
    done = [r for r in rows if r["llc"] is not None]
    rho = float(spearmanr([r["lambda"] for r in done], [r["llc"] for r in done])[0]) if len(done) > 2 else math.nan
    without = "" if len(done) == len(rows) else f", {len(rows) - len(done)} have no estimate"
    return [
        Claim(
            f"Spearman's ρ of λ̂ and λ is at least {RANK_CORRELATION}",
            f"{rho:.4f} over {len(done)} networks{without}",
            rho >= RANK_CORRELATION and not without,
        ),
        *(_class_claim(size, sample, rows) for size, sample in settings.samples.items()),
        silence_claim(tables["networks"]),
        *([] if settings.large is None else [_memory_claim(tables["large"]["large"])]),
    ]


def _class_claim(size: str, sample: Sample, rows: Sequence[Row]) -> Claim:
    what, mine = f"{size} networks", [r for r in rows if r["size"] == size]
    return accuracy_claim(what, mine) if sample.median is None else median_claim(what, mine, sample.median)


def _memory_claim(large: Row) -> Claim:
    parts = bytes_per_parameter(large)
    if not parts:
        found = large.get("problem", "this system does not report the peak memory of a process")
        return Claim("the large network's memory can be measured", found, False)
    bound, used = BYTES_BESIDES_LAYER + 4 / large["layers"], parts["parameters, chain, gradients"]
    return Claim(
        f"{large['num_parameters']:.3g} parameters: w*, chain and gradients peak at most at {bound:.2f} bytes each",
        f"{used:.2f}; with activations, data and libraries {sum(parts.values()):.2f}",
        used <= bound,
    )


# ---- figure ------------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """λ̂ against λ, and the relative error against the depth."""
    from llc_fast.plots import new_figure

    rows = list(tables["networks"].values())
    figure, (left, right) = new_figure(2, width=5.6, height=4.9)
    figures.known_against_estimated(left, rows)
    left.set_title("estimated against known")
    _plot_errors(right, rows, list(settings.samples))
    smallest, largest = (f"{pick(r['num_parameters'] for r in rows):,}" for pick in (min, max))
    medians = [f"{_median(rows, size):.1%} ({size})" for size in settings.samples]
    title = f"Deep linear networks of {smallest} to {largest} parameters, nothing tuned:\n"
    title += f"half of the estimates are within {', '.join(medians)} of the exact λ"
    if unwarned := [r for r in rows if not is_warned(r)]:
        title += f"; without a warning all within {sizes(r['error'] for r in unwarned).max():.1%}"
    figure.suptitle(title, fontsize=11.5)
    if settings.large is not None:
        large = _large_in_words(tables["large"]["large"])
        figure.supxlabel(f"a few steps of a network with {large}", fontsize=9, color="0.3")
    return {"dln-scaling": figure}


def _median(rows: Sequence[Row], size: str) -> float:
    return quantile(sizes(r["error"] for r in rows if r["size"] == size), 0.5)


def _plot_errors(axes: Axes, rows: list[Row], classes: list[str]) -> None:
    """Signed relative errors with ± 2 standard errors; where there is no estimate, a cross at the bottom."""
    from matplotlib.ticker import MaxNLocator

    from llc_fast.plots import CLASSES as LOOKS
    from llc_fast.plots import errorbar_by_warning

    axes.axhspan(-100 * PERCENTILE_90, 100 * PERCENTILE_90, color="0.95", zorder=0)
    axes.axhspan(-100 * MEDIAN, 100 * MEDIAN, color="0.88", zorder=0)
    axes.axhline(0, color="k", lw=1)
    for place, (size, (color, marker)) in enumerate(zip(classes, LOOKS, strict=False)):
        mine = [r for r in rows if r["size"] == size]
        # Networks of equal depth side by side.
        depths = [
            len(r["widths"]) - 1 + 0.16 * (place - (len(classes) - 1) / 2) + 0.04 * (k % 3 - 1)
            for k, r in enumerate(mine)
        ]
        missing = [depth for depth, r in zip(depths, mine, strict=True) if r["error"] is None]
        axes.plot(missing, [0.02] * len(missing), "x", color=color, transform=axes.get_xaxis_transform())
        error, stderr = 100 * column(mine, "error"), 100 * figures.two_sigma(mine) / column(mine, "lambda")
        errorbar_by_warning(axes, depths, error, stderr, map(is_warned, mine), color=color, marker=marker)
        axes.plot([], [], marker, color=color, ms=5, label=f"{size}: median |error| {_median(rows, size):.1%}")
    figures.label_hollow_in(axes, rows)
    axes.legend(loc="lower left", fontsize=9)
    axes.margins(y=0.12)
    axes.set(xlabel="weight matrices", ylabel="(λ̂ − λ)/λ, %", title="error against depth")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for bound, text in ((PERCENTILE_90, "bound on nine in ten"), (MEDIAN, "bound on the median")):
        axes.annotate(text, (0.99, 100 * bound), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=8)
