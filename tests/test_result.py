"""LLCResult: the estimate, its error bars and what they promise, files, pictures, exports."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llc_fast
from llc_fast.result import Diagnostics, LLCResult, Warning
from llc_fast.schedule import Schedule
from llc_fast.stats.convergence import ess_bulk, r_hat


def _result(draws: Any, **fields: Any) -> LLCResult:
    """A result whose draws of λ̂ are these: nβ = 1, L(w*) = 0, no burn-in."""
    draws = np.asarray(draws, dtype=np.float64)
    return LLCResult(
        **{
            "loss_trace": draws,
            "init_loss": 0.0,
            "nbeta": 1.0,
            "schedule": Schedule(draws.shape[1], 0),
        }
        | fields
    )


def _rich(chains: int = 3, diverged: int = 0) -> LLCResult:
    """A result with everything in it that a run may leave."""
    schedule = Schedule(num_draws=40, num_burnin=10, num_steps_bw_draws=2)
    rng = np.random.default_rng(0)
    trace = 0.5 + 0.01 * rng.standard_normal((chains, schedule.num_steps))
    for c in range(diverged):
        trace[c, 7 + c :] = np.nan
    return LLCResult(
        loss_trace=trace,
        init_loss=0.25,
        nbeta=144.3,
        schedule=schedule,
        settings={
            "sampler": "sgld",
            "lr": 1.25e-5,
            "batch_size": None,
            "num_samples": 1000,
            "training_mode": False,
        },
        warnings=[Warning("P < 5 & λ̂ ist unzuverlässig", "ess"), Warning("Use lr=1e-06.", "step-size")],
        diagnostics={"chains_diverged": diverged, "distance": [1.5, 2], "r_hat": 1.0123, "bias_share": None},
        observables={"norm": rng.random((chains, 40)), "weights": rng.random((chains, 40, 2, 3))},
        traces={name: rng.random(trace.shape) for name in ("bias", "acceptance", "lr")},
        ends={"0.weight": rng.random((chains, 2, 3), dtype=np.float32)},
    )


# --- The numbers --------------------------------------------------------------------------------------------


def test_estimate_of_each_chain() -> None:
    """λ̂ = nβ·(mean L over draws − L(w*)), for a chain over its draws, for all over all draws."""
    result = _result([[0.5, 0.75, 1.0], [0.5, 0.5, 0.125]], init_loss=0.25, nbeta=8.0)
    assert result.llc_trace.tolist() == [[2.0, 4.0, 6.0], [2.0, 2.0, -1.0]]
    assert result.llc_per_chain.tolist() == [4.0, 1.0]
    assert result.llc_mean == 2.5
    assert result.llc_std == pytest.approx(math.sqrt(4.5))  # over the chains' 4 and 1


def test_draws_are_the_last_steps_of_their_stretches() -> None:
    """Burn-in is left out, and between draws lie num_steps_bw_draws − 1 steps that don't count."""
    schedule = Schedule(num_draws=4, num_burnin=3, num_steps_bw_draws=5)
    assert schedule.num_steps == 23
    result = _result(np.arange(46).reshape(2, 23), schedule=schedule)
    assert result.llc_trace.tolist() == [[7, 12, 17, 22], [30, 35, 40, 45]]
    every = _result(np.arange(7).reshape(1, 7), schedule=Schedule(num_draws=5, num_burnin=2))
    assert every.llc_trace.tolist() == [[2, 3, 4, 5, 6]]


@pytest.mark.parametrize("burnin", [0, 1, 10])
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("draws", [1, 2, 13])
def test_every_schedule_yields_its_number_of_draws(draws: int, every: int, burnin: int) -> None:
    """The slice of draws ends with the last step and has num_draws elements, all behind the burn-in."""
    schedule = Schedule(draws, burnin, every)
    steps = list(range(schedule.num_steps))[schedule.draws]
    assert len(steps) == draws and steps[-1] == schedule.num_steps - 1 and steps[0] >= burnin
    assert set(np.diff(steps)) <= {every}


def test_standard_error_within_chains() -> None:
    """Four draws make two batches a chain: means 1 and 7 have variance 18, over four batches: √(18/4)."""
    result = _result([[1, 1, 7, 7], [1, 1, 7, 7]])
    assert result.llc_stderr == pytest.approx(math.sqrt(18 / 4))
    low, high = result.interval()
    half = 4.302653 * math.sqrt(18 / 4)  # Student's t with two degrees of freedom
    assert (low, high) == pytest.approx((4 - half, 4 + half), rel=1e-6)


