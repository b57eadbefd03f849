"""Samples: losses of probes at every draw of every chain, in a store on disk or in memory, and what follows of them.

The store is laid out as devinterp 2.0.1's, with our own arrays beside it, so that each can read the other's. Arrays:

=========================  =========================================================================================
init_loss                  L(w*), float32 ``[chain, token_pos]``; ``[chain]`` where nothing has tokens
loss_{probe}               losses at the draws, ``[chain, draw, batch_{probe}, token_pos]``, or without ``token_pos``
input_ids_{probe}          tokens of a probe, int64 ``[batch_{probe}, token]``, if it has tokens
init_loss_{probe}          losses at w*, float32 ``[batch_{probe}, token_pos]``, or without ``token_pos``
token_mask_{probe}         which tokens are predicted, bool ``[batch_{probe}, token_pos]``, if not all are
draw_loss                  the loss that enters λ̂ of each draw, float64 ``[chain, draw]``
draws_done                 draws that are whole, int64 ``[chain]``
sketch                     a count sketch of w − w* at the draws, float32 ``[chain, draw, sketch_dim]``, if asked for
sampling_loss_micro        the loss of every step, ``[chain, step, batch_sampling, token_pos]``: ours has one sample,
                           and the mean over tokens in the first of them, NaN in the others
``llc_loss_trace``, …      the :class:`llc_fast.LLCResult` of the run
=========================  =========================================================================================

A probe whose samples have another length than those of the first has dimensions ``token_pos_{probe}`` and
``token_{probe}`` of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

import llc_fast
from llc_fast.checks import Facts, examine
from llc_fast.influence import ITEM_PER, DrawPCA, ItemPer, Items, SampleInfluence, Weighted
from llc_fast.result import Diagnostics, LLCResult, Warning
from llc_fast.schedule import Schedule
from llc_fast.stats.influence import KINDS, MIN_BLOCKS, Draws, FlatDraws, Influence, Kind, influence
from llc_fast.stats.projection import pca
from llc_fast.stats.step_checks import COLUMNS
from llc_fast.store import COMPLETED, DRAWS_DONE, SampleStore, Variable, read_attributes
from llc_fast.support.files import plain
from llc_fast.support.optional import require
from llc_fast.support.warned import issue

if TYPE_CHECKING:
    import xarray

Per = Literal["sample", "token"]
ProbePart = str | tuple[str, Any]
"""A probe's name, or its name and which of its samples: numbers, a mask or a slice."""

FORMAT = 1
BLOCK_BYTES = 32 * 2**20
"""What a block of losses holds at most, unless one sample is larger."""
OURS = "llc_fast"
"""The attribute that has all that devinterp does not know."""
_RESULT = "llc_loss_trace"
_SAMPLERS = {"sgld": "sgmcmc_sgld", "rmsprop-sgld": "rmsprop_sgld"}
"""Ours by devinterp's names."""
_MICRO = "sampling_loss_micro"
SKETCH = "sketch"
_OF_ONE_CALL = frozenset(
    {
        *("seconds", "seconds_of_data", "seconds_of_setup", "resumed_steps", "workers", "chains_per_group"),
        *("strategy_reason", "pilot_steps", "pilot_bias_share"),
    }
)
"""What a result says of the call that made it, not of the chains; a store has the same bytes whatever calls made it."""


@dataclass(frozen=True)
class Probe:
    """Data whose losses are taken at every draw.

    Attributes:
        name: of the user's.
        num_samples: of it.
        num_tokens: predicted positions of a sample, one fewer than its tokens; None: losses are per sample.
        tokens_per_sample: the mean number of tokens that are predicted, if not all are: a sample's loss is the sum over
            its tokens over this; None: `num_tokens`.
    """

    name: str
    num_samples: int
    num_tokens: int | None = None
    tokens_per_sample: float | None = None

    @property
    def id(self) -> str:
        """Its name in the names of variables, as devinterp makes it."""
        found = "".join(c if c.isalnum() or c == "_" else "_" for c in self.name)
        return f"_{found}" if not found or found[0].isdigit() else found


# ---- the layout of a store -----------------------------------------------------------------------------------


