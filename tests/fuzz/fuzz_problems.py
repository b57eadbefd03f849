"""Models, losses and data drawn at random, with what is known of each by construction."""

from __future__ import annotations

import random
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

Batch = Any


class Choices:
    """Random choices that follow a seed."""

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self._rng.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self._rng.random() < share)

    def among(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def weighted(self, options: Mapping[str, float]) -> str:
        total = np.array(list(options.values()))
        return list(options)[int(self._rng.choice(len(options), p=total / total.sum()))]

    def logarithmic(self, low: float, high: float) -> float:
        return float(np.exp(self._rng.uniform(np.log(low), np.log(high))))

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self._rng.standard_normal(shape)))

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self._rng.integers(0, high, shape)))


# ---- models of vectors ---------------------------------------------------------------------------------------------


def _mlp(d: int, k: int, hidden: int, between: Sequence[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, hidden), *between, nn.Linear(hidden, k))


class _Through(nn.Module):
    """A network with a function between its layers."""

    def __init__(self, d: int, k: int, hidden: int, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer, self._between = nn.Linear(d, hidden), nn.Linear(hidden, k), between

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self._between(self, torch.tanh(self.inner(x))))


class _Tied(nn.Module):
    def __init__(self, d: int, k: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, k)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class _Shapes(nn.Module):
    """A scalar, an empty tensor, a transposed one, and one of three dimensions."""

    def __init__(self, d: int, k: int) -> None:
        super().__init__()
        self.scale, self.nothing = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(0, d))
        self.turned, self.cube = nn.Parameter(torch.randn(d, k).T), nn.Parameter(torch.randn(2, k, k))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.turned) * self.scale + self.nothing.sum()
        return torch.einsum("bk,ikl->bl", hidden, self.cube)