def test_standard_error_between_chains() -> None:
    """Where chains disagree more than their draws, the chains' variance counts, with chains − 1 degrees."""
    result = _result([[1, 3, 5, 7], [1, 1, 1, 1]])
    assert result.llc_stderr == pytest.approx(math.sqrt(4.5 / 2))  # means 4 and 1; within: √(4/4) = 1
    low, high = result.interval()
    assert (low, high) == pytest.approx((2.5 - 12.706205 * 1.5, 2.5 + 12.706205 * 1.5), rel=1e-6)


def test_standard_error_of_one_chain() -> None:
    """Ten draws: three batches of three, the first draw left over; means 2, 5, 11 have variance 21."""
    result = _result([[3, 1, 2, 3, 4, 5, 6, 10, 11, 12]])
    assert result.llc_stderr == pytest.approx(math.sqrt(21 / 3))
    assert math.isnan(result.llc_std)


@pytest.mark.parametrize("draws", [[[5.0]], [[5.0, 6.0, 7.0]]])
def test_no_standard_error_from_too_few_draws(draws: Any) -> None:
    """One chain of fewer than four draws says nothing about its error: NaN, not a small number."""
    result = _result(draws)
    assert math.isfinite(result.llc_mean)
    assert math.isnan(result.llc_stderr) and all(map(math.isnan, result.interval()))


def test_intervals_of_other_probabilities() -> None:
    """A wider probability, a wider interval, around the estimate; Student's t for four degrees of freedom."""
    result = _result([[0, 2, 0, 2, 1, 3, 4, 2, 2], [1, 1, 0, 2, 3, 1, 2, 2, 3]])
    widths = []
    for prob in (0.5, 0.9, 0.95, 0.99):
        low, high = result.interval(prob)
        assert (low + high) / 2 == pytest.approx(result.llc_mean)
        widths.append((high - low) / 2 / result.llc_stderr)
    assert widths == pytest.approx([0.740697, 2.131847, 2.776445, 4.604095], rel=1e-5)


@pytest.mark.parametrize("prob", [0.0, 1.0, -0.5, 95, math.nan])
def test_interval_wants_a_probability(prob: float) -> None:
    """95 is not a probability; the message says what was given."""
    with pytest.raises(ValueError, match=f"prob must be between 0 and 1, got {prob}"):
        _rich().interval(prob)


def test_diverged_chains_are_left_out() -> None:
    """NaN rows count for nothing: the estimate and its errors are those of the chains that are left."""
    rng = np.random.default_rng(1)
    good = rng.standard_normal((3, 50))
    bad = np.full((2, 50), np.nan)
    bad[1, :20] = 1e6
    together = _result(np.concatenate([bad[:1], good, bad[1:]]))
    alone = _result(good)
    assert together.llc_mean == alone.llc_mean and together.llc_std == alone.llc_std
    assert together.llc_stderr == alone.llc_stderr and together.interval() == alone.interval()
    assert np.isnan(together.llc_per_chain).tolist() == [True, False, False, False, True]
    assert together.diverged_chains == [0, 4] and together.kept_chains == [1, 2, 3]
    np.testing.assert_array_equal(together.kept_draws, good)


def test_nothing_left() -> None:
    """With every chain diverged all numbers are NaN, without an exception or a warning of NumPy's."""
    result = _rich(diverged=3)
    numbers = [result.llc_mean, result.llc_std, result.llc_stderr, *result.interval(), *result.llc_per_chain]
    assert all(map(math.isnan, numbers))
    assert "nan" in result.summary()


