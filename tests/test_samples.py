"""What a store holds comes back; devinterp 2 reads ours, and we read devinterp's."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import estimate

import llc_fast
from llc_fast import LLCResult, LLCWarning
from llc_fast import samples as samples_module
from llc_fast.samples import Probe, Samples, attributes, layout, save_result
from llc_fast.schedule import Schedule
from llc_fast.stats.convergence import r_hat
from llc_fast.store import SampleStore

zarr = pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
xarray = pytest.importorskip("xarray")

HERE = Path(__file__).parent
CHAINS, DRAWS, BURNIN, LENGTH = 2, 60, 10, 4
PROBES = (Probe("text", 6, LENGTH), Probe("my code", 5, LENGTH))
SETTINGS = {"sampler": "sgld", "lr": 1e-3, "localization": 2.0, "num_chains": CHAINS, "batch_size": 8, "seed": 1}
NBETA, INIT_LOSS = 10.0, 1.25


def losses(probe: Probe) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(probe.num_samples)
    shape = (CHAINS, DRAWS, probe.num_samples, *([] if probe.num_tokens is None else [probe.num_tokens]))
    shared = generator.normal(size=(CHAINS, DRAWS, 1, 1)[: len(shape)])
    return (2 + 0.3 * shared + 0.2 * generator.normal(size=shape)).astype(np.float32)


def result(**options: Any) -> LLCResult:
    trace = INIT_LOSS + np.random.default_rng(0).gamma(2, 0.05, (CHAINS, BURNIN + DRAWS))
    made = {"loss_trace": trace, "init_loss": INIT_LOSS, "nbeta": NBETA, "schedule": Schedule(DRAWS, BURNIN)}
    return LLCResult(**made | {"settings": dict(SETTINGS)} | options)


def make(
    path: Path | None,
    probes: tuple[Probe, ...] = PROBES,
    *,
    draws: int = DRAWS,
    save: bool = True,
    dtype: str = "float32",
) -> SampleStore:
    """A store with all that a run writes; of the first so many draws only."""
    run = result()
    said = attributes(probes, nbeta=NBETA, init_loss=INIT_LOSS, schedule=run.schedule, settings=SETTINGS)
    store = SampleStore.create(path, layout(probes, num_chains=CHAINS, num_draws=DRAWS, dtype=dtype), said, resume=True)
    shape = store.variables["init_loss"].shape
    store.write_fixed("init_loss", np.full(shape, INIT_LOSS))
    for probe in probes:
        if probe.num_tokens is not None:
            ids = np.arange(probe.num_samples * (probe.num_tokens + 1)).reshape(probe.num_samples, -1)
            store.write_fixed(f"input_ids_{probe.id}", ids)
        store.write_fixed(f"init_loss_{probe.id}", losses(probe)[0, 0] + 1)
        values = losses(probe)
        for chain in range(CHAINS):
            for draw in range(draws):
                store.write(f"loss_{probe.id}", chain, draw, values[chain, draw])
    for chain in range(CHAINS):
        for draw in range(draws):
            store.write("draw_loss", chain, draw, run.loss_trace[chain, BURNIN + draw])
    if save:
        save_result(store, run)
        store.complete()
    store.close()
    return store


# ---- what comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["disk", "disk, as written", "memory"])
def test_what_was_written_comes_back(tmp_path: Path, place: str) -> None:
    store = make(None if place == "memory" else tmp_path / "run.zarr")
    samples = Samples.open(tmp_path / "run.zarr") if place == "disk" else Samples.of(store)
    assert samples.probes == ("text", "my code") and not samples.is_partial and samples.draws_done == [DRAWS] * 2
    assert samples.settings == SETTINGS and samples.nbeta == NBETA and samples.init_loss == INIT_LOSS
    for probe in PROBES:
        found = samples.losses(probe.name)
        assert found.dims == ("chain", "draw", "sample", "token") and found.dtype == np.float32
        np.testing.assert_array_equal(found.values, losses(probe))
        np.testing.assert_allclose(samples.losses(probe.id, per="sample").values, losses(probe).mean(axis=3), rtol=1e-6)
        np.testing.assert_array_equal(samples.init_losses(probe.name), losses(probe)[0, 0] + 1)
        assert samples.input_ids(probe.name)[1, 0] == LENGTH + 1  # type: ignore[index]
    assert samples.has_tokens == {"text": True, "my code": True}
    assert "text (6 samples of 4 tokens), my code (5 samples of 4 tokens)" in str(samples)
    llc = samples.llc()
    np.testing.assert_array_equal(llc.loss_trace, result().loss_trace)
    assert llc.llc_mean == result().llc_mean and llc.schedule == Schedule(DRAWS, BURNIN)
    assert samples.llc() is llc
    samples.close()


def test_losses_per_sample_have_no_tokens(tmp_path: Path) -> None:
    probes = (Probe("a", 7), Probe("b", 3))
    make(tmp_path / "run.zarr", probes)
    with Samples.open(tmp_path / "run.zarr") as samples:
        assert samples.dataset["loss_a"].dims == ("chain", "draw", "batch_a")
        assert samples.dataset["init_loss"].dims == ("chain",) and "sampling_loss_micro" not in samples.dataset
        np.testing.assert_array_equal(samples.losses("b").values, losses(probes[1]))
        assert samples.losses("b").dims == ("chain", "draw", "sample") and samples.input_ids("b") is None
        with pytest.raises(ValueError, match="per='token': losses of 'a' are per sample"):
            samples.losses("a", per="token")
        with pytest.raises(ValueError, match="per must be 'sample' or 'token', got 'word'"):
            samples.losses("a", per="word")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="probe must be one of 'a', 'b', got 'c'"):
            samples.losses("c")


def test_tokens_that_are_not_predicted(tmp_path: Path) -> None:
    """The mean of the samples' losses is the mean over predicted tokens, whatever was stored for the others."""
    probe = Probe("text", 3, 4, tokens_per_sample=7 / 3)
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    said = attributes([probe], nbeta=1.0, init_loss=0.0, schedule=Schedule(2, 0), settings=SETTINGS)
    with SampleStore.create(
        tmp_path / "run.zarr", layout([probe], num_chains=1, num_draws=2), said, resume=False
    ) as store:
        store.write_fixed("token_mask_text", mask)
        for draw, other in enumerate((0.0, math.nan)):
            store.write("draw_loss", 0, draw, 0.0)
            store.write("loss_text", 0, draw, np.where(mask, np.arange(12.0).reshape(3, 4), other))
        store.complete()
    with Samples.open(tmp_path / "run.zarr") as samples:
        found = samples.losses("text", per="sample").values
    np.testing.assert_allclose(found[0], [np.array([1, 4, 38]) * 3 / 7] * 2, rtol=1e-6)
    assert found[0, 0].mean() == pytest.approx(43 / 7)


