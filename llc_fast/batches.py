"""What a minibatch is, how minibatches arise, and what the engine needs to know about data."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from llc_fast.support.fingerprint import digest
from llc_fast.support.randomness import Generators, State, same_states

Batch = Any
"""One minibatch on the device of the run: tensors, samples first, in tuples, lists and dictionaries."""
Order = Literal["fixed", "shuffled", "drawn"]
Note = tuple[str, str]
"""A stable code, and a sentence for the user: condition, consequence, remedy."""


@dataclass(frozen=True)
class Sampling:
    """How the minibatches of a source arise.

    Attributes:
        order: ``"fixed"``: every pass gives the same minibatches in the same order, to all chains. ``"shuffled"``: each
            sample comes exactly once in every pass, up to a tail, in a new random order. ``"drawn"``: anything else,
            such as sampling with replacement or by weights, and streams without end.
        num_samples: n, the samples that chains can see; None: there is no end to them.
        num_batches: minibatches in a pass; None: a pass has no end.
        tail: samples that a pass leaves out at its end (``drop_last=True``). With a fixed order no chain ever sees
            them, and they do not count in `num_samples`; with a shuffled one it is other samples in each pass.
        reads_randomly: whether the same sample read twice has other values, or draws random numbers (augmentation);
            False where that can't be told apart from sampling.
        is_reproducible: whether equal seeds give equal minibatches.
        full_is_exact: whether the mean loss over :meth:`DataSource.full` is the expectation of the loss of minibatches,
            not an estimate from one pass of many: with a fixed or shuffled order, unless shuffled minibatches of
            different sizes may stay together, and where torch's own samplers draw from samples, and with weights, that
            are known.
        notes: what the user should know.
    """

    order: Order
    num_samples: int | None
    num_batches: int | None
    tail: int = 0
    reads_randomly: bool = False
    is_reproducible: bool = True
    full_is_exact: bool = True
    notes: tuple[Note, ...] = ()

    def position(self, step: int) -> int:
        """Which minibatch of a pass a chain sees at a step, with a fixed order."""
        if self.order != "fixed" or self.num_batches is None:
            raise ValueError("minibatches have positions only in a pass with a fixed order and an end")
        return step % self.num_batches


class DataSource(Protocol):
    """What the engine needs to know about data."""

    batch_size: int | None
    """Samples in a minibatch, or None where a loader decides."""

    @property
    def num_samples(self) -> int | None:
        """n, or None if it cannot be known."""
        ...

    @property
    def sampling(self) -> Sampling:
        """How minibatches arise; measured when it is first asked for, with the user's generators left as they were."""
        ...

    def minibatches(self, seed: int, chain: int = 0, start: int = 0) -> Iterator[Batch]:
        """The endless minibatches of a chain from step `start` on, a function of (seed, chain) where data allow it."""
        ...

    def full(self, *, tail: bool = True, seed: int = 0) -> Iterator[tuple[Batch, float]]:
        """A pass over everything that chains see, in pieces, each with its number of samples.

        With a fixed order these are the minibatches of the chains, in their order. A shuffled order includes the tail.
        Where samples are drawn with known weights, each comes once, and the weight multiplies the number of samples.

        Args:
            tail: whether the samples at the end that fill no minibatch come too; if not, each piece is like a
                minibatch of a chain, and :meth:`tail` gives the rest.
            seed: of what reading draws: the selection of a source whose order is "drawn", and augmentation.
        """
        ...

    def tail(self, *, seed: int = 0) -> Iterator[tuple[Batch, float]]:
        """What ``full(tail=False, seed=seed)`` leaves out, pieces smaller than a minibatch; often nothing."""
        ...


# ---- batches as trees of tensors ---------------------------------------------------------------------------


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The same structure with `function` applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: map_tensors(function, b) for k, b in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, b) for b in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, b) for b in batch)
    return copy.copy(batch).apply(function) if is_graph(batch) else batch


def is_graph(batch: object) -> bool:
    """Whether this is a graph, or several in one, as torch_geometric has them: one leaf of a batch, with tensors."""
    kinds = type(batch).__mro__
    return any(kind.__name__ == "BaseData" and kind.__module__.startswith("torch_geometric.") for kind in kinds)


def join_graphs(graphs: Sequence[Any]) -> Batch:
    """Several graphs as one batch of torch_geometric's."""
    return sys.modules["torch_geometric.data"].Batch.from_data_list(list(graphs))


