"""Chooses how the gradients of chains are computed: a table of strategies, and the rule that picks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llc_fast.data import IndexedSource
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler

_BATCHED_FLOPS = 1.5e7
"""Floating-point operations of one chain's gradient below which chains are batched on a CPU: a kernel then takes no
longer than it takes to get to the next."""
_REPLAYED_FLOPS = 1e10
"""Below which recorded kernels are replayed; above, what is saved on a CPU does not show, each kernel fills a GPU, and
all intermediates are kept."""
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
class Strategy:
    """One way to compute the gradients of chains.

    Attributes:
        not_possible: why it can't run this objective with this sampler, and what to do instead; empty if it can.
        steps_together: whether chains step together.
        keeps_gradients: whether all gradients are in memory at once.
        may_refuse: what fails, in words, if a model turns out not to suit the strategy, and another takes its place;
            empty: none does.
    """

    not_possible: Callable[[Objective, Sampler], str]
    steps_together: bool
    keeps_gradients: bool = True
    may_refuse: str = ""


@dataclass(frozen=True)
class Plan:
    """How chains are run.

    Attributes:
        strategy: a key of :data:`STRATEGIES`.
        group_size: chains that step together.
        num_workers: groups that run side by side, each in a thread.
        num_threads: threads inside one worker's kernels; None: as many as torch is set to use.
        replay: whether kernels are recorded and replayed.
        release: whether each gradient is consumed and freed during the backward pass.
        is_given: whether the user named the strategy, so that no other may take its place.
        reason: why, in words.
        runs_compiled: whether what the user gave to torch.compile runs as that has made it.
    """

    strategy: str
    group_size: int
    num_workers: int
    num_threads: int | None
    replay: bool
    release: bool
    is_given: bool
    reason: str
    runs_compiled: bool = False


# ---- what stands in the way of each strategy ---------------------------------------------------------------


def _one_by_one_because(objective: Objective, sampler: Sampler) -> str:
    """Why chains can't be evaluated in one batch; empty if they can."""
    trial = objective.trial
    if not isinstance(objective.source, IndexedSource):
        return "a loader gives one minibatch at a time"
    if not trial.has_tensor_batches:
        return "batches hold more than tensors"
    if trial.is_random:
        return "the model draws random numbers" if trial.is_reproducible else "the loss changes from call to call"
    if trial.writes_buffers or trial.writes_batch:
        return "the model writes to its buffers or its input"
    if trial.functional_problem:
        return trial.functional_problem
    if trial.changes_itself:
        return "the model changes attributes of its modules"
    if trial.has_hooks:
        return "hooks see what modules compute"
    if objective.microbatch_size is not None:
        return "microbatches are for models that fill the memory"
    if sampler.adapts_on_host(vars(sampler)):
        return "relative_eps follows one chain's gradients"
    return ""


def can_be_replayed(objective: Objective) -> bool:
    """Whether minibatches stay in one place and the model is a function of parameters, input and buffers."""
    source, trial = objective.source, objective.trial
    stays = isinstance(source, IndexedSource) and source.is_thread_safe and trial.has_tensor_batches
    writes = trial.writes_batch or trial.writes_parameters
    return stays and not (trial.is_random or writes or trial.has_hooks or trial.changes_itself)


def _batched(objective: Objective, sampler: Sampler) -> str:
    reason = _one_by_one_because(objective, sampler)
    return reason and f'{reason}; use Execution(strategy="sequential")'


def _compiled(objective: Objective, sampler: Sampler) -> str:
    if objective.trial.writes_buffers:
        return 'the model writes to its buffers; use Execution(strategy="sequential")'
    if objective.trial.functional_problem:
        return f'{objective.trial.functional_problem}; use Execution(strategy="sequential")'
    if objective.microbatch_size is not None:
        return 'it takes minibatches as a whole; use Execution(strategy="sequential")'
    return ""


def _captured(objective: Objective, sampler: Sampler) -> str:
    if reason := _batched(objective, sampler):
        return reason
    if objective.device.type != "cuda":
        return f"it needs a CUDA device, got device={str(objective.device)!r}"
    if sampler.kind == "metropolis":
        return f'it is not made for sampler={sampler.name!r}; use Execution(strategy="batched")'
    if not can_be_replayed(objective):
        return (
            "it can't read minibatches by the data set's own code; use Execution(strategy=\"batched\"), or give tensors"
        )
    return ""