class _Checkpointed(nn.Module):
    def __init__(self, d: int, k: int, hidden: int, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(d, hidden), nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
        self.head, self._reentrant = nn.Linear(hidden, k), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(checkpoint(self.block, hidden, use_reentrant=self._reentrant))


class _Product(torch.autograd.Function):
    """x·Wᵀ, whose backward pass reads the module's own weight, not what forward saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: Any) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] @ ctx.module.weight, grads[0].T @ x, None


class _Custom(nn.Module):
    def __init__(self, d: int, k: int, hidden: int) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(d, hidden), nn.Parameter(torch.randn(k, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(torch.tanh(self.first(x)), self.weight, self)  # type: ignore[no-any-return,no-untyped-call]


class _Counting(nn.Module):
    """Writes to buffers that do not enter the loss, in place and by assignment."""

    def __init__(self, d: int, k: int, hidden: int) -> None:
        super().__init__()
        self.layers = _mlp(d, k, hidden, [nn.Tanh()])
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layers(x)


class _Caching(nn.Module):
    """Keeps counters and tensors as plain attributes."""

    def __init__(self, d: int, k: int, hidden: int) -> None:
        super().__init__()
        self.layers = _mlp(d, k, hidden, [nn.Tanh()])
        self.calls, self.last, self.seen = 0, torch.zeros(()), {"sizes": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().sum()
        self.seen["sizes"].append(len(x))
        self.seen["sizes"] = self.seen["sizes"][-3:]
        return self.layers(x)


class _InPlace(nn.Module):
    """Changes its input."""

    def __init__(self, d: int, k: int, hidden: int) -> None:
        super().__init__()
        self.layers = _mlp(d, k, hidden, [nn.ReLU(inplace=True)])

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.layers(x.mul_(2))


class _Noisy(nn.Module):
    """Draws from one of the generators that there are."""

    def __init__(self, d: int, k: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.layers, self._kind = _mlp(d, k, hidden, [nn.Tanh()]), kind
        self.generator: Any = None
        if kind == "torch's own":
            self.generator = torch.Generator().manual_seed(5)
        elif kind == "numpy's own":
            self.generator = np.random.default_rng(5)
        elif kind == "python's own":
            self.generator = random.Random(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 0.3 * noise_like(x, self._kind, self.generator))


def noise_like(x: Tensor, kind: str, generator: Any) -> Tensor:
    """Standard normals, or nearly, of one of the generators."""
    source: Any
    if kind.startswith("torch"):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if kind.startswith("numpy"):
        source = np.random if generator is None else generator
        return torch.as_tensor(source.standard_normal(tuple(x.shape)), dtype=x.dtype)
    source = random if generator is None else generator
    return torch.tensor([source.gauss(0, 1) for _ in range(x.numel())], dtype=x.dtype).reshape(x.shape)


class _LayerDrop(nn.Module):
    def __init__(self, d: int, k: int, hidden: int) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(d, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, k)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if random.random() < 0.7:
            hidden = hidden + torch.tanh(self.middle(hidden))
        return self.head(hidden)


def _seen_from_outside(d: int, k: int, hidden: int) -> nn.Module:
    model = _mlp(d, k, hidden, [nn.Tanh()])
    calls: list[int] = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(1))
    model[2].register_full_backward_hook(lambda module, given, taken: None)
    return model


def _normed(d: int, k: int, hidden: int, function: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(function(nn.Linear(d, hidden)), nn.Tanh(), nn.Linear(hidden, k))


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: from inputs, outputs and width.
        training: whether it is meant to be in training mode; None: either.
        traits: what is known of it: "random", "batch" (a sample's loss depends on the others'), "state" (the loss
            depends on buffers that it writes), "writes" (to buffers), "input" (writes to its input), "projects" (writes
            to parameters), "hooks", "reentrant", "plain" (nothing else than a function of parameters and input).
    """

    make: Callable[[int, int, int], nn.Module]
    training: bool | None = None
    traits: frozenset[str] = frozenset()


def _kind(make: Callable[[int, int, int], nn.Module], training: bool | None = None, traits: str = "") -> Kind:
    return Kind(make, training, frozenset(traits.split()))


VECTOR_MODELS: dict[str, Kind] = {
    "linear": _kind(lambda d, k, h: nn.Linear(d, k)),
    "linear without bias": _kind(lambda d, k, h: nn.Linear(d, k, bias=False)),
    "tanh": _kind(lambda d, k, h: _mlp(d, k, h, [nn.Tanh()])),
    "relu": _kind(lambda d, k, h: _mlp(d, k, h, [nn.ReLU()])),
    "relu in place": _kind(lambda d, k, h: _mlp(d, k, h, [nn.ReLU(inplace=True)])),
    "gelu": _kind(lambda d, k, h: _mlp(d, k, h, [nn.GELU()])),
    "deep linear": _kind(lambda d, k, h: _mlp(d, k, h, [nn.Linear(h, h, bias=False)])),
    "batch norm, training": _kind(lambda d, k, h: _mlp(d, k, h, [nn.BatchNorm1d(h), nn.Tanh()]), True, "batch writes"),
    "batch norm, evaluation": _kind(lambda d, k, h: _mlp(d, k, h, [nn.BatchNorm1d(h), nn.Tanh()]), False),
    "batch norm without statistics": _kind(
        lambda d, k, h: _mlp(d, k, h, [nn.BatchNorm1d(h, track_running_stats=False), nn.Tanh()]), None, "batch"
    ),
    "layer norm": _kind(lambda d, k, h: _mlp(d, k, h, [nn.LayerNorm(h), nn.Tanh()])),
    "dropout, training": _kind(lambda d, k, h: _mlp(d, k, h, [nn.Tanh(), nn.Dropout(0.3)]), True, "random"),
    "dropout, evaluation": _kind(lambda d, k, h: _mlp(d, k, h, [nn.Tanh(), nn.Dropout(0.3)]), False),
    "dropout of nothing": _kind(lambda d, k, h: _mlp(d, k, h, [nn.Tanh(), nn.Dropout(0.0)]), True),
    "functional dropout": _kind(lambda d, k, h: _Through(d, k, h, lambda m, x: F.dropout(x, 0.3)), None, "random"),
    "weight norm, old": _kind(lambda d, k, h: _normed(d, k, h, nn.utils.weight_norm)),
    "weight norm": _kind(lambda d, k, h: _normed(d, k, h, parametrizations.weight_norm)),
    "spectral norm, old, training": _kind(
        lambda d, k, h: _normed(d, k, h, nn.utils.spectral_norm), True, "state writes"
    ),
    "spectral norm, old, evaluation": _kind(lambda d, k, h: _normed(d, k, h, nn.utils.spectral_norm), False),
    "spectral norm, training": _kind(
        lambda d, k, h: _normed(d, k, h, parametrizations.spectral_norm), True, "state writes"
    ),
    "spectral norm, evaluation": _kind(lambda d, k, h: _normed(d, k, h, parametrizations.spectral_norm), False),
    "tied": _kind(lambda d, k, h: _Tied(d, k)),
    "shapes": _kind(lambda d, k, h: _Shapes(d, k)),
    "checkpoint": _kind(lambda d, k, h: _Checkpointed(d, k, h, reentrant=False)),
    "reentrant checkpoint": _kind(lambda d, k, h: _Checkpointed(d, k, h, reentrant=True), None, "reentrant"),
    "custom function": _kind(_Custom),
    "counting": _kind(_Counting, None, "writes"),
    "caching": _kind(_Caching),
    "in place": _kind(_InPlace, None, "input"),
    "layer drop": _kind(_LayerDrop, None, "random"),
    "hooks": _kind(_seen_from_outside, None, "hooks"),
} | {
    f"noise of {kind}": _kind(lambda d, k, h, kind=kind: _Noisy(d, k, h, kind), None, "random")  # type: ignore[misc]
    for kind in ("torch", "numpy", "python", "torch's own", "numpy's own", "python's own")
}


# ---- models of pictures and tokens ---------------------------------------------------------------------------------

VOCABULARY, LENGTH, PAD = 7, 5, 0


class _Pooled(nn.Module):
    """Embeddings averaged over a text, padding included or not."""

    def __init__(self, k: int, h: int, *, masked: bool, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head, self._masked = nn.Embedding(VOCABULARY, h, **options), nn.Linear(h, k), masked

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.embedding(tokens)
        if not self._masked:
            return self.head(vectors.mean(1))
        mask = (tokens != PAD).unsqueeze(-1).to(vectors.dtype)
        return self.head((vectors * mask).sum(1) / mask.sum(1).clamp(min=1))


class _Bag(nn.Module):
    def __init__(self, k: int, h: int) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCABULARY, h, mode="mean", padding_idx=PAD), nn.Linear(h, k)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class _Recurrent(nn.Module):
    def __init__(self, k: int, h: int, cell: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCABULARY, h), cell(h, h, batch_first=True, **options)  # type: ignore[call-arg]
        self.head = nn.Linear(h, k)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(tokens))[0][:, -1])


