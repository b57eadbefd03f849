"""Do the error bars hold? How often `result.interval(0.95)` covers the exact answer.

    python benchmarks/bench_coverage.py [--runs 200] [--seed 0] [--problems linear …] [--modes defaults …] [--json PATH]

The exact answer is nβ·E[L − L(w*)] under exp(−nβ·L(w) − γ/2·‖w − w*‖²), with L over the whole data set: in closed form
where the loss is quadratic, else by quadrature on a grid.

- linear: noiseless linear regression; Σ ½·nβh/(nβh + γ) over the eigenvalues h of the Hessian.
- noisy: linear regression with noise, at the least-squares solution; the same with the empirical Hessian.
- product: f(x) = w₁w₂x on data from f = 0, at w = 0: singular, L ∝ (w₁w₂)².
- quartic: f(x) = w²x likewise, L ∝ w⁴.
- logistic: logistic regression with three parameters, at the maximum of likelihood.

In two ways. "defaults": nothing given but the length, 4 chains × (300 + 500) steps with minibatches of 64, the step
size from pilot chains and heat subtracted. "small step": ε·(nβ·h_max + γ) = 0.05 and half of the data at every step, so
that there is next to no heat to subtract (and none is), 4 chains × (500 + 2000) steps, strongly correlated. The data
are the same in all runs of a problem, the seeds of the sampler are not.

An interval of the right width covers the answer 95 % of the time; the standard error of that from 200 runs is 1.5 %.
"1 chain %" is the coverage of what the first chain alone would have said, which no other can contradict.
"bias, σ" is the mean error over the spread of λ̂ between runs; "spread / stated" is that spread over the root mean
square of the stated standard errors: above 1 they are too small.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import print_table, write_json
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from llc_fast import LLCResult, default_nbeta, estimate_llc

SAMPLES, BATCH, LOCALIZATION = 1000, 64, 1.0
PROBABILITY = 0.95


@dataclass(frozen=True)
class Problem:
    """A model at w*, its data, and the exact answer; ``curvature``: nβ·h_max + γ where chains typically are."""

    model: nn.Module
    data: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    answer: float
    stiffness: float


class Monomial(nn.Module):
    """f(x) = w₁w₂…·x, or w^power·x with a single one."""

    def __init__(self, factors: int, power: int) -> None:
        super().__init__()
        self.w, self.power = nn.Parameter(torch.zeros(factors)), power

    def forward(self, x: Tensor) -> Tensor:
        return self.w.pow(self.power).prod() * x


def inputs(width: int, seed: int) -> Tensor:
    return torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(seed))


def linear_model(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    model = nn.Linear(weight.numel(), 1, bias=bias is not None)
    with torch.no_grad():
        model.weight.copy_(weight[None])
        if bias is not None:
            model.bias.copy_(bias)
    return model


def linear_regression(noise: float) -> Problem:
    """Ten inputs whose scales differ by a factor of three."""
    x = inputs(10, 1) * torch.linspace(0.5, 1.5, 10)
    y = x.sum(dim=1, keepdim=True) + noise * inputs(1, 2)
    solution = torch.linalg.lstsq(x.double(), y.double()).solution[:, 0]
    curvature = default_nbeta(SAMPLES) * torch.linalg.eigvalsh(2 * x.double().T @ x.double() / SAMPLES)
    answer = float((0.5 * curvature / (curvature + LOCALIZATION)).sum())
    return Problem(linear_model(solution), (x, y), mse_loss, answer, float(curvature.max()) + LOCALIZATION)


def monomial(factors: int, power: int) -> Problem:
    x = inputs(1, 3)
    scale, nbeta = float(x.double().square().mean()), default_nbeta(SAMPLES)

    def loss(w: np.ndarray) -> np.ndarray:
        values: np.ndarray = scale * (w**power).prod(axis=-1) ** 2
        return values

    answer = by_quadrature(loss, np.eye(factors), width=7.0, points=4001)
    # In units of the prior's width, the curvature 2·nβ·w₂² along w₁; a few times the one of w⁴ at its typical w.
    stiffness = 2 * nbeta if factors > 1 else 12 * math.sqrt(nbeta)
    return Problem(Monomial(factors, power), (x, torch.zeros_like(x)), mse_loss, answer, stiffness + LOCALIZATION)


def logistic_regression() -> Problem:
    x = inputs(2, 4)
    uniform = torch.rand(SAMPLES, 1, generator=torch.Generator().manual_seed(5))
    y = (uniform < torch.sigmoid(x @ torch.tensor([[1.5], [-1.0]]) + 0.5)).float()
    design, target = torch.cat([x, torch.ones(SAMPLES, 1)], dim=1).double(), y[:, 0].double()
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):  # Newton
        p = torch.sigmoid(design @ w)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) / SAMPLES
        w = w - torch.linalg.solve(hessian, design.T @ (p - target) / SAMPLES)
    best = float(binary_cross_entropy_with_logits(design @ w, target))
    roots = torch.linalg.inv(torch.linalg.cholesky(default_nbeta(SAMPLES) * hessian)).T  # to units of the posterior

    def loss(offsets: np.ndarray) -> np.ndarray:
        pieces = torch.from_numpy(offsets).split(4096)
        logits = [(w + piece) @ design.T for piece in pieces]
        losses = [
            binary_cross_entropy_with_logits(z, target.expand_as(z), reduction="none").mean(dim=1) for z in logits
        ]
        return torch.cat(losses).numpy() - best

    answer = by_quadrature(loss, roots.numpy(), width=6.5, points=27)
    stiffness = default_nbeta(SAMPLES) * float(torch.linalg.eigvalsh(hessian).max()) + LOCALIZATION
    return Problem(linear_model(w[:2], w[2:]), (x, y), binary_cross_entropy_with_logits, answer, stiffness)


def by_quadrature(loss: Callable[[np.ndarray], np.ndarray], axes: np.ndarray, width: float, points: int) -> float:
    """nβ·E[L − L(w*)] for `loss` of offsets ``[point, parameter]`` from w*, on a grid of ±`width` along `axes`."""
    nbeta, line, dimension = default_nbeta(SAMPLES), np.linspace(-width, width, points), len(axes)
    mass = total = 0.0
    for first in line:  # one slice at a time
        rest = np.meshgrid(*[line] * (dimension - 1), indexing="ij") if dimension > 1 else []
        flat = [r.ravel() for r in rest]
        grid = np.stack([np.full_like(flat[0], first) if flat else np.array([first]), *flat], axis=-1)
        offsets = grid @ axes.T
        excess = nbeta * loss(offsets)
        density = np.exp(-excess - LOCALIZATION / 2 * (offsets**2).sum(axis=-1))
        mass, total = mass + float(density.sum()), total + float((density * excess).sum())
    return total / mass


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "linear": lambda: linear_regression(0.0),
    "noisy": lambda: linear_regression(1.0),
    "product": lambda: monomial(2, 1),
    "quartic": lambda: monomial(1, 2),
    "logistic": logistic_regression,
}


def estimate(problem: Problem, **options: Any) -> LLCResult:
    return estimate_llc(
        problem.model, problem.data, problem.loss, localization=LOCALIZATION, num_chains=4, progress=False, **options
    )


def with_defaults(problem: Problem, seed: int) -> LLCResult:
    return estimate(problem, num_burnin=300, num_draws=500, batch_size=BATCH, seed=seed)


def with_small_step(problem: Problem, seed: int) -> LLCResult:
    lr = 0.05 / problem.stiffness
    return estimate(problem, lr=lr, num_burnin=500, num_draws=2000, batch_size=SAMPLES // 2, seed=seed)


MODES: dict[str, Callable[[Problem, int], LLCResult]] = {"defaults": with_defaults, "small step": with_small_step}


def coverage(results: list[LLCResult], answer: float) -> float:
    bounds = np.array([r.interval(PROBABILITY) for r in results])
    return float(((bounds[:, 0] <= answer) & (answer <= bounds[:, 1])).mean())


def first_chain(result: LLCResult) -> LLCResult:
    return replace(result, loss_trace=result.loss_trace[:1])


def row_of(name: str, mode: str, problem: Problem, results: list[LLCResult], seconds: float) -> dict[str, Any]:
    found, stated = np.array([r.llc_mean for r in results]), np.array([r.llc_stderr for r in results])
    bounds = np.array([r.interval(PROBABILITY) for r in results])
    covered = coverage(results, problem.answer)
    spread, count = float(found.std(ddof=1)), len(results)
    corrected = results[0].settings["bias_correction"]
    return {
        "problem": name,
        "mode": mode,
        "runs": count,
        "exact": problem.answer,
        "mean λ̂": float(found.mean()),
        "coverage %": 100 * covered,
        "±": 100 * math.sqrt(covered * (1 - covered) / count),
        "1 chain %": 100 * coverage([first_chain(r) for r in results], problem.answer),
        "bias, σ": float(found.mean() - problem.answer) / spread,
        "bias %": 100 * (float(found.mean()) / problem.answer - 1),
        "spread %": 100 * spread / problem.answer,
        "spread / stated": spread / float(np.sqrt((stated**2).mean())),
        "half width / spread": float((bounds[:, 1] - bounds[:, 0]).mean()) / 2 / spread,
        "ESS": float(np.median([r.diagnostics["ess_bulk"] for r in results])),
        "heat removed": float(np.median([r.diagnostics["bias_share"] for r in results])) if corrected else None,
        "with a warning": sum(bool(r.warnings) for r in results),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.problems:
        problem = PROBLEMS[name]()
        for mode in options.modes:
            started = time.perf_counter()
            results = [MODES[mode](problem, seed) for seed in range(options.seed, options.seed + options.runs)]
            rows.append(row_of(name, mode, problem, results, time.perf_counter() - started))
            write_json(options.json, {"probability": PROBABILITY, "seed": options.seed, "coverage": rows})
    print_table(f"Intervals of {100 * PROBABILITY:g} %: coverage of the exact answer", rows)
    outside = [f"{r['problem']} ({r['mode']})" for r in rows if not 90 <= r["coverage %"] <= 99]
    print(f"\nOutside 90 to 99 %: {', '.join(outside)}." if outside else "\nAll between 90 and 99 %.")


if __name__ == "__main__":
    main()
