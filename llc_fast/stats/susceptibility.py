"""Susceptibilities: how the loss of a component's weights answers to more weight on one token, with standard errors.

With φ = L̄ − L(w*), L̄ the mean loss at a draw, ℓ the loss of a token (or sample), and Δ = ℓ − L̄:

    χ(C) = −(E_C[φ·Δ] − E_C[φ]·E[Δ])

E_C is the mean over chains in which only the weights of the component C move, E that over chains in which all do.
Without restriction it is −Cov(φ, Δ), the derivative of ⟨φ⟩ at ε = 0 in the density ∝ exp(−nβL − ε·Δ)·localization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.convergence import autocorrelation_time
from llc_fast.stats.influence import MIN_BLOCKS, Draws, check_finite, plan_blocks, shape_of
from llc_fast.stats.significance import benjamini_hochberg, p_values

Array = NDArray[np.float64]


class ProbeDraws(NamedTuple):
    """What chains leave for susceptibilities.

    Attributes:
        probe: losses ℓ of the probe's items, ``[chain, draw, item]``; read in slices along the last axis.
        loss: L̄, ``[chain, draw]``: the mean loss of the data that were sampled.
    """

    probe: Draws
    loss: NDArray[np.floating]


@dataclass(frozen=True)
class Control:
    """χ beside that of a control, entry by entry ``[component, item]``.

    Attributes:
        difference: χ − χ of the control.
        stderr: of the difference; the runs are independent.
        z: difference/stderr.
        exceeds: entries whose χ is larger in size than that of the control: one-sided tests of ``|χ| − |χ_control|``,
            at false discovery rate q over all entries.
    """

    difference: Array
    stderr: Array
    z: Array
    exceeds: NDArray[np.bool_]


@dataclass(frozen=True)
class Susceptibilities:
    """χ of each component for each item, with its error.

    Attributes:
        components: their names.
        value: χ, ``[component, item]``.
        stderr: standard errors, which both kinds of chains contribute to. NaN with fewer than 8 blocks of either.
        degrees_of_freedom: of the errors, by Welch and Satterthwaite.
        phi: E_C[φ] of each component.
        phi_stderr: its standard error.
        num_blocks: of each component's chains; `full_blocks` of the unrestricted ones; each is at least two
            autocorrelation times of φ·Δ's factors long.
    """

    components: tuple[str, ...]
    value: Array
    stderr: Array
    degrees_of_freedom: Array
    phi: Array
    phi_stderr: Array
    num_blocks: tuple[int, ...]
    full_blocks: int

    @property
    def z(self) -> Array:
        """The test statistic χ/stderr; NaN without an error."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.where(self.stderr > 0, self.value / self.stderr, math.nan)
        return found

    @property
    def standardized(self) -> Array:
        """The field's z-score: χ less its mean over the items, over its standard deviation, within each component.

        It compares items with each other; it is no test. NaN where all items are equal.
        """
        away = self.value - self.value.mean(axis=1, keepdims=True)
        spread = self.value.std(axis=1, keepdims=True)
        found: Array = away / np.where(spread > 0, spread, math.nan)
        return found

    @property
    def p(self) -> Array:
        """P-values of χ = 0, two-sided, by Student's t."""
        return p_values(self.z, self.degrees_of_freedom)

    def significant(self, q: float = 0.05) -> NDArray[np.bool_]:
        """Entries with χ ≠ 0, at false discovery rate `q` over all of them (Benjamini & Hochberg)."""
        return benjamini_hochberg(self.p, q)

    def against(self, control: Susceptibilities, q: float = 0.05) -> Control:
        """Beside a control: the same components and items at nβ = 0, where there is nothing but localization.

        Raises:
            ValueError: `control` has other components or another number of items.
        """
        if control.components != self.components or control.value.shape != self.value.shape:
            raise ValueError(
                f"control has components {control.components} and shape {control.value.shape}, not "
                f"{self.components} and {self.value.shape}: compute it from the same components and items."
            )
        stderr = np.hypot(self.stderr, control.stderr)
        degrees = _welch(self.stderr**2, self.degrees_of_freedom, control.stderr**2, control.degrees_of_freedom)
        with np.errstate(divide="ignore", invalid="ignore"):
            larger = np.where(stderr > 0, (np.abs(self.value) - np.abs(control.value)) / stderr, math.nan)
            z = np.where(stderr > 0, (self.value - control.value) / stderr, math.nan)
        exceeds = benjamini_hochberg(p_values(larger, degrees, one_sided=True), q)
        return Control(self.value - control.value, stderr, z, exceeds)


