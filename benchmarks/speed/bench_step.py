"""One SGLD step on 10⁸ float32 parameters in 100 tensors: llc_fast against its rivals, torch.compile and the floor.

    python benchmarks/speed/bench_step.py [--parameters 100000000] [--tensors 100] [--repeats 7] [--device cpu|cuda]
                                          [--contenders copy ours theirs …] [--rivals FOLDER] [--quick] [--json PATH]
    python benchmarks/speed/bench_step.py --parameters 1000 --tensors 1    what a step costs beside its arithmetic
    pytest benchmarks/speed --benchmark-only [--parameters 1000000 100000000] [--device cpu|cuda]

Both ways time the same steps. As a script, contenders run in turn, round after round, in one process with the same
number of threads; times are medians over rounds, and ratios are taken round by round, so that a change of the machine's
speed cancels. It also says nanoseconds and bytes a parameter. Under pytest-benchmark contenders run one after another,
in a group for each number of parameters, with ratios to the fastest in brackets, and all that it can do with them
(``--benchmark-compare``, ``--benchmark-json``). `--contenders` takes these keys: copy; floor, llc_fast's step without
noise; ours; compiled; compiled-all; adam; sgld and sgmcmc, the two of devinterp 1.3.2; sgld2, sgmcmc2, those of 2.0.1;
theirs, these four; canonical; posteriors. rivals.py says how to install them; those that are not there are left out,
with a note.

canonical-interp's step is compiled, all tensors in one function, here with one chain. posteriors computes gradients in
its step: it is given a log posterior whose gradients are known, and what it takes to write them down (a pass that reads
w, w* and the gradient) is in its time. Its step is made in place.

torch.compile is there twice: the update of one tensor, called for each of them, as one would write it first, and one
function over the list of all tensors, which a GPU's compiler fuses into few kernels. Neither has noise that depends on
the element alone, as llc_fast's has.

torch's fused Adam does another job: it is there as a step whose speed people know. "bytes" are those that a step has to
move, a parameter, where the step is one pass: a copy's 8, SGLD's 16 (Sampler.bytes_moved), Adam's 28 (it reads
w, gradient and two states, and writes w and the states). On a GPU, "launches" is how many kernels, copies and fills
torch.profiler saw there in a step.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from contenders import canonical_step, let_canonical_be_imported, posteriors_step
from harness import median, print_table, ratio, those_that_run, time_in_turn, write_json
from rivals import FOLDER, RIVALS, importing
from torch import Tensor

import llc_fast
from llc_fast.samplers import SGLDSampler
from llc_fast.support.environment import collect_info

OPTIONS: dict[str, Any] = {"lr": 1e-6, "nbeta": 1000.0, "localization": 1.0}
COPY, FLOOR, OURS = "tensor copy", "llc_fast SGLD, no noise", "llc_fast SGLD"
COMPILED, COMPILED_ALL = "torch.compile, tensor by tensor", "torch.compile, all tensors"
ADAM = "torch Adam, fused"
THEIRS = {
    key: f"{RIVALS[rival].title} {step}"
    for key, rival, step in (
        ("sgld", "devinterp", "SGLD"),
        ("sgmcmc", "devinterp", "SGMCMC.sgld"),
        ("sgld2", "devinterp2", "SGLD"),
        ("sgmcmc2", "devinterp2", "SGMCMC.sgld"),
    )
}
CANONICAL, POSTERIORS = f"{RIVALS['canonical'].title} sgld_step", f"{RIVALS['posteriors'].title} sgld"
NAMES = (COPY, FLOOR, OURS, COMPILED, COMPILED_ALL, ADAM, *THEIRS.values(), CANONICAL, POSTERIORS)
_KEYS = ("copy", "floor", "ours", "compiled", "compiled-all", "adam", *THEIRS, "canonical", "posteriors")
KEYS = dict(zip(_KEYS, ([name] for name in NAMES), strict=True)) | {"theirs": list(THEIRS.values())}
"""What --contenders takes."""
BYTES = {COPY: 8.0, OURS: SGLDSampler.bytes_moved(), FLOOR: SGLDSampler.bytes_moved(), ADAM: 28.0}
ON_A_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""What torch.profiler's traces call work that a GPU does."""