def test_results_can_not_be_changed() -> None:
    """A result is a record: its fields can't be assigned."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        _rich().nbeta = 2.0  # type: ignore[misc]


# --- Coverage -----------------------------------------------------------------------------------------------


def _autoregressive(rng: np.random.Generator, phi: float, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """AR(1) with mean 0 and variance 1, stationary from the first value on, along the last axis."""
    noise = rng.standard_normal(shape)
    noise[..., 1:] *= math.sqrt(1 - phi**2)
    for k in range(1, shape[-1]):
        noise[..., k] += phi * noise[..., k - 1]
    return noise


@pytest.mark.parametrize(
    ("phi", "draws", "chains"),
    [
        *((0.0, 100, 1), (0.0, 100, 4), (0.0, 1000, 2), (0.0, 1000, 10)),
        *((0.5, 400, 2), (0.5, 400, 10), (0.9, 2000, 1), (0.9, 2000, 4)),
    ],
)
def test_intervals_cover(phi: float, draws: int, chains: int) -> None:
    """A 95 % interval holds the truth in 90 to 99 % of 1000 runs, with independent or correlated draws."""
    truth, repetitions = 3.0, 1000
    rng = np.random.default_rng([int(100 * phi), draws, chains])
    covered = 0
    for run in truth + _autoregressive(rng, phi, (repetitions, chains, draws)):
        low, high = _result(run).interval()
        covered += low <= truth <= high
    assert 0.90 <= covered / repetitions <= 0.99


def test_interval_sees_chains_that_settled_in_different_places() -> None:
    """Chains that scatter by more than their draws explain: the interval still holds the common mean."""
    rng = np.random.default_rng(5)
    chains, draws, repetitions = 4, 400, 1000
    places = rng.standard_normal((repetitions, chains, 1))
    covered = 0
    for run in places + 0.1 * rng.standard_normal((repetitions, chains, draws)):
        low, high = _result(run).interval()
        covered += low <= 0 <= high
    assert 0.92 <= covered / repetitions <= 0.98


# --- Files --------------------------------------------------------------------------------------------------


def _assert_same(a: LLCResult, b: LLCResult) -> None:
    assert a.loss_trace.tobytes() == b.loss_trace.tobytes() and a.loss_trace.shape == b.loss_trace.shape
    for name in ("init_loss", "nbeta", "schedule", "settings", "warnings", "diagnostics", "steps_done"):
        assert getattr(a, name) == getattr(b, name), name
    assert [w.code for w in a.warnings] == [w.code for w in b.warnings]
    for group in ("traces", "observables", "ends"):
        ours, theirs = getattr(a, group) or {}, getattr(b, group) or {}
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])
            assert values.dtype == theirs[name].dtype


@pytest.mark.parametrize("diverged", [0, 1, 3])
@pytest.mark.parametrize("name", ["result.npz", "result", "λ̂ of a network.llc"])
@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip(tmp_path: Path, kind: Any, name: str, diverged: int) -> None:
    """What was saved is what is loaded, bit for bit, NaN included, under exactly the name that was given."""
    path, result = tmp_path / name, _rich(diverged=diverged)
    result.save(kind(path))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    loaded = LLCResult.load(kind(path))
    _assert_same(loaded, result)
    assert loaded.loss_trace.dtype == np.float64
    assert loaded.summary() == result.summary()


def test_numbers_survive_exactly(tmp_path: Path) -> None:
    """Floats keep every bit, and infinities and NaN in the settings stay what they are."""
    settings = {"lr": 0.1 + 0.2, "tiny": 5e-324, "box": math.inf, "missing": math.nan}
    _result([[1.0]], init_loss=1 / 3, nbeta=math.pi, settings=settings).save(tmp_path / "r")
    loaded = LLCResult.load(tmp_path / "r")
    assert (loaded.init_loss, loaded.nbeta) == (1 / 3, math.pi)
    assert math.isnan(loaded.settings.pop("missing"))
    assert loaded.settings == {"lr": 0.1 + 0.2, "tiny": 5e-324, "box": math.inf}


@pytest.mark.parametrize("group", ["observables", "traces", "ends"])
def test_any_name_survives(tmp_path: Path, group: str) -> None:
    """Names that an archive takes for each other, and those of the file's own parts."""
    names = ["a", "a.npy", "loss_trace", "meta", "names", "file", "trace.a", "", "a/b", "../a", "λ̂", "a\0", "%41;"]
    values = {name: np.full((2, 3), float(k)) for k, name in enumerate(names)}
    dataclasses.replace(_result([[1.0, 2.0, 3.0]] * 2), **{group: values}).save(tmp_path / "r")
    found = getattr(LLCResult.load(tmp_path / "r"), group)
    assert {name: a.mean() for name, a in found.items()} == {name: float(k) for k, name in enumerate(names)}


