"""Potentials whose tempered posterior is known, as modules that `estimate_llc` can sample, and their exact answers.

Each module holds many independent copies of a small problem and returns the sum of their losses, so that one chain
gives as many independent draws at each step. The data are a dummy: the loss does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from runs import arguments, gamma
from torch import Tensor, nn

from llc_fast import LLCResult, estimate_llc

DATA = (torch.zeros(2, 1), torch.zeros(2, 1))


class Quadratic(nn.Module):
    """L(w) = ½ Σ h_i w_i²: a regular model; λ = d/2."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(curvature))
        self.register_buffer("curvature", curvature)

    def forward(self, _: Tensor) -> Tensor:
        return 0.5 * (self.curvature * self.w.square()).sum()


class NormalCrossing(nn.Module):
    """L(w) = Σ over copies of Π_i w_i^(2 k_i), at w = 0."""

    def __init__(self, exponents: tuple[int, ...], copies: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(exponents), copies))
        self.exponents = exponents

    def forward(self, _: Tensor) -> Tensor:
        product = torch.ones(())
        for w, k in zip(self.w, self.exponents, strict=True):
            product = product * w.pow(2 * k)
        return product.sum()


class ReducedRank(nn.Module):
    """L = Σ over copies of ‖B A‖², A: hidden × inputs, B: outputs × hidden, at A = B = 0 (true rank 0)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, copies: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(copies, hidden, inputs))
        self.b = nn.Parameter(torch.zeros(copies, outputs, hidden))

    def forward(self, _: Tensor) -> Tensor:
        return torch.bmm(self.b, self.a).square().sum()


def run(model: nn.Module, **options: Any) -> LLCResult:
    """An estimate with the full loss at every step."""
    settings: dict[str, Any] = {"num_chains": 2, "localization": gamma(options), "progress": False, "seed": 1} | options
    return estimate_llc(model, DATA, lambda output, _: output, **arguments(settings))


def tempered_mean(log_z: Callable[[float], float], nbeta: float) -> float:
    """nβ·E[L] = −d log Z / d log nβ, by a central difference."""
    step = 1e-3
    return -(log_z(math.log(nbeta) + step) - log_z(math.log(nbeta) - step)) / (2 * step)


def _log_grid(low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(math.log(low), math.log(high), count)
    return np.exp(x), np.full(count, x[1] - x[0])


def crossing_mean(exponents: tuple[int, ...], nbeta: float, localization: float) -> float:
    """nβ·E[Π w_i^(2 k_i)] under exp(−nβ Π w_i^(2 k_i) − γ/2 Σ w_i²), for one or two factors, by quadrature."""
    w, d = _log_grid(1e-12, 30 / math.sqrt(max(localization, 1e-2)), 4000)

    def log_z(log_nbeta: float) -> float:
        prior = np.exp(-0.5 * localization * w**2) * w * d  # dw = w dlog w; even in w, so half the line will do
        k = exponents
        if len(k) == 1:
            return math.log(float((np.exp(-math.exp(log_nbeta) * w ** (2 * k[0])) * prior).sum()))
        inner = np.exp(-math.exp(log_nbeta) * np.outer(w ** (2 * k[0]), w ** (2 * k[1])))
        return math.log(float(prior @ inner @ prior))

    return tempered_mean(log_z, nbeta)


def reduced_rank_mean(inputs: int, hidden: int, outputs: int, nbeta: float, localization: float) -> float:
    """nβ·E‖BA‖² under exp(−nβ‖BA‖² − γ/2(‖A‖² + ‖B‖²)), hidden ≤ 2.

    B is Gaussian given A and is integrated out: a factor (2nβ s² + γ)^(−outputs/2) for each singular value s of A;
    A's singular values then have the density Π s^|inputs−hidden| Π|s_i² − s_j²| exp(−γ/2 Σ s²), with hidden −
    min(inputs, hidden) further zero ones.
    """
    values = min(inputs, hidden)
    s, d = _log_grid(1e-14, 12 / math.sqrt(localization), 3000)

    def log_z(log_nbeta: float) -> float:
        one = (2 * math.exp(log_nbeta) * s**2 + localization) ** (-outputs / 2) * np.exp(-0.5 * localization * s**2)
        one = one * s ** abs(inputs - hidden) * s * d
        if values == 1:
            return math.log(float(one.sum()))
        return math.log(float(one @ np.abs(s[:, None] ** 2 - s[None, :] ** 2) @ one))

    return tempered_mean(log_z, nbeta)
