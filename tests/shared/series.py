"""Series with a known autocorrelation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Traces = NDArray[np.float64]


def ar1(rng: np.random.Generator, runs: int, length: int, phi: float) -> Traces:
    """Stationary autoregressive series with variance 1, ``[run, draw]``."""
    noise = rng.standard_normal((length, runs)) * math.sqrt(1 - phi**2)
    series = np.empty_like(noise)
    series[0] = rng.standard_normal(runs)
    for t in range(1, length):
        series[t] = phi * series[t - 1] + noise[t]
    return series.T
