"""Deep linear networks trained from saddle to saddle."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from llc_fast.problems.deep_linear import end_to_end
from llc_fast.problems.saddle_to_saddle import (
    LinearDeviation,
    SaddleToSaddle,
    balanced_weights,
    behavioural,
    mean_square,
    small_weights,
)


@pytest.fixture(scope="module")
def problem() -> SaddleToSaddle:
    return SaddleToSaddle.make(5, 3, (3.0, 1.0), 200, torch.Generator().manual_seed(0))


def test_loss_and_step_are_those_of_autograd(problem: SaddleToSaddle) -> None:
    weights = small_weights((5, 4, 6, 3), 1.0, torch.Generator().manual_seed(1))
    leaves = [w.clone().requires_grad_() for w in weights]
    x = problem.inputs.double()
    output = x
    for leaf in leaves:
        output = output @ leaf.T
    loss = (output - x @ problem.teacher.T).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert problem.loss(weights) == pytest.approx(loss.item(), rel=1e-12)
    for stepped, leaf in zip(problem.step(weights, 0.1), leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(stepped, leaf.detach() - 0.1 * leaf.grad, rtol=1e-12, atol=1e-12)


def test_one_layer_is_trained_too(problem: SaddleToSaddle) -> None:
    weights = small_weights((5, 3), 1.0, torch.Generator().manual_seed(1))
    for _ in range(300):
        weights = problem.step(weights, 0.5)
    torch.testing.assert_close(weights[0], problem.teacher, rtol=1e-6, atol=1e-6)


def test_teacher_has_the_singular_values_it_was_given(problem: SaddleToSaddle) -> None:
    assert torch.linalg.svdvals(problem.teacher).tolist() == pytest.approx([3.0, 1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("values", [(), (2.0,), (8.0, 0.5)])
def test_balanced_layers_share_the_rank_of_their_product(values: tuple[float, ...]) -> None:
    weights = balanced_weights((5, 4, 2, 6), values, torch.Generator().manual_seed(0))
    assert [tuple(w.shape) for w in weights] == [(4, 5), (2, 4), (6, 2)]
    for matrix, power in [(end_to_end(weights), 1.0), *((w, 1 / 3) for w in weights)]:
        found = torch.linalg.svdvals(matrix).tolist()
        expected = [v**power for v in values]
        assert found == pytest.approx(expected + [0.0] * (len(found) - len(values)), abs=1e-12)


def test_too_many_singular_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 singular values do not fit through widths=\(5, 2, 5\)"):
        balanced_weights((5, 2, 5), (3.0, 2.0, 1.0), torch.Generator())


def test_deviation_is_the_loss_of_training_or_of_behaviour(problem: SaddleToSaddle) -> None:
    weights = small_weights((5, 4, 3), 1.0, torch.Generator().manual_seed(1))
    held, own = LinearDeviation(weights, problem.teacher), behavioural(weights)
    batch = (problem.inputs,)
    assert float(mean_square(held, batch).mean().detach()) == pytest.approx(problem.loss(weights), rel=1e-5)
    assert float(mean_square(own, batch).mean().detach()) < 1e-12
    other = copy.deepcopy(own)
    other.load_state_dict(held.state_dict())  # the reference comes along
    assert float(mean_square(other, batch).mean().detach()) == pytest.approx(problem.loss(weights), rel=1e-5)
    assert [name for name, _ in own.named_parameters()] == ["layers.0.weight", "layers.1.weight"]


def test_training_keeps_layers_balanced() -> None:
    """W_{l+1}ᵀ W_{l+1} − W_l W_lᵀ is constant under gradient flow; a step Δ adds Δ_{l+1}ᵀ Δ_{l+1} − Δ_l Δ_lᵀ."""
    generator = torch.Generator().manual_seed(0)
    problem = SaddleToSaddle.make(4, 4, (2.0, 1.0), 500, generator)
    weights = small_weights((4, 3, 3, 4), 0.05, generator)

    def imbalance(layers: list[torch.Tensor]) -> list[torch.Tensor]:
        return [after.T @ after - before @ before.T for before, after in itertools.pairwise(layers)]

    begin, moved = imbalance(weights), 0.0
    for _ in range(6000):
        before, weights = weights, problem.step(weights, 0.05)
        moved += sum(float((now - then).square().sum()) for now, then in zip(weights, before, strict=True))
    assert problem.loss(weights) < 1e-3  # it has gone all the way
    assert moved < 0.1
    for now, then in zip(imbalance(weights), begin, strict=True):
        assert float(torch.linalg.matrix_norm(now - then)) < moved
