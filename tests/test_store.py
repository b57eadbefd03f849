"""What is written is what was given, at any moment and after any interruption."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llc_fast import store as store_module
from llc_fast.store import SampleStore, Variable, chunks_of, read_attributes

zarr = pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
xarray = pytest.importorskip("xarray")

CHAINS, DRAWS, SAMPLES, TOKENS = 2, 120, 3, 4
ATTRIBUTES = {"llc_fast": {"version": "1", "settings": {"lr": 1e-3, "seed": 0}}, "metadata": {"config": {}}}


def variables(dtype: str = "float32") -> list[Variable]:
    return [
        Variable(
            "loss_text", ("chain", "draw", "batch_text", "token_pos"), (CHAINS, DRAWS, SAMPLES, TOKENS), dtype, True
        ),
        Variable("draw_loss", ("chain", "draw"), (CHAINS, DRAWS), "float64", True),
        Variable("speed", ("chain", "step", "part"), (CHAINS, 70, 2), "float32", True),
        Variable("input_ids_text", ("batch_text", "token"), (SAMPLES, TOKENS + 1), "int64", False),
        Variable("init_loss", ("chain", "token_pos"), (CHAINS, TOKENS), "float32", False),
    ]


def values(chain: int, draw: int) -> torch.Tensor:
    """Of float16's accuracy: 11 bits."""
    return (chain + 1) * (torch.arange(SAMPLES * TOKENS).reshape(SAMPLES, TOKENS) + draw / 8)


def fill(store: SampleStore, chains: range = range(CHAINS), first: int = 0, last: int = DRAWS) -> None:
    for draw in range(first, last):
        for chain in chains:
            store.write("loss_text", chain, draw, values(chain, draw))
            store.write("draw_loss", chain, draw, chain + draw / 3)


def expected() -> np.ndarray[Any, Any]:
    return np.stack([np.stack([values(chain, draw).numpy() for draw in range(DRAWS)]) for chain in range(CHAINS)])


