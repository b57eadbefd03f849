"""What a step is given, as ``csrc/step.h`` and ``csrc/langevin.h`` have it."""

from __future__ import annotations

import math
from typing import NamedTuple


class NoiseKey(NamedTuple):
    """What names a draw, apart from the element: equal keys give equal noise.

    Attributes:
        seed: 64 bits, one per run.
        step: 40 bits, counts the updates.
        chain: 32 bits.
        stream: 8 bits, separates kinds of draws; 0 is Langevin noise.
    """

    seed: int
    step: int = 0
    chain: int = 0
    stream: int = 0


class StepScalars(NamedTuple):
    """The hyperparameters of one step; each rule reads those it needs.

    Attributes:
        lr: step size ε.
        nbeta: inverse temperature nβ of the mean loss.
        localization: γ, the pull towards the anchor w*.
        weight_decay: μ, the pull towards zero.
        noise_level: σ; 1 samples the posterior.
        bounding_box: b in \\|w − w*\\| ≤ b, elementwise; infinity means no box.
        decay: α, of the running mean of squared gradients.
        momentum_decay: β₁, of the running mean of gradients.
        eps: added to the root of the mean squared gradient.
        friction: SGHMC's α; SGNHT's diffusion factor A.
        adapt_steps: steps whose gradients enter the running mean of squares; later ones leave it as it is.
    """

    lr: float
    nbeta: float
    localization: float = 0.0
    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box: float = math.inf
    decay: float = 0.0
    momentum_decay: float = 0.0
    eps: float = 0.0
    friction: float = 0.0
    adapt_steps: float = math.inf


METRICS = ("grad", "distance", "weight", "noise", "drift", "drift_noise", "momentum", "heat")
"""What a step can sum up: Σg², Σ(w − w*)² before the step, Σw² after it, Σξ², Σp·drift², Σ√p·drift·ξ, Σv², Σg·q."""
