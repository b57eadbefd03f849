"""Every sampler's step: time, bytes over the floor, cost of noise and of sums, growth, overhead, memory.

    python benchmarks/speed/bench_samplers.py [--parameters 100000000] [--device cpu|cuda] [--layouts 1 4 bfloat16]
                                              [--rivals FOLDER] [--quick] [--json PATH]

Each sampler steps one chain, four chains that share w*, and one chain of a bfloat16 model (float32 chains, bfloat16
gradients, and a bfloat16 copy of w for the next forward pass), `--parameters` in each chain. The floor is the traffic
that a step cannot avoid, in bytes per parameter of each chain (read w and gradient, write w; each state read and
written; w* and a preconditioner read once for all chains; the copy written). "GB/s at the floor" is floor over time, to
be compared with the tensor copy of the same run, which reads and writes 4 bytes a parameter. "its sums" are those that
an estimate with this sampler takes at every step, "all sums" everything that a step can sum up. The equivalents of
devinterp 1.3.2 and posteriors run in the same rounds if they are there (rivals.py). posteriors' steps have to ask for
their gradients, which are known, so that there is one pass more in them.

`--once` takes each step once between cudaProfilerStart and cudaProfilerStop, for `ncu --profile-from-start off`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import posteriors_step
from harness import median, peak_memory, print_table, ratio, those_that_run, time_in_turn, write_json
from rivals import FOLDER, RIVALS, importing

import llc_fast
from llc_fast import optim
from llc_fast.cli.bench import TENSORS, make_params
from llc_fast.kernels.native import NUM_SUMS
from llc_fast.kernels.step import SUMS, NoiseKey
from llc_fast.samplers import samplers_with_optimizer
from llc_fast.samplers.state import ChainState

SAMPLERS = samplers_with_optimizer()
OPTIONS: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0}
OPTIMIZERS = {name: optim.optimizer_for(cls) for name, cls in SAMPLERS.items()}
TARGETS = {name: 0.9 if name == "sgld" else 0.85 for name in SAMPLERS}
"""On a GPU: the share of the copy's bytes per second, at least."""


class Layout(NamedTuple):
    """How a step's chains lie in memory."""

    title: str
    chains: int = 1
    dtype: torch.dtype = torch.float32


LAYOUTS = {
    "1": Layout("1 chain"),
    "4": Layout("4 chains", chains=4),
    "bfloat16": Layout("bfloat16 model", dtype=torch.bfloat16),
}


def options_of(name: str, params: list[torch.nn.Parameter]) -> dict[str, Any]:
    if SAMPLERS[name].metric == "given":
        return OPTIONS | {"preconditioner": [torch.ones(p.shape, device=p.device) for p in params]}
    return OPTIONS


def chain_steps(name: str, total: int, device: str, layout: Layout) -> dict[str, Callable[[], Any]]:
    """The step of `layout` without sums, then without noise, with the sums of an estimate, with all sums."""
    reference = {str(k): p.detach() for k, p in enumerate(make_params(total, device, layout.dtype))}
    options = dict(OPTIONS)
    if SAMPLERS[name].metric == "given":
        options["preconditioner"] = {k: torch.ones(p.shape, device=device) for k, p in reference.items()}
    sampler = SAMPLERS[name](**options)
    state = ChainState(reference, {}, sampler, layout.chains)
    state.start(0, seed=0)
    ((_, table),), scalars = state._tables, state.scalars  # of one dtype
    grads = [1e-3 * torch.randn(layout.chains, *p.shape, device=device, dtype=p.dtype) for p in reference.values()]
    sums = torch.zeros(layout.chains, NUM_SUMS, dtype=torch.float64, device=device)
    thermostat = state.adaptation.get("thermostat")

    def step(wanted: tuple[str, ...] = (), noise_level: float = 1.0) -> Callable[[], None]:
        used, out = scalars._replace(noise_level=noise_level), sums if wanted else None
        return lambda: table.step(grads, used, NoiseKey(0), thermostat=thermostat, sums=out, wanted=wanted)

    return {
        "plain": step(),
        "no noise": step(noise_level=0.0),
        "its sums": step(sampler.sums_needed(vars(sampler))),
        "all sums": step(SUMS),
    }


