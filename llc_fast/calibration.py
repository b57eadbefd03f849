"""Chooses what the user left open: a step size from short pilot chains, and how long to run.

The step size is limited by two things. Stability, and the discretization of the stiffest direction: ε·(nβ·h_max + γ)
starts at 1. And heat, what step size and minibatch noise together add to the loss, which every step measures exactly
(:meth:`llc_fast.samplers.Sampler.bias`): pilot chains lower ε until it is a tenth. λ̂ is then corrected for it, so that
the step may be many times larger than without, and slow directions are crossed as many times faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llc_fast.chains.group import LOST_AFTER
from llc_fast.chains.run import Monitor, run_chains
from llc_fast.data import mix
from llc_fast.gradients.plan import Plan
from llc_fast.objective.control_variate import Baseline
from llc_fast.objective.curvature import pilot_metric, top_curvature
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler
from llc_fast.schedule import Schedule
from llc_fast.stats.errors import standard_error

STIFFNESS, CORRECTED_STIFFNESS = 0.2, 1.0
"""ε·(nβ·h_max + γ) of a step size chosen without and with a correction for heat.

In a quadratic direction of curvature a, Langevin steps of size ε inflate the variance by 1/(1 − εa/4): at 0.2 by 5 % in
the stiffest direction, at 1 by a third, which the correction takes back; stable is everything below 4.
"""
HEAT = 0.1
"""The share of heat in nβ·(L − L(w*)) that pilot chains aim at: small enough for wells that are not quite quadratic."""
PILOT_SHARE = 0.13
"""Gradients of the pilot chains, of those of all chains."""
_STAGES = (1 / 16, 3 / 16, 3 / 4)
"""Lengths of the pilot chains, as shares of their gradients: the last is four tenths as long as the four chains of a
run, long enough to see what becomes of heat."""
_RELATIVE_ERROR, _RISE = 0.01, 0.05
"""What a default run is made longer for: a larger standard error than this, or a pilot that still rises by as much."""
DEFAULT_NUM_DRAWS, MAX_NUM_DRAWS = 2000, 5000
LEAST_PILOT = 64
"""Gradients below which pilots would tell nothing."""
LEAST_FRICTION = 0.5
"""With less, heat feeds on itself where gradient noise grows with the loss: chains were lost at 0.25."""


def default_lr(
    posterior: Objective,
    sampler: type[Sampler],
    options: Mapping[str, Any],
    *,
    nbeta: float,
    localization: float,
    stiffness: float = STIFFNESS,
    seed: int = 0,
) -> float:
    """ε = `stiffness` / a with a = nβ·h_max + γ·p_max, h_max the largest curvature at w* in the sampler's metric.

    Raises:
        ValueError: the loss has no curvature at w*; the sampler does not say what its step size depends on.
    """
    metric, lag = None, sampler.drift_lag(options)
    if sampler.metric == "unknown" or math.isnan(lag):
        raise ValueError(
            f"lr=None: no step size can be chosen for sampler={sampler.name!r}, which declares no "
            "metric or no drift_lag; pass lr"
        )
    if sampler.metric == "adaptive":
        metric = pilot_metric(posterior, options, seed=seed)
    elif sampler.metric == "given":
        given = options["preconditioner"]
        metric = {name: given[name] if isinstance(given, Mapping) else given for name in posterior.anchor}
    largest = 1.0 if metric is None else max(float(torch.as_tensor(p).max()) for p in metric.values())
    stiffest = nbeta * top_curvature(posterior, metric=metric, seed=seed) + localization * largest
    stiffest *= 1 + lag  # a drift that lags behind overshoots by as many steps
    if not 0 < stiffest < math.inf:
        raise ValueError(
            f"lr=None: no step size can be chosen, the curvature of the loss at w* is {stiffest:g}; pass lr"
        )
    return stiffness / stiffest


@dataclass(frozen=True)
class PilotResult:
    """What pilot chains found.

    Attributes:
        lr: ε.
        friction: α of SGHMC; 1, which is SGLD, without momentum.
        heat: its share in nβ·(L − L(w*)) at the end; NaN if no pilot got that far.
        num_draws: draws that a run needs for a standard error of 1 %, burn-in as long as that; 2000 to 5000.
        num_steps: gradients that the pilot chains took.
    """

    lr: float
    friction: float
    heat: float
    num_draws: int
    num_steps: int


def run_pilot(
    posterior: Objective,
    make: Callable[[float, float], Sampler],
    plan: Plan,
    *,
    lr: float,
    least_friction: float,
    nbeta: float,
    init_loss: float,
    baseline: Baseline | None,
    num_chains: int,
    num_steps: int,
    seed: int,
    start: Mapping[str, NDArray[Any]] | None = None,
    monitor: Monitor | None = None,
) -> PilotResult:
    """Lower `lr` until heat is a tenth of nβ·(L − L(w*)), in single chains from w*, each longer than the one before.

    Where there is less heat than that, momentum takes up the slack: the friction α is lowered, which multiplies heat
    and the speed at which flat directions are crossed by 1/α, and does without larger steps. Starting again each time
    makes every stage an experiment of its own. Heat grows where the curvature does on the way, so the last stage is
    judged by what its share of heat will have become at the end of the run, which may be two tenths. Stages whose
    chain is lost are run again with an eighth of ε.

    Args:
        posterior: what is sampled.
        make: the sampler for a step size and a friction; of friction 1, without momentum.
        plan: for a single chain.
        lr: where to begin; never exceeded.
        least_friction: the least that may be used; 1: no momentum.
        nbeta, init_loss: nβ and L(w*).
        baseline: the minibatches' losses at w*, if chains are to be paired with them.
        num_chains: of the run that is being prepared.
        num_steps: gradients to spend; more where chains are lost, at most twice.
        seed: of the run; the pilots' noise and minibatches are their own.
        start: where the chains of the run start, if not at w*, see :func:`llc_fast.chains.run_chains`; pilots start
            where its first one does.
        monitor: told of progress.

    Raises:
        ValueError: all chains were lost.
    """
    share, most, friction = math.nan, lr, 1.0
    corrected: NDArray[np.float64] = np.zeros(0)
    stage, attempt, spent = 0, 0, 0
    while stage < len(_STAGES) and spent < num_steps:
        last = stage == len(_STAGES) - 1
        length = max(16, int(_STAGES[stage] * num_steps))
        sampler = make(lr, friction)
        if sampler.metric == "adaptive":  # half of the pilot to learn the metric, the other half to see what it does
            sampler = dataclasses.replace(sampler, adapt_steps=length // 2)  # type: ignore[call-arg]
        run = run_chains(
            posterior,
            sampler,
            Schedule(length, 0),
            chains=range(1),
            seed=mix(mix(seed, _PILOT), attempt),
            plan=plan,
            baseline=baseline,
            start=start,
            monitor=monitor,
        )
        record, attempt = run.records[0], attempt + 1
        spent += min(length, int(np.isfinite(record.losses).sum()) + LOST_AFTER)
        excess, heat = nbeta * (record.losses[0] - init_loss), record.heats[0]
        late = slice(length // 2, None)
        if np.isfinite(excess).all() and np.isfinite(heat).all():
            stage += 1
            corrected = excess - heat
            found, warmth = float(excess[late].mean()), float(heat[late].mean())
            if found <= 0:  # w* is no minimum: no reason to blame the step size
                continue
            share = warmth / found
            if last:  # what no pilot has tried is not used
                ahead = num_steps / (PILOT_SHARE * num_chains * length)
                change = min(2 * HEAT / max(_share_ahead(excess, heat, ahead), 1e-12), 1.0)
            else:  # what becomes warmer stops at half of the goal
                change = HEAT / max(share, 1e-12)
                change = min(change, max(1.0, change / 2), 2.0)
            change = max(change, 1 / 8)
        else:  # the stage once more
            change = 1 / 8
        # Heat is proportional to ε/α. Momentum goes first when it is too much, and comes last when it is too little.
        wanted = lr / friction * change
        lr = min(most, wanted)
        friction = min(1.0, max(lr / wanted, least_friction))
    if not stage:
        raise ValueError(
            f"lr=None: no step size can be chosen, chains from w* became non-finite down to lr={8 * lr:.2g}; is there "
            "any curvature at w*? pass lr, or a larger localization"
        )
    return PilotResult(lr, friction, share, _length_for(corrected, num_chains), spent)


def _share_ahead(excess: NDArray[np.float64], heat: NDArray[np.float64], ahead: float) -> float:
    """The share of heat at `ahead` times the length of a trace, by the power law of its last two quarters."""
    quarters = [slice(len(heat) * k // 4, len(heat) * (k + 1) // 4) for k in (2, 3)]
    before, after = (float(heat[q].mean()) / max(float(excess[q].mean()), 1e-12) for q in quarters)
    power = math.log(after / before) / math.log(7 / 5) if 0 < before < after else 0.0
    return float(after * max(ahead / (7 / 8), 1.0) ** min(power, _STEEPEST))


_STEEPEST = 0.75
"""Power of the number of steps with which heat is taken to grow at most: what is steeper is noise."""
_PILOT = 0x9107
"""Sets the pilots' seeds apart from those of all chains."""


def _length_for(trace: NDArray[np.float64], num_chains: int) -> int:
    """Draws that give a relative standard error of 1 %, twice as many if the pilot had not yet settled."""
    if len(trace) < 64:
        return DEFAULT_NUM_DRAWS
    late = trace[len(trace) // 2 :]
    before, after = (float(half.mean()) for half in np.array_split(late, 2))
    if after <= 0:
        return DEFAULT_NUM_DRAWS
    error = standard_error(late[None]).value / after
    needed = len(late) * (error / _RELATIVE_ERROR) ** 2 / num_chains
    if after - before > _RISE * after:
        needed = max(needed, 2 * DEFAULT_NUM_DRAWS)
    return int(min(max(needed, DEFAULT_NUM_DRAWS), MAX_NUM_DRAWS))
