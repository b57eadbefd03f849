"""Small runs that are stopped, killed and resumed, for the tests of checkpoints, faults and processes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast.chains.run import Monitor, StepTaken, after_each_step
from llc_fast.result import LLCResult, Warning
from llc_fast.samplers import make_sampler
from llc_fast.support.runtime import Interrupts

mse = nn.functional.mse_loss
TIMEOUT = 120
"""Seconds after which a process hangs."""


def data(n: int = 40, dtype: torch.dtype = torch.float32, targets: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(n, targets, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def initialized(model: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def mlp(dtype: torch.dtype = torch.float32, seed: int = 7) -> nn.Module:
    return initialized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype), seed)


_EXECUTION = tuple(field.name for field in dataclasses.fields(llc_fast.Execution))


def arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as estimate_llc takes them: tests name those of `Execution`, and a sampler's own, beside the others."""
    given = dict(options)
    execution = {name: given.pop(name) for name in _EXECUTION if name in given}
    if execution:
        given["execution"] = llc_fast.Execution(**execution)
    if own := given.pop("sampler_options", None):
        given["sampler"] = make_sampler(given.get("sampler") or "sgld", **own)
    return given


def gamma(options: Mapping[str, Any]) -> float | None:
    """γ = 1 unless a sampler object brings its own: figures of the tests are for it, whatever the default is."""
    inside = getattr(options.get("sampler"), "localization", (options.get("sampler_options") or {}).get("localization"))
    return 1.0 if inside is None else None


def estimate(**options: Any) -> LLCResult:
    """`estimate_llc` of a small network with everything that a test does not give."""
    chosen: dict[str, Any] = {
        "lr": 1e-3,
        "localization": gamma(options),
        "num_chains": 3,
        "num_draws": 8,
        "num_burnin": 4,
        "batch_size": 10,
        "progress": False,
    } | options
    model = chosen.pop("model", None) or mlp()
    inputs = chosen.pop("data", None)
    inputs = data() if inputs is None else inputs
    return llc_fast.estimate_llc(model, inputs, chosen.pop("loss_fn", mse), **arguments(chosen))


_EVENTS = ("training-mode", "unused", "diverged", "partial", "checkpoint", "truncated")


def happened(result: LLCResult) -> list[Warning]:
    """The warnings about model and run, without those about the estimate, which most of these short runs deserve."""
    return [w for w in result.warnings if w.code in _EVENTS]


def codes(result: LLCResult) -> list[str]:
    """Of all warnings, in their order."""
    return [w.code for w in result.warnings]


def assert_same(found: LLCResult, expected: LLCResult) -> None:
    """The same bits in everything that sampling gives."""
    assert found.steps_done == expected.steps_done
    assert found.loss_trace.shape == expected.loss_trace.shape
    np.testing.assert_array_equal(found.loss_trace, expected.loss_trace)
    assert found.observables.keys() == expected.observables.keys()
    for name, values in expected.observables.items():
        np.testing.assert_array_equal(found.observables[name], values, err_msg=name)
    assert (found.init_loss, found.nbeta, found.settings["lr"]) == (
        expected.init_loss,
        expected.nbeta,
        expected.settings["lr"],
    )
    np.testing.assert_equal(found.llc_mean, expected.llc_mean)
    np.testing.assert_array_equal(found.llc_per_chain, expected.llc_per_chain)


def _is_handled() -> bool:
    run = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return not isinstance(run, Interrupts) or run.is_stopping


@contextlib.contextmanager
def interrupted_after(count: int) -> Iterator[None]:
    """SIGINT comes after the `count`-th step that this process takes from now on, whichever chain takes it.

    Pilot chains do not count.
    """
    left, came = iter(range(count - 1, -1, -1)), threading.Event()

    def interrupt(taken: StepTaken) -> None:
        if not taken.is_pilot and next(left, None) == 0:
            came.set()
            signal.raise_signal(signal.SIGINT)
        # In threads: nobody goes on until the main one, which looks up now and then, has handled it.
        while came.is_set() and not _is_handled():
            time.sleep(0.001)

    interval, Monitor.interval = Monitor.interval, 0.001
    try:
        with after_each_step(interrupt):
            yield
    finally:
        Monitor.interval = interval


def no_step() -> contextlib.AbstractContextManager[None]:
    """The test fails if a chain takes a step."""
    return after_each_step(lambda taken: pytest.fail(f"a step: {taken}"))


# ---- other processes ---------------------------------------------------------------------------------------

_HEAD = "import os, signal, sys, threading, time\nimport llc_fast, runs, torch\n\n"

# Forked from a process that has imported these and done nothing: importing them takes longer than most tests.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch", "pytest", "sympy", "xarray", "zarr", "llc_fast.optim", "llc_fast.samples", "llc_fast.sweep"]
)
_starting = threading.Lock()


def _start_server() -> None:
    """Where `python -c`, which looks into the current folder first, finds no llc_fast: in sources none is built."""
    with _starting:
        here = os.getcwd()
        os.chdir(Path(__file__).parent)
        try:
            forkserver.ensure_running()
        finally:
            os.chdir(here)


def _execute(body: str, folder: Path, arguments: list[str], environment: dict[str, str], files: list[str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    sys.argv = ["script", *arguments]
    exec(compile(_HEAD + body, "script", "exec"), {"__name__": "__main__"})


class Script:
    """Python code that runs in a process of its own, in a folder, with arguments and environment variables."""

    def __init__(self, body: str, folder: Path, *arguments: object, **environment: object) -> None:
        self._files = []
        for _ in range(2):
            descriptor, name = tempfile.mkstemp()
            os.close(descriptor)
            self._files.append(name)
        given = {k: str(v) for k, v in environment.items()}
        self._process = _processes.Process(
            target=_execute, args=(body, folder, [str(a) for a in arguments], given, self._files), daemon=True
        )
        _start_server()
        self._process.start()

    def wait_for(self, text: str) -> None:
        """Until it has written this."""
        deadline = time.monotonic() + TIMEOUT
        while text not in Path(self._files[0]).read_text():
            assert self._process.is_alive() and time.monotonic() < deadline, Path(self._files[1]).read_text()
            time.sleep(0.005)

    def kill(self) -> None:
        self._process.kill()

    def finish(self) -> tuple[int, str, str]:
        """Exit code, output and errors; the test fails if it hangs."""
        self._process.join(TIMEOUT)
        hangs = self._process.is_alive()
        if hangs:
            self._process.kill()
            self._process.join()
        output, errors = (Path(file).read_text() for file in self._files)
        for file in self._files:
            os.unlink(file)
        assert not hangs, f"the process hangs; it had written: {output}\n{errors}"
        assert self._process.exitcode is not None
        return self._process.exitcode, output, errors


def write_script(folder: Path, body: str) -> Path:
    """The same code as a file for other programs to start."""
    path = folder / "script.py"
    head = f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    path.write_text(head + _HEAD + body)
    return path
