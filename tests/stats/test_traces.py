"""Trend, burn-in, spikes, spread of chains and the slow part of a trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
from series import ar1

from llc_fast.stats import convergence, traces


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_trend_has_the_error_it_says(phi: float) -> None:
    """Of 300 runs with a trend of 2, the mean is right, and the spread is what each run says of itself."""
    noise = ar1(np.random.default_rng(1), 4 * 300, 900, phi).reshape(300, 4, 900)
    found = [traces.trend(x + np.linspace(-1, 1, 900)) for x in noise]
    values, errors = np.array([d.value for d in found]), np.array([d.stderr for d in found])
    assert abs(values.mean() - 2) < 4 * values.std() / math.sqrt(300)
    # Of two estimates the larger is taken, which errs by some 20 % on the safe side.
    assert 0.95 < errors.mean() / values.std() < 1.5
    assert math.isnan(traces.trend(np.ones((3, 8))).value)


def test_burnin_is_where_the_plateau_begins() -> None:
    """An approach with time constant 100 comes within three of the noise's deviations after 100·log(10/0.09) steps."""
    rng = np.random.default_rng(2)
    t = np.arange(4000)
    noise = 0.1 * rng.standard_normal((4, 4000))  # 0.008 in the mean of four chains and windows of 40
    expected = 100 * math.log(10 / (3 * 0.1 / math.sqrt(160)))
    assert abs(traces.burnin_needed(noise - 10 * np.exp(-t / 100)) - expected) <= 120
    assert traces.burnin_needed(noise) == 0
    overshoot = noise + 30 * np.exp(-t / 100) - 40 * np.exp(-t / 50)  # crosses the plateau on its way up
    assert traces.burnin_needed(overshoot) > 500
    assert traces.burnin_needed(np.zeros((0, 100))) == traces.burnin_needed(np.ones((2, 5))) == 0


def test_spikes() -> None:
    """Chi-square draws of any number of degrees are none; a few draws far above them are."""
    rng = np.random.default_rng(3)
    for freedom in (1, 2, 10):
        draws = rng.chisquare(freedom, (4, 100_000))
        assert traces.spike_share(draws) == 0
    draws = rng.chisquare(4, (4, 1000))
    draws[1, 500:503] = 400
    assert traces.spike_share(draws) == pytest.approx(3 * 400 / draws.sum(), rel=0.2)


def test_chain_spread() -> None:
    """Above 1 in no more than one of a thousand runs that agree, in all that don't."""
    noise = ar1(np.random.default_rng(4), 4 * 1000, 900, 0.5).reshape(1000, 4, 900)
    assert np.mean([traces.chain_spread(x) > 1 for x in noise]) <= 1e-3
    apart = 0.5 * np.array([[0], [1], [0], [-1]])
    assert all(traces.chain_spread(x + apart) > 1 for x in noise[:50])
    assert math.isnan(traces.chain_spread(noise[0][:1]))


def test_slow_part() -> None:
    """Of a slow series beneath noise nine times as strong: its size, and how many of its times a chain spans."""
    rng = np.random.default_rng(9)
    found = []
    for phi in (0.5, 0.99, 0.998):
        slow = ar1(rng, 4 * 50, 1024, phi).reshape(50, 4, -1)
        found.append([traces.slow_part(x + 3 * rng.standard_normal(x.shape)) for x in slow])
    fast, middle, slowest = (np.median([(f.times, f.size) for f in row], axis=0) for row in found)
    # 32 batches, all of them independent; (1 + φ)/(1 − φ) = 199 draws, a fifth of a chain; and 999, a whole one.
    assert fast[0] > 25 and 4 < middle[0] < 9 and slowest[0] < 3
    assert fast[1] < 0.25 and 0.6 < middle[1] < 1 and 0.6 < slowest[1] < 1.2
    # By draws alone the chains look well mixed.
    assert np.median([convergence.ess_bulk(x + 6 * rng.standard_normal(x.shape)) for x in slow]) > 400
    assert math.isnan(traces.slow_part(slow[0][:, :255]).times)


@pytest.mark.parametrize("phi", [0.0, 0.8, 0.95])
def test_no_fall_at_a_minimum(phi: float) -> None:
    """Chains that begin at 0 and rise to a plateau hardly ever fall; noise alone, of mean 0, does so in few runs."""
    noise = ar1(np.random.default_rng(3), 4 * 300, 2000, phi).reshape(300, 4, 2000)
    rise = 5 * (1 - np.exp(-np.arange(2000) / 200))
    assert not any(traces.fall(x + rise) for x in noise)
    assert sum(traces.fall(x) > 0 for x in noise) <= 0.05 * 300
    assert math.isnan(traces.fall(np.ones((4, 100))))


def test_a_fall_is_as_deep_as_its_lowest_part() -> None:
    """Down to −4 after a fifth of the run, and up again: the mean of a twentieth there."""
    t = np.arange(4000) / 4000
    path = -4 * np.exp(-(((t - 0.2) / 0.15) ** 2)) + 3 * t
    expected = -path.reshape(20, 200).mean(axis=1).min()
    found = traces.fall(path + 0.3 * np.random.default_rng(4).standard_normal((4, 4000)))
    assert found == pytest.approx(expected, abs=0.05)
