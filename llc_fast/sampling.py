"""Sampling with probes: the loss of every probe sample at every draw, in a store, and the estimate of λ beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llc_fast.batches import Batch, DataSource, batch_length, leaves, split_batch
from llc_fast.behavioral import Behavioral, BehavioralLoss, named_loss
from llc_fast.calibration import Chosen
from llc_fast.chains.draw import Draw
from llc_fast.chains.processes import telling_early_failures
from llc_fast.data import IndexedSource, is_loader, make_source
from llc_fast.estimate import ARGUMENTS, Prepared, Recorder, Surroundings, completed, losses_of_draws, run_estimate
from llc_fast.language import NextToken, TokenLoss, columns_of_own_loss, token_source
from llc_fast.objective.objective import LossFunction, Objective
from llc_fast.objective.per_sample import PER, Per, ProbeLoss, SampleLosses, sample_losses_for
from llc_fast.objective.prefix import PrefixCache
from llc_fast.result import LLCResult, Warning
from llc_fast.samples import OURS, SKETCH, Probe, Samples, attributes, layout, save_result
from llc_fast.settings import DEFAULT_NUM_DRAWS, LIMITS, Settings, carried_over, with_old_keywords
from llc_fast.stats.projection import CountSketch
from llc_fast.store import COMPLETED, SampleStore, Variable, read_attributes
from llc_fast.support.arguments import check_integer
from llc_fast.support.errors import differences, first_line
from llc_fast.support.files import plain
from llc_fast.support.fingerprint import digest
from llc_fast.support.optional import require
from llc_fast.support.runtime import threads
from llc_fast.support.warned import issue
from llc_fast.traces import Traces

_CHECKED = 2
"""Minibatches of the run on which losses of single samples are compared with its loss."""
_ORDER = 0x5EED
"""Sets the seed of the probes' order apart from those of all chains."""
_TOGETHER, _MOST_TOGETHER = 4, 4096
"""Minibatches of a probe that pass the model at once, and samples at most."""
_DTYPES = ("float32", "float16")
CACHE_BYTES = 2**30
"""Of activations that are kept where only a part of the model is sampled."""
_AGREE, _AGREE_COARSELY = 1e-5, 2e-2
"""Differences of losses from those without kept activations, over the largest loss; the latter below float32."""


