"""A user's own loader: which minibatches it gives, in which order, and how many samples these hold."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from llc_fast.batches import (
    IRREPRODUCIBLE,
    Batch,
    Note,
    Order,
    PrivateStates,
    Sampling,
    as_tensors,
    batch_length,
    fingerprint,
    leaves,
    length_of,
    map_tensors,
    mix,
    probe,
    structure,
    to_device,
)
from llc_fast.support.randomness import Generators
from llc_fast.support.torch_private import (
    copy_of_loader,
    end_workers,
    index_sampler_of,
    iterates_as_torch_does,
    workers_of,
)

_REMEMBERED_BYTES = 2**28
"""A pass up to this size, read to find out what a loader gives, is not read again."""
_FEW_BATCHES = 8
_COMPARED_BATCHES = 4
"""How many minibatches of two passes are compared where the whole passes would be too much."""
_FEW = 10_000
"""A pass of a sampler with fewer indices is read a few times more."""
_MAX_WEIGHTS = 64
"""How many different weights samples may have so that L(w*) is taken over all of them."""
_Chosen = tuple[Sequence[Any], float]
"""The indices of the samples of a minibatch, and their weight."""
_READ_AHEAD = 1e-3
"""Seconds in which minibatches are read ahead: swapping the states of generators takes a tenth of that."""
_WITHOUT_LENGTH = 10_000
"""Where a pass over an iterable without a length ends, if nobody says."""
_EXHAUSTED = (
    "data is empty: the loader gave no batch (an exhausted iterator can't be reused: pass an object whose __iter__ "
    "starts anew, such as a DataLoader)"
)


class LoaderSource:
    """A user's own loader: it decides about batches and their order.

    It is read with states of random generators that belong to the chain, so its minibatches are a function of (seed,
    chain) whatever the model draws, and the user's generators stay as they were. Workers are started for each chain and
    end with it.

    Args:
        loader: a DataLoader, or any iterable of batches.
        device: where batches are wanted.
        check: of each batch.
        max_batches: where a pass ends if the loader has no length.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: torch.device,
        check: Callable[[Batch], Batch],
        max_batches: int | None = None,
    ) -> None:
        self._loader, self._device, self.check = loader, device, check
        self._length, self._max_batches = length_of(loader), max_batches or _WITHOUT_LENGTH
        self._generators = Generators(device, [loader])
        self._is_plain = iterates_as_torch_does(loader)
        self.batch_size: int | None = getattr(loader, "batch_size", None)

    # ---- what it gives -------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        """Where a pass is taken to have no end: a length that is told may be wrong, but not by that much."""
        told = self._length if self._order is None or self._order.has_end else None
        return self._max_batches if told is None else 10 * told + 1000

    @property
    def num_samples(self) -> int | None:
        if self._order is not None and self._order.num_samples is not None:
            return self._order.num_samples
        return self.sampling.num_samples

    @functools.cached_property
    def sampling(self) -> Sampling:
        if _is_iterator(self._loader):
            return Sampling("drawn", None, None, is_reproducible=False, full_is_exact=False, notes=(_ITERATOR,))
        found = self._measured() if self._order is None else self._structural(self._order)
        is_exact = not self._weighs_batches(found) if found.order != "drawn" else self._population is not None
        notes = found.notes if found.is_reproducible else (*found.notes, IRREPRODUCIBLE)
        return dataclasses.replace(found, notes=notes, full_is_exact=is_exact)

    def _weighs_batches(self, found: Sampling) -> bool:
        """Whether minibatches of different sizes may stay together from pass to pass: then their samples do not count
        alike, since minibatches do."""
        if found.order != "shuffled":
            return False
        if self._order is not None and self._order.batches_are_lists:
            return self._order.sizes_differ
        return len(set(self._first_pass.lengths)) > 1

    @functools.cached_property
    def _order(self) -> IndexOrder | None:
        """What the samplers of a DataLoader say; None: the batches themselves have to be looked at."""
        if not self._is_plain:
            return None
        assert isinstance(self._loader, DataLoader)
        sampler = index_sampler_of(self._loader)
        if sampler is None:
            return None
        return index_order(sampler, self._loader.dataset, self._generators)

    def _structural(self, order: IndexOrder) -> Sampling:
        if order.num_batches == 0:
            raise ValueError("data is empty: the loader has no batches")
        reads_randomly, is_reproducible = self._probe()
        num_samples, notes = order.num_samples, list(order.notes)
        if order.has_end and num_samples is None:  # each item is a batch: only reading tells its size
            num_samples = sum(self._first_pass.lengths)
            if order.order == "drawn":
                notes.append(_drawn(num_samples))
        if isinstance(self._loader, DataLoader) and (note := _batches_for_samples(self._loader)):
            notes.append(note)
        return Sampling(
            order.order,
            num_samples,
            order.num_batches,
            order.tail,
            reads_randomly,
            order.is_reproducible and is_reproducible,
            notes=tuple(notes),
        )

    def _probe(self) -> tuple[bool, bool]:
        """Read the first minibatch again, by the loader's own means."""
        loader = self._loader
        assert isinstance(loader, DataLoader)
        with PrivateStates(self._generators, 0):
            first = next(iter(index_sampler_of(loader)))
        again = {"batch_sampler" if loader.batch_sampler is not None else "sampler": [first, first]}
        workers = min(1, loader.num_workers)
        return probe(
            lambda: iter(copy_of_loader(loader, **again, num_workers=workers, persistent_workers=False)),
            self._generators,
            in_workers=workers > 0,
        )

    def _measured(self) -> Sampling:
        """What two passes show, or the beginning of a second one where they are long."""
        first = self._first_pass
        compared = len(first.prints) if first.batches is not None and first.has_end else _COMPARED_BATCHES
        second = [fingerprint(raw) for raw in itertools.islice(self._pass(mix(1, -1)), compared)]
        again = [fingerprint(raw) for raw in itertools.islice(self._pass(mix(0, -1)), _COMPARED_BATCHES)]
        if not second:
            raise ValueError(_EXHAUSTED)
        is_same = second == first.prints[:compared]
        if is_same and len(first.prints) <= _FEW_BATCHES:  # few orders are possible, and two may be alike by chance
            further = (map(fingerprint, itertools.islice(self._pass(mix(k, -1)), compared)) for k in (2, 3, 4))
            is_same = all(list(prints) == second for prints in further)
        is_reproducible = again == first.prints[:_COMPARED_BATCHES]
        num_samples = sum(first.lengths) if first.has_end else None
        num_batches = len(first.lengths) if first.has_end else None
        notes = [_UNSHUFFLED_STREAM] if is_same and num_batches != 1 else []
        copies = getattr(self._loader, "num_workers", 0) if isinstance(self._loader, DataLoader) else 0
        if num_samples is not None and copies > 1 and set(Counter(first.prints).values()) == {copies}:
            num_samples //= copies
            notes.append(_copies(copies, num_samples))
        order: Order = "fixed" if is_same and first.has_end else "drawn"
        reads_randomly = False
        if not is_same and first.has_end and first.batches is not None:
            # The pass is small: whether another one holds the same samples can be counted.
            others = Counter(row for raw in self._pass(mix(1, -1)) for row in _rows(raw))
            own = Counter(row for raw in first.batches for row in _rows(raw))
            order = "shuffled" if own == others else "drawn"
            reads_randomly = not own & others
        if order == "drawn" and num_samples is not None and not reads_randomly:
            notes.append(_drawn(num_samples))
        return Sampling(order, num_samples, num_batches, 0, reads_randomly, is_reproducible, notes=tuple(notes))

    @functools.cached_property
    def _first_pass(self) -> _Pass:
        """A pass over the loader, kept if it is small: L(w*) needs the same."""
        lengths: list[int] = []
        prints: list[object] = []
        kept: list[Batch] | None = []
        num_bytes, has_end = 0, True
        for k, raw in enumerate(self._pass(mix(0, -1))):
            if k == self._limit:
                has_end = False
                break
            lengths.append(batch_length(raw))
            prints.append(fingerprint(raw))
            if kept is not None:
                tensors = [t for t in leaves(raw) if isinstance(t, Tensor)]
                num_bytes += sum(t.nbytes for t in tensors)
                kept.append(map_tensors(torch.clone, raw))  # a loader may use its memory again
                if num_bytes > _REMEMBERED_BYTES or len(tensors) < len(leaves(raw)):
                    kept = None
        if not lengths:
            raise ValueError(_EXHAUSTED)
        return _Pass(lengths, prints, kept, has_end)

    # ---- reading -------------------------------------------------------------------------------------------

    def minibatches(self, seed: int, chain: int = 0, start: int = 0) -> Iterator[Batch]:
        loader, states, step = self._own_loader(), PrivateStates(self._generators, mix(seed, chain)), 0
        try:
            while True:
                before = step
                for raw in self._read(loader, states):
                    if step >= start:
                        yield self._ready(raw)
                    step += 1
                if step == before:
                    raise ValueError(_EXHAUSTED)
        finally:
            self._end(loader)

    def full(self, *, tail: bool = True, seed: int = 0) -> Iterator[tuple[Batch, float]]:
        first, count = None, 0
        for count, (raw, size) in enumerate(self._pieces(tail, seed), 1):
            if count > self._limit:
                return
            batch = self._ready(raw)
            first = first or structure(batch)
            _check_structure(first, batch, count)
            yield batch, size
        if count == 0 or _is_iterator(self._loader):
            raise ValueError(_EXHAUSTED)

    def tail(self, *, seed: int = 0) -> Iterator[tuple[Batch, float]]:
        if self._order is not None and self._order.batches_are_lists:
            for raw, size in self._selected(self._indices(seed)[1], seed):
                yield self._ready(raw), size

    def _pieces(self, tail: bool, seed: int) -> Iterator[tuple[Batch, float]]:
        """The minibatches of a pass as the loader gives them, with their numbers of samples."""
        if self._order is not None and self._order.batches_are_lists:
            minibatches, rest = self._indices(seed)
            yield from self._selected(minibatches + rest if tail else minibatches, seed)
            return
        found = vars(self).get("_first_pass")
        kept = found.batches if seed == 0 and found is not None else None
        raws = self._pass(mix(seed, -1)) if kept is None else (map_tensors(torch.clone, raw) for raw in kept)
        yield from ((raw, batch_length(raw)) for raw in raws)

    def _selected(self, chosen: list[_Chosen], seed: int) -> Iterator[tuple[Batch, float]]:
        """Minibatches of these samples, read by the loader's own means."""
        raws = self._pass(mix(seed, -1), self._with_indices([indices for indices, _ in chosen]))
        for raw, (indices, weight) in zip(raws, chosen, strict=False):
            yield raw, _size(raw, len(indices)) * weight

    def _indices(self, seed: int) -> tuple[list[_Chosen], list[_Chosen]]:
        """The samples of the minibatches of one pass, and of the smaller pieces that no minibatch of a pass holds."""
        assert isinstance(self._loader, DataLoader) and self._order is not None
        order, sampler = self._order, index_sampler_of(self._loader)
        with PrivateStates(self._generators, mix(seed, -2)):
            if (weights := self._population) is not None:
                return _all_by_weight(weights, sampler.batch_size)
            if order.order == "shuffled" and order.tail:
                sampler = BatchSampler(sampler.sampler, sampler.batch_size, drop_last=False)
            found: list[_Chosen] = [
                (b, 1) for b in itertools.islice(sampler, None if order.has_end else self._limit + 1)
            ]
        return (found[:-1], found[-1:]) if order.order == "shuffled" and order.tail else (found, [])

    @functools.cached_property
    def _population(self) -> Tensor | None:
        """The relative weights of all samples that may be drawn; None: unknown, or too many to be read."""
        if self._order is None or (weights := self._order.weights) is None or self._order.num_batches is None:
            return None
        assert isinstance(self._loader, DataLoader)
        size = index_sampler_of(self._loader).batch_size
        # As many as a pass has, or as a chain reads; and few different weights, since a piece has one.
        is_affordable = len(weights) <= size * max(self._order.num_batches, self._max_batches)
        return weights if is_affordable and len(torch.unique(weights)) <= _MAX_WEIGHTS else None

    def _with_indices(self, indices: Sequence[Any]) -> DataLoader[Any]:
        assert isinstance(self._loader, DataLoader)
        name = "batch_sampler" if self._loader.batch_sampler is not None else "sampler"
        return copy_of_loader(self._loader, **{name: indices})

    def _own_loader(self) -> Iterable[Any]:
        """The loader, with workers of its own: those of the user's may be in the middle of a pass."""
        if not self._is_plain:
            return self._loader
        assert isinstance(self._loader, DataLoader)
        return copy_of_loader(self._loader)

    def _pass(self, seed: int, loader: Iterable[Any] | None = None) -> Iterator[Batch]:
        """One pass, with generators seeded for it."""
        loader = self._own_loader() if loader is None else loader
        try:
            yield from self._read(loader, PrivateStates(self._generators, seed))
        finally:
            self._end(loader)

    def _end(self, loader: Iterable[Any]) -> None:
        """End the workers that stay from pass to pass."""
        if self._is_plain:
            end_workers(workers_of(loader))

    def _read(self, loader: Iterable[Any], states: PrivateStates) -> Iterator[Batch]:
        """One pass, with generators in these states while the loader works, and only then.

        Workers that stay were seeded in the first pass. What torch draws for new ones is drawn all the same, so that
        the order of samples does not depend on workers.
        """
        # Batches of torch's own collating are new memory each, so that they can wait for their turn.
        waits = self._is_plain and getattr(loader, "collate_fn", None) is default_collate and self._length is not None
        with states:
            if self._is_plain and workers_of(loader) is not None:
                torch.empty((), dtype=torch.int64).random_(generator=getattr(loader, "generator", None))
            batches = iter(loader)
        try:
            is_over = False
            while not is_over:
                with states:
                    ready, is_over, problem = _next_of(batches, _READ_AHEAD if waits else 0.0)
                yield from ready
                if problem is not None:
                    raise problem
        finally:
            if self._is_plain and batches is not workers_of(loader):
                end_workers(batches)

    def _ready(self, raw: Batch) -> Batch:
        return self.check(to_device(raw, self._device))


