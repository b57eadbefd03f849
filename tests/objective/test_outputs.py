"""What loss functions and models return: the loss in it, or what to write."""

from __future__ import annotations

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
