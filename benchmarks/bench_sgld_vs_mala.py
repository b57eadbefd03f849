"""SGLD against its yardstick: λ̂ of a small ReLU network by minibatch SGLD and by full-gradient MALA or HMC.

    python benchmarks/bench_sgld_vs_mala.py [--sizes 100 1000 10000 100000] [--runs 5] [--steps 10000] [--seed 0]
                                            [--stiff 100000] [--json PATH]

The setting is that of Furman & Lau 2024 (arXiv 2402.03698): 10 inputs uniform on [−10, 10], ReLU layers of 20, 20 and
10, biases from N(0, 1), targets from the network itself, mean squared error; SGLD with ε = 1e-5, γ = 1, batches of 32,
10,000 steps from w*, λ̂ from all of them. Weights are truncated normals of standard deviation 1/√inputs, as in the
paper's other networks. "corrected" is the same run with ``heat_correction=True``, which draws its minibatches
independently and takes off the loss what step size and gradient noise were measured to add to it.

MALA takes the same ε, γ and number of steps with the whole data set, accepting or rejecting each; its acceptance stands
beside it. All see the same noise ξ at every step of every run, so that the difference is that of the algorithms, and
its error is taken from the differences run by run.

From n = ``--stiff`` on, ε·a is of order 1 in the stiffest directions: MALA would reject most steps of this size, and be
slower than the diffusion it is to be compared with. The yardstick there is HMC, in as many transitions as make the same
stretch of diffusion: one of length τ moves a flat direction as far as a Langevin step of size τ², so that there are
T = ε·steps/E[τ²], with ten leapfrog steps each, which take far less than 1/√a. It is run below too, where MALA tells
whether that holds. Its first transitions take it from w* to the bulk at once, or in a few, of `HMC_TRANSITIONS`: half
a percent of λ̂. It shares no noise with SGLD, so the errors of the two are added.

The runs start at w* and are far from equilibrium after 10,000 steps, in small data sets above all: the numbers are
those of this protocol, for all samplers alike, and not the equilibrium's. "last tenth" tells how far they have got.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import print_table, write_json
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import llc_fast

LR, LOCALIZATION, BATCH = 1e-5, 1.0, 32
HMC_TRANSITIONS, LEAPFROG, JITTER = 500, 10, 0.2
"""T, the leapfrog steps of each and how much their length varies, see llc_fast.samplers.HMC."""
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


def compare(n: int, runs: int, steps: int, seed: int, stiff: int) -> dict[str, Any]:
    """One row: all samplers on n samples."""
    model = make_network(seed)
    data = make_data(model, n, seed)

    def estimate(sampler: str, batch: int, lr: float = LR, draws: int = steps, **options: Any) -> llc_fast.LLCResult:
        return llc_fast.estimate_llc(
            model,
            data,
            mse_loss,
            sampler=sampler,
            lr=lr,
            localization=LOCALIZATION,
            batch_size=min(batch, n),
            microbatch_size=CACHED if batch > CACHED else None,
            num_chains=runs,
            num_burnin=0,
            num_draws=draws,
            seed=seed,
            **options,
        )

    results = {"SGLD": estimate("sgld", BATCH), "corrected": estimate("sgld", BATCH, heat_correction=True)}
    if n < stiff:
        results["MALA"] = estimate("mala", n)
    squared = LEAPFROG**2 * (1 + JITTER**2 / 3)  # E[τ²]/δ²
    results["HMC"] = estimate(
        "hmc",
        n,
        lr=LR * steps / HMC_TRANSITIONS / squared,
        draws=HMC_TRANSITIONS,
        sampler_options={"num_leapfrog": LEAPFROG, "jitter": JITTER},
    )
    exact = "MALA" if "MALA" in results else "HMC"
    row: dict[str, Any] = {"n": n}
    for name in ("SGLD", "corrected", "MALA", "HMC"):
        per_run = results[name].llc_per_chain if name in results else None
        row |= {name: None if per_run is None else float(per_run.mean())}
        row |= {f"± {name}": None if per_run is None else error_of(per_run)}
    for name in ("SGLD", "corrected"):
        difference, error = apart(results[name].llc_per_chain, results[exact].llc_per_chain, shared=exact == "MALA")
        row |= {f"{name} − exact, %": difference, f"±, % ({name})": error}
    for name in ("MALA", "HMC"):
        row[f"acceptance {name}"] = results[name].diagnostics["acceptance"] if name in results else None
    for name, result in results.items():
        row[f"{name}, last tenth"] = float(result.llc_trace[:, -max(1, result.schedule.num_draws // 10) :].mean())
    row["published"] = "{} / {}".format(*PUBLISHED[n]) if n in PUBLISHED else None
    row["seconds"] = sum(result.settings["seconds"] for result in results.values())
    row["runs"] = {name: result.llc_per_chain.tolist() for name, result in results.items()}
    return row


def apart(ours: np.ndarray, exact: np.ndarray, *, shared: bool) -> tuple[float, float]:
    """Their difference in percent of the exact one, and its standard error; `shared`: run by run, with equal noise."""
    difference, unit = 100 * (ours.mean() - exact.mean()) / exact.mean(), 100 / exact.mean()
    error = error_of(ours - exact) if shared else math.hypot(error_of(ours), error_of(exact))
    return float(difference), float(unit * error)


def error_of(values: np.ndarray) -> float:
    """Standard error of the mean over runs."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stiff", type=int, default=100_000, help="n from which on HMC takes MALA's place")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for n in arguments.sizes:
        row = compare(n, arguments.runs, arguments.steps, arguments.seed, arguments.stiff)
        rows.append(row)
        asked = {name: getattr(arguments, name) for name in ("runs", "steps", "seed", "stiff")}
        write_json(arguments.json, {**asked, "lr": LR, "sgld_vs_mala": rows})  # the last size takes longest
    print_table(
        f"λ̂ by SGLD and by full-gradient MALA or HMC, {arguments.runs} runs of {arguments.steps} steps",
        [{k: v for k, v in row.items() if k != "runs"} for row in rows],
    )
    for name in ("SGLD", "corrected"):
        far = [row["n"] for row in rows if abs(row[f"{name} − exact, %"]) > 5]
        print(f"\n{name}: " + (f"differs by more than 5 % at n = {far}." if far else "agrees within 5 % at every n."))


if __name__ == "__main__":
    main()
