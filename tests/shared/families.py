"""The models of the PyTorch world, one tiny trained case of each family: for the family tests and their benchmark.

Everything is built from a configuration and trained for a moment on data that come with Python (its Zen, as bytes) or
scikit-learn (its digits). Nothing is downloaded.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llc_fast import Execution

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LENGTH = 16
"""Tokens of a sequence."""
NUM_PICTURES = 256


class Case(NamedTuple):
    """What an estimate of a family is called with: ``estimate_llc(model, data, loss_fn, **options)``."""

    model: nn.Module
    data: Any
    loss_fn: Callable[..., Any] | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: what it is called in tests and tables.
        requires: packages beyond this one's own.
        make: the trained case of a seed.
        refused: part of the error, if the family can't be measured as it is.
        compiles: whether making it starts a compiler.
        size: "tiny", or "large" where a step of a chain takes tens of milliseconds.
    """

    name: str
    requires: tuple[str, ...]
    make: Callable[[int], Case]
    refused: str = ""
    compiles: bool = False
    size: str = "tiny"

    def __str__(self) -> str:
        return self.name


FAMILIES: dict[str, Family] = {}


def family(name: str, *requires: str, **more: Any) -> Callable[[Callable[[], Case]], Callable[[int], Case]]:
    """Register a function that makes a case; torch's generator is seeded for it, and afterwards as before."""

    def register(function: Callable[[], Case]) -> Callable[[int], Case]:
        @functools.wraps(function)
        def make(seed: int = 0) -> Case:
            import_torchvision()
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what other packages have to say of each other
                torch.manual_seed(seed)
                return function()

        FAMILIES[name] = Family(name, requires, make, **more)
        return make

    return register


@functools.cache
def made(name: str) -> Case:
    """The case of seed 0, which all tests share: whatever they do leaves it as it was."""
    return FAMILIES[name].make(0)


# ---- what cases share ---------------------------------------------------------------------------------------


_OPERATORS = (
    *("nms", "qnms", "deform_conv2d", "_deform_conv2d_backward", "roi_align", "_roi_align_backward"),
    *("roi_pool", "_roi_pool_backward", "ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool"),
    "_ps_roi_pool_backward",
)


@functools.cache
def import_torchvision() -> object:
    """Make torchvision importable beside a torch that its compiled operators weren't built for.

    Its import gives them shapes by name, and fails if there are none. None of the models here uses any of them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))
            return None
    operators = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        operators.define(f"{name}(Tensor x) -> Tensor")
    return operators


def train(case: Case, steps: int = 60, lr: float = 1e-2, batch_size: int = 64) -> Case:
    """The same after a few steps of Adam on minibatches; the model's mode stays."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    length = len(next(iter(case.data.values() if isinstance(case.data, Mapping) else case.data)))
    for _ in range(steps):
        chosen = torch.randint(length, (min(batch_size, length),))
        loss = loss_of(case, rows(case.data, chosen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return case


def rows(data: Any, chosen: Tensor) -> Any:
    """Samples of columns of tensors."""
    if isinstance(data, Mapping):
        return {name: column[chosen] for name, column in data.items()}
    return tuple(column[chosen] for column in data)


def loss_of(case: Case, batch: Any) -> Tensor:
    """The loss of a batch as `estimate_llc` is told to take it, in plain PyTorch."""
    from llc_fast.objective.objective import takes_model

    execution = case.options.get("execution")
    dtype = execution.autocast if execution is not None else None
    with contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
        if case.loss_fn is None:
            output = case.model(**batch)
            if isinstance(output, (Mapping, tuple)) and not hasattr(output, "loss"):
                return output["loss"] if isinstance(output, Mapping) else output[0]
            return output.loss
        if takes_model(case.loss_fn):
            return case.loss_fn(case.model, batch)
        return case.loss_fn(case.model(*batch[:-1]), batch[-1])


@functools.cache
def zen() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        this = importlib.import_module("this")
    return codecs.decode(this.s, "rot13")


@functools.cache
def vocabulary() -> str:
    """The characters of the Zen; token 0 is padding."""
    return "\0" + "".join(sorted(set(zen())))


def encode(text: str) -> list[int]:
    return [vocabulary().index(c) for c in text]


@functools.cache
def tokens() -> Tensor:
    """The Zen in windows of `LENGTH` characters, every fourth one begins one, ``[206 or so, LENGTH]``."""
    return torch.tensor(encode(zen())).unfold(0, LENGTH, 4).contiguous()


@functools.cache
def ragged() -> dict[str, Tensor]:
    """The words of the Zen, two or three at a time, padded on the right to `LENGTH` at most."""
    words, texts = zen().split(), []
    for k in range(0, len(words) - 3):
        texts.append(" ".join(words[k : k + 2 + k % 2])[:LENGTH])
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(encode(text))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """256 images ``[256, 1, 8, 8]`` and what they show."""
    from llc_fast.problems.digits import load_digits

    images, labels = load_digits(num_train=NUM_PICTURES).train
    return images, labels


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Shifted cross-entropy, the mean over the tokens that are no padding."""
    logits = model(**batch, use_cache=False).logits
    target = batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        target = target.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten())


def language_case(model: nn.Module, data: Mapping[str, Tensor] | None = None, **options: Any) -> Case:
    return train(Case(model.eval(), data or {"input_ids": tokens()}, next_token, options))


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers[:-1])


def digits_case(model: nn.Module, loss_fn: Any = F.cross_entropy, **options: Any) -> Case:
    return train(Case(model.eval(), digits(), loss_fn, options))


# ---- transformers -------------------------------------------------------------------------------------------


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _small_text() -> dict[str, Any]:
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return {"vocab_size": len(vocabulary()), "max_position_embeddings": LENGTH, "use_cache": False, **_SMALL, **special}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary()), **sizes))


@family("gpt2", "transformers")
def _gpt2() -> Case:
    return language_case(gpt2())


@family("gpt-neox", "transformers")
def _gpt_neox() -> Case:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return language_case(GPTNeoXForCausalLM(GPTNeoXConfig(**_small_text())))


@family("gpt-neox ragged", "transformers")
def _gpt_neox_ragged() -> Case:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return language_case(GPTNeoXForCausalLM(GPTNeoXConfig(**_small_text())), ragged())


@family("llama", "transformers")
def _llama() -> Case:
    """The model takes its own loss, from labels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **_small_text()))
    return train(Case(model.eval(), {"input_ids": tokens(), "labels": tokens()}, None, {}))


