"""The native interface: checks tensors, lays them out as segments, runs the fused step.

Nothing else in the package, but for ``gradients/matmul.py``, touches the address of a tensor's memory. A step over a
set of tensors reads each gradient where autograd left it, makes its noise in registers and writes each parameter once,
in one native call for all tensors and chains (see ``csrc/step.h``). Devices without a native backend run
:mod:`llc_fast.kernels.reference`, with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from llc_fast import _native
from llc_fast.kernels import reference
from llc_fast.kernels.memory import Watch, check_memory, is_plain, overlaps_itself, plain
from llc_fast.kernels.step import SCALARS, SEGMENT, SUMS, NoiseKey, StepScalars

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_LOW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STEP_ARGUMENTS = 21
"""Of ``_native.step``, as :meth:`SegmentTable.run` gives them."""


def check_interface(exported: Mapping[str, Any]) -> None:
    """Raise ImportError unless the compiled module has the tables, sums and rules that this package has.

    Args:
        exported: ``_native.interface()``: the layouts of ``Segment`` and ``Scalars`` as ``numpy.dtype`` takes them,
            the names of the sums, the rules and the dtypes, in the order of their numbers, and how many arguments a
            step has.
    """
    expected = {
        "Segment": SEGMENT,
        "Scalars": SCALARS,
        "sums": list(SUMS),
        "rules": list(reference.RULES),
        "dtypes": list(_DTYPES.values()),
        "low": ["", *_LOW.values()],
        "step_arguments": _STEP_ARGUMENTS,
    }
    found = dict(exported)
    found |= {name: np.dtype(found[name]) for name in ("Segment", "Scalars") if name in found}
    if different := [name for name, value in expected.items() if found.get(name) != value]:
        raise ImportError(
            f"the compiled module {getattr(_native, '__file__', '')} is of another version than this package "
            f"({', '.join(different)} differ): reinstall llc_fast"
        )


check_interface(getattr(_native, "interface", dict)())  # the oldest modules have no such function

NUM_STATES: dict[str, int] = _native.info()["rules"]  # type: ignore[assignment]
"""Tensors like w that each rule keeps between steps, by the rule's name."""
NUM_SUMS = len(SUMS)
_RULES = {name: k for k, name in enumerate(NUM_STATES)}


