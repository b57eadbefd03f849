"""The metric from the curvature at w*: what it is, that it follows every rescaling, and that λ̂ does not change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

import llc_fast
from llc_fast.data import make_source
from llc_fast.objective.metric import CurvatureMetric, _direction, _Numbers, _row_times_column, _scale, curvature_metric
from llc_fast.objective.objective import Objective
from llc_fast.samplers import HMCSampler, MALASampler, PreconditionedSGLDSampler

mse = F.mse_loss


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _objective(model: nn.Module, data: Any, loss_fn: Any, batch_size: int = 32, **options: Any) -> Objective:
    source = make_source(data, batch_size, torch.device("cpu"), pairs=isinstance(data, tuple), num_wanted=4096)
    return Objective(model, loss_fn, source, device=torch.device("cpu"), **options)


def _initialized(model: nn.Module, seed: int = 7, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = model.to(dtype)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            noise = _normal(*p.shape, seed=seed + k)
            p.copy_(noise / math.sqrt(p.shape[1]) if p.ndim > 1 else 1 + 0.3 * noise)
    return model


# ---- models and what leaves their functions as they are ------------------------------------------------------------


class _Attention(nn.Module):
    """Embedded tokens, one layer of attention with two heads, LayerNorm, and the embedding again as the last layer."""

    def __init__(self, width: int = 8, tokens: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.first, self.last = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embedding(tokens))
        q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.mT / 2, dim=-1) @ v
        logits: Tensor = self.head(self.last(x + self.o(mixed.transpose(1, 2).flatten(2))))
        return logits.mT  # classes come second


class _Tokens(nn.Module):
    """The same with its own loss, as Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Attention()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(input_ids).mT
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def _factors(count: int, seed: int) -> Tensor:
    """Positive, from about 0.02 to 50."""
    return _normal(count, seed=seed).mul(1.5).exp()


def _relu() -> tuple[nn.Module, dict[str, Tensor]]:
    a = _factors(8, 1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {
        "0.weight": a[:, None],
        "0.bias": a,
        "2.weight": 1 / a,
    }


def _layer_norm() -> tuple[nn.Module, dict[str, Tensor]]:
    gains = _factors(8, 2)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=1e-12), nn.Linear(8, 3))
    factor = torch.tensor(30.0, dtype=torch.float64)
    return model, {
        "0.weight": factor,
        "0.bias": factor,
        "1.weight": gains,
        "1.bias": gains,
        "2.weight": 1 / gains,
    }


def _batch_norm() -> tuple[nn.Module, dict[str, Tensor]]:
    channels, gains = _factors(6, 3), _factors(6, 4)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 2, padding=1), nn.BatchNorm2d(6, eps=1e-12), nn.ReLU(),
        nn.Conv2d(6, 2, 2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return model, {
        "1.weight": channels[:, None, None, None],
        "1.bias": channels,
        "2.weight": gains,
        "2.bias": gains,
        "4.weight": 1 / gains[:, None, None],
    }


def _attention() -> tuple[nn.Module, dict[str, Tensor]]:
    qk, vo = _factors(8, 5), _factors(8, 6)
    tied = torch.tensor(20.0, dtype=torch.float64)
    return _Attention(), {
        "q.weight": qk[:, None],
        "q.bias": qk,
        "k.weight": 1 / qk[:, None],
        "k.bias": 1 / qk,
        "v.weight": vo[:, None],
        "v.bias": vo,
        "o.weight": 1 / vo,
        "embedding.weight": tied,
        "last.weight": 1 / tied,
        "last.bias": 1 / tied,
    }


def _own_loss() -> tuple[nn.Module, dict[str, Tensor]]:
    _, factors = _attention()
    return _Tokens(), {f"body.{name}": factor for name, factor in factors.items()}


def _tokens(num: int = 64) -> Tensor:
    return torch.randint(0, 11, (num, 6), generator=torch.Generator().manual_seed(3))


def _vectors(num: int = 64) -> tuple[Tensor, Tensor]:
    return _normal(num, 4, seed=1), torch.randint(0, 3, (num,), generator=torch.Generator().manual_seed(2))


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], Callable[[], Any], Any]] = {
    "ReLU": (_relu, lambda: (_vectors()[0], _normal(64, 3, seed=4)), mse),
    "ReLU, cross-entropy": (_relu, _vectors, F.cross_entropy),
    "LayerNorm": (_layer_norm, _vectors, F.cross_entropy),
    "BatchNorm": (_batch_norm, _vectors, F.cross_entropy),
    "attention, tied embeddings": (_attention, lambda: (_tokens(), _tokens().roll(-1, 1)), F.cross_entropy),
    "own loss": (_own_loss, lambda: {"input_ids": _tokens(), "labels": _tokens()}, None),
    "loss_fn(model, batch)": (_relu, _vectors, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])),
}


