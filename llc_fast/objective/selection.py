"""Which parameters are sampled."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llc_fast.objective.components import Component, Components, components
from llc_fast.objective.heads import ComponentError


def select(model: nn.Module, params: Any) -> dict[str, Tensor | None]:
    """The parameters to sample by name, each with the mask of its elements that may move, or None for all of them.

    Args:
        model: whose parameters.
        params: None for all that require a gradient; a name, glob pattern (``"layers.0.*"``), module or parameter of
            the model, the name of a component (``"l3 h5"``, see :func:`llc_fast.components`), or several of
            these; or a mapping from such to a boolean mask that broadcasts to the parameter (weight-refined LLC), or
            to True for all of it. A pattern that matches no whole name may leave out what comes before one of its
            dots, as ``"lora_*"`` or ``"attention.*"`` do; if none matches then, it names modules, and stands for all
            of their parameters; if there is no such module either, it names a component. Several components, or
            mappings from names to masks in a list, select what any of them does.

    Raises:
        TypeError, ValueError: nothing to sample, something that is not the model's, a mask that does not fit.
    """
    named = dict(model.named_parameters())
    if not named:
        raise ValueError(_if_quantized(model) or "the model has no parameters: nothing to sample")
    if params is None:
        chosen: dict[str, Tensor | None] = {name: None for name, p in named.items() if p.requires_grad}
        if not chosen:
            reason = _if_quantized(model)
            raise ValueError(reason or "no parameter requires a gradient: nothing to sample; set requires_grad_(True)")
        return chosen
    if isinstance(params, (str, nn.Module, Tensor)):
        params = [params]
    if not isinstance(params, Iterable):
        raise TypeError(f"params must hold names, glob patterns, modules or parameters, got {type(params).__name__}")
    entries = list(params.items()) if isinstance(params, Mapping) else [(entry, True) for entry in params]
    if not entries:
        raise ValueError("params is empty: nothing to sample")
    masks: dict[str, Tensor | None] = {}
    known: Components | None = None
    for entry, mask in entries:
        part: Mapping[Any, Any] | None = None
        if isinstance(entry, str) and not _names_of(model, named, entry):
            known = known or components(model)
            part = _component(known, named, entry, mask)
        elif isinstance(entry, Mapping):
            part = {name: inner for key, inner in entry.items() for name in _matching(model, named, key)}
        if part is None:
            for name in _matching(model, named, entry):
                masks[name] = _mask(name, named[name], mask)
            continue
        for name, inner in part.items():
            own = _mask(name, named[name], inner)
            before = masks.get(name, own)
            masks[name] = None if own is None or before is None else own | before
    return {name: masks[name] for name in named if name in masks}


def described(params: Any) -> str | None:
    """What was selected by name, in words; None if nothing was."""
    entries = [params] if isinstance(params, (str, Component)) else params
    if not isinstance(entries, (list, tuple, set, frozenset, Mapping)):
        return None
    names = [entry.name if isinstance(entry, Component) else entry for entry in entries]
    return ", ".join(name if isinstance(name, str) else f"a {type(name).__name__}" for name in names) or None


def _component(known: Components, named: Mapping[str, Tensor], entry: str, mask: object) -> Component:
    try:
        found = known[entry]
    except ComponentError as error:
        if not known.has(entry):
            close = known.close_to(entry)
            also = f"; close to it: {', '.join(map(repr, close))}" if close else ""
            raise ValueError(
                f"params={entry!r} matches no parameter; the model has: {', '.join(list(named)[:20])}, "
                f"and components such as {', '.join(map(repr, itertools.islice(known, 8)))}{also}"
            ) from None
        raise ValueError(f"params={error}") from error
    if mask is not True and mask is not None:
        raise TypeError(
            f"params={entry!r} is a component, which has masks of its own: map it to True, or give masks by the names "
            "of parameters"
        )
    return found


def _if_quantized(model: nn.Module) -> str:
    """What to say of a model whose weights are whole numbers, in modules of their own or as parameters; or nothing."""
    kinds = {type(m).__name__ for m in model.modules() if ".quantized." in f".{type(m).__module__}."}
    kinds |= {str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.is_floating_point()}
    if not kinds:
        return ""
    return (
        f"the model is quantized ({', '.join(sorted(kinds))}): its weights are whole numbers, which have no gradient. "
        "Measure the model in floating point that it was made from, or sample what is still float in it with params="
    )


def _names_of(model: nn.Module, named: Mapping[str, Tensor], entry: str) -> list[str]:
    """The parameters that a name or pattern stands for; a tied one goes by each of its names."""
    tied = {alias: id(p) for alias, p in model.named_parameters(remove_duplicate=False)}
    wanted = {tied[alias] for alias in _named_by(entry, tied)}
    return [name for name, p in named.items() if id(p) in wanted]


def _matching(model: nn.Module, named: Mapping[str, Tensor], entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        found = _names_of(model, named, entry)
        if not found:
            raise ValueError(f"params={entry!r} matches no parameter; the model has: {', '.join(list(named)[:20])}")
    elif isinstance(entry, (nn.Module, Tensor)):
        wanted = {id(p) for p in (entry.parameters() if isinstance(entry, nn.Module) else [entry])}
        found = [name for name, p in named.items() if id(p) in wanted]
        if not found:
            raise ValueError(f"params holds a {type(entry).__name__} with no parameter of the model")
    else:
        raise TypeError(f"params must hold names, glob patterns, modules or parameters, got {type(entry).__name__}")
    yield from found


def _named_by(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches; if none, those of which it matches what follows a dot; if none, as modules."""
    for known in (pattern, f"{pattern}.*"):
        if found := fnmatch.filter(names, known):
            return found
        if found := [name for name in names if fnmatch.filter(_endings(name), known)]:
            return found
    return []


def _endings(name: str) -> Iterator[str]:
    """What follows each of the dots in a name."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _mask(name: str, p: Tensor, mask: object) -> Tensor | None:
    if mask is True or mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"the mask of parameter {name!r} must be a tensor of dtype torch.bool, got {kind}")
    try:
        full = mask.expand(p.shape)
    except RuntimeError:
        raise ValueError(
            f"the mask of parameter {name!r} has shape {tuple(mask.shape)}, which does not fit {tuple(p.shape)}"
        ) from None
    if not full.any():
        raise ValueError(f"the mask of parameter {name!r} is False everywhere: leave the parameter out")
    return full.contiguous()
