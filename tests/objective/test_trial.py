"""The first look at a loss: sums are refused and nothing else, and what an evaluation depends on is seen."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from llc_fast import estimate_llc
from llc_fast.data import make_source
from llc_fast.objective.objective import Objective

mse = F.mse_loss
CPU = torch.device("cpu")


def _objective(model: nn.Module, loss_fn: Any = mse, data: Any = None, size: int | None = 10) -> Objective:
    data = runs.data() if data is None else data
    return Objective(model, loss_fn, make_source(data, size, CPU), device=CPU)


# ---- sums --------------------------------------------------------------------------------------------------


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("make", [runs.mlp, _dropout])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, y: F.mse_loss(o, y, reduction="sum"),
        lambda o, y: F.l1_loss(o, y, reduction="sum") / 7,
        lambda o, y: (o - y).square().sum() + 0.0,
    ],
)
def test_sums_are_refused(loss_fn: Any, make: Callable[[], nn.Module], size: int) -> None:
    if size == 1 and make is _dropout:
        pytest.skip("such a sum is a mean")
    with pytest.raises(ValueError, match=r"^loss_fn sums over the batch"):
        _objective(make(), loss_fn, size=size)


def test_a_sum_that_is_zero_at_the_minimum_is_refused() -> None:
    model, (x, _) = runs.mlp(), runs.data()
    with pytest.raises(ValueError, match="sums over the batch"):
        _objective(model, nn.MSELoss(reduction="sum"), (x, model(x).detach()))


def test_a_sum_over_features_is_a_mean_over_the_batch() -> None:
    model = nn.Linear(3, 4)
    _objective(model, lambda o, y: (o - y).square().sum(1).mean(), runs.data(targets=4))
    with pytest.raises(ValueError, match="sums over the batch"):
        _objective(model, lambda o, y: (o - y).square().sum(), runs.data(targets=4))


@pytest.mark.parametrize("size", [2, 3, 8, 16, 40])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_contrastive_losses_are_no_sums(size: int, temperature: float) -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(3, 8)

    def info_nce(model: nn.Module, batch: Any) -> Tensor:
        a, b = (F.normalize(model(t), dim=1) for t in batch)
        return F.cross_entropy(a @ b.t() / temperature, torch.arange(len(a)))

    x = torch.randn(40, 3)
    Objective(encoder, info_nce, make_source((x, x + 0.1 * torch.randn(40, 3)), size, CPU, pairs=False), device=CPU)


class _OneSize(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.r, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)
        self.register_buffer("h", torch.zeros(1, size, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.r(x[:, None], self.h)[1][-1])


class _Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.out(self.r(pack_padded_sequence(x, lengths, batch_first=True))[1][-1])


def test_models_for_batches_of_one_kind_are_looked_at_in_such_batches() -> None:
    _objective(_OneSize(10))
    x, lengths, y = torch.randn(40, 4, 2), torch.randint(1, 5, (40,)), torch.randn(40, 1)

    def by_length(rows: list[Any]) -> tuple[Tensor, ...]:
        rows = sorted(rows, key=lambda row: -int(row[1]))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    loader = DataLoader(TensorDataset(x, lengths, y), batch_size=10, shuffle=True, collate_fn=by_length)
    _objective(_Sorted(), mse, loader, None)


# ---- what an evaluation depends on -------------------------------------------------------------------------


class _Random(nn.Module):
    def __init__(self, draw: Callable[[Any], bool]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(3, 3), nn.Linear(3, 1), draw
        self.private, self.numpy = random.Random(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh() if self.draw(self) else x)


DRAWS: dict[str, Callable[[Any], bool]] = {
    "python": lambda m: random.random() > 0.1,
    "numpy": lambda m: bool(np.random.rand() > 0.1),
    "torch": lambda m: bool(torch.rand(()) > 0.1),
    "private": lambda m: m.private.random() > 0.1,
    "private, NumPy": lambda m: bool(m.numpy.random() > 0.1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_seen_and_seeded(name: str) -> None:
    """Equal seeds, equal results, whatever the generators' states before; and LayerDrop is drawn at every step."""
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model = runs.initialized(_Random(DRAWS[name]))
        with torch.no_grad():
            model.b.weight.fill_(10.0)
        found.append(runs.estimate(model=model, lr=1e-12, num_draws=200, batch_size=40, num_chains=1))
    trial = _objective(model).trial
    assert trial.is_random and trial.is_reproducible
    runs.assert_same(found[0], found[1])
    losses = found[0].loss_trace.ravel().round(1)
    values, counts = np.unique(losses, return_counts=True)
    assert len(values) == 2 and 0.02 < counts.min() / counts.sum() < 0.25  # one in ten


