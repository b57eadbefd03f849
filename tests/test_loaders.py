"""What loaders say of their minibatches, against counts of what they give."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numbered import N, numbered
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from llc_fast.data import Batch, LoaderSource, make_source

pytestmark = pytest.mark.usefixtures("seeded")

CPU = torch.device("cpu")


def _dataset(n: int = N) -> TensorDataset:
    return TensorDataset(*numbered(n))


def _source(loader: Any, **options: Any) -> LoaderSource:
    source = make_source(loader, None, CPU, **options)
    assert isinstance(source, LoaderSource)
    return source


def _ids(batch: Batch) -> tuple[int, ...]:
    return tuple((-batch[-1]).round().int().reshape(-1).tolist())


def _take(source: Any, count: int, seed: int = 0, chain: int = 0) -> list[tuple[int, ...]]:
    return [_ids(batch) for batch in itertools.islice(source.minibatches(seed, chain), count)]


def _codes(source: LoaderSource) -> list[str]:
    return [code for code, _ in source.sampling.notes]


@pytest.fixture(autouse=True)
def _generators_stay() -> Iterator[None]:
    """Whatever is done with data, the user's generators are as they were, and no worker is left."""

    def states() -> list[Any]:
        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]

    before = states()
    yield
    assert states() == before
    assert multiprocessing.active_children() == []


# --- order and n --------------------------------------------------------------------------------------------


class _Halves(Sampler[int]):
    """A sampler of the user's: the first half in order."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(N // 2))

    def __len__(self) -> int:
        return N // 2


class _OwnShuffle(Sampler[int]):
    """Shuffles all samples by Python's generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(N), N))

    def __len__(self) -> int:
        return N


class _Ordered(RandomSampler):
    """Of torch's class by name, and unshuffled by behaviour."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(N))


class _Forever(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(N).tolist()


class _Buckets:
    """Batches of neighbours, in a new order in each pass."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(k, min(k + 4, N))) for k in range(0, N, 4)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return -(-N // 4)


class _SomeBuckets(_Buckets):
    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(super().__iter__(), 3)

    def __len__(self) -> int:
        return 3


class _Whole(Dataset[Any]):
    """Each item is a batch."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, k: int) -> tuple[Tensor, ...]:
        if not 0 <= k < 5:
            raise IndexError(k)
        return tuple(t[5 * k : 5 * k + 5] for t in numbered())


class _ByLists(Dataset[Any]):
    """Gives a batch for a list of indices."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(t[indices] for t in numbered())


class _Samples(IterableDataset[Any]):
    def __init__(self, shuffles: bool = False, shares: bool = True) -> None:
        self.shuffles, self.shares = shuffles, shares

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(N).tolist() if self.shuffles else list(range(N))
        if self.shares and (info := get_worker_info()) is not None:
            order = list(range(N))[info.id :: info.num_workers]
        x, y = numbered()
        return ((x[k], y[k]) for k in order)


class _Told(_Samples):
    def __len__(self) -> int:  # a wrong one
        return 100


class _Batches:
    """Any iterable of batches."""

    def __init__(self, how: str = "fixed") -> None:
        self.how = how

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(N)
        if self.how == "shuffled":
            order = torch.randperm(N)
        if self.how == "drawn":
            order = torch.randint(N, (N,))
        return iter([tuple(t[part] for t in numbered()) for part in order.split(5)])


def _list_of_batches() -> list[Any]:
    return list(DataLoader(_dataset(), batch_size=5))


