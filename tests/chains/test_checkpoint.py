"""Checkpoints: what they keep, what they resume to, what they refuse, and what a full disk does to them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Script, assert_same, codes, data, estimate, happened, initialized, interrupted_after, mlp, mse, no_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from llc_fast.chains.checkpoint import Checkpoint, Saved, compare, read, write
from llc_fast.chains.draw import Draw
from llc_fast.chains.run import Monitor, after_each_step
from llc_fast.data import IndexedSource
from llc_fast.objective.objective import data_identity
from llc_fast.result import LLCResult
from llc_fast.support.files import atomic_write, partial_name
from llc_fast.support.fingerprint import digest
from llc_fast.traces import Traces


class _Noisy(Dataset[Any]):
    """Samples with fresh noise each time, as augmentation gives them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x[index] + 0.1 * torch.randn(3), y[index]


def _in_training(dtype: torch.dtype = torch.float32, dropout: float = 0.3) -> nn.Module:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1)
    return initialized(nn.Sequential(*layers).to(dtype).train())


def _per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(dim=1)


def _first_layer(draw: Draw) -> Tensor:
    return draw.params["0.weight"]


_OBSERVABLES: dict[str, Any] = {
    "weights": _first_layer,
    "λ̂ of the batch / 1": lambda draw: draw.loss,
    "weights.npy": lambda draw: draw.loss + 1,  # an archive takes it for the first
    "samples": lambda draw: draw.sample_losses,
    "inputs": lambda draw: draw.batch[0].sum(),
}
_MASK = {"0.*": True, "2.weight": torch.tensor([True, False, True, False])}
# What `estimate` is given, made anew for each run as another process would.
_RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "sgld": lambda: {},
    "sgld, lr chosen": lambda: {"lr": None},
    "sgld, several steps between draws": lambda: {"num_steps_bw_draws": 3, "num_draws": 3},
    "sgld, box and decay": lambda: {"sampler_options": {"bounding_box_size": 0.02, "weight_decay": 0.5}},
    "sgld, gradients released": lambda: {"strategy": "sequential", "release_gradients": True},
    "sgld, microbatches": lambda: {"microbatch_size": 4},
    "sgld, masks": lambda: {"params": _MASK},
    "sgld, full batch": lambda: {"batch_size": 40},
    "sgld, float64": lambda: {"model": mlp(torch.float64), "data": data(dtype=torch.float64)},
    "sgld, bfloat16": lambda: {"model": mlp(torch.bfloat16), "data": data(dtype=torch.bfloat16), "lr": 1e-2},
    "sgld, autocast": lambda: {"autocast": torch.bfloat16},
    "sgld, dropout": lambda: {"model": _in_training()},
    "sgld, batch norm": lambda: {"model": _in_training(dropout=0.0)},
    "sgld, bfloat16 batch norm": lambda: {
        "model": _in_training(torch.bfloat16),
        "data": data(dtype=torch.bfloat16),
        "lr": 1e-2,
    },
    "sgld, observables": lambda: {"loss_fn": _per_sample, "observables": _OBSERVABLES},
    "sgld, observables of dropout": lambda: {"model": _in_training(), "observables": {"weights": _first_layer}},
    "sgld, a data set": lambda: {"data": TensorDataset(*data())},
    "sgld, augmented data": lambda: {"data": _Noisy()},
    "sgld, a shuffling loader": lambda: {
        "data": DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True),
        "batch_size": None,
    },
    "sgld, a shuffling loader and dropout": lambda: {
        "model": _in_training(),
        "data": DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True),
        "batch_size": None,
    },
    "preconditioned": lambda: {
        "sampler": "preconditioned-sgld",
        "params": "0.*",
        "sampler_options": {"preconditioner": {"0.weight": torch.rand(4, 3) + 0.5, "0.bias": 2.0}},
    },
    "metric of the curvature": lambda: {"sampler": "preconditioned-sgld", "preconditioner": "curvature"},
    "rmsprop": lambda: {"sampler": "rmsprop-sgld"},
    "rmsprop, never frozen": lambda: {"sampler": "rmsprop-sgld", "sampler_options": {"adapt_steps": None}},
    "rmsprop, relative": lambda: {"sampler": "rmsprop-sgld", "sampler_options": {"relative_eps": True}},
    "adam": lambda: {"sampler": "adam-sgld"},
    "adam, relative": lambda: {
        "sampler": "adam-sgld",
        "sampler_options": {"relative_eps": True, "betas": (0.8, 0.9), "adapt_steps": 6},
    },
    "sghmc": lambda: {"sampler": "sghmc"},
    "sgnht": lambda: {"sampler": "sgnht"},
    "kfac": lambda: {"sampler": "kfac-sgld", "lr": 0.05},
    "kfac, lr chosen": lambda: {"sampler": "kfac-sgld", "lr": None, "num_draws": 40},
    "kfac, sequential": lambda: {"sampler": "kfac-sgld", "lr": 0.05, "strategy": "sequential"},
    "kfac, masks": lambda: {"sampler": "kfac-sgld", "lr": 0.05, "params": _MASK},
    "kfac, box and decay": lambda: {
        "sampler": "kfac-sgld",
        "lr": 0.05,
        "sampler_options": {"bounding_box_size": 0.02, "weight_decay": 0.5},
    },
    "kfac, bfloat16": lambda: {
        "sampler": "kfac-sgld",
        "lr": 0.05,
        "model": mlp(torch.bfloat16),
        "data": data(dtype=torch.bfloat16),
    },
    "kfac, float64": lambda: {
        "sampler": "kfac-sgld",
        "lr": 0.05,
        "model": mlp(torch.float64),
        "data": data(dtype=torch.float64),
    },
    "kfac, dropout": lambda: {"sampler": "kfac-sgld", "lr": 0.05, "model": _in_training()},
    "kfac, a shuffling loader": lambda: {
        "sampler": "kfac-sgld",
        "lr": 0.05,
        "data": DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True),
        "batch_size": None,
    },
    "kfac, microbatches": lambda: {"sampler": "kfac-sgld", "lr": 0.05, "microbatch_size": 4},
    "mala": lambda: {"sampler": "mala", "batch_size": None},
    "mala, lr chosen": lambda: {
        "sampler": "mala",
        "batch_size": None,
        "lr": None,
        "loss_fn": _per_sample,
        "observables": _OBSERVABLES,
    },
    "hmc, lr chosen, microbatches": lambda: {
        "sampler": "hmc",
        "batch_size": None,
        "lr": None,
        "microbatch_size": 7,
        "params": _MASK,
    },
    "hmc, a shuffling loader": lambda: {
        "sampler": "hmc",
        "batch_size": None,
        "data": DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True),
    },
    "sgnht, bfloat16": lambda: {"sampler": "sgnht", "model": mlp(torch.bfloat16), "data": data(dtype=torch.bfloat16)},
} | {
    f"{sampler}, {strategy}": lambda sampler=sampler, strategy=strategy: {
        "sampler": sampler,
        "strategy": strategy,
        "observables": {"weights": _first_layer},
    }
    for sampler in ("sgld", "rmsprop-sgld", "adam-sgld", "sghmc", "sgnht")
    for strategy in ("sequential", "batched")
}


