"""Pictures of results. Matplotlib is imported here and nowhere else."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llc_fast.result import LLCResult
from llc_fast.schedule import Schedule
from llc_fast.stats.convergence import autocorrelation, autocorrelation_time, ess_bulk, r_hat
from llc_fast.stats.errors import standard_error
from llc_fast.stats.limits import MAX_R_HAT
from llc_fast.support.files import atomic_write
from llc_fast.support.optional import require

OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "orange": "#E69F00",
}
"""Colors by Okabe & Ito (2008), which people with any color vision can tell apart; lines have them in this order."""
CLASSES = tuple(zip(OKABE_ITO.values(), "os^DvP", strict=True))
"""Color and marker of each of several classes."""
DASHES = ("-", "--", ":", "-.")


def chain_style(chain: int) -> dict[str, Any]:
    """Color and dashes of a chain's lines, the same in every panel and other ones than those of its neighbours."""
    colors = list(OKABE_ITO.values())
    return {"color": colors[chain % len(colors)], "ls": DASHES[chain // len(colors) % len(DASHES)]}


def new_figure(columns: int, rows: int = 1, *, width: float = 5.2, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; `width` and `height` of each in inches."""
    # Not pyplot: no global state, no display, nothing to close.
    made = _shown_in_notebooks(require("matplotlib.figure", "plot").Figure)
    figure = made(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, k + 1) for k in range(rows * columns)]
    for panel in axes:
        panel.set_prop_cycle(color=list(OKABE_ITO.values()))
    return figure, axes


def _empty(cls: type[Figure]) -> Figure:
    return cls.__new__(cls)


@functools.cache
def _shown_in_notebooks(base: type[Figure]) -> type[Figure]:
    class Picture(base):  # type: ignore[misc,valid-type]
        """A figure that a notebook shows as what a cell returns, whether it uses pyplot or not."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=90)
            return file.getvalue()

        def __reduce_ex__(self, _: Any) -> Any:  # a copy is an ordinary figure
            return _empty, (base,), self.__getstate__()

    return Picture


def picture_endings() -> list[str]:
    """Endings that a picture's file may have: "pdf", "png", …

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return sorted(require("matplotlib.backend_bases", "plot").FigureCanvasBase.get_supported_filetypes())


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that its file's ending says; PNG, with the ending added, if there is none.

    Raises:
        ValueError: matplotlib does not know the ending.
        OSError: it can't be written.
    """
    ending = os.path.splitext(os.fspath(path))[1].lstrip(".").lower()
    file = io.BytesIO()  # drawn before any file is made
    figure.savefig(file, format=ending or "png", dpi=150)
    with atomic_write(path if ending else f"{os.fspath(path)}.png") as target:
        target.write(file.getvalue())


# ---- onto axes ---------------------------------------------------------------------------------------------


def errorbar_by_warning(
    axes: Axes,
    x: ArrayLike,
    y: ArrayLike,
    yerr: ArrayLike | None,
    warned: Iterable[Any],
    *,
    xerr: ArrayLike | None = None,
    color: str = OKABE_ITO["blue"],
    marker: str = "o",
    label: str | None = None,
    **style: Any,
) -> None:
    """Points with error bars: filled for estimates without a warning, hollow for those with one.

    Args:
        axes: where.
        x, y: a number for each point.
        yerr, xerr: half the length of each point's error bar, or two rows of them, below and above; None: no bars, or
            none for this point.
        warned: for each point whether it has a warning, or a list of its warnings.
        color, marker: of both kinds of points.
        label: for the legend, which shows the filled kind; see :func:`label_hollow` for the other.
        style: further arguments of ``Axes.errorbar``.
    """
    is_warned = np.array([bool(w) for w in warned], dtype=bool)
    numbers = [None if values is None else np.array(values, dtype=np.float64) for values in (x, y, yerr, xerr)]
    for hollow in (False, True):
        axes.errorbar(
            *(None if values is None else values[..., is_warned == hollow] for values in numbers),  # type: ignore[arg-type]
            **{"ls": "", "ms": 5, "capsize": 3, **style},
            marker=marker,
            color=color,
            mfc="white" if hollow else color,
            label="_hollow" if hollow else label,
        )


def label_hollow(axes: Axes, marker: str = "o") -> None:
    """Say in the legend what hollow points are."""
    axes.plot([], [], marker, color="0.4", mfc="white", ms=5, label="hollow: with a warning")


def _smooth(trace: np.ndarray[Any, Any], width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Means over consecutive windows, and where they lie."""
    count = len(trace) // width
    if not count:
        return np.zeros(0), np.zeros(0)
    means = trace[: count * width].reshape(count, -1).mean(axis=1)
    return (np.arange(count) + 0.5) * (len(trace[: count * width]) / count), means


def _dots(count: int) -> dict[str, Any]:
    """What lets a line of one point be seen."""
    return {"marker": "o", "ms": 4} if count == 1 else {}


def _say(axes: Axes, words: str) -> None:
    """Instead of lines."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color="0.5")
    axes.set(xticks=[], yticks=[])


def plot_traces(axes: Axes, result: LLCResult, *, known: float | None = None) -> None:
    """nβ·(L − L(w*)) along every chain: it rises from zero, and should be flat before the draws begin.

    Chains that diverged leave the picture; the others say what it shows.
    """
    result, unit = _in_unit(result)
    width = max(1, result.loss_trace.shape[1] // 200)
    lines = [_smooth(row, width) for row in result.excess_trace]
    window = _Window([y for _, y in _of_kept(result, lines)], edge=0.05)
    look = _look(len(lines))
    for chain, (x, y) in enumerate(lines):
        axes.plot(x, window.clipped(y), **look, **chain_style(chain), **_dots(len(x)))
    if result.schedule.num_burnin:
        axes.axvspan(0, result.schedule.num_burnin, color="0.93", zorder=0)
        axes.text(0.02, 0.97, "burn-in", transform=axes.transAxes, va="top", color="0.5")
    if known is not None:
        axes.axhline(known, color="k", ls="--", lw=1, label=f"known λ = {known:g}")
        axes.legend(loc="lower right")
    axes.set(xlabel="step", ylabel=f"{unit}, window means", xlim=(0, max(result.loss_trace.shape[1], 1)))
    if known is None and window.limits is not None:
        axes.set_ylim(window.limits)
        if window.limits[1] > 1e12:  # all chains diverged
            from matplotlib.ticker import FixedLocator

            decades = np.arange(0, math.log10(window.limits[1]))
            axes.set_yscale("symlog", linthresh=1.0)
            axes.yaxis.set_major_locator(FixedLocator([0.0, *10.0 ** decades[3 :: max(1, len(decades) // 6)]]))
            axes.yaxis.set_minor_locator(FixedLocator([]))
            axes.set_ylim(bottom=min(-1.0, 2 * min(float(np.nanmin(y)) for _, y in lines if np.isfinite(y).any())))
    if not any(np.isfinite(y).any() for _, y in lines):
        _say(axes, "no steps")


def plot_running(axes: Axes, result: LLCResult) -> None:
    """The running λ̂ of every chain, and of all of them with its interval, over the logarithm of the length.

    The last interval is that of the result, with `systematic_error`; those before are of sampling alone.
    """
    result, _ = _in_unit(result)
    marked, middle, half = running_estimate(result)
    low, high = result.interval()
    if not len(marked) or not np.isfinite(middle[-1]):
        _say(axes, "no draws")
        return
    count = result.schedule.num_draws
    ends = np.unique(np.geomspace(1, count, 120).round().astype(int))
    means = (np.cumsum(result.llc_trace, axis=1) / np.arange(1, count + 1))[:, ends - 1]
    late = means[result.kept_chains][:, ends >= (20 if marked[-1] >= 100 else 1)]
    window = _Window([late, np.array([low, high])])
    look = _look(len(means))
    for chain, row in enumerate(means):
        axes.plot(ends, window.clipped(row), **look, **chain_style(chain), **_dots(len(ends)))
    axes.plot(marked, window.clipped(middle), color="k", lw=1.6, label=f"{_name(result)} = {result.llc_mean:.4g}")
    axes.fill_between(
        marked,
        window.clipped(middle - half),
        window.clipped(middle + half),
        color="0.5",
        alpha=0.25,
        lw=0,
        label="95 % interval",
    )
    if np.isfinite([low, high]).all():
        place, span = window.clipped(middle[-1:]), window.clipped(np.array([low, high]))
        axes.errorbar(marked[-1:], place, abs(span[:, None] - place), color="k", marker="o", ms=4, capsize=4, zorder=5)
    axes.legend(loc="best", fontsize=8)
    axes.set(xscale="log", xlabel="draws of a chain so far", ylabel=_name(result), xlim=(1 / 1.1, max(count, 2) * 1.1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    if window.limits is not None:
        axes.set_ylim(window.limits)


def running_estimate(result: LLCResult, points: int = 30) -> tuple[Any, Any, Any]:
    """λ̂ of the first draws of every chain that is kept, at lengths that grow by a factor.

    Args:
        result: whose draws.
        points: lengths at most.

    Returns:
        Lengths (draws of a chain, the last of them all), λ̂, and half its 95 % interval without `systematic_error`, NaN
        where it is not known.
    """
    draws = result.kept_draws
    if not draws.size:
        return np.zeros(0, int), np.zeros(0), np.zeros(0)
    lengths = np.unique(np.geomspace(1, draws.shape[1], points).round().astype(int))
    of_reference = result.nbeta * float(result.diagnostics.get("init_loss_stderr") or 0.0)
    half = []
    for length in lengths:
        error = standard_error(draws[:, :length])
        half.append(error.quantile(0.95) * math.hypot(error.value, of_reference))
    means = np.array([draws[:, :length].mean() for length in lengths])
    return lengths, means, np.array(half)


def plot_forest(axes: Axes, result: LLCResult) -> None:
    """λ̂ of every chain with its own interval, 50 % thick and 95 % thin, above that of all chains, which is the band.

    Chains that are not part of λ̂ are hollow; those that diverged are crosses.
    """
    result, _ = _in_unit(result)
    rows, kept = len(result.loss_trace), set(result.kept_chains)
    diverged, estimates = result.diverged_chains, result.llc_per_chain
    errors = [standard_error(row[np.isfinite(row)][None]) for row in result.llc_trace]
    half = np.array([[error.quantile(prob) * error.value for prob in (0.5, 0.95)] for error in errors])
    low, high = result.interval()
    known = np.isfinite(estimates)
    if not known.any():
        _say(axes, "no draws")
        return
    usual = np.median(half[known, 1][np.isfinite(half[known, 1])]) if np.isfinite(half[known, 1]).any() else 0.0
    # Intervals that say nothing, of very short chains, would leave no room for the rest.
    usual = min(usual, 1.5 * max(float(np.ptp(estimates[known])), high - low if math.isfinite(high - low) else 0.0))
    window = _Window([estimates[known] - 1.2 * usual, estimates[known] + 1.2 * usual, np.array([low, high])])
    size = float(np.clip(60 / rows, 2.0, 5.0))
    for chain in np.flatnonzero(known):
        color = chain_style(int(chain))["color"]
        for width, span in zip((0.35 * size, 0.8 * size), half[chain, ::-1], strict=True):
            ends = window.clipped(np.array([estimates[chain] - span, estimates[chain] + span]))
            axes.plot(ends, [chain, chain], color=color, lw=width, solid_capstyle="butt")
        fill = color if int(chain) in kept else "white"
        axes.plot(window.clipped(estimates[chain : chain + 1]), [chain], "o", ms=size, color=color, mfc=fill, zorder=4)
    pooled = {"color": "k", "marker": "s", "ms": 4.5, "capsize": 3, "zorder": 5}
    if np.isfinite(result.llc_mean):
        place = window.clipped(np.array([result.llc_mean]))
        span = window.clipped(np.array([low, high]))
        axes.axvline(place[0], color="k", lw=0.8)
        if np.isfinite(span).all():
            axes.axvspan(*span, color="0.5", alpha=0.18, lw=0)
        axes.errorbar(place, [rows], xerr=abs(span[:, None] - place), **pooled)  # type: ignore[arg-type]
    for codes, look in ((diverged, "x"), (sorted({*range(rows)} - {*diverged} - {*np.flatnonzero(known)}), "|")):
        text = "diverged" if look == "x" else "no draws"
        transform = axes.get_yaxis_transform()
        if codes:
            axes.plot([0.03] * len(codes), codes, look, color="0.35", ms=5, transform=transform, label=text)
    if diverged or not kept.issuperset(np.flatnonzero(known).tolist()):
        if not kept.issuperset(np.flatnonzero(known).tolist()):
            axes.plot([], [], "o", color="0.35", mfc="white", ms=4, label="not part of λ̂")
        axes.legend(loc="best", fontsize=8)
    step = max(1, -(-rows // 16))
    axes.set_yticks([*range(0, rows - step // 2, step), rows], [*map(str, range(0, rows - step // 2, step)), "all"])
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel=f"{_name(result)} of each chain", ylabel="chain", ylim=(rows + 0.7, -0.7))
    axes.tick_params(axis="y", labelsize=8)
    if window.limits is not None:
        axes.set_xlim(window.limits)


def plot_density(axes: Axes, result: LLCResult) -> None:
    """The density of nβ·(L − L(w*)) over the draws, of every chain and of all of them; w* is at 0, λ̂ is the mean.

    Chains that have converged have the same one. A chain without two different draws has none.
    """
    result, unit = _in_unit(result)
    rows = [row[np.isfinite(row)] for row in result.llc_trace]
    drawn = {chain: rows[chain] for chain in _kept_or_all(result) if _varies(rows[chain])}
    if not drawn:
        _say(axes, "no two draws to compare")
        return
    together = np.concatenate(list(drawn.values()))
    low, high = np.quantile(together, [0.001, 0.999])  # single spikes would leave no room for the rest
    margin = 0.15 * (high - low) or 0.15 * np.ptp(together)
    left, right = low - margin, high + margin
    is_inside = left - 0.75 * (right - left) < 0 < right + 0.75 * (right - left)
    x = np.linspace(left, right, 200)
    look = _look(len(rows))
    for chain, row in drawn.items():
        axes.plot(x, _density(row, x), **look, **chain_style(chain))
    axes.plot(x, _density(together, x), color="k", lw=1.6, label="all chains")
    if np.isfinite(result.llc_mean):
        axes.axvline(result.llc_mean, color="k", lw=1, label=f"mean = {result.llc_mean:.4g}")
    reference: dict[str, Any] = {"color": OKABE_ITO["vermillion"], "ls": "--", "lw": 1.2}
    name = f"w*: L = {result.init_loss:.4g}"
    if is_inside:
        axes.axvline(0, **reference, label=name)
        extra = 0.03 * (right - left)
        left, right = min(left, -extra), max(right, extra)
    else:
        axes.plot([], [], **reference, label=f"{name}, far to the {'left' if left > 0 else 'right'}")
    axes.legend(loc="best", fontsize=8)
    axes.set(xlabel=f"{unit} of a draw", ylabel="density", xlim=(left, right), yticks=[])
    axes.set_ylim(bottom=0)


def _density(values: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A kernel density estimate, with the width of Silverman's rule."""
    values = np.sort(values)[:: max(1, len(values) // 2000)]
    quarter = np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.34
    spread = min(values.std(), quarter) if quarter > 0 else values.std()
    width = 0.9 * spread * len(values) ** -0.2
    kernels = np.exp(-0.5 * ((x[:, None] - values) / width) ** 2)
    found: np.ndarray[Any, Any] = kernels.mean(axis=1) / (width * np.sqrt(2 * np.pi))
    return found


def plot_autocorrelation(axes: Axes, result: LLCResult) -> None:
    """The autocorrelation of the draws' loss, of every chain and their mean; noise stays within ±1.96/√draws."""
    result, _ = _in_unit(result)
    draws, chains = result.kept_draws, result.kept_chains
    moving = [k for k, row in enumerate(draws) if _varies(row)]
    if not moving or draws.shape[1] < 4:
        _say(axes, "too few draws to compare")
        return
    time = autocorrelation_time(draws[moving])
    lags = min(draws.shape[1] - 1, max(20, min(100, math.ceil(8 * time)), math.ceil(3 * time)))
    rho, x = autocorrelation(draws[moving])[:, : lags + 1], np.arange(lags + 1)
    band = 1.96 / math.sqrt(draws.shape[1])
    axes.axhspan(-band, band, color="0.5", alpha=0.25, lw=0, label="noise, 95 %")
    axes.axhline(0, color="0.4", lw=0.8)
    look = _look(len(result.loss_trace))
    for k, row in zip(moving, rho, strict=True):
        axes.plot(x, row, **look, **chain_style(chains[k]))
    ess = result.diagnostics.get("ess_bulk") or ess_bulk(draws)
    label = f"mean; ESS = {ess:.0f} of {draws.size}" if math.isfinite(ess) else "mean"
    axes.plot(x, rho.mean(axis=0), color="k", lw=1.6, label=label)
    axes.legend(loc="upper right", fontsize=8)
    low = min(-1.5 * band, float(rho.min()) - 0.05)
    axes.set(xlabel="lag in draws", ylabel="autocorrelation of the loss", xlim=(0, lags), ylim=(max(low, -1.05), 1.05))


def plot_rank(axes: Axes, result: LLCResult) -> None:
    """For every chain, how its share of the smallest draws of all chains differs from its fair share.

    With F_c(u) the share of a chain's draws whose rank among all draws is below a share u of them, the lines are
    F_c(u) − u (Säilynoja, Bürkner & Vehtari 2022), 0 where chains agree: above it a chain has more small losses than
    others. The band has two standard deviations of the greatest difference between chains whose R̂ is `MAX_R_HAT`: means
    of normal distributions that differ by s standard deviations have R̂² = 1 + s², and ``|F_c(u) − u| ≤ s/√(2π)``. Of
    one chain the halves are compared.
    """
    result, _ = _in_unit(result)
    draws, chains = result.kept_draws, result.kept_chains
    if draws.shape[1] < 8 or not any(map(_varies, draws)):
        _say(axes, "too few draws to compare")
        return
    one = len(draws) == 1
    if one:
        half = draws.shape[1] // 2
        draws = np.stack([draws[0, :half], draws[0, -half:]])
    x = np.linspace(0, 1, 201)
    look = _look(len(result.loss_trace))
    axes.axhspan(-_RANK_BAND, _RANK_BAND, color="0.5", alpha=0.25, lw=0, label=f"R̂ below {MAX_R_HAT:g}")
    axes.axhline(0, color="0.4", lw=0.8)
    shares = rank_shares(draws, x) - x
    for k, row in enumerate(shares):
        name = f"{('first', 'second')[k]} half" if one else None
        axes.plot(x, row, **look, **chain_style(k if one else chains[k]), label=name)
    found = result.diagnostics.get("r_hat") or r_hat(result.kept_draws)
    if math.isfinite(found):
        axes.plot([], [], " ", label=f"R̂ = {found:.3f}")
    axes.legend(loc="upper right", fontsize=8)
    most = min(1.0, 1.4 * max(float(np.abs(shares).max()), _RANK_BAND))
    axes.set(xlabel="rank among all draws / their number", ylabel="share of a chain − fair share")
    axes.set(xlim=(0, 1), ylim=(-most, most))


_RANK_BAND = 2 * math.sqrt((MAX_R_HAT**2 - 1) / (2 * math.pi))
"""See :func:`plot_rank`."""


def rank_shares(draws: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The share of each chain's draws ``[chain, draw]`` whose rank among all is at most ``x`` times their number."""
    _, place, counts = np.unique(draws, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place.reshape(draws.shape)] / draws.size
    return np.stack([np.searchsorted(np.sort(row), x, side="right") / draws.shape[1] for row in ranks])


def _in_unit(result: LLCResult) -> tuple[LLCResult, str]:
    """What is shown, and its name: nβ·(L − L(w*)), or where that is 0, since nβ is, L − L(w*)."""
    return (result, "nβ (L − L(w*))") if result.nbeta else (replace(result, nbeta=1.0), "L − L(w*)")


def _name(result: LLCResult) -> str:
    """Of the mean over draws, of a result as :func:`_in_unit` gives it."""
    return "λ̂" if result.settings.get("nbeta") != 0 else "mean of L − L(w*)"


def _kept_or_all(result: LLCResult) -> list[int]:
    """Chains that count; all, if there is none."""
    return result.kept_chains or list(range(len(result.loss_trace)))


def _of_kept(result: LLCResult, rows: Sequence[Any]) -> list[Any]:
    return [rows[chain] for chain in _kept_or_all(result)]


def _varies(row: np.ndarray[Any, Any]) -> bool:
    """Whether there are two different draws, as far apart as floats can tell."""
    return len(row) > 1 and bool(np.ptp(row) > 1e-13 * np.abs(row).max() and 1e-290 < row.var() < math.inf)


def _look(chains: int) -> dict[str, Any]:
    """Of the lines of so many chains."""
    return {"lw": 0.9 if chains <= 8 else 0.6, "alpha": 0.8 if chains <= 8 else 0.55}


class _Window:
    """What an axis shows of numbers: all that are finite, with a margin; numbers far outside are moved nearer.

    Matplotlib can't place what is many orders of magnitude outside of a picture.
    """

    limits: tuple[float, float] | None = None

    def __init__(self, values: Sequence[np.ndarray[Any, Any]], edge: float = 0.08) -> None:
        together = np.concatenate([np.ravel(v) for v in values]) if values else np.zeros(0)
        together = together[np.abs(together) < 1e100]  # not NaN either
        if together.size:
            low, high = float(together.min()), float(together.max())
            margin = max(edge * (high - low), 1e-3 * abs(high), 1e-100)
            self.limits = low - margin, high + margin

    def clipped(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.limits is None:
            return np.full(np.shape(values), np.nan)
        low, high = self.limits
        found: np.ndarray[Any, Any] = np.clip(values, low - 20 * (high - low), high + 20 * (high - low))
        return found


def plot_against_known(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """λ̂ against known λ with error bars, one point a model, hollow where the estimate came with a warning.

    Args:
        axes: where.
        rows: dictionaries with ``lambda_true``, ``llc_mean``, ``llc_stderr`` and ``size`` (the class), and perhaps
            ``warnings``. What has no finite positive estimate is left out.
    """
    from matplotlib.ticker import LogFormatter

    rows = [r for r in rows if r["llc_mean"] is not None and 0 < r["llc_mean"] < np.inf and r["lambda_true"] > 0]
    values = np.array([[r["lambda_true"], r["llc_mean"]] for r in rows])
    low, high = (0.8 * values.min(), 1.25 * values.max()) if rows else (1.0, 10.0)
    axes.plot([low, high], [low, high], color="k", lw=1, label="λ̂ = λ")
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color="0.9", label="± 10 %")
    for size, (color, marker) in zip(dict.fromkeys(r["size"] for r in rows), itertools.cycle(CLASSES), strict=False):
        chosen = [r for r in rows if r["size"] == size]
        errorbar_by_warning(
            axes,
            [r["lambda_true"] for r in chosen],
            [r["llc_mean"] for r in chosen],
            [2 * r["llc_stderr"] for r in chosen],
            [bool(r.get("warnings")) for r in chosen],
            color=color,
            marker=marker,
            label=f"{size} networks",
        )
    if any(r.get("warnings") for r in rows):
        label_hollow(axes)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="λ known in closed form",
        ylabel="λ̂ estimated, ± 2 standard errors",
        title="deep linear networks",
    )
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, few of them; setting the scale undoes this
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    axes.legend(loc="upper left", fontsize=9)


# ---- whole figures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A picture of one thing about a result.

    Attributes:
        title: above it.
        draw: puts it onto axes.
        reading: what to look for, in a sentence or two.
    """

    title: str
    draw: Callable[[Axes, LLCResult], None]
    reading: str


PANELS: Mapping[str, Panel] = {
    "trace": Panel(
        "loss along the chains",
        plot_traces,
        "Each line is a chain, which starts at w* where this is 0. After burn-in (gray) lines should be flat, and lie "
        "on top of each other.",
    ),
    "running": Panel(
        "running estimate",
        plot_running,
        "λ̂ from the first draws alone, of each chain and (black) of all, with its 95 % interval. It should have "
        "settled: where it still climbs at the right end, λ̂ is too low.",
    ),
    "forest": Panel(
        "estimate of each chain",
        plot_forest,
        "λ̂ of each chain with its 50 % (thick) and 95 % interval, and below of all of them, whose interval is the gray "
        "band. Intervals of chains should overlap. Each chain has the same color in all pictures.",
    ),
    "density": Panel(
        "losses of the draws",
        plot_density,
        "How the loss is distributed over draws, of each chain and (black) of all. Its mean is λ̂; the dashed line is "
        "w*. Chains should have the same distribution, to the right of w*.",
    ),
    "autocorr": Panel(
        "autocorrelation",
        plot_autocorrelation,
        "How much a draw resembles the one that many draws earlier. It should fall into the gray band early; the "
        "longer that takes, the fewer independent draws there are (ESS).",
    ),
    "rank": Panel(
        "ranks of the draws",
        plot_rank,
        "Whether a chain has more of the small losses (line above 0) or of the large ones than others. Lines should "
        "stay in the gray band; R̂ sums it up.",
    ),
}
"""The pictures of a result by name; the names are those of ArviZ's functions where it has one (``plot_trace``, …)."""

NAMED_CHAINS = 24
"""How many chains the legend of a whole figure names at most."""


def plot_result(result: LLCResult, panels: Sequence[str] | None = None) -> Figure:
    """Panels of a result under one title: λ̂, R̂, the effective sample size and the codes of the warnings.

    Below, which line is which chain.

    Args:
        result: of an estimate.
        panels: names from `PANELS`, in their order; None: all.

    Raises:
        ValueError: `panels` is empty, or has another name.
    """
    names = named_panels(panels)
    columns = {2: 2, 4: 2}.get(len(names), min(len(names), 3))
    rows = -(-len(names) // columns)
    figure, axes = new_figure(columns, rows, width=4.3, height=3.4)
    for spare in axes[len(names) :]:
        spare.remove()
    for place, name in zip(axes, names, strict=False):
        _draw(place, result, name)
        place.set_title(PANELS[name].title, fontsize=11)
        for axis in (place.xaxis, place.yaxis):
            axis.label.set_fontsize(9)
        place.tick_params(labelsize=8)
    with np.errstate(all="ignore"):
        figure.suptitle("\n".join(_headline(result, 43 * columns)))
    _name_chains(figure, result, 8 if columns > 2 else 3 * columns - 1)
    return figure


def plot_panel(result: LLCResult, name: str) -> Figure:
    """One panel alone, without a title or a legend of chains."""
    (name,) = named_panels([name])
    figure, (axes,) = new_figure(1, width=5.2, height=3.4)
    _draw(axes, result, name)
    return figure


def _draw(axes: Axes, result: LLCResult, name: str) -> None:
    """A panel; losses of chains that diverge may be too large to be squared, which is no news."""
    with np.errstate(all="ignore"):
        PANELS[name].draw(axes, result)


def panel_svg(result: LLCResult, name: str) -> bytes:
    """:func:`plot_panel` as an SVG document, the same bytes for the same result."""
    figure, file = plot_panel(result, name), io.BytesIO()
    with require("matplotlib", "plot").rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def named_panels(panels: Sequence[str] | None) -> list[str]:
    """The names of panels, checked; of all, if none are given.

    Raises:
        ValueError: there is none, or one has another name.
    """
    names = list(PANELS) if panels is None else [panels] if isinstance(panels, str) else list(panels)
    if unknown := [name for name in names if name not in PANELS]:
        raise ValueError(f"panels has {unknown[0]!r}: use some of {', '.join(map(repr, PANELS))}")
    if not names:
        raise ValueError(f"panels is empty: use some of {', '.join(map(repr, PANELS))}, or None for all")
    return names


def _name_chains(figure: Figure, result: LLCResult, columns: int) -> None:
    """A legend below the panels."""
    from matplotlib.lines import Line2D

    chains = range(min(len(result.loss_trace), NAMED_CHAINS, 3 * columns))
    if not chains:
        return
    more = len(result.loss_trace) - len(chains)
    names = [f"chain {chain}{_fate(result, chain)}" for chain in chains]
    names[-1] += f" (and {more} more)" if more else ""
    lines = [Line2D([], [], lw=1.6, **chain_style(chain)) for chain in chains]
    figure.legend(lines, names, loc="outside lower center", ncols=min(columns, len(names)), fontsize=9)


def _headline(result: LLCResult, width: int = 130) -> list[str]:
    low, high = result.interval()
    first = [f"λ̂ = {result.llc_mean:.4g}" if np.isfinite(result.llc_mean) else "no estimate"]
    if not result.nbeta:
        first = ["λ̂ = 0 by definition, as nβ = 0"]
    elif np.isfinite(result.llc_stderr):
        first[0] += f" ± {result.llc_stderr:.2g} (95 % interval {low:.4g} to {high:.4g})"
    for name, text in (("r_hat", "R̂ = {:.3f}"), ("ess_bulk", "ESS = {:.0f}")):
        if (value := result.diagnostics.get(name)) is not None:
            first.append(text.format(value))
    codes = "warnings: " + ", ".join(w.code for w in result.warnings)
    lines = textwrap.wrap(", ".join(first), width, break_on_hyphens=False)
    return [*lines, *textwrap.wrap(codes, width, break_on_hyphens=False)[: len(result.warnings)]]


def _fate(result: LLCResult, chain: int) -> str:
    """What became of a chain, if it is not what it should be."""
    if chain in result.diverged_chains:
        return " (diverged)"
    if result.steps_done is None:
        return ""
    # Of a run that was interrupted in burn-in, the result has the steps that were made and no more.
    names = ("num_draws", "num_burnin", "num_steps_bw_draws")
    planned = Schedule(*(result.settings.get(name, getattr(result.schedule, name)) for name in names)).num_steps
    done = result.steps_done[chain]
    return f" ({done / planned:.0%} done)" if done < planned else ""


def small_png_of_traces(result: LLCResult) -> str:
    """:func:`plot_traces` as a small PNG in base64, for a notebook."""
    figure, (axes,) = new_figure(1, width=4.5, height=2.2)
    plot_traces(axes, result)
    axes.set_ylabel("nβ (L − L(w*))")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return base64.b64encode(file.getvalue()).decode()


def plot_known(rows: Sequence[dict[str, Any]], example: LLCResult | None = None) -> Figure:
    """λ̂ against known λ, see :func:`plot_against_known`; beside it the traces of one of the models.

    Args:
        rows: one a model.
        example: the result of the last row.
    """
    figure, axes = new_figure(1 if example is None else 2)
    plot_against_known(axes[0], rows)
    if example is not None:
        plot_traces(axes[1], example, known=rows[-1]["lambda_true"])
        axes[1].set_title("loss along the chains of the last network")
    return figure


def plot_training(steps: Sequence[int], results: Sequence[LLCResult]) -> Figure:
    """λ̂ along training with its 95 % interval, and L(w*) below."""
    means, losses = np.array([r.llc_mean for r in results]), np.array([r.init_loss for r in results])
    intervals = np.array([r.interval() for r in results])
    return _plot_along(np.array(steps), "step", means, intervals.T, losses, [bool(r.warnings) for r in results])


def plot_scan(
    nbeta: np.ndarray[Any, Any],
    localization: np.ndarray[Any, Any],
    mean: np.ndarray[Any, Any],
    stderr: np.ndarray[Any, Any],
    warned: np.ndarray[Any, Any],
    *,
    cells: Sequence[tuple[int, ...]] = (),
    title: str = "",
) -> Figure:
    """λ̂ over nβ and γ: a heat map of a grid, a line of a path or where there is one nβ or one γ.

    Args:
        nbeta, localization, mean, stderr: a number for each cell, ``[nβ, γ]`` or ``[cell]``; NaN is left out.
        warned: cells that are hollow.
        cells: places of the cells that get a frame.
        title: of the figure.
    """
    lines = mean.ndim == 1 or 1 in mean.shape
    rows, columns = (1, 1) if lines else mean.shape
    figure, (axes,) = new_figure(1, width=max(5.6, 1.9 + 1.25 * columns), height=max(4.0, 1.7 + 0.62 * rows))
    draw = _scan_line if lines else _scan_map
    draw(axes, nbeta, localization, mean, stderr, warned, cells)
    figure.suptitle("\n".join(textwrap.wrap(title, int(12 * figure.get_figwidth()))), fontsize=10)
    return figure


def _scan_line(
    axes: Axes, nbeta: Any, localization: Any, mean: Any, stderr: Any, warned: Any, cells: Sequence[tuple[int, ...]]
) -> None:
    framed = np.zeros(mean.shape, dtype=bool)
    for place in cells:
        framed[place] = True
    nbeta, localization, mean, stderr, warned, framed = (
        np.ravel(values) for values in (nbeta, localization, mean, stderr, warned, framed)
    )
    moving = [(values, name) for values, name in ((nbeta, "nβ"), (localization, "γ")) if len(np.unique(values)) > 1]
    one = len(moving) == 1
    x, name = moving[0] if one else (np.arange(len(mean)), "cell")
    known = np.isfinite(mean)
    axes.plot(x[known], mean[known], color=OKABE_ITO["sky"], lw=1, zorder=1)
    if framed.any():
        look: dict[str, Any] = {"lw": 0, "marker": "o", "ms": 16, "alpha": 0.35, "zorder": 0}
        axes.plot(x[framed], mean[framed], color=OKABE_ITO["orange"], label="plateau", **look)
    errorbar_by_warning(axes, x[known], mean[known], 2 * stderr[known], warned[known], label="λ̂ ± 2 standard errors")
    if warned[known].any():
        label_hollow(axes)
    axes.legend(fontsize=9)
    axes.set(xlabel=name, ylabel="λ̂")
    if not one:
        labels = [f"nβ = {n:.3g}\nγ = {g:.3g}" for n, g in zip(nbeta, localization, strict=True)]
        axes.set_xticks(x, labels, fontsize=7)
    elif (x > 0).all():
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=float(x[x > 0].min()))


def _scan_map(
    axes: Axes, nbeta: Any, localization: Any, mean: Any, stderr: Any, warned: Any, cells: Sequence[tuple[int, ...]]
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    known = mean[np.isfinite(mean)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    colors = ScalarMappable(Normalize(low, high if high > low else low + 1), "cividis")
    for i, j in np.ndindex(*mean.shape):
        if not np.isfinite(mean[i, j]):
            axes.text(j, i, "–", ha="center", va="center", color="0.6")
            continue
        color, hollow = colors.to_rgba(mean[i : i + 1, j])[0], bool(warned[i, j])
        # A thick edge around nothing is what a hollow marker is among points.
        side = 0.84 if hollow else 0.96
        look: dict[str, Any] = {"facecolor": "white" if hollow else color, "edgecolor": color, "lw": 6 if hollow else 0}
        axes.add_patch(Rectangle((j - side / 2, i - side / 2), side, side, **look))
        text = f"{mean[i, j]:.4g}\n± {stderr[i, j]:.2g}"
        ink = "white" if sum(color[:3]) < 1.5 and not hollow else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    inside = {(place[0], place[1]) for place in cells}
    for i, j in inside:  # the outer edges only
        for other, ends in (
            ((i - 1, j), ((j - 0.5, j + 0.5), (i - 0.5, i - 0.5))),
            ((i + 1, j), ((j - 0.5, j + 0.5), (i + 0.5, i + 0.5))),
            ((i, j - 1), ((j - 0.5, j - 0.5), (i - 0.5, i + 0.5))),
            ((i, j + 1), ((j + 0.5, j + 0.5), (i - 0.5, i + 0.5))),
        ):
            if other not in inside:
                axes.plot(*ends, color=OKABE_ITO["vermillion"], lw=2.5, solid_capstyle="projecting")
    axes.set_xticks(range(mean.shape[1]), [f"{g:.3g}" for g in localization[0]])
    axes.set_yticks(range(mean.shape[0]), [f"{n:.3g}" for n in nbeta[:, 0]])
    axes.set(xlabel="γ", ylabel="nβ", xlim=(-0.55, mean.shape[1] - 0.45), ylim=(-0.55, mean.shape[0] - 0.45))
    axes.figure.colorbar(colors, ax=axes, label="λ̂ ± standard error; hollow: with a warning")


# ---- what draws know ---------------------------------------------------------------------------------------

_NAMED = 64
"""How many rows or columns of a matrix have their names beside it."""
_SHOWN = 1000
"""Larger matrices are shown as means over squares of entries."""
_PATH = 200
"""Draws of a chain that its path goes through at most."""
_RED, _BLUE = (178, 24, 43), (33, 102, 172)
"""Positive and negative, as in Matplotlib's RdBu_r."""


def plot_influence(
    value: ArrayLike,
    significant: ArrayLike | None = None,
    *,
    train_names: Sequence[str] | None = None,
    query_names: Sequence[str] | None = None,
    label: str = "influence",
    title: str = "",
) -> Figure:
    """A matrix of influences, correlations or covariances: red is positive, blue negative, gray not significant.

    Args:
        value: ``[train, query]``; NaN stays white.
        significant: where there is a color, ``[train, query]``; None: everywhere.
        train_names, query_names: of rows and columns, shown if there are few.
        label: of the colors.
        title: of the figure.
    """
    matrix, mask = _numbers_and_mask(value, significant)
    rows, columns = matrix.shape
    cell = min(0.28, 7 / max(rows, columns))
    size = {"width": 3.2 + max(cell * columns, 2.2), "height": 1.4 + max(cell * rows, 2.2)}
    figure, (axes,) = new_figure(1, **size)
    _signed_map(axes, matrix, mask, label, "equal" if 1 / 3 <= rows / columns <= 3 else "auto")
    _name_ticks(axes, "y", rows, train_names, "train item")
    _name_ticks(axes, "x", columns, query_names, "query item")
    axes.set_title(title, fontsize=10)
    return figure


def plot_susceptibilities(
    value: ArrayLike,
    components: Sequence[str],
    significant: ArrayLike | None = None,
    *,
    items: Sequence[str] | None = None,
    label: str = "susceptibility χ",
    title: str = "",
) -> Figure:
    """Susceptibilities of components for items: red is positive, blue negative, gray not significant.

    Args:
        value: χ or its z-scores, ``[component, item]``; NaN stays white.
        components: names of the rows.
        significant: where there is a color; None: everywhere.
        items: names of the columns, such as tokens, shown if there are few.
        label: of the colors.
        title: of the figure.
    """
    matrix, mask = _numbers_and_mask(value, significant)
    rows, columns = matrix.shape
    width, height = 3.2 + min(max(0.22 * columns, 3.0), 10.0), 1.5 + min(max(0.28 * rows, 1.2), 9.0)
    figure, (axes,) = new_figure(1, width=width, height=height)
    _signed_map(axes, matrix, mask, label, "auto")
    _name_ticks(axes, "y", rows, components, "component")
    _name_ticks(axes, "x", columns, items, "item")
    axes.set_title(title, fontsize=10)
    return figure


def _numbers_and_mask(value: ArrayLike, significant: ArrayLike | None) -> tuple[Any, Any]:
    matrix = np.asarray(value)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"value has shape {matrix.shape}; it must be a matrix with at least one entry.")
    mask = np.ones(matrix.shape, dtype=bool) if significant is None else np.asarray(significant, dtype=bool)
    if mask.shape != matrix.shape:
        raise ValueError(f"significant has shape {mask.shape}, but value has {matrix.shape}.")
    return matrix, mask


def _shrunk(matrix: Any) -> Any:
    """Means over rectangles of entries, so that few are left."""
    for axis in (0, 1):
        count = matrix.shape[axis]
        if count > _SHOWN:
            starts = np.linspace(0, count, _SHOWN, endpoint=False).astype(int)
            sizes = np.diff(np.append(starts, count)).reshape((-1, 1) if axis == 0 else (1, -1))
            matrix = np.add.reduceat(matrix, starts, axis=axis, dtype=np.float64) / sizes
    return matrix


def _largest(matrix: Any) -> float:
    """The end of a color scale: a few entries, or the diagonal of a square, must not take all of it."""
    counts = np.isfinite(matrix)
    if matrix.shape[0] == matrix.shape[1] > 2:
        np.fill_diagonal(counts, False)
    sizes = np.abs(matrix[counts])
    most = float(np.quantile(sizes, 0.98)) if sizes.size else 0.0
    return most or float(sizes.max(initial=0.0)) or 1.0


def _signed_map(axes: Axes, matrix: Any, mask: Any, label: str, aspect: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rows, columns = matrix.shape
    shown, share = _shrunk(matrix), _shrunk(mask)
    known = np.isfinite(shown)
    colored = known & (share >= 0.5)
    most = _largest(np.where(colored, shown, np.nan)) if colored.any() else _largest(shown)
    colors = ScalarMappable(Normalize(-most, most), "RdBu_r")
    rgba = colors.to_rgba(np.where(known, shown, 0.0))
    rgba[known & ~colored] = (0.85, 0.85, 0.85, 1.0)
    rgba[~known] = 1.0
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(rgba, aspect=aspect, interpolation="nearest", extent=extent)  # type: ignore[arg-type]
    beyond = bool((np.abs(shown[colored]) > 1.001 * most).any())
    gray = "" if mask.all() else "; gray: not significant"
    axes.figure.colorbar(colors, ax=axes, label=f"{label}{gray}", extend="both" if beyond else "neither")


def _name_ticks(axes: Axes, axis: str, count: int, names: Sequence[str] | None, label: str) -> None:
    if names is not None and len(names) != count:
        raise ValueError(f"{len(names)} names were given for {count} {label}s.")
    axes.set(**{f"{axis}label": label})
    if names is None or count > _NAMED:
        from matplotlib.ticker import MaxNLocator

        (axes.xaxis if axis == "x" else axes.yaxis).set_major_locator(MaxNLocator(integer=True))
        return
    shown = [_visible(name) if len(name) <= 24 else f"{_visible(name[:23])}…" for name in names]
    ticks = (axes.set_xticks if axis == "x" else axes.set_yticks)(range(count), shown, fontsize=8)
    for tick in ticks:
        tick.label1.set_parse_math(False)  # a token may be a $
    if axis == "x" and max(map(len, shown)) > 2:
        axes.tick_params(axis="x", rotation=90)


def _visible(token: str) -> str:
    """With spaces at its ends, and line ends, that can be seen."""
    inside = token.strip(" ")
    before = len(token) - len(token.lstrip(" "))
    after = len(token) - before - len(inside)
    return "␣" * before + inside.replace("\n", "⏎").replace("\t", "⇥") + "␣" * after


def plot_pca(
    coordinates: ArrayLike, share: ArrayLike | None = None, *, reference: ArrayLike | None = None, title: str = ""
) -> Figure:
    """Where chains went: the path of each in the first two principal components, and in the first and third.

    A hollow circle is a chain's first draw, a filled one its last.

    Args:
        coordinates: ``[chain, draw, component]``, of two components or more.
        share: of the variance along each component, for the labels.
        reference: coordinates of w*, which gets a star.
        title: of the figure.
    """
    paths = np.asarray(coordinates)
    if paths.ndim != 3 or paths.shape[2] < 2:
        raise ValueError(f"coordinates has shape {paths.shape}; it must be [chain, draw, component], two or more.")
    pairs = [(0, 1), (0, 2)][: paths.shape[2] - 1]
    figure, panels = new_figure(len(pairs))

    def named(k: int) -> str:
        return f"component {k + 1}" + ("" if share is None else f" ({np.asarray(share)[k]:.0%} of the variance)")

    # What goes back and forth through one place hides what lies below, so long paths go through some draws only.
    shown = np.unique(np.linspace(0, paths.shape[1] - 1, _PATH).round().astype(int))
    for axes, (first, second) in zip(panels, pairs, strict=True):
        for chain, path in enumerate(paths):
            look = {**chain_style(chain), "lw": 0.7, "alpha": 0.6, "marker": ".", "ms": 2.5}
            axes.plot(path[shown, first], path[shown, second], label=f"chain {chain}", **look)
        for chain, path in enumerate(paths):
            color = chain_style(chain)["color"]
            for place, fill in ((0, "white"), (-1, color)):
                axes.plot(*path[place, [first, second]], "o", ms=7, mec=color, mfc=fill, mew=1.6, zorder=3)
        if reference is not None:
            star = np.asarray(reference)[[first, second]]
            axes.plot(star[0], star[1], "*", ms=15, color="black", mec="white", zorder=4, label="w*")
        axes.set(xlabel=named(first), ylabel=named(second))
        axes.set_aspect("equal", adjustable="datalim")
    lines, names = panels[0].get_legend_handles_labels()
    if (more := len(paths) - NAMED_CHAINS) > 0:
        del lines[NAMED_CHAINS : len(paths)], names[NAMED_CHAINS : len(paths)]
        names[NAMED_CHAINS - 1] += f" (and {more} more)"
    legend = figure.legend(lines, names, loc="outside lower center", ncols=min(8, len(names)), fontsize=9)
    for line in legend.get_lines():
        line.set(alpha=1, lw=2)
    figure.suptitle("\n".join(filter(None, [title, "hollow: first draw of a chain; filled: its last"])), fontsize=10)
    return figure


def top_sentences_html(
    sentences: Sequence[Sequence[str]],
    values: Sequence[ArrayLike],
    significant: Sequence[ArrayLike] | None = None,
    *,
    top: int = 10,
    names: Sequence[str] | None = None,
    title: str = "",
) -> str:
    """The sentences with the largest mean ``|value|`` of their tokens, as HTML with a color behind each token.

    Red is positive, blue negative; tokens that are not significant are gray. Pointing at one shows its value.

    Args:
        sentences: tokens of each, as text.
        values: a number for each token; NaN (a token without a value) has no color and counts for nothing.
        significant: whether each token's number is; None: all are.
        top: how many sentences.
        names: of the sentences; None: their numbers.
        title: above them.

    Returns:
        A piece of HTML (a ``div`` with inline styles) for a notebook or a page.

    Raises:
        ValueError: the numbers of sentences, tokens, values or names differ.
    """
    from html import escape

    numbers = [np.asarray(row, np.float64) for row in values]
    masks = (
        [np.ones(len(row), bool) for row in numbers] if significant is None else [np.asarray(m) for m in significant]
    )
    if not len(sentences) == len(numbers) == len(masks) or (names is not None and len(names) != len(sentences)):
        raise ValueError(
            f"values has {len(numbers)} rows, significant {len(masks)} and names "
            f"{len(sentences) if names is None else len(names)}, but there are {len(sentences)} sentences."
        )
    for k, (sentence, row, mask) in enumerate(zip(sentences, numbers, masks, strict=True)):
        if not len(sentence) == len(row) == len(mask):
            raise ValueError(f"values has {len(row)} numbers for sentence {k}, which has {len(sentence)} tokens.")
    finite = [row[np.isfinite(row)] for row in numbers]
    sizes = np.array([float(np.abs(row).mean()) if len(row) else 0.0 for row in finite])
    most = _largest(np.concatenate(finite)[None]) if finite else 1.0
    lines = []
    for k in np.argsort(-sizes, kind="stable")[:top]:
        spans = []
        for token, value, is_significant in zip(sentences[k], numbers[k], masks[k], strict=True):
            style = ""
            if np.isfinite(value) and is_significant:
                red, green, blue = _RED if value > 0 else _BLUE
                strength = min(abs(value) / most, 1.0)
                style = f"background:rgba({red},{green},{blue},{0.8 * strength:.2f})"
                style += ";color:white" if strength > 0.7 else ""
            elif np.isfinite(value):
                style = "color:#999"
            text = escape(token).replace("\n", "⏎<br>")
            spans.append(f'<span title="{value:.4g}" style="border-radius:2px;{style}">{text}</span>')
        mean = f"{finite[k].mean():+.3g}" if len(finite[k]) else "–"
        name = escape(str(k if names is None else names[k]))
        lines.append(
            '<div style="display:flex;margin:6px 0">'
            f'<div style="flex:0 0 9em;color:#666;font-size:85%">{name}<br>mean {mean}</div>'
            f'<div style="flex:1;white-space:pre-wrap;font-family:monospace;line-height:1.6">{"".join(spans)}</div>'
            "</div>"
        )
    gray = "" if significant is None else "; gray text: not significant"
    legend = (
        f'<div style="color:#666;font-size:85%">{len(lines)} of {len(sentences)} sentences, by the mean size of their '
        f'tokens&#x27; values. <span style="background:rgba({_RED[0]},{_RED[1]},{_RED[2]},0.8);color:white">red</span> '
        f'≥ {most:.3g}, <span style="background:rgba({_BLUE[0]},{_BLUE[1]},{_BLUE[2]},0.8);color:white">blue</span> '
        f"≤ −{most:.3g}{gray}.</div>"
    )
    heading = f'<div style="font-weight:bold">{escape(title)}</div>' if title else ""
    return f'<div style="background:white;color:black;padding:8px">{heading}{legend}{"".join(lines)}</div>'


def plot_sweep(found: xarray.Dataset) -> Figure:
    """λ̂ along a sweep with its 95 % intervals, and the loss L(w*) below it, without which λ̂ says little.

    Args:
        found: what :func:`llc_fast.sweep_checkpoints` returned. Checkpoints with names stand side by side, those with
            numbers at them.
    """
    (dim,) = found["llc_mean"].dims
    names, mean, low, high, loss = (
        found[name].values for name in (dim, "llc_mean", "llc_low", "llc_high", "init_loss")
    )
    return _plot_along(
        names, str(dim), mean, np.array([low, high]), loss, [bool(codes) for codes in found["warning_codes"].values]
    )


def _plot_along(
    names: np.ndarray[Any, Any],
    dim: str,
    mean: np.ndarray[Any, Any],
    interval: np.ndarray[Any, Any],
    loss: np.ndarray[Any, Any],
    warned: Sequence[bool],
) -> Figure:
    """λ̂ with its intervals, low and high, and L(w*) below, over names or numbers."""
    low, high = interval
    is_number = np.issubdtype(names.dtype, np.number)
    x = names.astype(np.float64) if is_number else np.arange(len(names))
    figure, (above, below) = new_figure(1, 2, width=6.4, height=2.9)
    above.plot(x, mean, color=OKABE_ITO["sky"], lw=1, zorder=1)
    errorbar_by_warning(above, x, mean, np.maximum([mean - low, high - mean], 0), warned, label="λ̂, 95 % interval")
    if any(warned):
        label_hollow(above)
    above.legend(fontsize=9)
    above.set(ylabel="λ̂")
    below.plot(x, loss, "o-", color=OKABE_ITO["vermillion"], lw=1, ms=4)
    below.set(xlabel=dim.replace("_", " "), ylabel="L(w*)")
    for axes in (above, below):
        if not is_number:
            axes.set_xticks(x, [str(name) for name in names], rotation=30, ha="right", fontsize=8)
        elif len(x) > 2 and x.min() >= 0 and x.max() > 100 * min(x[x > 0], default=math.inf):  # growing by factors
            axes.set_xscale("symlog", linthresh=float(x[x > 0].min()))
    return figure