# The loader; order, n, batches in a pass, tail, codes of notes.
KINDS: dict[str, tuple[Callable[[], Any], tuple[str, int | None, int | None, int, list[str]]]] = {
    "unshuffled": (lambda: DataLoader(_dataset(), batch_size=5), ("fixed", N, 5, 0, ["unshuffled"])),
    "unshuffled, drop_last": (
        lambda: DataLoader(_dataset(), batch_size=5, drop_last=True),
        ("fixed", 20, 4, 3, ["dropped", "unshuffled"]),
    ),
    "one batch": (lambda: DataLoader(_dataset(), batch_size=N), ("fixed", N, 1, 0, [])),
    "one batch and a tail": (
        lambda: DataLoader(_dataset(), batch_size=20, drop_last=True),
        ("fixed", 20, 1, 3, ["dropped"]),
    ),
    "shuffled": (lambda: DataLoader(_dataset(), batch_size=5, shuffle=True), ("shuffled", N, 5, 0, [])),
    "shuffled, drop_last": (
        lambda: DataLoader(_dataset(), batch_size=5, shuffle=True, drop_last=True),
        ("shuffled", N, 4, 3, []),
    ),
    "subset": (
        lambda: DataLoader(_dataset(), batch_size=3, sampler=SubsetRandomSampler(range(8))),
        ("shuffled", 8, 3, 0, []),
    ),
    "subset, repeated": (
        lambda: DataLoader(_dataset(), batch_size=3, sampler=SubsetRandomSampler([1, 1, 2, 5, 5, 7])),
        ("shuffled", 4, 2, 0, ["num-samples"]),
    ),
    "sampler of other data": (
        lambda: DataLoader(_dataset(), batch_size=4, sampler=RandomSampler(range(8))),
        ("shuffled", 8, 2, 0, []),
    ),
    "RandomSampler, fewer": (
        lambda: DataLoader(_dataset(), batch_size=5, sampler=RandomSampler(_dataset(), num_samples=10)),
        ("drawn", 10, 2, 0, ["num-samples"]),
    ),
    "RandomSampler, more": (
        lambda: DataLoader(
            _dataset(), batch_size=5, sampler=RandomSampler(_dataset(), replacement=True, num_samples=50)
        ),
        ("drawn", N, 10, 0, ["num-samples"]),
    ),
    "with replacement": (
        lambda: DataLoader(_dataset(), batch_size=5, sampler=RandomSampler(_dataset(), replacement=True)),
        ("drawn", N, 5, 0, []),
    ),
    "weighted": (
        lambda: DataLoader(_dataset(), batch_size=5, sampler=WeightedRandomSampler(torch.arange(N) % 3 + 1.0, N)),
        ("drawn", N, 5, 0, []),
    ),
    "distributed": (
        lambda: DataLoader(
            _dataset(40), batch_size=5, sampler=DistributedSampler(_dataset(40), num_replicas=4, rank=1)
        ),
        ("fixed", 10, 2, 0, ["num-samples", "unshuffled"]),
    ),
    "distributed, drop_last": (
        lambda: DataLoader(
            _dataset(40), 4, sampler=DistributedSampler(_dataset(40), num_replicas=4, rank=1), drop_last=True
        ),
        ("fixed", 8, 2, 2, ["num-samples", "dropped", "unshuffled"]),
    ),
    "sampler of one's own": (
        lambda: DataLoader(_dataset(), batch_size=4, sampler=_Halves()),
        ("fixed", 11, 3, 0, ["unshuffled"]),
    ),
    "list as sampler": (
        lambda: DataLoader(_dataset(), batch_size=2, sampler=[4, 2, 9]),
        ("fixed", 3, 2, 0, ["unshuffled"]),
    ),
    "tensor as sampler": (
        lambda: DataLoader(_dataset(), batch_size=2, sampler=torch.tensor([4, 2, 9, 2])),
        ("fixed", 3, 2, 0, ["num-samples", "unshuffled"]),
    ),
    "own shuffling sampler": (
        lambda: DataLoader(_dataset(), batch_size=5, sampler=_OwnShuffle(), drop_last=True),
        ("shuffled", N, 4, 3, []),
    ),
    "subclass that does not shuffle": (
        lambda: DataLoader(_dataset(), batch_size=5, sampler=_Ordered(_dataset())),
        ("fixed", N, 5, 0, ["unshuffled"]),
    ),
    "sampler without end": (
        lambda: DataLoader(_dataset(), batch_size=5, sampler=_Forever()),
        ("drawn", None, None, 0, []),
    ),
    "list of lists": (
        lambda: DataLoader(_dataset(), batch_sampler=[[0, 1], [2, 3, 4], [0, 9]]),
        ("fixed", 6, 3, 0, ["num-samples", "unshuffled"]),
    ),
    "buckets": (lambda: DataLoader(_dataset(), batch_sampler=_Buckets()), ("shuffled", N, 6, 0, [])),
    "some buckets": (
        lambda: DataLoader(_dataset(), batch_sampler=_SomeBuckets()),
        ("drawn", 12, 3, 0, ["num-samples"]),
    ),
    "BatchSampler as sampler": (
        lambda: DataLoader(
            _ByLists(), sampler=BatchSampler(RandomSampler(_ByLists()), 5, drop_last=True), batch_size=None
        ),
        ("shuffled", N, 4, 3, []),
    ),
    "items are batches": (lambda: DataLoader(_Whole(), batch_size=None), ("fixed", N, 5, 0, ["unshuffled"])),
    "items are batches, shuffled": (
        lambda: DataLoader(_Whole(), batch_size=None, shuffle=True),
        ("shuffled", N, 5, 0, []),
    ),
    "list of batches": (
        lambda: DataLoader(_list_of_batches(), batch_size=None),
        ("fixed", N, 5, 0, ["unshuffled"]),
    ),
    "list of batches, shuffled": (
        lambda: DataLoader(_list_of_batches(), batch_size=None, shuffle=True),
        ("shuffled", N, 5, 0, []),
    ),
    "some of the batches": (
        lambda: DataLoader(_Whole(), batch_size=None, sampler=RandomSampler(range(4), num_samples=2)),
        ("drawn", 10, 2, 0, ["num-samples"]),
    ),
    "stream": (lambda: DataLoader(_Samples(), batch_size=5), ("fixed", N, 5, 0, ["unshuffled"])),
    "stream that shuffles": (lambda: DataLoader(_Samples(True), batch_size=5), ("shuffled", N, 5, 0, [])),
    "stream with a wrong length": (lambda: DataLoader(_Told(), batch_size=5), ("fixed", N, 5, 0, ["unshuffled"])),
    "iterable": (_Batches, ("fixed", N, 5, 0, ["unshuffled"])),
    "iterable that shuffles": (lambda: _Batches("shuffled"), ("shuffled", N, 5, 0, [])),
    "iterable that draws": (lambda: _Batches("drawn"), ("drawn", N, 5, 0, ["num-samples"])),
}


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("kind", KINDS)
def test_order_and_number_of_samples(kind: str) -> None:
    """Each kind says what a pass over it shows."""
    make, (order, num_samples, num_batches, tail, codes) = KINDS[kind]
    source = _source(make(), max_batches=40)
    sampling = source.sampling
    assert (sampling.order, sampling.num_samples, sampling.num_batches) == (order, num_samples, num_batches)
    assert sampling.tail == tail and source.num_samples == num_samples
    assert sorted(_codes(source)) == sorted(codes)
    assert not sampling.reads_randomly and sampling.is_reproducible
    if num_batches is not None:
        first, second = (_take(source, 3 * num_batches, chain=chain) for chain in range(2))
        assert (first == second) == (order == "fixed")


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("kind", [kind for kind, (_, said) in KINDS.items() if said[0] == "fixed"])
def test_fixed_order_has_positions(kind: str) -> None:
    """Step t of every chain sees the batch at its position in a pass over everything."""
    source = _source(KINDS[kind][0]())
    batches = [(_ids(batch), size) for batch, size in source.full()]
    assert all(len(ids) == size for ids, size in batches)
    steps = 2 * len(batches) + 1
    for chain in range(2):
        assert _take(source, steps, chain=chain) == [batches[source.sampling.position(t)][0] for t in range(steps)]
    assert batches == [(_ids(batch), size) for batch, size in source.full(tail=False)]
    assert list(source.tail()) == []


