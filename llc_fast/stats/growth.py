"""How λ̂ grows with the length of the chains, and what it still lacks.

Chains start at w*, where nβ·(L − L(w*)) is 0. A direction of curvature a adds ½(1 − e^(−a·t)) at time t = ε·steps, so a
broad spectrum of them grows with the logarithm of the length, and singular directions more slowly than that. R̂ and
standard errors see nothing of it: all chains grow alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.errors import standard_error

SLOWEST, LIKELY = 0.25, 1.0
"""Powers p of the length T with which λ̂ is taken to approach its limit, λ − c/T^p. What has relaxed leaves c/T in a
mean. What diffuses crosses a distance √T, and singular directions are slower still: with ¼, 95 % intervals held λ of
nineteen in twenty development networks (docs/decisions/52-growth-is-an-error.md)."""
_WINDOWS, _LATEST = 5, 3
"""Windows that the slowest and the likely approach are fitted to."""
_LEAST = 16
"""Steps of a window."""
SIGNIFICANT = 2.0
"""Standard errors from which on what is lacking counts as part of the error."""


@dataclass(frozen=True)
class Growth:
    """The mean of a trace as a function of its length.

    Attributes:
        means: over the second half of the first T/2^k steps, the last of which is the mean of the second half of all.
        stderrs: of the means.
        rate: growth in the last doubling of the length, by the slowest approach.
        rate_stderr: its standard error.
        missing: what the last mean lacks by the slowest approach; negative where it falls.
        missing_stderr: its standard error.
        likely: what it lacks by the likely approach.
        likely_stderr: its standard error, half of the difference of the two approaches included.
    """

    means: tuple[float, ...] = ()
    stderrs: tuple[float, ...] = ()
    rate: float = math.nan
    rate_stderr: float = math.nan
    missing: float = math.nan
    missing_stderr: float = math.nan
    likely: float = math.nan
    likely_stderr: float = math.nan

    @property
    def is_significant(self) -> bool:
        return abs(self.missing) > SIGNIFICANT * self.missing_stderr


def growth(trace: NDArray[np.float64]) -> Growth:
    """The growth of a trace ``[chain, step]`` from its first step on, burn-in included.

    Means m_k over windows (T/2^(k+1), T/2^k] are fitted by λ − A·2^(p·k), weighted by their standard errors, which are
    enlarged where the fit is worse than they allow. A is what the last window lacks: by p = ¼ over five windows, the
    slowest approach, and by p = 1 over three.

    NaN for traces shorter than five windows of 16 steps.
    """
    windows = []
    end = trace.shape[1]
    while end - end // 2 >= _LEAST and end >= 2:
        windows.append(trace[:, end // 2 : end])
        end //= 2
    if not len(trace) or len(windows) < _WINDOWS:
        return Growth()
    means = np.array([float(w.mean()) for w in windows])
    errors = np.array([standard_error(w).value for w in windows])
    if not (np.isfinite(means).all() and np.isfinite(errors).all() and (errors > 0).all()):
        return Growth(tuple(means[::-1].tolist()), tuple(errors[::-1].tolist()))
    missing, missing_stderr = _lacking(means[:_WINDOWS], errors[:_WINDOWS], SLOWEST)
    likely, likely_stderr = _lacking(means[:_LATEST], errors[:_LATEST], LIKELY)
    step = 2**SLOWEST - 1
    return Growth(
        means=tuple(means[::-1].tolist()),
        stderrs=tuple(errors[::-1].tolist()),
        rate=missing * step,
        rate_stderr=missing_stderr * step,
        missing=missing,
        missing_stderr=missing_stderr,
        likely=likely,
        likely_stderr=math.hypot(likely_stderr, (missing - likely) / 2),
    )


def _lacking(means: NDArray[np.float64], errors: NDArray[np.float64], power: float) -> tuple[float, float]:
    """A of m_k = λ − A·2^(p·k), k = 0 the last window, and its standard error.

    NaN where only one window is known to any precision: a chain that was astronomically far off early in its run.
    """
    terms = np.stack([np.ones(len(means)), -(2.0 ** (power * np.arange(len(means))))], axis=1)
    weights = 1 / errors**2
    try:
        covariance = np.linalg.inv((terms.T * weights) @ terms)
    except np.linalg.LinAlgError:
        return math.nan, math.nan
    found = covariance @ ((terms.T * weights) @ means)
    excess = float((weights * (means - terms @ found) ** 2).sum()) / (len(means) - 2)
    return float(found[1]), math.sqrt(float(covariance[1, 1]) * max(1.0, excess))
