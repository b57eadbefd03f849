"""Chains spread over processes: the same chains as in one, whole results everywhere, and deaths that are noticed."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import HEAD, all_well, free_port, launch
from runs import TIMEOUT, assert_same, estimate, interrupted_after, write_script
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from llc_fast.chains import processes
from llc_fast.chains.checkpoint import read
from llc_fast.chains.draw import Draw
from llc_fast.chains.processes import ProcessFailedError, Team
from llc_fast.result import LLCResult


def _weight(draw: Draw) -> Tensor:
    return draw.params["0.weight"]


# --- The same chains ----------------------------------------------------------------------------------------

_ESTIMATES = """
for name, options in {
    "sequential": dict(strategy="sequential", num_chains=5, observables={"weight": weight}),
    "batched": dict(strategy="batched", num_chains=5),
    "few": dict(strategy="sequential", num_chains=1, lr=None),
    "lost": dict(lr=1e3, num_draws=70, num_chains=4, strategy="sequential"),
    "adjusted": dict(sampler="hmc", lr=None, batch_size=None, num_chains=4, strategy="sequential"),
    "refined": dict(strategy="sequential", refine=True, num_chains=3),
    "in metric": dict(strategy="sequential", preconditioner="curvature", num_chains=3, lr=1e-5),
    "behavioral": dict(strategy="batched", loss_fn="behavioral", num_chains=3),
}.items():
    runs.estimate(**options, checkpoint=name, progress=True).save(f"{name}.{rank}")
alone = runs.estimate(distributed=False, num_chains=2)
assert len(alone.loss_trace) == 2
print(sorted(os.listdir(".")) if rank == 0 else "")
"""


def _check_estimates(tmp_path: Path, size: int) -> None:
    """What `_ESTIMATES` saved, against one process."""

    def load(name: str) -> list[LLCResult]:
        found = [LLCResult.load(tmp_path / f"{name}.{rank}") for rank in range(size)]
        for other in found[1:]:
            assert_same(other, found[0])
            assert other.warnings == found[0].warnings
            assert other.diagnostics["distance"] == found[0].diagnostics["distance"]
            assert {**other.settings, "seconds": 0} == {**found[0].settings, "seconds": 0}
        return found

    one: dict[str, Any] = {"strategy": "sequential", "num_chains": 5, "observables": {"weight": _weight}}
    alone = estimate(**one)
    assert_same(load("sequential")[0], alone)
    assert len(alone.diagnostics["distance"]) == 5
    assert load("sequential")[0].diagnostics["distance"] == alone.diagnostics["distance"]
    batched = estimate(strategy="batched", num_chains=5)
    np.testing.assert_allclose(load("batched")[0].loss_trace, batched.loss_trace, rtol=1e-4)
    assert_same(load("few")[0], estimate(strategy="sequential", num_chains=1, lr=None))
    assert_same(load("lost")[0], estimate(lr=1e3, num_draws=70, num_chains=4, strategy="sequential"))
    adjusted = estimate(sampler="hmc", lr=None, batch_size=None, num_chains=4, strategy="sequential")
    assert_same(load("adjusted")[0], adjusted)
    for name in ("acceptance_per_chain", "lr_per_chain"):
        assert load("adjusted")[0].diagnostics[name] == adjusted.diagnostics[name]
    refined, behavioral = load("refined")[0], load("behavioral")[0]
    assert_same(refined, estimate(strategy="sequential", refine=True, num_chains=3))
    assert refined.diagnostics["refine_fall"] > 0
    in_metric = estimate(strategy="sequential", preconditioner="curvature", num_chains=3, lr=1e-5)
    assert_same(load("in metric")[0], in_metric)
    one_process = estimate(strategy="batched", loss_fn="behavioral", num_chains=3)
    np.testing.assert_allclose(behavioral.loss_trace, one_process.loss_trace, rtol=1e-3, atol=1e-12)
    for name in (
        "sequential",
        "batched",
        "few",
        "lost",
        "adjusted",
        "refined",
        "in metric",
        "behavioral",
    ):  # merged: one file with all chains
        assert not list(tmp_path.glob(f"{name}.rank*"))
    again = estimate(**one, checkpoint=tmp_path / "sequential")
    assert again.diagnostics["resumed_steps"] == 60
    assert_same(again, estimate(**one))


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_gives_the_same_chains(tmp_path: Path, size: int) -> None:
    """Several estimates one after another, more processes than chains, lost chains: every rank has all of it."""
    results = launch(tmp_path, _ESTIMATES, size)
    all_well(results)
    _check_estimates(tmp_path, size)
    assert "processes" in results[0][2] and "step" not in results[1][2]  # one bar, not one for each process


_RESTARTED = """
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def breaks(draw):
    if attempt == 0 and draw.chain == 3 and draw.draw == 5:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return draw.params["0.weight"]

