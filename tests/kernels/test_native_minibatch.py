"""Which samples a minibatch holds: native against reference, permutations, uniformity, independence of epochs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from llc_fast.kernels import native, reference
from llc_fast.kernels.step import NoiseKey

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
SHAPES = [
    (1, 1),
    (2, 1),
    (2, 2),
    (3, 2),
    (7, 3),
    (255, 8),
    (256, 256),
    (257, 10),
    (511, 7),
    (512, 512),
    (513, 512),
    (1000, 1),
    (4097, 64),
    (65_537, 100),
    (10**6 + 3, 33),
    (2**40 - 1, 5),
    (2**40 + 1, 5),
]
"""n and batch size: around powers of two, where the cipher's domain changes, and far beyond 32 bits."""


def _indices(n: int, size: int, key: NoiseKey, chains: int = 1) -> Tensor:
    return native.minibatch_indices(n, key, torch.full((chains, size), -1))


def _epoch(n: int, size: int, epoch: int, seed: int = 0, chain: int = 0) -> Tensor:
    """All indices of an epoch, in order."""
    steps = range(epoch * (n // size), (epoch + 1) * (n // size))
    return torch.cat([_indices(n, size, NoiseKey(seed, step=step, chain=chain))[0] for step in steps])


def _assert_chi_square(statistic: float, freedom: int) -> None:
    """Within five standard deviations of its mean, from either side: too even is as wrong as too uneven."""
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom), (statistic, freedom)


def _assert_uniform(counts: Tensor) -> None:
    """Chi-square of independent draws against equal cells."""
    expected = counts.double().mean()
    _assert_chi_square(float((counts - expected).square().sum() / expected), counts.numel() - 1)


# --- The native function is the specification ---------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "size"), SHAPES)
def test_equals_the_reference(n: int, size: int, seed: int) -> None:
    """Bit for bit, at the first, a middle and the last step of an epoch, in early and late epochs, for far chains."""
    per_epoch = n // size
    places = {0, per_epoch // 2, per_epoch - 1}
    for epoch, chain in ((0, 0), (1, 5), (2**20, 2**31), (7, 2**32 - 2)):
        for step in (epoch * per_epoch + place for place in places):
            if step >= 2**40:
                continue  # beyond what a noise key can name
            key = NoiseKey(seed, step=step, chain=chain)
            found, expected = _indices(n, size, key), reference.minibatch_indices(n, size, 1, key)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [2**31, 2**32 - 1, 2**32, 2**39 + 12_345, 2**40 - 1])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (10, 10), (10, 3), (5003, 512)])
def test_equals_the_reference_at_huge_steps(n: int, size: int, step: int) -> None:
    """Up to the 40 bits that a step may have."""
    key = NoiseKey(9, step=step, chain=3)
    assert torch.equal(_indices(n, size, key, 2), reference.minibatch_indices(n, size, 2, key))


@pytest.mark.parametrize("chains", [1, 2, 17])
def test_rows_are_chains(chains: int) -> None:
    """Row c of a call is the call for chain ``key.chain + c`` alone; rows differ."""
    key = NoiseKey(4, step=11, chain=100)
    rows = _indices(1000, 9, key, chains)
    for row in range(chains):
        assert torch.equal(rows[row : row + 1], _indices(1000, 9, key._replace(chain=100 + row)))
    assert len({tuple(row) for row in rows.tolist()}) == chains
    assert torch.equal(rows, reference.minibatch_indices(1000, 9, chains, key))


def test_the_output_is_overwritten_and_returned() -> None:
    """The given memory receives the indices, whatever it held; nothing beside it is written."""
    room = torch.full((4, 6), 77)
    out = room[1:3]
    assert native.minibatch_indices(50, NoiseKey(1), out) is out
    assert (room[[0, 3]] == 77).all() and (room[1:3] < 50).all()


def test_devices_without_a_native_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback gives the same indices in the same memory."""
    key = NoiseKey(3, step=8, chain=2)
    expected = _indices(300, 11, key, 3)
    monkeypatch.setattr(native, "has_native_backend", lambda kind: False)
    monkeypatch.setattr(native._native, "minibatch", None)
    assert torch.equal(_indices(300, 11, key, 3), expected)


def test_other_streams_do_not_matter() -> None:
    """The stream is the function's own: indices do not follow the stream of the noise key."""
    assert torch.equal(_indices(99, 9, NoiseKey(1, stream=0)), _indices(99, 9, NoiseKey(1, stream=7)))


# --- An epoch is a permutation ------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 2, 1000])
@pytest.mark.parametrize(
    ("n", "size"), [(1, 1), (2, 1), (3, 2), (10, 3), (97, 97), (255, 5), (256, 16), (257, 1), (300, 7), (1025, 64)]
)
def test_epochs_hold_no_sample_twice(n: int, size: int, epoch: int) -> None:
    """n // size full batches of different samples, all within 0 … n − 1; all of them where size divides n."""
    drawn = _epoch(n, size, epoch)
    assert len(drawn) == n // size * size == len(drawn.unique())
    assert drawn.min() >= 0 and drawn.max() < n
    if n % size == 0:
        assert torch.equal(drawn.sort().values, torch.arange(n))


