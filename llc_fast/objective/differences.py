"""Gradients compared with differences of the loss: is what autograd gives the derivative of what is evaluated?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llc_fast.data import Batch, map_tensors

if TYPE_CHECKING:
    from llc_fast.objective.objective import Objective

_STEP = 1e-2
"""Length of a difference, relative to the size of each parameter; half of it shows how curved the loss is."""
_EVALUATIONS = 4
"""Of one direction: forwards and backwards, at two lengths."""
_MAX_GROUPS = 24
_DIRECTIONS = 3
"""Independent directions, of which two must disagree."""
_ROUNDING = 8.0
"""Rounding errors of a loss, in units of its precision."""
_DISAGREES, _RESPONDS = 0.05, 0.02
"""Disagreement, relative to what a gradient of this size gives in a random direction; the same for elements whose
gradient is zero, relative to that of all."""
_CURVED = 4.0
"""Weight of the difference between the two lengths, which says what curvature and kinks make of a difference."""
_LARGE = 10_000_000
"""Parameters above which directions are made anew instead of kept, and single elements are not looked for."""
_MAX_ROWS = 64


@dataclass
class Found:
    """What differences of the loss have shown.

    Attributes:
        wrong: names of parameters with a gradient that is not the derivative of the loss.
        without_gradient: by name, elements that the loss depends on and whose gradient is zero all the same; boolean.
    """

    wrong: list[str] = field(default_factory=list)
    without_gradient: dict[str, Tensor] = field(default_factory=dict)


class _Slope(NamedTuple):
    """The derivative of the loss along a direction, by differences, and how far off that may be."""

    value: float
    error: float


def compare_with_differences(
    objective: Objective,
    batch: Batch,
    params: dict[str, Tensor],
    restart: Callable[[], None],
    max_evaluations: int,
) -> Found:
    """Compare the gradient at `params` with differences of the loss, group by group of parameters.

    Central differences of two lengths, h and h/2, along random directions: what they differ by bounds curvature and
    kinks, and rounding is known. Losses and gradients are computed in float32 at least.

    Args:
        objective: model and loss.
        batch: a minibatch, or the part of it that passes the model at a time.
        params: a point beside w*, which is written to and put back to rounding.
        restart: puts all generators into the same state, so that a random loss is one function.
        max_evaluations: about how many to spend.
    """
    exact = objective.in_full_precision()
    if exact.reference is not objective.reference:
        params = {name: p.float() for name, p in params.items()}
        batch = map_tensors(lambda t: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t, batch)
    try:
        return _Comparison(exact, batch, params, restart).run(max_evaluations)
    except _UnknownError:
        return Found()


class _UnknownError(Exception):
    """The loss can't be evaluated as it would have to be: in float32, or finite beside w*."""


