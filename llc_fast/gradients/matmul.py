"""Which library multiplies matrices: llc_fast's own functions the small ones, oneDNN or torch's choice the large."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llc_fast import _native
from llc_fast.support.torch_private import has_onednn_linear, onednn_linear

_aten = torch.ops.aten
_PRODUCT_FLOPS = 1e7
"""Above which a matrix product is worth a choice of library."""
_SMALL_FLOPS, _SMALL_DEPTH = 3e7, 1024
"""Up to which llc_fast multiplies: beyond, a matrix leaves the caches, and others cut it into blocks that do not."""
_FEW_ROWS, _TURNED = 64, 16_384
"""A right-hand matrix of more elements than the latter that lies in columns is worth turning for so many rows."""


@dataclass(frozen=True)
class Product:
    """c = a·b (+ bias) in float32, by the native module.

    Attributes:
        a, b, bias, c: matrices ``[batch, rows, depth]``, ``[batch, depth, columns]``, ``[batch, rows, columns]``; or
            without the first dimension. The bias is None, or expanded to the shape of `c`. Columns of `c` lie side by
            side: where they do not, all is transposed.
        fields: sizes and strides, as ``csrc/products.h`` lists them.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    c: Tensor
    fields: tuple[int, ...]

    def run(self) -> None:
        """Without the native program: the same function."""
        bias = None if self.bias is None else self.bias.data_ptr()
        threads = torch.get_num_threads()
        _native.multiply(self.fields, self.a.data_ptr(), self.b.data_ptr(), bias, self.c.data_ptr(), threads)


@functools.cache
def _has_products() -> bool:
    return hasattr(_native, "has_products") and _native.has_products()


def _is_precise() -> bool:
    """Whether torch multiplies float32 matrices of a CPU as such: a user may ask it to round them to bfloat16."""
    try:
        precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        return precision != "bf16"
    except AttributeError:  # before torch 2.9
        return torch.get_float32_matmul_precision() != "medium"


def small_product(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Product | None:
    """A matrix product (of a batch, with a bias) by the native module, if it is one that should be.

    Sizes and strides decide, and no stopwatch: equal seeds give equal bits.
    """
    if op in (_aten.mm.default, _aten.bmm.default) and len(args) == 2:
        bias, (a, b) = None, args
    elif op in (_aten.addmm.default, _aten.baddbmm.default) and len(args) == 3:
        bias, a, b = args
        bias = bias.expand(out.shape)
    else:
        return None
    tensors = [t for t in (a, b, bias, out) if t is not None]
    if any(value != 1 for value in kwargs.values()) or not all(map(_is_plain, tensors)):
        return None
    if not _has_products() or not _is_precise():
        return None
    if _strides(out)[2] != 1 and bias is None:  # the rows lie side by side: cᵀ = bᵀ·aᵀ
        a, b, out = b.mT, a.mT, out.mT
    (rows, depth), columns, batch = a.shape[-2:], b.shape[-1], a.shape[0] if a.ndim == 3 else 1
    along_a, along_b, along_c = (_strides(t) for t in (a, b, out))
    along_bias = (0, 0, 1) if bias is None else _strides(bias)
    if along_c[2] != 1 or along_bias[2] != 1 or 1 not in along_a[1:] or 1 not in along_b[1:]:
        return None
    if not 0 < 2 * batch * rows * depth * columns <= _SMALL_FLOPS or depth > _SMALL_DEPTH:
        return None
    if along_b[2] != 1 and rows < _FEW_ROWS and depth * columns > _TURNED:
        return None
    if any(_overlap(out, t) for t in tensors[:-1]):
        return None
    fields = (batch, rows, columns, depth, *along_a, *along_b, *along_bias[:2], *along_c[:2])
    return Product(a, b, bias, out, fields)


def _is_plain(t: Tensor) -> bool:
    return type(t) is Tensor and t.dtype == torch.float32 and t.device.type == "cpu" and not t.is_neg()


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of the batch, the rows and the columns; the one of a dimension of size 1 is never used, so it may be 1."""
    rows, columns = t.shape[-2:]
    return (
        t.stride(0) if t.ndim == 3 else 0,
        1 if rows == 1 else t.stride(-2),
        1 if columns == 1 else t.stride(-1),
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    ours, theirs = a.untyped_storage(), b.untyped_storage()
    begin, other = ours.data_ptr(), theirs.data_ptr()
    return begin < other + theirs.nbytes() and other < begin + ours.nbytes()


@functools.cache
def _products_by_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than torch's choice, which on x86 is MKL.

    On processors that are not Intel's MKL leaves half of AVX-512's width unused; oneDNN, which torch ships as well,
    does not. The processor's name decides, not a stopwatch: equal seeds give equal bits.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_onednn_linear():
        return False
    try:
        vendor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return False
    return "GenuineIntel" not in vendor


def product_by_onednn(op: Any, args: tuple[Any, ...], out: Any) -> Callable[[], object] | None:
    """A matrix product (with a bias) by oneDNN, if it is one that should be."""
    if op is _aten.mm.default and len(args) == 2:
        bias, (a, b) = None, args
    elif op is _aten.addmm.default and len(args) == 3 and args[0].ndim == 1:
        bias, a, b = args
    else:
        return None
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if a.dtype != torch.float32 or a.device.type != "cpu" or flops < _PRODUCT_FLOPS or not _products_by_onednn():
        return None
    transposed = b.detach().t()
    return lambda: out.copy_(onednn_linear(a, transposed, bias))
