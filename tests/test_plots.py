"""Pictures: points by warning, traces, λ̂ against known λ."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from llc_fast.plots import (
    CLASSES,
    OKABE_ITO,
    PANELS,
    chain_style,
    errorbar_by_warning,
    label_hollow,
    new_figure,
    panel_svg,
    plot_against_known,
    plot_autocorrelation,
    plot_density,
    plot_forest,
    plot_influence,
    plot_pca,
    plot_rank,
    plot_result,
    plot_running,
    plot_susceptibilities,
    plot_traces,
    rank_shares,
    running_estimate,
    top_sentences_html,
)
from llc_fast.result import Diagnostics, LLCResult, Warning
from llc_fast.schedule import Schedule
from llc_fast.stats.errors import standard_error

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


def _noise(chains: int, draws: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((chains, draws))


def _of(loss: np.ndarray[Any, Any], schedule: Schedule | None = None, nbeta: float = 1.0, **fields: Any) -> LLCResult:
    return LLCResult(loss, 0.0, nbeta, schedule or Schedule(loss.shape[1], 0), **fields)


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
    "no draws": lambda: _of(_noise(4, 100), Schedule(0, 100)),
    "no steps": lambda: _of(np.zeros((4, 0))),
    "nbeta 0": lambda: _of(_noise(4, 100), nbeta=0.0, settings={"nbeta": 0.0}),
    "too large to be squared": lambda: _of(1e300 * (10 + _noise(4, 100))),
    "too large to be multiplied": lambda: _of(1e307 * (10 + _noise(4, 100)), nbeta=100.0),
    "too small to be squared": lambda: _of(1e-310 * (10 + _noise(4, 100))),
    "one that explodes": lambda: _of(np.where(np.arange(100) == 50, 1e280, 1.0) * _noise(4, 100)),
    "far from w*": lambda: _of(1e6 + _noise(4, 100)),
    "negative": lambda: _of(_noise(4, 100) - 10),
    "exponential growth": lambda: _of(np.exp(np.minimum(2.5 * np.arange(300), 700)) * np.ones((2, 1))),
}


@pytest.fixture
def strict() -> Iterator[None]:
    """Warnings, NumPy's and Matplotlib's, are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("kind", _RESULTS)
@pytest.mark.usefixtures("strict")
def test_nothing_overlaps(kind: str) -> None:
    """Title, panels with their labels, and legend lie beside each other and inside the figure."""
    figure = plot_result(_RESULTS[kind]())
    figure.draw_without_rendering()
    assert figure._suptitle is not None
    parts = [*figure.axes, figure._suptitle, *figure.legends]
    boxes = [part.get_tightbbox() if part in figure.axes else part.get_window_extent() for part in parts]
    assert len(boxes) == len(PANELS) + 2
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-2).overlaps(other.padded(-2))  # pixels
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize("kind", ["sixteen chains", "two diverged", "no draws", "exponential growth", "nbeta 0"])
@pytest.mark.parametrize("name", PANELS)
@pytest.mark.usefixtures("strict")
def test_panels_alone(kind: str, name: str) -> None:
    """Each can be drawn by itself, as a document that is the same every time."""
    result = _RESULTS[kind]()
    (axes,) = plot_result(result, [name]).axes
    assert axes.get_title() == PANELS[name].title
    document = panel_svg(result, name)
    assert document == panel_svg(result, name) and ElementTree.fromstring(document).tag.endswith("svg")


def test_panels_that_are_chosen() -> None:
    """In the order that was asked for; others are errors before anything is drawn."""
    result = _result(8)
    for names in (["rank", "trace"], list(PANELS)[:4], list(PANELS)[::-1][:5], ("forest",)):
        found = plot_result(result, names).axes
        assert [axes.get_title() for axes in found] == [PANELS[name].title for name in names]
    assert len(plot_result(result, "trace").axes) == 1
    assert list(PANELS) == ["trace", "running", "forest", "density", "autocorr", "rank"]
    with pytest.raises(ValueError, match="panels has 'traces': use some of 'trace', 'running'"):
        plot_result(result, ["trace", "traces"])
    with pytest.raises(ValueError, match="panels is empty"):
        plot_result(result, [])


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
    for panel in (figure.axes[0], figure.axes[1], figure.axes[3]):
        for handle, line in zip(handles, panel.lines, strict=False):
            assert (handle.get_color(), handle.get_linestyle()) == (line.get_color(), line.get_linestyle())
    for panels, named in ((["trace"], 6), (["trace", "rank"], 15)):
        assert len(plot_result(_result(50), panels).legends[0].get_texts()) == named
    assert chain_style(0) != chain_style(6)


