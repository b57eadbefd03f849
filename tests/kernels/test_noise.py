"""The noise: equal to its specification, normal far into the tails, independent in every index."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import ndtr

from llc_fast.kernels import reference
from llc_fast.kernels.native import native_info, normals
from llc_fast.kernels.step import NoiseKey

KEY = NoiseKey(seed=0x0123456789ABCDEF, step=12345, chain=6)
N = 10**8


def test_rounds_agree() -> None:
    assert native_info()["philox_rounds"] == reference.PHILOX_ROUNDS


def test_philox_known_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published Random123 test vectors for ten rounds, through the same code."""
    monkeypatch.setattr(reference, "PHILOX_ROUNDS", 10)

    def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[str]:
        # counter words 1 to 3 are packed from the key's fields: unpack them from the wanted words
        c0, c1, c2, c3 = counter
        noise_key = NoiseKey(seed=key[0] | key[1] << 32, step=c1 | (c3 >> 16 & 0xFF) << 32, chain=c2, stream=c3 >> 24)
        first = torch.tensor([c0 | (c3 & 0xFFFF) << 32])
        return [f"{int(w):08x}" for w in reference.philox(first, noise_key)]

    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words((ones,) * 4, (ones, ones)) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0xA4093822, 0x299F31D0)) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("begin", [0, 1, 3, 510, 2**34 + 5, 2**48 - 1])
@pytest.mark.parametrize("length", [0, 1, 2, 200, 5000])
def test_equals_reference(dtype: torch.dtype, begin: int, length: int) -> None:
    native = normals(begin, length, KEY, dtype=dtype)
    exact = reference.normals(begin, length, KEY)
    assert native.dtype == dtype and native.shape == (length,)
    # The angle is rounded once before the sine: half an ulp of π/2, times a radius below 7, plus a few roundings.
    bound = 16 * torch.finfo(dtype).eps
    assert (native.double() - exact).abs().max() <= bound if length else True


def test_extreme_words() -> None:
    """Radii at both ends of the uniform: no infinity, no NaN, no rounding to zero."""
    words = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    first, second = reference._box_muller(words, torch.zeros_like(words), torch.float64)
    assert torch.isfinite(first).all() and torch.isfinite(second).all()
    assert first.max() == pytest.approx(math.sqrt(64 * math.log(2)))
    assert first.min() == pytest.approx(math.sqrt(2 * 2.0**-32))


def test_every_field_of_the_key_matters() -> None:
    base = normals(0, 64, KEY)
    for other in (
        KEY._replace(seed=KEY.seed ^ 1),
        KEY._replace(seed=KEY.seed ^ 1 << 63),
        KEY._replace(step=KEY.step + 1),
        KEY._replace(step=KEY.step + 2**33),
        KEY._replace(chain=KEY.chain + 1),
        KEY._replace(stream=1),
    ):
        assert not torch.equal(base, normals(0, 64, other))
    assert not torch.equal(base, normals(2**34, 64, KEY))
    assert torch.equal(base, normals(0, 64, KEY))


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return normals(0, N, KEY)


def test_moments(sample: torch.Tensor) -> None:
    """The first four moments of 10⁸ values, each within five standard errors."""
    sums = np.zeros(4)
    for chunk in sample.split(10**7):
        z = chunk.double()
        sums += [float(z.pow(k).sum()) for k in (1, 2, 3, 4)]
    for k, (moment, exact, variance) in enumerate(zip(sums / N, (0, 1, 0, 3), (1, 2, 15, 96), strict=True), start=1):
        assert abs(moment - exact) < 5 * math.sqrt(variance / N), f"moment {k}: {moment}"


def test_distribution(sample: torch.Tensor) -> None:
    """Chi-square over 4096 equally likely cells with all 10⁸ values; Kolmogorov-Smirnov on 10⁷ of them."""
    counts = np.zeros(4096)
    for chunk in sample.split(10**7):
        cells = (ndtr(chunk.double().numpy()) * 4096).astype(np.int64)
        counts += np.bincount(cells, minlength=4096)
    assert stats.chisquare(counts).pvalue > 1e-5
    assert stats.kstest(sample[: 10**7].double().numpy(), "norm").pvalue > 1e-5


