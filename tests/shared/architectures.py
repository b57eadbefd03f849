"""Tiny transformers of many architectures, built from configurations, with four heads in each of two layers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import import_torchvision
from torch import Tensor, nn

WIDTH, HEADS, SIZE, LAYERS, VOCABULARY, CONTEXT = 32, 4, 8, 2, 48, 32
"""Of the stream of the model, of attention, and of a head."""


def transformers() -> Any:
    """The package, offline."""
    import_torchvision()
    return pytest.importorskip("transformers")


_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_PLAIN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    **_ENDS,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, **_ENDS}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "tie_word_embeddings": False,
    **_ENDS,
}

_FROM_CONFIG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT, "tie_word_embeddings": False}),
    "gpt2 tied": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _PLAIN),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": SIZE}),
    "qwen3 wide heads": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 2 * SIZE}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_PLAIN, "num_key_value_heads": 1, "head_dim": SIZE}),
    "phi": ("PhiConfig", "PhiForCausalLM", _PLAIN),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {k: v for k, v in _PLAIN.items() if k != "intermediate_size"} | {"word_embed_proj_dim": WIDTH, "ffn_dim": 40},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _PLAIN),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {**_ENDS, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        | {"tie_word_embeddings": False},
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", _FALCON),
    "falcon of groups": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon of heads": ("FalconConfig", "FalconForCausalLM", {**_FALCON, "multi_query": False, "alibi": True}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4, "tie_word_embeddings": False}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "original_max_position_embeddings": CONTEXT}),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {**_ENDS, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
        | {"intermediate_size": 40, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": VOCABULARY, "max_seq_len": CONTEXT}
        | {"tie_word_embeddings": False},
    ),
    "codegen of 8 heads": (
        "CodeGenConfig",
        "CodeGenForCausalLM",
        {**_GPT, "n_head": 8, "rotary_dim": 4, "tie_word_embeddings": False},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_GROUPED, "head_dim": SIZE, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"layer_types": ["full_attention"] * LAYERS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


class HookedTransformer(nn.Module):
    """The parameters of TransformerLens's model of this name, which its version 4 no longer has, and what it computes.

    Args:
        groups: heads of keys and values; None: as many as of queries.
    """

    def __init__(self, groups: int | None = None) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n_heads=HEADS, d_model=WIDTH, n_key_value_heads=groups, d_vocab=VOCABULARY)
        self.embed, self.pos_embed, self.unembed = nn.Module(), nn.Module(), nn.Module()
        self.embed.W_E = _weight(VOCABULARY, WIDTH)
        self.pos_embed.W_pos = _weight(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(_HookedBlock(groups) for _ in range(LAYERS))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.unembed.W_U, self.unembed.b_U = _weight(WIDTH, VOCABULARY), _weight(VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed.W_E[tokens] + self.pos_embed.W_pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x) @ self.unembed.W_U + self.unembed.b_U


class _HookedAttention(nn.Module):
    def __init__(self, groups: int | None) -> None:
        super().__init__()
        before = "" if groups is None else "_"
        self.groups = groups or HEADS
        for name, heads in (("W_Q", HEADS), (f"{before}W_K", self.groups), (f"{before}W_V", self.groups)):
            setattr(self, name, _weight(heads, WIDTH, SIZE))
        self.W_O = _weight(HEADS, SIZE, WIDTH)
        for name, heads in (("b_Q", HEADS), (f"{before}b_K", self.groups), (f"{before}b_V", self.groups)):
            setattr(self, name, _weight(heads, SIZE))
        self.b_O = _weight(WIDTH)
        self._names = [("W_Q", "b_Q"), *((f"{before}W_{c}", f"{before}b_{c}") for c in "KV")]

    def forward(self, query_input: Tensor, key_input: Tensor, value_input: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("bpd,hde->bhpe", x, getattr(self, w)) + getattr(self, b)[:, None]
            for x, (w, b) in zip((query_input, key_input, value_input), self._names, strict=True)
        )
        k, v = (t.repeat_interleave(HEADS // self.groups, dim=1) for t in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("bhpe,hed->bpd", z, self.W_O) + self.b_O


class _HookedBlock(nn.Module):
    def __init__(self, groups: int | None) -> None:
        super().__init__()
        self.ln1, self.ln2, self.attn, self.mlp = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
            _HookedAttention(groups),
            nn.Module(),
        )
        self.mlp.W_in, self.mlp.b_in = _weight(WIDTH, 40), _weight(40)
        self.mlp.W_out, self.mlp.b_out = _weight(40, WIDTH), _weight(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n = self.ln1(x)
        x = x + self.attn(query_input=n, key_input=n, value_input=n)
        return x + torch.relu(self.ln2(x) @ self.mlp.W_in + self.mlp.b_in) @ self.mlp.W_out + self.mlp.b_out


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.1 * torch.randn(shape))


def _from_config(config: str, model: str, options: dict[str, Any]) -> nn.Module:
    package = transformers()
    made: nn.Module = getattr(package, model)(getattr(package, config)(**options))
    return made


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda given=given: _from_config(*given)) for name, given in _FROM_CONFIG.items()},
    "hooked_transformer": HookedTransformer,
    "hooked_transformer of groups": lambda: HookedTransformer(2),
}
"""Those that devinterp 2.0.1 knows, in several forms."""


def architecture(name: str) -> nn.Module:
    """The model, with weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[name]()
