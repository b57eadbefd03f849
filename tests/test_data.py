"""Sources of minibatches: every kind of data gives each sample once an epoch, in an order set by the seed."""

from __future__ import annotations

import itertools
import math
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numbered import N, numbered
from regression import NUM_SAMPLES, estimate, mlp, samples
from runs import codes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import llc_fast
from llc_fast.data import Batch, leaves, make_source

pytestmark = pytest.mark.usefixtures("seeded")

CPU = torch.device("cpu")


class _MapStyle(Dataset[Any]):
    def __init__(self, n: int = N) -> None:
        self._x, self._y = numbered(n)

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._x[index], self._y[index]


class _MakesBatches:
    """Nothing but a length and batches of its own making."""

    def __init__(self, n: int = N) -> None:
        self._x, self._y = numbered(n)

    def __len__(self) -> int:
        return len(self._y)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._x[indices], self._y[indices]


class _Stream(IterableDataset[Any]):
    """Samples one after another, without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*numbered(), strict=True))


INDEXED: dict[str, Callable[[], Any]] = {
    "tuple": numbered,
    "list": lambda: list(numbered()),
    "TensorDataset": lambda: TensorDataset(*numbered()),
    "map-style": _MapStyle,
    "list of pairs": lambda: list(zip(*numbered(), strict=True)),
    "subset": lambda: Subset(_MapStyle(2 * N), range(N)),
    "makes batches": _MakesBatches,
}
LOADERS: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: DataLoader(_MapStyle(), batch_size=5),
    "shuffling DataLoader": lambda: DataLoader(_MapStyle(), batch_size=5, shuffle=True),
    "DataLoader of a stream": lambda: DataLoader(_Stream(), batch_size=5),
    "list of batches behind iter": lambda: _Batches(),
}


class _Batches:
    """Any iterable of batches."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (list(pair) for pair in zip(*(t.split(5) for t in numbered()), strict=True))


def _samples(batch: Batch) -> list[int]:
    """The samples that a batch holds; inputs and targets must belong together."""
    x, y = batch
    assert torch.equal(x, torch.stack([-y, -10 * y], dim=1))
    return (-y).int().tolist()


def _take(source: Any, count: int, seed: int = 0) -> list[list[int]]:
    return [_samples(batch) for batch in itertools.islice(source.minibatches(seed), count)]


@pytest.mark.parametrize("kind", INDEXED)
def test_equal_seeds_equal_batches_of_every_kind(kind: str) -> None:
    """The batches are a function of seed, n and batch size: the same for every way to hold the data."""
    source, tensors = make_source(INDEXED[kind](), 4, CPU), make_source(numbered(), 4, CPU)
    assert (source.num_samples, source.batch_size) == (N, 4)
    batches = _take(source, 12, seed=3)
    assert batches == _take(source, 12, seed=3) == _take(tensors, 12, seed=3)
    assert batches != _take(source, 12, seed=4)


