"""Rank-normalized R̂ and effective sample sizes (Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021).

In NumPy, held equal to ArviZ's in the tests: importing ArviZ or scipy.stats takes 1 to 3.6 s, longer than many an
estimate. The normal quantile is the standard library's: scipy.special would cost each process 0.14 s, for 1 ms of work.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_MIN_DRAWS = 4  # two in each half


def r_hat(draws: NDArray[np.float64]) -> float:
    """Rank-normalized split-R̂ of draws ``[chain, draw]``: the larger of the bulk's and the folded draws'.

    NaN with fewer than four draws, or where something is not finite.
    """
    if not _is_valid(draws):
        return math.nan
    halves = _split(draws)
    folded = np.abs(halves - np.median(halves))
    return max(_plain_r_hat(_normal_scores(halves)), _plain_r_hat(_normal_scores(folded)))


def ess_bulk(draws: NDArray[np.float64]) -> float:
    """Effective number of independent draws for the centre of the distribution, over all chains ``[chain, draw]``."""
    return _ess(_normal_scores(_split(draws))) if _is_valid(draws) else math.nan


def ess_mean(draws: NDArray[np.float64]) -> float:
    """Effective number of independent draws for the mean, over all chains ``[chain, draw]``: no ranks, no halves."""
    return _ess(draws) if _is_valid(draws) else math.nan


def ess_tail(draws: NDArray[np.float64]) -> float:
    """The smaller of the effective sample sizes of the 5 % and the 95 % quantile."""
    if not _is_valid(draws):
        return math.nan
    return min(_ess(_split((draws <= _quantile(draws, prob)).astype(np.float64))) for prob in (0.05, 0.95))


def split_r_hat(draws: NDArray[np.float64]) -> float:
    """Split-R̂ of the moments of draws ``[chain, draw]``, without ranks: some 50 times as fast as :func:`r_hat`."""
    return _plain_r_hat(_split(draws)) if _is_valid(draws) else math.nan


def autocorrelation(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """ρ of draws ``[chain, draw]`` by lag, ``[chain, lag]``: autocovariances (over the length, at every lag) over the
    variance; NaN for a chain that does not move."""
    covariance = _autocovariance(draws)
    with np.errstate(all="ignore"):
        found: NDArray[np.float64] = covariance / np.where(covariance[:, :1] > 0, covariance[:, :1], math.nan)
    return found


def autocorrelation_time(draws: NDArray[np.float64]) -> float:
    """−1 + 2Σρ of draws ``[chain, draw]``, in draws, from the correlation within chains alone; chains share ρ.

    NaN with fewer than four draws, where something is not finite, or where nothing moves.
    """
    if not _is_valid(draws) or not np.ptp(draws, axis=1).any():
        return math.nan
    covariance = _autocovariance(draws).mean(axis=0)
    return _time(covariance / covariance[0]) if covariance[0] > 0 else math.nan


def _is_valid(draws: NDArray[np.float64]) -> bool:
    return draws.ndim == 2 and len(draws) > 0 and draws.shape[1] >= _MIN_DRAWS and bool(np.isfinite(draws).all())


def _split(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each chain as two: a chain with a trend then disagrees with itself."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def _quantile(draws: NDArray[np.float64], prob: float) -> float:
    """R's type 7, with the rounding of ArviZ: where a quantile falls on a draw, the last bit decides the comparison."""
    x = np.sort(draws, axis=None)
    place = len(x) * prob + (1 - prob)
    k = min(max(math.floor(place), 1), len(x) - 1)
    rest = place - k
    return float((1 - rest) * x[k - 1] + rest * x[k])


def _normal_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blom's normal scores of the ranks, ties at their average."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = counts.cumsum() - (counts - 1) / 2
    quantile = NormalDist().inv_cdf
    scores = np.array([quantile(prob) for prob in ((ranks - 3 / 8) / (values.size + 1 / 4)).tolist()])
    return scores[place.reshape(values.shape)]


def _plain_r_hat(chains: NDArray[np.float64]) -> float:
    length = chains.shape[1]
    between, within = length * chains.mean(axis=1).var(ddof=1), chains.var(axis=1, ddof=1).mean()
    if within > 0:
        return math.sqrt((between / within + length - 1) / length)
    return math.inf if between > 0 else math.nan


def _autocovariance(chains: NDArray[np.float64]) -> NDArray[np.float64]:
    """By FFT, ``[chain, lag]``, divided by the length at every lag."""
    length = chains.shape[1]
    transform = np.fft.rfft(chains - chains.mean(axis=1, keepdims=True), n=2 ** (2 * length - 1).bit_length(), axis=1)
    covariance: NDArray[np.float64] = np.fft.irfft(np.abs(transform) ** 2, axis=1)[:, :length] / length
    return covariance


def _ess(chains: NDArray[np.float64]) -> float:
    """Draws over the autocorrelation time, with disagreement between chains as correlation."""
    count, length = chains.shape
    if np.ptp(chains) < np.finfo(np.float64).resolution:
        return float(chains.size)
    covariance = _autocovariance(chains).mean(axis=0)
    within = covariance[0] * length / (length - 1)
    total = covariance[0] + (chains.mean(axis=1).var(ddof=1) if count > 1 else 0.0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    return float(chains.size / max(_time(rho), 1 / math.log10(chains.size)))


def error_within(draws: NDArray[np.float64]) -> float:
    """Standard error of the mean of one chain, from the autocorrelation within chains ``[chain, draw]`` alone.

    NaN with fewer than four draws, or where something is not finite.
    """
    if not _is_valid(draws):
        return math.nan
    covariance, length = _autocovariance(draws).mean(axis=0), draws.shape[1]
    if covariance[0] <= 0:
        return 0.0
    return math.sqrt(covariance[0] / (length - 1) * max(_time(covariance / covariance[0]), 1 / math.log10(draws.size)))


def _time(rho: NDArray[np.float64]) -> float:
    """The autocorrelation time −1 + 2Σρ of correlations by lag, cut off at Geyer's initial monotone sequence."""
    length = len(rho)
    pairs = rho[0 : 2 * (length // 2) : 2] + rho[1::2]
    most = max(0, math.ceil((length - 4) / 2))  # pairs that may be used
    ended = np.flatnonzero(pairs[:most] <= 0)
    used = int(ended[0]) if len(ended) else most
    last = rho[2 * used] if rho[2 * used] > 0 or pairs[used] >= 0 else 0.0
    return float(-1 + 2 * np.minimum.accumulate(pairs[:used]).sum() + last)
