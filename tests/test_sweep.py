"""Warm starts, and sweeps over the checkpoints of a training run."""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import DATA, Quadratic, run
from runs import arguments, assert_same, codes, data, estimate, initialized, interrupted_after, mlp, mse, no_step
from torch import Tensor, nn

import llc_fast
from llc_fast import calibration
from llc_fast import estimate as estimate_module
from llc_fast import sweep as sweep_module
from llc_fast.checks import CODES, Facts
from llc_fast.data import mix
from llc_fast.result import LLCResult, Warning

STRATEGIES = ["sequential", "batched"]

# ---- warm starts -------------------------------------------------------------------------------------------


def _moved(model: nn.Module, ends: dict[str, Any], chain: int) -> nn.Module:
    """The model where a chain ended."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in found.named_parameters():
            p += torch.from_numpy(ends[name][chain])
    return found.requires_grad_(False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ends_are_where_chains_stopped(strategy: str) -> None:
    """A warm start's first loss, over all data, is that of the model moved by what `ends` says; w* may have moved."""
    first = estimate(batch_size=40, keep_ends=True, strategy=strategy)
    assert first.ends is not None and {n: a.shape[0] for n, a in first.ends.items()} == dict.fromkeys(first.ends, 3)
    other = mlp(seed=8)
    second = estimate(model=other, batch_size=40, warm_start=first, strategy=strategy)
    x, y = data()
    for chain in range(3):
        loss = float(mse(_moved(other, first.ends, chain)(x), y))
        assert second.loss_trace[chain, 0] == pytest.approx(loss, rel=1e-6)
    assert second.ends is None


def test_a_warm_start_goes_on() -> None:
    """The same w*: where the first run's chains stopped the second one's begin, however they were grouped."""
    first = estimate(batch_size=40, keep_ends=True, strategy="sequential")
    again = estimate(batch_size=40, keep_ends=True, warm_start=first, strategy="batched")
    assert first.ends is not None and again.ends is not None
    start = [float(mse(_moved(mlp(), first.ends, c)(data()[0]), data()[1])) for c in range(3)]
    np.testing.assert_allclose(again.loss_trace[:, 0], start, rtol=1e-6)
    assert all((first.ends[n] != again.ends[n]).any() for n in first.ends)


def test_only_what_is_sampled_moves() -> None:
    """A warm start from a run over everything leaves what a mask keeps at w* where it is."""
    mask = torch.arange(12).view(4, 3) < 5
    first = estimate(batch_size=40, keep_ends=True, params={"0.weight": True})
    second = estimate(batch_size=40, keep_ends=True, warm_start=first, params={"0.weight": mask})
    assert second.ends is not None and first.ends is not None
    assert list(second.ends) == ["0.weight"]
    assert (second.ends["0.weight"][:, ~mask.numpy()] == 0).all()
    assert (second.ends["0.weight"][:, mask.numpy()] != 0).all()


def test_a_lost_chain_starts_at_its_anchor() -> None:
    first = estimate(batch_size=40, keep_ends=True)
    assert first.ends is not None
    first.ends["0.bias"][1, 2] = math.nan
    second = estimate(batch_size=40, warm_start=first)
    cold = estimate(batch_size=40)
    assert second.loss_trace[1, 0] == cold.loss_trace[1, 0]
    assert second.loss_trace[0, 0] != cold.loss_trace[0, 0]
    assert np.isfinite(second.loss_trace).all()


def test_ends_are_part_of_the_file(tmp_path: Path) -> None:
    result = estimate(keep_ends=True)
    assert result.ends is not None
    result.save(tmp_path / "result.npz")
    loaded = LLCResult.load(tmp_path / "result.npz")
    assert loaded.ends is not None and loaded.ends.keys() == result.ends.keys()
    for name, values in result.ends.items():
        np.testing.assert_array_equal(loaded.ends[name], values)
    assert_same(estimate(warm_start=loaded), estimate(warm_start=result))


@pytest.mark.parametrize("sampler", ["sgld", "sghmc", "rmsprop-sgld", "mala"])
@pytest.mark.parametrize("steps", [1, 17, 30])
def test_stopped_warm_runs_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, steps: int
) -> None:
    """Ends included, whether the chains had begun or not."""
    options: dict[str, Any] = {"sampler": sampler, "keep_ends": True, "strategy": "sequential"}
    if sampler == "mala":
        options |= {"batch_size": None}
    first = estimate(**options)
    expected = estimate(warm_start=first, **options)
    with interrupted_after(steps):
        partial = estimate(warm_start=first, checkpoint=tmp_path / "c", **options)
    assert partial.is_partial and partial.ends is None
    found = estimate(warm_start=first, checkpoint=tmp_path / "c", **options)
    assert_same(found, expected)
    kept = estimate(warm_start=first, checkpoint=tmp_path / "c", **options)
    assert found.ends is not None and expected.ends is not None and kept.ends is not None
    for name, values in expected.ends.items():
        np.testing.assert_array_equal(found.ends[name], values)
        np.testing.assert_array_equal(kept.ends[name], values)


def test_other_starts_are_other_runs(tmp_path: Path) -> None:
    first, second = estimate(keep_ends=True), estimate(keep_ends=True, seed=1)
    estimate(warm_start=first, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="another run: warm_start was"):
        estimate(warm_start=second, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="another run: warm_start was"):
        estimate(checkpoint=tmp_path / "c")


def test_what_does_not_fit_is_refused() -> None:
    first = estimate(keep_ends=True)
    with pytest.raises(TypeError, match="warm_start must be the result of an earlier estimate, got dict"):
        estimate(warm_start={})
    with pytest.raises(ValueError, match="keep_ends=True"):
        estimate(warm_start=estimate())
    with pytest.raises(ValueError, match=r"'0.weight' is \(3, 4, 3\) there and \(2, 4, 3\) here.*num_chains"):
        estimate(warm_start=first, num_chains=2)
    with pytest.raises(ValueError, match=r"'0.weight' is \(3, 4, 3\) there and None here"):
        estimate(warm_start=first, params="*.bias")


