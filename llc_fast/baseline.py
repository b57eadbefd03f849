"""The paired baseline: what a minibatch brings to a loss by itself is taken out again."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.data import Batch, IndexedSource, split_batch
from llc_fast.posterior import Posterior
from llc_fast.reference import NoiseKey

_CHECKED_BATCHES = 8
_SLACK = 1e-3
"""The part of L_B(w*)'s spread over minibatches that may stay unexplained."""
_NEGLIGIBLE = 1e-3
"""A difference of λ̂ that does not matter."""
_MAX_SAMPLES = 2**27
"""A gibibyte of losses."""


class Baseline:
    """b_B = L_B(w*) − L(w*) of any minibatch B, from the loss at w* of every sample: a gather and a sum.

    A chain's loss less this, L_B(w_t) − L_B(w*) + L(w*), has the expectation of L_B(w_t), since b_B has that of zero
    whatever w_t is, but not the noise that the two share: how hard the samples of the minibatch are.

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
class AnchorLosses:
    """The losses at w*.

    Attributes:
        mean: L(w*), over the whole data set.
        samples: of every sample, float64 ``[n]``; None if they can't be had.
        unpaired: why chains are not paired with what their minibatches lose at w*; empty if they are.
    """

    mean: float
    samples: NDArray[np.float64] | None
    unpaired: str


def losses_at_anchor(posterior: Posterior, nbeta: float, seed: int = 0) -> AnchorLosses:
    """L(w*), and the losses that it is the mean of where a minibatch's loss is the mean of its samples' losses.

    One pass over the data either way. Whether the means agree is checked on minibatches, in other company than the
    samples were evaluated in: a loss weighted by tokens, batch statistics and augmentation show there.

    Args:
        posterior: the model, its loss and data.
        nbeta: nβ, which says what difference of losses matters.
        seed: of the minibatches.

    Raises:
        ValueError: L(w*) is not finite, or the data give no sample.
    """
    unpaired = _why_not(posterior)
    if not unpaired:
        try:
            # Where torch would go through the samples one by one it warns; too slow for a whole data set.
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*performance drop")
                samples = _all_samples(posterior, nbeta, seed)
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            unpaired = f"the loss of single samples can't be had: {first_line}"
        else:
            if samples is not None:
                # One parameter alone spreads the draws of λ̂ by 0.7.
                is_even = nbeta * _spread(posterior, samples) < _NEGLIGIBLE
                return AnchorLosses(float(samples.mean()), samples, _EVEN if is_even else "")
            unpaired = _NOT_THE_MEAN
    return AnchorLosses(posterior.full_loss(), None, unpaired)


_NOT_THE_MEAN = (
    "a minibatch's loss is not the mean of what its samples lose by themselves (batch statistics, a loss weighted by "
    "tokens, augmentation)"
)


_EVEN = "the loss at w* is the same on all minibatches, or nearly"


def _why_not(posterior: Posterior) -> str:
    """What is known to stand in the way before anything is computed."""
    source = posterior.source
    if not isinstance(source, IndexedSource):
        return "a loader does not tell which samples it gives"
    if source.is_full_batch:
        return "a minibatch is the whole data set"
    if not posterior.has_tensor_batches:
        return "batches hold more than tensors"
    if posterior.is_random:
        return "the model draws random numbers"
    if posterior.writes_buffers:
        return "the model writes to its buffers"
    if (source.num_samples or 0) > _MAX_SAMPLES:
        return f"more than {_MAX_SAMPLES} samples"
    return ""


def _all_samples(posterior: Posterior, nbeta: float, seed: int) -> NDArray[np.float64] | None:
    """The losses of all samples at w*; None if minibatches lose something else than the mean of theirs."""
    source, buffers = posterior.source, posterior.fresh_buffers()
    assert isinstance(source, IndexedSource)
    indices = source.index_buffer(1)

    def agrees(step: int, samples: NDArray[np.float64] | None = None) -> bool:
        source.draw(NoiseKey(seed, step=step), indices)
        pieces = posterior.pieces(source.gather(indices))
        loss = torch.stack([posterior.evaluate(posterior.anchor, b, buffers, share).loss for b, share in pieces]).sum()
        if samples is None:  # read again: a model may work in place on its input
            own = _sample_losses(posterior, source.gather(indices))
        else:
            own = samples[indices[0].cpu().numpy()]
        slack = _SLACK * _spread(posterior, own) + 4 * torch.finfo(loss.dtype).eps * float(np.abs(own).mean())
        return bool(abs(float(loss) - own.mean()) <= slack + _NEGLIGIBLE / nbeta)

    if not agrees(0):  # seen before the pass over all
        return None
    samples = np.concatenate([_sample_losses(posterior, batch) for batch, _ in source.full()])
    if not np.isfinite(samples).all() or not all(agrees(step, samples) for step in range(_CHECKED_BATCHES)):
        return None
    return samples


def _sample_losses(posterior: Posterior, batch: Batch) -> NDArray[np.float64]:
    pieces = split_batch(batch, posterior.microbatch_size)
    return np.concatenate([posterior.sample_losses(piece).to("cpu", torch.float64).numpy() for piece, _ in pieces])


def _spread(posterior: Posterior, samples: NDArray[np.float64]) -> float:
    return float(samples.std()) / math.sqrt(posterior.source.batch_size or 1)
