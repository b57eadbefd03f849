"""Model + loss + data = the localized, tempered posterior that chains sample."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from llc_fast.data import (
    Batch,
    DataSource,
    IndexedSource,
    batch_length,
    leaves,
    map_tensors,
    split_batch,
    spread_indices,
)
from llc_fast.kernels.native import check_tensor
from llc_fast.kernels.sharding import is_dtensor
from llc_fast.objective.borrowed import BorrowedModel
from llc_fast.objective.outputs import MODEL, OUTPUT, OWN, described, loss_in
from llc_fast.objective.selection import select
from llc_fast.objective.trial import MIN_CHECKS, try_out
from llc_fast.support.fingerprint import digest
from llc_fast.support.randomness import Generators
from llc_fast.support.torch_private import (
    can_set_compiling_aside,
    compiling_set_aside,
    graph_of,
    has_compiled_parts,
)

_COPIED_PARAMETERS = 10_000_000
"""Parameters up to which w* is copied."""
LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(output, target)`` or ``loss_fn(model, batch)``: the mean loss of a batch, or one loss for each sample."""


class Evaluation(NamedTuple):
    """The loss of a minibatch.

    Attributes:
        loss: its mean, a scalar (with several chains: one for each).
        samples: the loss of each sample, where the loss function gives them.
    """

    loss: Tensor
    samples: Tensor | None


def takes_model(loss_fn: object) -> bool:
    """Whether a loss function is to be called as ``loss_fn(model, batch)``: its first parameter is called `model`.

    None stands for a model that returns its own loss: ``model(**batch).loss``, as Hugging Face's do.
    """
    if loss_fn is None:
        return True
    try:
        first = next(iter(inspect.signature(loss_fn).parameters), "")  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return first == "model"


