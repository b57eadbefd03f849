"""Every generator that model, loss and data may draw random numbers from: seen, seeded, and left as it was."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import random
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    _Held = torch.Generator | random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator

State = list[Any]
"""The states of all generators, at one moment."""
_BLOCK = 4096
_WORDS = 624
"""Of 32 bits, of which the state of NumPy's and Python's global generators consists, and a position."""
_MAX_DEPTH, _MAX_OBJECTS, _MAX_LENGTH = 8, 20_000, 1_000
"""Where the search for generators ends: they are attributes, not samples of a data set."""


class Generators:
    """The global generators of torch, NumPy and Python, and those that the given objects hold.

    Args:
        device: whose generator of torch's belongs to them, beside the CPU's.
        holders: model, loss function and data, searched for generators in attributes, containers and closures.
    """

    def __init__(self, device: torch.device, holders: Iterable[object] = ()) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.held: list[_Held] = list(_generators_in(holders))
        """Generators of their own that the objects hold."""
        self._open: list[_Kept] = []

    def states(self) -> State:
        """The present states; to take and restore them takes about 10 µs, and 100 more if NumPy's generator is used."""
        found: State = [torch.get_rng_state(), random.getstate(), _numpys().state()]
        if self._cuda is not None:
            found.append(torch.cuda.get_rng_state(self._cuda))
        return found + [_state_of(g) for g in self.held]

    def restore(self, states: State) -> None:
        """Go back to earlier states."""
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        _numpys().restore(states[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(states[3], self._cuda)
        for generator, state in zip(self.held, states[3 + (self._cuda is not None) :], strict=True):
            _set_state(generator, state)

    def seed(self, seed: int) -> None:
        """Seed all of them, each differently."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches for every device, and takes 70 µs
        if self._cuda is not None:
            with torch.cuda.device(self._cuda):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed((seed ^ (seed >> 32)) & 0xFFFFFFFF)
        for k, generator in enumerate(self.held):
            _seed(generator, (seed + (k + 1) * 0x9E3779B97F4A7C15) & (2**63 - 1))

    def kept(self) -> contextlib.AbstractContextManager[None]:
        """Afterwards all generators are as they were before."""
        return _Kept(self)


class _NumPys:
    """The state of NumPy's global generator, which takes NumPy 50 µs to read, and as long to write.

    Nearly all of it is memory that can be copied. The rest is a normal number that may wait for its turn (`has_gauss`):
    states with one are read and written as NumPy does.
    """

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self._known: dict[bytes, Any] = {}
        self._seen: bytes | None = None
        """The memory when no number waited; if it is still the same, nothing has been drawn."""
        self._address, self._size = 0, 4 * _WORDS + ctypes.sizeof(ctypes.c_int)
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            address, state = generator.ctypes.state_address, np.random.get_state(legacy=False)["state"]
            memory = ctypes.string_at(address, self._size)
            is_key = np.array_equal(np.frombuffer(memory, np.uint32, _WORDS), state["key"])
            if is_key and int.from_bytes(memory[4 * _WORDS :], sys.byteorder) == state["pos"]:
                self._address = address

    def state(self) -> Any:
        if not self._address:
            return np.random.get_state(legacy=False)
        memory = ctypes.string_at(self._address, self._size)
        if memory == self._seen:
            return self._known[memory]
        found = np.random.get_state(legacy=False)
        self._note(memory, found)
        return found

    def restore(self, state: Any) -> None:
        if self._address:
            target = next((memory for memory, known in self._known.items() if known is state), None)
            if target is not None and ctypes.string_at(self._address, self._size) == self._seen:
                ctypes.memmove(self._address, target, self._size)
                self._seen = target
                return
        np.random.set_state(state)
        if self._address:
            self._note(ctypes.string_at(self._address, self._size), state)

    def _note(self, memory: bytes, state: Any) -> None:
        """In an order in which Ctrl-C may come at any time: what was seen is known."""
        self._seen = None
        if not (isinstance(state, tuple) or state["has_gauss"]):
            known = [(m, s) for m, s in self._known.items() if m != memory][1 - _KNOWN :]
            self._known = dict([*known, (memory, state)])
            self._seen = memory


def _numpys() -> _NumPys:
    """That of the present global generator, which the user may exchange."""
    global _found
    generator = np.random.mtrand._rand._bit_generator
    if _found is None or _found.generator is not generator:
        _found = _NumPys(generator)
    return _found


_found: _NumPys | None = None
_KNOWN = 4
"""States of NumPy's generator that are remembered: the user's, the model's, the loader's."""


class _Kept:
    """Puts states back, unless what is around it has done so already.

    A generator function that Ctrl-C stopped as it began ends when somebody collects garbage: what it keeps inside would
    come back after the run.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators, self._open = generators, generators._open
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        self._before = self._generators.states()
        self._open.append(self)

    def __exit__(self, *_: object) -> None:
        if self not in self._open:
            return
        place = self._open.index(self)
        inside = self._open[place + 1 :] if place else []  # the first one is around all threads
        self._open[place:] = [kept for kept in inside if kept._thread != self._thread]
        self._generators.restore(self._before)


def same_states(a: Any, b: Any) -> bool:
    """Whether nothing has been drawn between two states."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_states(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_states, a, b))
    return bool(a == b)


def encode(states: State) -> Tensor:
    """States as bytes, uint8, of one length for the same generators or nearly: spaces fill up."""
    text = json.dumps(_plain(states)).encode()
    size = -(-len(text) // _BLOCK) * _BLOCK
    return torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)


def decode(encoded: Tensor) -> State:
    """What :func:`encode` was given."""
    states: State = _unplain(json.loads(encoded.numpy().tobytes()))
    return states


def _plain(value: Any) -> Any:
    """A state as JSON has it; arrays, tensors and tuples keep their kind."""
    if isinstance(value, Tensor):
        return {"tensor": value.tolist()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return {"tuple": [_plain(entry) for entry in value]}
    if isinstance(value, Mapping):
        return {"mapping": {name: _plain(entry) for name, entry in value.items()}}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _unplain(value: Any) -> Any:
    if isinstance(value, list):
        return [_unplain(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=torch.uint8)
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_unplain(entry) for entry in value["tuple"])
    return {name: _unplain(entry) for name, entry in value["mapping"].items()}


def _state_of(generator: _Held) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return _bits_of(generator).state


def _bits_of(generator: np.random.Generator | np.random.BitGenerator) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def _set_state(generator: _Held, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        _bits_of(generator).state = state


def _seed(generator: _Held, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    else:
        bits = _bits_of(generator)
        bits.state = type(bits)(seed).state


@functools.cache
def _kinds() -> tuple[type, ...]:
    """The classes of generators; NumPy's are not imported before somebody looks for them."""
    return torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator


def _generators_in(holders: Iterable[object]) -> Iterator[_Held]:
    """Generators that objects hold."""
    is_global = {id(np.random.mtrand._rand), id(torch.default_generator)}
    for value in held_by(holders):
        if isinstance(value, _kinds()) and id(value) not in is_global and not isinstance(value, random.SystemRandom):
            yield cast("_Held", value)


def held_by(holders: Iterable[object]) -> Iterator[object]:
    """What objects hold, found through attributes, containers, closures and bound arguments, each once."""
    seen: set[int] = set()
    waiting: list[tuple[object, int]] = [(holder, 0) for holder in holders]
    while waiting and len(seen) < _MAX_OBJECTS:
        value, depth = waiting.pop()
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(value))
        yield value
        if not isinstance(value, _kinds()):
            waiting += [(part, depth + 1) for part in _parts(value)]


def _parts(value: object) -> Iterable[object]:
    """What an object is made of, where a generator may be."""
    if value is None or isinstance(value, (Tensor, np.ndarray, str, bytes, int, float, type, types.ModuleType)):
        return ()
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _MAX_LENGTH else ()
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value) if len(value) <= _MAX_LENGTH else ()
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        return [*cells, *(value.__defaults__ or ()), *(g for g in used if isinstance(g, (*_kinds(), nn.Module)))]
    found = list(getattr(value, "__dict__", {}).values())
    slots = (getattr(value, name, None) for kind in type(value).__mro__ for name in _slots_of(kind))
    return [*found, *slots, *(value.children() if isinstance(value, nn.Module) else ())]


def _slots_of(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that was never set
        return False
