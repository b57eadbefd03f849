"""λ̂ along saddle-to-saddle training: the rules, the claims, all of it from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from llc_fast.reproduce import rank_transitions as experiment
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import run
from llc_fast.reproduce.study import Study

TINY = experiment.Settings(
    widths=(4, 2, 2, 4),
    singular_values=(2.0, 1.0),
    num_samples=4000,
    scale=0.1,
    lr=0.1,
    num_checkpoints=6,
    num_training_loss=2,
    num_draws=60,
    num_burnin=40,
    batch_size=64,
)

# --- rules --------------------------------------------------------------------------------------------------


def _value(settings: experiment.Settings, energy: float) -> float:
    return math.sqrt(energy / settings.energy_scale)


def test_levels_and_thresholds() -> None:
    assert TINY.levels == [2.0, 4.0, 6.0]
    nbeta = 4000 / math.log(4000)
    assert TINY.energy_scale == pytest.approx(nbeta / 4)
    assert TINY.visible == pytest.approx([4 * math.log(nbeta)] * 2)


@pytest.mark.parametrize(
    ("energies", "rank"),
    [
        ((0.01, 0.01), 0),
        ((0.03, 0.03), None),  # together they are too much
        ((20.0, 0.001), None),
        ((30.0, 0.001), 1),
        ((30.0, 1.0), None),
        ((3000.0, 30.0), 2),
    ],
)
def test_rank_is_that_of_visible_singular_values(energies: tuple[float, float], rank: int | None) -> None:
    assert TINY.rank([_value(TINY, e) for e in energies]) == rank


def test_singular_values_that_the_teacher_has_not_must_stay_invisible() -> None:
    settings = dataclasses.replace(TINY, singular_values=(2.0,))
    assert settings.rank([2.0, _value(settings, 0.01)]) == 1
    assert settings.rank([2.0, 2.0]) is None


@pytest.mark.parametrize("scale", experiment.SCALES)
def test_all_of_a_teacher_can_be_seen(scale: str) -> None:
    settings = experiment.SCALES[scale]
    count = len(settings.singular_values)
    assert [settings.rank(settings.singular_values[:k] + (0.0,) * (count - k)) for k in range(count + 1)] == list(
        range(count + 1)
    )


def test_checkpoints_are_where_things_change() -> None:
    steps = [0, *range(1, 1001)]
    value = [_value(TINY, 1e-6 * min(math.exp((max(t - 500, 0)) / 2), 1e10)) for t in steps]
    curve = {"step": steps, "loss": [1.0] * len(steps), "singular_values": [[v, 1e-9] for v in value]}
    chosen = experiment._choose(dataclasses.replace(TINY, num_checkpoints=30), curve)
    assert chosen == sorted(set(chosen))
    assert steps[chosen[0]] == 34  # the first in the last 29/30 of training
    assert steps[chosen[-1]] == 1000
    inside = [k for k in chosen if experiment.INVISIBLE < TINY.energy_scale * value[k] ** 2 < TINY.visible[0]]
    # One of the two transitions happens, half of the way that the other half of checkpoints are spread over.
    assert 8 <= len(inside) <= 12


# --- claims -------------------------------------------------------------------------------------------------


def _tables() -> Tables:
    """As if measured: ranks 0, transition, 1, 2."""
    energies = [(0.001, 0.001), (5.0, 0.001), (100.0, 0.001), (100.0, 100.0)]
    values = [[_value(TINY, e) for e in pair] for pair in energies]
    llc, steps = [2.1, 3.0, 3.9, 6.2], [10, 20, 30, 40]

    def rows(llc: list[float | None]) -> dict[str, Row]:
        return {
            f"step {step}": {
                "step": step,
                "singular_values": list(pair),
                "layers": [[v ** (1 / 3) for v in pair]] * 3,
                "llc": value,
                "interval": [None, None] if value is None else [value - 0.4, value + 0.4],
                "warnings": ["oh"] if step == 20 else [],
            }
            for step, pair, value in zip(steps, values, llc, strict=True)
        }

    controls = {
        f"rank {k}": {"rank": k, "known": level, "llc": level, "interval": [level - 0.3, level + 0.3], "warnings": []}
        for k, level in enumerate(TINY.levels)
    }
    curve = {"step": steps, "loss": [2.0, 1.5, 1.0, 1e-9], "singular_values": values}
    return {
        "control": controls,
        "training": {"curve": curve},
        experiment.BEHAVIOURAL: rows([*llc]),
        experiment.TRAINING: rows([-500.0, None, -20.0, 6.0]),
    }


def _verdicts(tables: Tables) -> list[bool]:
    return [c.holds for c in experiment.claims(tables, TINY)]


def test_claims_hold_where_they_do() -> None:
    tables = _tables()
    assert _verdicts(tables) == [True] * 4
    found = experiment.claims(tables, TINY)
    assert "rank 0: 1, rank 1: 1, rank 2: 1 checkpoints; 1 in transitions" in found[1].found
    assert "0 with warnings" in found[3].found
    (figure,) = experiment.plot(tables, TINY).values()
    figure.canvas.draw()


def _change(tables: Tables, step: int, llc: float | None, half: float = 0.4) -> None:
    interval = [None, None] if llc is None else [llc - half, llc + half]
    tables[experiment.BEHAVIOURAL][f"step {step}"] |= {"llc": llc, "interval": interval}


def test_estimates_off_the_level_fail() -> None:
    tables = _tables()
    _change(tables, 30, 4.6)  # 1.5 error bars; three at once may be 1.22 off
    assert _verdicts(tables) == [True, True, True, False]
    _change(tables, 30, 4.45)
    assert _verdicts(tables) == [True] * 4


def test_diverged_estimates_fail_and_are_plotted() -> None:
    tables = _tables()
    _change(tables, 40, None)
    tables["control"]["rank 1"] |= {"llc": None, "interval": [None, None]}
    assert _verdicts(tables) == [False, True, True, False]
    experiment.plot(tables, TINY)["rank-transitions"].canvas.draw()


def test_error_bars_that_are_too_long_fail() -> None:
    tables = _tables()
    _change(tables, 10, 2.1, half=1.4)
    assert _verdicts(tables) == [True, True, True, False]


def test_transitions_are_not_judged() -> None:
    tables = _tables()
    tables[experiment.BEHAVIOURAL]["step 20"]["llc"] = 1000.0
    assert _verdicts(tables) == [True] * 4


def test_ranks_out_of_order_or_left_out_are_findings() -> None:
    tables = _tables()
    rows = tables[experiment.BEHAVIOURAL]
    third, fourth = rows.pop("step 30"), rows.pop("step 40")
    rows |= {"step 40": fourth, "step 30": third}
    assert _verdicts(tables) == [True, False, True, True]
    del rows["step 40"], rows["step 30"]
    assert _verdicts(tables)[1] is False
    assert experiment.claims(tables, TINY)[1].verdict == "finding"


def test_layers_of_a_higher_rank_fail() -> None:
    tables = _tables()
    tables[experiment.BEHAVIOURAL]["step 30"]["layers"][1] = [3.0, 1.5]
    assert _verdicts(tables) == [True, True, False, True]


# --- from end to end ----------------------------------------------------------------------------------------


def test_experiment_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("rank-transitions", "small", tmp_path, progress=False)
    claims = run(experiment, study, TINY)
    assert claims[1].holds, claims[1]  # training is exact; λ̂ of so short chains need not be
    assert claims[2].holds, claims[2]
    assert (tmp_path / "rank-transitions.png").stat().st_size > 10_000
    tables = json.loads((tmp_path / "data.json").read_text())["tables"]
    rows = tables[experiment.BEHAVIOURAL]
    assert len(rows) == 6 and all({"llc", "codes", "layers", "lr"} <= set(row) for row in rows.values())
    assert all(row["init_loss"] == pytest.approx(0, abs=1e-12) for row in rows.values())
    first = next(iter(tables[experiment.TRAINING].values()))
    assert first["llc"] < -100 and first["warnings"]  # w* is a saddle

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("llc_fast.estimate_llc", unwanted)
    monkeypatch.setattr("llc_fast.sweep_checkpoints", unwanted)
    monkeypatch.setattr(experiment, "_train", unwanted)
    again = Study("rank-transitions", "small", tmp_path, progress=False)
    assert run(experiment, again, TINY) == claims
    assert again.tables == tables


def test_paper_scale_takes_the_same_path(tmp_path: Path) -> None:
    paper = experiment.SCALES["paper"]
    few = {"num_samples": 2000, "most_steps": 40, "num_draws": 4, "num_burnin": 4, "num_checkpoints": 2}
    settings = dataclasses.replace(paper, **few, num_training_loss=1, singular_values=paper.singular_values[:2])
    claims = run(experiment, Study("rank-transitions", "paper", tmp_path, progress=False), settings)
    assert len(claims) == 4
    assert not claims[1].holds  # 40 steps are no training
