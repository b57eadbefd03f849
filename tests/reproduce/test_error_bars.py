"""The experiment error-bars: a short run of it, and its claims on made-up tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llc_fast
from llc_fast.problems.deep_linear import make_problem, most_singular, network
from llc_fast.reproduce import error_bars
from llc_fast.reproduce.error_bars import BUDGET, BY_NEED, FIRST_SEED, Settings, covers, is_exact, total_errors
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
TINY = Settings({"1k": 1}, {"1k": 1}, most=80)


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random and singular networks; to the budget is the run by need, gone on; nothing is measured twice."""
    study = Study("error-bars", "small", tmp_path, progress=False)
    claims = run(load("error-bars"), study, TINY)
    rows = study.tables["networks"]
    assert list(rows) == [f"1k {FIRST_SEED}", f"1k singular {FIRST_SEED}"]
    for row in rows.values():
        by_need, budget = row["estimates"]
        assert by_need["method"] == BY_NEED and budget["method"] == BUDGET
        assert by_need["lambda"] > 0 and by_need["localization"] == 1 and budget["steps"] == 70  # and pilots
        assert budget["ended_by"] == "budget" and by_need["steps"] <= budget["steps"]
    assert rows[f"1k singular {FIRST_SEED}"]["estimates"][0]["is_exact"]
    assert len(claims) == 4 and (tmp_path / "error-bars.png").stat().st_size > 10_000
    monkeypatch.setattr(llc_fast, "estimate_llc", None)
    again = Study("error-bars", "small", tmp_path, progress=False)
    assert run(load("error-bars"), again, TINY) == claims and again.tables == study.tables


def test_where_the_known_coefficient_is_exact() -> None:
    """All layers of the product's rank, as of their making or by chance."""
    assert is_exact(most_singular((6, 8, 7), 2, 100, 0))
    weights = [torch.randn(6, 5), torch.randn(5, 6)]
    problem = make_problem("1k", 0)
    full = type(problem)(network(weights), problem.data, (5, 6, 5), 5, 12.5)
    cut = type(problem)(network([weights[0], torch.zeros(5, 6)]), problem.data, (5, 6, 5), 0, 9.0)
    assert is_exact(full) and not is_exact(cut)


def _row(
    llc: float | None, *, exact: bool = True, above: float = 0.0, codes: tuple[str, ...] = (), **other: Any
) -> Row:
    value = 0.0 if llc is None else llc
    return {
        "size": "1k",
        "network": "0",
        "method": BY_NEED,
        "lambda": 100.0,
        "is_exact": exact,
        "llc": llc,
        "stderr": 1.0,
        "interval": [None, None] if llc is None else [value - 2, value + 2 + above],
        "above": above,
        "below": 0.0,
        "extrapolated": value + above / 2,
        "error": None if llc is None else value / 100 - 1,
        "codes": list(codes),
        "warnings": list(codes),
        "gradients": 10_000,
        "steps": 2000,
        "growth_means": [80.0, 90.0, 95.0, value],
    } | other


@pytest.mark.parametrize(
    ("row", "held", "errors"),
    [
        (_row(99), True, 1),
        (_row(97), False, 3),
        (_row(90, above=10), True, 10 / 11),
        (_row(110), False, 10),
        (_row(110, exact=False), True, 0),
        (_row(90, exact=False), False, 10),
        (_row(None), False, float("inf")),
    ],
)
def test_what_an_interval_holds(row: Row, held: bool, errors: float) -> None:
    """λ itself where it is known, and its lower bound elsewhere; the error is counted in total errors."""
    assert covers(row) is held and total_errors(row) == pytest.approx(errors)


def _tables(rows: list[Row], budget: list[Row]) -> Tables:
    both = [[row, long | {"method": BUDGET}] for row, long in zip(rows, budget, strict=True)]
    return {"networks": {str(k): {"estimates": pair} for k, pair in enumerate(both)}}


@pytest.mark.parametrize(
    ("rows", "budget", "holds"),
    [
        ([_row(99)] * 10, [_row(99, gradients=40_000, steps=8000)] * 10, [True, True, True, True]),
        ([_row(99)] * 10, [_row(95, growth_means=[99.5] * 4)] * 10, [True, True, True, False]),  # shorter ones do
        ([_row(99)] * 8 + [_row(97)] * 2, [_row(99, gradients=40_000, steps=8000)] * 10, [False, True, True, True]),
        ([_row(96, above=9)] * 10, [_row(99, gradients=40_000, steps=8000)] * 10, [True, False, True, True]),
        ([_row(99)] * 9 + [_row(80)], [_row(99, gradients=40_000, steps=8000)] * 10, [True, True, False, True]),
        ([_row(99)] * 9 + [_row(80, codes=("rhat",))], [_row(99, gradients=40_000, steps=8000)] * 10, [True] * 4),
    ],
)
def test_what_is_claimed(rows: list[Row], budget: list[Row], holds: list[bool]) -> None:
    """Each on its own: coverage, accuracy, silence, gradients saved."""
    settings = Settings({"1k": 10}, {})
    tables = _tables(rows, budget)
    assert [claim.holds for claim in error_bars.claims(tables, settings)] == holds
    error_bars.plot(tables, settings)["error-bars"].canvas.draw()
