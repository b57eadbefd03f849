"""A store of samples on disk: Zarr v3 arrays that one thread writes while chains run, whole at any moment.

What is promised: a store that was interrupted, in whatever way, is a valid one that says so, and the run that resumes
it ends with the same files, byte by byte, as one that was never interrupted. Nothing in it depends on time, on the
number of threads or processes, or on where checkpoints were made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.support.errors import differences
from llc_fast.support.files import atomic_write, make_durable, partial_name, plain, remove_partial
from llc_fast.support.optional import require

MAX_DRAWS = 50
"""Draws of a chunk at most."""
CHUNK_BYTES = 4 * 2**20
"""What a chunk holds at most, unless one draw of one sample is larger."""
OPEN_BYTES = 32 * 2**20
"""What the chunks that are being filled hold at most, of all chains and variables, if they hold more than a draw."""
QUEUE_BYTES = 32 * 2**20
"""What waits to be written at most; a larger draw waits alone."""
DRAWS_DONE = "draws_done"
"""The array ``[chain]`` of the draws that are whole on disk."""
COMPLETED = "completed"
_DTYPES = ("float16", "float32", "float64", "int64", "int32", "uint8", "bool")
_NAN = "AAAAAAAA+H8="
"""NaN as xarray writes the attribute _FillValue: base64 of a float64."""
_WAIT = 0.05
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
COUNT_EVERY = 1.0
"""Seconds after which `DRAWS_DONE` is written again, if nobody asks for it by a sync."""


@dataclass(frozen=True)
class Variable:
    """An array of a store.

    Attributes:
        name: of the array.
        dims: names of its dimensions; of one that is written draw by draw they begin with ``chain`` and ``draw``, or
            ``chain`` and ``step``.
        shape: their sizes.
        dtype: NumPy's name for it, such as ``"float32"``.
        per_draw: whether it is written draw by draw; else in one piece.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    per_draw: bool

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ValueError(f"dims of {self.name!r} are {self.dims}, but its shape is {self.shape}: give a name each")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype of {self.name!r} is {self.dtype!r}: use one of {', '.join(_DTYPES)}")
        if self.per_draw and (self.dims[:1] != ("chain",) or self.dims[1:2] not in (("draw",), ("step",))):
            raise ValueError(f"dims of {self.name!r} must begin with chain and draw or step, got {self.dims}")
        if not self.name or self.name.startswith("_") or any(c in "/\\\0" or c.isspace() for c in self.name):
            raise ValueError(f"name must be that of a file and of a variable, got {self.name!r}")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what one draw of one chain has."""
        return self.shape[2:]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize


class SampleStore:
    """Arrays of samples, written by one thread in the background; :meth:`create` makes one, or opens it to go on.

    :meth:`write` may be called by many threads. Draws of one variable of one chain come in order; a resumed run may
    make some of them again. Processes may write to the same store at once, each the draws of its own chains: no two
    chains share a file.

    Attributes:
        path: of the folder; None: in memory.
        variables: by name.
        attributes: of the store, as JSON has them.
    """

    def __init__(self, path: Path | None, arrays: Any, variables: Sequence[Variable]) -> None:
        """Open the arrays of a store that exists; use :meth:`create`, or :meth:`join`."""
        zarr = _zarr()
        self.path, self.arrays = path, arrays
        self.variables = {variable.name: variable for variable in variables}
        self._group = zarr.open_group(arrays, mode="r+", zarr_format=3)
        self._open = {name: self._group[name] for name in (*self.variables, DRAWS_DONE)}
        self._draws_done: list[int] = [int(count) for count in self._open[DRAWS_DONE][:]]
        keys = [(v.name, c) for v in variables if v.per_draw for c in range(v.shape[0])]
        self._reached = {
            (name, chain): self._draws_done[chain] if self.variables[name].dims[1] == "draw" else 0
            for name, chain in keys
        }
        """Draws without a gap that were handed over, of each variable and chain."""
        self._written = dict(self._reached)
        """Those of them that are on disk."""
        self._buffers: dict[tuple[str, int], _Buffer] = {}
        self._locks = {chain: threading.Lock() for _, chain in keys}
        """Of the buffers of each chain: several threads may write, and others sync."""
        self._items: deque[_Item] = deque()
        self._bytes, self._is_closed = 0, False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._counted = time.monotonic()
        self._not_durable: set[Path] = set()
        self._thread = threading.Thread(target=self._work, name="llc_fast-store", daemon=True)
        self._thread.start()

    # ---- making and opening --------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None,
        variables: Sequence[Variable],
        attributes: Mapping[str, Any],
        *,
        resume: bool,
    ) -> SampleStore:
        """Make a store, or open what a run with the same variables and attributes has written so far.

        It appears with all its metadata at once, so that several processes may call this with ``resume=True``, in any
        order: one of them makes it.

        Args:
            path: of its folder, which must not exist yet, unless it is empty or resumed; None: in memory.
            variables: the arrays. Their order says nothing.
            attributes: of the store, what JSON can hold: all that names the run.
            resume: whether to go on with what is at `path`, if there is something.

        Raises:
            ModuleNotFoundError: zarr is not installed (``pip install "llc_fast[samples]"``).
            ValueError: there is something else at `path`, or a store of another run; what differs is named.
            OSError: it can't be written.
        """
        zarr = _zarr()
        attributes = _in_order(plain(attributes))
        if path is None:
            arrays = zarr.storage.MemoryStore()
            _make(arrays, variables, attributes)
            return cls(None, arrays, variables)
        place = _place(path)
        if not _exists(place):
            _make_folder(place, variables, attributes)
            if not resume:
                return cls(place, _file_store(place), variables)
        elif not resume:
            raise ValueError(f"store={str(place)!r} exists: give another path, or delete it (rm -r) to start again")
        _compare(place, variables, attributes)
        _remove_partial_files(place, variables)
        return cls(place, _file_store(place), variables)

    @classmethod
    def join(
        cls,
        path: str | os.PathLike[str],
        variables: Sequence[Variable],
        attributes: Mapping[str, Any],
        *,
        patience: float = 60.0,
    ) -> SampleStore:
        """Open a store that another process makes: wait for it so many seconds.

        Raises:
            ValueError: there is something else at `path`, or a store of another run.
            TimeoutError: it did not appear.
        """
        place, end = _place(path), time.monotonic() + patience
        while not _exists(place):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"store={str(place)!r} did not appear within {patience:g} s: rank 0 makes it, so it has failed, or "
                    "its folder is not shared between machines. Give a path that all processes see"
                )
            time.sleep(_WAIT)
        _compare(place, variables, _in_order(plain(attributes)))
        return cls(place, _file_store(place), variables)

    # ---- writing -------------------------------------------------------------------------------------------

    def write_fixed(self, name: str, values: Any) -> None:
        """Write an array that does not depend on the draw, whole, before this returns.

        Raises:
            ValueError: there is no such array, or it has another shape.
            OSError: it can't be written.
        """
        variable = self._variable(name, per_draw=False)
        found = _on_host(values, np.dtype(variable.dtype))
        _check_shape(name, found.shape, variable.shape)
        with self._in_words():
            _write_whole(self._open[name], found)

    def write(self, name: str, chain: int, draw: int, values: Tensor | NDArray[Any] | float) -> None:
        """Hand over one draw of one chain, a tensor or an array of the variable's shape without its first two axes.

        This returns before it is written; what is on a GPU is copied in the order of the current stream, which nobody
        waits for here. The tensor may be overwritten afterwards. Where `QUEUE_BYTES` wait already, this waits too.

        Raises:
            ValueError: no such variable, chain or draw; another shape.
            OSError: an earlier draw could not be written.
        """
        variable = self._variable(name, per_draw=True)
        for what, index, size in (("chain", chain, variable.shape[0]), ("draw", draw, variable.shape[1])):
            if not 0 <= index < size:
                raise ValueError(f"{what} of {name!r} must be in 0 to {size - 1}, got {index}")
        if not isinstance(values, Tensor):
            values = np.asarray(values)
        _check_shape(name, values.shape, variable.row_shape)
        self._raise()
        if self._is_closed:
            raise ValueError("this store is closed: open it again with resume=True")
        with self._locks[chain]:
            buffer = self._buffer(variable, chain, draw)
            buffer.put(draw, values)
            key = (name, chain)
            if draw == self._reached[key]:
                self._reached[key] += 1
            if draw == buffer.first + len(buffer.values) - 1:
                self._put(_Item(buffer, name, chain, self._reached[key]))
                del self._buffers[key]  # only now: waiting may be interrupted

    def draws_done(self, chain: int) -> int:
        """How many draws of a chain are on disk, whole: all variables of each of them.

        Those that another process has written since this store was opened are not seen.
        """
        return self._draws_done[chain]

    def sync(self, chain: int | None = None) -> None:
        """Return when all that was written before this call, of one chain or of all, is on disk.

        Raises:
            OSError: it can't be written.
        """
        if not self._is_closed:
            for one in self._locks if chain is None else [chain]:
                with self._locks[one]:  # its own alone: the other chains go on
                    for name in self.variables:
                        buffer = self._buffers.get((name, one))
                        if buffer is not None and buffer.is_dirty:
                            self._put(_Item(buffer.copy(), name, one, self._reached[name, one]))
                            buffer.is_dirty = False
            item = _Item(None, "", -1 if chain is None else chain)
            self._put(item)
            item.done.wait()
        self._raise()

    def add(
        self,
        name: str,
        dims: Sequence[str],
        values: Any,
        attributes: Mapping[str, Any] | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        chunks: tuple[int, ...] | None = None,
    ) -> None:
        """Make an array of what is known at the end only, and write it; one of that name is replaced.

        Args:
            name, dims, values: of it.
            attributes: of the array.
            shape: of the array, if `values` are its first corner only, and the rest is NaN.
            chunks: of the array.

        Raises:
            OSError: it can't be written.
        """
        found = _on_host(values, None)
        variable = Variable(name, tuple(dims), shape or found.shape, str(found.dtype), per_draw=False)
        options: dict[str, Any] = {} if chunks is None else {"chunks": chunks}
        with self._in_words():
            array = _make_array(self.arrays, variable, attributes or {}, overwrite=True, **options)
            _write_whole(array, found)

    def complete(self) -> None:
        """Write everything, and mark the run as completed; the only process, or the first one, does it."""
        self.sync()
        with self._in_words():
            if self._group.attrs.get(COMPLETED) != 1:
                self._group.attrs[COMPLETED] = 1

    @property
    def is_completed(self) -> bool:
        return bool(self._group.attrs.get(COMPLETED) == 1)

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self._group.attrs)

    def close(self) -> None:
        """Write everything and end the thread; again does nothing.

        Raises:
            OSError: it can't be written.
        """
        if not self._is_closed:
            try:
                self.sync()
            finally:
                with self._changed:
                    self._is_closed = True
                    self._changed.notify_all()
                self._thread.join()
                self._buffers.clear()

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # what it already fails with says more
            with contextlib.suppress(OSError):
                self.close()

    def _variable(self, name: str, per_draw: bool) -> Variable:
        variable = self.variables.get(name)
        if variable is None or variable.per_draw is not per_draw:
            known = sorted(n for n, v in self.variables.items() if v.per_draw is per_draw)
            raise ValueError(
                f"name must be a variable that is written {'draw by draw' if per_draw else 'whole'}, got {name!r}: "
                f"use one of {', '.join(known) or '(there is none)'}"
            )
        return variable

    # ---- buffers and queue ---------------------------------------------------------------------------------

    def _buffer(self, variable: Variable, chain: int, draw: int) -> _Buffer:
        """The chunk that a draw belongs to, with the draws in it that were written before."""
        key, array = (variable.name, chain), self._open[variable.name]
        rows = array.chunks[1]
        first = draw - draw % rows
        buffer = self._buffers.get(key)
        if buffer is not None and buffer.first == first:
            return buffer
        if buffer is not None and buffer.is_dirty:
            self._put(_Item(buffer, variable.name, chain, self._reached[key]))
        stop = min(first + rows, variable.shape[1])
        found = self._buffers[key] = _Buffer(first, (stop - first, *variable.row_shape), np.dtype(variable.dtype))
        if stop - first > 1 and (draw > first or first < self._reached[key]):
            self._wait()  # for what is on its way there
            found.values[:] = array[chain, first:stop]
        return found

    def _wait(self) -> None:
        with self._changed:
            while self._bytes and self._error is None:
                self._changed.wait()
        self._raise()

    def _put(self, item: _Item) -> None:
        size = item.bytes
        with self._changed:
            while self._bytes and size and self._bytes + size > QUEUE_BYTES and self._error is None:
                self._changed.wait()
            self._raise()
            if self._is_closed:
                raise ValueError("this store is closed: open it again with resume=True")
            self._bytes += size
            self._items.append(item)
            self._changed.notify_all()

    def _work(self) -> None:
        """In the thread: one item after another; after an error all that comes is dropped."""
        while True:
            with self._changed:
                while not self._items:
                    if self._is_closed:
                        return
                    self._changed.wait()
                item = self._items.popleft()
            try:
                if self._error is None:
                    self._do(item)
            except BaseException as error:  # of whatever kind: the caller hears of it
                self._error = error
            size = item.bytes
            item.done.set()
            del item  # with its memory
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()

    def _do(self, item: _Item) -> None:
        """Write a chunk, or as many as its samples are split into; and how far its chain is, now and then."""
        if item.buffer is None:
            self._make_durable()
            for chain in self._locks if item.chain < 0 else [item.chain]:
                self._count(chain)
            return
        first, values = item.buffer.first, item.buffer.when_ready()
        array = self._open[item.name]
        for part in _parts(array.chunks[2:3], array.shape[2:3]):  # one at a time, for the memory
            at: tuple[int | slice, ...] = (item.chain, slice(first, first + len(values)), *part)
            chunk = values[(slice(None), *part)]
            path = None if self.path is None else _write_chunk(self.path / item.name, array, at, chunk[None])
            if path is None:
                array[at] = chunk
            else:
                self._not_durable.add(path)
        key = (item.name, item.chain)
        self._written[key] = max(self._written[key], item.reached)
        if time.monotonic() - self._counted >= COUNT_EVERY:
            self._make_durable()
            for chain in self._locks:
                self._count(chain)

    def _make_durable(self) -> None:
        """What was written since the last time, at once: that is many times faster than one by one."""
        make_durable(self._not_durable)
        self._not_durable.clear()
        self._counted = time.monotonic()

    def _count(self, chain: int) -> None:
        reached = [
            self._written[name, chain]
            for name, variable in self.variables.items()
            if variable.per_draw and variable.dims[1] == "draw"
        ]
        if (done := min(reached, default=0)) > self._draws_done[chain]:
            self._open[DRAWS_DONE][chain] = done
            self._draws_done[chain] = done

    # ---- errors --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _failure(self.path, error) from error

    def _raise(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, OSError):
            raise _failure(self.path, self._error) from self._error
        raise RuntimeError(
            f"store={str(self.path)!r} can't be written: {type(self._error).__name__}: {self._error}. Draws after the "
            "last checkpoint are lost; the same call resumes"
        ) from self._error


@dataclass
class _Item:
    """What the thread is to do: write a chunk of a chain; with none, how far the chain is (−1: all chains).

    Attributes:
        reached: draws without a gap that are on disk once it is written.
    """

    buffer: _Buffer | None
    name: str
    chain: int
    reached: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def bytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.values.nbytes


class _Buffer:
    """A chunk of draws of one variable of one chain that is being filled, in pinned memory once one comes from a GPU.

    Attributes:
        first: draw.
        values: ``[draw, …]``, fill values where there is none.
        is_dirty: whether something in it was not handed over.
    """

    def __init__(self, first: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.first, self.is_dirty = first, False
        self.values: NDArray[Any] = np.full(shape, np.nan if dtype.kind == "f" else 0, dtype)
        self._tensor = torch.from_numpy(self.values)
        self._ready: dict[int, Any] = {}
        """Events after which copies from a GPU have been made, by stream."""

    def put(self, draw: int, values: Tensor | NDArray[Any]) -> None:
        row, self.is_dirty = draw - self.first, True
        if not isinstance(values, Tensor):
            self.values[row] = values
            return
        values = values.detach()
        if values.device.type != "cuda":
            self._tensor[row].copy_(values)
            return
        with torch.cuda.device(values.device):
            if not self._tensor.is_pinned():
                self._tensor = self._tensor.pin_memory()
                self.values = self._tensor.numpy()
            # Converted there, for fewer bytes. Its memory is used again after the copy: the stream is one.
            self._tensor[row].copy_(values.to(self._tensor.dtype), non_blocking=True)
            stream = torch.cuda.current_stream()
            ready = self._ready.setdefault(stream.cuda_stream, torch.cuda.Event())  # type: ignore[no-untyped-call]
            ready.record(stream)

    def when_ready(self) -> NDArray[Any]:
        for event in self._ready.values():
            event.synchronize()
        return self.values

    def copy(self) -> _Buffer:
        """As it is now: the chain goes on to fill this one."""
        found = object.__new__(_Buffer)
        found.first, found.is_dirty, found._ready = self.first, False, {}
        found.values = self.when_ready().copy()
        return found


def _failure(path: Path | None, error: OSError) -> OSError:
    words = error.strerror or str(error)
    return OSError(
        error.errno,
        f"store={str(path)!r} can't be written: {words}. Make room, or give a path on another disk; the same call "
        "resumes from what is there",
    )


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ValueError(f"values of {name!r} must have the shape {tuple(wanted)}, got {tuple(found)}")


def _on_host(values: Any, dtype: np.dtype[Any] | None) -> NDArray[Any]:
    if not isinstance(values, Tensor):
        return np.asarray(values, dtype)
    values = values.detach()
    if dtype is not None:
        values = values.to(getattr(torch, dtype.name))
    elif values.dtype == torch.bfloat16:
        values = values.float()
    found: NDArray[Any] = values.cpu().numpy()
    return found


def _parts(chunks: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Pieces along an axis, if there is one."""
    if not shape:
        yield ()
    else:
        for first in range(0, shape[0], chunks[0]):
            yield (slice(first, min(first + chunks[0], shape[0])),)


