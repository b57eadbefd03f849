"""llc_fast.susceptibilities: runs and numbers end to end, against quadrature, loops over the stores, and devinterp."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devinterp_versions import devinterp_2
from language_models import VOCABULARY, gpt_neox
from regression import mlp, samples
from runs import interrupted_after, no_step
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import llc_fast
from llc_fast import Samples, sampling
from llc_fast.susceptibility import SusceptibilityResult, _parts

pytest.importorskip("zarr")
pytest.importorskip("xarray")
pytestmark = pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")

Array = np.ndarray[Any, np.dtype[np.float64]]
SHORT: dict[str, Any] = {
    **{"num_chains": 3, "num_draws": 40, "num_burnin": 5, "nbeta": 5.0, "localization": 1.0, "lr": 1e-2},
    **{"batch_size": 6, "progress": False},
}
"""Of the small perceptron."""
PARTS = ["0.*", "2.*"]


def short(**options: Any) -> SusceptibilityResult:
    return llc_fast.susceptibilities(
        mlp(), samples(), F.mse_loss, options.pop("probes", {"test": samples()}), options.pop("components", PARTS),
        **(SHORT | options),
    )  # fmt: skip


# ---- two parameters, against integrals --------------------------------------------------------------------------


class TwoParameters(nn.Module):
    """f = (1 + u)(1 + v)x + u², w* = (0, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.u) * (1 + self.v) * x + self.u**2


class Plane:
    """The model's posterior on a grid. L is the mean of (y − f)² over eight samples; two of the probe's are others."""

    gamma = 6.0

    def __init__(self, nbeta: float) -> None:
        side = np.linspace(-2.5, 2.5, 401)
        self.zero = 200
        u, v = (a[..., None] for a in np.meshgrid(side, side, indexing="ij"))
        rng = np.random.default_rng(3)
        self.x = rng.standard_normal(10)
        self.y = self.x + 0.3 * rng.standard_normal(10)
        losses = (self.y - (1 + u) * (1 + v) * self.x - u**2) ** 2
        self.loss, self.probe = losses[..., :8].mean(axis=-1), losses[..., 4:]
        exponent = -nbeta * self.loss - 0.5 * self.gamma * (u**2 + v**2)[..., 0]
        self.density = np.exp(exponent - exponent.max())

    def chi(self, component: str) -> Array:
        """χ of all six samples by its definition."""
        excess = self.loss - self.loss[self.zero, self.zero]
        delta = self.probe - self.loss[..., None]
        line = (slice(None), self.zero) if component == "u" else (self.zero, slice(None))
        p, q = self.density[line] / self.density[line].sum(), self.density / self.density.sum()
        product = (p[:, None] * excess[line][:, None] * delta[line]).sum(axis=0)
        found: Array = -(product - (p * excess[line]).sum() * (q[..., None] * delta).sum(axis=(0, 1)))
        return found

    def data(self, part: slice) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.x[part]), torch.from_numpy(self.y[part])


def in_plane(nbeta: float, **options: Any) -> SusceptibilityResult:
    plane = Plane(nbeta)
    given = {"sampler": "mala", "num_chains": 4, "num_draws": 700, "num_burnin": 150, "localization": plane.gamma}
    return llc_fast.susceptibilities(
        TwoParameters(), plane.data(slice(8)), F.mse_loss, {"probe": plane.data(slice(4, 10))}, ["u", "v"],
        nbeta=nbeta, progress=False, **(given | options),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "bound"), [(700, 2), (4000, 3)])
def test_two_parameters(draws: int, bound: float) -> None:
    """χ within two standard errors of the integrals, and so is the control's.

    Entries of a row have errors in common. One of four rows is outside of two in every sixth run, so longer chains
    are given three.
    """
    found = in_plane(20.0, num_draws=draws)
    control = found.control()
    assert control is not None
    few = math.sqrt(700 / draws)
    for result, nbeta, most in ((found.chi(), 20.0, 0.25 * few), (control, 0.0, 0.4 * few)):
        exact = np.stack([Plane(nbeta).chi(name) for name in ("u", "v")])
        z = (result.value - exact) / result.stderr
        assert np.abs(z).max() < bound, z
        assert np.median(result.stderr / np.abs(exact)) < most
    assert found.reference_loss == pytest.approx(float(Plane(1.0).loss[200, 200]), rel=1e-6)
    assert found.components == ("u", "v") and found.significant().mean() > 0.7


def test_nothing_exceeds_the_control_where_the_posterior_is_the_localization() -> None:
    """At nβ = 1e-6. Entries differ from 0 all the same: that alone says nothing of the loss."""
    found = in_plane(1e-6, lr=0.1, num_draws=300)
    assert not found.against_control().exceeds.any()
    assert np.abs(found.against_control().z).max() < 3.5  # of 12 entries
    assert found.significant().any()


