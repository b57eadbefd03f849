"""The page of a result: whole, alone, escaped, and true."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import re
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import llc_fast
from llc_fast.plots import PANELS
from llc_fast.report import ARGUMENTS, FACTS, _rows, markdown_html, python_call, report_html
from llc_fast.result import Diagnostics, LLCResult, Warning
from llc_fast.schedule import Schedule
from llc_fast.settings import Settings
from llc_fast.stats import limits

pytest.importorskip("matplotlib")
_VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Page(HTMLParser):
    """What a page holds; an AssertionError where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def _result(**fields: Any) -> LLCResult:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "settings": {"sampler": "sgld", "lr": 1e-4, "nbeta": 100.0, "localization": 3.0, "num_parameters": 50},
        "diagnostics": Diagnostics(r_hat=1.012, ess_bulk=324.0, bias_share=None, distance=[1.0, 2.0]),
    }
    loss = 0.1 + 0.02 * rng.standard_normal((4, 300))
    return LLCResult(loss, 0.0, 100.0, Schedule(200, 100), **{**given, **fields})


def _diverged() -> LLCResult:
    result = _result(warnings=[Warning("All chains diverged.", "diverged")])
    result.loss_trace[:, 50:] = np.nan
    return result


_RESULTS = {
    "good": _result,
    "diverged": _diverged,
    "bare": lambda: _result(settings={}, diagnostics=Diagnostics()),
    "partial": lambda: _result(steps_done=[300, 200, 120, 0]),
    "nbeta 0": lambda: dataclasses.replace(_result(), nbeta=0.0),
    "one draw": lambda: LLCResult(np.ones((1, 1)), 0.0, 1.0, Schedule(1, 0)),
    "negative": lambda: dataclasses.replace(_result(), init_loss=1.0),
    "huge": lambda: LLCResult(np.full((2, 20), 1e300), 0.0, 1e9, Schedule(20, 0)),
}


