"""The experiment variance: its chains against closed forms, a short run of it, and its claims on made-up tables."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import llc_fast
from llc_fast.reproduce import variance
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study
from llc_fast.reproduce.variance import (
    CLASSIFIER,
    EPOCH,
    MINIBATCHES,
    REALIZABLE,
    REGRESSION,
    Problem,
    Settings,
    sample,
)

pytest.importorskip("matplotlib")
TINY = Settings(chains=4, draws=EPOCH // 2, burnin=10)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Linear regression with noise, at its minimum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(variance.N, 3, generator=generator)
    y = x.sum(dim=1, keepdim=True) + torch.randn(variance.N, 1, generator=generator)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return Problem(model, x, y, nn.functional.mse_loss)


def test_chains_are_those_of_sgld(problem: Problem) -> None:
    """λ̂ of linear regression: ½·Σ nβh/(nβh + γ), more by finite steps and by the noise of minibatches.

    With residuals of variance σ² a minibatch's gradient has the covariance 2σ²H/B, which adds ε·(nβ)²·2σ²h/(4B) to the
    variance of the noise, 1.
    """
    lr, nbeta = 2e-5, problem.nbeta
    found = sample(problem, lr, Settings(chains=256, draws=400, burnin=400), replacement=True)
    llc = nbeta * (found.whole.mean(axis=1) - problem.sample_losses().mean())
    curvature = torch.linalg.eigvalsh(2 * problem.x.double().T @ problem.x.double() / variance.N)
    stiffness = nbeta * curvature + variance.LOCALIZATION
    noise = lr * nbeta**2 * problem.sample_losses().mean() * curvature / (2 * variance.BATCH)
    exact = float((0.5 * nbeta * curvature / stiffness * (1 + noise) / (1 - lr * stiffness / 4)).sum())
    error = llc.std(ddof=1) / math.sqrt(len(llc))
    assert float(noise.max()) > 0.1 and error < 0.03 * exact
    assert abs(llc.mean() - exact) < 4 * error


def test_an_epoch_has_every_sample_once(problem: Problem) -> None:
    """So its control variates add up to nothing, which they do not with replacement."""
    one = Settings(chains=4, draws=EPOCH, burnin=EPOCH)
    epochs, random = (sample(problem, 0.0, one, replacement=r).control for r in (False, True))
    np.testing.assert_allclose(epochs.mean(axis=1), 0, atol=1e-6)
    assert abs(random.mean(axis=1)).min() > 1e-4


def test_the_control_variate_is_the_loss_at_the_reference(problem: Problem) -> None:
    """Chains that do not move have the loss of their minibatch at w*, which the control variate takes off."""
    found = sample(problem, 0.0, TINY)
    assert found.raw.std() > 0.01
    np.testing.assert_allclose(found.paired, problem.sample_losses().mean(), rtol=1e-5)
    np.testing.assert_allclose(found.whole, problem.sample_losses().mean(), rtol=1e-5)


def test_pairs_of_chains(problem: Problem) -> None:
    """With shared minibatches and next to no curvature, opposite noise takes chains to opposite sides of w*."""
    x = 0.01 * problem.x
    with torch.no_grad():
        flat = Problem(problem.model, x, problem.y - problem.model(problem.x - x), problem.loss_fn)
    found = sample(flat, 1e-4, TINY, pairs="shared")
    first, second = np.split(found.paired - flat.sample_losses().mean(), 2)
    control = np.split(found.control, 2)
    np.testing.assert_array_equal(*control)
    np.testing.assert_allclose(first, -second, atol=0.1 * abs(first).max())
    own = np.split(sample(flat, 1e-4, TINY, pairs="own").control, 2)
    assert not np.allclose(*own)


def test_problems_are_at_minima() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = variance.problems()
    assert torch.equal(before, torch.get_rng_state())
    for problem in made.values():
        problem.loss_fn(problem.model(problem.x), problem.y).backward()
        assert all(p.grad is not None and float(p.grad.abs().max()) < 0.02 for p in problem.model.parameters())
    assert made[REALIZABLE].sample_losses().max() == 0 and made[REGRESSION].sample_losses().mean() > 0.5


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("variance", "small", tmp_path, progress=False)
    claims = run(load("variance"), study, TINY)
    names = (REALIZABLE, REGRESSION, CLASSIFIER)
    assert list(study.tables["independent"]) == [f"{name}, {kind}" for name in names for kind in MINIBATCHES]
    assert len(study.tables["antithetic"]) == 6 and claims[0].holds and claims[1].holds
    row = study.tables["independent"][f"{REGRESSION}, epochs"]
    assert list(row["spans"]) == ["½ epoch"] and row["spans"]["½ epoch"]["gain"] > 2
    assert (tmp_path / "variance.png").stat().st_size > 10_000
    monkeypatch.setattr(variance, "sample", None)  # nothing is measured again
    monkeypatch.setattr(llc_fast, "estimate_llc", None)
    again = Study("variance", "small", tmp_path, progress=False)
    assert run(load("variance"), again, TINY) == claims and again.tables == study.tables


# ---- claims ------------------------------------------------------------------------------------------------


def _tables() -> Tables:
    """As they should come out."""
    independent, antithetic = {}, {}
    for name in (REALIZABLE, REGRESSION, CLASSIFIER):
        for kind in MINIBATCHES:
            gain = 1.0 if name == REALIZABLE else 10.0
            spread = {"mean": 20.0, "sd": 2.0, "stated": 2.0}
            spans = {span: {"raw": spread, "paired": spread, "gain": gain} for span in variance.SPANS}
            bias = {"difference": 0.1 if kind == MINIBATCHES[0] else 2.0, "difference_stderr": 0.1}
            about: dict[str, Any] = {"problem": name, "minibatches": kind, "spans": spans}
            independent[f"{name}, {kind}"] = about | bias | {"llc_by_minibatches": 22.0, "llc_by_all_data": 20.0}
        for kind in ("own", "shared"):
            row = {"problem": name, "minibatches": kind, "correlation": 0.5, "stderr": 0.1}
            antithetic[f"{name}, {kind} minibatches"] = row
    return {"independent": independent, "antithetic": antithetic}


def _failing(table: str, row: str, **change: Any) -> list[int]:
    tables = copy.deepcopy(_tables())
    tables[table][row] |= change
    claims = variance.claims(tables, Settings())
    variance.plot(tables, Settings())["variance"].canvas.draw()
    return [k for k, claim in enumerate(claims) if not claim.holds]


def test_what_is_claimed() -> None:
    assert all(claim.holds for claim in variance.claims(_tables(), Settings()))
    spans = _tables()["independent"][f"{REGRESSION}, epochs"]["spans"]
    worse = {span: values | {"gain": 1.5} for span, values in spans.items()}
    assert _failing("independent", f"{REALIZABLE}, epochs", spans=worse) == [0]
    assert _failing("independent", f"{REGRESSION}, epochs", spans=worse) == [1]
    assert _failing("independent", f"{CLASSIFIER}, with replacement", difference=-0.4) == [2]
    assert _failing("independent", f"{CLASSIFIER}, epochs", difference=3.5) == [3]
    assert _failing("antithetic", f"{CLASSIFIER}, own minibatches", correlation=-0.5) == [4]