result = runs.estimate(
    num_chains=4, num_draws=30, strategy="sequential", observables={"weight": breaks}, checkpoint="run",
    checkpoint_interval=0,
)
assert attempt == 1 and result.diagnostics["resumed_steps"] > 0
result.save(f"result.{rank}")
"""


@pytest.mark.slow
def test_torchrun_and_its_restarts(tmp_path: Path) -> None:
    """Under torchrun itself; when a process is killed and all are started again, the run goes on and ends right."""
    script = write_script(tmp_path, HEAD + _RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--monitor-interval=0.1", f"--master-port={free_port()}", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    expected = estimate(num_chains=4, num_draws=30, strategy="sequential", observables={"weight": _weight})
    for rank in range(2):
        assert_same(LLCResult.load(tmp_path / f"result.{rank}"), expected)


_OWN_GROUP = """
import torch.distributed as dist
dist.init_process_group("gloo")
for name, key in os.environ.items():
    if name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]  # the group says it
runs.estimate(num_chains=3, strategy="sequential").save(f"first.{rank}")
total = torch.ones(())
dist.all_reduce(total)  # the group is still the user's
assert total == size
runs.estimate(num_chains=3, strategy="sequential", seed=1, distributed=True).save(f"second.{rank}")
dist.destroy_process_group()
"""


def test_a_group_of_the_users_own(tmp_path: Path) -> None:
    """torch.distributed initialized by the user: its processes share the chains, and it still works."""
    all_well(launch(tmp_path, _OWN_GROUP.replace("os.environ.items()", "list(os.environ.items())"), 2))
    for rank in range(2):
        assert_same(LLCResult.load(tmp_path / f"first.{rank}"), estimate(strategy="sequential"))
        assert_same(LLCResult.load(tmp_path / f"second.{rank}"), estimate(strategy="sequential", seed=1))


# --- Failures -----------------------------------------------------------------------------------------------

_FAILING = """
how, who, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
llc_fast.chains.processes.PATIENCE = 60.0  # it must not matter

def leave():
    open("when", "w").write(repr(time.time()))
    if how == "raises":
        raise ValueError("half-way")
    if how == "stops the interpreter":
        sys.exit("half-way")
    os.kill(os.getpid(), signal.SIGKILL)

def fails(draw):
    if where == "while all sample":
        time.sleep(0.02)
    if rank == who and draw.draw == 3:
        if where == "while all wait":
            time.sleep(0.5)
        leave()
    return 0.0

def fails_early(output, target):
    if where == "in the pilots" and rank == who and os.path.exists("pilots"):
        time.sleep(0.3)
        leave()
    return torch.nn.functional.mse_loss(output, target)

def begun(taken):
    if where == "in the pilots" and taken.is_pilot:
        open("pilots", "w").close()
        time.sleep(0.01)

options = dict(lr=None, num_draws=2000, num_burnin=2000, loss_fn=fails_early) if where == "in the pilots" else {}
if where == "while all sample":
    options = dict(num_draws=3000)
