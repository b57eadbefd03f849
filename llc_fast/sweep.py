"""The local learning coefficient along a training run: one estimate for each of its checkpoints."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    import xarray
from llc_fast.behavioral import Behavioral
from llc_fast.checkpoint_files import by_step, checkpoints_in, expanded, is_pattern, matching
from llc_fast.data import mix
from llc_fast.estimate import estimate_llc
from llc_fast.language import NextToken
from llc_fast.objective.objective import LossFunction
from llc_fast.objective.selection import select
from llc_fast.progress import make_progress
from llc_fast.result import LLCResult, Warning
from llc_fast.settings import DEFAULT_NUM_DRAWS, LIMITS
from llc_fast.support.errors import add_note
from llc_fast.support.optional import require
from llc_fast.support.warned import issue, shown_otherwise
from llc_fast.weights import WeightReader, place_of

WARM_BURNIN = 4
"""A warm start burns in for the fourth part: the slow directions, which take longest, are where they belong."""
NOT_OF_THE_START = frozenset(
    {
        *("training-mode", "batch-statistics", "unused", "no-gradient", "writes-parameters", "unshuffled", "dropped"),
        *("num-samples", "irreproducible", "standing-still", "gradient", "checkpoint", "short", "ess", "imprecise"),
        *("init-loss", "no-minimum"),
    }
)
"""Codes of warnings that say nothing of where chains started: those about model, w*, data, length and precision."""
MAX_REJECTED = 2
"""Warm estimates made again, one after another, after which a sweep goes on from w*: where the chains of one checkpoint
are of no use to the next, trying costs more than half of an estimate each time."""
SCALE_EFFECT = 0.05
"""Change of λ̂ by γ alone, relative to the largest λ̂, above which checkpoints are not compared at one scale."""
_NAMES = (
    *("chain", "llc_mean", "llc_stderr", "llc_low", "llc_high", "llc_per_chain", "init_loss", "nbeta", "lr"),
    *("localization", "warnings", "warning_codes", "is_warm", "gradients", "seconds"),
)
_DIAGNOSTICS = ("r_hat", "ess_bulk", "ess_tail", "trend", "bias_share", "distance_over_reference", "init_loss_stderr")

Source = Mapping[str, Any] | str | os.PathLike[str]
"""A checkpoint: a state dict, or where one is."""


def sweep_checkpoints(
    model: nn.Module,
    checkpoints: Iterable[Source] | str | os.PathLike[str],
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | str | None,
    *,
    labels: Sequence[Any] | None = None,
    dim: str = "checkpoint",
    warm: bool = True,
    num_draws: int | None = None,
    num_burnin: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    entry: str | None = None,
    weights_only: bool = True,
    progress: bool = True,
    **settings: Any,
) -> xarray.Dataset:
    """Estimate λ at each of a model's checkpoints, as :func:`llc_fast.estimate_llc` does.

    Step sizes are chosen anew at every checkpoint, as curvature changes by orders of magnitude in training; pass ``lr``
    to fix it. With `warm`, the chains of a checkpoint start where those of the one before ended, moved by as much as w*
    has moved between them (``estimate_llc(warm_start=…)``). They are chains of their own checkpoint, only better
    begun, so that a quarter of the burn-in will do, with random numbers of their own. Where training has learned
    something in between, they may be worse begun: far from where that holds. So a checkpoint is estimated again from
    w* if its warm chains give rise to a warning that their start may have caused, and that the last estimate from w*
    did not have; the second estimate is kept, with its own warnings. After two of these, one after another, all others
    start at w*. Chains that are all led astray together are not noticed; where a jump between checkpoints is what you
    look for, pass ``warm=False``. The model is as it was whenever a checkpoint is asked for, and at the end.

    Ctrl-C ends the sweep after the present step; the checkpoints that were finished are returned, with the attribute
    ``partial``. An error on the way is raised, and has them as its attribute ``finished``.

    Args:
        model: a model that the checkpoints belong to, in the mode to be evaluated in.
        checkpoints: a list of state dicts, of files and folders with weights (``torch.save``, safetensors, Lightning,
            Hugging Face, ``torch.distributed.checkpoint``, …); or an iterator of these, which is asked for
            the next one when it is needed; or a pattern such as ``"runs/checkpoint-*"``, or a folder of files or
            folders whose names say their step, such as ``checkpoint-500``: they are taken in the order of their steps.
            :class:`llc_fast.weights.WeightReader` says which formats and names are understood.
        data, loss_fn: as for :func:`llc_fast.estimate_llc`. With ``"behavioral"`` each checkpoint's own outputs are its
            targets.
        labels: what the checkpoints are called along `dim`, training steps, say; None: 0, 1, 2, …, or the steps that
            the names in a folder or of a pattern say.
        dim: name of the dimension.
        warm: whether chains start where those of the checkpoint before ended. Saves time if most estimates are sound.
        num_draws: losses of each chain that enter λ̂. None: 2000, or as many as are needed if `target_error`,
            `max_seconds` or `max_gradients` is given; a length by need is half burn-in, warm or not.
        num_burnin: steps before the first draw, of chains that start at w*; None: as many as draws.
        folder: keeps every finished estimate, and the one under way: the same call goes on from there. It is made if
            need be.
        entry: which weights are meant where a checkpoint has several that fit, those of an average beside those
            trained, say: the key of its entry, ``"state_dict_ema"``, or what its names begin with, ``"teacher"``.
        weights_only: False: run the code that files of Python objects bring, ``torch.load(weights_only=False)``.
        progress: show progress with λ̂ so far: a bar on a terminal or in a notebook, a line each 10 % in a log.
        settings: further arguments of :func:`llc_fast.estimate_llc`.

    Returns:
        A dataset over `dim`: ``llc_mean``, ``llc_stderr``, ``llc_low`` and ``llc_high`` (the 95 % interval),
        ``llc_per_chain`` (and ``chain``), ``init_loss``, ``nbeta``, ``lr``, ``localization`` (γ, which is chosen for
        each checkpoint unless it is given), ``warnings`` (one string, a line each) and ``warning_codes`` (separated by
        spaces), ``is_warm``, ``gradients`` (pilots included), ``seconds``, and of the diagnostics ``r_hat``,
        ``ess_bulk``, ``ess_tail``, ``trend``, ``bias_share``, ``distance_over_reference`` and ``init_loss_stderr``; NaN
        where there is none. ``Dataset.to_netcdf`` and ``to_zarr`` write it. For each code of a warning a
        :class:`llc_fast.LLCWarning` is issued that says which checkpoints have it, and one of the code ``"scale"``
        where γ differs so much between them that this alone changes λ̂.

    Raises:
        TypeError, ValueError: as :func:`llc_fast.estimate_llc`; checkpoints that are no weights of this model, or fit
            it in more than one way, or are not as many as labels, or that share the memory of what is sampled
            (``model.state_dict()`` does not copy). All of them are looked at before the first estimate, but those of
            an iterator. An error names its checkpoint, ``checkpoints[3]``.
        FileNotFoundError: a checkpoint's file, a part of it, or a pattern matches nothing.
        KeyboardInterrupt: Ctrl-C before there was anything to return.
        ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``), or safetensors.
    """
    require("xarray", "xarray")  # before the work
    reader = WeightReader(_a_module(model), entry=entry, weights_only=weights_only)
    given = _gathered(checkpoints, labels, dim, settings)
    by_need = num_draws is None and num_burnin is None and any(settings.get(name) is not None for name in LIMITS)
    draws = DEFAULT_NUM_DRAWS if num_draws is None else num_draws
    burnin = draws if num_burnin is None else num_burnin
    # Absolute: the program may change its folder while it sweeps.
    kept = None if folder is None else Path(folder).absolute()
    if given.sources is not None:
        _check_states(model, given, reader, settings.get("params"))
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    results: list[LLCResult] = []
    names: list[Any] = []
    is_stopped = False
    previous: LLCResult | None = None
    expected: frozenset[str] = frozenset()
    rejected = 0
    shown = make_progress(progress, given.count, "LLC", unit="checkpoint")

    def estimate(k: int, start: LLCResult | None, name: str) -> LLCResult:
        def report(steps: int, total: int, llc: float) -> None:
            shown.update(k + steps / total, llc)

        # With the noise that led them to their start, slow directions would add it up from checkpoint to checkpoint.
        seed = settings.get("seed", 0) if start is None else mix(int(settings.get("seed", 0)), k)
        with shown_otherwise():
            return estimate_llc(
                model,
                data,
                loss_fn,
                num_draws=None if by_need else draws,
                num_burnin=None if by_need else burnin if start is None else -(-burnin // WARM_BURNIN),
                warm_start=start,
                keep_ends=warm and rejected < MAX_REJECTED,
                checkpoint=None if kept is None else kept / f"{name}.npz",
                progress=report if shown.is_shown else False,
                **settings | {"seed": seed},
            )

    try:
        with shown:
            for k, name, source in given:
                shown.title = f"LLC at {name}"
                with _as_it_was(model):
                    _load_into(model, reader, source, given.said(k))
                    del source  # one of an iterator's at a time
                    start = previous if warm and rejected < MAX_REJECTED else None
                    at = f"checkpoints[{k}] ({dim} {name})"
                    try:
                        result = estimate(k, start, f"{k:05d}")
                        codes = frozenset(w.code for w in result.warnings)
                        if start is not None and not result.is_partial:
                            if codes - expected - NOT_OF_THE_START:
                                start, rejected = None, rejected + 1
                                result = estimate(k, None, f"{k:05d}-cold")
                                codes = frozenset(w.code for w in result.warnings)
                            else:
                                rejected = 0
                    except ValueError as error:
                        raise ValueError(f"{at}: {error}") from error
                    except Exception as error:  # the user's own code, or torch's: raised as it is
                        add_note(error, f"This was at {at}.")
                        raise
                if result.is_partial:
                    is_stopped = True
                    break
                if start is None:
                    expected = codes
                result.diagnostics["is_warm"] = start is not None
                previous = result
                results.append(dataclasses.replace(result, ends=None))  # of one checkpoint at a time
                names.append(name)
    except KeyboardInterrupt:
        if not results:
            raise
        is_stopped = True
    except Exception as error:
        if results:
            error.finished = dataset_of(results, names, dim, True)  # type: ignore[attr-defined]
            kept_too = "" if kept is None else f" They are kept in {str(kept)!r} too: the same call goes on from there."
            add_note(
                error,
                f"The {len(results)} estimates before it are in the attribute `finished` of this error.{kept_too}",
            )
        raise
    found = dataset_of(results, names, dim, is_stopped)
    issue(_in_all(results, names, dim), stacklevel=2)
    return found


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the values that it had: an iterator may be training it between two checkpoints."""
    before = copy.deepcopy(model.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(before)


def _in_all(results: Sequence[LLCResult], names: Sequence[Any], dim: str) -> list[Warning]:
    """A sentence for each code: which checkpoints have it, and what is said of the first."""
    having: dict[str, list[tuple[Any, str]]] = {}
    for name, result in zip(names, results, strict=True):
        for warning in result.warnings:
            having.setdefault(warning.code, []).append((name, warning))
    sentences = []
    for code, found in having.items():
        which = ", ".join(str(name) for name, _ in found[:10]) + ", …" * (len(found) > 10)
        said = f"{len(found)} of {len(results)} estimates have the warning {code!r} ({dim} {which})."
        sentences.append(Warning(f"{said} The first says: {found[0][1]}", code))
    return sentences + scale_warnings(results)


def scale_warnings(results: Sequence[LLCResult]) -> list[Warning]:
    """A sentence, if λ̂ is at another scale at each checkpoint, and that alone makes a difference."""
    gammas = [result.settings["localization"] for result in results if result.settings["localization"] > 0]
    if len(gammas) < 2:
        return []
    slopes = [abs(_number(result.diagnostics.get("localization_slope"))) for result in results]
    effect = max(filter(math.isfinite, slopes), default=0.0) * math.log(max(gammas) / min(gammas))
    if not effect > SCALE_EFFECT * max((abs(r.llc_mean) for r in results if math.isfinite(r.llc_mean)), default=0.0):
        return []
    middle = math.sqrt(max(gammas) * min(gammas))
    return [
        Warning(
            f"γ was chosen for each checkpoint, from {min(gammas):.3g} to {max(gammas):.3g}, which alone may change λ̂ "
            f"by {effect:.2g} along the sweep: λ̂ is not at one scale. Use localization={middle:.3g} for all.",
            "scale",
        )
    ]


def dataset_of(results: list[LLCResult], names: list[Any], dim: str, is_partial: bool) -> xarray.Dataset:
    """The results of a training run over `dim`, as :func:`sweep_checkpoints` returns them."""

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
            "localization": column(lambda r: r.settings["localization"]),
            "warnings": column(lambda r: "\n".join(r.warnings)),
            "warning_codes": column(lambda r: " ".join(w.code for w in r.warnings)),
            "is_warm": column(lambda r: r.diagnostics["is_warm"]),
            "gradients": column(_gradients),
            "seconds": column(lambda r: r.settings["seconds"]),
            **{name: column(lambda r, name=name: _number(r.diagnostics.get(name))) for name in _DIAGNOSTICS},
        },
        coords={dim: names},
        attrs={"partial": int(is_partial)},
    )
    return found


