"""Losses of single samples and tokens, for loss functions that return their mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llc_fast
from llc_fast.behavioral import named_loss
from llc_fast.estimate import prepared_alone
from llc_fast.objective.per_sample import SampleLosses, sample_losses_for
from llc_fast.settings import Settings

VOCABULARY, LENGTH = 11, 7


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def labelled() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 3, generator=generator).double(), torch.randint(4, (20,), generator=generator)


class Words(nn.Module):
    """Logits of the next token from the sum of the embeddings so far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).cumsum(1)))


class Own(Words):
    """The same as Hugging Face's models: it returns its loss, which does not look at the attention mask."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = super().forward(input_ids)
        assert labels is not None
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def tokens() -> dict[str, Tensor]:
    """Twelve sequences of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (12, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (12,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask != 0, ids, -100)}


def losses_at_reference(
    model: nn.Module, data: Any, loss_fn: Any, per: Any = "sample", *, batch: Any = None, **options: Any
) -> tuple[SampleLosses, Tensor]:
    """The form that is found, and what it gives at w* for the first minibatch, or another batch."""
    probe_loss = options.pop("probe_loss", None)
    options = {"nbeta": 10.0, "batch_size": 6, "num_draws": 4, "progress": False} | options
    with prepared_alone(Settings(**options), model, data, named_loss(loss_fn)) as prepared:
        objective = prepared.objective
        first = next(iter(objective.source.minibatches(0)))
        with torch.no_grad():
            found = sample_losses_for(objective, per, [first], probe_loss)
            given = first if batch is None else objective.as_minibatch(batch)
            return found, found(objective.reference, given, objective.fresh_buffers())


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """−log softmax of each sample, by the formula."""
    with torch.no_grad():
        logits = model(x)
    return logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]


def tokens_by_hand(model: Words, ids: Tensor, counted: Tensor) -> Tensor:
    """[sequence, length − 1], NaN where `counted` says that the next token does not count."""
    with torch.no_grad():
        logits = Words.forward(model, ids)[:, :-1]
    losses = logits.logsumexp(2) - logits.gather(2, ids[:, 1:, None])[:, :, 0]
    return torch.where(counted[:, 1:] != 0, losses, torch.nan)


class Squeezed(nn.CrossEntropyLoss):
    """A module of the user's own."""


def own_mean(output: Tensor, target: Tensor) -> Tensor:
    return (output.logsumexp(1) - output.gather(1, target[:, None])[:, 0]).mean()