try:
    with llc_fast.chains.run.after_each_step(begun):
        runs.estimate(**{"num_chains": 3, "strategy": "sequential", "observables": {"fails": fails},
            "checkpoint": "run", "checkpoint_interval": 1e6} | options)
except llc_fast.chains.processes.ProcessFailedError as error:
    late = time.time() - float(open("when").read())
    assert late < 3.0, late
    print(error)
"""


@pytest.mark.parametrize(
    ("size", "who", "how", "where"),
    [
        (2, 0, "raises", "while all wait"),
        (3, 1, "raises", "while all sample"),
        (2, 0, "raises", "while all sample"),
        pytest.param(3, 2, "raises", "in the pilots", marks=pytest.mark.slow),
        pytest.param(2, 0, "raises", "in the pilots", marks=pytest.mark.slow),
        (3, 1, "is killed", "while all sample"),
        (2, 0, "is killed", "while all sample"),
        pytest.param(3, 1, "is killed", "while all wait", marks=pytest.mark.slow),
        pytest.param(2, 0, "is killed", "while all wait", marks=pytest.mark.slow),
        pytest.param(3, 1, "is killed", "in the pilots", marks=pytest.mark.slow),
        pytest.param(2, 1, "stops the interpreter", "while all sample", marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_heard_of_at_once(tmp_path: Path, size: int, who: int, how: str, where: str) -> None:
    """The error comes out where it happened; the others stop within seconds, say which process and why, and keep what
    they have done, wherever they are themselves. Neither a minute nor the end of their own chains is waited for."""
    for rank, (code, output, errors) in enumerate(launch(tmp_path, _FAILING, size, how, who, where)):
        if rank == who:
            assert code == (-signal.SIGKILL if how == "is killed" else 1), errors
            continue
        assert code == 0, errors
        if how == "raises":
            assert output.strip() == f"rank {who} failed: ValueError: half-way"
        elif how == "stops the interpreter":
            assert output.strip() == f"rank {who} failed: SystemExit: half-way"
        elif who == 0:
            assert output.strip() == "rank 0, which holds the results, is gone: its own output says why"
        else:
            assert f"rank {who} died without a word" in output and "checkpoint=" in output
        if where == "while all sample":  # what it has done since the last snapshot is not lost
            assert read(tmp_path / f"run.rank{rank}").traces[0].step > 0


_EARLY = """
import contextlib
llc_fast.chains.processes.PATIENCE = 60.0
for options in (dict(lr=-1.0), dict(params="nowhere"), dict(device="nonsense"), dict(model=3)):
    began = time.monotonic()
    try:
        runs.estimate(num_chains=2, **options if rank == 1 else {})
    except Exception as error:
        print(type(error).__name__, error)
    assert time.monotonic() - began < 5.0
runs.estimate(num_chains=2, strategy="sequential").save(f"result.{rank}")
"""


def test_errors_before_all_have_met_are_heard_of_too(tmp_path: Path) -> None:
    """One process was given a wrong argument: the others hear of it, and all are in step in the next estimate."""
    results = launch(tmp_path, _EARLY, 3)
    all_well(results)
    (first, second, third) = (output.splitlines() for _, output, _ in results)
    assert len(second) == 4 and first == third == [
        f"ProcessFailedError rank 1 failed: {line.replace(' ', ': ', 1)}" for line in second
    ]
    assert_same(LLCResult.load(tmp_path / "result.0"), estimate(num_chains=2, strategy="sequential"))


_STOPPED = """
how = sys.argv[1]
if how == "late" and rank == 1:
    slow = weight  # this one is done long before the others and waits for them

def interrupt():
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGINT)

began = []

def observe(draw):
    if not began:
        began.append(1)
        threading.Thread(target=interrupt).start()
    return slow(draw)