def _gradients(result: LLCResult) -> int:
    beside = (result.diagnostics.get(name, 0) for name in ("pilot_steps", "refine_gradients", "metric_gradients"))
    return int(result.loss_trace.size + sum(beside))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# ---- what is given -----------------------------------------------------------------------------------------

_OURS = {"checkpoint": "pass folder instead", "warm_start": "warm=True does it", "keep_ends": "warm=True does it"}


@dataclass(frozen=True)
class _Given:
    """The checkpoints that were given.

    Attributes:
        sources: all of them; None: they come from `iterator`.
        iterator: gives them one at a time.
        labels: what they are called; None: as they are numbered.
        dim: what the labels are.
    """

    sources: list[Any] | None
    iterator: Iterator[Any]
    labels: Sequence[Any] | None
    dim: str

    @property
    def count(self) -> int | None:
        """How many there are, if anybody knows."""
        known = self.labels if self.sources is None else self.sources
        return None if known is None else len(known)

    def said(self, k: int) -> str:
        """What one is called in an error, without what it is."""
        label = f" ({self.dim} {self.labels[k]})" if self.labels is not None and k < len(self.labels) else ""
        return f"checkpoints[{k}]{label}"

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        """Number, name and source of each; nothing is kept of one when the next is asked for."""
        k = 0
        while (source := next(self.iterator, _END)) is not _END:
            if self.labels is not None and k >= len(self.labels):
                self._complain("there are more checkpoints, which were left out")
                return
            if self.sources is None:
                source = _checked(source, self.said(k))
            name = k if self.labels is None else self.labels[k]
            held = [source]
            del source
            yield k, name, held.pop()
            k += 1
        if self.labels is not None and k < len(self.labels):
            self._complain(f"there were {k} checkpoints")

    def _complain(self, what: str) -> None:
        """Of an iterator that gives more or less than was said: an error would lose what was estimated."""
        warnings.warn(f"labels has {len(self.labels or ())} entries, but {what}", UserWarning, stacklevel=3)


