"""Plots docs/images/llc.png, the README's figure of what the learning coefficient measures.

python docs/figures.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

EPSILONS = np.logspace(-4, -0.7, 40)


def main() -> None:
    side = np.linspace(-1, 1, 2001)
    x, y = np.meshgrid(side, side)
    losses = {"L = w₁² + w₂²,  λ = 1": x**2 + y**2, "L = w₁² w₂²,  λ = ½": x**2 * y**2}
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, loss), color in zip(axes, losses.items(), ("C0", "C1"), strict=False):
        axis.contourf(x, y, loss, levels=[0, 0.003, 0.03, 0.2], colors=[color], alpha=0.25)
        axis.contourf(x, y, loss, levels=[0, 0.003, 0.03], colors=[color], alpha=0.35)
        axis.contourf(x, y, loss, levels=[0, 0.003], colors=[color], alpha=0.8)
        axis.plot(0, 0, "k*", ms=11)
        axis.set(title=name, xlabel="w₁", ylabel="w₂", aspect="equal")
        volume = [(loss < e).mean() for e in EPSILONS]
        axes[2].loglog(EPSILONS, volume, color=color, lw=2, label=name)
    axes[2].set(title="volume of parameters with L < ε", xlabel="ε", ylabel="share of the square")
    axes[2].legend()
    figure.savefig(Path(__file__).parent / "images" / "llc.png", dpi=110)


if __name__ == "__main__":
    main()
