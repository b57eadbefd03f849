"""The loss in what a loss function, or a model that takes its own loss, returns; and words for what has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_MAX_SHOWN = 4
"""Entries of a container that an error lists."""


def loss_in(found: Any, source: str) -> Tensor:
    """The loss in what was returned.

    A tensor is the loss. Otherwise it is the one called `loss`, as an entry of a mapping or an attribute (outputs of
    Hugging Face's models, data classes, named tuples), or the only number, or only tensor at all, of a tuple or list:
    ``(loss, logits)``, ``(logits, loss)``, ``(loss, {})``.

    Args:
        found: what was returned.
        source: who returned it: `OUTPUT`, `MODEL` or `OWN`.

    Raises:
        TypeError: there is no loss, or it is not clear which; says what to write.
    """
    if isinstance(found, Tensor):
        return found
    named = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(found, (tuple, list)):
        tensors = [entry for entry in found if isinstance(entry, Tensor)]
        numbers = [t for t in tensors if t.ndim == 0 and t.is_floating_point()]
        for clear in (numbers, tensors):
            if len(clear) == 1:
                return clear[0]
    raise TypeError(_refusal(found, source))


OUTPUT, MODEL, OWN = "loss_fn(output, target)", "loss_fn(model, batch)", "model(**batch)"
_WRITE = {
    OUTPUT: "loss_fn=lambda output, target: your_loss(output, target){entry}",
    MODEL: "loss_fn=lambda model, batch: your_loss(model, batch){entry}",
    OWN: "loss_fn=lambda model, batch: your_loss(model(**batch){entry}, …)",
}


def _refusal(found: object, source: str) -> str:
    write = "write " + _WRITE[source].format(entry=entry_with_tensor(found, samples=source == OWN))
    if source == OWN:
        return (
            f"loss_fn=None is for models that return their own loss, but this one returned {described(found)}: give it "
            f"what it takes its loss from (Hugging Face's models: 'labels' in the batches), or {write}"
        )
    if isinstance(found, (int, float)):
        write = "it has no gradient then; leave out .item() and float()"
    elif found is None:
        write = "does it lack a `return`?"
    return f"loss_fn must return a tensor, got {described(found)}: {write}"


def described(found: object) -> str:
    """A value in words: its type, and what a container holds."""
    if isinstance(found, Tensor):
        return f"Tensor {list(found.shape)}"
    if found is None:
        return "None"
    names = _names(found)
    if names:
        shown = [f"{name}: {described(value)}" for name, value in list(names.items())[:_MAX_SHOWN]]
    elif isinstance(found, (tuple, list)):
        shown = [described(entry) for entry in found[:_MAX_SHOWN]]
    else:
        return type(found).__name__
    more = ", …" if len(names or found) > _MAX_SHOWN else ""  # type: ignore[arg-type]
    return f"{type(found).__name__} ({', '.join(shown)}{more})"


def entry_with_tensor(found: object, samples: bool = False) -> str:
    """How to get at the first tensor of floats in a container, as ``.logits``, ``["logits"]`` or ``[0]``; or nothing.

    Args:
        found: the container.
        samples: whether the tensor must have a dimension.
    """

    def fits(value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and (not samples or value.ndim > 0)

    for name, value in _names(found).items():
        if fits(value):
            is_attribute = not isinstance(found, Mapping) or (hasattr(found, name) and name.isidentifier())
            return f".{name}" if is_attribute else f"[{name!r}]"
    if isinstance(found, (tuple, list)):
        for k, value in enumerate(found):
            if fits(value):
                return f"[{k}]"
    return ""


def _names(found: object) -> dict[str, object]:
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return {name: getattr(found, name) for name in found._fields}
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {}
