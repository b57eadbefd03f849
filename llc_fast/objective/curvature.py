"""Curvature of the loss at w*."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llc_fast.batches import map_tensors
from llc_fast.objective.differences import is_large
from llc_fast.objective.objective import Objective, widened

PILOT_BATCHES = 20


def pilot_metric(objective: Objective, options: Mapping[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """The preconditioner p of an adaptive sampler near w*: 1/(√V + eps), V the mean of g² over a few minibatches."""
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in objective.reference.items()}
    gradient = {name: torch.zeros_like(v) for name, v in squares.items()}
    params = objective.reference
    for batch in itertools.islice(objective.source.minibatches(seed), PILOT_BATCHES):
        # Microbatches add up, so the square has to wait for the last.
        objective.gradient_at(params, batch, lambda name, grad: gradient[name].add_(grad))
        for name, square in squares.items():
            square.addcmul_(gradient[name], gradient[name], value=1 / PILOT_BATCHES)
            gradient[name].zero_()
    eps = float(options["eps"])
    if options["relative_eps"]:
        masks = objective.masks
        total = sum(float((v * masks[k] if k in masks else v).double().sum()) for k, v in squares.items())
        eps *= math.sqrt(total / objective.num_parameters)
    return {name: 1 / (v.sqrt() + eps) for name, v in squares.items()}


@torch.no_grad()
def top_curvature(
    objective: Objective,
    *,
    metric: Mapping[str, Tensor | float] | None = None,
    seed: int = 0,
    iterations: int = 12,
    steps_in_metric: bool = False,
) -> float:
    """The largest curvature of the minibatch loss at w*, that is the top eigenvalue of √p·H·√p in the metric 1/p.

    Power iteration on Hessian-vector products, which are central differences of gradients, so that any model that
    trains works; the result is a few percent below the true value, which is precise enough for a step size. Memory
    beside the model: two vectors like w*, and the gradient of one parameter at a time.

    Args:
        objective: the model, its loss and data.
        metric: p for each parameter by name; None: 1.
        seed: of the starting direction and the minibatch.
        iterations: of the power method, two gradients each.
        steps_in_metric: whether differences are as long against w* in the metric, rather than in the Euclidean one, so
            that the result is the same in all parametrizations that the metric follows.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = next(iter(objective.source.minibatches(seed)))
    reference = objective.reference
    scale = math.sqrt(sum(float(p.double().square().sum()) for p in reference.values()))
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in reference.values())
    delta = (1e-1 if low else 1e-3) * max(scale, 1e-3)  # short against w*, long against rounding
    given = {name: 1.0 if metric is None else metric[name] for name in reference}
    roots = {name: in_float32(given[name]).to(p.device).sqrt() for name, p in reference.items()}
    if steps_in_metric:
        scale = math.sqrt(sum(float((p / roots[name]).double().square().sum()) for name, p in reference.items()))
        delta = (1e-1 if low else 1e-3) * scale
    for name, mask in objective.masks.items():
        roots[name] = roots[name] * mask  # elements that can't move have no curvature
    displaced = {name: p.clone() for name, p in reference.items()}
    vector = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float32).to(
            p.device, torch.float64 if p.dtype == torch.float64 else torch.float32
        )
        for name, p in reference.items()
    }

    def norm() -> float:
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in vector.values()])))

    curvature = norm()
    for _ in range(iterations):
        if not 0 < curvature < math.inf:
            break
        length = norm()
        for name, v in vector.items():
            v.mul_(roots[name])
        if not steps_in_metric:
            length = norm()  # steps of length delta in w, whatever the metric's scale
        for name, v in vector.items():
            displaced[name].copy_(reference[name] + (v * (delta / length)).to(reference[name].dtype))
            v.zero_()
        objective.gradient_at(displaced, batch, lambda name, grad: vector[name].add_(grad))
        for name, w in displaced.items():  # to the other side of w*
            w.neg_().add_(reference[name], alpha=2)
        objective.gradient_at(displaced, batch, lambda name, grad: vector[name].sub_(grad))
        for name, v in vector.items():
            v.mul_(roots[name] * (length / curvature / (2 * delta)))
        curvature = norm()
    return curvature


def in_float32(value: Any) -> Tensor:
    """A tensor as it is; a number as float32, whatever torch's default dtype is."""
    return torch.as_tensor(value, dtype=torch.float32 if isinstance(value, (int, float)) else None)


_FLAT = 1e-12
"""Curvature of U where there is none, so that a fall without end is a number."""


