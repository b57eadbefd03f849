"""Metropolis-adjusted samplers: exact laws at step sizes where others are not, and each transition by the textbook."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import NormalCrossing, Quadratic, crossing_mean, run
from runs import assert_same, codes, data, estimate, interrupted_after, mlp, mse
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from llc_fast import LLCResult, estimate_llc, optim
from llc_fast.kernels import reference
from llc_fast.kernels.step import NoiseKey
from llc_fast.kernels.streams import ACCEPT_STREAM
from llc_fast.samplers import SAMPLERS, HMCSampler, MetropolisSampler, make_sampler

SIGMAS = 4.0
METROPOLIS = {name: cls for name, cls in SAMPLERS.items() if issubclass(cls, MetropolisSampler)}


def _assert_agrees(result: LLCResult, exact: float, *, precision: float) -> None:
    assert result.llc_stderr < precision * exact, f"too short to test anything: {result.llc_mean} ± {result.llc_stderr}"
    assert abs(result.llc_mean - exact) < SIGMAS * result.llc_stderr, (
        f"{result.llc_mean} ± {result.llc_stderr}, {exact}"
    )


def _adjusted(**options: Any) -> LLCResult:
    """`runs.estimate` with the whole data set."""
    return estimate(**{"sampler": "mala", "batch_size": None} | options)


# --- What they sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "options"), [("sgld", {}), ("mala", {}), ("hmc", {"num_leapfrog": 3})], ids=["sgld", "mala", "hmc"]
)
def test_gaussian(sampler: str, options: dict[str, Any]) -> None:
    """Σ ½·nβh/(nβh + γ) at εa = 1 in the stiffest direction, where SGLD's variance is a third too large."""
    nbeta, localization, decay = 100.0, 20.0, 5.0
    curvature = torch.linspace(0.5, 1.0, 12)
    nearly = nbeta * curvature.double()
    stiffness = nearly + localization + decay
    lr = 1 / float(stiffness.max())
    exact = float((0.5 * nearly / stiffness).sum())
    discrete = float((0.5 * nearly / (stiffness * (1 - lr * stiffness / 4))).sum())
    result = run(
        Quadratic(curvature),
        sampler=sampler,
        sampler_options={"weight_decay": decay, **options},
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        num_chains=4,
        num_draws={"sgld": 3000, "mala": 2500, "hmc": 1000}[sampler],
        num_burnin=100,
    )
    _assert_agrees(result, discrete if sampler == "sgld" else exact, precision=0.025)
    if sampler == "sgld":
        assert result.llc_mean - exact > 10 * result.llc_stderr
    else:
        assert 0.3 < result.diagnostics["acceptance"] < 0.97


@pytest.mark.parametrize("exponents", [(2,), (1, 1)], ids=["w⁴", "w₁²w₂²"])
@pytest.mark.parametrize(("sampler", "options"), [("mala", {}), ("hmc", {"num_leapfrog": 4})], ids=["mala", "hmc"])
def test_singular_potentials(sampler: str, options: dict[str, Any], exponents: tuple[int, ...]) -> None:
    """Against quadrature, with an adapted step size that is far too large for an unadjusted sampler."""
    copies, nbeta, localization = 8, 100.0, 10.0
    exact = copies * crossing_mean(exponents, nbeta, localization)
    result = run(
        NormalCrossing(exponents, copies),
        sampler=sampler,
        sampler_options={"adapt_steps": 200, **options},
        lr=0.05,  # to begin with: at the origin there is no curvature to choose one by
        nbeta=nbeta,
        localization=localization,
        num_chains=8,
        num_draws={"mala": 1500, "hmc": 600}[sampler],
        num_burnin=200,
    )
    _assert_agrees(result, exact, precision=0.05)
    target = METROPOLIS[sampler].target_acceptance
    assert result.diagnostics["acceptance"] == pytest.approx(target, abs=0.15) and not result.warnings


