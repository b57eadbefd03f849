"""Pictures: points by warning, traces, λ̂ against known λ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llc_fast.plots import (
    CLASSES,
    OKABE_ITO,
    errorbar_by_warning,
    label_hollow,
    new_figure,
    plot_against_known,
    plot_traces,
)
from llc_fast.result import LLCResult
from llc_fast.schedule import Schedule

pytest.importorskip("matplotlib")


def test_points_by_warning() -> None:
    """Filled without, hollow with a warning; each with its place and its error bar, if it has one."""
    _, (axes,) = new_figure(1)
    warned: list[Any] = [[], ["no"], False, True]  # lists of warnings, or plain truth
    errorbar_by_warning(axes, [0, 1, 2, 3], [5, 6, 7, 8], [1, 2, None, 4], warned, color="#D55E00", label="networks")
    label_hollow(axes)
    filled, hollow = axes.containers
    for container, xs, ys, color in ((filled, [0, 2], [5, 7], "#D55E00"), (hollow, [1, 3], [6, 8], "white")):
        assert list(container[0].get_xdata()) == xs and list(container[0].get_ydata()) == ys
        assert container[0].get_markerfacecolor() == color and container[0].get_linestyle() == "None"
    (bars,) = hollow[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[4, 8], [4, 12]]
    assert sorted(text.get_text() for text in axes.legend().get_texts()) == ["hollow: with a warning", "networks"]


def test_points_without_error_bars_and_without_points() -> None:
    """Nothing to show is nothing shown; bars may go sideways."""
    _, (axes,) = new_figure(1)
    errorbar_by_warning(axes, [], [], [], [])
    errorbar_by_warning(axes, [1.0], [2.0], None, [False], xerr=[0.5], marker="s")
    assert len(axes.containers) == 4 and not axes.containers[2].has_yerr
    (bars,) = axes.containers[2][2]
    assert bars.get_segments()[0].tolist() == [[0.5, 2.0], [1.5, 2.0]]


def test_one_palette() -> None:
    """Lines and classes have the same colors in the same order."""
    _, (axes,) = new_figure(1)
    lines = [axes.plot([0, 1], [0, k])[0].get_color() for k in range(len(CLASSES))]
    assert lines == list(OKABE_ITO.values()) == [color for color, _ in CLASSES]
    assert len({marker for _, marker in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("burnin", [0, 400])
def test_traces(burnin: int) -> None:
    """Window means of nβ·(L − L(w*)) along each chain; burn-in is marked if there is any."""
    loss = 0.5 + np.linspace(0, 0.1, 1000) * np.array([[1], [2]])
    _, (axes,) = new_figure(1)
    plot_traces(axes, LLCResult(loss, 0.5, 100.0, Schedule(1000 - burnin, burnin)), known=7.0)
    first, second, known = axes.lines
    np.testing.assert_allclose(second.get_ydata(), 2 * first.get_ydata())
    assert first.get_ydata().mean() == pytest.approx(5.0) and set(known.get_ydata()) == {7.0}
    assert bool(axes.patches) == bool(burnin) == any(text.get_text() == "burn-in" for text in axes.texts)


def test_estimates_that_can_not_be_shown_are_left_out() -> None:
    """None, NaN and λ̂ ≤ 0 have no place on a logarithmic axis; without any row there still is a picture."""
    rows = [{"lambda_true": 5.0, "llc_mean": llc, "llc_stderr": 0.1, "size": "1k"} for llc in (None, np.nan, -1.0, 4.0)]
    figure, (left, right) = new_figure(2)
    plot_against_known(left, rows)
    plot_against_known(right, [])
    assert list(left.containers[0][0].get_ydata()) == [4.0]
    figure.canvas.draw()