def test_batch_size_does_not_change_the_order() -> None:
    """An epoch's order is a function of n, seed, chain and epoch: batches of other sizes only cut it elsewhere."""
    whole = _indices(120, 120, NoiseKey(5))[0]
    for size in (1, 7, 40, 60):
        assert torch.equal(_epoch(120, size, 0, seed=5), whole[: 120 // size * size])


# --- Which permutation: uniform and independent, as far as can be counted -----------------------------------

EPOCHS = 4000


def _orders(n: int, count: int = EPOCHS) -> Tensor:
    """The order of many epochs, ``[count, n]``: one batch of n samples is an epoch."""
    return torch.cat([_indices(n, n, NoiseKey(2024, step=epoch)) for epoch in range(count)])


@pytest.mark.parametrize("n", [2, 5, 12, 100])
def test_every_sample_comes_in_every_place_equally_often(n: int) -> None:
    """Place × sample is a table with fixed margins: (n − 1)² degrees of freedom."""
    orders = _orders(n)
    table = torch.zeros(n, n)
    for place in range(n):
        table[place] = orders[:, place].bincount(minlength=n)
    # A cell's variance is m/n·(1 − 1/n), so that the n² terms have the mean n(n − 1): n/(n − 1) times a χ².
    expected = EPOCHS / n
    statistic = float((table - expected).square().sum() / expected) * (n - 1) / n
    _assert_chi_square(statistic, (n - 1) ** 2)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 5), (3, 4), (5, 0)])
def test_pairs_of_samples_are_uniform(first: int, second: int) -> None:
    """In two places of an order, all n(n − 1) ordered pairs are equally likely."""
    n = 6
    orders = _orders(n)
    pairs = (orders[:, first] * n + orders[:, second]).bincount(minlength=n * n)
    different = torch.tensor([a != b for a, b in itertools.product(range(n), repeat=2)])
    assert pairs[~different].sum() == 0
    _assert_uniform(pairs[different])


def test_small_permutations_are_uniform() -> None:
    """All 24 orders of four samples are equally likely."""
    code = (_orders(4, 8000) * torch.tensor([64, 16, 4, 1])).sum(dim=1).bincount(minlength=256)
    assert (code > 0).sum() == 24
    _assert_uniform(code[code > 0])


def test_two_samples_share_a_batch_as_often_as_chance_has_it() -> None:
    """n = 8 in batches of 4: a pair shares a batch with probability 3/7."""
    halves = _orders(8)[:, :4]
    member = torch.zeros(EPOCHS, 8).scatter_(1, halves, 1.0)
    together = member.T @ member + (1 - member).T @ (1 - member)
    probability = 3 / 7
    deviation = math.sqrt(EPOCHS * probability * (1 - probability))
    off_diagonal = together[~torch.eye(8, dtype=torch.bool)]
    assert ((off_diagonal - EPOCHS * probability).abs() < 5 * deviation).all()


@pytest.mark.parametrize("what", ["epoch", "chain", "seed", "high bits of the seed"])
@pytest.mark.parametrize("n", [300, 4096])
def test_neighbouring_keys_give_unrelated_orders(n: int, what: str) -> None:
    """Fixed points between the orders of two keys are a Poisson variable of mean 1, so 200 pairs have 200 ± 71."""
    fixed = 0
    for k in range(200):
        keys = {
            "epoch": (NoiseKey(8, step=k), NoiseKey(8, step=k + 1)),
            "chain": (NoiseKey(8, chain=k), NoiseKey(8, chain=k + 1)),
            "seed": (NoiseKey(k), NoiseKey(k + 1)),
            "high bits of the seed": (NoiseKey(k << 33), NoiseKey((k + 1) << 33)),
        }[what]
        first, second = (_indices(n, n, key)[0] for key in keys)
        fixed += int((first == second).sum())
    assert abs(fixed - 200) < 5 * math.sqrt(200)


def test_orders_have_no_trend() -> None:
    """Neither place and sample nor one place and the next are correlated, within five standard deviations."""
    n = 2000
    place = torch.arange(n, dtype=torch.float64)
    for epoch in range(20):
        order = _indices(n, n, NoiseKey(77, step=epoch))[0].double()
        for a, b in ((place, order), (order[:-1], order[1:])):
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(len(a))


# --- Wrong arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 11, dtype=torch.int64),
        torch.zeros(1, 5, dtype=torch.int32),
        torch.zeros(1, 5),
        torch.zeros(5, 2, dtype=torch.int64).T,
        torch.zeros(2, 10, dtype=torch.int64)[:, ::2],
    ],
    ids=["empty batch", "batch beyond n", "int32", "float", "transposed", "strided"],
)
def test_wrong_output(out: Tensor) -> None:
    """Memory that the native function would misread is refused, with what it should be."""
    with pytest.raises(ValueError, match="out must be contiguous int64"):
        native.minibatch_indices(10, NoiseKey(0), out)


@pytest.mark.parametrize("shape", [(5,), (1, 1, 5)])
def test_output_of_another_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        native.minibatch_indices(10, NoiseKey(0), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "size"), SHAPES)
def test_gpu_equals_cpu(n: int, size: int) -> None:
    """The same indices on both, with the step given by the host or read from the device's memory."""
    for seed, step, chain in ((0, 0, 0), (2**64 - 1, 12_345, 2**31), (17, 2**39 + 7, 3)):
        key = NoiseKey(seed, step=step, chain=chain)
        cpu = _indices(n, size, key, 3)
        out = torch.full((3, size), -1, device="cuda")
        assert torch.equal(native.minibatch_indices(n, key, out).cpu(), cpu)
        device_step = torch.tensor(step, device="cuda")
        native.minibatch_indices(n, key._replace(step=0), out.fill_(-1), device_step=device_step)
        assert torch.equal(out.cpu(), cpu)
