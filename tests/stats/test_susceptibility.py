"""Susceptibilities: against a loop in float64, derivatives by quadrature, and the spread over repetitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from devinterp_versions import devinterp_2
from scipy import stats

from llc_fast.stats.susceptibility import ProbeDraws, Susceptibilities, susceptibilities

Array = np.ndarray[Any, np.dtype[np.float64]]


# ---- a posterior of two parameters on a grid ------------------------------------------------------------------


class _Grid:
    """u and v on a grid with probabilities ∝ exp(−nβL − (γ/2)(u² + v²)), from which draws are exact.

    L is the mean over eight samples of ½(y − f)² with f = (1 + u)(1 + v)x + u²; w* is (0, 0); the probe is the losses
    of four of these and of two others. The component is v: its chains have u = 0.
    """

    nbeta, gamma = 20.0, 3.0

    def __init__(self, nbeta: float = 20.0) -> None:
        self.nbeta = nbeta
        side = np.linspace(-2, 2, 161)
        self.zero = 80
        u, v = np.meshgrid(side, side, indexing="ij")
        rng = np.random.default_rng(3)
        x = rng.standard_normal(10)
        y = x + 0.3 * rng.standard_normal(10)
        losses = 0.5 * (y - (1 + u[..., None]) * (1 + v[..., None]) * x - u[..., None] ** 2) ** 2
        self.loss = losses[..., :8].mean(axis=-1)
        self.probe = losses[..., 4:]
        self.reference = float(self.loss[self.zero, self.zero])
        self.localization = np.exp(-0.5 * self.gamma * (u**2 + v**2))

    def density(self, item: int | None = None, eps: float = 0.0) -> Array:
        """Not normalized, with the perturbation ε·(ℓ − L) of one item's loss."""
        change = 0.0 if item is None else eps * (self.probe[..., item] - self.loss)
        found: Array = self.localization * np.exp(-self.nbeta * self.loss - change)
        return found

    def draws(self, seed: int, count: int, *, restricted: bool) -> ProbeDraws:
        rng = np.random.default_rng(seed)
        density = self.density()
        if restricted:
            density = np.where(np.arange(161)[:, None] == self.zero, density, 0.0)
        places = rng.choice(density.size, size=(4, count), p=(density / density.sum()).ravel())
        return ProbeDraws(self.probe.reshape(-1, 6)[places], self.loss.ravel()[places])

    def derivative(self, item: int, *, restricted: bool, eps: float = 1e-4) -> float:
        """By central differences. Restricted: of ∫φ(0, v)p(0, v)dv, over the density p has at u = 0."""

        def mean(eps: float) -> float:
            density = self.density(item, eps)
            excess = self.loss - self.reference
            if not restricted:
                return float((excess * density).sum() / density.sum())
            base = self.density()
            share = base[self.zero].sum() / base.sum()
            return float((excess * density)[self.zero].sum() / density.sum() / share)

        return (mean(eps) - mean(-eps)) / (2 * eps)


def test_derivatives_by_quadrature() -> None:
    """Each within two standard errors, and those are small beside it."""
    grid = _Grid()
    full, component = grid.draws(1, 20000, restricted=False), grid.draws(2, 20000, restricted=True)
    found = susceptibilities({"v": component, "all": full}, full, grid.reference)
    exact = np.array([[grid.derivative(k, restricted=restricted) for k in range(6)] for restricted in (True, False)])
    assert np.abs((found.value - exact) / found.stderr).max() < 2
    assert np.abs(found.stderr / exact).max() < 0.1
    assert found.significant().all() and found.components == ("v", "all")


def test_errors_are_the_spread_of_repetitions() -> None:
    """Of 60: of independent draws, the component's and the unrestricted."""
    grid = _Grid()
    exact = np.array([[grid.derivative(k, restricted=restricted) for k in range(6)] for restricted in (True, False)])
    z, inside = [], []
    for seed in range(60):
        full, component = (grid.draws(2 * seed + k, 400, restricted=bool(k)) for k in (0, 1))
        found = susceptibilities({"v": component, "all": full}, full, grid.reference)
        z.append((found.value - exact) / found.stderr)
        inside.append(np.abs(z[-1]) < stats.t.ppf(0.975, found.degrees_of_freedom))
    assert np.std(z, axis=0) == pytest.approx(1, abs=0.3)  # 60 repetitions know it to 9 %, of t with 31 degrees
    assert np.abs(np.mean(z, axis=0)).max() < 0.5
    assert 0.92 < np.mean(inside) < 0.98


# ---- against plain formulas ----------------------------------------------------------------------------------


