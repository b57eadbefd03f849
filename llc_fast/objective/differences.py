"""Gradients compared with differences of the loss: is what autograd gives the derivative of what is evaluated?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llc_fast.data import Batch, batch_length, leaves, map_tensors
from llc_fast.kernels.native import normals
from llc_fast.kernels.step import NoiseKey
from llc_fast.kernels.streams import TRIAL_STREAM
from llc_fast.support.torch_private import DispatchMode

if TYPE_CHECKING:
    from llc_fast.objective.objective import Objective

_MAX_GROUPS, _MAX_SUSPECTS = 24, 12
_POINTS, _AWAY = 4, 0.05
"""At how many points gradient and differences must disagree, and how far apart these are, relative to the size of each
parameter."""
_PIECE = 2**20
"""Elements that are looked at together in float64."""
_LARGE = 10_000_000
"""Parameters above which nothing is computed in float64, directions are made anew instead of kept, and single elements
are not looked for."""
_FLOPS, _MIN_SAMPLES = 1e9, 8
"""Operations of a gradient above which a part of the minibatch will do, of at least as many samples."""
_MAX_LOOKS = 256


@dataclass
class Found:
    """What differences of the loss have shown.

    Attributes:
        wrong: names of parameters with a gradient that is not the derivative of the loss.
        without_gradient: by name, elements that the loss depends on and whose gradient is zero all the same; boolean.
    """

    wrong: list[str] = field(default_factory=list)
    without_gradient: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Method:
    """How differences are taken.

    Attributes:
        dtype: of everything.
        step: their length, relative to the size of each parameter.
        halves: whether half the length, too, is looked at, to see how curved the loss is.
        rounding: errors of a loss, in units of its precision.
        disagrees: what counts as disagreement, relative to what a gradient of this size gives along such a direction.
        responds: what counts as a response to elements without a gradient, relative to that of all parameters.
    """

    dtype: torch.dtype
    step: float
    halves: bool
    rounding: float
    disagrees: float
    responds: float

    @property
    def evaluations(self) -> int:
        """Of a direction."""
        return 4 if self.halves else 2


# In float64 a difference is so short that curvature and kinks play no part, and that nothing is rounded that quantizes.
_FINE = _Method(torch.float64, step=1e-6, halves=False, rounding=64, disagrees=0.02, responds=1e-3)
_COARSE = _Method(torch.float32, step=1e-2, halves=True, rounding=8, disagrees=0.05, responds=0.02)
_CURVED = 4.0
"""Weight of the difference between the two lengths, which says what curvature and kinks make of a difference."""
_JUMP = 30.0
"""How much steeper than along its gradient a loss with a derivative is nowhere nearby."""
_LITTLE, _NOTHING = 1e-2, 1e-4
"""Parts of the gradient that do not count: a bias before batch normalization has one of rounding errors."""


class _Slope(NamedTuple):
    """The derivative of the loss along a direction, by differences; how far off that may be; the steeper side's."""

    value: float
    error: float
    steepest: float


def compare_with_differences(
    objective: Objective,
    batch: Batch,
    params: Mapping[str, Tensor],
    restart: Callable[[], None],
    max_evaluations: int,
) -> Found:
    """Compare the gradient at `params` with differences of the loss, group by group of parameters.

    Central differences along the gradient and along random directions, at up to four points; what fails at all of them
    is wrong. They are taken in float64, or where the model computes in float32 whatever it is given, in that.

    Args:
        objective: model and loss.
        batch: a minibatch, or the part of it that passes the model at a time.
        params: a point beside w*; those of a large model are moved, and moved back.
        restart: puts all generators into the same state, so that a random loss is one function.
        max_evaluations: about how many to spend.
    """
    is_small = not is_large(params)
    compiled = any(type(m).__name__ == "OptimizedModule" for m in objective.model.modules())
    part = _part_of(batch, objective.trial.flops)
    for method in (_FINE, _COARSE) if is_small and not compiled else (_COARSE,):
        for some in (batch,) if part is None else (part, batch):
            try:
                comparison = _Comparison(objective, some, params, restart, method)
                return comparison.run(max_evaluations)
            except _UnknownError:
                continue
    return Found()


def _part_of(batch: Batch, flops: float) -> Batch | None:
    """The first samples of a batch, if that saves much and they are at hand."""
    length, tensors = batch_length(batch), leaves(batch)
    size = max(_MIN_SAMPLES, int(length * _FLOPS / flops)) if flops > 0 else length
    if size >= length or not all(isinstance(t, Tensor) and t.ndim and len(t) == length for t in tensors):
        return None
    return map_tensors(lambda t: t[:size], batch)


