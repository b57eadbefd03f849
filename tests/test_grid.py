"""Scans over nβ and γ: against closed forms, what they cost, and what they say."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PNG
from runs import data, interrupted_after, mlp, mse, no_step
from torch import Tensor, nn

import llc_fast
from llc_fast import grid
from llc_fast.grid import Plateau, ScanResult
from llc_fast.problems.exact_posteriors import SAMPLES, ExactPosterior, linear_regression
from llc_fast.result import LLCResult, Warning

pytest.importorskip("xarray")
NBETA = SAMPLES / math.log(SAMPLES)


@pytest.fixture(scope="module")
def problem() -> ExactPosterior:
    return linear_regression(1.0)


def _curvatures(problem: ExactPosterior) -> np.ndarray[Any, Any]:
    x = problem.data[0].double()
    return torch.linalg.eigvalsh(2 * x.T @ x / len(x)).numpy()


def _exact(problem: ExactPosterior, result: ScanResult, slope: bool = False) -> np.ndarray[Any, Any]:
    """Σ ½·nβh/(nβh + γ) of every cell, or its derivative along log nβ, which is minus that along log γ."""
    nbeta, gamma = (values[..., None] for values in result._places)
    a = nbeta * _curvatures(problem)
    found: np.ndarray[Any, Any] = (0.5 * a * (gamma if slope else 1) / (a + gamma) ** (2 if slope else 1)).sum(axis=-1)
    return found


@pytest.fixture(scope="module")
def big(problem: ExactPosterior) -> ScanResult:
    """27 cells with nothing else set."""
    nbetas = [NBETA * 4.0**k for k in range(-4, 5)]
    with pytest.warns(llc_fast.LLCWarning):
        return llc_fast.scan(
            problem.model, problem.data, problem.loss_fn, nbeta=nbetas, localization=[1, 30, 1000], progress=False
        )


def test_every_cell_against_the_closed_form(problem: ExactPosterior, big: ScanResult) -> None:
    """27 deviations in units of their errors, with few degrees of freedom in each."""
    cells = big.dataset
    z = (cells["llc_mean"].values - _exact(problem, big)) / cells["llc_stderr"].values
    assert np.abs(z).max() < 4.5 and np.mean(z**2) < 2 and abs(z.mean()) < 0.6
    low, high, mean = (cells[name].values for name in ("llc_low", "llc_high", "llc_mean"))
    assert ((low < mean) & (mean < high)).all()
    excess = cells["mean_loss"].values - cells["init_loss"].values
    np.testing.assert_allclose(big._places[0] * excess, mean, rtol=1e-9)
    assert (cells["bias_share"].values < 0.25).all()
    assert cells["is_warm"].values.sum() == 26  # all but the first


def test_what_a_scan_costs(problem: ExactPosterior, big: ScanResult) -> None:
    """27 cells: at most four default estimates; and no cell has a larger error than its share of gradients explains."""
    single = 1.13 * 4 * 2 * 2000
    total = float(big.dataset["gradients"].sum())
    assert total <= 4 * single
    one = llc_fast.estimate_llc(
        problem.model,
        problem.data,
        problem.loss_fn,
        nbeta=NBETA,
        localization=1.0,
        num_draws=2000,
        num_burnin=2000,
        progress=False,
    )
    cell = big.dataset.sel(nbeta=NBETA, localization=1.0)
    ratio = float(cell["llc_stderr"]) / one.llc_stderr
    draws = 2000 / big.dataset.attrs["num_draws"]
    assert ratio < 2 * math.sqrt(draws)
    spent = one.loss_trace.size + one.diagnostics["pilot_steps"]
    # What as many single estimates of the cell's error would cost: each has its own burn-in and pilots.
    assert total < 0.75 * 27 * spent / ratio**2


def test_sensitivity_against_the_closed_form(problem: ExactPosterior, big: ScanResult) -> None:
    """Differences over factors of 4 and 30 against those of the exact λ̂."""
    found, exact = big.sensitivity, np.log(_exact(problem, big))
    nbeta, gamma = big._places
    for name, axis, places in (("nbeta", 0, np.log(nbeta[:, 0])), ("localization", 1, np.log(gamma[0]))):
        expected = np.gradient(exact, places, axis=axis, edge_order=1)
        if axis == 1:  # not evenly spaced on paper, but by a factor of 30 and 33: the plain difference
            expected[:, 1] = (exact[:, 2] - exact[:, 0]) / (places[2] - places[0])
        z = (found[f"{name}_slope"].values - expected) / found[f"{name}_slope_stderr"].values
        assert np.abs(z).max() < 4.5 and np.mean(z**2) < 2
    # The covariance formula of a cell alone, where it is precise.
    alone, error = found["localization_slope_of_cell"].values, found["localization_slope_of_cell_stderr"].values
    z = (alone + _exact(problem, big, slope=True) / _exact(problem, big)) / error
    assert np.abs(z).max() < 5


def test_the_plateau(problem: ExactPosterior, big: ScanResult) -> None:
    found = big.plateau
    assert found is not None and big.plateau_reason == str(found)
    slopes = _exact(problem, big, slope=True) / _exact(problem, big)
    assert all(slopes[place] < 0.2 for place in found.cells)
    assert found.nbeta >= NBETA and found.localization <= 30
    assert found.nbeta_range[0] <= found.nbeta <= found.nbeta_range[1]
    assert found.llc_mean == pytest.approx(5, abs=6 * found.llc_stderr)
    assert "λ̂ = " in str(found) and "for a factor of e" in str(found)


# ---- the prior alone ---------------------------------------------------------------------------------------


def test_no_temperature_is_the_prior(problem: ExactPosterior) -> None:
    """E‖w − w*‖² = P/γ and E[L] − L* = ½ tr(H)/γ, by 256 independent draws."""
    model, before = problem.model, copy.deepcopy(problem.model.state_dict())
    found = llc_fast.scan(
        model, problem.data, problem.loss_fn, nbeta=0, localization=[1, 10], progress=False
    ).dataset.isel(nbeta=0)
    trace = _curvatures(problem).sum()
    for k, gamma in enumerate((1.0, 10.0)):
        cell = found.isel(localization=k)
        # ‖w − w*‖² of 10 parameters: its mean over 256 draws has the relative standard error √(2/2560).
        assert float(cell["distance"]) ** 2 == pytest.approx(10 / gamma, rel=5 * math.sqrt(2 / 2560))
        excess = float(cell["mean_loss"] - cell["init_loss"])
        assert abs(excess - 0.5 * trace / gamma) < 4.5 * float(cell["mean_loss_stderr"])
        assert float(cell["mean_loss_stderr"]) < 0.1 * excess
        assert float(cell["llc_mean"]) == 0 == float(cell["llc_stderr"])
    assert float(found["distance_over_reference"][0] / found["distance"][0]) == pytest.approx(
        1 / float(model.weight.detach().norm()), rel=1e-6
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_prior_of_a_box_and_of_weight_decay() -> None:
    """Uniform with γ = 0; cut off; and between w* and 0."""
    generator = torch.Generator().manual_seed(0)
    w = torch.full((20_000,), 2.0)
    options = {"weight_decay": 0.0, "bounding_box_size": 0.5, "noise_level": 1.0}
    uniform = grid._prior_offset(w, 0.0, options, generator)
    assert float(uniform.abs().max()) <= 0.5 and float(uniform.square().mean()) == pytest.approx(1 / 12, rel=0.03)
    cut = grid._prior_offset(w, 4.0, options, generator)  # at one standard deviation: variance 0.2911 of a quarter
    assert float(cut.abs().max()) <= 0.5 and float(cut.square().mean()) == pytest.approx(0.2911 / 4, rel=0.03)
    pulled = grid._prior_offset(w, 3.0, options | {"weight_decay": 1.0, "bounding_box_size": None}, generator)
    assert float(pulled.mean()) == pytest.approx(-0.5, abs=0.02) and float(pulled.var()) == pytest.approx(
        0.25, rel=0.05
    )


def test_nothing_holds_w_without_loss_and_prior() -> None:
    with pytest.raises(ValueError, match="nbeta=0 with localization=0 is no distribution"):
        _scan(nbeta=[0, 1], localization=[0, 1])


def test_masked_elements_stay(problem: ExactPosterior) -> None:
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, :3] = True
    found = llc_fast.scan(
        problem.model, problem.data, problem.loss_fn, nbeta=0, localization=2.0, params={"weight": mask}, progress=False
    )
    assert float(found.dataset["distance"].item()) ** 2 == pytest.approx(3 / 2, rel=5 * math.sqrt(2 / (3 * 256)))


# ---- cells -------------------------------------------------------------------------------------------------


@functools.cache
def _problem() -> ExactPosterior:
    return linear_regression(1.0)


def _scan(**settings: Any) -> ScanResult:
    given: dict[str, Any] = {
        "nbeta": [NBETA, 4 * NBETA],
        "localization": [1.0, 4.0],
        "num_draws": 40,
        "num_burnin": 40,
        "num_chains": 2,
        "batch_size": 50,
        "progress": False,
    }
    problem = _problem()
    return llc_fast.scan(problem.model, problem.data, problem.loss_fn, **(given | settings))


quiet = pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")


@quiet
def test_default_values_are_around_the_defaults() -> None:
    model = _problem().model
    result = _scan(nbeta=None, localization=None, num_draws=4, num_burnin=4, lr=1e-4)
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    gamma = llc_fast.default_localization(sum(p.numel() for p in model.parameters()), norm)
    np.testing.assert_allclose(result.dataset["nbeta"], NBETA * 4.0 ** np.arange(-2, 3))
    np.testing.assert_allclose(result.dataset["localization"], gamma * 4.0 ** np.arange(-1, 3))
    assert result.dataset["llc_mean"].shape == (5, 4) and not result.is_partial


@quiet
def test_cells_are_estimates() -> None:
    """With chains from w* and a given step size every cell is what `estimate_llc` gives with the cell's seed."""
    result = _scan(warm=False, lr=1e-4, seed=5)
    problem = _problem()
    first = llc_fast.estimate_llc(
        problem.model,
        problem.data,
        problem.loss_fn,
        nbeta=NBETA,
        localization=1.0,
        lr=1e-4,
        seed=5,
        num_draws=40,
        num_burnin=40,
        num_chains=2,
        batch_size=50,
        progress=False,
    )
    assert result.results[0, 0].llc_mean == first.llc_mean == float(result.dataset["llc_mean"][0, 0])
    seeds = [r.settings["seed"] for r in result.results.values()]
    assert len(set(seeds)) == 4  # noise that led chains to where they start must not come again
    assert all(r.ends is None for r in result.results.values())