def _seeded(name: str, **options: Any) -> LLCResult:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # of preconditioners; the run itself has its own generator
        chosen = _RUNS[name]()
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        return estimate(**chosen, **options)


# --- Resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _RUNS)
def test_resumed_runs_end_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stopped after a few steps, and again in the middle: losses, observables and λ̂ of a run that never stopped."""
    expected = _seeded(name)
    steps = []
    for count in (2, 5):
        with interrupted_after(count):
            partial = _seeded(name, checkpoint=tmp_path / "run")
        assert partial.is_partial
        steps.append(sum(partial.steps_done or []))
    resumed = _seeded(name, checkpoint=tmp_path / "run")
    assert resumed.diagnostics["resumed_steps"] == steps[-1] > steps[0] > 0
    assert not resumed.is_partial
    assert_same(resumed, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_step_is_good_to_stop_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, threads: int
) -> None:
    """At every single step of the run, its first and its last included, with chains side by side or in turn."""
    options = {"strategy": strategy, "observables": {"weights": _first_layer}, "num_draws": 4, "num_burnin": 2}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = estimate(**options)
        total = 6 if strategy == "batched" else 18
        for count in range(1, total + 1):
            path = tmp_path / f"{count}"
            with interrupted_after(count):
                partial = estimate(**options, checkpoint=path)
            if threads == 1 or strategy == "batched":  # else others go on until they notice
                assert partial.is_partial == (count < total)
            assert_same(estimate(**options, checkpoint=path), expected)
    finally:
        torch.set_num_threads(before)


def test_a_run_may_be_stopped_any_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 36 steps that gets no further than two at a time."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = estimate(strategy="sequential", sampler="sgnht")
        for _ in range(18):
            with interrupted_after(2):
                last = estimate(strategy="sequential", sampler="sgnht", checkpoint=tmp_path / "run")
    finally:
        torch.set_num_threads(torch_threads)
    assert not last.is_partial
    assert_same(last, expected)


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        ("sgld", 1),
        ("sgnht, sequential", 1),
        ("sgnht, sequential", 2),
        ("sgnht, sequential", 3),
        ("adam-sgld, batched", 1),
        ("mala, lr chosen", 1),
        ("sgld, dropout", 1),
    ],
)
def test_any_snapshot_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, threads: int) -> None:
    """Whatever the file holds when a machine goes down, the run ends with the bits of one that never wrote a file."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = _seeded(name)
        copies = []
        with monkeypatch.context() as patch:
            save = Checkpoint.save

            def kept(keeper: Checkpoint, saved: Saved) -> None:
                save(keeper, saved)
                copies.append(tmp_path / f"copy{len(copies)}")
                shutil.copy(keeper.path, copies[-1])

            patch.setattr(Checkpoint, "save", kept)
            patch.setattr(Checkpoint, "is_due", True)
            patch.setattr(Monitor, "interval", 0)
            with after_each_step(lambda taken: time.sleep(0.002)):  # the thread that asks for snapshots has its turn
                assert_same(_seeded(name, checkpoint=tmp_path / "run"), expected)
        assert len(copies) > 1
        steps = [sum(t.step * len(t.chains) for t in read(copy).traces) for copy in copies]
        assert steps == sorted(steps)
        for copy in {*copies[::2], copies[-1]}:  # others go on from every step in the tests above
            assert_same(_seeded(name, checkpoint=copy), expected)
    finally:
        torch.set_num_threads(before)


