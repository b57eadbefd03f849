"""Which of many numbers differ from zero: p-values by Student's t, and the false discovery rate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def t_quantile(prob: float, degrees_of_freedom: float) -> float:
    """Half the width of a central interval with probability `prob`, in standard errors; NaN below one degree."""
    if degrees_of_freedom < 1:
        return math.nan
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.5 + prob / 2))


def p_values(z: ArrayLike, degrees_of_freedom: ArrayLike, *, one_sided: bool = False) -> NDArray[np.float64]:
    """P(|T| ≥ |z|) for Student's t; with `one_sided`, P(T ≥ z). NaN where z is, or without a degree of freedom."""
    from scipy.special import stdtr

    statistic, degrees = np.asarray(z, np.float64), np.asarray(degrees_of_freedom, np.float64)
    degrees = np.where(degrees >= 1, degrees, math.nan)
    found: NDArray[np.float64] = stdtr(degrees, -statistic) if one_sided else 2 * stdtr(degrees, -np.abs(statistic))
    return found


def benjamini_hochberg(p: NDArray[np.float64], q: float = 0.05) -> NDArray[np.bool_]:
    """Which hypotheses to reject so that at most the share `q` of these is true in expectation.

    Those with p up to the largest p_(k) ≤ q·k/m, of m sorted ones (Benjamini & Hochberg 1995). NaN is no hypothesis and
    False.

    Raises:
        ValueError: `q` is not between 0 and 1.
    """
    if not 0 < q < 1:
        raise ValueError(f"q={q} must be between 0 and 1.")
    known = np.sort(p[np.isfinite(p)])
    below = np.flatnonzero(known <= q * np.arange(1, len(known) + 1) / max(len(known), 1))
    limit = known[below[-1]] if len(below) else -math.inf
    with np.errstate(invalid="ignore"):
        rejected: NDArray[np.bool_] = p <= limit
    return rejected
