"""Runs chains: minibatches, gradients, fused updates, loss traces, until they are done or somebody stops them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.baseline import Baseline
from llc_fast.data import map_tensors, mix
from llc_fast.gradients import Feed, Gradient, Plan, check_replay, make_gradient, make_plan
from llc_fast.metropolis import Metropolis
from llc_fast.posterior import Evaluation, Posterior
from llc_fast.probes import Probe
from llc_fast.recording import NotReplayableError
from llc_fast.samplers import MetropolisSampler, Sampler
from llc_fast.state import ChainState


@dataclass(frozen=True)
class Schedule:
    """How long a chain runs and which of its steps are draws.

    Attributes:
        num_draws: losses that enter λ̂.
        num_burnin: steps before the first draw.
        num_steps_bw_draws: steps from a draw to the next.
    """

    num_draws: int
    num_burnin: int
    num_steps_bw_draws: int = 1

    @property
    def num_steps(self) -> int:
        return self.num_burnin + self.num_draws * self.num_steps_bw_draws

    @property
    def draws(self) -> slice:
        """The steps that are draws: the last of each stretch of `num_steps_bw_draws`."""
        return slice(self.num_burnin + self.num_steps_bw_draws - 1, self.num_steps, self.num_steps_bw_draws)

    def draw_at(self, step: int) -> int | None:
        """Which draw a step is; None if it is none."""
        draw, rest = divmod(step - self.num_burnin + 1, self.num_steps_bw_draws)
        return draw - 1 if draw >= 1 and rest == 0 else None


@dataclass(frozen=True)
class Draw:
    """What an observable sees: one draw of one chain, before the chain moves on.

    Attributes:
        chain, draw, step: which.
        loss: of the minibatch, a scalar tensor; as evaluated, with no baseline subtracted.
        sample_losses: the loss of each sample of the minibatch, ``[batch]``, if the loss function returns one for each
            sample; else None.
        params: the chain's parameters by name, at which the loss was evaluated. They are the chain's own memory: copy
            what must outlive the call, and write to none.
        batch: the minibatch.
    """

    chain: int
    draw: int
    step: int
    loss: Tensor
    sample_losses: Tensor | None
    params: Mapping[str, Tensor]
    batch: Any


Observable = Callable[[Draw], Any]
"""A function of a draw whose value, a number or a tensor of fixed shape, is recorded for every draw."""


@dataclass
class ChainRecord:
    """What a group of chains has done so far.

    Attributes:
        first_chain: the chains are ``first_chain … first_chain + len(losses) − 1``.
        step: steps that are done.
        losses: float64 ``[chain, step]``, less the paired baseline if there is one; later columns hold nothing yet.
        heats: the same of :meth:`llc_fast.samplers.Sampler.heat`; NaN for samplers that do not tell.
        observables: by name, float64 ``[chain, draw, …]``.
        arrays: what changes from step to step in chains under way, see ``ChainState.arrays``; None once they are done.
        probes: what was measured on the way, float64 ``[chain, probe, column]``, see ``llc_fast.probes.COLUMNS``; NaN
            where there is nothing, or nothing yet.
        ends: w − w* by parameter, ``[chain, …]``, where the chains stopped; None unless they are done and it was asked.
    """

    first_chain: int
    step: int
    losses: NDArray[np.float64]
    heats: NDArray[np.float64]
    observables: dict[str, NDArray[np.float64]]
    arrays: dict[str, NDArray[Any]] | None
    probes: NDArray[np.float64] | None = None
    ends: dict[str, NDArray[Any]] | None = None

    @property
    def chains(self) -> range:
        return range(self.first_chain, self.first_chain + len(self.losses))

    def row(self, chain: int) -> ChainRecord:
        """The record of one chain."""
        k = chain - self.first_chain
        arrays = None if self.arrays is None else {name: a[k : k + 1] for name, a in self.arrays.items()}
        observables = {name: a[k : k + 1] for name, a in self.observables.items()}
        probes = None if self.probes is None else self.probes[k : k + 1]
        losses, heats = self.losses[k : k + 1], self.heats[k : k + 1]
        ends = None if self.ends is None else {name: a[k : k + 1] for name, a in self.ends.items()}
        return ChainRecord(chain, self.step, losses, heats, observables, arrays, probes, ends)

    @staticmethod
    def stack(records: Sequence[ChainRecord]) -> ChainRecord:
        """Consecutive chains with equally many steps as one group."""
        first = records[0]
        if len(records) == 1:
            return first
        arrays = None
        if first.arrays is not None:
            arrays = {k: np.concatenate([r.arrays[k] for r in records if r.arrays is not None]) for k in first.arrays}
        seen = {k: a for r in records for k, a in r.observables.items()}  # lost chains may have none
        observables = {
            k: np.concatenate([r.observables.get(k, np.full((len(r.losses), *a.shape[1:]), np.nan)) for r in records])
            for k, a in seen.items()
        }
        losses, heats = np.concatenate([r.losses for r in records]), np.concatenate([r.heats for r in records])
        probes = [r.probes for r in records if r.probes is not None]
        together = np.concatenate(probes) if len(probes) == len(records) else None
        found = [r.ends for r in records if r.ends is not None]
        ends = {k: np.concatenate([e[k] for e in found]) for k in found[0]} if len(found) == len(records) else None
        return ChainRecord(first.first_chain, first.step, losses, heats, observables, arrays, together, ends)


_MAY_FAIL = {"cuda-graph": "capturing", "batched": "batching"}
"""Strategies that a model may turn out not to be made for."""
LOST_AFTER = 64
"""Steps at most until it is noticed that all chains of a group are lost."""
_NUMPY_HAS = (torch.float32, torch.float64)


class _Group:
    """Chains that step together."""

    def __init__(
        self,
        posterior: Posterior,
        sampler: Sampler,
        schedule: Schedule,
        plan: Plan,
        seed: int,
        chains: range,
        observables: Mapping[str, Observable],
        shapes: dict[str, tuple[int, ...]],
        resumed: ChainRecord | None,
        baseline: Baseline | None,
        start: Mapping[str, NDArray[Any]] | None,
        keep_ends: bool,
    ) -> None:
        self._start, self._keep_ends = start, keep_ends
        self._ends = None if resumed is None else resumed.ends
        self._posterior, self._sampler, self._schedule, self._plan = posterior, sampler, schedule, plan
        self._seed, self._shapes, self._resumed, self._baseline = seed, shapes, resumed, baseline
        self._given = self._functions = observables
        self.chains = chains
        self.step = 0 if resumed is None else resumed.step
        self.losses = torch.full((len(chains), schedule.num_steps), torch.nan, dtype=torch.float64)
        self.heats = torch.full_like(self.losses, torch.nan)
        self._observables: dict[str, NDArray[np.float64]] = {}
        self._state: ChainState | None = None
        draws = range(schedule.num_steps)[schedule.draws]
        measured = None if resumed is None else resumed.probes
        self._probe = Probe(posterior, sampler, plan, schedule.num_steps, draws, len(chains), measured)
        if resumed is not None:
            self.losses[:, : self.step] = torch.from_numpy(resumed.losses[:, : self.step])
            self.heats[:, : self.step] = torch.from_numpy(resumed.heats[:, : self.step])
            self._observables = {k: a.copy() for k, a in resumed.observables.items()}
            shapes.update((k, a.shape[2:]) for k, a in self._observables.items())
        self.is_done = self.step == schedule.num_steps
        self.note = ""

    def prepare(self, memory: ChainState | None = None) -> ChainState:
        """Put the chains where they were, in new memory or that of a group that is done."""
        posterior, first = self._posterior, self.chains[0]
        self._state = memory or ChainState(posterior, self._sampler, len(self.chains))
        torch.manual_seed(mix(self._seed, first))  # what a model with dropout draws from
        self._buffers = posterior.fresh_buffers()
        self._feed = Feed(posterior, self._seed, first, len(self.chains), self.step)
        self._state.start(first, self._seed)
        gradient, self.note = make_gradient(self._plan, posterior, self._state, self._buffers, self._feed, self.step)
        self._gradient: Gradient | Metropolis = gradient
        self._probed = gradient
        if self._resumed is not None and self._resumed.arrays is not None:
            self._restore(self._resumed.arrays)
        elif self._start is not None:
            mine = slice(first, first + len(self.chains))
            self._state.displace({name: torch.from_numpy(a[mine]) for name, a in self._start.items()})
        self._resumed = None
        if isinstance(self._sampler, MetropolisSampler):
            adjusted = Metropolis(self._sampler, self._state, gradient, self._feed, first)
            self._gradient, self._functions = adjusted, {**self._given, **adjusted.observables()}
        # On a CPU written through NumPy, in a fraction of the time that torch takes for one number.
        self._rows = self.losses.numpy() if posterior.device.type == "cpu" else None
        self._heat_rows: Any = self.heats.numpy()
        if self._rows is None:
            self.losses, self.heats = self.losses.to(posterior.device), self.heats.to(posterior.device)
            self._heat_rows = self.heats
        elif self._baseline is not None:
            self._indices = self._feed.indices.numpy()
        if self._plan.strategy == "cuda-graph":
            traces = (self.losses, self.heats if self._sampler.tells_heat else None)
            with torch.cuda.device(posterior.device):  # which need not be the current one
                self._graph = _CapturedStep(self._state, self._feed, gradient, self._baseline, *traces, self.step)
        return self._state

    def advance(self, model: contextlib.AbstractContextManager[object]) -> None:
        """One step: evaluate, record, observe, move; inside `model` where the user's own code runs."""
        step = self.step
        if self._plan.strategy == "cuda-graph":
            if step in self._probe.places:
                self._take_probe(step, self._feed(step))
            self._graph.replay()
        else:
            batch = self._feed(step)
            guard = model if self.note else contextlib.nullcontext()
            if step in self._probe.places:
                with guard:
                    self._take_probe(step, batch)
            with guard:
                evaluation = self._gradient.evaluate(batch)
            loss = evaluation.loss
            if self._rows is None:
                self.losses[:, step].copy_(_paired(loss, self._baseline, self._feed))
            else:
                value = (loss if loss.dtype in _NUMPY_HAS else loss.double()).numpy()
                self._rows[:, step] = value if self._baseline is None else value - self._baseline(self._indices)
            if self._functions and (draw := self._schedule.draw_at(step)) is not None:
                with model:  # observables may call the model too
                    self._observe(draw, evaluation, batch)
            if self._sampler.adjusted_by_metropolis:
                with guard:  # it evaluates the model where the chain may go
                    self._gradient.move(step)
            else:
                self._gradient.move(step)
            if self._sampler.tells_heat:
                assert self._state is not None
                self._heat_rows[:, step] = self._state.heat()
        self.step += 1
        # Reading the loss waits for a GPU, so look only now and then; a lost chain stays lost.
        if self.step % LOST_AFTER == 0 and not bool(torch.isfinite(self.losses[:, step]).any()):
            self.step = self._schedule.num_steps
        self.is_done = self.step == self._schedule.num_steps

    def _take_probe(self, step: int, batch: Any) -> None:
        assert self._state is not None
        self._probe.take(step, batch, self._state, self._probed, self._feed, self._seed, self.chains[0])

    def finish(self) -> ChainState | None:
        """Keep the record, give the memory to whoever comes next."""
        self.losses, self.heats = self.losses.cpu(), self.heats.cpu()
        memory, self._state = self._state, None
        if self._keep_ends and memory is not None:
            self._ends = {name: _numpy(t, copy=False) for name, t in memory.displacement().items()}
        for name in ("_gradient", "_probed", "_feed", "_buffers", "_graph"):
            self.__dict__.pop(name, None)
        return memory

    @torch.no_grad()
    def _observe(self, draw: int, evaluation: Evaluation, batch: Any) -> None:
        assert self._state is not None
        shared = self._feed.is_shared or len(self.chains) == 1
        for row, chain in enumerate(self.chains):
            seen = Draw(
                chain,
                draw,
                self.step,
                evaluation.loss[row],
                None if evaluation.samples is None else evaluation.samples[row],
                {name: p.detach() for name, p in self._state.single(row).items()},
                batch if shared else _row(batch, row),
            )
            for name, function in self._functions.items():
                value = torch.as_tensor(function(seen)).detach().to("cpu", torch.float64).numpy()
                shape = self._shapes.setdefault(name, value.shape)
                if value.shape != shape:
                    raise ValueError(f"observable {name!r} gave shape {value.shape} after {shape}: it must not change")
                if name not in self._observables:
                    room = (len(self.chains), self._schedule.num_draws, *shape)
                    self._observables[name] = np.full(room, np.nan)
                self._observables[name][row, draw] = value

    # ---- snapshots -----------------------------------------------------------------------------------------

    def record(self, *, copy: bool = False) -> ChainRecord:
        """What is done so far; with ``copy``, apart from the memory that the chains go on to write to."""
        arrays = None
        if self._state is not None and not self.is_done:
            # Buffers as bytes: NumPy does not have all of their dtypes.
            buffers = self._changing_buffers().items()
            tensors = self._state.arrays() | {f"buffer.{k}": b.reshape(1, -1).view(torch.uint8) for k, b in buffers}
            if self._posterior.is_random or not self._feed.is_pure:
                rows = len(self.chains)
                tensors["generator"] = torch.get_rng_state().repeat(rows, 1)
                if self._posterior.device.type == "cuda":
                    tensors["cuda_generator"] = torch.cuda.get_rng_state(self._posterior.device).repeat(rows, 1)
            arrays = {k: _numpy(t, copy) for k, t in tensors.items()}
        elif self._resumed is not None:
            arrays = self._resumed.arrays
        losses, heats = _numpy(self.losses, copy), _numpy(self.heats, copy)
        observables = {k: a.copy() if copy else a for k, a in self._observables.items()}
        probes = self._probe.table.copy() if copy else self._probe.table
        return ChainRecord(self.chains[0], self.step, losses, heats, observables, arrays, probes, self._ends)

    def _changing_buffers(self) -> dict[str, Tensor]:
        return self._buffers if self._posterior.writes_buffers else {}

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        assert self._state is not None
        tensors = {k: torch.from_numpy(np.array(a)) for k, a in arrays.items()}
        if "generator" in tensors:
            torch.set_rng_state(tensors.pop("generator")[0])
        if "cuda_generator" in tensors:
            torch.cuda.set_rng_state(tensors.pop("cuda_generator")[0], self._posterior.device)
        for name in [k for k in tensors if k.startswith("buffer.")]:
            buffer = self._buffers[name.removeprefix("buffer.")]
            buffer.copy_(tensors.pop(name)[0].view(buffer.dtype).view(buffer.shape))
        self._state.restore(tensors)


