"""The Gauss–Newton matrix of the loss, as Kronecker factors for the weights that modules apply as matrices."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llc_fast.objective.objective import Objective
from llc_fast.samplers.kronecker import Factors, may_be_matrices
from llc_fast.stats.wells import Wells

NUM_BATCHES = 4
"""Minibatches that take turns."""
_ROWS = 4096
"""Inputs of a module (samples, tokens, patches) at most that a factor is the mean over."""
_PIECE = 1 << 24
"""Elements of patches at a time."""
_MISMATCH = 1e-2
"""Relative difference between a weight's gradient and the one of its module's inputs and outputs, above which the
weight is not applied as a matrix there, or elsewhere too."""


class _Seen:
    """What modules with a matrix were given, and the gradients of what they returned, in the order of their calls."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.slopes: dict[str, list[Tensor | None]] = {}
        self.is_forward = True

    def of(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Of each call of a module whose output the loss depends on."""
        pairs = zip(self.inputs.get(name, []), self.slopes.get(name, []), strict=True)
        return [(x, slope) for x, slope in pairs if slope is not None]


class GaussNewton:
    """Gauss–Newton matrices of a model's mean loss, at any parameters.

    With J the derivative of the model's outputs and H the loss's second derivative with respect to them, it is JᵀHJ.
    One backward pass of Hz for random signs z gives Σ(JᵀHz)(JᵀHz)ᵀ, which is JᵀH²J, scaled to the trace of JᵀHJ at the
    outputs: exact for squared errors, where H is a multiple of 1. That does not vanish at a perfect minimum, as the
    gradients of the loss do.

    Args:
        objective: model, loss and data.
        seed: of the minibatches and signs.

    Attributes:
        is_matrix: of each parameter, whether it has Kronecker factors.
        diagonal_because: why others have a diagonal, by name; of one dimension they all have.

    Raises:
        ValueError: outputs, or the loss's second derivative with respect to them, can't be had.
    """

    def __init__(self, objective: Objective, seed: int) -> None:
        if objective.trial.is_reentrant:
            raise ValueError(
                'sampler="kfac-sgld" is not possible: the model recomputes activations with use_reentrant=True; set it '
                "to False"
            )
        self._objective, self._seed = objective, seed
        with objective.generators.kept():
            self._batches = list(itertools.islice(objective.source.minibatches(seed), NUM_BATCHES))
        self._names = list(objective.reference)
        self._modules: dict[str, nn.Module] = {}
        self.diagonal_because: dict[str, str] = {}
        self._find_modules()
        self._check_modules()
        self.is_matrix = [name in self._modules for name in self._names]

    def _find_modules(self) -> None:
        """Modules that apply a sampled parameter as a matrix, one for each parameter."""
        by_id = {id(p): name for name, p in zip(self._names, self._objective.targets, strict=True)}
        users: dict[str, list[nn.Module]] = {}
        for module in self._objective.model.modules():
            for p in module._parameters.values():
                if p is not None and id(p) in by_id:
                    users.setdefault(by_id[id(p)], []).append(module)
        shapes = [tuple(p.shape) for p in self._objective.reference.values()]
        for name, shape, fits in zip(self._names, shapes, may_be_matrices(shapes), strict=True):
            modules = users.get(name, [])
            if len(shape) < 2:
                continue
            if not fits:
                self.diagonal_because[name] = f"its {'×'.join(map(str, shape))} elements are too many for eigenbases"
            elif len(modules) > 1:
                self.diagonal_because[name] = "several modules share it"
            elif not modules or getattr(modules[0], "weight", None) is None or not _is_known(modules[0]):
                kind = type(modules[0]).__name__ if modules else "no module"
                self.diagonal_because[name] = f"{kind} does not apply it as a matrix"
            elif id(modules[0].weight) in by_id and by_id[id(modules[0].weight)] == name:
                self._modules[name] = modules[0]

    def _check_modules(self) -> None:
        """Leave out weights that are used in other ways, too: their gradient is not that of inputs and outputs."""
        objective = self._objective
        with self._objective.generators.kept(), torch.enable_grad():
            for _, seen, grads, _ in self._passes(objective.reference, objective.fresh_buffers(), 0, 0):
                for name, grad in zip(self._names, grads, strict=True):
                    if name not in self._modules:
                        continue
                    found = self._product(name, seen)
                    size = float(grad.double().norm())
                    # One for which nothing was seen is used elsewhere, or not at all.
                    off = size if found is None else float((found - grad.view(found.shape)).double().norm())
                    tolerance = _MISMATCH if objective.is_precise else 10 * _MISMATCH
                    if off > tolerance * size:
                        self.diagonal_because[name] = "it is used by more than its module"
                        del self._modules[name]

    def _product(self, name: str, seen: _Seen) -> Tensor | None:
        """The gradient of a weight by its module's inputs and outputs, as a matrix."""
        module = self._modules[name]
        weight = module.get_parameter("weight")
        total: Tensor | None = None
        for x, slope in seen.of(name):
            count = max(1, len(x))
            if isinstance(module, (nn.Conv1d, nn.Conv2d)) and x.ndim == weight.ndim:
                # Patches take as much memory as a kernel has places.
                count = max(1, _PIECE // max(1, x[0].numel() * math.prod(module.kernel_size)))
            for start in range(0, len(x), count):
                part_of = slice(start, start + count) if count < len(x) else ...
                rows, columns = _as_rows(module, x[part_of], slope[part_of], None)
                part = rows.mT @ columns
                total = part if total is None else total + part
        return total

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], count: int, chain: int
    ) -> list[Factors]:
        """The factors at `params`, in the order of the parameters.

        Args:
            params: of one chain.
            buffers: of the chain; they stay as they are.
            count: names the minibatch and, with `chain`, the signs.
            chain: its number.
        """
        rows: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        shapes = {name: p.shape for name, p in self._objective.reference.items()}
        with self._objective.generators.kept(), torch.enable_grad():
            copies = {name: b.clone() for name, b in buffers.items()}
            for share, seen, grads, scale in self._passes(params, copies, count, chain):
                for name, grad in zip(self._names, grads, strict=True):
                    if name not in self._modules:
                        square = scale * grad.float().square()
                        rows[name] = square if name not in rows else rows[name] + square
                        continue
                    outer, inner = self._factors_of(name, seen, scale)
                    rows[name] = outer if name not in rows else rows[name] + outer
                    inner = share * inner
                    columns[name] = inner if name not in columns else columns[name] + inner
        return [
            Factors(rows[name].view(shapes[name]) if name not in columns else rows[name], columns.get(name))
            for name in self._names
        ]

    def _factors_of(self, name: str, seen: _Seen, scale: float) -> tuple[Tensor, Tensor]:
        """Factors of rows and columns of a piece: the sum over slopes and the mean over inputs, or the reverse where
        inputs go with the rows."""
        module, weight = self._modules[name], self._objective.reference[name]
        size = weight.shape[0], weight.numel() // max(weight.shape[0], 1)
        found = [torch.zeros(s, s, dtype=torch.float32, device=weight.device) for s in size]
        inputs_first = _is_transposed(module)
        total = 0
        for x, slope in seen.of(name):
            both = [t.float() for t in _as_rows(module, x, slope, _ROWS)]
            count = _num_rows(slope, module)
            factor = scale * count / max(len(both[0]), 1)
            for k, t in enumerate(both):
                is_input = (k == 0) == inputs_first
                found[k] += (count / max(len(t), 1) if is_input else factor) * (t.mT @ t)
            total += count
        found[0 if inputs_first else 1] /= max(total, 1)
        return found[0], found[1]

    def _passes(
        self, params: Mapping[str, Tensor], buffers: dict[str, Tensor], count: int, chain: int
    ) -> Iterator[tuple[float, _Seen, list[Tensor], float]]:
        """Forward and backward for each microbatch: its share, what modules saw, gradients JᵀHz, and the scale."""
        objective = self._objective
        batch = self._batches[count % len(self._batches)]
        if objective.trial.writes_batch:
            batch = copy.deepcopy(batch)
        generator = torch.Generator().manual_seed((self._seed ^ (count << 20) ^ chain) & (2**63 - 1))
        for piece, share in objective.pieces(batch):
            with objective.holding(params, buffers), self._watching() as (seen, outputs):
                loss = objective.loss(piece, share).loss
                seen.is_forward = False
                slopes, scale, found = _slopes(loss, outputs, generator)
                targets = objective.targets
                grads = torch.autograd.grad(found, targets, slopes, allow_unused=True)
            full = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, targets, strict=True)]
            yield share, seen, full, scale

    @contextlib.contextmanager
    def _watching(self) -> Iterator[tuple[_Seen, list[Any]]]:
        """Hooks on the model and its modules, for one evaluation."""
        seen, outputs = _Seen(), list[Any]()

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not (seen.is_forward and isinstance(output, Tensor) and output.requires_grad):
                    return
                if not (args and isinstance(args[0], Tensor)):  # a forward of its own
                    return
                inputs, slopes = seen.inputs.setdefault(name, []), seen.slopes.setdefault(name, [])
                place = len(inputs)
                inputs.append(args[0].detach())
                slopes.append(None)

                def keep(slope: Tensor) -> None:
                    slopes[place] = slope.detach()

                output.register_hook(keep)  # type: ignore[no-untyped-call]  # of this value, whatever is written in its place later

            return hook

        def watch_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if seen.is_forward:
                outputs.append(output)

        handles = [m.register_forward_hook(watch(name)) for name, m in self._modules.items()]
        handles.append(self._objective.model.register_forward_hook(watch_model))
        try:
            yield seen, outputs
        finally:
            for handle in handles:
                handle.remove()


