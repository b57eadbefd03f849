"""Whole estimates: llc_fast against its rivals of today, wall time and λ̂ of the same statistical work.

    python benchmarks/speed/rivals.py --install                                    rivals, each in a folder of its own
    python benchmarks/speed/bench_estimate.py [--sizes 1024 10000 102400] [--language tiny 133k] [--chains 4]
        [--steps 2000] [--repeats 1] [--contenders llc_fast llc_fast:compiled devinterp canonical …] [--threads N]
        [--device cpu|cuda] [--per-step] [--rival-steps N] [--rivals FOLDER] [--quick] [--json PATH]
    python benchmarks/speed/bench_estimate.py --scaling [--growing chains parameters size batch]
        [--strategies default batched …] [--budget SECONDS]

The work: a 4-layer square bias-free linear network at its true parameter, 10,000 samples of its own, mean squared
error, batches of 500, SGLD with one ε, nβ = n / log n and γ for everybody, 4 chains × 2,000 steps, of which the second
half are draws. λ̂ stands beside the seconds, so that one sees that the work is the same; λ̂ of a chain this short is not
yet the theory's λ. `--language` names sizes of a GPT-NeoX (bench_samples.py), trained for a short time on bytes: 512
sequences of 64 tokens, batches of 16, nβ = 30, γ = 300, 2 chains × 100 steps. With neither `--sizes` nor `--language`
all of these are measured, and at the end one table has them all.

The contenders, of which each does what it can:

    llc_fast, llc_fast:STRATEGY
    devinterp, devinterp-cores        1.3.2, chains one after another, or in as many processes as there are cores
    devinterp2                        2.0.1, language models only
    canonical                         canonical-interp 0.2.7, all that it can compile compiled; of the language model
                                      only its step: torch can't compile what vmap makes of attention on a CPU
    canonical-cached                  the same with the compiler's cache that an earlier process has left on disk
    canonical-eager                   gradients not compiled
    canonical-devices                 chains divided among two threads
    loop                              a plain loop, for the language model

The seconds: every measurement has a process of its own with an empty torch.compile cache. The clock starts when torch
and the contender are imported, the model and the tensors exist in the host's memory and a GPU is awake, for all alike,
and stops when λ̂ is there; tracing, compiling and what a library imports on first use are inside. "again" is the second
estimate in the same process, so the difference to "seconds" is what compiling and the like cost; the devinterps, which
do nothing of the kind, are spared it. The step size is given to all: nobody calibrates.

`--per-step` adds instead a second estimate in the same process and one of two steps: the difference is what steps take,
and what they leave of the first estimate is its "set-up". With `--rival-steps N` rivals make N steps, over all chains,
and the rest of their seconds is extrapolated by that difference. Such rows say so, and have no λ̂.

contenders.py says how the rivals are called, and which defaults of theirs would not be the same work; rivals.py, which
versions they are, and where they are looked for. Those that are not there are left out, with a note.

`--scaling` measures llc_fast alone: seconds per step as chains, parameters and batches grow, from the difference of a
long and a short estimate, so without what an estimate costs once ("set-up": the first estimate of two steps). On a busy
machine such differences can come out wrong, even negative: raise --budget. "size" goes to 10⁸ parameters; a step alone,
by bench_step.py, to 10⁹.

"CPU" is the processor time of all threads and processes, the compiler's too: on a busy machine its ratio says more.

Neighbours matter: on two busy cores what runs on two threads was seen to take ten times as long, which flatters
llc_fast where it runs on one. Measure on an idle machine, and look at --threads 1 as well.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders import (
    Data,
    Estimate,
    Work,
    make_problem,
    rival_title,
    with_canonical,
    with_devinterp,
    with_devinterp2,
    with_llc_fast,
    with_loop,
)
from harness import in_fresh_process, median, parse, print_table, ratio, write_json
from rivals import FOLDER, paths_of, rival_of
from torch import nn

LAYERS, SAMPLES, BATCH, CHAINS, STEPS = 4, 10_000, 500, 4, 2000
LR, NBETA, LOCALIZATION = 2e-6, SAMPLES / math.log(SAMPLES), 1.0
SIZES = [1024, 10_000, 102_400]
ASKED = {
    "devinterp": {"1024": 30.0, "10000": 12.0, "102400": 5.0},
    "canonical": {"1024": 5.0, "10000": 3.5, "102400": 2.0},
    "devinterp2": {"tiny": 8.0, "133k": 8.0},
}
"""How many times faster than a rival llc_fast is to be, by problem."""
ASKED_MICROSECONDS = {("1024", 4): 100.0}
"""What a step of all chains may take on a GPU, by problem and chains."""

LANGUAGE_CHAINS, LANGUAGE_STEPS, LANGUAGE_BATCH, TOKENS, SEQUENCES = 2, 100, 16, 64, 512
ON_NETWORKS = ["devinterp", "devinterp-cores", "canonical", "canonical-cached", "canonical-eager", "canonical-devices"]
ON_LANGUAGE = ["devinterp2", "devinterp", "canonical", "loop"]
DEFAULT = ["llc_fast", "devinterp", "devinterp2", "canonical", "loop"]
"""Rivals that linear networks, and that language models can be given to; what is measured if nothing is said."""
STRATEGIES = [None, "sequential", "batched", "compiled"]
GROWING = ["chains", "parameters", "size", "batch"]
CHAIN_COUNTS, SCALING_SIZES, BATCHES = [1, 2, 4, 8, 16, 32, 64], [1024, 10_000, 102_400, 10**6], [20, 100, 500, 2500]
LARGE_SIZES, LARGE_BATCH, LARGE_SAMPLES = [10**6, 10**7, 10**8], 20, 200
"""Of one chain, with so few samples that what grows with the parameters alone shows."""


def make_estimate(contender: str, *, of_language: bool = False) -> Estimate:
    """The contender's estimate, its library imported."""
    name, _, strategy = contender.partition(":")
    if name == "llc_fast":
        return with_llc_fast(**({"strategy": strategy} if strategy else {}))
    if name == "loop":
        return with_loop()
    if name == "devinterp2":
        return with_devinterp2()
    if name.startswith("devinterp"):
        return with_devinterp(cores=max(2, os.cpu_count() or 2) if name.endswith("-cores") else 1)
    compiled = name != "canonical-eager" and not of_language
    return with_canonical(compiled=compiled, devices=2 if name == "canonical-devices" else 1)