def test_objects_can_not_be_saved(tmp_path: Path) -> None:
    """What could only be pickled is an error at saving, not at loading."""
    result = dataclasses.replace(_rich(), observables={"o": np.array([[{}]])})
    with pytest.raises(TypeError, match=r"observable\.o holds Python objects"):
        result.save(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_written_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With .png where there is no ending, links and permissions kept, and nothing where the ending is unknown."""
    pytest.importorskip("matplotlib")
    (tmp_path / "there").write_text("")
    (tmp_path / "there").chmod(0o600)
    (tmp_path / "link.png").symlink_to("there")
    for name in ("a", "b.PNG", "c.svg", "d.pdf", "link.png"):
        _rich().plot(tmp_path / name, panels="trace")
    with pytest.raises(ValueError, match="xyz"):
        _rich().plot(tmp_path / "e.xyz")
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.PNG", "c.svg", "d.pdf", "link.png", "there"}
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "there").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "there").read_bytes().startswith(b"\x89PNG")


def test_saving_replaces(tmp_path: Path) -> None:
    """Saving over an older result replaces it."""
    path = tmp_path / "result.npz"
    _rich(chains=5).save(path)
    _rich(chains=2).save(path)
    _assert_same(LLCResult.load(path), _rich(chains=2))


@pytest.mark.parametrize("when", ["while writing", "before replacing"])
@pytest.mark.parametrize("there_before", [True, False])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool, when: str
) -> None:
    """A full disk half-way: the error comes out, the old file is intact, and nothing half-written stays."""
    path, old = tmp_path / "result.npz", _rich(chains=5)
    if there_before:
        old.save(path)

    def full(file: Any, *args: Any, **arrays: Any) -> None:
        if when == "while writing":
            file.write(b"PK\x03\x04 the first half")
        raise OSError("no space left on device")

    monkeypatch.setattr("numpy.savez" if when == "while writing" else "os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        _rich(chains=2).save(path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path] * there_before
    if there_before:
        _assert_same(LLCResult.load(path), old)


def test_settings_that_no_file_can_hold(tmp_path: Path) -> None:
    """What can't be written is an error at saving, which leaves the old file as it is."""
    path = tmp_path / "result.npz"
    _rich().save(path)
    with pytest.raises(TypeError):
        dataclasses.replace(_rich(), settings={"model": object()}).save(path)
    assert list(tmp_path.iterdir()) == [path]
    _assert_same(LLCResult.load(path), _rich())


def _meta(**changes: Any) -> str:
    fields = {"format": 4, "init_loss": 0.0, "nbeta": 1.0, "schedule": {"num_draws": 2, "num_burnin": 0}}
    return json.dumps({k: v for k, v in (fields | changes).items() if v is not None})


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": np.zeros(3)},
        {"loss_trace": np.zeros((1, 2))},
        {"loss_trace": np.zeros((1, 2)), "meta": np.zeros(3)},
        {"loss_trace": np.zeros((1, 2)), "meta": np.array("{}")},
        {"loss_trace": np.zeros((1, 2)), "meta": np.array("[1, 2]")},
        {"loss_trace": np.zeros((1, 2)), "meta": np.array(_meta(format=99))},
        {"loss_trace": np.zeros((1, 2)), "meta": np.array(_meta(schedule=None))},
        {"loss_trace": np.zeros((1, 2)), "meta": np.array(_meta(nbeta=None))},
        {"loss_trace": np.zeros((1, 2)), "meta": np.array(_meta(extra=1))},
        {"loss_trace": np.array([{"a": 1}], dtype=object), "meta": np.array(_meta())},
    ],
    ids=[
        "other arrays",
        "no meta",
        "meta is numbers",
        "meta is empty",
        "meta is a list",
        "another version",
        "no schedule",
        "no nbeta",
        "unknown field",
        "pickled objects",
    ],
)
def test_foreign_archives_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    """Somebody else's npz is a ValueError that names the file, whatever is in it; pickles are never run."""
    path = tmp_path / "foreign.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"foreign\.npz"):
        LLCResult.load(path)


def test_the_archive_that_foreign_ones_are_made_from_is_read(tmp_path: Path) -> None:
    """The fields that the foreign archives above spoil are enough, unspoiled."""
    np.savez(tmp_path / "own.npz", loss_trace=np.array([[1.0, 3.0]]), meta=np.array(_meta()))
    assert LLCResult.load(tmp_path / "own.npz").llc_mean == 2.0