class _Encoder(nn.Module):
    def __init__(self, k: int, *, per_token: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head, self._per_token = nn.Linear(4, k), per_token

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(tokens), src_key_padding_mask=tokens == PAD)
        return self.head(hidden).transpose(1, 2) if self._per_token else self.head(hidden[:, 0])


class _PerToken(nn.Module):
    def __init__(self, k: int, h: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, h), nn.Linear(h, k)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens))).transpose(1, 2)


TEXT_MODELS: dict[str, Kind] = {
    "bag": _kind(lambda d, k, h: _Bag(k, h)),
    "pooled": _kind(lambda d, k, h: _Pooled(k, h, masked=False)),
    "pooled, padding_idx": _kind(lambda d, k, h: _Pooled(k, h, masked=False, padding_idx=PAD), None, "stuck"),
    "pooled, padding_idx, masked": _kind(lambda d, k, h: _Pooled(k, h, masked=True, padding_idx=PAD)),
    "pooled, max_norm": _kind(lambda d, k, h: _Pooled(k, h, masked=False, max_norm=1.0), None, "projects"),
    "lstm": _kind(lambda d, k, h: _Recurrent(k, h, nn.LSTM)),
    "lstm with dropout": _kind(lambda d, k, h: _Recurrent(k, h, nn.LSTM, num_layers=2, dropout=0.3), True, "random"),
    "gru": _kind(lambda d, k, h: _Recurrent(k, h, nn.GRU)),
    "encoder": _kind(lambda d, k, h: _Encoder(k, per_token=False)),
}
TOKEN_MODELS: dict[str, Kind] = {
    "encoder of tokens": _kind(lambda d, k, h: _Encoder(k, per_token=True)),
    "per token": _kind(lambda d, k, h: _PerToken(k, h)),
}


