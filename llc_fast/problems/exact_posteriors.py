"""Small problems whose posterior mean of nβ·(L − L(w*)) is known, in closed form or by quadrature.

The posterior is ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²), with L over all of the n = `SAMPLES` samples and nβ = n / log n. An
estimate that has no error but Monte Carlo error has this mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from llc_fast import default_nbeta

SAMPLES, LOCALIZATION = 1000, 1.0
"""n and γ of all problems."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ExactPosterior:
    """A model at w*, its data, and the exact answer.

    Attributes:
        model: at w*.
        data: (inputs, targets).
        loss_fn: of outputs and targets.
        answer: the exact posterior mean of nβ·(L − L(w*)).
        stiffness: nβ·h_max + γ, the largest curvature where chains typically are.
    """

    model: nn.Module
    data: tuple[Tensor, Tensor]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    answer: float
    stiffness: float


class Monomial(nn.Module):
    """f(x) = w₁w₂…·x, or w^power·x with a single w."""

    def __init__(self, factors: int, power: int) -> None:
        super().__init__()
        self.w, self.power = nn.Parameter(torch.zeros(factors)), power

    def forward(self, x: Tensor) -> Tensor:
        return self.w.pow(self.power).prod() * x


def linear_regression(noise: float) -> ExactPosterior:
    """Ten inputs whose scales differ by a factor of three, at the least-squares solution.

    In closed form: Σ ½·nβh/(nβh + γ) over the eigenvalues h of the Hessian.
    """
    x = _inputs(10, 1) * torch.linspace(0.5, 1.5, 10)
    y = x.sum(dim=1, keepdim=True) + noise * _inputs(1, 2)
    solution = torch.linalg.lstsq(x.double(), y.double()).solution[:, 0]
    curvature = default_nbeta(SAMPLES) * torch.linalg.eigvalsh(2 * x.double().T @ x.double() / SAMPLES)
    answer = float((0.5 * curvature / (curvature + LOCALIZATION)).sum())
    return ExactPosterior(_linear(solution), (x, y), mse_loss, answer, float(curvature.max()) + LOCALIZATION)


def monomial(factors: int, power: int) -> ExactPosterior:
    """:class:`Monomial` on data from f = 0, at w = 0: singular, L ∝ (w₁w₂…)² or w^(2·power)."""
    x = _inputs(1, 3)
    scale, nbeta = float(x.double().square().mean()), default_nbeta(SAMPLES)

    def loss(w: Array) -> Array:
        values: Array = scale * (w**power).prod(axis=-1) ** 2
        return values

    answer = by_quadrature(loss, np.eye(factors), width=7.0, points=4001)
    # In units of the prior's width, the curvature 2·nβ·w₂² along w₁; a few times the one of w⁴ at its typical w.
    stiffness = 2 * nbeta if factors > 1 else 12 * math.sqrt(nbeta)
    return ExactPosterior(
        Monomial(factors, power), (x, torch.zeros_like(x)), mse_loss, answer, stiffness + LOCALIZATION
    )


def logistic_regression() -> ExactPosterior:
    """Three parameters, at the maximum of likelihood."""
    x = _inputs(2, 4)
    uniform = torch.rand(SAMPLES, 1, generator=torch.Generator().manual_seed(5))
    y = (uniform < torch.sigmoid(x @ torch.tensor([[1.5], [-1.0]]) + 0.5)).float()
    design, target = torch.cat([x, torch.ones(SAMPLES, 1)], dim=1).double(), y[:, 0].double()
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):  # Newton
        p = torch.sigmoid(design @ w)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) / SAMPLES
        w = w - torch.linalg.solve(hessian, design.T @ (p - target) / SAMPLES)
    best = float(binary_cross_entropy_with_logits(design @ w, target))
    roots = torch.linalg.inv(torch.linalg.cholesky(default_nbeta(SAMPLES) * hessian)).T  # to units of the posterior

    def loss(offsets: Array) -> Array:
        pieces = torch.split(torch.from_numpy(offsets), 4096)
        logits = [(w + piece) @ design.T for piece in pieces]
        losses = [
            binary_cross_entropy_with_logits(z, target.expand_as(z), reduction="none").mean(dim=1) for z in logits
        ]
        excess: Array = torch.cat(losses).numpy() - best
        return excess

    answer = by_quadrature(loss, roots.numpy(), width=6.5, points=27)
    stiffness = default_nbeta(SAMPLES) * float(torch.linalg.eigvalsh(hessian).max()) + LOCALIZATION
    return ExactPosterior(_linear(w[:2], w[2:]), (x, y), binary_cross_entropy_with_logits, answer, stiffness)


def by_quadrature(loss: Callable[[Array], Array], axes: Array, width: float, points: int) -> float:
    """nβ·E[L − L(w*)] for `loss` of offsets ``[point, parameter]`` from w*, on a grid of ±`width` along `axes`."""
    nbeta, line, dimension = default_nbeta(SAMPLES), np.linspace(-width, width, points), len(axes)
    mass = total = 0.0
    for first in line:  # one slice at a time
        rest = np.meshgrid(*[line] * (dimension - 1), indexing="ij") if dimension > 1 else []
        flat = [r.ravel() for r in rest]
        grid = np.stack([np.full_like(flat[0], first) if flat else np.array([first]), *flat], axis=-1)
        offsets = grid @ axes.T
        excess = nbeta * loss(offsets)
        density = np.exp(-excess - LOCALIZATION / 2 * (offsets**2).sum(axis=-1))
        mass, total = mass + float(density.sum()), total + float((density * excess).sum())
    return total / mass


PROBLEMS: dict[str, Callable[[], ExactPosterior]] = {
    "linear, no noise": lambda: linear_regression(0.0),
    "linear, noisy": lambda: linear_regression(1.0),
    "(w₁w₂)²": lambda: monomial(2, 1),
    "w⁴": lambda: monomial(1, 2),
    "logistic": logistic_regression,
}


def _inputs(width: int, seed: int) -> Tensor:
    return torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(seed))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    model = nn.Linear(weight.numel(), 1, bias=bias is not None)
    with torch.no_grad():
        model.weight.copy_(weight[None])
        if bias is not None:
            model.bias.copy_(bias)
    return model
