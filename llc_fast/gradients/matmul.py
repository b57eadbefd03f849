"""Which library multiplies matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llc_fast.support.torch_private import has_onednn_linear, onednn_linear

_aten = torch.ops.aten
_PRODUCT_FLOPS = 1e7
"""Above which a matrix product is worth a choice of library."""


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