@pytest.mark.parametrize("kind", INDEXED)
@pytest.mark.parametrize("batch_size", [1, 4, 7, 22])
def test_epochs_are_without_replacement(kind: str, batch_size: int) -> None:
    """Batches are full; in an epoch of n // size batches no sample comes twice; epochs differ in order."""
    source = make_source(INDEXED[kind](), batch_size, CPU)
    per_epoch = N // batch_size
    batches = _take(source, 3 * per_epoch)
    assert all(len(b) == batch_size for b in batches)
    epochs = [list(itertools.chain(*batches[k * per_epoch : (k + 1) * per_epoch])) for k in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(N))
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_sample_is_drawn_equally_often() -> None:
    """With a rest left out each epoch, still no sample is left out more than chance has it."""
    n, size, epochs = 10, 4, 3000
    source = make_source(numbered(n), size, CPU)
    drawn = torch.tensor(_take(source, epochs * (n // size))).flatten().bincount(minlength=n).double()
    expected, deviation = epochs * 0.8, (epochs * 0.8 * 0.2) ** 0.5
    assert ((drawn - expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize("kind", INDEXED)
@pytest.mark.parametrize("batch_size", [N, N + 1, 10**6, None])
def test_batch_as_large_as_the_data(kind: str, batch_size: int | None) -> None:
    """A batch of n or more is the whole data set, every time; so is the default with n ≤ 512."""
    source = make_source(INDEXED[kind](), batch_size, CPU)
    assert source.batch_size == N
    for batch in _take(source, 3):
        assert sorted(batch) == list(range(N))


@pytest.mark.parametrize("make", [numbered, _MapStyle, _MakesBatches])
def test_whole_data(make: Callable[[int], Any]) -> None:
    """Adjusted samplers take all n, without being told how many there are."""
    source = make_source(make(600), None, CPU, whole=True)
    assert source.batch_size == 600


def test_default_batch_size() -> None:
    """min(512, n)."""
    for n, size in ((511, 511), (512, 512), (513, 512), (5000, 512)):
        source = make_source(numbered(n), None, CPU)
        assert source.batch_size == size and len(_take(source, 1)[0]) == size


@pytest.mark.parametrize("kind", INDEXED | LOADERS)
def test_full_covers_every_sample_once(kind: str) -> None:
    """A pass over everything gives each sample once and tells the size of each piece; it can be repeated."""
    source = make_source((INDEXED | LOADERS)[kind](), None, CPU)
    for _ in range(2):
        pieces = list(source.full())
        assert sorted(itertools.chain(*(_samples(batch) for batch, _ in pieces))) == list(range(N))
        assert [size for _, size in pieces] == [len(batch[-1]) for batch, _ in pieces]


@pytest.mark.parametrize("n", [1, 4096, 10_000])
def test_full_of_large_data_comes_in_pieces(n: int) -> None:
    """No piece grows with n; the sizes add up to n."""
    pieces = list(make_source(numbered(n), 7, CPU).full())
    sizes = [size for _, size in pieces]
    assert sum(sizes) == n and max(sizes) <= 4096
    assert torch.equal(torch.cat([batch[-1] for batch, _ in pieces]), numbered(n)[1])


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_decide(kind: str) -> None:
    """A loader's batches come as it gives them, epoch after epoch, each epoch holding every sample once."""
    source = make_source(LOADERS[kind](), None, CPU)
    batches = _take(source, 15)
    assert [len(b) for b in batches] == [5, 5, 5, 5, 3] * 3
    for epoch in (batches[:5], batches[5:10], batches[10:]):
        assert sorted(itertools.chain(*epoch)) == list(range(N))
    if kind == "shuffling DataLoader":
        assert batches[:5] != batches[5:10]


def test_what_loaders_tell_about_themselves() -> None:
    """n is counted where nothing tells it; the batch size is a DataLoader's."""
    source = make_source(LOADERS["DataLoader"](), None, CPU)
    assert (source.num_samples, source.batch_size) == (N, 5)
    source = make_source(_Batches(), None, CPU)
    assert (source.num_samples, source.batch_size) == (N, None)


def test_data_loader_over_a_stream() -> None:
    """A DataLoader over an IterableDataset works though neither knows its length: n is counted."""
    source = make_source(DataLoader(_Stream(), batch_size=5), None, CPU)
    assert (source.num_samples, source.batch_size) == (N, 5)


def test_shuffling_loader_follows_the_seed() -> None:
    """A DataLoader that shuffles by torch's global generator gives the same batches for the same seed."""
    source = make_source(LOADERS["shuffling DataLoader"](), None, CPU)
    with torch.random.fork_rng():
        first = _take(source, 7, seed=3)
        torch.rand(5)
        assert _take(source, 7, seed=3) == first != _take(source, 7, seed=4)


def test_several_inputs() -> None:
    """All tensors but the last are inputs; all are cut alike."""
    x, y = numbered()
    source = make_source((x, 2 * x, y), 4, CPU)
    first, second, target = next(iter(source.minibatches(0)))
    assert torch.equal(second, 2 * first) and torch.equal(first[:, 0], -target)


class _Nested(Dataset[Any]):
    """Samples whose input is itself a structure, as default_collate allows."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        x, y = numbered()
        return self._make(x[index]), y[index]


class _Pair(NamedTuple):
    left: Tensor
    right: Tensor


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: (x, 2 * x), lambda inputs: inputs[1]),
        (lambda x: _Pair(x, 2 * x), lambda inputs: inputs.right),
        (lambda x: {"left": x, "right": 2 * x}, lambda inputs: inputs["right"]),
    ],
    ids=["tuple", "named tuple", "dictionary"],
)
def test_structured_inputs_keep_their_structure(
    make: Callable[[Tensor], Any],
    read: Callable[[Any], Tensor],
) -> None:
    """Tuples, named tuples and dictionaries of tensors reach the model as such, on the device of the run."""
    for data, size in ((_Nested(make), 4), (DataLoader(_Nested(make), batch_size=4), None)):
        inputs, target = next(iter(make_source(data, size, CPU).minibatches(0)))
        assert torch.equal(read(inputs)[:, 0], -2 * target)
        # The meta device plays a GPU: whatever is not moved stays behind on the CPU.
        inputs, target = next(iter(make_source(data, size, torch.device("meta")).minibatches(0)))
        assert read(inputs).device.type == target.device.type == "meta"


@pytest.mark.parametrize("kind", INDEXED | LOADERS)
def test_batches_come_on_the_device(kind: str) -> None:
    """Minibatches and passes over everything are on the device that was asked for (here meta plays a GPU)."""
    source = make_source((INDEXED | LOADERS)[kind](), None, torch.device("meta"))
    batches = [next(iter(source.minibatches(0))), *(batch for batch, _ in source.full())]
    assert all(t.device.type == "meta" for batch in batches for t in batch)


def test_a_data_set_says_itself_what_its_samples_are() -> None:
    """A TensorDataset whose __getitem__ was overridden (to augment, say) gives what that returns."""

    class Doubled(TensorDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return 2 * x, 2 * y

    batch = next(iter(make_source(Doubled(*numbered()), None, CPU).minibatches(0)))
    assert torch.equal(batch[-1], 2 * numbered()[1])


@pytest.mark.parametrize("batch_size", [4, N])
def test_models_may_write_to_their_batch(batch_size: int) -> None:
    """A model that works in place on its input changes neither the user's tensors nor later batches."""
    x, y = numbered()
    source = make_source((x, y), batch_size, CPU)
    for batch in itertools.islice(source.minibatches(0), 3):
        assert len(set(_samples(batch))) == batch_size
        for t in batch:
            t.zero_()
    for batch, _ in source.full():
        batch[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip((x, y), numbered(), strict=True))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(5, 2), TypeError, r"one tensor.*\(x, y\)"),
        ((torch.zeros(5, 2),), TypeError, r"tuple of one tensor.*\(x, y\)"),
        ((torch.zeros(5, 2), torch.zeros(4)), ValueError, r"number of samples: \[5, 4\]"),
        ((torch.zeros(5, 2), torch.tensor(1.0)), ValueError, r"number of samples: \[5, 0\]"),
        ((torch.zeros(0, 2), torch.zeros(0)), ValueError, "data is empty"),
        (TensorDataset(torch.zeros(0, 2), torch.zeros(0)), ValueError, "data is empty"),
        ((), ValueError, "data is empty"),
        ([], ValueError, "data is empty"),
        (_MapStyle(0), ValueError, "data is empty"),
        (_MakesBatches(0), ValueError, "data is empty"),
        (DataLoader(_MapStyle(3), batch_size=5, drop_last=True), ValueError, "data is empty"),
        (None, TypeError, "data must be .*NoneType"),
        (5, TypeError, "data must be .*int"),
    ],
    ids=[
        "one tensor",
        "tuple of one tensor",
        "different lengths",
        "a scalar",
        "empty tensors",
        "empty TensorDataset",
        "empty tuple",
        "empty list",
        "empty map-style",
        "empty maker of batches",
        "loader without batches",
        "None",
        "number",
    ],
)
def test_wrong_data(data: Any, error: type[Exception], message: str) -> None:
    """Data that cannot serve are refused when the source is made; the message says what was given."""
    with pytest.raises(error, match=message):
        make_source(data, None, CPU)


@pytest.mark.parametrize(
    "data",
    [
        (np.array(["a", "b"]), np.array([0.0, 1.0])),
        (numbered()[0], numbered()[1].numpy().astype(object)),
        "data.csv",
        {"x": numbered()[0], "y": numbered()[1]},
    ],
    ids=["an array of texts", "an array of objects", "a string", "a dictionary"],
)
def test_data_of_another_kind(data: Any) -> None:
    """What merely looks like a data set is refused with the first batch at the latest."""
    with pytest.raises((TypeError, ValueError), match="data must"):
        next(iter(make_source(data, None, CPU).minibatches(0)))


@pytest.mark.parametrize("kind", ["arrays", "one array", "dictionary"])
def test_arrays_of_numpy(kind: str) -> None:
    """They are taken as the tensors of the same values."""
    x, y = numbered()
    tensors: Any = {"arrays": (x, y), "one array": (x, y), "dictionary": {"x": x, "y": y}}[kind]
    arrays: Any = {"arrays": (x.numpy(), y.numpy()), "one array": (x, y.numpy())}.get(kind)
    arrays = {"x": x.numpy(), "y": y.numpy()} if arrays is None else arrays
    one, other = (make_source(data, 4, CPU, pairs=kind != "dictionary") for data in (tensors, arrays))
    for a, b in zip(leaves(next(one.minibatches(3))), leaves(next(other.minibatches(3))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make", [lambda: [torch.zeros(2)] * 5, lambda: [{"x": torch.zeros(2), "y": torch.zeros(1)}] * 5]
)
def test_samples_that_are_not_pairs(make: Callable[[], Any]) -> None:
    """A data set whose samples are not (input, target) pairs: the message says how a batch must look."""
    wrapped = DataLoader(make(), batch_size=2)
    for source in (make_source(Subset(make(), range(5)), 2, CPU), make_source(wrapped, None, CPU)):
        with pytest.raises(TypeError, match=r"\(inputs, target\) pairs"):
            next(iter(source.minibatches(0)))


@pytest.mark.parametrize("kind", ["DataLoader", "list of batches behind iter"])
def test_loader_with_batch_size(kind: str) -> None:
    """A loader decides about the batch size: giving one as well is an error that names it."""
    with pytest.raises(ValueError, match="batch_size=7"):
        make_source(LOADERS[kind](), 7, CPU)


def test_exhausted_iterator() -> None:
    """An iterator that can be read once is not enough: the message says so, instead of an endless wait."""
    source = make_source(iter([numbered()]), None, CPU)
    batches = source.minibatches(0)
    next(batches)
    with pytest.raises(ValueError, match="exhausted iterator"):
        next(batches)


# --- Data that may be meant in two ways ---------------------------------------------------------------------


def _token_batches() -> list[dict[str, Tensor]]:
    return [{"ids": torch.zeros(8, 5).long(), "mask": torch.ones(8, 5)} for _ in range(3)]


BATCHES: dict[str, tuple[Callable[[], Any], bool]] = {
    "list(loader)": (lambda: list(DataLoader(_MapStyle(), batch_size=5)), True),
    "tuple(loader)": (lambda: tuple(DataLoader(_MapStyle(), batch_size=5)), True),
    "deque": (lambda: deque(DataLoader(_MapStyle(), batch_size=5)), True),
    "tuples": (lambda: [tuple(b) for b in DataLoader(_MapStyle(), batch_size=5)], True),
    "arrays": (lambda: [(np.zeros((5, 2)), np.zeros(5)) for _ in range(4)], True),
    "one batch": (lambda: [numbered()], True),
    "dictionaries": (_token_batches, False),
    "with texts": (lambda: [b | {"text": ["a"] * 8} for b in _token_batches()], False),
    "single tensors": (lambda: [torch.zeros(8, 2)] * 4, False),
    "many single tensors": (lambda: (torch.zeros(8, 2),) * 12, False),
    "sequences with labels": (lambda: [(torch.zeros(t).long(), torch.zeros(t).long()) for t in (3, 7, 5)], True),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_what_may_be_batches_or_samples_is_refused(kind: str) -> None:
    """The error names both readings, with n of each, and what to pass for them."""
    make, pairs = BATCHES[kind]
    with pytest.raises(ValueError, match=r"data is ambiguous.*batch_size=None") as caught:
        make_source(make(), None, CPU, pairs=pairs)
    assert re.search("If they are (samples|columns)", str(caught.value))


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "one batch"])
def test_the_remedy_for_batches_counts_their_samples(kind: str) -> None:
    make, pairs = BATCHES[kind]
    items = make()
    source = make_source(DataLoader(items, batch_size=None, shuffle=True), None, CPU, pairs=pairs)
    assert source.num_samples == sum(len(t[-1] if isinstance(t, (list, tuple)) else t) for t in map(_rows, items))
    assert source.sampling.order == "shuffled"


def _rows(item: Any) -> Any:
    return item["mask"] if isinstance(item, dict) else item


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        (list(zip(*numbered(), strict=True)), True),
        ([(x, 3) for x in numbered()[0]], True),
        ([(torch.zeros(3, 8, 8), torch.zeros(8, 8))] * 5, True),
        ([(torch.zeros(4), torch.zeros(1))] * 5, True),
        ([(torch.zeros(1), torch.zeros(1))] * 5, True),
        ([{"x": torch.zeros(3), "y": torch.tensor(1)}] * 5, False),
        ([torch.zeros(5, 2), torch.zeros(5)], False),
        ((torch.zeros(5, 2), torch.zeros(5, 2)), False),
        ([torch.zeros(5, 2), torch.zeros(5, 2)], True),
    ],
)
def test_what_is_clearly_samples_or_columns(data: Any, pairs: bool) -> None:
    """Zero-dimensional leaves and lengths that differ within an item are those of samples."""
    n = len(data[0]) if isinstance(data[0], Tensor) else len(data)
    assert make_source(data, None, CPU, pairs=pairs).num_samples == n


