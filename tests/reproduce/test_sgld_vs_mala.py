"""SGLD against full-gradient samplers: the experiment on small data, and its comparisons on made-up tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import llc_fast
from llc_fast.reproduce import sgld_vs_mala
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

TINY = sgld_vs_mala.Settings(sizes=(40, 100), runs=3, exact_runs=2, steps=40, trajectories=4, stiff=100)


def test_the_experiment_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("sgld-vs-mala", "small", tmp_path, progress=False)
    claims = run(load("sgld-vs-mala"), study, TINY)
    assert {p.name for p in tmp_path.iterdir()} == {"data.json", "sgld-vs-mala.png", "work"}
    rows = study.tables["estimates"]
    assert [key for key in rows if key.startswith("MALA")] == ["MALA, n = 40"] and len(rows) == 7
    assert {len(row["llc_per_chain"]) for row in rows.values()} == {3, 2}
    assert all(row["seconds_of_run"] > 0 and row["llc"] > 0 for row in rows.values())
    assert rows["MALA, n = 40"]["acceptance"] > 0.9 and rows["SGLD, n = 40"]["acceptance"] is None
    # MALA sees SGLD's noise, and steps this small are all accepted.
    difference, error, _ = sgld_vs_mala._compared(study.tables, "SGLD", 40)
    assert abs(difference) < 10 and error < 10
    data = (tmp_path / "data.json").read_text()
    monkeypatch.setattr(llc_fast, "estimate_llc", None)  # nothing is measured again
    again = Study("sgld-vs-mala", "small", tmp_path, progress=False)
    assert run(load("sgld-vs-mala"), again, TINY) == claims
    assert (tmp_path / "data.json").read_text() == data


def made_up(**changes: Row) -> Tables:
    """Samplers that agree, and full gradients that cost n; `changes` by sampler are for the largest n."""
    rows: dict[str, Row] = {}
    for n in (100, 1000, 100_000):
        for name in ("SGLD", "corrected", "MALA", "HMC"):
            if name == "MALA" and n >= 100_000:
                continue
            runs = [99.0, 100.0, 101.0, 104.0] if name in ("SGLD", "corrected") else [98.0, 101.0]
            row: dict[str, Any] = {
                "name": name,
                "n": n,
                "llc": sum(runs) / len(runs),
                "llc_per_chain": runs,
                "spread": 2.0,
                "warnings": [],
                "seconds_of_run": 3.0 if name in ("SGLD", "corrected") else n / 100,
            }
            rows[f"{name}, n = {n}"] = row | (changes.get(name, {}) if n == 100_000 else {})
    return {"estimates": rows}


SETTINGS = sgld_vs_mala.Settings(sizes=(100, 1000, 100_000))


def shifted(by: float) -> Row:
    return {"llc": 101 + by, "llc_per_chain": [99.0 + by, 100.0 + by, 101.0 + by, 104.0 + by]}


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, [True, True, True, True]),
        ({"SGLD": shifted(11.0)}, [True, False, True, True]),
        ({"corrected": shifted(-9.0)}, [False, True, True, True]),
        ({"corrected": {"llc": None, "llc_per_chain": [None] * 4}}, [False, True, True, True]),
        ({"HMC": {"llc": None, "llc_per_chain": [None] * 2}}, [False, False, True, True]),
        ({"SGLD": {"seconds_of_run": 6.1}}, [True, True, False, True]),
        ({"SGLD": {"seconds_of_run": None}}, [True, True, False, True]),
        ({"HMC": {"seconds_of_run": 1.9}}, [True, True, True, False]),
    ],
)
def test_what_is_claimed(changes: dict[str, Row], passed: list[bool]) -> None:
    tables = made_up(**changes)
    assert [c.holds for c in sgld_vs_mala.claims(tables, SETTINGS)] == passed
    sgld_vs_mala.plot(tables, SETTINGS)["sgld-vs-mala"].canvas.draw()


def test_differences_are_paired_where_the_noise_is_shared() -> None:
    difference, error, words = sgld_vs_mala._compared(made_up(), "SGLD", 100)
    # Pairs differ by 1 and −1.
    assert (difference, words) == (0.0, "+0.0 ± 1.0 %")
    assert error == pytest.approx(100 / 99.5)


def test_errors_are_pooled_where_it_is_not() -> None:
    difference, error, _ = sgld_vs_mala._compared(made_up(), "SGLD", 100_000)
    assert difference == pytest.approx(100 * 1.5 / 99.5)
    # Squares about the means: 4 + 1 + 0 + 9 of four runs, 2.25 + 2.25 of two, with four degrees of freedom.
    assert error == pytest.approx(100 / 99.5 * math.sqrt(18.5 / 4 * (1 / 4 + 1 / 2)))


def test_diverged_runs_make_no_pair() -> None:
    tables = made_up()
    tables["estimates"]["SGLD, n = 100"]["llc_per_chain"] = [None, 102.0, 101.0, 104.0]
    difference, error, words = sgld_vs_mala._compared(tables, "SGLD", 100)
    assert difference == pytest.approx(100 / 99.5) and math.isnan(error) and words == "+1.0 ± ? %"


def test_an_interrupted_clock_is_not_believed() -> None:
    claims = sgld_vs_mala.claims(made_up(SGLD={"seconds_of_run": None}), SETTINGS)
    assert claims[2].found == "not timed in one go: --restart"
