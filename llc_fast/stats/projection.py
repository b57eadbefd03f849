"""Where chains went: draws projected onto a few numbers by a count sketch, and their principal components."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 1 << 16
"""Elements at a time: their hashes stay in the processor's cache."""


class CountSketch:
    """A random projection of vectors of any length onto `size` numbers that keeps inner products on average.

    Element i is added to number h(i) with sign s(i), both from a hash of (seed, i), so there is no matrix and no second
    copy of the vector. E⟨sketch x, sketch y⟩ = ⟨x, y⟩, with variance (‖x‖²‖y‖² + ⟨x, y⟩² − 2Σx_i²y_i²)/size over seeds
    (Charikar, Chen & Farach-Colton 2002). Sketches compare if seed, size and the order of elements are the same.

    Raises:
        ValueError: `size` is not from 1 to 2³¹.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if not 1 <= size <= 1 << 31:
            raise ValueError(f"size={size} must be at least 1 and at most 2**31.")
        self.size, self.seed = size, seed
        self._key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))[0]

    def __call__(
        self, values: Mapping[str, Any] | Any, reference: Mapping[str, Any] | Any = None
    ) -> NDArray[np.float64]:
        """The sketch of w − w*, float64 ``[size]``.

        Args:
            values: w: an array or tensor, on any device and of any floating dtype, or several by name, one after the
                other in this order.
            reference: w*, likewise; None: zero.

        Raises:
            ValueError: `reference` lacks one of the names, or has another shape.
        """
        named = values if isinstance(values, Mapping) else {"": values}
        others = reference if isinstance(reference, Mapping) or reference is None else {"": reference}
        found, first = np.zeros(self.size), 0
        for name, value in named.items():
            if others is not None and (name not in others or tuple(others[name].shape) != tuple(value.shape)):
                what = f"shape {tuple(others[name].shape)}, not {tuple(value.shape)}," if name in others else "nothing"
                raise ValueError(f"reference has {what} for {name!r}: pass w* under the same names and shapes as w.")
            flat, other = value.reshape(-1), None if others is None else others[name].reshape(-1)
            for start in range(0, len(flat), _CHUNK):
                part = _on_host(flat[start : start + _CHUNK])
                if other is not None:
                    part = part - _on_host(other[start : start + _CHUNK])
                found += self._of(part, first + start)
            first += len(flat)
        return found

    def _of(self, part: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        bits = _mix(np.arange(first, first + len(part), dtype=np.uint64) ^ self._key)
        # The upper half of the bits for the place, the last one for the sign.
        places = ((bits >> np.uint64(32)) * np.uint64(self.size)) >> np.uint64(32)
        signed = np.where(bits & np.uint64(1), part, -part)
        found: NDArray[np.float64] = np.bincount(places.astype(np.int64), weights=signed, minlength=self.size)  # type: ignore[assignment]
        return found


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea & Flood 2014): each bit of a number decides half of all others."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _on_host(part: Any) -> NDArray[np.float64]:
    """A few elements as float64; a tensor of whatever library, which may be on a GPU and of a dtype NumPy lacks."""
    if hasattr(part, "detach"):
        part = part.detach().double().cpu().numpy()
    return np.asarray(part, np.float64)


@dataclass(frozen=True)
class Projection:
    """Principal components of draws.

    Attributes:
        coordinates: of each draw, ``[chain, draw, component]``, about `mean`.
        components: directions of length 1, ``[component, dimension]``; the largest element of each is positive.
        variance: of the draws along each, over draws − 1.
        total_variance: along all directions.
        mean: of all draws.
    """

    coordinates: NDArray[np.float64]
    components: NDArray[np.float64]
    variance: NDArray[np.float64]
    total_variance: float
    mean: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """Of the total variance, that along each component; NaN where nothing moves."""
        return self.variance / (self.total_variance if self.total_variance > 0 else math.nan)


def pca(draws: ArrayLike, components: int = 10) -> Projection:
    """Principal components of draws ``[chain, draw, dimension]``, of all chains about their common mean.

    The dimensions are those of a sketch, or parameters. Chains that went to different places have other coordinates.
    There are as many components as asked for, or fewer if draws or dimensions are fewer.

    Raises:
        ValueError: `draws` has another shape, fewer than two draws, or is not finite; `components` is below 1.
    """
    given = np.asarray(draws, np.float64)
    if given.ndim != 3 or given.shape[0] * given.shape[1] < 2 or not given.shape[2]:
        raise ValueError(f"draws has shape {given.shape}; it must be [chain, draw, dimension], with two draws or more.")
    if components < 1:
        raise ValueError(f"components={components} must be at least 1.")
    if not np.isfinite(given).all():
        chain, draw, _ = (int(k) for k in np.argwhere(~np.isfinite(given))[0])
        raise ValueError(f"draws is not finite at chain {chain}, draw {draw}. Leave out chains that diverged.")
    flat = given.reshape(-1, given.shape[2])
    mean = flat.mean(axis=0)
    flat = flat - mean
    count = min(components, len(flat) - 1, flat.shape[1])
    tall = len(flat) >= flat.shape[1]
    # The smaller of the two matrices of inner products; its square root is what an SVD would give, at half the digits.
    values, vectors = np.linalg.eigh(flat.T @ flat if tall else flat @ flat.T)
    values, vectors = np.maximum(values[::-1][:count], 0.0), vectors[:, ::-1][:, :count]
    if not tall:
        vectors = flat.T @ vectors
        lengths = np.linalg.norm(vectors, axis=0)
        vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(count)] < 0, -1.0, 1.0)
    freedom = len(flat) - 1
    return Projection(
        coordinates=(flat @ vectors).reshape(*given.shape[:2], count),
        components=vectors.T,
        variance=values / freedom,
        total_variance=float((flat**2).sum()) / freedom,
        mean=mean,
    )
