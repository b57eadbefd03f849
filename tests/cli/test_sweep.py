"""llc-fast sweep."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PNG, invoke, printed

import llc_fast
from llc_fast.cli.estimate import problem_of

pytest.importorskip("xarray")
PROBLEM = """
import torch

def problem():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return model, (x, model(x).detach()), torch.nn.functional.mse_loss

def fails():
    model, data, loss = problem()
    def loss_fn(output, target):
        if float(model[0].bias.detach()[0]) == 7.0:
            raise RuntimeError("the user's own")
        return loss(output, target)
    return model, data, loss_fn
"""
SHORT = ["--chains", "2", "--draws", "20", "--burnin", "8", "--batch-size", "50", "--lr", "1e-4", "--no-progress"]
SHORT += ["--localization", "10"]
STEPS = (1000, 500, 60)


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / f"problem_{tmp_path.name}.py"
    path.write_text(PROBLEM)
    return f"{path}:problem"


@pytest.fixture
def runs(tmp_path: Path, target: str) -> Path:
    """Three checkpoints of one training run, with a trainer's files beside."""
    model, _, _ = problem_of(target)
    for step in sorted(STEPS):
        folder = tmp_path / "runs" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        torch.save({"state": {}}, folder / "optimizer.pt")
    (tmp_path / "runs" / "trainer_state.json").write_text("{}")
    return tmp_path / "runs"


def _expected(target: str, runs: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_chains": 2, "num_draws": 20, "num_burnin": 8, "batch_size": 50, "lr": 1e-4}
    return llc_fast.sweep_checkpoints(
        *(problem_of(target)[0], runs, *problem_of(target)[1:]),
        **settings | {"localization": 10.0, "progress": False, "dim": "step"} | options,
    )


def _rows(path: Path, *arguments: str) -> list[dict[str, Any]]:
    done = invoke("sweep", *arguments, "--json", str(path), *SHORT)
    assert done.exit_code == 0, (printed(done), done.exception)
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_a_sweep_is_that_of_python(tmp_path: Path, target: str, runs: Path) -> None:
    """The numbers of `sweep_checkpoints`, whoever expands the pattern, as a table and in every file."""
    xarray, _ = pytest.importorskip("xarray"), pytest.importorskip("matplotlib")
    expected = _expected(target, runs)
    names = {ending: tmp_path / f"out.{ending}" for ending in ("nc", "csv", "png", "json")}
    files = ["--output", str(names["nc"]), "--plot", str(names["png"]), "--json", str(names["json"])]
    done = invoke("sweep", target, str(runs / "checkpoint-*"), *files, *SHORT)
    assert done.exit_code == 0, (printed(done), done.exception)
    lines = printed(done).splitlines()
    assert lines[0].split() == ["step", "λ̂", "±", "error", "95", "%", "interval", "L(w*)", "warnings"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        [str(step), f"{mean:.4g}"] for step, mean in zip(sorted(STEPS), expected.llc_mean.values, strict=True)
    ]
    assert names["png"].read_bytes().startswith(PNG)
    with xarray.open_dataset(names["nc"]) as found:
        assert list(found.step) == sorted(STEPS)
        np.testing.assert_array_equal(found.llc_mean, expected.llc_mean)
    rows = json.loads(names["json"].read_text())
    assert [row["step"] for row in rows] == sorted(STEPS)
    assert [row["llc_per_chain"] for row in rows] == expected.llc_per_chain.values.tolist()
    shell = sorted(map(str, runs.iterdir()))  # in alphabetical order, with the trainer's file
    for given in (shell, [str(runs)], [f"{runs}/checkpoint-[1-9]*"]):
        again = _rows(tmp_path / "again.json", target, *given)
        assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    _rows(tmp_path / "again.json", target, *shell, "--output", str(names["csv"]))
    with names["csv"].open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["llc_mean"]) for row in table] == expected.llc_mean.values.tolist()
    assert [row["warning_codes"] for row in table] == list(expected.warning_codes.values)


def test_options_reach_the_sweep(tmp_path: Path, target: str, runs: Path) -> None:
    """Those of estimates and of sweeps."""
    expected = _expected(target, runs, warm=False, seed=3, params=["0.*"], nbeta=20.0, labels=["a", "b", "c"])
    options = ["--no-warm", "--seed", "3", "--params", "0.*", "--nbeta", "20", "--labels", "a,b,c"]
    rows = _rows(tmp_path / "a.json", target, str(runs), *options)
    assert [row["llc_mean"] for row in rows] == expected.llc_mean.values.tolist()
    assert [row["step"] for row in rows] == ["a", "b", "c"] and not any(row["is_warm"] for row in rows)
    assert [row["step"] for row in _rows(tmp_path / "a.json", target, str(runs), "--labels", "0, 1.5, 2e3")] == [
        0,
        1.5,
        2e3,
    ]


