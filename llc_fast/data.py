"""Where minibatches come from: tensors, data sets and loaders behind one small interface.

`batches.py` has what they share, `loaders.py` what a user's own loader gives, and this file the rest: data that are
addressed by index, and the choice between all of them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from llc_fast.batches import (
    IRREPRODUCIBLE,
    Batch,
    DataSource,
    Note,
    Sampling,
    as_tensors,
    batch_length,
    fingerprint,
    is_graph,
    join_graphs,
    leaves,
    length_of,
    map_tensors,
    mix,
    probe,
    split_batch,
    to_device,
)
from llc_fast.kernels.native import minibatch_indices
from llc_fast.kernels.step import NoiseKey
from llc_fast.loaders import LoaderSource, looks_like_batches, reason_not_whole
from llc_fast.support.errors import add_note, first_line
from llc_fast.support.randomness import Generators, same_states

__all__ = [
    "Batch",
    "DataSource",
    "IndexedBatches",
    "IndexedSource",
    "LoaderSource",
    "Sampling",
    "batch_length",
    "leaves",
    "make_source",
    "map_tensors",
    "mix",
    "split_batch",
    "spread_indices",
]

_KEPT_BYTES = 2 * 2**30
"""A map-style data set up to this size is turned into tensors once, instead of sample by sample at every step."""
_MAX_COLUMNS = 8
"""Tensors of one shape in a tuple beyond which they may be batches."""
_NO_STEP = NoiseKey(0)
_PROBED_SAMPLES = 16
"""How many samples are read twice to see whether reading is random."""


@runtime_checkable
class IndexedBatches(Protocol):
    """A data set that makes a whole batch from a tensor of indices, in any thread: no per-sample collating.

    Where the class has ``__getitem__`` too, the parameter of ``batch`` must be called `indices`: other libraries have
    methods of that name which do something else.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch: ...


