"""What may happen to a run: it is killed, interrupted, or loses chains; and what is left of it then."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import TIMEOUT, Script, assert_same, data, estimate, happened, initialized, interrupted_after, mlp, mse
from torch import Tensor, nn

import llc_fast
from llc_fast.chains.checkpoint import Checkpoint, Saved
from llc_fast.chains.draw import Draw
from llc_fast.chains.run import Monitor, StepTaken, after_each_step
from llc_fast.result import LLCResult


def _weight(draw: Draw) -> Tensor:
    return draw.params["0.weight"]


# --- Killed -------------------------------------------------------------------------------------------------

_KILLED = """
began = []

def weight(draw):
    if not began:
        began.append(1)
        print("samples", flush=True)
    time.sleep(0.001)
    return draw.params["0.weight"]

strategy, threads, draws = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
llc_fast.chains.run.Monitor.interval = 0.01
result = runs.estimate(
    sampler="sgnht", num_draws=draws, num_burnin=20, strategy=strategy, observables={"weight": weight},
    checkpoint="run", checkpoint_interval=0.01,
)
result.save("result")
print(result.diagnostics["resumed_steps"])
"""


def _killed(tmp_path: Path, kills: int, strategy: str, threads: int) -> None:
    draws, rng = 150 * kills, np.random.default_rng(kills)
    for _ in range(kills):
        process = Script(_KILLED, tmp_path, strategy, threads, draws)
        process.wait_for("samples")
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        assert process.finish()[0] == -signal.SIGKILL
    code, output, errors = Script(_KILLED, tmp_path, strategy, threads, draws).finish()
    assert code == 0, errors
    assert int(output.split()[-1]) > 0
    expected = estimate(
        sampler="sgnht", num_draws=draws, num_burnin=20, strategy=strategy, observables={"weight": _weight}
    )
    assert_same(LLCResult.load(tmp_path / "result"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result", "run"]


def test_killed_three_times(tmp_path: Path) -> None:
    """kill -9 at random moments: each start goes on, and the end has the bits of a run that nobody touched."""
    _killed(tmp_path, 3, "sequential", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "threads"), [("sequential", 1), ("sequential", 3), ("batched", 1)])
def test_killed_twenty_times(tmp_path: Path, strategy: str, threads: int) -> None:
    """The same with twenty kills, one chain after another, side by side and batched."""
    _killed(tmp_path, 20, strategy, threads)


# --- Interrupted --------------------------------------------------------------------------------------------

_INTERRUPTED = """
def send(delay):
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)

def weight(draw):
    if draw.draw == 50 and draw.chain == 0:
        threading.Thread(target=send, args=(0,)).start()
    time.sleep(0.002)
    return draw.params["0.weight"]

result = runs.estimate(num_draws=100_000, observables={"weight": weight}, progress=True, strategy=sys.argv[1])
assert result.is_partial and 50 <= max(result.steps_done) < 50_000
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
result.save("result")
print(result)

def hangs(draw):
    if draw.draw == 10:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    return 0.0

try:
    runs.estimate(num_draws=100_000, observables={"hangs": hangs})
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("a second one raises")
"""


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_ctrl_c(tmp_path: Path, strategy: str) -> None:
    """SIGINT ends the call with a partial result and the process goes on, with no error; a second one raises."""
    code, output, errors = Script(_INTERRUPTED, tmp_path, strategy).finish()
    assert code == 0, errors
    assert "Traceback" not in errors
    assert "WARNING: The run was interrupted after" in output and "λ̂ is computed from the draws so far" in output
    assert output.splitlines()[-1] == "a second one raises"
    loaded = LLCResult.load(tmp_path / "result")
    assert loaded.is_partial and math.isfinite(loaded.llc_mean)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("count", [5, 9, 11])
def test_estimate_of_the_draws_so_far(monkeypatch: pytest.MonkeyPatch, strategy: str, count: int) -> None:
    """λ̂ of a partial result is nβ·(mean L − L(w*)) over the draws that there are, and the trace that of the whole."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options: dict[str, Any] = {"strategy": strategy, "observables": {"weight": _weight}}
    try:
        whole = estimate(**options)
        with interrupted_after(count):
            partial = estimate(**options)
    finally:
        torch.set_num_threads(threads)
    assert partial.steps_done == ([count, 0, 0] if strategy == "sequential" else [count] * 3)
    going = [c for c, steps in enumerate(partial.steps_done) if steps]
    np.testing.assert_array_equal(partial.loss_trace[going, :count], whole.loss_trace[going, :count])
    assert np.isnan(partial.loss_trace[:, count:]).all()
    draws = whole.llc_trace[going, : count - 4]
    assert partial.llc_mean == pytest.approx(draws.mean(), rel=1e-12)
    np.testing.assert_allclose(partial.llc_per_chain[going], draws.mean(axis=1))
    np.testing.assert_array_equal(
        partial.observables["weight"][going, : count - 4], whole.observables["weight"][going, : count - 4]
    )
    assert np.isnan(partial.observables["weight"][:, count - 4 :]).all()
    assert partial.diverged_chains == [] and partial.diagnostics["chains_diverged"] == 0
    (warning,) = happened(partial)
    assert f"interrupted after {count * len(going)} of 36 steps" in warning
    assert "λ̂ is computed from the draws so far" in warning and "resumes" not in warning and warning.code == "partial"


