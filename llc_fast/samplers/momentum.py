"""Samplers with momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llc_fast.kernels.native import normals
from llc_fast.kernels.step import SUMS, NoiseKey, StepScalars
from llc_fast.kernels.streams import MOMENTUM_STREAM
from llc_fast.samplers.base import Kind, Metric, Sampler
from llc_fast.samplers.registry import register
from llc_fast.support.arguments import check_number


@register
@dataclass(frozen=True)
class SGHMCSampler(Sampler):
    r"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin 2014, eq. 15, with their η = ε/2).

    .. math:: v ← (1 − α)\,v − \tfrac{ε}{2}\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε α}\,ξ, \qquad w ← w + v

    With α = 1 it is SGLD with the same ε; smaller α keeps momentum for about 1/α steps and crosses flat directions
    faster. The noise of the gradients is not estimated (their B̂ = 0). The start is v = 0.

    Its bias is Σ nβg·((ε/8)·G − (1 − α)·v/2)/α with v the momentum before the step: a·E[w²] = (2 − α)·E[v²]/ε from
    E[w·v] = E[v²]/2 in a stationary chain, and what is above 1 there follows from the balance of v², both linear in G.

    Attributes:
        momentum_decay: the friction α, in (0, 1].
    """

    name: ClassVar[str] = "sghmc"
    kind: ClassVar[Kind] = "momentum"
    metric: ClassVar[Metric] = "identity"
    supports_bias_correction: ClassVar[bool] = True
    traces: ClassVar[tuple[str, ...]] = ("bias", "squared_distance")

    momentum_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < check_number("momentum_decay", self.momentum_decay) <= 1:
            raise ValueError(f"momentum_decay must be in (0, 1], got {self.momentum_decay}")

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        return 0.0  # the drift is that at w; what is averaged is its effect

    @classmethod
    def injected_noise(cls, options: Mapping[str, Any]) -> float:
        return float(options["momentum_decay"])

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(friction=float(options["momentum_decay"]))


@register
@dataclass(frozen=True)
class SGNHTSampler(Sampler):
    r"""Stochastic gradient Nosé-Hoover thermostat (Ding et al. 2014), in devinterp's units.

    .. math:: v ← v − ε\,[nβ\,g + γ(w − w^*) + μ\,w] − ζ v + σ\sqrt{2 A ε}\,ξ, \qquad w ← w + v, \qquad
        ζ ← ζ + \overline{v²} − ε

    The friction ζ, one number a chain, absorbs gradient noise of unknown size by holding the kinetic energy at its
    right value; it starts at A, and v at N(0, ε). Note that ε multiplies the whole drift here, not half of it. With a
    friction of ζ a step the positions are too cold by a factor 1 − ζ/2 in directions it overdamps: keep A small. There
    is no bias to correct: the thermostat absorbs it.

    Attributes:
        diffusion_factor: A > 0.
    """

    name: ClassVar[str] = "sgnht"
    kind: ClassVar[Kind] = "thermostat"
    metric: ClassVar[Metric] = "identity"

    diffusion_factor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("diffusion_factor", self.diffusion_factor, minimum=0, exclusive=True)

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        return 0.0

    @classmethod
    def feedback_sums(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum",)

    @classmethod
    def adapts_on_host(cls, options: Mapping[str, Any]) -> bool:
        return False  # a tensor with ζ of each chain follows them

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(friction=float(options["diffusion_factor"]))

    @classmethod
    def initial_state(
        cls, w: Tensor, offset: int, options: Mapping[str, Any], seed: int, chain: int = 0
    ) -> list[Tensor]:
        key = NoiseKey(seed, chain=chain, stream=MOMENTUM_STREAM)
        noise = normals(offset, w.numel(), key, dtype=w.dtype, device=w.device)
        return [math.sqrt(options["lr"]) * noise.view(w.shape)]

    @classmethod
    def initial_adaptation(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The thermostat ζ."""
        return {"thermostat": torch.full((1,), options["diffusion_factor"], dtype=torch.float64, device=device)}

    @classmethod
    def follow(
        cls, scalars: StepScalars, adaptation: MutableMapping[str, Any], step: int, sums: Tensor, count: int
    ) -> None:
        adaptation["thermostat"] += sums[:, SUMS.index("momentum")] / max(count, 1) - scalars.lr