@quiet
def test_same_seed_same_bits_and_nothing_is_left_behind() -> None:
    model = _problem().model
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = _scan(), _scan()
    third = _scan(seed=1)
    cost = first.dataset.drop_vars("seconds")
    assert cost.identical(second.dataset.drop_vars("seconds"))
    assert (first.dataset["llc_mean"].values != third.dataset["llc_mean"].values).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@quiet
def test_a_path() -> None:
    result = _scan(nbeta=[NBETA, 4 * NBETA, 4 * NBETA], localization=[1.0, 1.0, 2.0], path=True)
    assert result.dims == ("cell",) and result.dataset["llc_mean"].shape == (3,)
    assert [result.results[k,].settings["localization"] for k in range(3)] == [1.0, 1.0, 2.0]
    slopes = result.sensitivity
    log = np.log(result.dataset["llc_mean"].values)
    assert float(slopes["nbeta_slope"][0]) == pytest.approx((log[1] - log[0]) / math.log(4))
    assert float(slopes["localization_slope"][2]) == pytest.approx((log[2] - log[1]) / math.log(2))
    assert np.isnan(slopes["nbeta_slope"].values[2]) and np.isnan(slopes["localization_slope"].values[0])
    spread = _scan(nbeta=[4.0, 8.0], localization=1.0, path=True)
    assert spread.dataset["localization"].values.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="nbeta has 2 numbers and localization 3"):
        _scan(nbeta=[1, 2], localization=[1, 2, 3], path=True)