def same_files(a: Path, b: Path) -> bool:
    """All files of two folders, byte by byte."""
    names = {path.relative_to(a) for path in a.rglob("*")}
    assert names == {path.relative_to(b) for path in b.rglob("*")}
    return all((a / n).is_dir() or filecmp.cmp(a / n, b / n, shallow=False) for n in names)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A store that was never interrupted."""
    path = tmp_path / "whole.zarr"
    with SampleStore.create(path, variables(), ATTRIBUTES, resume=False) as store:
        store.write_fixed("input_ids_text", np.arange(SAMPLES * (TOKENS + 1)).reshape(SAMPLES, -1))
        fill(store)
        store.complete()
    return path


# ---- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_are_those_given(tmp_path: Path, dtype: str) -> None:
    """By plain zarr and by plain xarray; dimensions, dtypes, fill values and codecs as devinterp 2 has them."""
    path = tmp_path / "run.zarr"
    ids, init = torch.arange(15).reshape(SAMPLES, -1), np.arange(8.0).reshape(CHAINS, TOKENS)
    with SampleStore.create(path, variables(dtype), ATTRIBUTES, resume=False) as store:
        store.write_fixed("input_ids_text", ids)
        store.write_fixed("init_loss", init)
        fill(store)
        for step in range(70):
            store.write("speed", 1, step, np.array([step, -step]))
        store.complete()
    group = zarr.open_group(str(path), mode="r")
    assert group.attrs.asdict() == {**ATTRIBUTES, "completed": 1}
    np.testing.assert_array_equal(group["loss_text"][:], expected().astype(dtype))
    np.testing.assert_array_equal(group["init_loss"][:], init)
    array = group["loss_text"]
    assert array.chunks == (1, 50, SAMPLES, TOKENS) and np.isnan(array.fill_value) and array.dtype == dtype
    assert [type(codec).__name__ for codec in array.metadata.codecs] == ["BytesCodec", "ZstdCodec"]
    assert array.attrs["_FillValue"] == "AAAAAAAA+H8="
    with xarray.open_datatree(path, engine="zarr", consolidated=False) as tree:
        found = tree.dataset
        assert found.loss_text.dims == ("chain", "draw", "batch_text", "token_pos") and found.loss_text.dtype == dtype
        np.testing.assert_array_equal(found.loss_text.values, expected().astype(dtype))
        np.testing.assert_array_equal(found.draw_loss.values[1], 1 + np.arange(DRAWS) / 3)
        np.testing.assert_array_equal(found.input_ids_text.values, ids.numpy())
        np.testing.assert_array_equal(found.speed.values[1, :, 1], -np.arange(70))
        assert np.isnan(found.speed.values[0]).all() and found.input_ids_text.dtype == np.int64
        np.testing.assert_array_equal(found.draws_done.values, [DRAWS, DRAWS])


def test_chunks_are_those_that_zarr_writes(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte: full ones, the last one, and those that are split along samples."""
    for size in (store_module.CHUNK_BYTES, 50 * 2 * TOKENS * 4):
        monkeypatch.setattr(store_module, "CHUNK_BYTES", size)
        paths = [tmp_path / f"{size}.zarr", tmp_path / f"{size} of zarr.zarr"]
        for path, write in zip(paths, (store_module._write_chunk, lambda *_: None), strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(store_module, "_write_chunk", write)
                with SampleStore.create(path, variables(), ATTRIBUTES, resume=False) as store:
                    fill(store)
                    store.write("speed", 0, 3, np.zeros(2))
                    store.write("speed", 1, 3, np.full(2, np.nan))
        assert same_files(*paths)


def test_what_is_given_may_be_overwritten(tmp_path: Path) -> None:
    """A chain goes on in the same memory."""
    with SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False) as store:
        memory = torch.empty(SAMPLES, TOKENS)
        for draw in range(DRAWS):
            memory.copy_(values(0, draw))
            store.write("loss_text", 0, draw, memory)
            memory.fill_(-1)
    np.testing.assert_array_equal(zarr.open_group(str(store.path), mode="r")["loss_text"][0], expected()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_tensors_of_any_dtype(dtype: torch.dtype) -> None:
    with SampleStore.create(None, variables(), ATTRIBUTES, resume=False) as store:
        store.write(
            "loss_text", 0, 0, torch.full((SAMPLES, TOKENS), 3, dtype=dtype).requires_grad_(dtype.is_floating_point)
        )
        store.sync()
        assert store._open["loss_text"][0, 0].tolist() == [[3.0] * TOKENS] * SAMPLES


def test_in_memory() -> None:
    with SampleStore.create(None, variables(), ATTRIBUTES, resume=True) as store:
        fill(store)
        store.complete()
        assert store.is_completed and store.draws_done(1) == DRAWS and store.path is None
    with xarray.open_dataset(store.arrays, engine="zarr", consolidated=False, chunks=None) as found:
        np.testing.assert_array_equal(found.loss_text.values, expected())


def test_chunks_keep_to_their_bounds() -> None:
    """One chain, at most 50 draws; the open chunks of all chains within the bound; split along samples."""
    mib = 2**20

    def of(chains: int, draws: int, samples: int, tokens: int) -> tuple[int, ...]:
        dims = ("chain", "draw", "sample", "token")
        return chunks_of([Variable("x", dims, (chains, draws, samples, tokens), "float32", True)])["x"]

    assert of(4, 1000, 10, 16) == (1, 50, 10, 16)
    assert of(4, 30, 10, 16) == (1, 30, 10, 16)
    assert of(4, 1000, 1024, 256) == (1, 8, 512, 256)  # of 1 MiB a draw: 4 × 8 of them are 32 MiB; 4 MiB a chunk
    assert of(8, 1000, 4096, 4096) == (1, 1, 256, 4096)
    assert of(2, 9, 1, 4 * mib) == (1, 1, 1, 4 * mib)
    assert of(2, 9, 0, 5) == (1, 9, 1, 5)


def test_a_chunk_that_is_split_along_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 50 * 2 * TOKENS * 4)
    path = tmp_path / "run.zarr"
    for first, last in ((0, 70), (60, DRAWS)):  # with an interruption, too
        with SampleStore.create(path, variables(), ATTRIBUTES, resume=True) as store:
            fill(store, first=first, last=last)
    group = zarr.open_group(str(path), mode="r")
    assert group["loss_text"].chunks == (1, 50, 2, TOKENS)
    np.testing.assert_array_equal(group["loss_text"][:], expected())


