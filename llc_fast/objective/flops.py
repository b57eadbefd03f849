"""Floating-point operations, counted."""

from __future__ import annotations

from typing import Any

import torch

from llc_fast.support.torch_private import DispatchMode

_aten = torch.ops.aten

_COUNTED_AS = {  # attention on a CPU, which torch's own table leaves out
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}


class FlopCounter(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products, convolutions and attention inside ``with``."""

    flops = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        out = op(*args, **(kwargs or {}))
        formula = flop_registry.get(_COUNTED_AS.get(op._overloadpacket, op._overloadpacket))
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out
