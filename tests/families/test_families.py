"""Each family of models that people have: from one call, by hand, along checkpoints, and against an exact sampler."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import FAMILIES, Case, Family, loss_of
from torch import Tensor, nn

import llc_fast
from llc_fast.gradients import program
from llc_fast.objective.selection import select

NO_MEAN = ("gpt-neox ragged", "resnet train", "resnet18 train", "control flow")
"""The loss of all data is another than the mean over minibatches."""
WARNINGS = {
    **dict.fromkeys(("llama", "qwen3", "bert"), "no-gradient"),  # the embedding of padding
    **dict.fromkeys(("resnet train", "resnet18 train"), "training-mode"),
    "equation": "unused",  # a constant, of which only the derivative counts
}
"""Warnings that a family deserves."""
SHORT: dict[str, Any] = {"num_chains": 2, "num_draws": 6, "num_burnin": 0, "progress": False}
LOW = ("bfloat16", "autocast", "mixed")
"""Losses with three digits."""

ONE_BY_ONE = {"lstm", "gru", "hooked-transformer", "resnet train", "resnet18 eval", "resnet18 train", "compiled"}
ONE_BY_ONE |= {"autograd function", "experts", "gpt-neox ragged", "bert", "equation"}
"""Chains are evaluated one by one."""
SWEPT = (
    "gpt2",
    "lora",
    "lstm",
    "resnet train",
    "gcn",
    "graphs",
    "scripted",
    "data-parallel",
    "bfloat16",
    "mixed",
    "int8",
)
"""Families whose steps and checkpoints are looked at in `make test`; those of the others in the slow tests."""


def _is_slow(family: Family) -> bool:
    return family.size != "tiny" or family.compiles


def _parameters(names: Iterator[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if _is_slow(FAMILIES[name]) else ()) for name in names]


ALL = _parameters(name for name, family in FAMILIES.items() if not family.refused)
FEW = [p if p.values[0] in SWEPT else pytest.param(*p.values, marks=pytest.mark.slow) for p in ALL]


def case_of(name: str) -> Case:
    """The trained case of a family; made once, since whatever a test does leaves it as it was."""
    families.import_torchvision()
    for package in FAMILIES[name].requires:
        pytest.importorskip(package)
    return families.made(name)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that must stay as it was."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "flags": {name: (t.requires_grad, t.data_ptr(), t.stride(), id(t.grad)) for name, t in tensors.items()},
        "modes": [m.training for m in model.modules()],
        "attributes": [set(vars(m)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)],
    }


def _assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for kind in ("flags", "modes", "attributes"):
        assert before[kind] == after[kind], kind


def _short(case: Case) -> dict[str, Any]:
    """Defaults but for the length, and small minibatches where a loader doesn't decide."""
    return SHORT if _whole(case) is None else {**SHORT, "batch_size": 32}


def _whole(case: Case) -> Any:
    """All data as one batch; None if a loader gives them."""
    if isinstance(case.data, Mapping):
        return dict(case.data)
    return tuple(case.data) if isinstance(case.data, tuple) else None


def _size(data: Any) -> int:
    return len(next(iter(data.values() if isinstance(data, Mapping) else data)))


# ---- from one call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_from_one_call(name: str) -> None:
    """Defaults, but for the length; what an observable sees at the first draw is w*, a batch, and its loss."""
    case, seen = case_of(name), list[tuple[float, float]]()
    own = {k: p.detach().clone() for k, p in case.model.named_parameters() if p.requires_grad}
    spared = next(p for p in case.model.parameters() if p.requires_grad)
    spared.grad = torch.ones_like(spared)
    before = _state(case.model)

    def look(draw: llc_fast.Draw) -> float:
        if draw.draw == 0:
            assert draw.params.keys() == own.keys()
            for k, value in draw.params.items():
                assert torch.equal(value, own[k]), k
            with torch.enable_grad():
                again = loss_of(case._replace(model=twin), copy.deepcopy(draw.batch)).detach()
            seen.append((float(draw.loss), float(again)))
        return float(draw.loss)

    twin = _twin(case.model)
    try:
        result = llc_fast.estimate_llc(
            case.model, case.data, case.loss_fn, observables={"loss": look}, **_short(case), **case.options
        )
        _assert_same(before, _state(case.model))
    finally:
        spared.grad = None
    assert math.isfinite(result.llc_mean) and math.isfinite(result.llc_stderr)
    assert len(seen) == SHORT["num_chains"]
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=2e-2 if name in LOW else 1e-4)
    assert np.isfinite(result.observables["loss"]).all()
    codes = {w.code for w in result.warnings} - {"ess", "rhat", "trend", "bias"}  # of a run as short as this
    assert codes == ({WARNINGS[name]} if name in WARNINGS else set())
    data = _whole(case)
    if data is not None:
        assert result.settings["num_samples"] == _size(data)
    if data is not None and name not in (*LOW, *NO_MEAN):
        assert result.init_loss == pytest.approx(float(loss_of(case, data).detach()), rel=1e-4)


