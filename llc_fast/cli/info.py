"""``llc-fast info``: what is installed, and which code will run."""

from __future__ import annotations

from typing import Any

import typer

from llc_fast.cli.options import JsonPath, write_all, write_json
from llc_fast.support.environment import collect_info, installed, runs


def info(json_path: JsonPath = None) -> None:
    """Say what is installed and which code will run. Paste this into bug reports."""
    if json_path is not None:
        facts = collect_info()
        write_all([("facts", json_path, lambda path: write_json(path, facts))])
    else:
        facts = installed()
        _print(facts)
        typer.echo("The rest needs torch, which takes a second to import.")
        of_torch = runs(facts)
        _print({name: value for name, value in of_torch.items() if name not in facts or facts[name] != value})
        facts |= of_torch
    if "torch_error" in facts:
        raise typer.Exit(1)


COMMANDS = (info,)


def _print(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        typer.echo(f"{name:>20}  {', '.join(value) if isinstance(value, list) else value}")
