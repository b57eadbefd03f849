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
from llc_fast.data import mix
from llc_fast.gradients.plan import Plan, make_plan
from llc_fast.objective.control_variate import ControlVariate, ReferenceLosses
from llc_fast.objective.curvature import descent, in_float32, pilot_metric, top_curvature
from llc_fast.objective.metric import metric_of
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.kronecker import KFACSGLDSampler
from llc_fast.schedule import Schedule
from llc_fast.settings import PILOT_SHARE, Settings
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
TARGET_BIAS_SHARE = 0.1
"""The share of bias in nβ·(L − L(w*)) that pilot chains aim at: small enough for wells that are not quite quadratic."""
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
        restarts: how often most chains diverged on the way, and all began again with a quarter of ε.
        is_interrupted: whether somebody stopped the pilot chains: this is what they had found by then.
        refined: what :func:`llc_fast.objective.refinement.refine` has done; None: w* is the model's.
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
    restarts: int = 0
    is_interrupted: bool = False
    refined: dict[str, Any] | None = None


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
        return pilot.run(stop)


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
    """Pilot chains: lower ε until bias is a tenth of nβ·(L − L(w*)), each chain from w* and longer than the one before.

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

    def run(self, stop: Stop | None = None) -> Chosen:
        """The step size and friction that the pilots end with, or have found when `stop` is set.

        Raises:
            ValueError: all chains diverged.
        """
        nbeta, most = self.chosen.nbeta, self.chosen.lr
        lr, friction, share = most, 1.0, math.nan
        stage, attempt, spent = 0, 0, 0
        while stage < len(_STAGES) and spent < self.num_steps:
            last = stage == len(_STAGES) - 1
            length = max(16, int(_STAGES[stage] * self.num_steps))
            loss, bias = self._chain(lr, friction, length, attempt, stop)
            if stop is not None and stop.is_set():
                length = int(np.isfinite(loss).sum())
                return dataclasses.replace(
                    self.chosen,
                    lr=lr,
                    friction=friction,
                    pilot_steps=spent + length,
                    pilot_bias_share=share,
                    is_interrupted=True,
                )
            attempt += 1
            spent += min(length, int(np.isfinite(loss).sum()) + DIVERGED_AFTER)
            excess = nbeta * (loss - self.chosen.init_loss)
            late = slice(length // 2, None)
            if np.isfinite(excess).all() and np.isfinite(bias).all():
                stage += 1
                found, added = float(excess[late].mean()), float(bias[late].mean())
                if found <= 0:  # w* is no minimum: no reason to blame the step size
                    continue
                share = added / found
                if last:  # what no pilot has tried is not used
                    ahead = self.num_steps / (PILOT_SHARE * self.settings.num_chains * length)
                    change = min(2 * TARGET_BIAS_SHARE / max(_share_ahead(excess, bias, ahead), 1e-12), 1.0)
                else:  # what grows stops at half of the goal
                    change = TARGET_BIAS_SHARE / max(share, 1e-12)
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
        return dataclasses.replace(
            self.chosen,
            lr=lr,
            friction=friction,
            pilot_steps=spent,
            pilot_bias_share=share,
        )

    def _chain(
        self, lr: float, friction: float, length: int, attempt: int, stop: Stop | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Losses and bias of one chain from w*."""
        sampler = self.settings.complete_sampler(lr, self.chosen.nbeta, friction=friction)
        if sampler.metric in (
            "adaptive",
            "kronecker",
        ):  # half of the pilot to learn the metric, the other half to see what it does
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


def _share_ahead(excess: NDArray[np.float64], bias: NDArray[np.float64], ahead: float) -> float:
    """The share of bias at `ahead` times the length of a trace, by the power law of its last two quarters."""
    quarters = [slice(len(bias) * k // 4, len(bias) * (k + 1) // 4) for k in (2, 3)]
    before, after = (float(bias[q].mean()) / max(float(excess[q].mean()), 1e-12) for q in quarters)
    power = math.log(after / before) / math.log(7 / 5) if 0 < before < after else 0.0
    return float(after * max(ahead / (7 / 8), 1.0) ** min(power, _STEEPEST))


_STEEPEST = 0.75
"""Power of the number of steps with which bias is taken to grow at most: what is steeper is noise."""
_PILOT = 0x9107
"""Sets the pilots' seeds apart from those of all chains."""
