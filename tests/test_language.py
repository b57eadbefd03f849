"""Language models: token sequences in every form, the cross-entropy of the next token, presets."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import LENGTH, MODELS, VOCABULARY, gpt2, sequences, transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import llc_fast
from llc_fast.language import IGNORED, NextToken, chunks, token_source
from llc_fast.objective.objective import Objective
from llc_fast.settings import Settings

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {
    "lr": 1e-6,
    "nbeta": 30.0,
    "localization": 300.0,
    "num_chains": 2,
    "num_draws": 6,
    "num_burnin": 2,
    "batch_size": 8,
    "progress": False,
}


class Bigrams(nn.Module):
    """The least causal language model: the next token depends on this one; eval and train mode differ by dropout."""

    def __init__(self, returns: Callable[[Tensor], Any] = lambda logits: logits, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.dropout, self._returns = nn.Dropout(dropout), returns
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=generator))

    def forward(self, tokens: Tensor) -> Any:
        return self._returns(self.out(self.dropout(torch.tanh(self.embedding(tokens)))))


def _estimate(model: nn.Module, data: Any, loss_fn: Any = "next-token", **options: Any) -> llc_fast.LLCResult:
    chosen = SHORT | options
    if isinstance(data, DataLoader):
        del chosen["batch_size"]
    return llc_fast.estimate_llc(model, data, loss_fn, **chosen)


def _expected(
    model: nn.Module, rows: list[list[int]], labels: list[list[int]] | None = None
) -> tuple[list[float], list[int]]:
    """By hand, one sequence and one token at a time, in double precision: sums of losses, numbers of tokens."""
    exact = _double(model)
    sums, counts = [], []
    for k, row in enumerate(rows):
        total, count = 0.0, 0
        with torch.no_grad():
            output = exact(torch.tensor([row or [0]]))
        logits = getattr(output, "logits", output)[0]
        for t in range(1, len(row)):
            target = row[t] if labels is None else labels[k][t]
            if target != IGNORED:
                total -= float(logits[t - 1].log_softmax(-1)[target])
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def _loss_of_all(model: nn.Module, data: Any, loss: NextToken | None = None) -> tuple[Objective, Tensor]:
    """The objective that an estimate makes, and the loss of each sequence."""
    source, loss_fn = token_source(loss or NextToken(), model.eval(), data, 5, CPU)
    objective = Objective(model, loss_fn, source, device=CPU)
    return objective, torch.cat([objective.sample_losses(batch).detach() for batch, _ in source.full()])


# ---- the mean over tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_ragged_sequences_are_averaged_by_token(name: str) -> None:
    """L(w*) is the sum over all tokens by their number; each sequence's loss is its share."""
    model, rows = MODELS[name](), sequences()
    sums, counts = _expected(model, rows)
    objective, losses = _loss_of_all(model, rows)
    mean_tokens = sum(counts) / len(counts)
    np.testing.assert_allclose(losses.numpy(), np.array(sums) / mean_tokens, rtol=2e-5)
    assert objective.full_loss()[0] == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert objective.per_sample


def test_estimates_pair_by_samples() -> None:
    """Minibatches of ragged sequences are means of what their sequences lose, so each is compared with itself."""
    model, rows = gpt2(), sequences()
    sums, counts = _expected(model, rows)
    result = _estimate(model, rows)
    assert result.diagnostics["paired_with"] == "samples" and result.settings["control_variate"]
    assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert (result.settings["num_samples"], result.settings["num_tokens"]) == (len(rows), sum(counts))
    assert result.settings["loss_fn"] == "next-token"
    assert f"n = {len(rows)} sequences of {sum(counts)} predicted tokens; nβ is given" in result.summary()


def test_equal_lengths_are_the_loss_of_hugging_face() -> None:
    """``model(input_ids, labels=input_ids).loss`` over all sequences."""
    model = gpt2().eval()
    ids = torch.randint(VOCABULARY, (10, LENGTH), generator=torch.Generator().manual_seed(1))
    objective, _ = _loss_of_all(model, ids)
    assert objective.full_loss()[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)


