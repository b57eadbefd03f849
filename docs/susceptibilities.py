"""Plots docs/images/susceptibilities.png: hidden units of a small network, for images of digits.

python docs/susceptibilities.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import llc_fast

UNITS = 6


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, UNITS), nn.Tanh(), nn.Linear(UNITS, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-4)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    probe = torch.cat([(y == digit).nonzero()[:4, 0] for digit in range(10)])
    rows = [torch.arange(UNITS) == k for k in range(UNITS)]
    units = {f"unit {k}": {"0.weight": row[:, None], "0.bias": row} for k, row in enumerate(rows)}
    found = llc_fast.susceptibilities(
        model, (x, y), F.cross_entropy, {"digits": (x[probe], y[probe])}, units,
        localization=300.0, num_chains=4, num_draws=1500, num_burnin=300, batch_size=128, control=False,
    )  # fmt: skip
    print(found)
    names = [str(int(label)) for label in y[probe]]
    found.plot(Path(__file__).parent / "images" / "susceptibilities.png", items=names, what="z")


if __name__ == "__main__":
    main()
