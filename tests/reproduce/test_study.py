"""A study: rows that are measured once, estimates that resume, folders that are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import data, interrupted_after, mlp, mse

from llc_fast.reproduce.rows import Row, estimate_row
from llc_fast.reproduce.study import Study


def _study(folder: Path, **options: Any) -> Study:
    return Study("toy", "small", folder, **({"progress": False} | options))


# --- rows ---------------------------------------------------------------------------------------------------


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


# --- estimates ----------------------------------------------------------------------------------------------

_SETTINGS: dict[str, Any] = {"lr": 1e-3, "num_chains": 2, "num_draws": 8, "num_burnin": 4, "batch_size": 10}


def test_a_stopped_estimate_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stops the study, not only the estimate; the row is the one of an undisturbed run, and its file goes."""

    def measure(_: object, study: Study) -> dict[str, Any]:
        return {"llc": study.estimate("e", mlp(), data(), mse, **_SETTINGS).llc_mean}

    expected = _study(tmp_path / "a")
    rows = expected.rows("t", {"k": None}, lambda case: measure(case, expected))
    stopped = _study(tmp_path / "b")
    with interrupted_after(9), pytest.raises(KeyboardInterrupt):
        stopped.rows("t", {"k": None}, lambda case: measure(case, stopped))
    assert (tmp_path / "b" / "work" / "e.npz").exists() and not stopped.tables["t"]
    resumed = _study(tmp_path / "b")
    found = resumed.rows("t", {"k": None}, lambda case: measure(case, resumed))
    assert found[0]["llc"] == rows[0]["llc"]
    assert not (tmp_path / "b" / "work" / "e.npz").exists()


def test_a_stopped_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(folder: str) -> list[Row]:
        states = [mlp(seed=k).state_dict() for k in range(3)]
        return _study(tmp_path / folder).sweep("t", "s", mlp(), range(3), lambda: states, data(), mse, **_SETTINGS)

    expected = sweep("a")
    with interrupted_after(14), pytest.raises(KeyboardInterrupt):
        sweep("b")
    assert [row["llc"] for row in sweep("b")] == [row["llc"] for row in expected]
    with monkeypatch.context() as patch:
        patch.setattr("llc_fast.sweep_checkpoints", None)  # nothing is measured again
        assert [row["llc"] for row in sweep("b")] == [row["llc"] for row in expected]


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
    row = estimate_row(result)
    assert (row["llc"], row["stderr"]) == (result.llc_mean, result.llc_stderr)
    assert row["interval"] == list(result.interval()) and row["warnings"] == result.warnings
    assert row["codes"] == [warning.code for warning in result.warnings] and all(row["codes"])
    assert row["gradients"] == result.loss_trace.size


def test_rows_of_sweeps_are_those_of_estimates(tmp_path: Path) -> None:
    """The same names and numbers, whichever way a checkpoint was estimated; what belongs to a step comes along."""
    study, model = _study(tmp_path), mlp(seed=1)
    (one,) = study.rows(
        "one", {"e": None}, lambda _: estimate_row(study.estimate("e", model, data(), mse, **_SETTINGS))
    )
    (other,) = study.sweep(
        "all", "s", model, [7], lambda: [model.state_dict()], data(), mse, lambda step: {"half": step / 2}, **_SETTINGS
    )
    assert list(study.tables["all"]) == ["s, step 7"] and (other["step"], other["half"]) == (7, 3.5)
    same = set(one) & set(other) - {"seconds", "seconds_of_estimate"}
    assert {"llc", "stderr", "interval", "warnings", "codes", "r_hat", "ess", "lr"} <= same
    assert {name: one[name] for name in same} == {name: other[name] for name in same}


# --- folders ------------------------------------------------------------------------------------------------


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
