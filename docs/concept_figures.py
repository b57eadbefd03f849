"""Plots docs/images/concepts/: what the pages of docs/concepts/ show. Every point is an estimate, every line a formula.

python docs/concept_figures.py [NAME]...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import llc_fast
from llc_fast.plots import CLASSES, OKABE_ITO, errorbar_by_warning, label_hollow, new_figure, plot_traces

BLUE, VERMILLION, GREEN = (OKABE_ITO[name] for name in ("blue", "vermillion", "green"))


class Point(nn.Module):
    """A model that is nothing but its weights, at w*."""

    def __init__(self, *place: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(place, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.expand(len(x), -1)


def estimate(loss: Callable[[torch.Tensor], torch.Tensor], place: Sequence[float], **options: Any) -> Any:
    """λ̂ of a loss that is a function of the weights alone."""
    data = (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    chosen = {"progress": False, "batch_size": 4, "bias_correction": False} | options
    return llc_fast.estimate_llc(Point(*place), data, lambda output, _: loss(output[0]), **chosen)


def network(steps: int = 500) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The README's: 385 parameters, a regression."""
    torch.manual_seed(0)
    x = torch.randn(2000, 10)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(2000, 1)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


# ---- what λ is ---------------------------------------------------------------------------------------------


def lambda_() -> Figure:
    """The volume of good parameters, and λ̂ over nβ, for three losses of two weights."""
    losses: dict[str, tuple[Callable[..., Any], float, int]] = {
        "w₁² + w₂²": (lambda w: w[0] ** 2 + w[1] ** 2, 1.0, 1),
        "w₁² w₂²": (lambda w: w[0] ** 2 * w[1] ** 2, 0.5, 2),
        "w₁² w₂⁴": (lambda w: w[0] ** 2 * w[1] ** 4, 0.25, 1),
    }
    figure, axes = new_figure(3, 2, width=3.5, height=3.2)
    axes.pop().remove()
    side = np.linspace(-1, 1, 2001)
    grid, epsilons = np.meshgrid(side, side), np.logspace(-4, -0.7, 30)
    nbetas = np.logspace(1, 5, 5)
    for panel, (name, (loss, known, m)), (color, marker) in zip(axes, losses.items(), CLASSES, strict=False):
        values = loss(grid)
        panel.contourf(*grid, values, levels=[0, 1e-3, 1e-2, 1e-1], colors=[color], alpha=0.35)
        panel.contourf(*grid, values, levels=[0, 1e-3], colors=[color], alpha=0.75)
        panel.set(title=f"L = {name}", xlabel="w₁", ylabel="w₂", aspect="equal")
        volume = [(values < epsilon).mean() for epsilon in epsilons]
        axes[3].loglog(epsilons, volume, color=color, lw=2, label=f"λ = {known:g}, m = {m}")
        found = [
            estimate(loss, (0.0, 0.0), nbeta=nbeta, localization=1.0, sampler="hmc", num_draws=1000, num_burnin=200)
            for nbeta in nbetas
        ]
        print(name, [(round(r.llc_mean, 3), round(r.llc_stderr, 3), [w.code for w in r.warnings]) for r in found])
        means, errors = [r.llc_mean for r in found], [2 * r.llc_stderr for r in found]
        errorbar_by_warning(axes[4], nbetas, means, errors, [r.warnings for r in found], color=color, marker=marker)
        axes[4].axhline(known, color=color, lw=1, ls="--")
    axes[3].set(title="share of the square with L < ε", xlabel="ε")
    axes[3].legend()
    axes[4].set(title="λ̂ at w* = 0 (dashed: λ)", xlabel="nβ", xscale="log", ylim=(0, 1.15))
    return figure


# ---- what nβ does ------------------------------------------------------------------------------------------

CURVATURES = (1.0, 1e-2, 1e-4)


