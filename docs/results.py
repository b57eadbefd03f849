"""Plots docs/images/result.png, result-too-short.png and result-too-large.png: README's network, run well and badly.

python docs/results.py
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss

import llc_fast

IMAGES = Path(__file__).parent / "images"
RUNS: dict[str, dict[str, Any]] = {
    "result": {},
    "result-too-short": {"localization": 0.1, "num_draws": 400, "num_burnin": 0},
    "result-too-large": {"lr": 3e-3, "num_draws": 400, "num_burnin": 100},
}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 10)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(2000, 1)
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(500):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    warnings.simplefilter("ignore", llc_fast.LLCWarning)
    for name, options in RUNS.items():
        found = llc_fast.estimate_llc(model, (x, y), mse_loss, **options)
        print(name, found)
        found.plot().savefig(IMAGES / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
