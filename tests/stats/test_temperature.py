"""λ and its multiplicity from temperature, on laws that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llc_fast.problems.products import Box, Gaussian, ProductRegression
from llc_fast.stats.temperature import TemperatureFit, fit_temperature

NBETA = np.logspace(1, 6, 11)


def _of_model(model: ProductRegression, error: float, seed: int | None = None) -> TemperatureFit:
    mean = np.array([model.expected_excess(t, Box()) for t in NBETA])
    noise = 0.0 if seed is None else np.random.default_rng(seed).standard_normal(len(mean))
    return fit_temperature(NBETA, mean * (1 + error * noise), error * mean)


MODELS = [(4, 1, 0), (1, 1, 1), (1, 1, 2), (3, 2, 1)]


@pytest.mark.parametrize(("inputs", "outputs", "power"), MODELS)
def test_exact_values_of_singular_models(inputs: int, outputs: int, power: int) -> None:
    """By quadrature, with errors of 0.2 %: λ within two errors, which are at most 6 %, and the right m."""
    model = ProductRegression(inputs, outputs, power)
    found, truth = _of_model(model, 2e-3), model.learning_coefficient
    assert abs(found.value - truth.value) < 2 * found.stderr < 0.12 * truth.value
    assert found.multiplicity == truth.multiplicity
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.stderr == pytest.approx(math.hypot(found.sampling_error, found.form_error))
    # What a single temperature gives is further off wherever there is a logarithm, or a slow power.
    if truth.multiplicity > 1:
        assert abs(found.value - truth.value) < 0.25 * abs(model.expected_excess(1e6, Box()) - truth.value)


def test_noise_is_in_the_error() -> None:
    """Over six sets of noisy values: errors are no smaller than the spread, and m is mostly right."""
    model = ProductRegression(1, 1, 1)
    fits = [_of_model(model, 5e-3, seed) for seed in range(6)]
    z = np.array([(fit.value - 0.5) / fit.stderr for fit in fits])
    assert np.abs(z).max() < 2.5 and np.mean(z**2) < 1.5
    assert sum(fit.multiplicity == 2 for fit in fits) >= 4
    assert all(fit.form_error > 0 for fit in fits)


def test_known_forms() -> None:
    """Each form recovers itself, in any order and unit of nβ."""
    constant = fit_temperature(NBETA, np.full(11, 1.5), np.full(11, 1e-3))
    assert constant.fits[0].form == "constant" and constant.multiplicity == 1 and constant.value == pytest.approx(1.5)
    power = 0.75 - 0.5 * 0.8 * NBETA**-0.5 / (1 - 0.8 * NBETA**-0.5)
    found = fit_temperature(NBETA[::-1], power[::-1], 1e-3 * power[::-1])
    assert found.multiplicity == 1 and abs(found.value - 0.75) < 2 * found.stderr < 0.02
    assert found.fits[0].form == "next exponent" and math.exp(found.fits[0].parameters[1]) == pytest.approx(
        0.5, abs=0.02
    )
    logs = np.log(NBETA) + 1
    cubic = 2 - 2 / logs
    found = fit_temperature(NBETA, cubic, 1e-3 * cubic)
    assert found.probabilities[3] > 0.9 and abs(found.value - 2) < 2 * found.stderr
    other = fit_temperature(1e3 * NBETA, cubic, 1e-3 * cubic)
    assert other.value == pytest.approx(found.value, abs=1e-4) and other.multiplicity == 3
    assert fit_temperature(NBETA, cubic, 1e-3 * cubic, max_multiplicity=2).probabilities.keys() == {1, 2}


def test_localized_by_a_gaussian() -> None:
    """The prior that γ gives has the same λ and m, at the origin."""
    model = ProductRegression(1, 1, 2)
    prior = Gaussian(1.0, np.zeros(1), np.zeros(1))
    mean = np.array([model.expected_excess(t, prior) for t in NBETA])
    found = fit_temperature(NBETA, mean, 2e-3 * mean)
    assert found.multiplicity == 1 and abs(found.value - 0.25) < 2 * found.stderr < 0.04


def test_intervals_and_words() -> None:
    found = fit_temperature(NBETA, np.full(11, 1.5), np.full(11, 1e-2))
    low, high = found.interval(0.95)
    assert high - low == pytest.approx(2 * 1.959964 * found.stderr) and low < found.value < high
    assert str(found).startswith("λ = 1.5") and "P(m = 1) = " in str(found)
    with pytest.raises(ValueError, match="prob must be between 0 and 1, got 1"):
        found.interval(1)


def test_what_can_not_be_fitted() -> None:
    with pytest.raises(ValueError, match="five different temperatures at least, got 4"):
        fit_temperature(NBETA[:4], np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="must be finite"):
        fit_temperature(NBETA, np.full(11, np.nan), np.ones(11))
    with pytest.raises(ValueError, match="must be finite, and nbeta and stderr positive"):
        fit_temperature(NBETA, np.ones(11), np.zeros(11))


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "outputs", "power"), [(2, 1, 1), (1, 2, 2), (1, 1, 3), (3, 1, 0), (2, 2, 1)])
def test_models_that_the_fit_was_not_made_with(inputs: int, outputs: int, power: int) -> None:
    """Errors of 1 %, eight sets of noise: the true m is never improbable, and λ within 2.5 errors, of 16 % at most."""
    model = ProductRegression(inputs, outputs, power)
    prior, truth = Gaussian(1.0, np.zeros(inputs), np.zeros(outputs if power else 0)), model.learning_coefficient
    mean = np.array([model.expected_excess(t, prior) for t in NBETA])
    right = 0
    for seed in range(100, 108):
        noise = np.random.default_rng(seed).standard_normal(len(mean))
        found = fit_temperature(NBETA, mean * (1 + 0.01 * noise), 0.01 * mean)
        assert abs(found.value - truth.value) < 2.5 * found.stderr < 0.4 * truth.value
        assert found.probabilities[truth.multiplicity] > 0.05
        right += found.multiplicity == truth.multiplicity
    assert right >= 4
