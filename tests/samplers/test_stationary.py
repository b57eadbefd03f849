"""The chain's stationary law against the closed form of discretized Langevin dynamics."""

from __future__ import annotations

import math

import pytest
import torch

import llc_fast

COPIES = 200_000  # independent one-dimensional chains in one tensor


def _variance(lr: float, stiffness: float, noise_level: float = 1.0) -> float:
    """Of w ← (1 − εa/2) w + σ√ε ξ: σ²ε / (1 − (1 − εa/2)²) = σ² / (a (1 − εa/4))."""
    return noise_level**2 / (stiffness * (1 - lr * stiffness / 4))


def _run(steps: int, curvature: float, **options: float) -> torch.Tensor:
    w = torch.nn.Parameter(torch.zeros(COPIES))
    optimizer = llc_fast.SGLD([w], seed=5, **options)
    for _ in range(steps):
        w.grad = curvature * w.detach()
        optimizer.step()
    return w.detach().double()


@pytest.mark.parametrize("product", [0.1, 1.0, 3.0], ids="εa = {}".format)
def test_gaussian_variance(product: float) -> None:
    """Small, medium and nearly unstable steps: mean, variance and kurtosis within five standard errors."""
    nbeta, curvature, localization, weight_decay = 40.0, 0.5, 3.0, 2.0
    stiffness = nbeta * curvature + localization + weight_decay
    lr = product / stiffness
    steps = math.ceil(20 / -math.log(abs(1 - product / 2)))  # the start is forgotten to e^-20
    options = {"lr": lr, "nbeta": nbeta, "localization": localization, "weight_decay": weight_decay}
    w = _run(steps, curvature, **options)
    exact = _variance(lr, stiffness)
    assert abs(float(w.mean())) < 5 * math.sqrt(exact / COPIES)
    assert abs(float(w.var()) / exact - 1) < 5 * math.sqrt(2 / COPIES)
    assert abs(float((w**4).mean()) / (3 * exact**2) - 1) < 5 * math.sqrt(96 / 9 / COPIES)


def test_noise_level_scales_the_spread() -> None:
    w = _run(200, 0.5, lr=0.01, nbeta=40.0, noise_level=0.3)
    assert abs(float(w.var()) / _variance(0.01, 20.0, 0.3) - 1) < 5 * math.sqrt(2 / COPIES)


def test_autocorrelation() -> None:
    """Successive draws have correlation (1 − εa/2): steps do not share noise."""
    w = torch.nn.Parameter(torch.zeros(COPIES))
    optimizer = llc_fast.SGLD([w], lr=0.02, nbeta=40.0, seed=5)
    for _ in range(150):
        w.grad = 0.5 * w.detach()
        before = w.detach().double().clone()
        optimizer.step()
    correlation = float(torch.corrcoef(torch.stack([before, w.detach().double()]))[0, 1])
    assert correlation == pytest.approx(1 - 0.02 * 20 / 2, abs=5 / math.sqrt(COPIES))


def test_reference_away_from_the_minimum() -> None:
    """The pull towards w* moves the mean to the balance of both forces."""
    w = torch.nn.Parameter(torch.full((COPIES,), 2.0))
    optimizer = llc_fast.SGLD([w], lr=0.01, nbeta=40.0, localization=20.0, seed=5)
    for _ in range(200):
        w.grad = 0.5 * w.detach()
        optimizer.step()
    exact = _variance(0.01, 40.0)
    assert float(w.detach().double().mean()) == pytest.approx(2.0 * 20 / 40, abs=5 * math.sqrt(exact / COPIES))
