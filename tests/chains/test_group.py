"""Runs that are stopped at awkward moments, and options that arrive by an unusual way."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from runs import data, estimate, mlp, mse
from torch import Tensor, nn

import llc_fast
from llc_fast.chains import checkpoint
from llc_fast.chains.group import RunSpec
from llc_fast.chains.run import Monitor, StepTaken, after_each_step, run_chains
from llc_fast.data import make_source
from llc_fast.gradients.plan import make_plan
from llc_fast.objective.objective import Objective
from llc_fast.samplers import SGLDSampler
from llc_fast.schedule import Schedule
from llc_fast.settings import Settings
from llc_fast.support.runtime import Stop, threads
from llc_fast.traces import Traces

_CPU = torch.device("cpu")


def _spec(num_chains: int, **options: Any) -> RunSpec:
    objective = Objective(mlp(), mse, make_source(data(), 10, _CPU), device=_CPU)
    sampler = SGLDSampler(lr=1e-3, nbeta=10.0, localization=1.0)
    plan = make_plan(objective, sampler, num_chains, strategy="sequential")
    return RunSpec(objective, sampler, Schedule(8, 4), plan, seed=0, **options)


@contextlib.contextmanager
def _stopping(stop: Stop, at: int) -> Any:
    def look(taken: StepTaken) -> None:
        if taken.step == at:
            stop.set()

    with after_each_step(look):
        yield


@pytest.mark.parametrize("num_chains", [1, 3])
def test_a_stop_before_the_first_resumed_step_keeps_where_the_chains_are(num_chains: int) -> None:
    spec, chains = _spec(num_chains), range(num_chains)
    whole = run_chains(spec, chains)
    stop = Stop()
    with _stopping(stop, 5):
        first = run_chains(spec, chains, stop=stop)
    assert first.interrupted
    again = run_chains(spec, chains, resumed=first.traces, stop=stop)  # Ctrl-C came while the chains were set up
    assert again.interrupted and all(t.step == 0 or t.state is not None for t in again.traces)
    last = run_chains(spec, chains, resumed=again.traces)
    np.testing.assert_array_equal(Traces.stack(last.traces).loss, Traces.stack(whole.traces).loss)


class _Snapshots(Monitor):
    """Asks for a snapshot at every step."""

    interval = 0.0

    def __init__(self) -> None:
        self.seen: list[list[Traces]] = []

    def wants_snapshot(self) -> bool:
        return True

    def snapshot(self, traces: list[Traces]) -> None:
        self.seen.append([t.copy() for t in traces])


def test_every_snapshot_says_where_the_chains_that_are_done_ended() -> None:
    monitor = _Snapshots()
    with threads(1):  # one chain after the other
        spec = _spec(3, keep_ends=True)
        run_chains(spec, range(3), monitor=monitor)
    done = [t for traces in monitor.seen for t in traces if t.step == spec.schedule.num_steps]
    assert len(done) > 3 and all(t.ends is not None for t in done)


def test_an_estimate_killed_right_after_a_snapshot_still_has_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.npz"
    monkeypatch.setattr(Monitor, "interval", 0.0)

    class KilledError(Exception):
        pass

    def kill(taken: StepTaken) -> None:
        if taken.chains.start == 0 and taken.step == 11:
            time.sleep(0.3)  # until the next snapshot is due
        if taken.chains.start == 1 and taken.step == 0:
            raise KilledError

    options: dict[str, Any] = {"strategy": "sequential", "keep_ends": True, "num_chains": 2}
    whole = estimate(**options)
    with threads(1), pytest.raises(KilledError), after_each_step(kill):  # one chain after the other
        estimate(**options, checkpoint=file, checkpoint_interval=0.0)
    resumed = estimate(**options, checkpoint=file)
    assert whole.ends is not None and resumed.ends is not None
    for name, ends in whole.ends.items():
        np.testing.assert_array_equal(resumed.ends[name], ends)


@dataclasses.dataclass(frozen=True)
class _Careful(SGLDSampler):
    """A user's own sampler under the name of the one that it derives from."""

    supports_bias_correction: ClassVar[bool] = False


def test_a_sampler_object_of_a_derived_class_stays_what_it_is() -> None:
    settings = Settings(sampler=_Careful(noise_level=0.5), lr=1e-3)
    assert type(settings.template) is type(settings.complete_sampler(1e-3, 10.0)) is _Careful
    assert settings.template.noise_level == 0.5 and settings.template.localization is None


