"""Losses of single samples and tokens, for a loss function that may return a mean: found, and checked against it."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llc_fast.batches import Batch, batch_length
from llc_fast.language import IGNORED
from llc_fast.objective.objective import Objective
from llc_fast.objective.outputs import OUTPUT, loss_in
from llc_fast.support.errors import first_line

Per = Literal["sample", "token"]
PER = ("sample", "token")
ProbeLoss = Callable[[nn.Module, Batch], Tensor]
"""``probe_loss(model, batch)``: the loss of each sample, ``[batch]``, or of each token, ``[batch, tokens]``."""
Combination = Literal["elements", "samples", "sums", "tokens of the data"]
"""How the loss of a batch is made of its elements: their mean; the mean of the samples' means; the mean of the samples'
sums; their sum over the number of samples and T̄, see :class:`llc_fast.language.TokenLoss`."""

_TOLERANCE, _COARSE = 1e-4, 2e-2
"""Relative differences from the loss of the run that rounding explains; the latter below float32."""
_ONE_BY_ONE = "every sample as a batch of one"
_BESIDE = 0.05
"""How far from w*, over its size, the check is made again: at w* itself all losses may be 0."""


class _Form(NamedTuple):
    """One way to get at the elements that a loss is the mean of, ``[batch, …]``, NaN where one does not count.

    `elements` is called while the model holds a chain's parameters.
    """

    name: str
    elements: Callable[[Batch], Tensor]
    combination: Combination | None = None
    """None: to be found."""
    is_given: bool = False
    """Whether the user says so: then nothing is looked for beside it."""
    whole: Callable[[Batch], Tensor] | None = None
    """The same where every element counts; None: `elements` is as fast."""


@dataclass(frozen=True)
class SampleLosses:
    """``losses(params, batch, buffers)``: the loss of each sample, ``[batch]``, or of each token, ``[batch, tokens]``.

    Tokens that do not count (padding, labels of −100) are NaN, at the same places at all parameters; so is a sample
    none of whose tokens counts.

    Attributes:
        objective: of the run.
        per: which.
        name: the form, in words.
        combination: how the run's loss is the mean of these losses' elements. ``"elements"``: samples with more tokens
            weigh more in it than in the mean of losses per sample.
        elements: of a batch, ``[batch, …]``, while the model holds a chain's parameters.
        whole: the same where it is known that every element counts; None: `elements` is as fast.
    """

    objective: Objective
    per: Per
    name: str
    combination: Combination
    elements: Callable[[Batch], Tensor]
    whole: Callable[[Batch], Tensor] | None = None

    def without_gaps(self) -> SampleLosses:
        """For batches of which every element is known to count."""
        return self if self.whole is None else replace(self, elements=self.whole)

    def __call__(self, params: Mapping[str, Tensor], batch: Batch, buffers: Mapping[str, Tensor]) -> Tensor:
        with self.objective.holding(params, buffers):
            return self.here(batch)

    @property
    def by_vmap(self) -> bool:
        """Whether the model itself sees samples of torch.func, not tensors."""
        return self.name == _ONE_BY_ONE and self.objective.takes_model

    def counted(self, batch: Batch) -> Tensor:
        """Which elements of each sample count, bool ``[batch, …]``, at the parameters that the model holds."""
        batch = copy.deepcopy(batch) if self.objective.trial.writes_batch else batch
        return ~self.elements(batch).detach().isnan()

    def here(self, batch: Batch) -> Tensor:
        """The same at the parameters that the model holds."""
        batch = copy.deepcopy(batch) if self.objective.trial.writes_batch else batch
        elements = self.elements(batch).detach()
        if elements.ndim == 1:
            return elements
        elements = elements.flatten(1)
        if self.per == "token":
            return elements
        if self.combination == "sums":
            return elements.nansum(1).masked_fill(elements.isnan().all(1), math.nan)
        return elements.nanmean(1)


def sample_losses_for(
    objective: Objective, per: Per, batches: Sequence[Batch], probe_loss: ProbeLoss | None = None
) -> SampleLosses:
    """Losses of single samples or tokens for the loss of a run.

    By the first of these that gives the run's own loss again, at w* and beside it, as the mean over all elements or
    over samples:

    - `probe_loss`, if it is given, and nothing else;
    - ``loss_fn="next-token"`` and the behavioural loss of token sequences, token by token;
    - the loss function itself, if it returns one loss for each sample;
    - the loss function with ``reduction="none"``: a module of torch's kind, a function with that argument, or a
      ``functools.partial`` of one;
    - cross-entropy or squared error of what the model returns, and for language models the cross-entropy of the next
      token, with labels of −100 and attention masks, whatever wrote the loss;
    - for losses of samples, the loss function of every sample as a batch of one (``torch.func.vmap``).

    To be called with the generators of the run kept, and in a grad mode that the model works in.

    Args:
        objective: model, loss and data.
        per: ``"sample"``: ``[batch]``, the mean over what counts within a sample. ``"token"``: ``[batch, tokens]``.
        batches: minibatches that it is checked on.
        probe_loss: ``probe_loss(model, batch)``, by the user.

    Raises:
        ValueError: none of these gives the run's loss; says what each gives, and what to write.
        TypeError: `probe_loss` returns something else.
    """
    return _Search(objective, per, batches).find(probe_loss)


class _Search:
    def __init__(self, objective: Objective, per: Per, batches: Sequence[Batch]) -> None:
        if per not in PER:
            raise ValueError(f'per must be "sample" or "token", got {per!r}')
        self._objective, self._per, self._batches = objective, per, batches
        tolerance = _TOLERANCE if objective.is_precise else _COARSE
        self._tolerance = tolerance

    def find(self, probe_loss: ProbeLoss | None) -> SampleLosses:
        forms = [_given(self._objective, probe_loss)] if probe_loss is not None else _forms(self._objective, self._per)
        places = [self._objective.reference, self._beside()]
        expected = [[self._loss(params, batch) for batch in self._batches] for params in places]
        refused: list[str] = []
        for form in forms:
            try:
                # Where torch would go through the samples one by one it warns.
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=".*performance drop")
                    found = [[self._elements(form, params, batch) for batch in self._batches] for params in places]
                combination = self._combination(form, found, expected)
            except Exception as error:  # torch's, of a form that does not fit the loss
                if form.is_given:
                    raise
                refused.append(f"{form.name}: {first_line(error)}")
                continue
            return SampleLosses(self._objective, self._per, form.name, combination, form.elements, form.whole)
        raise ValueError(self._refusal(refused))

    # ---- evaluations -----------------------------------------------------------------------------------------

    def _beside(self) -> dict[str, Tensor]:
        """Parameters a little way from w*; always the same."""
        generator, found = torch.Generator().manual_seed(0), {}
        for name, w in self._objective.reference.items():
            noise = torch.randn(w.shape, generator=generator, dtype=torch.float32).to(w.device, w.dtype)
            size = w.float().square().mean().sqrt().to(w.dtype) if w.numel() else 0.0
            moved = w + _BESIDE * size * noise
            mask = self._objective.masks.get(name)
            found[name] = moved if mask is None else torch.where(mask, moved, w)
        return found

    def _loss(self, params: Mapping[str, Tensor], batch: Batch) -> float:
        objective = self._objective
        batch = copy.deepcopy(batch) if objective.trial.writes_batch else batch
        with objective.generators.kept():
            return float(objective.evaluate(params, batch, objective.fresh_buffers()).loss.detach().double())

    def _elements(self, form: _Form, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        objective = self._objective
        batch = copy.deepcopy(batch) if objective.trial.writes_batch else batch
        with objective.generators.kept(), objective.holding(params, objective.fresh_buffers()):
            found = form.elements(batch).detach()
        length = batch_length(batch)
        if found.ndim == 0 or len(found) != length:
            raise ValueError(f"it has shape {list(found.shape)} for a batch of {length}")
        if self._per == "token" and found.ndim == 1:
            raise ValueError("it gives one loss for each sample, not for each token")
        return found.double()

    # ---- the check -------------------------------------------------------------------------------------------

    def _combination(self, form: _Form, found: list[list[Tensor]], expected: list[list[float]]) -> Combination:
        """How the run's losses are made of these elements.

        Raises:
            ValueError: in none of the ways.
        """
        ways: tuple[Combination, ...] = ("elements", "samples", "sums")
        ways = ways if form.combination is None else (form.combination,)
        if max(e.ndim for es in found for e in es) == 1:
            ways = ways[:1]
        worst: dict[Combination, tuple[float, float, float]] = {}
        for way in ways:
            rows = [
                (self._off(way, elements, loss), self._combined(way, elements), loss)
                for here, losses in zip(found, expected, strict=True)
                for elements, loss in zip(here, losses, strict=True)
                if math.isfinite(loss)
            ]
            worst[way] = max(rows, default=(0.0, 0.0, 0.0))
            if worst[way][0] <= self._tolerance:
                return way
        _, mean, loss = worst[ways[0]]
        message = f"its mean is {mean:.6g} where the loss of the run is {loss:.6g}"
        if form.is_given:
            raise ValueError(
                f"probe_loss is not the loss of the run: {message}, on a minibatch at w* or beside it. Let it return "
                "the losses that loss_fn is the mean of, [batch] or [batch, tokens], with NaN for tokens that don't "
                "count"
            )
        raise ValueError(message)

    def _off(self, way: Combination, elements: Tensor, loss: float) -> float:
        """The difference from the run's loss, relative to the size of what is averaged."""
        scale = max(abs(loss), 1e-3 * float(elements.abs().nanmean()))
        off = abs(self._combined(way, elements) - loss)
        return off / scale if scale > 0 else 0.0 if off == 0 else math.inf

    def _combined(self, way: Combination, elements: Tensor) -> float:
        if way == "tokens of the data":
            return float(elements.nansum()) / (len(elements) * getattr(self._objective.loss_fn, "mean_tokens", 1.0))
        if way == "elements" or elements.ndim == 1:
            return float(elements.nanmean())
        flat = elements.flatten(1)
        if way == "samples":
            return float(flat.nanmean(1).nanmean())
        return float(flat.nansum(1).mean())

    def _refusal(self, refused: Sequence[str]) -> str:
        what = "[batch]" if self._per == "sample" else "[batch, tokens]"
        tried = "; ".join(refused)
        return (
            f"loss_fn returns a mean, and the losses of single {self._per}s can't be had from it (tried: {tried}). "
            f"Pass probe_loss=, a function probe_loss(model, batch) that returns {what}, of which the loss of the run "
            "is the mean"
        )


