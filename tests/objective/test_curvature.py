"""The curvature at w*, by the default step size, which is made from it."""

from __future__ import annotations

import pytest
import runs
import torch
from regression import NUM_SAMPLES, estimate, initialized, samples
from torch import nn

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