partial = runs.estimate(num_chains=2, num_draws=100, strategy="sequential", observables={"weight": observe},
    checkpoint="run")
partial.save(f"partial.{rank}")
began.append(1)
slow = weight
runs.estimate(num_chains=2, num_draws=100, strategy="sequential", observables={"weight": observe},
    checkpoint="run").save(f"whole.{rank}")
"""


@pytest.mark.parametrize("how", ["all", "late"])
def test_ctrl_c_in_all_processes(tmp_path: Path, how: str) -> None:
    """Each rank returns the same partial result of all chains, also one that was done and waiting; it resumes."""
    all_well(launch(tmp_path, _STOPPED, 2, how))
    partial, whole = LLCResult.load(tmp_path / "partial.0"), LLCResult.load(tmp_path / "whole.0")
    assert_same(LLCResult.load(tmp_path / "partial.1"), partial)
    assert_same(LLCResult.load(tmp_path / "whole.1"), whole)
    assert partial.is_partial and partial.steps_done is not None
    assert 0 < partial.steps_done[0] < 104 and (partial.steps_done[1] == 104) == (how == "late")
    for chain, steps in enumerate(partial.steps_done):
        np.testing.assert_array_equal(partial.loss_trace[chain, :steps], whole.loss_trace[chain, :steps])
    assert math.isfinite(partial.llc_mean)
    assert any(w.code == "partial" and "The same call resumes it" in w for w in partial.warnings)
    assert_same(whole, estimate(num_chains=2, num_draws=100, strategy="sequential", observables={"weight": _weight}))
    assert sorted(p.name for p in tmp_path.glob("run*")) == ["run"]


# --- Checkpoints --------------------------------------------------------------------------------------------

_KILLED_ALL = """
def observe(draw):
    time.sleep(0.03)
    if draw.draw == 20 and draw.chain % 2 == 0:
        open(f"here.{draw.chain}", "w").close()
        while not (os.path.exists("here.0") and os.path.exists("here.2")):
            time.sleep(0.001)  # together: who is late would notice that the other has died, and stop by itself
        os.kill(os.getpid(), signal.SIGKILL)
    return draw.params["0.weight"]

runs.estimate(num_chains=4, num_draws=30, strategy="sequential", observables={"weight": observe}, checkpoint="run",
    checkpoint_interval=0)
"""
_RESUMED = """
result = runs.estimate(num_chains=4, num_draws=30, strategy="sequential", observables={"weight": weight},
    checkpoint="run")
assert result.diagnostics["resumed_steps"] > 20
result.save(f"result.{rank}")
"""


def test_resumed_by_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun as one process, killed as two, a run ends as one or as three with the same bits, and in one file."""
    options: dict[str, Any] = {"num_chains": 4, "num_draws": 30, "strategy": "sequential"}
    options["observables"] = {"weight": _weight}
    expected = estimate(**options)
    first = tmp_path / "first"
    first.mkdir()
    with interrupted_after(10):
        estimate(**options, checkpoint=first / "run")
    alone = (first / "run").read_bytes()
    assert [code for code, _, _ in launch(first, _KILLED_ALL, 2)] == [-signal.SIGKILL] * 2
    assert sorted(p.name for p in first.glob("run*")) == ["run", "run.rank0", "run.rank1"]
    assert (first / "run").read_bytes() == alone  # it has what no process may have written yet
    for size in (1, 3):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        for path in first.glob("run*"):
            (folder / path.name).write_bytes(path.read_bytes())
        if size == 1:
            result = estimate(**options, checkpoint=folder / "run")
            assert result.diagnostics["resumed_steps"] > 20
            assert_same(result, expected)
        else:
            all_well(launch(folder, _RESUMED, size))
            for rank in range(size):
                assert_same(LLCResult.load(folder / f"result.{rank}"), expected)
        assert [p.name for p in folder.glob("run*")] == ["run"]


# --- Agreement ----------------------------------------------------------------------------------------------

