"""Chains that step together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.chains.cuda_graph import CapturedStep
from llc_fast.chains.draw import Draw, Observable
from llc_fast.chains.metropolis import Metropolis
from llc_fast.chains.step_checks import Probe
from llc_fast.data import map_tensors, mix
from llc_fast.gradients.minibatches import Feed, paired
from llc_fast.gradients.plan import Plan
from llc_fast.gradients.strategies import Gradient, make_gradient
from llc_fast.objective.control_variate import Baseline
from llc_fast.objective.objective import Evaluation, Objective
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.metropolis import MetropolisSampler
from llc_fast.samplers.state import ChainState
from llc_fast.schedule import Schedule
from llc_fast.traces import ChainRecord

LOST_AFTER = 64
"""Steps at most until it is noticed that all chains of a group are lost."""
_NUMPY_HAS = (torch.float32, torch.float64)


class Group:
    """Chains that step together."""

    def __init__(
        self,
        posterior: Objective,
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
        self._state = memory or ChainState(posterior.anchor, posterior.masks, self._sampler, len(self.chains))
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
            traces = (self.losses, self.heats if self._sampler.supports_bias_correction else None)
            with torch.cuda.device(posterior.device):  # which need not be the current one
                self._graph = CapturedStep(self._state, self._feed, gradient, self._baseline, *traces, self.step)
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
                self.losses[:, step].copy_(paired(loss, self._baseline, self._feed))
            else:
                value = (loss if loss.dtype in _NUMPY_HAS else loss.double()).numpy()
                self._rows[:, step] = value if self._baseline is None else value - self._baseline(self._indices)
            if self._functions and (draw := self._schedule.draw_at(step)) is not None:
                with model:  # observables may call the model too
                    self._observe(draw, evaluation, batch)
            if self._sampler.kind == "metropolis":
                with guard:  # it evaluates the model where the chain may go
                    self._gradient.move(step)
            else:
                self._gradient.move(step)
            if self._sampler.supports_bias_correction:
                assert self._state is not None
                self._heat_rows[:, step] = self._state.info()["bias"]
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


def _row(batch: Any, row: int) -> Any:
    return map_tensors(lambda t: t[row], batch)


def _numpy(tensor: Tensor, copy: bool) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array.copy() if copy and tensor.device.type == "cpu" else array
