"""Components: what belongs to them, whether it is verified, and params= by their names."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HEADS, SIZE, WIDTH, architecture, transformers
from devinterp_components import NAMES, STORED, text_of
from families import hooked_transformer, import_torchvision
from regression import mlp
from torch import Tensor, nn

import llc_fast
from llc_fast import components, estimate_llc
from llc_fast.objective.heads import ComponentError
from llc_fast.objective.selection import select
from llc_fast.problems.transformer import Transformer, head_masks, sequence_losses

THEIRS: dict[str, dict[str, dict[str, str]]] = json.loads(STORED.read_text())


def _texts(component: Mapping[str, Tensor | None]) -> dict[str, str]:
    return {name: text_of(mask) for name, mask in component.items()}


def _key_bias(prefix: str) -> dict[str, Any]:
    """devinterp leaves out the biases of keys where softmax ignores them, here and not everywhere."""
    rows = [f"0: {SIZE * k}-{SIZE * k + SIZE - 1}" for k in range(HEADS)]
    added = {f"l1 h{k}": ({prefix: rows[k]}, {}) for k in range(HEADS)}
    return added | {f"l1 g{k}": ({prefix: rows[k]}, {}) for k in range(2)}


def _joint(name: str, ours: Callable[[int], str], theirs: Callable[[int], str], heads: int) -> dict[str, Any]:
    found = {f"l1 h{k}": ({name: ours(k)}, {name: theirs(k)}) for k in range(heads)}
    return found | {f"l1 g{k}": found[f"l1 h{k}"] for k in range(2)}


_WIDE = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv"]
_BERT = "bert.encoder.layer.1.attention"
DIFFERENCES: dict[str, dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    # It knows only one of the names of a tied tensor, and an older name of GPT-NeoX's.
    "gpt2 tied": {"unembed": ({"transformer.wte.weight": "all"}, {})},
    "gpt_neox": {"unembed": ({"lm_head.weight": "all"}, {})},
    # It takes hidden_size / heads for the size of a head, and so half of the keys and values.
    "qwen3 wide heads": {
        f"l1 h{k}": (
            dict.fromkeys(_WIDE, f"0: {16 * (k // 2)}-{16 * (k // 2) + 15}"),
            dict.fromkeys(_WIDE, f"0: {8 * k}-{8 * k + 7}"),
        )
        for k in range(HEADS)
    },
    "opt": _key_bias("model.decoder.layers.1.self_attn.k_proj.bias"),
    # "output.dense" ends the name of attention's output, too.
    "bert": _key_bias(f"{_BERT}.self.key.bias")
    | {"l1 mlp": ({}, {f"{_BERT}.output.dense.{x}": "all" for x in ("bias", "weight")})},
    # Its layouts are those of other configurations of the same architecture.
    "falcon of heads": _joint(
        "transformer.h.1.self_attention.query_key_value.weight",
        lambda k: f"0: {24 * k}-{24 * k + 23}",
        lambda k: "0: " + ", ".join(f"{8 * k + 32 * j}-{8 * k + 32 * j + 7}" for j in range(3)),
        HEADS,
    ),
    "codegen of 8 heads": _joint(
        "transformer.h.1.attn.qkv_proj.weight",
        lambda k: "0: " + ", ".join(f"{s}-{s + 3}" for s in range(24 * (k // 2) + 4 * (k % 2), 24 * (k // 2 + 1), 8)),
        lambda k: f"0: {12 * k}-{12 * k + 11}",
        8,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_devinterps(name: str) -> None:
    """Element by element what devinterp 2.0.1 selects by the same names, but for what is listed above."""
    found, differences = components(architecture(name)), DIFFERENCES.get(name, {})
    assert len(THEIRS[name]) >= 5
    for component, theirs in THEIRS[name].items():
        ours = _texts(found[component])
        only = {k: v for k, v in ours.items() if theirs.get(k) != v}
        others = {k: v for k, v in theirs.items() if ours.get(k) != v}
        assert (only, others) == differences.get(component, ({}, {})), component
    assert differences.keys() <= THEIRS[name].keys()


def test_how_many_are_compared() -> None:
    """Heads of at least ten architectures without any difference."""
    alike = {name for name, parts in THEIRS.items() if "l1 h0" in parts and name not in DIFFERENCES}
    assert len({name.partition(" ")[0] for name in alike}) >= 10, alike
    assert {component for parts in THEIRS.values() for component in parts} <= set(NAMES)


def _union(parts: list[Mapping[str, Tensor | None]], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """How many of the parts have each element."""
    counts: dict[str, Tensor] = {}
    for part in parts:
        for name, mask in part.items():
            counts[name] = counts.get(name, torch.zeros(shapes[name], dtype=torch.int64))
            counts[name] += 1 if mask is None else mask
    return counts


def _layered() -> dict[str, Callable[[], nn.Module]]:
    made = {name: lambda name=name: architecture(name) for name in ARCHITECTURES}
    return made | OTHERS


def _t5() -> nn.Module:
    package = transformers()
    sizes = {"vocab_size": 48, "d_model": WIDTH, "d_kv": SIZE, "d_ff": 40, "num_layers": 2, "num_heads": HEADS}
    return package.T5ForConditionalGeneration(package.T5Config(**sizes, decoder_start_token_id=0))


def _bart() -> nn.Module:
    package = transformers()
    both = {"layers": 2, "attention_heads": HEADS, "ffn_dim": 40}
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()}
    config = package.BartConfig(vocab_size=48, d_model=WIDTH, max_position_embeddings=32, **sizes)
    return package.BartForConditionalGeneration(config)


def _vit() -> nn.Module:
    package = transformers()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 40}
    return package.ViTForImageClassification(package.ViTConfig(**sizes, image_size=16, patch_size=8))


def _swin() -> nn.Module:
    package = transformers()
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    return package.SwinForImageClassification(package.SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 4]))


def _timm_vit() -> nn.Module:
    import_torchvision()
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=16, depth=2, embed_dim=WIDTH, num_heads=HEADS)


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True), 2)


def _bridge() -> nn.Module:
    import_torchvision()
    pytest.importorskip("transformer_lens")
    return hooked_transformer()


class _Custom(nn.Module):
    """Attention of one's own, in every layout of a joint tensor."""

    def __init__(self, layout: str = "interleaved", matrix: bool = False) -> None:
        super().__init__()
        self.n_head, self.layout = HEADS, layout
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        if matrix:
            del self.qkv
            self.wqkv = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        joint = self.qkv(x) if hasattr(self, "qkv") else x @ self.wqkv
        b, t, _ = joint.shape
        if self.layout == "interleaved":  # head, kind, number
            q, k, v = joint.view(b, t, HEADS, 3, SIZE).permute(3, 0, 2, 1, 4)
        elif self.layout == "joint":  # kind, head, number
            q, k, v = joint.view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        elif self.layout == "strided":  # kind, number, head
            q, k, v = joint.view(b, t, 3, SIZE, HEADS).permute(2, 0, 4, 1, 3)
        else:
            raise RuntimeError("the attention is broken")
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).reshape(b, t, WIDTH))


