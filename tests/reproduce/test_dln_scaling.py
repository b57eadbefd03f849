"""The experiment dln-scaling, with networks and chains as small as can be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PNG

from llc_fast.plots import new_figure, plot_against_known
from llc_fast.problems import deep_linear
from llc_fast.reproduce import dln_scaling
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.dln_scaling import Large, Sample, Settings
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
TINY = Settings({"1k": Sample(2, 20, 2), "100k": Sample(1, 10, 1)}, Large(width=40, layers=3, steps=2))
PARTS = {"peak_bytes": 1255, "imports_bytes": 287, "activations_bytes": 100, "data_bytes": 16}


def _study(folder: Path) -> Study:
    return Study("dln-scaling", "small", folder, progress=False)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large network's figures without waiting for a process that imports torch."""
    large = {"num_parameters": 100, "layers": 25, "seconds_of_step": 2e-6, "seconds_of_update": 5e-8, **PARTS}
    monkeypatch.setattr(dln_scaling, "in_own_process", lambda spec: large)


@pytest.mark.usefixtures("no_process")
def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows say what was estimated and are measured once; what does not fit the memory is a row as well."""
    claims = run(load("dln-scaling"), _study(tmp_path), TINY)
    written = json.loads((tmp_path / "data.json").read_text())
    rows = written["tables"]["networks"]
    assert list(rows) == ["1k 0", "1k 1", "100k 0"] and (tmp_path / "dln-scaling.png").read_bytes().startswith(PNG)
    assert len(claims) == len(written["claims"]) == 5
    problem = deep_linear.make_problem("1k", 1)
    row = rows["1k 1"]
    assert row["lambda"] == problem.learning_coefficient and row["widths"] == list(problem.widths)
    assert row["error"] == pytest.approx(row["llc"] / row["lambda"] - 1)
    assert row["warnings"] and len(row["llc_per_chain"]) == 2  # twenty steps are too few
    assert min(rows["100k 0"]["widths"]) >= 50 and max(rows["100k 0"]["widths"]) <= 200

    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryError("this run needs 10 GiB")

    monkeypatch.setattr(Study, "estimate", refuse)
    run(load("dln-scaling"), _study(tmp_path), TINY)
    assert json.loads((tmp_path / "data.json").read_text())["tables"] == written["tables"]
    claims = run(load("dln-scaling"), _study(tmp_path / "other"), TINY)
    tables = json.loads((tmp_path / "other" / "data.json").read_text())["tables"]
    assert tables["networks"]["1k 0"]["warnings"] == ["not estimated: this run needs 10 GiB"]
    assert not claims[0].holds and "3 have no estimate" in claims[0].found


@pytest.mark.slow
def test_large_network_in_its_own_process() -> None:
    """A process that has made nothing else: parts add up to its peak, and layers have been there."""
    large = Large(width=300, layers=4, steps=2)
    row = dln_scaling.in_own_process(vars(large) | {"seed": 0, "device": "cpu"})
    assert "problem" not in row, row
    assert row["num_parameters"] == 360_000 and row["diverged_chains"] == []
    assert 0 < row["seconds_of_update"] < row["seconds_of_step"]
    if sys.platform == "linux":
        parts = dln_scaling.bytes_per_parameter(row)
        assert sum(parts.values()) == pytest.approx(row["peak_bytes"] / 360_000)
        assert row["peak_bytes"] >= row["imports_bytes"] > 50e6
    failed = dln_scaling.in_own_process({"width": 1})
    assert "KeyError" in failed["problem"]


def test_paper_scale_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six classes, the smallest first, each with the paper's steps; the first network of the first is estimated."""
    settings = dln_scaling.SCALES["paper"]
    assert list(settings.samples) == list(deep_linear.SIZE_CLASSES)
    for size, sample in settings.samples.items():
        assert sample.steps == deep_linear.SIZE_CLASSES[size].num_steps and sample.networks >= 5
    short = Settings({"1k": Sample(1, 10, settings.samples["1k"].chains)}, settings.large)
    monkeypatch.setattr(dln_scaling, "in_own_process", lambda spec: {**spec, "problem": "not run"})
    study = Study("dln-scaling", "paper", tmp_path, progress=False)
    dln_scaling.measure(study, short)
    assert study.tables["large"]["large"]["width"] ** 2 * settings.large.layers == 10**8
    assert len(study.tables["networks"]["1k 0"]["llc_per_chain"]) == 4


# --- claims -------------------------------------------------------------------------------------------------


def _row(size: str, known: float, error: float | None, warnings: tuple[str, ...] = ()) -> Row:
    llc = None if error is None else known * (1 + error)
    return {
        "size": size,
        "lambda": known,
        "llc": llc,
        "error": error,
        "stderr": None if error is None else 0.01 * known,
        "warnings": list(warnings),
        "num_parameters": 10 * known,
        "widths": [5, 6, 7],
    }