def test_probes_of_different_lengths(tmp_path: Path) -> None:
    """xarray wants one size of a dimension: that of the first probe with tokens."""
    probes = (Probe("a", 2), Probe("b", 3, 4), Probe("c", 2, 6), Probe("d", 2, 4))
    make(tmp_path / "run.zarr", probes)
    with Samples.open(tmp_path / "run.zarr") as samples:
        assert samples.dataset["loss_b"].dims[3] == samples.dataset["loss_d"].dims[3] == "token_pos"
        assert (
            samples.dataset["loss_c"].dims[3] == "token_pos_c" and samples.dataset["input_ids_c"].dims[1] == "token_c"
        )
        for probe in probes:
            np.testing.assert_array_equal(samples.losses(probe.name).values, losses(probe))


def test_float16(tmp_path: Path) -> None:
    """Read as float32 by blocks; half of the bytes."""
    make(tmp_path / "run.zarr", dtype="float16")
    with Samples.open(tmp_path / "run.zarr") as samples:
        assert samples.losses("text").dtype == np.float16
        blocks = np.concatenate([values for _, values in samples.blocks("text")], axis=2)
        assert blocks.dtype == np.float32
        np.testing.assert_allclose(blocks, losses(PROBES[0]), rtol=1e-3)


@pytest.mark.parametrize("size", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_blocks_are_all_of_it(size: int | None, per: Any) -> None:
    samples = Samples.of(make(None))
    found = list(samples.blocks("text", size, per=per))
    covered = [k for part, _ in found for k in range(part.start, part.stop)]
    assert covered == list(range(6)) and all(values.shape[2] == s.stop - s.start for s, values in found)
    assert all(values.shape[2] <= (size or 6) for _, values in found)
    joined = np.concatenate([values for _, values in found], axis=2)
    np.testing.assert_allclose(
        joined, losses(PROBES[0]) if per == "token" else losses(PROBES[0]).mean(axis=3), rtol=1e-6
    )
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        next(samples.blocks("text", 0))


def test_blocks_do_not_load_everything(tmp_path: Path) -> None:
    """48 MB of losses, in blocks of 2 MB; chunks are split along samples."""
    probe, chains, draws = Probe("a", 480, 25), 2, 500
    said = attributes([probe], nbeta=1.0, init_loss=0.0, schedule=Schedule(draws, 0), settings=SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llc_fast.store.CHUNK_BYTES", 50 * 20 * 25 * 4)
        variables = layout([probe], num_chains=chains, num_draws=draws)
        with SampleStore.create(tmp_path / "run.zarr", variables, said, resume=False) as store:
            for draw in range(draws):
                for chain in range(chains):
                    store.write("loss_a", chain, draw, np.full((480, 25), draw, np.float32))
                    store.write("draw_loss", chain, draw, 0.0)
            store.complete()
        patch.setattr(samples_module, "BLOCK_BYTES", 2 * 2**20)
        with Samples.open(tmp_path / "run.zarr") as samples:
            tracemalloc.start()
            sizes = [values.shape[2] for _, values in samples.blocks("a")]
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert sizes == [20] * 24
    assert peak < 8 * 2**20


# ---- λ̂ -------------------------------------------------------------------------------------------------------


def test_a_real_result_comes_back(tmp_path: Path) -> None:
    """Traces, observables, ends, warnings, diagnostics: all but what belongs to one call."""
    made = estimate(observables={"first weight/²": lambda draw: draw.params["0.weight"][0, 0]}, keep_ends=True)
    probe = Probe("a", 2)
    said = attributes(
        [probe], nbeta=made.nbeta, init_loss=made.init_loss, schedule=made.schedule, settings=made.settings
    )
    variables = layout([probe], num_chains=3, num_draws=made.schedule.num_draws)
    for _ in range(2):  # the second time as a run that is resumed when it is over
        with SampleStore.create(tmp_path / "run.zarr", variables, said, resume=True) as store:
            save_result(store, made)
            store.complete()
    with Samples.open(tmp_path / "run.zarr") as samples:
        found = samples.llc()
    assert found.summary().replace("seconds", "") and found.llc_mean == made.llc_mean
    assert found.llc_stderr == made.llc_stderr and found.steps_done is None
    assert list(map(repr, found.warnings)) == list(map(repr, made.warnings))
    assert [w.code for w in found.warnings] == [w.code for w in made.warnings]
    for name in ("traces", "observables", "ends"):
        ours, theirs = getattr(found, name), getattr(made, name)
        assert ours.keys() == theirs.keys() and theirs, name
        for key, values in theirs.items():
            np.testing.assert_array_equal(ours[key], values)
            assert ours[key].dtype == values.dtype
    assert set(made.settings) - set(found.settings) == {"seconds"}
    assert set(made.diagnostics) - set(found.diagnostics) <= samples_module._OF_ONE_CALL
    assert "seconds" not in said["llc_fast"]["settings"]


@pytest.mark.parametrize("options", [{"lr": 1e-3}, {"lr": None, "num_draws": 40, "num_burnin": 20}])
def test_the_bytes_are_the_same_whatever_calls_made_it(tmp_path: Path, options: dict[str, Any]) -> None:
    """A run in one go, and one that is resumed when it is over; pilot chains chose the step size, or not."""
    checkpoint = tmp_path / "run.npz"
    for name, more in (("a", {}), ("b", {"checkpoint": checkpoint}), ("c", {"checkpoint": checkpoint})):
        made = estimate(**options, **more)
        said = attributes(
            [], nbeta=made.nbeta, init_loss=made.init_loss, schedule=made.schedule, settings=made.settings
        )
        variables = layout([], num_chains=3, num_draws=made.schedule.num_draws)
        with SampleStore.create(tmp_path / f"{name}.zarr", variables, said, resume=False) as store:
            save_result(store, made)
            store.complete()
    assert made.diagnostics["resumed_steps"] > 0
    first, *others = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a.zarr", "b.zarr", "c.zarr")
    )
    for other in others:
        assert other.keys() == first.keys()
        assert [str(name) for name, content in other.items() if content != first[name]] == []


def test_an_interrupted_store(tmp_path: Path) -> None:
    """It opens, says how far it is, warns once, and gives λ̂ of the draws that there are."""
    path = tmp_path / "run.zarr"
    make(path, draws=40, save=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = Samples.open(path)
    assert samples.is_partial and samples.draws_done == [40, 40] and "interrupted after 40 to 40" in str(samples)
    with pytest.warns(LLCWarning, match="have made 40, 40 of 60 draws") as record:
        found = samples.losses("text").values
    assert [w.message.code for w in record] == ["partial"]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llc = samples.llc()
    assert np.isnan(found[:, 40:]).all()
    np.testing.assert_array_equal(found[:, :40], losses(PROBES[0])[:, :40])
    draws = NBETA * (result().loss_trace[:, BURNIN : BURNIN + 40] - INIT_LOSS)
    assert llc.is_partial and llc.llc_mean == pytest.approx(draws.mean(), rel=1e-12)
    assert llc.diagnostics["r_hat"] == pytest.approx(r_hat(draws))
    make(path)
    assert not Samples.open(path).is_partial


def test_a_result_that_is_older_than_the_draws(tmp_path: Path) -> None:
    """A run was interrupted, reported, resumed and killed."""
    path = tmp_path / "run.zarr"
    store = make(path, draws=20, save=False)
    with SampleStore.create(path, list(store.variables.values()), store.attributes, resume=True) as store:
        save_result(store, result(steps_done=[BURNIN + 20] * CHAINS))
    with pytest.warns(LLCWarning):
        assert Samples.open(path).llc().loss_trace.shape == (CHAINS, BURNIN + DRAWS)
    make(path, draws=30, save=False)
    with pytest.warns(LLCWarning):
        llc = Samples.open(path).llc()
    assert llc.llc_mean == pytest.approx(NBETA * (result().loss_trace[:, BURNIN : BURNIN + 30] - INIT_LOSS).mean())


# ---- what is refused -----------------------------------------------------------------------------------------


def test_what_is_no_store_of_samples(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("{}")
    zarr.open_group(str(tmp_path / "old.zarr"), mode="w", zarr_format=2)
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w", zarr_format=3)
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(2,), dtype="f4", zarr_format=3)
    later = zarr.open_group(str(tmp_path / "later.zarr"), mode="w", zarr_format=3)
    later.attrs["llc_fast"] = {"format": 99, "version": "9.9"}
    (tmp_path / "torn.zarr").mkdir()
    (tmp_path / "torn.zarr" / "zarr.json").write_text('{"zarr_fo')
    for name, words in (
        ("file", "is a file, and a store is a folder"),
        ("notes", "a folder without zarr.json"),
        ("old.zarr", "a store of Zarr's version 2"),
        ("other.zarr", "but not of samples"),
        ("array.zarr", "is a Zarr array"),
        ("later.zarr", "was written by llc_fast 9.9"),
        ("torn.zarr", "is damaged"),
    ):
        with pytest.raises(ValueError, match=f"path='.*{name}' .*{words}|path='.*{name}' {words}"):
            Samples.open(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        Samples.open(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="path must be that of a store, got int"):
        Samples.open(3)  # type: ignore[arg-type]


def test_names_that_become_the_same() -> None:
    assert [Probe(name, 1).id for name in ("a-b", "2 c", "", "é_1")] == ["a_b", "_2_c", "_", "é_1"]
    with pytest.raises(ValueError, match="probes 'a-b' and 'a b' would both be called 'a_b'"):
        layout([Probe("a-b", 1), Probe("a b", 1)], num_chains=1, num_draws=1)
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float16', got 'int8'"):
        layout([Probe("a", 1)], num_chains=1, num_draws=1, dtype="int8")


@pytest.mark.parametrize("missing", ["zarr", "xarray"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    make(tmp_path / "run.zarr")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{missing} is not installed: pip install "llc_fast\[samples\]"'):
        Samples.open(tmp_path / "run.zarr")


# ---- devinterp 2.0.1 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store that its ``sample`` made, and what its own functions find in it (tests/shared/devinterp2.py)."""
    folder = tmp_path_factory.mktemp("theirs")
    with zipfile.ZipFile(HERE / "data" / "devinterp2.zip") as archive:
        archive.extractall(folder)
    return folder / "devinterp2.zarr", json.loads((HERE / "data" / "devinterp2.json").read_text())


def test_its_store_is_read(theirs: tuple[Path, dict[str, Any]]) -> None:
    """Losses, and with them the covariances and correlations that its compute_bif has."""
    path, expected = theirs
    samples = Samples.open(path)
    assert set(samples.probes) == set(expected["names"]) == {"pile", "back_wards"} and not samples.is_partial
    assert samples.draws_done == [12, 12] and samples.settings["lr"] == 1e-3 and samples.num_samples is None
    for name in samples.probes:
        found = samples.losses(name)
        np.testing.assert_allclose(found.values.mean(axis=(0, 1)), expected["means"][name], rtol=1e-6)
        rows = np.concatenate([v.reshape(-1, v.shape[2]).T for _, v in samples.blocks(name, 3, per="sample")])
        np.testing.assert_allclose(np.cov(rows), expected[f"sequence covariance {name}"], rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(np.corrcoef(rows), expected[f"sequence correlation {name}"], rtol=1e-4, atol=1e-5)
        assert samples.input_ids(name).shape == (found.sizes["sample"], 5)  # type: ignore[union-attr]
        assert samples.init_losses(name) is None


def test_lambda_of_its_store(theirs: tuple[Path, dict[str, Any]]) -> None:
    """Ours leaves out burn-in; with burn-in it is what its compute_llc has. The error includes that of L(w*)."""
    path, expected = theirs
    result = Samples.open(path).llc()
    np.testing.assert_allclose(result.loss_trace, expected["loss_trace"], rtol=1e-6)
    assert result.init_loss == pytest.approx(expected["init_loss"], rel=1e-6) and result.nbeta == 10
    np.testing.assert_allclose(result.excess_trace.mean(axis=1), expected["llc_per_chain"], atol=1e-5)
    assert result.schedule == Schedule(12, 5)
    draws = 10 * (np.array(expected["loss_trace"])[:, 5:] - expected["init_loss"])
    assert result.llc_mean == pytest.approx(draws.mean(), abs=1e-5)
    np.testing.assert_allclose(result.llc_per_chain, draws.mean(axis=1), atol=1e-5)
    assert result.diagnostics["r_hat"] == pytest.approx(r_hat(draws), rel=1e-5)
    minibatches = zarr.open_group(str(path), mode="r")["sampling_loss"][:].mean(axis=3)
    spread = math.sqrt(minibatches.var(axis=2, ddof=1).mean() / 16)  # 4 batches of 4
    assert result.diagnostics["init_loss_stderr"] == pytest.approx(spread, rel=1e-5)
    assert [w.code for w in result.warnings] == ["ess"]


@pytest.mark.parametrize("between", [1, 3, 9])
def test_its_draws_are_the_first_of_stretches(
    theirs: tuple[Path, dict[str, Any]], tmp_path: Path, between: int
) -> None:
    """Of 5 steps of burn-in and some between draws; where that is too short for a shorter burn-in, draws alone."""
    made = Samples.open(theirs[0])
    steps = 5 + 12 * between
    trace = np.random.default_rng(0).normal(size=(2, steps, 4, 4)).astype(np.float32)
    draws = trace[:, 5::between]
    attrs = json.loads(json.dumps(made.dataset.attrs))
    attrs["metadata"]["config"]["sampler"]["num_steps_bw_draws"] = between
    dims = {"sampling_loss": ("chain", "draw", "b", "t"), "sampling_loss_micro": ("chain", "step", "b", "t")}
    values = {"sampling_loss": draws, "sampling_loss_micro": trace}
    data = xarray.Dataset(
        {n: (dims[n], v) for n, v in values.items()} | {"init_loss": ("chain", [0.0, 0.0])}, attrs=attrs
    )
    result = Samples(data).llc()
    np.testing.assert_allclose(result.llc_trace, 10 * draws.mean(axis=(2, 3)), atol=1e-5)
    assert result.schedule.num_burnin == {1: 5, 3: 3, 9: 0}[between]


@pytest.mark.parametrize("completed", [True, False])
def test_its_store_with_a_chain_that_ended_early(theirs: tuple[Path, dict[str, Any]], completed: bool) -> None:
    """It diverged if the run is over: λ̂ is that of the other one. Else the run was interrupted."""
    data = xarray.open_dataset(theirs[0], engine="zarr", consolidated=False).load()
    for name, gone in (("sampling_loss", 7), ("loss_pile", 7), ("loss_back_wards", 6), ("sampling_loss_micro", 12)):
        data[name][1, gone:] = np.nan
    if not completed:
        del data.attrs["completed"]
    samples = Samples(data)
    draws = 10 * (np.array(theirs[1]["loss_trace"])[:, 5:] - theirs[1]["init_loss"])
    assert samples.draws_done == [12, 6] and samples.is_partial is not completed
    if completed:
        result = samples.llc()
        assert result.diverged_chains == [1] and result.llc_mean == pytest.approx(draws[0].mean(), abs=1e-5)
        assert "diverged" in [w.code for w in result.warnings]
    else:
        with pytest.warns(LLCWarning, match="have made 12, 6 of 12 draws"):
            result = samples.llc()
        assert result.steps_done == [17, 11] and not result.diverged_chains
        np.testing.assert_allclose(result.llc_per_chain, [draws[0].mean(), draws[1, :6].mean()], atol=1e-5)


def test_ours_has_its_layout(theirs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Names, dimensions, dtypes, fill values, codecs and attributes of what its functions read; sampler settings."""
    probes = (Probe("pile", 8, 4), Probe("back wards", 4, 4))
    make(tmp_path / "run.zarr", probes)

    def described(path: Path) -> dict[str, Any]:
        found = json.loads((path / "zarr.json").read_text())
        kept = (
            "dimension_names",
            "data_type",
            "fill_value",
            "codecs",
            "attributes",
            "chunk_key_encoding",
            "zarr_format",
        )
        return {name: found[name] for name in kept}

    for name in ("init_loss", "sampling_loss_micro", "loss_pile", "loss_back_wards", "input_ids_pile"):
        ours = described(tmp_path / "run.zarr" / name)
        assert ours == described(theirs[0] / name), name
    ours, expected = (
        json.loads((p / "zarr.json").read_text())["attributes"] for p in (tmp_path / "run.zarr", theirs[0])
    )
    assert ours["metadata"]["config"]["sampler"].keys() == expected["metadata"]["config"]["sampler"].keys()
    ids = [[entry["obs_id"] for entry in a["metadata"]["config"]["observables"]] for a in (ours, expected)]
    assert ids[0] == ids[1] and ours["completed"] == expected["completed"] == 1


def test_losses_of_steps_take_no_place(tmp_path: Path) -> None:
    """One number a step, though the array has as many as there are tokens: the rest is NaN, which no chunk holds."""
    make(tmp_path / "run.zarr", (Probe("a", 2, 1000),))
    files = [path for path in (tmp_path / "run.zarr" / "sampling_loss_micro").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * CHAINS * (BURNIN + DRAWS) + 2000


def _devinterp2() -> str | None:
    """The folder that has it; empty if it is installed."""
    if folder := os.environ.get("LLC_FAST_DEVINTERP2"):
        return folder
    try:
        return "" if int(importlib.metadata.version("devinterp").partition(".")[0]) >= 2 else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _its_numbers(path: Path) -> dict[str, Any]:
    folder = _devinterp2()
    if folder is None:
        pytest.skip("devinterp 2 is not installed: LLC_FAST_DEVINTERP2=FOLDER, pip install --target FOLDER devinterp")
    beside = [str(Path(llc_fast.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, str(HERE / "shared" / "devinterp2.py"), "read", str(path)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([folder, *beside] if folder else beside), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_its_functions_read_ours(tmp_path: Path) -> None:
    """λ̂ over all steps, covariances and correlations of sequences and tokens, susceptibilities."""
    make(tmp_path / "run.zarr")
    found = _its_numbers(tmp_path / "run.zarr")
    trace = result().loss_trace
    np.testing.assert_allclose(found["llc_per_chain"], NBETA * (trace.mean(axis=1) - INIT_LOSS), atol=1e-5)
    np.testing.assert_allclose(found["loss_trace"], trace, rtol=1e-6)
    assert found["init_loss"] == pytest.approx(INIT_LOSS)
    for probe in PROBES:
        values = losses(probe).astype(np.float64)
        rows = values.mean(axis=3).reshape(-1, probe.num_samples).T
        np.testing.assert_allclose(found[f"sequence covariance {probe.id}"], np.cov(rows), atol=1e-5)
        np.testing.assert_allclose(found[f"sequence correlation {probe.id}"], np.corrcoef(rows), atol=1e-5)
    tokens = losses(PROBES[1]).astype(np.float64).reshape(-1, 5 * LENGTH).T
    expected = np.cov(tokens).reshape(5, LENGTH, 5, LENGTH).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found["token covariance my_code"], expected, atol=1e-5)
    # Of the same chains in the place of restricted ones: −Cov(φ, ℓ − L̄) for the second probe, φ of the first's losses.
    names = found["names"]
    first, second = (losses(next(p for p in PROBES if p.id == name)).astype(np.float64) for name in names)
    mean = first.mean(axis=(2, 3))
    phi = mean - INIT_LOSS
    chi = (phi * mean).mean() - (phi[:, :, None, None] * second).mean(axis=(0, 1))
    chi = chi - phi.mean() * (mean.mean() - second.mean(axis=(0, 1)))
    np.testing.assert_allclose(np.ravel(found["susceptibilities"]), chi.ravel(), atol=1e-5)


def test_the_kept_numbers_are_its(theirs: tuple[Path, dict[str, Any]]) -> None:
    found, expected = _its_numbers(theirs[0]), theirs[1]
    assert found.keys() == expected.keys()
    for name in ("llc_per_chain", "loss_trace", "susceptibilities", "sequence covariance pile"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


# ---- λ̂ of the same model by devinterp's chains and by ours --------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
def test_its_chains_and_ours_agree() -> None:
    """λ̂ over all steps, as its compute_llc has it, and after burn-in: within two standard errors of the difference.

    256 chains each, whose means are independent: the standard errors are those of their spread. Its numbers are kept,
    see tests/shared/devinterp_llc.py. Both seeds were fixed before either's numbers were seen.
    """
    kept = json.loads((HERE / "data" / "devinterp_llc.json").read_text())
    ids = torch.tensor(kept["input_ids"])
    weights = {name: torch.tensor(w) for name, w in kept["weights"].items()}
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 8))
    model.load_state_dict(weights)
    settings = kept["settings"] | {"seed": 11}
    found = llc_fast.sample(model, ids, "next-token", probes={"one": ids[:4]}, progress=False, **settings).llc()
    assert found.init_loss == pytest.approx(kept["init_loss"], rel=1e-6)
    steps = {"all steps": found.loss_trace, "draws": found.loss_trace[:, kept["settings"]["num_burnin"] :]}
    for name, losses_of_steps in steps.items():
        ours = found.nbeta * (losses_of_steps.mean(axis=1) - found.init_loss)
        (mean, error), (its_mean, its_error) = (
            (np.mean(chains), np.std(chains, ddof=1) / math.sqrt(len(chains))) for chains in (ours, kept[name])
        )
        assert error < 0.05 * mean and its_error < 0.05 * its_mean  # else anything would agree
        assert abs(mean - its_mean) < 2 * math.hypot(error, its_error), (name, mean, error, its_mean, its_error)