def test_densities() -> None:
    """Of each chain's draws: an area of one, at the places where an independent estimate has it."""
    result = _result(3, draws=4000, burnin=0)
    result.loss_trace[2] += 0.1
    _, (axes,) = new_figure(1)
    plot_density(axes, result)
    for line, draws in zip(axes.lines, [*result.llc_trace, result.llc_trace.ravel()], strict=False):
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        expected = gaussian_kde(draws)(x)
        assert abs(y - expected).max() < 0.1 * expected.max()
        assert np.trapezoid(y, x) == pytest.approx(1, abs=0.03)
    peaks = [line.get_xdata()[np.argmax(line.get_ydata())] for line in axes.lines[:3]]  # type: ignore[call-overload,index]
    np.testing.assert_allclose(peaks, [10, 10, 20], atol=0.8)
    mean, reference = axes.lines[4:]
    assert set(mean.get_xdata()) == {result.llc_mean} and set(reference.get_xdata()) == {0}
    assert reference.get_label() == "w*: L = 0"


def test_where_w_star_is_among_the_losses() -> None:
    """Its line is in the picture unless the draws are so far from it that nothing else could be seen."""
    for shift, is_there in ((0.0, True), (5.0, True), (-5.0, True), (1000.0, False), (-1000.0, False)):
        _, (axes,) = new_figure(1)
        plot_density(axes, _of(shift + _noise(4, 500)))
        left, right = axes.get_xlim()
        assert bool(left < 0 < right) is is_there
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert ("w*: L = 0" in names) is is_there
        assert (f"w*: L = 0, far to the {'left' if shift > 0 else 'right'}" in names) is not is_there


def test_running_estimate() -> None:
    """λ̂ of the first draws at lengths that grow by a factor, with Student's interval; the last is the result's."""
    result = _result(5, draws=700, diagnostics=Diagnostics(init_loss_stderr=1e-3))
    lengths, middle, half = running_estimate(result)
    assert lengths[0] == 1 and lengths[-1] == 700 and (np.diff(lengths) > 0).all() and len(lengths) <= 30
    for k, length in enumerate(lengths):
        draws = 100 * result.loss_trace[:, 100 : 100 + length]
        assert middle[k] == pytest.approx(draws.mean())
        error = standard_error(draws)
        assert half[k] == pytest.approx(error.quantile(0.95) * np.hypot(error.value, 100 * 1e-3))
    low, high = result.interval()
    assert (middle[-1] - half[-1], middle[-1] + half[-1]) == pytest.approx((low, high))
    assert [len(values) for values in running_estimate(_diverged((0, 1, 2, 3)))] == [0, 0, 0]


def test_running_panel() -> None:
    """Lines are means of the draws so far, to each chain's λ̂; the error bar at the end is the result's interval."""
    result = _result(4, diagnostics=Diagnostics(unresolved=0.7))
    _, (axes,) = new_figure(1)
    plot_running(axes, result)
    for chain, line in enumerate(axes.lines[:4]):
        for length, value in line.get_xydata():  # type: ignore[attr-defined]
            assert value == pytest.approx(result.llc_trace[chain, : int(length)].mean())
        assert line.get_ydata()[-1] == pytest.approx(result.llc_per_chain[chain])  # type: ignore[index]
    assert axes.lines[4].get_ydata()[-1] == pytest.approx(result.llc_mean)  # type: ignore[index]
    (bars,) = axes.containers[0][2]
    np.testing.assert_allclose(bars.get_segments()[0], [[200, y] for y in result.interval()])
    assert result.interval()[1] - result.llc_mean > 0.7 and axes.get_xscale() == "log"
    assert axes.get_ylim()[0] < result.interval()[0] < result.interval()[1] < axes.get_ylim()[1]


