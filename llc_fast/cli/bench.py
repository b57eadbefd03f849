"""How fast this machine steps: every sampler against a plain copy. ``benchmarks/`` has the rivals and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.benchmark import Timer

from llc_fast.optim import optimizer_for
from llc_fast.samplers import samplers_with_optimizer

TENSORS = 100
"""That the parameters are split into."""


def make_params(total: int, device: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """`TENSORS` parameters with about `total` elements in all, and gradients."""
    size = -(-total // TENSORS)
    params = [torch.nn.Parameter(torch.randn(size, device=device).to(dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def step_rows(total: int, device: str, *, seconds: float = 1.0) -> Iterator[dict[str, Any]]:
    """A row for each sampler that is one fused step: nanoseconds a parameter, and how near memory's speed that is.

    Args:
        total: parameters, in 100 tensors, float32.
        device: where.
        seconds: to measure each of sampler and copy for.
    """
    for name, cls in samplers_with_optimizer().items():
        params = make_params(total, device)
        count = sum(p.numel() for p in params)
        options: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0, "seed": 0}
        if cls.metric == "given":
            options["preconditioner"] = [torch.ones_like(p) for p in params]
        source = torch.cat([p.detach() for p in params])
        target = torch.empty_like(source)
        step = _median(optimizer_for(cls)(params, **options).step, seconds)
        copy = _median(lambda source=source, target=target: target.copy_(source), seconds)
        floor = cls.bytes_moved()
        yield {
            "sampler": name,
            "parameters": count,
            "ns_per_parameter": 1e9 * step / count,
            "floor_bytes": floor,
            "gb_per_s": floor * count / step / 1e9,
            "share_of_copy": floor / 8 * copy / step,
        }


def _median(function: Any, seconds: float) -> float:
    """Seconds of one call; waits for a GPU where there is one."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)
