"""The main job: estimate the local learning coefficient of a model."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from llc_fast.calibration import (
    CORRECTED_STIFFNESS,
    DEFAULT_NUM_DRAWS,
    LEAST_FRICTION,
    LEAST_PILOT,
    PILOT_SHARE,
    STIFFNESS,
    default_lr,
    run_pilot,
)
from llc_fast.chains.checkpoint import INTERVAL, Checkpoint, Saved, data_identity, model_identity
from llc_fast.chains.draw import Observable
from llc_fast.chains.metropolis import FIGURES
from llc_fast.chains.processes import Team, default_device, join
from llc_fast.chains.run import Monitor, run_chains
from llc_fast.chains.step_checks import COLUMNS
from llc_fast.checks import advise, diagnose
from llc_fast.data import DataSource, LoaderSource, make_source
from llc_fast.gradients.memory import check_memory
from llc_fast.gradients.plan import LARGE_MODEL, Plan, make_plan
from llc_fast.kernels.native import is_low_precision
from llc_fast.objective.control_variate import AnchorLosses, losses_at_anchor
from llc_fast.objective.objective import LossFunction, Objective, takes_model
from llc_fast.result import LLCResult
from llc_fast.samplers import SAMPLERS, MetropolisSampler, Sampler, make_sampler
from llc_fast.schedule import Schedule
from llc_fast.support.arguments import check_number
from llc_fast.support.fingerprint import arrays_identity, option_identity
from llc_fast.support.runtime import large_blocks_apart, stopped_by_sigint, threads
from llc_fast.traces import ChainRecord

Progress = Callable[[int, int, float], None]
"""Told the steps done, the steps in all and λ̂ so far."""
DEFAULT_LOCALIZATION = 1.0
_SMALL = 2e7
"""Parameters × batch size below which the first look at a model uses one thread; what it counts decides from there."""


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
    loss_fn: LossFunction | None,
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
    microbatch_size: int | None = None,
    params: Any = None,
    heat_correction: bool | None = None,
    observables: Mapping[str, Observable] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    strategy: str | None = None,
    release_gradients: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = INTERVAL,
    distributed: bool | None = None,
    warm_start: LLCResult | None = None,
    keep_ends: bool = False,
    progress: bool | Progress = True,
) -> LLCResult:
    """Estimate the local learning coefficient λ of `model` at its present parameters w*.

    Chains sample p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²) from w*, and
    λ̂ = nβ·(mean L over draws − L(w*)), with L(w*) taken over the whole data set (Lau et al. 2023, arXiv
    2308.12108; Watanabe 2013). The model is left exactly as it was. It is evaluated in the mode it is in:
    call ``model.eval()`` first unless dropout or batch statistics are meant to be part of the loss.

    A minibatch is judged by what it loses more than at w*: L_B(w_t) − L_B(w*) + L(w*) takes the place of L_B(w_t), with
    the same expectation and less noise, wherever a minibatch's loss is the mean of its samples' losses
    (``settings["paired_baseline"]``; if not, ``diagnostics["unpaired_reason"]`` says why). What observables see as
    ``draw.loss`` is L_B(w_t) itself.

    Ctrl-C ends the run after the present step and returns what there is, marked as partial; a second one raises.

    Args:
        model: the trained model, float32 or float64, or bfloat16 or float16 with chains in float32.
        data: tensors with samples along the first dimension, as a tuple (inputs…, target) or a dictionary; a Dataset;
            or a DataLoader of such batches.
        loss_fn: ``loss_fn(output, target)``; or ``loss_fn(model, batch)``, told by its first parameter being called
            `model`; or None for models that return their own loss, ``model(**batch).loss``. It gives the mean over the
            batch, or one loss for each sample, ``[batch]``, of which the mean is taken.
        sampler: its name, see ``llc_fast.samplers.SAMPLERS``; None: ``"sgld"``, or ``"sghmc"``, the same with
            momentum, if `lr` is None too and the pilot chains find room for it. ``"mala"`` and ``"hmc"`` are
            Metropolis-adjusted: exact at any step size, for small problems, as each draw takes one gradient, or ten,
            over all data. They record "acceptance" and "lr" in ``result.observables``.
        sampler_options: hyperparameters of that sampler alone, such as ``{"eps": 1e-3}`` for ``"rmsprop-sgld"``;
            metrics that adapt are frozen at the end of burn-in unless ``adapt_steps`` says otherwise.
        lr: step size ε; None: chosen by pilot chains, see :func:`calibrate`. Adjusted samplers start from
            0.2 / (nβ·h_max + γ) and adapt it in burn-in, each chain for itself, to an acceptance of 0.574 (MALA) or
            0.8 (HMC).
        nbeta: nβ; None: n / log n with n the number of samples in `data`.
        localization: γ; None: 1.
        num_chains: independent chains.
        num_draws: draws in each chain; None: 2000, or up to 5000 if the pilot chains show that more are needed.
        num_burnin: steps before the first draw; None: as many as there are draws.
        num_steps_bw_draws: steps from a draw to the next.
        batch_size: samples in a minibatch; None: min(512, n), or what the loader gives. Adjusted samplers take all n.
        microbatch_size: samples that pass the model at a time, for minibatches that do not fit the memory: gradients
            of the pieces are added up. None: the whole minibatch.
        params: the parameters to sample: a name, glob pattern, module or parameter, several of these, or a mapping from
            these to boolean masks (weight-refined LLC); None: all that require a gradient. The others stay at w*.
        heat_correction: whether ``result.loss_trace`` is cleared of heat, what step size and gradient noise add to the
            loss, measured at every step (:meth:`llc_fast.samplers.Sampler.bias`). None: if `lr` is None, since the
            step size is then chosen for it; with a step size of your own you get the plain average. Minibatches of
            data addressed by index are then independent from step to step, as the correction assumes; otherwise, and
            from a loader, they come without replacement within an epoch.
        observables: functions of a :class:`llc_fast.Draw` by name; what they return at every draw is recorded in
            ``result.observables``.
        seed: equal seeds give equal results on the same machine.
        device: where to compute; None: where the model's parameters are.
        autocast: dtype of forward passes under ``torch.autocast``, such as ``torch.bfloat16``; None: no autocast.
        strategy: how gradients are computed: ``"sequential"``, ``"batched"``, ``"compiled"`` (torch.compile) or
            ``"cuda-graph"``; None: chosen by what a trial gradient was measured to need. The draws are the same to
            rounding.
        release_gradients: consume and free each gradient during the backward pass: the same bits, and no memory for
            all gradients at once. None: above ten million parameters.
        checkpoint: file that the state is written to at intervals. The same call resumes from it and ends with the
            same bits as if it had never stopped; once done, it returns the result at once.
        checkpoint_interval: seconds between writes.
        distributed: spread the chains over processes. None: over those of ``torchrun`` or of an initialized
            torch.distributed, if there are several; False: never. Any number of processes gives the same chains, and
            each gets the whole result.
        warm_start: an earlier result with as many chains, made with ``keep_ends=True``: each chain starts where that of
            the earlier result ended, moved by as much as w* has moved since. None: at w*.
        keep_ends: keep where the chains end in ``result.ends``, as much memory as all chains' parameters.
        progress: show a bar with λ̂ so far; or a function that is called a few times a second with the steps done, the
            steps in all and λ̂ so far (NaN before the first draw).

    Returns:
        An :class:`LLCResult`; what was chosen for the arguments left None is in its ``settings``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, before any sampling; a checkpoint that
            is damaged or belongs to another run.
        PermissionError: the checkpoint's folder can't be written to.
        MemoryError: the run can't fit the memory; says what it needs and what would make it fit.
        llc_fast.distributed.ProcessFailedError: another process of a distributed run failed or died.
    """
    started = time.perf_counter()
    request = _checked_request(
        sampler=sampler,
        sampler_options=sampler_options,
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin=num_burnin,
        num_steps_bw_draws=num_steps_bw_draws,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        observables=observables,
        autocast=autocast,
        strategy=strategy,
        heat_correction=heat_correction,
        seed=seed,
    )
    check_number("checkpoint_interval", checkpoint_interval, minimum=0)
    where = default_device(check_device(device)) if device is not None else _device_of(model)
    team = join(distributed)
    # Dropout and shuffling loaders draw from the global generator: from a state of its own that follows the seed.
    generators = torch.random.fork_rng(devices=[where] if where.type == "cuda" else [])
    is_large = where.type == "cpu" and _num_elements(model) > LARGE_MODEL
    with team.working(), generators, large_blocks_apart(is_large):
        keeper = None
        if checkpoint is not None:
            keeper = Checkpoint(checkpoint, rank=team.rank if team.size > 1 else None, interval=checkpoint_interval)
        posterior = _posterior(request, model, data, loss_fn, where, params)
        source = posterior.source
        start = None if warm_start is None else _ends_of(warm_start, posterior, request.num_chains)
        plan = make_plan(
            posterior,
            request.sampler_with(1.0, 1.0),
            -(-request.num_chains // team.size),  # the largest share: the same plan in all processes
            strategy=strategy,
            release_gradients=release_gradients,
            has_observables=bool(request.observables),
        )
        check_memory(posterior, request.sampler_with(1.0, 1.0), plan)
        identity, saved = {}, None
        if keeper is not None:
            identity = {**request.identity(), **model_identity(posterior), **data_identity(source)}
            identity |= {"keep_ends": keep_ends, "warm_start": None if start is None else arrays_identity(start)}
            saved = keeper.load(identity)
        with threads(plan.num_threads):
            at_anchor = losses_at_anchor(posterior, request.nbeta_for(source), request.seed)
            pilot_bar = _PilotBar(progress is True and team.rank == 0)
            chosen = _choose(request, posterior, at_anchor, plan, keeper, saved, pilot_bar, start)
        # One process's numbers for all: another number of threads may round differently.
        chosen = team.gather(chosen)[0]
        request = request.with_schedule(chosen).with_friction(chosen.get("friction", 1.0))
        baseline = None if chosen["unpaired"] else at_anchor.baseline(source, chosen["init_loss"])
        setup = time.perf_counter() - started
        # Ctrl-C reaches all processes, those that wait for others too: these must not leave without the results.
        bar = _Observer(request.schedule, team, request.num_chains, chosen, keeper, identity, progress)
        with bar as observer, stopped_by_sigint() as stop:
            run = run_chains(
                posterior,
                request.sampler_with(chosen["lr"], chosen["nbeta"]),
                request.schedule,
                chains=team.share(request.num_chains),
                seed=request.seed,
                plan=plan,
                observables=request.observables,
                resumed=saved.records if saved is not None else (),
                baseline=baseline,
                start=start,
                keep_ends=keep_ends,
                monitor=observer,
                stop=stop,
            )
            # The state of chains under way, as large as the model, stays in the checkpoint of their own process.
            runs = team.gather(([dataclasses.replace(r, arrays=None) for r in run.records], run.interrupted))
            records = [record for found, _ in runs for record in found]
            interrupted = any(stopped for _, stopped in runs)
            if keeper is not None and team.rank == 0 and not interrupted:
                keeper.merge(Saved(identity, chosen, records))
            problems = team.gather("" if keeper is None else keeper.problem)
            problem = next(filter(None, problems if interrupted else problems[:1]), "")
    result = _result(request, posterior, chosen, records, interrupted)
    result.settings.update(
        training_mode=model.training, strategy=run.plan.strategy, seconds=time.perf_counter() - started
    )
    result.diagnostics.update(
        chains_lost=len(result.lost_chains),
        strategy_reason=run.plan.reason + (f"; not recorded: {run.note}" if run.note else ""),
        unpaired_reason=chosen["unpaired"],
        chains_per_group=run.plan.group_size,
        workers=run.plan.num_workers,
        seconds_of_setup=setup,
        **{k: chosen[k] for k in ("pilot_steps", "pilot_heat") if k in chosen},
        resumed_steps=0 if saved is None else sum(r.step * len(r.losses) for r in saved.records),
    )
    result.warnings.extend(_model_warnings(model, posterior))
    result.warnings.extend(_run_warnings(result, keeper is not None, problem, source))
    result.diagnostics.update(
        diagnose(
            result,
            _joined_probes(records),
            anchor_norm=_norm(posterior),
            init_loss_stderr=chosen.get("init_loss_error", 0.0),
        )
    )
    if isinstance(used := request.sampler_with(chosen["lr"], chosen["nbeta"]), MetropolisSampler):
        _tell_acceptance(result, used)
    result.warnings.extend(advise(result))
    return result


class Calibration(dict[str, Any]):
    """Settings that :func:`estimate_llc` accepts, ``estimate_llc(model, data, loss_fn, **calibration)``.

    Attributes:
        reason: what was chosen and why, for people.
    """

    reason: str = ""


def calibrate(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | None,
    *,
    sampler: str | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    nbeta: float | None = None,
    localization: float | None = None,
    num_chains: int = 4,
    num_draws: int | None = None,
    num_burnin: int | None = None,
    num_steps_bw_draws: int = 1,
    batch_size: int | None = None,
    microbatch_size: int | None = None,
    params: Any = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    strategy: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Choose what :func:`estimate_llc` needs and was not given, as it does itself when ``lr`` is None.

    The step size ε begins at 1 / (nβ·h_max + γ), with h_max the largest curvature of the loss at w* in the sampler's
    metric, and pilot chains of growing length lower it until heat (:meth:`llc_fast.samplers.Sampler.bias`) is no more
    than a tenth of nβ·(L − L(w*)); for samplers that do not tell their heat it is 0.2 / (nβ·h_max + γ), with no pilot.
    Without `num_draws` and `num_burnin` both are 2000, or up to 5000 if the pilot needs more for a standard error of
    1 % or is still rising at its end. All of it takes 13 % of the gradients of the run. Equal seeds choose equally.

    Args:
        model, data, loss_fn, …: as for :func:`estimate_llc`; what is given is kept.

    Returns:
        A dictionary of settings, to be passed on as they are or changed; its ``reason`` says why.

    Raises:
        TypeError, ValueError: as :func:`estimate_llc`.
    """
    request = _checked_request(
        sampler=sampler,
        sampler_options=sampler_options,
        lr=None,
        nbeta=nbeta,
        localization=localization,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin=num_burnin,
        num_steps_bw_draws=num_steps_bw_draws,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        observables=None,
        autocast=autocast,
        strategy=strategy,
        heat_correction=None,
        seed=seed,
    )
    where = default_device(check_device(device)) if device is not None else _device_of(model)
    generators = torch.random.fork_rng(devices=[where] if where.type == "cuda" else [])
    with generators, large_blocks_apart(where.type == "cpu" and _num_elements(model) > LARGE_MODEL):
        posterior = _posterior(request, model, data, loss_fn, where, params)
        # The plan of the run: another number of threads may round differently.
        plan = make_plan(posterior, request.sampler_with(1.0, 1.0), request.num_chains, strategy=strategy)
        check_memory(posterior, request.sampler_with(1.0, 1.0), plan)
        with threads(plan.num_threads):
            at_anchor = losses_at_anchor(posterior, request.nbeta_for(posterior.source), request.seed)
            chosen = _choose(request, posterior, at_anchor, plan, None, None, _PilotBar(progress), None)
    request = request.with_schedule(chosen).with_friction(chosen.get("friction", 1.0))
    is_loader = isinstance(posterior.source, LoaderSource)
    found = Calibration(
        sampler=request.sampler,
        lr=chosen["lr"],
        nbeta=chosen["nbeta"],
        localization=request.localization,
        num_chains=request.num_chains,
        num_draws=request.schedule.num_draws,
        num_burnin=request.schedule.num_burnin,
        num_steps_bw_draws=request.schedule.num_steps_bw_draws,
        # A loader decides for itself, and adjusted samplers take everything.
        batch_size=request.batch_size if is_loader or request.is_adjusted else posterior.source.batch_size,
        heat_correction=chosen["heat_correction"],
    )
    # With an lr that is given, adjusted samplers would not adapt it.
    kept = ("momentum_decay", "adapt_steps") if request.is_adjusted else ("momentum_decay",)
    extra = {k: request.options[k] for k in kept if k in request.options}
    if sampler_options or extra:
        found["sampler_options"] = {**(sampler_options or {}), **extra}
    found.reason = _why(chosen, request)
    return found


