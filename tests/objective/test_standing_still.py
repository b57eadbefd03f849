"""A chain that stands still has λ̂ = 0, whatever average the loss of a minibatch is; L(w*) is that average."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from runs import arguments
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import llc_fast
from llc_fast.result import LLCResult

N, BATCH = 203, 8


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pairs() -> tuple[Tensor, Tensor]:
    x = _numbers(N, 4)
    return x, x[:, :1].tanh() + 0.3 * _numbers(N, 1, seed=1)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


class _Tokens(nn.Module):
    """The mean over a batch's tokens, of which samples have 1 to 6: not the mean of what samples lose."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.table(input_ids).flatten(0, 1), labels.flatten(), ignore_index=-100)}


def _tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, (N, 6), generator=generator)
    lengths = torch.randint(1, 7, (N, 1), generator=generator)
    return {"input_ids": ids, "labels": torch.where(torch.arange(6) < lengths, (ids + lengths) % 6, -100)}


def _contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    first, second = (F.normalize(model(t), dim=1) for t in batch)
    return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))


class _Noise(nn.Linear):
    """Adds noise in evaluation mode too, as variational autoencoders do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 1)


class _LayerDrop(nn.Module):
    """Leaves a layer out by the dice of Python, NumPy or its own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.second, self.draw = nn.Linear(4, 4), nn.Linear(4, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x) if self.draw() < 0.7 else x)


class _Encoder(nn.Module):
    """Without gradients torch evaluates this by other kernels, which set padding to zero."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.encoder, self.out = nn.TransformerEncoder(layer, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        sequence = torch.stack([x, x.roll(1, 1), x.roll(2, 1)], dim=1)
        hidden = self.encoder(sequence, src_key_padding_mask=torch.stack([x[:, 0] > 9, x[:, 0] > 0, x[:, 1] > 0], 1))
        return self.out(hidden.mean(dim=1))


class _Augmented(Dataset[Any]):
    """Adds noise of one generator or another to every sample it is asked for."""

    def __init__(self, draw: Callable[[], float]) -> None:
        (self._x, self._y), self._draw = _pairs(), draw

    def __len__(self) -> int:
        return N

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self._x[k] + self._draw(), self._y[k]


def _mlp(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 1))


def _loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*_pairs()), batch_size=BATCH, **options)


def _weighted() -> DataLoader[Any]:
    weights = torch.linspace(0.1, 2.0, N)
    return _loader(sampler=WeightedRandomSampler(weights, N))  # type: ignore[arg-type]


def _class_weights(output: Tensor, target: Tensor) -> Tensor:
    """A mean over weights that differ from batch to batch."""
    logits = torch.cat([output, -output], dim=1)
    return F.cross_entropy(logits, (target[:, 0] > 0.4).long(), weight=torch.tensor([0.2, 3.0]))


_OWN = np.random.default_rng(3)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any]] = {
    "mean of samples": (_mlp, _pairs, F.mse_loss),
    "mean over tokens": (_Tokens, _tokens, None),
    "contrastive": (lambda: nn.Linear(4, 3), lambda: (_pairs()[0], _numbers(N, 4, seed=2)), _contrastive),
    "class weights": (_mlp, _pairs, _class_weights),
    "batch statistics": (lambda: _mlp(nn.BatchNorm1d(6)).train(), _pairs, F.mse_loss),
    "power iterations": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)),
        _pairs,
        F.mse_loss,
    ),
    "batch statistics in eval mode": (
        lambda: _mlp(nn.BatchNorm1d(6, track_running_stats=False)).eval(),
        _pairs,
        F.mse_loss,
    ),
    "dropout": (lambda: _mlp(nn.Dropout(0.3)).train(), _pairs, F.mse_loss),
    "noise in eval mode": (lambda: _Noise(4, 1).eval(), _pairs, F.mse_loss),
    "Python's dice": (lambda: _LayerDrop(random.random), _pairs, F.mse_loss),
    "NumPy's dice": (lambda: _LayerDrop(lambda: np.random.rand()), _pairs, F.mse_loss),
    "dice of its own": (lambda: _LayerDrop(np.random.default_rng(1).random), _pairs, F.mse_loss),
    "fast path": (lambda: _Encoder().eval(), _pairs, F.mse_loss),
    "augmented by NumPy": (_mlp, lambda: _Augmented(lambda: float(np.random.randn())), F.mse_loss),
    "augmented by Python": (_mlp, lambda: _Augmented(lambda: random.gauss(0, 1)), F.mse_loss),
    "augmented by its own": (_mlp, lambda: _Augmented(_OWN.normal), F.mse_loss),
    "shuffled loader": (_mlp, lambda: _loader(shuffle=True), F.mse_loss),
    "shuffled loader without its tail": (_mlp, lambda: _loader(shuffle=True, drop_last=True), F.mse_loss),
    "fixed loader": (_mlp, _loader, F.mse_loss),
    "fixed loader without its tail": (_mlp, lambda: _loader(drop_last=True), F.mse_loss),
    "weighted loader": (_mlp, _weighted, F.mse_loss),
    "batch statistics from a loader": (
        lambda: _mlp(nn.BatchNorm1d(6)).train(),
        lambda: _loader(shuffle=True, drop_last=True),
        F.mse_loss,
    ),
}


def _still(name: str, **options: Any) -> LLCResult:
    make, data, loss_fn = CASES[name]
    given = data()
    chosen: dict[str, Any] = {"lr": 1e-13, "num_chains": 3, "num_draws": 60, "num_burnin": 0, "progress": False}
    if not isinstance(given, DataLoader):
        chosen["batch_size"] = BATCH
    return llc_fast.estimate_llc(_seeded(make), given, loss_fn, **arguments(chosen | options))


def _check_still(result: LLCResult) -> None:
    rounding = result.nbeta * 1e-6 * abs(result.init_loss)
    assert abs(result.llc_mean) <= 6 * result.llc_stderr + rounding
    assert "standing-still" not in [w.code for w in result.warnings]
    np.testing.assert_allclose(result.llc_mean, result.nbeta * (result.loss_trace.mean() - result.init_loss), atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_still_chains(name: str) -> None:
    _check_still(_still(name))


@pytest.mark.parametrize("name", CASES)
def test_pairing_leaves_rounding(name: str) -> None:
    """Where chains are paired at all, nothing but rounding is left of λ̂; a shuffled loader's chains are not paired."""
    result = _still(name)
    if result.diagnostics["paired_with"] != "none":
        assert abs(result.llc_mean) < 1e-3
    else:
        assert name in ("shuffled loader", "shuffled loader without its tail", "weighted loader")


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("name", ["mean over tokens", "contrastive", "batch statistics in eval mode", "class weights"])
def test_every_strategy(name: str, strategy: str) -> None:
    result = _still(name, strategy=strategy)
    _check_still(result)
    pairing = "samples" if name == "mean over tokens" else "draws"
    assert result.settings["strategy"] == strategy and result.diagnostics["paired_with"] == pairing