class _Evaluated(nn.Module):
    """Model and loss as one module, so that ``functional_call`` can give parameters to either form of the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None) -> None:
        super().__init__()
        self.model, self._loss_fn, self._takes_model = model, loss_fn, takes_model(loss_fn)

    @property
    def uses_own_loss(self) -> bool:
        return self._loss_fn is None

    def forward(self, batch: Batch, by_sample: bool = False, one_by_one: bool = False) -> Tensor:
        if by_sample:
            return self._one_by_one(batch) if one_by_one else self._by_sample(batch)
        if self._loss_fn is None:
            return loss_in(self.model(**batch), OWN)
        if self._takes_model:
            return loss_in(self._loss_fn(self.model, batch), MODEL)
        return loss_in(self._loss_fn(self.model(*batch[:-1]), batch[-1]), OUTPUT)

    def outputs(self, batch: Batch) -> Any:
        """What the model returns for a batch; of a loss that calls it, what it returned to that."""
        if self._loss_fn is None:
            return self.model(**batch)
        if not self._takes_model:
            return self.model(*batch[:-1])
        found = list[Any]()
        handle = self.model.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            self._loss_fn(self.model, batch)
        finally:
            handle.remove()
        if not found:
            raise ValueError(
                "loss_fn does not call the model as model(…), so that nobody sees what it returns: call the model that "
                "loss_fn(model, batch) is given, not one of its methods or parts"
            )
        return found[0] if len(found) == 1 else tuple(found)

    def _by_sample(self, batch: Batch) -> Tensor:
        """The loss of every sample as a batch of one; the model itself sees them together where it can."""
        if self._loss_fn is None or self._takes_model:
            with batchable_attention(next(iter(leaves(batch))).device):
                losses: Tensor = vmap(lambda sample: self(_batch_of_one(sample)))(batch)
            return losses
        loss_fn, output = self._loss_fn, self.model(*batch[:-1])
        losses = vmap(lambda out, target: loss_in(loss_fn(_batch_of_one(out), _batch_of_one(target)), OUTPUT))(
            output, batch[-1]
        )
        return losses

    def _one_by_one(self, batch: Batch) -> Tensor:
        """The same without torch.func, which knows neither every kernel nor branches that depend on values."""
        return torch.stack([self(piece) for piece, _ in split_batch(batch, 1)])


def batchable_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Attention that torch.func can batch: on a CPU it would go through fused attention one by one, with a warning."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _batch_of_one(sample: Batch) -> Batch:
    return map_tensors(lambda t: t[None], sample)


class Objective:
    """p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²), with w* the model's parameters, which are never written to.

    A chain's parameters stand in for the model's own while the model is evaluated and differentiated, see
    :class:`llc_fast.objective.borrowed.BorrowedModel`.

    Args:
        model: the trained model, in the mode (train or eval) it is to be judged in.
        loss_fn: ``loss_fn(output, target)`` or ``loss_fn(model, batch)``, see :data:`LossFunction`.
        source: the data.
        device: where to compute; what is elsewhere is moved there, until a ``ModelSnapshot`` puts it back.
        params: which parameters to sample; None: all that require a gradient. See :func:`select`.
        autocast: dtype of the forward pass under ``torch.autocast``; None: no autocast.
        microbatch_size: samples that pass the model at a time; None: the whole minibatch.
        generators: those that model, loss and data draw from; None: the global ones and those that they hold.
        max_checks: evaluations to spend on comparing gradients with differences of the loss.

    Attributes:
        reference: w* by name, of the parameters that are sampled.
        frozen: the other parameters by name.
        masks: for those of which only a part is sampled, True where an element may move.
        not_sampled: elements that were taken out because the loss depends on them and they get no gradient, by name.
        per_sample: whether the loss function gives one loss for each sample.
        is_compiled: whether the user gave the model, a part of it, or the loss function to torch.compile.
        runs_compiled: whether it is then run as torch.compile has made it; otherwise as it was written.
        trial: what one gradient at w* was measured to be.

    Raises:
        TypeError, ValueError: nothing to sample, unknown names, unsupported tensors, a loss that is not a finite
            scalar, does not depend on the parameters, or has gradients that are not its own.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        source: DataSource,
        *,
        device: torch.device,
        params: Any = None,
        autocast: torch.dtype | None = None,
        microbatch_size: int | None = None,
        generators: Generators | None = None,
        max_checks: int = MIN_CHECKS,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")
        self.model, self.source, self.device = model, source, device
        self.microbatch_size, self._autocast = microbatch_size, autocast
        self.generators = generators or Generators(device, [model, loss_fn])
        self._module = _Evaluated(model, loss_fn)
        self._borrowed = BorrowedModel(model)
        named = self._borrowed.parameters  # tied parameters once
        sampled = select(model, params)
        for name, p in named.items():
            if is_dtensor(p.data):
                raise TypeError(
                    f"parameter {name!r} is a DTensor, one of several shards; estimate_llc spreads whole chains over "
                    "processes. For a model that fits no single device write the loop with llc_fast.SGLD, whose noise "
                    "names elements by their index in the whole tensor"
                )
        for name in sampled:
            check_tensor(f"parameter {name!r}", named[name])
            if named[name].is_inference():
                raise ValueError(
                    f"parameter {name!r} was made in torch.inference_mode() and can have no gradient: pass "
                    "copy.deepcopy(model), made outside of it"
                )
        if len(dtypes := {named[name].dtype for name in sampled}) > 1 and torch.float64 in dtypes:
            found = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(
                f"the parameters to sample have several dtypes ({found}), of float32 and float64 chains: "
                "convert the model to one dtype, or leave some out with params="
            )
        _check_apart({name: named[name] for name in sampled})
        self._borrowed.move_to(device)
        self.reference = {name: named[name].detach() for name in sampled}
        if sum(p.numel() for p in self.reference.values()) <= _COPIED_PARAMETERS:
            # w* of its own, whatever forward writes to its parameters; a large model is copied only if it does.
            self.reference = {name: p.clone() for name, p in self.reference.items()}
        self.masks = {name: mask.to(device) for name, mask in sampled.items() if mask is not None}
        self.frozen = {name: p.detach() for name, p in named.items() if name not in sampled}
        self._fixed: dict[str, Tensor] = {}
        if sum(p.numel() for p in self.frozen.values()) <= _COPIED_PARAMETERS:  # forward may write to these, too
            self._fixed = {name: p.clone() for name, p in self.frozen.items()}
        self._buffers = dict(model.named_buffers())
        self._swaps_buffers, self._is_exact = True, False
        self.is_compiled = has_compiled_parts(model, loss_fn)
        self.runs_compiled = self.is_compiled and not can_set_compiling_aside()
        self.per_sample = False
        self.not_sampled: dict[str, int] = {}
        self.trial = try_out(self, max_checks)
        if self.trial.writes_parameters:
            self.reference = {name: p.clone() for name, p in self.reference.items()}
        else:
            self._fixed = {}
        self._swaps_buffers = self.trial.writes_buffers

    @property
    def borrowed(self) -> BorrowedModel:
        """The user's model while it is used."""
        return self._borrowed

    @property
    def loss_fn(self) -> LossFunction | None:
        """What was given as such."""
        return self._module._loss_fn

    @property
    def uses_own_loss(self) -> bool:
        """Whether the model returns its own loss."""
        return self._module.uses_own_loss

    @property
    def takes_model(self) -> bool:
        """Whether the loss function is called as ``loss_fn(model, batch)``."""
        return self._module._takes_model

    def move_to(self, reference: Mapping[str, Tensor]) -> None:
        """Another w*, of the same parameters; the model keeps its own."""
        self.reference = {name: reference[name].to(w.device, w.dtype) for name, w in self.reference.items()}

    def freeze(self, name: str) -> None:
        """Leave a parameter at w* instead of sampling it."""
        self.frozen[name] = self.reference.pop(name)
        self.masks.pop(name, None)

    @property
    def num_parameters(self) -> int:
        """Elements that are sampled."""
        return sum(int(self.masks[k].sum()) if k in self.masks else p.numel() for k, p in self.reference.items())

    @property
    def is_precise(self) -> bool:
        """Whether losses are computed in float32 or better throughout."""
        wide = (torch.float32, torch.float64)
        autocast = self._autocast is not None or torch.is_autocast_enabled(self.device.type)
        return (self._is_exact or not autocast) and all(p.dtype in wide for p in self.reference.values())

    @property
    def rounding(self) -> float:
        """The relative error of a loss, half a unit of the coarsest parameter's precision."""
        return 0.5 * max(torch.finfo(p.dtype).eps for p in self.reference.values())

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers: a chain may write to its own (batch-norm statistics)."""
        return {name: b.clone() for name, b in self._buffers.items()}

    def holding(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside ``with`` the model's parameters hold these tensors' values: for :meth:`loss` and its gradients."""
        return self._borrowed.holding(params, self._fixed, buffers if self._swaps_buffers else {})

    @property
    def targets(self) -> list[nn.Parameter]:
        """What gradients are taken with respect to inside :meth:`holding`: the model's own parameters."""
        return [self._borrowed.parameters[name] for name in self.reference]

    def loss(self, batch: Batch, share: float = 1.0) -> Evaluation:
        """The loss of one batch inside :meth:`holding`, times `share`, which makes it part of a larger batch's."""
        with self._precision(), self._as_written():
            loss = self._module(batch)
        return self._reduced(loss, share)

    def outputs(self, batch: Batch) -> Any:
        """What the model returns for a batch, inside :meth:`holding`; of a loss that calls it, what that was given.

        Raises:
            ValueError: the loss function does not call the model itself.
        """
        with self.evaluating():
            return self._module.outputs(batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside ``with``, in :meth:`holding`, what calls the model does so in the precision of the run."""
        with self._precision(), self._as_written():
            yield

    def losses_of_one(self, batch: Batch) -> Tensor:
        """The loss of every sample as a batch of one, ``[batch]``, inside :meth:`holding`; by ``torch.func.vmap``."""
        with self.evaluating():
            losses: Tensor = self._module(batch, True)
        return losses

    def as_minibatch(self, batch: Batch) -> Batch:
        """A batch of the user's as the loss function is given those of the run."""
        if (prepare := getattr(self.loss_fn, "as_minibatch", None)) is not None:
            return prepare(batch)
        if self.takes_model:
            return batch
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"batch must be (inputs…, target), as loss_fn takes it, got {described(batch)}")
        return tuple(batch)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Those of :meth:`loss` with respect to :attr:`targets`, in the same :meth:`holding` or another like it."""
        targets = self.targets
        if not self.trial.is_reentrant:
            return list(torch.autograd.grad(loss, targets, materialize_grads=True))
        with _leaves_kept(loss, targets):
            loss.backward()  # type: ignore[no-untyped-call]
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in targets]
        for p in targets:  # the next one must not be added to it
            p.grad = None
        return found

    def consume_gradients(self, loss: Tensor, take: Callable[[str, Tensor], object], *, plain: bool = False) -> None:
        """The gradients of :meth:`loss`, each handed to `take` with its name, and freed, as soon as it is complete.

        Inside :meth:`holding`. `plain` is for recomputed activations of the reentrant kind, which need a backward pass
        that is told nothing; a gradient may then come in several parts.
        """
        targets = dict(zip(self.reference, self.targets, strict=True))

        def receive(name: str) -> Callable[[Tensor], None]:
            def hook(p: Tensor) -> None:
                grad, p.grad = p.grad, None
                assert grad is not None
                take(name, grad)

            return hook

        handles = [
            p.register_post_accumulate_grad_hook(receive(name))  # type: ignore[no-untyped-call]
            for name, p in targets.items()
        ]
        try:
            if plain:
                with _leaves_kept(loss, list(targets.values())):
                    loss.backward()  # type: ignore[no-untyped-call]
            else:
                loss.backward(inputs=list(targets.values()))  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()

    def evaluate(
        self, params: Mapping[str, Tensor], batch: Batch, buffers: Mapping[str, Tensor], share: float = 1.0
    ) -> Evaluation:
        """The loss of one batch at the given parameters, for its value."""
        with self.holding(params, buffers):
            return self.loss(batch, share)

    def functional(self, params: Mapping[str, Tensor], batch: Batch, buffers: Mapping[str, Tensor]) -> Evaluation:
        """The loss of one batch as a function of the parameters, for ``torch.func``; the model keeps w*."""
        named = (*params.items(), *self.frozen.items(), *buffers.items())
        with self._precision(), self._as_written():
            loss = functional_call(self._module, {f"model.{name}": t for name, t in named}, (batch,))
        return self._reduced(loss, 1.0)

    def _reduced(self, loss: Tensor, share: float) -> Evaluation:
        mean, samples = (loss.mean(), loss) if self.per_sample else (loss, None)
        return Evaluation(mean if share == 1 else mean * share, samples)

    def at_reference(self) -> contextlib.AbstractContextManager[object]:
        """The grad mode in which a loss at w* is the same function as in a chain, at the least memory."""
        return torch.no_grad() if self.trial.is_same_without_grad else torch.enable_grad()

    def in_full_precision(self) -> Objective:
        """The same without autocast, and with a bfloat16 or float16 model's tensors in float32."""
        return self.in_precision(widened)

    def in_precision(
        self, cast: Callable[[Tensor], Tensor], reference: Mapping[str, Tensor] | None = None
    ) -> Objective:
        """The same without autocast, and with the model's tensors as `cast` gives them.

        Args:
            cast: to the precision.
            reference: what takes the place of w*, in that precision; None: w* itself.
        """
        exact = copy.copy(self)
        exact._autocast, exact._is_exact = None, True
        tensors = self.reference, self.frozen, self._buffers
        if all(cast(t) is t for named in tensors for t in named.values()):
            return exact
        exact.reference = (
            {name: cast(t) for name, t in self.reference.items()} if reference is None else dict(reference)
        )
        exact.frozen, exact._buffers = ({name: cast(t) for name, t in named.items()} for named in tensors[1:])
        exact._fixed, exact._swaps_buffers = exact.frozen, True
        return exact

    def sample_losses(self, batch: Batch, one_by_one: bool = False) -> Tensor:
        """The loss of every sample of a batch at w*, ``[batch]``; raises whatever torch does if they can't be had.

        One by one, each sample is a batch of its own for the model and the loss function: slow, and always possible.
        """
        buffers = self.fresh_buffers()
        if self.per_sample:
            samples = self.evaluate(self.reference, batch, buffers).samples
            assert samples is not None
            return samples
        if self.trial.accumulates and not one_by_one:  # what vmap leaves in an attribute is of no use to the next
            raise RuntimeError("the model keeps tensors from call to call")
        with self.holding(self.reference, buffers), self._precision(), self._as_written():
            losses: Tensor = self._module(batch, True, one_by_one)
        if losses.shape != (batch_length(batch),):
            raise ValueError(f"losses of single samples have shape {tuple(losses.shape[1:])}")
        return losses

    def pieces(self, batch: Batch) -> list[tuple[Batch, float]]:
        """The microbatches of a batch, each with its share of the samples: losses times share add up to the batch's."""
        pieces = split_batch(batch, self.microbatch_size)
        length = sum(size for _, size in pieces)
        return [(piece, size / length) for piece, size in pieces]

    def full_loss(self) -> tuple[float, float]:
        """L(w*), the mean over the whole data set, accumulated in float64, and the rounding error of its pieces.

        Raises:
            ValueError: it is not finite, or the data give no sample.
        """
        total, count, precision = torch.zeros((), dtype=torch.float64, device=self.device), 0.0, 0.0
        buffers, size_at_most = self.fresh_buffers(), self.microbatch_size
        if size_at_most is None and not self.trial.is_same_without_grad:
            size_at_most = self.source.batch_size  # a graph is kept of each
        with self.at_reference():
            for batch, weight in self.source.full():
                pieces = split_batch(batch, size_at_most)
                each = weight / sum(size for _, size in pieces)  # of one sample
                for piece, size in pieces:
                    loss = self.evaluate(self.reference, piece, buffers).loss.detach()
                    precision = torch.finfo(loss.dtype).eps
                    total += loss.to(torch.float64) * size * each
                count += weight
        if count == 0:
            raise ValueError("data is empty: it has no samples")
        mean = float(total) / count
        return checked_init_loss(mean), 0.5 * precision * abs(mean)

    def minibatch_loss(self, params: Mapping[str, Tensor], batch: Batch, buffers: Mapping[str, Tensor]) -> Tensor:
        """The loss of a minibatch for its value, in microbatches as a chain takes them."""
        pieces = self.pieces(copy.deepcopy(batch) if self.trial.writes_batch else batch)
        losses = [self.evaluate(params, piece, buffers, share).loss.detach() for piece, share in pieces]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(dtype=torch.float64)

    def gradient_at(self, params: Mapping[str, Tensor], batch: Batch, take: Callable[[str, Tensor], object]) -> Tensor:
        """The gradient of a batch's loss, each parameter's handed to `take` and freed as soon as it is complete.

        With microbatches `take` is called for each: gradients add up.

        Returns:
            The loss.
        """
        buffers, total = self.fresh_buffers(), torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.enable_grad(), self.holding(params, buffers):
            for piece, share in self.pieces(copy.deepcopy(batch) if self.trial.writes_batch else batch):
                loss = self.loss(piece, share).loss
                self.consume_gradients(loss, take, plain=self.trial.is_reentrant)
                total += loss.detach()
        return total

    def identity(self) -> dict[str, Any]:
        """What names model and data: the values of w*, of what is not sampled, of buffers and masks, and the data."""
        fixed = [*self.frozen.items(), *self.fresh_buffers().items()]
        identity: dict[str, Any] = {
            "model": digest(self.reference.items()),
            "frozen parameters and buffers": digest(fixed),
            "masks": digest(self.masks.items()),
        }
        return identity | data_identity(self.source)

    def _as_written(self) -> contextlib.AbstractContextManager[object]:
        if self.runs_compiled or not self.is_compiled:
            return contextlib.nullcontext()
        return compiling_set_aside()

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self._is_exact:
            return torch.autocast(self.device.type, enabled=False)  # the caller's, too
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)