class _OneLayer(nn.Module):
    """With everything that a forward pass may leave behind."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(50, WIDTH), nn.Dropout(0.5)
        self.norm, self.attention = nn.BatchNorm1d(WIDTH), _Custom(**options)
        self.head = nn.Linear(WIDTH, 50)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []
        self.last: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(tokens))
        x = self.drop(self.table(tokens) + torch.randn(WIDTH))
        self.last = x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.attention(x))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "swin": _swin,
    "timm's vit": _timm_vit,
    "torch's encoder": _encoder,
    "torch's encoder, batch second": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 40), 2),
    "transformer bridge": _bridge,
    "ours": lambda: Transformer(48, 32, width=WIDTH, heads=HEADS),
    "interleaved": lambda: _Custom("interleaved"),
    "joint": lambda: _Custom("joint"),
    "a joint matrix": lambda: _Custom("joint", matrix=True),
    "an interleaved matrix": lambda: _Custom("interleaved", matrix=True),
    "separate widths": lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=16, vdim=24),
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_heads_partition_attention(name: str) -> None:
    """With what is shared, each element is in one head; where heads share keys, in one group, and these in all heads
    of it. What of heads overlaps is keys and values."""
    model = _layered()[name]()
    shapes = {known: p.shape for known, p in model.named_parameters()}
    found = components(model)
    names = list(found)
    layers = [n for n in names if re.search(r"(^|\s)(attn|cross)$", n)]
    assert layers
    for attention in layers:
        before = attention.removesuffix(" attn")
        shared = [found[f"{attention} shared"]] if f"{attention} shared" in names else []
        heads = [found[n] for n in names if re.fullmatch(rf"{re.escape(before)} h\d+", n)]
        groups = [found[n] for n in names if re.fullmatch(rf"{re.escape(before)} g\d+", n)]
        assert len(heads) > 1
        own = found[attention]
        for parts in (groups or heads,):
            counts = _union([*parts, *shared], shapes)
            assert counts.keys() == own.keys() and all((c == 1).all() for c in counts.values()), attention
        counts = _union([*heads, *shared], shapes)
        assert counts.keys() == own.keys() and all((c >= 1).all() for c in counts.values())
        if groups:
            members = len(heads) // len(groups)
            assert {int(k) for c in counts.values() for k in c.unique()} == {1, members}
            for k, group in enumerate(groups):
                together = _union(list(heads[k * members : (k + 1) * members]), shapes)
                assert all(torch.equal(together[n] > 0, m) for n, m in group.items() if m is not None)
        assert not any(mask is None for head in heads for mask in head.values())


def _output_inputs(model: nn.Module, module: nn.Module, tokens: Tensor) -> Tensor:
    """What reaches an output projection."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        handle.remove()
    return seen[0]


