"""The specification: every rule and the noise in plain PyTorch.

Slow, obvious, and able to run in float64 on any device. The tests hold the native kernels against it, and
:mod:`llc_fast.kernels.native` falls back to it on devices that have no native backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llc_fast.kernels.step import SUMS, NoiseKey, StepScalars
from llc_fast.kernels.streams import MINIBATCH_STREAM

PHILOX_ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


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


_FEISTEL_ROUNDS, _FEISTEL_MIN_BITS = 6, 8


def _murmur(x: Tensor, key: Tensor) -> Tensor:
    """Murmur3's finalizer of 32-bit words held as int64."""
    x = ((x ^ key) * 0x9E3779B1) & _LOW
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def minibatch_indices(num_samples: int, batch_size: int, num_chains: int, key: NoiseKey) -> Tensor:
    """The samples of each chain's minibatch at step ``key.step``, int64 ``[num_chains, batch_size]``.

    The order of an epoch of n // batch_size steps is a Feistel network on the smallest power of two above n, applied
    again to whatever lies beyond n (Black & Rogaway 2002).
    """
    epoch, place = divmod(key.step, num_samples // batch_size)
    bits = max(_FEISTEL_MIN_BITS, (num_samples - 1).bit_length())
    right_bits = bits // 2
    left_mask, right_mask = (1 << bits - right_bits) - 1, (1 << right_bits) - 1

    def once(x: Tensor, keys: Tensor) -> Tensor:
        left, right = x >> right_bits, x & right_mask
        for k in range(0, _FEISTEL_ROUNDS, 2):
            left = left ^ (_murmur(right, keys[k]) & left_mask)
            right = right ^ (_murmur(left, keys[k + 1]) & right_mask)
        return left << right_bits | right

    rows = []
    for chain in range(num_chains):
        words = philox(torch.arange(2), NoiseKey(key.seed, epoch, key.chain + chain, MINIBATCH_STREAM))
        keys = torch.stack(words, dim=1).reshape(-1)
        x = once(torch.arange(place * batch_size, (place + 1) * batch_size), keys)
        while (beyond := x >= num_samples).any():
            x = torch.where(beyond, once(x, keys), x)
        rows.append(x)
    return torch.stack(rows)


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


@dataclass
class Coordinates:
    """What a rule works on: tensors of one shape and dtype. It changes the fields from `preconditioner` on.

    Attributes:
        grad: gradient of the mean minibatch loss.
        reference: w*.
        noise: standard normals ξ.
        thermostat: of the chain, for SGNHT.
        preconditioner: p; given to the rule that takes one, set by the other first-order rules.
        w: parameters.
        state: what the rule keeps between steps, see its docstring.
        bias: q of the rule: nβ·Σg·q is the bias of nβ·L that comes from step size and gradient noise.
        measure: what squared distances are multiplied by: 1/p where the localization is in the metric.
    """

    grad: Tensor
    reference: Tensor
    noise: Tensor
    w: Tensor
    thermostat: Tensor | float = 0.0
    preconditioner: Tensor | float = 1.0
    state: list[Tensor] = field(default_factory=list)
    bias: Tensor | float = 0.0
    measure: Tensor | float = 1.0


def _drift(x: Coordinates, grad: Tensor, s: StepScalars) -> Tensor:
    """∇ of the localized tempered potential: nβ·g + γ(w − w*) + μ·w."""
    return s.nbeta * grad + s.localization * (x.w - x.reference) + s.weight_decay * x.w


def _clamp_to_box(w: Tensor, reference: Tensor, s: StepScalars) -> Tensor:
    """Elementwise projection onto \\|w − w*\\| ≤ b."""
    return w if math.isinf(s.bounding_box) else w.clamp(reference - s.bounding_box, reference + s.bounding_box)


def _langevin(x: Coordinates, grad: Tensor, p: Tensor | float, s: StepScalars) -> None:
    """w ← w − (ε/2)·p·drift + σ·√(ε p)·ξ, then the box."""
    drift = _drift(x, grad, s)
    x.preconditioner, x.bias = p, s.lr / 8 * p * drift
    moved = x.w - 0.5 * s.lr * p * drift + s.noise_level * math.sqrt(s.lr) * p**0.5 * x.noise
    x.w = _clamp_to_box(moved, x.reference, s)


def _adapt(mean: Tensor, grad: Tensor, s: StepScalars, step: int) -> Tensor:
    return s.decay * mean + (1 - s.decay) * grad**2 if step < s.adapt_steps else mean


def _move_with_momentum(x: Coordinates, momentum: Tensor, s: StepScalars) -> None:
    """w ← w + v; where the box ends, w stays on it and v turns back."""
    w = x.w + momentum
    x.w = _clamp_to_box(w, x.reference, s)
    x.state[0] = torch.where((w - x.reference).abs() > s.bounding_box, -momentum, momentum)


def sgld(x: Coordinates, s: StepScalars, step: int) -> None:
    """SGLD (Welling & Teh 2011, localized as in Lau et al. 2023): p = 1."""
    _langevin(x, x.grad, 1.0, s)


def preconditioned_sgld(x: Coordinates, s: StepScalars, step: int) -> None:
    """SGLD in a fixed diagonal metric: p is given. Localization in that metric pulls each element by γ/p."""
    if s.in_metric:
        x.measure = 1 / x.preconditioner
        s = s._replace(localization=s.localization / x.preconditioner)  # type: ignore[arg-type]
    _langevin(x, x.grad, x.preconditioner, s)


def rmsprop_sgld(x: Coordinates, s: StepScalars, step: int) -> None:
    """RMSprop-SGLD (Li et al. 2016): V ← αV + (1 − α)g² (state 0), p = 1/(√V + eps)."""
    x.state[0] = _adapt(x.state[0], x.grad, s, step)
    _langevin(x, x.grad, 1 / (x.state[0].sqrt() + s.eps), s)


def adam_sgld(x: Coordinates, s: StepScalars, step: int) -> None:
    """Adam-SGLD: RMSprop's metric, and m ← β₁m + (1 − β₁)g (state 1) for the gradient, both bias-corrected."""
    x.state[0] = _adapt(x.state[0], x.grad, s, step)
    x.state[1] = s.momentum_decay * x.state[1] + (1 - s.momentum_decay) * x.grad
    squares = x.state[0] / (1 - s.decay ** min(step + 1, s.adapt_steps))
    _langevin(x, x.state[1] / (1 - s.momentum_decay ** (step + 1)), 1 / (squares.sqrt() + s.eps), s)


def sghmc(x: Coordinates, s: StepScalars, step: int) -> None:
    """SGHMC (Chen et al. 2014, eq. 15, η = ε/2): v ← (1 − α)v − (ε/2)·drift + σ√(εα)·ξ (state 0), w ← w + v."""
    drift = _drift(x, x.grad, s)
    x.bias = (s.lr / 8 * drift - (1 - s.friction) / 2 * x.state[0]) / s.friction
    noise = s.noise_level * math.sqrt(s.lr * s.friction) * x.noise
    _move_with_momentum(x, (1 - s.friction) * x.state[0] - 0.5 * s.lr * drift + noise, s)


def sgnht(x: Coordinates, s: StepScalars, step: int) -> None:
    """SGNHT (Ding et al. 2014, devinterp's units): v ← v − ε·drift − ζv + σ√(2Aε)·ξ (state 0), w ← w + v.

    ζ is the chain's thermostat; whoever drives the chain moves it by mean(v²) − ε after the step.
    """
    drift = _drift(x, x.grad, s)
    noise = s.noise_level * math.sqrt(2 * s.friction * s.lr) * x.noise
    _move_with_momentum(x, (1 - x.thermostat) * x.state[0] - s.lr * drift + noise, s)


RULES: dict[str, Callable[[Coordinates, StepScalars, int], None]] = {
    "sgld": sgld,
    "preconditioned-sgld": preconditioned_sgld,
    "rmsprop-sgld": rmsprop_sgld,
    "adam-sgld": adam_sgld,
    "sghmc": sghmc,
    "sgnht": sgnht,
}
"""Every rule by name; the native module knows the same ones."""


def apply(rule: str, x: Coordinates, s: StepScalars, step: int) -> Tensor:
    """Run one rule on `x` and return all sums of `SUMS`, float64 ``[len(SUMS)]``."""
    before = x.w
    RULES[rule](x, s, step)
    terms = {
        "grad": x.grad**2,
        "distance": (before - x.reference) ** 2 * x.measure,
        "weight": x.w**2,
        "noise": x.noise**2,
        "momentum": x.state[0] ** 2 if x.state else torch.zeros_like(x.w),
        "bias": x.grad * x.bias,
    }
    return torch.stack([terms[name].double().sum() for name in SUMS])
