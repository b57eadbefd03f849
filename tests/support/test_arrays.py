"""Named arrays and values as bytes: what goes in comes out, whatever its name, and nothing is ever unpickled."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
import pytest

from llc_fast.support.arrays import from_bytes, read_arrays, read_meta, to_bytes, write_arrays

NAMES = ["a", "a.npy", "a.npy.npy", ".npy", "", "a/b", "../a", "/a", "a\\b", "a\0b", "%", "%2f;", "λ̂ / 1", "\ud800"]


def test_any_name_round_trips() -> None:
    """Names that zip, NumPy or a file system would take for another one."""
    file, arrays = io.BytesIO(), {f"x.{name}": np.full(2, k) for k, name in enumerate(NAMES)}
    write_arrays(file, {"n": math.nan, "λ": [1, None]}, arrays)
    meta, found = read_arrays(io.BytesIO(file.getvalue()))
    assert math.isnan(meta["n"]) and meta["λ"] == [1, None] and found.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
    assert read_meta(io.BytesIO(file.getvalue()))["λ"] == [1, None]


def test_numpy_alone_reads_usual_names() -> None:
    file = io.BytesIO()
    write_arrays(file, {}, {"loss_trace": np.arange(3.0), "observable.norm of w": np.zeros(1)})
    with np.load(io.BytesIO(file.getvalue()), allow_pickle=False) as found:
        assert {"loss_trace", "observable.norm of w"} <= set(found.files)


@pytest.mark.parametrize("dtype", [object, [("a", object)]])
def test_objects_are_refused(dtype: Any) -> None:
    """When they are written, not when somebody wants to read them."""
    with pytest.raises(TypeError, match="observable holds Python objects"):
        write_arrays(io.BytesIO(), {}, {"observable": np.zeros(2, dtype)})
    with pytest.raises(TypeError, match="processes exchange numbers, text and arrays, got object"):
        to_bytes([object()])


VALUES: list[Any] = [
    *(None, True, 3, -(2**70), 0.1, 5e-324, math.inf, "λ", "", b"", b"\0\x80"),
    *([], (), {}, [[]], ([1, (2,)],), {"a": {"b": [None]}, 3: (1,)}, ["list", "array", ["dict"]]),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_round_trip(value: Any) -> None:
    found = from_bytes(to_bytes(value))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan, np.inf, -0.0]),
        np.zeros((0, 3), np.float32),
        np.array(3, np.int64),
        np.array([True]),
        np.array(["λ", ""]),
        np.arange(6).reshape(2, 3).T,
        np.zeros(2, [("a", "<f4")]),
        np.arange(3, dtype=">i2"),
    ],
    ids=lambda a: f"{a.dtype} {a.shape}",
)
def test_arrays_round_trip(array: Any) -> None:
    """Bit for bit, with dtype and shape."""
    found = from_bytes(to_bytes({"x": [array, array]}))["x"][1]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_numpys_numbers_are_numbers() -> None:
    assert from_bytes(to_bytes([np.float64(0.1), np.int64(3), np.bool_(True)])) == [0.1, 3, True]


def test_garbage_is_a_value_error() -> None:
    whole = to_bytes({"x": np.arange(100)})
    evil = io.BytesIO()
    np.savez(evil, meta=np.array('["array", "0"]'), names=np.array('["0"]'), **{"0": np.array([print], object)})
    for data in (b"", b"garbage", pickle.dumps(print), whole[:-30], whole[:100], evil.getvalue()):
        with pytest.raises(ValueError, match="no value of llc_fast"):
            from_bytes(data)
