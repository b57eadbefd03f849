"""One SGLD step on 10⁸ float32 parameters in 100 tensors: llc_fast against devinterp, torch.compile and the floor.

    python benchmarks/bench_step.py [--parameters 100000000] [--tensors 100] [--repeats 7] [--json PATH]

Contenders run in turn, round after round, in one process with the same number of threads; the figure is the median
over rounds, and ratios are taken round by round, so that a drift of the machine's speed cancels. devinterp's rows need
devinterp 1.3.2 (``pip install devinterp==1.3.2``); they are left out, with a note, if it is missing.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import median, print_table, ratio, time_in_turn, write_json
from torch import Tensor

import llc_fast
from llc_fast.cli import collect_info

OPTIONS: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0}
OURS, FLOOR = "llc_fast SGLD", "llc_fast SGLD, no noise"


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


def contenders(params: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """The steps to time, by name. All share the parameters and their gradients; each keeps its own w*."""
    found: dict[str, Callable[[], Any]] = {}
    anchors = [p.detach().clone() for p in params]
    source = torch.cat([p.detach().flatten() for p in params])
    target = torch.empty_like(source)
    found["tensor copy"] = lambda: target.copy_(source)
    found[FLOOR] = llc_fast.SGLD(params, **OPTIONS, noise_level=0.0, seed=0).step
    found[OURS] = llc_fast.SGLD(params, **OPTIONS, seed=0).step
    found["torch.compile"] = compiled_formula(params, anchors)
    try:
        from devinterp.optim.sgld import SGLD as TheirSGLD
        from devinterp.optim.sgmcmc import SGMCMC

        found["devinterp SGLD"] = TheirSGLD(params, **OPTIONS).step
        found["devinterp SGMCMC.sgld"] = SGMCMC.sgld(params, **OPTIONS).step
    except ImportError as error:
        print(f"devinterp's rows are left out: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10**8)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    size = arguments.parameters // arguments.tensors
    params = [torch.nn.Parameter(torch.randn(size, device=arguments.device)) for _ in range(arguments.tensors)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    seconds = time_in_turn(contenders(params), arguments.repeats, arguments.device)
    total, info = size * arguments.tensors, collect_info()
    rows = [
        {
            "step": name,
            "ns per parameter": 1e9 * median(times) / total,
            "times llc_fast": ratio(times, seconds[OURS]),
            "times its noise-free pass": ratio(times, seconds[FLOOR]),
        }
        for name, times in seconds.items()
    ]
    where = f"{info['threads']} threads, {info['backend']}" if arguments.device == "cpu" else info["gpus"][0]
    print_table(f"{total:.3g} float32 parameters in {arguments.tensors} tensors, {where}", rows)
    write_json(arguments.json, {"parameters": total, "device": arguments.device, "rows": rows})


if __name__ == "__main__":
    main()
