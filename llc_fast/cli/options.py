"""Options that several commands share, and the files that they write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llc_fast.support.files import atomic_write, output_path, plain

if TYPE_CHECKING:
    from llc_fast.result import LLCResult


def writable(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path that can be written to, tried and made absolute; a usage error otherwise.

    So no run is lost to it at its end, and the file is where it was asked for, wherever the user's code goes.
    """
    if path is None:
        return None
    try:
        return output_path(max(param.opts, key=len).lstrip("-"), path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def picture(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path for a picture: writable, with an ending that matplotlib knows. A ModuleNotFoundError if it is missing."""
    if path is not None:
        from llc_fast.plots import picture_endings

        known = picture_endings()
        if path.suffix.lower().lstrip(".") not in known:
            raise typer.BadParameter(f"{path} must end in one of: {', '.join(f'.{ending}' for ending in known)}")
    return writable(param, path)


def check_different(paths: dict[str, Path | None]) -> None:
    """Raise a usage error if two of a command's files, by the names of their options, are one."""
    seen = dict[str, str]()
    for name, path in paths.items():
        if path is not None and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise typer.BadParameter(f"{path} is the file of {other} too: give another one", param_hint=name)


def write_all(writers: list[tuple[str, Path | None, Callable[[Path], None]]]) -> None:
    """Write a command's files, and say so; one that fails does not keep the others from being written.

    Args:
        writers: what each is, its path (None: not asked for), and what writes it.

    Raises:
        typer.Exit: one could not be written, with status 1.
    """
    has_failed = False
    for what, path, write in writers:
        if path is not None:
            try:
                write(path)
                typer.echo(f"{what} written to {path}")
            except OSError as error:
                typer.echo(f"llc-fast: {what} could not be written to {path}: {error.strerror or error}", err=True)
                has_failed = True
    if has_failed:
        raise typer.Exit(1)


JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file.", dir_okay=False, callback=writable)
]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture to this file.", dir_okay=False, callback=picture)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Progress = Annotated[bool, typer.Option(help="Show progress: a bar on a terminal, a line each 10 % in a log file.")]


def numbers_of(result: LLCResult) -> dict[str, Any]:
    """What is written of an estimate."""
    low, high = result.interval()
    return {
        "llc_mean": result.llc_mean,
        "llc_stderr": result.llc_stderr,
        "interval": [low, high],
        "llc_per_chain": result.llc_per_chain.tolist(),
        "init_loss": result.init_loss,
        "nbeta": result.nbeta,
        "settings": result.settings,
        "diagnostics": result.diagnostics,
        "warnings": result.warnings,
    }


def write_json(path: Path, value: Any) -> None:
    """Write numbers."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))
