"""A model in estimate_llc: what is sampled, what stays as it was, what is warned about, what a seed fixes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import llc_fast
from llc_fast.kernels import reference
from llc_fast.kernels.step import NoiseKey, StepScalars
from llc_fast.result import LLCResult

pytestmark = pytest.mark.usefixtures("seeded")

mse = nn.functional.mse_loss


class _Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class _Everything(nn.Module):
    """A tied weight, a frozen bias, batch norm, dropout, a buffer and one that no checkpoint holds."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tied, self.norm, self.dropout = _Tied(), nn.BatchNorm1d(3), nn.Dropout(dropout)
        self.out = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("scale", torch.full((3,), 1.5), persistent=False)
        self.tied.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.dropout(self.norm(self.tied(x * self.scale)))
        return self.out(hidden)


def _estimate(model: nn.Module, data: Any = None, loss_fn: Any = mse, **options: Any) -> LLCResult:
    chosen: dict[str, Any] = {
        "lr": 1e-3,
        "num_chains": 2,
        "num_draws": 20,
        "num_burnin": 5,
        "progress": False,
    }
    return llc_fast.estimate_llc(
        model, runs.data() if data is None else data, loss_fn, **runs.arguments(chosen | options)
    )


# --- The model is left exactly as it was --------------------------------------------------------------------


