"""The experiment ladder, with few draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PNG

from llc_fast.problems.products import ProductRegression
from llc_fast.reproduce import ladder
from llc_fast.reproduce.ladder import Settings, fit_exponent
from llc_fast.reproduce.rows import Row
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
TINY = Settings(
    points=20_000,
    share=(1e-2, 1e-1),
    nbetas=(100.0,),
    num_samples=50,
    chains=2,
    burnin=5,
    draws=8,
    data_sets=2,
    curve=4,
    fit_nbetas=(10.0, 100.0, 1e3, 1e4, 1e5),
    fit_chains=2,
    fit_burnin=8,
    fit_draws=8,
)


def _study(folder: Path, scale: str = "small") -> Study:
    return Study("ladder", scale, folder, progress=False)


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model on every rung, measured once."""
    short = {"num_draws": 8, "num_burnin": 5}
    estimate = Study.estimate

    def shorter(study: Study, key: str, *arguments: Any, **settings: Any) -> Any:
        return estimate(study, key, *arguments, **(settings or short))

    monkeypatch.setattr(Study, "estimate", shorter)
    claims = run(load("ladder"), _study(tmp_path), TINY)
    written = json.loads((tmp_path / "data.json").read_text())
    assert len(claims) == 7
    tables = written["tables"]
    assert all(list(tables[rung]) == list(ladder.MODELS) for rung in ("volume", "empirical", "local"))
    assert list(tables["idealized"]) == [f"{name}, nβ = 100" for name in ladder.MODELS]
    for name, row in tables["temperature"].items():
        truth = ProductRegression(**ladder.MODELS[name]).learning_coefficient
        assert (row["lambda"], row["multiplicity"]) == (truth.value, truth.multiplicity)
        assert len(row["mean"]) == len(row["exact"]) == 5 and set(row["probabilities"]) == {"1", "2", "3"}
        assert not list((tmp_path / "work").glob("*temperature*"))  # resumable until it is done
    for name in ("ladder", "ladder-asymptotics", "ladder-temperature"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert all(row["sampler"] == "hmc" for rung in ("idealized", "empirical") for row in tables[rung].values())
    assert {row["nbeta"] for row in tables["local"].values()} == {50 / math.log(50)}
    monkeypatch.setattr(Study, "estimate", None)
    run(load("ladder"), _study(tmp_path), TINY)
    assert json.loads((tmp_path / "data.json").read_text()) == written


def test_paper_scale_can_be_started(tmp_path: Path) -> None:
    """The same code with the settings of the other scale, but for their size."""
    paper = ladder.SCALES["paper"]
    assert paper.points > ladder.SCALES["small"].points and len(paper.nbetas) == 4
    row = ladder._ideal_row(_study(tmp_path, "paper"), "w₁²w₂²", paper.nbetas[-1], TINY)
    assert row["nbeta"] == 1e5 and len(row["llc_per_chain"]) == 2


def test_training_ends_at_a_minimum() -> None:
    """In reduced-rank regression the product of the layers is the best approximation of C of rank 1."""
    model = ProductRegression(3, 2, 1)
    data = model.noisy_data(200, torch.Generator().manual_seed(0))
    model.load_state_dict(ladder._trained(ProductRegression(3, 2, 1), data, 0))
    u, s, v = torch.linalg.svd((data[1].double().T @ data[0].double()) / 200)
    best = s[0] * u[:, :1] @ v[:1]
    found = torch.outer(model.b.detach(), model.a.detach()).double()
    assert torch.allclose(found, best, atol=1e-5)
    assert ladder._loss_below_truth(model, data) == pytest.approx(-0.5 * float(s[0]) ** 2, rel=1e-5)


# --- volumes ------------------------------------------------------------------------------------------------


def test_exponents() -> None:
    """Of laws that are known: a power; and a power with its logarithm, which a power alone gets wrong."""
    rng = np.random.default_rng(0)
    value, error, size = fit_exponent(rng.exponential(1 / 0.75, 40_000), 1)
    assert abs(value - 0.75) < 4 * error and size == 0.0 and error == pytest.approx(0.75 / 200, rel=0.02)
    # −log of |w₁w₂| under the uniform law is a sum of two exponentials: e^(−t)(1 + t), so λ = 1, g = 1.
    depths = rng.exponential(1.0, (2, 100_000)).sum(axis=0)
    value, error, size = fit_exponent(depths, 2)
    assert abs(value - 1) < 4 * error and error < 0.02 and size == pytest.approx(1, abs=0.1)
    assert fit_exponent(depths, 1)[0] == pytest.approx(0.5, rel=0.01)


def test_errors_of_exponents_are_true() -> None:
    """The spread over repetitions is what each fit says, within the error of sixty repetitions (three sigma: 28 %)."""
    rng = np.random.default_rng(1)
    fits = [fit_exponent(rng.exponential(1.0, (2, 2000)).sum(axis=0), 2)[:2] for _ in range(60)]
    values, errors = np.array(fits).T
    assert values.std(ddof=1) == pytest.approx(errors.mean(), rel=0.3)
    assert abs(values.mean() - 1) < 4 * values.std(ddof=1) / math.sqrt(60)


def test_volume_rows(tmp_path: Path) -> None:
    """The smallest ones are found across chunks, and V(ε) counts all of them."""
    settings = Settings(points=4_000_000, share=(1e-3, 1e-2))
    model = ProductRegression(1, 1, 2)
    row = ladder._volume_row(_study(tmp_path), model, settings)
    assert row["fitted"] == 3999 and row["points"] == 4_000_000 and int(row["below"][-1]) == row["points"]
    assert abs(row["llc"] - 0.25) < 4 * row["stderr"]
    edges = np.linspace(ladder.LEAST, ladder.MOST, ladder.BINS + 1)[1:]
    s = np.sqrt(2 * 10 ** edges[50:80])  # P(½a²b⁴ < ε) = 2√s − s
    expected = row["points"] * (2 * np.sqrt(s) - s)
    assert (np.abs(row["below"][50:80].numpy() - expected) < 5 * np.sqrt(expected)).all()
    # The cut is the quantile that was asked for.
    share = 2 * (2 * row["threshold"]) ** 0.25
    assert share == pytest.approx(1e-3, rel=5 / math.sqrt(4000))


# --- claims -------------------------------------------------------------------------------------------------


def _row(llc: float | None, **figures: Any) -> Row:
    return {"llc": llc, "stderr": None if llc is None else 0.01, "exact": 1.0, "lambda": 1.0, "warnings": []} | figures


def _fitted(llc: float, stderr: float, m: int, chance: float, **figures: Any) -> Row:
    rest = (1 - chance) / 2
    chances = {str(k): chance if k == m else rest for k in (1, 2, 3)}
    return {"llc": llc, "stderr": stderr, "fitted_multiplicity": m, "probabilities": chances} | figures


def _temperature(
    llc: float = 1.04, stderr: float = 0.05, m: int = 1, chance: float = 0.9, exact: dict[str, Any] | None = None
) -> Row:
    """Of a model with λ = 1 and m = 1."""
    by_quadrature = _fitted(**({"llc": 1.0, "stderr": 0.01, "m": 1, "chance": 0.9} | (exact or {})))
    return _fitted(llc, stderr, m, chance, exact_fit=by_quadrature, **{"lambda": 1.0}, multiplicity=1)


def _tables(**changed: Row) -> dict[str, dict[str, Row]]:
    good = {name: _row(1.02, model="w₁²w₂²", bias_share=0.1) for name in ("volume", "idealized", "empirical", "local")}
    fitted = {"a": _temperature(), "b": changed.pop("temperature", _temperature())}
    tables = {name: {"a": _row(1.0, model="w₁²w₂²"), "b": row} for name, row in (good | changed).items()}
    return tables | {"temperature": fitted}


def test_claims() -> None:
    """Three standard errors each; for the local rung half of the bias as well, in a well of degree four."""

    def failing(**changed: Row) -> list[int]:
        return [k for k, c in enumerate(ladder.claims(_tables(**changed), TINY)) if not c.holds]

    assert failing() == []
    for place, rung in enumerate(("volume", "idealized", "empirical")):
        assert failing(**{rung: _row(1.04, model="w₁²w₂²")}) == [place]
        assert failing(**{rung: _row(0.96, model="w₁²w₂²")}) == [place]
        assert failing(**{rung: _row(None, model="w₁²w₂²")}) == [place]
    # 3 standard errors and half of 0.1/0.9 of λ̂ make 0.08.
    assert failing(local=_row(0.93, model="w₁²w₂²", bias_share=0.1)) == []
    assert failing(local=_row(0.90, model="w₁²w₂²", bias_share=0.1)) == [3]
    assert failing(local=_row(0.93, model="regular, 4 parameters", bias_share=0.1)) == [3]
    assert "not b" in ladder.claims(_tables(volume=_row(2.0)), TINY)[0].found
    # λ beyond three errors, or with an error that says nothing; m without a chance; and the same of exact values.
    assert failing(temperature=_temperature(llc=1.16)) == [4]
    assert failing(temperature=_temperature(stderr=0.21)) == [4]
    assert failing(temperature=_temperature(m=2, chance=0.97)) == [5]
    assert failing(temperature=_temperature(m=2, chance=0.8)) == []
    for wrong in ({"llc": 1.04}, {"m": 2}, {"stderr": 0.3}):
        assert failing(temperature=_temperature(exact=wrong)) == [6]


def test_credible_sets() -> None:
    assert ladder.credible({"1": 0.96, "2": 0.03, "3": 0.01}) == {1}
    assert ladder.credible({"1": 0.05, "2": 0.75, "3": 0.2}) == {2, 3}
    assert ladder.credible({"1": 0.3, "2": 0.4, "3": 0.3}) == {1, 2, 3}
