"""What step checks say about step size and mixing."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.chains.step_checks import COLUMNS

# ---- probes ------------------------------------------------------------------------------------------------


class ProbeFigures(NamedTuple):
    """What probes say; NaN where they say nothing.

    Attributes:
        acceptance: mean probability that a Metropolis–Hastings test would accept a step (MALA), with the same
            minibatch at both ends.
        gradient_noise_share: of a step's noise, the share that comes from the minibatch: r/(1 + r), with r the
            variance (ε/2)²p²nβ²·Var(g) over the injected ε·p, averaged over parameters.
        heating: the share of λ̂ that is an artefact of the step size, (ε/8)·E[Σ p·G·nβ·g]/λ̂. In a quadratic well
            stationarity of ‖w − w*‖² gives E[½(w − w*)·∇U] = P/2 + (ε/8)·E[Σ p·G²] for steps with the stochastic
            drift G; each direction gives nβ·L its share of that. Exact there without minibatches, an upper bound with
            them, and in wells that are flatter than quadratic.
        relaxation_rate: in 1/step, of the stiff directions that make up λ̂: ε/2·(tr(H²)/tr(H) + γ), H the Hessian of
            nβ·L in the sampler's metric.
        distance: ‖w − w*‖ of each chain at its last probe.
        growth: of the chains' mean ‖w − w*‖² from the first probe to the last, as a factor.
    """

    acceptance: float
    gradient_noise_share: float
    heating: float
    relaxation_rate: float
    distance: list[float]
    growth: float


def probe_figures(
    probes: NDArray[np.float64],
    *,
    llc: float,
    lr: float,
    num_parameters: int,
    localization: float = 0.0,
    friction: float = 1.0,
) -> ProbeFigures:
    """Figures of the probes ``[chain, probe, column]`` of the chains that λ̂ comes from.

    Args:
        probes: see ``llc_fast.probes.COLUMNS``.
        llc: λ̂.
        lr: ε.
        num_parameters: P.
        localization: γ, where the metric is 1; in others it pulls each direction differently, and is left out.
        friction: of a sampler with momentum, whose steps inject ε·friction.
    """
    columns = {name: probes[:, :, k] for k, name in enumerate(COLUMNS)}
    mean = {name: _mean(values) for name, values in columns.items()}
    ratio = lr / 4 * mean["gradient_noise"] / num_parameters / friction
    curvature = mean["curvature"]
    accepted = np.exp(np.minimum(columns["log_acceptance"], 0.0))
    distances = columns["distance"]
    done = distances[:, np.isfinite(distances).all(axis=0)] if len(distances) else distances[:, :0]
    last = done[:, -1].tolist() if done.shape[1] else []
    first = float(done[:, 0].mean()) if last else 0.0
    return ProbeFigures(
        acceptance=_mean(accepted),
        gradient_noise_share=ratio / (1 + ratio),
        heating=lr / 8 * mean["heat"] / llc if llc > 0 else math.nan,
        relaxation_rate=lr / 2 * (mean["squared_curvature"] / curvature + localization) if curvature > 0 else math.nan,
        distance=[math.sqrt(d) for d in last],
        growth=sum(last) / len(last) / first if first > 0 else math.nan,
    )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
