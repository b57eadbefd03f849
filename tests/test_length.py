"""How long chains run when nobody gives their length: when they end, and that they can go on."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_same, codes, data, estimate, interrupted_after, mlp, mse
from torch.utils.data import DataLoader, TensorDataset

import llc_fast
from llc_fast import estimate as estimate_module
from llc_fast.chains.run import after_each_step
from llc_fast.checks import Facts, examine
from llc_fast.result import LLCResult
from llc_fast.schedule import Schedule
from llc_fast.settings import DEFAULT_MOST, FIRST_LOOK, Settings
from llc_fast.traces import Traces


def by_need(**options: Any) -> LLCResult:
    return estimate(**{"num_draws": None, "num_burnin": None} | options)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks after 40, 80, 160, … steps, so that runs of a few hundred have several."""
    monkeypatch.setattr("llc_fast.settings.FIRST_LOOK", 40)


def test_what_is_easy_ends_early() -> None:
    """Forty directions that mix in a few steps: the first look is enough, and λ̂ is the exact posterior mean."""
    torch.manual_seed(0)
    x = torch.randn(2000, 40)
    model = torch.nn.Linear(40, 1, bias=False)
    y = model(x).detach()
    found = llc_fast.estimate_llc(model, (x, y), mse, progress=False, localization=1.0)
    h = torch.linalg.eigvalsh(2 * x.double().T @ x.double() / 2000) * found.nbeta
    exact = float((0.5 * h / (h + 1)).sum())
    assert found.loss_trace.shape == (4, FIRST_LOOK) and found.schedule.num_burnin == FIRST_LOOK // 2
    assert (
        found.diagnostics["ended_by"] == "target" and found.relative_error <= 0.02 == found.diagnostics["target_error"]
    )
    assert abs(found.llc_mean - exact) < 4 * found.llc_stderr and found.warnings == []
    assert "ended when the total error was" in found.summary()


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("most", [150, 1000, 1234])
def test_gradients_are_not_overspent(most: int) -> None:
    """Steps of all chains are as many as were given, or fewer by a part of a step; pilots have their share."""
    taken: list[int] = []
    with after_each_step(lambda step: taken.append(len(step.chains))):
        found = by_need(target_error=0, max_gradients=most)
    assert most - 3 < sum(taken) <= most and found.diagnostics["ended_by"] == "budget"
    assert found.loss_trace.shape[1] - found.schedule.num_burnin == found.schedule.num_draws
    assert not found.is_partial and "gradients were spent" in found.summary()
    chosen = by_need(lr=None, target_error=0, max_gradients=most)
    spent = chosen.loss_trace.size + chosen.diagnostics.get("pilot_steps", 0)
    assert 0.85 * most < spent < 1.02 * most  # stages of pilots are rounded


def test_the_default_budget() -> None:
    assert Settings().longest.num_steps == DEFAULT_MOST and Settings().looks == (1250, 2500, 5000, 10_000)
    assert Settings(num_steps_bw_draws=3).looks[0] == 3750 and Settings(num_draws=7).looks == ()
    assert Settings(max_gradients=13_080, sampler="sgld").looks == (1250, 2500, 2893)  # 13 % more for pilots
    assert Settings(max_gradients=13_080).looks == (1250, 2500, 2811)  # and 3.3 % for one in another metric
    assert Settings(sampler="hmc", lr=0.1, max_gradients=80_000).longest.num_steps == 2000


@pytest.mark.usefixtures("early")
def test_chains_are_those_of_a_given_length() -> None:
    """Bit by bit, whenever they were looked at; draws are the second half, and observables are theirs."""
    seen = {"step": lambda draw: draw.step, "loss": lambda draw: draw.loss}
    found = by_need(target_error=0, max_gradients=3 * 200, observables=seen)
    whole = estimate(num_draws=184, num_burnin=16)
    np.testing.assert_array_equal(found.loss_trace, whole.loss_trace)
    assert (found.schedule.num_burnin, found.schedule.num_draws) == (100, 100)
    np.testing.assert_array_equal(found.observables["step"], np.tile(np.arange(100.0, 200), (3, 1)))
    assert found.observables["loss"].shape == (3, 100)
    assert found.settings["num_draws"] == found.settings["num_burnin"] == 100


_KINDS: dict[str, dict[str, Any]] = {
    "sgld": {},
    "chain by chain": {"strategy": "sequential"},
    "calibrated": {"lr": None},
    "several steps between draws": {"num_steps_bw_draws": 3, "max_gradients": 900},
    "rmsprop": {"sampler": "rmsprop-sgld"},
    "hmc": {"sampler": "hmc", "batch_size": None, "max_gradients": 6000},
    "evaluated at w* too": {
        "data": DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True),
        "batch_size": None,
    },
    "observables": {"observables": {"w": lambda draw: draw.params["0.weight"]}},
    "ends": {"keep_ends": True},
}


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("kind", _KINDS)
def test_stopped_and_resumed(tmp_path: Path, kind: str) -> None:
    """Ctrl-C at any step, between looks or at one: the same call ends with the same bits."""
    options = {"target_error": 0, "max_gradients": 600} | _KINDS[kind]
    whole, path = by_need(**options), tmp_path / "run.npz"
    for count in (5, 30, 40):
        with interrupted_after(count):
            partial = by_need(checkpoint=path, **options)
        assert partial.is_partial and "partial" in codes(partial)
    found = by_need(checkpoint=path, **options)
    assert_same(found, whole)
    assert_same(by_need(checkpoint=path, **options), whole)
    if kind == "ends":
        assert whole.ends is not None and found.ends is not None
        for name, values in whole.ends.items():
            np.testing.assert_array_equal(found.ends[name], values)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("kind", sorted(_KINDS.keys() - {"several steps between draws"}))
