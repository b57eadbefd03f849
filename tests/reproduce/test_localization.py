"""The experiment on γ: end to end with tiny settings, and its judgement on tables that were made up."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llc_fast
from llc_fast.reproduce import localization as experiment
from llc_fast.reproduce.localization import InUnits, Settings, elasticity, gammas, rescaled, tensor_units
from llc_fast.reproduce.rows import Row, Tables
from llc_fast.reproduce.run import load, run
from llc_fast.reproduce.study import Study

pytest.importorskip("matplotlib")
TINY = Settings(
    networks=("perceptron", "tanh regression"),
    deep_linear=(),
    factors=(4.0, 1.0),
    absolute=(1.0,),
    temperatures=(1.0, 4.0),
    few=(0.25,),
    num_chains=2,
    num_draws=16,
    num_burnin=16,
    tensor_factors=(1.0,),
    tensor_networks=("tanh regression",),
    rescaled=(1.0, 5.0),
    exact=(1.0,),
    exact_draws=10,
    training=0.02,
)


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("localization", "small", tmp_path, progress=False)
    claims = run(load("localization"), study, TINY)
    assert len(claims) == 5  # those on deep linear networks are left out
    assert {p.name for p in tmp_path.iterdir()} == {
        "data.json",
        "localization.png",
        "localization-choice.png",
        "work",
    }
    tables = study.tables
    sizes = {name: len(rows) for name, rows in tables.items()}
    assert sizes == {"network": 2, "path": 4, "pair": 2, "by tensor": 1, "global": 0, "rescaled": 4, "exact": 2}
    for row in tables["path"].values():
        default = tables["network"][row["name"]]["default"]
        found = [cell["localization"] for cell in row["cells"]]
        wanted = [4 * default, default, 1.0] if row["temperature"] == 1 else [default / 4]
        assert found == pytest.approx(wanted)
        for cell in row["cells"]:
            assert cell["mean_loss"] == pytest.approx(cell["init_loss"] + cell["llc"] / cell["nbeta"])
    network = tables["network"]["tanh regression"]
    assert network["default"] == pytest.approx(4 * 121 / network["norm"] ** 2, rel=1e-3) and network["lambda"] == 60.5
    # One function in other parameters: with a γ for each tensor the chains are the same chains.
    rows = tables["rescaled"]
    assert rows["by tensor, ×1"]["llc"] == pytest.approx(rows["by tensor, ×5"]["llc"], rel=1e-3)
    data = (tmp_path / "data.json").read_text()
    monkeypatch.setattr(llc_fast, "estimate_llc", None)  # nothing is measured again
    again = Study("localization", "small", tmp_path, progress=False)
    assert run(load("localization"), again, TINY) == claims
    assert (tmp_path / "data.json").read_text() == data


def test_runs_with_the_same_random_numbers_answer_as_the_well_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear network: dλ̂/dlog γ = −½Σ nβhγ/(nβh + γ)², which independent runs of this length would not show."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) * torch.logspace(-2, 0, 12)
    model = nn.Linear(12, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
        y = model(x)
    network = experiment.Network(model, (x, y), F.mse_loss, 400)
    monkeypatch.setitem(experiment.NETWORKS, "line", lambda study, settings: network)
    study = Study("localization", "small", tmp_path, progress=False)
    settings = Settings(
        networks=("line",),
        deep_linear=(),
        factors=(1.0,),
        absolute=(),
        num_draws=1500,
        num_burnin=500,
        tensor_networks=(),
    )
    experiment.measure(study, settings)
    curvature = llc_fast.default_nbeta(400) * torch.linalg.eigvalsh((2 / 400 * x.T @ x).double())
    gamma = study.tables["network"]["line"]["default"]
    known = -0.5 * float((curvature * gamma / (curvature + gamma) ** 2).sum())
    found = study.tables["pair"]["line"]
    assert abs(found["difference"] - known) < 4 * found["difference_stderr"] + 0.1 * abs(known)
    assert found["difference_stderr"] < 0.3 * abs(known) < 3 * found["stderr"] / experiment.PUSH


def test_units_of_tensors() -> None:
    """The same function; and the γ of each tensor is P_k/(½‖w_k‖)², which a rescaling goes with."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    units = tensor_units(model)
    wrapped, x = InUnits(model, units), torch.randn(5, 3)
    assert torch.allclose(wrapped(x), model(x), atol=1e-6)
    for p, (name, given) in zip(wrapped.scaled, model.named_parameters(), strict=True):
        gamma = given.numel() / (0.5 * float(given.detach().norm())) ** 2
        assert 1 / units[name] ** 2 == pytest.approx(gamma, rel=1e-4) and p.shape == given.shape
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert all(unit > 0 for unit in tensor_units(model).values())


