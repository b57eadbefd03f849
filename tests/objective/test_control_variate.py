"""Minibatch losses less what the same minibatches lose at w*: which runs are paired, and what they record then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from processes import all_well, launch
from runs import assert_same, data, estimate, interrupted_after, mlp, mse
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from llc_fast.chains.draw import Draw
from llc_fast.kernels import reference
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.control_variate import ControlVariate
from llc_fast.result import LLCResult

N, BATCH, CHAINS, STEPS, SEED = 43, 10, 3, 12, 5
RAW: dict[str, Any] = {"raw": lambda draw: draw.loss}
EVERY_STEP: dict[str, Any] = {
    "num_draws": STEPS,
    "num_burnin": 0,
    "num_chains": CHAINS,
    "batch_size": BATCH,
    "seed": SEED,
    "observables": RAW,
}


def _by_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(dim=1)


def _of_model(model: nn.Module, batch: Any) -> Tensor:
    return mse(model(batch[0]), batch[1])


def _expected_baseline(sample_losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """L_B(w*) ``[chain, step]``, from the specification of minibatches."""
    n = len(sample_losses)
    rows = [
        sample_losses[reference.minibatch_indices(n, BATCH, CHAINS, NoiseKey(SEED, step=step)).numpy()].mean(axis=1)
        for step in range(STEPS)
    ]
    return np.stack(rows, axis=1)


def _losses_at(model: nn.Module, given: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
    with torch.no_grad():
        values: NDArray[np.float64] = _by_sample(model(given[0]), given[1]).double().numpy()
    return values


def _raw(result: LLCResult) -> NDArray[np.float64]:
    return result.observables["raw"]


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_fn": _by_sample},
        {"loss_fn": _of_model},
        {"sampler": "sghmc"},
        {"microbatch_size": 3},
        {"autocast": torch.bfloat16},
    ],
    ids=["mean", "losses of samples", "loss of the model", "sghmc", "microbatches", "autocast"],
)
def test_the_trace_is_the_raw_one_less_the_same_minibatches_at_the_anchor(
    strategy: str, options: dict[str, Any]
) -> None:
    if strategy == "batched" and "microbatch_size" in options:
        pytest.skip("microbatches are not batched over chains")
    model, given = mlp(torch.float64), data(N, torch.float64)
    tolerance = 1e-12
    if "autocast" in options:  # the model's outputs have 8 bits; the losses are float32
        model, given, tolerance = mlp(), data(N), 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            losses = _losses_at(model, given)
    else:
        losses = _losses_at(model, given)
    result = estimate(model=model, data=given, strategy=strategy, **EVERY_STEP | options)
    assert result.settings["control_variate"] and result.diagnostics["unpaired_reason"] == ""
    np.testing.assert_allclose(result.init_loss, losses.mean(), rtol=tolerance)
    expected = _raw(result) - _expected_baseline(losses) + losses.mean()
    np.testing.assert_allclose(result.loss_trace, expected, rtol=10 * tolerance)
    # At w* nothing is left of the minibatch; in 8 bits a batch of chains rounds otherwise than one.
    at_anchor = 2**-7 if "autocast" in options else 10 * tolerance
    np.testing.assert_allclose(result.loss_trace[:, 0], result.init_loss, rtol=at_anchor)
    assert np.ptp(_raw(result)[:, 0]) > 0.01
    trace = result.loss_trace[:, result.schedule.draws]
    np.testing.assert_allclose(result.llc_mean, result.nbeta * (trace.mean() - result.init_loss))


def test_float32_models_are_paired_to_rounding() -> None:
    result = estimate(data=data(N), **EVERY_STEP)
    losses = _losses_at(mlp(), data(N))
    expected = _raw(result) - _expected_baseline(losses) + losses.mean()
    np.testing.assert_allclose(result.loss_trace, expected, rtol=1e-6)


def test_less_variance() -> None:
    """By as much as the formula says: the spread over minibatches of what the samples lose more than at w*."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(600, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    model = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    at_anchor, size = y.square(), 20

    def moments(draw: Draw) -> Tensor:
        losses = (x @ draw.params["weight"].T + draw.params["bias"] - y).square()
        return torch.stack([losses.mean(), losses.var(), (losses - at_anchor).var()])

    result = estimate(
        model=model,
        data=(x, y),
        batch_size=size,
        num_draws=600,
        num_burnin=0,
        nbeta=1000.0,
        lr=1e-5,
        observables={"raw": lambda draw: draw.loss, "moments": moments},
    )
    full, raw, paired = np.moveaxis(result.observables["moments"], 2, 0)
    share = (1 - size / len(x)) / size  # of the samples' variance, without replacement
    expected = (full.var() + share * raw.mean()) / (full.var() + share * paired.mean())
    found = _raw(result).var() / result.loss_trace.var()
    # Each variance comes from 1800 minibatches: a relative error of √(2/1800) for normal means.
    assert abs(found / expected - 1) < 4 * np.sqrt(2 * 2 / 1800)
    assert expected > 10


