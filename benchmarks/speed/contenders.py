"""Whole estimates of one problem with llc_fast, devinterp 1.3.2 and canonical-interp 0.1.5, behind one interface.

Rivals are called as their own documentation does. devinterp: a shuffled DataLoader without workers, its
``evaluate_mse``, chains one after another (``cores=1``, its default). canonical-interp: an unshuffled DataLoader,
compiled, all chains at once (its defaults); it keeps the first epoch's batches and shows the same ones, in the same
order, to all chains. On a GPU both rivals' data stay in the host's memory and travel batch by batch, as they do it.

All three mean the same by ε, nβ and γ: the drift is (ε/2)·(nβ·∇L + γ·(w − w*)), L the mean over a batch, and
λ̂ = nβ·(mean L − L(w*)). But devinterp's default nβ is that of a data set as large as one batch, and
canonical-interp's is 4, so nβ is always given.

Each ``with_…`` imports its library when it is called, so that a process which measures one holds nothing of the others.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

REQUIREMENTS = {"devinterp": "devinterp==1.3.2", "canonical-interp": "canonical-interp==0.1.5"}
"""What to give to pip, by distribution, for the versions that are called here."""

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """What every contender does: sample from the network's own parameters, mean squared error on mini-batches."""

    lr: float
    nbeta: float
    localization: float
    batch: int
    chains: int
    burnin: int
    draws: int
    seed: int = 0
    device: str = "cpu"


Estimate = Callable[[nn.Module, Data, Work], dict[str, Any]]
"""Returns λ̂ of each chain as "llc", and what else is worth a column."""


def make_problem(width: int, layers: int, samples: int, seed: int = 0) -> tuple[nn.Sequential, Data]:
    """A square bias-free linear network, and samples of its own with inputs uniform on [−10, 10].

    Weights are uniform with variance 1/width, sampled in place: torch's own initialization would be thrown away.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = (3 / width) ** 0.5
    model = nn.Sequential()
    with torch.no_grad():
        for _ in range(layers):
            layer = nn.utils.skip_init(nn.Linear, width, width, bias=False)  # type: ignore[no-untyped-call]
            layer.weight.uniform_(-bound, bound, generator=generator)
            model.append(layer)
        x = torch.empty(samples, width).uniform_(-10, 10, generator=generator)
        return model, (x, model(x))


def installed(wanted: Iterable[str]) -> dict[str, str | None]:
    """Versions of the distributions in `wanted`; None, and a sentence that says what to install, if missing."""
    versions: dict[str, str | None] = {}
    for name in sorted(set(wanted)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            print(f"{name} is not installed, its rows stay empty. To fill them: pip install {REQUIREMENTS[name]}")
    return versions


def rival_title(contender: str, distribution: str, version: str | None) -> str:
    """A rival's name in a table: distribution and version, then what follows the first hyphen of `contender`."""
    variant = contender.partition("-")[2]
    return f"{distribution} {version or ''}".rstrip() + (f" ({variant})" if variant else "")


def with_llc_fast(*, sampler: str | None = None, **execution: Any) -> Estimate:
    """llc_fast's estimate; `execution` says how it is computed."""
    from llc_fast import Execution, estimate_llc

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        result = estimate_llc(
            model,
            data,
            mse_loss,
            lr=work.lr,
            nbeta=work.nbeta,
            localization=work.localization,
            num_chains=work.chains,
            num_burnin=work.burnin,
            num_draws=work.draws,
            batch_size=work.batch,
            seed=work.seed,
            device=work.device,
            progress=False,
            sampler=sampler,
            execution=Execution(**execution),
        )
        return {"llc": result.llc_per_chain.tolist(), "strategy": result.settings.get("strategy")}

    return estimate


def with_devinterp(sampler: str = "sgld") -> Estimate:
    """devinterp's estimate; `sampler`: "sgld" or "rmsprop-sgld"."""
    from devinterp.optim.sgld import SGLD
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary
    from devinterp.utils import evaluate_mse

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        results = estimate_learning_coeff_with_summary(
            model,
            loader=DataLoader(TensorDataset(*data), batch_size=work.batch, shuffle=True),
            evaluate=evaluate_mse,
            sampling_method=SGLD if sampler == "sgld" else SGMCMC.rmsprop_sgld,
            optimizer_kwargs={"lr": work.lr, "nbeta": work.nbeta, "localization": work.localization},
            num_chains=work.chains,
            num_burnin_steps=work.burnin,
            num_draws=work.draws,
            seed=work.seed,
            device=work.device,
            verbose=False,
        )
        return {"llc": [results[f"llc-chain/{k}"] for k in range(work.chains)]}

    return estimate


def with_canonical() -> Estimate:
    """canonical-interp's estimate.

    It needs Python 3.12 for ``itertools.batched``, which it uses only for more than one batch of chains, so not here;
    older Pythons get a stand-in.
    """
    if not hasattr(itertools, "batched"):

        def batched(items: Iterable[object], size: int) -> Iterator[tuple[object, ...]]:
            rest = iter(items)
            while part := tuple(itertools.islice(rest, size)):
                yield part

        itertools.batched = batched  # type: ignore[attr-defined]
    from canonical_interp import LLCEstimator

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        estimator = LLCEstimator(
            draws=work.draws,
            chains=work.chains,
            burnin_steps=work.burnin,
            steps_bw_draws=1,
            learning_rate=work.lr,
            localization=work.localization,
            nbeta=work.nbeta,
        )
        loader = DataLoader(TensorDataset(*data), batch_size=work.batch, shuffle=False)
        estimator.estimate_llc(
            model, loader, criterion_fn=mse_loss, seed=work.seed, devices=work.device, show_progress=False
        )
        return {"llc": estimator.get_metrics()["llcs"].tolist()}

    return estimate
