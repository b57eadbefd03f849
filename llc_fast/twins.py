"""Twin chains: the same random numbers at another nβ or γ, for how λ̂ answers to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llc_fast.chains.group import RunSpec
from llc_fast.chains.run import Monitor, run_chains
from llc_fast.data import mix
from llc_fast.gradients.plan import Plan
from llc_fast.objective.control_variate import ReferenceLosses
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler
from llc_fast.schedule import Schedule
from llc_fast.support.runtime import Stop
from llc_fast.traces import REFERENCE_LOSS

HALF_FACTOR = math.sqrt(2)
"""Twins are at nβ and γ times and over this. The third derivative that a difference over a factor of 2 leaves out is
less than 1 % of the slope in a quadratic direction."""
SHARE, BURNIN_SHARE = 1 / 4, 3 / 4
"""Steps of each of the four twins, over those of the chains, and the part of them that is burn-in: twins are together
when they start, and it takes them a relaxation time of each direction to move apart."""
_LEAST_STEPS = 64
_TWINS = 0x7317
"""Sets the twins' seeds apart from those of the chains, whose ends they start from."""
Array = NDArray[np.float64]


def twin_schedule(num_steps: int) -> Schedule:
    """Of each twin: a part of the chains', three quarters of it burn-in, and every step a draw."""
    steps = max(_LEAST_STEPS, int(SHARE * num_steps))
    burnin = int(BURNIN_SHARE * steps)
    return Schedule(steps - burnin, burnin)


def twin_traces(
    objective: Objective,
    sampler: Sampler,
    schedule: Schedule,
    plan: Plan,
    at_reference: ReferenceLosses,
    *,
    init_loss: float,
    bias_correction: bool,
    start: Mapping[str, NDArray[Any]],
    seed: int,
    chains: range,
    monitor: Monitor | None = None,
    stop: Stop | None = None,
) -> dict[str, Array] | None:
    """nβ·(L − L(w*)) of the draws of four runs, ``[chain, draw]``: at two γ, and at two nβ and γ with the same nβ/γ.

    Noise and minibatches are functions of (seed, chain, step), and all start where the chains ended: they are the same
    path but for what nβ or γ change. In flat directions, whose distance from w* fluctuates most, they differ by
    something that the loss does not see; so the difference of their losses has little noise.

    Of nβ alone the difference would have much: stiff directions, which make up λ̂, follow their noise at another rate.
    With γ, ε and the place they start from changed as well (γ as nβ, ε as 1/nβ, w − w* as 1/√nβ), a path in a quadratic
    direction is the same one on another scale, nβ·(L − L(w*)) is the same number at every step, and there is no noise.

    Args:
        objective: what is sampled.
        sampler: of the chains, with nβ, γ and ε, which is that of the twins too.
        schedule: of each twin, see :func:`twin_schedule`.
        plan: of the chains.
        at_reference: the losses at w*.
        init_loss: L(w*).
        bias_correction: whether bias is subtracted.
        start: where the chains ended, ``[chain, …]`` by parameter.
        seed: of the estimate.
        chains: those that this process runs.
        monitor: what is asked for other processes.
        stop: ends the runs.

    Returns:
        Arrays by name: ``"together-"``, ``"together+"``, ``"localization-"``, ``"localization+"``, the latter only if γ
        is above 0; None if somebody stopped them.
    """
    assert sampler.nbeta is not None and sampler.lr is not None
    nbeta, gamma, lr = sampler.nbeta, sampler.localization or 0.0, sampler.lr
    found: dict[str, Array] = {}
    for name in ("together", "localization")[: 2 if gamma else 1]:
        for sign, factor in (("-", 1 / HALF_FACTOR), ("+", HALF_FACTOR)):
            if name == "localization":
                twin, place = dataclasses.replace(sampler, localization=gamma * factor), 1.0
            else:
                place = 1 / math.sqrt(factor)
                twin = dataclasses.replace(sampler, nbeta=nbeta * factor, localization=gamma * factor, lr=lr / factor)
            if getattr(twin, "adapt_steps", None):
                twin = dataclasses.replace(twin, adapt_steps=0 if twin.kind == "metropolis" else schedule.num_burnin)  # type: ignore[call-arg]
            spec = RunSpec(
                objective,
                twin,
                schedule,
                plan,
                mix(seed, _TWINS),
                control_variate=at_reference.control_variate(objective.source.batch_size, init_loss),
                evaluates_reference=at_reference.pairing == "draws",
                start={key: (place * offset).astype(offset.dtype) for key, offset in start.items()},
            )
            run = run_chains(spec, chains, monitor=monitor, stop=stop)
            if run.interrupted or (stop is not None and stop.is_set()):
                return None
            assert twin.nbeta is not None
            rows = []
            for traces in run.traces:
                loss = traces.loss[:, schedule.draws]
                reference: Any = init_loss
                if REFERENCE_LOSS in traces.steps:
                    reference = traces.steps[REFERENCE_LOSS][:, schedule.draws]
                excess = twin.nbeta * (loss - reference)
                rows.append(excess - traces.steps["bias"][:, schedule.draws] if bias_correction else excess)
            found[name + sign] = np.concatenate(rows) if rows else np.empty((0, schedule.num_draws))
    return found
