"""What is sampled and how the loss is called: params=, masks, forms of loss and data, observables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import arguments, happened
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import llc_fast
from llc_fast import Draw, data
from llc_fast.data import make_source
from llc_fast.objective.objective import takes_model
from llc_fast.objective.selection import select
from llc_fast.result import LLCResult
from llc_fast.samplers import samplers_with_optimizer

CPU = torch.device("cpu")
STEPPED = samplers_with_optimizer()
N = 24


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    numbers = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return numbers[:, :3].clone(), numbers[:, 3:].clone()


def _initialize(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.to(dtype).parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def _mlp(dtype: torch.dtype = torch.float64) -> Any:
    return _initialize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), dtype)


class _Tied(nn.Module):
    """Two layers that share a weight, which thereby goes by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.first(x))))


def _estimate(model: nn.Module, data: Any = None, loss_fn: Any = F.mse_loss, **options: Any) -> LLCResult:
    chosen: dict[str, Any] = {"lr": 1e-2, "num_chains": 2, "num_draws": 15, "num_burnin": 3, "nbeta": 5.0}
    return llc_fast.estimate_llc(
        model, _data() if data is None else data, loss_fn, progress=False, **arguments(chosen | options)
    )


def _moved(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Which elements of each sampled parameter ever left w*, in any chain, as the observables see them."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: dict[str, Tensor] = {}

    def look(draw: Draw) -> float:
        for name, p in draw.params.items():
            assert p.shape == start[name].shape and not p.requires_grad
            moved[name] = moved.get(name, torch.zeros(p.shape, dtype=torch.bool)) | (p != start[name])
        return 0.0

    _estimate(model, observables={"look": look}, **options)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    return moved


# --- Which parameters ---------------------------------------------------------------------------------------

SELECTIONS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "everything": (lambda m: None, {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "a name": (lambda m: "2.bias", {"2.bias"}),
    "a glob": (lambda m: "*.bias", {"0.bias", "2.bias"}),
    "a set of characters": (lambda m: "[0-1].*", {"0.weight", "0.bias"}),
    "a module": (lambda m: m[2], {"2.weight", "2.bias"}),
    "the model": (lambda m: m, {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "a parameter": (lambda m: m[0].weight, {"0.weight"}),
    "a list of all kinds": (lambda m: ["0.bias", m[2], m[0].bias, "2.*"], {"0.bias", "2.weight", "2.bias"}),
    "a tuple": (lambda m: (m[0].weight, "2.bias"), {"0.weight", "2.bias"}),
    "a generator": (lambda m: (p for p in m.parameters() if p.ndim == 1), {"0.bias", "2.bias"}),
    "a mapping to True": (lambda m: {"2.bias": True, m[0]: True}, {"0.weight", "0.bias", "2.bias"}),
    "a mapping to None": (lambda m: {m[0].bias: None}, {"0.bias"}),
}


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("kind", SELECTIONS)
def test_selections(kind: str, strategy: str) -> None:
    """By name, pattern, module or parameter: all elements of these move in every chain, no others are sampled."""
    model = _mlp()
    choose, names = SELECTIONS[kind]
    moved = _moved(model, params=choose(model), strategy=strategy)
    assert set(moved) == names and all(m.all() for m in moved.values())
    result = _estimate(model, params=choose(model), strategy=strategy)
    assert result.settings["num_parameters"] == sum(m.numel() for m in moved.values())


def test_selection_keeps_the_models_order() -> None:
    """However they are named, parameters come in the model's order, so that the noise does not depend on it."""
    model = _mlp()
    assert list(select(model, ["2.bias", "0.weight", model[0]])) == ["0.weight", "0.bias", "2.bias"]
    forwards, backwards = _estimate(model, params=["0.weight", "2.bias"]), _estimate(model, params=["2.bias", "0.w*"])
    assert np.array_equal(forwards.loss_trace, backwards.loss_trace)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize(
    "params",
    ["first.weight", "second.weight", "*.weight", "second.*", ["first.weight", "second.weight"], nn.Linear],
    ids=str,
)
def test_tied_weights_are_one_parameter(params: Any, strategy: str) -> None:
    """By either name or module, under the first name, once, and both layers see it move."""
    model = _initialize(_Tied())
    moved = _moved(model, params=model.second if params is nn.Linear else params, strategy=strategy)
    assert "first.weight" in moved and "second.weight" not in moved and moved["first.weight"].all()
    expected = {"*.weight": {"first.weight", "out.weight"}, "second.*": {"first.weight", "second.bias"}}
    assert params is nn.Linear or set(moved) == expected.get(str(params), {"first.weight"})
    # Untied, with the same weights, the second layer would stay where it is.
    torch.manual_seed(0)
    untied = _initialize(_Tied())
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    tied_trace = _estimate(model, params="first.weight", strategy=strategy).loss_trace
    untied_trace = _estimate(untied, params="first.weight", strategy=strategy).loss_trace
    np.testing.assert_allclose(tied_trace[:, 0], untied_trace[:, 0], rtol=1e-12)
    assert (tied_trace[:, 1:] != untied_trace[:, 1:]).all()


def test_frozen_parameters_can_be_named() -> None:
    """params= decides, not requires_grad; the flag stays as it was."""
    model = _mlp()
    model[0].requires_grad_(False)
    assert set(_moved(model)) == {"2.weight", "2.bias"}
    assert set(_moved(model, params=model[0])) == {"0.weight", "0.bias"}
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("3.*", ValueError, r"params='3\.\*' matches no parameter; the model has: 0\.weight, 0\.bias"),
        (["0.weight", "weight"], ValueError, "params='weight' matches no parameter"),
        ([], ValueError, "params is empty"),
        ({}, ValueError, "params is empty"),
        (nn.Linear(3, 4), ValueError, "holds a Linear with no parameter of the model"),
        (nn.Parameter(torch.ones(3)), ValueError, "holds a Parameter with no parameter of the model"),
        (nn.Tanh(), ValueError, "holds a Tanh with no parameter of the model"),
        (5, TypeError, "params must hold names, glob patterns, modules or parameters, got int"),
        ([5], TypeError, "params must hold names, glob patterns, modules or parameters, got int"),
        ({"0.bias": torch.ones(4)}, TypeError, r"mask of parameter '0\.bias' must be .*torch\.bool, got torch\.float"),
        ({"0.bias": [True, False, True, True]}, TypeError, r"must be a tensor of dtype torch\.bool, got list"),
        ({"0.bias": False}, TypeError, "must be a tensor of dtype .*got bool"),
        ({"0.bias": torch.ones(3, dtype=torch.bool)}, ValueError, r"has shape \(3,\), which does not fit \(4,\)"),
        ({"0.bias": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"has shape \(2, 4\), which does not fit"),
        ({"0.*": torch.ones(4, 3, dtype=torch.bool)}, ValueError, r"'0\.bias' has shape \(4, 3\)"),
        ({"0.bias": torch.zeros(4, dtype=torch.bool)}, ValueError, "False everywhere: leave the parameter out"),
    ],
)
def test_wrong_selections(params: Any, error: type[Exception], message: str) -> None:
    """What is not the model's, and masks that do not fit: before any sampling, naming what was given."""
    with pytest.raises(error, match=message):
        _estimate(_mlp(), params=params)


def test_buffers_can_not_be_sampled() -> None:
    """A buffer's name matches no parameter."""
    model = _initialize(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).eval()
    with pytest.raises(ValueError, match=r"'1\.running_mean' matches no parameter"):
        _estimate(model, params="1.running_mean")


# --- Masks (weight-refined LLC) -----------------------------------------------------------------------------


def _mask(*shape: int) -> Tensor:
    """About half of the elements, at least one of each kind."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 0.5
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("sampler", STEPPED)
def test_masked_elements_never_move(sampler: str, strategy: str) -> None:
    """Bit for bit at w*, whatever the sampler; all others move; only these are counted."""
    model, mask = _mlp(), _mask(4, 3)
    params = {"0.weight": mask, model[2].bias: True}
    moved = _moved(model, params=params, sampler=sampler, strategy=strategy)
    assert set(moved) == {"0.weight", "2.bias"}
    assert torch.equal(moved["0.weight"], mask) and moved["2.bias"].all()
    result = _estimate(model, params=params, sampler=sampler, strategy=strategy)
    assert result.settings["num_parameters"] == int(mask.sum()) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_elements_of_every_precision(dtype: torch.dtype) -> None:
    """Chains of low-precision models too."""
    model, mask = _mlp(dtype), _mask(4, 3)
    moved = _moved(model, params={"0.weight": mask}, data=_data(dtype), lr=0.1)
    assert not (moved["0.weight"] & ~mask).any() and moved["0.weight"].any()


@pytest.mark.parametrize(
    ("mask", "full"),
    [
        (torch.tensor(True), torch.ones(4, 3, dtype=torch.bool)),
        (torch.tensor([True, False, True]), torch.tensor([[True, False, True]] * 4)),
        (torch.tensor([[True], [False], [False], [True]]), torch.tensor([[k in (0, 3)] * 3 for k in range(4)])),
    ],
    ids=["one", "columns", "rows"],
)
def test_masks_broadcast(mask: Tensor, full: Tensor) -> None:
    """A row of a matrix, a head: a mask of any shape that expands to the parameter's."""
    assert torch.equal(_moved(_mlp(), params={"0.weight": mask})["0.weight"], full)


def test_a_mask_for_several_parameters() -> None:
    """By pattern or module, where it fits them all; a later entry overrides an earlier one."""
    model = _initialize(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    first, second = torch.tensor([True, False, False]), torch.tensor([False, True, True])
    moved = _moved(model, params={"*": first, model[2].bias: second, "0.bias": True}, data=(_data()[0], _data()[0]))
    assert torch.equal(moved["0.weight"], first.expand(3, 3)) and torch.equal(moved["2.weight"], first.expand(3, 3))
    assert torch.equal(moved["2.bias"], second) and moved["0.bias"].all()


def test_masks_are_copied() -> None:
    """A mask that the caller changes afterwards does not follow into the run, nor the run's into the caller's."""
    mask = _mask(4, 3)
    kept = mask.clone()
    selected = select(_mlp(), {"0.weight": mask.expand(4, 3)})
    _estimate(_mlp(), params={"0.weight": mask})
    assert torch.equal(mask, kept) and torch.equal(selected["0.weight"], kept)  # type: ignore[arg-type]


class _Product(nn.Module):
    """The same function of four numbers, held as one parameter or as two."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        w = torch.tensor([0.3, -0.2, 0.5, 0.7], dtype=torch.float64)
        if split:
            self.moving, self.fixed = nn.Parameter(w[:2].clone()), nn.Parameter(w[2:].clone())
        else:
            self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.moving, self.fixed]) if hasattr(self, "moving") else self.w
        return ((x * w[:3]).sum(dim=1, keepdim=True) * w[3]).tanh()


SAMPLER_OPTIONS = [(name, {}) for name in STEPPED] + [
    (name, {"relative_eps": True, "adapt_steps": 5}) for name, cls in STEPPED.items() if cls.metric == "adaptive"
]


@pytest.mark.parametrize(("sampler", "options"), SAMPLER_OPTIONS)
def test_masking_is_freezing(sampler: str, options: dict[str, Any]) -> None:
    """Half of a parameter masked is that half held apart and frozen: thermostats and scales see what moves alone."""
    chosen = {"sampler": sampler, "sampler_options": options}
    mask = torch.tensor([True, True, False, False])
    masked = _estimate(_Product(False), params={"w": mask}, **chosen)
    frozen = _estimate(_Product(True), params="moving", **chosen)
    np.testing.assert_allclose(masked.loss_trace, frozen.loss_trace, rtol=1e-11)
    assert masked.settings["num_parameters"] == frozen.settings["num_parameters"] == 2


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_default_step_size_of_a_mask(gamma: float) -> None:
    """0.2 / (nβ·h_max + γ) with the curvature within the mask: at most 10 % more, h_max being a lower bound."""
    x = _data()[0] * torch.tensor([10.0, 1.0, 0.3])
    model = _initialize(nn.Linear(3, 1, bias=False))
    mask = torch.tensor([[False, True, True]])
    result = _estimate(model, (x, x[:, :1]), params={"weight": mask}, lr=None, localization=gamma)
    kept = x[:, mask[0]]
    exact = 0.2 / (5.0 * float(torch.linalg.eigvalsh(2 * kept.T @ kept / N)[-1]) + gamma)
    assert exact * (1 - 1e-3) <= result.settings["lr"] <= 1.1 * exact


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_known_answer_of_a_mask(strategy: str) -> None:
    """A quadratic bowl of 40 dimensions with 10 free: λ = 5, less the pull of γ and the step's known bias."""

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(40, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.square().sum() / 2 + 0 * x.sum()

    mask = torch.arange(40) % 4 == 0
    x = torch.zeros(4, 1, dtype=torch.float64)
    nbeta, gamma, lr = 20.0, 5.0, 0.02
    result = _estimate(
        Bowl(),
        (x, x),
        lambda output, target: output,
        params={"w": mask},
        nbeta=nbeta,
        localization=gamma,
        lr=lr,
        num_chains=4,
        num_draws=1500,
        num_burnin=50,
        strategy=strategy,
    )
    a = nbeta + gamma
    exact = 0.5 * 10 * nbeta / (a * (1 - lr * a / 4))
    assert result.llc_stderr < 0.05 * exact and abs(result.llc_mean - exact) < 5 * result.llc_stderr


# --- How the loss is called ---------------------------------------------------------------------------------


@dataclass
class _Output:
    loss: Tensor
    logits: Tensor


class _OwnLoss(nn.Sequential):
    """A model in the manner of Hugging Face's: named inputs, labels, and its own loss."""

    def __init__(self, kind: str = "object") -> None:
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.kind = kind

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = super().forward(inputs)
        loss = None if labels is None else F.mse_loss(logits, labels)
        return {"loss": loss, "logits": logits} if self.kind == "dictionary" else _Output(loss, logits)


def _named(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"inputs": x, "labels": y}


class _NamedSamples(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = _data()
        return _named(x[index], y[index])


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("kind", ["object", "dictionary"])
@pytest.mark.parametrize("batch_size", [5, None])
def test_models_with_their_own_loss(kind: str, strategy: str, batch_size: int | None) -> None:
    """loss_fn=None: model(**batch), whose .loss or ["loss"] counts; the same chains as with a loss function."""
    expected = _estimate(_mlp(), batch_size=batch_size).loss_trace
    model = _initialize(_OwnLoss(kind))
    for given in (_named(*_data()), _NamedSamples()):
        result = _estimate(model, given, None, strategy=strategy, batch_size=batch_size)
        np.testing.assert_allclose(result.loss_trace, expected, rtol=1e-11)
        assert result.settings["num_samples"] == N


def test_models_with_their_own_loss_and_a_loader() -> None:
    """Dictionaries as a loader collates them."""
    expected = _estimate(_mlp(), DataLoader(TensorDataset(*_data()), batch_size=5)).loss_trace
    result = _estimate(_initialize(_OwnLoss()), DataLoader(_NamedSamples(), batch_size=5), None)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=1e-11)


def test_own_loss_of_another_form() -> None:
    """Batches that are no dictionaries, outputs without a loss: errors that say what was expected."""
    with pytest.raises(TypeError, match="batches that are dictionaries; these are tuple"):
        _estimate(_initialize(_OwnLoss()), _data(), None)
    with pytest.raises(TypeError, match="must return a tensor, got NoneType"):
        _estimate(_initialize(_OwnLoss("dictionary")), {"inputs": _data()[0]}, None)
    with pytest.raises(TypeError, match="unexpected keyword") as caught:
        _estimate(_initialize(_OwnLoss()), {"inputs": _data()[0], "tokens": _data()[1]}, None)
    assert "tokens" in str(caught.value)


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch.values() if isinstance(batch, Mapping) else batch
    return F.mse_loss(model(x), y)


class _LossObject:
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return _loss_of_model(model, batch)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("loss_fn", [_loss_of_model, _LossObject(), lambda model, batch: _loss_of_model(model, batch)])
def test_loss_functions_of_model_and_batch(loss_fn: Any, strategy: str) -> None:
    """Told by the name of the first parameter; the batch is handed over as the data give it."""
    expected = _estimate(_mlp(), batch_size=5).loss_trace
    x, y = _data()
    for given in ((x, y), {"x": x, "y": y}, TensorDataset(x, y), [(a, b) for a, b in zip(x, y, strict=True)]):
        found = _estimate(_mlp(), given, loss_fn, strategy=strategy, batch_size=5).loss_trace
        np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_which_loss_functions_take_the_model() -> None:
    """A parameter called `model`, in the first place, and nothing else."""

    def second(output: Tensor, model: Tensor) -> Tensor:
        return output - model

    assert takes_model(_loss_of_model) and takes_model(_LossObject()) and takes_model(None)
    for other in (F.mse_loss, nn.MSELoss(), second, max, lambda: 0, print, lambda *model_and_batch: 0):
        assert not takes_model(other)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_one_tensor_as_data(strategy: str) -> None:
    """Unsupervised: the batch is a tensor, as it is for a loader and a data set whose samples are tensors."""
    x = _data()[0]
    model = _initialize(nn.Linear(3, 3))

    def reconstruct(model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(batch, Tensor) and batch.shape[1:] == (3,)
        return F.mse_loss(model(batch), batch)

    expected = _estimate(model, (x, x), batch_size=6).loss_trace
    for given in (x, Subset(list(x), range(N))):  # type: ignore[arg-type]
        found = _estimate(model, given, reconstruct, batch_size=6, strategy=strategy)
        np.testing.assert_allclose(found.loss_trace, expected, rtol=1e-11)
        assert found.settings["num_samples"] == N
    loader = _estimate(model, DataLoader(list(x), batch_size=N), reconstruct)  # type: ignore[arg-type]
    np.testing.assert_allclose(loader.loss_trace, _estimate(model, (x, x)).loss_trace, rtol=1e-11)


@pytest.mark.parametrize("empty", [torch.zeros(0, 3), torch.tensor(1.0), {"x": torch.zeros(0, 3)}], ids=str)
def test_one_tensor_without_samples(empty: Any) -> None:
    """Empty data are told so, in whatever form."""
    with pytest.raises(ValueError, match="data is empty"):
        _estimate(_mlp(), empty, lambda model, batch: model(batch).mean())


def test_wrong_calls_say_how_the_loss_was_called() -> None:
    """The user's own error, with a note on what it was called with."""

    def confused(net: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1])

    with pytest.raises(TypeError) as caught:
        _estimate(_mlp(), loss_fn=confused)
    if hasattr(caught.value, "__notes__"):  # Python 3.11 and later
        assert "first parameter is called `model`" in caught.value.__notes__[0]


# --- Losses of single samples -------------------------------------------------------------------------------


def _each(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none")[:, 0]


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("batch_size", [1, 5, N])
def test_losses_of_single_samples(batch_size: int, strategy: str) -> None:
    """One loss for each sample gives the chains, L(w*) and λ̂ of their mean."""
    mean = _estimate(_mlp(), batch_size=batch_size, strategy=strategy)
    each = _estimate(_mlp(), loss_fn=_each, batch_size=batch_size, strategy=strategy)
    np.testing.assert_allclose(each.loss_trace, mean.loss_trace, rtol=1e-11)
    assert each.init_loss == pytest.approx(mean.init_loss, rel=1e-12)
    assert each.llc_mean == pytest.approx(mean.llc_mean, rel=1e-9)


def test_losses_of_single_samples_from_a_loader() -> None:
    """With a smaller last batch, whose samples count as much as all others in L(w*)."""
    loader = DataLoader(TensorDataset(*_data()), batch_size=7)
    mean, each = _estimate(_mlp(), loader), _estimate(_mlp(), loader, _each)
    np.testing.assert_allclose(each.loss_trace, mean.loss_trace, rtol=1e-11)
    exact = float(_each(_mlp()(_data()[0]), _data()[1]).detach().mean())
    assert each.init_loss == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (lambda output, target: (output - target).square(), r"\(24, 1\)"),
        (lambda output, target: (output - target).square().mean(dim=0), r"\(1,\)"),
        (lambda output, target: (output - target).square().view(2, -1), r"\(2, 12\)"),
    ],
)
def test_losses_of_another_shape(loss_fn: Any, shape: str) -> None:
    """Neither a scalar nor one number for each sample."""
    with pytest.raises(ValueError, match=f"a scalar, or one loss for each of 24 samples, got shape {shape}"):
        _estimate(_mlp(), loss_fn=loss_fn)


# --- Observables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("chains", [1, 3, 18])
def test_observables_see_their_draw(chains: int, strategy: str) -> None:
    """Chain, draw and step, loss, batch and parameters belong together, in groups and threads of any number."""
    model, (x, y) = _mlp(), _data()
    at_anchor = {name: p.detach().clone() for name, p in model.named_parameters()}

    def again(draw: Draw) -> Tensor:
        batch_x, batch_y = draw.batch
        hidden = torch.tanh(F.linear(batch_x, draw.params["0.weight"], draw.params["0.bias"]))
        return F.mse_loss(F.linear(hidden, draw.params["2.weight"], draw.params["2.bias"]), batch_y)

    def known(draw: Draw) -> bool:
        rows = (draw.batch[0][:, None] == x).all(dim=2)
        return bool(torch.equal(draw.batch[1][:, 0], (rows.double() @ y)[:, 0])) and draw.batch[0].shape == (5, 3)

    result = _estimate(
        model,
        strategy=strategy,
        batch_size=5,
        num_chains=chains,
        num_draws=6,
        num_burnin=4,
        num_steps_bw_draws=3,
        observables={
            "names": lambda draw: torch.tensor([draw.chain, draw.draw, draw.step]),
            "loss": lambda draw: draw.loss,
            "again": again,
            "at w*": lambda draw: again(dataclasses.replace(draw, params=at_anchor)),
            "known": known,
        },
    )
    values = result.observables
    steps = np.arange(6, 23, 3)
    for chain in range(chains):
        assert np.array_equal(values["names"][chain], np.stack([np.full(6, chain), np.arange(6), steps], axis=1))
    paired = values["loss"] - values["at w*"] + result.init_loss
    np.testing.assert_allclose(result.loss_trace[:, steps], paired, rtol=1e-12)
    np.testing.assert_allclose(values["again"], values["loss"], rtol=1e-12)
    assert values["known"].all() and values["known"].shape == (chains, 6)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_observables_do_not_change_the_chains(strategy: str) -> None:
    """Looking is not touching: the same bits."""
    plain = _estimate(_mlp(), strategy=strategy, batch_size=5)
    watched = _estimate(_mlp(), strategy=strategy, batch_size=5, observables={"loss": lambda draw: draw.loss})
    assert np.array_equal(plain.loss_trace, watched.loss_trace) and plain.observables == {}


VALUES: dict[str, tuple[Callable[[Draw], Any], tuple[int, ...]]] = {
    "number": (lambda draw: draw.step, ()),
    "bool": (lambda draw: draw.chain > 0, ()),
    "numpy number": (lambda draw: np.float32(draw.step), ()),
    "numpy array": (lambda draw: np.arange(6).reshape(2, 3), (2, 3)),
    "list": (lambda draw: [draw.chain, draw.draw], (2,)),
    "scalar tensor": (lambda draw: draw.loss, ()),
    "tensor with a graph": (lambda draw: torch.ones(2, requires_grad=True) * 2, (2,)),
    "parameter": (lambda draw: draw.params["0.weight"], (4, 3)),
    "integers": (lambda draw: torch.arange(3), (3,)),
    "bfloat16": (lambda draw: torch.ones(2, dtype=torch.bfloat16), (2,)),
    "empty": (lambda draw: torch.zeros(0, 2), (0, 2)),
}


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("kind", VALUES)
def test_values_of_observables(kind: str, strategy: str) -> None:
    """Numbers and tensors of any kind and fixed shape become float64 [chain, draw, …]."""
    function, shape = VALUES[kind]
    values = _estimate(_mlp(), strategy=strategy, observables={kind: function}).observables[kind]
    assert values.shape == (2, 15, *shape) and values.dtype == np.float64 and np.isfinite(values).all()


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_recorded_parameters_are_copies(strategy: str) -> None:
    """What is recorded of a chain's memory does not move on with it: each draw is another point."""
    values = _estimate(_mlp(), strategy=strategy, observables={"w": lambda draw: draw.params["2.bias"]}).observables
    assert len(np.unique(values["w"])) == values["w"].size == 30


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("size", [5, N])
def test_losses_of_samples_in_observables(size: int, strategy: str) -> None:
    """sample_losses is [batch], in the batch's order, with the draw's loss as its mean; None without them."""

    def check(draw: Draw) -> Tensor:
        assert draw.sample_losses is not None and draw.sample_losses.shape == (size,)
        hidden = torch.tanh(F.linear(draw.batch[0], draw.params["0.weight"], draw.params["0.bias"]))
        output = F.linear(hidden, draw.params["2.weight"], draw.params["2.bias"])
        torch.testing.assert_close(draw.sample_losses, _each(output, draw.batch[1]), rtol=1e-10, atol=1e-12)
        return draw.sample_losses.mean() - draw.loss

    result = _estimate(_mlp(), loss_fn=_each, batch_size=size, strategy=strategy, observables={"check": check})
    np.testing.assert_allclose(result.observables["check"], 0, atol=1e-14)
    absent = _estimate(_mlp(), strategy=strategy, observables={"none": lambda draw: draw.sample_losses is None})
    assert absent.observables["none"].all()


def test_losses_of_samples_with_microbatches_and_loaders() -> None:
    """The pieces' losses are put together again."""
    loader = DataLoader(TensorDataset(*_data()), batch_size=8)
    observables = {"each": lambda draw: draw.sample_losses}
    whole = _estimate(_mlp(), loader, _each, observables=observables)
    pieces = _estimate(_mlp(), loader, _each, observables=observables, microbatch_size=3)
    assert whole.observables["each"].shape == (2, 15, 8)
    np.testing.assert_allclose(pieces.observables["each"], whole.observables["each"], rtol=1e-11)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("odd", [lambda draw: draw.draw == 7, lambda draw: draw.chain == 1], ids=["draw", "chain"])
def test_observables_of_changing_shape(odd: Callable[[Draw], bool], strategy: str) -> None:
    """From draw to draw or from chain to chain: an error that names the observable and both shapes."""
    observables = {"odd": lambda draw: torch.ones(3) if odd(draw) else 1.0}
    with pytest.raises(
        ValueError, match=r"observables\['odd'\] returned shape \((3,)?\) after \((3,)?\): return the same shape"
    ):
        _estimate(_mlp(), strategy=strategy, observables=observables)


@pytest.mark.parametrize(
    ("observables", "error", "message"),
    [
        ([lambda draw: 0], TypeError, "must be a mapping from names to functions, got list"),
        ({"a": 5}, TypeError, "must map names to functions of a draw, got 'a': 5"),
        ({3: lambda draw: 0}, TypeError, "must map names to functions of a draw, got 3"),
    ],
)
def test_wrong_observables(observables: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _estimate(_mlp(), observables=observables)


def test_observables_that_return_nonsense() -> None:
    """What is no number is the caller's error, and comes out."""
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        _estimate(_mlp(), observables={"text": lambda draw: "abc"})


def test_observables_survive_saving(tmp_path: Any) -> None:
    """In the file with the rest."""
    result = _estimate(_mlp(), observables={"w": lambda draw: draw.params["0.bias"]})
    result.save(tmp_path / "result.npz")
    assert np.array_equal(LLCResult.load(tmp_path / "result.npz").observables["w"], result.observables["w"])


# --- Data that need care ------------------------------------------------------------------------------------


class _Stream(IterableDataset[Any]):
    """Samples without a length; counts how far it was read."""

    def __init__(self, count: int = 10**9) -> None:
        self.count, self.furthest = count, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = _data()
        for k in range(self.count):
            self.furthest = max(self.furthest, k)
            yield x[k % N], y[k % N]


def test_data_without_an_end() -> None:
    """L(w*) is taken over as many batches as a chain has steps, with a warning; nothing reads on for ever."""
    stream = _Stream()
    result = _estimate(_mlp(), DataLoader(stream, batch_size=N), num_burnin=3, num_draws=4)
    (warning,) = happened(result)
    assert warning.code == "truncated" and "first 7 batches" in warning
    assert stream.furthest < 10 * N and result.settings["num_samples"] is None
    assert result.init_loss == pytest.approx(_estimate(_mlp()).init_loss, rel=1e-12)
    with pytest.raises(ValueError, match="nbeta=None requires the dataset size"):
        _estimate(_mlp(), DataLoader(_Stream(), batch_size=N), nbeta=None)


def test_data_without_a_length_that_end() -> None:
    """Where the pass comes to the end by itself, nothing is left out and nothing is warned about."""
    result = _estimate(_mlp(), DataLoader(_Stream(N), batch_size=5))
    assert happened(result) == []
    assert result.init_loss == pytest.approx(_estimate(_mlp()).init_loss, rel=1e-12)


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders_that_drop_their_last_batch(shuffle: bool) -> None:
    """drop_last is for minibatches: L(w*) is over the whole data set all the same."""
    loader = DataLoader(TensorDataset(*_data()), batch_size=7, drop_last=True, shuffle=shuffle)
    sizes = []
    result = _estimate(_mlp(), loader, observables={"size": lambda draw: sizes.append(len(draw.batch[0])) or 0})
    assert result.init_loss == pytest.approx(_estimate(_mlp()).init_loss, rel=1e-12)
    assert set(sizes) == {7}


def test_loaders_that_drop_their_last_batch_keep_to_their_sampler() -> None:
    """A loader of a part of the data set: L(w*) is over that part, none of it left out."""
    part = list(range(3, 20))
    x, y = _data()
    loader = DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True, sampler=SubsetRandomSampler(part))
    result = _estimate(_mlp(), loader)
    exact = float(F.mse_loss(_mlp()(x[part]), y[part]).detach())
    assert result.init_loss == pytest.approx(exact, rel=1e-12)
    assert math.isfinite(result.llc_mean)


class _Read(Dataset[Any]):
    """Counts how often samples are read; `augment` is added to each."""

    def __init__(self, augment: Callable[[int], Any] = lambda index: 0.0) -> None:
        self.reads, self.augment = 0, augment

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        x, y = _data()
        return x[index] + self.augment(index), y[index]


def test_data_sets_are_kept_as_tensors() -> None:
    """Read once and then from memory, with the same batches as sample by sample."""
    dataset = _Read()
    kept = _estimate(_mlp(), dataset, batch_size=5)
    assert dataset.reads <= N + 16
    np.testing.assert_allclose(kept.loss_trace, _estimate(_mlp(), batch_size=5).loss_trace, rtol=1e-12)


def test_data_sets_that_are_read_less_than_once_are_not_kept() -> None:
    """A short run on a large data set reads what it needs."""
    dataset = _Read()
    source = make_source(dataset, 5, CPU, num_wanted=N - 1)
    assert dataset.reads == 0
    next(iter(source.minibatches(0)))
    assert dataset.reads == 5


def test_data_sets_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a size, samples are read when they are needed: the same chains."""
    kept = _estimate(_mlp(), _Read(), batch_size=5)
    monkeypatch.setattr(data, "_KEPT_BYTES", N * 8 * 4 - 1)
    dataset = _Read()
    read = _estimate(_mlp(), dataset, batch_size=5)
    assert dataset.reads > 2 * 18 * 5
    np.testing.assert_allclose(read.loss_trace, kept.loss_trace, rtol=1e-11)
    monkeypatch.setattr(data, "_KEPT_BYTES", N * 8 * 4)
    dataset = _Read()
    _estimate(_mlp(), dataset, batch_size=5)
    assert dataset.reads <= N + 16


RANDOM: dict[str, Callable[[int], Any]] = {
    "always": lambda index: torch.randn(3),
    "now and then": lambda index: torch.randn(3) if torch.rand(()) < 0.02 else 0.0,
    "only in one sample": lambda index: torch.randn(3) if index == 13 else 0.0,
    "by numpy": lambda index: np.random.rand() * 1e-3,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_augmented_data_sets_are_not_frozen(kind: str) -> None:
    """Whatever draws random numbers, however rarely, is read anew each time."""
    dataset = _Read(RANDOM[kind])
    np.random.seed(0)
    result = _estimate(_mlp(), dataset, batch_size=5)
    assert dataset.reads > 2 * 18 * 5 and np.isfinite(result.loss_trace).all()


@pytest.mark.parametrize("kind", ["always", "now and then"])
def test_augmentation_follows_the_seed(kind: str) -> None:
    """Equal seeds give equal results though samples are random; the caller's generator is where it was."""
    model = _mlp()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = _estimate(model, _Read(RANDOM[kind]), batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again = _estimate(model, _Read(RANDOM[kind]), batch_size=5)
    assert np.array_equal(first.loss_trace, again.loss_trace)


def test_data_sets_with_samples_of_different_shapes() -> None:
    """What does not fit in one tensor is collated batch by batch, and fails as it would in a loader."""

    class Ragged(_Read):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            return (x if index != 13 else x[:2]), y

    with pytest.raises(RuntimeError, match="size"):
        _estimate(_mlp(), Ragged(), batch_size=20)
