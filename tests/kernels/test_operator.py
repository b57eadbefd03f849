"""The step as an operator of torch: opcheck and torch.compile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizers import OPTIMIZERS, OPTIONS, STEPPED, three_layers
from torch import nn

import llc_fast
from llc_fast.kernels.native import NUM_STATES
from llc_fast.kernels.step import SUMS


def _operation_arguments(name: str, low: bool = False) -> tuple[Any, ...]:
    w = [torch.randn(7), torch.randn(3, 4)]
    grads = [torch.randn_like(t).to(torch.bfloat16 if low else torch.float32) for t in w]
    copies = [torch.zeros_like(g) for g in grads] if low else []
    states = [torch.rand_like(t) for t in w for _ in range(NUM_STATES[name])]
    scalars = [1e-3, 10.0, 1.0, 0.0, 1.0, math.inf, 0.9, 0.9, 0.1, 0.1, math.inf]
    references, masks = [w[0].clone(), None], [None, torch.rand(3, 4) > 0.5]
    return (
        w,
        grads,
        references,
        masks,
        states,
        [None, None],
        [1.0, 0.5],
        copies,
        name,
        [0, 7],
        scalars,
        3,
        torch.tensor(2),
        torch.full((1,), 0.2, dtype=torch.float64),
        torch.zeros(1, len(SUMS), dtype=torch.float64) if name == "sgnht" else None,
        ["momentum"],
    )


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", STEPPED)
def test_opcheck(name: str, low: bool) -> None:
    torch.library.opcheck(torch.ops.llc_fast.step.default, _operation_arguments(name, low))


@pytest.mark.parametrize("name", STEPPED)
def test_torch_compile_without_graph_breaks(name: str) -> None:
    """fullgraph=True refuses any break; six steps, one graph, the same bits as eager."""
    torch._dynamo.reset()
    x, ends = torch.randn(8, 6), []
    options = {k: v for k, v in OPTIONS[name].items() if k != "preconditioner"}
    for backend in (None, "aot_eager"):
        model = three_layers()
        optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3, nbeta=20.0, localization=1.0, seed=2, **options)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        run_step = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            run_step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])


def test_torch_compile_breaks_its_graph_around_metrics() -> None:
    """What reports to the host still works under torch.compile, outside the graph."""
    torch._dynamo.reset()
    w = nn.Parameter(torch.ones(50))
    optimizer = llc_fast.SGLD([w], lr=1e-3, nbeta=5.0, localization=1.0, seed=1, metrics=["distance", "noise"])
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for _ in range(3):
        w.grad, before = torch.ones_like(w), w.detach().clone()
        step()
        assert float(optimizer.distance) == pytest.approx(float((before - 1).norm()), abs=1e-5)
        assert optimizer.noise[0][0].shape == (50,)
