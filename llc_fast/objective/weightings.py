"""What samples lose, and how much each may weigh in the loss of a minibatch: by its tokens, its class, or the data."""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.data import Batch, leaves, split_batch
from llc_fast.language import IGNORED
from llc_fast.objective.objective import Objective
from llc_fast.objective.per_sample import SampleLosses, sample_losses_for

Losses = NDArray[np.float64]
PLAIN = ""
"""The weighting in which all samples weigh the same."""
Measure = Callable[[Objective, Batch, Set[str] | None], tuple[Losses, dict[str, Losses]]]
"""``measure(objective, batch, names)``: what the samples of a batch lose at w*, float64 ``[batch]``, and the weights
that they may have, by those names; None: by all. A sample that weighs nothing may lose NaN."""
_IGNORED = (IGNORED, -1, 0)
"""Entries that may stand for nothing: labels that are not predicted, padding, and what a mask leaves out."""


def weighted(losses: Losses, weights: Losses) -> Losses:
    """Times their weights; a sample that does not count may have no loss."""
    values: Losses = np.where(weights == 0, 0.0, losses) * weights
    return values


def together(objective: Objective, batch: Batch, names: Set[str] | None) -> tuple[Losses, dict[str, Losses]]:
    """By torch.func; raises whatever torch does if it can't."""
    return _with_weights(objective, batch, names, one_by_one=False)


def one_by_one(objective: Objective, batch: Batch, names: Set[str] | None) -> tuple[Losses, dict[str, Losses]]:
    """Each sample as a batch of its own: slow, and always possible."""
    return _with_weights(objective, batch, names, one_by_one=True)


class ByElements:
    """By the elements that the loss of a batch is the mean of, found in what the model returns, as for probes.

    Raises:
        ValueError: when it is called, there are none (:func:`llc_fast.objective.per_sample.sample_losses_for`).
    """

    def __init__(self) -> None:
        self._found: SampleLosses | None = None  # of one objective: another precision is a copy of the model

    def __call__(self, objective: Objective, batch: Batch, names: Set[str] | None) -> tuple[Losses, dict[str, Losses]]:
        if self._found is None or self._found.objective is not objective:
            self._found = _elements_for(objective, batch)
        sample_losses = self._found
        pieces = split_batch(batch, objective.microbatch_size)
        parts = [sample_losses(objective.reference, piece, objective.fresh_buffers()) for piece, _ in pieces]
        elements = torch.cat([_in_rows(part) for part in parts])
        counts = (~elements.isnan()).sum(1)
        weigh = sample_losses.per == "token" and sample_losses.combination == "elements"
        losses = elements.nansum(1) if sample_losses.combination == "sums" else elements.nanmean(1)
        return _array(losses), {"elements": _array(counts)} if weigh else {PLAIN: np.ones(len(losses))}


def _elements_for(objective: Objective, batch: Batch) -> SampleLosses:
    with objective.generators.kept():
        try:
            return sample_losses_for(objective, "token", [batch])
        except ValueError:
            return sample_losses_for(objective, "sample", [batch])


def _in_rows(elements: Tensor) -> Tensor:
    return elements.double().flatten(1) if elements.ndim > 1 else elements.double()[:, None]


def _array(values: Tensor) -> Losses:
    found: Losses = values.detach().to("cpu", torch.float64).numpy()
    return found


def _with_weights(
    objective: Objective, batch: Batch, names: Set[str] | None, *, one_by_one: bool
) -> tuple[Losses, dict[str, Losses]]:
    pieces = split_batch(batch, objective.microbatch_size)
    losses = np.concatenate([_array(objective.sample_losses(piece, one_by_one)) for piece, _ in pieces])
    found = {PLAIN: np.ones(len(losses))}
    if names is None or names - {PLAIN}:
        found |= weightings(batch, objective.loss_fn)
    return losses, {name: values for name, values in found.items() if names is None or name in names}


def weightings(batch: Batch, loss_fn: object) -> dict[str, Losses]:
    """Weights that samples of a batch may have in its loss, float64 ``[batch]`` each; which it is, is tried.

    For each tensor of the batch: how many of a sample's entries count, all or those that have one before them (the
    next token's), where one value of the entries says that they do not; the sum of its entries; its own number; and,
    for a loss function with weights of classes, that of its class.
    """
    found: dict[str, Losses] = {}
    left_out = getattr(loss_fn, "ignore_index", IGNORED)
    ignored = {*_IGNORED, left_out} if isinstance(left_out, int) else set(_IGNORED)
    of_classes = getattr(loss_fn, "weight", None)

    def add(name: str, weights: Tensor) -> None:
        values = _array(weights)
        if np.isfinite(values).all() and (values >= 0).all():
            found[name] = values

    for k, leaf in enumerate(leaves(batch)):
        if leaf.is_complex() or not leaf.ndim:
            continue
        if leaf.is_floating_point():
            add(f"{k}", leaf.flatten(1).sum(1) if leaf.ndim > 1 else leaf)
            if leaf.ndim > 1:
                add(f"{k} from 1", leaf[:, 1:].flatten(1).sum(1))
            continue
        rows = leaf if leaf.ndim > 1 else leaf[:, None]
        for first in (0, 1) if leaf.ndim > 1 else (0,):
            for value in sorted(ignored):
                add(f"{k} but {value} from {first}", (rows[:, first:] != value).flatten(1).sum(1))
        if isinstance(of_classes, Tensor) and of_classes.ndim == 1 and leaf.dtype == torch.int64:
            is_class = (rows >= 0) & (rows < len(of_classes)) & (rows != left_out)
            add(f"{k} by class", (of_classes[rows.clamp(0, len(of_classes) - 1)] * is_class).flatten(1).sum(1))
    return found
