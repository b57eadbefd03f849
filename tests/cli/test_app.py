"""The program: its help, its exit status, and what it says of errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import invoke, printed

import llc_fast
from llc_fast.cli import app
from llc_fast.problems import deep_linear


def test_help() -> None:
    """Without a command the commands are listed."""
    result = invoke()
    listed = re.findall(r"^│ ([a-z]+) ", printed(result), re.MULTILINE)
    assert listed == [
        "bench",
        "components",
        "demo",
        "dln",
        "estimate",
        "explain",
        "hf",
        "influence",
        "info",
        "reproduce",
        "sample",
        "scan",
        "sweep",
    ]


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, without a command."""
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"llc-fast {llc_fast.__version__}\n")


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
    beside = Path(llc_fast.__file__).parents[1]  # where it finds the package that is tested, not a source folder
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=beside)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "estimate" in done.stdout and {"typer", "llc_fast"} <= imported
    assert not imported & {"torch", "numpy", "scipy", "tqdm", "matplotlib", "pandas", "xarray", "arviz", "sklearn"}


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
    monkeypatch.setattr("llc_fast.estimate.RunningChains", lambda *_, **__: pytest.fail("sampling began"))
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
    result = invoke("dln", "--json", str(tmp_path))
    assert result.exit_code == 2 and "directory" in printed(result)


def test_success(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A command that worked exits with status 0 and says nothing on stderr."""
    assert _main(["info"], monkeypatch) == 0
    assert capfd.readouterr().err == ""