def spread_indices(length: int, count: int) -> Tensor:
    """At most `count` indices from the first to the last of `length` samples, evenly spread."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


def _check_pair(batch: Batch) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"data must give (inputs, target) pairs, got {type(batch).__name__}; wrap it so that each batch is a "
            "tuple whose last element is the target, or pass a loss function whose first parameter is called `model`: "
            "it is then called as loss_fn(model, batch), with the batch as it is"
        )
    return tuple(batch)


# ---- addressed by index ------------------------------------------------------------------------------------


class IndexedSource:
    """Anything addressed by sample index: minibatches without replacement within an epoch, or from step to step anew.

    The samples of chain c at step t are a pure function of (seed, c, t), so chains can be run together or one by one,
    and resumed at any step.

    Minibatches of one epoch are not independent: what one holds, those before it did not, so its loss at a place that
    these have led to is too high on average, noticeably if an epoch is a few steps long. With `independent` every step
    begins an epoch of its own.

    Where the user's code reads samples, it finds the random generators seeded by (seed, c, t), and they are as before
    when it is done: augmentation too is a function of these.

    Args:
        dataset: makes batches from indices.
        batch_size: samples in a minibatch, at most.
        device: where batches are wanted.
        check: of each batch.
        independent: whether every step begins an epoch of its own.
        reads_randomly: whether reading draws random numbers; None: a few samples are read to see.
        notes: of :class:`llc_fast.batches.Sampling`.
    """

    def __init__(
        self,
        dataset: IndexedBatches,
        batch_size: int,
        device: torch.device,
        check: Callable[[Batch], Batch],
        independent: bool = False,
        *,
        reads_randomly: bool | None = None,
        notes: tuple[Note, ...] = (),
    ) -> None:
        self._dataset, self._device, self._check = dataset, device, check
        self._reads_randomly, self._notes = reads_randomly, notes
        self._is_memory = isinstance(dataset, _Tensors)
        self._generators = Generators(device, () if self._is_memory else [dataset])
        self._n = len(dataset)
        self.num_samples: int | None = self._n
        self.batch_size: int | None = min(batch_size, self._n)
        self._index_device = device if device.type == "cuda" else torch.device("cpu")
        self._is_independent = independent
        self._stride = self._n // self.batch_size if independent and self._n else 1

    def with_batch_size(self, batch_size: int) -> IndexedSource:
        """The same data in minibatches of another size."""
        other = copy.copy(self)
        for name in ("sampling", "_needs_seeds"):
            other.__dict__.pop(name, None)
        other.batch_size = min(batch_size, self._n)
        other._stride = self._n // other.batch_size if self._is_independent and self._n else 1
        return other

    @property
    def is_full_batch(self) -> bool:
        """Whether every minibatch is the whole data set, in its own order."""
        return self.batch_size == self._n

    @property
    def is_thread_safe(self) -> bool:
        """Whether minibatches may be asked for in several threads at once; a user's ``__getitem__`` is not trusted, and
        random generators are the same in all threads."""
        return self._is_memory or not self._needs_seeds

    @functools.cached_property
    def _needs_seeds(self) -> bool:
        """Whether to seed the generators before samples are read; those of a ``__getitem__`` may draw now and then."""
        return isinstance(self._dataset, _Collated) or self.sampling.reads_randomly

    @functools.cached_property
    def sampling(self) -> Sampling:
        size, notes = self.batch_size or 1, self._notes
        reads_randomly, is_reproducible = (False, True) if self._is_memory else self._probe()
        if not is_reproducible:
            notes = (*notes, IRREPRODUCIBLE)
        return Sampling(
            "shuffled", self._n, self._n // size, self._n % size, reads_randomly, is_reproducible, notes=notes
        )

    def _probe(self) -> tuple[bool, bool]:
        some = spread_indices(self._n, _PROBED_SAMPLES).to(self._index_device)
        is_random, is_reproducible = probe(lambda: (self._dataset.batch(some) for _ in range(2)), self._generators)
        return is_random or bool(self._reads_randomly), is_reproducible

    def index_buffer(self, num_chains: int) -> Tensor:
        """Memory for the indices of one step; of the whole data set, if that is the minibatch."""
        size = self.batch_size or self._n
        return torch.arange(size, device=self._index_device).repeat(num_chains, 1)

    def sample_indices(self, key: NoiseKey, out: Tensor, device_step: Tensor | None = None) -> Tensor:
        """Write the sample indices of step ``key.step`` to `out` ``[num_chains, batch_size]``."""
        if self.is_full_batch:
            return out
        key = key._replace(step=key.step * self._stride)
        if device_step is not None and self._stride > 1:
            device_step = device_step * self._stride
        return minibatch_indices(self._n, key, out, device_step=device_step)

    def gather(self, indices: Tensor, out: Sequence[Tensor] | None = None, key: NoiseKey = _NO_STEP) -> Batch:
        """The samples, in the order of the flattened indices, on the device; written to the tensors `out` if given.

        `key` names what reading draws: the first row's chain, each row after it being of the next chain.
        """
        if out is not None and isinstance(self._dataset, _Tensors):
            self._dataset.write(indices.reshape(-1), out)
            return None
        batch = self._check(to_device(self._read(indices, key), self._device))
        if out is not None:
            for old, new in zip(out, leaves(batch), strict=True):
                old.copy_(new)
        return batch

    def _read(self, indices: Tensor, key: NoiseKey) -> Batch:
        if self._is_memory or not self._needs_seeds:
            return self._dataset.batch(indices.reshape(-1))
        rows = []
        with self._generators.kept():
            for k, row in enumerate(indices.reshape(-1, indices.shape[-1])):
                self._generators.seed(mix(mix(key.seed, key.chain + k), key.step))
                rows.append(self._dataset.batch(row))
        if len(rows) == 1:
            return rows[0]
        columns = (torch.cat(tensors) for tensors in zip(*map(leaves, rows), strict=True))
        return map_tensors(lambda _: next(columns), rows[0])

    def minibatches(self, seed: int, chain: int = 0, start: int = 0) -> Iterator[Batch]:
        step, indices = start, self.index_buffer(1)
        while True:
            key = NoiseKey(seed, step=step, chain=chain)
            yield self.gather(self.sample_indices(key, indices), key=key)
            step += 1

    def full(self, *, tail: bool = True, seed: int = 0) -> Iterator[tuple[Batch, float]]:
        size = self.batch_size or self._n
        # Without gradients four minibatches need less memory than one with them.
        piece, count = (min(4096, 4 * size), self._n) if tail else (size, self._n - self._n % size)
        yield from self._pieces(0, count, piece, seed)

    def tail(self, *, seed: int = 0) -> Iterator[tuple[Batch, float]]:
        size = self.batch_size or self._n
        if self._n % size:
            yield from self._pieces(self._n - self._n % size, self._n, size, seed)

    def _pieces(self, start: int, stop: int, size: int, seed: int) -> Iterator[tuple[Batch, float]]:
        for indices in torch.split(torch.arange(start, stop, device=self._index_device), size):
            key = NoiseKey(mix(seed, -1), step=int(indices[0]))
            yield self.gather(indices, key=key), len(indices)


class _Tensors:
    """Tensors with samples along the first dimension, kept on the device."""

    def __init__(self, tensors: Batch, device: torch.device) -> None:
        self._tensors = to_device(tensors, device)
        self._n = batch_length(tensors)

    def __len__(self) -> int:
        return self._n

    def batch(self, indices: Tensor) -> Batch:
        return map_tensors(lambda t: t.index_select(0, indices.to(t.device)), self._tensors)

    def write(self, indices: Tensor, out: Sequence[Tensor]) -> None:
        for t, target in zip(leaves(self._tensors), out, strict=True):
            torch.index_select(t, 0, indices, out=target)


class _Collated:
    """A map-style data set, collated sample by sample as a DataLoader would."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def batch(self, indices: Tensor) -> Batch:
        wanted = indices.tolist()
        if hasattr(self._dataset, "__getitems__"):
            samples = self._dataset.__getitems__(wanted)
        else:
            samples = [self._dataset[i] for i in wanted]
        try:
            if samples and is_graph(samples[0]):
                return join_graphs(samples)
            return default_collate(samples)
        except TypeError as error:
            raise TypeError(
                f"data has samples that can't be collated ({first_line(error)}): pass a DataLoader with a collate_fn "
                "that makes tensors of them"
            ) from error
        except RuntimeError as error:
            add_note(error, "data has samples of different shapes: pass a DataLoader with a collate_fn that pads them")
            raise


