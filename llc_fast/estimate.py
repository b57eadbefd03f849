"""The main job: estimate the local learning coefficient of a model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from llc_fast.calibration import default_lr
from llc_fast.chains import Schedule, run_chains
from llc_fast.data import make_source
from llc_fast.posterior import LossFunction, Posterior
from llc_fast.result import LLCResult
from llc_fast.samplers import check_number, make_sampler

DEFAULT_NUM_DRAWS = 2000
DEFAULT_LOCALIZATION = 1.0


def default_nbeta(n: int) -> float:
    """nβ = n / log n, Watanabe's inverse temperature (WBIC 2013) for a data set of n samples.

    `n` is the size of the data set, not of a minibatch.

    Raises:
        TypeError, ValueError: n is not an integer, or below 2.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an integer, got {n!r}")
    if n < 2:
        raise ValueError(f"n must be at least 2 (log n has to be positive), got {n}")
    return float(n / math.log(n))


def estimate_llc(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction,
    *,
    sampler: str | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    lr: float | None = None,
    nbeta: float | None = None,
    localization: float | None = None,
    num_chains: int = 4,
    num_draws: int | None = None,
    num_burnin: int | None = None,
    num_steps_bw_draws: int = 1,
    batch_size: int | None = None,
    params: Iterable[str] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> LLCResult:
    """Estimate the local learning coefficient λ of `model` at its present parameters w*.

    Chains sample p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²) from w*, and
    λ̂ = nβ·(mean L over draws − L(w*)), with L(w*) taken over the whole data set (Lau et al. 2023, arXiv
    2308.12108; Watanabe 2013). The model is left exactly as it was. It is evaluated in the mode it is in:
    call ``model.eval()`` first unless dropout or batch statistics are meant to be part of the loss.

    Args:
        model: the trained model, float32 or float64.
        data: a tuple of tensors (inputs…, target), a Dataset or a DataLoader of such pairs.
        loss_fn: ``loss_fn(output, target) -> scalar``, the mean over the batch.
        sampler: its name, see ``llc_fast.samplers.SAMPLERS``; None: ``"sgld"``.
        sampler_options: hyperparameters of that sampler alone, such as ``{"eps": 1e-3}`` for ``"rmsprop-sgld"``;
            metrics that adapt are frozen at the end of burn-in unless ``adapt_steps`` says otherwise.
        lr: step size ε; None: 0.2 / (nβ·h_max + γ), with h_max the largest curvature of the loss at w* in the
            sampler's metric.
        nbeta: nβ; None: n / log n with n the number of samples in `data`.
        localization: γ; None: 1.
        num_chains: independent chains.
        num_draws: draws in each chain; None: 2000.
        num_burnin: steps before the first draw; None: as many as there are draws.
        num_steps_bw_draws: steps from a draw to the next.
        batch_size: samples in a minibatch; None: min(512, n), or what the loader gives.
        params: names or glob patterns of the parameters to sample; None: all that require a gradient.
        seed: equal seeds give equal results on the same machine.
        device: where to compute; None: where the model's parameters are.
        progress: show a bar with λ̂ so far.

    Returns:
        An :class:`LLCResult`; what was chosen for the arguments left None is in its ``settings``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, before any sampling.
    """
    started = time.perf_counter()
    for name, value, least in (
        ("num_chains", num_chains, 1),
        ("num_draws", num_draws, 1),
        ("num_burnin", num_burnin, 0),
        ("num_steps_bw_draws", num_steps_bw_draws, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        _check_integer(name, value, least, optional=name in ("num_draws", "num_burnin", "batch_size"))
    # NumPy's integers are welcome, but neither torch nor JSON takes them everywhere.
    num_chains, num_steps_bw_draws, seed = int(num_chains), int(num_steps_bw_draws), int(seed)
    num_draws, num_burnin, batch_size = (None if v is None else int(v) for v in (num_draws, num_burnin, batch_size))
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")
    for name, number in (("lr", lr), ("nbeta", nbeta)):
        if number is not None:
            check_number(name, number, minimum=0, exclusive=True)
    localization = (
        DEFAULT_LOCALIZATION if localization is None else check_number("localization", localization, minimum=0)
    )
    num_draws = DEFAULT_NUM_DRAWS if num_draws is None else num_draws
    schedule = Schedule(num_draws, num_draws if num_burnin is None else num_burnin, num_steps_bw_draws)
    sampler = "sgld" if sampler is None else sampler
    options: dict[str, Any] = {"localization": localization, **(sampler_options or {})}
    # Names and values early, before any work: the step size and nβ may still be open.
    prepared = make_sampler(sampler, lr=lr or 1.0, nbeta=nbeta or 1.0, **options)
    if prepared.adaptive:
        options.setdefault("adapt_steps", max(1, schedule.num_burnin))

    where = check_device(device) if device is not None else _device_of(model)
    source = make_source(data, batch_size, where)
    if nbeta is None:
        if source.num_samples is None:
            raise ValueError("nbeta=None needs the number of samples, which this data does not tell: pass nbeta")
        nbeta = default_nbeta(source.num_samples)
    # Dropout and shuffling loaders draw from the global generator: from a state of its own that follows the seed.
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        posterior = Posterior(model, loss_fn, source, device=where, params=params)
        warnings = _model_warnings(model, posterior)
        init_loss = posterior.full_loss()
        if lr is None:
            settings = vars(prepared)
            lr = default_lr(posterior, type(prepared), settings, nbeta=nbeta, localization=localization, seed=seed)
    chosen_lr = float(lr)
    chain_sampler = make_sampler(sampler, lr=chosen_lr, nbeta=nbeta, **options)

    total = num_chains * schedule.num_steps
    with tqdm(total=total, disable=not progress, unit="step", desc="LLC", mininterval=0.2) as bar:
        means: dict[int, float] = {}

        def report(chain: int, step: int, losses: torch.Tensor) -> None:
            shown = bar.update(1)
            if step == schedule.num_steps or (shown and step > schedule.num_burnin):
                draws = losses[schedule.num_burnin : step]
                means[chain] = nbeta * (float(draws.mean()) - init_loss)
                bar.set_postfix_str(f"λ̂ ≈ {np.mean(list(means.values())):.4g}", refresh=False)

        trace = run_chains(posterior, chain_sampler, schedule, num_chains=num_chains, seed=seed, report=report)

    lost = int((~torch.isfinite(trace).all(dim=1)).sum())
    if lost:
        warnings.append(
            f"{lost} of {num_chains} chains became non-finite and were left out: the step size is too large, "
            f"try lr={chosen_lr / 10:.2g}"
        )
    return LLCResult(
        loss_trace=trace.numpy(),
        init_loss=init_loss,
        nbeta=float(nbeta),
        schedule=schedule,
        settings={
            "sampler": sampler,
            "lr": chosen_lr,
            **{k: v for k, v in options.items() if isinstance(v, (bool, int, float, str))},
            "num_chains": num_chains,
            "num_burnin": schedule.num_burnin,
            "num_draws": schedule.num_draws,
            "num_steps_bw_draws": num_steps_bw_draws,
            "batch_size": source.batch_size,
            "num_samples": source.num_samples,
            "num_parameters": posterior.num_parameters,
            "training_mode": model.training,
            "device": str(where),
            "seed": seed,
            "seconds": time.perf_counter() - started,
        },
        warnings=warnings,
        diagnostics={"chains_lost": lost},
    )


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a torch.device on which memory can be had; a ValueError that says why if not."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} can't be used: {error}") from None
    return where


def _check_integer(name: str, value: object, least: int, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the model's parameters lie on several devices ({names}): pass device to compute on one")
    return devices.pop() if devices else torch.device("cpu")


def _model_warnings(model: nn.Module, posterior: Posterior) -> list[str]:
    warnings = []
    random = [
        name
        for name, module in model.named_modules()
        if module.training and isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm))
    ]
    if random:
        warnings.append(
            "the model is in training mode and its loss depends on dropout or batch statistics "
            f"({_some(random)}): call model.eval() unless that is meant"
        )
    if posterior.unused:
        warnings.append(
            f"the loss did not use {len(posterior.unused)} of the parameters ({_some(posterior.unused)}): leave them "
            "out with params="
        )
    return warnings


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
