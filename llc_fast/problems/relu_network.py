"""Random ReLU networks, as in Furman & Lau 2024 (arXiv 2402.03698), and what rescaling a hidden layer does to them.

A ReLU passes positive factors on, so that a hidden unit whose incoming weights and bias are multiplied by a, and whose
outgoing weights are divided by a, computes the same. With D the diagonal matrix of these factors, the network with
parameters w' = D·w is the same function, and its loss L'(w') = L(D⁻¹·w') has the same learning coefficient. Langevin
dynamics does not see it so, for the gradient at w' is D⁻¹·g; in the metric A' = D·A·D it does:

    w' ← w' − (ε/2)·A'·nβ·D⁻¹g + √(εA')·ξ    is    D·( w − (ε/2)·A·nβ·g + √(εA)·ξ ).

The localization γ(w' − w'*) is no gradient of L' and does not follow: under A' it pulls as hard as γ·D² at w. So this
is exact for γ = 0, or for a localization in the metric, (γ/2)·(w' − w'*)ᵀ·D⁻²·(w' − w'*).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from llc_fast.support.arguments import check_number

INPUT_BOUND = 10.0
"""Inputs are uniform on [−10, 10]."""
_CHUNK = 32  # samples whose derivatives are in memory together


def make_network(widths: Sequence[int], seed: int, *, copies: int = 0) -> nn.Sequential:
    """A random network of linear layers with ReLUs in between.

    Weights are truncated normal with standard deviation 1/√fan_in, cut at two of them; biases are normal.

    Args:
        widths: of the input, the hidden layers and the output.
        seed: equal seeds give equal networks.
        copies: units 1 … copies of the first hidden layer become copies of its unit 0 (incoming weights and bias),
            which makes the network singular.

    Raises:
        ValueError: fewer than two widths, or as many copies as the layer has units.
    """
    if len(widths) < 2:
        raise ValueError(f"widths must be those of the input, hidden layers and the output, got {list(widths)}")
    if copies and not 0 < copies < widths[1]:
        raise ValueError(f"copies must be at least 0 and less than the {widths[1]} units of the layer, got {copies}")
    model = nn.Sequential()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for k, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            if k:
                model.append(nn.ReLU())
            layer = nn.Linear(inputs, outputs)
            std = inputs**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.normal_(layer.bias)
            if k == 0 and copies:
                layer.weight[1 : copies + 1], layer.bias[1 : copies + 1] = layer.weight[0], layer.bias[0]
            model.append(layer)
    return model


def make_data(model: nn.Sequential, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs uniform on [−10, 10], and what the network makes of them: L(w*) = 0."""
    generator = torch.Generator().manual_seed(seed)
    linear = next(m for m in model if isinstance(m, nn.Linear))
    x = torch.empty(num_samples, linear.in_features, dtype=linear.weight.dtype)
    x.uniform_(-INPUT_BOUND, INPUT_BOUND, generator=generator)
    with torch.no_grad():
        return x, model(x)


