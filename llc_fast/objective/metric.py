"""A diagonal metric from the curvature at w*, which follows every rescaling of the parameters without knowing of it.

Let w' = D·w, D diagonal and positive, be other parameters of the same function: a ReLU unit whose incoming weights are
multiplied by a and whose outgoing weights are divided by it, the queries and keys of a head, what a normalization
divides out. The diagonal of the curvature then is h' = h/D². So A = 1/h follows, A' = D²·A, and Langevin dynamics in
that metric, with the localization in it too, is the same in either parametrization.

    A_i = 1/(h_i + d_i)

h is the diagonal of the Gauss–Newton matrix JᵀBJ, with J the derivative of the model's outputs and B the second
derivative of the loss in these. It is estimated as the mean of (Jᵀu)² over random directions u of covariance B in
output space, a backward pass each: never negative, and exactly equivariant for the same u, as outputs know nothing of
D. At a perfect fit it is the Hessian's. It asks nothing of single samples: batch statistics are differentiated as they
are.

d keeps A finite where data say nothing, by what else transforms as it should: w*² itself. With s² a weight's scale,

    d_i = η·c/s_i²,        c the mean of h·w*² over the elements that have h > 0, which no rescaling changes.

A weight may be near 0 by chance, which says nothing of its scale. So the s² of a matrix or a kernel is a factor for its
row times one for its column: those by which w*² must be divided to have rows and columns of mean 1 (Sinkhorn & Knopp
1967), and that is equivariant for rescalings of rows and columns, which are all that functions know. A bias is damped
in the same proportion as its row; that of a normalization has the scale of its gain. Other vectors have w*² itself, and
d is at most h, so that an element of 0 stays free to move.

Some elements do nothing by symmetry, such as the bias of keys before a softmax, and their gradients are rounding. These
are found by a few directions at w*·(1 ± a few roundings): what is another number there has h = 0. Elements whose h and
s² are both 0 have no scale at all. They get the geometric mean of A over their tensor, or over the model, which is not
equivariant, and are counted.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llc_fast.batches import Batch
from llc_fast.kernels.native import normals
from llc_fast.kernels.step import NoiseKey
from llc_fast.kernels.streams import METRIC_STREAM
from llc_fast.objective.curvature import in_float32
from llc_fast.objective.objective import Objective
from llc_fast.samplers.base import Sampler

PROBES = 64
"""Random directions, a gradient each: h is known to 18 %."""
DAMPING = 0.01
"""η."""
_TRIED, _AGREEING = 8, 6
"""Directions that are tried again beside w*, and how many must agree for a gradient to be one."""
_WIDE, _LOW = (4, 0.1), (1, 0.3)
"""How far beside w*, in roundings of float32 or float64, and to what share gradients must agree; in lower precision."""
METRIC_GRADIENTS = PROBES + 2 * _TRIED
"""What the metric takes, usually."""
_SEED = 0
"""A belongs to model and data: runs of other seeds sample the same posterior."""
_MOST_BLOCK = 64
"""Outputs of a sample up to which its block of B is computed and decomposed."""
_DIAGONAL_PROBES = 8
_SWEEPS, _SETTLED = 200, 1e-9
"""Of Sinkhorn's scaling: sweeps at most, and the relative change that ends them."""
_IN_FLOAT64 = 1 << 22
"""Elements of a tensor up to which its scale is computed in float64."""


@dataclass(frozen=True)
class CurvatureMetric:
    """What :func:`curvature_metric` found.

    Attributes:
        preconditioner: A > 0 by parameter, in float32, or float64 for parameters in it.
        norm: the root of w*ᵀA⁻¹w* over the elements that are sampled.
        method: ``"gauss-newton"``, ``"fisher"`` or ``"hutchinson"``.
        undetermined: elements that have neither curvature nor scale.
        gradients: of minibatches, that it took.
    """

    preconditioner: dict[str, Tensor]
    norm: float
    method: str
    undetermined: int
    gradients: int


