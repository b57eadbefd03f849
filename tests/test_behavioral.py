"""The behavioural loss: its values, what it is made of, and estimates with it at places that are no minimum."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import language_models
import pytest
import runs
import torch
from runs import assert_same, codes, estimate, initialized, mlp, mse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import llc_fast
from llc_fast.behavioral import divergence

pytestmark = pytest.mark.usefixtures("seeded")


def _classifier(classes: int = 4) -> nn.Module:
    return initialized(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, classes)))


def _classes(n: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    return runs.data(n)[0], torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


def _moved(model: nn.Module, by: float = 0.1) -> nn.Module:
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in found.parameters():
            p += by * torch.randn(p.shape, generator=generator)
    return found


# ---- the divergence ----------------------------------------------------------------------------------------


def _by_definition(output: Tensor, target: Tensor, axis: int = -1) -> Tensor:
    own, other = output.double().log_softmax(axis), target.double().log_softmax(axis)
    return (other.exp() * (other - own)).sum(axis)


@pytest.mark.parametrize("by", [1e-4, 1e-3, 1e-2, 0.3, 3.0, 30.0])
def test_divergence_keeps_its_digits(by: float) -> None:
    """In float32 as good as in float64, near w* too, where a difference of cross-entropies has no digit left."""
    target = 4 * torch.randn(200, 10)
    output = target + by * torch.randn(200, 10)
    exact = _by_definition(output, target)
    found = divergence(output, target).double()
    assert (found >= -1e-9 * by).all()
    assert float((found - exact).abs().sum() / exact.sum()) < 3e-6 / min(by, 1)
    if by < 1e-3:
        entropy, cross = (F.cross_entropy(z, target.softmax(-1), reduction="none") for z in (target, output))
        assert float((cross - entropy - exact).abs().sum() / exact.sum()) > 10


@pytest.mark.parametrize("scale", [1.0, 200.0, 5000.0])
def test_divergence_far_away(scale: float) -> None:
    """Also where a probability is 0 in float32, in either; its gradient is p − p* throughout."""
    target = (scale * torch.randn(100, 5)).requires_grad_()
    output = (scale * torch.randn(100, 5)).requires_grad_()
    found = divergence(output, target.detach())
    exact = _by_definition(output.detach(), target.detach())
    known = exact < 5e3  # what is further than logarithms of 1e4 is cut off
    assert torch.isfinite(found).all() and known.any()
    torch.testing.assert_close(found.detach().double()[known], exact[known], rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found[known].sum(), output)
    expected = (output.softmax(-1) - target.softmax(-1)).detach()
    torch.testing.assert_close(gradient[known], expected[known], rtol=1e-4, atol=2e-6)


def test_masked_classes_have_no_part_in_it() -> None:
    """−∞ in both outputs, as models have it that mask a part of their vocabulary."""
    target, output = torch.randn(6, 5), torch.randn(6, 5)
    expected = _by_definition(output, target)
    masked = torch.full((6, 2), -math.inf)
    output = torch.cat([output, masked], 1).requires_grad_()
    found = divergence(output, torch.cat([target, masked], 1))
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(found.sum(), output)
    assert torch.isfinite(gradient).all() and not gradient[:, 5:].any()


@pytest.mark.parametrize("axis", [1, -1])
def test_divergence_along_an_axis(axis: int) -> None:
    target, output = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    torch.testing.assert_close(divergence(output, target, axis).double(), _by_definition(output, target, axis))


# ---- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_loss_is_that_of_the_outputs(kind: Any) -> None:
    """One for each sample; 0 at w*, and so is its gradient; the copy of w* stays when the model moves."""
    model, batch = _classifier(), _classes()
    loss = llc_fast.behavioral_loss(model, kind)
    at_reference = loss(model, batch)
    assert at_reference.shape == (40,) and not at_reference.any()
    assert not any(g.any() for g in torch.autograd.grad(at_reference.sum(), list(model.parameters())))
    moved = _moved(model)
    here, there = moved(batch[0]).detach(), model(batch[0]).detach()
    exact = F.mse_loss(here, there, reduction="none").mean(1) if kind == "mse" else _by_definition(here, there)
    torch.testing.assert_close(loss(moved, batch).double(), exact.double(), rtol=1e-4, atol=1e-8)
    model.load_state_dict(moved.state_dict())
    assert (loss(model, batch) > 0).all()


def _pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(count) for t in _classes()), strict=True))


class _Set(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, k: int) -> Any:
        x, y = _classes()
        return x[k], y[k]


FORMS: dict[str, Callable[[], Any]] = {
    "inputs": lambda: _classes()[0],
    "tuple of inputs": lambda: (_classes()[0],),
    "data set": _Set,
    "loader": lambda: DataLoader(_Set(), batch_size=10),
    "dictionary": lambda: {"input": _classes()[0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_data_may_have_any_form_and_no_targets(form: str) -> None:
    """Targets are not looked at, and the same minibatches give the same chains."""
    model = _classifier()
    size = {"batch_size": None} if form == "loader" else {}
    found = estimate(model=model, data=FORMS[form](), loss_fn="behavioral-kl", **size)
    assert found.settings["loss_fn"] == "behavioral-kl" and found.init_loss == 0 and found.llc_mean > 0
    if form != "loader":
        assert_same(found, estimate(model=model, data=_classes(), loss_fn="behavioral-kl"))


def test_kind_by_the_targets() -> None:
    """KL for numbers of classes, wherever the classes are; otherwise the squares."""
    x, labels = _classes()
    cases: list[tuple[nn.Module, Any, str]] = [
        (_classifier(), (x, labels), "kl"),
        (_classifier(), (x, torch.randn(40, 4)), "mse"),
        (_classifier(), x, "mse"),
        (mlp(), (x, labels[:, None]), "mse"),  # one output, whole numbers
        (nn.Conv1d(1, 4, 1), (x[:, None], torch.randint(4, (40, 3))), "kl"),
        (nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 5)), (x, torch.randint(5, (40, 3))), "kl"),
    ]
    for model, data, kind in cases:
        found = estimate(model=model, data=data, loss_fn="behavioral", num_draws=2)
        assert found.settings["loss_fn"] == f"behavioral-{kind}"


@pytest.mark.parametrize("classes", [1, 2], ids=["second", "last"])
def test_ignored_positions(classes: int) -> None:
    """−100 does not count, and a sample's loss is the mean of those that do."""
    target = torch.randint(4, (6, 3))
    target[:4, 1], target[5] = -100, -100
    model = nn.Conv1d(2, 4, 1)
    kept: nn.Module = model if classes == 1 else nn.Sequential(model, _Transposed())
    x = torch.randn(6, 2, 3)
    loss, moved = llc_fast.behavioral_loss(kept), _moved(kept)
    each = _by_definition(moved(x).detach(), kept(x).detach(), classes)
    counts = target != -100
    expected = (each * counts).sum(1) / counts.sum(1).clamp(min=1)
    torch.testing.assert_close(loss(moved, (x, target)).double(), expected, rtol=1e-4, atol=1e-8)
    assert float(expected[5]) == 0 < float(expected[0]) and loss.kind == "kl"


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_outputs_of_ones_own() -> None:
    """Models that are called in no common way say what their output is."""
    x = runs.data()[0]
    model, data = _classifier(), {"picture": x, "weight": torch.ones(40)}
    with pytest.raises(TypeError) as caught:
        estimate(model=model, data=data, loss_fn="behavioral")
    assert "outputs=" in "".join(getattr(caught.value, "__notes__", caught.value.args))
    loss = llc_fast.behavioral_loss(model, "kl", outputs=lambda model, batch: model(batch["picture"]))
    found = estimate(model=model, data=data, loss_fn=loss)
    assert_same(found, estimate(model=model, data=x, loss_fn="behavioral-kl"))


