"""What makes λ̂ vary from seed to seed at equal gradient evaluations, what takes it away, and what is bias.

    python benchmarks/bench_variance.py [--chains 96] [--quick] [--json PATH]

Three problems at (numerical) minima: a realizable deep linear network, a noisy regression, a classifier. Minibatches
with and without replacement within an epoch; the loss trace as it is and paired, L_B(w_t) − L_B(w*) + L(w*); chains in
pairs with opposite noise. Every chain is a run of its own: one seed, its own noise and minibatches. The loop is plain
PyTorch, so that noise can be turned round; the formula is SGLD's, minibatches without replacement are the package's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import print_table, write_json
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

import llc_fast
from llc_fast.kernels.native import minibatch_indices
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.control_variate import Baseline
from llc_fast.problems import deep_linear
from llc_fast.stats.errors import standard_error

N, BATCH = 5000, 50
EPOCH = N // BATCH
BURN_IN, DRAWS = 4 * EPOCH, 10 * EPOCH
SPANS = {"½ epoch": EPOCH // 2, "2½ epochs": 5 * EPOCH // 2, "10 epochs": 10 * EPOCH}
FULL_EVERY = 20
LOCALIZATION = 1.0


@dataclass(frozen=True)
class Problem:
    """A model at its minimum."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    loss_fn: Callable[..., Tensor]

    @property
    def nbeta(self) -> float:
        return llc_fast.default_nbeta(len(self.x))

    def sample_losses(self) -> NDArray[np.float64]:
        with torch.no_grad():
            each = vmap(lambda out, y: self.loss_fn(out[None], y[None]))(self.model(self.x), self.y)
        values: NDArray[np.float64] = each.double().numpy()
        return values


def problems() -> list[Problem]:
    torch.manual_seed(0)
    mse, cross_entropy = nn.functional.mse_loss, nn.functional.cross_entropy
    weights = [torch.randn(b, a) / math.sqrt(a) for a, b in ((8, 10), (10, 10), (10, 6))]
    weights[1] = weights[1] @ torch.diag((torch.arange(10) < 4).float())
    linear, x = deep_linear.network(weights), torch.empty(N, 8).uniform_(-1, 1)
    with torch.no_grad():
        realizable = Problem("deep linear, realizable", linear, x, linear(x), mse)
    x = torch.randn(N, 6)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3] + torch.randn(N, 1)
    regression = Problem("noisy regression", _trained(nn.Sequential(*_layers(6, 12, 1)), x, y, mse), x, y, mse)
    labels = torch.randint(4, (N,))
    x = 1.2 * torch.randn(4, 6)[labels] + torch.randn(N, 6)
    classifier = _trained(nn.Sequential(*_layers(6, 8, 4)), x, labels, cross_entropy)
    return [realizable, regression, Problem("classifier", classifier, x, labels, cross_entropy)]


def _layers(inputs: int, hidden: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)]


