"""Wrong input to estimate_llc: a TypeError or ValueError that names what is wrong, before any sampling."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import runs
import torch
from runs import assert_same, data, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import llc_fast
from llc_fast.optim import SGLD
from llc_fast.samplers import RMSpropSGLDSampler, SGHMCSampler, SGLDSampler
from llc_fast.settings import Settings, default_nbeta

mse = nn.functional.mse_loss


def _model() -> nn.Module:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        model.bias.fill_(0.25)
    return model


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts to sample has not refused the input."""
    monkeypatch.setattr("llc_fast.estimate.RunningChains", lambda *_, **__: pytest.fail("sampling began"))


def _refused(
    error: type[Exception] | tuple[type[Exception], ...],
    *said: str,
    model: Any = None,
    data: Any = None,
    loss_fn: Any = mse,
    **options: Any,
) -> None:
    """estimate_llc raises this error, with every one of `said` in it, and the model keeps its parameters."""
    model = _model() if model is None else model
    parameters = model.parameters() if isinstance(model, nn.Module) else []
    tensors = [p for p in parameters if p.device.type != "meta"]
    before = [p.detach().clone() for p in tensors]
    with pytest.raises((TypeError, ValueError)) as caught:
        llc_fast.estimate_llc(
            model,
            runs.data() if data is None else data,
            loss_fn,
            **{"lr": 1e-3, "num_draws": 10, "num_chains": 2, "progress": False} | options,
        )
    assert isinstance(caught.value, error), repr(caught.value)
    for words in said:
        assert words in str(caught.value)
    assert all(torch.equal(p, w) for p, w in zip(tensors, before, strict=True))


def test_the_unspoiled_call_gets_as_far_as_sampling() -> None:
    """What the tests of this file spoil is otherwise fine: without a fault, sampling begins."""
    with pytest.raises(pytest.fail.Exception, match="sampling began"):
        llc_fast.estimate_llc(_model(), runs.data(), mse, lr=1e-3, progress=False)


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "nbeta"])
@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0, ValueError, "got 0"),
        (0.0, ValueError, "got 0"),
        (-1e-3, ValueError, "got -0.001"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (-math.inf, ValueError, "got -inf"),
        (torch.tensor(-2.0), ValueError, "got -2"),
        (np.float64("nan"), ValueError, "got nan"),
        (True, TypeError, "got True"),
        ("0.1", TypeError, "got '0.1'"),
        ([0.1], TypeError, "got [0.1]"),
        (1j, TypeError, "got 1j"),
        (torch.ones(2), TypeError, "Tensor"),
    ],
    ids=str,
)
def test_positive_numbers(name: str, value: Any, error: type[Exception], said: str) -> None:
    """lr is a positive finite number, and so is nbeta or 0; the message has the argument's name and the value."""
    if name == "nbeta" and said == "got 0":
        pytest.skip("localization alone")
    _refused(error, name, said, **{name: value})


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (-0.5, ValueError, "got -0.5"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (False, TypeError, "got False"),
        ("1", TypeError, "got '1'"),
        ((1.0,), TypeError, "got (1.0,)"),
    ],
    ids=str,
)
def test_localization(value: Any, error: type[Exception], said: str) -> None:
    """localization is a finite number, zero or more."""
    _refused(error, "localization", said, localization=value)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("num_chains", 1),
        ("num_draws", 1),
        ("num_burnin", 0),
        ("num_steps_bw_draws", 1),
        ("batch_size", 1),
        ("seed", 0),
    ],
)
@pytest.mark.parametrize("kind", ["too small", "too small, numpy", "bool", "float", "str", "list", "tensor"])
def test_counts(name: str, least: int, kind: str) -> None:
    """Counts are integers from 1 (burn-in and seed: 0) on, not booleans, floats or strings."""
    value, error = {
        "too small": (least - 1, ValueError),
        "too small, numpy": (np.int64(least - 1), ValueError),
        "bool": (True, TypeError),
        "float": (4.0, TypeError),
        "str": ("4", TypeError),
        "list": ([4], TypeError),
        "tensor": (torch.tensor([4]), TypeError),
    }[kind]
    said = str(least - 1) if error is ValueError else repr(value)
    _refused(error, name, said, **{name: value})


