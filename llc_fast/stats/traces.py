"""What traces show: a trend, slow fluctuations, burn-in, spikes, chains that disagree."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.convergence import error_within, ess_mean
from llc_fast.stats.errors import batch_means, standard_error


class Trend(NamedTuple):
    """The change of the mean from the first draw to the last, and its standard error."""

    value: float
    stderr: float


def trend(draws: NDArray[np.float64]) -> Trend:
    """The trend of draws ``[chain, draw]``: a line through batch means, fitted by least squares, times its length.

    The error is the larger of two: from the residuals of about √draws batch means, long enough to be nearly
    independent, and from the spread of the chains' slopes. NaN with fewer than nine draws.
    """
    chains, length = draws.shape
    batches = math.isqrt(length)
    if not chains or batches < 3:
        return Trend(math.nan, math.nan)
    means = batch_means(draws, batches)
    time = (np.arange(batches) - (batches - 1) / 2) / batches
    slopes = means @ time / (time @ time)
    residuals = means - means.mean(axis=1, keepdims=True) - np.outer(slopes, time)
    variances = [float((residuals**2).sum()) / (chains * (batches - 2)) / (time @ time)]
    if chains > 1:
        variances.append(float(slopes.var(ddof=1)))
    return Trend(float(slopes.mean()), math.sqrt(max(variances) / chains))


class SlowPart(NamedTuple):
    """Slow fluctuations, which the noise of single draws hides.

    Attributes:
        times: length of a chain in their autocorrelation times.
        size: their standard deviation, in units of the draws.
    """

    times: float
    size: float


def slow_part(draws: NDArray[np.float64]) -> SlowPart:
    """The part of draws ``[chain, draw]`` that means of about √draws consecutive ones have in common with the next.

    Where most of the variance of single draws is minibatch noise, R̂ and effective sample sizes are those of the noise,
    which has no autocorrelation and hides chains that have hardly moved. Batch means average it away. NaN with fewer
    than 256 draws: 16 means do not determine an autocorrelation time.
    """
    chains, length = draws.shape
    if not chains or length < 256:
        return SlowPart(math.nan, math.nan)
    means = batch_means(draws, math.isqrt(length))
    away = means - means.mean()
    shared = float((away[:, 1:] * away[:, :-1]).mean())
    return SlowPart(ess_mean(means) / chains, math.sqrt(max(shared, 0.0)))


def burnin_needed(losses: NDArray[np.float64], num_windows: int = 100) -> int:
    """Steps until a loss trace ``[chain, step]``, burn-in included, has reached its plateau.

    The mean over chains is smoothed over windows of a hundredth of the run. The plateau is the mean of the windows of
    the second half (if there is none, see :func:`trend`). The trace has reached it once it is within three standard
    deviations of these windows, unless it is beyond five again later in the first half.
    """
    size: int = max(1, losses.shape[1] // num_windows)
    count = losses.shape[1] // size
    if not losses.size or count < 8:
        return 0
    windows = losses[:, : count * size].mean(axis=0).reshape(count, size).mean(axis=1)
    late = windows[count // 2 :]
    distance = np.abs(windows - late.mean()) / max(float(late.std(ddof=1)), 1e-300)
    entered = int(np.argmax(distance <= 3))
    beyond = [int(k) for k in np.flatnonzero(distance[: count // 2] > 5)]
    return size * max(entered, 1 + max(beyond, default=-1))


_FALL_WINDOWS, _FALL_ERRORS = 20, 5.0
"""Parts of a trace that are looked at for a fall, and standard errors that their mean is below 0."""


def fall(excess: NDArray[np.float64]) -> float:
    """How far a trace ``[chain, step]`` of nβ·(L − L(w*)), burn-in included, goes below 0: at a minimum it never does.

    It is the lowest mean of a twentieth of the run, over all chains, where that is below 0 for certain; 0 if it is not.
    NaN with fewer than 160 steps.
    """
    chains, length = excess.shape
    size = length // _FALL_WINDOWS
    if not chains or size < 8:
        return math.nan
    windows = excess[:, : size * _FALL_WINDOWS].reshape(chains, _FALL_WINDOWS, size)
    lowest = windows[:, int(windows.mean(axis=(0, 2)).argmin())]
    value = float(lowest.mean())
    return -value if value < -_FALL_ERRORS * standard_error(lowest).value else 0.0


def spike_share(draws: NDArray[np.float64]) -> float:
    """The share of the mean of draws ``[chain, draw]`` that comes from spikes.

    A spike is further above the median than five times the distance of the 99 % quantile. Draws of a chi-square
    distribution, which a regular model has, are no spikes: of a million with one degree of freedom the largest is at
    3.9 times.
    """
    if not draws.size:
        return math.nan
    median, high = np.quantile(draws, [0.5, 0.99])
    cut, mean = median + 5 * (high - median), abs(float(draws.mean()))
    return float(np.maximum(draws - cut, 0).mean()) / mean if mean > 0 else math.nan


def chain_spread(draws: NDArray[np.float64]) -> float:
    """Variance of the chain means, over that expected from fluctuations within chains, over a quantile of this ratio.

    Above 1 for equal distributions about once in 10⁵ runs (Wilson & Hilferty's χ² quantile). NaN with fewer than two
    chains.
    """
    chains = len(draws)
    within = error_within(draws)
    if chains < 2 or not within > 0:
        return math.nan
    share = 2 / (9 * (chains - 1))
    chance = (1 - share + 4.26 * math.sqrt(share)) ** 3
    return float(draws.mean(axis=1).var(ddof=1)) / within**2 / chance
