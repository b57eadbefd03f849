"""Statistics that say whether an estimate can be trusted, and the warnings that follow: none on good runs."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Quadratic, run
from numpy.typing import NDArray
from runs import assert_same, codes, data, estimate, interrupted_after, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import llc_fast
from llc_fast import checks
from llc_fast.chains import step_checks
from llc_fast.chains.group import RunSpec
from llc_fast.chains.step_checks import StepChecks, check_steps
from llc_fast.checks import CODES, Facts, examine
from llc_fast.data import make_source
from llc_fast.gradients.minibatches import Feed
from llc_fast.gradients.plan import make_plan
from llc_fast.gradients.strategies import make_gradient
from llc_fast.kernels.native import normals
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.objective import Objective
from llc_fast.result import LLCResult
from llc_fast.samplers.registry import make_sampler
from llc_fast.samplers.state import ChainState
from llc_fast.schedule import Schedule
from llc_fast.stats import convergence, errors, traces
from llc_fast.stats.step_checks import COLUMNS

Traces = NDArray[np.float64]


def _ar1(rng: np.random.Generator, runs: int, length: int, phi: float) -> Traces:
    """Stationary autoregressive series with variance 1, ``[run, draw]``."""
    noise = rng.standard_normal((length, runs)) * math.sqrt(1 - phi**2)
    series = np.empty_like(noise)
    series[0] = rng.standard_normal(runs)
    for t in range(1, length):
        series[t] = phi * series[t - 1] + noise[t]
    return series.T


# --- R̂ and effective sample sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.99, -0.6, -0.95])
@pytest.mark.parametrize("kind", ["plain", "tied", "apart", "drifting", "heavy"])
def test_convergence_equals_arviz(kind: str, phi: float) -> None:
    """On independent, slow, antithetic, tied, disagreeing, drifting and heavy-tailed chains, odd and even in length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    rng = np.random.default_rng(8)
    for chains, length in ((2, 4), (2, 5), (3, 21), (4, 100), (6, 257), (1, 60)):
        x = _ar1(rng, chains, length, phi)
        x = {
            "plain": lambda x: x,
            "tied": np.round,
            "apart": lambda x: x + np.arange(len(x))[:, None],
            "drifting": lambda x: x + np.linspace(0, 3, x.shape[1]),
            "heavy": lambda x: np.sinh(2 * x),
        }[kind](x)
        with np.errstate(all="ignore"):  # ArviZ divides by the variance of constant chains
            assert convergence.ess_bulk(x) == pytest.approx(float(arviz.ess(x)), rel=1e-8, nan_ok=True)
            assert convergence.ess_tail(x) == pytest.approx(float(arviz.ess(x, method="tail")), rel=1e-8, nan_ok=True)
            if chains > 1:  # ArviZ gives none for one chain; its two halves do
                assert convergence.r_hat(x) == pytest.approx(float(arviz.rhat(x)), rel=1e-8, nan_ok=True)


def test_convergence_of_what_can_not_be_judged() -> None:
    """NaN without draws, with three of them, or where one is not finite; constant draws count as they are."""
    for x in (np.zeros((0, 50)), np.zeros((2, 3)), np.array([[1, 2, math.nan, 4, 5]])):
        for statistic in (convergence.r_hat, convergence.ess_bulk, convergence.ess_tail):
            assert math.isnan(statistic(x))
    assert convergence.ess_bulk(np.ones((2, 10))) == 20 and math.isnan(convergence.r_hat(np.ones((2, 10))))


# --- Statistics of traces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize(("phi", "noise"), [(0.0, 0.0), (0.9, 0.0), (0.97, 0.0), (0.99, 0.0), (0.97, 3.0)])
def test_standard_error_is_the_spread_of_means(phi: float, noise: float, chains: int) -> None:
    """Of chains with known autocorrelation, also beneath the noise of minibatches; and not of four chains only.

    Means of N draws have the variance (1 + φ)/(1 − φ)/N, less their ends. A root mean square of 200 standard
    errors is known to 5 %, for the least degrees of freedom, three; the largest of three estimates is 10 to 20 % large.
    """
    rng, runs, length = np.random.default_rng(5), 200, 4000
    x = _ar1(rng, runs * chains, length, phi) + noise * rng.standard_normal((runs * chains, length))
    k = np.arange(1, length)
    exact = (1 + noise**2 + 2 * ((1 - k / length) * phi**k).sum()) / (length * chains)
    found = [errors.standard_error(run) for run in x.reshape(runs, chains, length)]
    assert 0.85 < math.sqrt(np.mean([e.value**2 for e in found]) / exact) < 1.3
    means = x.reshape(runs, -1).mean(axis=1)
    inside = np.mean([abs(m) <= e.quantile(0.95) * e.value for m, e in zip(means, found, strict=True)])
    assert inside >= 0.89  # 95 % of 200 runs, less four standard errors: 88.8 %


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_trend_has_the_error_it_says(phi: float) -> None:
    """Of 300 runs with a trend of 2, the mean is right, and the spread is what each run says of itself."""
    noise = _ar1(np.random.default_rng(1), 4 * 300, 900, phi).reshape(300, 4, 900)
    found = [traces.trend(x + np.linspace(-1, 1, 900)) for x in noise]
    values, errors = np.array([d.value for d in found]), np.array([d.stderr for d in found])
    assert abs(values.mean() - 2) < 4 * values.std() / math.sqrt(300)
    # Of two estimates the larger is taken, which errs by some 20 % on the safe side.
    assert 0.95 < errors.mean() / values.std() < 1.5
    assert math.isnan(traces.trend(np.ones((3, 8))).value)