def layout(probes: Sequence[Probe], *, num_chains: int, num_draws: int, dtype: str = "float32") -> list[Variable]:
    """The arrays of a run's store, for :meth:`llc_fast.store.SampleStore.create`.

    What is fixed (``init_loss``, and ``input_ids_…``, ``init_loss_…`` and ``token_mask_…`` of each probe) is to be
    written once, ``draw_loss`` and ``loss_…`` at every draw, and the result at the end, by :func:`save_result`.

    Args:
        probes: with different names; tokens are those of the first probe that has any, for devinterp.
        num_chains, num_draws: of the run.
        dtype: of the losses of probes, ``"float32"`` or ``"float16"``. devinterp's correlations refuse the second.

    Raises:
        ValueError: two probes have names that become the same.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
    seen: dict[str, str] = {}
    for probe in probes:
        if probe.id in seen:
            raise ValueError(
                f"probes {seen[probe.id]!r} and {probe.name!r} would both be called {probe.id!r} in the store: rename "
                "one"
            )
        seen[probe.id] = probe.name
    length = _common_length(probes)
    tail = () if length is None else (("token_pos", length),)
    found = [
        _variable("init_loss", (("chain", num_chains), *tail), "float32"),
        _variable("draw_loss", (("chain", num_chains), ("draw", num_draws)), "float64", per_draw=True),
    ]
    for probe in probes:
        batch = (f"batch_{probe.id}", probe.num_samples)
        own = "" if probe.num_tokens == length else f"_{probe.id}"
        positions = () if probe.num_tokens is None else ((f"token_pos{own}", probe.num_tokens),)
        lead = (("chain", num_chains), ("draw", num_draws))
        found.append(_variable(f"loss_{probe.id}", (*lead, batch, *positions), dtype, per_draw=True))
        found.append(_variable(f"init_loss_{probe.id}", (batch, *positions), "float32"))
        if probe.num_tokens is not None:
            found.append(_variable(f"input_ids_{probe.id}", (batch, (f"token{own}", probe.num_tokens + 1)), "int64"))
        if probe.tokens_per_sample is not None:
            found.append(_variable(f"token_mask_{probe.id}", (batch, *positions), "bool"))
    return found


def _variable(name: str, dims: tuple[tuple[str, int], ...], dtype: str, *, per_draw: bool = False) -> Variable:
    return Variable(name, tuple(dim for dim, _ in dims), tuple(size for _, size in dims), dtype, per_draw)


def _common_length(probes: Sequence[Probe]) -> int | None:
    return next((probe.num_tokens for probe in probes if probe.num_tokens is not None), None)


def attributes(
    probes: Sequence[Probe],
    *,
    nbeta: float,
    init_loss: float,
    schedule: Schedule,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The attributes of a run's store: devinterp's ``metadata.config``, and ours under ``llc_fast``.

    They name the run: a store with others is refused (:meth:`llc_fast.store.SampleStore.create`), so nothing of the
    call that makes them belongs here.

    Args:
        probes: as :func:`layout` takes them.
        nbeta: nβ.
        init_loss: L(w*).
        schedule: which steps are draws.
        settings: as :attr:`llc_fast.LLCResult.settings` has them: ``lr``, ``localization``, ``num_chains`` and more.
        identity: of model, data and loss, such as fingerprints.
    """
    known = {name: value for name, value in settings.items() if name not in _OF_ONE_CALL}
    sampler = str(known.get("sampler", "sgld"))
    ids = [{"id": p.id, **vars(p)} for p in probes]
    config = {
        "sampler": {
            "lr": known.get("lr"),
            "n_beta": nbeta,
            "batch_size": known.get("batch_size"),
            "num_chains": known.get("num_chains"),
            "num_draws": schedule.num_draws,
            "num_burnin_steps": schedule.num_burnin,
            "num_steps_bw_draws": schedule.num_steps_bw_draws,
            "gradient_accumulation_steps": 1,
            "num_init_loss_batches": None,
            "init_seed": known.get("seed"),
            "localization": known.get("localization"),
            "noise_level": known.get("noise_level", 1.0),
            "llc_weight_decay": known.get("weight_decay", 0.0),
            "bounding_box_size": known.get("bounding_box_size"),
            "sampling_method": _SAMPLERS.get(sampler, sampler),
            "sampling_method_kwargs": {},
            "init_noise": None,
            "save_metrics": False,
            "shuffle": True,
            "epoch_mode": "cycle",
            "match_sampling_input_ids_across_chains": False,
            "scheduler_type": "constant",
            "scheduler_kwargs": None,
            "cores": 1,
            "online": False,
        },
        "observables": [
            {"type": "ObserveDifferentDataset", "obs_id": probe.id, "batches_per_draw": 1} for probe in probes
        ],
        "shared_observable_dims": ["token", "token_pos"],
        "tokenizer_context_length": (_common_length(probes) or 0) + 1,
    }
    ours = {
        "format": FORMAT,
        "version": llc_fast.__version__,
        "nbeta": nbeta,
        "init_loss": init_loss,
        "schedule": vars(schedule),
        "probes": ids,
        "settings": known,
        "identity": dict(identity or {}),
    }
    found: dict[str, Any] = plain({"metadata": {"config": config}, OURS: ours})
    return found


def save_result(store: SampleStore, result: LLCResult) -> None:
    """Write a run's result beside its draws, so that :meth:`Samples.llc` gives it back; the first process does it.

    Whatever belongs to one call, such as seconds, is left out: the store has the same bytes whatever calls made it.

    Raises:
        TypeError: something in it is no JSON.
        OSError: it can't be written.
    """
    steps, names = result.loss_trace.shape[1], {"trace": {}, "observable": {}, "end": {}}  # type: ignore[var-annotated]
    num_draws = next((v.shape[1] for v in store.variables.values() if v.dims[1:2] == ("draw",)), None)
    for kind, group in (("trace", result.traces), ("observable", result.observables), ("end", result.ends or {})):
        for name, values in group.items():
            array = f"llc_{kind}_{_encoded(name)}"
            names[kind][name] = array
            own = [f"{array}_{k}" for k in range(values.ndim)]
            if kind == "trace":
                own[1] = "step"
            elif kind == "observable" and values.shape[1] == num_draws:
                own[1] = "draw"
            store.add(array, ("chain", *own[1:]), values)
    meta = {
        "init_loss": result.init_loss,
        "nbeta": result.nbeta,
        "schedule": vars(result.schedule),
        "settings": {k: v for k, v in result.settings.items() if k not in _OF_ONE_CALL},
        "warnings": [[w, w.code] for w in result.warnings],
        "diagnostics": {k: v for k, v in result.diagnostics.items() if k not in _OF_ONE_CALL},
        "steps_done": result.steps_done,
        "has_ends": result.ends is not None,
        "names": names,
    }
    reference = store.variables.get("init_loss")
    if reference is not None and len(reference.shape) == 2:
        # The means that devinterp's compute_llc takes leave out NaN, and chunks of NaN take no place on disk.
        values = result.loss_trace[:, :, None, None].astype(np.float32)
        shape = (*values.shape[:3], reference.shape[1])
        dims = ("chain", "step", "batch_sampling", reference.dims[1])
        store.add(_MICRO, dims, values, shape=shape, chunks=(1, max(1, min(50, steps)), 1, 1))
    # Last: whoever finds it finds all of it. JSON as text, since Zarr's attributes have no NaN.
    store.add(_RESULT, ("chain", "step"), result.loss_trace, {"result": json.dumps(meta, sort_keys=True)})