def _everything_works(result: LLCResult, folder: Path) -> None:
    """All that a result can do, for one that has gaps."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("xarray")
    result.save(folder / "result")
    loaded = LLCResult.load(folder / "result")
    assert_same(loaded, result)
    assert (loaded.is_partial, loaded.diverged_chains, loaded.warnings) == (
        result.is_partial,
        result.diverged_chains,
        result.warnings,
    )
    assert loaded.summary() == result.summary() == str(result)
    assert all(f"WARNING: {w}" in str(result) for w in result.warnings)
    result.plot(folder / "plot.png")
    exported = result.to_xarray()
    np.testing.assert_array_equal(exported["loss"].values, result.loss_trace)
    np.testing.assert_equal(exported.attrs["llc_mean"], result.llc_mean)
    low, high = result.interval()
    assert math.isnan(result.llc_stderr) == math.isnan(high - low)
    if math.isfinite(result.llc_mean):
        pytest.importorskip("arviz")
        assert np.isfinite(result.to_arviz().posterior["llc"].values).all()


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("count", [1, 4])
def test_interrupted_before_the_first_draw(tmp_path: Path, strategy: str, count: int) -> None:
    """During burn-in: the second half of what there is, with words; after one step nothing; the same call resumes."""
    options: dict[str, Any] = {"strategy": strategy, "observables": {"weight": _weight}}
    whole = estimate(**options)
    with interrupted_after(count):
        partial = estimate(**options, checkpoint=tmp_path / "run")
    assert partial.is_partial and partial.settings["num_burnin"] == 4 and partial.settings["num_draws"] == 8
    warning = next(w for w in partial.warnings if w.code == "partial")
    assert "The same call resumes it." in warning and "(interrupted)" in partial.summary()
    if count == 1:
        assert math.isnan(partial.llc_mean) and "there is no draw yet" in warning and "nan" in partial.summary()
    else:
        going = slice(0, 1) if strategy == "sequential" else slice(0, 3)
        known = whole.nbeta * (whole.loss_trace[going, 2:4].mean() - whole.init_loss)
        assert partial.llc_mean == pytest.approx(known, rel=1e-9)
        assert "second half of burn-in" in warning and "too low" in warning
    assert partial.diverged_chains == []
    _everything_works(partial, tmp_path)
    assert_same(estimate(**options, checkpoint=tmp_path / "run"), whole)


@pytest.mark.parametrize("count", [1, 30])
def test_interrupted_in_calibration(tmp_path: Path, count: int) -> None:
    """What pilot chains had chosen by then comes back, in words and numbers; the same call starts again."""
    options: dict[str, Any] = {"lr": None, "num_draws": 100, "num_burnin": 100}
    with _interrupted_pilot(count):
        partial = estimate(**options, checkpoint=tmp_path / "run")
    assert partial.is_partial and math.isnan(partial.llc_mean) and partial.steps_done == [0, 0, 0]
    assert partial.settings["lr"] > 0 and partial.settings["localization"] == 1.0
    (warning,) = [w for w in partial.warnings if w.code == "partial"]
    assert f"interrupted in calibration, before its first step. lr={partial.settings['lr']:.3g}" in warning
    _everything_works(partial, tmp_path)
    assert_same(estimate(**options, checkpoint=tmp_path / "run"), estimate(**options))
    with _interrupted_pilot(count):
        found = llc_fast.calibrate(mlp(), data(), mse, num_draws=100, num_burnin=100, num_chains=3, progress=False)
    assert found["lr"] > 0 and "when they were interrupted" in found.reason


@contextlib.contextmanager
def _interrupted_pilot(count: int) -> Iterator[None]:
    """SIGINT comes after the `count`-th step of the pilot chains."""
    left = iter(range(count - 1, -1, -1))

    def interrupt(taken: StepTaken) -> None:
        if taken.is_pilot and next(left, None) == 0:
            signal.raise_signal(signal.SIGINT)

    with after_each_step(interrupt):
        yield


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("count", [6, 15, 30])
def test_partial_results_can_do_what_others_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, count: int
) -> None:
    """They are saved, loaded, drawn, exported and summarized, with one draw or many, of one chain or all."""
    with interrupted_after(count):
        partial = estimate(strategy=strategy, num_draws=40, observables={"weight": _weight})
    assert partial.is_partial and math.isfinite(partial.llc_mean)
    _everything_works(partial, tmp_path)


def test_interrupted_in_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was done anyway is whole, with no warning."""
    expected = estimate(strategy="batched")
    with interrupted_after(12):
        result = estimate(strategy="batched")
    assert not result.is_partial and happened(result) == []
    assert_same(result, expected)


