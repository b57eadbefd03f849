"""``llc-fast bench``: the steps of all samplers, timed against a plain copy of the parameters on this machine.

``benchmarks/`` compares them with other packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llc_fast.cli.options import JsonPath, write_all, write_json

if TYPE_CHECKING:
    import torch

TENSORS = 100
"""How many tensors the parameters are split into."""


def bench(
    parameters: Annotated[int, typer.Option(min=1, help="How many, in 100 float32 tensors.")] = 10_000_000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.01, help="For each measurement.")] = 1.0,
    json_path: JsonPath = None,
) -> None:
    """Time every sampler's step on this machine, against a plain copy of the parameters."""
    from llc_fast.estimate import check_device

    check_device(device)
    typer.echo(f"{'sampler':>20} {'ns/parameter':>13} {'bytes at the floor':>19} {'GB/s':>7} {'share of copy':>14}")
    rows = []
    for row in step_rows(parameters, device, seconds=seconds):
        rows.append(row)
        typer.echo(
            f"{row['sampler']:>20} {row['ns_per_parameter']:>13.3f} {row['bytes_moved']:>19g} {row['gb_per_s']:>7.1f} "
            f"{row['share_of_copy']:>13.0%}"
        )
    write_all([("numbers", json_path, lambda path: write_json(path, rows))])


COMMANDS = (bench,)


def make_params(total: int, device: str, dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    """`TENSORS` parameters with about `total` elements in all, and gradients; float32 if `dtype` is None."""
    import torch

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
    import torch

    from llc_fast.optim import optimizer_for
    from llc_fast.samplers import samplers_with_optimizer

    for name, cls in samplers_with_optimizer().items():  # of the others a transition is many evaluations of the model
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
            "bytes_moved": floor,
            "gb_per_s": floor * count / step / 1e9,
            "share_of_copy": floor / 8 * copy / step,
        }


def _median(function: Any, seconds: float) -> float:
    """Seconds of one call; waits for a GPU where there is one."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)