def scale_factors(
    model: nn.Sequential, layer: int, factor: float, units: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The diagonal of D, by parameter name, in float64 and in shapes that broadcast to the parameters.

    Args:
        model: linear layers with ReLUs in between.
        layer: which hidden layer; 0: the first.
        factor: a > 0; incoming weights and biases of the units are multiplied by it, outgoing weights divided.
        units: of that layer; None: all.

    Raises:
        ValueError: there is no such layer or unit, or something else than a ReLU follows it; a factor that is not a
            finite positive number.
    """
    check_number("factor", factor, minimum=0, exclusive=True)
    named = list(model.named_children())
    linear = [k for k, (_, module) in enumerate(named) if isinstance(module, nn.Linear)]
    if not 0 <= layer < len(linear) - 1:
        raise ValueError(f"layer must be one of the {max(len(linear) - 1, 0)} hidden layers, from 0 on, got {layer}")
    place, following = linear[layer], linear[layer + 1]
    between = [module for _, module in named[place + 1 : following]]
    if any(not isinstance(module, nn.ReLU) for module in between):
        raise ValueError(f"only ReLUs may follow layer {layer}, rescaling changes what {between} give")
    incoming, count = named[place][0], len(named[place][1].weight)  # type: ignore[arg-type]
    scale = torch.ones(count, dtype=torch.float64)
    chosen = range(count) if units is None else units
    if any(not 0 <= unit < count for unit in chosen):
        raise ValueError(f"units must be among the {count} of layer {layer}, from 0 on, got {list(chosen)}")
    scale[list(chosen)] = factor
    factors = {name: torch.ones((), dtype=torch.float64) for name, _ in model.named_parameters()}
    factors[f"{incoming}.weight"], factors[f"{named[following][0]}.weight"] = scale[:, None], 1 / scale
    if f"{incoming}.bias" in factors:
        factors[f"{incoming}.bias"] = scale
    return factors


@torch.no_grad()
def rescale(model: nn.Sequential, layer: int, factor: float, units: Sequence[int] | None = None) -> nn.Sequential:
    """A copy of `model` that computes the same function with parameters D·w; see :func:`scale_factors`."""
    factors, rescaled = scale_factors(model, layer, factor, units), copy.deepcopy(model)
    for name, p in rescaled.named_parameters():
        p.mul_(factors[name].to(p.device))
    return rescaled


def undoing_preconditioner(
    model: nn.Sequential,
    layer: int,
    factor: float,
    units: Sequence[int] | None = None,
    *,
    preconditioner: float | Mapping[str, Tensor | float] = 1.0,
) -> dict[str, Tensor]:
    """A' = D·A·D by parameter name: under it the rescaled network moves as `model` does under A, if γ = 0.

    Args:
        model, layer, factor, units: as :func:`rescale` was given.
        preconditioner: A, for all parameters or by name.
    """
    squared = {name: scale.square() for name, scale in scale_factors(model, layer, factor, units).items()}
    if isinstance(preconditioner, Mapping):
        return {name: scale * preconditioner[name] for name, scale in squared.items()}
    return {name: scale * preconditioner for name, scale in squared.items()}


def gauss_newton(model: nn.Module, inputs: Tensor) -> Tensor:
    """H = (2/k)·Σ ∂f ∂fᵀ over the k outputs, averaged over `inputs`, ``[d, d]`` in float64, parameters in their order.

    It is the Hessian of the mean squared error where the model fits its data exactly. d² numbers: for small networks.
    """
    total: Tensor | float = 0.0
    for piece in _jacobians(model, inputs):
        flat = torch.cat([j.flatten(2) for j in piece.values()], dim=2).flatten(0, 1)
        total = total + (2 / piece[next(iter(piece))].shape[1]) * (flat.T @ flat)
    assert isinstance(total, Tensor)
    return total / len(inputs)


def curvature_preconditioner(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """A = 1/H_ii by parameter name, with H of :func:`gauss_newton`.

    In rescaled parameters H'_ii = H_ii/D_ii²: A' = D·A·D follows every rescaling without knowing of it. Metrics
    1/√(g²) go with D where D² is needed.

    Raises:
        ValueError: there are parameters that no output depends on.
    """
    totals: dict[str, Tensor] = {}
    for piece in _jacobians(model, inputs):
        for name, j in piece.items():
            totals[name] = totals.get(name, 0.0) + (2 / j.shape[1]) * j.square().sum((0, 1))
    if unused := [name for name, total in totals.items() if not (total > 0).all()]:
        raise ValueError(f"the outputs do not depend on all of {', '.join(unused)}: use another metric")
    return {name: len(inputs) / total for name, total in totals.items()}


def _jacobians(model: nn.Module, inputs: Tensor) -> Iterator[dict[str, Tensor]]:
    """∂f/∂w by parameter name, ``[sample, output, *shape]`` in float64, a few samples at a time."""
    exact = copy.deepcopy(model).double()
    params = {name: p.detach() for name, p in exact.named_parameters()}

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(exact, params, (x[None],))[0]  # type: ignore[no-any-return]

    for piece in torch.split(inputs.to(next(iter(params.values()))), _CHUNK):
        yield vmap(jacrev(output), (None, 0))(params, piece)