def sample(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | str | None,
    *,
    probes: Mapping[str, Any] | None = None,
    per: Per = "sample",
    store: str | os.PathLike[str] | None = None,
    probe_dtype: str = "float32",
    probe_loss: ProbeLoss | None = None,
    cache_bytes: int = CACHE_BYTES,
    sketch: int | None = None,
    **settings: Any,
) -> Samples:
    """Sample as :func:`llc_fast.estimate_llc` does, and take the losses of probes at every draw.

    ``samples.llc()`` is the estimate of λ, with the same bits as that of estimate_llc with the same arguments.
    ``samples.losses(name)`` are the losses of a probe, ``[chain, draw, sample]`` or ``[chain, draw, sample, token]``:
    what influence functions and susceptibilities are made of.

    Losses of single samples are those of the loss function, or of which its mean is one, see
    :func:`llc_fast.objective.per_sample.sample_losses_for`; they are checked against the loss of the run at w* and
    beside it. A model is evaluated as the chains have it at the draw: mode (train or eval), precision, and buffers.
    The chains have the same bits with and without probes.

    A store on disk survives: killed at any moment, the same call resumes, and the store ends with the same bytes as if
    nothing had happened. Beside it is a checkpoint, ``<store>.checkpoint``, until the run is over. The same call after
    that opens the store and samples nothing. Several processes write to the same store, each its own chains.

    Args:
        model, data, loss_fn: as for :func:`llc_fast.estimate_llc`.
        probes: by name, data of whatever kind `data` may be; or pairs of data and a number k: k minibatches of them, in
            a random order that is the same at every draw and follows `seed`, with their places in the data in
            ``samples.dataset["indices_<name>"]``. They pass the model in batches of four minibatches of the run, or of
            one where samples of a batch are not independent (dropout, batch statistics, microbatches).
        per: ``"sample"``: a loss for each sample, of which the loss of the run is the mean: where that is a mean over
            tokens, the sum over a sample's tokens by their mean number in the samples of the probe. ``"token"``: one
            for each of its tokens; what does not count (padding, labels of −100) is NaN.
        store: the folder of a Zarr store, which :meth:`llc_fast.Samples.open` reads; None: in memory, with no way to
            resume.
        probe_dtype: of the losses of probes in the store, ``"float32"`` or ``"float16"``.
        probe_loss: ``probe_loss(model, batch)``, the losses ``[batch]`` or ``[batch, tokens]`` of which the loss of the
            run is the mean, where they can't be had from `loss_fn`.
        cache_bytes: memory for activations. Where only a part of the model is sampled, what lies below it gives the
            same for a batch of a probe at every draw: it is evaluated once, at w*, and kept, for as many batches as
            fit. At the first draw of each chain losses are taken without it, too. If they are others, it is given up,
            with a warning. 0: keep nothing.
        sketch: K numbers onto which w − w* is projected at every draw, for :meth:`llc_fast.Samples.pca`: a count sketch
            (:class:`llc_fast.stats.projection.CountSketch`) of the sampled parameters in their order, the same in all
            runs. It passes over the weights once, on the CPU (about 45 ms for each million); None: none.
        **settings: any other argument of :func:`llc_fast.estimate_llc` but ``checkpoint``. The length is a number of
            draws, 2000 if ``num_draws`` is not given: ``target_error`` and other limits are not possible.

    Returns:
        The samples; of a run that was interrupted, what there is of them (``samples.is_partial``).

    Raises:
        TypeError, ValueError, PermissionError, MemoryError: as :func:`llc_fast.estimate_llc`; losses of single samples
            can't be had; the store is of another run.
        ModuleNotFoundError: zarr or xarray is not installed (``pip install "llc_fast[samples]"``).
        OSError: the store can't be written.
    """
    found, warnings = run_samples(
        model,
        data,
        loss_fn,
        probes=probes,
        per=per,
        store=store,
        probe_dtype=probe_dtype,
        probe_loss=probe_loss,
        cache_bytes=cache_bytes,
        sketch=sketch,
        settings=settings,
    )
    issue(warnings, stacklevel=2)
    return found


def run_samples(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | str | None,
    *,
    probes: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    per: Per = "sample",
    store: str | os.PathLike[str] | None = None,
    probe_dtype: str = "float32",
    probe_loss: ProbeLoss | None = None,
    cache_bytes: int = CACHE_BYTES,
    sketch: int | None = None,
    order: int | None = None,
) -> tuple[Samples, list[Warning]]:
    """:func:`sample` with the warnings of the run, none of which was issued; the result of one that was over has them.

    Args:
        order: sets the order of probes' samples; None: the seed of the run. Several runs may then have the same ones.
            Data may be a :class:`Some`, too.
    """
    _check_arguments(probes, per, probe_dtype, probe_loss, sketch, settings)
    check_integer("cache_bytes", cache_bytes, 0)
    require("zarr", "samples")
    require("xarray", "samples")
    place = None if store is None else Path(os.fsdecode(store)).absolute()
    known = {name: value for name, value in settings.items() if name in ARGUMENTS}
    old = {name: value for name, value in settings.items() if name not in ARGUMENTS}
    earlier = old.pop("settings", None)
    execution = settings.get("execution")
    with telling_early_failures(getattr(execution, "distributed", old.get("distributed"))):
        if place is not None:
            known["checkpoint"] = _checkpoint_of(place)
        if earlier is not None:
            known = carried_over(known, earlier, decides=is_loader(data))
        asked, loss = with_old_keywords(known, old, "sample"), named_loss(loss_fn)
        asked = _with_length(asked)
        surroundings = Surroundings(asked, model, data, loss)
    recorder = _Recorder(dict(probes or {}), per, place, probe_dtype, probe_loss, cache_bytes, order, sketch)
    if surroundings.team.size > 1 and place is None:
        raise ValueError("store=None keeps losses in the memory of one process, and there are several: give a path")
    if place is not None and surroundings.team.size == 1 and not place.exists():
        _forget(place)  # of a store that somebody has deleted
    try:
        result = run_estimate(asked, model, data, loss, surroundings, recorder)
    except _AlreadyDoneError:
        assert place is not None
        if surroundings.team.rank == 0:
            _forget(place)  # of a run that was killed at the very end
        return Samples.open(place), []
    finally:
        recorder.close()
    assert recorder.samples is not None
    return recorder.samples, [*result.warnings, *recorder.warnings] if surroundings.team.rank == 0 else []