class _Unseeded(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.draw = nn.Linear(3, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (1 + self.draw())


@pytest.mark.parametrize("draw", [random.SystemRandom().random, lambda: time.perf_counter_ns() % 100_000 / 1e5])
def test_what_no_seed_reaches_is_said(draw: Callable[[], float]) -> None:
    """Each evaluation draws from a continuum: with two values, six evaluations are all equal once in thirty tries."""
    trial = _objective(_Unseeded(draw)).trial
    assert trial.is_random and not trial.is_reproducible


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls = nn.Linear(3, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) * (2.0 if self.calls % 50 == 0 else 1.0)


def test_a_model_that_counts_its_calls_is_neither_batched_nor_recorded() -> None:
    assert _objective(_Counter()).trial.changes_itself and not _objective(runs.mlp()).trial.changes_itself
    model = _Counter()
    result = runs.estimate(model=model, lr=1e-12, num_draws=300, num_burnin=0, num_chains=1, batch_size=40)
    assert len(np.unique(result.loss_trace.round(2))) == 2
    assert model.calls == 0


class _OwnStatistics(nn.Module):
    """Batch normalization by hand, whose buffers torch writes without a word to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(F.batch_norm(x, self.mean, self.variance, training=True))


def test_buffers_that_are_written_to_silently() -> None:
    model = _OwnStatistics()
    assert (
        _objective(model).trial.writes_buffers
        and not _objective(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()).trial.writes_buffers
    )
    runs.estimate(model=model)
    assert model.mean.tolist() == [0, 0, 0] and model.variance.tolist() == [1, 1, 1]


# ---- backward passes in backward passes --------------------------------------------------------------------


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, whole: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.reentrant, self.whole = reentrant, whole

    def block(self, h: Tensor) -> Tensor:
        return self.b(h.tanh()).tanh()

    def body(self, x: Tensor) -> Tensor:
        return self.block(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.c(self.body(x))
        if self.whole:  # its input is data, and then autograd says nothing of what it can't find
            return self.c(checkpoint(self.body, x.detach().requires_grad_(), use_reentrant=self.reentrant))
        return self.c(checkpoint(self.block, self.a(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"strategy": "sequential"}, {"microbatch_size": 4}, {"release_gradients": True}], ids=str
)
def test_recomputed_activations_are_those_of_the_chain(
    options: dict[str, Any], reentrant: bool, whole: bool, dtype: torch.dtype
) -> None:
    data = runs.data(dtype=dtype)
    plain, saving = (runs.initialized(_Checkpointed(kind, whole).to(dtype)) for kind in (None, reentrant))
    assert _objective(saving, data=data).trial.is_reentrant is reentrant
    if reentrant and "release_gradients" in options:
        with pytest.raises(ValueError, match="set it to False"):
            runs.estimate(model=saving, data=data, **options)
        return
    expected = runs.estimate(model=plain, data=data, num_draws=15, **options)
    found = runs.estimate(model=saving, data=data, num_draws=15, **options)
    np.testing.assert_allclose(found.loss_trace, expected.loss_trace, rtol=1e-4 if dtype == torch.float32 else 1e-10)


class _Own(torch.autograd.Function):
    """A product whose backward pass looks at the module, as memory-saving ones do; vmap takes it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, module: nn.Module) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.module = inputs[2]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad @ ctx.module.weight, grad.t() @ x, None


class _OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Own.apply(x, self.weight, self)


def test_a_backward_pass_that_reads_the_module_finds_the_chain_there() -> None:
    def make(kind: type[nn.Linear]) -> nn.Module:
        layers = (kind(3, 4, bias=False), nn.Tanh(), kind(4, 1, bias=False))
        return runs.initialized(nn.Sequential(*layers).double())

    data = runs.data(dtype=torch.float64)
    expected = runs.estimate(model=make(nn.Linear), data=data, num_draws=50)
    found = runs.estimate(model=make(_OwnLinear), data=data, num_draws=50)
    np.testing.assert_allclose(found.loss_trace, expected.loss_trace, rtol=1e-10)
    assert "other gradients in a batch" in found.diagnostics["strategy_reason"]
    with pytest.raises(ValueError, match=r'^strategy="batched" is not possible here: .*strategy="sequential"'):
        runs.estimate(model=make(_OwnLinear), data=data, strategy="batched")


# ---- errors ------------------------------------------------------------------------------------------------


def test_a_loss_that_returns_a_number_later() -> None:
    calls = iter(range(40))
    with pytest.raises(TypeError, match=r"^loss_fn must return a tensor, got int"):
        runs.estimate(loss_fn=lambda o, y: 5 if next(calls, None) is None else mse(o, y), strategy="sequential")


def test_targets_of_a_teacher_that_are_not_detached() -> None:
    teacher, (x, _) = nn.Linear(3, 1), runs.data()
    found = runs.estimate(data=(x, teacher(x)))
    runs.assert_same(found, runs.estimate(data=(x, teacher(x).detach())))
    assert teacher.weight.grad is None


def test_inside_inference_mode() -> None:
    expected, model = runs.estimate(), runs.mlp()
    with torch.inference_mode():
        runs.assert_same(runs.estimate(model=model), expected)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, y: torch.sqrt(mse(o, y)),
        lambda o, y: (o - y).norm(),
        lambda o, y: ((o - y).abs() ** 0.5).mean(),
        lambda o, y: torch.atan2(o - y, o - y).mean() + mse(o, y),
    ],
)
def test_a_gradient_that_is_not_finite_is_told(loss_fn: Any) -> None:
    model, (x, _) = runs.mlp(), runs.data()
    try:
        _objective(model, loss_fn, (x, model(x).detach()))
    except ValueError as error:
        assert "gradient" in str(error) and "not finite" in str(error)
    else:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss_fn(model(x[:10]), model(x[:10]).detach()), list(model.parameters()))
        assert all(torch.isfinite(g).all() for g in grads)


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 1, sparse=True), nn.Flatten(0))
    data = torch.randint(0, 5, (40,)), torch.randn(40)
    with pytest.raises(TypeError, match=r"^the gradient of parameter '0.weight' has layout torch.sparse_coo"):
        _objective(model, mse, data)