def test_progress_may_be_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told the steps done, of how many, and at the end λ̂ itself."""
    monkeypatch.setattr(llc_fast.chains.run.Monitor, "interval", 0.0)
    seen: list[tuple[int, int, float]] = []
    result = estimate(progress=lambda *figures: seen.append(figures), num_draws=100)
    steps, totals, llcs = zip(*seen, strict=True)
    assert list(steps) == sorted(steps) and set(totals) == {3 * 104} and steps[-1] == 3 * 104
    assert math.isnan(llcs[0]) and llcs[-1] == pytest.approx(result.llc_mean, rel=1e-6)


# ---- sweeps ------------------------------------------------------------------------------------------------


def _states(count: int = 3) -> list[dict[str, Tensor]]:
    return [mlp(seed=k).state_dict() for k in range(count)]


def _sweep(checkpoints: Any = None, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        "lr": 1e-3,
        "num_chains": 3,
        "num_draws": 8,
        "num_burnin": 4,
        "batch_size": 10,
        "localization": 1.0,  # as that of `estimate`
        "progress": False,
    } | options
    model = chosen.pop("model", None) or mlp()
    states = _states() if checkpoints is None else checkpoints
    return llc_fast.sweep_checkpoints(model, states, chosen.pop("data", None) or data(), mse, **arguments(chosen))


def test_a_cold_sweep_is_an_estimate_for_each() -> None:
    """The numbers of `estimate_llc` on each model, under the names that were given."""
    found = _sweep(warm=False, labels=[0, 10, 100], dim="training_step")
    assert found.sizes == {"training_step": 3, "chain": 3} and list(found.training_step) == [0, 10, 100]
    for k, label in enumerate([0, 10, 100]):
        row, expected = found.sel(training_step=label), estimate(model=mlp(seed=k))
        assert float(row.llc_mean) == expected.llc_mean and float(row.llc_stderr) == expected.llc_stderr
        np.testing.assert_array_equal(row.llc_per_chain, expected.llc_per_chain)
        assert (float(row.llc_low), float(row.llc_high)) == expected.interval()
        assert float(row.init_loss) == expected.init_loss and float(row.lr) == 1e-3
        assert str(row.warnings.item()) == "\n".join(expected.warnings)
        assert str(row.warning_codes.item()).split() == codes(expected) != []
        assert int(row.gradients) == expected.loss_trace.size and not bool(row.is_warm)
    assert found.attrs["partial"] == 0


def test_a_warm_sweep_goes_from_one_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second estimate is a warm start from the first, with a quarter of its burn-in and other random numbers."""
    monkeypatch.setattr(estimate_module, "examine", lambda result, facts: None)
    found = _sweep()
    first = estimate(model=mlp(seed=0), keep_ends=True)
    second = estimate(model=mlp(seed=1), warm_start=first, num_burnin=1, seed=mix(0, 1))
    assert list(found.is_warm) == [False, True, True]
    assert float(found.llc_mean[0]) == first.llc_mean and float(found.llc_mean[1]) == second.llc_mean


def test_noise_does_not_add_up_along_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a direction that nothing holds, what chains do at each checkpoint is independent of what they did before.

    Over eight equal checkpoints the square of the displacement grows eight times, not sixty-four: chains are as far as
    of one run of the same steps, ε for each, within four standard errors of a mean square.
    """
    monkeypatch.setattr(estimate_module, "examine", lambda result, facts: None)
    ends: list[dict[str, Any]] = []
    original = sweep_module.estimate_llc

    def kept(*args: Any, **given: Any) -> LLCResult:
        result = original(*args, **given)
        assert result.ends is not None
        ends.append(result.ends)
        return result

    monkeypatch.setattr(sweep_module, "estimate_llc", kept)
    states = [{name: t.clone() for name, t in mlp().state_dict().items()} for _ in range(8)]
    options: dict[str, Any] = {"lr": 1e-4, "nbeta": 1e-6, "localization": 0.0, "num_chains": 20, "batch_size": 10}
    llc_fast.sweep_checkpoints(mlp(), states, data(), mse, num_draws=20, num_burnin=20, progress=False, **options)
    steps = 40 + 7 * 25
    assert len(ends) == 8
    for name, last in ends[-1].items():
        assert float((last**2).mean()) == pytest.approx(1e-4 * steps, rel=4 * math.sqrt(2 / last.size)), name


class _Bowl(Quadratic):
    """L(w) = ½ Σ h_i (w_i − c_i)²."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__(curvature)
        self.register_buffer("center", torch.zeros_like(curvature))

    def forward(self, _: Tensor) -> Tensor:
        return 0.5 * (self.curvature * (self.w - self.center).square()).sum()


def test_known_coefficients_along_a_sweep() -> None:
    """λ̂ = ½ Σ nβh/(nβh + γ) for a bowl that moves and whose curvature grows 10⁴ times, with nothing tuned."""
    nbeta, gamma, d = 100.0, 1.0, 64
    curvatures = [torch.logspace(-0.5, 0.5, d) * 10**k for k in (-2, -1, 0, 1, 2)]
    centers = [torch.full((d,), float(k)) for k in range(5)]
    states = [{"w": c, "center": c, "curvature": h} for c, h in zip(centers, curvatures, strict=True)]
    found = llc_fast.sweep_checkpoints(
        _Bowl(torch.ones(d)),
        states,
        DATA,
        lambda output, _: output,
        nbeta=nbeta,
        localization=gamma,
        num_draws=1500,
        progress=False,
    )
    exact = np.array([float((0.5 * nbeta * h / (nbeta * h + gamma)).sum()) for h in curvatures])
    assert (abs(found.llc_mean - exact) < 4 * found.llc_stderr).all()
    assert (found.llc_stderr < 0.03 * exact).all()
    assert list(found.is_warm) == [False, True, True, True, True]


