"""Words for errors."""

from __future__ import annotations

import sys
import traceback

import pytest

from llc_fast.support.errors import add_note, first_line


class _OldError(Exception):
    """An exception as before Python 3.11, which had no notes."""

    @property
    def add_note(self) -> None:
        raise AttributeError


class _OldKeyError(KeyError):
    add_note = _OldError.add_note


def test_the_first_line() -> None:
    assert first_line(ValueError(" one\ntwo")) == "one" and first_line(ValueError()) == "ValueError"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no notes")
def test_notes() -> None:
    error = ValueError("what")
    add_note(error, "why")
    assert error.__notes__ == ["why"] and error.args == ("what",)


@pytest.mark.parametrize("kind", [_OldError, _OldKeyError])
def test_notes_where_there_are_none(kind: type[Exception]) -> None:
    """They show in a traceback all the same, and what a handler looks for stays where it was."""
    error = kind("what")
    assert not hasattr(error, "add_note")
    add_note(error, "why")
    add_note(error, "and how")
    shown = "".join(traceback.format_exception_only(type(error), error))
    assert all(text in shown for text in ("what", "why", "and how"))
    assert error.args == (("what\nwhy\nand how",) if kind is _OldError else ("what", "why", "and how"))


def test_notes_on_an_error_without_text() -> None:
    error = _OldError()
    add_note(error, "why")
    assert str(error) == "why"
