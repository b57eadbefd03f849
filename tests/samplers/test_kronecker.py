"""SGLD in the metric of K-FAC: against closed forms, and what it does to the user's model."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from runs import estimate, mlp, mse
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn

import llc_fast
from llc_fast.chains import metric as chains_metric
from llc_fast.data import make_source
from llc_fast.gradients.memory import needed_bytes
from llc_fast.gradients.plan import make_plan
from llc_fast.kernels.native import normals
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective import kronecker as objective_kronecker
from llc_fast.objective.kronecker import GaussNewton, _as_rows, diagonal_wells
from llc_fast.objective.objective import Objective
from llc_fast.problems.deep_linear import most_singular
from llc_fast.problems.relu_network import make_data, make_network, rescale
from llc_fast.samplers import kronecker, make_sampler
from llc_fast.samplers.kronecker import Factors, KFACSGLDSampler, KroneckerState, refreshes
from llc_fast.samplers.state import ChainState

_CPU = torch.device("cpu")
NBETA, GAMMA = 50.0, 0.5


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _positive(side: int, seed: int) -> Tensor:
    root = _random(side, side, seed=seed)
    return root @ torch.diag(torch.logspace(-1, 1, side, dtype=torch.float64)) @ root.T


def _state(
    shapes: dict[str, tuple[int, ...]], num_chains: int = 1, masks: dict[str, Tensor] | None = None, **options: Any
) -> KroneckerState:
    chosen: dict[str, Any] = {"lr": 0.1, "nbeta": NBETA, "localization": GAMMA, "adapt_steps": 4} | options
    start = {name: _random(*shape, seed=len(name)) for name, shape in shapes.items()}
    state = KroneckerState(start, masks or {}, KFACSGLDSampler(**chosen), num_chains)
    state.start(0, 7)
    return state


def _metric(state: KroneckerState, step: int = 9) -> Tensor:
    """P of the first chain as a matrix of all its elements, in the order of its row."""
    unit = torch.eye(state.w.shape[1], dtype=state.w.dtype)
    return torch.cat([state.times_metric(row[None].expand(state.num_chains, -1), step, 1.0)[:1] for row in unit])


# ---- the metric --------------------------------------------------------------------------------------------


def test_the_metric_is_that_of_the_formula() -> None:
    """P = (nβ·(B + ρ·tr B/b) ⊗ (A + ρ·tr A/a) + γ + μ)⁻¹ by inverting that matrix; the diagonal alike."""
    b, a, d = _positive(3, 1), _positive(4, 2), _random(5, seed=3).abs()
    state = _state({"w": (3, 4), "bias": (5,)}, damping=0.3, weight_decay=0.2)
    state.renew(4, [[Factors(b, a), Factors(d)]])
    eye = {n: torch.eye(n, dtype=torch.float64) for n in (3, 4, 12, 5)}
    damped = [m + 0.3 * m.trace() / len(m) * eye[len(m)] for m in (b, a)]
    expected = torch.linalg.inv(NBETA * torch.kron(*damped) + (GAMMA + 0.2) * eye[12])
    diagonal = torch.diag(1 / (NBETA * (d + 0.3 * d.mean()) + GAMMA + 0.2))
    found = _metric(state)
    torch.testing.assert_close(found[:12, :12], expected)
    torch.testing.assert_close(found[16:21, 16:21], diagonal)
    found[:12, :12], found[16:21, 16:21] = 0, 0
    assert not found.any()


def test_while_it_adapts_steps_and_damping_are_smaller() -> None:
    b, a = _positive(3, 1), _positive(4, 2)
    early, late = _state({"w": (3, 4)}, damping=2.0), _state({"w": (3, 4)}, damping=0.2)
    early.renew(0, [[Factors(b, a)]])
    late.renew(4, [[Factors(b, a)]])
    torch.testing.assert_close(_metric(early), 0.3 * _metric(late))


def test_draws_have_the_metric_of_the_mean_factors() -> None:
    """Of the second half of the steps in which it adapts; each chain of its own."""
    state = _state({"w": (3, 4)}, num_chains=2, adapt_steps=4)
    assert refreshes(4) == [0, 1, 2, 3, 4] and all(state.is_due(k) for k in range(5)) and not state.is_due(5)
    found = [[[Factors(_positive(3, 10 * k + c), _positive(4, 10 * k + c + 5))] for c in range(2)] for k in range(4)]
    for step, factors in enumerate(found):
        assert state.needs_factors(step)
        state.renew(step, factors)
    assert not state.needs_factors(4)
    state.renew(4, None)
    for chain in range(2):
        means = [torch.stack([found[k][chain][0][j] for k in (2, 3)]).mean(0) for j in range(2)]  # type: ignore[misc]
        alone = _state({"w": (3, 4)})
        alone.renew(4, [[Factors(*means)]])
        unit = torch.eye(16, dtype=torch.float64)
        both = torch.stack([state.times_metric(row[None].expand(2, -1), 9, 1.0) for row in unit])
        torch.testing.assert_close(both[:, chain], _metric(alone))


def test_the_metric_is_renewed_more_and_more_rarely() -> None:
    steps = refreshes(4000)
    assert steps[:12] == list(range(12)) and steps[-1] == 4000 and len(steps) < 140
    assert max(np.diff(steps)) == 50 and all(np.diff(steps) <= np.maximum(1, 0.1 * np.array(steps[:-1])))
    assert refreshes(0) == [0] and refreshes(1) == [0, 1] and refreshes(2.0) == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_renewing_does_not_move_the_chains(dtype: torch.dtype) -> None:
    start = {"w": _random(3, 4, dtype=dtype), "bias": _random(3, dtype=dtype)}
    mask = {"bias": torch.tensor([True, False, True])}
    state = KroneckerState(start, mask, KFACSGLDSampler(lr=0.1, nbeta=NBETA, localization=GAMMA, adapt_steps=9), 2)
    state.start(0, 3)
    for step in range(9):
        before = state.w.clone()
        factors = [Factors(_positive(3, step), _positive(4, step + 1)), Factors(_random(3, seed=step).abs())]
        state.renew(step, [factors, factors])
        assert torch.equal(state.w, before)
        torch.testing.assert_close(state._v.square().sum(1), (before - state.rows_of(state.reference)).square().sum(1))
        state.move([torch.zeros(2, 3, 4, dtype=dtype), torch.zeros(2, 3, dtype=dtype)], step)
        moved = state.w != before
        assert moved[:, :12].all() and moved[:, 16].all() and not moved[:, 17].any() and not moved[:, 12:16].any()


def test_a_look_elsewhere_changes_nothing() -> None:
    state = _state({"w": (3, 4)}, num_chains=2)
    state.renew(0, [[Factors(_positive(3, 1), _positive(4, 2))]] * 2)
    state.move([_random(2, 3, 4)], 0)
    before = {name: t.clone() for name, t in state.arrays().items()}
    with state.displaced():
        assert not torch.equal(state.w, before["w"])
    assert all(torch.equal(t, before[name]) for name, t in state.arrays().items())


def test_the_callers_autocast_leaves_steps_in_full_precision() -> None:
    start = {"w": _random(3, 4, dtype=torch.float32)}
    ends = []
    for enabled in (False, True):
        state = KroneckerState(start, {}, KFACSGLDSampler(lr=0.1, nbeta=NBETA, localization=GAMMA, adapt_steps=4), 2)
        state.start(0, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            state.renew(0, [[Factors(_positive(3, 1), _positive(4, 2))]] * 2)
            state.move([_random(2, 3, 4, dtype=torch.float32)], 0)
        ends.append(state.w.clone())
    assert torch.equal(*ends)


def test_a_chain_that_diverged_does_not_touch_the_others() -> None:
    factors = [[Factors(_positive(3, c), _positive(4, c + 5))] for c in range(2)]
    state, other = _state({"w": (3, 4)}, num_chains=2), _state({"w": (3, 4)}, num_chains=2)
    state.renew(0, factors)
    factors[1] = [Factors(factors[1][0].rows * math.nan, factors[1][0].columns)]
    other.renew(0, factors)
    assert torch.equal(state._root[0], other._root[0]) and torch.isfinite(other._root).all()


# ---- a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_a_step_is_that_of_the_rule(alpha: float) -> None:
    """w + U√p·M, M = (1 − α)M − (ε/2)·√p·UᵀD + √(εα)ξ, its bias and distance, in float64; with a mask and a decay."""
    b, a = _positive(3, 1), _positive(4, 2)
    mask = _random(3, 4, seed=5) > -0.5
    state = _state({"w": (3, 4)}, num_chains=2, masks={"w": mask}, weight_decay=0.7, lr=0.05, momentum_decay=alpha)
    state.renew(4, [[Factors(b, a)]] * 2)
    state.put(state.w + 0.1 * _random(2, 16, seed=8) * torch.cat([mask.flatten(), torch.zeros(4)]))
    w, reference = state.w[:, :12].clone(), state.reference[0].flatten()
    grad, moving = _random(2, 3, 4, seed=9), mask.flatten().double()
    full = torch.linalg.inv(
        NBETA * torch.kron(*(m + m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype) for m in (b, a)))
        + (GAMMA + 0.7) * torch.eye(12, dtype=torch.float64)
    )
    metric = moving[:, None] * full * moving
    own = NBETA * grad.flatten(1) * moving
    drift = own + (GAMMA * (w - reference) + 0.7 * w) * moving
    before = state.states[0].normal_(generator=torch.Generator().manual_seed(4)).clone()
    state.move([grad], 4)
    noise = torch.stack([normals(0, 16, NoiseKey(7, 4, c), dtype=torch.float64, device=_CPU) for c in range(2)])
    momentum = (1 - alpha) * before + math.sqrt(0.05 * alpha) * noise
    rows, columns = state._bases[0]  # type: ignore[misc]

    def outside(m: Tensor) -> Tensor:
        inner = (state._root * m)[:, :12].view(2, 3, 4)
        return (rows @ inner @ columns.mT).flatten(1) * moving

    torch.testing.assert_close(state.w[:, :12], w - 0.025 * drift @ metric + outside(momentum))
    info = state.info()
    bias = (own * (0.05 / 8 * drift @ metric - (1 - alpha) / 2 * outside(before))).sum(1) / alpha
    torch.testing.assert_close(torch.as_tensor(info["bias"]), bias)
    torch.testing.assert_close(torch.as_tensor(info["squared_distance"]), ((w - reference) * moving).square().sum(1))


def test_noise_has_the_covariance_of_the_metric() -> None:
    """Of 20,000 chains that take one step from w* without a gradient."""
    count = 20_000
    state = _state({"w": (2, 3)}, num_chains=count, lr=0.3, momentum_decay=0.4)
    state.renew(4, [[Factors(_positive(2, 1), _positive(3, 2))]] * count)
    start = state.w.clone()
    state.move([torch.zeros(count, 2, 3, dtype=torch.float64)], 4)
    moved = (state.w - start)[:, :6]
    expected = 0.3 * 0.4 * _metric(state)[:6, :6]
    scale = torch.outer(expected.diagonal(), expected.diagonal()).sqrt()
    assert ((moved.T @ moved / count - expected) / scale).abs().max() < 5 * math.sqrt(2 / count)
    assert (moved.mean(0) / expected.diagonal().sqrt()).abs().max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_bias_is_exact_in_a_quadratic_well(alpha: float) -> None:
    """nβ·E[L] of the chain's discrete law above the posterior's, by the Lyapunov equation; the metric fits neither."""
    copies, lr = 500, 1.0
    basis = torch.linalg.qr(_random(6, 6, seed=4))[0]
    hessian = basis @ torch.diag(torch.logspace(-0.5, 0.5, 6, dtype=torch.float64)) @ basis.T
    state = _state({"w": (2, 3)}, num_chains=copies, lr=lr, damping=0.5, momentum_decay=alpha)
    state.renew(4, [[Factors(_positive(2, 1), _positive(3, 2))]] * copies)
    metric = _metric(state)[:6, :6]
    full = NBETA * hessian + GAMMA * torch.eye(6, dtype=torch.float64)
    lr = 1.5 * alpha / float(torch.linalg.eigvals(metric @ full).real.max())  # of 4 that are stable
    state = _state({"w": (2, 3)}, num_chains=copies, lr=lr, damping=0.5, momentum_decay=alpha)
    state.renew(4, [[Factors(_positive(2, 1), _positive(3, 2))]] * copies)
    pull, kick = 0.5 * lr * (metric @ full).numpy(), lr * alpha * metric.numpy()
    step = np.block([[np.eye(6) - pull, (1 - alpha) * np.eye(6)], [-pull, (1 - alpha) * np.eye(6)]])
    assert max(abs(np.linalg.eigvals(step))) ** 1000 < 1e-3
    covariance = solve_discrete_lyapunov(step, np.block([[kick, kick], [kick, kick]]))[:6, :6]
    exact = 0.5 * NBETA * float(np.trace(hessian.numpy() @ (covariance - np.linalg.inv(full.numpy()))))
    reference, found, loss = state.reference[0], [], []
    for k in range(1500):
        away = state.params()["w"] - reference
        grad = (away.flatten(1) @ hessian).view_as(away)
        state.move([grad], 4 + k)
        if k >= 1000:
            found.append(float(torch.as_tensor(state.info()["bias"]).mean()))
            loss.append(0.5 * NBETA * float((away.flatten(1) @ hessian * away.flatten(1)).sum(1).mean()))
    posterior = 0.5 * NBETA * float(torch.linalg.solve(full, hessian).trace())
    assert exact > 0.05 and np.mean(found) == pytest.approx(exact, rel=0.03)
    assert np.mean(loss) - np.mean(found) == pytest.approx(posterior, rel=0.02)


# ---- estimates ---------------------------------------------------------------------------------------------


def _regression(n: int = 200, outputs: int = 2, seed: int = 1) -> tuple[nn.Linear, tuple[Tensor, Tensor], Tensor]:
    """Linear regression with correlated inputs of condition number 10⁴, at its minimum; its Hessian, A ⊗ B."""
    mixing = torch.diag(torch.logspace(-1, 1, 5, dtype=torch.float64)) @ torch.linalg.qr(_random(5, 5, seed=seed))[0]
    x = (_random(n, 5, seed=seed + 1) @ mixing).float()
    y = x @ _random(5, outputs, seed=seed + 2, dtype=torch.float32) + 0.1 * _random(n, outputs, seed=seed + 3).float()
    model = nn.Linear(5, outputs, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    second = 2 / outputs * (x.double().T @ x.double()) / n
    return model, (x, y), torch.kron(torch.eye(outputs, dtype=torch.float64), second)


@pytest.mark.parametrize("batch_size", [200, 20])
def test_linear_regression(batch_size: int) -> None:
    """λ̂ = ½·Σ nβh/(nβh + γ) and the covariance (nβH + γ)⁻¹; minibatches add noise that the correction takes back."""
    model, data, hessian = _regression()
    nbeta, gamma = 40.0, 1.0
    result = estimate(
        model=model,
        data=data,
        sampler=KFACSGLDSampler(damping=0.02, momentum_decay=1.0 if batch_size == 200 else 0.2),
        lr=0.3,
        nbeta=nbeta,
        localization=gamma,
        bias_correction=True,
        batch_size=batch_size,
        num_chains=8,
        num_burnin=200,
        num_draws=2000,
        observables={"w": lambda draw: draw.params["weight"].flatten()},
    )
    full = nbeta * hessian + gamma * torch.eye(10, dtype=torch.float64)
    exact = 0.5 * nbeta * float(torch.linalg.solve(full, hessian).trace())
    assert exact < 4.9 and result.llc_mean == pytest.approx(exact, abs=5 * result.llc_stderr)
    assert result.llc_stderr < 0.15 and result.diagnostics["bias_share"] > 0.02
    if batch_size == 200:
        draws = result.observables["w"].reshape(-1, 10) - model.weight.detach().double().flatten().numpy()
        covariance = draws.T @ draws / len(draws)
        roots = np.linalg.cholesky(full.numpy())
        whitened = roots.T @ covariance @ roots
        # At 0.3·p·a of 1 and less the variance is 1/(1 − εpa/4) too large; an effective sample size of 1,000 at least.
        assert np.abs(whitened - np.eye(10)).max() < 0.3 / 4 / (1 - 0.3 / 4) + 5 * math.sqrt(2 / 1000)


def test_factors_of_a_linear_model_are_its_hessian() -> None:
    model, data, hessian = _regression(n=4000)
    objective = Objective(model, mse, make_source(data, 4000, _CPU), device=_CPU)
    [found] = GaussNewton(objective, 3)(objective.reference, {}, 0, 0)
    assert found.columns is not None
    product = torch.kron(found.rows.double(), found.columns.double())
    # The mean of 4,000 random signs' outer products is 1 up to 1/√4000.
    assert (product - hessian).abs().max() < 5 / math.sqrt(4000) * hessian.abs().max()


def test_wells_are_the_diagonal() -> None:
    """Curvatures by classes of a quarter of an octave, none of them lost; None without a Gauss–Newton matrix."""
    model, data, hessian = _regression(n=4000)
    objective = Objective(model, mse, make_source(data, 4000, _CPU), device=_CPU)
    found = diagonal_wells(objective, 3)
    assert found is not None and sum(found.counts) == 10
    exact = hessian.diagonal().sort().values.tolist()
    classes = [h for h, count in zip(found.curvatures, found.counts, strict=True) for _ in range(int(count))]
    assert classes == pytest.approx(exact, rel=2 ** (1 / 8) - 1 + 0.08)  # the class, and 4,000 signs
    linear = Objective(model, lambda output, target: output.mean(), make_source(data, 4000, _CPU), device=_CPU)
    assert diagonal_wells(linear, 3) is None


def test_it_crosses_slow_directions() -> None:
    """A deep linear network of rank 1: SGLD at the same length has not got there. λ by Aoyagi's formula."""
    problem = most_singular((6, 9, 9, 6), 1, 10_000, seed=1)
    options: dict[str, Any] = {"localization": 1.0, "batch_size": 200, "num_burnin": 600, "num_draws": 600, "lr": None}
    found, plain = (
        estimate(model=problem.model, data=problem.data, sampler=sampler, **options)
        for sampler in ("kfac-sgld", "sgld")
    )
    known = problem.learning_coefficient
    assert abs(found.llc_mean / known - 1) < 0.12 < abs(plain.llc_mean / known - 1)
    assert found.diagnostics["pilot_bias_share"] < 0.3
    assert "3 of 3" in found.diagnostics["strategy_reason"]


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.b = nn.Conv1d(3, 4, 2, dilation=2)
        self.norm = nn.BatchNorm1d(4)
        self.c = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x)).flatten(2)
        out: Tensor = self.c(self.norm(self.b(x)).relu().mean(2))
        return out


