"""Langevin dynamics in a Kronecker-factored metric, one for each weight matrix of each chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llc_fast.kernels.native import NUM_SUMS, Segment, SegmentTable
from llc_fast.kernels.step import SUMS, NoiseKey
from llc_fast.samplers.base import Metric, Sampler
from llc_fast.samplers.registry import register
from llc_fast.samplers.state import ChainState
from llc_fast.support.arguments import check_number

MAX_SIDE = 4096
"""Rows or columns of a weight above which its metric is diagonal: an eigenbasis has the side's square of elements."""
MAX_PARAMETERS = 100_000_000
"""Elements that are sampled, above which all metrics are diagonal."""
_GROWTH, _LONGEST = 0.1, 50
"""The metric is renewed whenever the number of steps has grown by a tenth, and after so many at the latest."""
_EARLY_STEP, _EARLY_DAMPING = 0.3, 0.1
"""ε and the damping while the metric follows the chain, as shares of those of draws. A metric of this very place may be
damped less than one that has to do for all places that draws will come to."""
_TINY = 1e-9


class Factors(NamedTuple):
    """The Gauss–Newton matrix of one parameter, of the mean loss, at one place.

    Of a matrix: ``rows ⊗ columns``, float32 ``[rows, rows]`` and ``[columns, columns]``. Otherwise its diagonal, of the
    parameter's shape, and None.
    """

    rows: Tensor
    columns: Tensor | None = None


