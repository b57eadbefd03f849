"""Strategies: however gradients are computed, the chains are the same; what can't be done falls back and says why."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, made
from numpy.typing import NDArray
from problems import MODELS, N, estimate, make_problem, mlp
from runs import interrupted_after
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

import llc_fast
from llc_fast.gradients import plan, strategies
from llc_fast.samplers import samplers_with_optimizer

pytestmark = pytest.mark.usefixtures("two_threads")

STEPPED = samplers_with_optimizer()
# Chains contract towards w*: rounding differences do not grow, so a few hundred units in the last place are ample.
RTOL = {torch.float64: 1e-11, torch.float32: 2e-4}


def _trace(model: nn.Module, data: Any, loss_fn: Any, **options: Any) -> NDArray[np.float64]:
    trace = estimate(model, data, loss_fn, **options).loss_trace
    assert np.isfinite(trace).all() and np.ptp(trace) > 0
    return trace


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NDArray[np.float64]]:
    """The trace by ordinary autograd, one chain after another, with nothing recorded: what all others must give."""

    def trace(*arguments: Any, **options: Any) -> NDArray[np.float64]:
        with monkeypatch.context() as patch:
            patch.setattr(plan, "_REPLAYED_FLOPS", -1)
            result = estimate(*arguments, strategy="sequential", **options)
        assert result.settings["strategy"] == "sequential" and result.diagnostics["workers"] == 1
        return result.loss_trace

    return trace


Plainly = Callable[..., NDArray[np.float64]]
ADAPTIVE = {"adapt_steps": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgld": {"weight_decay": 0.1, "bounding_box_size": 0.2},
    "preconditioned-sgld": {"preconditioner": 0.7},
    "rmsprop-sgld": ADAPTIVE,
    "adam-sgld": ADAPTIVE,
    "sghmc": {},
    "sgnht": {},
}

# --- The same chains, whatever the strategy -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sequential", "batched", None])
@pytest.mark.parametrize("model", MODELS)
def test_every_model(model: str, strategy: str | None, plainly: Plainly) -> None:
    """Minibatches and full batches, in double precision, to rounding; what was asked for is what was done."""
    problem = make_problem(model)
    for batch_size in (8, N):
        result = estimate(*problem, strategy=strategy, batch_size=batch_size)
        expected = plainly(*problem, batch_size=batch_size)
        np.testing.assert_allclose(result.loss_trace, expected, rtol=RTOL[torch.float64])
        assert result.settings["strategy"] == (strategy or "batched")
        assert "not recorded" not in result.diagnostics["strategy_reason"]


@pytest.mark.parametrize("strategy", ["sequential", "batched", None])
@pytest.mark.parametrize("sampler", STEPPED)
def test_every_sampler(sampler: str, strategy: str | None, plainly: Plainly) -> None:
    """Momenta, metrics and thermostats are each chain's own."""
    options = {"sampler": sampler, "sampler_options": OPTIONS[sampler], "nbeta": 5.0}
    for model in ("mlp", "transformer"):
        found = _trace(*make_problem(model), strategy=strategy, **options)
        np.testing.assert_allclose(found, plainly(*make_problem(model), **options), rtol=RTOL[torch.float64])


@pytest.mark.parametrize("sampler", [name for name, cls in STEPPED.items() if cls.metric == "adaptive"])
def test_relative_eps_runs_one_chain_at_a_time(sampler: str, plainly: Plainly) -> None:
    """The scale of each chain's gradients: recorded or not, and refused where chains would share it."""
    options = {"sampler": sampler, "sampler_options": {"relative_eps": True}, "nbeta": 5.0}
    result = estimate(*make_problem(), **options)
    assert result.settings["strategy"] == "sequential" and "relative_eps" in result.diagnostics["strategy_reason"]
    np.testing.assert_allclose(result.loss_trace, plainly(*make_problem(), **options), rtol=RTOL[torch.float64])
    with pytest.raises(ValueError, match=r"batched.* not possible here: relative_eps"):
        estimate(*make_problem(), strategy="batched", **options)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("model", MODELS)
def test_single_precision(model: str, strategy: str, plainly: Plainly) -> None:
    """float32 chains differ by float32 rounding."""
    problem = make_problem(model, torch.float32)
    found = _trace(*problem, strategy=strategy)
    np.testing.assert_allclose(found, plainly(*problem), rtol=RTOL[torch.float32])


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_default_step_size_does_not_depend_on_the_strategy(strategy: str) -> None:
    """lr=None is chosen before."""
    asked = estimate(*make_problem(), lr=None, strategy=strategy)
    assert asked.settings["lr"] == estimate(*make_problem(), lr=None).settings["lr"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["sgld", "adam-sgld", "sgnht"])
