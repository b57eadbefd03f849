"""Checks of single arguments: errors that name the argument, its value and the remedy."""

from __future__ import annotations

import math
import numbers


def check_number(
    name: str, value: object, *, minimum: float = -math.inf, exclusive: bool = False, infinite: bool = False
) -> float:
    """`value` as a float, or a TypeError/ValueError that names the argument, the value and the remedy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        # Zero-dimensional tensors are welcome: learning rates often are.
        if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
        value = value.item()
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be at most about 1e308, got a number that float64 can't hold") from None
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise ValueError(f"{name} must be finite, got {number}")
    if number < minimum or (exclusive and number == minimum):
        relation = "greater than" if exclusive else "at least"
        raise ValueError(f"{name} must be {relation} {minimum:g}, got {number:g}")
    return number


def check_decay(name: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1)."""
    if not 0 <= check_number(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_integer(name: str, value: object, minimum: int) -> int:
    """`value` as an int, or a TypeError/ValueError likewise; NumPy's integers are welcome."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if int(value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)
