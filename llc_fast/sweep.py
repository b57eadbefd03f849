"""The local learning coefficient along a training run: one estimate for each of its checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import xarray
from llc_fast.estimate import estimate_llc
from llc_fast.objective.objective import LossFunction
from llc_fast.objective.selection import select
from llc_fast.progress import make_progress
from llc_fast.result import LLCResult
from llc_fast.settings import DEFAULT_NUM_DRAWS
from llc_fast.support.optional import require

WARM_BURNIN = 4
"""A warm start burns in for the fourth part: the slow directions, which take longest, are where they belong."""
_NAMES = (
    *("chain", "llc_mean", "llc_stderr", "llc_low", "llc_high", "llc_per_chain", "init_loss", "nbeta", "lr"),
    *("warnings", "warning_codes", "is_warm", "gradients", "seconds"),
)
_DIAGNOSTICS = ("r_hat", "ess_bulk", "ess_tail", "trend", "bias_share", "distance_over_reference", "init_loss_stderr")


def sweep_checkpoints(
    model: nn.Module,
    checkpoints: Sequence[Mapping[str, Any] | str | os.PathLike[str]],
    data: Any,
    loss_fn: LossFunction | None,
    *,
    labels: Sequence[Any] | None = None,
    dim: str = "checkpoint",
    warm: bool = True,
    num_draws: int = DEFAULT_NUM_DRAWS,
    num_burnin: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> xarray.Dataset:
    """Estimate λ at each of a model's checkpoints, as :func:`llc_fast.estimate_llc` does.

    Step sizes are chosen anew at every checkpoint, as curvature changes by orders of magnitude in training; pass ``lr``
    to fix it. With `warm`, the chains of a checkpoint start where those of the one before ended, moved by as much as w*
    has moved between them (``estimate_llc(warm_start=…)``). They are chains of their own checkpoint, only better
    begun, so that a quarter of the burn-in will do. Where training has learned something in between, they may be worse
    begun: far from where that holds. So a checkpoint whose warm chains give rise to a warning is estimated again from
    w*, and that estimate is kept, with its own warnings. Chains that are all led astray together are not noticed; where
    a jump between checkpoints is what you look for, pass ``warm=False``. The model is left as it was.

    Ctrl-C ends the sweep after the present step; the checkpoints that were finished are returned, with the attribute
    ``partial``.

    Args:
        model: a model that the state dicts belong to, in the mode to be evaluated in.
        checkpoints: state dicts, or files that ``torch.load(weights_only=True)`` reads them from, one at a time.
        data, loss_fn: as for :func:`llc_fast.estimate_llc`.
        labels: what the checkpoints are called along `dim`, training steps, say; None: 0, 1, 2, …
        dim: name of the dimension.
        warm: whether chains start where those of the checkpoint before ended. Saves time if most estimates are sound.
        num_draws: losses of each chain that enter λ̂.
        num_burnin: steps before the first draw, of chains that start at w*; None: as many as draws.
        folder: keeps every finished estimate, and the one under way: the same call goes on from there. It is made if
            need be.
        progress: show progress with λ̂ so far: a bar on a terminal or in a notebook, a line each 10 % in a log.
        settings: further arguments of :func:`llc_fast.estimate_llc`.

    Returns:
        A dataset over `dim`: ``llc_mean``, ``llc_stderr``, ``llc_low`` and ``llc_high`` (the 95 % interval),
        ``llc_per_chain`` (and ``chain``), ``init_loss``, ``nbeta``, ``lr``, ``warnings`` (one string, a line each) and
        ``warning_codes`` (separated by spaces), ``is_warm``, ``gradients`` (pilots included), ``seconds``, and of the
        diagnostics ``r_hat``, ``ess_bulk``, ``ess_tail``, ``trend``, ``bias_share``, ``distance_over_reference`` and
        ``init_loss_stderr``; NaN where there is none. ``Dataset.to_netcdf`` and ``to_zarr`` write it.

    Raises:
        TypeError, ValueError: as :func:`llc_fast.estimate_llc`; checkpoints that are no state dicts of this model, or
            not as many as labels, or that share the memory of what is sampled (``model.state_dict()`` does not copy).
            All of them are looked at before the first estimate.
        FileNotFoundError: a checkpoint's file.
        ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
    """
    require("xarray", "xarray")  # before the work
    names = _checked(model, checkpoints, labels, dim, settings)
    burnin = num_draws if num_burnin is None else num_burnin
    # Absolute: the program may change its folder while it sweeps.
    kept = None if folder is None else Path(folder).absolute()
    states = [c if isinstance(c, Mapping) else Path(os.fsdecode(c)).absolute() for c in checkpoints]
    _check_states(model, states)
    _check_memory_apart(model, states, settings.get("params"))
    states = _apart_from(model, states)
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    before = copy.deepcopy(model.state_dict())
    results: list[LLCResult] = []
    previous: LLCResult | None = None
    shown = make_progress(progress, len(states), "LLC", unit="checkpoint")
    try:
        for k, checkpoint in enumerate(states):
            shown.title = f"LLC at {names[k]}"
            _load_into(model, checkpoint, k)

            def report(steps: int, total: int, llc: float, k: int = k) -> None:
                shown.update(k + steps / total, llc)

            def estimate(start: LLCResult | None, name: str) -> LLCResult:
                return estimate_llc(
                    model,
                    data,
                    loss_fn,
                    num_draws=num_draws,
                    num_burnin=burnin if start is None else -(-burnin // WARM_BURNIN),
                    warm_start=start,
                    keep_ends=warm,
                    checkpoint=None if kept is None else kept / f"{name}.npz",
                    progress=report if shown.is_shown else False,
                    **settings,
                )

            start = previous if warm else None
            try:
                result = estimate(start, f"{k:05d}")
                if start is not None and result.warnings and not result.is_partial:
                    start = None
                    result = estimate(None, f"{k:05d}-cold")
            except ValueError as error:
                raise ValueError(f"checkpoints[{k}] ({dim} {names[k]}): {error}") from error
            if result.is_partial:
                break
            result.diagnostics["is_warm"] = start is not None
            previous = result
            results.append(dataclasses.replace(result, ends=None))  # of one checkpoint at a time
    finally:
        shown.close()
        model.load_state_dict(before)
    return _dataset(results, names, dim)


def _dataset(results: list[LLCResult], names: list[Any], dim: str) -> xarray.Dataset:
    def column(value: Any) -> tuple[str, list[Any]]:
        return dim, [value(r) for r in results]

    per_chain = np.array([r.llc_per_chain for r in results])
    intervals = np.array([r.interval() for r in results]).reshape(-1, 2)
    found: xarray.Dataset = require("xarray", "xarray").Dataset(
        {
            "llc_mean": column(lambda r: r.llc_mean),
            "llc_stderr": column(lambda r: r.llc_stderr),
            "llc_low": (dim, intervals[:, 0]),
            "llc_high": (dim, intervals[:, 1]),
            "llc_per_chain": ((dim, "chain"), per_chain if results else np.empty((0, 0))),
            "init_loss": column(lambda r: r.init_loss),
            "nbeta": column(lambda r: r.nbeta),
            "lr": column(lambda r: r.settings["lr"]),
            "warnings": column(lambda r: "\n".join(r.warnings)),
            "warning_codes": column(lambda r: " ".join(w.code for w in r.warnings)),
            "is_warm": column(lambda r: r.diagnostics["is_warm"]),
            "gradients": column(lambda r: r.loss_trace.size + r.diagnostics.get("pilot_steps", 0)),
            "seconds": column(lambda r: r.settings["seconds"]),
            **{name: column(lambda r, name=name: _number(r.diagnostics.get(name))) for name in _DIAGNOSTICS},
        },
        coords={dim: names[: len(results)]},
        attrs={"partial": int(len(results) < len(names))},
    )
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# ---- what is given -----------------------------------------------------------------------------------------

_OURS = {"checkpoint": "pass folder instead", "warm_start": "warm=True does it", "keep_ends": "warm=True does it"}


def _checked(
    model: nn.Module, checkpoints: Any, labels: Sequence[Any] | None, dim: str, settings: Mapping[str, Any]
) -> list[Any]:
    """The labels, after a look at everything that is given."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, remedy in _OURS.items():
        if name in settings:
            raise TypeError(f"{name} is not for sweeps: {remedy}")
    if isinstance(checkpoints, (Mapping, str, os.PathLike)) or not isinstance(checkpoints, Sequence):
        raise TypeError(
            f"checkpoints must be a list of state dicts or of their files, got a {type(checkpoints).__name__}"
            + (": put it in a list" if isinstance(checkpoints, (Mapping, str, os.PathLike)) else "")
        )
    if not checkpoints:
        raise ValueError("checkpoints is empty: give one state dict at least")
    if labels is not None and len(labels) != len(checkpoints):
        raise ValueError(f"labels has {len(labels)} entries for {len(checkpoints)} checkpoints")
    if dim in (*_NAMES, *_DIAGNOSTICS):
        raise ValueError(f"dim={dim!r} is the name of something else in the data set: call it otherwise")
    if labels is not None and not all(isinstance(label, (str, numbers.Real, np.generic)) for label in labels):
        raise TypeError(f"labels must be numbers or strings, got {list(labels)!r:.80}")
    for k, checkpoint in enumerate(checkpoints):
        if isinstance(checkpoint, nn.Module):
            raise TypeError(
                f"checkpoints[{k}] must be a state dict or a file of one, got the module {type(checkpoint).__name__}: "
                "pass copy.deepcopy(module.state_dict()), taken when the module was what you want to keep"
            )
        if isinstance(checkpoint, Mapping):
            continue
        if not isinstance(checkpoint, (str, os.PathLike)):
            raise TypeError(f"checkpoints[{k}] must be a state dict or a file of one, got {type(checkpoint).__name__}")
        if not Path(os.fsdecode(checkpoint)).is_file():
            what = "is no file" if os.path.lexists(checkpoint) else "does not exist"
            raise FileNotFoundError(f"checkpoints[{k}]={os.fspath(checkpoint)!r} {what}")
    return list(range(len(checkpoints))) if labels is None else list(labels)