OUTPUTS = {
    "gpt2": "transformer.h.1.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.1.attention.dense",
    "bloom": "transformer.h.1.self_attention.dense",
    "falcon of heads": "transformer.h.1.self_attention.dense",
    "falcon of groups": "transformer.h.1.self_attention.dense",
    "codegen of 8 heads": "transformer.h.1.attn.out_proj",
    "phi3": "model.layers.1.self_attn.o_proj",
    "qwen3 wide heads": "model.layers.1.self_attn.o_proj",
    "gpt_oss": "model.layers.1.self_attn.o_proj",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_masks_are_those_of_the_head(name: str) -> None:
    """In the whole model, with its own weights: changing a group's elements changes its columns before the output
    projection, in which its slice of that is, and no other; changing all others' leaves them."""
    model = architecture(name).eval()
    found, out = components(model), model.get_submodule(OUTPUTS[name])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    letter = "g" if "l1 g0" in found else "h"
    groups = [found[n] for n in list(found) if re.fullmatch(rf"l1 {letter}\d+", n)]
    tokens = torch.arange(7)[None]
    before = _output_inputs(model, out, tokens)
    for k, group in enumerate(groups):
        columns = torch.arange(before.shape[-1]) * len(groups) // before.shape[-1] == k
        weight = group[f"{OUTPUTS[name]}.weight"]
        assert weight is not None
        assert torch.equal(weight.all(0) if name != "gpt2" else weight.all(1), columns)
        for others in (False, True):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for known, p in changed.named_parameters():
                    mask = group.get(known)
                    if mask is not None and known != f"{OUTPUTS[name]}.weight":
                        p[mask ^ others] += torch.randn_like(p[mask ^ others])
            moved = (_output_inputs(changed, changed.get_submodule(OUTPUTS[name]), tokens) - before).abs() > 1e-5
            assert torch.equal(moved.flatten(0, -2).any(0), columns ^ others), (k, others)


def test_equal_to_our_own_masks() -> None:
    model = Transformer(48, 32, width=WIDTH, heads=HEADS)
    found = components(model)
    for layer in range(2):
        for head in range(HEADS):
            expected = head_masks(model, layer, head)
            masks = found[f"l{layer} h{head}"]
            assert masks.keys() == expected.keys()
            for name, mask in expected.items():
                assert torch.equal(masks[name], mask.expand_as(model.get_parameter(name)))  # type: ignore[arg-type]


# --- What can't be verified --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [False, True])
def test_unknown_layouts_are_errors(matrix: bool) -> None:
    """Heads that are strided through the tensor: an error with the tensor's name and what to do."""
    found, tensor = components(_Custom("strided", matrix)), "wqkv" if matrix else "qkv.weight"
    with pytest.raises(ComponentError, match=rf"'attn h1'.*{tensor}.*can't be verified.*params=\{{'{tensor}': mask"):
        found["attn h1"]
    assert found["attn"].num_parameters == sum(p.numel() for p in _Custom().parameters()) - 3 * WIDTH * matrix
    if not matrix:
        with pytest.raises(ComponentError, match=r"'qkv.weight' can't be read from its shape"):
            components(_Custom("joint"), verify=False)["attn h1"]


def test_heads_that_are_not_apart() -> None:
    """OLMo 2 normalizes the queries of all heads together: each head depends on the others' elements."""
    package = transformers()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "vocab_size": 48}
    model = package.Olmo2ForCausalLM(package.Olmo2Config(**sizes, intermediate_size=40, pad_token_id=0))
    expected = r"'l0 h2'.* heads 0, 2 in 'model.layers.0.self_attn.q_proj.weight' should .* change heads 0, 1, 2, 3"
    with pytest.raises(ValueError, match=expected):
        components(model)["l0 h2"]
    with pytest.raises(ValueError, match=r"params=.*'l0 h2'.*verify=False"):
        select(model, "l0 h2")
    trusted = components(model, verify=False)["l0 h2"]
    assert _texts(trusted)["model.layers.0.self_attn.o_proj.weight"] == "1: 16-23"
    assert select(model, trusted).keys() == trusted.keys()  # and can be sampled


