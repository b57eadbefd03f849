"""torch's private names, used here and nowhere else: what may change without notice is found in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

CPU_ATTENTION_COUNTED_AS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
"""Attention on a CPU, which torch's table of floating-point operations leaves out, by its like in that table."""
RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""The classes of modules whose output in training mode depends on random numbers or on the rest of the batch."""


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of torch inside ``with``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would import all of its compiler to keep it away from the method
        return False


def schema_of(op: Any) -> Any:
    """The schema of an operator: its name, arguments, and which of them it writes to."""
    return op._schema


def packet_of(op: Any) -> Any:
    """An operator with all its overloads."""
    return op._overloadpacket


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to."""
    return int(tensor._version)


class _Layouts:
    """`same_layouts` by torch's public functions: ten times slower, and asks nothing private of torch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._layouts = [self._of(t) for t in tensors]

    @staticmethod
    def _of(t: Tensor) -> tuple[Any, ...]:
        return type(t), t.dtype, t.device, t.layout, t.shape, t.stride(), t.is_neg(), t.is_inference()

    def check(self, *tensors: Tensor) -> bool:
        return all(isinstance(t, Tensor) for t in tensors) and [self._of(t) for t in tensors] == self._layouts


def _layouts_of(tensors: Sequence[Tensor]) -> Any:
    """What torch.compile guards its graphs with: all that it compares of a tensor, in 50 ns."""
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards

    _seen = torch.zeros(2, 3)
    if not _layouts_of([_seen]).check(torch.ones(2, 3)) or _layouts_of([_seen]).check(torch.zeros(3, 2).t()):
        raise TypeError("they do not compare strides")
except (ImportError, TypeError, AttributeError):  # of another version of torch
    _layouts_of = _Layouts


def same_layouts(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that says whether the tensors it is given are like `tensors` in all but place and values.

    Compared are type, dtype, device, shape, strides and flags (negative bit, inference); it may compare more. The
    tensors must be different objects; as many have to be given.
    """
    check: Callable[..., bool] = _layouts_of(tensors).check
    return check


def has_onednn_linear() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """a·weightᵀ + bias by oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, weight, bias, "none", [], "")
    return product


def hooks_after_gradient(tensor: Tensor) -> Sequence[Any]:
    """The hooks that run in a backward pass as soon as a tensor's gradient is complete."""
    return list((getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values())


def is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks see the optimizer's steps, its own or those for all optimizers, or a profiler runs."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    if torch.compiler.is_compiling():  # it can't look at the profiler
        return False
    return bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled())