def _check_arguments(
    probes: object,
    per: object,
    probe_dtype: object,
    probe_loss: object,
    sketch: object,
    settings: Mapping[str, Any],
) -> None:
    """Raise TypeError or ValueError for what is wrong whatever model and data are."""
    if probes is not None and not isinstance(probes, Mapping):
        raise TypeError(f"probes must be a mapping from names to data, got {type(probes).__name__}")
    for name in probes or ():
        if not isinstance(name, str):
            raise TypeError(f"probes must have names that are texts, got {name!r}")
    if per not in PER:
        raise ValueError(f'per must be "sample" or "token", got {per!r}')
    if probe_dtype not in _DTYPES:
        raise ValueError(f'probe_dtype must be "float32" or "float16", got {probe_dtype!r}')
    if probe_loss is not None and not callable(probe_loss):
        raise TypeError(f"probe_loss must be callable as probe_loss(model, batch), got {type(probe_loss).__name__}")
    if sketch is not None and (isinstance(sketch, bool) or not isinstance(sketch, (int, np.integer)) or sketch < 2):
        raise ValueError(f"sketch must be a number of dimensions, 2 at least (512 is a good one), got {sketch!r}")
    if settings.get("checkpoint") is not None:
        raise TypeError("checkpoint is not an argument of sample(): a store has its own. Leave it out")
    for name in LIMITS:
        if settings.get(name) is not None:
            raise ValueError(
                f"{name}={settings[name]} finds the length of the chains on the way, and a store has a fixed number of "
                "draws: give num_draws instead"
            )


def _with_length(settings: Settings) -> Settings:
    return dataclasses.replace(settings, num_draws=DEFAULT_NUM_DRAWS) if settings.by_need else settings


def _checkpoint_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.checkpoint")


def _forget(place: Path) -> None:
    """Delete the checkpoint of a store, of all processes."""
    checkpoint = _checkpoint_of(place)
    ours = re.compile(re.escape(checkpoint.name) + r"(\.rank[0-9]+)?", re.ASCII)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(place.parent):
            if ours.fullmatch(name):
                checkpoint.with_name(name).unlink(missing_ok=True)


class _AlreadyDoneError(Exception):
    """The store has the whole run."""


# ---- probes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoadedProbe:
    """A probe on the device of the run.

    Attributes:
        probe: as the store has it.
        batches: in the order of the samples.
        init_losses: at w*, ``[sample]`` or ``[sample, token]``.
        indices: places of the samples in the data; None: these are all, or a loader does not say.
        input_ids: int64 ``[sample, token]``; None: there are none.
        weights: what a sample weighs in the loss of the run, over the mean; None: all weigh the same.
        has_gaps: whether something in a sample does not count.
    """

    probe: Probe
    batches: list[Batch]
    init_losses: Tensor
    indices: Tensor | None
    input_ids: Tensor | None
    weights: Tensor | None = None
    has_gaps: bool = True

    def losses(self, losses_of: Callable[[Batch], Tensor], cache: PrefixCache | None = None) -> Tensor:
        """Of all samples, in memory of their own; with a cache, without what it has of the model."""
        if cache is None:
            found = [losses_of(batch) for batch in self.batches]
        else:
            found = [
                cache.evaluate((self.probe.name, k), functools.partial(losses_of, batch))
                for k, batch in enumerate(self.batches)
            ]
        losses = _joined(found, self.probe.num_tokens)
        return losses if self.weights is None else losses * self.weights

    @property
    def identity(self) -> str:
        """A digest of the samples."""
        found = [leaf for batch in self.batches for leaf in leaves(batch)]
        return digest((str(k), t) for k, t in enumerate(found) if isinstance(t, Tensor))

    def variables(self) -> list[Variable]:
        """Beyond those of :func:`llc_fast.samples.layout`."""
        batch, found = f"batch_{self.probe.id}", list[Variable]()
        if self.indices is not None:
            found.append(Variable(f"indices_{self.probe.id}", (batch,), (len(self.indices),), "int64", False))
        if self.input_ids is not None and self.probe.num_tokens is None:
            dims, shape = (batch, f"token_{self.probe.id}"), tuple(self.input_ids.shape)
            found.append(Variable(f"input_ids_{self.probe.id}", dims, shape, "int64", False))
        return found