def _bits(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.dtype, tensor.detach().clone().numpy().tobytes())


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a caller could find changed: identity, place and bits of every tensor, flags, modes, hooks."""
    return {
        "parameters": {
            name: (id(p), p.data_ptr(), _bits(p), p.requires_grad, id(p.grad), _bits(p.grad))
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {name: (id(b), b.data_ptr(), _bits(b)) for name, b in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "keys": list(model.state_dict()),
    }


def _global_state() -> dict[str, Any]:
    return {
        "torch": _bits(torch.get_rng_state()),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "gradients on": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


DATA: dict[str, Callable[[], Any]] = {
    "tensors": runs.data,
    "loader": lambda: DataLoader(TensorDataset(*runs.data()), batch_size=8),
    "shuffling loader": lambda: DataLoader(TensorDataset(*runs.data()), batch_size=8, shuffle=True),
}


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training: bool, data: str, lr: float | None) -> None:
    """Parameters, gradients, requires_grad, buffers (batch statistics of a training model too) and modes."""
    model = runs.initialized(_Everything(dropout=0.2)).train(training)
    (model.norm if training else model.dropout).train(not training)  # a mixture has to survive as well
    model.norm.running_mean.fill_(0.3)
    mse(model(runs.data()[0]), runs.data()[1]).backward()
    model.out.bias.grad = None
    before = _snapshot(model)
    _estimate(model, DATA[data](), lr=lr)
    assert _snapshot(model) == before


@pytest.mark.parametrize("lr", [1e-3, None])
def test_batch_statistics_of_a_training_model(lr: float | None) -> None:
    """Running mean, variance and count of a batch norm in training mode stay as they were."""
    model = runs.initialized(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))).train()
    before = _snapshot(model)
    _estimate(model, lr=lr)
    assert _snapshot(model) == before and int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_global_state_is_left_as_it_was(dropout: float, data: str, lr: float | None) -> None:
    """Random generators, number of threads, gradient mode: a program goes on as if nothing had runs.happened."""
    model = runs.initialized(_Everything(dropout))
    model.train() if dropout else model.eval()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = _global_state()
        _estimate(model, DATA[data](), lr=lr)
        assert _global_state() == before
    finally:
        torch.set_num_threads(threads)


def test_everything_is_left_as_it_was_when_the_loss_raises() -> None:
    """An error in the user's own code half-way through a chain comes out; model and globals are restored."""
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= 20:
            raise RuntimeError("the user's own error")
        return mse(output, target)

    model = runs.initialized(_Everything(dropout=0.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = _snapshot(model), _global_state()
        with pytest.raises(RuntimeError, match="the user's own error"):
            _estimate(model, loss_fn=loss_fn)
        assert (_snapshot(model), _global_state()) == before
    finally:
        torch.set_num_threads(threads)


def test_gradient_mode_of_the_caller() -> None:
    """Under torch.no_grad() the estimate is the same; sampling switches gradients on for itself."""
    result = _estimate(runs.mlp(), lr=None)
    with torch.no_grad():
        again = _estimate(runs.mlp(), lr=None)
        assert not torch.is_grad_enabled()
    assert np.array_equal(again.loss_trace, result.loss_trace)


def test_nothing_is_printed_without_progress(capfd: pytest.CaptureFixture[str]) -> None:
    """progress=False is silent; progress=True shows λ̂ on stderr."""
    _estimate(runs.mlp(), progress=False)
    assert capfd.readouterr() == ("", "")
    _estimate(runs.mlp(), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "λ̂" in err


# --- What the chains do -------------------------------------------------------------------------------------


def _by_hand(
    model: nn.Module,
    names: list[str],
    *,
    nbeta: float,
    seed: int,
    chain: int,
    steps: int,
) -> list[float]:
    """The losses of a chain, from a copy of the model, autograd and the specification alone."""
    model = copy.deepcopy(model)
    x, y = runs.data(dtype=torch.float64, targets=model(runs.data(dtype=torch.float64)[0]).shape[1])
    named = dict(model.named_parameters())
    sampled = [named[name] for name in names]
    anchors = [p.detach().clone() for p in sampled]
    scalars = StepScalars(lr=2e-3, nbeta=nbeta, localization=3.0)
    losses = []
    for step in range(steps):
        loss = mse(model(x), y)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, sampled)
        offset = 0
        for p, grad, anchor in zip(sampled, grads, anchors, strict=True):
            key = NoiseKey(seed, step=step, chain=chain)
            noise = reference.normals(offset, p.numel(), key).reshape(p.shape)
            offset += p.numel()
            with torch.no_grad():
                coordinates = reference.Coordinates(grad=grad, reference=anchor, noise=noise, w=p)
                reference.sgld(coordinates, scalars, step)
                p.copy_(coordinates.w)
    return losses


@pytest.mark.parametrize(
    ("make", "params", "names"),
    [
        (runs.mlp, None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (runs.mlp, "2.bias", ["2.bias"]),
        (runs.mlp, ["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (runs.mlp, "*.weight", ["0.weight", "2.weight"]),
        (runs.mlp, ["0.*", "*.bias", "0.bias"], ["0.weight", "0.bias", "2.bias"]),
        (lambda dtype: runs.initialized(_Tied().to(dtype)), None, ["first.weight", "first.bias", "second.bias"]),
        (lambda dtype: runs.initialized(_Tied().to(dtype)), "first.weight", ["first.weight"]),
    ],
    ids=[
        "all",
        "a name",
        "two names",
        "a pattern",
        "patterns that overlap",
        "tied weights",
        "only the tied weight",
    ],
)
def test_chains_follow_the_specification(
    make: Callable[..., nn.Module],
    params: Any,
    names: list[str],
) -> None:
    """In float64 with full batches the losses are those of a loop by hand, in which only `names` move.

    Parameters that are not sampled keep their value in the loss; tied weights are one parameter.
    """
    model = make(dtype=torch.float64)
    data = runs.data(dtype=torch.float64, targets=model(runs.data(dtype=torch.float64)[0]).shape[1])
    result = _estimate(
        model,
        data,
        lr=2e-3,
        localization=3.0,
        nbeta=50.0,
        params=params,
        seed=12,
        num_chains=3,
    )
    for chain in range(3):
        by_hand = _by_hand(model, names, nbeta=50.0, seed=12, chain=chain, steps=25)
        np.testing.assert_allclose(result.loss_trace[chain], by_hand, rtol=1e-10)
    named = dict(model.named_parameters())
    assert result.settings["num_parameters"] == sum(named[name].numel() for name in names)
    assert result.init_loss == pytest.approx(by_hand[0], rel=1e-13)


def test_frozen_parameters_are_not_sampled() -> None:
    """params=None leaves out what does not require a gradient; params= may name it all the same."""
    model, chosen = runs.mlp(), runs.mlp()
    model[0].requires_grad_(False)
    frozen = _estimate(model)
    assert np.array_equal(frozen.loss_trace, _estimate(chosen, params="2.*").loss_trace)
    assert frozen.settings["num_parameters"] == 5
    named = _estimate(model, params="*")
    assert np.array_equal(named.loss_trace, _estimate(chosen).loss_trace)
    assert not model[0].weight.requires_grad


def test_initial_loss_is_that_of_the_whole_data_set() -> None:
    """L(w*) is the mean over all samples, whatever the batch size and a shuffling loader's last batch."""
    x, y = runs.data(5003)
    model = runs.mlp()
    exact = float((model(x).detach().double() - y.double()).square().mean())
    for data, batch_size in (
        ((x, y), 7),
        ((x, y), None),
        (DataLoader(TensorDataset(x, y), batch_size=700, shuffle=True), None),
    ):
        result = _estimate(model, data, batch_size=batch_size, num_draws=1, num_burnin=0, num_chains=1)
        assert result.init_loss == pytest.approx(exact, rel=1e-6)


def test_first_loss_of_every_chain_is_at_the_trained_parameters() -> None:
    """Chains start at w*, each of them: with full batches the first loss is L(w*)."""
    result = _estimate(runs.mlp(), num_chains=4, lr=1e-2)
    np.testing.assert_allclose(result.loss_trace[:, 0], result.init_loss, rtol=1e-6)


def test_estimate_of_a_linear_regression() -> None:
    """In float64 with full batches λ̂ has a closed form, ½ Σ nβ·h / (a(1 − εa/4)) with a = nβ·h + γ."""
    x, y = runs.data(100, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    nbeta, gamma, lr = 20.0, 10.0, 0.005  # which makes bias 6 % of λ̂
    curvature = torch.linalg.eigvalsh(2 * x.T @ x / 100)
    a = nbeta * curvature + gamma
    exact = float((0.5 * nbeta * curvature / (a * (1 - lr * a / 4))).sum())
    result = _estimate(
        model, (x, y), nbeta=nbeta, localization=gamma, lr=lr, num_chains=4, num_draws=3000, num_burnin=100
    )
    assert result.llc_stderr < 0.05 * exact
    assert abs(result.llc_mean - exact) < 5 * result.llc_stderr
    assert runs.codes(result) == ["far"]  # from a w* that is near 0


def test_loaders_work() -> None:
    """A loader that gives the whole data set as one batch samples what the tensors themselves do."""
    model = runs.mlp()
    loader = _estimate(model, DataLoader(TensorDataset(*runs.data()), batch_size=40))
    np.testing.assert_allclose(loader.loss_trace, _estimate(model).loss_trace, rtol=1e-6)
    small = _estimate(model, DataLoader(TensorDataset(*runs.data()), batch_size=16, shuffle=True))
    assert np.isfinite(small.loss_trace).all()
    assert (small.settings["batch_size"], small.settings["num_samples"]) == (16, 40)


class _Batches:
    """An iterable of batches that does not tell n."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([runs.data()])


def test_iterables_of_batches_work_with_nbeta() -> None:
    """A pass that ends tells n, and giving nbeta is enough where it does not."""
    result = _estimate(runs.mlp(), _Batches(), nbeta=10.0)
    np.testing.assert_allclose(result.loss_trace, _estimate(runs.mlp(), nbeta=10.0).loss_trace, rtol=1e-6)
    assert result.settings["num_samples"] == 40  # counted in a pass


def test_iterator_that_can_be_read_once() -> None:
    """A generator of batches can't serve a chain: an error that says so, not a chain on the wrong data."""
    with pytest.raises(ValueError, match="exhausted iterator"):
        _estimate(runs.mlp(), (runs.data() for _ in range(3)), nbeta=10.0)


class _Dictionary(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        x, y = runs.data()
        return {"x": x[index]}, y[index]


def test_models_with_several_or_structured_inputs() -> None:
    """All but the last tensor of a batch are the model's inputs; a dictionary is handed over as it is."""
    x, y = runs.data()

    class Sum(nn.Linear):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return super().forward(first + second)

    class Keyed(nn.Linear):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(inputs["x"])

    expected = _estimate(runs.initialized(nn.Linear(3, 1))).loss_trace
    several = _estimate(runs.initialized(Sum(3, 1)), (x / 4, 3 * x / 4, y)).loss_trace
    keyed = _estimate(runs.initialized(Keyed(3, 1)), _Dictionary()).loss_trace
    np.testing.assert_allclose(several, expected, rtol=1e-5)
    np.testing.assert_allclose(keyed, expected, rtol=1e-5)


def test_a_model_that_works_in_place_on_its_input() -> None:
    """It gives what a model that leaves its input alone gives, with full batches as with minibatches."""

    class Shift(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    class Careful(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.5)

    for options in ({"batch_size": 8}, {"batch_size": None}, {"lr": None}):
        data = runs.data()
        in_place = _estimate(runs.initialized(Shift(3, 1)), data, **options)
        careful = _estimate(runs.initialized(Careful(3, 1)), runs.data(), **options)
        assert torch.equal(data[0], runs.data()[0])
        assert in_place.init_loss == careful.init_loss
        assert in_place.settings["lr"] == pytest.approx(careful.settings["lr"], rel=1e-4)
        # One runs chain by chain, the other in a batch, where a matrix library may sum in another order.
        np.testing.assert_allclose(in_place.loss_trace, careful.loss_trace, rtol=1e-4)


def test_channels_last_model() -> None:
    """The layout of a weight in memory does not change what is sampled."""
    x = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.mean(dim=(1, 2, 3)).unsqueeze(1)
    layers = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 1)) for _ in range(2)]
    models = [runs.initialized(model.double()) for model in layers]
    models[1].to(memory_format=torch.channels_last)
    assert not models[1][0].weight.is_contiguous()
    traces = [_estimate(model, (x, y)).loss_trace for model in models]
    np.testing.assert_allclose(traces[1], traces[0], rtol=1e-10)


# --- Settings and defaults ----------------------------------------------------------------------------------


def test_default_nbeta() -> None:
    """n / log n, with the natural logarithm, for ints and NumPy's ints."""
    assert llc_fast.default_nbeta(1000) == pytest.approx(1000 / math.log(1000), rel=1e-15)
    assert llc_fast.default_nbeta(2) == pytest.approx(2 / math.log(2), rel=1e-15)
    assert llc_fast.default_nbeta(np.int64(50)) == llc_fast.default_nbeta(50)  # type: ignore[arg-type]


def test_settings_say_what_was_chosen() -> None:
    """What was left None shows up with the value that was used."""
    result = llc_fast.estimate_llc(runs.mlp(), runs.data(600), mse, num_chains=1, num_draws=3, progress=False, seed=9)
    assert result.nbeta == pytest.approx(600 / math.log(600))
    expected = {
        "sampler": "sgld",
        "localization": llc_fast.default_localization(
            21, math.sqrt(sum(float(p.square().sum()) for p in runs.mlp().parameters()))
        ),
        "num_chains": 1,
        "num_burnin": 3,
        "num_draws": 3,
        "num_steps_bw_draws": 1,
        "batch_size": 512,
        "num_samples": 600,
        "num_parameters": 21,
        "training_mode": True,
        "device": "cpu",
        "seed": 9,
    }
    assert {k: result.settings[k] for k in expected} == expected
    assert result.settings["lr"] > 0 and result.settings["seconds"] > 0
    assert result.loss_trace.shape == (1, 6) and result.llc_trace.shape == (1, 3)


@pytest.mark.parametrize("make_number", [np.float32, np.float64, torch.tensor])
def test_numbers_of_other_kinds(make_number: Callable[[float], Any], tmp_path: Any) -> None:
    """NumPy's numbers and 0-dimensional tensors do as well; the result can be saved."""
    plain = _estimate(runs.mlp(), lr=2**-10, nbeta=8.0, localization=0.5)
    other = _estimate(
        runs.mlp(), lr=make_number(2**-10), nbeta=make_number(8.0), localization=make_number(0.5), progress=True
    )
    assert np.array_equal(plain.loss_trace, other.loss_trace) and other.llc_mean == plain.llc_mean
    other.save(tmp_path / "result.npz")
    assert LLCResult.load(tmp_path / "result.npz").settings == other.settings


COUNTS = ["num_chains", "num_draws", "num_burnin", "num_steps_bw_draws", "batch_size", "seed"]


@pytest.mark.parametrize("name", COUNTS)
def test_integers_of_numpy(name: str, tmp_path: Any) -> None:
    """A NumPy integer is as good as an int for every count; the result can be saved."""
    plain = _estimate(runs.mlp(), **{name: 3})
    other = _estimate(runs.mlp(), **{name: np.int64(3)})
    assert np.array_equal(plain.loss_trace, other.loss_trace)
    other.save(tmp_path / "result.npz")
    assert LLCResult.load(tmp_path / "result.npz").settings == other.settings


# --- Warnings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.Dropout(0.5), "1"), (nn.BatchNorm1d(4), "1"), (nn.Dropout1d(0.5), "1")], ids=str
)
def test_training_mode_is_warned_about(layer: nn.Module, name: str) -> None:
    """Dropout or batch statistics: a warning that names the layer and the remedy; none after eval()."""
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    (warning,) = runs.happened(_estimate(runs.initialized(model).train()))
    assert warning.code == "training-mode" and f"({name})" in warning and "model.eval()" in warning
    assert runs.happened(_estimate(model.eval())) == []


def test_training_mode_without_such_layers() -> None:
    """A training model whose loss is the same in both modes is nothing to warn about."""
    assert runs.happened(_estimate(runs.mlp().train())) == []


def test_unused_parameters_are_warned_about() -> None:
    """Parameters that the loss never uses are named, with the remedy, and following it ends the warning."""

    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.spare = nn.Parameter(torch.zeros(5))

    model = runs.initialized(Spare())
    (warning,) = runs.happened(_estimate(model))
    assert warning.code == "unused" and "spare" in warning and "params=" in warning and "1 of the parameters" in warning
    assert runs.happened(_estimate(model, params=["weight", "bias"])) == []


@pytest.mark.parametrize("make", [runs.mlp, lambda: runs.initialized(nn.Linear(3, 1))], ids=["saturating", "linear"])
@pytest.mark.parametrize("num_chains", [1, 3])
def test_diverged_chains(make: Callable[[], nn.Module], num_chains: int) -> None:
    """A step size far too large: no exception, but NaN, a count of lost chains and a smaller lr to try."""
    result = _estimate(make(), lr=1e6, nbeta=100.0, num_chains=num_chains, num_draws=100)
    lost = int(np.isnan(result.llc_per_chain).sum())
    assert lost == num_chains == result.diagnostics["chains_diverged"]
    assert math.isnan(result.llc_mean) and math.isnan(result.llc_stderr) and math.isnan(result.llc_std)
    (warning,) = runs.happened(result)
    assert warning.code == "diverged" and f"{lost} of {num_chains}" in warning and "lr=1e+05" in warning
    # From the step on at which a chain was lost its row is NaN, before that it is what was seen.
    for row in result.loss_trace:
        first = int(np.isnan(row).argmax())
        assert first >= 1 and np.isfinite(row[:first]).all() and np.isnan(row[first:]).all()


def test_some_diverged_chains() -> None:
    """Chains that stayed finite make the estimate; the lost ones are NaN, counted and warned about."""

    class Cliff(nn.Module):
        """A parabola that ends: beyond 2.1 standard deviations there is no loss."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            edge = torch.where(self.w.detach().abs() > 2.1, math.nan, 0.0)
            return self.w + 0 * x + edge

    x = torch.zeros(4, 1, dtype=torch.float64)
    options: dict[str, Any] = {"nbeta": 1.0, "localization": 0.0, "lr": 0.5, "num_chains": 12}
    result = _estimate(Cliff(), (x, x), lambda out, y: 0.5 * (out - y).square().mean(), **options)
    good = np.isfinite(result.loss_trace).all(axis=1)
    lost = int((~good).sum())
    assert 0 < lost < 12 and result.diagnostics["chains_diverged"] == lost
    assert np.array_equal(np.isnan(result.llc_per_chain), ~good)
    assert result.llc_mean == pytest.approx(result.llc_per_chain[good].mean())
    assert result.llc_std == pytest.approx(result.llc_per_chain[good].std(ddof=1))
    (warning,) = runs.happened(result)
    assert warning.code == "diverged" and f"{lost} of 12" in warning


# --- Seeds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full batch", "minibatches", "shuffling loader", "dropout", "chosen lr"])
def test_seeds(kind: str) -> None:
    """Equal seeds give equal results bit for bit, whatever torch's generator does; other seeds don't."""
    model = nn.Sequential(runs.mlp(), nn.Dropout(0.5)).train(kind == "dropout")
    options: dict[str, Any] = {
        "full batch": {},
        "minibatches": {"batch_size": 7},
        "shuffling loader": {"data": DATA["shuffling loader"]()},
        "dropout": {},
        "chosen lr": {"lr": None, "batch_size": 7},
    }[kind]
    torch.manual_seed(1)
    first = _estimate(model, seed=5, **options)
    torch.manual_seed(2)
    again = _estimate(model, seed=5, **options)
    other = _estimate(model, seed=6, **options)
    assert np.array_equal(again.loss_trace, first.loss_trace)
    assert again.settings["lr"] == first.settings["lr"]
    assert again.init_loss == first.init_loss and again.llc_mean == first.llc_mean
    assert not (other.loss_trace[:, 1:] == first.loss_trace[:, 1:]).any()


@pytest.mark.parametrize("kind", ["full batch", "minibatches", "shuffling loader", "dropout"])
def test_chains_do_not_depend_on_their_number(kind: str) -> None:
    """Chain c is the same chain in a run of one more; chains of a run differ."""
    model = nn.Sequential(runs.mlp(), nn.Dropout(0.5)).train(kind == "dropout")
    data = DATA["shuffling loader"]() if kind == "shuffling loader" else runs.data()
    batch_size = 7 if kind == "minibatches" else None
    traces = [_estimate(model, data, batch_size=batch_size, num_chains=c).loss_trace for c in (1, 2, 4)]
    for trace in traces[:-1]:  # to rounding: a matrix library may sum one chain's product in another order than four's
        np.testing.assert_allclose(trace, traces[-1][: len(trace)], rtol=1e-4)
    for chain in range(1, 4):
        assert not (traces[-1][chain, 1:] == traces[-1][0, 1:]).any()


def test_batches_of_chains_differ() -> None:
    """Chains draw batches of their own: at w* already, their losses differ."""
    result = _estimate(runs.mlp(), batch_size=3, num_chains=4)
    assert len(set(result.loss_trace[:, 0])) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads: int) -> None:
    """A small model gives the same losses however many threads torch is set to use."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = _estimate(runs.mlp(), runs.data(512))
        torch.set_num_threads(3)
        assert np.array_equal(_estimate(runs.mlp(), runs.data(512)).loss_trace, result.loss_trace)
    finally:
        torch.set_num_threads(before)
