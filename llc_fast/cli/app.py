"""The program ``llc-fast``: it finds its commands, and prints errors in what the user gave as one line."""

from __future__ import annotations

import importlib
import pkgutil

import typer

from llc_fast import cli


def make_app() -> typer.Typer:
    """The commands of all modules in this folder, in alphabetical order."""
    app = typer.Typer(
        help="Estimate the local learning coefficient (LLC) of PyTorch models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    names = {found.name for found in pkgutil.iter_modules(cli.__path__)} - {"__main__", "app"}
    modules = [importlib.import_module(f"{cli.__name__}.{name}") for name in names]
    commands = [command for module in modules for command in getattr(module, "COMMANDS", ())]
    for command in sorted(commands, key=lambda command: command.__name__):
        app.command()(command)
    return app


def main() -> None:
    """Run ``llc-fast``. TypeError, ValueError and ModuleNotFoundError become one line and exit status 2."""
    try:
        make_app()()
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        typer.echo(f"llc-fast: {error}", err=True)
        raise SystemExit(2) from error