class _Comparison:
    def __init__(
        self, objective: Objective, batch: Batch, params: dict[str, Tensor], restart: Callable[[], None]
    ) -> None:
        self._objective, self._batch, self._params, self._restart = objective, batch, params, restart
        self._is_large = sum(p.numel() for p in params.values()) > _LARGE
        self._scales = scales_of(objective.reference)
        self._masks = objective.masks
        self._precision = torch.finfo(next(iter(params.values())).dtype).eps

    def run(self, max_evaluations: int) -> Found:
        found = Found()
        names = list(self._params)
        groups = _split(names, min(_MAX_GROUPS, max(1, max_evaluations // (2 * _EVALUATIONS))))
        self._direction = _Direction(self._params, self._masks, self._scales, seed=0, keep=not self._is_large)
        slopes, sizes, zeros = self._gradient(self._direction)
        total = math.sqrt(sum(size * size for size in sizes.values()))
        suspects = [group for group in groups if not self._agrees(self._direction, group, slopes, sizes)]
        if suspects and not self._is_large:  # which of them, and is it so in other directions?
            suspects = [[name] for group in suspects for name in group]
        for group in suspects:
            votes = 0
            for seed in range(_DIRECTIONS):
                direction = _Direction(self._params, self._masks, self._scales, seed, keep=not self._is_large)
                slopes, sizes, _ = self._gradient(direction)
                votes += not self._agrees(direction, group, slopes, sizes, without=zeros)
            if votes >= 2:
                found.wrong += group
        if zeros:
            found.without_gradient = self._responding(zeros, total)
        return found

    # ---- gradient and differences ------------------------------------------------------------------------------

    def _gradient(self, direction: _Direction) -> tuple[dict[str, float], dict[str, float], dict[str, Tensor]]:
        """By parameter: g·u, what it typically is for a gradient of this size, and where the gradient is zero."""
        slopes, sizes = dict.fromkeys(self._params, 0.0), dict.fromkeys(self._params, 0.0)
        zeros: dict[str, Tensor] = {}
        if not self._is_large:
            zeros = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self._params.items()}

        def take(name: str, grad: Tensor) -> None:
            grad = grad.double()
            slopes[name] += float((grad * direction(name)).sum())
            sizes[name] = math.hypot(sizes[name], self._scales[name] * float(grad.norm()))
            if not self._is_large:
                zeros[name] &= grad == 0

        objective = self._objective
        self._restart()
        try:
            with torch.enable_grad(), objective.holding(self._params, objective.fresh_buffers()):
                loss = objective.loss(_copied(self._batch)).loss
                objective.consume_gradients(loss, take, plain=objective.trial.is_reentrant)
        except RuntimeError as error:
            raise _UnknownError from error
        if not all(map(math.isfinite, sizes.values())):
            raise _UnknownError
        zeros = {name: z & self._masks[name] if name in self._masks else z for name, z in zeros.items()}
        return slopes, sizes, {name: z for name, z in zeros.items() if z.any()}

    def _agrees(
        self,
        direction: _Direction,
        group: Sequence[str],
        slopes: Mapping[str, float],
        sizes: Mapping[str, float],
        without: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Whether gradient and differences agree along the part of a direction that belongs to a group."""
        only = None
        if without is not None:  # elements without a gradient are somebody else's question
            only = {name: ~without[name] for name in group if name in without}
        slope = self._slope(direction, group, only)
        expected = sum(slopes[name] for name in group)
        typical = math.sqrt(sum(sizes[name] ** 2 for name in group))
        return abs(slope.value - expected) <= slope.error + _DISAGREES * typical

    def _slope(self, direction: _Direction, group: Sequence[str], only: Mapping[str, Tensor] | None = None) -> _Slope:
        steps = [_STEP, -_STEP, _STEP / 2, -_STEP / 2]
        losses, place = [], 0.0
        for step in steps:
            self._shift(direction, group, step - place, only)
            place = step
            losses.append(self._loss())
        self._shift(direction, group, -place, only)
        if not all(map(math.isfinite, losses)):
            raise _UnknownError
        wide, narrow = (losses[0] - losses[1]) / (2 * _STEP), (losses[2] - losses[3]) / _STEP
        rounding = _ROUNDING * self._precision * max(map(abs, losses)) / _STEP
        return _Slope(narrow, _CURVED * abs(wide - narrow) + 2 * rounding)

    @torch.no_grad()
    def _shift(
        self, direction: _Direction, group: Sequence[str], step: float, only: Mapping[str, Tensor] | None
    ) -> None:
        for name in group:
            u = direction(name)
            if only is not None and name in only:
                u = u * only[name]
            self._params[name].add_(u.to(self._params[name].dtype), alpha=step)

    def _loss(self) -> float:
        objective = self._objective
        self._restart()
        try:
            with torch.enable_grad():  # the function that chains evaluate
                evaluation = objective.evaluate(self._params, _copied(self._batch), objective.fresh_buffers())
        except RuntimeError as error:
            raise _UnknownError from error
        return float(evaluation.loss.detach().double())

    # ---- elements without a gradient ---------------------------------------------------------------------------

    def _responding(self, zeros: Mapping[str, Tensor], total: float) -> dict[str, Tensor]:
        """Of elements whose gradient is zero, those that the loss depends on."""
        direction = _Direction(self._params, self._masks, self._scales, seed=1, keep=True)
        found: dict[str, Tensor] = {}
        if not self._responds(direction, zeros, total):
            return found
        for name, elements in zeros.items():
            if not self._responds(direction, {name: elements}, total):
                continue
            rows = elements.reshape(len(elements), -1).any(dim=1).nonzero()[:, 0] if elements.ndim else None
            if rows is None or len(rows) == 1 or elements.ndim == 0:
                found[name] = elements
                continue
            responding = self._rows(direction, name, elements, rows, total)
            if responding:
                chosen = torch.zeros_like(elements)
                chosen[torch.tensor(responding, device=elements.device)] = True
                found[name] = chosen & elements
        return found

    def _rows(self, direction: _Direction, name: str, elements: Tensor, rows: Tensor, total: float) -> list[int]:
        """The rows of a parameter that the loss responds to, by halving."""
        waiting, found, looks = [rows], list[int](), 0
        while waiting:
            some = waiting.pop()
            chosen = torch.zeros_like(elements)
            chosen[some] = True
            looks += 1
            if looks > 4 * _MAX_ROWS:  # nearly all of them: a detached weight
                return [int(k) for k in rows]
            if not self._responds(direction, {name: chosen & elements}, total):
                continue
            if len(some) == 1:
                found.append(int(some[0]))
                continue
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
        return found

    def _responds(self, direction: _Direction, elements: Mapping[str, Tensor], total: float) -> bool:
        slope = self._slope(direction, list(elements), elements)
        return abs(slope.value) > slope.error + _RESPONDS * total / math.sqrt(max(1, len(self._params)))


class _Direction:
    """A random direction, in proportion to the size of each parameter; 0 where nothing may move."""

    def __init__(
        self,
        like: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        scales: Mapping[str, float],
        seed: int,
        *,
        keep: bool,
    ) -> None:
        self._like, self._masks, self._scales, self._seed = like, masks, scales, seed
        self._order = {name: k for k, name in enumerate(like)}
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __call__(self, name: str) -> Tensor:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        p = self._like[name]
        generator = torch.Generator().manual_seed(1000 * self._seed + self._order[name])
        u = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
        u *= self._scales[name]
        if name in self._masks:
            u *= self._masks[name]
        if self._kept is not None:
            self._kept[name] = u
        return u


def scales_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The root mean square of each tensor; of all of them where one is zero or nearly."""
    sums = {name: float(t.detach().double().square().sum()) for name, t in tensors.items()}
    count = sum(t.numel() for t in tensors.values())
    whole = math.sqrt(sum(sums.values()) / max(count, 1)) or 1.0
    sizes = {name: math.sqrt(sums[name] / max(t.numel(), 1)) for name, t in tensors.items()}
    return {name: size if size > 1e-3 * whole else whole for name, size in sizes.items()}


def _split(names: list[str], count: int) -> list[list[str]]:
    """`names` in at most `count` consecutive groups of about the same number."""
    count = min(count, len(names))
    return [names[k * len(names) // count : (k + 1) * len(names) // count] for k in range(count)]


def _copied(batch: Batch) -> Batch:
    return map_tensors(torch.clone, batch)
