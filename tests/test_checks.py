"""Warnings: one for each reason, none on good runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Quadratic, run
from numpy.typing import NDArray
from runs import codes, data, estimate, mlp
from series import ar1
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import llc_fast
from llc_fast import checks
from llc_fast.checks import CODES, Facts, examine
from llc_fast.objective.curvature import Descent
from llc_fast.result import LLCResult
from llc_fast.schedule import Schedule
from llc_fast.stats import convergence, errors
from llc_fast.stats.step_checks import COLUMNS
from llc_fast.stats.wells import Wells

Traces = NDArray[np.float64]

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


@pytest.mark.parametrize(
    ("chains", "draws", "burnin", "phi"),
    [(4, 1200, 800, 0.8), (2, 1000, 0, 0.5), (4, 400, 100, 0.0), (8, 500, 0, 0.6)],
)
def test_false_alarms(chains: int, draws: int, burnin: int, phi: float) -> None:
    """Fewer than one of a hundred runs that mix well are warned about; Gaussian and chi-square draws."""
    rng, count = np.random.default_rng(5), 200
    series = ar1(rng, chains * count, draws + burnin, phi).reshape(count, chains, -1)
    warned = [_judged(10 + math.sqrt(10) * x, burnin).warnings for x in series[: count // 2]]
    warned += [_judged(5 * x**2, burnin).warnings for x in series[count // 2 :]]
    assert sum(map(bool, warned)) <= 0.01 * count, [w for w in warned if w]


@pytest.mark.parametrize(("noise", "chains", "draws"), [(0.0, 4, 1000), (0.0, 8, 500), (3.0, 4, 2000), (3.0, 2, 1000)])
def test_false_alarms_of_slow_motion(chains: int, draws: int, noise: float) -> None:
    """Fewer than one of a hundred, of chains whose slow part is worth 400 independent draws, with noise or without."""
    rng, count = np.random.default_rng(11), 200
    times = chains * draws / 400
    series = ar1(rng, chains * count, draws, (times - 1) / (times + 1)).reshape(count, chains, -1)
    results = [_judged(10 + 2 * (x + noise * rng.standard_normal(x.shape))) for x in series]
    assert sum("slow" in codes(result) for result in results) <= 0.01 * count


def _good() -> Traces:
    return 10 + ar1(np.random.default_rng(6), 4, 2000, 0.5)


def _slow_beneath_noise() -> Traces:
    """For R̂ and the effective draws the noise alone, which is nine times the variance of what it hides."""
    rng = np.random.default_rng(8)
    return ar1(rng, 4, 2000, 0.996) + 3 * rng.standard_normal((4, 2000))


def _doublings() -> Traces:
    """A step up at each doubling of the length, by ever less: 0.4, 0.5, 0.6, … below the last level."""
    steps = np.arange(1, 2001)
    return -1.2 * np.sqrt(2.0) ** np.floor(np.log2(2000 / steps).clip(0, 6))


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


_FOUR = Descent((4 * 9 / 100**2 * 2,), (0.08,))
"""½·nβ²·(g·u)²/(nβh + γ) = 4 at nβ = 100 and γ = 1."""
_STANDING = {"curvature": 1.0, "squared_curvature": 4.0}
_REASONS: dict[str, tuple[str, Callable[[], LLCResult], list[str]]] = {
    "dropout": (
        "training-mode",
        lambda: _judged(_good(), random_modules=["a", "b", "c", "d"]),
        ["training mode", "(a, b, c, …)", "model.eval()"],
    ),
    "no running statistics": (
        "batch-statistics",
        lambda: _judged(_good(), batch_statistics=["norm"]),
        ["evaluation mode", "(norm)", "track_running_stats=True"],
    ),
    "no gradient": (
        "no-gradient",
        lambda: _judged(_good(), not_sampled={"table.weight": 3, "gate": 1}),
        ["4 elements", "(table.weight, gate", "stayed at w*", "params="],
    ),
    "max_norm": (
        "writes-parameters",
        lambda: _judged(_good(), writes_parameters=True),
        ["writes to its parameters", "projected", "parametrization"],
    ),
    **{
        code: (
            code,
            lambda code=code: _judged(_good(), data_notes={code: f"what {code} means"}),
            [f"what {code} means"],
        )
        for code in ("unshuffled", "dropped", "num-samples", "irreproducible")
    },
    "another gradient": (
        "gradient",
        lambda: _judged(_good(), table=_table(rise=-1.0, work=1.0)),
        ["by 200%", "maximum 50%", "derivative", "lr=0.0001"],
    ),
    "another average": (
        "standing-still",
        lambda: _judged(_good(), standing=(-3.2, 0.1)),
        ["λ̂ = -3.2 ± 0.1, not 0", "not the same average"],
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
    "interrupted in calibration": (
        "partial",
        lambda: _judged(_good(), steps_done=[0] * 4, in_calibration=True),
        ["interrupted in calibration", "lr=0.001 is what pilot chains had found"],
    ),
    "no minimum": (
        "no-minimum",
        lambda: _judged(_good(), descent=_FOUR),
        [
            "nβ = 100: following the gradient",
            "by 4 or more, and nβ·L by 4.4: λ̂ = 10",
            "about 14.5 at a minimum",
        ],
    ),
    "ways out": (
        "no-minimum",
        lambda: _judged(_good(), descent=_FOUR),
        ["Use refine=True", 'loss_fn="behavioral"', "nbeta=24, at which w* is one"],
    ),
    "no better minimum": (
        "no-minimum",
        lambda: _judged(_good(), descent=_FOUR, refining_passes=20),
        ["at a minimum. Use refine=80, for more passes over the data than 20", "behavioral"],
    ),
    "falling loss": (
        "no-minimum",
        lambda: _judged(_good() - 8 * np.exp(-np.arange(2000) / 150) - 6, burnin=1000),
        ["along the chains nβ·L falls to 1.", "below that of w*: λ̂ = 3.9", "or train the model to convergence"],
    ),
    "far": (
        "far",
        lambda: _judged(_good(), table=_table(distance=400.0), local_localization=53.0),
        ["·‖w*‖ away from w* (maximum 1)", "Use localization=53"],
    ),
    "full disk": (
        "checkpoint",
        lambda: _judged(_good(), checkpoint_problem="no space on disk"),
        ["could not be written (no space on disk)", "last good one"],
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
        lambda: _judged(10 + 0.1 * ar1(np.random.default_rng(7), 4, 2000, 0.995)),
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
    "slow in all chains": (
        "unresolved",
        lambda: _judged(_good() + _doublings(), burnin=1000),
        ["with each doubling of the chains", "too low by up to", "max_gradients=32000"],
    ),
    "flat at w*": (
        "unresolved",
        lambda: _judged(_good(), wells=Wells((1e-3,), (100.0,)), time_of_step=1e-3),  # 50·(0.1/1.1)·0.404
        ["By the curvature at w*, 2000 steps", "λ̂ lacks about 1.8", "larger localization"],
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
    _, table, _ = checks.__doc__.split("=================  " + "=" * 101)
    assert tuple(line.split()[0] for line in table.strip().splitlines()) == CODES
    assert {code for code, _, _ in _REASONS.values()} == set(CODES) and len(set(CODES)) == len(CODES)


def test_warnings_that_say_the_same_are_given_once() -> None:
    """Chains that have hardly moved have no trend to speak of; those that disagree no effective sample size."""
    assert codes(_judged(_good() + np.linspace(-1, 1, 2000), table=_table(**_STANDING))) == ["short"]
    assert codes(_judged(10 + 0.1 * ar1(np.random.default_rng(7), 4, 2000, 0.995))) == ["rhat"]
    few = _judged(_good()[:, :20] - 11, unused_parameters=["bias"])
    assert codes(few) == ["unused", "ess"]  # of so few draws nothing else can be said
    assert codes(_metropolis(0.05, target_acceptance=0.8)) == ["acceptance"]


def test_a_good_run() -> None:
    """A good trace with good step checks: low acceptance and gradient noise alone are no reason."""
    table = _accepted(math.exp(-0.5), distance=0.25, curvature=1.0, squared_curvature=100.0)
    result = _judged(_good(), bias=0.4, table=table)
    assert result.warnings == []
    found = result.diagnostics
    assert found["bias_share"] == pytest.approx(0.04, rel=1e-2)
    assert found["acceptance"] == pytest.approx(math.exp(-0.5))
    assert found["distance"] == [0.5] * 4 and found["distance_over_prior"] == pytest.approx(0.25 / 40)
    assert found["reach"] == pytest.approx(math.sqrt(40)) and found["localization_slope"] is None
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


class _Tilted(nn.Module):
    """L = Σ h·w²/2 + g·w with curvatures and slopes of one's own; w* = 0 beside a weight of size."""

    def __init__(self, curvature: list[float], slope: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((len(curvature),), 2.0, dtype=torch.float64))
        self.h, self.g = torch.tensor(curvature, dtype=torch.float64), torch.tensor(slope, dtype=torch.float64)

    def forward(self, _: Tensor) -> Tensor:
        away = self.w - 2.0
        return (0.5 * self.h * away.square() + self.g * away).sum()


