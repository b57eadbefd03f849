"""How λ̂ answers to γ: chains in quadratic wells, whose mean energy at any time is known."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from llc_fast.stats.response import MEMORY, Response, response_if_settled, response_of_path

Array = NDArray[np.float64]


class Well(NamedTuple):
    """Directions of curvature nβh, and so many more that the loss does not see."""

    curvature: Array
    flat: int
    localization: float

    def mean(self, times: Array, localization: float) -> float:
        """Of nβ(L − L(w*)) over these times after a start at w*: Σ ½·nβh/a·(1 − e^(−a·t)), a = nβh + γ."""
        a = self.curvature + localization
        return float((0.5 * self.curvature / a * (1 - np.exp(-np.outer(times, a)))).sum(axis=1).mean())

    def answer(self, times: Array) -> float:
        """dλ̂/dlog γ."""
        up, down = (self.mean(times, self.localization * (1 + e)) for e in (1e-4, -1e-4))
        return (up - down) / 2e-4

    def chains(
        self, rng: np.random.Generator, *, lr: float, friction: float, chains: int, steps: int
    ) -> tuple[Array, Array]:
        """nβ(L − L(w*)) and ‖w − w*‖² of SGHMC with exact gradients, SGLD at friction 1, ``[chain, step]``."""
        curvature = np.concatenate([self.curvature, np.zeros(self.flat)])
        x, v = np.zeros((chains, len(curvature))), np.zeros((chains, len(curvature)))
        excess, distance = np.empty((chains, steps)), np.empty((chains, steps))
        for step in range(steps):
            excess[:, step], distance[:, step] = 0.5 * (x**2 @ curvature), (x**2).sum(axis=1)
            v = (1 - friction) * v - 0.5 * lr * (curvature + self.localization) * x
            v += math.sqrt(lr * friction) * rng.standard_normal(x.shape)
            x = x + v
        return excess, distance


@pytest.mark.parametrize("friction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("localization", "flat"),
    [(8.0, 0), (2.0, 200), (0.05, 1000)],
    ids=["settled", "flat directions on their way", "hardly moved"],
)
def test_chains_of_any_length_know_their_answer(localization: float, flat: int, friction: float) -> None:
    well = Well(np.geomspace(0.2, 100, 20), flat, localization)
    lr, burnin, steps, repeats = 2e-3 * friction, 500, 1000, 24
    times = lr / friction * np.arange(burnin, steps)
    known, rng = well.answer(times), np.random.default_rng(0)
    found, naive = [], []
    for _ in range(repeats):
        excess, distance = well.chains(rng, lr=lr, friction=friction, chains=4, steps=steps)
        naive.append(np.cov(excess[:, burnin:].ravel(), distance[:, burnin:].ravel())[0, 1])
        found.append(
            response_of_path(
                excess,
                distance,
                excess[:, burnin:],
                np.arange(burnin, steps),
                localization=localization,
                time_step=lr / friction,
            )
        )
    values, errors = (np.array(x) for x in zip(*found, strict=True))
    said = float(np.sqrt((errors**2).mean()))
    assert abs(values.mean() - known) < 4 * values.std(ddof=1) / math.sqrt(repeats)
    # Stated errors are those that there are; the standard deviation of so few has an error of 15 %.
    assert 0.6 * values.std(ddof=1) < said < 1.7 * values.std(ddof=1)
    if localization < 1:
        # Draws alone see two quantities on their way.
        drawn = -localization / 2 * np.array(naive)
        assert np.sqrt(((drawn - known) ** 2).mean()) > 2.5 * np.sqrt(((values - known) ** 2).mean())


def test_what_is_forgotten_adds_no_noise() -> None:
    """Only the last of a long path counts: twice the path gives no more noise for a draw."""
    well = Well(np.array([1.0, 10.0]), 50, 4.0)
    rng, lr = np.random.default_rng(1), 5e-3
    spread = {}
    for steps in (1000, 4000):
        found = []
        for _ in range(40):
            excess, distance = well.chains(rng, lr=lr, friction=1.0, chains=2, steps=steps)
            last = np.arange(steps - 300, steps)
            found.append(
                response_of_path(excess, distance, excess[:, last], last, localization=4.0, time_step=lr).value
            )
        spread[steps] = float(np.std(found))
    assert MEMORY / (4.0 * lr) < 300 and spread[4000] < 1.6 * spread[1000]


def test_where_it_is_not_known() -> None:
    rng = np.random.default_rng(2)
    excess, distance = Well(np.array([1.0]), 10, 1.0).chains(rng, lr=1e-2, friction=1.0, chains=1, steps=50)
    alone = response_of_path(excess, distance, excess[:, 10:], np.arange(10, 50), localization=1.0, time_step=1e-2)
    assert all(map(math.isnan, alone))
    none = np.empty((4, 0))
    assert all(map(math.isnan, response_if_settled(none, none, localization=1.0)))


def test_settled_draws_know_it_from_the_distance_and_others_say_nothing() -> None:
    """Independent draws: Cov(½·nβh·x², x²) = nβh·Var(x)², so −(γ/2)·Σ nβh/a². With a trend there is no answer."""
    well, gamma = Well(np.array([0.5, 2.0, 20.0]), 5, 3.0), 3.0
    widths = 1 / np.sqrt(np.concatenate([well.curvature, np.zeros(well.flat)]) + gamma)
    x = widths * np.random.default_rng(3).standard_normal((4, 5000, len(widths)))
    excess, distance = 0.5 * (x[..., :3] ** 2 @ well.curvature), (x**2).sum(axis=2)
    found = response_if_settled(excess, distance, localization=gamma)
    known = -gamma / 2 * float((well.curvature / (well.curvature + gamma) ** 2).sum())
    assert abs(found.value - known) < 4 * found.stderr < 0.2 * abs(known)
    assert known == pytest.approx(well.answer(np.array([1e3])), rel=1e-6)
    moving = distance + np.linspace(0, 5, 5000)
    assert isinstance(response_if_settled(excess, moving, localization=gamma), Response)
    assert math.isnan(response_if_settled(excess + np.linspace(0, 5, 5000), moving, localization=gamma).value)
