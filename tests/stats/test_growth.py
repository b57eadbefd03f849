"""What λ̂ lacks, held against laws whose limit is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from series import ar1

from llc_fast.stats.growth import LIKELY, SIGNIFICANT, SLOWEST, growth


def _approaching(power: float, length: int = 4096, noise: float = 0.01) -> NDArray[np.float64]:
    """Chains whose window means are 10 − 3·(T/length)^−p, with little noise."""
    rng, trace, end = np.random.default_rng(0), np.empty((4, length)), length
    while end > 1:
        trace[:, end // 2 : end] = 10 - 3 * (end / length) ** -power
        end //= 2
    return trace + noise * rng.standard_normal(trace.shape)


def test_both_laws_are_recovered() -> None:
    """The limit is 3 above the last window under either law, to the noise of window means."""
    slow, fast = growth(_approaching(SLOWEST)), growth(_approaching(LIKELY))
    assert slow.missing == pytest.approx(3, abs=4 * slow.missing_stderr) and slow.missing_stderr < 0.01
    assert fast.likely == pytest.approx(3, abs=0.01)
    assert fast.missing > 3  # the slowest approach is an upper bound of the faster one
    assert slow.rate == pytest.approx(3 * (2**SLOWEST - 1), abs=0.01)
    assert slow.means[-1] == pytest.approx(7, abs=0.01) and slow.means[-2] == pytest.approx(
        10 - 3 * 2**SLOWEST, abs=0.01
    )


def test_a_falling_trace_is_too_high() -> None:
    found = growth(-_approaching(SLOWEST))
    assert found.is_significant and found.missing == pytest.approx(-3, abs=0.01)


def test_the_networks_that_were_silently_low() -> None:
    """Means over doubling windows as they were seen, with their error at the end: λ = 442 and 134."""
    for means, error, exact in (
        ((294, 320, 348, 368, 388, 403), 2.0, 442),
        ((94, 105, 111, 120, 122, 124.9), 0.5, 134),
    ):
        length = 4096
        # White noise that gives the last window its error, and none of the windows another mean.
        trace = error * math.sqrt(4 * length / 2) * np.random.default_rng(1).standard_normal((4, length))
        end = length
        for mean in reversed(means):
            window = trace[:, end // 2 : end]
            window += mean - window.mean()
            end //= 2
        found = growth(trace)
        assert found.is_significant
        assert means[-1] < exact < means[-1] + found.missing + 2 * error


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_equilibrium_is_left_alone(correlation: float) -> None:
    """Of stationary chains as many are significant as two standard errors allow: 4.6 %, ± 4 standard deviations."""
    rng, count = np.random.default_rng(2), 400
    traces = 10 + ar1(rng, 4 * count, 2000, correlation).reshape(count, 4, 2000)
    found = [growth(trace) for trace in traces]
    share = np.mean([g.is_significant for g in found])
    assert share < 0.046 + 4 * math.sqrt(0.046 * 0.954 / count)
    z = np.array([g.missing / g.missing_stderr for g in found])
    assert abs(z.mean()) < 4 / math.sqrt(count) and SIGNIFICANT == 2


def test_a_broad_spectrum_of_relaxing_directions() -> None:
    """Independent directions of curvature a, from their minimum: energy ½(1 − e^(−a·t)), so the limit is ½ of each.

    Rates from fast to far slower than the chain is long: what is lacking lies between nothing and the upper bound, and
    the extrapolation is nearer to the limit than the mean.
    """
    rng, steps, chains = np.random.default_rng(3), 4000, 4
    rates = np.geomspace(0.5, 2e-4, 400)
    decay = np.exp(-rates / 2)
    x = np.zeros((chains, len(rates)))
    trace = np.empty((chains, steps))
    for step in range(steps):
        trace[:, step] = 0.5 * (x**2).sum(axis=1)
        x = decay * x + np.sqrt(1 - decay**2) * rng.standard_normal(x.shape)
    found, limit = growth(trace), len(rates) / 2
    mean = found.means[-1]
    assert mean + 10 < limit < mean + found.missing + 2 * found.missing_stderr
    assert abs(mean + found.likely - limit) < limit - mean


def test_too_short_or_without_noise() -> None:
    for trace in (np.zeros((4, 100)), np.ones((4, 4000)), np.zeros((0, 4000)), np.full((2, 4000), np.nan)):
        found = growth(trace)
        assert math.isnan(found.missing) and not found.is_significant


def test_windows_that_were_astronomically_off() -> None:
    """One window alone has weight: what it lacks is unknown, and no error."""
    trace = 25 + np.random.default_rng(0).normal(size=(4, 1250))
    trace[:, :600] += 1e16 * np.random.default_rng(1).normal(size=(4, 600))
    found = growth(trace)
    assert math.isnan(found.likely) and not found.is_significant
    assert found.means[-1] == pytest.approx(trace[:, 625:].mean())