def test_burnin_is_where_the_plateau_begins() -> None:
    """An approach with time constant 100 comes within three of the noise's deviations after 100·log(10/0.09) steps."""
    rng = np.random.default_rng(2)
    t = np.arange(4000)
    noise = 0.1 * rng.standard_normal((4, 4000))  # 0.008 in the mean of four chains and windows of 40
    expected = 100 * math.log(10 / (3 * 0.1 / math.sqrt(160)))
    assert abs(traces.burnin_needed(noise - 10 * np.exp(-t / 100)) - expected) <= 120
    assert traces.burnin_needed(noise) == 0
    overshoot = noise + 30 * np.exp(-t / 100) - 40 * np.exp(-t / 50)  # crosses the plateau on its way up
    assert traces.burnin_needed(overshoot) > 500
    assert traces.burnin_needed(np.zeros((0, 100))) == traces.burnin_needed(np.ones((2, 5))) == 0


def test_spikes() -> None:
    """Chi-square draws of any number of degrees are none; a few draws far above them are."""
    rng = np.random.default_rng(3)
    for freedom in (1, 2, 10):
        draws = rng.chisquare(freedom, (4, 100_000))
        assert traces.spike_share(draws) == 0
    draws = rng.chisquare(4, (4, 1000))
    draws[1, 500:503] = 400
    assert traces.spike_share(draws) == pytest.approx(3 * 400 / draws.sum(), rel=0.2)


def test_chain_spread() -> None:
    """Above 1 in no more than one of a thousand runs that agree, in all that don't."""
    noise = _ar1(np.random.default_rng(4), 4 * 1000, 900, 0.5).reshape(1000, 4, 900)
    assert np.mean([traces.chain_spread(x) > 1 for x in noise]) <= 1e-3
    apart = 0.5 * np.array([[0], [1], [0], [-1]])
    assert all(traces.chain_spread(x + apart) > 1 for x in noise[:50])
    assert math.isnan(traces.chain_spread(noise[0][:1]))


# --- Warnings -----------------------------------------------------------------------------------------------


def _judged(llc_trace: Traces, burnin: int = 0, table: Traces | None = None, **facts: Any) -> LLCResult:
    """A result with this trace of nβ·(L − L(w*)), examined; `facts` are settings, fields of the result, and Facts."""
    chains, steps = llc_trace.shape
    settings: dict[str, Any] = {"lr": 1e-3, "localization": 1.0, "num_parameters": 40, "bias_correction": False}
    settings |= {name: facts.pop(name) for name in tuple(settings) if name in facts}
    fields = {name: facts.pop(name) for name in ("traces", "steps_done") if name in facts}
    if "bias" in facts:  # per step, in units of λ̂
        fields["traces"] = {"bias": np.full(llc_trace.shape, facts.pop("bias"))}
    table = np.full((chains, 4, len(COLUMNS)), np.nan) if table is None else table
    given = {"step_checks": table, "reference_norm": 1.0, "injected_noise": 1.0, "euclidean": True} | facts
    result = LLCResult(0.5 + llc_trace / 100, 0.5, 100.0, Schedule(steps - burnin, burnin), settings=settings, **fields)
    examine(result, Facts(**given))
    return result


def test_slow_part() -> None:
    """Of a slow series beneath noise nine times as strong: its size, and how many of its times a chain spans."""
    rng = np.random.default_rng(9)
    found = []
    for phi in (0.5, 0.99, 0.998):
        slow = _ar1(rng, 4 * 50, 1024, phi).reshape(50, 4, -1)
        found.append([traces.slow_part(x + 3 * rng.standard_normal(x.shape)) for x in slow])
    fast, middle, slowest = (np.median([(f.times, f.size) for f in row], axis=0) for row in found)
    # 32 batches, all of them independent; (1 + φ)/(1 − φ) = 199 draws, a fifth of a chain; and 999, a whole one.
    assert fast[0] > 25 and 4 < middle[0] < 9 and slowest[0] < 3
    assert fast[1] < 0.25 and 0.6 < middle[1] < 1 and 0.6 < slowest[1] < 1.2
    # By draws alone the chains look well mixed.
    assert np.median([convergence.ess_bulk(x + 6 * rng.standard_normal(x.shape)) for x in slow]) > 400
    assert math.isnan(traces.slow_part(slow[0][:, :255]).times)