def _trained(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> nn.Module:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=600, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return model.requires_grad_(True)


# ---- chains ------------------------------------------------------------------------------------------------


def run(
    problem: Problem, lr: float, chains: int, draws: int, *, replace: bool = False, pairs: str | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Minibatch losses ``[chain, draw]`` of SGLD, L_B(w*) − L(w*) of the same minibatches, and L(w) at every 20th draw.

    Args:
        replace: minibatches with replacement.
        pairs: chains in two halves with opposite noise, with ``"own"`` or ``"shared"`` minibatches; None: independent.
    """
    noise, order = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    nbeta, losses_at_anchor = problem.nbeta, problem.sample_losses()
    baseline = Baseline(losses_at_anchor, float(losses_at_anchor.mean()), BATCH)
    anchor = {k: p.detach() for k, p in problem.model.named_parameters()}
    params = {k: p.repeat(chains, *[1] * p.ndim) for k, p in anchor.items()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss_fn(functional_call(problem.model, w, (x,)), y)

    indices = torch.empty(chains // 2 if pairs == "shared" else chains, BATCH, dtype=torch.int64)
    raw, base = np.empty((2, chains, draws))
    whole = np.empty((chains, draws // FULL_EVERY))
    for step in range(BURN_IN + draws):
        if replace:
            torch.randint(len(problem.x), indices.shape, out=indices, generator=order)
        else:
            minibatch_indices(len(problem.x), NoiseKey(3, step=step), indices)
        chosen = indices.repeat(2, 1) if pairs == "shared" else indices
        leaves = {k: p.requires_grad_() for k, p in params.items()}
        losses = vmap(loss)(leaves, problem.x[chosen], problem.y[chosen])
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        if step >= BURN_IN:
            raw[:, step - BURN_IN] = losses.detach().numpy()
            base[:, step - BURN_IN] = baseline(chosen.numpy())
        draw, rest = divmod(step - BURN_IN, FULL_EVERY)
        if rest == FULL_EVERY // 2 and 0 <= draw < whole.shape[1]:
            with torch.no_grad():
                whole[:, draw] = vmap(loss, in_dims=(0, None, None))(leaves, problem.x, problem.y).numpy()
        params = {}
        for (name, w), grad in zip(leaves.items(), grads, strict=True):
            drift = nbeta * grad + LOCALIZATION * (w.detach() - anchor[name])
            if pairs is None:
                xi = torch.randn(w.shape, generator=noise)
            else:
                half = torch.randn(chains // 2, *w.shape[1:], generator=noise)
                xi = torch.cat([half, -half])
            params[name] = w.detach() - lr / 2 * drift + math.sqrt(lr) * xi
    return raw, base, whole


# ---- tables ------------------------------------------------------------------------------------------------


def pairing_table(
    problem: Problem, lr: float, chains: int, draws: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The spread of λ̂ over chains with and without pairing, and what each chain says of its own error.

    Also the bias of minibatch losses: the mean of paired ones against that of L(w) over the whole data set.
    """
    rows, biases = [], []
    init_loss = float(problem.sample_losses().mean())
    for replace in (True, False):
        raw, base, whole = run(problem, lr, chains, draws, replace=replace)
        minibatches = "with replacement" if replace else "epochs"
        for span, length in SPANS.items():
            if length > draws:
                continue
            row: dict[str, Any] = {"problem": problem.name, "minibatches": minibatches, "draws": span}
            variance = {}
            for kind, trace in (("raw", raw), ("paired", raw - base)):
                llc = problem.nbeta * (trace[:, :length] - init_loss)
                variance[kind] = float(llc.mean(axis=1).var(ddof=1))
                said = np.mean([standard_error(one[None]).value ** 2 for one in llc])
                row |= {
                    f"λ̂ {kind}": float(llc.mean()),
                    f"sd {kind}": math.sqrt(variance[kind]),
                    f"said / sd {kind}": math.sqrt(said / variance[kind]),
                }
            row["variance raw / paired"] = variance["raw"] / variance["paired"]
            row["one draw's"] = float(raw.var(axis=0).mean() / (raw - base).var(axis=0).mean())
            rows.append(row)
        own = problem.nbeta * ((raw - base).mean(axis=1) - init_loss)
        true = problem.nbeta * (whole.mean(axis=1) - init_loss)
        biases.append(
            {
                "problem": problem.name,
                "minibatches": minibatches,
                "λ̂ by minibatches": float(own.mean()),
                "λ̂ by L(w)": float(true.mean()),
                "difference": float((own - true).mean()),
                "± (one standard error)": float((own - true).std(ddof=1) / math.sqrt(chains)),
            }
        )
    return rows, biases


def antithetic_table(problem: Problem, lr: float, chains: int, draws: int) -> list[dict[str, Any]]:
    """Correlation of λ̂ in a pair of chains, whose variance is 1 + that times that of an independent pair."""
    rows = []
    for pairs in ("own", "shared"):
        raw, base, _ = run(problem, lr, chains, draws, pairs=pairs)
        first, second = np.split((raw - base).mean(axis=1), 2)
        correlation = float(np.corrcoef(first, second)[0, 1])
        rows.append(
            {
                "problem": problem.name,
                "minibatches": pairs,
                "correlation": correlation,
                "± (one standard error)": (1 - correlation**2) / math.sqrt(chains / 2 - 1),
                "variance over independent pairs'": 1 + correlation,
            }
        )
    return rows


def step_size(problem: Problem) -> float:
    """The default one of the package."""
    result = llc_fast.estimate_llc(
        problem.model,
        (problem.x, problem.y),
        problem.loss_fn,
        batch_size=500,
        num_draws=1,
        num_burnin=0,
        progress=False,
    )
    return float(result.settings["lr"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=96, help="an even number: each is one seed")
    parser.add_argument("--quick", action="store_true", help="few chains, half an epoch, to see that it runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chains, draws = (8, EPOCH // 2) if arguments.quick else (arguments.chains, DRAWS)
    torch.set_num_threads(1)
    tables: dict[str, Any] = {"n": N, "batch_size": BATCH, "chains": chains, "burn_in": BURN_IN}
    tables |= {"pairing": [], "bias": [], "antithetic": []}
    for problem in problems():
        lr = step_size(problem)
        rows, biases = pairing_table(problem, lr, chains, draws)
        tables["pairing"] += rows
        tables["bias"] += biases
        tables["antithetic"] += antithetic_table(problem, lr, chains, draws)
    print_table(f"λ̂ of single chains, over {chains} of them, n = {N}, batch {BATCH}", tables["pairing"])
    print_table("Are minibatch losses those of the whole data set?", tables["bias"])
    print_table("Chains in pairs with opposite noise, paired baseline, epochs", tables["antithetic"])
    write_json(arguments.json, tables)


if __name__ == "__main__":
    main()
