"""One SGLD step on 10⁸ float32 parameters in 100 tensors: llc_fast against devinterp, torch.compile and the floor.

    python benchmarks/speed/bench_step.py [--parameters 100000000] [--tensors 100] [--repeats 7] [--device cpu|cuda]
                                          [--json PATH]
    python benchmarks/speed/bench_step.py --parameters 1000 --tensors 1    what a step costs beside its arithmetic
    pytest benchmarks/speed --benchmark-only [--parameters 1000000 100000000] [--device cpu|cuda]

Both ways time the same steps. As a script, contenders run in turn, round after round, in one process with the same
number of threads; times are medians over rounds, and ratios are taken round by round, so that a change of the machine's
speed cancels. It also says nanoseconds and bytes a parameter. Under pytest-benchmark contenders run one after another,
in a group for each number of parameters, with ratios to the fastest in brackets, and all that it can do with them
(``--benchmark-compare``, ``--benchmark-json``). devinterp's rows need devinterp 1.3.2 (``pip install
devinterp==1.3.2``); they are left out, with a note, if it is missing.

torch's fused Adam does another job: it is there as a step whose speed people know. "bytes" are those that a step has to
move, a parameter, where the step is one pass: a copy's 8, SGLD's 16 (Sampler.bytes_moved), Adam's 28 (it reads
w, gradient and two states, and writes w and the states). On a GPU, "launches" is how many kernels, copies and fills
torch.profiler saw there in a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import median, print_table, ratio, those_that_run, time_in_turn, write_json
from torch import Tensor

import llc_fast
from llc_fast.cli.info import collect_info
from llc_fast.samplers import SGLDSampler

OPTIONS: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0}
COPY, FLOOR, OURS = "tensor copy", "llc_fast SGLD, no noise", "llc_fast SGLD"
COMPILED, ADAM = "torch.compile", "torch Adam, fused"
THEIRS, THEIR_SGMCMC = "devinterp SGLD", "devinterp SGMCMC.sgld"
NAMES = (COPY, FLOOR, OURS, COMPILED, ADAM, THEIRS, THEIR_SGMCMC)
BYTES = {COPY: 8.0, OURS: SGLDSampler.bytes_moved(), FLOOR: SGLDSampler.bytes_moved(), ADAM: 28.0}
ON_A_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""What torch.profiler's traces call work that a GPU does."""


def compiled_formula(params: list[Tensor], references: list[Tensor]) -> Callable[[], None]:
    """The same update as one torch.compile'd function over all tensors, noise by torch.randn_like."""
    lr, nbeta, gamma = OPTIONS["lr"], OPTIONS["nbeta"], OPTIONS["localization"]

    def update(w: Tensor, g: Tensor, reference: Tensor) -> None:
        w.add_(-0.5 * lr * (nbeta * g + gamma * (w - reference)) + lr**0.5 * torch.randn_like(w))

    compiled = torch.compile(update)

    def step() -> None:
        with torch.no_grad():
            for p, reference in zip(params, references, strict=True):
                compiled(p, p.grad, reference)

    return step


def contenders(parameters: int, tensors: int, device: str) -> dict[str, Callable[[], Any]]:
    """The steps to time, by name, without those that can't take one here.

    All share the parameters and their gradients; each keeps its own w*.
    """
    size = parameters // tensors
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for _ in range(tensors)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    found: dict[str, Callable[[], Any]] = {}
    references = [p.detach().clone() for p in params]
    source = torch.cat([p.detach().flatten() for p in params])
    target = torch.empty_like(source)
    found[COPY] = lambda: target.copy_(source)
    found[FLOOR] = llc_fast.SGLD(params, **OPTIONS, noise_level=0.0, seed=0).step
    found[OURS] = llc_fast.SGLD(params, **OPTIONS, seed=0).step
    found[COMPILED] = compiled_formula(params, references)
    found[ADAM] = torch.optim.Adam(params, lr=OPTIONS["lr"], fused=True).step
    try:
        from devinterp.optim.sgld import SGLD as TheirSGLD
        from devinterp.optim.sgmcmc import SGMCMC

        found[THEIRS] = TheirSGLD(params, **OPTIONS).step
        found[THEIR_SGMCMC] = SGMCMC.sgld(params, **OPTIONS).step
    except ImportError as error:
        print(f"devinterp's rows are left out: {error}")
    return those_that_run(found, rivals=found.keys() - {COPY, FLOOR, OURS})


def test_step(benchmark: Any, step: Callable[[], Any], name: str, parameters: int) -> None:
    """For pytest-benchmark; fixtures and options are in conftest.py."""
    benchmark.group = f"one step on {parameters:,} float32 parameters"
    benchmark(step)
    benchmark.extra_info |= {"parameters": parameters, "bytes per parameter": BYTES.get(name)}


def launches(step: Callable[[], Any]) -> Counter[str]:
    """What one step makes a GPU do, by name: kernels, copies, fills."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return launches_in(json.loads(path.read_text()))


def launches_in(trace: Mapping[str, Any]) -> Counter[str]:
    return Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") in ON_A_GPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10**8)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    steps = contenders(arguments.parameters, arguments.tensors, arguments.device)
    seconds = time_in_turn(steps, arguments.repeats, arguments.device)
    total, info = arguments.parameters // arguments.tensors * arguments.tensors, collect_info()
    on_gpu = {name: launches(step) for name, step in steps.items()} if arguments.device == "cuda" else {}
    rows = [
        {
            "step": name,
            "µs": 1e6 * median(times),
            "ns per parameter": 1e9 * median(times) / total,
            "bytes": (moved := BYTES.get(name)),
            "GB/s": moved and moved * total / median(times) / 1e9,
            "times llc_fast": ratio(times, seconds[OURS]),
            "times its noise-free pass": ratio(times, seconds[FLOOR]),
            "launches": sum(on_gpu[name].values()) if name in on_gpu else None,
        }
        for name, times in seconds.items()
    ]
    where = f"{info['threads']} threads, {info['backend']}" if arguments.device == "cpu" else info["gpus"][0]
    print_table(f"{total:.3g} float32 parameters in {arguments.tensors} tensors, {where}", rows)
    if OURS in on_gpu:
        print(f"\nOn the GPU, one step of {OURS} is: {dict(on_gpu[OURS])}")
    tables = {"parameters": total, "device": arguments.device, "rows": rows, "launches": on_gpu}
    write_json(arguments.json, tables)


if __name__ == "__main__":
    main()
