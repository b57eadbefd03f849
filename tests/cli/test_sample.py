"""llc-fast sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, printed

import llc_fast
from llc_fast.cli.estimate import problem_of

pytest.importorskip("zarr")
pytest.importorskip("xarray")
PROBLEM = """
import torch

def problem():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    data = x, model(x).detach()
    return model, data, torch.nn.functional.mse_loss, {"first": (data[0][:7], data[1][:7]), "some": (data, 1)}

def three():
    return problem()[:3]
"""
SHORT = ["--chains", "2", "--draws", "40", "--burnin", "20", "--batch-size", "50", "--lr", "1e-4", "--no-progress"]


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    path = tmp_path / f"problem_{tmp_path.name}.py"  # a name of its own: modules are imported once
    path.write_text(PROBLEM)
    return path


def test_samples_of_a_file(tmp_path: Path, problem_file: Path) -> None:
    """The store of `llc_fast.sample`, its estimate on the screen and as JSON; the same command opens it again."""
    store, numbers = tmp_path / "run.zarr", tmp_path / "out.json"
    command = ["sample", f"{problem_file}:problem", "--store", str(store), *SHORT, "--json", str(numbers)]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    wanted = ("model", "data", "loss_fn", "probes")
    model, data, loss_fn, probes = problem_of(f"{problem_file}:problem", wanted)
    options = {"num_chains": 2, "num_draws": 40, "num_burnin": 20, "batch_size": 50, "lr": 1e-4, "progress": False}
    expected = llc_fast.sample(model, data, loss_fn, probes=probes, **options)
    found = llc_fast.Samples.open(store)
    for name in ("first", "some"):
        np.testing.assert_array_equal(found.losses(name).values, expected.losses(name).values)
    assert found.llc().llc_mean == expected.llc().llc_mean == json.loads(numbers.read_text())["llc_mean"]
    assert expected.llc().summary().splitlines()[0] in done.output and "probes: first (7 samples)" in done.output
    assert invoke(*command).exit_code == 0


def test_a_function_without_probes(tmp_path: Path, problem_file: Path) -> None:
    done = invoke("sample", f"{problem_file}:three", "--store", str(tmp_path / "run.zarr"), *SHORT)
    assert done.exit_code == 2
    assert "three() must return (model, data, loss_fn, probes), got 3 values" in printed(done)