def test_slow_steps_side_by_side_are_saved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take longer than the time between two looks at the clock: all threads answer the same call."""
    written, save = [], Checkpoint.save
    monkeypatch.setattr(Monitor, "interval", 0.001)
    monkeypatch.setattr(Checkpoint, "is_due", True)
    monkeypatch.setattr(Checkpoint, "save", lambda keeper, saved: (written.append(1), save(keeper, saved)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with after_each_step(lambda taken: time.sleep(0.01 + 0.003 * taken.chains[0])):
            result = estimate(strategy="sequential", num_chains=2, checkpoint=tmp_path / "run")
    finally:
        torch.set_num_threads(threads)
    assert result.diagnostics["workers"] == 2
    assert len(written) >= 6  # in 12 steps


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_failures_leave_the_last_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    """A run that dies of an exception half-way is resumed from what was written before."""
    broken = True

    def observe(draw: Draw) -> Tensor:
        if broken and draw.chain == 1 and draw.draw == 3:
            raise failure("half-way")
        return draw.params["0.weight"]

    options: dict[str, Any] = {"observables": {"weights": observe}, "strategy": "sequential"}
    monkeypatch.setattr(Checkpoint, "is_due", True)
    monkeypatch.setattr(Monitor, "interval", 0)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(failure, match="half-way"):
            estimate(**options, checkpoint=tmp_path / "run")
        broken = False
        resumed = estimate(**options, checkpoint=tmp_path / "run")
        assert resumed.diagnostics["resumed_steps"] == 12 + 7  # chain 0, and chain 1 up to its fourth draw
        assert_same(resumed, estimate(**options))
    finally:
        torch.set_num_threads(torch_threads)


def test_settings_that_were_chosen_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on with the step size it had, even where it would be chosen differently now."""
    with interrupted_after(3):
        partial = estimate(lr=None, checkpoint=tmp_path / "run")
    monkeypatch.setattr("llc_fast.calibration.default_lr", lambda *_, **__: pytest.fail("chosen again"))
    assert estimate(lr=None, checkpoint=tmp_path / "run").settings["lr"] == partial.settings["lr"]


@pytest.mark.parametrize("name", ["sgld", "sgld, observables", "sgld, a shuffling loader", "sgnht, batched"])
def test_finished_runs_return_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same call again gives the same result, again and again, without a step."""
    expected = _seeded(name, checkpoint=tmp_path / "run")
    for _ in range(2):
        with no_step():
            again = _seeded(name, checkpoint=tmp_path / "run")
        assert_same(again, expected)
        assert again.diagnostics["resumed_steps"] == again.loss_trace.size
        assert again.warnings == expected.warnings


def test_diverged_chains_stay_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that became NaN before the stop are not run again, those under way go on."""
    options: dict[str, Any] = {"lr": 50.0, "num_draws": 150, "strategy": "sequential"}
    expected = estimate(**options)
    assert expected.diverged_chains == [0, 1, 2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with interrupted_after(70):
            partial = estimate(**options, checkpoint=tmp_path / "run")
    finally:
        torch.set_num_threads(threads)
    assert partial.steps_done == [154, 6, 0]
    assert_same(estimate(**options, checkpoint=tmp_path / "run"), expected)


def test_a_path_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that mean something to patterns, and no suffix; as text, and relative to where the process is."""
    monkeypatch.chdir(tmp_path)
    expected = estimate()
    for name in ("run [1]*?.npz", "λ̂", ".hidden"):
        with interrupted_after(3):
            estimate(checkpoint=name)
        assert_same(estimate(checkpoint=name), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run [1]*?.npz", "λ̂", ".hidden"])


# --- The file -----------------------------------------------------------------------------------------------


def _same_bits(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> None:
    assert (found is None) == (expected is None) and (found or {}).keys() == (expected or {}).keys()
    for name, x in (found or {}).items():
        y = (expected or {})[name]
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def _assert_same_saved(found: Saved, expected: Saved) -> None:
    assert (found.identity, found.chosen) == (expected.identity, expected.chosen)
    assert len(found.traces) == len(expected.traces)
    for a, b in zip(found.traces, expected.traces, strict=True):
        assert (a.first_chain, a.step) == (b.first_chain, b.step)
        assert {name: v.shape for name, v in a.steps.items()} == {name: v.shape for name, v in b.steps.items()}
        _same_bits(*({name: v[:, : t.step] for name, v in t.steps.items()} for t in (a, b)))
        _same_bits({"": a.checks}, {"": b.checks})
        for group in ("draws", "state", "ends"):
            _same_bits(getattr(a, group), getattr(b, group))


def _saved() -> Saved:
    rng = np.random.default_rng(0)
    traces = []
    for k, (first, count, step) in enumerate([(0, 2, 0), (2, 3, 7), (5, 1, 20), (6, 1, 19)]):
        losses = rng.standard_normal((count, 20))
        losses[:, step:] = np.nan
        losses[0, step // 2 :] = np.inf if k == 3 else losses[0, step // 2 :]
        state = {
            "w": rng.standard_normal((count, 64)).astype(np.float32),
            "thermostat": rng.standard_normal(count),
            "generator": rng.integers(0, 255, (count, 50), dtype=np.uint8),
            "buffer.a.b/c": np.zeros((count, 0), np.uint8),
        }
        draws = {"λ̂ / 1": rng.standard_normal((count, 5, 2, 3)), "empty": np.full((count, 5, 0), np.nan)}
        traces.append(
            Traces(
                first,
                step,
                {"loss": losses, "bias": -losses},
                draws if k % 2 else {},
                rng.standard_normal((count, 3, 5)),
                state if 0 < k < 2 else None,
                {"a.b/c": rng.standard_normal((count, 2, 2))} if k == 2 else None,
            )
        )
    identity = {"sampler": "sgld", "lr": None, "box": float("inf"), "betas": [0.9, 0.99], "seed": 2**64 - 1}
    schedule = {"num_draws": 5, "num_burnin": 15, "num_steps_bw_draws": 1}
    return Saved(identity, {"init_loss": 1 / 3, "lr": 5e-324}, schedule, traces)


def test_round_trip(tmp_path: Path) -> None:
    """What was written is what is read, bit for bit: NaN, infinities, empty arrays, chains without state."""
    write(tmp_path / "run", _saved())
    _assert_same_saved(read(tmp_path / "run"), _saved())
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run in the middle."""
    path = tmp_path / "run"
    with interrupted_after(5):
        estimate(checkpoint=path, sampler="sgnht", observables={"weights": _first_layer})
    return path


def _resume(path: Path) -> LLCResult:
    return estimate(checkpoint=path, sampler="sgnht", observables={"weights": _first_layer})


def test_truncated_files_are_refused(stopped: Path) -> None:
    """A file cut anywhere is a ValueError that names it and says what to do."""
    content = stopped.read_bytes()
    for length in [*range(0, len(content), 37), *range(len(content) - 30, len(content))]:
        stopped.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"run' is not a checkpoint of llc_fast, or is damaged: give another"):
            read(stopped)
    stopped.write_bytes(content)
    assert not _resume(stopped).is_partial


