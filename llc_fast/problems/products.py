"""Regressions whose coefficients are products: small singular models of which everything is known.

    y = c(b)·(a·x) + noise,    c_j(b) = b_j^k,    a ∈ R^M, b ∈ R^N,    x ~ N(0, 1_M), noise ~ N(0, 1_N)

The truth is a = b = 0, y is noise. With the loss ½‖y − prediction‖², the negative log likelihood but for a constant,
the population loss exceeds its minimum by

    K(a, b) = ½ |a|²·Σ_j b_j^(2k).

The factors depend on different parameters, and ζ(z) = ∫ K^z has the poles −M/2 and −N/(2k). So λ is the smaller of
M/2 and N/(2k), and m = 2 if they are equal. Familiar ones among them: k = 0 is regular (there is no b, λ = M/2);
M = N = 1 is the normal crossing a²b^(2k); k = 1 is reduced-rank regression with one hidden unit and true rank 0.

K is quadratic in a, so that a is integrated out by hand, and what a sampler should find at a finite nβ is left as an
integral over b: :meth:`ProductRegression.expected_excess`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llc_fast.theory import LearningCoefficient

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Box:
    """A uniform prior on |w_i| ≤ `half_width`."""

    half_width: float = 1.0


@dataclass(frozen=True)
class Gaussian:
    """A prior ∝ exp(−γ/2·‖w − w*‖²): localization.

    Attributes:
        precision: γ > 0.
        a, b: the two parts of w*.
    """

    precision: float
    a: Array
    b: Array

    @classmethod
    def around(cls, model: ProductRegression, precision: float) -> Gaussian:
        """Localized at the present parameters."""
        b = model.b.detach().cpu().double().numpy() if model.power else np.zeros(0)
        return cls(precision, model.a.detach().cpu().double().numpy(), b)


class ProductRegression(nn.Module):
    """The model, at the true parameter a = b = 0.

    Args:
        inputs: M ≥ 1.
        outputs: N ≥ 1; 1 if `power` is 0.
        power: k ≥ 0; 0 leaves the regular model y = a·x, without a parameter b.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, inputs: int, outputs: int = 1, power: int = 1) -> None:
        super().__init__()
        if inputs < 1 or outputs < 1 or power < 0 or (power == 0 and outputs > 1):
            raise ValueError(
                f"inputs={inputs}, outputs={outputs}, power={power}: inputs and outputs are at least 1, power at least "
                "0, and a model of power 0 has one output"
            )
        self.inputs, self.outputs, self.power = inputs, outputs, power
        self.a = nn.Parameter(torch.zeros(inputs))
        if power:
            self.b = nn.Parameter(torch.zeros(outputs))

    @property
    def learning_coefficient(self) -> LearningCoefficient:
        """λ and m at the origin."""
        if not self.power:
            return LearningCoefficient(self.inputs / 2, 1)
        poles = self.inputs / 2, self.outputs / (2 * self.power)
        return LearningCoefficient(min(poles), 1 + (poles[0] == poles[1]))

    @property
    def num_parameters(self) -> int:
        return self.inputs + (self.outputs if self.power else 0)

    @property
    def degree(self) -> int:
        """Of K, which is homogeneous: K(tw) = t^degree·K(w)."""
        return 2 + 2 * self.power

    def forward(self, x: Tensor) -> Tensor:
        """Predictions ``[batch, outputs]`` for inputs ``[batch, inputs]``."""
        return (x @ self.a)[:, None] * (self.b**self.power if self.power else self.a.new_ones(1))

    def excess(self, a: Tensor, b: Tensor | None) -> Tensor:
        """K(a, b), over the last dimension of both; b is not needed if `power` is 0."""
        scale = b.pow(2 * self.power).sum(dim=-1) if self.power and b is not None else 1.0
        return 0.5 * a.square().sum(dim=-1) * scale

    def population_loss(self) -> Tensor:
        """K at the present parameters."""
        return self.excess(self.a, self.b if self.power else None)

    def uniform_excess(self, count: int, half_width: float, generator: torch.Generator) -> Tensor:
        """K at parameters drawn from the uniform prior, float64 ``[count]``, on the generator's device."""
        w = torch.rand(count, self.num_parameters, generator=generator, dtype=torch.float64, device=generator.device)
        a, b = (half_width * w).tensor_split([self.inputs], dim=1)  # K is even in each parameter
        return self.excess(a, b)

    def noisy_data(self, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[num_samples, inputs or outputs]`` of the true model.

        Inputs are whitened: the mean of x·xᵀ is 1 but for rounding. So the loss on these data differs from the
        population loss by their noise alone:  L_n(w) − L_n(0) = K(w) − c(b)ᵀ·C·a  with C from :func:`correlation`.
        """
        x = torch.randn(num_samples, self.inputs, generator=generator, dtype=torch.float64)
        x = torch.linalg.qr(x)[0] * math.sqrt(num_samples)
        y = torch.randn(num_samples, self.outputs, generator=generator, dtype=torch.float64)
        return x.float(), y.float()

    def expected_excess(
        self, nbeta: float, prior: Box | Gaussian, correlation: Array | None = None, points: int = 150
    ) -> float:
        """nβ·E[L(w) − L(0)] under the density ∝ exp(−nβ·L(w))·prior, by quadrature over b.

        It is −d log Z/d log nβ, and tends to λ as nβ grows; where m = 2 it is below by about 1/log nβ.

        Args:
            nbeta: nβ.
            prior: a uniform or a Gaussian one.
            correlation: C ``[outputs, inputs]`` of noisy data; None: the population loss.
            points: nodes for each sign of each b.
        """
        noise = np.zeros((self.outputs, self.inputs)) if correlation is None else correlation
        b, weights = _nodes(self.outputs if self.power else 0, prior, points)
        scale = b**self.power if self.power else np.ones((1, 1))
        step = 1e-3

        def log_evidence(log_nbeta: float) -> float:
            t = math.exp(log_nbeta)
            precision, slope = t * np.square(scale).sum(axis=1)[:, None], t * scale @ noise
            terms = _log_integrals(precision, slope, prior).sum(axis=1) + weights
            return float(np.logaddexp.reduce(terms))

        middle = math.log(nbeta)
        return -(log_evidence(middle + step) - log_evidence(middle - step)) / (2 * step)


def correlation(data: tuple[Tensor, Tensor]) -> Array:
    """C, the mean of y·xᵀ, ``[outputs, inputs]``."""
    x, y = (part.double() for part in data)
    return (y.T @ x / len(x)).numpy()


def _nodes(count: int, prior: Box | Gaussian, points: int) -> tuple[Array, Array]:
    """Places ``[place, count]`` and the logarithms of their weights, prior included.

    Gauss–Legendre in log|b|, since what matters is spread over many powers of ten.
    """
    if not count:
        return np.zeros((1, 0)), np.zeros(1)
    center = np.zeros(count) if isinstance(prior, Box) else prior.b
    far = prior.half_width if isinstance(prior, Box) else float(np.abs(center).max()) + 9 / math.sqrt(prior.precision)
    near = 1e-9
    x, w = np.polynomial.legendre.leggauss(points)
    half = 0.5 * math.log(far / near)
    size = np.exp(math.log(near) + half * (x + 1))
    line, log_weight = np.concatenate([-size, size]), np.tile(np.log(half * w * size), 2)
    axes = np.meshgrid(*[line] * count, indexing="ij")
    b = np.stack([axis.ravel() for axis in axes], axis=1)
    weights: Array = np.sum(np.meshgrid(*[log_weight] * count, indexing="ij"), axis=0).ravel()
    if isinstance(prior, Gaussian):
        weights = weights - 0.5 * prior.precision * np.square(b - center).sum(axis=1)
    return b, weights


def _log_integrals(precision: Array, slope: Array, prior: Box | Gaussian) -> Array:
    """log ∫ exp(−½·precision·a² + slope·a)·prior(a) da, elementwise, but for a constant."""
    if isinstance(prior, Gaussian):
        total, pull = precision + prior.precision, slope + prior.precision * prior.a
        return np.asarray(0.5 * pull**2 / total - 0.5 * np.log(total))
    from scipy.special import log_ndtr

    edge = prior.half_width
    # Below this the exponent is nothing, and the difference would lose its digits. Far from the box it is taken of
    # logarithms.
    narrow = np.maximum(precision, 1e-10 / edge**2)
    middle, width = np.abs(slope) / narrow, np.sqrt(narrow)
    upper, lower = log_ndtr((edge - middle) * width), log_ndtr((-edge - middle) * width)
    mass = upper + np.log(-np.expm1(lower - upper))
    return np.asarray(0.5 * narrow * middle**2 - 0.5 * np.log(narrow) + mass)