def test_a_finished_run_goes_on(tmp_path: Path, kind: str) -> None:
    """With a larger budget: the same bits as if it had been given at once, but for what pilots saw of the budget."""
    options, path = _KINDS[kind] | {"target_error": 0}, tmp_path / "run.npz"
    most = 10 if kind == "hmc" else 1
    lr = estimate(num_draws=100, **options | {"target_error": None}).settings["lr"] if kind == "calibrated" else None
    first = by_need(
        checkpoint=path, **options | {"max_gradients": 240 * most} | ({"lr": lr, "bias_correction": True} if lr else {})
    )
    options |= {"max_gradients": 600 * most} | ({"lr": lr, "bias_correction": True} if lr else {})
    found, whole = by_need(checkpoint=path, **options), by_need(**options)
    assert first.loss_trace.shape[1] < found.loss_trace.shape[1]
    assert found.diagnostics["resumed_steps"] == first.loss_trace.size
    assert_same(found, whole)
    assert found.diagnostics["distance"] == whole.diagnostics["distance"]


@pytest.mark.parametrize("observables", [None, {"w": lambda draw: draw.params["0.weight"]}])
def test_a_finished_run_of_given_length_goes_on(tmp_path: Path, observables: Any) -> None:
    path = tmp_path / "run.npz"
    first = estimate(num_draws=8, num_burnin=4, checkpoint=path, observables=observables)
    for draws, burnin in ((20, 4), (30, 10)):
        found = estimate(num_draws=draws, num_burnin=burnin, checkpoint=path, observables=observables)
        whole = estimate(num_draws=draws, num_burnin=burnin, observables=observables)
        np.testing.assert_array_equal(found.loss_trace, whole.loss_trace)
        np.testing.assert_array_equal(found.loss_trace[:, :12], first.loss_trace)
        np.testing.assert_array_equal(found.llc_per_chain, whole.llc_per_chain)
        for name, values in whole.observables.items():
            np.testing.assert_array_equal(found.observables[name], values)
    with pytest.raises(ValueError, match=r"40 steps of each chain, 10 of them burn-in.*Raise num_draws="):
        estimate(num_draws=8, num_burnin=10, checkpoint=path, observables=observables)
    with pytest.raises(ValueError, match="10 of them burn-in"):
        estimate(num_draws=80, num_burnin=4, checkpoint=path, observables=observables)


@pytest.mark.usefixtures("early")
def test_a_smaller_budget_than_was_spent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    by_need(target_error=0, max_gradients=600, checkpoint=path)
    with pytest.raises(ValueError, match=r"200 steps of each chain.*Raise max_gradients="):
        by_need(target_error=0, max_gradients=300, checkpoint=path)


@pytest.mark.usefixtures("early")
def test_a_smaller_target_goes_on(tmp_path: Path) -> None:
    """The budget stays; the run that was good enough for 20 % is the beginning of the one for 5 %."""
    x, y = data(200)
    options: dict[str, Any] = {
        "data": (x, y),
        "model": mlp(),
        "lr": None,
        "checkpoint": tmp_path / "run.npz",
        "seed": 3,
    }
    first = by_need(target_error=0.5, **options)
    found = by_need(target_error=0.05, **options)
    shared = first.loss_trace.shape[1]
    np.testing.assert_array_equal(found.loss_trace[:, :shared], first.loss_trace)
    assert found.loss_trace.shape[1] >= shared


def test_time_ends_a_run() -> None:
    """After about as long as was asked for, with what there is by then; not a partial result."""
    began = time.monotonic()
    found = by_need(lr=1e-4, target_error=0, max_seconds=1.0)
    assert found.diagnostics["ended_by"] == "time" and not found.is_partial
    assert time.monotonic() - began < 20 and found.kept_draws.size > 100
    assert found.loss_trace.shape[1] == found.schedule.num_steps and "time was spent" in found.summary()


