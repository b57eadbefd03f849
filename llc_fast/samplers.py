"""Samplers: a sampler is its hyperparameters, its state and its rule.

The rule itself is written in ``csrc/langevin.h`` and, as the specification, in :mod:`llc_fast.reference`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from llc_fast.reference import StepScalars


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


@dataclass(frozen=True)
class SGLD:
    r"""Stochastic gradient Langevin dynamics, localized at w*.

    .. math:: w ← w − \tfrac{ε}{2}\,[nβ\,g + γ(w − w^*) + μ\,w] + σ\sqrt{ε}\,ξ,\qquad ξ ∼ N(0, 1)

    then, if a box is given, w is clamped to \|w − w*\| ≤ b elementwise. Its stationary law is the posterior
    ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²) up to an error of order ε (Welling & Teh 2011; localization: Lau et al.
    2023, arXiv 2308.12108).

    Attributes:
        lr: step size ε > 0.
        nbeta: inverse temperature nβ > 0 of the mean loss; n / log n is Watanabe's choice.
        localization: γ ≥ 0.
        weight_decay: μ ≥ 0, a Gaussian prior around zero.
        noise_level: σ ≥ 0; anything but 1 no longer samples the posterior.
        bounding_box_size: b > 0, or None for no box.

    Raises:
        TypeError, ValueError: a value that is not a number, not finite or out of range.
    """

    name: ClassVar[str] = "sgld"

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

    def scalars(self) -> StepScalars:
        """The hyperparameters in the form that a step takes."""
        return scalars_from(vars(self))

    def needs_anchor(self) -> bool:
        """Whether the rule reads w*."""
        return self.localization != 0 or self.bounding_box_size is not None


def scalars_from(options: Mapping[str, Any]) -> StepScalars:
    """One step's scalars from a mapping of hyperparameters, such as an optimizer's parameter group.

    Schedulers change these between steps, so what could make a step silently wrong is checked again here.
    """
    box = options["bounding_box_size"]
    scalars = StepScalars(
        float(options["lr"]),
        float(options["nbeta"]),
        float(options["localization"]),
        float(options["weight_decay"]),
        float(options["noise_level"]),
        math.inf if not box else float(box),
    )
    # One comparison chain catches NaN, infinity and negative values: this runs at every step.
    if not (0 <= scalars.lr < math.inf and 0 <= scalars.nbeta < math.inf and 0 <= sum(scalars[2:5]) < math.inf):
        raise ValueError(f"hyperparameters must be finite and not negative, got {scalars._asdict()}")
    return scalars


SAMPLERS: dict[str, type[SGLD]] = {SGLD.name: SGLD}


def make_sampler(name: str, **options: Any) -> SGLD:
    """The sampler called `name`; unknown names and options raise a ValueError that lists the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; choose one of: {', '.join(sorted(SAMPLERS))}")
    cls = SAMPLERS[name]
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it takes: {', '.join(known)}")
    return cls(**options)
