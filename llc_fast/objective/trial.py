"""A first look at the loss: does it make sense, what does a gradient cost, and what does an evaluation depend on?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llc_fast.batches import is_graph, join_graphs
from llc_fast.data import Batch, batch_length, leaves, map_tensors, split_batch
from llc_fast.objective.borrowed import plain_attributes, tensor_attributes
from llc_fast.objective.differences import (
    compare_with_differences,
    copied,
    is_large,
    norm_and_sum,
    normals_like,
    scales_of,
)
from llc_fast.objective.flops import FlopCounter
from llc_fast.objective.outputs import described, entry_with_tensor
from llc_fast.support.errors import add_note, first_line
from llc_fast.support.randomness import State, same_states
from llc_fast.support.torch_private import (
    has_own_backward,
    has_user_hooks,
    is_dropout,
    padding_rows,
    version_of,
)

if TYPE_CHECKING:
    from llc_fast.objective.objective import Evaluation, Objective

MIN_CHECKS = 48
"""Evaluations that comparing gradients with differences may take at least, unless each is large."""
_LARGE_FLOPS, _FEW_CHECKS = 3e9, 6
_OTHER_BATCHES = 8
"""Minibatches that are looked at for a use of parameters of which the first makes none."""
_SAME = 1e-4
"""Relative difference up to which two evaluations of one function agree."""
_SAME_BITS = 1e-6
"""The same with and without gradients: what is left is rounding, far below what nβ makes visible."""
_DISPLACEMENT = 0.05
"""How far the displaced point is from w*, relative to the size of each parameter."""
_REPEATS, _SMALL_FLOPS = 4, 1e8
"""Evaluations of a loss of so few operations that show whether it is the same each time, or a sum if it is random."""
_MOST_REPEATS, _SURE = 100, 0.04
"""Evaluations of a random loss at most, and the relative error of a mean that shows whether it is a sum."""


@dataclass(frozen=True)
class Trial:
    """What a few evaluations at w* and beside it were measured to be; strategies are chosen by it.

    Attributes:
        flops: floating-point operations of one gradient, counted; infinite if they can't be (a compiled model).
        activation_bytes: what autograd keeps of one forward pass; 0 if that can't be seen (torch.func inside the loss).
        unused: names of parameters that the loss does not depend on.
        has_tensor_batches: whether a batch holds nothing but tensors.
        is_random: whether the loss is another from evaluation to evaluation (dropout, noise, time, a model with state).
        is_reproducible: whether it is the same again if all generators are in the same state.
        writes_buffers, writes_batch, writes_parameters: whether a forward pass changes the model's buffers, its input,
            or the parameters themselves (``max_norm``, weight clipping).
        is_reentrant: whether activations are recomputed in a way that needs a plain backward pass.
        is_same_without_grad: whether the loss is the same function where no gradients are recorded.
        functional_problem: why the loss is not a function of parameters that torch.func can be given; empty: it is.
        has_hooks: whether the user's hooks see or change what modules compute.
        changes_itself: whether a forward pass changes attributes of modules that are numbers or containers (a counter),
            or accumulates.
        accumulates: whether tensors that are attributes of modules are others after each forward pass (a metric).
    """

    flops: float
    activation_bytes: int
    unused: tuple[str, ...]
    has_tensor_batches: bool
    is_random: bool
    writes_buffers: bool
    writes_batch: bool
    is_reproducible: bool = True
    writes_parameters: bool = False
    is_reentrant: bool = False
    is_same_without_grad: bool = True
    functional_problem: str = ""
    has_hooks: bool = False
    changes_itself: bool = False
    accumulates: bool = False


def try_out(objective: Objective, max_checks: int) -> Trial:
    """Evaluate the loss a few times at w* and beside it; generators are left as they were.

    Args:
        objective: all but its trial is set up; `per_sample`, `masks` and `not_sampled` are completed.
        max_checks: evaluations to spend on comparing gradients with differences of the loss.

    Raises:
        TypeError, ValueError: as :class:`llc_fast.objective.objective.Objective`.
    """
    with objective.generators.kept():
        return _Trial(objective).run(max_checks)


class _Trial:
    def __init__(self, objective: Objective) -> None:
        self._objective, self._generators = objective, objective.generators
        self._batch = next(iter(objective.source.minibatches(seed=0)))
        if objective.uses_own_loss and not isinstance(self._batch, Mapping):
            raise TypeError(
                "loss_fn must be callable as loss_fn(output, target), got None, which is for models that return their "
                f"own loss from batches that are dictionaries; these are {type(self._batch).__name__}"
            )
        self._piece, self._size = split_batch(self._batch, objective.microbatch_size)[0]
        self._start: State = self._generators.states()
        self._borrowed = objective.borrowed
        self._has_own_backward, self._watches_memory = False, True

    def run(self, max_checks: int) -> Trial:
        objective = self._objective
        here = {name: p.clone() for name, p in objective.reference.items()}
        first = self._first(here)
        drew = not same_states(self._start, self._generators.states())
        value = first.value
        repeats = _REPEATS if first.flops <= _SMALL_FLOPS else 1
        attributes = tensor_attributes(objective.model)
        is_reproducible = all(_agree(self._value(here), value, _SAME) for _ in range(repeats))
        accumulates = any(
            a.keys() != b.keys() or not all(_same_values(a[name], b[name]) for name in a)
            for a, b in zip(attributes, tensor_attributes(objective.model), strict=True)
        )
        self._generators.seed(_OTHER_SEED)
        with torch.enable_grad():
            other = self._value(here, restart=False)
        is_random = drew or not is_reproducible or not _agree(other, value, _SAME)
        # Recomputed activations of the reentrant kind warn where there are no gradients.
        alone = math.nan if first.is_reentrant else self._without_grad(here)
        is_same_without_grad = math.isfinite(alone) and (is_random or _agree(alone, value, _SAME_BITS))
        del here
        elsewhere = self._displaced()
        if first.writes_parameters:
            problem = "it writes to its parameters"
        elif first.is_reentrant:
            problem = "it recomputes activations with use_reentrant=True"
        else:
            problem = self._functional_problem(elsewhere)
        trial = Trial(
            flops=first.flops,
            activation_bytes=first.activation_bytes,
            unused=first.unused,
            has_tensor_batches=all(isinstance(t, Tensor) and t.ndim for t in leaves(self._batch)),
            is_random=is_random,
            writes_buffers=first.writes_buffers,
            writes_batch=first.writes_batch,
            is_reproducible=is_reproducible,
            writes_parameters=first.writes_parameters,
            is_reentrant=first.is_reentrant,
            is_same_without_grad=is_same_without_grad,
            functional_problem=problem,
            has_hooks=has_user_hooks(objective.model),
            changes_itself=first.changes_itself or accumulates,
            accumulates=accumulates,
        )
        objective.trial = trial
        objective.trial = dataclasses.replace(trial, unused=self._never_used(elsewhere))
        self._refuse_sum(elsewhere, is_random)
        self._leave_padding()
        if is_reproducible and not first.writes_parameters:
            few = _FEW_CHECKS if first.flops > _LARGE_FLOPS else MIN_CHECKS
            self._compare(elsewhere, max(max_checks, few))
        return objective.trial

    @torch.no_grad()
    def _without_grad(self, params: Mapping[str, Tensor]) -> float:
        """The loss where no gradients are recorded; NaN if it takes some itself (a penalty, an equation to solve)."""
        try:
            return self._value(params)
        except RuntimeError:
            return math.nan

    def _never_used(self, params: Mapping[str, Tensor]) -> tuple[str, ...]:
        """What a few other minibatches make no use of either: experts and branches may rest in one of them."""
        objective = self._objective
        unused = dict.fromkeys(objective.trial.unused)
        for seed in range(1, _OTHER_BATCHES + 1):
            if not unused:
                break
            batch = next(iter(objective.source.minibatches(seed)))
            self._generators.restore(self._start)
            objective.gradient_at(params, batch, lambda name, _: unused.pop(name, None))
        return tuple(unused)

    # ---- the first evaluation ----------------------------------------------------------------------------------

    def _first(self, params: dict[str, Tensor]) -> _First:
        """Loss and gradient at w*, counted, checked and watched.

        A backward pass of the user's own may begin another one inside, as activations that are recomputed with
        ``use_reentrant=True`` do. What autograd is told to look for is not found there: it raises, or says nothing.
        """
        found: _First | None = None
        try:
            found = self._gradient(params, plain=False)
        except RuntimeError as error:
            if "saved tensor hooks" in str(error):  # torch.func takes gradients inside of the loss
                self._watches_memory = False
                found = self._gradient(params, plain=False)
            elif not self._has_own_backward:
                raise
        if self._has_own_backward:
            plain = self._gradient(params, plain=True)
            if found is None or not _same_gradients(found.gradients, plain.gradients):
                found = plain
        assert found is not None
        if not found.gradients:
            raise ValueError("the loss does not depend on the parameters to sample (it has no gradient)")
        not_finite = sorted(name for name, sums in found.gradients.items() if not all(map(math.isfinite, sums)))
        if not_finite:
            raise ValueError(
                f"the gradient of the loss at w* is not finite, in {_some(not_finite)}, though the loss is "
                f"({found.value:g}): the loss has no derivative there (sqrt or a norm at 0, a division "
                "by 0, log 0?). Add a small constant under the root, or use a loss that is smooth at w*"
            )
        return found

    def _gradient(self, params: dict[str, Tensor], plain: bool) -> _First:
        objective, borrowed = self._objective, self._borrowed
        self._generators.restore(self._start)
        objective.per_sample = False  # until the loss has been seen as it is
        piece, buffers = copied(self._piece), objective.fresh_buffers()
        inputs = [t for t in leaves(piece) if isinstance(t, Tensor)]
        saved = _SavedBytes(exclude=[*params.values(), *objective.frozen.values(), *inputs, *buffers.values()])
        compiled = objective.runs_compiled  # what does not run under a dispatch mode
        counter = FlopCounter()  # type: ignore[no-untyped-call]
        gradients: dict[str, tuple[float, float]] = {}
        attributes = plain_attributes(objective.model)

        def take(name: str, grad: Tensor) -> None:
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of parameter {name!r} has layout {grad.layout}; only dense gradients can be used: "
                    "build the embedding with sparse=False"
                )
            (norm, total), (more, added) = gradients.get(name, (0.0, 0.0)), norm_and_sum(grad)
            gradients[name] = math.hypot(norm, more), total + added

        with torch.enable_grad(), objective.holding(params, buffers):
            before = [version_of(t) for t in inputs]
            versions = borrowed.versions()
            with contextlib.nullcontext() if compiled else counter:
                watch = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t)
                with watch if self._watches_memory else contextlib.nullcontext():
                    loss = self._loss(piece)
                    self._check_value(loss, batch_length(piece))
                self._has_own_backward = has_own_backward(loss)
                wrote = {name for name, version in borrowed.versions().items() if version != versions[name]}
                objective.consume_gradients(loss.mean(), take, plain=plain)
            writes_batch = any(version_of(t) != version for t, version in zip(inputs, before, strict=True))
        # F.batch_norm writes to running statistics without a word to autograd.
        silently = any(not _same_values(b, buffers[name]) for name, b in objective.fresh_buffers().items())
        return _First(
            value=float(loss.detach().mean().double()),  # rounded as later values are
            flops=math.inf if compiled else counter.flops * -(-batch_length(self._batch) // self._size),
            activation_bytes=saved.total,
            gradients=gradients,
            unused=tuple(name for name in objective.reference if name not in gradients),
            writes_buffers=bool(borrowed.wrote_buffers or wrote & borrowed.buffers.keys() or silently),
            writes_parameters=bool(borrowed.wrote_parameters or wrote & borrowed.parameters.keys()),
            writes_batch=writes_batch,
            changes_itself=attributes != plain_attributes(objective.model),
            is_reentrant=plain,
        )

    def _loss(self, batch: Batch) -> Tensor:
        """The first call of the user's functions; what goes wrong may be how they are called."""
        objective = self._objective
        try:
            return objective.loss(batch).loss
        except Exception as error:
            add_note(error, self._how_it_was_called(error, batch))
            raise

    def _how_it_was_called(self, error: Exception, batch: Batch) -> str:
        objective = self._objective
        if objective.uses_own_loss:
            return "llc_fast evaluated the loss as model(**batch), since loss_fn is None"
        called = "loss_fn(model, batch)" if objective.takes_model else "loss_fn(model(*inputs), target)"
        note = (
            f"llc_fast evaluated the loss as {called}, with batches as the data give them; a loss function "
            "whose first parameter is called `model` gets (model, batch), any other (output, target)"
        )
        owner = getattr(objective.loss_fn, "__self__", None)
        if isinstance(owner, nn.Module) and not objective.takes_model:
            name = getattr(objective.loss_fn, "__name__", "")
            return f"{note}. For a method of the model write loss_fn=lambda model, batch: model.{name}(batch, 0)"
        inputs = leaves(batch if objective.takes_model else batch[:-1])
        own = {p.dtype for p in objective.reference.values()}
        odd = {t.dtype for t in inputs if isinstance(t, Tensor)} - own - {torch.int64, torch.bool}
        if isinstance(error, RuntimeError) and odd and "dtype" in str(error):
            return f"{note}. The data are {_dtypes(odd)}, the parameters {_dtypes(own)}: convert the data"
        if isinstance(error, AttributeError) and isinstance(batch, dict) and error.obj is batch and error.name in batch:
            return f"{note}. Batches of mappings are plain dictionaries here: write batch[{error.name!r}]"
        if not objective.takes_model and isinstance(error, (TypeError, AttributeError, ValueError)):
            with contextlib.suppress(Exception), torch.no_grad():
                output = objective.model(*copied(batch)[:-1])
                if not isinstance(output, Tensor):
                    entry = entry_with_tensor(output, samples=True)
                    return (
                        f"{note}. The model returns {described(output)}: write "
                        f"loss_fn=lambda output, target: your_loss(output{entry}, target)"
                    )
        return note

    def _check_value(self, loss: Tensor, size: int) -> None:
        objective = self._objective
        objective.per_sample = loss.ndim == 1 and len(loss) == size
        if loss.ndim != 0 and not objective.per_sample:
            raise ValueError(
                f"loss_fn must return a scalar, or one loss for each of {size} samples, got shape "
                f"{tuple(loss.shape)}: use reduction='mean'"
            )
        if not torch.isfinite(loss).all():
            raise ValueError(f"loss_fn returned {float(loss.detach().mean())} at w*: check the model and the data")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the parameters to sample (it has no gradient): does the model or "
                "loss_fn use .detach(), torch.no_grad() or .item()?"
            )

    # ---- further evaluations -----------------------------------------------------------------------------------

    def _value(self, params: Mapping[str, Tensor], batch: Batch | None = None, *, restart: bool = True) -> float:
        """The loss of a batch, this one if none is given, from the same states of all generators if `restart`."""
        if restart:
            self._generators.restore(self._start)
        batch = copied(self._piece if batch is None else batch)
        return _number(self._objective.evaluate(params, batch, self._objective.fresh_buffers()))

    @torch.no_grad()
    def _displaced(self) -> dict[str, Tensor]:
        """A point beside w*: at w* itself a gradient may be nothing, and a loss too."""
        reference = self._objective.reference
        generator = torch.Generator().manual_seed(_OTHER_SEED)
        scales = scales_of(reference)
        found, large = {}, is_large(reference)
        for k, (name, p) in enumerate(reference.items()):
            if large:
                noise = normals_like(p, _OTHER_SEED, k).to(p.dtype)
            else:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
            if (mask := self._objective.masks.get(name)) is not None:
                noise *= mask
            found[name] = noise.mul_(_DISPLACEMENT * scales[name]).add_(p)
        return found

    def _functional_problem(self, params: Mapping[str, Tensor]) -> str:
        """Why the loss is no function of the parameters that torch.func hands to the model; empty if it is one."""
        objective = self._objective
        expected = self._value(params)
        self._generators.restore(self._start)
        torch.clear_autocast_cache()
        try:
            found = _number(objective.functional(params, copied(self._piece), objective.fresh_buffers()))
        except Exception as error:
            return f"torch.func can't evaluate it: {first_line(error)}"
        if _agree(found, expected, _SAME) or not math.isfinite(expected):
            return ""
        return "the loss reads parameters past the modules that hold them"

    def _refuse_sum(self, params: Mapping[str, Tensor], is_random: bool) -> None:
        """A loss that is a sum over the batch would make λ̂ wrong by the batch size.

        Halves of a batch add up to it, and a batch that comes twice doubles it; a loss over pairs may do one of these.
        Models for batches of one size take none of them, and nothing is known of their loss.
        """
        if self._objective.per_sample:
            return
        looks = []
        with _dropout_off(self._objective.model):
            is_random = is_random and len({self._after(seed, params) for seed in range(3)}) > 1
            for others, factor in _parts_and_multiples(self._piece):
                with contextlib.suppress(Exception):  # a model for other batches than these
                    looks.append(self._adds_up(params, others, factor, is_random))
                    if not looks[-1]:
                        return
        if len(looks) >= 2:
            raise ValueError(
                "loss_fn sums over the batch (halves of a batch add up to it); λ̂ = nβ(mean L − L(w*)) needs the mean: "
                "use reduction='mean'"
            )

    def _after(self, seed: int, params: Mapping[str, Tensor]) -> float:
        self._generators.seed(seed)
        return self._value(params, restart=False)

    def _adds_up(self, params: Mapping[str, Tensor], others: Sequence[Batch], factor: float, is_random: bool) -> bool:
        """Whether the losses of other batches, added up and times `factor`, are that of this one.

        For a sum the ratio is 1; for a mean it is 2 or 1/2. Random losses are averaged until that can be told.
        """
        most = 1 if not is_random else _REPEATS if self._objective.trial.flops > _SMALL_FLOPS else _MOST_REPEATS
        wholes, sums = list[float](), list[float]()
        error = 0.0
        for k in range(most):
            wholes.append(self._after(_OTHER_SEED + k, params))
            sums.append(factor * sum(self._value(params, other, restart=False) for other in others))
            if k + 1 >= _REPEATS:
                error = _error_of_ratio(sums, wholes)
                if error < _SURE:
                    break
        ratio = sum(sums) / sum(wholes)
        if not math.isfinite(ratio) or error > 3 * _SURE:
            raise ValueError("nothing to compare with")
        rounding = 1e-3 if self._objective.is_precise else 0.05
        return abs(ratio - 1) < (min(0.2, 0.02 + 4 * error) if is_random else rounding)

    def _leave_padding(self) -> None:
        """Rows of embeddings that never get a gradient are not sampled, whether this minibatch has padding or not."""
        objective = self._objective
        names = {id(p): name for name, p in objective.borrowed.parameters.items()}
        for weight, row in padding_rows(objective.model):
            name = names.get(id(weight), "")
            if name in objective.reference:
                mask = objective.masks.get(name, torch.ones_like(objective.reference[name], dtype=torch.bool)).clone()
                left, mask[row] = int(mask[row].sum()), False
                if left and mask.any():
                    objective.masks[name], objective.not_sampled[name] = mask, left

    def _compare(self, params: dict[str, Tensor], max_checks: int) -> None:
        """Compare gradients with differences; take elements out that have none though the loss depends on them."""
        objective = self._objective
        found = compare_with_differences(
            objective, self._piece, params, lambda: self._generators.restore(self._start), max_checks
        )
        if found.wrong and len({self._value(params) for _ in range(4 * _REPEATS)}) > 1:  # nothing to compare with
            objective.trial = dataclasses.replace(objective.trial, is_random=True, is_reproducible=False)
            return
        if found.wrong:
            hooks = ", hooks" if has_user_hooks(objective.model) else ""
            raise ValueError(
                f"the gradient of the loss with respect to {_some(found.wrong)} is not its derivative: differences of "
                f"the loss beside w* disagree with it (straight-through estimators, detached parts{hooks}, "
                "scale_grad_by_freq, a custom backward?). Chains would sample something else than this loss: use the "
                "true gradient, or leave these parameters out with params="
            )
        for name, elements in found.without_gradient.items():
            kept = ~elements & objective.masks.get(name, torch.ones_like(elements))
            objective.not_sampled[name] = objective.not_sampled.get(name, 0) + int(elements.sum())
            if kept.any():
                objective.masks[name] = kept
            else:
                objective.freeze(name)
        if not objective.reference:
            raise ValueError(
                "the loss depends on the parameters to sample, but none of them has a gradient: does the model or "
                "loss_fn use .detach(), torch.no_grad() or .item()?"
            )