@pytest.mark.parametrize("damage", ["empty", "cut in half", "a byte changed", "text", "an array", "a pickle"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    """Torn, altered or altogether different files are a ValueError that names the file."""
    path = tmp_path / "damaged.npz"
    _rich(chains=20).save(path)
    content = bytearray(path.read_bytes())
    if damage == "a byte changed":
        content[len(content) // 2] ^= 1  # in the middle of the losses
    elif damage == "an array":
        with open(path, "wb") as file:
            np.save(file, np.zeros((2, 3)))
        content = bytearray(path.read_bytes())
    path.write_bytes(
        {
            "empty": b"",
            "cut in half": content[: len(content) // 2],
            "text": b"loss,step\n0.5,1\n",
            "a pickle": b"\x80\x04K\x01.",
        }.get(damage, bytes(content))
    )
    with pytest.raises(ValueError, match=r"damaged\.npz"):
        LLCResult.load(path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that isn't there is a FileNotFoundError, not a damaged file."""
    with pytest.raises(FileNotFoundError):
        LLCResult.load(tmp_path / "nothing.npz")


def test_missing_folder(tmp_path: Path) -> None:
    """Saving into a folder that isn't there is an OSError."""
    with pytest.raises(OSError, match="nowhere"):
        _rich().save(tmp_path / "nowhere" / "result.npz")


# --- Warnings -----------------------------------------------------------------------------------------------


def test_a_warning_is_a_string_with_a_code() -> None:
    """It compares, prints and formats as its sentence, and neither can be changed."""
    warning = Warning("too few draws", "ess")
    assert warning == "too few draws" and f"{warning!s} {warning!r}" == "too few draws 'too few draws'"
    assert warning.code == "ess" and json.dumps([warning]) == '["too few draws"]'
    for name in ("code", "other"):
        with pytest.raises(AttributeError):
            setattr(warning, name, "rhat")
    with pytest.raises(TypeError):
        Warning("a sentence without a code")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, *(lambda w, p=p: pickle.loads(pickle.dumps(w, p)) for p in range(6))],
    ids=["copy", "deepcopy", *(f"pickle {p}" for p in range(6))],
)
def test_copies_of_a_warning(again: Any) -> None:
    """Copies and pickles have the code too; so processes exchange it."""
    found = again(Warning("too few draws", "ess"))
    assert type(found) is Warning and (found, found.code) == ("too few draws", "ess")


# --- For people ---------------------------------------------------------------------------------------------


def test_summary() -> None:
    """The estimate, its error and interval, chains and draws, settings, every warning; str() is the same."""
    result = _rich(chains=4, diverged=1)
    text = result.summary()
    low, high = result.interval()
    for words in (
        f"λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g}",
        f"95 % interval {low:.4g} to {high:.4g}",
        "3 chains × 40 draws (1 diverged)",
        "L(w*) = 0.25",
        "nβ = 144.3",
        "R̂ = 1.012",
        "lr = 1.25e-05",
        "sampler = sgld",
        *(f"WARNING: {w}" for w in result.warnings),
    ):
        assert words in text
    assert str(result) == text
    assert text.endswith(f"what a warning means: llc-fast explain {' '.join(w.code for w in result.warnings)}")
    assert "explain" not in _result([[2.0]]).summary()
    assert "diverged" not in _rich().summary().split("WARNING")[0]


def test_bias_in_the_summary() -> None:
    """Its share, and whether it was subtracted."""
    for corrected, expected in ((False, "bias 12.3%"), (True, "bias 12.3% (subtracted)")):
        result = _result(np.ones((1, 8)), settings={"bias_correction": corrected}, diagnostics={"bias_share": 0.123})
        assert result.summary().splitlines()[2].strip() == expected


def test_repr_is_short() -> None:
    """The estimate in five lines, with the codes of the warnings, however long the traces are."""
    found = repr(_rich(chains=50)).splitlines()
    assert len(found) == 5 and max(map(len, found)) < 130
    assert found[0].startswith("LLCResult: λ̂ = ") and found[4] == "  warnings: ess, step-size"
    assert "warnings" not in repr(_result([[1.0, 2.0]]))


def test_html() -> None:
    """Summary, escaped warnings with their codes, and a picture."""
    pytest.importorskip("matplotlib")
    found = _rich(diverged=1)._repr_html_()
    assert all(html.escape(w) in found and f'<a href="{w.url}"><b>{w.code}</b></a>' in found for w in _rich().warnings)
    assert "P &lt; 5 &amp; λ̂" in found and "λ̂ = " in found
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', found)
    assert base64.b64decode(picture).startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("make", [lambda: _result([[2.0]]), lambda: _rich(diverged=3)], ids=["one draw", "no chain"])
def test_html_of_odd_results(make: Any) -> None:
    """Never an exception."""
    assert "<img" in make()._repr_html_()


def test_html_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no picture, and the rest is there."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = _rich()._repr_html_()
    assert "<img" not in found and "λ̂ = " in found and "<b>ess</b>" in found


@pytest.mark.parametrize("diverged", [0, 1, 3])
def test_plot(tmp_path: Path, diverged: int) -> None:
    """A figure with six panels, as a PNG file if a path is given, with chains that diverged too; or some of them."""
    pytest.importorskip("matplotlib")
    result = _rich(diverged=diverged)
    figure = result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(figure.axes) == len(result.plot().axes) == 6
    assert [axes.get_title() for axes in result.plot(panels=["rank", "trace"]).axes] == [
        "ranks of the draws",
        "loss along the chains",
    ]
    with pytest.raises(ValueError, match="panels has 'ranks'"):
        result.plot(tmp_path / "other.png", panels=["ranks"])
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_plot_shows_the_estimate() -> None:
    """The running means end at each chain's λ̂, the black one at the estimate, which the legend names."""
    pytest.importorskip("matplotlib")
    result = _rich()
    running = result.plot().axes[1]
    ends = [line.get_ydata()[-1] for line in running.lines[:4]]
    np.testing.assert_allclose(ends, [*result.llc_per_chain, result.llc_mean])
    assert any(f"{result.llc_mean:.4g}" in t.get_text() for t in running.get_legend().get_texts())


def test_plot_of_a_single_draw(tmp_path: Path) -> None:
    """The smallest result there is can be drawn."""
    pytest.importorskip("matplotlib")
    _result([[2.0]]).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"llc_fast\[plot\]\""):
        _rich().plot()


# --- Exports ------------------------------------------------------------------------------------------------


def test_to_xarray() -> None:
    """Traces by (chain, step), draws by (chain, draw) with the step of each, settings as attributes."""
    pytest.importorskip("xarray")
    result = _rich(diverged=1)
    data = result.to_xarray()
    assert data["loss"].dims == ("chain", "step") and data["llc"].dims == ("chain", "draw")
    np.testing.assert_array_equal(data["loss"].values, result.loss_trace)
    np.testing.assert_array_equal(data["llc"].values, result.llc_trace)
    np.testing.assert_array_equal(data["llc_per_chain"].values, result.llc_per_chain)
    for name, values in result.traces.items():
        assert data[name].dims == ("chain", "step")
        np.testing.assert_array_equal(data[name].values, values)
    for name, values in result.observables.items():
        assert data[name].dims[:2] == ("chain", "draw")
        np.testing.assert_array_equal(data[name].values, values)
    at_draws = data["loss"].sel(step=data["draw_step"].values).values
    np.testing.assert_array_equal(result.nbeta * (at_draws - result.init_loss), data["llc"].values)
    assert data.attrs["llc_mean"] == result.llc_mean and data.attrs["llc_stderr"] == result.llc_stderr
    assert data.attrs["init_loss"] == result.init_loss and data.attrs["nbeta"] == result.nbeta
    assert json.loads(data.attrs["settings"]) == result.settings
    assert json.loads(data.attrs["diagnostics"]) == result.diagnostics
    assert json.loads(data.attrs["warnings"]) == result.warnings
    assert json.loads(data.attrs["warning_codes"]) == ["ess", "step-size"]


@pytest.mark.parametrize("name", ["loss", "bias", "llc", "chain", "draw_step"])
def test_observables_with_names_that_are_taken(name: str) -> None:
    """Neither the trace nor the observable is dropped."""
    _arviz()
    result = dataclasses.replace(_rich(), observables={name: np.ones((3, 40))})
    data = result.to_xarray()
    assert (data[f"observable_{name}"].values == 1).all() and data[f"observable_{name}"].dims == ("chain", "draw")
    np.testing.assert_array_equal(data["loss"].values, result.loss_trace)
    posterior = result.to_arviz().posterior
    np.testing.assert_array_equal(posterior["llc"].values, result.llc_trace)
    assert (posterior[f"observable_{name}" if name in ("llc", "chain") else name].values == 1).all()


def _check_groups(found: Any, result: LLCResult, chains: list[int]) -> None:
    """Draws, observables, sample statistics and burn-in of these chains, under their own numbers."""
    posterior, draws = found.posterior, result.schedule.draws
    assert posterior["llc"].dims == ("chain", "draw") and posterior["chain"].values.tolist() == chains
    np.testing.assert_array_equal(posterior["draw"].values, np.arange(40))
    np.testing.assert_array_equal(posterior["llc"].values, result.llc_trace[chains])
    np.testing.assert_array_equal(posterior["weights"].values, result.observables["weights"][chains])
    assert posterior["weights"].dims == ("chain", "draw", "weights_dim_0", "weights_dim_1")
    assert posterior.attrs["nbeta"] == result.nbeta and posterior.attrs["init_loss"] == result.init_loss
    assert posterior.attrs["inference_library"] == "llc_fast"
    names = {"loss": result.loss_trace, "bias": result.traces["bias"]}
    names |= {"acceptance_rate": result.traces["acceptance"], "step_size": result.traces["lr"]}
    assert set(found.sample_stats.data_vars) == set(names) == set(found.warmup_sample_stats.data_vars)
    for name, values in names.items():
        np.testing.assert_array_equal(found.sample_stats[name].values, values[chains, draws])
        np.testing.assert_array_equal(found.warmup_sample_stats[name].values, values[chains, :10])
    np.testing.assert_allclose(found.warmup_posterior["llc"].values, 144.3 * (result.loss_trace[chains, :10] - 0.25))


def test_to_datatree() -> None:
    """The groups of ArviZ's schema, and everything that is no array as attributes; ArviZ is not needed."""
    xarray = pytest.importorskip("xarray", minversion="2024.10")
    result = _rich(chains=4, diverged=1)
    found = result.to_datatree()
    assert isinstance(found, xarray.DataTree)
    assert set(found.children) == {"posterior", "sample_stats", "warmup_posterior", "warmup_sample_stats"}
    _check_groups(found, result, [1, 2, 3])
    assert found.attrs["llc_mean"] == result.llc_mean and json.loads(found.attrs["settings"]) == result.settings
    assert json.loads(found.attrs["warning_codes"]) == ["ess", "step-size"]
    assert set(_result(np.ones((2, 8))).to_datatree().children) == {"posterior", "sample_stats"}
    empty = _rich(diverged=3).to_datatree()
    assert empty.posterior["llc"].shape[0] == 0


def test_an_old_xarray_has_no_datatree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which has."""
    xarray = pytest.importorskip("xarray", minversion="2024.10")
    monkeypatch.delattr(xarray, "DataTree")
    monkeypatch.setattr(xarray, "__version__", "2023.1")
    with pytest.raises(ImportError, match=r'xarray 2023.1 has no DataTree: pip install "xarray>=2024.10"'):
        _rich().to_datatree()


def _arviz() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an earlier one says that a later one is other
        return pytest.importorskip("arviz")


def test_to_arviz(tmp_path: Path) -> None:
    """What the ArviZ that is installed knows: InferenceData before 1, a DataTree since; it survives a file."""
    arviz = _arviz()
    result = _rich(chains=4, diverged=1)
    found = result.to_arviz()
    assert isinstance(found, arviz.InferenceData)
    _check_groups(found, result, [1, 2, 3])
    if arviz.__version__.startswith("0."):
        assert set(found.groups()) == {"posterior", "sample_stats", "warmup_posterior", "warmup_sample_stats"}
        assert set(_result(np.ones((2, 8))).to_arviz().groups()) == {"posterior", "sample_stats"}
    pytest.importorskip("h5py")
    pytest.importorskip("h5netcdf")
    found.to_netcdf(tmp_path / "found.nc")
    again = arviz.from_netcdf(tmp_path / "found.nc")
    np.testing.assert_array_equal(again.posterior["llc"].values, result.kept_draws)


def test_arviz_finds_the_same_statistics() -> None:
    """Its R̂ and effective sample size are ours; summaries and pictures work."""
    arviz = _arviz()
    draws = np.random.default_rng(0).standard_normal((4, 200)).cumsum(axis=1) / 9 + np.arange(4)[:, None]
    found = _result(draws).to_arviz()
    assert float(arviz.rhat(found)["llc"].values) == pytest.approx(r_hat(draws), rel=1e-8)
    assert float(arviz.ess(found)["llc"].values) == pytest.approx(ess_bulk(draws), rel=1e-8)
    assert float(arviz.summary(found, round_to=8)["mean"]["llc"]) == pytest.approx(draws.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["plot_trace_dist", "plot_trace", "plot_forest", "plot_autocorr", "plot_rank"])
def test_pictures_of_arviz_1(name: str) -> None:
    """They take the tree as it is."""
    arviz = _arviz()
    if arviz.__version__.startswith("0."):
        pytest.skip("of ArviZ 1")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    getattr(arviz, name)(_rich(chains=4).to_arviz(), var_names=["llc"], backend="matplotlib")
    pyplot.close("all")


def test_to_arviz_of_an_interrupted_run() -> None:
    """As many draws as there are, and none that is not."""
    _arviz()
    loss = np.full((3, 8), np.nan)
    loss[0, :6], loss[1, :5] = 1.0, 2.0
    found = _result(loss, steps_done=[6, 5, 0]).to_arviz()
    assert found.posterior["llc"].values.tolist() == [[1.0] * 5, [2.0] * 5]
    assert found.sample_stats["loss"].shape == (2, 5)


# --- Zarr ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: _rich(diverged=1), lambda: _rich(diverged=3), lambda: _result([[2.0]])])
def test_to_zarr(tmp_path: Path, make: Any) -> None:
    """Xarray reads back what to_datatree gives, as a tree and by group; a store of an earlier call is replaced."""
    xarray = pytest.importorskip("xarray", minversion="2024.10")
    pytest.importorskip("zarr", minversion="3")
    result, path = make(), tmp_path / "llc.zarr"
    _rich(chains=5).to_zarr(path)
    result.to_zarr(path)
    found = xarray.open_datatree(path, engine="zarr")
    xarray.testing.assert_identical(found.load(), result.to_datatree())
    posterior = xarray.open_zarr(path, group="posterior")
    np.testing.assert_array_equal(posterior["llc"].values, result.kept_draws)
    assert [p.name for p in tmp_path.iterdir()] == ["llc.zarr"]


def test_to_zarr_replaces_nothing_else(tmp_path: Path) -> None:
    """Neither files, nor folders, nor stores of others; an error leaves no part behind."""
    pytest.importorskip("xarray", minversion="2024.10")
    zarr = pytest.importorskip("zarr", minversion="3")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    zarr.open_group(tmp_path / "store", mode="w", attributes={"inference_library": "another"})
    for name in ("file", "folder", "store"):
        with pytest.raises(FileExistsError, match="Something else is there, which is not replaced"):
            _rich().to_zarr(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="The folder does not exist"):
        _rich().to_zarr(tmp_path / "nowhere" / "store")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "store"]
    assert (tmp_path / "folder" / "file").read_text() == "mine" == (tmp_path / "file").read_text()
    assert zarr.open_group(tmp_path / "store").attrs["inference_library"] == "another"
    (tmp_path / "empty").mkdir()
    _rich().to_zarr(tmp_path / "empty")


def test_to_zarr_that_fails_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xarray = pytest.importorskip("xarray", minversion="2024.10")
    pytest.importorskip("zarr", minversion="3")
    result, path = _rich(), tmp_path / "llc.zarr"
    result.to_zarr(path)

    def fail(self: Any, folder: Path, **_: Any) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xarray.DataTree, "to_zarr", fail)
    with pytest.raises(OSError, match="No space left"):
        _rich(chains=9).to_zarr(path)
    assert [p.name for p in tmp_path.iterdir()] == ["llc.zarr"]
    found = xarray.open_datatree(path, engine="zarr")
    xarray.testing.assert_identical(found.load(), result.to_datatree())


def test_results_are_read_without_torch(tmp_path: Path) -> None:
    """On a computer that has none: numbers, pictures, reports, exports."""
    result = _rich()
    result.save(tmp_path / "result.npz")
    script = """
import sys

class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from llc_fast import LLCResult
result = LLCResult.load("result.npz")
print(result.llc_mean)
result.summary(), repr(result), result._repr_html_()
for module, export in (("xarray", "to_xarray"), ("xarray", "to_datatree"), ("arviz", "to_arviz")):
    try:
        __import__(module)
    except ImportError:
        continue
    getattr(result, export)()
try:
    import matplotlib
except ImportError:
    sys.exit()
result.plot("result.png")
result.report("result.html")
"""
    beside = Path(llc_fast.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(beside), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == result.llc_mean


@pytest.mark.parametrize(
    ("module", "export", "extra"),
    [
        ("xarray", "to_xarray", "xarray"),
        ("xarray", "to_datatree", "xarray"),
        ("arviz", "to_arviz", "xarray"),
        ("zarr", "to_zarr", "samples"),
        ("matplotlib.figure", "report", "plot"),
    ],
)
def test_exports_without_their_packages(
    module: str, export: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the optional package an export is a ModuleNotFoundError; everything else works."""
    monkeypatch.setitem(sys.modules, module, None)
    result = _rich()
    arguments = [tmp_path / "file"] if export in ("to_zarr", "report") else []
    package = module.partition(".")[0]
    with pytest.raises(ModuleNotFoundError, match=rf"{package} is not installed: pip install \"llc_fast\[{extra}\]\""):
        getattr(result, export)(*arguments)
    assert not list(tmp_path.iterdir())
    assert math.isfinite(result.llc_mean)


def test_statistics_by_their_old_names() -> None:
    """What has another name since still answers to the old one, with a warning that says the new one."""
    result = LLCResult(np.zeros((1, 2)), 0.0, 1.0, Schedule(2, 0), diagnostics=Diagnostics(distance_over_reference=0.5))
    with pytest.warns(DeprecationWarning, match="now called 'distance_over_reference'"):
        assert result.diagnostics["distance_over_anchor"] == result.diagnostics["distance_over_reference"]
    with pytest.raises(KeyError, match="unheard_of"):
        result.diagnostics["unheard_of"]
