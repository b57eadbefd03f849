"""The command, from end to end."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import PNG, invoke, printed

from llc_fast import reproduce
from llc_fast.plots import new_figure
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.run import SCALES, load, run_experiments
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")


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
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "holds    the sum is 4: 4" in printed(result) and "[sums 1/1] sum: sum 4" in printed(result)
    stored = json.loads((tmp_path / "out" / "data.json").read_text())
    assert stored["claims"] == [{"text": "the sum is 4", "found": "4", "holds": True, "kind": "ours"}]
    assert (stored["experiment"], stored["scale"], stored["seed"]) == ("toy", "small", 0)
    assert (tmp_path / "out" / "toy.png").read_bytes().startswith(PNG)
    toy.claimed = 5
    failed = invoke(*command)
    assert failed.exit_code == 1 and "FAILS    the sum is 5: 4" in printed(failed) and "(kept)" in printed(failed)
    quiet = invoke(*command, "--no-progress")
    assert "[sums" not in printed(quiet)


def test_a_published_claim_that_does_not_hold_is_a_finding(tmp_path: Path, toy: Any) -> None:
    toy.claimed, toy.kind = 5, "published"
    result = invoke("reproduce", "toy", "--output", str(tmp_path))
    assert result.exit_code == 0 and "finding  the sum is 5: 4" in printed(result)
    assert "1 published does not, which is a finding and no failure" in printed(result)
    toy.claimed = 4
    assert "holds    the sum is 4: 4" in printed(invoke("reproduce", "toy", "--output", str(tmp_path)))


def test_another_scale_needs_a_restart(tmp_path: Path, toy: Any) -> None:
    command = ["reproduce", "toy", "--output", str(tmp_path)]
    assert invoke(*command).exit_code == 0
    refused = invoke(*command, "--scale", "paper")
    assert isinstance(refused.exception, ValueError) and "--restart" in str(refused.exception)
    toy.claimed = 6
    assert invoke(*command, "--scale", "paper", "--restart").exit_code == 0


@pytest.mark.parametrize("data", [None, "{}", '{"tables": 3}', "[1]", "no JSON"])
def test_restart_removes_nothing_else(tmp_path: Path, toy: Any, data: str | None) -> None:
    """A folder of the user's that holds no study stays as it is, also if there is a data.json in it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    if data is not None:
        (tmp_path / "data.json").write_text(data)
    invoke("reproduce", "toy", "--output", str(tmp_path), "--restart")
    assert (tmp_path / "work" / "thesis.tex").exists()
    if data is not None:
        assert (tmp_path / "data.json").read_text() == data


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, toy: Any) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    toy.measure = stop
    result = invoke("reproduce", "toy", "--output", str(tmp_path))
    assert result.exit_code == 130 and "the same command goes on" in printed(result)


def test_all_of_them(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder each; one that fails does not keep the others from being run."""
    monkeypatch.setattr("llc_fast.reproduce.run.EXPERIMENTS", {"toy": "a toy", "toy-2": "another"})
    monkeypatch.setitem(sys.modules, "llc_fast.reproduce.toy_2", toy)
    toy.claimed = 5
    result = invoke("reproduce", "all", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert (tmp_path / "toy" / "toy.png").exists() and (tmp_path / "toy-2" / "toy.png").exists()


def test_outcomes(tmp_path: Path, toy: Any) -> None:
    """Without the command: what came out is returned, and said line by line."""
    toy.claimed, lines = 5, []
    (outcome,) = run_experiments("toy", output=tmp_path, progress=False, say=lines.append)
    assert (outcome.name, outcome.folder) == ("toy", tmp_path) and outcome.failed == outcome.claims
    assert lines[0] == "toy: a toy" and "0 of 1 claims hold; 1 of ours fails" in lines[2]


def test_outcomes_as_json(tmp_path: Path, toy: Any) -> None:
    """One document on stdout, with the claims; what people read is on stderr."""
    result = invoke("reproduce", "toy", "--output", str(tmp_path), "--json")
    (outcome,) = json.loads(result.stdout)
    assert (outcome["name"], outcome["folder"]) == ("toy", str(tmp_path))
    assert set(outcome["claims"][0]) == {"text", "found", "holds", "kind"}
    assert "toy: a toy" in result.stderr
    assert json.loads(invoke("reproduce", "--json").stdout).keys() == reproduce.EXPERIMENTS.keys()


def test_unknown_names_and_scales() -> None:
    listed = printed(invoke("reproduce"))
    assert all(name in listed for name in reproduce.EXPERIMENTS)
    for arguments, message in (
        (["nothing"], "name='nothing' is no experiment; choose one of: dln-scaling"),
        (["ladder", "--scale", "huge"], "scale='huge' is unknown; choose one of: small, paper, hours"),
        (["ladder", "--scale", "hours"], "scale='hours' is none of ladder's; choose one of: small, paper"),
    ):
        refused = invoke("reproduce", *arguments)
        assert isinstance(refused.exception, ValueError) and message in str(refused.exception)


def test_every_experiment_can_be_loaded() -> None:
    for name in reproduce.EXPERIMENTS:
        experiment = load(name)
        assert {"small", "paper"} <= set(experiment.SCALES) <= set(SCALES) and experiment.__doc__
        assert all(callable(part) for part in (experiment.measure, experiment.claims, experiment.plot))
