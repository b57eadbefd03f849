"""A better minimum near w*: where it is, what it costs, and estimates around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import assert_same, codes, estimate, initialized, interrupted_after, mlp, mse
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import llc_fast
from llc_fast import estimate as estimate_module
from llc_fast.data import make_source
from llc_fast.objective.objective import Objective
from llc_fast.objective.refinement import Refinement, refine
from llc_fast.problems.exact_posteriors import PROBLEMS

pytestmark = pytest.mark.usefixtures("seeded")

CPU = torch.device("cpu")


def _linear(dtype: torch.dtype = torch.float64, n: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2, 5)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return initialized(nn.Linear(5, 1, bias=False).to(dtype)), x.to(dtype), y.to(dtype)


def _objective(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 16, **options: Any) -> Objective:
    return Objective(model, mse, make_source((x, y), batch_size, CPU), device=CPU, **options)


def _refined(
    objective: Objective, nbeta: float = 40.0, gamma: float = 1e-3, passes: int = 40
) -> tuple[Tensor, Refinement]:
    found, done = refine(objective, nbeta, gamma, max_passes=passes)
    return next(iter(found.values())), done


# ---- the place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_least_squares(dtype: torch.dtype) -> None:
    """The solution to within what matters to λ̂, and the fall, the distance and the gradients that it says."""
    model, x, y = _linear(dtype)
    before = copy.deepcopy(model.state_dict())
    weight, done = _refined(_objective(model, x, y))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    best = torch.linalg.lstsq(x.double(), y.double()).solution.T

    def loss(w: Tensor) -> float:
        return float((x.double() @ w.double().T - y.double()).square().mean())

    assert 0 <= 40 * (loss(weight) - loss(best)) < 0.02
    start = before["weight"]
    assert done.fall == pytest.approx(40 * (loss(start) - loss(weight)), rel=1e-4)
    assert done.distance == pytest.approx(float((weight - start).norm() / start.norm()), rel=1e-5)
    for w, size in ((start, done.gradient_before), (weight, done.gradient_after)):
        gradient = 2 * x.T.double() @ (x.double() @ w.double().T - y.double()) / len(x)
        assert size == pytest.approx(float(gradient.norm()), rel=1e-3, abs=1e-6)
    assert done.is_complete and done.gradients == 4 * done.passes <= 4 * 20


def test_gamma_holds_it_near() -> None:
    """With a γ that is more than any curvature, it hardly moves: each step by −nβ∇L/(nβH + γ)."""
    model, x, y = _linear()
    objective = _objective(model, x, y)
    start, gamma = model.get_parameter("weight").detach().clone(), 1e6
    weight, done = _refined(objective, 40.0, gamma)
    gradient = 2 * x.T @ (x @ start.T - y) / len(x)
    assert torch.equal(weight, start) == (done.fall == 0)
    assert float((weight - start).norm()) <= 1.1 * 40 * float(gradient.norm()) / gamma
    assert done.is_complete


def test_masks_and_frozen_parameters_stay() -> None:
    """The minimum over the elements that are sampled; the others do not move at all."""
    model, x, y = _linear()
    mask = torch.tensor([[True, False, True, False, True]])
    weight, _ = _refined(_objective(model, x, y, params={"weight": mask}))
    start = model.get_parameter("weight").detach()
    assert torch.equal(weight[~mask], start[~mask])
    rest = y - x[:, ~mask[0]] @ start[~mask][:, None]
    best = torch.linalg.lstsq(x[:, mask[0]], rest).solution.T
    torch.testing.assert_close(weight[mask], best[0], rtol=0.1, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Computed in float32 and rounded; what it says is of the rounded place, and never a rise."""
    model, x, y = _linear(torch.float32)
    model = model.to(dtype)
    weight, done = _refined(_objective(model, x.to(dtype), y.to(dtype)))
    assert weight.dtype == dtype and done.fall > 1 and done.gradient_after < 0.2 * done.gradient_before
    model.load_state_dict({"weight": weight})
    again, more = _refined(_objective(model, x.to(dtype), y.to(dtype)))
    assert more.fall >= 0 and (more.fall > 0 or torch.equal(again, weight))