@pytest.mark.parametrize("kind", [kind for kind, (_, said) in KINDS.items() if said[0] == "shuffled"])
def test_shuffled_order_gives_each_sample_once(kind: str) -> None:
    """A pass over everything holds what passes of chains hold, and their tail, which can be had apart."""
    make, (_, _, num_batches, tail, _) = KINDS[kind]
    source = _source(make())
    everything = [i for batch, _ in source.full() for i in _ids(batch)]
    chains = Counter(i for ids in _take(source, 40 * (num_batches or 1)) for i in ids)
    assert set(chains) == set(everything)
    if kind != "subset, repeated":
        assert len(set(everything)) == len(everything) == source.num_samples
    pieces, rest = list(source.full(tail=False, seed=3)), list(source.tail(seed=3))
    assert sum(size for _, size in rest) == tail and len(rest) == (tail > 0)
    assert sorted(i for batch, _ in pieces + rest for i in _ids(batch)) == sorted(everything)
    if tail:
        assert {size for _, size in pieces} == {5}


def test_pass_of_draws_is_exact_where_weights_are_known() -> None:
    """Every sample once, with its weight: the mean over a pass is the expectation of the loss of minibatches."""
    weights = (torch.arange(N) % 3).double()
    samplers = {
        "weighted": (WeightedRandomSampler(weights.tolist(), 2 * N), weights),
        "replacement": (RandomSampler(_dataset(), replacement=True), torch.ones(N)),
        "fewer": (RandomSampler(_dataset(), num_samples=9), torch.ones(N)),
    }
    for name, (sampler, w) in samplers.items():
        source = _source(DataLoader(_dataset(), batch_size=4, sampler=sampler))
        assert source.sampling.full_is_exact, name
        found = list(source.full())
        total = sum(float(batch[-1].double().mean()) * size for batch, size in found)
        assert total / sum(size for _, size in found) == pytest.approx(float((w * numbered()[1]).sum() / w.sum()))
        assert {len(batch[-1]) for batch, _ in source.full(tail=False)} == {4}
        apart = [*source.full(tail=False), *source.tail()]
        assert sorted(i for b, _ in apart for i in _ids(b)) == sorted(i for b, _ in found for i in _ids(b))


