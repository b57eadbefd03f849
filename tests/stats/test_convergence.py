"""R̂ and effective sample sizes, as ArviZ has them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from series import ar1

from llc_fast.stats import convergence


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.99, -0.6, -0.95])
@pytest.mark.parametrize("kind", ["plain", "tied", "apart", "drifting", "heavy"])
def test_convergence_equals_arviz(kind: str, phi: float) -> None:
    """On independent, slow, antithetic, tied, disagreeing, drifting and heavy-tailed chains, odd and even in length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    rng = np.random.default_rng(8)
    for chains, length in ((2, 4), (2, 5), (3, 21), (4, 100), (6, 257), (1, 60)):
        x = ar1(rng, chains, length, phi)
        x = {
            "plain": lambda x: x,
            "tied": np.round,
            "apart": lambda x: x + np.arange(len(x))[:, None],
            "drifting": lambda x: x + np.linspace(0, 3, x.shape[1]),
            "heavy": lambda x: np.sinh(2 * x),
        }[kind](x)
        with np.errstate(all="ignore"):  # ArviZ divides by the variance of constant chains
            assert convergence.ess_bulk(x) == pytest.approx(float(arviz.ess(x)), rel=1e-8, nan_ok=True)
            assert convergence.ess_tail(x) == pytest.approx(
                float(arviz.ess(x, method="tail", prob=(0.05, 0.95))), rel=1e-8, nan_ok=True
            )
            if chains > 1:  # ArviZ gives none for one chain; its two halves do
                assert convergence.r_hat(x) == pytest.approx(float(arviz.rhat(x)), rel=1e-8, nan_ok=True)


def test_autocorrelation() -> None:
    """By its definition, for each chain with its own mean; NaN for one that stands still."""
    x = ar1(np.random.default_rng(0), 3, 50, 0.7) + np.array([[0], [5], [9]])
    x[2] = 9.0
    found = convergence.autocorrelation(x)
    for row, rho in zip(x[:2], found, strict=False):
        away = row - row.mean()
        expected = [(away[: 50 - lag] * away[lag:]).sum() / (away**2).sum() for lag in range(50)]
        np.testing.assert_allclose(rho, expected, atol=1e-12)
    assert np.isnan(found[2]).all() and found.shape == (3, 50)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_autocorrelation_time(phi: float) -> None:
    """(1 + φ)/(1 − φ) of AR(1) chains, whatever their means: of 80,000 draws, to five standard errors or less."""
    x = ar1(np.random.default_rng(0), 4, 20000, phi) + np.array([[0], [5], [9], [7]])
    assert convergence.autocorrelation_time(x) == pytest.approx((1 + phi) / (1 - phi), rel=0.15)
    assert math.isnan(convergence.autocorrelation_time(np.full((2, 50), 0.7)))
    assert math.isnan(convergence.autocorrelation_time(x[:, :3]))


def test_r_hat_of_moments() -> None:
    """The square root of the variance of all halves' draws over that within, by its formula."""
    x = np.random.default_rng(0).standard_normal((3, 40)) + np.array([[0], [0], [2]])
    halves = x.reshape(6, 20)
    between, within = halves.mean(axis=1).var(ddof=1), halves.var(axis=1, ddof=1).mean()
    assert convergence.split_r_hat(x) == pytest.approx(math.sqrt(19 / 20 + between / within))
    assert math.isnan(convergence.split_r_hat(x[:, :3]))


def test_convergence_of_what_can_not_be_judged() -> None:
    """NaN without draws, with three of them, or where one is not finite; constant draws count as they are."""
    for x in (np.zeros((0, 50)), np.zeros((2, 3)), np.array([[1, 2, math.nan, 4, 5]])):
        for statistic in (convergence.r_hat, convergence.ess_bulk, convergence.ess_tail):
            assert math.isnan(statistic(x))
    assert convergence.ess_bulk(np.ones((2, 10))) == 20 and math.isnan(convergence.r_hat(np.ones((2, 10))))
