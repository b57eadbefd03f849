"""The experiment coverage: a short run of it, and what it makes of made-up runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

import llc_fast
from llc_fast.reproduce import coverage
from llc_fast.reproduce.coverage import LEAST, MODES, MOST, Coverage, Settings
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
TINY = Settings(problems=("linear, noisy", "logistic"), runs=3, block=2, length=0.05, target_error=0.9)


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem in every mode, in blocks; each run has a seed of its own; nothing is measured twice."""
    study = Study("coverage", "small", tmp_path, progress=False)
    claims = run(load("coverage"), study, TINY)
    rows = study.tables["blocks"]
    assert list(rows) == [f"{p}, {m}, from {k}" for p in TINY.problems for m in MODES for k in (0, 2)]
    assert [len(row["runs"]) for row in rows.values()] == [2, 1] * 6
    for problem in TINY.problems:
        found = [r["llc"] for row in rows.values() if row["problem"] == problem for r in row["runs"]]
        assert len(set(found)) == 9
    for row in rows.values():
        for one in row["runs"]:
            assert one["interval"][0] < one["llc"] < one["interval"][1] and one["interval"] != one["first_chain"]
    assert len(claims) == 3 and (tmp_path / "coverage.png").stat().st_size > 10_000
    monkeypatch.setattr(llc_fast, "estimate_llc", None)
    again = Study("coverage", "small", tmp_path, progress=False)
    assert run(load("coverage"), again, TINY) == claims and again.tables == study.tables


def _block(mode: str, count: int, covered: int, exact: float = 10.0) -> Row:
    """Of so many runs, with λ̂ at 9 and 11 in turn and an error of 1; `covered` intervals hold the answer."""
    runs = [
        {
            "llc": exact + (1 if k % 2 else -1),
            "stderr": 1.0,
            "interval": [exact - 1, exact + 1] if k < covered else [exact + 1, exact + 2],
            "first_chain": [exact - 1, exact + 1] if k < covered // 2 else [exact + 1, exact + 2],
            "codes": ["ess"] if k == 0 else [],
        }
        for k in range(count)
    ]
    return {"problem": "w⁴", "mode": mode, "exact": exact, "runs": runs}


def test_what_runs_say_together() -> None:
    """Counts, bias, spread and stated error, over blocks; a run without an estimate covers nothing."""
    found = Coverage.of([_block("defaults", 10, 9), _block("defaults", 10, 10)])
    assert (found.runs, found.covered, found.covered_by_first, found.warned) == (20, 19, 9, 2)
    assert found.bias == pytest.approx(0)
    assert found.spread == pytest.approx(np.std([9, 11] * 10, ddof=1) / 10)
    assert found.spread_over_stated == pytest.approx(np.std([9, 11] * 10, ddof=1))
    missing = _block("defaults", 10, 10)
    missing["runs"][3] |= {"llc": None, "stderr": None, "interval": [None, None], "first_chain": [None, None]}
    assert Coverage.of([missing]).covered == 9


@pytest.mark.parametrize(("covered", "runs"), [(0, 20), (17, 20), (20, 20), (180, 200)])
def test_bounds_are_those_of_the_binomial_law(covered: int, runs: int) -> None:
    """At the lower one so many or more have a chance of 2.5 %, at the upper one so many or fewer."""
    low, high = Coverage.of([_block("defaults", runs, covered)]).bounds()
    assert low == 0 if covered == 0 else binom.sf(covered - 1, runs, low) == pytest.approx(0.025)
    assert high == 1 if covered == runs else binom.cdf(covered, runs, high) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("covered", "runs", "right"),
    [(36, 40, True), (30, 40, False), (40, 40, True), (165, 200, False), (185, 200, True), (1000, 1000, False)],
)
def test_what_is_claimed(covered: int, runs: int, right: bool) -> None:
    """As far as so many runs tell: 75 % of 40 is too little, 100 % of 1,000 too much."""
    tables: Tables = {
        "blocks": {mode: _block(mode, runs, covered if mode == MODES[0] else runs - runs // 20) for mode in MODES}
    }
    settings = Settings(problems=("w⁴",), runs=runs)
    claims = coverage.claims(tables, settings)
    assert [claim.holds for claim in claims] == [right, True, True] and LEAST < MOST
    assert ("outside: w⁴" in claims[0].found) is not right
    coverage.plot(tables, settings)["coverage"].canvas.draw()
