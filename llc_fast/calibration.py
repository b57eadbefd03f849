"""Chooses the step size that the user left open, from short pilot chains.

The step size is limited by two things. Stability, and the discretization of the stiffest direction: ε·(nβ·h_max + γ)
starts at 1. And bias, what step size and minibatch noise together add to the loss, which every step measures exactly
(:meth:`llc_fast.samplers.Sampler.bias`): pilot chains lower ε until it is a tenth. λ̂ is then corrected for it, so that
the step may be many times larger than without, and slow directions are crossed as many times faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llc_fast.chains.group import DIVERGED_AFTER, RunSpec
from llc_fast.chains.metric import kronecker_stiffness
from llc_fast.chains.run import Monitor, run_chains
from llc_fast.data import IndexedSource, mix
from llc_fast.gradients.plan import Plan, make_plan
from llc_fast.objective.control_variate import ControlVariate, ReferenceLosses
from llc_fast.objective.curvature import descent, in_float32, pilot_metric, top_curvature
from llc_fast.objective.kronecker import diagonal_wells
from llc_fast.objective.metric import metric_of
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.kronecker import KFACSGLDSampler
from llc_fast.schedule import Schedule
from llc_fast.settings import PILOT_SHARE, Settings
from llc_fast.stats.convergence import autocorrelation_time, error_within
from llc_fast.stats.wells import Wells
from llc_fast.support.runtime import Stop
from llc_fast.traces import REFERENCE_LOSS

STIFFNESS, CORRECTED_STIFFNESS = 0.2, 1.0
"""ε·(nβ·h_max + γ) of a step size chosen without and with a correction for bias.

In a quadratic direction of curvature a, Langevin steps of size ε inflate the variance by 1/(1 − εa/4): at 0.2 by 5 % in
the stiffest direction, at 1 by a third, which the correction takes back; stable is everything below 4.
"""
PRIOR_STIFFNESS = 0.04
"""ε·γ·p_max at nβ = 0, where nothing is corrected and γ is all the curvature there is: variances are 1 % too large, and
draws forget each other in fifty steps."""
_DESCENT_SHARE = 0.02
"""Gradients at most, of those of all chains, that looking for a way down from w* may take."""
_STAGES = (1 / 16, 3 / 16, 3 / 4)
"""Lengths of the pilot chains, as shares of their gradients: the last is four tenths as long as the four chains of a
run, long enough to see what becomes of the bias."""
MIN_PILOT = 64
"""Gradients below which pilots would show nothing."""
RESTART_STEP, MAX_RESTARTS = 1 / 4, 3
"""ε of a run that begins again, as a share of the one with which its chains diverged; and how often. Pilots can't see
everything: near very singular places the curvature grows for thousands of steps."""
CHALLENGE_LENGTH, MIN_GAIN = 1 / 4, 2.0
"""Of the pilot in another metric: its length, as a share of the last pilot before, which with a third of it for the
step size adds 3.3 % to the gradients; and how many times as fast it has to be. Pilots are short: what looks twice as
fast is not slower."""
_MOST_ELEMENTS, _MOST_METRIC_BYTES = 2_000_000, 1e9
"""Parameters, and bytes that the metric of all chains takes, above which no pilot tries another metric."""
_LONG_MEMORY, _VISIBLE = 20.0, 0.02
"""Of a pilot without bias: the autocorrelation time in steps, or the growth over its last two doublings, above which a
better metric can show."""
FLOPS_PER_BYTE, FLOPS_PER_CALL = {"cpu": 2.0, "cuda": 5.0}, {"cpu": 4e5, "cuda": 1e8}
"""What moving a byte, and calling one operation of torch, cost in floating-point operations, at the nominal speeds of
:mod:`llc_fast.cost`. Nominal: a clock would choose otherwise on another day."""
_CALLS_OF_GRADIENT = 2
"""For each parameter; recorded kernels are replayed without torch's dispatch."""
MIN_FRICTION = 0.5
"""With less, bias feeds on itself where gradient noise grows with the loss: chains diverged at 0.25."""


