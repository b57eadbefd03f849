"""What the curvature at w* says that chains of a certain length do not reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Wells:
    """Directions by their curvature at w*.

    Attributes:
        curvatures: h of the mean loss, positive.
        counts: how many directions have it.
    """

    curvatures: Sequence[float] = ()
    counts: Sequence[float] = ()

    def unreached(self, nbeta: float, pull: float, rate: float, num_burnin: int, num_steps: int) -> float:
        r"""What λ̂ of chains from w* lacks, for directions in which they are not in equilibrium.

        .. math:: \sum \tfrac12\,\frac{c}{a}\,\frac{e^{−a t_0} − e^{−a t_1}}{a\,(t_1 − t_0)},\qquad c = nβ\,h,\quad
            a = c + γ + μ

        In a quadratic well the energy at time t is ½·(c/a)·(1 − exp(−a·t)): a Langevin step of size ε leaves 1 − aε of
        a variance's distance to its limit. This is what that lacks, the mean over the draws, from t₀ to t₁. Singular
        directions have no curvature at w*, and what they lack is not in it.

        Args:
            nbeta: nβ.
            pull: γ + μ.
            rate: time of a step: ε, or ε/α with momentum.
            num_burnin: steps before the draws.
            num_steps: all steps.
        """
        if num_steps <= num_burnin:
            return math.nan
        c = nbeta * np.array(self.curvatures, dtype=np.float64)
        a = c + pull
        before, during = a * rate * num_burnin, a * rate * (num_steps - num_burnin)
        left = np.exp(-before) * -np.expm1(-during) / np.where(during > 0, during, 1.0)
        left = np.where(during > 0, left, 1.0)
        share = c / np.where(a > 0, a, 1.0)
        return float((0.5 * share * left * np.array(self.counts)).sum())