def test_calibrate_chooses_a_step_size_also_for_a_sampler_object_that_has_one() -> None:
    options: dict[str, Any] = {"num_draws": 50, "num_burnin": 50, "batch_size": 10, "num_chains": 2}
    by_name = llc_fast.calibrate(mlp(), data(), mse, sampler="sgld", **options)
    by_object = llc_fast.calibrate(mlp(), data(), mse, sampler=SGLDSampler(lr=123.0), **options)
    assert by_object["lr"] == by_name["lr"] != 123.0
    own = llc_fast.calibrate(mlp(), data(), mse, sampler=_Careful(), **options)["sampler"]
    assert type(own) is _Careful


class _Slope(nn.Module):
    """Its loss falls from w* on, in every direction that chains take."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return -1e3 * self.w.square() + 0 * x[:, :1]


def test_pilots_that_find_no_higher_loss_say_so() -> None:
    options: dict[str, Any] = {"num_draws": 300, "num_chains": 4, "num_burnin": 300}
    found = llc_fast.calibrate(_Slope(), data(), lambda out, target: out.mean(), sampler="sgld", **options)
    assert "no loss above" in found.reason


def test_resumed_steps_counts_each_chain_once(tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    estimate(checkpoint=file)
    saved = checkpoint.read(file)
    # What two processes leave beside the file of an earlier run of one process.
    for rank in range(2):
        checkpoint.write(tmp_path / f"run.npz.rank{rank}", saved)
    again = estimate(checkpoint=file)
    assert again.diagnostics["resumed_steps"] == again.loss_trace.size


def test_bias_correction_by_both_of_its_names_is_refused() -> None:
    with pytest.raises(TypeError, match="heat_correction"):
        estimate(bias_correction=True, heat_correction=False)


def test_an_error_of_the_only_strategy_left_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in a sequential chain leaves nothing to fall back to."""
    from llc_fast.chains import group

    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(group, "make_gradient", fail)
    spec = _spec(1)
    spec = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, is_given=False))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_chains(spec, range(1))


class _Unbatchable(nn.Module):
    """Writes to memory of its own, which vmap refuses and a replay does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 1)
        out.copy_(self.inner(x))
        return out


def test_chains_that_turn_out_not_to_be_batchable_run_side_by_side() -> None:
    objective = Objective(_Unbatchable(), mse, make_source(data(), 10, _CPU), device=_CPU)
    sampler = SGLDSampler(lr=1e-3, nbeta=10.0, localization=1.0)
    seen: set[int] = set()
    with threads(2), after_each_step(lambda _: seen.add(torch.get_num_threads())):
        plan = make_plan(objective, sampler, 3)
        run = run_chains(RunSpec(objective, sampler, Schedule(2, 0), plan, seed=0), range(3))
    assert (plan.strategy, plan.num_threads) == ("batched", 1)
    assert run.plan.strategy == "sequential" and run.plan.replay and not run.note
    assert run.plan.num_workers == 2 and seen == {1}


def test_a_run_that_fell_back_resumes_where_its_chains_have_got_to() -> None:
    """Chain 0 has begun, so it is a group of its own, which can be "batched"; the others can't."""
    objective = Objective(_Unbatchable(), mse, make_source(data(), 10, _CPU), device=_CPU)
    sampler = SGLDSampler(lr=1e-3, nbeta=10.0, localization=1.0)
    stop = Stop()
    with threads(1):
        spec = RunSpec(objective, sampler, Schedule(8, 4), make_plan(objective, sampler, 3), seed=0)
        whole = run_chains(spec, range(3))
        with _stopping(stop, 5):
            first = run_chains(spec, range(3), stop=stop)
        assert [t.step for t in first.traces] == [6, 0, 0]
        last = run_chains(spec, range(3), resumed=first.traces)
    np.testing.assert_array_equal(Traces.stack(last.traces).loss, Traces.stack(whole.traces).loss)


def test_progress_leaves_diverged_chains_out() -> None:
    """Two chains of one group, one of which is thrown to where its loss is infinite."""
    seen: list[float] = []

    class Cliff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x.mean(dim=1, keepdim=True) + torch.where(self.w > 0.02, torch.inf, 0.0)

    result = estimate(
        model=Cliff(), num_chains=8, num_draws=60, num_burnin=1, strategy="batched", lr=1e-5,
        progress=lambda done, total, llc: seen.append(llc),
    )  # fmt: skip
    assert 0 < len(result.diverged_chains) < 8
    assert np.isfinite(seen[-1])


@pytest.mark.parametrize("optimizer", [llc_fast.RMSpropSGLD, llc_fast.AdamSGLD])
def test_a_metric_that_has_seen_nothing_is_not_frozen(optimizer: Any) -> None:
    chain = optimizer([nn.Parameter(torch.ones(3))], seed=0)
    with pytest.raises(RuntimeError, match="before the first step"):
        chain.freeze()