def _case(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Any, Any]:
    """A model, the rescaled one, D, data and loss."""
    make, data, loss_fn = CASES[name]
    model, factors = make()
    model = _initialized(model, dtype=dtype)
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        for key, p in rescaled.named_parameters():
            p.mul_(factors.get(key, torch.ones(())).to(dtype))
    found = data()
    if isinstance(found, tuple):
        found = tuple(t.to(dtype) if t.is_floating_point() else t for t in found)
    return model, rescaled, factors, found, loss_fn


# ---- A follows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_metric_follows_every_rescaling(name: str) -> None:
    model, rescaled, factors, data, loss_fn = _case(name)
    before, after = (curvature_metric(_objective(m, data, loss_fn)) for m in (model, rescaled))
    assert before.method == after.method == "gauss-newton"
    assert before.undetermined == after.undetermined == 0
    assert after.norm == pytest.approx(before.norm, rel=1e-6)
    for key, a in before.preconditioner.items():
        factor = factors.get(key, torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(after.preconditioner[key], factor.square() * a, rtol=1e-6, atol=0)


def test_tied_tensors_are_one_parameter() -> None:
    model, _, _, data, loss_fn = _case("attention, tied embeddings")
    found = curvature_metric(_objective(model, data, loss_fn))
    assert "embedding.weight" in found.preconditioner and "head.weight" not in found.preconditioner


def test_a_loss_that_reads_parameters_falls_back_to_hutchinson() -> None:
    """Where outputs are not all that the loss depends on; equivariant all the same, for a penalty that is."""
    model, rescaled, factors, data, _ = _case("ReLU, cross-entropy")

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        product = model[2].weight @ model[0].weight  # type: ignore[index, operator]
        return F.cross_entropy(model(batch[0]), batch[1]) + product.square().mean()  # type: ignore[no-any-return]

    before, after = (curvature_metric(_objective(m, data, loss_fn)) for m in (model, rescaled))
    assert before.method == after.method == "hutchinson" and before.gradients == 128
    for key, a in before.preconditioner.items():
        factor = factors.get(key, torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(after.preconditioner[key], factor.square() * a, rtol=1e-3, atol=0)


def test_a_loss_without_curvature_in_outputs_takes_gradients() -> None:
    """|f − y| is straight: B is that of gradients, and A = 1/E[x²] of a linear model, whatever y is."""
    x, y = _normal(512, 3, seed=1), _normal(512, 1, seed=2)
    model = _initialized(nn.Linear(3, 1, bias=False))
    found = curvature_metric(_objective(model, (x, y), F.l1_loss), probes=400, damping=0.0)
    assert found.method == "fisher"
    exact = 1 / x.square().mean(dim=0, keepdim=True)
    torch.testing.assert_close(found.preconditioner["weight"], exact, rtol=5 * math.sqrt(2 / 400), atol=0)


def test_no_curvature_at_all_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match='preconditioner="curvature" is not possible here: the loss has no curvature'):
        curvature_metric(_objective(model, (_normal(64, 3, seed=1), torch.zeros(64, 1).double()), mse))


# ---- what it is --------------------------------------------------------------------------------------------


def test_it_is_one_over_the_hessian_of_a_linear_regression() -> None:
    """h_ij = (2/k)·E[x_j²], whatever the targets are; d is η times the mean of h·w² over the scale of a weight."""
    x, y = _normal(256, 3, seed=1) * torch.tensor([1.0, 0.1, 30.0]), _normal(256, 2, seed=2)
    model = _initialized(nn.Linear(3, 2))
    probes = 800
    found = curvature_metric(_objective(model, (x.double(), y), mse), probes=probes, damping=0.0)
    exact = (x.square().mean(dim=0)).double().expand(2, 3)
    tolerance = 5 * math.sqrt(2 / probes)
    torch.testing.assert_close(1 / found.preconditioner["weight"], exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(1 / found.preconditioner["bias"], torch.ones(2).double(), rtol=tolerance, atol=0)
    damped = curvature_metric(_objective(model, (x.double(), y), mse), probes=probes, damping=0.5)
    h = {name: 1 / a for name, a in found.preconditioner.items()}
    common = sum(float((h[name] * p.detach().square()).sum()) for name, p in model.named_parameters()) / 8
    extra = 1 / damped.preconditioner["weight"] - h["weight"]
    torch.testing.assert_close(extra, (0.5 * common / _scale(model.weight)).detach(), rtol=1e-6, atol=0)
    # A bias in proportion to its row.
    proportion = 0.5 * common / (h["weight"] * _scale(model.weight)).mean(dim=1)
    extra = 1 / damped.preconditioner["bias"] - h["bias"]
    torch.testing.assert_close(extra, h["bias"] * proportion, rtol=1e-6, atol=0)


def _huber(z: Tensor, y: Tensor) -> Tensor:
    return F.huber_loss(z, y.double().sin()[:, None] * torch.arange(1, 4), delta=0.7)


def _paired(z: Tensor, y: Tensor) -> Tensor:
    """Outputs that meet in a product: B is neither diagonal nor that of a softmax, and not positive."""
    return (z[:, 0] * z[:, 1] + z[:, 2].square() + z.square().sum(dim=1).square()).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared error": lambda z, y: mse(z, y[:, None].double().expand_as(z)),
    "cross-entropy": F.cross_entropy,
    "cross-entropy, ignored and weighted": lambda z, y: F.cross_entropy(
        z, y, weight=torch.tensor([1.0, 3.0, 0.2]).double(), ignore_index=2
    ),
    "binary cross-entropies": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()),
    "divergence": lambda z, y: F.kl_div(z.log_softmax(1), z.detach().roll(1, 0).softmax(1), reduction="batchmean"),
    "huber": _huber,
    "paired": _paired,
}


