"""The command line, and the deep linear networks that it estimates."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import llc_fast
from llc_fast import theory
from llc_fast.cli import app, networks
from llc_fast.cli.estimate import problem_of
from llc_fast.problems import deep_linear

COLUMNS = {
    "parameters",
    "widths",
    "rank",
    "lambda_true",
    "llc_mean",
    "llc_stderr",
    "rel_error",
    "seconds",
    "steps",
}
PNG = b"\x89PNG\r\n\x1a\n"


def _run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app.make_app(), list(arguments))


def _said(result: Result) -> str:
    """What was printed, without colours, which typer uses on some continuous integration machines."""
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def _rows(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that `dln` writes with these arguments."""
    result = _run("dln", "--no-progress", "--json", str(path), *arguments)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


# --- info ---------------------------------------------------------------------------------------------------


def test_info() -> None:
    """Versions and the code that will run, one fact a line."""
    result = _run("info")
    assert result.exit_code == 0
    for words in (llc_fast.__version__, torch.__version__, "instruction_set", "threads", "backend"):
        assert words in result.output


def test_info_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that can't be imported is what the report is about: the rest is printed, and the exit status is 1."""
    monkeypatch.setitem(sys.modules, "torch", None)
    result = _run("info")
    assert result.exit_code == 1
    for words in (llc_fast.__version__, "instruction_set", "torch_error", "import of torch halted"):
        assert words in result.output


def test_info_as_json() -> None:
    """Valid JSON and nothing else, with the facts that a bug report needs."""
    result = _run("info", "--json")
    facts = json.loads(result.output)
    assert result.exit_code == 0
    assert facts["llc_fast"] == llc_fast.__version__ and facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["instruction_set"] in facts["backend"]
    assert set(facts) >= {"python", "platform", "cuda", "torch_cuda", "openmp", "philox_rounds", "gpus"}
    assert isinstance(facts["gpus"], list)


# --- dln ----------------------------------------------------------------------------------------------------


