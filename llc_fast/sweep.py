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
from torch import nn

if TYPE_CHECKING:
    import xarray
from llc_fast.estimate import estimate_llc
from llc_fast.objective.objective import LossFunction
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
            not as many as labels.
        FileNotFoundError: a checkpoint's file.
        ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
    """
    require("xarray", "xarray")  # before the work
    names = _checked(model, checkpoints, labels, dim, settings)
    checkpoints = _apart_from(model, checkpoints)
    burnin = num_draws if num_burnin is None else num_burnin
    kept = None if folder is None else Path(folder)
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    before = copy.deepcopy(model.state_dict())
    results: list[LLCResult] = []
    previous: LLCResult | None = None
    shown = make_progress(progress, len(checkpoints), "LLC", unit="checkpoint")
    try:
        for k, checkpoint in enumerate(checkpoints):
            shown.title = f"LLC at {names[k]}"
            model.load_state_dict(_loaded(checkpoint, k))

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
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    for k, checkpoint in enumerate(checkpoints):
        if isinstance(checkpoint, Mapping):
            given = {name: tuple(t.shape) for name, t in checkpoint.items() if isinstance(t, torch.Tensor)}
            wrong = next((n for n in {**wanted, **given} if wanted.get(n) != given.get(n)), None)
            if wrong is not None:
                raise ValueError(
                    f"checkpoints[{k}] is no state dict of this model: {wrong!r} has shape {given.get(wrong)} there, "
                    f"{wanted.get(wrong)} in the model"
                )
        elif not isinstance(checkpoint, (str, os.PathLike)):
            raise TypeError(f"checkpoints[{k}] must be a state dict or a file of one, got {type(checkpoint).__name__}")
        elif not Path(checkpoint).is_file():
            raise FileNotFoundError(f"checkpoints[{k}]={os.fspath(checkpoint)!r} does not exist")
    return list(range(len(checkpoints))) if labels is None else list(labels)


def _apart_from(model: nn.Module, checkpoints: Sequence[Any]) -> list[Any]:
    """The checkpoints; ``model.state_dict()`` itself, which changes when another one is loaded, as a copy."""
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values() if isinstance(t, torch.Tensor)}

    def is_live(checkpoint: Any) -> bool:
        tensors = checkpoint.values() if isinstance(checkpoint, Mapping) else ()
        return any(isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in own for t in tensors)

    return [copy.deepcopy(c) if is_live(c) else c for c in checkpoints]


def _loaded(checkpoint: Mapping[str, Any] | str | os.PathLike[str], k: int) -> Mapping[str, Any]:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    try:
        loaded: Mapping[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind torch raises for files that are none of its own
        raise ValueError(
            f"checkpoints[{k}]={os.fspath(checkpoint)!r} can't be read by torch.load(weights_only=True): {error}"
        ) from error
    return loaded
