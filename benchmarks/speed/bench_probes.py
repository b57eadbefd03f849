"""What probes and observables cost: an estimate alone, the forward passes of its probes alone, and both in one run.

    python benchmarks/speed/bench_probes.py [--widths 64 512 1024] [--probes 256] [--draws 200] [--repeats 3]
        [--device cpu|cuda] [--threads 1] [--json PATH]

A ReLU network of three layers on 64 inputs and 10 classes; 4 chains, every step a draw, minibatches of 64; a probe of
256 samples. The forward passes are those of a plain loop, without gradients, in minibatches of the run. A run with
probes should take no more than 1.05 times the sum. `observable` is an estimate with one that does nothing.

On a CPU the seconds are those of the process (`time.process_time`): neighbours do not count, the thread that writes
the store does. On a GPU they are the clock's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import median, print_table, write_json
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, CHAINS, INPUTS, CLASSES, SAMPLES = 64, 4, 64, 10, 2000


def network(width: int, device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model and its data."""
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)]
    x, y = torch.randn(SAMPLES, INPUTS), torch.randint(CLASSES, (SAMPLES,))
    return nn.Sequential(*layers).to(device), (x.to(device), y.to(device))


def seconds(function: Callable[[], Any], device: str) -> float:
    """Of the process on a CPU, of the clock on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def measure(width: int, probes: int, draws: int, repeats: int, device: str) -> dict[str, Any]:
    """One row."""
    import llc_fast

    model, (x, y) = network(width, device)
    some = x[:probes], y[:probes]
    options: dict[str, Any] = {"lr": 1e-5, "nbeta": 30.0, "localization": 100.0, "num_chains": CHAINS}
    options |= {"num_draws": draws, "num_burnin": 0, "batch_size": BATCH, "progress": False}

    def alone(**more: Any) -> Any:
        return llc_fast.estimate_llc(model, (x, y), F.cross_entropy, **options, **more)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(CHAINS * draws):
            for first in range(0, probes, BATCH):
                part = slice(first, first + BATCH)
                F.cross_entropy(model(some[0][part]), some[1][part], reduction="none")

    def both() -> None:
        with tempfile.TemporaryDirectory() as folder:
            llc_fast.sample(model, (x, y), F.cross_entropy, probes={"p": some}, store=Path(folder) / "run", **options)

    cases = {
        "alone": alone,
        "forwards": forwards,
        "with probes": both,
        "observable": lambda: alone(observables={"none": lambda draw: 0.0}),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            taken = seconds(case, device)
            if round_:
                times[name].append(taken)
    found = {name: median(values) for name, values in times.items()}
    return {
        "width": width,
        "strategy": alone().settings["strategy"],
        **{f"{name} s": value for name, value in found.items()},
        "ratio": found["with probes"] / (found["alone"] + found["forwards"]),
        "observable µs a draw": 1e6 * (found["observable"] - found["alone"]) / (CHAINS * draws),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--probes", type=int, default=256)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = [measure(w, options.probes, options.draws, options.repeats, options.device) for w in options.widths]
    print_table("Probes and observables", rows)
    write_json(options.json, {"probes": rows})


if __name__ == "__main__":
    main()