@functools.lru_cache
def _sum_set(names: tuple[str, ...]) -> int:
    """Sums by name as ``llc::SumSet`` has them."""
    if unknown := set(names) - set(SUMS):
        raise ValueError(f"wanted names unknown sums: {', '.join(sorted(unknown))}; choose from: {', '.join(SUMS)}")
    return sum(1 << k for k, name in enumerate(SUMS) if name in names)


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
    """Check that a tensor can be sampled.

    Raises:
        TypeError, ValueError: it is not a dense floating-point tensor that holds data.
        RuntimeError: its memory was freed.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; only dense tensors can be sampled: use .to_dense()")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no data: materialize the model first")
    if tensor.dtype not in _DTYPES and tensor.dtype not in _LOW:
        known = ", ".join(str(d).removeprefix("torch.") for d in (*_DTYPES, *_LOW))
        raise TypeError(f"{name} has dtype {tensor.dtype}; supported are {known}: convert the model")
    if type(tensor).__name__ != "DTensor":  # whose local part is checked, where it is used
        check_memory(name, tensor)


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Report to autograd writes that it can't see: a backward pass that still needs the old values then raises."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # torch 2.4 takes one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def is_low_precision(tensor: Tensor) -> bool:
    """Whether chains of this parameter keep float32 and write it a copy: steps would be lost in its own precision."""
    return tensor.dtype in _LOW


@dataclass
class Segment:
    """One tensor of a step.

    Attributes:
        w: float32 or float64, updated in place; holds chain 0, chain c lies ``c * chain_stride`` elements behind.
        offset: index of its first element in the flat parameter vector; names its noise, so that the noise of an
            element does not depend on how the vector is split into tensors. A block of a larger tensor lies in the
            vector in several runs of equal length: then the index of each run's first element.
        reference: w*, shared by all chains, in w's dtype or in that of the copy; None where neither localization nor
            box is used.
        mask: boolean, broadcasts to w's shape; elements where it is False never move.
        state: what the rule keeps, as many tensors like w as it needs, with the same chain stride.
        preconditioner: of the rule that takes one: a number, or a tensor that broadcasts to w's shape.
        copy: bfloat16 or float16 tensor that receives the new w; its gradients are then of that dtype too.
    """

    w: Tensor
    offset: int | Sequence[int]
    reference: Tensor | None = None
    mask: Tensor | None = None
    state: Sequence[Tensor] = ()
    preconditioner: Tensor | float = 1.0
    copy: Tensor | None = None

    @property
    def runs(self) -> Sequence[int]:
        """Where in the flat parameter vector its runs begin."""
        return (self.offset,) if isinstance(self.offset, int) else self.offset

    @property
    def run_length(self) -> int:
        return self.w.numel() // len(self.runs)


Gradients: TypeAlias = tuple[Sequence[Tensor], list[int]]
"""Gradients that were checked, and their addresses."""
_NO_CELLS: tuple[Tensor | None, ...] = (None, None, None, None)


class SegmentTable:
    """The tensors that one step updates, laid out for the native kernel; build once, step many times.

    It keeps addresses, and looks at every step whether they still are those of the tensors: memory that was replaced,
    moved or given other strides is laid out anew, and memory that was freed is an error.

    Args:
        rule: name of the update rule, a key of ``reference.RULES``.
        segments: the tensors; all on one device, with one dtype of w and one of the copies.
        num_chains: rows that one step updates.
        chain_stride: elements from a chain to the next (not used with one chain).

    Raises:
        TypeError, ValueError: integer, complex, sparse or meta tensors, mixed devices or dtypes, shapes that
            do not match, parameters that overlap.
        RuntimeError: memory that was freed.
    """

    def __init__(self, rule: str, segments: Sequence[Segment], *, num_chains: int = 1, chain_stride: int = 0) -> None:
        if rule not in _RULES:
            raise ValueError(f"rule={rule!r} is unknown; choose one of: {', '.join(_RULES)}")
        if not segments:
            raise ValueError("params is empty: nothing to update")
        self._rule, self._num_chains, self._chain_stride = rule, num_chains, chain_stride
        self._given = list(segments)
        self._reach = (num_chains - 1) * chain_stride
        self._lay_out()

    def _lay_out(self) -> None:
        """Build everything from the given tensors as they are now."""
        given = self._given
        for k, segment in enumerate(given):
            check_tensor(f"parameter {k}", segment.w)
        self._order = sorted(range(len(given)), key=lambda k: given[k].runs[0])
        self._in_order = self._order == list(range(len(given)))
        found = [_tensors_of(s) for s in given]
        for k, tensors in enumerate(found):
            for name, tensor in tensors:
                check_memory(f"{name} {k}", tensor)
        prepared = [_prepare(given[k], k, self._rule) for k in self._order]
        if self._num_chains > 1:
            self._check_rows(prepared)
        # Only plain rows can be segments: anything else that is written is stepped in a contiguous copy.
        self._moves: list[tuple[Tensor, Tensor]] = []
        self._segments = [
            replace(
                s,
                w=self._work(s.w),
                state=[self._work(t) for t in s.state],
                copy=None if s.copy is None else self._work(s.copy),
            )
            for s in prepared
        ]
        first = self._segments[0]
        self.device, self.dtype = first.w.device, first.w.dtype
        self._on_cpu = self.device.type == "cpu"
        self._grad_dtype = self.dtype if first.copy is None else first.copy.dtype
        self._check_uniform()
        self._has_low_reference = first.reference is not None and first.reference.dtype in _LOW
        self._numel = [s.w.numel() for s in self._segments]
        self._begin = first.runs[0]
        self._end = max(s.runs[-1] + s.run_length for s in self._segments)
        self._native = has_native_backend(self.device.type)
        if self._native:
            self._rows = self._native_rows()
            self._grad_column = self._rows["grad"]  # a view: taken once, because steps write to it
            # Bytes from a segment's gradient to that of a run; None where every segment is one run, as nearly always.
            self._grad_shifts = self._grad_column.copy() if len(self._rows) > len(given) else None
            kinds = list(_DTYPES).index(self.dtype), [self.dtype, *_LOW].index(self._grad_dtype)
            span = len(self._rows), self._begin, self._end, self._num_chains
            self._constants = (_RULES[self._rule], *kinds, int(self._has_low_reference), *span)
            self._host_address = int(self._rows.ctypes.data)
            self._device_rows: Tensor | None = None
            self._addresses: list[int] = []
            self._is_sent = False  # whether the GPU knows them
            self._scratch: Tensor | None = None
        self._tensors = [t for tensors in found for _, t in tensors]
        self._copied = [t for k, s in zip(self._order, self._segments, strict=True) for t in _copied(given[k], s)]
        self._cells = _NO_CELLS
        self._watch = Watch(self._tensors, self._copied, self._check_gradient)

    def _work(self, tensor: Tensor) -> Tensor:
        if is_plain(tensor):
            return tensor
        work = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._moves.append((work, tensor))
        return work

    def _check_rows(self, segments: list[Segment]) -> None:
        """That what is written for all chains lies in equal rows."""
        for k, s in zip(self._order, segments, strict=True):
            for tensor in (s.w, *s.state, *(() if s.copy is None else (s.copy,))):
                if not is_plain(tensor):
                    raise ValueError(f"parameter {k} of several chains is not contiguous: lay chains out in rows")
                if tensor.numel():
                    check_memory(f"a row of parameter {k}", tensor, reach=self._reach)

    def _check_uniform(self) -> None:
        for k, segment in zip(self._order, self._segments, strict=True):
            w, grad_dtype = segment.w, segment.w.dtype if segment.copy is None else segment.copy.dtype
            if w.device != self.device or w.dtype != self.dtype or grad_dtype != self._grad_dtype:
                raise ValueError(
                    f"parameter {k} is {w.dtype} ({grad_dtype} in the model) on {w.device}, others are {self.dtype} "
                    f"({self._grad_dtype}) on {self.device}: one step needs one dtype and one device"
                )
        low = [s.reference is not None and s.reference.dtype in _LOW for s in self._segments]
        if any(low) and not all(low):
            k = self._order[low.index(not low[0])]
            raise ValueError(
                f"the reference point of parameter {k} is in another precision than that of others, or missing: give "
                "all in the model's precision, or none"
            )
        if self._num_chains > 1:
            return
        written = [
            (t.data_ptr(), t.data_ptr() + t.nbytes, k)
            for k, s in zip(self._order, self._segments, strict=True)
            for t in (s.w, *s.state, *(() if s.copy is None else (s.copy,)))
            if t.numel()
        ]
        for (_, end, one), (begin, _, other) in itertools.pairwise(sorted(written)):
            if begin < end:
                raise ValueError(
                    f"what a step writes for parameters {one} and {other} shares memory, so that their steps would "
                    "overwrite each other: give each memory of its own with .clone()"
                )

    def _native_rows(self) -> np.ndarray:
        """The native table: a row for each run of each segment, its `grad` in bytes from where the gradient starts."""
        segments = self._segments
        rows = np.zeros(len(segments), SEGMENT)
        rows["offset"] = [s.runs[0] for s in segments]
        rows["length"] = [s.run_length for s in segments]
        rows["stride"] = self._chain_stride
        rows["w"] = [s.w.data_ptr() for s in segments]
        rows["reference"] = [_address(s.w if s.reference is None else s.reference) for s in segments]
        rows["reference_stride"] = [self._chain_stride if s.reference is None else 0 for s in segments]
        rows["mask"] = [_address(s.mask) for s in segments]
        for j in range(NUM_STATES[self._rule]):
            rows["state"][:, j] = [s.state[j].data_ptr() for s in segments]
        given = [s.preconditioner for s in segments]
        rows["preconditioner"] = [_address(p) for p in given]
        rows["preconditioner_scale"] = [1.0 if isinstance(p, Tensor) else p for p in given]
        rows["copy"] = [_address(s.copy) for s in segments]
        if all(isinstance(s.offset, int) for s in segments):
            return rows

        counts = [len(s.runs) for s in segments]
        rows = np.repeat(rows, counts)
        rows["offset"] = np.concatenate([s.runs for s in segments])
        first_element = np.concatenate([np.arange(count) for count in counts]) * rows["length"]
        wide, low = self.dtype.itemsize, self._grad_dtype.itemsize
        rows["grad"] = first_element * low
        fields = [rows["w"], rows["preconditioner"], *rows["state"].T]
        others = [(rows["reference"], low if self._has_low_reference else wide), (rows["mask"], 1), (rows["copy"], low)]
        for addresses, size in [*((field, wide) for field in fields), *others]:
            addresses += np.where(addresses, first_element * size, 0)
        return rows

    def step(
        self,
        grads: Sequence[Tensor],
        scalars: StepScalars,
        key: NoiseKey,
        *,
        thermostat: Tensor | None = None,
        sums: Tensor | None = None,
        wanted: Sequence[str] | None = None,
        device_scalars: Tensor | None = None,
        device_step: Tensor | None = None,
    ) -> None:
        """Update all tensors of all chains in place.

        Args:
            grads: gradient of the mean minibatch loss for each segment, in the order given: of w's shape (shared by
                the chains) or with a leading dimension ``num_chains``; in the model's precision.
            scalars: hyperparameters.
            key: names the noise; chain c of the table uses ``key.chain + c``.
            thermostat: float64, one value for each chain, read by SGNHT.
            sums: float64 ``[num_chains, len(SUMS)]``, overwritten with the sums named in ``SUMS``. Their bits depend
                neither on the number of threads nor on the other sums that are wanted. None: no sums.
            wanted: names of the sums that are needed; the others are 0. None: all.
            device_scalars, device_step: on a CUDA device, the scalars (float64) and the step (int64) to read when the
                kernel runs, instead of those given here: a captured CUDA graph then follows them.

        Raises:
            TypeError, ValueError: a gradient that is sparse, of another dtype, device or shape; an unknown sum; a
                thermostat, sums or device scalars of another dtype, device or size.
            RuntimeError: memory that was freed.
        """
        wanted = SUMS if wanted is None else wanted
        cells = self._cells
        if not (thermostat is cells[0] and sums is cells[1] and device_scalars is cells[2] and device_step is cells[3]):
            self.check_cells(thermostat, sums, device_scalars, device_step)
        gradients = self.checked(grads)
        if gradients is None:
            self._lay_out()
            self.check_cells(thermostat, sums, device_scalars, device_step)
            gradients = self.checked(grads)
            assert gradients is not None  # nothing has run since
        self.run(gradients, scalars, key, thermostat, sums, wanted, device_scalars, device_step)

    def run(
        self,
        gradients: Gradients,
        scalars: StepScalars,
        key: NoiseKey,
        thermostat: Tensor | None = None,
        sums: Tensor | None = None,
        wanted: Sequence[str] = (),
        device_scalars: Tensor | None = None,
        device_step: Tensor | None = None,
    ) -> None:
        """The second half of :meth:`step`, for whoever has done the first: check_cells and checked.

        Only for memory that was checked after whatever ran last: nothing is checked here.
        """
        if sums is not None and not wanted:
            sums.zero_()
            sums = None
        for work, original in self._moves:
            work.copy_(original)
        if self._native:
            self._native_step(gradients, scalars, key, thermostat, sums, wanted, device_scalars, device_step)
        else:
            self._reference_step(gradients[0], scalars, key, thermostat, sums, wanted)
        for work, original in self._moves:
            original.copy_(work)

    def checked(self, grads: Sequence[Tensor]) -> Gradients | None:
        """The gradients in table order, checked and plain, for :meth:`run`; None if the table's tensors have changed.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`step`.
        """
        if len(grads) != len(self._order):
            raise ValueError(f"grads holds {len(grads)} tensors for {len(self._order)} parameters: give one for each")
        return self._watch.look(grads if self._in_order else [grads[k] for k in self._order])

    def _check_gradient(self, place: int, grad: Tensor) -> None:
        k, w = self._order[place], self._segments[place].w
        name = f"the gradient of parameter {k}"
        if not isinstance(grad, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(grad).__name__}")
        if grad.dtype != self._grad_dtype or grad.device != self.device:
            raise TypeError(
                f"{name} is {grad.dtype} on {grad.device}, the parameter {self._grad_dtype} on {self.device}"
            )
        if grad.layout != torch.strided:
            raise TypeError(
                f"{name} has layout {grad.layout}; only dense gradients can be used: build the embedding with "
                "sparse=False"
            )
        if grad.shape != w.shape and grad.shape != (self._num_chains, *w.shape):
            raise ValueError(
                f"{name} has shape {tuple(grad.shape)}, the parameter {tuple(w.shape)}: run backward again, or set "
                "it to None"
            )
        check_memory(name, grad)

    def check_cells(
        self,
        thermostat: Tensor | None = None,
        sums: Tensor | None = None,
        device_scalars: Tensor | None = None,
        device_step: Tensor | None = None,
    ) -> None:
        """Check the small tensors that a step is given beside gradients; :meth:`checked` watches them from then on.

        Raises:
            TypeError, ValueError, RuntimeError: another dtype, device or size; memory that was freed.
        """
        cells = (thermostat, sums, device_scalars, device_step)
        if all(map(operator.is_, cells, self._cells)):  # of the step before, and watched since
            return
        self._cells = _NO_CELLS
        sizes = (self._num_chains, self._num_chains * NUM_SUMS, len(StepScalars._fields), 1)
        for name, tensor, size in zip(("thermostat", "sums", "device_scalars", "step"), cells, sizes, strict=True):
            if tensor is not None:
                self._check_cell(name, tensor, torch.int64 if name == "step" else torch.float64, size)
        self._watch = Watch([*self._tensors, *(t for t in cells if t is not None)], self._copied, self._check_gradient)
        self._cells = cells

    def _check_cell(self, name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype is not dtype or tensor.numel() != numel or tensor.device != self.device:
            raise TypeError(
                f"{name} must be {numel} numbers of {dtype} on {self.device}, got {tensor.numel()} of {tensor.dtype} "
                f"on {tensor.device}"
            )
        if not is_plain(tensor):
            raise TypeError(f"{name} must be contiguous: give it .contiguous()")
        check_memory(name, tensor)

    def _native_step(
        self,
        gradients: Gradients,
        scalars: StepScalars,
        key: NoiseKey,
        thermostat: Tensor | None,
        sums: Tensor | None,
        wanted: Sequence[str],
        device_scalars: Tensor | None,
        device_step: Tensor | None,
    ) -> None:
        grads, addresses = gradients
        if addresses != self._addresses:
            self._grad_column[:] = self._by_run(addresses)
            if self._grad_shifts is not None:
                self._grad_column += self._grad_shifts
            if self._num_chains > 1:
                strides = [0 if g.numel() == n else n for g, n in zip(grads, self._numel, strict=True)]
                self._rows["grad_stride"] = self._by_run(strides)
            self._addresses, self._is_sent = addresses, False
        table = self._host_address if self._on_cpu else self._device_address()
        arguments = (
            *self._constants,
            table,
            scalars,
            key.seed,
            key.step,
            key.chain,
            None if thermostat is None else thermostat.data_ptr(),
            0 if sums is None else _sum_set(tuple(wanted)),
            None if sums is None else sums.data_ptr(),
            None if sums is None else self._scratch_address(),
            None if device_scalars is None else device_scalars.data_ptr(),
            None if device_step is None else device_step.data_ptr(),
            torch.get_num_threads(),
        )
        if self._on_cpu:
            _native.step(*arguments, None)
        else:
            with torch.cuda.device(self.device):
                _native.step(*arguments, torch.cuda.current_stream(self.device).cuda_stream)

    def _by_run(self, values: list[int]) -> list[int] | np.ndarray:
        """A value for each segment as one for each native row."""
        return values if self._grad_shifts is None else np.repeat(values, [len(s.runs) for s in self._segments])

    def _device_address(self) -> int:
        if self._device_rows is None:
            self._device_rows = torch.empty(self._rows.nbytes, dtype=torch.uint8, device=self.device)
        if not self._is_sent and not torch.cuda.is_current_stream_capturing():
            self.send_addresses()
        return self._device_rows.data_ptr()

    @property
    def is_sent(self) -> bool:
        """Whether the GPU knows where the gradients of the last step are: not if that was captured in a CUDA graph."""
        return self._on_cpu or not self._native or self._is_sent

    def send_addresses(self) -> None:
        """Send the GPU the addresses of the last step's gradients: after capturing it, before the graph's replay."""
        assert self._device_rows is not None
        # A copy, because the host may write to its rows before the GPU has read them. In pinned memory, or the host
        # would wait until the GPU has done all that it was given before.
        rows = torch.from_numpy(self._rows.view(np.uint8)).pin_memory()
        self._device_rows.copy_(rows, non_blocking=True)
        self._is_sent = True

    def _scratch_address(self) -> int | None:
        """Where a GPU leaves partial sums: allocated once, when sums are first wanted."""
        if self._on_cpu:
            return None
        if self._scratch is None:
            size = _native.scratch_size(self._begin, self._end, self._num_chains)
            self._scratch = torch.empty(size, dtype=torch.float64, device=self.device)
        return self._scratch.data_ptr()

    @torch.no_grad()  # a gradient may have a graph itself
    def _reference_step(
        self,
        grads: Sequence[Tensor],
        scalars: StepScalars,
        key: NoiseKey,
        thermostat: Tensor | None,
        sums: Tensor | None,
        wanted: Sequence[str],
    ) -> None:
        columns = [k for k, name in enumerate(SUMS) if name in wanted]
        if sums is not None:
            sums.zero_()
        for s, grad, n in zip(self._segments, grads, self._numel, strict=True):
            for chain in range(self._num_chains):
                w, *state = (_row_of(t, chain * self._chain_stride, n) for t in (s.w, *s.state))
                mask = slice(None) if s.mask is None else s.mask.reshape(-1)
                noise_key = key._replace(chain=key.chain + chain)
                z = torch.cat(
                    [
                        reference.normals(run, s.run_length, noise_key, dtype=self.dtype, device=self.device)
                        for run in s.runs
                    ]
                )
                given = s.preconditioner
                x = reference.Coordinates(
                    w=w[mask].clone(),
                    grad=grad.reshape(-1, n)[chain if grad.numel() != n else 0].to(self.dtype)[mask],
                    reference=(w if s.reference is None else s.reference.reshape(-1).to(self.dtype))[mask],
                    noise=z[mask] * (scalars.noise_level != 0),
                    state=[t[mask].clone() for t in state],
                    preconditioner=given.reshape(-1)[mask] if isinstance(given, Tensor) else given,
                    thermostat=0.0 if thermostat is None else thermostat[chain].to(self.dtype),
                )
                terms = reference.apply(self._rule, x, scalars, key.step)
                w[mask] = x.w
                for row, new in zip(state, x.state, strict=True):
                    row[mask] = new
                if sums is not None:
                    sums[chain, columns] += terms[columns]
                if s.copy is not None:
                    _row_of(s.copy, chain * self._chain_stride, n).copy_(w)


def _address(value: object) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else 0


def _row_of(tensor: Tensor, start: int, length: int) -> Tensor:
    return tensor.as_strided((length,), (1,), tensor.storage_offset() + start)


def _tensors_of(segment: Segment) -> list[tuple[str, Tensor]]:
    """All tensors of a segment, and what they are."""
    named: list[tuple[str, Any]] = [
        ("parameter", segment.w),
        ("reference point", segment.reference),
        ("mask", segment.mask),
        ("preconditioner", segment.preconditioner),
        ("low-precision copy", segment.copy),
        *(("state of parameter", t) for t in segment.state),
    ]
    return [(name, t) for name, t in named if isinstance(t, Tensor)]


def _copied(given: Segment, prepared: Segment) -> list[Tensor]:
    """Tensors of which a table reads a copy: what is written to them later does not show there."""
    pairs = (
        (given.reference, prepared.reference),
        (given.mask, prepared.mask),
        (given.preconditioner, prepared.preconditioner),
    )
    return [
        t for t, read in pairs if isinstance(t, Tensor) and isinstance(read, Tensor) and t.data_ptr() != read.data_ptr()
    ]


def _broadcast(name: str, tensor: Tensor, w: Tensor) -> Tensor:
    try:
        return plain(tensor.to(w.device).expand(w.shape))
    except RuntimeError as error:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not fit its parameter of shape {tuple(w.shape)}"
        ) from error


def _prepare(segment: Segment, k: int, rule: str) -> Segment:
    """The segment with its tensors checked, and what is only read broadcast and plain."""
    w, w_star, mask, given, copy = segment.w, segment.reference, segment.mask, segment.preconditioner, segment.copy
    if w.dtype not in _DTYPES:
        raise TypeError(f"parameter {k} has dtype {w.dtype}; chains are kept in float32 or float64")
    if segment.run_length * len(segment.runs) != w.numel():
        raise ValueError(f"parameter {k} has {w.numel()} elements, which are not {len(segment.runs)} equal runs")
    for name, like in [("reference point", w_star), *(("state", t) for t in segment.state)]:
        dtypes = (w.dtype, copy.dtype) if copy is not None and name == "reference point" else (w.dtype,)
        if like is not None and ((like.shape, like.device) != (w.shape, w.device) or like.dtype not in dtypes):
            raise ValueError(
                f"the {name} of parameter {k} is {like.dtype} {tuple(like.shape)} on {like.device}, the parameter "
                f"{w.dtype} {tuple(w.shape)} on {w.device}"
            )
    if copy is not None and (copy.dtype not in _LOW or (copy.shape, copy.device) != (w.shape, w.device)):
        raise ValueError(
            f"parameter {k} is {copy.dtype} {tuple(copy.shape)} on {copy.device}, its float32 chain {tuple(w.shape)} "
            f"on {w.device}: a chain beside the model needs a bfloat16 or float16 parameter of its shape"
        )
    if len(segment.state) != NUM_STATES[rule]:
        raise ValueError(f"rule {rule!r} keeps {NUM_STATES[rule]} states, parameter {k} has {len(segment.state)}")
    for written in (w, *segment.state, *(() if copy is None else (copy,))):
        if overlaps_itself(written):
            raise ValueError(
                f"parameter {k}, or what is kept for it, has elements that share memory (shape {tuple(written.shape)}, "
                f"strides {written.stride()}): give it memory of its own with .clone()"
            )
    if mask is not None:
        check_mask("a mask", mask)
        mask = _broadcast("a mask", mask, w)
    if isinstance(given, Tensor):
        given = _broadcast("a preconditioner", given.detach().to(w.dtype), w)
    return replace(
        segment,
        w=w.detach(),
        reference=None if w_star is None else plain(w_star.detach()),
        mask=mask,
        state=[t.detach() for t in segment.state],
        preconditioner=given,
        copy=None if copy is None else copy.detach(),
    )


def check_mask(name: str, mask: object) -> None:
    """Raise TypeError unless this is a boolean tensor."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a tensor of dtype torch.bool, got {kind}: convert it, as with torch.as_tensor")


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
        Standard normals, shape ``[length]``; equal to :func:`llc_fast.kernels.reference.normals` to rounding.

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
    check_memory("the noise", out)  # a fake tensor, inside FakeTensorMode
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    with torch.cuda.device(device) if stream is not None else contextlib.nullcontext():
        _native.normals(
            _DTYPES[dtype], out.data_ptr(), begin, length, key.seed, key.step, key.chain, key.stream, stream
        )
    return out