def _paired(loss: Tensor, baseline: Baseline | None, feed: Feed) -> Tensor:
    return loss if baseline is None else loss - baseline.on_device(feed.indices).to(loss.device)


def _row(batch: Any, row: int) -> Any:
    return map_tensors(lambda t: t[row], batch)


def _numpy(tensor: Tensor, copy: bool) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array.copy() if copy and tensor.device.type == "cpu" else array


class _CapturedStep:
    """A whole step as one CUDA graph: indices, minibatch, gradient, loss, update, step count. Not run on a GPU yet.

    Raises:
        NotReplayableError: the step waits for the GPU, or its replay does not do what the step itself does.
    """

    def __init__(
        self,
        state: ChainState,
        feed: Feed,
        gradient: Gradient,
        baseline: Baseline | None,
        losses: Tensor,
        heats: Tensor | None,
        start: int,
    ) -> None:
        self._step = torch.full((), start, dtype=torch.int64, device=losses.device)
        grads: list[Tensor] = []

        def body() -> None:
            evaluation = gradient.evaluate(feed(0, self._step))
            loss = _paired(evaluation.loss, baseline, feed)
            losses.index_copy_(1, self._step.reshape(1), loss.to(losses.dtype).reshape(-1, 1))
            grads[:] = gradient.gradients()
            state.move(grads, 0, self._step)
            if heats is not None:
                heats.index_copy_(1, self._step.reshape(1), state.heat().reshape(-1, 1))
            self._step += 1

        def rewind(arrays: Mapping[str, Tensor]) -> None:
            self._step.fill_(start)
            state.restore(arrays)

        def snapshot() -> dict[str, Tensor]:
            return {k: t.clone() for k, t in state.arrays().items()}

        begin = snapshot()
        with state.displaced():  # at w* itself a gradient may be nothing
            elsewhere = snapshot()
        rewind(elsewhere)
        side = torch.cuda.Stream(losses.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(losses.device))
        with torch.cuda.stream(side):
            body()  # libraries allocate their workspaces outside the graph
            rewind(elsewhere)
            with _refusing_to_wait():
                body()
        torch.cuda.current_stream(losses.device).wait_stream(side)
        fresh = [losses[:, start].clone(), *(g.clone() for g in grads)]

        rewind(elsewhere)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            body()
        state.send_addresses()
        self._graph.replay()
        check_replay([losses[:, start], *grads], fresh)
        rewind(begin)
        losses[:, start:] = torch.nan
        if heats is not None:
            heats[:, start:] = torch.nan

    def replay(self) -> None:
        self._graph.replay()


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises NotReplayableError: during a capture it would do harm."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch calls this mode a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise NotReplayableError(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
    posterior: Posterior,
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

        def build(plan: Plan) -> list[_Group]:
            return [
                _Group(
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
        groups: list[_Group],
        waiting: list[_Group],
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

    def _hand_in(self, group: _Group) -> None:
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


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with `count` intra-op threads; None: as many as torch is set to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def stopped_by_sigint() -> Iterator[threading.Event]:
    """An event that the first SIGINT (Ctrl-C) sets; the second raises KeyboardInterrupt, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield stop  # somebody else takes care of Ctrl-C
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