@pytest.mark.parametrize("model", MODELS)
def test_compiled(model: str, sampler: str, plainly: Plainly) -> None:
    """torch.compile of the gradient of all chains."""
    options = {"sampler": sampler, "sampler_options": OPTIONS[sampler], "nbeta": 5.0}
    problem = make_problem(model)
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    result = estimate(*problem, strategy="compiled", **options)
    assert result.settings["strategy"] == "compiled"
    np.testing.assert_allclose(result.loss_trace, plainly(*problem, **options), rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["sequential", "batched", "cuda-graph", None])
@pytest.mark.parametrize("sampler", ["sgld", "adam-sgld", "sgnht"])
@pytest.mark.parametrize("model", MODELS)
def test_gpu(model: str, sampler: str, strategy: str | None, plainly: Plainly) -> None:
    """The chains of a CPU to rounding, with minibatches and full batches; asked for or chosen."""
    problem = make_problem(model)
    for batch_size in (8, N):
        options = {"sampler": sampler, "sampler_options": OPTIONS[sampler], "nbeta": 5.0, "batch_size": batch_size}
        result = estimate(*problem, strategy=strategy, device="cuda", **options)
        assert result.settings["strategy"] == (strategy or "cuda-graph")
        np.testing.assert_allclose(result.loss_trace, plainly(*problem, **options), rtol=1e-9)


# --- Groups, workers, threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["batched", "sequential", None])
def test_groups_do_not_change_a_chain(strategy: str | None) -> None:
    """Chain c is the same, to rounding, in a run of 1, 3, 17 or 40: groups of any size, with a rest or without."""
    problem = make_problem()
    traces = {k: _trace(*problem, num_chains=k, strategy=strategy) for k in (1, 3, 17, 40)}
    for count, trace in traces.items():
        np.testing.assert_allclose(trace, traces[40][:count], rtol=RTOL[torch.float64])
    assert len({tuple(row) for row in traces[40]}) == 40


def test_chosen_groups_are_of_bounded_size() -> None:
    """40 small chains step in groups of 16, as many side by side as there are threads; asked for, all together."""
    chosen, asked = (estimate(*make_problem(), num_chains=40, strategy=s) for s in (None, "batched"))
    assert (chosen.diagnostics["chains_per_group"], chosen.diagnostics["workers"]) == (16, 2)
    assert (asked.diagnostics["chains_per_group"], asked.diagnostics["workers"]) == (40, 1)


@pytest.mark.parametrize("model", MODELS)
def test_workers_do_not_change_the_bits(model: str) -> None:
    """Sequential chains of a small model, over 1, 2 or 3 workers: bit for bit."""
    traces, problem = [], make_problem(model, torch.float32)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = estimate(*problem, strategy="sequential", num_chains=5)
        assert result.diagnostics["workers"] == threads == torch.get_num_threads()
        traces.append(result.loss_trace)
    assert np.array_equal(traces[0], traces[1]) and np.array_equal(traces[0], traces[2])


@pytest.mark.parametrize("model", MODELS)
def test_a_run_repeats_bit_for_bit(model: str) -> None:
    """Whichever worker gets which group."""
    problem = make_problem(model, torch.float32)
    traces = [_trace(*problem, num_chains=20) for _ in range(3)]
    assert np.array_equal(traces[0], traces[1]) and np.array_equal(traces[0], traces[2])


# --- Gradient release, microbatches, precision --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", [name for name, cls in STEPPED.items() if cls.kind != "thermostat"])
def test_released_gradients_are_the_same_bits(
    sampler: str, dtype: torch.dtype, plainly: Plainly, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consuming each gradient in the backward pass changes nothing, parameters that the loss leaves out included."""
    # What is kept is replayed, and a replay has products of its own, which round elsewhere.
    monkeypatch.setattr("llc_fast.gradients.matmul._has_products", lambda: False)
    model, data, loss_fn = make_problem("mlp", dtype)
    model.spare = nn.Parameter(torch.ones(3, dtype=dtype))
    model.register_parameter("tied", model[0].weight)
    options = {"sampler": sampler, "sampler_options": OPTIONS[sampler], "strategy": "sequential", "nbeta": 5.0}
    released = _trace(model, data, loss_fn, release_gradients=True, **options)
    kept = _trace(model, data, loss_fn, release_gradients=False, **options)
    assert np.array_equal(released, kept)
    assert all(p.grad is None for p in model.parameters())


def test_release_by_default_above_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models release their gradients and record nothing: the same bits."""
    problem = make_problem("transformer")
    small = _trace(*problem, strategy="sequential")
    monkeypatch.setattr(plan, "LARGE_MODEL", 100)
    monkeypatch.setattr(strategies.Recording, "__init__", None)
    assert np.array_equal(_trace(*problem, strategy="sequential"), small)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"strategy": "batched"}, "batched"),
        ({"sampler": "sgnht", "strategy": "sequential"}, "sampler='sgnht' needs the whole gradient"),
        (
            {"sampler": "adam-sgld", "sampler_options": {"relative_eps": True}, "strategy": "sequential"},
            "sampler='adam-sgld' needs the whole gradient",
        ),
    ],
)
def test_release_that_is_not_possible(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"release_gradients=True is not possible: .*{reason}"):
        estimate(*make_problem(), release_gradients=True, **options)


