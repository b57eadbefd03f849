"""Chains spread over processes: the same chains as in one, whole results everywhere, and deaths that are noticed."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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
    for name in ("sequential", "batched", "few", "lost", "adjusted"):  # merged: one file with all chains
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
        runs.estimate(**{"num_chains": 3, "strategy": "sequential", "observables": {"fails": fails}, "checkpoint": "run",
            "checkpoint_interval": 1e6} | options)
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
    time.sleep(0.01)
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


# --- Teams --------------------------------------------------------------------------------------------------


def _teams(size: int, work: Callable[[Team], Any]) -> list[Any]:
    """`work` in `size` teams in threads; what each returned or raised."""
    store, found = TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False), [None] * size

    def run(rank: int) -> None:
        client = TCPStore("127.0.0.1", store.port, size, False)
        try:
            found[rank] = work(Team(rank, size, PrefixStore("test", client)))
        except BaseException as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "a process hangs"
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
    assert isinstance(error, ProcessFailedError) and "rank 1 has not been heard of for 0 s" in str(error)


def test_what_a_restart_left_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store when it starts all processes again: the failure before is none of theirs."""
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    monkeypatch.setattr(processes, "_store", lambda rank, size: store)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    found = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        monkeypatch.setattr(processes, "_counter", 0)
        team = processes.join(None)
        with pytest.raises(RuntimeError, match="of this attempt"), team.working():
            found.append(team._store.check(["failed/0"]))  # type: ignore[union-attr]
            raise RuntimeError("of this attempt")
        assert team._store.check(["failed/0"])  # type: ignore[union-attr]
    assert found == [False, False]


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
