"""Checks of `llc_fast.theory` against derivations other than the formulas it is written from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import gammaincc, i0e

from llc_fast import theory

# ------------------------------------------------------------------------------------------------------
# Oracles
# ------------------------------------------------------------------------------------------------------


def by_rank_chains(widths: tuple[int, ...], rank: int) -> tuple[float, int]:
    """λ and m of a deep linear network, by counting solutions of W_L ⋯ W_1 ≡ 0 modulo p^n.

    Away from a regular part of r (H_1 + H_(L+1)) − r² parameters the network is the one of widths H − r
    with true product 0. The image of W_s ⋯ W_1 over Z/p^n is a finite module; write r_s(i) for its number
    of generators at level i = 1..n (the conjugate of its type). Given the image before it, a uniform W_s
    is a uniform homomorphism, and counting quotients and injections of modules gives the probability

        p^−Σ_i (H_(s+1) − r_s(i)) (r_(s−1)(i) − r_s(i))    (to leading order in p)

    of the image after it. The levels meet only in r(1) ≥ r(2) ≥ … ≥ r(n), so all may follow the cheapest
    chain of ranks H_1 = r_0 ≥ … ≥ r_L = 0, of cost c, and the solutions have measure ~ n^(m−1) p^(−c n):
    λ = c / 2, and m is the number of cheapest chains that can follow one another, each below the last.
    """
    best, cheapest = math.inf, []
    delta = [width - rank for width in widths]
    for chain in itertools.product(*(range(width + 1) for width in delta[1:-1])):
        ranks = (delta[0], *chain, 0)
        drops = [before - after for before, after in itertools.pairwise(ranks)]
        if min(drops) < 0:
            continue
        cost = sum((width - r) * drop for width, r, drop in zip(delta[1:], ranks[1:], drops, strict=True))
        if cost < best:
            best, cheapest = cost, []
        if cost == best:
            cheapest.append(ranks)
    longest: dict[tuple[int, ...], int] = {}
    for ranks in cheapest:  # in lexicographic order, which extends the order by components
        below = (n for low, n in longest.items() if all(x <= y for x, y in zip(low, ranks, strict=True)))
        longest[ranks] = 1 + max(below, default=0)
    regular_part = rank * (widths[0] + widths[-1]) - rank**2
    return (regular_part + best) / 2, max(longest.values())


def assert_asymptotics(log_z: Callable[[float], float], expected: tuple[float, int], start: float = 40.0) -> None:
    """Check z(t) = e^(−λt) (c_0 + … + c_(m−1) t^(m−1)), c_(m−1) > 0, up to exponentially smaller terms.

    That is the form of the volume at ε = e^−t, and of the Laplace integral E exp(−n K) at n = e^t.
    """
    value, multiplicity = expected
    t = start * (1 + np.arange(multiplicity + 2) / 2)
    scaled = np.exp([log_z(ti) + value * ti for ti in t])
    top = np.diff(scaled, multiplicity - 1)
    assert np.all(top > 1e-3 * scaled[0])
    np.testing.assert_allclose(top, top[0], rtol=1e-6)


def log_laplace(widths: tuple[int, ...], rank: int, t: float) -> float:
    """log E exp(−n ‖W_L ⋯ W_1 − V‖² / 2) + constant at n = e^t, for Gaussian W_s and V = e_1 e_1ᵀ or 0.

    All but a few dimensions are integrated by hand. What is left is a sum on a grid in the logarithms of the
    eigenvalues x, y of a 2 × 2 Wishart matrix S. Steps in t are multiples of the grid's, so the grid moves
    with the integrand, and its coarseness changes the c_i above but not λ, m or the order of the error.
    """
    u = np.arange(-t - 60, 8, 0.25)
    x, y = np.exp(u)[:, None], np.exp(u)
    log_x, log_y = np.logaddexp(0, t + u)[:, None], np.logaddexp(0, t + u)  # log(1 + n x), log(1 + n y)
    if rank == 1:
        # (2, H, N): S = W_1ᵀ W_1. Given S, a row of W_2 W_1 is Gaussian with covariance S, so that W_2 gives
        # det(1 + n S)^(−N/2) exp(−½ e_1ᵀ (S + 1/n)⁻¹ e_1). The angle of e_1 gives the Bessel function.
        _, dof, outputs = widths
        alpha, beta = 1 / (x + math.exp(-t)), 1 / (y + math.exp(-t))
        log_k = -outputs / 2 * (log_x + log_y) - np.minimum(alpha, beta) / 2
        kernel = np.exp(log_k) * i0e(np.abs(alpha - beta) / 4)
    elif len(widths) == 3:
        # (M, 2, N): S = W_2ᵀ W_2, and W_1 gives det(1 + n S)^(−M/2).
        inputs, _, dof = widths
        kernel = np.exp(-inputs / 2 * (log_x + log_y))
    else:
        # (2, 2, 2, N): S = W_3ᵀ W_3, W_1 gives 1 / det(1 + n W_2ᵀ S W_2), and the angle between the rows of
        # W_2, of squared lengths p and q, gives 1 / √((1 + n (x p + y q)) (1 + n x p) (1 + n y q)). In the
        # logarithms, the sums over p and q are convolutions.
        dof = widths[-1]
        kernel = np.exp(-(np.logaddexp(0, t + np.logaddexp(u[:, None], u)) + log_x + log_y) / 2)
        log_p = np.minimum(u[:, None] - u, 8)  # beyond 8 the density below is 0
        length = np.exp(log_p - np.exp(log_p) / 2)
        kernel = length.T @ kernel @ length
    wishart = np.abs(x - y) * np.exp((dof - 1) / 2 * (u[:, None] + u) - (x + y) / 2)
    return float(np.log((wishart * kernel).sum()))


# ------------------------------------------------------------------------------------------------------
# Deep linear networks and reduced rank regression
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "largest"), [(1, 6), (2, 6), (3, 6), (4, 4), (5, 3)])
def test_deep_linear_equals_count_of_rank_chains(layers: int, largest: int) -> None:
    for widths in itertools.product(range(1, largest + 1), repeat=layers + 1):
        for rank in range(min(widths) + 1):
            assert theory.deep_linear(widths, rank) == by_rank_chains(widths, rank), (widths, rank)


def test_deep_linear_with_two_layers_is_reduced_rank_regression() -> None:
    for widths in itertools.product(range(1, 8), repeat=3):
        for rank in range(min(widths) + 1):
            assert theory.deep_linear(widths, rank) == theory.reduced_rank_regression(*widths, rank), widths


@pytest.mark.parametrize(
    ("widths", "rank", "expected"),
    [
        ((2, 2, 2), 0, (1.5, 1)),
        ((1, 2, 2), 0, (1.0, 2)),
        ((3, 2, 2), 0, (2.0, 2)),
        ((4, 2, 2), 0, (2.0, 1)),
        ((5, 2, 2), 0, (2.0, 1)),
        ((3, 2, 3), 0, (2.5, 1)),
        ((3, 2, 4), 0, (3.0, 2)),
        ((2, 2, 1), 1, (1.0, 1)),
        ((2, 2, 2), 1, (2.0, 2)),
        ((2, 2, 3), 1, (2.5, 1)),
        ((2, 3, 2), 1, (2.0, 1)),
        ((2, 3, 3), 1, (3.0, 2)),
        ((2, 2, 2, 2), 0, (1.5, 3)),
        ((2, 2, 2, 3), 0, (1.5, 1)),
    ],
)
def test_exact_gaussian_integrals(widths: tuple[int, ...], rank: int, expected: tuple[float, int]) -> None:
    assert theory.deep_linear(widths, rank) == expected
    assert_asymptotics(lambda t: log_laplace(widths, rank, t), expected)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_product_of_scalars(layers: int) -> None:
    """K = (w_1 ⋯ w_L)²: for w_i uniform on [0, 1], −log K / 2 is Gamma(L) distributed."""
    result = theory.deep_linear([1] * (layers + 1), 0)
    assert result == (0.5, layers) == theory.normal_crossing([1] * layers)
    assert_asymptotics(lambda t: math.log(gammaincc(layers, t / 2)), result)


def test_local_value_can_exceed_the_global_one() -> None:
    """The docstring's example: at W_1 = 1, W_2 = 0 the map to the product is a submersion onto R⁴."""
    basis = np.eye(8).reshape(8, 2, 2, 2)
    jacobian = [(d2 @ np.eye(2) + np.zeros((2, 2)) @ d1).ravel() for d1, d2 in basis]
    local = theory.regular(np.linalg.matrix_rank(jacobian))
    assert local.value == 2 > theory.deep_linear((2, 2, 2), 0).value == 1.5