def susceptibilities(
    components: Mapping[str, ProbeDraws],
    full: ProbeDraws,
    reference_loss: float,
    *,
    memory: int = 1 << 28,
) -> Susceptibilities:
    """χ of each component for each item of a probe, with standard errors.

    A component's chains and the unrestricted ones are independent, so the variances of what each contributes add up:
    that of the mean of −φ·(Δ − E[Δ]) over the first, and E_C[φ]²·var(E[Δ]) from the second. Each is a jackknife over
    chains × blocks of at least two autocorrelation times, which for a mean is the variance of block means over their
    number. Where a component's draws are `full` itself (the same object), χ = −Cov(φ, Δ) with both means from the same
    draws, and its error is that of the mean of −(φ − E[φ])·(Δ − E[Δ]).

    Args:
        components: the draws of each component's chains, by its name.
        full: those of unrestricted chains, which may be other in number.
        reference_loss: L(w*), the mean loss at w* of the data that L̄ is the mean over.
        memory: bytes of probe losses that are read at a time.

    Raises:
        ValueError: no component; shapes that do not fit together; losses that are not finite, with chain and draw.
    """
    if not components:
        raise ValueError("components is empty: pass the draws of one component at least.")
    if not math.isfinite(reference_loss):
        raise ValueError(f"reference_loss={reference_loss} must be the loss at w*, a number.")
    items = shape_of("full.probe", full.probe)[2]
    whole = _Chains("full", full, reference_loss, memory)
    delta, delta_variance = whole.mean_difference()
    rows: list[Array] = []
    errors: list[Array] = []
    degrees: list[Array] = []
    phis: list[float] = []
    phi_errors: list[float] = []
    counts: list[int] = []
    for name, draws in components.items():
        if draws is not full and shape_of(f"components[{name!r}].probe", draws.probe)[2] != items:
            raise ValueError(
                f"components[{name!r}].probe has {draws.probe.shape[2]} items, but full.probe has {items}: "
                "pass the losses of the same probe."
            )
        chains = whole if draws is full else _Chains(f"components[{name!r}]", draws, reference_loss, memory)
        phi, phi_error = chains.mean_phi()
        if draws is full:
            value, variance = chains.weighted(phi, delta)
            freedom = np.full(items, chains.num_blocks - 1.0)
        else:
            value, variance = chains.weighted(0.0, delta)
            other = phi**2 * delta_variance
            freedom = _welch(variance, chains.num_blocks - 1.0, other, whole.num_blocks - 1.0)
            variance = variance + other
        rows.append(value)
        errors.append(np.sqrt(variance))
        degrees.append(freedom)
        phis.append(phi)
        phi_errors.append(phi_error)
        counts.append(chains.num_blocks)
    return Susceptibilities(
        components=tuple(components),
        value=np.stack(rows),
        stderr=np.stack(errors),
        degrees_of_freedom=np.stack(degrees),
        phi=np.array(phis),
        phi_stderr=np.array(phi_errors),
        num_blocks=tuple(counts),
        full_blocks=whole.num_blocks,
    )


