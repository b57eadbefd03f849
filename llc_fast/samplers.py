"""Samplers: a sampler is its hyperparameters, its state and its rule.

The rule itself is written in ``csrc/langevin.h`` and, as the specification, in :mod:`llc_fast.reference`. To add a
sampler, write both and a dataclass here: optimizers, `estimate_llc`, tests and benchmarks find it in `SAMPLERS`.
The Metropolis-adjusted ones, in `ADJUSTED`, move by :mod:`llc_fast.metropolis` instead.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from llc_fast import update
from llc_fast.reference import METRICS, NoiseKey, StepScalars

MOMENTUM_STREAM = 1
"""The stream of the noise that initial momenta are drawn from; Langevin noise is stream 0."""
ACCEPT_STREAM = 3
"""The stream of a Metropolis test and of a trajectory's jitter; minibatches are stream 2."""


def check_number(
    name: str, value: object, *, minimum: float = -math.inf, exclusive: bool = False, infinite: bool = False
) -> float:
    """`value` as a float, or a TypeError/ValueError that names the argument, the value and the remedy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        # Zero-dimensional tensors are welcome: learning rates often are.
        if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
        value = value.item()
    number = float(value)  # type: ignore[arg-type]
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise ValueError(f"{name} must be finite, got {number}")
    if number < minimum or (exclusive and number == minimum):
        relation = "greater than" if exclusive else "at least"
        raise ValueError(f"{name} must be {relation} {minimum:g}, got {number:g}")
    return number


def _check_decay(name: str, value: object) -> None:
    if not 0 <= check_number(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _adaptation(options: Mapping[str, Any], decay: float) -> dict[str, float]:
    """The scalars of a running mean of squared gradients."""
    steps = options["adapt_steps"]
    return {
        "decay": float(decay),
        "eps": float(options["eps"]),
        "adapt_steps": math.inf if steps is None else steps,
    }


def _check_adaptation(eps: object, adapt_steps: object) -> None:
    check_number("eps", eps, minimum=0, exclusive=True)
    if adapt_steps is not None:
        check_number("adapt_steps", adapt_steps, minimum=1)


@dataclass(frozen=True)
class Sampler:
    r"""What all samplers have in common: the localized tempered potential nβ·L(w) + γ/2·‖w − w*‖² + μ/2·‖w‖².

    Attributes:
        lr: step size ε > 0.
        nbeta: inverse temperature nβ > 0 of the mean loss; n / log n is Watanabe's choice.
        localization: γ ≥ 0.
        weight_decay: μ ≥ 0, a Gaussian prior around zero.
        noise_level: σ ≥ 0; anything but 1 no longer samples the posterior.
        bounding_box_size: b > 0, the elementwise bound on \|w − w*\|, or None for no box.

    Raises:
        TypeError, ValueError: a value that is not a number, not finite or out of range.
    """

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False
    """Whether the metric is learned from gradients, and should be frozen before draws are taken."""
    thermostatted: ClassVar[bool] = False
    """Whether each chain has a thermostat, which starts at `diffusion_factor` and follows the kinetic energy."""
    tells_heat: ClassVar[bool] = True
    """Whether :meth:`heat` holds for it."""
    adjusted_by_metropolis: ClassVar[bool] = False
    """Whether proposals are accepted or rejected, by the loss over the whole data set; then there is no optimizer."""

    lr: float
    nbeta: float
    localization: float = 0.0
    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box_size: float | None = None

    def __post_init__(self) -> None:
        check_number("lr", self.lr, minimum=0, exclusive=True)
        check_number("nbeta", self.nbeta, minimum=0, exclusive=True)
        check_number("localization", self.localization, minimum=0)
        check_number("weight_decay", self.weight_decay, minimum=0)
        check_number("noise_level", self.noise_level, minimum=0)
        if self.bounding_box_size is not None:
            check_number("bounding_box_size", self.bounding_box_size, minimum=0, exclusive=True)

    @property
    def rule(self) -> str:
        """The native module's update rule."""
        return self.name

    def needs_anchor(self) -> bool:
        """Whether the rule reads w*."""
        return self.localization != 0 or self.bounding_box_size is not None

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        """One step's scalars from a mapping of hyperparameters: ``vars(sampler)``, an optimizer's group.

        Schedulers change these between steps, so what could make a step silently wrong is checked again here.
        """
        lr, nbeta = float(options["lr"]), float(options["nbeta"])
        localization, decay = float(options["localization"]), float(options["weight_decay"])
        noise, box = float(options["noise_level"]), options["bounding_box_size"]
        scalars = StepScalars(lr, nbeta, localization, decay, noise, math.inf if box is None else float(box))
        # Sums carry NaN and infinity along: two comparisons see all values. This runs at every step.
        if not (min(scalars[:5]) >= 0 and sum(scalars[:5]) < math.inf and scalars.bounding_box > 0):
            raise ValueError(
                f"hyperparameters must be finite and not negative, got lr={lr}, nbeta={nbeta}, "
                f"localization={localization}, weight_decay={decay}, noise_level={noise}, bounding_box_size={box}"
            )
        return scalars

    @classmethod
    def initial_state(
        cls, w: Tensor, offset: int, options: Mapping[str, Any], seed: int, chain: int = 0
    ) -> list[Tensor]:
        """What the rule keeps for parameter `w`, whose first element is `offset` in the noise: zeros to begin with."""
        return [torch.zeros_like(w, memory_format=torch.contiguous_format) for _ in range(update.NUM_STATES[cls.name])]

    # What a sampler feeds back from a step's sums to the next step. `options` are its hyperparameters, `memory` is
    # where the two numbers live: an optimizer's group serves as both.

    @classmethod
    def measures(cls, options: Mapping[str, Any]) -> bool:
        """Whether each step has to be measured."""
        return cls.thermostatted or bool(options.get("relative_eps"))

    @classmethod
    def initial_memory(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        if not cls.thermostatted:
            return {}
        return {"thermostat": torch.full((1,), options["diffusion_factor"], dtype=torch.float64, device=device)}

    @classmethod
    def adjusted(
        cls,
        scalars: StepScalars,
        options: Mapping[str, Any],
        memory: MutableMapping[str, Any],
        step: int,
        grads: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> StepScalars:
        """The scalars with `eps` in units of the gradient's scale, if that is asked for.

        The scale is the root of the mean of V̂ over all elements that may move. That mean follows V's own recursion, so
        the sum of g² that every step leaves behind keeps it up to date; only the first step has to look at the
        gradients before.
        """
        if not options.get("relative_eps"):
            return scalars
        if step == 0 or "mean_square" not in memory:
            moving = [g if m is None else g[m.expand_as(g)] for g, m in zip(grads, masks, strict=True)]
            mean = sum(float(g.double().square().sum()) for g in moving) / sum(g.numel() for g in moving)
            memory["mean_square"] = (1 - scalars.decay) * mean
        mean = memory["mean_square"]
        if cls is AdamSGLD:
            mean = mean / (1 - scalars.decay ** max(1, min(step, scalars.adapt_steps)))
        return scalars._replace(eps=scalars.eps * math.sqrt(mean))

    @classmethod
    def heat(cls, scalars: StepScalars, metrics: Any) -> Any:
        r"""What step size and gradient noise add to nβ·(L − L(w*)): (ε/8)·Σ p·G·nβg, G the drift as the step saw it.

        In a stationary chain ‖w − w*‖² does not grow: in a direction of curvature a = nβh + γ of a quadratic well,
        w' = w − (ε/2)pG + √(εp)ξ says a·E[(w − w*)²] = 1 + (ε/4)·E[pG²]. The posterior has 1 there, and the loss has
        the share nβh/a of half of the rest. That share of G is nβg, so this is exact whatever the step size; only
        minibatch noise in directions that γ holds more than the loss is counted whole. Directions that the loss does
        not see count nothing, wherever the chain is in them.

        Args:
            scalars: of the step.
            metrics: its sums, float64 ``[num_chains, 8]``, a tensor or an array.

        Returns:
            One number for each chain, in units of λ.
        """
        return scalars.nbeta * metrics[:, METRICS.index("heat")]

    @classmethod
    def follow(
        cls, scalars: StepScalars, memory: MutableMapping[str, Any], step: int, metrics: Tensor, count: int
    ) -> None:
        """Move thermostat and gradient scale after a step with these sums over `count` elements."""
        if cls.thermostatted:
            memory["thermostat"] += metrics[:, METRICS.index("momentum")] / max(count, 1) - scalars.lr
        elif "mean_square" in memory and step < scalars.adapt_steps:
            before = memory["mean_square"] if step else 0.0
            seen = float(metrics[0, METRICS.index("grad")]) / max(count, 1)
            memory["mean_square"] = scalars.decay * before + (1 - scalars.decay) * seen


@dataclass(frozen=True)
class SGLD(Sampler):
    r"""Stochastic gradient Langevin dynamics, localized at w*.

    .. math:: w ← w − \tfrac{ε}{2}\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε}\,ξ,\qquad ξ ∼ N(0, 1)

    Its stationary law is the posterior ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²) up to an error of order ε, and a further one
    from the noise of minibatch gradients (Welling & Teh 2011; localization: Lau et al. 2023, arXiv 2308.12108).
    """

    name: ClassVar[str] = "sgld"


@dataclass(frozen=True)
class PreconditionedSGLD(Sampler):
    r"""SGLD in a fixed diagonal metric.

    .. math:: w ← w − \tfrac{ε}{2}\,A\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε A}\,ξ

    A constant A leaves the stationary law as it is and changes only how fast it is reached, so this is as exact as
    SGLD; A = a² on a parameter that was scaled by a makes the chain indifferent to the scaling (Furman & Lau 2024,
    arXiv 2402.03698; Welling & Teh 2011 for the constant preconditioner).

    Attributes:
        preconditioner: A > 0: a number, or a tensor that broadcasts to the parameter, or one of these for each
            parameter (a list in the optimizer, a mapping by name in `estimate_llc`).
    """

    name: ClassVar[str] = "preconditioned-sgld"

    preconditioner: Any = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.preconditioner
        if isinstance(given, Mapping):
            entries = [(f"preconditioner[{k!r}]", v) for k, v in given.items()]
        elif isinstance(given, (list, tuple)):
            entries = [(f"preconditioner[{k}]", v) for k, v in enumerate(given)]
        else:
            entries = [("preconditioner", given)]
        for name, value in entries:
            if isinstance(value, Tensor) and value.ndim:
                if not (value.is_floating_point() and torch.isfinite(value).all() and (value > 0).all()):
                    raise ValueError(f"{name} must hold finite numbers greater than 0")
            else:
                check_number(name, value, minimum=0, exclusive=True)


@dataclass(frozen=True)
class RMSpropSGLD(Sampler):
    r"""SGLD in the metric of RMSprop (Li et al. 2016, arXiv 1512.07666).

    .. math:: V ← αV + (1 − α)\,g², \quad p = 1/(\sqrt V + eps), \quad
        w ← w − \tfrac{ε}{2}\,p\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε p}\,ξ

    While V adapts, p depends on the path and the correction term Γ of Li et al. is left out (as everywhere in the
    field), so the stationary law is off by O(1 − α) and by the correlation of p with the present gradient. After
    `adapt_steps` steps V stays as it is, and the draws come from SGLD in a fixed metric, which is exact up to O(ε).

    Attributes:
        alpha: decay α of the running mean, in [0, 1).
        eps: added to √V, > 0.
        relative_eps: whether `eps` is in units of the gradient's own scale, the root of the mean of V over all
            elements; rescaling the loss then rescales p and nothing else.
        adapt_steps: steps after which V is frozen; None: never (as in devinterp).
    """

    name: ClassVar[str] = "rmsprop-sgld"
    adaptive: ClassVar[bool] = True

    alpha: float = 0.99
    eps: float = 0.1
    relative_eps: bool = False
    adapt_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("alpha", self.alpha)
        _check_adaptation(self.eps, self.adapt_steps)

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(**_adaptation(options, options["alpha"]))


@dataclass(frozen=True)
class AdamSGLD(Sampler):
    r"""SGLD in RMSprop's metric with a running mean of gradients, both bias-corrected as in Adam.

    .. math:: m ← β_1 m + (1 − β_1) g,\quad V ← β_2 V + (1 − β_2) g²,\quad p = 1/(\sqrt{\hat V} + eps),\quad
        w ← w − \tfrac{ε}{2}\,p\,[nβ\,\hat m + γ(w − w^*) + μ\,w] + σ\sqrt{ε p}\,ξ

    The Adam-SGLD of Hitchcock & Hoogland 2025 (arXiv 2507.21449); Kim, Song & Liang 2022 (arXiv 2009.09535) adapt the
    drift in a related way. What holds for RMSprop-SGLD's metric holds here; besides, m lags about β₁/(1 − β₁) steps
    behind the gradient, which costs an error of order ε·nβ·h·p·β₁/(1 − β₁) in a direction of curvature h even after V
    is frozen.

    Attributes:
        betas: (β₁, β₂), each in [0, 1).
        eps, relative_eps, adapt_steps: as for RMSprop-SGLD.
    """

    name: ClassVar[str] = "adam-sgld"
    adaptive: ClassVar[bool] = True
    tells_heat: ClassVar[bool] = False  # the drift lags behind the place

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 0.1
    relative_eps: bool = False
    adapt_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be a pair, got {self.betas!r}")
        _check_decay("betas[0]", self.betas[0])
        _check_decay("betas[1]", self.betas[1])
        _check_adaptation(self.eps, self.adapt_steps)

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        first, second = options["betas"]
        return super().scalars(options)._replace(momentum_decay=float(first), **_adaptation(options, second))


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
        noise = update.normals(offset, w.numel(), key, dtype=w.dtype, device=w.device)
        return [math.sqrt(options["lr"]) * noise.view(w.shape)]


@dataclass(frozen=True)
class MetropolisSampler(PreconditionedSGLD):
    """What MALA and HMC have in common; see :class:`llc_fast.metropolis.Metropolis` for what they do.

    Attributes:
        preconditioner: A, as for preconditioned SGLD; momenta have covariance 1/A.
        adapt_steps: transitions, the first ones, that each chain uses to find its own ε, starting from `lr`; 0: ε
            stays `lr`. `estimate_llc` sets it to the length of burn-in if ``lr=None``, else to 0.
        target_acceptance: the mean acceptance probability that adaptation aims at.
        noise_level: 1; nothing else leaves the posterior invariant.
        bounding_box_size: proposals out of the box are rejected, so the posterior is cut off there, not clamped.
    """

    adjusted_by_metropolis: ClassVar[bool] = True
    tells_heat: ClassVar[bool] = False

    adapt_steps: int = 0
    target_acceptance: float = 0.574

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("adapt_steps", self.adapt_steps, 0)
        if not 0 < check_number("target_acceptance", self.target_acceptance) < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")
        if self.noise_level != 1:
            raise ValueError(
                f"noise_level must be 1 for sampler={self.name!r}, got {self.noise_level}: the Metropolis test is for "
                "the posterior itself; change nbeta for another temperature"
            )

    @property
    def rule(self) -> str:
        return "preconditioned-sgld"  # the proposal of MALA; the engine uses its checks and its layout of memory

    def trajectory(self) -> tuple[int, float]:
        """Leapfrog steps of a transition, and how far their length may differ from √ε, as a share of it."""
        return 1, 0.0

    @classmethod
    def measures(cls, options: Mapping[str, Any]) -> bool:
        return True  # no part of a gradient can be consumed before the proposal is accepted

    @classmethod
    def initial_memory(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Each chain's log √ε, its weighted mean, the mean shortfall of acceptance, the last acceptance."""
        log = 0.5 * math.log(options["lr"])
        return {"adaptation": torch.tensor([[log, log, 0.0, math.nan]], dtype=torch.float64, device=device)}


@dataclass(frozen=True)
class MALA(MetropolisSampler):
    r"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996) on the whole data set.

    .. math:: w' = w − \tfrac{ε}{2} A ∇U(w) + \sqrt{ε A}\,ξ, \qquad
        \text{accepted with probability } \min\Bigl(1, \frac{e^{−U(w')} q(w | w')}{e^{−U(w)} q(w' | w)}\Bigr)

    with q the density of the proposal: SGLD's step, and exact at any step size. One gradient over all data a draw.
    An acceptance of 0.574 is best in many dimensions (Roberts & Rosenthal 1998).
    """

    name: ClassVar[str] = "mala"


@dataclass(frozen=True)
class HMC(MetropolisSampler):
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
        _check_count("num_leapfrog", self.num_leapfrog, 1)
        _check_decay("jitter", self.jitter)

    def trajectory(self) -> tuple[int, float]:
        return int(self.num_leapfrog), float(self.jitter)


SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls for cls in (SGLD, PreconditionedSGLD, RMSpropSGLD, AdamSGLD, SGHMC, SGNHT)
}
ADJUSTED: dict[str, type[MetropolisSampler]] = {cls.name: cls for cls in (MALA, HMC)}


def make_sampler(name: str, **options: Any) -> Sampler:
    """The sampler called `name`; unknown names and options raise a ValueError that lists the known ones."""
    known_samplers: Mapping[str, type[Sampler]] = {**SAMPLERS, **ADJUSTED}
    if not isinstance(name, str) or name not in known_samplers:
        raise ValueError(f"sampler={name!r} is unknown; choose one of: {', '.join(sorted(known_samplers))}")
    cls = known_samplers[name]
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it takes: {', '.join(known)}")
    return cls(**options)
