"""What a run is about to cost, in gradients and in time, and what a default one may."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import torch

from llc_fast.calibration import num_pilot_steps
from llc_fast.objective.objective import Objective
from llc_fast.samplers.metropolis import MetropolisSampler
from llc_fast.settings import DEFAULT_NUM_DRAWS, Settings

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


def num_gradients(settings: Settings) -> int:
    """Gradients of a run, those of its pilot chains included."""
    template, steps = settings.template, settings.num_chains * settings.schedule.num_steps
    per_step = template.trajectory()[0] if isinstance(template, MetropolisSampler) else 1
    return steps * per_step + num_pilot_steps(settings)


def refining_passes(settings: Settings, objective: Objective) -> int:
    """Passes over the data that ``refine=`` may take: those given, or those of a quarter of the run's gradients, but
    `LEAST_PASSES` at least; 0 where the data have no end."""
    pieces = objective.source.sampling.num_batches
    if not settings.refine or pieces is None:
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


def affordable_length(settings: Settings, flops: float, device: torch.device) -> Settings:
    """With fewer draws, and burn-in as long, if nobody chose how many and gradients of so many operations need it."""
    share = _affordable_flops(device) / max(flops * num_gradients(settings), 1.0)
    is_open = settings.num_draws is None and settings.num_burnin is None
    if not is_open or not 0 < share < 1:
        return settings
    return dataclasses.replace(settings, num_draws=max(LEAST_DRAWS, int(DEFAULT_NUM_DRAWS * share / 10) * 10))


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
    count, pilots = num_gradients(settings), num_pilot_steps(settings)
    refining = refining_passes(settings, objective) * (objective.source.sampling.num_batches or 0)
    count += refining
    if count * seconds < _WORTH_SAYING:
        return ""
    size = objective.source.batch_size
    samples = "" if size is None else f" on {size} samples each"
    calibration = f", {pilots} of them in calibration" if pilots else ""
    calibration += f", {refining} at most for a better minimum" if refining else ""
    smaller = f" (shortened to {shortened})" if shortened else ""
    return f"{count} gradients{samples}{calibration}{smaller}: at most about {_in_words(count * seconds)}"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
