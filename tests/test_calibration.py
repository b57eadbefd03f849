"""Heat, what is subtracted for it, and the settings that pilot chains choose by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Quadratic, crossing_mean, run
from processes import all_well, launch
from runs import arguments, assert_same, codes, data, estimate, interrupted_after, mlp, mse, no_step
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, TensorDataset

import llc_fast
from llc_fast import calibration
from llc_fast import estimate as estimate_module
from llc_fast.calibration import MIN_FRICTION, MIN_GAIN, speed_over
from llc_fast.chains.draw import Draw
from llc_fast.chains.group import RunSpec
from llc_fast.chains.run import after_each_step, run_chains
from llc_fast.data import make_source
from llc_fast.gradients.plan import make_plan
from llc_fast.objective.objective import Objective
from llc_fast.problems import deep_linear
from llc_fast.problems.deep_linear import DeepLinearProblem, SizeClass
from llc_fast.result import LLCResult
from llc_fast.samplers import PreconditionedSGLDSampler, RMSpropSGLDSampler, SGHMCSampler, SGLDSampler, make_sampler
from llc_fast.schedule import Schedule
from llc_fast.traces import Traces

SIGMAS = 4.5


def _raw(result: LLCResult) -> float:
    """λ̂ without the correction."""
    assert result.bias_trace is not None
    return result.llc_mean + float(result.bias_trace[:, result.schedule.draws].mean())


def _assert_cleared(result: LLCResult, exact: float, *, precision: float = 0.01) -> None:
    """λ̂ is the closed form, and would not be without the correction."""
    assert result.llc_stderr < precision * exact
    assert abs(result.llc_mean - exact) < SIGMAS * result.llc_stderr, (result.llc_mean, result.llc_stderr, exact)
    assert _raw(result) - exact > 10 * result.llc_stderr


# --- the identity -------------------------------------------------------------------------------------------

_METRIC = torch.linspace(1.0, 0.5, 200)
_SAMPLERS: dict[str, dict[str, Any]] = {
    "sgld": {},
    "preconditioned-sgld": {"preconditioner": {"w": _METRIC}},
    "sghmc": {"momentum_decay": 0.3},
}


@pytest.mark.parametrize("localization", [1.0, 100.0])
@pytest.mark.parametrize("sampler", _SAMPLERS)
def test_large_steps_in_a_quadratic_well(sampler: str, localization: float) -> None:
    """Σ ½·nβh/(nβh + γ) at ε·(nβh_max + γ) = 1, also where γ holds as much as the loss."""
    h, nbeta = torch.linspace(0.2, 1.0, 200), 100.0
    stiffness = nbeta * h.double() + localization
    result = run(
        Quadratic(h),
        sampler=sampler,
        sampler_options=_SAMPLERS[sampler],
        lr=1 / float(stiffness.max()),
        nbeta=nbeta,
        localization=localization,
        num_draws=3000,
        num_burnin=500,
        bias_correction=True,
    )
    _assert_cleared(result, float((0.5 * nbeta * h.double() / stiffness).sum()))


@pytest.mark.parametrize("friction", [1.0, 0.2])
@pytest.mark.parametrize("num_draws", [3000, 300])
def test_directions_that_the_loss_does_not_see(num_draws: int, friction: float) -> None:
    """Thousands of flat directions held by γ alone, in equilibrium or not: no heat comes from them, and no noise."""
    h, nbeta, localization = torch.cat([torch.ones(10), torch.zeros(4000)]), 100.0, 4.0
    result = run(
        Quadratic(h),
        sampler="sghmc",
        sampler_options={"momentum_decay": friction},
        lr=1 / (nbeta + localization),
        nbeta=nbeta,
        localization=localization,
        num_draws=num_draws,
        num_burnin=100,
        bias_correction=True,
    )
    exact = 5 * nbeta / (nbeta + localization)
    assert result.llc_stderr < 0.06 * exact
    assert abs(result.llc_mean - exact) < SIGMAS * result.llc_stderr
    assert _raw(result) > 1.1 * exact


def _noisy_regression(n: int = 1000) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Label noise, the least-squares solution as w*, and the curvatures of the mean squared error."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 30, generator=generator) * torch.linspace(0.5, 1.0, 30)
    y = x @ torch.randn(30, 1, generator=generator) + 0.5 * torch.randn(n, 1, generator=generator)
    model = nn.Linear(30, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    return model, (x, y), torch.linalg.eigvalsh(2 * x.double().T @ x.double() / n)


@pytest.mark.parametrize(
    ("sampler", "options", "batch_size", "share"),
    [
        ("sgld", {}, 1000, 1.0),
        ("sgld", {}, 100, 0.3),
        ("preconditioned-sgld", {"preconditioner": 0.5}, 100, 0.6),
        ("sghmc", {"momentum_decay": 0.3}, 100, 0.3),
        ("rmsprop-sgld", {"eps": 1e-4, "relative_eps": True, "alpha": 0.9}, 100, None),
    ],
)
def test_noise_of_minibatches(sampler: str, options: dict[str, Any], batch_size: int, share: float | None) -> None:
    """Gradient noise that varies from place to place is cleared away whatever the sampler's metric and momentum."""
    model, samples, h = _noisy_regression()
    nbeta = llc_fast.default_nbeta(1000)
    stiffness = nbeta * h + 1.0
    # RMSprop's metric is 1/|g|, whose scale is its own: as chosen.
    lr = None if share is None else share / float(stiffness.max())
    result = llc_fast.estimate_llc(
        model,
        samples,
        mse,
        sampler=make_sampler(sampler, **options),
        lr=lr,
        bias_correction=True,
        localization=1.0,
        batch_size=batch_size,
        num_draws=4000,
        num_burnin=500 if share else 1500,
        progress=False,
    )
    _assert_cleared(result, float((0.5 * nbeta * h / stiffness).sum()), precision=0.02)


