"""Deep linear networks with a known learning coefficient, as in Furman & Lau 2024.

Their experiments are in arXiv 2402.03698, and in 2308.12108v2, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llc_fast import theory

INPUT_BOUND = 10.0
"""Inputs are uniform on [−10, 10]."""


@dataclass(frozen=True)
class SizeClass:
    """A class of networks, with the SGLD settings that the paper uses there.

    Attributes:
        widths: smallest and largest layer width.
        layers: smallest and largest number of weight matrices.
        num_samples: n.
        lr: step size ε of vanilla SGLD.
        num_steps: length of a chain.
    """

    widths: tuple[int, int]
    layers: tuple[int, int]
    num_samples: int
    lr: float
    num_steps: int


SIZE_CLASSES = {
    "1k": SizeClass((5, 50), (2, 5), 10**5, 5e-7, 10_000),
    "10k": SizeClass((5, 100), (2, 10), 10**5, 5e-7, 10_000),
    "1M": SizeClass((50, 500), (2, 10), 10**6, 1e-7, 50_000),
    "10M": SizeClass((100, 1000), (2, 20), 10**6, 2e-8, 50_000),
    "30M": SizeClass((500, 2000), (2, 20), 10**6, 2e-8, 50_000),
    "100M": SizeClass((500, 3000), (2, 40), 10**6, 2e-8, 50_000),
}
"""The paper's six, named after the order of their largest networks."""
BATCH_SIZE, LOCALIZATION = 500, 1.0


class LinearTeacher:
    """n samples (x, y): x uniform on [−10, 10]^d, y = product · x, computed when a batch is asked for."""

    def __init__(self, product: Tensor, num_samples: int, generator: torch.Generator) -> None:
        device = product.device
        inputs = torch.empty(num_samples, product.shape[1])
        self._inputs = inputs.uniform_(-INPUT_BOUND, INPUT_BOUND, generator=generator).to(device)
        self._product = product.to(torch.float32)

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples `indices`."""
        x = self._inputs.index_select(0, indices.to(self._inputs.device))
        return x, x @ self._product.T


@dataclass(frozen=True)
class DeepLinearProblem:
    """A network at its true parameter, data it generated, and the λ that theory gives.

    Attributes:
        model: ``nn.Sequential`` of bias-free linear layers; realizes the data exactly, L(w*) = 0.
        data: the data set.
        widths: H₁ … H_{L+1}.
        rank: of the product of the weights.
        learning_coefficient: Aoyagi's λ for that rank (the global one, see
            :func:`llc_fast.theory.deep_linear`; where single layers have a higher rank than the product it is a
            lower bound of the local coefficient at w*).
    """

    model: nn.Sequential
    data: LinearTeacher
    widths: tuple[int, ...]
    rank: int
    learning_coefficient: float

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def make_problem(size: str | SizeClass, seed: int, device: torch.device | str = "cpu") -> DeepLinearProblem:
    """A random network of one of the paper's classes, or of another.

    Widths and depth are uniform in the class's range; each weight is truncated normal with standard deviation
    1/√fan_in and, with probability one half, its rank is reduced to a uniform random rank in 0 … min(shape).

    Args:
        size: a key of `SIZE_CLASSES`, or a class of your own.
        seed: equal seeds give equal networks and data on the same device.
        device: where model and data live.

    Raises:
        ValueError: an unknown size.
    """
    if isinstance(size, str) and size not in SIZE_CLASSES:
        raise ValueError(f"size={size!r} is unknown; choose one of: {', '.join(SIZE_CLASSES)}")
    cls = SIZE_CLASSES[size] if isinstance(size, str) else size
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    layers = integer(*cls.layers)
    widths = tuple(integer(*cls.widths) for _ in range(layers + 1))
    weights, rank = [], min(widths)
    for fan_in, fan_out in itertools.pairwise(widths):
        weight, weight_rank = _random_weight(fan_in, fan_out, generator, torch.device(device))
        weights.append(weight)
        rank = min(rank, weight_rank)
    return DeepLinearProblem(
        model=network(weights),
        data=LinearTeacher(end_to_end(weights), cls.num_samples, generator),
        widths=widths,
        rank=rank,
        learning_coefficient=theory.deep_linear(widths, rank).value,
    )


def most_singular(
    widths: tuple[int, ...], rank: int, num_samples: int, seed: int, device: torch.device | str = "cpu"
) -> DeepLinearProblem:
    """A network all of whose layers have the rank of their product, where Aoyagi's λ is the local coefficient too.

    Weights are normal with standard deviation 1/√fan_in, truncated to `rank` singular values: in general position the
    product keeps the rank. Near such a point the network is that of widths H − rank at the origin, its most singular
    place, times something regular.

    Raises:
        ValueError: `rank` is larger than a width.
    """
    if not 0 < rank <= min(widths):
        raise ValueError(f"rank must be from 1 to the smallest width, {min(widths)}, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for fan_in, fan_out in itertools.pairwise(widths):
        full = torch.randn(fan_out, fan_in, dtype=torch.float64, generator=generator) / fan_in**0.5
        u, s, v = torch.linalg.svd(full.to(device), full_matrices=False)
        weights.append((u[:, :rank] * s[:rank]) @ v[:rank])
    return DeepLinearProblem(
        model=network(weights),
        data=LinearTeacher(end_to_end(weights), num_samples, generator),
        widths=widths,
        rank=rank,
        learning_coefficient=theory.deep_linear(widths, rank).value,
    )


def network(weights: list[Tensor]) -> nn.Sequential:
    """Bias-free linear layers with the given weights, each ``[fan_out, fan_in]``, in float32."""
    model = nn.Sequential()
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=torch.float32)
        with torch.no_grad():
            layer.weight.copy_(weight)
        model.append(layer)
    return model


def _random_weight(fan_in: int, fan_out: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, int]:
    weight = torch.empty(fan_out, fan_in, dtype=torch.float64)
    nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0, generator=generator)
    weight = weight.to(device) / fan_in**0.5
    rank = min(fan_in, fan_out)
    if torch.rand((), generator=generator) < 0.5:
        rank = int(torch.randint(0, rank + 1, (), generator=generator))
        # In float64: a float32 SVD leaves singular values near 1e-8 that look like rank.
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight = (u[:, :rank] * s[:rank]) @ v[:rank]
    return weight.to(torch.float32), rank


def end_to_end(weights: Sequence[Tensor]) -> Tensor:
    """The product W_L ⋯ W_1 of the weights, multiplied in float64."""
    product = weights[0].double()
    for weight in weights[1:]:
        product = weight.double() @ product
    return product