def test_files_and_state_dicts_are_the_same(tmp_path: Path) -> None:
    paths = []
    for k, state in enumerate(_states()):
        paths.append(tmp_path / f"{k}.pt")
        torch.save(state, paths[-1])
    assert _sweep([str(paths[0]), *paths[1:]]).drop_vars("seconds").identical(_sweep().drop_vars("seconds"))


def test_the_live_state_of_the_model_is_a_checkpoint_too() -> None:
    """It changes while the others are loaded, which must not change what it stands for."""
    model = mlp(seed=2)
    found = _sweep([*_states(2), model.state_dict()], model=model, warm=False)
    np.testing.assert_array_equal(found.llc_mean, _sweep(_states(3), warm=False).llc_mean)


def test_errors_name_the_checkpoint(tmp_path: Path) -> None:
    states = _states()
    states[1] = {name: torch.full_like(t, math.nan) for name, t in states[1].items()}
    with pytest.raises(ValueError, match=r"checkpoints\[1\] \(checkpoint b\): "):
        _sweep(states, labels=["a", "b", "c"])
    (tmp_path / "no.pt").write_text("no state dict")
    with pytest.raises(ValueError, match=r"checkpoints\[0\]=.*no.pt' can't be read"):
        _sweep([tmp_path / "no.pt"])


def test_pilots_start_where_the_chains_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the curvature is the one that the step size is for."""
    first = estimate(keep_ends=True)
    starts: list[Any] = []
    original = calibration.run_chains

    def spied(*args: Any, **options: Any) -> Any:
        starts.append(args[0].start)
        return original(*args, **options)

    monkeypatch.setattr(calibration, "run_chains", spied)
    options: dict[str, Any] = {"lr": None, "num_draws": 300, "num_burnin": 100}
    estimate(warm_start=first, **options)
    assert starts and all(start is first.ends for start in starts)
    starts.clear()
    estimate(**options)
    assert starts and all(start is None for start in starts)


def test_the_model_is_left_as_it_was() -> None:
    """Also when something fails on the way."""
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    _sweep(model=model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="lr"):
        _sweep(model=model, lr=-1.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [5, 40, 70, 110])
def test_a_stopped_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """In the first checkpoint, the second's warm chains or its cold ones, or the last: what is finished is returned."""
    _doubt_warm_ones(monkeypatch)
    expected = _sweep()
    with interrupted_after(steps):
        partial = _sweep(folder=tmp_path / "kept" / "here", strategy="sequential")
    done = {5: 0, 40: 1, 70: 1, 110: 2}[steps]
    assert partial.attrs["partial"] == 1 and partial.sizes["checkpoint"] == done
    found = _sweep(folder=tmp_path / "kept" / "here", strategy="sequential")
    np.testing.assert_array_equal(found.llc_mean, _sweep(strategy="sequential").llc_mean)
    np.testing.assert_allclose(found.llc_mean, expected.llc_mean, rtol=1e-3)
    np.testing.assert_array_equal(partial.llc_mean, found.llc_mean[:done])


def test_finished_estimates_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _sweep(folder=tmp_path)
    with no_step():
        assert _sweep(folder=tmp_path).drop_vars("seconds").identical(found.drop_vars("seconds"))
    with pytest.raises(ValueError, match="belongs to another run"):
        _sweep(_states()[::-1], folder=tmp_path)


class _Quartic(nn.Module):
    """L(w) = a·w⁴ − b·w²/2: flat at w* = 0 for small a and no b, far too steep for chains that come from afar."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8))
        self.register_buffer("steepness", torch.ones(()))

    def forward(self, _: Tensor) -> Tensor:
        return self.steepness * (self.w.pow(4) + self.w.pow(2)).sum()


def _examined(monkeypatch: pytest.MonkeyPatch, cold: str, warm: str) -> list[bool]:
    """Estimates from w* have the warnings with these codes, warm ones those; whether each that is made is warm."""
    made: list[bool] = []

    def examine(result: LLCResult, facts: Facts) -> None:
        made.append(result.schedule.num_burnin == 1)
        if result.is_partial:
            return
        result.warnings.extend(Warning(f"about {code}", code) for code in (warm if made[-1] else cold).split())

    monkeypatch.setattr(estimate_module, "examine", examine)
    return made


def _doubt_warm_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    _examined(monkeypatch, cold="", warm="doubt")


def test_doubtful_warm_estimates_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From w*, with the whole burn-in: what is kept is the cold estimate and what is said of it."""
    made = _examined(monkeypatch, cold="", warm="doubt")
    found = _sweep()
    assert made == [False, True, False, True, False] and not found.is_warm.any()
    np.testing.assert_array_equal(found.llc_mean, _sweep(warm=False).llc_mean)
    assert list(found.warnings) == ["", "", ""]


@pytest.mark.parametrize(
    ("cold", "warm", "expected"),
    [
        ("trend rhat", "trend", [False, True, True]),  # as from w*
        ("", "ess training-mode", [False, True, True]),  # nothing of the start
        ("trend", "left", [False, True, False, True, False]),
        ("ess", "ess burnin", [False, True, False, True, False]),
    ],
)
def test_a_warning_that_a_cold_start_has_too_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, cold: str, warm: str, expected: list[bool]
) -> None:
    """Warm chains are blamed for what their start may have done, and an estimate from w* did not have."""
    made = _examined(monkeypatch, cold, warm)
    found = _sweep()
    assert made == expected
    is_kept = expected == [False, True, True]
    assert list(found.is_warm) == [False, is_kept, is_kept]
    assert list(found.warning_codes) == [cold, *([warm if is_kept else cold] * 2)]