_CASES: dict[str, dict[str, Any]] = {
    "sgld": {},
    "masks": {"params": {"0.weight": torch.arange(12).view(4, 3) % 3 != 1, "2.*": True}},
    "decay": {"options": {"weight_decay": 0.7}},
    "microbatches": {"microbatch_size": 3},
    "released": {"release": True},
    "batched": {"strategy": "batched"},
    "metric": {
        "sampler": "preconditioned-sgld",
        "options": {"preconditioner": {f"{k}.{n}": 0.5 + k for k in (0, 2) for n in ("weight", "bias")}},
    },
    "momentum": {"sampler": "sghmc", "options": {"momentum_decay": 0.4, "weight_decay": 0.3}},
    "momentum, released": {"sampler": "sghmc", "options": {"momentum_decay": 0.4}, "release": True},
}


@pytest.mark.parametrize("name", _CASES)
def test_bias_of_every_step(name: str) -> None:
    """Against (ε/8)·Σ p·G·nβg, and with momentum Σ nβg·((ε/8)G − (1 − α)v/2)/α, from the parameters of each step."""
    case = {"options": {}, "release": None, "strategy": "sequential", "sampler": "sgld", "params": None}
    case |= {"microbatch_size": None} | _CASES[name]
    x, y = data(dtype=torch.float64)
    eps, nbeta, gamma, steps = 2e-3, 30.0, 5.0, 5
    source = make_source((x, y), 10, torch.device("cpu"), independent=True)
    objective = Objective(
        mlp(torch.float64), mse, source, device=torch.device("cpu"), params=case["params"],
        microbatch_size=case["microbatch_size"],
    )  # fmt: skip
    options = {"lr": eps, "nbeta": nbeta, "localization": gamma} | case["options"]
    sampler = make_sampler(case["sampler"], **options)
    seen: dict[int, list[dict[str, Tensor]]] = {0: [], 1: []}

    def keep(draw: Draw) -> float:
        seen[draw.chain].append({k: p.clone() for k, p in draw.params.items()} | {"": [t.clone() for t in draw.batch]})
        return 0.0

    plan = make_plan(objective, sampler, 2, strategy=case["strategy"], release_gradients=case["release"])
    assert plan.release == bool(case["release"])
    found = run_chains(
        RunSpec(objective, sampler, Schedule(steps, 0), plan, seed=3, observables={"keep": keep}), range(2)
    )
    bias = Traces.stack(found.traces).steps["bias"]
    decay, alpha = case["options"].get("weight_decay", 0.0), case["options"].get("momentum_decay", 1.0)
    metric = case["options"].get("preconditioner", {})
    rest = {k: p.detach() for k, p in mlp(torch.float64).named_parameters()}
    for chain, places in seen.items():
        before = {k: objective.reference[k] for k in objective.reference}
        for step, place in enumerate(places):
            inputs, target = place.pop("")
            at = {k: p.detach().requires_grad_() for k, p in place.items()}
            output = torch.func.functional_call(mlp(torch.float64), rest | at, (inputs,))
            grads = torch.autograd.grad(mse(output, target), list(at.values()))
            expected = 0.0
            for (k, w), g in zip(place.items(), grads, strict=True):
                moving = objective.masks.get(k, torch.ones_like(w, dtype=torch.bool))
                drift = nbeta * g + gamma * (w - objective.reference[k]) + decay * w
                momentum = w - before[k]  # of the step that led here
                felt = (eps / 8 * metric.get(k, 1.0) * drift - (1 - alpha) / 2 * momentum) / alpha
                expected += float((nbeta * g * felt)[moving].sum())
            assert bias[chain, step] == pytest.approx(expected, rel=1e-8), (chain, step)
            before = place


def test_ways_to_compute_a_gradient_agree() -> None:
    """Heat is the same to rounding, one chain after another, together, in pieces, and during the backward pass."""
    options: dict[str, Any] = {"bias_correction": True, "num_chains": 2}
    expected = estimate(strategy="sequential", **options)
    assert expected.bias_trace is not None and (expected.bias_trace != 0).all()
    for changed in (
        {"strategy": "batched"},
        {"microbatch_size": 4},
        {"strategy": "sequential", "release_gradients": True},
    ):
        found = estimate(**options, **changed)
        assert found.bias_trace is not None
        np.testing.assert_allclose(found.bias_trace, expected.bias_trace, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.loss_trace, expected.loss_trace, rtol=1e-4)


def test_what_is_subtracted() -> None:
    """The corrected trace is the plain one less heat/nβ; a step size of the user's own gets the plain one."""
    plain = estimate(batch_size=40)
    cleared = estimate(batch_size=40, bias_correction=True)  # a full batch: the same chain
    assert not plain.settings["bias_correction"] and cleared.settings["bias_correction"]
    assert plain.bias_trace is not None and cleared.bias_trace is not None
    np.testing.assert_array_equal(plain.bias_trace, cleared.bias_trace)
    np.testing.assert_array_equal(cleared.loss_trace, plain.loss_trace - plain.bias_trace / plain.nbeta)
    off = estimate(lr=None, bias_correction=False)
    chosen = estimate(lr=None)
    assert not off.settings["bias_correction"] and chosen.settings["bias_correction"]
    assert "pilot_steps" not in off.diagnostics