def test_attention_of_unknown_names() -> None:
    """A module called attention whose projections nobody knows: layers and all of it, but no heads."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"attention": Attention()}) for _ in range(2))})
    found = components(model)
    assert [n for n in found if n.startswith("l1")] == ["l1", "l1 attn"]
    assert len(found["l1 attn"]) == 4
    for ask in (found.__getitem__, lambda name: select(model, name)):
        with pytest.raises(ValueError, match=r"'layers.1.attention.first.weight' is unknown.*no known names.*: mask"):
            ask("l1 h0")


def test_heads_in_another_dimension() -> None:
    """XLNet's weights are [width, heads, size]: no known layout, and not taken for one of as many heads as numbers."""
    package = transformers()
    sizes = {"d_model": WIDTH, "n_layer": 1, "n_head": HEADS, "d_inner": 40, "vocab_size": 48}
    found = components(package.XLNetLMHeadModel(package.XLNetConfig(**sizes)), verify=False)
    assert "l0 attn" in found and "l0 h0" not in found
    with pytest.raises(ComponentError, match=r"rel_attn.q' is unknown.*\(32, 4, 8\)"):
        found["l0 h0"]


def test_adapters_have_no_heads() -> None:
    """Of weights with low-rank adapters nobody says which part is a head's."""
    import_torchvision()
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(architecture("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    found = components(model)
    with pytest.raises(ValueError, match="q_proj"):
        found["l0 h0"]
    assert "embed" in found and "l1 mlp" in found
    assert sum("lora_" in name for name in found["l0 attn"]) == 2


def test_broken_forward_passes() -> None:
    """What the module itself says is part of the message."""
    with pytest.raises(ComponentError, match=r"did not run.*the attention is broken"):
        components(_OneLayer(layout="broken"))["attention h0"]


def test_inputs_of_ones_own() -> None:
    """A model for which no input can be made up is verified with given ones."""

    class Two(_Custom):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * scale)

    model = Two()
    with pytest.raises(ComponentError, match=r"missing 1 required .* give inputs= to components"):
        components(model)["attn h0"]
    args = (torch.randn(2, 5, WIDTH), torch.tensor(2.0))
    for inputs in (args, dict(zip(("x", "scale"), args, strict=True))):
        assert _texts(components(model, inputs=inputs)["attn h1"])["qkv.weight"] == "0: 24-47"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
def test_whatever_the_weights_are(name: str, dtype: torch.dtype) -> None:
    """What is verified is the layout: in any precision, of a model that is zero everywhere, or not a number."""
    expected = _texts(components(architecture(name))["l1 h2"])
    for value in (0.0, float("nan")):
        model = architecture(name).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        assert _texts(components(model)["l1 h2"]) == expected
        assert all(p.isnan().all() == bool(value != value) for p in model.parameters())


# --- The model is left as it was ---------------------------------------------------------------------------------


class _Interrupted(_Custom):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("failing", [None, "broken", "interrupt"])
def test_the_model_is_left_as_it_was(failing: str | None) -> None:
    """Parameters and their memory, gradients, buffers, hooks, modes, attributes, generators; even if it fails."""
    model = _OneLayer(layout=failing or "interleaved")
    if failing == "interrupt":
        model.attention = _Interrupted()
    model.norm.eval()
    model.head.requires_grad_(False)
    model.table.weight.grad = torch.ones_like(model.table.weight)
    model.norm.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    memory = {name: (id(p), p.data_ptr(), p._version, p.requires_grad) for name, p in model.named_parameters()}
    memory |= {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}  # type: ignore[misc]
    hooks = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()]
    modes, generators = [m.training for m in model.modules()], (torch.get_rng_state(), np.random.get_state()[1].sum())
    found = components(model)
    if failing:
        with pytest.raises(KeyboardInterrupt if failing == "interrupt" else ComponentError):
            found["attention h1"]
    else:
        assert found["attention h1"].num_parameters == 3 * SIZE * (WIDTH + 1) + SIZE * WIDTH
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    after = {name: (id(p), p.data_ptr(), p._version, p.requires_grad) for name, p in model.named_parameters()}
    assert after | {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()} == memory  # type: ignore[comparison-overlap]
    assert model.table.weight.grad is not None and (model.table.weight.grad == 1).all()
    assert [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [m.training for m in model.modules()] == modes
    assert model.seen == [] and model.last is None and float(model.calls) == 0
    assert torch.equal(torch.get_rng_state(), generators[0]) and np.random.get_state()[1].sum() == generators[1]


def test_listing_allocates_nothing() -> None:
    """Names, counts and layers of a model of 1.4 billion parameters whose tensors are nowhere; no mask is as large."""
    package = transformers()
    config = package.GPTNeoXConfig(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192, vocab_size=50304
    )
    with torch.device("meta"):
        model = package.GPTNeoXForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    assert total > 1.4e9
    found = components(model, verify=False)
    names = list(found)
    assert sum(bool(re.fullmatch(r"l\d+ h\d+", name)) for name in names) == 24 * 16
    head = found["l23 h5"]
    assert head.num_parameters == 4 * 2048 * 128 + 3 * 128
    assert head.layer == 23 and head.count("gpt_neox.layers.23.attention.dense.weight") == 2048 * 128
    with pytest.raises(ComponentError, match=r"meta device.*verify=False"):
        components(model)["l0 h0"]
    small = components(architecture("gpt_neox"))["l0 h1"]
    for name, mask in small.items():
        assert mask is not None and mask.untyped_storage().nbytes() <= 3 * WIDTH, name


# --- Names -------------------------------------------------------------------------------------------------------


def test_names_of_a_transformer() -> None:
    """In the model's order: what comes before, layers, what comes after, parameters."""
    model = architecture("llama")
    layer = ["", " attn", *(f" h{k}" for k in range(4)), " g0", " g1", " mlp"]
    names = [f"l{k}{part}" for k in range(2) for part in layer]
    assert list(components(model)) == ["embed", *names, "unembed", *dict(model.named_parameters())]
    found = components(model)
    for known in ("L1H2", "l1h2", "l1  h2", "l01 h2"):
        assert found[known].name == "l1 h2" and known in found
    assert found["L1 ATTN"].name == "l1 attn" and found["Embed"].name == "embed"
    assert components(architecture("gpt2"))["l0 g1"].name == "l0 h1"  # as many groups as heads
    assert found.get("l2 h0") is None and "l0 h4" not in found and "full" not in found
    assert len(found) == len(names) + 2 + len(list(model.parameters()))
    for name in ("l1 h2", "l1", "l1 attn", "model.layers.1.mlp.up_proj.weight"):
        assert found[name].layer == 1
    assert found["embed"].layer is None and found["model.norm.weight"].layer is None
    assert found["l1 mlp"].modules == tuple(f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down"))
    assert "'l1 h2'" in repr(found["l1 h2"]) and "Llama" in repr(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l0 h9", "'l0 h"),
        ("l7", "'l1'"),
        ("l0 attention", "'l0 attn'"),
        ("unmbed", "'unembed'"),
        ("model.layers.0.mlp.up_proj.weigth", "'model.layers.0.mlp.up_proj.weight'"),
    ],
)
def test_unknown_names(name: str, expected: str) -> None:
    """An error with names that are close."""
    model = architecture("llama")
    for ask in (components(model).__getitem__, lambda given: select(model, given)):
        with pytest.raises(ValueError, match=expected):
            ask(name)
    with pytest.raises(KeyError):
        components(model)[name]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        components(3)  # type: ignore[arg-type]


def test_several_stacks() -> None:
    """Encoder and decoder have names of their own, cross-attention too; stages of one network count on."""
    found = components(_t5())
    assert {"encoder l1 h3", "decoder l0 attn", "decoder l0 cross", "decoder l1 cross h2", "decoder l1 mlp"} <= set(
        found
    )
    cross = found["decoder l1 cross h2"]
    assert all(".block.1.layer.1.EncDecAttention." in name for name in cross) and cross.layer == 1
    # Relative positions have an entry for each head; only the first block has them.
    biases = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert _texts(found["encoder l0 h2"])[biases] == "1: 2-2"
    assert _texts(components(_bart())["decoder L0H1"])["model.decoder.layers.0.self_attn.out_proj.weight"] == "1: 8-15"
    stages = components(_swin())
    assert {"l0 h1", "l3 h3"} <= set(stages) and "l0 h2" not in stages and stages["l2"].layer == 2
    table = next(n for n in stages["l3 h3"] if "relative_position_bias_table" in n)
    assert _texts(stages["l3 h3"])[table] == "1: 3-3"


def test_ends_of_vision_and_other_models() -> None:
    """The patch embedding and the classifier; of nothing but perceptrons, none."""
    found = components(_timm_vit())
    assert set(found["embed"]) == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(found["unembed"]) == {"head.weight", "head.bias"}
    assert set(components(mlp())) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    ours = components(Transformer(48, 32, width=WIDTH, heads=HEADS))
    assert set(ours["embed"]) == {"tokens.weight"} and set(ours["unembed"]) == {"unembedding.weight"}


def test_tied_embeddings_are_one_component_under_two_names() -> None:
    found = components(architecture("gpt2 tied"))
    assert set(found["embed"]) == set(found["unembed"]) == {"transformer.wte.weight"}
    assert set(select(architecture("gpt2 tied"), ["embed", "unembed"])) == {"transformer.wte.weight"}


def test_extras_of_heads() -> None:
    """gpt-oss has a number for each head, which is its own."""
    found = components(architecture("gpt_oss"))
    assert _texts(found["l1 h3"])["model.layers.1.self_attn.sinks"] == "0: 3-3"
    assert set(found["l1 attn shared"]) == {"model.layers.1.self_attn.o_proj.bias"}


def test_convolutions() -> None:
    """Blocks by their paths, filters by number; transposed convolutions, whose outputs are the second dimension."""
    import_torchvision()
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(num_classes=10)
    found = components(model)
    names = set(found)
    assert {f"layer{k}.{j}" for k in range(1, 5) for j in range(2)} == {
        n for n in names if re.fullmatch(r"layer\d\.\d", n)
    }
    assert set(found["layer2.0"]) == {n for n, _ in model.named_parameters() if n.startswith("layer2.0.")}
    assert _texts(found["layer1.0.conv1 c5"]) == {"layer1.0.conv1.weight": "0: 5-5"}
    assert sum(n.startswith("layer1.0.conv1 c") for n in names) == 64 and "layer1.0.conv1 c64" not in found
    assert select(model, "layer2.0").keys() == found["layer2.0"].keys()
    upward = components(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)))
    assert _texts(upward["0 c3"]) == {"0.weight": "1: 3-3", "0.bias": "0: 3-3"}
    efficient = components(models.mobilenet_v2(num_classes=10))
    assert {"features.3", "features.17"} <= set(efficient) and "features.0" not in efficient