def curvature_metric(objective: Objective, *, probes: int = PROBES, damping: float = DAMPING) -> CurvatureMetric:
    """A = 1/(h + d) at w*, see above.

    Where the model's outputs can't be told from the rest (a loss that reads parameters, or calls the model in parts), h
    is the absolute value of the Hessian's diagonal by Hutchinson's estimator, with probes as long as the weights'
    scales, which is equivariant too, and much noisier. Where the loss has no curvature in outputs, B is that of
    gradients: the empirical Fisher matrix.

    Args:
        objective: model, loss and data.
        probes: random directions.
        damping: η.

    Raises:
        ValueError: there is no curvature at w*.
    """
    method, gradients = "gauss-newton", probes + 2 * _TRIED
    with objective.generators.kept():
        objective.generators.seed(_SEED)
        try:
            squares, method = _gauss_newton(objective, probes)
        except _NoOutputError:
            squares, method, gradients = _hutchinson(objective, probes), "hutchinson", 2 * probes
    return _finished(objective, squares, damping, method, gradients)


def metric_of(sampler: Sampler, objective: Objective) -> dict[str, Tensor]:
    """A of each parameter, of a sampler in a metric that is given."""
    given = vars(sampler)["preconditioner"]
    return {
        name: in_float32(given[name] if isinstance(given, Mapping) else given).to(w.device)
        for name, w in objective.reference.items()
    }


def metric_norm(objective: Objective, metric: Mapping[str, Tensor]) -> float:
    """√(w*ᵀA⁻¹w*) over the elements that are sampled, the length that :func:`llc_fast.default_localization` takes."""
    total = 0.0
    for name, w in objective.reference.items():
        terms = w.double().square() / metric[name].double()
        if name in objective.masks:
            terms = terms * objective.masks[name]
        total += float(terms.sum(dtype=torch.float64))
    return math.sqrt(total)


# ---- scales ------------------------------------------------------------------------------------------------


@torch.no_grad()
def _scale(w: Tensor) -> Tensor:
    """s², of the shape of `w` or one that broadcasts to it; 0: none."""
    wide = torch.float64 if w.numel() <= _IN_FLOAT64 else torch.float32
    squares = w.to(wide).square()
    if w.ndim < 2:
        return squares
    kernel = tuple(range(2, w.ndim))
    matrix = squares.mean(dim=kernel) if kernel else squares
    scaled = _row_times_column(matrix)
    return scaled.reshape(*scaled.shape, *[1] * len(kernel))


def _row_times_column(squares: Tensor) -> Tensor:
    """The matrix u·vᵀ for which the quotients have rows and columns of mean 1, where these are not all 0."""
    tolerance = _SETTLED if squares.dtype == torch.float64 else 1e-5

    def inverse(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, math.inf).reciprocal()

    rows = squares.shape[0] / (squares > 0).any(dim=1).sum().clamp(min=1)  # those that are all 0 don't count
    columns = squares.shape[1] / (squares > 0).any(dim=0).sum().clamp(min=1)
    v = squares.mean(dim=0) * rows
    u = squares.new_ones(len(squares))
    for _ in range(_SWEEPS):
        before = u
        u = (squares @ inverse(v)) / squares.shape[1] * columns
        v = (squares.T @ inverse(u)) / squares.shape[0] * rows
        change = (u - before).abs() <= tolerance * u
        if bool(change.all()):
            break
    return u[:, None] * v


@torch.no_grad()
def _finished(
    objective: Objective,
    curvature: dict[str, Tensor],
    damping: float,
    method: str,
    gradients: int,
) -> CurvatureMetric:
    """A of h."""
    total, count = 0.0, 0
    for name, h in curvature.items():
        w, seen = objective.reference[name], h > 0
        if name in objective.masks:
            seen &= objective.masks[name]
        total += float((h * w.to(h.dtype).square() * seen).sum(dtype=torch.float64))
        count += int(seen.sum())
    if not count or not math.isfinite(total):
        what = "no curvature" if not count else "a curvature that is not finite"
        raise ValueError(
            f'preconditioner="curvature" is not possible here: the loss has {what} at w*. Use sampler="sgld", or pass '
            "a preconditioner"
        )
    common = damping * (total / count)
    proportions = _proportions(objective, curvature)
    found: dict[str, Tensor] = {}
    undetermined, unknown = 0, list[str]()
    logs, known_count = 0.0, 0
    for name, w in objective.reference.items():
        h, seen = curvature[name], curvature[name] > 0
        extra = (common / _scale(w)).to(h.dtype)  # infinite where there is no scale
        if (like := proportions.get(name)) is not None:
            extra = torch.where(seen & (like > 0), h * (common / like).to(h.dtype), extra)
        elif w.ndim < 2:
            gain = _gain_of(objective, name)
            extra = torch.where(seen, torch.minimum(extra, h), extra) if gain is None else common / gain.to(h.dtype)
        extra = torch.where(seen & ~torch.isfinite(extra), h, extra)
        metric = 1 / (h + extra)
        is_known = torch.isfinite(metric) & (metric > 0)
        log = torch.where(is_known, metric, 1.0).log().sum(dtype=torch.float64)
        number = int(is_known.sum())
        logs, known_count = logs + float(log), known_count + number
        if number < metric.numel():
            undetermined += metric.numel() - number
            if number:
                metric = torch.where(is_known, metric, float((log / number).exp()))
            else:
                unknown.append(name)
        found[name] = metric
    for name in unknown:
        found[name] = torch.full_like(found[name], math.exp(logs / known_count))
    return CurvatureMetric(found, metric_norm(objective, found), method, undetermined, gradients)


