"""What chains do not reach in wells, held against the exact law of Langevin steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llc_fast.stats.wells import Wells


@pytest.mark.parametrize("friction", [1.0, 0.5])
@pytest.mark.parametrize("num_burnin", [0, 300])
def test_variances_of_langevin_steps(friction: float, num_burnin: int) -> None:
    """Second moments of SGHMC's linear steps from w*, one by one: the energy they lack, to O(ε·a) of it."""
    eps, nbeta, pull, steps = 1e-3, 100.0, 0.5, 800
    h, counts = np.array([1e-3, 1e-2, 1e-1, 1.0]), np.array([7.0, 5.0, 3.0, 2.0])
    lacking = 0.0
    for curvature, count in zip(h, counts, strict=True):
        c, a = nbeta * curvature, nbeta * curvature + pull
        # (w, m) ← (w + m', m') with m' = (1 − α)·m − ε/2·a·w + √(εα)·ξ
        step = np.array([[1 - eps / 2 * a, 1 - friction], [-eps / 2 * a, 1 - friction]])
        noise = eps * (friction if friction < 1 else 1.0) * np.ones((2, 2))
        moments, energies = np.zeros((2, 2)), []
        for _ in range(steps):
            energies.append(0.5 * c * moments[0, 0])
            moments = step @ moments @ step.T + noise
        limit = np.linalg.solve(np.eye(4) - np.kron(step, step), noise.ravel())[0]
        lacking += count * (0.5 * c * limit - float(np.mean(energies[num_burnin:])))
    found = Wells(tuple(h), tuple(counts)).unreached(nbeta, pull, eps / friction, num_burnin, steps)
    assert found == pytest.approx(lacking, rel=0.05)
    assert 0 < found < Wells(tuple(h), tuple(counts)).unreached(nbeta, pull, eps / friction, num_burnin, steps // 2)


def test_limits() -> None:
    """Nothing is reached at once, everything in the end; without draws nothing is known; no wells lack nothing."""
    wells = Wells((1.0, 4.0), (3.0, 2.0))
    assert wells.unreached(2.0, 1.0, 0.0, 0, 10) == pytest.approx(0.5 * (3 * 2 / 3 + 2 * 8 / 9))
    assert wells.unreached(2.0, 1.0, 1.0, 1000, 2000) == 0
    assert math.isnan(wells.unreached(2.0, 1.0, 1.0, 10, 10))
    assert Wells().unreached(2.0, 1.0, 1.0, 0, 10) == 0
