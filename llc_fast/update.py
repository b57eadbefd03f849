"""The one door to the native module: checks tensors, lays them out as segments, runs the fused step.

Nothing else in the package touches an address. A step over a set of tensors reads each gradient where autograd
left it, makes its noise in registers and writes each parameter once, in one native call for all tensors and
chains (see ``csrc/step.h``). Devices without a native backend run :mod:`llc_fast.reference`, and say so once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llc_fast import _native, reference
from llc_fast.reference import NoiseKey, StepScalars

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@functools.cache
def native_info() -> dict[str, object]:
    """What the native module was built with and runs with: instruction set, OpenMP, CUDA, architectures."""
    return dict(_native.info())


@functools.cache
def has_native_backend(device_type: str) -> bool:
    """Whether steps on this kind of device run in the native module; warns, once, if they do not."""
    info = native_info()
    if device_type == "cpu" or (device_type == "cuda" and info["cuda"] is not None and torch.version.cuda):
        return True
    reason = info.get("no_cuda_reason", "") if device_type == "cuda" else ""
    warnings.warn(
        f"llc_fast has no native update for device type {device_type!r} in this build; it uses plain PyTorch "
        f"there, which is several times slower. {reason}".strip(),
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` is a dense float32 or float64 tensor that holds data."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; only dense tensors can be sampled: use .to_dense()")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no data: materialize the model first")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; supported are float32 and float64: convert the model")


class SegmentTable:
    """The tensors that one step updates, laid out for the native kernel; build once, step many times.

    Args:
        params: updated in place; tensor k holds chain 0, chain c lies ``c * chain_stride`` elements behind.
        offsets: index of each tensor's first element in the flat parameter vector; names its noise, so that
            the noise of an element does not depend on how the vector is split into tensors.
        anchors: w* of each tensor, shared by all chains; None where neither localization nor box is used.
        masks: per tensor None or a boolean tensor of its shape; elements where it is False never move.
        num_chains: rows that one step updates.
        chain_stride: elements from a chain to the next in `params` (not used with one chain).

    Raises:
        TypeError, ValueError: integer, complex, sparse or meta tensors, mixed devices or dtypes, shapes that
            do not match.
    """

    _GRAD, _GRAD_STRIDE = 4, 5

    def __init__(
        self,
        params: Sequence[Tensor],
        offsets: Sequence[int],
        anchors: Sequence[Tensor | None],
        masks: Sequence[Tensor | None] | None = None,
        *,
        num_chains: int = 1,
        chain_stride: int = 0,
    ) -> None:
        if not params:
            raise ValueError("params is empty: nothing to update")
        for k, param in enumerate(params):
            check_tensor(f"parameter {k}", param)
        masks = masks if masks is not None else [None] * len(params)
        order = sorted(range(len(params)), key=lambda k: offsets[k])
        self._params = [params[k] for k in order]
        self._order = order
        self._offsets = [offsets[k] for k in order]
        self._anchors = [anchors[k] for k in order]
        self._masks = [self._prepare_mask(params[k], masks[k]) for k in order]
        self._num_chains, self._chain_stride = num_chains, chain_stride
        self.device, self.dtype = params[0].device, params[0].dtype
        self._check()
        # Only dense rows can be segments: anything else is stepped in a contiguous copy.
        self._work = [
            p if p.is_contiguous() else torch.empty_like(p, memory_format=torch.contiguous_format) for p in self._params
        ]
        self._native = has_native_backend(self.device.type)
        if self._native:
            self._build_rows()

    @staticmethod
    def _prepare_mask(param: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a mask must be a tensor of dtype torch.bool, got {kind}")
        try:
            return mask.to(param.device).expand(param.shape).contiguous()
        except RuntimeError as error:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not fit its parameter of shape {tuple(param.shape)}"
            ) from error

    def _check(self) -> None:
        for k, (param, anchor) in enumerate(zip(self._params, self._anchors, strict=True)):
            if param.device != self.device or param.dtype != self.dtype:
                raise ValueError(
                    f"parameter {self._order[k]} is {param.dtype} on {param.device}, others are {self.dtype} on "
                    f"{self.device}: one step needs one dtype and one device (use a parameter group for each)"
                )
            if anchor is not None and (anchor.shape, anchor.dtype, anchor.device) != (
                param.shape,
                param.dtype,
                param.device,
            ):
                raise ValueError(
                    f"the anchor of parameter {self._order[k]} is {anchor.dtype} {tuple(anchor.shape)} on "
                    f"{anchor.device}, the parameter {param.dtype} {tuple(param.shape)} on {param.device}"
                )

    def _build_rows(self) -> None:
        rows = []
        self._dense_anchors = [None if a is None else a.detach().contiguous() for a in self._anchors]
        for work, offset, anchor, mask in zip(self._work, self._offsets, self._dense_anchors, self._masks, strict=True):
            address = work.data_ptr()
            rows.append(
                [
                    offset,
                    work.numel(),
                    address,
                    self._chain_stride,
                    0,
                    0,
                    address if anchor is None else anchor.data_ptr(),
                    self._chain_stride if anchor is None else 0,
                    0 if mask is None else mask.data_ptr(),
                ]
            )
        self._rows = np.array(rows, dtype=np.int64)
        self._begin = self._offsets[0]
        self._end = max(o + p.numel() for o, p in zip(self._offsets, self._params, strict=True))
        self._device_rows: Tensor | None = None
        self._grad_key: tuple[list[int], list[int]] = ([], [])

    def _gradients(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in table order, checked and contiguous."""
        dense = []
        for k, param in zip(self._order, self._params, strict=True):
            grad = grads[k]
            if grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of parameter {k} has layout {grad.layout}; only dense gradients can be used: "
                    "build the embedding with sparse=False"
                )
            if grad.dtype != self.dtype or grad.device != self.device:
                raise TypeError(
                    f"the gradient of parameter {k} is {grad.dtype} on {grad.device}, the parameter {self.dtype} on "
                    f"{self.device}"
                )
            if grad.numel() not in (param.numel(), param.numel() * self._num_chains):
                raise ValueError(
                    f"the gradient of parameter {k} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}"
                )
            dense.append(grad if grad.is_contiguous() else grad.contiguous())
        return dense

    def step(self, grads: Sequence[Tensor], scalars: StepScalars, key: NoiseKey) -> None:
        """Update all tensors of all chains in place.

        Args:
            grads: gradient of the mean minibatch loss for each tensor, in the order of `params`: of the
                parameter's shape (shared by the chains) or with a leading dimension ``num_chains``.
            scalars: hyperparameters.
            key: names the noise; chain c of the table uses ``key.chain + c``.

        Raises:
            TypeError, ValueError: a gradient that is sparse, of another dtype, device or size.
        """
        gradients = self._gradients(grads)
        copies = [(w, p) for w, p in zip(self._work, self._params, strict=True) if w is not p]
        for work, param in copies:
            work.copy_(param)
        if self._native:
            self._native_step(gradients, scalars, key)
        else:
            self._reference_step(gradients, scalars, key)
        for work, param in copies:
            param.copy_(work)

    def _native_step(self, grads: list[Tensor], scalars: StepScalars, key: NoiseKey) -> None:
        addresses = [g.data_ptr() for g in grads]
        if addresses != self._grad_key[0]:
            strides = [p.numel() if g.numel() != p.numel() else 0 for g, p in zip(grads, self._params, strict=True)]
            self._rows[:, self._GRAD] = addresses
            self._rows[:, self._GRAD_STRIDE] = strides
            self._grad_key = (addresses, strides)
            self._device_rows = None
        stream: int | None = None
        rows = self._rows.ctypes.data
        if self.device.type == "cuda":
            if self._device_rows is None:
                self._device_rows = torch.from_numpy(self._rows.copy()).to(self.device)
            rows = self._device_rows.data_ptr()
            stream = torch.cuda.current_stream(self.device).cuda_stream
        with _device_guard(self.device):
            _native.step(
                _DTYPES[self.dtype],
                rows,
                len(self._params),
                self._begin,
                self._end,
                self._num_chains,
                *scalars,
                key.seed,
                key.step,
                key.chain,
                torch.get_num_threads(),
                stream,
            )

    def _reference_step(self, grads: list[Tensor], scalars: StepScalars, key: NoiseKey) -> None:
        rows = zip(self._work, grads, self._offsets, self._anchors, self._masks, strict=True)
        for work, grad, offset, anchor, mask in rows:
            n = work.numel()
            for chain in range(self._num_chains):
                w = work.as_strided((n,), (1,), work.storage_offset() + chain * self._chain_stride)
                g = grad.reshape(-1, n)[chain if grad.numel() != n else 0]
                a = w if anchor is None else anchor.reshape(-1)
                z = reference.normals(
                    offset, n, key._replace(chain=key.chain + chain), dtype=self.dtype, device=self.device
                )
                new = reference.sgld(w, g, a, z, scalars)
                w.copy_(new if mask is None else torch.where(mask.reshape(-1), new, w))


class _NoGuard:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NO_GUARD = _NoGuard()


def _device_guard(device: torch.device) -> torch.cuda.device | _NoGuard:
    """Make `device` the current CUDA device for a launch; nothing to do (and no cost) elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else _NO_GUARD


def normals(
    begin: int,
    length: int,
    key: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The noise that a step with this key gives the flat elements ``begin … begin + length − 1``.

    Returns:
        Standard normals, shape ``[length]``; equal to :func:`llc_fast.reference.normals` to rounding.

    Raises:
        ValueError: a negative `begin` or `length`, an unsupported dtype.
    """
    if begin < 0 or length < 0:
        raise ValueError(f"begin and length must not be negative, got {begin} and {length}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    device = torch.device(device)
    if not has_native_backend(device.type):
        return reference.normals(begin, length, key, dtype=dtype, device=device)
    out = torch.empty(length, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    with _device_guard(device):
        _native.normals(
            _DTYPES[dtype], out.data_ptr(), begin, length, key.seed, key.step, key.chain, key.stream, stream
        )
    return out
