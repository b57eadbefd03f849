"""How much memory a run needs and how much there is, asked before anything large is allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from llc_fast.gradients.plan import LARGE_MODEL, Plan
from llc_fast.kernels.native import NUM_STATES, is_low_precision
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler


def available_bytes(device: torch.device) -> int | None:
    """Free memory on a device, within the limits of the container on a CPU; None if nobody knows."""
    if device.type == "cuda":
        # What torch's allocator keeps for later is as good as free: the first look at a large model leaves much there.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return free


_METROPOLIS_BYTES = 80
"""Of a parameter of one chain: w*, metric, start, place, velocity, noise, two slopes and what lies between, float64."""


_CHECK_ROWS = 10
"""Tensors like all parameters of a chain that a step check with gradients needs at a time."""


def may_compare_gradients(objective: Objective, plan: Plan) -> bool:
    """Whether a step check may compare gradients: where they are consumed as they come there is no room for others."""
    return not plan.release and objective.num_parameters <= LARGE_MODEL


def held_bytes(objective: Objective) -> int:
    """Gradients that may wait for others before they are consumed, beside the one that comes: a few per cent.

    To move a parameter by itself costs as much as to move fifty, and a model has hundreds.
    """
    return sum(p.nbytes for p in objective.reference.values()) // 32


def needed_bytes(objective: Objective, sampler: Sampler, plan: Plan) -> int:
    """What a run allocates beyond the model: chains, what the sampler keeps, gradients, activations, step checks, and
    the metric, if it is estimated."""
    tensors = list(objective.reference.values())
    elements = sum(p.numel() for p in tensors)
    low = [p for p in tensors if is_low_precision(p)]
    width = 4 if low else tensors[0].element_size()  # bytes of a chain's element
    copies = {p.dtype: p.element_size() for p in low}  # in the model's precision, each for all parameters
    chain = elements * (width * (1 + NUM_STATES[sampler.rule()]) + sum(copies.values()))
    chain += sampler.extra_bytes([p.shape for p in tensors], width)
    if sampler.kind == "metropolis":
        chain += elements * _METROPOLIS_BYTES
    gradients = [p.nbytes for p in tensors]
    # The backward pass makes about as much as the forward pass kept, and a recording keeps both.
    # Those that are held, and the one that comes.
    per_chain = chain + (held_bytes(objective) + max(gradients) if plan.release else sum(gradients))
    per_chain += objective.trial.activation_bytes * (2 if plan.replay else 1)
    per_chain += elements * width * _CHECK_ROWS if may_compare_gradients(objective, plan) else 0
    run = per_chain * plan.group_size * plan.num_workers
    if not isinstance(getattr(sampler, "preconditioner", None), str):
        return run
    # A metric that is estimated lasts as long as the run. Before the chains there are squares, a gradient to compare
    # with, how often it agreed, and another w*.
    estimating = elements * (2 * width + 1) + sum(gradients) + max(gradients) + objective.trial.activation_bytes
    return max(run + elements * width, estimating)


def check_memory(objective: Objective, sampler: Sampler, plan: Plan) -> None:
    """Raise unless a run fits.

    Raises:
        MemoryError: with what it needs, what there is, and a setting that would fit, if there is one.
    """
    available, needed = available_bytes(objective.device), needed_bytes(objective, sampler, plan)
    if available is None or needed <= available:
        return
    smallest = dataclasses.replace(plan, strategy="sequential", group_size=1, num_workers=1, replay=False)
    remedies = [('Execution(strategy="sequential")', smallest)]
    if not sampler.needs_whole_step(vars(sampler)):
        released = dataclasses.replace(smallest, release=True)
        remedies.append(('Execution(strategy="sequential", release_gradients=True)', released))
    fitting = [(text, needed_bytes(objective, sampler, p)) for text, p in remedies if p != plan]
    remedy = next((f"{text} needs {_gigabytes(size)}" for text, size in fitting if size <= available), "")
    if not remedy:
        share = objective.trial.activation_bytes / max(needed, 1)
        remedy = (
            "activations are most of it: a smaller batch_size, or Execution(microbatch_size=…), would help"
            if share > 0.5
            else "sample a part of the parameters with params=, or use a machine with more memory"
        )
    raise MemoryError(
        f"this run needs {_gigabytes(needed)} beside the model ({plan.strategy}, {plan.group_size * plan.num_workers} "
        f"chains at a time), and {objective.device} has {_gigabytes(available)} left; {remedy}"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
