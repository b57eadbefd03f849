"""What loss functions and models return: the loss in it, or what to write."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import runs
import torch
from torch import Tensor, nn

from llc_fast.objective.outputs import MODEL, OUTPUT, OWN, loss_in

mse = nn.functional.mse_loss
LOSS, LOGITS, EACH = torch.tensor(2.0), torch.zeros(5, 3), torch.ones(5)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Named(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class Plain:
    loss = LOSS


@pytest.mark.parametrize(
    "found",
    [
        LOSS,
        {"loss": LOSS, "logits": LOGITS},
        OrderedDict(logits=LOGITS, loss=LOSS),
        Output(LOSS, LOGITS),
        Named(LOSS, LOGITS),
        Plain(),
        (LOSS, LOGITS),
        (LOGITS, LOSS),
        [LOSS, LOGITS],
        (LOSS, {}),
        (LOSS, {"accuracy": 0.5}),
        (LOSS, None),
        (LOSS, torch.tensor(3)),  # a count
        (LOSS,),
    ],
)
@pytest.mark.parametrize("source", [OUTPUT, MODEL, OWN])
def test_what_is_clear(found: Any, source: str) -> None:
    assert loss_in(found, source) is LOSS


def test_losses_of_samples() -> None:
    assert loss_in((EACH, {}), MODEL) is EACH and loss_in({"loss": EACH}, OWN) is EACH


@pytest.mark.parametrize(
    ("found", "source", "message"),
    [
        (
            (LOSS, LOSS),
            MODEL,
            "loss_fn must return a tensor, got tuple (Tensor [], Tensor []): write "
            "loss_fn=lambda model, batch: your_loss(model, batch)[0]",
        ),
        ((EACH, LOGITS), OUTPUT, "write loss_fn=lambda output, target: your_loss(output, target)[0]"),
        ({"total": LOSS, "kl": LOSS}, MODEL, "write loss_fn=lambda model, batch: your_loss(model, batch)['total']"),
        (Output(None, LOGITS), MODEL, "got Output (loss: None, logits: Tensor [5, 3]): write "),
        (Output(None, LOGITS), OWN, "your_loss(model(**batch).logits, …)"),
        (Output(None, LOGITS), OWN, "'labels' in the batches"),
        ({"logits": LOGITS}, OWN, "but this one returned dict (logits: Tensor [5, 3])"),
        (0.5, OUTPUT, "loss_fn must return a tensor, got float: it has no gradient then; leave out .item()"),
        (None, MODEL, "loss_fn must return a tensor, got None: does it lack a `return`?"),
        (tuple([LOSS] * 9), MODEL, "Tensor [], Tensor [], Tensor [], Tensor [], …)"),
    ],
)
def test_what_is_not_clear(found: Any, source: str, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        loss_in(found, source)
    assert message in str(caught.value)


# ---- in a run ------------------------------------------------------------------------------------------------


class Packing(nn.Module):
    """The network of `runs`, its output in a container."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.net, self.pack = runs.mlp(), pack

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.net(x)
        return self.pack(out if y is None else mse(out, y), out)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("source", [OUTPUT, MODEL, OWN])
@pytest.mark.parametrize("pack", [lambda a, b: (a, b), lambda a, b: {"loss": a, "out": b}, Output, Named])
def test_chains_of_a_loss_in_a_container(pack: Any, source: str, strategy: str) -> None:
    """They are those of the plain loss, paired like them."""
    x, y = runs.data()
    data = {"x": x, "y": y} if source == OWN else (x, y)
    loss_fn: Any = {
        OUTPUT: lambda output, target: pack(mse(output, target), output),
        MODEL: lambda model, batch: model(*batch),
        OWN: None,
    }[source]
    model = runs.mlp() if source == OUTPUT else Packing(pack)
    found = runs.estimate(model=model, data=data, loss_fn=loss_fn, strategy=strategy)
    expected = runs.estimate(strategy=strategy)
    np.testing.assert_allclose(found.loss_trace, expected.loss_trace, rtol=1e-5)
    assert found.settings["control_variate"] == expected.settings["control_variate"]


def _notes(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize(
    ("pack", "line"),
    [
        (lambda a, b: (a, b), "lambda output, target: your_loss(output[0], target)"),
        (lambda a, b: {"out": a}, "lambda output, target: your_loss(output['out'], target)"),
        (lambda a, b: Output(None, b), "lambda output, target: your_loss(output.logits, target)"),
    ],
)
def test_a_loss_function_that_gets_a_container(pack: Any, line: str) -> None:
    """The error is that of the loss function; the note says what it was given and what to write."""
    with pytest.raises((TypeError, AttributeError)) as caught:
        runs.estimate(model=Packing(pack))
    assert line in _notes(caught.value)


def test_notes_on_batches() -> None:
    x, y = runs.data()
    with pytest.raises(AttributeError) as caught:
        runs.estimate(data={"x": x, "y": y}, loss_fn=lambda model, batch: mse(model(batch.x), batch.y))
    assert "write batch['x']" in _notes(caught.value)
    with pytest.raises(RuntimeError) as wide:
        runs.estimate(data=(x.double().numpy(), y.double().numpy()))
    assert "The data are float64, the parameters float32: convert the data" in _notes(wide.value)
    with pytest.raises(RuntimeError) as whole:
        runs.estimate(data=((10 * x).to(torch.uint8), y))
    assert "The data are uint8, the parameters float32: convert the data" in _notes(whole.value)


def test_a_note_on_methods() -> None:
    class Stepping(nn.Linear):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return mse(self(batch[0]), batch[1])

    model = Stepping(3, 1)
    with pytest.raises(Exception) as caught:
        runs.estimate(model=model, loss_fn=model.training_step)
    assert "write loss_fn=lambda model, batch: model.training_step(batch, 0)" in _notes(caught.value)
    runs.estimate(model=model, loss_fn=lambda model, batch: model.training_step(batch, 0))


def test_models_of_the_inference_mode() -> None:
    """A copy made outside of it, as the error says, is a model like others; data made in it are data."""
    with torch.inference_mode():
        model, data = runs.mlp(), tuple(t + 1 for t in runs.data())
    with pytest.raises(ValueError, match=r"parameter '0\.weight' was made in torch\.inference_mode"):
        runs.estimate(model=model)
    expected = runs.estimate(model=runs.mlp(), data=tuple(t + 1 for t in runs.data())).loss_trace
    found = runs.estimate(model=copy.deepcopy(model), data=data).loss_trace
    np.testing.assert_array_equal(found, expected)


def test_nested_tensors_are_no_columns() -> None:
    nested = torch.nested.nested_tensor([torch.randn(k + 1, 3) for k in range(4)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^data has nested tensors.*to_padded_tensor"):
        runs.estimate(data=(nested, torch.zeros(4)))