def test_how_lambda_answers_to_localization() -> None:
    """Of a quadratic loss λ̂ = ½Σ nβh/(nβh + γ), so dλ̂/dlog γ = −½Σ nβhγ/(nβh + γ)², here by exact draws."""
    h, nbeta, gamma = [0.0, 0.02, 0.3, 1.0, 5.0], 20.0, 4.0
    model = _Tilted(h, [0.0] * len(h))
    result = llc_fast.estimate_llc(
        model,
        (torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)),
        lambda output, target: output,
        sampler="hmc",
        nbeta=nbeta,
        localization=gamma,
        num_draws=3000,
        num_burnin=500,
        progress=False,
    )
    known = -0.5 * sum(nbeta * a * gamma / (nbeta * a + gamma) ** 2 for a in h)
    found = result.diagnostics
    assert abs(found["localization_slope"] - known) < 4 * found["localization_slope_stderr"] < 0.3 * abs(known)
    squared = result.traces["squared_distance"][:, result.schedule.draws]
    expected = sum(1 / (nbeta * a + gamma) for a in h)
    assert abs(squared.mean() - expected) < 4 * errors.standard_error(squared).value < 0.2 * expected
    assert f"γ = 4, a prior width of {math.sqrt(5 / 4) / math.sqrt(20):.2g} times" in result.summary()