def test_masks_and_labels_are_the_loss_of_hugging_face() -> None:
    """Padded on the right, with the labels that its collate function makes."""
    model, rows = gpt2().eval(), sequences(9)
    ids, mask = _padded(rows)
    labels = torch.where(mask == 1, ids, IGNORED)
    labels[:, 3] = IGNORED
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    for data in ({"input_ids": ids, "attention_mask": mask, "labels": labels}, {"input_ids": ids, "labels": labels}):
        objective, _ = _loss_of_all(model, data)
        assert objective.full_loss()[0] == pytest.approx(expected, rel=1e-6)


def test_minibatches_have_the_gradients_of_the_ratio() -> None:
    """The gradient of the mean over a whole pass of minibatches is that of the sum over tokens by their number."""
    model, rows = gpt2().eval(), sequences(15)
    source, loss_fn = token_source(NextToken(), model, rows, 5, CPU)
    batches = [batch for batch, _ in source.full(tail=False)]
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 5]
    mean = sum((loss_fn(model, batch).mean() for batch in batches), torch.zeros(())) / 3
    found = torch.autograd.grad(mean, list(model.parameters()))
    exact = _double(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in filter(lambda row: len(row) > 1, rows):
        ids = torch.tensor([row])
        total = total + F.cross_entropy(exact(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        count += len(row) - 1
    for g, expected in zip(found, torch.autograd.grad(total / count, list(exact.parameters())), strict=True):
        torch.testing.assert_close(g.double(), expected, rtol=1e-4, atol=1e-6)


def test_sequences_that_predict_nothing_are_left_out() -> None:
    """One token alone, or all labels masked; they are no samples."""
    rows = [[1, 2, 3], [4], [], [5, 6], [7, 8, 9]]
    labels = [[1, 2, 3], [4], [], [5, IGNORED], [7, IGNORED, 9]]
    model = Bigrams()
    result = _estimate(model, {"input_ids": rows, "labels": labels}, batch_size=2)
    sums, counts = _expected(model, rows, labels)
    assert counts == [2, 0, 0, 0, 1]
    assert result.settings["num_samples"] == 2 and result.settings["num_left_out"] == 3
    assert result.settings["num_tokens"] == 3
    assert result.init_loss == pytest.approx(sum(sums) / 3, rel=1e-6)
    assert "(3 more predict none)" in result.summary()


# ---- data in every form --------------------------------------------------------------------------------------


def _padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    ids, mask = torch.full((len(rows), LENGTH), 3), torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for k, row in enumerate(rows):
        where = slice(LENGTH - len(row), None) if left else slice(len(row))
        ids[k, where], mask[k, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


class _Rows(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


class _Batches:
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: t[indices] for name, t in self._columns.items()}


def _masked(rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    ids, mask = _padded(rows, left)
    return {"input_ids": ids, "attention_mask": mask}


def _hugging_face(rows: list[list[int]], **more: Any) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"input_ids": rows} | more)


FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": lambda rows: rows,
    "tuple of lists": lambda rows: tuple(rows),
    "arrays": lambda rows: [np.array(row, dtype=np.uint16) for row in rows],
    "tensors": lambda rows: [torch.tensor(row, dtype=torch.int32) for row in rows],
    "columns": lambda rows: {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
    "masked tensors": _masked,
    "padded on the left": lambda rows: _masked(rows, left=True),
    "masked arrays": lambda rows: {name: t.numpy() for name, t in _masked(rows).items()},
    "rows of a tokenizer": lambda rows: [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows],
    "data set of tensors": lambda rows: _Rows([torch.tensor(row) for row in rows]),
    "data set of tuples": lambda rows: _Rows([(torch.tensor(row),) for row in rows]),
    "data set of dictionaries": lambda rows: _Rows([{"input_ids": row} for row in rows]),
    "batches by index": lambda rows: _Batches(_masked(rows)),
    "datasets": _hugging_face,
    "datasets, masked": lambda rows: _hugging_face(
        _masked(rows)["input_ids"].tolist(), **{"attention_mask": _masked(rows)["attention_mask"].tolist()}
    ),
    "datasets with more columns": lambda rows: _hugging_face(rows, text=["a text"] * len(rows)),
    "datasets, selected": lambda rows: _hugging_face([[9, 9, 9], *reversed(rows)]).select(range(len(rows), 0, -1)),
    **{
        f"datasets as {form}": lambda rows, form=form: _hugging_face(rows).with_format(form)
        for form in ("torch", "numpy", "arrow", "pandas", "python")
    },
    "datasets transformed": lambda rows: _hugging_face(rows).with_transform(_Transform()),
}


class _Transform:
    """What neither pickle nor deepcopy takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return {name: list(column) for name, column in rows.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_estimate(form: str) -> None:
    """Equal bits for lists of sequences, tensors, data sets; none is changed."""
    rows, model = sequences(), Bigrams()
    expected = _estimate(model, rows)
    found = _estimate(model, FORMS[form](rows))
    assert np.isfinite(expected.loss_trace).all()
    np.testing.assert_array_equal(found.loss_trace, expected.loss_trace)
    assert found.settings["num_tokens"] == expected.settings["num_tokens"] == sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize("form", ["tensor", "int32", "array", "list", "TensorDataset", "tuple"])
def test_equal_lengths_in_one_tensor(form: str) -> None:
    model = Bigrams()
    ids = torch.randint(VOCABULARY, (20, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = _estimate(model, ids.tolist())
    data = {
        "tensor": ids,
        "int32": ids.int(),
        "array": ids.numpy(),
        "list": list(ids),
        "TensorDataset": TensorDataset(ids),
        "tuple": (ids,),
    }[form]
    np.testing.assert_array_equal(_estimate(model, data).loss_trace, expected.loss_trace)
    assert expected.settings["num_tokens"] == 20 * (LENGTH - 1)


def test_data_are_kept_in_half_the_memory() -> None:
    """int32, and no labels where they are the tokens."""
    full, ragged = (
        token_source(NextToken(), Bigrams(), data, 4, CPU)[0] for data in (torch.ones(8, 6).long(), [[1, 2], [3, 4, 5]])
    )
    assert {k: t.dtype for k, t in next(full.minibatches(0)).items()} == {"input_ids": torch.int32}
    assert {k: t.dtype for k, t in next(ragged.minibatches(0)).items()} == dict.fromkeys(
        ("input_ids", "labels"), torch.int32
    )


def test_the_default_minibatch_has_so_many_tokens() -> None:
    for length, expected in ((8, 512), (64, 256), (1024, 16), (40_000, 1)):
        source, _ = token_source(
            NextToken(), Bigrams(), torch.ones(600 if length < 9999 else 2, length).long(), None, CPU
        )
        assert source.batch_size == expected


def test_chunks_of_a_stream() -> None:
    for tokens in (list(range(11)), np.arange(11, dtype=np.uint16), torch.arange(11, dtype=torch.int32)):
        assert chunks(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chunks(range(11), 4).dtype == torch.int64
    for wrong, error, said in [
        (("ab", 4), TypeError, "tokens"),
        ((torch.ones(3, 3).long(), 2), TypeError, "one dimension"),
        ((torch.ones(5), 2), TypeError, "float32"),
        ((list(range(5)), 6), ValueError, "length=6"),
        ((list(range(5)), 1), ValueError, "length"),
        ((list(range(5)), 2.0), TypeError, "length"),
    ]:
        with pytest.raises(error, match=said):
            chunks(*wrong)


# ---- loaders -------------------------------------------------------------------------------------------------


def _pads(left: bool = False) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """A collate function: as wide as the longest of the batch."""

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        found, width = _masked(rows, left), max(map(len, rows))
        return {name: t[:, -width:] if left else t[:, :width] for name, t in found.items()}

    return collate


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_loader_that_pads(left: bool) -> None:
    """L(w*) is the same ratio over tokens, and chains see minibatches of the same average."""
    model, rows = gpt2(), sequences()
    sums, counts = _expected(model, rows)
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=_pads(left))  # type: ignore[arg-type]
    result = _estimate(model, loader)
    assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert (result.settings["num_samples"], result.settings["num_tokens"]) == (len(rows), sum(counts))
    still = _estimate(model, loader, lr=1e-30, num_draws=30)
    assert abs(still.llc_mean) < 5 * still.llc_stderr + 1e-3


def test_loaders_of_tensors_and_of_labels() -> None:
    """Batches that are a tensor, a list of one, or dictionaries with labels alone."""
    model = Bigrams()
    ids = torch.randint(VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[::3, 4:] = IGNORED
    sums, counts = _expected(model, ids.tolist(), labels.tolist())
    both = [{"input_ids": i, "labels": y, "id": k} for k, (i, y) in enumerate(zip(ids, labels, strict=True))]
    result = _estimate(model, DataLoader(both, batch_size=4, shuffle=True))  # type: ignore[arg-type]
    assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    sums, counts = _expected(model, ids.tolist())
    for data in (ids, TensorDataset(ids)):
        result = _estimate(model, DataLoader(data, batch_size=4, shuffle=True))  # type: ignore[arg-type]
        assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
        assert result.settings["num_tokens"] == sum(counts)


def test_a_stream_without_an_end() -> None:
    """Its tokens can't be counted; nβ must be given, and λ̂ of a chain that stands still is 0."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Tensor]:
            while True:
                yield torch.randint(VOCABULARY, (6,))

    result = _estimate(Bigrams(), DataLoader(Stream(), batch_size=4), lr=1e-30)
    assert result.settings["num_tokens"] is None and result.settings["num_samples"] is None
    assert abs(result.llc_mean) < 1e-3
    assert "n is unknown; nβ is given" in result.summary()


def test_datasets_in_a_loader() -> None:
    """Its torch format gives tensors; Python's lists come out turned, and are refused with the line to write."""
    datasets = pytest.importorskip("datasets")
    ids = torch.randint(VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "text": ["a"] * 16})
    model = Bigrams()
    sums, counts = _expected(model, ids.tolist())
    result = _estimate(model, DataLoader(data.with_format("torch"), batch_size=4, shuffle=True))
    assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    with pytest.raises(TypeError, match=r'DataLoader\(dataset.with_format\("torch"\)'):
        _estimate(model, DataLoader(data, batch_size=4, shuffle=True))


def test_models_that_return_their_own_loss_take_their_columns() -> None:
    """Of a data set with more columns, with ``loss_fn=None``; the same as the next token's loss."""
    ids = torch.randint(VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    data = _hugging_face(ids, labels=ids, text=["a text"] * 16, number=[1] * 16)
    own, ours = _estimate(gpt2().eval(), data, None), _estimate(gpt2(), data)
    assert own.init_loss == pytest.approx(ours.init_loss, rel=1e-6)
    assert data.column_names == ["input_ids", "labels", "text", "number"]


# ---- models --------------------------------------------------------------------------------------------------


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "returns",
    [lambda t: (t, None), lambda t: [t], lambda t: {"logits": t}, lambda t: _Output(t)],
    ids=["tuple", "list", "dictionary", "object"],
)
def test_outputs_of_models(returns: Callable[[Tensor], Any]) -> None:
    rows = sequences()
    np.testing.assert_array_equal(_estimate(Bigrams(returns), rows).loss_trace, _estimate(Bigrams(), rows).loss_trace)


@pytest.mark.parametrize(
    "returns",
    [lambda t: t[:, -1:], lambda t: t[:, :, 0], lambda t: {"loss": t.mean()}, lambda t: (t.mean(), t), lambda t: None],
    ids=["last position", "no vocabulary", "no logits", "loss first", "nothing"],
)
def test_other_outputs_are_refused(returns: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"logits \[batch, length, vocabulary\].*Write the loss as a function"):
        _estimate(Bigrams(returns), sequences())


def test_wrapped_models() -> None:
    """Hugging Face's are called by name, without a cache, through wrappers; modules that hold one, by position."""

    class Holder(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Any:
            return self.model(tokens, use_cache=False).logits

    seen: list[Any] = []

    class Seen(transformers().GPT2LMHeadModel):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
            seen.append((use_cache, sorted(kwargs)))
            return super().forward(input_ids=input_ids, use_cache=use_cache, **kwargs)

    model, rows = gpt2(), sequences()
    expected = _estimate(model, rows)
    watched = Seen(model.config)
    watched.load_state_dict(model.state_dict())
    for other in (nn.DataParallel(model), Holder(model), watched):
        np.testing.assert_allclose(_estimate(other, rows).loss_trace, expected.loss_trace, rtol=1e-5)
    assert set(map(str, seen)) == {"(False, [])"}


def test_adapters_alone() -> None:
    """PEFT's wrapper takes what the model inside takes."""
    transformers()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model, rows = gpt2(), sequences()
    sums, counts = _expected(model, rows)
    result = _estimate(peft.get_peft_model(model, config), rows)
    assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert result.settings["num_parameters"] == 2 * (2 * 16 + 2 * 48)


def test_low_precision_models() -> None:
    """bfloat16 logits are widened before the softmax."""
    model, rows = Bigrams(), sequences()
    sums, counts = _expected(model, rows)
    result = _estimate(model.bfloat16(), rows)
    assert result.init_loss == pytest.approx(sum(sums) / sum(counts), rel=0.02)


def test_models_that_look_ahead_are_refused() -> None:
    """A model without a causal mask sees what it is to predict."""

    class Mixes(Bigrams):
        def forward(self, tokens: Tensor) -> Any:
            mixed = torch.tanh(self.embedding(tokens))
            return self.out(mixed + mixed.mean(1, keepdim=True))

    with pytest.raises(ValueError, match="causal"):
        _estimate(Mixes(), sequences())


# ---- eval mode -----------------------------------------------------------------------------------------------


def test_models_are_evaluated_in_eval_mode_by_default() -> None:
    """And are in their own mode afterwards, part by part, also when something fails."""
    rows, model = sequences(), Bigrams(dropout=0.5)
    model.out.eval()
    before = [m.training for m in model.modules()]
    expected = _estimate(Bigrams(), rows)
    result = _estimate(model, rows)
    assert [m.training for m in model.modules()] == before and model.training
    np.testing.assert_array_equal(result.loss_trace, expected.loss_trace)
    assert result.settings["training_mode"] is False
    assert "training-mode" not in [w.code for w in result.warnings]
    with pytest.raises(ValueError, match="nbeta"):
        _estimate(model, rows, nbeta=-1.0)
    with pytest.raises(ValueError, match="vocabulary"):
        _estimate(gpt2(), [[1, VOCABULARY]])
    assert [m.training for m in model.modules()] == before
    llc_fast.calibrate(model, rows, "next-token", num_draws=2, num_burnin=2, progress=False)
    assert [m.training for m in model.modules()] == before


def test_estimates_of_one_model_at_a_time() -> None:
    """Each waits for its turn, and finds the model in its own mode."""
    rows, model = sequences(), Bigrams(dropout=0.5)
    expected = _estimate(Bigrams(), rows)
    found: list[llc_fast.LLCResult] = []
    threads = [threading.Thread(target=lambda: found.append(_estimate(model, rows))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.training and len(found) == 3
    for result in found:
        np.testing.assert_array_equal(result.loss_trace, expected.loss_trace)
        assert result.settings["training_mode"] is False


def test_the_mode_can_be_kept() -> None:
    """Dropout is then part of the loss, and is warned of."""
    rows, model = sequences(), Bigrams(dropout=0.5).train()
    result = _estimate(model, rows, NextToken(keep_mode=True))
    assert result.settings["training_mode"] is True
    assert "training-mode" in [w.code for w in result.warnings]
    same = _estimate(model.eval(), rows, NextToken(keep_mode=True))
    np.testing.assert_array_equal(same.loss_trace, _estimate(model, rows).loss_trace)


# ---- n, nβ, presets ------------------------------------------------------------------------------------------


def test_n_is_that_of_sequences() -> None:
    result = _estimate(Bigrams(), sequences(), nbeta=None)
    assert result.nbeta == 24 / math.log(24)
    assert "nβ = n / log n of the sequences" in result.summary()
    assert "predicted" not in llc_fast.estimate_llc(nn.Linear(2, 1), _regression(), F.mse_loss, **SHORT).summary()


def _regression() -> tuple[Tensor, Tensor]:
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    return x, x[:, :1]


def test_preset() -> None:
    """nβ = 30 and γ = 300; what is given wins, in the sampler too; the step size is open."""
    preset = Settings(preset="language-model")
    assert (preset.nbeta, preset.localization, preset.lr) == (30.0, 300.0, None)
    assert Settings(preset="language-model", nbeta=5.0).nbeta == 5.0
    assert Settings(preset="language-model", localization=0.0).localization == 0.0
    inside = Settings(preset="language-model", sampler=llc_fast.samplers.SGLDSampler(nbeta=7.0))
    assert (inside.nbeta, inside.localization) == (7.0, 300.0)
    with pytest.raises(ValueError, match="preset='llm' is unknown; choose one of: language-model"):
        Settings(preset="llm")
    with pytest.raises(TypeError, match="preset"):
        Settings(preset=3)  # type: ignore[arg-type]
    options = {"lr": 1e-5, "preset": "language-model", "nbeta": None, "localization": None}
    result = _estimate(Bigrams(), sequences(), **options)
    assert (result.nbeta, result.settings["localization"], result.settings["preset"]) == (30.0, 300.0, "language-model")
    chosen = llc_fast.calibrate(
        Bigrams(), sequences(), "next-token", preset="language-model", num_draws=2, num_burnin=2, progress=False
    )
    assert (chosen["nbeta"], chosen["localization"]) == (30.0, 300.0)


# ---- what is refused -----------------------------------------------------------------------------------------


class _Random(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(VOCABULARY, (5,))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (list(range(40)), r"one stream of 40 tokens.*llc_fast.language.chunks\(tokens, length\)"),
        (torch.arange(40), "one stream of 40 tokens"),
        (np.arange(40), "one stream of 40 tokens"),
        ({"input_ids": list(range(40))}, "one stream of 40 tokens"),
        ({"input_ids": torch.arange(40)}, "one stream of 40 tokens"),
        (torch.zeros(2, 3, 4).long(), r"shape \(2, 3, 4\)"),
        (torch.zeros(4, 5), "float32"),
        ([[0.5, 1.0]], "float64"),
        (["some text", "more"], r"text: turn it into ids first, such as \[tokenizer"),
        ("some text", "text"),
        ({"text": ["some text"]}, "must have input_ids"),
        ([{"text": "some text"}], "must have input_ids"),
        ([], "empty"),
        ([[]], "predict no token"),
        ([[1], [2]], "predict no token"),
        (torch.zeros(0, 5).long(), "empty"),
        ([[1, -100]], r"token id -100.*attention_mask = 0"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "zeros between ones in sequence 0"),
        ({"input_ids": [[1, 2, 3]], "labels": [[1, 2]]}, "labels of other lengths"),
        ([torch.ones(4, 5).long(), torch.ones(4, 5).long()], "join batches with torch.cat"),
        ((torch.ones(4, 5).long(), torch.ones(4, 5).long()), "join batches"),
        (_Rows([(torch.ones(5).long(), torch.ones(5).long())] * 3), "shifts itself"),
        (_Random(), "DataLoader"),
        (3, "got int"),
        (DataLoader(TensorDataset(torch.ones(8, 3), torch.ones(8)), batch_size=4), "a list of 2"),
        (DataLoader([{"text": "a"}] * 8, batch_size=4), "input_ids"),  # type: ignore[arg-type]
        (DataLoader(torch.ones(8, 3), batch_size=4), "float32"),  # type: ignore[arg-type]
        (DataLoader(torch.ones(8, 1).long(), batch_size=4), "predict no token"),  # type: ignore[arg-type]
    ],
    ids=range(28),
)
def test_other_data_are_refused(data: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        _estimate(Bigrams(), data)


def test_datasets_without_tokens_are_refused() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["some text"]})
    with pytest.raises(TypeError, match=r'data.map\(lambda rows: tokenizer\(rows\["text"\]'):
        _estimate(Bigrams(), data)
    with pytest.raises(TypeError, match=r"DatasetDict with the splits 'train'.*data\['train'\]"):
        _estimate(Bigrams(), datasets.DatasetDict(train=data))
    with pytest.raises(TypeError, match=r"datasets\.IterableDataset"):
        _estimate(Bigrams(), data.to_iterable_dataset())
    with pytest.raises(ValueError, match="rows without input_ids"):
        _estimate(Bigrams(), datasets.Dataset.from_dict({"input_ids": [[1, 2], None]}))


def test_what_the_model_has_no_embedding_for_is_refused() -> None:
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}, and the model's vocabulary has {VOCABULARY} tokens"):
        _estimate(gpt2(), [[1, VOCABULARY]])
    with pytest.raises(ValueError, match="sequence of 33 tokens, and the model takes 32 at most"):
        _estimate(gpt2(), [[1] * 33])
    assert math.isfinite(_estimate(MODELS["llama"](), [[1, 2] * 20, [1, 2, 3]]).llc_mean)  # rotary positions


def test_padding_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llc_fast.language._WASTED_ELEMENTS", 1000)
    with pytest.raises(ValueError, match="the longest of 200"):
        _estimate(Bigrams(), [[1] * 200] + [[1, 2]] * 9)
    assert math.isfinite(_estimate(Bigrams(), torch.ones(10, 200).long()).llc_mean)


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(TypeError, match=r"loss_fn must be callable or \"next-token\".*got 'cross-entropy'"):
        _estimate(Bigrams(), sequences(), "cross-entropy")
    with pytest.raises(TypeError, match="model must be"):
        _estimate(3, sequences())  # type: ignore[arg-type]


# ---- an exact sampler ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_estimate_is_that_of_an_exact_sampler() -> None:
    """Ragged sequences in minibatches against HMC on all of them, within Monte Carlo errors and 5 %: what the bias
    correction leaves of the noise of minibatches, where γ holds directions more than the loss does."""
    model, rows = Bigrams(), sequences(64, 2, 9)
    source, loss_fn = token_source(NextToken(), model, rows, 64, CPU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _, batch in zip(range(400), source.minibatches(0), strict=False):
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimizer.step()
    options: dict[str, Any] = {"nbeta": 30.0, "localization": 100.0, "progress": False}
    found = llc_fast.estimate_llc(model, rows, "next-token", batch_size=16, **options)
    exact = llc_fast.estimate_llc(model, rows, "next-token", sampler="hmc", num_draws=500, num_burnin=200, **options)
    assert found.warnings == [] and found.diagnostics["paired_with"] == "samples"
    error = math.hypot(found.llc_stderr, exact.llc_stderr)
    assert error < 0.02 * exact.llc_mean
    assert abs(found.llc_mean - exact.llc_mean) < 4 * error + 0.05 * exact.llc_mean


# ---- README.md -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints an estimate without a warning."""
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.exists():
        pytest.skip("no README.md here")
    transformers()
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "GPT2" in c)
    found: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(code, found)
    result = found["result"]
    assert result.warnings == [] and result.llc_mean > 1
    assert "predicted tokens" in capsys.readouterr().out
