"""Errors in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sized
from typing import Any


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


def and_more(names: Sized) -> str:
    """After the first of several names: how many more there are."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def shortened(value: Any) -> str:
    """A value as JSON, or its beginning."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], in_words: Callable[[Any], str] = shortened
) -> list[str]:
    """What differs between two runs: "NAME was …, is …" for each name, in their order."""
    return [
        f"{name} was {in_words(before.get(name))}, is {in_words(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
