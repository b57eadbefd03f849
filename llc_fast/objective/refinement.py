"""A better minimum near w*, by a few steps of descent over all data."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llc_fast.objective.curvature import gradient_over, reason_without_gradient
from llc_fast.objective.objective import Objective

Point = dict[str, Tensor]
_ENOUGH, _GOOD = 0.003, 0.05
"""What U may still fall by, as steps foretell it, where it has come down; and where a new w* is good enough: λ̂ may be
too low by twice as much. Going on would be training, and lead away from the model that is measured."""
_PAIRS, _PAIRS_OF_LARGE, _LARGE = 10, 3, 10_000_000
"""Steps that the curvature is remembered of; fewer for a model of so many parameters, as each takes as much memory."""
_SUFFICIENT = 1e-4
"""The share of the fall that a gradient foretells which a step has to reach (Armijo 1966)."""
_SHORTEST = 1e-6
"""Of a step, at which it is given up."""
_PROBE = 1e-3
"""Length of the first step, over ‖w*‖, which only looks at the curvature."""


@dataclass(frozen=True)
class Refinement:
    """What refining w* has done; plain numbers.

    Attributes:
        fall: of nβ·L.
        distance: that w* has moved, over its norm.
        gradient_before, gradient_after: ‖∇L‖ over what is sampled.
        passes: over the data; each gives a loss and a gradient.
        gradients: of minibatches, in all passes.
        is_complete: whether it ended at a minimum, and not with the last pass that it was given.
    """

    fall: float
    distance: float
    gradient_before: float
    gradient_after: float
    passes: int
    gradients: int
    is_complete: bool


@torch.no_grad()
def refine(objective: Objective, nbeta: float, localization: float, *, max_passes: int) -> tuple[Point, Refinement]:
    """A point near w* where U = nβ·L + γ/2·‖w − w*‖² is lower, by quasi-Newton steps with gradients over all data.

    The steps are those of L-BFGS (Liu & Nocedal 1989) with backtracking. γ holds them near. When U has come down to
    its minimum, w* moves there, and so on from the new place, until the gradient at w* itself foretells no fall that
    matters. Everything is in float32 (float64 for models in float64); nothing is random.

    Args:
        objective: the model, its loss and data, which stays as it is.
        nbeta, localization: nβ and γ.
        max_passes: passes over the data at most.

    Returns:
        The new w*, on the device and in the dtype of the old one (the old one, if nothing is lower), and what was done.

    Raises:
        ValueError: there is no gradient over all data.
    """
    if reason := reason_without_gradient(objective):
        raise ValueError(
            f"refine=True needs the gradient of the loss over all data, and {reason}: pass a model in eval mode and "
            "data with an end that stay the same, or leave refine out"
        )
    return _Descent(objective, nbeta, localization, max_passes).run()


class _Descent:
    def __init__(self, objective: Objective, nbeta: float, localization: float, max_passes: int) -> None:
        self._given, self._exact = objective, objective.in_full_precision()
        self._nbeta, self._gamma, self._left, self._passes = nbeta, localization, max_passes, 0
        self._gradients = 0
        pairs = _PAIRS if objective.num_parameters <= _LARGE else _PAIRS_OF_LARGE
        self._pairs: deque[tuple[Point, Point, float]] = deque(maxlen=pairs)

    def run(self) -> tuple[Point, Refinement]:
        start = {name: w.clone() for name, w in self._exact.reference.items()}
        here, anchor, norm = start, start, _norm(start)
        first, slope = self._look(here)
        loss, steepness = first, _norm(slope)
        is_complete = steepness == 0
        if steepness and self._left:
            self._probe(here, slope, max(norm, _PROBE) * _PROBE)
        while self._left and not is_complete:
            force = self._force(here, anchor, slope)
            way = self._towards(force)
            foretold = -_dot(way, force)
            if not foretold > 0:  # what the pairs say of the curvature is of no use here
                self._pairs.clear()
                way = {name: -f / (self._nbeta + self._gamma) for name, f in force.items()}
                foretold = -_dot(way, force)
            if 0.5 * self._foretold_at_most(force, foretold) < (_GOOD if here is anchor else _ENOUGH):
                is_complete = here is anchor
                anchor = here
                continue
            found = self._step(here, anchor, way, foretold, loss)
            if found is None:
                is_complete = here is anchor and self._left > 0
                if is_complete or not self._left:
                    break
                anchor = here  # rounding hides what is left of the way
                continue
            here, loss, slope_there, moved = found
            self._remember(moved, {name: self._change(name, slope_there, slope, moved) for name in moved})
            slope = slope_there
        return self._result(start, here, first, loss, steepness, _norm(slope), is_complete)

    # ---- steps -----------------------------------------------------------------------------------------------

    def _step(
        self, here: Point, anchor: Point, way: Point, foretold: float, loss: float
    ) -> tuple[Point, float, Point, Point] | None:
        """A step along `way` that lowers U by enough: the place, its loss and gradient, and the step; None: none."""
        before = self._potential(here, anchor, loss)
        slack, length = self._slack(loss), 1.0
        while self._left and length > _SHORTEST:
            moved = {name: length * v for name, v in way.items()}
            there = {name: w + moved[name] for name, w in here.items()}
            value, slope = self._look(there)
            after = self._potential(there, anchor, value)
            if after <= before - _SUFFICIENT * length * foretold + slack:
                return there, value, slope, moved
            # The minimum of the parabola through both values, with the slope at the first.
            bend = after - before + length * foretold
            best = 0.5 * length**2 * foretold / bend if math.isfinite(bend) and bend > 0 else 0.0
            length = min(max(best, 0.1 * length), 0.5 * length)
        return None

    def _slack(self, loss: float) -> float:
        """What rounding makes of U."""
        return 4 * self._given.rounding * self._nbeta * abs(loss) if self._given.is_precise else 0.0

    def _probe(self, here: Point, slope: Point, length: float) -> None:
        """Look at the curvature along the gradient, for the length of the first step."""
        size = _norm(slope)
        moved = {name: -length / size * g for name, g in slope.items()}
        _, there = self._look({name: w + moved[name] for name, w in here.items()})
        self._remember(moved, {name: self._change(name, there, slope, moved) for name in moved})

    def _change(self, name: str, after: Point, before: Point, moved: Point) -> Tensor:
        """Of the gradient of U along a step."""
        return self._nbeta * (after[name] - before[name]) + self._gamma * moved[name]

    def _remember(self, moved: Point, change: Point) -> None:
        product = _dot(moved, change)
        if product > 1e-10 * _norm(moved) * _norm(change):
            self._pairs.append((moved, change, product))

    def _foretold_at_most(self, force: Point, foretold: float) -> float:
        """Twice the fall that is left, if directions nobody has gone are as flat as the flattest one gone."""
        flattest = max((_dot(moved, moved) / product for moved, _, product in self._pairs), default=0.0)
        return max(foretold, -_dot(self._towards(force, flattest), force)) if flattest else foretold

    def _towards(self, force: Point, scale: float | None = None) -> Point:
        """−(an inverse Hessian by the remembered steps, and `scale` where there is none)·force."""
        way = {name: -f for name, f in force.items()}
        shares = []
        for moved, change, product in reversed(self._pairs):
            share = _dot(moved, way) / product
            shares.append(share)
            way = {name: v - share * change[name] for name, v in way.items()}
        if scale is None:
            scale = 1 / (self._nbeta + self._gamma)
            if self._pairs:
                _, change, product = self._pairs[-1]
                scale = product / _dot(change, change)
        way = {name: scale * v for name, v in way.items()}
        for (moved, change, product), share in zip(self._pairs, reversed(shares), strict=True):
            rest = share - _dot(change, way) / product
            way = {name: v + rest * moved[name] for name, v in way.items()}
        return way

    def _force(self, here: Point, anchor: Point, slope: Point) -> Point:
        return {name: self._nbeta * g + self._gamma * (here[name] - anchor[name]) for name, g in slope.items()}

    def _potential(self, here: Point, anchor: Point, loss: float) -> float:
        if not math.isfinite(loss):
            return math.inf
        away = sum(float((w.double() - anchor[name].double()).square().sum()) for name, w in here.items())
        return self._nbeta * loss + 0.5 * self._gamma * away

    def _look(self, here: Point) -> tuple[float, Point]:
        """L and its gradient over all data."""
        self._left, self._passes = self._left - 1, self._passes + 1
        found = gradient_over(self._exact, here, None, widen=True)
        self._gradients += found.num_pieces
        return found.loss, found.gradient

    # ---- the result ------------------------------------------------------------------------------------------

    def _result(
        self, start: Point, here: Point, first: float, loss: float, before: float, after: float, is_complete: bool
    ) -> tuple[Point, Refinement]:
        given = self._given.reference
        found = {name: w.to(given[name].dtype) for name, w in here.items()}
        if not self._given.is_precise:  # what the chains will see is rounded
            old, new = (gradient_over(self._given, point, None) for point in (given, found))
            first, loss, before, after = old.loss, new.loss, _norm(old.gradient), _norm(new.gradient)
            self._gradients += old.num_pieces + new.num_pieces
        if not loss < first:
            found, loss, after = {name: given[name] for name in found}, first, before
        moved = _norm({name: found[name].double() - start[name].double() for name in found})
        return found, Refinement(
            fall=self._nbeta * (first - loss),
            distance=moved / (_norm(start) or math.inf),
            gradient_before=before,
            gradient_after=after,
            passes=self._passes,
            gradients=self._gradients,
            is_complete=is_complete,
        )


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((x.double() * b[name].double()).sum() for name, x in a.items()))


def _norm(a: Mapping[str, Any]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in a.values()))
