"""The experiment on residual networks."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llc_fast.problems.digits import load_digits
from llc_fast.problems.resnet import resnet
from llc_fast.reproduce import resnet as experiment
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.run import run
from llc_fast.reproduce.study import Study

TINY = dataclasses.replace(
    experiment.SCALES["small"],
    width=2,
    learning_rates=(0.1, 0.3),
    batch_sizes=(8, 16),
    learning_rate=0.1,
    batch_size=8,
    checkpoints=(2, 4),
    trainings=2,
    num_train=60,
    num_chains=2,
    num_draws=20,
    num_burnin=8,
    sampling_batch_size=16,
)


def network(seed: int = 0, **options: Any) -> nn.Sequential:
    return resnet(**{"width": 4, "blocks": 1, "size": 8} | options, generator=torch.Generator().manual_seed(seed))


def test_localization_is_that_of_the_reach() -> None:
    """A normal law of precision γ in P dimensions has E‖w − w*‖² = P/γ."""
    model = network()
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    count = sum(p.numel() for p in model.parameters())
    gamma = experiment.localization(model, 0.2)
    assert math.sqrt(count / gamma) == pytest.approx(0.2 * norm, rel=0.03)  # γ has two digits


@pytest.mark.slow
def test_experiment_from_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = run(experiment, Study("resnet", "small", tmp_path, progress=False), TINY)
    assert len(claims) == 5 and claims[1].holds and claims[2].holds
    first = (tmp_path / "data.json").read_bytes()
    rows = json.loads(first)["tables"]["runs"]
    steps = {0: [2, 4], 1: [4]}
    expected = [f"{r.name}, step {step}" for r in experiment.plan(TINY) for step in steps[r.training]]
    assert list(rows) == expected and (tmp_path / "resnet.png").stat().st_size > 10_000
    for row in rows.values():
        assert {"init_loss", "r_hat", "warnings", "codes", "train_accuracy", "test_accuracy"} <= set(row)
        assert row["llc"] is not None and row["stderr"] > 0
    assert len({row["localization"] for row in rows.values()}) == 1
    monkeypatch.setattr("llc_fast.sweep_checkpoints", None)  # nothing is measured again
    run(experiment, Study("resnet", "small", tmp_path, progress=False), TINY)
    assert (tmp_path / "data.json").read_bytes() == first


def test_training_is_sgd(tmp_path: Path) -> None:
    """The same initialization for all runs of a training; batches cover an epoch; larger steps go further."""
    study = Study("resnet", "small", tmp_path, progress=False)
    digits = load_digits(num_train=TINY.num_train)
    begun = network(3, width=2).state_dict()

    def moved(learning_rate: float, steps: int) -> tuple[float, dict[str, Any]]:
        settings = dataclasses.replace(TINY, checkpoints=(steps,))
        kept = experiment._train(study, settings, digits, experiment.Run(learning_rate, 60, 0), seed=3)
        state = kept[steps]["state"]
        return math.sqrt(sum(float((state[k] - begun[k]).square().sum()) for k in begun)), kept[steps]

    # One step on all images is the full gradient times the learning rate.
    assert moved(0.2, 1)[0] == pytest.approx(2 * moved(0.1, 1)[0], rel=1e-3)
    learned = moved(0.1, 60)[1]
    assert learned["train_accuracy"] > 0.5 > learned["test_accuracy"] - 0.5


def test_paper_scale_is_resnet18() -> None:
    settings = experiment.SCALES["paper"]
    model = experiment._network(settings, 0)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962 - 2 * 9 * 64
    assert model(torch.zeros(2, 1, settings.size, settings.size)).shape == (2, 10)
    for settings in experiment.SCALES.values():
        assert settings.learning_rate in settings.learning_rates and settings.batch_size in settings.batch_sizes
        assert list(settings.checkpoints) == sorted(set(settings.checkpoints))


def tables(values: dict[tuple[float, int], list[float]], **changes: Any) -> Tables:
    """Rows with a final λ̂ for each training."""
    rows: dict[str, dict[str, Any]] = {}
    for (lr, size), finals in values.items():
        for k, value in enumerate(finals):
            rows[f"{lr} {size} {k}"] = {
                "learning_rate": lr,
                "batch_size": size,
                "training": k,
                "step": 4,
                "llc": value,
                "stderr": 0.1,
                "init_loss": 0.2,
                "r_hat": 1.01,
                "warnings": [],
            } | changes
    return {"runs": rows}


GOOD = {(0.1, 8): [20.0, 20.4], (0.3, 8): [10.1, 9.9], (0.1, 16): [31.0, 30.0]}


def verdicts(found: Tables) -> list[bool]:
    return [c.holds for c in experiment.claims(found, TINY)]


def test_check_of_good_tables() -> None:
    claims = experiment.claims(tables(GOOD), TINY)
    assert [c.holds for c in claims] == [True] * 5
    assert claims[3].found == "0.1: 20.2 ± 0.2, 0.3: 10 ± 0.1; λ̂ falls"
    assert claims[4].found == "8: 20.2 ± 0.2, 16: 30.5 ± 0.5; λ̂ rises"


def test_check_does_not_care_which_way_round() -> None:
    other = dict(zip(GOOD, reversed(GOOD.values()), strict=True))
    claims = experiment.claims(tables(other), TINY)
    assert all(c.holds for c in claims) and "falls" in claims[3].found and "falls" in claims[4].found


def test_check_of_bad_tables() -> None:
    # Within two standard errors, by their own errors or by the spread over trainings.
    assert verdicts(tables(GOOD | {(0.3, 8): [20.2, 20.3]}))[3:] == [False, True]
    assert verdicts(tables(GOOD | {(0.3, 8): [15.0, 22.0]}))[3:] == [False, True]
    assert verdicts(tables(GOOD, stderr=12.0)) == [False, True, True, False, False]
    # One run has no neighbours.
    assert experiment.claims(tables(GOOD), dataclasses.replace(TINY, batch_sizes=(8,)))[4].holds is False
    # Silent: no warning where one is due.
    assert verdicts(tables(GOOD, r_hat=1.2)) == [True, False, True, True, True]
    assert verdicts(tables(GOOD, r_hat=1.2, warnings=["the chains disagree"])) == [True] * 5
    negative = GOOD | {(0.3, 8): [-3.0, -3.1]}
    assert verdicts(tables(negative)) == [True, True, False, True, True]
    assert verdicts(tables(negative, warnings=["λ̂ is negative"])) == [True] * 5
    # Diverged chains: no λ̂.
    diverged = tables(GOOD)
    diverged["runs"]["0.3 8 1"] |= {"llc": None, "stderr": None, "r_hat": None, "warnings": ["diverged"]}
    assert verdicts(diverged) == [False, True, True, False, True]
    experiment.plot(diverged, TINY)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2, 3], "rises"),
        ([3, 2, 1], "falls"),
        ([1, 3, 2], "has no clear order"),
        ([2, 2.1, 1.9], "has no clear order"),
        ([3, 3.05, 1], "falls"),
        ([3, math.nan, 1], "has no clear order"),
    ],
)
def test_direction(values: list[float], words: str) -> None:
    finals = [experiment.Final(float(v), sampling=0.1, spread=math.nan) for v in values]
    assert experiment.direction(finals) == words