def _welch(
    first: Array, first_degrees: Array | float, second: Array, second_degrees: Array | float
) -> NDArray[np.float64]:
    """Degrees of freedom of a sum of two variances, each with its own."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = (first + second) ** 2 / (first**2 / first_degrees + second**2 / second_degrees)
    return found


class _Chains:
    """Chains whose probe is read a few items at a time: means of ℓ and φ·ℓ over blocks of draws are all it takes."""

    def __init__(self, name: str, draws: ProbeDraws, reference_loss: float, memory: int) -> None:
        self.name, self.probe = name, draws.probe
        self.chains, self.draws, self.items = shape_of(f"{name}.probe", draws.probe)
        loss = np.asarray(draws.loss, np.float64)
        if loss.shape != (self.chains, self.draws):
            raise ValueError(
                f"{name}.loss has shape {loss.shape}, but its probe has {self.chains} chains of {self.draws} "
                "draws: pass the mean loss of each."
            )
        check_finite(f"{name}.loss", loss[:, :, None], 0)
        self.step = max(1, memory // (8 * 2 * self.chains * self.draws))
        some = np.asarray(self.probe[:, :, : min(64, self.items)], np.float64)
        check_finite(f"{name}.probe", some, 0)
        times = [autocorrelation_time(loss)]
        times += [autocorrelation_time(some[:, :, k] - loss) for k in range(some.shape[2])]
        known = [time for time in times if math.isfinite(time)]
        self.plan = plan_blocks(self.chains, self.draws, max(known, default=1.0), None, False)
        self.num_blocks = self.plan.num_blocks
        phi = loss - reference_loss
        self.weights = np.stack([np.ones_like(phi), phi], axis=1)  # [chain, 1 or φ, draw]
        self.of_loss = self._means(loss[:, :, None])
        self.of_one = self._means(np.ones_like(loss)[:, :, None])

    def _means(self, values: NDArray[Any]) -> tuple[Array, Array]:
        """Means of v and φ·v, v ``[chain, draw, item]``: over each block, ``[1 or φ, block, item]``, and over all."""
        plan = self.plan
        skipped = self.draws - plan.per_chain * plan.length
        blocks = np.empty((2, plan.num_blocks, values.shape[2]))
        total = np.zeros((2, values.shape[2]))
        for chain in range(self.chains):
            weights = self.weights[chain]
            total += weights[:, :skipped] @ values[chain, :skipped].astype(np.float64)
            for k in range(plan.per_chain):
                chosen = slice(skipped + k * plan.length, skipped + (k + 1) * plan.length)
                found = weights[:, chosen] @ values[chain, chosen].astype(np.float64)
                total += found
                blocks[:, chain * plan.per_chain + k] = found / plan.length
        return blocks, total / (self.chains * self.draws)

    def _variance(self, blocks: Array) -> Array:
        """Of the mean over all draws of what has these means over blocks, ``[block, item]``."""
        plan = self.plan
        if plan.num_blocks < MIN_BLOCKS:
            return np.full(blocks.shape[1], math.nan)
        # The few draws that are in no block are taken to be like the others.
        found: Array = blocks.var(axis=0, ddof=1) * plan.length / (self.chains * self.draws)
        return found

    def mean_phi(self) -> tuple[float, float]:
        """E[φ] and its standard error."""
        blocks, total = self.of_one
        return float(total[1, 0]), math.sqrt(float(self._variance(blocks[1])[0]))

    def _differences(self) -> Iterator[tuple[slice, Array, Array]]:
        """Some items, and for Δ = ℓ − L̄ what `_means` gives."""
        for first in range(0, self.items, self.step):
            items = slice(first, min(first + self.step, self.items))
            part = np.asarray(self.probe[:, :, items])
            check_finite(f"{self.name}.probe", part, first)
            blocks, total = self._means(part)
            yield items, blocks - self.of_loss[0], total - self.of_loss[1]

    def mean_difference(self) -> tuple[Array, Array]:
        """E[Δ] and its variance."""
        value, variance = np.empty(self.items), np.empty(self.items)
        for items, blocks, total in self._differences():
            value[items], variance[items] = total[0], self._variance(blocks[0])
        return value, variance

    def weighted(self, offset: float, centre: Array) -> tuple[Array, Array]:
        """The mean of −(φ − offset)·(Δ − centre), and its variance."""
        value, variance = np.empty(self.items), np.empty(self.items)
        for items, blocks, total in self._differences():

            def terms(found: Array, one: Array, middle: Array = centre[items]) -> Array:
                result: Array = offset * (found[0] - middle) - (found[1] - one[1] * middle)
                return result

            value[items] = terms(total, self.of_one[1])
            variance[items] = self._variance(terms(blocks, self.of_one[0]))
        return value, variance
