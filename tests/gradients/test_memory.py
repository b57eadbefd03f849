"""The memory that a run needs, known before it begins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import CPU, SGLD, estimate, make_objective, make_problem

from llc_fast.gradients import memory
from llc_fast.gradients.plan import make_plan
from llc_fast.samplers import make_sampler
from llc_fast.samplers.state import ChainState

pytestmark = pytest.mark.usefixtures("two_threads")


def _with_memory(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: size)


def _needed(strategy: str, chains: int = 8, **options: Any) -> int:
    objective = make_objective()
    plan = make_plan(objective, SGLD, chains, strategy=strategy, **options)
    return memory.needed_bytes(objective, SGLD, plan)


def test_memory_is_asked_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little for a batch of chains: the error says what is needed, what there is, and a remedy that works."""
    torch.set_num_threads(1)
    one, all_chains = _needed("sequential"), _needed("batched")
    assert one < all_chains
    _with_memory(monkeypatch, all_chains)
    estimate(*make_problem(), num_chains=8, strategy="batched")
    _with_memory(monkeypatch, all_chains - 1)
    with pytest.raises(MemoryError, match=r"this run needs .* \(batched, 8 chains at a time\).*cpu has .*sequential"):
        estimate(*make_problem(), num_chains=8, strategy="batched")
    _with_memory(monkeypatch, one)
    estimate(*make_problem(), num_chains=8, strategy="sequential")  # the remedy


def test_memory_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released gradients where only they fit; smaller batches or fewer parameters where nothing does."""
    torch.set_num_threads(1)
    released = _needed("sequential", release_gradients=True)
    _with_memory(monkeypatch, released)
    with pytest.raises(MemoryError, match=r'strategy="sequential", release_gradients=True\) needs'):
        estimate(*make_problem(), strategy="batched")
    estimate(*make_problem(), strategy="sequential", release_gradients=True)
    _with_memory(monkeypatch, 10)
    with pytest.raises(MemoryError, match=r"smaller batch_size|sample a part of the parameters"):
        estimate(*make_problem(), strategy="sequential")
    with pytest.raises(MemoryError, match="needs") as caught:
        estimate(*make_problem(), sampler="sgnht")
    assert "release_gradients" not in str(caught.value)  # SGNHT can't


def test_unknown_memory_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where free memory can't be told, the run is tried."""
    _with_memory(monkeypatch, None)
    assert np.isfinite(estimate(*make_problem()).loss_trace).all()


def test_available_memory() -> None:
    """A number of bytes on a CPU; None on devices that tell nothing."""
    assert (memory.available_bytes(CPU) or 0) > 2**20
    assert memory.available_bytes(torch.device("meta")) is None


def test_what_torch_keeps_for_later_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at a large model leaves its copies there, which the chains then get."""
    for name, value in [("mem_get_info", (1000, 9000)), ("memory_reserved", 7000), ("memory_allocated", 4000)]:
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=value: found)
    assert memory.available_bytes(torch.device("cuda", 0)) == 4000


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_needed_memory_grows_with_what_is_kept(strategy: str) -> None:
    """Chains at a time, states of the sampler, gradients: more of any needs more."""
    objective = make_objective()
    plan = make_plan(objective, SGLD, 8, strategy=strategy)
    sizes = [
        memory.needed_bytes(objective, make_sampler(name, lr=1e-3, nbeta=1.0), plan)
        for name in ("sgld", "rmsprop-sgld", "adam-sgld")
    ]
    together, element = plan.group_size * plan.num_workers, 8
    assert np.diff(sizes).tolist() == [together * element * objective.num_parameters] * 2


def test_a_metric_that_is_estimated_is_counted() -> None:
    """A is a tensor like w for all chains; one that is given is the user's. Making it may need more than few chains."""
    objective = make_objective()
    width, count = 8, objective.num_parameters
    for chains in (1, 8):
        plan = make_plan(objective, SGLD, chains, strategy="batched")
        given, estimated = (
            memory.needed_bytes(
                objective, make_sampler("preconditioned-sgld", lr=1e-3, nbeta=1.0, preconditioner=a), plan
            )
            for a in (1.0, "curvature")
        )
        assert estimated - given == width * count
    released = make_plan(objective, SGLD, 1, strategy="sequential", release_gradients=True)
    sampler = make_sampler("preconditioned-sgld", lr=1e-3, nbeta=1.0, preconditioner="curvature")
    assert memory.needed_bytes(objective, sampler, released) >= (3 * width + 1) * count


def test_room_for_momentum_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pilot chains may choose it: a run that just fits without must not run out of memory half-way."""
    torch.set_num_threads(1)
    objective = make_objective()
    plan = make_plan(objective, SGLD, 8, strategy="batched")
    without = memory.needed_bytes(objective, SGLD, plan)
    assert memory.needed_bytes(objective, make_sampler("sghmc", lr=1e-3, nbeta=10.0), plan) > without
    _with_memory(monkeypatch, without)
    options: dict[str, Any] = {"num_chains": 8, "strategy": "batched", "num_draws": 60, "num_burnin": 60}
    estimate(*make_problem(), **options)
    estimate(*make_problem(), **options, sampler="sgld", lr=None)
    with pytest.raises(MemoryError, match="this run needs"):
        estimate(*make_problem(), **options, lr=None)


@pytest.mark.parametrize(("sizes", "calls"), [([50] * 320, 30), ([400, *[20] * 40], 21), ([300, 10, 300], 3)])
def test_released_gradients_move_in_groups(sizes: list[int], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small gradients take few calls, those that wait are never more than memory was asked for, and the chain has
    the bits of one whose gradients are kept."""

    class Sums(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.parts = torch.nn.ParameterList(torch.randn(n, generator=generator) for n in sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x * part.square().mean() for part in self.parts]).sum(0)

    moved: list[list[int]] = []
    move = ChainState.move_some

    def seen(state: ChainState, grads: dict[str, torch.Tensor], step: int) -> None:
        moved.append([g.nbytes for g in grads.values()])
        move(state, grads, step)

    monkeypatch.setattr(ChainState, "move_some", seen)
    data = torch.rand(20), torch.rand(20)
    options: dict[str, Any] = {"num_chains": 1, "num_draws": 6, "strategy": "sequential", "lr": 1e-4}
    released = estimate(Sums(), data, torch.nn.functional.mse_loss, release_gradients=True, **options)
    steps = released.loss_trace.shape[1]
    most = 4 * max(sizes) + 4 * sum(sizes) // 32
    assert len(moved) <= calls * steps and sum(map(sum, moved)) == 4 * sum(sizes) * steps
    assert all(sum(group) <= most for group in moved)
    kept = estimate(Sums(), data, torch.nn.functional.mse_loss, release_gradients=False, **options)
    assert np.array_equal(released.loss_trace, kept.loss_trace)