def _check_states(model: nn.Module, checkpoints: Sequence[Mapping[str, Any] | Path]) -> None:
    """Look at all state dicts before the first estimate, at those in files without reading their values.

    Raises:
        ValueError: one is not of this model; says what to pass instead where that can be told.
    """
    wanted = model.state_dict()
    for k, checkpoint in enumerate(checkpoints):
        state = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint, k, mapped=True)
        if wrong := _difference(state, wanted):
            said = f"checkpoints[{k}]" if isinstance(checkpoint, Mapping) else f"checkpoints[{k}]={str(checkpoint)!r}"
            raise ValueError(f"{said} is no state dict of this model: {wrong}{_remedy(state, wanted, checkpoint)}")


def _difference(state: Any, wanted: Mapping[str, Any]) -> str:
    """What is wrong with a state dict, in words; empty if it is the model's."""
    if not isinstance(state, Mapping):
        return f"it is of type {type(state).__name__}"
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]  # older torch had none
    if missing:
        return f"it has no {missing[0]!r}{_and_more(missing)}"
    if more := [n for n in state if n not in wanted]:
        return f"the model has no {more[0]!r}{_and_more(more)}"
    for name, theirs in state.items():
        ours = wanted[name]
        if isinstance(ours, Tensor) != isinstance(theirs, Tensor):
            return f"{name!r} is of type {type(theirs).__name__} there, {type(ours).__name__} in the model"
        if not isinstance(ours, Tensor):
            continue
        if ours.shape != theirs.shape:
            return f"{name!r} has shape {tuple(theirs.shape)} there, {tuple(ours.shape)} in the model"
        if _kind(ours) != _kind(theirs):
            return f"{name!r} has dtype {theirs.dtype} there, {ours.dtype} in the model"
    return ""