# ---- the forms ---------------------------------------------------------------------------------------------


def _given(objective: Objective, probe_loss: ProbeLoss) -> _Form:
    def elements(batch: Batch) -> Tensor:
        with objective.evaluating():
            found = probe_loss(objective.model, batch)
        length = batch_length(batch)
        if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != length:
            shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"probe_loss must return a tensor [batch] or [batch, tokens], got {shape} for a batch of {length}"
            )
        return found

    return _Form("probe_loss", elements, is_given=True)


def _forms(objective: Objective, per: Per) -> Iterator[_Form]:
    """All that may fit, the surest first."""
    loss_fn = objective.loss_fn
    if (by_token := getattr(loss_fn, "by_token", None)) is not None:
        yield _Form("token by token", _evaluated(objective, by_token), "tokens of the data")
    if objective.per_sample:
        yield _Form("the loss function", lambda batch: _samples_of(objective, batch), "samples")
    if not objective.takes_model and (unreduced := _without_reduction(loss_fn)) is not None:
        ignored = _ignored_index(loss_fn)
        whole = functools.partial(_unreduced, objective, unreduced, None)
        elements = whole if ignored is None else functools.partial(_unreduced, objective, unreduced, ignored)
        yield _Form('reduction="none"', elements, whole=whole)
    for name, of_outputs in _AUTOMATIC.items():
        yield _Form(name, functools.partial(_automatic, objective, of_outputs))
    if per == "sample" and not objective.trial.accumulates:
        yield _Form(_ONE_BY_ONE, objective.losses_of_one)


