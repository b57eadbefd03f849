"""The curvature at w*, by the default step size, which is made from it."""

from __future__ import annotations

from typing import Any

import pytest
import runs
import torch
from regression import NUM_SAMPLES, estimate, initialized, samples
from torch import Tensor, nn

from llc_fast.data import make_source
from llc_fast.objective import differences
from llc_fast.objective.curvature import Descent, descent
from llc_fast.objective.objective import Objective

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("gamma", [0.0, 1.0, 500.0])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["trained", "all zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_step_size(dtype: torch.dtype, scale: float, gamma: float) -> None:
    """lr=None is 0.2 / (nβ·h_max + γ): at most 10 % more than that, h_max being estimated from below."""
    x = runs.data(200, dtype=torch.float64)[0] * torch.tensor([3.0, 1.0, 0.5])
    model = runs.initialized(nn.Linear(3, 1, bias=False).to(dtype))
    with torch.no_grad():
        model.weight.mul_(scale)
    data = x.to(dtype), x[:, :1].to(dtype)
    result = runs.estimate(
        model=model, data=data, lr=None, batch_size=None, nbeta=30.0, localization=gamma, num_draws=1
    )
    curvature = float(torch.linalg.eigvalsh(2 * x.T @ x / 200)[-1])
    exact = 0.2 / (30.0 * curvature + gamma)
    assert exact * (1 - 1e-3) <= result.settings["lr"] <= 1.1 * exact


def test_no_step_size_without_curvature() -> None:
    """Where the loss is flat and nothing pulls, no step size can be chosen: an error that asks for lr."""
    model = runs.initialized(nn.Linear(3, 1))
    with pytest.raises(ValueError, match="pass lr"):
        runs.estimate(model=model, loss_fn=lambda out, y: 0 * out.mean() + 1.0, lr=None, localization=0.0)


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_default_step_size_of_a_mask(gamma: float) -> None:
    """0.2 / (nβ·h_max + γ) with the curvature within the mask: at most 10 % more, h_max being a lower bound."""
    x = samples()[0] * torch.tensor([10.0, 1.0, 0.3])
    model = initialized(nn.Linear(3, 1, bias=False))
    mask = torch.tensor([[False, True, True]])
    result = estimate(model, (x, x[:, :1]), params={"weight": mask}, lr=None, localization=gamma)
    kept = x[:, mask[0]]
    exact = 0.2 / (5.0 * float(torch.linalg.eigvalsh(2 * kept.T @ kept / NUM_SAMPLES)[-1]) + gamma)
    assert exact * (1 - 1e-3) <= result.settings["lr"] <= 1.1 * exact


# ---- the way down ------------------------------------------------------------------------------------------


def _data(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 6)
    return x, torch.randn(n, 1, generator=generator, dtype=torch.float64)


def _linear(n: int = 60, batch_size: int = 10) -> tuple[Objective, Tensor, Tensor]:
    """Linear regression away from its solution, the gradient of its loss, and its Hessian."""
    x, y = _data(n)
    model = runs.initialized(nn.Linear(6, 1, bias=False).double())
    device = torch.device("cpu")
    objective = Objective(model, runs.mse, make_source((x, y), batch_size, device), device=device)
    gradient = 2 * x.T @ (x @ model.weight[0].detach() - y[:, 0]) / n
    return objective, gradient, 2 * x.T @ x / n


@pytest.mark.parametrize("gamma", [0.5, 50.0])
def test_way_down_of_a_quadratic_loss(gamma: float) -> None:
    """½·nβ²·gᵀ(nβH + γ)⁻¹g, and the fall of nβ·L at that place, at the nβ it was measured at and at others."""
    objective, g, hessian = _linear(batch_size=60)
    found = descent(objective, 30.0, gamma, max_gradients=1000)
    assert found is not None
    for nbeta in (30.0, 3.0, 0.3):
        away = -nbeta * torch.linalg.solve(nbeta * hessian + gamma * torch.eye(6), g)
        assert found.of_posterior(nbeta, gamma) == pytest.approx(-0.5 * nbeta * float(g @ away), rel=1e-3)
        exact = nbeta * float(g @ away + 0.5 * away @ hessian @ away)
        assert found.of_loss(nbeta, gamma) == pytest.approx(-exact, rel=1e-3)


def test_nbeta_at_which_it_is_a_minimum() -> None:
    objective, _, _ = _linear()
    found = descent(objective, 30.0, 2.0, max_gradients=1000)
    assert found is not None
    most = 0.1 * found.of_posterior(30.0, 2.0)
    nbeta = found.nbeta_for(most, 30.0, 2.0)
    assert 0 < nbeta < 30 and found.of_posterior(nbeta, 2.0) == pytest.approx(most, rel=1e-6)
    assert Descent().nbeta_for(0.1, 30.0, 2.0) == pytest.approx(30)


@pytest.mark.parametrize(("budget", "is_known"), [(3, False), (7, False), (8, True), (20, True), (200, True)])
def test_way_down_by_few_gradients(budget: int, is_known: bool) -> None:
    """With fewer iterations, and then fewer minibatches for the Hessian; no more than it may take."""
    objective, _, _ = _linear(batch_size=30)
    spent = 0
    before = objective.gradient_at

    def counted(*args: Any) -> Tensor:
        nonlocal spent
        spent += 1
        return before(*args)

    objective.gradient_at = counted  # type: ignore[method-assign]
    found = descent(objective, 30.0, 2.0, max_gradients=budget)
    assert (found is not None) == is_known and spent <= budget
    if found is not None:
        complete = descent(objective, 30.0, 2.0, max_gradients=1000)
        assert complete is not None
        ratio = found.of_posterior(30.0, 2.0) / complete.of_posterior(30.0, 2.0)
        assert 0.3 < ratio < (1.5 if budget < 20 else 1 + 1e-6)  # of a Hessian of half of the data


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_large_model_is_followed_along_its_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction, with the curvature gᵀHg/‖g‖²; a bfloat16 model's w* has another dtype than its gradient."""
    monkeypatch.setattr(differences, "_LARGE", 1)
    objective, _, hessian = _linear(batch_size=20)
    if dtype == torch.bfloat16:
        objective = objective.in_precision(lambda t: t.to(dtype) if t.dtype == torch.float64 else t)
        objective.source = make_source(tuple(t.to(dtype) for t in _data(60)), 20, torch.device("cpu"))
    x, y = _data(60)
    g = 2 * x.T @ (x @ objective.reference["weight"][0].double() - y[:, 0]) / 60
    before = {name: p.clone() for name, p in objective.reference.items()}
    found = descent(objective, 30.0, 2.0, max_gradients=1000)
    assert found is not None
    rounding = 1e-6 if dtype == torch.float64 else 0.03
    assert found.squares == pytest.approx((float(g @ g),), rel=rounding)
    assert found.curvatures == pytest.approx((float(g @ hessian @ g / (g @ g)),), rel=rounding)
    assert all(torch.equal(objective.reference[name], p) for name, p in before.items())


def test_a_ridge_leads_down() -> None:
    """Where the curvature along the gradient is negative, the way down counts as flat: at least as far as γ allows."""

    class Ridge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(self.w) + 0 * x

    x, device = torch.zeros(4, 1, dtype=torch.float64), torch.device("cpu")
    objective = Objective(Ridge(), lambda out, _: out.mean(), make_source((x, x), 4, device), device=device)
    found = descent(objective, 100.0, 1.0, max_gradients=1000)
    assert found is not None
    slope = torch.sin(torch.tensor(0.5, dtype=torch.float64)).item()
    assert found.of_posterior(100.0, 1.0) == pytest.approx(0.5 * (100 * slope) ** 2, rel=1e-3)
