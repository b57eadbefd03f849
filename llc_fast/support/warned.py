"""Reasons not to trust a result as Python warnings, for whoever prints nothing but λ̂."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterable, Iterator

_are_shown = contextvars.ContextVar[bool]("llc_fast_warnings_are_shown", default=False)


class LLCWarning(UserWarning):
    """A reason not to trust an estimate. ``warnings.simplefilter("ignore", llc_fast.LLCWarning)`` silences all of them.

    Attributes:
        code: one of those that :mod:`llc_fast.checks` lists, such as ``"ess"``, or ``"scale"``, of a sweep. It stays
            when the text changes.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


def issue(found: Iterable[str], stacklevel: int = 1) -> None:
    """Issue each sentence as an :class:`LLCWarning` with its ``code``, unless somebody shows them anyway.

    Args:
        found: sentences, such as ``result.warnings``.
        stacklevel: as of ``warnings.warn``: 1 is the line that calls this.

    Raises:
        LLCWarning: a filter makes errors of warnings.
    """
    if not _are_shown.get():
        for text in found:
            warnings.warn(LLCWarning(text, getattr(text, "code", "")), stacklevel=stacklevel + 1)


@contextlib.contextmanager
def shown_otherwise() -> Iterator[None]:
    """No Python warnings within, in this thread: the caller shows what results say."""
    token = _are_shown.set(True)
    try:
        yield
    finally:
        _are_shown.reset(token)
