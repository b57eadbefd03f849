"""λ̂ of models whose learning coefficient is known, within its own error bar.

Where n is finite and γ positive, nβ·E[L] under the localized posterior differs from λ in a known way; the tests
compare with that exact value, and the exact value with λ.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_forms import NormalCrossing, Quadratic, ReducedRank, crossing_mean, reduced_rank_mean, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import llc_fast
from llc_fast import estimate_llc, theory
from llc_fast.problems.deep_linear import SIZE_CLASSES, make_problem, network
from llc_fast.settings import Settings

SIGMAS = 4.0


def _assert_agrees(estimate: float, stderr: float, exact: float, *, precision: float) -> None:
    assert stderr < precision * exact, f"the run is too short to test anything: {estimate} ± {stderr}"
    assert abs(estimate - exact) < SIGMAS * stderr, f"{estimate} ± {stderr}, exact {exact}"


def test_regular_model() -> None:
    """d/2, with the known effects of γ and of the step size on each direction."""
    torch.manual_seed(0)
    d, nbeta, localization, lr = 400, 1000.0, 1.0, 2e-5
    curvature = torch.logspace(-0.5, 1, d)
    result = run(Quadratic(curvature), lr=lr, nbeta=nbeta, localization=localization, num_draws=8000, num_burnin=2000)
    stiffness = nbeta * curvature.double() + localization
    exact = float((0.5 * nbeta * curvature.double() / (stiffness * (1 - lr * stiffness / 4))).sum())
    _assert_agrees(result.llc_mean, result.llc_stderr, exact, precision=0.01)
    assert exact == pytest.approx(theory.regular(d).value, rel=0.025)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_normal_crossing_in_one_dimension(k: int) -> None:
    """w^(2k): nβ·E[L] = 1/(2k) for every nβ, with no localization."""
    copies, nbeta = 4000, 1000.0
    lr = 4e-6 if k == 1 else 4e-5  # stiffest where the bottom is quadratic
    result = run(NormalCrossing((k,), copies), lr=lr, nbeta=nbeta, localization=0.0, num_draws=6000, num_burnin=6000)
    assert crossing_mean((k,), nbeta, 0.0) == pytest.approx(1 / (2 * k), rel=1e-3)
    exact = copies * theory.normal_crossing([k]).value
    _assert_agrees(result.llc_mean, result.llc_stderr, exact, precision=0.02)


@pytest.mark.parametrize("exponents", [(1, 1), (1, 2)])
def test_normal_crossing_in_two_dimensions(exponents: tuple[int, int]) -> None:
    """Multiplicity 2 for w₁²w₂²: λ is approached as 1/log nβ, and the estimate is right at the finite nβ."""
    copies, nbeta, localization = 4000, 1000.0, 10.0
    result = run(
        NormalCrossing(exponents, copies),
        lr=1e-4,
        nbeta=nbeta,
        localization=localization,
        num_draws=5000,
        num_burnin=10_000,
    )
    exact = copies * crossing_mean(exponents, nbeta, localization)
    _assert_agrees(result.llc_mean, result.llc_stderr, exact, precision=0.03)
    known = theory.normal_crossing(exponents)
    gaps = [abs(crossing_mean(exponents, nb, localization) - known.value) for nb in (1e4, 1e8, 1e12)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < (0.05 if known.multiplicity == 2 else 0.02)


@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 2), (2, 2, 1), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 1, 3), (3, 1, 1)))],
    ids=["even", "odd (multiplicity 2)", "inputs + hidden < outputs", "outputs + hidden < inputs"],
)
def test_reduced_rank_regression(sizes: tuple[int, int, int]) -> None:
    """The four cases of Aoyagi & Watanabe 2005."""
    copies, nbeta, localization = 500, 1000.0, 10.0
    # The stiffest directions depend on the others, so the effect of the step size has no closed form here: it is
    # removed by extrapolation from ε and ε/2, whose runs share nothing.
    coarse, fine = (
        run(
            ReducedRank(*sizes, copies),
            lr=lr,
            nbeta=nbeta,
            localization=localization,
            num_draws=int(0.4 / lr),
            num_burnin=int(0.5 / lr),
            seed=seed,
        )
        for seed, lr in enumerate((1e-4, 5e-5))
    )
    estimate = 2 * fine.llc_mean - coarse.llc_mean
    stderr = math.hypot(2 * fine.llc_stderr, coarse.llc_stderr)
    exact = copies * reduced_rank_mean(*sizes, nbeta, localization)
    known = theory.reduced_rank_regression(*sizes, 0)
    _assert_agrees(estimate, stderr, exact, precision=0.03)
    gaps = [abs(reduced_rank_mean(*sizes, nb, localization) - known.value) for nb in (1e4, 1e8, 1e12)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < (0.05 if known.multiplicity == 2 else 1e-4) * known.value


def _whitened_inputs(count: int, width: int) -> torch.Tensor:
    """Inputs whose second moment is the identity: the empirical loss is then the population loss."""
    generator = torch.Generator().manual_seed(11)
    q, _ = torch.linalg.qr(torch.randn(count, width, generator=generator, dtype=torch.float64))
    return (q * count**0.5).float()


def _isometry(fan_out: int, fan_in: int, seed: int) -> torch.Tensor:
    """All singular values 1, so that no direction is too flat to be seen at finite n."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64), False)
    return u @ v