def test_changed_bytes_are_noticed(stopped: Path) -> None:
    """One byte changed anywhere: the file is refused, or it is one whose value does not matter."""
    content, expected = stopped.read_bytes(), read(stopped)
    refused, rng = 0, np.random.default_rng(0)
    places = [*range(0, len(content), 29), *range(len(content) - 60, len(content))]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        stopped.write_bytes(changed)
        try:
            found = read(stopped)
        except ValueError as error:
            refused += "is damaged" in str(error)
        else:
            _assert_same_saved(found, expected)
    assert refused > 0.8 * len(places)


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def _rewrite(path: Path, **changes: Any) -> None:
    arrays = _arrays(path)
    meta = json.loads(str(arrays.pop("meta"))) | changes
    with open(path, "wb") as file:
        np.savez(file, meta=np.array(json.dumps({k: v for k, v in meta.items() if v is not None})), **arrays)


_DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("loss,step\n0.5,1\n"),
    "zeros": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04K\x01."),
    "a model": lambda path: torch.save(mlp().state_dict(), path),
    "another npz": lambda path: np.savez(open(path, "wb"), weights=np.zeros(3)),  # noqa: SIM115
    "an array": lambda path: np.save(open(path, "wb"), np.zeros(3)),  # noqa: SIM115
    "a result": lambda path: estimate().save(path),
    "no chains": lambda path: _rewrite(path, groups=None),
    "other chains": lambda path: _rewrite(path, groups=[{"first_chain": 9}]),
    "no settings": lambda path: _rewrite(path, identity=None),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_what_is_no_checkpoint_is_refused(stopped: Path, damage: str) -> None:
    """Whatever lies at the path, the run does not begin, and nobody's file is overwritten."""
    _DAMAGE[damage](stopped)
    content = stopped.read_bytes()
    with pytest.raises(ValueError, match=r"run' is not a checkpoint of llc_fast, or is damaged"):
        _resume(stopped)
    assert stopped.read_bytes() == content


def test_pickles_are_never_run(stopped: Path) -> None:
    """Arrays of objects are pickles, and whoever wrote them could run code: they are refused."""
    arrays = _arrays(stopped)
    with open(stopped, "wb") as file:
        np.savez(file, **arrays, code=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="is damaged"):
        _resume(stopped)


def test_other_versions_are_told_apart(stopped: Path) -> None:
    """A checkpoint of a later format is not called damaged."""
    _rewrite(stopped, format=99)
    with pytest.raises(ValueError, match="run' was written by another version of llc_fast"):
        _resume(stopped)


