"""Samplers by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
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
    """Those whose transition is one fused step with a given gradient."""
    return {name: cls for name, cls in SAMPLERS.items() if cls.has_optimizer}


def sampler_class(name: str) -> type[Sampler]:
    """The sampler of that name, in upper or lower case, with hyphens, underscores, spaces or nothing between words.

    Raises:
        ValueError: there is none; the message has the nearest name, and all of them.
    """
    plain = {_plain(known): cls for known, cls in SAMPLERS.items()}
    if isinstance(name, str) and _plain(name) in plain:
        return plain[_plain(name)]
    near = difflib.get_close_matches(_plain(str(name)), plain, n=1)
    meant = f"did you mean {plain[near[0]].name!r}? " if near else ""
    raise ValueError(f"sampler={name!r} is unknown; {meant}choose one of: {', '.join(sorted(SAMPLERS))}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def make_sampler(sampler: str | Sampler, **options: Any) -> Sampler:
    """The sampler of that name, in any spelling (``"RMSprop SGLD"``), or the one that is given, with these options.

    Raises:
        ValueError: unknown names and options; the message has the nearest one, and all of them.
    """
    cls = type(sampler) if isinstance(sampler, Sampler) else sampler_class(sampler)
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it takes: {', '.join(known)}{meant}")
    return dataclasses.replace(sampler, **options) if isinstance(sampler, Sampler) else cls(**options)
