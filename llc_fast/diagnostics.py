"""What traces and probes say about an estimate: error bars, convergence, step size. Pure functions of arrays.

What the figures mean for the user is said in :mod:`llc_fast.advice`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.convergence import error_within, ess_mean
from llc_fast.probes import COLUMNS


class StandardError(NamedTuple):
    """A standard error and the degrees of freedom it was estimated with."""

    value: float
    degrees_of_freedom: int

    def quantile(self, prob: float) -> float:
        """Half the width of a central interval with probability `prob`, in standard errors (Student's t)."""
        if self.degrees_of_freedom < 1:
            return math.nan
        from scipy.special import stdtrit

        return float(stdtrit(self.degrees_of_freedom, 0.5 + prob / 2))


def standard_error(draws: NDArray[np.float64]) -> StandardError:
    """Standard error of the mean of autocorrelated draws ``[chain, draw]``: the largest of three.

    - Batch means (Flegal & Jones 2010): each chain is cut into about ∛draws consecutive batches, and the variance of
      their means within chains taken. Batches as long as that see weak and slow correlations beneath the noise of
      minibatches, which single autocorrelations do not rise above.
    - The autocorrelation time, see :func:`llc_fast.convergence.error_within`, which may be longer than a batch. It is a
      sum over about 3 times as many lags, of either sign, which leaves draws / (3 times) degrees of freedom.
    - The variance between chains, which also sees chains that settled in different places.

    Each may be too small by chance or by design, none is too large by design.
    """
    chains, length = draws.shape
    candidates = []
    if chains and length >= 4:
        batches = math.ceil(length ** (1 / 3))
        means = _batch_means(draws, batches)
        within = means.var(axis=1, ddof=1).mean()
        candidates.append(StandardError(math.sqrt(within / (chains * batches)), chains * (batches - 1)))
        error, variance = error_within(draws), float(draws.var(axis=1).mean())
        if error > 0:
            effective = chains * variance / error**2
            candidates.append(StandardError(error / math.sqrt(chains), max(1, int(effective / 3))))
    if chains >= 2:
        between = draws.mean(axis=1).var(ddof=1)
        candidates.append(StandardError(math.sqrt(between / chains), chains - 1))
    return max(candidates, default=StandardError(math.nan, 0))


def _batch_means(draws: NDArray[np.float64], batches: int) -> NDArray[np.float64]:
    """Means ``[chain, batch]`` of consecutive batches of equal length; what is left over is dropped at the start."""
    chains, length = draws.shape
    size = length // batches
    means: NDArray[np.float64] = draws[:, length - batches * size :].reshape(chains, batches, size).mean(axis=2)
    return means


# ---- traces ------------------------------------------------------------------------------------------------


class Drift(NamedTuple):
    """How far the mean moved from the first draw to the last, and the standard error of that."""

    value: float
    stderr: float


def drift(draws: NDArray[np.float64]) -> Drift:
    """The trend of draws ``[chain, draw]``: a line through batch means, fitted by least squares, times its length.

    The error is the larger of two: from the residuals of about √draws batch means, long enough to be nearly
    independent, and from the spread of the chains' slopes. NaN with fewer than nine draws.
    """
    chains, length = draws.shape
    batches = math.isqrt(length)
    if not chains or batches < 3:
        return Drift(math.nan, math.nan)
    means = _batch_means(draws, batches)
    time = (np.arange(batches) - (batches - 1) / 2) / batches
    slopes = means @ time / (time @ time)
    residuals = means - means.mean(axis=1, keepdims=True) - np.outer(slopes, time)
    variances = [float((residuals**2).sum()) / (chains * (batches - 2)) / (time @ time)]
    if chains > 1:
        variances.append(float(slopes.var(ddof=1)))
    return Drift(float(slopes.mean()), math.sqrt(max(variances) / chains))


class SlowPart(NamedTuple):
    """What moves slowly beneath the noise of single draws.

    Attributes:
        times: how many of its autocorrelation times a chain spans.
        size: its standard deviation, in units of the draws.
    """

    times: float
    size: float


def slow_part(draws: NDArray[np.float64]) -> SlowPart:
    """The part of draws ``[chain, draw]`` that means of about √draws consecutive ones have in common with the next.

    R̂ and effective sample sizes of draws whose variance is mostly minibatch noise are those of the noise: it forgets at
    once, and hides chains that have hardly moved. Batch means average it away. NaN with fewer than 256 draws, whose 16
    means have no autocorrelation time worth the name.
    """
    chains, length = draws.shape
    if not chains or length < 256:
        return SlowPart(math.nan, math.nan)
    means = _batch_means(draws, math.isqrt(length))
    away = means - means.mean()
    shared = float((away[:, 1:] * away[:, :-1]).mean())
    return SlowPart(ess_mean(means) / chains, math.sqrt(max(shared, 0.0)))


def burnin_needed(losses: NDArray[np.float64], num_windows: int = 100) -> int:
    """Steps until a loss trace ``[chain, step]``, burn-in included, has reached where it stays.

    The mean over chains, smoothed over windows of a hundredth of the run, is compared with the windows of the second
    half: there is the plateau, if there is one (else see :func:`drift`). The trace has reached it once it enters the
    band of three of their standard deviations, and has not, while it is beyond five.
    """
    size: int = max(1, losses.shape[1] // num_windows)
    count = losses.shape[1] // size
    if not losses.size or count < 8:
        return 0
    windows = losses[:, : count * size].mean(axis=0).reshape(count, size).mean(axis=1)
    late = windows[count // 2 :]
    apart = np.abs(windows - late.mean()) / max(float(late.std(ddof=1)), 1e-300)
    entered = int(np.argmax(apart <= 3))
    beyond = [int(k) for k in np.flatnonzero(apart[: count // 2] > 5)]
    return size * max(entered, 1 + max(beyond, default=-1))


def spike_share(draws: NDArray[np.float64]) -> float:
    """The share of the mean of draws ``[chain, draw]`` that comes from spikes.

    Spikes lie further above the median than five times the 99 % quantile does. Draws of a chi-square law, which a
    regular model gives, are not spikes: of a million with one degree of freedom the largest is at 3.9 times.
    """
    if not draws.size:
        return math.nan
    median, high = np.quantile(draws, [0.5, 0.99])
    cut, mean = median + 5 * (high - median), abs(float(draws.mean()))
    return float(np.maximum(draws - cut, 0).mean()) / mean if mean > 0 else math.nan


def chain_spread(draws: NDArray[np.float64]) -> float:
    """Variance of the chain means over what the fluctuations within chains explain, over what chance would make of it.

    Chance exceeds 1 about once in 10⁵ runs (Wilson & Hilferty's χ² quantile). NaN with fewer than two chains.
    """
    chains = len(draws)
    within = error_within(draws)
    if chains < 2 or not within > 0:
        return math.nan
    share = 2 / (9 * (chains - 1))
    chance = (1 - share + 4.26 * math.sqrt(share)) ** 3
    return float(draws.mean(axis=1).var(ddof=1)) / within**2 / chance


# ---- probes ------------------------------------------------------------------------------------------------


class ProbeFigures(NamedTuple):
    """What probes say; NaN where they say nothing.

    Attributes:
        acceptance: mean probability that a Metropolis–Hastings test would accept a step (MALA), with the same
            minibatch at both ends.
        gradient_noise_share: of a step's noise, the share that comes from the minibatch: r/(1 + r), with r the
            variance (ε/2)²p²nβ²·Var(g) over the injected ε·p, averaged over parameters.
        heating: the share of λ̂ that is an artefact of the step size, (ε/8)·E[Σ p·G·nβ·g]/λ̂. In a quadratic well
            stationarity of ‖w − w*‖² gives E[½(w − w*)·∇U] = P/2 + (ε/8)·E[Σ p·G²] for steps with the stochastic
            drift G; each direction gives nβ·L its share of that. Exact there without minibatches, an upper bound with
            them, and in wells that are flatter than quadratic.
        relaxation_rate: in 1/step, of the stiff directions that make up λ̂: ε/2·(tr(H²)/tr(H) + γ), H the Hessian of
            nβ·L in the sampler's metric.
        distance: ‖w − w*‖ of each chain at its last probe.
        growth: of the chains' mean ‖w − w*‖² from the first probe to the last, as a factor.
    """

    acceptance: float
    gradient_noise_share: float
    heating: float
    relaxation_rate: float
    distance: list[float]
    growth: float


def probe_figures(
    probes: NDArray[np.float64],
    *,
    llc: float,
    lr: float,
    num_parameters: int,
    localization: float = 0.0,
    friction: float = 1.0,
) -> ProbeFigures:
    """Figures of the probes ``[chain, probe, column]`` of the chains that λ̂ comes from.

    Args:
        probes: see ``llc_fast.probes.COLUMNS``.
        llc: λ̂.
        lr: ε.
        num_parameters: P.
        localization: γ, where the metric is 1; in others it pulls each direction differently, and is left out.
        friction: of a sampler with momentum, whose steps inject ε·friction.
    """
    columns = {name: probes[:, :, k] for k, name in enumerate(COLUMNS)}
    mean = {name: _mean(values) for name, values in columns.items()}
    ratio = lr / 4 * mean["gradient_noise"] / num_parameters / friction
    curvature = mean["curvature"]
    accepted = np.exp(np.minimum(columns["log_acceptance"], 0.0))
    distances = columns["distance"]
    done = distances[:, np.isfinite(distances).all(axis=0)] if len(distances) else distances[:, :0]
    last = done[:, -1].tolist() if done.shape[1] else []
    first = float(done[:, 0].mean()) if last else 0.0
    return ProbeFigures(
        acceptance=_mean(accepted),
        gradient_noise_share=ratio / (1 + ratio),
        heating=lr / 8 * mean["heat"] / llc if llc > 0 else math.nan,
        relaxation_rate=lr / 2 * (mean["squared_curvature"] / curvature + localization) if curvature > 0 else math.nan,
        distance=[math.sqrt(d) for d in last],
        growth=sum(last) / len(last) / first if first > 0 else math.nan,
    )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