def test_box_cuts_off() -> None:
    """A Gaussian cut off at one standard deviation: its energy by the error function, and every draw is inside."""
    copies, nbeta, box = 10, 100.0, 0.1  # one standard deviation
    result = run(
        Quadratic(torch.ones(copies)),
        sampler="mala",
        sampler_options={"bounding_box_size": box},
        lr=2e-3,
        nbeta=nbeta,
        localization=0.0,
        num_chains=4,
        num_draws=1500,
        num_burnin=50,
        observables={"largest": lambda draw: draw.params["w"].abs().max()},
    )
    assert 0.09 < float(result.observables["largest"].max()) <= box
    inside = math.erf(1 / math.sqrt(2))
    exact = copies * 0.5 * (1 - math.sqrt(2 / math.pi) * math.exp(-0.5) / inside)
    _assert_agrees(result, exact, precision=0.03)


@pytest.mark.parametrize("sampler", ["sgld", "mala", "hmc"])
def test_wbic_of_a_regular_model(sampler: str) -> None:
    """The whole data set, no localization: WBIC = n·L(w*) + λ·log n with λ = d/2 (Watanabe 2013), here exactly."""
    n, d = 200, 12
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, 1, generator=generator)
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    lr = 4e-4 if sampler == "sgld" else None
    result = estimate_llc(
        model,
        (x, y),
        lambda output, target: 0.5 * (output - target).square().mean(),
        sampler=HMCSampler(num_leapfrog=3) if sampler == "hmc" else sampler,
        lr=lr,
        localization=0,
        batch_size=n,
        num_draws={"sgld": 12_000, "mala": 2000, "hmc": 800}[sampler],
        num_burnin=200,
        num_chains=2 if sampler == "hmc" else 6,
        progress=False,
    )
    stiffness = result.nbeta * torch.linalg.eigvalsh(x.double().T @ x.double() / n)
    inflation = 1 / (1 - (lr or 0) * stiffness / 4)  # by SGLD's step size
    assert float(inflation.max()) < 1.02
    _assert_agrees(result, float(0.5 * inflation.sum()), precision=0.04)
    wbic = n * result.loss_trace[:, result.schedule.draws].mean()
    assert wbic == pytest.approx(n * result.init_loss + result.llc_mean * math.log(n), rel=1e-9)


# --- Each transition ----------------------------------------------------------------------------------------