@pytest.mark.parametrize("name", LOSSES)
def test_directions_have_the_covariance_of_the_second_derivative(name: str) -> None:
    z, y = _normal(5, 3, seed=1), torch.tensor([0, 1, 2, 1, 0])
    loss_fn = LOSSES[name]
    exact = hessian(lambda z: loss_fn(z.view(5, 3), y))(z.flatten())
    if name == "paired":  # what is negative is left out, sample by sample
        values, vectors = torch.linalg.eigh(exact)
        exact = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(leaf, y), leaf, create_graph=True)
    numbers = _Numbers()

    def curved(v: Tensor) -> Tensor:
        return torch.autograd.grad(slope, leaf, v, retain_graph=True)[0]

    count = 400 if name == "paired" else 1000
    draws = [_direction(z, curved, numbers) for _ in range(count)]
    found = torch.stack([u.flatten() for u in draws if u is not None])
    assert len(found) == count
    covariance = found.T @ found / count
    sizes = exact.diagonal().clamp(min=0).sqrt()
    error = torch.outer(sizes, sizes) * math.sqrt(2 / count)
    assert ((covariance - exact).abs() <= 5 * error + 1e-9).all()


def test_of_many_outputs_that_mix_the_diagonal_is_taken() -> None:
    """A sample of 100 outputs: Σ (z_i)⁴ with neighbours that pull at each other; the diagonal, in the mean."""
    z = _normal(3, 100, seed=1)

    def loss_fn(z: Tensor) -> Tensor:
        return (z**4).sum() + 0.01 * (z[:, 1:] * z[:, :-1]).sum()

    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(leaf), leaf, create_graph=True)
    numbers = _Numbers()
    squares = torch.zeros_like(z)
    for _ in range(400):
        u = _direction(z, lambda v: torch.autograd.grad(slope, leaf, v, retain_graph=True)[0], numbers)
        assert u is not None
        squares += u.square() / 400
    large = z.abs() > 0.3
    torch.testing.assert_close(squares[large], 12 * z[large].square(), rtol=0.4, atol=0)