def _joined(losses: list[Tensor], num_tokens: int | None) -> Tensor:
    """One tensor, padded with NaN to so many tokens."""
    if num_tokens is not None:
        losses = [
            t if t.shape[1] == num_tokens else nn.functional.pad(t, (0, num_tokens - t.shape[1]), value=torch.nan)
            for t in losses
        ]
    return losses[0] if len(losses) == 1 else torch.cat(losses)


def _source_of(objective: Objective, data: Any) -> DataSource:
    """A probe's data as the run's loss takes them."""
    size, loss_fn, device = objective.source.batch_size, objective.loss_fn, objective.device
    size = None if is_loader(data) else size  # a loader decides
    takes_tokens = isinstance(loss_fn, TokenLoss) or (isinstance(loss_fn, BehavioralLoss) and loss_fn.has_tokens)
    if takes_tokens:
        return token_source(NextToken(), objective.model, data, size, device)[0]
    data = columns_of_own_loss(objective.model, data) if loss_fn is None else data
    return make_source(data, size, device, pairs=not objective.takes_model)


def _batches_of(
    name: str, source: DataSource, count: int | Some | None, seed: int, together: int
) -> tuple[list[Batch], Tensor | None]:
    """The batches of a probe, and where its samples are in the data.

    Args:
        name: of the probe.
        source: its data.
        count: how many batches of the run's size; None: all data.
        seed: of their order.
        together: samples that pass the model at once, at most; a loader's batches are not joined.

    Raises:
        ValueError: there are not as many; the data have no end.
    """
    count = count.count(source) if isinstance(count, Some) else count
    if isinstance(source, IndexedSource):
        n, size = source.num_samples or 0, source.batch_size or 1
        if count is None:
            order = torch.arange(n)
        elif count * size > n:
            raise ValueError(
                f"probes[{name!r}] has {n} samples, fewer than {count} batches of {size}: give {max(1, n // size)} or "
                "fewer, or the data alone, for all of them"
            )
        else:
            order = torch.randperm(n, generator=torch.Generator().manual_seed((seed + _ORDER) % 2**63))[: count * size]
        device = source.index_buffer(1).device
        pieces = [source.gather(some.to(device)) for some in torch.split(order, together)]
        return pieces, None if count is None else order
    if count is None and source.sampling.num_batches is None:
        raise ValueError(f"probes[{name!r}] has no end: give ({name}, k), for k batches")
    found = list(itertools.islice((batch for batch, _ in source.full(seed=seed)), count))
    if count is not None and len(found) < count:
        raise ValueError(f"probes[{name!r}] gives {len(found)} batches, fewer than {count}: give as many or fewer")
    return [piece for batch in found for piece, _ in split_batch(batch, together)], None


