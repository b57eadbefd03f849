"""Every sampler: its stationary law, its λ̂ and what it declares; parametrized over `SAMPLERS`."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import NormalCrossing, Quadratic, run
from optimizers import OPTIMIZERS, OPTIONS, STEPPED, three_layers
from scipy.linalg import solve_discrete_lyapunov
from torch import nn

import llc_fast
from llc_fast import optim, theory
from llc_fast.kernels import reference
from llc_fast.kernels.native import NUM_STATES
from llc_fast.kernels.step import SUMS
from llc_fast.samplers import SAMPLERS, Sampler, SGLDSampler, make_sampler, register
from llc_fast.samplers.state import ChainState
from llc_fast.settings import Settings

COPIES = 40_000  # independent chains for each curvature, in one tensor
CURVATURES = torch.tensor([1.0, 100.0])
NBETA, LOCALIZATION = 2.0, 0.5


def test_every_sampler_has_a_rule_and_an_optimizer() -> None:
    assert [*OPTIONS, "kfac-sgld", "mala", "hmc"] == list(SAMPLERS) and list(OPTIONS) == list(NUM_STATES) == list(
        STEPPED
    )
    assert OPTIMIZERS["sgld"] is llc_fast.SGLD and OPTIMIZERS["sgnht"] is llc_fast.SGNHT

    @dataclasses.dataclass(frozen=True)
    class Warm(SGLDSampler):
        """SGLD by another name."""

    w = nn.Parameter(torch.zeros(5))
    w.grad = torch.ones(5)
    optimizer = optim.optimizer_for(Warm)([w], lr=1e-3, seed=1)
    optimizer.step()
    assert type(optimizer).__name__ == "Warm" and (w != 0).all()


def _dynamics(name: str, lr: float, curvature: float, p: float, friction: float) -> tuple[np.ndarray, np.ndarray]:
    """x ← F x + G ξ for x = (w, what the rule keeps), once metric and thermostat stand still."""
    a = NBETA * curvature + LOCALIZATION
    if name == "sghmc":
        keep, pull, kick = 1 - friction, 0.5 * lr * a, math.sqrt(lr * friction)
    elif name == "sgnht":
        keep, pull, kick = 1 - friction, lr * a, math.sqrt(2 * OPTIONS[name]["diffusion_factor"] * lr)
    elif name == "adam-sgld":  # the gradient comes through m ← β m + (1 − β) h w
        beta, step = OPTIONS[name]["betas"][0], 0.5 * lr * p
        mean = np.array([(1 - beta) * curvature, beta])
        w = np.array([1 - step * LOCALIZATION, 0.0]) - step * NBETA * mean
        return np.stack([w, mean]), np.array([[math.sqrt(lr * p)], [0.0]])
    else:
        return np.array([[1 - 0.5 * lr * p * a]]), np.array([[math.sqrt(lr * p)]])
    return np.array([[1 - pull, keep], [-pull, keep]]), np.array([[kick], [kick]])


@pytest.mark.parametrize("name", STEPPED)
def test_stationary_gaussian_of_condition_number_100(name: str) -> None:
    """Mean, variance and fourth moment in a stiff and in a soft direction, against the exact discrete-time law."""
    start = 0.01
    w = nn.Parameter(torch.full((2, COPIES), start))
    curvature = CURVATURES[:, None]
    lr = {"preconditioned-sgld": 0.05, "rmsprop-sgld": 0.003, "adam-sgld": 0.002}.get(name, 0.005)
    optimizer = OPTIMIZERS[name]([w], lr=lr, nbeta=NBETA, localization=LOCALIZATION, seed=7, **OPTIONS[name])
    optimizer.state[w]["initial_param"].zero_()  # w* at the minimum, the start beside it
    steps = 6000 if name == "adam-sgld" else 3000  # until the start is forgotten, which is checked below
    for _ in range(steps):
        w.grad = curvature * w.detach()
        optimizer.step()
    group = optimizer.param_groups[0]
    for row, h in zip(w.detach().double(), CURVATURES.tolist(), strict=True):
        p, friction = 1.0, group.get("momentum_decay", 0.0)
        if name == "preconditioned-sgld":
            p = float(OPTIONS[name]["preconditioner"][CURVATURES.tolist().index(h), 0])
        elif SAMPLERS[name].metric == "adaptive":  # frozen after the first gradient, which all copies share
            decay = group["alpha"] if name == "rmsprop-sgld" else 0.0  # Adam corrects for it
            p = 1 / (math.sqrt(1 - decay) * h * start + group["eps"])
        elif name == "sgnht":
            friction = float(group["thermostat"])
        f, g = _dynamics(name, lr, h, p, friction)
        assert max(abs(np.linalg.eigvals(f))) ** steps < 1e-4, "the start must be forgotten"
        exact = solve_discrete_lyapunov(f, g @ g.T)[0, 0]
        assert abs(float(row.mean())) < 5 * math.sqrt(exact / COPIES)
        # The thermostat is shared, and its fluctuation moves all variances a little: about as much again.
        errors = 5 * math.sqrt(2 / COPIES) * (2 if name == "sgnht" else 1)
        assert abs(float(row.var()) / exact - 1) < errors
        assert abs(float((row**4).mean()) / (3 * exact**2) - 1) < 5 * math.sqrt(96 / 9 / COPIES) + 2 * errors
        # And the exact discrete law is near the target's.
        assert exact * (NBETA * h + LOCALIZATION) == pytest.approx(1, abs=0.35)
    if name == "sgnht":
        kinetic = float(optimizer.state[w]["state0"].double().square().mean())
        assert kinetic / lr == pytest.approx(1, abs=10 * math.sqrt(2 / (2 * COPIES)))


# --- what samplers declare ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Silent(Sampler):
    """SGLD's rule, of which nothing is said."""

    name = "silent"

    @classmethod
    def rule(cls) -> str:
        return "sgld"