_COLUMNS_FIRST = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
"""Modules whose outputs are the second dimension of their weights; the first of these is Hugging Face's."""


def _weight_of(objective: Objective, name: str) -> str | None:
    """The weight beside a bias, if it is sampled too."""
    path, _, last = name.rpartition(".")
    weight = f"{path}.weight" if path else "weight"
    return weight if last == "bias" and weight in objective.reference else None


def _proportions(objective: Objective, curvature: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the bias of a matrix or a kernel the mean of h·s² over each of its rows, which no rescaling changes."""
    found = {}
    for name, b in objective.reference.items():
        weight = _weight_of(objective, name)
        if weight is None or b.ndim != 1 or (w := objective.reference[weight]).ndim < 2:
            continue
        path = weight.rpartition(".")[0]
        rows = 1 if type(objective.model.get_submodule(path)).__name__ in _COLUMNS_FIRST else 0
        if w.shape[rows] == len(b):
            terms = curvature[weight] * _scale(w).to(curvature[weight].dtype)
            found[name] = terms.mean(dim=[d for d in range(w.ndim) if d != rows])
    return found


def _gain_of(objective: Objective, name: str) -> Tensor | None:
    """The squares of the gains beside a normalization's bias, where none is 0."""
    weight = _weight_of(objective, name)
    if weight is None or objective.reference[weight].shape != objective.reference[name].shape:
        return None
    squares = _scale(objective.reference[weight])
    return squares if bool((squares > 0).all()) else None


# ---- curvature in outputs ----------------------------------------------------------------------------------


class _NoOutputError(Exception):
    """The loss does not depend on the parameters through outputs that can be had."""


def _gauss_newton(objective: Objective, probes: int) -> tuple[dict[str, Tensor], str]:
    """The diagonal of JᵀBJ, mean over minibatches, and what B is.

    Raises:
        _NoOutputError: see there.
    """
    squares = _zeros(objective)
    parts = _zeros(objective) if objective.trial.is_reentrant else None  # whose gradients come in several parts
    numbers = _Numbers()
    method = "gauss-newton"
    noise = _Rounding(objective)
    count = 0
    for batch in itertools.islice(objective.source.minibatches(_SEED), probes):
        if count < _TRIED:
            noise.look(batch, numbers)
        for piece, share in objective.pieces(copy.deepcopy(batch) if objective.trial.writes_batch else batch):

            def square(name: str, grad: Tensor) -> None:
                squares[name].addcmul_(grad.to(squares[name].dtype), grad.to(squares[name].dtype))

            def add(name: str, grad: Tensor) -> None:
                assert parts is not None
                parts[name] += grad

            take = square if parts is None else add
            is_fisher = _along_direction(objective, objective.reference, piece, share, numbers, take)
            method = "fisher" if is_fisher else method
            for name, part in (parts or {}).items():
                square(name, part)
                part.zero_()
        count += 1
    if not count:
        raise _NoOutputError
    noise.remove_from(squares)
    return {name: square.div_(count) for name, square in squares.items()}, method


def _along_direction(
    objective: Objective,
    params: Mapping[str, Tensor],
    batch: Batch,
    share: float,
    numbers: _Numbers,
    take: Callable[[str, Tensor], object],
) -> bool:
    """Hand Jᵀu for one random u to `take`, as it comes; whether B was that of gradients."""
    with torch.enable_grad(), objective.holding(params, objective.fresh_buffers()):
        seen = _outputs_and_loss(objective, batch, share)
        directions, is_fisher = _directions(seen, numbers, share)
        along = torch.stack([(z * u).sum() for z, u in zip(seen.outputs, directions, strict=True)]).sum()
        objective.consume_gradients(along, take, plain=objective.trial.is_reentrant)
    return is_fisher


class _Rounding:
    """Which gradients are nothing but rounding: they are others at w*·(1 ± a few roundings)."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._tried = objective, 0
        self._agreeing = {name: torch.zeros_like(w, dtype=torch.int8) for name, w in objective.reference.items()}
        roundings, self._apart = _WIDE if objective.is_precise else _LOW
        generator = torch.Generator().manual_seed(_SEED)
        self._beside = {}
        for name, w in objective.reference.items():
            signs = torch.randint(0, 2, w.shape, generator=generator).to(w.device, w.dtype) * 2 - 1
            self._beside[name] = w + signs * (roundings * torch.finfo(w.dtype).eps) * w

    def look(self, batch: Batch, numbers: _Numbers) -> None:
        """Compare the gradients of one direction; the next one is the same."""
        objective, first = self._objective, numbers.count
        kept = objective.generators.states()
        here = _zeros(objective)
        there = _zeros(objective) if objective.trial.is_reentrant else None
        sides = ((objective.reference, here), (self._beside, there))
        for params, sums in sides:
            numbers.count = first
            objective.generators.restore(kept)

            def take(name: str, grad: Tensor, sums: dict[str, Tensor] | None = sums) -> None:
                if sums is None:
                    self._compare(name, here[name], grad)
                else:
                    sums[name] += grad

            piece = objective.pieces(copy.deepcopy(batch) if objective.trial.writes_batch else batch)[0]
            _along_direction(objective, params, *piece, numbers, take)
        if there is not None:
            for name, grad in there.items():
                self._compare(name, here[name], grad)
        numbers.count = first
        objective.generators.restore(kept)
        self._tried += 1

    def _compare(self, name: str, here: Tensor, there: Tensor) -> None:
        size = torch.maximum(here.abs(), there.abs().to(here.dtype))
        self._agreeing[name] += ((here - there).abs() <= self._apart * size).to(torch.int8)

    def remove_from(self, squares: Mapping[str, Tensor]) -> None:
        """0 where there is rounding alone."""
        for name, square in squares.items():
            square *= self._agreeing[name] >= _AGREEING / _TRIED * self._tried


def _zeros(objective: Objective) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(
            w,
            dtype=torch.float64 if w.dtype == torch.float64 else torch.float32,
            memory_format=torch.contiguous_format,
        )
        for name, w in objective.reference.items()
    }


class _Seen(NamedTuple):
    """What the model gives to the loss, with its graph; the same where the loss begins; and the loss."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    loss: Tensor


def _outputs_and_loss(objective: Objective, batch: Batch, share: float) -> _Seen:
    """The tensors that the model gives to the loss, with their graph, and the loss as a function of them alone.

    Raises:
        _NoOutputError: there are none, or the loss depends on the parameters otherwise, too.
    """
    if objective.uses_own_loss:
        return _inner_outputs(objective, batch, share)
    outputs, inputs = list[Tensor](), list[Tensor]()

    def cut(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() and tensor.requires_grad):
            return tensor
        outputs.append(tensor)
        inputs.append(tensor.detach().requires_grad_())
        return inputs[-1]

    def hook(module: object, args: object, output: Any) -> Any:
        try:
            return _mapped(cut, output)
        except Exception:  # a container that can't be made anew stays, and the loss is seen to go past what was cut
            return output

    handle = objective.model.register_forward_hook(hook)
    try:
        loss = objective.loss(batch, share).loss
    finally:
        handle.remove()
    if not inputs or not loss.requires_grad:
        raise _NoOutputError
    if any(g is not None for g in torch.autograd.grad(loss, objective.targets, retain_graph=True, allow_unused=True)):
        raise _NoOutputError
    used = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    kept = [k for k, g in enumerate(used) if g is not None]
    if not kept:
        raise _NoOutputError
    return _Seen([outputs[k] for k in kept], [inputs[k] for k in kept], loss)


def _inner_outputs(objective: Objective, batch: Batch, share: float) -> _Seen:
    """Of a model that takes its own loss: the one tensor among its outputs that all of the loss goes through."""
    found = list[Any]()
    handle = objective.model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        loss = objective.loss(batch, share).loss
    finally:
        handle.remove()
    candidates = list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.requires_grad and tensor.ndim:
            candidates.append(tensor)
        return tensor

    _mapped(keep, found)
    targets = objective.targets
    wanted = torch.autograd.grad(loss, targets, retain_graph=True, materialize_grads=True)
    coarse = any(w.dtype in (torch.bfloat16, torch.float16) for w in targets) or not objective.is_precise
    for z in candidates:
        (slope,) = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
        if slope is None:
            continue
        through = torch.autograd.grad(z, targets, slope, retain_graph=True, materialize_grads=True)
        size = sum(float(g.square().sum(dtype=torch.float64)) for g in wanted)
        rest = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(wanted, through, strict=True))
        if size > 0 and rest <= (1e-2 if coarse else 1e-6) * size:
            return _Seen([z], [z], loss)
    raise _NoOutputError


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A container with its tensors replaced; one of an unknown kind as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):  # outputs of Hugging Face's models
        changed = {name: _mapped(function, entry) for name, entry in vars(value).items()}
        return type(value)(**changed) if changed else value
    if isinstance(value, Mapping):
        return {name: _mapped(function, entry) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(function, entry) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, entry) for entry in value)
    return value


