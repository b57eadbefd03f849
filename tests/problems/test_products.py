"""Product regressions: λ against the closed forms, exact answers against integrals done another way, data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from closed_forms import crossing_mean, reduced_rank_mean

from llc_fast import theory
from llc_fast.problems.products import Box, Gaussian, ProductRegression, correlation


def test_learning_coefficients() -> None:
    """λ and m as `llc_fast.theory` has them, where it has the model."""
    for d in (1, 4):
        assert ProductRegression(d, power=0).learning_coefficient == theory.regular(d)
    for k in (1, 2, 3):
        assert ProductRegression(1, 1, k).learning_coefficient == theory.normal_crossing((1, k))
    for inputs, outputs in itertools.product((1, 2, 3), repeat=2):
        expected = theory.reduced_rank_regression(inputs, 1, outputs, 0)
        assert ProductRegression(inputs, outputs, 1).learning_coefficient == expected


def test_population_loss_is_the_mean_loss() -> None:
    """K by its formula, and the excess of ½‖y − prediction‖² over noiseless whitened data."""
    for inputs, outputs, power in ((4, 1, 0), (1, 1, 2), (3, 2, 1)):
        model, generator = ProductRegression(inputs, outputs, power), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        x, y = model.noisy_data(200, generator)
        assert torch.allclose(x.T @ x / 200, torch.eye(inputs), atol=1e-5)
        with torch.no_grad():
            noiseless = 0.5 * model(x).square().sum(dim=1).mean()
            assert float(model.population_loss()) == pytest.approx(float(noiseless), rel=1e-5)
            noisy = 0.5 * ((model(x) - y).square() - y.square()).sum(dim=1).mean()
            b = (model.b**power).double().numpy() if power else np.ones(1)
            cross = b @ correlation((x, y)) @ model.a.double().numpy()
            assert float(noisy) == pytest.approx(float(noiseless) - cross, rel=1e-4)
            scaled = model.excess(3 * model.a, 3 * model.b if power else None)
            assert float(scaled) == pytest.approx(3**model.degree * float(noiseless), rel=1e-5)
        assert model.num_parameters == sum(p.numel() for p in model.parameters())


def test_uniform_excess() -> None:
    """P(½a²b² < ε) = s(1 − log s) with s = √(2ε), in a box of any size."""
    model, count = ProductRegression(1, 1, 1), 200_000
    for width in (1.0, 0.5):
        found = model.uniform_excess(count, width, torch.Generator().manual_seed(2))
        s = math.sqrt(2 * 1e-4) / width**2
        expected = s * (1 - math.log(s))
        share = float((found < 1e-4).double().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected / count)


@pytest.mark.parametrize("nbeta", [30.0, 3000.0])
def test_without_noise(nbeta: float) -> None:
    """Against quadratures of other integrals, which have K without its factor ½."""
    for k in (1, 2):
        model = ProductRegression(1, 1, k)
        expected = crossing_mean((1, k), nbeta / 2, 2.0)
        assert model.expected_excess(nbeta, Gaussian.around(model, 2.0)) == pytest.approx(expected, rel=1e-4)
    model = ProductRegression(3, 2, 1)
    expected = reduced_rank_mean(3, 1, 2, nbeta / 2, 2.0)
    assert model.expected_excess(nbeta, Gaussian.around(model, 2.0)) == pytest.approx(expected, rel=1e-4)
    regular = ProductRegression(4, power=0)
    expected = 2 * nbeta / (nbeta + 2)
    assert regular.expected_excess(nbeta, Gaussian.around(regular, 2.0)) == pytest.approx(expected, rel=1e-5)
    # The box: E of ½nβa² over |a| ≤ 1, by parts.
    inside = math.sqrt(2 * math.pi / nbeta) * math.erf(math.sqrt(nbeta / 2))
    expected = 4 * (0.5 - math.exp(-nbeta / 2) / inside)
    assert regular.expected_excess(nbeta, Box()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prior", ["box", "gaussian"])
def test_with_noise(prior: str) -> None:
    """Against sums over a fine grid of all parameters, correlated data and a reference point away from the origin."""
    rng = np.random.default_rng(3)
    for inputs, outputs, power, points in ((1, 1, 1, 601), (1, 1, 2, 601), (1, 2, 1, 101), (2, 1, 1, 101)):
        model, nbeta = ProductRegression(inputs, outputs, power), 60.0
        noise = rng.normal(size=(outputs, inputs)) * 0.2
        center = rng.normal(size=inputs + outputs) * 0.4
        law: Box | Gaussian = Box(0.8) if prior == "box" else Gaussian(2.0, center[:inputs], center[inputs:])
        # Midpoints: of the box, or of what holds all but 10⁻⁸ of the Gaussian.
        line = (np.arange(points) + 0.5) / points * 2 - 1
        axes = [0.8 * line] * len(center) if prior == "box" else [c + 4.2 * line for c in center]
        w = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        a, c = w[:, :inputs], w[:, inputs:] ** power
        loss = 0.5 * (a**2).sum(axis=1) * (c**2).sum(axis=1) - np.einsum("no,oi,ni->n", c, noise, a)
        log_density = -nbeta * loss - (0 if prior == "box" else ((w - center) ** 2).sum(axis=1))
        density = np.exp(log_density - log_density.max())
        expected = nbeta * float(density @ loss / density.sum())
        assert model.expected_excess(nbeta, law, noise) == pytest.approx(expected, rel=2e-3, abs=1e-3)


def test_tends_to_the_learning_coefficient() -> None:
    """From below by (m − 1)/log nβ, up to what vanishes faster."""
    for options in ((4, 1, 0), (1, 1, 2), (3, 2, 1)):
        model = ProductRegression(*options)
        value = model.learning_coefficient.value
        assert model.expected_excess(1e9, Box()) == pytest.approx(value, rel=0.01)
    crossing = ProductRegression(1, 1, 1)
    for nbeta in (1e6, 1e9):
        # V(ε) = s(1 − log s), so that Z ~ (nβ)^(−½)(log nβ + constant): the shortfall's inverse grows like log nβ.
        shortfall = 0.5 - crossing.expected_excess(nbeta, Box())
        ahead = 0.5 - crossing.expected_excess(1000 * nbeta, Box())
        assert 1 / ahead - 1 / shortfall == pytest.approx(math.log(1000), rel=0.01)


def test_far_from_the_box_nothing_is_lost() -> None:
    """Data that pull out of the box: finite, and the density piles up at its edge."""
    model = ProductRegression(1, power=0)
    noise = np.array([[3.0]])  # the minimum is at a = 3
    found = model.expected_excess(1e5, Box(), noise) / 1e5
    assert found == pytest.approx(0.5 - 3.0, rel=1e-3)


@pytest.mark.parametrize("options", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (1, 2, 0)])
def test_refused(options: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"power={options[2]}"):
        ProductRegression(*options)
