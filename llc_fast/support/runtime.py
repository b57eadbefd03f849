"""Settings of the process while a run lasts: threads, Ctrl-C, the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with `count` intra-op threads; None: as many as torch is set to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def stopped_by_sigint() -> Iterator[threading.Event]:
    """An event that the first SIGINT (Ctrl-C) sets; the second raises KeyboardInterrupt, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield stop  # somebody else takes care of Ctrl-C
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


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
