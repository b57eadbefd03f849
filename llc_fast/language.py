"""Language models: sequences of tokens as data, and the cross-entropy of the next token as loss.

``loss_fn="next-token"`` is a :class:`NextToken`. Sequences of any lengths become one padded tensor of token ids, and a
:class:`TokenLoss` gives one loss for each sequence, so that their plain mean is the mean over all predicted tokens.
"""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from llc_fast.batches import Batch, DataSource, leaves
from llc_fast.data import check_kind, hugging_face_dataset, is_loader, make_source, makes_batches, spread_indices
from llc_fast.support.randomness import Generators, same_states

if TYPE_CHECKING:
    from llc_fast.objective.objective import LossFunction, Objective

__all__ = ["NextToken", "TokenLoss", "chunks"]

IGNORED = -100
"""The label of a token that is not predicted, as torch and Hugging Face have it."""
_COLUMNS = ("input_ids", "attention_mask", "labels")
_BATCH_TOKENS, _MOST_SEQUENCES = 2**14, 512
"""Tokens in a minibatch if nobody says its size, and sequences at most."""
_ROWS = 10_000
"""How many rows of a data set are read at a time."""
_READ_TWICE = 16
"""How many samples are read twice to see whether reading is random."""
_STREAM_BATCHES = 64
"""Minibatches in which the tokens of a stream without an end are counted."""
_WASTED_ELEMENTS, _WASTE = 2**28, 4
"""A padded tensor of so many elements, and so many times as many as there are tokens, is refused."""
_MAX_ID = 2**31 - 1
_CAUSAL = 1e-2
"""How far logits may move by what comes after them, over their standard deviation."""


@dataclass(frozen=True)
class NextToken:
    """The loss of a causal language model, ``estimate_llc(model, data, "next-token")`` with its options.

    Attributes:
        keep_mode: whether the model stays in the mode (train or eval) that it is in. By default it is evaluated in eval
            mode, and is afterwards in its own mode again.
    """

    keep_mode: bool = False


def named_loss(loss_fn: LossFunction | NextToken | str | None) -> LossFunction | NextToken | None:
    """A loss function that may be given by name.

    Raises:
        TypeError: there is none of that name.
    """
    if isinstance(loss_fn, str):
        if loss_fn != "next-token":
            raise TypeError(
                f'loss_fn must be callable or "next-token", the loss of language models, or "behavioral", got '
                f"{loss_fn!r}: pass other losses as functions, such as torch.nn.functional.cross_entropy"
            )
        return NextToken()
    return loss_fn


class mode_for:  # noqa: N801 - it is used like a function
    """Inside ``with``, the model is in the mode in which a loss is to be evaluated; afterwards in its own.

    That is eval mode for :class:`NextToken`, and the model's own for any other loss.
    """

    def __init__(self, model: object, loss_fn: object) -> None:
        changes = isinstance(loss_fn, NextToken) and not loss_fn.keep_mode and isinstance(model, nn.Module)
        self._model = model if changes else None
        self._training: list[nn.Module] = []

    def __enter__(self) -> None:
        if isinstance(self._model, nn.Module):
            self._training = [m for m in self._model.modules() if m.training]
            if self._training:
                self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True


def chunks(tokens: Any, length: int) -> Tensor:
    """One long stream of tokens as sequences of `length` that do not overlap; what is left at its end is dropped.

    Args:
        tokens: integers, in a list, an array or a tensor of one dimension.
        length: of each sequence, 2 or more.

    Returns:
        int64 ``[sequence, length]``.

    Raises:
        TypeError: `tokens` are no integers of one dimension.
        ValueError: there are fewer than `length`.
    """
    if isinstance(length, bool) or not isinstance(length, numbers.Integral):
        raise TypeError(f"length must be an integer, got {length!r}")
    if length < 2:
        raise ValueError(f"length must be at least 2 (the first token of a sequence is not predicted), got {length}")
    flat = _integers(tokens, "tokens")
    if flat.ndim != 1:
        raise TypeError(f"tokens must have one dimension, got shape {flat.shape}")
    count = len(flat) // int(length)
    if not count:
        raise ValueError(f"length={length} is more than the {len(flat)} tokens that there are: pass a smaller length")
    return torch.from_numpy(flat[: count * length].astype(np.int64)).reshape(count, int(length))