def test_compiled_and_wrapped_models() -> None:
    """Their parameters' names have a prefix; components do not, and nothing is compiled to find them."""
    compiled = torch.compile(architecture("llama"), backend=_no_backend)
    assert _texts(components(compiled)["l1 h3"])["_orig_mod.model.layers.1.self_attn.o_proj.weight"] == "1: 24-31"
    model = nn.DataParallel(architecture("gpt2"))
    found = components(model)
    assert set(found["embed"]) == {"module.transformer.wte.weight"}
    assert set(found["unembed"]) == {"module.lm_head.weight"}
    assert _texts(found["l1 h3"])["module.transformer.h.1.attn.c_proj.weight"] == "0: 24-31"


def _no_backend(*_: Any) -> Any:
    raise AssertionError("compiled")


# --- params= -----------------------------------------------------------------------------------------------------


def _text() -> tuple[Transformer, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, tokens = Transformer(12, 8, width=16, heads=2), torch.randint(12, (32, 9))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, (tokens[:, :-1], tokens[:, 1:])


def _estimate(params: Any, **options: Any) -> llc_fast.LLCResult:
    model, data = _text()
    given = {"num_chains": 2, "num_draws": 6, "num_burnin": 2, "lr": 1e-4, "localization": 10.0, "progress": False}
    return estimate_llc(model, data, sequence_losses, params=params, **{**given, **options})


@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
def test_params_by_component() -> None:
    """The same chains as with the masks by hand, in each form; the result says what was selected."""
    model, _ = _text()
    expected = _estimate(head_masks(model, 1, 0))
    found = components(model)
    for params in ("l1 h0", "L1H0", ["l1 h0"], {"l1 h0": True}, found["l1 h0"], [found["l1 h0"]]):
        result = _estimate(params)
        np.testing.assert_array_equal(result.loss_trace, expected.loss_trace)
        assert result.settings["num_parameters"] == 4 * 8 * 16
    assert _estimate("l1 h0").settings["params"] == "l1 h0"
    assert _estimate(found["l1 h0"]).settings["params"] == "l1 h0"
    assert "params" not in _estimate(None).settings


def test_unions() -> None:
    """Masks of one parameter are joined, whole parameters win, and a later mask by hand overrides."""
    model, _ = _text()
    both = select(model, ["l0 h0", "l0 h1"])
    assert set(both) == set(components(model)["l0 attn"])
    assert all(mask is not None and mask.all() for mask in both.values())
    query = "blocks.0.attention.query"
    one = select(model, ["l0 h1", "embed"])
    assert set(one) == {*head_masks(model, 0, 1), "tokens.weight"} and one["tokens.weight"] is None
    assert torch.equal(one[query], head_masks(model, 0, 1)[query].expand(2, 8, 16))  # type: ignore[arg-type]
    for order in (["l0 h0", query], [query, "l0 h0"], ["l0 h0", "l0 attn"], ["l0 attn", "l0 h0"]):
        assert select(model, order)[query] is None, order
    mask = torch.zeros(2, 8, 16, dtype=torch.bool)
    mask[0, 3] = True
    assert torch.equal(select(model, {"l0 h1": True, query: mask})[query], mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params='l0 h1' is a component, which has masks of its own"):
        select(model, {"l0 h1": mask})


def test_names_patterns_and_modules_come_first() -> None:
    """A module called as a component is stays what it was."""
    model = nn.ModuleDict(
        {"embed": nn.ModuleDict({"a": nn.Embedding(4, 4), "b": nn.Embedding(4, 4)}), "l0": nn.Linear(4, 4)}
    )
    assert set(select(model, "embed")) == {"embed.a.weight", "embed.b.weight"}
    assert set(select(model, "l0")) == {"l0.weight", "l0.bias"}
    assert set(components(model)["embed"]) == {"embed.a.weight"}
    hooked = architecture("hooked_transformer")
    assert set(select(hooked, "embed")) == {"embed.W_E"}


@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
def test_checkpoints_go_by_what_is_selected(tmp_path: Path) -> None:
    """The same part by another name goes on; another part is another run."""
    path = tmp_path / "run.pt"
    model, _ = _text()
    first = _estimate("l1 h0", checkpoint=path)
    again = _estimate(head_masks(model, 1, 0), checkpoint=path)
    np.testing.assert_array_equal(first.loss_trace, again.loss_trace)
    with pytest.raises(ValueError, match="masks"):
        _estimate("l1 h1", checkpoint=path)


@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
def test_sweeps_and_scans_take_components() -> None:
    model, data = _text()
    given = {"num_chains": 2, "num_draws": 4, "num_burnin": 2, "lr": 1e-4, "params": "l0 mlp", "progress": False}
    states = [copy.deepcopy(model.state_dict())]
    count = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    swept = llc_fast.sweep_checkpoints(model, states, data, sequence_losses, localization=10.0, **given)
    expected = estimate_llc(model, data, sequence_losses, localization=10.0, **given)
    assert expected.settings["num_parameters"] == count
    np.testing.assert_allclose(float(swept["llc_mean"][0]), expected.llc_mean, rtol=1e-6)
    assert llc_fast.calibrate(model, data, sequence_losses, localization=10.0, **given)["lr"] > 0
    scanned = llc_fast.scan(model, data, sequence_losses, nbeta=[10.0], localization=[10.0], **given)
    assert scanned.dataset["llc_mean"].size == 1
