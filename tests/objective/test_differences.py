"""Gradients that are not the derivative of the loss are found, and no other one is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import runs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import llc_fast
from llc_fast.data import make_source
from llc_fast.objective import differences
from llc_fast.objective.objective import Objective

mse = F.mse_loss
CPU = torch.device("cpu")


def _objective(model: nn.Module, loss_fn: Any = mse, n: int = 64, *, size: int = 32, checks: int = 48) -> Objective:
    dtype = next(model.parameters()).dtype
    data = tuple(t.to(dtype) for t in runs.data(n, torch.float64))
    return Objective(model, loss_fn, make_source(data, size, CPU), device=CPU, max_checks=checks)


# ---- gradients that are wrong ------------------------------------------------------------------------------


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) * 0.5)


class Quantized(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        q = (4 * self.w).round() / 4
        return x @ (self.w + (q - self.w).detach()).t()


class Signs(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w + (self.w.sign() - self.w).detach()).t()


class PartDetached(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.w[:1], self.w[1:].detach()]).t()


class WithoutGrad(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ self.w.t()


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return _Scale.apply(x, self.factor)


class Lookup(nn.Module):
    """Mean of rows; row 0 is looked up, too."""

    def __init__(self, functional: bool = False, **options: Any) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 3, **({} if functional else options))
        self.out, self.options = nn.Linear(3, 1), options if functional else None
        nn.init.normal_(self.e.weight)

    def forward(self, x: Tensor) -> Tensor:
        ids = (3 * x.abs()).long().clamp(max=5)
        rows = self.e(ids) if self.options is None else F.embedding(ids, self.e.weight, **self.options)
        return self.out(rows.mean(1))


def _between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 1))


def _hooked(hook: Callable[[Tensor], Tensor]) -> nn.Module:
    model = runs.mlp()
    for p in model.parameters():
        p.register_hook(hook)
    return model


def _backward_hooked() -> nn.Module:
    model = runs.mlp()
    model[1].register_full_backward_hook(lambda module, given, out: (0.5 * given[0],))
    return model


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "straight-through": (lambda: _between(Quantized()), "2.w"),
    "signs": (lambda: _between(Signs()), "2.w"),
    "reversed": (lambda: _between(Scaled(-1.0)), "0.weight"),
    "rescaled": (lambda: _between(Scaled(0.8)), "0.weight"),
    "by frequency": (lambda: Lookup(scale_grad_by_freq=True), "e.weight"),
    "by frequency, functional": (lambda: Lookup(True, scale_grad_by_freq=True), "e.weight"),
    "clipped": (lambda: _hooked(lambda g: g.clamp(-1e-2, 1e-2)), "0.weight"),
    "module's hook": (_backward_hooked, "0.weight"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_named(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, parameter = WRONG[name]
    with pytest.raises(ValueError, match=rf"^the gradient of the loss with respect to .*'{parameter}'.* is not its"):
        _objective(make().to(dtype))


def test_a_detached_part_of_the_loss_is_named() -> None:
    model = runs.mlp()
    with pytest.raises(ValueError, match="is not its derivative"):
        _objective(model, lambda out, y: mse(out, y) + 0.1 * sum(p.detach().square().sum() for p in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Lookup(padding_idx=0), {"e.weight": 3}),
        (lambda: Lookup(True, padding_idx=0), {"e.weight": 3}),
        (lambda: _between(PartDetached()), {"2.w": 30}),
        (lambda: _between(WithoutGrad()), {"0.weight": 18, "0.bias": 6, "2.w": 36}),
    ],
)
def test_elements_without_a_gradient_are_not_sampled(
    make: Callable[[], nn.Module], expected: dict[str, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    count = sum(p.numel() for p in model.parameters())
    objective = _objective(model)
    assert objective.not_sampled == expected
    assert objective.num_parameters == count - sum(expected.values())


def test_a_masking_hook_takes_its_elements_out() -> None:
    model = runs.mlp()
    mask = torch.ones(4, 3)
    mask[2] = 0
    model[0].weight.register_hook(lambda g: g * mask)
    assert _objective(model).not_sampled == {"0.weight": 3}


def test_the_pad_row_stays_and_the_others_move() -> None:
    model = Lookup(padding_idx=0)
    result = runs.estimate(model=model, data=runs.data(), observables={"e": lambda draw: draw.params["e.weight"]})
    rows = result.observables["e"][:, -1] - model.e.weight.detach().double().numpy()
    assert (rows[:, 0] == 0).all() and (rows[:, 1:] != 0).any()


def test_what_the_loss_does_not_depend_on_is_no_matter() -> None:
    """A padded bag leaves the row out, and rows that no sample looks up are free: these are sampled as before."""

    class Bag(Lookup):
        def forward(self, x: Tensor) -> Tensor:
            ids = (3 * x.abs()).long().clamp(max=4)
            return self.out(F.embedding_bag(ids, self.e.weight, padding_idx=0))

    assert _objective(Bag()).not_sampled == {}


# ---- no false alarms ---------------------------------------------------------------------------------------

ACTIVATIONS = [
    *(nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Hardtanh, nn.ReLU6, nn.SiLU, nn.Softplus, nn.ELU),
    *(nn.Hardswish, nn.Softshrink, nn.Hardshrink, nn.Identity),
]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "hinge": lambda o, y: (1 - o * y.sign()).clamp(min=0).mean(),
    "quantile": lambda o, y: torch.maximum(0.9 * (y - o), 0.1 * (o - y)).mean(),
    "each": lambda o, y: (o - y).square().mean(1),
    "largest": lambda o, y: (o - y).abs().max(),
    "median": lambda o, y: (o - y).abs().median(),
    "trimmed": lambda o, y: (o - y).square().flatten().sort().values[:-2].mean(),
    "root": lambda o, y: (mse(o, y) + 1e-3).sqrt(),
}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, :, None] * self.scale
        return self.out(self.a(h, h, h, need_weights=False)[0].mean(1))


class _Maxout(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.out, self.width = nn.Linear(3, 2 * width), nn.Linear(width, 1), width

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).view(len(x), self.width, 2).max(-1).values)


class _Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.r, self.out = nn.GRU(1, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.r(x[:, :, None])[0][:, -1])


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_() if self.reentrant else x
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def _network(chosen: random.Random) -> nn.Module:
    width, kind = (
        chosen.choice([1, 2, 3, 8, 16, 32]),
        chosen.choice(["plain"] * 3 + ["norm", "batch", "dropout", "other"]),
    )
    if kind == "other":
        makers = [_Attention, lambda: _Maxout(width), lambda: _Recurrent(width)]
        return chosen.choice(makers)()
    layers, inputs = list[nn.Module](), 3
    for _ in range(chosen.randint(1, 4)):
        layers.append(nn.Linear(inputs, width, bias=chosen.random() < 0.8))
        if kind == "batch":
            layers.append(nn.BatchNorm1d(width))
        if kind == "norm" and width > 1:
            layers.append(nn.LayerNorm(width))
        layers.append(chosen.choice(ACTIVATIONS)())
        if kind == "dropout":
            layers.append(nn.Dropout(0.3))
        inputs = width
    model = nn.Sequential(*layers, nn.Linear(inputs, 1))
    if chosen.random() < 0.2:
        model.eval()
    return _Checkpointed(model, chosen.random() < 0.5) if chosen.random() < 0.15 else model


def _check_random_network(seed: int) -> None:
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    dtype = chosen.choice([torch.float32] * 3 + [torch.float64] * 2 + [torch.bfloat16])
    model, loss_fn = _network(chosen).to(dtype), LOSSES[chosen.choice(list(LOSSES))]
    n = chosen.choice([8, 16, 64])
    x = torch.randn(n, 3).to(dtype)
    y = (torch.randn(n, 1) * chosen.choice([0.01, 1, 100])).to(dtype)
    if chosen.random() < 0.3:
        y = model(x).detach()  # a minimum of many of these losses
    elif chosen.random() < 0.5:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            loss_fn(model(x), y).mean().backward()
            optimizer.step()
    source = make_source((x, y), chosen.choice([4, 8, n]), CPU)
    objective = Objective(model, loss_fn, source, device=CPU, max_checks=chosen.choice([0, 48, 480]))
    assert objective.not_sampled == {}, seed


@pytest.mark.parametrize("block", range(4))
def test_no_random_network_is_refused(block: int) -> None:
    for seed in range(25 * block, 25 * block + 25):
        _check_random_network(seed)


@pytest.mark.slow
def test_none_of_many_random_networks_is_refused() -> None:
    for seed in range(1000, 4000):
        _check_random_network(seed)


# ---- what it costs -----------------------------------------------------------------------------------------


def test_the_comparison_stays_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [0], differences._Comparison._loss

    def counted(self: Any) -> float:
        calls[0] += 1
        return original(self)

    monkeypatch.setattr(differences._Comparison, "_loss", counted)
    deep = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(3, 3), nn.Tanh())), nn.Linear(3, 1))
    for checks, most in ((0, 48), (48, 48), (480, 120)):
        calls[0] = 0
        _objective(deep, checks=checks)
        assert 0 < calls[0] <= most


def test_models_that_round_are_compared_in_their_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on the way to the loss, as in many implementations of RMSNorm, makes differences in float64 worthless."""

    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).float()
            return self.b((h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype))

    used, original = list[torch.dtype](), differences._Comparison.run

    def watched(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        used.append(self._method.dtype)
        return found

    monkeypatch.setattr(differences._Comparison, "run", watched)
    _objective(Rounds())
    _objective(runs.mlp())
    assert used == [torch.float32, torch.float64]


def test_estimates_name_what_is_wrong_before_sampling() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="use the true gradient, or leave these parameters out with params="):
        runs.estimate(model=_between(Quantized()))
    result = llc_fast.estimate_llc(
        _between(Quantized()),
        runs.data(),
        mse,
        params=["0.*", "4.*"],
        lr=1e-4,
        num_draws=5,
        num_burnin=5,
        progress=False,
    )
    assert result.settings["num_parameters"] == 31