@dataclass(frozen=True)
class _Pass:
    """What a pass gave: lengths and fingerprints of its batches, the batches if they are few, and whether it ended."""

    lengths: list[int]
    prints: list[object]
    batches: list[Batch] | None
    has_end: bool


def _is_iterator(loader: object) -> bool:
    """Whether it can be read only once: generators, and iterators of Python's own."""
    if not isinstance(loader, Iterator):
        return False
    return type(loader).__module__ in ("builtins", "itertools") or "DataLoaderIter" in type(loader).__name__


def _next_of(batches: Iterator[Any], seconds: float) -> tuple[list[Batch], bool, Exception | None]:
    """The next batch, and those that come within some seconds; whether they end; an error that waits for its turn."""
    ready: list[Batch] = []
    until = time.perf_counter() + seconds
    while True:
        try:
            ready.append(as_tensors(next(batches)))
        except StopIteration:
            return ready, True, None
        except Exception as error:
            return ready, False, error
        if not seconds or time.perf_counter() > until:
            return ready, False, None


def _size(batch: Batch, expected: int) -> int:
    """Samples in a batch: as many as were asked for, if all tensors have a dimension of that size; a collate function
    may leave samples out, or turn the batch."""
    tensors = [t for t in leaves(batch) if isinstance(t, Tensor) and t.ndim]
    return expected if all(expected in t.shape for t in tensors) else batch_length(batch)


