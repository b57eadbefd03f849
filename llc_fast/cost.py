"""What a run is about to cost, in gradients and in time, and what a default one may."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import torch

from llc_fast.calibration import num_pilot_steps
from llc_fast.gradients.plan import LARGE_MODEL
from llc_fast.objective.objective import Objective
from llc_fast.schedule import Schedule
from llc_fast.settings import DEFAULT_NUM_DRAWS, PILOT_SHARE, Settings

AFFORDABLE_SECONDS = 600.0
"""What a run with default length and default minibatches takes at most, at the nominal speed."""
_NOMINAL_SPEED = {"cpu": 2e10, "cuda": 1e13}
"""Floating-point operations in a second, of a core or two and of a small part of a GPU. Nominal, because a clock would
choose otherwise on another day, and equal seeds give equal results."""
LEAST_BATCH, LEAST_DRAWS = 32, 200
"""What is not made smaller."""
LEAST_PASSES, _REFINING_SHARE = 20, 0.25
"""Passes over the data for a better minimum at most: at least so many, and as a share of the run's gradients."""
_WORTH_SAYING = 10.0
"""Seconds above which a run is announced."""


def num_gradients(settings: Settings, schedule: Schedule | None = None) -> int:
    """Gradients of a run of that length, with those of its pilot chains and of a metric that is estimated.

    None: of the length that costs are measured by.
    """
    steps = (schedule or settings.schedule).num_steps
    beside = num_pilot_steps(settings) + settings.metric_gradients
    return settings.num_chains * steps * settings.gradients_per_step + beside


def refining_passes(settings: Settings, objective: Objective) -> int:
    """Passes over the data that ``refine=`` may take: those given, or those of a quarter of the run's gradients, but
    `LEAST_PASSES` at least; 0 where the data have no end."""
    if not settings.refine or (pieces := objective.source.sampling.num_batches) is None:
        return 0
    if settings.refine is not True:
        return settings.refine
    return max(LEAST_PASSES, int(_REFINING_SHARE * settings.num_chains * settings.schedule.num_steps / max(pieces, 1)))


def affordable_batch(settings: Settings, flops_per_sample: float, batch_size: int, device: torch.device) -> int:
    """The default minibatch, halved until the run is affordable, but not below `LEAST_BATCH`."""
    size, most = batch_size, _affordable_flops(device) / num_gradients(settings)
    while size > LEAST_BATCH and most < flops_per_sample * size < math.inf:
        size = max(LEAST_BATCH, size // 2)
    return size


def affordable_length(settings: Settings, flops: float, device: torch.device, num_parameters: int) -> Settings:
    """With a budget, if nobody gave a length or a budget and gradients of so many operations need it.

    Chains of large models, which are not all in memory at once, do not go on by need: they get a length.
    """
    limits = (settings.max_gradients, settings.max_seconds)
    if not settings.by_need or any(limit is not None for limit in limits):
        return settings
    between, least = settings.num_steps_bw_draws, LEAST_DRAWS
    affordable = _affordable_flops(device) / max(flops, 1.0)
    if num_parameters > LARGE_MODEL and settings.target_error is None:
        share = affordable / num_gradients(settings)
        draws = max(least, int(DEFAULT_NUM_DRAWS * share / 10) * 10) if 0 < share < 1 else DEFAULT_NUM_DRAWS
        return dataclasses.replace(settings, num_draws=draws, num_burnin=draws * between)
    if not 0 < affordable < num_gradients(settings, settings.longest):
        return settings
    least_gradients = settings.num_chains * settings.gradients_per_step * 2 * least * between
    if settings.has_pilots:
        least_gradients = math.ceil(least_gradients * (1 + PILOT_SHARE))
    return dataclasses.replace(settings, max_gradients=int(max(affordable, least_gradients)))


def _affordable_flops(device: torch.device) -> float:
    return AFFORDABLE_SECONDS * _NOMINAL_SPEED.get(device.type, _NOMINAL_SPEED["cuda"])


def seconds_of_gradient(objective: Objective, seed: int) -> float:
    """What the gradient of one minibatch takes, read and differentiated as a plain loop would; generators are kept."""
    with objective.generators.kept():
        batches = itertools.islice(objective.source.minibatches(seed), 2)
        next(batches, None)  # starts a loader's workers
        began = time.perf_counter()
        for batch in batches:
            objective.gradient_at(objective.reference, batch, lambda name, grad: None)
        if objective.device.type == "cuda":
            torch.cuda.synchronize(objective.device)
        return time.perf_counter() - began


def announcement(settings: Settings, objective: Objective, seconds: float, shortened: str) -> str:
    """A line that says what is about to happen; empty if it is over soon.

    Args:
        settings, objective: of the run.
        seconds: that a gradient takes.
        shortened: what was made smaller than the defaults, in words.
    """
    count, pilots = num_gradients(settings, settings.longest), num_pilot_steps(settings)
    passes = refining_passes(settings, objective)
    refining = passes and passes * (objective.source.sampling.num_batches or 0)
    count += refining
    if count * seconds < _WORTH_SAYING:
        return ""
    size = objective.source.batch_size
    samples = "" if size is None else f" on {size} samples each"
    calibration = f", {pilots} of them in calibration" if pilots else ""
    calibration += f", {refining} at most for a better minimum" if refining else ""
    smaller = f" (shortened to {shortened})" if shortened else ""
    most = "up to " if settings.by_need else ""
    seconds = min(count * seconds, settings.max_seconds or math.inf)
    return f"{most}{count} gradients{samples}{calibration}{smaller}: at most about {_in_words(seconds)}"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
