"""Runs chains: groups that step together, one after another or side by side, until they are done or somebody stops."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llc_fast.chains.draw import Observables
from llc_fast.chains.group import Group, RefusedError, RunSpec
from llc_fast.gradients.plan import STRATEGIES, Plan, make_plan
from llc_fast.gradients.replay import NotReplayableError
from llc_fast.gradients.strategies import WrongGradientError
from llc_fast.samplers.state import ChainState
from llc_fast.support.runtime import CallersSettings, Stop, threads
from llc_fast.traces import Traces


@dataclass
class ChainRun:
    """Chains that have been run.

    Attributes:
        traces: what each group left behind, in the order of the chains.
        interrupted: whether somebody stopped them early.
        plan: how they were run.
        note: why kernels were not recorded, if they should have been.
        seconds_of_data: that were spent waiting for a loader.
        metric: of which kind it is for which parameters, where a sampler has several.
        by_python: which recorded kernels Python runs, and why.
    """

    traces: list[Traces]
    interrupted: bool
    plan: Plan
    note: str
    seconds_of_data: float = 0.0
    metric: str = ""
    by_python: str = ""


class Monitor:
    """What `run_chains` reports to while it runs; this one does nothing."""

    interval = 0.2
    """Seconds between reports."""

    def report(self, traces: Callable[[], list[Traces]], steps: int) -> None:
        """Called every `interval` seconds with the steps done so far, over all chains."""

    def wants_snapshot(self) -> bool:
        """Whether chains should hand in their state."""
        return False

    def snapshot(self, traces: list[Traces]) -> None:
        """Called with the state of all chains after :meth:`wants_snapshot`, at interruption and at the end."""


class StepTaken(NamedTuple):
    """A step that a group of chains has taken.

    Attributes:
        chains: which.
        step: its number, from 0.
        is_pilot: whether these are pilot chains.
    """

    chains: range
    step: int
    is_pilot: bool


_listeners: list[Callable[[StepTaken], None]] = []


@contextlib.contextmanager
def after_each_step(function: Callable[[StepTaken], None]) -> Iterator[None]:
    """Call a function after every step of every chain of this process, in the thread that took it.

    For tests and for watching a run closely: what it raises ends the run, and a SIGINT that it sends stops the run
    after that very step.
    """
    _listeners.append(function)
    try:
        yield
    finally:
        _listeners.remove(function)


def run_chains(
    spec: RunSpec,
    chains: range,
    *,
    resumed: Sequence[Traces] = (),
    monitor: Monitor | None = None,
    stop: Stop | None = None,
) -> ChainRun:
    """Run chains to their end, or until somebody stops them; see :class:`RunningChains`."""
    with RunningChains(spec, chains, resumed=resumed, monitor=monitor, stop=stop) as running:
        running.run(spec.schedule.num_steps)
        return running.finish()


class RunningChains:
    """Chains that start at w*, or where they were, take steps, and record the minibatch loss of each.

        with RunningChains(spec, range(4)) as running:
            running.run(1000)
            running.run(2000)
            run = running.finish()

    A step evaluates loss and gradient on a minibatch, records the loss, then moves the parameters. Chain c's noise and
    minibatches are functions of (seed, c) alone, so it is the same chain, to rounding, whichever others run beside it,
    in this process or another.

    A strategy that the user did not name gives way to another one if the model can't be batched or captured, and
    ``ChainRun.plan`` says why. An error of the model itself is raised as it is.

    Args:
        spec: what the chains are to do.
        chains: which.
        resumed: traces of earlier runs, one for each chain in any grouping.
        monitor: what progress and snapshots are reported to.
        stop: ends the run after the present step, with what there is, once it is set; see
            :class:`llc_fast.support.runtime.Interrupts`.

    Raises:
        ValueError: the strategy that the user named is not possible.
    """

    def __init__(
        self,
        spec: RunSpec,
        chains: range,
        *,
        resumed: Sequence[Traces] = (),
        monitor: Monitor | None = None,
        stop: Stop | None = None,
    ) -> None:
        self._given = spec, chains, resumed
        self._monitor, self._stop = monitor or Monitor(), stop or Stop()
        self._stack = contextlib.ExitStack()
        self._driver: _Driver | None = None
        self._is_finished = False

    def __enter__(self) -> RunningChains:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._given[0].objective.generators.kept())
            stack.enter_context(torch.enable_grad())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def run(self, until: int) -> ChainRun:
        """Go on until every chain has taken so many steps; what there is then. If somebody stops them, that is all."""
        if self._driver is None or not self._driver.has_begun:
            self._driver = _Driver.with_first_group(*self._given, until, self._monitor, self._stop)
            self._stack.callback(self._driver.close)
        with threads(self._driver.spec.plan.num_threads):
            self._driver.run(until)
        return self.finish() if self._stop.is_set() else self._report(self._driver)

    def finish(self) -> ChainRun:
        """There is no further step: what there is, with the state of the chains, which goes to the monitor, too.

        To be called after :meth:`run`.
        """
        assert self._driver is not None
        found = self._report(self._driver)
        if not self._is_finished:
            self._driver.finish()
            self._is_finished = True
            found = self._report(self._driver)
            self._monitor.snapshot(found.traces)
        return found

    def _report(self, driver: _Driver) -> ChainRun:
        interrupted = self._stop.is_set() and not driver.has_reached
        note = next(filter(None, driver.notes), "")
        traces = [slot.traces for slot in driver.slots]
        plan, seconds = driver.spec.plan, driver.seconds_of_data
        return ChainRun(traces, interrupted, plan, note, seconds, driver.metric, driver.by_python)


@dataclass(eq=False)
class _Slot:
    """A group of chains: what they have done, and, while they run, the running object."""

    traces: Traces
    group: Group | None = None


class _Driver:
    """Takes groups through their steps, one after another or side by side."""

    def __init__(self, spec: RunSpec, slots: list[_Slot], until: int, monitor: Monitor, stop: Stop) -> None:
        self.spec, self.slots, self._monitor, self._stop = spec, slots, monitor, stop
        self.notes: list[str] = []
        self.metric = self.by_python = ""
        self.seconds_of_data = 0.0
        self._observables = Observables(spec.observables, spec.schedule.num_draws)
        for slot in slots:
            self._observables.know(slot.traces.draws)
        self._until = until
        self._waiting = self._behind()
        self._stays = len(self._waiting) <= max(1, spec.plan.num_workers)
        self._free: list[ChainState] = []
        self._lock = threading.Lock()
        self._model = threading.Lock()  # functional_call writes to the module while it runs
        self._failed = threading.Event()
        self._reported = time.monotonic()
        # A snapshot is collected group by group, each after a step of its own, and written when all have handed in.
        self._collecting = False
        self._collected: dict[int, Traces] = {}
        self._complete: list[Traces] | None = None

    @classmethod
    def with_first_group(
        cls, spec: RunSpec, chains: range, resumed: Sequence[Traces], until: int, monitor: Monitor, stop: Stop
    ) -> _Driver:
        """A driver whose first group has been set up, by the first strategy that does not refuse the model."""
        failed: dict[str, str] = {}
        while True:
            slots = [_Slot(t) for t in _grouped(spec, chains, resumed)]
            driver = cls(spec, slots, until, monitor, stop)
            if not driver._waiting:
                return driver
            try:
                with threads(spec.plan.num_threads):  # not around `make_plan`, which asks how many there are
                    driver._start(driver._waiting[0])
                return driver
            except RefusedError as error:
                plan, cause = spec.plan, error.__cause__
                assert cause is not None
                if plan.is_given and isinstance(cause, (NotReplayableError, WrongGradientError)):
                    other = "batched" if isinstance(cause, NotReplayableError) else "sequential"
                    raise ValueError(
                        f'strategy="{plan.strategy}" is not possible here: {error}; use Execution(strategy="{other}")'
                    ) from cause
                if plan.is_given:
                    raise cause from None
                failed[plan.strategy] = f"{STRATEGIES[plan.strategy].may_refuse} failed: {error}"
                plan = make_plan(spec.objective, spec.sampler, len(chains), failed=failed)
                spec = dataclasses.replace(spec, plan=plan)

    def _behind(self) -> list[_Slot]:
        """The groups that have steps to take, the largest first: what refuses to run in a group refuses it, while there
        is a way back."""
        waiting = [slot for slot in self.slots if slot.traces.step < self._until]
        return sorted(waiting, key=lambda slot: len(slot.traces.chains), reverse=True)

    @property
    def has_begun(self) -> bool:
        """Whether a group has been set up."""
        return bool(self.notes)

    @property
    def has_reached(self) -> bool:
        """Whether all groups have taken the steps that they were to take."""
        return not self._behind()

    def _start(self, slot: _Slot) -> Group:
        fits = [k for k, state in enumerate(self._free) if state.num_chains == len(slot.traces.chains)]
        state = self._free.pop(fits[0]) if fits else None
        slot.group = Group(self.spec, slot.traces, self._observables, self._model, state)
        self.notes.append(slot.group.note)
        self.metric, self.by_python = slot.group.metric, slot.group.by_python
        return slot.group

    def run(self, until: int) -> None:
        """Take all groups so far, or as far as they get until somebody stops them."""
        self._until = until
        self._waiting = self._behind()
        workers = min(self.spec.plan.num_workers, len(self._waiting))
        if workers <= 1:
            self._work(alone=True)
        else:
            self._work_side_by_side(workers)
        self._collecting, self._collected, self._complete = False, {}, None  # what comes now is newer

    def finish(self) -> None:
        """There is no further step: the traces say where the chains are."""
        for slot in self.slots:
            if slot.group is not None:
                self.seconds_of_data += slot.group.seconds_of_data
                slot.group.finish(copy=False)
                slot.group = None

    def close(self) -> None:
        """After an error, too."""
        for slot in self.slots:
            if slot.group is not None:
                slot.group.close()

    def _work_side_by_side(self, workers: int) -> None:
        # Threads, not processes: kernels release the interpreter, and w* and data are in memory once.
        with ThreadPoolExecutor(workers, thread_name_prefix="llc_fast") as pool:
            caller = CallersSettings()
            futures = {pool.submit(caller.run, self._enter) for _ in range(workers)}
            try:
                while futures:
                    done, futures = wait(futures, timeout=self._monitor.interval)
                    for future in done:
                        future.result()
                    self._report()
            except BaseException:
                self._failed.set()
                raise

    def _enter(self) -> None:
        torch.set_num_threads(self.spec.plan.num_threads or 1)  # a setting of each thread
        with torch.enable_grad():
            self._work(alone=False)

    def _work(self, alone: bool) -> None:
        while not self._ended():
            with self._lock:
                if not self._waiting:
                    return
                slot = self._waiting.pop(0)
            group = slot.group
            if group is None:
                with self._model:
                    try:
                        group = self._start(slot)
                    except RefusedError as error:  # too late for another strategy
                        raise error.__cause__ or error from None
            while slot.traces.step < self._until and not self._ended():
                group.advance()
                if _listeners:
                    taken = StepTaken(slot.traces.chains, slot.traces.step - 1, self.spec.is_pilot)
                    for listener in list(_listeners):
                        listener(taken)
                if alone:
                    self._report()
                if self._collecting:
                    self._hand_in(slot, copy=not alone)
            if self._stays:
                continue
            with self._lock:  # others are waiting for its memory
                self.seconds_of_data += group.seconds_of_data
                self._free.append(group.finish(copy=True))
                slot.group = None

    def _ended(self) -> bool:
        return self._stop.is_set() or self._failed.is_set()

    def _report(self) -> None:
        """Progress, and the call for a snapshot, every now and then; a snapshot that is complete is passed on."""
        if self._complete is not None:  # here, where no worker waits for it to be written
            traces, self._complete = self._complete, None
            self._monitor.snapshot(traces)
        now = time.monotonic()
        if now - self._reported < self._monitor.interval:
            return
        self._reported = now
        self._monitor.report(self._traces_so_far, sum(s.traces.step * len(s.traces.chains) for s in self.slots))
        # One at a time: calls that overtake each other would never be answered by all.
        if not self._collecting and self._complete is None and self._monitor.wants_snapshot():
            self._collecting = True

    def _traces_so_far(self) -> list[Traces]:
        groups = [(slot.group, slot.traces) for slot in self.slots]
        return [traces if group is None else group.report() for group, traces in groups]

    def _hand_in(self, slot: _Slot, *, copy: bool) -> None:
        """Keep a snapshot of the group; whoever is the last of those running completes the snapshot of all."""
        index = self.slots.index(slot)
        with self._lock:
            if not self._collecting or index in self._collected:
                return
            assert slot.group is not None
            self._collected[index] = slot.group.snapshot(copy=copy)
            running = [k for k, s in enumerate(self.slots) if s.traces.step < self._until and s not in self._waiting]
            if any(k not in self._collected for k in running):
                return
            # Of groups that wait, as they are now: a worker may start one before this is written.
            self._complete = [self._collected.get(k) or _at_rest(s) for k, s in enumerate(self.slots)]
            self._collected, self._collecting = {}, False
        if not copy:  # the chains must not go on before it is written
            self._report()


def _at_rest(slot: _Slot) -> Traces:
    """What there is of a group that nobody takes steps of."""
    return slot.traces.as_now() if slot.group is None else slot.group.snapshot(copy=True)


def _grouped(spec: RunSpec, chains: range, resumed: Sequence[Traces]) -> Iterator[Traces]:
    """Traces of consecutive chains with equally many steps done, at most as many as the plan groups together."""
    best: dict[int, Traces] = {}
    for traces in resumed:
        for chain in traces.chains:
            if chain in chains and (chain not in best or traces.step > best[chain].step):
                best[chain] = traces
    group: list[int] = []

    def progress(chain: int) -> int:
        return best[chain].step if chain in best else 0

    def close() -> Traces:
        if progress(group[0]) == 0:
            return spec.blank_traces(range(group[0], group[-1] + 1))
        return Traces.stack([best[c].row(c) for c in group]).copy()

    for chain in chains:
        if group and (len(group) == spec.plan.group_size or progress(chain) != progress(group[0])):
            yield close()
            group = []
        group.append(chain)
    if group:
        yield close()