def _why(chosen: Mapping[str, Any], request: _Request) -> str:
    """What calibration chose, and why."""
    lr, schedule = f"lr={chosen['lr']:.3g}", request.schedule
    length = f"{schedule.num_burnin} steps of burn-in and {schedule.num_draws} draws"
    if "pilot_heat" not in chosen:
        return f"{lr}: {STIFFNESS} / (nβ·h_max + γ), since {request.sampler} does not tell its heat; {length}"
    return (
        f"{lr}: pilot chains of {chosen['pilot_steps']} steps ended with heat at {chosen['pilot_heat']:.1%} of "
        f"nβ·(L − L(w*)), which is subtracted; {length}"
    )


def _posterior(
    request: _Request, model: nn.Module, data: Any, loss_fn: LossFunction | None, where: torch.device, params: Any
) -> Objective:
    """Model, loss and data on their device, looked at once; seeds torch's generator."""
    source = make_source(
        data,
        request.batch_size,
        where,
        pairs=not takes_model(loss_fn),
        num_wanted=request.num_chains * request.schedule.num_steps * (request.batch_size or 512),
        max_batches=request.schedule.num_steps,
        independent=request.heat_correction,
        whole=request.is_adjusted,
    )
    if request.nbeta is None and source.num_samples is None:
        raise ValueError("nbeta=None needs the number of samples, which this data does not tell: pass nbeta")
    torch.manual_seed(request.seed)
    with threads(1 if _num_elements(model) * (source.batch_size or 1) < _SMALL else None):
        posterior = Objective(
            model,
            loss_fn,
            source,
            device=where,
            params=params,
            autocast=request.autocast,
            microbatch_size=request.microbatch_size,
        )
    if request.is_adjusted:
        _check_adjustable(request, posterior)
    return posterior


