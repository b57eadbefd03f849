"""How λ̂ answers to nβ and γ, by twins: against closed forms, and with less noise than other ways."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import DATA, Quadratic
from runs import interrupted_after
from torch import nn

import llc_fast
from llc_fast.problems.exact_posteriors import SAMPLES, linear_regression
from llc_fast.result import LLCResult
from llc_fast.schedule import Schedule
from llc_fast.stats.sensitivity import Sensitivity, sensitivity
from llc_fast.twins import HALF_FACTOR, twin_schedule

pytestmark = pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
NBETA = SAMPLES / math.log(SAMPLES)
H, GAMMA = torch.logspace(-1, 2, 30), 100.0


def _estimate(**settings: Any) -> LLCResult:
    """30 quadratic directions around nβh = γ, and 3,000 flat ones, which only γ holds."""
    model = Quadratic(torch.cat([H, torch.zeros(3000)]))
    given: dict[str, Any] = {"nbeta": 100.0, "localization": GAMMA, "lr": 1e-4, "bias_correction": True}
    given |= {"num_draws": 1000, "num_burnin": 600, "sensitivity": True, "progress": False}
    return llc_fast.estimate_llc(model, DATA, lambda output, _: output, **(given | settings))


def _exact(nbeta: float = 100.0) -> float:
    a = nbeta * H.double().numpy()
    return float((0.5 * a * GAMMA / (a + GAMMA) ** 2).sum())


@pytest.fixture(scope="module")
def quadratic() -> LLCResult:
    return _estimate()


def test_quadratic_directions(quadratic: LLCResult) -> None:
    """λ̂ = Σ ½·nβh/(nβh + γ) has opposite slopes in log nβ and log γ. Flat directions count nothing."""
    found, exact = quadratic.sensitivity, _exact()
    assert isinstance(found, Sensitivity)
    assert abs(found.nbeta - exact) < 4 * found.nbeta_stderr
    assert abs(found.localization + exact) < 4 * found.localization_stderr
    assert max(found.nbeta_stderr, found.localization_stderr) < 0.4 * exact
    # The covariance formula sees how far chains are in flat directions, so that it says nothing.
    assert quadratic.diagnostics["localization_slope"] is None


def test_the_cost_is_what_it_says(quadratic: LLCResult) -> None:
    """As many gradients as the chains: four twins of a quarter each, most of which is burn-in."""
    assert quadratic.sensitivity is not None
    assert quadratic.sensitivity.gradients == 4 * 1600
    assert twin_schedule(1600) == Schedule(100, 300)
    assert twin_schedule(10).num_steps == 64


@pytest.mark.parametrize("gamma", [1.0, 30.0])
def test_minibatches_of_linear_regression(gamma: float) -> None:
    """With gradient noise, which does not scale along; the noise of λ̂ itself would be 0.1 and more."""
    problem = linear_regression(1.0)
    x = problem.data[0].double()
    a = NBETA * torch.linalg.eigvalsh(2 * x.T @ x / SAMPLES)
    exact = float((0.5 * a * gamma / (a + gamma) ** 2).sum())
    found = llc_fast.estimate_llc(
        problem.model,
        problem.data,
        problem.loss_fn,
        localization=gamma,
        num_draws=1000,
        num_burnin=1000,
        sensitivity=True,
        progress=False,
    ).sensitivity
    assert found is not None
    assert abs(found.nbeta - exact) < 4 * found.nbeta_stderr < 0.5
    assert abs(found.localization + exact) < 4 * found.localization_stderr < 0.5


@pytest.mark.parametrize("sampler", ["sghmc", "rmsprop-sgld", "hmc", "mala"])
def test_other_samplers(sampler: str) -> None:
    """Momentum and metrics; and accepted or rejected proposals, with adapted steps. No flat directions here."""
    model = Quadratic(H)
    settings: dict[str, Any] = {"lr": 1e-4, "bias_correction": True}
    if sampler in ("hmc", "mala"):
        settings = {"lr": None}
    elif sampler == "rmsprop-sgld":
        settings = {"bias_correction": True}
    draws = 300 if sampler == "hmc" else 1500
    found = llc_fast.estimate_llc(
        model,
        DATA,
        lambda output, _: output,
        sampler=sampler,
        nbeta=100.0,
        localization=GAMMA,
        num_draws=draws,
        num_burnin=500,
        sensitivity=True,
        progress=False,
        **settings,
    ).sensitivity
    assert found is not None
    for value, error, exact in (
        (found.nbeta, found.nbeta_stderr, _exact()),
        (found.localization, found.localization_stderr, -_exact()),
    ):
        assert abs(value - exact) < 4.5 * error and error < 0.4 * abs(exact)


def test_without_a_prior_there_is_one_slope() -> None:
    """γ = 0: λ̂ of quadratic directions is ½ each at any nβ, and the paths are the same on another scale."""
    model = Quadratic(torch.linspace(1, 2, 5))
    settings: dict[str, Any] = {"nbeta": 100.0, "localization": 0.0, "lr": 1e-3, "num_draws": 200}
    found = llc_fast.estimate_llc(
        model, DATA, lambda output, _: output, sensitivity=True, progress=False, **settings
    ).sensitivity
    assert found is not None and math.isnan(found.localization) and math.isnan(found.localization_stderr)
    assert abs(found.nbeta) < 1e-4 and found.nbeta_stderr < 1e-4  # but for float32's rounding


def test_chains_are_the_same_without_it(tmp_path: Path) -> None:
    """Asking for it changes nothing else, keeps no ends, and is part of the file."""
    small: dict[str, Any] = {"num_draws": 20, "num_burnin": 10}
    with_it, without = _estimate(**small), _estimate(**small, sensitivity=False)
    np.testing.assert_array_equal(with_it.loss_trace, without.loss_trace)
    assert with_it.ends is None and without.sensitivity is None
    kept = _estimate(**small, keep_ends=True)
    assert kept.ends is not None and kept.sensitivity == with_it.sensitivity
    with_it.save(tmp_path / "result.npz")
    assert LLCResult.load(tmp_path / "result.npz").sensitivity == with_it.sensitivity


def test_a_finished_checkpoint_measures_it_again(tmp_path: Path) -> None:
    small: dict[str, Any] = {"num_draws": 20, "num_burnin": 10, "checkpoint": tmp_path / "run.npz"}
    first, again = _estimate(**small), _estimate(**small)
    assert again.diagnostics["resumed_steps"] == 4 * 30 and again.sensitivity == first.sensitivity


def test_an_interrupted_run_has_none() -> None:
    with interrupted_after(10):
        partial = _estimate(num_draws=20, num_burnin=10)
    assert partial.is_partial and partial.sensitivity is None
    with interrupted_after(30 + 70):  # the chains are done, their twins are not
        done = _estimate(num_draws=20, num_burnin=10)
    assert not done.is_partial and done.sensitivity is None and math.isfinite(done.llc_mean)


def test_differences_of_arrays() -> None:
    """Slopes and errors of what is paired; a diverged chain is left out."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 500))
    traces = {"together-": noise, "together+": noise + 1.0, "localization-": noise, "localization+": noise - 2.0}
    traces["together+"][3, 100] = np.nan
    found = sensitivity(traces, 2 * math.log(HALF_FACTOR), 7)
    assert found.nbeta == pytest.approx(3 / math.log(2)) and found.localization == pytest.approx(-2 / math.log(2))
    assert found.nbeta_stderr < 1e-9 and found.gradients == 7
    lost = sensitivity({k: np.full((2, 5), np.nan) for k in traces}, 1.0, 7)
    assert math.isnan(lost.nbeta) and math.isnan(lost.localization_stderr)
    assert Sensitivity.from_numbers(dict.fromkeys(found._fields, None) | {"gradients": 3}).gradients == 3


def test_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    result = llc_fast.estimate_llc(
        model,
        (x, x.sum(dim=1, keepdim=True)),
        nn.functional.mse_loss,
        lr=1e-4,
        num_draws=10,
        num_burnin=5,
        sensitivity=True,
        progress=False,
    )
    assert result.sensitivity is not None and math.isfinite(result.sensitivity.nbeta)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_length_by_need() -> None:
    """Twins are a quarter of what the chains have run, wherever they ended."""
    problem = linear_regression(1.0)
    result = llc_fast.estimate_llc(
        problem.model, problem.data, problem.loss_fn, localization=30.0, max_gradients=20_000, sensitivity=True,
        progress=False, target_error=0.05,
    )  # fmt: skip
    found = result.sensitivity
    assert found is not None and result.diagnostics["ended_by"] in ("target", "budget")
    assert found.gradients == 4 * 4 * (result.loss_trace.shape[1] // 4)
    x = problem.data[0].double()
    a = NBETA * torch.linalg.eigvalsh(2 * x.T @ x / SAMPLES)
    exact = float((0.5 * a * 30 / (a + 30) ** 2).sum())
    assert abs(found.localization + exact) < 4 * found.localization_stderr < 1
