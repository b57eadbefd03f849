"""Chooses what the user left open."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llc_fast.posterior import Posterior
from llc_fast.samplers import Sampler

STIFFNESS = 0.2
"""ε·(nβ·h_max + γ) of the default step size.

In a quadratic direction of curvature a, Langevin steps of size ε inflate the variance by 1/(1 − εa/4): 5 % in the
stiffest direction at this value, less in every other.
"""


PILOT_BATCHES = 20


def pilot_metric(posterior: Posterior, options: Mapping[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """The preconditioner p of an adaptive sampler near w*: 1/(√V + eps), V the mean of g² over a few minibatches."""
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in posterior.anchor.items()}
    batches = itertools.islice(posterior.source.minibatches(seed), PILOT_BATCHES)
    for batch in batches:
        params = {name: p.clone().requires_grad_() for name, p in posterior.anchor.items()}
        with torch.enable_grad():
            loss = posterior.loss(params, copy.deepcopy(batch), posterior.fresh_buffers())
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        for square, grad in zip(squares.values(), grads, strict=True):
            square += grad.float() ** 2 / PILOT_BATCHES
    eps = float(options["eps"])
    if options["relative_eps"]:
        total = sum(float(v.double().sum()) for v in squares.values())
        eps *= math.sqrt(total / posterior.num_parameters)
    return {name: 1 / (v.sqrt() + eps) for name, v in squares.items()}


def top_curvature(
    posterior: Posterior, *, metric: Mapping[str, Tensor | float] | None = None, seed: int = 0, iterations: int = 12
) -> float:
    """The largest curvature of the minibatch loss at w*, that is the top eigenvalue of √p·H·√p in the metric 1/p.

    Power iteration on Hessian-vector products, which are central differences of gradients, so that any model that
    trains works; the result is a few percent below the true value, which is precise enough for a step size.

    Args:
        posterior: the model, its loss and data.
        metric: p for each parameter by name; None: 1.
        seed: of the starting direction and the minibatch.
        iterations: of the power method, two gradients each.
    """
    names = list(posterior.anchor)
    generator = torch.Generator().manual_seed(seed)
    batch = next(iter(posterior.source.minibatches(seed)))
    scale = math.sqrt(sum(float(p.double().square().sum()) for p in posterior.anchor.values()))
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in posterior.anchor.values())
    delta = (1e-1 if low else 1e-3) * max(scale, 1e-3)  # short against w*, long against rounding
    roots = [torch.as_tensor(1.0 if metric is None else metric[name]).sqrt() for name in names]

    def gradient(direction: list[Tensor], sign: float) -> list[Tensor]:
        params = {
            name: (posterior.anchor[name] + (sign * delta * d).to(posterior.anchor[name].dtype)).requires_grad_()
            for name, d in zip(names, direction, strict=True)
        }
        with torch.enable_grad():
            loss = posterior.loss(params, copy.deepcopy(batch), posterior.fresh_buffers())
            return list(torch.autograd.grad(loss, list(params.values()), materialize_grads=True))

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors])))

    direction = [torch.randn(p.shape, generator=generator).to(p.device) for p in posterior.anchor.values()]
    curvature = norm(direction)
    for _ in range(iterations):
        if not 0 < curvature < math.inf:
            break
        # Steps of length delta in w, whatever the metric's scale.
        moved = [root * d for root, d in zip(roots, direction, strict=True)]
        length = norm(moved)
        unit = [m / length for m in moved]
        up, down = gradient(unit, 1.0), gradient(unit, -1.0)
        stretch = length / curvature
        direction = [
            root * (u - d).float() * (stretch / (2 * delta)) for root, u, d in zip(roots, up, down, strict=True)
        ]
        curvature = norm(direction)
    return curvature


def default_lr(
    posterior: Posterior,
    sampler: type[Sampler],
    options: Mapping[str, Any],
    *,
    nbeta: float,
    localization: float,
    seed: int = 0,
) -> float:
    """ε = 0.2 / a with a = nβ·h_max + γ·p_max, h_max the largest curvature in the sampler's metric.

    Stable, and within 5 % of the exact variance in the stiffest direction.

    Raises:
        ValueError: the loss has no curvature at w*.
    """
    metric: dict[str, Any] | None = None
    if sampler.adaptive:
        metric = pilot_metric(posterior, options, seed=seed)
    elif "preconditioner" in options:
        given = options["preconditioner"]
        metric = {name: given[name] if isinstance(given, Mapping) else given for name in posterior.anchor}
    largest = 1.0 if metric is None else max(float(torch.as_tensor(p).max()) for p in metric.values())
    stiffness = nbeta * top_curvature(posterior, metric=metric, seed=seed) + localization * largest
    if "betas" in options:  # a drift that lags behind by 1/(1 − β₁) steps overshoots by as much
        stiffness /= 1 - options["betas"][0]
    if not 0 < stiffness < math.inf:
        raise ValueError(
            f"lr=None: no step size can be chosen, the curvature of the loss at w* is {stiffness:g}; pass lr"
        )
    return STIFFNESS / stiffness