# ---- what was asked for ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Request:
    """What was asked for, checked; lr and nβ may still be open, and the schedule if `is_open`."""

    sampler: str
    is_default: bool
    options: dict[str, Any]
    lr: float | None
    nbeta: float | None
    localization: float
    schedule: Schedule
    is_open: bool
    heat_correction: bool
    num_chains: int
    batch_size: int | None
    microbatch_size: int | None
    observables: dict[str, Observable]
    autocast: torch.dtype | None
    strategy: str | None
    seed: int

    def sampler_with(self, lr: float, nbeta: float) -> Sampler:
        return make_sampler(self.sampler, lr=lr, nbeta=nbeta, **self.options)

    def with_schedule(self, chosen: Mapping[str, Any]) -> _Request:
        """With the number of draws that was chosen, if it was open."""
        draws = chosen.get("num_draws")
        if draws is None:
            return self
        options = self.options | ({"adapt_steps": draws} if "adapt_steps" in self.options else {})
        schedule = Schedule(draws, draws, self.schedule.num_steps_bw_draws)
        return dataclasses.replace(self, schedule=schedule, options=options)

    def with_friction(self, friction: float) -> _Request:
        """With SGHMC of this friction, if it is not 1, which is SGLD."""
        variant = SAMPLERS[self.sampler].momentum_variant
        if friction == 1 or variant is None:
            return self
        return dataclasses.replace(self, sampler=variant, options=self.options | {"momentum_decay": friction})

    def nbeta_for(self, source: DataSource) -> float:
        return default_nbeta(source.num_samples or 0) if self.nbeta is None else self.nbeta

    @property
    def is_adjusted(self) -> bool:
        return SAMPLERS[self.sampler].kind == "metropolis"

    @property
    def plain_options(self) -> dict[str, Any]:
        """Those that can be written down."""
        return {k: v for k, v in self.options.items() if isinstance(v, (bool, int, float, str))}

    def identity(self) -> dict[str, Any]:
        """What names a run, apart from model and data."""
        return {
            "sampler": self.sampler,
            **{name: option_identity(value) for name, value in self.options.items()},
            "lr": self.lr,
            "nbeta": self.nbeta,
            "heat_correction": self.heat_correction,
            "schedule": vars(self.schedule),
            "num_chains": self.num_chains,
            "microbatch_size": self.microbatch_size,
            "autocast": None if self.autocast is None else str(self.autocast),
            "observables": sorted(self.observables),
            "strategy": self.strategy,
            "seed": self.seed,
        }


