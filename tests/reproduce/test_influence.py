"""The retraining check: its parts against closed forms and other programs, and its judgement on made-up tables."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import llc_fast
from llc_fast.reproduce import influence as experiment
from llc_fast.reproduce.influence import (
    AGAIN,
    BIF,
    DOT,
    EKFAC,
    GAUSS_NEWTON,
    KRON,
    KRON_DEFAULT,
    KRON_MANY,
    MEAN,
    OWN,
    WARM,
    Posterior,
    Settings,
    Task,
)
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study
from llc_fast.settings import default_localization

for package in ("matplotlib", "sklearn", "zarr", "xarray"):
    pytest.importorskip(package)
TINY = Settings(
    num_train=60, queries=6, subsets=10, inits=1, steps=40, chains=2, burnin=4, draws=12, short=8
)  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    return experiment.make_task(TINY)


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Sequential:
    return experiment.train_reference(task, 0, 100)


# ---- the score -----------------------------------------------------------------------------------------------


def test_rank_correlations_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 30, 5))
    other += one
    one[:, 1] = np.round(one[:, 1])  # ties
    other[:, 2] = 1.0
    found = experiment.rank_correlations(one, other)
    assert found[2] == 0
    for k in (0, 1, 3, 4):
        assert found[k] == pytest.approx(stats.spearmanr(one[:, k], other[:, k]).statistic, abs=1e-12)


def test_prediction_is_the_sum_over_what_is_left_out() -> None:
    matrix = np.arange(8.0).reshape(4, 2)
    found = experiment.predicted(matrix, torch.tensor([[0, 1], [3, 1]]))
    np.testing.assert_allclose(found, [[-(4 + 6), -(5 + 7)], [-(0 + 4), -(1 + 5)]])


def test_halves_are_random_and_whole() -> None:
    kept = experiment.random_halves(20, 31, 0)
    assert kept.shape == (20, 15) and all(len(set(row.tolist())) == 15 for row in kept)
    assert int(kept.min()) == 0 and int(kept.max()) == 30 and not torch.equal(kept[0].sort()[0], kept[1].sort()[0])
    assert torch.equal(kept, experiment.random_halves(20, 31, 0))


def test_error_of_the_mean_over_queries() -> None:
    scores = np.random.default_rng(1).normal(size=400)
    assert experiment.bootstrap_error(scores) == pytest.approx(scores.std() / 20, rel=0.05)


def test_extrapolation_over_draws() -> None:
    """Predictions with independent noise of variance c/draws: their correlation tends to that without noise."""
    draws = np.array([100.0, 200, 400])
    lds = 0.8 / np.sqrt(1 + 300 / draws)
    assert experiment.without_noise(draws, lds) == pytest.approx(0.8)
    assert np.isnan(experiment.without_noise(draws, lds[::-1]))


# ---- training ------------------------------------------------------------------------------------------------


def test_networks_side_by_side_are_trained_alone(task: Task) -> None:
    """Each as torch's modules and optimizer train it on its own samples."""
    kept = experiment.random_halves(3, len(task.x), 0)
    start = list(experiment.make_network(0).parameters())
    found = experiment.retrain(task, start, kept, 15)
    for row, chosen in zip(found, kept, strict=True):
        alone = experiment.make_network(0)
        optimizer = torch.optim.Adam(alone.parameters(), lr=experiment.LR, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
        for _ in range(15):
            optimizer.zero_grad()
            loss = cross_entropy(alone(task.x[chosen]), task.y[chosen])
            (loss + experiment.DECAY / 2 * sum(p.square().sum() for p in alone.parameters())).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            expected = cross_entropy(alone(task.query_x), task.query_y, reduction="none")
        np.testing.assert_allclose(row, expected.numpy(), rtol=2e-3, atol=2e-4)


def test_more_networks_than_are_trained_at_once(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, start = experiment.random_halves(5, len(task.x), 0), list(experiment.make_network(0).parameters())
    whole = experiment.retrain(task, start, kept, 5)
    monkeypatch.setattr(experiment, "TOGETHER", 2)
    steps: list[int] = []
    np.testing.assert_allclose(experiment.retrain(task, start, kept, 5, steps.append), whole, rtol=1e-3, atol=1e-5)
    assert len(steps) == 15


def test_reference_is_a_minimum(task: Task, model: nn.Sequential) -> None:
    row = experiment._reference_row(model, task)
    assert row["gradient"] < 1e-7 and 0 < row["loss"] < 0.1


# ---- methods -------------------------------------------------------------------------------------------------


def _perturbed(task: Task, model: nn.Sequential, sample: int, weight: float) -> torch.Tensor:
    """Losses of the queries after w* has moved to the minimum with that weight of one sample, by Newton's steps with
    the exact Hessian."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.LBFGS(
        copied.parameters(),
        max_iter=500,
        history_size=50,
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )
    weights = torch.ones(len(task.x), dtype=torch.float64)
    weights[sample] += weight

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        each = cross_entropy(copied(task.x.double()), task.y, reduction="none")
        loss = (weights * each).mean() + experiment.DECAY / 2 * sum(p.square().sum() for p in copied.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return cross_entropy(copied(task.query_x.double()), task.query_y, reduction="none")


def test_gradients_are_autograds(task: Task, model: nn.Sequential) -> None:
    found = experiment.dot_products(model, task)
    for i, j in ((0, 0), (3, 5)):
        sides = []
        for x, y in ((task.x[i : i + 1], task.y[i : i + 1]), (task.query_x[j : j + 1], task.query_y[j : j + 1])):
            grads = torch.autograd.grad(cross_entropy(model(x.double()), y), list(model.parameters()))
            sides.append(torch.cat([g.flatten() for g in grads]))
        assert found[i, j] == pytest.approx(-float(sides[0] @ sides[1]) / len(task.x), rel=1e-9)


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    """Where outputs are linear in the weights, the matrix is the Hessian, and it is the derivative of the minimum."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 3, generator=generator).double(), torch.randint(4, (30,), generator=generator)
    linear = nn.Sequential(nn.Linear(3, 4)).double()
    found = experiment.gauss_newton_matrix(linear, x)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x @ w[:12].view(4, 3).T + w[12:], y)

    flat = torch.cat([p.detach().flatten() for p in linear.parameters()])
    torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, flat), rtol=1e-9, atol=1e-12)


