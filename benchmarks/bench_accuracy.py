"""How far λ̂ is from λ: deep linear networks of Furman & Lau 2024, nothing tuned for any of them.

    python benchmarks/bench_accuracy.py [--networks 30] [--sizes 1k 10k] [--seed 700000] [--defaults]
                                        [--rivals | --only-rivals] [--json PATH]

λ is Aoyagi's for the rank of the product (global; where single layers have a higher rank than the product, the local
coefficient at w* is larger). Every estimate may take 4 chains × 10,000 gradients, pilot chains included, with the
paper's minibatches of 500; `--defaults` adds shorter ones, with no length given either. `--rivals` adds RMSprop-SGLD as
devinterp 1.3.2 defines it, to be read at the step size of a small grid that is best *for these very networks*, and the
paper's own hand-set SGLD: the same update rules and estimator, run by our engine, which tests hold equal to devinterp's
and which takes a fraction of the time; one chain of 10,000 steps each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from harness import print_table, write_json
from torch.nn.functional import mse_loss

from llc_fast import LLCResult, estimate_llc
from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, SIZE_CLASSES, DeepLinearProblem, make_problem

STEPS = 8800
"""Of each of four chains; 4 × 8,800, the pilots' 13 % and some curvature make less than 40,000 gradients."""
RMSPROP_GRID = (1e-7, 3e-7)


def estimate(problem: DeepLinearProblem, **options: Any) -> LLCResult:
    return estimate_llc(problem.model, problem.data, mse_loss, batch_size=BATCH_SIZE, progress=False, **options)


def with_nothing_given(problem: DeepLinearProblem) -> LLCResult:
    return estimate(problem, num_burnin=STEPS // 2, num_draws=STEPS - STEPS // 2)


def with_defaults(problem: DeepLinearProblem) -> LLCResult:
    return estimate(problem)


def with_papers_settings(problem: DeepLinearProblem, lr: float) -> LLCResult:
    return estimate(problem, lr=lr, localization=LOCALIZATION, num_chains=1, num_burnin=9000, num_draws=1000)


def with_rmsprop(problem: DeepLinearProblem, lr: float) -> LLCResult:
    return estimate(
        problem,
        sampler="rmsprop-sgld",
        sampler_options={"adapt_steps": None},
        lr=lr,
        localization=LOCALIZATION,
        num_chains=1,
        num_burnin=5000,
        num_draws=5000,
    )


def row_of(size: str, seed: int, method: str, problem: DeepLinearProblem, result: LLCResult) -> dict[str, Any]:
    truth = problem.learning_coefficient
    return {
        "size": size,
        "seed": seed,
        "method": method,
        "widths": list(problem.widths),
        "rank": problem.rank,
        "parameters": problem.num_parameters,
        "λ": truth,
        "λ̂": result.llc_mean,
        "standard error": result.llc_stderr,
        "error": abs(result.llc_mean - truth) / truth,
        "lr": result.settings["lr"],
        "gradients": result.loss_trace.size + result.diagnostics.get("pilot_steps", 0),
        "seconds": result.settings["seconds"],
        "warnings": result.warnings,
    }


def summary(rows: list[dict[str, Any]], size: str, method: str) -> dict[str, Any]:
    """NaN, a refusal to estimate, counts as an infinite error; a warning excuses nothing but the last column."""
    mine = [r for r in rows if r["size"] == size and r["method"] == method]
    errors = np.array([r["error"] if np.isfinite(r["error"]) else np.inf for r in mine])
    silent = sum(e > 0.3 and not r["warnings"] for e, r in zip(errors, mine, strict=True))
    signed = np.array([r["λ̂"] / r["λ"] - 1 for r in mine])
    return {
        "size": size,
        "method": method,
        "networks": len(mine),
        "median %": 100 * float(np.median(errors)),
        "90th percentile %": 100 * float(np.quantile(errors, 0.9)),
        "worst %": 100 * float(errors.max()),
        "median of signed %": 100 * float(np.median(signed)),
        "with a warning": sum(bool(r["warnings"]) for r in mine),
        "off by > 30 %, no warning": int(silent),
        "seconds each": float(np.median([r["seconds"] for r in mine])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZE_CLASSES), default=["1k", "10k"])
    parser.add_argument("--seed", type=int, default=700_000, help="of the first network")
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--only-rivals", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        methods: dict[str, Any] = {}
        if not options.only_rivals:
            methods["llc_fast, nothing tuned"] = with_nothing_given
        if options.defaults:
            methods["llc_fast, defaults"] = with_defaults
        if options.rivals or options.only_rivals:
            paper = SIZE_CLASSES[size].lr
            methods[f"SGLD as in the paper, ε = {paper:g}"] = lambda p, lr=paper: with_papers_settings(p, lr)
            for step in RMSPROP_GRID:
                methods[f"RMSprop-SGLD, ε = {step:g}"] = lambda p, lr=step: with_rmsprop(p, lr)
        seed, found = options.seed, 0
        while found < options.networks:
            problem = make_problem(size, seed)
            if problem.learning_coefficient > 0:
                found += 1
                for method, run in methods.items():
                    rows.append(row_of(size, seed, method, problem, run(problem)))
                    r = rows[-1]
                    print(
                        f"{size} {seed} {problem.widths} rank {problem.rank}: λ = {r['λ']:.1f}, {method}: "
                        f"λ̂ = {r['λ̂']:.1f} ± {r['standard error']:.2g} ({100 * (r['λ̂'] / r['λ'] - 1):+.1f} %)"
                        f"{'; '.join(['', *r['warnings']])}, {r['seconds']:.0f} s",
                        flush=True,
                    )
            seed += 1
        table = [summary(rows, size, method) for method in methods]
        print_table(f"|λ̂ − λ|/λ, class {size}", table)
    tables = [summary(rows, size, m) for size in options.sizes for m in dict.fromkeys(r["method"] for r in rows)]
    write_json(options.json, {"summary": tables, "networks": rows})


if __name__ == "__main__":
    main()