def test_forest() -> None:
    """A chain's λ̂ with its 50 % and 95 % interval, at its number; below the estimate of all with its own."""
    result = _result(4)
    result.loss_trace[2, 150:] = np.nan
    _, (axes,) = new_figure(1)
    plot_forest(axes, result)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "2", "3", "all"]
    assert axes.yaxis_inverted()
    for place, chain in enumerate((0, 1, 3)):
        wide, narrow, point = axes.lines[3 * place : 3 * place + 3]
        draws = 100 * result.loss_trace[chain : chain + 1, 100:]
        error = standard_error(draws)
        for line, prob in ((wide, 0.95), (narrow, 0.5)):
            half = error.quantile(prob) * error.value
            np.testing.assert_allclose(line.get_xdata(), [draws.mean() - half, draws.mean() + half])
            assert set(line.get_ydata()) == {chain}
        np.testing.assert_allclose(point.get_xydata(), [[draws.mean(), chain]])
        assert point.get_markerfacecolor() == point.get_color() == chain_style(chain)["color"]
    (bars,) = axes.containers[0][2]
    np.testing.assert_allclose(bars.get_segments()[0], [[x, 4] for x in result.interval()])
    (cross,) = [line for line in axes.lines if line.get_label() == "diverged"]
    assert list(cross.get_ydata()) == [2]


def test_forest_of_an_interrupted_run() -> None:
    """A chain with fewer draws is hollow, one without any has none."""
    _, (axes,) = new_figure(1)
    plot_forest(axes, _partial())
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["no draws", "not part of λ̂"]
    assert [line.get_markerfacecolor() for line in axes.lines[2:9:3]] == [*list(OKABE_ITO.values())[:2], "white"]


def test_autocorrelation() -> None:
    """Of each chain by its definition, their mean, and the band that white noise keeps in."""
    rng, draws = np.random.default_rng(2), np.zeros((3, 500))
    for step in range(1, 500):
        draws[:, step] = 0.7 * draws[:, step - 1] + rng.standard_normal(3)
    result = _of(draws, diagnostics=Diagnostics(ess_bulk=123.4))
    _, (axes,) = new_figure(1)
    plot_autocorrelation(axes, result)
    _, *lines, mean = axes.lines
    expected = []
    for row, line in zip(draws, lines, strict=True):
        away = row - row.mean()
        expected.append([(away[: 500 - int(k)] * away[int(k) :]).sum() / (away**2).sum() for k in line.get_xdata()])
        np.testing.assert_allclose(line.get_ydata(), expected[-1], atol=1e-12)
    np.testing.assert_allclose(mean.get_ydata(), np.mean(expected, axis=0), atol=1e-12)
    assert mean.get_label() == "mean; ESS = 123 of 1500"
    corners = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (corners.y0, corners.y1) == pytest.approx((-1.96 / 500**0.5, 1.96 / 500**0.5))
    assert 20 <= axes.get_xlim()[1] <= 100
    still = _of(np.vstack([draws, np.ones((1, 500))]))  # a chain that does not move has no line
    _, (axes,) = new_figure(1)
    plot_autocorrelation(axes, still)
    assert len(axes.lines) == 1 + 3 + 1


def test_ranks() -> None:
    """Shares of a chain's draws below a rank, by counting; apart chains leave the band, equal ones stay in it."""
    x = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    draws = np.random.default_rng(3).integers(0, 6, (3, 40)).astype(float)  # with ties
    found = rank_shares(draws, x)
    ranks = np.array([[[(draws < d).sum() + ((draws == d).sum() + 1) / 2 for d in row]] for row in draws])[:, 0] / 120
    np.testing.assert_allclose(found, [[(row <= u).mean() for u in x] for row in ranks])
    for shift, is_inside in ((0.0, True), (1.0, False)):
        _, (axes,) = new_figure(1)
        plot_rank(axes, _of(_noise(4, 400) + shift * np.array([[0], [0], [0], [1]])))
        corners = axes.patches[0].get_extents().transformed(axes.transData.inverted())
        lines = [np.abs(np.asarray(line.get_ydata(), float)).max() for line in axes.lines[1:5]]
        assert bool(max(lines) < corners.y1) is is_inside
    # Two normal distributions s apart, at R̂ = 1.05: the band is twice s/√(2π).
    assert corners.y1 == pytest.approx(2 * (1.05**2 - 1) ** 0.5 / (2 * np.pi) ** 0.5)


def test_ranks_of_one_chain() -> None:
    """Its halves are compared."""
    _, (axes,) = new_figure(1)
    plot_rank(axes, _of(np.linspace(0, 1, 100)[None]))
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[1:3] == ["first half", "second half"]
    assert max(axes.lines[1].get_ydata()) == pytest.approx(0.5, abs=0.02)  # type: ignore[type-var]


