"""Handwritten digits: 1797 real images of 8 × 8 pixels that come with scikit-learn (Alpaydin & Kaynak 1998, UCI)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llc_fast.support.optional import require

NUM_PICTURES, SIDE, NUM_CLASSES = 1797, 8, 10
NUM_TRAIN = 1437
"""Four fifths of the images."""


class Digits(NamedTuple):
    """Pictures, float32 ``[sample, 1, size, size]``, and what they show, int64 ``[sample]``, in two parts."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(*, num_train: int = NUM_TRAIN, size: int = SIDE, seed: int = 0) -> Digits:
    """The digits, shuffled and split; pixels have mean 0 and variance 1 over the training images.

    Args:
        num_train: images to train with; the others are for tests.
        size: pixels of an edge; above 8 they are interpolated bilinearly.
        seed: of the split.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed (``pip install "llc_fast[reproduce]"``).
        ValueError: `num_train` leaves no image on one of the sides, or `size` is below 8.
    """
    if not 0 < num_train < NUM_PICTURES:
        raise ValueError(f"num_train must be between 1 and {NUM_PICTURES - 1}, got {num_train}")
    if size < SIDE:
        raise ValueError(f"size must be at least {SIDE}, as the images are, got {size}")
    pixels, labels = require("sklearn.datasets", "reproduce").load_digits(return_X_y=True)
    order = torch.randperm(NUM_PICTURES, generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, SIDE, SIDE)[order]
    y = torch.from_numpy(labels.astype(np.int64))[order]
    if size > SIDE:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    x = (x - x[:num_train].mean()) / x[:num_train].std()
    return Digits((x[:num_train], y[:num_train]), (x[num_train:], y[num_train:]))