def _tables(*rows: Row, large: Row | None = None) -> Tables:
    made = {"num_parameters": 100, "layers": 25, "seconds_of_step": 2e-6, "seconds_of_update": 5e-8, **PARTS}
    return {"networks": {f"{k}": row for k, row in enumerate(rows)}, "large": {"large": large or made}}


SETTINGS = Settings({"1k": Sample(5, 10), "10k": Sample(5, 10)})
GOOD = [_row(size, 10.0 * k * scale, 0.01 * k) for size, scale in (("1k", 1), ("10k", 10)) for k in range(1, 6)]


def _check(tables: Tables) -> list[Claim]:
    return dln_scaling.claims(tables, SETTINGS)


def test_claims_that_hold() -> None:
    claims = _check(_tables(*GOOD))
    assert all(c.holds for c in claims), claims
    assert "1.0000 over 10" in claims[0].found and "3.0% and 4.6%" in claims[1].found
    assert "8.66" in claims[-1].text and "8.52" in claims[-1].found and "12.55" in claims[-1].found


def test_claims_that_fail() -> None:
    """Each on its own: order, a class's accuracy, an error without a warning, memory."""

    def failing(*rows: Row, large: Row | None = None) -> list[int]:
        return [k for k, c in enumerate(_check(_tables(*rows, large=large))) if not c.holds]

    rest = GOOD[1:]
    assert failing(_row("1k", 10.0, 0.35), *rest) == [1, 3]
    assert failing(_row("1k", 10.0, -0.35), *rest) == [1, 3]
    assert failing(_row("1k", 10.0, -0.35, ("too short",)), *rest) == [1]
    assert failing(*(r if r["size"] == "1k" else _row("10k", r["lambda"], 0.06) for r in GOOD)) == [2]
    assert failing(_row("1k", 10.0, 4.5, ("too short",)), *rest) == [0, 1]
    assert failing(_row("1k", 10.0, None, ("diverged",)), *rest) == [0, 1]
    assert failing(_row("1k", 10.0, None), *rest) == [0, 1, 3]
    assert failing(*GOOD, large=_tables()["large"]["large"] | {"peak_bytes": 1300}) == [4]
    assert failing(*GOOD, large={"problem": "exit status 1: MemoryError"}) == [4]
    unknown = _tables()["large"]["large"] | {"peak_bytes": None}
    assert failing(*GOOD, large=unknown) == [4]
    for large in (unknown, {"problem": "exit status 1"}):
        assert dln_scaling.plot(_tables(_row("1k", 1.0, None), *GOOD, large=large), SETTINGS)


def test_hours_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three networks of the paper's class 1M on all its million samples, no large one; by the median alone."""
    settings = dln_scaling.SCALES["hours"]
    ((size, sample),) = settings.samples.items()
    assert (size, sample.networks, settings.large) == ("1M", 3, None)
    assert deep_linear.SIZE_CLASSES[size].num_samples == 10**6
    rows = [_row("1M", 100.0 * (k + 1), error, ("short",)) for k, error in enumerate((0.01, -0.079, 0.5))]
    good = dln_scaling.claims({"networks": {str(r["lambda"]): r for r in rows}}, settings)
    assert [c.holds for c in good] == [True] * 3 and "7.9% (1.0%, 7.9%, 50.0%)" in good[1].found
    rows[1]["error"] = 0.081
    assert not dln_scaling.claims({"networks": {str(r["lambda"]): r for r in rows}}, settings)[1].holds
    assert dln_scaling.plot({"networks": {str(r["lambda"]): r for r in rows}}, settings)
    tiny = Settings({"1k": Sample(1, 10, 2, median=0.08)}, large=None)
    monkeypatch.setattr(dln_scaling, "in_own_process", None)  # nothing calls it
    assert len(run(load("dln-scaling"), Study("dln-scaling", "hours", tmp_path, progress=False), tiny)) == 3


def test_warned_points_are_hollow() -> None:
    """In the figure of known models: color inside where there is no warning; nothing where there is no estimate."""
    _, (axes,) = new_figure(1)
    points = [
        {"size": "1k", "lambda_true": k, "llc_mean": llc, "llc_stderr": 0.1, "warnings": warnings}
        for k, llc, warnings in (
            (1.0, 1.1, []),
            (2.0, 2.1, ["short"]),
            (3.0, 3.1, ["short"]),
            (4.0, None, ["diverged"]),
        )
    ]
    plot_against_known(axes, points)
    markers = {line.get_markerfacecolor(): len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"}
    assert markers.pop("white") in (0, 2) and list(markers.values()) == [1]