def test_passes_of_draws_differ_where_weights_do_not_say_what_comes() -> None:
    """Then another seed gives another pass, and equal seeds the same."""
    sampler = WeightedRandomSampler(torch.rand(N).tolist(), 9, replacement=False)
    source = _source(DataLoader(_dataset(), batch_size=4, sampler=sampler))
    assert not source.sampling.full_is_exact and source.sampling.order == "drawn"
    passes = [[_ids(b) for b, _ in source.full(seed=seed)] for seed in (0, 1, 0)]
    assert passes[0] == passes[2] != passes[1]


def test_large_populations_are_not_read_through() -> None:
    """A loader that draws a few of many samples is asked for a pass, not for all of them."""
    sampler = RandomSampler(range(10**5), replacement=True, num_samples=20)
    source = _source(DataLoader(_dataset(10**5), batch_size=5, sampler=sampler), max_batches=10)
    assert not source.sampling.full_is_exact and sum(size for _, size in source.full()) == 20
    passes = [[_ids(b) for b, _ in source.full(seed=seed)] for seed in (0, 1, 0)]
    assert passes[0] == passes[2] != passes[1]


def test_streams_without_end() -> None:
    """No n; L(w*) is over as many batches as were asked for; equal beginnings are told."""

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            x, y = numbered()
            return ((x[k % N], y[k % N]) for k in itertools.count())

    source = _source(DataLoader(Endless(), batch_size=5), max_batches=7)
    assert (source.sampling.order, source.num_samples, source.sampling.num_batches) == ("drawn", None, None)
    assert _codes(source) == ["unshuffled"]
    assert len(list(source.full())) == 7
    with pytest.raises(ValueError, match="positions"):
        source.sampling.position(3)