@pytest.mark.parametrize("name", ["num_chains", "num_steps_bw_draws", "seed"])
def test_counts_without_a_default(name: str) -> None:
    """None stands for a default only where the documentation says so; elsewhere it is an error."""
    _refused(TypeError, name, "None", **{name: None})


@pytest.mark.parametrize("lr", [1e-3, None])
def test_seed_has_64_bits(lr: float | None) -> None:
    """A larger seed is an error that names it."""
    _refused(ValueError, "seed", str(2**64), seed=2**64, lr=lr)


# --- Names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["SGDL", ""])
def test_unknown_sampler(value: str) -> None:
    """The message has what was given and what there is."""
    _refused(ValueError, f"sampler={value!r}", "sgld", sampler=value)


@pytest.mark.parametrize("value", [7, ["sgld"], SGLD], ids=["number", "list", "class"])
def test_sampler_of_another_kind(value: Any) -> None:
    """A sampler is given by its name; anything else is refused by a message that says which it was."""
    _refused((TypeError, ValueError), "sampler", sampler=value)


@pytest.mark.parametrize("value", ["bias2", ["weight", "conv*"], "WEIGHT", ""])
def test_unknown_parameters(value: Any) -> None:
    """A name or pattern that matches nothing is an error that lists the parameters there are."""
    wrong = value[1] if isinstance(value, list) else value
    _refused(ValueError, f"params={wrong!r}", "weight, bias", params=value)


@pytest.mark.parametrize(
    ("value", "error"), [([], ValueError), (3, TypeError), ([3], TypeError), ([None], TypeError)], ids=str
)
def test_parameters_of_another_kind(value: Any, error: type[Exception]) -> None:
    """params is names, at least one; the message says 'params'."""
    _refused(error, "params", params=value)


def test_unknown_device() -> None:
    """What torch doesn't know as a device is an error that names the argument and the value."""
    _refused(ValueError, "device", "nonsense", device="nonsense")
    _refused(TypeError, "device", "float", device=3.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_device_that_is_not_there() -> None:
    """Asking for a GPU where there is none is an error that says so."""
    _refused(ValueError, "device", "cuda", device="cuda")


# --- Models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("model", [mse, "linear", [nn.Linear(3, 1)]], ids=["function", "string", "list"])
def test_not_a_model(model: Any, device: str | None) -> None:
    """The model is a Module, and the message says so."""
    _refused(TypeError, "model must be a torch.nn.Module", type(model).__name__, model=model, device=device)


def test_model_without_parameters() -> None:
    """Nothing to sample: the message says so."""
    _refused(ValueError, "no parameters", model=nn.Flatten(), data=(torch.zeros(4, 3), torch.zeros(4, 3)))


def test_all_parameters_frozen() -> None:
    """Nothing to sample: the message says how to change that."""
    _refused(ValueError, "requires_grad_(True)", model=_model().requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_model_of_another_dtype(dtype: torch.dtype) -> None:
    """The message names the parameter, its dtype and those that are supported."""
    _refused(
        TypeError, "'weight'", str(dtype), "float32, float64, bfloat16, float16", model=nn.Linear(3, 1, dtype=dtype)
    )


def test_model_of_two_dtypes() -> None:
    """Parameters of two dtypes can't be sampled together: the message names both."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 1), nn.Linear(1, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).double()).float()

    _refused((TypeError, ValueError), "float32", "float64", model=Mixed())


def test_model_without_data() -> None:
    """A model on the meta device holds nothing to sample."""
    _refused(ValueError, "meta", model=nn.Linear(3, 1, device="meta"))


def test_model_on_several_devices() -> None:
    """The message names the devices (meta plays the second one) and the argument that settles it."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1, device="meta"))
    _refused(ValueError, "cpu, meta", "device", model=model)


# --- Data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (lambda x, y: x, TypeError, "(x, y)"),
        (lambda x, y: (x,), TypeError, "(x, y)"),
        (lambda x, y: (x, y[:-3]), ValueError, "[40, 37]"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "data is empty"),
        (lambda x, y: [], ValueError, "data is empty"),
        (lambda x, y: TensorDataset(x[:0], y[:0]), ValueError, "data is empty"),
        (
            lambda x, y: DataLoader(TensorDataset(x, y), batch_size=50, drop_last=True),
            ValueError,
            "data is empty",
        ),
        (lambda x, y: (x.numpy().astype(object), y.numpy()), TypeError, "data"),
        (lambda x, y: "data.csv", TypeError, "data"),
        (lambda x, y: 40, TypeError, "data"),
    ],
    ids=[
        "one tensor",
        "tuple of one",
        "different lengths",
        "empty tensors",
        "empty list",
        "empty TensorDataset",
        "loader without batches",
        "arrays of objects",
        "string",
        "number",
    ],
)
@pytest.mark.parametrize("nbeta", [None, 10.0])
def test_wrong_data(
    data: Callable[[Tensor, Tensor], Any],
    error: type[Exception],
    said: str,
    nbeta: Any,
) -> None:
    """Data that can't serve: the message says what was given or what to give."""
    _refused(error, said, data=data(*runs.data()), nbeta=nbeta)


