"""Recorded kernels as a program that the native module runs in one call, without Python's lock.

To get from one kernel to the next Python takes one to three microseconds, holding a lock that another thread may want.
The native module knows nothing of torch (see docs/decisions/01): it is given the addresses of functions of torch and
handles of tensors, the very ones that were recorded. A kernel whose arguments are tensors, numbers and text is
called as torch's own C++ does; others go through the dispatcher of torch's stable C interface. What neither takes
stays with Python, and so does a kernel that fails: run again by Python, it raises what it always raised.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llc_fast import _native
from llc_fast.gradients.matmul import Product
from llc_fast.support.torch_private import (
    REPLAY_FUNCTIONS,
    code_of,
    number_as_tensor,
    release_handle,
    schema_of,
    symbol_addresses,
    tensor_handle,
    unboxed_address,
)

_MAX_WORDS, _MAX_ARGUMENTS = 6, 32


@dataclass(frozen=True)
class Kernel:
    """A kernel that is run again.

    Attributes:
        run: by Python.
        op: the operation, as it is called again; None: only `run` knows how.
        args, kwargs: what it is given, with what it writes to.
        targets: what its results are copied to, in their order; None: it writes where it should.
        product: what it is instead of an operation of torch.
        why_not: why only `run` knows how.
    """

    run: Callable[[], object]
    op: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Tensor | None, ...] | None = None
    product: Product | None = None
    why_not: str = ""


class _NotNativeError(Exception):
    """The native module can't run a kernel; the text says why."""


class Program:
    """Kernels that are run in their order, by the native module as far as it can.

    Args:
        kernels: which; their tensors are kept.
        why_not: why Python is to run them all; empty: it need not.

    Attributes:
        by_python: how many kernels Python runs, by the reason.
    """

    def __init__(self, kernels: Sequence[Kernel], why_not: str = "") -> None:
        self._kernels = kernels
        self.by_python: dict[str, int] = {}
        reason = why_not or why_not_native()
        self._native = None if reason else self._compiled(kernels)
        if reason and kernels:
            self.by_python = {reason: len(kernels)}

    @property
    def described(self) -> str:
        """What Python runs, and why; empty: nothing."""
        counted = sum(self.by_python.values())
        return f"Python replays {counted} of {len(self._kernels)} kernels: {', '.join(self.by_python)}" * bool(counted)

    def _compiled(self, kernels: Sequence[Kernel]) -> Any:
        """The native program."""
        program = _native.Program(_functions())
        builder = _Builder(program)
        for kernel in kernels:
            try:
                builder.add(kernel)
            except _NotNativeError as error:
                program.add_stop()
                self.by_python[str(error)] = self.by_python.get(str(error), 0) + 1
        self._made = builder.made
        return program

    def run(self) -> None:
        """Run the kernels, with gradients off."""
        if self._native is None:
            with torch.no_grad():
                for kernel in self._kernels:
                    kernel.run()
            return
        run, done, threads = self._native.run, len(self._kernels), torch.get_num_threads()
        k = run(0, threads)
        while k < done:
            with torch.no_grad():
                self._kernels[k].run()
            k = run(k + 1, threads)


