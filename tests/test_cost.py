"""What a run is about to cost, and what a default one may."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import llc_fast
from llc_fast import cost
from llc_fast.settings import Settings

CPU = torch.device("cpu")


def test_gradients_of_a_run_are_counted() -> None:
    """4 chains × (2000 + 2000) steps and 13 % of it in calibration; HMC takes its leapfrog steps each."""
    assert cost.num_gradients(Settings()) == 16_000 + 2_080
    assert cost.num_gradients(Settings(lr=1e-3)) == 16_000
    hmc = Settings(sampler="hmc", num_draws=10, num_burnin=5)
    assert cost.num_gradients(hmc) == 4 * 15 * hmc.template.trajectory()[0] > 4 * 15  # type: ignore[attr-defined]


@pytest.mark.parametrize("flops", [1.0, 1e5, 1e6, 3e6, 1e9, float("inf")])
def test_default_minibatches_are_affordable(flops: float) -> None:
    """The largest halving of 512 whose run takes ten minutes at the nominal speed, and 32 at least."""
    settings, speed = Settings(), 2e10
    size = cost.affordable_batch(settings, flops, 512, CPU)
    wanted = 512
    while wanted > 32 and flops != float("inf") and flops * wanted * 18_080 > 600 * speed:
        wanted //= 2
    assert size == wanted


def test_default_length_is_affordable() -> None:
    """A budget of ten minutes at the nominal speed, 400 steps at least; what the user chose is kept."""

    def of(settings: Settings, flops: float, device: torch.device = CPU, parameters: int = 1000) -> Settings:
        return cost.affordable_length(settings, flops, device, parameters)

    assert of(Settings(), 1e6) == Settings()
    assert of(Settings(), 600 * 2e10 / 20_000) == Settings(max_gradients=20_000)
    assert of(Settings(target_error=0.1), 600 * 2e10 / 20_000).max_gradients == 20_000
    shortest = of(Settings(), 1e15)
    assert shortest.longest.num_steps == 2 * cost.LEAST_DRAWS and cost.num_gradients(shortest) == 4 * 400 + 208
    chosen: list[dict[str, int]] = [
        {"num_draws": 3000},
        {"num_burnin": 3000},
        {"max_gradients": 9999},
        {"max_seconds": 9},
    ]
    for given in (Settings(**options) for options in chosen):  # type: ignore[arg-type]
        assert of(given, 1e15) is given
    assert of(Settings(), float("inf")) == Settings()  # nobody knows
    assert of(Settings(), 1e9, torch.device("cuda")) == Settings()


def test_large_models_have_a_length() -> None:
    """Their chains are not all in memory at once: draws in proportion, 200 at least, unless an error was asked for."""
    flops = 2 * 600 * 2e10 / 18_080  # twice too many
    large = cost.affordable_length(Settings(), flops, CPU, 20_000_000)
    assert large == Settings(num_draws=1000, num_burnin=1000)
    assert cost.affordable_length(Settings(), 1e15, CPU, 20_000_000).num_draws == cost.LEAST_DRAWS
    assert cost.affordable_length(Settings(target_error=0.1), flops, CPU, 20_000_000).by_need


class _Dear(torch.nn.Module):
    """Many operations, few parameters: a convolution over a large image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv1d(1, 1, 101, padding=50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean(dim=(1, 2))


def test_an_expensive_model_gets_smaller_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so in settings and summary; equal seeds give equal results, whatever the clock says."""
    monkeypatch.setattr(cost, "AFFORDABLE_SECONDS", 0.02)
    torch.manual_seed(0)
    data = torch.randn(600, 1, 200), torch.randn(600)
    first, second = (
        llc_fast.estimate_llc(_Dear(), data, F.mse_loss, lr=1e-4, progress=False, num_draws=draws, num_burnin=10)
        for draws in (20, 20)
    )
    assert first.settings["batch_size"] == second.settings["batch_size"] == 32
    assert "minibatches of 32 samples instead of 512" in first.summary()
    given = llc_fast.estimate_llc(
        _Dear(), data, F.mse_loss, lr=1e-4, progress=False, num_draws=20, num_burnin=10, batch_size=100
    )
    assert given.settings["batch_size"] == 100 and not given.diagnostics["shortened"]


def test_a_long_run_is_announced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is spent: gradients, what calibration takes of them, and the time; a short run says nothing."""
    options: dict[str, Any] = {"num_draws": 20, "num_burnin": 20, "num_chains": 4}
    data = torch.randn(100, 3), torch.randn(100, 1)
    llc_fast.estimate_llc(torch.nn.Linear(3, 1), data, F.mse_loss, **options)
    assert "gradients" not in capsys.readouterr().err
    monkeypatch.setattr("llc_fast.estimate.seconds_of_gradient", lambda *_: 1.5)
    llc_fast.estimate_llc(torch.nn.Linear(3, 1), data, F.mse_loss, **options, lr=1e-3)
    said = capsys.readouterr().err
    assert "LLC: 160 gradients on 100 samples each: at most about 4 minutes" in said
    llc_fast.estimate_llc(torch.nn.Linear(3, 1), data, F.mse_loss, **options, lr=1e-3, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "said"), [(30, "30 seconds"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_times_in_words(seconds: float, said: str) -> None:
    assert cost._in_words(seconds) == said


def test_calibration_has_a_total(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its progress says of how many steps."""
    monkeypatch.setattr("llc_fast.chains.run.Monitor.interval", 0.0)
    data = torch.randn(100, 3), torch.randn(100, 1)
    llc_fast.estimate_llc(torch.nn.Linear(3, 1), data, F.mse_loss, num_draws=100, num_burnin=100)
    assert re.search(r"calibration: \d+ % \(\d+ of 104 steps\)", capsys.readouterr().err)


def test_the_nominal_cost_does_not_depend_on_a_checkpoint(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose length was shortened resumes as the same run."""
    monkeypatch.setattr(cost, "AFFORDABLE_SECONDS", 1e-5)
    data = torch.randn(100, 3), torch.randn(100, 1)
    model = torch.nn.Linear(3, 1)
    path = tmp_path / "run.npz"
    first = llc_fast.estimate_llc(model, data, F.mse_loss, lr=1e-3, checkpoint=path, progress=False)
    again = llc_fast.estimate_llc(model, data, F.mse_loss, lr=1e-3, checkpoint=path, progress=False)
    assert first.schedule.num_draws == again.schedule.num_draws == cost.LEAST_DRAWS
    assert first.llc_mean == again.llc_mean and dataclasses.asdict(first.schedule) == dataclasses.asdict(again.schedule)


class _Slow(torch.utils.data.Dataset[Any]):
    """Samples that take a while to be read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(2e-4)
        return torch.full((3,), float(index)), torch.zeros(1)


def test_a_slow_loader_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much of the time went into waiting for it, if that is most; tensors are never waited for."""
    monkeypatch.setattr("llc_fast.result._MUCH_WAITING", 0.01)
    options: dict[str, Any] = {"lr": 1e-6, "num_draws": 100, "num_burnin": 0, "num_chains": 1, "progress": False}
    loader = torch.utils.data.DataLoader(_Slow(), batch_size=20, shuffle=True)
    slow = llc_fast.estimate_llc(torch.nn.Linear(3, 1), loader, F.mse_loss, **options)
    waited = slow.diagnostics["seconds_of_data"]
    assert 100 * 20 * 2e-4 < waited < slow.settings["seconds"]
    assert ("seconds went into waiting for the loader" in slow.summary()) == (waited > slow.settings["seconds"] / 2)
    tensors = [torch.stack(column) for column in zip(*[_Slow()[k] for k in range(40)], strict=True)]
    fast = llc_fast.estimate_llc(torch.nn.Linear(3, 1), tuple(tensors), F.mse_loss, **options)
    assert fast.diagnostics["seconds_of_data"] == 0 and "waiting" not in fast.summary()
