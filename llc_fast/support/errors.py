"""Errors in words."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