def _per_sample(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none")[:, 0]


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("loss_fn", [F.mse_loss, _per_sample], ids=["mean", "per sample"])
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 100])
def test_microbatches(size: int, loader: bool, loss_fn: Any, release: bool, plainly: Plainly) -> None:
    """Gradients of the pieces add up, with a smaller last piece and a smaller last batch (40 = 2 · 16 + 8) too."""
    model, data, _ = make_problem()
    given: Any = DataLoader(TensorDataset(*data), batch_size=16) if loader else data
    whole = plainly(model, given, loss_fn)
    pieces = _trace(model, given, loss_fn, microbatch_size=size, release_gradients=release, strategy="sequential")
    np.testing.assert_allclose(pieces, whole, rtol=RTOL[torch.float64])


@pytest.mark.parametrize("sampler", ["adam-sgld", "sgnht"])
def test_microbatches_of_samplers_that_measure(sampler: str, plainly: Plainly) -> None:
    """Squares are those of the whole gradient, not of its pieces; the chosen step size too."""
    options = {"sampler": sampler, "sampler_options": OPTIONS[sampler], "nbeta": 5.0, "lr": None}
    whole = plainly(*make_problem(), **options)
    pieces = _trace(*make_problem(), microbatch_size=3, **options)
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)  # lr comes from a metric that is kept in float32


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("model", ["mlp", "convolutional"])
def test_autocast(model: str, strategy: str, plainly: Plainly) -> None:
    """bfloat16 products: close to float32 (8 bits of mantissa), not equal; strategies agree as closely."""
    problem = make_problem(model, torch.float32)
    exact = plainly(*problem)
    cast = _trace(*problem, autocast=torch.bfloat16, strategy=strategy)
    np.testing.assert_allclose(cast, exact, rtol=0.05)
    assert not np.array_equal(cast, exact)


def test_low_precision_model_in_batches() -> None:
    """A bfloat16 model gives its float32 chains the same trace, batched or not, to bfloat16 rounding."""
    problem = make_problem("mlp", torch.bfloat16)
    traces = [_trace(*problem, strategy=s) for s in ("sequential", "batched")]
    np.testing.assert_allclose(traces[0], traces[1], rtol=0.05)


# --- What can't be batched or recorded ----------------------------------------------------------------------


class _Shift(nn.Linear):
    """Works in place on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))


class _Pairs(Dataset[Any]):
    """Map-style; collated sample by sample if it is never kept as tensors."""

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self._data = data

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._data[0][index], self._data[1][index]


class _Noisy(_Pairs):
    """Augments at random."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(3), y