def test_sequences_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"number of samples: \[3, 7, 5\].*batch_size=None.*pads"):
        make_source([torch.zeros(t) for t in (3, 7, 5)], None, CPU, pairs=False)


def test_data_sets_that_give_whole_batches() -> None:
    """As Keras's sequences: a batch size of their own, and items of that size."""

    class Sequence:
        batch_size = 5

        def __len__(self) -> int:
            return 4

        def __getitem__(self, k: int) -> tuple[Tensor, ...]:
            return tuple(t[5 * k : 5 * k + 5] for t in numbered())

    with pytest.raises(ValueError, match="data is ambiguous"):
        make_source(Sequence(), None, CPU)
    loader = DataLoader(Sequence(), batch_size=None)  # type: ignore[arg-type]
    assert make_source(loader, None, CPU).num_samples == 20


class _HasBatch(_MapStyle):
    """Something else that is called `batch`."""

    batch: Any = 32


class _LikeHuggingFace:
    """The methods of datasets.Dataset that matter here."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, key: int | str) -> Any:
        x, y = numbered()
        return {"x": x[key], "y": y[key]} if isinstance(key, int) else {"x": x, "y": y}[key]

    def __getitems__(self, keys: list[int]) -> list[Any]:
        return [self[key] for key in keys]

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(N))

    def batch(self, batch_size: int, drop_last_batch: bool = False) -> Any:
        raise AssertionError("this is for something else")


def test_another_batch() -> None:
    """An attribute of that name, or a method of another library's, is not ours."""
    assert make_source(_HasBatch(), 5, CPU).num_samples == N
    source = make_source(_LikeHuggingFace(), 5, CPU, pairs=False)
    batch = next(iter(source.minibatches(0)))
    assert torch.equal(batch["x"][:, 0], -batch["y"]) and source.num_samples == N

    class Ours(_MapStyle):
        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            return self._x[indices], self._y[indices] + 100

    assert float(next(iter(make_source(Ours(), 5, CPU).minibatches(0)))[1].min()) > 50

    class LikeTensorFlow:
        """Batches one after another; `batch` makes another one of those."""

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([numbered(5), numbered(5)])

        def batch(self, batch_size: int, drop_remainder: bool = False) -> Any:
            raise AssertionError("this is for something else")

    assert make_source(LikeTensorFlow(), None, CPU).num_samples == 10


