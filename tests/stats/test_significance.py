"""Which of many numbers differ from zero, against SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from llc_fast.stats.significance import benjamini_hochberg, p_values, t_quantile


@pytest.mark.parametrize("q", [0.01, 0.05, 0.3])
def test_false_discovery_rate(q: float) -> None:
    """As SciPy's adjusted p-values say; the shape stays, and NaN counts for nothing."""
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(60), rng.random(20) * 1e-3]).reshape(8, 10)
    expected = stats.false_discovery_control(p, axis=None).reshape(p.shape) <= q
    assert 0 < expected.sum() < p.size
    np.testing.assert_array_equal(benjamini_hochberg(p, q), expected)
    with_unknown = np.append(p.ravel(), [math.nan] * 50)
    np.testing.assert_array_equal(benjamini_hochberg(with_unknown, q), np.append(expected.ravel(), [False] * 50))


def test_by_hand() -> None:
    """0.02 and 0.03 are above q·k/m of their own place; the largest that is below takes them along."""
    assert benjamini_hochberg(np.array([0.9, 0.036, 0.035, 0.034, 0.033]), 0.05).tolist() == [False] + [True] * 4
    assert not benjamini_hochberg(np.array([0.9, 0.06, 0.05]), 0.05).any()
    assert benjamini_hochberg(np.array([]), 0.05).shape == (0,)
    assert not benjamini_hochberg(np.full(3, math.nan), 0.05).any()


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_is_between_0_and_1(q: float) -> None:
    with pytest.raises(ValueError, match=f"q={q} must be between 0 and 1"):
        benjamini_hochberg(np.array([0.1]), q)


def test_students_t() -> None:
    z = np.array([-3.0, 0.0, 1.5, math.nan])
    np.testing.assert_allclose(p_values(z, 7), 2 * stats.t.sf(np.abs(z), 7))
    np.testing.assert_allclose(p_values(z, 7, one_sided=True), stats.t.sf(z, 7))
    assert np.isnan(p_values(z, 0)).all() and np.isnan(p_values(1.0, math.nan))
    assert t_quantile(0.95, 31) == pytest.approx(stats.t.ppf(0.975, 31))
    assert math.isnan(t_quantile(0.95, 0))
