"""Whether memory is what a tensor says it is: before an address leaves Python, and at every step after.

A tensor's address, size, strides and dtype can change while it stays the same object: ``p.data = …``,
``model.float()``, ``share_memory_()``, a storage that is freed or resized. Whoever passes addresses on asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llc_fast.support.torch_private import same_layouts, version_of

_address_of, _storage_of, _bytes_of = Tensor.data_ptr, Tensor.untyped_storage, torch.UntypedStorage.nbytes


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the values one after another: contiguous, and not marked as negated."""
    return tensor.is_contiguous() and not tensor.is_neg()


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself if it is plain, else a copy that is."""
    return tensor if is_plain(tensor) else tensor.resolve_neg().contiguous()


def check_memory(name: str, tensor: Tensor, *, reach: int = 0) -> None:
    """Check that a tensor's elements lie in memory that its storage has.

    Args:
        name: of the tensor, for messages.
        tensor: dense.
        reach: elements behind its last one that are used too.

    Raises:
        TypeError: there is no memory: a fake tensor, one inside ``vmap`` or ``torch.func.grad``, a wrapper.
        RuntimeError: the storage was freed or has become too small.
    """
    if not tensor.numel():
        return
    try:
        storage = tensor.untyped_storage()
        found = storage.nbytes() if storage.device.type == tensor.device.type else None
        address = 0 if found is None else tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        found, address = None, 0
    if found is None or (found and not address):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which keeps its data elsewhere: use what it wraps, outside of "
            "FakeTensorMode, vmap and torch.func"
        )
    needed = (tensor.storage_offset() + _span(tensor) + reach) * tensor.element_size()
    if found < needed:
        raise RuntimeError(
            f"{name} needs {needed} bytes, but its storage has {found}: it was freed or resized. Give it its memory "
            "back before the step"
        )


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last one, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as in ``expand``; or might, in strides that nothing usual has."""
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += (n - 1) * stride
    return False


class Watch:
    """Sees cheaply, at every step, whether tensors still are what they were when they were checked.

    Some are the same objects at every step. Others, the gradients, usually are new ones that look like those before.

    Args:
        tensors: the same at every step; in memory (:func:`check_memory`).
        copied: those of which somebody keeps a copy of the values: a write to them, as torch counts writes, is a change
            as well. Writes to inference tensors are not counted; with such a one nothing is ever unchanged.
        check: raises unless the gradient with this number can be used.
    """

    def __init__(
        self, tensors: Sequence[Tensor], copied: Sequence[Tensor], check: Callable[[int, Tensor], None]
    ) -> None:
        self._tensors = list({id(t): t for t in tensors}.values())
        self._copied, self._check = list(copied), check
        self._versions = [None if t.is_inference() else version_of(t) for t in self._copied]
        self._addresses = list(map(_address_of, self._tensors))
        # Kept, because asking a tensor for its storage takes longer than asking the storage for its size. A tensor at
        # the same address is in the same storage, as long as that is there.
        self._storages = list(map(_storage_of, self._tensors))
        self._bytes = list(map(_bytes_of, self._storages))
        self._same_layouts = same_layouts(self._tensors)
        # Of the tensors and the gradients that were seen last.
        self._all_same_layouts: Callable[..., bool] | None = None
        self._all_addresses: list[int] = []
        self._all_bytes: list[int] = []
        self._spans: list[int] = []  # of gradients, in bytes
        self._to_copy: list[tuple[int, bool]] = []  # gradients, by number, and whether they are negated

    def is_unchanged(self) -> bool:
        """Whether address, size of the storage, dtype, device, shape, strides and flags are as they were."""
        return (
            self._addresses == list(map(_address_of, self._tensors))
            and self._bytes == list(map(_bytes_of, self._storages))
            and self._same_layouts(*self._tensors)
            and not self._copies_are_old()
        )

    def _copies_are_old(self) -> bool:
        return bool(self._copied) and (None in self._versions or self._versions != list(map(version_of, self._copied)))

    def look(self, grads: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[int]] | None:
        """The gradients, and their addresses; None if the tensors have changed.

        Gradients that are not plain are copied. This runs at every step, and usually finds that nothing has changed.

        Raises:
            TypeError, ValueError, RuntimeError: what `check` says of a gradient.
        """
        everything = [*self._tensors, *grads]
        same = self._all_same_layouts
        is_same = same is not None and same(*everything) and not (self._copied and self._copies_are_old())
        if not is_same and not self._look_closely(grads):
            return None
        addresses = list(map(_address_of, everything))
        sizes = list(map(_bytes_of, [*self._storages, *map(_storage_of, grads)]))
        known = len(self._tensors)
        if addresses != self._all_addresses or sizes != self._all_bytes:
            self._all_addresses = []
            if addresses[:known] != self._addresses or sizes[:known] != self._bytes:
                return None
            for k, (grad, span) in enumerate(zip(grads, self._spans, strict=True)):
                end = grad.storage_offset() * grad.element_size() + span
                if span and not (addresses[known + k] and end <= sizes[known + k]):
                    self._check(k, grad)
            self._all_addresses, self._all_bytes = addresses, sizes
        addresses = addresses[known:]
        if self._to_copy:
            grads = list(grads)
            for k, is_negated in self._to_copy:
                grads[k] = grad = plain(grads[k].detach()) if is_negated else grads[k].contiguous()
                addresses[k] = grad.data_ptr()
        return grads, addresses

    def _look_closely(self, grads: Sequence[Tensor]) -> bool:
        """Check everything anew; whether the tensors are unchanged."""
        self._all_same_layouts, self._all_addresses = None, []
        if not self.is_unchanged():
            return False
        for k, grad in enumerate(grads):
            self._check(k, grad)
        self._spans = [grad.element_size() * _span(grad) for grad in grads]
        self._to_copy = [(k, grad.is_neg()) for k, grad in enumerate(grads) if not is_plain(grad)]
        self._all_same_layouts = same_layouts([*self._tensors, *grads])
        return True