def test_a_sweep_stops_trying_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two warm estimates in a row that had to be made again all start at w*; one that holds starts the count."""
    states = [mlp(seed=k).state_dict() for k in range(6)]
    made = _examined(monkeypatch, cold="", warm="doubt")
    found = _sweep(states)
    assert made == [False, True, False, True, False, False, False, False] and not found.is_warm.any()
    made, warm = _examined(monkeypatch, cold="", warm=""), iter([1, 0, 1, 0, 1])
    examined = estimate_module.examine

    def sometimes(result: LLCResult, facts: Facts) -> None:
        examined(result, facts)
        result.warnings.extend([Warning("doubtful", "doubt")] * (made[-1] and next(warm)))

    monkeypatch.setattr(estimate_module, "examine", sometimes)
    assert list(_sweep(states).is_warm) == [False, False, True, False, True, False]


def test_codes_that_say_nothing_of_the_start_exist() -> None:
    """And those that chains from afar give rise to are not among them."""
    assert set(CODES) > sweep_module.NOT_OF_THE_START
    assert not sweep_module.NOT_OF_THE_START & {"diverged", "rhat", "slow", "trend", "burnin", "left", "negative"}


def test_where_a_warm_chain_is_lost_all_start_again() -> None:
    """From w*, with the whole burn-in, so that the estimate is the cold one."""
    states = [{"w": torch.zeros(8), "steepness": torch.tensor(a)} for a in (1e-9, 1e3)]
    options: dict[str, Any] = {
        "nbeta": 10.0,
        "localization": 0.01,
        "lr": 5e-5,
        "num_draws": 300,
        "num_burnin": 100,
        "num_chains": 2,
        "progress": False,
    }
    wide = {"lr": 0.5}
    model = _Quartic()
    model.load_state_dict(states[0])
    far = run(model, **{**options, **wide, "keep_ends": True})
    model.load_state_dict(states[1])
    assert run(model, **{**options, "warm_start": far}).diverged_chains  # the premise
    cold = run(model, **options)
    calls: list[bool] = []
    original = sweep_module.estimate_llc

    def with_wide_start(*args: Any, **given: Any) -> LLCResult:
        calls.append(given["warm_start"] is not None)
        return original(*args, **(given | (wide if len(calls) == 1 else {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "estimate_llc", with_wide_start)
        found = llc_fast.sweep_checkpoints(model, states, DATA, lambda output, _: output, seed=1, **options)
    assert calls == [False, True, False] and list(found.is_warm) == [False, False]
    assert float(found.llc_mean[1]) == cold.llc_mean


def test_bad_input_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "estimate_llc", None)
    state, other = mlp().state_dict(), nn.Linear(3, 1).state_dict()
    for checkpoints in (state, "model.pt", tmp_path / "model.pt"):
        with pytest.raises(TypeError, match=r"checkpoints must be a list .* put it in a list"):
            _sweep(checkpoints)
    for checkpoints in (3, nn.Linear(3, 1), torch.zeros(3)):
        with pytest.raises(TypeError, match=r"checkpoints must be a list of state dicts"):
            _sweep(checkpoints)
    with pytest.raises(ValueError, match="checkpoints is empty"):
        _sweep([])
    with pytest.raises(ValueError, match=r"checkpoints\[1\] is no state dict of this model: it has no '0.weight'"):
        _sweep([state, other])
    with pytest.raises(TypeError, match=r"checkpoints\[0\] must be a state dict .*, got the module Linear.*deepcopy"):
        _sweep([nn.Linear(3, 1)])
    with pytest.raises(FileNotFoundError, match=r"checkpoints\[0\]=.*nowhere.pt"):
        _sweep([tmp_path / "nowhere.pt"])
    with pytest.raises(ValueError, match="labels has 1 entries for 3 checkpoints"):
        _sweep(labels=[0])
    with pytest.raises(TypeError, match="checkpoint is not for sweeps: pass folder instead"):
        _sweep(checkpoint="x")
    for name in ("chain", "llc_mean", "r_hat"):
        with pytest.raises(ValueError, match=f"dim='{name}' is the name of something else"):
            _sweep(dim=name)
    with pytest.raises(TypeError, match="labels must be numbers or strings, got"):
        _sweep(labels=[(0, 1), (0, 2), (0, 3)])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        _sweep(model=lambda x: x)


# ---- state dicts as others keep them -----------------------------------------------------------------------


def _live(model: nn.Module, how: str) -> dict[str, Any]:
    """A state dict that was not copied, or not wholly."""
    state = dict(model.state_dict())
    if how == "partly":
        return {name: t.clone() if name != "2.weight" else t for name, t in state.items()}
    if how == "as NumPy's":
        return {name: torch.from_numpy(t.numpy()) for name, t in state.items()}
    if how == "detached and moved to where they are":
        return {name: t.detach().to("cpu").float() for name, t in state.items()}
    return state if how == "shallow" else model.state_dict()


@pytest.mark.parametrize(
    "how", ["itself", "shallow", "partly", "as NumPy's", "detached and moved to where they are", "one object"]
)
def test_states_in_the_same_memory_are_refused(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """states.append(model.state_dict()) keeps the last state under each index: told, with the indices, before work."""
    monkeypatch.setattr(sweep_module, "estimate_llc", None)
    model = mlp()
    states: list[Any] = [copy.deepcopy(model.state_dict())]
    one = copy.deepcopy(model.state_dict())
    for _ in range(3):
        states.append(one if how == "one object" else _live(model, how))
        with torch.no_grad():
            model[0].weight.add_(0.1)  # type: ignore[operator,union-attr]
    with pytest.raises(ValueError, match=r"^checkpoints\[1\] and checkpoints\[2\] share the memory of .*deepcopy"):
        _sweep(states, model=mlp())


def test_what_is_not_sampled_may_be_shared() -> None:
    """Frozen layers and buffers are the same in all checkpoints, and may be in the same memory."""
    states = _states()
    shared = states[0]["0.weight"]
    for state in states:
        state["0.weight"] = shared
    with pytest.raises(ValueError, match=r"share the memory of '0.weight'.*frozen"):
        _sweep(states)
    frozen = mlp()
    frozen[0].weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    found = _sweep(states, model=frozen, warm=False)
    again = _sweep([copy.deepcopy(state) for state in states], model=frozen, warm=False)
    np.testing.assert_array_equal(found.llc_mean, again.llc_mean)
    assert _sweep(states, params=["0.bias", "2.*"]).sizes["checkpoint"] == 3
    bowls = [{"w": torch.full((3,), float(k)), "center": torch.full((3,), 2.0)} for k in range(2)]
    curvature = torch.ones(3)
    options: dict[str, Any] = {"nbeta": 10.0, "lr": 1e-3, "num_draws": 8, "num_chains": 2, "progress": False}
    llc_fast.sweep_checkpoints(
        _Bowl(torch.ones(3)), [b | {"curvature": curvature} for b in bowls], DATA, lambda output, _: output, **options
    )


def test_parts_of_one_block_are_not_the_same_memory() -> None:
    """States may be views of one large tensor, each of its own part."""
    sizes = [t.numel() for t in mlp().state_dict().values()]
    block = torch.stack([torch.cat([t.flatten() for t in state.values()]) for state in _states()])
    shapes = {name: t.shape for name, t in mlp().state_dict().items()}
    states = [
        {name: t.view(shape) for (name, shape), t in zip(shapes.items(), row.split(sizes), strict=True)}
        for row in block
    ]
    np.testing.assert_array_equal(_sweep(states, warm=False).llc_mean, _sweep(warm=False).llc_mean)


def _state() -> dict[str, Tensor]:
    return mlp(seed=1).state_dict()


_UNDERSTOOD: dict[str, Any] = {
    "an entry": lambda state: {"model": state, "optimizer": {"state": {}}, "step": 3},
    "DataParallel": lambda state: {f"module.{k}": t for k, t in state.items()},
    "an iterator": lambda state: state,
}


@pytest.mark.parametrize("kind", _UNDERSTOOD)
def test_checkpoints_of_others_are_the_same(tmp_path: Path, kind: str) -> None:
    """State dicts, files and what iterators give: the same numbers as those of plain state dicts."""
    given = [_UNDERSTOOD[kind](state) for state in _states()]
    expected = _sweep(warm=False)
    for k, state in enumerate(given):
        torch.save(state, tmp_path / f"{k}.pt")
    files = [tmp_path / f"{k}.pt" for k in range(3)]
    for checkpoints in (iter(given), iter(files)) if kind == "an iterator" else (given, files):
        found = _sweep(checkpoints, warm=False)
        assert found.drop_vars("seconds").identical(expected.drop_vars("seconds"))


def test_wrapped_models() -> None:
    """A compiled model and a DataParallel one take the state dicts of the model inside them."""
    expected = _sweep(warm=False)
    for wrapped in (torch.compile(mlp(), backend="eager"), nn.DataParallel(mlp())):
        found = _sweep(model=wrapped, warm=False)
        np.testing.assert_allclose(found.llc_mean, expected.llc_mean, rtol=1e-3)


def test_a_folder_is_the_list_of_its_checkpoints(tmp_path: Path) -> None:
    """In the order of their steps, which are the labels."""
    for step, state in zip((10, 9, 100), _states(), strict=True):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save(state, tmp_path / f"checkpoint-{step}" / "pytorch_model.bin")
    found = _sweep(tmp_path, dim="step", warm=False)
    expected = _sweep([_states()[k] for k in (1, 0, 2)], dim="step", labels=[9, 10, 100], warm=False)
    assert list(found.step) == [9, 10, 100]
    np.testing.assert_array_equal(found.llc_mean, expected.llc_mean)
    assert list(_sweep(str(tmp_path), labels=["a", "b", "c"]).checkpoint) == ["a", "b", "c"]
    (tmp_path / "checkpoint-9" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"^checkpoints\[0\] \(step 9\)=.* is a folder that has no model.safetensors"):
        _sweep(tmp_path, dim="step")
    with pytest.raises(ValueError, match=r"checkpoints=.* is a folder without names like checkpoint-500"):
        _sweep(tmp_path / "checkpoint-10")


def test_an_iterator_has_one_state_in_memory_at_a_time() -> None:
    """When it is asked for the next, nobody holds the last; the model is as it was."""
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    alive: list[weakref.ref[Tensor]] = []

    def states() -> Iterator[dict[str, Tensor]]:
        for k in range(3):
            assert [r for r in alive if r() is not None] == []
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            state = mlp(seed=k).state_dict()
            alive.append(weakref.ref(state["0.weight"]))
            yield state
            del state

    found = _sweep(states(), model=model)
    np.testing.assert_array_equal(found.llc_mean, _sweep().llc_mean)


def test_an_iterator_that_trains_the_model() -> None:
    """It gives the model's own state each time, and finds the model where it left it."""
    model, seen = mlp(), list[dict[str, Tensor]]()

    def training() -> Iterator[dict[str, Tensor]]:
        for _ in range(3):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)
            seen.append(copy.deepcopy(model.state_dict()))
            yield model.state_dict()
            torch.testing.assert_close(model.state_dict(), seen[-1], rtol=0, atol=0)

    found = _sweep(training(), model=model)
    np.testing.assert_array_equal(found.llc_mean, _sweep(seen).llc_mean)