def _checked_request(
    *,
    sampler: str | None,
    sampler_options: Mapping[str, Any] | None,
    lr: float | None,
    nbeta: float | None,
    localization: float | None,
    autocast: torch.dtype | None,
    observables: Mapping[str, Observable] | None,
    strategy: str | None,
    heat_correction: bool | None,
    **counts: Any,
) -> _Request:
    """Names and values, before any work."""
    for name, value in counts.items():
        optional = name in ("num_draws", "num_burnin", "batch_size", "microbatch_size")
        _check_integer(name, value, 0 if name in ("num_burnin", "seed") else 1, optional=optional)
        # NumPy's integers are welcome, but neither torch nor JSON takes them everywhere.
        counts[name] = None if value is None else int(value)
    if counts["seed"] >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {counts['seed']}")
    for name, number in (("lr", lr), ("nbeta", nbeta)):
        if number is not None:
            check_number(name, number, minimum=0, exclusive=True)
    gamma = DEFAULT_LOCALIZATION if localization is None else check_number("localization", localization, minimum=0)
    if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
        raise TypeError(f"autocast must be a floating-point dtype such as torch.bfloat16, got {autocast!r}")
    draws = DEFAULT_NUM_DRAWS if counts["num_draws"] is None else counts["num_draws"]
    burnin = draws if counts["num_burnin"] is None else counts["num_burnin"]
    options: dict[str, Any] = {"localization": gamma, **(sampler_options or {})}
    name = "sgld" if sampler is None else sampler
    wanted = make_sampler(name, lr=lr or 1.0, nbeta=nbeta or 1.0, **options)
    is_open = counts["num_draws"] is None and counts["num_burnin"] is None
    if wanted.metric == "adaptive":
        is_open = is_open and "adapt_steps" not in options
        options.setdefault("adapt_steps", max(1, burnin))
    possible = wanted.supports_bias_correction and wanted.noise_level == 1 and wanted.bounding_box_size is None
    if heat_correction and not possible:
        raise ValueError(
            f"heat_correction=True is not possible with sampler={name!r}"
            + (", noise_level or bounding_box_size: the chain has to be free" if "bias" in wanted.traces else "")
        )
    if wanted.kind == "metropolis":
        options.setdefault("adapt_steps", burnin if lr is None else 0)
        if reserved := sorted(set(FIGURES) & set(observables or ())):
            raise ValueError(
                f"observables={reserved[0]!r} is what sampler={name!r} records itself: call yours otherwise"
            )
    return _Request(
        sampler=name,
        is_default=sampler is None and not sampler_options,
        options=options,
        lr=None if lr is None else float(lr),
        nbeta=None if nbeta is None else float(nbeta),
        localization=gamma,
        schedule=Schedule(draws, burnin, counts["num_steps_bw_draws"]),
        is_open=is_open,
        heat_correction=(lr is None and possible) if heat_correction is None else bool(heat_correction),
        num_chains=counts["num_chains"],
        batch_size=counts["batch_size"],
        microbatch_size=counts["microbatch_size"],
        observables=_check_observables(observables),
        autocast=autocast,
        strategy=strategy,
        seed=counts["seed"],
    )