@pytest.mark.parametrize("name", ["contrastive", "batch statistics in eval mode", "mean over tokens", "class weights"])
def test_microbatches(name: str) -> None:
    """The loss of a minibatch in pieces is another function than that of the whole; L(w*) is that of pieces."""
    result = _still(name, microbatch_size=4)
    _check_still(result)
    whole = _still(name)
    if name == "mean over tokens":  # L(w*) differs by less than its error
        assert (result.diagnostics["paired_with"], whole.diagnostics["paired_with"]) == ("draws", "samples")
    else:
        assert abs(result.init_loss - whole.init_loss) > 1e-3


@pytest.mark.parametrize("name", ["contrastive", "mean of samples", "dropout", "batch statistics"])
def test_the_whole_data_set_at_once(name: str) -> None:
    _check_still(_still(name, batch_size=None if name == "nothing" else N))


@pytest.mark.parametrize("name", ["mean of samples", "contrastive", "shuffled loader"])
def test_autocast(name: str) -> None:
    """The forward pass is rounded to bfloat16, at w* too."""
    result = _still(name, autocast=torch.bfloat16)
    assert abs(result.llc_mean) <= 6 * result.llc_stderr + result.nbeta * 4e-3 * abs(result.init_loss)


@pytest.mark.parametrize("name", ["contrastive", "dropout", "weighted loader", "augmented by NumPy", "dice of its own"])
def test_equal_seeds(name: str) -> None:
    """Whatever the program drew before, equal seeds give equal results, and the program's generators go on."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = _still(name)
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    state = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # type: ignore[union-attr]
    second = _still(name)
    assert state == (
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # type: ignore[union-attr]
        torch.get_rng_state().numpy().tobytes(),
    )
    np.testing.assert_array_equal(first.loss_trace, second.loss_trace)
    assert first.init_loss == second.init_loss


# ---- L(w*) against independent means ---------------------------------------------------------------------------


def _expected(loss: Callable[[Tensor], Tensor], count: int = 40_000) -> tuple[float, float]:
    """The mean over random minibatches and its error; `loss` gives those of minibatches by their samples' indices."""
    order = torch.rand(count, N, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :BATCH]
    with torch.no_grad():
        losses = torch.cat([loss(piece) for piece in order.split(2000)]).double()
    return float(losses.mean()), float(losses.std()) / math.sqrt(count)