def test_tails() -> None:
    """Beyond 4, 5 and 5.5 standard deviations as many values, on each side, as there should be (4·10⁸ drawn)."""
    total, limits = 4 * N, (4.0, 5.0, 5.5)
    above, below = np.zeros(3), np.zeros(3)
    for part in range(40):
        z = normals(part * (total // 40), total // 40, KEY._replace(step=77))
        z = z[z.abs() > limits[0]]
        above += [int((z > limit).sum()) for limit in limits]
        below += [int((z < -limit).sum()) for limit in limits]
    for counts in (above, below):
        for limit, count in zip(limits, counts, strict=True):
            expected = total * float(ndtr(-limit))
            low, high = stats.poisson.interval(1 - 1e-5, expected)
            assert low <= count <= high, f"{count} values beyond {limit} sigma, expected {expected:.1f}"


def _parts(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and squares, each of mean 0 and variance 1."""
    z = z.double()
    return z, (z * z - 1) / math.sqrt(2)


def _correlations(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """√N times the correlation of values, squares, and value with square: standard normal if independent."""
    pairs = (a[0], b[0]), (a[1], b[1]), (a[0], b[1])
    return [float(x @ y) / math.sqrt(len(x)) for x, y in pairs]


def test_independent_elements(sample: torch.Tensor) -> None:
    """No correlation between elements 1 to 64 apart, nor at the strides of blocks and vector lanes."""
    z, squares = _parts(sample[: 4 * 10**6])
    scores = []
    for lag in [*range(1, 65), 128, 512, 4096]:
        scores += _correlations((z[:-lag], squares[:-lag]), (z[lag:], squares[lag:]))
    assert max(map(abs, scores)) < 5


@pytest.mark.parametrize("stride", [1, 2, 256, 2**20])
def test_independent_keys(stride: int, sample: torch.Tensor) -> None:
    """No correlation between steps, chains or seeds that differ a little, over 10⁷ elements each."""
    length = 10**7
    others = [
        KEY._replace(step=KEY.step + stride),
        KEY._replace(chain=KEY.chain + stride),
        KEY._replace(seed=KEY.seed + stride),
        KEY._replace(seed=KEY.seed ^ stride << 40),
    ]
    parts = _parts(sample[:length])
    scores = [s for key in others for s in _correlations(parts, _parts(normals(0, length, key)))]
    assert max(map(abs, scores)) < 5


def test_neighbouring_counters() -> None:
    """Flipping any one counter bit flips each output bit half the time (avalanche), to Monte Carlo error."""
    count = 20_000
    counters = torch.arange(count) * 7919
    base = reference.philox(counters, KEY)
    bits = torch.arange(32)
    for flip in range(0, 40, 3):
        changed = reference.philox(counters ^ (1 << flip), KEY)
        for before, after in zip(base, changed, strict=True):
            rate = ((before ^ after)[:, None] >> bits & 1).double().mean(dim=0)
            assert (rate - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)


def test_radius_and_angle_of_pairs(sample: torch.Tensor) -> None:
    """Pairs are uniform in angle and exponential in squared radius, and the two are independent."""
    z = sample[: 2 * 10**7].double().numpy().reshape(-1, 2)
    angle = (np.arctan2(z[:, 1], z[:, 0]) / (2 * math.pi)) % 1.0
    radius = 1 - np.exp(-0.5 * (z**2).sum(axis=1))
    cells = (angle * 32).astype(int).clip(max=31) * 32 + (radius * 32).astype(int).clip(max=31)
    assert stats.chisquare(np.bincount(cells, minlength=1024)).pvalue > 1e-5


def test_rejects_bad_requests() -> None:
    with pytest.raises(ValueError, match="begin and length"):
        normals(-1, 3, KEY)
    with pytest.raises(ValueError, match="dtype"):
        normals(0, 3, KEY, dtype=torch.float16)
