"""What chains leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class ChainRecord:
    """What a group of chains has done so far.

    Attributes:
        first_chain: the chains are ``first_chain … first_chain + len(losses) − 1``.
        step: steps that are done.
        losses: float64 ``[chain, step]``, less the paired baseline if there is one; later columns hold nothing yet.
        heats: the same of :meth:`llc_fast.samplers.Sampler.bias`; NaN for samplers that do not tell.
        observables: by name, float64 ``[chain, draw, …]``.
        arrays: what changes from step to step in chains under way, see ``ChainState.arrays``; None once they are done.
        probes: what was measured on the way, float64 ``[chain, probe, column]``, see ``llc_fast.probes.COLUMNS``; NaN
            where there is nothing, or nothing yet.
        ends: w − w* by parameter, ``[chain, …]``, where the chains stopped; None unless they are done and it was asked.
    """

    first_chain: int
    step: int
    losses: NDArray[np.float64]
    heats: NDArray[np.float64]
    observables: dict[str, NDArray[np.float64]]
    arrays: dict[str, NDArray[Any]] | None
    probes: NDArray[np.float64] | None = None
    ends: dict[str, NDArray[Any]] | None = None

    @property
    def chains(self) -> range:
        return range(self.first_chain, self.first_chain + len(self.losses))

    def row(self, chain: int) -> ChainRecord:
        """The record of one chain."""
        k = chain - self.first_chain
        arrays = None if self.arrays is None else {name: a[k : k + 1] for name, a in self.arrays.items()}
        observables = {name: a[k : k + 1] for name, a in self.observables.items()}
        probes = None if self.probes is None else self.probes[k : k + 1]
        losses, heats = self.losses[k : k + 1], self.heats[k : k + 1]
        ends = None if self.ends is None else {name: a[k : k + 1] for name, a in self.ends.items()}
        return ChainRecord(chain, self.step, losses, heats, observables, arrays, probes, ends)

    @staticmethod
    def stack(records: Sequence[ChainRecord]) -> ChainRecord:
        """Consecutive chains with equally many steps as one group."""
        first = records[0]
        if len(records) == 1:
            return first
        arrays = None
        if first.arrays is not None:
            arrays = {k: np.concatenate([r.arrays[k] for r in records if r.arrays is not None]) for k in first.arrays}
        seen = {k: a for r in records for k, a in r.observables.items()}  # lost chains may have none
        observables = {
            k: np.concatenate([r.observables.get(k, np.full((len(r.losses), *a.shape[1:]), np.nan)) for r in records])
            for k, a in seen.items()
        }
        losses, heats = np.concatenate([r.losses for r in records]), np.concatenate([r.heats for r in records])
        probes = [r.probes for r in records if r.probes is not None]
        together = np.concatenate(probes) if len(probes) == len(records) else None
        found = [r.ends for r in records if r.ends is not None]
        ends = {k: np.concatenate([e[k] for e in found]) for k in found[0]} if len(found) == len(records) else None
        return ChainRecord(first.first_chain, first.step, losses, heats, observables, arrays, together, ends)
