"""What an observable sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What an observable sees: one draw of one chain, before the chain moves on.

    Attributes:
        chain, draw, step: which.
        loss: of the minibatch, a scalar tensor; as evaluated, with no baseline subtracted.
        sample_losses: the loss of each sample of the minibatch, ``[batch]``, if the loss function returns one for each
            sample; else None.
        params: the chain's parameters by name, at which the loss was evaluated. They are the chain's own memory: copy
            what must outlive the call, and write to none.
        batch: the minibatch.
    """

    chain: int
    draw: int
    step: int
    loss: Tensor
    sample_losses: Tensor | None
    params: Mapping[str, Tensor]
    batch: Any


Observable = Callable[[Draw], Any]
"""A function of a draw whose value, a number or a tensor of fixed shape, is recorded for every draw."""
