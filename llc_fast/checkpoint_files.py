"""Checkpoints on disk: which ones a folder or a pattern means, in the order of their steps, and what is in each.

The name of a file or folder says its format, as for the libraries that write them. Nothing in it is run: values are
read with ``torch.load(weights_only=True)`` or safetensors, and the index of a folder of torch.distributed.checkpoint by
:class:`_IndexReader`, which knows the few classes that such an index is made of.
"""

from __future__ import annotations

import glob
import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from llc_fast.support.errors import and_more, first_line
from llc_fast.support.optional import require

_FILES = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)
"""The weights in a folder of Hugging Face, the first that is there."""
_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")
_BESIDE = re.compile(
    r"(optim|optimizers?|(lr_)?schedulers?|(grad_)?scaler|rng|random_states?|train(ing_args|er_state|_state)|sampler|"
    r"dataloader|custom_checkpoint)(?![a-z])|train\.pt$|.*_optim_states\.pt$",
    re.IGNORECASE,
)
"""How the names begin of what trainers write beside the weights."""
_INDEX = ".metadata"
"""The index of a folder of torch.distributed.checkpoint, which is written last."""
_DEEPSPEED = "mp_rank_00_model_states.pt"
_WORDS = (
    re.compile(r"(?:^|[^a-z])(?:checkpoint|ckpt|global_step|step|iteration|iter)[-_=]?(\d+)(?!\d)", re.IGNORECASE),
    re.compile(r"(?:^|[^a-z])(?:epoch|ep)[-_=]?(\d+)(?!\d)", re.IGNORECASE),
)
"""How names say a step, and how an epoch, which counts where none says a step."""


