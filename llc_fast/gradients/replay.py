"""Records what a function does to fixed memory, and does it again without Python, autograd or allocation in between.

For small networks most of a gradient's time goes into getting from one kernel to the next: modules, functorch, the
autograd graph, views, new tensors. A chain evaluates the same function on the same memory at every step, so its
kernels can be recorded once and replayed with their outputs written to where they were written the first time: what
a CUDA graph is on a GPU. Views need no replay at all, since their memory stays where it is.

Where Python reads a value (``mask.all()``, ``lengths.max().item()``, how many are True), what follows may depend on it.
A value that is computed from constants is the same each time. Any other is read again by every replay, at the same
place among the kernels, and a replay in which it is another ends there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llc_fast.gradients.matmul import product_by_onednn, small_product
from llc_fast.gradients.program import Kernel, Program
from llc_fast.support.torch_private import DispatchMode, packet_of, schema_of

T = TypeVar("T")
_Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]
"""Operation, arguments, keyword arguments and result."""
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
_WORKSPACES = frozenset(("aten::mkldnn_rnn_layer",))
"""What leaves something for its backward pass only where gradients are recorded, which they are not in a replay."""
_aten = torch.ops.aten
_IMPLIED_BY_OUT = frozenset(("dtype", "layout", "device", "pin_memory"))


class NotReplayableError(Exception):
    """The function can't be recorded; the text says why."""


class OtherPathError(Exception):
    """A replay has read another value than Python did when it was recorded: the function may go another way here."""


class _Recorder(DispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, aliases: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._aliases = aliases
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # As they are now: what follows may transpose a tensor in place.
        given = self._fixed(args), self._fixed(kwargs)
        # Attention is tagged for the sake of its dropout, which may be off: what counts is whether it drew.
        seeded = torch.Tag.nondeterministic_seeded in op.tags
        before = _random_states(args) if seeded else None
        out = op(*args, **kwargs)
        if before is not None and (
            any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values()))
            or not all(map(torch.equal, before, _random_states(args)))
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