def test_scales_of_rows_times_columns() -> None:
    squares = _normal(5, 7, seed=1).square()
    scale = _row_times_column(squares)
    quotient = squares / scale
    torch.testing.assert_close(quotient.mean(dim=0), torch.ones(7).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(quotient.mean(dim=1), torch.ones(5).double(), rtol=1e-6, atol=0)
    assert int(torch.linalg.matrix_rank(scale)) == 1
    rows, columns = _factors(5, 2), _factors(7, 3)
    moved = _row_times_column(squares * torch.outer(rows, columns))
    torch.testing.assert_close(moved, scale * torch.outer(rows, columns), rtol=1e-6, atol=0)


def test_scales_where_rows_and_columns_are_0() -> None:
    """They have none; the others are as if these were not there."""
    squares = _normal(4, 6, seed=1).square()
    wider = torch.zeros(6, 8, dtype=torch.float64)
    wider[1:5, 1:7] = squares
    scale = _row_times_column(wider)
    torch.testing.assert_close(scale[1:5, 1:7], _row_times_column(squares), rtol=1e-6, atol=0)
    assert not scale[0].any() and not scale[:, 0].any() and torch.isfinite(scale).all()


def test_dead_units_have_a_finite_metric_that_follows() -> None:
    """A unit that no sample activates has no curvature: its weights' own scale decides."""
    x, y = _normal(64, 4, seed=1).abs(), _normal(64, 2, seed=2)
    model = _initialized(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    with torch.no_grad():
        model[0].weight[2] = -model[0].weight[2].abs()
        model[0].bias[2] = -1
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        rescaled[0].weight[2] *= 100
        rescaled[0].bias[2] *= 100
        rescaled[2].weight[:, 2] /= 100
    before, after = (curvature_metric(_objective(m, (x, y), mse)) for m in (model, rescaled))
    assert before.undetermined == after.undetermined == 0
    for key, rows in (("0.weight", (2, slice(None))), ("0.bias", 2), ("2.weight", (slice(None), 2))):
        a, b = before.preconditioner[key][rows], after.preconditioner[key][rows]
        assert torch.isfinite(a).all() and (a > 0).all()
        factor = 1e-4 if key == "2.weight" else 1e4
        torch.testing.assert_close(b, factor * a, rtol=1e-6, atol=0)


def test_elements_without_curvature_and_scale_are_counted() -> None:
    x, y = _normal(64, 4, seed=1).abs(), _normal(64, 2, seed=2)
    model = _initialized(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 0.0
        model[2].weight[:, 2] = 0.0
    found = curvature_metric(_objective(model, (x, y), mse))
    # The unit is 0 for all samples, and torch's derivative of the ReLU at 0 is 0.
    assert found.undetermined == 4 + 1 + 2
    for a in found.preconditioner.values():
        assert torch.isfinite(a).all() and (a > 0).all()


def test_a_bias_of_0_is_free_to_move() -> None:
    x, y = _normal(64, 4, seed=1), _normal(64, 2, seed=2)
    model = _initialized(nn.Linear(4, 2))
    with torch.no_grad():
        model.bias.zero_()
    found = curvature_metric(_objective(model, (x, y), mse), probes=400)
    torch.testing.assert_close(found.preconditioner["bias"], torch.ones(2).double(), rtol=0.4, atol=0)


def test_masks_and_microbatches_and_low_precision() -> None:
    x, y = _normal(64, 4, seed=1, dtype=torch.float32), _normal(64, 2, seed=2, dtype=torch.float32)
    model = _initialized(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), dtype=torch.float32)
    whole = curvature_metric(_objective(model, (x, y), mse), probes=200)
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[:3] = True
    part = curvature_metric(_objective(model, (x, y), mse, params={"0.weight": mask}), probes=200, damping=0.0)
    assert set(part.preconditioner) == {"0.weight"}
    torch.testing.assert_close(
        part.preconditioner["0.weight"][:3], whole.preconditioner["0.weight"][:3], rtol=0.6, atol=0
    )
    assert part.norm == pytest.approx(
        float((model[0].weight.detach()[:3].double().square() / part.preconditioner["0.weight"][:3]).sum().sqrt()),
        rel=1e-5,
    )
    pieces = curvature_metric(_objective(model, (x, y), mse, microbatch_size=8), probes=200)
    for key, a in whole.preconditioner.items():
        torch.testing.assert_close(pieces.preconditioner[key], a, rtol=0.5, atol=0)
    low = curvature_metric(_objective(copy.deepcopy(model).bfloat16(), (x.bfloat16(), y.bfloat16()), mse), probes=200)
    for key, a in whole.preconditioner.items():
        assert low.preconditioner[key].dtype == torch.float32
        torch.testing.assert_close(low.preconditioner[key], a, rtol=0.5, atol=0)


def test_random_losses_and_generators_are_left_as_they_were() -> None:
    model = _initialized(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))).train()
    state = torch.get_rng_state()
    first, again = (curvature_metric(_objective(model, _vectors(), F.cross_entropy)) for _ in range(2))
    assert isinstance(first, CurvatureMetric)
    for key, a in first.preconditioner.items():
        assert torch.equal(a, again.preconditioner[key])
    assert torch.equal(torch.get_rng_state(), state)