def test_a_rule_that_says_nothing_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No correction, no acceptance statistics, no chosen step size; with a step size that is given, SGLD's chain."""
    monkeypatch.setitem(SAMPLERS, "silent", Silent)
    state = ChainState({"w": torch.ones(3)}, {}, Silent(lr=0.1, nbeta=1.0), 2)
    state.start(0, 0)
    state.move([torch.ones(2, 3)], 0)
    assert list(state.info()) == list(Silent.traces) == ["squared_distance"] and Silent.sums_needed({}) == ("distance",)
    assert math.isnan(float(state.metric(1)[0, 0]))
    options: dict[str, Any] = {"num_draws": 400, "num_burnin": 100, "num_chains": 2, "nbeta": 50.0}
    model = Quadratic(torch.ones(20))
    silent, spoken = (run(model, sampler=name, lr=1e-3, **options) for name in ("silent", "sgld"))
    np.testing.assert_array_equal(silent.loss_trace, spoken.loss_trace)
    for measured in ("acceptance", "gradient_noise_share"):
        assert spoken.diagnostics[measured] is not None and not np.isfinite(silent.diagnostics[measured] or math.nan)
    assert silent.bias_trace is None and spoken.bias_trace is not None
    with pytest.raises(ValueError, match="bias_correction=True is not possible with sampler='silent'"):
        run(model, sampler="silent", lr=1e-3, bias_correction=True, **options)
    with pytest.raises(ValueError, match="lr=None: sampler='silent' does not say how a step size is chosen"):
        run(model, sampler="silent", **options)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="sampler='sgld' is SGLDSampler already"):
        register(dataclasses.make_dataclass("Other", [], bases=(SGLDSampler,), frozen=True))
    assert SAMPLERS["sgld"] is SGLDSampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_declarations_agree(name: str) -> None:
    cls = SAMPLERS[name]
    options = vars(cls(lr=0.1, nbeta=1.0, **OPTIONS.get(name, {})))
    assert cls.name == name and cls.kind != "unknown" and cls.metric != "unknown"
    assert ("bias" in cls.traces) == ("bias" in cls.sums_needed(options)) == cls.supports_bias_correction
    assert math.isfinite(cls.injected_noise(options)) == cls.supports_bias_correction
    assert cls.momentum_variant is None or SAMPLERS[cls.momentum_variant].kind == "momentum"
    assert (name in STEPPED) == cls.has_optimizer == math.isfinite(cls.bytes_moved())