class _Textbook:
    """MALA and HMC for some parameters of a network, as one vector, by the formulas in their usual form."""

    nbeta, localization, decay = 50.0, 3.0, 0.5

    def __init__(self, metric: dict[str, Tensor], moving: dict[str, Tensor]) -> None:
        self.x, self.y = data(dtype=torch.float64)
        self.model = mlp(torch.float64)
        self.params = {name: p.detach() for name, p in self.model.named_parameters() if name in metric}
        self.anchor, self.metric, self.moving = map(self._flat, (self.params, metric, moving))

    @staticmethod
    def _flat(parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([p.flatten() for p in parts.values()])

    def at(self, w: Tensor) -> tuple[float, float, Tensor]:
        """Loss, U and ∇U."""
        w = w.clone().requires_grad_()
        pieces = w.split([p.numel() for p in self.params.values()])
        parts = {name: v.view_as(p) for (name, p), v in zip(self.params.items(), pieces, strict=True)}
        loss = mse(torch.func.functional_call(self.model, parts, (self.x,)), self.y)
        away = (w - self.anchor).square().sum()
        total = self.nbeta * loss + self.localization / 2 * away + self.decay / 2 * w.square().sum()
        return float(loss.detach()), float(total.detach()), torch.autograd.grad(total, w)[0] * self.moving

    def mala(self, w: Tensor, noise: Tensor, lr: float) -> tuple[Tensor, float]:
        """The proposal, and log of the Metropolis–Hastings ratio."""

        def mean(place: Tensor) -> Tensor:
            return place - lr / 2 * self.metric * self.at(place)[2]

        def log_q(to: Tensor, place: Tensor) -> float:
            return float(-((to - mean(place)) ** 2 / (2 * lr * self.metric))[self.moving].sum())

        end = mean(w) + (lr * self.metric).sqrt() * noise * self.moving
        return end, self.at(w)[1] - self.at(end)[1] + log_q(w, end) - log_q(end, w)

    def hmc(self, w: Tensor, noise: Tensor, delta: float, length: int) -> tuple[Tensor, float]:
        """Momenta of mass 1/A."""
        start = momentum = noise / self.metric.sqrt() * self.moving
        end = w
        for _ in range(length):
            momentum = momentum - delta / 2 * self.at(end)[2]
            end = end + delta * self.metric * momentum
            momentum = momentum - delta / 2 * self.at(end)[2]
        kinetic = float((self.metric * (momentum**2 - start**2)).sum() / 2)
        return end, self.at(w)[1] - self.at(end)[1] - kinetic

    def run(self, chain: int, seed: int, lr: float, steps: int, options: dict[str, Any]) -> tuple[list[float], ...]:
        """Losses, and acceptances of the transitions that led to them."""
        w, losses, acceptances = self.anchor, [], [math.nan]
        for step in range(steps):
            losses.append(self.at(w)[0])
            noise = reference.normals(0, len(w), NoiseKey(seed, step, chain))
            first, second, third, _ = reference.normals(0, 4, NoiseKey(seed, step, chain, ACCEPT_STREAM)).tolist()
            if options:
                factor = 1 + options["jitter"] * math.erf(third / math.sqrt(2))
                end, log_ratio = self.hmc(w, noise, math.sqrt(lr) * factor, options["num_leapfrog"])
            else:
                end, log_ratio = self.mala(w, noise, lr)
            acceptances.append(min(1.0, math.exp(log_ratio)))
            if math.exp(-(first**2 + second**2) / 2) < acceptances[-1]:
                w = end
        return losses, acceptances[:-1]


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [("mala", {}), ("hmc", {"num_leapfrog": 3, "jitter": 0.3}), ("hmc", {"num_leapfrog": 1, "jitter": 0.0})],
    ids=["mala", "hmc", "hmc of one step"],
)
def test_transitions_by_the_textbook(sampler: str, options: dict[str, Any], strategy: str) -> None:
    """Losses and acceptances with a metric, a mask and weight decay, q written out, in float64."""
    seed, lr, steps = 5, 0.05, 40
    mask = torch.tensor([[True, False, True]])
    metric = {"0.weight": torch.linspace(0.5, 2, 12, dtype=torch.float64).view(4, 3), "2.weight": 0.7}
    textbook = _Textbook(
        {"0.weight": metric["0.weight"], "2.weight": torch.full((1, 4), 0.7, dtype=torch.float64)},
        {"0.weight": mask.expand(4, 3), "2.weight": torch.ones(1, 4, dtype=torch.bool)},
    )
    result = _adjusted(
        model=mlp(torch.float64),
        data=data(dtype=torch.float64),
        sampler=sampler,
        sampler_options={"weight_decay": textbook.decay, "preconditioner": metric, **options},
        params={"0.weight": mask, "2.weight": True},
        lr=lr,
        nbeta=textbook.nbeta,
        localization=textbook.localization,
        num_chains=2,
        num_draws=steps,
        num_burnin=0,
        seed=seed,
        strategy=strategy,
    )
    for chain in range(2):
        losses, acceptances = textbook.run(chain, seed, lr, steps + 1, options)  # which names transitions by their end
        losses, acceptances = losses[:-1], acceptances[1:]
        np.testing.assert_allclose(result.loss_trace[chain], losses, rtol=1e-9)
        np.testing.assert_allclose(result.traces["acceptance"][chain], acceptances, rtol=1e-7)
        expected = float(np.mean(acceptances))
        assert result.diagnostics["acceptance_per_chain"][chain] == pytest.approx(expected, rel=1e-7)
        rejected = np.diff(losses) == 0
        assert rejected.any() and not rejected.all()
    assert result.diagnostics["acceptance"] == pytest.approx(np.mean(result.diagnostics["acceptance_per_chain"]))


def test_hmc_of_one_step_is_mala() -> None:
    options = {"lr": 5e-3, "num_draws": 50, "nbeta": 100.0}
    one = _adjusted(sampler="hmc", sampler_options={"num_leapfrog": 1, "jitter": 0}, **options)
    mala = _adjusted(**options)
    assert_same(one, mala)
    assert len(np.unique(mala.loss_trace)) > 50