def test_a_file_that_may_not_be_read_is_not_called_damaged(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting it would not be the remedy."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(stopped))

    monkeypatch.setattr("numpy.load", refuse)
    with pytest.raises(PermissionError, match="run"):
        _resume(stopped)


# --- Kills --------------------------------------------------------------------------------------------------

_KILLS = """
import random
import numpy as np
from llc_fast.chains.checkpoint import read
from processes import free_port
from pathlib import Path

size, kills, which = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
llc_fast.chains.run.Monitor.interval = 0.001
options = dict(num_chains=4, num_draws=150, num_burnin=50, strategy=which,
    observables={"weight": lambda draw: (time.sleep(0.0005), draw.params["0.weight"])[1]})

fsync = os.fsync

def slow_disk(file):
    time.sleep(0.003)  # so that many are killed while they write
    fsync(file)

def work(rank, port, name):
    os.fsync = slow_disk
    try:
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        result = runs.estimate(**options, checkpoint=name, checkpoint_interval=0)
        if rank == 0:
            result.save(f"{name}.result")
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)
    os._exit(0)

def start(name):
    port, pids = free_port(), []
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            work(rank, port, name)
    return pids

def ends(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

runs.estimate(**options | {"num_draws": 8, "num_burnin": 4})  # imports what is imported late, once for all
random.seed(0)
killed = resumed = left = run = 0
began = time.monotonic()
assert ends(start("alone")) == [0] * size
usual = time.monotonic() - began
while killed < kills:
    name, run, attempts = f"run{run}.npz", run + 1, 0
    while True:
        attempts += 1
        pids = start(name)
        # At any moment: while it starts, reads the file, samples, writes, or ends.
        time.sleep(random.uniform(0.0, 0.8 * usual))
        for pid in random.sample(pids, size):
            os.kill(pid, signal.SIGKILL)
        codes = ends(pids)
        killed += -signal.SIGKILL in codes
        left += any(entry.startswith(".llc_fast-") for entry in os.listdir("."))
        for entry in os.listdir("."):
            if entry.startswith(name) and not entry.endswith("result"):
                resumed += sum(t.step for t in read(Path(entry)).traces) > 0  # whole at any moment
        if all(code == 0 for code in codes) or killed >= kills:
            break
    assert ends(start(name)) == [0] * size
    assert sorted(e for e in os.listdir(".") if e.startswith((name, "."))) == [name, f"{name}.result"]
print("killed", killed, "times in", run, "runs;", left, "left something;", resumed, "readable", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kills"), [(1, 100), (2, 40)])
@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_a_hundred_kills(tmp_path: Path, size: int, kills: int, strategy: str) -> None:
    """Killed a hundred times, at moments that nobody chose, a run resumes each time, ends with the bits of one that was
    left alone, and leaves nothing behind."""
    code, output, errors = Script(_KILLS, tmp_path, size, kills, strategy).finish()
    assert code == 0, output + errors
    found = re.search(r"killed (\d+) times in (\d+) runs; (\d+) left something; (\d+) readable", output)
    assert found is not None and int(found[1]) >= kills and int(found[4]) > kills / 4, output
    observables: dict[str, Any] = {"weight": _first_layer}
    options: dict[str, Any] = {"num_chains": 4, "num_draws": 150, "num_burnin": 50, "strategy": strategy}
    expected = estimate(**options, observables=observables)
    for run in range(int(found[2])):
        result = LLCResult.load(tmp_path / f"run{run}.npz.result")
        if strategy == "batched" and size > 1:  # other groups of chains: the same to rounding
            np.testing.assert_allclose(result.loss_trace, expected.loss_trace, rtol=1e-4)
        else:
            assert_same(result, expected)


# --- Other runs ---------------------------------------------------------------------------------------------


def _with_bias(value: float) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].bias += value  # type: ignore[index,operator]
    return model


def _frozen(value: float) -> nn.Module:
    model = mlp()
    model[0].bias.requires_grad_(False)[0] += value  # type: ignore[index,operator,union-attr]
    return model


def _changed_data(index: int, n: int = 40) -> tuple[Tensor, Tensor]:
    x, y = data(n)
    y[index] += 0.5
    return x, y


_PRE = {"sampler": "preconditioned-sgld", "params": "0.bias"}
_CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "w*": ({}, {"model": _with_bias(1e-6)}, "model was"),
    "another model": ({}, {"model": initialized(nn.Linear(3, 1))}, "model was"),
    "a frozen parameter": ({"model": _frozen(0.0)}, {"model": _frozen(1e-6)}, "frozen parameters and buffers was"),
    "data": ({}, {"data": _changed_data(3)}, "data was"),
    "a sample among many": ({"data": data(500)}, {"data": _changed_data(3, 500)}, r"the loss at w\* was"),
    "fewer data": ({"nbeta": 9.0}, {"data": data(39)}, "num_samples was 40, is 39"),
    "batch_size": ({}, {"batch_size": 9}, "batch_size was 10, is 9"),
    "microbatch_size": ({}, {"microbatch_size": 5}, "microbatch_size was null, is 5"),
    "lr": ({}, {"lr": 1.001e-3}, "lr was 0.001, is 0.001001"),
    "lr given": ({"lr": None}, {"lr": 1e-3}, "lr was null, is 0.001"),
    "nbeta": ({}, {"nbeta": 7.0}, "nbeta was null, is 7.0"),
    "localization": ({}, {"localization": 2.0}, r"localization was 1.0, is 2.0"),
    "seed": ({}, {"seed": 1}, "seed was 0, is 1"),
    "sampler": ({}, {"sampler": "sghmc"}, 'sampler was "sgld", is "sghmc"'),
    "length by need": ({}, {"num_draws": None, "num_burnin": None}, "length was"),
    "num_burnin": ({}, {"num_burnin": 3}, "it has 4 steps of each chain, 4 of them burn-in"),
    "num_steps_bw_draws": ({}, {"num_steps_bw_draws": 2}, "num_steps_bw_draws was 1, is 2"),
    "num_chains": ({}, {"num_chains": 4}, "num_chains was 3, is 4"),
    "params": ({}, {"params": "0.*"}, "model was"),
    "mask": ({"params": _MASK}, {"params": ["0.*", "2.weight"]}, "masks was"),
    "loss_fn": ({}, {"loss_fn": nn.functional.l1_loss}, r"the loss at w\* was"),
    "autocast": ({}, {"autocast": torch.bfloat16}, 'autocast was null, is "torch.bfloat16"'),
    "observables": ({}, {"observables": {"weights": _first_layer}}, r'observables was \[\], is \["weights"\]'),
    "strategy": ({}, {"strategy": "sequential"}, 'strategy was null, is "sequential"'),
    "weight_decay": (
        {"sampler_options": {"weight_decay": 0.5}},
        {"sampler_options": {}},
        "weight_decay was 0.5, is 0.0",
    ),
    "an option as a tensor": (
        {"sampler_options": {"weight_decay": torch.tensor(0.5)}},
        {"sampler_options": {"weight_decay": torch.tensor(0.25)}},
        "weight_decay was 0.5, is 0.25",
    ),
    "betas": (
        {"sampler": "adam-sgld", "sampler_options": {"betas": (0.9, 0.99)}},
        {"sampler_options": {"betas": (0.8, 0.99)}},
        r"betas was \[0.9, 0.99\], is \[0.8, 0.99\]",
    ),
    "preconditioner": (
        _PRE | {"sampler_options": {"preconditioner": {"0.bias": torch.ones(4)}}},
        {"sampler_options": {"preconditioner": {"0.bias": torch.tensor([1.0, 1.0, 1.0, 2.0])}}},
        "preconditioner was",
    ),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_other_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """A checkpoint is of one run: with anything changed the difference is named, and the file is left alone."""
    given, changes, words = _CHANGES[change]
    path = tmp_path / "run"
    with interrupted_after(4):
        estimate(**given, checkpoint=path)
    content = path.read_bytes()
    with no_step(), pytest.raises(ValueError, match=rf"run' belongs to another run: .*{words}"):
        estimate(**given | changes, checkpoint=path)
    assert path.read_bytes() == content
    assert not estimate(**given, checkpoint=path).is_partial


def test_all_differences_are_named(stopped: Path) -> None:
    """Not the first one only; what is long is cut short."""
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        estimate(checkpoint=stopped, sampler="sghmc", seed=5, observables={"x" * 200: _first_layer})
    for words in ("seed was 0, is 5", 'sampler was "sgnht", is "sghmc"', "xxx…", "Give another path, or delete"):
        assert words in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_says_the_same_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's numbers, tensors, lists for tuples, another progress bar or interval: nothing that changes a bit."""
    path = tmp_path / "run"
    with interrupted_after(4):
        estimate(sampler="adam-sgld", sampler_options={"betas": (0.9, 0.99), "eps": 0.25}, checkpoint=path)
    result = estimate(
        sampler="adam-sgld",
        sampler_options={"betas": [0.9, 0.99], "eps": torch.tensor(0.25)},
        checkpoint=str(path),
        checkpoint_interval=5,
        num_chains=np.int64(3),
        seed=np.uint8(0),
        localization=1,
        lr=np.float64(1e-3),
    )
    assert not result.is_partial and result.diagnostics["resumed_steps"] > 0


def test_fingerprints_see_everything() -> None:
    """Values, names, shapes, dtypes and order count; strides do not."""
    x = torch.arange(6.0).reshape(2, 3)
    others = [("x", x + 1e-6), ("y", x), ("x", x.reshape(3, 2)), ("x", x.double()), ("x", x.flip(0)), ("x", x.T)]
    found = {digest([("x", x)]), *(digest([pair]) for pair in others), digest([("x", x), ("x", x)]), digest([])}
    assert len(found) == len(others) + 3
    assert digest([("x", x.T.contiguous().T)]) == digest([("x", x)])
    for dtype in (torch.bool, torch.bfloat16, torch.int64, torch.uint8):
        assert digest([("x", x.to(dtype))]) != digest([("x", torch.zeros(2, 3, dtype=dtype))])
    assert digest([("x", torch.tensor(1.0))]) != digest([("x", torch.tensor(2.0))])
    assert digest([("x", torch.zeros(0, 3))]) != digest([("x", torch.zeros(3, 0))])


def test_large_data_are_named_within_bounds() -> None:
    """The samples that name a data set of 2²⁴ + 4 exist: float32 would count past the end."""

    class Many:
        def __len__(self) -> int:
            return 2**24 + 4

        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            assert int(indices.max()) < len(self) and int(indices.min()) >= 0
            return indices[:, None].float(), indices[:, None].float()

    source = IndexedSource(Many(), 8, torch.device("cpu"), lambda batch: batch)
    assert data_identity(source)["num_samples"] == 2**24 + 4


def test_equal_identities_pass() -> None:
    """No difference, no error; a name that only one of them has is a difference."""
    compare(Path("run"), {"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1})
    with pytest.raises(ValueError, match="b was null, is 2"):
        compare(Path("run"), {"a": 1}, {"a": 1, "b": 2})


# --- Disks --------------------------------------------------------------------------------------------------


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _half(file: Any, **_: Any) -> None:
    file.write(b"PK\x03\x04 the first half")
    _full()


@pytest.mark.parametrize("where", ["numpy.savez", "numpy.savez, half-way", "os.fsync", "os.replace", "a limit"])
def test_a_full_disk_stops_no_run(stopped: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The run goes on and says so; the last good checkpoint is intact, nothing half-written stays, and it resumes."""
    content = stopped.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "is_due", True)
        patch.setattr(Monitor, "interval", 0)
        if where == "a limit":
            resource = pytest.importorskip("resource")
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
            try:
                result = _resume(stopped)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            reason = os.strerror(errno.EFBIG)
        else:
            patch.setattr(where.partition(",")[0], _half if "half" in where else _full)
            result, reason = _resume(stopped), os.strerror(errno.ENOSPC)
    expected = estimate(sampler="sgnht", observables={"weights": _first_layer})
    assert_same(result, expected)
    warning = [w for w in result.warnings if w.code == "checkpoint"]
    assert len(warning) == 1 and reason in warning[0] and str(stopped) in warning[0]
    assert stopped.read_bytes() == content and list(stopped.parent.iterdir()) == [stopped]
    resumed = _resume(stopped)
    assert_same(resumed, expected)
    assert 0 < resumed.diagnostics["resumed_steps"] < 36
    assert "checkpoint" not in codes(resumed)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_disk_that_was_always_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool) -> None:
    """Without any good checkpoint there is still a result, with a warning, partial or whole."""
    with monkeypatch.context() as patch, interrupted_after(6) if interrupted else contextlib.nullcontext():
        patch.setattr("numpy.savez", _full)
        result = estimate(checkpoint=tmp_path / "run")
    assert result.is_partial == interrupted
    assert any(w.code == "checkpoint" and os.strerror(errno.ENOSPC) in w for w in result.warnings)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_had_room_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots that failed in between are no news once one was written."""
    calls, savez = [], np.savez

    def at_first_full(file: Any, **arrays: Any) -> None:
        calls.append(1)
        _full() if len(calls) < 3 else savez(file, **arrays)

    monkeypatch.setattr(Checkpoint, "is_due", True)
    monkeypatch.setattr(Monitor, "interval", 0)
    monkeypatch.setattr("numpy.savez", at_first_full)
    result = estimate(checkpoint=tmp_path / "run")
    assert len(calls) >= 3 and happened(result) == []
    assert_same(estimate(checkpoint=tmp_path / "run"), result)


def _never(_: Any) -> Any:
    pytest.fail("the model was called")


def test_paths_that_can_not_be_written_are_errors_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing folder, a folder for a file, a folder that is a file, or one without permission."""
    model = mlp()
    model.forward = _never  # type: ignore[method-assign]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"nowhere/run': the folder .*nowhere does not exist"):
        estimate(model=model, checkpoint=tmp_path / "nowhere" / "run")
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        estimate(model=model, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        estimate(model=model, checkpoint=tmp_path / "file" / "run")
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    with pytest.raises(PermissionError, match=r"run': no permission to write to the folder"):
        estimate(model=model, checkpoint=tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    """The same with a folder that really is read-only."""
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="no permission to write"):
        estimate(checkpoint=tmp_path / "run")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "soon", None, True])
def test_intervals_are_checked(tmp_path: Path, value: Any) -> None:
    """An interval is a number of seconds, not negative."""
    with pytest.raises((TypeError, ValueError), match="checkpoint_interval must be"):
        estimate(checkpoint=tmp_path / "run", checkpoint_interval=value)


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """Partial files of this checkpoint, of any process, and none that somebody else may have called so."""
    for name in ("run", "run [1]", "r" * 255):
        target = tmp_path / name
        others = [".run.4711.partial", ".run.1.partial", ".llc_fast-0123456789abcdef-0123456789abcdef.partial"]
        others += [partial_name(tmp_path / f"x{name}"), f"{partial_name(target)}.bak", f"x{partial_name(target)}"]
        for left in (partial_name(target), partial_name(tmp_path / f"{name}.rank17"), *others):
            (tmp_path / left).write_bytes(b"half")
        estimate(checkpoint=target)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, *others])
        for path in tmp_path.iterdir():
            path.unlink()


def test_partial_files_in_use_are_left(tmp_path: Path) -> None:
    """Another process may be writing to the same checkpoint."""
    with atomic_write(tmp_path / "run") as file:
        file.write(b"by another")
        (left,) = tmp_path.iterdir()
        estimate(checkpoint=tmp_path / "run")
        assert left.exists()
    assert (tmp_path / "run").read_bytes() == b"by another"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


_NOT_OURS = ["run.rank_of_matrices_2", "run.ranking1", "run.rank01", "run.rank-1", "run.rank1.bak", "run.rank²"]


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    """Whatever is called like the checkpoint and something more, there before the run or come while it lasts."""
    for name in _NOT_OURS:
        (tmp_path / name).write_text("mine")

    def observe(draw: Draw) -> float:
        (tmp_path / "run.rank3").write_text("mine")
        (tmp_path / "run.rank4").mkdir(exist_ok=True)
        return 0.0

    estimate(checkpoint=tmp_path / "run", observables={"o": observe})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*_NOT_OURS, "run", "run.rank3", "run.rank4"])
    assert all((tmp_path / name).read_text() == "mine" for name in (*_NOT_OURS, "run.rank3"))


@pytest.mark.parametrize("content", ["text", "a result", "another run"])
def test_a_file_of_the_user_with_the_name_of_a_part_is_refused(tmp_path: Path, content: str) -> None:
    """A run of several processes would write there; the user hears of it, and the file stays as it is."""
    part = tmp_path / "run.rank1"
    {
        "text": lambda: part.write_text("mine"),
        "a result": lambda: estimate().save(part),
        "another run": lambda: estimate(seed=5, checkpoint=part),
    }[content]()
    before = part.read_bytes()
    with no_step(), pytest.raises(ValueError, match=r"^checkpoint=") as caught:
        estimate(checkpoint=tmp_path / "run")
    assert "run.rank1" in str(caught.value) and "another path" in str(caught.value)
    assert part.read_bytes() == before


def test_the_path_is_that_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its folder while it runs still has one checkpoint, where it began."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(Monitor, "interval", 0)

    def observe(draw: Draw) -> float:
        os.chdir(tmp_path / "elsewhere")
        return 0.0

    estimate(checkpoint="run", checkpoint_interval=0, observables={"o": observe})
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["elsewhere", "run"]


def test_a_checkpoint_at_a_link_or_with_permissions_keeps_them(tmp_path: Path) -> None:
    """The link leads to the checkpoint, and what was private stays so."""
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to("there/file")
    expected = estimate()
    with interrupted_after(4):
        estimate(checkpoint=tmp_path / "run")
    (tmp_path / "there" / "file").chmod(0o600)
    assert_same(estimate(checkpoint=tmp_path / "run"), expected)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "there" / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a device", "link in a circle", "a long name", "a NUL"])
def test_what_is_no_file_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    """Reading a pipe would wait for ever, and a device would be replaced by a file."""
    path, model = tmp_path / "run", mlp()
    model.forward = _never  # type: ignore[method-assign]
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    elif kind == "link in a circle":
        path.symlink_to("run")
    else:
        path = tmp_path / ("r" * 256 if kind == "a long name" else "r\0")
    with pytest.raises(ValueError, match=r"^checkpoint="):
        estimate(model=model, checkpoint=path)
    with pytest.raises(TypeError, match="checkpoint must be the path of a file, got int"):
        estimate(model=model, checkpoint=3)


def test_runs_without_checkpoints_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file appears anywhere unless one was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Monitor, "interval", 0)
    estimate()
    assert list(tmp_path.iterdir()) == []


def _keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float) -> tuple[Checkpoint, list[float]]:
    """A checkpoint, and a list of the time now and the seconds that a write takes."""
    clock = [0.0, 1.0]
    monkeypatch.setattr("llc_fast.chains.checkpoint.time.monotonic", lambda: clock[0])

    def slow(*_: Any) -> None:
        clock[0] += clock[1]

    monkeypatch.setattr("llc_fast.chains.checkpoint.write", slow)
    return Checkpoint(tmp_path / "run", interval=interval), clock


def test_snapshots_take_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes a second to write is written every twenty seconds, however short the interval."""
    keeper, clock = _keeper(tmp_path, monkeypatch, 0.5)
    assert not keeper.is_due
    clock[0] += 0.5
    assert keeper.is_due
    for _ in range(3):
        keeper.save(_saved())
        clock[0] += 19.9
        assert not keeper.is_due
        clock[0] += 0.2
        assert keeper.is_due


def test_one_slow_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hung once: the interval is what it was, at once if there were fast writes before, or after one."""
    keeper, clock = _keeper(tmp_path, monkeypatch, 1.0)
    for duration, pause in ((60.0, 1200.0), (0.01, 1.0), (60.0, 1.0), (0.01, 1.0), (60.0, 1.0), (60.0, 1200.0)):
        clock[1] = duration
        keeper.save(_saved())
        clock[0] += pause - 0.1
        assert not keeper.is_due
        clock[0] += 0.2
        assert keeper.is_due


def test_the_loss_function_is_used_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss functions that agree at w* can't be told apart; those that do not are, by L(w*)."""
    with interrupted_after(4):
        estimate(checkpoint=tmp_path / "run")
    assert not estimate(checkpoint=tmp_path / "run", loss_fn=lambda a, b: mse(a, b)).is_partial
    with pytest.raises(ValueError, match="Other data or another loss_fn"):
        estimate(checkpoint=tmp_path / "run", loss_fn=lambda a, b: 1.0001 * mse(a, b))
