"""Kernels in several streams: each after what it needs, and nothing waits for more than that."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from llc_fast.gradients.branches import Place, places
from llc_fast.gradients.replay import Recording


def _deep_linear(layers: int) -> tuple[Recording[tuple[Tensor, ...]], list[Tensor]]:
    """Loss and gradients of three chains of a deep linear network, and what they are computed from."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 5, 5, requires_grad=True) for _ in range(layers)]
    x, y = torch.randn(3, 7, 5), torch.randn(3, 7, 5)

    def loss(ws: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for w in ws:
            x = x @ w.T
        return F.mse_loss(x, y)

    def function() -> tuple[Tensor, ...]:
        losses = vmap(loss)(weights, x, y)
        grads = torch.autograd.grad(losses, weights, torch.ones(3))
        return losses.detach(), *(g.contiguous() for g in grads)

    return Recording(function, reuses_memory=False), [*weights, x, y]


def _written_to_later() -> tuple[Recording[tuple[Tensor, ...]], list[Tensor]]:
    """What reads memory before it is written to, and what reads it afterwards."""
    x = torch.randn(6, 6)

    def function() -> tuple[Tensor, ...]:
        a = x + 1
        before = a.sum(0)
        a[2:] *= x[2:]
        part = a[:3]
        after = part.exp().sum(0)
        part += 1
        return before, after, a.cos(), a.T @ x

    return Recording(function, reuses_memory=False), [x]


PROGRAMS = {"a deep linear network": lambda: _deep_linear(4), "written to later": _written_to_later}


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_order_that_keeps_what_is_needed_is_right(program: str) -> None:
    """Kernels in random orders, each after those that it needs: the results of the recorded order."""
    recording, inputs = PROGRAMS[program]()
    needs, choose = recording.needs, random.Random(0)
    orders = set()
    for _ in range(60):
        with torch.no_grad():
            for t in inputs:
                t.copy_(torch.randn_like(t))
        recording.replay()
        expected = [t.clone() for t in recording.result]
        for t in recording.result:
            t.fill_(torch.nan)
        done: list[int] = []
        with torch.no_grad():
            while len(done) < len(needs):
                ready = [k for k in range(len(needs)) if k not in done and needs[k] <= set(done)]
                done.append(choose.choice(ready))
                recording.calls[done[-1]]()
        assert all(torch.equal(t, e) for t, e in zip(recording.result, expected, strict=True))
        orders.add(tuple(done))
    assert len(orders) > 4


def _finished_before(found: Sequence[Place]) -> list[set[int]]:
    """For each kernel those that have ended when it starts, by the order of its stream and what it waits for."""
    before: list[set[int]] = []
    for k, place in enumerate(found):
        mine: set[int] = set()
        for j in range(k):
            if found[j].stream == place.stream or j in place.awaits:
                mine |= {j} | before[j]
        before.append(mine)
    return before


@pytest.mark.parametrize("num_streams", [1, 2, 4, 9])
def test_streams_keep_what_is_needed(num_streams: int) -> None:
    """Of random programs."""
    choose = random.Random(num_streams)
    for _ in range(100):
        needs = [frozenset(choose.sample(range(k), min(k, choose.randint(0, 3)))) for k in range(choose.randint(1, 40))]
        found = places(needs, num_streams)
        assert {place.stream for place in found} <= set(range(num_streams))
        for needed, finished in zip(needs, _finished_before(found), strict=True):
            assert needed <= finished


def test_gradients_of_weights_run_beside_those_of_inputs() -> None:
    """Of a network with four layers: the longest way is down and up again, and no weight's gradient but the last is on
    it, so that it has 4 products down, loss and its gradient, 3 up, and one for the last weight, which is copied."""
    recording, _ = _deep_linear(4)
    finished = _finished_before(places(recording.needs, 4))
    steps: list[int] = []
    for before in finished:
        steps.append(1 + max((steps[j] for j in before), default=0))
    alone = [1 + max((steps[j] for j in needed), default=0) for needed in recording.needs]
    assert recording.num_kernels >= 18
    assert max(steps) <= max(alone) + 1 <= 13


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The bits of one stream, again and again, in a graph and outside of one."""
    from llc_fast.gradients.branches import Branches

    torch.manual_seed(0)
    weights = [torch.randn(64, 64, device="cuda") for _ in range(8)]
    x = torch.randn(64, 64, device="cuda")

    def function() -> Tensor:
        pairs = [torch.tanh(x @ a) @ b for a in weights for b in weights]
        return torch.stack(pairs).sum(0)

    recording = Recording(function, reuses_memory=False)
    branches = Branches(recording, torch.device("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        branches.replay()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        branches.replay()
    for _ in range(10):
        x.copy_(torch.randn_like(x))
        expected = function().clone()
        for run in (recording.replay, branches.replay, graph.replay):
            recording.result.fill_(torch.nan)
            run()
            assert torch.equal(recording.result, expected)
