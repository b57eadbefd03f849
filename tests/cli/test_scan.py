"""llc-fast scan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
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
"""
SHORT = ["--chains", "2", "--draws", "30", "--burnin", "20", "--batch-size", "50", "--lr", "1e-4", "--no-progress"]


@pytest.fixture
def where(tmp_path: Path) -> str:
    path = tmp_path / f"problem_{tmp_path.name}.py"
    path.write_text(PROBLEM)
    return f"{path}:problem"


@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
def test_a_grid(tmp_path: Path, where: str) -> None:
    """The numbers of `llc_fast.scan`, on the screen, as JSON, as a result to load and as a picture."""
    pytest.importorskip("matplotlib")
    values = ["--nbeta", "0", "--nbeta", "5", "--nbeta", "20", "--localization", "1", "--localization", "10"]
    paths = [str(tmp_path / name) for name in ("out.json", "out.nc", "out.png")]
    done = invoke("scan", where, *SHORT, *values, "--json", paths[0], "--save", paths[1], "--plot", paths[2], "--fit")
    assert done.exit_code == 0, done.output
    model, data, loss_fn = problem_of(where)
    expected = llc_fast.scan(
        model,
        data,
        loss_fn,
        nbeta=[0, 5, 20],
        localization=[1, 10],
        lr=1e-4,
        num_chains=2,
        num_draws=30,
        num_burnin=20,
        batch_size=50,
        progress=False,
    )
    text = printed(done)
    assert expected.summary() in text
    assert "γ = 1: nbeta must have five different temperatures at least, got 2" in text
    numbers = json.loads(Path(paths[0]).read_text())
    assert numbers["llc_mean"] == expected.dataset["llc_mean"].values.tolist()
    assert numbers["nbeta"] == [0, 5, 20] and numbers["dims"] == ["nbeta", "localization"]
    assert numbers["lr"][0] == [None, None] and numbers["plateau_reason"] == expected.plateau_reason
    assert set(numbers["fits"]) == {"1", "10"}
    loaded = llc_fast.ScanResult.load(paths[1])
    np.testing.assert_array_equal(loaded.dataset["llc_mean"], expected.dataset["llc_mean"])
    assert Path(paths[2]).read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
def test_a_path_and_its_fit(tmp_path: Path, where: str) -> None:
    """Pairs; five nβ can be fitted; and a folder keeps the cells."""
    nbetas = [argument for k in range(5) for argument in ("--nbeta", str(5 * 2**k))]
    options = [*nbetas, "--localization", "0.1", "--path", "--fit", "--folder", str(tmp_path / "cells"), "--json"]
    done = invoke("scan", where, *SHORT, *options)
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["dims"] == ["cell"] and len(numbers["llc_mean"]) == 5
    fit = numbers["fits"]["0.1"]
    assert fit["multiplicity"] in (1, 2, 3) and fit["stderr"] > 0 and sum(fit["probabilities"].values()) > 0.999
    assert len(list((tmp_path / "cells").glob("*.npz"))) >= 5


def test_usage_errors(where: str) -> None:
    done = invoke("scan", where, "--sampler", "none-such")
    assert done.exit_code == 2 and "--sampler" in printed(done)
    error = invoke("scan", where, *SHORT, "--nbeta", "-1").exception
    assert isinstance(error, ValueError) and "nbeta must be" in str(error)
