"""Samplers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llc_fast.samplers.adaptive import AdamSGLD, RMSpropSGLD
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.langevin import SGLD, PreconditionedSGLD
from llc_fast.samplers.metropolis import HMC, MALA, MetropolisSampler
from llc_fast.samplers.momentum import SGHMC, SGNHT

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