class _Named(_Pairs):
    """Tells the name of each sample: batches hold more than tensors."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"x": x, "name": str(index)}, y


class _TakesNamed(nn.Linear):
    def forward(self, inputs: Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        assert all(isinstance(name, str) for name in inputs["name"])
        return super().forward(inputs["x"])


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))


def _normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


PLAIN = make_problem()[1]
APART: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "random model": (_dropout, PLAIN, "draws random numbers"),
    "batch norm in training": (_normalized, PLAIN, "writes to its buffers or its input"),
    "in place on its input": (lambda: _Shift(3, 1), PLAIN, "writes to its buffers or its input"),
    "loader": (mlp, DataLoader(TensorDataset(*PLAIN), batch_size=8), "a loader gives one minibatch at a time"),
    "more than tensors": (lambda: _TakesNamed(3, 1), _Named(PLAIN), "batches hold more than tensors"),
}


@pytest.mark.parametrize("kind", APART)
def test_falls_back_with_a_reason(kind: str, plainly: Plainly) -> None:
    """Chosen freely: sequential, saying why, plain autograd (the same bits if it is not recorded), and repeatable."""
    make, data, reason = APART[kind]
    model = make().double().train()
    result = estimate(model, data, F.mse_loss)
    assert result.settings["strategy"] == "sequential" and reason in result.diagnostics["strategy_reason"]
    is_recorded = kind == "batch norm in training"
    assert result.diagnostics["workers"] == (2 if is_recorded else 1)
    rtol = RTOL[torch.float64] if is_recorded else 0
    np.testing.assert_allclose(result.loss_trace, plainly(model, data, F.mse_loss), rtol=rtol)
    assert np.array_equal(result.loss_trace, _trace(model, data, F.mse_loss))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", APART)
def test_gpu_falls_back_with_a_reason(kind: str, plainly: Plainly) -> None:
    """The same on a GPU, which has a generator of its own."""
    make, data, reason = APART[kind]
    model = make().double().train()
    result = estimate(model, data, F.mse_loss, device="cuda")
    assert result.settings["strategy"] == "sequential" and reason in result.diagnostics["strategy_reason"]
    if kind == "random model":
        assert np.array_equal(result.loss_trace, _trace(model, data, F.mse_loss, device="cuda"))
    else:
        np.testing.assert_allclose(result.loss_trace, plainly(model, data, F.mse_loss), rtol=1e-9)


@pytest.mark.parametrize("kind", APART)
def test_batching_that_is_not_possible(kind: str) -> None:
    """Asked for: an error with the reason and the remedy, before any sampling."""
    make, data, reason = APART[kind]
    with pytest.raises(ValueError, match=f'strategy=.batched. is not possible here: .*{reason}.*"sequential"'):
        estimate(make().double().train(), data, F.mse_loss, strategy="batched")


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("batched", {"microbatch_size": 4}, "not possible here: microbatches"),
        ("compiled", {"microbatch_size": 4}, "not possible here: .*as a whole.*sequential"),
        ("cuda-graph", {}, "needs a CUDA device, got device='cpu'"),
        ("cuda-graph", {"microbatch_size": 4}, "not possible here: microbatches"),
        ("fast", {}, "strategy='fast' is unknown; choose one of: sequential, batched, compiled, cuda-graph"),
        ("", {}, "strategy='' is unknown"),
    ],
)
def test_strategies_that_are_not_possible(strategy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(*make_problem(), strategy=strategy, **options)


def test_compiled_with_batch_statistics_is_not_possible() -> None:
    """A compiled functional gradient can't move buffers."""
    with pytest.raises(ValueError, match=r"compiled.*writes to its buffers.*sequential"):
        estimate(_normalized().double().train(), PLAIN, F.mse_loss, strategy="compiled")


def test_batch_statistics_move_with_the_chain() -> None:
    """Each chain has buffers of its own, which start from the model's and go on from step to step."""

    class Running(nn.Module):
        """Divides by a running mean of its own making, which a forward pass moves."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)
            self.register_buffer("seen", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.mul_(1.5)
            return self.inner(x) / self.seen

    model = Running().double()
    x, y = PLAIN
    result = estimate(model, (x, y), lambda output, _: output.mean(), lr=1e-12, batch_size=N, num_chains=2)
    at_start = float(model.inner(x).detach().mean())
    np.testing.assert_allclose(result.loss_trace, [[at_start / 1.5**k for k in range(1, 17)]] * 2, rtol=1e-4)
    assert float(model.seen) == 1.0


@pytest.mark.parametrize("threads", [1, 2])
def test_data_sets_of_the_users_are_read_by_one_thread(threads: int) -> None:
    """A random map-style data set is batched, but nothing is recorded and no second thread asks it."""
    readers = set()

    class Watched(_Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            readers.add(threading.current_thread())
            return super().__getitem__(index)

    torch.set_num_threads(threads)
    result = estimate(*make_problem()[:1], Watched(PLAIN), F.mse_loss, num_chains=20)
    assert readers == {threading.main_thread()} and result.diagnostics["workers"] == 1
    assert np.isfinite(result.loss_trace).all()


@pytest.mark.parametrize("strategy", ["sequential", "batched", None])
def test_data_of_every_kind_give_the_same_chains(strategy: str | None, plainly: Plainly) -> None:
    """Tensors, a TensorDataset, a map-style data set kept or collated, a dictionary: equal indices, equal chains."""
    model, (x, y), _ = make_problem()
    expected = plainly(model, (x, y), F.mse_loss)

    def keyed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["y"])

    for data, loss_fn in (
        ((x, y), F.mse_loss),
        (TensorDataset(x, y), F.mse_loss),
        (_Pairs((x, y)), F.mse_loss),
        ({"x": x, "y": y}, keyed),
        ([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], keyed),
    ):
        trace = _trace(model, data, loss_fn, strategy=strategy)
        np.testing.assert_allclose(trace, expected, rtol=RTOL[torch.float64])


class _Unbatchable(nn.Linear):
    """Asks a tensor for a number: vmap can't, and a recording must not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(self.weight.detach().sum()) > 0 else 1.0)


class _ReadsItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + abs(float(x.detach().numpy()[0, 0])))


class _Counts(nn.Linear):
    """Does something else at every call: nothing that a recording could see."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * (self.calls % 3))


class _Waits(nn.Linear):
    """Computes with the input on the CPU: fine for vmap, and nothing for a CUDA graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + x[..., :1].square().cpu()).to(x.device)


