"""Every sampler's step: time, bytes over the floor, cost of noise and of metrics, growth, overhead, memory.

    python benchmarks/bench_samplers.py [--parameters 100000000] [--device cpu|cuda] [--quick] [--json PATH]

The floor is the traffic that a step cannot avoid, in bytes per float32 parameter (read w, gradient and w*, write w;
a preconditioner read; each state read and written); "GB/s at the floor" is floor over time, to hold against the tensor
copy of the same run. devinterp's equivalents run in the same rounds if devinterp 1.3.2 is installed.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import median, peak_memory, print_table, ratio, time_in_turn, write_json

import llc_fast
from llc_fast import optim
from llc_fast.bench import TENSORS, floor_bytes, make_params
from llc_fast.samplers import SAMPLERS

OPTIONS: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0}
OPTIMIZERS = {name: optim.optimizer_for(cls) for name, cls in SAMPLERS.items()}
METRICS = ["noise_norm", "grad_norm", "weight_norm", "distance"]


def options_of(name: str, params: list[torch.nn.Parameter]) -> dict[str, Any]:
    if name == "preconditioned-sgld":
        return OPTIONS | {"preconditioner": [torch.ones(p.shape, device=p.device) for p in params]}
    return OPTIONS


def rival(name: str, params: list[torch.nn.Parameter]) -> Callable[[], Any] | None:
    """devinterp's optimizer for the same sampler, if it has one."""
    try:
        from devinterp.optim.sgmcmc import SGMCMC
        from devinterp.optim.sgnht import SGNHT
    except ImportError:
        return None
    if name == "sgld":
        return SGMCMC.sgld(params, **OPTIONS).step  # type: ignore[no-any-return]
    if name == "rmsprop-sgld":
        return SGMCMC.rmsprop_sgld(params, **OPTIONS).step  # type: ignore[no-any-return]
    if name == "sgnht":
        return SGNHT(params, lr=1e-6, nbeta=1000.0).step  # type: ignore[no-any-return]
    return None


def samplers_table(total: int, device: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, optimizer in OPTIMIZERS.items():
        gc.collect()
        params = make_params(total, device)
        options = options_of(name, params)
        source = torch.cat([p.detach() for p in params])
        target = torch.empty_like(source)
        steps: dict[str, Callable[[], Any]] = {
            "copy": lambda source=source, target=target: target.copy_(source),  # type: ignore[misc]
            "plain": optimizer(params, seed=0, **options).step,
            "no noise": optimizer(params, seed=0, noise_level=0.0, **options).step,
            "metrics": optimizer(params, seed=0, metrics=METRICS, **options).step,
        }
        if theirs := rival(name, params):
            steps["devinterp"] = theirs
        seconds = time_in_turn(steps, repeats, device)
        plain, floor = seconds["plain"], floor_bytes(name)
        rows.append(
            {
                "sampler": name,
                "ns per parameter": 1e9 * median(plain) / total,
                "floor, bytes": floor,
                "GB/s at the floor": floor * total / median(plain) / 1e9,
                "share of copy's GB/s": floor / 8 * ratio(seconds["copy"], plain),
                "over noise-free": ratio(plain, seconds["no noise"]),
                "metrics over plain": ratio(seconds["metrics"], plain),
                "devinterp over ours": ratio(seconds["devinterp"], plain) if theirs else None,
            }
        )
        del steps, params, options
    return rows


def growth_table(sizes: list[int], device: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for total in sizes:
        gc.collect()
        step = llc_fast.SGLD(make_params(total, device), seed=0, **OPTIONS).step
        inner = max(1, 10**7 // total)

        def several(step: Callable[[], Any] = step, inner: int = inner) -> None:
            for _ in range(inner):
                step()

        seconds = median(time_in_turn({"step": several}, repeats, device)["step"]) / inner
        rows.append({"parameters": f"{total:.0e}", "µs": 1e6 * seconds, "ns per parameter": 1e9 * seconds / total})
    return rows


def overhead_table(device: str) -> list[dict[str, Any]]:
    """A step on 1,000 parameters in one tensor, and what torch's own SGD costs in the same shell."""
    rows = []
    w = torch.nn.Parameter(torch.randn(1000, device=device))
    w.grad = torch.randn_like(w)
    fused = llc_fast.SGLD([w], seed=0, **OPTIONS)
    fused.step()
    table = fused._group_tables((0, 0), fused.param_groups[0], [0])[0][1]
    scalars, key = fused.sampler.scalars(fused.param_groups[0]), llc_fast.reference.NoiseKey(0)
    plain = torch.optim.SGD([w], lr=1e-6)
    for name, step in {
        "fused step (as the chain engine calls it)": lambda: table.step([w.grad], scalars, key),
        "llc_fast.SGLD.step (as a torch optimizer)": fused.step,
        "torch.optim.SGD.step": plain.step,
    }.items():
        count = 2000
        times = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(count):
                step()
            times.append((time.perf_counter() - started) / count)
        rows.append({"step on 1,000 parameters": name, "µs": 1e6 * min(times)})
    return rows


def memory_table(total: int) -> list[dict[str, Any]]:
    """What steps allocate beyond the declared state: growth of the peak resident set while they run."""
    rows = []
    for name, optimizer in OPTIMIZERS.items():
        gc.collect()
        params = make_params(total, "cpu")
        built = optimizer(params, seed=0, **options_of(name, params))
        state = [v for p in params for v in built.state[p].values()]
        for value in state:  # zeros take no memory until they are touched
            value.add_(0)
        built.step()  # tables
        before = peak_memory(reset=True)
        for _ in range(3):
            built.step()
        declared = sum(v.nbytes for v in state) / total
        grown = (peak_memory() - before) / total
        rows.append({"sampler": name, "declared state, B/parameter": declared, "allocated, B/parameter": grown})
        del params, built, state, value
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10**8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="10⁶ parameters, to see that it runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    total = 10**6 if arguments.quick else arguments.parameters
    tables: dict[str, Any] = {"parameters": total, "device": arguments.device}
    if Path("/proc/self/clear_refs").exists() and arguments.device == "cpu":
        tables["memory"] = memory_table(total)
        print_table("Memory beyond parameters and gradients", tables["memory"])
    tables["samplers"] = samplers_table(total, arguments.device, arguments.repeats)
    print_table(f"{total:.3g} float32 parameters in {TENSORS} tensors", tables["samplers"])
    sizes = [10**k for k in range(4, 7 if arguments.quick else 10)]
    tables["growth"] = growth_table(sizes, arguments.device, arguments.repeats)
    print_table("Growth of SGLD", tables["growth"])
    tables["overhead"] = overhead_table(arguments.device)
    print_table("Overhead", tables["overhead"])
    write_json(arguments.json, tables)


if __name__ == "__main__":
    main()
