"""Samplers with momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llc_fast.kernels.native import normals
from llc_fast.kernels.step import NoiseKey, StepScalars
from llc_fast.samplers.base import MOMENTUM_STREAM, Sampler
from llc_fast.support.arguments import check_number


@dataclass(frozen=True)
class SGHMC(Sampler):
    r"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin 2014, eq. 15, with their η = ε/2).

    .. math:: v ← (1 − α)\,v − \tfrac{ε}{2}\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε α}\,ξ, \qquad w ← w + v

    With α = 1 it is SGLD with the same ε; smaller α keeps momentum for about 1/α steps and crosses flat directions
    faster. The noise of the gradients is not estimated (their B̂ = 0). The start is v = 0.

    Its heat is Σ nβg·((ε/8)·G − (1 − α)·v/2)/α with v the momentum before the step: a·E[w²] = (2 − α)·E[v²]/ε from
    E[w·v] = E[v²]/2 in a stationary chain, and what is above 1 there follows from the balance of v², both linear in G.

    Attributes:
        momentum_decay: the friction α, in (0, 1].
    """

    name: ClassVar[str] = "sghmc"

    momentum_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < check_number("momentum_decay", self.momentum_decay) <= 1:
            raise ValueError(f"momentum_decay must be in (0, 1], got {self.momentum_decay}")

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(friction=float(options["momentum_decay"]))


@dataclass(frozen=True)
class SGNHT(Sampler):
    r"""Stochastic gradient Nosé-Hoover thermostat (Ding et al. 2014), in devinterp's units.

    .. math:: v ← v − ε\,[nβ\,g + γ(w − w^*) + μ\,w] − ζ v + σ\sqrt{2 A ε}\,ξ, \qquad w ← w + v, \qquad
        ζ ← ζ + \overline{v²} − ε

    The friction ζ, one number a chain, absorbs gradient noise of unknown size by holding the kinetic energy at its
    right value; it starts at A, and v at N(0, ε). Note that ε multiplies the whole drift here, not half of it. With a
    friction of ζ a step the positions are too cold by a factor 1 − ζ/2 in directions it overdamps: keep A small.

    Attributes:
        diffusion_factor: A > 0.
    """

    name: ClassVar[str] = "sgnht"
    thermostatted: ClassVar[bool] = True
    tells_heat: ClassVar[bool] = False  # the thermostat takes it away

    diffusion_factor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("diffusion_factor", self.diffusion_factor, minimum=0, exclusive=True)

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