def test_gauss_newton_tells_how_the_minimum_moves(task: Task, model: nn.Sequential) -> None:
    """Its derivative correlates with what reweighting does to the minimum; its sign and size are right."""
    matrix = experiment.gauss_newton(model, task, experiment.gauss_newton_matrix(model, task.x.double()))
    chosen = int(np.argmax(np.abs(matrix).sum(axis=1)))
    ends = [_perturbed(task, model, chosen, weight).numpy() for weight in (0.02, -0.02)]
    a, b = (ends[0] - ends[1]) / 0.04, matrix[chosen]
    assert np.corrcoef(a, b)[0, 1] > 0.8 and 0.5 < a @ b / (b @ b) < 2


def test_ekfac_is_exact_where_the_fisher_matrix_is_a_product(task: Task, model: nn.Sequential) -> None:
    """One sample many times: the Fisher matrix of a layer is S ⊗ āāᵀ, so within a layer EK-FAC is exact. With only the
    last layer's gradients of queries nothing else counts."""
    same = Task(task.x[:1].expand(5, -1), task.y[:1].expand(5), task.query_x, task.query_y)
    found = experiment.ekfac(model, same)
    x = same.x.double()
    expected = np.zeros((5, len(same.query_x)))
    train, query = experiment._both(model, same)
    labelled = experiment.label_gradients(model, x)
    for layer in ("0", "2"):
        names = (f"{layer}.weight", f"{layer}.bias")
        rows = torch.cat([labelled[name].flatten(2) for name in names], dim=2).flatten(0, 1)
        fisher = rows.T @ rows / len(x)
        damped = fisher + experiment.DECAY * torch.eye(len(fisher), dtype=torch.float64)
        left, right = (torch.cat([side[name].flatten(1) for name in names], dim=1) for side in (train, query))
        expected -= (left @ torch.linalg.solve(damped, right.T)).numpy() / len(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
def test_ekfac_is_kronfluences(task: Task, model: nn.Sequential) -> None:
    """Up to its draws of labels: few differ from the most probable one, so it takes many."""
    pytest.importorskip("kronfluence")
    expected = experiment.ekfac(model, task)
    found = experiment.kronfluence_ekfac(model, task, experiment.DECAY, 500)
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.97
    assert (found * expected).sum() / (expected**2).sum() == pytest.approx(1, abs=0.2)
    before = torch.get_rng_state()
    experiment.kronfluence_ekfac(model, task, None)
    assert torch.equal(before, torch.get_rng_state())


def test_bif_is_the_influence_function_where_the_posterior_is_narrow(
    task: Task, model: nn.Sequential, tmp_path: Path
) -> None:
    """Where γ dominates, −β·Cov is −g_i·g_j·β/γ: gradient dot products, with their sign and size."""
    settings = Settings(chains=2, burnin=50)
    study = Study("influence", "small", tmp_path, progress=False)
    train, query, row = experiment.draw_losses(study, "k", model, task, Posterior(1e3, 1e6), 1.0, settings, 500)
    assert row["prior"] == 1 and (row["nbeta"], row["localization"]) == (1e3, 1e6)
    found = experiment.influence(train, query, beta=row["nbeta"] / len(task.x))
    dots = experiment.dot_products(model, task) * row["nbeta"] / row["localization"]
    low, high = found.interval()
    assert ((low < dots) & (dots < high)).mean() > 0.85
    error = np.sqrt(2 / found.ess.worst)  # of a variance, as the largest entries nearly are
    assert error < 0.12 and (found.value * dots).sum() / (dots**2).sum() == pytest.approx(1, abs=4 * error)
    assert np.corrcoef(found.value.flatten(), dots.flatten())[0, 1] > 0.75


def test_posteriors() -> None:
    """In the headline the prior is as tight as the default localization would be; the others are about it."""
    ours = experiment.headline(2410, 9.0)
    gamma = default_localization(2410, 9.0)
    assert ours.nbeta == pytest.approx(gamma / experiment.DECAY) and ours.localization == 0
    found = experiment.posteriors(600, 2410, 9.0)
    assert found["nβ = n/log n"] == Posterior(llc_fast.default_nbeta(600))
    assert found["headline"] == ours and found["nothing set"] == Posterior(None)
    assert found["γ = 10 × default"] == Posterior(ours.nbeta, 10 * gamma)
    assert experiment.leapfrog_steps(Posterior(1e3, 0.0), 0.999) == 50  # π/2·√1000
    assert experiment.leapfrog_steps(Posterior(1e3, 1e6), 0.999) == experiment.LEAPFROG == 8


# ---- the whole -----------------------------------------------------------------------------------------------


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "has_kronfluence", lambda: False)
    every = experiment.posteriors

    def some(*about: Any) -> dict[str, Posterior]:
        return {
            name: p for name, p in every(*about).items() if name in ("headline", "γ = 100 × default", "nothing set")
        }

    monkeypatch.setattr(experiment, "posteriors", some)
    study = Study("influence", "small", tmp_path, progress=False)
    claims = run(load("influence"), study, TINY)
    assert len(claims) == 3 and [claim.kind for claim in claims] == ["ours", "ours", "published"]
    tables = study.tables
    assert list(tables) == ["network", "methods", "example", "draws", "settings"]
    methods = tables["methods"]
    assert [name for name, row in methods.items() if not row["is_installed"]] == [KRON, KRON_MANY, KRON_DEFAULT]
    for name in (BIF, EKFAC, GAUSS_NEWTON, DOT):
        for target in (MEAN, OWN, WARM):
            found = methods[name][target]
            assert len(found["scores"]) == 6 and found["lds"] == pytest.approx(np.mean(found["scores"]))
    assert MEAN in methods[AGAIN] and OWN not in methods[AGAIN]
    assert tables["draws"]["2 × 12"][MEAN] == methods[BIF][MEAN]
    assert tables["settings"]["headline"][MEAN] != methods[BIF][MEAN]  # fewer draws
    (example,) = tables["example"].values()
    assert sorted(methods[BIF][MEAN]["scores"])[3] == methods[BIF][MEAN]["scores"][example["query"]]
    found = experiment.rank_correlations(*(np.array(example[k])[:, None] for k in (BIF, "actual")))
    assert found[0] == pytest.approx(methods[BIF][MEAN]["scores"][example["query"]])
    assert (tmp_path / "influence.png").stat().st_size > 10_000
    for name in ("retrain", "draw_losses", "ekfac"):  # nothing is measured again
        monkeypatch.setattr(experiment, name, None)
    again = Study("influence", "small", tmp_path, progress=False)
    assert run(load("influence"), again, TINY) == claims and again.tables == tables