@dataclass(frozen=True)
class Chosen:
    """What the chains run with, as far as it was not given; plain values, which a checkpoint keeps.

    Attributes:
        init_loss: L(w*) over the whole data set.
        init_loss_stderr: its standard error.
        unpaired_reason: why losses are not paired with those at w*; empty if they are.
        nbeta: nβ.
        lr: ε.
        bias_correction: whether bias is subtracted from the loss trace.
        friction: α of the sampler's variant with momentum; 1: the sampler itself.
        pilot_steps: gradients that pilot chains took.
        pilot_bias_share: share of bias in nβ·(L − L(w*)) at their end; None without pilots, NaN where the
            loss was not above L(w*).
        descent: the way down from w*: the squares and the curvatures of :class:`llc_fast.objective.curvature.Descent`;
            None: not measured.
        wells: the curvatures and counts of :class:`llc_fast.stats.wells.Wells` at w*; None: not known.
        restarts: how often most chains diverged on the way, and all began again with a quarter of ε.
        is_interrupted: whether somebody stopped the pilot chains: this is what they had found by then.
        refined: what :func:`llc_fast.objective.refinement.refine` has done; None: w* is the model's.
        sampler: name of the one that takes the place of the default; empty: none does.
        reason: why it does, or why none does, with what was measured; empty: the sampler was given, or none was tried.
    """

    init_loss: float
    init_loss_stderr: float
    unpaired_reason: str
    nbeta: float
    lr: float
    bias_correction: bool
    friction: float = 1.0
    pilot_steps: int = 0
    pilot_bias_share: float | None = None
    descent: list[list[float]] | None = None
    wells: list[list[float]] | None = None
    restarts: int = 0
    is_interrupted: bool = False
    refined: dict[str, Any] | None = None
    sampler: str = ""
    reason: str = ""


def choose_settings(
    settings: Settings,
    objective: Objective,
    at_reference: ReferenceLosses,
    plan: Plan,
    *,
    start: Mapping[str, NDArray[Any]] | None = None,
    monitor: Monitor | None = None,
    stopping: Callable[[], AbstractContextManager[Stop | None]] = contextlib.nullcontext,
) -> Chosen:
    """Fill in what the settings leave open.

    Args:
        settings: what was asked for.
        objective: what is sampled.
        at_reference: the losses at w*.
        plan: of the run.
        start: where chains start, as w − w* by parameter, a row for each chain; None: at w*.
        monitor: what the pilot chains' progress is reported to.
        stopping: gives a flag that stops the pilot chains once it is set.

    Raises:
        ValueError: no step size can be chosen.
    """
    nbeta = settings.nbeta_for(objective.source.num_samples)
    lr = settings.lr
    corrected = settings.wants_bias_correction
    found = None
    if nbeta:
        template = settings.complete_sampler(1.0, nbeta)
        found = descent(
            objective,
            nbeta,
            template.localization or 0.0,
            metric=metric_of(template, objective) if template.localizes_in_metric else None,
            max_gradients=_DESCENT_SHARE * settings.num_chains * settings.schedule.num_steps,
        )
    chosen = Chosen(
        init_loss=at_reference.mean,
        init_loss_stderr=at_reference.stderr,
        unpaired_reason=at_reference.unpaired_reason,
        nbeta=nbeta,
        lr=math.nan if lr is None else lr,
        bias_correction=corrected,
        descent=None if found is None else [list(found.squares), list(found.curvatures)],
        wells=_wells(settings, objective) if nbeta and start is None else None,
    )
    if lr is not None:
        return chosen
    num_steps = num_pilot_steps(settings)
    template = settings.complete_sampler(1.0, nbeta)
    stiffness = CORRECTED_STIFFNESS if num_steps else STIFFNESS
    if not nbeta and template.kind != "metropolis":
        stiffness = PRIOR_STIFFNESS
    chosen = dataclasses.replace(chosen, lr=default_lr(objective, template, stiffness=stiffness, seed=settings.seed))
    if not num_steps:
        return chosen
    strategy, release = settings.execution.strategy, plan.release or None
    pilot = _Pilot(
        settings=settings,
        objective=objective,
        plan=make_plan(objective, template, 1, strategy=strategy, release_gradients=release),
        control_variate=at_reference.control_variate(objective.source.batch_size, at_reference.mean),
        evaluates_reference=at_reference.pairing == "draws",
        chosen=chosen,
        num_steps=num_steps,
        min_friction=MIN_FRICTION if settings.is_default_sampler and not plan.release else 1.0,
        start=start,
        monitor=monitor,
    )
    with stopping() as stop:
        chosen, seen = pilot.run(stop)
        return pilot.challenged(chosen, seen, stop) if settings.may_be_challenged else chosen


