"""``llc-fast explain``: what a warning means, how it is found, and what to do."""

from __future__ import annotations

import difflib
import io
import re
import shutil
from typing import Annotated

import typer

from llc_fast.support.entries import DOCUMENTATION, entries, url


def explain(codes: Annotated[list[str] | None, typer.Argument(metavar="CODE", show_default=False)] = None) -> None:
    """Explain warnings by their codes, such as ess; without one, list all codes."""
    known = entries()
    if not codes:
        width = max(map(len, known))
        typer.echo("\n".join(f"{code:>{width}}  {_plain(_first(text))}" for code, text in known.items()))
        return
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code, known, n=3, cutoff=0.5)
            others = f"did you mean {' or '.join(near)}?" if near else "`llc-fast explain` lists all."
            raise typer.BadParameter(f"no warning has the code {code!r}; {others}", param_hint="CODE")
    for code in codes:
        typer.echo(_rendered(f"## {code}\n\n{known[code]}\n\n{url(code)}"))


COMMANDS = (explain,)


def _first(text: str) -> str:
    """The first paragraph in one line."""
    return " ".join(text.split("\n\n", 1)[0].split())


def _plain(text: str) -> str:
    return re.sub(r"\[([^]]+)\]\([^)]+\)|`", r"\1", text)


def _rendered(text: str) -> str:
    """Markdown for the terminal, or as plain lines where stdout is none."""
    from rich.console import Console
    from rich.markdown import Markdown

    # Pages beside this one, under the address of the documentation.
    text = re.sub(r"\]\((?!http)([\w/]+)\.md", rf"]({DOCUMENTATION}\1.html", text)
    stdout = Console()
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    file = io.StringIO()
    to_text = Console(file=file, width=width, force_terminal=stdout.is_terminal, no_color=stdout.no_color)
    to_text.print(Markdown(text, hyperlinks=True))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