class _Valley(nn.Module):
    """Rosenbrock's valley, a loss that is neither quadratic nor convex."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w
        return (1 - a) ** 2 + 100 * (b - a**2) ** 2 + 0 * x


def test_a_bent_valley() -> None:
    x = torch.zeros(4, 1, dtype=torch.float64)
    objective = Objective(_Valley(), lambda out, _: out.mean(), make_source((x, x), 4, CPU), device=CPU)
    w, done = _refined(objective, 100.0, 1e-3, passes=200)
    assert done.is_complete and done.fall == pytest.approx(2420, rel=0.01)
    torch.testing.assert_close(w, torch.ones(2, dtype=torch.float64), rtol=0.05, atol=0.05)


def test_budget_is_kept_and_what_it_buys() -> None:
    """No pass more than given; every pass more goes further down, or as far; the same bits each time."""
    falls = []
    for passes in (1, 2, 3, 5, 9, 400):
        objective = _objective(mlp(torch.float64), *runs.data(64, torch.float64))
        count, before = 0, objective.gradient_at

        def counted(*args: Any, before: Any = before) -> Tensor:
            nonlocal count
            count += 1
            return before(*args)  # type: ignore[no-any-return]

        objective.in_full_precision = lambda objective=objective: objective  # type: ignore[method-assign,misc]
        objective.gradient_at = counted  # type: ignore[method-assign]
        found, done = refine(objective, 15.0, 1.0, max_passes=passes)
        assert done.passes <= passes and done.gradients == count == 4 * done.passes
        again, _ = refine(objective, 15.0, 1.0, max_passes=passes)
        assert all(torch.equal(found[name], again[name]) for name in found)
        falls.append(done.fall)
    assert falls == sorted(falls) and falls[0] == 0 < falls[-1] and done.is_complete


def test_a_minimum_stays_where_it_is() -> None:
    model = mlp()
    x = runs.data()[0]
    found, done = refine(_objective(model, x, model(x).detach()), 10.0, 1.0, max_passes=20)
    assert done.fall == done.distance == 0 and done.is_complete
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


# ---- estimates ---------------------------------------------------------------------------------------------


def test_exact_answer_beside_the_minimum() -> None:
    """Logistic regression, off its point of maximum likelihood: λ̂ is too low and warned of, and right if refined."""
    problem = PROBLEMS["logistic"]()
    model = copy.deepcopy(problem.model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"localization": 1.0, "num_draws": 2500, "num_burnin": 500, "progress": False}
    before = copy.deepcopy(model.state_dict())
    plain = llc_fast.estimate_llc(model, problem.data, problem.loss_fn, **options)
    assert problem.answer - plain.llc_mean > 6 * plain.llc_stderr and "no-minimum" in codes(plain)
    owed = plain.diagnostics["descent_loss"]
    assert plain.llc_mean + owed == pytest.approx(problem.answer, abs=0.25 * owed + 4 * plain.llc_stderr)
    refined = llc_fast.estimate_llc(model, problem.data, problem.loss_fn, refine=True, **options)
    assert abs(refined.llc_mean - problem.answer) < 4 * refined.llc_stderr < 0.2 and not codes(refined)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    found = refined.diagnostics
    assert found["refine_fall"] == pytest.approx(144.765 * (plain.init_loss - refined.init_loss), rel=1e-3)
    assert found["refine_gradient_after"] < 0.1 * found["refine_gradient_before"] and found["refine_distance"] > 0.05
    assert f"refining it took {found['refine_gradients']} gradients" in refined.summary()
    assert refined.settings["refine"] is True and "refine" not in plain.settings


def test_chains_are_around_the_new_place() -> None:
    """They start there, γ pulls there, and the distance is from there: as of a model that is there."""
    x, y = runs.data(64)
    model = mlp()
    found, _ = refine(_objective(model, x, y, batch_size=10), 20.0, 1.0, max_passes=30)
    moved = copy.deepcopy(model)
    moved.load_state_dict(found)
    options: dict[str, Any] = {"data": (x, y), "nbeta": 20.0, "keep_ends": True}
    expected = estimate(model=moved, **options)
    refined = estimate(model=model, refine=30, **options)
    assert_same(refined, expected)
    for name, values in expected.ends.items():  # type: ignore[union-attr]
        assert (refined.ends[name] == values).all()  # type: ignore[index]


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_run_is_resumed_around_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float | None
) -> None:
    """The place is in the checkpoint: nothing is refined again, and the bits are the same."""
    options: dict[str, Any] = {"refine": True, "lr": lr, "num_draws": 60, "num_burnin": 40}
    expected = estimate(**options)
    for count in (7, 20):
        with interrupted_after(count):
            assert estimate(**options, checkpoint=tmp_path / "run").is_partial
        monkeypatch.setattr(estimate_module, "refine", None)
    resumed = estimate(**options, checkpoint=tmp_path / "run")
    assert_same(resumed, expected)
    assert resumed.diagnostics["refine_fall"] == expected.diagnostics["refine_fall"] > 0
    assert_same(estimate(**options, checkpoint=tmp_path / "run"), expected)
    for other in (False, 50):
        with pytest.raises(ValueError, match="belongs to another run: refine was true, is"):
            estimate(**options | {"refine": other}, checkpoint=tmp_path / "run")


def test_a_finished_run_goes_on_around_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given more draws, without refining again: the bits of a run that was as long from the start."""
    options: dict[str, Any] = {"refine": True, "num_burnin": 10}
    expected = estimate(**options, num_draws=60)
    estimate(**options, num_draws=30, checkpoint=tmp_path / "run")
    monkeypatch.setattr(estimate_module, "refine", None)
    assert_same(estimate(**options, num_draws=60, checkpoint=tmp_path / "run"), expected)


