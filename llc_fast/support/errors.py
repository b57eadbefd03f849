"""Errors in words."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def add_note(error: BaseException, text: str) -> None:
    """A note below an error's text, as PEP 678 has it; before Python 3.11, which has none, part of the text itself.

    Errors whose text is not their one argument (a KeyError, an OSError) get it as another argument there.
    """
    if hasattr(error, "add_note"):
        error.add_note(text)
    elif len(error.args) == 1 and str(error) == error.args[0]:
        error.args = (f"{error.args[0]}\n{text}",)
    else:
        error.args = (*error.args, text)