def _convolutions() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return _Convolutions().eval(), (torch.randn(64, 2, 8, 8), torch.randn(64, 3))


def test_convolutions() -> None:
    """Squared errors, where E[(JᵀHz)²] is the Gauss–Newton matrix's diagonal: its trace by Jacobians.

    K-FAC leaves out correlations between places, so of convolutions only what has one place can be compared.
    """
    model, data = _convolutions()
    objective = Objective(model, mse, make_source(data, 64, _CPU), device=_CPU)
    gauss_newton = GaussNewton(objective, 3)
    assert dict(zip(objective.reference, gauss_newton.is_matrix, strict=True)) == {
        name: name in ("a.weight", "b.weight", "c.weight") for name in objective.reference
    }
    factors = [gauss_newton(objective.reference, objective.fresh_buffers(), k, 0) for k in range(100)]
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (data[0],)))(params)
    for k, name in enumerate(params):
        if name in ("a.weight", "b.weight"):
            continue
        exact = 2 / 3 * float(jacobian[name].square().sum()) / 64
        if name == "c.weight":
            traces = [float(f[k].rows.trace() * f[k].columns.trace()) for f in factors]  # type: ignore[union-attr]
        else:
            traces = [float(f[k].rows.sum()) for f in factors]
        assert abs(np.mean(traces) - exact) < 4 * np.std(traces) / math.sqrt(len(traces)) + 1e-3 * exact
        assert np.std(traces) < 1.5 * exact
    result = estimate(model=model, data=data, sampler="kfac-sgld", batch_size=32, num_draws=30, num_burnin=30, lr=None)
    assert math.isfinite(result.llc_mean) and "3 of 8" in result.diagnostics["strategy_reason"]