def _all_by_weight(weights: Tensor, size: int) -> tuple[list[_Chosen], list[_Chosen]]:
    """Every sample once, in a random order, in pieces of one weight each: those of `size` samples, and smaller ones."""
    order = torch.randperm(len(weights))
    mean = weights[weights > 0].mean()
    pieces: tuple[list[_Chosen], list[_Chosen]] = [], []
    for weight in torch.unique(weights):
        if weight > 0:
            for piece in torch.split(order[weights[order] == weight], size):
                pieces[len(piece) < size].append((piece.tolist(), float(weight / mean)))
    return pieces


def _rows(batch: Batch) -> Iterator[object]:
    """What tells the samples of a batch apart; of a batch that can't be cut into samples, the whole."""
    tensors, length = leaves(batch), batch_length(batch)
    if not all(isinstance(t, Tensor) and t.ndim and len(t) == length for t in tensors):
        yield fingerprint(batch)
        return
    columns = [t.detach().cpu().contiguous().reshape(length, -1).view(torch.uint8).numpy() for t in tensors]
    for k in range(length):
        yield tuple(column[k].tobytes() for column in columns)


def _check_structure(expected: object, batch: Batch, count: int) -> None:
    found = structure(batch)
    if found != expected:
        raise ValueError(
            f"data changes its structure: batch {count} of the loader is {found}, the first is {expected}. Make all "
            "batches alike (collate_fn), or leave the last one out with drop_last=True"
        )


