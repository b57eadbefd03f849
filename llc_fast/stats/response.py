"""How a mean over chains answers to the localization γ, from the chains themselves."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llc_fast.stats.errors import standard_error
from llc_fast.stats.traces import trend

MEMORY = 2.0
"""Chains forget a push after a few 1/γ of time: in what γ holds half, 98 % of it is over after this many."""


class Response(NamedTuple):
    """dλ̂/dlog γ and its standard error; NaN where it is not known."""

    value: float
    stderr: float


UNKNOWN = Response(math.nan, math.nan)


def response_of_path(
    excess: NDArray[np.float64],
    squared_distance: NDArray[np.float64],
    draws: NDArray[np.float64],
    draw_steps: NDArray[np.int64],
    *,
    localization: float,
    time_step: float,
) -> Response:
    """dλ̂/dlog γ of chains as they are, long or short, settled or not: the likelihood-ratio estimator of their paths.

    With x = w − w* and time t a chain is dx = −½(nβ∇L + γx)dt + dW. Another γ changes the density of its path by the
    factor 1 − (δγ/2)·M with M = ∫x·dW, so d E[f]/dlog γ = −(γ/2)·Cov(f, M) for whatever f is measured at its end.
    ‖x‖² knows M, as d‖x‖² = −x·(nβ∇L + γx)dt + P·dt + 2x·dW:

        M = ½·(‖x_t‖² − ‖x_0‖² − P·t + ∫(nβ·x·∇L + γ‖x‖²)dt),        nβ·x·∇L ≈ 2f, f = nβ(L − L(w*)),

    the last as in quadratic directions (others forget faster than γ pulls, so that it hardly matters there). Only the
    last `MEMORY`/γ of a path count. Covariances are those over chains at equal times, so that P·t and all else that is
    common to them cancels. In settled chains this is −(γ/2)·Cov(f, ‖x‖²), the derivative of the posterior mean.

    Its noise comes from the P directions that γ alone holds, √(λP·min(γt, 2)/4) over the root of the number of
    independent draws, which in large models may be larger than what it is to find.

    Args:
        excess: nβ(L − L(w*)) of each step, ``[chain, step]``, up to the last draw at least.
        squared_distance: ‖x‖² of each step, where the loss was taken.
        draws: f, ``[chain, draw]``.
        draw_steps: the steps that these are.
        localization: γ > 0.
        time_step: the time that a step takes, ε, or ε over the friction.

    Returns:
        Unknown for a single chain.
    """
    chains = len(draws)
    if chains < 2 or not draws.size:
        return UNKNOWN
    pull = (2 * excess + localization * squared_distance) * time_step
    done = np.cumsum(pull, axis=1) - pull  # before each step
    martingale = 0.5 * (squared_distance + done)
    memory = math.ceil(min(MEMORY / (localization * time_step), excess.shape[1]))
    change = martingale[:, draw_steps] - martingale[:, np.maximum(draw_steps - memory, 0)]
    change -= change.mean(axis=0)
    products = (draws - draws.mean()) * change * (chains / (chains - 1))
    return _scaled(products, localization)


def response_if_settled(
    draws: NDArray[np.float64], squared_distance: NDArray[np.float64], *, localization: float
) -> Response:
    """−(γ/2)·Cov(f, ‖w − w*‖²) over draws ``[chain, draw]`` of f: dλ̂/dlog γ, if they are from the posterior.

    It is unknown where ‖w − w*‖² still has a trend: the covariance is then that of two trends.
    """
    moved = trend(squared_distance)
    if not draws.size or abs(moved.value) > max(3 * moved.stderr, 0.5 * float(squared_distance.std())):
        return UNKNOWN
    return _scaled((draws - draws.mean()) * (squared_distance - squared_distance.mean()), localization)


def _scaled(products: NDArray[np.float64], localization: float) -> Response:
    return Response(-localization / 2 * float(products.mean()), localization / 2 * standard_error(products).value)
