"""Looks at a few steps of every chain more closely than the loss trace does, without changing the chain.

What is measured is raw sums, a row of `COLUMNS` for each chain and step check, which go with the chain's losses through
checkpoints and processes; :mod:`llc_fast.stats.step_checks` makes statistics of them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llc_fast.data import leaves, map_tensors
from llc_fast.gradients.memory import may_compare_gradients
from llc_fast.gradients.minibatches import Feed
from llc_fast.gradients.plan import Plan
from llc_fast.gradients.strategies import Gradient
from llc_fast.kernels.native import normals
from llc_fast.kernels.step import NoiseKey
from llc_fast.kernels.streams import PROPOSAL_STREAM
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.state import ChainState
from llc_fast.schedule import Schedule
from llc_fast.stats.step_checks import COLUMNS
from llc_fast.traces import Traces

MAX_CHECKS = 16
_EARLIER = 5
"""Halvings of the first look at a length by need, with as many step checks each."""
_GRADIENTS = 3  # that one step check takes
_BUDGET = 0.02  # of the gradients of a run
_ELSEWHERE = 2**32
"""Steps from a minibatch to another one that no step of the chain has in its epoch."""


def check_steps(schedule: Schedule, first_look: int = 0) -> tuple[list[int], list[int]]:
    """Where step checks are made, evenly spread from the first draw to the last, and which of them take gradients.

    Chains that may be over sooner have as many between half and all of `first_look` steps, of twice as many, of half as
    many, and so on. Where these are does not depend on the length, so that a longer run has the same and more.
    """
    draws = range(schedule.num_steps)[schedule.draws]
    if not first_look:
        return _checked(draws, schedule.num_steps)
    steps, with_gradients = list[int](), list[int]()
    for octave in itertools.count(-_EARLIER):
        end = first_look << octave if octave >= 0 else first_look >> -octave
        if end // 2 >= schedule.num_steps:
            break
        among = range(end // 2 if steps else 0, end)
        found = _checked([s for s in among if schedule.draw_at(s) is not None], end)
        steps, with_gradients = steps + found[0], with_gradients + found[1]
    return [s for s in steps if s in draws], [s for s in with_gradients if s in draws]


def _checked(draws: Sequence[int], num_steps: int) -> tuple[list[int], list[int]]:
    steps = _spread(draws, min(MAX_CHECKS, len(draws)))
    return steps, _spread(steps, min(len(steps), int(_BUDGET * num_steps / _GRADIENTS)))


def _spread(values: Sequence[int], count: int) -> list[int]:
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, count)]


class StepChecks:
    """The step checks of a group of chains.

    Args:
        objective, sampler, plan: of the run; they say what can be measured.
        where: the steps of :func:`check_steps`.
        state, gradient, feed: of the group.
        seed: of the run.
        traces: of the group; ``traces.checks`` is written to.

    Attributes:
        places: which row of the table belongs to a step.
    """

    def __init__(
        self,
        objective: Objective,
        sampler: Sampler,
        plan: Plan,
        where: tuple[list[int], list[int]],
        state: ChainState,
        gradient: Gradient,
        feed: Feed,
        seed: int,
        traces: Traces,
    ) -> None:
        self._objective, self._sampler = objective, sampler
        self._state, self._gradient, self._feed = state, gradient, feed
        self._seed, self._first_chain, self._table = seed, traces.first_chain, traces.checks
        steps, self._with_gradients = where
        self.places = {step: k for k, step in enumerate(steps)}
        self._is_langevin = sampler.kind == "langevin"
        has_noise = math.isfinite(sampler.injected_noise(vars(sampler)))
        self._is_compiled = plan.strategy == "compiled"  # for one shape of minibatches
        # Nor where an evaluation leaves a trace.
        if (
            not may_compare_gradients(objective, plan)
            or objective.trial.writes_buffers
            or objective.trial.writes_batch
            or not has_noise
        ):
            self._with_gradients = []
        self._is_precise = objective.is_precise
        # A proposal that hits a box, or has other noise, is no Langevin proposal; rounded losses can't be compared.
        self._has_acceptance = (
            self._is_langevin
            and sampler.bounding_box_size is None
            and sampler.noise_level == 1
            and objective.is_precise
        )

    @torch.no_grad()
    def take(self, step: int, batch: Any) -> None:
        """Measure at the present place; `batch` is this step's minibatch, in the feed's memory again afterwards."""
        self._table[:, self.places[step], COLUMNS.index("distance")] = self._state.distances()
        if step in self._with_gradients and step >= self._state.adapts_until:
            with self._same_randomness() as again:
                self._measure(step, batch, NoiseKey(self._seed, step, self._first_chain), again)

    def _measure(self, step: int, batch: Any, key: NoiseKey, again: Callable[[], None]) -> None:
        state, gradient, feed = self._state, self._gradient, self._feed
        s, w = state.scalars, state.w

        def evaluate(batch: Any) -> tuple[Tensor, Tensor]:
            again()
            with torch.enable_grad():
                loss = gradient.evaluate(batch).loss.double().clone()  # a replay overwrites both
                return loss, state.rows_of(gradient.gradients())

        loss, grad = evaluate(batch)
        other = self._other(step, batch)
        if other is None:
            noise_terms = torch.zeros_like(w) if feed.is_shared else torch.full_like(w, torch.nan)
        else:
            batch_elsewhere, factor = other
            difference = evaluate(batch_elsewhere)[1] - grad
            noise_terms = state.squares_in_metric(difference, step, s.nbeta**2, factor)
        if feed.is_addressable:
            batch = feed(step)
        self._write(step, "gradient_noise", noise_terms)
        if not self._is_langevin:
            return
        del noise_terms
        away = w - state.rows_of(state.reference)
        pull: Tensor | float = s.localization  # in the metric of the localization
        if s.in_metric:
            p = state.metric(step)
            pull = s.localization / torch.where(p > 0, p, math.inf)
        drift = s.nbeta * grad + pull * away + s.weight_decay * w
        noise = torch.stack(
            [
                normals(
                    0, w.shape[1], key._replace(chain=chain, stream=PROPOSAL_STREAM), dtype=w.dtype, device=w.device
                )
                for chain in range(key.chain, key.chain + len(w))
            ]
        )
        kick = state.noise_in_metric(noise, step, s.lr)
        move = kick - state.times_metric(drift, step, 0.5 * s.lr)
        with state.at(w + move):
            new_loss, new_grad = evaluate(batch)
        change = s.nbeta * (new_grad - grad)
        self._write(step, "curvature", move * change)
        self._write(step, "squared_curvature", state.squares_in_metric(change, step))
        self._write(step, "work", 0.5 * s.nbeta * move * (grad + new_grad))
        rise = s.nbeta * (new_loss - loss)
        resolution = s.nbeta * torch.finfo(w.dtype).eps * loss.abs()
        rise = torch.where((20 * resolution < rise.abs()) & self._is_precise, rise, torch.nan)
        self._table[:, self.places[step], COLUMNS.index("rise")] = rise.cpu().numpy()
        if self._has_acceptance:
            # Σ over both ends of the drift; the potentials' difference and the two proposal densities are
            # U(w) − U(w') + Σ ½√(εp)(G + G')ξ − (ε/8)p(G + G')².
            both = 2 * drift + change + (pull + s.weight_decay) * move
            quadratic = move * (pull * (away + move / 2) + s.weight_decay * (w + move / 2))
            self._write(
                step, "log_acceptance", 0.5 * kick * both - state.squares_in_metric(both, step, s.lr / 8) - quadratic
            )
            rounding = s.nbeta * torch.finfo(w.dtype).eps * loss.abs()
            fallen = torch.where(rounding < 0.05, s.nbeta * (loss - new_loss), torch.nan)
            self._table[:, self.places[step], COLUMNS.index("log_acceptance")] += fallen.cpu().numpy()

    def _other(self, step: int, batch: Any) -> tuple[Any, float] | None:
        """A minibatch to compare with, and Var(g) over the square of the difference of the gradients."""
        feed = self._feed
        if feed.is_shared:
            return None
        if feed.is_addressable:
            return feed(step + _ELSEWHERE), 0.5
        # What comes next can be had only once: half of the minibatch says as much, if it can be cut into samples.
        dim = 0 if len(self._table) == 1 else 1
        tensors, n = leaves(batch), self._objective.source.num_samples
        if self._is_compiled or not all(isinstance(t, Tensor) and t.ndim > dim for t in tensors):
            return None
        size = tensors[-1].shape[dim]
        if size % 2 or any(t.shape[dim] != size for t in tensors):
            return None
        return map_tensors(lambda t: t.narrow(dim, 0, size // 2), batch), 1.0 if n is None else max(0.0, 1 - size / n)

    def _write(self, step: int, column: str, terms: Tensor) -> None:
        """Row by row, so that the bits do not depend on which chains run beside."""
        sums = [float(row.sum(dtype=torch.float64)) for row in terms]
        self._table[:, self.places[step], COLUMNS.index(column)] = sums

    @contextlib.contextmanager
    def _same_randomness(self) -> Iterator[Callable[[], None]]:
        """What a model with dropout draws: the same in each evaluation after the yielded call, and nothing is used."""
        if not self._objective.trial.is_random:
            yield lambda: None
            return
        generators = self._objective.generators
        with generators.kept():
            before = generators.states()
            yield lambda: generators.restore(before)