class _Columns(_Collated):
    """A ``datasets.Dataset`` without a transform: columns of numbers as tensors, whatever its format is."""

    def __init__(self, dataset: Any) -> None:
        form = dataset.format
        if form["type"] != "torch":
            options = {"columns": form["columns"], "output_all_columns": form["output_all_columns"]}
            dataset = dataset.with_format("torch", **options)
        super().__init__(dataset)

    def batch(self, indices: Tensor) -> Batch:
        columns: dict[str, Any] = self._dataset[indices.tolist()]
        for name, column in columns.items():
            if isinstance(column, list) and any(isinstance(row, Tensor) for row in column):
                raise ValueError(
                    f"data has rows of different lengths in the column {name!r}: pad them, as "
                    "DataLoader(data, batch_size=…, shuffle=True, collate_fn=transformers.DataCollatorWithPadding("
                    'tokenizer)) does; token sequences of any lengths are what loss_fn="next-token" takes'
                )
        return columns


def _kept_as_tensors(
    dataset: _Collated, device: torch.device, num_wanted: int | None
) -> tuple[IndexedBatches, bool | None]:
    """The data set as tensors on the device, if that is possible, worth it, and the same; and whether it is random.

    Possible: every sample collates to tensors of one shape, and all fit in `_KEPT_BYTES`. Worth it: the chains will
    ask for at least as many samples as there are (`num_wanted`; None: many). The same: reading draws no random numbers,
    and a few samples read twice agree, so that nothing random is frozen.
    """
    n = len(dataset)
    if num_wanted is not None and num_wanted < n:
        return dataset, None
    generators = Generators(device, [dataset])
    with generators.kept():
        generators.seed(0)
        before = generators.states()
        some = spread_indices(n, 8)
        once, again = dataset.batch(some), dataset.batch(some)
        if fingerprint(once) != fingerprint(again) or not same_states(before, generators.states()):
            return dataset, True
        tensors = leaves(once)
        if not all(isinstance(t, Tensor) and t.ndim for t in tensors):
            return dataset, None
        if sum(t.nbytes for t in tensors) / len(some) * n > _KEPT_BYTES:
            return dataset, None
        try:
            pieces = [dataset.batch(indices) for indices in torch.split(torch.arange(n), 4096)]
            flat = [torch.cat(tensors) for tensors in zip(*(leaves(p) for p in pieces), strict=True)]
        except (RuntimeError, TypeError, ValueError):  # samples of different shapes or kinds: as the loop will say
            return dataset, None
        if not same_states(before, generators.states()):
            return dataset, True
    ordered = iter(flat)
    return _Tensors(map_tensors(lambda _: next(ordered), pieces[0]), device), False


