"""Random deep linear networks, whose learning coefficient is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from llc_fast import theory
from llc_fast.problems import deep_linear


@pytest.fixture(scope="module")
def problems() -> list[tuple[str, deep_linear.DeepLinearProblem]]:
    """Random networks of the two small classes, with fewer samples than the paper's to save time."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for size in ("1k", "10k"):
            smaller = dataclasses.replace(deep_linear.SIZE_CLASSES[size], num_samples=1000)
            patch.setitem(deep_linear.SIZE_CLASSES, size, smaller)
            found += [(size, deep_linear.make_problem(size, seed)) for seed in range(60)]
    return found


def _product(problem: deep_linear.DeepLinearProblem) -> torch.Tensor:
    """The end-to-end matrix of the model as it is, in float64."""
    product = torch.eye(problem.widths[0], dtype=torch.float64)
    for layer in problem.model:
        product = layer.weight.detach().double() @ product
    return product


def test_networks_are_in_the_range_of_their_class(
    problems: list[tuple[str, deep_linear.DeepLinearProblem]],
) -> None:
    """Widths and numbers of layers stay in the class's range and use all of it; layers have no bias."""
    for size, problem in problems:
        cls = deep_linear.SIZE_CLASSES[size]
        assert cls.layers[0] <= len(problem.model) == len(problem.widths) - 1 <= cls.layers[1]
        assert all(cls.widths[0] <= w <= cls.widths[1] for w in problem.widths)
        shapes = [tuple(p.shape) for p in problem.model.parameters()]
        assert shapes == list(zip(problem.widths[1:], problem.widths, strict=False))
        assert problem.num_parameters == sum(a * b for a, b in shapes)
    for size in ("1k", "10k"):
        cls = deep_linear.SIZE_CLASSES[size]
        depths = {len(p.model) for s, p in problems if s == size}
        assert depths == set(range(cls.layers[0], cls.layers[1] + 1))
        widths = [w for s, p in problems if s == size for w in p.widths]
        assert min(widths) <= cls.widths[0] + 3 and max(widths) >= cls.widths[1] - 3


def test_rank_is_that_of_the_product(problems: list[tuple[str, deep_linear.DeepLinearProblem]]) -> None:
    """The stated rank is the numerical rank of the float64 product; all kinds of rank occur."""
    wrong = {
        (size, seed % 60): (int(torch.linalg.matrix_rank(_product(problem), rtol=1e-6)), problem.rank)
        for seed, (size, problem) in enumerate(problems)
    }
    assert {k: v for k, v in wrong.items() if v[0] != v[1]} == {}
    full = [p.rank == min(p.widths) for _, p in problems]
    assert 0 < sum(full) < len(full)


def test_learning_coefficient_is_the_theorys(
    problems: list[tuple[str, deep_linear.DeepLinearProblem]],
) -> None:
    """λ is Aoyagi's for these widths and this rank, positive and at most half the number of parameters."""
    for _, problem in problems:
        assert problem.learning_coefficient == theory.deep_linear(problem.widths, problem.rank).value
        assert 0 < problem.learning_coefficient <= problem.num_parameters / 2


def test_the_network_realizes_its_data(problems: list[tuple[str, deep_linear.DeepLinearProblem]]) -> None:
    """L(w*) is zero to float32 rounding; targets are the product's; inputs are uniform on [−10, 10]."""
    for _, problem in problems[::7]:
        x, y = problem.data.batch(torch.arange(len(problem.data)))
        assert x.shape == (1000, problem.widths[0]) and y.shape == (1000, problem.widths[-1])
        loss = float(torch.nn.functional.mse_loss(problem.model(x), y).detach())
        assert loss <= 1e-11 * max(float(y.square().mean()), 1.0)
        exact = x.double() @ _product(problem).T
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()) + 1e-30)
        assert x.abs().max() <= 10 and x.min() < -9.9 and x.max() > 9.9
        assert float(x.mean()) == pytest.approx(0, abs=5 * 10 / math.sqrt(3 * x.numel()))
        assert float(x.square().mean()) == pytest.approx(100 / 3, rel=5 * math.sqrt(0.8 / x.numel()))


def test_problems_are_functions_of_their_seed() -> None:
    """Equal seeds give equal weights and data, whatever torch's generator does; other seeds give others."""
    first = deep_linear.make_problem("1k", 5)
    torch.rand(3)
    again, other = deep_linear.make_problem("1k", 5), deep_linear.make_problem("1k", 6)
    assert (again.widths, again.rank, again.learning_coefficient) == (
        first.widths,
        first.rank,
        first.learning_coefficient,
    )
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    indices = torch.tensor([0, 77, 99_999])
    for a, b in zip(first.data.batch(indices), again.data.batch(indices), strict=True):
        assert torch.equal(a, b)
    assert len(first.data) == 100_000
    assert other.widths != first.widths


def test_unknown_size() -> None:
    """The message names the size and lists those there are."""
    with pytest.raises(ValueError, match="size='2k' is unknown; choose one of: 1k, 10k, 1M, 10M, 30M, 100M"):
        deep_linear.make_problem("2k", 0)


def test_classes_are_the_papers() -> None:
    """The table of Furman & Lau 2024 (arXiv 2402.03698, 2308.12108v2): widths, layers, samples, step sizes, steps."""
    assert {name: dataclasses.astuple(c) for name, c in deep_linear.SIZE_CLASSES.items()} == {
        "1k": ((5, 50), (2, 5), 10**5, 5e-7, 10_000),
        "10k": ((5, 100), (2, 10), 10**5, 5e-7, 10_000),
        "1M": ((50, 500), (2, 10), 10**6, 1e-7, 50_000),
        "10M": ((100, 1000), (2, 20), 10**6, 2e-8, 50_000),
        "30M": ((500, 2000), (2, 20), 10**6, 2e-8, 50_000),
        "100M": ((500, 3000), (2, 40), 10**6, 2e-8, 50_000),
    }
    assert (deep_linear.BATCH_SIZE, deep_linear.LOCALIZATION) == (500, 1.0)
