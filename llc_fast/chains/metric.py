"""A metric that follows chains: when it is renewed, and from what."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llc_fast.data import mix
from llc_fast.objective.kronecker import GaussNewton, curvature_in
from llc_fast.objective.objective import Objective
from llc_fast.samplers.kronecker import KFACSGLDSampler, KroneckerState

_METRIC = 0x6FAC
"""Sets the seed of the metric's minibatches and signs apart from those of all chains."""


class MetricOfChains:
    """Renews the Kronecker-factored metric of chains before the steps that ask for it.

    Args:
        objective: what is sampled.
        state: of the chains.
        buffers: of the chains, which an evaluation here leaves as they are.
        first_chain: the number of the state's first row.
        seed: of the run.

    Raises:
        ValueError: the model's Gauss–Newton matrix can't be had.
    """

    def __init__(
        self, objective: Objective, state: KroneckerState, buffers: Mapping[str, Tensor], first_chain: int, seed: int
    ) -> None:
        self._state, self._buffers, self._first_chain = state, buffers, first_chain
        self._factors = GaussNewton(objective, mix(seed, _METRIC))
        if state.is_matrix != self._factors.is_matrix:
            state.set_matrices(self._factors.is_matrix)

    @property
    def described(self) -> str:
        """Which parameters' metrics are Kronecker-factored, and why others with more than one dimension are not."""
        found = self._factors
        text = f"Kronecker-factored metric for {sum(found.is_matrix)} of {len(found.is_matrix)} parameters"
        others = ", ".join(f"{name} ({reason})" for name, reason in found.diagonal_because.items())
        return text + (f"; diagonal for {others}" if others else "")

    def __call__(self, step: int) -> None:
        """Before the step."""
        state = self._state
        if not state.is_due(step):
            return
        factors = None
        if state.needs_factors(step):
            factors = [
                self._factors(
                    {name: p.detach() for name, p in state.single(row).items()},
                    self._buffers,
                    step,
                    self._first_chain + row,
                )
                for row in range(state.num_chains)
            ]
        state.renew(step, factors)


@torch.no_grad()
def kronecker_stiffness(objective: Objective, sampler: KFACSGLDSampler, seed: int) -> float:
    """λ_max(√P·(nβH + γ + μ)·√P) at w*, with P the metric that draws would have there."""
    state = KroneckerState(objective.reference, objective.masks, sampler, 1)
    state.start(0, seed)
    found = GaussNewton(objective, mix(seed, _METRIC))
    state.set_matrices(found.is_matrix)
    factors = [found(objective.reference, objective.fresh_buffers(), 0, 0)]
    state.renew(int(state.adapts_until), factors)
    names = list(objective.reference)

    def metric(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = state.times_metric(state.rows_of([vector[name] for name in names]), 0, 1.0)
        return {name: state.of_rows(rows, k)[0] for k, name in enumerate(names)}

    largest = curvature_in(objective, metric, seed=seed)
    assert sampler.nbeta is not None
    return sampler.nbeta * largest + 1.0
