"""Figures of estimates."""

from __future__ import annotations

import numpy as np
import pytest

from llc_fast.plots import new_figure
from llc_fast.reproduce import figures

pytest.importorskip("matplotlib")


def test_estimates_are_hollow_where_warned() -> None:
    """In units of λ, with bars of two standard errors; what has no estimate is left out."""
    _, (axes,) = new_figure(1)
    llc, warnings = [1.0, 2.0, None], [[], ["short"], ["diverged"]]
    rows = [{"llc": value, "stderr": value and 0.1, "warnings": w} for value, w in zip(llc, warnings, strict=True)]
    figures.estimates(axes, [1, 2, 3], rows, unit=2.0, color="red")
    filled, hollow = axes.containers
    for part, places in ((filled, [0.5]), (hollow, [1.0])):
        np.testing.assert_array_equal(part[0].get_ydata(), places)
    assert (filled[0].get_markerfacecolor(), hollow[0].get_markerfacecolor()) == ("red", "white")
    ends = [line.get_ydata()[0] for line in filled[1]]  # of the bar: below, above
    assert ends == pytest.approx([0.4, 0.6])


def test_known_against_estimated() -> None:
    """Every class has its own color; an estimate that is missing is left out."""
    _, (axes,) = new_figure(1)
    rows = [
        {"lambda": 2.0 + k, "llc": llc, "stderr": llc and 0.1, "size": size, "warnings": []}
        for k, (llc, size) in enumerate(((2.1, "1k"), (None, "1k"), (3.9, "10k")))
    ]
    figures.known_against_estimated(axes, rows)
    assert {"1k networks", "10k networks", "λ̂ = λ"} <= set(axes.get_legend_handles_labels()[1])
    assert sum(len(part[0].get_xdata()) for part in axes.containers) == 2
