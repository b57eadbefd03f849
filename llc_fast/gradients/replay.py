"""Records what a function does to fixed memory, and does it again without Python, autograd or allocation in between.

For small networks most of a gradient's time goes into getting from one kernel to the next: modules, functorch, the
autograd graph, views, new tensors. A chain evaluates the same function on the same memory at every step, so its
kernels can be recorded once and replayed with their outputs written to where they were written the first time: what
a CUDA graph is on a GPU. Views need no replay at all, since their memory stays where it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llc_fast.gradients.matmul import product_by_onednn
from llc_fast.support.torch_private import DispatchMode, packet_of, schema_of

T = TypeVar("T")
_REFUSED = {
    torch.Tag.data_dependent_output: "Python looks at a tensor's values",
    torch.Tag.dynamic_output_shape: "a tensor's size depends on values",
}
_READS = frozenset(
    (
        *("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "__repr__", "__str__", "__format__"),
        *("apply_", "map_", "map2_", "storage", "untyped_storage", "__reduce_ex__", "share_memory_"),
    )
)
"""What shows Python a tensor's values, or where they are, without an operation of torch."""
_FILLS = frozenset(
    f"aten::{name}"
    for name in (
        *("ones_like", "zeros_like", "full_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
    )
)
_TURNS = frozenset(
    f"aten::{name}_" for name in ("t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze", "detach")
)
"""What changes how a tensor lies in its memory, and no memory."""
_NOT_AGAIN = frozenset(("aten::mkldnn_rnn_layer",))
"""What gives other outputs where no gradients are recorded, as in a replay."""
_aten = torch.ops.aten
_IMPLIED_BY_OUT = frozenset(("dtype", "layout", "device", "pin_memory"))


class NotReplayableError(Exception):
    """The function can't be recorded; the text says why."""


class _Recorder(DispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, aliases: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._aliases = aliases
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tag, reason in _REFUSED.items():
            if tag in op.tags and not _indexes_by_integers(op, args):
                raise NotReplayableError(f"{reason} ({op})")
        if schema_of(op).name in _NOT_AGAIN:
            raise NotReplayableError(f"a kernel can't be replayed ({op})")
        kwargs = kwargs or {}
        # As they are now: what follows may transpose a tensor in place.
        given = self._fixed(args), self._fixed(kwargs)
        # Attention is tagged for the sake of its dropout, which may be off: what counts is whether it drew.
        seeded = torch.Tag.nondeterministic_seeded in op.tags
        before = torch.get_rng_state() if seeded else None
        out = op(*args, **kwargs)
        if before is not None and (
            any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values()))
            or any(t.device.type != "cpu" for t in _tensors(out))
            or not torch.equal(before, torch.get_rng_state())
        ):
            raise NotReplayableError(f"it draws random numbers ({op})")
        if any(t.layout != torch.strided for t in _tensors((args, kwargs, out))):
            raise NotReplayableError(f"it works on tensors that are not dense ({op})")
        self.calls.append((op, *given, self._fixed(out)))
        return out

    def _fixed(self, value: Any) -> Any:
        """Tensors of the same memory and shape that stay as they are, where these hold it for a while only."""
        if isinstance(value, Tensor):
            alias = self._aliases.get(id(value))
            return value.detach() if alias is None else alias
        if isinstance(value, (tuple, list)):
            return [*map(self._fixed, value)] if isinstance(value, list) else tuple(map(self._fixed, value))
        return {k: self._fixed(v) for k, v in value.items()} if isinstance(value, dict) else value


