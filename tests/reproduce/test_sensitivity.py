"""The experiment on sensitivity: end to end with tiny settings, and its judgement on tables that were made up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llc_fast.reproduce import sensitivity
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.sensitivity import Detection, Place, Settings
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
_TINY = Settings(
    architectures=("tanh regression",),
    step_sizes=(0.01, 0.2, 1000.0),
    batch_sizes=(50,),
    localizations=(100.0, 1000.0),
    temperatures=(1.0,),
    num_chains=2,
    num_draws=40,
    reference_draws=(10, 20),
    reference_leapfrog=3,
)


def _study(folder: Path) -> Study:
    return Study("sensitivity", "small", folder, progress=False)


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting is a row, diverged chains too; a second run measures nothing and finds the same."""
    study = _study(tmp_path)
    claims = run(sensitivity, study, _TINY)
    lines = len(sensitivity.places(_TINY))
    assert [len(study.tables[name]) for name in ("network", "reference", "estimate")] == [1, 2, lines * 4]
    assert len(claims) == 4 and (tmp_path / "sensitivity.png").stat().st_size > 10_000
    rows = study.tables["estimate"]
    diverged = [row for row in rows.values() if row["llc"] is None]
    assert diverged and all(row["warnings"] and row["step_size"] == 1000 for row in diverged)
    # Neither length is enough, and both were paid for.
    assert {row["draws"] for row in study.tables["reference"].values()} == {20}
    assert {row["gradients"] for row in study.tables["reference"].values()} == {2 * (15 + 30) * 3}
    for row in rows.values():
        if row["step_size"] is not None:
            natural = row["nbeta"] * study.tables["network"][row["architecture"]]["curvature"] + row["localization"]
            assert row["lr"] * natural == pytest.approx(row["step_size"])
    monkeypatch.setattr(Study, "estimate", None)
    again = _study(tmp_path)
    assert run(sensitivity, again, _TINY) == claims and again.tables == study.tables


def test_settings_of_the_scales() -> None:
    """The lines cross in one centre, which is there once; all scales have everything they need."""
    assert load("sensitivity") is sensitivity
    for settings in sensitivity.SCALES.values():
        places = sensitivity.places(settings)
        centre = Place(settings.localizations[0], settings.temperatures[0], settings.batch_sizes[-1])
        assert places.count(centre) == 1 and len(set(places)) == len(places)
        sizes = len(settings.batch_sizes), len(settings.localizations), len(settings.temperatures)
        assert len(places) == sum(sizes) - 1
        assert set(settings.architectures) <= set(sensitivity.ARCHITECTURES)


def test_few_inputs_have_the_loss_of_all() -> None:
    """The exact sampler of the deep linear network sees its loss, at w* and elsewhere."""
    problem = sensitivity.ARCHITECTURES["deep linear"](0)
    torch.manual_seed(0)
    for distance in (0.0, 0.1, 1.0):
        with torch.no_grad():
            for p in problem.model.parameters():
                p.add_(distance * torch.randn_like(p))
            whole, few = (float(problem.loss_fn(problem.model(x), y)) for x, y in (problem.data, problem.exact_data))
        assert few == pytest.approx(whole, rel=1e-4, abs=1e-10)


def _tables(*rows: tuple[float | None, bool]) -> Tables:
    """Estimates of 100 ± 1, each with a warning or without."""

    def row(llc: float | None, warned: bool) -> dict[str, Any]:
        figures = {"llc": llc, "stderr": None if llc is None else 2.0}
        figures |= {"warnings": ["no"], "codes": ["ess"]} if warned else {"warnings": [], "codes": []}
        return figures | {"architecture": "net", "place": [1.0, 1.0, 16], "step_size": 0.1}

    return {
        "network": {"net": {"learning_coefficient": 120.0, "num_parameters": 300, "num_samples": 100}},
        "reference": {"net γ=1 nβ×1": {"llc": 100.0, "stderr": 1.0, "warnings": []}},
        "estimate": {str(k): row(*given) for k, given in enumerate(rows)},
    }


def _passed(tables: Tables) -> list[bool]:
    return [check.holds for check in sensitivity.claims(tables, Settings())]


def test_warnings_as_a_detector() -> None:
    """Recall and precision by hand; diverged chains are wrong by any measure."""
    tables = _tables((100, False), (112, True), (112, False), (70, True), (None, True), (104, True), (60, False))
    judged = sensitivity.judge(tables)
    assert [one.is_wrong() for one in judged] == [False, True, True, True, True, False, True]
    assert [one.is_wrong(0.35) for one in judged] == [False, False, False, False, True, False, True]
    seen = sensitivity.detection(judged)
    assert seen == Detection(wrong=5, warned=4, both=3, total=7)
    assert (seen.recall, seen.precision, seen.specificity) == (3 / 5, 3 / 4, 1 / 2)
    noisy = copy.deepcopy(tables)
    noisy["estimate"]["1"]["stderr"] = 10.0  # 12 % off, and one standard error
    assert not sensitivity.judge(noisy)[1].is_wrong()


def test_claims() -> None:
    """Each fails for its own reason, and says what was silent."""
    good = _tables(*[(100, False)] * 5, (150, True), (85, True), (None, True), (101, True))
    assert _passed(good) == [True] * 4
    assert _passed(_tables(*[(150, True)] * 50, (150, False))) == [True, False, True, True]
    found: list[Claim] = sensitivity.claims(_tables((115, False), (115, True), (150, True)), Settings())
    assert [check.holds for check in found] == [True, True, False, True]
    assert "Right, by code: ess 2 of 2" in found[3].found
    assert "net γ=1 nβ×1 B=16 ε=0.1 (+15%)" in found[2].found and "2 of 3" in found[2].found
    assert _passed(_tables((150, True), (101, True), (99, True))) == [True, True, True, False]
    doubtful = copy.deepcopy(good)
    doubtful["reference"]["net γ=1 nβ×1"]["warnings"] = ["too short"]
    assert _passed(doubtful) == [False, True, True, True]
    doubtful["reference"]["net γ=1 nβ×1"] |= {"warnings": [], "stderr": 4.0}
    assert _passed(doubtful)[0] is False


def test_a_reference_that_diverged() -> None:
    """Then nothing can be judged, and the claims say so."""
    tables = _tables((100, False), (150, True))
    tables["reference"]["net γ=1 nβ×1"] |= {"llc": None, "stderr": None}
    assert _passed(tables)[0] is False
    assert not any(one.is_wrong() for one in sensitivity.judge(tables))
