"""Where minibatches come from: tensors, data sets and loaders behind one small interface."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

Batch = tuple[Any, ...]
"""One minibatch: the model's inputs, then the target, on the device of the run."""


class DataSource(Protocol):
    """What the engine needs to know about data."""

    num_samples: int | None
    """n, or None if it cannot be known."""

    batch_size: int | None
    """Samples in a minibatch, or None where a loader decides."""

    def minibatches(self, seed: int) -> Iterator[Batch]:
        """Endless minibatches; equal seeds give equal sequences where the source allows it."""
        ...

    def full(self) -> Iterator[tuple[Batch, int]]:
        """The whole data set once, in pieces, each with its number of samples."""
        ...


@runtime_checkable
class IndexedBatches(Protocol):
    """A data set that makes a whole batch from a tensor of indices: no per-sample collating."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch: ...


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: _move(b, device) for k, b in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_move(b, device) for b in batch))
    return type(batch)(_move(b, device) for b in batch) if isinstance(batch, (tuple, list)) else batch


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _as_batch(batch: Any, device: torch.device) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"data must give (inputs, target) pairs, got {type(batch).__name__}; wrap it so that each batch is a "
            "tuple whose last element is the target"
        )
    return tuple(_move(b, device) for b in batch)


class _Indexed:
    """Anything addressed by sample index: minibatches without replacement within an epoch."""

    _PIECE = 4096  # samples at a time in a pass over everything

    def __init__(self, dataset: IndexedBatches, batch_size: int, device: torch.device) -> None:
        self._dataset, self._device = dataset, device
        self.num_samples: int | None = len(dataset)
        self._n = len(dataset)
        self.batch_size: int | None = min(batch_size, self._n)

    def minibatches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        size = self.batch_size or self._n
        if size == self._n:  # full batch: nothing to draw
            everything = _as_batch(self._dataset.batch(torch.arange(self._n)), self._device)
            while True:
                yield copy.deepcopy(everything)  # a model may work in place on its input
        while True:
            for indices in torch.split(torch.randperm(self._n, generator=generator), size):
                if len(indices) == size:  # a short rest would be a noisier gradient
                    yield _as_batch(self._dataset.batch(indices), self._device)

    def full(self) -> Iterator[tuple[Batch, int]]:
        for indices in torch.split(torch.arange(self._n), self._PIECE):
            yield _as_batch(self._dataset.batch(indices), self._device), len(indices)


class _Tensors:
    """Tensors with samples along the first dimension, kept on the device."""

    def __init__(self, tensors: tuple[Tensor, ...], device: torch.device) -> None:
        self._tensors = tuple(t.to(device) for t in tensors)

    def __len__(self) -> int:
        return len(self._tensors[0])

    def batch(self, indices: Tensor) -> Batch:
        indices = indices.to(self._tensors[0].device)
        return tuple(t.index_select(0, indices) for t in self._tensors)


class _Collated:
    """A map-style data set, collated sample by sample as a DataLoader would."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def batch(self, indices: Tensor) -> Batch:
        wanted = indices.tolist()
        if hasattr(self._dataset, "__getitems__"):
            return default_collate(self._dataset.__getitems__(wanted))  # type: ignore[no-any-return]
        return default_collate([self._dataset[i] for i in wanted])  # type: ignore[no-any-return]


class _Loader:
    """A user's own loader: it decides about batches and their order."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._loader, self._device = loader, device
        dataset = getattr(loader, "dataset", None)
        self.num_samples: int | None = _length(dataset)
        self.batch_size: int | None = getattr(loader, "batch_size", None)

    def minibatches(self, seed: int) -> Iterator[Batch]:
        torch.manual_seed(seed)  # what a shuffling DataLoader draws from
        while True:
            count = 0
            for count, batch in enumerate(self._loader, start=1):  # noqa: B007 - read after the loop
                yield _as_batch(batch, self._device)
            if count == 0:
                raise ValueError("data is empty: the loader gave no batch (an exhausted iterator can't be reused)")

    def full(self) -> Iterator[tuple[Batch, int]]:
        for raw in self._loader:
            batch = _as_batch(raw, self._device)
            yield batch, len(batch[-1]) if isinstance(batch[-1], Tensor) and batch[-1].ndim else 1


def make_source(data: Any, batch_size: int | None, device: torch.device) -> DataSource:
    """The source for whatever the user gave.

    Args:
        data: a tuple of tensors (inputs…, target), a map-style Dataset, a DataLoader or another iterable of
            batches. With a loader `batch_size` must be None: the loader decides.
        batch_size: samples in a minibatch; None: min(512, n).
        device: where batches are wanted.

    Raises:
        TypeError, ValueError: data of another kind, empty data, tensors of different lengths.
    """
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, Tensor):
        raise TypeError("data must be (inputs, target), got one tensor: pass a tuple such as (x, y)")
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        if len(data) < 2:
            raise TypeError("data must be (inputs…, target), got a tuple of one tensor: pass a tuple such as (x, y)")
        lengths = [len(t) if t.ndim else 0 for t in data]
        if len(set(lengths)) != 1:
            raise ValueError(f"the tensors of data differ in their number of samples: {lengths}")
        if lengths[0] == 0:
            raise ValueError("data is empty: it has no samples")
        return _Indexed(_Tensors(tuple(data), device), batch_size or 512, device)
    if isinstance(data, (str, bytes, Mapping)) or (
        isinstance(data, tuple) and any(isinstance(t, (Tensor, np.ndarray)) for t in data)
    ):
        raise TypeError(
            f"data must be a tuple of tensors (inputs…, target), a Dataset or a DataLoader, got {data!r:.60}"
        )
    if isinstance(data, DataLoader) or (isinstance(data, Iterable) and not hasattr(data, "__getitem__")):
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size} with a loader: the loader decides; leave batch_size out")
        if _length(data) == 0:
            raise ValueError("data is empty: the loader has no batches")
        return _Loader(data, device)
    if hasattr(data, "__len__") and (isinstance(data, IndexedBatches) or hasattr(data, "__getitem__")):
        if len(data) == 0:
            raise ValueError("data is empty: the data set has no samples")
        dataset = data if isinstance(data, IndexedBatches) else _Collated(data)
        return _Indexed(dataset, batch_size or 512, device)
    raise TypeError(
        f"data must be a tuple of tensors (inputs…, target), a Dataset or a DataLoader, got {type(data).__name__}"
    )