# ---- estimates ---------------------------------------------------------------------------------------------

IN_METRIC: dict[str, Any] = {"sampler": "preconditioned-sgld", "preconditioner": "curvature", "progress": False}
SHORT: dict[str, Any] = {"num_chains": 2, "num_draws": 60, "num_burnin": 60, "batch_size": 32}


@pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
@pytest.mark.parametrize("name", ["ReLU", "LayerNorm", "BatchNorm", "attention, tied embeddings", "own loss"])
def test_the_estimate_is_the_same_for_a_rescaled_model(name: str) -> None:
    """With the same random numbers, to rounding; γ, ε and all that is said of distances, too."""
    model, rescaled, _, data, loss_fn = _case(name, torch.float32)
    first, second = (llc_fast.estimate_llc(m, data, loss_fn, seed=3, **IN_METRIC, **SHORT) for m in (model, rescaled))
    assert second.llc_mean == pytest.approx(first.llc_mean, rel=1e-3)
    for key in ("lr", "localization"):
        assert second.settings[key] == pytest.approx(first.settings[key], rel=1e-3)
    for key in ("reach", "distance_over_reference", "distance_over_prior"):
        assert second.diagnostics[key] == pytest.approx(first.diagnostics[key], rel=1e-2)
    plain = [
        llc_fast.estimate_llc(m, data, loss_fn, seed=3, progress=False, lr=first.settings["lr"], **SHORT).llc_mean
        for m in (model, rescaled)
    ]
    assert plain[1] != pytest.approx(plain[0], rel=0.02)  # which SGLD is not


def _regression(num: int = 400) -> tuple[nn.Linear, tuple[Tensor, Tensor], Tensor]:
    """A least-squares fit, its data, and the Hessian of the mean squared error: twice the matrix of second moments."""
    x = _normal(num, 6, seed=1) * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    x[:, 1] += 0.9 * x[:, 2]
    y = _normal(num, 1, seed=2)
    solution = torch.linalg.lstsq(x, y).solution
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(solution.T)
    return model, (x, y), 2 * x.T @ x / num


def _exact(hessian: Tensor, nbeta: float, gamma: float, metric: Tensor) -> float:
    """½ tr nβH(nβH + γA⁻¹)⁻¹"""
    h = nbeta * hessian
    return 0.5 * float(torch.trace(h @ torch.linalg.inv(h + gamma * torch.diag(1 / metric))))


@pytest.mark.parametrize("sampler", ["given", "curvature", "mala", "hmc"])
def test_the_posterior_of_a_localization_in_the_metric(sampler: str) -> None:
    """A quadratic well in closed form, with steps so large that the bias that is subtracted matters."""
    model, data, hessian = _regression()
    metric = torch.tensor([[0.2, 5.0, 0.7, 20.0, 3.0, 300.0]], dtype=torch.float64)
    nbeta, gamma, lr = 60.0, 40.0, None
    given = {"preconditioner": {"weight": metric}, "localization_metric": "sampler"}
    options: dict[str, Any] = {"num_draws": 2000, "num_burnin": 300, "num_chains": 4}
    if sampler == "curvature":
        metric = curvature_metric(_objective(model, data, mse, batch_size=400)).preconditioner["weight"]
        used: Any = PreconditionedSGLDSampler(preconditioner="curvature")
    elif sampler == "given":
        used = PreconditionedSGLDSampler(**given)
    else:
        used = {"mala": MALASampler, "hmc": HMCSampler}[sampler](**given)
        if sampler == "hmc":
            options |= {"num_draws": 500, "num_burnin": 100}
    result = llc_fast.estimate_llc(
        model, data, mse, sampler=used, nbeta=nbeta, localization=gamma, lr=lr, batch_size=400, progress=False,
        seed=5, **options,
    )  # fmt: skip
    exact = _exact(hessian, nbeta, gamma, metric[0])
    euclidean = _exact(hessian, nbeta, gamma, torch.ones(6, dtype=torch.float64))
    assert abs(result.llc_mean - exact) < 5 * result.llc_stderr + 1e-3
    assert abs(exact - euclidean) > 5 * result.llc_stderr  # otherwise it shows nothing
    assert result.settings["localization_metric"] == "sampler"
    # In the metric ‖w − w*‖² has the mean tr A⁻¹(nβH + γA⁻¹)⁻¹, and dλ̂/dlog γ = −(γ/2)·tr nβH·M·A⁻¹·M with that M.
    inverse = torch.linalg.inv(nbeta * hessian + gamma * torch.diag(1 / metric[0]))
    expected = float((inverse.diagonal() / metric[0]).sum())
    found = result.traces["squared_distance"][:, result.schedule.draws].mean()
    assert found == pytest.approx(expected, rel=0.3 if sampler in ("given", "curvature") else 0.1)
    slope = -gamma / 2 * nbeta * float(torch.trace(hessian @ inverse @ torch.diag(1 / metric[0]) @ inverse))
    measured, error = (result.diagnostics[f"localization_slope{end}"] for end in ("", "_stderr"))
    if measured is not None:
        assert abs(measured - slope) < 5 * error + 0.02 * abs(slope)