@quiet
def test_step_sizes_of_ones_own() -> None:
    result = _scan(lr=lambda nbeta, gamma: 0.01 / (nbeta + gamma))
    nbeta, gamma = result._places
    np.testing.assert_allclose(result.dataset["lr"], 0.01 / (nbeta + gamma))
    assert (result.dataset["attempts"] == 1).all()
    with pytest.raises(ValueError, match="lr must be"):
        _scan(lr=lambda nbeta, gamma: -1.0)


@quiet
def test_too_much_bias_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller step, from the cell's own ends; and no more than three times."""
    usual = _scan(num_draws=100)
    monkeypatch.setattr(grid, "MAX_BIAS_SHARE", 1e-9)
    again = _scan(num_draws=100)
    assert (usual.dataset["attempts"] <= 3).all() and (again.dataset["attempts"] == 3).all()
    assert float(again.dataset["gradients"].sum()) > 2 * float(usual.dataset["gradients"].sum())


@quiet
def test_cells_that_were_led_astray_start_at_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    real = grid.estimate_llc

    def estimate(*arguments: Any, **settings: Any) -> LLCResult:
        result = real(*arguments, **settings)
        calls.append(settings["warm_start"] is not None)
        result.warnings[:] = [Warning("Chains left.", "left")] if settings["warm_start"] is not None else []
        return result

    monkeypatch.setattr(grid, "estimate_llc", estimate)
    result = _scan(lr=1e-4)
    assert calls == [False, *[True, False] * 3]
    assert not result.dataset["is_warm"].values.any() and result.dataset["attempts"].values.tolist() == [[1, 2], [2, 2]]
    assert not "".join(result.dataset["warning_codes"].values.ravel())


