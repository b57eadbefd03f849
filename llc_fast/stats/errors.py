"""Standard errors of the mean of autocorrelated draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.convergence import error_within


class StandardError(NamedTuple):
    """A standard error and the degrees of freedom it was estimated with."""

    value: float
    degrees_of_freedom: int

    def quantile(self, prob: float) -> float:
        """Half the width of a central interval with probability `prob`, in standard errors (Student's t)."""
        if self.degrees_of_freedom < 1:
            return math.nan
        from scipy.special import stdtrit

        return float(stdtrit(self.degrees_of_freedom, 0.5 + prob / 2))


def standard_error(draws: NDArray[np.float64]) -> StandardError:
    """Standard error of the mean of autocorrelated draws ``[chain, draw]``: the largest of three estimates.

    - Batch means (Flegal & Jones 2010): each chain is cut into about ∛draws consecutive batches. The variance of their
      means within chains shows weak, slow correlations that the noise of minibatches hides in single autocorrelations.
    - The autocorrelation time, see :func:`llc_fast.stats.convergence.error_within`, which may exceed a batch. It is a
      sum over about 3 times as many lags, of either sign, which leaves draws / (3 times) degrees of freedom.
    - The variance between chains, which also shows chains that settled in different places.

    Each may be too small, by chance or because of what it can't see; none is too large by design.
    """
    chains, length = draws.shape
    candidates = []
    if chains and length >= 4:
        batches = math.ceil(length ** (1 / 3))
        means = batch_means(draws, batches)
        within = means.var(axis=1, ddof=1).mean()
        candidates.append(StandardError(math.sqrt(within / (chains * batches)), chains * (batches - 1)))
        error, variance = error_within(draws), float(draws.var(axis=1).mean())
        effective = chains * variance / error**2 if error > 0 else math.nan
        if math.isfinite(effective):
            candidates.append(StandardError(error / math.sqrt(chains), max(1, int(effective / 3))))
    if chains >= 2:
        between = draws.mean(axis=1).var(ddof=1)
        candidates.append(StandardError(math.sqrt(between / chains), chains - 1))
    return max(candidates, default=StandardError(math.nan, 0))


def batch_means(draws: NDArray[np.float64], batches: int) -> NDArray[np.float64]:
    """Means ``[chain, batch]`` of consecutive batches of equal length; draws left over are dropped at the start."""
    chains, length = draws.shape
    size = length // batches
    means: NDArray[np.float64] = draws[:, length - batches * size :].reshape(chains, batches, size).mean(axis=2)
    return means
