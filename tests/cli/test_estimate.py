"""llc-fast estimate."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PNG, invoke, printed

import llc_fast
from llc_fast.cli.estimate import problem_of, sampler_of

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
    """The numbers of `estimate_llc`, on the screen, as JSON, as a result to load, as a picture and as a page."""
    pytest.importorskip("matplotlib")
    paths = [str(tmp_path / name) for name in ("out.json", "out.npz", "out.png", "out.html")]
    options = ["--json", paths[0], "--save", paths[1], "--plot", paths[2], "--report", paths[3]]
    options += ["--lr", "1e-4", "--localization", "10"]
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
    page = Path(paths[3]).read_text(encoding="utf-8")
    assert f"<title>{problem_file}:problem</title>" in page and f"λ̂ = {expected.llc_mean:.4g}" in page
    assert f"report written to {paths[3]}" in done.output


def test_estimate_of_some_parameters(tmp_path: Path, problem_file: Path) -> None:
    path = tmp_path / "out.json"
    done = invoke(
        "estimate", f"{problem_file}:problem", *SHORT, "--params", "0.*", "--params", "2.bias", "--json", str(path)
    )
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["settings"]["num_parameters"] == 12 + 4 + 1


def test_the_metric_of_the_curvature(problem_file: Path) -> None:
    options = ["--preconditioner", "curvature", "--lr", "1e-4"]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, *options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    model, data, loss_fn = problem_of(f"{problem_file}:problem")
    expected = llc_fast.estimate_llc(
        model, data, loss_fn, preconditioner="curvature", num_chains=2, num_draws=40, num_burnin=20, batch_size=50,
        lr=1e-4, progress=False,
    )  # fmt: skip
    assert found["llc_mean"] == expected.llc_mean
    assert found["settings"]["preconditioner"] == "curvature"
    assert found["settings"]["localization_metric"] == "sampler"
    options += ["--localization-metric", "euclidean"]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, *options, "--json")
    assert json.loads(done.stdout)["settings"]["localization_metric"] == "euclidean"


def test_options_of_the_sampler_and_of_execution(tmp_path: Path, problem_file: Path) -> None:
    """The numbers of `estimate_llc` with a sampler object and an Execution."""
    options = ["--sampler", "RMSprop SGLD", "--sampler-option", "eps=1e-2", "--sampler-option", "relative-eps=true"]
    options += ["--strategy", "sequential", "--autocast", "bfloat16", "--lr", "1e-4", "--localization", "10"]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, *options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    model, data, loss_fn = problem_of(f"{problem_file}:problem")
    expected = llc_fast.estimate_llc(
        model,
        data,
        loss_fn,
        sampler=llc_fast.samplers.RMSpropSGLDSampler(eps=1e-2, relative_eps=True),
        num_chains=2,
        num_draws=40,
        num_burnin=20,
        batch_size=50,
        lr=1e-4,
        localization=10.0,
        execution=llc_fast.Execution(strategy="sequential", autocast=torch.bfloat16),
        progress=False,
    )
    assert found["llc_mean"] == expected.llc_mean
    assert found["settings"]["sampler"] == "rmsprop-sgld" and found["settings"]["eps"] == 1e-2
    assert found["settings"]["strategy"] == "sequential" and found["settings"]["relative_eps"] is True


def test_preset(problem_file: Path) -> None:
    """Its values, and those that are given beside it."""
    options = ["--preset", "language-model", "--localization", "20", "--lr", "1e-4"]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, *options, "--json")
    found = json.loads(done.stdout)
    assert (found["nbeta"], found["settings"]["localization"]) == (30.0, 20.0)
    refused = invoke("estimate", f"{problem_file}:problem", *SHORT, "--preset", "vision")
    assert "preset='vision' is unknown" in str(refused.exception)


def test_other_loss_and_a_better_minimum(problem_file: Path) -> None:
    """The problem's loss gives way to a named one; refining says what it did."""
    options = ["--lr", "1e-4", "--json"]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, "--loss", "behavioral-mse", *options)
    found = json.loads(done.stdout)
    assert found["settings"]["loss_fn"] == "behavioral-mse" and found["init_loss"] == 0
    found = json.loads(invoke("estimate", f"{problem_file}:problem", *SHORT, "--refine", *options).stdout)
    assert found["settings"]["refine"] is True and found["diagnostics"]["refine_passes"] > 0
    refused = invoke("estimate", f"{problem_file}:problem", *SHORT, "--loss", "l1")
    assert "behavioral" in str(refused.exception)


