"""A small transformer and its heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llc_fast.problems.transformer import Transformer, head_masks, sequence_losses


def _model(**options: Any) -> Transformer:
    """One whose outputs are not all equal."""
    model = Transformer(11, 6, **({"width": 8, "heads": 2, "layers": 2} | options))
    torch.nn.init.normal_(model.unembedding.weight, generator=torch.Generator().manual_seed(3))
    return model


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def test_nothing_is_seen_of_later_tokens() -> None:
    model, tokens = _model(), _tokens(3, 6)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    before, after = model(tokens), model(other)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().amax() > 0.01
    torch.testing.assert_close(model(tokens[:, :4]), before[:, :4])  # shorter ones are the same


def test_attention_is_that_of_torch() -> None:
    attention = _model().blocks[0].attention
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    theirs = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([w.flatten(0, 1) for w in (attention.query, attention.key, attention.value)])
        )
        theirs.out_proj.weight.copy_(torch.cat(list(attention.output), dim=1))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(attention(x), theirs(x, x, x, attn_mask=later, need_weights=False)[0])


def test_masks_are_heads() -> None:
    """Each weight of attention belongs to one head; what attention adds is the sum of what its heads do."""
    model, tokens = _model(), _tokens(2, 6)
    count = 0
    for layer in range(2):
        for head in range(2):
            masks = head_masks(model, layer, head)
            count += sum(int(m.expand(model.get_parameter(name).shape).sum()) for name, m in masks.items())
    assert count == sum(
        p.numel() for name, p in model.named_parameters() if "attention." in name and "norm" not in name
    )
    attention, x = model.blocks[1].attention, torch.randn(2, 6, 8)
    whole, alone = attention(x), []
    for head in range(2):
        changed = _model()
        for name, mask in head_masks(changed, 1, head).items():
            with torch.no_grad():
                changed.get_parameter(name).mul_(~mask)
        alone.append(whole - changed.blocks[1].attention(x))
        assert not torch.allclose(changed(tokens), model(tokens))
    torch.testing.assert_close(alone[0] + alone[1], whole)
    with pytest.raises(ValueError, match="layer=2, head=0: the model has 2 layers of 2 heads"):
        head_masks(model, 2, 0)


def test_at_first_all_tokens_are_equally_likely() -> None:
    tokens = _tokens(4, 7)
    losses = sequence_losses(Transformer(11, 6, width=8)(tokens[:, :-1]), tokens[:, 1:])
    torch.testing.assert_close(losses, torch.full((4,), math.log(11)))


def test_losses_of_sequences() -> None:
    logits, tokens = _model()(_tokens(4, 6)), _tokens(4, 6).roll(1, 1)
    whole = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    losses = sequence_losses(logits, tokens)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), whole)
    torch.testing.assert_close(losses[2], F.cross_entropy(logits[2], tokens[2]))


def test_seeds_and_widths() -> None:
    first, same, other = (Transformer(11, 6, width=8, seed=seed).blocks[0].mlp[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="heads=3 does not divide width=8"):
        Transformer(11, 6, width=8, heads=3)