def test_a_bias_before_batch_normalization_alone() -> None:
    """The loss does not depend on it: gradient and differences are rounding errors, which is no disagreement."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double().train()
    data = torch.randn(32, 3).double(), torch.randn(32, 1).double()
    source = make_source(data, 8, torch.device("cpu"))
    objective = Objective(model, nn.functional.mse_loss, source, device=torch.device("cpu"), params="0.bias")
    assert objective.not_sampled == {}


# ---- large models ------------------------------------------------------------------------------------------


def test_large_models_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With directions that are made anew each time, where the parameters are, and in float32."""
    monkeypatch.setattr(differences, "_LARGE", 10)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    assert _objective(layers).trial.unused == ()
    assert _objective(layers.bfloat16()).trial.unused == ()
    with pytest.raises(ValueError, match="is not its derivative"):
        _objective(nn.Sequential(nn.Linear(3, 6), PartDetached(), nn.Linear(6, 1)))


def test_directions_of_large_models_are_normal_and_apart() -> None:
    """Mean 0 and variance 1; no two of them are alike."""
    p = torch.empty(100, 200, dtype=torch.bfloat16)
    found = [differences.normals_like(p, seed, place) for seed, place in [(0, 0), (0, 1), (1, 0)]]
    for u in found:
        assert u.shape == p.shape and u.dtype == torch.float32
        assert abs(float(u.mean())) < 5 / 20000**0.5 and abs(float(u.var()) - 1) < 5 * (2 / 20000) ** 0.5
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert abs(float((found[a] * found[b]).mean())) < 5 / 20000**0.5


def test_no_second_copy_in_float32() -> None:
    """Of a bfloat16 model only the tensors that move are widened."""
    objective = _objective(nn.Linear(3, 1).bfloat16())
    params = {name: w.float() for name, w in objective.reference.items()}
    exact = objective.in_precision(Tensor.float, reference=params)
    assert all(exact.reference[name] is w for name, w in params.items())
    wide = objective.in_full_precision().reference
    assert all(torch.equal(wide[name], w) for name, w in params.items())
