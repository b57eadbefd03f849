"""What lies below a restriction: outputs of modules that do not depend on sampled parameters, kept for each batch.

If only the third layer is sampled, embedding and two layers give the same for a batch at every draw. Their outputs are
recorded at w*, and stand-ins return them afterwards: the model itself runs, with these modules' ``forward`` replaced.

Which modules these are is seen while the model runs: all calls, the outermost ones, of modules that have no sampled
parameter and return before anything reads one. What is kept of their outputs is what anybody but another such module
uses: of a stack of layers the last one's. The others become tensors of NaN of the same shape, which take no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llc_fast.objective.objective import Objective
from llc_fast.support.torch_private import version_of

_SHAPES = frozenset(
    {
        *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "requires_grad", "is_leaf", "names"),
        *("itemsize", "nbytes", "is_sparse", "is_nested", "is_quantized", "is_meta", "is_mps", "is_mkldnn"),
        *("size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "__len__", "get_device"),
        *("stride", "is_contiguous", "type", "element_size"),
    }
)
"""What may be asked of a tensor without use of its values."""


class PrefixCache:
    """Outputs of what lies below the sampled parameters, by batch.

    Args:
        objective: model, loss and data, and which parameters are sampled.
        limit: bytes that may be kept; batches beyond are evaluated as a whole.

    Attributes:
        num_bytes: that are kept.
        reason: why nothing is kept, in words; empty: it is, or nothing has been recorded.
    """

    def __init__(self, objective: Objective, limit: int) -> None:
        self.num_bytes, self.reason = 0, _why_not(objective)
        self._model, self._limit = objective.model, limit
        sampled = {id(p) for name, p in objective.borrowed.parameters.items() if name in objective.reference}
        self._sampled = sampled
        self._below = [m for m in objective.model.modules() if not any(id(p) in sampled for p in m.parameters())]
        self._batches: dict[Hashable, _Kept] = {}

    def __bool__(self) -> bool:
        return bool(self._batches)

    def __contains__(self, batch: Hashable) -> bool:
        return batch in self._batches

    def give_up(self, reason: str) -> None:
        """Keep nothing from now on."""
        self._batches.clear()
        self.num_bytes, self.reason = 0, reason

    def record(self, batch: Hashable, evaluate: Callable[[], Tensor]) -> Tensor:
        """Evaluate a batch, and keep what it takes to do it again.

        Args:
            batch: its name.
            evaluate: calls the model, without gradients, which holds its parameters at w* already.
        """
        if self.reason:
            return evaluate()
        recording = _Recording(self._sampled, self._limit - self.num_bytes)
        with _forward_of(self._below, recording.watched), recording:
            found = evaluate()
        kept = recording.kept()
        if kept is not None:
            self._batches[batch] = kept
            self.num_bytes += kept.num_bytes
        return found

    def evaluate(self, batch: Hashable, evaluate: Callable[[], Tensor]) -> Tensor:
        """The same with stand-ins for what was recorded, if anything was."""
        kept = self._batches.get(batch)
        if kept is None:
            return evaluate()
        with _forward_of(kept.modules, kept.stand_ins()):
            found = evaluate()
        if kept.is_written_to():
            self.give_up("the model writes to activations in place, at some draws and not at others")
        return found


def _why_not(objective: Objective) -> str:
    trial = objective.trial
    if not objective.frozen:
        return "all parameters are sampled"
    if objective.is_compiled or any(isinstance(m, torch.jit.ScriptModule) for m in objective.model.modules()):
        return "the model is compiled"
    if trial.is_random or trial.writes_buffers or trial.writes_parameters or trial.writes_batch or trial.accumulates:
        return "the model draws random numbers, or writes to what it is given"
    if trial.has_hooks or trial.changes_itself:
        return "hooks see its activations, or it counts its calls"
    if not trial.is_same_without_grad:
        return "the model is another function without gradients"
    return ""


@contextlib.contextmanager
def _forward_of(
    modules: list[nn.Module], replaced: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside ``with`` these modules have another forward."""
    before = [(vars(m), "forward" in vars(m), m.forward) for m in modules]
    try:
        for module, (attributes, _, forward) in zip(modules, before, strict=True):
            attributes["forward"] = functools.wraps(forward)(replaced(module, forward))
        yield
    finally:
        for attributes, is_own, forward in before:
            if is_own:
                attributes["forward"] = forward
            else:
                attributes.pop("forward", None)