def _and_more(names: Sequence[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _kind(tensor: Tensor) -> str:
    """Kinds of numbers that can't be converted into each other; floating-point types can."""
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else str(tensor.dtype)


_WRAPPERS = {
    ("module",): "torch.nn.DataParallel or DistributedDataParallel",
    ("_orig_mod",): "torch.compile",
    ("module", "_orig_mod"): "DistributedDataParallel with torch.compile",
    ("_fsdp_wrapped_module",): "FSDP",
    ("model",): "a module that holds it",
    ("net",): "a module that holds it",
}
"""Parts of names that are added to those of a model, and by what."""


def _renamed(state: Mapping[Any, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The same without these parts of the names."""
    return {".".join(p for p in str(name).split(".") if p not in parts): t for name, t in state.items()}


def _remedy(state: Any, wanted: Mapping[str, Any], checkpoint: Mapping[str, Any] | Path) -> str:
    """What to pass instead, if that can be told."""
    if not isinstance(state, Mapping):
        return ". Pass a dictionary of tensors by name, such as model.state_dict()"
    source = "the dictionary" if isinstance(checkpoint, Mapping) else "torch.load(path)"
    entries: list[tuple[str, Any]] = [("", state)]
    entries += [(f"[{key!r}]", entry) for key, entry in state.items() if isinstance(entry, Mapping)]
    for place, entry in entries:
        if place and not _difference(entry, wanted):
            return f". Its entry {place[1:-1]} is one: pass {source}{place}"
        for parts, wrapper in _WRAPPERS.items():
            if not _difference(_renamed(entry, parts), wanted):
                stripped = "name" + "".join(f".replace('{part}.', '')" for part in parts)
                return (
                    f". The names have the part '{'.'.join(parts)}.' that {wrapper} adds: pass "
                    f"{{{stripped}: t for name, t in {source}{place}.items()}}"
                )
    for parts, wrapper in _WRAPPERS.items():
        if not _difference(state, _renamed(wanted, parts)):
            return (
                f". The model's names have the part '{'.'.join(parts)}.' that {wrapper} adds: pass the model inside it"
            )
    return ". Pass what model.state_dict() of the same architecture returned"


def _check_memory_apart(model: nn.Module, checkpoints: Sequence[Any], params: Any) -> None:
    """Refuse state dicts that share what is sampled: all of them hold the values of the last.

    ``model.state_dict()`` and its shallow copies hold the model's own tensors, which training goes on to change. What
    is not sampled may be the same in all checkpoints, and its memory too.

    Raises:
        ValueError: the values of two of them are in the same memory.
    """
    sampled, first = list(select(model, params)), dict[tuple[str, int, torch.device], int]()
    for k, checkpoint in enumerate(checkpoints):
        if not isinstance(checkpoint, Mapping):
            continue
        for name in sampled:
            place = _place(checkpoint.get(name))
            if place is None:
                continue
            other = first.setdefault((name, *place), k)
            if other != k:
                raise ValueError(
                    f"checkpoints[{other}] and checkpoints[{k}] share the memory of {name!r}, so that both hold the "
                    "values that were written last: model.state_dict() does not copy. Keep "
                    "copy.deepcopy(model.state_dict()) of each step, or save it to a file. If the parameter was frozen "
                    "in training, call requires_grad_(False) on it or leave it out of params="
                )


def _place(tensor: Any) -> tuple[int, torch.device] | None:
    """Where a tensor's values are; None if it has none, or not in one piece of memory."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a tensor of tensors
        return None
    return (address, tensor.device) if address else None


def _apart_from(model: nn.Module, checkpoints: Sequence[Mapping[str, Any] | Path]) -> list[Mapping[str, Any] | Path]:
    """The checkpoints; one in the model's own memory, which changes when another one is loaded, as a copy."""
    own = {_storage(t) for t in model.state_dict().values()} - {None}

    def is_live(checkpoint: Any) -> bool:
        return isinstance(checkpoint, Mapping) and any(_storage(t) in own for t in checkpoint.values())

    return [copy.deepcopy(c) if is_live(c) else c for c in checkpoints]


def _storage(tensor: Any) -> int | None:
    return None if _place(tensor) is None else int(tensor.untyped_storage().data_ptr())


def _read(path: Path, k: int, *, mapped: bool = False) -> Any:
    """What a file holds; with `mapped` its values stay in the file.

    Raises:
        ValueError: torch can't read it.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        if mapped:
            try:
                return torch.load(path, mmap=True, **options)
            except RuntimeError:  # a file of torch before 1.6, or none at all
                return torch.load(path, **options)
        return torch.load(path, **options)
    except Exception as error:  # of whatever kind torch raises for files that are none of its own
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"checkpoints[{k}]={str(path)!r} can't be read by torch.load(weights_only=True): {said[0]} Save "
            "model.state_dict() with torch.save"
        ) from error


def _load_into(model: nn.Module, checkpoint: Mapping[str, Any] | Path, k: int) -> None:
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint, k)
    try:
        model.load_state_dict(state)
    except Exception as error:  # of whatever kind: modules may load themselves
        raise ValueError(f"checkpoints[{k}] can't be loaded into the model: {error}") from error