def _check_adjustable(request: _Request, posterior: Objective) -> None:
    """Whether the loss is a function of the parameters that differences of order 1/nβ can be told from."""
    if posterior.is_random or posterior.writes_buffers:
        why = "draws random numbers (dropout?)" if posterior.is_random else "changes buffers (batch or spectral norm?)"
        raise ValueError(
            f"sampler={request.sampler!r} needs a loss that is a function of the parameters alone, and this one {why}: "
            "call model.eval(), or use an unadjusted sampler such as 'sgld'"
        )
    low = next((name for name, p in posterior.anchor.items() if is_low_precision(p)), None)
    if low is not None or request.autocast is not None:
        what = f"autocast={request.autocast}" if low is None else f"parameter {low!r} in {posterior.anchor[low].dtype}"
        raise ValueError(
            f"sampler={request.sampler!r} compares losses times nβ, for which {what} is too coarse: use float32 or "
            "float64, or an unadjusted sampler such as 'sgld'"
        )


def _choose(
    request: _Request,
    posterior: Objective,
    at_anchor: AnchorLosses,
    plan: Plan,
    keeper: Checkpoint | None,
    saved: Saved | None,
    monitor: Monitor,
    start: dict[str, NDArray[Any]] | None,
) -> dict[str, Any]:
    """L(w*), and the settings left open: measured, or those of the run that is resumed."""
    init_loss = at_anchor.mean
    if saved is not None and keeper is not None:
        before = float(saved.chosen["init_loss"])
        if abs(before - init_loss) > 1e-5 * abs(init_loss):
            raise ValueError(
                f"checkpoint={str(keeper.path)!r} belongs to another run: the loss at w* was {before:.6g}, is "
                f"{init_loss:.6g}. Other data or another loss_fn?"
            )
        return saved.chosen
    nbeta = request.nbeta_for(posterior.source)
    chosen: dict[str, Any] = {
        "init_loss": init_loss,
        "init_loss_error": at_anchor.error,
        "nbeta": nbeta,
        "heat_correction": request.heat_correction,
        "unpaired": at_anchor.unpaired,
    }
    if request.lr is not None:
        return chosen | {"lr": request.lr}
    prepared = request.sampler_with(1.0, nbeta)
    pilot_steps = int(PILOT_SHARE * request.num_chains * request.schedule.num_steps)
    corrected = request.heat_correction and pilot_steps >= LEAST_PILOT
    chosen["lr"] = default_lr(
        posterior,
        type(prepared),
        vars(prepared),
        nbeta=nbeta,
        localization=request.localization,
        stiffness=CORRECTED_STIFFNESS if corrected else STIFFNESS,
        seed=request.seed,
    )
    if corrected:
        may_change = request.is_default and not plan.release
        pilot = run_pilot(
            posterior,
            lambda lr, friction: request.with_friction(friction).sampler_with(lr, nbeta),
            make_plan(posterior, prepared, 1, strategy=request.strategy, release_gradients=plan.release or None),
            lr=chosen["lr"],
            least_friction=LEAST_FRICTION if may_change else 1.0,
            nbeta=nbeta,
            init_loss=init_loss,
            baseline=None if at_anchor.unpaired else at_anchor.baseline(posterior.source, init_loss),
            num_chains=request.num_chains,
            num_steps=pilot_steps,
            seed=request.seed,
            start=start,
            monitor=monitor,
        )
        chosen |= {"lr": pilot.lr, "friction": pilot.friction, "pilot_steps": pilot.num_steps, "pilot_heat": pilot.heat}
        if request.is_open:
            chosen["num_draws"] = pilot.num_draws
    return chosen