def test_large_steps_have_their_bias_subtracted_exactly() -> None:
    """At ε·a = 1 in the stiffest direction; the pull is outside the metric, so that both parts have one eigenbasis."""
    model, data, hessian = _regression()
    metric = torch.tensor([[0.2, 5.0, 0.7, 20.0, 3.0, 300.0]], dtype=torch.float64)
    nbeta, gamma = 60.0, 40.0
    root = metric[0].sqrt()
    stiffest = nbeta * float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1]) + gamma
    result = llc_fast.estimate_llc(
        model, data, mse, sampler="preconditioned-sgld", preconditioner={"weight": metric}, lr=1 / stiffest,
        localization_metric="sampler", nbeta=nbeta, localization=gamma, batch_size=400, progress=False, seed=6,
        bias_correction=True, num_draws=8000, num_burnin=1000, num_chains=4,
    )  # fmt: skip
    exact = _exact(hessian, nbeta, gamma, metric[0])
    assert result.diagnostics["bias_share"] > 0.03
    assert abs(result.llc_mean - exact) < 5 * result.llc_stderr


def test_the_default_localization_is_that_of_the_metric() -> None:
    model, data, _ = _regression()
    found = curvature_metric(_objective(model, data, mse, batch_size=400))
    result = llc_fast.estimate_llc(
        model, data, mse, preconditioner="curvature", batch_size=400, progress=False, num_draws=200, num_burnin=50
    )
    weight = model.weight.detach()
    norm = float((weight.square() / found.preconditioner["weight"]).sum().sqrt())
    assert found.norm == pytest.approx(norm)
    assert result.settings["localization"] == pytest.approx(llc_fast.default_localization(6, norm))
    assert result.settings["sampler"] == "preconditioned-sgld"
    assert result.settings["preconditioner"] == "curvature"
    assert result.settings["curvature"] == "gauss-newton"
    assert result.diagnostics["metric_gradients"] == 80 and result.diagnostics["metric_undetermined"] == 0
    assert result.diagnostics["reach"] == pytest.approx(0.5, rel=1e-3)


def test_the_budget_counts_it() -> None:
    """80 gradients are 20 steps of each of four chains."""
    from llc_fast.settings import Settings

    options: dict[str, Any] = {"sampler": "preconditioned-sgld", "lr": 1e-3, "max_gradients": 4000}
    assert Settings(**options).longest.num_steps == 1000
    assert Settings(**options, preconditioner="curvature").longest.num_steps == 980
    assert Settings(**options, preconditioner="curvature").in_metric({}).longest.num_steps == 980
    with pytest.raises(ValueError, match="max_gradients=100 is too few for 4 chains"):
        Settings(**{**options, "max_gradients": 100}, preconditioner="curvature")


def test_localization_alone_is_that_of_the_metric() -> None:
    """nβ = 0 samples N(w*, A/γ)."""
    model, data, _ = _regression()
    metric = torch.tensor([[0.2, 5.0, 0.7, 20.0, 3.0, 300.0]], dtype=torch.float64)
    result = llc_fast.estimate_llc(
        model, data, mse, sampler=PreconditionedSGLDSampler(preconditioner={"weight": metric}), nbeta=0,
        localization=7.0, localization_metric="sampler", num_draws=500, num_burnin=200, num_chains=8, batch_size=8,
        num_steps_bw_draws=20, keep_ends=True, progress=False,
        observables={"w": lambda draw: (draw.params["weight"] - model.weight).square()},
    )  # fmt: skip
    found = torch.from_numpy(result.observables["w"]).mean(dim=(0, 1))
    torch.testing.assert_close(found, metric / 7.0, rtol=0.2, atol=0)


