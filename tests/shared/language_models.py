"""Tiny language models of Hugging Face, built from configurations, and sequences of tokens for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import import_torchvision
from torch import nn

VOCABULARY, LENGTH = 64, 12


def transformers() -> Any:
    """The package, offline."""
    import_torchvision()
    return pytest.importorskip("transformers")


def gpt2(seed: int = 0, **more: Any) -> Any:
    made = transformers()
    config = made.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, **_ENDS, **more)
    return _seeded(seed, lambda: made.GPT2LMHeadModel(config))


def gpt_neox(seed: int = 0) -> Any:
    made = transformers()
    config = made.GPTNeoXConfig(vocab_size=VOCABULARY, **_sizes(), intermediate_size=32)
    return _seeded(seed, lambda: made.GPTNeoXForCausalLM(config))


def llama(seed: int = 0) -> Any:
    made = transformers()
    config = made.LlamaConfig(vocab_size=VOCABULARY, **_sizes(), intermediate_size=32)
    return _seeded(seed, lambda: made.LlamaForCausalLM(config))


MODELS = {"gpt2": gpt2, "gpt-neox": gpt_neox, "llama": llama}


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def _sizes() -> dict[str, int]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        **_ENDS,
    }


def _seeded(seed: int, make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = make()
    with torch.no_grad():  # so that logits are no constants
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model


def sequences(count: int = 24, shortest: int = 2, longest: int = LENGTH, seed: int = 0) -> list[list[int]]:
    """Token sequences of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
