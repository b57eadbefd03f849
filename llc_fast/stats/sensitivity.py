"""How λ̂ answers to nβ and γ, from pairs of chains that share their random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.errors import standard_error

Array = NDArray[np.float64]


class Sensitivity(NamedTuple):
    """dλ̂/dlog nβ and dλ̂/dlog γ with standard errors, and the gradients that they took; NaN where there is none."""

    nbeta: float
    nbeta_stderr: float
    localization: float
    localization_stderr: float
    gradients: int

    @classmethod
    def from_numbers(cls, found: Mapping[str, Any]) -> Sensitivity:
        """From what ``_asdict()`` gave, in which None may stand for NaN."""
        slopes = [math.nan if found[name] is None else float(found[name]) for name in cls._fields[:4]]
        return cls(slopes[0], slopes[1], slopes[2], slopes[3], int(found["gradients"]))


def sensitivity(traces: Mapping[str, Array], distance: float, gradients: int) -> Sensitivity:
    """From the traces of :func:`llc_fast.twins.twin_traces`, of pairs that are `distance` apart on a logarithmic scale.

    The slope in nβ is that in nβ and γ together, at the same nβ/γ, less that in γ; draw by draw, as they share their
    random numbers.
    """
    together = (traces["together+"] - traces["together-"]) / distance
    along = np.zeros_like(together)
    if "localization+" in traces:
        along = (traces["localization+"] - traces["localization-"]) / distance
    slopes = _mean(together - along)
    return Sensitivity(*slopes, *(_mean(along) if "localization+" in traces else (math.nan, math.nan)), gradients)


def _mean(differences: Array) -> tuple[float, float]:
    """With its standard error, over draws ``[chain, draw]``, without chains that diverged."""
    kept = differences[np.isfinite(differences).all(axis=1)]
    return (float(kept.mean()), standard_error(kept).value) if kept.size else (math.nan, math.nan)