class _Builder:
    """Adds kernels to a native program."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._places: dict[int, int] = {}  # of tensors, by identity
        self._numbers: dict[tuple[str, type, str], int] = {}
        self.made: list[Tensor] = []
        """Numbers as tensors, which are to be kept as well: their identity is that of a place."""

    def add(self, kernel: Kernel) -> None:
        """One more kernel, or an error and none.

        Raises:
            _NotNativeError: it can't be added.
        """
        if kernel.product is not None:
            return self._add_product(kernel.product)
        if kernel.op is None:
            raise _NotNativeError(kernel.why_not)
        schema = schema_of(kernel.op)
        values = list(_values(schema, kernel.args, kernel.kwargs))
        # A reference that is returned is the one that was given.
        if kernel.targets is None and len(schema.returns) == 1:
            kinds = [argument.type.kind() for argument, _ in values]
            known = {"TensorType", "StringType"} | ({"NumberType"} if _functions()["item"] else set())
            is_called = known >= set(kinds) and len(kinds) + kinds.count("StringType") <= _MAX_WORDS
            if is_called and (address := unboxed_address(schema)):
                operands = [self._operand(argument, value) for argument, value in values]
                self._program.add_call(address, [place for places in operands for place in places])
                return
        if not all(_functions()[name] for name in ("call_dispatcher", "abi_version", "new_tensor", "copy_")):
            raise _NotNativeError("this torch has no stable interface to its dispatcher")
        if len(values) > _MAX_ARGUMENTS or any(r.type.kind() != "TensorType" for r in schema.returns):
            raise _NotNativeError(f"{schema.name} returns other things than tensors")
        arguments = [self._argument(argument.type, value) for argument, value in values]
        targets = [None if t is None else self._place(t) for t in kernel.targets or ()]
        if targets and len(targets) != len(schema.returns):
            raise _NotNativeError(f"{schema.name} returns other things than tensors")
        self._program.add_dispatch(schema.name, schema.overload_name, arguments, len(schema.returns), targets)

    def _add_product(self, product: Product) -> None:
        if not _functions()["data"]:
            raise _NotNativeError("this torch does not tell where a tensor is")
        bias = None if product.bias is None else self._place(product.bias)
        a, b, c = map(self._place, (product.a, product.b, product.c))
        self._program.add_product(product.fields, a, b, bias, c)

    def _operand(self, argument: Any, value: Any) -> list[int]:
        """The place of a tensor or of a number, or the two places of text."""
        kind = argument.type.kind()
        if kind == "TensorType":
            return [self._tensor(value)]
        if kind == "StringType" and isinstance(value, str):
            place = self._program.add_text(value)
            return [place, place + 1]
        if kind == "NumberType" and isinstance(value, bool | int | float):
            return [self._once("number", value, lambda: self._program.add_scalar(self._kept(_tensor_of(value))))]
        raise _NotNativeError(f"{type(value).__name__} for an argument of the type {argument.type}")

    def _tensor(self, value: Any) -> int:
        """The place of a tensor, or of a number in a tensor's stead."""
        if isinstance(value, Tensor):
            return self._place(value)
        number = number_as_tensor(value) if isinstance(value, bool | int | float) else None
        if number is None:
            raise _NotNativeError(f"{type(value).__name__} in a tensor's stead")
        return self._once("tensor", value, lambda: self._kept(number))

    def _once(self, role: str, value: bool | int | float, make: Callable[[], int]) -> int:
        key = role, type(value), repr(value)  # -0.0 equals 0.0
        if key not in self._numbers:
            self._numbers[key] = make()
        return self._numbers[key]

    def _kept(self, tensor: Tensor) -> int:
        self.made.append(tensor)
        return self._place(tensor)

    def _place(self, tensor: Tensor) -> int:
        if id(tensor) not in self._places:
            handle = tensor_handle(tensor)
            try:
                self._places[id(tensor)] = self._program.add_tensor(handle)
            except BaseException:
                release_handle(handle)
                raise
        return self._places[id(tensor)]

    def _argument(self, kind: Any, value: Any) -> tuple[str, Any]:
        """An argument as torch's stable interface has it: bits, or something that is made for each call.

        Raises:
            _NotNativeError: it has no such thing.
        """
        name = kind.kind()
        if name == "OptionalType":
            return ("bits", 0) if value is None else ("optional", self._argument(kind.getElementType(), value))
        if name == "TensorType":
            return "tensor", self._tensor(value)
        if name == "ListType" and isinstance(value, list | tuple) and _functions()["new_list"]:
            return "list", [self._argument(kind.getElementType(), item) for item in value]
        if name == "IntType" and isinstance(value, torch.dtype | torch.memory_format):
            if (code := code_of(value)) is not None:
                return "bits", code
        elif name == "IntType" and isinstance(value, int) and -(2**63) <= value < 2**63:
            return "bits", value % 2**64
        elif name == "BoolType" and isinstance(value, bool):
            return "bits", int(value)
        elif name == "FloatType" and isinstance(value, int | float):
            return "bits", struct.unpack("<Q", struct.pack("<d", value))[0]
        raise _NotNativeError(f"an argument of the type {kind}")


def _tensor_of(value: bool | int | float) -> Tensor:
    """A number as a tensor without dimensions.

    Raises:
        _NotNativeError: it has too many digits.
    """
    dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]
    try:
        return torch.scalar_tensor(value, dtype=dtype)
    except (OverflowError, RuntimeError) as error:
        raise _NotNativeError("a number that is too large") from error


def _values(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each argument of an operation with its value."""
    for k, argument in enumerate(schema.arguments):
        if k < len(args):
            yield argument, args[k]
        else:
            yield argument, kwargs.get(argument.name, argument.default_value)


@functools.cache
def _functions() -> dict[str, int]:
    """Addresses of functions of torch, 0 where it has none."""
    return symbol_addresses(REPLAY_FUNCTIONS)


@functools.cache
def why_not_native() -> str:
    """Why the native module can't run kernels of this torch; empty if it can."""
    if not hasattr(_native, "Program"):
        return "the native module was built without it"
    needed = "grad_mode_is_enabled", "grad_mode_set_enabled", "delete_tensor"
    if missing := [REPLAY_FUNCTIONS[name] for name in needed if not _functions()[name]]:
        return f"this torch has no {', '.join(missing)}"
    try:
        return _tried()
    except Exception as error:
        return f"this torch's interface is another one ({error})"


def _tried() -> str:
    """Why what the native module computes is of no use; empty if it is as it should be."""
    aten = torch.ops.aten
    with torch.no_grad():
        a, b = torch.arange(6.0).view(2, 3), torch.full((2, 3), 0.5)
        results = [torch.full(shape, -1.0) for shape in ((2, 3), (2,), (4, 3), (2, 3), (2, 3))]
        total, sums, both, copied, gated = results
        kernels = [
            Kernel(lambda: None, aten.add.out, (a, b), {"alpha": 2, "out": total}),
            Kernel(lambda: None, aten.sum.IntList_out, (a, [1], False), {"out": sums}),
            Kernel(lambda: None, aten.cat.out, ([a, b], 0), {"out": both}),
            Kernel(lambda: None, aten.mul.Tensor, (a, b), {}, (copied,)),
            Kernel(lambda: None, aten.gelu.out, (b,), {"approximate": "tanh", "out": gated}),
        ]
        gelu = torch.nn.functional.gelu(b, approximate="tanh")
        expected = [a + 2 * b, a.sum(1), torch.cat([a, b]), a * b, gelu]
        program = _native.Program(_functions())
        builder = _Builder(program)
        known = []
        for k, kernel in enumerate(kernels):
            try:
                builder.add(kernel)
                known.append(k)
            except _NotNativeError:
                continue
        if program.run(0, 1) != len(known):
            return "this torch's interface is another one: a kernel failed"
        if not all(torch.equal(results[k], expected[k]) for k in known):
            return "this torch's interface is another one: a kernel gave other values"
    return ""