@pytest.mark.parametrize(
    ("chains", "draws", "burnin", "phi"),
    [(4, 1200, 800, 0.8), (2, 1000, 0, 0.5), (4, 400, 100, 0.0), (8, 500, 0, 0.6)],
)
def test_false_alarms(chains: int, draws: int, burnin: int, phi: float) -> None:
    """Fewer than one of a hundred runs that mix well are warned about; Gaussian and chi-square draws."""
    rng, count = np.random.default_rng(5), 200
    series = _ar1(rng, chains * count, draws + burnin, phi).reshape(count, chains, -1)
    warned = [_judged(10 + math.sqrt(10) * x, burnin).warnings for x in series[: count // 2]]
    warned += [_judged(5 * x**2, burnin).warnings for x in series[count // 2 :]]
    assert sum(map(bool, warned)) <= 0.01 * count, [w for w in warned if w]


@pytest.mark.parametrize(("chains", "draws"), [(4, 2000), (4, 1000), (2, 1000), (8, 500)])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_false_alarms_of_slow_motion(chains: int, draws: int, noise: float) -> None:
    """Fewer than one of a hundred, of chains whose slow part is worth 400 independent draws, with noise or without."""
    rng, count = np.random.default_rng(11), 200
    times = chains * draws / 400
    series = _ar1(rng, chains * count, draws, (times - 1) / (times + 1)).reshape(count, chains, -1)
    results = [_judged(10 + 2 * (x + noise * rng.standard_normal(x.shape))) for x in series]
    assert sum("slow" in codes(result) for result in results) <= 0.01 * count


def _good() -> Traces:
    return 10 + _ar1(np.random.default_rng(6), 4, 2000, 0.5)


def _slow_beneath_noise() -> Traces:
    """For R̂ and the effective draws the noise alone, which is nine times the variance of what it hides."""
    rng = np.random.default_rng(8)
    return _ar1(rng, 4, 2000, 0.996) + 3 * rng.standard_normal((4, 2000))


def _spiky() -> Traces:
    trace = _good()
    trace[2, 1000:1004] = 1000
    return trace


def _table(chains: int = 4, **columns: float) -> Traces:
    table = np.full((chains, 4, len(COLUMNS)), np.nan)
    for name, value in columns.items():
        table[:, :, COLUMNS.index(name)] = value
    return table


def _accepted(acceptance: float, **columns: float) -> Traces:
    """Step checks with this MALA acceptance, and some gradient noise."""
    return _table(log_acceptance=math.log(acceptance), gradient_noise=1.0, **columns)


def _metropolis(acceptance: float, **facts: Any) -> LLCResult:
    """Of four chains, the third of which accepts with this probability and the others with 0.6."""
    rates = np.full((4, 2000), 0.6)
    rates[2] = acceptance
    return _judged(_good(), traces={"acceptance": rates, "lr": np.full((4, 2000), 0.04)}, lr=0.04, **facts)


def _diverging(count: int) -> Traces:
    trace = _good()
    trace[:count, 1000:] = math.nan
    return trace


def _rising() -> Traces:
    return _good() + np.linspace(-2, 2, 2000) * np.array([[0], [1], [0], [0]])


_STANDING = {"curvature": 1.0, "squared_curvature": 4.0}
_REASONS: dict[str, tuple[str, Callable[[], LLCResult], list[str]]] = {
    "dropout": (
        "training-mode",
        lambda: _judged(_good(), random_modules=["a", "b", "c", "d"]),
        ["training mode", "(a, b, c, …)", "model.eval()"],
    ),
    "unused": (
        "unused",
        lambda: _judged(_good(), unused_parameters=["bias"]),
        ["1 of the parameters (bias)", "params="],
    ),
    "diverged": (
        "diverged",
        lambda: _judged(_diverging(1)),
        ["1 of 4 chains diverged", "from the others", "lr=0.0001"],
    ),
    "too few left": ("diverged", lambda: _judged(_diverging(3)), ["3 of 4 chains", "too few", "lr=0.0001"]),
    "interrupted": (
        "partial",
        lambda: _judged(_good(), steps_done=[1500] * 4),
        ["interrupted after 6000 of 8000 steps", "draws so far", "checkpoint="],
    ),
    "interrupted early": (
        "partial",
        lambda: _judged(_good(), burnin=1000, steps_done=[500] * 4, resumable=True),
        ["interrupted after 2000 of 8000 steps", "no draw yet", "The same call resumes it"],
    ),
    "full disk": (
        "checkpoint",
        lambda: _judged(_good(), checkpoint_problem="no space on disk"),
        ["could not be written (no space on disk)", "last good one"],
    ),
    "no length": (
        "truncated",
        lambda: _judged(_good(), data_truncated=True),
        ["data has no length, so L(w*) was computed on its first 2000 batches only."],
    ),
    "stuck": ("acceptance", lambda: _metropolis(0.1), ["10.0%", "minimum 20%", "lr=0.01"]),
    "off target": ("adaptation", lambda: _metropolis(0.6, target_acceptance=0.8), ["0.6, but", "to 0.8", "num_burnin"]),
    "few draws": (
        "ess",
        lambda: _judged(_good()[:, :20]),
        ["Effective sample size is ", "(minimum 100): λ̂ and its standard error are unreliable. Use num_draws="],
    ),
    "slow": (
        "rhat",
        lambda: _judged(10 + 0.1 * _ar1(np.random.default_rng(7), 4, 2000, 0.995)),
        ["R̂ = ", "Use num_draws=8000"],
    ),
    "slow beneath noise": (
        "slow",
        lambda: _judged(10 + 1.5 * _slow_beneath_noise()),
        ["λ̂ fluctuates slowly by ± 1", "autocorrelation times of that (minimum 5)", "num_draws="],
    ),
    "apart": (
        "rhat",
        lambda: _judged(_good() + np.array([[0], [0], [0], [3]])),
        ["chains have not converged to the same distribution", "from 10.0", " to 13.0", "num_draws=8000; if plot()"],
    ),
    "with a trend": (
        "trend",
        lambda: _judged(_good() + np.linspace(-1, 1, 2000)),
        ["The loss trace still has a trend", "λ̂ changes by +", "num_burnin=4000."],
    ),
    "short burn-in": (
        "burnin",
        lambda: _judged(_good() - 20 * np.exp(-np.arange(2000) / 30), burnin=10),
        ["reached its plateau after", "num_burnin was 10", "Use num_burnin="],
    ),
    "spikes": ("spikes", lambda: _judged(_spiky()), ["Spikes of the loss", "maximum 1%", "lr=0.00033"]),
    "negative": (
        "negative",
        lambda: _judged(_good() - 11),
        ["is negative", "no local minimum", "Train the model", "localization=10"],
    ),
    "too large": ("above-bound", lambda: _judged(_good(), num_parameters=10), ["above P/2 = 5", "lr=0.0001"]),
    "noisy": ("imprecise", lambda: _judged(0.1 + 4 * (_good() - 10)), ["is imprecise", "25%", "num_draws="]),
    "L(w*) sampled": (
        "init-loss",
        lambda: _judged(_good(), init_loss_stderr=0.02),
        ["L(w*) is only known to ± 0.02", "by ± 20% (maximum 10%)", "data with a length"],
    ),
    "L(w*) rounded": (
        "init-loss",
        lambda: _judged(0.02 * _good(), init_loss_stderr=4e-4),
        ["L(w*) is only known to ± 0.0004", "float64"],
    ),
    "biased": (
        "step-size",
        lambda: _judged(_good(), bias=2.0, table=_accepted(0.98)),
        ["bias is 20% of λ̂ (maximum 10%; MALA acceptance 0.98", "lr=0.00025."],
    ),
    "biased by gradient noise": (
        "step-size",
        lambda: _judged(_good(), bias=2.0, table=_table(gradient_noise=1e6)),
        ["bias is 20% of λ̂ (maximum 10%)", "lr=0.00025, or a larger batch_size"],
    ),
    "rejected": (
        "step-size",
        lambda: _judged(_good(), bias=0.8, table=_accepted(0.74)),
        ["8% of λ̂ (maximum 7%", "acceptance 0.74", "lr=0.0006"],
    ),
    "rejected, λ̂ unknown": (
        "step-size",
        lambda: _judged(_good() - 11, bias=0.8, table=_accepted(0.74)),
        ["too large (MALA acceptance 0.74", "unknown amount", "lr=0.0001"],
    ),
    "much subtracted": (
        "bias",
        lambda: _judged(_good(), bias=15.0, bias_correction=True),
        ["bias was 60% of nβ·(L − L(w*)) (maximum 50%)", "lr=8.3e-05", "batch_size"],
    ),
    "standing": (
        "short",
        lambda: _judged(_good(), table=_table(**_STANDING)),
        ["5 relaxation times", "the step size is too small", "hardly left w*. Use lr=0.01."],
    ),
    "standing, step size at its limit": (
        "short",
        lambda: _judged(_good(), bias=0.6, table=_table(**_STANDING)),
        ["(minimum 10): the chains have hardly left w*. Use num_draws="],
    ),
    "left": (
        "left",
        lambda: _judged(_rising(), table=_table(distance=4.0)),
        ["Chain 1 left the neighbourhood of w*", "localization=10"],
    ),
    "several left": (
        "left",
        lambda: _judged(_rising() + _rising()[[1, 0, 3, 2]] - 10, table=_table(distance=4.0)),
        ["Chains 0 and 1 left"],
    ),
}


@pytest.mark.parametrize("reason", _REASONS)
def test_each_reason_is_reported(reason: str) -> None:
    """A warning with its code: the condition with its number, the consequence, and an argument with its value."""
    code, make, parts = _REASONS[reason]
    found = [w for w in make().warnings if w.code == code]
    assert len(found) == 1 and all(part in found[0] for part in parts), make().warnings


def test_every_code_is_documented_and_tried() -> None:
    """The table in the module's docstring has the codes in their order, and each is raised by a test above."""
    assert checks.__doc__ is not None
    _, table, _ = checks.__doc__.split("=============  " + "=" * 105)
    assert tuple(line.split()[0] for line in table.strip().splitlines()) == CODES
    assert {code for code, _, _ in _REASONS.values()} == set(CODES) and len(set(CODES)) == len(CODES)


def test_warnings_that_say_the_same_are_given_once() -> None:
    """Chains that have hardly moved have no trend to speak of; those that disagree no effective sample size."""
    assert codes(_judged(_good() + np.linspace(-1, 1, 2000), table=_table(**_STANDING))) == ["short"]
    assert codes(_judged(10 + 0.1 * _ar1(np.random.default_rng(7), 4, 2000, 0.995))) == ["rhat"]
    few = _judged(_good()[:, :20] - 11, unused_parameters=["bias"])
    assert codes(few) == ["unused", "ess"]  # of so few draws nothing else can be said
    assert codes(_metropolis(0.05, target_acceptance=0.8)) == ["acceptance"]


def test_a_good_run() -> None:
    """A good trace with good step checks: low acceptance, distance and gradient noise alone are no reason."""
    table = _accepted(math.exp(-0.5), distance=4.0, curvature=1.0, squared_curvature=100.0)
    result = _judged(_good(), bias=0.4, table=table)
    assert result.warnings == []
    found = result.diagnostics
    assert found["bias_share"] == pytest.approx(0.04, rel=1e-2)
    assert found["acceptance"] == pytest.approx(math.exp(-0.5))
    assert found["distance"] == [2.0] * 4 and found["distance_over_prior"] == pytest.approx(4 / 40)
    assert found["relaxations"] == pytest.approx(0.5e-3 * (100 + 1) * 2000)
    json.dumps(found, allow_nan=False)


def test_bias_share_is_of_what_there_was_before() -> None:
    """Of 10 that are left after 4 were subtracted: 4/14; of 10 with 4 in them: 4/10; of burn-in nothing."""
    bias = np.full((4, 2000), 4.0)
    bias[:, :500] = 1e6
    subtracted = _judged(_good(), burnin=500, traces={"bias": bias}, bias_correction=True)
    assert subtracted.diagnostics["bias_share"] == pytest.approx(4 / 14, rel=1e-2) and subtracted.warnings == []
    left = _judged(_good(), burnin=500, traces={"bias": bias})
    assert left.diagnostics["bias_share"] == pytest.approx(4 / 10, rel=1e-2) and codes(left) == ["step-size"]
    for unknown in (_judged(_good()), _judged(_good() - 11, bias=1.0)):
        assert unknown.diagnostics["bias_share"] is None


def test_metropolis_adjusted_chains() -> None:
    """Acceptance and step size of each; nothing is said about step size or bias, which there is none of."""
    result = _metropolis(0.3)
    assert result.warnings == [] and result.diagnostics["acceptance"] == pytest.approx(0.525)
    assert result.diagnostics["acceptance_per_chain"] == pytest.approx([0.6, 0.6, 0.3, 0.6])
    assert result.diagnostics["lr_per_chain"] == [0.04] * 4


def test_localization_makes_chains_relax() -> None:
    """Where γ holds w more than the loss does, chains relax at its rate; in other metrics it is not known."""
    table = _table(curvature=1.0, squared_curvature=2.0)
    held = _judged(_good(), table=table, localization=100.0)
    assert held.warnings == [] and held.diagnostics["relaxations"] == pytest.approx(0.5e-3 * (2 + 100) * 2000)
    other = _judged(_good(), table=table, localization=100.0, euclidean=False)
    assert other.diagnostics["relaxations"] == pytest.approx(0.5e-3 * 2 * 2000)


def test_diverged_chains_are_left_out() -> None:
    """Of statistics of traces and of step checks; without any chain there is none, and no warning about λ̂."""
    trace, table = _good(), _table(distance=4.0, log_acceptance=0.0)
    trace[1, 100:] = math.nan
    table[1] = math.inf
    found = _judged(trace, table=table).diagnostics
    assert found["distance"] == [2.0] * 3 and found["acceptance"] == 1.0 and found["chains_diverged"] == 1
    assert found["r_hat"] == pytest.approx(convergence.r_hat(_good()[[0, 2, 3]]), rel=1e-9)
    nothing = _judged(np.full((3, 50), math.nan), bias=math.nan)
    assert codes(nothing) == ["diverged"]
    assert nothing.diagnostics["r_hat"] is None and nothing.diagnostics["distance"] == []


# --- Step checks: what they measure -------------------------------------------------------------------------


def test_where_steps_are_checked() -> None:
    """Among the draws from the first to the last; gradients are at most 2 % of the run's."""
    for schedule in (Schedule(1, 0), Schedule(5, 3, 7), Schedule(150, 0), Schedule(700, 100), Schedule(2000, 2000)):
        draws = range(schedule.num_steps)[schedule.draws]
        steps, with_gradients = check_steps(schedule)
        assert len(steps) == min(16, len(draws)) == len(set(steps)) and set(with_gradients) <= set(steps) <= set(draws)
        assert steps[0] == draws[0] and (len(steps) == 1 or steps[-1] == draws[-1])
        assert 3 * len(with_gradients) <= 0.02 * schedule.num_steps
        assert len(with_gradients) == len(set(with_gradients))
    assert len(with_gradients) == 16


@pytest.mark.parametrize("name", ["sgld", "preconditioned-sgld", "rmsprop-sgld"])
@pytest.mark.parametrize("chains", [1, 3])
def test_acceptance_is_the_plain_formula(name: str, chains: int) -> None:
    """log [π(w')·q(w | w') / π(w)·q(w' | w)] with the potentials and Gaussian densities written out, float64."""
    model, eps = mlp(torch.float64), 0.02
    x, y = data(dtype=torch.float64)
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    extra: dict[str, Any] = {"rmsprop-sgld": {"adapt_steps": 1, "eps": 0.3}}.get(name, {})
    given = {n: 0.5 + torch.rand(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    if name == "preconditioned-sgld":
        extra = {"preconditioner": given}
    sampler = make_sampler(name, lr=eps, nbeta=30.0, localization=2.0, weight_decay=0.7, **extra)
    source = make_source((x, y), 10, torch.device("cpu"))
    params = {"0.weight": mask, "2.weight": True}
    objective = Objective(model, nn.functional.mse_loss, source, device=torch.device("cpu"), params=params)
    plan = make_plan(objective, sampler, chains)
    state, feed = ChainState(objective.reference, objective.masks, sampler, chains), Feed(objective, 5, 0, chains, 0)
    state.start(0, 5)
    gradient, _ = make_gradient(plan, objective, state, {}, feed, 0)
    for step in range(3):
        gradient.evaluate(feed(step))
        gradient.move(step)
    # One draw, the last of 153 steps: enough for a step check with gradients.
    spec = RunSpec(objective, sampler, Schedule(1, 3, 150), plan, 5)
    traces = spec.blank_traces(range(chains))
    checks = StepChecks(objective, sampler, plan, spec.schedule, state, gradient, feed, 5, traces)
    (last,) = checks.places
    before = state.w.clone()
    checks.take(last, feed(last))
    assert torch.equal(state.w, before)

    for c in range(chains):
        w = state.single(c)
        indices = source.sample_indices(NoiseKey(5, step=last, chain=c), source.index_buffer(1))
        elsewhere = source.sample_indices(NoiseKey(5, step=last + 2**32, chain=c), source.index_buffer(1))

        def potential(w: dict[str, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
            xs, ys = source.gather(indices)
            loss = nn.functional.mse_loss(torch.func.functional_call(model, w, (xs,)), ys)
            away = sum((w[n] - objective.reference[n]).square().sum() for n in w)
            return 30.0 * loss + away + 0.35 * sum(v.square().sum() for v in w.values()), loss

        def gradients(w: dict[str, Tensor], indices: Tensor, of: int) -> list[Tensor]:
            w = {n: v.detach().clone().requires_grad_() for n, v in w.items()}
            return list(torch.autograd.grad(potential(w, indices)[of], list(w.values())))

        noise = normals(0, state.w.shape[1], NoiseKey(5, last, c, 7), dtype=torch.float64)
        p, xi = [], []
        for k, (n, v) in enumerate(w.items()):
            start = 0 if k == 0 else 16  # 12 elements, then a new cache line
            xi.append(noise[start : start + v.numel()].view(v.shape))
            if name == "rmsprop-sgld":
                p.append(1 / (state.states[0][c, start : start + v.numel()].view(v.shape).sqrt() + 0.3))
            else:
                p.append(given[n] if extra else torch.ones_like(v))
        moving = [mask, torch.ones_like(w["2.weight"], dtype=torch.bool)]
        drift = gradients(w, indices, 0)
        new = {
            n: torch.where(m, v - eps / 2 * q * g + (eps * q).sqrt() * z, v)
            for (n, v), q, g, z, m in zip(w.items(), p, drift, xi, moving, strict=True)
        }

        def log_density(to: dict[str, Tensor], at: dict[str, Tensor], p: Any, g: Any, moving: Any) -> Tensor:
            parts = zip(to.values(), at.values(), p, g, moving, strict=True)
            return sum(-((a - b + eps / 2 * q * f)[m] ** 2 / (2 * eps * q[m])).sum() for a, b, q, f, m in parts)

        back = gradients(new, indices, 0)
        with torch.no_grad():
            expected = float(
                potential(w, indices)[0]
                - potential(new, indices)[0]
                + log_density(w, new, p, back, moving)
                - log_density(new, w, p, drift, moving)
            )
        row = dict(zip(COLUMNS, traces.checks[c, 0], strict=True))
        assert abs(expected) > 1e-4 and row["log_acceptance"] == pytest.approx(expected, rel=1e-9)
        here, there = gradients(w, indices, 1), gradients(w, elsewhere, 1)
        parts = list(zip(p, drift, here, there, moving, strict=True))
        variance = sum(0.5 * 900 * float((q * (g - h) ** 2)[m].sum()) for q, _, g, h, m in parts)
        assert row["gradient_noise"] == pytest.approx(variance, rel=1e-9)
        away = sum(float((w[n] - objective.reference[n])[m].square().sum()) for n, m in zip(w, moving, strict=True))
        assert row["distance"] == pytest.approx(away, rel=1e-9)


class _Means(nn.Module):
    """L(w) = ½ Σ_j h_j·mean_i (w_j − x_ij)²: its minibatch gradients have additive noise."""

    def __init__(self, start: Tensor, curvature: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)
        self.register_buffer("curvature", curvature)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((self.w - x).square() * self.curvature).sum(dim=1)


def test_bias_and_gradient_noise_of_a_quadratic() -> None:
    """Stationary variance (1 + εN/4)/(a(1 − εa/4)) with noise N = nβ²·Var(g): bias is the excess over 1/a."""
    n, size, nbeta, gamma, count = 4096, 16, 100.0, 1.0, 100
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, count, generator=generator)
    h = torch.linspace(0.5, 1.0, count)
    a = nbeta * h.double() + gamma
    lr = 0.3 / float(a.max())
    noise = nbeta**2 * h.double() ** 2 * x.double().var(dim=0) / size * (1 - size / n)
    excess = lr / 4 * (noise + a) / (1 - lr * a / 4)
    exact = 0.5 * nbeta * h.double() / a * (1 + excess)
    share = float((0.5 * nbeta * h.double() / a * excess).sum() / exact.sum())
    result = llc_fast.estimate_llc(
        _Means(x.mean(dim=0), h),
        (x, torch.zeros(n)),
        lambda output, _: output.mean(),
        lr=lr,
        nbeta=nbeta,
        num_draws=1500,
        num_burnin=100,
        batch_size=size,
        progress=False,
    )
    found = result.diagnostics
    ratio = lr / 4 * float(noise.mean())
    assert found["bias_share"] * result.llc_mean / float(exact.sum()) == pytest.approx(share, rel=0.02)
    # 16 step checks of 4 chains with 100 directions of squared normals each: √(2/6400) = 1.8 %.
    assert found["gradient_noise_share"] == pytest.approx(ratio / (1 + ratio), rel=0.05)
    stiffness = float(((nbeta * h.double()) ** 2).sum() / (nbeta * h.double()).sum())
    assert found["relaxations"] == pytest.approx(lr / 2 * (stiffness + gamma) * 1500, rel=0.05)
    (warning,) = [w for w in result.warnings if w.code == "step-size"]
    assert f"bias is {found['bias_share']:.0%} of λ̂" in warning


@pytest.mark.parametrize(("count", "stiffness"), [(1000, 0.2), (100, 0.2), (50, 1.0)])
def test_acceptance_and_bias_of_many_equal_directions(count: int, stiffness: float) -> None:
    """log α = (h/8)·Σ(u² − u'²) with h = εa and u = √a·w of variance s² = 1/(1 − h/4); the share of bias is εa/4.

    u' follows the same law as u, with correlation 1 − h/2, so for many directions log α is N(0, v) and acceptance
    ½ + exp(v/2)·Φ(−√v), v = P·(h²/64)·4s⁴·(1 − (1 − h/2)²).
    """
    nbeta = 100.0
    result = run(Quadratic(torch.ones(count)), lr=stiffness / 101, nbeta=nbeta, num_chains=4, num_draws=1500)
    found = result.diagnostics
    variance = count * stiffness**2 / 16 / (1 - stiffness / 4) ** 2 * (1 - (1 - stiffness / 2) ** 2)
    expected = 0.5 + 0.5 * math.exp(variance / 2) * math.erfc(math.sqrt(variance / 2))
    # 16 step checks of 4 chains, each a value between 0 and 1 with a standard deviation below 0.4.
    assert abs(found["acceptance"] - expected) < 4 * 0.4 / 8
    assert found["bias_share"] == pytest.approx(stiffness / 4, rel=1e-3)  # the ratio of two sums that move together
    assert found["gradient_noise_share"] == 0
    assert bool(result.warnings) == (stiffness == 1.0), result.warnings


def test_localization_adds_no_bias_to_the_loss() -> None:
    """Flat directions that only γ holds have a large drift and no loss: no bias comes from them."""
    h = torch.cat([torch.ones(10), torch.zeros(500)])
    found = run(Quadratic(h), lr=2e-3, nbeta=100.0, num_draws=1500, localization=50.0).diagnostics
    share = 2e-3 * 150 / 4
    assert found["bias_share"] == pytest.approx(share, rel=1e-3)


def test_bias_of_every_sampler_that_supports_it() -> None:
    """With momentum too, where step checks measure nothing of the kind; None of samplers that do not."""
    h = torch.ones(20)
    for name, options in (("sgld", {}), ("sghmc", {"momentum_decay": 0.5}), ("rmsprop-sgld", {"eps": 1.0})):
        found = run(Quadratic(h), sampler=name, sampler_options=options, lr=2e-3, nbeta=100.0, num_draws=1500)
        assert 0 < found.diagnostics["bias_share"] < 0.3, name
    for name in ("adam-sgld", "sgnht"):
        found = run(Quadratic(h), sampler=name, lr=1e-4, nbeta=100.0, num_draws=100)
        assert found.bias_trace is None and found.diagnostics["bias_share"] is None, name


def test_gradient_noise_from_a_loader() -> None:
    """A loader's batches can't be asked for twice: halves of one give the same variance, (1 − B/n)·S²/B."""
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, torch.zeros(64)), batch_size=8, shuffle=True)
    result = llc_fast.estimate_llc(
        _Means(x.mean(dim=0), torch.ones(40)),
        loader,
        lambda output, _: output.mean(),
        lr=2e-3,
        nbeta=100.0,
        num_draws=450,
        num_burnin=0,
        progress=False,
    )
    ratio = 2e-3 / 4 * 100**2 * float(x.var(dim=0).mean()) / 8 * (1 - 8 / 64)
    # Three step checks of four chains with 40 squared normals each: √(2/480) = 6 %.
    assert result.diagnostics["gradient_noise_share"] == pytest.approx(ratio / (1 + ratio), rel=0.25)


# --- Step checks: what they leave alone ---------------------------------------------------------------------


class _Custom(torch.utils.data.Dataset[Any]):
    """Reading draws random numbers, so that it can't be read twice."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x[k] + 0.01 * torch.randn(3), y[k]


_RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "replayed": lambda: {"strategy": "sequential"},
    "batched": lambda: {"strategy": "batched"},
    "masked": lambda: {"params": {"0.weight": torch.tensor([[True], [False], [True], [True]]), "2.bias": True}},
    "float64": lambda: {"model": mlp(torch.float64), "data": data(dtype=torch.float64)},
    "microbatches": lambda: {"microbatch_size": 4},
    "rmsprop": lambda: {"sampler": "rmsprop-sgld"},
    "rmsprop, relative": lambda: {"sampler": "rmsprop-sgld", "sampler_options": {"relative_eps": True}},
    "adam": lambda: {"sampler": "adam-sgld"},
    "sghmc": lambda: {"sampler": "sghmc"},
    "sgnht": lambda: {"sampler": "sgnht"},
    "released": lambda: {"release_gradients": True},
    "dropout": lambda: {"model": nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))},
    "batch norm": lambda: {"model": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))},
    "loader": lambda: {"data": DataLoader(TensorDataset(*data()), batch_size=10, shuffle=True), "batch_size": None},
    "augmented": lambda: {"data": _Custom(), "strategy": "sequential"},
    "augmented, batched": lambda: {"data": _Custom(), "strategy": "batched"},
}


@pytest.mark.parametrize("name", [*_RUNS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_step_checks_do_not_disturb_the_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and parameters, bit for bit, as without any step check, though they did measure."""

    def found() -> LLCResult:
        torch.manual_seed(0)
        watched = {} if "batched" in name else {"observables": {"w": lambda d: next(iter(d.params.values()))}}
        return estimate(**{"num_draws": 150, "num_burnin": 2} | watched | _RUNS.get(name, lambda: {"strategy": name})())

    checked = found()
    with monkeypatch.context() as patch:
        patch.setattr(step_checks, "MAX_CHECKS", 0)
        plain = found()
    assert_same(checked, plain)
    measured = checked.diagnostics
    assert len(measured["distance"]) == 3 and plain.diagnostics["distance"] == []
    langevin = name not in ("adam", "sghmc", "sgnht", "released", "batch norm")
    assert (measured["acceptance"] is not None) == langevin
    assert (measured["gradient_noise_share"] is not None) == (langevin or name == "sghmc")


def test_acceptance_only_of_langevin_steps() -> None:
    """A box, noise of another level or losses rounded to bfloat16 have none, and what remains is measured."""
    for options in (
        {"sampler_options": {"bounding_box_size": 0.1}},
        {"sampler_options": {"noise_level": 0.5}},
        {"autocast": torch.bfloat16},
    ):
        found = estimate(num_draws=150, **options).diagnostics
        assert found["acceptance"] is None and found["gradient_noise_share"] > 0


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_step_checks_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """The diagnostics of a resumed run are those of one that never stopped, to the last bit."""
    options: dict[str, Any] = {"num_draws": 700, "num_burnin": 10, "strategy": strategy, "checkpoint": tmp_path / "run"}
    with interrupted_after(400):
        partial = estimate(**options)
    assert partial.is_partial
    resumed = estimate(**options)
    del options["checkpoint"]
    whole = estimate(**options)
    assert_same(resumed, whole)
    passing = {"resumed_steps", "seconds_of_setup"}
    for name in whole.diagnostics.keys() - passing:
        assert resumed.diagnostics[name] == whole.diagnostics[name], name
    assert resumed.warnings == whole.warnings and whole.diagnostics["acceptance"] is not None


# --- Step sizes and models ----------------------------------------------------------------------------------


def _regression() -> tuple[nn.Module, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator) + 0.5 * torch.randn(1000, 1, generator=generator)
    model = nn.Linear(8, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T.clone()
    return model, (x, y), nn.functional.mse_loss


def _deep_linear() -> tuple[nn.Module, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 6, generator=generator)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    for k, layer in enumerate(model):
        weight = torch.randn(6, 6, generator=generator) / math.sqrt(6)
        layer.weight.data = weight * (torch.arange(6) < 3) if k == 1 else weight
    return model, (x, model(x).detach()), nn.functional.mse_loss


def _classifier() -> tuple[nn.Module, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    logits = x @ torch.randn(3, 3, generator=generator)
    y = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    model = nn.Linear(3, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return model, (x, y), nn.functional.cross_entropy


_MODELS = {"regression": _regression, "deep linear": _deep_linear, "classifier": _classifier}


@pytest.mark.parametrize("name", _MODELS)
def test_step_sizes_that_are_wrong(name: str) -> None:
    """A hundred times too large or too small always has a warning, ten times too large as well."""
    model, inputs, loss_fn = _MODELS[name]()
    options: dict[str, Any] = {"num_draws": 800, "batch_size": 200, "progress": False}
    chosen = llc_fast.estimate_llc(model, inputs, loss_fn, **options | {"num_draws": 1}).settings["lr"]
    for factor, expected in ((100, {"diverged", "step-size"}), (10, {"diverged", "step-size"}), (0.01, {"short"})):
        result = llc_fast.estimate_llc(model, inputs, loss_fn, lr=factor * chosen, **options)
        assert any(w.code in expected and "lr=" in w for w in result.warnings), (factor, result.warnings)


@pytest.mark.parametrize("name", ["regression", "classifier"])
def test_default_settings_on_a_good_model(name: str) -> None:
    """No warning, good convergence, and a bias that may be subtracted."""
    model, inputs, loss_fn = _MODELS[name]()
    result = llc_fast.estimate_llc(model, inputs, loss_fn, progress=False)
    assert result.warnings == []
    found = result.diagnostics
    assert found["r_hat"] < 1.02 and found["ess_bulk"] > 300
    assert 0 < found["bias_share"] < 0.2 and found["relaxations"] > 100


def test_a_place_that_is_no_minimum() -> None:
    """Chains that run downhill: λ̂ is negative, and the model is what to change."""
    result = estimate(num_draws=500, num_burnin=100, lr=1e-2)
    assert result.llc_mean < 0 and "negative" in codes(result)


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = data()
        while True:
            yield from zip(x, y, strict=True)


def test_noise_of_the_initial_loss() -> None:
    """L(w*) over some batches has a standard error, which is part of that of λ̂, after a file too."""
    result = llc_fast.estimate_llc(
        mlp(),
        DataLoader(_Endless(), batch_size=8),
        nn.functional.mse_loss,
        lr=1e-3,
        nbeta=100.0,
        num_draws=40,
        num_burnin=4,
        progress=False,
    )
    error = result.diagnostics["init_loss_stderr"]
    x, y = data()
    with torch.no_grad():
        losses = (mlp()(x) - y).square().reshape(5, 8).mean(dim=1).double()
    shares = torch.full((44,), 1 / 44, dtype=torch.float64)
    seen = losses.repeat(9)[:44]
    expected = math.sqrt(float((shares * (seen - seen.mean())).square().sum() * 44 / 43))
    assert error == pytest.approx(expected, rel=1e-4)
    plain = errors.standard_error(result.kept_draws).value
    assert result.llc_stderr == pytest.approx(math.hypot(plain, 100 * error))
    whole = estimate(num_draws=40)
    assert 0 < whole.diagnostics["init_loss_stderr"] < 1e-6 * whole.init_loss


def test_summary_and_files(tmp_path: Path) -> None:
    """One line holds what matters most; files keep all."""
    for corrected, word in ((False, "bias "), (True, " (subtracted)")):
        options: dict[str, Any] = {"heat_correction": corrected, "num_draws": 160, "num_burnin": 0}
        result = run(Quadratic(torch.ones(20)), lr=2e-4, nbeta=100.0, **options)
        (line,) = [line for line in result.summary().splitlines() if "R̂ = " in line]
        assert all(part in line for part in ("ESS = ", "trend ", "acceptance ", "gradient noise ", word)), line
        result.save(tmp_path / "result.npz")
        loaded = LLCResult.load(tmp_path / "result.npz")
        assert loaded.diagnostics == result.diagnostics and loaded.summary() == result.summary()
        assert codes(loaded) == codes(result) != []
        json.dumps(result.diagnostics, allow_nan=False)