def test_values_of_a_dictionary_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before any work."""
    monkeypatch.setattr(sweep_module, "estimate_llc", None)
    with pytest.raises(ValueError, match=r"^checkpoints\[2\] is no state dict"):
        _sweep(dict(enumerate([*_states(2), {}])).values())


def test_labels_of_an_iterator() -> None:
    """Too few or too many lose nothing of what was estimated."""
    assert list(_sweep(iter(_states()), labels=[1, 2, 3]).checkpoint) == [1, 2, 3]
    with pytest.warns(UserWarning, match="labels has 2 entries, but there are more checkpoints, which were left out"):
        assert list(_sweep(iter(_states()), labels=[1, 2]).checkpoint) == [1, 2]
    with pytest.warns(UserWarning, match="labels has 4 entries, but there were 3 checkpoints"):
        assert list(_sweep(iter(_states()), labels=[1, 2, 3, 4]).checkpoint) == [1, 2, 3]


def test_errors_of_an_iterator_name_the_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"^checkpoints\[1\] \(checkpoint b\) is no state dict of this model"):
        _sweep(iter([_state(), {}]), labels=["a", "b"])
    with pytest.raises(TypeError, match=r"^checkpoints\[1\] must be a state dict or a file of one, got int"):
        _sweep(iter([_state(), 3]))


def test_what_is_not_trained_may_be_averaged(tmp_path: Path) -> None:
    """Where two entries fit, nothing is guessed, and `entry` says which."""
    first, second = _states(2)
    both = {"state_dict": first, "state_dict_ema": second}
    with pytest.raises(ValueError, match=r"^checkpoints\[1\] fits the model in more than one way.*entry='state_dict'"):
        _sweep([first, both])
    found = _sweep([both], entry="state_dict_ema", warm=False)
    np.testing.assert_array_equal(found.llc_mean, _sweep([second], warm=False).llc_mean)


def test_files_of_objects(tmp_path: Path) -> None:
    """Are read only if somebody asks for it."""
    torch.save(mlp(seed=1), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"^checkpoints\[0\]=.* holds objects of the class .*weights_only=False"):
        _sweep([tmp_path / "module.pt"])
    found = _sweep([tmp_path / "module.pt"], weights_only=False)
    np.testing.assert_array_equal(found.llc_mean, _sweep([_state()]).llc_mean)


_WRONG: dict[str, tuple[Any, str]] = {
    "a name less": ({k: t for k, t in _state().items() if k != "2.bias"}, r"it has no '2.bias'"),
    "a name more": ({**_state(), "3.bias": torch.zeros(1)}, r"the model has no '3.bias'"),
    "both": (
        {"a" + k: t for k, t in _state().items()},
        r"it has no '0.weight' \(and 3 more\), and the model has no 'a0",
    ),
    "another shape": ({**_state(), "2.bias": torch.zeros(2)}, r"'2.bias' has shape \(2,\) there, \(1,\) in the model"),
    "integers": ({**_state(), "2.bias": torch.zeros(1, dtype=torch.int64)}, r"has dtype torch.int64 there"),
    "complex": ({**_state(), "2.bias": torch.zeros(1, dtype=torch.complex64)}, r"has dtype torch.complex64 there"),
    "no tensor": ({**_state(), "2.bias": [0.0]}, r"'2.bias' is of type list there"),
    "numbers for names": (dict(enumerate(_state().values())), r"it has no '0.weight' \(and 3 more\)"),
    "an entry with a name less": (
        {"model": {k: t for k, t in _state().items() if k != "2.bias"}},
        r"it has no '2.bias' in its entry \['model'\]",
    ),
}


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("name", _WRONG)
def test_other_state_dicts_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, in_file: bool
) -> None:
    """By their index, with what is wrong; the last of many files too."""
    monkeypatch.setattr(sweep_module, "estimate_llc", None)
    state, words = _WRONG[name]
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    if in_file:
        torch.save(state, tmp_path / "wrong.pt")
        state = tmp_path / "wrong.pt"
    with pytest.raises(ValueError, match=r"^checkpoints\[3\].* is no state dict of this model") as caught:
        _sweep([*_states(), state], model=model)
    assert re.search(words, str(caught.value)), caught.value
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


_UNREADABLE: dict[str, Any] = {
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_bytes(b""),
    "a module": lambda path: torch.save(mlp(), path),
    "cut": lambda path: (torch.save(_state(), path), path.write_bytes(path.read_bytes()[:-40])),
    "a list": lambda path: torch.save(list(_state().values()), path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
}


@pytest.mark.parametrize("kind", _UNREADABLE)
def test_files_that_hold_none_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sweep_module, "estimate_llc", None)
    _UNREADABLE[kind](tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"^checkpoints\[3\]=.*wrong.pt'.*state_dict\(\)"):
        _sweep([*_states(), tmp_path / "wrong.pt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^checkpoints\[3\]=.* is a folder that has no model.safetensors"):
        _sweep([*_states(), tmp_path / "empty"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"checkpoints\[3\]=.* is no file"):
        _sweep([*_states(), tmp_path / "pipe"])


def test_what_torch_loads_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of torch's old format, of other floating-point types, and batch norm without its counter; after a change of
    folder too."""
    monkeypatch.chdir(tmp_path)
    model = initialized(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))).eval()
    states = [copy.deepcopy(initialized(model, seed=k).state_dict()) for k in range(3)]
    torch.save(states[0], "old.pt", _use_new_zipfile_serialization=False)
    torch.save({name: t.double() if t.is_floating_point() else t for name, t in states[1].items()}, "double.pt")
    without = {name: t for name, t in states[2].items() if not name.endswith("num_batches_tracked")}
    expected = _sweep(states, model=model, warm=False)
    (tmp_path / "elsewhere").mkdir()

    def observe(draw: Any) -> float:
        monkeypatch.chdir(tmp_path / "elsewhere")
        return 0.0

    options: dict[str, Any] = {"model": model, "warm": False, "folder": "kept", "observables": {"o": observe}}
    found = _sweep(["old.pt", Path("double.pt"), without], **options)
    np.testing.assert_array_equal(found.llc_mean, expected.llc_mean)
    assert len(list((tmp_path / "kept").iterdir())) == 3 and not list((tmp_path / "elsewhere").iterdir())


