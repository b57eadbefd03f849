"""What samples say about each other, with names: the results of :meth:`llc_fast.Samples.influence` and ``pca``.

The numbers are made by :mod:`llc_fast.stats.influence` and :mod:`llc_fast.stats.projection`. Here rows and columns
know which probe, sample and token they are, so that they can be printed, drawn and handed to xarray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.influence import Draws, Influence
from llc_fast.stats.projection import Projection

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

ItemPer = Literal["probe", "sample", "token"]
"""What a row or a column is: the mean loss of a probe, the loss of a sample, or that of a token."""
ITEM_PER: tuple[ItemPer, ...] = ("probe", "sample", "token")
Decode = Callable[[list[int]], str] | Sequence[str]
"""How tokens become text: a function such as a tokenizer's ``decode``, or the text of each token."""
_ROWS = 1 << 22
"""Entries of a matrix that are looked at together."""
_SNIPPET = 24


@dataclass(frozen=True)
class Items:
    """The rows, or the columns, of a matrix.

    Attributes:
        probe: its name.
        per: what each is.
        sample: its place in the probe, ``[item]``; empty of a whole probe.
        token: its place in the sample, ``[item]``: token t is predicted from those before it; None but of tokens.
        input_ids: the probe's tokens, ``[sample, token]``; None: there are none.
    """

    probe: str
    per: ItemPer
    sample: NDArray[np.intp] = field(repr=False)
    token: NDArray[np.intp] | None = field(default=None, repr=False)
    input_ids: NDArray[np.int64] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return 1 if self.per == "probe" else len(self.sample)

    def name(self, item: int, decode: Decode | None = None) -> str:
        """``test[12]``, ``test[12, 5]`` (token 5 of sample 12) or ``test``; with `decode`, its text after it."""
        if self.per == "probe":
            return self.probe
        place = f"{self.probe}[{self.sample[item]}" + (f", {self.token[item]}]" if self.token is not None else "]")
        text = self.text(item, decode)
        return place if text is None else f"{place} {text!r}"

    def text(self, item: int, decode: Decode | None) -> str | None:
        """The text of a token, or the beginning of a sample's; None where there is none."""
        if decode is None or self.input_ids is None or self.per == "probe":
            return None
        ids = self.input_ids[self.sample[item]]
        if self.token is not None:
            return decoded(decode, [int(ids[self.token[item]])])
        found = decoded(decode, ids.tolist())
        return found if len(found) <= _SNIPPET else f"{found[: _SNIPPET - 1]}…"


def decoded(decode: Decode, ids: list[int]) -> str:
    """The text of tokens."""
    if callable(decode):
        return str(decode(ids))
    for k in ids:
        if not 0 <= k < len(decode):
            raise ValueError(f"decode has the text of {len(decode)} tokens, but there is a token {k}")
    return "".join(decode[k] for k in ids)