def test_a_realizable_problem_needs_no_baseline() -> None:
    model, (x, _) = mlp(torch.float64), data(N, torch.float64)
    with torch.no_grad():
        y = model(x)
    result = estimate(model=model, data=(x, y), **EVERY_STEP)
    assert not result.settings["control_variate"]
    assert "the same on all minibatches" in result.diagnostics["unpaired_reason"]
    assert 0 <= result.init_loss < 1e-30  # zero but for the order in which a batch's sums are rounded
    np.testing.assert_array_equal(result.loss_trace, _raw(result))


# --- where it is not valid ----------------------------------------------------------------------------------


class _Normalized(nn.Module):
    """Batch statistics that leave no trace in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out


class _Augmented(Dataset[Any]):
    """Adds noise that is another one whenever a sample is read."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = data(N)
        return x[index] + 0.1 * torch.randn(3), y[index]


class _Batches:
    """A data set that makes batches, with a tensor that belongs to no sample."""

    def __len__(self) -> int:
        return N

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        x, y = data(N)
        return {"x": x[indices], "weights": torch.ones(3), "y": y[indices]}


def _weighted(output: Tensor, target: Tensor) -> Tensor:
    """A mean over tokens, of which samples have unequally many."""
    weight = (target > 0).double() + 0.1
    return ((output - target).square() * weight).sum() / weight.sum()