_DIFFERENCES = """
other = rank == size - 1
x, y = runs.data()
dropped = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

def versions(**changed):
    return mock.patch.multiple(llc_fast, **changed) if other else contextlib.nullcontext()

import contextlib
from unittest import mock
from llc_fast.samplers import RMSpropSGLDSampler
nothing = contextlib.nullcontext()
cases = {
    "seed": dict(seed=3 if other else 0),
    "nbeta": dict(nbeta=7.0 if other else None),
    "lr": dict(lr=2e-3 if other else 1e-3),
    "localization": dict(localization=2.0 if other else 1.0),
    "num_chains": dict(num_chains=5 if other else 4),
    "schedule": dict(num_draws=9 if other else 8),
    "batch_size": dict(batch_size=9 if other else 10),
    "sampler": dict(sampler="sghmc" if other else "sgld"),
    "eps": dict(sampler=RMSpropSGLDSampler(eps=1e-3 if other else 1e-4)),
    "observables": dict(observables={"weight": weight} if other else {}),
    "keep_ends": dict(keep_ends=other),
    "bias_correction": dict(bias_correction=other),
    "strategy": dict(strategy="sequential" if other else "batched"),
    "autocast": dict(autocast=torch.bfloat16 if other else None),
    "microbatch_size": dict(microbatch_size=5 if other else None),
    "model": dict(model=runs.mlp(seed=8 if other else 7)),
    "params": dict(params="0.*" if other else None),
    "params, dtype": dict(model=runs.mlp(torch.float64 if other else torch.float32),
        data=runs.data(dtype=torch.float64 if other else torch.float32)),
    "frozen parameters and buffers": dict(params="0.*", model=runs.initialized(runs.mlp(), 8 if other else 7)),
    "data": dict(data=(x, y + 3.0 * other)),
    "num_samples": dict(data=runs.data(39 if other else 40), nbeta=5.0),
    "loss_fn": dict(loss_fn=torch.nn.functional.l1_loss if other else torch.nn.functional.mse_loss),
    "the loss at w*": dict(loss_fn=lambda output, target: (2.0 if other else 1.0) * (output - target).square().mean()),
    "warm_start": dict(warm_start=runs.estimate(distributed=False, keep_ends=True, seed=int(other), num_chains=4)),
    "checkpoint": dict(checkpoint="run" if other else None),
}
for name, options in cases.items():
    with versions(__version__="0.0") if name == "version" else nothing:
        try:
            runs.estimate(**{"num_chains": 4} | options)
        except ValueError as error:
            print(f"{name}: {error}")
        else:
            print(f"{name}: no error")
for what in ("llc_fast", "torch"):
    with mock.patch.object(llc_fast if what == "llc_fast" else torch, "__version__", "0.0" if other else "9.9"):
        try:
            runs.estimate()
        except ValueError as error:
            print(f"version of {what}: {error}")
runs.estimate(num_chains=4, strategy="sequential").save(f"result.{rank}")  # and all is well again
"""


def test_processes_that_were_given_different_things_are_refused(tmp_path: Path) -> None:
    """In all of them, with the same words, which name the difference; and before any chain takes a step."""
    results = launch(tmp_path, _DIFFERENCES, 3)
    all_well(results)
    lines = [output.splitlines() for _, output, _ in results]
    for first, *others in zip(*lines, strict=True):
        name, _, text = first.partition(": ")
        assert "differ" in text and "rank 2" in text, first
        if name.startswith("version"):
            assert "version" in text and name.split()[-1] in text and "9.9" in text and "0.0" in text, first
        else:
            assert others == [first, first], (first, others)
            assert name.partition(",")[0] in text, first
    assert len(lines[0]) == 27
    assert_same(LLCResult.load(tmp_path / "result.2"), estimate(num_chains=4, strategy="sequential"))


# --- The store ----------------------------------------------------------------------------------------------

