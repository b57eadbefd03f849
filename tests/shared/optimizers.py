"""The samplers of single steps as optimizers, an example of the options of each, and a model for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llc_fast import optim
from llc_fast.samplers import samplers_with_optimizer

STEPPED = samplers_with_optimizer()
OPTIMIZERS = {name: optim.optimizer_for(cls) for name, cls in STEPPED.items()}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgld": {},
    "preconditioned-sgld": {"preconditioner": torch.tensor([[2.0], [0.05]])},
    "rmsprop-sgld": {"eps": 1.0, "alpha": 0.5, "adapt_steps": 1},
    "adam-sgld": {"eps": 1.0, "betas": (0.5, 0.5), "adapt_steps": 1},
    "sghmc": {"momentum_decay": 0.2},
    "sgnht": {"diffusion_factor": 0.2},
}


def three_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)