def _looks(output: Tensor, target: Tensor) -> Tensor:
    """A loss of the user's own making."""
    return (output - target).abs().pow(1.5).mean() * (2.0 if float(output.detach().sum()) > 1e9 else 1.0)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "full batch": (lambda: {"batch_size": N}, "whole data set"),
    "loader": (
        lambda: {"data": DataLoader(TensorDataset(*data(N)), batch_size=BATCH, shuffle=True), "batch_size": None},
        "a loader",
    ),
    "dropout": (lambda: {"model": nn.Sequential(mlp(), nn.Dropout(0.2))}, "random numbers"),
    "batch norm": (
        lambda: {"model": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))},
        "writes to its buffers",
    ),
    "batch norm without buffers": (lambda: {"model": _Normalized()}, "batch statistics"),
    "batch norm, losses of samples": (lambda: {"model": _Normalized(), "loss_fn": _by_sample}, "batch statistics"),
    "weights": (lambda: {"loss_fn": _weighted}, "weighted by their numbers of tokens"),
    "augmentation": (lambda: {"data": _Augmented(), "strategy": "sequential"}, "augmentation"),
    "values looked at": (lambda: {"loss_fn": _looks}, "single samples"),
    "more than samples": (
        lambda: {"data": _Batches(), "loss_fn": lambda model, batch: mse(model(batch["x"]), batch["y"])},
        "single samples",
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_where_a_minibatch_is_not_the_mean_of_its_samples(name: str) -> None:
    build, reason = REFUSED[name]
    options = {**EVERY_STEP, "data": data(N), **build()}
    result = estimate(**options)
    assert not result.settings["control_variate"]
    assert reason in result.diagnostics["unpaired_reason"]
    reference = result.traces.get("reference_loss")
    if result.diagnostics["paired_with"] == "none":
        np.testing.assert_array_equal(result.loss_trace, _raw(result))
        assert reference is None
        return
    # What minibatches lose at w* stands beside the trace; both less a multiple of what the samples lose by themselves.
    assert reference is not None
    raw, trace = _raw(result), result.loss_trace[:, result.schedule.draws]
    at_reference = reference[:, result.schedule.draws]
    assert np.isfinite(at_reference).all() and np.isnan(reference[:, : result.schedule.num_burnin]).all()
    np.testing.assert_allclose(raw[:, 0], (raw - trace + at_reference)[:, 0], rtol=1e-5)  # the first draw is at w*
    np.testing.assert_allclose(result.init_loss, at_reference.mean())
    np.testing.assert_allclose(result.llc_trace, result.nbeta * (trace - at_reference))


def test_the_kind_of_weights_is_no_obstacle_where_they_are_equal() -> None:
    """A token-weighted mean of samples with equally many tokens is the mean of theirs."""

    def over_tokens(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-1)

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (N, 4), generator=generator)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 6), nn.Tanh(), nn.Linear(6, 5))

    result = estimate(model=model(), data=(tokens, tokens), loss_fn=over_tokens, **EVERY_STEP)
    with torch.no_grad():
        losses = -model()(tokens).log_softmax(2).gather(2, tokens[..., None])[..., 0].double().numpy()
    assert result.diagnostics["paired_with"] == "samples"
    assert result.init_loss == pytest.approx(losses.mean(), rel=1e-6)
    assert_paired_with(result, losses.mean(axis=1), np.ones(N))


# --- means with weights -------------------------------------------------------------------------------------


def assert_paired_with(result: LLCResult, losses: NDArray[np.float64], weights: NDArray[np.float64]) -> None:
    """What is subtracted is Σ wᵢℓᵢ / Σ wᵢ of each minibatch; and nothing is evaluated at w* at draws."""
    assert result.diagnostics["paired_with"] == "samples" and result.settings["control_variate"]
    assert "reference_loss" not in result.traces
    at_reference = np.empty((CHAINS, STEPS))
    for step in range(STEPS):
        rows = reference.minibatch_indices(N, BATCH, CHAINS, NoiseKey(SEED, step=step)).numpy()
        at_reference[:, step] = (weights * losses)[rows].sum(axis=1) / weights[rows].sum(axis=1)
    found = _raw(result) - result.loss_trace + result.init_loss
    np.testing.assert_allclose(found[:, :STEPS], at_reference, rtol=0, atol=2e-6)
    np.testing.assert_allclose(result.llc_mean, result.nbeta * (_raw(result) - at_reference).mean(), atol=1e-4)


CLASSES, LENGTH = 5, 6


