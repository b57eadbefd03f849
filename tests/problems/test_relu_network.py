"""ReLU networks: rescaled units, the metric that undoes them, curvature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast.problems import relu_network
from llc_fast.problems.relu_network import make_data, make_network, rescale, scale_factors, undoing_preconditioner
from llc_fast.samplers import PreconditionedSGLDSampler
from llc_fast.settings import default_nbeta

mse = nn.functional.mse_loss
WIDTHS = (4, 6, 5, 3)


def network() -> nn.Sequential:
    return make_network(WIDTHS, 3, copies=2).double()


# --- networks -----------------------------------------------------------------------------------------------


def test_networks_follow_their_seed_and_leave_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = make_network(WIDTHS, 0), make_network(WIDTHS, 0), make_network(WIDTHS, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
    assert [m.weight.shape for m in first if isinstance(m, nn.Linear)] == [(6, 4), (5, 6), (3, 5)]
    assert float(first[2].weight.detach().abs().max()) <= 2 / 6**0.5


def test_copies_are_units_like_the_first() -> None:
    model = make_network(WIDTHS, 0, copies=2)
    assert all(torch.equal(model[0].weight[k], model[0].weight[0]) for k in (1, 2))
    assert all(torch.equal(model[0].bias[k], model[0].bias[0]) for k in (1, 2))
    assert not torch.equal(model[0].weight[3], model[0].weight[0])
    for copies in (-1, 6):
        with pytest.raises(ValueError, match=rf"copies .* 6 units .* got {copies}"):
            make_network(WIDTHS, 0, copies=copies)
    with pytest.raises(ValueError, match=r"widths .* got \[4\]"):
        make_network([4], 0)


def test_data_come_from_the_network_itself() -> None:
    model = network()
    x, y = make_data(model, 300, 1)
    assert x.dtype == torch.float64 and float(x.abs().max()) <= 10 and float(x.std()) == pytest.approx(5.77, rel=0.1)
    assert torch.equal(y, model(x).detach())
    assert torch.equal(x, make_data(model, 300, 1)[0])


# --- rescaling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "units"), [(0, None), (1, None), (0, [1, 4]), (1, [0])])
@pytest.mark.parametrize("factor", [1e-4, 7.0, 1e4])
def test_rescaled_networks_compute_the_same(layer: int, units: list[int] | None, factor: float) -> None:
    model = network()
    x, y = make_data(model, 50, 0)
    rescaled = rescale(model, layer, factor, units)
    torch.testing.assert_close(rescaled(x), y, rtol=1e-12, atol=1e-12)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), rescaled.parameters(), strict=True)]
    assert moved == [k in (2 * layer, 2 * layer + 1, 2 * layer + 2) for k in range(6)]


def test_only_the_chosen_units_are_rescaled() -> None:
    model, rescaled = network(), rescale(network(), 0, 8.0, [1, 4])
    ratio = rescaled[0].weight / model[0].weight
    torch.testing.assert_close(ratio, torch.tensor([1, 8, 1, 1, 8, 1.0]).double()[:, None].expand(6, 4))
    torch.testing.assert_close(rescaled[0].bias / model[0].bias, torch.tensor([1, 8, 1, 1, 8, 1.0]).double())
    ratio = rescaled[2].weight / model[2].weight
    torch.testing.assert_close(ratio, torch.tensor([1, 1 / 8, 1, 1, 1 / 8, 1]).double().expand(5, 6))


def test_what_can_not_be_rescaled_is_refused() -> None:
    model = network()
    for factor in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="factor must be"):
            rescale(model, 0, factor)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"one of the 2 hidden layers.* got {layer}"):
            rescale(model, layer, 2.0)
    with pytest.raises(ValueError, match=r"among the 6 of layer 0, .* got \[6\]"):
        rescale(model, 0, 2.0, [6])
    with pytest.raises(ValueError, match="only ReLUs may follow layer 0"):
        rescale(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), 0, 2.0)


def trace(model: nn.Sequential, loss_fn: Any = mse, sampler: str = "preconditioned-sgld", **options: Any) -> Tensor:
    """Losses and, last, where the chains are, in the parameters of the network that was not rescaled."""
    data = make_data(network(), 200, 0)
    kept: dict[int, Tensor] = {}

    def weights(draw: llc_fast.Draw) -> float:
        kept[draw.chain] = torch.cat([p.flatten() for p in draw.params.values()]).clone()
        return 0.0

    metric = options.pop("preconditioner", None)
    result = llc_fast.estimate_llc(
        model,
        data,
        loss_fn,
        sampler=sampler if metric is None else PreconditionedSGLDSampler(preconditioner=metric),
        num_chains=2,
        num_burnin=0,
        num_draws=200,
        batch_size=20,
        observables={"weights": weights},
        progress=False,
        **({"lr": 1e-3, "localization": 0.0} | options),
    )
    return torch.cat([torch.from_numpy(result.loss_trace), torch.stack([kept[0], kept[1]])], dim=1)


def scales_of(layer: int, factor: float, units: list[int] | None) -> Tensor:
    scales = scale_factors(network(), layer, factor, units)
    return torch.cat([(scales[k] * torch.ones_like(p)).flatten() for k, p in network().named_parameters()])


@pytest.mark.parametrize(("layer", "units"), [(0, None), (1, [1, 3])])
@pytest.mark.parametrize("factor", [1e-4, 2.0**10, 1e4])
def test_the_undoing_preconditioner_gives_the_same_chain(layer: int, units: list[int] | None, factor: float) -> None:
    metric = {name: 0.5 + torch.rand(p.shape, dtype=torch.float64) for name, p in network().named_parameters()}
    plain = trace(network(), preconditioner=metric)
    undone = trace(
        rescale(network(), layer, factor, units),
        preconditioner=undoing_preconditioner(network(), layer, factor, units, preconditioner=metric),
    )
    undone[:, 200:] /= scales_of(layer, factor, units)
    if factor == 2.0**10:  # powers of two round nowhere
        assert torch.equal(undone, plain)
    # Rounding, which 200 steps of a chain of this stability carry on but do not amplify.
    torch.testing.assert_close(undone, plain, rtol=1e-9, atol=1e-9)
    assert float(plain[:, 199].max()) > 1e-3  # and it has moved


def test_localization_is_undone_only_in_the_metric() -> None:
    factor, gamma = 30.0, 5.0
    plain = trace(network(), localization=gamma)
    rescaled, undoing = rescale(network(), 0, factor), undoing_preconditioner(network(), 0, factor)
    isotropic = trace(rescaled, preconditioner=undoing, localization=gamma)
    isotropic[:, 200:] /= scales_of(0, factor, None)
    assert float((isotropic - plain).abs().max()) > 0.1
    # The same pull in the metric A'⁻¹, as part of the loss: (γ/2)·(w' − w'*)ᵀA'⁻¹(w' − w'*)/nβ.
    reference = {name: p.detach().clone() for name, p in rescaled.named_parameters()}

    def pulled(model: nn.Module, batch: Any) -> Tensor:
        away = [((p - reference[k]).square() / undoing[k]).sum() for k, p in model.named_parameters()]
        return mse(model(batch[0]), batch[1]) + gamma / (2 * default_nbeta(200)) * sum(away)

    in_metric = trace(rescaled, pulled, preconditioner=undoing)
    in_metric[:, 200:] /= scales_of(0, factor, None)
    torch.testing.assert_close(in_metric[:, 200:], plain[:, 200:], rtol=1e-9, atol=1e-9)


def test_sgld_itself_sees_the_scaling() -> None:
    plain, rescaled = trace(network(), sampler="sgld"), trace(rescale(network(), 0, 3.0), sampler="sgld")
    assert not np.allclose(plain[:, :200], rescaled[:, :200], rtol=0.1)


# --- curvature ----------------------------------------------------------------------------------------------


def test_gauss_newton_is_the_hessian_where_the_data_are_fitted() -> None:
    model = network()
    x, y = make_data(model, 400, 2)
    names, shapes = zip(*((k, p.shape) for k, p in model.named_parameters()), strict=True)

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        named = {k: p.view(s) for k, p, s in zip(names, pieces, shapes, strict=True)}
        return mse(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.func.hessian(loss)(flat)
    found = relu_network.gauss_newton(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    metric = relu_network.curvature_preconditioner(model, x)
    torch.testing.assert_close(1 / torch.cat([a.flatten() for a in metric.values()]), expected.diagonal())


def test_the_curvature_metric_follows_the_scaling_unasked() -> None:
    model = network()
    x, _ = make_data(model, 400, 2)
    expected = undoing_preconditioner(
        model, 1, 100.0, [2], preconditioner=relu_network.curvature_preconditioner(model, x)
    )
    found = relu_network.curvature_preconditioner(rescale(model, 1, 100.0, [2]), x)
    for name, metric in found.items():
        torch.testing.assert_close(metric, expected[name], rtol=1e-9, atol=0)


def test_a_unit_that_is_never_active_has_no_curvature() -> None:
    model = network()
    with torch.no_grad():
        model[0].bias[1] = -1e6
    with pytest.raises(ValueError, match=r"do not depend on all of 0\.weight, 0\.bias, 2\.weight"):
        relu_network.curvature_preconditioner(model, make_data(model, 400, 2)[0])