def _no_factors(objective: Objective) -> str:
    """Why nothing is asked of the Gauss–Newton matrix unless somebody wants it; empty if it may be."""
    if objective.num_parameters > _MOST_ELEMENTS:
        return f"the model has more than {_MOST_ELEMENTS:,} parameters"
    if (
        objective.masks
        or objective.trial.is_random
        or objective.microbatch_size is not None
        or not objective.is_precise
    ):
        return "masks, random losses, microbatches and low precision are left to it"
    if not isinstance(objective.source, IndexedSource):
        return "the data are read by a loader"
    return ""


def _wells(settings: Settings, objective: Objective) -> list[list[float]] | None:
    """The wells at w* that a sampler in the Euclidean metric has to cross; None: not known, or another metric."""
    template = settings.template
    if template.metric != "identity" or template.kind not in ("langevin", "momentum") or _no_factors(objective):
        return None
    found = diagonal_wells(objective, settings.seed)
    return None if found is None else [list(found.curvatures), list(found.counts)]


def num_pilot_steps(settings: Settings) -> int:
    """Gradients that pilot chains take, if they take no more than planned; 0: there are none."""
    if not settings.has_pilots:
        return 0
    count = int(PILOT_SHARE * settings.num_chains * settings.schedule.num_steps)
    return count if count >= MIN_PILOT else 0


def default_lr(objective: Objective, sampler: Sampler, *, stiffness: float = STIFFNESS, seed: int = 0) -> float:
    """ε = `stiffness` / a with a = nβ·h_max + γ·p_max, h_max the largest curvature at w* in the sampler's metric.

    Where the localization is in that metric too, γ takes the place of γ·p_max.

    At nβ = 0 it asks nothing of the loss, unless the metric adapts to its gradients.

    A drift that lags k steps behind overshoots by as much: a is multiplied by 1 + k.

    Raises:
        ValueError: the loss has no curvature at w*, or the sampler does not say what its metric or its lag is.
    """
    metric: dict[str, Any] | None = None
    lag = sampler.drift_lag(vars(sampler))
    if sampler.metric == "unknown" or math.isnan(lag):
        raise ValueError(
            f"lr=None: sampler={sampler.name!r} does not say how a step size is chosen for it (metric, drift_lag): "
            "pass lr"
        )
    if isinstance(sampler, KFACSGLDSampler):
        # A step of a quarter is what its metric is damped for, and less where H is more than its factors.
        return stiffness / max(4.0, kronecker_stiffness(objective, sampler, seed))
    if sampler.metric == "adaptive":
        metric = pilot_metric(objective, vars(sampler), seed=seed)
    elif sampler.metric == "given":
        metric = metric_of(sampler, objective)
    largest = (
        1.0
        if metric is None or sampler.localizes_in_metric
        else max(float(in_float32(p).max()) for p in metric.values())
    )
    assert sampler.nbeta is not None and sampler.localization is not None
    curvature = 0.0
    if sampler.nbeta:
        curvature = top_curvature(objective, metric=metric, seed=seed, steps_in_metric=sampler.localizes_in_metric)
    stiffest = sampler.nbeta * curvature + sampler.localization * largest
    stiffest *= 1 + lag
    if not 0 < stiffest < math.inf:
        raise ValueError(
            f"lr=None: no step size can be chosen, the curvature of the loss at w* is {stiffest:g}; pass lr"
        )
    return stiffness / stiffest


