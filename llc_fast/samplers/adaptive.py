"""Langevin dynamics in a metric that is learned from gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llc_fast.kernels.step import SUMS, StepScalars
from llc_fast.samplers.base import Kind, Metric, Sampler
from llc_fast.samplers.langevin import LangevinSampler
from llc_fast.samplers.registry import register
from llc_fast.support.arguments import check_decay, check_number


class AdaptiveMetric(Sampler):
    r"""The metric of RMSprop, p = 1/(√V + eps), with V a running mean of squared gradients that stops adapting.

    With ``relative_eps`` eps is in units of the gradient's scale, the root of the mean of V over all elements that may
    move. That mean follows V's own recursion, so the sum of g² that every step leaves behind keeps it up to date; only
    the first step has to look at the gradients before. It is a number, and follows a single chain.
    """

    metric: ClassVar[Metric] = "adaptive"
    corrects_start: ClassVar[bool] = False
    """Whether V is corrected for its start at zero, as in Adam."""

    @classmethod
    def feedback_sums(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("grad",) if options["relative_eps"] else ()

    @classmethod
    def adapted(
        cls,
        scalars: StepScalars,
        options: Mapping[str, Any],
        adaptation: MutableMapping[str, Any],
        step: int,
        grads: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> StepScalars:
        if not options["relative_eps"]:
            return scalars
        if step == 0 or "mean_square" not in adaptation:
            moving = [g if m is None else g[m.expand_as(g)] for g, m in zip(grads, masks, strict=True)]
            mean = sum(float(g.double().square().sum()) for g in moving) / sum(g.numel() for g in moving)
            adaptation["mean_square"] = (1 - scalars.decay) * mean
        mean = adaptation["mean_square"]
        if cls.corrects_start:
            mean = mean / (1 - scalars.decay ** max(1, min(step, scalars.adapt_steps)))
        return scalars._replace(eps=scalars.eps * math.sqrt(mean))

    @classmethod
    def follow(
        cls, scalars: StepScalars, adaptation: MutableMapping[str, Any], step: int, sums: Tensor, count: int
    ) -> None:
        if "mean_square" in adaptation and step < scalars.adapt_steps:
            before = adaptation["mean_square"] if step else 0.0
            seen = float(sums[0, SUMS.index("grad")]) / max(count, 1)
            adaptation["mean_square"] = scalars.decay * before + (1 - scalars.decay) * seen

    @classmethod
    def frozen_metric(cls, scalars: StepScalars, states: Sequence[Tensor]) -> Tensor:
        squares = states[0]
        if cls.corrects_start:
            squares = squares / (1 - scalars.decay**scalars.adapt_steps)
        return 1 / (squares.sqrt() + scalars.eps)


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
        check_number("adapt_steps", adapt_steps, minimum=1, infinite=True)


@register
@dataclass(frozen=True)
class RMSpropSGLDSampler(AdaptiveMetric, LangevinSampler):
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
        adapt_steps: steps after which V is frozen; infinity: never. None: never in an optimizer (as in devinterp), at
            the end of burn-in in `estimate_llc`.
    """

    name: ClassVar[str] = "rmsprop-sgld"

    alpha: float = 0.99
    eps: float = 0.1
    relative_eps: bool = False
    adapt_steps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("alpha", self.alpha)
        _check_adaptation(self.eps, self.adapt_steps)

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(**_adaptation(options, options["alpha"]))


@register
@dataclass(frozen=True)
class AdamSGLDSampler(AdaptiveMetric):
    r"""SGLD in RMSprop's metric with a running mean of gradients, both bias-corrected as in Adam.

    .. math:: m ← β_1 m + (1 − β_1) g,\quad V ← β_2 V + (1 − β_2) g²,\quad p = 1/(\sqrt{\hat V} + eps),\quad
        w ← w − \tfrac{ε}{2}\,p\,[nβ\,\hat m + γ(w − w^*) + μ\,w] + σ\sqrt{ε p}\,ξ

    The Adam-SGLD of Hitchcock & Hoogland 2025 (arXiv 2507.21449); Kim, Song & Liang 2022 (arXiv 2009.09535) adapt the
    drift in a related way. What holds for RMSprop-SGLD's metric holds here; besides, m lags about β₁/(1 − β₁) steps
    behind the gradient, which costs an error of order ε·nβ·h·p·β₁/(1 − β₁) in a direction of curvature h even after V
    is frozen. Its bias is not measured: the drift is not that of the place where the step begins.

    Attributes:
        betas: (β₁, β₂), each in [0, 1).
        eps, relative_eps, adapt_steps: as for RMSprop-SGLD.
    """

    name: ClassVar[str] = "adam-sgld"
    kind: ClassVar[Kind] = "momentum"
    corrects_start: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 0.1
    relative_eps: bool = False
    adapt_steps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be a pair, got {self.betas!r}")
        check_decay("betas[0]", self.betas[0])
        check_decay("betas[1]", self.betas[1])
        _check_adaptation(self.eps, self.adapt_steps)

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        first: float = options["betas"][0]
        return first / (1 - first)

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        first, second = options["betas"]
        return super().scalars(options)._replace(momentum_decay=float(first), **_adaptation(options, second))
