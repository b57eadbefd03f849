"""Products of matrices in a recording."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llc_fast.gradients.replay import Recording

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(500, 160, 160), (300, 200, 130), (64, 700, 300)])
def test_large_products_by_either_library(
    sizes: tuple[int, int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever library multiplies large matrices, a replayed gradient is that of autograd, to rounding."""
    batch, fan_in, fan_out = sizes
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(fan_in, fan_out, bias=bias), torch.randn(batch, fan_in).requires_grad_()
    tensors = [x, *layer.parameters()]

    def function() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).square().mean(), tensors)

    for chosen in (True, False):
        monkeypatch.setattr(
            "llc_fast.gradients.matmul._products_by_onednn",
            lambda chosen=chosen: chosen and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
        )
        recording = Recording(function)
        with torch.no_grad():
            x.normal_()
        recording.replay()
        for replayed, fresh in zip(recording.result, function(), strict=True):
            torch.testing.assert_close(replayed, fresh, rtol=1e-4, atol=1e-4 * float(fresh.abs().max()))