@pytest.mark.usefixtures("early")
def test_what_more_steps_would_not_mend_ends_at_once() -> None:
    """Chains that all diverged, and a λ̂ below zero."""
    diverged = by_need(lr=1e4, target_error=0.01)
    assert diverged.diagnostics["ended_by"] == "diverged" and "diverged" in codes(diverged)
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    negative = by_need(model=torch.nn.Linear(3, 1), data=(x, 5 * x.sum(dim=1, keepdim=True)), lr=1e-3)
    assert negative.diagnostics["ended_by"] == "negative" and negative.loss_trace.shape[1] < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_error": 0.1, "num_draws": 10}, r"target_error=0\.1 .*num_draws=10.*give one of them"),
        ({"max_seconds": 3, "num_burnin": 10}, r"max_seconds=3.*num_burnin=10"),
        ({"max_gradients": 99, "num_draws": 10}, r"max_gradients=99"),
        ({"max_gradients": 50}, r"max_gradients=50 is too few for 3 chains: give at least \d+"),
        ({"target_error": -0.1}, "target_error must be"),
        ({"target_error": math.nan}, "target_error must be"),
        ({"max_seconds": 0}, "max_seconds must be"),
        ({"max_gradients": 0}, "max_gradients must be"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_need(**options)


def test_the_least_budget_that_is_named_will_do() -> None:
    with pytest.raises(ValueError, match="at least") as error:
        by_need(max_gradients=1)
    least = int(str(error.value).rpartition(" ")[2])
    found = by_need(max_gradients=least, target_error=0)
    assert found.kept_draws.size > 0


def test_interval_and_summary_have_the_slow_directions() -> None:
    """What is lacking is added above, on one side; `extrapolated` lies in between."""
    slow = np.linspace(0, 1, 4096)
    rng = np.random.default_rng(0)
    trace = 20 * np.sqrt(slow) + rng.standard_normal((4, 4096))
    settings = {"lr": 1e-3, "localization": 1.0, "num_parameters": 100, "batch_size": 1, "num_burnin": 2048}
    result = LLCResult(trace, 0.0, 1.0, Schedule(2048, 2048), settings)
    examine(result, Facts(np.empty((4, 0, 7)), 1.0))
    below, above = result.systematic_error
    low, high = result.interval()
    half = (high - low - above) / 2
    assert below == 0 and above > 1 and low == pytest.approx(result.llc_mean - half)
    assert high == pytest.approx(result.llc_mean + half + above)
    assert result.llc_mean < result.extrapolated < result.llc_mean + above
    assert f"(sampling) +{above:.2g}/−0 (slow directions" in result.summary()
    assert result.relative_error == pytest.approx(
        (result.llc_stderr + result.extrapolated - result.llc_mean) / result.llc_mean
    )


@pytest.mark.parametrize("length", [{"num_draws": 200, "num_burnin": 100}, {"num_draws": None, "num_burnin": None}])
def test_chains_that_diverge_begin_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: Any) -> None:
    """With a quarter of a step size that was chosen for them, not of one that was given; and so after a resume."""
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    model = torch.nn.Linear(5, 1, bias=False)
    inputs = x, model(x).detach()
    stiffest = 2 * float(torch.linalg.eigvalsh(x.T @ x / 400).max()) * 100 + 1
    original = estimate_module.choose
    monkeypatch.setattr(
        estimate_module, "choose", lambda prepared: dataclasses.replace(original(prepared), lr=10 / stiffest)
    )
    options: dict[str, Any] = {
        "nbeta": 100.0,
        "num_chains": 4,
        "batch_size": 400,
        "model": model,
        "data": inputs,
    } | length
    found = estimate(lr=None, checkpoint=tmp_path / "run.npz", **options)
    assert found.diagnostics["restarts"] == 1 and found.settings["lr"] == pytest.approx(2.5 / stiffest)
    h = 100 * 2 * torch.linalg.eigvalsh(x.double().T @ x.double() / 400)
    exact = float((0.5 * h / (h + 1)).sum())
    assert abs(found.llc_mean - exact) < 4 * found.llc_stderr and "begun again 1 times" in found.summary()
    monkeypatch.undo()
    assert_same(estimate(lr=None, checkpoint=tmp_path / "run.npz", **options), found)
    given = estimate(lr=10 / stiffest, **options)
    assert given.diagnostics["restarts"] == 0 and math.isnan(given.llc_mean)


@pytest.mark.parametrize("corrected", [True, False])
def test_chains_whose_bias_is_not_finite_have_diverged(corrected: bool) -> None:
    """Where the bias is subtracted: the losses are as they were, and λ̂ has none of these chains."""
    losses, bias = np.ones((4, 6)), np.ones((4, 6))
    bias[1:, 4] = np.nan
    traces = Traces(first_chain=0, step=6, steps={"loss": losses, "bias": bias})
    prepared = SimpleNamespace(settings=SimpleNamespace(lr=None, template=SimpleNamespace(kind="langevin")))
    chosen = SimpleNamespace(restarts=0, bias_correction=corrected, nbeta=1.0)

    def may(until: int) -> bool:
        sampled: Any = SimpleNamespace(traces=traces, until=until, interrupted=False)
        return estimate_module.may_begin_again(prepared, chosen, sampled)

    assert may(6) is corrected
    assert not may(4)  # not yet
    bias[1, 4] = 1.0
    assert not may(6)  # half of the chains are enough for an estimate