def test_json_before_the_problem(problem_file: Path) -> None:
    """What follows --json is no file for the numbers if the problem would be missing."""
    done = invoke("estimate", *SHORT, "--lr", "1e-4", "--json", f"{problem_file}:problem")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["lr"] == 1e-4
    assert [path.name for path in problem_file.parent.iterdir() if path.suffix == ".py"] == [problem_file.name]
    refused = invoke("estimate", "--json", "--lr", "1e-4")
    assert refused.exit_code == 2 and "Missing argument" in printed(refused)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("num_leapfrog=7", {"num_leapfrog": 7}),
        ("jitter=0", {"jitter": 0}),
        ("adapt_steps=None", {"adapt_steps": None}),
        ("preconditioner=2.5", {"preconditioner": 2.5}),
    ],
)
def test_values_of_options(text: str, value: dict[str, Any]) -> None:
    assert sampler_of("HMC", [text]) == llc_fast.samplers.HMCSampler(**value)
    assert sampler_of("adam-sgld", ["betas=(0.8, 0.9)"]) == llc_fast.samplers.AdamSGLDSampler(betas=(0.8, 0.9))
    assert sampler_of("sgld", []) == "sgld" and sampler_of(None, []) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sampler", "sgldd"], ["--sampler", "did you mean 'sgld'?"]),
        (["--sampler-option", "eps=1"], ["--sampler-option", "needs --sampler"]),
        (["--sampler", "sgld", "--sampler-option", "eps=1"], ["--sampler-option", "has no option eps"]),
        (["--sampler", "rmsprop-sgld", "--sampler-option", "eps"], ["'eps' is not NAME=VALUE"]),
        (["--sampler", "rmsprop-sgld", "--sampler-option", "eps=wide"], ["eps must be a number"]),
        (["--sampler", "rmsprop-sgld", "--sampler-option", "eps=-1"], ["--sampler-option", "eps"]),
        (["--autocast", "int8"], ["--autocast", "'int8' is not bfloat16"]),
        (["--autocast", "no_grad"], ["--autocast", "'no_grad' is not bfloat16"]),
        (["--microbatch-size", "0"], ["--microbatch-size"]),
    ],
)
def test_wrong_options_are_found_before_the_file_is_read(
    problem_file: Path, arguments: list[str], said: list[str]
) -> None:
    problem_file.write_text("raise AssertionError('the file was imported')")
    done = invoke("estimate", f"{problem_file}:problem", *arguments)
    assert done.exit_code == 2
    for words in said:
        assert words in printed(done)


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


# ---- files as people write them ----------------------------------------------------------------------------

_SEES = """
import argparse, dataclasses, pickle, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
epochs = parser.parse_args().epochs
import beside_it
import torch

@dataclasses.dataclass
class Data:
    "Of this very module."
    x: int

assert pickle.loads(pickle.dumps(Data(3))) == Data(3)
assert __name__ != "__main__" and Path(__file__).is_absolute()
assert sys.path[0] == str(Path(__file__).parent)

def problem():
    assert parser.parse_args().epochs == epochs == 3
    seen = Path(beside_it.__file__).with_name("seen")
    seen.write_text(" ".join(sys.argv))
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    return torch.nn.Linear(3, 1), (x, x.sum(1, keepdim=True)), torch.nn.functional.mse_loss
"""


@pytest.mark.parametrize("name", ["random.py", "statistics.py", "numbers.py", "my problem.py", "a.b.py", "problem.txt"])
def test_a_file_sees_what_it_would_see_if_it_were_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its own path as the only argument, its folder first in sys.path, modules beside it; and whatever it is called,
    the module of that name in Python's library is still the one that others import."""
    stem = Path(name).stem
    library = sys.modules.get(stem)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.argv", before := ["llc-fast", "estimate", "--lr", "1"])
    Path(name).write_text(_SEES)
    Path("beside_it.py").write_text("")
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    problem_of(f"{name}:problem")
    assert sys.argv is before
    assert Path("seen").read_text() == name
    assert library is None or importlib.import_module(stem) is library
    assert not {p.name for p in tmp_path.iterdir()} - {name, "beside_it.py", "seen", "__pycache__"}


@pytest.mark.parametrize("code", ["raise KeyError('weights')", "import sys; sys.argv.append('x'); 1 / 0", "def f(:"])
def test_arguments_come_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("sys.argv", before := ["llc-fast", "estimate"])
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "fails.py").write_text(code)
    with pytest.raises((KeyError, ZeroDivisionError, SyntaxError)):
        problem_of(f"{tmp_path / 'fails.py'}:problem")
    assert sys.argv is before and before == ["llc-fast", "estimate"]


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's mistake in one place, and a traceback where the module itself imports what is not there."""
    monkeypatch.setattr("sys.path", list(sys.path))
    done = invoke("estimate", "no.such.module:problem")
    assert done.exit_code == 2 and "there is no module no" in printed(done)