@pytest.mark.parametrize("kind", ["conv2d", "conv1d", "linear"])
def test_inputs_and_outputs_give_the_gradient(kind: str) -> None:
    """What goes with rows and columns has the weight's gradient as its product, so the layout is the weight's."""
    torch.manual_seed(1)
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "conv2d": (nn.Conv2d(2, 3, (3, 2), padding=(1, 0), stride=(1, 2), dilation=(2, 1)), torch.randn(5, 2, 9, 8)),
        "conv1d": (nn.Conv1d(2, 3, 3, padding=2, stride=2), torch.randn(5, 2, 9)),
        "linear": (nn.Linear(4, 3), torch.randn(5, 7, 4)),
    }
    module, x = made[kind]
    weight, y = module.get_parameter("weight"), module(x)
    slope = torch.randn_like(y)
    [grad] = torch.autograd.grad(y, [weight], slope)
    rows, columns = _as_rows(module, x, slope, None)
    torch.testing.assert_close((rows.mT @ columns).view(grad.shape), grad, rtol=1e-4, atol=1e-4)


def test_patches_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison that finds weights that are used in other ways, with a few samples at a time."""
    model, data = _convolutions()
    objective = Objective(model, mse, make_source(data, 64, _CPU), device=_CPU)
    monkeypatch.setattr(objective_kronecker, "_PIECE", 2 * 8 * 8 * 9 * 10)
    assert sum(GaussNewton(objective, 3).is_matrix) == 3


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.other = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.beside = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = (self.embed(x) + self.other(x)).mean(1)
        x = self.twice(self.twice(self.mix(x)).tanh())
        out: Tensor = self.head(self.beside(x) + x @ self.beside.weight)
        return out


def test_what_is_not_applied_as_a_matrix_has_a_diagonal() -> None:
    torch.manual_seed(0)
    model, data = _Tied(), (torch.randint(0, 7, (60, 3)), torch.randint(0, 7, (60,)))
    objective = Objective(model, nn.functional.cross_entropy, make_source(data, 30, _CPU), device=_CPU)
    found = GaussNewton(objective, 3)
    assert found.diagonal_because == {
        "embed.weight": "several modules share it",
        "other.weight": "Embedding does not apply it as a matrix",
        "beside.weight": "it is used by more than its module",
    }
    assert [n for n, m in zip(objective.reference, found.is_matrix, strict=True) if m] == ["mix.weight", "twice.weight"]
    result = estimate(
        model=model, data=data, loss_fn=nn.functional.cross_entropy, sampler="kfac-sgld", lr=0.05, num_draws=20
    )
    reason = result.diagnostics["strategy_reason"]
    assert "2 of 8" in reason and "beside.weight (it is used by more than its module)" in reason


class _OfDictionaries(nn.Linear):
    """A linear layer by name, whose forward takes something else."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"])


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _OfDictionaries(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner({"x": x})  # type: ignore[no-any-return]


def test_a_linear_layer_with_a_forward_of_its_own_has_a_diagonal() -> None:
    torch.manual_seed(0)
    model, x = _Named(), torch.randn(60, 3)
    data = x, model(x).detach()
    objective = Objective(model, mse, make_source(data, 30, _CPU), device=_CPU)
    assert GaussNewton(objective, 3).diagonal_because == {"inner.weight": "it is used by more than its module"}
    wells = diagonal_wells(objective, 3)
    assert wells is not None and sum(wells.counts) == 4
    result = estimate(model=model, data=data, loss_fn=mse, sampler="kfac-sgld", lr=0.05, num_draws=400, batch_size=30)
    assert result.llc_mean == pytest.approx(2, abs=4 * result.llc_stderr) and result.llc_stderr < 0.3  # P/2


def test_large_matrices_have_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker, "MAX_SIDE", 3)
    few = estimate(sampler="kfac-sgld", lr=0.05)
    assert "diagonal for 0.weight" in few.diagnostics["strategy_reason"] and np.isfinite(few.loss_trace).all()
    monkeypatch.setattr(kronecker, "MAX_PARAMETERS", 3)
    assert "0 of 4" in estimate(sampler="kfac-sgld", lr=0.05).diagnostics["strategy_reason"]


