"""Losses at w*: L(w*) as the average that chains see, and the control variate of their minibatches."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast.data import (
    Batch,
    IndexedSource,
    batch_length,
    leaves,
    map_tensors,
)
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.objective import Objective, checked_init_loss, widened
from llc_fast.objective.weightings import PLAIN, ByElements, Losses, Measure, one_by_one, together, weighted
from llc_fast.support.errors import first_line

Pairing = Literal["samples", "passes", "draws", "none"]
"""What stands against the loss of a chain's minibatch: the mean of what its samples lose at w*; what the minibatch at
the same place of every pass loses; what an evaluation of the minibatch at w* finds, at draws; nothing."""

_CHECKED_BATCHES = 8
_SLACK = 1e-3
"""The part of L_B(w*)'s spread over minibatches that may stay unexplained."""
_NEGLIGIBLE = 1e-3
"""A difference of λ̂ that does not matter."""
_CHECKED_ONE_BY_ONE = 2
"""How many minibatches are checked where samples have to be evaluated one by one."""
_FEW_SAMPLES = 4096
"""Samples that are evaluated one by one, if nobody says how many."""
_MAX_SAMPLES = 2**27
"""A gibibyte of losses."""
_PRELIMINARY_BATCHES = 32
"""Minibatches whose mean is L(w*) until the draws have given a better one."""
_STANDING_BATCHES, _STANDING_ERRORS = 16, 7.0
"""Minibatches at w* that a chain standing still would see, and the standard errors that their λ̂ may be from 0: by
chance once in 10⁵ runs, with so few."""


class ControlVariate:
    """b_B = L_B(w*) − L(w*) of any minibatch B.

    A chain's loss less this, L_B(w_t) − L_B(w*) + L(w*), has the expectation of L_B(w_t), since b_B has that of zero.
    What the two share is gone: how hard the samples of the minibatch are.

    Args:
        deviations: of minibatches that are known by their samples, what each sample adds to b_B, float64 ``[n]``; of
            minibatches that are known by their place in a pass, b_B itself, ``[num_batches]``.
        by_sample: which of these.
        weights: of samples, ``[n]``, by whose sum b_B is to be divided; None: there are none.
    """

    def __init__(self, deviations: Losses, *, by_sample: bool, weights: Losses | None = None) -> None:
        self._deviations, self._weights, self.by_sample = deviations, weights, by_sample
        self._tensors: list[Tensor] = []

    @classmethod
    def of_samples(
        cls, losses: Losses, init_loss: float, batch_size: int, weights: Losses | None = None
    ) -> ControlVariate:
        """From the loss of every sample at w*, ``[n]``: a gather and a sum.

        Where samples weigh differently, L_B = Σ wᵢℓᵢ / Σ wᵢ, and b_B = Σ wᵢ(ℓᵢ − L(w*)) / Σ wᵢ.
        """
        if weights is None:
            return cls((losses - init_loss) / batch_size, by_sample=True)
        return cls(weighted(losses - init_loss, weights), by_sample=True, weights=weights)

    @classmethod
    def of_passes(cls, losses: Losses, init_loss: float) -> ControlVariate:
        """From the loss at w* of every minibatch of a pass that is always the same, ``[num_batches]``."""
        return cls(losses - init_loss, by_sample=False)

    def __call__(self, indices: NDArray[np.int64]) -> Losses:
        """b_B ``[chain]`` of minibatches given by the indices of their samples, ``[chain, batch_size]``."""
        values: Losses = np.add.reduce(self._deviations.take(indices), axis=1)
        if self._weights is not None:
            with np.errstate(invalid="ignore"):  # none of its samples counts: no loss is known, the chain's neither
                values = values / np.add.reduce(self._weights.take(indices), axis=1)
        return values

    def at(self, step: int) -> float:
        """b_B of the minibatch of a step, by its place in the pass."""
        return float(self._deviations[step % len(self._deviations)])

    def on_device(self, indices: Tensor) -> Tensor:
        """b_B ``[chain]`` by the indices of samples, where these are."""
        if not self._tensors or self._tensors[0].device != indices.device:
            tables = [self._deviations] if self._weights is None else [self._deviations, self._weights]
            self._tensors = [torch.from_numpy(table).to(indices.device) for table in tables]
        sums = [table.take(indices).sum(1) for table in self._tensors]
        return sums[0] if len(sums) == 1 else sums[0] / sums[1]


