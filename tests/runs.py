"""Small runs that are stopped, killed and resumed, for the tests of checkpoints, faults and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast import chains
from llc_fast.result import LLCResult

mse = nn.functional.mse_loss
TIMEOUT = 120
"""Seconds after which a process hangs."""


def data(n: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def initialized(model: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def mlp(dtype: torch.dtype = torch.float32, seed: int = 7) -> nn.Module:
    return initialized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype), seed)


def estimate(**options: Any) -> LLCResult:
    """`estimate_llc` of a small network with everything that a test does not give."""
    chosen: dict[str, Any] = {
        "lr": 1e-3,
        "num_chains": 3,
        "num_draws": 8,
        "num_burnin": 4,
        "batch_size": 10,
        "progress": False,
    } | options
    model = chosen.pop("model", None) or mlp()
    inputs = chosen.pop("data", None) or data()
    return llc_fast.estimate_llc(model, inputs, chosen.pop("loss_fn", mse), **chosen)


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


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """SIGINT comes during the `count`-th step that this process does from now on, whichever chain takes it."""
    advance, done = chains._Group.advance, iter(range(count - 1, -1, -1))
    monkeypatch.setattr(chains.Monitor, "interval", 0.001)

    def interrupted(group: Any) -> None:
        advance(group)
        if next(done, None) == 0:
            signal.raise_signal(signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                time.sleep(0.001)  # in a thread: until the main one has handled it

    monkeypatch.setattr(chains._Group, "advance", interrupted)


# ---- other processes ---------------------------------------------------------------------------------------


def write_script(folder: Path, body: str) -> Path:
    """A script that finds this module and the installed package, wherever it is."""
    path = folder / "script.py"
    head = f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    path.write_text(head + "import os, signal, threading, time\nimport llc_fast, runs, torch\n\n" + body)
    return path


def start(script: Path, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """The script in a process of its own, in its own folder."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=script.parent,
        env=os.environ | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Exit code, output and errors of a process, which is killed if it hangs."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        pytest.fail(f"the process hangs; it had written: {output}\n{errors}")
    return process.returncode, output, errors