_LISTENING = """
import urllib.parse, warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", llc_fast.LLCWarning)
ours = set()
def see(draw):
    if rank == 0:
        inodes = set()
        for fd in os.listdir("/proc/self/fd"):
            try:
                inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:  # that of listdir itself
                pass
        for line in [*open("/proc/self/net/tcp"), *open("/proc/self/net/tcp6")]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ours.add(fields[1].partition(":")[0])
    return 0.0
if sys.argv[1] == "group":
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=rank, world_size=size)
    del os.environ["MASTER_ADDR"]
runs.estimate(observables={"see": see}, num_chains=2)
print(*ours)
"""


@pytest.mark.parametrize("how", ["launcher", "group"])
def test_the_store_listens_where_the_rendezvous_is(tmp_path: Path, how: str) -> None:
    """At 127.0.0.1 for processes that meet there, and not on all addresses of the machine."""
    results = launch(tmp_path, _LISTENING, 2, how)
    all_well(results)
    found = set(results[0][1].split())
    assert "0100007F" in found and not found & {"00000000", "0" * 32}


def test_a_foreign_address_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is not this machine's, a port that is taken, and a name that is nobody's."""
    with pytest.warns(UserWarning, match="MASTER_ADDR='192.0.2.1' is no address of this machine"):
        processes._listener("192.0.2.1", 0).close()
    taken = processes._listener("127.0.0.1", 0)
    with pytest.raises(ValueError, match=rf"^MASTER_PORT={taken.getsockname()[1]}: rank 0 can't listen"):
        processes._listener("127.0.0.1", taken.getsockname()[1])
    taken.close()
    with pytest.raises(ValueError, match=r"MASTER_ADDR=.no such machine\.invalid. is the name of no machine"):
        processes._listener("no such machine.invalid", 0)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def _garbage(store: Any, stop: threading.Event) -> None:
    """Overwrite all that can be guessed, and much that can't, as long as it lasts."""
    evil, k = pickle.dumps(_Evil()), 0
    while not stop.wait(0.01):
        k += 1
        keys = ["session", f"value/{k % 5}/1", f"value/{k % 5}/1/0", "alarm/1", "pulse/1", "answer/1", "start"]
        for key in keys:
            store.set(key, evil)
        store.add("alarms", 1)


def test_a_third_process_that_writes_to_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is never unpickled, believed or taken for a result, and the run ends as it would have."""
    monkeypatch.chdir(tmp_path)

    def work(team: Team) -> Any:
        with team.working():
            return [team.gather(team.rank + k) for k in range(3)]

    assert _teams(2, work, beside=_garbage) == [[[0, 1], [1, 2], [2, 3]]] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_third_process_that_knows_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads the store, and writes where a result belongs: nothing of it is used, and the error says so."""
    monkeypatch.chdir(tmp_path)

    def work(team: Team) -> Any:
        with team.working():
            if team.rank == 1:
                raw, key = team._store.raw, f"{team._session}/value/1/1"  # type: ignore[union-attr]
                raw.set(f"{key}/0", pickle.dumps(_Evil()))
                raw.set(key, "1")
                raw.add(f"{team._session}/alarms", 1000)
                raw.set(f"{team._session}/alarm/1", pickle.dumps(_Evil()))
                time.sleep(1.0)
                return None
            return team.gather(team.rank)

    first, _ = _teams(2, work)
    assert isinstance(first, ProcessFailedError) and "was not written by a process of this run" in str(first)
    assert list(tmp_path.iterdir()) == []


def test_other_secrets_are_refused() -> None:
    """By both, in words."""

    def work(team: Team) -> Any:
        with team.working():
            return team.gather(1)

    processes_patience = processes.PATIENCE
    processes.PATIENCE = 1.0
    try:
        found = _teams(2, work, secrets=[b"one", b"another"])
    finally:
        processes.PATIENCE = processes_patience
    for error in found:
        assert isinstance(error, ProcessFailedError) and "LLC_FAST_SECRET" in str(error)


