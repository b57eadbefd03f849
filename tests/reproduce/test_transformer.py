"""The experiment on a transformer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

import llc_fast
from llc_fast.problems.text import load_text
from llc_fast.problems.transformer import Transformer, sequence_losses
from llc_fast.reproduce import transformer as experiment
from llc_fast.reproduce.run import run
from llc_fast.reproduce.study import Study
from llc_fast.reproduce.transformer import SCALES, Chains, Settings

# --- experiment ---------------------------------------------------------------------------------------------

_TINY = Settings(
    context=8,
    width=8,
    heads=2,
    layers=1,
    num_train=256,
    num_test=64,
    checkpoints=(0, 4, 20),
    head_checkpoints=(20,),
    whole=Chains(2, 24, 8),
    single=Chains(2, 24, 8),
    subset=64,
    minibatches=Chains(2, 24, 8),
    full_gradients=Chains(2, 24, 8),
    mala=Chains(2, 24, 8),
)


def _study(folder: Path) -> Study:
    return Study("transformer", "small", folder, progress=False)


def test_the_whole_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row, the same from a second run, which measures nothing; nothing that was warned about is left out."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("xarray")
    study = _study(tmp_path)
    claims = run(experiment, study, _TINY)
    tables = study.tables
    assert list(tables["training"]) == ["training, step 0", "training, step 4", "training, step 20"]
    assert list(tables["heads"]) == ["layer 0 head 0, step 20", "layer 0 head 1, step 20"]
    assert len(tables["agreement"]) == 3 and 0 < tables["agreement"]["MALA, full gradients"]["acceptance"] <= 1
    first, *_, last = tables["training"].values()
    assert first["test_loss"] == pytest.approx(first["init_loss"], rel=1e-6) and last["test_loss"] < first["test_loss"]
    assert first["init_loss"] == pytest.approx(math.log(len(load_text(9).vocabulary)))
    assert not first["is_warm"]
    for row in (*tables["training"].values(), *tables["heads"].values(), *tables["agreement"].values()):
        assert row["llc"] is not None and row["stderr"] > 0 and row["warnings"]  # so few draws are worth little
    assert [check.holds for check in claims[:3]] == [True] * 3
    for name in ("training", "heads"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    for name in ("sweep_checkpoints", "estimate_llc"):
        monkeypatch.setattr(llc_fast, name, lambda *_, **__: pytest.fail("measured again"))
    again = _study(tmp_path)
    assert run(experiment, again, _TINY) == claims and again.tables == tables


def test_gradients_of_training(tmp_path: Path) -> None:
    """The norm that is kept is that of the loss over all training sequences."""
    text = load_text(9, 700, 64)
    model = Transformer(len(text.vocabulary), 8, width=8, heads=2)
    found = experiment._gradient_norm(model, text.train)
    model.zero_grad()
    sequence_losses(model(text.train[:, :-1]), text.train[:, 1:]).mean().backward()
    exact = math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.slow
def test_the_papers_scale(tmp_path: Path) -> None:
    """Its model and data, in chains that are too short for anything but to run."""
    pytest.importorskip("xarray")
    few = Chains(2, 8, 4)
    short = {"checkpoints": (0, 2), "head_checkpoints": (2,), "batch_size": 4, "subset": 8, "layers": 1, "heads": 2}
    settings = dataclasses.replace(
        SCALES["paper"],
        **short,
        num_train=64,
        num_test=16,
        whole=few,
        single=few,
        minibatches=few,
        full_gradients=few,
        mala=few,
    )
    study = Study("transformer", "paper", tmp_path, progress=False)
    experiment.measure(study, settings)
    assert {len(rows) for rows in study.tables.values()} == {2, 3}
    assert SCALES["paper"].checkpoints[0] == 0 and SCALES["paper"].checkpoints[-1] == 10_000
    assert set(SCALES["paper"].head_checkpoints) <= set(SCALES["paper"].checkpoints)


# --- claims -------------------------------------------------------------------------------------------------


def _row(llc: float | None, stderr: float | None = 0.2, **more: Any) -> dict[str, Any]:
    return {"llc": llc, "stderr": stderr, "r_hat": 1.01, "ess": 300.0, "warnings": [], "num_parameters": 9} | more


def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    """Of an experiment in which everything came out."""
    about = {"init_loss": 2.0, "test_loss": 2.1, "gradient_norm": 0.3, "layer": 0}
    return {
        "training": {str(s): _row(s + 1.0, step=s, **about) for s in _TINY.checkpoints},
        "heads": {str(h): _row(1.0, step=20, head=h, **about) for h in range(2)},
        "agreement": {
            "SGLD, minibatches": _row(10.1),
            "SGLD, full gradients": _row(10.3),
            "MALA, full gradients": _row(10.0),
        },
    }


def _passed(tables: dict[str, dict[str, dict[str, Any]]]) -> list[bool]:
    return [check.holds for check in experiment.claims(tables, _TINY)]


def test_claims_hold() -> None:
    assert _passed(_tables()) == [True] * 5


@pytest.mark.parametrize(
    ("table", "row", "change", "failing"),
    [
        ("training", "4", {"llc": None, "stderr": None, "warnings": ["diverged"]}, [0]),
        ("training", "4", {"stderr": None, "warnings": ["diverged"]}, [0]),
        ("training", "4", {"llc": -1.0}, [2]),
        ("training", "4", {"llc": -1.0, "warnings": ["negative"]}, []),
        ("training", "0", {"r_hat": 1.2}, [2]),
        ("heads", "1", {"ess": 50.0}, [2]),
        ("heads", "1", {"llc": None, "warnings": ["diverged"]}, [1]),
        ("agreement", "SGLD, minibatches", {"llc": None, "warnings": ["diverged"]}, [3, 4]),
        ("agreement", "MALA, full gradients", {"llc": 9.5}, [4]),  # 6 %, 2.1 standard errors
        ("agreement", "MALA, full gradients", {"llc": 9.8, "stderr": 0.02}, []),
        ("agreement", "SGLD, minibatches", {"llc": 10.4, "stderr": 0.01}, []),
        ("agreement", "SGLD, full gradients", {"llc": 10.5, "stderr": 0.001}, []),
        ("agreement", "SGLD, full gradients", {"llc": 9.49, "stderr": 0.001}, [3]),  # 6 %, 3.05 standard errors
    ],
)
def test_claims_fail(table: str, row: str, change: dict[str, Any], failing: list[int]) -> None:
    tables = _tables()
    tables[table][row] |= change
    assert _passed(tables) == [k not in failing for k in range(5)]


def test_close_but_too_precise() -> None:
    """4 % apart is within 5 %, and too far for errors of 0.1 %."""
    tables = _tables()
    tables["agreement"] = {k: _row(v, 0.01) for k, v in zip(tables["agreement"], (10.4, 10.41, 10.0), strict=True)}
    assert _passed(tables) == [True, True, True, True, False]


def test_figures_of_what_is_missing() -> None:
    """Estimates that are missing or have a warning are plotted as such, and no growth is claimed that is none."""
    pytest.importorskip("matplotlib")
    tables = _tables()
    tables["training"]["4"] |= {"llc": None, "stderr": None, "warnings": ["diverged"]}
    tables["training"]["20"] |= {"llc": 1.1, "warnings": ["slow"]}
    tables["agreement"]["MALA, full gradients"] |= {"llc": None}
    figure = experiment.plot(tables, _TINY)["training"]
    assert figure.axes[0].get_title() == "λ̂ while a transformer learns to predict text"
    filled, hollow = figure.axes[1].containers
    assert [list(part[0].get_xdata()) for part in (filled, hollow)] == [[0], [20]]
    assert hollow[0].get_markerfacecolor() == "white" != filled[0].get_markerfacecolor()
    assert "grows to 21 ± 0.2" in experiment.plot(_tables(), _TINY)["training"].axes[0].get_title()