@quiet
def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """Finished cells come back, marked; the same call goes on from the folder, to the same bits."""
    whole = _scan(lr=1e-4)
    with interrupted_after(200):
        part = _scan(lr=1e-4, folder=tmp_path / "cells")
    assert part.is_partial and "interrupted" in part.summary()
    done = np.isfinite(part.dataset["llc_mean"].values)
    assert 0 < done.sum() < 4
    np.testing.assert_array_equal(part.dataset["llc_mean"].values[done], whole.dataset["llc_mean"].values[done])
    again = _scan(lr=1e-4, folder=tmp_path / "cells")
    np.testing.assert_array_equal(again.dataset["llc_mean"], whole.dataset["llc_mean"])
    with no_step():
        kept = _scan(lr=1e-4, folder=tmp_path / "cells")
    np.testing.assert_array_equal(kept.dataset["llc_mean"], whole.dataset["llc_mean"])


def test_interrupted_before_there_is_anything() -> None:
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        _scan(lr=1e-4)


@quiet
def test_exact_samplers_choose_their_own_steps() -> None:
    result = _scan(sampler="hmc", batch_size=None, num_draws=20, num_burnin=20)
    assert (result.dataset["acceptance"] > 0.3).all()
    # Ten gradients a draw, and the warm cells have a quarter of the burn-in.
    assert result.dataset["gradients"].values[0, 0] % (2 * 40 * 10) == 0
    assert result.dataset["gradients"].values[1, 1] % (2 * 25 * 10) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nbeta": -1.0}, "nbeta must be"),
        ({"nbeta": []}, "nbeta is empty"),
        ({"nbeta": [1, 1]}, "nbeta has the same number twice"),
        ({"localization": [math.nan]}, "localization must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"nbeta": [2, 2], "localization": [1, 1], "path": True}, "same pair twice"),
    ],
)
def test_values_that_make_no_grid(settings: dict[str, Any], message: str) -> None:
    with no_step(), pytest.raises(ValueError, match=message):
        _scan(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nbeta": "4"}, "nbeta must be a number or several"),
        ({"checkpoint": "file"}, "checkpoint is not for scans: pass folder"),
        ({"warm_start": None}, "warm_start is not for scans"),
        ({"refine": True}, "refine is not for scans: each cell would find a w\\* of its own"),
        ({"target_error": 0.1}, "target_error is not for scans: cells have one length"),
        ({"no_such": 1}, "unexpected keyword argument 'no_such'"),
    ],
)
def test_arguments_of_the_wrong_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _scan(**settings)


def test_errors_name_their_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> LLCResult:
        raise ValueError("lr=None: no step size can be chosen")

    monkeypatch.setattr(grid, "estimate_llc", fail)
    with pytest.raises(ValueError, match="localization=1: lr=None"):
        _scan()


# ---- what is said of cells ---------------------------------------------------------------------------------