# --- minibatches --------------------------------------------------------------------------------------------


def _indices(**options: Any) -> np.ndarray:
    """Which samples each step of a run has, ``[chain, step, sample]``."""
    x = torch.arange(40.0)[:, None] / 40
    result = estimate(
        model=nn.Linear(1, 1), data=(x, x), observables={"samples": lambda draw: draw.batch[0][:, 0] * 40},
        num_burnin=0, num_draws=400, num_chains=2, lr=1e-6, **options,
    )  # fmt: skip
    return result.observables["samples"].round().astype(int)


def test_minibatches_are_independent_only_for_the_correction() -> None:
    """Without: every sample once in an epoch of four steps. With: steps share samples as often as by chance."""
    epochs = _indices().reshape(2, 100, 40)
    assert (np.sort(epochs, axis=2) == np.arange(40)).all()
    found = _indices(bias_correction=True)
    assert all(len(set(batch)) == 10 for batch in found.reshape(-1, 10).tolist())
    assert not (np.sort(found.reshape(2, 100, 40), axis=2) == np.arange(40)).all(axis=2).any()
    held = np.zeros((2, 400, 40))
    np.put_along_axis(held, found, 1.0, axis=2)
    for lag in (1, 2, 3, 4):
        shared = (held[:, lag:] * held[:, :-lag]).sum(axis=2)
        # Hypergeometric: of 10 samples, 2.5 were in another minibatch, with a variance of 10·(1/4)(3/4)(30/39).
        assert abs(shared.mean() - 2.5) < SIGMAS * math.sqrt(10 * 3 / 16 * 30 / 39 / shared.size)
    assert abs(held.mean(axis=(0, 1)) - 0.25).max() < SIGMAS * math.sqrt(3 / 16 / 800)
    assert abs((held[0] * held[1]).sum(axis=1).mean() - 2.5) < SIGMAS * math.sqrt(10 * 3 / 16 * 30 / 39 / 400)


# --- calibrate ----------------------------------------------------------------------------------------------


class _Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))  # type: ignore[no-any-return]