def minibatch_indices(num_samples: int, key: NoiseKey, out: Tensor, *, device_step: Tensor | None = None) -> Tensor:
    """Which samples chains see at step ``key.step``; a pure function of the key, see ``csrc/minibatch.h``.

    Within an epoch of n // batch_size steps a chain sees no sample twice, and each epoch has an order of its own.

    Args:
        num_samples: n.
        key: names the order of the samples; row c of `out` uses ``key.chain + c``.
        out: int64 ``[num_chains, batch_size]``, contiguous, overwritten; batch_size at most n.
        device_step: on a CUDA device, the step (int64) to read when the kernel runs, instead of ``key.step``.

    Returns:
        `out`; equal to :func:`llc_fast.kernels.reference.minibatch_indices`.
    """
    num_chains, batch_size = out.shape
    if out.dtype != torch.int64 or not out.is_contiguous() or not 1 <= batch_size <= num_samples:
        raise ValueError(f"out must be contiguous int64 [num_chains, batch_size ≤ {num_samples}], got {out.dtype} "
                         f"{tuple(out.shape)}")  # fmt: skip
    # At every step of every chain, so the usual case first.
    if type(out) is not Tensor or out.untyped_storage().nbytes() < 8 * (out.storage_offset() + out.numel()):
        check_memory("out", out)
    if not has_native_backend(out.device.type):
        return out.copy_(reference.minibatch_indices(num_samples, batch_size, num_chains, key))
    stream = torch.cuda.current_stream(out.device).cuda_stream if out.device.type == "cuda" else None
    with torch.cuda.device(out.device) if stream is not None else contextlib.nullcontext():
        _native.minibatch(
            out.data_ptr(),
            num_samples,
            batch_size,
            num_chains,
            key.seed,
            key.step,
            key.chain,
            None if device_step is None else device_step.data_ptr(),
            stream,
        )
    return out
