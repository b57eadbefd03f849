"""Exact answers, against a second way to the same number: simulation, closed forms, or finer grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llc_fast import default_nbeta
from llc_fast.problems.exact_posteriors import LOCALIZATION, PROBLEMS, SAMPLES, ExactPosterior, by_quadrature

NBETA = default_nbeta(SAMPLES)


def _loss(problem: ExactPosterior, offset: torch.Tensor) -> float:
    """At w* + offset, in float64."""
    model = problem.model.double()
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat + offset, model.parameters())
    with torch.no_grad():
        loss = float(problem.loss_fn(model(problem.data[0].double()), problem.data[1].double()))
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return loss


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_model_is_at_its_minimum(name: str) -> None:
    problem = PROBLEMS[name]()
    count = sum(p.numel() for p in problem.model.parameters())
    generator = torch.Generator().manual_seed(0)
    lowest = _loss(problem, torch.zeros(count, dtype=torch.float64))
    for scale in (1e-3, 0.03, 0.3):
        for _ in range(5):
            offset = scale * torch.randn(count, generator=generator, dtype=torch.float64)
            assert _loss(problem, offset) >= lowest - 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answer_is_that_of_importance_sampling(name: str) -> None:
    """From a normal law about w*, of the posterior's own width where the loss is quadratic."""
    problem = PROBLEMS[name]()
    x = problem.data[0].double()
    rng = np.random.default_rng(0)
    if name == "logistic":
        design = torch.cat([x, torch.ones(SAMPLES, 1)], dim=1).double()
        p = torch.sigmoid(problem.model.double()(x).detach())
        hessian = design.T @ (design * p * (1 - p)) / SAMPLES
    elif name.startswith("linear"):
        hessian = 2 * x.T @ x / SAMPLES
    else:
        hessian = torch.zeros(1, 1, dtype=torch.float64) if name == "w⁴" else torch.zeros(2, 2, dtype=torch.float64)
    precision = (NBETA * hessian + LOCALIZATION * torch.eye(len(hessian))).numpy()
    draws = rng.standard_normal((1500, len(hessian))) @ np.linalg.inv(np.linalg.cholesky(precision))
    zero = _loss(problem, torch.zeros(len(hessian), dtype=torch.float64))
    excess = NBETA * (np.array([_loss(problem, torch.from_numpy(d)) for d in draws]) - zero)
    log_weight = -excess - LOCALIZATION / 2 * (draws**2).sum(1) + ((draws @ precision) * draws).sum(1) / 2
    weight = np.exp(log_weight - log_weight.max())
    mean = float((weight * excess).sum() / weight.sum())
    error = math.sqrt(float((weight**2 * (excess - mean) ** 2).sum())) / weight.sum()
    assert abs(mean - problem.answer) < 4 * error and error < 0.15 * problem.answer


def test_quadrature_of_a_quadratic() -> None:
    """½·Σ nβh/(nβh + γ) in one and two dimensions."""
    h = np.array([0.05, 0.3])

    def loss(w: np.ndarray) -> np.ndarray:
        values: np.ndarray = 0.5 * (h[: w.shape[-1]] * w**2).sum(axis=-1)
        return values

    for dimension in (1, 2):
        exact = float((0.5 * NBETA * h / (NBETA * h + LOCALIZATION))[:dimension].sum())
        assert by_quadrature(loss, np.eye(dimension), width=4.0, points=601) == pytest.approx(exact, rel=1e-6)


def test_the_seed_of_the_data_is_fixed() -> None:
    for name in PROBLEMS:
        first, again = PROBLEMS[name](), PROBLEMS[name]()
        assert first.answer == again.answer and torch.equal(first.data[0], again.data[0])
