"""Chains that step together: what they are to do, and the running object."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.chains.cuda_graph import CapturedStep
from llc_fast.chains.draw import Draw, Evaluator, Observable, Observables
from llc_fast.chains.metric import MetricOfChains
from llc_fast.chains.metropolis import Metropolis
from llc_fast.chains.step_checks import StepChecks, check_steps
from llc_fast.data import Batch, map_tensors, mix
from llc_fast.gradients.minibatches import Feed, paired
from llc_fast.gradients.plan import Plan
from llc_fast.gradients.strategies import Gradient, ReplayedGradient, Transition, is_refusal, make_gradient
from llc_fast.objective.control_variate import ControlVariate
from llc_fast.objective.objective import Evaluation, Objective
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.kronecker import KroneckerState, make_state
from llc_fast.samplers.metropolis import MetropolisSampler
from llc_fast.samplers.state import ChainState
from llc_fast.schedule import Schedule
from llc_fast.stats.step_checks import COLUMNS
from llc_fast.support.errors import first_line
from llc_fast.support.randomness import decode, encode
from llc_fast.traces import LOSS, REFERENCE_LOSS, Traces

DIVERGED_AFTER = 64
"""Steps at most until it is noticed that all chains of a group have diverged."""
_NUMPY_HAS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class RunSpec:
    """What the chains of a run are to do.

    Attributes:
        objective: what is sampled.
        sampler: how.
        schedule: how long.
        plan: the strategy, see :func:`llc_fast.gradients.plan.make_plan`.
        seed: of noise, batch order and whatever the model itself draws.
        observables: functions of every draw, by name.
        watch: called at every draw, by one thread at a time; None: nobody watches.
        control_variate: subtracted from the loss of every minibatch before it is recorded; None: nothing.
        evaluates_reference: whether the minibatches of draws are evaluated at w* too.
        start: where chains start, as w − w* by parameter, a row for each chain; None: at w*.
        keep_ends: whether traces say where the chains stopped.
        keep_state: whether chains that are done can go on: traces keep what changes from step to step.
        first_look: steps after which chains may be over for the first time; 0: they are over when all steps are done.
        is_pilot: whether these are pilot chains, for :func:`llc_fast.chains.run.after_each_step`.
    """

    objective: Objective
    sampler: Sampler
    schedule: Schedule
    plan: Plan
    seed: int
    observables: Mapping[str, Observable] = field(default_factory=dict)
    watch: Callable[[Draw], None] | None = None
    control_variate: ControlVariate | None = None
    evaluates_reference: bool = False
    start: Mapping[str, NDArray[Any]] | None = None
    keep_ends: bool = False
    keep_state: bool = False
    first_look: int = 0
    is_pilot: bool = False

    @functools.cached_property
    def check_steps(self) -> tuple[list[int], list[int]]:
        """Where step checks are made, and which take gradients."""
        return check_steps(self.schedule, self.first_look)

    def blank_traces(self, chains: range) -> Traces:
        """Of chains that have done nothing."""
        table = len(self.check_steps[0]), len(COLUMNS)
        names = (*self.sampler.traces, REFERENCE_LOSS) if self.evaluates_reference else self.sampler.traces
        return Traces.blank(chains, self.schedule.num_steps, names, table)


class RefusedError(Exception):
    """The strategy can't run this model; the text says why, the cause is what was raised."""


