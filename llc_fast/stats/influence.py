"""How losses move together over draws: Bayesian influence functions and loss kernels, with standard errors.

Give each training loss ℓ_i a weight 1 + ε_i in the posterior. Then d⟨φ_j⟩/dε_i = −β·Cov(ℓ_i, φ_j) at ε = 0, with
β = nβ/n. So an influence is a covariance over draws. Everything here is about covariances of columns of arrays
``[chain, draw, item]``, of which slices along the last axis are read as they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.convergence import autocorrelation_time, ess_mean, split_r_hat
from llc_fast.stats.significance import benjamini_hochberg, p_values, t_quantile

Kind = Literal["influence", "correlation", "covariance"]
KINDS: tuple[Kind, ...] = ("influence", "correlation", "covariance")
Floats = NDArray[np.floating[Any]]

BLOCK_TIMES = 2.0
"""Autocorrelation times that a block has at least."""
MAX_BLOCKS = 32
"""Blocks of all chains together that are aimed at: with longer blocks, neighbours depend less on each other."""
MIN_BLOCKS = 8
"""With fewer blocks a standard error is mostly noise, and is NaN."""
_LOOKED_AT = 64
"""Items of each side whose autocorrelation time is taken, and roots of the number of entries that are looked at."""
_ENTRIES = 12
_SIDE, _TILE = 1024, 256
"""Items of a block that is yielded; of a tile whose products and squares stay in the processor's cache."""


