"""Whole estimates of one problem with llc_fast and its rivals, behind one interface, and rivals' steps alone.

Rivals are called as their own documentation does. devinterp 1.3.2: a shuffled DataLoader without workers, chains one
after another (``cores=1``, its default), or in as many processes as there are cores. devinterp 2.0.1, which does
language models only: ``devinterp.slt.llc.llc`` without observables; all chains see the same minibatches (its default);
it writes the loss of every token of every step into a store, and its λ̂ counts burn-in. canonical-interp: an unshuffled
DataLoader, all chains in one vmap, its step compiled and its gradients compiled with ``mode="reduce-overhead"`` (its
defaults); it keeps the first epoch's batches and shows the same ones, in the same order, to all chains. Where there are
several GPUs it gets all of them. On a GPU rivals' data stay in the host's memory and travel batch by batch, as they do
it. posteriors has no estimate of λ; its steps are measured.

All mean the same by ε, nβ and γ: the drift is (ε/2)·(nβ·∇L + γ·(w − w*)), L the mean over a batch, and
λ̂ = nβ·(mean L − L(w*)). But devinterp's default nβ is that of a data set as large as one batch, and
canonical-interp's that of 32 samples, so nβ is always given.

Each ``with_…`` imports its library when it is called, so that a process which measures one holds nothing of the others.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rivals import RIVALS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

REQUIREMENTS = {RIVALS[name].distribution: RIVALS[name].title.replace(" ", "==") for name in ("devinterp", "canonical")}
"""What to give to pip, by distribution, for the versions that are called here."""

Data = tuple[Tensor, Tensor] | Tensor
"""Inputs and targets of a regression, or a language model's sequences of tokens."""