def test_somebody_else_takes_care_of_ctrl_c() -> None:
    """A program with its own handler keeps it: the run is not stopped."""
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))

    def send(draw: Draw) -> float:
        if draw.draw == 2 and draw.chain == 0:
            signal.raise_signal(signal.SIGINT)
        return 0.0

    result = estimate(observables={"send": send})
    assert seen == [1] and not result.is_partial


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_exceptions_of_the_users_functions_come_out(strategy: str, failure: type[BaseException]) -> None:
    """With threads too, and Ctrl-C works as before afterwards."""

    def observe(draw: Draw) -> float:
        if draw.chain == 2 and draw.draw == 1:
            raise failure("of the user")
        return 0.0

    with pytest.raises(failure, match="of the user"):
        estimate(strategy=strategy, observables={"observe": observe})
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted_while_it_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step there is nothing to return: Ctrl-C raises as usual."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return mse(output, target)

    with pytest.raises(KeyboardInterrupt):
        estimate(loss_fn=loss)


# --- Lost chains --------------------------------------------------------------------------------------------


class _Fragile(nn.Module):
    """A network that is NaN once a weight has gone further from w* than `reach`; its loss is another's otherwise."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.net, self.reach = mlp(), reach
        self.start = self.net[2].bias.detach().clone()  # type: ignore[index,union-attr,operator]

    def forward(self, x: Tensor) -> Tensor:
        gone = (self.net[2].bias - self.start).abs() - self.reach  # type: ignore[index,operator]
        return self.net(x) + torch.where(gone > 0, torch.nan, 0.0)


def _distance(draw: Draw) -> Tensor:
    return (draw.params["net.2.bias"] - initialized(mlp())[2].bias).abs().max()  # type: ignore[index]


_LONG: dict[str, Any] = {"num_chains": 4, "num_draws": 100, "num_burnin": 0, "observables": {"distance": _distance}}


def _reaches(strategy: str) -> list[float]:
    """How far each of the chains goes, the shortest way first."""
    whole = estimate(model=_Fragile(math.inf), strategy=strategy, **_LONG)
    assert whole.diverged_chains == []
    return sorted(whole.observables["distance"].max(axis=1))


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("lost", [1, 2])
def test_diverged_chains_are_left_out(tmp_path: Path, strategy: str, lost: int) -> None:
    """What the others do, and λ̂ from them, is what it would be without those that became NaN."""
    reaches = _reaches(strategy)
    result = estimate(
        model=_Fragile((reaches[3 - lost] + reaches[4 - lost]) / 2),
        strategy=strategy,
        checkpoint=tmp_path / "run",
        **_LONG,
    )
    whole = estimate(model=_Fragile(math.inf), strategy=strategy, **_LONG)
    far = whole.observables["distance"].max(axis=1).argsort()[4 - lost :]
    assert result.diverged_chains == sorted(far) and result.diagnostics["chains_diverged"] == lost
    kept = [c for c in range(4) if c not in far]
    np.testing.assert_array_equal(result.loss_trace[kept], whole.loss_trace[kept])
    np.testing.assert_array_equal(result.observables["distance"][kept], whole.observables["distance"][kept])
    assert result.llc_mean == pytest.approx(whole.llc_trace[kept].mean(), rel=1e-12)
    assert np.isnan(result.llc_per_chain[far]).all() and np.isfinite(result.llc_per_chain[kept]).all()
    for chain in far:  # as it was, up to where it was lost; NaN from there on
        good = int(np.isfinite(result.loss_trace[chain]).argmin())
        np.testing.assert_array_equal(result.loss_trace[chain, :good], whole.loss_trace[chain, :good])
        assert np.isnan(result.loss_trace[chain, good:]).all()
    (warning,) = happened(result)
    assert warning.code == "diverged" and f"{lost} of 4 chains diverged" in warning and "use lr=" in warning
    assert f"({lost} diverged)" in result.summary()
    _everything_works(result, tmp_path)
    again = estimate(
        model=_Fragile((reaches[3 - lost] + reaches[4 - lost]) / 2),
        strategy=strategy,
        checkpoint=tmp_path / "run",
        **_LONG,
    )
    assert_same(again, result)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("lost", [3, 4])
def test_too_few_are_left(tmp_path: Path, strategy: str, lost: int) -> None:
    """From fewer than half of the chains there is no estimate: NaN, and words that say so."""
    reach = 0.0 if lost == 4 else sum(_reaches(strategy)[:2]) / 2
    result = estimate(model=_Fragile(reach), strategy=strategy, **_LONG)
    assert len(result.diverged_chains) == lost
    assert math.isnan(result.llc_mean) and math.isnan(result.llc_stderr)
    assert int(np.isfinite(result.llc_per_chain).sum()) == 4 - lost
    (warning,) = result.warnings
    assert (
        warning.code == "diverged"
        and f"{lost} of 4 chains diverged" in warning
        and "too few are left for an estimate" in warning
    )
    _everything_works(result, tmp_path)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_diverged_chains_are_stopped(strategy: str) -> None:
    """Nothing is sampled for long once a chain, or all of a batch, is lost for good."""
    steps: list[StepTaken] = []
    with after_each_step(steps.append):
        result = estimate(model=_Fragile(0.0), strategy=strategy, num_chains=2, num_draws=10_000)
    assert result.diverged_chains == [0, 1]
    assert len(steps) <= (128 if strategy == "sequential" else 64)


@pytest.mark.parametrize("observed", [False, True])
def test_lost_in_burn_in(observed: bool) -> None:
    """Chains that never came to a draw have no observable and no estimate; those that did have theirs."""
    options: dict[str, Any] = {"num_burnin": 200, "num_draws": 5, "num_chains": 3, "strategy": "sequential"}
    options["observables"] = {"distance": _distance} if observed else None
    trace = estimate(
        model=_Fragile(math.inf), num_chains=3, num_burnin=0, num_draws=205, strategy="sequential",
        observables={"distance": _distance},
    )  # fmt: skip
    reaches = trace.observables["distance"].max(axis=1)
    first, second = np.sort(reaches)[-2:]
    result = estimate(model=_Fragile((first + second) / 2), **options)
    lost = int(reaches.argmax())
    assert result.diverged_chains == [lost]
    if observed:
        finite = np.isfinite(result.observables["distance"]).all(axis=1)
        assert finite.tolist() == [c != lost for c in range(3)]
    nothing = estimate(model=_Fragile(0.0), **options)
    assert nothing.diverged_chains == [0, 1, 2] and nothing.observables == {}


def test_lost_and_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial result of chains of which some are lost: λ̂ from the draws of the others."""
    options = _LONG | {"strategy": "batched"}
    reaches = _reaches("batched")
    model = _Fragile((reaches[2] + reaches[3]) / 2)
    whole = estimate(model=model, **options)
    with interrupted_after(95):
        partial = estimate(model=model, **options, checkpoint=tmp_path / "run")
    kept = [c for c in range(4) if c not in whole.diverged_chains]
    assert partial.is_partial and len(kept) == 3
    assert partial.llc_mean == pytest.approx(whole.llc_trace[kept, :95].mean(), rel=1e-12)
    _everything_works(partial, tmp_path)
    assert_same(estimate(model=model, **options, checkpoint=tmp_path / "run"), whole)