def nbeta() -> Figure:
    """Draws in a well with a coarse and a fine structure, and λ̂ of three directions of unlike curvature."""
    figure, axes = new_figure(2, width=5.6, height=4)

    def wavy(w: torch.Tensor) -> torch.Tensor:
        return w[0] ** 2 + 0.06 * (1 - torch.cos(15 * w[0]))

    w = np.linspace(-1.1, 1.1, 800)
    axes[0].plot(w, w**2 + 0.06 * (1 - np.cos(15 * w)), color="k", lw=1.5)
    for nbeta, (color, _) in zip((5.0, 25.0, 500.0), CLASSES, strict=False):
        found = estimate(
            wavy, (0.0,), nbeta=nbeta, localization=0.1, sampler="hmc", num_draws=1000, num_burnin=200,
            observables={"w": lambda draw: draw.params["w"][0]},
        )  # fmt: skip
        draws = found.observables["w"].ravel()
        height = found.llc_mean / nbeta
        axes[0].hist(
            draws, bins=60, range=(-1.1, 1.1), weights=np.full(len(draws), 4 / len(draws)), histtype="stepfilled",
            color=color, alpha=0.35, label=f"nβ = {nbeta:g}: λ̂ = {found.llc_mean:.2f}, mean L {height:.2g}",
        )  # fmt: skip
        print(nbeta, found.llc_mean, found.llc_stderr)
    axes[0].set(title="L(w) (line) and where draws are (areas)", xlabel="w", ylim=(0, 1.7))
    axes[0].legend(loc="upper center", fontsize=9)
    gamma, nbetas = 1.0, np.logspace(-1, 6, 8)
    scales = torch.tensor(CURVATURES, dtype=torch.float64)
    results = [
        estimate(
            lambda w: 0.5 * (scales * w**2).sum(), (0.0, 0.0, 0.0), nbeta=nbeta, localization=gamma, sampler="mala",
            num_draws=1500, num_burnin=200, preconditioner={"w": 1 / (nbeta * scales + gamma)},
        )
        for nbeta in nbetas
    ]  # fmt: skip
    fine = np.logspace(-1, 6, 200)
    exact = sum(0.5 * fine * h / (fine * h + gamma) for h in CURVATURES)
    axes[1].plot(fine, exact, color="k", lw=1, label="Σ ½·nβh / (nβh + γ)")
    errorbar_by_warning(
        axes[1], nbetas, [r.llc_mean for r in results], [2 * r.llc_stderr for r in results],
        [r.warnings for r in results], label="λ̂ ± 2 standard errors",
    )  # fmt: skip
    for h in CURVATURES:
        axes[1].axvline(gamma / h, color="0.7", lw=1, ls=":")
        axes[1].text(gamma / h, 1.57, f" h = {h:g}", color="0.4", fontsize=9)
    axes[1].set(title="curvatures 1, 10⁻² and 10⁻⁴, γ = 1", xlabel="nβ", ylabel="λ̂", xscale="log", ylim=(0, 1.65))
    axes[1].legend(loc="lower right")
    return figure


# ---- what γ does -------------------------------------------------------------------------------------------


def gamma() -> Figure:
    """λ̂ and the distance of draws over γ, for the README's network."""
    model, data = network()
    gammas = [4, 16, 65.46, 500, 4000, 32000]
    results = [
        llc_fast.estimate_llc(model, data, F.mse_loss, sampler="sgld", localization=g, progress=False) for g in gammas
    ]
    figure, axes = new_figure(2, width=5.2, height=3.8)
    warned = [r.warnings for r in results]
    for g, r in zip(gammas, results, strict=True):
        print(g, r.llc_mean, r.llc_stderr, r.diagnostics["distance_over_reference"], [w.code for w in r.warnings])
    low_high = np.array([r.interval() for r in results]).T
    means = np.array([r.llc_mean for r in results])
    errorbar_by_warning(axes[0], gammas, means, np.abs(low_high - means), warned)
    label_hollow(axes[0])
    axes[0].set(title="λ̂ with 95 % intervals (385 weights)", xlabel="γ", xscale="log", ylim=(0, None))
    axes[0].legend()
    share = [r.diagnostics["distance_over_reference"] for r in results]
    errorbar_by_warning(axes[1], gammas, share, None, warned, color=VERMILLION, marker="s", label="draws")
    alone = [np.sqrt(385 / g) / (np.sqrt(385 / 65.46) / 0.5) for g in gammas]
    axes[1].plot(gammas, alone, color="k", lw=1, label="if γ alone held the weights")
    axes[1].axhline(1, color="0.6", ls="--", lw=1)
    axes[1].set(title="‖w − w*‖ / ‖w*‖", xlabel="γ", xscale="log", yscale="log")
    axes[1].legend()
    for panel in axes:
        panel.axvline(65.46, color="0.6", ls=":", lw=1)
    axes[0].text(70, 0.5, "default", color="0.4")
    return figure


# ---- what ε does -------------------------------------------------------------------------------------------