@dataclass(frozen=True)
class _First:
    """What the first evaluation was measured to be; see :class:`Trial`."""

    value: float
    gradients: dict[str, tuple[float, float]]
    """By parameter: norm and sum."""
    flops: float
    activation_bytes: int
    unused: tuple[str, ...]
    writes_buffers: bool
    writes_parameters: bool
    writes_batch: bool
    changes_itself: bool
    is_reentrant: bool


_OTHER_SEED = 0x5EED


def _dtypes(found: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def _number(evaluation: Evaluation) -> float:
    return float(evaluation.loss.detach().double())


def _parts_and_multiples(batch: Batch) -> Iterator[tuple[list[Batch], float]]:
    """The halves of a batch, and batches that have each of its samples twice and three times, one after another: they
    take memory. With each the factor that makes their sum as long as the batch. None of a batch that has no halves.

    What is no tensor, texts say, is the same in all of them.
    """
    length = batch_length(batch)
    half = length // 2
    if is_graph(batch):
        graphs = [batch[k] for k in range(length)]
        if half:
            yield [join_graphs(graphs[:half]), join_graphs(graphs[half:])], 1.0
        for times in (2, 3):
            yield [join_graphs(times * graphs)], 1 / times
        return
    tensors = [t for t in leaves(batch) if isinstance(t, Tensor) and t.ndim]
    if not tensors or any(len(t) != length for t in tensors) or any(map(is_graph, leaves(batch))):
        return

    def each(function: Callable[[Tensor], Tensor]) -> Batch:
        return map_tensors(lambda t: function(t) if t.ndim else t, batch)

    if half:
        yield [each(lambda t: t[:half]), each(lambda t: t[half:])], 1.0
    for times in (2, 3):
        yield [each(functools.partial(_repeated, times))], 1 / times


def _repeated(times: int, tensor: Tensor) -> Tensor:
    return torch.cat([tensor] * times)


@contextlib.contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Dropout modules in eval mode: what is random for no other reason is a function then."""
    modules = [m for m in model.modules() if is_dropout(m) and m.training]
    try:
        for m in modules:
            m.training = False
        yield
    finally:
        for m in modules:
            m.training = True


def _error_of_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard error of the ratio of two means, each of its own evaluations, relative to the ratio."""
    return math.hypot(*(statistics.stdev(v) / math.sqrt(len(v)) / abs(statistics.fmean(v) or math.nan) for v in (a, b)))


def _agree(a: float, b: float, slack: float) -> bool:
    return abs(a - b) <= slack * max(abs(a), abs(b)) or (math.isnan(a) and math.isnan(b))


def _same_gradients(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> bool:
    """Whether two gradients are the same, to rounding, by the norms and sums of their parts."""
    if a.keys() != b.keys():
        return False
    scale = max((norm for norm, _ in b.values()), default=0.0)
    return all(
        math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-3 * scale) or not math.isfinite(y)
        for name in a
        for x, y in zip(a[name], b[name], strict=True)
    )


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.layout is not torch.strided:
        return a.shape == b.shape
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


class _SavedBytes:
    """Counts the memory that autograd keeps for the backward pass."""

    def __init__(self, exclude: Sequence[Tensor]) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in exclude if t.layout == torch.strided}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:  # a sparse matrix has no storage of its own
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor
