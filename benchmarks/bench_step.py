"""One SGLD step on 10⁸ float32 parameters in 100 tensors: llc_fast against devinterp, torch.compile and the floor.

    python benchmarks/bench_step.py [--parameters 100000000] [--tensors 100] [--repeats 7] [--json PATH]

Contenders run in turn, round after round, in one process with the same number of threads; the figure is the median
over rounds, and ratios are taken round by round, so that a drift of the machine's speed cancels. devinterp's rows need
devinterp 1.3.2 (``pip install devinterp==1.3.2``); they are left out, with a note, if it is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llc_fast
from llc_fast.cli import collect_info

OPTIONS: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0}


def compiled_formula(params: list[Tensor], anchors: list[Tensor]) -> Callable[[], None]:
    """The same update as one torch.compile'd function over all tensors, noise by torch.randn_like."""
    lr, nbeta, gamma = OPTIONS["lr"], OPTIONS["nbeta"], OPTIONS["localization"]

    def update(w: Tensor, g: Tensor, a: Tensor) -> None:
        w.add_(-0.5 * lr * (nbeta * g + gamma * (w - a)) + lr**0.5 * torch.randn_like(w))

    compiled = torch.compile(update)

    def step() -> None:
        with torch.no_grad():
            for p, a in zip(params, anchors, strict=True):
                compiled(p, p.grad, a)

    return step


def contenders(params: list[Tensor], rows: list[str]) -> dict[str, Callable[[], Any]]:
    """The steps to time, by name. All share the parameters and their gradients; each keeps its own w*."""
    found: dict[str, Callable[[], Any]] = {}
    anchors = [p.detach().clone() for p in params]
    source, target = torch.cat([p.detach().flatten() for p in params]), torch.empty(sum(p.numel() for p in params))
    found["tensor copy"] = lambda: target.copy_(source)
    found["llc_fast SGLD, no noise"] = llc_fast.SGLD(params, **OPTIONS, noise_level=0.0, seed=0).step
    found["llc_fast SGLD"] = llc_fast.SGLD(params, **OPTIONS, seed=0).step
    found["torch.compile"] = compiled_formula(params, anchors)
    try:
        from devinterp.optim.sgld import SGLD as TheirSGLD
        from devinterp.optim.sgmcmc import SGMCMC

        found["devinterp SGLD"] = TheirSGLD(params, **OPTIONS).step
        found["devinterp SGMCMC.sgld"] = SGMCMC.sgld(params, **OPTIONS).step
    except ImportError as error:
        print(f"devinterp's rows are left out: {error}")
    return {name: step for name, step in found.items() if not rows or name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10**8)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", nargs="*", default=[], help="time only these contenders")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    side = arguments.parameters // arguments.tensors
    params = [torch.nn.Parameter(torch.randn(side)) for _ in range(arguments.tensors)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    steps = contenders(params, arguments.rows)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.repeats + 1):  # the first round warms up and is not counted
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - started)

    total, ours, floor = side * arguments.tensors, "llc_fast SGLD", "llc_fast SGLD, no noise"
    info = collect_info()
    print(
        f"{total:.3g} float32 parameters in {arguments.tensors} tensors, {info['threads']} threads, {info['backend']}"
    )
    print(f"{'':26} {'ns per parameter':>16} {'times llc_fast':>15} {'times its floor':>16}")
    rows = []
    for name, times in seconds.items():
        row: dict[str, Any] = {"name": name, "ns_per_parameter": 1e9 * statistics.median(times) / total}
        for key, base in (("over_llc_fast", ours), ("over_floor", floor)):
            if base in seconds:
                row[key] = statistics.median(t / b for t, b in zip(times, seconds[base], strict=True))
        rows.append(row)
        ratios = [f"{row.get(key, float('nan')):.2f}" for key in ("over_llc_fast", "over_floor")]
        print(f"{name:26} {row['ns_per_parameter']:16.3f} {ratios[0]:>15} {ratios[1]:>16}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"info": info, "parameters": total, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