def _directions(seen: _Seen, numbers: _Numbers, share: float) -> tuple[list[Tensor], bool]:
    """Random u for each output, of covariance B, and whether that is of gradients."""
    slopes = torch.autograd.grad(seen.loss, seen.inputs, create_graph=True)
    found, is_fisher = list[Tensor](), False
    for z, slope in zip(seen.inputs, slopes, strict=True):

        def curved(v: Tensor, z: Tensor = z, slope: Tensor = slope) -> Tensor:
            if not slope.requires_grad:
                return torch.zeros_like(z)
            (image,) = torch.autograd.grad(slope, z, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(z) if image is None else image.detach()

        u = _direction(z.detach(), curved, numbers)
        if u is None:  # the loss is straight there
            is_fisher = True
            samples = len(z) if z.ndim else 1
            signs = numbers.signs((samples, *[1] * (z.ndim - 1)) if z.ndim else (), z)
            u = slope.detach() * signs * math.sqrt(samples / share)
        found.append(u.to(z.dtype))
    return found, is_fisher


class _Numbers:
    """Random numbers one after another, the same on every device.

    Attributes:
        count: of tensors that were made.
    """

    def __init__(self) -> None:
        self.count = 0

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = NoiseKey(_SEED, step=self.count, stream=METRIC_STREAM)
        self.count += 1
        return normals(0, math.prod(shape), key, dtype=wide, device=like.device).view(tuple(shape))

    def signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.where(self.normal(shape, like) < 0, -1.0, 1.0).to(like.dtype)


@torch.no_grad()
def _direction(z: Tensor, curved: Callable[[Tensor], Tensor], numbers: _Numbers) -> Tensor | None:
    """A random u of covariance B, the second derivative of the loss at outputs z; None: B is 0.

    B has no entries between samples. If it is diagonal (squared errors, binary cross-entropies), or that of a softmax
    along a dimension (cross-entropies, divergences), as two probes show, u is made by formula. Otherwise B is
    decomposed for each sample; of many outputs its diagonal alone is taken.
    """
    tolerance = 1e-3 if z.dtype in (torch.float32, torch.float64) else 3e-2
    first, second = (numbers.signs(z.shape, z) for _ in range(2))
    noise, (image, other) = (
        numbers.normal(z.shape, z),
        (curved(v).to(torch.float32).to(z.dtype) for v in (first, second)),
    )
    noise = noise.to(z.dtype) if z.dtype == torch.float64 else noise
    size = float(torch.linalg.vector_norm(image.double()))
    if size == 0 or not math.isfinite(size):
        return None
    diagonal = image * first
    if float(torch.linalg.vector_norm((diagonal - other * second).double())) <= tolerance * size:
        return diagonal.clamp(min=0).sqrt() * noise
    dims = [dim for dim in dict.fromkeys((z.ndim - 1, 1)) if 0 < dim < z.ndim]
    if dims:
        v = numbers.normal(z.shape, z)  # not of signs: where these are all the same a softmax gives 0
        image = curved(v.to(z.dtype)).to(v.dtype)
        size = float(torch.linalg.vector_norm(image.double()))
    for dim in dims:
        p = torch.softmax(z.to(v.dtype), dim)
        pattern = p * v - p * (p * v).sum(dim, keepdim=True)
        products, squares = ((x * pattern).sum(dim, keepdim=True) for x in (image, pattern))
        # Where nearly all of p is one class what is left is rounding, and the common factor is as good.
        is_clear = squares > 1e-6 * (p * v).square().sum(dim, keepdim=True)
        common = products.sum() / squares.sum().clamp(min=torch.finfo(p.dtype).tiny)
        weight = torch.where(is_clear, products / torch.where(is_clear, squares, 1), common)
        if float(torch.linalg.vector_norm((image - weight * pattern).double())) <= tolerance * size:
            root = p.sqrt() * noise
            return weight.clamp(min=0).sqrt() * (root - p * root.sum(dim, keepdim=True))
    samples = len(z)
    outputs = z.numel() // max(samples, 1)
    if outputs <= _MOST_BLOCK:
        columns = []
        for k in range(outputs):
            unit = torch.zeros(samples, outputs, dtype=z.dtype, device=z.device)
            unit[:, k] = 1
            columns.append(curved(unit.view_as(z)).reshape(samples, outputs).double())
        block = torch.stack(columns, dim=2)
        values, vectors = torch.linalg.eigh((block + block.mT) / 2)
        mixed = values.clamp(min=0).sqrt() * noise.reshape(samples, outputs).double()
        found: Tensor = (vectors @ mixed[:, :, None]).reshape(z.shape)
        return found
    total = diagonal + other * second
    for _ in range(_DIAGONAL_PROBES - 2):
        v = numbers.signs(z.shape, z)
        total = total + v * curved(v)
    return (total / _DIAGONAL_PROBES).clamp(min=0).sqrt() * noise


# ---- without outputs ---------------------------------------------------------------------------------------


@torch.no_grad()
def _hutchinson(objective: Objective, probes: int) -> dict[str, Tensor]:
    """|mean of z·(H·sz)|/s over signs z, by central differences of gradients along s·z.

    s·z goes with D as w does, so that (sz)·(H·sz) is the same in all parametrizations, and h = that over s² follows.
    """
    generator = torch.Generator().manual_seed(_SEED)
    lengths = {}
    for name, w in objective.reference.items():
        s = _scale(w).sqrt()
        typical = s[s > 0].mean() if (s > 0).any() else torch.ones((), dtype=s.dtype, device=s.device)
        lengths[name] = torch.where(s > 0, s, typical).to(w.device)
    low = any(w.dtype in (torch.bfloat16, torch.float16) for w in objective.reference.values())
    delta = 1e-1 if low else 1e-3
    totals, vector = _zeros(objective), _zeros(objective)
    displaced = {name: w.clone() for name, w in objective.reference.items()}
    count = 0
    for batch in itertools.islice(objective.source.minibatches(_SEED), probes):
        steps = {}
        for name, w in objective.reference.items():
            signs = torch.randint(0, 2, w.shape, generator=generator).to(w.device, totals[name].dtype) * 2 - 1
            steps[name] = (signs * lengths[name].to(signs.dtype)) * (objective.masks.get(name, 1))
            displaced[name].copy_(w + (delta * steps[name]).to(w.dtype))
            vector[name].zero_()
        objective.gradient_at(displaced, batch, lambda name, grad: vector[name].add_(grad))
        for name, w in objective.reference.items():
            displaced[name].copy_(w - (delta * steps[name]).to(w.dtype))
        objective.gradient_at(displaced, batch, lambda name, grad: vector[name].sub_(grad))
        for name, total in totals.items():
            total.addcmul_(vector[name], steps[name], value=1 / (2 * delta))
        count += 1
    return {
        name: total.abs_().div_(lengths[name].square().to(total.dtype) * max(count, 1))
        for name, total in totals.items()
    }