# --- The step size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_adaptation(sampler: str) -> None:
    """Chosen in burn-in for each chain, near its target, frozen afterwards; a given lr is left alone."""
    few = {"num_leapfrog": 4} if sampler == "hmc" else {}
    options: dict[str, Any] = {"sampler": sampler, "num_draws": 200, "num_burnin": 500, "num_chains": 4}
    options |= {"nbeta": 1000.0, "localization": 1.0, "sampler_options": few}
    model = Quadratic(torch.logspace(-1, 1, 30))
    result = run(model, **options)
    target = METROPOLIS[sampler].target_acceptance
    assert result.diagnostics["acceptance"] == pytest.approx(target, abs=0.1)
    steps = result.diagnostics["lr_per_chain"]
    assert len(set(steps)) == 4
    assert (result.traces["lr"][:, result.schedule.draws] == np.array(steps)[:, None]).all()
    assert result.settings["lr"] == pytest.approx(math.exp(np.log(steps).mean()))
    assert not {"acceptance", "adaptation", "step-size"}.intersection(codes(result))
    careful = run(model, **options | {"sampler_options": few | {"target_acceptance": 0.95}})
    assert careful.diagnostics["acceptance"] > result.diagnostics["acceptance"] + 0.05
    assert careful.settings["lr"] < result.settings["lr"]
    given = run(model, **options | {"lr": 1e-5, "num_draws": 20, "num_burnin": 20})
    assert given.settings["lr"] == 1e-5
    np.testing.assert_allclose(given.diagnostics["lr_per_chain"], 1e-5, rtol=1e-12)


def test_warnings() -> None:
    """Of chains that hardly move, and of a burn-in too short to find a step size."""
    stuck = run(Quadratic(torch.ones(50)), sampler="mala", lr=0.035, nbeta=100.0, num_draws=200, num_burnin=100)
    assert stuck.diagnostics["acceptance"] < 0.2
    assert stuck.warnings[0].code == "acceptance" and "lr=0.0088" in stuck.warnings[0]
    short = run(Quadratic(torch.ones(50)), sampler="mala", nbeta=100.0, num_draws=200, num_burnin=8)
    assert abs(short.diagnostics["acceptance"] - 0.574) > 0.15
    assert "adaptation" in codes(short) and "acceptance" not in codes(short)


# --- One engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_the_same_chains_in_every_way(sampler: str) -> None:
    """Batched, one after another, in microbatches, from a shuffling loader, beside others: equal to rounding."""
    options: dict[str, Any] = {"sampler": sampler, "model": mlp(torch.float64), "lr": None, "num_draws": 12}
    tensors = data(dtype=torch.float64)
    expected = _adjusted(data=tensors, strategy="sequential", **options)
    assert expected.settings["batch_size"] == expected.settings["num_samples"] == 40
    assert expected.diagnostics["gradients_per_draw"] == (1 if sampler == "mala" else 10)
    assert_same(_adjusted(data=tensors, strategy="sequential", **options), expected)
    assert not np.array_equal(_adjusted(data=tensors, seed=1, **options).loss_trace, expected.loss_trace)
    loader = DataLoader(TensorDataset(*tensors), batch_size=7, shuffle=True, drop_last=True)
    for others in (
        {"strategy": "batched"},
        {"strategy": "sequential", "microbatch_size": 7},
        {"strategy": "sequential", "batch_size": 40},
        {"data": loader},
        {"data": TensorDataset(*tensors)},
        {"num_chains": 2},
    ):
        found = _adjusted(**{"data": tensors} | options | others)
        count = len(found.loss_trace)
        np.testing.assert_allclose(found.loss_trace, expected.loss_trace[:count], rtol=1e-7, err_msg=str(others))
        np.testing.assert_allclose(
            found.diagnostics["acceptance_per_chain"],
            expected.diagnostics["acceptance_per_chain"][:count],
            rtol=1e-5,
            err_msg=str(others),
        )


