"""The estimate of a deep linear network of 10⁸ parameters at the paper's setting: time, λ̂ against λ, memory.

    python benchmarks/gpu/bench_large.py [--device cuda] [--contenders llc_fast:tf32 llc_fast:float32 devinterp:tf32 …]
                                         [--steps N] [--seconds S] [--short 200] [--size 100M] [--seed 342]
                                         [--samples N] [--network FILE] [--make-network] [--json PATH]

The setting is that of Furman & Lau 2024 (llc_fast.problems.deep_linear.SIZE_CLASSES): of class "100M" n = 10⁶ samples,
minibatches of 500, SGLD with ε = 2e-8 and γ = 1, one chain of 50,000 steps from w*, nβ = n / log n; the second half
of the steps are draws. Of that class's first 400 networks number 342 comes nearest to 10⁸ parameters: 23 layers of 803
to 2970 units, 99.65 million parameters. Its product has rank 49, for which Aoyagi's λ is 393,986. What
llc_fast.reproduce.dln_scaling says of deep networks of low rank holds here: none of those 49 singular values, 0.018 at
most, shows in n samples (nβ·σ²·E[x²] / outputs is 0.3), so that the λ of rank 0, 328,343, is what to expect.

A contender is LIBRARY:PRECISION or LIBRARY:PRECISION:HOW. PRECISION is that of matrix products, float32 or tf32. HOW is
a strategy of estimate_llc, or "kept" for gradients that are not released during the backward pass. llc_fast makes all
steps, unless it is told HOW; then, and devinterp always, it makes `--short` steps, and the seconds of the rest are
extrapolated from the difference to a tenth of them; such rows say so, and have no λ̂. devinterp's data are as many
samples as it looks at.

`--samples` makes a smaller data set: 10⁶ inputs are made on the host, and L(w*) is measured on all of them.

`--seconds` stops an estimate that takes longer, as Ctrl-C would: λ̂ comes from the draws so far, if there are any, and
the seconds of all steps are extrapolated.

Each contender has a process of its own. Its peak memory is what it adds to the data, reckoned without activations
(batch × sum of widths × 4 bytes): w*, the chain, gradients. On a GPU that is what torch has allocated there.

Making the network takes longer than some estimates (singular value decompositions in float64), so it is kept in FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from contenders import Work, installed, with_devinterp
from harness import in_fresh_process, parse, peak_memory, print_table, write_json

PRECISIONS = {"float32": "highest", "tf32": "high"}
"""In the words of torch.set_float32_matmul_precision."""
ASKED_SECONDS = 300.0
"""On a GPU, for all steps."""
ASKED_BYTES = 8.5
"""A parameter, besides the largest layer's gradient, where gradients are released."""
DEFAULT = ["llc_fast:tf32", "llc_fast:float32", "llc_fast:tf32:kept", "llc_fast:tf32:cuda-graph", "devinterp:tf32"]


