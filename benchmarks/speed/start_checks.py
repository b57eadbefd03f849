"""What the checks at the start of an estimate cost, as a share of the gradients of a default run.

    python benchmarks/speed/start_checks.py [--json PATH]

A default run takes 16,000 gradients. The checks are the evaluations at w* and beside it that say whether the loss can
be trusted: is it random, is it a sum, are gradients its derivatives, and has a chain that stands still λ̂ = 0? The pass
over the data that L(w*) takes is not one of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llc_fast.data import make_source
from llc_fast.objective.control_variate import reference_losses
from llc_fast.objective.objective import Objective

GRADIENTS = 16_000
"""Of a default run: four chains, 2,000 steps of burn-in and 2,000 draws."""


def _network() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    return model, (torch.randn(5000, 64), torch.randint(10, (5000,))), F.cross_entropy


def _convolutions() -> tuple[nn.Module, Any, Any]:
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 16, 32, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()
    return model, (torch.randn(2000, 1, 8, 8), torch.randint(10, (2000,))), F.cross_entropy


class _Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layers(self.embedding(tokens))).transpose(1, 2)


def _language() -> tuple[nn.Module, Any, Any]:
    tokens = torch.randint(64, (2000, 32))
    return _Language().eval(), (tokens, tokens.roll(-1, 1)), F.cross_entropy


PROBLEMS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "fully connected": _network,
    "convolutional": _convolutions,
    "transformer": _language,
}


def measure(name: str) -> dict[str, float]:
    """Evaluations and seconds of the checks, and seconds of one gradient as a chain takes it by itself."""
    torch.manual_seed(0)
    model, data, function = PROBLEMS[name]()
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = function(output, target)
        return loss

    source = make_source(data, 64, torch.device("cpu"))
    started = time.perf_counter()
    objective = Objective(model, loss_fn, source, device=torch.device("cpu"), max_checks=3 * GRADIENTS // 100)
    seconds = time.perf_counter() - started
    trial_calls = calls
    reference_losses(objective, 100.0)
    passes = -(-len(data[0]) // 256)
    batch, times = next(iter(source.minibatches(0))), []
    for _ in range(20):
        started = time.perf_counter()
        objective.gradient_at(objective.reference, batch, lambda name, grad: None)
        times.append(time.perf_counter() - started)
    gradient = sorted(times)[len(times) // 2]
    return {
        "evaluations": trial_calls,
        "evaluations_at_reference": calls - trial_calls - passes,
        "seconds": seconds,
        "gradient_seconds": gradient,
        "share": (seconds + (calls - trial_calls - passes) * gradient / 3) / (GRADIENTS * gradient),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    found = {name: measure(name) for name in PROBLEMS}
    for name, row in found.items():
        print(
            f"{name:16} {row['evaluations']:4.0f} + {row['evaluations_at_reference']:3.0f} evaluations, "
            f"{row['seconds']:.3f} s; a gradient takes {1e3 * row['gradient_seconds']:.2f} ms: "
            f"{row['share']:.2%} of a default run's gradients (2 % at most)"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
