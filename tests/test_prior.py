"""nbeta=0: chains of localization alone, N(w*, 1/γ)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast.calibration import PRIOR_STIFFNESS
from llc_fast.samplers import make_sampler

GAMMA, DRAWS, CHAINS = 7.0, 2000, 4


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 6, bias=False), torch.randn(40, 8)
    with torch.no_grad():
        return model, (x, model(x) + torch.randn(40, 6))


def estimate(**options: Any) -> llc_fast.LLCResult:
    model, data = problem()
    chosen: dict[str, Any] = {"num_draws": DRAWS, "num_burnin": 300, "num_chains": CHAINS, "batch_size": 10}
    chosen |= {"nbeta": 0, "localization": GAMMA, "progress": False} | options
    return llc_fast.estimate_llc(model, data, nn.functional.mse_loss, **chosen)


def away(draw: llc_fast.Draw) -> Tensor:
    return draw.params["weight"].flatten() - REFERENCE


REFERENCE = problem()[0].weight.detach().flatten()  # type: ignore[operator,union-attr]
SAMPLERS = ["sgld", "sghmc", "sgnht", "rmsprop-sgld", "mala"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_variance_is_that_of_localization(name: str) -> None:
    """1/γ, in the stationary distribution of the step 1/γ/(1 − εγ/4), and w* as the mean, within the Monte Carlo error
    of draws that forget each other in 2/(εγ) steps: with ε chosen from γ."""
    options = {"batch_size": None} if name == "mala" else {}
    result = estimate(sampler=name, observables={"away": away}, **options)
    values, lr = result.observables["away"], float(result.settings["lr"])
    if name in ("sgld", "sghmc"):  # sghmc without friction's help is sgld
        assert lr * GAMMA == pytest.approx(PRIOR_STIFFNESS)
    if name == "sgld":
        expected = 1 / GAMMA / (1 - lr * GAMMA / 4)
        count = values.size * lr * GAMMA / 4  # squares forget each other in half the time; two-sided
        assert values.var() == pytest.approx(expected, rel=4 * math.sqrt(2 / count))
    assert (values**2).mean() * GAMMA == pytest.approx(1, abs=0.08)
    assert abs(values.mean()) < 0.08 / math.sqrt(GAMMA)
    assert result.llc_mean == 0 and not result.warnings


def test_a_given_metric() -> None:
    """The largest element of the metric sets the step size; the distribution is the same."""
    metric = torch.linspace(0.1, 2, 48).view(6, 8)
    sampler = make_sampler("preconditioned-sgld", preconditioner={"weight": metric})
    result = estimate(sampler=sampler, observables={"away": away}, num_draws=4000)
    assert float(result.settings["lr"]) * GAMMA * 2 == pytest.approx(PRIOR_STIFFNESS)
    fast = metric.flatten().numpy() > 0.5
    variance = (result.observables["away"] ** 2).mean(axis=(0, 1)) * GAMMA
    assert variance[fast].mean() == pytest.approx(1, abs=0.08)


def test_the_result_says_so() -> None:
    """λ̂ = 0 by definition; what draws lose is kept and shown; no λ̂-like statistic warns."""
    result = estimate(num_draws=400)
    text = result.summary()
    assert "λ̂ = 0 by definition: nβ = 0, and localization alone was sampled" in text
    assert result.llc_mean == result.llc_stderr == result.relative_error == 0 and np.ptp(result.loss_trace) > 0
    # E[L − L(w*)] = tr(H)/(2γ) with H the Hessian of the mean of squares: 2·E[xxᵀ]/6 for each of 6 outputs.
    _, (x, _) = problem()
    expected = float(x.square().sum(1).mean()) / GAMMA
    excess = result.loss_trace[:, result.schedule.draws].mean() - result.init_loss
    assert excess == pytest.approx(expected, rel=0.15)
    assert f"{excess:+.2g} at the draws" in text
    assert "pilot_steps" not in result.diagnostics and result.diagnostics["r_hat"] > 0.9
    assert "0.04 / γ, since nβ = 0" in llc_fast.calibrate(*problem(), nn.functional.mse_loss, nbeta=0).reason


def test_length_by_need() -> None:
    """The draws are wanted, not λ̂: enough of them."""
    result = estimate(num_draws=None, num_burnin=None, batch_size=None)
    assert result.diagnostics["ended_by"] == "target" and result.diagnostics["ess_bulk"] >= 200


def test_a_given_step_size_and_a_checkpoint(tmp_path: Any) -> None:
    """With ε as it is given; the same call gives the same bits from its checkpoint."""
    options: dict[str, Any] = {"lr": 1e-2, "num_draws": 50, "checkpoint": tmp_path / "run.npz"}
    first = estimate(**options)
    again = estimate(**options)
    assert first.settings["lr"] == 1e-2 and np.array_equal(first.loss_trace, again.loss_trace)
    first.save(tmp_path / "result.npz")
    assert llc_fast.LLCResult.load(tmp_path / "result.npz").llc_mean == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"localization": 0.0}, "localization=0 with nbeta=0 is no distribution: pass a localization above 0"),
        ({"bias_correction": True}, "bias_correction=True is not possible with nbeta=0: bias is a share of"),
        ({"sensitivity": True}, "sensitivity=True is not possible with nbeta=0"),
        ({"refine": True}, "refine=True is not possible with nbeta=0: the minimum of localization alone is w"),
        ({"nbeta": -1.0}, "nbeta must be"),
    ],
)
def test_what_needs_a_loss(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(**options)
