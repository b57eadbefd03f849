"""How experiments plot estimates: hollow where there was a warning, and over the known λ.

Points of other kinds go through :func:`llc_fast.plots.errorbar_by_warning`, as these do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llc_fast.plots import OKABE_ITO, errorbar_by_warning, label_hollow, plot_against_known
from llc_fast.reproduce.rows import Row, column, is_warned, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = OKABE_ITO.values()
GREY = "0.45"
SIGMAS = 2.0
"""Half an error bar, in standard errors."""


def two_sigma(rows: Iterable[Row], name: str = "stderr") -> NDArray[np.float64]:
    """Half the error bars of rows; NaN, which is not plotted, where the error is not known."""
    return SIGMAS * column(rows, name)


def estimates(
    axes: Axes,
    x: Iterable[float | None],
    rows: Sequence[Row],
    *,
    unit: float = 1.0,
    connect: bool = False,
    color: str = BLUE,
    **style: Any,
) -> None:
    """λ̂ ± 2 standard errors of rows, hollow where there was a warning; what has no λ̂ is left out.

    Args:
        axes: where.
        x: a place for each row.
        rows: of estimates.
        unit: of λ̂.
        connect: join the points by a line.
        color: of points and line.
        style: of :func:`llc_fast.plots.errorbar_by_warning`.
    """
    at, llc = numbers(x), column(rows, "llc") / unit
    if connect:
        axes.plot(at, llc, color=color, lw=1.2)
    known, warned = np.isfinite(llc), np.array([is_warned(row) for row in rows], dtype=bool)
    errors = two_sigma(rows)[known] / unit
    errorbar_by_warning(axes, at[known], llc[known], errors, warned[known], color=color, **style)


def label_hollow_in(axes: Axes, rows: Iterable[Row]) -> None:
    """Say in the legend what hollow points are, if there are any."""
    if any(map(is_warned, rows)):
        label_hollow(axes)


def known_against_estimated(axes: Axes, rows: Iterable[Row]) -> None:
    """λ̂ over known λ, with the diagonal where they are equal.

    Args:
        axes: where.
        rows: of estimates, with ``lambda`` and ``size``, the class that gives a point its color.
    """
    names = {"lambda_true": "lambda", "llc_mean": "llc", "size": "size", "warnings": "warnings"}
    rows = list(rows)
    points = [{theirs: row[ours] for theirs, ours in names.items()} for row in rows]
    plot_against_known(axes, [p | {"llc_stderr": e} for p, e in zip(points, column(rows, "stderr"), strict=True)])
