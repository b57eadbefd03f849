"""Model + loss + data = the localized, tempered posterior that chains sample."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

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
from llc_fast.objective.flops import FlopCounter
from llc_fast.objective.selection import select
from llc_fast.support.fingerprint import digest
from llc_fast.support.torch_private import version_of

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

    def forward(self, batch: Batch, by_sample: bool = False) -> Tensor:
        if by_sample:
            return self._by_sample(batch)
        if self._loss_fn is None:
            output = self.model(**batch)
            return output["loss"] if isinstance(output, Mapping) else output.loss  # type: ignore[no-any-return]
        if self._takes_model:
            return self._loss_fn(self.model, batch)
        return self._loss_fn(self.model(*batch[:-1]), batch[-1])

    def _by_sample(self, batch: Batch) -> Tensor:
        """The loss of every sample as a batch of one; the model itself sees them together where it can."""
        if self._loss_fn is None or self._takes_model:
            losses: Tensor = vmap(lambda sample: self(_batch_of_one(sample)))(batch)
            return losses
        loss_fn, output = self._loss_fn, self.model(*batch[:-1])
        losses = vmap(lambda out, target: loss_fn(_batch_of_one(out), _batch_of_one(target)))(output, batch[-1])
        return losses


def _batch_of_one(sample: Batch) -> Batch:
    return map_tensors(lambda t: t[None], sample)


@dataclass(frozen=True)
class Trial:
    """What one forward and backward pass at w* was measured to be; strategies are chosen by it.

    Attributes:
        flops: floating-point operations of one gradient, counted; infinite if they can't be (a compiled model).
        activation_bytes: what autograd keeps of one forward pass.
        unused: names of parameters that the loss does not depend on.
        has_tensor_batches: whether a batch holds nothing but tensors.
        is_random: whether the loss draws random numbers (dropout).
        writes_buffers, writes_batch: whether a forward pass changes the model's buffers, or its input.
    """

    flops: float
    activation_bytes: int
    unused: tuple[str, ...]
    has_tensor_batches: bool
    is_random: bool
    writes_buffers: bool
    writes_batch: bool


class Objective:
    """p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²), with w* the model's parameters, which are never written to.

    Chains evaluate the model with their own parameters through ``torch.func.functional_call``: the model keeps
    w*, so that w* is in memory once.

    Args:
        model: the trained model, in the mode (train or eval) it is to be judged in.
        loss_fn: ``loss_fn(output, target)`` or ``loss_fn(model, batch)``, see :data:`LossFunction`.
        source: the data.
        device: where to compute; parameters elsewhere are copied there.
        params: which parameters to sample; None: all that require a gradient. See :func:`select`.
        autocast: dtype of the forward pass under ``torch.autocast``; None: no autocast.
        microbatch_size: samples that pass the model at a time; None: the whole minibatch.

    Attributes:
        reference: w* by name, of the parameters that are sampled.
        frozen: the other parameters by name.
        masks: for those of which only a part is sampled, True where an element may move.
        per_sample: whether the loss function gives one loss for each sample.
        trial: what one gradient at w* was measured to be.

    Raises:
        TypeError, ValueError: nothing to sample, unknown names, unsupported tensors, a loss that is not a finite
            scalar or does not depend on the parameters.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")
        self.model, self.source, self.device = model, source, device
        self.microbatch_size, self._autocast = microbatch_size, autocast
        self._module = _Evaluated(model, loss_fn)
        named = dict(model.named_parameters())  # tied parameters once
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
        if len(dtypes := {named[name].dtype for name in sampled}) > 1:
            found = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"the parameters to sample have several dtypes ({found}): convert the model to one")
        self.reference = {name: named[name].detach().to(device) for name in sampled}
        self.masks = {name: mask.to(device) for name, mask in sampled.items() if mask is not None}
        self.frozen = {name: p.detach().to(device) for name, p in named.items() if name not in sampled}
        self._buffers = {name: b.to(device) for name, b in model.named_buffers()}
        self.trial = self._try()

    @property
    def num_parameters(self) -> int:
        """Elements that are sampled."""
        return sum(int(self.masks[k].sum()) if k in self.masks else p.numel() for k, p in self.reference.items())

    @property
    def is_precise(self) -> bool:
        """Whether losses are computed in float32 or better throughout."""
        wide = (torch.float32, torch.float64)
        return self._autocast is None and next(iter(self.reference.values())).dtype in wide

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers: a chain may write to its own (batch-norm statistics)."""
        return {name: b.clone() for name, b in self._buffers.items()}

    def evaluate(
        self, params: Mapping[str, Tensor], batch: Batch, buffers: Mapping[str, Tensor], share: float = 1.0
    ) -> Evaluation:
        """The loss of one batch at the given parameters, times `share`, which makes it part of a larger batch's."""
        named = (*params.items(), *self.frozen.items(), *buffers.items())
        with self._precision():
            loss = functional_call(self._module, {f"model.{name}": t for name, t in named}, (batch,))
        mean, samples = (loss.mean(), loss) if self.per_sample else (loss, None)
        return Evaluation(mean if share == 1 else mean * share, samples)

    def in_full_precision(self) -> Objective:
        """The same without autocast, and with a bfloat16 or float16 model's tensors in float32."""
        exact = copy.copy(self)
        exact._autocast = None
        exact.reference, exact.frozen, exact._buffers = (
            {name: widened(t) for name, t in tensors.items()}
            for tensors in (self.reference, self.frozen, self._buffers)
        )
        return exact

    def sample_losses(self, batch: Batch) -> Tensor:
        """The loss of every sample of a batch at w*, ``[batch]``; raises whatever torch does if they can't be had."""
        buffers = self.fresh_buffers()
        if self.per_sample:
            samples = self.evaluate(self.reference, batch, buffers).samples
            assert samples is not None
            return samples
        named = (*self.reference.items(), *self.frozen.items(), *buffers.items())
        with self._precision():
            losses: Tensor = functional_call(self._module, {f"model.{name}": t for name, t in named}, (batch, True))
        if losses.shape != (batch_length(batch),):
            raise ValueError(f"losses of single samples have shape {tuple(losses.shape[1:])}")
        return losses

    def pieces(self, batch: Batch) -> list[tuple[Batch, float]]:
        """The microbatches of a batch, each with its share of the samples: losses times share add up to the batch's."""
        pieces = split_batch(batch, self.microbatch_size)
        length = sum(size for _, size in pieces)
        return [(piece, size / length) for piece, size in pieces]

    def full_loss(self) -> tuple[float, float]:
        """L(w*), the mean over the whole data set, accumulated in float64, and its error.

        Each piece's loss is rounded in the model's precision. Where the data had no end, and only their first batches
        were taken, the standard error over these batches comes on top.

        Raises:
            ValueError: it is not finite, or the data give no sample.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        pieces: list[tuple[Tensor, int]] = []
        buffers = self.fresh_buffers()
        with torch.no_grad():
            for batch, _ in self.source.full():
                for piece, size in split_batch(batch, self.microbatch_size):
                    loss = self.evaluate(self.reference, piece, buffers).loss
                    precision = torch.finfo(loss.dtype).eps
                    pieces.append((loss.to(torch.float64), size))
                    total += pieces[-1][0] * size
                    count += size
        if count == 0:
            raise ValueError("data is empty: it has no samples")
        value = float(total) / count
        if not math.isfinite(value):
            raise ValueError(f"the loss at w* over the whole data set is {value}: check the model and the data")
        sampled = 0.0
        if getattr(self.source, "truncated", False) and len(pieces) > 1:
            shares = torch.tensor([size / count for _, size in pieces], dtype=torch.float64)
            deviations = torch.stack([loss for loss, _ in pieces]).cpu() - value
            sampled = float((shares * deviations).square().sum() * len(pieces) / (len(pieces) - 1))
        return value, math.hypot(0.5 * precision * value, math.sqrt(sampled))

    def gradient_at(self, params: Mapping[str, Tensor], batch: Batch, take: Callable[[str, Tensor], object]) -> None:
        """The gradient of a batch's loss, each parameter's handed to `take` and freed as soon as it is complete.

        `params` are leaves (see :func:`leaves_of`). With microbatches `take` is called for each: gradients add up.
        """
        buffers = self.fresh_buffers()
        for piece, share in self.pieces(copy.deepcopy(batch) if self.trial.writes_batch else batch):
            with torch.enable_grad():
                evaluation = self.evaluate(params, piece, buffers, share)
            backward(evaluation.loss, params, take)

    def identity(self) -> dict[str, Any]:
        """What names model and data: the values of w*, of what is not sampled, of buffers and masks, and the data."""
        fixed = [*self.frozen.items(), *self.fresh_buffers().items()]
        identity: dict[str, Any] = {
            "model": digest(self.reference.items()),
            "frozen parameters and buffers": digest(fixed),
            "masks": digest(self.masks.items()),
        }
        return identity | data_identity(self.source)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)

    def _try(self) -> Trial:
        """One forward and backward pass at w*: does the loss make sense, and what does a gradient cost?"""
        batch = next(iter(self.source.minibatches(seed=0)))
        if self._module.uses_own_loss and not isinstance(batch, Mapping):
            raise TypeError(
                "loss_fn must be callable as loss_fn(output, target), got None, which is for models that return their "
                f"own loss from batches that are dictionaries; these are {type(batch).__name__}"
            )
        piece, size = split_batch(batch, self.microbatch_size)[0]
        kept = copy.deepcopy(piece)
        params, buffers = leaves_of(self.reference), self.fresh_buffers()
        watched = [*(t for t in leaves(piece) if isinstance(t, Tensor)), *buffers.values()]
        versions, generator = [version_of(t) for t in watched], torch.get_rng_state()
        cuda_generator = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.empty(0)
        self.per_sample = False
        saved = _SavedBytes(exclude=[*self.reference.values(), *self.frozen.values(), *watched])
        # A compiled model does not run under a dispatch mode.
        compiled = any(type(m).__name__ == "OptimizedModule" for m in self.model.modules())
        counter = FlopCounter()  # type: ignore[no-untyped-call]
        with contextlib.nullcontext() if compiled else counter:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
                loss = self._first_loss(params, piece, buffers)
                self._check_value(loss, size)
                mean = loss.mean()
            used: set[str] = set()
            backward(mean, params, lambda name, _: used.add(name))
        if not used:
            raise ValueError("the loss does not depend on the parameters to sample (it has no gradient)")
        changed = [version_of(t) != v for t, v in zip(watched, versions, strict=True)]
        is_random = not torch.equal(generator, torch.get_rng_state()) or (
            self.device.type == "cuda" and not torch.equal(cuda_generator, torch.cuda.get_rng_state(self.device))
        )
        if not self.per_sample:
            self._check_mean(loss, kept)
        return Trial(
            flops=math.inf if compiled else counter.flops * -(-batch_length(batch) // size),
            activation_bytes=saved.total,
            unused=tuple(name for name in self.reference if name not in used),
            has_tensor_batches=all(isinstance(t, Tensor) and t.ndim for t in leaves(batch)),
            is_random=is_random,
            writes_buffers=any(changed[len(changed) - len(buffers) :]),
            writes_batch=any(changed[: len(changed) - len(buffers)]),
        )

    def _first_loss(self, params: dict[str, Tensor], batch: Batch, buffers: dict[str, Tensor]) -> Tensor:
        """The first call of the user's functions; what goes wrong may be how they are called."""
        try:
            return self.evaluate(params, batch, buffers).loss
        except Exception as error:
            if hasattr(error, "add_note"):
                called = "loss_fn(model, batch)" if self._module._takes_model else "loss_fn(model(*inputs), target)"
                error.add_note(
                    f"llc_fast evaluated the loss as {called}, with batches as the data give them; a loss function "
                    "whose first parameter is called `model` gets (model, batch), any other (output, target)"
                )
            raise

    def _check_value(self, loss: object, size: int) -> None:
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
        self.per_sample = loss.ndim == 1 and len(loss) == size
        if loss.ndim != 0 and not self.per_sample:
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

    def _check_mean(self, loss: Tensor, batch: Batch) -> None:
        """A loss that is a sum over the batch would make λ̂ wrong by the batch size; a mean ignores repetition."""
        tensors, length = leaves(batch), batch_length(batch)
        value = abs(float(loss.detach()))
        if value == 0 or not all(isinstance(t, Tensor) and t.ndim and len(t) == length for t in tensors):
            return
        twice = map_tensors(lambda t: torch.cat([t, t]), batch)
        with torch.no_grad():
            again = float(self.evaluate(self.reference, copy.deepcopy(batch), self.fresh_buffers()).loss)
            if abs(abs(again) - value) > 1e-3 * value:
                return  # a random loss: two values say nothing
            repeated = abs(float(self.evaluate(self.reference, twice, self.fresh_buffers()).loss))
        if repeated > 1.8 * value:
            raise ValueError(
                "loss_fn sums over the batch (repeating a batch doubles it); λ̂ = nβ(mean L − L(w*)) needs the mean: "
                "use reduction='mean'"
            )


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


def leaves_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory as tensors that gradients are taken with respect to, each with a version counter of its own."""
    # `.data`, because detach() would share the counter, and moving one tensor would make autograd distrust all.
    return {name: t.data.requires_grad_() for name, t in tensors.items()}


def backward(loss: Tensor, params: Mapping[str, Tensor], take: Callable[[str, Tensor], object]) -> None:
    """The gradients of `loss`, each handed to `take` with its name, and freed, as soon as it is complete."""

    def receive(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            assert grad is not None
            take(name, grad)

        return hook

    handles = [
        p.register_post_accumulate_grad_hook(receive(name))  # type: ignore[no-untyped-call]
        for name, p in params.items()
    ]
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