def test_what_an_earlier_run_left_is_not_read() -> None:
    """A store that outlives processes, with the same names and the same secret: alarms, results and answers of then."""
    server = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)

    def fail(team: Team) -> Any:
        with team.working():
            team.gather(f"old {team.rank}")
            raise ValueError("of then")

    def work(team: Team) -> Any:
        time.sleep(0.3 * (1 - team.rank))  # who comes first finds only what is old
        with team.working():
            return team.gather(f"new {team.rank}")

    _teams(2, fail, server=server)
    for _ in range(3):
        assert _teams(2, work, server=server) == [["new 0", "new 1"]] * 2


def test_results_do_not_stay_in_the_store() -> None:
    """Rounds of large values: the store, which is in rank 0's memory, frees them."""
    server = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    counts = []

    def work(team: Team) -> Any:
        with team.working():
            for _ in range(5):
                team.gather(np.zeros(2**20))
                team.gather(None)
                if team.rank == 0:
                    counts.append(server.num_keys())

    _teams(2, work, server=server)
    assert counts[-1] - counts[0] <= 4 * 6 + 10  # the small keys


# --- The secret ---------------------------------------------------------------------------------------------


def test_the_secret_of_a_user_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever comes first, and read by all; in a folder and a file that nobody else can read."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda _: processes._secret_of_user(), range(64)))
    assert len(found) == 1 and len(found.pop()) == 32
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in folder.iterdir()] == ["secret"]
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["a folder of others", "a link", "a readable file", "a linked file", "no place"])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / f"llc_fast-{os.geteuid()}"
    if how == "a folder of others":
        folder.mkdir(0o755)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir(0o700)
        folder.symlink_to("elsewhere")
    elif how != "no place":
        processes._secret_of_user()
        (folder / "secret").chmod(0o644)
        if how == "a linked file":
            (folder / "secret").rename(folder / "other")
            (folder / "secret").symlink_to("other")
    if how == "no place":
        monkeypatch.setenv("XDG_RUNTIME_DIR", "")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(PermissionError, match=r"^the secret .*LLC_FAST_SECRET"):
        processes._secret_of_user()


def test_where_the_secret_is_from(monkeypatch: pytest.MonkeyPatch, no_launcher: None) -> None:
    """What the user gives; of this user on one machine; else only what the launcher says, with a warning."""
    monkeypatch.setenv("MASTER_PORT", "1234")
    mine = processes._secret_of_user()
    assert processes._secret_of_launcher(1, 2, "127.0.0.1") == mine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes._secret_of_launcher(1, 2, "192.0.2.1") == mine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.warns(UserWarning, match="share no secret.*LLC_FAST_SECRET"):
        first = processes._secret_of_launcher(0, 2, "192.0.2.1")
    assert processes._secret_of_launcher(1, 2, "192.0.2.7") == first != mine
    monkeypatch.setenv("LLC_FAST_SECRET", "of the user")
    assert processes._secret_of_launcher(0, 2, "192.0.2.1") == b"of the user"


# --- Teams --------------------------------------------------------------------------------------------------


def _teams(
    size: int,
    work: Callable[[Team], Any],
    *,
    secrets: list[bytes] | None = None,
    server: TCPStore | None = None,
    beside: Callable[[Any, threading.Event], None] | None = None,
) -> list[Any]:
    """`work` in `size` teams in threads; what each returned or raised."""
    store = TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False) if server is None else server
    found, stop = [None] * size, threading.Event()

    def run(rank: int) -> None:
        client = TCPStore("127.0.0.1", store.port, size, False)
        try:
            secret = b"secret" if secrets is None else secrets[rank]
            found[rank] = work(Team(rank, size, PrefixStore("test", client), secret))
        except BaseException as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    if beside is not None:
        third = PrefixStore("test", TCPStore("127.0.0.1", store.port, size, False))
        other = threading.Thread(target=beside, args=(third, stop), daemon=True)
        other.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "a process hangs"
    stop.set()
    if beside is not None:
        other.join()
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_chains", [1, 2, 3, 4, 16, 100])
def test_chains_are_shared_evenly(size: int, num_chains: int) -> None:
    """Every chain belongs to one process, in order, and no process has two more than another."""
    shares = [Team(rank, size).share(num_chains) for rank in range(size)]
    assert [c for share in shares for c in share] == list(range(num_chains))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [2, 5])