@family("qwen3", "transformers")
def _qwen3() -> Case:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return language_case(Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=1, head_dim=8, **_small_text())))


@family("bert", "transformers")
def _bert() -> Case:
    """Is the character after the window a vowel?"""
    from transformers import BertConfig, BertForSequenceClassification

    following = torch.tensor(encode(zen()))[LENGTH::4]
    ids = tokens()[: len(following)]
    labels = torch.isin(following, torch.tensor(encode("aeiou"))).long()
    options = {k: v for k, v in _small_text().items() if k != "use_cache"}
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return train(Case(BertForSequenceClassification(BertConfig(**options)).eval(), data, None, {}))


@family("vit", "transformers")
def _vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **_SMALL)
    images, labels = digits()
    return train(Case(ViTForImageClassification(config).eval(), {"pixel_values": images, "labels": labels}, None, {}))


def hooked_transformer() -> nn.Module:
    """TransformerLens' own model; from its version 4 on it is a `TransformerBridge`."""
    import transformer_lens

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": LENGTH, "d_head": 8, "n_heads": 2, "act_fn": "gelu"}
    config = {**sizes, "d_vocab": len(vocabulary()), "device": "cpu"}
    try:
        return transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**config))
    except ImportError:  # removed
        return transformer_lens.TransformerBridge.boot_native(config)


@family("hooked-transformer", "transformer_lens")
def _hooked_transformer() -> Case:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0], return_type="loss")

    return train(Case(hooked_transformer().eval(), (tokens(),), loss, {}))


@family("lora", "transformers", "peft")
def _lora() -> Case:
    """Adapters of a language model, which alone require gradients."""
    from peft import LoraConfig, get_peft_model

    base = language_case(gpt2()).model
    return language_case(get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)))


# ---- recurrent ----------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A language model: embedding, LSTM or GRU, logits."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(vocabulary()), width)
        self.body = kind(width, width, batch_first=True)
        self.head = nn.Linear(width, len(vocabulary()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids))[0])


def _sequence_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _recurrent(kind: type[nn.RNNBase]) -> Case:
    data = tokens()[:, :-1].contiguous(), tokens()[:, 1:].contiguous()
    return train(Case(Recurrent(kind).eval(), data, _sequence_loss, {}))


@family("lstm")
def _lstm() -> Case:
    return _recurrent(nn.LSTM)


@family("gru")
def _gru() -> Case:
    return _recurrent(nn.GRU)


# ---- vision -------------------------------------------------------------------------------------------------


def _small_resnet() -> nn.Module:
    import timm

    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 10, "in_chans": 1}
    return timm.create_model("resnet18", **sizes)


@family("resnet eval", "timm")
def _resnet_eval() -> Case:
    """Trained as usual; then statistics are frozen."""
    case = train(Case(_small_resnet(), digits(), F.cross_entropy, {}))
    case.model.eval()
    return case