# ---- numbers from the stores ------------------------------------------------------------------------------------


def by_hand(component: Samples, full: Samples, probe: str) -> Array:
    """A loop over draws in float64."""

    def losses(samples: Samples, name: str) -> Array:
        found: Array = np.asarray(samples.losses(name).values, np.float64)
        return found.reshape(*found.shape[:2], -1)

    def mean(samples: Samples, weights: Callable[[float], float]) -> Array:
        data, values = losses(samples, "data"), losses(samples, probe)
        total = np.zeros(values.shape[2])
        for chain in range(values.shape[0]):
            for draw in range(values.shape[1]):
                loss = sum(data[chain, draw]) / data.shape[2]
                total += weights(loss) * (values[chain, draw] - loss)
        return total / (values.shape[0] * values.shape[1])

    at_reference = full.init_losses("data")
    assert at_reference is not None
    reference = float(at_reference.astype(np.float64).mean())
    phi = float(losses(component, "data").mean()) - reference
    return -(mean(component, lambda loss: loss - reference) - phi * mean(full, lambda loss: 1.0))


def test_numbers_are_those_of_the_stores(tmp_path: Path) -> None:
    found = short(store=tmp_path, probes={"test": samples(), "few": tuple(t[:5] for t in samples())})
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {
        f"{quoted}{name}.zarr" for quoted in ("", "control%3A ") for name in ("all weights", "0.%2A", "2.%2A")
    }
    assert found.probes == ("test", "few") and found.lr["0.*"] == 1e-2 != found.lr["control: 0.*"]
    for probe in found.probes:
        for prefix, result in (("", found.chi(probe)), ("control: ", found.control(probe))):
            assert result is not None
            full = Samples.open(tmp_path / f"{prefix.replace(':', '%3A')}all weights.zarr")
            for k, name in enumerate(("0.%2A", "2.%2A")):
                component = Samples.open(tmp_path / f"{prefix.replace(':', '%3A')}{name}.zarr")
                np.testing.assert_allclose(result.value[k], by_hand(component, full, probe), rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="probe must be one of 'test', 'few', got None"):
        found.chi()


def test_what_runs_share() -> None:
    """nβ, γ and the places of samples; not the random numbers. Only the component moves."""
    shared = short(probes={"test": (samples(), 2)}, localization=None, nbeta=None)
    places = [each.dataset["indices_test"].values for each in shared.samples.values()]
    assert all((each == places[0]).all() for each in places)
    full = shared.samples["all weights"]
    assert full.nbeta == pytest.approx(llc_fast.default_nbeta(24))
    for name, each in shared.samples.items():
        assert each.settings["localization"] == shared.localization == full.settings["localization"]
        assert each.nbeta == (0 if name.startswith("control") else full.nbeta)
    assert len({each.settings["seed"] for each in shared.samples.values()}) == 6
    assert shared.samples["0.*"].llc().settings["num_parameters"] == 16


def test_a_component_that_is_added_changes_no_other() -> None:
    first, second = short(components=["0.*"]), short(components={"b": "2.*", "0.*": ["0.weight", "0.bias"]})
    assert second.components == ("b", "0.*")
    np.testing.assert_array_equal(first.chi().value[0], second.chi().value[1])
    np.testing.assert_array_equal(first.chi().stderr[0], second.chi().stderr[1])


def test_a_probe_called_data_is_the_data() -> None:
    x, y = samples()
    found = short(probes={"data": (x[:6], y[:6])}, control=False)
    at_reference = found.samples["0.*"].init_losses("data")
    assert at_reference is not None and at_reference.shape == (6,)
    assert found.reference_loss == pytest.approx(float(at_reference.mean()))
    assert found.probes == ("data",) and found.control() is None
    np.testing.assert_allclose(found.chi().value.sum(axis=1), 0, atol=1e-6)  # their mean is L̄ itself
    with pytest.raises(ValueError, match="control was not sampled"):
        found.against_control()