def rivals(name: str, total: int, device: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """The steps of devinterp and posteriors for the same sampler, of those that have one and are there."""
    found: dict[str, Callable[[], Any]] = {}
    with contextlib.suppress(ImportError), importing(RIVALS["devinterp"], folder):
        from devinterp.optim.sgmcmc import SGMCMC
        from devinterp.optim.sgnht import SGNHT

        if name == "sgld":
            found["devinterp"] = SGMCMC.sgld(make_params(total, device), **OPTIONS).step
        if name == "rmsprop-sgld":
            found["devinterp"] = SGMCMC.rmsprop_sgld(make_params(total, device), **OPTIONS).step
        if name == "sgnht":
            found["devinterp"] = SGNHT(make_params(total, device), lr=1e-6, nbeta=1000.0).step
    if name in ("sgld", "sghmc", "sgnht"):
        with contextlib.suppress(ImportError), importing(RIVALS["posteriors"], folder) as posteriors:
            found["posteriors"] = posteriors_step(posteriors, name, make_params(total, device), **OPTIONS)
    return found


def samplers_table(
    total: int, device: str, repeats: int, layout: Layout, folder: Path = FOLDER
) -> list[dict[str, Any]]:
    rows = []
    for name in SAMPLERS:
        gc.collect()
        source = torch.randn(total, device=device)
        target = torch.empty_like(source)
        steps = chain_steps(name, total, device, layout)
        steps["copy"] = lambda source=source, target=target: target.copy_(source)  # type: ignore[misc]
        theirs = rivals(name, total, device, folder) if layout == LAYOUTS["1"] else {}
        steps = those_that_run(steps | theirs, rivals=theirs)
        seconds = time_in_turn(steps, repeats, device)
        plain, updated = seconds["plain"], layout.chains * total
        floor = SAMPLERS[name].bytes_moved(low=layout.dtype != torch.float32, chains=layout.chains)
        rows.append(
            {
                "sampler": name,
                "ns per parameter": 1e9 * median(plain) / updated,
                "floor, bytes": floor,
                "GB/s at the floor": floor * updated / median(plain) / 1e9,
                "copy's GB/s": 8 * total / median(seconds["copy"]) / 1e9,
                "share of copy's GB/s": floor * layout.chains / 8 * ratio(seconds["copy"], plain),
                "asked": TARGETS[name] if device == "cuda" else None,
                "over noise-free": ratio(plain, seconds["no noise"]),
                "its sums over plain": ratio(seconds["its sums"], plain),
                "all sums over plain": ratio(seconds["all sums"], plain),
                "devinterp over ours": ratio(seconds["devinterp"], plain) if "devinterp" in seconds else None,
                "posteriors over ours": ratio(seconds["posteriors"], plain) if "posteriors" in seconds else None,
            }
        )
        del steps, theirs, source, target
    return rows


def step_once(total: int, device: str, layout: Layout) -> None:
    """Each sampler's step, plain and with all sums, once where a profiler looks, after one where it does not."""
    for name in SAMPLERS:
        gc.collect()
        steps = chain_steps(name, total, device, layout)
        for variant in ("plain", "all sums"):
            steps[variant]()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            steps[variant]()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        print(f"{name}, {layout.title}: stepped")


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
    plain = torch.optim.SGD([w], lr=1e-6)
    state = ChainState({"w": w.detach()}, {}, SAMPLERS["sgld"](**OPTIONS), 1)
    state.start(0, seed=0)
    ((_, table),) = state._tables  # of one dtype
    scalars, key, grads = state.scalars, NoiseKey(0), [w.grad[None]]
    for name, step in {
        "fused step (as the chain engine calls it)": lambda: table.step(grads, scalars, key),
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


def memory_table(total: int, device: str) -> list[dict[str, Any]]:
    """What steps allocate beyond the declared state: growth of the peak while they run."""
    rows = []
    for name, optimizer in OPTIMIZERS.items():
        gc.collect()
        params = make_params(total, device)
        built = optimizer(params, seed=0, **options_of(name, params))
        state = [v for p in params for v in built.state[p].values()]
        for value in state:  # zeros take no memory until they are touched
            value.add_(0)
        built.step()  # tables
        before = peak_memory(device, reset=True)
        for _ in range(3):
            built.step()
        declared = sum(v.nbytes for v in state) / total
        grown = (peak_memory(device) - before) / total
        rows.append({"sampler": name, "declared state, B/parameter": declared, "allocated, B/parameter": grown})
        del params, built, state, value
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10**8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--rivals", type=Path, default=FOLDER, help="where rivals.py has put them")
    parser.add_argument("--quick", action="store_true", help="10⁶ parameters, to see that it runs")
    parser.add_argument("--once", action="store_true", help="each step once, for a profiler")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    total, device = 10**6 if arguments.quick else arguments.parameters, arguments.device
    if arguments.once:
        for key in arguments.layouts:
            step_once(total, device, LAYOUTS[key])
        return
    tables: dict[str, Any] = {"parameters": total, "device": device}
    if device == "cuda" or Path("/proc/self/clear_refs").exists():
        tables["memory"] = memory_table(total, device)
        print_table("Memory beyond parameters and gradients", tables["memory"])
    tables["samplers"] = {}
    for key in arguments.layouts:
        layout = LAYOUTS[key]
        tables["samplers"][layout.title] = rows = samplers_table(
            total, device, arguments.repeats, layout, arguments.rivals
        )
        print_table(f"{layout.title}, {total:.3g} parameters in {TENSORS} tensors, float32 chains", rows)
    sizes = [10**k for k in range(4, 7 if arguments.quick else 10)]
    tables["growth"] = growth_table(sizes, device, arguments.repeats)
    print_table("Growth of SGLD", tables["growth"])
    tables["overhead"] = overhead_table(device)
    print_table("Overhead", tables["overhead"])
    write_json(arguments.json, tables)


if __name__ == "__main__":
    main()