def _twin(model: nn.Module) -> nn.Module:
    """A model that may be evaluated while an estimate runs: another, with the values that this one has now."""
    try:
        return copy.deepcopy(model)
    except Exception:  # a scripted module, say
        return model


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refused])
def test_what_is_refused(name: str) -> None:
    """By name, and with the remedy; the model stays as it was."""
    case = case_of(name)
    before = _state(case.model)
    with pytest.raises((TypeError, ValueError)) as caught:
        llc_fast.estimate_llc(case.model, case.data, case.loss_fn, **SHORT, **case.options)
    assert FAMILIES[name].refused in str(caught.value)
    _assert_same(before, _state(case.model))


# ---- by hand -------------------------------------------------------------------------------------------------


def _by_hand(case: Case, batches: Any, lr: float, nbeta: float, seed: int) -> list[float]:
    """The losses of a loop in plain PyTorch with our optimizer; the model is put back."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    tensors = [*case.model.parameters(), *case.model.buffers()]
    kept = [t.detach().clone() for t in tensors]
    optimizer, losses = llc_fast.SGLD(parameters, lr=lr, nbeta=nbeta, localization=1.0, seed=seed), list[float]()
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(case, batch)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for t, value in zip(tensors, kept, strict=True):
            t.copy_(value)
    return losses


@pytest.mark.parametrize("name", FEW)
def test_every_strategy_takes_the_steps_of_a_loop_by_hand(name: str) -> None:
    case, steps, lr, nbeta = case_of(name), 4, 1e-4, 40.0
    data = _whole(case)
    if data is None:
        batches = [batch for batch, _ in zip(case.data, range(steps), strict=False)]
        losses = _by_hand(case, batches, lr, nbeta, seed=3)
        assert np.isfinite(losses).all() and len(set(losses)) == steps
        return
    expected = _by_hand(case, [data] * steps, lr, nbeta, seed=3)
    assert max(expected) - min(expected) > 1e-4 * abs(expected[0])
    options = {**SHORT, "num_draws": steps, "lr": lr, "nbeta": nbeta, "localization": 1.0, "seed": 3}
    for strategy in ("sequential",) if name in ONE_BY_ONE else ("sequential", "batched"):
        execution = dict(vars(case.options.get("execution") or llc_fast.Execution()), strategy=strategy)
        options["execution"] = llc_fast.Execution(**execution)
        result = llc_fast.estimate_llc(
            case.model, case.data, case.loss_fn, **options, batch_size=_size(data), bias_correction=False
        )
        rounding = 2e-2 if name in LOW else 2e-4
        np.testing.assert_allclose(result.loss_trace[0], expected, rtol=rounding, atol=1e-6)


# ---- parts of it, and along checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_parameters_by_the_last_part_of_their_names(name: str) -> None:
    model = case_of(name).model
    names = [k for k, _ in model.named_parameters()]
    last = names[0].rpartition(".")[2]
    assert list(select(model, last)) == [k for k in names if k.rpartition(".")[2] == last]
    part = next(m for m in model.modules() if list(m.parameters(recurse=False)))
    wanted = {id(p) for p in part.parameters()}
    assert list(select(model, part)) == [k for k, p in model.named_parameters() if id(p) in wanted]


PATTERNS = {
    "lora": ("lora_*", lambda name: "lora_" in name),
    "gpt-neox": ("*.attention.*", lambda name: ".attention." in name),
    "llama": ("layers.0", lambda name: ".layers.0." in name),
    "bert": ("encoder.layer.1.*", lambda name: ".layer.1." in name),
    "resnet eval": ("*bn?.*", lambda name: ".bn" in name or name.startswith("bn")),
    "data-parallel": ("1.*", lambda name: ".1." in name),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_part_of_a_model(name: str) -> None:
    case, (pattern, belongs) = case_of(name), PATTERNS[name]
    expected = [k for k, _ in case.model.named_parameters() if belongs(k)]
    found: dict[str, Tensor] = {}

    def keep(draw: llc_fast.Draw) -> float:
        found.update({k: p.clone() for k, p in draw.params.items()})
        return 0.0

    result = llc_fast.estimate_llc(
        case.model, case.data, case.loss_fn, params=pattern, observables={"": keep}, lr=1e-4, **_short(case)
    )
    assert list(found) == expected and len(expected) > 0
    own = dict(case.model.named_parameters())
    assert all(not torch.equal(found[k], own[k]) for k in expected) and math.isfinite(result.llc_mean)


@pytest.mark.parametrize("name", FEW)
def test_native_replays_have_the_bits_of_pythons(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, results = case_of(name), []
    why_not = program.why_not_native()
    for reason in (why_not, "this is the comparison"):
        monkeypatch.setattr(program, "why_not_native", lambda reason=reason: reason)
        given = case.data, case.loss_fn
        results.append(llc_fast.estimate_llc(case.model, *given, **{**_short(case), **case.options, "lr": 1e-5}))
    native, python = results
    np.testing.assert_array_equal(native.loss_trace, python.loss_trace)
    np.testing.assert_array_equal(native.traces["bias"], python.traces["bias"])
    is_recorded = "kernels: this is the comparison" in python.diagnostics["strategy_reason"]
    assert is_recorded or name not in SWEPT or name == "graphs"  # whose batches come from a loader
    assert "this is the comparison" not in native.diagnostics["strategy_reason"]


@pytest.mark.parametrize("name", FEW)
def test_along_checkpoints(name: str) -> None:
    """Two state dicts: each has the loss that plain PyTorch gives at it, and the model stays as it was."""
    pytest.importorskip("xarray")
    case, data = case_of(name), _whole(case_of(name))
    before = _state(case.model)
    first = {k: v.clone() if isinstance(v, Tensor) else v for k, v in case.model.state_dict().items()}
    moving = {k for k, p in case.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    second = {k: 1.02 * v if k in moving else v for k, v in first.items()}
    found = llc_fast.sweep_checkpoints(
        case.model,
        [first, second],
        case.data,
        case.loss_fn,
        lr=1e-4,
        **{**_short(case), "num_draws": 4},
        **case.options,
    )
    _assert_same(before, _state(case.model))
    assert np.isfinite(found["llc_mean"]).all()
    if data is not None and name not in (*LOW, *NO_MEAN):
        for k, state in enumerate((first, second)):
            case.model.load_state_dict(state)
            expected = float(loss_of(case, data).detach())
            assert float(found["init_loss"][k]) == pytest.approx(expected, rel=1e-4)
        case.model.load_state_dict(first)


LANGUAGE = ("gpt2", "gpt-neox", "gpt-neox ragged", "llama", "qwen3", "hooked-transformer", "lora")


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_by_name(name: str) -> None:
    """``"next-token"`` is the mean over all tokens that plain PyTorch gives, padding apart."""
    case = case_of(name)
    before = _state(case.model)
    data = dict(case.data) if isinstance(case.data, Mapping) else {"input_ids": case.data[0]}
    data.pop("labels", None)
    result = llc_fast.estimate_llc(case.model, data, "next-token", lr=1e-5, batch_size=32, **SHORT)
    _assert_same(before, _state(case.model))
    assert result.init_loss == pytest.approx(float(loss_of(case, _whole(case)).detach()), rel=1e-4)
    assert math.isfinite(result.llc_mean) and result.settings["num_samples"] == _size(data)


# ---- against an exact sampler --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "draws"), [("lstm", 150), ("gpt2", 150), ("resnet eval", 450), ("lora", 150)])
def test_as_hamiltonian_monte_carlo_has_it(name: str, draws: int) -> None:
    """λ̂ at one nβ and γ, by SGLD with defaults and by full-batch HMC, which is exact."""
    case = case_of(name)
    data = families.rows(case.data, torch.arange(64))
    shared: dict[str, Any] = {"nbeta": 20.0, "localization": 100.0, "num_chains": 4, "progress": False}
    ours = llc_fast.estimate_llc(case.model, data, case.loss_fn, num_draws=800, num_burnin=400, **shared)
    exact = llc_fast.estimate_llc(
        case.model, data, case.loss_fn, sampler="hmc", num_draws=draws, num_burnin=100, **shared
    )
    error = math.hypot(ours.llc_stderr, exact.llc_stderr)
    assert error < 0.05 * exact.llc_mean
    assert abs(ours.llc_mean - exact.llc_mean) < 4 * error


BEHAVIORAL = {
    "resnet train": "statistics of each minibatch",
    "resnet18 train": "statistics of each minibatch",
    "gcn": "missing 1 required",  # the graph's edges are not part of a batch
    "lightning": "forward",
}
"""Families that a behavioural loss refuses as they are."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_behavioral_loss(name: str) -> None:
    """The model's own output as the target: L(w*) = 0, and what chains find is above it."""
    case = case_of(name)
    if name in BEHAVIORAL:
        with pytest.raises(Exception, match=BEHAVIORAL[name]):
            llc_fast.estimate_llc(case.model, case.data, "behavioral", **SHORT, **case.options)
        return
    found = llc_fast.estimate_llc(case.model, case.data, "behavioral", **SHORT, **case.options)
    assert found.init_loss == 0 and found.llc_mean > 0 and "no-minimum" not in {w.code for w in found.warnings}