def test_sampler_without_end() -> None:
    source = _source(DataLoader(_dataset(), batch_size=5, sampler=_Forever()), max_batches=7)
    assert len(list(source.full())) == 7


def test_iterators_are_read_once() -> None:
    """A generator is no loader: its first pass says so, unless it has no end."""
    source = _source((tuple(t[:5] for t in numbered()) for _ in range(4)), max_batches=10)
    assert _codes(source) == ["irreproducible"] and source.num_samples is None
    with pytest.raises(ValueError, match="exhausted iterator"):
        list(source.full())
    source = _source(itertools.cycle([tuple(t[:5] for t in numbered())]), max_batches=10)
    assert len(list(source.full())) == 10 and len(_take(source, 30)) == 30


def test_one_shot_sampler() -> None:
    loader = DataLoader(_dataset(), batch_size=5, sampler=iter(range(N)))
    with pytest.raises(ValueError, match=r"sampler .* only once"):
        _ = _source(loader).sampling


class _CountsReads(Dataset[Any]):
    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return torch.tensor([float(index), 10.0 * index]), torch.tensor(-float(index))


def test_samplers_that_torch_knows_are_not_read_for() -> None:
    """n takes no reading at all, the rest a few samples."""
    dataset = _CountsReads()
    source = _source(DataLoader(dataset, batch_size=10, shuffle=True))
    assert source.num_samples == 1000 and dataset.reads == 0
    assert source.sampling.order == "shuffled" and dataset.reads <= 40


def test_small_passes_are_read_once() -> None:
    """What was read to be counted is not read again for L(w*)."""

    class Counted(_Batches):
        reads = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                self.reads += 1
                yield batch

    batches = Counted()
    source = _source(batches)
    assert source.sampling.num_samples == N
    reads = batches.reads
    assert [_ids(b) for b, _ in source.full()] == _take(source, 5) and batches.reads == reads + 5


def test_a_loader_that_uses_its_memory_again() -> None:
    """Batches that were kept, or read ahead, are not overwritten by later ones."""
    memory = tuple(t[:5].clone() for t in numbered())

    class Again:
        def __iter__(self) -> Iterator[Any]:
            for part in torch.arange(20).split(5):
                for old, new in zip(memory, numbered(), strict=True):
                    old.copy_(new[part])
                yield memory

        def __len__(self) -> int:
            return 4

    def collate(rows: list[Any]) -> Any:
        for old, new in zip(memory, default_collate(rows), strict=True):
            old.copy_(new)
        return memory

    wanted = [tuple(range(k, k + 5)) for k in range(0, 20, 5)]
    for loader in (Again(), DataLoader(_dataset(20), batch_size=5, collate_fn=collate)):
        source = _source(loader)
        assert source.sampling.order == "fixed"
        assert [_ids(batch) for batch, _ in source.full()] == wanted == _take(source, 4)


def test_workers_that_give_the_same() -> None:
    """An IterableDataset that does not share its samples out to workers gives each as often as there are workers."""
    source = _source(DataLoader(_Samples(shares=False), batch_size=5, num_workers=2))
    assert source.num_samples == N and "2 times" in dict(source.sampling.notes)["num-samples"]
    shared = _source(DataLoader(_Samples(), batch_size=5, num_workers=2))
    assert shared.num_samples == N and _codes(shared) == ["unshuffled"]


def test_loader_over_a_list_of_batches_with_batch_size_one() -> None:
    source = _source(DataLoader(_list_of_batches()[:4], shuffle=True))
    assert "batch_size=None" in dict(source.sampling.notes)["num-samples"]
    assert _codes(_source(DataLoader(list(zip(*numbered(), strict=True)), shuffle=True))) == []