def test_the_program_itself(tmp_path: Path) -> None:
    """In a process of its own, with a file that parses arguments, is called like a module and changes its folder."""
    (tmp_path / "random.py").write_text(_SEES + "\nimport os\nos.chdir('elsewhere')\n")
    (tmp_path / "beside_it.py").write_text("")
    (tmp_path / "elsewhere").mkdir()
    script = f"import sys; sys.path.insert(0, {str(Path(llc_fast.__file__).parents[1])!r}); sys.argv[0] = 'llc-fast'; "
    script += "from llc_fast.cli.app import main; main()"
    options = ["--lr", "1e-3", *SHORT, "--json", "out.json", "--save", "out.npz", "--checkpoint", "run"]
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", script]
    done = subprocess.run(
        [*command, "estimate", "random.py:problem", *options], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {"out.json", "out.npz", "run"} <= {p.name for p in tmp_path.iterdir()}
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ---- output files ------------------------------------------------------------------------------------------

_OPTIONS = ["--json", "--save", "--plot", "--report", "--checkpoint"]


@pytest.mark.parametrize("option", _OPTIONS)
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "no folder", "a long name", "a circle"])
def test_output_files_are_tried_before_the_run(tmp_path: Path, problem_file: Path, option: str, kind: str) -> None:
    """What can't be written to is a usage error, before the user's file is even read; nothing is made or lost."""
    pytest.importorskip("matplotlib")
    problem_file.write_text("raise AssertionError('the file was imported')")
    ending = "html" if option == "--report" else "png"
    path = tmp_path / f"out.{ending}"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/null")
    elif kind == "a circle":
        path.symlink_to(path.name)
    else:
        path = tmp_path / ("x" * 252 + f".{ending}" if kind == "a long name" else f"nowhere/out.{ending}")
    before = sorted(p.name for p in tmp_path.iterdir())
    done = invoke("estimate", f"{problem_file}:problem", option, str(path))
    assert done.exit_code == 2, done.output
    assert option in printed(done)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", _OPTIONS)
def test_old_files_stay_until_there_are_new_ones(tmp_path: Path, problem_file: Path, option: str) -> None:
    """Trying a path does not empty the file that is there."""
    pytest.importorskip("matplotlib")
    problem_file.write_text("def problem(): raise KeyError('weights')")
    path = tmp_path / ("out.html" if option == "--report" else "out.png")
    path.write_text("old")
    assert invoke("estimate", f"{problem_file}:problem", option, str(path)).exit_code == 1
    assert path.read_text() == "old" and {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {
        path.name,
        problem_file.name,
    }


def test_a_report_is_html(tmp_path: Path, problem_file: Path) -> None:
    """Another ending is a mistake that is said before the run."""
    pytest.importorskip("matplotlib")
    done = invoke("estimate", f"{problem_file}:problem", "--report", str(tmp_path / "out.pdf"))
    assert done.exit_code == 2 and "must end in .html" in printed(done)


def test_two_outputs_in_one_file_are_refused(tmp_path: Path, problem_file: Path) -> None:
    """One would overwrite the other, or the user's own program."""
    problem, path = f"{problem_file}:problem", str(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    for given in (["--json", path, "--save", path], ["--checkpoint", str(tmp_path / "link"), "--save", path]):
        done = invoke("estimate", problem, *given)
        assert done.exit_code == 2 and "is the file of" in printed(done)
    done = invoke("estimate", problem, "--save", str(problem_file))
    assert done.exit_code == 2 and "is the file of PROBLEM too" in printed(done)
    assert problem_file.read_text() == PROBLEM


def test_one_output_that_fails_does_not_lose_the_others(
    tmp_path: Path, problem_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that became full during the run: a line for what could not be written, and exit status 1."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llc_fast.result.LLCResult.save", full)
    options = ["--lr", "1e-4", "--save", str(tmp_path / "out.npz"), "--json", str(tmp_path / "out.json")]
    done = invoke("estimate", f"{problem_file}:problem", *SHORT, *options)
    assert done.exit_code == 1 and "λ̂ =" in done.output
    assert re.search(r"result could not be written to .*out.npz: No space left on device", printed(done))
    assert json.loads((tmp_path / "out.json").read_text())["llc_mean"]
