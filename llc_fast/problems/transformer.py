"""A small decoder-only transformer, plain enough that the weights of a single attention head have names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention. Each weight has a first dimension of heads: head h is ``query[h]``, ``key[h]``,
    ``value[h]`` (``[width / heads, width]`` each) and ``output[h]`` (``[width, width / heads]``); there are no biases.

    Args:
        width: of the residual stream.
        heads: how many; they divide `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(heads, width // heads, width))
        self.key = nn.Parameter(torch.empty(heads, width // heads, width))
        self.value = nn.Parameter(torch.empty(heads, width // heads, width))
        self.output = nn.Parameter(torch.empty(heads, width, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, position, width]`` to the same."""

        def split(weight: Tensor) -> Tensor:  # to [batch, head, position, width / heads]
            return F.linear(x, weight.flatten(0, 1)).view(*x.shape[:2], self.heads, -1).transpose(1, 2)

        query, key, value = split(self.query), split(self.key), split(self.value)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(later, -math.inf).softmax(-1) @ value
        return F.linear(seen.transpose(1, 2).flatten(2), self.output.permute(1, 0, 2).flatten(1))


class Block(nn.Module):
    """Attention and a perceptron, each after a normalization and added to what came in.

    Args:
        width, heads: as for :class:`Attention`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, position, width]`` to the same."""
        x = x + self.attention(self.norm_attention(x))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class Transformer(nn.Module):
    """Predicts each token from those before it: learned positions, pre-norm, untied embeddings, no dropout.

    Weights begin normal with variance 1/fan_in, those that write to the residual stream smaller by √(2·layers),
    embeddings with standard deviation 0.1, and the output with 0, so that every token is equally likely at first.

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width: of the residual stream.
        heads: in each layer; they divide `width`.
        layers: how many.
        seed: of the initial weights.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(
        self, vocabulary: int, context: int, *, width: int = 32, heads: int = 4, layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.heads, self.layers = heads, layers
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.unembedding = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1)
            elif name in ("tokens.weight", "positions.weight"):
                p.normal_(0, 0.1, generator=generator)
            else:
                writes = name.endswith(("attention.output", "mlp.2.weight"))
                fan_in = p.shape[0] * p.shape[2] if name.endswith("attention.output") else p.shape[-1]
                p.normal_(0, (fan_in * (2 * self.layers if writes else 1)) ** -0.5, generator=generator)
        self.unembedding.weight.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, position, vocabulary]`` of the tokens that follow each of ``[batch, position]``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.unembedding(self.norm(x))
        return out

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def sequence_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of a token in each sequence, in nats: ``[batch, position, …]`` to ``[batch]``."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def head_masks(model: Transformer, layer: int, head: int) -> dict[str, Tensor]:
    """The weights of one attention head, as ``estimate_llc(params=…)`` takes them: boolean masks by name.

    Raises:
        ValueError: the model has no such head.
    """
    if not (0 <= layer < model.layers and 0 <= head < model.heads):
        raise ValueError(f"layer={layer}, head={head}: the model has {model.layers} layers of {model.heads} heads")
    mask = (torch.arange(model.heads) == head)[:, None, None]
    return {f"blocks.{layer}.attention.{name}": mask for name in ("query", "key", "value", "output")}
