"""The experiment accuracy, with networks and chains as small as can be, and its claims on made-up tables."""

from __future__ import annotations

from pathlib import Path

import pytest

import llc_fast
from llc_fast.problems.deep_linear import make_problem
from llc_fast.reproduce import accuracy
from llc_fast.reproduce.accuracy import FIRST_SEED, OURS, SCALES, Settings, options_of
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
METHODS = (OURS, "paper's", "RMSprop, ε = 1e-07")
TINY = Settings({"1k": 2}, METHODS, steps=20, rival_steps=20)


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method on every network whose λ is not 0; nothing is measured twice."""
    study = Study("accuracy", "small", tmp_path, progress=False)
    claims = run(load("accuracy"), study, TINY)
    rows = study.tables["estimates"]
    assert list(rows) == [f"1k {FIRST_SEED + k}, {method}" for k in (0, 1) for method in METHODS]
    for k in (0, 1):
        known = make_problem("1k", FIRST_SEED + k).learning_coefficient
        row = rows[f"1k {FIRST_SEED + k}, {OURS}"]
        assert row["lambda"] == known > 0 and row["error"] == pytest.approx(row["llc"] / known - 1)
    chains = {method: len(rows[f"1k {FIRST_SEED}, {method}"]["llc_per_chain"]) for method in METHODS}
    assert chains == {OURS: 4, "paper's": 1, "RMSprop, ε = 1e-07": 1}
    assert len(claims) == 3 and (tmp_path / "accuracy.png").stat().st_size > 10_000
    monkeypatch.setattr(llc_fast, "estimate_llc", None)
    again = Study("accuracy", "small", tmp_path, progress=False)
    assert run(load("accuracy"), again, TINY) == claims and again.tables == study.tables


def test_networks_without_a_coefficient_are_left_out(tmp_path: Path) -> None:
    """Of rank 0 and a single unit, say: λ = 0, and the error has no unit."""
    study = Study("accuracy", "small", tmp_path, progress=False)
    found = accuracy._networks(study, "1k")
    assert all(next(found)[0].learning_coefficient > 0 for _ in range(20))


def test_methods() -> None:
    """The lengths are those of the docstring; every method of the scales is known."""
    paper = options_of("paper's", "10k", Settings())
    assert (paper["lr"], paper["num_burnin"], paper["num_draws"], paper["num_chains"]) == (5e-7, 9000, 1000, 1)
    rmsprop = options_of("RMSprop, ε = 3e-07", "1k", Settings())
    assert (rmsprop["lr"], rmsprop["num_burnin"], rmsprop["num_draws"]) == (3e-7, 5000, 5000)
    ours = options_of(OURS, "1k", Settings())
    assert ours == {"localization": 1.0, "num_burnin": 4400, "num_draws": 4400}
    for settings in SCALES.values():
        assert all(options_of(method, "1k", settings) for method in settings.methods)
    with pytest.raises(ValueError, match="method='guess' is unknown"):
        options_of("guess", "1k", Settings())


# ---- claims ------------------------------------------------------------------------------------------------


def _tables(ours: list[float | None], paper: list[float | None], warned: bool = False) -> Tables:
    rows: dict[str, Row] = {}
    for method, errors in ((OURS, ours), ("paper's", paper)):
        for k, error in enumerate(errors):
            rows[f"1k {k}, {method}"] = {
                "size": "1k",
                "method": method,
                "lambda": 10.0,
                "llc": None if error is None else 10 * (1 + error),
                "stderr": 0.1,
                "error": error,
                "warnings": ["short"] if warned else [],
            }
    return {"estimates": rows}


@pytest.mark.parametrize(
    ("tables", "holds"),
    [
        (_tables([0.01, -0.02, 0.03], [0.05, 0.1, 0.2]), [True, True, True]),
        (_tables([0.01, -0.06, 0.06], [0.07, 0.1, 0.2]), [False, True, True]),  # the median
        (_tables([0.01, -0.02, 0.2], [0.05, 0.1, 0.2]), [False, True, True]),  # nine in ten
        (_tables([0.01, -0.02, 0.4], [0.05, 0.1, 0.2]), [False, False, True]),  # in silence
        (_tables([0.01, -0.02, 0.4], [0.05, 0.1, 0.2], warned=True), [False, True, True]),
        (_tables([0.01, -0.02, None], [0.05, 0.1, 0.2], warned=True), [False, True, True]),
        (_tables([0.01, -0.02, 0.03], [0.01, -0.01, 0.03]), [True, True, False]),  # what was tuned is better
    ],
)
def test_what_is_claimed(tables: Tables, holds: list[bool]) -> None:
    settings = Settings({"1k": 3}, (OURS, "paper's"))
    assert [claim.holds for claim in accuracy.claims(tables, settings)] == holds
    accuracy.plot(tables, settings)["accuracy"].canvas.draw()
