"""The control variate of minibatch losses: what the same minibatch loses at w*."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.data import Batch, DataSource, IndexedSource, map_tensors, split_batch
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.objective import Objective, widened
from llc_fast.support.errors import first_line

_CHECKED_BATCHES = 8
_SLACK = 1e-3
"""The part of L_B(w*)'s spread over minibatches that may stay unexplained."""
_NEGLIGIBLE = 1e-3
"""A difference of λ̂ that does not matter."""
_MAX_SAMPLES = 2**27
"""A gibibyte of losses."""


class ControlVariate:
    """b_B = L_B(w*) − L(w*) of any minibatch B, from the loss at w* of every sample: a gather and a sum.

    A chain's loss less this, L_B(w_t) − L_B(w*) + L(w*), has the expectation of L_B(w_t), since b_B has that of zero:
    each sample is equally likely to be in the minibatch of a step. What the two share is gone: how hard the samples of
    the minibatch are.

    Args:
        sample_losses: of every sample at w*, float64 ``[n]``.
        init_loss: L(w*).
        batch_size: samples in a minibatch.
    """

    def __init__(self, sample_losses: NDArray[np.float64], init_loss: float, batch_size: int) -> None:
        self._deviations = (sample_losses - init_loss) / batch_size
        self._tensor: Tensor | None = None

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """b_B ``[chain]`` of minibatches given by the indices of their samples, ``[chain, batch_size]``."""
        values: NDArray[np.float64] = np.add.reduce(self._deviations.take(indices), axis=1)
        return values

    def on_device(self, indices: Tensor) -> Tensor:
        """The same where the indices are."""
        if self._tensor is None or self._tensor.device != indices.device:
            self._tensor = torch.from_numpy(self._deviations).to(indices.device)
        return self._tensor.take(indices).sum(1)


@dataclass(frozen=True)
class ReferenceLosses:
    """The losses at w*.

    Attributes:
        mean: L(w*), over the whole data set.
        stderr: of the mean: rounding, and where the data had no end, the spread of what was seen of them.
        samples: of every sample, float64 ``[n]``; None if they can't be had.
        unpaired_reason: why the chains' losses are not paired with those of the same minibatches at w*; empty if they
            are.
    """

    mean: float
    stderr: float
    samples: NDArray[np.float64] | None
    unpaired_reason: str

    def control_variate(self, source: DataSource, init_loss: float) -> ControlVariate | None:
        """That of the minibatches of `source`, about `init_loss`; None where chains are not paired."""
        if self.samples is None or self.unpaired_reason:
            return None
        return ControlVariate(self.samples, init_loss, source.batch_size or 1)


def reference_losses(objective: Objective, nbeta: float, seed: int = 0) -> ReferenceLosses:
    """L(w*), and the loss of every sample at w*, where a minibatch's loss is the mean of its samples' losses.

    It takes one pass over the data either way. Whether the means agree is checked on a few minibatches before: a loss
    weighted by tokens, batch statistics and augmentation show there.

    Args:
        objective: the model, its loss and data.
        nbeta: nβ, which says what difference of losses matters.
        seed: of the minibatches.

    Raises:
        ValueError: L(w*) is not finite, or the data give no sample.
    """
    samples, unpaired_reason = None, _why_not(objective)
    if not unpaired_reason:
        try:
            # Where torch would go through the samples one by one it warns; too slow for a whole data set.
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*performance drop")
                if _are_means(objective, nbeta, seed):
                    samples = np.concatenate([_sample_losses(objective, b) for b, _ in objective.source.full()])
                else:
                    unpaired_reason = _NOT_THE_MEAN
        except Exception as error:
            unpaired_reason = f"the loss of single samples can't be had: {first_line(error)}"
    if samples is None or not np.isfinite(samples).all():
        return ReferenceLosses(*objective.full_loss(), None, unpaired_reason or "the loss at w* is not finite")
    if nbeta * _spread(objective, samples) < _NEGLIGIBLE:
        unpaired_reason = "the loss at w* is the same on all minibatches, or nearly"
    mean, rounding = float(samples.mean()), 0.5 * torch.finfo(next(iter(objective.reference.values())).dtype).eps
    return ReferenceLosses(mean, rounding * abs(mean), samples, unpaired_reason)


_NOT_THE_MEAN = (
    "a minibatch's loss is not the mean of what its samples lose by themselves (batch statistics, a loss weighted by "
    "tokens, augmentation)"
)


def _why_not(objective: Objective) -> str:
    """What is known to stand in the way before anything is computed."""
    source = objective.source
    if not isinstance(source, IndexedSource):
        return "a loader does not say which samples it gives"
    if source.is_full_batch:
        return "a minibatch is the whole data set"
    if not objective.trial.has_tensor_batches:
        return "batches hold more than tensors"
    if objective.trial.is_random:
        return "the model draws random numbers"
    if objective.trial.writes_buffers:
        return "the model writes to its buffers"
    if (source.num_samples or 0) > _MAX_SAMPLES:
        return f"more than {_MAX_SAMPLES} samples"
    return ""


def _are_means(objective: Objective, nbeta: float, seed: int) -> bool:
    """Whether minibatches lose at w* what their samples lose on average, evaluated with those of other minibatches."""
    source, exact = objective.source, objective.in_full_precision()
    assert isinstance(source, IndexedSource)

    def gather(indices: Tensor) -> Batch:
        return map_tensors(widened, source.gather(indices))

    rows = [
        source.sample_indices(NoiseKey(seed, step=step), source.index_buffer(1))[0] for step in range(_CHECKED_BATCHES)
    ]
    mixed = torch.stack(rows, dim=1)  # read again for this: a data set may augment, a model work in place
    samples = np.concatenate([_sample_losses(exact, gather(indices)) for indices in mixed.reshape(len(rows), -1)])
    for indices, own in zip(rows, samples.reshape(mixed.shape).T, strict=True):
        pieces, buffers = exact.pieces(gather(indices)), exact.fresh_buffers()
        loss = torch.stack([exact.evaluate(exact.reference, b, buffers, share).loss for b, share in pieces]).sum()
        slack = _SLACK * _spread(objective, own) + 4 * torch.finfo(loss.dtype).eps * float(np.abs(own).mean())
        if not abs(float(loss) - own.mean()) <= slack + _NEGLIGIBLE / nbeta:
            return False
    return True


def _sample_losses(objective: Objective, batch: Batch) -> NDArray[np.float64]:
    pieces = split_batch(batch, objective.microbatch_size)
    return np.concatenate([objective.sample_losses(piece).to("cpu", torch.float64).numpy() for piece, _ in pieces])


def _spread(objective: Objective, samples: NDArray[np.float64]) -> float:
    return float(samples.std()) / math.sqrt(objective.source.batch_size or 1)