@dataclass(frozen=True)
class ReferenceLosses:
    """The losses at w*.

    Attributes:
        mean: L(w*), the average of what minibatches lose at w*; of draws that are evaluated at w* themselves, over a
            few minibatches, and λ̂ does not depend on it.
        stderr: of the mean.
        pairing: what the chains' losses are paired with.
        unpaired_reason: why there is no control variate; empty if there is.
        losses: at w*, of every sample or of every minibatch of a pass, float64; None where they are not needed.
        weights: of the samples, where minibatches lose their weighted mean, by tokens or classes; None: the plain one.
        slope: of draws that are evaluated at w*: what a minibatch loses over the mean of what its samples lose by
            themselves, both less their mean; it takes a part of the noise out of L(w*).
        standing: λ̂ of a chain that stands still, by a few minibatches at w*, and its standard error.
    """

    mean: float
    stderr: float
    pairing: Pairing
    unpaired_reason: str = ""
    losses: Losses | None = None
    weights: Losses | None = None
    slope: float = 0.0
    standing: tuple[float, float] = (0.0, 0.0)

    @property
    def is_still(self) -> bool:
        """Whether a chain that stands still has λ̂ = 0, within its error."""
        value, error = self.standing
        return abs(value) <= _STANDING_ERRORS * error + _NEGLIGIBLE

    def control_variate(self, batch_size: int | None, init_loss: float) -> ControlVariate | None:
        """That of minibatches about `init_loss`; None where there is none.

        Where draws are evaluated at w*, it is that of what this finds, not of what the chains find.
        """
        if self.losses is None or self.pairing == "none":
            return None
        if self.pairing == "passes":
            return ControlVariate.of_passes(self.losses, init_loss)
        if self.pairing == "draws":
            deviations = self.slope * (self.losses - self.losses.mean())
            return ControlVariate.of_samples(deviations, 0.0, batch_size or 1)
        return ControlVariate.of_samples(self.losses, init_loss, batch_size or 1, self.weights)


def reference_losses(
    objective: Objective, nbeta: float, seed: int = 0, affordable: int = _FEW_SAMPLES
) -> ReferenceLosses:
    """L(w*), and what the chains' losses can be paired with.

    L(w*) and the chains' losses are the same average of the same function. Where a minibatch's loss is the mean of what
    its samples lose, and a pass has every sample, L(w*) is exact. Where it is their mean weighted by numbers of tokens,
    by classes or by weights in the data, what any minibatch loses is known as well; L(w*) is the average over many, and
    drops out of λ̂. Where every pass has the same minibatches, it is their mean. Otherwise (losses over pairs, of batch
    statistics, random ones, random data) every draw's minibatch is evaluated at w* too, with the same random numbers,
    and L(w*) drops out again.

    It takes one pass over the data, or a few minibatches.

    Args:
        objective: the model, its loss and data.
        nbeta: nβ, which says what difference of losses matters.
        seed: of the minibatches.
        affordable: samples that may be evaluated one by one, where torch.func can't evaluate them together.

    Raises:
        ValueError: L(w*) is not finite, or the data give no sample.
    """
    found = _Reference(objective, nbeta, seed, affordable).find()
    checked_init_loss(found.mean)
    return found


