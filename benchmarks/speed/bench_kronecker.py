"""λ̂ of deep linear networks by the Kronecker-factored metric and by the default sampler, at equal gradients.

    python benchmarks/speed/bench_kronecker.py --out benchmarks/results/kronecker_cpu.json

The networks are those of class "10k" of ``reproduce dln-scaling`` (seeds 0 …); number 1 is the hardest, six layers of
rank 2. Each method gets nothing but γ = 1, minibatches of 500, and its length; gradients count pilots too.
λ is Aoyagi's, by the rank of the product. The effective sample size of a chain that has not arrived says nothing; read
it where the error is small. Rows are written as they come, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss

import llc_fast
from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, make_problem

CASES = (("kfac-sgld", 1000), (None, 1000), (None, 4400), ("kfac-sgld", 4400))
"""Samplers, None: the default, with so many steps of burn-in and so many draws."""


def row(seed: int, sampler: str | None, length: int) -> dict[str, Any]:
    """One estimate."""
    problem = make_problem("10k", seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = llc_fast.estimate_llc(
            problem.model,
            problem.data,
            mse_loss,
            batch_size=BATCH_SIZE,
            localization=LOCALIZATION,
            num_burnin=length,
            num_draws=length,
            sampler=sampler,
            progress=False,
        )
    gradients = 8 * length + int(result.diagnostics["pilot_steps"] or 0)
    return {
        "network": seed,
        "widths": list(problem.widths),
        "rank": problem.rank,
        "lambda": problem.learning_coefficient,
        "sampler": sampler or "default",
        "draws": length,
        "llc": result.llc_mean,
        "stderr": result.llc_stderr,
        "error": result.llc_mean / problem.learning_coefficient - 1,
        "ess": result.diagnostics["ess_bulk"],
        "ess_per_1000_gradients": 1000 * result.diagnostics["ess_bulk"] / gradients,
        "bias_share": result.diagnostics["bias_share"],
        "lr": result.settings["lr"],
        "gradients": gradients,
        "seconds": time.perf_counter() - start,
        "warnings": [w.code for w in result.warnings],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.out is not None and arguments.out.exists():
        rows = json.loads(arguments.out.read_text())["rows"]
    done = {(r["network"], r["sampler"], r["draws"]) for r in rows}
    for sampler, length in CASES:
        for seed in arguments.networks:
            if (seed, sampler or "default", length) in done:
                continue
            found = row(seed, sampler, length)
            print(
                f"{found['sampler']:>10} 4 × {2 * length}, network {seed}: λ = {found['lambda']:g}, λ̂ = "
                f"{found['llc']:.1f} ± {found['stderr']:.1f} ({found['error']:+.1%}), ESS {found['ess']:.0f}, "
                f"{found['seconds']:.0f} s",
                flush=True,
            )
            rows.append(found)
            if arguments.out is not None:
                about = {
                    "llc_fast": llc_fast.__version__,
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                }
                arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
