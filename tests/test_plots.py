"""Pictures: points by warning, traces, λ̂ against known λ."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from llc_fast.plots import (
    CLASSES,
    OKABE_ITO,
    chain_style,
    errorbar_by_warning,
    label_hollow,
    new_figure,
    plot_against_known,
    plot_density,
    plot_result,
    plot_traces,
)
from llc_fast.result import Diagnostics, LLCResult, Warning
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


# ---- whole results -----------------------------------------------------------------------------------------


def _result(chains: int = 4, draws: int = 200, burnin: int = 100, **fields: Any) -> LLCResult:
    rng = np.random.default_rng(0)
    loss = 0.1 + 0.02 * rng.standard_normal((chains, draws + burnin))
    given: dict[str, Any] = {"diagnostics": Diagnostics(r_hat=1.0123, ess_bulk=324.4)}
    return LLCResult(loss, 0.0, 100.0, Schedule(draws, burnin), **{**given, **fields})


def _partial() -> LLCResult:
    result = _result(steps_done=[300, 300, 195, 0], warnings=[Warning("stopped", "partial")])
    result.loss_trace[2, 195:] = result.loss_trace[3] = np.nan
    return result


def _diverged(chains: tuple[int, ...]) -> LLCResult:
    result = _result(warnings=[Warning("said", code) for code in ("diverged", "ess", "trend") * 9])
    for chain in chains:
        result.loss_trace[chain, 50:] = np.nan
    return result


_RESULTS = {
    "one chain": lambda: _result(1),
    "two chains": lambda: _result(2),
    "sixteen chains": lambda: _result(16),
    "fifty chains": lambda: _result(50),
    "partial": _partial,
    "in burn-in": lambda: _result(steps_done=[50] * 4),
    "two diverged": lambda: _diverged((1, 3)),
    "all diverged": lambda: _diverged((0, 1, 2, 3)),
    "one draw": lambda: _result(draws=1, burnin=0, diagnostics=Diagnostics(r_hat=None, ess_bulk=None)),
    "draws that are all the same": lambda: LLCResult(np.full((2, 9), 0.5), 0.0, 1.0, Schedule(9, 0)),
}


@pytest.mark.parametrize("kind", _RESULTS)
def test_nothing_overlaps(kind: str) -> None:
    """Title, panels with their labels, and legend lie beside each other and inside the figure."""
    figure = plot_result(_RESULTS[kind]())
    figure.draw_without_rendering()
    assert figure._suptitle is not None
    parts = [*figure.axes, figure._suptitle, *figure.legends]
    boxes = [part.get_tightbbox() if part in figure.axes else part.get_window_extent() for part in parts]
    assert len(boxes) == 5
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-2).overlaps(other.padded(-2))  # pixels
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


def test_what_the_title_says() -> None:
    """λ̂ with its interval, R̂, the effective sample size, and codes of warnings; nothing for what is not there."""
    result = _result(warnings=[Warning("a", "ess"), Warning("b", "trend")])
    low, high = result.interval()
    first, second = plot_result(result)._suptitle.get_text().splitlines()  # type: ignore[union-attr]
    assert first == (
        f"λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g} (95 % interval {low:.4g} to {high:.4g}), R̂ = 1.012, "
        "ESS = 324"
    )
    assert second == "warnings: ess, trend"
    assert plot_result(_RESULTS["one draw"]())._suptitle.get_text().count(",") == 0  # type: ignore[union-attr]
    said = plot_result(_RESULTS["all diverged"]())._suptitle.get_text()  # type: ignore[union-attr]
    assert said.startswith("no estimate, R̂ = 1.012") and len(said.splitlines()) > 2 and "nan" not in said


def test_the_legend_names_the_chains() -> None:
    """Each with its line's color and dashes, those that ended early with what became of them, and not hundreds."""
    names = [text.get_text() for text in plot_result(_diverged((1,))).legends[0].get_texts()]
    assert names == ["chain 0", "chain 1 (diverged)", "chain 2", "chain 3"]
    names = [text.get_text() for text in plot_result(_partial()).legends[0].get_texts()]
    assert names == ["chain 0", "chain 1", "chain 2 (65% done)", "chain 3 (0% done)"]
    planned = {"num_draws": 400, "num_burnin": 600, "num_steps_bw_draws": 1}
    early = plot_result(_result(2, 100, 100, steps_done=[200, 150], settings=planned))
    assert [text.get_text() for text in early.legends[0].get_texts()] == ["chain 0 (20% done)", "chain 1 (15% done)"]
    figure = plot_result(_result(50))
    handles, texts = figure.legends[0].get_lines(), figure.legends[0].get_texts()
    assert len(texts) == 24 and texts[-1].get_text() == "chain 23 (and 26 more)"
    styles = {(line.get_color(), line.get_linestyle()) for line in handles}
    assert len(styles) == 24
    for panel in figure.axes[:2]:
        for handle, line in zip(handles, panel.lines, strict=False):
            assert (handle.get_color(), handle.get_linestyle()) == (line.get_color(), line.get_linestyle())
    assert chain_style(0) != chain_style(6)


def test_densities() -> None:
    """Of each chain's draws: an area of one, at the places where an independent estimate has it."""
    result = _result(3, draws=4000, burnin=0)
    result.loss_trace[2] += 0.1
    _, (axes,) = new_figure(1)
    plot_density(axes, result)
    for line, draws in zip(axes.lines, result.llc_trace, strict=False):
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        expected = gaussian_kde(draws)(x)
        assert abs(y - expected).max() < 0.1 * expected.max()
        assert np.trapezoid(y, x) == pytest.approx(1, abs=0.03)
    peaks = [line.get_xdata()[np.argmax(line.get_ydata())] for line in axes.lines[:3]]  # type: ignore[call-overload,index]
    np.testing.assert_allclose(peaks, [10, 10, 20], atol=0.8)
    assert set(axes.lines[3].get_xdata()) == {result.llc_mean}


def test_a_spike_does_not_hide_the_densities() -> None:
    result = _result(2, draws=4000)
    result.loss_trace[0, 200] = 100.0
    _, (axes,) = new_figure(1)
    plot_density(axes, result)
    assert axes.get_xlim()[1] < 30


def test_figures_show_themselves() -> None:
    """In a notebook as the value of a cell, without pyplot, so that it is shown once and nothing is left to close; a
    copy or a pickle is an ordinary figure."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    figure = plot_result(_result())
    assert figure._repr_png_().startswith(b"\x89PNG\r\n\x1a\n")  # type: ignore[attr-defined]
    assert pyplot.get_fignums() == before
    assert len(pickle.loads(pickle.dumps(figure)).axes) == 3
    assert len(copy.deepcopy(new_figure(2)[0]).axes) == 2
