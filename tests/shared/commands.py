"""The command line, run in this process."""

from __future__ import annotations

import re

from typer.testing import CliRunner, Result

from llc_fast.cli import app

PNG = b"\x89PNG\r\n\x1a\n"
"""How the file of a picture begins."""


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app.make_app(), list(arguments))


def printed(result: Result) -> str:
    """What was printed, without colours, which typer uses on some continuous integration machines."""
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)
