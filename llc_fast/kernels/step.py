"""What a step is given and what it can sum up: the Python side of ``csrc/step.h`` and ``csrc/langevin.h``.

When :mod:`llc_fast.kernels.native` is imported, it compares these names and layouts with those of the compiled module.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class NoiseKey(NamedTuple):
    """Names random numbers, apart from their elements: equal keys give equal noise.

    Attributes:
        seed: 64 bits, one per run.
        step: 40 bits, counts the updates.
        chain: 32 bits.
        stream: 8 bits, separates kinds of random numbers; 0 is Langevin noise.
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
        localization: γ, the pull towards the reference point w*.
        weight_decay: μ, the pull towards zero.
        noise_level: σ; 1 samples the posterior.
        bounding_box: b in \\|w − w*\\| ≤ b, elementwise; infinity means no box.
        decay: α, of the running mean of squared gradients.
        momentum_decay: β₁, of the running mean of gradients.
        eps: added to the root of the mean squared gradient.
        friction: SGHMC's α; SGNHT's diffusion factor A.
        adapt_steps: steps whose gradients enter the running mean of squares; later ones leave it as it is.
        in_metric: 1: localization is (γ/2)·(w − w*)ᵀA⁻¹(w − w*) in the rule that is given A, and so are distances; 0:
            both are Euclidean.
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
    in_metric: float = 0.0


SUMS = ("grad", "distance", "weight", "noise", "momentum", "bias")
"""The sums over all elements of a chain that a step can take.

- grad: Σg²;
- distance: Σ(w − w*)², before the step; Σ(w − w*)²/A where the localization is in the metric;
- weight: Σw², after it;
- noise: Σξ²;
- momentum: Σv² after it, v the rule's first state (a momentum in SGHMC and SGNHT);
- bias: Σg·q, with q from the rule (:class:`llc_fast.kernels.reference.Coordinates`).
"""

# Tables that cross the native boundary. Addresses are int64.
SCALARS = np.dtype([(name, "f8") for name in StepScalars._fields])
"""``llc::Scalars``: a `StepScalars`."""
SEGMENT = np.dtype(
    [
        ("offset", "i8"),
        ("length", "i8"),
        ("w", "i8"),
        ("stride", "i8"),
        ("grad", "i8"),
        ("grad_stride", "i8"),
        ("reference", "i8"),
        ("reference_stride", "i8"),
        ("mask", "i8"),
        ("state", "i8", 2),
        ("preconditioner", "i8"),
        ("preconditioner_scale", "f8"),
        ("copy", "i8"),
    ]
)
"""``llc::Segment``: a contiguous run of parameters, present in every chain."""
