"""Effective samples of each sampler and metric over SGLD's, per gradient and per second, and what λ̂ they give.

    python benchmarks/speed/bench_metrics.py [--problems 1k 10k relu resnet transformer] [--networks 30] [--steps 2400]
                                             [--metrics sgld …] [--seed 0] [--quick] [--json PATH]

The problems: the deep linear networks of ``llc-fast reproduce accuracy`` (30 of class 1k and 30 of 10k, λ known), a
ReLU network at an exact minimum, as it is and with a hidden layer rescaled by a tenth (one function, other parameters),
a residual network trained on scikit-learn's digits, and a transformer trained on the manual of Python. Every metric
runs the same estimate: 4 chains of `--steps`, half of which are burn-in, ε from pilot chains, and the Euclidean
localization, so that all of them sample one posterior. On a network metrics run one after another, and rows are written
as they are measured: the same command goes on from there.

"ESS" is the effective size (``llc_fast.stats.convergence.ess_mean``) of the kept draws of the loss trace, over chains;
gradients and CPU seconds are those of the whole estimate with its pilots, on one thread. Effective samples alone
deceive: a chain that has not reached the slow directions sees a smaller world and looks well mixed in it. So λ̂, its
error where λ is known, and R̂ stand beside them; `--problems relu --metrics hmc` adds what HMC on all data finds. λ̂ of a
chain from w* grows until slow directions are crossed: at equal gradients the λ̂ nearer to λ is of the sampler that is
further.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import print_table, write_json
from torch import nn
from torch.nn import functional as F

import llc_fast
from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, make_problem
from llc_fast.problems.digits import load_digits
from llc_fast.problems.relu_network import make_data, make_network, rescale
from llc_fast.problems.resnet import resnet
from llc_fast.problems.text import load_text
from llc_fast.problems.transformer import Transformer, sequence_losses
from llc_fast.reproduce.accuracy import FIRST_SEED
from llc_fast.samplers import HMCSampler, PreconditionedSGLDSampler, SGHMCSampler
from llc_fast.stats.convergence import ess_mean
from llc_fast.support.files import plain

BASE = "sgld"
METRICS: dict[str, Callable[[], Any]] = {
    "sgld": lambda: "sgld",
    "sghmc": lambda: SGHMCSampler(momentum_decay=0.5),
    "default": lambda: None,
    "rmsprop-sgld": lambda: "rmsprop-sgld",
    "curvature": lambda: PreconditionedSGLDSampler(preconditioner="curvature", localization_metric="euclidean"),
    "kfac-sgld": lambda: "kfac-sgld",
}
"""What is given as `sampler`. "sghmc" has the least friction that the default may choose."""
EXACT = "hmc"
"""On request, on small problems: all data at each of ten gradients, steps that are accepted or rejected."""


class Problem(NamedTuple):
    """What is estimated: the arguments of an estimate, and λ where it is known."""

    model: nn.Module
    data: Any
    loss_fn: Any
    options: dict[str, Any]
    known: float | None = None
    share: float = 1.0
    """Of `--steps`, what its chains take: gradients of the larger networks take ten times as long."""


def deep_linear(size: str, count: int, seed: int) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """The networks of ``reproduce accuracy``: those whose λ is not 0."""
    found = 0
    for network in itertools.count(FIRST_SEED + 1000 * seed):
        problem = make_problem(size, network)
        if found == count:
            return
        if (known := problem.learning_coefficient) > 0:
            found += 1
            options = {"localization": LOCALIZATION, "batch_size": BATCH_SIZE}
            made = Problem(problem.model, problem.data, F.mse_loss, options, known)
            yield f"{size} {network}", lambda made=made: made  # type: ignore[misc]


def relu(factor: float) -> Problem:
    """A singular ReLU network, its first hidden layer rescaled."""
    network = make_network((30, 40, 30), 0, copies=6)
    model = rescale(network, 0, factor)
    return Problem(model, make_data(network, 10_000, 0), F.mse_loss, {"localization": 1.0, "batch_size": 100})


def trained_resnet() -> Problem:
    """Four channels wide, 600 steps of SGD on the digits."""
    digits = load_digits(num_train=1500)
    x, y = digits.train
    generator = torch.Generator().manual_seed(0)
    model = resnet(4, blocks=1, size=8, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(600):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Problem(model, (x, y), F.cross_entropy, {"batch_size": 128}, share=1 / 3)


def token_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return sequence_losses(model(batch[:, :-1]), batch[:, 1:])


def trained_transformer() -> Problem:
    """Two layers, 500 steps of Adam on text; nβ and γ as is usual for language models."""
    text = load_text(33, num_train=2000)
    model = Transformer(len(text.vocabulary), 32, width=32, heads=4, layers=2)
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(500):
        batch = text.train[torch.randint(len(text.train), (64,), generator=generator)]
        optimizer.zero_grad()
        token_loss(model, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Problem(model, text.train, token_loss, {"preset": "language-model", "batch_size": 32}, share=1 / 3)


def problems(names: list[str], networks: int, seed: int) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Names and what makes them, classes of deep linear networks in turn, so that a part is a fair sample."""
    linear = [deep_linear(size, networks, seed) for size in ("1k", "10k") if size in names]
    others: dict[str, Callable[[], Problem]] = {}
    if "relu" in names:
        others |= {"relu": lambda: relu(1.0), "relu, rescaled by 0.1": lambda: relu(0.1)}
    if "resnet" in names:
        others["resnet"] = trained_resnet
    if "transformer" in names:
        others["transformer"] = trained_transformer
    yield from (pair for group in zip(*linear, strict=True) for pair in group)
    yield from others.items()


