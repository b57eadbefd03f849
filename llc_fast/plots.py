"""Pictures of results. Matplotlib is imported here and nowhere else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llc_fast.result import LLCResult
from llc_fast.support.optional import require

CLASSES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P"))
"""Color and marker of each of several classes, by Okabe & Ito: also people who see few colors can tell them apart."""


def new_figure(columns: int, rows: int = 1, *, width: float = 5.2, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; `width` and `height` of each in inches."""
    # Not pyplot: no global state, no display, nothing to close.
    made = require("matplotlib.figure", "plot").Figure
    figure: Figure = made(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(rows * columns)]


def _smooth(trace: np.ndarray[Any, Any], width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Means over consecutive windows, and where they lie."""
    count = max(1, len(trace) // width)
    means = trace[: count * width].reshape(count, -1).mean(axis=1)
    return (np.arange(count) + 0.5) * (len(trace[: count * width]) / count), means


def draw_traces(axes: Axes, result: LLCResult, *, known: float | None = None) -> None:
    """nβ·(L − L(w*)) along every chain: it rises from zero and must flatten before the draws begin."""
    width = max(1, result.loss_trace.shape[1] // 200)
    for row in result.nbeta * (result.loss_trace - result.init_loss):
        axes.plot(*_smooth(row, width), lw=0.9, alpha=0.8)
    axes.axvspan(0, result.schedule.num_burnin, color="0.93", zorder=0)
    axes.text(0.02, 0.97, "burn-in", transform=axes.transAxes, va="top", color="0.5")
    if known is not None:
        axes.axhline(known, color="k", ls="--", lw=1, label=f"known λ = {known:g}")
        axes.legend(loc="lower right")
    axes.set(xlabel="step", ylabel="nβ (L − L(w*)), window means", xlim=(0, result.loss_trace.shape[1]))


def plot_result(result: LLCResult) -> Figure:
    """Loss traces, and the running λ̂ of each chain with the final interval."""
    figure, (left, right) = new_figure(2)
    draw_traces(left, result)
    left.set_title("loss along the chains")
    draws = np.arange(1, result.schedule.num_draws + 1)
    for row in result.llc_trace:
        right.plot(draws, np.cumsum(row) / draws, lw=0.9, alpha=0.8)
    low, high = result.interval()
    if np.isfinite([low, high]).all():
        right.axhspan(low, high, color="C0", alpha=0.15, label="95 % interval")
    right.axhline(result.llc_mean, color="k", lw=1, label=f"λ̂ = {result.llc_mean:.4g}")
    right.legend()
    right.set(title="running estimate", xlabel="draws so far", ylabel="λ̂ of each chain", xlim=(1, len(draws)))
    return figure


def draw_known(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
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
        for is_warned in (False, True):
            chosen = [r for r in rows if r["size"] == size and bool(r.get("warnings")) == is_warned]
            axes.errorbar(
                [r["lambda_true"] for r in chosen],
                [r["llc_mean"] for r in chosen],
                yerr=[2 * r["llc_stderr"] for r in chosen],
                fmt=marker,
                color=color,
                mfc="white" if is_warned else color,
                ms=5,
                capsize=3,
                label=f"_{size}" if is_warned else f"{size} networks",
            )
    if any(r.get("warnings") for r in rows):
        axes.plot([], [], "o", color="0.4", mfc="white", ms=5, label="hollow: with a warning")
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


def plot_known(rows: Sequence[dict[str, Any]], example: LLCResult | None = None) -> Figure:
    """λ̂ against known λ, see :func:`draw_known`; beside it the traces of one of the models.

    Args:
        rows: one a model.
        example: the result of the last row.
    """
    figure, axes = new_figure(1 if example is None else 2)
    draw_known(axes[0], rows)
    if example is not None:
        draw_traces(axes[1], example, known=rows[-1]["lambda_true"])
        axes[1].set_title("loss along the chains of the last network")
    return figure