# ---- which, and in what order ------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Whether a folder is one checkpoint, in a format that :func:`read` knows."""
    return _main_part(folder) is not None


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by their step, in its order.

    These are the folders and files whose names say a step: ``checkpoint-500`` (Hugging Face's Trainer),
    ``step_500.pt``, ``epoch=1-step=500.ckpt`` (Lightning), or, if none does, an epoch. What else is in the folder is
    not looked at.

    Raises:
        ValueError: there is none, or two of one step.
    """
    said = f"checkpoints={str(folder)!r}"
    if found := _steps_in(folder):
        return _in_order(found, said)
    a_model = ": it is one model, so put it in a list" if has_weights(folder) else ": pass a list of files"
    raise ValueError(f"{said} is a folder without names like checkpoint-500 or step_500.pt in it{a_model}")


def _steps_in(folder: Path) -> list[tuple[int, Path]]:
    """What is in a folder and says a step, or, if nothing does, an epoch; in alphabetical order."""
    candidates = [path for path in sorted(folder.iterdir()) if path.is_dir() or _may_be_weights(path)]
    for word in _WORDS:
        if found := [(int(steps[-1]), path) for path in candidates if (steps := word.findall(path.name))]:
            return found
    return []


def found(given: Sequence[str]) -> list[tuple[int, Path]]:
    """The checkpoints that somebody names on a command line, by their step, in its order.

    A pattern means the same whether the shell or this function expands it.

    Args:
        given: one folder of checkpoints, or any number of checkpoints and patterns.

    Raises:
        FileNotFoundError: a pattern matches nothing, or something is not there.
        ValueError: as :func:`checkpoints_in` and :func:`by_step`.
    """
    if len(given) == 1 and (folder := expanded(given[0])).is_dir():
        # A trainer's folder may have a last model beside its checkpoints, and a checkpoint DeepSpeed's global_step500.
        is_one = has_weights(folder) and (_WORDS[0].search(folder.name) or not _steps_in(folder))
        if not is_one:
            return checkpoints_in(folder)
    return by_step(listed(given), "checkpoints" if len(given) > 1 else f"checkpoints={given[0]!r}")


def listed(given: Sequence[str]) -> list[Path]:
    """Paths, and what patterns match, as they were given.

    Raises:
        FileNotFoundError: a pattern matches nothing, or something is not there.
    """
    paths = [path for text in given for path in (matching(text) if is_pattern(text) else [expanded(text)])]
    if absent := [path for path in paths if not os.path.lexists(path)]:
        raise FileNotFoundError(f"checkpoints: {str(absent[0])!r}{and_more(absent)} does not exist")
    return list(dict.fromkeys(paths))


def expanded(text: str | os.PathLike[str]) -> Path:
    """A path, with the user's folder for a ``~`` before it."""
    path = Path(os.fsdecode(text))
    return path if os.path.lexists(path) else Path(os.path.expanduser(path))


def is_pattern(text: str) -> bool:
    """Whether a text is a pattern such as ``runs/checkpoint-*``, and not the name of something that is there."""
    return glob.has_magic(text) and not os.path.lexists(expanded(text))


def matching(pattern: str) -> list[Path]:
    """What a pattern of :mod:`glob` matches, in alphabetical order; ``**`` is any number of folders.

    Raises:
        FileNotFoundError: nothing; says what there is instead.
    """
    found = sorted(map(Path, glob.glob(os.path.expanduser(pattern), recursive=True)))
    if found:
        return found
    parent = Path(os.path.expanduser(pattern)).parent
    there = ""
    if not glob.has_magic(str(parent)):
        names = sorted(path.name for path in parent.iterdir()) if parent.is_dir() else None
        listed = ", ".join(names[:5]) + ", …" * (len(names) > 5) if names else "nothing"
        there = f": there is no folder {str(parent)!r}" if names is None else f": {str(parent)!r} has {listed}"
    raise FileNotFoundError(f"checkpoints={pattern!r} matches no file or folder{there}")


def by_step(paths: Iterable[Path], said: str) -> list[tuple[int, Path]]:
    """Several checkpoints by their step, in its order.

    The step is what their names say, or else the names of the folders that they are in; or else the one number in
    which all their names differ (``model_500.pt``). Of several of them, files that trainers write beside the weights
    (``optimizer.pt``, ``trainer_state.json``, ``rng_state.pth``) are left out, and folders that have no weights and say
    no step.

    Args:
        paths: of the checkpoints.
        said: what they are called, for errors.

    Raises:
        ValueError: no checkpoint is left, one says no step, or two say the same.
    """
    given = list(paths)
    kept = [path for path in given if (path.is_dir() or _may_be_weights(path)) and not _BESIDE.match(path.name)]
    for word in _WORDS:
        steps = {path: _step_of(path, word) for path in kept}
        if any(step is not None for step in steps.values()):
            silent = [p for p, step in steps.items() if step is None and (p.is_file() or has_weights(p))]
            if silent:
                raise ValueError(
                    f"{said}: {str(silent[0])!r}{and_more(silent)} says no step, and others do: leave it out, or pass "
                    "a list in the order that you want"
                )
            return _in_order([(step, path) for path, step in steps.items() if step is not None], said)
    kept = [path for path in kept if path.is_file() or has_weights(path)]
    if not kept:
        raise ValueError(
            f"{said} has no checkpoint among its {len(given)} files and folders, such as {given[0].name!r}: files end "
            f"in {', '.join(_ENDINGS)}, and folders have weights in them"
        )
    if len(kept) == 1:
        return [(0, kept[0])]
    numbers = [re.findall(r"\d+", str(path)) for path in kept]
    same_words = len({re.sub(r"\d+", "#", str(path)) for path in kept}) == 1
    differing = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1] if same_words else []
    if len(differing) != 1:
        raise ValueError(
            f"{said}: names such as {str(kept[0])!r} say no step, as checkpoint-500 or step_500.pt do, and do not "
            "differ in one number alone: pass a list in the order that you want, and labels"
        )
    return _in_order([(int(number), path) for number, path in zip(differing[0], kept, strict=True)], said)


def _may_be_weights(path: Path) -> bool:
    return path.name.endswith(_ENDINGS + _INDEX_ENDINGS)


def _step_of(path: Path, word: re.Pattern[str]) -> int | None:
    """The step that a path says, in its last part that says one."""
    return next((int(found[-1]) for part in reversed(path.parts) if (found := word.findall(part))), None)


