"""llc-fast estimate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import PNG, invoke, printed

import llc_fast
from llc_fast.cli.estimate import problem_of

PROBLEM = """
import torch

def problem():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return model, (x, model(x).detach()), torch.nn.functional.mse_loss

def wrong():
    return torch.nn.Linear(1, 1)

number = 3
"""
SHORT = ["--chains", "2", "--draws", "40", "--burnin", "20", "--batch-size", "50", "--no-progress"]


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    path = tmp_path / f"problem_{tmp_path.name}.py"  # a name of its own: modules are imported once
    path.write_text(PROBLEM)
    return path


def test_estimate_of_a_file(tmp_path: Path, problem_file: Path) -> None:
    """The numbers of `estimate_llc`, on the screen, as JSON, as a result to load and as a picture."""
    pytest.importorskip("matplotlib")
    paths = [str(tmp_path / name) for name in ("out.json", "out.npz", "out.png")]
    options = ["--json", paths[0], "--save", paths[1], "--plot", paths[2], "--lr", "1e-4", "--localization", "10"]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, *options)
    assert done.exit_code == 0, done.output
    model, data, loss_fn = problem_of(f"{problem_file}:problem")
    expected = llc_fast.estimate_llc(
        model,
        data,
        loss_fn,
        num_chains=2,
        num_draws=40,
        num_burnin=20,
        batch_size=50,
        lr=1e-4,
        localization=10.0,
        progress=False,
    )
    assert expected.summary().splitlines()[0] in done.output
    numbers = json.loads(Path(paths[0]).read_text())
    assert numbers["llc_mean"] == expected.llc_mean and numbers["warnings"] == expected.warnings
    assert llc_fast.LLCResult.load(paths[1]).llc_mean == expected.llc_mean
    assert Path(paths[2]).read_bytes().startswith(PNG)


def test_estimate_of_some_parameters(tmp_path: Path, problem_file: Path) -> None:
    path = tmp_path / "out.json"
    done = invoke(
        "estimate", f"{problem_file}:problem", *SHORT, "--params", "0.*", "--params", "2.bias", "--json", str(path)
    )
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["settings"]["num_parameters"] == 12 + 4 + 1


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("{file}", "is not FILE.py:FUNCTION"),
        ("nowhere.py:problem", "there is no file nowhere.py"),
        ("{file}:other", "has no function 'other'"),
        ("{file}:number", "has no function 'number'"),
        ("{file}:wrong", "must return (model, data, loss_fn), got Linear"),
    ],
)
def test_what_is_no_problem_is_refused(problem_file: Path, where: str, said: str) -> None:
    done = invoke("estimate", where.format(file=problem_file))
    assert done.exit_code == 2
    assert said.replace(" ", "") in re.sub(r"[\s│]", "", printed(done))