def test_loader_with_batch_size() -> None:
    """The loader decides about the batch size; both is an error."""
    _refused(ValueError, "batch_size=8", data=DataLoader(TensorDataset(*runs.data()), batch_size=5), batch_size=8)


class _Batches:
    """An iterable of batches without an end."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.cycle([runs.data()])


def test_unknown_number_of_samples() -> None:
    """nβ = n / log n needs n: where the data don't tell it, the message asks for nbeta."""
    _refused(ValueError, "pass nbeta", data=_Batches())


def test_one_sample() -> None:
    """With n = 1, log n is zero: an error that gives n, unless nbeta is given."""
    _refused(ValueError, "at least 2", "got 1", data=runs.data(1))


def test_data_that_are_not_finite() -> None:
    """A single NaN in the data: an error at once, not a chain lost at some step."""
    x, y = runs.data()
    y[17] = math.nan
    _refused(ValueError, "nan", "check the model and the data", data=(x, y))
    _refused(ValueError, "nan", "check the model and the data", data=(x, y), batch_size=1)


@pytest.mark.parametrize(
    ("n", "error"), [(1, ValueError), (0, ValueError), (-5, ValueError), (True, TypeError), (9.0, TypeError)]
)
def test_default_nbeta_refuses(n: Any, error: type[Exception]) -> None:
    """n is an integer from 2 on; the message has what was given."""
    with pytest.raises(error, match=f"n must be .*got {n!r}"):
        default_nbeta(n)


def test_default_nbeta_refuses_strings() -> None:
    """A string is not a number of samples, whatever it spells."""
    with pytest.raises(TypeError, match="n must be an integer, got '100'"):
        default_nbeta("100")  # type: ignore[arg-type]


# --- Losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_fn", "error", "said"),
    [
        ("mse", TypeError, "loss_fn must be callable"),
        (None, TypeError, "loss_fn must be callable"),
        (lambda out, y: mse(out, y, reduction="none"), ValueError, "got shape (40, 1): use reduction='mean'"),
        (lambda out, y: mse(out, y).reshape(1), ValueError, "got shape (1,)"),
        (lambda out, y: mse(out, y, reduction="sum"), ValueError, "use reduction='mean'"),
        (lambda out, y: -mse(out, y, reduction="sum"), ValueError, "use reduction='mean'"),
        (lambda out, y: mse(out, y) * math.nan, ValueError, "loss_fn returned nan"),
        (lambda out, y: mse(out, y) * math.inf, ValueError, "loss_fn returned inf"),
        (lambda out, y: mse(out, y).item(), TypeError, "loss_fn must return a tensor, got float"),
        (lambda out, y: None, TypeError, "loss_fn must return a tensor, got None: does it lack a `return`?"),
        (lambda out, y: (mse(out, y), mse(out, y)), TypeError, "loss_fn must return a tensor, got tuple (Tensor [], "),
        (lambda out, y: mse(out.detach(), y), ValueError, ".detach()"),
        (lambda out, y: mse(y, y + 1), ValueError, "does not depend on the parameters"),
        (lambda out, y: torch.tensor(3), ValueError, "does not depend on the parameters"),
    ],
    ids=[
        "a string",
        "None",
        "one loss for each sample",
        "a vector of one",
        "sum",
        "negative sum",
        "NaN",
        "infinite",
        "float",
        "returns None",
        "tuple",
        "detached",
        "ignores the model",
        "constant",
    ],
)
def test_wrong_losses(loss_fn: Any, error: type[Exception], said: str) -> None:
    """A loss that can't be sampled: the message says what came back or what to change."""
    _refused(error, said, loss_fn=loss_fn)


