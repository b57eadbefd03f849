"""Curvature of the loss at w*."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llc_fast.objective.objective import Objective

PILOT_BATCHES = 20


def pilot_metric(objective: Objective, options: Mapping[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """The preconditioner p of an adaptive sampler near w*: 1/(√V + eps), V the mean of g² over a few minibatches."""
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in objective.reference.items()}
    gradient = {name: torch.zeros_like(v) for name, v in squares.items()}
    params = objective.reference
    for batch in itertools.islice(objective.source.minibatches(seed), PILOT_BATCHES):
        # Microbatches add up, so the square has to wait for the last.
        objective.gradient_at(params, batch, lambda name, grad: gradient[name].add_(grad))
        for name, square in squares.items():
            square.addcmul_(gradient[name], gradient[name], value=1 / PILOT_BATCHES)
            gradient[name].zero_()
    eps = float(options["eps"])
    if options["relative_eps"]:
        masks = objective.masks
        total = sum(float((v * masks[k] if k in masks else v).double().sum()) for k, v in squares.items())
        eps *= math.sqrt(total / objective.num_parameters)
    return {name: 1 / (v.sqrt() + eps) for name, v in squares.items()}


@torch.no_grad()
def top_curvature(
    objective: Objective, *, metric: Mapping[str, Tensor | float] | None = None, seed: int = 0, iterations: int = 12
) -> float:
    """The largest curvature of the minibatch loss at w*, that is the top eigenvalue of √p·H·√p in the metric 1/p.

    Power iteration on Hessian-vector products, which are central differences of gradients, so that any model that
    trains works; the result is a few percent below the true value, which is precise enough for a step size. Memory
    beside the model: two vectors like w*, and the gradient of one parameter at a time.

    Args:
        objective: the model, its loss and data.
        metric: p for each parameter by name; None: 1.
        seed: of the starting direction and the minibatch.
        iterations: of the power method, two gradients each.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = next(iter(objective.source.minibatches(seed)))
    reference = objective.reference
    scale = math.sqrt(sum(float(p.double().square().sum()) for p in reference.values()))
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in reference.values())
    delta = (1e-1 if low else 1e-3) * max(scale, 1e-3)  # short against w*, long against rounding
    given = {name: 1.0 if metric is None else metric[name] for name in reference}
    roots = {name: in_float32(given[name]).to(p.device).sqrt() for name, p in reference.items()}
    for name, mask in objective.masks.items():
        roots[name] = roots[name] * mask  # elements that can't move have no curvature
    displaced = {name: p.clone() for name, p in reference.items()}
    vector = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float32).to(
            p.device, torch.float64 if p.dtype == torch.float64 else torch.float32
        )
        for name, p in reference.items()
    }

    def norm() -> float:
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in vector.values()])))

    curvature = norm()
    for _ in range(iterations):
        if not 0 < curvature < math.inf:
            break
        for name, v in vector.items():
            v.mul_(roots[name])  # steps of length delta in w, whatever the metric's scale
        length = norm()
        for name, v in vector.items():
            displaced[name].copy_(reference[name] + (v * (delta / length)).to(reference[name].dtype))
            v.zero_()
        objective.gradient_at(displaced, batch, lambda name, grad: vector[name].add_(grad))
        for name, w in displaced.items():  # to the other side of w*
            w.neg_().add_(reference[name], alpha=2)
        objective.gradient_at(displaced, batch, lambda name, grad: vector[name].sub_(grad))
        for name, v in vector.items():
            v.mul_(roots[name] * (length / curvature / (2 * delta)))
        curvature = norm()
    return curvature


def in_float32(value: Any) -> Tensor:
    """A tensor as it is; a number as float32, whatever torch's default dtype is."""
    return torch.as_tensor(value, dtype=torch.float32 if isinstance(value, (int, float)) else None)
