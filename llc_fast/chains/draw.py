"""What an observable sees, and how what it returns is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.batches import as_tensors, to_device
from llc_fast.data import Batch, map_tensors
from llc_fast.objective.objective import Objective
from llc_fast.objective.per_sample import Per, SampleLosses, sample_losses_for
from llc_fast.support.torch_private import PlainTensor
from llc_fast.traces import Traces


class CallableTensor(PlainTensor):
    """A tensor that is a function of batches, too: ``draw.loss`` of the minibatch, ``draw.loss(batch)`` of another.

    What is computed from it is a plain tensor, and so are its copies.
    """

    _function: Callable[[Batch], Tensor]

    @classmethod
    def of(cls, value: Tensor, function: Callable[[Batch], Tensor]) -> CallableTensor:
        """The same memory with a function."""
        found = value.as_subclass(cls)
        found._function = function
        return found

    def __call__(self, batch: Batch) -> Tensor:
        """The same of another batch."""
        return self._function(batch)


class Evaluator:
    """Evaluates the model of a chain on any batch, at parameters that are given; everything is as before afterwards.

    Args:
        objective: of the run.
        buffers: the chain's own; of a model that writes to its buffers they are copied for each evaluation.
    """

    def __init__(self, objective: Objective, buffers: dict[str, Tensor]) -> None:
        self._objective, self._buffers = objective, buffers
        self._samples: dict[Per, SampleLosses] = {}

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        with self._without_traces():
            return self._objective.minibatch_loss(params, self._taken(batch), self._own_buffers())

    def samples(self, params: Mapping[str, Tensor], batch: Batch, per: Per = "sample") -> Tensor:
        """The losses of its samples ``[batch]``, or tokens ``[batch, tokens]``."""
        batch = self._taken(batch)
        with self._without_traces():
            if per not in self._samples:
                self._samples[per] = sample_losses_for(self._objective, per, [batch])
            return self._samples[per](params, batch, self._own_buffers())

    def outputs(self, params: Mapping[str, Tensor], batch: Batch) -> Any:
        """What the model returns."""
        objective, batch = self._objective, self._taken(batch)
        with self._without_traces(), objective.holding(params, self._own_buffers()):
            found = objective.outputs(batch)
        return found if objective.trial.is_same_without_grad else map_tensors(lambda t: t.detach(), found)

    @contextlib.contextmanager
    def holding(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside ``with`` the model has these parameters, for evaluations of one's own, one of a model that writes to
        its buffers."""
        with self._without_traces(), self._objective.holding(params, self._own_buffers()):
            yield

    def _taken(self, batch: Batch) -> Batch:
        """As chains are given it."""
        objective = self._objective
        return objective.as_minibatch(to_device(as_tensors(batch), objective.device))

    def _own_buffers(self) -> dict[str, Tensor]:
        if not self._objective.trial.writes_buffers:
            return self._buffers
        return {name: b.clone() for name, b in self._buffers.items()}

    @contextlib.contextmanager
    def _without_traces(self) -> Iterator[None]:
        objective = self._objective
        random = objective.generators.kept() if objective.trial.is_random else contextlib.nullcontext()
        with random, objective.at_reference():
            yield


@dataclass(frozen=True)
class Draw:
    """What an observable sees: one draw of one chain, before the chain moves on.

    All tensors are the chain's own memory, which the next step overwrites: copy what must outlive the call, and write
    to none.

    ``draw.loss(batch)``, ``draw.evaluate_samples(batch)`` and ``draw.outputs(batch)`` evaluate the model at the draw
    on any batch that the loss function takes, on any device, without gradients: in the mode (train or eval), precision
    and with the buffers that the chain has there. They change nothing: a chain that is looked at has the same bits.

    Attributes:
        chain, draw, step: which.
        loss: of the minibatch, a scalar tensor; as evaluated, with no control variate subtracted. And a function:
            ``draw.loss(batch)`` is the mean loss of another batch.
        sample_losses: the loss of each sample of the minibatch, ``[batch]``, if the loss function returns one for each
            sample, and a function, as `loss` is; else None, where :meth:`evaluate_samples` may find them still.
        params: the chain's parameters by name, at which the loss was evaluated.
        batch: the minibatch.
        evaluator: behind the functions; None: they can't be called.
    """

    chain: int
    draw: int
    step: int
    loss: Tensor
    sample_losses: Tensor | None
    params: Mapping[str, Tensor]
    batch: Any
    evaluator: Evaluator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.evaluator is None:
            return
        object.__setattr__(self, "loss", CallableTensor.of(self.loss, self._loss_of))
        if self.sample_losses is not None:
            object.__setattr__(self, "sample_losses", CallableTensor.of(self.sample_losses, self.evaluate_samples))

    def _loss_of(self, batch: Batch) -> Tensor:
        return self._evaluator.loss(self.params, batch)

    def evaluate_samples(self, batch: Batch, per: Per = "sample") -> Tensor:
        """The loss of each sample of a batch, ``[batch]``, or of each token, ``[batch, tokens]``.

        Those of a loss function that gives them; or as :func:`llc_fast.objective.per_sample.sample_losses_for` finds
        them for one that returns a mean, and checks them against it.

        Args:
            batch: anything the loss function takes.
            per: ``"sample"`` or ``"token"``; tokens that do not count are NaN.

        Raises:
            ValueError: the losses of single samples, or tokens, can't be had.
        """
        return self._evaluator.samples(self.params, batch, per)

    def outputs(self, batch: Batch) -> Any:
        """What the model returns for a batch that the loss function takes.

        Of a loss that calls the model itself, what the model returned to it; a tuple of these if it calls it more
        than once.
        """
        return self._evaluator.outputs(self.params, batch)

    @property
    def _evaluator(self) -> Evaluator:
        if self.evaluator is None:
            raise ValueError("draw can't be evaluated: it was not made by a run")
        return self.evaluator


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