def columns_of_own_loss(model: nn.Module, data: Any) -> Any:
    """For a model that returns its own loss, the columns of a ``datasets.Dataset`` that it takes; other data as they
    are."""
    if not hugging_face_dataset(data) or data.format["type"] == "custom":
        return data
    names = set[str]().union(*(_Forward(module).names for module in _wrapped(model)))
    columns = data.format["columns"]
    taken = [name for name in columns if name in names]
    return data.select_columns(taken) if taken and len(taken) < len(columns) else data


# ---- the loss ----------------------------------------------------------------------------------------------


class TokenLoss:
    """``loss(model, batch)``: one loss for each sequence, ``[batch]``.

    That of sequence i is the sum of the cross-entropies of its predicted tokens over T̄, the mean number of predicted
    tokens of a sequence in the data. So the mean over all sequences is the sum over all tokens by their number, and
    the mean over a minibatch has it as its expectation.

    A token is predicted if another one of its sequence comes before it, and its label is not −100.

    Args:
        call: how the model is called.
        mean_tokens: T̄.
        num_tokens: predicted tokens in the data; None: nobody knows.
        num_left_out: sequences of the data that were left out, since none of their tokens is predicted.
    """

    def __init__(self, call: ModelCall, mean_tokens: float, num_tokens: int | None, num_left_out: int = 0) -> None:
        self.call, self.mean_tokens = call, mean_tokens
        self.num_tokens, self.num_left_out = num_tokens, num_left_out

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        ids = batch["input_ids"].long()
        logits = self.call(model, ids)
        losses = F.cross_entropy(
            logits.flatten(0, 1), next_tokens(batch).flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(ids.shape).sum(1) / self.mean_tokens

    def by_token(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The cross-entropy of each token but the first, ``[batch, length − 1]``; NaN where it is not predicted."""
        logits, targets = self.call(model, batch["input_ids"].long())[:, :-1], next_tokens(batch)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(targets.shape).masked_fill(targets == IGNORED, math.nan)

    def as_minibatch(self, batch: Batch) -> Batch:
        """A batch of the user's, as loaders give them, as this loss takes it."""
        return loaded_batch(batch)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result's settings say of it."""
        left_out = {"num_left_out": self.num_left_out} if self.num_left_out else {}
        return {"loss_fn": "next-token", "num_tokens": self.num_tokens, **left_out}

    def check_causal(self, objective: Objective) -> None:
        """Refuse a model that sees the tokens which it is to predict.

        Raises:
            ValueError: logits change with tokens that come later.
        """
        if objective.trial.is_random:
            return
        batch = next(iter(objective.source.minibatches(seed=0)))
        ids = batch["input_ids"][:4].long()
        held = objective.holding(objective.reference, objective.fresh_buffers())
        with objective.generators.kept(), torch.no_grad(), held:
            found = is_causal(lambda ids: self.call(objective.model, ids), ids)
        if not found:
            raise ValueError(
                'loss_fn="next-token" is for causal models, and the logits of this one change with tokens that come '
                "later, so that it sees what it is to predict: use a causal model (is_decoder=True?), or write the "
                "loss that it was trained with as loss_fn(model, batch)"
            )


def is_causal(logits: Callable[[Tensor], Tensor], ids: Tensor, slack: float = _CAUSAL) -> bool:
    """Whether logits of the first half of sequences, ``[sequence, length]``, stay when the second half changes.

    Args:
        logits: of token ids.
        ids: the sequences.
        slack: how far they may move, over their standard deviation.
    """
    half = ids.shape[1] // 2
    others = torch.cat([ids[:, :half], ids.flip(1)[:, half:]], 1)
    if not half or torch.equal(ids, others):
        return True
    here, there = logits(ids)[:, :half], logits(others)[:, :half]
    return not float((here - there).abs().max()) > slack * float(here.std())


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """What each position predicts, −100 where that is nothing; int64 ``[batch, length]``."""
    return F.pad(batch.get("labels", batch["input_ids"]).long()[:, 1:], (0, 1), value=IGNORED)


class ModelCall:
    """``call(model, ids)``: the logits of a language model, ``[batch, length, vocabulary]``.

    Models of Hugging Face are called as ``model(input_ids=ids, use_cache=False)``, others as ``model(ids)``. What they
    return is logits, a tuple that begins with them, or an object or dictionary with ``logits``.

    No attention mask is passed. Sequences are padded on the right, where a causal model does not look.
    """

    def __init__(self, model: nn.Module) -> None:
        forwards = [_Forward(module) for module in _wrapped(model)]
        own = next((forward for forward in forwards if forward.names), None)
        self._by_name = own is not None and "input_ids" in own.names
        self._options = call_options(model) if self._by_name else {}

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        output = model(input_ids=ids, **self._options) if self._by_name else model(ids)
        logits = output
        if isinstance(output, Mapping):
            logits = output.get("logits")
        elif hasattr(output, "logits"):
            logits = output.logits
        elif isinstance(output, (tuple, list)) and output:
            logits = output[0]
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f'loss_fn="next-token" needs a model that gives logits [batch, length, vocabulary] for token ids '
                f"[batch, length]; this one gave {found} for ids of shape {tuple(ids.shape)}. Write the loss as a "
                "function: def loss_fn(model, batch): … batch['input_ids'] …"
            )
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def call_options(model: nn.Module) -> dict[str, Any]:
    """Keywords that keep a model of Hugging Face from filling a cache."""
    return {"use_cache": False} if any(_Forward(module).takes_use_cache for module in _wrapped(model)) else {}


_WRAPPERS = ("_orig_mod", "module", "base_model", "model")
"""Where torch.compile, DataParallel and PEFT keep the model that they hand keyword arguments on to."""


class _Forward:
    """What a module's ``forward`` takes: `names` of parameters, and `is_open`, whether any other keyword too."""

    def __init__(self, module: nn.Module) -> None:
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):  # scripted
            parameters = []
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.names = {p.name for p in parameters if p.kind not in kinds}
        self.is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self.takes_use_cache = "use_cache" in self.names or (
            self.is_open and hasattr(getattr(module, "config", None), "use_cache")
        )