# ---- estimates ---------------------------------------------------------------------------------------------


def _linear(seed: int) -> tuple[nn.Module, Tensor, float]:
    """A linear model wherever it is, and the exact posterior mean of nβ·L at nβ = 50 and γ = 20."""
    x = runs.data(200)[0] * torch.tensor([2.0, 1.0, 0.5])
    curvature = 50 * torch.linalg.eigvalsh(2 * x.double().T @ x.double() / len(x))
    return initialized(nn.Linear(3, 1, bias=False), seed), x, float((0.5 * curvature / (curvature + 20)).sum())


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_exact_answer_of_a_place_that_is_no_minimum(strategy: str) -> None:
    """A linear model that was never trained: Σ ½·nβh/(nβh + γ), the same wherever it is."""
    options: dict[str, Any] = {
        **{"nbeta": 50.0, "localization": 20.0, "lr": None, "batch_size": 50, "num_draws": 1500, "num_burnin": 200},
        **{"num_chains": 4, "strategy": strategy},
    }
    for seed in (1, 2):
        model, x, exact = _linear(seed)
        found = estimate(model=model, data=x, loss_fn="behavioral", **options)
        assert abs(found.llc_mean - exact) < 4 * found.llc_stderr < 0.2 * exact
        assert found.init_loss == 0 and not codes(found)
        trained = estimate(model=model, data=(x, torch.randn(200, 1)), loss_fn=mse, **options)
        assert trained.llc_mean < 0 and "no-minimum" in codes(trained)