def test_a_resumed_run_has_the_same_bits(tmp_path: Any) -> None:
    model, _, _, data, loss_fn = _case("ReLU", torch.float32)
    options = {**IN_METRIC, **SHORT, "lr": 1e-5, "seed": 3}
    whole = llc_fast.estimate_llc(model, data, loss_fn, **options)
    place = tmp_path / "run.ckpt"
    llc_fast.estimate_llc(model, data, loss_fn, checkpoint=place, **{**options, "num_draws": 20})
    resumed = llc_fast.estimate_llc(model, data, loss_fn, checkpoint=place, **options)
    assert resumed.diagnostics["resumed_steps"] > 0
    assert (whole.loss_trace == resumed.loss_trace).all()
    with pytest.raises(ValueError, match="another run"):
        llc_fast.estimate_llc(model, data, loss_fn, checkpoint=place, **{**options, "localization_metric": "euclidean"})


def test_calibrate_gives_back_the_name(recwarn: Any) -> None:
    model, _, _, data, loss_fn = _case("ReLU", torch.float32)
    found = llc_fast.calibrate(model, data, loss_fn, seed=3, **IN_METRIC, **SHORT)
    assert found["sampler"].preconditioner == "curvature"
    chosen = llc_fast.estimate_llc(model, data, loss_fn, seed=3, progress=False, **found)
    direct = llc_fast.estimate_llc(model, data, loss_fn, seed=3, **IN_METRIC, **SHORT)
    assert (chosen.loss_trace == direct.loss_trace).all()


def test_what_is_not_possible_is_refused() -> None:
    model, _, _, data, loss_fn = _case("ReLU", torch.float32)

    def estimate(**options: Any) -> None:
        llc_fast.estimate_llc(model, data, loss_fn, progress=False, **options)

    with pytest.raises(ValueError, match="preconditioner is given, and sampler='sgld' takes none"):
        estimate(sampler="sgld", preconditioner="curvature")
    with pytest.raises(ValueError, match="localization_metric is given, and sampler='rmsprop-sgld' takes none"):
        estimate(sampler="rmsprop-sgld", localization_metric="sampler")
    with pytest.raises(ValueError, match="preconditioner='hessian' is unknown"):
        estimate(preconditioner="hessian")
    with pytest.raises(ValueError, match="localization_metric='riemannian' is unknown"):
        estimate(preconditioner="curvature", localization_metric="riemannian")
    with pytest.raises(ValueError, match="refine=True is not possible"):
        estimate(preconditioner="curvature", refine=True)
    with pytest.raises(ValueError, match="beside a sampler that has another one"):
        estimate(sampler=PreconditionedSGLDSampler(preconditioner=2.0), preconditioner="curvature")
    with pytest.raises(ValueError, match="is not possible in an optimizer"):
        llc_fast.PreconditionedSGLD(model.parameters(), preconditioner="curvature")


def test_a_euclidean_localization_is_another_posterior() -> None:
    """The metric changes how fast chains move, and not where to."""
    model, data, hessian = _regression()
    result = llc_fast.estimate_llc(
        model, data, mse, preconditioner="curvature", localization_metric="euclidean", nbeta=60.0, localization=4.0,
        batch_size=400, progress=False, num_draws=3000, num_burnin=500,
    )  # fmt: skip
    exact = _exact(hessian, 60.0, 4.0, torch.ones(6, dtype=torch.float64))
    assert abs(result.llc_mean - exact) < 5 * result.llc_stderr + 1e-3
    assert result.settings["localization_metric"] == "euclidean"


def test_scans_and_stores_know_it(tmp_path: Any) -> None:
    model, data, hessian = _regression()
    metric = torch.tensor([[0.2, 5.0, 0.7, 20.0, 3.0, 300.0]], dtype=torch.float64)
    options = {"sampler": PreconditionedSGLDSampler(preconditioner={"weight": metric}, localization_metric="sampler")}
    found = llc_fast.scan(
        model, data, mse, nbeta=[0.0, 60.0], localization=[40.0], num_chains=2, num_draws=300, num_burnin=100,
        progress=False, batch_size=400, **options,
    )  # fmt: skip
    prior, posterior = (found.dataset.isel(nbeta=k, localization=0) for k in (0, 1))
    # P/γ is the mean of (w − w*)ᵀA⁻¹(w − w*) where γ is all there is.
    assert float(prior["distance"]) == pytest.approx(math.sqrt(6 / 40), rel=0.1)
    exact = _exact(hessian, 60.0, 40.0, metric[0])
    assert abs(float(posterior["llc_mean"]) - exact) < 5 * float(posterior["llc_stderr"]) + 1e-2


