"""Whole estimates on a GPU: the chains of the CPU, by every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast import LLCResult
from llc_fast.samplers import ADJUSTED, SAMPLERS

pytestmark = pytest.mark.gpu


def _problem(device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 2)).double()
    x = torch.randn(300, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x) + 0.1 * torch.randn(300, 2, dtype=torch.float64)
    return model.to(device), (x.to(device), y.to(device))


def _estimate(device: str, **options: Any) -> LLCResult:
    model, data = _problem(device)
    settings: dict[str, Any] = {"lr": 1e-5, "num_chains": 3, "num_draws": 60, "num_burnin": 40, "batch_size": 50}
    return llc_fast.estimate_llc(model, data, nn.functional.mse_loss, progress=False, **settings | options)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strategy", [None, "sequential", "batched", "cuda-graph"])
def test_the_chains_of_the_cpu(sampler: str, strategy: str | None) -> None:
    """A hundred steps agree with the CPU's to rounding, in float64: minibatches and noise are the same."""
    on_gpu, on_cpu = _estimate("cuda", sampler=sampler, strategy=strategy), _estimate("cpu", sampler=sampler)
    assert on_gpu.settings["strategy"] == (strategy or "cuda-graph")
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-6)


@pytest.mark.parametrize("sampler", ADJUSTED)
@pytest.mark.parametrize("strategy", [None, "sequential", "batched"])
def test_adjusted_chains_of_the_cpu(sampler: str, strategy: str | None) -> None:
    """The same proposals, accepted and rejected alike; nobody captures them in a graph."""
    options: dict[str, Any] = {"sampler": sampler, "batch_size": None, "lr": 3e-3}
    on_gpu, on_cpu = _estimate("cuda", strategy=strategy, **options), _estimate("cpu", **options)
    assert on_gpu.settings["strategy"] == (strategy or "batched")
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-6)
    assert 0.1 < on_cpu.diagnostics["acceptance"] < 0.99


def test_a_captured_step_repeats_bit_for_bit() -> None:
    """Equal seeds give equal bits, and other seeds others."""
    first, again, other = (_estimate("cuda", strategy="cuda-graph", seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.loss_trace, again.loss_trace)
    assert not np.array_equal(first.loss_trace, other.loss_trace)


@pytest.mark.parametrize("strategy", ["sequential", "cuda-graph"])
def test_interrupted_and_resumed(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends half-way goes on from its checkpoint with the bits of one that was never stopped."""
    whole = _estimate("cuda", strategy=strategy)
    from llc_fast import chains

    steps, advance = [0], chains._Group.advance

    def stop_after_a_while(group: Any, *rest: Any) -> None:
        advance(group, *rest)
        steps[0] += 1
        if steps[0] == 55:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"strategy": strategy, "checkpoint": tmp_path / "run.npz", "checkpoint_interval": 0}
    monkeypatch.setattr(chains.Monitor, "interval", 0.0)
    monkeypatch.setattr(chains._Group, "advance", stop_after_a_while)
    with pytest.raises(KeyboardInterrupt):
        _estimate("cuda", **options)
    monkeypatch.setattr(chains._Group, "advance", advance)
    resumed = _estimate("cuda", **options)
    assert resumed.diagnostics["resumed_steps"] > 0
    assert np.array_equal(resumed.loss_trace, whole.loss_trace)