def _wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and those inside it that it hands its keyword arguments on to."""
    seen, found = set[int](), [model]
    while found:
        module = found[0]
        yield module
        seen.add(id(module))
        forward = _Forward(module)
        inner = (getattr(module, name, None) for name in _WRAPPERS if forward.is_open and not forward.takes_use_cache)
        found = [m for m in inner if isinstance(m, nn.Module) and id(m) not in seen]


# ---- data --------------------------------------------------------------------------------------------------


def token_source(
    loss: NextToken, model: nn.Module, data: Any, batch_size: int | None, device: torch.device, **options: Any
) -> tuple[DataSource, TokenLoss]:
    """The source for token sequences in whatever form the user gave them, and the loss of its batches.

    Batches are dictionaries with ``input_ids`` ``[batch, length]``, padded on the right, and ``labels`` where they are
    not the same.

    Args:
        loss: the loss with its options.
        model: which the loss will call.
        data: a ``datasets.Dataset`` with ``input_ids``, a list of sequences, a tensor ``[sequence, length]``, a
            dictionary of these with ``attention_mask`` or ``labels``, a map-style data set, or a loader.
        batch_size: sequences in a minibatch; None: as many as have 16,384 tokens, 512 at most.
        device: where batches are wanted.
        **options: of :func:`llc_fast.data.make_source`.

    Raises:
        TypeError, ValueError: data of another kind, or no tokens; ids that the model does not know.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    call = ModelCall(model)
    check_kind(data)
    if is_loader(data):
        source = make_source(data, batch_size, device, pairs=False, check=loaded_batch, **options)
        return source, TokenLoss(call, *_counted(source))
    sequences = _Sequences.of(data)
    _check_fits(model, sequences)
    size = batch_size or max(1, min(_MOST_SEQUENCES, _BATCH_TOKENS // sequences.width))
    source = make_source(sequences.tensors(), size, device, pairs=False, **options)
    count = int(sequences.predicted.sum())
    return source, TokenLoss(call, count / len(sequences.predicted), count, sequences.num_left_out)


def _counted(source: DataSource) -> tuple[float, int | None]:
    """T̄ and the number of predicted tokens in what a loader gives, from one pass."""
    has_end = source.sampling.num_batches is not None
    tokens = sequences = 0.0
    for batch, weight in itertools.islice(source.full(), None if has_end else _STREAM_BATCHES):
        counts = (next_tokens(batch) != IGNORED).sum(1)
        tokens += float(counts.double().mean()) * weight
        sequences += weight
    if not tokens:
        raise ValueError("data predict no token: sequences have fewer than two tokens, or all labels are -100")
    is_whole = has_end and source.sampling.order != "drawn"
    return tokens / sequences, round(tokens) if is_whole else None


def loaded_batch(batch: Batch) -> dict[str, Tensor]:
    """A batch of a loader's, with sequences padded on the right, and labels that say what is predicted."""
    if isinstance(batch, Mapping):
        columns = {name: batch[name] for name in _COLUMNS if batch.get(name) is not None}
    else:
        columns = {"input_ids": batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch}
    ids = columns.get("input_ids")
    if isinstance(ids, list) and ids and all(isinstance(t, Tensor) and t.ndim == 1 for t in ids):
        raise TypeError(
            "data gives input_ids as a list of tensors, one for each position, as DataLoader makes them of Python's "
            'lists: pass DataLoader(dataset.with_format("torch"), …), or a collate_fn that pads'
        )
    for name, t in columns.items():
        if not isinstance(t, Tensor) or t.ndim != 2 or t.is_floating_point() or t.is_complex():
            raise TypeError(
                'data must give batches of token ids for loss_fn="next-token": a tensor of integers [batch, length], '
                "or a dictionary with input_ids and, if they are padded, attention_mask or labels; got "
                f"{_described(batch, name, t)}. A loss of other batches is written as loss_fn(model, batch)"
            )
    if ids is None:
        raise TypeError(f"data must give batches with input_ids, got a dictionary of {', '.join(map(str, batch))}")
    for name, t in columns.items():
        if t.shape != ids.shape:
            raise ValueError(f"data has {name} of shape {tuple(t.shape)} for input_ids of shape {tuple(ids.shape)}")
    mask = columns.get("attention_mask")
    if mask is None:
        return columns
    is_real = mask != 0
    labels = columns.get("labels", ids)
    follows = torch.cat([torch.zeros_like(is_real[:, :1]), is_real[:, :-1]], 1)
    labels = torch.where(is_real & follows, labels, IGNORED)
    if bool((is_real & ~follows)[:, 1:].any()):  # something real after padding
        starts = (is_real & ~follows).sum(1)
        if bool((starts > 1).any()):
            raise ValueError(_HOLES.format(where=f"sequence {int(starts.argmax())} of a batch"))
        order = (~is_real).to(torch.int8).argsort(dim=1, stable=True)
        ids, labels = ids.gather(1, order), labels.gather(1, order)
    return {"input_ids": ids, "labels": labels}


_HOLES = (
    "attention_mask has zeros between ones in {where}: sequences may be padded on one side or both; write the loss of "
    "others as loss_fn(model, batch)"
)


def _described(batch: Batch, name: str, value: object) -> str:
    if isinstance(value, Tensor):
        return f"{name} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(batch, Mapping):
        return f"{name} of type {type(value).__name__}"
    return f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__


@dataclass(frozen=True)
class _Ragged:
    """Rows of different lengths, one after another: `values` ``[token]``, `lengths` ``[row]``."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[_Ragged]) -> _Ragged:
        return cls(np.concatenate([p.values for p in parts]), np.concatenate([p.lengths for p in parts]))

    @classmethod
    def of(cls, column: Any, name: str) -> _Ragged:
        """From a tensor or array ``[row, length]``, or a list of rows."""
        if isinstance(column, (Tensor, np.ndarray)) and column.ndim == 2:
            array = _integers(column, name)
            return cls(array.reshape(-1), np.full(len(array), array.shape[1], dtype=np.int64))
        rows = [_integers(row, name) for row in column]
        wrong = next((k for k, row in enumerate(rows) if row.ndim != 1), None)
        if wrong is not None:
            raise TypeError(
                f"data must have sequences of token ids, and item {wrong} of {name} has shape {rows[wrong].shape}: "
                "join batches with torch.cat, or pass DataLoader(batches, batch_size=None, shuffle=True)"
            )
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.concatenate(rows) if rows else np.empty(0, dtype=np.int64), lengths)

    @property
    def row(self) -> NDArray[np.int64]:
        """The row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def _integers(values: Any, name: str) -> NDArray[Any]:
    """Token ids as an array.

    Raises:
        TypeError: they are no integers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy() if values.dtype != torch.bfloat16 else values.detach().float().numpy()
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths inside a row
        array = np.empty(0, dtype=object)
    if array.size == 0 and array.dtype.kind in "fiub":
        return array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise TypeError(
            f'data must hold token ids for loss_fn="next-token", that is integers, and {name} holds {_kind_of(array)}'
        )
    return array


def _kind_of(array: NDArray[Any]) -> str:
    if array.dtype.kind in "US":
        return "text: turn it into ids first, such as [tokenizer(text)['input_ids'] for text in texts]"
    return "other objects" if array.dtype.kind == "O" else str(array.dtype)


@dataclass(frozen=True)
class _Sequences:
    """Token sequences without padding, each with at least one token that is predicted.

    Attributes:
        ids: of tokens, int32.
        labels: of the same tokens, −100 where one is not predicted; None: all but the first of each sequence are.
        predicted: tokens that are predicted, by sequence.
        num_left_out: sequences without any.
    """

    ids: _Ragged
    labels: NDArray[np.int32] | None
    predicted: NDArray[np.int64]
    num_left_out: int

    @property
    def width(self) -> int:
        return int(self.ids.lengths.max())

    @classmethod
    def of(cls, data: Any) -> _Sequences:
        columns = {name: column for name, column in _columns_of(data).items() if column is not None}
        ids = columns["input_ids"]
        for name, column in columns.items():
            if len(column.lengths) != len(ids.lengths) or (column.lengths != ids.lengths).any():
                raise ValueError(f"data has {name} of other lengths than input_ids")
        if not len(ids.lengths):
            raise ValueError("data is empty: it has no sequences")
        mask, labels = columns.get("attention_mask"), columns.get("labels")
        kept: slice | NDArray[np.bool_] = slice(None)
        if mask is None and labels is None:  # nothing to look at, token by token
            predicted = np.maximum(ids.lengths - 1, 0)
            if (predicted == 0).any():
                kept = (predicted > 0)[ids.row]
            lengths, targets = ids.lengths[predicted > 0], None
        else:
            row, is_real = ids.row, np.ones(len(ids.values), dtype=bool) if mask is None else mask.values != 0
            follows = np.zeros(len(row), dtype=bool)
            follows[1:] = (row[1:] == row[:-1]) & is_real[:-1]
            starts = np.bincount(row[is_real & ~follows], minlength=len(ids.lengths))
            if (starts > 1).any():
                raise ValueError(_HOLES.format(where=f"sequence {int(starts.argmax())} of data"))
            is_predicted = is_real & follows
            if labels is not None:
                is_predicted &= labels.values != IGNORED
            predicted = np.bincount(row[is_predicted], minlength=len(ids.lengths))
            kept = is_real & (predicted > 0)[row]
            lengths = np.bincount(row[kept], minlength=len(ids.lengths))[predicted > 0]
            targets = None
            if labels is not None:
                targets = np.where(is_predicted, labels.values, IGNORED)[kept].astype(np.int32)
        if not predicted.any():
            raise ValueError("data predict no token: sequences have fewer than two tokens, or all labels are -100")
        values = ids.values[kept]
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > _MAX_ID:
            raise ValueError(
                f"data has the token id {low if low < 0 else high}, which no vocabulary has: say what is padding by "
                "attention_mask = 0, and what is not to be predicted by labels = -100"
            )
        left_out = int((predicted == 0).sum())
        return cls(_Ragged(values.astype(np.int32), lengths), targets, predicted[predicted > 0], left_out)

    def tensors(self) -> dict[str, Tensor]:
        """As padded tensors ``[sequence, width]``, int32: half the memory of int64."""
        lengths, width = self.ids.lengths, self.width
        elements, tokens = len(lengths) * width, len(self.ids.values)
        if elements > max(_WASTED_ELEMENTS, _WASTE * tokens):
            raise ValueError(
                f"data has {len(lengths)} sequences of {tokens} tokens, the longest of {width}: padded to that length "
                f"they take {8 * elements / 2**30:.1f} GiB. Cut the long ones, or pass a DataLoader that pads batches"
            )
        is_token = np.arange(width) < lengths[:, None]

        def padded(values: NDArray[np.int32], fill: int) -> Tensor:
            if len(values) == elements:
                return torch.from_numpy(values.reshape(-1, width))
            found = np.full((len(lengths), width), fill, dtype=np.int32)
            found[is_token] = values
            return torch.from_numpy(found)

        found = {"input_ids": padded(self.ids.values, 0)}
        if self.labels is not None or tokens < elements:
            found["labels"] = padded(self.ids.values if self.labels is None else self.labels, IGNORED)
        return found


def _check_fits(model: nn.Module, sequences: _Sequences) -> None:
    """Refuse token ids and lengths that the model has no embedding for: a GPU says it in no words at all."""
    rows, positions = _sizes_of(model)
    largest = int(sequences.ids.values.max())
    if rows is not None and largest >= rows:
        raise ValueError(
            f"data has the token id {largest}, and the model's vocabulary has {rows} tokens: were they made by another "
            "tokenizer?"
        )
    if positions is not None and sequences.width > positions:
        raise ValueError(
            f"data has a sequence of {sequences.width} tokens, and the model takes {positions} at most: cut it, such "
            f"as [ids[:{positions}] for ids in sequences]"
        )


def _sizes_of(model: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens and how many positions a model has embeddings for; None: unknown, or any number."""
    for module in _wrapped(model):
        config, get = getattr(module, "config", None), getattr(module, "get_input_embeddings", None)
        if config is None or get is None:
            continue
        try:
            embedding = get()
        except Exception:  # some models have none that can be named
            return None, None
        positions = getattr(config, "max_position_embeddings", None)
        # Rotary positions have no end.
        learned = any(
            isinstance(m, nn.Embedding) and m is not embedding and m.num_embeddings in (positions, (positions or 0) + 2)
            for m in module.modules()
        )
        return getattr(embedding, "num_embeddings", None), positions if learned else None
    return None, None


# ---- what the user gave ------------------------------------------------------------------------------------


def _columns_of(data: Any) -> dict[str, _Ragged]:
    """The columns ``input_ids``, and ``attention_mask`` and ``labels`` if there are any."""
    if hugging_face_dataset(data):
        return _of_hugging_face(data)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Mapping):
        return _of_mapping(data)
    if isinstance(data, (str, bytes)):
        raise TypeError(f"data must hold token ids, got text: {_kind_of(np.array(['']))[6:]}")
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim == 1 and len(data):
            raise ValueError(_stream(len(data)))
        if data.ndim != 2:
            raise ValueError(f"data must be token ids [sequence, length], got shape {tuple(data.shape)}")
        return {"input_ids": _Ragged.of(data, "data")}
    if makes_batches(data):
        pieces = [data.batch(k) for k in torch.split(torch.arange(len(data)), _ROWS)]
        return _joined([_of_mapping(_loaded_columns(piece)) for piece in pieces])
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            "data must be a datasets.Dataset, a list of token sequences, a tensor of token ids [sequence, length] or a "
            f'DataLoader for loss_fn="next-token", got {type(data).__name__}'
        )
    rows = data if isinstance(data, (list, tuple)) else _rows_of(data)
    return _of_rows(rows)


