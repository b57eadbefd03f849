"""What chains leave behind: named arrays with a leading chain axis, kept, joined, cut and stored in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

LOSS = "loss"
"""The name of the trace that every chain has; the others are those that the sampler's transitions return."""
REFERENCE_LOSS = "reference_loss"
"""The name of the trace of what the minibatches of draws lose at w*, where they are evaluated there."""


@dataclass
class Traces:
    """What consecutive chains have left behind so far.

    Attributes:
        first_chain: the chains are ``first_chain … first_chain + num_chains − 1``.
        step: steps that are done.
        steps: by name, float64 ``[chain, step]``: the loss of every step, less the control variate if there is one, and
            what the sampler's transitions return (``Sampler.traces``). Columns from `step` on hold NaN.
        draws: what observables returned, by name, float64 ``[chain, draw, …]``; NaN where there is no draw yet.
        checks: what the step checks measured, float64 ``[chain, check, column]``, see ``llc_fast.chains.step_checks``;
            NaN where there is nothing, or nothing yet.
        state: what changes from step to step in chains under way, ``[chain, …]``, see ``ChainState.arrays``; None once
            they are done.
        ends: w − w* by parameter, ``[chain, …]``, where the chains stopped; None unless they are done and it was asked.
    """

    first_chain: int
    step: int
    steps: Arrays
    draws: Arrays = field(default_factory=dict)
    checks: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0, 0)))
    state: Arrays | None = None
    ends: Arrays | None = None

    @classmethod
    def blank(cls, chains: range, num_steps: int, names: Sequence[str], checks: tuple[int, int]) -> Traces:
        """Those of chains that have done nothing.

        Args:
            chains: which.
            num_steps: of each.
            names: of the traces beside the loss.
            checks: step checks of a chain, and columns of each.
        """
        return cls(
            chains.start,
            0,
            {name: np.full((len(chains), num_steps), np.nan) for name in (LOSS, *names)},
            checks=np.full((len(chains), *checks), np.nan),
        )

    @property
    def loss(self) -> NDArray[np.float64]:
        return self.steps[LOSS]

    @property
    def chains(self) -> range:
        return range(self.first_chain, self.first_chain + len(self.loss))

    def _groups(self) -> list[Mapping[str, NDArray[Any]]]:
        """All arrays: those with a name, and those without as if they had one."""
        return [self.steps, self.draws, {"": self.checks}, self.state or {}, self.ends or {}]

    def _made_of(self, first_chain: int, groups: Sequence[Arrays], has_state: bool, has_ends: bool) -> Traces:
        steps, draws, checks, state, ends = groups
        return Traces(
            first_chain, self.step, steps, draws, checks[""], state if has_state else None, ends if has_ends else None
        )

    def row(self, chain: int) -> Traces:
        """Those of one chain; views."""
        k = chain - self.first_chain
        groups = [{name: a[k : k + 1] for name, a in group.items()} for group in self._groups()]
        return self._made_of(chain, groups, self.state is not None, self.ends is not None)

    def as_now(self) -> Traces:
        """With the same arrays, of which later steps write only what this one does not say is done."""
        return replace(self, steps=dict(self.steps), draws=dict(self.draws))

    def resized(self, num_steps: int, first_draw: int, num_draws: int, checks: Sequence[int | None]) -> Traces:
        """Those of a run of another length, with the same steps as far as they are done.

        Args:
            num_steps: of each chain.
            first_draw: the draw of this run that is the first of the other one.
            num_draws: of each chain.
            checks: which step check of this run each of the other one is; None: none of them.
        """
        table = np.full((len(self.loss), len(checks), *self.checks.shape[2:]), np.nan)
        for new, old in enumerate(checks):
            if old is not None:
                table[:, new] = self.checks[:, old]
        return replace(
            self,
            step=min(self.step, num_steps),
            steps={name: _as_long(values, num_steps) for name, values in self.steps.items()},
            draws={name: _as_long(values[:, first_draw:], num_draws) for name, values in self.draws.items()},
            checks=table,
        )

    def copy(self) -> Traces:
        """Apart from the memory that the chains go on to write to."""
        groups = [{name: a.copy() for name, a in group.items()} for group in self._groups()]
        return self._made_of(self.first_chain, groups, self.state is not None, self.ends is not None)

    @staticmethod
    def stack(traces: Sequence[Traces]) -> Traces:
        """Consecutive chains as one group, whose `step` is that of the last to get on.

        A name that some of them lack (diverged chains may have made no draw) is NaN there. State and ends are kept if
        all of them have one.
        """
        first = traces[0]
        if len(traces) == 1:
            return first
        has_state, has_ends = (all(getattr(t, name) is not None for t in traces) for name in ("state", "ends"))
        traces = [
            replace(t, state=t.state if has_state else None, ends=t.ends if has_ends else None) for t in traces
        ]  # as large as the models
        groups: list[Arrays] = []
        for parts in zip(*(t._groups() for t in traces), strict=True):
            like = {name: a for part in parts for name, a in part.items()}
            groups.append({name: np.concatenate(_rows(name, a, parts, traces)) for name, a in like.items()})
        found = first._made_of(first.first_chain, groups, has_state, has_ends)
        found.step = min(t.step for t in traces)
        return found

    # ---- as plain arrays and numbers, for files ------------------------------------------------------------

    def to_arrays(self) -> tuple[dict[str, Any], Arrays]:
        """Numbers for JSON, and arrays by name; steps that are not done are left out."""
        numbers = {
            "first_chain": self.first_chain,
            "step": self.step,
            "num_steps": self.loss.shape[1],
            "has_state": self.state is not None,
            "has_ends": self.ends is not None,
        }
        arrays: Arrays = {"checks": self.checks}
        arrays |= {f"step.{name}": a[:, : self.step] for name, a in self.steps.items()}
        for kind, group in (("draw", self.draws), ("state", self.state or {}), ("end", self.ends or {})):
            arrays |= {f"{kind}.{name}": a for name, a in group.items()}
        return numbers, arrays

    @classmethod
    def from_arrays(cls, numbers: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Traces:
        """What :meth:`to_arrays` gave."""

        def part(kind: str) -> Arrays:
            return {name.removeprefix(f"{kind}."): a for name, a in arrays.items() if name.startswith(f"{kind}.")}

        steps = {}
        for name, done in part("step").items():
            steps[name] = np.full((len(done), numbers["num_steps"]), np.nan)
            steps[name][:, : numbers["step"]] = done
        return cls(
            numbers["first_chain"],
            numbers["step"],
            steps,
            part("draw"),
            np.array(arrays["checks"]),
            part("state") if numbers["has_state"] else None,
            part("end") if numbers["has_ends"] else None,
        )


def _as_long(values: NDArray[Any], length: int) -> NDArray[Any]:
    """``[chain, length, …]``, cut off or filled up with NaN."""
    found = np.full((len(values), length, *values.shape[2:]), np.nan)
    kept = min(length, values.shape[1])
    found[:, :kept] = values[:, :kept]
    return found


def _rows(
    name: str, like: NDArray[Any], parts: Sequence[Mapping[str, NDArray[Any]]], traces: Sequence[Traces]
) -> list[NDArray[Any]]:
    """The arrays of that name, NaN where there is none."""
    return [
        part[name] if name in part else np.full((len(t.chains), *like.shape[1:]), np.nan)
        for part, t in zip(parts, traces, strict=True)
    ]