def _made(
    mean: Any, nbeta: Any = (1.0, 4.0, 16.0), gamma: Any = (1.0, 4.0, 16.0), codes: Any = None, error: float = 0.01
) -> ScanResult:
    """A result by hand, with relative errors."""
    shape = (len(nbeta), len(gamma))
    mean = np.broadcast_to(np.asarray(mean, dtype=float), shape)
    plan = grid._Plan(shape, {p: (nbeta[p[0]], gamma[p[1]]) for p in np.ndindex(shape)}, {}, 10, 10, 10, 1.0)
    blank = dict.fromkeys(grid._NUMBERS, math.nan)
    rows = {
        p: blank
        | {"llc_mean": mean[p], "llc_stderr": error * abs(mean[p]), "warnings": "", "is_warm": True, "attempts": 1}
        | {"warning_codes": "" if codes is None else codes[p[0]][p[1]], "gradients": 10.0}
        for p in np.ndindex(shape)
    }
    return ScanResult(grid._dataset(plan, rows, False, 4, 0))


def test_plateaus() -> None:
    """Where λ̂ stands still; nowhere; where warnings are not; and its connected range."""
    steep = _made([[1, 2, 4], [2, 4, 8], [4, 8, 16]])
    assert steep.plateau is None
    assert (
        "no plateau: λ̂ changes by more than 10 % for a factor of e everywhere".replace("10 %", "10%")
        in steep.plateau_reason
    )
    flat = _made([[2, 1, 0.5], [3, 3, 1], [3, 3, 1.5]])
    found = flat.plateau
    assert isinstance(found, Plateau) and (2, 0) in found.cells and (0, 2) not in found.cells
    assert found.llc_range == (3, 3) and found.change < 0.1
    codes = [["", "", ""], ["", "", "rhat"], ["", "rhat", "rhat"]]
    mean = [[3, 3.0, 2], [3, 3.3, 5], [2, 5, 5]]
    assert _made(mean, codes=codes).plateau is not None
    assert (2, 2) not in _made(mean, codes=codes).plateau.cells  # type: ignore[union-attr]
    all_warned = _made(3.0, codes=[["rhat"] * 3] * 3).plateau
    assert (
        all_warned is not None and all_warned.warning_codes == ("rhat",) and "with warnings (rhat)" in str(all_warned)
    )
    assert "no two neighbouring cells" in _made([[-1.0]], nbeta=(1.0,), gamma=(1.0,)).plateau_reason


def test_what_is_not_known_is_not_flat() -> None:
    """Of two cells that seem as flat, the one that is known better; a noisy zero is no plateau's centre."""
    result = _made([[3.0, 3.05, 2.0]] * 3)
    noisy = result.dataset.copy(deep=True)
    noisy["llc_mean"][:] = 3.0
    noisy["llc_stderr"][0] = 0.5
    noisy["llc_stderr"][1:] = 0.01
    found = ScanResult(noisy).plateau
    assert found is not None and found.nbeta > 1.0


def test_slopes_skip_what_has_no_logarithm() -> None:
    result = _made([[0.0, 0.0, 0.0], [1, 2, 4], [-1, 2, 4]], nbeta=(0.0, 1.0, 4.0))
    slopes = result.sensitivity
    assert np.isnan(slopes["nbeta_slope"].values[0]).all() and np.isnan(slopes["nbeta_slope"].values[1, 0])
    assert slopes["nbeta_slope"].values[1:, 1].tolist() == [0, 0]
    np.testing.assert_allclose(slopes["localization_slope"].values[1], 0.5)
    np.testing.assert_allclose(slopes["localization_slope_stderr"].values[1, 1], math.hypot(0.01, 0.01) / math.log(16))


def test_fit_uses_one_localization() -> None:
    """λ = 0.5 and m = 2, in the numbers of −d log Z/d log nβ with Z = (nβ)^(−½)·(log nβ + 2)."""
    nbeta = np.logspace(0.5, 5, 10)
    mean = 0.5 - 1 / (np.log(nbeta) + 2)
    result = _made(np.stack([mean, 0 * mean + 3], axis=1), nbeta=tuple(nbeta), gamma=(1.0, 2.0), error=2e-3)
    with pytest.raises(ValueError, match="localization=None: the scan has several γ, 1, 2"):
        result.fit()
    with pytest.raises(ValueError, match="localization=7 is not in the scan"):
        result.fit(localization=7)
    found = result.fit(localization=1.0)
    assert found.multiplicity == 2 and abs(found.value - 0.5) < 3 * found.stderr < 0.1
    assert result.fit(localization=2.0).multiplicity == 1
    with pytest.raises(ValueError, match="λ̂ is negative there, so w\\* is not the minimum"):
        _made(-np.ones((6, 1)), nbeta=tuple(nbeta[:6]), gamma=(1.0,)).fit()


