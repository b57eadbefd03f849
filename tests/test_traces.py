"""What chains leave behind, stacked, cut and stored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llc_fast.traces import Traces


def _traces() -> Traces:
    """Three chains from the fifth on, stopped at step 4 of 6."""
    rng = np.random.default_rng(0)
    steps = {name: rng.standard_normal((3, 6)) for name in ("loss", "bias")}
    for values in steps.values():
        values[:, 4:] = np.nan
    draws = {"a.b": rng.standard_normal((3, 2, 5)), "empty": np.zeros((3, 2, 0))}
    state = {"w": rng.standard_normal((3, 7)).astype(np.float32), "generator": rng.integers(0, 255, (3, 9), np.uint8)}
    return Traces(5, 4, steps, draws, rng.standard_normal((3, 1, 2)), state, {"0.weight": rng.standard_normal((3, 2))})


def _arrays(traces: Traces) -> dict[str, NDArray[Any]]:
    """All of them, by group and name."""
    groups = {"steps": traces.steps, "draws": traces.draws, "checks": {"": traces.checks}}
    groups |= {"state": traces.state or {}, "ends": traces.ends or {}}
    return {f"{group} {name}": a for group, arrays in groups.items() for name, a in arrays.items()}


def _assert_equal(found: Traces, expected: Traces) -> None:
    assert (found.chains, found.step) == (expected.chains, expected.step)
    assert (found.state is None, found.ends is None) == (expected.state is None, expected.ends is None)
    a, b = _arrays(found), _arrays(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_blank_traces() -> None:
    traces = Traces.blank(range(2, 5), 6, ["bias"], (4, 7))
    assert (traces.chains, traces.step, traces.state, traces.ends, traces.draws) == (range(2, 5), 0, None, None, {})
    assert {name: a.shape for name, a in traces.steps.items()} == {"loss": (3, 6), "bias": (3, 6)}
    assert traces.checks.shape == (3, 4, 7)
    assert all(np.isnan(a).all() for a in _arrays(traces).values())


def test_rows_are_views_that_stack_to_the_whole() -> None:
    traces = _traces()
    rows = [traces.row(chain) for chain in traces.chains]
    for k, row in enumerate(rows):
        assert row.chains == range(5 + k, 6 + k)
        for name, a in _arrays(row).items():
            np.testing.assert_array_equal(a, _arrays(traces)[name][k : k + 1])
            assert a.size == 0 or np.shares_memory(a, _arrays(traces)[name])
    _assert_equal(Traces.stack(rows), traces)


def test_copies_stay_as_they_were() -> None:
    traces, expected = _traces(), _traces()
    copy = traces.copy()
    for a in _arrays(traces).values():
        a[...] = 0
    _assert_equal(copy, expected)


def test_stacked_traces_have_what_all_of_them_have() -> None:
    """The step of the slowest; state and ends only where every chain has them."""
    first, last = _traces().row(5), _traces().row(6)
    last.step, last.state, first.ends = 3, None, None
    stacked = Traces.stack([first, last])
    assert (stacked.step, stacked.state, stacked.ends) == (3, None, None)
    np.testing.assert_array_equal(stacked.loss, _traces().loss[:2])


@pytest.mark.parametrize("done", [False, True])
def test_plain_arrays(done: bool) -> None:
    """There and back, through JSON; steps that are not done take no room."""
    traces = _traces()
    if done:
        traces.state = None
    else:
        traces.ends = None
    numbers, arrays = traces.to_arrays()
    assert {a.shape for name, a in arrays.items() if name.startswith("step.")} == {(3, 4)}
    _assert_equal(Traces.from_arrays(json.loads(json.dumps(numbers)), arrays), traces)


def test_diverged_chains_are_grouped_with_others() -> None:
    """A chain that diverged before its first draw has no observables; those of its neighbours stay, in any order."""

    def one(chain: int, loss: float, draws: dict[str, Any]) -> Traces:
        return Traces(chain, 5, {"loss": np.full((1, 5), loss)}, draws, np.full((1, 2, 3), loss))

    seen = {"weights": np.arange(10.0).reshape(1, 5, 2)}
    stacked = Traces.stack([one(0, np.nan, {}), one(1, 1.0, seen), one(2, np.nan, {})])
    assert (stacked.first_chain, stacked.step, stacked.state, stacked.ends) == (0, 5, None, None)
    np.testing.assert_array_equal(stacked.loss, [[np.nan] * 5, [1.0] * 5, [np.nan] * 5])
    assert stacked.checks.shape == (3, 2, 3)
    for c in range(3):
        expected = seen["weights"] if c == 1 else np.full((1, 5, 2), np.nan)
        np.testing.assert_array_equal(stacked.row(c).draws["weights"], expected)