def _of_tokens() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(CLASSES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def _lengths() -> Tensor:
    """Of sequences: between 2 and all, and one of 0 predicted tokens among them."""
    return torch.randint(2, LENGTH + 1, (N,), generator=torch.Generator().manual_seed(3))


class _OwnLoss(nn.Module):
    """As language models of Hugging Face: labels of −100 do not count, and each token predicts the next."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.inner, self.reads = _of_tokens(), reads

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(input_ids)
        if self.reads and bool((labels == 10**6).any()):  # torch.func refuses it
            logits = logits + 1
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:]), "logits": logits}


def _weighted_problem(kind: str) -> tuple[dict[str, Any], NDArray[np.float64], NDArray[np.float64]]:
    """Model, data and loss function; what each sample loses at w*, and its weight."""
    generator = torch.Generator().manual_seed(0)
    if kind.startswith("labels"):
        tokens, counted = (
            torch.randint(CLASSES, (N, LENGTH), generator=generator),
            torch.arange(LENGTH) < _lengths()[:, None],
        )
        labels = tokens.masked_fill(~counted, -100)
        model = _OwnLoss(reads=kind == "labels read")
        entries = -model.inner(tokens)[:, :-1].log_softmax(2).gather(2, tokens[:, 1:, None])[..., 0]
        weights = counted[:, 1:].double()
        losses = (entries.double() * weights).sum(1) / weights.sum(1)
        return (
            {"model": model, "data": {"input_ids": tokens, "labels": labels}, "loss_fn": None},
            losses.detach().numpy(),
            weights.sum(1).numpy(),
        )
    if kind == "mask":
        tokens, counted = (
            torch.randint(CLASSES, (N, LENGTH), generator=generator),
            torch.arange(LENGTH) < _lengths()[:, None],
        )
        model = _of_tokens()
        entries = -model(tokens).log_softmax(2).gather(2, tokens[..., None])[..., 0]

        def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            own = nn.functional.cross_entropy(model(batch["x"]).mT, batch["x"], reduction="none")
            return (own * batch["mask"]).sum() / batch["mask"].sum()

        losses = (entries.double() * counted).sum(1) / counted.sum(1)
        return (
            {"model": model, "data": {"x": tokens, "mask": counted.float()}, "loss_fn": masked},
            losses.detach().numpy(),
            counted.sum(1).double().numpy(),
        )
    model, (x, y) = mlp(), data(N)
    if kind == "weights":
        w = torch.rand(N, generator=generator) + 0.1

        def weighted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            return ((model(batch[0]) - batch[1]).square().mean(1) * batch[2]).sum() / batch[2].sum()

        return {"model": model, "data": (x, y, w), "loss_fn": weighted}, _losses_at(model, (x, y)), w.double().numpy()
    assert kind == "classes"
    of_classes = torch.tensor([0.2, 1.0, 3.0])
    model, target = nn.Linear(3, 3), torch.randint(3, (N,), generator=generator)
    losses = nn.functional.cross_entropy(model(x), target, reduction="none").detach().double()
    given = {"model": model, "data": (x, target), "loss_fn": nn.CrossEntropyLoss(weight=of_classes)}
    return given, losses.numpy(), of_classes[target].double().numpy()


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("kind", ["labels", "labels read", "mask", "weights", "classes"])
def test_means_weighted_by_tokens_classes_or_data_are_paired(kind: str, strategy: str) -> None:
    """Each draw's loss at w* is known from what its samples lose, without an evaluation there."""
    if (kind, strategy) == ("labels read", "batched"):
        pytest.skip("torch.func can't batch it over chains either")
    given, losses, weights = _weighted_problem(kind)
    result = estimate(**{**EVERY_STEP, **given, "strategy": strategy})
    assert_paired_with(result, losses, weights)
    # The mean over all minibatches; λ̂ does not depend on its error. A ratio has a bias of 1/BATCH of its spread.
    mean, spread = (weights * losses).sum() / weights.sum(), (weights * (losses - losses.mean())).std() / weights.mean()
    assert result.init_loss == pytest.approx(mean, abs=0.2 * spread)


def test_samples_none_of_whose_tokens_count_weigh_nothing() -> None:
    given, losses, weights = _weighted_problem("labels")
    given["data"]["labels"][::7] = -100
    losses, weights = losses.copy(), weights.copy()
    weights[::7] = 0
    result = estimate(**{**EVERY_STEP, **given, "strategy": "sequential"})
    assert_paired_with(result, losses, weights)


def test_few_samples_with_other_weights_are_not_overlooked() -> None:
    """Of 3,000 sequences five are shorter, and none of these is in the minibatches that are looked at first."""
    n = 3000
    tokens = torch.randint(CLASSES, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    first = {
        int(k) for s in range(8) for k in reference.minibatch_indices(n, BATCH, 1, NoiseKey(SEED, step=s)).flatten()
    }
    rare = [k for k in range(n) if k not in first][:5]
    labels[rare, 2:] = -100
    result = estimate(
        model=_OwnLoss(), data={"input_ids": tokens, "labels": labels}, loss_fn=None, **{**EVERY_STEP, "num_draws": 400}
    )
    assert result.diagnostics["paired_with"] == "samples"
    model = _OwnLoss()
    entries = -model.inner(tokens)[:, :-1].log_softmax(2).gather(2, tokens[:, 1:, None])[..., 0].detach().double()
    counted = (labels[:, 1:] != -100).double()
    for step in range(400):
        rows = reference.minibatch_indices(n, BATCH, CHAINS, NoiseKey(SEED, step=step))
        if any(int(k) in rare for k in rows.flatten()):
            expected = (entries * counted)[rows].sum((1, 2)) / counted[rows].sum((1, 2))
            found = _raw(result)[:, step] - result.loss_trace[:, step] + result.init_loss
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-6)
            break
    else:
        pytest.fail("no rare sequence was drawn")


def test_the_weighted_baseline_is_the_same_on_a_device() -> None:
    generator = np.random.default_rng(0)
    losses, weights = generator.exponential(size=N), generator.integers(0, 4, size=N).astype(float)
    losses[weights == 0] = np.nan
    baseline = ControlVariate.of_samples(losses, 0.7, BATCH, weights)
    indices = torch.randint(N, (CHAINS, BATCH), generator=torch.Generator().manual_seed(0))
    rows = indices.numpy()
    expected = np.nansum((losses * weights)[rows], axis=1) / weights[rows].sum(axis=1) - 0.7
    np.testing.assert_allclose(baseline(rows), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(baseline.on_device(indices).numpy(), expected, rtol=0, atol=1e-14)


def test_models_that_vmap_does_not_know_are_paired_by_their_outputs() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.last = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.gru(x[:, None])[0][:, -1])
            return out

    torch.manual_seed(0)
    result = estimate(model=Recurrent(), data=data(N), strategy="sequential", **EVERY_STEP)
    assert result.settings["control_variate"]
    np.testing.assert_allclose(result.loss_trace[:, 0], result.init_loss, rtol=1e-5)


class _Attention(nn.Module):
    """Fused attention, which torch.func can't batch on a CPU; with `reads`, Python looks at the mask, too."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out, self.reads = nn.Embedding(5, 8), nn.Linear(8, 5), reads
        self.inputs = list[int]()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.inputs.append(len(tokens))
        h = self.embedding(tokens)[:, None]
        is_plain = self.reads and bool(mask.all())
        found = nn.functional.scaled_dot_product_attention(h, h, h, None if is_plain else mask[:, None, None].bool())
        logits: Tensor = self.out(found[:, 0])
        return logits


def _next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """By each sample's own tokens, then over samples: a mean of what samples lose."""
    tokens, mask = batch["tokens"], batch["mask"]
    own = nn.functional.cross_entropy(model(tokens, mask)[:, :-1].mT, tokens[:, 1:], reduction="none")
    return ((own * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).mean()


def _ragged_tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 7, (N,), generator=generator)
    return {
        "tokens": torch.randint(5, (N, 6), generator=generator),
        "mask": (torch.arange(6) < lengths[:, None]).long(),
    }


@pytest.mark.parametrize("reads", [False, True])
def test_models_with_attention_are_paired_on_a_cpu(reads: bool) -> None:
    """Together where torch.func can evaluate samples, or one by one; either way each loses what it does by itself."""
    model, given = _Attention(reads).eval(), _ragged_tokens()
    with torch.no_grad():
        expected = [float(_next_token(model, {k: v[i : i + 1] for k, v in given.items()})) for i in range(N)]
    options = {**EVERY_STEP, "num_draws": 5 * N}  # long enough to pay for it
    result = estimate(model=model, data=given, loss_fn=_next_token, **options)
    assert result.diagnostics["paired_with"] == "samples"
    assert result.init_loss == pytest.approx(np.mean(expected), rel=1e-6)
    minibatches = reference.minibatch_indices(N, BATCH, CHAINS, NoiseKey(SEED, step=0)).numpy()
    deviations = np.array(expected)[minibatches].mean(axis=1) - np.mean(expected)
    np.testing.assert_allclose(_raw(result)[:, 0] - result.loss_trace[:, 0], deviations, rtol=0, atol=1e-6)


def test_samples_are_evaluated_one_by_one_only_where_a_run_is_long_enough() -> None:
    """A short run is not made longer by a pass over all samples."""
    model = _Attention(reads=True).eval()
    result = estimate(model=model, data=_ragged_tokens(), loss_fn=_next_token, **EVERY_STEP)
    assert result.diagnostics["paired_with"] != "samples"
    assert "the loss of single samples can't be had" in result.diagnostics["unpaired_reason"]
    assert model.inputs.count(1) < N


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_low_precision_hides_neither_means_nor_weights(kind: str) -> None:
    """Rounding to 8 bits is larger than what a weighting changes, so the check is made without it."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    options: dict[str, Any] = {**EVERY_STEP, "data": data(N, dtype)}
    options["autocast"] = torch.bfloat16 if kind == "autocast" else None

    def slightly(output: Tensor, target: Tensor) -> Tensor:
        weight = 1 + 0.02 * torch.tanh(target)
        return ((output - target).square() * weight).sum() / weight.sum()

    paired = estimate(model=mlp(dtype), **options)
    weighted = estimate(model=mlp(dtype), loss_fn=slightly, **options)
    assert paired.settings["control_variate"] and not weighted.settings["control_variate"]
    assert "weighted by their numbers of tokens" in weighted.diagnostics["unpaired_reason"]
    np.testing.assert_allclose(paired.loss_trace[:, 0], paired.init_loss, rtol=2**-6)  # batched, rounded otherwise


def test_the_baseline_is_the_same_on_a_device() -> None:
    losses = np.random.default_rng(0).exponential(size=N)
    baseline = ControlVariate.of_samples(losses, float(losses.mean()), BATCH)
    indices = torch.randint(N, (CHAINS, BATCH), generator=torch.Generator().manual_seed(0))
    expected = losses[indices.numpy()].mean(axis=1) - losses.mean()
    np.testing.assert_allclose(baseline(indices.numpy()), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(baseline.on_device(indices).numpy(), expected, rtol=0, atol=1e-14)


# --- one chain, however it is run ---------------------------------------------------------------------------


def test_batched_is_sequential() -> None:
    batched, sequential = (estimate(data=data(N), strategy=s, **EVERY_STEP) for s in ("batched", "sequential"))
    np.testing.assert_allclose(batched.loss_trace, sequential.loss_trace, rtol=1e-5)
    # What is subtracted is the same to the last bit but for the rounding of the difference.
    np.testing.assert_allclose(
        _raw(batched) - batched.loss_trace, _raw(sequential) - sequential.loss_trace, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    options = {**EVERY_STEP, "data": data(N), "strategy": strategy}
    whole = estimate(**options)
    assert whole.settings["control_variate"]
    with interrupted_after(7):
        partial = estimate(**options, checkpoint=tmp_path / "run")
    assert partial.is_partial
    for chain, done in enumerate(partial.steps_done or []):
        np.testing.assert_array_equal(partial.loss_trace[chain, :done], whole.loss_trace[chain, :done])
    assert_same(estimate(**options, checkpoint=tmp_path / "run"), whole)
    again = estimate(**options, checkpoint=tmp_path / "run")  # nothing left to do
    assert_same(again, whole)
    assert again.settings["control_variate"]


def test_processes_give_what_one_does(tmp_path: Path) -> None:
    body = """
result = runs.estimate(data=runs.data(43), num_draws=12, num_burnin=0, num_chains=3, seed=5)
result.save(f"result{rank}")
"""
    all_well(launch(tmp_path, body, 2))
    alone = estimate(data=data(N), **{**EVERY_STEP, "observables": None}, strategy="sequential")
    found_results = [LLCResult.load(tmp_path / f"result{rank}") for rank in range(2)]
    assert_same(found_results[0], found_results[1])
    np.testing.assert_allclose(found_results[0].loss_trace, alone.loss_trace, rtol=1e-5)
    assert found_results[0].settings["control_variate"]