def _encoded(name: str) -> str:
    return re.sub(r"[^\w.-]", lambda found: f"%{ord(found[0]):x};", name, flags=re.ASCII)


# ---- reading ---------------------------------------------------------------------------------------------------


class Samples:
    """What :func:`llc_fast.sample` leaves behind: losses of probes at every draw, and λ̂.

    Nothing is read before it is used. ``str(samples)`` says what there is.

    Attributes:
        dataset: all arrays, lazily (``xarray.Dataset``); see :mod:`llc_fast.samples` for their names.
        path: of the store; None: in memory.
        probes: names of the probes.
        settings: what the run was made with.
        draws_done: draws that each chain has made.
        is_partial: whether the run was interrupted, or goes on; losses of draws that are not made are NaN.
    """

    def __init__(self, dataset: xarray.Dataset, path: Path | None = None, result: LLCResult | None = None) -> None:
        """From the arrays of a store; use :meth:`open`, or :meth:`of` while the store is written."""
        self.dataset, self.path, self._result, self._has_warned = dataset, path, result, False
        ours = dataset.attrs.get(OURS)
        self._ours: dict[str, Any] = ours if isinstance(ours, dict) else {}
        config = dataset.attrs.get("metadata", {}).get("config", {})
        self._sampler: dict[str, Any] = config.get("sampler", {})
        ids = [str(name).removeprefix("loss_") for name in dataset.data_vars if str(name).startswith("loss_")]
        said = {entry["id"]: entry["name"] for entry in self._ours.get("probes", [])}
        self._ids = {said.get(found, found): found for found in sorted(ids, key=_order(list(said), ids))}
        self.probes = tuple(self._ids)
        self.is_partial = dataset.attrs.get(COMPLETED) != 1
        self.settings: dict[str, Any] = dict(self._ours.get("settings", self._sampler))
        self.draws_done = self._count_draws()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Samples:
        """The samples of a store that :func:`llc_fast.sample` wrote, or devinterp 2's ``sample``.

        Raises:
            ModuleNotFoundError: zarr or xarray is not installed (``pip install "llc_fast[samples]"``).
            FileNotFoundError: there is nothing at `path`.
            ValueError: it is no such store, or one of a later version; an interrupted one opens (:attr:`is_partial`).
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be that of a store, got {type(path).__name__}")
        place = Path(os.fsdecode(path)).absolute()
        found = read_attributes(place, "path")
        ours = found.get(OURS)
        if isinstance(ours, dict) and ours.get("format") != FORMAT:
            raise ValueError(
                f"path={str(place)!r} was written by llc_fast {ours.get('version')}, in a format that this version "
                f"({llc_fast.__version__}) does not know: read it with that one"
            )
        try:
            is_theirs = "n_beta" in found["metadata"]["config"]["sampler"]
        except (KeyError, TypeError):
            is_theirs = False
        if not is_theirs:
            raise ValueError(
                f"path={str(place)!r} is a Zarr store, but not of samples: give one that llc_fast.sample(store=…) or "
                "devinterp 2 wrote"
            )
        return cls(_opened(str(place), f"path={str(place)!r}"), place)

    @classmethod
    def of(cls, store: SampleStore, result: LLCResult | None = None) -> Samples:
        """Those of a store that this process has written, synced or closed, with the result of the run."""
        return cls(_opened(store.arrays, f"store={str(store.path)!r}"), store.path, result)

    def close(self) -> None:
        """Close the files; what has been read stays."""
        self.dataset.close()

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what there is ----------------------------------------------------------------------------------------

    @property
    def nbeta(self) -> float:
        """nβ."""
        return float(self._ours["nbeta"] if "nbeta" in self._ours else self._sampler["n_beta"])

    @property
    def init_loss(self) -> float:
        """L(w*)."""
        found = self._ours.get("init_loss")
        return float(self.dataset["init_loss"].values.mean(dtype=np.float64) if found is None else found)

    @property
    def num_samples(self) -> int | None:
        """n, the samples of the data that were sampled with; None if that is not known, as of devinterp's stores."""
        found = self._ours.get("settings", {}).get("num_samples")
        return None if found is None else int(found)

    @property
    def has_tokens(self) -> dict[str, bool]:
        """Whether a probe's losses are per token, by its name."""
        return {name: self.dataset[f"loss_{found}"].ndim == 4 for name, found in self._ids.items()}

    def input_ids(self, probe: str) -> NDArray[np.int64] | None:
        """The tokens of a probe, ``[sample, token]``; None if it has none."""
        found = self.dataset.get(f"input_ids_{self._id(probe)}")
        return None if found is None else np.asarray(found.values)

    def init_losses(self, probe: str) -> NDArray[np.float32] | None:
        """A probe's losses at w*, ``[sample]`` or ``[sample, token]``; None of devinterp's stores."""
        found = self.dataset.get(f"init_loss_{self._id(probe)}")
        return None if found is None else np.asarray(found.values)

    def _id(self, probe: str) -> str:
        if probe in self._ids:
            return self._ids[probe]
        if probe in self._ids.values():
            return probe
        raise ValueError(
            f"probe must be one of {', '.join(map(repr, self.probes)) or '(there is none)'}, got {probe!r}"
        )

    # ---- losses -----------------------------------------------------------------------------------------------

    def losses(self, probe: str, *, per: Per | None = None) -> xarray.DataArray:
        """A probe's losses at the draws, ``[chain, draw, sample]`` or ``[chain, draw, sample, token]``.

        They are read when they are used, but for means over tokens, which are taken block by block. The loss of a
        sample of tokens is the sum over the predicted ones, over their mean number in a sample, so that its mean over
        samples is that over tokens.

        Args:
            probe: its name.
            per: ``"sample"`` or ``"token"``; None: as they are stored.

        Raises:
            ValueError: there is no such probe; tokens of a probe that has none.
            LLCWarning: is issued, once, if the run is partial.
        """
        import xarray

        stored, per = self._stored(probe, per)
        if stored.ndim == 3 or per == "token":
            return stored
        means = np.empty(stored.shape[:3], np.float32)
        for samples, values in self.blocks(probe, per="sample"):
            means[:, :, samples] = values
        return xarray.DataArray(means, dims=stored.dims[:3], name=stored.name)

    def blocks(
        self, probe: str, size: int | None = None, *, per: Per | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """A probe's losses in pieces: which samples, and float32 ``[chain, draw, sample]``, or with ``token`` after it.

        All chains and draws of some samples at a time, so that no more than about a block is in memory.

        Args:
            probe: its name.
            size: samples of a block; None: as many chunks as are `BLOCK_BYTES`, one at least.
            per: as :meth:`losses` takes it.

        Raises:
            ValueError: as :meth:`losses`; a size below 1.
        """
        stored, per = self._stored(probe, per)
        found = self._id(probe)
        if size is None:
            chunks = self.dataset[f"loss_{found}"].encoding.get("chunks") or stored.shape
            of_one = 4 * math.prod(stored.shape[:2]) * math.prod(stored.shape[3:])
            most = max(1, BLOCK_BYTES // max(1, of_one))
            size = most if most < chunks[2] else most - most % chunks[2]
        elif size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        mask, count = self._tokens(found)
        for first in range(0, stored.sizes["sample"], size):
            samples = slice(first, min(first + size, stored.sizes["sample"]))
            values = stored.isel(sample=samples).values.astype(np.float32, copy=False)
            if stored.ndim == 4 and per == "sample":
                if mask is not None:
                    values = np.where(mask[samples], values, np.float32(0))
                values = (values.sum(axis=3, dtype=np.float64) / count).astype(np.float32)
            yield samples, values

    def _stored(self, probe: str, per: Per | None) -> tuple[xarray.DataArray, Per]:
        array = self.dataset[f"loss_{self._id(probe)}"]
        if per not in (None, "sample", "token"):
            raise ValueError(f"per must be 'sample' or 'token', got {per!r}")
        if per == "token" and array.ndim == 3:
            raise ValueError(
                f"per='token': losses of {probe!r} are per sample. Sample with per='token', or use 'sample'"
            )
        self._warn()
        names = ("chain", "draw", "sample", "token")
        array = array.rename(dict(zip(array.dims, names, strict=False)))
        return array, per or ("token" if array.ndim == 4 else "sample")

    def _tokens(self, found: str) -> tuple[NDArray[np.bool_] | None, float]:
        """Which tokens are predicted, and how many of a sample in the mean."""
        array, mask = self.dataset[f"loss_{found}"], self.dataset.get(f"token_mask_{found}")
        if array.ndim < 4:
            return None, math.nan
        if mask is None:
            return None, float(array.shape[3])
        said = next((entry["tokens_per_sample"] for entry in self._ours["probes"] if entry["id"] == found), None)
        values = np.asarray(mask.values, dtype=bool)
        return values, float(values.sum(axis=1).mean()) if said is None else float(said)

    # ---- what samples say about each other --------------------------------------------------------------------

    def influence(
        self,
        train: ProbePart,
        query: ProbePart | None = None,
        *,
        kind: Kind = "influence",
        per: ItemPer | tuple[ItemPer, ItemPer] = "sample",
        n: int | None = None,
        stderr: bool = True,
        draws: slice | None = None,
        block_length: int | None = None,
        centred: Literal["chains", "pooled"] = "chains",
        out: str | os.PathLike[str] | None = None,
        memory: int = 1 << 29,
    ) -> SampleInfluence:
        """How the losses of samples move together over the posterior's draws, ``[train, query]``, with standard errors.

        - ``"influence"``: d⟨φ_j⟩/dε_i = −β·Cov(ℓ_i, φ_j), where 1 + ε_i is the weight of ℓ_i in the posterior
          ∝ exp(−nβ/n·Σ_i (1 + ε_i)·ℓ_i) times the localization; β = nβ/n
        - ``"covariance"``: Cov(ℓ_i, φ_j), within chains
        - ``"correlation"``: Cov(ℓ_i, φ_j)/√(Var ℓ_i·Var φ_j), the loss kernel

        A negative influence says: with more of sample i, the loss of j falls. See
        :func:`llc_fast.stats.influence.influence` for how errors are made.

        Rows and columns are samples, tokens, or the whole probe (its mean loss). The influence of a token is that of
        its own weight, nβ/(n·T) for the mean over tokens, T of which a sample has. So the influences of a sample's
        tokens add up to its own.

        Chains that diverged are left out, and interrupted runs cut to the draws that chains have in common, with a
        warning. So are tokens and samples without a loss (padding, labels of −100), without one.

        Args:
            train: a probe, ℓ_i; or (name, which samples): numbers, a mask or a slice.
            query: φ_j, likewise; None: that of `train`, with itself.
            kind: which of the three.
            per: ``"sample"``, ``"token"`` or ``"probe"``; or a pair, for rows and columns: ``("token", "probe")`` is
                the influence of each token on the mean loss of the query probe.
            n: samples of the data that were sampled with, for kind="influence"; None: as the store has it.
            stderr: whether standard errors are computed.
            draws: which draws of each chain, such as ``slice(500, None)``; None: all.
            block_length: of the jackknife's blocks, in draws; None: from the autocorrelation time.
            centred: ``"chains"``, or ``"pooled"`` at the mean of all draws, as devinterp does.
            out: folder of a new Zarr store for the matrix, which then never is in memory as a whole; its arrays are
                ``value`` and ``stderr``. None: in memory.
            memory: bytes that losses may take, about.

        Raises:
            ValueError: no such probe, samples, tokens or draws; n is not known; there is something at `out`; a loss
                that is not finite, of a chain that did not diverge.
            OSError: `out` can't be written.
            LLCWarning: is issued where chains or draws are left out, or standard errors can't be had.
        """
        options: dict[str, Any] = {"n": n, "stderr": stderr, "draws": draws, "centred": centred}
        options["block_length"] = block_length
        result = self._influence(train, query, kind, per, **options, out=out, memory=memory)
        issue(result.warnings, stacklevel=2)
        return result

    def _influence(
        self,
        train: ProbePart,
        query: ProbePart | None,
        kind: Kind,
        per: ItemPer | tuple[ItemPer, ItemPer] = "sample",
        *,
        n: int | None = None,
        stderr: bool = True,
        draws: slice | None = None,
        out: str | os.PathLike[str] | None = None,
        **more: Any,
    ) -> SampleInfluence:
        rows_per, columns_per = _pair_of(per)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        beta = self._beta(n) if kind == "influence" else None
        chains, made, notes = self._whole_chains("influence()")
        chosen = _draws_of(draws, made)
        left = self._side("train", train, rows_per, chains, chosen)
        right = None
        if query is not None:
            right = self._side("query", query, columns_per, chains, chosen)
        elif columns_per != rows_per:
            right = self._side("train", train, columns_per, chains, chosen)
        if right is not None and _is_same(left.items, right.items):
            right = None
        columns = left.items if right is None else right.items
        losses, weights = left.draws, left.weights
        if weights is not None and beta is not None:
            if np.ptp(weights) <= 1e-12 * abs(float(weights[0])):
                beta *= float(weights[0])
            else:  # for rows alone, so that the matrix is no longer symmetric
                losses, right = Weighted(losses, weights), right or left
        shape = (len(left.items), len(columns))
        options: dict[str, Any] = {"kind": kind, "beta": beta, "stderr": stderr, **more}
        place = None if out is None else Path(os.fsdecode(out)).absolute()
        value, errors = (None, None) if place is None else _out_arrays(place, shape, stderr)
        try:
            found = influence(losses, None if right is None else right.draws, out=value, out_stderr=errors, **options)
            known = {name: getattr(found, name) for name in Influence.__dataclass_fields__}
            if isinstance(losses, Weighted) and weights is not None:
                known["train_means"] = found.train_means / weights
            result = SampleInfluence(
                **known,
                train=left.items,
                query=columns,
                is_symmetric=right is None and len(columns) > 1,
                chains=tuple(chains),
                num_draws=len(range(*chosen.indices(made))),
                path=None if place is None else str(place),
                warnings=(*notes, *_on_errors(found, stderr)),
            )
            if place is not None:
                _finish_out(place, result)
        except BaseException:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
            raise
        return result

    def loss_kernel(self, probe: ProbePart, **options: Any) -> SampleInfluence:
        """The correlation of a probe's losses over draws: symmetric, with ones on its diagonal.

        Args:
            probe: its name, or (name, which samples).
            **options: as :meth:`influence` takes them, other than `query`, `kind` and `n`.
        """
        result = self._influence(probe, None, "correlation", **options)
        issue(result.warnings, stacklevel=2)
        return result

    def pca(self, components: int = 10, *, draws: slice | None = None) -> DrawPCA:
        """Principal components of where chains went, from count sketches of w − w* at the draws.

        Inner products of sketches are those of w − w* but for a relative error of about √(2/K). So the largest
        directions are found, whose variances are far above the mean of all.

        Args:
            components: how many, at most.
            draws: which draws of each chain; None: all.

        Raises:
            ValueError: the run has no sketches; no such draws.
            LLCWarning: is issued where chains or draws are left out.
        """
        if SKETCH not in self.dataset:
            raise ValueError("pca() needs sketches of the draws, which this run has not stored: sample with sketch=512")
        chains, made, notes = self._whole_chains("pca()")
        issue(notes, stacklevel=2)
        chosen = _draws_of(draws, made)
        sketches = self.dataset[SKETCH].isel(chain=chains, draw=slice(0, made)).isel(draw=chosen).values
        found = pca(sketches, components)
        return DrawPCA(**vars(found), chains=tuple(chains), sketch_size=sketches.shape[2])

    def _beta(self, n: int | None) -> float:
        """nβ/n."""
        if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
            raise ValueError(f"n must be the number of samples of the data, got {n!r}")
        n = self.num_samples if n is None else int(n)
        if n is None:
            raise ValueError(
                "n=None: this store does not say how many samples the data had, which kind='influence' needs for "
                "β = nβ/n: give n=…, or kind='correlation'"
            )
        if not self.nbeta:
            raise ValueError(
                "kind='influence' at nβ = 0 is 0: no sample is in the posterior. Use kind='covariance' or 'correlation'"
            )
        return self.nbeta / n

    def _whole_chains(self, who: str) -> tuple[list[int], int, list[Warning]]:
        """The chains to use, how many draws they have in common, and what is left out."""
        counts, total, code = self.draws_done, self.dataset.sizes["draw"], "partial"
        if min(counts, default=0) == total:
            return list(range(len(counts))), total, []
        if not self.is_partial:
            chains, made, code = [k for k, count in enumerate(counts) if count == total], total, "diverged"
            dead = ", ".join(str(k) for k in range(len(counts)) if k not in chains)
            text = f"The loss of chain {dead} became non-finite: {who} uses the other {len(chains)} of {len(counts)}."
        else:  # what leaves the most draws
            made = max(sorted(set(counts)), key=lambda least: least * sum(count >= least for count in counts))
            chains = [k for k, count in enumerate(counts) if count >= made]
            done = ", ".join(map(str, counts))
            text = (
                f"The run was interrupted, or goes on: its chains have made {done} of {total} draws. {who} uses the "
                f"first {made} of chain {', '.join(map(str, chains))}. The same call of sample(store=…) resumes it."
            )
        if not chains or made < 2:
            raise ValueError(
                f"{who} needs a chain with 2 draws or more, but its chains have made {', '.join(map(str, counts))}: "
                + ("resume the run" if self.is_partial else "they diverged; use a smaller lr")
            )
        return chains, made, [Warning(text, code)]

    def _side(self, side: str, given: ProbePart, per: ItemPer, chains: list[int], draws: slice) -> _Side:
        """The losses of rows or columns."""
        probe, which = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if not isinstance(probe, str):
            raise TypeError(f"{side} must be the name of a probe, or (name, which samples), got {given!r}")
        try:
            found = self._id(probe)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
        name = next(name for name, known in self._ids.items() if known == found)
        array = self.dataset[f"loss_{found}"]
        if per == "token" and array.ndim == 3:
            raise ValueError(
                f"per='token': losses of {name!r} are per sample. Sample with per='token', or use per='sample'"
            )
        array = array.rename(dict(zip(array.dims, ("chain", "draw", "sample", "token"), strict=False)))
        chosen = _which(side, which, array.sizes["sample"])
        array = array.isel(draw=draws) if which is None else array.isel(draw=draws, sample=chosen)
        mask, _ = self._tokens(found)
        keep: NDArray[np.bool_] = self._counted(found, chosen, array[chains[0], 0], mask)
        ids = self.dataset.get(f"input_ids_{found}")
        input_ids = None if ids is None else np.asarray(ids.values)
        combination = self.settings.get("combination")
        if per == "token":
            place = np.argwhere(keep)
            shift = 0 if input_ids is None else max(0, input_ids.shape[1] - array.shape[3])
            items = Items(name, per, chosen[place[:, 0]], place[:, 1] + shift, input_ids)
            weights = self._token_weights(found, mask, chosen, place[:, 0], combination)
            return _Side(FlatDraws(array, chains=chains, keep=keep), items, weights)
        kept = np.asarray(keep if keep.ndim == 1 else keep.any(axis=1))
        items = Items(name, per, chosen[kept], None, input_ids)
        if not len(items.sample):
            raise ValueError(f"{side}: no sample of {name!r} has a loss")
        weight = 1.0
        if array.ndim == 3:
            losses: Draws = FlatDraws(array, chains=chains, keep=kept)
        else:
            own = combination == "samples"
            count = keep[kept].sum(axis=1) if own else np.full(int(kept.sum()), self._tokens(found)[1])
            losses = _means(array, chains, keep, kept, count)
            weight = float(count[0]) if combination == "sums" else 1.0
        if per == "probe":
            losses, weight = _mean_of(losses), weight * len(items.sample)
        return _Side(losses, items, np.full(1 if per == "probe" else len(items.sample), weight))

    def _counted(
        self, found: str, chosen: NDArray[np.intp], first: xarray.DataArray, mask: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_]:
        """Which items have a loss, ``[sample]`` or ``[sample, token]``: the same at all draws."""
        if mask is not None:
            counted: NDArray[np.bool_] = mask[chosen]
            return counted
        at_reference = self.dataset.get(f"init_loss_{found}")
        known = first.values if at_reference is None else np.asarray(at_reference.values)[chosen]
        return np.asarray(~np.isnan(known))

    def _token_weights(
        self,
        found: str,
        mask: NDArray[np.bool_] | None,
        chosen: NDArray[np.intp],
        sample: NDArray[np.intp],
        combination: str | None,
    ) -> NDArray[np.float64]:
        """What a token weighs in the loss of the data, of n samples, times n."""
        if combination == "sums":
            return np.ones(len(sample))
        mean = self._tokens(found)[1]
        if combination == "samples" and mask is not None:
            return np.asarray(1.0 / mask[chosen].sum(axis=1)[sample], np.float64)
        return np.full(len(sample), 1.0 / mean)

    # ---- λ̂ ----------------------------------------------------------------------------------------------------

    def llc(self) -> LLCResult:
        """The estimate of λ. It is the run's own where it was saved; else it is made of the losses of the draws.

        Of a store of devinterp's that is nβ·(mean loss of the minibatches of draws, after burn-in − L(w*)), with R̂,
        effective sample sizes, standard error and warnings as :func:`llc_fast.estimate_llc` gives them. The standard
        error includes that of L(w*), which devinterp takes over some minibatches, as if they were independent. Its own
        ``compute_llc`` averages over burn-in too.

        Raises:
            ValueError: the store has no losses that λ̂ could be made of.
            LLCWarning: is issued, once, if the run is partial.
        """
        if self._result is None:
            self._warn()
            saved = self._saved() if _RESULT in self.dataset else None
            self._result = self._estimate() if saved is None else saved
        return self._result

    def _saved(self) -> LLCResult | None:
        """The run's own; None if its draws are not those of the store: it went on and was killed."""
        trace = self.dataset[_RESULT]
        meta = json.loads(trace.attrs["result"])
        names = meta.pop("names")
        groups = {
            kind: {name: np.asarray(self.dataset[array].values) for name, array in group.items()}
            for kind, group in names.items()
        }
        found = LLCResult(
            loss_trace=np.asarray(trace.values),
            schedule=Schedule(**meta.pop("schedule")),
            warnings=[Warning(*warning) for warning in meta.pop("warnings")],
            diagnostics=Diagnostics(meta.pop("diagnostics")),
            traces=groups["trace"],
            observables=groups["observable"],
            ends=groups["end"] if meta.pop("has_ends") else None,
            **meta,
        )
        return None if self.is_partial and found._draws_done != self.draws_done else found

    def _estimate(self) -> LLCResult:
        losses, schedule, init_loss_stderr = self._loss_trace()
        settings = dict(self.settings)
        shared = {"num_parameters": math.nan, "localization": 0.0, "lr": math.nan, "batch_size": 0}
        result = LLCResult(
            loss_trace=losses,
            init_loss=self.init_loss,
            nbeta=self.nbeta,
            schedule=schedule,
            settings={**shared, **settings},
            steps_done=self._steps_done(schedule) if self.is_partial else None,
        )
        examine(result, Facts(np.empty((len(losses), 0, len(COLUMNS))), math.nan, init_loss_stderr))
        for name in shared:
            if name not in settings:
                del result.settings[name]
        return result

    def _loss_trace(self) -> tuple[NDArray[np.float64], Schedule, float]:
        """The losses that λ̂ is made of, ``[chain, step]``, burn-in included where it is known, which of them are draws,
        and the standard error of L(w*)."""
        data, sampler = self.dataset, self._sampler
        if "draw_loss" in data:
            losses = np.asarray(data["draw_loss"].values)
            return losses, Schedule(losses.shape[1], 0), 0.0
        if "sampling_loss" not in data:
            raise ValueError(f"path={str(self.path)!r} has no losses of minibatches, so that it has no λ̂")
        draws, spread = _of_samples(data["sampling_loss"])
        # As if the samples of the minibatches that L(w*) is the mean of were independent.
        names = ("num_init_loss_batches", "batch_size", "gradient_accumulation_steps")
        count = math.prod(int(sampler.get(name, 1)) for name in names)
        if not sampler.get("match_sampling_input_ids_across_chains", True):
            count *= len(draws)
        error = spread / math.sqrt(count)
        burnin, between = int(sampler.get("num_burnin_steps", 0)), int(sampler.get("num_steps_bw_draws", 1))
        # Its draws are the first steps of stretches, ours the last: so the burn-in is shorter.
        schedule = Schedule(draws.shape[1], burnin - between + 1, between)
        if _MICRO not in data or schedule.num_burnin < 0:
            return draws, Schedule(draws.shape[1], 0), error
        steps = _of_samples(data[_MICRO])[0][:, : schedule.num_steps]
        steps[:, schedule.draws] = draws
        return steps, schedule, error

    def _steps_done(self, schedule: Schedule) -> list[int]:
        steps = np.arange(schedule.num_steps)[schedule.draws]
        return [int(steps[count - 1]) + 1 if count else 0 for count in self.draws_done]

    def _count_draws(self) -> list[int]:
        if DRAWS_DONE in self.dataset:
            return [int(count) for count in self.dataset[DRAWS_DONE].values]
        names = [
            name
            for name in ("sampling_loss", *(f"loss_{found}" for found in self._ids.values()))
            if name in self.dataset
        ]
        reached = [self._first_gap(self.dataset[name]) for name in names]
        return [min(counts) for counts in zip(*reached, strict=True)]

    @staticmethod
    def _first_gap(array: xarray.DataArray) -> list[int]:
        ends: dict[Any, int] = dict.fromkeys(array.dims[2:], -1)
        missing = np.isnan(array.isel(ends).values)
        return [int(row.argmax()) if row.any() else len(row) for row in missing]

    # ---- for people -------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        rows = [
            f"{name} ({self.dataset[f'loss_{found}'].shape[2]} samples"
            + (f" of {self.dataset[f'loss_{found}'].shape[3]} tokens)" if self.has_tokens[name] else ")")
            for name, found in self._ids.items()
        ]
        draws = self.dataset.sizes.get("draw", 0)
        state = f", interrupted after {min(self.draws_done, default=0)} to {max(self.draws_done, default=0)}"
        where = "in memory" if self.path is None else str(self.path)
        return (
            f"Samples: {len(self.draws_done)} chains × {draws} draws{state if self.is_partial else ''}, nβ = "
            f"{self.nbeta:.6g}\n  probes: {', '.join(rows) or 'none'}\n  {where}"
        )

    def _warn(self) -> None:
        if self.is_partial and not self._has_warned:
            self._has_warned = True
            done = ", ".join(map(str, self.draws_done))
            text = (
                f"The run was interrupted, or goes on: its chains have made {done} of {self.dataset.sizes['draw']} "
                "draws, and losses of the others are NaN. The same call of sample(store=…) resumes it."
            )
            issue([Warning(text, "partial")], stacklevel=3)


@dataclass(frozen=True)
class _Side:
    """Rows or columns.

    Attributes:
        draws: their losses.
        items: what they are.
        weights: of each in the loss of the data, times n.
    """

    draws: Draws
    items: Items
    weights: NDArray[np.float64]


def _pair_of(per: Any) -> tuple[ItemPer, ItemPer]:
    found = per if isinstance(per, tuple) else (per, per)
    if len(found) != 2 or any(one not in ITEM_PER for one in found):
        raise ValueError(f"per must be 'sample', 'token' or 'probe', or a pair of them, got {per!r}")
    return found


def _on_errors(found: Influence, stderr: bool) -> list[Warning]:
    if not stderr or found.num_blocks >= MIN_BLOCKS:
        return []
    text = (
        f"There are {found.num_blocks} blocks of {found.block_length} draws (minimum {MIN_BLOCKS}; the autocorrelation "
        f"time is {found.autocorrelation_time:.3g}): standard errors of {found.kind} are not known. Sample more draws "
        "or chains."
    )
    return [Warning(text, "short")]


def _is_same(left: Items, right: Items) -> bool:
    return (left.probe, left.per) == (right.probe, right.per) and np.array_equal(left.sample, right.sample)


def _draws_of(draws: object, made: int) -> slice:
    """Of `made` ones, with a start, a stop and a step."""
    if draws is not None and not isinstance(draws, slice):
        raise TypeError(f"draws must be a slice of each chain's draws, such as slice(500, None), got {draws!r}")
    start, stop, step = (draws or slice(None)).indices(made)
    if step < 1 or len(range(start, stop, step)) < 2:
        raise ValueError(f"draws={draws} leaves fewer than 2 draws of {made}, or goes backwards: take more")
    return slice(start, stop, step)


def _which(side: str, which: Any, count: int) -> NDArray[np.intp]:
    """The places of samples that were chosen."""
    if which is None or isinstance(which, slice):
        found = np.arange(count)[which or slice(None)]
    else:
        asked = np.atleast_1d(np.asarray(which, None if np.size(which) else int))
        if asked.dtype == bool and asked.shape != (count,):
            raise ValueError(f"{side}: a mask of samples must have shape ({count},), got {asked.shape}")
        if asked.ndim != 1 or asked.dtype.kind not in "iub":
            raise TypeError(f"{side}: samples must be numbers, a mask or a slice, got {which!r}")
        found = np.flatnonzero(asked) if asked.dtype == bool else asked.astype(np.intp)
        if len(found) and not (-count <= found.min() and found.max() < count):
            raise ValueError(f"{side}: the probe has {count} samples, but {found[np.abs(found).argmax()]} is asked for")
        found = np.where(found < 0, found + count, found)
    if not len(found):
        raise ValueError(f"{side}: {which!r} leaves no sample of {count}")
    return found.astype(np.intp)


def _means(
    array: xarray.DataArray,
    chains: list[int],
    keep: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    count: NDArray[Any],
) -> NDArray[np.float32]:
    """The losses of samples from those of tokens: sums over the tokens that count, over `count`."""
    places = np.flatnonzero(kept)
    found = np.empty((len(chains), array.shape[1], len(places)), np.float32)
    size = max(1, BLOCK_BYTES // max(1, 4 * array.shape[1] * array.shape[3]))
    for row, chain in enumerate(chains):
        for first in range(0, array.shape[2], size):
            here = slice(first, min(first + size, array.shape[2]))
            values = np.asarray(array[chain, :, here].values, np.float32)
            inside = (places >= here.start) & (places < here.stop)
            sums = np.where(keep[here], values, np.float32(0)).sum(axis=2, dtype=np.float64)
            found[row][:, inside] = sums[:, places[inside] - here.start] / count[inside]
    return found


def _mean_of(losses: Draws) -> NDArray[np.float64]:
    """Over items, ``[chain, draw, 1]``."""
    chains, draws, count = losses.shape
    size = max(1, BLOCK_BYTES // max(1, 4 * chains * draws))
    total = np.zeros((chains, draws))
    for first in range(0, count, size):
        total += np.asarray(losses[:, :, first : first + size]).sum(axis=2, dtype=np.float64)
    return (total / count)[:, :, None]


def _out_arrays(place: Path, shape: tuple[int, int], stderr: bool) -> tuple[Any, Any]:
    """New arrays of a new store."""
    zarr = require("zarr", "samples")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"out={str(place)!r} exists: give another path, or delete it (rm -r) first")
    group = zarr.open_group(str(place), mode="w", zarr_format=3)
    chunks = tuple(min(size, 1024) for size in shape)
    made = [
        group.create_array(name, shape=shape, dtype="float32", chunks=chunks, dimension_names=("train", "query"))
        for name in ("value", "stderr")[: 1 + stderr]
    ]
    return made[0], made[1] if stderr else None


def _finish_out(place: Path, result: SampleInfluence) -> None:
    group = require("zarr", "samples").open_group(str(place), mode="r+")
    for name, (side, values) in result.coordinates().items():
        group.create_array(name, data=np.asarray(values, np.int64), dimension_names=(side,))
    group.attrs.update({**plain(result.attributes()), COMPLETED: 1})


def _order(said: list[str], ids: list[str]) -> Any:
    """As they were given; those that nobody named, as they lie there."""
    return lambda found: (said.index(found) if found in said else len(said), ids.index(found))


def _opened(arrays: Any, said: str) -> xarray.Dataset:
    require("zarr", "samples")
    opened = require("xarray", "samples").open_dataset
    try:
        # Without a cache: what has been used is not kept in memory.
        return opened(arrays, engine="zarr", consolidated=False, chunks=None, cache=False)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{said} is damaged: {error}") from error


def _of_samples(array: xarray.DataArray) -> tuple[NDArray[np.float64], float]:
    """Losses ``[chain, step, sample, token]``: their means ``[chain, step]``, and the standard deviation of a sample's.

    Chain by chain, for the memory.
    """
    means, variances = [], []
    for chain in range(array.shape[0]):
        samples = array[chain].values.mean(axis=2, dtype=np.float64)
        means.append(samples.mean(axis=1))
        if samples.shape[1] > 1:
            variances.append(samples.var(axis=1, ddof=1))
    spread = np.concatenate(variances) if variances else np.zeros(1)
    spread = spread[np.isfinite(spread)]
    return np.stack(means), math.sqrt(spread.mean()) if len(spread) else 0.0
