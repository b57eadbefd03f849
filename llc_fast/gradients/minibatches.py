"""The minibatches of chains, in memory that stays where it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator

from torch import Tensor

from llc_fast.data import Batch, IndexedSource, leaves, map_tensors
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.control_variate import ControlVariate
from llc_fast.objective.objective import Objective


class Feed:
    """The minibatches of a group of chains, in memory that stays where it is if the data are addressed by index.

    Batches have a leading dimension for the chains, except for a single chain, and for a batch that is the whole data
    set and the same each time it is read, which all chains share.

    Attributes:
        seconds: that were spent waiting for a loader.
    """

    def __init__(self, objective: Objective, seed: int, first_chain: int, num_chains: int, start: int) -> None:
        self._source, self._copies = objective.source, objective.trial.writes_batch
        self._key = NoiseKey(seed, chain=first_chain)
        self._iterator: Iterator[Batch] | None = None
        self.seconds = 0.0
        self.is_shared = False
        if not isinstance(self._source, IndexedSource) or not objective.trial.has_tensor_batches:
            self._iterator = self._source.minibatches(seed, first_chain, start)
            return
        self._indices = self._source.index_buffer(num_chains)
        # Reading that draws random numbers gives each chain and step values of its own.
        self.is_shared = self._source.is_full_batch and self._source.is_thread_safe
        if self.is_shared:
            self._batch = self._source.gather(self._indices[0])
            return
        key = self._key._replace(step=start)
        flat = self._source.gather(self._source.sample_indices(key, self._indices), key=key)
        self._flat = leaves(flat)
        shape = (num_chains, -1) if num_chains > 1 else (-1,)
        self._batch = map_tensors(lambda t: t.view(*shape, *t.shape[1:]), flat)

    @property
    def is_pure(self) -> bool:
        """Whether minibatches are functions of (seed, chain, step), or come from a user's ``__getitem__``."""
        return not isinstance(self._source, IndexedSource) or self._source.is_thread_safe

    @property
    def indices(self) -> Tensor:
        """Which samples the last minibatch holds, ``[num_chains, batch_size]``, of data addressed by index."""
        return self._indices

    @property
    def is_addressable(self) -> bool:
        """Whether the minibatch of any step can be had at any time, without a trace."""
        return self._iterator is None and self.is_pure

    def close(self) -> None:
        """There is no further minibatch: a loader's workers end now, not when somebody collects garbage."""
        if isinstance(self._iterator, Generator):
            self._iterator.close()

    def __call__(self, step: int, device_step: Tensor | None = None) -> Batch:
        """The minibatch of this step; a new one overwrites the one before."""
        if self._iterator is not None:
            began = time.perf_counter()
            batch = next(self._iterator)
            self.seconds += time.perf_counter() - began
        else:
            batch = self._batch
            if not self.is_shared:
                assert isinstance(self._source, IndexedSource)
                key = self._key._replace(step=step)
                self._source.gather(self._source.sample_indices(key, self._indices, device_step), self._flat, key)
        return self.untouched(batch)

    def untouched(self, batch: Batch) -> Batch:
        """The minibatch in memory that a model which writes to its input does not write to."""
        return copy.deepcopy(batch) if self._copies else batch


def paired(loss: Tensor, control_variate: ControlVariate | None, feed: Feed, step: int) -> Tensor:
    """The loss of a minibatch less what it loses at w*, on the device where it is."""
    if control_variate is None:
        return loss
    if not control_variate.by_sample:
        return loss - control_variate.at(step)
    return loss - control_variate.on_device(feed.indices).to(loss.device)
