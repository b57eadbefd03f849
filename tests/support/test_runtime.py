"""The process while a run lasts: whose turn it is, Ctrl-C, and the caller's settings in threads that work for it."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast.support.randomness import Generators
from llc_fast.support.runtime import CallersSettings, Interrupts, one_at_a_time, threads

mse = nn.functional.mse_loss


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def _in_threads(*functions: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(functions)

    def call(k: int) -> None:
        found[k] = functions[k]()

    workers = [threading.Thread(target=call, args=(k,)) for k in range(len(functions))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


def _dropout() -> nn.Module:
    return runs.initialized(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1)))


def _not_recorded(out: Tensor, y: Tensor) -> Tensor:
    return mse(out, y) + 0 * float(out.detach().sum())


# ---- one at a time -----------------------------------------------------------------------------------------


def test_two_estimates_of_one_model_are_those_alone() -> None:
    model = runs.mlp()
    before = copy.deepcopy(model.state_dict())

    def run(seed: int) -> Any:
        return runs.estimate(model=model, loss_fn=_not_recorded, seed=seed, num_draws=50)

    alone = [run(0), run(1)]
    for found, expected in zip(_in_threads(lambda: run(0), lambda: run(1)), alone, strict=True):
        runs.assert_same(found, expected)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_models_with_dropout_follow_their_seed_in_threads() -> None:
    models = [_dropout(), _dropout()]
    alone = runs.estimate(model=models[0], num_draws=50)
    before = torch.get_rng_state()
    for found in _in_threads(*(lambda m=m: runs.estimate(model=m, num_draws=50) for m in models)):
        runs.assert_same(found, alone)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_estimate_inside_an_observable_of_several_workers() -> None:
    if torch.get_num_threads() < 2:
        pytest.skip("one worker")
    inner = runs.mlp(seed=3)
    alone = runs.estimate(model=inner).llc_mean
    result = runs.estimate(
        num_chains=4,
        num_draws=2,
        strategy="sequential",
        observables={"inner": lambda draw: runs.estimate(model=inner).llc_mean},
    )
    assert np.all(result.observables["inner"] == alone)


def test_who_waits_can_be_interrupted() -> None:
    has_turn, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time():
            has_turn.set()
            may_end.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    has_turn.wait(20)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        runs.estimate()
    assert other.is_alive()  # it was not waited for
    may_end.set()
    other.join()
    runs.estimate()


def test_a_turn_is_given_back_after_an_error() -> None:
    def fail(out: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            runs.estimate(loss_fn=fail)
    assert _in_threads(lambda: runs.estimate().llc_mean)[0] == runs.estimate().llc_mean


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def test_ctrl_c_raises_once_and_protected_functions_end_first() -> None:
    ended = list[str]()

    def put_back() -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append("whole")

    with Interrupts(put_back) as interrupts:
        put_back()
        assert interrupts.is_pending and ended == ["whole"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # while its consequences are dealt with
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_ctrl_c_stops_and_the_second_raises() -> None:
    with Interrupts() as interrupts, interrupts.stopping() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set() and interrupts.is_stopping
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_handler_of_the_users_stays() -> None:
    came = list[int]()
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
    assert came == [signal.SIGINT]


@pytest.mark.parametrize("make", [lambda g: g.kept(), lambda g: threads(1), lambda g: one_at_a_time()])
def test_nothing_is_put_back_twice(make: Callable[[Generators], Any]) -> None:
    """Ctrl-C as a context begins leaves it without an end; that must not come when its memory is freed."""
    generators = Generators(torch.device("cpu"))
    manager = make(generators)
    with generators.kept(), threads(None):
        torch.manual_seed(1)
        manager.__enter__()  # and here it came
    torch.manual_seed(2)
    before, count = torch.get_rng_state(), torch.get_num_threads()
    if hasattr(manager, "_token") and manager._token is not None:
        manager.__exit__(None, None, None)
    del manager
    gc.collect()
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == count


# ---- the caller's settings ---------------------------------------------------------------------------------


def test_threads_have_the_callers_settings() -> None:
    def look() -> tuple[Any, ...]:
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_device(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        )

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        mine, settings = look(), CallersSettings()
        (found,) = _in_threads(lambda: settings.run(look))
    assert found == mine
    assert look()[0] is False


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_autocast_of_the_caller_holds_in_workers(strategy: str) -> None:
    """The same λ̂ with as many workers as there are threads as with one."""
    before = torch.get_num_threads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        many = runs.estimate(num_chains=4, strategy=strategy)
        torch.set_num_threads(1)
        one = runs.estimate(num_chains=4, strategy=strategy)
        torch.set_num_threads(before)
    np.testing.assert_array_equal(many.loss_trace, one.loss_trace)
    assert not np.array_equal(one.loss_trace, runs.estimate(num_chains=4, strategy=strategy).loss_trace)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", list(llc_fast.samplers.SAMPLERS))
def test_the_default_dtype_changes_nothing(sampler: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {
        "sampler": sampler,
        "lr": None,
        "num_draws": 30,
        "num_burnin": 30,
        "observables": {"a": lambda draw: 0.3, "b": lambda draw: [1.1, 2.2], "loss": lambda draw: draw.loss},
    }
    if sampler in ("mala", "hmc"):
        options["batch_size"] = None
    expected = runs.estimate(**options)
    assert float(expected.observables["a"][0, 0]) == 0.3
    torch.set_default_dtype(dtype)
    try:
        found = runs.estimate(**options)
    finally:
        torch.set_default_dtype(torch.float32)
    runs.assert_same(found, expected)


@pytest.mark.parametrize("name", [n for n in llc_fast.samplers.SAMPLERS if n not in ("mala", "hmc", "kfac-sgld")])
def test_the_default_dtype_changes_no_optimizer(name: str) -> None:
    def steps() -> list[float]:
        p = nn.Parameter(torch.zeros(100, dtype=torch.float32))
        kind = llc_fast.optim.optimizer_for(llc_fast.samplers.SAMPLERS[name])
        optimizer = kind([p], lr=1e-3, localization=1.0, seed=1)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.tolist()

    expected = steps()
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert steps() == expected
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_signal_inside_of_the_handler_does_not_wait_for_itself(line: int, tmp_path: Path) -> None:
    """The second comes while the handler of the first sets its flag, at whichever line it is."""
    program = """
from llc_fast.support.runtime import Interrupts

interrupts, left = Interrupts(), int(sys.argv[1])

def again(frame, event, argument):
    global left
    if frame.f_code.co_name == "set" and event == "line":
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
    return again

with interrupts, interrupts.stopping() as stop:
    sys.settrace(again)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
    assert stop.is_set()
print("went on")
"""
    _, output, errors = runs.Script(program, tmp_path, line).finish()
    assert output == "went on\n", errors
