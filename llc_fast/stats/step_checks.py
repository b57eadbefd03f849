"""What step checks show about step size, mixing and distance from w*."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("distance", "log_acceptance", "gradient_noise", "curvature", "squared_curvature", "rise", "work")
"""What a step check at w measures (G = nβ·g + γ(w − w*) + μ·w, g the gradient on a minibatch, p the preconditioner):

- distance: ‖w − w*‖² over the parameters that are sampled;
- log_acceptance: the logarithm of the Metropolis–Hastings ratio of one Langevin step, the same minibatch at both ends;
- gradient_noise: nβ²·Σ p·Var(g) over minibatches;
- curvature, squared_curvature: d·H·d and Σ p·(H·d)², d that Langevin step and H the Hessian of nβ·L;
- rise, work: what nβ·L rises by along d, and the same by the gradients at both ends, nβ·d·(g + g')/2; where rounding
  does not hide it.

NaN: not measured.
"""


class StepCheckStatistics(NamedTuple):
    """Statistics of step checks; NaN for what was not measured.

    Attributes:
        acceptance: mean probability that a Metropolis–Hastings test would accept a step (MALA), with the same
            minibatch at both ends.
        gradient_noise_share: the share of a step's noise that comes from the minibatch: r/(1 + r), with r the
            variance (ε/2)²p²nβ²·Var(g) over that of the injected noise, averaged over parameters.
        relaxation_rate: of the stiff directions that make up λ̂, in 1/step: ε/2·(tr(H²)/tr(H) + γ), H the Hessian of
            nβ·L in the sampler's metric.
        gradient_error: the difference between what the loss rises by along steps and what its gradients say, relative
            to these, in the root mean square.
        distance: ‖w − w*‖ of each chain at its last step check.
        distance_growth: of the chains' mean ‖w − w*‖² from the first step check to the last, as a factor.
    """

    acceptance: float
    gradient_noise_share: float
    relaxation_rate: float
    gradient_error: float
    distance: list[float]
    distance_growth: float


def step_check_statistics(
    step_checks: NDArray[np.float64],
    *,
    lr: float,
    num_parameters: int,
    localization: float = 0.0,
    injected_noise: float = 1.0,
) -> StepCheckStatistics:
    """Statistics of the step checks of the chains that λ̂ comes from.

    Args:
        step_checks: float64 ``[chain, check, column]``, see :data:`COLUMNS`.
        lr: ε.
        num_parameters: P.
        localization: γ, where it pulls all directions alike in the sampler's metric; otherwise it is left out.
        injected_noise: variance of the noise that a step injects, over ε·p; NaN: unknown.
    """
    columns = {name: step_checks[:, :, k] for k, name in enumerate(COLUMNS)}
    mean = {name: _mean(values) for name, values in columns.items()}
    ratio = lr / 4 * mean["gradient_noise"] / num_parameters / injected_noise
    curvature = mean["curvature"]
    distances = columns["distance"]
    done = distances[:, np.isfinite(distances).all(axis=0)] if len(distances) else distances[:, :0]
    size = _mean(columns["rise"] ** 2 + columns["work"] ** 2) / 2
    last = done[:, -1].tolist() if done.shape[1] else []
    first = float(done[:, 0].mean()) if last else 0.0
    return StepCheckStatistics(
        acceptance=_mean(np.exp(np.minimum(columns["log_acceptance"], 0.0))),
        gradient_noise_share=ratio / (1 + ratio),
        relaxation_rate=lr / 2 * (mean["squared_curvature"] / curvature + localization) if curvature > 0 else math.nan,
        gradient_error=math.sqrt(_mean((columns["rise"] - columns["work"]) ** 2) / size) if size > 0 else math.nan,
        distance=[math.sqrt(d) for d in last],
        distance_growth=sum(last) / len(last) / first if first > 0 else math.nan,
    )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