@dataclass(frozen=True)
class Some:
    """Of data the first few minibatches, in the order of probes, that have so many samples; all, if there are fewer."""

    data: Any
    num_samples: int

    def count(self, source: DataSource) -> int | None:
        """How many minibatches; None: all data."""
        size, most = source.batch_size or 1, source.num_samples
        if most is not None and most <= self.num_samples:
            return None
        wanted = -(-self.num_samples // size)
        available = [wanted] if most is None else [wanted, most // size]
        if source.sampling.num_batches is not None:
            available.append(source.sampling.num_batches)
        return max(1, min(available))


def _spec_of(name: str, given: Any) -> tuple[Any, int | Some | None]:
    """Data, and how many batches of them."""
    if isinstance(given, Some):
        return given.data, given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], (int, np.integer)):
        if isinstance(given[1], bool) or given[1] < 1:
            raise ValueError(f"probes[{name!r}] must have at least 1 batch, got {given[1]}")
        return given[0], int(given[1])
    return given, None


def _ids_in(batches: list[Batch], num_tokens: int | None) -> Tensor | None:
    """The tokens of sequences, padded with 0; None: these are no sequences, or the losses are of something else."""
    if not all(isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor) for batch in batches):
        return None
    ids = [batch["input_ids"].long() for batch in batches]
    width = max(t.shape[-1] for t in ids)
    if any(t.ndim != 2 for t in ids) or (num_tokens is not None and width != num_tokens + 1):
        return None
    return torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) for t in ids])


# ---- the run -----------------------------------------------------------------------------------------------