class _Reference:
    def __init__(self, objective: Objective, nbeta: float, seed: int, affordable: int) -> None:
        self._objective, self._source = objective, objective.source
        self._nbeta, self._seed, self._affordable = nbeta, seed, affordable
        self._reason = self._why_no_function()
        self._rounding = objective.rounding

    def find(self) -> ReferenceLosses:
        source = self._source
        if not self._reason:
            if isinstance(source, IndexedSource) and source.is_full_batch:
                return self._of_full_batch()
            found = None
            if isinstance(source, IndexedSource):
                found = self._of_samples(source)
            elif source.sampling.order == "fixed":
                found = self._of_passes()
            else:
                self._reason = "a loader does not say which samples it gives"
            if found is None and source.sampling.full_is_exact:
                found = self._of_everything()
            if found is not None:
                return found
        return self._of_draws()

    def _why_no_function(self) -> str:
        """Why the loss of a minibatch is no function of its samples; empty if it is one."""
        trial, sampling = self._objective.trial, self._source.sampling
        if trial.is_random:
            return "the model draws random numbers" if trial.is_reproducible else "the loss changes from call to call"
        if trial.writes_buffers or trial.writes_parameters:
            return "the model writes to its buffers" if trial.writes_buffers else "the model writes to its parameters"
        if sampling.reads_randomly or not sampling.is_reproducible:
            return "the data are other ones each time they are read (augmentation)"
        return ""

    def _of_full_batch(self) -> ReferenceLosses:
        """The only minibatch, as chains evaluate it."""
        batch = next(iter(self._source.minibatches(self._seed)))
        with self._objective.at_reference():
            mean = self._loss(batch)
        reason = "a minibatch is the whole data set"
        return ReferenceLosses(mean, self._rounding * abs(mean), "none", reason)

    def _of_samples(self, source: IndexedSource) -> ReferenceLosses | None:
        """By the loss of every sample; None if a minibatch's loss is not the mean of these, or they can't be had."""
        objective = self._objective
        if not objective.trial.has_tensor_batches:
            self._reason = "batches hold more than tensors"
            return None
        if (source.num_samples or 0) > _MAX_SAMPLES:
            self._reason = f"more than {_MAX_SAMPLES} samples"
            return None
        found = self._sample_losses(source)
        if found is None:
            return None
        weighting, samples, weights = found
        if samples is None:
            self._reason = _NOT_THE_MEAN
            return self._of_draws()
        if not np.isfinite(samples if weights is None else weighted(samples, weights)).all():
            self._reason = "the loss of single samples is not finite"
            return None
        if weighting is None:
            self._reason = _NOT_THE_MEAN
            return self._of_draws(source, samples)
        size = source.batch_size or 1
        mean = float(samples.mean())
        if weights is not None:
            mean = float(weighted(samples, weights).sum() / weights.sum())
            mean += self._average(source, ControlVariate.of_samples(samples, mean, size, weights))
        error = self._rounding * abs(mean)
        variate = ControlVariate.of_samples(samples, mean, size, weights)
        spread = self._spread(samples) if weights is None else _spread_of(samples, weights, size)
        if self._nbeta * spread < _NEGLIGIBLE:
            return ReferenceLosses(mean, error, "none", _SAME_EVERYWHERE)
        standing = self._standing(
            lambda step, loss: loss - float(variate(self._indices(source, step))[0]) - mean, error
        )
        return ReferenceLosses(mean, error, "samples", losses=samples, weights=weights, standing=standing)

    def _average(self, source: IndexedSource, variate: ControlVariate) -> float:
        """The mean of b_B over many minibatches."""
        rows = source.index_buffer(_AVERAGED // 64)
        keys = (NoiseKey(self._seed, step=step, chain=_NO_CHAIN) for step in range(64))
        means = [np.nanmean(variate(source.sample_indices(key, rows).cpu().numpy())) for key in keys]
        return float(np.mean(means))

    def _sample_losses(self, source: IndexedSource) -> tuple[str | None, Losses | None, Losses | None] | None:
        """How minibatches' losses are means of samples' (None: they are not), what samples lose, and their weights.

        None altogether: nobody can say. They are evaluated together, or by the elements of the model's outputs, or
        else, where there are few enough, one by one. What they lose is then left out if minibatches lose something
        else.
        """
        measures: list[Measure] = [together, ByElements()]
        if (source.num_samples or 0) <= self._affordable:
            measures.append(one_by_one)
        problems = list[str]()
        for measure in measures:
            try:
                # Where torch would go through the samples one by one it warns: not without having been counted.
                with self._objective.at_reference(), warnings.catch_warnings():
                    warnings.filterwarnings("error", message=".*performance drop")
                    possible = self._weightings_of_a_few(source, measure)
                    if measure is one_by_one and not possible:
                        return None, None, None
                    samples, known = self._of_all(source, measure, possible)
                    weighting = self._decided(source, measure, known)
                    return weighting, samples, known[weighting] if weighting else None
            except Exception as problem:
                problems.append(first_line(problem))
        self._reason = f"the loss of single samples can't be had: {problems[0]}"
        return None

    def _of_all(self, source: IndexedSource, measure: Measure, possible: set[str]) -> tuple[Losses, dict[str, Losses]]:
        """What all samples lose, and their weights by those of the names that they all have."""
        losses, weights = list[Losses](), dict[str, list[Losses]]()
        for batch, _ in source.full():
            own, found = measure(self._objective, batch, possible)
            losses.append(own)
            for name, values in found.items():
                weights.setdefault(name, []).append(values)
        samples = np.concatenate(losses)
        whole = {name: np.concatenate(parts) for name, parts in weights.items() if len(parts) == len(losses)}
        return samples, whole

    def _indices(self, source: IndexedSource, step: int) -> NDArray[np.int64]:
        key = NoiseKey(self._seed, step=step, chain=_NO_CHAIN)
        found: NDArray[np.int64] = source.sample_indices(key, source.index_buffer(1)).cpu().numpy()
        return found

    def _of_passes(self) -> ReferenceLosses:
        """By the minibatches of a pass, which are those of all passes."""
        with self._objective.at_reference():
            losses = np.array([self._loss(batch) for batch, _ in self._source.full()])
        mean = float(losses.mean()) if len(losses) else math.nan
        error = self._rounding * abs(mean)
        if self._nbeta * float(losses.std()) < _NEGLIGIBLE:
            return ReferenceLosses(mean, error, "none", _SAME_EVERYWHERE)
        standing = self._standing(lambda step, loss: loss - losses[step % len(losses)], error)
        return ReferenceLosses(mean, error, "passes", losses=losses, standing=standing)

    def _of_everything(self) -> ReferenceLosses | None:
        """By a pass that has every sample; None if a minibatch's loss is not the mean of what its samples lose."""
        objective = self._objective
        try:
            with objective.at_reference():
                if not self._mixes():
                    self._reason = self._reason or _NOT_THE_MEAN
                    return None
                mean, error = objective.full_loss()
        except Exception:  # a model for batches of one size can't take those of a whole pass
            return None
        standing = self._standing(lambda step, loss: loss - mean, error)
        return ReferenceLosses(mean, error, "none", self._reason, standing=standing)

    def _of_draws(self, source: IndexedSource | None = None, samples: Losses | None = None) -> ReferenceLosses:
        """By the draws themselves; L(w*) over a few minibatches until these are made.

        What samples lose by themselves, where it is known, takes a part of the noise out of L(w*).
        """
        found = np.array(list(self._at_reference(_PRELIMINARY_BATCHES)))
        losses, slope = found[:, 1], 0.0
        spread = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
        if source is not None and samples is not None:
            variate = ControlVariate.of_samples(samples, float(samples.mean()), source.batch_size or 1)
            own = np.array([float(variate(self._indices(source, int(step)))[0]) for step in found[:, 0]])
            slope = float(np.cov(own, losses)[0, 1] / own.var(ddof=1)) if own.any() else 0.0
            losses = losses - slope * own
        mean, rest = float(losses.mean()), float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
        error = math.hypot(self._rounding * abs(mean), rest / math.sqrt(len(losses)))
        if self._nbeta * spread < _NEGLIGIBLE:
            return ReferenceLosses(mean, error, "none", _SAME_EVERYWHERE)
        return ReferenceLosses(mean, error, "draws", self._reason, losses=samples, slope=slope)

    # ---- evaluations -------------------------------------------------------------------------------------------

    def _loss(self, batch: Batch) -> float:
        objective = self._objective
        return float(objective.minibatch_loss(objective.reference, batch, objective.fresh_buffers()))

    def _at_reference(self, count: int) -> Iterator[tuple[int, float]]:
        """Steps and losses at w* of minibatches like those of chains, as a chain evaluates them."""
        batches = self._source.minibatches(self._seed, _NO_CHAIN)
        with torch.enable_grad():
            for step, batch in enumerate(itertools.islice(batches, count)):
                yield step, self._loss(batch)

    def _standing(self, residual: Callable[[int, float], float], rounding: float) -> tuple[float, float]:
        """λ̂ of a chain that stands still and its error, from what minibatches lose beyond what they should."""
        values = np.array([residual(step, loss) for step, loss in self._at_reference(_STANDING_BATCHES)])
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return self._nbeta * float(values.mean()), self._nbeta * math.hypot(error, 4 * rounding)

    def _spread(self, samples: Losses) -> float:
        return float(samples.std()) / math.sqrt(self._source.batch_size or 1)

    # ---- whether a minibatch's loss is a mean ------------------------------------------------------------------

    def _weightings_of_a_few(self, source: IndexedSource, measure: Measure) -> set[str]:
        """How a few minibatches' losses at w* are means of what their samples lose, each beside those of others."""
        exact = self._objective.in_full_precision()
        count = _CHECKED_ONE_BY_ONE if measure is one_by_one else _CHECKED_BATCHES
        keys = [NoiseKey(self._seed, step=step) for step in range(count)]
        rows = [source.sample_indices(key, source.index_buffer(1))[0] for key in keys]
        mixed = torch.stack(rows, dim=1)  # read again for this: a data set may augment, a model work in place
        pieces = [measure(exact, _exact_batch(source, part), None) for part in mixed.reshape(len(rows), -1)]
        losses = np.concatenate([own for own, _ in pieces]).reshape(mixed.shape)
        names = set.intersection(*(set(found) for _, found in pieces))
        weights = {name: np.concatenate([found[name] for _, found in pieces]).reshape(mixed.shape) for name in names}
        for k, indices in enumerate(rows):
            own = {name: values[:, k] for name, values in weights.items() if name in names}
            names = self._weightings_of(exact, source, indices, losses[:, k], own)
        return names

    def _weightings_of(
        self, exact: Objective, source: IndexedSource, indices: Tensor, losses: Losses, weights: Mapping[str, Losses]
    ) -> set[str]:
        """Those by which the loss of a minibatch is the mean of what its samples lose."""
        with torch.enable_grad():  # as chains do
            loss = exact.minibatch_loss(exact.reference, _exact_batch(source, indices), exact.fresh_buffers())
        counted = losses[np.isfinite(losses)]
        slack = _SLACK * self._spread(counted) + 4 * torch.finfo(loss.dtype).eps * float(np.abs(counted).mean())
        slack += _NEGLIGIBLE / self._nbeta
        means = {name: weighted(losses, own).sum() / own.sum() for name, own in weights.items() if own.any()}
        return {name for name, mean in means.items() if abs(float(loss) - mean) <= slack}

    def _decided(self, source: IndexedSource, measure: Measure, weights: Mapping[str, Losses]) -> str | None:
        """The one weighting by which every minibatch's loss is a mean; None: there is none.

        Those that a few minibatches could not tell apart are, by one that holds the samples in which they differ most.
        """
        names = sorted(weights, key=lambda name: (name != PLAIN, len(name), name))
        shares = {name: values / values.mean() for name, values in weights.items()}
        size = source.batch_size or 1
        exact: Objective | None = None  # in low precision it is a copy of the model, which few need
        while size > 1 and names:
            pairs = ((other, np.abs(shares[names[0]] - shares[other])) for other in names[1:])
            other, apart = next(((name, d) for name, d in pairs if d.max() > _SLACK), ("", np.empty(0)))
            if not len(apart):
                break
            order = np.argsort(-apart, kind="stable")
            rows = np.concatenate([order[: -(-size // 2)], order[len(order) - size // 2 :]])
            exact, indices = exact or self._objective.in_full_precision(), torch.from_numpy(rows)
            own, _ = measure(exact, _exact_batch(source, indices), {PLAIN})
            holding = self._weightings_of(exact, source, indices, own, {name: weights[name][rows] for name in names})
            names = [name for name in names if name in holding and (name != other or names[0] not in holding)]
        return names[0] if names else None

    def _mixes(self) -> bool:
        """Whether two minibatches lose as much when they have exchanged half of their samples: so it is with means."""
        batches = list(itertools.islice(self._source.minibatches(self._seed, _NO_CHAIN), _CHECKED_BATCHES))
        if all(batch_length(batch) == 1 for batch in batches):
            return True
        pairs = [(a, b) for a, b in zip(batches[::2], batches[1::2], strict=False) if _can_exchange(a, b)]
        if not pairs:
            return False
        with torch.enable_grad():
            before = np.array([[self._loss(batch) for batch in pair] for pair in pairs])
            after = np.array([[self._loss(batch) for batch in _exchanged(*pair)] for pair in pairs])
        rounding = 16 * self._rounding * np.abs(before).max()
        slack = _SLACK * float(before.std()) + rounding + _NEGLIGIBLE / self._nbeta
        return bool((np.abs(before.sum(1) - after.sum(1)) <= slack).all())


_NOT_THE_MEAN = (
    "a minibatch's loss is not the mean of what its samples lose by themselves, nor one weighted by their numbers of "
    "tokens, their classes or weights in the data (batch statistics, a loss over pairs?)"
)
_SAME_EVERYWHERE = "the loss at w* is the same on all minibatches, or nearly"
_AVERAGED = 2**13
"""Minibatches whose mean is L(w*), where samples weigh differently."""
_NO_CHAIN = 2**31
"""The chain whose minibatches are looked at before there are chains."""


def _exact_batch(source: IndexedSource, indices: Tensor) -> Batch:
    return map_tensors(widened, source.gather(indices.to(source.index_buffer(1).device)))


def _spread_of(losses: Losses, weights: Losses, batch_size: int) -> float:
    """The standard deviation over minibatches of their weighted mean, to first order."""
    weights = weights / weights.mean()
    mean = weighted(losses, weights).mean()
    return float(weighted(losses - mean, weights).std()) / math.sqrt(batch_size)


def _can_exchange(a: Batch, b: Batch) -> bool:
    length = batch_length(a)
    if length < 2 or not all(isinstance(t, Tensor) and t.ndim and len(t) == length for t in (*leaves(a), *leaves(b))):
        return False
    return all(s.shape == t.shape for s, t in zip(leaves(a), leaves(b), strict=True))


def _exchanged(a: Batch, b: Batch) -> tuple[Batch, Batch]:
    half = batch_length(a) // 2

    def joined(first: Batch, second: Batch) -> Batch:
        others = iter(leaves(second))
        return map_tensors(lambda t: torch.cat([t[:half], next(others)[half:]]), first)

    return joined(a, b), joined(b, a)