class Draws(Protocol):
    """Losses ``[chain, draw, item]`` that need not be in memory: NumPy, memmap, zarr, an xarray variable.

    ``draws[:, :, a:b]`` is all that is read, as something that ``numpy.asarray`` takes.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class FlatDraws:
    """An array ``[chain, draw, …]`` of any number of axes as :class:`Draws`, its last axes as one; read in slices.

    Args:
        array: NumPy, memmap, zarr, an xarray variable; slices along its first three axes are all that is read.
        chains: which chains, by number; None: all.
        keep: which items, a mask of the shape of the axes after the second (tokens without a loss may be left out);
            None: all.

    Raises:
        ValueError: fewer than three axes, or `keep` of another shape.
    """

    def __init__(
        self, array: Any, *, chains: Sequence[int] | None = None, keep: NDArray[np.bool_] | None = None
    ) -> None:
        size = tuple(int(n) for n in array.shape)
        if len(size) < 3:
            raise ValueError(f"array has shape {size}; it must be [chain, draw, …], with three axes or more.")
        self._array, self._inner = array, math.prod(size[3:])
        if hasattr(array, "dtype"):
            self.dtype = array.dtype
        self._chains = None if chains is None else np.asarray(chains, int)
        self._places: NDArray[np.intp] | None = None
        count = size[2] * self._inner
        if keep is not None:
            if np.shape(keep) != size[2:]:
                raise ValueError(f"keep has shape {np.shape(keep)}, but an item has its place in {size[2:]}.")
            self._places = np.flatnonzero(keep)
            count = len(self._places)
        self.shape = (size[0] if chains is None else len(chains), size[1], count)

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        of_chains, of_draws, items = key
        first, stop, _ = items.indices(self.shape[2])
        places = np.arange(first, stop) if self._places is None else self._places[first:stop]
        low, high = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        outer = slice(low // self._inner, -(-high // self._inner))
        if self._chains is None:
            read = np.asarray(self._array[of_chains, of_draws, outer])
        else:
            chosen = [int(k) for k in self._chains[of_chains]]
            parts = [np.asarray(self._array[k : k + 1, of_draws, outer]) for k in chosen]
            read = np.concatenate(parts) if parts else np.empty((0, self.shape[1], 0))
        flat = read.reshape(*read.shape[:2], -1)
        places = places - outer.start * self._inner
        if self._places is None or high - low == len(places):
            return flat[:, :, slice(places[0], places[-1] + 1) if len(places) else slice(0)]
        return flat[:, :, places]


class Spread(NamedTuple):
    """Of a statistic of several entries: the median and the worst (smallest ESS, largest R̂)."""

    median: float
    worst: float


class Block(NamedTuple):
    """A part of the matrix: ``value = matrix[rows, columns]``; `stderr` is None if none was asked for."""

    rows: slice
    columns: slice
    value: Floats
    stderr: Floats | None


@dataclass(frozen=True)
class Influence:
    """A matrix of train × query items with its standard errors.

    Attributes:
        kind: "influence" −β·Cov, "correlation", or "covariance".
        beta: nβ/n; None where it was not needed.
        value: ``[train, query]``; what was given as `out`, if something was.
        stderr: ``[train, query]``; None if not asked for. NaN with fewer than 8 blocks.
        num_blocks: blocks of all chains that the jackknife left out in turn; 0 without standard errors.
        block_length: draws in each.
        autocorrelation_time: the largest of the losses looked at, in draws.
        ess, r_hat: of the products (ℓ_i − mean)(φ_j − mean) of up to 144 entries, spread over the matrix: their
            effective sample size over all chains, and their split R̂ (of moments, without ranks).
        train_means, query_means: ``[chain, item]``.
        between_share: mean over items of the variance of chain means, as a share of itself plus the variance within
            chains. τ/(τ + draws) is expected of chains that agree, with τ the autocorrelation time.
    """

    kind: Kind
    beta: float | None
    value: Any = field(repr=False)
    stderr: Any = field(repr=False)
    num_blocks: int
    block_length: int
    autocorrelation_time: float
    ess: Spread
    r_hat: Spread
    train_means: NDArray[np.float64] = field(repr=False)
    query_means: NDArray[np.float64] = field(repr=False)
    between_share: float

    @property
    def degrees_of_freedom(self) -> int:
        """Of the standard errors: blocks − 1."""
        return max(self.num_blocks - 1, 0)

    def between(self, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[np.float64]:
        """Covariance of the chains' means ``[train, query]``, over chains − 1: what centring within chains leaves out.

        It is that of the losses for every `kind`. NaN with one chain.
        """
        left, right = self.train_means[:, rows], self.query_means[:, columns]
        if len(left) < 2:
            return np.full((left.shape[1], right.shape[1]), math.nan)
        found: NDArray[np.float64] = (left - left.mean(axis=0)).T @ (right - right.mean(axis=0)) / (len(left) - 1)
        return found

    def interval(self, prob: float = 0.95) -> tuple[Floats, Floats]:
        """Ends of central intervals for each entry, by Student's t with blocks − 1 degrees of freedom."""
        half = t_quantile(prob, self.degrees_of_freedom) * self._errors()
        return self.value[:] - half, self.value[:] + half

    def significant(self, q: float = 0.05) -> NDArray[np.bool_]:
        """Entries that differ from 0, with at most a share `q` of false ones among them (Benjamini & Hochberg 1995).

        Those whose error is 0, such as the correlation of an item with itself, are no part of the count: they are
        significant unless they are 0. Where the error is NaN, they are not.
        """
        value, errors = self.value[:], self._errors()
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(errors > 0, value / errors, math.nan)
        certain: NDArray[np.bool_] = (errors == 0) & (value != 0)
        return benjamini_hochberg(p_values(z, self.degrees_of_freedom), q) | certain

    def _errors(self) -> Floats:
        if self.stderr is None:
            raise ValueError("stderr=False was asked for, so there are no standard errors: pass stderr=True.")
        errors: Floats = self.stderr[:]
        return errors