def _made_up(chains: int = 3, draws: int = 60, items: int = 5, seed: int = 0, rho: float = 0.0) -> ProbeDraws:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((chains, draws, 1))
    for t in range(1, draws if rho else 0):
        common[:, t] = rho * common[:, t - 1] + math.sqrt(1 - rho**2) * common[:, t]
    probe = 3 + common * np.linspace(0.2, 1, items) + 0.1 * rng.standard_normal((chains, draws, items))
    loss = 2.5 + common[:, :, 0] ** 2 + 0.1 * rng.standard_normal((chains, draws))
    return ProbeDraws(probe.astype(np.float32), loss)


def _by_hand(component: ProbeDraws, full: ProbeDraws, reference: float) -> list[float]:
    found = []
    for item in range(component.probe.shape[2]):
        product = excess = difference = 0.0
        chains, draws = component.loss.shape
        for c in range(chains):
            for d in range(draws):
                phi = float(component.loss[c, d]) - reference
                product += phi * (float(component.probe[c, d, item]) - float(component.loss[c, d])) / (chains * draws)
                excess += phi / (chains * draws)
        chains, draws = full.loss.shape
        for c in range(chains):
            for d in range(draws):
                difference += (float(full.probe[c, d, item]) - float(full.loss[c, d])) / (chains * draws)
        found.append(-(product - excess * difference))
    return found


