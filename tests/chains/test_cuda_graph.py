"""Whole estimates on a GPU: the chains of the CPU, by every strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import Mixed
from runs import arguments
from torch import Tensor, nn

import llc_fast
from llc_fast import LLCResult
from llc_fast.chains.run import Monitor, StepTaken, after_each_step
from llc_fast.samplers import SAMPLERS, samplers_with_optimizer

pytestmark = pytest.mark.gpu
mse = nn.functional.mse_loss
SETTINGS: dict[str, Any] = {"lr": 1e-5, "num_chains": 3, "num_draws": 60, "num_burnin": 40, "batch_size": 50}


def _problem(device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 2)).double()
    x = torch.randn(300, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x) + 0.1 * torch.randn(300, 2, dtype=torch.float64)
    return model.to(device), (x.to(device), y.to(device))


def _estimate(device: str, **options: Any) -> LLCResult:
    model, data = _problem(device)
    return llc_fast.estimate_llc(model, data, mse, progress=False, **arguments(SETTINGS | options))


@pytest.mark.parametrize("sampler", samplers_with_optimizer())
@pytest.mark.parametrize("strategy", [None, "sequential", "batched", "cuda-graph"])
def test_the_chains_of_the_cpu(sampler: str, strategy: str | None) -> None:
    """A hundred steps agree with the CPU's to rounding, in float64: minibatches and noise are the same."""
    on_gpu, on_cpu = _estimate("cuda", sampler=sampler, strategy=strategy), _estimate("cpu", sampler=sampler)
    assert on_gpu.settings["strategy"] == (strategy or "cuda-graph")
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop-sgld"])
@pytest.mark.parametrize("strategy", ["sequential", "batched", "cuda-graph"])
def test_parameters_of_several_dtypes(sampler: str, strategy: str) -> None:
    """bfloat16 layers, norms in float32: two launches a step; the chains of the CPU to bfloat16's rounding."""

    def run(device: str, strategy: str) -> LLCResult:
        torch.manual_seed(0)
        images, labels = torch.randn(100, 64), torch.randint(10, (100,))
        model, data = Mixed().to(device), (images.to(device), labels.to(device))
        model.first.bfloat16()
        options = SETTINGS | {"sampler": sampler, "strategy": strategy, "lr": 1e-4, "num_draws": 20, "num_burnin": 0}
        return llc_fast.estimate_llc(
            model, data, nn.functional.cross_entropy, nbeta=20.0, progress=False, **arguments(options)
        )

    on_gpu, on_cpu = run("cuda", strategy), run("cpu", "sequential")
    assert on_gpu.settings["strategy"] == strategy
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=2e-2)
    assert np.ptp(on_cpu.loss_trace) > 0.1


@pytest.mark.parametrize("sampler", [name for name, cls in SAMPLERS.items() if cls.kind == "metropolis"])
@pytest.mark.parametrize("strategy", [None, "sequential", "batched"])
def test_adjusted_chains_of_the_cpu(sampler: str, strategy: str | None) -> None:
    """The same proposals, accepted and rejected alike; nobody captures them in a graph."""
    options: dict[str, Any] = {"sampler": sampler, "batch_size": None, "lr": 3e-3}
    on_gpu, on_cpu = _estimate("cuda", strategy=strategy, **options), _estimate("cpu", **options)
    assert on_gpu.settings["strategy"] == (strategy or "batched")
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-6)
    assert 0.1 < on_cpu.diagnostics["acceptance"] < 0.99


OPTIONS: dict[str, dict[str, Any]] = {
    "calibrated": {"lr": None},
    "calibrated in a metric": {
        "lr": None,
        "sampler": "preconditioned-sgld",
        "sampler_options": {"preconditioner": {"0.weight": torch.linspace(0.5, 2, 72).view(12, 6), "3.bias": 0.7}},
        "params": ["0.weight", "3.bias"],
    },
    "in the metric of the curvature": {"sampler": "preconditioned-sgld", "preconditioner": "curvature"},
    "released": {"release_gradients": True},
    "microbatches": {"microbatch_size": 20},
    "masked": {"params": {"0.weight": torch.arange(72).view(12, 6) % 3 > 0, "3.bias": True}},
    "observed": {"observables": {"away": lambda draw: sum(p.square().sum() for p in draw.params.values())}},
    "thinned": {"num_steps_bw_draws": 2, "bias_correction": False},
    "RMSprop's metric": {"sampler": "rmsprop-sgld", "sampler_options": {"adapt_steps": 10}},
    "ends": {"keep_ends": True},
}