class _Transform:
    """What a data set does to its rows, and neither pickle nor deepcopy takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.tensor(column) for name, column in rows.items()}


def _hugging_face(**more: Any) -> Any:
    x, y = numbered()
    return pytest.importorskip("datasets").Dataset.from_dict({"x": x.tolist(), "y": y.tolist()} | more)


def _predicts_y(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"])[:, 0], batch["y"].to(batch["x"].dtype))


@pytest.mark.parametrize("form", [None, "python", "torch", "numpy", "pandas", "arrow", "transform", "selected columns"])
def test_hugging_face_data_sets(form: str | None) -> None:
    """Whatever format they have, and with a transform: the estimate of the same tensors, whole and in minibatches."""
    data = _hugging_face(more=[0] * N)
    if form == "transform":
        data = data.with_transform(_Transform())
    elif form == "selected columns":
        data = data.with_format("numpy", columns=["x", "y"])
    else:
        data = data.with_format(form)
    before = data.format["type"]
    x, y = numbered()
    options: dict[str, Any] = {"lr": 1e-4, "num_chains": 2, "num_draws": 5, "num_burnin": 2, "nbeta": 3.0}
    for batch_size in (None, 4):
        expected, found = (
            llc_fast.estimate_llc(
                nn.Linear(x.shape[1], 1).apply(_constant),
                given,
                _predicts_y,
                batch_size=batch_size,
                progress=False,
                **options,
            )
            for given in ({"x": x.float(), "y": y}, data)
        )
        np.testing.assert_allclose(found.loss_trace, expected.loss_trace, rtol=1e-6)
        assert found.settings["num_samples"] == N
    assert data.format["type"] == before


def _constant(module: nn.Module) -> None:
    for p in module.parameters():
        nn.init.constant_(p, 0.1)


def test_hugging_face_data_sets_that_are_refused() -> None:
    """With the line to write."""
    datasets = pytest.importorskip("datasets")
    with pytest.raises(TypeError, match=r"columns x, y, whose batches are dictionaries: pass loss_fn\(model, batch\)"):
        make_source(_hugging_face(), 5, CPU)
    ragged = datasets.Dataset.from_dict({"x": [[1.0], [2.0, 3.0]] * 4})
    with pytest.raises(ValueError, match=r"rows of different lengths in the column 'x'.*DataCollatorWithPadding"):
        make_source(ragged, 5, CPU, pairs=False)
    splits = datasets.DatasetDict(test=_hugging_face(), train=_hugging_face())
    with pytest.raises(TypeError, match=r"DatasetDict with the splits 'test', 'train'.*data\['test'\]"):
        make_source(splits, 5, CPU, pairs=False)
    with pytest.raises(TypeError, match=r'IterableDataset.*DataLoader\(data.with_format\("torch"\)'):
        make_source(_hugging_face().to_iterable_dataset(), 5, CPU, pairs=False)


def test_texts_of_hugging_face_data_sets_stay() -> None:
    """Beside tensors, for a loss that reads them."""
    source = make_source(_hugging_face(text=["a text"] * N), 4, CPU, pairs=False)
    batch = next(iter(source.minibatches(0)))
    assert batch["text"] == ["a text"] * 4 and batch["x"].shape[0] == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_Stream(), "IterableDataset.*DataLoader"),
        ([_MapStyle(), _MapStyle()], "2 data sets or loaders"),
        ([DataLoader(_MapStyle())], "1 data sets or loaders"),
        (type("DataFrame", (), {"iloc": 0, "__len__": lambda _: 3, "__getitem__": lambda _, k: k})(), "pandas"),
    ],
    ids=["stream", "data sets", "loaders", "frame"],
)
def test_what_only_looks_like_data(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_source(data, None, CPU)


def test_samples_that_cannot_be_collated() -> None:
    class Objects(_MapStyle):
        def __getitem__(self, index: int) -> Any:
            return object(), 1

    with pytest.raises(TypeError, match=r"data has samples that can't be collated.*collate_fn"):
        make_source(Objects(), None, CPU)


def test_what_data_in_memory_say_of_themselves() -> None:
    """Shuffled by epochs; what fills no minibatch can be had apart."""
    source = make_source(numbered(), 5, CPU)
    sampling = source.sampling
    assert (sampling.order, sampling.num_samples, sampling.num_batches, sampling.tail) == ("shuffled", N, 4, 3)
    assert not sampling.reads_randomly and sampling.is_reproducible and sampling.full_is_exact and not sampling.notes
    pieces, rest = list(source.full(tail=False)), list(source.tail())
    assert [size for _, size in pieces] == [5] * 4 and [size for _, size in rest] == [3]
    assert sorted(itertools.chain(*(_samples(b) for b, _ in pieces + rest))) == list(range(N))


def test_reading_leaves_generators_as_they_were() -> None:
    """While a data set is looked at, and while it is read."""

    class Draws(_MapStyle):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            torch.rand(2), np.random.rand(), random.random()
            return super().__getitem__(index)

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    source = make_source(Draws(), 5, CPU)
    assert source.sampling.reads_randomly and source.sampling.is_reproducible
    _take(source, 3)
    list(source.full())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


# --- Data that need care ------------------------------------------------------------------------------------


class _Endless(IterableDataset[Any]):
    """Samples without a length; counts how far it was read."""

    def __init__(self, count: int = 10**9) -> None:
        self.count, self.furthest = count, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = samples()
        for k in range(self.count):
            self.furthest = max(self.furthest, k)
            yield x[k % NUM_SAMPLES], y[k % NUM_SAMPLES]


def test_data_without_an_end() -> None:
    """L(w*) is over the draws' own minibatches; nothing reads on for ever."""
    stream = _Endless()
    result = estimate(mlp(), DataLoader(stream, batch_size=NUM_SAMPLES), num_burnin=3, num_draws=4)
    assert stream.furthest < 50 * NUM_SAMPLES and result.settings["num_samples"] is None
    assert result.init_loss == pytest.approx(estimate(mlp()).init_loss, rel=1e-12)
    with pytest.raises(ValueError, match="nbeta=None requires the dataset size"):
        estimate(mlp(), DataLoader(_Endless(), batch_size=NUM_SAMPLES), nbeta=None)