def test_a_loss_that_overflows(tmp_path: Path) -> None:
    """Infinite losses count as lost, even where a later one would be finite again."""
    x, y = data()
    result = estimate(data=(x, y), lr=1e3, num_draws=100, num_burnin=0)
    assert result.diverged_chains == [0, 1, 2]
    for row in result.loss_trace:
        finite = np.isfinite(row)
        assert not finite.all() and not finite[finite.argmin() :].any()
        assert not np.isinf(row).any()
    _everything_works(result, tmp_path)


# ---- seams -------------------------------------------------------------------------------------------------


def test_every_step_is_heard_of_and_nobody_listens_afterwards() -> None:
    """Pilot chains too, and also where what listens raises."""
    steps: list[StepTaken] = []
    with after_each_step(steps.append):
        result = estimate(lr=None, num_draws=140, num_burnin=60)
    pilots = [taken for taken in steps if taken.is_pilot]
    assert len(pilots) == result.diagnostics["pilot_steps"]
    taken = sorted((chain, s.step) for s in steps if not s.is_pilot for chain in s.chains)
    assert taken == [(chain, step) for chain in range(3) for step in range(200)]

    def fail(taken: StepTaken) -> None:
        raise LookupError("from outside")

    with pytest.raises(LookupError, match="from outside"), after_each_step(fail):
        estimate()
    assert not estimate().is_partial