STRATEGIES = {
    "sequential": Strategy(lambda *_: "", steps_together=False, keeps_gradients=False),
    "batched": Strategy(_batched, steps_together=True, may_refuse="batching"),
    "compiled": Strategy(_compiled, steps_together=True),
    "cuda-graph": Strategy(_captured, steps_together=True, may_refuse="capturing"),
}
"""The strategies by name; each gives the same losses and gradients up to rounding. What differs is what lies between
the kernels: for a network of a thousand parameters nearly all of the time, for one of a hundred million nearly all of
the memory."""


# ---- the choice --------------------------------------------------------------------------------------------


def make_plan(
    objective: Objective,
    sampler: Sampler,
    num_chains: int,
    *,
    strategy: str | None = None,
    release_gradients: bool | None = None,
    failed: Mapping[str, str] | None = None,
) -> Plan:
    """Choose a strategy, or complete the one that was asked for.

    The choice is a rule on what the trial gradient was measured to be: its floating-point operations, its memory, what
    it reads and writes. It looks at no clock, so that equal seeds give equal bits on a busy machine and an idle one.
    Strategies in `failed` are not chosen; the plan's `reason` says why they failed.

    Raises:
        ValueError: the strategy is unknown or can't run this model, these data or this sampler; the message says why.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of: {', '.join(STRATEGIES)}, or None")
    is_given, failed = strategy is not None, failed or {}
    if strategy is None:
        possible = (
            name
            for name, known in STRATEGIES.items()
            if name not in failed and not known.not_possible(objective, sampler)
        )
        strategy = "sequential" if release_gradients else _choice(objective, num_chains, set(possible))
    elif reason := STRATEGIES[strategy].not_possible(objective, sampler):
        raise ValueError(f"strategy={strategy!r} is not possible here: {reason}")
    release = _releases(objective, sampler, strategy, release_gradients)

    one_by_one = _one_by_one_because(objective, sampler)
    group = 1
    if STRATEGIES[strategy].steps_together and not one_by_one:
        group = min(num_chains, _MAX_GROUP if strategy == "batched" and not is_given else num_chains)
    is_cpu, flops = objective.device.type != "cuda", objective.trial.flops
    replay = (
        strategy in (("sequential", "batched") if is_cpu else ("cuda-graph",))
        and not release
        and can_be_replayed(objective)
        and flops * group <= _REPLAYED_FLOPS
    )
    workers, threads = 1, None
    if is_cpu:
        # Side by side only without the model: functional_call writes to the module while it runs.
        if replay and objective.num_parameters <= _WORKER_PARAMETERS:
            workers = min(-(-num_chains // group), torch.get_num_threads())
        idle = torch.get_num_threads() // workers
        threads = 1 if flops * group < _SINGLE_THREAD_FLOPS else max(1, idle)
    size = f"{flops / 1e6:.3g} MFLOP a gradient"
    reason = "; ".join(failed.values()) or (
        "asked for" if is_given else f"{size}, {one_by_one}" if one_by_one else size
    )
    # Recorded kernels do what compiling does, and can't be recorded from what it has made.
    runs_compiled = objective.runs_compiled or strategy == "compiled" or (strategy == "sequential" and not replay)
    if objective.is_compiled:
        reason += "; compiled by the user" if runs_compiled else "; torch.compile is set aside for recorded kernels"
    return Plan(strategy, group, workers, threads, replay, release, is_given, reason, runs_compiled)


def _choice(objective: Objective, num_chains: int, possible: set[str]) -> str:
    """The strategy of those possible that suits the size of a gradient."""
    is_small = objective.num_parameters <= _WORKER_PARAMETERS
    if is_small and "cuda-graph" in possible:
        return "cuda-graph"
    if is_small and objective.trial.flops <= _BATCHED_FLOPS and num_chains > 1 and "batched" in possible:
        return "batched"
    return "sequential"


def _releases(objective: Objective, sampler: Sampler, strategy: str, wanted: bool | None) -> bool:
    """Whether each gradient is consumed during the backward pass.

    Raises:
        ValueError: it is wanted and can't be.
    """
    needs_whole = sampler.needs_whole_step(vars(sampler))
    in_parts = objective.trial.is_reentrant  # a gradient may come in several
    possible = not needs_whole and not in_parts and not STRATEGIES[strategy].keeps_gradients
    if wanted and not possible:
        why = f"sampler={sampler.name!r} needs the whole gradient" if needs_whole else f"strategy={strategy!r} keeps it"
        if in_parts:
            why = "the model recomputes activations with use_reentrant=True: set it to False"
        raise ValueError(f"release_gradients=True is not possible: {why}")
    return possible and (objective.num_parameters > LARGE_MODEL if wanted is None else wanted)
