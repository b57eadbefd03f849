"""Langevin dynamics in a Kronecker-factored metric, one for each weight matrix of each chain."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from llc_fast.kernels.native import Segment, SegmentTable
from llc_fast.kernels.step import SUMS, NoiseKey, StepScalars
from llc_fast.samplers.base import Kind, Metric, Sampler
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


_F = TypeVar("_F", bound=Callable[..., Any])


def _in_full_precision(method: _F) -> _F:
    """A method of :class:`KroneckerState` without gradients, and without the caller's autocast."""

    @functools.wraps(method)
    def wrapped(self: KroneckerState, *args: Any, **options: Any) -> Any:
        with torch.no_grad(), torch.autocast(self.w.device.type, enabled=False):
            return method(self, *args, **options)

    return wrapped  # type: ignore[return-value]


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
    r"""SGLD with momentum in the metric of K-FAC (Martens & Grosse 2015, arXiv 1503.05671), in the factors' eigenbases.

    .. math:: M ← (1 − α)\,M − \tfrac{ε}{2}\,\sqrt p ∘ (U_B^⊤ D\,U_A) + σ\sqrt{ε α}\,ξ,\qquad
        W ← W + U_B\,(\sqrt p ∘ M)\,U_A^⊤,\qquad D = nβ\,g + γ(W − W^*) + μ\,W

    for each weight matrix W, with A = E[x xᵀ] of its inputs, B the Gauss–Newton matrix of its outputs, both at the
    place where the chain is, and

    .. math:: p_{ij} = \frac{1}{nβ\,(b_i + ρ\,\bar b)(a_j + ρ\,\bar a) + γ + μ}

    of their eigenvalues, each damped by a share ρ of the factor's mean. So the step of a direction that is flat because
    one factor is small there grows with 1/ρ only: it stays small enough for what the direction becomes once the
    weights next to it have moved. Each chain has its own metric, for chains go different ways. The metric follows the
    chain for `adapt_steps` steps, renewed whenever their number has grown by a tenth, with 0.3 ε and 0.1 ρ. Then it is
    that of the factors' means over the second half of these steps, and stays as it is: draws come from SGHMC in a fixed
    metric, which is exact up to O(ε); α = 1 is without momentum. M is in coordinates in which the metric is 1, so it
    keeps its law when the metric changes, and its bias is that of SGHMC there.

    Convolutions are matrices of unfolded patches; biases, norms, embeddings, what several modules share, what no module
    applies as a matrix, and matrices with a side above 4096 have the diagonal of the Gauss–Newton matrix, damped in the
    same way. Memory for a matrix b × a and a chain: 2(b² + a²) + 2ba elements.

    Attributes:
        damping: ρ > 0.
        momentum_decay: the friction α, in (0, 1].
        adapt_steps: steps after which the metric stays; None: the length of burn-in in `estimate_llc`, otherwise 0.
    """

    name: ClassVar[str] = "kfac-sgld"
    kind: ClassVar[Kind] = "momentum"
    metric: ClassVar[Metric] = "kronecker"
    supports_bias_correction: ClassVar[bool] = True
    traces: ClassVar[tuple[str, ...]] = ("bias", "squared_distance")
    has_optimizer: ClassVar[bool] = False

    damping: float = 1.0
    momentum_decay: float = 0.2
    adapt_steps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, minimum=0, exclusive=True)
        if not 0 < check_number("momentum_decay", self.momentum_decay) <= 1:
            raise ValueError(f"momentum_decay must be in (0, 1], got {self.momentum_decay}")
        if self.adapt_steps is not None:
            check_number("adapt_steps", self.adapt_steps, minimum=1)

    @classmethod
    def rule(cls) -> str:
        return "sghmc"  # what it is in coordinates in which the metric is 1

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        return super().scalars(options)._replace(friction=float(options["momentum_decay"]))

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        return 0.0  # as for SGHMC

    @classmethod
    def injected_noise(cls, options: Mapping[str, Any]) -> float:
        return float(options["momentum_decay"])

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
        """A rotation each way at each step; at each renewal a gradient's worth and a half, and decompositions in double
        precision, of some 20 cubes of a side each."""
        sides = [matrix_of(s) for s, factored in zip(shapes, may_be_matrices(shapes), strict=True) if factored]
        rotations = sum(4.0 * b * a * (a + b) for b, a in sides)
        renewals = len(refreshes(max(1, num_steps // 2))) / max(1, num_steps)
        decompositions = sum(2 * 20.0 * (b**3 + a**3) for b, a in sides)
        return rotations + renewals * (1.5 * gradient + decompositions), 12.0 + 8.0 * len(shapes)

    @classmethod
    def extra_bytes(cls, shapes: Sequence[Sequence[int]], width: int) -> int:
        """Increments, and for each parameter the metric, its factors' means, and what a step rotates in between."""
        total, sizes = 0, [math.prod(shape) for shape in shapes]
        for shape, is_matrix in zip(shapes, may_be_matrices(shapes), strict=True):
            count = math.prod(shape)
            sides = matrix_of(shape) if is_matrix else (0, 0)
            total += 6 * count + (2 * sum(side**2 for side in sides) if is_matrix else count)
        return width * (total + 4 * max(sizes, default=0))


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: its first dimension, and all others."""
    return shape[0], math.prod(shape[1:])


def may_be_matrices(shapes: Sequence[Sequence[int]]) -> list[bool]:
    """Of each parameter, whether its metric may be Kronecker-factored, by its shape and the size of all."""
    small = sum(math.prod(s) for s in shapes) <= MAX_PARAMETERS
    return [small and len(s) > 1 and math.prod(s) > 0 and max(matrix_of(s)) <= MAX_SIDE for s in shapes]


def refreshes(adapt_steps: float) -> list[int]:
    """The steps before which the metric is renewed, up to the one from which on it stays."""
    step, found = 0, list[int]()
    while step < adapt_steps:
        found.append(step)
        step += min(_LONGEST, max(1, int(_GROWTH * step)))
    return [*found, math.ceil(adapt_steps)]


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

    A step takes place in the eigenbases: v with W = W* + U_B v U_Aᵀ, where the metric is diagonal. Gradients are
    rotated there, and W is made from v. The fused step makes the increments, in coordinates in which the metric is 1.

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
        self._increments, self._v, self._root, self._slope = (self._rows(self.w.dtype) for _ in range(4))
        # Named by their places in a row: this sampler shares its noise with no other.
        segment = Segment(w=self._increments[0], offset=0, state=[self.states[0][0]])
        self._table = SegmentTable(
            sampler.rule(), [segment], num_chains=num_chains, chain_stride=self._increments.stride(0)
        )
        self._plain = self.scalars._replace(nbeta=1.0, localization=0.0, weight_decay=0.0, bounding_box=math.inf)
        shapes = [tuple(p.shape) for p in self._reference]
        self._shapes = [
            (num_chains, *(matrix_of(p.shape) if p.ndim > 1 and p.numel() else p.shape)) for p in self._reference
        ]
        self._at = set(refreshes(self.adapts_until))
        # Where w is not all that v says, v follows w.
        self._v_follows = bool(masks) or math.isfinite(self.scalars.bounding_box)
        self.set_matrices(may_be_matrices(shapes))

    def set_matrices(self, is_matrix: Sequence[bool]) -> None:
        """Say which parameters have a Kronecker-factored metric; the others have a diagonal one. Before any step."""
        self.is_matrix = list(is_matrix)
        self._bases: list[tuple[Tensor, Tensor] | None] = []
        self._totals: list[Factors] = []
        for shape, factored in zip(self._shapes, self.is_matrix, strict=True):
            places = [(shape[0], side, side) for side in shape[1:]] if factored else [shape]
            new = [torch.zeros(place, dtype=self.w.dtype, device=self._device) for place in places]
            self._totals.append(Factors(*new))
            self._bases.append((torch.zeros_like(new[0]), torch.zeros_like(new[1])) if factored else None)
        self._count = torch.zeros(self.num_chains, dtype=torch.float64)
        reference = self._reference
        self._parts = [
            _Part(
                w=self._matrices(self.w, k),
                v=self._matrices(self._v, k),
                slope=self._matrices(self._slope, k),
                reference=reference[k].view(shape[1:]),
                mask=None if self._masks[k] is None else self._masks[k].expand_as(reference[k]).reshape(shape[1:]),  # type: ignore[union-attr]
                bases=self._bases[k],
            )
            for k, shape in enumerate(self._shapes)
        ]

    def _matrices(self, rows: Tensor, k: int) -> Tensor:
        """The k-th parameter of all chains as matrices, a view."""
        n, shape = self._reference[k].numel(), self._shapes[k]
        return rows[:, self._starts[k] : self._starts[k] + n].view(shape)

    @property
    def adapts_until(self) -> float:
        steps = self._kfac.adapt_steps
        return 0 if steps is None else steps

    def start(self, first_chain: int, seed: int) -> None:
        super().start(first_chain, seed)
        for t in self._own():
            t.zero_()

    def _own(self) -> list[Tensor]:
        bases = [t for pair in self._bases if pair is not None for t in pair]
        totals = [t for f in self._totals for t in f if t is not None]
        return [self._v, self._root, *bases, *totals, self._count]

    def arrays(self) -> dict[str, Tensor]:
        return super().arrays() | {f"metric{k}": t for k, t in enumerate(self._own())}

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        own = {f"metric{k}": t for k, t in enumerate(self._own())}
        for name, place in own.items():
            place.copy_(arrays[name])
        super().restore({name: value for name, value in arrays.items() if name not in own})

    def put(self, rows: Tensor) -> None:
        super().put(rows)
        self._follow_w()

    @contextlib.contextmanager
    def at(self, w: Tensor) -> Iterator[None]:
        v = self._v.clone()  # to the last bit: w does not say it as precisely
        with super().at(w):
            yield
        self._v.copy_(v)

    @_in_full_precision
    def _follow_w(self) -> None:
        """v of w as it is."""
        for part in self._parts:
            part.v.copy_(part.inside(part.w - part.reference))

    # ---- the metric ------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the metric is to be renewed before this step."""
        return step in self._at

    def needs_factors(self, step: int) -> bool:
        """Whether :meth:`renew` will look at factors: not where the metric becomes that of their means."""
        return step < self.adapts_until or not float(self._count.max())

    @_in_full_precision
    def renew(self, step: int, factors: Sequence[Sequence[Factors]] | None) -> None:
        """Set the metric of this step; w stays where it is.

        Args:
            step: one that :meth:`is_due`.
            factors: of each chain and parameter, where the chain is; None if they are not needed.
        """
        adapts, scalars = step < self.adapts_until, self.scalars
        remembers = adapts and self.adapts_until / 2 <= step
        damping = self._kfac.damping * (_EARLY_DAMPING if adapts else 1.0)
        pull = scalars.localization + scalars.weight_decay
        for k, (shape, total) in enumerate(zip(self._shapes, self._totals, strict=True)):
            if factors is None:
                found = [t / float(self._count[0]) for t in total if t is not None]
            else:
                given = [[t for t in row[k] if t is not None] for row in factors]
                found = [torch.stack(parts).to(self.w.dtype) for parts in zip(*given, strict=True)]
                found[0] = found[0].view(total.rows.shape)
                if remembers:
                    for t, new in zip((t for t in total if t is not None), found, strict=True):
                        t += new
            # A chain that diverged has no metric; the others keep theirs.
            finite = torch.stack([t.flatten(1).isfinite().all(1) for t in found]).all(0)
            found = [t.where(finite.view(-1, *[1] * (t.ndim - 1)), torch.zeros_like(t)) for t in found]
            p, rows, columns = damped(Factors(*found), scalars.nbeta, pull, damping)
            self._matrices(self._root, k).copy_((p * (_EARLY_STEP if adapts else 1.0)).sqrt().view(shape))
            if (bases := self._bases[k]) is not None:
                assert rows is not None and columns is not None
                bases[0].copy_(rows)
                bases[1].copy_(columns)
        if remembers:
            self._count += 1
        self._follow_w()

    @_in_full_precision
    def _each(self, rows: Tensor, function: str) -> Tensor:
        """A :class:`_Part`'s function of each parameter, in a new tensor of rows."""
        found = torch.zeros_like(self._v)
        for k, part in enumerate(self._parts):
            self._matrices(found, k).copy_(getattr(part, function)(self._matrices(rows, k)))
        return found

    def times_metric(self, rows: Tensor, step: int, factor: float) -> Tensor:
        rotated = self._each(rows, "inside")
        return self._each(rotated.mul_(self._root).mul_(self._root), "outside").mul_(factor)

    def squares_in_metric(self, rows: Tensor, step: int, before: float = 1.0, factor: float = 1.0) -> Tensor:
        return self._each(rows, "inside").mul_(self._root).square_().mul_(before * factor)

    def noise_in_metric(self, normals: Tensor, step: int, lr: float) -> Tensor:
        return self._each(normals * self._root, "outside").mul_(math.sqrt(lr))

    # ---- steps -----------------------------------------------------------------------------------------------

    @_in_full_precision
    def move(self, grads: Sequence[Tensor], step: int, device_step: Tensor | None = None) -> None:
        s, v, root = self.scalars, self._v, self._root
        if self._v_follows:
            self._follow_w()
        for part, grad in zip(self._parts, grads, strict=True):
            part.set_slope(grad.to(v.dtype))
        own = self._slope.mul_(root).mul_(s.nbeta)  # of nβ·L
        slope = torch.addcmul(own, root, v, value=s.localization)
        if s.weight_decay:
            slope.addcmul_(root, self._each(self.w, "inside"), value=s.weight_decay)
        assert self._sums is not None
        # SGHMC's, in units of Sampler.bias, which multiplies by nβ. A basis is orthonormal: ‖v‖ is ‖w − w*‖.
        scale = 1 / (s.friction * s.nbeta) if s.nbeta else 0.0
        terms = torch.add(s.lr / 8 * slope, self.states[0], alpha=-(1 - s.friction) / 2).mul_(own)
        self._sums[:, SUMS.index("bias")] = scale * terms.sum(1, dtype=torch.float64)
        self._sums[:, SUMS.index("distance")] = v.square().sum(1, dtype=torch.float64)
        self._kept = slope  # a CUDA graph knows its place
        self._increments.zero_()
        key = NoiseKey(self._seed, step=step, chain=self._first_chain)
        self._table.step([slope if self.num_chains > 1 else slope[0]], self._plain, key, device_step=device_step)
        v.addcmul_(root, self._increments)
        for part in self._parts:
            part.set_w(s.bounding_box)
        self._show()

    def send_addresses(self) -> None:
        self._table.send_addresses()

    def move_some(self, grads: Mapping[str, Tensor], step: int) -> None:
        raise NotImplementedError(f"sampler={self._kfac.name!r} needs the whole gradient")


class _Part(NamedTuple):
    """One parameter of all chains, ``[num_chains, …]``: as matrices where it has more than one dimension."""

    w: Tensor
    v: Tensor
    slope: Tensor
    reference: Tensor
    mask: Tensor | None
    bases: tuple[Tensor, Tensor] | None

    def inside(self, values: Tensor) -> Tensor:
        """Values of what may move, in the eigenbasis."""
        return self.rotated(values if self.mask is None else values * self.mask)

    def outside(self, values: Tensor) -> Tensor:
        """From the eigenbasis, of what may move."""
        found = self.back(values)
        return found if self.mask is None else found * self.mask

    def rotated(self, values: Tensor) -> Tensor:
        return values if self.bases is None else self.bases[0].mT @ values @ self.bases[1]

    def back(self, values: Tensor) -> Tensor:
        return values if self.bases is None else self.bases[0] @ values @ self.bases[1].mT

    def set_slope(self, grad: Tensor) -> None:
        """The gradient in the eigenbasis; of one shape for all chains, or with a leading dimension."""
        grad = grad.reshape(self.w.shape if grad.numel() == self.w.numel() else self.w.shape[1:])
        self.slope.copy_(self.inside(grad))

    def set_w(self, box: float) -> None:
        """w of v, where the mask and the box let it be."""
        w = self.reference + self.back(self.v)
        if math.isfinite(box):
            low, high = self.reference - box, self.reference + box
            w = torch.where(w < low, low, torch.where(w > high, high, w))  # a NaN stays a NaN
        self.w.copy_(w if self.mask is None else torch.where(self.mask, w, self.w))


def make_state(
    reference: Mapping[str, Tensor], masks: Mapping[str, Tensor], sampler: Sampler, num_chains: int
) -> ChainState:
    """The chains of a sampler."""
    if isinstance(sampler, KFACSGLDSampler):
        return KroneckerState(reference, masks, sampler, num_chains)
    return ChainState(reference, masks, sampler, num_chains)