def _stream(length: int) -> str:
    return (
        f"data is one stream of {length} tokens, and sequences are wanted: pass "
        "llc_fast.language.chunks(tokens, length), with the length that the model was trained with"
    )


def _loaded_columns(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    return {"input_ids": batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch}


def _of_mapping(data: Mapping[str, Any]) -> dict[str, _Ragged]:
    """Columns by name, as a tokenizer returns them."""
    if data.get("input_ids") is None:
        raise TypeError(
            f"data must have input_ids, got a dictionary of {', '.join(map(str, data)) or 'nothing'}: token ids are "
            "what a tokenizer makes of texts"
        )
    ids = data["input_ids"]
    if getattr(ids, "ndim", None) == 1 or (isinstance(ids, (list, tuple)) and ids and _is_number(ids[0])):
        raise ValueError(_stream(len(ids)))
    return {name: _Ragged.of(data[name], name) for name in _COLUMNS if data.get(name) is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, (numbers.Number, np.generic)) or (isinstance(value, Tensor) and value.ndim == 0)


def _of_rows(rows: Sequence[Any]) -> dict[str, _Ragged]:
    """Samples one after another: sequences, or dictionaries or tuples of one that hold them."""
    if not len(rows):
        raise ValueError("data is empty: it has no sequences")
    first = rows[0]
    if _is_number(first):
        raise ValueError(_stream(len(rows)))
    if isinstance(first, Mapping):
        if "input_ids" not in first:
            raise TypeError(f"data must have input_ids, got dictionaries of {', '.join(map(str, first))}")
        names = [name for name in _COLUMNS if first.get(name) is not None]
        lacking = next((k for k, row in enumerate(rows) if any(name not in row for name in names)), None)
        if lacking is not None:
            raise ValueError(f"data changes its columns: sample {lacking} has not the {', '.join(names)} of the first")
        return {name: _Ragged.of([row[name] for row in rows], name) for name in names}
    shapes = [getattr(row, "ndim", 1) for row in rows]
    if len(rows) == 1 and shapes[0] == 2:  # of a TensorDataset
        return {"input_ids": _Ragged.of(first, "data")}
    if all(isinstance(row, tuple) and len(row) == 1 and getattr(row[0], "ndim", 0) == 1 for row in rows):
        rows = [row[0] for row in rows]
    elif isinstance(first, tuple) and any(isinstance(entry, (Tensor, np.ndarray)) for entry in first):
        raise TypeError(
            f'data has samples that are tuples of {len(first)}, and loss_fn="next-token" takes token ids alone, '
            "which it shifts itself: pass the sequences, or write loss_fn(model, batch)"
        )
    return {"input_ids": _Ragged.of(rows, "data")}


def _rows_of(data: Any) -> list[Any]:
    """Every sample of a map-style data set, read once.

    Raises:
        ValueError: reading is random.
    """
    generators = Generators(torch.device("cpu"), [data])
    with generators.kept():
        generators.seed(0)
        before = generators.states()
        some = spread_indices(len(data), _READ_TWICE).tolist()
        once, again = ([data[k] for k in some] for _ in range(2))
        is_same = all(_equal(a, b) for a, b in zip(once, again, strict=True))
        if not is_same or not same_states(before, generators.states()):
            raise ValueError(_RANDOM)
        return [data[k] for k in range(len(data))]


_RANDOM = (
    'data gives other tokens each time they are read, and loss_fn="next-token" reads a data set once: pass it in a '
    "DataLoader, which is read anew"
)


def _equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(leaves(a), leaves(b), strict=False))