@register
@dataclass(frozen=True)
class KFACSGLDSampler(Sampler):
    r"""SGLD in the metric of K-FAC (Martens & Grosse 2015, arXiv 1503.05671), in the factors' eigenbases.

    .. math:: W ← W − \tfrac{ε}{2}\,U_B\,[p ∘ (U_B^⊤ D\,U_A)]\,U_A^⊤ + σ\sqrt{ε}\;U_B\,[\sqrt p ∘ ξ]\,U_A^⊤,\qquad
        D = nβ\,g + γ(W − W^*) + μ\,W

    for each weight matrix W, with A = E[x xᵀ] of its inputs, B the Gauss–Newton matrix of its outputs, both at the
    place where the chain is, and

    .. math:: p_{ij} = \frac{1}{nβ\,(b_i + ρ\,\bar b)(a_j + ρ\,\bar a) + γ + μ}

    of their eigenvalues, each damped by a share ρ of the factor's mean. So the step of a direction that is flat because
    one factor is small there grows with 1/ρ only: it stays small enough for what the direction becomes once the
    weights next to it have moved. Each chain has its own metric, for chains go different ways. The metric follows the
    chain for `adapt_steps` steps, renewed whenever their number has grown by a tenth, with 0.3 ε and 0.1 ρ. Then it is
    that of the factors' means over the second half of these steps, and stays as it is: draws come from SGLD in a fixed
    metric, which is exact up to O(ε).

    Convolutions are matrices of unfolded patches; biases, norms, embeddings, what several modules share, what no module
    applies as a matrix, and matrices with a side above 4096 have the diagonal of the Gauss–Newton matrix, damped in the
    same way. Memory for a matrix b × a and a chain: 2(b² + a²) + 2ba elements.

    Attributes:
        damping: ρ > 0.
        adapt_steps: steps after which the metric stays; None: the length of burn-in.
    """

    name: ClassVar[str] = "kfac-sgld"
    metric: ClassVar[Metric] = "kronecker"
    supports_bias_correction: ClassVar[bool] = True
    has_optimizer: ClassVar[bool] = False
    traces: ClassVar[tuple[str, ...]] = ("bias", "squared_distance")

    damping: float = 1.0
    adapt_steps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, minimum=0, exclusive=True)
        if self.adapt_steps is not None:
            check_number("adapt_steps", self.adapt_steps, minimum=1)

    @classmethod
    def rule(cls) -> str:
        return "sgld"  # what it is in coordinates in which the metric is 1

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        return 0.0

    @classmethod
    def needs_whole_step(cls, options: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def needs_reference(cls, options: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def bytes_moved(cls, low: bool = False, chains: int = 1) -> float:
        return math.nan  # matrix products, not a single pass

    @classmethod
    def extra_work(cls, shapes: Sequence[Sequence[int]], gradient: float, num_steps: int) -> tuple[float, float]:
        """Rotations of drift, gradient and increment at each step; at each renewal a gradient's worth and a half, and
        decompositions in double precision, of some 20 cubes of a side each."""
        sides = [matrix_of(s) for s, factored in zip(shapes, may_be_matrices(shapes), strict=True) if factored]
        rotations = sum(6.0 * b * a * (a + b) for b, a in sides)
        renewals = len(refreshes(max(1, num_steps // 2))) / max(1, num_steps)
        decompositions = sum(2 * 20.0 * (b**3 + a**3) for b, a in sides)
        return rotations + renewals * (1.5 * gradient + decompositions), 15.0 * len(shapes)

    @classmethod
    def extra_bytes(cls, shapes: Sequence[Sequence[int]], width: int) -> int:
        """Increments, and for each parameter the metric, its factors' means, and what a step rotates in between."""
        total = 0
        for shape, is_matrix in zip(shapes, may_be_matrices(shapes), strict=True):
            count = math.prod(shape)
            sides = matrix_of(shape) if is_matrix else (0, 0)
            total += 2 * count + (2 * sum(side**2 for side in sides) if is_matrix else count)
        return width * (total + 4 * max(map(math.prod, shapes), default=0))


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: its first dimension, and all others."""
    return shape[0], math.prod(shape[1:])


def may_be_matrices(shapes: Sequence[Sequence[int]]) -> list[bool]:
    """Of each parameter, whether its metric may be Kronecker-factored, by its shape and the size of all."""
    small = sum(map(math.prod, shapes)) <= MAX_PARAMETERS
    return [small and len(s) > 1 and math.prod(s) > 0 and max(matrix_of(s)) <= MAX_SIDE for s in shapes]


def refreshes(adapt_steps: float) -> list[int]:
    """The steps before which the metric is renewed, up to the one from which on it stays."""
    step, found = 0, list[int]()
    while step < adapt_steps:
        found.append(step)
        step += min(_LONGEST, max(1, int(_GROWTH * step)))
    return [*found, int(adapt_steps)] if math.isfinite(adapt_steps) else found


def damped(factors: Factors, nbeta: float, pull: float, damping: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """p, and the eigenbases of rows and columns; a diagonal has none. Leading dimensions are those of a batch.

    Args:
        factors: of the Gauss–Newton matrix.
        nbeta, pull: nβ, and γ + μ.
        damping: ρ.
    """
    if factors.columns is None:
        diagonal = factors.rows.clamp(min=0)
        mean = diagonal.flatten(1).mean(1).view(-1, *[1] * (diagonal.ndim - 1))
        return 1 / _not_zero(nbeta * (diagonal + damping * mean) + pull), None, None
    found = []
    for factor in factors:
        assert factor is not None
        # Scaled, and in float64: single precision loses the small eigenvalues, and at times does not converge.
        scale = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(factor.dtype).tiny)[:, None]
        values, basis = torch.linalg.eigh((factor / scale[:, :, None]).double())
        found.append((scale * (values.clamp(min=0) + damping).to(factor.dtype), basis.to(factor.dtype)))
    (b, rows), (a, columns) = found
    return 1 / _not_zero(nbeta * b[:, :, None] * a[:, None, :] + pull), rows, columns


def _not_zero(curvature: Tensor) -> Tensor:
    return curvature.clamp(min=max(_TINY * float(curvature.max()), torch.finfo(curvature.dtype).tiny * 1e6))


class KroneckerState(ChainState):
    """Chains with a metric each: p and the eigenbases, which :meth:`renew` makes of factors.

    A step rotates drifts into coordinates in which the metric is 1, where the fused step makes increments of plain SGLD
    that start at 0, and rotates these back.

    Args:
        reference, masks, sampler, num_chains: as for :class:`ChainState`.

    Attributes:
        is_matrix: of each parameter, whether its metric is Kronecker-factored; see :meth:`set_matrices`.
    """

    def __init__(
        self, reference: Mapping[str, Tensor], masks: Mapping[str, Tensor], sampler: KFACSGLDSampler, num_chains: int
    ) -> None:
        super().__init__(reference, masks, sampler, num_chains)
        self._kfac = sampler
        self._increments = self._rows(self.w.dtype)
        segments = [
            Segment(w=self._view(self._increments, k)[0], offset=self._offsets[k]) for k in range(len(self._names))
        ]
        self._table = SegmentTable("sgld", segments, num_chains=num_chains, chain_stride=self._increments.stride(0))
        self._plain = self.scalars._replace(nbeta=1.0, localization=0.0, weight_decay=0.0, bounding_box=math.inf)
        shapes = [tuple(p.shape) for p in self._reference]
        self._shapes = [(num_chains, *(matrix_of(s) if len(s) > 1 and math.prod(s) else s)) for s in shapes]
        self._places = refreshes(self.adapts_until)
        self._at = set(self._places)
        self.is_matrix = [False] * len(shapes)
        self.set_matrices(may_be_matrices(shapes))

    def set_matrices(self, is_matrix: Sequence[bool]) -> None:
        """Say which parameters have a Kronecker-factored metric; the others have a diagonal one. Before any step."""
        self.is_matrix = list(is_matrix)
        new = dict[str, Any](dtype=self.w.dtype, device=self._device)
        self._root = [torch.zeros(shape, **new) for shape in self._shapes]
        self._bases: list[tuple[Tensor, Tensor] | None] = []
        self._sums_of_factors: list[Factors] = []
        for shape, factored in zip(self._shapes, self.is_matrix, strict=True):
            if factored:
                sides = [(shape[0], side, side) for side in shape[1:]]
                self._bases.append((torch.zeros(sides[0], **new), torch.zeros(sides[1], **new)))
                self._sums_of_factors.append(Factors(torch.zeros(sides[0], **new), torch.zeros(sides[1], **new)))
            else:
                self._bases.append(None)
                self._sums_of_factors.append(Factors(torch.zeros(shape, **new)))
        self._count = torch.zeros(self.num_chains, dtype=torch.float64)

    @property
    def adapts_until(self) -> float:
        steps = self._kfac.adapt_steps
        return math.inf if steps is None else steps

    def start(self, first_chain: int, seed: int) -> None:
        super().start(first_chain, seed)
        for t in self._own():
            t.zero_()

    def _own(self) -> list[Tensor]:
        bases = [t for pair in self._bases if pair is not None for t in pair]
        sums = [t for f in self._sums_of_factors for t in f if t is not None]
        return [*self._root, *bases, *sums, self._count]

    def arrays(self) -> dict[str, Tensor]:
        return super().arrays() | {f"metric{k}": t for k, t in enumerate(self._own())}

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        own = {f"metric{k}": t for k, t in enumerate(self._own())}
        for name, place in own.items():
            place.copy_(arrays[name])
        super().restore({name: value for name, value in arrays.items() if name not in own})

    # ---- the metric ------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the metric is to be renewed before this step."""
        return step in self._at

    def needs_factors(self, step: int) -> bool:
        """Whether :meth:`renew` will look at factors: not where the metric becomes that of their means."""
        return step < self.adapts_until or not float(self._count.max())

    @torch.no_grad()
    def renew(self, step: int, factors: Sequence[Sequence[Factors]] | None) -> None:
        """Set the metric of this step; w stays where it is.

        Args:
            step: one that :meth:`is_due`.
            factors: of each chain and parameter, where the chain is; None if they are not needed.
        """
        adapts = step < self.adapts_until
        remembers = step >= self.adapts_until / 2 and math.isfinite(self.adapts_until)
        scalars, damping = self.scalars, float(self._kfac.damping)
        pull = scalars.localization + scalars.weight_decay
        if adapts:
            damping *= _EARLY_DAMPING
        uses_means = not adapts and bool(self._count.max())
        for k, shape in enumerate(self._shapes):
            total = self._sums_of_factors[k]
            if uses_means:
                found = Factors(*(t if t is None else t / float(self._count[0]) for t in total))
            else:
                assert factors is not None
                parts = zip(*(row[k] for row in factors), strict=True)
                stacked = [None if p[0] is None else torch.stack(p).to(self.w.dtype) for p in parts]
                found = Factors(stacked[0].view(total.rows.shape), stacked[1])  # type: ignore[union-attr]
                if remembers:
                    for t, new in zip(total, found, strict=True):
                        if t is not None:
                            t += new
            # A chain that diverged has no metric; the others keep theirs.
            finite = torch.stack([t.flatten(1).isfinite().all(1) for t in found if t is not None]).all(0)
            safe = [
                t if t is None else t.where(finite.view(-1, *[1] * (t.ndim - 1)), torch.zeros_like(t)) for t in found
            ]
            p, rows, columns = damped(Factors(*safe), scalars.nbeta, pull, damping)  # type: ignore[arg-type]
            self._root[k].copy_((p * (_EARLY_STEP if adapts else 1.0)).sqrt().view(shape))
            if (bases := self._bases[k]) is not None:
                assert rows is not None and columns is not None
                bases[0].copy_(rows)
                bases[1].copy_(columns)
        if adapts and remembers:
            self._count += 1

    def rooted(self, k: int, values: Tensor) -> Tensor:
        """√P times values of the k-th parameter, ``[num_chains, *shape]``."""
        return self._back(k, self._rotated(k, values)).view(values.shape)

    def _rotated(self, k: int, values: Tensor) -> Tensor:
        """Of the coordinates of a gradient in which the metric is 1."""
        values = values.view(self._shapes[k])
        if (bases := self._bases[k]) is not None:
            values = bases[0].mT @ values @ bases[1]
        return self._root[k] * values

    def _back(self, k: int, values: Tensor) -> Tensor:
        if (bases := self._bases[k]) is not None:
            return bases[0] @ values @ bases[1].mT
        return values

    # ---- steps -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move(self, grads: Sequence[Tensor], step: int, device_step: Tensor | None = None) -> None:
        s = self.scalars
        inside: list[Tensor] = []
        distance = torch.zeros(self.num_chains, dtype=torch.float64, device=self._device)
        bias = torch.zeros_like(distance)
        for k, (reference, mask) in enumerate(zip(self._reference, self._masks, strict=True)):
            w = self._view(self.w, k)
            away = w - reference
            grad = (
                grads[k].to(w.dtype).view(w.shape)
                if grads[k].numel() == w.numel()
                else grads[k].to(w.dtype).expand_as(w)
            )
            drift = s.nbeta * grad + s.localization * away + s.weight_decay * w
            if mask is not None:
                away, grad, drift = away * mask, grad * mask, drift * mask
            rotated = self._rotated(k, drift.contiguous())
            distance += away.square().flatten(1).sum(1, dtype=torch.float64)
            own = rotated if s.localization == 0 == s.weight_decay else s.nbeta * self._rotated(k, grad.contiguous())
            bias += (own * rotated).flatten(1).sum(1, dtype=torch.float64)
            inside.append(rotated.view(w.shape))
        self._inside = inside  # a CUDA graph knows their places
        self._increments.zero_()
        key = NoiseKey(self._seed, step=step, chain=self._first_chain)
        given = inside if self.num_chains > 1 else [g[0] for g in inside]
        self._table.step(given, self._plain, key, device_step=device_step)
        for k, (reference, mask) in enumerate(zip(self._reference, self._masks, strict=True)):
            w, increment = self._view(self.w, k), self._view(self._increments, k).reshape(self._shapes[k])
            change = self._back(k, self._root[k] * increment).view(w.shape)
            w += change if mask is None else change * mask
            if math.isfinite(s.bounding_box):
                low, high = reference - s.bounding_box, reference + s.bounding_box
                clamped = torch.where(w < low, low.to(w.dtype), torch.where(w > high, high.to(w.dtype), w))
                w.copy_(clamped if mask is None else torch.where(mask.expand_as(w), clamped, w))
        self._show()
        assert self._sums is not None and self._sums.shape[1] == NUM_SUMS
        # In units of Sampler.bias, which multiplies by nβ.
        self._sums[:, SUMS.index("bias")] = bias * (s.lr / 8 / s.nbeta if s.nbeta else 0.0)
        self._sums[:, SUMS.index("distance")] = distance

    def send_addresses(self) -> None:
        self._table.send_addresses()

    def move_one(self, name: str, grad: Tensor, step: int) -> None:
        raise NotImplementedError(f"sampler={self._kfac.name!r} needs the whole gradient")


def make_state(
    reference: Mapping[str, Tensor], masks: Mapping[str, Tensor], sampler: Sampler, num_chains: int
) -> ChainState:
    """The chains of a sampler."""
    if isinstance(sampler, KFACSGLDSampler):
        return KroneckerState(reference, masks, sampler, num_chains)
    return ChainState(reference, masks, sampler, num_chains)