def test_bytes_moved() -> None:
    """The table of docs/samplers.md; w* and metric are read once for four chains, low precision pays for the copy."""
    assert [cls.bytes_moved() for cls in STEPPED.values()] == [16, 20, 24, 32, 24, 24]
    assert [SGLDSampler.bytes_moved(chains=4), SGLDSampler.bytes_moved(low=True)] == [13, 16]
    assert SAMPLERS["preconditioned-sgld"].bytes_moved(chains=4) == 14


def test_lag_and_noise() -> None:
    assert make_sampler("adam-sgld").drift_lag({"betas": (0.75, 0.9)}) == pytest.approx(3)
    assert make_sampler("sghmc").injected_noise({"momentum_decay": 0.3}) == 0.3


def _mean_bias(cls: type[Sampler], options: dict[str, Any]) -> tuple[float, float]:
    """The bias that a stationary chain on a quadratic reports, a copy, and the exact one of its discrete dynamics."""
    curvatures, start, lr = torch.tensor([1.0, 4.0]), 0.1, 0.1
    state = ChainState(
        {"w": torch.zeros(2, COPIES)}, {}, cls(lr=lr, nbeta=NBETA, localization=LOCALIZATION, **options), num_chains=1
    )
    state.start(0, seed=3)
    state.displace({"w": torch.full((1, 2, COPIES), start)})
    reported = []
    for step in range(600):
        state.move([curvatures[:, None] * state.params()["w"]], step)
        reported.append(float(state.info()["bias"][0]) / COPIES)
    exact = 0.0
    for h in curvatures.tolist():
        p = 1.0
        if cls.metric == "given":
            p = float(options["preconditioner"]["w"][curvatures.tolist().index(h), 0])
        elif cls.metric == "adaptive":  # frozen after the first gradient
            p = 1 / (math.sqrt(1 - options["alpha"]) * h * start + options["eps"])
        f, g = _dynamics(cls.rule(), lr, h, p, options.get("momentum_decay", 0.0))
        variance = solve_discrete_lyapunov(f, g @ g.T)[0, 0]
        exact += 0.5 * NBETA * h * (variance - 1 / (NBETA * h + LOCALIZATION))
    return float(np.mean(reported[300:])), exact


_SUPPORTING = [name for name, cls in STEPPED.items() if cls.supports_bias_correction]


def _assert_bias(cls: type[Sampler], options: dict[str, Any]) -> None:
    reported, exact = _mean_bias(cls, options)
    assert exact > 0.04 and reported == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("name", _SUPPORTING)
def test_bias_of_a_stationary_chain(name: str) -> None:
    """nβ·E[L] of the discrete dynamics above the posterior's, by the Lyapunov equation."""
    cls, options = SAMPLERS[name], dict(OPTIONS[name])
    if cls.metric == "given":
        options["preconditioner"] = {"w": torch.tensor([[2.0], [0.5]])}
    _assert_bias(cls, options)


def test_a_declared_bias_that_is_0_is_noticed() -> None:
    @dataclasses.dataclass(frozen=True)
    class Zero(SGLDSampler):
        """Declares support, and returns nothing."""

        @classmethod
        def bias(cls, scalars: Any, sums: Any) -> Any:
            return 0.0 * sums[:, 0]

    _assert_bias(SGLDSampler, {})
    with pytest.raises(AssertionError):
        _assert_bias(Zero, {})


