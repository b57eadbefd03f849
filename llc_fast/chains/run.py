"""Runs chains: minibatches, gradients, fused updates, loss traces, until they are done or somebody stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from llc_fast.chains.draw import Observable
from llc_fast.chains.group import Group
from llc_fast.gradients.plan import Plan, make_plan
from llc_fast.gradients.replay import NotReplayableError
from llc_fast.objective.control_variate import Baseline
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.state import ChainState
from llc_fast.schedule import Schedule
from llc_fast.support.runtime import threads
from llc_fast.traces import ChainRecord

_MAY_FAIL = {"cuda-graph": "capturing", "batched": "batching"}
"""Strategies that a model may turn out not to be made for."""


# ---- the run -----------------------------------------------------------------------------------------------


@dataclass
class ChainRun:
    """Chains that have been run.

    Attributes:
        records: what each group did, in the order of the chains.
        interrupted: whether somebody stopped them early.
        plan: how they were run.
        note: why kernels were not recorded, if they should have been.
    """

    records: list[ChainRecord]
    interrupted: bool
    plan: Plan
    note: str


class Monitor:
    """What `run_chains` tells others while it runs; this one does nothing."""

    interval = 0.2
    """Seconds between reports."""

    def report(self, records: Callable[[], list[ChainRecord]], steps: int) -> None:
        """Called every `interval` seconds with the steps done so far, over all chains."""

    def wants_snapshot(self) -> bool:
        """Whether chains should hand in their state."""
        return False

    def snapshot(self, records: list[ChainRecord]) -> None:
        """Called with the state of all chains after :meth:`wants_snapshot`, at interruption and at the end."""


def run_chains(
    posterior: Objective,
    sampler: Sampler,
    schedule: Schedule,
    *,
    chains: range,
    seed: int,
    plan: Plan | None = None,
    observables: Mapping[str, Observable] | None = None,
    resumed: Sequence[ChainRecord] = (),
    baseline: Baseline | None = None,
    start: Mapping[str, NDArray[Any]] | None = None,
    keep_ends: bool = False,
    monitor: Monitor | None = None,
    stop: threading.Event | None = None,
) -> ChainRun:
    """Run chains from w*, or from where they were, and record the minibatch loss of every step.

    A step evaluates loss and gradient on a minibatch, records the loss, then moves the parameters. Chain c's noise and
    minibatches are functions of (seed, c) alone, so it is the same chain, to rounding, whichever others run beside it,
    in this process or another.

    Args:
        posterior: what is sampled.
        sampler: how.
        schedule: how long.
        chains: which.
        seed: of noise, batch order and whatever the model itself draws.
        plan: the strategy, see :func:`llc_fast.gradients.make_plan`; None: chosen.
        observables: functions of every draw, by name.
        resumed: records of earlier runs, one for each chain in any grouping.
        baseline: subtracted from the loss of every minibatch before it is recorded; None: nothing.
        start: where chains start, as w − w* by parameter, a row for each chain; None: at w*.
        keep_ends: whether records tell where the chains stopped.
        monitor: told of progress and snapshots.
        stop: ends the run after the present step, with what there is, once it is set; see :func:`stopped_by_sigint`.
    """
    observables, monitor, stop = observables or {}, monitor or Monitor(), stop or threading.Event()
    plan = plan or make_plan(posterior, sampler, len(chains), has_observables=bool(observables))
    cuda = [posterior.device] if posterior.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), threads(plan.num_threads):
        shapes: dict[str, tuple[int, ...]] = {}  # of observables: the same in all groups

        def build(plan: Plan) -> list[Group]:
            return [
                Group(
                    posterior,
                    sampler,
                    schedule,
                    plan,
                    seed,
                    members,
                    observables,
                    shapes,
                    record,
                    baseline,
                    start,
                    keep_ends,
                )
                for members, record in _grouped(chains, plan.group_size, resumed)
            ]

        groups, failed = build(plan), dict[str, str]()
        while waiting := [g for g in groups if not g.is_done]:
            try:
                memory = waiting[0].prepare()
                break
            except Exception as error:
                if plan.asked and isinstance(error, NotReplayableError):
                    raise ValueError(
                        f'strategy="{plan.strategy}" is not possible here: {error}; use strategy="batched"'
                    ) from error
                if plan.asked or plan.strategy not in _MAY_FAIL:
                    raise
                # Not every model can be captured or batched; one after another, all can.
                failed[plan.strategy] = f"{_MAY_FAIL[plan.strategy]} failed: {str(error).splitlines()[0]}"
                plan = make_plan(posterior, sampler, len(chains), has_observables=bool(observables), failed=failed)
                groups = build(plan)
        if waiting:
            _Driver(groups, waiting, memory, plan, monitor, stop).run()
        records = [g.record() for g in groups]
        monitor.snapshot(records)
        notes = [g.note for g in groups if g.note]
        interrupted = stop.is_set() and not all(g.is_done for g in groups)
    return ChainRun(records, interrupted, plan, notes[0] if notes else "")


class _Driver:
    """Takes groups through their steps, one after another or side by side."""

    def __init__(
        self,
        groups: list[Group],
        waiting: list[Group],
        memory: ChainState,
        plan: Plan,
        monitor: Monitor,
        stop: threading.Event,
    ) -> None:
        self._groups, self._waiting, self._plan, self._monitor, self._stop = groups, waiting, plan, monitor, stop
        self._first, self._lock = (waiting[0], memory), threading.Lock()
        self._model = threading.Lock()  # functional_call writes to the module while it runs
        self._records: dict[int, ChainRecord] = {}
        self._failed = threading.Event()
        self._generation, self._seen = 0, dict.fromkeys(range(len(groups)), 0)
        self._reported = time.monotonic()

    def run(self) -> None:
        workers = min(self._plan.num_workers, len(self._waiting))
        if workers == 1:
            return self._work(alone=True)
        # Threads, not processes: kernels release the interpreter, and w* and data are in memory once.
        with ThreadPoolExecutor(workers, thread_name_prefix="llc_fast") as pool:
            futures = {pool.submit(self._enter) for _ in range(workers)}
            try:
                while futures:
                    done, futures = wait(futures, timeout=self._monitor.interval)
                    for future in done:
                        future.result()
                    self._tell()
            except BaseException:
                self._failed.set()
                raise

    def _enter(self) -> None:
        torch.set_num_threads(self._plan.num_threads or 1)  # a setting of each thread
        with torch.enable_grad():
            self._work(alone=False)

    def _work(self, alone: bool) -> None:
        memory: ChainState | None = None
        while not self._ended():
            with self._lock:
                if not self._waiting:
                    return
                group = self._waiting.pop(0)
            if group is self._first[0]:
                memory = self._first[1]
            else:
                fits = memory is not None and memory.num_chains == len(group.chains)
                with self._model:
                    memory = group.prepare(memory if fits else None)
            while not group.is_done and not self._ended():
                group.advance(self._model)
                if alone:
                    self._tell()
                if self._generation:
                    self._hand_in(group)
            if group.is_done:
                memory = group.finish()

    def _ended(self) -> bool:
        return self._stop.is_set() or self._failed.is_set()

    def _tell(self) -> None:
        """Progress, and the call for a snapshot, every now and then."""
        now = time.monotonic()
        if now - self._reported < self._monitor.interval:
            return
        self._reported = now
        self._monitor.report(self._losses_so_far, sum(g.step * len(g.chains) for g in self._groups))
        # One at a time: calls that overtake each other would never be answered by all.
        if not self._generation and self._monitor.wants_snapshot():
            self._generation = 1

    def _losses_so_far(self) -> list[ChainRecord]:
        return [
            ChainRecord(g.chains[0], g.step, g.losses.cpu().numpy(), g.heats.cpu().numpy(), {}, None)
            for g in self._groups
        ]

    def _hand_in(self, group: Group) -> None:
        """Keep a record of the group; whoever is the last of those running hands in all."""
        index = self._groups.index(group)
        alone = self._plan.num_workers == 1
        with self._lock:
            if self._seen[index] == self._generation:  # done, by this group or for all by another
                return
            self._seen[index], self._records[index] = self._generation, group.record(copy=not alone)
            running = [k for k, g in enumerate(self._groups) if not g.is_done and g not in self._waiting]
            if any(self._seen[k] != self._generation for k in running):
                return
            self._generation = 0
            self._seen = dict.fromkeys(self._seen, 0)
            records = [self._records[k] if k in running else g.record() for k, g in enumerate(self._groups)]
            self._monitor.snapshot(records)


def _grouped(chains: range, size: int, resumed: Sequence[ChainRecord]) -> Iterator[tuple[range, ChainRecord | None]]:
    """Consecutive chains with equally many steps done, at most `size` together."""
    best: dict[int, ChainRecord] = {}
    for record in resumed:
        for chain in record.chains:
            if chain in chains and (chain not in best or record.step > best[chain].step):
                best[chain] = record
    group: list[int] = []

    def progress(chain: int) -> int:
        return best[chain].step if chain in best else 0

    def close() -> tuple[range, ChainRecord | None]:
        members = range(group[0], group[-1] + 1)
        if progress(group[0]) == 0:
            return members, None
        return members, ChainRecord.stack([best[c].row(c) for c in members])

    for chain in chains:
        if group and (len(group) == size or progress(chain) != progress(group[0])):
            yield close()
            group = []
        group.append(chain)
    if group:
        yield close()