def leaves(batch: Batch) -> list[Any]:
    """Everything in a batch that is not a tuple, list or dictionary."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return [leaf for entry in batch for leaf in leaves(entry)]
    return [batch]


def batch_length(batch: Batch) -> int:
    """Samples in a batch: the length of its last tensor (the target, in a pair), or of graphs in one."""
    found = leaves(batch)
    if graphs := [leaf for leaf in found if is_graph(leaf)]:
        return int(getattr(graphs[-1], "num_graphs", 1))
    lengths = [len(t) for t in found if isinstance(t, Tensor) and t.ndim]
    return lengths[-1] if lengths else 1


def split_batch(batch: Batch, size: int | None) -> list[tuple[Batch, int]]:
    """Pieces of at most `size` samples, each with its number of samples; None: the batch as it is."""
    length = batch_length(batch)
    if size is None or size >= length:
        return [(batch, length)]
    if any(map(is_graph, leaves(batch))) and not is_graph(batch):
        raise ValueError("microbatch_size can't split batches of graphs and something else: make it part of the graphs")

    def piece(start: int) -> Batch:
        if is_graph(batch):
            return join_graphs(batch[start : start + size])
        return map_tensors(lambda t: t[start : start + size] if t.ndim and len(t) == length else t, batch)

    return [(piece(start), min(size, length - start)) for start in range(0, length, size)]


def length_of(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def as_tensors(batch: Batch) -> Batch:
    """The same with NumPy's arrays of numbers as tensors: a collate function may leave them."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        return torch.from_numpy(np.array(batch))
    if isinstance(batch, Mapping):
        return {k: as_tensors(b) for k, b in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(as_tensors, batch))
    return type(batch)(map(as_tensors, batch)) if isinstance(batch, (tuple, list)) else batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same on a device, and part of no graph: targets may be outputs of a teacher."""
    return map_tensors(lambda t: t.detach().to(device, non_blocking=True), batch)


def structure(batch: Batch) -> object:
    """How a batch is built of containers and kinds of leaves; lists of texts and numbers may have any length."""
    if isinstance(batch, Mapping):
        return {k: structure(b) for k, b in batch.items()}
    if isinstance(batch, (tuple, list)):
        if batch and not any(isinstance(entry, (Tensor, tuple, list, Mapping)) for entry in batch):
            return "list"
        return [structure(entry) for entry in batch]
    return "tensor" if isinstance(batch, Tensor) else type(batch).__name__


def fingerprint(batch: Batch) -> object:
    """Equal for equal batches, and different for different ones."""
    found: list[object] = []
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            found.append(digest([("", leaf)]))
        elif is_graph(leaf):
            found.append(fingerprint(leaf.to_dict()))
        else:
            try:
                found.append(pickle.dumps(leaf))
            except Exception:  # what can't be pickled can't be compared either
                found.append(type(leaf).__name__)
    return str(structure(batch)), tuple(found)


# ---- random numbers while data are read --------------------------------------------------------------------


class PrivateStates:
    """Inside ``with``, all generators are in states of their own, kept from one use to the next; outside, as they were.

    Args:
        generators: the global ones, and those that the data hold.
        seed: of the states.
    """

    def __init__(self, generators: Generators, seed: int) -> None:
        self._generators, self._seed = generators, seed
        self._states: State | None = None
        self._outside: State = []

    def __enter__(self) -> None:
        self._outside = self._generators.states()
        if self._states is None:
            self._generators.seed(self._seed)
        else:
            self._generators.restore(self._states)

    def __exit__(self, *_: object) -> None:
        self._states = self._generators.states()
        self._generators.restore(self._outside)


def probe(
    start: Callable[[], Iterator[Batch]], generators: Generators, *, in_workers: bool = False
) -> tuple[bool, bool]:
    """Whether reading is random, and whether equal seeds make it equal.

    Args:
        start: begins to read; the iterator gives the same samples twice.
        generators: seeded for this, and left as they were.
        in_workers: whether other processes read, whose generators can't be seen.
    """
    with generators.kept():
        generators.seed(1)
        batches = start()
        before = generators.states()
        first = fingerprint(next(batches))
        moved = not in_workers and not same_states(before, generators.states())
        second = fingerprint(next(batches))
        generators.seed(1)
        again = fingerprint(next(start()))
    return moved or first != second or first != again, first == again


def mix(seed: int, chain: int) -> int:
    """A 63-bit seed for (seed, chain): SplitMix64's finalizer, so that neighbours are unrelated."""
    z = (seed + (chain + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


IRREPRODUCIBLE: Note = (
    "irreproducible",
    "Reading data twice from equal states of the random generators gives different values (a clock, os.urandom, a "
    "counter that goes on, or a generator that can't be reached), so equal seeds do not give equal results. Draw from "
    "torch's, NumPy's or Python's generators.",
)
