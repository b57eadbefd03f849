"""The step as one operation of torch, for ``torch.compile``: tensors in flat lists, one chain.

:class:`llc_fast.optim.LangevinOptimizer` calls it as ``torch.ops.llc_fast.step`` while it is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llc_fast.kernels.native import NUM_STATES, Segment, SegmentTable
from llc_fast.kernels.step import NoiseKey, StepScalars

_library = torch.library.Library("llc_fast", "DEF")  # type: ignore[no-untyped-call]


def _step_operation(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    references: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    states: Sequence[Tensor],
    preconditioners: Sequence[Tensor | None],
    preconditioner_scales: Sequence[float],
    copies: Sequence[Tensor],
    rule: str,
    offsets: Sequence[int],
    scalars: Sequence[float],
    seed: int,
    step: Tensor,
    thermostat: Tensor | None,
    sums: Tensor | None,
    wanted: Sequence[str],
) -> None:
    kept = NUM_STATES[rule]
    segments = [
        Segment(
            w=w,
            offset=offsets[k],
            reference=references[k],
            mask=masks[k],
            state=states[k * kept : (k + 1) * kept],
            preconditioner=preconditioner_scales[k] if (given := preconditioners[k]) is None else given,
            copy=copies[k] if copies else None,
        )
        for k, w in enumerate(params)
    ]
    table, key = SegmentTable(rule, segments), NoiseKey(seed, int(step))
    table.step(grads, StepScalars(*scalars), key, thermostat=thermostat, sums=sums, wanted=wanted)


_library.define(  # type: ignore[no-untyped-call]
    "step(Tensor(a!)[] params, Tensor[] grads, Tensor?[] references, Tensor?[] masks, Tensor(b!)[] states, "
    "Tensor?[] preconditioners, float[] preconditioner_scales, Tensor(c!)[] copies, str rule, int[] offsets, "
    "float[] scalars, int seed, Tensor step, Tensor? thermostat, Tensor(d!)? sums, str[] wanted) -> ()"
)
_library.impl("step", _step_operation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("llc_fast::step", lambda *_: None, lib=_library)