def test_threads_write_at_once(tmp_path: Path, whole: Path) -> None:
    """As the chains of a run do."""
    with SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False) as store:
        store.write_fixed("input_ids_text", np.arange(SAMPLES * (TOKENS + 1)).reshape(SAMPLES, -1))
        threads = [threading.Thread(target=fill, args=(store, range(c, c + 1))) for c in range(CHAINS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.complete()
    assert same_files(tmp_path / "run.zarr", whole)


def test_syncs_of_one_thread_while_others_write(tmp_path: Path, whole: Path) -> None:
    """What is on disk at any moment is what was written, as far as it is said to be done."""
    with SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False) as store:
        store.write_fixed("input_ids_text", np.arange(SAMPLES * (TOKENS + 1)).reshape(SAMPLES, -1))
        threads = [threading.Thread(target=fill, args=(store, range(c, c + 1))) for c in range(CHAINS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            store.sync()
            found = zarr.open_group(str(store.path), mode="r")["loss_text"]
            for chain in range(CHAINS):
                done = store.draws_done(chain)
                np.testing.assert_array_equal(found[chain, :done], expected()[chain, :done])
        store.complete()
    assert same_files(tmp_path / "run.zarr", whole)


def test_a_chain_goes_on_while_another_one_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next chunk is begun in the middle of it."""
    copy, begun = store_module._Buffer.copy, []
    with SampleStore.create(None, variables(), ATTRIBUTES, resume=False) as store:
        fill(store, range(1), last=20)

        def slow(buffer: Any) -> Any:
            if not begun:
                begun.append(threading.Thread(target=fill, args=(store, range(1, 2), 0, 20)))
                begun[0].start()
                begun[0].join()
            return copy(buffer)

        monkeypatch.setattr(store_module._Buffer, "copy", slow)
        store.sync(0)
        assert begun and store.draws_done(0) == 20
        store.sync()
        assert store.draws_done(1) == 20


@pytest.mark.parametrize("full", [False, True])
def test_ctrl_c_while_a_draw_waits_loses_nothing(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """The queue is full when a chunk is, or when a draw of the next one comes."""
    with SampleStore.create(None, variables(), ATTRIBUTES, resume=False) as store:
        fill(store, last=49)
        put = store._put

        def interrupted(item: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store, "_put", interrupted)
            if full:
                with pytest.raises(KeyboardInterrupt):
                    store.write("loss_text", 0, 49, values(0, 49))
                store._put = put  # type: ignore[method-assign]
                store.write("draw_loss", 0, 49, 49 / 3)
            else:
                with pytest.raises(KeyboardInterrupt):
                    store.write("loss_text", 0, 51, values(0, 51))
        store.sync()
        done = store.draws_done(0)
        assert done == (50 if full else 49)
        np.testing.assert_array_equal(store._open["loss_text"][0, :done], expected()[0, :done])


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_in_order(tmp_path: Path) -> None:
    """What the stream does to the tensor afterwards is not seen."""
    with SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False) as store:
        memory = torch.empty(SAMPLES, TOKENS, device="cuda")
        for draw in range(DRAWS):
            memory.copy_(values(0, draw), non_blocking=True)
            store.write("loss_text", 0, draw, memory)
            memory.fill_(-1)
    np.testing.assert_array_equal(zarr.open_group(str(store.path), mode="r")["loss_text"][0], expected()[0])


# ---- interruptions -------------------------------------------------------------------------------------------


def test_sync_writes_what_is_there(tmp_path: Path) -> None:
    """Of one chain, chunks that are not full too; NaN follows."""
    store = SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False)
    fill(store, last=57)
    store.sync(1)
    found = zarr.open_group(str(store.path), mode="r")
    np.testing.assert_array_equal(found["loss_text"][1, :57], expected()[1, :57])
    assert np.isnan(found["loss_text"][1, 57:]).all() and np.isnan(found["loss_text"][0, 50:]).all()
    assert store.draws_done(0) in (0, 50) and store.draws_done(1) == 57  # that of others is written now and then
    assert [store.draws_done(chain) for chain in range(CHAINS)] == found["draws_done"][:].tolist()
    store.close()
    assert store.draws_done(0) == 57 and "completed" not in read_attributes(tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="closed"):
        store.write("draw_loss", 0, 57, 1.0)


def test_a_draw_is_done_when_all_its_variables_are(tmp_path: Path) -> None:
    with SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False) as store:
        fill(store, last=20)
        store.write("draw_loss", 0, 20, 1.0)
        store.sync()
        assert store.draws_done(0) == 20


def test_draws_that_are_made_again_do_not_lose_later_ones(tmp_path: Path, whole: Path) -> None:
    """A checkpoint is older than the store: draws 57 to 69 lie on disk when 30 is made again, and it stops at 40."""
    path = tmp_path / "run.zarr"
    for first, last, done in ((0, 70, 70), (30, 40, 70), (40, 55, 70), (55, DRAWS, DRAWS)):
        with SampleStore.create(path, variables(), ATTRIBUTES, resume=True) as store:
            store.write_fixed("input_ids_text", np.arange(SAMPLES * (TOKENS + 1)).reshape(SAMPLES, -1))
            fill(store, first=first, last=last)
        assert store.draws_done(0) == store.draws_done(1) == done
        found = zarr.open_group(str(path), mode="r")["loss_text"][:]
        np.testing.assert_array_equal(found[:, :done], expected()[:, :done])
    with SampleStore.create(path, variables(), ATTRIBUTES, resume=True) as store:
        store.complete()
    assert same_files(path, whole)


HEAD = """
import json, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import test_store as t
from llc_fast.store import SampleStore
path = Path(sys.argv[1])
"""
KILLED = """
import random
checkpoint, moments, rounds = path.with_suffix(".json"), random.Random(int(sys.argv[2])), int(sys.argv[3])

def part():
    store = SampleStore.create(path, t.variables(), t.ATTRIBUTES, resume=True)
    store.write_fixed("input_ids_text", t.np.arange(15).reshape(3, -1))
    done = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
    assert min(store.draws_done(c) for c in range(t.CHAINS)) >= done
    for draw in range(done, t.DRAWS):
        t.fill(store, first=draw, last=draw + 1)
        if draw % 7 == 0:
            store.sync()
            (new := path.with_suffix(".new")).write_text(str(draw + 1))
            new.replace(checkpoint)
    store.complete()
    store.close()

def in_a_child(seconds):
    if not (child := os.fork()):
        part()
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # if it is done, it is still there to be waited for
    return os.waitpid(child, 0)[1]

ends = [in_a_child(moments.uniform(0.001, 0.12)) for _ in range(rounds)]
print(json.dumps([os.waitstatus_to_exitcode(end) for end in ends]))
assert in_a_child(0) == 0
"""


def run(tmp_path: Path, body: str, *arguments: object) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + body)
    return subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_at_any_moment(tmp_path: Path, whole: Path, seed: int) -> None:
    """It goes on from its checkpoint, and ends with the same files as if it had never been killed."""
    process = run(tmp_path, KILLED, tmp_path / "run.zarr", seed, 20 if seed == 1 else 300)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    ends = json.loads(out.splitlines()[-1])
    assert set(ends) <= {0, -signal.SIGKILL} and ends.count(-signal.SIGKILL) >= 5
    assert same_files(tmp_path / "run.zarr", whole)


@pytest.mark.parametrize("where", ["loss_text/c/0/0/0", "draws_done/c", "loss_text", ""])
def test_what_a_killed_writer_left_is_removed(tmp_path: Path, whole: Path, where: str) -> None:
    """By the run that goes on; a file that is not ours stays."""
    path = tmp_path / "run.zarr"
    shutil.copytree(whole, path)
    target = next(p for p in (path / where).iterdir() if p.is_file())
    left = target.with_name(store_module.partial_name(target))
    left.write_bytes(b"half")
    SampleStore.create(path, variables(), ATTRIBUTES, resume=True).close()
    assert not left.exists() and same_files(path, whole)
    theirs = target.with_name(".llc_fast-notes.partial")
    theirs.touch()
    SampleStore.create(path, variables(), ATTRIBUTES, resume=True).close()
    assert theirs.exists()


def test_a_store_that_was_never_made_whole_is_none(tmp_path: Path) -> None:
    """A process that was killed while it made one leaves a folder beside, which the next one removes."""
    path = tmp_path / "run.zarr"
    left = path.with_name(store_module.partial_name(path))
    (left / "loss_text").mkdir(parents=True)
    other = path.with_name(store_module.partial_name(tmp_path / "another.zarr"))
    other.mkdir()
    SampleStore.create(path, variables(), ATTRIBUTES, resume=False).close()
    assert not left.exists() and other.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, path.name])


# ---- processes -----------------------------------------------------------------------------------------------

RANK = """
rank = int(sys.argv[2])
if rank == 0:
    time.sleep(0.3)  # the other one waits
    store = SampleStore.create(path, t.variables(), t.ATTRIBUTES, resume=False)
    store.write_fixed("input_ids_text", t.np.arange(15).reshape(3, -1))
else:
    store = SampleStore.join(path, t.variables(), t.ATTRIBUTES)
t.fill(store, range(rank, rank + 1))
store.close()
"""


def test_processes_write_their_own_chains(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "run.zarr"
    processes = [run(tmp_path, RANK, path, rank) for rank in range(2)]
    for process in processes:
        assert process.wait(60) == 0, process.communicate()[1]
    with SampleStore.create(path, variables(), ATTRIBUTES, resume=True) as store:
        assert [store.draws_done(chain) for chain in range(CHAINS)] == [DRAWS, DRAWS]
        store.complete()
    assert same_files(path, whole)


def test_who_comes_first_makes_it(tmp_path: Path) -> None:
    """Several threads at once, as several processes do; one of them makes it, all open it, and nothing is left."""
    for round_ in range(10):
        path, found = tmp_path / f"{round_}.zarr", []

        def work(path: Path = path, found: list[SampleStore] = found) -> None:
            found.append(SampleStore.create(path, variables(), ATTRIBUTES, resume=True))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and len(os.listdir(tmp_path)) == round_ + 1
        for store in found:
            store.close()


def test_a_store_that_nobody_makes(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did not appear within 0\.1 s"):
        SampleStore.join(tmp_path / "run.zarr", variables(), ATTRIBUTES, patience=0.1)


# ---- errors --------------------------------------------------------------------------------------------------


def test_another_run_is_refused(tmp_path: Path) -> None:
    """What differs is named, and nothing is touched."""
    path = tmp_path / "run.zarr"
    SampleStore.create(path, variables(), ATTRIBUTES, resume=False).close()
    before = tmp_path / "before"
    shutil.copytree(path, before)
    other = {**ATTRIBUTES, "llc_fast": {"version": "1", "settings": {"lr": 2e-3, "seed": 0}}}
    with pytest.raises(ValueError, match=r"another run: llc_fast.settings.lr was 0.001, is 0.002. Give another path"):
        SampleStore.create(path, variables(), other, resume=True)
    with pytest.raises(ValueError, match=r"array loss_text was float32\[chain 2, .*is float16\[chain 2, draw 120"):
        SampleStore.create(path, variables("float16"), ATTRIBUTES, resume=True)
    with pytest.raises(ValueError, match=r"exists: give another path, or delete it"):
        SampleStore.create(path, variables(), ATTRIBUTES, resume=False)
    with pytest.raises(ValueError, match="another run"):
        SampleStore.join(path, variables(), other)
    assert same_files(path, before)


def test_attributes_may_have_nan_and_any_order(tmp_path: Path) -> None:
    """JSON has no NaN; a dictionary's order says nothing."""
    path = tmp_path / "run.zarr"
    SampleStore.create(path, variables(), {"b": float("nan"), "a": (1, 2)}, resume=False).close()
    SampleStore.create(path, variables(), {"a": [1, 2], "b": float("nan")}, resume=True).close()
    assert json.loads((path / "zarr.json").read_text())["attributes"] == {"a": [1, 2], "b": None}


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """And left as it is."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file.zarr").write_text("mine")
    zarr.open_group(str(tmp_path / "old.zarr"), mode="w", zarr_format=2)
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w", zarr_format=3)
    for name, words in (
        ("notes", "without zarr.json"),
        ("file.zarr", "is a file"),
        ("old.zarr", "version 2"),
        ("other.zarr", "not written by llc_fast"),
        ("nowhere/run.zarr", "the folder .*nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            SampleStore.create(tmp_path / name, variables(), ATTRIBUTES, resume=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file.zarr").read_text() == "mine"
    with pytest.raises(TypeError, match="store must be the path of a folder"):
        SampleStore.create(3, variables(), ATTRIBUTES, resume=True)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    SampleStore.create(tmp_path / "empty", variables(), ATTRIBUTES, resume=False).close()


def test_arguments_are_checked() -> None:
    with SampleStore.create(None, variables(), ATTRIBUTES, resume=False) as store:
        for name, chain, draw, given, words in (
            ("loss_txt", 0, 0, values(0, 0), "name must be a variable that is written draw by draw, got 'loss_txt'"),
            ("init_loss", 0, 0, values(0, 0), "use one of draw_loss, loss_text, speed"),
            ("loss_text", CHAINS, 0, values(0, 0), "chain of 'loss_text' must be in 0 to 1, got 2"),
            ("loss_text", 0, DRAWS, values(0, 0), "draw of 'loss_text' must be in 0 to 119, got 120"),
            ("loss_text", 0, 0, values(0, 0)[:2], r"must have the shape \(3, 4\), got \(2, 4\)"),
            ("draw_loss", 0, 0, torch.ones(1), r"must have the shape \(\), got \(1,\)"),
        ):
            with pytest.raises(ValueError, match=words):
                store.write(name, chain, draw, given)
        with pytest.raises(ValueError, match=r"must have the shape \(2, 4\)"):
            store.write_fixed("init_loss", np.zeros(3))
    for options, words in (
        ({"dims": ("draw", "chain")}, "must begin with chain and draw"),
        ({"dims": ("chain",)}, "give a name each"),
        ({"dtype": "object"}, "use one of float16"),
        ({"name": "a/b"}, "name must be"),
    ):
        with pytest.raises(ValueError, match=words):
            Variable(
                **{"name": "a", "dims": ("chain", "draw"), "shape": (1, 1), "dtype": "float32", "per_draw": True}
                | options
            )
    with pytest.raises(ValueError, match="names of their own"):
        SampleStore.create(None, [*variables(), *variables()], ATTRIBUTES, resume=False)


def test_a_full_disk_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """At the next write or sync, with the path and the remedy; and the same call resumes when there is room again."""
    path = tmp_path / "run.zarr"
    store = SampleStore.create(path, variables(), ATTRIBUTES, resume=False)
    store.write_fixed("input_ids_text", np.arange(SAMPLES * (TOKENS + 1)).reshape(SAMPLES, -1))
    fill(store, last=55)
    store.sync()

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "atomic_write", full)
        fill(store, first=55, last=60)
        for _ in range(2):
            with pytest.raises(
                OSError, match=r"run.zarr' can't be written: No space left on device. Make room"
            ) as found:
                store.sync()
            assert found.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left"):
            fill(store, first=60)
        with pytest.raises(OSError, match="No space left"):
            store.write_fixed("input_ids_text", np.ones((SAMPLES, TOKENS + 1)))
        with pytest.raises(OSError, match="No space left"):
            store.close()
    assert not store._thread.is_alive() and store.draws_done(0) == 55
    with SampleStore.create(path, variables(), ATTRIBUTES, resume=True) as store:
        fill(store, first=55)
        store.complete()
    assert same_files(path, whole)


def test_writers_do_not_wait_for_ever_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is full, and the thread fails."""
    monkeypatch.setattr(store_module, "QUEUE_BYTES", 100)
    store = SampleStore.create(tmp_path / "run.zarr", variables(), ATTRIBUTES, resume=False)
    shutil.rmtree(store.path / "loss_text")  # type: ignore[operator]
    (store.path / "loss_text").touch()  # type: ignore[operator]
    with pytest.raises(OSError, match="can't be written"):
        fill(store)
        store.sync()
    with pytest.raises(OSError):
        store.close()


def test_an_error_within_is_not_hidden(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError, match="mine"),
        SampleStore.create(None, variables(), ATTRIBUTES, resume=False) as store,
    ):
        store.write("draw_loss", 0, 0, 1.0)
        raise KeyError("mine")
    assert not store._thread.is_alive() and store.draws_done(0) == 0


@pytest.mark.parametrize("version", [None, "2.18.3"])
def test_without_zarr_3(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    if version:
        old = type(sys)("zarr")
        old.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "zarr", old)
    with pytest.raises(ModuleNotFoundError, match=r'needs zarr 3.*pip install "llc_fast\[samples\]"'):
        SampleStore.create(None, variables(), ATTRIBUTES, resume=False)


# ---- memory --------------------------------------------------------------------------------------------------

MUCH = """
sys.path.insert(0, sys.argv[2])
from harness import peak_memory
import numpy as np
chains, draws, samples, tokens = 4, int(sys.argv[3]), 512, 256
V = t.Variable
losses = V("loss_a", ("chain", "draw", "batch_a", "token"), (chains, draws, samples, tokens), "float32", True)
store = SampleStore.create(path, [losses], {}, resume=False)
values = t.torch.randn(samples, tokens)
store.write("loss_a", 0, 0, values); store.sync()
before = peak_memory(reset=True)
for draw in range(draws):
    for chain in range(chains):
        store.write("loss_a", chain, draw, values.add_(0.5))
store.complete(); store.close()
print(json.dumps([before, peak_memory()]))
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """1.5 GiB of incompressible numbers grow the resident set by 128 MiB at most."""
    speed = Path(__file__).parents[1] / "benchmarks" / "speed"
    process = run(tmp_path, MUCH, tmp_path / "run.zarr", speed, 768)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    before, after = json.loads(out.splitlines()[-1])
    written = sum(path.stat().st_size for path in (tmp_path / "run.zarr").rglob("*") if path.is_file())
    assert written > 2**30
    assert after - before <= 128 * 2**20, f"{(after - before) / 2**20:.0f} MiB"
