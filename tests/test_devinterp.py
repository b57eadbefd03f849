"""Drop-in use inside devinterp 1.3.2's own sampler: unchanged calls, its callbacks included."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import llc_fast

devinterp = pytest.importorskip("devinterp", reason="pip install devinterp==1.3.2")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from devinterp.optim.sgld import SGLD as TheirSGLD
    from devinterp.slt.mala import MalaAcceptanceRate
    from devinterp.slt.norms import GradientNorm, NoiseNorm, WeightNorm
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

DRAWS, CHAINS = 400, 3


def _problem() -> tuple[nn.Module, DataLoader[Any]]:
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    model = nn.Linear(5, 2)
    y = model(x).detach() + 0.3 * torch.randn(400, 2)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(400, 1)], dim=1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:5].T)
        model.bias.copy_(solution[5])
    return model, DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)


def _evaluate(model: nn.Module, data: Any) -> torch.Tensor:
    x, y = data
    return nn.functional.mse_loss(model(x), y)


def _estimate(method: Any, callbacks: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    model, loader = _problem()
    kept = copy.deepcopy(model.state_dict())
    kwargs = {"lr": 1e-3, "nbeta": 60.0, "localization": 10.0} | options.pop("optimizer_kwargs", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results: dict[str, Any] = estimate_learning_coeff_with_summary(
            model,
            loader,
            callbacks=callbacks or [],
            evaluate=_evaluate,
            sampling_method=method,
            optimizer_kwargs=kwargs,
            num_draws=options.pop("num_draws", DRAWS),
            num_chains=CHAINS,
            num_burnin_steps=200,
            init_loss=float(_evaluate(model, loader.dataset.tensors)),  # type: ignore[attr-defined]
            seed=3,
            verbose=False,
            **options,
        )
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), model.state_dict().values(), strict=True))
    return results


def _mean(results: dict[str, Any]) -> float:
    return float(results["llc/mean"])


def test_sgld_gives_what_theirs_gives() -> None:
    """The same posterior: λ̂ agrees within the spread over chains; chains differ from one another."""
    ours, theirs = _estimate(llc_fast.SGLD), _estimate(TheirSGLD)
    spread = float(np.hypot(ours["llc/std"], theirs["llc/std"])) / CHAINS**0.5
    # The spread of three chains is itself uncertain: allow the 99.9 % point of Student's t with four degrees.
    assert abs(_mean(ours) - _mean(theirs)) < 8.6 * spread
    assert float(ours["llc/std"]) > 0
    assert _mean(ours) == pytest.approx(6 * 60 / 65, rel=0.25)  # twelve parameters, most of them stiff against γ


def test_other_samplers_run() -> None:
    for method, options in (
        (llc_fast.RMSpropSGLD, {"lr": 1e-3}),
        (llc_fast.AdamSGLD, {"lr": 1e-4}),
        (llc_fast.SGHMC, {"lr": 1e-3}),
        (llc_fast.SGNHT, {"lr": 1e-4}),
        (llc_fast.PreconditionedSGLD, {"lr": 1e-3, "preconditioner": 0.5}),
    ):
        assert 1 < _mean(_estimate(method, optimizer_kwargs=options, num_draws=100)) < 20


def test_callbacks_and_metrics() -> None:
    """Noise, norms and MALA acceptance read the metrics they ask for, and see what they see with their own sampler."""
    outcomes = []
    for method in (llc_fast.SGLD, TheirSGLD):
        callbacks = [
            MalaAcceptanceRate(CHAINS, DRAWS, nbeta=60.0, learning_rate=1e-3),
            NoiseNorm(CHAINS, DRAWS),
            GradientNorm(CHAINS, DRAWS),
            WeightNorm(CHAINS, DRAWS),
        ]
        metrics = ["noise", "dws", "localization_loss", "noise_norm", "grad_norm", "weight_norm", "distance"]
        outcomes.append(_estimate(method, callbacks, optimizer_kwargs={"metrics": metrics}))
    ours, theirs = outcomes
    for key in ("mala_accept/trace", "noise_norm/trace", "gradient_norm/trace", "weight_norm/trace"):
        a, b = np.asarray(ours[key])[:, 2:], np.asarray(theirs[key])[:, 2:]
        assert np.isfinite(a).all()
        # Different noise, same law: means over a thousand correlated values agree within a few percent.
        assert a.mean() == pytest.approx(b.mean(), rel=0.05), key


def test_masks_for_each_parameter() -> None:
    """optimize_over_per_model_param: one group a parameter, masked elements stay."""
    masks = {"weight": torch.zeros(2, 5, dtype=torch.bool), "bias": torch.ones(2, dtype=torch.bool)}
    free, restricted = _estimate(llc_fast.SGLD), _estimate(llc_fast.SGLD, optimize_over_per_model_param=masks)
    assert 0 < _mean(restricted) < 0.5 * _mean(free)