class _Recorder(Recorder):
    """Writes what the run leaves behind to a store.

    Args:
        probes: as they were given.
        per: of losses.
        place: of the store; None: in memory.
        dtype: of the losses of probes.
        probe_loss: the user's.
        cache_bytes: of activations that may be kept.
        order: of probes' samples; None: by the seed of the run.
        sketch: the dimensions of sketches of w − w*; None: there are none.

    Attributes:
        samples: at the end.
        cache: of activations.
        warnings: of what is not the estimate's.
    """

    def __init__(
        self,
        probes: dict[str, Any],
        per: Per,
        place: Path | None,
        dtype: str,
        probe_loss: ProbeLoss | None,
        cache_bytes: int,
        order: int | None,
        sketch: int | None = None,
    ) -> None:
        self._cache_bytes, self._order_seed = cache_bytes, order
        self._compared = set[int]()
        self.cache: PrefixCache | None = None
        self.warnings: list[Warning] = []
        self._sketch = None if sketch is None else CountSketch(int(sketch))
        self._given, self._per, self._place, self._dtype, self._probe_loss = probes, per, place, dtype, probe_loss
        self._probes: list[_LoadedProbe] = []
        self._losses: SampleLosses | None = None
        self._store: SampleStore | None = None
        self._identity: dict[str, Any] = {}
        self._draws_written: dict[int, int] = {}
        self.samples: Samples | None = None

    def close(self) -> None:
        """Whatever happens: the store's thread ends."""
        if self._store is not None:
            with contextlib.suppress(OSError):  # of which the run has heard
                self._store.close()

    # ---- before the chains -----------------------------------------------------------------------------------

    def look(self, prepared: Prepared) -> None:
        objective, settings, team = prepared.objective, prepared.settings, prepared.surroundings.team
        self._team = team
        # Without gradients four minibatches need less memory than one with them; of some models they are the function.
        mixes = prepared.mode.batch_statistics or prepared.mode.random_modules or objective.trial.writes_buffers
        size = objective.source.batch_size or batch_length(next(_minibatches(objective, settings.seed)))
        together = objective.microbatch_size or (size if mixes else max(size, min(_MOST_TOGETHER, _TOGETHER * size)))
        with threads(prepared.plan.num_threads), objective.generators.kept(), objective.at_reference():
            order = settings.seed if self._order_seed is None else self._order_seed
            loaded = {
                name: _batches_of(name, _source_of(objective, data), count, order, together)
                for name, (data, count) in ((name, _spec_of(name, given)) for name, given in self._given.items())
            }
            if loaded:
                first = [batches[0] for batches, _ in loaded.values()]
                checked = [*_minibatches(objective, settings.seed), *first]
                self._losses = sample_losses_for(objective, self._per, checked, self._probe_loss)
                if self._cache_bytes and not self._losses.by_vmap:
                    self.cache = PrefixCache(objective, self._cache_bytes)
            self._probes = [self._loaded(objective, name, *found) for name, found in loaded.items()]
            if self._losses is not None and not any(p.has_gaps for p in self._probes):
                self._losses = self._losses.without_gaps()
        self._identity = plain(
            {
                **prepared.identity,
                "probes": {probe.probe.name: probe.identity for probe in self._probes},
                "per": self._per,
                "probe_dtype": self._dtype,
                "sample_losses": None if self._losses is None else self._losses.name,
                **({} if self._sketch is None else {"sketch": self._sketch.size}),
            }
        )
        self._reference = objective.reference
        state = self._state_of_store(prepared)
        if team.size > 1:  # all see the same, or none goes on
            state = team.gather(state)[0]
        self._is_begun = state == "begun"
        if state == "completed":
            raise _AlreadyDoneError
        if state == "none" and prepared.saved is not None:
            raise ValueError(
                f"store={str(self._place)!r} does not exist, but its checkpoint does: delete the files beside it that "
                "begin with its name to start again, or give another path"
            )

    def _loaded(self, objective: Objective, name: str, batches: list[Batch], indices: Tensor | None) -> _LoadedProbe:
        assert self._losses is not None
        buffers, found = objective.fresh_buffers(), list[Tensor]()
        for k, batch in enumerate(batches):
            with objective.holding(objective.reference, buffers):
                evaluate = functools.partial(self._losses.here, batch)
                losses = evaluate() if self.cache is None else self.cache.record((name, k), evaluate)
            found.append(losses.float())
        num_tokens = max(t.shape[1] for t in found) if self._per == "token" else None
        losses = _joined(found, num_tokens)
        mean_tokens = None
        if num_tokens is not None and bool(losses.isnan().any()):
            mean_tokens = float((~losses.isnan()).sum(1).double().mean())
        probe = Probe(name, len(losses), num_tokens, mean_tokens)
        weights, has_gaps = None, bool(losses.isnan().any())
        if self._per == "sample":
            with objective.holding(objective.reference, buffers):
                counted = [self._losses.counted(batch) for batch in batches]
            counted = [c[:, None] if c.ndim == 1 else c.flatten(1) for c in counted]
            has_gaps = not all(bool(c.all()) for c in counted)
            counts = torch.cat([c.sum(1) for c in counted]).double()
            if self._losses.combination in ("elements", "tokens of the data") and bool((counts != counts[0]).any()):
                weights = (counts / counts.mean()).to(losses.dtype)
                losses = losses * weights
        return _LoadedProbe(probe, batches, losses, indices, _ids_in(batches, num_tokens), weights, has_gaps)

    def _state_of_store(self, prepared: Prepared) -> str:
        """``"none"``, ``"begun"``, ``"completed"`` or ``"foreign"``.

        Raises:
            ValueError: there is another run's.
        """
        place = self._place
        if place is None or not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return "none"
        found = read_attributes(place)
        ours = found.get(OURS)
        if not isinstance(ours, dict):
            return "foreign"  # `SampleStore.create` says what it is
        schedule = {"schedule": vars(prepared.settings.longest)}
        _compare(place, {**ours["identity"], "schedule": ours["schedule"]}, {**self._identity, **plain(schedule)})
        return "completed" if found.get(COMPLETED) == 1 else "begun"

    def begin(self, prepared: Prepared, chosen: Chosen) -> Callable[[Draw], None]:
        if chosen.is_interrupted:
            raise KeyboardInterrupt  # nothing has been sampled, and nothing is in the store
        settings, team, objective = prepared.settings, prepared.surroundings.team, prepared.objective
        sampler, schedule = completed(settings, chosen)
        self._schedule, self._chosen = schedule, chosen
        probes = [loaded.probe for loaded in self._probes]
        variables = layout(probes, num_chains=settings.num_chains, num_draws=schedule.num_draws, dtype=self._dtype) + [
            variable for loaded in self._probes for variable in loaded.variables()
        ]
        if self._sketch is not None:
            dims = ("chain", "draw", "sketch_dim")
            shape = (settings.num_chains, schedule.num_draws, self._sketch.size)
            variables.append(Variable(SKETCH, dims, shape, "float32", True))
        without = {f"input_ids_{p.probe.id}" for p in self._probes if p.input_ids is None}
        variables = [variable for variable in variables if variable.name not in without]
        said = attributes(
            probes,
            nbeta=chosen.nbeta,
            init_loss=chosen.init_loss,
            schedule=schedule,
            settings={
                "sampler": sampler.name,
                "lr": chosen.lr,
                "localization": sampler.localization,
                **({"localization_metric": "sampler"} if sampler.localizes_in_metric else {}),
                "bias_correction": chosen.bias_correction,
                "noise_level": sampler.noise_level,
                "weight_decay": sampler.weight_decay,
                "bounding_box_size": sampler.bounding_box_size,
                "num_chains": settings.num_chains,
                "batch_size": objective.source.batch_size,
                "num_samples": objective.source.num_samples,
                "seed": settings.seed,
                "per": self._per,
                "sample_losses": None if self._losses is None else self._losses.name,
                "combination": None if self._losses is None else self._losses.combination,
            },
            identity=self._identity,
        )
        began_again = self._store is not None
        if began_again:
            assert self._store is not None
            self._store.close()
        if team.rank == 0:
            if began_again and self._place is not None:  # the chains diverged, and start anew with a smaller ε
                _forget(self._place)
                shutil.rmtree(self._place)
            self._store = self._created(variables, said, is_resumed=prepared.saved is not None)
            self._write_fixed(settings.num_chains)
        team.gather(None)
        if team.rank:
            assert self._place is not None
            self._store = SampleStore.join(self._place, variables, said)
        assert self._store is not None
        self._draws_written = {}
        self._check_resumed(prepared, self._store)
        return self._watch

    def _created(self, variables: list[Variable], said: Mapping[str, Any], *, is_resumed: bool) -> SampleStore:
        """The store, made or opened."""
        try:
            return SampleStore.create(self._place, variables, said, resume=True)
        except ValueError:
            # Of this run, but with another ε: it was killed after its chains had started anew with a smaller one.
            if is_resumed or self._place is None or not self._is_begun:
                raise
            shutil.rmtree(self._place)
            return SampleStore.create(self._place, variables, said, resume=True)

    def _write_fixed(self, num_chains: int) -> None:
        store = self._store
        assert store is not None
        shape = store.variables["init_loss"].shape
        store.write_fixed("init_loss", np.full(shape, self._chosen.init_loss, np.float32))
        for loaded in self._probes:
            name, losses = loaded.probe.id, loaded.init_losses
            store.write_fixed(f"init_loss_{name}", losses)
            if f"token_mask_{name}" in store.variables:
                store.write_fixed(f"token_mask_{name}", ~losses.isnan())
            if loaded.input_ids is not None:
                store.write_fixed(f"input_ids_{name}", loaded.input_ids)
            if loaded.indices is not None:
                store.write_fixed(f"indices_{name}", loaded.indices)

    def _check_resumed(self, prepared: Prepared, store: SampleStore) -> None:
        """Raise ValueError if chains would go on after draws that the store lacks."""
        for traces in prepared.saved.traces if prepared.saved is not None else ():
            for row, chain in enumerate(traces.chains):
                made = int(np.isfinite(traces.loss[row, : traces.step][self._schedule.draws]).sum())
                if made > store.draws_done(chain):
                    raise ValueError(
                        f"store={str(self._place)!r} has {store.draws_done(chain)} draws of chain {chain}, and its "
                        f"checkpoint goes on after {made}: delete both to start again"
                    )

    # ---- while they run --------------------------------------------------------------------------------------

    def _watch(self, draw: Draw) -> None:
        """The losses of all probes at a draw, handed over to the store, for which nobody waits."""
        store, losses = self._store, self._losses
        assert store is not None
        if self._sketch is not None:
            sketched = self._sketch(draw.params, self._reference)
            store.write(SKETCH, draw.chain, draw.draw, sketched.astype(np.float32))
        if losses is None or draw.evaluator is None:
            return
        if losses.objective.trial.writes_buffers:  # each evaluation has the buffers of the draw

            def evaluated(batch: Batch) -> Tensor:
                assert draw.evaluator is not None
                with draw.evaluator.holding(draw.params):
                    return losses.here(batch)

            for loaded in self._probes:
                store.write(f"loss_{loaded.probe.id}", draw.chain, draw.draw, loaded.losses(evaluated))
            return
        with draw.evaluator.holding(draw.params):
            for loaded, values in zip(self._probes, self._losses_here(losses, draw.chain), strict=True):
                store.write(f"loss_{loaded.probe.id}", draw.chain, draw.draw, values)

    def _losses_here(self, losses: SampleLosses, chain: int) -> Iterator[Tensor]:
        """Of each probe, at the parameters that the model holds."""
        if not self.cache or chain in self._compared:
            for loaded in self._probes:
                yield loaded.losses(losses.here, self.cache)
            return
        self._compared.add(chain)
        exact = [loaded.losses(losses.here) for loaded in self._probes]
        try:
            found = [loaded.losses(losses.here, self.cache) for loaded in self._probes]
            off = max((_difference(a, b) for a, b in zip(found, exact, strict=True)), default=0.0)
        except Exception as error:  # whatever the model says to activations that are not there
            self._give_up(first_line(error))
        else:
            if off <= (_AGREE if losses.objective.is_precise else _AGREE_COARSELY):
                yield from found  # as at all other draws
                return
            self._give_up(f"losses of chain {chain} differ by {off:.2g} of the largest")
        yield from exact

    def _give_up(self, reason: str) -> None:
        assert self.cache is not None
        self.cache.give_up(reason)
        text = (
            f"Activations below the sampled parameters could not be kept ({reason}): every draw evaluates the whole "
            "model on the probes, which is right and takes longer. Use cache_bytes=0 to leave out the attempt."
        )
        self.warnings.append(Warning(text, "uncached"))

    def snapshot(self, traces: list[Traces]) -> None:
        store = self._store
        assert store is not None
        steps = np.arange(self._schedule.num_steps)[self._schedule.draws]
        for t in traces:
            losses = losses_of_draws(t, self._chosen)
            for row, chain in enumerate(t.chains):
                done = int((steps < t.step).sum())
                done = int(np.isfinite(losses[row, steps[:done]]).cumprod().sum())  # a diverged chain has no more
                for draw in range(self._draws_written.get(chain, 0), done):
                    store.write("draw_loss", chain, draw, losses[row, steps[draw]])
                self._draws_written[chain] = done
        store.sync()

    # ---- afterwards ------------------------------------------------------------------------------------------

    def end(self, result: LLCResult) -> None:
        store, team = self._store, self._team
        assert store is not None
        store.sync()
        team.gather(None)  # of all chains there is what there is
        if team.rank == 0 and not result.is_partial:
            save_result(store, result)
            store.complete()
            if self._place is not None:
                _forget(self._place)
        store.close()
        team.gather(None)
        self.samples = Samples.of(store, result)


def _difference(found: Tensor, exact: Tensor) -> float:
    """The largest one of losses, over the largest loss; of a chain that diverged 0 if both did alike."""
    away = (found - exact).abs()[~(found.isnan() & exact.isnan()) & (found != exact)]
    if not away.numel():
        return 0.0
    scale = float(exact[exact.isfinite()].abs().max()) if bool(exact.isfinite().any()) else 0.0
    largest = float(away.max())
    return largest / scale if scale > 0 and not math.isnan(largest) else math.inf


def _compare(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless a store is of this run."""
    if found := differences(before, now):
        raise ValueError(
            f"store={str(place)!r} belongs to another run: {'; '.join(found)}. Give another path, or delete it "
            "(rm -r) to start again"
        )


def _minibatches(objective: Objective, seed: int) -> Iterator[Batch]:
    batches = objective.source.minibatches(seed)
    try:
        yield from itertools.islice(batches, _CHECKED)
    finally:
        if hasattr(batches, "close"):  # a loader's workers end
            batches.close()