_END = object()


def _a_module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _gathered(checkpoints: Any, labels: Sequence[Any] | None, dim: str, settings: Mapping[str, Any]) -> _Given:
    """What is given, after a look at everything but the state dicts themselves."""
    for name, remedy in _OURS.items():
        if name in settings:
            raise TypeError(f"{name} is not for sweeps: {remedy}")
    if dim in (*_NAMES, *_DIAGNOSTICS):
        raise ValueError(f"dim={dim!r} is the name of something else in the data set: call it otherwise")
    if isinstance(checkpoints, (str, os.PathLike)):
        found = None
        if is_pattern(pattern := os.fsdecode(checkpoints)):
            found = by_step(matching(pattern), f"checkpoints={pattern!r}")
        elif (path := expanded(checkpoints)).is_dir():
            found = checkpoints_in(path)
        if found is not None:
            checkpoints = [source for _, source in found]
            labels = [step for step, _ in found] if labels is None else labels
    if isinstance(checkpoints, (Mapping, str, os.PathLike)) or not isinstance(checkpoints, Iterable):
        raise TypeError(
            f"checkpoints must be a list of state dicts or of their files, got a {type(checkpoints).__name__}"
            + (": put it in a list" if isinstance(checkpoints, (Mapping, str, os.PathLike)) else "")
        )
    if isinstance(checkpoints, (nn.Module, Tensor)):
        raise TypeError(
            f"checkpoints must be a list of state dicts or of their files, got a {type(checkpoints).__name__}"
        )
    if labels is not None:
        labels = list(labels)
        if not all(isinstance(label, (str, numbers.Real, np.generic)) for label in labels):
            raise TypeError(f"labels must be numbers or strings, got {labels!r:.80}")
    if isinstance(checkpoints, (ValuesView, np.ndarray)):  # all are there, and can be looked at first
        checkpoints = list(checkpoints)
    if not isinstance(checkpoints, Sequence):
        return _Given(None, iter(checkpoints), labels, dim)
    if not checkpoints:
        raise ValueError("checkpoints is empty: give one state dict at least")
    if labels is not None and len(labels) != len(checkpoints):
        raise ValueError(f"labels has {len(labels)} entries for {len(checkpoints)} checkpoints")
    given = _Given([], iter(()), labels, dim)
    sources = [_checked(checkpoint, given.said(k)) for k, checkpoint in enumerate(checkpoints)]
    return _Given(sources, iter(sources), labels, dim)