class Pair(NamedTuple):
    """An entry of a matrix.

    Attributes:
        row, column: where it is.
        train, query: names of the two items.
        value, stderr: of it; `stderr` is None if none was asked for.
    """

    row: int
    column: int
    train: str
    query: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class SampleInfluence(Influence):
    """Influences, correlations or covariances of samples, ``[train, query]``, whose rows and columns have names.

    Attributes:
        beta: nβ/n, times what a row weighs in the loss of a sample: 1/T for a token of the mean over T, m for a whole
            probe of m samples. None where it was not needed.
        train, query: the rows and the columns.
        is_symmetric: whether the rows are the columns.
        chains: which were used.
        num_draws: of each of them.
        path: of the Zarr store that the matrix is in; None: in memory.
        warnings: what was left out, and why errors are not known; each has a ``code``.
    """

    train: Items
    query: Items
    is_symmetric: bool
    chains: tuple[int, ...]
    num_draws: int
    path: str | None = None
    warnings: tuple[str, ...] = ()

    def top(self, k: int = 10, decode: Decode | None = None) -> list[Pair]:
        """The k entries that are furthest from 0, largest first; of a symmetric matrix those above its diagonal.

        Args:
            k: how many.
            decode: of tokens to text, for the names.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = np.empty((0, 3))
        for rows, values in self._rows(self.value):
            sizes = np.nan_to_num(np.abs(values), nan=-1.0)
            if self.is_symmetric:
                sizes[np.arange(rows.start, rows.stop)[:, None] >= np.arange(sizes.shape[1])] = -1.0
            flat = sizes.ravel()
            chosen = np.argpartition(flat, max(0, flat.size - k))[-k:]
            row, column = np.unravel_index(chosen, sizes.shape)
            best = np.concatenate([best, np.stack([flat[chosen], row + rows.start, column], axis=1)])
            best = best[np.lexsort((best[:, 2], best[:, 1], -best[:, 0]))][:k]
        found = []
        for size, row, column in best:
            i, j = int(row), int(column)
            if size >= 0:
                stderr = None if self.stderr is None else float(np.asarray(self.stderr[i : i + 1, j : j + 1])[0, 0])
                value = float(np.asarray(self.value[i : i + 1, j : j + 1])[0, 0])
                found.append(Pair(i, j, self.train.name(i, decode), self.query.name(j, decode), value, stderr))
        return found

    def _rows(self, matrix: Any) -> Iterator[tuple[slice, NDArray[Any]]]:
        count, columns = matrix.shape
        step = max(1, _ROWS // max(1, columns))
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            yield rows, np.asarray(matrix[rows])

    def to_xarray(self) -> xarray.Dataset:
        """``value``, ``stderr`` and ``between`` (covariance of the chains' means), ``[train, query]``.

        The coordinates ``train_sample``, ``train_token``, ``query_sample`` and ``query_token`` say what rows and
        columns are. All of it is in memory.

        Raises:
            ModuleNotFoundError: xarray is not installed.
        """
        from llc_fast.support.optional import require

        dims = ("train", "query")
        variables: dict[str, Any] = {"value": (dims, np.asarray(self.value[:])), "between": (dims, self.between())}
        if self.stderr is not None:
            variables["stderr"] = (dims, np.asarray(self.stderr[:]))
        made: xarray.Dataset = require("xarray", "samples").Dataset(
            variables, coords=self.coordinates(), attrs=self.attributes()
        )
        return made

    def coordinates(self) -> dict[str, tuple[str, NDArray[np.intp]]]:
        """Which samples and tokens rows and columns are."""
        found = {}
        for side, items in (("train", self.train), ("query", self.query)):
            if items.per != "probe":
                found[f"{side}_sample"] = (side, items.sample)
            if items.token is not None:
                found[f"{side}_token"] = (side, items.token)
        return found

    def attributes(self) -> dict[str, Any]:
        """What is known of the whole matrix."""
        return {
            "kind": self.kind,
            "train_probe": self.train.probe,
            "query_probe": self.query.probe,
            "train_per": self.train.per,
            "query_per": self.query.per,
            **({} if self.beta is None else {"beta": self.beta}),
            "chains": list(self.chains),
            "num_draws": self.num_draws,
            "num_blocks": self.num_blocks,
            "block_length": self.block_length,
            "autocorrelation_time": self.autocorrelation_time,
            "ess_median": self.ess.median,
            "ess_min": self.ess.worst,
            "r_hat_median": self.r_hat.median,
            "r_hat_max": self.r_hat.worst,
            "between_share": self.between_share,
        }

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        q: float | None = 0.05,
        decode: Decode | None = None,
        title: str = "",
    ) -> Figure:
        """A picture of the matrix: red is positive, blue negative, gray not significant; written to `path` if given.

        Args:
            path: of the picture.
            q: the share of false ones among what has a color; None, or without standard errors: all have one.
            decode: of tokens to text, for names of rows and columns where these are few.
            title: of the figure.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed (``pip install "llc_fast[plot]"``).
            ValueError: Matplotlib does not know the ending of `path`.
            OSError: it can't be written.
        """
        from llc_fast.plots import plot_influence, write_figure

        known = q is not None and self.stderr is not None and self.num_blocks > 0
        mask = self.significant(q) if known and q is not None else None
        if mask is not None and np.isnan(np.asarray(self.stderr[:1, :1])).all() and not mask.any():
            mask = None  # no errors: nothing is known to be insignificant
        names = [None if len(side) > 64 else [self._tick(side, k, decode) for k in range(len(side))] for side in
                 (self.train, self.query)]  # fmt: skip
        figure = plot_influence(
            self.value[:], mask, train_names=names[0], query_names=names[1], label=self.kind, title=title
        )
        axes = figure.axes[0]
        axes.set(ylabel=_axis(self.train), xlabel=_axis(self.query))
        if path is not None:
            write_figure(figure, path)
        return figure

    @staticmethod
    def _tick(items: Items, k: int, decode: Decode | None) -> str:
        text = items.text(k, decode)
        if text is not None or items.per == "probe":
            return items.probe if text is None else text
        return str(items.sample[k]) + ("" if items.token is None else f", {items.token[k]}")

    def html(
        self, decode: Decode | None = None, *, query: int = 0, top: int = 10, q: float | None = 0.05, title: str = ""
    ) -> str:
        """The sequences of the rows whose tokens matter most to one column, as HTML: a color behind each token.

        Args:
            decode: of tokens to text; None: their numbers.
            query: which column.
            top: how many sequences.
            q: the share of false ones among what has a color; None, or without standard errors: all have one.
            title: above them; '' for one that says what is shown.

        Returns:
            A piece of HTML, for a notebook or a page.

        Raises:
            ValueError: rows are no tokens of known ids, or there is no such column.
        """
        from llc_fast.plots import top_sentences_html

        rows = self.train
        if rows.token is None or rows.input_ids is None:
            raise ValueError(
                f"per of the rows is {rows.per!r}"
                + ("" if rows.token is None else f", and {rows.probe!r} has no input_ids")
                + ": html() needs tokens, as per=('token', 'probe') gives them of a run sampled with per='token'"
            )
        if not 0 <= query < len(self.query):
            raise ValueError(f"query={query} is no column: there are {len(self.query)}")
        column = slice(query, query + 1)
        values = np.asarray(self.value[:, column])[:, 0].astype(np.float64)
        mask = None
        if q is not None and self.stderr is not None and self.num_blocks > 0:
            errors = np.asarray(self.stderr[:, column])[:, 0]
            mask = _column(self, values, errors).significant(q)[:, 0] if np.isfinite(errors).any() else None
        samples = list(dict.fromkeys(rows.sample.tolist()))
        place = {sample: k for k, sample in enumerate(samples)}
        length = rows.input_ids.shape[1]
        numbers = np.full((len(samples), length), math.nan)
        masks = np.zeros((len(samples), length), bool)
        at = (np.array([place[s] for s in rows.sample.tolist()], int), rows.token)
        numbers[at] = values
        masks[at] = True if mask is None else mask
        sentences = [
            [str(token) + " " if decode is None else decoded(decode, [token]) for token in rows.input_ids[s].tolist()]
            for s in samples
        ]
        if not title:
            title = f"{self.kind} of tokens of {rows.probe} on {self.query.name(query, decode)}"
            if self.is_symmetric or self.kind != "influence":
                title = title.replace(" on ", " with ")
        return top_sentences_html(
            sentences,
            list(numbers),
            None if mask is None else list(masks),
            top=top,
            names=[f"{rows.probe}[{s}]" for s in samples],
            title=title,
        )

    def summary(self, q: float = 0.05) -> str:
        """What it is, how much of it is significant, and whether the chains were long enough, in a few lines."""
        what = f"{self.kind} of {_described(self.train)}"
        what += " with each other" if self.is_symmetric else f" and {_described(self.query)}"
        if self.kind == "influence" and not self.is_symmetric:
            what = f"influence of {_described(self.train)} on {_described(self.query)}"
        rows = [what, f"  {len(self.chains)} chains × {self.num_draws} draws"]
        if self.beta is not None:
            rows[-1] += f", β = {self.beta:.4g}"
        if self.stderr is not None and self.num_blocks:
            if np.isfinite(np.asarray(self.stderr[:1])).any():
                mask = self.significant(q)
                if self.is_symmetric:
                    mask = mask[np.triu_indices(len(mask), 1)]
                rows.append(
                    f"  significant: {int(mask.sum()):,} of {mask.size:,} (false discovery rate {q:g}); errors from "
                    f"{self.num_blocks} blocks of {self.block_length} draws"
                )
            else:
                rows.append(f"  standard errors are not known: {self.num_blocks} blocks of draws, 8 are needed")
        rows.append(
            f"  effective sample size of products: median {self.ess.median:.4g}, smallest {self.ess.worst:.4g}; "
            f"R̂: median {self.r_hat.median:.3f}, largest {self.r_hat.worst:.3f}; "
            f"between chains: {self.between_share:.1%} of a loss's variance"
        )
        rows += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(rows)


def _described(items: Items) -> str:
    if items.per == "probe":
        return f"the mean loss of {items.probe!r}"
    return f"{len(items):,} {items.per}{'s' if len(items) != 1 else ''} of {items.probe!r}"


def _axis(items: Items) -> str:
    return items.probe if items.per == "probe" else f"{items.per}s of {items.probe!r}"


def _column(whole: Influence, values: NDArray[Any], errors: NDArray[Any]) -> Influence:
    """One column with its errors, to look for what is significant in it alone."""
    names = [name for name in Influence.__dataclass_fields__ if name not in ("value", "stderr")]
    return Influence(value=values[:, None], stderr=errors[:, None], **{name: getattr(whole, name) for name in names})


class Weighted:
    """Draws, each item times a number of its own."""

    def __init__(self, draws: Draws, weights: NDArray[np.float64]) -> None:
        self._draws, self._weights, self.shape = draws, weights.astype(np.float32), draws.shape

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        found: NDArray[Any] = np.asarray(self._draws[key]) * self._weights[key[2]]
        return found


@dataclass(frozen=True)
class DrawPCA(Projection):
    """Principal components of where chains went, w − w* at each draw.

    Attributes:
        chains: which were used, in the order of `coordinates`.
        sketch_size: numbers that w − w* was projected onto.
    """

    chains: tuple[int, ...]
    sketch_size: int

    @property
    def reference(self) -> NDArray[np.float64]:
        """The coordinates of w*, whose sketch is 0: ``[component]``."""
        found: NDArray[np.float64] = -self.components @ self.mean
        return found

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str = "") -> Figure:
        """Each chain's path in the first components, with w* as a star; written to `path` if given.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed (``pip install "llc_fast[plot]"``).
            ValueError: there are fewer than two components; Matplotlib does not know the ending of `path`.
            OSError: it can't be written.
        """
        from llc_fast.plots import plot_pca, write_figure

        figure = plot_pca(self.coordinates, self.share, reference=self.reference, title=title)
        if path is not None:
            write_figure(figure, path)
        return figure