def _convolutional(d: int, k: int, h: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, k))


def _convolutional_with_norm(d: int, k: int, h: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(32, k))


PICTURE_MODELS: dict[str, Kind] = {
    "convolutional": _kind(_convolutional),
    "convolutional, batch norm, training": _kind(_convolutional_with_norm, True, "batch writes"),
    "convolutional, batch norm, evaluation": _kind(_convolutional_with_norm, False),
}


class _OwnLoss(nn.Module):
    """A model that returns its own loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], form: str) -> None:
        super().__init__()
        self.model, self._loss, self._form = model, loss, form

    def forward(self, x: Tensor, y: Tensor) -> Any:
        output = self.model(x)
        loss = self._loss(output, y)
        if self._form == "dictionary":
            return {"loss": loss, "output": output}
        return types.SimpleNamespace(loss=loss, output=output)


# ---- losses --------------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """A model and its loss, ready to be estimated.

    Attributes:
        model: the model.
        loss_fn: as `estimate_llc` takes it.
        others: modules that the loss holds, such as a teacher.
        value: the loss of a batch, a scalar, by plain calls.
    """

    model: nn.Module
    loss_fn: Any
    others: list[nn.Module]
    value: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Problem:
    """What is drawn, apart from how the data come.

    Attributes:
        name: for people.
        columns: inputs and target, samples first; floating-point numbers in float64.
        make: the model and its loss in a dtype; each call makes another one with the same numbers.
        form: what a batch is: "pair" or "dictionary".
        traits: as for :class:`Kind`; beside these "whole" (the loss of a minibatch is not the mean of its samples'
            losses), "sum".
    """

    name: str
    columns: dict[str, Tensor]
    make: Callable[[torch.dtype], Built]
    form: str
    traits: frozenset[str]


_REGRESSION = {"mse": 4, "huber": 1, "l1": 1, "samples": 1, "with model": 1, "sum": 0.5, "regularized": 1, "teacher": 1}
_REGRESSION |= {"own": 1}
_CLASSES = {"mean": 3, "samples": 1, "weights": 1, "smoothing": 1, "ignore": 1, "own": 1, "sum": 0.5}


def draw_problem(seed: int) -> Problem:
    """A problem that follows a seed."""
    c = Choices(seed, 1)
    n = c.among([6, 7, 12, 16, 23, 30, 40, 64])
    task = c.weighted({"vectors": 6, "classes": 2.5, "texts": 2.5, "tokens": 1.5, "pictures": 1.5, "contrast": 1})
    d, k, hidden = c.integer(1, 4), c.integer(1, 3), c.integer(2, 5)
    if task == "vectors":
        kinds, x, y, loss = VECTOR_MODELS, c.normal(n, d), c.normal(n, k), c.weighted(_REGRESSION)
    elif task == "contrast":
        kinds, x, y, loss = VECTOR_MODELS, c.normal(n, d), c.normal(n, k), "contrast"
    elif task == "tokens":
        k = VOCABULARY
        kinds, x = TOKEN_MODELS, _texts(c, n)
        y, loss = x.roll(1, 1), c.weighted({"mean": 1, "ignore": 3, "samples": 1})
        if loss == "ignore":
            y = torch.where(y == PAD, -100, y)
    else:
        k = max(2, k)
        y, loss = c.integers(k, n), c.weighted(_CLASSES)
        if task == "classes":
            kinds, x = VECTOR_MODELS, c.normal(n, d)
        elif task == "texts":
            kinds, x = TEXT_MODELS, _texts(c, n)
        else:
            kinds, x = PICTURE_MODELS, c.normal(n, 1, 6, 6)
        if loss == "ignore":
            y = torch.where(c.normal(n) > 1.2, -100, y)
    if task == "contrast":
        names = [name for name, kind in kinds.items() if "sum" not in kind.traits]
        kind_name = c.among(names)
    else:
        kind_name = c.among(list(kinds))
    kind = kinds[kind_name]
    traits = set(kind.traits)
    if loss in ("ignore", "weights", "contrast"):
        traits.add("whole")
    if loss == "sum":
        traits.add("sum")
    if loss == "samples":
        traits.add("per sample")
    if "batch" in kind.traits and loss == "sum":  # which does not show: halves of a batch have other statistics
        loss = "mean"
        traits.discard("sum")
    is_training = c.chance(0.5) if kind.training is None else kind.training
    freezes, weights_seed = c.chance(0.12), c.integer(0, 10**6)
    if freezes:
        traits.discard("stuck")
    own_form = c.among(["dictionary", "object"])
    form = "pair"
    if loss == "own" or (loss in ("with model", "contrast") and c.chance(0.5)):
        form = "dictionary"
    scale = c.among([0.3, 0.7])

    def make(dtype: torch.dtype) -> Built:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated, and used all the same
            torch.manual_seed(weights_seed)
            model = kind.make(d, k, hidden).double()
            teacher = nn.Sequential(nn.Linear(d, k), nn.Tanh()).double().eval()
            weights = torch.rand(k, dtype=torch.float64) + 0.5
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(scale * torch.randn(p.shape, dtype=torch.float64))
                for name, b in model.named_buffers():
                    if "running" in name:
                        b.copy_(torch.rand(b.shape, dtype=torch.float64) + 0.5)
                if "state" in traits:  # power iterations, as after training
                    model.train()
                    for _ in range(100):
                        model(x[:2].double())
        model.to(dtype).train(is_training)
        teacher.to(dtype)
        if freezes and len(list(model.parameters())) > 1:
            next(iter(model.parameters())).requires_grad_(False)
        return _with_loss(model, loss, task, teacher, weights.to(dtype), form, own_form)

    mode = "training" if is_training else "evaluation"
    name = f"{task}: {kind_name} ({d}, {hidden}, {k}), {mode}, loss {loss}, n = {n}{', frozen part' if freezes else ''}"
    return Problem(name, {"x": x, "y": y}, make, form, frozenset(traits))


def _texts(c: Choices, n: int) -> Tensor:
    """Texts of different lengths, padded; none is empty."""
    tokens = 1 + c.integers(VOCABULARY - 1, n, LENGTH)
    lengths = 1 + c.integers(LENGTH, n)
    return torch.where(torch.arange(LENGTH) < lengths[:, None], tokens, PAD)


def _with_loss(
    model: nn.Module, loss: str, task: str, teacher: nn.Module, weights: Tensor, form: str, own_form: str
) -> Built:
    function = _loss_of_output(loss if loss not in ("own", "with model") else "mean", task, weights)
    if loss == "own":
        owner = _OwnLoss(model, function, own_form)
        owner.training = model.training
        return Built(owner, None, [], lambda batch: function(model(batch["x"]), batch["y"]))

    def parts(batch: Batch) -> tuple[Tensor, Tensor]:
        return (batch["x"], batch["y"]) if form == "dictionary" else (batch[0], batch[1])

    if loss == "with model":

        def by_model(model: nn.Module, batch: Batch) -> Tensor:
            x, y = parts(batch)
            return function(model(x), y)

        return Built(model, by_model, [], lambda batch: by_model(model, batch))
    if loss == "contrast":

        def contrast(model: nn.Module, batch: Batch) -> Tensor:
            x, y = parts(batch)
            return F.cross_entropy(model(x) @ y.T, torch.arange(len(x)))

        return Built(model, contrast, [], lambda batch: contrast(model, batch))
    if loss == "teacher":

        def distilled(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = teacher(batch[0])
            return F.mse_loss(model(batch[0]), wanted)

        return Built(model, distilled, [teacher], lambda batch: distilled(model, batch))
    if loss == "regularized":
        held = list(model.parameters())

        def regularized(output: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(output, target) + 0.05 * torch.stack([p.square().sum() for p in held]).sum()

        return Built(model, regularized, [], lambda batch: regularized(model(batch[0]), batch[1]))
    return Built(model, function, [], lambda batch: function(model(batch[0]), batch[1]).mean())


def _loss_of_output(loss: str, task: str, weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if task == "vectors":
        if loss == "samples":
            return lambda output, target: (output - target).square().mean(1)
        known = {"huber": F.huber_loss, "l1": F.l1_loss}
        if loss == "sum":
            return lambda output, target: F.mse_loss(output, target, reduction="sum")
        return known.get(loss, F.mse_loss)
    if loss == "samples":
        if task == "tokens":
            return lambda output, target: F.cross_entropy(output, target, reduction="none").mean(1)
        return lambda output, target: F.cross_entropy(output, target, reduction="none")
    if loss == "sum":
        return lambda output, target: F.cross_entropy(output, target, reduction="sum")
    if loss == "weights":
        return lambda output, target: F.cross_entropy(output, target, weight=weights)
    if loss == "smoothing":
        return lambda output, target: F.cross_entropy(output, target, label_smoothing=0.1)
    if loss == "ignore":
        # A batch of nothing but ignored labels has no mean.
        return lambda output, target: (
            F.cross_entropy(output, target, reduction="sum") / (target != -100).sum().clamp(min=1)
        )
    return F.cross_entropy


# ---- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Given:
    """Data as they are given to `estimate_llc`.

    Attributes:
        name: for people.
        data: what is passed.
        batch_size: what is passed as batch_size.
        num_samples: n, as it should be found; None: it can't be known.
        weights: how often each sample comes, relative; None: once in each pass.
        is_augmented: whether samples are others each time.
        is_indexed: whether minibatches are sampled by the package itself.
        is_once: whether it can be read only once.
        least: the smallest minibatch that a chain sees.
        has_workers: whether other processes read.
        generators: that the data hold.
        order: "fixed", "shuffled" or "drawn"
    """

    name: str
    data: Any
    batch_size: int | None
    num_samples: int | None
    weights: Tensor | None = None
    is_augmented: bool = False
    is_indexed: bool = False
    is_once: bool = False
    least: int = 1
    has_workers: bool = False
    generators: list[Any] = field(default_factory=list)
    order: str = "shuffled"


class Rows(Dataset[Any]):
    """Samples one by one, which may be changed as they are read."""

    def __init__(self, columns: Mapping[str, Tensor], form: str, noise: str = "", generator: Any = None) -> None:
        self._columns, self._form, self._noise, self._generator = columns, form, noise, generator

    def __len__(self) -> int:
        return len(self._columns["y"])

    def __getitem__(self, index: int) -> Any:
        x, y = self._columns["x"][index], self._columns["y"][index]
        if self._noise:
            x = x + 0.1 * noise_like(x, self._noise, self._generator)
        return {"x": x, "y": y} if self._form == "dictionary" else (x, y)


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self._rows[k] for k in range(len(self._rows)))


class Batches:
    """An iterable of batches of no library, with a length or without, shuffled by a generator or not."""

    def __init__(self, batches: list[Any], shuffles: str) -> None:
        self._batches, self._shuffles = batches, shuffles

    def __iter__(self) -> Iterator[Any]:
        order = list(range(len(self._batches)))
        if self._shuffles == "torch":
            order = torch.randperm(len(order)).tolist()
        elif self._shuffles == "python":
            random.shuffle(order)
        return (self._batches[k] for k in order)


class SizedBatches(Batches):
    def __len__(self) -> int:
        return len(self._batches)


def _collate(samples: list[Any]) -> Any:
    if isinstance(samples[0], Mapping):
        return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    return [torch.stack(tensors) for tensors in zip(*samples, strict=True)]


def _cut(columns: Mapping[str, Tensor], form: str, indices: Any) -> Any:
    x, y = columns["x"][indices], columns["y"][indices]
    return {"x": x, "y": y} if form == "dictionary" else (x, y)


_FORMS = {"tensors": 6, "data set of tensors": 1, "data set": 2, "augmented": 2, "shuffled loader": 2}
_FORMS |= {"sequential loader": 1, "replacement loader": 0.7, "subset loader": 0.7, "weighted loader": 0.7}
_FORMS |= {"batched loader": 0.7, "batches in a loader": 0.7, "collated loader": 0.7, "own generator": 0.7}
_FORMS |= {"workers": 0.15, "stream": 0.5, "iterable": 1, "sized iterable": 1, "iterator": 0.3, "augmented loader": 0.7}


def draw_data(seed: int, problem: Problem, dtype: torch.dtype, *, is_whole: bool = False) -> Given:
    """Data for a problem that follow a seed.

    Args:
        seed: of the choices.
        problem: whose data they are.
        dtype: of floating-point numbers.
        is_whole: whether every minibatch is to be all of the data.
    """
    c = Choices(seed, 2)
    columns = {name: t.to(dtype) if t.is_floating_point() else t.clone() for name, t in problem.columns.items()}
    form, n = problem.form, len(columns["y"])
    least = 2 if "batch" in problem.traits or "whole" in problem.traits else 1
    size = c.among([s for s in (1, 2, 3, 4, 5, 8) if least <= s <= n])
    name = "tensors" if is_whole else c.weighted(_FORMS)
    if name == "data set of tensors" and form != "pair":
        name = "tensors"
    if name.startswith("augmented") and not columns["x"].is_floating_point():
        name = "data set" if name == "augmented" else "shuffled loader"
    rows = Rows(columns, form)
    if name in ("tensors", "data set of tensors", "data set", "augmented"):
        return _indexed(c, name, columns, rows, form, size, n, is_whole)
    drops = c.chance(0.4) or n % size < least
    tail = n % size if drops else 0
    smallest = size if drops or n % size == 0 else n % size
    last = {"drop_last": drops, "batch_size": size}
    label = f"{name}, batches of {size}{', tail dropped' if drops and n % size else ''}"

    def given(data: Any, num_samples: int | None, **more: Any) -> Given:
        return Given(label, data, None, num_samples, **({"least": smallest} | more))

    if name == "shuffled loader":
        return given(DataLoader(rows, shuffle=True, **last), n)
    if name == "sequential loader":
        return given(DataLoader(rows, **last), n - tail, order="fixed")
    if name == "collated loader":
        return given(DataLoader(rows, shuffle=True, collate_fn=_collate, **last), n)
    if name == "own generator":
        generator = torch.Generator().manual_seed(c.integer(0, 99))
        return given(DataLoader(rows, shuffle=True, generator=generator, **last), n, generators=[generator])
    if name == "workers":
        # Each pass starts one, which takes far longer than all else.
        return given(DataLoader(rows, size, shuffle=True, num_workers=1, drop_last=drops), n, has_workers=True)
    if name == "replacement loader":
        sampler = RandomSampler(rows, replacement=True)
        return given(DataLoader(rows, sampler=sampler, **last), n, order="drawn")
    if name == "subset loader":
        count = max(size, n // 2)
        indices = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist()
        chosen = torch.zeros(n, dtype=torch.float64)
        chosen[indices] = 1
        drops = drops or count % size < least
        loader = DataLoader(rows, sampler=SubsetRandomSampler(indices), batch_size=size, drop_last=drops)
        return given(loader, count, weights=chosen, least=size if drops else count % size or size)
    if name == "weighted loader":
        weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[torch.arange(n) % 3]
        loader = DataLoader(rows, sampler=WeightedRandomSampler(weights.tolist(), n), **last)
        return given(loader, n, weights=weights, order="drawn")
    if name == "batched loader":
        loader = DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), size, drops))
        return given(loader, n)
    if name == "augmented loader":
        noise, generator = _noise(c)
        loader = DataLoader(Rows(columns, form, noise, generator), shuffle=True, **last)
        held = [generator] if generator is not None else []
        return given(loader, n, is_augmented=True, generators=held)
    if name == "stream":
        # How many there are shows only if chains are long enough.
        return given(DataLoader(Stream(rows), **last), None, order="fixed")
    pieces = [torch.arange(n)[k : k + size] for k in range(0, n - tail, size)]
    batches = [_cut(columns, form, p) for p in pieces]
    lengths = torch.tensor([len(p) for p in pieces], dtype=torch.float64)
    # Minibatches are equally likely, however many samples they hold.
    weights = torch.zeros(n, dtype=torch.float64)
    weights[: n - tail] = torch.cat([torch.full((len(p),), 1 / len(p), dtype=torch.float64) for p in pieces])
    if bool((lengths == lengths[0]).all()):
        weights = (weights > 0).double()
    shuffles = c.among(["", "torch", "python"])
    order = "shuffled" if shuffles else "fixed"
    if name == "batches in a loader":
        loader = DataLoader(batches, batch_size=None, shuffle=bool(shuffles))  # type: ignore[arg-type]
        return given(loader, n - tail, weights=weights, order=order)
    label += f", shuffled by {shuffles}" if shuffles else ""
    if name == "iterator":
        return given(iter(batches), None, is_once=True, order="drawn")
    if name == "iterable":  # how many there are shows only if chains are long enough
        return given(Batches(batches, shuffles), None, weights=weights, order=order)
    return given(SizedBatches(batches, shuffles), n - tail, weights=weights, order=order)


def _noise(c: Choices) -> tuple[str, Any]:
    noise = c.among(["torch", "numpy", "python", "torch's own", "numpy's own", "python's own"])
    own: dict[str, Callable[[], Any]] = {
        "torch's own": lambda: torch.Generator().manual_seed(3),
        "numpy's own": lambda: np.random.default_rng(3),
        "python's own": lambda: random.Random(3),
    }
    return noise, own[noise]() if noise in own else None


def _indexed(
    c: Choices, name: str, columns: dict[str, Tensor], rows: Rows, form: str, size: int, n: int, is_whole: bool
) -> Given:
    asked: int | None = c.among([size, size, size, n, n + 5, None])
    if is_whole:
        asked = c.among([None, n])
    label = f"{name}, batch_size={asked}"
    common: dict[str, Any] = {"is_indexed": True, "least": min(asked or 512, n)}
    if name == "data set":
        return Given(label, rows, asked, n, **common)
    if name == "augmented":
        noise, generator = _noise(c)
        held = [] if generator is None else [generator]
        data = Rows(columns, form, noise, generator)
        return Given(f"{label}, noise of {noise}", data, asked, n, is_augmented=True, generators=held, **common)
    if name == "data set of tensors":
        return Given(label, TensorDataset(columns["x"], columns["y"]), asked, n, **common)
    whole = dict(columns) if form == "dictionary" else (columns["x"], columns["y"])
    return Given(label, whole, asked, n, **common)