def test_a_spike_does_not_hide_the_densities() -> None:
    result = _result(2, draws=4000)
    result.loss_trace[0, 200] = 100.0
    _, (axes,) = new_figure(1)
    plot_density(axes, result)
    assert axes.get_xlim()[1] < 30


# ---- what draws know ---------------------------------------------------------------------------------------


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    """Red, green and blue of the entries that a heat map shows."""
    figure.canvas.draw()
    found: np.ndarray[Any, Any] = figure.axes[0].images[0].get_array()[..., :3]
    return found


def test_influence_matrix() -> None:
    """Positive is red, negative blue, what is not significant gray, what is not known white; names beside it."""
    value = np.array([[0.9, -0.9, 0.5], [0.1, np.nan, 0.0]])
    significant = np.array([[True, True, False], [True, True, True]])
    names = ["first", "a $ name that is much too long to show"]
    figure = plot_influence(value, significant, train_names=names, query_names="xyz", label="correlation", title="T")
    pixels, axes = _pixels(figure), figure.axes[0]
    assert pixels[0, 0, 0] > 2 * pixels[0, 0, 2] and pixels[0, 1, 2] > 2 * pixels[0, 1, 0]
    assert pixels[0, 2].tolist() == [0.85] * 3 and pixels[1, 1].tolist() == [1.0] * 3
    assert pixels[1, 0].min() > 0.8 and pixels[1, 2].min() > 0.95
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "a $ name that is much t…"]
    assert [text.get_text() for text in axes.get_xticklabels()] == list("xyz")
    assert figure.axes[1].get_ylabel() == "correlation; gray: not significant" and axes.get_title() == "T"
    assert plot_influence(value).axes[1].get_ylabel() == "influence"


def test_a_diagonal_does_not_take_the_colors() -> None:
    """Of a loss kernel whose other entries are small."""
    rng = np.random.default_rng(0)
    kernel = 0.01 * rng.standard_normal((10, 10))
    pixels = _pixels(plot_influence(kernel + np.eye(10)))
    assert np.ptp(pixels[~np.eye(10, dtype=bool)], axis=0).min() > 0.5


def test_a_matrix_of_millions_of_entries_is_averaged() -> None:
    value = np.zeros((1500, 2300), np.float32)
    value[:600, 1000:] = np.linspace(0.5, 1, 1300)
    value[1499, 0] = np.nan
    figure = plot_influence(value, value != 0)
    pixels = _pixels(figure)
    assert pixels.shape[:2] == (1000, 1000) and figure.axes[0].images[0].get_extent() == [-0.5, 2299.5, 1499.5, -0.5]
    assert (pixels[:399, 436:, 0] > pixels[:399, 436:, 2]).all() and (pixels[402:-1] == 0.85).all()
    assert (pixels[-1, 0] == 1).all()


def test_matrices_that_nothing_is_known_of() -> None:
    for value in (np.full((2, 3), np.nan), np.zeros((2, 3))):
        for significant in (None, np.zeros((2, 3), bool)):
            _pixels(plot_influence(value, significant))
    with pytest.raises(ValueError, match=r"value has shape \(3,\); it must be a matrix"):
        plot_influence(np.ones(3))
    with pytest.raises(ValueError, match=r"significant has shape \(3, 2\), but value has \(2, 3\)"):
        plot_influence(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="3 names were given for 2 train items"):
        plot_influence(np.ones((2, 3)), train_names="abc")