def influence(
    train: Draws,
    query: Draws | None = None,
    *,
    kind: Kind = "influence",
    beta: float | None = None,
    stderr: bool = True,
    block_length: int | None = None,
    centred: Literal["chains", "pooled"] = "chains",
    out: Any = None,
    out_stderr: Any = None,
    memory: int = 1 << 29,
) -> Influence:
    """Influence of each train item on each query item, ``[train, query]``.

    influence    −β·c_ij: the derivative of ⟨φ_j⟩ with respect to the weight 1 + ε_i of ℓ_i in the posterior
    correlation  c_ij/√(c_ii·c_jj)
    covariance   c_ij = Σ_chains Σ_draws (ℓ_i − mean of the chain)(φ_j − mean of the chain) / (chains·(draws − 1))

    c is unbiased for independent draws. With autocorrelation time τ it is too small by about the share (τ − 1)/draws.
    How far chains disagree in their means is no part of it, see :meth:`Influence.between`.

    Standard errors are a jackknife over chains × blocks of draws: each block in turn is left out, its chain's mean is
    taken without it, and var = (g − 1)·mean_k (c without k − their mean)². Blocks are equally long, of at least two
    autocorrelation times of the losses (which bound those of their products) and up to 32 of all chains together; g is
    the number of draws over a block's length. Where a chain has not two such blocks, it is left out as a whole. For
    correlations, what a block changes is taken to first order. One matrix product per block and tile gives c and its
    error together; memory is that of tiles.

    Args:
        train: losses ℓ_i, ``[chain, draw, item]``.
        query: losses or other observables φ_j with the same chains and draws; None: those of `train`, and only half
            of the products are made.
        kind: which of the three.
        beta: nβ/n, which kind="influence" requires.
        stderr: whether standard errors are computed.
        block_length: of the jackknife's blocks, in draws; None: from the autocorrelation time.
        centred: "chains", or "pooled" at the mean of all draws, with draws·chains − 1 below: then the disagreement of
            chains is in it, as in other programs.
        out, out_stderr: where to write, anything with a shape ``[train, query]`` that slices can be assigned to (a
            memmap, a zarr array); None: new arrays.
        memory: bytes that panels of losses may take, about; what exceeds it is read again for each panel of the other
            side.

    Raises:
        ValueError: shapes, `kind`, `beta` or `block_length` that make no sense; a loss that is not finite, with its
            chain and draw.
    """
    work = _Work(train, query, kind, beta, stderr, block_length, centred, memory)
    shape = (work.train.shape[2], work.query.shape[2])
    for name, given in (("out", out), ("out_stderr", out_stderr)):
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, but there are {shape} train and query items.")
    value = np.empty(shape, work.dtype) if out is None else out
    errors = out_stderr
    if stderr and errors is None:
        errors = np.empty(shape, work.dtype)
    for block in work.blocks():
        value[block.rows, block.columns] = block.value
        if block.stderr is not None:
            errors[block.rows, block.columns] = block.stderr
    return work.result(value, errors if stderr else None)


def influence_blocks(
    train: Draws,
    query: Draws | None = None,
    *,
    kind: Kind = "influence",
    beta: float | None = None,
    stderr: bool = True,
    block_length: int | None = None,
    centred: Literal["chains", "pooled"] = "chains",
    memory: int = 1 << 29,
) -> Iterator[Block]:
    """The matrix of :func:`influence` in parts of at most 1024 × 1024, so that it never needs to be there as a whole.

    Their arrays belong to whoever gets them. With query=None both halves come, one as the other's transpose.
    """
    return _Work(train, query, kind, beta, stderr, block_length, centred, memory).blocks()


def loss_kernel(losses: Draws, **options: Any) -> Influence:
    """The correlation of losses over draws, ``[item, item]``: symmetric, with ones on its diagonal.

    `options` are those of :func:`influence`, other than `query`, `kind` and `beta`.
    """
    return influence(losses, kind="correlation", **options)