def measured(problem: Problem, metric: str, steps: int) -> dict[str, Any]:
    """The row of an estimate."""
    began, steps = time.process_time(), int(problem.share * steps)
    options = problem.options
    if metric == EXACT:
        sampler: Any = HMCSampler(preconditioner="curvature", localization_metric="euclidean")
        options = options | {"batch_size": None}
    else:
        sampler = METRICS[metric]()
    result = llc_fast.estimate_llc(
        problem.model,
        problem.data,
        problem.loss_fn,
        sampler=sampler,
        num_burnin=steps // 2,
        num_draws=steps - steps // 2,
        progress=False,
        **options,
    )
    seconds = time.process_time() - began
    draws = result.loss_trace[result.kept_chains][:, result.schedule.draws]
    gradients = result.loss_trace.size + result.diagnostics.get("pilot_steps", 0)
    ess = ess_mean(draws) if draws.size else math.nan
    return {
        "metric": metric,
        "lambda": problem.known,
        "parameters": result.settings["num_parameters"],
        "sampler": result.settings["sampler"],
        "lr": result.settings["lr"],
        "llc": result.llc_mean,
        "stderr": result.llc_stderr,
        "error": None if problem.known is None else result.llc_mean / problem.known - 1,
        "r_hat": result.diagnostics.get("r_hat"),
        "bias_share": result.diagnostics.get("bias_share"),
        "ess": ess,
        "gradients": gradients,
        "seconds": seconds,
        "ess per 1000 gradients": 1000 * ess / gradients,
        "ess per second": ess / seconds,
        "warnings": [warning.code for warning in result.warnings],
        "trace": [float(m) for m in result.nbeta * (_eighths(result.loss_trace) - result.init_loss)],
    }


def _eighths(trace: Any) -> Any:
    """The mean over chains and over each eighth of the steps."""
    length = trace.shape[1] // 8
    return trace[:, : 8 * length].reshape(len(trace), 8, length).mean(axis=(0, 2))


GROUPS = ("1k", "10k", "relu", "relu, rescaled by 0.1", "resnet", "transformer")


def summary(rows: dict[str, dict[str, dict[str, Any]]], metrics: list[str]) -> list[dict[str, Any]]:
    """A line for each kind of problem and metric: medians over its networks, those that every metric has."""
    lines = []
    for group in GROUPS:
        of_group = [found for key, found in rows.items() if key == group or key.startswith(f"{group} ")]
        mine = [found for found in of_group if all(m in found for m in metrics)]
        for metric in metrics if mine else ():
            ratios = {
                name: _middle(found[metric][name] / found[BASE][name] for found in mine if _has(found, metric, name))
                for name in ("ess per 1000 gradients", "ess per second")
            }
            least = [found[metric]["ess per second"] / found[BASE]["ess per second"] for found in mine
                     if _has(found, metric, "ess per second")]  # fmt: skip
            errors = [found[metric]["error"] for found in mine if found[metric]["error"] is not None]
            lines.append(
                {
                    "problem": group,
                    "networks": len(mine),
                    "metric": metric,
                    "ESS": _middle(found[metric]["ess"] for found in mine),
                    "a gradient, over SGLD": ratios["ess per 1000 gradients"],
                    "a second, over SGLD": ratios["ess per second"],
                    "least of them": min(least, default=math.nan),
                    "λ̂": _middle(found[metric]["llc"] for found in mine) if len(mine) == 1 else None,
                    "|error|, median": _middle(map(abs, errors)) if errors else None,
                    "largest": max(map(abs, errors)) if errors else None,
                    "with sign": _middle(errors) if errors else None,
                    "R̂": _middle(found[metric]["r_hat"] for found in mine),
                    "diverged": sum(found[metric]["llc"] is None for found in mine),
                }
            )
    return lines


def _has(found: dict[str, dict[str, Any]], metric: str, name: str) -> bool:
    return bool(found[metric][name]) and bool(found[BASE][name])


def _middle(values: Any) -> float:
    found = [v for v in values if v is not None]
    return statistics.median(found) if found else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["1k", "10k", "relu", "resnet", "transformer"])
    parser.add_argument("--networks", type=int, default=30, help="of each class of deep linear networks")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=[*METRICS, EXACT])
    parser.add_argument("--steps", type=int, default=2400, help="of each of four chains")
    parser.add_argument("--seed", type=int, default=0, help="other networks")
    parser.add_argument(
        "--quick", action="store_true", help="one network of each class, 400 steps, to see that it runs"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    steps, networks = (400, 1) if arguments.quick else (arguments.steps, arguments.networks)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    metrics = [BASE, *(m for m in arguments.metrics if m != BASE)]
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    if arguments.json is not None and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
        if found["steps"] != steps or found["seed"] != arguments.seed:
            parser.error(f"{arguments.json} has {found['steps']} steps, seed {found['seed']}: choose another file")
        kept = found["rows"]
    for name, make in problems(arguments.problems, networks, arguments.seed):
        rows = kept.setdefault(name, {})
        missing = [metric for metric in metrics if metric not in rows]
        problem = make() if missing else None
        for metric in missing:
            assert problem is not None
            rows[metric] = plain(measured(problem, metric, steps))
            about = {k: rows[metric][k] for k in ("lambda", "llc", "error", "r_hat", "ess", "seconds")}
            print(name, metric, about, flush=True)
            write_json(arguments.json, {"steps": steps, "seed": arguments.seed, "rows": kept})
    lines = summary(kept, metrics)
    print_table(f"4 chains × {steps} steps, half of them burn-in; medians over networks", lines)
    write_json(arguments.json, {"steps": steps, "seed": arguments.seed, "rows": kept, "summary": plain(lines)})


if __name__ == "__main__":
    main()
