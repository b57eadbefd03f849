"""Networks at an exact minimum: gradients vanish there, the means are the same loss, and λ is that of theory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llc_fast import theory
from llc_fast.problems.deep_linear import most_singular
from llc_fast.problems.exact_minima import ExactMinimum, half_rank, tanh_regression, transformer_distillation

_PROBLEMS = {"tanh": tanh_regression, "transformer": transformer_distillation}


def _loss(problem: ExactMinimum, model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return problem.loss_fn(model(data[0]), data[1])


def _moved(model: nn.Module, distance: float) -> nn.Module:
    torch.manual_seed(3)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(distance * torch.randn_like(p))
    return moved


@pytest.mark.parametrize("make", _PROBLEMS.values(), ids=_PROBLEMS)
def test_minimum(make: Callable[..., ExactMinimum]) -> None:
    """No gradient over all data at w*, one in minibatches, and a loss that is higher everywhere else."""
    problem = make(1, num_samples=60)
    parameters = list(problem.model.parameters())
    whole = torch.autograd.grad(_loss(problem, problem.model, problem.data), parameters)
    some = (problem.data[0][::2], problem.data[1][::2])
    part = torch.autograd.grad(_loss(problem, problem.model, some), parameters)
    assert sum(float(g.square().sum()) for g in whole) < 1e-10 * sum(float(g.square().sum()) for g in part)
    with torch.no_grad():
        lowest = _loss(problem, problem.model, problem.data)
        for distance in (0.01, 0.1, 1.0):
            assert _loss(problem, _moved(problem.model, distance), problem.data) > lowest
    assert problem.num_parameters == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("make", _PROBLEMS.values(), ids=_PROBLEMS)
def test_means_are_the_same_loss(make: Callable[..., ExactMinimum]) -> None:
    problem = make(2, num_samples=40)
    gaps = []
    for distance in (0.0, 0.3, 1.0):
        model = _moved(problem.model, distance).double()
        whole, few = (
            tuple(t.double() if t.is_floating_point() else t for t in data) for data in (problem.data, problem.means)
        )
        gaps.append(float(_loss(problem, model, whole) - _loss(problem, model, few)))  # type: ignore[arg-type]
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-6, abs=1e-7)


def test_soft_targets_are_probabilities() -> None:
    probs = transformer_distillation(0, num_samples=20).data[1]
    assert bool((probs > 0).all()) and torch.allclose(probs.sum(dim=-1), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_coefficients(seed: int) -> None:
    """A tanh network has no continuous symmetry; the transformer's are counted."""
    regression = tanh_regression(seed)
    assert regression.learning_coefficient == regression.num_parameters / 2
    transformer = transformer_distillation(seed)
    # Queries against keys and values against outputs, 3×3 matrices in each of two heads; a 6×6 change of basis of the
    # residual stream; what embeddings and positions share; a vector that all logits have in common.
    assert 2 * transformer.learning_coefficient <= transformer.num_parameters - 4 * 9 - 36 - 6 - 6


@pytest.mark.parametrize("widths", [(4, 3, 5), (3, 6, 2, 4)])
def test_half_rank_of_regular_deep_linear_networks(widths: tuple[int, ...]) -> None:
    """Where all layers have full rank it is Aoyagi's λ."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    known = theory.deep_linear(widths, min(widths)).value
    assert half_rank(model, torch.randn(50, widths[0]), lambda output: output) == known


def test_most_singular() -> None:
    """Every layer has the rank of the product, and the data fit."""
    problem = most_singular((5, 4, 6, 5), 2, 50, 0)
    weights = [p.detach() for p in problem.model.parameters()]
    ranks = [int(torch.linalg.matrix_rank(w, rtol=1e-5)) for w in weights]
    assert ranks == [2, 2, 2] and int(torch.linalg.matrix_rank(weights[2] @ weights[1] @ weights[0], rtol=1e-5)) == 2
    assert problem.learning_coefficient == theory.deep_linear((5, 4, 6, 5), 2).value
    x, y = problem.data.batch(torch.arange(50))
    assert float(nn.functional.mse_loss(problem.model(x), y)) < 1e-10
    with pytest.raises(ValueError, match="rank"):
        most_singular((5, 4), 5, 10, 0)


def test_samples_come_in_pairs() -> None:
    for make in _PROBLEMS.values():
        with pytest.raises(ValueError, match="even"):
            make(0, num_samples=7)