class _FromTheCPU(nn.Linear):
    """Brings a constant from the CPU at every call: recorded once, it need not come again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.full((1,), 2.0, dtype=x.dtype).to(x.device)


class _Sparse(nn.Linear):
    """A graph network's product with a sparse matrix."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("matrix", torch.eye(8, dtype=torch.float64).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, super().forward(x)) if len(x) == 8 else super().forward(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("num_chains", [1, 3, 20])
@pytest.mark.parametrize("make", [lambda: _Unbatchable(3, 1), lambda: _ReadsItsInput(3, 1)])
def test_models_that_can_not_be_batched(make: Callable[[], nn.Module], num_chains: int, plainly: Plainly) -> None:
    """Chosen freely, one after another, to rounding what plain autograd gives; the reason tells both failures."""
    model = make().double()
    result = estimate(model, PLAIN, F.mse_loss, num_chains=num_chains)
    expected = plainly(model, PLAIN, F.mse_loss, num_chains=num_chains)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=RTOL[torch.float64])
    reason = result.diagnostics["strategy_reason"]
    assert result.settings["strategy"] == "sequential" and "not recorded" in reason
    assert ("batching failed" in reason) == (num_chains > 1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("num_chains", [1, 3, 20])
def test_models_with_sparse_matrices(num_chains: int, plainly: Plainly) -> None:
    """Nothing is recorded, batched or not, and the chains are those of plain autograd."""
    model = _Sparse().double()
    result = estimate(model, PLAIN, F.mse_loss, num_chains=num_chains)
    np.testing.assert_allclose(
        result.loss_trace, plainly(model, PLAIN, F.mse_loss, num_chains=num_chains), rtol=RTOL[torch.float64]
    )
    assert "not recorded" in result.diagnostics["strategy_reason"]


def test_data_sets_that_are_not_recorded_fall_back_too() -> None:
    """Where nothing would be recorded, a model that can't be batched still shows before the first step."""
    model = _Unbatchable(3, 1).double()
    result = estimate(model, _Noisy(PLAIN), F.mse_loss)
    assert result.settings["strategy"] == "sequential"
    assert "batching failed" in result.diagnostics["strategy_reason"]


class _Buggy(nn.Linear):
    """A model with a bug that the trial at w* does not meet: it fails from its `last` call on."""

    def __init__(self, error: Exception, last: int) -> None:
        super().__init__(3, 1)
        self._error, self._left = error, last

    def forward(self, x: Tensor) -> Tensor:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().forward(x)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug"), TypeError("a bug")])
def test_a_bug_of_the_model_is_raised(error: Exception) -> None:
    """While chains are batched it is no reason to try another strategy: nobody would hear of it."""
    healthy = _Buggy(error, 10**6).double()
    assert estimate(healthy, PLAIN, F.mse_loss).settings["strategy"] == "batched"
    calls = 10**6 - healthy._left
    for last in range(1, calls):  # whichever call it is
        with pytest.raises(type(error), match="a bug"):
            estimate(_Buggy(error, last).double(), PLAIN, F.mse_loss)


def test_what_vmap_does_not_say_is_seen_by_trying_one_chain() -> None:
    """An operation that fails in a batch, without a word of vmap, and passes alone."""

    class Shapes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch._C._functorch.is_batchedtensor(self.weight):
                raise NotImplementedError("no kernel for this layout")
            return super().forward(x)

    result = estimate(Shapes(3, 1).double(), PLAIN, F.mse_loss)
    assert result.settings["strategy"] == "sequential"
    assert "batching failed: no kernel for this layout" in result.diagnostics["strategy_reason"]


def test_asked_for_batching_is_not_replaced() -> None:
    """Who asks for batched chains gets the model's own error, not another strategy."""
    with pytest.raises(RuntimeError):
        estimate(_Unbatchable(3, 1).double(), PLAIN, F.mse_loss, strategy="batched")


@pytest.mark.parametrize("strategy", ["sequential", None])
def test_models_that_change_between_calls_are_not_recorded(strategy: str | None) -> None:
    """A recording would freeze the counter: the model is called each time, and its own count is put back."""
    model, calls = _Counts(3, 1).double(), 0

    def counting(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(output, target)

    result = estimate(model, PLAIN, counting, strategy=strategy)
    assert strategy is not None or "the loss changes from call to call" in result.diagnostics["strategy_reason"]
    assert calls > 3 * 16  # at least once a step
    assert model.calls == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "strategy", "why"),
    [
        (_Unbatchable, "sequential", "capturing failed.*; batching failed"),
        (_Waits, "batched", "capturing failed: .*synchroniz"),
        (_Counts, "sequential", "the loss changes from call to call"),
    ],
)
def test_gpu_models_that_can_not_be_captured(
    make: Callable[..., nn.Module], strategy: str, why: str, plainly: Plainly
) -> None:
    """Chosen freely, another strategy takes over and says why; who asks for a graph is told that there is none."""
    model = make(3, 1).double()
    result = estimate(model, PLAIN, F.mse_loss, device="cuda")
    assert result.settings["strategy"] == strategy
    assert re.search(why, result.diagnostics["strategy_reason"])
    if make is _Counts:
        assert model.calls == 0  # as it was
    else:
        np.testing.assert_allclose(result.loss_trace, plainly(model, PLAIN, F.mse_loss), rtol=RTOL[torch.float64])
    if make is not _Unbatchable:
        with pytest.raises(
            ValueError, match=r'strategy=.cuda-graph. is not possible here: .*; use .*strategy="(batched|sequential)"'
        ):
            estimate(model, PLAIN, F.mse_loss, device="cuda", strategy="cuda-graph")


