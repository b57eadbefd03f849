"""Two installed builds of llc_fast against each other: SGLD steps and whole estimates.

    python benchmarks/speed/two_builds.py OLD_PYTHON NEW_PYTHON [--rounds 5] [--json PATH]

OLD_PYTHON and NEW_PYTHON are interpreters of two environments. Each measurement runs in a fresh process, the builds in
turn, round after round; the smallest time of each build counts, since noise only adds. Works with any version of the
package: what it calls has not changed since the first one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

STEPS = {1_000: 3000, 1_000_000: 100, 30_000_000: 5}
"""Parameters of a step, and how many steps are timed together."""
ESTIMATES = {16: 4000, 50: 2000, 160: 600}
"""Width of a network of four square layers, and steps of each of four chains."""


def time_step(total: int) -> float:
    """Seconds of one SGLD step over `total` parameters in 10 tensors."""
    import torch

    import llc_fast

    params = [torch.nn.Parameter(torch.randn(total // 10)) for _ in range(10)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer = llc_fast.SGLD(params, lr=1e-6, nbeta=1000.0, localization=1.0, seed=0)
    optimizer.step()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(STEPS[total]):
            optimizer.step()
        times.append((time.perf_counter() - started) / STEPS[total])
    return min(times)


def time_estimate(width: int) -> float:
    """Seconds of one estimate with a given step size: four chains, n = 10,000, batch 500."""
    import torch

    import llc_fast

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
    x = torch.randn(10_000, width)
    y = model(x).detach() + 0.1 * torch.randn(10_000, width)
    half, times = ESTIMATES[width] // 2, []
    for _ in range(3):
        started = time.perf_counter()
        llc_fast.estimate_llc(
            model,
            (x, y),
            torch.nn.functional.mse_loss,
            lr=1e-7,
            num_chains=4,
            num_draws=half,
            num_burnin=half,
            batch_size=500,
            progress=False,
        )
        times.append(time.perf_counter() - started)
    return min(times)


def measure(python: str, kind: str, size: int) -> float:
    """The time of a build, in a process of its own."""
    command = [python, str(Path(__file__).resolve()), "--worker", kind, str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return float(run.stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, size = sys.argv[2], int(sys.argv[3])
        print(time_step(size) if kind == "step" else time_estimate(size))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="an interpreter that has the old build")
    parser.add_argument("new", help="an interpreter that has the new build")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'what':>10} {'size':>10} {'old, s':>12} {'new, s':>12} {'new / old':>10}")
    for kind, sizes in (("step", STEPS), ("estimate", ESTIMATES)):
        for size in sizes:
            times = [
                (measure(options.old, kind, size), measure(options.new, kind, size)) for _ in range(options.rounds)
            ]
            old, new = (min(column) for column in zip(*times, strict=True))
            rows.append({"what": kind, "size": size, "old": old, "new": new, "ratio": new / old})
            print(f"{kind:>10} {size:>10} {old:>12.4g} {new:>12.4g} {new / old:>10.3f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