class Group:
    """Chains that step together, under way.

    Args:
        spec: what they are to do.
        traces: what they have done so far, and where they are; written to.
        observables: of the run.
        model: entered where the user's own code runs.
        state: memory of a group that is done, to be used again; None: new memory.

    Attributes:
        note: why kernels were not recorded, if they should have been.
        by_python: which recorded kernels Python runs, and why.
        metric: of which kind it is for which parameters, where the sampler has several.

    Raises:
        RefusedError: the strategy can't run this model.
    """

    def __init__(
        self,
        spec: RunSpec,
        traces: Traces,
        observables: Observables,
        model: AbstractContextManager[object],
        state: ChainState | None = None,
    ) -> None:
        objective, sampler, first, start = spec.objective, spec.sampler, traces.first_chain, traces.step
        self._spec, self.traces, self._observables, self._model = spec, traces, observables, model
        self.state = state or make_state(objective.reference, objective.masks, sampler, len(traces.chains))
        objective.generators.seed(mix(spec.seed, first))  # what a model with dropout draws from
        self._buffers = objective.fresh_buffers()
        self._feed = Feed(objective, spec.seed, first, len(traces.chains), start)
        self._evaluator = Evaluator(objective, self._buffers)
        self._params: dict[int, dict[str, Tensor]] = {}
        self.metric = ""
        self._metric: MetricOfChains | None = None
        if isinstance(self.state, KroneckerState):
            self._metric = MetricOfChains(objective, self.state, self._buffers, first, spec.seed)
            self.metric = self._metric.described
        self.state.start(first, spec.seed)
        with self._refusals():
            gradient, self.note = make_gradient(
                spec.plan,
                objective,
                self.state,
                self._buffers,
                self._feed,
                start,
                model=model,
                evaluates_reference=spec.evaluates_reference,
            )
        self.by_python = gradient.by_python if isinstance(gradient, ReplayedGradient) else ""
        if traces.state is not None:
            self._restore(traces.state)
        elif spec.start is not None:
            mine = slice(first, first + len(traces.chains))
            self.state.displace({name: torch.from_numpy(a[mine]) for name, a in spec.start.items()})
        checks = StepChecks(
            objective, sampler, spec.plan, spec.check_steps, self.state, gradient, self._feed, spec.seed, traces
        )
        # The user's code runs in one thread at a time, backward too; a recording is none of it.
        guard = model if self.note else contextlib.nullcontext()
        transition: Transition = gradient
        if isinstance(sampler, MetropolisSampler):
            transition = Metropolis(sampler, self.state, gradient, self._feed)
        on_device = _OnDevice(traces, objective.device) if objective.device.type != "cpu" else None
        self._on_device = on_device
        self._step: Callable[[int], None]
        observe = self._observe if observables or spec.watch is not None else None
        if spec.plan.strategy == "cuda-graph":
            assert on_device is not None
            with self._refusals(), torch.cuda.device(objective.device):  # which need not be the current one
                self._step = CapturedStep(
                    self.state, self._feed, gradient, checks, spec.control_variate, on_device.steps, start, observe
                )
        else:
            at_draws = _AtDraws(spec, gradient) if spec.evaluates_reference else None
            parts = (transition, self._feed, checks, spec.control_variate, at_draws, observe, guard)
            self._step = HostStep(traces.steps, *parts) if on_device is None else DeviceStep(on_device.steps, *parts)
        traces.state = traces.ends = None  # only now: nothing above may lose it

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """While the strategy is set up: its refusal of the model becomes a RefusedError, other errors stay.

        Where vmap would go through the chains one by one it warns: unless it was asked for, others are faster.
        """
        try:
            with warnings.catch_warnings():
                if not self._spec.plan.is_given:
                    warnings.filterwarnings("error", message=".*performance drop")
                yield
        except Exception as error:
            spec, step = self._spec, self.traces.step
            if is_refusal(error, spec.plan, spec.objective, self.state, self._feed, step):
                raise RefusedError(first_line(error)) from error
            raise

    @property
    def seconds_of_data(self) -> float:
        """Spent waiting for a loader."""
        return self._feed.seconds

    @property
    def is_done(self) -> bool:
        return self.traces.step == self._spec.schedule.num_steps

    def advance(self) -> None:
        """One step."""
        traces = self.traces
        if self._metric is not None:
            with self._model:
                self._metric(traces.step)
        self._step(traces.step)
        traces.step += 1
        # Reading the loss waits for a GPU, so look only now and then; a diverged chain stays diverged.
        if traces.step % DIVERGED_AFTER == 0 and not self._is_finite(traces.step - 1):
            traces.step = self._spec.schedule.num_steps

    def _is_finite(self, step: int) -> bool:
        if self._on_device is not None:
            return bool(torch.isfinite(self._on_device.steps[LOSS][:, step]).any())
        return bool(np.isfinite(self.traces.loss[:, step]).any())

    @torch.no_grad()
    def _observe(self, step: int, evaluation: Evaluation, batch: Batch) -> None:
        if (draw := self._spec.schedule.draw_at(step)) is None:
            return
        shared = self._feed.is_shared or len(self.traces.chains) == 1
        generators = self._spec.objective.generators
        as_they_were = generators.kept() if self._draws_numbers else contextlib.nullcontext()
        with self._model, as_they_were:  # observables may call the model too
            for row, chain in enumerate(self.traces.chains):
                seen = Draw(
                    chain,
                    draw,
                    step,
                    evaluation.loss[row],
                    None if evaluation.samples is None else evaluation.samples[row],
                    self._params_of(row),
                    batch if shared else _row(batch, row),
                    self._evaluator,
                )
                self._observables.record(seen, self.traces)
                if self._spec.watch is not None:
                    self._spec.watch(seen)

    def _params_of(self, row: int) -> dict[str, Tensor]:
        """The memory of a chain, which stays where it is."""
        if row not in self._params:
            self._params[row] = {name: p.detach() for name, p in self.state.single(row).items()}
        return dict(self._params[row])

    # ---- what is handed out --------------------------------------------------------------------------------

    def report(self) -> Traces:
        """What is done so far, in the memory that the chains go on to write to."""
        if self._on_device is not None:
            self._on_device.fetch()
        return self.traces

    def snapshot(self, *, copy: bool) -> Traces:
        """The same with where the chains are; with `copy`, apart from that memory."""
        found = self.report()
        found = found.copy() if copy else replace(found)
        self._add_state(found, copy)
        if self.is_done:
            self._add_ends(found)
        return found

    def finish(self, *, copy: bool) -> ChainState:
        """Complete the traces, with where the chains are if they may go on, and give the memory away.

        Args:
            copy: somebody else will use it.
        """
        traces = self.report()
        self._add_state(traces, copy)
        self._add_ends(traces)
        self.close()
        return self.state

    def close(self) -> None:
        """There is no further step, after an error either."""
        self._feed.close()

    def _add_ends(self, traces: Traces) -> None:
        if self._spec.keep_ends:
            traces.ends = {name: _numpy(t, copy=False) for name, t in self.state.displacement().items()}

    def _add_state(self, traces: Traces, copy: bool) -> None:
        if not self.is_done or self._spec.keep_state:
            traces.state = {name: _numpy(t, copy) for name, t in self._arrays().items()}

    @property
    def _draws_numbers(self) -> bool:
        """Whether the chains draw from generators that the user's code draws from, too."""
        return self._spec.objective.trial.is_random or not self._feed.is_pure

    def _arrays(self) -> dict[str, Tensor]:
        """Where the chains are: all that changes from step to step."""
        trial = self._spec.objective.trial
        tensors = self.state.arrays()
        if trial.writes_buffers:  # as bytes: NumPy does not have all of their dtypes
            tensors |= {f"buffer.{k}": b.reshape(1, -1).view(torch.uint8) for k, b in self._buffers.items()}
        if self._draws_numbers:
            generators = self._spec.objective.generators
            tensors["generators"] = encode(generators.states()).repeat(len(self.traces.chains), 1)
        return tensors

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        tensors = {k: torch.from_numpy(np.array(a)) for k, a in arrays.items()}
        if "generators" in tensors:
            self._spec.objective.generators.restore(decode(tensors.pop("generators")[0]))
        for name in [k for k in tensors if k.startswith("buffer.")]:
            buffer = self._buffers[name.removeprefix("buffer.")]
            buffer.copy_(tensors.pop(name)[0].view(buffer.dtype).view(buffer.shape))
        self.state.restore(tensors)