# ---- what samplers say -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexOrder:
    """What the samplers of a DataLoader say of its passes; see :class:`llc_fast.batches.Sampling`.

    Attributes:
        has_end: whether a pass ends.
        batches_are_lists: whether a minibatch is named by the list of its samples; if not, it is one item of the data
            set, and `num_samples` is open.
        sizes_differ: whether a sampler of the user's puts together minibatches of different sizes.
        weights: of all samples from 0 on, if each place of a minibatch is drawn with these relative probabilities.
    """

    order: Order
    num_samples: int | None
    num_batches: int | None
    tail: int = 0
    has_end: bool = True
    batches_are_lists: bool = True
    sizes_differ: bool = False
    is_reproducible: bool = True
    weights: Tensor | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class _Indices:
    """What a sampler says: the order of its indices, how many a pass has, how many different ones, the first pass if it
    was read, and the relative weights of the indices from 0 on if they are drawn by weight alone."""

    order: Order
    length: int | None
    distinct: int | None
    first: Sequence[Any] | None = None
    is_reproducible: bool = True
    weights: Tensor | None = None
    notes: tuple[Note, ...] = ()


def index_order(sampler: Any, dataset: object, generators: Generators) -> IndexOrder:
    """What a sampler of batches (lists of indices) or of items (single indices) says.

    The classes of torch are known; of all others two passes are read, with generators left as they were.
    """
    size = length_of(dataset)
    if type(sampler) is BatchSampler:
        return _of_batch_sampler(sampler, size, generators)
    if type(sampler) in _KNOWN:  # of items
        found = _KNOWN[type(sampler)](sampler, size)
    else:
        found = _of_passes(sampler, size, generators)
        if found.first is not None and found.first and isinstance(found.first[0], tuple):
            return _of_lists(found)
    notes = found.notes if found.length == 1 or found.order != "fixed" else (*found.notes, _unshuffled(sampler))
    # What a pass of items holds is counted later, and so is what was said of their number.
    notes = tuple(note for note in notes if note[0] != "num-samples")
    return IndexOrder(
        found.order,
        None,
        found.length,
        has_end=found.length is not None,
        batches_are_lists=False,
        is_reproducible=found.is_reproducible,
        notes=notes,
    )