@pytest.mark.parametrize("widths", [(1, 1), (3, 4), (7, 2)])
def test_single_layer_is_regular(widths: tuple[int, int]) -> None:
    for rank in range(min(widths) + 1):
        assert theory.deep_linear(widths, rank) == theory.regular(math.prod(widths))


networks = st.lists(st.integers(1, 30), min_size=2, max_size=8).flatmap(
    lambda widths: st.tuples(st.just(widths), st.integers(0, min(widths)))
)


@given(networks, st.randoms(use_true_random=False))
def test_order_of_layers_does_not_matter(network, random) -> None:
    widths, rank = network
    expected = theory.deep_linear(widths, rank)
    hidden = widths[1:-1]
    random.shuffle(hidden)
    assert theory.deep_linear([widths[-1], *hidden, widths[0]], rank) == expected
    shuffled = random.sample(widths, len(widths))
    assert theory.deep_linear(shuffled, 0) == theory.deep_linear(widths, 0)


@given(networks)
def test_bounds(network) -> None:
    widths, rank = network
    value, multiplicity = theory.deep_linear(widths, rank)
    parameters = sum(a * b for a, b in itertools.pairwise(widths))
    assert 1 <= multiplicity <= parameters
    assert value == round(2 * value) / 2
    # K is a sum of H_1 H_(L+1) squares in that many parameters…
    assert value <= min(parameters, widths[0] * widths[-1]) / 2
    # … of which the products of rank r leave as many directions to determine as their own dimension.
    assert value >= (rank * (widths[0] + widths[-1]) - rank**2) / 2
    if rank == 0:  # K vanishes where any one layer does
        assert 0 < value <= min(a * b for a, b in itertools.pairwise(widths)) / 2


