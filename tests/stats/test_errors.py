"""Standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from series import ar1

from llc_fast.stats import errors


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize(("phi", "noise"), [(0.0, 0.0), (0.9, 0.0), (0.97, 0.0), (0.99, 0.0), (0.97, 3.0)])
def test_standard_error_is_the_spread_of_means(phi: float, noise: float, chains: int) -> None:
    """Of chains with known autocorrelation, also beneath the noise of minibatches; and not of four chains only.

    Means of N draws have the variance (1 + φ)/(1 − φ)/N, less their ends. A root mean square of 200 standard
    errors is known to 5 %, for the least degrees of freedom, three; the largest of three estimates is 10 to 20 % large.
    """
    rng, runs, length = np.random.default_rng(5), 200, 4000
    x = ar1(rng, runs * chains, length, phi) + noise * rng.standard_normal((runs * chains, length))
    k = np.arange(1, length)
    exact = (1 + noise**2 + 2 * ((1 - k / length) * phi**k).sum()) / (length * chains)
    found = [errors.standard_error(run) for run in x.reshape(runs, chains, length)]
    assert 0.85 < math.sqrt(np.mean([e.value**2 for e in found]) / exact) < 1.3
    means = x.reshape(runs, -1).mean(axis=1)
    inside = np.mean([abs(m) <= e.quantile(0.95) * e.value for m, e in zip(means, found, strict=True)])
    assert inside >= 0.89  # 95 % of 200 runs, less four standard errors: 88.8 %