def _of_batch_sampler(sampler: BatchSampler, size: int | None, generators: Generators) -> IndexOrder:
    inner: Any = sampler.sampler
    found = _KNOWN[type(inner)](inner, size) if type(inner) in _KNOWN else _of_passes(inner, size, generators)
    if found.length is None:
        return IndexOrder("drawn", None, None, has_end=False, is_reproducible=found.is_reproducible, notes=found.notes)
    num_batches, tail = divmod(found.length, sampler.batch_size)
    if tail and not sampler.drop_last:
        num_batches, tail = num_batches + 1, 0
    distinct, notes = found.distinct, list(found.notes)
    if found.order == "fixed" and tail:
        distinct = found.length - tail if found.first is None else len(set(found.first[:-tail]))
        notes.append(_dropped(tail, found.length, distinct))
    if found.order == "fixed" and num_batches > 1:
        notes.append(_unshuffled(inner))
    if found.order == "drawn":
        tail = 0
    return IndexOrder(
        found.order,
        distinct,
        num_batches,
        tail,
        is_reproducible=found.is_reproducible,
        weights=found.weights,
        notes=tuple(notes),
    )


def _of_lists(found: _Indices) -> IndexOrder:
    """A sampler of the user's that gives lists of indices."""
    assert found.first is not None
    if found.length is None:
        return IndexOrder("drawn", None, None, has_end=False, is_reproducible=found.is_reproducible, notes=found.notes)
    notes = (*found.notes, _unshuffled(None)) if found.order == "fixed" and found.length > 1 else found.notes
    return IndexOrder(
        found.order,
        found.distinct,
        found.length,
        sizes_differ=len({len(indices) for indices in found.first}) > 1,
        is_reproducible=found.is_reproducible,
        notes=notes,
    )