def _mean_excess(steps: int, burnin: int, lr: float, curvature: float, gamma: float) -> float:
    """½·nβh·E[x²] of one direction over the draws of SGLD that starts at w*, exact for steps of any size."""
    variance, total = 0.0, 0.0
    for step in range(steps):
        total += 0.5 * curvature * variance * (step >= burnin)
        variance = (1 - 0.5 * lr * (curvature + gamma)) ** 2 * variance + lr
    return total / (steps - burnin)


def _around_flat(flat: int, lr: float, **options: Any) -> LLCResult:
    """Twenty directions at nβh = γ = 4, and so many that the loss does not see."""
    model, inputs = _Tilted([0.2] * 20 + [0.0] * flat, [0.0] * (20 + flat)), torch.zeros(2, 1, dtype=torch.float64)
    given = {"nbeta": 20.0, "localization": 4.0, "lr": lr, "num_burnin": 300, **options}
    return llc_fast.estimate_llc(model, (inputs, inputs), lambda o, _: o, progress=False, **given)


@pytest.mark.parametrize(("lr", "chains"), [(0.05, 16), (1e-4, 64)], ids=["settled", "on their way"])
def test_how_lambda_answers_where_most_directions_are_flat(lr: float, chains: int) -> None:
    """In chains that have settled and in chains that have not: the derivative of what they find, exactly."""
    found = _around_flat(100, lr, num_chains=chains, num_draws=1200).diagnostics
    low, high = (20 * _mean_excess(1500, 300, lr, 4.0, 4.0 * push) for push in (0.999, 1.001))
    known = (high - low) / 2e-3
    assert abs(found["localization_slope"] - known) < 4 * found["localization_slope_stderr"]
    assert lr < 0.05 or found["localization_slope_stderr"] < 0.2 * abs(known)


def test_an_answer_that_noise_hides_is_not_told() -> None:
    result = _around_flat(2000, 0.05, num_chains=2, num_draws=120)
    assert result.diagnostics["localization_slope"] is result.diagnostics["localization_slope_stderr"] is None
    assert "prior width" in result.summary() and "dλ̂/dlog γ" not in result.summary()


@pytest.mark.parametrize(
    "sampler", ["sgld", "preconditioned-sgld", "rmsprop-sgld", "adam-sgld", "sghmc", "sgnht", "mala"]
)
def test_every_sampler_says_how_far_it_is(sampler: str) -> None:
    """‖w − w*‖² of every step, where its loss was taken: 0 at the first, and by the draws' own parameters."""
    model = mlp()
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = estimate(
        model=model,
        sampler=sampler,
        batch_size=None if sampler == "mala" else 10,
        observables={"away": lambda draw: sum((p - reference[k]).square().sum() for k, p in draw.params.items())},
    )
    trace = result.traces["squared_distance"]
    assert (trace[:, 0] == 0).all() and np.isfinite(trace).all()
    np.testing.assert_allclose(trace[:, result.schedule.draws], result.observables["away"], rtol=1e-5)