@pytest.mark.gpu
def test_gpu_constants_from_the_cpu(plainly: Plainly) -> None:
    model = _FromTheCPU(3, 1).double()
    result = estimate(model, PLAIN, F.mse_loss, device="cuda")
    assert result.settings["strategy"] == "cuda-graph"
    np.testing.assert_allclose(result.loss_trace, plainly(model, PLAIN, F.mse_loss), rtol=RTOL[torch.float64])


@pytest.mark.gpu
def test_gpu_data_sets_that_are_not_tensors() -> None:
    """A user's ``__getitem__`` is called by the host: chosen freely, no graph; asked for one, an error."""
    model = nn.Linear(3, 1).double()
    assert estimate(model, _Noisy(PLAIN), F.mse_loss, device="cuda").settings["strategy"] == "batched"
    with pytest.raises(ValueError, match=r"strategy='cuda-graph' is not possible here: it can.t read minibatches"):
        estimate(model, _Noisy(PLAIN), F.mse_loss, device="cuda", strategy="cuda-graph")


@pytest.mark.parametrize("num_chains", [2, 7])
def test_unrecordable_models_and_several_threads(num_chains: int, plainly: Plainly) -> None:
    """functional_call writes to the module: workers take turns, each chain sees its own parameters, w* returns."""
    model = _Unbatchable(3, 1).double()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    expected = plainly(model, PLAIN, F.mse_loss, num_chains=num_chains, num_draws=100)
    for _ in range(3):
        result = estimate(model, PLAIN, F.mse_loss, num_chains=num_chains, num_draws=100, strategy="sequential")
        assert result.diagnostics["workers"] == 2
        assert np.array_equal(result.loss_trace, expected)
    after = dict(model.named_parameters())
    assert all(id(after[name]) == key and torch.equal(after[name], p) for name, (key, p) in before.items())


@pytest.mark.parametrize("threads", [1, 4])
def test_observables_that_call_the_model_in_several_threads(threads: int) -> None:
    """Recorded chains run side by side; an observable that calls the model still sees its own chain's parameters."""
    torch.set_num_threads(threads)
    model, (x, y), loss_fn = make_problem()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def again(draw: llc_fast.Draw) -> Tensor:
        return loss_fn(functional_call(model, dict(draw.params), (x,)), y) - draw.loss

    options = {"strategy": "sequential", "batch_size": N, "num_chains": 8, "num_draws": 100}
    result = estimate(model, (x, y), loss_fn, observables={"difference": again}, **options)
    assert result.diagnostics["workers"] == threads
    np.testing.assert_allclose(result.observables["difference"], 0, atol=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("strategy", ["sequential", None])
def test_errors_in_workers_come_out(strategy: str | None) -> None:
    """An observable that raises ends the run with its own error, in every thread, and the model is whole."""
    model, data, loss_fn = make_problem()

    def broken(draw: llc_fast.Draw) -> float:
        if draw.chain == 5 and draw.draw == 3:
            raise KeyError("the user's own")
        return 0.0

    with pytest.raises(KeyError, match="the user's own"):
        estimate(model, data, loss_fn, strategy=strategy, num_chains=40, observables={"broken": broken})
    assert np.isfinite(estimate(model, data, loss_fn).loss_trace).all()


def test_attention_is_batched_without_warnings() -> None:
    """No fallback of vmap, which would loop over the chains and warn about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", llc_fast.LLCWarning)
        result = estimate(*make_problem("transformer"), strategy="batched")
    assert "not recorded" not in result.diagnostics["strategy_reason"]


def test_what_vmap_would_do_one_by_one_is_left_to_others() -> None:
    """It warns that it is slow: no chain is batched then, unless that was asked for, and nobody is warned."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", llc_fast.LLCWarning)
        result = estimate(model, PLAIN, F.mse_loss)
    assert result.settings["strategy"] == "sequential"
    assert "performance drop" in result.diagnostics["strategy_reason"]
    with pytest.warns(UserWarning, match="performance drop"):
        asked = estimate(model, PLAIN, F.mse_loss, strategy="batched")
    np.testing.assert_allclose(asked.loss_trace, result.loss_trace, rtol=RTOL[torch.float64])


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("sampler", ["sgld", "mala"])
def test_parameters_without_elements(strategy: str, sampler: str) -> None:
    """An empty parameter changes nothing."""

    class Padded(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.nothing, self.neither = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(2, 0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.nothing.sum()

    model, plain = Padded().double(), nn.Linear(3, 1).double()
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if t.numel()})
    options = {"strategy": strategy, "sampler": sampler, "batch_size": None}
    result, expected = (estimate(m, PLAIN, F.mse_loss, **options) for m in (model, plain))
    np.testing.assert_allclose(result.loss_trace, expected.loss_trace, rtol=RTOL[torch.float64])