def _evaluated(objective: Objective, function: Callable[[nn.Module, Batch], Tensor]) -> Callable[[Batch], Tensor]:
    def elements(batch: Batch) -> Tensor:
        with objective.evaluating():
            return function(objective.model, batch)

    return elements


def _samples_of(objective: Objective, batch: Batch) -> Tensor:
    samples = objective.loss(batch).samples
    assert samples is not None
    return samples


def _without_reduction(loss_fn: Any) -> Callable[[Any, Any], Tensor] | None:
    """The loss function that leaves its losses as they are; None: it has no such argument."""
    if isinstance(loss_fn, nn.Module):
        if not isinstance(getattr(loss_fn, "reduction", None), str):
            return None
        found = copy.copy(loss_fn)  # its weights are shared
        vars(found)["reduction"] = "none"
        return found
    try:
        takes = "reduction" in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return functools.partial(loss_fn, reduction="none") if takes else None


def _ignored_index(loss_fn: Any) -> int | None:
    """The target that a loss function of torch's leaves out; None: it has no such argument."""
    if isinstance(loss_fn, nn.Module):
        found = getattr(loss_fn, "ignore_index", None)
    else:
        parameter = inspect.signature(loss_fn).parameters.get("ignore_index")  # a partial's has the value it was given
        found = None if parameter is None else parameter.default
    return found if isinstance(found, int) else None


