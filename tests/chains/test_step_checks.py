"""Step checks: what they measure, and that they leave the chain alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_forms import Quadratic, run
from runs import assert_same, data, estimate, interrupted_after, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import llc_fast
from llc_fast.chains import step_checks
from llc_fast.chains.group import RunSpec
from llc_fast.chains.step_checks import StepChecks, check_steps
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
from llc_fast.stats.step_checks import COLUMNS

# --- What they measure --------------------------------------------------------------------------------------


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
    checks = StepChecks(objective, sampler, plan, spec.check_steps, state, gradient, feed, 5, traces)
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
        localization=gamma,
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


# --- What they leave alone ----------------------------------------------------------------------------------


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