def _of_passes(sampler: Iterable[Any], size: int | None, generators: Generators) -> _Indices:
    """A sampler of the user's: passes with different seeds, and one with the first seed again."""
    told = length_of(sampler) or 0
    limit = max(told, 10 * max(size or 0, 1000)) + 1

    def read(seed: int) -> list[Any]:
        count, found = 0, []
        with PrivateStates(generators, mix(seed, -2)):
            for index in sampler:
                found.append(_plain(index))
                count += len(found[-1]) if isinstance(found[-1], tuple) else 1
                if count >= limit:
                    break
        endless.append(count >= limit)
        return found

    endless: list[bool] = []
    first, second, again = read(0), read(1), read(0)
    # Of a few batches another pass may hold the same by chance.
    more = [read(seed) for seed in (2, 3, 4)] if first != second and len(first) < _FEW else []
    if first and not second:
        raise ValueError(f"data: the loader's sampler ({type(sampler).__name__}) can be read only once: {_EXHAUSTED}")
    is_reproducible = first == again
    if any(endless):
        return _Indices("drawn", None, None, first, is_reproducible)
    own, *others = (Counter(_flat(p)) for p in (first, second, again, *more))
    repeated = _repeated(own.total(), len(own))
    if first == second == again:
        return _Indices("fixed", len(first), len(own), first, notes=repeated)
    if all(own == other for other in others):
        return _Indices("shuffled", len(first), len(own), first, is_reproducible, notes=repeated)
    return _Indices("drawn", len(first), len(own), first, is_reproducible, notes=(_drawn(len(own)),))


def _plain(index: Any) -> Any:
    """An index that can be compared: of a batch, a tuple of them."""
    if isinstance(index, (Tensor, np.ndarray, np.generic)):
        index = index.tolist()
    if isinstance(index, list):
        return tuple(map(_plain, index))
    try:
        hash(index)
    except TypeError:
        return repr(index)
    return index


def _flat(indices: Sequence[Any]) -> Iterator[Any]:
    for index in indices:
        if isinstance(index, tuple):
            yield from index
        else:
            yield index


def _of_sequential(sampler: SequentialSampler, size: int | None) -> _Indices:
    length = len(sampler.data_source)
    return _Indices("fixed", length, length)


def _of_random(sampler: RandomSampler, size: int | None) -> _Indices:
    wanted, available = sampler.num_samples, len(sampler.data_source)
    if wanted == available and not sampler.replacement:
        return _Indices("shuffled", wanted, wanted)
    return _of_draws("RandomSampler", wanted, available, torch.ones(available))


def _of_draws(name: str, wanted: int, available: int, weights: Tensor | None) -> _Indices:
    """A sampler that draws `wanted` of the `available` samples in each pass."""
    n = min(wanted, available)
    notes: tuple[Note, ...] = ()
    if wanted != available:
        other = available if n == wanted else wanted
        notes = (
            (
                "num-samples",
                f"n = {n}: the {name} draws {wanted} of {available} samples in each pass. If n = {other} is meant, use "
                f"nbeta=default_nbeta({other}).",
            ),
        )
    return _Indices("drawn", wanted, n, weights=weights, notes=notes)


def _of_subset(sampler: SubsetRandomSampler, size: int | None) -> _Indices:
    indices = [_plain(index) for index in sampler.indices]
    distinct = len(set(indices))
    return _Indices("shuffled", len(indices), distinct, notes=_repeated(len(indices), distinct))


def _of_weights(sampler: WeightedRandomSampler, size: int | None) -> _Indices:
    weights = torch.as_tensor(sampler.weights, dtype=torch.float64)
    available = int((weights > 0).sum())
    # Without replacement the probabilities are none that a formula gives.
    return _of_draws("WeightedRandomSampler", sampler.num_samples, available, weights if sampler.replacement else None)


def _of_distributed(sampler: DistributedSampler[Any], size: int | None) -> _Indices:
    indices = list(sampler)
    distinct, total = len(set(indices)), len(sampler.dataset)  # type: ignore[arg-type]
    notes: tuple[Note, ...] = ()
    if distinct < total:
        notes = (
            (
                "num-samples",
                f"n = {distinct}: the DistributedSampler gives this process its share of {total} samples. To estimate "
                "with all of them, pass the data set, or a loader without that sampler.",
            ),
        )
    return _Indices("fixed", len(indices), distinct, indices, notes=notes)