def test_values() -> None:
    """By loops over draws; the runs may have other numbers of chains and draws; memory changes nothing."""
    full, first, second = _made_up(4, 50), _made_up(seed=1), _made_up(2, 80, seed=2)
    for memory in (1, 1 << 28):
        found = susceptibilities({"a": first, "b": second, "all": full}, full, 2.0, memory=memory)
        expected = [_by_hand(draws, full, 2.0) for draws in (first, second, full)]
        np.testing.assert_allclose(found.value, expected, rtol=1e-9)
        np.testing.assert_allclose(found.phi, [draws.loss.mean() - 2.0 for draws in (first, second, full)])
    assert found.full_blocks == 4 * (50 // (50 // math.ceil(32 / 4)))


def test_devinterp_has_the_same() -> None:
    devinterp_2()
    import xarray as xr
    from devinterp.slt.susceptibilities import compute_susceptibilities

    def tree(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        common = rng.standard_normal((3, 40, 1, 1))
        variables: dict[str, Any] = {"init_loss": (("chain",), np.full(3, 2.5, np.float32))}
        for name, size in (("data", 4), ("probe", 5)):
            losses = 3 + 0.3 * common * rng.random((size, 7)) + 0.1 * rng.standard_normal((3, 40, size, 7))
            variables[f"loss_{name}"] = (("chain", "draw", f"batch_{name}", "token_pos"), losses.astype(np.float32))
            variables[f"input_ids_{name}"] = ((f"batch_{name}", "token"), np.zeros((size, 8), int))
        return xr.DataTree(dataset=xr.Dataset(variables))

    def draws(tree: Any) -> ProbeDraws:
        loss = tree["loss_data"].values.astype(np.float64).mean(axis=(2, 3))
        return ProbeDraws(tree["loss_probe"].values.reshape(3, 40, 35), loss)

    full, component = tree(0), tree(1)
    theirs = compute_susceptibilities({"full": full, "l0": component}, "data")
    ours = susceptibilities({"l0": draws(component)}, draws(full), 2.5)
    np.testing.assert_allclose(ours.value[0], theirs["susceptibilities"]["sus"].values[:, 0], atol=1e-5)


def test_errors_by_hand() -> None:
    """Block means of what each draw adds, from both runs; degrees of freedom by Welch and Satterthwaite."""
    full, component = _made_up(4, 320), _made_up(8, 200, seed=1)
    found = susceptibilities({"c": component}, full, 2.0)

    def variance(values: Array, per_chain: int) -> Array:
        means = values.reshape(len(values) * per_chain, -1, values.shape[2]).mean(axis=1)
        return means.var(axis=0, ddof=1) / len(means)  # type: ignore[no-any-return]

    difference = np.asarray(full.probe) - full.loss[:, :, None]
    phi = component.loss - 2.0
    terms = phi[:, :, None] * (np.asarray(component.probe) - component.loss[:, :, None] - difference.mean(axis=(0, 1)))
    parts = variance(terms, 4), phi.mean() ** 2 * variance(difference, 8)
    np.testing.assert_allclose(found.stderr[0] ** 2, parts[0] + parts[1])
    degrees = (parts[0] + parts[1]) ** 2 / (parts[0] ** 2 / 31 + parts[1] ** 2 / 31)
    np.testing.assert_allclose(found.degrees_of_freedom[0], degrees)
    np.testing.assert_allclose(found.phi_stderr[0] ** 2, variance(phi[:, :, None], 4)[0])
    np.testing.assert_allclose(found.p, 2 * stats.t.sf(np.abs(found.z), found.degrees_of_freedom))


def test_blocks_are_as_long_as_draws_remember() -> None:
    """Of an AR(1) process with a time of 9: errors are the spread of 40 repetitions, which is known to 11 %.

    Errors of independent draws would be less than half of it.
    """
    found = []
    for seed in range(0, 80, 2):
        component, full = (_made_up(4, 1500, seed=seed + k, rho=0.8) for k in (0, 1))
        found.append(susceptibilities({"c": component}, full, 2.0))
    spread = np.std([each.value for each in found], axis=0)
    errors = np.sqrt(np.mean([each.stderr**2 for each in found], axis=0))
    np.testing.assert_allclose(errors, spread, rtol=0.3)


def test_too_few_blocks_have_no_error() -> None:
    found = susceptibilities({"c": _made_up(1, 12)}, _made_up(4, 100, seed=1), 2.0)
    assert np.isfinite(found.value).all() and np.isnan(found.stderr).all() and not found.significant().any()
    assert found.num_blocks[0] < 8


# ---- two kinds of z-scores, significance, the control -----------------------------------------------------------


def _made(value: Array, stderr: Array, degrees: float = 31.0) -> Susceptibilities:
    ones = np.ones(len(value))
    names = tuple(f"c{k}" for k in range(len(value)))
    return Susceptibilities(names, value, stderr, np.full(value.shape, degrees), ones, ones, (32,) * len(value), 32)


def test_z_scores() -> None:
    found = _made(np.array([[1.0, 2, 3], [5, 5, 5]]), np.array([[0.5, 1, 1], [1, 0, 1]]))
    np.testing.assert_array_equal(found.z, [[2, 2, 3], [5, math.nan, 5]])
    np.testing.assert_allclose(found.standardized[0], stats.zscore([1, 2, 3]))
    assert np.isnan(found.standardized[1]).all()


def test_significance_is_over_all_entries() -> None:
    rng = np.random.default_rng(0)
    value = np.concatenate([rng.standard_normal((5, 40)), 6 + rng.standard_normal((1, 40))])
    found = _made(value, np.ones_like(value))
    expected = stats.false_discovery_control(found.p, axis=None).reshape(6, 40) <= 0.1
    np.testing.assert_array_equal(found.significant(0.1), expected)
    assert expected[5].all() and expected[:5].mean() < 0.1


def test_the_control() -> None:
    """What is as large at nβ = 0 does not exceed it, of whatever sign; what is far larger does."""
    found = _made(np.array([[10.0, -10, 3, 0]]), np.ones((1, 4)))
    control = _made(np.array([[1.0, 0, -10, 0]]), np.full((1, 4), 0.5))
    beside = found.against(control)
    np.testing.assert_array_equal(beside.difference, [[9, -10, 13, 0]])
    np.testing.assert_allclose(beside.stderr, math.hypot(1, 0.5))
    np.testing.assert_allclose(beside.z, beside.difference / math.hypot(1, 0.5))
    assert beside.exceeds.tolist() == [[True, True, False, False]]
    with pytest.raises(ValueError, match=r"control has components \('c0',\) and shape \(1, 3\)"):
        found.against(_made(np.ones((1, 3)), np.ones((1, 3))))


# ---- what is refused -----------------------------------------------------------------------------------------


def test_arguments() -> None:
    good = _made_up()
    with pytest.raises(ValueError, match="components is empty"):
        susceptibilities({}, good, 2.0)
    with pytest.raises(ValueError, match="reference_loss=nan must be"):
        susceptibilities({"c": good}, good, math.nan)
    with pytest.raises(ValueError, match=r"components\['c'\].probe has 4 items, but full.probe has 5"):
        susceptibilities({"c": _made_up(items=4)}, good, 2.0)
    with pytest.raises(ValueError, match=r"full.loss has shape \(3, 59\), but its probe has 3 chains of 60 draws"):
        susceptibilities({"c": good}, ProbeDraws(good.probe, good.loss[:, 1:]), 2.0)


@pytest.mark.parametrize("where", ["probe", "loss"])
def test_losses_that_are_not_finite(where: str) -> None:
    good, bad = _made_up(), _made_up(seed=1)
    getattr(bad, where)[1, 7] = np.inf
    with pytest.raises(ValueError, match=rf"components\['c'\].{where} is inf at chain 1, draw 7"):
        susceptibilities({"c": bad}, good, 2.0)
    with pytest.raises(ValueError, match=rf"full.{where} is inf at chain 1, draw 7"):
        susceptibilities({"c": good}, bad, 2.0)