def test_loss_without_gradient_mode() -> None:
    """A model that switches gradients off inside is found out, with the usual suspects in the message."""

    class Silent(nn.Linear):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    _refused(ValueError, "torch.no_grad()", model=Silent(3, 1))


def test_loss_that_uses_none_of_the_chosen_parameters() -> None:
    """The loss depends on the model, but not on what is to be sampled."""

    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.spare = nn.Parameter(torch.zeros(3))

    _refused(ValueError, "does not depend on the parameters to sample", model=Spare(), params="spare")


@pytest.mark.parametrize("seed", range(8))
def test_a_random_loss_is_not_mistaken_for_a_sum(seed: int) -> None:
    """Dropout makes one evaluation differ from the next; a mean over the batch is accepted all the same."""
    model = nn.Sequential(_model(), nn.Dropout(0.9))
    with torch.random.fork_rng(), pytest.raises(pytest.fail.Exception, match="sampling began"):
        torch.manual_seed(seed)
        llc_fast.estimate_llc(model, runs.data(4), mse, lr=1e-3, progress=False)


# ---- one place for every option ----------------------------------------------------------------------------


def test_the_signature_is_that_of_the_settings() -> None:
    """estimate_llc names every option once; calibrate takes the same ones, checked by the same class."""
    signature = inspect.signature(llc_fast.estimate_llc).parameters
    named = {name: p.default for name, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    fields = {f.name: f.default for f in dataclasses.fields(Settings)}
    assert named.pop("settings") is None  # which stand for others
    assert named.keys() == fields.keys()
    assert {k: v for k, v in named.items() if k != "execution"} == {k: v for k, v in fields.items() if k != "execution"}
    assert named["execution"] is None and fields["execution"] == llc_fast.Execution()


def test_settings_can_not_be_changed() -> None:
    settings = Settings(num_draws=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.num_draws = 20  # type: ignore[misc]
    assert dataclasses.replace(settings, num_draws=20).schedule.num_draws == 20


OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strategy": ({"strategy": "sequential"}, {"execution": llc_fast.Execution(strategy="sequential")}),
    "microbatch_size": ({"microbatch_size": 3}, {"execution": llc_fast.Execution(microbatch_size=3)}),
    "release_gradients": ({"release_gradients": True}, {"execution": llc_fast.Execution(release_gradients=True)}),
    "autocast": ({"autocast": torch.bfloat16}, {"execution": llc_fast.Execution(autocast=torch.bfloat16)}),
    "distributed": ({"distributed": False}, {"execution": llc_fast.Execution(distributed=False)}),
    "heat_correction": ({"heat_correction": True}, {"bias_correction": True}),
    "sampler_options": (
        {"sampler": "sghmc", "sampler_options": {"momentum_decay": 0.5}},
        {"sampler": SGHMCSampler(momentum_decay=0.5)},
    ),
    "sampler_options without a sampler": (
        {"sampler_options": {"weight_decay": 0.5}},
        {"sampler": SGLDSampler(weight_decay=0.5)},
    ),
    "adapt_steps that never end": (
        {"sampler": "rmsprop-sgld", "sampler_options": {"adapt_steps": None}},
        {"sampler": RMSpropSGLDSampler(adapt_steps=math.inf)},
    ),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.filterwarnings("default:.* is now given as:DeprecationWarning")
def test_arguments_by_their_old_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They still work, and a warning says what to write now."""
    monkeypatch.undo()  # here sampling begins
    old, new = OLD[name]
    common: dict[str, Any] = {"lr": 1e-3, "num_chains": 2, "num_draws": 8, "num_burnin": 4, "batch_size": 10}
    common["progress"] = False
    with pytest.warns(DeprecationWarning, match="is now given as"):
        before = llc_fast.estimate_llc(mlp(), data(), mse, **common, **old)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        now = llc_fast.estimate_llc(mlp(), data(), mse, **common, **new)
    assert_same(before, now)


def test_old_and_new_names_together() -> None:
    """An option is given once; what never was an argument is refused as by any function."""
    for function in (llc_fast.estimate_llc, llc_fast.calibrate):
        with pytest.raises(TypeError, match="strategy belongs to execution"):
            function(mlp(), data(), mse, strategy="batched", execution=llc_fast.Execution())
        with pytest.raises(TypeError, match="sampler_options is given beside a sampler object"):
            function(mlp(), data(), mse, sampler=SGLDSampler(), sampler_options={"weight_decay": 1.0})
        with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'learning_rate'"):
            function(mlp(), data(), mse, learning_rate=1.0)


@pytest.mark.parametrize("option", ["lr", "nbeta", "localization"])
def test_an_option_of_the_sampler_object(option: str) -> None:
    """It counts as if it were an argument; to give it twice, differently, is an error."""
    inside = SGLDSampler(**{"lr": 1e-3, "nbeta": 20.0, "localization": 3.0} | {option: 0.5})
    settings = Settings(sampler=inside)
    assert getattr(settings, option) == 0.5
    assert settings.complete_sampler(1e-4, 9.0).localization == inside.localization
    assert getattr(Settings(sampler=inside, **{option: 0.5}), option) == 0.5
    with pytest.raises(ValueError, match=f"{option}=0.7 contradicts sampler.{option}=0.5"):
        Settings(sampler=inside, **{option: 0.7})


def test_a_localization_is_open_until_the_model_is_known() -> None:
    """Then it is P / (½‖w*‖)², unless it or the sampler object has one."""
    for given in (Settings(sampler=SGLDSampler()), Settings(sampler="sgld"), Settings()):
        assert given.localization is None
        assert given.localized(100, 4.0).localization == given.localized(100, 4.0).template.localization == 25.0
    assert Settings(localization=3.0).localized(100, 4.0).localization == 3.0
    assert Settings(sampler=SGLDSampler(localization=3.0)).localized(100, 4.0).localization == 3.0
    assert Settings(sampler=SGLDSampler(localization=0.0)).localization == 0.0
    assert Settings(sampler=SGLDSampler(), localization=0.0).localization == 0.0


@pytest.mark.parametrize(
    ("count", "norm", "gamma"), [(385, 4.851, 65.44), (1, 2.0, 1.0), (10**9, 3e4, 4.444), (7, 0.0, 1.0)]
)
def test_default_localization(count: int, norm: float, gamma: float) -> None:
    """A prior width 1/√γ of half the root mean square weight; 1 where all weights are 0."""
    assert llc_fast.default_localization(count, norm) == gamma
    if norm:
        assert 1 / math.sqrt(gamma) == pytest.approx(0.5 * norm / math.sqrt(count), rel=1e-3)


@pytest.mark.parametrize(
    ("count", "norm", "error"),
    [
        (0, 1.0, ValueError),
        (1.5, 1.0, TypeError),
        (3, -1.0, ValueError),
        (3, math.nan, ValueError),
        (3, "1", TypeError),
    ],
)
def test_default_localization_of_nonsense(count: Any, norm: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"num_parameters|norm"):
        llc_fast.default_localization(count, norm)


@pytest.mark.parametrize("wrong", [3, llc_fast.SGLD, "nuts"])
def test_what_is_no_sampler(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="sampler"):
        Settings(sampler=wrong)


def test_what_is_no_execution() -> None:
    with pytest.raises(TypeError, match=r"execution must be an llc_fast\.Execution, got str"):
        Settings(execution="batched")  # type: ignore[arg-type]
