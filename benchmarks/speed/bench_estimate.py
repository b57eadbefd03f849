"""Whole estimates: llc_fast against devinterp and canonical-interp, wall time and λ̂ of the same statistical work.

    python benchmarks/speed/bench_estimate.py [--sizes 1024 10000 102400] [--chains 4] [--steps 2000] [--repeats 1]
        [--contenders llc_fast llc_fast:compiled devinterp canonical …] [--threads N] [--device cpu|cuda] [--per-step]
        [--rival-steps N] [--json PATH]
    python benchmarks/speed/bench_estimate.py --scaling [--growing chains parameters batch]
        [--strategies default batched …] [--budget SECONDS]

The work: a 4-layer square bias-free linear network at its true parameter, 10,000 samples of its own, mean squared
error, batches of 500, SGLD with one ε, nβ = n / log n and γ for everybody, 4 chains × 2,000 steps, of which the second
half are draws. λ̂ stands beside the seconds, so that one sees that the work is the same; λ̂ of a chain this short is not
yet the theory's λ.

The seconds: every measurement has a process of its own with an empty torch.compile cache. The clock starts when torch
and the contender are imported, the model and the tensors exist in the host's memory and a GPU is awake, for all alike,
and stops when λ̂ is there; tracing, compiling and what a library imports on first use are inside. The step size is given
to all: nobody calibrates. Two rows of canonical-interp are exceptions, which show compilation's share: "cached" finds
the cache that an earlier process left on disk, "warm" is the second estimate in one process.

`--per-step` adds a second estimate in the same process and one of two steps: the difference is what steps take, and
what they leave of the first estimate is its "set-up". With `--rival-steps N` rivals make N steps, over all chains, and
the rest of their seconds is extrapolated by that difference. Such rows say so, and have no λ̂.

contenders.py says how the rivals are called, and which defaults of theirs would not be the same work. Rivals that are
not installed are left out, with a note.

`--scaling` measures llc_fast alone: seconds per step as chains, parameters and batches grow, from the difference of a
long and a short estimate, so without what an estimate costs once ("set-up": the first estimate of two steps). On a busy
machine such differences can come out wrong, even negative: raise --budget.

Neighbours matter: on two busy cores what runs on two threads was seen to take ten times as long, which flatters
llc_fast where it runs on one. Measure on an idle machine, and look at --threads 1 as well.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from contenders import (
    Estimate,
    Work,
    installed,
    make_problem,
    rival_title,
    with_canonical,
    with_devinterp,
    with_llc_fast,
)
from harness import in_fresh_process, median, parse, print_table, ratio, write_json

LAYERS, SAMPLES, BATCH, CHAINS, STEPS = 4, 10_000, 500, 4, 2000
LR, NBETA, LOCALIZATION = 2e-6, SAMPLES / math.log(SAMPLES), 1.0
SIZES = [1024, 10_000, 102_400]
ASKED = {"devinterp": {1024: 15.0, 10_000: 10.0, 102_400: 4.0}, "canonical": {1024: 5.0, 10_000: 3.5, 102_400: 2.0}}
"""How many times faster than a rival llc_fast is to be, by number of parameters."""
ASKED_MICROSECONDS = {(1024, 4): 100.0}
"""What a step of all chains may take on a GPU, by numbers of parameters and chains."""

DISTRIBUTIONS = {
    "devinterp": "devinterp",
    "canonical": "canonical-interp",
    "canonical-cached": "canonical-interp",
    "canonical-warm": "canonical-interp",
}
STRATEGIES = [None, "sequential", "batched", "compiled"]
GROWING = ["chains", "parameters", "batch"]
CHAIN_COUNTS, SCALING_SIZES, BATCHES = [1, 2, 4, 8, 16, 32, 64], [1024, 10_000, 102_400, 10**6], [20, 100, 500, 2500]


def make_estimate(contender: str) -> Estimate:
    """The contender's estimate, its library imported."""
    name, _, strategy = contender.partition(":")
    if name == "llc_fast":
        return with_llc_fast(**({"strategy": strategy} if strategy else {}))
    return with_devinterp() if name == "devinterp" else with_canonical()


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    """What a worker does: one whole estimate, or with a "budget" the slope of many steps."""
    warnings.simplefilter("ignore")
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    estimate, steps, device = make_estimate(spec["contender"]), spec["steps"], spec["device"] or "cpu"
    model, data = make_problem(math.isqrt(spec["parameters"] // LAYERS), LAYERS, SAMPLES)
    torch.ones(1, device=device).item()  # the first touch of a GPU takes half a second
    draws = max(1, steps // 2)
    work = Work(
        spec["lr"],
        NBETA,
        LOCALIZATION,
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
    if spec["contender"].endswith("-warm"):
        run(4)
    seconds, found = timed(lambda: estimate(model, data, work))
    found |= {"seconds": seconds, "threads": torch.get_num_threads()}
    if spec.get("per_step"):
        found["per step"] = (timed(lambda: run(steps))[0] - timed(lambda: run(2))[0]) / (steps - 2)
    return found


def timed(run: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


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


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    what = f"{spec['contender']}, {spec['parameters']:,} parameters, {spec['chains']} chains, batch {spec['batch']}"
    print(f"… {what}", file=sys.stderr, flush=True)
    if spec["contender"].endswith("-cached"):
        with tempfile.TemporaryDirectory() as cache:
            in_fresh_process(__file__, spec | {"steps": 4}, cache)
            found = in_fresh_process(__file__, spec, cache)
    else:
        found = in_fresh_process(__file__, spec)
    if "error" in found:
        print(f"{what}: {found['error']}", file=sys.stderr)
    return found


def estimates_table(
    parameters: int, chains: int, options: argparse.Namespace, versions: dict[str, str | None]
) -> list[dict[str, Any]]:
    """One size and number of chains: every contender in turn, round after round."""
    found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in options.contenders}
    for round_ in range(options.repeats):
        for contender, results in found.items():
            if versions.get(DISTRIBUTIONS.get(contender, ""), "") is None:
                continue
            spec = {"contender": contender, "parameters": parameters, "seed": round_, "device": options.device}
            spec |= {"batch": BATCH, "chains": chains, "lr": LR, "threads": options.threads}
            steps = steps_of(contender, chains, options)
            result = measure(spec | {"steps": steps, "per_step": options.per_step or steps < options.steps})
            if "error" not in result and steps < options.steps:
                result["seconds"] += (options.steps - steps) * result["per step"]
            results.append(result)
    base = next((results for contender, results in found.items() if contender.startswith("llc_fast")), None)
    rows = []
    for contender, results in found.items():
        row: dict[str, Any] = {"contender": title(contender, versions, (results or [{}])[0].get("strategy"))}
        row["chains"] = chains
        rows.append(row)
        if not results or any("error" in r for r in results):
            row["seconds"] = "failed" if results else "not installed"
            continue
        seconds, steps = [r["seconds"] for r in results], steps_of(contender, chains, options)
        row["seconds"] = median(seconds)
        if steps < options.steps:
            row |= {"contender": f"{row['contender']}, extrapolated from {steps} steps", "steps": steps}
        else:
            llc = torch.tensor([r["llc"] for r in results])
            row |= {"λ̂": float(llc.mean()), "std over chains": float(llc.std(dim=1).mean())}
        if "per step" in results[0]:
            step = median([r["per step"] for r in results])
            row |= {"µs per step": 1e6 * step, "set-up, s": row["seconds"] - options.steps * step}
        if base and results is not base and not any("error" in r for r in base):
            row["llc_fast is faster"] = ratio(seconds, [r["seconds"] for r in base])
        if options.device == "cuda" and results is base:
            row["µs asked"] = ASKED_MICROSECONDS.get((parameters, chains))
        elif options.device is None and chains == CHAINS:
            row["asked"] = ASKED.get(contender.partition("-")[0], {}).get(parameters)
        row |= {"every run": seconds, "threads": results[0]["threads"]}
    return rows


def steps_of(contender: str, chains: int, options: argparse.Namespace) -> int:
    """Of each chain: rivals may make fewer."""
    if contender in DISTRIBUTIONS and options.rival_steps:
        return min(options.steps, max(10, options.rival_steps // chains))
    return options.steps  # type: ignore[no-any-return]


def title(contender: str, versions: dict[str, str | None], strategy: str | None) -> str:
    """A row's name; for llc_fast with the strategy that it chose."""
    if contender in DISTRIBUTIONS:
        return rival_title(contender, DISTRIBUTIONS[contender], versions[DISTRIBUTIONS[contender]])
    return contender + (f" ({strategy})" if strategy and ":" not in contender else "")


def run_estimates(options: argparse.Namespace) -> dict[str, Any]:
    from llc_fast.theory import deep_linear

    versions = installed(DISTRIBUTIONS[c] for c in options.contenders if c in DISTRIBUTIONS)
    tables: dict[str, Any] = {"work": {"steps": options.steps, "lr": LR, "nbeta": NBETA, "device": options.device}}
    columns = ["contender", "seconds", "llc_fast is faster", "asked", "λ̂", "std over chains"]
    if options.per_step:
        columns = [c for c in columns if c != "asked"] + ["µs per step", "µs asked", "set-up, s"]
    for parameters in options.sizes:
        tables[str(parameters)] = []
        width = math.isqrt(parameters // LAYERS)
        known = deep_linear((width,) * (LAYERS + 1), width).value
        for chains in options.chains:
            rows = estimates_table(parameters, chains, options, versions)
            tables[str(parameters)] += rows
            heading = f"{parameters:,} parameters, {chains} chains × {options.steps:,} steps, λ of the theory {known:g}"
            print_table(heading, [{c: times(row.get(c), c) for c in columns} for row in rows])
            sys.stdout.flush()
    if options.steps != STEPS and options.device is None:
        print(f"\nThe asked ratios are for {STEPS:,} steps.")
    return tables


def times(value: Any, column: str) -> Any:
    """Ratios as "12.3×", large estimates without an exponent."""
    if value is None or isinstance(value, str):
        return value
    if column in ("llc_fast is faster", "asked"):
        return f"{'≥ ' if column == 'asked' else ''}{value:.3g}×"
    return f"{value:.1f}" if column == "λ̂" else value


def run_scaling(options: argparse.Namespace) -> dict[str, Any]:
    plans: dict[str, list[tuple[int, int, int]]] = {
        "chains": [(10_000, BATCH, chains) for chains in CHAIN_COUNTS],
        "parameters": [(size, BATCH, CHAINS) for size in SCALING_SIZES],
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
                spec |= {"steps": STEPS, "budget": options.budget, "device": options.device}
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
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="parameters: 4 × a square")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["llc_fast", *DISTRIBUTIONS],
        help="llc_fast, llc_fast:STRATEGY, devinterp, canonical, canonical-cached, canonical-warm; "
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
    options = parse(parser, work_in_this_process)
    wanted = [None if s == "default" else s for s in options.strategies or ["default"]]
    options.strategies = wanted if options.strategies else STRATEGIES
    for contender in options.contenders:
        if contender not in DISTRIBUTIONS and contender.partition(":")[0] != "llc_fast":
            parser.error(f"unknown contender {contender!r}")
    if (
        min(options.chains) < 1
        or options.steps < 3
        or any(LAYERS * math.isqrt(s // LAYERS) ** 2 != s for s in options.sizes)
    ):
        parser.error(f"--chains must be at least 1, --steps 3, and each of --sizes {LAYERS} times a square")
    tables = run_scaling(options) if options.scaling else run_estimates(options)
    write_json(options.json, tables)


if __name__ == "__main__":
    main()