_NO_OUTPUT = 'sampler="kfac-sgld" is not possible: {}. Use sampler="sgld"'


def _slopes(
    loss: Tensor, outputs: Sequence[Any], generator: torch.Generator
) -> tuple[list[Tensor], float, list[Tensor]]:
    """Hz at the outputs that the loss depends on, zᵀHz/‖Hz‖², and these outputs.

    Raises:
        ValueError: there are none, or H is 0.
    """
    tensors = [t for output in outputs for t in _tensors(output) if t is not loss and t.requires_grad]
    if not tensors:
        raise ValueError(_NO_OUTPUT.format("the loss does not come from what model(…) returns"))
    slopes = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    found = [(t, s) for t, s in zip(tensors, slopes, strict=True) if s is not None]
    if not found:
        raise ValueError(_NO_OUTPUT.format("the loss does not come from what model(…) returns"))
    curved = [(t, s) for t, s in found if s.requires_grad]
    if not curved:
        raise ValueError(
            _NO_OUTPUT.format("the loss is linear in the model's output, so that it has no Gauss–Newton matrix")
        )
    signs = [(torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t.device, s.dtype) for t, s in curved]
    products = torch.autograd.grad(
        [s for _, s in curved], [t for t, _ in curved], signs, retain_graph=True, materialize_grads=True
    )
    products = tuple(p.detach() for p in products)
    square = sum(float(p.double().square().sum()) for p in products)
    trace = sum(float((p.double() * z.double()).sum()) for p, z in zip(products, signs, strict=True))
    if not square:
        raise ValueError(_NO_OUTPUT.format("the loss has no second derivative in the model's output"))
    return list(products), abs(trace) / square, [t for t, _ in curved]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Of floats, in what a model returned; the logits alone where something is called that."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        yield logits
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [inputs, outputs], as in Hugging Face's Conv1D."""
    return type(module).__name__ == "Conv1D"


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or (_is_transposed(module) and hasattr(module, "nf")):
        return True
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _num_rows(slope: Tensor, module: nn.Module) -> int:
    channels = slope.shape[1] if isinstance(module, (nn.Conv1d, nn.Conv2d)) else slope.shape[-1]
    return slope.numel() // max(channels, 1)