@given(networks)
def test_lower_rank_is_more_singular(network) -> None:
    """log canonical thresholds are lower semicontinuous, and rank r is a limit of rank r + 1."""
    widths, rank = network
    values = [theory.deep_linear(widths, r).value for r in range(rank + 1)]
    assert values == sorted(values)


@given(networks, st.integers(1, 60), st.data())
def test_an_extra_layer_never_raises_the_coefficient(network, extra, data) -> None:
    widths, rank = network
    place = data.draw(st.integers(1, len(widths) - 1))
    deeper = [*widths[:place], max(extra, rank), *widths[place:]]
    assert theory.deep_linear(deeper, rank).value <= theory.deep_linear(widths, rank).value
    # One so wide that it is no bottleneck for any of the others changes nothing at all.
    wide = [*widths[:place], sum(widths) + 1, *widths[place:]]
    assert theory.deep_linear(wide, rank) == theory.deep_linear(widths, rank)


@given(networks, st.data())
def test_a_wider_layer_never_lowers_the_coefficient(network, data) -> None:
    widths, rank = network
    place = data.draw(st.integers(0, len(widths) - 1))
    wider = [width + (i == place) for i, width in enumerate(widths)]
    assert theory.deep_linear(wider, rank).value >= theory.deep_linear(widths, rank).value


@given(networks)
def test_full_rank_leaves_no_residual(network) -> None:
    """With rank min H the zero set is smooth, of the codimension of the matrices of that rank."""
    widths, _ = network
    rank = min(widths)
    expected = theory.regular(rank * (widths[0] + widths[-1] - rank))
    assert theory.deep_linear(widths, rank) == expected


# ------------------------------------------------------------------------------------------------------
# Normal crossings and regular models
# ------------------------------------------------------------------------------------------------------