# ---- for people and programs -------------------------------------------------------------------------------


def test_summary_and_files(big: ScanResult, tmp_path: Path) -> None:
    text = big.summary()
    assert text.count("nβ = ") >= 10 and "27 of 27 cells" in text and "plateau at" in text and "* warnings: " in text
    assert repr(big).startswith("ScanResult:") and big._repr_html_().startswith("<pre>")
    big.save(tmp_path / "scan.nc")
    loaded = ScanResult.load(tmp_path / "scan.nc")
    assert loaded.dataset.identical(big.dataset) and loaded.summary() == text and not loaded.results
    assert {"llc_mean", "sensitivity_nbeta_slope"} <= set(big.to_xarray().data_vars)
    (tmp_path / "other.nc").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a file that"):
        ScanResult.load(tmp_path / "other.nc")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ScanResult.load(tmp_path / "none.nc")


def test_pictures(big: ScanResult, tmp_path: Path) -> None:
    """A map of a grid, whose cells have their λ̂ in words; lines of what has one dimension; hollow where warned."""
    pytest.importorskip("matplotlib")
    figure = big.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(PNG)
    axes = figure.axes[0]
    assert len(axes.patches) == 27
    warned = [bool(codes) for codes in big.dataset["warning_codes"].values.ravel()]
    hollow = [patch.get_facecolor()[:3] == (1, 1, 1) for patch in axes.patches]
    assert hollow == warned and any(warned)
    assert any(f"{float(big.dataset['llc_mean'][0, 0]):.4g}" in text.get_text() for text in axes.texts)
    line = _made(np.ones((3, 1)), gamma=(1.0,), codes=[[""], ["rhat"], [""]]).plot(tmp_path / "line.png").axes[0]
    assert line.get_xscale() == "log" and line.get_xlabel() == "nβ"
    assert "hollow: with a warning" in [text.get_text() for text in line.get_legend().get_texts()]
    partial = big.dataset.copy(deep=True)
    partial["llc_mean"][0, 0] = math.nan
    assert len(ScanResult(partial).plot().axes[0].patches) == 26


def test_warnings_say_which_cells() -> None:
    with pytest.warns(llc_fast.LLCWarning, match=r"of 1 cells have the warning 'ess' \(nβ = 4 and γ = 1\)") as caught:
        llc_fast.scan(
            mlp(), data(), mse, nbeta=4.0, localization=1.0, num_draws=10, num_burnin=5, lr=1e-5, progress=False
        )
    assert len({w.message.code for w in caught if isinstance(w.message, llc_fast.LLCWarning)}) == len(caught)  # type: ignore[union-attr]


@quiet
def test_progress_counts_cells(capsys: pytest.CaptureFixture[str]) -> None:
    _scan(lr=1e-4, progress=True)
    assert "cells" in capsys.readouterr().err


class _Own(nn.Module):
    """A loss of its own that draws from its own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@quiet
def test_loss_functions_of_the_model() -> None:
    """``loss_fn(model, batch)``, and data as a dictionary, at nβ = 0 too."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    x, _ = data()
    result = llc_fast.scan(
        _Own(),
        {"x": x, "y": x.sum(dim=1)},
        loss,
        nbeta=[0, 5.0],
        localization=1.0,
        num_draws=30,
        num_burnin=10,
        batch_size=8,
        progress=False,
    )
    assert np.isfinite(result.dataset["mean_loss"]).all() and float(result.dataset["mean_loss"][0, 0]) > 0


@quiet
def test_behavioral_losses() -> None:
    """w* is the minimum whatever the data say, at every temperature, and the prior alone is above it."""
    model = mlp()
    result = llc_fast.scan(
        model,
        data()[0],
        "behavioral",
        nbeta=[0, 5.0, 20.0],
        localization=2.0,
        num_draws=60,
        num_burnin=40,
        progress=False,
    )
    assert (result.dataset["init_loss"] == 0).all() and (result.dataset["llc_mean"].values[1:] > 0).all()
    assert float(result.dataset["mean_loss"][0, 0]) > float(result.dataset["mean_loss"][1, 0]) > 0