@pytest.mark.parametrize(("lr", "burnin"), [(None, 300), (1e-2, 300)])
def test_a_tilted_place_is_said_to_be_no_minimum_first(lr: float | None, burnin: int) -> None:
    """What a gradient at w* means comes before any advice about step sizes; without one nothing is said."""
    h = [1.0, 2.0, 4.0]
    options: dict[str, Any] = {"nbeta": 20.0, "localization": 1.0, "num_draws": 300, "num_burnin": burnin, "lr": lr}
    inputs = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    tilted = llc_fast.estimate_llc(_Tilted(h, [1.0, 0.0, -1.0]), inputs, lambda o, _: o, progress=False, **options)
    known = 0.5 * 20.0**2 * (1 / 21 + 1 / 81)
    assert tilted.diagnostics["descent"] == pytest.approx(known, rel=1e-4)
    assert codes(tilted)[0] == "no-minimum" and "above-bound" not in codes(tilted)
    # By as much as nβ·L falls to where the chains' mean is, λ̂ is lower than at a minimum.
    fall = 20.0**2 * ((1 - 0.5 * 20 / 21) / 21 + (1 - 0.5 * 80 / 81) / 81)
    assert tilted.diagnostics["descent_loss"] == pytest.approx(fall, rel=1e-4)
    level_llc = 0.5 * sum(20 * a / (20 * a + 1) for a in h)
    assert abs(tilted.llc_mean - (level_llc - fall)) < 4 * tilted.llc_stderr + 0.1
    assert 0.8 * (fall - level_llc) < tilted.diagnostics["fall"] < 1.2 * fall
    assert f"nβ·L by {fall:.2g}" in tilted.warnings[0]
    level = llc_fast.estimate_llc(_Tilted(h, [0.0] * 3), inputs, lambda o, _: o, progress=False, **options)
    assert level.diagnostics["descent"] == level.diagnostics["fall"] == 0 and "no-minimum" not in codes(level)


@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0])
def test_chains_of_the_default_localization_stay_near(scale: float) -> None:
    """Draws are half of ‖w*‖ away where the loss is flat, in any units of the weights; further away they warn."""
    model = _Tilted([0.0] * 20, [1e-12] * 20)
    with torch.no_grad():
        model.w.mul_(scale / 2)
    inputs = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.1 * scale**2, "nbeta": 1.0, "num_draws": 2000, "progress": False}
    result = llc_fast.estimate_llc(model, inputs, lambda o, _: o, **options)
    assert result.settings["localization"] == pytest.approx(4 / scale**2, rel=1e-3)
    assert result.diagnostics["reach"] == pytest.approx(0.5, rel=1e-3)
    assert result.diagnostics["distance_over_reference"] == pytest.approx(0.5, rel=0.3)
    assert "far" not in codes(result)
    wide = llc_fast.estimate_llc(model, inputs, lambda o, _: o, localization=0.1 / scale**2, **options)
    assert "far" in codes(wide) and wide.diagnostics["distance_over_reference"] > 1


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = data()
        while True:
            yield from zip(x, y, strict=True)


def test_noise_of_the_initial_loss() -> None:
    """Where draws are evaluated at w* too, L(w*) is their mean there, and adds nothing but rounding to λ̂'s error."""
    result = llc_fast.estimate_llc(
        mlp(),
        DataLoader(_Endless(), batch_size=8),
        nn.functional.mse_loss,
        lr=1e-3,
        nbeta=100.0,
        num_draws=40,
        num_burnin=5,
        progress=False,
    )
    x, y = data()
    with torch.no_grad():
        losses = (mlp()(x) - y).square().reshape(5, 8).mean(dim=1).double()
    assert result.init_loss == pytest.approx(float(losses.mean()), rel=1e-6)  # 40 draws are 8 times all five
    error = result.diagnostics["init_loss_stderr"]
    assert error == pytest.approx(0.5 * torch.finfo(torch.float32).eps * result.init_loss)
    plain = errors.standard_error(result.kept_draws).value
    assert result.llc_stderr == pytest.approx(math.hypot(plain, 100 * error))
    whole = estimate(num_draws=40)
    assert 0 < whole.diagnostics["init_loss_stderr"] < 1e-6 * whole.init_loss


def test_summary_and_files(tmp_path: Path) -> None:
    """One line holds what matters most; files keep all."""
    for corrected, word in ((False, "bias "), (True, " (subtracted)")):
        options: dict[str, Any] = {"bias_correction": corrected, "num_draws": 160, "num_burnin": 0}
        result = run(Quadratic(torch.ones(20)), lr=2e-4, nbeta=100.0, **options)
        (line,) = [line for line in result.summary().splitlines() if "R̂ = " in line]
        assert all(part in line for part in ("ESS = ", "trend ", "acceptance ", "gradient noise ", word)), line
        result.save(tmp_path / "result.npz")
        loaded = LLCResult.load(tmp_path / "result.npz")
        assert loaded.diagnostics == result.diagnostics and loaded.summary() == result.summary()
        assert codes(loaded) == codes(result) != []
        json.dumps(result.diagnostics, allow_nan=False)
