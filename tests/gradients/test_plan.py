"""The rule that chooses a strategy."""

from __future__ import annotations

import pytest
import torch
from problems import SGLD, make_objective

from llc_fast.gradients.plan import make_plan

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("threads", [1, 2, 4, 16])
@pytest.mark.parametrize("chains", [1, 2, 16, 17, 100])
@pytest.mark.parametrize("flops", [0.0, 1e6, 1e8, 1e9, 1e12])
def test_plans_are_sound(flops: float, chains: int, threads: int) -> None:
    """No more threads than torch was given, no idle workers, batches only of small gradients of several chains."""
    torch.set_num_threads(threads)
    plan = make_plan(make_objective(flops), SGLD, chains)
    groups = -(-chains // plan.group_size)
    assert plan.num_workers * (plan.num_threads or threads) <= threads
    assert 1 <= plan.num_workers <= groups and 1 <= plan.group_size <= min(chains, 16)
    assert (plan.strategy == "batched") == (chains > 1 and flops <= 1.5e7)
    assert plan.num_workers == 1 or plan.replay
    assert "MFLOP" in plan.reason and not plan.release