_CAPTURED = set(OPTIONS) - {"released", "microbatches"}


@pytest.mark.parametrize("what", OPTIONS)
def test_every_option(what: str) -> None:
    """Whatever an estimate can be asked for comes out as on the CPU, chosen step sizes and draws included."""
    on_gpu, on_cpu = (_estimate(device, **OPTIONS[what]) for device in ("cuda", "cpu"))
    assert on_gpu.settings["lr"] == pytest.approx(on_cpu.settings["lr"], rel=1e-6)
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-5)
    assert on_gpu.llc_mean == pytest.approx(on_cpu.llc_mean, rel=1e-4, abs=1e-6)
    assert on_gpu.settings["strategy"] == ("cuda-graph" if what in _CAPTURED else "sequential")
    for name, values in on_cpu.observables.items():
        np.testing.assert_allclose(on_gpu.observables[name], values, rtol=1e-6)
    for name, end in (on_cpu.ends or {}).items():
        assert on_gpu.ends is not None
        np.testing.assert_allclose(on_gpu.ends[name], end, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("between", [1, 3])
@pytest.mark.parametrize("sampler", ["sgld", "rmsprop-sgld", "sghmc"])
def test_observables_between_replays(sampler: str, between: int) -> None:
    """A captured step stays captured, its chains have the bits of chains that nobody looks at, and observables see what
    they see on the CPU: each draw's loss, parameters, minibatch, and evaluations of other batches."""
    _, (x, y) = _problem("cpu")

    def seen(draw: llc_fast.Draw) -> Tensor:
        away = sum(p.square().sum() for p in draw.params.values())
        other = draw.loss((x[:7], y[:7]))  # on the CPU: it goes to the chain's device
        each = draw.evaluate_samples((x[:3], y[:3]))
        again = draw.loss(draw.batch) - draw.loss
        return torch.stack([draw.loss, again, other, draw.outputs((x[:7], y[:7])).sum(), away, *each])

    options: dict[str, Any] = {"sampler": sampler, "num_steps_bw_draws": between, "num_draws": 20, "num_burnin": 9}
    plain = _estimate("cuda", **options)
    watched = _estimate("cuda", observables={"seen": seen}, **options)
    on_cpu = _estimate("cpu", observables={"seen": seen}, strategy="sequential", **options)
    assert watched.settings["strategy"] == plain.settings["strategy"] == "cuda-graph"
    assert np.array_equal(watched.loss_trace, plain.loss_trace)
    assert all(np.array_equal(watched.traces[name], values) for name, values in plain.traces.items())
    np.testing.assert_allclose(watched.observables["seen"], on_cpu.observables["seen"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("strategy", ["cuda-graph", "batched", "sequential"])
def test_probes(strategy: str, tmp_path: Path) -> None:
    """``llc_fast.sample``: the losses of the CPU's draws, of data on the CPU, and the chains of an estimate alone."""
    pytest.importorskip("zarr")
    pytest.importorskip("xarray")
    _, (x, y) = _problem("cpu")

    def sampled(device: str, strategy: str) -> llc_fast.Samples:
        model, data = _problem(device)
        options = arguments(SETTINGS | {"strategy": strategy})
        probes = {"a": (x[:20], y[:20]), "b": ((x, y), 1)}
        return llc_fast.sample(model, data, mse, probes=probes, progress=False, store=tmp_path / device, **options)

    on_gpu, on_cpu = sampled("cuda", strategy), sampled("cpu", "sequential")
    assert np.array_equal(on_gpu.llc().loss_trace, _estimate("cuda", strategy=strategy).loss_trace)
    assert on_gpu.llc().settings["strategy"] == strategy
    for name in ("a", "b"):
        np.testing.assert_allclose(on_gpu.losses(name).values, on_cpu.losses(name).values, rtol=1e-5)
    np.testing.assert_array_equal(on_gpu.dataset["indices_b"].values, on_cpu.dataset["indices_b"].values)


@pytest.mark.parametrize("strategy", ["cuda-graph", "sequential"])
def test_examined_as_on_the_cpu(strategy: str) -> None:
    """Between the replays of a graph too: acceptance, gradient noise, bias, and the warnings that follow."""
    options: dict[str, Any] = {"lr": 1e-3, "num_draws": 500, "num_burnin": 100}
    on_gpu, on_cpu = _estimate("cuda", strategy=strategy, **options), _estimate("cpu", **options)
    for name in ("acceptance", "gradient_noise_share", "bias_share", "relaxations"):
        assert on_gpu.diagnostics[name] == pytest.approx(on_cpu.diagnostics[name], rel=1e-6), name
    assert on_gpu.warnings == on_cpu.warnings
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-6)


def _near_float64(model: nn.Module, data: tuple[Tensor, Tensor], **options: Any) -> None:
    """Two runs give the same bits, near those of float64 on the CPU, as near as products in low precision are."""
    first, again = (
        llc_fast.estimate_llc(model, data, mse, progress=False, **arguments(SETTINGS | options)) for _ in range(2)
    )
    assert np.array_equal(first.loss_trace, again.loss_trace)
    np.testing.assert_allclose(first.loss_trace, _estimate("cpu").loss_trace, rtol=0.1, atol=5e-3)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast(precision: torch.dtype) -> None:
    model, (x, y) = _problem("cuda")
    _near_float64(model.float(), (x.float(), y.float()), autocast=precision)


def test_a_model_in_low_precision() -> None:
    """Chains in float32 under a bfloat16 model."""
    model, (x, y) = _problem("cuda")
    _near_float64(model.to(torch.bfloat16), (x.to(torch.bfloat16), y.to(torch.bfloat16)))


def test_a_model_that_draws_random_numbers_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the GPU's generator is part of a checkpoint."""
    model, data = _problem("cuda")
    noisy = nn.Sequential(model, nn.Dropout(0.2)).train()

    def estimate(**options: Any) -> LLCResult:
        return llc_fast.estimate_llc(noisy, data, mse, device="cuda", progress=False, **arguments(SETTINGS | options))

    whole = estimate()
    monkeypatch.setattr(Monitor, "interval", 0.0)
    options: dict[str, Any] = {"checkpoint": tmp_path / "run.npz", "checkpoint_interval": 0}
    with _killed_after(45):
        estimate(**options)
    resumed = estimate(**options)
    assert resumed.diagnostics["resumed_steps"] > 0
    assert np.array_equal(resumed.loss_trace, whole.loss_trace)


def test_sweep() -> None:
    """Warm chains go from one checkpoint to the next on the GPU, as they do on the CPU."""
    pytest.importorskip("xarray")
    found = []
    for device in ("cuda", "cpu"):
        model, data = _problem(device)
        states = [{k: t * scale for k, t in model.state_dict().items()} for scale in (1.0, 1.02)]
        found.append(llc_fast.sweep_checkpoints(model, states, data, mse, progress=False, **SETTINGS))
    np.testing.assert_allclose(found[0].llc_per_chain, found[1].llc_per_chain, rtol=1e-4)


def test_a_captured_step_repeats_bit_for_bit() -> None:
    """Equal seeds give equal bits, and other seeds others."""
    first, again, other = (_estimate("cuda", strategy="cuda-graph", seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.loss_trace, again.loss_trace)
    assert not np.array_equal(first.loss_trace, other.loss_trace)


@contextlib.contextmanager
def _killed_after(count: int) -> Iterator[None]:
    """A run dies in the midst of its steps."""
    left = iter(range(count - 1, -1, -1))

    def kill(taken: StepTaken) -> None:
        if next(left, None) == 0:
            raise KeyboardInterrupt

    with after_each_step(kill), pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("strategy", ["sequential", "cuda-graph"])
def test_interrupted_and_resumed(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends half-way goes on from its checkpoint with the bits of one that was never stopped."""
    whole = _estimate("cuda", strategy=strategy)
    options: dict[str, Any] = {"strategy": strategy, "checkpoint": tmp_path / "run.npz", "checkpoint_interval": 0}
    monkeypatch.setattr(Monitor, "interval", 0.0)
    with _killed_after(55):
        _estimate("cuda", **options)
    resumed = _estimate("cuda", **options)
    assert resumed.diagnostics["resumed_steps"] > 0
    assert np.array_equal(resumed.loss_trace, whole.loss_trace)
