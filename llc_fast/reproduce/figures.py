"""How experiments plot: error bars that are hollow where an estimate came with a warning, and λ̂ over known λ.

Matplotlib is imported when a figure is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llc_fast.plots import CLASSES
from llc_fast.reproduce.rows import Row, is_warned, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = (color for color, _ in CLASSES)
GREY = "0.45"
SIGMAS = 2.0
"""Half an error bar, in standard errors."""
HOLLOW = "hollow: with a warning"


def error_bars(
    axes: Axes,
    x: Iterable[float | None],
    y: Iterable[float | None],
    error: Iterable[float | None] | Sequence[Iterable[float | None]] | None = None,
    warned: Iterable[bool] | None = None,
    *,
    color: str,
    marker: str = "o",
    size: float = 5.0,
    horizontal: bool = False,
    connect: bool = False,
    label: str | None = None,
    **style: Any,
) -> None:
    """Points with error bars, filled, or hollow where `warned`. Points without a value are left out.

    Args:
        axes: where.
        x, y: places, None or NaN where there is no value.
        error: half lengths of the bars, or a pair of those below and above; None: no bars.
        warned: None: none is.
        color, marker, size: of the points.
        horizontal: the bars lie along x.
        connect: join the points by a line.
        label: of the filled points, for the legend.
        style: of ``Axes.errorbar``.
    """
    at, value = numbers(x), numbers(y)
    bars = None if error is None else np.atleast_2d(_table(error))
    hollow = np.zeros(len(at), dtype=bool) if warned is None else np.array(list(warned), dtype=bool)
    known = np.isfinite(at) & np.isfinite(value)
    if connect:
        axes.plot(at[known], value[known], color=color, lw=1.2)
    for chosen, face in ((known & ~hollow, color), (known & hollow, "white")):
        if chosen.any():
            axes.errorbar(
                at[chosen],
                value[chosen],
                **({} if bars is None else {"xerr" if horizontal else "yerr": np.nan_to_num(bars[:, chosen])}),
                **({"capsize": 2.5, "elinewidth": 1.0} | style),
                fmt=marker,
                ms=size,
                color=color,
                mfc=face,
                label=label,
            )
            label = None


def estimates(axes: Axes, x: Iterable[float | None], rows: Sequence[Row], *, unit: float = 1.0, **style: Any) -> None:
    """λ̂ of rows in units of `unit`, with bars of ± 2 standard errors; see :func:`error_bars` for `style`."""
    llc, stderr = (numbers(row[name] for row in rows) / unit for name in ("llc", "stderr"))
    error_bars(axes, x, llc, SIGMAS * stderr, map(is_warned, rows), **style)


def explain_hollow(axes: Axes, rows: Iterable[Row] | None = None, *, marker: str = "o", size: float = 5.0) -> None:
    """A line of the legend that says what hollow points are; with `rows`, only if one of them was warned about."""
    if rows is None or any(map(is_warned, rows)):
        axes.plot([], [], ls="", marker=marker, ms=size, color=GREY, mfc="white", label=HOLLOW)


def known_against_estimated(axes: Axes, rows: Iterable[Row]) -> None:
    """λ̂ over known λ, with the diagonal where they are equal.

    Args:
        axes: where.
        rows: of estimates, with ``lambda`` and ``size``, the class that gives a point its color.
    """
    from llc_fast.plots import draw_known

    names = {"lambda_true": "lambda", "llc_mean": "llc"}
    draw_known(
        axes,
        [
            {ours: row[theirs] for ours, theirs in names.items()}
            | {"llc_stderr": numbers([row["stderr"]])[0], "size": row["size"], "warnings": row["warnings"]}
            for row in rows
        ],
    )


def _table(error: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = list(error)
    return np.stack([numbers(row) for row in rows]) if np.ndim(rows[0]) else numbers(rows)