# ---- whatever the user gave --------------------------------------------------------------------------------


def make_source(
    data: Any,
    batch_size: int | None,
    device: torch.device,
    *,
    pairs: bool = True,
    num_wanted: int | None = None,
    max_batches: int | None = None,
    independent: bool = False,
    whole: bool = False,
    check: Callable[[Batch], Batch] | None = None,
) -> DataSource:
    """The source for whatever the user gave.

    Args:
        data: tensors or NumPy's arrays with samples along the first dimension, as a tuple (inputs…, target) or a
            dictionary; a map-style Dataset; a DataLoader or another iterable of batches. With a loader `batch_size`
            must be None: the loader decides.
        batch_size: samples in a minibatch; None: min(512, n).
        device: where batches are wanted.
        pairs: whether each batch must be a tuple (inputs…, target); otherwise it may have any structure.
        num_wanted: samples that chains will ask for in all; a map-style data set with more is not kept as tensors.
        max_batches: where a pass over an iterable without a length ends.
        independent: whether minibatches of data addressed by index are drawn anew from step to step, not epoch by
            epoch; a loader decides for itself.
        whole: every minibatch is to be the whole data set, as tensors; a loader is read once.
        check: makes of each batch what the loss is given; None: a check that it is a pair, with `pairs`.

    Raises:
        TypeError, ValueError: data of another kind, empty data, tensors of different lengths; with `whole`, data that
            are not one fixed set of tensors, or a smaller `batch_size`.
    """
    if whole:
        return _whole_source(data, batch_size, device, pairs, check)
    check_kind(data)
    if check is None:
        check = _check_pair if pairs else lambda batch: batch
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, (np.ndarray, tuple, Mapping)):  # a list of arrays may be samples
        data = as_tensors(data)
    if isinstance(data, Tensor):
        if pairs:
            raise TypeError("data must be (inputs, target), got one tensor: pass a tuple such as (x, y)")
        if data.ndim == 0 or len(data) == 0:
            raise ValueError("data is empty: it has no samples")
        return IndexedSource(_Tensors(data, device), batch_size or 512, device, check, independent)
    values: Sequence[Any] = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(data, (tuple, list, Mapping)) and data and all(isinstance(t, Tensor) for t in values):
        if any(t.is_nested for t in values):
            raise TypeError(
                "data has nested tensors, from which no minibatch can be taken: pad them, as with "
                "torch.nested.to_padded_tensor(t, 0.0), or pass a DataLoader whose collate_fn nests the samples"
            )
        if pairs and isinstance(data, Mapping):
            raise TypeError(
                f"data must be (inputs, target), got a dictionary of {', '.join(map(str, data))}: a loss function "
                "whose first parameter is called `model` is called as loss_fn(model, batch) with such batches"
            )
        if pairs and len(data) < 2:
            raise TypeError("data must be (inputs…, target), got a tuple of one tensor: pass a tuple such as (x, y)")
        lengths = [len(t) if t.ndim else 0 for t in values]
        if len(set(lengths)) != 1:
            found = f"{lengths[:10]}" + (", …" if len(lengths) > 10 else "")
            raise ValueError(
                f"the tensors of data differ in their number of samples: {found}. Batches, as in list(loader), go into "
                "DataLoader(data, batch_size=None); samples of different lengths into a DataLoader with a collate_fn "
                "that pads them"
            )
        if isinstance(data, (tuple, list)):
            _check_columns(data, pairs)
        if lengths[0] == 0:
            raise ValueError("data is empty: it has no samples")
        tensors = dict(data) if isinstance(data, Mapping) else tuple(data)
        return IndexedSource(_Tensors(tensors, device), batch_size or 512, device, check, independent)
    if isinstance(data, (str, bytes, Mapping)) or (
        isinstance(data, tuple) and any(isinstance(t, (Tensor, np.ndarray)) for t in data)
    ):
        raise TypeError(
            f"data must be a tuple of tensors (inputs…, target), a Dataset or a DataLoader, got {data!r:.60}"
        )
    if is_loader(data):
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size} with a loader: the loader decides; leave batch_size out")
        if length_of(data) == 0:
            raise ValueError("data is empty: the loader has no batches")
        return LoaderSource(data, device, check, max_batches)
    if hasattr(data, "__len__") and (makes_batches(data) or hasattr(data, "__getitem__")):
        if len(data) == 0:
            raise ValueError("data is empty: the data set has no samples")
        if makes_batches(data):
            return IndexedSource(data, batch_size or 512, device, check, independent)
        _check_items(data)
        if pairs and hugging_face_dataset(data):
            raise TypeError(_columns_for_pairs(data.format["columns"]))
        collated = _Columns(data) if _has_plain_columns(data) else _Collated(data)
        kept, is_random = _kept_as_tensors(collated, device, num_wanted)
        return IndexedSource(kept, batch_size or 512, device, check, independent, reads_randomly=is_random)
    raise TypeError(
        f"data must be a tuple of tensors (inputs…, target), a Dataset or a DataLoader, got {type(data).__name__}"
    )


