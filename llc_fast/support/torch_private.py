"""torch's private names, used here and nowhere else: what may change without notice is found in one place."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils.data import DataLoader, IterableDataset

_aten = torch.ops.aten
_functorch: Any = torch._C._functorch

CPU_ATTENTION_COUNTED_AS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
"""Attention on a CPU, which torch's table of floating-point operations leaves out, by its like in that table."""


class PlainTensor(Tensor):
    """A tensor with attributes of its own; what is computed from it, and its copies, are plain tensors."""

    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of torch inside ``with``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would import all of its compiler to keep it away from the method
        return False


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """Afterwards torch has the modes and transforms (vmap, grad) that it has now, and none that was left behind.

    An interrupt may come when one has begun, and the ``with`` that would end it has not.
    """
    modes, functions, transforms = _len_torch_dispatch_stack(), _len_torch_function_stack(), _num_transforms()
    try:
        yield
    finally:
        while _num_transforms() > transforms:
            _end_transform()
        while _len_torch_dispatch_stack() > modes:
            _pop_dispatch_mode()
        while _len_torch_function_stack() > functions:
            _pop_function_mode()  # type: ignore[no-untyped-call]


def _num_transforms() -> int:
    return len(_functorch.get_interpreter_stack() or ())


def _end_transform() -> None:
    kind = _functorch.peek_interpreter_stack().key()
    if kind == _functorch.TransformType.Vmap:
        _functorch._vmap_decrement_nesting()
    elif kind == _functorch.TransformType.Grad:
        _functorch._grad_decrement_nesting()
    else:
        _functorch.pop_dynamic_layer_stack()


def schema_of(op: Any) -> Any:
    """The schema of an operator: its name, arguments, and which of them it writes to."""
    return op._schema


def packet_of(op: Any) -> Any:
    """An operator with all its overloads."""
    return op._overloadpacket


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; 0 for one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


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


def graph_of(loss: Tensor) -> Iterator[Any]:
    """The nodes of the graph that leads to a tensor."""
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def has_own_backward(loss: Tensor) -> bool:
    """Whether the graph of a loss has an ``autograd.Function`` written in Python."""
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in graph_of(loss))


def is_held(parameter: Tensor) -> bool:
    """Whether DistributedDataParallel may hold a parameter: in a group of processes, something of torch's does.

    Elsewhere that is a graph which is alive. It may be freed at any time, when :func:`swap_contents` is not safe.
    """
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return in_group and parameter._use_count() > 1  # type: ignore[attr-defined]


def swap_contents(a: Tensor, b: Tensor) -> None:
    """Exchange what two tensors are, with all that autograd knows of them, but for the objects of Python's.

    ``torch.utils.swap_tensors`` does this too, and poisons the place where gradients go. What holds `a` must hold it
    until they are exchanged back: torch counts whether anything but Python's object does, in that object.
    """
    hooks = a._post_accumulate_grad_hooks, b._post_accumulate_grad_hooks  # which the objects keep beside the content
    torch._C._swap_tensor_impl(a, b)
    b._post_accumulate_grad_hooks, a._post_accumulate_grad_hooks = hooks


def accumulation_hooks(tensor: Tensor) -> dict[int, Any] | None:
    """What runs as soon as the gradient of a leaf has been accumulated; None if nothing ever did."""
    return tensor._post_accumulate_grad_hooks


def normalizes_batches(module: nn.Module) -> bool:
    """Whether the output of a module in training mode depends on the rest of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def drops(module: nn.Module) -> bool:
    """Whether a module of torch's draws random numbers in training mode."""
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout > 0 and module.num_layers > 1)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    return isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) and bool(getattr(module, "p", 1.0) > 0)