def test_a_folder_keeps_what_is_finished(tmp_path: Path, target: str, runs: Path) -> None:
    """An error on the way: the table of what is finished is printed and written, and the same command goes on."""
    bad = runs / "checkpoint-1000" / "pytorch_model.bin"
    state = torch.load(bad)
    torch.save({**state, "0.bias": torch.full((4,), 7.0)}, bad)
    target = target.replace(":problem", ":fails")
    options = ["--folder", str(tmp_path / "kept"), "--json", str(tmp_path / "a.json"), *SHORT]
    done = invoke("sweep", target, str(runs), *options)
    assert isinstance(done.exception, RuntimeError) and str(done.exception).startswith("the user's own")
    assert "interrupted: 2 of 3 checkpoints" in printed(done)
    first = json.loads((tmp_path / "a.json").read_text())
    torch.save(state, bad)
    done = invoke("sweep", target, str(runs), *options)
    assert done.exit_code == 0, (printed(done), done.exception)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["step"] for row in rows] == sorted(STEPS)
    assert [row["llc_per_chain"] for row in rows[:2]] == [row["llc_per_chain"] for row in first]


def test_names_without_steps_need_labels(tmp_path: Path, target: str, runs: Path) -> None:
    """Then they are taken as they are given."""
    for name, step in (("b", 60), ("a", 500)):
        (runs / f"{name}.pt").write_bytes((runs / f"checkpoint-{step}" / "pytorch_model.bin").read_bytes())
    given = [str(runs / "b.pt"), str(runs / "a.pt")]
    done = invoke("sweep", target, *given, *SHORT)
    assert done.exit_code == 2 and "say no step" in printed(done)
    rows = _rows(tmp_path / "a.json", target, *given, "--labels", "x,y", "--no-warm")
    expected = _expected(target, runs, warm=False)
    assert [row["llc_mean"] for row in rows] == expected.llc_mean.values.tolist()[:2]


def test_one_checkpoint(tmp_path: Path, target: str, runs: Path) -> None:
    """A pattern that the shell expanded to one folder."""
    [row] = _rows(tmp_path / "a.json", target, str(runs / "checkpoint-60"))
    assert row["step"] == 60 and math.isfinite(row["llc_mean"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{runs}/nothing-*"], "matches no file or folder"),
        (["{runs}/nothing"], "does not exist"),
        (["{runs}", "--labels", "a,b"], "2 names for 3 checkpoints"),
        (["{runs}", "--output", "sweep.txt"], "must end in one of: .nc, .zarr, .csv"),
        (["{runs}", "--plot", "a.json", "--json", "a.json"], "must end in one of"),
        (["{runs}", "--output", "a.csv", "--json", "a.csv"], "is the file of --output too"),
        (["{runs}", "--sampler", "nothing"], "--sampler"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, target: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage errors, before the user's file is run."""
    monkeypatch.chdir(tmp_path)
    Path(target.rpartition(":")[0]).write_text("raise RuntimeError('it was run')")
    done = invoke("sweep", target, *(argument.format(runs=runs) for argument in arguments), *SHORT)
    assert done.exit_code == 2 and words in " ".join(printed(done).split()), printed(done)


def test_zarr(tmp_path: Path, target: str, runs: Path) -> None:
    """As a store, which is not written over."""
    xarray, _ = pytest.importorskip("xarray"), pytest.importorskip("zarr")
    rows = _rows(tmp_path / "a.json", target, str(runs), "--output", str(tmp_path / "a.zarr"))
    with xarray.open_zarr(tmp_path / "a.zarr") as found:
        assert found.llc_mean.values.tolist() == [row["llc_mean"] for row in rows]
    done = invoke("sweep", target, str(runs), "--output", str(tmp_path / "a.zarr"), *SHORT)
    assert done.exit_code == 2 and "is there already" in printed(done)


def test_files_of_objects_are_refused(tmp_path: Path, target: str, runs: Path) -> None:
    """Unless somebody says that they may run code."""
    model, _, _ = problem_of(target)
    torch.save(model, runs / "checkpoint-60" / "pytorch_model.bin")
    done = invoke("sweep", target, str(runs), *SHORT)
    assert isinstance(done.exception, ValueError) and "weights_only=False" in str(done.exception)
    assert len(_rows(tmp_path / "a.json", target, str(runs), "--no-weights-only")) == 3
