"""The experiment on rescaled ReLU networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llc_fast
from llc_fast.estimate import prepared_alone
from llc_fast.problems import relu_network
from llc_fast.problems.relu_network import make_data, make_network, rescale
from llc_fast.reproduce import rescaling
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study
from llc_fast.settings import Settings, default_nbeta

TINY = rescaling.Settings(
    (1e-3, 1.0, 1e3),
    widths=(4, 6, 3),
    copies=2,
    num_samples=500,
    batch_size=50,
    lr=1e-4,
    num_chains=2,
    num_burnin=60,
    num_draws=60,
    metric_samples=100,
    hessian_samples=200,
    exact_draws=60,
    symmetry_factors=(1e-2, 1.0, 1e2),
    symmetry_samples=200,
)


def test_the_experiment_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("rescaling", "small", tmp_path, progress=False)
    claims = run(load("rescaling"), study, TINY)
    assert claims[0].holds and claims[3].holds and claims[5].holds and claims[6].holds and len(claims) == 7
    assert {p.name for p in tmp_path.iterdir()} == {"data.json", "rescaling.png", "work"}
    rows = study.tables["estimates"]
    assert len(rows) == 3 * len(rescaling.SAMPLERS) and all(row["warnings"] for row in rows.values())
    exact, others = study.tables["exact in metric"], study.tables["symmetries"]
    assert len(exact) == 3 and len(others) == 2 * 2 * 3
    # The same posterior at every a: one γ, and one quadratic well.
    for key in ("localization", "quadratic"):
        first, *rest = (row[key] for row in exact.values())
        assert rest == pytest.approx([first, first], rel=1e-3)
    assert rows["plain, a = 0.001"]["llc"] is None and rows["undone, γ = 1, a = 1e+03"]["llc"] is None
    # Without a scaling the undoing preconditioner is 1.
    assert rows["undone, a = 1"]["llc"] == rows["plain, a = 1"]["llc"]
    data = (tmp_path / "data.json").read_text()
    monkeypatch.setattr(llc_fast, "estimate_llc", None)  # nothing is measured again
    again = Study("rescaling", "small", tmp_path, progress=False)
    assert run(load("rescaling"), again, TINY) == claims
    assert (tmp_path / "data.json").read_text() == data


def test_the_localized_posterior_is_that_of_the_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescaling, "SAMPLERS", {})
    monkeypatch.setattr(rescaling, "SYMMETRIES", {})
    study = Study("rescaling", "small", tmp_path, progress=False)
    rescaling.measure(study, TINY)
    model = make_network(TINY.widths, 0, copies=TINY.copies)
    x, _ = make_data(model, TINY.num_samples, 0)
    for a in TINY.factors:
        curvatures = torch.linalg.eigvalsh(relu_network.gauss_newton(rescale(model, 0, a).double(), x[:200].double()))
        curvatures = default_nbeta(TINY.num_samples) * curvatures.clamp(min=0)
        expected = 0.5 * float((curvatures / (curvatures + 1)).sum())
        assert study.tables["localized posterior"][f"a = {a:.3g}"]["llc"] == pytest.approx(expected, rel=1e-5)


def test_the_well_in_the_metric_is_that_of_the_rescaled_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """½ tr nβH(nβH + γA⁻¹)⁻¹ with everything from the rescaled network itself."""
    monkeypatch.setattr(rescaling, "SAMPLERS", {})
    monkeypatch.setattr(rescaling, "SYMMETRIES", {})
    study = Study("rescaling", "small", tmp_path, progress=False)
    rescaling.measure(study, TINY)
    original = make_network(TINY.widths, 0, copies=TINY.copies)
    data = make_data(original, TINY.num_samples, 0)
    for a in TINY.factors:
        model, row = rescale(original, 0, a), study.tables["exact in metric"][f"a = {a:.3g}"]
        asked = Settings(batch_size=TINY.batch_size, num_draws=1, num_burnin=1, preconditioner="curvature")
        with prepared_alone(asked, model, data, torch.nn.functional.mse_loss) as prepared:
            found = prepared.metric
        assert found is not None
        inverse = torch.cat([1 / found.preconditioner[k].double().flatten() for k, _ in model.named_parameters()])
        hessian = relu_network.gauss_newton(model, data[0][:200]) * default_nbeta(TINY.num_samples)
        ends = hessian + row["localization"] * torch.diag(inverse)
        assert row["quadratic"] == pytest.approx(0.5 * float(torch.linalg.solve(ends, hessian).trace()), rel=1e-3)


def made_up(**values: list[float | None]) -> Tables:
    """Tables with λ̂ = 100 wherever nothing else is said."""
    rows = {}
    for name in rescaling.SAMPLERS:
        for a, llc in zip(TINY.factors, values.get(name, [100.0, 100.0, 100.0]), strict=True):
            rows[f"{name}, a = {a:.3g}"] = {"name": name, "factor": a, "llc": llc, "stderr": 1.0, "warnings": []}
    exact = values.get("exact", [100.0, 100.0, 100.0])
    blocks = values.get("block", [100.0, 100.0, 100.0])
    others = {
        f"{network}, {name}, a = {a:.3g}": {
            "network": network, "name": name, "factor": a, "llc": llc, "stderr": 1.0, "warnings": [],
        }
        for network in rescaling.SYMMETRIES
        for name in ("in metric", "default")
        for a, llc in zip(TINY.symmetry_factors, blocks if network == "block" else [100.0] * 3, strict=True)
    }  # fmt: skip
    return {
        "estimates": rows,
        "symmetries": others,
        "exact in metric": {
            f"a = {a:.3g}": {"llc": llc, "factor": a, "stderr": 1.0} for a, llc in zip(TINY.factors, exact, strict=True)
        },
        "localized posterior": {f"a = {a:.3g}": {"llc": 90.0, "factor": a} for a in TINY.factors},
    }


@pytest.mark.parametrize(
    ("values", "passed"),
    [
        ({}, "TFFTTTT"),
        ({"undone": [98.1, 100, 101.9], "plain": [None, 100, 100], "default": [100, 100, 79]}, "TTTTTTT"),
        ({"undone": [97.9, 100, 100], "plain": [100, 100, 121], "default": [81, 100, 100]}, "FTFTTTT"),
        ({"undone": [100, 100, None]}, "FFFTTTT"),
        ({"undone": [100, None, 100]}, "FFFTTTT"),
        ({"in metric": [100, 100, 101.1]}, "TFFFTTT"),
        ({"in metric": [100, 100, None]}, "TFFFFTT"),
        ({"exact": [100, 105.1, 100]}, "TFFTFTT"),
        ({"exact": [None, 100, 100]}, "TFFTFTT"),
        ({"block": [98.9, 100, 100]}, "TFFTTFT"),
    ],
)
def test_what_is_claimed(values: dict[str, list[float | None]], passed: str) -> None:
    tables = made_up(**values)
    assert "".join("FT"[c.holds] for c in rescaling.claims(tables, TINY)) == passed
    rescaling.plot(tables, TINY)["rescaling"].canvas.draw()


def test_deviations_in_words() -> None:
    claims = rescaling.claims(made_up(plain=[None, 100, 79]), TINY)
    assert claims[1].found == "−21 % at a = 1000, diverged at 1 of 3"