def _result(
    request: _Request,
    posterior: Objective,
    chosen: Mapping[str, Any],
    records: list[ChainRecord],
    interrupted: bool,
) -> LLCResult:
    losses, heats = np.concatenate([r.losses for r in records]), np.concatenate([r.heats for r in records])
    if chosen["heat_correction"]:
        with np.errstate(invalid="ignore"):  # of a lost chain
            losses = losses - heats / chosen["nbeta"]
    losses[(~np.isfinite(losses)).cumsum(axis=1) > 0] = np.nan
    schedule = request.schedule
    names = {name: None for r in records for name in r.observables}
    return LLCResult(
        loss_trace=losses,
        init_loss=chosen["init_loss"],
        nbeta=chosen["nbeta"],
        schedule=schedule,
        settings={
            "sampler": request.sampler,
            "lr": chosen["lr"],
            "heat_correction": chosen["heat_correction"],
            **request.plain_options,
            "num_chains": request.num_chains,
            "num_burnin": schedule.num_burnin,
            "num_draws": schedule.num_draws,
            "num_steps_bw_draws": schedule.num_steps_bw_draws,
            "batch_size": posterior.source.batch_size,
            "num_samples": posterior.source.num_samples,
            "num_parameters": posterior.num_parameters,
            "paired_baseline": not chosen["unpaired"],
            "device": str(posterior.device),
            "seed": request.seed,
        },
        heat_trace=heats,
        ends=_joined_ends(records),
        observables={name: _joined(name, records, schedule.num_draws) for name in names},
        steps_done=[r.step for r in records for _ in r.chains] if interrupted else None,
    )