def test_values_are_gathered(size: int) -> None:
    """In the order of ranks, round after round, whatever they are: nothing, arrays, tens of megabytes."""

    def work(team: Team) -> Any:
        with team.working():
            large = np.full(9 * 2**20 if team.rank == 1 else 3, team.rank, dtype=np.uint8)
            rounds = [team.gather(v) for v in (team.rank, None, {"λ": [team.rank] * 3}, b"", large)]
        return rounds[:-1], [(len(a), set(a[:: 2**20].tolist())) for a in rounds[-1]]

    for rounds, arrays in _teams(size, work):
        assert rounds == [list(range(size)), [None] * size, [{"λ": [r] * 3} for r in range(size)], [b""] * size]
        assert arrays == [(9 * 2**20 if r == 1 else 3, {r}) for r in range(size)]


def test_one_process_gathers_its_own() -> None:
    """Without a store nothing is exchanged, and nothing is pickled."""
    value = lambda: None  # noqa: E731
    assert Team().gather(value) == [value]


def test_processes_that_are_slow_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life count, not time: a process may work for many times `PATIENCE`."""
    monkeypatch.setattr(processes, "PATIENCE", 1.5)

    def work(team: Team) -> Any:
        with team.working():
            time.sleep(3.0 if team.rank == 1 else 0.0)
            return team.gather(team.rank)

    assert _teams(2, work) == [[0, 1], [0, 1]]


def test_failures_are_seen_whoever_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank fails while the first still works: who waits for both does not wait for the first."""
    first_may_end = threading.Event()

    def work(team: Team) -> Any:
        with team.working():
            if team.rank == 2:
                raise ValueError("λ is out of range")
            if team.rank == 0:
                assert first_may_end.wait(TIMEOUT)
            try:
                return team.gather(team.rank)
            finally:
                first_may_end.set()

    first, second, third = _teams(3, work)
    assert isinstance(third, ValueError)
    assert isinstance(second, ProcessFailedError) and str(second) == "rank 2 failed: ValueError: λ is out of range"
    assert isinstance(first, ProcessFailedError) and "λ is out of range" in str(first)


def test_the_silent_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never appears is named after `PATIENCE` seconds."""
    monkeypatch.setattr(processes, "PATIENCE", 0.5)

    def work(team: Team) -> Any:
        if team.rank == 1:
            return None
        with team.working():
            return team.gather(team.rank)

    error, _ = _teams(2, work)
    assert isinstance(error, ProcessFailedError) and "rank 1 has not been heard of for 2 s" in str(error)


# --- Joining ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_has_nothing_to_join(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """distributed=True without others is an error that says how to start them; None and False are one process."""
    with pytest.raises(ValueError, match=r"distributed=True, but there is one process: start it with torchrun"):
        estimate(distributed=True)
    assert (processes.join(None).size, processes.join(False).size) == (1, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # a scheduler's, without an address and a rank
    assert processes.join(None).size == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)  # torchrun --nproc-per-node 1
    assert processes.join(None).size == 1
    with pytest.raises(ValueError, match="there is one process"):
        processes.join(True)


def test_processes_may_stay_alone(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """distributed=False asks nobody, under torchrun too, and no rank is in the checkpoint's name."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert_same(estimate(distributed=False), estimate(distributed=False))
    assert len(estimate(distributed=False).loss_trace) == 3
