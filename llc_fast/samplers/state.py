"""The buffers of chains: their parameters in flat rows, what the model sees of them, and what the sampler keeps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llc_fast.kernels.native import NUM_STATES, NUM_SUMS, Segment, SegmentTable, is_low_precision, normals
from llc_fast.kernels.step import NoiseKey, StepScalars
from llc_fast.kernels.streams import NOISE_STREAM
from llc_fast.samplers.base import Sampler

_PIECE, _PIECE_ON_A_GPU = 2**20, 2**23  # elements that are looked at together where memory counts
_MAX_TABLES = 1000  # that are kept for groups of parameters
_ALIGN = 16  # elements: each tensor of a chain starts on a cache line


class ChainState:
    """Chains that step together, as rows of flat buffers ``[num_chains, P]``.

    bfloat16 and float16 parameters are copies in the model's own precision, which the step writes; the chains are
    float32.

    Args:
        reference: w* of each parameter by name; chains start there.
        masks: by name, for parameters of which a part moves: boolean, broadcast to the parameter, True where it moves.
        sampler: how they move.
        num_chains: rows.
    """

    def __init__(
        self, reference: Mapping[str, Tensor], masks: Mapping[str, Tensor], sampler: Sampler, num_chains: int
    ) -> None:
        self._sampler, self._options = sampler, dict(vars(sampler))
        self.scalars = sampler.scalars(self._options)
        self.num_chains, self._names = num_chains, list(reference)
        self._places = {name: k for k, name in enumerate(self._names)}
        self._device = next(iter(reference.values())).device
        # Contiguous, because that is how the elements' noise is numbered.
        # Not widened: the step does that, and so w* of a large model is the model's own memory.
        self._reference = [p.contiguous() for p in reference.values()]
        self._offsets = list(itertools.accumulate([0, *(p.numel() for p in self._reference)]))[:-1]
        self._starts = list(itertools.accumulate([0, *(-(-p.numel() // _ALIGN) * _ALIGN for p in self._reference)]))
        first = self._reference[0]
        self.w = self._rows(torch.float32 if is_low_precision(first) else first.dtype)
        self.states = [self._rows(self.w.dtype) for _ in range(NUM_STATES[sampler.rule()])]
        dtypes = [p.dtype for p in reference.values()]
        self._copies = {p.dtype: self._rows(p.dtype) for p in reference.values() if is_low_precision(p)}
        self._seen = [self._copies.get(dtype, self.w) for dtype in dtypes]
        given = getattr(sampler, "preconditioner", 1.0)
        self._segments = [
            Segment(
                w=self._view(self.w, k)[0],
                offset=self._offsets[k],
                reference=self._reference[k],
                mask=masks.get(name),
                state=[self._view(state, k)[0] for state in self.states],
                preconditioner=given[name] if isinstance(given, Mapping) else given,
                copy=self._view(self._seen[k], k)[0] if dtypes[k] in self._copies else None,
            )
            for k, name in enumerate(self._names)
        ]
        self._masks = [segment.mask for segment in self._segments]
        # One step takes parameters of one dtype; noise is named by element, however these are split.
        parts = [[k for k, found in enumerate(dtypes) if found == dtype] for dtype in dict.fromkeys(dtypes)]
        self._tables = [
            (
                part,
                SegmentTable(
                    sampler.rule(),
                    [self._segments[k] for k in part],
                    num_chains=num_chains,
                    chain_stride=self.w.stride(0),
                ),
            )
            for part in parts
        ]
        self._part_of = {k: n for n, part in enumerate(parts) for k in part}
        self._tables_of_some: dict[tuple[int, ...], SegmentTable] = {}
        self._num_moving = sum(
            p.numel() if mask is None else int(mask.expand_as(p).sum())
            for p, mask in zip(self._reference, self._masks, strict=True)
        )
        self._feeds_back = bool(sampler.feedback_sums(self._options))
        self._sums: Tensor | None = None
        self._sums_seen: Any = None
        self._wanted = sampler.sums_needed(self._options)
        if self._wanted:
            self._sums = torch.zeros(num_chains, NUM_SUMS, dtype=torch.float64, device=self._device)
            self._part = torch.zeros_like(self._sums)
            # On a CPU through NumPy, in a fraction of the time that torch takes for a few numbers.
            self._sums_seen = self._sums.numpy() if self._device.type == "cpu" else self._sums

    def _rows(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.num_chains, self._starts[-1], dtype=dtype, device=self._device)

    def _view(self, rows: Tensor, k: int) -> Tensor:
        """The k-th tensor of all chains, ``[num_chains, *shape]``."""
        p = self._reference[k]
        return rows[:, self._starts[k] : self._starts[k] + p.numel()].view(len(rows), *p.shape)

    # ---- what the model sees -------------------------------------------------------------------------------

    def params(self) -> dict[str, Tensor]:
        """The parameters of all chains, ``[num_chains, *shape]`` each; views, so they follow every step."""
        return {name: self._view(self._seen[k], k) for k, name in enumerate(self._names)}

    def single(self, row: int = 0) -> dict[str, Tensor]:
        """The parameters of one chain."""
        return {name: t[row] for name, t in self.params().items()}

    # ---- as rows like w's -----------------------------------------------------------------------------------

    @property
    def reference(self) -> Sequence[Tensor]:
        """w* of each parameter, in the model's precision."""
        return self._reference

    @property
    def moving(self) -> Sequence[Tensor | float]:
        """1 for each parameter, or where its mask lets it move."""
        return [1.0 if mask is None else mask for mask in self._masks]

    @property
    def adapts_until(self) -> float:
        """The step from which on the metric stays as it is."""
        return self.scalars.adapt_steps if self._sampler.metric == "adaptive" else 0

    def rows_of(self, values: Sequence[Tensor | float], dtype: torch.dtype | None = None) -> Tensor:
        """A copy of what is given for each parameter, of one chain or all, laid out like `w`; 0 in between.

        In the precision of `w` unless `dtype` says otherwise.
        """
        rows = self._rows(dtype or self.w.dtype)
        for k, value in enumerate(values):
            self._view(rows, k).copy_(
                torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
            )
        return rows

    def distances(self) -> list[float]:
        """‖w − w*‖² of each chain, over what may move, in the metric of the localization.

        Row by row and in pieces, without another buffer like `w`.
        """
        sums = torch.zeros(self.num_chains, dtype=torch.float64, device=self._device)  # read once, at the end
        size = _PIECE if self._device.type == "cpu" else _PIECE_ON_A_GPU
        for k, (reference, mask) in enumerate(zip(self._reference, self._masks, strict=True)):
            flat, given = reference.view(-1), self._segments[k].preconditioner
            metric = given.expand_as(reference).reshape(-1) if isinstance(given, Tensor) else None
            may_move = None if mask is None else mask.expand_as(reference).reshape(-1)
            for row in range(self.num_chains):
                w = self._view(self.w, k)[row].view(-1)
                for start in range(0, len(flat), size):
                    piece = slice(start, start + size)
                    away = w[piece] - flat[piece]
                    if may_move is not None:
                        away *= may_move[piece]
                    away.square_()
                    if self.scalars.in_metric:
                        away /= given if metric is None else metric[piece]
                    sums[row] += away.sum(dtype=torch.float64)
        found: list[float] = sums.tolist()
        return found

    def metric(self, step: int) -> Tensor:
        """The preconditioner p of a Langevin step that no longer adapts; 0 where nothing moves."""
        p = self.rows_of(self.moving).mul_(self.rows_of([segment.preconditioner for segment in self._segments]))
        return p.mul_(self._sampler.frozen_metric(self._adapted(step, ()), self.states))

    def of_rows(self, rows: Tensor, k: int) -> Tensor:
        """The k-th parameter of all chains in rows like `w`, ``[num_chains, *shape]``."""
        return self._view(rows, k)

    # Rows like w's, in a metric that no longer adapts.

    def times_metric(self, rows: Tensor, step: int, factor: float) -> Tensor:
        """The factor times P times rows."""
        return factor * self.metric(step) * rows

    def squares_in_metric(self, rows: Tensor, step: int, before: float = 1.0, factor: float = 1.0) -> Tensor:
        """Terms whose sum along a row is xᵀPx, times both numbers."""
        return before * self.metric(step) * rows.square().mul_(factor)

    def noise_in_metric(self, normals: Tensor, step: int, lr: float) -> Tensor:
        """Standard normal rows as those of covariance εP; overwritten."""
        return normals.mul_((lr * self.metric(step)).sqrt())

    # ---- where they are ------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, first_chain: int, seed: int) -> None:
        """Put all chains at w*, with the sampler's initial state; row r is chain ``first_chain + r``."""
        self._first_chain, self._seed = first_chain, seed
        self.adaptation: dict[str, Any] = {
            name: value.repeat(self.num_chains, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
            for name, value in self._sampler.initial_adaptation(self._options, self._device).items()
        }
        for k, p in enumerate(self._reference):
            self._view(self.w, k).copy_(p.expand(self.num_chains, *p.shape))
            for row in range(self.num_chains if self.states else 0):
                w = self._view(self.w, k)[row]
                initial = self._sampler.initial_state(w, self._offsets[k], self._options, seed, first_chain + row)
                for state, value in zip(self.states, initial, strict=True):
                    self._view(state, k)[row].copy_(value)
        self._show()

    def _show(self) -> None:
        for rows in self._copies.values():
            rows.copy_(self.w)

    @torch.no_grad()
    def displacement(self) -> dict[str, Tensor]:
        """w − w* of all chains, by parameter, ``[num_chains, *shape]``."""
        return {name: self._view(self.w, k) - self._reference[k] for k, name in enumerate(self._names)}

    @torch.no_grad()
    def displace(self, by: Mapping[str, Tensor]) -> None:
        """Move all chains by what :meth:`displacement` gave, where they may move; back to w* in one that diverged."""
        rows = self.rows_of([by[name] for name in self._names])
        rows *= self.rows_of(self.moving)
        rows[~torch.isfinite(rows).all(dim=1)] = 0
        self.put(self.w + rows)

    def displaced(self) -> contextlib.AbstractContextManager[None]:
        """The parameters a little elsewhere, to see whether something depends on them."""
        return self.at(1.01 * self.w)

    @contextlib.contextmanager
    def at(self, w: Tensor) -> Iterator[None]:
        """The parameters elsewhere for a while."""
        before = self.w.clone()
        self.put(w)
        try:
            yield
        finally:
            self.put(before)

    def arrays(self) -> dict[str, Tensor]:
        """Everything that changes from step to step: the state of a chain row by row, ``[num_chains, …]``."""
        arrays = {"w": self.w} | {f"state{j}": t for j, t in enumerate(self.states)}
        for name, value in self.adaptation.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            arrays[name] = value if value.ndim else value.repeat(self.num_chains)
        return arrays

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`arrays` gave; call :meth:`start` first."""
        self.w.copy_(arrays["w"])
        for j, state in enumerate(self.states):
            state.copy_(arrays[f"state{j}"])
        for name in arrays.keys() - {"w", *(f"state{j}" for j in range(len(self.states)))}:
            value, place = arrays[name], self.adaptation.get(name)
            if isinstance(place, Tensor):
                place.copy_(value)  # a CUDA graph knows the place, not the name
            else:
                self.adaptation[name] = float(value[0])
        self._show()

    # ---- as rows of float64, for transitions that are not one fused step ------------------------------------

    def metric_rows(self) -> Tensor:
        """√A, the root of the preconditioner; 0 where nothing moves: outside masks, and in the gaps."""
        roots = [torch.as_tensor(s.preconditioner, dtype=torch.float64).to(self._device).sqrt() for s in self._segments]
        return self.rows_of([r if m is None else r * m for r, m in zip(roots, self._masks, strict=True)], torch.float64)

    def noise_rows(self, step: int) -> Tensor:
        """ξ of a step, the same that the fused step makes."""
        total = self._offsets[-1] + self._reference[-1].numel()
        flat = self._normals(total, step)
        parts = zip(self._offsets, self._reference, strict=True)
        return self.rows_of(
            [flat[:, start : start + p.numel()].view(len(flat), *p.shape) for start, p in parts], torch.float64
        )

    def numbers(self, step: int, stream: int) -> Tensor:
        """Four normals for each chain, ``[num_chains, 4]``, of another stream than the noise."""
        return self._normals(4, step, stream)

    def _normals(self, count: int, step: int, stream: int = NOISE_STREAM) -> Tensor:
        keys = [NoiseKey(self._seed, step, self._first_chain + row, stream) for row in range(self.num_chains)]
        return torch.stack([normals(0, count, key, dtype=torch.float64, device=self._device) for key in keys])

    def put(self, rows: Tensor) -> None:
        """Move all chains to these rows of `w`, rounded to its precision."""
        self.w.copy_(rows)
        self._show()

    # ---- steps ---------------------------------------------------------------------------------------------

    def move(self, grads: Sequence[Tensor], step: int, device_step: Tensor | None = None) -> None:
        """One step of the sampler for all chains; `grads` in the order of the parameters."""
        scalars = self._adapted(step, grads)
        is_whole = len(self._tables) == 1
        if not is_whole:
            self.start_parts()
        for part, table in self._tables:
            sums = self._sums
            if sums is not None and not is_whole:
                sums = self._part
            table.step(
                grads if is_whole else [grads[k] for k in part],
                scalars,
                NoiseKey(self._seed, step=step, chain=self._first_chain),
                thermostat=self.adaptation.get("thermostat"),
                sums=sums,
                wanted=self._wanted,
                device_step=device_step,
            )
            if self._sums is not None and not is_whole:
                self._sums += self._part
        if self._feeds_back:
            assert self._sums is not None
            self._sampler.follow(scalars, self.adaptation, step, self._sums, self._num_moving)

    def send_addresses(self) -> None:
        """After a step was captured in a CUDA graph: send the GPU the places where the graph keeps the gradients."""
        for _, table in self._tables:
            table.send_addresses()

    def info(self) -> dict[str, Any]:
        """What the sampler reports of the last step, its ``traces``, ``[num_chains]`` each.

        The bias is NumPy's on a CPU; all else is tensors.
        """
        return self._sampler.info(self.scalars, self._sums_seen, self.adaptation)

    def start_parts(self) -> None:
        """Before the first :meth:`move_some` of a step."""
        if self._sums is not None:
            self._sums.zero_()

    def _adapted(self, step: int, grads: Sequence[Tensor]) -> StepScalars:
        return self._sampler.adapted(self.scalars, self._options, self.adaptation, step, grads, self._masks)

    def move_some(self, grads: Mapping[str, Tensor], step: int) -> None:
        """The part of a step that moves some parameters: the same bits as the whole step."""
        places = sorted(map(self._places.__getitem__, grads))
        for _, group in itertools.groupby(sorted(places, key=self._part_of.__getitem__), self._part_of.__getitem__):
            some = tuple(group)
            table = self._tables_of_some.get(some)
            if table is None:
                if len(self._tables_of_some) > _MAX_TABLES:  # they come in other groups each time
                    self._tables_of_some.clear()
                table = SegmentTable(self._sampler.rule(), [self._segments[k] for k in some])
                self._tables_of_some[some] = table
            table.step(
                [grads[self._names[k]] for k in some],
                self.scalars,
                NoiseKey(self._seed, step=step, chain=self._first_chain),
                sums=None if self._sums is None else self._part,
                wanted=self._wanted,
            )
            if self._sums is not None:
                self._sums += self._part