def padding_rows(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Weights of embeddings with a row that gets no gradient (``padding_idx``), and which; none that others use."""
    uses = [p for _, p in model.named_parameters(remove_duplicate=False)]
    for module in model.modules():
        row = module.padding_idx if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
        weight = None if row is None else getattr(module, "weight", None)
        if row is not None and isinstance(weight, nn.Parameter) and sum(p is weight for p in uses) == 1:
            yield weight, row


_OF_LIBRARIES = ("torch.nn.utils.", "transformer_lens.model_bridge.")


def has_user_hooks(model: nn.Module) -> bool:
    """Whether somebody's hooks see or change what the modules or parameters of a model compute.

    Hooks of libraries that are a part of the function do not count: those by which torch normalizes weights, and those
    by which TransformerLens passes values on between modules.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
    if any(everywhere):
        return True
    hooks = (hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values())
    if any(not str(getattr(hook, "__module__", "")).startswith(_OF_LIBRARIES) for hook in hooks):
        return True
    return any(p._backward_hooks for p in model.parameters())


def has_compiled_parts(model: nn.Module, loss_fn: object) -> bool:
    """Whether a model, some of its modules or their functions, or a loss function were given to torch.compile."""
    return _is_compiled(loss_fn) or any(
        _is_compiled(m) or any(map(_is_compiled, vars(m).values())) for m in model.modules()
    )


def _is_compiled(value: object) -> bool:
    if isinstance(value, nn.Module):
        return type(value).__name__ == "OptimizedModule" or getattr(value, "_compiled_call_impl", None) is not None
    return isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable")


def can_set_compiling_aside() -> bool:
    """Whether what torch.compile has made can be asked to run as it was written; since torch 2.6."""
    return hasattr(torch.compiler, "set_stance")


def compiling_set_aside() -> contextlib.AbstractContextManager[object]:
    """Inside ``with`` everything given to torch.compile runs as it was written."""
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def has_onednn_linear() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """a·weightᵀ + bias by oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, weight, bias, "none", [], "")
    return product


def is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks see the optimizer's steps, its own or those for all optimizers, or a profiler runs."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    if torch.compiler.is_compiling():  # it can't look at the profiler
        return False
    return bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled())


def iterates_as_torch_does(loader: object) -> bool:
    """Whether a loader reads its data set in the order of its samplers: a DataLoader that keeps torch's iteration."""
    if not isinstance(loader, DataLoader):
        return False
    kind: Any = type(loader)
    return (
        kind.__iter__ is DataLoader.__iter__
        and kind._get_iterator is DataLoader._get_iterator
        and kind._index_sampler is DataLoader._index_sampler
    )


def index_sampler_of(loader: DataLoader[Any]) -> Any:
    """What says which samples come next: lists of indices for batches, or single indices of items that are batches."""
    return None if isinstance(loader.dataset, IterableDataset) else loader._index_sampler


def end_workers(iterator: Any) -> None:
    """End the workers of a loader's iterator, even if a traceback still holds it."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def workers_of(loader: Any) -> Any:
    """The iterator that keeps a loader's workers from pass to pass; None: there is none."""
    return loader._iterator


def copy_of_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """The same loader, with workers of its own and some attributes changed.

    A shallow copy keeps everything (collate_fn, worker_init_fn, generator, what a subclass adds) without a call of the
    constructor, whose arguments a subclass may have changed.
    """
    copied = copy.copy(loader)
    vars(copied).update({"_iterator": None, "in_order": True}, **changes)
    return copied


REPLAY_FUNCTIONS = {
    "grad_mode_is_enabled": "aoti_torch_grad_mode_is_enabled",
    "grad_mode_set_enabled": "aoti_torch_grad_mode_set_enabled",
    "delete_tensor": "aoti_torch_delete_tensor_object",
    "new_tensor": "aoti_torch_new_tensor_handle",
    "data": "aoti_torch_get_data_ptr",
    "copy_": "aoti_torch_copy_",
    "abi_version": "aoti_torch_abi_version",
    "call_dispatcher": "torch_call_dispatcher",
    "new_list": "torch_new_list_reserve_size",
    "push_back": "torch_list_push_back",
    "new_optional": "torch_new_stable_ivalue",
    "item": "_ZN2at4_ops4item4callERKNS_6TensorE",
}
"""Functions of torch's libraries by the names that ``csrc/replay.h`` has for them: all but the last are of torch's C
interface, whose meaning does not change between versions; not every version has all of them."""


@functools.cache
def _libraries() -> Any:
    """torch's shared libraries, which are loaded already."""
    try:
        return ctypes.CDLL(torch._C.__file__)
    except (OSError, TypeError):
        return None


@functools.cache
def _address(symbol: str) -> int:
    """Of a function of torch's libraries; 0: there is none of this name."""
    try:
        return ctypes.cast(getattr(_libraries(), symbol), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def symbol_addresses(symbols: Mapping[str, str]) -> dict[str, int]:
    """Addresses of functions of torch's libraries, 0 where there is none of this name."""
    return {name: _address(symbol) for name, symbol in symbols.items()}


def unboxed_address(schema: Any) -> int:
    """The function of C++ behind an operation whose arguments are tensors, numbers and text; 0: there is none.

    ``at::_ops::NAME::call`` takes references to all of them, and views of text. A function's name in a library has the
    types of its arguments in it, so that one with others is not found.
    """
    if not schema.name.startswith("aten::") or not {a.type.kind() for a in schema.arguments} <= _TYPES.keys():
        return 0
    name = "_".join(filter(None, (schema.name.removeprefix("aten::"), schema.overload_name)))
    arguments = [(a.type.kind(), not (a.alias_info is not None and a.alias_info.is_write)) for a in schema.arguments]
    return _address(_mangled(name, arguments))


_TYPES = {
    "TensorType": ("NS_6TensorE", ()),
    "NumberType": ("N3c106ScalarE", ("c10",)),
    "StringType": ("St17basic_string_viewIcSt11char_traitsIcEE", ("view", "traits", "traits of char")),
}
"""What torch's types are called in names of functions, and what in them may be abbreviated later."""


def _mangled(name: str, arguments: Sequence[tuple[str, bool]]) -> str:
    """The name of ``at::_ops::NAME::call`` by the rules of the Itanium C++ ABI, as libstdc++ has its types.

    Args:
        arguments: of each, its kind and whether it is constant. Text is passed by value, all else by reference.
    """
    seen: dict[object, int] = {"at": 0, "_ops": 1, "struct": 2}  # what may be abbreviated, in its order
    text = f"_ZN2at4_ops{len(name)}{name}4callE"

    def known(part: object) -> str:
        return "S_" if seen[part] == 0 else f"S{'0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'[seen[part] - 1]}_"

    for kind, is_constant in arguments:
        reference = kind, is_constant
        if reference in seen:
            text += known(reference)
            continue
        if kind != "StringType":
            text += "RK" if is_constant else "R"
        if kind in seen:
            text += known(kind)
        else:
            spelled, parts = _TYPES[kind]
            text += spelled
            for part in (*parts, kind):
                seen[part] = len(seen)
        if kind == "StringType":
            continue
        if is_constant:
            seen[f"constant {kind}"] = len(seen)
        seen[reference] = len(seen)
    return text


def tensor_handle(tensor: Tensor) -> int:
    """Another reference to a tensor, for torch's C interface; somebody has to delete it."""
    capsule = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address: int = pointer(capsule, None)
    return address


def release_handle(handle: int) -> None:
    """Delete a reference."""
    _libraries().aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


def code_of(value: torch.dtype | torch.memory_format) -> int | None:
    """The number of a dtype or a memory format in torch's C interface; None: it has none."""
    kind = "dtype" if isinstance(value, torch.dtype) else "memory_format"
    name = str(value).removeprefix("torch.")
    try:
        function = getattr(_libraries(), f"aoti_torch_{kind}_{name}")
    except AttributeError:
        return None
    function.restype = ctypes.c_int32
    return int(function())


def number_as_tensor(value: bool | int | float) -> Tensor | None:
    """A number as torch's operators see it that are given one in a tensor's stead; None: it can't be had.

    Unlike another tensor without dimensions it counts less than any tensor where a type is chosen. Autograd keeps it.
    """
    one = torch.ones((), dtype=torch.float16)
    try:
        with torch.enable_grad():
            graph: Any = (one.clone().requires_grad_() * value).grad_fn
        number = graph._saved_other
    except (RuntimeError, OverflowError, AttributeError):
        return None
    whole = torch.ones((), dtype=torch.int16)
    is_one = isinstance(number, Tensor) and all(
        torch.result_type(t, number) == torch.result_type(t, value) for t in (one, whole)
    )
    return number if is_one else None