def test_sweep_and_calibration() -> None:
    model = mlp()
    states = [copy.deepcopy(model.state_dict()), copy.deepcopy(mlp(seed=9).state_dict())]
    options: dict[str, Any] = {"lr": 1e-3, "localization": 1.0, "num_draws": 20, "num_burnin": 5, "progress": False}
    plain = llc_fast.sweep_checkpoints(model, states, runs.data(), mse, warm=False, **options)
    found = llc_fast.sweep_checkpoints(model, states, runs.data(), mse, warm=False, refine=True, **options)
    assert (found.init_loss < plain.init_loss).all() and (found.gradients > plain.gradients).all()
    chosen = llc_fast.calibrate(model, runs.data(), mse, refine=50, progress=False, num_draws=100)
    assert chosen["refine"] == 50


def test_behavioral_loss_has_nothing_to_refine() -> None:
    found = estimate(loss_fn="behavioral", refine=True)
    assert_same(found, estimate(loss_fn="behavioral"))
    assert found.diagnostics["refine_gradients"] == found.diagnostics["refine_fall"] == 0


def test_it_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a long run say how many of them a better minimum may take."""
    said: list[str] = []
    monkeypatch.setattr(estimate_module, "seconds_of_gradient", lambda *_: 10.0)
    monkeypatch.setattr(estimate_module, "announce", said.append)
    estimate(refine=7, progress=True)
    estimate(progress=True)
    assert "64 gradients on 10 samples each, 28 at most for a better minimum" in said[0]
    assert "36 gradients" in said[1] and "minimum" not in said[1]


def test_result_is_kept_whole(tmp_path: Path) -> None:
    result = estimate(refine=True)
    result.save(tmp_path / "result.npz")
    assert llc_fast.LLCResult.load(tmp_path / "result.npz").summary() == result.summary()
    more = estimate(refine=1)
    assert not more.diagnostics["refine_is_complete"] and ", and was not done" in more.summary()


# ---- what is refused ---------------------------------------------------------------------------------------


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.randn(3), torch.randn(1)


def test_what_has_no_gradient_over_all_data() -> None:
    dropout = initialized(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match=r"refine=True needs the gradient .* the loss is random \(dropout\?\)"):
        estimate(model=dropout, refine=True)
    loader = DataLoader(_Stream(), batch_size=10)
    with pytest.raises(ValueError, match="the data have no end"):
        estimate(data=loader, batch_size=None, refine=True, nbeta=5.0)


@pytest.mark.parametrize("value", [0, -1, 1.5, "yes"])
def test_refine_is_checked(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="refine must be"):
        estimate(refine=value)
    assert math.isfinite(estimate(refine=False).llc_mean)