def is_loader(data: object) -> bool:
    """Whether data are batches one after another."""
    if isinstance(data, DataLoader):
        return True
    return isinstance(data, Iterable) and not hasattr(data, "__getitem__")


def makes_batches(data: Any) -> bool:
    """Whether data are :class:`IndexedBatches`, and not of a class that has something else of that name."""
    method = getattr(data, "batch", None)
    if not callable(method) or not hasattr(data, "__len__"):
        return False
    try:
        first = next(iter(inspect.signature(method).parameters), "")
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    getitem = getattr(type(data), "__getitem__", None)
    if getitem is None or getitem is Dataset.__getitem__:
        return "size" not in first  # tf.data's batch(batch_size)
    return first == "indices"


def hugging_face_dataset(data: object) -> bool:
    """Whether data are a ``datasets.Dataset``; that package is not imported to tell."""
    return isinstance(data, _hugging_face("Dataset"))


def _hugging_face(name: str) -> tuple[type, ...]:
    """A class of the package datasets; nothing where nobody has imported it."""
    found = getattr(sys.modules.get("datasets"), name, None)
    return (found,) if isinstance(found, type) else ()


def _has_plain_columns(data: Any) -> bool:
    """Whether data are a ``datasets.Dataset`` whose values are its columns, not what a transform makes of them."""
    return hugging_face_dataset(data) and data.format["type"] != "custom"


def _columns_for_pairs(columns: Sequence[str]) -> str:
    x, y = (columns[0], columns[-1]) if len(columns) > 1 else ("x", "y")
    return (
        f"data is a datasets.Dataset with the columns {', '.join(columns)}, whose batches are dictionaries: pass "
        f"loss_fn(model, batch), such as lambda model, batch: mse_loss(model(batch[{x!r}]), batch[{y!r}]); or, for a "
        'language model with input_ids, loss_fn="next-token"'
    )


# ---- what may be meant in two ways -------------------------------------------------------------------------


def check_kind(data: Any) -> None:
    """Refuse what looks like data and is something else."""
    if isinstance(data, dict) and isinstance(data, _hugging_face("DatasetDict") + _hugging_face("IterableDatasetDict")):
        splits = list(data)
        raise TypeError(
            f"data is a {type(data).__name__} with the splits {', '.join(map(repr, splits))}: pass one of them, such "
            f"as data[{splits[0] if splits else 'train'!r}]"
        )
    if isinstance(data, _hugging_face("IterableDataset")):
        raise TypeError(
            "data is a datasets.IterableDataset, which gives samples one by one: pass "
            'DataLoader(data.with_format("torch"), batch_size=…), or samples that stay, such as '
            "datasets.Dataset.from_list(list(data.take(1000)))"
        )
    if hasattr(data, "iloc"):
        raise TypeError(
            f"data is a {type(data).__name__} of pandas, whose rows are no tensors: pass tensors, such as "
            "(torch.from_numpy(x.to_numpy()), torch.from_numpy(y.to_numpy()))"
        )
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"data is an IterableDataset ({type(data).__name__}), which gives samples one by one: pass "
            "DataLoader(data, batch_size=…), with batch_size=None if it gives whole batches"
        )
    if isinstance(data, (list, tuple)) and any(isinstance(item, (DataLoader, Dataset)) for item in data[:100]):
        raise TypeError(
            f"data is a {type(data).__name__} of {len(data)} data sets or loaders: pass one, such as "
            "torch.utils.data.ConcatDataset(…)"
        )