def test_a_rescaled_network_is_the_same_function() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    other, x = rescaled(model, 5.0), torch.randn(20, 3)
    assert torch.allclose(model(x), other(x), atol=1e-5)
    assert torch.equal(other[0].weight, 5 * model[0].weight) and not torch.equal(other[2].weight, model[2].weight)  # type: ignore[operator]
    before, after = tensor_units(model), tensor_units(other)
    assert after["0.weight"] == pytest.approx(5 * before["0.weight"])
    assert after["2.weight"] == pytest.approx(before["2.weight"] / 5)


def test_which_gammas() -> None:
    assert gammas(9.0, (4, 1, 0.25), (100.0, 10.0, 1.0)) == [100.0, 36.0, 9.0, 2.25, 1.0]


def _row(gamma: float, llc: float, stderr: float = 1.0, **more: Any) -> Row:
    return {
        "localization": gamma,
        "llc": llc,
        "stderr": stderr,
        "warnings": [],
        "codes": [],
        "slope": None,
        "slope_stderr": None,
        "distance_over_reference": 0.4,
        "init_loss": 0.5,
        "mean_loss": 1.0,
        **more,
    }


def _made_up() -> Tables:
    networks = {"tanh regression": 60.5, "deep linear 1": 100.0, "resnet": None}
    shared = {"default": 16.0, "constant_loss": 2.0, "num_parameters": 10, "num_samples": 100}
    cells = [_row(64.0, 50.0), _row(16.0, 80.0), _row(4.0, 90.0), _row(1.0, 98.0)]
    ways = [("one for all", 1.0, 50.0), ("one for all", 5.0, 90.0), ("by tensor", 1.0, 60.0), ("by tensor", 5.0, 61.0)]
    pair = _row(16.0, 80.0, slope=-5.0, slope_stderr=2.0, difference=-6.0, difference_stderr=0.1)
    return {
        "network": {name: {**shared, "lambda": known} for name, known in networks.items()},
        "path": {
            f"{name} nβ×1": {"name": name, "temperature": 1.0, "cells": copy.deepcopy(cells)} for name in networks
        },
        "pair": {name: dict(pair) for name in networks},
        "global": {"deep linear 1": _row(1.0, 98.0)},
        "rescaled": {f"{way} {f}": _row(1.0, llc, way=way, factor=f) for way, f, llc in ways},
        "exact": {"γ=16": _row(16.0, 80.5, 0.1), "γ=1": _row(1.0, 97.0, 0.1), "γ=1000": _row(1e3, 1.0, 0.1)},
    }


_CHANGES: dict[str, tuple[int, Any]] = {
    "": (-1, lambda t: None),
    "left": (0, lambda t: t["pair"]["resnet"].update(distance_over_reference=0.8)),
    "another slope": (1, lambda t: t["pair"]["resnet"].update(slope=-14.0)),
    "no slope at all": (1, lambda t: [row.update(slope=None) for row in t["pair"].values()]),
    "a fall": (2, lambda t: t["path"]["tanh regression nβ×1"]["cells"][2].update(llc=70.0)),
    "further at γ = 1": (3, lambda t: t["global"]["deep linear 1"].update(llc=125.0)),
    "not exact": (4, lambda t: t["exact"]["γ=16"].update(llc=90.0)),
    "tensors differ": (5, lambda t: t["rescaled"]["by tensor 5.0"].update(llc=70.0)),
    "all for one": (5, lambda t: t["rescaled"]["one for all 5.0"].update(llc=51.0)),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_what_is_claimed(change: str) -> None:
    tables = _made_up()
    failing, apply = _CHANGES[change]
    apply(tables)
    assert [k for k, claim in enumerate(experiment.claims(tables, Settings())) if not claim.holds] == (
        [failing] if change else []
    )
    for figure in experiment.plot(tables, Settings()).values():
        figure.canvas.draw()


def test_how_steep() -> None:
    cells = [_row(gamma, 7 * gamma**-0.3, 0.1) for gamma in (100.0, 10.0, 1.0)] + [_row(0.1, -1.0)]
    at, value, error = elasticity(cells)
    np.testing.assert_allclose(at, [math.sqrt(1000), math.sqrt(10), math.sqrt(0.1)])
    np.testing.assert_allclose(value[:2], -0.3)
    assert error[0] == pytest.approx(math.hypot(0.1 / cells[0]["llc"], 0.1 / cells[1]["llc"]) / math.log(10))
    assert math.isnan(value[2])


def test_what_draws_have_lost() -> None:
    """Against the loss of a constant, which for two classes and for numbers is known in closed form."""
    labels = torch.tensor([0, 0, 0, 2])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert experiment.constant_loss((torch.zeros(4), labels)) == pytest.approx(entropy)
    logits = torch.tensor([math.log(0.75), -99.0, math.log(0.25)]).expand(4, 3)
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(entropy)
    numbers = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert experiment.constant_loss((torch.zeros(2), numbers)) == 0.5
    cells = [_row(1.0, 1.0), _row(1.0, 1.0, mean_loss=2.0)]
    assert experiment.lost({"constant_loss": 2.0}, cells).tolist() == pytest.approx([1 / 3, 1.0])
