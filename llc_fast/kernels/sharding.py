"""DTensor parameters: each rank steps the part that it holds, under the names its elements have in the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from llc_fast.kernels.native import Segment, normals
from llc_fast.kernels.step import NoiseKey

Axes: TypeAlias = tuple[tuple[Any, int], ...]
"""Mesh dimensions: pairs of a DeviceMesh and a number."""


class Block(NamedTuple):
    """The part of a DTensor that this rank holds.

    Attributes:
        box: cuts it out of the whole.
        starts: where in the flat whole its runs begin: stretches of equal length, in the part's own order.
    """

    box: tuple[slice, ...]
    starts: list[int]


def is_dtensor(value: object) -> bool:
    """By the type's name, because importing DTensor takes long and most models have none."""
    return type(value).__name__ == "DTensor"


@torch.no_grad()  # which makes it the memory itself, not a view in autograd's graph
def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    held: Any = tensor.to_local() if is_dtensor(tensor) else tensor
    return held.wait() if hasattr(held, "wait") else held  # type: ignore[no-any-return]  # a collective under way


def whole_of(tensor: Any) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def sharded_axes(p: Any) -> Axes:
    """The mesh dimensions over which a parameter is split; none if it is a plain tensor."""
    if not is_dtensor(p):
        return ()
    return tuple((p.device_mesh, axis) for axis, placement in enumerate(p.placements) if placement.is_shard())


def block_of(name: str, p: Any) -> Block:
    """Where this rank's part of DTensor `p` lies.

    Raises:
        ValueError: it is not a block of the whole.
    """
    coordinates, remedy = p.device_mesh.get_coordinate(), "redistribute it to Shard or Replicate placements"
    if coordinates is None:
        raise ValueError(f"{name} lies on {p.device_mesh}, which this rank is no part of: leave it out here")
    begin, size = [0] * p.ndim, list(p.shape)
    for axis, placement in enumerate(p.placements):
        if type(placement).__name__ == "Shard":
            dim = placement.dim
            chunk = -(-size[dim] // p.device_mesh.size(axis))  # as torch.chunk: the last parts are short or empty
            start = min(coordinates[axis] * chunk, size[dim])
            begin[dim], size[dim] = begin[dim] + start, min(chunk, size[dim] - start)
        elif not placement.is_replicate():
            raise ValueError(f"{name} is a DTensor with placement {placement}, which can't be sampled: {remedy}")
    if (held := tuple(local_part(p).shape)) != tuple(size):
        raise ValueError(
            f"{name} is a DTensor with placements {p.placements}, by which this rank holds {tuple(size)}, but it holds "
            f"{held}: {remedy}"
        )
    # Behind the last dimension that is cut, the part runs on as the whole does.
    cut = max((dim for dim in range(p.ndim) if size[dim] < p.shape[dim]), default=0)
    strides = [math.prod(p.shape[dim + 1 :]) for dim in range(p.ndim)]
    rows = [
        range(begin[dim] * strides[dim], (begin[dim] + size[dim]) * strides[dim], strides[dim]) for dim in range(cut)
    ]
    first = begin[cut] * strides[cut] if p.ndim else 0
    starts = [first + sum(row) for row in itertools.product(*rows)]
    return Block(tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True)), starts or [0])


def local_segment(name: str, p: Any, whole: Segment) -> Segment:
    """The segment of what this rank holds of parameter `p`.

    Raises:
        ValueError: state, mask or preconditioner that is not laid out as the parameter.
    """
    if not is_dtensor(p):
        return whole
    block = block_of(name, p)

    def held(kind: str, like: Any) -> Tensor:
        if not is_dtensor(like) or (like.device_mesh, like.placements) != (p.device_mesh, p.placements):
            layout = like.placements if is_dtensor(like) else "a plain tensor"
            raise ValueError(f"the {kind} of {name} must be a DTensor with placements {p.placements}, got {layout}")
        return local_part(like)

    def part(kind: str, given: Any) -> Any:
        """Of a mask or preconditioner, which may be a plain tensor that broadcasts to the whole."""
        if is_dtensor(given):
            return held(kind, given)
        if not isinstance(given, Tensor):
            return given
        try:
            return given.expand(p.shape)[block.box]
        except RuntimeError as error:
            raise ValueError(
                f"a {kind} of shape {tuple(given.shape)} does not fit {name} of shape {tuple(p.shape)}"
            ) from error

    assert isinstance(whole.offset, int)
    return Segment(
        w=held("float32 copy", whole.w),
        offset=[whole.offset + start for start in block.starts],
        reference=None if whole.reference is None else held("reference point", whole.reference),
        mask=part("mask", whole.mask),
        state=[held("state", kept) for kept in whole.state],
        preconditioner=part("preconditioner", whole.preconditioner),
        copy=None if whole.copy is None else local_part(whole.copy),
    )


def local_gradient(p: Any, grad: Any) -> Tensor:
    """The gradient of what this rank holds of parameter `p`."""
    if not is_dtensor(p):
        return grad  # type: ignore[no-any-return]
    if is_dtensor(grad) and grad.placements != p.placements:  # a partial sum, usually
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local_part(grad)


def dtensor_like(whole: Tensor, values: Tensor) -> Tensor:
    """A DTensor laid out as `whole`, of which this rank holds `values`."""
    made = torch.zeros_like(whole, memory_format=torch.contiguous_format)
    held = local_part(made)
    held.copy_(values.view(held.shape))
    return made


def laid_out_like(w: Tensor, given: Any) -> Any:
    """What is given for the elements of `w`, a number or a tensor that broadcasts to it: a DTensor beside a DTensor."""
    if not is_dtensor(w) or is_dtensor(given) or not isinstance(given, Tensor):
        return given
    return dtensor_like(w, given.expand(w.shape)[block_of("a parameter", w).box])


def noise_like(w: Tensor, offset: int, key: NoiseKey) -> Tensor:
    """The noise of a parameter whose first element is `offset` in the flat parameter vector."""
    held = local_part(w)
    starts = block_of("a parameter", w).starts if is_dtensor(w) else [0]
    length = held.numel() // len(starts)
    runs = [normals(offset + start, length, key, dtype=w.dtype, device=w.device) for start in starts]
    return dtensor_like(w, torch.cat(runs)) if is_dtensor(w) else runs[0].view(w.shape)