def test_chains_are_the_same_in_any_strategy() -> None:
    options: dict[str, Any] = {"sampler": "kfac-sgld", "lr": 0.05, "num_draws": 30, "num_burnin": 30}
    batched, alone = (estimate(**options, strategy=strategy) for strategy in ("batched", "sequential"))
    np.testing.assert_allclose(batched.loss_trace, alone.loss_trace, rtol=2e-3)
    np.testing.assert_allclose(batched.bias_trace, alone.bias_trace, rtol=2e-2, atol=1e-4)
    one = estimate(**options | {"num_chains": 1}, strategy="sequential")
    np.testing.assert_array_equal(one.loss_trace, alone.loss_trace[:1])


def test_the_model_and_generators_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    with pytest.warns(llc_fast.LLCWarning):
        estimate(model=model, sampler="kfac-sgld", lr=0.05)
    assert torch.equal(torch.get_rng_state(), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_not_possible_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="release_gradients=True is not possible: sampler='kfac-sgld' needs the whole"):
        estimate(sampler="kfac-sgld", strategy="sequential", release_gradients=True)
    with pytest.raises(ValueError, match=r"use estimate_llc\(sampler='kfac-sgld'\)"):
        llc_fast.optim.optimizer_for(KFACSGLDSampler)
    with pytest.raises(ValueError, match='sampler="kfac-sgld" is not possible: the loss has no second derivative'):
        estimate(sampler="kfac-sgld", lr=0.05, loss_fn=lambda output, target: (output - target).abs().mean())

    def of_weights(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack([p.square().mean() for p in model.parameters()]).sum()

    with pytest.raises(ValueError, match="the loss does not come from what model"):
        estimate(sampler="kfac-sgld", lr=0.05, loss_fn=of_weights)
    for options in ({"damping": 0.0}, {"adapt_steps": 0}, {"momentum_decay": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_sampler("kfac-sgld", **options)


def test_memory_is_counted() -> None:
    """What a state holds, against what the sampler says beside plain SGLD."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))  # no gaps between parameters in a row
    data = torch.randn(40, 32), torch.randn(40, 16)
    objective = Objective(model, mse, make_source(data, 10, _CPU), device=_CPU)
    both = [make_sampler(name, lr=0.1, nbeta=1.0, localization=1.0) for name in ("kfac-sgld", "sgld")]
    plans = [make_plan(objective, sampler, 1, strategy="sequential") for sampler in both]
    states = [KroneckerState(objective.reference, {}, both[0], 1), ChainState(objective.reference, {}, both[1], 1)]  # type: ignore[arg-type]
    for state in states:
        state.start(0, 0)
    kept = [sum(t.nbytes for t in state.arrays().values()) for state in states]
    extra = [needed_bytes(objective, sampler, plan) for sampler, plan in zip(both, plans, strict=True)]
    assert extra[0] - extra[1] >= kept[0] - kept[1] - 8 > 0  # 8: a number of steps


def test_the_step_size_is_one_over_the_stiffness() -> None:
    """In linear regression P·(nβH + γ) is known."""
    model, data, hessian = _regression(n=4000)
    objective = Objective(model, mse, make_source(data, 4000, _CPU), device=_CPU)
    sampler = KFACSGLDSampler(lr=1.0, nbeta=40.0, localization=1.0, adapt_steps=10)
    found = chains_metric.kronecker_stiffness(objective, sampler, 0) - 1
    a, eye = hessian[:5, :5], torch.eye(5, dtype=torch.float64)
    metric = torch.linalg.inv(40 * 2 * (a + a.trace() / 5 * eye) + eye)  # B = 1, damped by its own size
    expected = float(torch.linalg.eigvals(metric @ (40 * a)).real.max())
    assert found == pytest.approx(expected, rel=0.06)


def test_prior_alone() -> None:
    """At nβ = 0 it draws from the Gaussian of γ."""
    result = estimate(
        sampler="kfac-sgld",
        nbeta=0.0,
        lr=None,
        localization=4.0,
        num_draws=2000,
        num_chains=4,
        observables={"away": lambda draw: (draw.params["0.weight"] - _REFERENCE).square().sum()},
    )
    # Draws forget each other in 2/(ε·γ·p) = 50 steps and more.
    assert float(result.observables["away"].mean()) == pytest.approx(
        12 / 4, rel=5 * math.sqrt(2 / 12 / 8000 * 2 * 50) + 0.02
    )


_REFERENCE = mlp().get_parameter("0.weight").detach().clone()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The posterior's mean of the CPU's chains, by every strategy. Eigenvectors may be others there, so noise is."""

    def run(device: str, strategy: str | None) -> llc_fast.LLCResult:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
        x = torch.randn(400, 6)
        with torch.no_grad():
            y = model(x) + 0.1 * torch.randn(400, 2)
        return llc_fast.estimate_llc(
            model,
            (x, y),
            nn.functional.mse_loss,
            sampler="kfac-sgld",
            lr=0.3,
            nbeta=60.0,
            localization=1.0,
            num_chains=4,
            num_burnin=200,
            num_draws=600,
            batch_size=50,
            device=device,
            progress=False,
            execution=llc_fast.Execution(strategy=strategy),
        )

    on_cpu = run("cpu", None)
    for strategy in (None, "sequential", "batched"):
        on_gpu = run("cuda", strategy)
        assert on_gpu.settings["strategy"] == (strategy or "cuda-graph")
        error = math.hypot(on_gpu.llc_stderr, on_cpu.llc_stderr)
        assert abs(on_gpu.llc_mean - on_cpu.llc_mean) < 4 * error < 0.15 * on_cpu.llc_mean


def test_its_work_is_counted() -> None:
    """By hand, for a 3 × 2 matrix and a vector: two products each way, and renewals before steps 0 … 9, once each."""
    flops, calls = KFACSGLDSampler.extra_work([(3, 2), (4,)], 1000.0, 20)
    rotation = 2 * 3 * 3 * 2 + 2 * 3 * 2 * 2
    assert flops == pytest.approx(2 * rotation + 11 / 20 * (1500 + 2 * 20 * (27 + 8)))
    assert calls > 2
    assert KFACSGLDSampler.extra_work([(5000, 2)], 0.0, 20)[0] == 0  # a diagonal is not rotated
    assert make_sampler("sgld").extra_work([(3, 2)], 1000.0, 20) == (0.0, 0.0)


@pytest.mark.slow
def test_heated_flat_directions_do_not_raise_the_loss() -> None:
    """A ReLU network whose first layer is rescaled has directions that are flat but for γ, which large steps heat. What
    the pilots choose finds the λ̂ of HMC on all data, though minibatches of 100 among 10,000 samples are noisy.

    With γ = 100 HMC arrives: with γ = 1 its λ̂ grows for 10,000 gradients, from 1050 to 1180.
    """
    network = make_network((30, 40, 30), 0, copies=6)
    model, data = rescale(network, 0, 0.1), make_data(network, 10_000, 0)
    shared: dict[str, Any] = {"localization": 100.0, "progress": False, "seed": 1}
    exact = llc_fast.estimate_llc(
        model,
        data,
        mse,
        sampler="hmc",
        preconditioner="curvature",
        localization_metric="euclidean",
        batch_size=None,
        num_chains=2,
        num_burnin=150,
        num_draws=250,
        **shared,
    )
    found = llc_fast.estimate_llc(
        model, data, mse, sampler="kfac-sgld", batch_size=100, num_chains=4, num_burnin=1200, num_draws=1200, **shared
    )
    assert found.diagnostics["bias_share"] > 0.05  # it is subtracted
    error = math.hypot(exact.llc_stderr, found.llc_stderr)
    assert abs(found.llc_mean - exact.llc_mean) < 3 * error < 0.05 * exact.llc_mean