def test_realizable_model_at_its_minimum() -> None:
    """Where targets are the model's outputs, the behavioural loss is mse_loss of them, and chains are the same."""
    model = mlp()
    x = runs.data()[0]
    data = x, model(x).detach()
    torch.testing.assert_close(
        estimate(model=model, data=data, loss_fn="behavioral").loss_trace,
        estimate(model=model, data=data, loss_fn=mse).loss_trace,
        rtol=1e-4,
        atol=1e-9,
    )


@pytest.mark.parametrize("loss_fn", ["behavioral-mse", "behavioral-kl"])
def test_calibration_takes_it(loss_fn: str) -> None:
    found = llc_fast.calibrate(_classifier(), _classes(), loss_fn, progress=False, num_draws=100)
    assert math.isfinite(found["lr"]) and found["lr"] > 0


def test_run_is_resumed(tmp_path: Any) -> None:
    """With the same bits; a run of another behavioural loss is refused, though L(w*) is 0 in both."""
    options: dict[str, Any] = {"model": _classifier(), "data": _classes(), "checkpoint": tmp_path / "run.npz"}
    whole = estimate(**options | {"checkpoint": None}, loss_fn="behavioral", lr=None)
    with runs.interrupted_after(7):
        assert estimate(**options, loss_fn="behavioral", lr=None).is_partial
    with pytest.raises(ValueError, match="belongs to another run: loss_fn was"):
        estimate(**options, loss_fn="behavioral-mse", lr=None)
    assert_same(estimate(**options, loss_fn="behavioral", lr=None), whole)


def test_model_is_left_as_it_was() -> None:
    model = _classifier()
    before = copy.deepcopy(model.state_dict())
    loss = llc_fast.behavioral_loss(model)
    estimate(model=model, data=_classes(), loss_fn=loss)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert loss.kind is None and not loss(model, _classes()).any()  # of no run


def test_sweep_over_checkpoints() -> None:
    """Each checkpoint's own outputs are its targets: λ̂ of each is that of its own estimate, and positive."""
    model, data = _classifier(), _classes()
    states = [copy.deepcopy(_moved(model, by).state_dict()) for by in (0.0, 0.5, 2.0)]
    options: dict[str, Any] = {"lr": 1e-3, "localization": 5.0, "batch_size": 10, "num_burnin": 4, "progress": False}
    found = llc_fast.sweep_checkpoints(model, states, data, "behavioral", num_draws=20, warm=False, **options)
    assert (found.llc_mean > 0).all() and (found.init_loss == 0).all()
    for k, state in enumerate(states):
        other = copy.deepcopy(model)
        other.load_state_dict(state)
        alone = llc_fast.estimate_llc(other, data, "behavioral", num_draws=20, **options)
        assert float(found.llc_mean[k]) == alone.llc_mean
    with pytest.raises(ValueError, match=r"checkpoints\[1\].*other weights than the model has.*\"behavioral\""):
        llc_fast.sweep_checkpoints(
            model, states, data, llc_fast.behavioral_loss(model), num_draws=20, warm=False, **options
        )