def test_collate_functions_that_leave_samples_out_or_turn_them() -> None:
    """Sizes are those of what came, and the samplers' where the first dimension is another."""

    def drops(rows: list[Any]) -> Any:
        return default_collate([row for row in rows if int(row[1]) % 2 == 0])

    def turns(rows: list[Any]) -> Any:
        x, y = default_collate(rows)
        return x.T, torch.stack([y, y, y])

    assert sum(size for _, size in _source(DataLoader(_dataset(), 6, collate_fn=drops)).full()) == 12
    assert [size for _, size in _source(DataLoader(_dataset(), 6, collate_fn=turns)).full()] == [6, 6, 6, 5]


# --- random numbers -----------------------------------------------------------------------------------------


class _Augments(Dataset[Any]):
    """Adds what `noise` gives to the inputs."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = numbered()
        return x[index] + self.noise(), y[index]


class _Holds:
    """A private generator."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self) -> float:
        if isinstance(self.generator, torch.Generator):
            return float(torch.rand((), generator=self.generator))
        return float(self.generator.random())


def _numpy_global() -> float:
    return float(np.random.rand())


def _torch_global() -> float:
    return float(torch.rand(()))


def _rarely() -> float:
    return float(random.random() < 1e-9)


NOISE: dict[str, Callable[[], Callable[[], float]]] = {
    "torch": lambda: _torch_global,
    "numpy": lambda: _numpy_global,
    "python": lambda: random.random,
    "rarely": lambda: _rarely,
    "own torch": lambda: _Holds(torch.Generator()),
    "own numpy": lambda: _Holds(np.random.default_rng(5)),
    "own RandomState": lambda: _Holds(np.random.RandomState(5)),
    "own python": lambda: _Holds(random.Random(5)),
}


def _values(source: Any, seed: int = 0, chain: int = 0, count: int = 8) -> list[Any]:
    return [batch[0].tolist() for batch in itertools.islice(source.minibatches(seed, chain), count)]


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("how", ["data set", "loader", "in collate_fn"])
def test_augmentation_follows_the_seed(kind: str, how: str) -> None:
    """Equal seeds read equal values whatever else was drawn; chains differ; the user's generators stay."""
    noise = NOISE[kind]()
    if how == "in collate_fn":
        data: Any = DataLoader(
            _dataset(), batch_size=5, collate_fn=lambda rows: (default_collate(rows)[0] + noise(), rows[0][1][None])
        )
    else:
        data = _Augments(noise) if how == "data set" else DataLoader(_Augments(noise), batch_size=5)
    held = noise.generator.getstate() if kind == "own python" else None  # type: ignore[attr-defined]
    source = make_source(data, 5 if how == "data set" else None, CPU)
    assert source.sampling.reads_randomly and source.sampling.is_reproducible
    first = _values(source)
    with torch.random.fork_rng():
        torch.rand(7)
        assert _values(source) == first
    if kind != "rarely":
        assert first != _values(source, chain=1) and first != _values(source, seed=1)
    fulls = [[b[0].tolist() for b, _ in source.full(seed=seed)] for seed in (0, 0, 1)]
    assert fulls[0] == fulls[1] and (fulls[0] != fulls[2] or kind == "rarely")
    if held is not None:
        assert noise.generator.getstate() == held  # type: ignore[attr-defined]


def test_chains_of_a_group_augment_as_they_do_alone() -> None:
    """What a chain reads does not depend on the chains that are read with it."""
    source = make_source(_Augments(_numpy_global), 5, CPU)
    from llc_fast.data import IndexedSource
    from llc_fast.kernels.step import NoiseKey

    assert isinstance(source, IndexedSource)
    key = NoiseKey(3, step=4, chain=1)
    together = source.gather(source.sample_indices(key, source.index_buffer(2)), key=key)
    for row in range(2):
        alone = next(iter(source.minibatches(3, chain=1 + row, start=4)))
        assert torch.equal(together[0].view(2, 5, 2)[row], alone[0])


class _Counts:
    """A counter that goes on: no generator."""

    count = 0.0

    def __call__(self) -> float:
        self.count += 1.0
        return self.count