@family("resnet train", "timm")
def _resnet_train() -> Case:
    """With the statistics of each minibatch."""
    return train(Case(_small_resnet(), digits(), F.cross_entropy, {}))


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def _colour_digits() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[:128].expand(-1, 3, -1, -1).contiguous(), labels[:128]


@family("resnet18 eval", "torchvision", size="large")
def _resnet18_eval() -> Case:
    case = train(Case(_resnet18(), _colour_digits(), F.cross_entropy, {}), steps=6, batch_size=32)
    with torch.no_grad():
        for _ in range(20):  # so that running statistics are those of the images
            case.model(case.data[0])
    case.model.eval()
    return case


@family("resnet18 train", "torchvision", size="large")
def _resnet18_train() -> Case:
    return train(Case(_resnet18(), _colour_digits(), F.cross_entropy, {}), steps=6, batch_size=32)


@family("channels-last")
def _channels_last() -> Case:
    """Convolutions whose weights and images are not contiguous."""
    images, labels = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    ).to(memory_format=torch.channels_last)
    data = images.contiguous(memory_format=torch.channels_last), labels
    return train(Case(model.eval(), data, F.cross_entropy, {}))


# ---- graphs -------------------------------------------------------------------------------------------------


@family("gcn", "torch_geometric")
def _gcn() -> Case:
    """Nodes of one graph: the members of a karate club, and whose side they take; each is a sample."""
    from torch_geometric.datasets import KarateClub
    from torch_geometric.nn import GCNConv

    club = KarateClub()[0]

    class GCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(club.num_features, 8), GCNConv(8, 4)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x, edges)), edges)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(club.x, club.edge_index)[batch[0]], batch[1])

    return train(Case(GCN().eval(), (torch.arange(club.num_nodes), club.y), loss, {}))


def made_up_graphs(count: int = 64) -> list[Any]:
    """Rings and stars of four to nine nodes, to be told apart."""
    from torch_geometric.data import Data

    graphs = []
    for k in range(count):
        nodes, label = 4 + k % 6, k % 2
        start = torch.arange(nodes)
        end = (start + 1) % nodes if label else torch.zeros(nodes, dtype=torch.long)
        edges = torch.stack([torch.cat([start, end]), torch.cat([end, start])])
        graphs.append(Data(x=torch.randn(nodes, 3), edge_index=edges, y=torch.tensor([label])))
    return graphs


def graph_network() -> nn.Module:
    from torch_geometric.nn import GCNConv, global_mean_pool

    class GraphClassifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = GCNConv(3, 8), nn.Linear(8, 2)

        def forward(self, batch: Any) -> Tensor:
            return self.head(global_mean_pool(torch.tanh(self.first(batch.x, batch.edge_index)), batch.batch))

    return GraphClassifier().eval()


def graph_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch), batch.y)


@family("graphs", "torch_geometric")
def _graphs() -> Case:
    """Several graphs are a minibatch, which the package's own loader makes of them."""
    from torch_geometric.loader import DataLoader

    model = graph_network()
    loader = DataLoader(made_up_graphs(), batch_size=16, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(10):
        for batch in loader:
            optimizer.zero_grad()
            graph_loss(model, batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    return Case(model, loader, graph_loss, {})


# ---- wrapped and compiled -----------------------------------------------------------------------------------


@family("mlp")
def _mlp() -> Case:
    return digits_case(mlp(64, 16, 10))


@family("lightning", "lightning")
def _lightning() -> Case:
    """Its own `training_step` is the loss, with what it logs."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(64, 16, 10)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

    return digits_case(Module(), lambda model, batch: model.training_step(batch, 0))


@family("compiled", compiles=True)
def _compiled() -> Case:
    case = digits_case(mlp(64, 16, 10))
    return case._replace(model=torch.compile(case.model))


@family("scripted")
def _scripted() -> Case:
    case = digits_case(mlp(64, 16, 10))
    return case._replace(model=torch.jit.script(case.model))


@family("data-parallel")
def _data_parallel() -> Case:
    return digits_case(nn.DataParallel(mlp(64, 16, 10)))


# ---- precision ----------------------------------------------------------------------------------------------


@family("bfloat16")
def _bfloat16() -> Case:
    case = digits_case(mlp(64, 16, 10))
    images, labels = case.data
    return case._replace(model=case.model.bfloat16(), data=(images.bfloat16(), labels))


@family("autocast")
def _autocast() -> Case:
    return digits_case(mlp(64, 16, 10), execution=Execution(autocast=torch.bfloat16))


class Mixed(nn.Module):
    """Layers in bfloat16, norms in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x.flatten(1).to(self.first.weight.dtype)).to(self.norm.weight.dtype)))
        return self.head(x.to(self.head.weight.dtype)).float()