class _ReadRefuser(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS and not sys._getframe(1).f_globals.get("__name__", "").startswith("llc_fast."):
            raise NotReplayableError(f"Python looks at a tensor's values ({name})")
        return function(*args, **(kwargs or {}))


class Recording(Generic[T]):
    """The kernels of one call of `function`; :meth:`replay` runs them again on whatever its memory then holds.

    The function must do the same work each time, whatever the values: same kernels, same shapes, no random numbers. It
    may read any memory that stays where it is, and must write to none but its own. What it returned is in
    :attr:`result`, and is overwritten by each replay.

    Raises:
        NotReplayableError: the function draws random numbers, lets Python look at values, or writes to memory that it
            was given.
    """

    def __init__(self, function: Callable[[], T], aliases: Mapping[int, Tensor] | None = None) -> None:
        recorder = _Recorder(aliases or {})
        with recorder, _ReadRefuser():
            self.result: T = function()
        made: set[int] = set()  # storages that the function itself allocates
        written: set[int] = set()  # those that it writes to after making them
        for op, args, kwargs, out in recorder.calls:
            inputs, outputs = set(_storages((args, kwargs))), set(_storages(out))
            if schema_of(op).is_mutable:
                targets = set(_storages(list(_written(op, args, kwargs))))
                if not targets <= made:
                    raise NotReplayableError(f"it writes to memory that it was given ({op})")
                written |= targets
            made |= outputs - inputs
        constant: set[int] = set()
        self._calls: list[Callable[[], object]] = []
        for op, args, kwargs, out in recorder.calls:
            inputs, outputs = set(_storages((args, kwargs))), set(_storages(out))
            if schema_of(op).is_mutable:
                if schema_of(op).name not in _TURNS:
                    self._calls.append(functools.partial(op, *args, **kwargs))
            elif not outputs <= inputs:  # else a view, whose memory stays where it is
                if (inputs <= constant or schema_of(op).name in _FILLS) and not outputs & written:
                    constant |= outputs
                else:
                    self._calls.append(_into(op, args, kwargs, out))
        self._kept = recorder.calls  # memory that was freed could be given to somebody else

    @property
    def num_kernels(self) -> int:
        return len(self._calls)

    @torch.no_grad()
    def replay(self) -> None:
        for call in self._calls:
            call()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _indexes_by_integers(op: Any, args: tuple[Any, ...]) -> bool:
    """Indexing is tagged for the sake of masks; by integers the sizes are those of the indices."""
    return op is _aten.index.Tensor and all(t.dtype not in (torch.bool, torch.uint8) for t in _tensors(args[1:]))


def _storages(value: Any) -> Iterator[int]:
    return (t.untyped_storage().data_ptr() for t in _tensors(value))


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for k, argument in enumerate(schema_of(op).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[k] if k < len(args) else kwargs.get(argument.name)


_SHORT_WAYS: dict[Any, Callable[..., object]] = {
    _aten.mm.out: torch.mm,
    _aten.addmm.out: torch.addmm,
    _aten.bmm.out: torch.bmm,
    _aten.mul.out: torch.mul,
}
"""The same kernels behind torch's generated bindings: 1 µs of Python's lock a call, where an overload's takes 2.5."""


def _into(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Callable[[], object]:
    """The same operation with its results written to `out`."""
    if not kwargs and (product := product_by_onednn(op, args, out)) is not None:
        return product
    outputs = (out,) if isinstance(out, Tensor) else out
    own = [(a.name, str(a.type)) for a in schema_of(op).arguments]
    # A loss that reduces would resize its output to that of the unreduced one on the way.
    if all(isinstance(t, Tensor) for t in outputs) and "reduction" not in dict(own):
        for overload in packet_of(op).overloads():
            variant = getattr(packet_of(op), overload)
            arguments = schema_of(variant).arguments
            targets = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
            rest = [(a.name, str(a.type)) for a in arguments if a.name not in targets]
            if (
                len(targets) == len(outputs)
                and all(a.kwarg_only for a in arguments if a.name in targets)
                and rest == [a for a in own if a in rest or a[0] not in _IMPLIED_BY_OUT]
            ):
                given = {k: v for k, v in kwargs.items() if k in dict(rest)}
                call = _SHORT_WAYS.get(variant, variant)
                return functools.partial(call, *args, **given, **dict(zip(targets, outputs, strict=True)))

    def run() -> None:
        results = op(*args, **kwargs)
        for old, new in zip(_tensors(out), _tensors(results), strict=True):
            old.copy_(new)

    return run
