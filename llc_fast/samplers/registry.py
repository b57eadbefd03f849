"""Samplers by name."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from llc_fast.samplers.base import Sampler

SAMPLERS: dict[str, type[Sampler]] = {}
"""Every sampler by its name, in the order of their definition."""
_S = TypeVar("_S", bound=type[Sampler])


def register(cls: _S) -> _S:
    """Put a sampler class under its name; as a decorator.

    Raises:
        ValueError: the name is taken.
    """
    if cls.name in SAMPLERS:
        raise ValueError(f"sampler={cls.name!r} is {SAMPLERS[cls.name].__name__} already: give {cls.__name__} another")
    SAMPLERS[cls.name] = cls
    return cls


def samplers_with_optimizer() -> dict[str, type[Sampler]]:
    """Those whose transition is one step with a given gradient: all but the Metropolis-adjusted ones."""
    return {name: cls for name, cls in SAMPLERS.items() if cls.kind != "metropolis"}


def make_sampler(sampler: str | Sampler, **options: Any) -> Sampler:
    """The sampler called `sampler`, or the one that is given, with these options.

    Raises:
        ValueError: unknown names and options; the message lists the known ones.
    """
    if isinstance(sampler, Sampler):
        cls = type(sampler)
    elif isinstance(sampler, str) and sampler in SAMPLERS:
        cls = SAMPLERS[sampler]
    else:
        raise ValueError(f"sampler={sampler!r} is unknown; choose one of: {', '.join(sorted(SAMPLERS))}")
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it takes: {', '.join(known)}")
    return dataclasses.replace(sampler, **options) if isinstance(sampler, Sampler) else cls(**options)