def _token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["tokens"][:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


def _trained(model: nn.Module, inputs: Any, loss_fn: Any) -> nn.Module:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        takes_model = loss_fn is _token_loss
        loss: Tensor = loss_fn(model, inputs) if takes_model else loss_fn(model(inputs[0]), inputs[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return model


def _problem(name: str) -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """Model, data, loss and further arguments."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(200, 3, generator=generator)
        if name == "classification":
            y = torch.multinomial((2 * x).softmax(dim=1), 1, generator=generator).flatten()
            cross = nn.functional.cross_entropy
            return _trained(nn.Linear(3, 3), (x, y), cross), (x, y), cross, {"batch_size": 50}
        if name == "language":
            tokens = {"tokens": torch.randint(6, (120, 5), generator=generator)}
            return _trained(_Language(), tokens, _token_loss), tokens, _token_loss, {"batch_size": 40}
        y = x @ torch.ones(3, 1) + 0.3 * torch.randn(200, 1, generator=generator)
        model = _trained(nn.Linear(3, 1), (x, y), mse)
    if name == "loader":
        return model, DataLoader(TensorDataset(x, y), batch_size=40, shuffle=True), mse, {}
    if name == "float64":
        return model.double(), (x.double(), y.double()), mse, {"batch_size": 50}
    if name == "bfloat16":
        low = model.bfloat16(), (x.bfloat16(), y.bfloat16())
        return *low, mse, {"batch_size": 50}
    if name == "full batch":
        return model, (x, y), mse, {}
    extra = {"params": {"params": "weight"}, "microbatches": {"microbatch_size": 20}}.get(name, {})
    return model, (x, y), mse, {"batch_size": 50} | extra


_PROBLEMS = (
    "regression", "classification", "language", "loader", "params", "float64", "bfloat16", "full batch", "microbatches"
)  # fmt: skip


@pytest.mark.parametrize("name", _PROBLEMS)
def test_what_is_chosen_can_be_passed_on(name: str) -> None:
    """Equal seeds choose equally; the run that follows is the one that `estimate_llc` makes by itself."""
    model, inputs, loss_fn, extra = _problem(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator, mode = torch.get_rng_state(), [m.training for m in model.modules()]
    settings: dict[str, Any] = {"num_draws": 150, "num_chains": 3, "seed": 4, "progress": False}
    first = llc_fast.calibrate(model, inputs, loss_fn, **arguments(extra | settings))
    torch.rand(3)
    second = llc_fast.calibrate(model, inputs, loss_fn, **arguments(extra | settings))
    torch.set_rng_state(generator)
    assert first == second and first.reason == second.reason
    assert f"lr={first['lr']:.3g}" in first.reason and "150 draws" in first.reason
    assert (first["num_draws"], first["num_burnin"], first["num_chains"]) == (150, 150, 3)
    alone = llc_fast.estimate_llc(model, inputs, loss_fn, **arguments(extra | settings))
    passed = llc_fast.estimate_llc(model, inputs, loss_fn, **arguments(extra | settings) | first)
    assert_same(passed, alone)
    assert alone.bias_trace is not None and passed.bias_trace is not None
    np.testing.assert_array_equal(passed.bias_trace, alone.bias_trace)
    for key in ("sampler", "lr", "localization", "bias_correction", "momentum_decay", "num_burnin", "batch_size"):
        assert passed.settings.get(key) == alone.settings.get(key), key
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(torch.get_rng_state(), generator) and [m.training for m in model.modules()] == mode
    assert math.isfinite(alone.llc_mean) and alone.llc_mean > 0


def test_everything_chosen() -> None:
    """With nothing given but the data: the same run again, settings in the result, and what pilots said."""
    model, inputs, loss_fn, _ = _problem("regression")
    found = llc_fast.calibrate(model, inputs, loss_fn, progress=False)
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    gamma = llc_fast.default_localization(sum(p.numel() for p in model.parameters()), norm)
    assert found["nbeta"] == llc_fast.default_nbeta(200) and found["localization"] == gamma
    assert found["batch_size"] == 200
    assert found["num_draws"] is None and found["num_burnin"] is None and found["bias_correction"]
    alone = llc_fast.estimate_llc(model, inputs, loss_fn, progress=False)
    assert_same(llc_fast.estimate_llc(model, inputs, loss_fn, progress=False, **found), alone)
    assert f"bias at {alone.diagnostics['pilot_bias_share']:.1%}" in found.reason
    assert f"pilot chains of {alone.diagnostics['pilot_steps']} steps" in found.reason
    h = torch.linalg.eigvalsh(2 * torch.cat([inputs[0], torch.ones(200, 1)], dim=1).double().T.cov(correction=0))
    assert found["lr"] * (found["nbeta"] * float(h.max()) + gamma) < 1.15  # power iteration is a few percent low
    x = torch.cat([inputs[0], torch.ones(200, 1)], dim=1).double()
    a = found["nbeta"] * torch.linalg.eigvalsh(2 * x.T @ x / 200)
    assert abs(alone.llc_mean - float((0.5 * a / (a + gamma)).sum())) < SIGMAS * alone.llc_stderr
    assert alone.warnings == []


def test_momentum_where_there_is_little_heat() -> None:
    """One stiff direction limits ε: SGHMC crosses slow directions, whatever the number of flat ones."""
    h, nbeta = torch.cat([torch.ones(1), torch.full((40,), 0.03), torch.zeros(5000)]), 1000.0
    exact = float((0.5 * nbeta * h.double() / (nbeta * h.double() + 1)).sum())
    found = run(Quadratic(h), nbeta=nbeta, num_draws=1000)
    plain = run(Quadratic(h), nbeta=nbeta, num_draws=1000, sampler="sgld")
    assert found.settings["sampler"] == "sghmc"
    assert MIN_FRICTION <= found.settings["momentum_decay"] < 1
    assert found.settings["lr"] == plain.settings["lr"]
    assert abs(found.llc_mean - exact) < SIGMAS * found.llc_stderr and found.llc_stderr < 0.05 * exact


def test_values_of_the_users_own_are_kept() -> None:
    given: dict[str, Any] = {
        "nbeta": 17.0, "localization": 3.0, "num_draws": 130, "num_burnin": 70, "num_chains": 2, "batch_size": 10,
        "num_steps_bw_draws": 2,
    }  # fmt: skip
    found = llc_fast.calibrate(mlp(), data(), mse, progress=False, **given)
    assert {k: found[k] for k in given} == given
    assert getattr(found["sampler"], "name", found["sampler"]) in ("sgld", "sghmc")
    own = llc_fast.calibrate(mlp(), data(), mse, progress=False, sampler="sgld", num_draws=300)
    assert own["sampler"] == "sgld"
    for given_sampler in (SGLDSampler(weight_decay=0.5), SGHMCSampler(momentum_decay=0.5)):
        own = llc_fast.calibrate(mlp(), data(), mse, progress=False, sampler=given_sampler, num_draws=300)
        assert own["sampler"] == given_sampler and own["localization"] > 0


@pytest.mark.parametrize("sampler", ["sgld", "sghmc", "rmsprop-sgld", "adam-sgld", "sgnht", "mala", "hmc"])
def test_every_sampler(sampler: str) -> None:
    """The run that follows is the same; without heat, ε is 0.2 / (nβ·h_max + γ) and nothing is subtracted."""
    model, inputs, loss_fn, _ = _problem("regression")
    settings: dict[str, Any] = {"sampler": sampler, "num_draws": 100, "progress": False}
    found = llc_fast.calibrate(model, inputs, loss_fn, **settings)
    alone = llc_fast.estimate_llc(model, inputs, loss_fn, **settings)
    assert_same(llc_fast.estimate_llc(model, inputs, loss_fn, **settings | found), alone)
    tells = sampler in ("sgld", "sghmc", "rmsprop-sgld")
    assert found["bias_correction"] == tells and ("no bias correction" in found.reason) == (not tells)
    if sampler in ("sgnht", "mala", "hmc"):
        x = torch.cat([inputs[0], torch.ones(200, 1)], dim=1).double()
        stiffest = found["nbeta"] * float(torch.linalg.eigvalsh(2 * x.T @ x / 200).max()) + 1
        assert found["lr"] * stiffest == pytest.approx(0.2, rel=0.1)


def test_a_loader_for_an_adjusted_sampler() -> None:
    """Which needs all of the data: the loader's batch size is not passed on."""
    model, loader, loss_fn, _ = _problem("loader")
    settings: dict[str, Any] = {"sampler": "mala", "num_draws": 50, "progress": False}
    found = llc_fast.calibrate(model, loader, loss_fn, **settings)
    alone = llc_fast.estimate_llc(model, loader, loss_fn, **settings)
    assert_same(llc_fast.estimate_llc(model, loader, loss_fn, **settings | found), alone)


@pytest.mark.parametrize(
    ("settings", "share"), [({}, 0.14), ({"num_draws": 300}, 0.16), ({"num_chains": 1, "num_draws": 500}, 0.17)]
)
@pytest.mark.parametrize("sampler", ["sgld", "rmsprop-sgld"])
def test_what_it_costs(monkeypatch: pytest.MonkeyPatch, sampler: str, settings: dict[str, Any], share: float) -> None:
    """Gradients of pilots, and of curvature and metric, against those of the run."""
    gradients = []
    at = Objective.gradient_at
    monkeypatch.setattr(Objective, "gradient_at", lambda *a, **k: [gradients.append(1), at(*a, **k)][1])
    with after_each_step(lambda taken: gradients.append(1)):
        found = llc_fast.calibrate(mlp(), data(), mse, sampler=sampler, batch_size=10, progress=False, **settings)
    total = found["num_chains"] * 2 * settings.get("num_draws", 2000)
    assert 0.08 < len(gradients) / total < share + (44 if sampler == "rmsprop-sgld" else 24) / total


def test_errors_are_those_of_the_estimate() -> None:
    model, inputs = mlp(), data()
    for wrong in (
        {"sampler": "nuts"}, {"nbeta": -1.0}, {"num_draws": 0}, {"localization": math.nan}, {"num_chains": 2.5},
        {"batch_size": 0}, {"params": "no.such"}, {"sampler_options": {"friction": 1}}, {"autocast": "bf16"},
        {"seed": -1}, {"strategy": "fast"}, {"device": "tpu"},
    ):  # fmt: skip
        caught = []
        for function in (llc_fast.calibrate, llc_fast.estimate_llc):
            with pytest.raises((TypeError, ValueError)) as error:
                function(model, inputs, mse, progress=False, **arguments(wrong))  # type: ignore[arg-type]
            caught.append((error.type, str(error.value)))
        assert caught[0] == caught[1]
    with pytest.raises(ValueError, match="dataset size"):
        llc_fast.calibrate(model, iter([inputs]), mse, progress=False)


# --- places where there is little to go by ------------------------------------------------------------------


class _Quartic(nn.Module):
    """L = Σ w⁴: no curvature at w*, and any amount of it around."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.pow(4).sum() + 0 * x


@pytest.mark.parametrize("nbeta", [1e4, 1e10])
def test_curvature_that_grows_away_from_the_minimum(nbeta: float) -> None:
    """ε begins at 1/γ, far too large; pilots find one that is right, by as many orders of magnitude as it takes."""
    settings: dict[str, Any] = {"nbeta": nbeta, "num_draws": 1500, "num_burnin": 1500, "progress": False}
    x = torch.zeros(20, 1)
    result = llc_fast.estimate_llc(_Quartic(), (x, x), lambda output, _: output.mean(), **settings)
    exact = 20 * crossing_mean((2,), nbeta, 1.0)
    assert not result.diverged_chains and result.diagnostics["bias_share"] < 0.4
    # The well is not quadratic, and heat a tenth or two of what is seen: a part of it is a bias.
    assert abs(result.llc_mean - exact) < SIGMAS * result.llc_stderr + 0.05 * exact


def _linear_net() -> nn.Module:
    """Zeros in both layers: the function is zero, and so is the gradient."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("localization", [0.0, 1.0])
def test_a_zero_network(localization: float) -> None:
    """Curvature at w* is 0, or rounding: chains live, and what is wrong with them is told."""
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"localization": localization, "num_draws": 500, "batch_size": 50, "progress": False}
    result = llc_fast.estimate_llc(_linear_net(), (x, torch.zeros(200, 1)), mse, **settings)
    assert not result.diverged_chains and 0 < result.llc_mean < 10
    assert result.settings["lr"] < 0.1
    saddle = llc_fast.estimate_llc(_linear_net(), (x, x @ torch.ones(4, 1)), mse, **settings | {"localization": 1.0})
    assert "negative" in codes(saddle)


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(50))

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.w.sum() + torch.ones(len(x), 1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_flat_loss() -> None:
    """λ̂ is 0, with a warning; without γ there is no step size."""
    inputs = torch.zeros(200, 3), torch.zeros(200, 1)
    settings: dict[str, Any] = {"num_draws": 500, "batch_size": 50, "progress": False}
    result = llc_fast.estimate_llc(_Flat(), inputs, mse, **settings)
    assert result.llc_mean == 0 and result.warnings
    for function in (llc_fast.estimate_llc, llc_fast.calibrate):
        with pytest.raises(ValueError, match="lr=None: no step size can be chosen"):
            function(_Flat(), inputs, mse, localization=0.0, **settings)


class _Cliff(nn.Module):
    """Fine at w*, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.sum() / (self.w.abs().max() < 1e-6) + 0 * x


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_chains_that_are_always_lost() -> None:
    """No step size is right: an error, not a result; and chains lost later give one without a stray warning."""
    x = torch.zeros(20, 1)
    settings: dict[str, Any] = {"num_draws": 200, "progress": False}
    for function in (llc_fast.estimate_llc, llc_fast.calibrate):
        with pytest.raises(ValueError, match=r"diverged down to lr=.*Pass lr"):
            function(_Cliff(), (x, x), lambda output, _: output.mean(), **settings)
    lost = estimate(lr=1e3, num_draws=100, bias_correction=True)
    assert len(lost.diverged_chains) == 3 and math.isnan(lost.llc_mean)


def test_a_place_that_is_no_minimum() -> None:
    """Chains run downhill: the step size is not lowered for it, and the model is blamed."""
    result = estimate(lr=None, num_draws=500, num_burnin=100)
    assert result.llc_mean < 0 and "negative" in codes(result)


# --- what can't be corrected, and what must not depend on how a run is made ---------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sampler_options": {"bounding_box_size": 0.1}},
        {"sampler_options": {"noise_level": 0.5}},
        *({"sampler": name} for name in ("sgnht", "adam-sgld")),
        *({"sampler": name, "batch_size": None} for name in ("mala", "hmc")),
    ],
)
def test_what_can_not_be_corrected(options: dict[str, Any]) -> None:
    """Asked for, it is an error; by default these runs have ε chosen without it."""
    for lr in (None, 1e-3):
        with pytest.raises(ValueError, match="bias_correction=True is not possible"):
            estimate(lr=lr, bias_correction=True, **options)
    result = estimate(lr=None, **options)
    assert not result.settings["bias_correction"] and math.isfinite(result.llc_mean)


@pytest.mark.parametrize("sampler", [None, "sghmc"])
def test_a_run_that_is_stopped_keeps_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str | None
) -> None:
    """Step size, momentum and length are in the checkpoint, and heat beside the losses: the same bits."""
    options: dict[str, Any] = {"lr": None, "sampler": sampler, "num_draws": 100, "num_burnin": 60}
    expected = estimate(**options)
    assert expected.settings["bias_correction"] and expected.bias_trace is not None
    for count in (3, 50):
        with interrupted_after(count):
            assert estimate(**options, checkpoint=tmp_path / "run").is_partial
    with monkeypatch.context() as patch:
        patch.setattr(estimate_module, "choose_settings", None)  # nothing is chosen again
        resumed = estimate(**options, checkpoint=tmp_path / "run")
    assert resumed.diagnostics["resumed_steps"] > 0
    assert_same(resumed, expected)
    assert resumed.bias_trace is not None
    np.testing.assert_array_equal(resumed.bias_trace, expected.bias_trace)
    assert {**resumed.settings, "seconds": 0} == {**expected.settings, "seconds": 0}


_CHOSEN = """
runs.estimate(lr=None, num_draws=60, num_burnin=40, num_chains=3, strategy="sequential").save(f"chosen.{rank}")
"""


def test_processes_choose_the_same(tmp_path: Path) -> None:
    """Two processes: the pilots' choice, the losses, the heat and λ̂ of one."""
    all_well(launch(tmp_path, _CHOSEN, 2))
    alone = estimate(lr=None, num_draws=60, num_burnin=40, num_chains=3, strategy="sequential")
    for rank in range(2):
        found = LLCResult.load(tmp_path / f"chosen.{rank}")
        assert_same(found, alone)
        assert found.bias_trace is not None and alone.bias_trace is not None
        np.testing.assert_array_equal(found.bias_trace, alone.bias_trace)


# --- which sampler ------------------------------------------------------------------------------------------


def _deep() -> DeepLinearProblem:
    """Six layers, rank 2: most directions are flat at w*, and SGLD does not get to them."""
    return deep_linear.make_problem(SizeClass((5, 100), (2, 10), 10_000, 5e-7, 10_000), 1)


_DEEP: dict[str, Any] = {"localization": 1.0, "batch_size": 200, "num_draws": 600, "num_burnin": 600, "progress": False}
"""Long enough that the other metric was chosen with 39 of 40 seeds; the last bits of products decide with which."""


def test_a_metric_that_is_faster_is_chosen() -> None:
    """By pilots that say so, and equally for equal seeds."""
    problem = _deep()
    chosen = [llc_fast.calibrate(problem.model, problem.data, mse, **_DEEP, seed=seed) for seed in range(3)]
    taken = [k for k, found in enumerate(chosen) if getattr(found["sampler"], "name", "") == "kfac-sgld"]
    assert len(taken) >= 2
    found = chosen[taken[0]]
    assert "kfac-sgld gave" in found.reason
    assert found["localization"] == 1.0 and found["bias_correction"]
    again = llc_fast.calibrate(problem.model, problem.data, mse, **_DEEP, seed=taken[0])
    assert again == found and again.reason == found.reason


@pytest.mark.slow
def test_what_the_faster_metric_gives(tmp_path: Path) -> None:
    """An estimate takes it for the price that is said, keeps it in a checkpoint, and comes much nearer to λ."""
    problem = _deep()
    for seed in range(2):  # one of them takes it, see above
        settings = {**_DEEP, "seed": seed}
        found = llc_fast.calibrate(problem.model, problem.data, mse, **settings)
        if getattr(found["sampler"], "name", "") == "kfac-sgld":
            break
    alone = llc_fast.estimate_llc(problem.model, problem.data, mse, **settings)
    assert alone.settings["sampler"] == "kfac-sgld" and alone.settings["localization"] == 1.0
    assert alone.diagnostics["sampler_reason"] in found.reason
    assert 0.13 * 4 * 1200 < alone.diagnostics["pilot_steps"] <= (0.13 + 0.033) * 4 * 1200
    assert_same(llc_fast.estimate_llc(problem.model, problem.data, mse, **settings | found), alone)
    with interrupted_after(100):
        part = llc_fast.estimate_llc(problem.model, problem.data, mse, **settings, checkpoint=tmp_path / "run")
    assert part.is_partial and part.settings["sampler"] == "kfac-sgld"
    assert_same(llc_fast.estimate_llc(problem.model, problem.data, mse, **settings, checkpoint=tmp_path / "run"), alone)
    slow = llc_fast.estimate_llc(problem.model, problem.data, mse, **settings, sampler="sgld")
    assert "sampler_reason" not in slow.diagnostics
    assert slow.llc_mean < 0.6 * alone.llc_mean < 0.6 * 1.05 * problem.learning_coefficient


def test_the_metric_that_does_not_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SGLD's pilots diverge at last, nobody knows how the smaller step that follows from it does."""
    problem, chain = _deep(), calibration._Pilot._chain

    def diverging(self: Any, lr: float, friction: float, length: int, *others: Any) -> Any:
        loss, bias = chain(self, lr, friction, length, *others)
        if length > 100 and not others[2:]:  # the last stage, of SGLD
            loss[length // 2 :] = bias[length // 2 :] = np.nan
        return loss, bias

    monkeypatch.setattr(calibration._Pilot, "_chain", diverging)
    found = llc_fast.calibrate(problem.model, problem.data, mse, **_DEEP)
    assert found["sampler"].name == "kfac-sgld" and "diverged in a pilot, kfac-sgld did not within" in found.reason


class _TwoScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stiff, self.flat = (nn.Linear(40, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.stiff(x[:, :40]) + self.flat(x[:, 40:])  # type: ignore[no-any-return]


def test_directions_too_flat_for_a_pilot_to_see() -> None:
    """A layer 10⁴ times as flat as the other: no pilot of SGLD sees that it matters, but the curvature at w* tells.

    The posterior is a Gaussian with the eigenvalues c + γ, so that λ̂ = Σ c/(2(c + γ)).
    """
    torch.manual_seed(0)
    model, x = _TwoScales(), torch.randn(2000, 80)
    x[:, :40] *= 14
    x[:, 40:] *= 0.14
    data = x, model(x).detach()
    curvature = 2 * 2000 / math.log(2000) * torch.linalg.eigvalsh((x.T @ x / 2000).double())
    exact = float((curvature / (2 * (curvature + 1))).sum())
    options: dict[str, Any] = {"localization": 1.0, "num_draws": 500, "num_burnin": 500, "progress": False}
    found = llc_fast.estimate_llc(model, data, mse, **options)
    assert found.settings["sampler"] == "kfac-sgld"
    assert abs(found.llc_mean - exact) < 4 * found.llc_stderr < 0.1 * exact
    slow = llc_fast.estimate_llc(model, data, mse, **options, sampler="sgld")
    assert slow.llc_mean < 0.7 * exact and "unresolved" in [w.code for w in slow.warnings]
    assert slow.llc_mean + slow.diagnostics["unreached"] == pytest.approx(exact, abs=4 * slow.llc_stderr)
    assert found.diagnostics["unreached"] is None  # another metric


def test_the_default_stays_where_nothing_is_gained() -> None:
    """A regression mixes at once; the run is too short for a pilot in another metric; there are masks."""
    model, inputs, loss_fn, _ = _problem("regression")
    found = llc_fast.calibrate(model, inputs, loss_fn, progress=False)
    assert found["sampler"] != "kfac-sgld" and "its pilot no longer grows" in found.reason
    problem = _deep()
    short = llc_fast.calibrate(problem.model, problem.data, mse, **_DEEP | {"num_chains": 1})
    assert isinstance(short["sampler"], (str, SGHMCSampler)) and " stays" not in short.reason
    name, weight = next(iter(problem.model.named_parameters()))
    masks = {name: torch.ones_like(weight, dtype=torch.bool).triu()}
    masked = llc_fast.calibrate(problem.model, problem.data, mse, **_DEEP | {"params": masks})
    assert "masks, random losses" in masked.reason


def test_the_default_stays_where_the_metric_is_not_possible() -> None:
    """A loss whose second derivative is not there: the reason is said, and no error is raised."""
    problem = _deep()

    class NoSecond(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * slope

    found = llc_fast.calibrate(
        problem.model, problem.data, lambda output, target: NoSecond.apply(output - target).mean(), **_DEEP
    )
    assert "kfac-sgld is not possible here (" in found.reason


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0, 16.0])
def test_speed_of_chains_that_grow(factor: float) -> None:
    """Logarithmic growth, one chain `factor` times as fast as the other: found to 15 %, and not above."""
    rng = np.random.default_rng(0)
    steps = np.arange(1600)
    slow = 10 * np.log1p(0.05 * steps) + 0.1 * rng.standard_normal(1600)
    fast = (10 * np.log1p(0.05 * factor * steps) + 0.1 * rng.standard_normal(1600))[:400]
    gain, words = speed_over(fast, slow)
    assert 0.85 * factor < gain < 1.02 * factor, words
    assert "after 400 steps" in words and "after 1600" in words


def test_speed_of_chains_that_fall() -> None:
    """Too high at first, then down to a limit: the one that is lower is further; one that still rises is not."""
    rng = np.random.default_rng(0)
    steps = np.arange(1600)

    def falling(rate: float) -> Any:
        return 100 + 60 * np.exp(-rate * steps / 1600) + rng.standard_normal(1600)

    gain, words = speed_over(falling(8)[:400], falling(1))
    assert 4 < gain < 16, words  # eight times as fast
    assert speed_over(falling(0.25)[:400], falling(1))[0] < 1
    rising = 100 * np.sqrt(steps[:400] / 400) + rng.standard_normal(400)
    assert speed_over(rising, falling(1))[0] == 0


def test_speed_of_chains_that_have_arrived() -> None:
    """The ratio of autocorrelation times; nothing, if the other chain is not at the same place yet."""
    rng = np.random.default_rng(1)

    def autoregressive(rho: float, count: int) -> Any:
        x = np.empty(count)
        x[0], noise = rng.standard_normal(), np.sqrt(1 - rho**2) * rng.standard_normal(count)
        for k in range(1, count):
            x[k] = rho * x[k - 1] + noise[k]
        return 50 + x

    slow, fast = autoregressive(0.95, 16_000), autoregressive(0.5, 4000)  # 39 and 3 steps
    gain, words = speed_over(fast, slow)
    assert 13 / 1.5 < gain < 13 * 1.5 and "autocorrelation times" in words
    assert speed_over(autoregressive(0.95, 4000), slow)[0] < MIN_GAIN
    assert speed_over(fast - 5, slow)[0] == 0.0


# --- step sizes of the user's own ---------------------------------------------------------------------------


def test_a_step_size_of_ones_own() -> None:
    """With the correction it may be several times too large; a hundred times, either way, is told with it too."""
    model, inputs, h = _noisy_regression()
    options: dict[str, Any] = {"batch_size": 200, "num_draws": 1000, "localization": 1.0, "progress": False}
    chosen = llc_fast.calibrate(model, inputs, mse, sampler="sgld", **options)
    options["bias_correction"] = True
    nbeta = chosen["nbeta"]
    exact = float((0.5 * nbeta * h / (nbeta * h + 1)).sum())
    result = llc_fast.estimate_llc(model, inputs, mse, lr=4 * chosen["lr"], **options)
    assert result.settings["bias_correction"]
    assert abs(result.llc_mean - exact) < SIGMAS * result.llc_stderr + 0.01 * exact
    for factor, expected in ((100, "diverged"), (0.01, "short")):
        wrong = llc_fast.estimate_llc(model, inputs, mse, lr=factor * chosen["lr"], **options)
        assert expected in codes(wrong), (factor, wrong.warnings)


# --- settings of an earlier result --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preconditioner": "curvature"},
        {"sampler": RMSpropSGLDSampler(eps=1e-3)},
        {"sampler": "kfac-sgld"},
    ],
    ids=["default", "curvature", "rmsprop-sgld", "kfac-sgld"],
)
def test_an_estimate_with_earlier_settings_is_the_same_without_pilots(options: dict[str, Any]) -> None:
    model, given = mlp(), data(80)
    length: dict[str, Any] = {"num_draws": 300, "num_burnin": 300, "progress": False, "seed": 3}
    first = llc_fast.estimate_llc(model, given, mse, **options, **length)
    again = llc_fast.estimate_llc(model, given, mse, settings=first.settings, **length)
    assert first.diagnostics["pilot_steps"] > 0 and "pilot_steps" not in again.diagnostics
    assert_same(again, first)
    same = ("sampler", "lr", "localization", "bias_correction", "batch_size", "momentum_decay", "eps", "preconditioner")
    assert [again.settings.get(name) for name in same] == [first.settings.get(name) for name in same]


def test_earlier_settings_from_a_file_and_what_is_given_wins(tmp_path: Path) -> None:
    model, given = mlp(), data(80)
    length: dict[str, Any] = {"num_draws": 50, "num_burnin": 50, "progress": False}
    first = llc_fast.estimate_llc(model, given, mse, lr=1e-4, sampler="sghmc", nbeta=7.0, batch_size=16, **length)
    first.save(tmp_path / "first")
    settings = LLCResult.load(tmp_path / "first").settings
    kept = llc_fast.estimate_llc(model, given, mse, settings=settings, **length)
    assert_same(kept, first)
    other = llc_fast.estimate_llc(model, given, mse, settings=settings, sampler=SGLDSampler(lr=2e-4), nbeta=5, **length)
    assert (other.settings["sampler"], other.settings["lr"], other.nbeta) == ("sgld", 2e-4, 5)
    assert other.settings["localization"] == first.settings["localization"] and other.settings["batch_size"] == 16
    adjusted = llc_fast.estimate_llc(model, given, mse, settings=settings, sampler="mala", **length)
    assert adjusted.settings["batch_size"] == 80  # adjusted samplers take all data
    loader = DataLoader(TensorDataset(*given), batch_size=20)
    assert llc_fast.estimate_llc(model, loader, mse, settings=settings, **length).settings["batch_size"] == 20


def test_settings_that_are_none_are_refused() -> None:
    model, given = mlp(), data(80)
    length: dict[str, Any] = {"num_draws": 20, "num_burnin": 20, "progress": False}
    first = llc_fast.estimate_llc(model, given, mse, lr=1e-4, **length)
    with no_step():
        with pytest.raises(TypeError, match="settings must be those of an earlier result"):
            llc_fast.estimate_llc(model, given, mse, settings=first, **length)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="settings has no 'lr'"):
            llc_fast.estimate_llc(model, given, mse, settings={"sampler": "sgld"}, **length)
    metric = {name: torch.full_like(p, 0.5).detach() for name, p in model.named_parameters()}
    sampler = PreconditionedSGLDSampler(preconditioner=metric)
    tensors = llc_fast.estimate_llc(model, given, mse, lr=1e-4, sampler=sampler, **length)
    with no_step(), pytest.raises(ValueError, match=r"given tensors as its preconditioner.*pass the sampler too"):
        llc_fast.estimate_llc(model, given, mse, settings=tensors.settings, **length)
    assert_same(llc_fast.estimate_llc(model, given, mse, settings=tensors.settings, sampler=sampler, **length), tensors)