@pytest.mark.parametrize("name", _SUPPORTING)
def test_bias_of_a_step(name: str) -> None:
    """(ε/8)·Σ p·G·nβ·g, and SGHMC's, in float64 for each of two chains, over what may move."""
    lr, nbeta, gamma, decay = 0.02, 30.0, 2.0, 0.7
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start, mask = {"a": random(5, 3), "b": random(4)}, random(5, 3) > 0
    options = dict(OPTIONS[name])
    if SAMPLERS[name].metric == "given":
        options["preconditioner"] = {k: random(*v.shape).abs() + 0.1 for k, v in start.items()}
    sampler = make_sampler(name, lr=lr, nbeta=nbeta, localization=gamma, weight_decay=decay, **options)
    state = ChainState(start, {"a": mask}, sampler, 2)
    state.start(0, 7)
    moving = state.rows_of(state.moving)
    for step in range(3):
        w, kept = state.w.clone(), [t.clone() for t in state.states]
        grads = [random(2, *v.shape) for v in start.values()]
        g = state.rows_of(grads) * moving
        state.move(grads, step)
        drift = nbeta * g + gamma * (w - state.rows_of(state.reference)) + decay * w
        if name == "sghmc":
            alpha = options["momentum_decay"]
            q = (lr / 8 * drift - (1 - alpha) * kept[0] / 2) / alpha
        else:
            p = {
                "sgld": lambda: 1.0,
                "preconditioned-sgld": lambda: state.rows_of(list(options["preconditioner"].values())),
                "rmsprop-sgld": lambda: 1 / (state.states[0].sqrt() + options["eps"]),
            }[name]()
            q = lr / 8 * p * drift
        expected = (nbeta * g * q).sum(dim=1)
        torch.testing.assert_close(torch.as_tensor(state.info()["bias"]), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [*STEPPED, "one parameter at a time"])
def test_parameters_of_several_dtypes(name: str) -> None:
    """The chains of float32 parameters with the same values; the model sees them rounded."""
    in_parts, name = name not in STEPPED, name if name in STEPPED else "sgld"
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16, "d": torch.bfloat16}
    start = {"a": random(5, 3), "b": random(7), "c": random(2, 2), "d": random(33)}
    options = dict(OPTIONS[name]) | ({"preconditioner": 2.0} if SAMPLERS[name].metric == "given" else {})
    sampler = make_sampler(name, lr=0.01, nbeta=10.0, localization=2.0, **options)
    mask = {"d": torch.arange(33) % 3 > 0}
    expected = ChainState(start, mask, sampler, 1 if in_parts else 3)
    found = ChainState({k: v.to(dtypes[k]) for k, v in start.items()}, mask, sampler, 1 if in_parts else 3)
    for state in (expected, found):
        state.start(0, 7)
    for step in range(4):
        grads = {k: random(state.num_chains, *v.shape) for k, v in start.items()}
        expected.move(list(grads.values()), step)
        given = {k: g.to(dtypes[k]) for k, g in grads.items()}
        if in_parts:
            found.start_parts()
            for k, g in given.items():
                found.move_some({k: g[0]}, step)
        else:
            found.move(list(given.values()), step)
        assert torch.equal(found.w, expected.w) and found.w.dtype == torch.float32
        for k, seen in found.params().items():
            assert torch.equal(seen, expected.params()[k].to(dtypes[k]))
        for key, value in expected.info().items():
            np.testing.assert_allclose(torch.as_tensor(found.info()[key]), torch.as_tensor(value), rtol=1e-12)


