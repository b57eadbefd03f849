"""Floating-point operations of a call, counted as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from llc_fast.objective.flops import FlopCounter


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda: torch.ones(3, 4) @ torch.ones(4, 5), 2 * 3 * 4 * 5),
        (lambda: F.linear(torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)), 2 * 3 * 4 * 5),
        (lambda: torch.ones(2, 3, 4) @ torch.ones(2, 4, 5), 2 * 2 * 3 * 4 * 5),
        (lambda: F.conv2d(torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3)), 2 * 2 * 4 * 3 * 9 * 9),
        (lambda: torch.ones(3, 4).exp() + 1, 0),
        (lambda: None, 0),
    ],
    ids=["product", "linear", "batched product", "convolution", "elementwise", "nothing"],
)
def test_flops_are_counted(function: Callable[[], Any], flops: int) -> None:
    """Two for each multiply and add of products, convolutions and attention; none for the rest."""
    with FlopCounter() as counter:
        function()
    assert counter.flops == flops


def test_flops_of_a_gradient() -> None:
    """Forward, and backward to weight and input: three products; to the weight alone, two. Under vmap, for each."""
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    one = 2 * 3 * 4 * 5
    for leaves, products in (((x, w), 3), ((w,), 2)):
        for t in (x, w):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        with FlopCounter() as counter:
            (x @ w).exp().sum().backward()
        assert counter.flops == products * one
    with FlopCounter() as counter:
        vmap(grad(lambda w: (x.detach() @ w).exp().sum()))(torch.ones(7, 4, 5))
    assert counter.flops == 7 * 2 * one


def test_attention_counts() -> None:
    """Fused attention counts as its two products would."""
    q = torch.ones(2, 3, 8, 4)
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.flops == 2 * (2 * 2 * 3 * 8 * 8 * 4)