# ---- tokens of a language model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> tuple[SusceptibilityResult, Path]:
    folder = tmp_path_factory.mktemp("stores")
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(VOCABULARY, (16, 8), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = llc_fast.susceptibilities(
            gpt_neox().eval(), data, "next-token", {"probe": data[:3]}, ["l0 h1", "l1 mlp"], per="token",
            store=folder, control=False, num_chains=2, num_draws=30, num_burnin=5, lr=1e-3, nbeta=10.0,
            localization=10.0, batch_size=8, progress=False,
        )  # fmt: skip
    return found, folder


def test_all_heads() -> None:
    assert list(_parts(gpt_neox(), "heads")) == ["l0 h0", "l0 h1", "l1 h0", "l1 h1"]


def test_components_by_token(by_token: tuple[SusceptibilityResult, Path]) -> None:
    found, folder = by_token
    assert found.components == ("l0 h1", "l1 mlp")
    dataset = found.to_xarray()
    assert dataset["chi"].dims == ("component", "sample", "token") and dataset["chi"].shape == (2, 3, 7)
    full = Samples.open(folder / "all weights.zarr")
    for k, name in enumerate(found.components):
        expected = by_hand(Samples.open(folder / f"{name}.zarr"), full, "probe").reshape(3, 7)
        np.testing.assert_allclose(dataset["chi"].values[k], expected, rtol=1e-8, atol=1e-12)


def test_devinterp_has_the_same_of_our_stores(by_token: tuple[SusceptibilityResult, Path]) -> None:
    devinterp_2()
    import xarray
    from devinterp.slt.susceptibilities import compute_susceptibilities

    found, folder = by_token
    names = {"full": "all weights", **{name: name for name in found.components}}
    trees = {
        key: xarray.open_datatree(folder / f"{name}.zarr", engine="zarr", consolidated=False)
        for key, name in names.items()
    }
    # It takes L(w*) from init_loss, which is that of all data: the probe of the data is all of them.
    theirs = compute_susceptibilities(trees, "data")["susceptibilities"]
    ours = found.to_xarray()["chi"].values.reshape(2, -1)
    np.testing.assert_allclose(theirs["sus"].values[: ours.shape[1]], ours.T, atol=1e-5)


def test_tokens_that_do_not_count() -> None:
    """Shorter sequences: NaN in the numbers, False in the masks."""
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [1, 5, 2, 6, 3, 1], [4, 4, 4, 4]]
    found = llc_fast.susceptibilities(
        gpt_neox().eval(), rows * 4, "next-token", {"probe": rows}, ["l1 mlp"], per="token", control=False,
        num_chains=2, num_draws=20, num_burnin=0, lr=1e-3, nbeta=10.0, localization=10.0, batch_size=4, progress=False,
    )  # fmt: skip
    dataset = found.to_xarray()
    counts = np.isfinite(dataset["chi"].values[0]).sum(axis=1)
    assert counts.tolist() == [5, 2, 5, 3] and not found.significant()[0, 1, 2:].any()


# ---- significance, words and pictures ---------------------------------------------------------------------------


def test_significance() -> None:
    """Benjamini–Hochberg's by SciPy, of p-values that follow from χ and its error."""
    found = short(num_draws=300, lr=0.1, components=["2.*"])
    dataset = found.to_xarray(q=0.1)
    np.testing.assert_allclose(dataset["z"], dataset["chi"] / dataset["stderr"])
    p = 2 * stats.t.sf(np.abs(dataset["z"]), found.chi().degrees_of_freedom)
    np.testing.assert_allclose(dataset["p"], p)
    expected = stats.false_discovery_control(p, axis=None).reshape(p.shape) <= 0.1
    np.testing.assert_array_equal(found.significant(0.1), expected)
    np.testing.assert_array_equal(dataset["significant"], expected)
    assert expected.any()
    np.testing.assert_allclose(dataset["difference"], dataset["chi"] - dataset["control"])
    pearson = stats.pearsonr(dataset["chi"].values[0], dataset["control"].values[0]).statistic
    assert float(dataset["control_correlation"][0]) == pytest.approx(pearson)
    np.testing.assert_allclose(dataset["standardized"], stats.zscore(dataset["chi"].values, axis=1))


