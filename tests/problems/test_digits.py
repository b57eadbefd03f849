"""Images of digits."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llc_fast.problems.digits import NUM_PICTURES, load_digits


def test_digits_are_split_and_standardized() -> None:
    digits = load_digits(num_train=1000, seed=3)
    (x, y), (other, labels) = digits
    assert x.shape == (1000, 1, 8, 8) and other.shape == (NUM_PICTURES - 1000, 1, 8, 8)
    assert x.mean().abs() < 1e-5 and x.std() == pytest.approx(1, abs=1e-5)
    assert torch.equal(torch.bincount(torch.cat([y, labels])) > 170, torch.ones(10, dtype=torch.bool))
    # The same images, whatever the split: known by their pixels, which are integers from 0 to 16.
    again = load_digits(num_train=1000, seed=4)
    assert not torch.equal(again.train[1], y)
    assert torch.equal(load_digits(num_train=1000, seed=3).train[0], x)
    levels = torch.cat([x, other]).unique()
    assert len(levels) == 17 and torch.allclose(levels.diff(), levels.diff().mean(), atol=1e-4)


def test_digits_can_be_enlarged() -> None:
    small, large = load_digits().train[0], load_digits(size=16).train[0]
    # Bilinear interpolation by 2 has weights 9, 3, 3 and 1 of 16: averages over 2 × 2 stay close to the pixels.
    correlation = np.corrcoef(F.avg_pool2d(large, 2).flatten(), small.flatten())[0, 1]
    assert large.shape[-2:] == (16, 16) and correlation > 0.95


def test_wrong_arguments_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_train in (0, NUM_PICTURES):
        with pytest.raises(ValueError, match=f"num_train must be between 1 and 1796, got {num_train}"):
            load_digits(num_train=num_train)
    with pytest.raises(ValueError, match="size must be at least 8"):
        load_digits(size=4)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "llc_fast\[reproduce\]"'):
        load_digits()
