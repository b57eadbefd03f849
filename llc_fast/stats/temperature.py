"""λ and its multiplicity from tempered means at several temperatures, by averaging over asymptotic forms and ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SLOWEST, FASTEST = 0.1, 3.0
"""Bounds on δ, the distance of the next exponent from λ. A pair of exponents that is closer than 0.1 looks like one of
multiplicity 2 at any temperature that anyone will use."""
_NEAREST, _FARTHEST = 1e-3, 30.0
"""Bounds on c + log of the smallest nβ: 30 is a posterior that is e³⁰ times narrower than the prior already there."""
_WEIGHED = 1e-3
"""Share of the largest weight below which a fit is left out of what is listed."""


@dataclass(frozen=True)
class FormFit:
    """One form fitted to one range.

    Attributes:
        form: ``"constant"``, ``"next exponent"``, ``"multiplicity 2"`` or ``"multiplicity 3"``.
        multiplicity: m of the form.
        smallest: the smallest nβ of the range, which reaches to the largest there is.
        value, stderr: λ, and its standard error if this were the form.
        parameters: of the form: λ; log δ and log(1 + r) at the smallest nβ of the range; log(c + log nβ) there.
        chi_squared: the sum of squared residuals in units of their errors.
        points: temperatures in the range.
        score: half of the sum of squared residuals, those of the priors of its parameters included.
        weight: of this fit among all.
    """

    form: str
    multiplicity: int
    smallest: float
    value: float
    stderr: float
    parameters: tuple[float, ...]
    chi_squared: float
    points: int
    score: float
    weight: float = 0.0


@dataclass(frozen=True)
class TemperatureFit:
    """λ and m from nβ·E[L − L*] over nβ, see :func:`fit_temperature`.

    Attributes:
        value: λ, the average over forms and ranges.
        stderr: of λ: sampling and the choice of form and range together.
        sampling_error, form_error: the two parts, which add in squares.
        multiplicity: the most probable m.
        probabilities: of each m.
        fits: those that count, the heaviest first.
    """

    value: float
    stderr: float
    sampling_error: float
    form_error: float
    multiplicity: int
    probabilities: dict[int, float]
    fits: tuple[FormFit, ...]

    def interval(self, prob: float = 0.95) -> tuple[float, float]:
        """A central interval for λ, as if its error were normal.

        Raises:
            ValueError: `prob` is not between 0 and 1.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must be between 0 and 1, got {prob}")
        from scipy.special import ndtri

        half = float(ndtri(0.5 + prob / 2)) * self.stderr
        return self.value - half, self.value + half

    def __str__(self) -> str:
        chances = ", ".join(f"P(m = {m}) = {p:.2g}" for m, p in self.probabilities.items())
        best = self.fits[0]
        return (
            f"λ = {self.value:.4g} ± {self.stderr:.2g} (sampling {self.sampling_error:.2g}, form and range "
            f"{self.form_error:.2g}), m = {self.multiplicity} ({chances}); the best of {len(self.fits)} fits is "
            f"{best.form!r} from nβ = {best.smallest:.4g}, χ² = {best.chi_squared:.3g} of {best.points} temperatures"
        )


@dataclass(frozen=True)
class _Form:
    """nβ·E[L − L*] = λ + correction(log(nβ / smallest nβ), parameters).

    Attributes:
        name: of the form.
        multiplicity: m.
        correction: of depths ``[point]`` and the parameters beside λ.
        low, high: bounds of these parameters.
        middle, width: of a normal prior on each, wide against what singular models have; without one, parameters that
            the values say nothing of would make the error of λ anything.
        starts: where searches begin.
    """

    name: str
    multiplicity: int
    correction: Callable[[Array, Array], Array]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    middle: tuple[float, ...] = ()
    width: tuple[float, ...] = ()
    starts: tuple[tuple[float, ...], ...] = ((),)


def _next_exponent(depth: Array, place: Array) -> Array:
    """Z = (nβ)^(−λ)·(1 + b·(nβ)^(−δ)): the correction δ·r/(1 + r) with r = b·(nβ)^(−δ) > −1."""
    delta = math.exp(place[0])
    ratio = math.expm1(place[1]) * np.exp(-delta * depth)
    found: Array = delta * ratio / (1 + ratio)
    return found


def _logarithms(depth: Array, place: Array) -> Array:
    """Z = (nβ)^(−λ)·Π (log nβ + c_k): the correction −Σ 1/(log nβ + c_k)."""
    found: Array = -(1 / (depth[:, None] + np.exp(place))).sum(axis=1)
    return found


_LOG = math.log(_NEAREST), math.log(_FARTHEST)
_FORMS = (
    _Form("constant", 1, lambda depth, place: np.zeros_like(depth)),
    _Form(
        "next exponent",
        1,
        _next_exponent,
        (math.log(SLOWEST), -12.0),
        (math.log(FASTEST), 12.0),
        (math.log(0.5), 0.0),
        (1.0, 2.0),
        tuple((math.log(delta), size) for delta in (0.3, 1.0) for size in (-1.5, -0.3, 0.7)),
    ),
    _Form("multiplicity 2", 2, _logarithms, _LOG[:1], _LOG[1:], (math.log(5.0),), (1.0,), ((0.0,), (2.0,))),
    _Form(
        "multiplicity 3",
        3,
        _logarithms,
        _LOG[:1] * 2,
        _LOG[1:] * 2,
        (math.log(5.0),) * 2,
        (1.0, 1.0),
        ((0.0, 2.0), (2.0, 2.0)),
    ),
)