@dataclass(frozen=True)
class Descent:
    """The way down from w* in the quadratic model of U = nβ·L + γ/2·‖w − w*‖², in a few directions that go furthest.

    Attributes:
        squares: (g·u)² of the gradient g of L and each direction u, all orthogonal.
        curvatures: uᵀHu, of L.
    """

    squares: tuple[float, ...] = ()
    curvatures: tuple[float, ...] = ()

    def of_posterior(self, nbeta: float, localization: float) -> float:
        """How far U falls: ½·nβ²·Σ(g·u)²/(nβh + γ), that is ½·nβ²·gᵀ(nβH + γ)⁻¹g; 0 at a minimum."""
        return 0.5 * sum(nbeta**2 * square / a for square, a, _ in self._terms(nbeta, localization))

    def of_loss(self, nbeta: float, localization: float) -> float:
        """How far nβ·L falls where U is lowest: by so much λ̂ is too low, as the chains' mean is there."""
        terms = self._terms(nbeta, localization)
        return sum(nbeta**2 * square / a * (1 - 0.5 * nbeta * h / a) for square, a, h in terms)

    def nbeta_for(self, most: float, nbeta: float, localization: float) -> float:
        """The largest nβ, up to the one given, at which U falls by no more than `most`: with it w* is a minimum."""
        low, high = 0.0, nbeta
        for _ in range(60):
            middle = 0.5 * (low + high)
            if self.of_posterior(middle, localization) <= most:
                low = middle
            else:
                high = middle
        return low

    def _terms(self, nbeta: float, localization: float) -> list[tuple[float, float, float]]:
        """(g·u)², nβh + γ and h of each direction; one that leads down without end counts as flat."""
        found = []
        for square, h in zip(self.squares, self.curvatures, strict=True):
            a = nbeta * h + localization
            found.append((square, a, h) if a > 0 else (square, max(localization, _FLAT), 0.0))
        return found


_PART = 1 << 20
_ITERATIONS, _BATCHES, _FEWEST = 10, 4, 3
"""Of conjugate gradients, minibatches at most that their Hessian is that of, and iterations that are worth it."""


