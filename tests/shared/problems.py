"""Four small models, each with data and a loss, for the tests of strategies, plans and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from runs import arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader

import llc_fast
from llc_fast.data import make_source
from llc_fast.objective.objective import Objective
from llc_fast.result import LLCResult
from llc_fast.samplers import make_sampler

CPU = torch.device("cpu")
N = 40


class _Transformer(nn.Module):
    """One block: embedding and its transpose, LayerNorm, causal attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.qkv, self.mlp = nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.unembedding = nn.Linear(8, 7, bias=False)
        self.unembedding.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(hidden)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + mixed.transpose(1, 2).flatten(2)
        return self.unembedding(hidden + self.mlp(hidden)).transpose(1, 2)


class _Buffered(nn.Module):
    """A batch norm in eval mode and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("scale", torch.linspace(0.5, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.norm(self.inner(x * self.scale))))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def _convolutional() -> nn.Module:
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(2))
    return tokens, tokens.roll(1, 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Any]] = {
    "mlp": (mlp, lambda: (_numbers(N, 3), _numbers(N, 4)[:, 3:]), F.mse_loss),
    "convolutional": (_convolutional, lambda: (_numbers(N, 1, 6, 6), torch.arange(N) % 3), F.cross_entropy),
    "transformer": (_Transformer, _tokens, F.cross_entropy),
    "buffers": (_Buffered, lambda: (_numbers(N, 3), _numbers(N, 4)[:, 3:]), F.mse_loss),
}


def make_problem(name: str = "mlp", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor], Any]:
    """A model with fixed random weights in eval mode, data, and a loss function."""
    make, data, loss_fn = MODELS[name]
    model = make().to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for key, b in model.named_buffers():
            if "running" in key:
                b.copy_(torch.rand(b.shape, generator=generator, dtype=torch.float64) + 0.5)
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in data())
    return model, (x, y), loss_fn


def estimate(model: nn.Module, data: Any, loss_fn: Any, **options: Any) -> LLCResult:
    chosen: dict[str, Any] = {"lr": 1e-3, "num_chains": 3, "num_draws": 12, "num_burnin": 4, "batch_size": 8}
    if isinstance(data, DataLoader):
        del chosen["batch_size"]
    return llc_fast.estimate_llc(model, data, loss_fn, progress=False, **arguments(chosen | options))


SGLD = make_sampler("sgld", lr=1e-3, nbeta=10.0)


def make_objective(flops: float | None = None, **options: Any) -> Objective:
    model, data, loss_fn = make_problem()
    objective = Objective(model, loss_fn, make_source(data, 8, CPU), device=CPU, **options)
    if flops is not None:
        objective.trial = dataclasses.replace(objective.trial, flops=flops)
    return objective