def checked_init_loss(value: float) -> float:
    """L(w*), or a ValueError if it is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"the loss at w* over the whole data set is {value}: check the model and the data")
    return value


def _check_apart(parameters: Mapping[str, Tensor]) -> None:
    """Raise unless no two parameters share memory: chains would move them apart."""
    found: list[tuple[int, int, str]] = []
    for name, p in parameters.items():
        if p.numel() and p.data_ptr():
            span = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
            found.append((p.data_ptr(), p.data_ptr() + span * p.element_size(), name))
    found.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(found):
        if start < end:
            raise ValueError(
                f"parameters {first!r} and {second!r} are different Parameters on the same memory, which a chain would "
                "move apart: tie them by assigning one Parameter object to both, or select one with params="
            )


@contextlib.contextmanager
def _leaves_kept(loss: Tensor, targets: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of leaves of a graph other than the targets are as before after a plain backward pass."""
    mine = set(map(id, targets))
    leaves = (getattr(node, "variable", None) for node in graph_of(loss))
    others = [(leaf, leaf.grad) for leaf in leaves if leaf is not None and id(leaf) not in mine]
    for leaf, _ in others:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in others:
            leaf.grad = grad


def widened(t: Tensor) -> Tensor:
    """bfloat16 and float16 as float32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def data_identity(source: DataSource) -> dict[str, Any]:
    """What names the data: the number of samples, and the values of a few of them if they are addressed by index."""
    identity: dict[str, Any] = {"num_samples": source.num_samples, "batch_size": source.batch_size}
    if isinstance(source, IndexedSource) and source.num_samples:
        some = spread_indices(source.num_samples, 64)
        with torch.random.fork_rng(devices=[]):  # what augmentation draws here must not be missing elsewhere
            found = leaves(source.gather(some.to(source.index_buffer(1).device)))
        identity["data"] = digest((str(k), t) for k, t in enumerate(found) if isinstance(t, Tensor))
    return identity


def leaves_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory as tensors that gradients are taken with respect to, each with a version counter of its own."""
    # `.data`, because detach() would share the counter, and moving one tensor would make autograd distrust all.
    return {name: t.data.requires_grad_() for name, t in tensors.items()}
