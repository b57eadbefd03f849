"""The frame of the reproductions: rows, resumption, claims, pictures, and the command."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import data, interrupt_after, mlp, mse
from test_cli import _run, _said

from llc_fast import reproduce
from llc_fast.plots import new_figure
from llc_fast.reproduce import frame
from llc_fast.reproduce.frame import Check, Study

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def _study(folder: Path, **options: Any) -> Study:
    return Study("toy", "small", folder, **({"progress": False} | options))


# ---- rows --------------------------------------------------------------------------------------------------


def test_rows_are_measured_once(tmp_path: Path) -> None:
    """In order, kept as they come, and never measured again; new cases are."""
    measured: list[int] = []

    def measure(case: int) -> dict[str, Any]:
        measured.append(case)
        return {"square": case**2}

    first = _study(tmp_path).rows("squares", {"a": 2, "b": 3}, measure)
    assert [row["square"] for row in first] == [4, 9] and all(row["seconds"] >= 0 for row in first)
    again = _study(tmp_path).rows("squares", {"b": 3, "c": 4, "a": 2}, measure)
    assert [row["square"] for row in again] == [9, 16, 4] and measured == [2, 3, 4]
    assert again[0] == first[1] and again[2] == first[0]


def test_a_row_that_fails_loses_none_before_it(tmp_path: Path) -> None:
    def measure(case: int) -> dict[str, Any]:
        return {"inverse": 1 / case}

    with pytest.raises(ZeroDivisionError):
        _study(tmp_path).rows("t", {"one": 1, "none": 0, "two": 2}, measure)
    assert list(_study(tmp_path).tables["t"]) == ["one"]


def test_rows_are_the_same_fresh_and_kept(tmp_path: Path) -> None:
    """Arrays, NumPy's numbers, tuples and NaN come back as JSON has them, at once and later."""
    row = {
        "a": np.arange(3.0),
        "b": np.float32(0.5),
        "c": (1, 2),
        "d": float("nan"),
        "e": {1: torch.ones(2)},
        "f": None,
    }
    fresh = _study(tmp_path).rows("t", {"k": row}, lambda case: case)
    kept = _study(tmp_path).rows("t", {"k": row}, lambda case: case)
    assert fresh == kept
    del fresh[0]["seconds"]
    assert fresh == [{"a": [0, 1, 2], "b": 0.5, "c": [1, 2], "d": None, "e": {"1": [1, 1]}, "f": None}]
    json.loads((tmp_path / "data.json").read_text(), parse_constant=pytest.fail)


def test_things_are_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"weight": torch.arange(3), "losses": [1.5], "step": 7}

    first, again = (_study(tmp_path).once("seed 1/of two", make) for _ in range(2))
    assert made == [1]
    torch.testing.assert_close(first["weight"], again["weight"])
    assert (first["losses"], first["step"]) == (again["losses"], again["step"])


def test_half_a_thing_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while it is written: the next run makes it again."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", fail)
        _study(tmp_path).once("k", lambda: 1)
    assert not list((tmp_path / "work").iterdir())
    assert _study(tmp_path).once("k", lambda: 2) == 2


# ---- estimates ---------------------------------------------------------------------------------------------

_SETTINGS: dict[str, Any] = {"lr": 1e-3, "num_chains": 2, "num_draws": 8, "num_burnin": 4, "batch_size": 10}


def test_a_stopped_estimate_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stops the study, not only the estimate; the row is the one of an undisturbed run, and its file goes."""

    def measure(_: object, study: Study) -> dict[str, Any]:
        return {"llc": study.estimate("e", mlp(), data(), mse, **_SETTINGS).llc_mean}

    expected = _study(tmp_path / "a")
    rows = expected.rows("t", {"k": None}, lambda case: measure(case, expected))
    stopped = _study(tmp_path / "b")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 9)
        stopped.rows("t", {"k": None}, lambda case: measure(case, stopped))
    assert (tmp_path / "b" / "work" / "e.npz").exists() and not stopped.tables["t"]
    resumed = _study(tmp_path / "b")
    found = resumed.rows("t", {"k": None}, lambda case: measure(case, resumed))
    assert found[0]["llc"] == rows[0]["llc"]
    assert not (tmp_path / "b" / "work" / "e.npz").exists()


def test_a_stopped_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [mlp(seed=k).state_dict() for k in range(3)]
    expected = _study(tmp_path / "a").sweep("s", mlp(), states, data(), mse, **_SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 14)
        _study(tmp_path / "b").sweep("s", mlp(), states, data(), mse, **_SETTINGS)
    found = _study(tmp_path / "b").sweep("s", mlp(), states, data(), mse, **_SETTINGS)
    np.testing.assert_array_equal(found.llc_mean, expected.llc_mean)


def test_the_study_decides_seed_and_device(tmp_path: Path) -> None:
    results = [
        _study(tmp_path / str(seed), seed=seed).estimate("e", mlp(), data(), mse, **_SETTINGS) for seed in (0, 1)
    ]
    assert [r.settings["seed"] for r in results] == [0, 1]
    assert results[0].llc_mean != results[1].llc_mean
    own = _study(tmp_path / "own").estimate("e", mlp(), data(), mse, seed=1, **_SETTINGS)
    assert own.llc_mean == results[1].llc_mean


def test_what_is_kept_of_an_estimate(tmp_path: Path) -> None:
    result = _study(tmp_path).estimate("e", mlp(), data(), mse, **_SETTINGS)
    figures = frame.figures_of(result)
    assert (figures["llc"], figures["stderr"]) == (result.llc_mean, result.llc_stderr)
    assert figures["interval"] == list(result.interval()) and figures["warnings"] == result.warnings
    assert figures["gradients"] == result.loss_trace.size


# ---- folders -----------------------------------------------------------------------------------------------


def test_other_studies_are_refused(tmp_path: Path) -> None:
    """A folder is one experiment of one scale and seed, and what is no study is never overwritten."""
    _study(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run \(seed is 0, not 1\).*--restart"):
        _study(tmp_path, seed=1)
    with pytest.raises(ValueError, match="experiment is 'toy', not 'other'"):
        Study("other", "small", tmp_path)
    for content in ("no JSON", "[]", "{}"):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(ValueError, match="is not the data of an experiment"):
            _study(tmp_path)
        assert (tmp_path / "data.json").read_text() == content


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An experiment with one claim, that 2 + 2 is `module.claimed`."""
    module: Any = types.ModuleType("llc_fast.reproduce.toy", "What it does.")
    module.SCALES, module.claimed = {"small": 2, "paper": 3}, 4

    def measure(study: Study, settings: int) -> None:
        study.rows("sums", {"sum": settings}, lambda n: {"sum": n + n}, lambda row: f"sum {row['sum']}")

    def check(tables: frame.Tables, settings: int) -> list[Check]:
        found = tables["sums"]["sum"]["sum"]
        return [Check(f"the sum is {module.claimed}", str(found), found == module.claimed)]

    def draw(tables: frame.Tables, settings: int) -> dict[str, Any]:
        figure, axes = new_figure(2, 2)
        assert len(axes) == 4
        return {"toy": figure}

    module.measure, module.check, module.draw = measure, check, draw
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "toy", "a toy")
    yield module


def test_the_command(tmp_path: Path, toy: Any) -> None:
    """It says what came out, writes data and picture, exits with 1 if a claim fails, and measures nothing twice."""
    command = ["reproduce", "toy", "--output", str(tmp_path / "out")]
    result = _run(*command)
    assert result.exit_code == 0, result.output
    assert "holds  the sum is 4: 4" in _said(result) and "[sums 1/1] sum: sum 4" in _said(result)
    stored = json.loads((tmp_path / "out" / "data.json").read_text())
    assert stored["checks"] == [{"claim": "the sum is 4", "found": "4", "passed": True}]
    assert (stored["experiment"], stored["scale"], stored["seed"]) == ("toy", "small", 0)
    assert (tmp_path / "out" / "toy.png").read_bytes().startswith(PNG)
    toy.claimed = 5
    failed = _run(*command)
    assert failed.exit_code == 1 and "FAILS  the sum is 5: 4" in _said(failed) and "(kept)" in _said(failed)
    quiet = _run(*command, "--no-progress")
    assert "[sums" not in _said(quiet)


def test_another_scale_needs_a_restart(tmp_path: Path, toy: Any) -> None:
    command = ["reproduce", "toy", "--output", str(tmp_path)]
    assert _run(*command).exit_code == 0
    refused = _run(*command, "--scale", "paper")
    assert isinstance(refused.exception, ValueError) and "--restart" in str(refused.exception)
    toy.claimed = 6
    assert _run(*command, "--scale", "paper", "--restart").exit_code == 0


def test_restart_removes_nothing_else(tmp_path: Path, toy: Any) -> None:
    """A folder of the user's that holds no study stays as it is."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    _run("reproduce", "toy", "--output", str(tmp_path), "--restart")
    assert (tmp_path / "work" / "thesis.tex").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, toy: Any) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    toy.measure = stop
    result = _run("reproduce", "toy", "--output", str(tmp_path))
    assert result.exit_code == 130 and "the same command goes on" in _said(result)


def test_all_of_them(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder each; one that fails does not keep the others from being run."""
    for name in [n for n in reproduce.EXPERIMENTS if n != "toy"]:
        monkeypatch.delitem(reproduce.EXPERIMENTS, name)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "toy-2", "another")
    monkeypatch.setitem(sys.modules, "llc_fast.reproduce.toy_2", toy)
    toy.claimed = 5
    result = _run("reproduce", "all", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert (tmp_path / "toy" / "toy.png").exists() and (tmp_path / "toy-2" / "toy.png").exists()


def test_names_and_scales_are_told() -> None:
    listed = _said(_run("reproduce"))
    assert all(name in listed for name in reproduce.EXPERIMENTS)
    assert "is not one of all" in _said(_run("reproduce", "nothing"))
    assert "neither small nor paper" in _said(_run("reproduce", "ladder", "--scale", "huge"))
    with pytest.raises(ValueError, match="no experiment 'nothing'"):
        reproduce.load("nothing")
