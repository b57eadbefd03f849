"""What experiments share: rows, resumption, claims, figures, and the command."""

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
from runs import data, interrupted_after, mlp, mse
from test_cli import _run, _said

from llc_fast import reproduce
from llc_fast.plots import new_figure
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim, Kind
from llc_fast.reproduce.rows import (
    Row,
    Tables,
    column,
    estimate_row,
    is_warned,
    plus_minus,
    quantile,
    relative_error,
    sizes,
)
from llc_fast.reproduce.run import SCALES, load, run_experiments
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
KINDS: tuple[Kind, ...] = ("ours", "published")
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
    """An experiment with one claim of `module.kind`, that 2 + 2 is `module.claimed`."""
    module: Any = types.ModuleType("llc_fast.reproduce.toy", "What it does.")
    module.SCALES, module.claimed, module.kind = {"small": 2, "paper": 3}, 4, "ours"

    def measure(study: Study, settings: int) -> None:
        study.rows("sums", {"sum": settings}, lambda n: {"sum": n + n}, lambda row: f"sum {row['sum']}")

    def claims(tables: Tables, settings: int) -> list[Claim]:
        found = tables["sums"]["sum"]["sum"]
        return [Claim(f"the sum is {module.claimed}", str(found), found == module.claimed, module.kind)]

    def plot(tables: Tables, settings: int) -> dict[str, Any]:
        figure, axes = new_figure(2, 2)
        assert len(axes) == 4
        return {"toy": figure}

    module.measure, module.claims, module.plot = measure, claims, plot
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "toy", "a toy")
    yield module


def test_the_command(tmp_path: Path, toy: Any) -> None:
    """It says what came out, writes data and figure, exits with 1 if a claim of ours fails, measures nothing twice."""
    command = ["reproduce", "toy", "--output", str(tmp_path / "out")]
    result = _run(*command)
    assert result.exit_code == 0, result.output
    assert "holds    the sum is 4: 4" in _said(result) and "[sums 1/1] sum: sum 4" in _said(result)
    stored = json.loads((tmp_path / "out" / "data.json").read_text())
    assert stored["claims"] == [{"text": "the sum is 4", "found": "4", "holds": True, "kind": "ours"}]
    assert (stored["experiment"], stored["scale"], stored["seed"]) == ("toy", "small", 0)
    assert (tmp_path / "out" / "toy.png").read_bytes().startswith(PNG)
    toy.claimed = 5
    failed = _run(*command)
    assert failed.exit_code == 1 and "FAILS    the sum is 5: 4" in _said(failed) and "(kept)" in _said(failed)
    quiet = _run(*command, "--no-progress")
    assert "[sums" not in _said(quiet)


def test_a_published_claim_that_does_not_hold_is_a_finding(tmp_path: Path, toy: Any) -> None:
    toy.claimed, toy.kind = 5, "published"
    result = _run("reproduce", "toy", "--output", str(tmp_path))
    assert result.exit_code == 0 and "finding  the sum is 5: 4" in _said(result)
    assert "1 published does not, which is a finding and no failure" in _said(result)
    toy.claimed = 4
    assert "holds    the sum is 4: 4" in _said(_run("reproduce", "toy", "--output", str(tmp_path)))


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
    monkeypatch.setattr("llc_fast.reproduce.run.EXPERIMENTS", {"toy": "a toy", "toy-2": "another"})
    monkeypatch.setitem(sys.modules, "llc_fast.reproduce.toy_2", toy)
    toy.claimed = 5
    result = _run("reproduce", "all", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert (tmp_path / "toy" / "toy.png").exists() and (tmp_path / "toy-2" / "toy.png").exists()


def test_outcomes(tmp_path: Path, toy: Any) -> None:
    """Without the command: what came out is returned, and said line by line."""
    toy.claimed, lines = 5, []
    (outcome,) = run_experiments("toy", output=tmp_path, progress=False, say=lines.append)
    assert (outcome.name, outcome.folder) == ("toy", tmp_path) and outcome.failed == outcome.claims
    assert lines[0] == "toy: a toy" and "0 of 1 claims hold; 1 of ours fails" in lines[2]


def test_unknown_names_and_scales() -> None:
    listed = _said(_run("reproduce"))
    assert all(name in listed for name in reproduce.EXPERIMENTS)
    for arguments, message in (
        (["nothing"], "name='nothing' is no experiment; choose one of: dln-scaling"),
        (["ladder", "--scale", "huge"], "scale='huge' is unknown; choose one of: small, paper"),
    ):
        refused = _run("reproduce", *arguments)
        assert isinstance(refused.exception, ValueError) and message in str(refused.exception)


def test_every_experiment_can_be_loaded() -> None:
    for name in reproduce.EXPERIMENTS:
        experiment = load(name)
        assert set(experiment.SCALES) == set(SCALES) and experiment.__doc__
        assert all(callable(part) for part in (experiment.measure, experiment.claims, experiment.plot))


# ---- what experiments share --------------------------------------------------------------------------------


def test_verdicts() -> None:
    verdicts = [Claim("c", "f", holds, kind).verdict for holds in (True, False) for kind in KINDS]
    assert verdicts == ["holds", "holds", "FAILS", "finding"]


def test_numbers_of_rows() -> None:
    rows = [{"llc": 1.0, "warnings": []}, {"llc": None, "warnings": ["diverged"]}]
    np.testing.assert_array_equal(column(rows, "llc"), [1.0, np.nan])
    np.testing.assert_array_equal(sizes([-0.5, None, 0.25]), [0.5, np.inf, 0.25])
    assert quantile(sizes([0.1, 0.3, None]), 0.5) == 0.3 and quantile(sizes([None, None]), 0.9) == np.inf
    assert [is_warned(row) for row in rows] == [False, True]
    assert np.isnan(relative_error(rows[1], 2.0)) and relative_error(rows[0], 2.0) == -0.5


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (40.8123, 0.2345, "40.81 ± 0.23"),
        (418.9, 12.3, "419 ± 12"),
        (0.2491, 0.0021, "0.2491 ± 0.0021"),
        (5.0, None, "5 ± ?"),
        (5.0, 0.0, "5 ± ?"),
        (None, None, "none"),
    ],
)
def test_values_with_their_errors(value: float | None, error: float | None, words: str) -> None:
    assert plus_minus(value, error) == words


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
