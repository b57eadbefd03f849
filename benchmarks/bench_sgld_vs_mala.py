"""SGLD against its yardstick: λ̂ of a small ReLU network by minibatch SGLD and by full-gradient MALA.

    python benchmarks/bench_sgld_vs_mala.py [--sizes 100 1000 10000 100000] [--runs 5] [--steps 10000] [--seed 0]
                                            [--refine 1] [--json PATH]

The setting is that of Furman & Lau 2024 (arXiv 2402.03698): 10 inputs uniform on [−10, 10], ReLU layers of 20, 20 and
10, biases from N(0, 1), targets from the network itself, mean squared error; SGLD with ε = 1e-5, γ = 1, batches of 32,
10,000 steps from w*, λ̂ from all of them. Weights are
truncated normals of standard deviation 1/√inputs, as in the paper's other networks. MALA takes the same ε, γ and number
of steps with the whole data set, accepting or rejecting each; its acceptance stands beside it. Both then see the same
noise ξ at every step of every run, so that the difference is that of the algorithms, and its error is taken from the
differences run by run. ``--refine K`` gives MALA ε/K and K times the steps: the same stretch of diffusion, at an
acceptance that no longer slows it down, which is what to compare with where ε·a is of order 1 (n = 100,000).

The runs start at w* and are far from equilibrium after 10,000 steps, in small data sets above all: the numbers are
those of this protocol, for both samplers alike, and not the equilibrium's. "last tenth" tells how far they have got.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import print_table, write_json
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import llc_fast

LR, LOCALIZATION, BATCH = 1e-5, 1.0, 32
CACHED = 10_000
"""Samples that pass the network at a time: their activations stay in the cache."""
WIDTHS = [10, 20, 20, 10]
PUBLISHED = {100: (54.9, 54.3), 1000: (136.9, 140.0), 10_000: (294.9, 296.2), 100_000: (355.8, 349.1)}
"""Mean λ̂ of SGLD and of MALA in the paper, of another random network: their agreement and shape carry over."""


def make_network(seed: int) -> nn.Sequential:
    model = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for k, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
            if k:
                model.append(nn.ReLU())
            layer = nn.Linear(inputs, outputs)
            std = inputs**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.normal_(layer.bias)
            model.append(layer)
    return model


def make_data(model: nn.Module, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.empty(n, WIDTHS[0]).uniform_(-10, 10, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, model(x)


def compare(n: int, runs: int, steps: int, seed: int, refine: int) -> dict[str, Any]:
    """One row: both samplers on n samples."""
    model = make_network(seed)
    data = make_data(model, n, seed)

    def estimate(sampler: str, batch: int, refine: int = 1) -> llc_fast.LLCResult:
        return llc_fast.estimate_llc(
            model,
            data,
            mse_loss,
            sampler=sampler,
            lr=LR / refine,
            localization=LOCALIZATION,
            batch_size=min(batch, n),
            microbatch_size=CACHED if batch > CACHED else None,
            num_chains=runs,
            num_burnin=0,
            num_draws=steps * refine,
            seed=seed,
        )

    results = {"SGLD": estimate("sgld", BATCH), "MALA": estimate("mala", n, refine)}
    row: dict[str, Any] = {"n": n}
    for name, result in results.items():
        row |= {name: result.llc_mean, f"± {name}": error_of(result.llc_per_chain)}
    per_run = [result.llc_per_chain for result in results.values()]
    differences = 100 * (per_run[0] - per_run[1]) / per_run[1].mean()
    row |= {"difference, %": float(differences.mean()), "±, %": error_of(differences)}
    row["acceptance"] = results["MALA"].diagnostics["acceptance"]
    for name, result in results.items():
        row[f"{name}, last tenth"] = float(result.llc_trace[:, -max(1, result.schedule.num_draws // 10) :].mean())
    row["published"] = "{} / {}".format(*PUBLISHED[n]) if n in PUBLISHED else None
    row["seconds"] = sum(result.settings["seconds"] for result in results.values())
    row["runs"] = {name: result.llc_per_chain.tolist() for name, result in results.items()}
    return row


def error_of(values: np.ndarray) -> float:
    """Standard error of the mean over runs."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refine", type=int, default=1, help="MALA takes ε/K and K times the steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for n in arguments.sizes:
        rows.append(compare(n, arguments.runs, arguments.steps, arguments.seed, arguments.refine))
        asked = {name: getattr(arguments, name) for name in ("runs", "steps", "seed", "refine")}
        write_json(arguments.json, {**asked, "lr": LR, "sgld_vs_mala": rows})  # the last size takes longest
    shown = [{k: v for k, v in row.items() if k != "runs"} for row in rows]
    print_table(f"λ̂ by SGLD and by full-gradient MALA, {arguments.runs} runs of {arguments.steps} steps", shown)
    apart = [row["n"] for row in rows if abs(row["difference, %"]) > 5]
    print("\nThey agree within 5 % at every n." if not apart else f"\nThey differ by more than 5 % at n = {apart}.")


if __name__ == "__main__":
    main()