def own_samples(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def of_model(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1)


CLASSES: dict[str, tuple[Any, str]] = {
    "function": (F.cross_entropy, 'reduction="none"'),
    "module": (nn.CrossEntropyLoss(), 'reduction="none"'),
    "a module of the user's": (Squeezed(), 'reduction="none"'),
    "partial": (functools.partial(F.cross_entropy, ignore_index=-1), 'reduction="none"'),
    "own mean": (own_mean, "cross-entropy"),
    "own samples": (own_samples, "the loss function"),
    "model and batch": (of_model, "cross-entropy"),
}


@pytest.mark.parametrize("what", CLASSES)
def test_cross_entropy(what: str) -> None:
    loss_fn, name = CLASSES[what]
    model, (x, y) = classifier(), labelled()
    found, losses = losses_at_reference(model, (x, y), loss_fn, batch=(x, y))
    assert found.name == name
    torch.testing.assert_close(losses, by_hand(model, x, y))


def test_a_loss_of_which_nothing_is_known() -> None:
    """Smoothed labels inside the user's own function: each sample as a batch of one."""
    model, (x, y) = classifier(), labelled()
    found, losses = losses_at_reference(model, (x, y), smoothed, batch=(x, y))
    assert found.name == "every sample as a batch of one"
    with torch.no_grad():
        logs = model(x).log_softmax(1)
    torch.testing.assert_close(losses, -0.9 * logs.gather(1, y[:, None])[:, 0] - 0.1 * logs.mean(1))


@pytest.mark.parametrize(
    "loss_fn", [F.mse_loss, nn.MSELoss(), lambda output, target: (output - target).square().mean()]
)
@pytest.mark.parametrize("targets", [1, 3])
def test_squared_error(loss_fn: Any, targets: int) -> None:
    """The mean over the outputs of a sample."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, targets).double(), torch.randn(20, 3).double(), torch.randn(20, targets).double()
    _, losses = losses_at_reference(model, (x, y), loss_fn, batch=(x, y))
    with torch.no_grad():
        torch.testing.assert_close(losses, (model(x) - y).square().mean(1))


def test_a_sum_over_what_a_sample_has() -> None:
    """``reduction="batchmean"``: the loss of a sample is the sum of its elements."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double()
    x, y = torch.randn(20, 3).double(), torch.rand(20, 4).double().softmax(1)
    found, losses = losses_at_reference(model, (x, y), nn.KLDivLoss(reduction="batchmean"), batch=(x, y))
    assert found.combination == "sums"
    with torch.no_grad():
        torch.testing.assert_close(losses, (y * (y.log() - model(x))).sum(1))


def test_where_all_losses_are_zero_at_the_minimum() -> None:
    """At w* itself nothing tells a mean from a sum: the check beside it does."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(20, 3).double()
    with torch.no_grad():
        y = model(x)

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1).mean()

    found, _ = losses_at_reference(model, (x, y), summed, batch=(x, y))
    assert found.combination == "sums"


# ---- tokens ------------------------------------------------------------------------------------------------


def own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over all predicted tokens, written by hand."""
    logits = model(batch["input_ids"])
    counted = batch["attention_mask"][:, 1:].flatten() != 0
    return F.cross_entropy(logits[:, :-1].flatten(0, 1)[counted], batch["input_ids"][:, 1:].flatten()[counted])


def mean_of_sequences(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over sequences of the mean over their tokens."""
    logits, mask = model(batch["input_ids"]), batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    return ((losses.view(mask.shape) * mask).sum(1) / mask.sum(1)).mean()


TOKENS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "next-token": (Words, "next-token", "tokens of the data"),
    "the model's own": (Own, None, "elements"),
    "written by hand": (Words, own_loss, "elements"),
    "means of sequences": (Words, mean_of_sequences, "samples"),
}


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("what", TOKENS)
def test_tokens(what: str, per: str) -> None:
    """NaN where a token does not count; of sequences the mean over what counts; it knows what the run weighs."""
    make, loss_fn, combination = TOKENS[what]
    model, data = make().eval(), tokens()
    if loss_fn in (own_loss, mean_of_sequences):
        data.pop("labels")
    found, losses = losses_at_reference(model, data, loss_fn, per, batch=data)
    assert found.combination == combination
    expected = tokens_by_hand(model, data["input_ids"], data["attention_mask"])  # type: ignore[arg-type]
    if per == "sample":
        expected = expected.nanmean(1)
    assert losses.shape == expected.shape
    torch.testing.assert_close(losses, expected, equal_nan=True)


def test_labels_of_minus_100() -> None:
    """Tokens of the middle that are not predicted are NaN, too."""
    data = tokens()
    data["labels"][:, 2] = -100
    model = Own()
    _, losses = losses_at_reference(model, data, None, "token", batch=data)
    expected = tokens_by_hand(model, data["input_ids"], data["labels"] != -100)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert losses[:, 1].isnan().all()


def test_behavioural_tokens() -> None:
    """KL(w* ‖ w) of each token; 0 at w*."""
    ids = tokens()["input_ids"]
    _, losses = losses_at_reference(Words().eval(), ids, "behavioral", "token", batch=ids)
    assert losses.shape == (12, LENGTH - 1) and float(losses.abs().max()) < 1e-12


def test_positions_of_images() -> None:
    """A class for each pixel, [batch, classes, …] as torch has it; one that is ignored is NaN."""
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    x, y = torch.randn(9, 2, 4, 5).double(), torch.randint(3, (9, 4, 5))
    y[:, 0, 0] = -100
    _, losses = losses_at_reference(model, (x, y), F.cross_entropy, "token", batch=(x, y))
    with torch.no_grad():
        logits = model(x)
    each = logits.logsumexp(1) - logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
    each[:, 0, 0] = torch.nan
    torch.testing.assert_close(losses, each.flatten(1), equal_nan=True)


# ---- the user's own ----------------------------------------------------------------------------------------


def test_probe_loss() -> None:
    """What the user gives is taken, where it is the run's loss, and nothing else is looked for."""
    model, (x, y) = classifier(), labelled()

    def each(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    found, losses = losses_at_reference(model, (x, y), smoothed, batch=(x, y), probe_loss=_smoothed_samples)
    assert found.name == "probe_loss"
    with pytest.raises(ValueError, match=r"probe_loss is not the loss of the run: its mean is .* where"):
        losses_at_reference(model, (x, y), smoothed, probe_loss=each)
    with pytest.raises(TypeError, match=r"probe_loss must return a tensor .* got shape \[\] for"):
        losses_at_reference(model, (x, y), smoothed, probe_loss=of_model)
    with pytest.raises(ValueError, match="it gives one loss for each sample, not for each token"):
        losses_at_reference(model, (x, y), smoothed, "token", probe_loss=_smoothed_samples)
    assert losses.shape == (20,)


def _smoothed_samples(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """A mean with weights of classes, which no loss of single samples has as its mean."""
    return F.cross_entropy(output, target, weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))


def pairs(output: Tensor, target: Tensor) -> Tensor:
    """Of pairs of samples."""
    return (output[:, None] - output[None]).square().mean() + output.square().mean()


@pytest.mark.parametrize("loss_fn", [weighted, pairs])
def test_a_loss_that_is_no_mean_of_samples(loss_fn: Any) -> None:
    """An error in words, with what was tried and what to write."""
    with pytest.raises(ValueError, match=r"losses of single samples can't be had .* Pass probe_loss=, a function"):
        losses_at_reference(classifier(), labelled(), loss_fn)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match='per must be "sample" or "token", got \'pixel\''):
        losses_at_reference(classifier(), labelled(), F.cross_entropy, "pixel")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_and_batch_statistics(mode: str) -> None:
    """Checked with equal random numbers, and the model as it was afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)).double()
    getattr(model, mode)()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found, losses = losses_at_reference(model, labelled(), F.cross_entropy)
    assert found.name == 'reduction="none"' and losses.shape == (6,) and bool(losses.isfinite().all())
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


# ---- at draws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_at_draws(strategy: str) -> None:
    """``draw.evaluate_samples`` of any batch, whatever the loss function returns."""
    model, (x, y) = classifier(), labelled()

    def by_formula(draw: llc_fast.Draw) -> Tensor:
        return by_hand(lambda x: torch.func.functional_call(model, dict(draw.params), (x,)), x, y)  # type: ignore[arg-type]

    result = llc_fast.estimate_llc(
        model,
        (x, y),
        F.cross_entropy,
        lr=1e-3,
        nbeta=5.0,
        num_chains=2,
        num_draws=5,
        num_burnin=2,
        batch_size=6,
        progress=False,
        execution=llc_fast.Execution(strategy=strategy),
        observables={
            "here": lambda draw: draw.evaluate_samples((x, y)),
            "by formula": by_formula,
            "absent": lambda draw: draw.sample_losses is None,
        },
    )
    found = result.observables
    assert found["here"].shape == (2, 5, 20) and found["absent"].all()
    np.testing.assert_allclose(found["here"], found["by formula"], rtol=1e-9)
    assert math.isclose(found["here"].mean(), found["by formula"].mean()) and np.ptp(found["here"][:, :, 0]) > 0