_LOW_ACCEPTANCE, _OFF_TARGET = 0.2, 0.15


def _tell_acceptance(result: LLCResult, sampler: MetropolisSampler) -> None:
    """Acceptance, step sizes and cost of the draws made, and what they are worth."""
    result.diagnostics["gradients_per_draw"] = sampler.trajectory()[0] * result.schedule.num_steps_bw_draws
    traces = [result.observables.get(name, np.empty((0, 0))) for name in FIGURES]
    known = [[trace[np.isfinite(trace)] for trace in rows] for rows in traces]
    if not any(map(len, known[0])):  # no draw yet
        return
    per_chain = [float(values.mean()) if len(values) else math.nan for values in known[0]]
    steps = [float(values[-1]) if len(values) else math.nan for values in known[1]]
    mean, lr = float(np.nanmean(per_chain)), math.exp(float(np.nanmean(np.log(steps))))
    result.diagnostics.update(acceptance=mean, acceptance_per_chain=per_chain, lr_per_chain=steps)
    if sampler.adapt_steps:
        result.settings["lr"] = lr
    lowest = float(np.nanmin(per_chain))
    if lowest < _LOW_ACCEPTANCE:
        result.warnings.append(
            f"acceptance is {lowest:.1%} in the chain where it is lowest: it hardly moves, and the error bar can't see "
            f"where it was not; use a smaller step, such as lr={lr / 4:.2g}, or lr=None with a longer burn-in"
        )
    elif sampler.adapt_steps and abs(mean - sampler.target_acceptance) > _OFF_TARGET:
        result.warnings.append(
            f"the step size was adapted to an acceptance of {sampler.target_acceptance:g}, and the draws have "
            f"{mean:.3g}: burn-in was too short to find it, or ended before equilibrium; raise num_burnin, or pass lr"
        )


# ---- on the way --------------------------------------------------------------------------------------------


class _Observer(Monitor):
    """The progress bar and the checkpoint of a run."""

    def __init__(
        self,
        schedule: Schedule,
        team: Team,
        num_chains: int,
        chosen: Mapping[str, Any],
        keeper: Checkpoint | None,
        identity: Mapping[str, Any],
        progress: bool | Progress,
    ) -> None:
        self._tell = progress if callable(progress) else None
        self._schedule, self._chosen, self._keeper, self._identity = schedule, chosen, keeper, identity
        self._total = len(team.share(num_chains)) * schedule.num_steps
        self._bar = tqdm(
            total=self._total,
            disable=progress is not True or team.rank != 0,
            unit="step",
            desc="LLC" if team.size == 1 else f"LLC (1 of {team.size} processes)",
            mininterval=0.2,
        )

    def __enter__(self) -> _Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, records: Callable[[], list[ChainRecord]], steps: int) -> None:
        if self._bar.disable and self._tell is None:
            return
        done = [(r, slice(self._schedule.num_burnin, r.step)) for r in records()]
        values = [r.losses[:, draws].mean() for r, draws in done if r.step > draws.start]
        if self._chosen["heat_correction"]:
            heats = [r.heats[:, draws].mean() for r, draws in done if r.step > draws.start]
            values = [value - heat / self._chosen["nbeta"] for value, heat in zip(values, heats, strict=True)]
        mean = float(np.mean(values)) if values else math.nan
        estimate = self._chosen["nbeta"] * (mean - self._chosen["init_loss"])
        if self._tell is not None:
            self._tell(steps, self._total, estimate)
            return
        self._bar.update(steps - self._bar.n)
        if values:
            self._bar.set_postfix_str(f"λ̂ ≈ {estimate:.4g}", refresh=False)

    def wants_snapshot(self) -> bool:
        return self._keeper is not None and self._keeper.is_due

    def snapshot(self, records: list[ChainRecord]) -> None:
        self.report(lambda: records, sum(r.step * len(r.losses) for r in records))
        if self._keeper is not None:
            self._keeper.save(Saved(dict(self._identity), dict(self._chosen), records))