_KNOWN: Mapping[type, Callable[[Any, int | None], _Indices]] = {
    SequentialSampler: _of_sequential,
    RandomSampler: _of_random,
    SubsetRandomSampler: _of_subset,
    WeightedRandomSampler: _of_weights,
    DistributedSampler: _of_distributed,
}
"""Samplers whose order is known. A subclass may do anything, and is read."""


# ---- what the user should know -----------------------------------------------------------------------------

_SHARED = "so chains share the noise of minibatches and the standard error is too small by an unknown factor."
_UNSHUFFLED_STREAM: Note = (
    "unshuffled",
    f"data gives the same minibatches in the same order to all chains, {_SHARED} Pass a loader that shuffles anew in "
    "each pass (shuffle=True).",
)
_ITERATOR: Note = (
    "irreproducible",
    "data is an iterator, which is read only once: chains go on where others stopped, so equal seeds do not give equal "
    "results. Pass a DataLoader or a data set.",
)


def _unshuffled(sampler: object) -> Note:
    if isinstance(sampler, DistributedSampler):
        how, remedy = "a DistributedSampler whose epoch is not set", "Use shuffle=True without that sampler."
    elif type(sampler) is SequentialSampler:
        how, remedy = "shuffle=False", "Pass shuffle=True."
    else:
        how, remedy = "its sampler has one order", "Use shuffle=True, or a sampler that shuffles anew in each pass."
    return (
        "unshuffled",
        f"The loader gives the same minibatches in the same order to all chains ({how}), {_SHARED} {remedy}",
    )


def _dropped(tail: int, length: int, num_samples: int) -> Note:
    return (
        "dropped",
        f"The loader leaves out the last {tail} of {length} samples in every pass (drop_last=True without shuffling): "
        f"n = {num_samples} and L(w*) are those of the others. Pass shuffle=True, or drop_last=False.",
    )


def _repeated(length: int, distinct: int) -> tuple[Note, ...]:
    if length == distinct:
        return ()
    return (
        (
            "num-samples",
            f"n = {distinct}: a pass over the loader holds {length} samples, {distinct} of them different. If n = "
            f"{length} is meant, use nbeta=default_nbeta({length}).",
        ),
    )


def _drawn(num_samples: int) -> Note:
    return (
        "num-samples",
        f"n = {num_samples}, counted in one pass over data whose passes hold different samples. If another n is meant, "
        "use nbeta=default_nbeta(n).",
    )


def _copies(copies: int, num_samples: int) -> Note:
    return (
        "num-samples",
        f"n = {num_samples}: every batch comes {copies} times in a pass, once from each worker of an IterableDataset "
        "that does not share its samples out. Use get_worker_info() in the data set, or num_workers=0.",
    )


def _batches_for_samples(loader: DataLoader[Any]) -> Note | None:
    """A loader with batch_size=1 over a list whose items are batches, most likely."""
    items = loader.dataset
    if loader.batch_size != 1 or not isinstance(items, (tuple, list)) or not looks_like_batches(items):
        return None
    size = batch_length(as_tensors(items[0]))
    return (
        "num-samples",
        f"n = {len(items)}: each item of the loader's list looks like a batch of {size} samples, and counts as one "
        "sample. If it is a batch, use DataLoader(batches, batch_size=None).",
    )


def looks_like_batches(items: Sequence[Any]) -> bool:
    """Whether each of some items holds only tensors of one length, two or more in at least one: a batch, perhaps."""
    chosen = [items[k] for k in sorted({round(k * (len(items) - 1) / 63) for k in range(64)})] if items else []
    longest = 0
    for item in chosen:
        if not isinstance(item, (tuple, list, Mapping, Tensor, np.ndarray)):
            return False
        values = [leaf for leaf in leaves(item) if not isinstance(leaf, (str, bytes, type(None)))]
        if not values or not all(isinstance(v, (Tensor, np.ndarray)) and v.ndim for v in values):
            return False
        lengths = {len(v) for v in values}
        if len(lengths) != 1:
            return False
        longest = max(longest, *lengths)
    return longest >= 2


def reason_not_whole(source: LoaderSource) -> str:
    """Why the loader's samples are not one fixed set; empty if they are."""
    sampling = source.sampling
    if sampling.num_samples is None:
        return "data has no length"
    if sampling.order == "drawn":
        return "the loader gives other samples in each pass"
    if sampling.reads_randomly or not sampling.is_reproducible:
        return "the loader gives other values each time"
    return ""