@pytest.mark.parametrize(
    "noise", [lambda: time.perf_counter_ns() % 1e6, lambda: float(os.urandom(4)[0] << 8 | os.urandom(4)[1]), _Counts()]
)
def test_what_no_seed_reaches_is_told(noise: Callable[[], float]) -> None:
    for data in (_Augments(noise), DataLoader(_Augments(noise), batch_size=5)):
        source = make_source(data, None, CPU, num_wanted=1)
        assert source.sampling.reads_randomly and not source.sampling.is_reproducible
        assert "irreproducible" in [code for code, _ in source.sampling.notes]


def test_sampler_that_counts_its_passes_is_told() -> None:
    class Epochs(Sampler[int]):
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            self.epoch += 1
            return iter(torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    source = _source(DataLoader(_dataset(), batch_size=5, sampler=Epochs()))
    assert source.sampling.order == "shuffled" and not source.sampling.is_reproducible


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches(persistent: bool) -> None:
    """The same order of samples as without workers; augmentation in workers follows the seed."""
    options: dict[str, Any] = {"batch_size": 5, "shuffle": True}
    alone = _take(_source(DataLoader(_dataset(), **options)), 15)
    options |= {"num_workers": 2, "persistent_workers": persistent}
    loader = DataLoader(_dataset(), **options)
    assert _take(_source(loader), 15) == alone == _take(_source(loader), 15)
    noisy = DataLoader(_Augments(_numpy_global), **options)
    source = _source(noisy)
    assert source.sampling.reads_randomly and source.sampling.is_reproducible
    assert _values(source) == _values(_source(noisy)) != _values(source, seed=1)
    assert noisy._iterator is None


def test_a_users_pass_goes_on() -> None:
    """A loader with workers that stay, in the middle of a pass of the user's, goes on where it was."""
    loader = DataLoader(_dataset(), batch_size=5, num_workers=1, persistent_workers=True)
    mine = iter(loader)
    seen = [_ids(next(mine))]
    source = _source(loader)
    assert source.sampling.order == "fixed" and len(_take(source, 7)) == 7
    seen += [_ids(batch) for batch in mine]
    assert seen == [_ids(batch) for batch, _ in source.full()]
    loader._iterator._shutdown_workers()  # type: ignore[union-attr]
    del mine, loader, source


@pytest.mark.parametrize("where", ["generator", "sampler"])
def test_loaders_with_a_generator_of_their_own(where: str) -> None:
    own = torch.Generator().manual_seed(1)
    if where == "generator":
        loader = DataLoader(_dataset(), batch_size=5, shuffle=True, generator=own)
    else:
        loader = DataLoader(_dataset(), batch_size=5, sampler=RandomSampler(_dataset(), generator=own))
    before = own.get_state()
    source = _source(loader)
    first = _take(source, 12)
    assert first == _take(source, 12) != _take(source, 12, chain=1)
    assert list(source.full()) and torch.equal(own.get_state(), before)


class _Fails(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        torch.rand(3), np.random.rand(), random.random()
        if index == 12:
            raise KeyError("sample 12 is broken")
        x, y = numbered()
        return x[index], y[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_come_in_their_turn(workers: int) -> None:
    """The batches before a broken one come first; generators are as they were, also if a pass is left."""
    source = _source(DataLoader(_Fails(), batch_size=5, num_workers=workers))
    batches = source.minibatches(0)
    assert [_ids(next(batches)) for _ in range(2)] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    with pytest.raises(KeyError, match="sample 12"):
        next(batches)
    left = source.minibatches(0)
    next(left)
    left.close()


class _Subclass(DataLoader[Any]):
    """With a constructor of its own."""

    def __init__(self, size: int, note: str) -> None:
        super().__init__(_dataset(), batch_size=size, shuffle=True, drop_last=True)
        self.note = note


def _init(worker: int) -> None:
    get_worker_info().dataset.ready = True  # type: ignore[union-attr]


class _NeedsInit(Dataset[Any]):
    ready = False

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not self.ready:
            raise RuntimeError("worker_init_fn did not run")
        x, y = numbered()
        return x[index], y[index]


def test_loaders_are_rebuilt_faithfully() -> None:
    """Whatever a loader was made with stays: the tail is read by the same means."""
    source = _source(_Subclass(5, "mine"))
    assert source.sampling.tail == 3 and sum(size for _, size in source.full()) == N
    loader = DataLoader(
        _NeedsInit(),
        5,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        worker_init_fn=_init,
        timeout=20,
        prefetch_factor=3,
    )
    source = _source(loader)
    assert sum(size for _, size in source.full()) == N and sum(size for _, size in source.tail()) == 3


class _OwnIteration(DataLoader[Any]):
    """Gives its batches in another order than its sampler says."""

    def __iter__(self) -> Any:
        return iter([numbered()] * 3)


def test_loaders_that_iterate_by_themselves_are_measured() -> None:
    source = _source(_OwnIteration(_dataset(), batch_size=5, shuffle=True))
    assert source.sampling.order == "fixed" and source.sampling.num_batches == 3


# --- unclear batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(_Samples(), batch_size=30, drop_last=True),
        DataLoader(_dataset(), batch_sampler=[]),
        DataLoader(_dataset(), batch_size=2, sampler=SubsetRandomSampler([])),
        DataLoader(_dataset(), batch_size=30, drop_last=True),
        DataLoader([], batch_size=None, sampler=[]),
    ],
)
def test_empty_loaders(loader: Any) -> None:
    with pytest.raises(ValueError, match="data is empty"):
        _ = make_source(loader, None, CPU).sampling


def test_empty_iterable() -> None:
    class Nothing:
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match="data is empty"):
        _ = _source(Nothing()).num_samples