@pytest.fixture
def always_saving(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """Two workers, and a checkpoint that is due whenever somebody looks."""
    monkeypatch.setattr(Checkpoint, "is_due", True)
    monkeypatch.setattr(Monitor, "interval", 0.001)


@pytest.mark.usefixtures("always_saving")
def test_no_chain_waits_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers go on stepping during a write that takes as long as they like."""
    steps: list[StepTaken] = []
    during: list[int] = []
    save = Checkpoint.save

    def slow(keeper: Checkpoint, saved: Saved) -> None:
        if not during:  # the first one takes until both workers have moved on, which they would not under a lock
            before, deadline = len(steps), time.monotonic() + TIMEOUT
            while len({s.chains[0] for s in steps[before:]}) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            during.append(len({s.chains[0] for s in steps[before:]}))
        save(keeper, saved)

    monkeypatch.setattr(Checkpoint, "save", slow)
    with after_each_step(lambda taken: (steps.append(taken), time.sleep(0.002))):  # slow enough to be overtaken
        result = estimate(strategy="sequential", num_chains=2, num_draws=300, checkpoint=tmp_path / "run")
    assert result.diagnostics["workers"] == 2 and during == [2]


@pytest.mark.usefixtures("always_saving")
def test_a_snapshot_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that waited when it was taken are in it as they were, though they have begun by the time it is written."""
    steps: list[StepTaken] = []
    found: list[list[tuple[int, bool]]] = []
    save = Checkpoint.save

    def late(keeper: Checkpoint, saved: Saved) -> None:
        if not found:
            deadline = time.monotonic() + TIMEOUT
            while not any(s.chains[0] >= 2 for s in steps) and time.monotonic() < deadline:
                time.sleep(0.001)
            found.append([(t.step, t.state is not None) for t in saved.traces])
        save(keeper, saved)

    monkeypatch.setattr(Checkpoint, "save", late)
    with after_each_step(lambda taken: (steps.append(taken), time.sleep(0.002))):  # slow enough to be overtaken
        estimate(strategy="sequential", num_chains=4, num_draws=40, checkpoint=tmp_path / "run")
    [(first, waiting)] = [(traces[:2], traces[2:]) for traces in found]
    assert waiting == [(0, False)] * 2 and all(step > 0 and has_state for step, has_state in first)