def _unreduced(
    objective: Objective, loss_fn: Callable[[Any, Any], Tensor], ignored: int | None, batch: Batch
) -> Tensor:
    output, target = objective.outputs(batch), batch[-1]
    with objective.evaluating():
        losses = loss_in(loss_fn(output, target), OUTPUT)
    if ignored is not None and isinstance(target, Tensor) and target.shape == losses.shape:
        losses = losses.masked_fill(target == ignored, math.nan)
    return losses


def _automatic(
    objective: Objective, of_outputs: Callable[[Tensor, Tensor, Tensor | None], Tensor], batch: Batch
) -> Tensor:
    """A loss of the model's outputs and the batch's target."""
    output = _tensor_of(objective.outputs(batch))
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    with objective.evaluating():
        return of_outputs(output, _target_of(batch), mask)


def _tensor_of(output: Any) -> Tensor:
    """Logits, or whatever the model returns that is like them."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = next((t for t in output if isinstance(t, Tensor) and t.ndim), None)
    if not isinstance(found, Tensor):
        raise ValueError("the model returns no tensor")
    return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found


def _target_of(batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in ("labels", "label", "input_ids") if batch.get(name) is not None), None)
    else:
        found = batch[-1] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(found, Tensor):
        raise ValueError("the batch has no target that is a tensor")
    return found


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Of numbers of classes, with classes in the last dimension of the output; of the shape of the target."""
    if target.is_floating_point() or output.shape[:-1] != target.shape:
        raise ValueError("targets are no numbers of classes")
    losses = F.cross_entropy(output.flatten(0, -2), target.flatten().long(), ignore_index=IGNORED, reduction="none")
    return losses.view(target.shape).masked_fill(target == IGNORED, math.nan)


def _next_token(masked: bool, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if output.ndim != 3:
        raise ValueError("the model returns no logits of tokens")
    target = target[:, 1:]
    if masked:
        if mask is None:
            raise ValueError("there is no attention mask")
        target = torch.where((mask[:, 1:] != 0) & (mask[:, :-1] != 0), target, IGNORED)
    return _cross_entropy(output[:, :-1], target)


def _classes(masked: bool, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if masked:
        if mask is None:
            raise ValueError("there is no attention mask")
        target = torch.where(mask != 0, target, IGNORED)
    return _cross_entropy(output, target)


def _classes_second(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """As torch's own cross-entropy has them, ``[batch, classes, …]``."""
    return _cross_entropy(output.movedim(1, -1), target)


def _squared_error(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if output.shape != target.shape:
        if output.squeeze(-1).shape != target.squeeze(-1).shape:
            raise ValueError("output and target have different shapes")
        output, target = output.squeeze(-1), target.squeeze(-1)
    return (output - target).square()


_AUTOMATIC: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "cross-entropy": functools.partial(_classes, False),
    "cross-entropy of classes in dimension 1": _classes_second,
    "cross-entropy of the next token": functools.partial(_next_token, False),
    "cross-entropy of the next token where the attention mask is 1": functools.partial(_next_token, True),
    "cross-entropy where the attention mask is 1": functools.partial(_classes, True),
    "squared error": _squared_error,
}
