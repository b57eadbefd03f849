"""The weights of a model from what people have: state dicts, files and folders of others, under the model's own names.

A checkpoint is a state dict, or a file or folder that :mod:`llc_fast.checkpoint_files` reads. :class:`WeightReader`
gives its values the names that one model has for them, or says what is wrong. What fits in two ways is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llc_fast.checkpoint_files import Distributed, read
from llc_fast.support.errors import and_more

_TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that wrappers add anywhere: torch.compile, FSDP, activation checkpointing."""
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "DeepSpeedEngine", "_FabricModule")
"""Classes that hold the model that was given to them: of torch, DeepSpeed, and Lightning Fabric."""
_DEPTH = 3
"""How deep a file's dictionaries are looked through."""
_LIGHTNING = "pytorch-lightning_version"
"""A key of every checkpoint of Lightning, whose modules hold other things beside the model."""
_COUNTER = "num_batches_tracked"
"""The buffer of batch normalization that files of old versions of torch lack."""


# ---- what a model takes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What a model takes, by the names of its state dict without what wrappers add.

    Attributes:
        values: its own.
        own_names: the names in its state dict.
        twins: of each name, the others that are the same tensor.
        ignored: what may be in a file beside them, by shape: buffers that the model does not save now.
        patterns: of names that may be in a file beside them.
        prefixes: how many names begin with each.
        least: how many names a checkpoint has at least.
    """

    values: dict[str, Any]
    own_names: dict[str, str]
    twins: dict[str, list[str]]
    ignored: dict[str, torch.Size]
    patterns: tuple[str, ...]
    prefixes: dict[str, int]
    least: int

    @classmethod
    def of(cls, model: nn.Module) -> _Wanted:
        state = model.state_dict()
        own_names = _without_wrappers(state)
        places: dict[Any, list[str]] = {}
        for name, own in own_names.items():
            if (place := place_of(state[own])) is not None:
                places.setdefault(place, []).append(name)
        buffers = {".".join(_parts(name)): t.shape for name, t in model.named_buffers(remove_duplicate=False)}
        patterns = next(
            (p for m in model.modules() if (p := getattr(m, "_keys_to_ignore_on_load_unexpected", None))), ()
        )
        return cls(
            {name: state[own] for name, own in own_names.items()},
            own_names,
            {name: [other for other in group if other != name] for group in places.values() for name in group},
            {name: shape for name, shape in buffers.items() if name not in own_names},
            tuple(p for p in patterns if isinstance(p, str)) if isinstance(patterns, (list, tuple, set)) else (),
            _prefixes(own_names),
            len(own_names)
            - sum(len(group) - 1 for group in places.values())
            - sum(name.endswith(_COUNTER) for name in own_names),
        )

    def may_lack(self, name: str, given: Mapping[str, Any]) -> bool:
        """Whether a file needs no value of this name: it has another name of the same tensor."""
        return name.endswith(_COUNTER) or any(twin in given for twin in self.twins.get(name, ()))

    def may_have(self, name: str, value: Any) -> bool:
        """Whether a file may have a value that the model does not take."""
        if name in self.ignored:
            return isinstance(value, Tensor) and value.shape == self.ignored[name]
        return any(re.search(pattern, name) for pattern in self.patterns)


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in _TRANSPARENT]


def _without_wrappers(state: Mapping[Any, Any]) -> dict[str, str]:
    """The names without what wrappers add, and what they are called; as they are if that makes two the same."""
    names = {".".join(_parts(str(name))): name for name in state}
    if len(names) < len(state):
        names = {str(name): name for name in state}
    if names and all(name.startswith("module.") for name in names):  # DataParallel
        names = {name.removeprefix("module."): own for name, own in names.items()}
    return names


def place_of(tensor: Any) -> tuple[Any, ...] | None:
    """Where a tensor's values are, and which they are there; None if it has none of its own."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a tensor of tensors
        return None
    return (address, tensor.device, tensor.shape, tensor.stride(), tensor.dtype) if address else None