def test_gradients_through_functional_calls_agree() -> None:
    """(Jᵀu)² of one sample is what torch.func's Jacobian says: the outputs that are seen are the model's."""
    model, _, _, (x, y), _ = _case("ReLU")
    probes = 800
    found = curvature_metric(_objective(model, (x, y), mse, batch_size=64), probes=probes, damping=0.0)
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(params)
    for key, j in jacobian.items():
        exact = (2 / 3) * j.square().sum(dim=1).mean(dim=0)
        seen = exact > 0
        found_h = 1 / found.preconditioner[key]
        torch.testing.assert_close(found_h[seen], exact[seen], rtol=6 * math.sqrt(2 / probes), atol=0)


def _hmc(energy: Callable[[Tensor], Tensor], start: Tensor, step: Tensor, draws: int, seed: int) -> Tensor:
    """Hamiltonian Monte Carlo of our own, in float64: where each of several chains is after every trajectory."""
    generator = torch.Generator().manual_seed(seed)
    w, found, accepted = start.clone(), list[Tensor](), 0.0

    def slope(w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach().requires_grad_()
        values = energy(w)
        return values.detach(), torch.autograd.grad(values.sum(), w)[0]

    here, force = slope(w)
    for _ in range(draws):
        v = torch.randn(w.shape, dtype=torch.float64, generator=generator)
        scale = step * (0.8 + 0.4 * torch.rand(len(w), 1, dtype=torch.float64, generator=generator))
        there, place, pull = w, v, force
        for _ in range(8):
            place = place - 0.5 * scale * pull
            there = there + scale * place
            end, pull = slope(there)
            place = place - 0.5 * scale * pull
        change = end - here + 0.5 * (place.square() - v.square()).sum(dim=1)
        moves = torch.rand(len(w), dtype=torch.float64, generator=generator).log() < -change
        w, force = (torch.where(moves[:, None], a, b) for a, b in ((there, w), (pull, force)))
        here = torch.where(moves, end, here)
        accepted += float(moves.double().mean()) / draws
        found.append(w)
    assert accepted > 0.6
    return torch.stack(found)


def test_the_posterior_is_what_an_independent_sampler_finds() -> None:
    """A small ReLU network, rescaled by 1000: far from quadratic, and by HMC that shares no code."""
    x, y = _normal(100, 2, seed=1), _normal(100, 1, seed=2)
    model = _initialized(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    with torch.no_grad():
        y = model(x) + 0.3 * y
        model[0].weight *= 1000
        model[0].bias *= 1000
        model[2].weight /= 1000
    metric = curvature_metric(_objective(model, (x, y), mse, batch_size=100)).preconditioner
    nbeta = 20.0
    result = llc_fast.estimate_llc(
        model, (x, y), mse, preconditioner="curvature", nbeta=nbeta, batch_size=100, num_draws=5000, num_burnin=1000,
        num_chains=4, progress=False, seed=2,
    )  # fmt: skip
    gamma = result.settings["localization"]
    names = [name for name, _ in model.named_parameters()]
    center = torch.cat([p.detach().flatten() for p in model.parameters()])
    a = torch.cat([metric[name].flatten() for name in names])

    def loss(w: Tensor) -> Tensor:
        first, bias, second, last = w[:, :6].view(-1, 3, 2), w[:, 6:9], w[:, 9:12], w[:, 12:]
        hidden = torch.relu(torch.einsum("chi,ni->cnh", first, x) + bias[:, None])
        return (torch.einsum("cnh,ch->cn", hidden, second) + last - y[:, 0]).square().mean(dim=1)

    def energy(w: Tensor) -> Tensor:
        return nbeta * loss(w) + gamma / 2 * ((w - center).square() / a).sum(dim=1)

    step = 0.25 * a.sqrt() / math.sqrt(nbeta)
    draws = _hmc(energy, center.repeat(32, 1), step, 250, seed=3)[60:]
    with torch.no_grad():
        excess = nbeta * (torch.stack([loss(w) for w in draws]) - loss(center[None]))
    per_chain = excess.mean(dim=0)
    exact, error = float(per_chain.mean()), float(per_chain.std()) / math.sqrt(32)
    assert error < 0.03 * exact
    assert abs(result.llc_mean - exact) < 4 * math.hypot(result.llc_stderr, error)