class _PilotBar(Monitor):
    """The progress bar of the pilot chains; it leaves when they are done."""

    def __init__(self, progress: bool) -> None:
        self._progress = progress
        self._bar: Any = None

    def report(self, records: Callable[[], list[ChainRecord]], steps: int) -> None:
        if self._progress and self._bar is None:
            self._bar = tqdm(unit="step", desc="calibration", leave=False, mininterval=0.2)
        if self._bar is not None:
            self._bar.update(max(steps - self._bar.n, 0))

    def snapshot(self, records: list[ChainRecord]) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _joined(name: str, records: list[ChainRecord], num_draws: int) -> NDArray[np.float64]:
    """An observable of all chains; NaN where a group has made no draw yet."""
    shape = next(r.observables[name].shape[2:] for r in records if name in r.observables)
    empty = [np.full((len(r.losses), num_draws, *shape), np.nan) for r in records]
    return np.concatenate([r.observables.get(name, e) for r, e in zip(records, empty, strict=True)])


def _joined_ends(records: list[ChainRecord]) -> dict[str, NDArray[Any]] | None:
    """Where all chains ended, if they did and it was asked."""
    found = [r.ends for r in records if r.ends is not None]
    if not found or len(found) < len(records):
        return None
    return {name: np.concatenate([ends[name] for ends in found]) for name in found[0]}


def _joined_probes(records: list[ChainRecord]) -> NDArray[np.float64]:
    """The probes of all chains; NaN where a group has none."""
    shape = next((r.probes.shape[1:] for r in records if r.probes is not None), (0, len(COLUMNS)))
    empty = [np.full((len(r.losses), *shape), np.nan) for r in records]
    return np.concatenate([e if r.probes is None else r.probes for r, e in zip(records, empty, strict=True)])


def _ends_of(warm_start: LLCResult, posterior: Objective, num_chains: int) -> dict[str, NDArray[Any]]:
    """Where the chains of an earlier result ended, checked to fit."""
    if not isinstance(warm_start, LLCResult):
        raise TypeError(f"warm_start must be the result of an earlier estimate, got {type(warm_start).__name__}")
    if warm_start.ends is None:
        raise ValueError("warm_start does not know where its chains ended: make it with keep_ends=True")
    shapes = {name: (num_chains, *w.shape) for name, w in posterior.anchor.items()}
    given = {name: a.shape for name, a in warm_start.ends.items()}
    if shapes != given:
        name = next(n for n in {**shapes, **given} if shapes.get(n) != given.get(n))
        raise ValueError(
            f"warm_start is of other chains or parameters: {name!r} is {given.get(name)} there and {shapes.get(name)} "
            "here, [chain, …]; pass the same num_chains and params as to the earlier estimate"
        )
    return warm_start.ends


def _norm(posterior: Objective) -> float:
    """‖w*‖ over the elements that are sampled."""
    moving = ((w[posterior.masks[name]] if name in posterior.masks else w) for name, w in posterior.anchor.items())
    return math.hypot(*(float(torch.linalg.vector_norm(w)) for w in moving))


def _check_observables(observables: Mapping[str, Observable] | None) -> dict[str, Observable]:
    if observables is None:
        return {}
    if not isinstance(observables, Mapping):
        raise TypeError(f"observables must be a mapping from names to functions, got {type(observables).__name__}")
    for name, function in observables.items():
        if not isinstance(name, str) or not callable(function):
            raise TypeError(f"observables must map names to functions of a draw, got {name!r}: {function!r:.60}")
    return dict(observables)


def _run_warnings(result: LLCResult, resumable: bool, problem: str, source: DataSource) -> list[str]:
    """What happened on the way."""
    warnings = []
    lost, lr = len(result.lost_chains), result.settings["lr"]
    if lost:
        few = "too few are left for an estimate; " if not len(result._good) else ""
        warnings.append(
            f"{lost} of {len(result.loss_trace)} chains became non-finite and were left out: {few}the step size is "
            f"too large, try lr={lr / 10:.2g}"
        )
    if result.is_partial:
        warnings.append(
            f"the run was interrupted after {sum(result.steps_done or [])} of {result.loss_trace.size} steps: "
            + ("λ̂ comes from the draws so far" if len(result._good) else "there is no draw yet")
            + ("; the same call resumes it" if resumable else "")
        )
    if problem:
        warnings.append(f"the checkpoint could not be written: {problem}; the last good one was kept")
    if isinstance(source, LoaderSource) and source.truncated:
        warnings.append(
            "the data tell no length: L(w*) was taken over the first "
            f"{result.schedule.num_steps} batches; pass a loader with a length, or tensors"
        )
    return warnings


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


def _num_elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0


def _model_warnings(model: nn.Module, posterior: Objective) -> list[str]:
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