def test_chains_that_are_lost_do_not_take_others_along() -> None:
    """In a group, one chain's overflow is its own."""

    class Cliff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w + 0 * x + torch.where(self.w.detach().abs() > 2.1, torch.nan, 0.0)

    x = torch.zeros(4, 1, dtype=torch.float64)
    options = {"nbeta": 1.0, "localization": 0.0, "lr": 0.5, "num_chains": 12, "num_draws": 40, "batch_size": 4}
    traces = [
        estimate(Cliff(), (x, x), lambda out, y: 0.5 * (out - y).square().mean(), strategy=s, **options).loss_trace
        for s in ("sequential", "batched")
    ]
    lost = np.isnan(traces[0]).any(axis=1)
    assert 0 < lost.sum() < 12
    np.testing.assert_allclose(traces[0], traces[1], rtol=RTOL[torch.float64], equal_nan=True)


# --- Models in which Python looks at values ------------------------------------------------------------------


class _Branches(nn.Linear):
    """A minibatch with a large sample goes another way."""

    calls = 0

    def __init__(self, level: float) -> None:
        super().__init__(3, 1)
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x).exp() if (x.abs() > self.level).any() else super().forward(x)


def _shares(level: float) -> float:
    """The share of minibatches of 8 that go the second way, by counting samples."""
    large = float((PLAIN[0].abs() > level).any(dim=1).double().mean())
    return 1 - (1 - large) ** 8


@pytest.mark.parametrize("level", [2.0, 2.3])
@pytest.mark.parametrize("num_chains", [1, 3])
def test_other_ways_are_left_to_the_model(level: float, num_chains: int, plainly: Plainly) -> None:
    """What was recorded is replayed where Python finds what it found then; the chains are those of plain autograd."""
    assert 0.05 < _shares(level) < 0.95
    model, options = _Branches(level).double(), {"num_chains": num_chains, "num_draws": 200, "num_burnin": 0}
    expected = plainly(model, PLAIN, F.mse_loss, **options)
    _Branches.calls = 0
    result = estimate(model, PLAIN, F.mse_loss, **options)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=RTOL[torch.float64])
    assert "not recorded" not in result.diagnostics["strategy_reason"]
    assert result.diagnostics["workers"] == min(num_chains, 2)
    set_up = 400  # evaluations at w*, comparisons with differences, and recordings
    other_way = min(_shares(level), 1 - _shares(level)) * 200 * num_chains
    assert 0.2 * other_way < _Branches.calls < set_up + 3 * other_way


@pytest.mark.parametrize("stop", [3, 11])
def test_other_ways_do_not_change_the_bits_of_a_run_that_is_resumed(stop: int, tmp_path: Path) -> None:
    """What is recorded does not depend on where a process begins."""
    model = _Branches(2.3)
    options: dict[str, Any] = {"num_chains": 1, "strategy": "sequential", "num_draws": 20}
    x, y = (t.float() for t in PLAIN)
    whole = estimate(model, (x, y), F.mse_loss, **options)
    with interrupted_after(stop):
        part = estimate(model, (x, y), F.mse_loss, checkpoint=tmp_path / "run", **options)
    assert part.is_partial
    resumed = estimate(model, (x, y), F.mse_loss, checkpoint=tmp_path / "run", **options)
    assert np.array_equal(resumed.loss_trace, whole.loss_trace)


def test_values_that_are_others_each_time_are_not_recorded(plainly: Plainly) -> None:
    """A replay of a number that was read would never be of use."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + x.abs().sum().item() / 100)

    model = Scaled(3, 1).double()
    result = estimate(model, PLAIN, F.mse_loss, strategy="sequential")
    np.testing.assert_allclose(result.loss_trace, plainly(model, PLAIN, F.mse_loss), rtol=RTOL[torch.float64])
    assert "goes another way from minibatch to minibatch" in result.diagnostics["strategy_reason"]


# --- Models that write to their buffers ----------------------------------------------------------------------


def _with_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double().train()


class _Assigned(nn.Module):
    """Assigns new tensors to its buffers instead of writing to them; what it gives depends on them."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.inner(x - self.mean)


