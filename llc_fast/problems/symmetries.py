"""Networks whose parameters can be rescaled in several ways without a change of what they compute.

Each has factors D by parameter name, functions of one number a: the network with parameters D·w is the same function.

- A transformer block: the queries of a head times a and its keys over a, the values times a and the rows of the output
  matrix that read them over a.
- A network with LayerNorm: the layer before a normalization times a, which it divides out; the gains and offsets of one
  times a and the weights that read it over a.

Normalizations have ε = 10⁻²⁰, so that they divide out whatever the weights are multiplied by.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-20


class TransformerBlock(nn.Module):
    """Causal attention and a perceptron, each behind a LayerNorm and with a residual: ``[batch, position, width]``.

    Args:
        width: of the residual stream.
        heads: of attention; they divide the width.
        hidden: width of the perceptron.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first(x)
        q, k, v = (
            layer(seen).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.output(mixed)
        return x + self.outer(F.gelu(self.inner(self.second(x))))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Symmetry:
    """A network with a rescaling.

    Attributes:
        model: the network.
        inputs: one sample's shape.
        factors: D of a by parameter name, 1 for those that are not named.
    """

    model: nn.Module
    inputs: tuple[int, ...]
    factors: Callable[[float], dict[str, float]]

    @torch.no_grad()
    def rescaled(self, a: float) -> nn.Module:
        """A copy of the model with parameters D·w."""
        model, factors = copy.deepcopy(self.model), self.factors(a)
        for name, p in model.named_parameters():
            p.mul_(factors.get(name, 1.0))
        return model

    def data(self, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """Normal inputs, and what the network makes of them: L(w*) = 0."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_samples, *self.inputs, generator=generator)
        with torch.no_grad():
            return x, self.model(x)


def _with_random_biases(model: nn.Module, seed: int) -> nn.Module:
    """Weights as torch draws them, and vectors moved away from 0 and 1, all from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / math.sqrt(p.shape[1]) if p.ndim > 1 else p.round() + 0.3 * noise)
    return model


def transformer_block(seed: int, *, width: int = 12, heads: int = 2, hidden: int = 16, positions: int = 6) -> Symmetry:
    """A random block, and the rescaling of queries against keys and of values against outputs."""

    def factors(a: float) -> dict[str, float]:
        larger = {f"{layer}.{part}": a for layer in ("query", "value") for part in ("weight", "bias")}
        return larger | {"key.weight": 1 / a, "key.bias": 1 / a, "output.weight": 1 / a}

    with torch.random.fork_rng(devices=[]):
        model = _with_random_biases(TransformerBlock(width, heads, hidden), seed)
    return Symmetry(model, (positions, width), factors)


def layer_norm_network(seed: int, *, inputs: int = 8, width: int = 16, outputs: int = 16) -> Symmetry:
    """A random perceptron with LayerNorm, and the rescalings of what its normalizations divide out or pass on.

    With tanh between, for what a ReLU or GELU lets through may be nearly 0 as a whole, and a normalization without ε
    makes a singularity of that.
    """

    def factors(a: float) -> dict[str, float]:
        scaled = {"0.weight": a, "0.bias": a, "3.weight": 1 / a, "3.bias": 1 / a}
        return scaled | {"4.weight": a, "4.bias": a, "5.weight": 1 / a}

    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(
            nn.Linear(inputs, width), nn.LayerNorm(width, eps=_EPS), nn.Tanh(),
            nn.Linear(width, width), nn.LayerNorm(width, eps=_EPS), nn.Linear(width, outputs),
        )  # fmt: skip
    return Symmetry(_with_random_biases(model, seed), (inputs,), factors)
