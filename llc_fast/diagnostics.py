"""Error bars."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
    """Standard error of the mean of autocorrelated draws ``[chain, draw]``, by batch means over chains.

    Each chain is cut into about √draws consecutive batches, long enough that their means are nearly
    independent; the variance of the batch means within chains gives one estimate (Flegal & Jones 2010), the
    variance between chains another, which also sees chains that settled in different places. The larger of the
    two is returned: either may be too small by chance or by design, neither is too large by design.
    """
    chains, length = draws.shape
    candidates = []
    batches = math.isqrt(length)
    if chains and batches >= 2:
        size = length // batches
        means = draws[:, length - batches * size :].reshape(chains, batches, size).mean(axis=2)
        within = means.var(axis=1, ddof=1).mean()
        candidates.append(StandardError(math.sqrt(within / (chains * batches)), chains * (batches - 1)))
    if chains >= 2:
        between = draws.mean(axis=1).var(ddof=1)
        candidates.append(StandardError(math.sqrt(between / chains), chains - 1))
    return max(candidates, default=StandardError(math.nan, 0))