@dataclass(frozen=True)
class _Pilot:
    """Pilot chains: lower ε until bias is the sampler's target share of nβ·(L − L(w*)).

    Each chain starts at w* and is longer than the one before.

    Where there is less bias than that, momentum takes up the slack: the friction α is lowered, which multiplies bias
    and the speed at which flat directions are crossed by 1/α, and does without larger steps. Starting again each time
    makes every stage an experiment of its own. Bias grows where the curvature does on the way, so the last stage is
    judged by what its share will have become at the end of the run, which may be two tenths. Stages whose chain
    diverged are run again with an eighth of ε.

    Attributes:
        settings: of the run that is being prepared.
        objective: what is sampled.
        plan: for a single chain.
        control_variate: the minibatches' losses at w*, if chains are to be paired with them.
        evaluates_reference: whether minibatches are evaluated at w* instead.
        chosen: nβ, L(w*), and the step size to begin with, which is never exceeded.
        num_steps: gradients to spend; more where chains diverge, at most twice.
        min_friction: the least that may be used; 1: no momentum.
        start: where the chains of the run start; pilots start where its first one does.
        monitor: what progress is reported to.
    """

    settings: Settings
    objective: Objective
    plan: Plan
    control_variate: ControlVariate | None
    evaluates_reference: bool
    chosen: Chosen
    num_steps: int
    min_friction: float
    start: Mapping[str, NDArray[Any]] | None
    monitor: Monitor | None

    def run(self, stop: Stop | None = None) -> tuple[Chosen, NDArray[np.float64]]:
        """The step size and friction that the pilots end with, or have found when `stop` is set.

        Also nβ·(L − L(w*)) of the last pilot, without its bias; empty if it was interrupted or diverged.

        Raises:
            ValueError: all chains diverged.
        """
        nbeta, most, target = self.chosen.nbeta, self.chosen.lr, self.settings.template.target_bias_share
        lr, friction, share = most, 1.0, math.nan
        stage, attempt, spent = 0, 0, 0
        seen = np.empty(0)
        while stage < len(_STAGES) and spent < self.num_steps:
            last = stage == len(_STAGES) - 1
            length = self._length(stage)
            loss, bias = self._chain(lr, friction, length, attempt, stop)
            if stop is not None and stop.is_set():
                length = int(np.isfinite(loss).sum())
                interrupted = dataclasses.replace(
                    self.chosen,
                    lr=lr,
                    friction=friction,
                    pilot_steps=spent + length,
                    pilot_bias_share=share,
                    is_interrupted=True,
                )
                return interrupted, np.empty(0)
            attempt += 1
            spent += min(length, int(np.isfinite(loss).sum()) + DIVERGED_AFTER)
            excess = nbeta * (loss - self.chosen.init_loss)
            late = slice(length // 2, None)
            if np.isfinite(excess).all() and np.isfinite(bias).all():
                stage += 1
                seen = excess - bias if last else seen
                found, added = float(excess[late].mean()), float(bias[late].mean())
                if found <= 0:  # w* is no minimum: no reason to blame the step size
                    continue
                share = added / found
                if last:  # what no pilot has tried is not used
                    ahead = self.num_steps / (PILOT_SHARE * self.settings.num_chains * length)
                    change = min(2 * target / max(_share_ahead(excess, bias, ahead), 1e-12), 1.0)
                else:  # what grows stops at half of the goal
                    change = target / max(share, 1e-12)
                    change = min(change, max(1.0, change / 2), 2.0)
                change = max(change, 1 / 8)
            else:  # the stage once more
                change = 1 / 8
            # Bias is proportional to ε/α. Where it is too much momentum goes first, where too little it comes last.
            wanted = lr / friction * change
            lr = min(most, wanted)
            friction = min(1.0, max(lr / wanted, self.min_friction))
        if not stage:
            raise ValueError(
                f"lr=None: no step size can be chosen. Chains from w* diverged down to lr={8 * lr:.2g}. Is there any "
                "curvature at w*? Pass lr, or a larger localization."
            )
        chosen = dataclasses.replace(
            self.chosen,
            lr=lr,
            friction=friction,
            pilot_steps=spent,
            pilot_bias_share=share,
        )
        return chosen, seen

    def _length(self, stage: int) -> int:
        return max(16, int(_STAGES[stage] * self.num_steps))

    def challenged(self, chosen: Chosen, seen: NDArray[np.float64], stop: Stop | None = None) -> Chosen:
        """What was chosen, or another sampler in its place, if a short pilot shows that it is faster.

        It is tried only where the last pilot says that there is something to gain, or diverged. It then takes a quarter
        of that pilot's steps, and is compared with where that pilot was at the same step and later: chains of all
        samplers start at w*, and tend to the same posterior. Effective samples are over the cost of steps, which is
        counted. Where the last pilot diverged, so that nobody knows how the step size does that was chosen for it, one
        that does not is better.

        Args:
            chosen: for the default sampler.
            seen: nβ·(L − L(w*)) of its last pilot, without bias; empty if it was interrupted or diverged.
            stop: ends the pilot, and the default is kept.
        """
        name = self.settings.template.structured_variant
        length = int(CHALLENGE_LENGTH * self._length(len(_STAGES) - 1))
        if name is None or length < MIN_PILOT or chosen.is_interrupted:
            return chosen
        if why := self._why_not(chosen, seen):
            return dataclasses.replace(chosen, reason=why)
        sampler = self.settings.complete_sampler(1.0, chosen.nbeta, name=name)
        kept = f"{self._called(chosen)} stays: {name}"
        shapes = [p.shape for p in self.objective.reference.values()]
        if self.settings.num_chains * sampler.extra_bytes(shapes, 4) > _MOST_METRIC_BYTES:
            return dataclasses.replace(chosen, reason=f"{kept} would need too much memory")
        slower, share, excess, bias = 1.0, math.nan, np.empty(0), np.empty(0)
        try:
            lr = most = default_lr(self.objective, sampler, stiffness=CORRECTED_STIFFNESS, seed=self.settings.seed)
            for attempt, steps in enumerate((length // 3, length)):  # the first one is for the step size
                lr *= slower
                loss, bias = self._chain(lr, 1.0, steps, _CHALLENGER + attempt, stop, name)
                if stop is not None and stop.is_set():
                    return dataclasses.replace(chosen, is_interrupted=True)
                spent = chosen.pilot_steps + min(steps, int(np.isfinite(loss).sum()) + DIVERGED_AFTER)
                chosen = dataclasses.replace(chosen, pilot_steps=spent)
                excess, late = chosen.nbeta * (loss - chosen.init_loss), slice(steps // 2, None)
                # Its metric is learned for longer in the run than here, so that nothing is read from a trend.
                with np.errstate(invalid="ignore"):  # of a chain that diverged
                    share = float(bias[late].mean() / max(float(excess[late].mean()), 1e-12))
                is_finite = np.isfinite([*excess, *bias]).all()
                wanted = 2 * sampler.target_bias_share / max(share, 1e-12) if is_finite else 0.0
                slower = min(1.0, max(1 / 8, wanted))
                if not is_finite:  # what diverged was too large
                    most = lr * slower
            # A metric learned for a few steps makes more bias than one that has seen where chains go: up again to what
            # is aimed at, as far as a pilot has tried.
            lr *= slower if wanted < 2 else min(most / lr, wanted / 2)
        except ValueError as error:
            return dataclasses.replace(chosen, reason=f"{kept} is not possible here ({error})")
        if not np.isfinite([*excess, *bias]).all():
            return dataclasses.replace(chosen, reason=f"{kept} diverged within {length} steps")
        if not len(seen):
            reason = f"{self._called(chosen)} diverged in a pilot, {name} did not within {length} steps"
            return dataclasses.replace(chosen, sampler=name, lr=lr, friction=1.0, pilot_bias_share=share, reason=reason)
        cost = self._cost_of(sampler) / self._cost_of(self.settings.complete_sampler(1.0, chosen.nbeta))
        gain, words = speed_over(excess - bias, seen)
        gain *= slower / cost
        words += f", a step of which costs {cost:.2g} times as much"
        if gain < MIN_GAIN:
            return dataclasses.replace(chosen, reason=f"{kept} gave {gain:.2g} times the effective samples ({words})")
        reason = f"{name} gave {gain:.2g} times the effective samples of {self._called(chosen)} ({words})"
        return dataclasses.replace(chosen, sampler=name, lr=lr, friction=1.0, pilot_bias_share=share, reason=reason)

    def _called(self, chosen: Chosen) -> str:
        return self.settings.complete_sampler(1.0, chosen.nbeta, friction=chosen.friction).name

    def _why_not(self, chosen: Chosen, seen: NDArray[np.float64]) -> str:
        """Why no other metric is tried; empty if there is something to gain."""
        plain = self._called(chosen)
        if why := _no_factors(self.objective):
            return f"{plain} stays: {why}"
        if not len(seen):
            return ""
        quarter = len(seen) // 4
        before, after = seen[quarter // 2 : quarter], seen[2 * quarter :]
        growth = abs(float(after.mean() - before.mean()))
        error = math.hypot(*(error_within(part[None]) for part in (before, after)))
        if growth > max(3 * error, _VISIBLE * abs(float(after.mean()))):
            return ""
        time = autocorrelation_time(after[None])
        if time > _LONG_MEMORY or self._unreached(chosen) > _VISIBLE * abs(float(after.mean())):
            return ""
        return f"{plain} stays: its pilot no longer grows, and forgets in {time:.2g} steps"

    def _unreached(self, chosen: Chosen) -> float:
        """What λ̂ of the run would lack, for directions that are too flat at w* for any pilot to see them."""
        schedule, template = self.settings.schedule, self.settings.template
        wells = Wells(*chosen.wells or ())
        pull, rate = (template.localization or 0.0) + template.weight_decay, chosen.lr / chosen.friction
        return wells.unreached(chosen.nbeta, pull, rate, schedule.num_burnin, schedule.num_steps)

    def _cost_of(self, sampler: Sampler) -> float:
        """Of a step of one chain with its gradient, in floating-point operations; no clock is asked."""
        objective = self.objective
        device = "cpu" if objective.device.type == "cpu" else "cuda"
        shapes = [tuple(p.shape) for p in objective.reference.values()]
        work, calls = sampler.extra_work(shapes, objective.trial.flops, self.settings.longest.num_steps)
        moved = sampler.bytes_moved()
        moved = (0.0 if math.isnan(moved) else moved) * objective.num_parameters
        calls += _CALLS_OF_GRADIENT * len(shapes)
        return objective.trial.flops + work + FLOPS_PER_BYTE[device] * moved + FLOPS_PER_CALL[device] * calls

    def _chain(
        self, lr: float, friction: float, length: int, attempt: int, stop: Stop | None, name: str = ""
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Losses and bias of one chain from w*."""
        sampler = self.settings.complete_sampler(lr, self.chosen.nbeta, friction=friction, name=name)
        if sampler.metric in ("adaptive", "kronecker"):
            # Half of the pilot to learn the metric, the other half to see what it does.
            sampler = dataclasses.replace(sampler, adapt_steps=length // 2)  # type: ignore[call-arg]
        spec = RunSpec(
            self.objective,
            sampler,
            Schedule(length, 0),
            self.plan,
            mix(mix(self.settings.seed, _PILOT), attempt),
            control_variate=self.control_variate,
            evaluates_reference=self.evaluates_reference,
            start=self.start,
            is_pilot=True,
        )
        traces = run_chains(spec, range(1), monitor=self.monitor, stop=stop).traces[0]
        loss, bias = traces.loss[0], traces.steps["bias"][0]
        if self.evaluates_reference:  # what is compared is the excess over L(w*)
            loss = loss - traces.steps[REFERENCE_LOSS][0] + self.chosen.init_loss
        return loss, bias


def speed_over(fast: NDArray[np.float64], slow: NDArray[np.float64]) -> tuple[float, str]:
    """How many times the effective samples a step of one chain gives than one of another, and what was seen.

    Both start at w*. Where the longer chain still grows, or has not come as far as the other one, it is the ratio of
    the steps in which they come equally far; otherwise of the steps in which they forget, if they are at one place.
    Some chains first come too high, stiff directions before flat ones, and then fall: of these further is lower.

    Args:
        fast: nβ·(L − L(w*)) of one chain, without bias.
        slow: the same of the other one, of four times as many steps.
    """
    length = len(fast)
    sign = _direction(fast, slow)
    fast, slow = sign * fast, sign * slow
    reached, error = float(fast[length // 2 :].mean()), error_within(fast[None, length // 2 :])
    ends = [len(slow) >> k for k in (4, 3, 2, 1, 0)]
    windows = [slow[end // 2 : end] for end in ends]
    places, errors = [float(w.mean()) for w in windows], [error_within(w[None]) for w in windows]
    same, last = places[2], places[4]
    words = (
        f"nβ·(L − L(w*)) of {sign * reached:.4g} after {length} steps; the other {sign * same:.4g} there, "
        f"{sign * last:.4g} after {ends[-1]}"
    )
    if max(last - same - 2 * math.hypot(errors[2], errors[4]), reached - last - 2 * math.hypot(error, errors[4])) > 0:
        level = reached - error  # what the chain has surely come to
        if level >= last:  # growth slows down, so that it would take at least as many doublings more
            more = min((level - last) / max(last - places[3], 1e-12), _MOST_DOUBLINGS)
            return ends[-1] * 2**more / length, words
        k = max((k for k in range(4) if places[k] <= level), default=-1)
        if k < 0 or not places[k + 1] > places[k]:
            return ends[0] / length, words
        share = (level - places[k]) / (places[k + 1] - places[k])
        return ends[k] * 2**share / length, words
    if reached < last - 2 * math.hypot(error, errors[4]):
        return 0.0, words
    times = [autocorrelation_time(part[None]) for part in (windows[4], fast[length // 2 :])]
    words += f"; autocorrelation times {times[1]:.2g} and {times[0]:.2g} steps"
    ratio = times[0] / max(times[1], 1.0)
    return (ratio if math.isfinite(ratio) else 0.0), words


def _direction(fast: NDArray[np.float64], slow: NDArray[np.float64]) -> int:
    """−1 where the longer chain falls in its last doubling, and the other one does not rise any more; otherwise 1."""
    return -1 if _rise(slow) < -_SURE and _rise(fast) < _SURE else 1


def _rise(trace: NDArray[np.float64]) -> float:
    """In the last doubling of a chain's length, in standard errors."""
    before, after = trace[len(trace) // 4 : len(trace) // 2], trace[len(trace) // 2 :]
    error = math.hypot(error_within(before[None]), error_within(after[None]))
    return float(after.mean() - before.mean()) / max(error, 1e-300)


def _share_ahead(excess: NDArray[np.float64], bias: NDArray[np.float64], ahead: float) -> float:
    """The share of bias at `ahead` times the length of a trace, by the power law of its last two quarters."""
    quarters = [slice(len(bias) * k // 4, len(bias) * (k + 1) // 4) for k in (2, 3)]
    before, after = (float(bias[q].mean()) / max(float(excess[q].mean()), 1e-12) for q in quarters)
    power = math.log(after / before) / math.log(7 / 5) if 0 < before < after else 0.0
    return float(after * max(ahead / (7 / 8), 1.0) ** min(power, _STEEPEST))


_STEEPEST = 0.75
"""Power of the number of steps with which bias is taken to grow at most: what is steeper is noise."""
_MOST_DOUBLINGS = 3.0
"""Of its length, that a pilot is taken to need to come as far as another."""
_SURE = 3.0
"""Standard errors of a rise or a fall."""
_CHALLENGER = 100
"""Number of the pilot in another metric, whose seed follows from it."""
_PILOT = 0x9107
"""Sets the pilots' seeds apart from those of all chains."""
