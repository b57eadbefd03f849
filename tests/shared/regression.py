"""A regression of 24 samples in double precision, and short estimates of a small network there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from runs import arguments, gamma
from torch import Tensor, nn

import llc_fast
from llc_fast.result import LLCResult

NUM_SAMPLES = 24


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    numbers = torch.randn(NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return numbers[:, :3].clone(), numbers[:, 3:].clone()


def initialized(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.to(dtype).parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    return initialized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), dtype)


def estimate(model: nn.Module, data: Any = None, loss_fn: Any = F.mse_loss, **options: Any) -> LLCResult:
    chosen: dict[str, Any] = {"lr": 1e-2, "num_chains": 2, "num_draws": 15, "num_burnin": 3, "nbeta": 5.0}
    chosen["localization"] = gamma(options)
    return llc_fast.estimate_llc(
        model, samples() if data is None else data, loss_fn, progress=False, **arguments(chosen | options)
    )


def sample_losses(output: Tensor, target: Tensor) -> Tensor:
    """One loss for each sample."""
    return F.mse_loss(output, target, reduction="none")[:, 0]