def test_data_without_a_length_that_end() -> None:
    """The pass comes to the end by itself, and is the same each time: L(w*) is the mean of its minibatches."""
    result = estimate(mlp(), DataLoader(_Endless(NUM_SAMPLES), batch_size=5))
    assert codes(result)[:1] == ["unshuffled"]
    x, y = samples()
    losses = [float(F.mse_loss(mlp()(a), b).detach()) for a, b in zip(x.split(5), y.split(5), strict=True)]
    assert result.init_loss == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders_that_drop_their_last_batch(shuffle: bool) -> None:
    """L(w*) is over what chains see: all samples if the loader shuffles, otherwise those of its full batches."""
    loader = DataLoader(TensorDataset(*samples()), batch_size=7, drop_last=True, shuffle=shuffle)
    sizes = []
    result = estimate(mlp(), loader, observables={"size": lambda draw: sizes.append(len(draw.batch[0])) or 0})
    x, y = (t[: None if shuffle else NUM_SAMPLES // 7 * 7] for t in samples())
    assert result.init_loss == pytest.approx(float(F.mse_loss(mlp()(x), y).detach()), rel=1e-12)
    assert set(sizes) == {7} and result.settings["num_samples"] == len(x)


def test_loaders_that_drop_their_last_batch_keep_to_their_sampler() -> None:
    """A loader of a part of the data set: L(w*) is over that part, none of it left out."""
    part = list(range(3, 20))
    x, y = samples()
    loader = DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True, sampler=SubsetRandomSampler(part))
    result = estimate(mlp(), loader)
    exact = float(F.mse_loss(mlp()(x[part]), y[part]).detach())
    assert result.init_loss == pytest.approx(exact, rel=1e-12)
    assert math.isfinite(result.llc_mean)


class _Read(Dataset[Any]):
    """Counts how often samples are read; `augment` is added to each."""

    def __init__(self, augment: Callable[[int], Any] = lambda index: 0.0) -> None:
        self.reads, self.augment = 0, augment

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        x, y = samples()
        return x[index] + self.augment(index), y[index]


def test_data_sets_are_kept_as_tensors() -> None:
    """Read once and then from memory, with the same batches as sample by sample."""
    dataset = _Read()
    kept = estimate(mlp(), dataset, batch_size=5)
    assert dataset.reads <= NUM_SAMPLES + 16
    np.testing.assert_allclose(kept.loss_trace, estimate(mlp(), batch_size=5).loss_trace, rtol=1e-12)


def test_data_sets_that_are_read_less_than_once_are_not_kept() -> None:
    """A short run on a large data set reads what it needs."""
    dataset = _Read()
    source = make_source(dataset, 5, CPU, num_wanted=NUM_SAMPLES - 1)
    assert dataset.reads == 0
    next(iter(source.minibatches(0)))
    assert dataset.reads == 5


def test_data_sets_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a size, samples are read when they are needed: the same chains."""
    kept = estimate(mlp(), _Read(), batch_size=5)
    monkeypatch.setattr("llc_fast.data._KEPT_BYTES", NUM_SAMPLES * 8 * 4 - 1)
    dataset = _Read()
    read = estimate(mlp(), dataset, batch_size=5)
    assert dataset.reads > 2 * 18 * 5
    np.testing.assert_allclose(read.loss_trace, kept.loss_trace, rtol=1e-11)
    monkeypatch.setattr("llc_fast.data._KEPT_BYTES", NUM_SAMPLES * 8 * 4)
    dataset = _Read()
    estimate(mlp(), dataset, batch_size=5)
    assert dataset.reads <= NUM_SAMPLES + 16


RANDOM: dict[str, Callable[[int], Any]] = {
    "always": lambda index: torch.randn(3),
    "now and then": lambda index: torch.randn(3) if torch.rand(()) < 0.02 else 0.0,
    "only in one sample": lambda index: torch.randn(3) if index == 13 else 0.0,
    "by numpy": lambda index: np.random.rand() * 1e-3,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_augmented_data_sets_are_not_frozen(kind: str) -> None:
    """Whatever draws random numbers, however rarely, is read anew each time."""
    dataset = _Read(RANDOM[kind])
    np.random.seed(0)
    result = estimate(mlp(), dataset, batch_size=5)
    assert dataset.reads > 2 * 18 * 5 and np.isfinite(result.loss_trace).all()


@pytest.mark.parametrize("kind", ["always", "now and then"])
def test_augmentation_follows_the_seed(kind: str) -> None:
    """Equal seeds give equal results though samples are random; the caller's generator is where it was."""
    model = mlp()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = estimate(model, _Read(RANDOM[kind]), batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again = estimate(model, _Read(RANDOM[kind]), batch_size=5)
    assert np.array_equal(first.loss_trace, again.loss_trace)


def test_data_sets_with_samples_of_different_shapes() -> None:
    """What does not fit in one tensor is collated batch by batch, and fails as it would in a loader."""

    class Ragged(_Read):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            return (x if index != 13 else x[:2]), y

    with pytest.raises(RuntimeError, match="size"):
        estimate(mlp(), Ragged(), batch_size=20)
