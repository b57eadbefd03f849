"""Metropolis-adjusted samplers; :mod:`llc_fast.chains.metropolis` has their transitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llc_fast.kernels.step import StepScalars
from llc_fast.samplers.base import Kind, Metric, Sampler
from llc_fast.samplers.langevin import check_preconditioner, checked_localization_metric
from llc_fast.samplers.registry import register
from llc_fast.support.arguments import check_decay, check_integer, check_number


@dataclass(frozen=True)
class MetropolisSampler(Sampler):
    """What MALA and HMC have in common; see ``llc_fast.chains.metropolis.Metropolis`` for what they do.

    Attributes:
        preconditioner: A, as for preconditioned SGLD; momenta have covariance 1/A.
        localization_metric: as for preconditioned SGLD.
        adapt_steps: transitions, the first ones, that each chain uses to find its own ε, starting from `lr`; 0 or None:
            ε stays `lr`. `estimate_llc` replaces None by the length of burn-in if ``lr=None``.
        target_acceptance: the mean acceptance probability that adaptation aims at.
        noise_level: 1; nothing else leaves the posterior invariant.
        bounding_box_size: proposals out of the box are rejected, so the posterior is cut off there, not clamped.
    """

    kind: ClassVar[Kind] = "metropolis"
    metric: ClassVar[Metric] = "given"
    has_optimizer: ClassVar[bool] = False
    traces: ClassVar[tuple[str, ...]] = ("acceptance", "lr", "squared_distance")

    preconditioner: Any = 1.0
    adapt_steps: int | None = None
    target_acceptance: float = 0.574
    localization_metric: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self.preconditioner)
        object.__setattr__(
            self, "localization_metric", checked_localization_metric(self.localization_metric, self.preconditioner)
        )
        if self.adapt_steps is not None:
            check_integer("adapt_steps", self.adapt_steps, 0)
        if not 0 < check_number("target_acceptance", self.target_acceptance) < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")
        if self.noise_level != 1:
            raise ValueError(
                f"noise_level must be 1 for sampler={self.name!r}, got {self.noise_level}: the Metropolis test is for "
                "the posterior itself; change nbeta for another temperature"
            )

    @classmethod
    def rule(cls) -> str:
        return "preconditioned-sgld"  # the proposal of MALA; the engine uses its checks and its layout of buffers

    @classmethod
    def bytes_moved(cls, low: bool = False, chains: int = 1) -> float:
        return math.nan  # a transition is no single pass

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(in_metric=float(options.get("localization_metric") == "sampler"))

    def trajectory(self) -> tuple[int, float]:
        """Leapfrog steps of a transition, and how far their length may differ from √ε, as a share of it."""
        return 1, 0.0

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        return 0.0

    @classmethod
    def initial_adaptation(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Each chain's log √ε, its weighted mean, and the mean shortfall of acceptance."""
        log = 0.5 * math.log(options["lr"])
        return {"step_size": torch.tensor([[log, log, 0.0]], dtype=torch.float64, device=device)}


@register
@dataclass(frozen=True)
class MALASampler(MetropolisSampler):
    r"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996) on the whole data set.

    .. math:: w' = w − \tfrac{ε}{2} A ∇U(w) + \sqrt{ε A}\,ξ, \qquad
        \text{accepted with probability } \min\Bigl(1, \frac{e^{−U(w')} q(w | w')}{e^{−U(w)} q(w' | w)}\Bigr)

    with q the density of the proposal: SGLD's step, and exact at any step size. One gradient over all data a draw.
    An acceptance of 0.574 is best in many dimensions (Roberts & Rosenthal 1998).
    """

    name: ClassVar[str] = "mala"


@register
@dataclass(frozen=True)
class HMCSampler(MetropolisSampler):
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) on the whole data set, with step size δ = √ε.

    Momenta are drawn anew for every trajectory of L leapfrog steps. With L = 1 and no jitter it is MALA with the same
    ε. L gradients over all data a draw.

    Attributes:
        num_leapfrog: L ≥ 1.
        jitter: each trajectory's δ is multiplied by a number drawn evenly from 1 ± this, in [0, 1), so that no
            direction is stuck in a period of its own. The draw does not look at the state: what is sampled stays the
            same.
    """

    name: ClassVar[str] = "hmc"

    target_acceptance: float = 0.8
    num_leapfrog: int = 10
    jitter: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_leapfrog", self.num_leapfrog, 1)
        check_decay("jitter", self.jitter)

    def trajectory(self) -> tuple[int, float]:
        return int(self.num_leapfrog), float(self.jitter)