class _UnknownError(Exception):
    """The loss can't be evaluated as it would have to be: in this precision, or finite beside w*."""


class _Comparison:
    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        params: Mapping[str, Tensor],
        restart: Callable[[], None],
        method: _Method,
    ) -> None:
        def cast(t: Tensor) -> Tensor:
            is_coarser = t.is_floating_point() and torch.finfo(t.dtype).eps > torch.finfo(method.dtype).eps
            return t.to(method.dtype) if is_coarser else t

        self._restart, self._method = restart, method
        self._batch = map_tensors(cast, batch)
        # A large model's are moved as they are, to where they were but for rounding: there may be no room for a copy.
        self._is_large = is_large(params)
        self._params = {name: p if self._is_large and cast(p) is p else cast(p).clone() for name, p in params.items()}
        # Which stand for w*, too, whose values nobody asks for here: another copy of a large model may not fit.
        self._objective = objective.in_precision(cast, reference=self._params)
        self._scales = scales_of(objective.reference)
        self._masks = objective.masks
        self._precision = max(torch.finfo(p.dtype).eps for p in self._params.values())
        self._here = math.nan

    def run(self, max_evaluations: int) -> Found:
        names = list(self._params)
        cost = 2 * self._kinds * self._method.evaluations
        suspects = _split(names, min(_MAX_GROUPS, max(1, max_evaluations // cost)))
        random = self._random(0)
        gradient = self._gradient(random)
        if self._method.dtype == torch.float64:
            self._refuse_rounding()
        self._here = self._loss()
        total = math.sqrt(sum(size * size for size in gradient.sizes.values()))
        without = {} if self._is_large or not gradient.zeros else self._responding(gradient.zeros, total)
        failed = [
            (kind, group)
            for kind in range(self._kinds)
            for group in suspects
            if not self._agrees(gradient, group, kind)
        ]
        return Found(self._still_wrong(failed), without)

    @property
    def _kinds(self) -> int:
        """Along random directions, and along the gradient, if there is room to keep it."""
        return 1 if self._is_large else 2

    def _still_wrong(self, failed: list[tuple[int, list[str]]]) -> list[str]:
        """Which parameters disagree at other points, too, in the same kind of direction; kinks are elsewhere there."""
        if not self._is_large:  # which of a group?
            failed = [(kind, [name]) for kind, group in failed for name in group]
            failed = sorted(failed[:_MAX_SUSPECTS], key=lambda entry: entry[1])
        for seed in range(1, _POINTS):
            if not failed:
                break
            away, everything = self._random(_POINTS + seed), list(self._params)
            self._shift(away, everything, _AWAY)
            gradient = self._gradient(self._random(seed))
            self._here = self._loss()
            failed = [(kind, group) for kind, group in failed if not self._agrees(gradient, group, kind)]
            self._shift(away, everything, -_AWAY)
        return list(dict.fromkeys(name for _, group in failed for name in group))

    # ---- gradient and differences ------------------------------------------------------------------------------

    def _random(self, seed: int) -> _Direction:
        return _Random(self._params, self._masks, self._scales, seed, keep=not self._is_large)

    def _gradient(self, random: _Direction) -> _Gradient:
        found = _Gradient(random, dict.fromkeys(self._params, 0.0), dict.fromkeys(self._params, 0.0))

        def take(name: str, grad: Tensor) -> None:
            if name in self._masks:
                grad = grad * self._masks[name]
            found.slopes[name] += _product(grad, random(name))
            norm = norm_and_sum(grad)[0]
            found.sizes[name] = math.hypot(found.sizes[name], self._scales[name] * norm)
            if not self._is_large:
                found.parts[name] = found.parts[name] + grad if name in found.parts else grad

        objective = self._objective
        self._restart()
        with _unknown_if_it_fails(), torch.enable_grad(), objective.holding(self._params, objective.fresh_buffers()):
            loss = objective.loss(copied(self._batch)).loss
            if objective.trial.is_reentrant:  # which gives gradients in several parts
                for name, grad in zip(objective.reference, objective.gradients(loss), strict=True):
                    take(name, grad)
            else:
                objective.consume_gradients(loss, take)
        if not all(map(math.isfinite, found.sizes.values())):
            raise _UnknownError
        if not self._is_large:
            for name, p in self._params.items():
                zero = found.parts[name] == 0 if name in found.parts else torch.ones_like(p, dtype=torch.bool)
                zero = zero & self._masks[name] if name in self._masks else zero
                if zero.any():
                    found.zeros[name] = zero
        return found

    def _agrees(self, gradient: _Gradient, group: Sequence[str], kind: int) -> bool:
        """Whether gradient and differences agree along the part of a direction that belongs to a group.

        Elements without a gradient are somebody else's question.
        """
        group = [name for name in group if gradient.sizes[name] > 0]
        if not group:
            return True
        slopes = {k: size * math.sqrt(self._params[k].numel()) for k, size in gradient.sizes.items()}  # along g
        whole = math.hypot(*slopes.values())
        if kind == 0:
            only = {name: ~gradient.zeros[name] for name in group if name in gradient.zeros}
            slope = self._slope(gradient.random, group, only)
            expected = sum(gradient.slopes[name] for name in group)
            typical = math.sqrt(sum(gradient.sizes[name] ** 2 for name in group))
        else:
            slope = self._slope(_Along(gradient.parts, self._scales), group)
            typical = expected = sum(slopes[name] for name in group)
        steepest = max(math.hypot(*(slopes[name] for name in group)), _LITTLE * whole)
        rounding = 4 * self._method.rounding * self._precision * abs(self._here) / self._method.step
        if not self._method.halves and slope.steepest > _JUMP * steepest + rounding:
            return False  # something is rounded on the way to the loss
        return abs(slope.value - expected) <= slope.error + self._method.disagrees * max(typical, _NOTHING * whole)

    def _slope(self, direction: _Direction, group: Sequence[str], only: Mapping[str, Tensor] | None = None) -> _Slope:
        h, place, losses = self._method.step, 0.0, []
        for step in (h, -h, h / 2, -h / 2)[: self._method.evaluations]:
            self._shift(direction, group, step - place, only)
            place = step
            losses.append(self._loss())
        self._shift(direction, group, -place, only)
        if not all(map(math.isfinite, losses)):
            raise _UnknownError
        wide, steepest = (losses[0] - losses[1]) / (2 * h), max(abs(loss - self._here) for loss in losses[:2]) / h
        rounding = 4 * self._method.rounding * self._precision * max(map(abs, losses)) / h
        turn = losses[0] + losses[1] - 2 * self._here
        if not self._method.halves:
            return _Slope(wide, abs(turn) / h + rounding, steepest)
        # Where a kink is at this very point, both are the mean of the slopes on its two sides. These differ, and do so
        # at half the length as much as at the whole; what curvature makes them differ by is half as much then.
        narrow = (losses[2] - losses[3]) / h
        kink = abs(4 * (losses[2] + losses[3] - 2 * self._here) - turn) / h
        return _Slope(narrow, _CURVED * abs(wide - narrow) + kink + rounding, steepest)

    @torch.no_grad()
    def _shift(
        self, direction: _Direction, group: Sequence[str], step: float, only: Mapping[str, Tensor] | None = None
    ) -> None:
        for name in group:
            u = direction(name)
            if only is not None and name in only:
                u = u * only[name]
            self._params[name].add_(u.to(self._params[name].dtype), alpha=step)

    def _loss(self) -> float:
        objective = self._objective
        self._restart()
        with _unknown_if_it_fails(), torch.enable_grad():  # the function that chains evaluate
            evaluation = objective.evaluate(self._params, copied(self._batch), objective.fresh_buffers())
        return float(evaluation.loss.detach().double())

    def _refuse_rounding(self) -> None:
        """Raise _UnknownError if something on the way to the loss is computed in less precision than it is given."""
        with _unknown_if_it_fails(), (watch := _Rounding()):
            self._loss()
        if watch.has_rounded:
            raise _UnknownError

    # ---- elements without a gradient ---------------------------------------------------------------------------

    def _responding(self, zeros: Mapping[str, Tensor], total: float) -> dict[str, Tensor]:
        """Of elements whose gradient is zero, those that the loss depends on."""
        direction, found = self._random(1), dict[str, Tensor]()
        if not self._responds(direction, zeros, total):
            return found
        for name, elements in zeros.items():
            if not self._responds(direction, {name: elements}, total):
                continue
            rows = elements.reshape(len(elements), -1).any(dim=1).nonzero()[:, 0] if elements.ndim else None
            if rows is None or len(rows) == 1:
                found[name] = elements
            elif responding := self._rows(direction, name, elements, rows, total):
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
            if looks > _MAX_LOOKS:  # nearly all of them: a detached weight
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
        least = self._method.responds * total / math.sqrt(max(1, len(self._params)))
        return abs(slope.value) > slope.error + least


_Direction = Callable[[str], Tensor]
"""By the name of a parameter: how it moves, in proportion to its size."""


@dataclass
class _Gradient:
    """A gradient g at one point.

    Attributes:
        random: a direction u.
        slopes: g·u by parameter.
        sizes: what g·u typically is along a random direction.
        parts: g itself, unless the model is large.
        zeros: where g is zero and may move, for parameters where it is somewhere.
    """

    random: _Direction
    slopes: dict[str, float]
    sizes: dict[str, float]
    parts: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)


class _Random:
    """A random direction; 0 where nothing may move."""

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
        if self._kept is None:
            u = normals_like(p, self._seed, self._order[name]).to(p.dtype)
        else:
            generator = torch.Generator().manual_seed(1000 * self._seed + self._order[name])
            u = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
        u *= self._scales[name]
        if name in self._masks:
            u *= self._masks[name]
        if self._kept is not None:
            self._kept[name] = u
        return u


class _Along:
    """The direction of a gradient, as long as a random one."""

    def __init__(self, parts: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        self._parts, self._scales = parts, scales

    def __call__(self, name: str) -> Tensor:
        grad = self._parts[name]
        norm = norm_and_sum(grad)[0]
        return grad * (self._scales[name] * math.sqrt(grad.numel()) / norm) if norm > 0 else grad


class _Rounding(DispatchMode):
    """Sees whether float64 becomes something less precise."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_rounded = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if any(t.dtype in _ROUNDED for t in leaves(out) if isinstance(t, Tensor)):
            given = (t for t in leaves([args, kwargs or {}]) if isinstance(t, Tensor))
            self.has_rounded |= any(t.dtype == torch.float64 for t in given)
        return out


_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


class _unknown_if_it_fails:  # noqa: N801
    """Where the user's functions are called with what they were not made for; what they raise tells nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and issubclass(kind, Exception) and not issubclass(kind, _UnknownError):
            raise _UnknownError from error


def _product(a: Tensor, b: Tensor) -> float:
    """Σab in float64, piece by piece: a copy of the largest gradient may not fit."""
    pieces = zip(torch.split(a.reshape(-1), _PIECE), torch.split(b.reshape(-1), _PIECE), strict=True)
    return float(torch.stack([torch.dot(x.double(), y.double()) for x, y in pieces]).sum())


def norm_and_sum(t: Tensor) -> tuple[float, float]:
    """‖t‖ and Σt in float64, piece by piece: on a CPU torch makes a copy in float64 of all it sums."""
    pieces = torch.split(t.detach().reshape(-1), _PIECE)
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in pieces])
    sums = torch.stack([x.sum(dtype=torch.float64) for x in pieces])
    return float(torch.linalg.vector_norm(norms)), float(sums.sum())


def is_large(tensors: Mapping[str, Tensor]) -> bool:
    """Whether memory and the time that random numbers take count: with so many elements."""
    return sum(t.numel() for t in tensors.values()) > _LARGE


def normals_like(p: Tensor, seed: int, place: int) -> Tensor:
    """Standard normals of p's shape in float32, made where p is, the same on every device; for large models.

    torch's generator on the host, the same everywhere too, makes 10⁸ in a second and a half, and is asked for many.
    """
    return normals(0, p.numel(), NoiseKey(seed, place, stream=TRIAL_STREAM), device=p.device).view(p.shape)


def scales_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The root mean square of each tensor; of all of them where one is zero or nearly."""
    sums = {name: norm_and_sum(t)[0] ** 2 for name, t in tensors.items()}
    count = sum(t.numel() for t in tensors.values())
    whole = math.sqrt(sum(sums.values()) / max(count, 1)) or 1.0
    sizes = {name: math.sqrt(sums[name] / max(t.numel(), 1)) for name, t in tensors.items()}
    return {name: size if size > 1e-3 * whole else whole for name, size in sizes.items()}


def _split(names: list[str], count: int) -> list[list[str]]:
    """`names` in at most `count` consecutive groups of about the same number."""
    count = min(count, len(names))
    return [names[k * len(names) // count : (k + 1) * len(names) // count] for k in range(count)]


def copied(batch: Batch) -> Batch:
    """A batch that the user's functions may write to; tensors are no part of another graph."""
    copy_of: Batch = copy.deepcopy(map_tensors(torch.detach, batch))
    return copy_of