def test_susceptibilities() -> None:
    """Spaces and line ends of tokens can be seen; of hundreds of items there are no names."""
    value = np.array([[2.0, -2, 1], [0, 1, -1]])
    figure = plot_susceptibilities(value, ["l0 h0", "l0 mlp"], np.abs(value) > 1.5, items=[" the", "$x$", "\n"])
    pixels, axes = _pixels(figure), figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["␣the", "$x$", "⏎"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["l0 h0", "l0 mlp"]
    assert (pixels[1] == 0.85).all() and pixels[0, 0, 0] > pixels[0, 0, 2] and pixels[0, 1, 0] < pixels[0, 1, 2]
    many = plot_susceptibilities(np.ones((2, 300)), ["a", "b"], items=["token"] * 300)
    many.canvas.draw()
    assert "token" not in [text.get_text() for text in many.axes[0].get_xticklabels()]


def test_paths_of_chains() -> None:
    """Each in its style through its draws, with its ends; in two pairs of components if there are three."""
    rng = np.random.default_rng(0)
    coordinates = rng.standard_normal((3, 50, 3))
    figure = plot_pca(coordinates, [0.5, 0.3, 0.1], reference=[1.0, 2.0, 3.0], title="paths")
    figure.canvas.draw()
    for axes, second in zip(figure.axes, (1, 2), strict=True):
        for chain, line in enumerate(axes.lines[:3]):
            np.testing.assert_array_equal(line.get_xydata(), coordinates[chain][:, [0, second]])
            assert line.get_color() == chain_style(chain)["color"]
            first, last = axes.lines[3 + 2 * chain : 5 + 2 * chain]
            assert first.get_markerfacecolor() == "white" and last.get_markerfacecolor() == line.get_color()
            np.testing.assert_array_equal(last.get_xydata(), coordinates[chain, -1:, [0, second]].T)
        np.testing.assert_array_equal(axes.lines[9].get_xydata(), [[1, [2, 3][second - 1]]])
        assert axes.get_ylabel() == f"component {second + 1} ({[30, 10][second - 1]}% of the variance)"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["chain 0", "chain 1", "chain 2", "w*"]


def test_paths_of_many_chains_and_draws() -> None:
    """A path goes through 200 draws at most, the first and last among them; the legend stays short."""
    coordinates = np.random.default_rng(0).standard_normal((30, 1000, 2))
    figure = plot_pca(coordinates, reference=[0, 0])
    (axes,) = figure.axes
    assert len(axes.lines[0].get_xdata()) == 200
    np.testing.assert_array_equal(axes.lines[0].get_xydata()[[0, -1]], coordinates[0, [0, -1]])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 25 and names[-2:] == ["chain 23 (and 6 more)", "w*"]
    with pytest.raises(ValueError, match=r"coordinates has shape \(3, 4, 1\)"):
        plot_pca(np.ones((3, 4, 1)))


def test_top_sentences() -> None:
    """The largest first, with each token's color and value; text is text, whatever it has in it."""
    sentences = [["a", " small"], ["<b>", " large & ", "\n"], ["mid", "dle"]]
    values = [[0.1, -0.1], [4.0, -2.0, np.nan], [1.0, -1.0]]
    page = top_sentences_html(sentences, values, top=2, names=["A", "B", "<C>"], title="largest <values>")
    root = ElementTree.fromstring(page.replace("<br>", "<br/>"))
    spans = [span for span in root.iter("span") if span.get("title")]
    assert [(span.text, span.get("title")) for span in spans] == [
        ("<b>", "4"),
        (" large & ", "-2"),
        ("⏎", "nan"),
        ("mid", "1"),
        ("dle", "-1"),
    ]
    styles = [span.get("style", "") for span in spans]
    assert "rgba(178,24,43,0.80)" in styles[0] and "rgba(33,102,172" in styles[1] and "background" not in styles[2]
    text = "".join(root.itertext())
    assert "largest <values>" in text and "<C>mean +0" in text and "small" not in text
    assert "2 of 3 sentences" in text and "not significant" not in text


def test_tokens_that_are_not_significant_are_gray() -> None:
    page = top_sentences_html([["a", "b"]], [[1.0, 2.0]], [[False, True]])
    first, second = [
        span for span in ElementTree.fromstring(page.replace("<br>", "<br/>")).iter("span") if span.get("title")
    ]
    assert "color:#999" in first.get("style", "") and "background" not in first.get("style", "")
    assert "background" in second.get("style", "") and "gray text: not significant" in page
    assert "0 of 0 sentences" in top_sentences_html([], [])


def test_sentences_and_values_fit_together() -> None:
    with pytest.raises(ValueError, match="values has 3 numbers for sentence 0, which has 2 tokens"):
        top_sentences_html([["a", "b"]], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"values has 1 rows.*but there are 2 sentences"):
        top_sentences_html([["a"], ["b"]], [[1.0]])


def test_figures_show_themselves() -> None:
    """In a notebook as the value of a cell, without pyplot, so that it is shown once and nothing is left to close; a
    copy or a pickle is an ordinary figure."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    figure = plot_result(_result())
    assert figure._repr_png_().startswith(b"\x89PNG\r\n\x1a\n")  # type: ignore[attr-defined]
    assert pyplot.get_fignums() == before
    assert len(pickle.loads(pickle.dumps(figure)).axes) == len(PANELS)
    assert len(copy.deepcopy(new_figure(2)[0]).axes) == 2