# ---- comparing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """How the values at one place of a checkpoint fit the model.

    Attributes:
        keys: that lead to the place.
        prefix: what the names there have before those of the model.
        state: what is there.
        names: its names by those of the model.
        problem: in words; empty if there is none.
        score: how many names agree.
    """

    keys: tuple[str, ...]
    prefix: str
    state: Mapping[Any, Any]
    names: dict[str, Any]
    problem: str
    score: int

    @property
    def where(self) -> str:
        """The place in words, as Python has it."""
        keys = "".join(f"[{key!r}]" for key in self.keys)
        return f"{keys}{f' from {self.prefix}*' if self.prefix else ''}" or "itself"

    @property
    def identity(self) -> tuple[int, ...]:
        """Of the values."""
        return tuple(id(self.state[name]) for name in self.names.values())

    def is_called(self, entry: str) -> bool:
        return entry in self.keys or entry in (self.prefix, self.prefix.rstrip("."))


def _fits(
    state: Mapping[Any, Any], keys: tuple[str, ...], wanted: _Wanted, entry: str | None, partial: bool
) -> list[_Fit]:
    """The ways in which the names of a state dict may be those of the model, the plainest first.

    Args:
        state: the state dict.
        keys: that lead to it.
        wanted: what the model takes.
        entry: the prefix or key that was asked for.
        partial: whether the model may be a part of it.
    """
    names = _without_wrappers(state)
    found = [_fit(state, keys, "", names, wanted)]
    if not found[0].problem:
        return found
    for prefix, count in _prefixes(names).items():
        asked = entry is not None and entry.rstrip(".") == prefix.rstrip(".")
        if count == len(names) or asked or (partial and count >= wanted.least):
            under = {name.removeprefix(prefix): own for name, own in names.items() if name.startswith(prefix)}
            found.append(_fit(state, keys, prefix, under, wanted))
    for prefix, count in wanted.prefixes.items():  # the model wraps what was saved
        if count >= wanted.least:
            found.append(_fit(state, keys, "", {prefix + name: own for name, own in names.items()}, wanted))
    return found


def _prefixes(names: Iterable[str]) -> dict[str, int]:
    """``a.`` and ``a.b.`` of ``a.b.weight``, and of how many names."""
    counts: dict[str, int] = {}
    for name in names:
        for end in (position + 1 for position, letter in enumerate(name) if letter == "."):
            counts[name[:end]] = counts.get(name[:end], 0) + 1
    return counts


def _fit(
    state: Mapping[Any, Any], keys: tuple[str, ...], prefix: str, names: Mapping[str, Any], wanted: _Wanted
) -> _Fit:
    values = {name: state[own] for name, own in names.items()}
    missing = [n for n in wanted.values if n not in values and not wanted.may_lack(n, values)]
    more = [n for n in values if n not in wanted.values and not wanted.may_have(n, values[n])]
    problems = [f"it has no {missing[0]!r}{and_more(missing)}"] if missing else []
    problems += [f"the model has no {more[0]!r}{and_more(more)}"] if more else []
    shared = [name for name in values if name in wanted.values]
    if not problems:
        problems = [said for name in shared if (said := _difference(name, values[name], wanted.values[name]))][:1]
    if not problems:
        problems = [said for name in shared if (said := _twins_differ(name, values, wanted))][:1]
    own = {name: names[name] for name in shared}
    return _Fit(keys, prefix, state, own, ", and ".join(problems), len(shared))


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(ours, Tensor) != isinstance(theirs, Tensor):
        return f"{name!r} is of type {type(theirs).__name__} there, {type(ours).__name__} in the model"
    if not isinstance(ours, Tensor):
        return ""
    if ours.shape != theirs.shape:
        return f"{name!r} has shape {tuple(theirs.shape)} there, {tuple(ours.shape)} in the model"
    if _kind(ours) != _kind(theirs):
        return f"{name!r} has dtype {theirs.dtype} there, {ours.dtype} in the model"
    if theirs.is_meta and not ours.is_meta:
        return f"{name!r} has no values there (it is on the meta device)"
    return ""


def _kind(tensor: Tensor) -> str:
    """Kinds of numbers that can't be converted into each other; floating-point types can."""
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else str(tensor.dtype)


def _twins_differ(name: str, values: Mapping[str, Any], wanted: _Wanted) -> str:
    for twin in wanted.twins.get(name, ()):
        ours, theirs = values[name], values.get(twin)
        if theirs is not None and place_of(ours) != place_of(theirs) and not _are_equal(ours, theirs):
            return f"{name!r} and {twin!r} are one tensor in the model, and differ there"
    return ""


def _are_equal(one: Tensor, other: Tensor) -> bool:
    same = (one == other.to(one.device)) | (one.isnan() & other.to(one.device).isnan())
    return bool(same.all())


# ---- the reader --------------------------------------------------------------------------------------------