def _as_rows(module: nn.Module, x: Tensor, slope: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """What goes with the weight's rows and columns: slopes and inputs, ``[places, width]``, each place of one sample.

    Args:
        module: linear or a convolution.
        x, slope: its input, and the gradient of its output.
        most: places at most, evenly spread; None: all.
    """
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if slope.ndim == module.weight.ndim - 1:  # of one sample
            x, slope = x[None], slope[None]
        if most is not None:  # whole samples, before patches of them take memory
            places = slope[0, 0].numel()
            stride = max(1, -(-len(slope) * places // most))
            x, slope = x[::stride], slope[::stride]
        flat = isinstance(module, nn.Conv1d)
        own = [module.kernel_size, module.dilation, module.padding, module.stride]
        sizes = [(1 if j in (0, 1, 3) else 0, *value) if flat else value for j, value in enumerate(own)]
        patches = F.unfold(x[:, :, None] if flat else x, *sizes)  # type: ignore[arg-type]
        inputs = patches.mT.reshape(-1, patches.shape[1])
        outputs = slope.flatten(2).mT.reshape(-1, slope.shape[1])
    else:
        inputs, outputs = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
        if most is not None:
            stride = max(1, -(-len(inputs) // most))
            inputs, outputs = inputs[::stride], outputs[::stride]
    inputs, outputs = inputs.float(), outputs.float()
    return (inputs, outputs) if _is_transposed(module) else (outputs, inputs)


_PER_OCTAVE = 4
"""Classes of curvatures; within one they are counted as its geometric mean."""


def diagonal_wells(objective: Objective, seed: int) -> Wells | None:
    """The diagonal of the Gauss–Newton matrix at w*, on one minibatch, by classes; None if it can't be had.

    Averages of eigenvalues, and so nearer to each other than these are.
    """
    try:
        factors = GaussNewton(objective, seed)(objective.reference, objective.fresh_buffers(), 0, 0)
    except Exception:  # whatever a model does not bear, an estimate without a metric can do without
        return None
    counts: dict[int, float] = {}
    for rows, columns in factors:
        diagonal = rows if columns is None else rows.diagonal()[:, None] * columns.diagonal()
        positive = diagonal[diagonal > 0].double()
        if not positive.isfinite().all():
            return None
        classes, sizes = torch.unique((_PER_OCTAVE * positive.log2()).round().long(), return_counts=True)
        for k, size in zip(classes.tolist(), sizes.tolist(), strict=True):
            counts[k] = counts.get(k, 0) + size
    return Wells(tuple(2 ** (k / _PER_OCTAVE) for k in sorted(counts)), tuple(counts[k] for k in sorted(counts)))


def curvature_in(
    objective: Objective, metric: Callable[[dict[str, Tensor]], dict[str, Tensor]], *, seed: int, iterations: int = 12
) -> float:
    """The largest eigenvalue of P·H at w*, that of √P·H·√P, by power iteration on differences of gradients.

    Args:
        objective: the model, its loss and data.
        metric: P times tensors like the parameters, 0 where nothing moves.
        seed: of the minibatch and where the iteration starts.
        iterations: two gradients each.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = next(iter(objective.source.minibatches(seed)))
    reference = objective.reference
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in reference.values())
    delta = (1e-1 if low else 1e-3) * max(_norm(reference), 1e-3)  # short against w*, long against rounding
    vector = metric(
        {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device)
            for name, p in reference.items()
        }
    )
    curvature = 0.0
    for _ in range(iterations):
        length = _norm(vector)
        if not 0 < length < math.inf:
            break
        change = {name: torch.zeros_like(v) for name, v in vector.items()}
        for sign in (1, -1):
            there = {name: w + (sign * delta / length * vector[name]).to(w.dtype) for name, w in reference.items()}

            def add(name: str, grad: Tensor, into: dict[str, Tensor] = change, sign: int = sign) -> None:
                into[name].add_(grad.to(into[name].dtype), alpha=sign)

            objective.gradient_at(there, batch, add)
        image = {name: c * (length / (2 * delta)) for name, c in change.items()}  # Hv
        along = sum(float((vector[name].double() * image[name].double()).sum()) for name in image)
        new = metric(image)
        # Rayleigh's quotient of PH in the scalar product of P⁻¹, in which it is symmetric: (Hv)ᵀP(Hv) / vᵀHv.
        across = sum(float((new[name].double() * image[name].double()).sum()) for name in image)
        curvature = across / along if along > 0 else 0.0
        size = _norm(new)
        if not 0 < size < math.inf:
            break
        vector = {name: v / size for name, v in new.items()}
    return curvature


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