def _random_states(args: Any) -> list[Tensor]:
    """Of the generators that an operation on these arguments may draw from."""
    devices = {t.device for t in _tensors(args) if t.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


class _ReadRefuser(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS and not sys._getframe(1).f_globals.get("__name__", "").startswith("llc_fast."):
            raise NotReplayableError(f"Python looks at a tensor's values ({name})")
        return function(*args, **(kwargs or {}))


class Recording(Generic[T]):
    """The kernels of one call of `function`; :meth:`replay` runs them again on whatever its memory then holds.

    The function must do the same work each time that Python reads the same values of tensors: same kernels, same
    shapes, no random numbers. It may read any memory that stays where it is, and must write to none but its own and
    that of `writable`. What it returned is in :attr:`result`, and is overwritten by each replay.

    Args:
        function: what is recorded, by calling it once.
        aliases: what stands for a tensor with memory that is only lent to it, by its identity.
        writable: memory that the function was given to write to; so will each replay.
        reuses_memory: whether results that nobody needs any more give their memory to later ones. If not, kernels wait
            for fewer others. If so, too, products are written at once where a copy would transpose them to.

    Attributes:
        num_guards: values, and sizes that depend on values, that each replay compares with those of the recording.
        calls: the kernels, in the order in which they were recorded.

    Raises:
        NotReplayableError: the function draws random numbers, shows Python values by other ways than operations of
            torch, or writes to memory that it was given.
    """

    def __init__(
        self,
        function: Callable[[], T],
        aliases: Mapping[int, Tensor] | None = None,
        writable: Sequence[Tensor] = (),
        *,
        reuses_memory: bool = True,
    ) -> None:
        recorder = _Recorder(aliases or {})
        with recorder, _ReadRefuser():
            self.result: T = function()
        lent = set(_storages(list(writable)))
        made: set[int] = set()  # storages that the function itself allocates
        written: set[int] = set()  # those that it writes to after making them
        for op, args, kwargs, out in recorder.calls:
            inputs, outputs = set(_storages((args, kwargs))), set(_storages(out))
            if schema_of(op).is_mutable:
                targets = set(_storages(list(_written(op, args, kwargs))))
                if not targets <= made | lent:
                    raise NotReplayableError(f"it writes to memory that it was given ({op})")
                written |= targets
            made |= outputs - inputs
        constant: set[int] = set()
        kernels: list[_Call] = []
        guards: list[_Call] = []
        for call in recorder.calls:
            op, args, kwargs, out = call
            inputs, outputs = set(_storages((args, kwargs))), set(_storages(out))
            if torch.Tag.data_dependent_output in op.tags and not outputs:  # a value that Python has read
                if not inputs <= constant:
                    guards.append(call)
                    kernels.append(call)
            elif schema_of(op).is_mutable:
                if schema_of(op).name not in _TURNS:
                    kernels.append(call)
            elif not outputs <= inputs:  # else a view, whose memory stays where it is
                if (inputs <= constant or schema_of(op).name in _FILLS) and not outputs & written:
                    constant |= outputs
                else:
                    kernels.append(call)
                    if torch.Tag.dynamic_output_shape in op.tags and not _indexes_by_integers(op, args):
                        guards.append(call)
        self.num_guards = len(guards)
        results = set(_storages(self.result))
        if reuses_memory:
            kernels = _written_in_rows(kernels, results)
            _use_memory_again(kernels, [*recorder.calls, *kernels], made - constant - lent - results)
        compared = set(map(id, guards))
        self._kernels = kernels
        again = [_again(call, id(call) in compared) for call in kernels]
        self.calls = [kernel.run for kernel in again]
        self._again = again
        self._program: Program | None = None
        self._kept = recorder.calls  # memory that was freed could be given to somebody else

    @property
    def num_kernels(self) -> int:
        return len(self.calls)

    @property
    def devices(self) -> set[torch.device]:
        """Those that the kernels' results are on."""
        return {t.device for *_, out in self._kernels for t in _tensors(out)}

    @property
    def needs(self) -> list[frozenset[int]]:
        """For each kernel the earlier ones that have to be done, by number: what wrote to memory that it reads or
        writes, and what reads memory that it writes."""
        wrote, read, found = dict[int, int](), dict[int, list[int]](), list[frozenset[int]]()
        for k, (op, args, kwargs, out) in enumerate(self._kernels):
            targets = list(_written(op, args, kwargs)) if schema_of(op).is_mutable else out
            writes = set(_storages(targets)) - {0}
            reads = set(_storages((args, kwargs))) - {0}
            needed = {wrote[place] for place in reads | writes if place in wrote}
            needed.update(*(read.get(place, ()) for place in writes))
            found.append(frozenset(needed - {k}))
            for place in reads - writes:
                read.setdefault(place, []).append(k)
            for place in writes:
                wrote[place], read[place] = k, []
        return found

    @property
    def program(self) -> Program:
        """What runs the kernels; made when it is first needed."""
        if self._program is None:
            on_cpu = all(device.type == "cpu" for device in self.devices)
            self._program = Program(self._again, "" if on_cpu else "they are a GPU's")
        return self._program

    def replay(self) -> None:
        """Run the kernels again.

        Raises:
            OtherPathError: a value that Python has read is another one now; :attr:`result` is then of no use.
        """
        self.program.run()


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


def _use_memory_again(kernels: Sequence[_Call], calls: Sequence[_Call], movable: set[int]) -> None:
    """Give the memory of results that nobody needs any more to those that come later, as an allocator does.

    What a kernel writes is then in the cache when the next one reads it, and a recording needs no more memory than a
    call.

    Args:
        kernels: what is run again, in order.
        calls: everything that was recorded; its tensors are moved.
        movable: storages of results that are written anew by each replay.
    """
    tensors: dict[int, dict[int, Tensor]] = {}
    for _, args, kwargs, out in calls:
        for t in _tensors((args, kwargs, out)):
            tensors.setdefault(t.untyped_storage().data_ptr(), {})[id(t)] = t
    first, last = dict[int, int](), dict[int, int]()
    for k, (_, args, kwargs, out) in enumerate(kernels):
        for place in _storages((args, kwargs, out)):
            if place in movable and place and all(map(_is_plain, tensors[place].values())):
                first.setdefault(place, k)
                last[place] = k
    begins, ends = _by_value(first), _by_value(last)
    free: list[torch.UntypedStorage] = []
    for k in range(len(kernels)):
        for place in begins.get(k, ()):
            home = next(iter(tensors[place].values())).untyped_storage()
            size = home.nbytes()
            for n in reversed(range(len(free))):  # what was freed last is in the cache
                if size <= free[n].nbytes() <= 2 * size:
                    home = free.pop(n)
                    break
            for t in tensors[place].values():
                t.set_(home, t.storage_offset(), t.shape, t.stride())
        for place in ends.get(k, ()):
            free.append(next(iter(tensors[place].values())).untyped_storage())


def _written_in_rows(kernels: list[_Call], needed: set[int]) -> list[_Call]:
    """Without copies that only transpose a product: it is written where they would put it.

    Backward passes of chains in a batch give each weight's gradient transposed.

    Args:
        kernels: what is run again, in order.
        needed: storages that are read afterwards.
    """
    users: dict[int, list[int]] = {}
    for k, (_, args, kwargs, out) in enumerate(kernels):
        for place in set(_storages((args, kwargs, out))):
            users.setdefault(place, []).append(k)
    found: list[_Call | None] = list(kernels)
    for k, (op, args, _, copy) in enumerate(kernels):
        if op is not _aten.clone.default or not copy.is_contiguous() or args[0].ndim not in (2, 3):
            continue
        place = args[0].untyped_storage().data_ptr()
        maker, made = users[place][0], kernels[users[place][0]][-1]
        if users[place] != [maker, k] or place in needed or not isinstance(made, Tensor):
            continue
        if made.ndim != args[0].ndim or not _lie_alike(made.mT, args[0]):
            continue
        product = (*kernels[maker][:3], copy.mT)
        if small_product(*product) is not None:
            found[maker], found[k] = product, None
    return [call for call in found if call is not None]


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of the same memory are the same view of it."""
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _by_value(times: Mapping[int, int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, k in times.items():
        found.setdefault(k, []).append(place)
    return found


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is told by its memory, shape and strides."""
    return type(t) is Tensor and not (t.is_quantized or t.is_conj() or t.is_neg() or t.requires_grad)


def _again(call: _Call, is_compared: bool) -> Kernel:
    """The same operation, with its results where they were."""
    op, args, kwargs, out = call
    if is_compared:
        run = functools.partial(op, *args, **kwargs)
        again = _of_same_size(run, out) if list(_tensors(out)) else _same_value(run, out)
        return Kernel(again, why_not="a value that Python reads")
    if schema_of(op).is_mutable:
        return Kernel(functools.partial(op, *args, **kwargs), op, args, kwargs)
    return _into(op, args, kwargs, out)


def _same_value(read: Callable[[], Any], value: Any) -> Callable[[], None]:
    """Reads a value again."""

    def run() -> None:
        if read() != value:
            raise OtherPathError

    return run


def _of_same_size(call: Callable[[], Any], out: Any) -> Callable[[], None]:
    """An operation whose results may be of other sizes now."""

    def run() -> None:
        for old, new in zip(_tensors(out), _tensors(call()), strict=True):
            if old.shape != new.shape:
                raise OtherPathError
            old.copy_(new)

    return run


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


def _into(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Kernel:
    """The same operation with its results written to `out`."""
    outputs = (out,) if isinstance(out, Tensor) else out
    if schema_of(op).name in _WORKSPACES and all(isinstance(t, Tensor) for t in outputs):
        run = functools.partial(torch.enable_grad()(op), *args, **kwargs)
        return Kernel(_copying(run, out), why_not=f"{schema_of(op).name} while gradients are recorded")
    if (product := small_product(op, args, kwargs, out)) is not None:
        return Kernel(product.run, product=product)
    if not kwargs and (large := product_by_onednn(op, args, out)) is not None:
        return Kernel(large, why_not="a matrix product by oneDNN")
    own = [(a.name, str(a.type)) for a in schema_of(op).arguments]
    if all(isinstance(t, Tensor) for t in outputs) and not _reduces(op, args, kwargs):
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
                given |= dict(zip(targets, outputs, strict=True))
                call = _SHORT_WAYS.get(variant, variant)
                return Kernel(functools.partial(call, *args, **given), variant, args, given)

    again = _copying(functools.partial(op, *args, **kwargs), out)
    if all(t is None or isinstance(t, Tensor) for t in outputs):
        return Kernel(again, op, args, kwargs, tuple(outputs))
    return Kernel(again, why_not=f"{schema_of(op).name} returns other things than tensors")


def _reduces(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is a loss that reduces: it would resize its output to that of the unreduced one on the way."""
    if schema_of(op).name.endswith("_backward"):
        return False
    names = [a.name for a in schema_of(op).arguments]
    if "reduction" not in names:
        return False
    place = names.index("reduction")
    return bool((args[place] if place < len(args) else kwargs.get("reduction", 1)) != 0)


def _copying(call: Callable[[], Any], out: Any) -> Callable[[], None]:
    """An operation that has no other way to write to memory that is there."""

    def run() -> None:
        for old, new in zip(_tensors(out), _tensors(call()), strict=True):
            old.copy_(new)

    return run