def compiled_formula(params: list[Tensor], references: list[Tensor], *, together: bool = False) -> Callable[[], None]:
    """The same update as a torch.compile'd function, noise by torch.randn_like.

    Args:
        params: with their gradients.
        references: w*.
        together: whether one function updates all tensors, instead of one that is called for each.
    """
    lr, nbeta, gamma = OPTIONS["lr"], OPTIONS["nbeta"], OPTIONS["localization"]

    def update(w: Tensor, g: Tensor, reference: Tensor) -> None:
        w.add_(-0.5 * lr * (nbeta * g + gamma * (w - reference)) + lr**0.5 * torch.randn_like(w))

    def update_all(params: list[Tensor], grads: list[Tensor], references: list[Tensor]) -> None:
        # What the compiler fuses across tensors is operations on lists.
        drift = torch._foreach_sub(params, references)
        torch._foreach_mul_(drift, gamma)
        torch._foreach_add_(drift, grads, alpha=nbeta)
        torch._foreach_add_(params, drift, alpha=-0.5 * lr)
        torch._foreach_add_(params, [torch.randn_like(w) for w in params], alpha=lr**0.5)

    compiled: Callable[..., None] = torch.compile(update_all if together else update)

    @torch.no_grad()
    def step() -> None:
        if together:
            compiled(params, [p.grad for p in params], references)
            return
        for p, reference in zip(params, references, strict=True):
            compiled(p, p.grad, reference)

    return step


def contenders(
    parameters: int, tensors: int, device: str, names: Collection[str] = NAMES, folder: Path = FOLDER
) -> dict[str, Callable[[], Any]]:
    """The steps to time, by name, without those that can't take one here.

    All share the parameters and their gradients; each keeps its own w*.

    Args:
        parameters, tensors: how many, and in how many parts.
        device: where.
        names: those wanted.
        folder: where rivals are.
    """
    size = parameters // tensors
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for _ in range(tensors)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    references = [p.detach().clone() for p in params]

    def copy() -> Callable[[], Any]:
        source = torch.cat([p.detach().flatten() for p in params])
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def devinterp(key: str) -> Callable[[], Any]:
        with importing(RIVALS["devinterp2" if key.endswith("2") else "devinterp"], folder):
            from devinterp.optim.sgld import SGLD
            from devinterp.optim.sgmcmc import SGMCMC

            return (SGLD if key.startswith("sgld") else SGMCMC.sgld)(params, **OPTIONS).step  # type: ignore[no-any-return]

    def canonical() -> Callable[[], Any]:
        let_canonical_be_imported()
        with importing(RIVALS["canonical"], folder) as package:
            return canonical_step(package, params, **OPTIONS)

    def posteriors() -> Callable[[], Any]:
        with importing(RIVALS["posteriors"], folder) as package:
            return posteriors_step(package, "sgld", params, **OPTIONS)

    make: dict[str, Callable[[], Callable[[], Any]]] = {
        COPY: copy,
        FLOOR: lambda: llc_fast.SGLD(params, **OPTIONS, noise_level=0.0, seed=0).step,
        OURS: lambda: llc_fast.SGLD(params, **OPTIONS, seed=0).step,
        COMPILED: lambda: compiled_formula(params, references),
        COMPILED_ALL: lambda: compiled_formula(params, references, together=True),
        ADAM: lambda: torch.optim.Adam(params, lr=OPTIONS["lr"], fused=True).step,
        **{name: functools.partial(devinterp, key) for key, name in THEIRS.items()},
        CANONICAL: canonical,
        POSTERIORS: posteriors,
    }
    found: dict[str, Callable[[], Any]] = {}
    for name in (name for name in make if name in names):
        try:
            found[name] = make[name]()
        except ImportError as error:
            print(f"{name} is left out: {error}")
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
    parser.add_argument(
        "--contenders", nargs="+", choices=KEYS, default=list(_KEYS), metavar="KEY", help=", ".join(KEYS)
    )
    parser.add_argument("--rivals", type=Path, default=FOLDER, help="where rivals.py has put them")
    parser.add_argument("--quick", action="store_true", help="1,000 parameters in 2 tensors, once, to see that it runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    if arguments.quick:
        arguments.parameters, arguments.tensors, arguments.repeats = 1000, 2, 1
    names = {name for key in arguments.contenders for name in KEYS[key]}
    steps = contenders(arguments.parameters, arguments.tensors, arguments.device, names, arguments.rivals)
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
            "times llc_fast": ratio(times, seconds[OURS]) if OURS in seconds else None,
            "times its noise-free pass": ratio(times, seconds[FLOOR]) if FLOOR in seconds else None,
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