# ---- language models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("form", ["rows", "dictionary", "labels"])
def test_language_models(name: str, form: str) -> None:
    """Sequences of any lengths: the sum over predicted tokens by their mean number, and no look at padding."""
    model = language_models.MODELS[name]().eval()
    rows = [[3, 5, 7, 11, 13], [2, 4], [9, 8, 7], [1, 2, 3, 4, 5, 6, 7]]
    data: Any = rows
    counts = [[k > 0 for k in range(len(row))] for row in rows]
    if form != "rows":
        width = max(map(len, rows))
        data = {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }
        if form == "labels":
            data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
            data["labels"][3, 2], counts[3][2] = -100, False
    losses: list[Tensor] = []
    result = llc_fast.estimate_llc(
        *(model, data, "behavioral"),
        **{"num_chains": 1, "num_draws": 1, "num_burnin": 0, "lr": 1e-3, "nbeta": 30.0, "progress": False},
        observables={"loss": lambda draw: losses.append(draw.loss.clone()) or draw.loss},
        keep_ends=True,
        num_steps_bw_draws=2,
        localization=1.0,
    )
    total = sum(map(sum, counts))
    assert result.settings["loss_fn"] == "behavioral-kl" and result.settings["num_tokens"] == total
    assert result.init_loss == 0 and "predicted tokens" in result.summary()
    # At the first step chains are at w*, and at the second where one step has led.
    moved = copy.deepcopy(model)
    first = llc_fast.estimate_llc(
        *(model, data, "behavioral"),
        **{"num_chains": 1, "num_draws": 1, "num_burnin": 0, "lr": 1e-3, "nbeta": 30.0, "progress": False},
        keep_ends=True,
        localization=1.0,
    )
    assert first.ends is not None
    with torch.no_grad():
        for name_, p in moved.named_parameters():
            p += torch.from_numpy(first.ends[name_][0])
        expected = 0.0
        for row, counted in zip(rows, counts, strict=True):
            here, there = (m(torch.tensor([row])).logits[0] for m in (moved, model))
            each = _by_definition(here, there)[:-1]
            expected += float(each[torch.tensor(counted[1:])].sum())
    assert result.loss_trace[0, 1] == pytest.approx(expected / total, rel=1e-3)


def test_model_that_sees_both_ways() -> None:
    """No language model that predicts: it is called as it is, with its attention mask, and padding does not count."""
    made = language_models.transformers()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = made.BertForMaskedLM(made.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).eval()
    ids = torch.randint(1, 20, (8, 6))
    mask = torch.ones_like(ids)
    mask[:4, 3:] = 0
    loss = llc_fast.behavioral_loss(model, "kl")
    moved = _moved(model)
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        found = loss(moved, batch)
        each = _by_definition(moved(**batch).logits, model(**batch).logits)
    torch.testing.assert_close(found.double(), (each * mask).sum(1) / mask.sum(1), rtol=1e-3, atol=1e-7)
    result = estimate(model=model, data=batch, loss_fn="behavioral-kl", batch_size=4, num_draws=2)
    assert result.init_loss == 0 and "num_tokens" not in result.settings


# ---- what is refused ---------------------------------------------------------------------------------------


class _Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(1)


class _Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), r"draws random numbers \('1'\).*call model.eval\(\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"statistics of each minibatch \('1'\).*model.eval\(\)"),
        (_Noisy(3, 4).eval(), "draws random numbers, so that w"),
    ],
    ids=["dropout", "batch norm", "noise"],
)
def test_random_models_are_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        estimate(model=model, loss_fn="behavioral-mse")


def test_models_with_dropout_in_eval_mode() -> None:
    """Also if the loss was made when the model was in training mode."""
    model = initialized(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)))
    loss = llc_fast.behavioral_loss(model, "mse")
    assert estimate(model=model.eval(), loss_fn=loss).init_loss == 0


def test_model_with_a_state_is_refused() -> None:
    """Its output is another at each call."""
    with pytest.raises(ValueError, match="loss_fn is a behavioural loss"):
        estimate(model=_Counting(3, 4), loss_fn="behavioral-mse")


def test_loss_of_other_weights_is_refused() -> None:
    model = _classifier()
    loss = llc_fast.behavioral_loss(model)
    estimate(model=copy.deepcopy(model), data=_classes(), loss_fn=loss)  # the same weights
    with pytest.raises(ValueError, match=r"other weights.*llc_fast.behavioral_loss\(model\)"):
        estimate(model=_moved(model), data=_classes(), loss_fn=loss)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: llc_fast.behavioral_loss(mse), TypeError, "model must be"),
        (lambda: llc_fast.behavioral_loss(mlp(), "l1"), ValueError, "loss must be"),
        (lambda: llc_fast.behavioral_loss(mlp(), outputs=3), TypeError, "outputs must be"),
        (lambda: estimate(loss_fn="behavioural"), TypeError, '"behavioral"'),
        (lambda: estimate(loss_fn="behavioral-kl"), ValueError, "two classes or more.*behavioral-mse"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_models_that_keep_what_they_compute() -> None:
    """weight_norm leaves a tensor of the last graph on its module."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 4)))
    model(torch.randn(2, 3)).sum().backward()
    assert estimate(model=model, loss_fn="behavioral-mse").init_loss == 0
