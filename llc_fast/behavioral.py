"""The behavioural loss: how far a model's output is from what it is at w*.

Its target is the model's own output at w*. So w* is its exact minimum, whether the model is trained or not, and λ̂ is
never negative. ``loss_fn="behavioral"`` makes one of the model at hand, and :func:`behavioral_loss` one to keep.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llc_fast.batches import Batch, DataSource, batch_length
from llc_fast.data import hugging_face_dataset, is_loader, make_source
from llc_fast.language import (
    IGNORED,
    ModelCall,
    NextToken,
    TokenLoss,
    call_options,
    columns_of_own_loss,
    is_causal,
    loaded_batch,
    next_tokens,
    token_source,
)
from llc_fast.language import named_loss as named_token_loss
from llc_fast.objective.outputs import described
from llc_fast.support.errors import add_note, first_line
from llc_fast.support.fingerprint import digest
from llc_fast.support.torch_private import drops, normalizes_batches

if TYPE_CHECKING:
    from llc_fast.objective.objective import LossFunction, Objective

Kind = Literal["mse", "kl"]
Outputs = Callable[[nn.Module, Batch], Tensor]
KINDS = ("mse", "kl")
NAMES: Mapping[str, Kind | None] = {"behavioral": None, "behavioral-mse": "mse", "behavioral-kl": "kl"}
"""Names that ``loss_fn`` may be; None: as the data say."""
_TOKEN_COLUMNS = {"input_ids", "attention_mask", "labels"}
_NEGLIGIBLE = 1e-3
"""What L(w*) may add to λ̂."""
_LEAST_LOG = -1e4
"""Logarithms of probabilities that are 0 are finite: a masked class has none in both outputs."""
_FAR = 1.0
"""log p − log p* above which the formula for small differences is not used."""


_ROUNDING, _COARSE = 1e-4, 1e-2
"""How far rounding may move logits, over their standard deviation: an untrained model hardly looks at other tokens."""


@dataclass(frozen=True)
class Behavioral:
    """The behavioural loss of whatever model is at hand: what ``loss_fn="behavioral"`` stands for.

    Attributes:
        kind: ``"mse"`` or ``"kl"``; None: as the data say, see :func:`behavioral_loss`.
    """

    kind: Kind | None = None


def named_loss(loss_fn: Any) -> LossFunction | NextToken | Behavioral | None:
    """A loss function that may be given by name.

    Raises:
        TypeError: there is none of that name.
    """
    if isinstance(loss_fn, str) and loss_fn in NAMES:
        return Behavioral(NAMES[loss_fn])
    return named_token_loss(loss_fn)


def behavioral_loss(model: nn.Module, loss: Kind | None = None, *, outputs: Outputs | None = None) -> BehavioralLoss:
    """The loss whose target is the model's own output at w*, its present parameters.

    ``"mse"`` is the mean of (f_w(x) − f_w*(x))², over samples and outputs, as ``torch.nn.functional.mse_loss`` has it:
    nβ multiplies that mean. ``"kl"`` is the mean over samples of KL(softmax f_w*(x) ‖ softmax f_w(x)), as exact near w*
    as the outputs are. Both are 0 at w*, and so are their gradients.

    Batches that are tuples are called as ``model(*inputs)``, without their last entry, the target, unless they have one
    entry alone; dictionaries as ``model(**batch)``. Of what a model returns, the output is the tensor itself,
    ``logits``, or the first tensor of a tuple. Where a target or ``labels`` are −100, or an ``attention_mask`` is 0,
    positions do not count. Data of token ids alone, for a causal language model, are taken as by
    ``loss_fn="next-token"``: with ``"kl"`` the mean is over all predicted tokens.

    Args:
        model: at w*, of which a copy is kept.
        loss: ``"mse"`` or ``"kl"``. None: ``"kl"`` where targets are numbers of classes (integers, of the shape of the
            output without its classes) and for causal language models, ``"mse"`` otherwise.
        outputs: ``outputs(model, batch)``, the output of a model for a batch, ``[batch, …]``, classes last; None: as
            above.

    Returns:
        A function ``loss_fn(model, batch)`` that gives one loss for each sample, ``[batch]``.

    Raises:
        TypeError: `model` is no module, or can't be copied.
        ValueError: no such loss.
    """
    return BehavioralLoss(model, loss, outputs)


class BehavioralLoss:
    """See :func:`behavioral_loss`.

    Attributes:
        kind: ``"mse"``, ``"kl"``, or None until the first batch has been seen.
    """

    def __init__(self, model: nn.Module, loss: Kind | None = None, outputs: Outputs | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if loss is not None and loss not in KINDS:
            raise ValueError(f'loss must be "mse", "kl" or None, got {loss!r}')
        if outputs is not None and not callable(outputs):
            raise TypeError(f"outputs must be callable as outputs(model, batch), got {type(outputs).__name__}")
        self.kind: Kind | None = loss
        self._outputs = outputs
        self._options = call_options(model)
        self._reference = _frozen_copy(model)
        self._records, self._tokens = True, None

    _tokens: _Tokens | None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        # The graph of the reference is let go before that of the model is made.
        with contextlib.nullcontext() if self._records else torch.no_grad():
            target = self._output(self._reference, batch).detach()
        output = self._output(model, batch)
        kind = self._kind_for(output, batch)
        if self._tokens is not None:
            return self._tokens.losses(output, target, batch, kind)
        axis = _class_axis(output, batch)
        if kind == "kl":
            if output.ndim < 2 or output.shape[axis] < 2:
                raise ValueError(
                    f'loss="kl" needs outputs for two classes or more, and these have shape {tuple(output.shape)}: use '
                    '"behavioral-mse"'
                )
            each = divergence(output, target, axis)
        else:
            each = (output - target).square()
        return _means(each, _counting(batch, each.shape), batch_length(batch))

    @property
    def settings(self) -> dict[str, Any]:
        """What a result's settings say of it."""
        name = "behavioral" if self.kind is None else f"behavioral-{self.kind}"
        return {**({} if self._tokens is None else self._tokens.settings), "loss_fn": name}

    def as_minibatch(self, batch: Batch) -> Batch:
        """A batch of the user's as this loss takes it."""
        return batch if self._tokens is None else loaded_batch(batch)

    def by_token(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of token sequences, the loss of each token but the first, ``[batch, length − 1]``; NaN: it is not predicted.

        Raises:
            ValueError: the data are no token sequences.
        """
        if self._tokens is None:
            raise ValueError("the data are no sequences of tokens")
        with contextlib.nullcontext() if self._records else torch.no_grad():
            target = self._output(self._reference, batch).detach()
        return self._tokens.by_token(self._output(model, batch), target, batch, self.kind)

    @property
    def has_tokens(self) -> bool:
        """Whether the data are sequences of tokens."""
        return self._tokens is not None

    @property
    def mean_tokens(self) -> float:
        """T̄ of token sequences, see :class:`llc_fast.language.TokenLoss`."""
        return 1.0 if self._tokens is None else self._tokens.mean_tokens

    # ---- in an estimate ------------------------------------------------------------------------------------

    def bound(self, model: nn.Module, device: torch.device) -> BehavioralLoss:
        """The same for a run, which may change it, on a device, with the modules in the mode of the model's.

        Raises:
            ValueError: the model has other weights than this one was made with.
        """
        found = copy.copy(self)
        if _state_of(self._reference) != _state_of(model):
            raise ValueError(
                "loss_fn is the behavioural loss of other weights than the model has now, which then are not its "
                'minimum: make it anew, llc_fast.behavioral_loss(model), or pass loss_fn="behavioral", which takes the '
                "weights that the model has"
            )
        if any(t.device != device for t in (*found._reference.parameters(), *found._reference.buffers())):
            found._reference.to(device)
        for mine, theirs in zip(found._reference.modules(), model.modules(), strict=False):
            mine.training = theirs.training
        return found

    def look(self, batch: Batch) -> None:
        """See whether the output is the same where no gradients are recorded, which is cheaper."""
        with torch.enable_grad():
            recorded = self._output(self._reference, batch).detach()
        try:
            with torch.no_grad():
                alone = self._output(self._reference, batch)
        except RuntimeError:  # the model takes gradients itself
            return
        self._records = not torch.equal(recorded, alone)

    def check(self, objective: Objective, nbeta: float) -> None:
        """Refuse a loss of which w* is not the minimum.

        Raises:
            ValueError: the output is no function of parameters and inputs: it is random, or is another each time.
        """
        trial = objective.trial
        if trial.is_random or trial.writes_buffers:
            looked = drops if trial.is_random else normalizes_batches
            names = [repr(name) for name, m in objective.model.named_modules() if m.training and looked(m)]
            why = "draws random numbers" if trial.is_random else "uses the statistics of each minibatch"
            named = f" ({', '.join(names[:3])}{', …' * (len(names) > 3)})" if names else ""
            raise ValueError(
                f"loss_fn is a behavioural loss, whose target is the model's own output, and the model {why}{named}, "
                "so that w* is not its minimum: call model.eval()"
            )
        batch = next(iter(objective.source.minibatches(seed=0)))
        with torch.enable_grad():
            loss = float(objective.minibatch_loss(objective.reference, batch, objective.fresh_buffers()))
        if not nbeta * loss < _NEGLIGIBLE:
            raise ValueError(
                f"loss_fn is a behavioural loss, which is 0 at w*, and it is {loss:.3g} there: the model's output is "
                "no function of its parameters and inputs alone (a state that it keeps, a cache, hooks?), or a copy of "
                "the model computes something else. Pass outputs= to behavioral_loss, or another loss"
            )

    def with_tokens(self, loss: TokenLoss) -> BehavioralLoss:
        """The same for token sequences, as :func:`llc_fast.language.token_source` gives them."""
        found = copy.copy(self)
        found._tokens, found.kind = _Tokens(loss), self.kind or "kl"
        return found

    # ---- outputs -------------------------------------------------------------------------------------------

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._tokens is not None:
            return self._tokens.output(model, batch)
        if self._outputs is not None:
            found = self._outputs(model, batch)
            if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim == 0:
                raise TypeError(f"outputs(model, batch) must return a tensor [batch, …], got {described(found)}")
            return _wide(found)
        try:
            if isinstance(batch, Mapping):
                found = model(**{**self._options, **batch})
            elif isinstance(batch, (tuple, list)):
                found = model(*(batch[:-1] if len(batch) > 1 else batch))
            else:
                found = model(batch)
        except Exception as error:
            called = "**batch" if isinstance(batch, Mapping) else "*inputs" if isinstance(batch, tuple) else "batch"
            add_note(
                error,
                f"the behavioural loss called model({called}) for the output. If it is had in another way, say how: "
                "loss_fn=llc_fast.behavioral_loss(model, outputs=lambda model, batch: …)",
            )
            raise
        return _wide(_tensor_in(found))

    def _kind_for(self, output: Tensor, batch: Batch) -> Kind:
        if self.kind is None:
            classes = _class_numbers(batch)
            fits = classes is not None and any(
                classes.shape == _without(output, axis) and output.shape[axis] > 1 for axis in _axes(output)
            )
            self.kind = "kl" if fits else "mse"
        return self.kind


class _Tokens:
    """Outputs and losses of token sequences."""

    def __init__(self, loss: TokenLoss) -> None:
        self._loss = loss
        self.settings, self.mean_tokens = loss.settings, loss.mean_tokens

    def output(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._loss.call(model, batch["input_ids"].long())

    def losses(self, output: Tensor, target: Tensor, batch: Mapping[str, Tensor], kind: Kind) -> Tensor:
        each, predicted = self._each(output, target, kind), next_tokens(batch) != IGNORED
        return (each * predicted).sum(1) / self._loss.mean_tokens

    def by_token(self, output: Tensor, target: Tensor, batch: Mapping[str, Tensor], kind: Kind | None) -> Tensor:
        each, predicted = self._each(output, target, kind), next_tokens(batch) != IGNORED
        return each.masked_fill(~predicted, math.nan)[:, :-1]

    def _each(self, output: Tensor, target: Tensor, kind: Kind | None) -> Tensor:
        return divergence(output, target, -1) if kind == "kl" else (output - target).square().mean(-1)


def behavioral_source(
    loss: Behavioral | BehavioralLoss,
    model: nn.Module,
    data: Any,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> tuple[DataSource, BehavioralLoss]:
    """The data, with or without targets, and the behavioural loss of their batches.

    Args:
        loss, model, data, batch_size: what the user gave.
        device: where batches are wanted.
        **options: of :func:`llc_fast.data.make_source`.

    Raises:
        TypeError, ValueError: data that the model can't be called with; a loss of other weights.
    """
    made = BehavioralLoss(model, loss.kind) if isinstance(loss, Behavioral) else loss
    found = made.bound(model, device)
    if found._outputs is None and _may_be_tokens(data, device, options):
        source, token_loss = token_source(NextToken(), model, data, batch_size, device, **options)
        batch = next(iter(source.minibatches(seed=0)))
        if _is_causal(token_loss.call, found._reference, batch):
            found = found.with_tokens(token_loss)
            found.look(batch)
            return source, found
    source = make_source(columns_of_own_loss(model, data), batch_size, device, pairs=False, **options)
    if not model.training:  # else its output may be random, of which `check` will tell
        with contextlib.suppress(Exception):  # the trial says what is wrong
            found.look(next(iter(source.minibatches(seed=0))))
    return source, found


def _may_be_tokens(data: Any, device: torch.device, options: Mapping[str, Any]) -> bool:
    """Whether data are token ids alone, with what belongs to them."""
    if hugging_face_dataset(data):
        return "input_ids" in data.format["columns"] and data.format["type"] != "custom" and _has_labels_of_tokens(data)
    if is_loader(data):
        return _is_batch_of_tokens(next(iter(make_source(data, None, device, pairs=False, **options).minibatches(0))))
    if isinstance(data, list) and data and not isinstance(data[0], (tuple, Mapping)):
        first = data[0]
        if isinstance(first, Tensor):
            return first.ndim == 1 and not first.is_floating_point()
        return isinstance(first, list) and bool(first) and isinstance(first[0], int)
    return _is_batch_of_tokens(data)


def _has_labels_of_tokens(data: Any) -> bool:
    return "labels" not in data.format["columns"] or hasattr(data.with_format(None)[0]["labels"], "__len__")


def _is_batch_of_tokens(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        if "input_ids" not in batch or not set(batch) <= _TOKEN_COLUMNS:
            return False
        labels = batch.get("labels")
        if isinstance(labels, list):
            return bool(labels) and hasattr(labels[0], "__len__")
        return labels is None or getattr(labels, "ndim", 0) == 2
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    return isinstance(batch, Tensor) and batch.ndim == 2 and not (batch.is_floating_point() or batch.is_complex())


def _is_causal(call: ModelCall, model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether a model gives logits for each token, by those before it."""
    is_precise = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    slack = _ROUNDING if is_precise else _COARSE
    try:
        with torch.no_grad():
            return is_causal(lambda ids: call(model, ids), batch["input_ids"][:4].long(), slack)
    except Exception:  # it is no language model, or not called like one
        return False


# ---- copies ------------------------------------------------------------------------------------------------


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, whatever the modules keep of their last call.

    Raises:
        TypeError: it can't be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():  # what weight_norm has computed, say: a part of a graph, which can't be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        with torch.no_grad():  # a scripted module's copy would be part of a graph
            return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TypeError(
            f"model can't be copied ({first_line(error)}), and the behavioural loss needs a copy of it at w*: compute "
            "the outputs at w* yourself and pass them as targets, (inputs, outputs)"
        ) from error


def _state_of(model: nn.Module) -> str:
    state = model.state_dict()
    return digest(sorted((name, t) for name, t in state.items() if isinstance(t, Tensor) and t.layout is torch.strided))


# ---- the output in what a model returns --------------------------------------------------------------------


def _wide(output: Tensor) -> Tensor:
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def _tensor_in(found: Any) -> Tensor:
    """The output: a tensor, ``logits``, or the first tensor of floats with a dimension.

    Raises:
        TypeError: there is none, or several by other names.
    """

    def fits(value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0

    if fits(found):
        return found  # type: ignore[no-any-return]
    named = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if fits(named):
        return named  # type: ignore[return-value]
    if isinstance(found, (tuple, list)) and not hasattr(found, "_fields"):
        first = next(filter(fits, found), None)
        if first is not None:
            return first  # type: ignore[no-any-return]
    values = found if isinstance(found, Mapping) else _attributes(found)
    tensors = [value for value in values.values() if fits(value)]
    if len(tensors) == 1:
        return tensors[0]  # type: ignore[no-any-return]
    raise TypeError(
        f"the behavioural loss needs the model's output as one tensor [batch, …], and the model returns "
        f"{described(found)}: say which it is, llc_fast.behavioral_loss(model, outputs=lambda model, batch: …)"
    )


def _attributes(found: object) -> dict[str, Any]:
    if hasattr(found, "_fields"):
        return {name: getattr(found, name) for name in found._fields}
    return dict(vars(found)) if hasattr(found, "__dict__") and not inspect.isclass(found) else {}


# ---- which positions count, and what is a class ------------------------------------------------------------


def _class_numbers(batch: Batch) -> Tensor | None:
    """Integers that the data have as targets."""
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[-1]
    is_integer = isinstance(found, Tensor) and not (
        found.is_floating_point() or found.is_complex() or found.dtype == torch.bool
    )
    return found if is_integer else None


def _axes(output: Tensor) -> tuple[int, ...]:
    """Where classes may be: in torch's cross_entropy they come second, in language models last."""
    return (-1,) if output.ndim <= 2 else (1, -1)


def _without(output: Tensor, axis: int) -> torch.Size:
    shape = list(output.shape)
    if shape:
        del shape[axis]
    return torch.Size(shape)


def _class_axis(output: Tensor, batch: Batch) -> int:
    """The axis of classes: the one that the targets do not have; else the last."""
    classes = _class_numbers(batch)
    if classes is not None and isinstance(batch, (tuple, list)):
        for axis in _axes(output):
            if classes.shape == _without(output, axis):
                return axis
    return -1


def _counting(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Which positions count, ``[batch, position, …]``; None: all, or those of samples with one position."""
    if len(shape) < 2:
        return None
    found: Tensor | None = None
    labels, mask = _class_numbers(batch), batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if labels is not None and labels.ndim > 1 and labels.shape == shape[: labels.ndim]:
        found = labels != IGNORED
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == shape[:2]:
        is_real = (mask != 0).reshape(mask.shape + (1,) * (0 if found is None else found.ndim - 2))
        found = is_real if found is None else found & is_real
    return found


def _means(each: Tensor, counting: Tensor | None, length: int) -> Tensor:
    """The mean of each sample, ``[batch]``, over positions that count; of all, where samples can't be told apart."""
    if not each.shape or each.shape[0] != length:
        return each.mean()
    if counting is None:
        return each.flatten(1).mean(1) if each.ndim > 1 else each
    counting = counting.reshape(counting.shape + (1,) * (each.ndim - counting.ndim)).expand_as(each).flatten(1)
    return (each.flatten(1) * counting).sum(1) / counting.sum(1).clamp(min=1)


def divergence(output: Tensor, target: Tensor, axis: int = -1) -> Tensor:
    """KL(softmax(target) ‖ softmax(output)) along an axis, which the result lacks.

    As Σ p = Σ p* = 1, it is Σ p*·(e^r − 1 − r) with r = log p − log p*. No term is negative, and where r is small each
    is ½p*r² to the precision of r: a difference of two cross-entropies would be lost in rounding. Its gradient with
    respect to `output` is p − p*, and 0 where both are the same.
    """
    target = target.log_softmax(axis).clamp(min=_LEAST_LOG)
    own = output.log_softmax(axis).clamp(min=_LEAST_LOG)
    ratio, weight = own - target, target.exp()
    near = ratio.clamp(max=_FAR)
    terms = torch.where(ratio < _FAR, weight * (torch.expm1(near) - near), own.exp() - weight * (1 + ratio))
    return terms.sum(axis)
