"""The process while a run lasts: threads and their settings, Ctrl-C, whose turn it is, the C library's allocator."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


# What puts things back is a class, never a generator function: Ctrl-C may stop that one as it begins, and what it would
# do at its end is then done when its memory is freed, long after whoever is outside has put things back.


class threads:  # noqa: N801
    """Run with `count` intra-op threads; None: as many as torch is set to use."""

    def __init__(self, count: int | None) -> None:
        self._count = count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._count or self._before)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


class Stop:
    """Whether a run is to stop: a flag that a signal handler may set at any moment, and other threads too.

    ``threading.Event.set`` takes a lock, and a signal that comes while a handler holds it would wait for itself.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


class Interrupts:
    """What Ctrl-C does while a run lasts, in the main thread of a program that has no other plans for it.

    It raises KeyboardInterrupt once. What puts things back afterwards is not interrupted again: frames of the functions
    in `protected`, and whatever they call, run to their end before it is raised.

    Args:
        protected: functions that must not be interrupted.
    """

    def __init__(self, *protected: Callable[..., Any]) -> None:
        self._protected = {function.__code__ for function in protected}
        self._stop: Stop | None = None
        self._has_raised = self.is_pending = False
        self._is_installed = False

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._is_installed = True
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[Stop]:
        """A flag that the first SIGINT (Ctrl-C) sets; the second raises KeyboardInterrupt, as usual."""
        self._stop = Stop()
        try:
            yield self._stop
        finally:
            self._stop = None

    @property
    def is_stopping(self) -> bool:
        """Whether the first SIGINT has come while there was something to stop."""
        return self._stop is not None and self._stop.is_set()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._stop is not None and not self._stop.is_set():
            self._stop.set()
            return
        if self._has_raised:
            return
        while frame is not None:
            if frame.f_code in self._protected:
                self.is_pending = True
                return
            frame = frame.f_back
        self._has_raised = True
        raise KeyboardInterrupt


# ---- one run at a time ------------------------------------------------------------------------------------------

_turn = threading.Lock()
_has_turn: contextvars.ContextVar[bool] = contextvars.ContextVar("llc_fast_has_turn", default=False)


def _forget_turn() -> None:
    """In a forked process nobody is left to give back what another thread had."""
    global _turn
    _turn = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turn)


class one_at_a_time:  # noqa: N801
    """Wait until no other thread is inside; one that is inside may enter again, in threads of its context too.

    A run writes to the model's parameters, and draws from generators that belong to the whole process.
    """

    _token: contextvars.Token[bool] | None = None

    def __enter__(self) -> None:
        while not self.try_for(0.05):
            pass

    def try_for(self, seconds: float) -> bool:
        """Whether the turn has come; it is given back at the end of ``with``."""
        if _has_turn.get():
            return True
        self._lock = _turn
        if self._lock.acquire(timeout=seconds):
            self._token = _has_turn.set(True)
        return self._token is not None

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            token, self._token = self._token, None
            _has_turn.reset(token)
            self._lock.release()


class CallersSettings:
    """What torch keeps for each thread, as it is in the thread that makes this: for threads that work for it."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ]
        self._caches = torch.is_autocast_cache_enabled()
        self._device = torch.get_default_device()

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function with these settings."""
        return self._context.copy().run(self._call, function, args)

    def _call(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._caches))
            if self._device != torch.get_default_device():
                stack.enter_context(self._device)
            return function(*args)


_M_MMAP_THRESHOLD, _LARGE, _USUAL = -3, 2**20, 32 * 2**20


@contextlib.contextmanager
def large_blocks_apart(wanted: bool) -> Iterator[None]:
    """Let the C library give each large block back as soon as it is freed, while this lasts.

    glibc keeps freed blocks of up to 32 MiB for later, and with gradients and activations of different sizes coming and
    going the holes between them add up: 2 bytes per parameter on a network with 100M, measured.
    """
    mallopt = None
    if wanted and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _USUAL)  # where glibc's own rule ends up once such blocks were freed