@pytest.mark.parametrize(
    ("widths", "rank"), [((8, 8, 8), 8), ((10, 6, 8, 10), 6), ((5, 7, 6, 4), 4)], ids=["square", "bottleneck", "funnel"]
)
def test_deep_linear_network(widths: tuple[int, ...], rank: int) -> None:
    """Aoyagi's λ where the true set is smooth; its Hessian has rank 2λ and gives the effects of γ and ε."""
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [_isometry(fan_out, fan_in, seed) for seed, (fan_out, fan_in) in enumerate(shapes)]
    x = _whitened_inputs(32, widths[0])
    product = torch.linalg.multi_dot(weights[::-1])
    lr, nbeta, localization = 1e-7, 1e5, 1.0

    def population_loss(flat: torch.Tensor) -> torch.Tensor:
        layers = [w.view(s) for w, s in zip(flat.split([a * b for a, b in shapes]), shapes, strict=True)]
        return (torch.linalg.multi_dot(layers[::-1]) - product).square().sum()

    curvature = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(population_loss, torch.cat([w.flatten() for w in weights]))
    )
    curvature = curvature[curvature > 1e-9]
    known = theory.deep_linear(widths, rank).value
    assert len(curvature) == 2 * known
    stiffness = nbeta * curvature + localization
    exact = float((0.5 * nbeta * curvature / (stiffness * (1 - lr * stiffness / 4))).sum())
    assert exact == pytest.approx(known, rel=0.02)

    result = estimate_llc(
        network(weights),
        (x, x @ product.T.float()),
        lambda output, target: (output - target).square().sum(dim=1).mean(),
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        num_chains=4,
        num_draws=8000,
        num_burnin=2000,
        batch_size=32,
        progress=False,
        seed=3,
    )
    _assert_agrees(result.llc_mean, result.llc_stderr, exact, precision=0.02)


@pytest.mark.slow
def test_deep_linear_networks_of_the_paper() -> None:
    """Six random networks of the 1k class with the paper's own settings: its accuracy, 6 % in the median."""
    errors = []
    for seed in range(100, 106):
        problem, cls = make_problem("1k", seed), SIZE_CLASSES["1k"]
        result = estimate_llc(
            problem.model,
            problem.data,
            nn.functional.mse_loss,
            lr=cls.lr,
            batch_size=500,
            num_chains=2,
            num_draws=2000,
            num_burnin=8000,
            progress=False,
        )
        errors.append(abs(result.llc_mean / problem.learning_coefficient - 1))
    assert sorted(errors)[2] <= 0.06, errors


def test_preset_of_the_papers() -> None:
    """Plain SGLD at γ = 1 in minibatches of 500, 9,000 + 1,000 steps, nβ = n / log n; what is given wins."""
    x, y = torch.randn(600, 2), torch.randn(600, 1)
    model, loss = nn.Linear(2, 1), nn.functional.mse_loss
    options: dict[str, Any] = {"preset": "paper", "num_chains": 2, "progress": False}
    found = llc_fast.estimate_llc(model, (x, y), loss, lr=1e-4, **options).settings
    expected = {"sampler": "sgld", "lr": 1e-4, "localization": 1.0, "batch_size": 500, "num_burnin": 9000}
    expected |= {"num_draws": 1000, "bias_correction": False, "preset": "paper"}
    assert {name: found[name] for name in expected} == expected
    other = Settings(preset="paper", sampler="rmsprop-sgld", localization=0.5, num_draws=10, batch_size=20)
    assert (other.sampler, other.localization, other.num_draws, other.batch_size) == ("rmsprop-sgld", 0.5, 10, 20)
    assert other.num_burnin == 9000 and Settings(preset="paper", max_gradients=10**5).num_draws is None
    loader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)
    short = {**options, "num_draws": 5, "num_burnin": 5}
    assert llc_fast.estimate_llc(model, loader, loss, lr=1e-4, **short).settings["batch_size"] == 100
    chosen = llc_fast.calibrate(model, loader, loss, **short)
    assert chosen["batch_size"] is None and chosen["bias_correction"] is False
    result = llc_fast.estimate_llc(model, (x, y), loss, **short)
    assert result.nbeta == pytest.approx(600 / math.log(600))