def step_size() -> Figure:
    """λ̂ over ε at equal numbers of steps, with and without correction, and the share of bias."""
    model, data = network()
    options = {"nbeta": 263.1, "localization": 65.46, "progress": False}
    chosen = llc_fast.calibrate(model, data, F.mse_loss, **options)["lr"]
    reference = llc_fast.estimate_llc(
        model, data, F.mse_loss, lr=0.1 * chosen, bias_correction=True, num_draws=8000, num_burnin=4000, **options
    )
    print("reference", reference.llc_mean, reference.llc_stderr, chosen)
    sizes = chosen * np.array([0.003, 0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8])
    figure, axes = new_figure(2, width=5.2, height=3.8)
    for corrected, (color, marker) in zip((False, True), CLASSES, strict=False):
        results = [
            llc_fast.estimate_llc(
                model, data, F.mse_loss, lr=lr, bias_correction=corrected, num_draws=600, num_burnin=600, **options
            )
            for lr in sizes
        ]
        for lr, r in zip(sizes, results, strict=True):
            share = r.diagnostics["bias_share"]
            print(corrected, lr, r.llc_mean, r.llc_stderr, share, [w.code for w in r.warnings])
        name = "bias subtracted" if corrected else "as it is"
        errorbar_by_warning(
            axes[0], sizes, [r.llc_mean for r in results], [2 * r.llc_stderr for r in results],
            [r.warnings for r in results], color=color, marker=marker, label=name,
        )  # fmt: skip
        if corrected:
            share = [100 * (r.diagnostics["bias_share"] or np.nan) for r in results]
            ess = [r.diagnostics["ess_bulk"] or np.nan for r in results]
            axes[1].plot(sizes, share, color=VERMILLION, marker="s", label="bias, % of nβ(L − L(w*))")
            axes[1].plot(sizes, ess, color=GREEN, marker="^", label="effective draws of 2400")
    axes[0].axhspan(*reference.interval(), color="0.5", alpha=0.3, lw=0, label="12,000 small steps, 95 %")
    label_hollow(axes[0])
    axes[0].set(title="λ̂ from 4 × 1200 steps", xlabel="ε", xscale="log", ylim=(0, 25))
    axes[0].legend(loc="upper left", fontsize=9)
    axes[1].set(title="what a larger step costs, and gives", xlabel="ε", xscale="log", yscale="log")
    axes[1].legend(loc="upper left", fontsize=9)
    for panel in axes:
        panel.axvline(chosen, color="0.6", ls=":", lw=1)
    axes[0].text(chosen * 0.95, 0.7, "chosen by pilots", color="0.4", ha="right")
    return figure


# ---- what makes an estimate trustworthy --------------------------------------------------------------------


def trust() -> Figure:
    """Traces of four runs: one that can be trusted, and three that say why not."""
    model, data = network()
    options = {"nbeta": 263.1, "localization": 65.46, "progress": False}
    runs = {
        "step size chosen": llc_fast.estimate_llc(model, data, F.mse_loss, **options),
        "step size 300 times smaller": llc_fast.estimate_llc(
            model, data, F.mse_loss, lr=1.6e-6, num_draws=1500, num_burnin=500, **options
        ),
        "step size 6 times larger": llc_fast.estimate_llc(
            model, data, F.mse_loss, lr=2.8e-3, num_draws=1000, num_burnin=300, **options
        ),
        "training ended too early": llc_fast.estimate_llc(
            *network(20), F.mse_loss, num_draws=1000, num_burnin=300, **options
        ),
    }
    figure, axes = new_figure(2, 2, width=5.2, height=3.2)
    for panel, (name, result) in zip(axes, runs.items(), strict=True):
        codes = ", ".join(w.code for w in result.warnings) or "no warning"
        d = result.diagnostics
        print(name, result)
        plot_traces(panel, result)
        panel.set_title(
            f"{name}\nλ̂ = {result.llc_mean:.3g} ± {result.llc_stderr:.1g}, R̂ = {d['r_hat']:.2f}", fontsize=10
        )
        panel.text(
            0.98, 0.03, codes, transform=panel.transAxes, ha="right", color=VERMILLION if result.warnings else GREEN
        )
    return figure


FIGURES = {"lambda": lambda_, "nbeta": nbeta, "gamma": gamma, "step_size": step_size, "trust": trust}


def main(names: Sequence[str]) -> None:
    folder = Path(__file__).parent / "images" / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        FIGURES[name]().savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