def test_an_interrupted_sampler_stops_the_study(
    task: Task, model: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study("influence", "small", tmp_path, progress=False)
    real = llc_fast.sample

    def partial(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        found.is_partial = True
        return found

    monkeypatch.setattr(llc_fast, "sample", partial)
    with pytest.raises(KeyboardInterrupt):
        experiment.draw_losses(study, "k", model, task, Posterior(1e5, 1e9), 1.0, TINY, 4)


# ---- claims --------------------------------------------------------------------------------------------------


def _scores(mean: float) -> dict[str, Any]:
    scores = mean + 0.01 * np.linspace(-1, 1, 20)
    found = {"lds": mean, "stderr": 0.01, "scores": scores.tolist()}
    return {"is_installed": True, **dict.fromkeys((MEAN, OWN, WARM), found)}


def _tables(**lds: float) -> Tables:
    given = {
        BIF: 0.6,
        EKFAC: 0.61,
        KRON: 0.6,
        KRON_MANY: 0.6,
        KRON_DEFAULT: 0.5,
        GAUSS_NEWTON: 0.65,
        DOT: 0.3,
        AGAIN: 0.9,
    } | lds
    points = {"actual": [0.1, 0.2], BIF: [0.3, 0.1], EKFAC: [0.2, 0.1], "query": 3}
    return {
        "methods": {name: _scores(value) for name, value in given.items()},
        "example": {"query in the middle": points},
        "draws": {f"4 × {k}": {"draws": k, **_scores(0.1 * k)} for k in (1, 5)},
        "settings": {"headline": _scores(0.5), "nothing set": _scores(0.2)},
    }


def _failing(tables: Tables) -> list[int]:
    found = experiment.claims(tables, TINY)
    experiment.plot(tables, TINY)["influence"].canvas.draw()
    return [k for k, claim in enumerate(found) if not claim.holds]


def test_what_is_claimed() -> None:
    assert _failing(_tables()) == []
    assert _failing(_tables(**{BIF: 0.585})) == [0]
    assert _failing(_tables(**{KRON: 0.63})) == [0]  # the better of its rows
    assert _failing(_tables(**{BIF: 0.3})) == [0, 1]
    assert _failing(_tables(**{EKFAC: 0.3, KRON: 0.3, KRON_MANY: 0.3, KRON_DEFAULT: 0.3})) == [2]
    tables = _tables(**{KRON: 0.7})
    tables["methods"][KRON] = {"is_installed": False}
    assert _failing(tables) == []


def test_what_more_draws_would_bring() -> None:
    tables = _tables()
    assert np.isnan(experiment.extrapolated(tables))  # 1/LDS² would be below 0
    tables["draws"] = {str(k): {"draws": k, **_scores(0.8 / np.sqrt(1 + 300 / k))} for k in (100, 200, 400)}
    tables["draws"]["100"][MEAN]["lds"] = 0.1  # the first half is not looked at
    assert experiment.extrapolated(tables) == pytest.approx(0.8)
    assert "about 0.80, by extrapolation" in experiment.claims(tables, TINY)[0].found
    tables["draws"]["400"][MEAN]["lds"] = -0.1
    assert np.isnan(experiment.extrapolated(tables))


def test_differences_are_paired() -> None:
    """Queries are the same on both sides: what they share cancels."""
    shared = np.random.default_rng(0).normal(size=50)
    one, other = ({MEAN: {"scores": (shared + shift).tolist()}} for shift in (0.3, 0.1))
    value, error = experiment.difference(one, other)
    assert value == pytest.approx(0.2) and error < 1e-9
