"""Learning coefficients known in closed form.

The learning coefficient of a model at a true distribution is the real log canonical threshold (RLCT) λ of
its loss gap K(w) ≥ 0, with multiplicity m. Both are defined by the volume of parameters almost as good as
the true one, measured by a prior that is positive on the zero set of K::

    V(ε) = prior(K(w) < ε) ~ c · ε^λ · (−log ε)^(m−1)   as ε → 0,

or by the largest pole −λ, of order m, of ζ(z) = ∫ K(w)^z prior(w) dw. Every value below is computed as an
exact rational and rounded to float once, so equality tests against it are safe.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple, SupportsIndex

__all__ = ["LearningCoefficient", "deep_linear", "normal_crossing", "reduced_rank_regression", "regular"]


class LearningCoefficient(NamedTuple):
    """A learning coefficient; unpacks as `λ, m = ...`.

    Attributes:
        value: λ, the exponent of ε in the volume V(ε). A regular model with d parameters has d/2.
        multiplicity: m ≥ 1, one more than the exponent of −log ε.
    """

    value: float
    multiplicity: int


def regular(num_parameters: SupportsIndex) -> LearningCoefficient:
    """λ = d/2, m = 1: a regular model, whose Fisher information is invertible at an interior optimum.

    Args:
        num_parameters: d ≥ 1, the number of parameters.

    Raises:
        TypeError: `num_parameters` is not an integer.
        ValueError: it is below 1.
    """
    return LearningCoefficient(_integer("num_parameters", num_parameters, minimum=1) / 2, 1)


def normal_crossing(exponents: Iterable[SupportsIndex]) -> LearningCoefficient:
    """λ and m at the origin of K(w) = Π_i w_i^(2 k_i), under a prior positive at the origin.

    λ = 1 / (2 max_i k_i), and m counts the i that attain the maximum: ζ(z) factorises into
    ``∫ |w_i|^(2 k_i z) dw_i``, whose largest pole is z = −1/(2 k_i), a simple one. Note the exponent 2 k_i: K is
    the square of the monomial Π_i w_i^(k_i). Coordinates with k_i = 0 are free and change nothing.

    Source: S. Watanabe, Algebraic Geometry and Statistical Learning Theory, Cambridge 2009.

    Args:
        exponents: k_1, …, k_d: integers ≥ 0, at least one of them ≥ 1.

    Raises:
        TypeError: `exponents` is not an iterable of integers.
        ValueError: it is empty, has a negative entry, or has only zeros.
    """
    ks = _integers("exponents", exponents, minimum=0)
    top = max(ks, default=0)
    if top == 0:
        raise ValueError(
            f"exponents={ks} leaves K(w) = 1, which has no zero and so no learning coefficient; "
            "give at least one exponent ≥ 1"
        )
    return LearningCoefficient(float(Fraction(1, 2 * top)), ks.count(top))


def reduced_rank_regression(
    inputs: SupportsIndex, hidden: SupportsIndex, outputs: SupportsIndex, rank: SupportsIndex
) -> LearningCoefficient:
    """λ and m of y = B A x + noise, where A is H × M, B is N × H, and the true product BA has rank r.

    With M inputs, H hidden units and N outputs:

    - N + r ≤ M + H, M + r ≤ N + H and H + r ≤ M + N (no dimension dominates): with s = M + H + N + r,
      λ = [2(H+r)(M+N) − (M−N)² − (H+r)²] / 8 and m = 1 if s is even,
      λ = [2(H+r)(M+N) − (M−N)² − (H+r)² + 1] / 8 and m = 2 if s is odd;
    - M + H < N + r: λ = (HM − Hr + Nr) / 2, m = 1;
    - N + H < M + r: λ = (HN − Hr + Mr) / 2, m = 1;
    - M + N < H + r: λ = MN / 2, m = 1.

    This equals `deep_linear((inputs, hidden, outputs), rank)`, from another paper and in another form. The
    remarks there on the loss and on local values hold here as well.

    Source: M. Aoyagi and S. Watanabe, Stochastic complexities of reduced rank regression in Bayesian
    estimation, Neural Networks 18 (2005) 924–933.

    Args:
        inputs: M ≥ 1.
        hidden: H ≥ 1.
        outputs: N ≥ 1.
        rank: r, from 0 to min(M, H, N).

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """
    m = _integer("inputs", inputs, minimum=1)
    h = _integer("hidden", hidden, minimum=1)
    n = _integer("outputs", outputs, minimum=1)
    r = _rank(rank, (m, h, n))
    if m + h < n + r:
        return LearningCoefficient((h * m - h * r + n * r) / 2, 1)
    if n + h < m + r:
        return LearningCoefficient((h * n - h * r + m * r) / 2, 1)
    if m + n < h + r:
        return LearningCoefficient(m * n / 2, 1)
    odd = (m + h + n + r) % 2
    eighths = 2 * (h + r) * (m + n) - (m - n) ** 2 - (h + r) ** 2 + odd
    return LearningCoefficient(float(Fraction(eighths, 8)), 1 + odd)


def deep_linear(widths: Iterable[SupportsIndex], rank: SupportsIndex) -> LearningCoefficient:
    """λ and m of y = W_L ⋯ W_1 x + noise, where W_s is H_(s+1) × H_s and the true product has rank r.

    Let Δ_s = H_s − r. There is exactly one ℓ ≥ 1 for which the set M of the ℓ+1 smallest Δ satisfies ::

        max_M Δ < min_(not M) Δ,   Σ_M Δ ≥ ℓ · max_M Δ,   Σ_M Δ < ℓ · min_(not M) Δ.

    With a = Σ_M Δ − (⌈Σ_M Δ / ℓ⌉ − 1) ℓ, ::

        λ = [r (H_1 + H_(L+1)) − r²] / 2
            + a (ℓ − a) / (4ℓ) − ℓ (ℓ − 1) / 4 · (Σ_M Δ / ℓ)² + ½ Σ_(i<j in M) Δ_i Δ_j,
        m = a (ℓ − a) + 1.

    The first term counts the parameters that fix a product of rank r; the rest belongs to the residual
    network of widths Δ, whose true product is 0. λ is always a multiple of 1/2. No case is special: one
    layer gives λ = H_1 H_2 / 2 (it is regular), and a width equal to r leaves no residual, and m = 1.

    K is the population KL divergence of Gaussian noise, or the mean squared error gap, with inputs of
    full-rank covariance; all layers are free, and there are no biases.

    This is the global coefficient: the least λ(w*) over all parameters w* with the given product, and the
    value at the most singular of them, where every W_s has rank r. Elsewhere λ(w*) may be larger: with widths
    (2, 2, 2) and r = 0 the global value is 3/2, but where W_1 is invertible and W_2 = 0 the zero set
    is {W_2 = 0}, and λ(w*) = 4/2. For a w* whose layers, or products of adjacent layers, have rank above r,
    only λ(w*) ≥ `deep_linear(...)` is known. Experiments such as those of Furman & Lau (arXiv:2402.03698,
    and in 2308.12108v2) compare with this global formula.

    Source: M. Aoyagi, Consideration on the learning efficiency of multiple-layered neural networks with
    linear units, Neural Networks 172 (2024) 106132.

    Args:
        widths: H_1 (inputs), the hidden widths, H_(L+1) (outputs): at least two integers ≥ 1.
        rank: r, from 0 to min(widths).

    Raises:
        TypeError: `widths` is not an iterable of integers, or `rank` is not an integer.
        ValueError: there are fewer than two widths, or a width or the rank is out of range.
    """
    sizes = _integers("widths", widths, minimum=1)
    if len(sizes) < 2:
        raise ValueError(f"widths={sizes} is too short; give the input and the output width at least")
    r = _rank(rank, sizes)
    excess = sorted(size - r for size in sizes)
    # Σ_(i≤k) Δ_i − k Δ_k never grows with k, and it is Δ_0 ≥ 0 at k = 1. The three conditions on M say
    # that it is ≥ 0 at ℓ and < 0 at ℓ+1, so ℓ is the last k where it is ≥ 0, however many Δ are tied.
    ell = max(k for k in range(1, len(excess)) if sum(excess[: k + 1]) >= k * excess[k])
    chosen = excess[: ell + 1]
    total = sum(chosen)
    pairs = (total**2 - sum(delta**2 for delta in chosen)) // 2  # Σ_(i<j) Δ_i Δ_j
    a = total - (-(-total // ell) - 1) * ell
    residual = Fraction(a * (ell - a), 4 * ell) - Fraction((ell - 1) * total**2, 4 * ell) + Fraction(pairs, 2)
    fixed = Fraction(r * (sizes[0] + sizes[-1]) - r**2, 2)
    return LearningCoefficient(float(fixed + residual), a * (ell - a) + 1)


def _integer(name: str, value: SupportsIndex, minimum: int) -> int:
    """Return `value`, which may be one of NumPy's integers, as an int; raise if it is none, or below `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is not an integer; give an int ≥ {minimum}") from None
    if number < minimum:
        raise ValueError(f"{name}={number} is out of range; give an int ≥ {minimum}")
    return number


def _integers(name: str, values: Iterable[SupportsIndex], minimum: int) -> tuple[int, ...]:
    """Return `values` as a tuple of ints, each checked by `_integer`."""
    try:
        items = tuple(values)
    except TypeError:
        raise TypeError(f"{name}={values!r} is not iterable; give a sequence of ints ≥ {minimum}") from None
    return tuple(_integer(f"{name}[{i}]", item, minimum) for i, item in enumerate(items))


def _rank(rank: SupportsIndex, sizes: tuple[int, ...]) -> int:
    """Return `rank` as an int; raise if no product of matrices of these sizes has that rank."""
    r = _integer("rank", rank, minimum=0)
    if r > min(sizes):
        raise ValueError(
            f"rank={r} is above min(widths)={min(sizes)}, widths={sizes}: no such product has that rank; "
            f"give a rank from 0 to {min(sizes)}"
        )
    return r