def _joined(pieces: Sequence[dict[str, _Ragged]]) -> dict[str, _Ragged]:
    return {name: _Ragged.joined([piece[name] for piece in pieces]) for name in pieces[0]}


def _of_hugging_face(data: Any) -> dict[str, _Ragged]:
    """The columns of a ``datasets.Dataset``; without a transform they come from its Arrow table as they are."""
    if not len(data):
        raise ValueError("data is empty: the data set has no rows")
    form = data.format
    if form["type"] == "custom":  # set_transform: the columns are what it makes
        some = spread_indices(len(data), _READ_TWICE).tolist()
        if not _equal(_loaded_columns(data[some]), _loaded_columns(data[some])):
            raise ValueError(_RANDOM)
        pieces = [data[k : k + _ROWS] for k in range(0, len(data), _ROWS)]
        return _joined([_of_mapping(piece) for piece in pieces])
    if "input_ids" not in form["columns"]:
        text = next((name for name in ("text", "content") if name in form["columns"]), "text")
        raise TypeError(
            f"data is a datasets.Dataset with the columns {', '.join(form['columns'])}, and input_ids is needed: make "
            f'it with data.map(lambda rows: tokenizer(rows["{text}"], truncation=True), batched=True)'
        )
    names = [name for name in _COLUMNS if name in form["columns"]]
    table = data.with_format("arrow", columns=names)
    pieces = [table[k : k + _ROWS] for k in range(0, len(data), _ROWS)]
    chunks_of = {name: [chunk for piece in pieces for chunk in piece.column(name).chunks] for name in names}
    return {name: _Ragged.joined([_of_arrow(c, name) for c in found]) for name, found in chunks_of.items()}


def _of_arrow(chunk: Any, name: str) -> _Ragged:
    pyarrow = sys.modules["pyarrow"]
    kinds = (pyarrow.ListArray, pyarrow.LargeListArray)
    if chunk.null_count or not isinstance(chunk, kinds) or not pyarrow.types.is_integer(chunk.type.value_type):
        rows = chunk.to_pylist()
        if any(row is None for row in rows):
            raise ValueError(f"data has rows without {name}: remove them, or fill them in")
        return _Ragged.of(rows, name)
    lengths = chunk.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return _Ragged(chunk.flatten().to_numpy(zero_copy_only=False), lengths)
