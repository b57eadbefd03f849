"""What is sampled and how the loss is called: params=, masks, forms of loss and of one-tensor data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from regression import NUM_SAMPLES, estimate, initialized, mlp, sample_losses, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from llc_fast import Draw
from llc_fast.objective.objective import takes_model
from llc_fast.objective.selection import select
from llc_fast.samplers import samplers_with_optimizer

pytestmark = pytest.mark.usefixtures("seeded")

STEPPED = samplers_with_optimizer()


class _Tied(nn.Module):
    """Two layers that share a weight, which thereby goes by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.first(x))))


def _moved(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Which elements of each sampled parameter ever left w*, in any chain, as the observables see them."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: dict[str, Tensor] = {}

    def look(draw: Draw) -> float:
        for name, p in draw.params.items():
            assert p.shape == start[name].shape and not p.requires_grad
            moved[name] = moved.get(name, torch.zeros(p.shape, dtype=torch.bool)) | (p != start[name])
        return 0.0

    estimate(model, observables={"look": look}, **options)
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
    model = mlp()
    choose, names = SELECTIONS[kind]
    moved = _moved(model, params=choose(model), strategy=strategy)
    assert set(moved) == names and all(m.all() for m in moved.values())
    result = estimate(model, params=choose(model), strategy=strategy)
    assert result.settings["num_parameters"] == sum(m.numel() for m in moved.values())


def test_selection_keeps_the_models_order() -> None:
    """However they are named, parameters come in the model's order, so that the noise does not depend on it."""
    model = mlp()
    assert list(select(model, ["2.bias", "0.weight", model[0]])) == ["0.weight", "0.bias", "2.bias"]
    forwards, backwards = (
        estimate(model, params=["0.weight", "2.bias"]),
        estimate(model, params=["2.bias", "0.w*"]),
    )
    assert np.array_equal(forwards.loss_trace, backwards.loss_trace)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize(
    "params",
    ["first.weight", "second.weight", "*.weight", "second.*", ["first.weight", "second.weight"], nn.Linear],
    ids=str,
)
def test_tied_weights_are_one_parameter(params: Any, strategy: str) -> None:
    """By either name or module, under the first name, once, and both layers see it move."""
    model = initialized(_Tied())
    moved = _moved(model, params=model.second if params is nn.Linear else params, strategy=strategy)
    assert "first.weight" in moved and "second.weight" not in moved and moved["first.weight"].all()
    expected = {"*.weight": {"first.weight", "out.weight"}, "second.*": {"first.weight", "second.bias"}}
    assert params is nn.Linear or set(moved) == expected.get(str(params), {"first.weight"})
    # Untied, with the same weights, the second layer would stay where it is.
    torch.manual_seed(0)
    untied = initialized(_Tied())
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    tied_trace = estimate(model, params="first.weight", strategy=strategy).loss_trace
    untied_trace = estimate(untied, params="first.weight", strategy=strategy).loss_trace
    np.testing.assert_allclose(tied_trace[:, 0], untied_trace[:, 0], rtol=1e-12)
    assert (tied_trace[:, 1:] != untied_trace[:, 1:]).all()


def test_frozen_parameters_can_be_named() -> None:
    """params= decides, not requires_grad; the flag stays as it was."""
    model = mlp()
    model[0].requires_grad_(False)
    assert set(_moved(model)) == {"2.weight", "2.bias"}
    assert set(_moved(model, params=model[0])) == {"0.weight", "0.bias"}
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("3.*", ValueError, r"params='3\.\*' matches no parameter; the model has: 0\.weight, 0\.bias"),
        (["0.weight", "kernel"], ValueError, "params='kernel' matches no parameter"),
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
        estimate(mlp(), params=params)


def test_buffers_can_not_be_sampled() -> None:
    """A buffer's name matches no parameter."""
    model = initialized(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).eval()
    with pytest.raises(ValueError, match=r"'1\.running_mean' matches no parameter"):
        estimate(model, params="1.running_mean")


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
    model, mask = mlp(), _mask(4, 3)
    params = {"0.weight": mask, model[2].bias: True}
    moved = _moved(model, params=params, sampler=sampler, strategy=strategy)
    assert set(moved) == {"0.weight", "2.bias"}
    assert torch.equal(moved["0.weight"], mask) and moved["2.bias"].all()
    result = estimate(model, params=params, sampler=sampler, strategy=strategy)
    assert result.settings["num_parameters"] == int(mask.sum()) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_elements_of_every_precision(dtype: torch.dtype) -> None:
    """Chains of low-precision models too."""
    model, mask = mlp(dtype), _mask(4, 3)
    moved = _moved(model, params={"0.weight": mask}, data=samples(dtype), lr=0.1)
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
    assert torch.equal(_moved(mlp(), params={"0.weight": mask})["0.weight"], full)


def test_a_mask_for_several_parameters() -> None:
    """By pattern or module, where it fits them all; a later entry overrides an earlier one."""
    model = initialized(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    first, second = torch.tensor([True, False, False]), torch.tensor([False, True, True])
    moved = _moved(
        model,
        params={"*": first, model[2].bias: second, "0.bias": True},
        data=(samples()[0], samples()[0]),
    )
    assert torch.equal(moved["0.weight"], first.expand(3, 3)) and torch.equal(moved["2.weight"], first.expand(3, 3))
    assert torch.equal(moved["2.bias"], second) and moved["0.bias"].all()


def test_masks_are_copied() -> None:
    """A mask that the caller changes afterwards does not follow into the run, nor the run's into the caller's."""
    mask = _mask(4, 3)
    kept = mask.clone()
    selected = select(mlp(), {"0.weight": mask.expand(4, 3)})
    estimate(mlp(), params={"0.weight": mask})
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
    masked = estimate(_Product(False), params={"w": mask}, **chosen)
    frozen = estimate(_Product(True), params="moving", **chosen)
    np.testing.assert_allclose(masked.loss_trace, frozen.loss_trace, rtol=1e-11)
    assert masked.settings["num_parameters"] == frozen.settings["num_parameters"] == 2


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
    result = estimate(
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
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = samples()
        return _named(x[index], y[index])


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("kind", ["object", "dictionary"])
@pytest.mark.parametrize("batch_size", [5, None])
def test_models_with_their_own_loss(kind: str, strategy: str, batch_size: int | None) -> None:
    """loss_fn=None: model(**batch), whose .loss or ["loss"] counts; the same chains as with a loss function."""
    expected = estimate(mlp(), batch_size=batch_size).loss_trace
    model = initialized(_OwnLoss(kind))
    for given in (_named(*samples()), _NamedSamples()):
        result = estimate(model, given, None, strategy=strategy, batch_size=batch_size)
        np.testing.assert_allclose(result.loss_trace, expected, rtol=1e-11)
        assert result.settings["num_samples"] == NUM_SAMPLES


class _Nested(nn.Module):
    """Names as deep as people have them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(2, 2) for name in ("attention", "lora_A", "head")}) for _ in range(11)
        )


@pytest.mark.parametrize(
    ("params", "belongs"),
    [
        ("*.attention.*", lambda name: ".attention." in name),
        ("attention.*", lambda name: ".attention." in name),
        ("lora_*", lambda name: "lora_A" in name),
        ("bias", lambda name: name.endswith(".bias")),
        ("1.attention.weight", lambda name: name == "layers.1.attention.weight"),  # not that of layer 11
        ("layers.1", lambda name: name.startswith("layers.1.")),
        ("attention", lambda name: ".attention." in name),
        ("1?", lambda name: name.startswith("layers.10.")),
        ("head.*", lambda name: name.startswith("head.")),  # whole names first
        ("head", lambda name: name.startswith("head.")),
        ("*head.*", lambda name: "head." in name),
        (["head.weight", "lora_*"], lambda name: name == "head.weight" or "lora_A" in name),
    ],
)
def test_patterns_may_leave_out_the_beginning_of_a_name(params: Any, belongs: Callable[[str], bool]) -> None:
    model = _Nested()
    names = [name for name, _ in model.named_parameters()]
    assert list(select(model, params)) == [name for name in names if belongs(name)]
    with pytest.raises(ValueError, match="matches no parameter"):
        select(model, "ttention.*")


def test_models_with_their_own_loss_and_a_loader() -> None:
    """Dictionaries as a loader collates them."""
    expected = estimate(mlp(), DataLoader(TensorDataset(*samples()), batch_size=5)).loss_trace
    result = estimate(initialized(_OwnLoss()), DataLoader(_NamedSamples(), batch_size=5), None)
    np.testing.assert_allclose(result.loss_trace, expected, rtol=1e-11)


def test_own_loss_of_another_form() -> None:
    """Batches that are no dictionaries, outputs without a loss: errors that say what was expected."""
    with pytest.raises(TypeError, match="batches that are dictionaries; these are tuple"):
        estimate(initialized(_OwnLoss()), samples(), None)
    with pytest.raises(TypeError, match="models that return their own loss, but this one returned dict"):
        estimate(initialized(_OwnLoss("dictionary")), {"inputs": samples()[0]}, None)
    with pytest.raises(TypeError, match="unexpected keyword") as caught:
        estimate(
            initialized(_OwnLoss()),
            {"inputs": samples()[0], "tokens": samples()[1]},
            None,
        )
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
    expected = estimate(mlp(), batch_size=5).loss_trace
    x, y = samples()
    for given in ((x, y), {"x": x, "y": y}, TensorDataset(x, y), [(a, b) for a, b in zip(x, y, strict=True)]):
        found = estimate(mlp(), given, loss_fn, strategy=strategy, batch_size=5).loss_trace
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
    x = samples()[0]
    model = initialized(nn.Linear(3, 3))

    def reconstruct(model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(batch, Tensor) and batch.shape[1:] == (3,)
        return F.mse_loss(model(batch), batch)

    expected = estimate(model, (x, x), batch_size=6).loss_trace
    for given in (x, Subset(list(x), range(NUM_SAMPLES))):  # type: ignore[arg-type]
        found = estimate(model, given, reconstruct, batch_size=6, strategy=strategy)
        np.testing.assert_allclose(found.loss_trace, expected, rtol=1e-11)
        assert found.settings["num_samples"] == NUM_SAMPLES
    loader = estimate(model, DataLoader(list(x), batch_size=NUM_SAMPLES), reconstruct)  # type: ignore[arg-type]
    np.testing.assert_allclose(loader.loss_trace, estimate(model, (x, x)).loss_trace, rtol=1e-11)


@pytest.mark.parametrize("empty", [torch.zeros(0, 3), torch.tensor(1.0), {"x": torch.zeros(0, 3)}], ids=str)
def test_one_tensor_without_samples(empty: Any) -> None:
    """Empty data are told so, in whatever form."""
    with pytest.raises(ValueError, match="data is empty"):
        estimate(mlp(), empty, lambda model, batch: model(batch).mean())


def test_wrong_calls_say_how_the_loss_was_called() -> None:
    """The user's own error, with a note on what it was called with."""

    def confused(net: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1])

    with pytest.raises(TypeError) as caught:
        estimate(mlp(), loss_fn=confused)
    if hasattr(caught.value, "__notes__"):  # Python 3.11 and later
        assert "first parameter is called `model`" in caught.value.__notes__[0]


# --- Losses of single samples -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("batch_size", [1, 5, NUM_SAMPLES])
def test_losses_of_single_samples(batch_size: int, strategy: str) -> None:
    """One loss for each sample gives the chains, L(w*) and λ̂ of their mean."""
    mean = estimate(mlp(), batch_size=batch_size, strategy=strategy)
    each = estimate(mlp(), loss_fn=sample_losses, batch_size=batch_size, strategy=strategy)
    np.testing.assert_allclose(each.loss_trace, mean.loss_trace, rtol=1e-11)
    assert each.init_loss == pytest.approx(mean.init_loss, rel=1e-12)
    assert each.llc_mean == pytest.approx(mean.llc_mean, rel=1e-9)


def test_losses_of_single_samples_from_a_loader() -> None:
    """With a smaller last batch, whose samples count as much as all others in L(w*) if the loader shuffles."""
    loader = DataLoader(TensorDataset(*samples()), batch_size=7, shuffle=True)
    mean, each = estimate(mlp(), loader), estimate(mlp(), loader, sample_losses)
    np.testing.assert_allclose(each.loss_trace, mean.loss_trace, rtol=1e-11)
    exact = float(sample_losses(mlp()(samples()[0]), samples()[1]).detach().mean())
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
        estimate(mlp(), loss_fn=loss_fn)