@dataclass(frozen=True)
class Work:
    """What every contender does: sample from the network's own parameters with mini-batches.

    The loss is the mean squared error, or a language model's cross-entropy of the next token, averaged over tokens.
    """

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


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean over all tokens that have one before them."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def with_llc_fast(*, sampler: str | None = None, **execution: Any) -> Estimate:
    """llc_fast's estimate; `execution` says how it is computed."""
    from llc_fast import Execution, estimate_llc

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        loss: Any = "next-token" if isinstance(data, Tensor) else mse_loss
        result = estimate_llc(
            model,
            data,
            loss,
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


def with_devinterp(sampler: str = "sgld", cores: int = 1) -> Estimate:
    """devinterp 1.3.2's estimate.

    Args:
        sampler: "sgld" or "rmsprop-sgld".
        cores: processes, each of which makes some of the chains.
    """
    from devinterp.optim.sgld import SGLD
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary
    from devinterp.utils import evaluate_mse

    def evaluate_tokens(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return next_token_loss(model(batch[0], use_cache=False).logits, batch[0]), {}

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        tokens = isinstance(data, Tensor)
        results = estimate_learning_coeff_with_summary(
            model,
            loader=DataLoader(dataset_of(data), batch_size=work.batch, shuffle=True),
            evaluate=evaluate_tokens if tokens else evaluate_mse,
            sampling_method=SGLD if sampler == "sgld" else SGMCMC.rmsprop_sgld,
            optimizer_kwargs={"lr": work.lr, "nbeta": work.nbeta, "localization": work.localization},
            num_chains=work.chains,
            num_burnin_steps=work.burnin,
            num_draws=work.draws,
            cores=cores,
            seed=work.seed,
            device=work.device,
            verbose=False,
        )
        return {"llc": [results[f"llc-chain/{k}"] for k in range(work.chains)]}

    return estimate


def with_devinterp2() -> Estimate:
    """devinterp 2.0.1's estimate, of language models only."""
    import zarr  # noqa: F401 -- as its import does
    from datasets import Dataset
    from devinterp.slt.llc import llc

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        if not isinstance(data, Tensor):
            raise TypeError("devinterp 2.0.1 has no losses but those of language models")
        with tempfile.TemporaryDirectory() as folder:
            result = llc(
                model,
                Dataset.from_dict({"input_ids": data.numpy()}).with_format("torch"),
                observables={},
                lr=work.lr,
                n_beta=work.nbeta,
                localization=work.localization,
                num_chains=work.chains,
                num_burnin_steps=work.burnin,
                num_draws=work.draws,
                batch_size=work.batch,
                init_seed=100 + work.seed,
                device=work.device,
                output_path=Path(folder, "samples.zarr"),
            )
            return {"llc": result.llc_per_chain.values.tolist()}

    return estimate


def let_canonical_be_imported() -> None:
    """It needs Python 3.12 for ``itertools.batched`` alone; older Pythons get a stand-in."""
    if not hasattr(itertools, "batched"):

        def batched(items: Iterable[object], size: int) -> Iterator[tuple[object, ...]]:
            rest = iter(items)
            while part := tuple(itertools.islice(rest, size)):
                yield part

        itertools.batched = batched  # type: ignore[attr-defined]


def with_canonical(*, compiled: bool = True, devices: int = 1) -> Estimate:
    """canonical-interp's estimate.

    Args:
        compiled: whether gradients are, too; its step always is. Without a C++ compiler nothing is.
        devices: among how many threads chains are divided, on a CPU; GPUs are all used.
    """
    if not has_compiler():
        import torch._dynamo

        torch._dynamo.config.disable = True
        compiled = False
    let_canonical_be_imported()
    from canonical_interp import LLCEstimator

    def loss_of_output(output: Any, ids: Tensor) -> Tensor:
        return next_token_loss(output.logits, ids)

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
        on_gpu = work.device != "cpu"
        places = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if on_gpu else ["cpu"] * devices
        places = places[: work.chains]
        estimator.estimate_llc(
            model,
            DataLoader(dataset_of(data), batch_size=work.batch, shuffle=False, pin_memory=on_gpu),
            criterion_fn=loss_of_output if isinstance(data, Tensor) else mse_loss,
            chain_batch=-(-work.chains // len(places)),
            devices=places,
            seed=work.seed,
            compile="reduce-overhead" if compiled else False,
            show_progress=False,
        )
        return {"llc": estimator.get_metrics()["llcs"].tolist()}

    return estimate


def with_loop() -> Estimate:
    """A plain loop over the chains as one writes it first: backward, and the update tensor by tensor."""

    def estimate(model: nn.Module, data: Data, work: Work) -> dict[str, Any]:
        tensors = (data,) if isinstance(data, Tensor) else data
        params = [p for p in model.parameters() if p.requires_grad]
        reference = [p.detach().clone() for p in params]
        generator = torch.Generator().manual_seed(work.seed)

        def loss_of(rows: list[Tensor]) -> Tensor:
            if isinstance(data, Tensor):
                return next_token_loss(model(rows[0], use_cache=False).logits, rows[0])
            return mse_loss(model(rows[0]), rows[1])

        def whole() -> float:
            parts = range(0, len(tensors[0]), work.batch)
            with torch.no_grad():
                losses = [loss_of([t[k : k + work.batch].to(work.device) for t in tensors]) for k in parts]
            return float(torch.stack(losses).mean())

        model.to(work.device)
        first, found = whole(), []
        for _ in range(work.chains):
            losses = []
            for step in range(work.burnin + work.draws):
                chosen = torch.randint(len(tensors[0]), (work.batch,), generator=generator)
                loss = loss_of([t[chosen].to(work.device) for t in tensors])
                loss.backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for p, start in zip(params, reference, strict=True):
                        if p.grad is not None:
                            drift = work.nbeta * p.grad + work.localization * (p - start)
                            p.add_(-0.5 * work.lr * drift + work.lr**0.5 * torch.randn_like(p))
                            p.grad = None
                if step >= work.burnin:
                    losses.append(loss.detach())
            with torch.no_grad():
                for p, start in zip(params, reference, strict=True):
                    p.copy_(start)
            found.append(work.nbeta * (float(torch.stack(losses).mean()) - first))
        return {"llc": found}

    return estimate


def dataset_of(data: Data) -> TensorDataset:
    """Of a language model each sequence is its own target."""
    return TensorDataset(data, data) if isinstance(data, Tensor) else TensorDataset(*data)


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")))


# ---- steps alone ---------------------------------------------------------------------------------------------


class _Given(torch.autograd.Function):
    """A number whose gradients are known: those of −nβ·L − γ/2·‖w − w*‖², given ∇L."""

    @staticmethod
    def forward(known: tuple[Sequence[Tensor], Sequence[Tensor], float, float], *params: Tensor) -> Tensor:
        return params[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.known = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, references, nbeta, gamma = ctx.known
        parts = zip(ctx.saved_tensors, grads, references, strict=True)
        return None, *((-nbeta * g).sub_(w - reference, alpha=gamma) for w, g, reference in parts)


def log_posterior(
    grads: Sequence[Tensor], references: Sequence[Tensor], options: Mapping[str, float]
) -> Callable[[dict[str, Tensor], Any], tuple[Tensor, Tensor]]:
    """What posteriors is to be given: −nβ·L − γ/2·‖w − w*‖², for which ∇L is known.

    posteriors computes gradients in its step. These cost it what it takes to write them down, and no more.
    """
    known = grads, references, options["nbeta"], options.get("localization", 0.0)

    def value(params: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        return _Given.apply(known, *params.values()), torch.empty(0)  # type: ignore[no-untyped-call]

    return value


def posteriors_step(posteriors: Any, sampler: str, params: Sequence[Tensor], **options: float) -> Callable[[], Any]:
    """posteriors' step in place, with gradients that are there.

    Args:
        posteriors: the package.
        sampler: "sgld", "sghmc" or "sgnht".
        params: with their gradients; where they are is w*.
        options: "lr", "nbeta" and "localization". posteriors' SGLD has ε for what is ε/2 here.
    """
    values = {str(k): p.detach().clone() for k, p in enumerate(params)}
    grads, references = [p.grad for p in params], [p.detach().clone() for p in params]
    lr = options["lr"] / 2 if sampler == "sgld" else options["lr"]
    transform = getattr(posteriors.sgmcmc, sampler).build(log_posterior(grads, references, options), lr=lr)  # type: ignore[arg-type]
    state = transform.init(values)
    return lambda: transform.update(state, None, inplace=True)


def canonical_step(canonical: Any, params: Sequence[Tensor], **options: float) -> Callable[[], Any]:
    """canonical-interp's compiled step, of one chain."""
    values = {str(k): p.detach().clone()[None] for k, p in enumerate(params)}
    grads = {str(k): p.grad[None] for k, p in enumerate(params) if p.grad is not None}
    reference = {str(k): p.detach().clone() for k, p in enumerate(params)}
    named = {"learning_rate": options["lr"], "nbeta": options["nbeta"], "localization": options["localization"]}
    return lambda: canonical.sgld_step(values, grads, reference, **named)