# ---- found by random estimates -----------------------------------------------------------------------------------


class _Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.block, self.first(x), use_reentrant=True))
        return out


@pytest.mark.filterwarnings("error:None of the inputs")
@pytest.mark.parametrize("seed", range(4))
def test_gradients_that_come_in_parts(seed: int) -> None:
    """Recomputed activations and a list of parameters each give a part; nothing is evaluated without gradients."""
    torch.manual_seed(seed)
    model = _Recomputed()
    own = list(model.parameters())

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target) + 0.01 * sum(p.square().sum() for p in own)

    data = torch.randn(16, 4), torch.randn(16, 1)
    result = estimate_llc(
        model, data, loss_fn, lr=1e-12, num_draws=20, num_burnin=0, num_chains=2, batch_size=4, progress=False
    )
    assert abs(result.llc_mean) < 6 * result.llc_stderr + 1e-3


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_losses_of_bfloat16_models(reduction: str) -> None:
    """A sum is refused, and losses of samples are no random ones, though their mean is rounded."""
    torch.manual_seed(0)
    model, data = nn.Linear(3, 1).bfloat16(), (torch.randn(64, 3).bfloat16(), torch.randn(64, 1).bfloat16())

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        losses = (output - target).square()[:, 0]
        return losses.sum() if reduction == "sum" else losses

    settings: dict[str, Any] = {"lr": 1e-5, "num_draws": 10, "num_burnin": 0, "batch_size": 16, "progress": False}
    if reduction == "sum":
        with pytest.raises(ValueError, match="sums over the batch"):
            estimate_llc(model, data, loss_fn, **settings)
        return
    assert "irreproducible" not in [w.code for w in estimate_llc(model, data, loss_fn, **settings).warnings]


def test_forward_passes_that_write_to_frozen_parameters() -> None:
    """max_norm cuts rows of an embedding that is not sampled: the model's own stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    data = torch.arange(24) % 6, torch.randn(24, 1)
    result = estimate_llc(
        model, data, nn.functional.mse_loss, lr=1e-5, num_draws=10, num_burnin=0, batch_size=4, progress=False
    )
    assert torch.equal(model[0].weight, before) and "writes-parameters" in [w.code for w in result.warnings]


def test_padding_that_the_first_minibatch_has_not() -> None:
    """A row without a gradient is not sampled, and named, wherever in the data it occurs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 1))
    tokens = torch.randint(1, 6, (200, 2))
    tokens[:3, 1] = 0
    result = estimate_llc(
        model,
        (tokens, torch.randn(200, 1)),
        nn.functional.mse_loss,
        lr=1e-3,
        num_draws=10,
        num_burnin=0,
        batch_size=2,
        keep_ends=True,
        progress=False,
    )
    assert result.ends is not None and not result.ends["0.weight"][:, 0].any() and result.ends["0.weight"][:, 1:].all()
    assert "no-gradient" in [w.code for w in result.warnings]
