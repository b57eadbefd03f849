"""Numbers and named arrays as bytes and back, for files and between processes: JSON and NumPy's npz, never a pickle."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_NOT_IN_NAMES = re.compile(r"[%\x00-\x1f\x7f/\\\ud800-\udfff]|\.(?=npy\Z)")
"""What a zip archive or NumPy would change in the name of a member: np.load takes "a" for "a.npy" and the reverse."""


def write_arrays(file: IO[bytes], meta: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an npz file, whose members carry checksums.

    Args:
        file: to write to.
        meta: what JSON can hold, NaN and infinities too.
        arrays: by name; any names.

    Raises:
        TypeError: an array holds Python objects, which only a pickle could; meta that JSON can't hold.
    """
    members: dict[str, Any] = {}
    for name, array in arrays.items():
        if name in ("meta", "names", "file"):
            raise ValueError(f"an array can't be called {name!r}")
        if array.dtype.hasobject:
            raise TypeError(f"{name} holds Python objects, and only numbers and text can be written: convert it")
        members[_NOT_IN_NAMES.sub(lambda found: f"%{ord(found[0]):x};", name)] = array
    # The names again, since an archive whose list of contents is damaged may seem to be a smaller one.
    np.savez(file, meta=np.array(json.dumps(meta)), names=np.array(json.dumps(sorted(members))), **members)


def read_arrays(file: Any) -> tuple[Any, dict[str, NDArray[Any]]]:
    """What :func:`write_arrays` wrote, from a path or an open file; also what earlier versions wrote as plain npz.

    Raises:
        Exception: of many kinds: it is something else, or damaged.
    """
    with np.load(file, allow_pickle=False) as found:
        meta = json.loads(str(found["meta"]))
        members = [name for name in found.files if name not in ("meta", "names")]
        if "names" not in found.files:
            return meta, {name: found[name] for name in members}
        if sorted(members) != json.loads(str(found["names"])):
            raise ValueError("arrays are missing")
        return meta, {_name(name): found[name] for name in members}


def read_meta(file: Any) -> Any:
    """The numbers alone, without the arrays, which may be large; errors as :func:`read_arrays`."""
    with np.load(file, allow_pickle=False) as found:
        return json.loads(str(found["meta"]))


def _name(member: str) -> str:
    return re.sub(r"%([0-9a-f]+);", lambda found: chr(int(found[1], 16)), member)


# ---- values between processes ------------------------------------------------------------------------------


def to_bytes(value: Any) -> bytes:
    """A value of None, booleans, numbers, text, bytes, arrays, and lists, tuples and dictionaries of these.

    Raises:
        TypeError: something else is in it.
    """
    arrays: dict[str, NDArray[Any]] = {}
    tree = _tree(value, arrays)
    file = io.BytesIO()
    write_arrays(file, tree, arrays)
    return file.getvalue()


def from_bytes(data: bytes) -> Any:
    """What :func:`to_bytes` was given; NumPy's numbers as Python's.

    Raises:
        ValueError: the bytes are no such value.
    """
    try:
        tree, arrays = read_arrays(io.BytesIO(data))
        return _value(tree, arrays)
    except Exception as error:  # of whatever kind: it is one
        raise ValueError(f"these bytes hold no value of llc_fast: {error}") from error


def _tree(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """The value as JSON: what JSON does not know is a list that begins with its kind."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        return _tree(value.item(), arrays)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (bytes, np.ndarray)):
        name = str(len(arrays))
        arrays[name] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        return ["bytes" if isinstance(value, bytes) else "array", name]
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", *(_tree(v, arrays) for v in value)]
    if isinstance(value, Mapping):
        return ["dict", *([_tree(k, arrays), _tree(v, arrays)] for k, v in value.items())]
    raise TypeError(f"processes exchange numbers, text and arrays, got {type(value).__name__}")


def _value(tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *entries = tree
    if kind == "array":
        return arrays[entries[0]]
    if kind == "bytes":
        return arrays[entries[0]].tobytes()
    if kind == "dict":
        return {_value(k, arrays): _value(v, arrays) for k, v in entries}
    values = [_value(entry, arrays) for entry in entries]
    return {"list": list, "tuple": tuple}[kind](values)