def test_summary_and_picture(tmp_path: Path) -> None:
    found = short(num_draws=60)
    text = found.summary()
    exceed = int(found.against_control().exceeds.sum())
    assert f"{int(found.significant().sum())} of 48 entries differ from 0" in text
    assert f"{exceed} exceed the control" in text and "effective draws" in text and "R̂" in text
    assert "Use a larger num_draws" in text
    codes = {warning.code for warning in found.warnings}
    assert "few-draws" in codes
    for what in ("chi", "z", "standardized", "difference"):
        found.plot(tmp_path / f"{what}.png", what=what)
        assert (tmp_path / f"{what}.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="what must be one of 'chi'"):
        found.plot(what="p")


def test_warnings_are_issued_once() -> None:
    with pytest.warns(llc_fast.LLCWarning) as issued:
        found = short()
    said = [str(w.message) for w in issued if w.category is llc_fast.LLCWarning]
    assert said == [f"{w} [llc-fast explain {w.code}]" for w in found.warnings]
    assert all(warning.code for warning in found.warnings)


# ---- interrupted, resumed, diverged --------------------------------------------------------------------------------


class _Killed(BaseException):
    """As sudden as a signal that nobody can catch: nothing of the run is told."""


@pytest.fixture(scope="module")
def expected() -> SusceptibilityResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return short()


@pytest.mark.parametrize("after", [20, 420])
def test_killed_and_resumed(
    after: int, expected: SusceptibilityResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first run or in a later one; the numbers are those of a call that nobody killed."""
    left = iter(range(after, -1, -1))
    with monkeypatch.context() as patched:
        watch = sampling._Recorder._watch

        def killing(self: Any, draw: Any) -> None:
            watch(self, draw)
            if next(left) == 0:
                raise _Killed

        patched.setattr(sampling._Recorder, "_watch", killing)
        with pytest.raises(_Killed):
            short(store=tmp_path / "killed")
    found = short(store=tmp_path / "killed")
    for ours, theirs in ((found.chi(), expected.chi()), (found.control(), expected.control())):
        assert ours is not None and theirs is not None
        np.testing.assert_array_equal(ours.value, theirs.value)
        np.testing.assert_array_equal(ours.stderr, theirs.stderr)
    with no_step():
        again = short(store=tmp_path / "killed")
    np.testing.assert_array_equal(again.chi().value, expected.chi().value)
    assert [str(w) for w in again.warnings] == [str(w) for w in expected.warnings]


def test_interrupted() -> None:
    """What has run by then is there; before one component has, there is nothing."""
    steps = 45  # of all chains of a run
    with interrupted_after(5 * steps + 10):  # of the second component
        found = short()
    assert found.is_partial and found.components == ("0.*",) and found.left_out == {"2.*": "it has not run"}
    assert "interrupted" in found.summary() and "left out: 2.*" in found.summary()
    with interrupted_after(2 * steps + 10), pytest.raises(KeyboardInterrupt):
        short()


class Steep(nn.Module):
    """The loss has no finite value where only `bad` has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        alone = (self.good == 1).all() & (self.bad != 1).any()
        return torch.where(alone, x.new_tensor(torch.inf), (x * (self.good + self.bad)).sum(-1))


def test_a_component_that_diverges_is_left_out() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    found = llc_fast.susceptibilities(
        Steep(), (x, x.sum(-1)), F.mse_loss, {"test": (x, x.sum(-1))}, ["good", "bad"], **SHORT, control=False
    )
    assert found.components == ("good",) and found.left_out == {"bad": "all its chains diverged"}
    (said,) = [warning for warning in found.warnings if warning.code == "left-out"]
    assert "bad: all its chains diverged" in said
    with pytest.raises(ValueError, match="all chains of all components diverged"):
        llc_fast.susceptibilities(
            Steep(), (x, x.sum(-1)), F.mse_loss, {"test": (x, x.sum(-1))}, ["bad"], **SHORT, control=False
        )


# ---- arguments ----------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    llc_fast.susceptibilities(model, samples(), F.mse_loss, {"test": samples()}, PARTS, **SHORT, control=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any("forward" in vars(m) for m in model.modules())


def test_arguments() -> None:
    for options, error, match in (
        ({"probes": {}}, ValueError, "probes must be a mapping"),
        ({"components": []}, ValueError, "components is empty"),
        ({"components": "0.*"}, ValueError, 'components must be a list of names, a mapping, or "heads"'),
        ({"components": "heads"}, ValueError, "the model has no attention heads"),
        ({"components": ["0.*", "9.*"]}, ValueError, r"components\['9.\*'\]: params='9.\*' matches no parameter"),
        ({"components": ["0.*", "0.*"]}, ValueError, "has the name '0.\\*' twice"),
        ({"components": ["all weights"]}, ValueError, "'all weights' is taken"),
        ({"components": 3}, TypeError, "components must be a list of names or a mapping, got int"),
        ({"nbeta": 0}, ValueError, "nbeta=0 is the control"),
        ({"refine": True}, TypeError, "refine is not an argument of susceptibilities"),
        ({"target_error": 0.1}, ValueError, "target_error=0.1"),
        ({"per": "word"}, ValueError, "per must be"),
    ):
        with pytest.raises(error, match=match), no_step():
            short(**options)


def test_infinite_z_of_what_does_not_move() -> None:
    """A component without influence on the loss has χ = 0, and no z-score."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Identity())
    model.unused = nn.Parameter(torch.ones(4))
    x, y = torch.randn(12, 3), torch.randn(12, 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1]) + 0 * model.unused.sum()

    found = llc_fast.susceptibilities(model, (x, y), loss, {"test": (x, y)}, ["unused", "0.*"], **SHORT, control=False)
    np.testing.assert_array_equal(found.chi().value[0], 0)
    assert np.isnan(found.chi().z[0]).all() and not found.significant()[0].any()
    assert math.isnan(found.convergence["unused"][0]) and "nan" not in found.summary().split("\n")[1]
