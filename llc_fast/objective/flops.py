"""Floating-point operations, counted."""

from __future__ import annotations

from typing import Any

from llc_fast.support.torch_private import CPU_ATTENTION_COUNTED_AS, DispatchMode, packet_of


class FlopCounter(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products, convolutions and attention inside ``with``."""

    flops = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        out = op(*args, **(kwargs or {}))
        formula = flop_registry.get(CPU_ATTENTION_COUNTED_AS.get(packet_of(op), packet_of(op)))
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out