def _spectral() -> nn.Module:
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 1)).double().train()


@pytest.mark.parametrize("make", [_with_norms, lambda: _Assigned().double(), _spectral])
def test_buffers_are_written_to_by_replays(make: Callable[[], nn.Module], plainly: Plainly) -> None:
    """As by the model: to those of the chain, at its own evaluations alone; those at w* leave no trace."""
    model = make()
    before = {name: b.clone() for name, b in model.named_buffers()}
    expected = plainly(model, PLAIN, F.mse_loss, num_draws=30)
    result = estimate(model, PLAIN, F.mse_loss, num_draws=30)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=RTOL[torch.float64])
    assert "writes to its buffers" in result.diagnostics["strategy_reason"]
    assert "not recorded" not in result.diagnostics["strategy_reason"]
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert result.diagnostics["paired_with"] == "draws"


def test_losses_at_the_reference_are_those_of_plain_evaluations(plainly: Plainly, monkeypatch: Any) -> None:
    """Recorded, or evaluated by the model: with the buffers that a chain has there."""
    options: dict[str, Any] = {"num_draws": 30, "strategy": "sequential"}
    result = estimate(_with_norms(), PLAIN, F.mse_loss, **options)
    monkeypatch.setattr(plan, "_REPLAYED_FLOPS", -1)
    plain = estimate(_with_norms(), PLAIN, F.mse_loss, **options)
    at_draws = [r.traces["reference_loss"][:, r.schedule.draws] for r in (result, plain)]
    assert np.isfinite(at_draws[0]).all()
    np.testing.assert_allclose(*at_draws, rtol=RTOL[torch.float64])


def test_a_count_that_python_reads_is_not_recorded(plainly: Plainly) -> None:
    """Batch normalization with a cumulative average divides by how many batches it has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1)).double().train()
    result = estimate(model, PLAIN, F.mse_loss)
    np.testing.assert_allclose(result.loss_trace, plainly(model, PLAIN, F.mse_loss), rtol=RTOL[torch.float64])
    assert "Python looks at a tensor's values" in result.diagnostics["strategy_reason"]


# --- What the user gave to torch.compile ---------------------------------------------------------------------


class _Half(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = inner, nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="of torch 2.6")
@pytest.mark.parametrize("kind", ["whole", "part", "in place", "loss"])
@pytest.mark.parametrize("strategy", ["sequential", None])
def test_recorded_kernels_take_the_place_of_compiling(kind: str, strategy: str | None, plainly: Plainly) -> None:
    """The model is recorded as it was written, and nothing is compiled; afterwards it is compiled as before."""
    compiled = list[object]()

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.manual_seed(0)
    inner = nn.Linear(3, 4).double()
    model: nn.Module = _Half(inner)
    loss_fn: Any = F.mse_loss
    expected = plainly(model, PLAIN, loss_fn)
    if kind == "whole":
        model = torch.compile(model, backend=backend)
    elif kind == "part":
        model.inner = torch.compile(inner, backend=backend)
    elif kind == "in place":
        model.compile(backend=backend)
    else:
        loss_fn = torch.compile(lambda output, target: F.mse_loss(output, target), backend=backend)
    result = estimate(model, PLAIN, loss_fn, strategy=strategy)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=RTOL[torch.float64])
    assert "torch.compile is set aside for recorded kernels" in result.diagnostics["strategy_reason"]
    assert not compiled
    x, y = PLAIN
    loss_fn(model(x), y)
    assert len(compiled) == 1


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="of torch 2.6")
def test_a_compiled_model_that_is_not_recorded_runs_compiled() -> None:
    """From a loader nothing is recorded: the user's backend is used."""
    compiled = list[object]()

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = torch.compile(mlp().double(), backend=backend)
    result = estimate(model, DataLoader(TensorDataset(*PLAIN), batch_size=8, shuffle=True), F.mse_loss)
    assert "compiled by the user" in result.diagnostics["strategy_reason"] and compiled


# --- Language and vision models of Hugging Face --------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox ragged", "llama", "bert", "lstm"])
@pytest.mark.parametrize("strategy", ["sequential", None])
def test_models_of_others_are_recorded(name: str, strategy: str | None, plainly: Plainly) -> None:
    """The chains are those of the models' own gradients, and λ̂ is the same to rounding, whatever the strategy."""
    family = FAMILIES[name]
    for package in family.requires:
        pytest.importorskip(package)
    case = made(name)
    options: dict[str, Any] = {"lr": 1e-5, "nbeta": 30.0, "localization": 100.0, "num_chains": 2, "num_draws": 6}
    expected = plainly(case.model, case.data, case.loss_fn, **options)
    result = estimate(case.model, case.data, case.loss_fn, strategy=strategy, **options)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=RTOL[torch.float32])
    assert "not recorded" not in result.diagnostics["strategy_reason"]
