"""What commands share: JSON on standard output, files, warnings that are printed once."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import typer
from commands import invoke, printed
from typer.testing import CliRunner

import llc_fast
from llc_fast.cli.options import Command, JsonPath, write_all, write_json
from llc_fast.support.warned import issue


def _program() -> typer.Typer:
    """A program with one command that prints, warns and writes."""
    app = typer.Typer(add_completion=False)

    @app.command(cls=Command)
    def count(words: list[str] | None = None, json_path: JsonPath = None, loud: bool = False) -> None:
        typer.echo("for people")
        print("of a library")
        issue(["too short"])
        write_all([("numbers", json_path, lambda path: write_json(path, {"words": words or [], "λ": float("nan")}))])
        if loud:
            raise typer.Exit(3)

    return app


def _run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(_program(), list(arguments))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "-"], ["--json=-"], ["--json", "--loud"]])
def test_one_document_on_stdout(arguments: list[str]) -> None:
    """And all else on stderr, what others print too; numbers that are none are null; the exit status stays."""
    code, out, err = _run(*arguments)
    assert json.loads(out) == {"words": [], "λ": None}
    assert err.splitlines() == ["for people", "of a library"]
    assert code == (3 if "--loud" in arguments else 0)
    assert sys.stdout is sys.__stdout__ or not sys.stdout.closed  # it is what it was


def test_in_a_file(tmp_path: Path) -> None:
    """With a path, the screen has what it always has."""
    path = tmp_path / "out.json"
    code, out, err = _run("--json", str(path))
    assert (code, err) == (0, "")
    assert out.splitlines() == ["for people", "of a library", f"numbers written to {path}"]
    assert json.loads(path.read_text()) == {"words": [], "λ": None}


def test_without_json() -> None:
    assert _run() == (0, "for people\nof a library\n", "")


def test_commands_issue_no_python_warnings() -> None:
    """They print what there is to say; elsewhere it is issued as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _run()[0] == 0
        with pytest.raises(llc_fast.LLCWarning):
            issue(["too short"])


def test_json_of_every_command() -> None:
    """The facts, the experiments, a measurement of each sampler, and what networks give, by a command each."""
    for arguments, kind in (
        (["info"], dict),
        (["reproduce"], dict),
        (["bench", "--parameters", "1000", "--seconds", "0.01"], list),
        (["dln", "--networks", "1", "--steps", "10", "--no-progress"], list),
    ):
        done = invoke(*arguments, "--json")
        assert done.exit_code == 0, done.output
        assert isinstance(json.loads(done.stdout), kind), arguments
    assert "--json" in printed(invoke("demo", "--help"))


def test_only_json_goes_to_stdout(tmp_path: Path) -> None:
    for option in ("--save", "--checkpoint"):
        done = invoke("estimate", "nowhere.py:problem", option, "-")
        assert done.exit_code == 2 and "only --json can go to standard output" in printed(done)