def test_progress_over_all_checkpoints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One count, which ends at the last checkpoint and says its λ̂; nothing is printed without progress."""
    monkeypatch.setattr(llc_fast.chains.run.Monitor, "interval", 0.0)
    found = _sweep(progress=True, labels=["a", "b", "c"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["LLC at a"] * 3 + ["LLC at b"] * 3 + ["LLC at c"] * 4
    assert "(0.3 of 3 checkpoints)" in lines[0]
    assert lines[-1].startswith(f"LLC at c: 100 % (3 of 3 checkpoints), λ̂ ≈ {float(found.llc_mean[-1]):.4g}, 0:0")
    _sweep()
    assert capsys.readouterr() == ("", "")


def test_the_data_set_can_be_written(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    found = _sweep()
    found.to_netcdf(tmp_path / "sweep.nc")
    with xarray.open_dataset(tmp_path / "sweep.nc") as again:
        np.testing.assert_array_equal(again.llc_mean, found.llc_mean)
        assert list(again.warnings.values) == list(found.warnings.values)


# ---- warnings and Ctrl-C -----------------------------------------------------------------------------------


def test_warnings_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Python warning for each code, at the line of the call, with the checkpoints that have it; none twice."""
    losses = [estimate(model=mlp(seed=k)).init_loss for k in range(3)]
    monkeypatch.setattr(
        estimate_module,
        "examine",
        lambda result, _: result.warnings.extend(
            [Warning("Too few.", "ess")] + [Warning("No minimum.", "negative")] * (result.init_loss == losses[1])
        ),
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _sweep(labels=[0, 10, 20], dim="step", warm=False)
    assert [(w.category, w.message.code) for w in seen] == [  # type: ignore[union-attr]
        (llc_fast.LLCWarning, "ess"),
        (llc_fast.LLCWarning, "negative"),
    ]
    first, second = (str(w.message) for w in seen)
    assert first == (
        "3 of 3 estimates have the warning 'ess' (step 0, 10, 20). The first says: Too few. [llc-fast explain ess]"
    )
    assert second == (
        "1 of 3 estimates have the warning 'negative' (step 10). The first says: No minimum. "
        "[llc-fast explain negative]"
    )
    assert seen[0].filename == __file__
    assert list(found.warning_codes) == ["ess", "ess negative", "ess"]


@pytest.mark.parametrize(("slope", "warns"), [(-40.0, True), (-1.0, False), (None, False)])
def test_several_scales(monkeypatch: pytest.MonkeyPatch, slope: float | None, warns: bool) -> None:
    """γ follows the weights: where that alone changes λ̂ by 5 %, the sweep says so, with a γ for all."""

    def examine(result: LLCResult, _: Facts) -> None:
        result.diagnostics["localization_slope"] = slope

    monkeypatch.setattr(estimate_module, "examine", examine)
    states = [{name: 2**k * t for name, t in mlp().state_dict().items()} for k in range(2)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _sweep(states, localization=None, warm=False)
        _sweep(states, localization=3.0, warm=False)
    gammas = [float(gamma) for gamma in found.localization]
    assert gammas[0] / gammas[1] == pytest.approx(4, rel=1e-3)
    assert 1.0 < 0.05 * float(abs(found.llc_mean).max()) / math.log(4) < 40.0  # the premise
    assert [w.message.code for w in seen] == ["scale"] * warns  # type: ignore[union-attr]
    if warns:
        text = str(seen[0].message)
        assert f"from {gammas[1]:.3g} to {gammas[0]:.3g}, which alone may change λ̂ by {40 * math.log(4):.2g}" in text
        assert f"localization={math.sqrt(gammas[0] * gammas[1]):.3g} for all" in text


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_ctrl_c_between_chains(monkeypatch: pytest.MonkeyPatch, checkpoint: int) -> None:
    """While an estimate is prepared it raises KeyboardInterrupt: what is finished is returned, if there is any."""
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    made: list[LLCResult] = []
    original = sweep_module.estimate_llc

    def stopped(*args: Any, **given: Any) -> LLCResult:
        if len(made) == checkpoint:
            raise KeyboardInterrupt
        made.append(original(*args, **given))
        return made[-1]

    monkeypatch.setattr(sweep_module, "estimate_llc", stopped)
    if checkpoint == 0:
        with pytest.raises(KeyboardInterrupt):
            _sweep(model=model, warm=False)
    else:
        found = _sweep(model=model, warm=False)
        assert found.attrs["partial"] == 1
        assert (
            list(found.llc_mean) == [result.llc_mean for result in made]
            and list(found.checkpoint) == [0, 1][:checkpoint]
        )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_length_by_need() -> None:
    """Where an error or a budget is given, the chains of each checkpoint go on until it is spent, warm or not."""
    options: dict[str, Any] = {"num_chains": 3, "batch_size": 10, "lr": 1e-3, "localization": 1.0, "progress": False}
    found = llc_fast.sweep_checkpoints(mlp(), _states(2), data(), mse, target_error=0, max_gradients=600, **options)
    assert list(found.gradients) == [600, 600]


# ---- patterns, and errors on the way -----------------------------------------------------------------------


def test_a_pattern_is_the_list_of_what_it_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their steps, which are the labels; as a string and as a path, with ~; λ̂ bit for bit."""
    for step, state in zip((1000, 500, 60), _states(), strict=True):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save(state, tmp_path / f"checkpoint-{step}" / "pytorch_model.bin")
        torch.save({"state": {}}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    expected = _sweep(_states()[::-1], labels=[60, 500, 1000])
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in (str(tmp_path / "checkpoint-*"), tmp_path / "*", "~/checkpoint-*", str(tmp_path / "*-*" / "*.bin")):
        found = _sweep(pattern)
        assert found.drop_vars("seconds").identical(expected.drop_vars("seconds")), pattern
    assert list(_sweep(tmp_path / "*", labels=["a", "b", "c"]).checkpoint) == ["a", "b", "c"]
    named = [f"~/checkpoint-{step}" for step in (60, 500, 1000)]
    np.testing.assert_array_equal(_sweep(named).llc_mean, expected.llc_mean)


def test_patterns_that_match_nothing_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "estimate_llc", None)
    with pytest.raises(FileNotFoundError, match=r"checkpoints='.*checkpoint-\*' matches no file or folder"):
        _sweep(str(tmp_path / "checkpoint-*"))
    for name in ("a.pt", "b.pt"):
        torch.save(_state(), tmp_path / name)
    with pytest.raises(ValueError, match=r"say no step.*pass a list in the order that you want"):
        _sweep(tmp_path / "*.pt")


def test_a_folder_of_torch_distributed_checkpoint_is_the_same(tmp_path: Path) -> None:
    """λ̂ bit for bit, from what `torch.distributed.checkpoint.save` wrote, and from safetensors."""
    save = pytest.importorskip("torch.distributed.checkpoint").save
    safetensors = pytest.importorskip("safetensors.torch")
    expected = _sweep(labels=[1, 2, 3])
    for step, state in enumerate(_states(), 1):
        save({"model": state, "step": step}, checkpoint_id=str(tmp_path / f"step-{step}"))
        safetensors.save_file(state, tmp_path / f"step-{step}.safetensors")
    for pattern in ("step-?", "*.safetensors"):
        found = _sweep(tmp_path / pattern)
        assert found.drop_vars("seconds").identical(expected.drop_vars("seconds"))


def test_an_error_on_the_way_keeps_what_is_done(tmp_path: Path) -> None:
    """It is raised as it is, says where it was, and has the estimates before it; a folder has them too."""

    def fails(output: Tensor, target: Tensor) -> Tensor:
        if float(model[0].weight.detach().flatten()[0]) == 7.0:
            raise RuntimeError("the user's own")
        return mse(output, target)

    model, states = mlp(), _states()
    states[2]["0.weight"].flatten()[0] = 7.0
    options = {"lr": 1e-3, "num_chains": 2, "num_draws": 8, "num_burnin": 4, "strategy": "sequential"}

    def sweep(given: Any) -> Any:
        return llc_fast.sweep_checkpoints(
            model,
            given,
            data(),
            fails,
            labels=[5, 6, 7],
            folder=tmp_path / "kept",
            progress=False,
            **arguments(options),
        )

    with pytest.raises(RuntimeError, match="the user's own") as caught:
        sweep(states)
    finished = caught.value.finished  # type: ignore[attr-defined]
    assert list(finished.checkpoint) == [5, 6] and finished.attrs["partial"] == 1
    notes = getattr(caught.value, "__notes__", None)  # of Python 3.11 and later
    if notes is not None:
        assert notes[-2] == "This was at checkpoints[2] (checkpoint 7)."
        assert notes[-1].startswith("The 2 estimates before it are in the attribute `finished` of this error. They are")
    with no_step(), pytest.raises(RuntimeError, match="the user's own"):  # the first two are read
        sweep(states)
    states[2]["0.weight"].flatten()[0] = 0.5
    np.testing.assert_array_equal(sweep(states).llc_mean[:2], finished.llc_mean)


def test_a_file_that_breaks_on_the_way(tmp_path: Path) -> None:
    """Of an iterator, which nobody could look at before."""
    torch.save(_state(), tmp_path / "0.pt")
    (tmp_path / "1.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"^checkpoints\[1\]=.*1.pt' can't be read") as caught:
        _sweep(tmp_path / f"{k}.pt" for k in range(2))
    assert list(caught.value.finished.checkpoint) == [0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("labels", "scale"), [([0, 10, 5000], "symlog"), ([5, 6, 8], "linear"), (["a", "b", "c"], "linear")]
)
def test_a_picture_of_a_sweep(labels: list[Any], scale: str) -> None:
    """Points where the numbers are, with their intervals; hollow ones for warnings; the loss below."""
    pytest.importorskip("matplotlib")
    from llc_fast.plots import plot_sweep

    found = _sweep(labels=labels, dim="training_step")
    found["warning_codes"][:] = ["", "ess", ""]
    above, below = plot_sweep(found).axes
    x = labels if scale == "symlog" or labels[0] == 5 else range(3)
    line, filled, hollow = (above.lines[0], *(c.lines[0] for c in above.containers))
    np.testing.assert_array_equal(line.get_xydata(), np.column_stack([list(x), found.llc_mean]))
    assert list(filled.get_ydata()) == list(found.llc_mean.values[[0, 2]]) and filled.get_mfc() != "white"
    assert list(hollow.get_ydata()) == [found.llc_mean.values[1]] and hollow.get_mfc() == "white"
    [bars] = above.containers[1].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [found.llc_low[1], found.llc_high[1]])
    np.testing.assert_array_equal(below.lines[0].get_ydata(), found.init_loss)
    assert above.get_xscale() == below.get_xscale() == scale
    assert below.get_xlabel() == "training step"
    if labels[0] == "a":
        assert [text.get_text() for text in below.get_xticklabels()] == labels