def fit_temperature(nbeta: Array, mean: Array, stderr: Array, *, max_multiplicity: int = 3) -> TemperatureFit:
    """λ and m from nβ·E[L − L*] at several nβ.

    The evidence goes like Z ~ (nβ)^(−λ)·(log nβ)^(m−1) (Watanabe 2009), and nβ·E[L − L*] = −d log Z/d log nβ. Four
    forms are fitted by least squares to every range that reaches from some nβ up to the largest:

    - constant: λ;
    - next exponent: λ + δ·r/(1 + r) with r = b·(nβ)^(−δ), of Z ~ (nβ)^(−λ) + b·(nβ)^(−λ−δ), δ from 0.1 to 3;
    - multiplicity 2: λ − 1/(log nβ + c);
    - multiplicity 3: λ − 1/(log nβ + c₁) − 1/(log nβ + c₂).

    Wide priors hold what the values say nothing of: δ is 0.5 within a factor of e, 1 + b·(nβ)^(−δ) is 1 within e² and
    c + log nβ is 5 within e, at the smallest nβ of the range. Each fit counts by exp(−½χ² − k − d), with k its
    parameters and d the temperatures that its range leaves out (Akaike's criterion for forms and for data alike: Jay &
    Neil 2021, arXiv 2008.01069). λ is the average, and its error has the spread between forms and ranges beside that of
    each. The probability of m is the weight of its forms.

    Args:
        nbeta: nβ ``[point]``, in any order.
        mean: nβ·E[L − L*] ``[point]``, where L* is the least that the loss can be.
        stderr: its standard errors ``[point]``, independent of each other.
        max_multiplicity: the largest m that is tried, 1 to 3.

    Raises:
        ValueError: fewer than five temperatures; a number that is not finite, or nβ or an error that is not positive.
    """
    nbeta, mean, stderr = (np.asarray(a, dtype=np.float64).ravel() for a in (nbeta, mean, stderr))
    if not len(nbeta) == len(mean) == len(stderr) or len(np.unique(nbeta)) < 5:
        raise ValueError(f"nbeta must have five different temperatures at least, got {len(np.unique(nbeta))}")
    if not (np.isfinite([nbeta, mean, stderr]).all() and (nbeta > 0).all() and (stderr > 0).all()):
        raise ValueError("nbeta, mean and stderr must be finite, and nbeta and stderr positive")
    order = np.argsort(nbeta)
    nbeta, mean, stderr = nbeta[order], mean[order], stderr[order]
    found = [
        _fitted(form, nbeta, mean, stderr, first)
        for form in _FORMS
        if form.multiplicity <= max_multiplicity
        for first in range(len(nbeta) - max(3, len(form.low) + 2) + 1)
    ]
    left_out = np.array([len(nbeta) - fit.points for fit in found])
    scores = np.array([fit.score + len(fit.parameters) for fit in found]) + left_out
    weights = np.exp(scores.min() - scores)
    weights /= weights.sum()
    values, errors = np.array([fit.value for fit in found]), np.array([fit.stderr for fit in found])
    value = float(weights @ values)
    sampling, form = math.sqrt(float(weights @ errors**2)), math.sqrt(float(weights @ (values - value) ** 2))
    multiplicities = np.array([fit.multiplicity for fit in found])
    chances = {m: float(weights[multiplicities == m].sum()) for m in range(1, max_multiplicity + 1)}
    best = np.argsort(-weights)
    kept = tuple(_weighed(found[k], float(weights[k])) for k in best if weights[k] > _WEIGHED * weights[best[0]])
    most = max(chances, key=lambda m: chances[m])
    return TemperatureFit(value, math.hypot(sampling, form), sampling, form, most, chances, kept)


def _weighed(fit: FormFit, weight: float) -> FormFit:
    return replace(fit, weight=weight)


def _fitted(form: _Form, nbeta: Array, mean: Array, stderr: Array, first: int) -> FormFit:
    """A form on the range from the `first` temperature on."""
    from scipy.optimize import least_squares

    depth, y, error = np.log(nbeta[first:] / nbeta[0]), mean[first:], stderr[first:]
    depth = depth - depth[0]

    middle, width = np.array(form.middle), np.array(form.width)

    def residuals(place: Array) -> Array:
        found = (place[0] + form.correction(depth, place[1:]) - y) / error
        return np.concatenate([found, (place[1:] - middle) / width])

    low, high = [-np.inf, *form.low], [np.inf, *form.high]
    best: Any = None
    for start in form.starts:
        correction = form.correction(depth, np.array(start))
        level = float(np.average(y - correction, weights=error**-2))
        tried = least_squares(residuals, [level, *start], bounds=(low, high), x_scale="jac")
        if best is None or tried.cost < best.cost:
            best = tried
    free = [0, *(k for k in range(1, len(best.x)) if low[k] + 1e-6 < best.x[k] < high[k] - 1e-6)]  # not at a bound
    jac = best.jac[:, free]
    covariance = np.linalg.inv(jac.T @ jac)
    return FormFit(
        form.name,
        form.multiplicity,
        float(nbeta[first]),
        float(best.x[0]),
        math.sqrt(float(covariance[0, 0])),
        tuple(float(p) for p in best.x),
        float(np.sum(best.fun[: len(y)] ** 2)),
        len(y),
        score=float(best.cost),
    )
