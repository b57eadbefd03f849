"""Reasons not to trust a result as Python warnings, for whoever prints nothing but λ̂."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterable, Iterator

from llc_fast.support import entries

_are_shown = contextvars.ContextVar[bool]("llc_fast_warnings_are_shown", default=False)


class LLCWarning(UserWarning):
    """A reason not to trust an estimate. ``warnings.simplefilter("ignore", llc_fast.LLCWarning)`` silences all of them.

    Attributes:
        code: one of those that :mod:`llc_fast.checks` lists, such as ``"ess"``, or ``"scale"``, of a sweep. It stays
            when the text changes. ``llc-fast explain ess`` says what it means, how it is found, and what to do.
        url: where the documentation explains it.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    @property
    def url(self) -> str:
        return entries.url(self.code)


def issue(found: Iterable[str], stacklevel: int = 1) -> None:
    """Issue each sentence as an :class:`LLCWarning` with its ``code``, unless somebody shows them anyway.

    The text of one with a code ends with the command that explains it: ``… [llc-fast explain ess]``.

    Args:
        found: sentences, such as ``result.warnings``.
        stacklevel: as of ``warnings.warn``: 1 is the line that calls this.

    Raises:
        LLCWarning: a filter makes errors of warnings.
    """
    if not _are_shown.get():
        for text in found:
            code = getattr(text, "code", "")
            where = f" [{entries.command([code])}]" if code else ""
            warnings.warn(LLCWarning(text + where, code), stacklevel=stacklevel + 1)


@contextlib.contextmanager
def shown_otherwise() -> Iterator[None]:
    """No Python warnings within, in this thread: the caller shows what results say."""
    token = _are_shown.set(True)
    try:
        yield
    finally:
        _are_shown.reset(token)