def test_reference_loss_of_token_means() -> None:
    """L(w*) is the mean over minibatches, 1/B larger than that over all tokens by far more than its error."""
    model, data = _seeded(_Tokens), _tokens()

    def of_minibatches(rows: Tensor) -> Tensor:
        logits = model.table(data["input_ids"][rows])  # type: ignore[operator]
        labels = data["labels"][rows]
        each = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-100, reduction="none")
        return each.view(len(rows), -1).sum(1) / (labels != -100).flatten(1).sum(1)

    expected, error = _expected(of_minibatches)
    result = _still("mean over tokens", num_draws=1000)
    stderr = 0.3 / math.sqrt(3000)  # a minibatch's loss varies by less than 0.3
    assert abs(result.init_loss - expected) < 4 * math.hypot(error, stderr)


def test_reference_loss_of_pairs() -> None:
    model, (x, y) = _seeded(CASES["contrastive"][0]), CASES["contrastive"][1]()

    def of_minibatches(rows: Tensor) -> Tensor:
        first, second = (F.normalize(model(t[rows]), dim=2) for t in (x, y))
        logits = first @ second.transpose(1, 2) / 0.2
        return -logits.log_softmax(2).diagonal(dim1=1, dim2=2).mean(1)

    expected, error = _expected(of_minibatches)
    result = _still("contrastive", num_draws=1000)
    assert abs(result.init_loss - expected) < 4 * math.hypot(error, 0.6 / math.sqrt(3000))


def test_reference_loss_of_a_fixed_loader_counts_minibatches_equally() -> None:
    """203 samples in batches of 8 leave three: chains see them as often as any other batch."""
    model, (x, y) = _seeded(_mlp), _pairs()
    with torch.no_grad():
        losses = [float(F.mse_loss(model(a), b)) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    result = _still("fixed loader")
    assert result.init_loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.diagnostics["paired_with"] == "passes"


class _Shuffled:
    """Items, such as batches that stay together, in another order in each pass."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Any:
        return iter(random.sample(self._items, len(self._items)))


def _lists(sizes: list[int]) -> Any:
    """A sampler of the user's that gives lists of indices, in another order in each pass."""
    parts = [part.tolist() for part in torch.arange(sum(sizes)).split(sizes)]
    return _Shuffled(parts)


@pytest.mark.parametrize("form", ["iterable", "items", "sampler"])
def test_reference_loss_of_shuffled_minibatches_of_two_sizes(form: str) -> None:
    """Minibatches that stay together count equally, whatever the number of their samples."""
    sizes = [6] * 5 + [2]
    x, y = torch.zeros(32, 1), torch.tensor([[1.0]] * 30 + [[5.0]] * 2)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    data: Any = {
        "iterable": _Shuffled(batches),
        "items": DataLoader(batches, batch_size=None, shuffle=True),  # type: ignore[arg-type]
        "sampler": DataLoader(TensorDataset(x, y), batch_sampler=_lists(sizes)),
    }[form]
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.bias.zero_()
    result = llc_fast.estimate_llc(
        model, data, F.mse_loss, lr=1e-14, num_draws=200, num_burnin=0, num_chains=2, progress=False
    )
    assert result.init_loss == pytest.approx((5 * 1 + 25) / 6, rel=0.1)
    assert result.llc_mean == pytest.approx(0, abs=1e-3)


def test_estimates_of_pairs_are_those_of_their_own_loss() -> None:
    """λ̂ of token means by minibatches equals that of HMC on the mean over many fixed minibatches' losses."""
    model, data = _seeded(_Tokens), _tokens()
    order = torch.rand(100, N, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :BATCH]

    # A minibatch's loss is the sum over its sequences divided by its tokens that count, so the mean over minibatches is
    # a sum over all sequences with these weights.
    counts = (data["labels"] != -100).sum(1)
    weights = torch.zeros(N)
    for rows in order:
        weights[rows] += 1 / (len(order) * counts[rows].sum())

    def over_many(model: nn.Module, batch: Any) -> Tensor:
        logits = model.table(data["input_ids"])  # type: ignore[operator]
        labels = data["labels"].flatten()
        each = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="none")
        return (each.view(N, -1).sum(1) * weights).sum()

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = over_many(model, None) + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"nbeta": 30.0, "localization": 10.0, "progress": False}
    ours = llc_fast.estimate_llc(model, data, None, batch_size=BATCH, num_draws=3000, num_burnin=500, **settings)
    exact = llc_fast.estimate_llc(
        model, torch.zeros(1), over_many, sampler="hmc", num_draws=200, num_burnin=50, **settings
    )
    error = math.hypot(ours.llc_stderr, exact.llc_stderr)
    assert abs(ours.llc_mean - exact.llc_mean) < 4 * error + 0.04 * exact.llc_mean
