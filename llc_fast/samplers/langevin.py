"""Langevin dynamics in a metric that is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llc_fast.kernels.step import StepScalars
from llc_fast.samplers.base import Kind, Metric, Sampler
from llc_fast.samplers.registry import register
from llc_fast.support.arguments import check_number


class LangevinSampler(Sampler):
    """Langevin steps w ← w − (ε/2)·p·G + √(εp)·ξ, with G at w itself and a diagonal p that is fixed during the draws.

    A sampler that derives from this class says that its rule is such a step, and that its bias sum is Σ g·(ε/8)·p·G.
    """

    kind: ClassVar[Kind] = "langevin"
    supports_bias_correction: ClassVar[bool] = True
    traces: ClassVar[tuple[str, ...]] = ("bias", "squared_distance")

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        return 0.0

    @classmethod
    def injected_noise(cls, options: Mapping[str, Any]) -> float:
        return 1.0


@register
@dataclass(frozen=True)
class SGLDSampler(LangevinSampler):
    r"""Stochastic gradient Langevin dynamics, localized at w*.

    .. math:: w ← w − \tfrac{ε}{2}\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε}\,ξ,\qquad ξ ∼ N(0, 1)

    Its stationary law is the posterior ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²) up to an error of order ε, and a further one
    from the noise of minibatch gradients (Welling & Teh 2011; localization: Lau et al. 2023, arXiv 2308.12108).
    """

    name: ClassVar[str] = "sgld"
    metric: ClassVar[Metric] = "identity"
    momentum_variant: ClassVar[str | None] = "sghmc"
    structured_variant: ClassVar[str | None] = "kfac-sgld"


@register
@dataclass(frozen=True)
class PreconditionedSGLDSampler(LangevinSampler):
    r"""SGLD in a fixed diagonal metric.

    .. math:: w ← w − \tfrac{ε}{2}\,A\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε A}\,ξ

    A constant A leaves the stationary law as it is and changes only how fast it is reached, so this is as exact as
    SGLD; A = a² on a parameter that was scaled by a makes the chain indifferent to the scaling (Furman & Lau 2024,
    arXiv 2402.03698; Welling & Teh 2011 for the constant preconditioner).

    With ``localization_metric="sampler"`` the localization is γ/2·(w − w*)ᵀA⁻¹(w − w*), whose pull is outside the
    metric:

    .. math:: w ← w − \tfrac{ε}{2}\,\{A\,[nβ\,g + μ\,w] + γ(w − w^*)\} + σ\sqrt{ε A}\,ξ

    This is SGLD for the parameters A^(−1/2)·w: where A follows a rescaling of the network, chain, posterior and λ̂ do.

    Attributes:
        preconditioner: A > 0: a number, or a tensor that broadcasts to the parameter, or one of these for each
            parameter (a list in the optimizer, a mapping by name in `estimate_llc`). ``"curvature"``, in `estimate_llc`
            alone: 1 over the diagonal of the curvature at w*, see :func:`llc_fast.objective.metric.curvature_metric`.
        localization_metric: of γ, ``"euclidean"`` or ``"sampler"``: A's. None: ``"sampler"`` for ``"curvature"``,
            otherwise ``"euclidean"``.
    """

    name: ClassVar[str] = "preconditioned-sgld"
    metric: ClassVar[Metric] = "given"

    preconditioner: Any = 1.0
    localization_metric: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self.preconditioner)
        object.__setattr__(
            self, "localization_metric", checked_localization_metric(self.localization_metric, self.preconditioner)
        )

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(in_metric=float(options.get("localization_metric") == "sampler"))


CURVATURE = "curvature"
"""The preconditioner that is estimated at w*."""


class EstimatedMetric(dict[str, Tensor]):
    """What `CURVATURE` was found to be, A > 0 by parameter."""


def checked_localization_metric(given: Any, preconditioner: Any) -> str:
    """The metric of the localization: the one that is given, or the default of a preconditioner.

    Raises:
        ValueError: it is neither.
    """
    if given is None:
        return "sampler" if isinstance(preconditioner, str) else "euclidean"
    if given not in ("euclidean", "sampler"):
        raise ValueError(f'localization_metric={given!r} is unknown: pass "euclidean", or "sampler" for the one of A')
    return str(given)


def check_preconditioner(given: Any) -> None:
    """Raise TypeError or ValueError unless `given` is a metric A > 0, or one for each parameter, or `CURVATURE`."""
    if isinstance(given, str):
        if given != CURVATURE:
            raise ValueError(
                f"preconditioner={given!r} is unknown: pass a number, tensors, or {CURVATURE!r} for a metric that is "
                "estimated from the curvature at w*"
            )
        return
    if isinstance(given, EstimatedMetric):  # looked at when it was made
        return
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