class WeightReader:
    """Reads checkpoints for one model.

    A checkpoint is a state dict, or a file or a folder in one of these formats:

    - ``torch.save``, also of dictionaries around a state dict; Lightning's ``.ckpt``;
    - safetensors;
    - folders of Hugging Face: ``model.safetensors`` or ``pytorch_model.bin``, or shards of these with their index
      (which may also be given itself), or peft's ``adapter_model``; what Accelerate's ``save_state`` and
      ``save_model`` write;
    - folders of ``torch.distributed.checkpoint`` from any number of ranks (``.metadata`` and ``__0_0.distcp``), or with
      one of these in it, such as FSDP's ``pytorch_model_fsdp_0``; they are read in this process alone, without a
      process group;
    - DeepSpeed's ``mp_rank_00_model_states.pt``, where it has all weights (no ZeRO stage 3);
    - folders with one file of weights beside a trainer's other files.

    Names may have what wrappers add (torch.compile, DataParallel, DistributedDataParallel, FSDP, activation
    checkpointing), there and in the model. State dicts may be entries of dictionaries, under any key. All names may
    have one prefix that those of the model lack, such as ``model.``, or the other way round; in checkpoints of
    Lightning there may be other values beside. A parameter that has several names, as tied weights have, may have one
    of them. Buffers that the model does not save may be there. Folders of Hugging Face whose names are those of another
    version are converted by transformers, if the model is one of its own. The adapters of peft may be there alone,
    without the model that they are for, as long as nothing else of it is trained: that stays as it is.

    Args:
        model: whose names are wanted. It is looked at now.
        entry: which is meant, where several fit: the key of an entry, or a prefix of the names.
        weights_only: False: run the code that a file of Python objects brings, as ``torch.load`` can.

    Raises:
        TypeError: `entry` or `weights_only` is of another type.
    """

    def __init__(self, model: nn.Module, *, entry: str | None = None, weights_only: bool = True) -> None:
        if not (entry is None or isinstance(entry, str)):
            raise TypeError(f"entry must be the name of an entry or a prefix of names, got {type(entry).__name__}")
        if not isinstance(weights_only, bool):
            raise TypeError(f"weights_only must be True or False, got {weights_only!r}")
        self._wanted, self._entry, self._weights_only = _Wanted.of(model), entry, weights_only
        self._model = model

    def read(self, source: Mapping[str, Any] | Path, said: str = "checkpoint") -> OrderedDict[str, Any]:
        """The values of a checkpoint by the names of the model's state dict: what ``load_state_dict`` takes.

        Those of a state dict are not copied. Those of a file are not read before they are used, where its format
        allows it: shapes and types are known at once, and optimizer states beside the weights never cost memory.

        Args:
            source: a state dict, a file or a folder.
            said: what it is called, for errors.

        Raises:
            ValueError: it can't be read, is not of this model, or fits in more than one way; says what to do.
            FileNotFoundError: it is not there.
        """
        raw, fit = self._chosen(source, said)
        if isinstance(raw, Distributed) and isinstance(fit, _Fit):
            fit = dataclasses.replace(fit, state=raw.values(fit.keys, fit.names.values()))
            values = {name: fit.state[own] for name, own in fit.names.items()}
            if problem := next((p for name in values if (p := _twins_differ(name, values, self._wanted))), ""):
                raise ValueError(self._complaint([dataclasses.replace(fit, problem=problem)], said))
        return self._named(fit) if isinstance(fit, _Fit) else fit

    def check(self, source: Mapping[str, Any] | Path, said: str = "checkpoint") -> None:
        """Raise what :meth:`read` would, as far as can be seen without reading the values."""
        raw, fit = self._chosen(source, said)
        if isinstance(raw, Distributed) and isinstance(fit, _Fit):
            raw.check_parts(fit.keys, fit.names.values())

    def _chosen(self, source: Mapping[str, Any] | Path, said: str) -> tuple[Any, _Fit | OrderedDict[str, Any]]:
        """What a checkpoint holds, and the one way in which it fits the model, or else all values by their names."""
        raw = source if isinstance(source, Mapping) else read(source, said, self._weights_only)
        if not isinstance(raw, (Mapping, nn.Module, Distributed)):
            raise ValueError(
                f"{said} is no state dict of this model: it is of type {type(raw).__name__}. Pass a dictionary of "
                "tensors by name, such as model.state_dict()"
            )
        if (found := self._adapted(raw)) is not None:
            return raw, found
        fits = self._all_fits(raw)
        good = [fit for fit in fits if not fit.problem and (self._entry is None or fit.is_called(self._entry))]
        if not good and isinstance(source, Path) and (converted := _converted(self._model, source)) is not None:
            return None, _fit(converted, (), "", _without_wrappers(converted), self._wanted)
        if not good:
            raise ValueError(self._complaint(fits, said))
        if len({fit.identity for fit in good}) > 1:
            *others, last = [fit.where for fit in good]
            example = good[0].prefix.rstrip(".") or (good[0].keys or good[-1].keys or ("",))[-1]
            raise ValueError(
                f"{said} fits the model in more than one way: {', '.join(others)} and {last}. Say which one is meant, "
                f"such as entry={example!r}"
            )
        return raw, good[0]

    def _adapted(self, raw: Any) -> OrderedDict[str, Any] | None:
        """All values, if the checkpoint has the adapters of peft and they are all that is trained."""
        names = _adapter_names(self._model) if isinstance(raw, Mapping) else {}
        if not names or raw.keys() != names.keys():
            return None
        ours = self._model.state_dict()
        trained = {name for name, p in self._model.named_parameters(remove_duplicate=False) if p.requires_grad}
        if trained - set(names.values()) or any(_difference(name, raw[name], ours[own]) for name, own in names.items()):
            return None
        return OrderedDict(ours | {own: raw[name] for name, own in names.items()})

    def _all_fits(self, raw: Any) -> list[_Fit]:
        found: list[_Fit] = []
        partial = isinstance(raw, Distributed) or (isinstance(raw, Mapping) and _LIGHTNING in raw)
        for keys, state in _places(raw):
            if keys and 2 * len(state) < self._wanted.least:  # one of the many dictionaries of an optimizer
                continue
            fits = _fits(state, keys, self._wanted, self._entry, partial)
            if self._entry is None and not keys and not fits[0].problem:
                return fits  # as it is: nothing else is looked for
            found += fits
        return found

    def _complaint(self, fits: list[_Fit], said: str) -> str:
        nearest = max(fits, key=lambda fit: fit.score)
        if self._entry is not None and not any(fit.is_called(self._entry) for fit in fits):
            known = sorted({key for fit in fits for key in fit.keys})
            has = f"; its entries are {', '.join(map(repr, known))}" if known else ""
            return f"{said} has no entry={self._entry!r} that fits the model{has}"
        inside = f" in its entry {''.join(f'[{key!r}]' for key in nearest.keys)}" if nearest.keys else ""
        return (
            f"{said} is no state dict of this model: {nearest.problem}{inside}. Pass what model.state_dict() of the "
            "same architecture returned"
        )

    def _named(self, fit: _Fit) -> OrderedDict[str, Any]:
        wanted, found = self._wanted, OrderedDict[str, Any]()
        for name, own in wanted.own_names.items():
            if name in fit.names:
                found[own] = fit.state[fit.names[name]]
            elif twin := next((twin for twin in wanted.twins.get(name, ()) if twin in fit.names), None):
                found[own] = fit.state[fit.names[twin]]
            else:  # batch normalization's counter
                found[own] = torch.zeros_like(wanted.values[name])
        # The versions of modules, by which they read what older ones have saved.
        if (versions := getattr(fit.state, "_metadata", None)) is not None:
            moved = dict(versions)
            for name, theirs in fit.names.items():
                module = str(theirs).rpartition(".")[0]
                if module in versions:
                    moved[wanted.own_names[name].rpartition(".")[0]] = versions[module]
            found._metadata = OrderedDict(moved)  # type: ignore[attr-defined]
        return found