class _Recording(TorchFunctionMode):
    """Sees calls of modules and uses of tensors."""

    def __init__(self, sampled: set[int], limit: int) -> None:
        super().__init__()
        self._sampled, self._limit = sampled, limit
        self._is_open, self._is_inside, self._has_failed = True, False, False
        self._calls: list[tuple[nn.Module, Any]] = []
        self._outputs: dict[int, Tensor] = {}
        self._saved: dict[int, tuple[Tensor, int]] = {}
        self._num_bytes = 0

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside or not self._is_open:
                return forward(*args, **kwargs)
            self._is_inside = True
            try:
                found = forward(*args, **kwargs)
            finally:
                self._is_inside = False
            self._calls.append((module, found))
            for t in _tensors_in(found):
                self._has_failed |= t.layout is not torch.strided
                self._outputs[id(t)] = t
            return found

        return call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        if name not in _SHAPES:
            for t in _tensors_in((args, kwargs)):
                if id(t) in self._sampled:
                    self._has_failed |= self._is_inside  # of a module that reads a parameter that is not its own
                    self._is_open = False
                elif not self._is_inside and id(t) in self._outputs:
                    self._save(t)
        return func(*args, **kwargs)

    def _save(self, t: Tensor) -> None:
        """Before its first use, which may write to it."""
        size = t.numel() * t.element_size()
        if id(t) in self._saved or self._has_failed:
            return
        if self._num_bytes + size > self._limit:
            self._has_failed = True
            self._saved.clear()
            return
        self._num_bytes += size
        self._saved[id(t)] = t.detach().clone(), version_of(t)

    def kept(self) -> _Kept | None:
        """None: nothing that could be kept."""
        if self._has_failed or self._is_open or not self._calls:
            return None
        is_written = any(version_of(self._outputs[k]) != version for k, (_, version) in self._saved.items())

        def kept_of(t: Tensor) -> Tensor:
            return self._saved[id(t)][0] if id(t) in self._saved else _placeholder(t)

        calls = [(module, _mapped(kept_of, found)) for module, found in self._calls]
        return _Kept(calls, [t for t, _ in self._saved.values()], is_written, self._num_bytes)


class _Kept:
    """Outputs of modules, in the order of their calls.

    Args:
        calls: modules and what they return.
        tensors: those that are kept.
        copies: whether what uses them writes to them.
        num_bytes: of them.
    """

    def __init__(self, calls: list[tuple[nn.Module, Any]], tensors: list[Tensor], copies: bool, num_bytes: int) -> None:
        self.modules = list({id(module): module for module, _ in calls}.values())
        self.num_bytes, self._calls, self._copies = num_bytes, calls, copies
        self._versions = [(t, version_of(t)) for t in tensors]

    def stand_ins(self) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]:
        """For one evaluation: each returns what the module returned, call by call, and then is the module again."""
        handed_out: dict[int, Tensor] = {}

        def output(t: Tensor) -> Tensor:  # one copy of each tensor, as the modules return the same one
            if not self._copies:
                return t
            if id(t) not in handed_out:
                handed_out[id(t)] = t.clone()
            return handed_out[id(t)]

        def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            left = iter([found for known, found in self._calls if known is module])

            def call(*args: Any, **kwargs: Any) -> Any:
                for found in left:
                    return _mapped(output, found)
                return forward(*args, **kwargs)

            return call

        return stand_in

    def is_written_to(self) -> bool:
        return any(version_of(t) != version for t, version in self._versions)


def _placeholder(t: Tensor) -> Tensor:
    """Of the same shape, in no memory: NaN, so that whoever uses it hears of it."""
    value = torch.nan if t.dtype.is_floating_point or t.dtype.is_complex else 0
    return torch.full((), value, dtype=t.dtype, device=t.device).expand(t.shape)


def _tensors_in(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from _tensors_in(value)
    elif isinstance(found, (tuple, list)):
        for value in found:
            yield from _tensors_in(value)


def _mapped(function: Callable[[Tensor], Tensor], found: Any) -> Any:
    """What a module returns with other tensors; what is no container of tensors becomes None."""
    if isinstance(found, Tensor):
        return function(found)
    if isinstance(found, Mapping):
        values = {name: _mapped(function, value) for name, value in found.items()}
        # Hugging Face's outputs are both: dictionaries whose entries are fields.
        return type(found)(**values) if dataclasses.is_dataclass(found) else type(found)(values)  # type: ignore[call-arg]
    if isinstance(found, (tuple, list)):
        several = [_mapped(function, value) for value in found]
        return type(found)(*several) if hasattr(found, "_fields") else type(found)(several)
    return found if found is None or isinstance(found, (bool, int, float, str, torch.dtype, torch.device)) else None