@torch.no_grad()
def descent(
    objective: Objective,
    nbeta: float,
    localization: float,
    *,
    max_gradients: float,
    metric: Mapping[str, Tensor] | None = None,
) -> Descent | None:
    """How far U = nβ·L + γ/2·‖w − w*‖² falls from w* in its quadratic model, ½·nβ²·gᵀ(nβH + γ)⁻¹g; 0 at a minimum.

    g is the gradient of L over all data, H its Hessian on a few minibatches. Conjugate gradients (Hestenes & Stiefel
    1952) go the way; each iteration takes them further down, so what a few of them find is a lower bound, and where
    gradients are few, three iterations will do. Chains end up lower by it, and λ̂ is too small by between once and
    twice as much, in the quadratic model. The coefficients are those of Lanczos' recurrence, which knows the fall at
    any nβ and γ. A large model is followed along its gradient alone, which takes no more memory than w* and a chain.

    Args:
        objective: the model, its loss and data.
        nbeta, localization: nβ and γ.
        max_gradients: of minibatches, that it may take.

    Returns:
        None where it can't be had: a gradient over all data and a few iterations would take more, the data have no end,
        the loss or the data are random, the gradient is not finite, or a large model is in another metric.
    """
    source = objective.source
    pieces = source.sampling.num_batches
    if pieces is None or reason_without_gradient(objective):
        return None
    used, left = min(pieces, _BATCHES), (max_gradients - pieces) / 2
    while used > 1 and left < _FEWEST * used:
        used -= 1
    iterations = min(_ITERATIONS, int(left / used))
    if iterations < _FEWEST or (metric is not None and is_large(objective.reference)):
        return None
    slope = gradient_over(objective, objective.reference, None).gradient
    roots = {name: torch.ones(()) if metric is None else metric[name].sqrt() for name in slope}
    if metric is not None:
        slope = {name: roots[name] * g for name, g in slope.items()}
    size = _dot(slope, slope)
    if not 0 < size < math.inf:
        return Descent() if size == 0 else None
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in objective.reference.values())
    lengths = objective.reference
    if metric is not None:
        lengths = {name: w / roots[name] for name, w in lengths.items()}
    scale = math.sqrt(_dot(lengths, lengths))
    delta = (1e-1 if low else 1e-3) * max(scale, 1e-3)  # short against w*, long against rounding
    if is_large(objective.reference):
        return Descent((size,), (_curvature_along(objective, slope, size, delta, used),))

    def curved(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(nβH + γ)·v"""
        step = delta / math.sqrt(_dot(vector, vector))
        ends = []
        for sign in (step, -step):
            there = {
                name: (w + sign * (vector[name] if metric is None else roots[name] * vector[name])).to(w.dtype)
                for name, w in objective.reference.items()
            }
            ends.append(gradient_over(objective, there, used).gradient)
            if metric is not None:
                ends[-1] = {name: roots[name] * g for name, g in ends[-1].items()}
        factor = nbeta / (2 * step)
        return {name: (a - ends[1][name]) * factor + localization * vector[name] for name, a in ends[0].items()}

    residual = {name: nbeta * g for name, g in slope.items()}
    direction, squared = dict(residual), nbeta**2 * size
    diagonal, beside = list[float](), list[float]()  # of the tridiagonal matrix of Lanczos
    before_last = 0.0  # what the step before adds to the next element of the diagonal
    for _ in range(iterations):
        image = curved(direction)
        along = _dot(direction, image)
        if not 0 < along < math.inf:  # a direction that leads down without end, or rounding
            if not diagonal and math.isfinite(along):
                diagonal.append(localization)
            break
        length = squared / along
        diagonal.append(1 / length + before_last)
        residual = {name: r - length * image[name] for name, r in residual.items()}
        before, squared = squared, _dot(residual, residual)
        if squared <= 1e-6 * nbeta**2 * size or len(diagonal) == iterations:
            break
        ratio = squared / before
        beside.append(math.sqrt(ratio) / length)
        before_last = ratio / length
        direction = {name: r + ratio * direction[name] for name, r in residual.items()}
    return _in_directions(diagonal, beside[: len(diagonal) - 1], size, nbeta, localization)


def _curvature_along(
    objective: Objective, slope: dict[str, Tensor], size: float, delta: float, num_pieces: int
) -> float:
    """uᵀHu along u = g/‖g‖, by central differences of gradients, none of which is kept; `slope` is overwritten.

    Where w* and g have one dtype, the displaced parameters take the place of g, which is found again as what they are
    displaced by.
    """
    reference, step = objective.reference, delta / math.sqrt(size)
    together = all(slope[name].dtype == w.dtype for name, w in reference.items())
    place = slope if together else {name: torch.empty_like(w) for name, w in reference.items()}

    def mean_along(direction: Callable[[str], Tensor]) -> float:
        """Of the gradient at the displaced place."""
        total, length = torch.zeros((), dtype=torch.float64, device=objective.device), 0.0
        pieces = itertools.chain(objective.source.full(tail=False), objective.source.tail())
        for batch, weight in itertools.islice(pieces, num_pieces):
            objective.gradient_at(
                place,
                batch,
                lambda name, grad, weight=weight: total.add_(_inner(grad, direction(name)), alpha=weight),  # type: ignore[misc]
            )
            length += weight
        return float(total) / length

    if not together:
        ends = []
        for sign in (step, -step):
            for name, w in reference.items():
                place[name].copy_(w + (sign * slope[name]).to(w.dtype))
            ends.append(mean_along(slope.__getitem__))
        return (ends[0] - ends[1]) / (2 * step * size)
    for name, w in reference.items():
        place[name].mul_(step).add_(w)
    there = mean_along(lambda name: place[name] - reference[name])
    for name, w in reference.items():  # to the other side of w*
        place[name].neg_().add_(w, alpha=2)
    return (there + mean_along(lambda name: place[name] - reference[name])) / (2 * step**2 * size)


def _in_directions(
    diagonal: list[float], beside: list[float], size: float, nbeta: float, localization: float
) -> Descent:
    """The directions of a tridiagonal matrix of nβH + γ that begins with the gradient, of squared length `size`."""
    if not diagonal:
        return Descent()
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        sides = torch.tensor(beside, dtype=torch.float64)
        matrix = matrix + torch.diag(sides, 1) + torch.diag(sides, -1)
    values, vectors = torch.linalg.eigh(matrix)
    curvatures = ((values - localization) / nbeta).tolist()
    return Descent(tuple((size * vectors[0].square()).tolist()), tuple(curvatures))


def reason_without_gradient(objective: Objective) -> str:
    """Why there is no gradient over all data; empty if there is one."""
    sampling, trial = objective.source.sampling, objective.trial
    if sampling.num_batches is None:
        return "the data have no end"
    if trial.is_random:
        return "the loss is random (dropout?)"
    if sampling.reads_randomly or not sampling.is_reproducible:
        return "the data are other ones each time they are read (augmentation?)"
    return "" if sampling.full_is_exact else "a pass over the data is one of many, with other samples"


class Gradient(NamedTuple):
    """Loss and gradient over data, and how many gradients of pieces that took."""

    loss: float
    gradient: dict[str, Tensor]
    num_pieces: int


def gradient_over(
    objective: Objective, params: Mapping[str, Tensor], num_pieces: int | None, *, widen: bool = False
) -> Gradient:
    """The mean over the first pieces of the data, None: all of them; 0 where a mask lets nothing move.

    With `widen`, data in bfloat16 and float16 become float32, as the parameters of an objective in full precision are.
    """
    wide = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in params.items()}
    total = {name: torch.zeros_like(p, dtype=wide[name]) for name, p in params.items()}
    length, loss = 0.0, torch.zeros((), dtype=torch.float64, device=objective.device)
    source, count = objective.source, 0
    pieces = itertools.chain(source.full(tail=False), source.tail())  # none larger than the minibatch of a chain
    for batch, weight in itertools.islice(pieces, num_pieces):
        loss += weight * objective.gradient_at(
            params,
            map_tensors(widened, batch) if widen else batch,
            lambda name, grad, w=weight: total[name].add_(grad, alpha=w),  # type: ignore[misc]
        )
        length, count = length + weight, count + 1
    for name, t in total.items():
        t.div_(length)
        if name in objective.masks:
            t.mul_(objective.masks[name])
    return Gradient(float(loss) / length, total, count)


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float(_inner(x, b[name])) for name, x in a.items())


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """The inner product in float64, by parts: of a large layer there is no copy."""
    parts = zip(*(torch.split(t.reshape(-1), _PART) for t in (x, y)), strict=True)
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in parts]).sum()
