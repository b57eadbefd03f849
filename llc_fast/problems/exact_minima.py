"""Small networks that are exactly at a minimum of their loss, with noisy data and a λ that is known.

A network that was trained sits near a minimum, and chains find lower loss while they slide along its valley. Here the
data are made to fit a network w* that was chosen at random: every input comes twice, with targets that differ from the
network's own output by +δ and by −δ. The mean over the pair is what the network says, so that w* is a global minimum to
rounding, while minibatches, which mostly hold one of the two, give noisy gradients as they do in practice.

Where the rank of the Fisher information does not change near w*, the minima form a manifold, the loss is quadratic
across it, and λ is half that rank (Watanabe 2009): so for the networks of this file, whose random weights are in
general position. That is half the number of parameters if no symmetry is continuous, and less in attention, where
queries may be multiplied by any matrix that keys are divided by.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExactMinimum:
    """A network at a global minimum of its loss, and the data.

    Attributes:
        model: at w*, float32.
        data: (inputs, targets), in pairs: samples 2k and 2k + 1 have the same inputs and opposite noise.
        means: (inputs, targets) of the pairs, half as many: the same loss for all w, but for a constant.
        loss_fn: of outputs and targets.
        learning_coefficient: λ at w*, half the rank of the Fisher information.
    """

    model: nn.Module
    data: tuple[Tensor, Tensor]
    means: tuple[Tensor, Tensor]
    loss_fn: Loss
    learning_coefficient: float

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def tanh_regression(
    seed: int, *, widths: tuple[int, ...] = (4, 8, 8, 1), num_samples: int = 1000, noise: float = 0.5
) -> ExactMinimum:
    """Regression by a tanh network of the given widths: targets are its outputs ± `noise` times standard normals.

    Raises:
        ValueError: `num_samples` is odd.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    model = _initialized(nn.Sequential(*layers[:-1]), 1.5, generator)
    inputs = torch.randn(_pairs(num_samples), widths[0], generator=generator)
    with torch.no_grad():
        targets = model(inputs)
    delta = noise * torch.randn(targets.shape, generator=generator)
    return _problem(model, inputs, targets, delta, nn.functional.mse_loss, lambda output: output)


class TinyTransformer(nn.Module):
    """One layer of causal attention with learned positions, neither MLP nor normalization: logits at each position.

    Args:
        vocabulary, length: of the sequences of tokens.
        width: of the residual stream.
        heads: number of attention heads.
    """

    def __init__(self, vocabulary: int, length: int, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.unembedding = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.embedding(tokens) + self.positions[:length]
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.queries_keys_values(x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        logits: Tensor = self.unembedding(x)
        return logits


def transformer_distillation(seed: int, *, num_samples: int = 240) -> ExactMinimum:
    """Cross entropy of :class:`TinyTransformer` against its own probabilities, which each pair of targets moves to and
    fro by up to half of what they are. Sequences are random.

    Raises:
        ValueError: `num_samples` is odd.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, length = 6, 4
    model = _initialized(TinyTransformer(vocabulary, length), 1.5, generator)
    inputs = torch.randint(vocabulary, (_pairs(num_samples), length), generator=generator)
    with torch.no_grad():
        probs = model(inputs).softmax(dim=-1)
    # What a token gets it takes from its neighbour, at most half of either.
    moved = torch.minimum(probs, probs.roll(1, dims=-1)) / 2
    signs = torch.randint(2, probs.shape[:2], generator=generator).unsqueeze(-1) * 2 - 1
    delta = signs * (moved - moved.roll(-1, dims=-1))
    return _problem(model, inputs, probs, delta, soft_cross_entropy, lambda logits: logits.softmax(dim=-1).sqrt() * 2)


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """−Σ p·log softmax(logits), mean over samples and positions."""
    return -(probs * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def half_rank(model: nn.Module, inputs: Tensor, statistic: Callable[[Tensor], Tensor]) -> float:
    """Half the rank of the Fisher information of a network at its parameters.

    It is the rank of the derivative of the network's outputs over all inputs, in float64: singular values below 10⁻¹¹
    of the largest count as none.

    Args:
        model: evaluated at `inputs`.
        inputs: of the data.
        statistic: of outputs, such that the Fisher information is that of equal Gaussian noise on it: outputs
            themselves for regression, 2√p for probabilities p.
    """
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    exact = inputs.double() if inputs.is_floating_point() else inputs

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return statistic(functional_call(model, weights, (exact,))).flatten()

    parts = jacfwd(outputs)(weights)
    jacobian = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    # Columns scaled to one length: a weight's unit says nothing about the rank.
    scaled = jacobian / torch.linalg.vector_norm(jacobian, dim=0).clamp(min=1e-300)
    return float(torch.linalg.matrix_rank(scaled, rtol=1e-11)) / 2


def _pairs(num_samples: int) -> int:
    if num_samples % 2:
        raise ValueError(f"num_samples must be even, since samples come in pairs, got {num_samples}")
    return num_samples // 2


def _initialized(model: nn.Module, scale: float, generator: torch.Generator) -> nn.Module:
    """Normal weights of standard deviation `scale`/√fan_in, vectors of scale/3."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale * (p.shape[-1] ** -0.5 if p.ndim > 1 else 1 / 3), generator=generator)
    return model


def _problem(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    delta: Tensor,
    loss_fn: Loss,
    statistic: Callable[[Tensor], Tensor],
) -> ExactMinimum:
    num_parameters = sum(p.numel() for p in model.parameters())
    enough = 2 * num_parameters // targets[0].numel() + 1  # samples for the rank, which more of them would not raise
    return ExactMinimum(
        model=model,
        data=(inputs.repeat_interleave(2, dim=0), torch.stack([targets + delta, targets - delta], dim=1).flatten(0, 1)),
        means=(inputs, targets),
        loss_fn=loss_fn,
        learning_coefficient=half_rank(model, inputs[:enough], statistic),
    )