def sample_losses(
    tokens: Draws,
    length: int,
    *,
    how: Literal["mean", "sum"] = "mean",
    mask: NDArray[np.bool_] | None = None,
    standardize: bool = False,
    memory: int = 1 << 28,
) -> Floats:
    """The losses of samples ``[chain, draw, sample]`` from those of their tokens ``[chain, draw, sample·length]``.

    Sums and means commute with covariances: ``influence`` of these are the sums or means of the token's influences over
    the pairs of tokens of two samples, without those ever being computed.

    Args:
        tokens: token losses, the tokens of a sample side by side.
        length: tokens of each sample.
        how: mean or sum over the tokens of a sample.
        mask: tokens that count, ``[sample, length]``; the others may be NaN. None: all.
        standardize: divide each token's loss by its standard deviation within chains first. The covariance of these
            means is the mean of the tokens' correlations. A token whose loss never moves adds nothing.
        memory: bytes of tokens that are read at a time.

    Raises:
        ValueError: `length` does not divide the number of tokens; a sample has no token that counts; a loss that counts
            is not finite.
    """
    chains, draws, items = shape_of("tokens", tokens)
    if length < 1 or items % length:
        raise ValueError(f"length={length} does not divide the {items} tokens; pass the number of tokens per sample.")
    samples = items // length
    counts = np.ones((samples, length), bool) if mask is None else np.asarray(mask, bool)
    if counts.shape != (samples, length):
        raise ValueError(f"mask has shape {counts.shape}, but there are {samples} samples of {length} tokens.")
    if not counts.any(axis=1).all():
        raise ValueError(f"mask leaves sample {int(counts.any(axis=1).argmin())} without a token.")
    if how not in ("mean", "sum"):
        raise ValueError(f"how={how!r} must be 'mean' or 'sum'.")
    step = max(1, memory // max(1, chains * draws * length * 8))
    found: Floats | None = None
    for first in range(0, samples, step):
        chosen = slice(first, min(first + step, samples))
        part = np.asarray(tokens[:, :, chosen.start * length : chosen.stop * length])
        kept = counts[chosen].reshape(-1)
        part = np.where(kept, part, np.zeros((), part.dtype)) if mask is not None else part
        check_finite("tokens", part, chosen.start * length)
        if standardize:
            spread = np.sqrt(part.var(axis=1, ddof=1, dtype=np.float64).mean(axis=0))
            part = (part - part.mean(axis=1, keepdims=True, dtype=np.float64)) / np.where(spread > 0, spread, math.inf)
        sums = part.reshape(chains, draws, -1, length).sum(axis=3, dtype=np.float64)
        if how == "mean":
            sums /= counts[chosen].sum(axis=1)
        if found is None:
            found = np.empty((chains, draws, samples), np.float64 if part.dtype == np.float64 else np.float32)
        found[:, :, chosen] = sums
    assert found is not None
    return found


def shape_of(name: str, draws: Draws) -> tuple[int, int, int]:
    shape = tuple(int(size) for size in draws.shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name} has shape {shape}; it must be [chain, draw, item], with at least one of each.")
    return shape


def _dtype_of(draws: Draws) -> np.dtype[Any]:
    """Float64 if its numbers need it: integers are losses too."""
    known = getattr(draws, "dtype", None)
    found = np.dtype(known if known is not None else np.asarray(draws[:, :, :1]).dtype)
    return found if found.kind == "f" else np.dtype(np.float64)


def check_finite(name: str, part: NDArray[Any], first: int) -> None:
    if np.isfinite(part.sum(dtype=np.float64)) or np.isfinite(part).all():
        return
    chain, draw, item = (int(k) for k in np.argwhere(~np.isfinite(part))[0])
    raise ValueError(
        f"{name} is {part[chain, draw, item]} at chain {chain}, draw {draw}, item {first + item}. "
        "Leave out chains that diverged or are not complete."
    )


@dataclass(frozen=True)
class _Plan:
    """Which draws are in which block.

    Attributes:
        chains, draws: of the losses.
        length, per_chain: of blocks; 0 without standard errors.
        pooled: whether losses are centred at the mean of all chains.
    """

    chains: int
    draws: int
    length: int
    per_chain: int
    pooled: bool

    @property
    def num_blocks(self) -> int:
        return self.chains * self.per_chain

    @property
    def freedom(self) -> int:
        """What sums of products are divided by."""
        return self.chains * self.draws - 1 if self.pooled else self.chains * (self.draws - 1)

    @property
    def others(self) -> int:
        """How many draws of those with one mean are left without a block."""
        return (self.chains * self.draws if self.pooled else self.draws) - self.length

    @property
    def error_scale(self) -> float:
        """What the mean square of the blocks' deviations from each other is multiplied by."""
        left = self.freedom - (self.length if self.others else self.length - 1)
        return (self.chains * self.draws / self.length - 1) / left**2


def plan_blocks(chains: int, draws: int, time: float, length: int | None, pooled: bool) -> _Plan:
    at_least = length or math.ceil(BLOCK_TIMES * max(time, 1.0))
    per_chain = max(1, draws // at_least)
    if length is None:
        per_chain = min(per_chain, max(1, math.ceil(MAX_BLOCKS / chains)))
    return _Plan(chains, draws, (length if length and per_chain > 1 else draws // per_chain), per_chain, pooled)


@dataclass(frozen=True)
class _Panel:
    """Centred losses of some items, for correlations in units of their standard deviations.

    Attributes:
        items: which.
        blocks: X_k of each block, ``[block, length + 1, item]``: its draws, and one row more, their sum over √(draws
            that are left with that mean). X_kᵀY_k is then what leaving block k out takes from the sum of products,
            the mean's change included.
        rest: the draws of no block, ``[draw, item]``.
        squares: half the diagonal of X_kᵀX_k, ``[block, item]``; of correlations only.
    """

    items: slice
    blocks: Floats
    rest: Floats
    squares: Floats


class _Work:
    """One computation: its inputs checked, its blocks of draws chosen, and its parts one after another."""

    def __init__(
        self,
        train: Draws,
        query: Draws | None,
        kind: Kind,
        beta: float | None,
        stderr: bool,
        block_length: int | None,
        centred: str,
        memory: int,
    ) -> None:
        shape = shape_of("train", train)
        if query is not None and shape_of("query", query)[:2] != shape[:2]:
            raise ValueError(
                f"query has {tuple(query.shape[:2])} chains and draws, but train has {shape[:2]}: pass equal ones."
            )
        if shape[1] < 2:
            raise ValueError(f"train has {shape[1]} draw per chain; a covariance needs at least 2.")
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, KINDS))}.")
        if kind == "influence" and (beta is None or not math.isfinite(beta)):
            raise ValueError(f"beta={beta} must be nβ/n, a number, for kind='influence'.")
        if centred not in ("chains", "pooled"):
            raise ValueError(f"centred={centred!r} must be 'chains' or 'pooled'.")
        if block_length is not None and not 1 <= block_length <= shape[1]:
            raise ValueError(f"block_length={block_length} must be from 1 to the {shape[1]} draws of a chain.")
        self.train, self.query, self.symmetric = train, train if query is None else query, query is None
        self.kind, self.beta, self.wants_errors = kind, beta, stderr
        self.chains, self.draws = shape[:2]
        self.dtype = np.result_type(np.float32, *(_dtype_of(side) for side in (self.train, self.query)))
        at_most = max(1, memory // (4 * shape[0] * shape[1] * self.dtype.itemsize))
        counts = [side.shape[2] for side in self._sides()]
        self.widths = [math.ceil(count / math.ceil(count / at_most)) for count in counts]  # equal ones
        self.means = [np.full((shape[0], side.shape[2]), math.nan) for side in (self.train, self.query)]
        self.variances = [np.full(side.shape[2], math.nan) for side in (self.train, self.query)]
        self.raw = [self._read(k, slice(0, width)) for k, width in enumerate(self.widths)]
        looked_at = [_spread_over(part, _LOOKED_AT) for part in self.raw]
        self.time = _longest_time(looked_at)
        self.ess, self.r_hat = _entries(looked_at[0], looked_at[-1])
        plan = plan_blocks(self.chains, self.draws, self.time, block_length, centred == "pooled")
        self.has_errors = stderr and plan.num_blocks >= MIN_BLOCKS
        self.plan = plan if self.has_errors else _Plan(self.chains, self.draws, 0, 0, plan.pooled)
        self.planned = plan

    def _sides(self) -> list[Draws]:
        return [self.train] if self.symmetric else [self.train, self.query]

    def _read(self, side: int, items: slice) -> NDArray[Any]:
        name = ("train", "query")[side]
        part = np.asarray(self._sides()[side][:, :, items])
        check_finite(name, part, items.start)
        return part

    def _panels(self, side: int) -> Iterator[Callable[[], _Panel]]:
        """Each as a call that reads it; those that have been read and fit into memory are kept."""
        count, width = self._sides()[side].shape[2], self.widths[side]
        for first in range(0, count, width):
            items = slice(first, min(first + width, count))
            kept: list[_Panel] = []

            def panel(items: slice = items, kept: list[_Panel] = kept) -> _Panel:
                if kept:
                    return kept[0]
                made = self._panel(side, items)
                if width == count:
                    kept.append(made)
                return made

            yield panel

    def _panel(self, side: int, items: slice) -> _Panel:
        raw = self._read(side, items) if items.start or not self.raw[side].size else self.raw[side]
        self.raw[side] = np.empty(0)  # the first is read already, once
        plan, width = self.plan, items.stop - items.start
        chains, draws, count, length = self.chains, self.draws, plan.per_chain, plan.length
        means = raw.mean(axis=1, dtype=np.float64)
        centres = np.broadcast_to(means.mean(axis=0), means.shape) if plan.pooled else means
        blocks = np.empty((chains, count, length + 1, width), self.dtype)
        skipped = draws - count * length
        rest = np.empty((chains, skipped, width), self.dtype)
        within = np.zeros(width)
        for chain in range(chains):
            np.subtract(raw[chain, :skipped], centres[chain], out=rest[chain], casting="same_kind")
            for k in range(count):
                rows = raw[chain, skipped + k * length : skipped + (k + 1) * length]
                np.subtract(rows, centres[chain], out=blocks[chain, k, :length], casting="same_kind")
                total = blocks[chain, k, :length].sum(axis=0, dtype=np.float64)
                blocks[chain, k, length] = total / math.sqrt(plan.others) if plan.others else 0.0
                within += _squares(blocks[chain, k, :length])
            within += _squares(rest[chain])
        variance = within / plan.freedom
        # The mean of numbers that are all the same may be off by its rounding.
        still = variance <= (1e-14 * np.abs(means).max(axis=0)) ** 2
        variance[still], blocks[..., still], rest[..., still] = 0.0, 0.0, 0.0
        blocks, rest = blocks.reshape(-1, length + 1, width), rest.reshape(-1, width)
        squares = np.empty((0, width), self.dtype)
        if self.kind == "correlation":
            scale = np.where(variance > 0, 1 / np.sqrt(np.maximum(variance, 1e-300)), math.nan).astype(self.dtype)
            blocks *= scale
            rest *= scale
            squares = np.einsum("bdi,bdi->bi", blocks, blocks) / 2
        self.means[side][:, items], self.variances[side][items] = means, variance
        return _Panel(items, blocks, rest, squares)

    def blocks(self) -> Iterator[Block]:
        left_panels = list(self._panels(0))
        right_panels = left_panels if self.symmetric else list(self._panels(1))
        for i, left_of in enumerate(left_panels):
            left = left_of()
            for j in range(i if self.symmetric else 0, len(right_panels)):
                right = left if self.symmetric and i == j else right_panels[j]()
                for rows in _parts(left.items, _SIDE):
                    for columns in _parts(right.items, _SIDE):
                        if self.symmetric and columns.start < rows.start:
                            continue
                        value, errors = self._block(left, right, rows, columns)
                        yield Block(rows, columns, value, errors)
                        if self.symmetric and columns != rows:
                            yield Block(columns, rows, value.T, None if errors is None else errors.T)
                        del value, errors
                del right  # before the next one is read
            del left

    def _block(self, left: _Panel, right: _Panel, rows: slice, columns: slice) -> tuple[Floats, Floats | None]:
        a, b = _within(rows, left.items), _within(columns, right.items)
        value = left.rest[:, a].T @ right.rest[:, b]
        sign = -float(self.beta) if self.kind == "influence" and self.beta is not None else 1.0
        scale = sign / self.plan.freedom
        errors = None
        if self.wants_errors:
            errors = np.full(value.shape, math.nan, self.dtype)
        if self.has_errors:
            assert errors is not None
            self._add_blocks(left, right, a, b, value, errors)
            errors *= self.plan.error_scale / self.plan.num_blocks
            np.sqrt(errors, out=errors)
            errors *= abs(sign)
        value *= scale
        if self.symmetric and self.kind == "correlation" and rows == columns and errors is not None:
            # Of an item with itself it is 1, exactly.
            with_itself = np.arange(len(value))
            errors[with_itself, with_itself] *= 0
        return value, errors

    def _add_blocks(self, left: _Panel, right: _Panel, a: slice, b: slice, value: Floats, errors: Floats) -> None:
        """Add the blocks' products to `value`, and write the sum of squares of what differs in them to `errors`."""
        plan = self.plan
        flat = [part.reshape(-1, part.shape[2]) for part in (left.blocks, right.blocks)]
        ends = [part[:, plan.length] for part in (left.blocks, right.blocks)]
        sums = flat[0][:, a].T @ flat[1][:, b]
        value += sums
        value -= ends[0][:, a].T @ ends[1][:, b]
        is_ratio = self.kind == "correlation"
        target = value / plan.freedom if is_ratio else np.divide(sums, plan.num_blocks, out=sums)
        shape = (min(_TILE, value.shape[0]), min(_TILE, value.shape[1]))
        whole, other = np.empty(shape, self.dtype), np.empty(shape, self.dtype)
        for i in _parts(slice(0, value.shape[0]), _TILE):
            for j in _parts(slice(0, value.shape[1]), _TILE):
                here = (slice(i.stop - i.start), slice(j.stop - j.start))
                product, expected = whole[here], other[here]
                squares = np.zeros(product.shape, self.dtype)
                x, y = slice(a.start + i.start, a.start + i.stop), slice(b.start + j.start, b.start + j.stop)
                aim = np.ascontiguousarray(target[i, j])
                for k in range(plan.num_blocks):
                    np.matmul(left.blocks[k, :, x].T, right.blocks[k, :, y], out=product)
                    if is_ratio:
                        np.add(left.squares[k, x, None], right.squares[k, y], out=expected)
                        expected *= aim
                        product -= expected
                    else:
                        product -= aim
                    np.multiply(product, product, out=product)
                    squares += product
                errors[i, j] = squares

    def result(self, value: Any, errors: Any) -> Influence:
        between = [means.var(axis=0, ddof=1) if self.chains > 1 else np.zeros(means.shape[1]) for means in self.means]
        if self.symmetric:
            self.means[1] = self.means[0]
        parts = [(m, v) for m, v in zip(between, self.variances, strict=True)][: 1 if self.symmetric else 2]
        shares = np.concatenate([m / np.where(m + v > 0, m + v, math.nan) for m, v in parts])
        known = shares[np.isfinite(shares)]
        return Influence(
            kind=self.kind,
            beta=self.beta,
            value=value,
            stderr=errors,
            num_blocks=self.planned.num_blocks if self.wants_errors else 0,
            block_length=self.planned.length if self.wants_errors else 0,
            autocorrelation_time=self.time,
            ess=self.ess,
            r_hat=self.r_hat,
            train_means=self.means[0],
            query_means=self.means[1],
            between_share=float(known.mean()) if len(known) and self.chains > 1 else math.nan,
        )


def _parts(items: slice, size: int) -> list[slice]:
    return [slice(k, min(k + size, items.stop)) for k in range(items.start, items.stop, size)]


def _squares(rows: Floats) -> NDArray[np.float64]:
    """Sums of squares of columns, precise for any number of rows."""
    parts = [np.einsum("di,di->i", rows[k : k + 64], rows[k : k + 64]) for k in range(0, len(rows), 64)]
    return np.sum(parts, axis=0, dtype=np.float64) if parts else np.zeros(rows.shape[1])


def _within(items: slice, panel: slice) -> slice:
    return slice(items.start - panel.start, items.stop - panel.start)


def _spread_over(part: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Up to `count` items, evenly spread."""
    items = part.shape[2]
    return np.asarray(part[:, :, np.linspace(0, items - 1, min(count, items)).round().astype(int)], np.float64)


def _longest_time(parts: list[NDArray[np.float64]]) -> float:
    times = [autocorrelation_time(part[:, :, k]) for part in parts for k in range(part.shape[2])]
    known = [time for time in times if math.isfinite(time)]
    return max(known, default=1.0)


def _entries(train: NDArray[np.float64], query: NDArray[np.float64]) -> tuple[Spread, Spread]:
    """ESS and R̂ of the products of some entries."""
    left, right = (_spread_over(part - part.mean(axis=1, keepdims=True), _ENTRIES) for part in (train, query))
    products = [left[:, :, i] * right[:, :, j] for i in range(left.shape[2]) for j in range(right.shape[2])]
    moving = [p for p in products if np.ptp(p) > 0 and p.shape[1] >= 4]
    if not moving:
        return Spread(math.nan, math.nan), Spread(math.nan, math.nan)
    sizes = [ess_mean(p) for p in moving]
    ratios = [split_r_hat(p) for p in moving]
    return (
        Spread(float(np.median(sizes)), float(np.min(sizes))),
        Spread(float(np.median(ratios)), float(np.max(ratios))),
    )
