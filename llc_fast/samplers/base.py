"""What all samplers have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llc_fast.kernels.native import NUM_STATES
from llc_fast.kernels.step import SUMS, StepScalars
from llc_fast.support.arguments import check_number

MOMENTUM_STREAM = 1
"""The stream of the noise that initial momenta are drawn from; Langevin noise is stream 0."""
ACCEPT_STREAM = 3
"""The stream of a Metropolis test and of a trajectory's jitter; minibatches are stream 2."""


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
    corrects_start: ClassVar[bool] = False
    """Whether the running mean of squared gradients is corrected for its start at zero, as in Adam."""
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
        return [torch.zeros_like(w, memory_format=torch.contiguous_format) for _ in range(NUM_STATES[cls.name])]

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
        if cls.corrects_start:
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
            metrics: its sums, float64 ``[num_chains, len(SUMS)]``, a tensor or an array.

        Returns:
            One number for each chain, in units of λ.
        """
        return scalars.nbeta * metrics[:, SUMS.index("bias")]

    @classmethod
    def follow(
        cls, scalars: StepScalars, memory: MutableMapping[str, Any], step: int, metrics: Tensor, count: int
    ) -> None:
        """Move thermostat and gradient scale after a step with these sums over `count` elements."""
        if cls.thermostatted:
            memory["thermostat"] += metrics[:, SUMS.index("momentum")] / max(count, 1) - scalars.lr
        elif "mean_square" in memory and step < scalars.adapt_steps:
            before = memory["mean_square"] if step else 0.0
            seen = float(metrics[0, SUMS.index("grad")]) / max(count, 1)
            memory["mean_square"] = scalars.decay * before + (1 - scalars.decay) * seen