@family("mixed")
def _mixed() -> Case:
    case = digits_case(Mixed())
    case.model.first.bfloat16()
    case.model.head.bfloat16()
    return case


class Int8Linear(nn.Module):
    """A layer as libraries for 8-bit models keep it: whole numbers in a buffer, and a float scale for each row."""

    weight: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        w = layer.weight.detach()
        scale = w.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (w / scale).round().to(torch.int8))
        self.scale, self.bias = nn.Parameter(scale), nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


@family("int8")
def _int8() -> Case:
    """The float part of a quantized model: scales and biases."""
    case = digits_case(mlp(64, 16, 10))
    layers = [Int8Linear(m) if isinstance(m, nn.Linear) else m for m in case.model]
    return case._replace(model=nn.Sequential(*layers).eval())


@family("int8 dynamic", refused="the model is quantized")
def _int8_dynamic() -> Case:
    """torch's own quantized layers: no parameter is left."""
    case = digits_case(mlp(64, 16, 10))
    return case._replace(model=torch.ao.quantization.quantize_dynamic(case.model, {nn.Linear}, dtype=torch.qint8))


# ---- what models return -------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A network for digits whose output is in some container, with the loss if it is given labels."""

    def __init__(self, pack: Callable[[Tensor | None, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = mlp(64, 16, 10), pack

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        return self.pack(None if labels is None else F.cross_entropy(logits, labels), logits)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class NamedOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor


def _dictionary(loss: Tensor | None, logits: Tensor) -> dict[str, Any]:
    return {"loss": loss, "logits": logits}


def _own_loss(pack: Callable[[Tensor | None, Tensor], Any]) -> Case:
    images, labels = digits()
    case = digits_case(Returning(lambda _, logits: logits))
    case.model.pack = pack
    return case._replace(data={"x": images, "labels": labels}, loss_fn=None)


@family("returns dictionary")
def _returns_dictionary() -> Case:
    return _own_loss(_dictionary)


@family("returns dataclass")
def _returns_dataclass() -> Case:
    return _own_loss(Output)


@family("returns named tuple")
def _returns_named_tuple() -> Case:
    return _own_loss(NamedOutput)


@family("returns tuple")
def _returns_tuple() -> Case:
    """``(loss, logits)``, as models of Hugging Face do with ``return_dict=False``."""
    return _own_loss(lambda loss, logits: (loss, logits))


@family("loss of dictionary")
def _loss_of_dictionary() -> Case:
    """A loss function of an output that is a dictionary."""
    return digits_case(Returning(_dictionary), lambda output, target: F.cross_entropy(output["logits"], target))


@family("loss of dataclass")
def _loss_of_dataclass() -> Case:
    return digits_case(Returning(Output), lambda output, target: F.cross_entropy(output.logits, target))


@family("loss of model output", "transformers")
def _loss_of_model_output() -> Case:
    from transformers.modeling_outputs import ImageClassifierOutput

    pack = lambda loss, logits: ImageClassifierOutput(loss=loss, logits=logits)  # noqa: E731
    return digits_case(Returning(pack), lambda output, target: F.cross_entropy(output.logits, target))


# ---- unusual networks ---------------------------------------------------------------------------------------


@family("autoencoder")
def _autoencoder() -> Case:
    images, _ = digits()
    return train(Case(mlp(64, 4, 64).eval(), (images, images.flatten(1)), F.mse_loss, {}), steps=200)


@family("autoencoder summed", refused="reduction='mean'")
def _autoencoder_summed() -> Case:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    return _autoencoder()._replace(loss_fn=loss)


class Branching(nn.Module):
    """Python looks at the batch's values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        if x.mean() > 0:
            h = torch.tanh(self.second(h))
        return self.head(h)


@family("control flow")
def _control_flow() -> Case:
    return digits_case(Branching())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


@family("autograd function")
def _autograd_function() -> Case:
    return digits_case(mlp(64, 16, 10, activation=Squares))


class Experts(nn.Module):
    """The best two of four experts for each sample, weighted by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.ModuleList(mlp(64, 8, 10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        weights, chosen = self.gate(x).topk(2)
        weights = weights.softmax(-1)
        out = x.new_zeros(len(x), 10)
        for k, expert in enumerate(self.experts):
            sample, slot = torch.where(chosen == k)
            if len(sample):
                out = out.index_add(0, sample, weights[sample, slot, None] * expert(x[sample]))
        return out


@family("experts")
def _experts() -> Case:
    return digits_case(Experts())


@family("equation")
def _equation() -> Case:
    """u' = cos x, whose solution is a network: the loss takes derivatives itself."""

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x = batch[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - torch.cos(x)).square().mean()

    points = torch.linspace(0, 3, 64)[:, None]
    return train(Case(mlp(1, 16, 1).eval(), (points,), loss, {}), steps=200)
