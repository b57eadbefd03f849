"""The specification: every rule and the noise in plain PyTorch.

Slow, obvious, and able to run in float64 on any device. The tests hold the native kernels against it, and
:mod:`llc_fast.update` falls back to it on devices that have no native backend.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


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
    """The hyperparameters of one step.

    Attributes:
        lr: step size ε.
        nbeta: inverse temperature nβ of the mean loss.
        localization: γ, the pull towards the anchor w*.
        weight_decay: μ, the pull towards zero.
        noise_level: σ; 1 samples the posterior.
        bounding_box: b in \\|w − w*\\| ≤ b, elementwise; infinity means no box.
    """

    lr: float
    nbeta: float
    localization: float = 0.0
    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box: float = math.inf


def philox(counter: Tensor, key: NoiseKey) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) of int64 counters: four words in [0, 2³²) each, as int64."""
    c0 = counter & _LOW
    c1 = torch.full_like(counter, key.step & _LOW)
    c2 = torch.full_like(counter, key.chain)
    c3 = ((counter >> 32) & 0xFFFF) | ((key.step >> 32 & 0xFF) << 16) | (key.stream << 24)
    k0, k1 = key.seed & _LOW, key.seed >> 32 & _LOW
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2⁶⁴, which leaves the bits of the unsigned product.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = (p1 >> 32 & _LOW) ^ c1 ^ k0, (p0 >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _box_muller(radius_word: Tensor, angle_word: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two words → two independent standard normals.

    The uniform is (x | 1)/2³²: midpoints of 2³¹ cells, never 0 or 1. Near 1 it would round to 1 in float32, so
    its logarithm is taken as log1p(−(2³² − x)/2³²) there.
    """
    x = radius_word | 1
    low = torch.log(x.to(dtype) * 2.0**-32)
    high = torch.log1p(-(2**32 - x).to(dtype) * 2.0**-32)
    radius = torch.sqrt(-2 * torch.where(x < 2**31, low, high))
    # The low 31 bits, as a signed number, are an angle in [−π/2, π/2); the top bit is the sign of the cosine.
    angle_bits = angle_word & 0x7FFFFFFF
    angle_bits = torch.where(angle_bits < 2**30, angle_bits, angle_bits - 2**31)
    angle = angle_bits.to(dtype) * (math.pi / 2**31)
    cosine = torch.where(angle_word < 2**31, torch.cos(angle), -torch.cos(angle))
    return radius * cosine, radius * torch.sin(angle)


def normals(
    begin: int,
    length: int,
    key: NoiseKey,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals of the flat elements ``begin … begin + length − 1``, shape ``[length]``.

    Element i takes word i mod 4 of the Philox counter i // 4; words (0, 1) and (2, 3) pass through Box–Muller.
    """
    counters = torch.arange(begin // 4, (begin + length + 3) // 4, dtype=torch.int64, device=device)
    w0, w1, w2, w3 = philox(counters, key)
    z = torch.stack([*_box_muller(w0, w1, dtype), *_box_muller(w2, w3, dtype)], dim=1).reshape(-1)
    start = begin - 4 * (begin // 4)
    return z[start : start + length]


def drift(w: Tensor, grad: Tensor, anchor: Tensor, s: StepScalars) -> Tensor:
    """∇ of the localized tempered potential: nβ·g + γ(w − w*) + μ·w."""
    return s.nbeta * grad + s.localization * (w - anchor) + s.weight_decay * w


def clamp_to_box(w: Tensor, anchor: Tensor, s: StepScalars) -> Tensor:
    """Elementwise projection onto \\|w − w*\\| ≤ b."""
    return w if math.isinf(s.bounding_box) else w.clamp(anchor - s.bounding_box, anchor + s.bounding_box)


def sgld(w: Tensor, grad: Tensor, anchor: Tensor, noise: Tensor, s: StepScalars) -> Tensor:
    """One step of SGLD (Welling & Teh 2011, localized as in Lau et al. 2023); returns the new w.

    w ← w − (ε/2)·drift + σ√ε·ξ
    """
    increment = -0.5 * s.lr * drift(w, grad, anchor, s) + s.noise_level * math.sqrt(s.lr) * noise
    return clamp_to_box(w + increment, anchor, s)
