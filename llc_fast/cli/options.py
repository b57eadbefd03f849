"""Options that several commands share, and the files that they write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llc_fast.support.files import plain


def writable(path: Path | None) -> Path | None:
    """A path that can be written to; a usage error otherwise, so that no run is lost to it at its end."""
    if path is not None:
        place = path if path.exists() else path.resolve().parent
        if not place.exists():
            raise typer.BadParameter(f"the folder of {path} does not exist")
        if not os.access(place, os.W_OK):
            raise typer.BadParameter(f"{place} is not writable")
    return path


def picture(path: Path | None) -> Path | None:
    """A path for a picture: writable, with an ending that matplotlib knows. A ModuleNotFoundError if it is missing."""
    if path is not None:
        from llc_fast.plots import picture_endings

        known = picture_endings()
        if path.suffix.lower().lstrip(".") not in known:
            raise typer.BadParameter(f"{path} must end in one of: {', '.join(f'.{ending}' for ending in known)}")
    return writable(path)


JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file.", dir_okay=False, callback=writable)
]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture to this file.", dir_okay=False, callback=picture)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Progress = Annotated[bool, typer.Option(help="Show progress: a bar on a terminal, a line each 10 % in a log file.")]


def write_json(path: Path, value: Any) -> None:
    """Write numbers, and say so."""
    path.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    typer.echo(f"numbers written to {path}")