def make_work(spec: dict[str, Any]) -> tuple[nn.Module, Data]:
    """The network and the data of a worker's problem."""
    if "network" not in spec:
        return make_problem(math.isqrt(spec["parameters"] // LAYERS), LAYERS, spec.get("samples", SAMPLES))
    from bench_samples import network

    model = network(spec["size"])
    state, data, _ = torch.load(spec["network"], weights_only=True)
    model.load_state_dict(state)
    return model.eval(), data[:SEQUENCES]


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    """What a worker does: one whole estimate, or with a "budget" the slope of many steps."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    model, data = make_work(spec)
    estimate = make_estimate(spec["contender"], of_language="network" in spec)
    steps, device = spec["steps"], spec["device"] or "cpu"
    torch.ones(1, device=device).item()  # the first touch of a GPU takes half a second
    draws = max(1, steps // 2)
    work = Work(
        spec["lr"],
        spec["nbeta"],
        spec["localization"],
        batch=spec["batch"],
        chains=spec["chains"],
        burnin=steps - draws,
        draws=draws,
        seed=spec["seed"],
        device=device,
    )

    def run(count: int) -> dict[str, Any]:
        return estimate(model, data, replace(work, burnin=count - 1, draws=1))

    if spec.get("budget"):
        return slope(run, spec["budget"])
    seconds, found = timed(lambda: estimate(model, data, work))
    found |= {"seconds": seconds, "threads": torch.get_num_threads()}
    if spec.get("per_step"):
        long, short = used(lambda: run(steps)), used(lambda: run(2))
        found["per step"], found["cpu per step"] = ((a - b) / (steps - 2) for a, b in zip(long, short, strict=True))
    elif spec.get("again"):
        found["again"], found["cpu again"] = used(lambda: estimate(model, data, work))
    return found


def cpu_seconds() -> float:
    """Of all threads, and of the processes that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(run: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Seconds, and what it returns, with the processor's seconds as "cpu"."""
    before, started = cpu_seconds(), time.perf_counter()
    found = run()
    seconds = time.perf_counter() - started
    return seconds, found | {"cpu": cpu_seconds() - before}


def used(run: Callable[[], dict[str, Any]]) -> tuple[float, float]:
    """Seconds and the processor's seconds."""
    seconds, found = timed(run)
    return seconds, found["cpu"]


def slope(run: Callable[[int], dict[str, Any]], budget: float) -> dict[str, Any]:
    """Seconds per step: the median of three differences between a long and a short run, `budget` seconds in all."""

    def seconds_of(steps: int) -> float:
        return timed(lambda: run(steps))[0]

    first, found = timed(lambda: run(2))
    more, elapsed = 4, 0.0
    while elapsed < budget / 10 and more < 20_000:
        more *= 2
        elapsed = seconds_of(2 + more) - seconds_of(2)
    more = max(int(more * min(budget / 3 / elapsed, 4)), 10)
    differences = [seconds_of(2 + more) - seconds_of(2) for _ in range(3)]
    return {"seconds": median(differences) / more, "set-up": first, "strategy": found.get("strategy")}


def measure(spec: dict[str, Any], paths: Sequence[str] = ()) -> dict[str, Any]:
    what = (
        spec["contender"]
        + ", "
        + (f"GPT-NeoX {spec['size']}" if "size" in spec else f"{spec['parameters']:,} parameters")
    )
    what += f", {spec['chains']} chains, batch {spec['batch']}"
    print(f"… {what}", file=sys.stderr, flush=True)
    if spec["contender"].endswith("-cached"):
        with tempfile.TemporaryDirectory() as cache:
            in_fresh_process(__file__, spec | {"steps": 4, "again": False}, cache, paths=paths)
            found = in_fresh_process(__file__, spec, cache, paths=paths)
    else:
        found = in_fresh_process(__file__, spec, paths=paths)
    if "error" in found:
        print(f"{what}: {found['error']}", file=sys.stderr)
    else:
        print(f"  {found['seconds']:.3g} s", file=sys.stderr, flush=True)
    return found


def estimates_table(
    problem: str, spec: dict[str, Any], contenders: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One problem and number of chains: every contender in turn, round after round.

    Args:
        problem: by which ASKED knows it.
        spec: what all contenders do.
        contenders: those that can.
        options: of the script.
    """
    found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
    chains, full = spec["chains"], spec["steps"]
    for round_ in range(options.repeats):
        for contender, results in found.items():
            paths = options.paths.get(contender)
            if rival_of(contender) and paths is None:
                continue
            steps = steps_of(contender, spec, options)
            more = {"per_step": options.per_step or steps < full, "again": not contender.startswith("devinterp")}
            result = measure(spec | more | {"contender": contender, "steps": steps, "seed": round_}, paths or ())
            if "error" not in result and steps < full:
                result["seconds"] += (full - steps) * result["per step"]
            results.append(result)
    base = next((results for contender, results in found.items() if contender.startswith("llc_fast")), None)
    rows = []
    for contender, results in found.items():
        row: dict[str, Any] = {"contender": title(contender, (results or [{}])[0].get("strategy"))}
        row |= {"key": contender, "chains": chains}
        rows.append(row)
        if not results or any("error" in r for r in results):
            row["seconds"] = "failed" if results else "not installed"
            continue
        seconds, steps = [r["seconds"] for r in results], steps_of(contender, spec, options)
        row["seconds"] = median(seconds)
        if "again" in results[0]:
            row["again"] = median([r["again"] for r in results])
        if steps == full:
            row["CPU, s"] = median([r["cpu"] for r in results])
            if base and results is not base and all("cpu" in r for r in base):
                row["× CPU"] = ratio([r["cpu"] for r in results], [r["cpu"] for r in base])
            if "cpu again" in results[0]:
                row["again, CPU"] = median([r["cpu again"] for r in results])
        if steps < full:
            row |= {"contender": f"{row['contender']}, extrapolated from {steps} steps", "steps": steps}
        else:
            llc = torch.tensor([r["llc"] for r in results])
            row |= {"λ̂": float(llc.mean()), "std over chains": float(llc.std(dim=1).mean())}
        if "per step" in results[0]:
            step = median([r["per step"] for r in results])
            row |= {"µs per step": 1e6 * step, "set-up, s": row["seconds"] - full * step}
            row["CPU µs per step"] = 1e6 * median([r["cpu per step"] for r in results])
        if base and results is not base and not any("error" in r for r in base):
            row["llc_fast is faster"] = ratio(seconds, [r["seconds"] for r in base])
        if options.device == "cuda" and results is base:
            row["µs asked"] = ASKED_MICROSECONDS.get((problem, chains))
        elif options.device is None and is_as_asked(problem, spec):
            row["asked"] = ASKED.get(contender, {}).get(problem)
        row |= {"every run": seconds, "threads": results[0]["threads"]}
    return rows


def is_as_asked(problem: str, spec: dict[str, Any]) -> bool:
    """Whether chains and steps are those that the asked ratios are for."""
    length = spec["chains"], spec["steps"]
    return length == ((LANGUAGE_CHAINS, LANGUAGE_STEPS) if "size" in spec else (CHAINS, STEPS))


def steps_of(contender: str, spec: dict[str, Any], options: argparse.Namespace) -> int:
    """Of each chain: rivals may make fewer."""
    full: int = spec["steps"]
    if rival_of(contender) and options.rival_steps:
        return min(full, max(10, options.rival_steps // spec["chains"]))
    return full


def title(contender: str, strategy: str | None) -> str:
    """A row's name; for llc_fast with the strategy that it chose."""
    if rival := rival_of(contender):
        return rival_title(contender, rival.distribution, rival.version)
    if contender == "loop":
        return "plain loop"
    return contender + (f" ({strategy})" if strategy and ":" not in contender else "")


def run_estimates(options: argparse.Namespace) -> dict[str, Any]:
    from llc_fast.theory import deep_linear

    common = {"device": options.device, "threads": options.threads}
    tables: dict[str, Any] = {"work": {"steps": options.steps, "lr": LR, "nbeta": NBETA, "device": options.device}}
    rivals = {rival_of(contender) for contender in options.paths}
    tables["versions"] = sorted(rival.title for rival in rivals if rival)
    print(f"Here: torch {torch.__version__}, {', '.join(tables['versions']) or 'no rivals'}")
    columns = ["contender", "seconds", "again", "llc_fast is faster", "asked", "CPU, s", "again, CPU", "× CPU"]
    columns += ["λ̂", "std over chains"]
    if options.per_step:
        columns = [c for c in columns if c not in ("asked", "again")] + ["µs per step", "µs asked", "CPU µs per step"]
        columns.append("set-up, s")
    everything: dict[str, list[dict[str, Any]]] = {}

    def measured(
        name: str, heading: str, problem: str, spec: dict[str, Any], possible: list[str]
    ) -> list[dict[str, Any]]:
        contenders = [c for c in options.contenders if c.startswith("llc_fast") or c in possible]
        rows = estimates_table(problem, spec | common, contenders, options)
        print_table(heading, [{c: times(row.get(c), c) for c in columns} for row in rows])
        sys.stdout.flush()
        everything[name] = rows
        return rows

    for parameters in options.sizes:
        tables[str(parameters)] = []
        width = math.isqrt(parameters // LAYERS)
        known = deep_linear((width,) * (LAYERS + 1), width).value
        for chains in options.chains:
            spec = {"parameters": parameters, "batch": BATCH, "chains": chains, "steps": options.steps}
            spec |= {"lr": LR, "nbeta": NBETA, "localization": LOCALIZATION}
            work = f"{chains} chains × {options.steps:,} steps"
            heading = f"{parameters:,} parameters, {work}, λ of the theory {known:g}"
            name = f"{parameters:,}" + (f", {chains} chains" if len(options.chains) > 1 else "")
            tables[str(parameters)] += measured(name, heading, str(parameters), spec, ON_NETWORKS)
            write_json(options.json, tables)  # each is minutes of work
    for size in options.language:
        from bench_samples import SETTINGS, prepare

        chains, steps = LANGUAGE_CHAINS, options.language_steps
        with tempfile.TemporaryDirectory() as folder:
            count = prepare(size, TOKENS, LANGUAGE_BATCH, options.training, Path(folder))
            spec = {"size": size, "network": f"{folder}/network.pt", "batch": LANGUAGE_BATCH, "chains": chains}
            heading = f"GPT-NeoX of {count:,} parameters, {chains} chains × {steps} steps"
            spec |= {"steps": steps, **SETTINGS}
            tables[f"language-{size}"] = measured(f"GPT-NeoX {size}", heading, size, spec, ON_LANGUAGE)
    print_table("Seconds, and how many times faster llc_fast is", summary(options.contenders, everything))
    if options.steps != STEPS and options.device is None:
        print(f"\nThe asked ratios are for {STEPS:,} steps.")
    return tables


def summary(contenders: Sequence[str], tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each contender, a column for each problem."""
    found = []
    for contender in contenders:
        row: dict[str, Any] = {"contender": title(contender, None)}
        for problem, rows in tables.items():
            of = next((r for r in rows if r["key"] == contender), {})
            seconds, faster = of.get("seconds"), of.get("llc_fast is faster")
            row[problem] = f"{seconds:.3g}" if isinstance(seconds, float) else seconds
            if faster is not None:
                row[problem] += f" ({faster:.3g}×)"
        found.append(row)
    return found


def times(value: Any, column: str) -> Any:
    """Ratios as "12.3×", large estimates without an exponent."""
    if value is None or isinstance(value, str):
        return value
    if column in ("llc_fast is faster", "asked", "× CPU"):
        return f"{'≥ ' if column == 'asked' else ''}{value:.3g}×"
    return f"{value:.1f}" if column == "λ̂" else value


def run_scaling(options: argparse.Namespace) -> dict[str, Any]:
    plans: dict[str, list[tuple[int, int, int]]] = {
        "chains": [(10_000, BATCH, chains) for chains in CHAIN_COUNTS],
        "parameters": [(size, BATCH, CHAINS) for size in SCALING_SIZES],
        "size": [(size, LARGE_BATCH, 1) for size in LARGE_SIZES],
        "batch": [(10_000, batch, CHAINS) for batch in BATCHES],
    }
    tables: dict[str, Any] = {}
    for growing in options.growing:
        plan = plans[growing]
        rows = tables[growing] = []
        for strategy in options.strategies:
            base = None
            for k, (parameters, batch, chains) in enumerate(plan):
                name = f"llc_fast:{strategy}" if strategy else "llc_fast"
                spec = {"contender": name, "parameters": parameters, "batch": batch}
                # So small a step that no chain can diverge.
                spec |= {"chains": chains, "lr": 1e-9, "seed": 0, "threads": options.threads}
                spec |= {"nbeta": NBETA, "localization": LOCALIZATION}
                spec |= {"steps": STEPS, "budget": options.budget, "device": options.device}
                spec |= {"samples": LARGE_SAMPLES if growing == "size" else SAMPLES}
                found = measure(spec)
                used, seconds = found.get("strategy"), found.get("seconds")
                base = seconds if k == 0 else base
                row = {
                    "strategy": (strategy or "default") + (f" ({used})" if used and strategy is None else ""),
                    "parameters": parameters,
                    "batch": batch,
                    "chains": chains,
                    "ms per step": seconds and 1e3 * seconds,
                    "for each chain": seconds and 1e3 * seconds / chains,
                    "× the first row's step": seconds / base if seconds and base else None,
                    "set-up, s": found.get("set-up"),
                }
                rows.append(row)
        print_table(f"llc_fast as the {growing} grow{'s' if growing == 'batch' else ''}", rows)
        sys.stdout.flush()
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="parameters: 4 × a square")
    parser.add_argument("--language", nargs="*", choices=["tiny", "133k", "1m"], help="sizes of a language model")
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS)
    parser.add_argument("--training", type=int, default=200, help="steps, of the language model")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=DEFAULT,
        help=f"llc_fast, llc_fast:STRATEGY, {', '.join(sorted({*ON_NETWORKS, *ON_LANGUAGE}))}; "
        "the first llc_fast is the base",
    )
    parser.add_argument("--chains", type=int, nargs="+", default=[CHAINS])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--per-step", action="store_true", help="µs per step and set-up apart")
    parser.add_argument("--rival-steps", type=int, help="steps of a rival's chains together; the rest is extrapolated")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, help="torch threads of every contender; default: torch's own choice")
    parser.add_argument("--scaling", action="store_true", help="llc_fast alone: how a step's time grows")
    parser.add_argument("--strategies", nargs="+", help="with --scaling: default, sequential, batched, compiled")
    parser.add_argument(
        "--growing", nargs="+", default=list(GROWING), choices=GROWING, help="with --scaling: what grows"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="with --scaling: seconds for each row")
    parser.add_argument("--rivals", type=Path, default=FOLDER, help="where rivals.py has put them")
    parser.add_argument("--quick", action="store_true", help="tiny problems and few steps, to see that it runs")
    options = parse(parser, work_in_this_process)
    wanted = [None if s == "default" else s for s in options.strategies or ["default"]]
    options.strategies = wanted if options.strategies else STRATEGIES
    if options.sizes is None and options.language is None:
        options.sizes, options.language = ([16], ["tiny"]) if options.quick else (SIZES, ["tiny", "133k"])
    if options.quick:
        options.steps, options.language_steps, options.training = 20, 4, 2
    options.sizes, options.language = options.sizes or [], options.language or []
    for contender in options.contenders:
        if contender not in (*ON_NETWORKS, *ON_LANGUAGE) and contender.partition(":")[0] != "llc_fast":
            parser.error(f"unknown contender {contender!r}")
    if (
        min(options.chains) < 1
        or min(options.steps, options.language_steps) < 3
        or any(LAYERS * math.isqrt(s // LAYERS) ** 2 != s for s in options.sizes)
    ):
        parser.error(f"--chains must be at least 1, --steps 3, and each of --sizes {LAYERS} times a square")
    options.paths = {} if options.scaling else paths_of(options.contenders, options.rivals)
    tables = run_scaling(options) if options.scaling else run_estimates(options)
    write_json(options.json, tables)


if __name__ == "__main__":
    main()