def volume_2d(a: int, b: int, t: float) -> float:
    """P(x^2a y^2b < e^−t) for x, y uniform on [0, 1], integrated exactly."""
    log_s = -t / 2
    if a == b:
        return math.exp(log_s / a) * (1 - log_s / a)
    return (a * math.exp(log_s / a) - b * math.exp(log_s / b)) / (a - b)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_normal_crossing_in_one_dimension(k: int) -> None:
    """P(x^2k < ε) = ε^(1/2k) exactly, for x uniform on [0, 1]."""
    value, multiplicity = theory.normal_crossing([k])
    assert multiplicity == 1
    for eps in (1e-3, 1e-30):
        assert eps**value == pytest.approx(eps ** (1 / (2 * k)))


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 2), (2, 2), (3, 1), (4, 3)])
def test_normal_crossing_in_two_dimensions(a: int, b: int) -> None:
    t = 3.0
    numeric, _ = quad(lambda x: min(1.0, math.exp(-t / (2 * b)) * x ** (-a / b)), 0, 1, points=[math.exp(-t / 2 / a)])
    assert volume_2d(a, b, t) == pytest.approx(numeric)
    assert_asymptotics(lambda u: math.log(volume_2d(a, b, u)), theory.normal_crossing((a, b)), start=500.0)


@given(st.lists(st.integers(0, 9), min_size=1).filter(any), st.integers(1, 9), st.randoms(use_true_random=False))
def test_normal_crossing_properties(exponents, power, random) -> None:
    value, multiplicity = theory.normal_crossing(exponents)
    assert 1 <= multiplicity <= len(exponents)
    assert theory.normal_crossing(random.sample(exponents, len(exponents))) == (value, multiplicity)
    assert theory.normal_crossing([*exponents, 0]) == (value, multiplicity)
    powered = theory.normal_crossing([power * k for k in exponents])
    assert powered == (pytest.approx(value / power), multiplicity)
    assert theory.normal_crossing(exponents + exponents) == (value, 2 * multiplicity)


def test_regular() -> None:
    assert theory.regular(3) == (1.5, 1)


# ------------------------------------------------------------------------------------------------------
# Interface
# ------------------------------------------------------------------------------------------------------


def test_result_names_and_types() -> None:
    result = theory.deep_linear(np.array([2, 3, 2]), np.int64(1))
    value, multiplicity = result
    assert (result.value, result.multiplicity) == (value, multiplicity)
    assert type(value) is float and type(multiplicity) is int
    assert theory.reduced_rank_regression(*np.array([2, 3, 2, 1])) == result
    for other in (theory.normal_crossing(iter(np.array([1, 2]))), theory.regular(np.uint8(4))):
        assert type(other.value) is float and type(other.multiplicity) is int


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: theory.deep_linear([2, 2.5], 0), TypeError, r"widths\[1\]=2.5 .* give an int ≥ 1"),
        (lambda: theory.deep_linear(3, 0), TypeError, r"widths=3 .* give a sequence"),
        (lambda: theory.deep_linear([2, 0, 2], 0), ValueError, r"widths\[1\]=0 .* ≥ 1"),
        (lambda: theory.deep_linear([2], 0), ValueError, r"widths=\(2,\) .* output"),
        (lambda: theory.deep_linear([], 0), ValueError, r"widths=\(\) .* output"),
        (lambda: theory.deep_linear([3, 2, 3], 3), ValueError, r"rank=3 .* from 0 to 2"),
        (lambda: theory.deep_linear([3, 2, 3], -1), ValueError, r"rank=-1 .* ≥ 0"),
        (lambda: theory.deep_linear([3, 2, 3], 1.0), TypeError, r"rank=1.0 .* ≥ 0"),
        (lambda: theory.reduced_rank_regression("2", 2, 2, 0), TypeError, r"inputs='2' .* ≥ 1"),
        (lambda: theory.reduced_rank_regression(2, 0, 2, 0), ValueError, r"hidden=0 .* ≥ 1"),
        (lambda: theory.reduced_rank_regression(2, 2, -2, 0), ValueError, r"outputs=-2 .* ≥ 1"),
        (lambda: theory.reduced_rank_regression(2, 2, 2, 3), ValueError, r"rank=3 .* from 0 to 2"),
        (lambda: theory.normal_crossing([]), ValueError, r"exponents=\(\) .* at least one"),
        (lambda: theory.normal_crossing([0, 0]), ValueError, r"exponents=\(0, 0\) .* at least one"),
        (lambda: theory.normal_crossing([1, -1]), ValueError, r"exponents\[1\]=-1 .* ≥ 0"),
        (lambda: theory.normal_crossing([0.5]), TypeError, r"exponents\[0\]=0.5 .* ≥ 0"),
        (lambda: theory.regular(0), ValueError, r"num_parameters=0 .* ≥ 1"),
        (lambda: theory.regular(None), TypeError, r"num_parameters=None .* ≥ 1"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
