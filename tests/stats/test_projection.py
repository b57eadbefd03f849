"""Count sketches and principal components of draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llc_fast.stats import projection
from llc_fast.stats.projection import CountSketch, pca


def test_inner_products_are_unbiased() -> None:
    """Over 2,000 seeds: their mean within four errors, their variance within 15 %, or about five errors."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(300)
    y = 0.3 * x + rng.standard_normal(300)
    products, squares = [], []
    for seed in range(2000):
        sketch = CountSketch(32, seed)
        products.append(sketch(x) @ sketch(y))
        squares.append(sketch(x) @ sketch(x))
    for found, left, right in ((products, x, y), (squares, x, x)):
        exact = left @ right
        variance = ((left @ left) * (right @ right) + exact**2 - 2 * (left**2 @ right**2)) / 32
        assert abs(np.mean(found) - exact) < 4 * np.sqrt(variance / 2000)
        assert np.var(found) == pytest.approx(variance, rel=0.15)


def test_a_sketch_is_a_linear_map_with_one_entry_a_column() -> None:
    """Of size 1 in absolute value; each place and sign is used about equally often."""
    sketch = CountSketch(8, 5)
    columns = np.array([sketch(row) for row in np.eye(4000)]).T
    assert set(np.unique(columns)) == {-1.0, 0.0, 1.0} and (np.abs(columns).sum(axis=0) == 1).all()
    assert np.abs(columns).sum(axis=1) == pytest.approx(500, abs=100) and abs(columns.sum()) < 250
    x = np.random.default_rng(0).standard_normal(4000)
    np.testing.assert_allclose(sketch(x), columns @ x)
    assert not np.array_equal(CountSketch(8, 6)(x), sketch(x))


def test_several_tensors_are_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are cut up, whatever pieces are read, and less w*."""
    rng = np.random.default_rng(0)
    w, at = rng.standard_normal(120), rng.standard_normal(120)

    def named(values: Any) -> dict[str, torch.Tensor]:
        tensor = torch.tensor(values)
        return {"a": tensor[:24].reshape(4, 6), "b": tensor[24:25].reshape(()), "c": tensor[25:].reshape(5, 19)}

    sketch = CountSketch(16, 1)
    expected = sketch(w - at)
    np.testing.assert_allclose(sketch(named(w), named(at)), expected)
    np.testing.assert_allclose(sketch(torch.tensor(w), at), expected)
    monkeypatch.setattr(projection, "_CHUNK", 7)
    np.testing.assert_allclose(sketch(named(w), named(at)), expected)
    half = {name: value.bfloat16().requires_grad_() for name, value in named(w).items()}
    rounded = torch.tensor(w).bfloat16().double().numpy()
    np.testing.assert_allclose(sketch(half), sketch(rounded))
    transposed = torch.tensor(w).reshape(10, 12).T
    np.testing.assert_allclose(sketch(transposed), sketch(np.ascontiguousarray(w.reshape(10, 12).T)))


def test_what_can_not_be_sketched() -> None:
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        CountSketch(0)
    sketch = CountSketch(4)
    with pytest.raises(ValueError, match="reference has nothing for 'b'"):
        sketch({"a": np.ones(2), "b": np.ones(3)}, {"a": np.ones(2)})
    with pytest.raises(ValueError, match=r"reference has shape \(2,\), not \(3,\), for 'a'"):
        sketch({"a": np.ones(3)}, {"a": np.ones(2)})


@pytest.mark.parametrize("dimension", [6, 300])
def test_principal_components(dimension: int) -> None:
    """Those of NumPy's SVD, with more draws than dimensions or fewer; variances and coordinates belong to them."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((3, 40, 5)) @ rng.standard_normal((5, dimension)) + 7
    draws += 0.1 * rng.standard_normal(draws.shape)
    found = pca(draws, 4)
    flat = draws.reshape(-1, dimension)
    _, singular, directions = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.components @ directions[:4].T), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(found.variance, singular[:4] ** 2 / 119)
    assert found.total_variance == pytest.approx((singular**2).sum() / 119)
    np.testing.assert_allclose(found.share, singular[:4] ** 2 / (singular**2).sum())
    assert found.coordinates.shape == (3, 40, 4)
    np.testing.assert_allclose(found.coordinates, (draws - found.mean) @ found.components.T)
    assert (found.components.max(axis=1) == np.abs(found.components).max(axis=1)).all()


def test_sketches_keep_the_geometry() -> None:
    """Of chains that go to two places in 20,000 dimensions, the first component's share and coordinates."""
    rng = np.random.default_rng(0)
    place = rng.standard_normal(20000)
    draws = np.array([-1, -1, 1, 1])[:, None, None] * place + 0.3 * rng.standard_normal((4, 10, 20000))
    sketch = CountSketch(512)
    exact, found = pca(draws, 2), pca(np.array([[sketch(w) for w in chain] for chain in draws]), 2)
    assert found.share[0] == pytest.approx(exact.share[0], abs=0.02)
    coordinates = [each.coordinates[:, :, 0] * np.sign(each.coordinates[0, 0, 0]) for each in (exact, found)]
    np.testing.assert_allclose(coordinates[1], coordinates[0], rtol=0.15)


def test_few_draws_and_draws_that_do_not_move() -> None:
    assert pca(np.random.default_rng(0).standard_normal((1, 3, 50))).components.shape == (2, 50)
    still = pca(np.ones((2, 3, 4)))
    assert not still.variance.any() and not still.coordinates.any() and np.isnan(still.share).all()


def test_draws_that_have_no_components() -> None:
    with pytest.raises(ValueError, match=r"draws has shape \(3, 4\)"):
        pca(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"draws has shape \(1, 1, 4\)"):
        pca(np.ones((1, 1, 4)))
    with pytest.raises(ValueError, match="components=0 must be at least 1"):
        pca(np.ones((3, 4, 5)), 0)
    broken = np.ones((3, 4, 5))
    broken[2, 1, 0] = np.nan
    with pytest.raises(ValueError, match="draws is not finite at chain 2, draw 1"):
        pca(broken)