def test_dln_writes_rows_and_a_picture(tmp_path: Path) -> None:
    """One row a network in the JSON file and on the screen, a median error, a PNG."""
    pytest.importorskip("matplotlib")
    arguments = ["--networks", "3", "--steps", "60", "--chains", "2", "--seed", "1"]
    result = _run(
        "dln",
        "--no-progress",
        *arguments,
        "--json",
        str(tmp_path / "rows.json"),
        "--plot",
        str(tmp_path / "plot.png"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3 and (tmp_path / "plot.png").read_bytes().startswith(PNG)
    for seed, row in enumerate(rows, start=1):
        problem = deep_linear.make_problem("1k", seed)
        assert set(row) >= COLUMNS
        assert row["parameters"] == sum(a * b for a, b in zip(row["widths"], row["widths"][1:], strict=False))
        assert (row["widths"], row["rank"]) == (list(problem.widths), problem.rank)
        assert row["lambda_true"] == pytest.approx(theory.deep_linear(problem.widths, problem.rank).value)
        assert row["rel_error"] == pytest.approx((row["llc_mean"] - row["lambda_true"]) / row["lambda_true"])
        assert row["llc_stderr"] > 0 and row["seconds"] > 0 and row["steps"] == 120
        assert f"{row['llc_mean']:.2f} ± {row['llc_stderr']:.2f}" in result.output
    errors = sorted(abs(row["rel_error"]) for row in rows)
    assert f"over 3 networks: {100 * errors[1]:.1f} %" in result.output


def test_dln_repeats_itself(tmp_path: Path) -> None:
    """Network k is a function of seed + k: the same alone or among others, here or in another run."""
    several = _rows(tmp_path / "several.json", "--networks", "2", "--steps", "20", "--seed", "3")
    (alone,) = _rows(tmp_path / "alone.json", "--networks", "1", "--steps", "20", "--seed", "4")
    for row in (*several, alone):
        del row["seconds"]
    assert several[1] == alone != several[0]


def test_dln_of_another_class(tmp_path: Path) -> None:
    """--size chooses the class; its name and its steps are in the row."""
    (row,) = _rows(tmp_path / "rows.json", "--size", "10k", "--networks", "1", "--steps", "10", "--seed", "2")
    assert row["size"] == "10k" and row["steps"] == 20
    assert row["parameters"] == deep_linear.make_problem("10k", 2).num_parameters


def test_dln_steps_default_to_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --steps a chain is as long as its class says."""
    shorter = dataclasses.replace(deep_linear.SIZE_CLASSES["1k"], num_steps=30, num_samples=2000)
    monkeypatch.setitem(deep_linear.SIZE_CLASSES, "1k", shorter)
    (row,) = _rows(tmp_path / "rows.json", "--networks", "1", "--chains", "3", "--paper")
    assert row["steps"] == 90


def test_dln_counts_the_pilots_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated estimates say what they took in all: at most a fifth more than the chains themselves."""
    monkeypatch.setattr(networks, "CALIBRATED_STEPS", 400)
    (row,) = _rows(tmp_path / "rows.json", "--networks", "1", "--chains", "3")
    assert 1200 < row["steps"] <= 1440


def test_what_can_not_be_estimated_is_null(tmp_path: Path) -> None:
    """Too few draws for an error bar: null, since NaN is no JSON; the screen says nan."""
    path = tmp_path / "rows.json"
    (row,) = _rows(path, "--paper", "--networks", "1", "--chains", "1", "--steps", "10")
    assert row["llc_stderr"] is None and math.isfinite(row["llc_mean"])
    assert "NaN" not in path.read_text()


def test_lost_estimates_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every chain is lost, the row has null and the warning, and the run and its picture go on."""
    pytest.importorskip("matplotlib")
    wild = dataclasses.replace(deep_linear.SIZE_CLASSES["1k"], lr=1e3, num_samples=2000)
    monkeypatch.setitem(deep_linear.SIZE_CLASSES, "1k", wild)
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["--paper", "--networks", "2", "--steps", "50", "--json", str(rows), "--plot", str(plot)]
    result = _run("dln", "--no-progress", *arguments)
    assert result.exit_code == 0, result.output
    for row in json.loads(rows.read_text()):
        assert row["llc_mean"] is None and row["rel_error"] is None
        assert any("non-finite" in w for w in row["warnings"])
    assert "warning: " in result.output and "median" not in result.output
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "2k"], ["--size", "'2k'", "1k, 10k, 1M, 10M, 30M, 100M"]),
        (["--networks", "0"], ["--networks"]),
        (["--steps", "9"], ["--steps"]),
        (["--chains", "0"], ["--chains"]),
        (["--seed", "-1"], ["--seed"]),
        (["--chains", "two"], ["--chains"]),
        (["--colour", "red"], ["--colour"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_wrong_arguments(arguments: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A usage error (exit status 2) that names the option, before any network is made."""
    monkeypatch.setattr(deep_linear, "make_problem", lambda *_: pytest.fail("a network was made"))
    result = _run("dln", *arguments)
    assert result.exit_code == 2
    for words in said:
        assert words in _said(result)


def test_help() -> None:
    """Without a command the commands are listed."""
    result = _run()
    listed = re.findall(r"^│ ([a-z]+) ", _said(result), re.MULTILINE)
    assert listed == ["bench", "demo", "dln", "estimate", "info", "reproduce"]


def test_help_waits_for_nothing() -> None:
    """The commands, and what is known of the machine without torch, need no package that takes long to import."""
    script = """
import sys, llc_fast.cli.app as app, llc_fast.cli.info as info
sys.argv = ["llc-fast", "--help"]
try:
    app.main()
except SystemExit as done:
    assert not done.code, done.code
info.installed()
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "estimate" in done.stdout and {"typer", "llc_fast"} <= imported
    assert not imported & {"torch", "numpy", "scipy", "tqdm", "matplotlib", "pandas", "xarray", "arviz", "sklearn"}


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo estimates nine networks of two classes and leaves one picture in the working folder."""
    pytest.importorskip("matplotlib")
    for size, settings in list(deep_linear.SIZE_CLASSES.items()):
        monkeypatch.setitem(deep_linear.SIZE_CLASSES, size, dataclasses.replace(settings, num_samples=2000))
    monkeypatch.setattr(networks, "CALIBRATED_STEPS", 20)
    monkeypatch.chdir(tmp_path)
    result = _run("demo", "--no-progress", "--json", "rows.json")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("rows.json").read_text())
    assert [row["size"] for row in rows] == ["1k"] * 6 + ["10k"] * 3
    assert {p.name for p in tmp_path.iterdir()} == {"llc_fast_demo.png", "rows.json"}
    assert Path("llc_fast_demo.png").read_bytes().startswith(PNG)


# --- main ---------------------------------------------------------------------------------------------------


def _main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of the program with these arguments."""
    monkeypatch.setattr("sys.argv", ["llc-fast", *arguments])
    monkeypatch.setenv("COLUMNS", "400")  # so that no message is wrapped
    with pytest.raises(SystemExit) as caught:
        app.main()
    status = caught.value.code
    assert isinstance(status, int)
    return status


def _assert_one_line(capfd: pytest.CaptureFixture[str], *said: str) -> None:
    err = capfd.readouterr().err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("llc-fast: "), err
    for words in said:
        assert words in err


OWN_ERRORS = """
import torch

def not_a_model():
    return 3, torch.zeros(4, 1), None

def no_samples():
    return torch.nn.Linear(1, 1), (torch.zeros(0, 1), torch.zeros(0, 1)), torch.nn.functional.mse_loss

def fails():
    raise ValueError("a bug of the user's own")

def imports():
    import nowhere_to_be_found
"""


@pytest.mark.parametrize(("problem", "said"), [("not_a_model", "model must be"), ("no_samples", "data")])
def test_errors_are_one_line(
    problem: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the package says about wrong input is printed as a line, no traceback, with exit status 2."""
    path = tmp_path / f"{problem}_{tmp_path.name}.py"
    path.write_text(OWN_ERRORS)
    assert _main(["estimate", "--no-progress", f"{path}:{problem}"], monkeypatch) == 2
    _assert_one_line(capfd, said)


@pytest.mark.parametrize(("problem", "error"), [("fails", ValueError), ("imports", ModuleNotFoundError)])
def test_errors_of_the_users_code_keep_their_traceback(
    problem: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks for a bug needs the place."""
    path = tmp_path / f"{problem}_{tmp_path.name}.py"
    path.write_text(OWN_ERRORS)
    monkeypatch.setattr("sys.argv", ["llc-fast", "estimate", f"{path}:{problem}"])
    with pytest.raises(error):
        app.main()


def _assert_no_traceback(capfd: pytest.CaptureFixture[str], *said: str) -> None:
    """An error message, a line of ours or one of typer's boxes, with these words in it."""
    err = capfd.readouterr().err
    assert "Traceback" not in err
    for words in said:
        assert words in err


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_wrong_device_is_no_traceback(
    device: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A device that torch doesn't know, or doesn't have, is the user's mistake."""
    arguments = ["dln", "--networks", "1", "--steps", "10", "--no-progress", "--device", device]
    assert _main(arguments, monkeypatch) == 2
    _assert_no_traceback(capfd, device)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_unwritable_files_are_no_traceback(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file in a folder that isn't there is the user's mistake."""
    arguments = ["dln", "--networks", "1", "--steps", "10", "--no-progress"]
    assert _main([*arguments, option, str(tmp_path / "nowhere" / "file.png")], monkeypatch) == 2
    _assert_no_traceback(capfd, "nowhere")


def test_unwritable_files_are_found_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The minutes of a run are not lost to a folder that isn't there."""
    monkeypatch.setattr("llc_fast.estimate.run_chains", lambda *_, **__: pytest.fail("sampling began"))
    arguments = ["dln", "--networks", "1", "--steps", "10", "--no-progress"]
    assert _main([*arguments, "--json", str(tmp_path / "nowhere" / "rows.json")], monkeypatch) == 2


def test_pictures_that_can_not_be_drawn_are_found_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An ending that matplotlib does not know, or no matplotlib."""
    monkeypatch.setattr(deep_linear, "make_problem", lambda *_: pytest.fail("a network was made"))
    pytest.importorskip("matplotlib")
    assert _main(["dln", "--plot", str(tmp_path / "plot.txt")], monkeypatch) == 2
    _assert_no_traceback(capfd, ".png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert _main(["dln", "--plot", str(tmp_path / "plot.png")], monkeypatch) == 2
    _assert_one_line(capfd, "llc_fast[plot]")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_files_that_may_not_be_written_are_found_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_linear, "make_problem", lambda *_: pytest.fail("a network was made"))
    (tmp_path / "kept.json").touch(mode=0o400)
    assert _main(["dln", "--json", str(tmp_path / "kept.json")], monkeypatch) == 2


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    """Giving a folder for a file is a usage error, before any network is estimated."""
    result = _run("dln", "--json", str(tmp_path))
    assert result.exit_code == 2 and "directory" in _said(result)


def test_success(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A command that worked exits with status 0 and says nothing on stderr."""
    assert _main(["info"], monkeypatch) == 0
    assert capfd.readouterr().err == ""


# --- Deep linear networks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems() -> list[tuple[str, deep_linear.DeepLinearProblem]]:
    """Random networks of the two small classes, with fewer samples than the paper's to save time."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for size in ("1k", "10k"):
            smaller = dataclasses.replace(deep_linear.SIZE_CLASSES[size], num_samples=1000)
            patch.setitem(deep_linear.SIZE_CLASSES, size, smaller)
            found += [(size, deep_linear.make_problem(size, seed)) for seed in range(60)]
    return found


def _product(problem: deep_linear.DeepLinearProblem) -> torch.Tensor:
    """The end-to-end matrix of the model as it is, in float64."""
    product = torch.eye(problem.widths[0], dtype=torch.float64)
    for layer in problem.model:
        product = layer.weight.detach().double() @ product
    return product


def test_networks_are_in_the_range_of_their_class(
    problems: list[tuple[str, deep_linear.DeepLinearProblem]],
) -> None:
    """Widths and numbers of layers stay in the class's range and use all of it; layers have no bias."""
    for size, problem in problems:
        cls = deep_linear.SIZE_CLASSES[size]
        assert cls.layers[0] <= len(problem.model) == len(problem.widths) - 1 <= cls.layers[1]
        assert all(cls.widths[0] <= w <= cls.widths[1] for w in problem.widths)
        shapes = [tuple(p.shape) for p in problem.model.parameters()]
        assert shapes == list(zip(problem.widths[1:], problem.widths, strict=False))
        assert problem.num_parameters == sum(a * b for a, b in shapes)
    for size in ("1k", "10k"):
        cls = deep_linear.SIZE_CLASSES[size]
        depths = {len(p.model) for s, p in problems if s == size}
        assert depths == set(range(cls.layers[0], cls.layers[1] + 1))
        widths = [w for s, p in problems if s == size for w in p.widths]
        assert min(widths) <= cls.widths[0] + 3 and max(widths) >= cls.widths[1] - 3


def test_rank_is_that_of_the_product(problems: list[tuple[str, deep_linear.DeepLinearProblem]]) -> None:
    """The stated rank is the numerical rank of the float64 product; all kinds of rank occur."""
    wrong = {
        (size, seed % 60): (int(torch.linalg.matrix_rank(_product(problem), rtol=1e-6)), problem.rank)
        for seed, (size, problem) in enumerate(problems)
    }
    assert {k: v for k, v in wrong.items() if v[0] != v[1]} == {}
    full = [p.rank == min(p.widths) for _, p in problems]
    assert 0 < sum(full) < len(full)


def test_learning_coefficient_is_the_theorys(
    problems: list[tuple[str, deep_linear.DeepLinearProblem]],
) -> None:
    """λ is Aoyagi's for these widths and this rank, positive and at most half the number of parameters."""
    for _, problem in problems:
        assert problem.learning_coefficient == theory.deep_linear(problem.widths, problem.rank).value
        assert 0 < problem.learning_coefficient <= problem.num_parameters / 2


def test_the_network_realizes_its_data(problems: list[tuple[str, deep_linear.DeepLinearProblem]]) -> None:
    """L(w*) is zero to float32 rounding; targets are the product's; inputs are uniform on [−10, 10]."""
    for _, problem in problems[::7]:
        x, y = problem.data.batch(torch.arange(len(problem.data)))
        assert x.shape == (1000, problem.widths[0]) and y.shape == (1000, problem.widths[-1])
        loss = float(torch.nn.functional.mse_loss(problem.model(x), y).detach())
        assert loss <= 1e-11 * max(float(y.square().mean()), 1.0)
        exact = x.double() @ _product(problem).T
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()) + 1e-30)
        assert x.abs().max() <= 10 and x.min() < -9.9 and x.max() > 9.9
        assert float(x.mean()) == pytest.approx(0, abs=5 * 10 / math.sqrt(3 * x.numel()))
        assert float(x.square().mean()) == pytest.approx(100 / 3, rel=5 * math.sqrt(0.8 / x.numel()))


def test_problems_are_functions_of_their_seed() -> None:
    """Equal seeds give equal weights and data, whatever torch's generator does; other seeds give others."""
    first = deep_linear.make_problem("1k", 5)
    torch.rand(3)
    again, other = deep_linear.make_problem("1k", 5), deep_linear.make_problem("1k", 6)
    assert (again.widths, again.rank, again.learning_coefficient) == (
        first.widths,
        first.rank,
        first.learning_coefficient,
    )
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    indices = torch.tensor([0, 77, 99_999])
    for a, b in zip(first.data.batch(indices), again.data.batch(indices), strict=True):
        assert torch.equal(a, b)
    assert len(first.data) == 100_000
    assert other.widths != first.widths


def test_unknown_size() -> None:
    """The message names the size and lists those there are."""
    with pytest.raises(ValueError, match="size='2k' is unknown; choose one of: 1k, 10k, 1M, 10M, 30M, 100M"):
        deep_linear.make_problem("2k", 0)


def test_classes_are_the_papers() -> None:
    """The table of Furman & Lau 2024 (arXiv 2402.03698): widths, layers, samples, step sizes, steps."""
    assert {name: dataclasses.astuple(c) for name, c in deep_linear.SIZE_CLASSES.items()} == {
        "1k": ((5, 50), (2, 5), 10**5, 5e-7, 10_000),
        "10k": ((5, 100), (2, 10), 10**5, 5e-7, 10_000),
        "1M": ((50, 500), (2, 10), 10**6, 1e-7, 50_000),
        "10M": ((100, 1000), (2, 20), 10**6, 2e-8, 50_000),
        "30M": ((500, 2000), (2, 20), 10**6, 2e-8, 50_000),
        "100M": ((500, 3000), (2, 40), 10**6, 2e-8, 50_000),
    }
    assert (deep_linear.BATCH_SIZE, deep_linear.LOCALIZATION) == (500, 1.0)


# --- estimate -----------------------------------------------------------------------------------------------

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
    done = _run("estimate", f"{problem_file}:problem", *SHORT, *options)
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
    done = _run(
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
    done = _run("estimate", where.format(file=problem_file))
    assert done.exit_code == 2
    assert said.replace(" ", "") in re.sub(r"[\s│]", "", _said(done))


# --- bench --------------------------------------------------------------------------------------------------


def test_bench(tmp_path: Path) -> None:
    """A row for every sampler that is one fused step, with figures that agree with each other."""
    path = tmp_path / "bench.json"
    done = _run("bench", "--parameters", "20000", "--seconds", "0.02", "--json", str(path))
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    assert [row["sampler"] for row in rows] == list(llc_fast.samplers.samplers_with_optimizer())
    for row in rows:
        assert row["parameters"] == 20_000 and row["sampler"] in done.output
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["ns_per_parameter"])
        assert row["share_of_copy"] > 0
    assert [row["bytes_moved"] for row in rows[:1]] == [16]
