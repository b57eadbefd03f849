"""The program ``llc-fast``: it finds its commands, and prints what is wrong with its input as one line."""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from typing import Annotated

import typer

import llc_fast
from llc_fast import cli
from llc_fast.cli.options import Command


def make_app() -> typer.Typer:
    """The commands of all modules in this folder, in alphabetical order."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    names = {found.name for found in pkgutil.iter_modules(cli.__path__)} - {"__main__", "app"}
    modules = [importlib.import_module(f"{cli.__name__}.{name}") for name in names]
    commands = [command for module in modules for command in getattr(module, "COMMANDS", ())]
    for command in sorted(commands, key=lambda command: command.__name__):
        app.command(cls=Command)(command)
    app.callback()(_options)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llc-fast {llc_fast.__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Estimate the local learning coefficient (LLC) of PyTorch models."""


def main() -> None:
    """Run ``llc-fast``. What this package says about wrong input becomes one line, with exit status 2.

    Other errors, those of the user's own code too, keep their traceback.
    """
    try:
        make_app()()
    except (TypeError, ValueError, ModuleNotFoundError, PermissionError, MemoryError) as error:
        if not _is_ours(error):
            raise
        typer.echo(f"llc-fast: {error}", err=True)
        raise SystemExit(2) from error


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "llc_fast"
