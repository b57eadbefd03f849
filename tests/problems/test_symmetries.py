"""Networks with symmetries: the rescaled ones compute the same."""

from __future__ import annotations

import pytest
import torch

from llc_fast.problems.symmetries import Symmetry, layer_norm_network, transformer_block


@pytest.mark.parametrize("make", [transformer_block, layer_norm_network])
@pytest.mark.parametrize("a", [1e-4, 0.3, 1e4])
def test_rescaled_networks_compute_the_same(make: type[Symmetry], a: float) -> None:
    symmetry = make(3)  # type: ignore[arg-type, call-arg]
    x, y = symmetry.data(20, 1)
    rescaled = symmetry.rescaled(a)
    torch.testing.assert_close(rescaled(x), y, rtol=1e-4, atol=1e-4)
    factors = symmetry.factors(a)
    named = dict(symmetry.model.named_parameters())
    assert factors.keys() <= named.keys() and len(factors) >= 6
    for name, p in rescaled.named_parameters():
        torch.testing.assert_close(p, named[name] * factors.get(name, 1.0))


@pytest.mark.parametrize("make", [transformer_block, layer_norm_network])
def test_they_follow_their_seed(make: type[Symmetry]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (make(seed) for seed in (0, 0, 1))  # type: ignore[arg-type, call-arg]
    assert torch.equal(before, torch.get_rng_state())
    for p, q, r in zip(first.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, r)
    x, y = first.data(50, 2)
    assert torch.equal(x, first.data(50, 2)[0]) and torch.equal(first.model(x).detach(), y)


def test_half_of_the_rescaling_is_another_function() -> None:
    symmetry = transformer_block(0)
    x, y = symmetry.data(20, 1)
    model = symmetry.rescaled(2.0)
    with torch.no_grad():
        model.key.weight.mul_(2.0)  # type: ignore[union-attr, operator]
    assert not torch.allclose(model(x), y, rtol=1e-2)