@pytest.mark.parametrize("name", [n for n, cls in STEPPED.items() if cls.metric == "adaptive"])
def test_frozen_metric_is_that_of_the_specification(name: str) -> None:
    scalars = SAMPLERS[name].scalars(vars(make_sampler(name, lr=0.1, nbeta=1.0, eps=0.3, adapt_steps=3)))
    squares, one = torch.rand(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    x = reference.Coordinates(w=one, grad=0 * one, reference=one, noise=one, state=[squares.clone(), 0 * one])
    reference.apply(name, x, scalars, step=3)
    by_noise = (x.w - 1).square() / 0.1  # without a gradient w moves by √(εp)·ξ
    torch.testing.assert_close(SAMPLERS[name].frozen_metric(scalars, [squares]), by_noise)


@pytest.mark.parametrize("name", ["rmsprop-sgld", "RMSprop-SGLD", "rmsprop_sgld", "RMSpropSGLD", "RMSProp SGLD"])
def test_names_as_people_write_them(name: str) -> None:
    assert type(make_sampler(name)) is SAMPLERS["rmsprop-sgld"]
    assert Settings(sampler=name).template.name == "rmsprop-sgld"


@pytest.mark.parametrize(
    ("name", "near"),
    [("sgdl", "'sgld'"), ("rms-sgld", "'rmsprop-sgld'"), ("SGHM", "'sghmc'"), ("nuts", None), ("", None)],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(
        ValueError, match=f"sampler='{name}' is unknown; .*choose one of: adam-sgld, hmc, kfac-sgld, mala"
    ) as caught:
        make_sampler(name)
    assert (f"did you mean {near}?" in str(caught.value)) if near else ("did you mean" not in str(caught.value))


def test_a_sampler_can_be_completed_later() -> None:
    """lr and nβ may be open in the sampler, and not in a step."""
    sampler = make_sampler("rmsprop-sgld", alpha=0.9)
    for missing, given in (("lr", {}), ("nbeta", {"lr": 0.1})):
        with pytest.raises(TypeError, match=f"{missing} must be a number, got None"):
            sampler.scalars(vars(make_sampler(sampler, **given)))
    complete = make_sampler(sampler, lr=0.1, nbeta=2.0)
    assert complete == SAMPLERS["rmsprop-sgld"](lr=0.1, nbeta=2.0, alpha=0.9)
    assert complete.scalars(vars(complete))[:2] == (0.1, 2.0)
    with pytest.raises(ValueError, match="RMSpropSGLDSampler has no option beta; it takes: lr, nbeta"):
        make_sampler(sampler, beta=0.9)


# --- learning coefficients, and the optimizers --------------------------------------------------------------


@pytest.mark.parametrize("model", ["regular", "quartic"])
@pytest.mark.parametrize("name", STEPPED)
def test_known_learning_coefficients(name: str, model: str) -> None:
    """λ̂ of d/2 and of 1/4 per copy, at a fifth of the default step size: 1 % for its bias, and the error bar."""
    copies = 1000
    module = Quadratic(torch.logspace(0, 1, copies)) if model == "regular" else NormalCrossing((2,), copies)
    known = theory.regular(copies).value if model == "regular" else copies * theory.normal_crossing([2]).value
    lr = {"regular": None, "quartic": 4e-5}[model]
    options: dict[str, Any] = {"nbeta": 1000.0, "localization": 0.01, "sampler": name}
    given = {k: v for k, v in OPTIONS[name].items() if k == "momentum_decay"}
    if (
        SAMPLERS[name].metric == "adaptive"
    ):  # w* is the minimum, so all that is learned from gradients is their noise: none
        given = {"eps": 1.0}
    if lr is None:
        lr = run(module, num_draws=1, num_burnin=1, sampler_options=given, **options).settings["lr"] / 5
    result = run(module, lr=lr, num_draws=6000, num_burnin=4000, sampler_options=given, **options)
    assert result.llc_stderr < 0.02 * known
    assert abs(result.llc_mean - known) < 4 * result.llc_stderr + 0.01 * known, f"{result} λ = {known}"


@pytest.mark.parametrize("name", ["rmsprop-sgld", "adam-sgld"])
def test_freezing(name: str) -> None:
    """After freeze() the metric's statistics stay as they are, and the optimizer says what it can't freeze."""
    w = nn.Parameter(torch.ones(50))
    optimizer = OPTIMIZERS[name]([w], lr=1e-3, nbeta=10.0, seed=1)
    for step in range(6):
        w.grad = torch.full_like(w, 1.0 + step)
        if step == 3:
            optimizer.freeze()
            kept = optimizer.state[w]["state0"].clone()
        optimizer.step()
    assert torch.equal(optimizer.state[w]["state0"], kept)
    with pytest.raises(TypeError, match="no metric that adapts"):
        llc_fast.SGLD([w]).freeze()


@pytest.mark.parametrize("name", ["rmsprop-sgld", "adam-sgld"])
def test_relative_eps_makes_the_metric_follow_the_loss_scale(name: str) -> None:
    """Loss × 4, nβ / 4 is the same potential: with ε / 4⁻¹ for p's own scale the chain is the same."""
    ends = []
    for scale in (1.0, 4.0):
        w = nn.Parameter(torch.linspace(-1, 1, 400))
        optimizer = OPTIMIZERS[name](
            [w], lr=1e-3 * scale, nbeta=100.0 / scale, localization=1.0, seed=1, eps=0.3, relative_eps=True
        )
        for _ in range(40):
            w.grad = scale * (w.detach() + 0.1)
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPPED)
def test_state_dict_continues_bit_for_bit(name: str) -> None:
    def steps(w: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            w.grad = 3 * w.detach() + 1
            optimizer.step()

    options = {
        "lr": 1e-3,
        "nbeta": 10.0,
        "localization": 1.0,
        **{k: v for k, v in OPTIONS[name].items() if k != "preconditioner"},
    }
    w = nn.Parameter(torch.linspace(-1, 1, 333).to(torch.bfloat16 if name == "sghmc" else torch.float32))
    optimizer = OPTIMIZERS[name]([w], seed=5, **options)
    steps(w, optimizer, 5)
    saved, other = copy.deepcopy(optimizer.state_dict()), nn.Parameter(w.detach().clone())
    resumed = OPTIMIZERS[name]([other], seed=99, **options)
    resumed.load_state_dict(saved)
    duplicate_w, duplicate = copy.deepcopy((w, optimizer))
    steps(w, optimizer, 5)
    steps(other, resumed, 5)
    steps(duplicate_w, duplicate, 5)
    assert torch.equal(w, other) and torch.equal(w, duplicate_w)


@pytest.mark.parametrize("name", [n for n, cls in STEPPED.items() if cls.kind != "thermostat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_release(name: str, dtype: torch.dtype) -> None:
    """The same bits as the ordinary step, and no gradient left behind; through load_state_dict and deepcopy too."""
    x, models = torch.randn(8, 6).to(dtype), []
    for release in (False, True):
        model = three_layers(dtype)
        options = {k: v for k, v in OPTIONS[name].items() if k != "preconditioner"}
        optimizer = OPTIMIZERS[name](
            model.parameters(), lr=1e-3, nbeta=20.0, localization=1.0, seed=2, release_gradients=release, **options
        )
        for _ in range(4):
            model(x).square().mean().backward()
            assert release == all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_release_refuses_what_needs_the_whole_step() -> None:
    with pytest.raises(ValueError, match="metrics"):
        llc_fast.SGLD(three_layers().parameters(), release_gradients=True, metrics=["distance"])
    with pytest.raises(ValueError, match="thermostat"):
        llc_fast.SGNHT(three_layers().parameters(), release_gradients=True)
    with pytest.raises(ValueError, match="relative_eps"):
        llc_fast.RMSpropSGLD(three_layers().parameters(), release_gradients=True, relative_eps=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_tiny_steps_survive_in_a_low_precision_model(low: torch.dtype) -> None:
    """Steps of 10⁻⁶ on a weight of 1: lost one by one in the model's precision, kept in the chain's."""
    w = nn.Parameter(torch.ones(100, dtype=low))
    optimizer = llc_fast.SGLD([w], lr=2e-6, nbeta=1.0, noise_level=0.0)
    plain = torch.ones(100, dtype=low)
    for _ in range(10_000):
        w.grad = torch.ones_like(w)
        optimizer.step()
        plain -= 1e-6
    assert torch.equal(plain, torch.ones_like(plain))
    expected = torch.full((100,), 0.99)
    # Each step is rounded to a multiple of float32's spacing below 1, 2⁻²⁴: by up to half of it, 3 % of the step.
    torch.testing.assert_close(optimizer.state[w]["master"], expected, rtol=0, atol=10_000 * 2.0**-25)
    assert torch.equal(w.detach(), optimizer.state[w]["master"].to(low))


def test_estimate_of_a_bfloat16_model() -> None:
    """The chain of a bfloat16 model is close to that of the float32 model with the same weights."""
    x = torch.randn(300, 6).bfloat16()
    model = three_layers(torch.bfloat16)
    y = model(x).detach() + 0.5 * torch.randn(300, 2).bfloat16()
    settings: dict[str, Any] = {"lr": 1e-5, "num_draws": 1500, "num_burnin": 1500, "progress": False, "num_chains": 2}

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output.float(), target.float())

    low = llc_fast.estimate_llc(model, (x, y), loss, **settings)
    high = llc_fast.estimate_llc(copy.deepcopy(model).float(), (x.float(), y.float()), loss, **settings)
    assert abs(low.llc_mean - high.llc_mean) < 4 * math.hypot(low.llc_stderr, high.llc_stderr)
    assert low.llc_mean > 0


@pytest.mark.parametrize("name", STEPPED)
def test_metrics_are_what_they_say(name: str) -> None:
    """Norms against torch's own, over two groups with a mask in one."""
    torch.manual_seed(1)
    a, b = nn.Parameter(torch.randn(40, 3)), nn.Parameter(torch.randn(77))
    mask = torch.rand(77) > 0.5
    options = {k: v for k, v in OPTIONS[name].items() if k != "preconditioner"}
    groups = [{"params": [a]}, {"params": [b], "optimize_over": mask, "lr": 2e-3}]
    optimizer = OPTIMIZERS[name](
        groups, lr=1e-3, nbeta=20.0, localization=3.0, noise_level=0.8, seed=2, metrics=optim.METRICS, **options
    )
    starts = [p.detach().clone() for p in (a, b)]
    for _ in range(3):
        before = [p.detach().clone() for p in (a, b)]
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        optimizer.step()
    away = [(p - s).double() for p, s in zip(before, starts, strict=True)]
    square = float(away[0].square().sum() + away[1][mask].square().sum())
    values = optimizer.metrics
    assert set(values) == set(optim.METRICS)
    assert float(values["distance"]) == pytest.approx(math.sqrt(square), rel=1e-5)
    assert float(optimizer.localization_loss) == pytest.approx(1.5 * square, rel=1e-5)
    weight = float(a.detach().double().square().sum() + b.detach().double()[mask].square().sum())
    assert float(values["weight_norm"]) == pytest.approx(math.sqrt(weight), rel=1e-5)
    noise = [optimizer.noise[0][0], optimizer.noise[1][0]]
    assert [n.shape for n in noise] == [a.shape, b.shape]
    expected = float(noise[0].double().square().sum() + noise[1].double()[mask].square().sum())
    assert float(values["noise_norm"]) == pytest.approx(math.sqrt(expected), rel=1e-5)
    grads = [(g["lr"] / 2 * 20 * p.grad).double() for g, p in zip(optimizer.param_groups, (a, b), strict=True)]
    expected = float(grads[0].square().sum() + grads[1][mask].square().sum())
    assert float(values["grad_norm"]) == pytest.approx(math.sqrt(expected), rel=1e-5)
    drift = 20 * a.grad + 3 * (before[0] - starts[0])
    torch.testing.assert_close(optimizer.dws[0], drift)
    with pytest.raises(AttributeError, match="was not measured"):
        _ = llc_fast.SGLD([a]).distance
    assert len(SUMS) == 6


def test_sgld_moves_by_its_reported_drift_and_noise() -> None:
    w = nn.Parameter(torch.randn(500))
    optimizer = llc_fast.SGLD([w], lr=1e-3, nbeta=5.0, localization=2.0, seed=1, metrics=["noise", "dws"])
    w.grad, before = torch.randn_like(w), w.detach().clone()
    optimizer.step()
    expected = before - 0.5e-3 * optimizer.dws[0] + math.sqrt(1e-3) * optimizer.noise[0][0]
    torch.testing.assert_close(w.detach(), expected)