def _checked(checkpoint: Any, said: str) -> Mapping[str, Any] | Path:
    """A state dict, or the absolute path of a file or a folder."""
    if isinstance(checkpoint, nn.Module):
        raise TypeError(
            f"{said} must be a state dict or a file of one, got the module {type(checkpoint).__name__}: "
            "pass copy.deepcopy(module.state_dict()), taken when the module was what you want to keep"
        )
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"{said} must be a state dict or a file of one, got {type(checkpoint).__name__}")
    path = expanded(checkpoint).absolute()
    if not (path.is_file() or path.is_dir()):
        what = "is no file" if os.path.lexists(checkpoint) else "does not exist"
        raise FileNotFoundError(f"{said}={os.fspath(checkpoint)!r} {what}")
    return path


def _with_path(said: str, source: Mapping[str, Any] | Path) -> str:
    return said if isinstance(source, Mapping) else f"{said}={str(source)!r}"


def _check_states(model: nn.Module, given: _Given, reader: WeightReader, params: Any) -> None:
    """Look at all state dicts before the first estimate, at those in files without reading their values.

    ``model.state_dict()`` and its shallow copies hold the model's own tensors, which training goes on to change: state
    dicts that share what is sampled all hold the values of the last. What is not sampled may be the same in all
    checkpoints, and its memory too.

    Raises:
        ValueError: one is not of this model, or the values of two of them are in the same memory.
    """
    sampled, first = list(select(model, params)), dict[tuple[Any, ...], int]()
    for k, source in enumerate(given.sources or ()):
        if not isinstance(source, Mapping):
            reader.check(source, _with_path(given.said(k), source))
            continue
        state = reader.read(source, given.said(k))
        for name in sampled:
            place = place_of(state.get(name))
            if place is None:
                continue
            other = first.setdefault((name, *place[:2]), k)
            if other != k:
                raise ValueError(
                    f"checkpoints[{other}] and checkpoints[{k}] share the memory of {name!r}, so that both hold the "
                    "values that were written last: model.state_dict() does not copy. Keep "
                    "copy.deepcopy(model.state_dict()) of each step, or save it to a file. If the parameter was frozen "
                    "in training, call requires_grad_(False) on it or leave it out of params="
                )


def _load_into(model: nn.Module, reader: WeightReader, source: Mapping[str, Any] | Path, said: str) -> None:
    state = reader.read(source, _with_path(said, source))
    try:
        model.load_state_dict(state)
    except Exception as error:  # of whatever kind: modules may load themselves
        raise ValueError(f"{said} can't be loaded into the model: {error}") from error