class _Peeking(nn.Module):
    """Looks at a value, so that its kernels can't be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output if output.sum().item() < math.inf else -output


def test_models_that_are_not_recorded_take_turns() -> None:
    """Chains in several threads evaluate such a model for their proposals too, one at a time."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(_adjusted(model=_Peeking(), sampler="hmc", strategy="sequential", num_draws=30))
    finally:
        torch.set_num_threads(before)
    assert results[1].diagnostics["workers"] == 3 and "not recorded" in results[1].diagnostics["strategy_reason"]
    assert_same(results[1], results[0])


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_resumed_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """While ε adapts, when it is frozen and while draws are made: the same bits, acceptance and step sizes too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options: dict[str, Any] = {"sampler": "hmc", "lr": None, "strategy": strategy, "num_chains": 2, "num_draws": 3}
        expected = _adjusted(**options)
        total = 7 if strategy == "batched" else 14
        for count in range(1, total):
            path = tmp_path / f"{count}"
            with interrupted_after(count):
                assert _adjusted(**options, checkpoint=path).is_partial
            resumed = _adjusted(**options, checkpoint=path)
            assert_same(resumed, expected)
            for name in ("acceptance", "acceptance_per_chain", "lr_per_chain"):
                assert resumed.diagnostics[name] == expected.diagnostics[name]
    finally:
        torch.set_num_threads(before)


def test_losses_are_summed_in_float64() -> None:
    """Losses of samples in float32, their mean in float64, as in L(w*)."""

    def per_sample(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(dim=1)

    inputs = data(n=999)
    seen: list[Tensor] = []
    result = _adjusted(
        data=inputs,
        loss_fn=per_sample,
        observables={"samples": lambda draw: seen.append(draw.sample_losses.clone()) or draw.sample_losses.sum()},
        num_burnin=0,
        strategy="sequential",
        num_chains=1,
    )
    expected = [float(samples.double().mean()) for samples in seen]
    np.testing.assert_allclose(result.loss_trace[0], expected, rtol=1e-15)
    assert result.loss_trace[0, 0] == pytest.approx(result.init_loss, rel=1e-7)


def test_results_are_saved(tmp_path: Path) -> None:
    result = _adjusted()
    result.save(tmp_path / "result.npz")
    loaded = LLCResult.load(tmp_path / "result.npz")
    assert loaded.diagnostics["acceptance"] == result.diagnostics["acceptance"]
    np.testing.assert_array_equal(loaded.traces["lr"], result.traces["lr"])


# --- What is refused ----------------------------------------------------------------------------------------


class _Endless:
    """Batches without a length."""

    def __iter__(self) -> Any:
        return itertools.cycle([data()])


class _Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return torch.randn(3), torch.zeros(1)


def _in_training(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1)).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 10}, ["batch_size=10", "40", "microbatch_size"]),
        ({"data": _Endless()}, ["length", "tensors"]),
        ({"data": _Augmented()}, ["other samples", "tensors"]),
        ({"model": _in_training(nn.Dropout(0.5))}, ["mala", "random", "eval"]),
        ({"model": _in_training(nn.BatchNorm1d(4))}, ["mala", "buffers", "eval"]),
        ({"model": mlp(torch.bfloat16), "data": data(dtype=torch.bfloat16)}, ["bfloat16", "float32"]),
        ({"autocast": torch.bfloat16}, ["autocast", "float32"]),
        ({"strategy": "batched", "microbatch_size": 7}, ["batched", "sequential"]),
        ({"release_gradients": True}, ["release_gradients", "mala"]),
        ({"sampler_options": {"noise_level": 0.5}}, ["noise_level", "0.5"]),
        ({"sampler_options": {"target_acceptance": 1.0}}, ["target_acceptance"]),
        ({"sampler_options": {"adapt_steps": -1}}, ["adapt_steps", "-1"]),
        ({"sampler_options": {"num_leapfrog": 3}}, ["MALA", "num_leapfrog"]),
        ({"sampler": "hmc", "sampler_options": {"num_leapfrog": 0}}, ["num_leapfrog", "0"]),
        ({"sampler": "hmc", "sampler_options": {"jitter": 1.0}}, ["jitter"]),
    ],
)
def test_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        _adjusted(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [2.5, True, "3"])
def test_counts_are_integers(value: Any) -> None:
    with pytest.raises(TypeError, match="num_leapfrog must be an integer"):
        make_sampler("hmc", lr=1.0, nbeta=1.0, num_leapfrog=value)


@pytest.mark.parametrize("cls", METROPOLIS.values())
def test_there_is_no_optimizer(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"estimate_llc\\(sampler='{cls.name}'\\)"):
        optim.optimizer_for(cls)