def inner_model(model: nn.Module) -> nn.Module:
    """The model in the wrappers of torch.compile, DataParallel, DDP, DeepSpeed and Lightning Fabric."""
    while type(model).__name__ in _WRAPPERS:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _converted(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """The state dict of a folder, by the names that transformers gives them; None if it can't, or not all of them."""
    base = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    inner = inner_model(model)
    if base is None or not isinstance(inner, base) or not folder.is_dir():
        return None
    options = {"config": copy.deepcopy(inner.config), "output_loading_info": True, "local_files_only": True}
    try:
        with torch.random.fork_rng(devices=[]):  # it makes weights before it reads them
            made, info = type(inner).from_pretrained(str(folder), **options)
    except Exception:  # of whatever kind: the plain comparison of names has the better words
        return None
    if any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")):
        return None
    found: dict[str, Any] = made.state_dict()
    return found


def _adapter_names(model: nn.Module) -> dict[str, str]:
    """The names in the model's state dict of its adapters, by those that peft saves them under; none without any."""
    peft, inner = sys.modules.get("peft"), inner_model(model)
    if peft is None or not isinstance(inner, peft.PeftModel):
        return {}
    places = {place_of(t): name for name, t in model.state_dict().items()}
    saved = peft.get_peft_model_state_dict(inner, save_embedding_layers=False)
    found = {name: places.get(place_of(t)) for name, t in saved.items()}
    return {} if None in found.values() else {name: str(own) for name, own in found.items()}


def _places(raw: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """The dictionaries in what was read, with the keys that lead to them; of modules, their state dicts."""
    if isinstance(raw, Distributed):
        yield from raw.groups.items()
        return
    if isinstance(raw, nn.Module):
        yield keys, raw.state_dict()
        return
    yield keys, raw
    if len(keys) < _DEPTH:
        for key, value in raw.items():
            if isinstance(value, (Mapping, nn.Module)):
                yield from _places(value, (*keys, str(key)))