def _check_items(data: Any) -> None:
    """Refuse items that may be batches or samples: n, and with it nβ, would be wrong by the batch size."""
    if isinstance(data, (list, tuple, deque)):
        if not looks_like_batches(data):
            return
    elif not isinstance(size := getattr(data, "batch_size", None), int) or size < 2:
        return
    else:
        with Generators(torch.device("cpu"), [data]).kept():
            first = data[0]
        if not looks_like_batches([first]) or batch_length(as_tensors(first)) != size:
            return
    raise _ambiguous(data, "sample")


def _check_columns(data: Sequence[Tensor], pairs: bool) -> None:
    """Refuse tensors that may be columns (inputs…, target), or batches or samples one after another."""
    if pairs or len(data) < 2 or (isinstance(data, tuple) and len(data) <= _MAX_COLUMNS):
        return
    if len({(t.dtype, t.shape[1:], t.ndim) for t in data}) == 1:
        raise _ambiguous(data, "column")


def _ambiguous(data: Any, otherwise: str) -> ValueError:
    name, count = type(data).__name__, len(data)
    sizes = [batch_length(as_tensors(data[k])) for k in range(count)] if isinstance(data, (list, tuple)) else []
    total = f" (n = {sum(sizes)})" if sizes else ""
    batches = f"If they are batches{total}, pass DataLoader(data, batch_size=None, shuffle=True)."
    if otherwise == "column":
        return ValueError(
            f"data is ambiguous: a {name} of {count} tensors of one kind may be the columns of one data set, or "
            f"batches, as in list(loader). {batches} If they are columns of {sizes[0]} samples, pass a dictionary or a "
            "tuple. If each is one sample, pass torch.stack(data)."
        )
    return ValueError(
        f"data is ambiguous: each of the {count} items of a {name} may be a batch, as in list(loader), or a sample. "
        f"{batches} If they are samples (n = {count}), pass tensors made with torch.stack, a TensorDataset, or a "
        "Dataset whose __getitem__ gives one sample."
    )


# ---- the whole data set as one minibatch -------------------------------------------------------------------


def _whole_source(
    data: Any,
    batch_size: int | None,
    device: torch.device,
    pairs: bool,
    check: Callable[[Batch], Batch] | None,
) -> DataSource:
    """The source whose only minibatch is all of the data."""
    everything = sys.maxsize if batch_size is None and not is_loader(data) else batch_size
    source = make_source(data, everything, device, pairs=pairs, check=check)
    if isinstance(source, LoaderSource):
        if reason := reason_not_whole(source):
            raise ValueError(f"{reason}, but the whole data set is needed at every step: pass tensors")
        notes = tuple(note for note in source.sampling.notes if note[0] != "unshuffled")
        return IndexedSource(_Tensors(_joined(source), device), sys.maxsize, device, source.check, notes=notes)
    assert isinstance(source, IndexedSource)
    if not source.is_full_batch:
        raise ValueError(
            f"batch_size={batch_size} is less than the {source.num_samples} samples, which are all needed at every "
            "step: leave batch_size out; microbatch_size= saves memory"
        )
    if not source.is_thread_safe:
        raise ValueError(
            "the data set gives other samples each time, or does not fit the memory as tensors; the loss over all data "
            "has to be a function of the parameters: pass tensors"
        )
    return source


def _joined(source: LoaderSource) -> Batch:
    """Everything that a loader gives, as one batch."""
    batches = [batch for batch, _ in source.full()]
    try:
        joined = [torch.cat(tensors) for tensors in zip(*map(leaves, batches), strict=True)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the loader's batches can't be joined to one ({error}): pass tensors") from error
    columns = iter(joined)
    return map_tensors(lambda _: next(columns), batches[0])
