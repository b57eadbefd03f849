"""Influence and loss kernels: against leaving blocks out one by one, and against closed forms of a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from devinterp_versions import devinterp_2

from llc_fast.stats import influence as module
from llc_fast.stats.convergence import ess_mean, r_hat
from llc_fast.stats.influence import (
    Draws,
    FlatDraws,
    Influence,
    influence,
    influence_blocks,
    loss_kernel,
    sample_losses,
)

Array = np.ndarray[Any, np.dtype[np.float64]]


# ---- against plain formulas ----------------------------------------------------------------------------------


def _losses(chains: int = 3, draws: int = 103, train: int = 20, query: int = 15) -> tuple[Array, Array]:
    """Chains whose means differ, items that have something in common."""
    rng = np.random.default_rng(1)
    common = rng.standard_normal((chains, draws, 4))
    shift = rng.standard_normal((chains, 1, 1))
    left = common @ rng.standard_normal((4, train)) + shift + 3
    right = common @ rng.standard_normal((4, query)) + 0.5 * rng.standard_normal((chains, draws, query)) - shift
    return left, right


def _matrices(left: list[Array], right: list[Array]) -> dict[str, Array]:
    """From chains of any lengths, each about its own mean."""
    sums = sum((a - a.mean(axis=0)).T @ (b - b.mean(axis=0)) for a, b in zip(left, right, strict=True))
    squares = [sum(((a - a.mean(axis=0)) ** 2).sum(axis=0) for a in side) for side in (left, right)]
    freedom = sum(len(a) - 1 for a in left if len(a))
    return {"covariance": sums / freedom, "correlation": sums / np.sqrt(np.outer(*squares))}


def _one_by_one(left: Array, right: Array, length: int, kind: str, *, pooled: bool) -> tuple[Array, Array]:
    """The matrix and its jackknife error, by leaving each block out of the draws and starting again."""

    def found(kept: list[Any]) -> Array:
        sides = [[a[k] for a, k in zip(side, kept, strict=True) if np.any(k)] for side in (left, right)]
        if pooled:
            sides = [[np.concatenate(side)] for side in sides]
        return _matrices(*sides)[kind]

    chains, draws = left.shape[:2]
    all_draws = np.ones((chains, draws), bool)
    without = []
    for chain in range(chains):
        for stop in range(draws, length - 1, -length):
            kept = all_draws.copy()
            kept[chain, stop - length : stop] = False
            without.append(found(list(kept)))
    away = np.array(without) - np.mean(without, axis=0)
    return found(list(all_draws)), np.sqrt((chains * draws / length - 1) * (away**2).mean(axis=0))


@pytest.mark.parametrize("centred", ["chains", "pooled"])
@pytest.mark.parametrize(("chains", "length"), [(3, 10), (3, 1), (9, 103), (12, 60), (3, None)])
def test_values_and_errors(chains: int, length: int | None, centred: Any) -> None:
    """Also with blocks that don't divide the draws, blocks of single draws, and chains that are left out as a whole."""
    left, right = _losses(chains)
    first_order = (
        0.3 if centred == "pooled" and length == 103 else 0.06
    )  # a chain that is elsewhere is much to leave out
    for kind, tolerance in (("covariance", 1e-9), ("correlation", first_order)):
        result = influence(left, right, kind=kind, block_length=length, centred=centred)  # type: ignore[arg-type]
        value, errors = _one_by_one(left, right, result.block_length, kind, pooled=centred == "pooled")
        np.testing.assert_allclose(result.value, value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(result.stderr, errors, rtol=tolerance)
        assert result.num_blocks == chains * (103 // result.block_length)


def test_influence_is_a_derivative() -> None:
    """−β times the covariance, with β times its error."""
    left, right = _losses()
    plain, scaled = influence(left, right, kind="covariance"), influence(left, right, beta=0.25)
    np.testing.assert_allclose(scaled.value, -0.25 * plain.value)
    np.testing.assert_allclose(scaled.stderr, 0.25 * plain.stderr)
    assert scaled.kind == "influence" and scaled.beta == 0.25
    low, high = scaled.interval(0.9)
    np.testing.assert_allclose(high - low, 2 * 1.6939 * scaled.stderr, rtol=1e-3)  # t, 32 degrees of freedom
    assert scaled.degrees_of_freedom == 32


def test_the_part_between_chains_is_reported_apart() -> None:
    left, right = _losses()
    moved = influence(left + np.array([0, 5, 9.0])[:, None, None], right, kind="covariance")
    as_it_was = influence(left, right, kind="covariance")
    np.testing.assert_allclose(moved.value, as_it_was.value, atol=1e-12)
    means = [side.mean(axis=1) for side in (left + np.array([0, 5, 9.0])[:, None, None], right)]
    expected = np.cov(means[0].T, means[1].T)[:20, 20:]
    np.testing.assert_allclose(moved.between(), expected)
    np.testing.assert_allclose(moved.between(slice(2, 5), slice(1, 3)), expected[2:5, 1:3])
    assert 0.2 < as_it_was.between_share < moved.between_share < 1
    assert np.isnan(influence(left[:1], kind="covariance").between()).all()


@pytest.mark.parametrize("kind", ["covariance", "correlation"])
def test_symmetric_in_small_pieces(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels that don't fit into memory, blocks and tiles that don't divide them: the same matrix, and symmetric."""
    left, right = _losses()
    whole = influence(left, left.copy(), kind=kind)
    pair = influence(left, right, kind=kind)
    monkeypatch.setattr(module, "_SIDE", 4)
    monkeypatch.setattr(module, "_TILE", 3)
    for memory in (1, 60_000, 1 << 30):
        half = influence(left, kind=kind, memory=memory, block_length=whole.block_length)
        for name in ("value", "stderr"):
            found = getattr(half, name)
            np.testing.assert_array_equal(found, found.T)
            np.testing.assert_allclose(found, getattr(whole, name), atol=1e-12)
        other = influence(left, right, kind=kind, memory=memory, block_length=pair.block_length)
        np.testing.assert_allclose(other.value, pair.value, atol=1e-12)
        np.testing.assert_allclose(other.stderr, pair.stderr, atol=1e-12)
        np.testing.assert_allclose(other.between(), pair.between())
        assert other.between_share == pytest.approx(pair.between_share)


def test_a_loss_kernel_has_ones_on_its_diagonal() -> None:
    kernel = loss_kernel(_losses()[0])
    np.testing.assert_allclose(np.diag(kernel.value), 1)
    assert not np.diag(kernel.stderr).any() and kernel.stderr.any() and kernel.kind == "correlation"


def test_an_item_that_never_moves() -> None:
    """Has covariance zero and no correlation; the others are what they would be without it."""
    left, right = _losses()
    left[:, :, 3] = 0.7
    others = np.arange(20) != 3
    with np.errstate(all="raise"):
        covariance, kernel = influence(left, right, kind="covariance"), influence(left, right, kind="correlation")
    assert not covariance.value[3].any() and not covariance.stderr[3].any()
    assert np.isnan(kernel.value[3]).all() and np.isnan(kernel.stderr[3]).all()
    expected = influence(left[:, :, others], right, kind="correlation", block_length=kernel.block_length)
    np.testing.assert_allclose(kernel.value[others], expected.value)
    assert not covariance.significant()[3].any() and not kernel.significant()[3].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_precision(dtype: Any) -> None:
    """Small fluctuations of large losses: as precise as the losses are, and in their precision, at least single."""
    left, right = (np.asarray(1 + 0.01 * side, dtype) for side in _losses())
    exact = influence(left.astype(np.float64), right.astype(np.float64), kind="correlation")
    found = influence(left, right, kind="correlation")
    assert found.value.dtype == found.stderr.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(found.value, exact.value, atol=2e-6)
    np.testing.assert_allclose(found.stderr, exact.stderr, rtol=1e-4)


# ---- how it reads and writes ---------------------------------------------------------------------------------


class _Reader:
    """Slices along the last axis, and nothing else; it notes how much of it was read at once, and how often."""

    def __init__(self, values: Array) -> None:
        self._values, self.shape = values, values.shape
        self.widest, self.read = 0, 0

    def __getitem__(self, key: Any) -> Any:
        chains, draws, items = key
        assert chains == draws == slice(None) and isinstance(items, slice)
        found = self._values[key]
        self.widest, self.read = max(self.widest, found.shape[2]), self.read + found.shape[2]
        return found


def test_readers_are_read_in_panels() -> None:
    """Once, if they fit into memory; a few items at a time, if not."""
    left, right = _losses(2, 50, 200, 300)
    expected = influence(left, right, kind="covariance")
    readers = [_Reader(left), _Reader(right)]
    np.testing.assert_array_equal(influence(*readers, kind="covariance").value, expected.value)
    assert readers[0].read == 200 + 1 and readers[1].read == 300 + 1  # one to see of what type they are
    readers = [_Reader(left), _Reader(right)]
    small = influence(*readers, kind="covariance", memory=4 * 2 * 50 * 8 * 70, block_length=expected.block_length)
    np.testing.assert_allclose(small.value, expected.value, atol=1e-12)
    assert max(reader.widest for reader in readers) <= 70


def _as_array(values: Array, folder: Path) -> Draws:
    return values


def _as_memmap(values: Array, folder: Path) -> Draws:
    np.save(folder / "losses.npy", values)
    found: Draws = np.load(folder / "losses.npy", mmap_mode="r")
    return found


def _as_xarray(values: Array, folder: Path) -> Draws:
    found: Draws = pytest.importorskip("xarray").DataArray(values, dims=("chain", "draw", "item"))
    return found


def _as_zarr(values: Array, folder: Path) -> Draws:
    zarr = pytest.importorskip("zarr")
    found = zarr.create_array(
        str(folder / "losses.zarr"), shape=values.shape, chunks=(1, 50, 7), dtype="f8", overwrite=True
    )
    found[:] = values
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind_of", [_as_array, _as_memmap, _as_xarray, _as_zarr])
def test_kinds_of_arrays(kind_of: Callable[[Array, Path], Draws], tmp_path: Path) -> None:
    left, right = _losses()
    expected = influence(left, right, kind="covariance")
    found = influence(kind_of(left, tmp_path), right, kind="covariance")
    np.testing.assert_array_equal(found.value, expected.value)
    np.testing.assert_allclose(sample_losses(kind_of(left, tmp_path), 4), sample_losses(left, 4))


@pytest.mark.parametrize("kind_of", [_as_array, _as_memmap, _as_xarray, _as_zarr])
def test_tokens_of_some_chains(kind_of: Callable[[Array, Path], Draws], tmp_path: Path) -> None:
    """Without those that have no loss: whatever is asked for comes as if the whole were in memory."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 30, 60)).reshape(4, 30, 12, 5)
    keep = rng.random((12, 5)) < 0.7
    expected = values.reshape(4, 30, 60)[[0, 2, 3]][:, :, keep.ravel()]
    if kind_of is _as_zarr:
        zarr = pytest.importorskip("zarr")
        array = zarr.create_array(str(tmp_path / "tokens.zarr"), shape=values.shape, chunks=(1, 7, 2, 5), dtype="f8")
        array[:] = values
    elif kind_of is _as_xarray:
        array = pytest.importorskip("xarray").DataArray(values)
    else:
        array = kind_of(values, tmp_path)
    draws = FlatDraws(array, chains=[0, 2, 3], keep=keep)
    assert draws.shape == expected.shape and draws.dtype == np.float64
    for first, stop in ((0, 1), (3, 17), (0, expected.shape[2]), (expected.shape[2] - 1, 10**6), (4, 4)):
        np.testing.assert_array_equal(draws[:, :, first:stop], expected[:, :, first:stop])
    whole = FlatDraws(array)
    np.testing.assert_array_equal(whole[:, :, 7:23], values.reshape(4, 30, 60)[:, :, 7:23])
    np.testing.assert_array_equal(
        influence(draws, FlatDraws(array, chains=[0, 2, 3]), kind="covariance", stderr=False).value,
        influence(expected, values.reshape(4, 30, 60)[[0, 2, 3]], kind="covariance", stderr=False).value,
    )


def test_what_can_not_be_flattened() -> None:
    with pytest.raises(ValueError, match=r"array has shape \(3, 4\); it must be \[chain, draw, …\]"):
        FlatDraws(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"keep has shape \(6,\), but an item has its place in \(2, 3\)"):
        FlatDraws(np.ones((3, 4, 2, 3)), keep=np.ones(6, bool))


def test_written_where_one_says(tmp_path: Path) -> None:
    left, right = _losses()
    value = np.lib.format.open_memmap(tmp_path / "value.npy", mode="w+", dtype=np.float32, shape=(20, 15))
    errors = np.empty((20, 15))
    result = influence(left, right, kind="covariance", out=value, out_stderr=errors)
    expected = influence(left, right, kind="covariance")
    assert result.value is value and result.stderr is errors
    np.testing.assert_allclose(np.load(tmp_path / "value.npy"), expected.value, rtol=1e-6)
    np.testing.assert_array_equal(errors, expected.stderr)
    with pytest.raises(ValueError, match=r"out has shape \(15, 20\), but there are \(20, 15\)"):
        influence(left, right, kind="covariance", out=np.empty((15, 20)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_cover_the_matrix_once(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIDE", 6)
    left, right = _losses()
    given = (left,) if symmetric else (left, right)
    expected = influence(*given, kind="correlation")
    count = np.zeros(expected.value.shape, int)
    for block in influence_blocks(*given, kind="correlation"):
        assert block.stderr is not None and max(block.value.shape) <= 6
        np.testing.assert_array_equal(block.value, expected.value[block.rows, block.columns])
        np.testing.assert_array_equal(block.stderr, expected.stderr[block.rows, block.columns])
        count[block.rows, block.columns] += 1
    assert (count == 1).all()
    assert all(block.stderr is None for block in influence_blocks(left, kind="covariance", stderr=False))


# ---- from tokens to samples ----------------------------------------------------------------------------------


def test_sums_and_means_of_token_influences() -> None:
    """Of the pairs of tokens of two samples, from the losses of the samples; tokens that don't count may be NaN."""
    left, right = _losses(train=24, query=15)
    mask = np.random.default_rng(2).random((6, 4)) < 0.7
    mask[:, 0] = True
    left[:, :, ~mask.reshape(-1)] = np.nan
    tokens = influence(np.nan_to_num(left), right, kind="covariance").value.reshape(6, 4, 3, 5)
    tokens *= mask[:, :, None, None]
    sums = tokens.sum(axis=(1, 3))
    for memory in (1, 1 << 28):
        for how, expected in (("sum", sums), ("mean", sums / (mask.sum(axis=1)[:, None] * 5))):
            train = sample_losses(left, 4, how=how, mask=mask, memory=memory)  # type: ignore[arg-type]
            query = sample_losses(right, 5, how=how, memory=memory)  # type: ignore[arg-type]
            np.testing.assert_allclose(influence(train, query, kind="covariance").value, expected)


def test_means_of_token_correlations() -> None:
    left, right = _losses(train=24, query=15)
    tokens = influence(left, right, kind="correlation").value.reshape(6, 4, 3, 5)
    given = [sample_losses(side, length, standardize=True) for side, length in ((left, 4), (right, 5))]
    np.testing.assert_allclose(influence(given[0], given[1], kind="covariance").value, tokens.mean(axis=(1, 3)))


def test_what_samples_can_not_be_made_of() -> None:
    left, _ = _losses(train=24)
    with pytest.raises(ValueError, match="length=5 does not divide the 24 tokens"):
        sample_losses(left, 5)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 6\), but there are 6 samples of 4 tokens"):
        sample_losses(left, 4, mask=np.ones((4, 6), bool))
    with pytest.raises(ValueError, match="mask leaves sample 2 without a token"):
        sample_losses(left, 4, mask=np.arange(6)[:, None] != np.full(4, 2))
    with pytest.raises(ValueError, match="how='median'"):
        sample_losses(left, 4, how="median")  # type: ignore[arg-type]
    left[1, 7, 9] = np.inf
    with pytest.raises(ValueError, match="tokens is inf at chain 1, draw 7, item 9"):
        sample_losses(left, 4)


# ---- devinterp, where it is installed ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["correlation", "covariance"])
def test_devinterp_has_the_same(kind: Any) -> None:
    """Of tokens, of sequences, and means over tokens; it centres at the mean of all chains."""
    devinterp_2()
    import xarray as xr
    from devinterp.slt.bif import compute_bif

    losses = np.asarray(_losses(3, 40, 35)[0], np.float32)
    variables = {
        "loss_p": (("chain", "draw", "batch_p", "token_pos"), losses.reshape(3, 40, 5, 7)),
        "input_ids_p": (("batch_p", "token"), np.zeros((5, 8), int)),
    }
    tree = xr.DataTree(dataset=xr.Dataset(variables))

    def theirs(**options: Any) -> Array:
        found = compute_bif(tree, compute_covariance=kind == "covariance", **options)["influences"].values
        return np.asarray(found, np.float64)

    tokens = influence(losses, kind=kind, centred="pooled").value.reshape(5, 7, 5, 7).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(tokens, theirs(), atol=1e-5)
    np.testing.assert_allclose(tokens.mean(axis=(2, 3)), theirs(average_tokenwise_bif=True), atol=1e-5)
    sequences = influence(sample_losses(losses, 7), kind=kind, centred="pooled").value
    np.testing.assert_allclose(sequences, theirs(correlation_method="sequence"), atol=1e-5)


# ---- what is refused, and what is not known ------------------------------------------------------------------


def test_losses_that_are_not_finite() -> None:
    """Where they are; also where they are read late."""
    left, right = _losses()
    right[2, 5, 11] = np.nan
    with pytest.raises(ValueError, match=r"query is nan at chain 2, draw 5, item 11.*Leave out chains that diverged"):
        influence(left, right, kind="covariance")
    with pytest.raises(ValueError, match="train is nan at chain 2, draw 5, item 11"):
        influence(right, kind="covariance", memory=1)


def test_arguments() -> None:
    left, right = _losses()
    with pytest.raises(ValueError, match=r"train has shape \(3, 103\); it must be \[chain, draw, item\]"):
        influence(left[:, :, 0], kind="covariance")
    with pytest.raises(ValueError, match=r"query has \(3, 50\) chains and draws, but train has \(3, 103\)"):
        influence(left, right[:, :50], kind="covariance")
    with pytest.raises(ValueError, match="beta=None must be nβ/n"):
        influence(left, right)
    with pytest.raises(ValueError, match="kind='cov' must be one of 'influence'"):
        influence(left, right, kind="cov")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="centred='all' must be"):
        influence(left, right, kind="covariance", centred="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_length=104 must be from 1 to the 103 draws"):
        influence(left, right, kind="covariance", block_length=104)
    with pytest.raises(ValueError, match="train has 1 draw per chain"):
        influence(left[:, :1], kind="covariance")


def test_too_few_blocks_have_no_error() -> None:
    """A standard error of fewer than eight is not known, and nothing is then significant; the values are as ever."""
    left, right = _losses()
    result = influence(left, right, kind="covariance", block_length=50)
    assert result.num_blocks == 6 and np.isnan(result.stderr).all() and not result.significant().any()
    np.testing.assert_allclose(result.value, influence(left, right, kind="covariance").value)
    without = influence(left, right, kind="covariance", stderr=False)
    assert without.stderr is None and without.num_blocks == without.degrees_of_freedom == 0
    np.testing.assert_allclose(without.value, result.value)
    with pytest.raises(ValueError, match="stderr=False was asked for"):
        without.interval()


def test_effective_sample_size_and_r_hat() -> None:
    """Of products, as the general functions have them; of chains that disagree R̂ says so."""
    left, right = _losses(4, 400, 1, 1)
    result = influence(left, right, kind="covariance")
    product = ((left - left.mean(axis=1, keepdims=True)) * (right - right.mean(axis=1, keepdims=True)))[:, :, 0]
    assert result.ess == (ess_mean(product),) * 2
    assert result.r_hat.worst == pytest.approx(r_hat(product), abs=0.02)
    left[3] *= 5
    right[3] *= 5
    assert influence(left, right, kind="covariance").r_hat.worst > 1.03 > 1.01 > result.r_hat.worst


# ---- a Gaussian posterior ------------------------------------------------------------------------------------


class _Regression(NamedTuple):
    """Exact draws of linear regression's posterior as losses, and what they should give."""

    train: Any
    query: Any
    covariance: Array
    correlation: Array


def _regression(seed: int, draws: int, rho: float = 0.0, *, items: int = 60, parameters: int = 10) -> _Regression:
    """ℓ_i = ½(y_i − x_i·w)² with w normal of covariance Σ = (nβH + γ)⁻¹ about w*, as four AR(1) chains of `rho`.

    With g_i and H_i the gradient and Hessian of ℓ_i at w*: Cov(ℓ_i, ℓ_j) = g_i·Σg_j + ½tr(H_iΣH_jΣ).
    """
    n, nbeta, gamma = 1000, 150.0, 5.0
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, parameters))
    y = x @ rng.standard_normal(parameters) + 0.7 * rng.standard_normal(n)
    hessian = x.T @ x / n
    best = np.linalg.solve(hessian, x.T @ y / n)
    sigma = np.linalg.inv(nbeta * hessian + gamma * np.eye(parameters))
    x, y = x[: 2 * items], y[: 2 * items]
    gradients = x * (x @ best - y)[:, None]
    exact = gradients @ sigma @ gradients.T + 0.5 * (x @ sigma @ x.T) ** 2
    noise = rng.standard_normal((4, draws, parameters))
    for t in range(1, draws if rho else 0):
        noise[:, t] = rho * noise[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    w = best + noise @ np.linalg.cholesky(sigma).T
    losses = (0.5 * (w @ x.T - y) ** 2).astype(np.float32)
    scale = np.sqrt(np.diag(exact))
    chosen = (slice(0, items), slice(items, None))
    return _Regression(
        losses[:, :, :items], losses[:, :, items:], exact[chosen], (exact / np.outer(scale, scale))[chosen]
    )


def _share_inside(result: Influence, exact: Array) -> float:
    low, high = result.interval()
    return float(((low <= exact) & (exact <= high)).mean())


def test_closed_form_of_a_gaussian_posterior() -> None:
    """4 × 5,000 independent draws: 3 % in Frobenius norm for each of four data sets; 95 % intervals hold 93 to 97 %.

    Entries share ten parameters, so that the share inside varies by 1 % from one data set to the next.
    """
    inside = []
    for seed in range(4):
        case = _regression(seed, 5000)
        result = influence(case.train, case.query, beta=0.15)
        exact = -0.15 * case.covariance
        assert np.linalg.norm(result.value - exact) < 0.03 * np.linalg.norm(exact)
        kernel = influence(case.train, case.query, kind="correlation")
        inside.append([_share_inside(result, exact), _share_inside(kernel, case.correlation)])
        assert result.r_hat.worst < 1.01 and result.ess.worst > 15000 and result.between_share < 1e-3
        assert result.num_blocks == 32 and result.autocorrelation_time < 1.3
    assert ((np.mean(inside, axis=0) > 0.93) & (np.mean(inside, axis=0) < 0.97)).all(), inside


@pytest.mark.parametrize(("draws", "rho", "least"), [(2000, 0.9, 0.93), (1000, 0.95, 0.91)])
def test_errors_of_autocorrelated_draws(draws: int, rho: float, least: float) -> None:
    """AR(1) chains of 105 and 26 autocorrelation times. Errors for independent draws would hold 45 and 35 %."""
    inside = []
    for seed in range(6):
        case = _regression(seed, draws, rho, items=40)
        result = influence(case.train, case.query, kind="covariance")
        inside.append(_share_inside(result, case.covariance))
        time = (1 + rho) / (1 - rho)
        assert 0.75 * time < result.autocorrelation_time < 1.8 * time
        assert result.block_length >= 2 * result.autocorrelation_time and result.num_blocks >= 8
    assert least < np.mean(inside) < 0.97, inside


def test_what_is_significant() -> None:
    """Of two items with nothing in common, few; of an item with its neighbours in one direction, most."""
    rng = np.random.default_rng(0)
    direction, noise = rng.standard_normal((4, 1000, 1)), rng.standard_normal((4, 1000, 100))
    noise[:, :, :30] += direction
    found = loss_kernel(noise).significant()
    assert found[:30, :30].all() and found[30:, :30].mean() < 0.03
    assert found[30:, 30:].sum() < 70 + 0.03 * 70 * 69 and np.diag(found).all()  # an item with itself for certain