def keep_network(path: Path, size: str, seed: int) -> None:
    """Make the network, on the host, and keep it in a file."""
    from llc_fast.problems.deep_linear import SIZE_CLASSES, make_problem

    started = time.perf_counter()
    problem = make_problem(dataclasses.replace(SIZE_CLASSES[size], num_samples=1), seed)
    known = {"widths": problem.widths, "rank": problem.rank, "lambda": problem.learning_coefficient}
    partial = path.with_suffix(".part")
    torch.save(known | {"weights": [layer.weight.detach() for layer in problem.model]}, partial)
    partial.replace(path)
    print(f"made the network in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, SIZE_CLASSES, LinearTeacher, end_to_end, network

    warnings.simplefilter("ignore")
    library, precision, how = (*spec["contender"].split(":"), "")[:3]
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    setting, device, seed = SIZE_CLASSES[spec["size"]], spec["device"], spec["seed"]
    kept = torch.load(spec["network"])
    weights: list[Tensor] = kept["weights"]
    generator = torch.Generator().manual_seed(seed)
    samples = spec["samples"] or setting.num_samples
    data = LinearTeacher(end_to_end([w.to(device) for w in weights]), samples, generator)
    model = network(weights)
    nbeta = setting.num_samples / math.log(setting.num_samples)
    base = peak_memory(device, reset=True)
    few = library == "devinterp" or bool(how)
    steps = min(spec["steps"], spec["short"]) if few else spec["steps"]
    if library == "devinterp":
        estimate = with_devinterp()
        seen = min(steps * BATCH_SIZE, samples)
        samples = tuple(t.cpu() for t in data.batch(torch.arange(seen)))

        def run(count: int) -> dict[str, Any]:
            work = Work(setting.lr, nbeta, LOCALIZATION, BATCH_SIZE, 1, count - 1, 1, seed, device)
            started = time.perf_counter()
            estimate(model, samples, work)  # type: ignore[arg-type]
            return {"done": count, "set-up, s": 0.0, "seconds": time.perf_counter() - started}
    else:
        from llc_fast import Execution, estimate_llc

        options: dict[str, Any] = {"kept": {"release_gradients": False}, "": {}}.get(how, {"strategy": how})

        def run(count: int) -> dict[str, Any]:
            result = estimate_llc(
                model,
                data,
                mse_loss,
                lr=setting.lr,
                nbeta=nbeta,
                localization=LOCALIZATION,
                num_chains=1,
                num_burnin=count // 2,
                num_draws=count - count // 2,
                batch_size=BATCH_SIZE,
                seed=seed,
                device=device,
                progress=interrupt_after(spec["seconds"]) if spec["seconds"] and not few else False,
                execution=Execution(**options),
            )
            if result.diverged_chains:
                raise RuntimeError("the chain diverged, so not all steps were made")
            found = {"seconds": result.settings["seconds"], "set-up, s": result.diagnostics["seconds_of_setup"]}
            found |= {"strategy": result.settings["strategy"], "warnings": result.warnings}
            found |= {"llc": finite(result.llc_mean), "stderr": finite(result.llc_stderr)}
            return found | {"done": sum(result.steps_done or [count])}

    found = run(steps)
    found["peak"] = peak_memory(device) - base
    if few:
        fewer = run(max(2, steps // 10))
        found["per step"] = (stepping(found) - stepping(fewer)) / (found["done"] - fewer["done"])
        found |= {"llc": None, "stderr": None}
    else:
        found["per step"] = stepping(found) / found["done"]
    found["seconds"] += (spec["steps"] - found["done"]) * found["per step"]
    return found


def stepping(found: dict[str, Any]) -> float:
    return float(found["seconds"] - found["set-up, s"])


def interrupt_after(seconds: float) -> Callable[[int, int, float], None]:
    """A progress function that interrupts the estimate, once, when it takes longer."""
    deadline = [time.monotonic() + seconds]

    def interrupt(done: int, total: int, llc: float) -> None:
        if deadline and time.monotonic() > deadline[0]:
            deadline.clear()
            signal.raise_signal(signal.SIGINT)

    return interrupt


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def row_of(contender: str, options: argparse.Namespace, known: dict[str, Any], version: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": contender}
    if contender.startswith("devinterp"):
        if version is None:
            return row | {"seconds": "not installed"}
        row["contender"] = contender.replace("devinterp", f"devinterp {version}")
    print(f"… {contender}", file=sys.stderr, flush=True)
    names = ("size", "seed", "steps", "seconds", "short", "samples", "device", "network")
    found = in_fresh_process(__file__, {"contender": contender} | {k: getattr(options, k) for k in names})
    if "error" in found:
        print(f"{contender}: {found['error']}", file=sys.stderr)
        return row | {"seconds": "failed", "error": found["error"]}
    if found["done"] < options.steps:
        row["contender"] += f", extrapolated from {found['done']:,} steps"
    count, largest = known["parameters"], max(a * b for a, b in itertools.pairwise(known["widths"]))
    row |= {"seconds": found["seconds"], "done": found["done"], "strategy": found.get("strategy")}
    row |= {"µs per step": 1e6 * found["per step"], "set-up, s": found["set-up, s"]}
    row |= {"λ̂": found.get("llc"), "± stderr": found.get("stderr"), "warnings": found.get("warnings", [])}
    row["λ̂/λ − 1"] = found["llc"] / known["lambda"] - 1 if found.get("llc") is not None else None
    row["bytes per parameter"] = found["peak"] / count - known["activations"]
    on_gpu, whole = options.device == "cuda", contender in ("llc_fast:tf32", "llc_fast:float32")
    row["asked, s"] = f"≤ {ASKED_SECONDS:g}" if on_gpu and whole else None
    row["asked, bytes"] = f"≤ {ASKED_BYTES + 4 * largest / count:.2f}" if on_gpu and whole else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=DEFAULT)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="100M", help="class of networks, 1k to 100M")
    parser.add_argument("--seed", type=int, default=342, help="which network of the class")
    parser.add_argument("--steps", type=int, help="default: the paper's, 50,000 for 100M")
    parser.add_argument("--seconds", type=float, help="of each estimate at most")
    parser.add_argument("--short", type=int, default=200, help="steps where the rest is extrapolated")
    parser.add_argument("--samples", type=int, help="in the data set, for a quick look; nβ stays that of the class's n")
    parser.add_argument("--make-network", action="store_true", help="only make the network that is kept in FILE")
    parser.add_argument("--network", type=Path, help="file that the network is kept in; default: a temporary one")
    options = parse(parser, work_in_this_process)
    from llc_fast.gradients.plan import STRATEGIES
    from llc_fast.problems.deep_linear import BATCH_SIZE, SIZE_CLASSES

    if options.size not in SIZE_CLASSES:
        parser.error(f"unknown class {options.size!r}; choose one of {', '.join(SIZE_CLASSES)}")
    for contender in options.contenders:
        library, precision, how = (*contender.split(":"), "", "")[:3]
        known_how = ("", "kept", *STRATEGIES) if library == "llc_fast" else ("",)
        if library not in ("llc_fast", "devinterp") or precision not in PRECISIONS or how not in known_how:
            parser.error(f"unknown contender {contender!r}")
    options.steps = options.steps or SIZE_CLASSES[options.size].num_steps
    if min(options.steps, options.short) < 4:
        parser.error("--steps and --short must be at least 4")
    with tempfile.TemporaryDirectory() as folder:
        options.network = str(options.network or Path(folder, "network.pt"))
        if not Path(options.network).exists():
            keep_network(Path(options.network), options.size, options.seed)
        if options.make_network:
            return
        known = torch.load(options.network, mmap=True)
        widths = known["widths"]
        known["parameters"] = sum(weight.numel() for weight in known.pop("weights"))
        known["activations"] = 4 * BATCH_SIZE * sum(widths) / known["parameters"]
        version = installed(["devinterp"])["devinterp"] if "devinterp" in " ".join(options.contenders) else None
        tables: dict[str, Any] = {"device": options.device, "steps": options.steps, "network": known, "rows": []}
        for contender in options.contenders:
            tables["rows"].append(row_of(contender, options, known, version))
            write_json(options.json, tables)  # each is minutes of work
    columns = ["contender", "seconds", "asked, s", "µs per step", "set-up, s", "λ̂", "± stderr", "λ̂/λ − 1"]
    columns += ["bytes per parameter", "asked, bytes"]
    print_table(
        f"{known['parameters']:,} parameters in {len(widths) - 1} layers, rank {known['rank']}, "
        f"λ = {known['lambda']:g}; one chain of {options.steps:,} steps",
        [{column: row.get(column) for column in columns} for row in tables["rows"]],
    )


if __name__ == "__main__":
    main()