def _write_chunk(folder: Path, array: Any, at: Sequence[int | slice], values: NDArray[Any]) -> Path | None:
    """Write one chunk as Zarr does, byte by byte, in a third of its time; None where it is to do it itself.

    Args:
        folder: of the array.
        array: to write to, with the codecs of :func:`_make_array`.
        at: where, from the first axes on: an index of a chunk of one, or a slice from its beginning to its end.
        values: of the chunk, without what it has beyond the end of the array.
    """
    from numcodecs.zstd import Zstd

    if np.isnan(values).all() if values.dtype.kind == "f" else not values.any():
        return None  # no file at all
    if values.shape != array.chunks:
        whole = np.full(array.chunks, np.nan if values.dtype.kind == "f" else 0, values.dtype)
        whole[tuple(map(slice, values.shape))] = values
        values = whole
    starts = [index if isinstance(index, int) else index.start for index in at] + [0] * (values.ndim - len(at))
    path = folder.joinpath("c", *(str(start // size) for start, size in zip(starts, array.chunks, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    with atomic_write(path, durable=False) as file:
        file.write(Zstd(level=0, checksum=False).encode(little))
    return path


def _write_whole(array: Any, values: NDArray[Any]) -> None:
    """An array, or its first corner."""
    corner = tuple(slice(size) for size in values.shape[1:])
    for part in _parts(array.chunks[:1], values.shape[:1]):
        array[(*part, *corner)] = values[part]


# ---- Zarr --------------------------------------------------------------------------------------------------


def _zarr() -> Any:
    try:
        zarr = require("zarr", "samples")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"store= needs zarr 3, which needs Python 3.11: {error}") from None
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise ModuleNotFoundError(f'store= needs zarr 3, got {zarr.__version__}: pip install "llc_fast[samples]"')
    require("zarr.storage", "samples")
    return zarr


_FILE_STORE: list[Callable[[Path], Any]] = []


def _file_store(path: Path) -> Any:
    """Zarr's store of files, which replaces them whole, and has them on disk when it says so."""
    if not _FILE_STORE:
        import asyncio

        local = _zarr().storage.LocalStore

        class FileStore(local):  # type: ignore[misc, valid-type]
            """Its own way of writing leaves files of random names behind where a process is killed, and syncs none."""

            async def set(self, key: str, value: Any) -> None:
                await asyncio.to_thread(self.set_sync, key, value)

            async def set_if_not_exists(self, key: str, value: Any) -> None:
                if not (self.root / key).exists():
                    await self.set(key, value)

            def set_sync(self, key: str, value: Any) -> None:
                target = self.root / key
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(target) as file:
                    file.write(memoryview(value.as_numpy_array()))

        _FILE_STORE.append(FileStore)
    return _FILE_STORE[0](path)


def chunks_of(variables: Sequence[Variable]) -> dict[str, tuple[int, ...]]:
    """The shape of the chunks of each variable: one chain, at most `MAX_DRAWS` draws, and as many samples as make
    `CHUNK_BYTES`. Fewer draws where the chunks that all chains fill at once would hold more than `OPEN_BYTES`."""
    per_draw = [variable for variable in variables if variable.per_draw]
    of_a_draw = sum(variable.shape[0] * variable.row_bytes for variable in per_draw)
    draws = max(1, min(MAX_DRAWS, OPEN_BYTES // max(1, of_a_draw)))
    found = {}
    for variable in variables:
        lead = (1, min(draws, variable.shape[1])) if variable.per_draw else (1,) * (variable.dims[:1] == ("chain",))
        shape = [max(1, size) for size in variable.shape]
        rest = shape[len(lead) :]
        if rest:
            of_one = math.prod(lead) * math.prod(rest[1:]) * np.dtype(variable.dtype).itemsize
            rest[0] = max(1, min(rest[0], CHUNK_BYTES // of_one))
        found[variable.name] = (*(max(1, size) for size in lead), *rest)
    return found


def _make(arrays: Any, variables: Sequence[Variable], attributes: Mapping[str, Any]) -> None:
    """Metadata of a store and of all its arrays."""
    if len({variable.name for variable in variables}) < len(variables):
        raise ValueError("variables must have names of their own")
    _zarr().create_group(arrays, zarr_format=3, attributes=dict(attributes))
    chunks = chunks_of(variables)
    for variable in variables:
        _make_array(arrays, variable, {}, chunks=chunks[variable.name])
    num_chains = max((variable.shape[0] for variable in variables if variable.per_draw), default=0)
    _make_array(arrays, Variable(DRAWS_DONE, ("chain",), (num_chains,), "int64", per_draw=False), {}, chunks=(1,))


def _make_array(arrays: Any, variable: Variable, attributes: Mapping[str, Any], **options: Any) -> Any:
    """Metadata as xarray and devinterp 2 write them."""
    zarr = _zarr()
    codecs = require("zarr.codecs", "samples")
    dtype = np.dtype(variable.dtype)
    is_float = dtype.kind == "f"
    options.setdefault("chunks", chunks_of([variable])[variable.name])
    return zarr.create_array(
        store=arrays,
        name=variable.name,
        shape=variable.shape,
        dtype=dtype,
        serializer=codecs.BytesCodec(),
        compressors=[codecs.ZstdCodec(level=0, checksum=False)],
        filters=None,
        fill_value=dtype.type(np.nan) if is_float else dtype.type(0),
        attributes={"_FillValue": _NAN, **attributes} if is_float else dict(attributes),
        dimension_names=variable.dims,
        zarr_format=3,
        **options,
    )


# ---- folders -----------------------------------------------------------------------------------------------


def _place(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"store must be the path of a folder, or None, got {type(path).__name__}")
    place = Path(os.path.realpath(os.fsdecode(path)))  # the program may change its folder
    if not place.parent.is_dir():
        raise ValueError(f"store={os.fspath(path)!r}: the folder {place.parent} does not exist: make it first")
    if place.exists() and not place.is_dir():
        raise ValueError(f"store={os.fspath(path)!r} is a file: give the name of a folder, such as run.zarr")
    return place


def _exists(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def _make_folder(place: Path, variables: Sequence[Variable], attributes: Mapping[str, Any]) -> None:
    """A store with nothing in it, made beside and renamed; nothing if another process is faster."""
    try:
        _remove_partial_folders(place)
        descriptor, partial = _partial_folder(place)
        try:
            _make(_file_store(partial), variables, attributes)
            try:
                os.rename(partial, place)  # an empty folder is replaced; one with something in it is not
            except OSError:
                if not _exists(place):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(descriptor)
    except OSError as error:
        raise _failure(place, error) from error


def _partial_folder(place: Path) -> tuple[int, Path]:
    """A new folder beside `place`, locked: its descriptor, and its path."""
    while True:
        partial = place.with_name(partial_name(place))
        partial.mkdir()
        try:
            descriptor = os.open(partial, _FOLDER)
        except FileNotFoundError:  # taken for a dead process's between these lines: another name
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(partial).st_ino == os.fstat(descriptor).st_ino:
                return descriptor, partial
        except (BlockingIOError, FileNotFoundError):
            pass  # likewise
        except OSError:  # a file system without locks, where nobody takes it for a dead process's
            return descriptor, partial
        os.close(descriptor)


def _remove_partial_folders(place: Path) -> None:
    """Those that killed processes left while they made a store of this name."""
    for entry in place.parent.glob(".llc_fast-*.partial"):
        token = entry.name.removeprefix(".llc_fast-")[:16]
        if entry.name == partial_name(place, token) and entry.is_dir() and not entry.is_symlink():
            with contextlib.suppress(OSError):
                descriptor = os.open(entry, _FOLDER)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _remove_partial_files(place: Path, variables: Sequence[Variable]) -> None:
    """Those that killed processes left in the store while they wrote to it, and no living one is writing."""
    longest = max((size for variable in variables for size in variable.shape), default=1)
    for folder, _, names in os.walk(place):
        if any(name.startswith(".llc_fast-") for name in names):
            remove_partial(*(Path(folder, name) for name in ("zarr.json", "c", *map(str, range(longest + 1)))))


def _compare(place: Path, variables: Sequence[Variable], attributes: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless the store at a path is that of this very run."""
    found = read_attributes(place)
    remedy = "Give another path, or delete it (rm -r) to start again"
    if "llc_fast" not in found and "llc_fast" in attributes:
        raise ValueError(f"store={str(place)!r} was not written by llc_fast. {remedy}")
    before, now = _flat({k: v for k, v in found.items() if k != COMPLETED}), _flat(attributes)
    chunks = chunks_of(variables)
    for variable in variables:
        now[f"array {variable.name}"] = _described(variable.dims, variable.shape, variable.dtype, chunks[variable.name])
        before[f"array {variable.name}"] = _array_at(place / variable.name)
    if different := differences(before, now, _short):
        more = f"; and {len(different) - 6} more" if len(different) > 6 else ""
        raise ValueError(f"store={str(place)!r} belongs to another run: {'; '.join(different[:6])}{more}. {remedy}")


def read_attributes(place: Path, argument: str = "store") -> dict[str, Any]:
    """The attributes of a store, from its own file.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no store of Zarr's version 3.
    """
    said = f"{argument}={str(place)!r}"
    if not place.exists():
        raise FileNotFoundError(f"{said} does not exist")
    if not place.is_dir():
        raise ValueError(f"{said} is a file, and a store is a folder: give the folder that sample(store=…) wrote")
    if any((place / name).exists() for name in (".zgroup", ".zarray", ".zmetadata")):
        raise ValueError(f"{said} is a store of Zarr's version 2: only version 3 can be read. Convert it first")
    try:
        found = json.loads((place / "zarr.json").read_text())
        kind, version = found["node_type"], found["zarr_format"]
    except FileNotFoundError:
        raise ValueError(
            f"{said} is a folder without zarr.json, so no store: give what sample(store=…) wrote"
        ) from None
    except (ValueError, KeyError, TypeError, NotADirectoryError) as error:
        raise ValueError(f"{said} is damaged: its zarr.json can't be read") from error
    if kind != "group" or version != 3:
        raise ValueError(f"{said} is a Zarr {kind} of version {version}, and a store is a group of version 3")
    attributes: dict[str, Any] = found.get("attributes") or {}
    return attributes


def _array_at(folder: Path) -> Any:
    try:
        found = json.loads((folder / "zarr.json").read_text())
        chunks = found["chunk_grid"]["configuration"]["chunk_shape"]
        return _described(found["dimension_names"], found["shape"], found["data_type"], chunks)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _described(dims: Sequence[str], shape: Sequence[int], dtype: str, chunks: Sequence[int]) -> str:
    sizes = ", ".join(f"{dim} {size}" for dim, size in zip(dims, shape, strict=True))
    return f"{dtype}[{sizes}] in chunks of {'×'.join(map(str, chunks))}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with names such as ``llc_fast.settings.lr``."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, entry in value.items():
        found |= _flat(entry, f"{prefix}.{name}" if prefix else str(name))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _in_order(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _in_order(value[name]) for name in sorted(value)}
    return [_in_order(entry) for entry in value] if isinstance(value, list) else value
