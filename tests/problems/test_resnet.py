"""Residual networks whose filters are normalized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llc_fast.problems.resnet import resnet


def network(seed: int = 0, **options: Any) -> nn.Sequential:
    return resnet(**{"width": 4, "blocks": 1, "size": 8} | options, generator=torch.Generator().manual_seed(seed))


def test_resnet18_has_the_parameters_it_is_known_for() -> None:
    """11,173,962 with three channels, ten classes and the 3 × 3 stem, as in every CIFAR-10 implementation."""
    model = resnet(channels=3)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 17


@pytest.mark.parametrize("size", [8, 16])
def test_every_weight_matters(size: int) -> None:
    """Stages end at 2 × 2 pixels: no place of a filter sees padding only."""
    model = network(size=size)
    x = torch.randn(64, 1, size, size, generator=torch.Generator().manual_seed(1))
    F.cross_entropy(model(x), torch.arange(64) % 10).backward()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.grad is not None
            assert bool((m.weight.grad.abs().sum((0, 1)) > 0).all())


def test_samples_do_not_depend_on_their_company() -> None:
    model = network().double().train()
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-10, atol=1e-12)
    assert not list(model.buffers())


def test_scale_of_normalized_filters_is_free() -> None:
    """Each group of filters may be multiplied by a number of its own."""
    model = network().double()
    for m in model.modules():
        if isinstance(m, nn.GroupNorm):
            m.eps = 0.0
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        for k, m in enumerate(model.modules()):
            if isinstance(m, nn.Conv2d):
                for g, group in enumerate(m.weight.split(4)):
                    group.mul_(0.5 + 0.1 * k + g)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-11)


def test_wrong_arguments_of_a_network() -> None:
    for options in ({"width": 0}, {"blocks": 0}, {"width": 24}, {"size": 1}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            network(**options)