def _in_order(found: Sequence[tuple[int, Path]], said: str) -> list[tuple[int, Path]]:
    """By the step.

    Raises:
        ValueError: two have the same.
    """
    seen = dict[int, Path]()
    for step, path in found:
        if step in seen:
            one, other = seen[step], path
            names = (one.name, other.name) if one.parent == other.parent else (str(one), str(other))
            raise ValueError(
                f"{said} has two checkpoints of step {step}, {names[0]!r} and {names[1]!r}: pass a list of those that "
                "you want"
            )
        seen[step] = path
    return sorted(seen.items())


# ---- what is in one ----------------------------------------------------------------------------------------


def read(path: Path, said: str, weights_only: bool) -> Any:
    """What a file or a folder holds. Values stay in the file until they are used, where its format allows it.

    Args:
        path: of the file or the folder.
        said: what it is called, for errors.
        weights_only: False: run the code that a file of Python objects brings.

    Returns:
        Dictionaries, as they were saved; of a folder of torch.distributed.checkpoint a :class:`Distributed`.

    Raises:
        FileNotFoundError: it is not there, or a part of it.
        ValueError: it can't be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    if path.is_dir():
        part = _main_part(path)
        if part is None:
            raise ValueError(f"{said} {_why_none(path)}")
        if part.is_dir():
            return Distributed.at(part, said, weights_only)
        if part.name == _DEEPSPEED:
            _check_deepspeed(part.parent, said)
        within = f"{said} (its {str(part.relative_to(path))!r})"
        return read(part, said if part.name.endswith(".json") else within, weights_only)
    if path.name.endswith(".index.json"):
        return _read_shards(path, said, weights_only)
    if path.name.endswith(".safetensors"):
        return _read_safetensors(path, said)
    return _read_torch(path, said, weights_only)


def _main_part(folder: Path) -> Path | None:
    """The file with a folder's weights or with their index, or the folder of a distributed checkpoint.

    None if there is none, or more than one, so that nothing is guessed.
    """
    if not folder.is_dir():
        return None
    for name in (*_FILES, _DEEPSPEED):
        if (folder / name).is_file():
            return folder / name
    if (folder / _INDEX).is_file():
        return folder
    inside = sorted(folder.iterdir())
    indexes = [p for p in inside if p.name.endswith(_INDEX_ENDINGS)]  # of models with other names, as of diffusers
    if len(indexes) == 1:
        return indexes[0]
    # FSDP of Hugging Face and Accelerate (pytorch_model_fsdp_0), OLMo (model_and_optim), DeepSpeed (global_step500).
    parts = [p for p in inside if (p / _INDEX).is_file() and not p.name.lower().startswith("optim")]
    parts += [p / _DEEPSPEED for p in inside if (p / _DEEPSPEED).is_file()]
    if not parts and not any(p.is_dir() and any(word.search(p.name) for word in _WORDS) for p in inside):
        parts = [p for p in inside if p.name.endswith(_ENDINGS) and p.is_file() and not _BESIDE.match(p.name)]
    return parts[0] if len(parts) == 1 else None


def _why_none(folder: Path) -> str:
    """What is wrong with a folder that is no checkpoint, and what to do."""
    inside = sorted(folder.iterdir())
    if any(p.suffix == ".distcp" for p in inside):
        return (
            f"is a folder of torch.distributed.checkpoint without its {_INDEX!r}, which is written last: the save was "
            "not finished, or not all of it was copied"
        )
    if any(
        p.name.startswith("zero_pp_rank_") for p in (*inside, *(q for p in inside if p.is_dir() for q in p.iterdir()))
    ):
        return _ZERO
    shards = [p.name for p in inside if p.is_file() and p.name.endswith(_ENDINGS) and not _BESIDE.match(p.name)]
    more = (
        ": pass that folder itself, not a list" if any(p.is_dir() and _WORDS[0].search(p.name) for p in inside) else ""
    )
    if len(shards) > 1 and not more:
        more = f", but several files, such as {shards[0]!r} and {shards[1]!r}: pass the one that you want"
    return f"is a folder that has no {_FILES[0]}, {_FILES[2]} or an index of shards{more}"


def _read_torch(path: Path, said: str, weights_only: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": weights_only}
    try:
        try:
            return torch.load(path, mmap=True, **options)
        except RuntimeError:  # a file of torch before 1.6, or none at all
            return torch.load(path, **options)
    except Exception as error:  # of whatever kind torch raises for files that are none of its own
        raise ValueError(_unreadable(said, error, weights_only)) from error


def _unreadable(said: str, error: Exception, weights_only: bool) -> str:
    text = str(error).strip()
    if weights_only and (found := re.search(r"GLOBAL (\S+) was not an allowed global", text)):
        return _of_a_class(said, found[1])
    remedy = "Save model.state_dict() with torch.save"
    return f"{said} can't be read by torch.load(weights_only={weights_only}): {first_line(error)} {remedy}"


def _of_a_class(said: str, name: str) -> str:
    return (
        f"{said} holds objects of the class {name}, and what makes them from a file may run any code, so they "
        "are not read. If you trust where the file comes from, pass weights_only=False; or save "
        "model.state_dict() alone with torch.save"
    )


def _read_safetensors(path: Path, said: str) -> dict[str, Tensor]:
    load = require("safetensors.torch", "safetensors").load_file
    try:
        found: dict[str, Tensor] = load(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a class of the package's own
        raise ValueError(f"{said} is no file of safetensors: {error}") from error
    return found


def _read_shards(index: Path, said: str, weights_only: bool) -> dict[str, Any]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{said} has an index that can't be read, {index.name!r}: {error!r}") from error
    found: dict[str, Any] = {}
    for shard in shards:
        if os.path.basename(shard) != shard:
            raise ValueError(
                f"{said} has an index that names a file elsewhere, {shard!r}: it must be beside {index.name!r}"
            )
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{said} lacks {shard!r}, which {index.name!r} names: copy all of the folder")
        values = read(index.parent / shard, f"{said} (its {shard!r})", weights_only)
        found |= {name: values[name] for name in values if places.get(name) == shard}
    if absent := [name for name in places if name not in found]:
        raise ValueError(f"{said} has an index with {absent[0]!r}{and_more(absent)}, which no shard has")
    return found


_ZERO = (
    "is a checkpoint of DeepSpeed whose weights are divided among ranks: join them with DeepSpeed's own program, "
    "`python zero_to_fp32.py . OUTPUT` in that folder, and pass OUTPUT"
)


def _check_deepspeed(folder: Path, said: str) -> None:
    """Raise a ValueError if the weights are divided among ranks, by ZeRO stage 3 or tensor parallelism."""
    names = [path.name for path in folder.iterdir()]
    parts = [n for n in names if re.match(r"mp_rank_\d+_model_states\.pt$|zero_pp_rank_.*_model_states\.pt$", n)]
    if len(parts) > 1:
        raise ValueError(f"{said} {_ZERO}")


# ---- torch.distributed.checkpoint --------------------------------------------------------------------------


@dataclass(frozen=True)
class Distributed:
    """A folder of torch.distributed.checkpoint: names, shapes and dtypes at once, values when they are asked for.

    Attributes:
        groups: the tensors, by the keys of the dictionaries that they were saved in, and their own; stand-ins without
            memory, of their shapes and dtypes.
        folder: where it is.
        said: what it is called, for errors.
        names: what the index calls the tensors, by keys and own name.
        index: what ``.metadata`` holds.
        weights_only: False: parts may run code.
    """

    groups: dict[tuple[str, ...], dict[str, Tensor]]
    folder: Path
    said: str
    names: dict[tuple[str, ...], str]
    index: Any
    weights_only: bool

    @classmethod
    def at(cls, folder: Path, said: str, weights_only: bool) -> Distributed:
        """The one in a folder.

        Raises:
            ValueError: its index can't be read.
        """
        try:
            with (folder / _INDEX).open("rb") as file:
                index = (_IndexReader if weights_only else pickle.Unpickler)(file).load()
            entries, paths = dict(index.state_dict_metadata), dict(index.planner_data or {})
            shapes = {
                name: (entry.size, entry.properties.dtype) for name, entry in entries.items() if hasattr(entry, "size")
            }
            _ = dict(index.storage_data)
        except _OtherClassError as error:
            raise ValueError(_of_a_class(f"{said} has an index, {_INDEX!r}, that", str(error))) from error
        except Exception as error:  # of whatever kind pickle raises for files that are none of its own
            raise ValueError(f"{said} has an index that can't be read, {_INDEX!r}: {error!r}") from error
        groups: dict[tuple[str, ...], dict[str, Tensor]] = {}
        names: dict[tuple[str, ...], str] = {}
        for name, (shape, dtype) in shapes.items():
            *keys, own = map(str, paths.get(name, (name,)))
            groups.setdefault(tuple(keys), {})[own] = torch.zeros((), dtype=dtype).expand(shape)
            names[(*keys, own)] = name
        return cls(groups, folder, said, names, index, weights_only)

    def values(self, keys: tuple[str, ...], own: Iterable[str]) -> dict[str, Tensor]:
        """The values of some tensors, all in one place.

        Raises:
            FileNotFoundError: a part of the folder is not there.
            ValueError: a part can't be read.
        """
        return {name: self._value(self.names[(*keys, name)]) for name in own}

    def check_parts(self, keys: tuple[str, ...], own: Iterable[str]) -> None:
        """Raise what :meth:`values` would, as far as can be seen without reading them."""
        for name in own:
            for _ in self._parts(self.names[(*keys, name)]):
                pass

    def _parts(self, name: str) -> Iterator[tuple[Any, Path, int, int]]:
        """The parts of a tensor: which they are of it, and the file, offset and length of each."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        for chunk in self.index.state_dict_metadata[name].chunks:
            try:
                place = self.index.storage_data[MetadataIndex(name, chunk.offsets)]
                path, start, length = str(place.relative_path), int(place.offset), int(place.length)
                transformed = getattr(place, "transform_descriptors", None)
            except (KeyError, AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{self.said} has an index without a place for {name!r}: {error!r}") from error
            if transformed:
                raise ValueError(
                    f"{self.said} has its values transformed by {', '.join(map(str, transformed))}: read it with "
                    "torch.distributed.checkpoint.load, and save the state dict with torch.save"
                )
            if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
                raise ValueError(f"{self.said} has an index that names a file elsewhere, {path!r}")
            if not (file := self.folder / path).is_file():
                raise FileNotFoundError(f"{self.said} lacks {path!r}, which {_INDEX!r} names: copy all of the folder")
            if file.stat().st_size < start + length:
                raise ValueError(f"{self.said} has a file that was cut, {path!r}: copy all of the folder again")
            yield chunk, file, start, length

    def _value(self, name: str) -> Tensor:
        entry = self.index.state_dict_metadata[name]
        found: Tensor | None = None
        filled = 0
        for chunk, path, start, length in self._parts(name):
            with path.open("rb") as file:
                file.seek(start)
                data = io.BytesIO(file.read(length))
            try:
                part: Tensor = torch.load(data, map_location="cpu", weights_only=self.weights_only)
                filled += part.numel()
                if part.shape == entry.size and part.dtype == entry.properties.dtype:
                    found = part
                    continue
                if found is None:
                    found = torch.empty(entry.size, dtype=entry.properties.dtype)
                found[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))].copy_(part)
            except Exception as error:  # of whatever kind torch raises for what it has not written
                raise ValueError(_unreadable(f"{self.said} (its {path.name!r})", error, self.weights_only)) from error
        if found is None or filled != found.numel():
            raise ValueError(f"{self.said} has {filled} of the {entry.size.numel()} elements of {name!r}")
        return found


class _OtherClassError(Exception):
    """An index holds an object of another class than those that torch writes."""


class _IndexReader(pickle.Unpickler):
    """Reads an index, which is a pickle, and makes nothing but what torch puts into one.

    ``torch.distributed.checkpoint.load`` unpickles whatever is there, and so runs whatever it says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in _PATHS:  # where it was saved, on any system
            return PurePath
        if name in _CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise _OtherClassError(f"{module}.{name}")


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    # torch 2.0 to 2.3
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
}
"""The classes in an index, by module."""
