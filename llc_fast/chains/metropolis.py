"""Metropolis-adjusted transitions: the exact yardstick for small problems.

The target is π(w) ∝ exp(−U(w)),

    U(w) = nβ·L_n(w) + γ/2·‖w − w*‖² + μ/2·‖w‖²,        L_n the loss over the whole data set,

with (w − w*)ᵀA⁻¹(w − w*) for ‖w − w*‖² where the localization is in the metric.

A transition draws a velocity v ~ N(0, 1), follows Hamilton's equations for a trajectory of leapfrog steps

    v ← v − (δ/2)·√A·∇U(w),    w ← w + δ·√A·v,    v ← v − (δ/2)·√A·∇U(w),        δ = √ε,

and accepts where it ends with probability min(1, exp(−ΔH)), H = U + ½‖v‖²; a rejected chain stays, and counts the
same draw again (Duane et al. 1987; Neal 2011, arXiv 1206.1901). With one leapfrog step the end is MALA's proposal
w − (ε/2)·A·∇U(w) + √(εA)·ξ, and exp(−ΔH) is the Metropolis–Hastings ratio with the full proposal density. So there is
no error of the step size and none of minibatches; what is left is Monte Carlo error, burn-in included.

Precision. Velocities, energies and all sums are float64; w is rounded to the chain's own precision, and L_n is what the
model makes of it: computed in float32 it is off by about 10⁻⁷·L_n, which enters U times nβ. As L_n is a function of w,
that is no noise in the test but another target, whose density differs by a factor exp(10⁻⁷·nβ·L_n): by 1 % where
nβ·L_n = 10⁵. Losses per sample (``reduction="none"``) and microbatches are summed in float64; beyond that, use a
float64 model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llc_fast.data import Batch
from llc_fast.gradients.minibatches import Feed
from llc_fast.gradients.strategies import Gradient, Info
from llc_fast.kernels.streams import ACCEPT_STREAM
from llc_fast.objective.objective import Evaluation
from llc_fast.samplers.metropolis import MetropolisSampler
from llc_fast.samplers.state import ChainState

_SHRINKAGE, _DELAY, _FORGETTING = 0.05, 10, 0.75  # γ, t₀ and κ of Hoffman & Gelman


class _Place(NamedTuple):
    """Where chains are: loss, ‖w − w*‖² and energy U, ``[chain]``, slope √A·∇U ``[chain, P]``, losses of samples."""

    loss: Tensor
    squared_distance: Tensor
    energy: Tensor
    slope: Tensor
    samples: Tensor | None

    def where(self, accepted: Tensor, other: _Place) -> _Place:
        """This place for the chains that accepted it, the other one for the rest."""
        column = accepted[:, None]
        return _Place(
            torch.where(accepted, self.loss, other.loss),
            torch.where(accepted, self.squared_distance, other.squared_distance),
            torch.where(accepted, self.energy, other.energy),
            torch.where(column, self.slope, other.slope),
            None if self.samples is None else torch.where(column, self.samples, other.samples),  # type: ignore[arg-type]
        )


class Metropolis:
    """Moves chains as MALA and HMC do, with the losses and gradients of another strategy.

    The loss of a step is that of where the chain is: `evaluate` computes it once, `move` leaves that of the next.
    What chains need to go on is w and the adaptation in ``state.adaptation``; the rest is a function of these.

    ε is adapted by dual averaging (Hoffman & Gelman 2014, section 3.2) in the first `adapt_steps` transitions, for each
    chain on its own, and then frozen at the weighted mean of its logarithms.

    Args:
        sampler: its hyperparameters.
        state: the chains.
        gradient: how losses and gradients are computed.
        feed: the data, all of them at every step.
    """

    def __init__(self, sampler: MetropolisSampler, state: ChainState, gradient: Gradient, feed: Feed) -> None:
        self._sampler, self._state, self._gradient, self._feed = sampler, state, gradient, feed
        self._reference, self._metric = state.rows_of(state.reference, torch.float64), state.metric_rows()
        self._measure: Tensor | float = 1.0  # of squared distances
        if state.scalars.in_metric:
            self._measure = torch.where(self._metric > 0, self._metric, math.inf).square().reciprocal()
        self._place: _Place | None = None

    def evaluate(self, batch: Batch) -> Evaluation:
        if self._place is None:
            self._place = self._look(batch)
        return Evaluation(self._place.loss, self._place.samples)

    def move(self, step: int) -> Info:
        state, here = self._state, self._place
        assert here is not None
        length, jitter = self._sampler.trajectory()
        numbers = state.numbers(step, ACCEPT_STREAM)
        # Box–Muller backwards: half the sum of squares of two normals is −log u, u uniform.
        threshold = 0.5 * numbers[:, :2].square().sum(dim=1)
        adaptation = state.adaptation["step_size"]
        delta = adaptation[:, :1].exp() * (1 + jitter * torch.erf(numbers[:, 2:3] / math.sqrt(2)))
        start, noise = state.w.clone(), state.noise_rows(step)
        there, velocity = self._trajectory(here, noise, delta, length, step)
        kinetic = 0.5 * (velocity.square() - noise.square()).sum(dim=1)
        change = (there.energy - here.energy + kinetic).nan_to_num(nan=math.inf)
        accepted = change < threshold
        state.put(torch.where(accepted[:, None], state.w, start))
        self._place = there.where(accepted, here)
        lr, acceptance = (2 * adaptation[:, 0]).exp(), (-change).exp().clamp(max=1)
        self._adapt(adaptation, acceptance, step)
        return {"acceptance": acceptance, "lr": lr, "squared_distance": here.squared_distance}

    # ---- one transition ------------------------------------------------------------------------------------

    def _trajectory(
        self, place: _Place, velocity: Tensor, delta: Tensor, length: int, step: int
    ) -> tuple[_Place, Tensor]:
        """Where leapfrog steps lead, and with what velocity; `state` is there afterwards."""
        w, diverged = self._state.w.to(torch.float64, copy=True), torch.zeros_like(place.loss, dtype=torch.bool)
        for _ in range(length):
            velocity = velocity - 0.5 * delta * place.slope
            moved = w + delta * self._metric * velocity
            # A trajectory that blows up is rejected; models need not cope with where it goes.
            diverged = diverged | ~moved.to(self._state.w.dtype).isfinite().all(dim=1)
            w = torch.where(diverged[:, None], w, moved)
            self._state.put(w)
            place = self._look(self._feed(step))
            velocity = velocity - 0.5 * delta * place.slope
        return place._replace(energy=place.energy.masked_fill(diverged, math.inf)), velocity

    def _look(self, batch: Batch) -> _Place:
        """Energy and slope at `state`, in other memory than that which the next evaluation writes to."""
        scalars, evaluation = self._state.scalars, self._gradient.evaluate(batch)
        grads = self._state.rows_of(self._gradient.gradients(), torch.float64)
        samples = evaluation.samples
        if samples is None:
            loss = evaluation.loss.to(torch.float64, copy=True)
        else:
            samples = samples.clone()
            loss = samples.mean(dim=1, dtype=torch.float64)
        w = self._state.w.double()
        away = w - self._reference
        pull = away * self._measure
        squared_distance = (away * pull).sum(dim=1)
        energy = scalars.nbeta * loss + 0.5 * (
            scalars.localization * squared_distance + scalars.weight_decay * w.square().sum(dim=1)
        )
        if scalars.bounding_box < math.inf:
            energy.masked_fill_((away.abs() > scalars.bounding_box).any(dim=1), math.inf)
        slope = self._metric * (scalars.nbeta * grads + scalars.localization * pull + scalars.weight_decay * w)
        return _Place(loss, squared_distance, energy, slope, samples)

    def _adapt(self, adaptation: Tensor, acceptance: Tensor, step: int) -> None:
        """Dual averaging of log δ, by the acceptance of the transition of this step."""
        count, last = step + 1, self._sampler.adapt_steps or 0
        if count > last:
            return
        log, mean, shortfall = adaptation.unbind(dim=1)
        weight = 1 / (count + _DELAY)
        shortfall = (1 - weight) * shortfall + weight * (self._sampler.target_acceptance - acceptance)
        log = math.log(10 * math.sqrt(self._state.scalars.lr)) - math.sqrt(count) / _SHRINKAGE * shortfall
        weight = count**-_FORGETTING
        mean = weight * log + (1 - weight) * mean
        adaptation[:] = torch.stack([mean if count == last else log, mean, shortfall], dim=1)