def _written(result: LLCResult, folder: Path, **options: Any) -> _Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.report(folder / "llc.html", **options)
    return _Page((folder / "llc.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", _RESULTS)
def test_the_page_stands_alone(kind: str, tmp_path: Path) -> None:
    """It is well formed; nothing is loaded from elsewhere, no script runs; each link on the page leads somewhere."""
    result = _RESULTS[kind]()
    page = _written(result, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["llc.html"]
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    style = (tmp_path / "llc.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme:dark" in style and "print" in style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "data", "poster", "background"):
            assert str(attributes.get(name) or "data:").startswith("data:")
    for link in page.all("a"):
        target = link["href"] or ""
        assert target[1:] in ids if target.startswith("#") else target.startswith("https://")
    assert (page.all("html")[0]["lang"], page.all("meta")[0]["charset"]) == ("en", "utf-8")
    pictures = page.all("img")
    assert len(pictures) == len(PANELS) and all(len(picture["alt"] or "") > 20 for picture in pictures)
    for picture in pictures:
        document = base64.b64decode((picture["src"] or "").removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(document).tag.endswith("svg")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(headings))
    first = (tmp_path / "llc.html").read_text(encoding="utf-8").partition('class="number"')[2].partition("</p><p>")[0]
    assert "nan" not in first and not any("nan" in (picture["alt"] or "") for picture in pictures)


def test_the_same_result_gives_the_same_page() -> None:
    assert report_html(_result()) == report_html(_result())


def test_what_users_bring_is_escaped(tmp_path: Path) -> None:
    """Titles, settings, warnings, names: none of them is markup."""
    evil = '<script>alert("x")</script>&amp;<img src=x onerror=y>"\''
    result = _result(
        settings={"sampler": evil, evil: evil, "params": evil, "loss_fn": evil, "strategy": evil, "nbeta": 1.0},
        diagnostics=Diagnostics({evil: evil, "list": [evil]}),
        warnings=[Warning(evil, evil)],
    )
    page = _written(result, tmp_path, title=evil)
    assert not page.all("script") and len(page.all("img")) == len(PANELS)
    assert page.text.count(evil) >= 3 and page.words.count("onerror=y") >= 8


def _words(result: LLCResult, **options: Any) -> str:
    return _Page(report_html(result, **options)).words


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llc_fast.report.panel_svg", lambda result, name: b"<svg/>")


@pytest.mark.usefixtures("without_pictures")
def test_what_it_says() -> None:
    """The estimate first, with its interval and meaning; each warning; each panel with how to read it; versions."""
    result = _result(warnings=[Warning("Effective sample size is 45.", "ess")])
    words, (low, high) = _words(result, title="my model"), result.interval()
    assert words.startswith("my model") and "Local learning coefficient" not in words
    assert f"λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g}" in words
    assert f"95 % interval {low:.4g} to {high:.4g}" in words
    assert f"2λ̂ ≈ {2 * result.llc_mean:.3g} parameters; it has 50 that were sampled" in words
    assert "nβ = 100 and γ = 3" in words and "There is a reason to doubt it: see warnings" in words
    assert "ess : Effective sample size is 45." in words and "warning: ess" in words
    for panel in PANELS.values():
        assert panel.title.capitalize() in words and panel.reading in words
    assert llc_fast.__version__ in words and "instruction_set" in words and "arXiv" in words
    assert "No check found a reason to doubt it" in _words(_result())
    assert "no estimate" in _words(_diverged())
    assert "λ̂ = 0 by definition" in _words(_RESULTS["nbeta 0"]())
    assert "w* is no minimum of this loss" in _words(_RESULTS["negative"]())


def test_the_table_has_the_limits_of_the_checks() -> None:
    """Those of llc_fast.stats.limits, and a verdict on each number by itself."""

    def row(title: str, **numbers: Any) -> Any:
        (found,) = [r for r in _rows(_result(diagnostics=Diagnostics(numbers))) if r.name.startswith(title)]
        return found

    for value, is_inside in ((limits.MAX_R_HAT - 0.01, True), (limits.MAX_R_HAT + 0.01, False)):
        found = row("R̂", r_hat=value)
        assert found.is_inside is is_inside and found.limit == f"at most {limits.MAX_R_HAT:.3f}"
        assert found.value == f"{value:.3f}" and found.codes == ("rhat",)
    for value, is_inside in ((limits.MIN_ESS + 1, True), (limits.MIN_ESS - 1, False)):
        assert row("effective sample size, bulk", ess_bulk=value).is_inside is is_inside
    llc = _result().llc_mean
    for value, is_inside in ((0.9, True), (1.1, False)):
        moved = value * limits.TREND_SIZE * llc
        assert row("trend", trend=-moved, trend_stderr=0.0).is_inside is is_inside
        assert row("burn-in", burnin_effect=value * limits.BURNIN_EFFECT * llc).is_inside is is_inside
        assert row("λ̂ from spikes", spike_share=value * limits.MAX_SPIKES).is_inside is is_inside
    assert row("trend", trend=5.0, trend_stderr=5.0).is_inside is True
    assert row("R̂", r_hat=None).value is None and row("effective sample size, tail", ess_tail=3.0).is_inside is None


def test_codes_in_the_table_are_those_of_checks() -> None:
    from llc_fast.checks import CODES

    assert {code for row in _rows(_result()) for code in row.codes} <= set(CODES)


def test_settings_as_a_call() -> None:
    """Python that calls estimate_llc with the same settings."""
    settings = {
        **{"sampler": "sghmc", "lr": 1.5e-4, "nbeta": 20.0, "bias_correction": False, "localization": 3.0},
        **{"momentum_decay": 0.2, "num_chains": 2, "num_burnin": 5, "num_draws": 10, "num_steps_bw_draws": 1},
        **{"batch_size": 16, "num_samples": 64, "params": "0.weight, 2.*", "num_parameters": 9, "seed": 3},
        **{"control_variate": True, "device": "cpu", "training_mode": True, "strategy": "batched", "seconds": 0.1},
    }
    called: dict[str, Any] = {}

    class Fake:
        samplers = llc_fast.samplers

        @staticmethod
        def estimate_llc(model: Any, data: Any, loss_fn: Any, **given: Any) -> str:
            called.update(given, loss_fn=loss_fn)
            return "called"

    names = {"llc_fast": Fake, "model": None, "data": None, "loss_fn": "a function"}
    exec(python_call(settings), names)
    sampler = called.pop("sampler")
    assert names["result"] == "called" and (sampler.name, sampler.momentum_decay) == ("sghmc", 0.2)
    assert called.pop("params") == ["0.weight", "2.*"] and called.pop("loss_fn") == "a function"
    assert called == {name: settings[name] for name in called} and set(settings) - set(called) == {
        *{"sampler", "params", "momentum_decay"},
        *(name for name in FACTS if name in settings),
    }
    assert "'next-token'," in python_call({"loss_fn": "next-token"})
    assert 'max=float("inf")' not in python_call({"lr": 1.0})


def test_arguments_are_those_of_an_estimate() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert set(ARGUMENTS) <= fields and not fields.intersection(FACTS)


def test_settings_of_an_estimate_as_a_call(tmp_path: Path) -> None:
    """The call gives the same chains, bit for bit."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(64, 3)
    data, model, loss_fn = (x, x.sum(1, keepdim=True)), torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
    given = {"sampler": "sghmc", "num_draws": 30, "num_burnin": 10, "lr": 1e-3, "nbeta": 9.0, "localization": 2.0}
    first = llc_fast.estimate_llc(model, data, loss_fn, **given, num_chains=2, seed=4, progress=False)
    names = {"llc_fast": llc_fast, "model": model, "data": data, "loss_fn": loss_fn}
    exec(python_call(first.settings), names)
    again: Any = names["result"]
    np.testing.assert_array_equal(again.loss_trace, first.loss_trace)
    assert {k: v for k, v in again.settings.items() if k != "seconds"} == {
        k: v for k, v in first.settings.items() if k != "seconds"
    }
    _written(first, tmp_path)


@pytest.mark.usefixtures("without_pictures")
def test_explanations_of_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beneath each warning that has one, to be opened."""
    monkeypatch.setattr("llc_fast.report.entries", lambda: {"ess": "Too **few**."})
    result = _result(warnings=[Warning("a", "ess"), Warning("b", "unheard-of")])
    page = _Page(report_html(result))
    assert "ess : a What this means Too few . unheard-of : b Pictures" in page.words


def test_explanations_as_html() -> None:
    """Paragraphs, lists, code, bold, links to the web; everything else is text."""
    text = "One **bold** `a < b`\nline.\n\n- first `x`\n  goes on\n- [web](https://a.b/c), [page](data.md#order)\n\n"
    text += "    code <b>"
    assert markdown_html(text) == (
        "<p>One <b>bold</b> <code>a &lt; b</code> line.</p>"
        '<ul><li>first <code>x</code> goes on</li><li><a href="https://a.b/c">web</a>, page</li></ul>'
        "<pre><code>code &lt;b&gt;</code></pre>"
    )
    assert "<script" not in markdown_html('<script> [x](https://a"onload=1) [y](javascript:z)')
    assert '"onload' not in markdown_html('[x](https://a"onload=1)') and "javascript" not in markdown_html(
        "[y](javascript:z)"
    )


@pytest.mark.usefixtures("without_pictures")
def test_a_page_is_written_like_a_file(tmp_path: Path) -> None:
    """The old one is replaced; what can't be written leaves nothing."""
    _written(_result(), tmp_path, title="old")
    assert "new" in _written(_result(), tmp_path, title="new").words
    with pytest.raises(FileNotFoundError):
        _result().report(tmp_path / "nowhere" / "llc.html")
    with pytest.raises(OSError, match="a folder"):
        _result().report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["llc.html"]