def test_structure_that_changes() -> None:
    """The error names the batch, what it is, and what the first one is."""

    def collate(rows: list[Any]) -> Any:
        x, y = default_collate(rows)
        return (x, y) if len(rows) == 5 else (x, {"target": y})

    with pytest.raises(ValueError, match=r"batch 5 of the loader is .*target.*first"):
        list(_source(DataLoader(_dataset(), batch_size=5, collate_fn=collate)).full())


def test_arrays_that_a_collate_function_leaves() -> None:
    """NumPy's become tensors; None and texts stay."""

    def collate(rows: list[Any]) -> Any:
        x, y = default_collate(rows)
        return x.numpy(), None, ["a"] * len(rows), y.numpy()

    batch = next(iter(_source(DataLoader(_dataset(), batch_size=5, collate_fn=collate)).minibatches(0)))
    assert isinstance(batch[0], Tensor) and batch[1] is None and batch[2][0] == "a" and isinstance(batch[3], Tensor)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(_dataset(), batch_size=5, sampler=WeightedRandomSampler([1.0] * N, N)), "other samples"),
        (DataLoader(_Augments(random.random), batch_size=5), "other values"),
        (_Batches("drawn"), "other samples"),
        (DataLoader(_dataset(), batch_size=5, sampler=_Forever()), "no length"),
    ],
)
def test_loaders_that_are_no_fixed_set(data: Any, message: str) -> None:
    """Where every step needs all data, these must be the same each time."""
    with pytest.raises(ValueError, match=message):
        make_source(data, None, CPU, whole=True)


def test_whole_loaders() -> None:
    """What a loader leaves out for good is not there; the tail of one that shuffles is."""
    for shuffle, n in ((False, 20), (True, N)):
        source = make_source(DataLoader(_dataset(), 5, shuffle=shuffle, drop_last=True), None, CPU, whole=True)
        assert source.num_samples == n
        assert [code for code, _ in source.sampling.notes] == ([] if shuffle else ["dropped"])


def test_sequential_sampler_by_hand() -> None:
    assert _source(DataLoader(_dataset(), 5, sampler=SequentialSampler(_dataset()))).sampling.order == "fixed"
