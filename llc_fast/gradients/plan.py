"""Chooses how the gradients of chains are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llc_fast.data import IndexedSource
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler

STRATEGIES = ("sequential", "batched", "compiled", "cuda-graph")
_BATCHED_FLOPS = 1.5e7
"""Floating-point operations of one chain's gradient below which chains are batched on a CPU: a kernel then takes no
longer than it takes to get to the next."""
_REPLAYED_FLOPS = 1e10
"""Below which a CPU replays recorded kernels; above, what is saved does not show and all intermediates are kept."""
_SINGLE_THREAD_FLOPS = 1.2e8
"""Below which a single chain runs on one thread. A gradient of that size takes about a millisecond; handing work to
other threads costs more than it saves, and on a busy machine it can cost ten times the step."""
_MAX_GROUP = 16
_WORKER_PARAMETERS = 5_000_000
"""Above which chains share one buffer, one after another, instead of running side by side."""
LARGE_MODEL = 10_000_000
"""Parameters above which memory counts more than time: gradients are consumed during the backward pass, so that they
are never all in memory."""


@dataclass(frozen=True)
class Plan:
    """How chains are run.

    Attributes:
        strategy: one of :data:`STRATEGIES`.
        group_size: chains that step together.
        num_workers: groups that run side by side, each in a thread.
        num_threads: threads inside one worker's kernels; None: as many as torch is set to use.
        replay: whether kernels are recorded and replayed.
        release: whether each gradient is consumed and freed during the backward pass.
        asked: whether the user named the strategy, so that no other may take its place.
        reason: why, in words.
    """

    strategy: str
    group_size: int
    num_workers: int
    num_threads: int | None
    replay: bool
    release: bool
    asked: bool
    reason: str


def make_plan(
    posterior: Objective,
    sampler: Sampler,
    num_chains: int,
    *,
    strategy: str | None = None,
    release_gradients: bool | None = None,
    has_observables: bool = False,
    failed: Mapping[str, str] | None = None,
) -> Plan:
    """Choose a strategy, or complete the one that was asked for.

    The choice is a rule on what a trial gradient was measured to be: its floating-point operations, its memory, what
    it reads and writes. It looks at no clock, so that equal seeds give equal bits on a busy machine and an idle one.
    It does not fall on strategies that `failed`, for the reason given there, which the plan passes on.

    Raises:
        ValueError: the strategy is unknown or can't run this model, these data or this sampler; the message says why.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of: {', '.join(STRATEGIES)}, or None")
    cuda = posterior.device.type == "cuda"
    apart = _why_apart(posterior, sampler)
    uncaptured = _why_not_captured(posterior, sampler, has_observables)
    asked, failed = strategy is not None, failed or {}
    if strategy is None and release_gradients:
        strategy = "sequential"
    elif strategy is None:
        is_small = posterior.num_parameters <= _WORKER_PARAMETERS
        is_quick = is_small and posterior.flops <= _BATCHED_FLOPS
        if is_small and not apart and not uncaptured and "cuda-graph" not in failed:
            strategy = "cuda-graph"
        elif is_quick and not apart and num_chains > 1 and "batched" not in failed:
            strategy = "batched"
        else:
            strategy = "sequential"
    elif strategy in ("batched", "cuda-graph") and apart:
        raise ValueError(f'strategy={strategy!r} is not possible here: {apart}; use strategy="sequential"')
    elif strategy == "cuda-graph" and uncaptured:
        raise ValueError(f'strategy="cuda-graph" {uncaptured}')
    elif strategy == "compiled" and (posterior.writes_buffers or posterior.microbatch_size is not None):
        why = "the model writes to its buffers" if posterior.writes_buffers else "it takes minibatches as a whole"
        raise ValueError(f'strategy="compiled" is not possible here: {why}; use strategy="sequential"')

    measured = sampler.needs_whole_step(vars(sampler))
    can_release = not measured and strategy == "sequential"
    if release_gradients and not can_release:
        why = f"{type(sampler).__name__} needs the whole gradient" if measured else f"strategy={strategy!r} keeps it"
        raise ValueError(f"release_gradients=True is not possible: {why}")
    release = can_release and (
        posterior.num_parameters > LARGE_MODEL if release_gradients is None else release_gradients
    )
    group = 1
    if strategy in ("batched", "cuda-graph") or (strategy == "compiled" and not apart):
        group = min(num_chains, _MAX_GROUP if strategy == "batched" and not asked else num_chains)
    replay = (
        not cuda
        and strategy in ("sequential", "batched")
        and not release
        and _can_be_replayed(posterior)
        and posterior.flops * group <= _REPLAYED_FLOPS
    )
    workers, threads = 1, None
    if not cuda:
        # Side by side only without the model: functional_call writes to the module while it runs.
        if replay and posterior.num_parameters <= _WORKER_PARAMETERS:
            workers = min(-(-num_chains // group), torch.get_num_threads())
        idle = torch.get_num_threads() // workers
        threads = 1 if posterior.flops * group < _SINGLE_THREAD_FLOPS else max(1, idle)
    size = f"{posterior.flops / 1e6:.3g} MFLOP a gradient"
    reason = "; ".join(failed.values()) or ("asked for" if asked else f"{size}, {apart}" if apart else size)
    return Plan(strategy, group, workers, threads, replay, release, asked, reason)


def _why_apart(posterior: Objective, sampler: Sampler) -> str:
    """Why chains can't be batched; empty if they can."""
    if not isinstance(posterior.source, IndexedSource):
        return "a loader gives one minibatch at a time"
    if not posterior.has_tensor_batches:
        return "batches hold more than tensors"
    if posterior.is_random:
        return "the model draws random numbers"
    if posterior.writes_buffers or posterior.writes_batch:
        return "the model writes to its buffers or its input"
    if posterior.microbatch_size is not None:
        return "microbatches are for models that fill the memory"
    if sampler.adapts_on_host(vars(sampler)):
        return "the sampler adapts on the host (relative_eps=True), to one chain's gradients"
    return ""


def _why_not_captured(posterior: Objective, sampler: Sampler, has_observables: bool) -> str:
    """Why a step can't be one CUDA graph, and what to do about it; empty if it may."""
    if posterior.device.type != "cuda":
        return f"needs a CUDA device, got device={str(posterior.device)!r}"
    if sampler.kind == "metropolis":
        return f'is not made for sampler={sampler.name!r}; use strategy="batched"'
    if has_observables:
        return 'can\'t stop for observables; use strategy="batched"'
    if not _can_be_replayed(posterior):
        return "can't read minibatches by the data set's own code; use strategy=\"batched\", or give tensors"
    return ""


def _can_be_replayed(posterior: Objective) -> bool:
    """Whether minibatches stay in one place and the model is a function of its parameters and its input alone."""
    source = posterior.source
    stays = isinstance(source, IndexedSource) and source.is_thread_safe and posterior.has_tensor_batches
    return stays and not (posterior.is_random or posterior.writes_buffers or posterior.writes_batch)