class _OnDevice:
    """Per-step traces while they are written on a device; `fetch` brings them to the host."""

    def __init__(self, traces: Traces, device: torch.device) -> None:
        self._traces = traces
        self.steps = {name: torch.from_numpy(values).to(device) for name, values in traces.steps.items()}

    def fetch(self) -> None:
        for name, values in self.steps.items():
            self._traces.steps[name][:] = values.cpu().numpy()


# ---- the heart of the loop: one step, chosen once ----------------------------------------------------------


class _AtDraws:
    """The losses at w* of the minibatches of draws, with the random numbers that the chains are about to draw.

    Args:
        spec: of the run.
        gradient: evaluates.
    """

    def __init__(self, spec: RunSpec, gradient: Gradient) -> None:
        self._draw_at, self._gradient = spec.schedule.draw_at, gradient
        self._generators = spec.objective.generators if spec.objective.trial.is_random else None

    def __call__(self, step: int, batch: Batch) -> Tensor | None:
        """Before the chains' own evaluation; None where there is no draw."""
        if self._draw_at(step) is None:
            return None
        if self._generators is None:
            return self._gradient.at_reference(batch)
        with self._generators.kept():
            return self._gradient.at_reference(batch)


class HostStep:
    """A step of chains on the CPU; its numbers are written by NumPy, in a fraction of torch's time for one number.

    Args:
        steps: traces to write, ``[chain, step]`` each.
        transition: evaluates and moves.
        feed: minibatches.
        checks: made on the way.
        control_variate: subtracted from losses; None: nothing.
        at_draws: evaluates the minibatches of draws at w*; None: that is not needed.
        observe: called between evaluation and move with step, evaluation and minibatch; None: nobody looks.
        guard: entered while the model is evaluated and differentiated.
    """

    def __init__(
        self,
        steps: Mapping[str, Any],
        transition: Transition,
        feed: Feed,
        checks: StepChecks,
        control_variate: ControlVariate | None,
        at_draws: _AtDraws | None,
        observe: Callable[[int, Evaluation, Batch], None] | None,
        guard: AbstractContextManager[object],
    ) -> None:
        self._loss, self._reference = steps[LOSS], steps.get(REFERENCE_LOSS)
        self._info = [(name, a) for name, a in steps.items() if name not in (LOSS, REFERENCE_LOSS)]
        self._transition, self._feed, self._checks, self._observe = transition, feed, checks, observe
        self._control_variate, self._at_draws, self._guard = control_variate, at_draws, guard
        self._prepare()

    def _prepare(self) -> None:
        self._indices: NDArray[np.int64] | None = None
        if self._control_variate is not None and self._control_variate.by_sample:
            self._indices = self._feed.indices.numpy()

    def __call__(self, step: int) -> None:
        batch = self._feed(step)
        if step in self._checks.places:
            with self._guard:
                self._checks.take(step, batch)
        with self._guard:
            at_reference = None if self._at_draws is None else self._at_draws(step, batch)
            seen = batch if self._observe is None else self._feed.untouched(batch)
            evaluation = self._transition.evaluate(batch)
        self._record(self._loss, step, evaluation.loss)
        if at_reference is not None:
            self._record(self._reference, step, at_reference)
        if self._observe is not None:
            self._observe(step, evaluation, seen)
        with self._guard:
            info = self._transition.move(step)
        for name, rows in self._info:
            rows[:, step] = info[name]

    def _record(self, trace: Any, step: int, loss: Tensor) -> None:
        value = (loss if loss.dtype in _NUMPY_HAS else loss.double()).numpy()
        if self._control_variate is not None:
            own = self._control_variate
            value = value - (own.at(step) if self._indices is None else own(self._indices))
        trace[:, step] = value


class DeviceStep(HostStep):
    """A step of chains elsewhere; its numbers stay on the device, so that nobody waits for them."""

    def _prepare(self) -> None:
        pass

    def _record(self, trace: Any, step: int, loss: Tensor) -> None:
        trace[:, step].copy_(paired(loss, self._control_variate, self._feed, step))


def _row(batch: Batch, row: int) -> Batch:
    return map_tensors(lambda t: t[row], batch)


def _numpy(tensor: Tensor, copy: bool) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array.copy() if copy and tensor.device.type == "cpu" else array
