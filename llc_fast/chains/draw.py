"""What an observable sees, and how what it returns is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.traces import Traces


@dataclass(frozen=True)
class Draw:
    """What an observable sees: one draw of one chain, before the chain moves on.

    All tensors are the chain's own memory, which the next step overwrites: copy what must outlive the call, and write
    to none.

    Attributes:
        chain, draw, step: which.
        loss: of the minibatch, a scalar tensor; as evaluated, with no control variate subtracted.
        sample_losses: the loss of each sample of the minibatch, ``[batch]``, if the loss function returns one for each
            sample; else None.
        params: the chain's parameters by name, at which the loss was evaluated.
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


class Observables:
    """The observables of a run; the shape of what each returns is the same in all its chains.

    Args:
        functions: by name.
        num_draws: of each chain.
    """

    def __init__(self, functions: Mapping[str, Observable], num_draws: int) -> None:
        self._functions, self._num_draws = functions, num_draws
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._functions)

    def know(self, draws: Mapping[str, NDArray[Any]]) -> None:
        """Chains that are resumed have made these draws: their shapes are the shapes."""
        self._shapes.update((name, values.shape[2:]) for name, values in draws.items())

    def record(self, draw: Draw, traces: Traces) -> None:
        """Evaluate all observables at a draw, and write what they return to ``traces.draws``.

        Raises:
            ValueError: an observable returned another shape than before.
        """
        for name, function in self._functions.items():
            found = function(draw)
            if not isinstance(found, Tensor):  # a number keeps its digits, whatever torch's default dtype is
                found = torch.as_tensor(found, dtype=torch.float64)
            value = found.detach().to("cpu", torch.float64).numpy()
            shape = self._shapes.setdefault(name, value.shape)
            if value.shape != shape:
                raise ValueError(
                    f"observables[{name!r}] returned shape {value.shape} after {shape}: return the same shape at every "
                    "draw"
                )
            if name not in traces.draws:
                traces.draws[name] = np.full((len(traces.chains), self._num_draws, *shape), np.nan)
            traces.draws[name][draw.chain - traces.first_chain, draw.draw] = value
