"""Recorded kernels in several streams of a GPU, each as soon as what it needs is there.

One stream runs kernels in the order in which autograd came upon them: a weight's gradient, which nothing waits for,
holds up all layers below. Small kernels leave most of a GPU idle, so that it could run them side by side. Captured in a
CUDA graph, the streams become branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llc_fast.gradients.replay import Recording

_STREAMS = 4
"""One for what the others wait for, and three beside it; each has a workspace of the matrix library's own."""


class Place(NamedTuple):
    """Where a kernel runs.

    Attributes:
        stream: its number.
        awaits: earlier kernels, in other streams, that it has to wait for.
    """

    stream: int
    awaits: tuple[int, ...]


def places(needs: Sequence[frozenset[int]], num_streams: int) -> list[Place]:
    """A stream for each kernel, and what it waits for there, in the order in which they are launched.

    A kernel follows one that it needs, if that is the last one of its stream; else it goes to the stream whose last
    kernel has the fewest before it, counted along what they wait for.

    Args:
        needs: for each kernel, the earlier ones that have to be done.
        num_streams: at most.
    """
    last: list[int] = []  # of each stream
    depth: list[int] = []
    behind: list[set[int]] = []  # each kernel, and what is done when it is
    found = []
    for k, needed in enumerate(needs):
        followed = [s for s, tail in enumerate(last) if tail in needed]
        if followed:
            stream = max(followed, key=lambda s: depth[last[s]])
        elif len(last) < num_streams:
            stream = len(last)
            last.append(-1)
        else:
            stream = min(range(len(last)), key=lambda s: depth[last[s]])
        before = last[stream]
        done = {k} | (behind[before] if before >= 0 else set())
        awaits = []
        for j in sorted(needed, reverse=True):
            if j not in done:
                awaits.append(j)
                done |= behind[j]
        found.append(Place(stream, tuple(awaits)))
        depth.append(1 + max((depth[j] for j in (*awaits, before) if j >= 0), default=0))
        behind.append(done)
        last[stream] = k
    return found


class Branches:
    """Runs the kernels of a recording in several streams, between what is before and after it in the present one.

    Args:
        recording: on a GPU, made without using its memory again.
        device: the GPU.
    """

    def __init__(self, recording: Recording[Any], device: torch.device) -> None:
        self._places = places(recording.needs, _STREAMS)
        self._calls = recording.calls
        beside = max((place.stream for place in self._places), default=0)  # the present stream is number 0
        self._streams = [torch.cuda.Stream(device) for _ in range(beside)]  # type: ignore[no-untyped-call]
        awaited = {k for place in self._places for k in place.awaits}
        self._events = {k: torch.cuda.Event() for k in awaited}  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def replay(self) -> None:
        """Run the kernels again; the present stream goes on when all are done."""
        present = torch.cuda.current_stream()
        streams = [present, *self._streams]
        for stream in self._streams:
            stream.wait_stream(present)
        for k, (place, call) in enumerate(zip(self._places, self._calls, strict=True)):
            stream = streams[place.stream]
            for j in place.awaits:
                stream.wait_event(self._events[j])
            with torch.cuda.stream(stream):
                call()
            if k in self._events:
                self._events[k].record(stream)
        for stream in self._streams:
            present.wait_stream(stream)
