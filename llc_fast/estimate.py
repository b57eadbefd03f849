"""The main job: estimate the local learning coefficient of a model, in four calls: prepare, choose, sample, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llc_fast.batches import DataSource
from llc_fast.behavioral import Behavioral, BehavioralLoss, behavioral_source, named_loss
from llc_fast.calibration import (
    MAX_RESTARTS,
    MIN_FRICTION,
    PRIOR_STIFFNESS,
    RESTART_STEP,
    STIFFNESS,
    Chosen,
    choose_settings,
    num_pilot_steps,
)
from llc_fast.chains.checkpoint import INTERVAL, Checkpoint, Saved
from llc_fast.chains.draw import Draw, Observable
from llc_fast.chains.group import RunSpec
from llc_fast.chains.processes import Team, default_device, join, telling_early_failures
from llc_fast.chains.run import ChainRun, Monitor, RunningChains
from llc_fast.chains.step_checks import check_steps
from llc_fast.checks import LENGTH_CODES, Facts, examine
from llc_fast.cost import affordable_batch, affordable_length, announcement, refining_passes, seconds_of_gradient
from llc_fast.data import IndexedSource, LoaderSource, is_loader, make_source
from llc_fast.gradients.memory import check_memory
from llc_fast.gradients.plan import LARGE_MODEL, Plan, make_plan
from llc_fast.kernels.native import is_low_precision
from llc_fast.language import NextToken, TokenLoss, columns_of_own_loss, mode_for, token_source
from llc_fast.objective.borrowed import ModelSnapshot
from llc_fast.objective.control_variate import ReferenceLosses, reference_losses
from llc_fast.objective.curvature import Descent
from llc_fast.objective.metric import CurvatureMetric, curvature_metric, metric_norm, metric_of
from llc_fast.objective.objective import LossFunction, Objective, takes_model, widened
from llc_fast.objective.refinement import Refinement, refine
from llc_fast.objective.selection import described
from llc_fast.progress import Progress, ProgressFunction, announce, make_progress
from llc_fast.result import LLCResult
from llc_fast.samplers import SAMPLERS, Sampler
from llc_fast.samplers.langevin import CURVATURE, EstimatedMetric
from llc_fast.schedule import Schedule
from llc_fast.settings import (
    GIVEN,
    PRESETS,
    UNUSED,
    Execution,
    Settings,
    carried_over,
    default_localization,
    with_old_keywords,
)
from llc_fast.stats.sensitivity import Sensitivity
from llc_fast.stats.sensitivity import sensitivity as slopes_of
from llc_fast.stats.wells import Wells
from llc_fast.support.fingerprint import arrays_identity
from llc_fast.support.randomness import Generators
from llc_fast.support.runtime import Interrupts, large_blocks_apart, one_at_a_time, threads
from llc_fast.support.torch_private import drops, modes_kept, normalizes_batches
from llc_fast.support.warned import issue
from llc_fast.traces import LOSS, REFERENCE_LOSS, Traces
from llc_fast.twins import HALF_FACTOR, twin_schedule, twin_traces

_CHECKS_SHARE, _FORWARD_PASSES = 0.01, 3
"""Of a run's gradients, what comparing gradients with differences may cost; forward passes that cost as much as one."""
_SMALL = 2e7
"""Parameters × batch size below which the trial gradient uses one thread; what it counts decides from there."""
_SENT = 1_000_000
"""Parameters up to which processes send each other what chains need to go on."""
_TIME_SHARE = 0.9
"""Of the time that is left, what the next steps may take by what steps took so far."""
_PRIOR_ESS = 200
"""Effective draws of the loss at which chains of localization alone may end, if nobody says when."""
_LEAST_TRIED = 4
"""Samples of the trial gradient of a model of any size."""


def estimate_llc(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | str | None,
    *,
    sampler: str | Sampler | None = None,
    lr: float | None = None,
    nbeta: float | None = None,
    localization: float | None = None,
    num_chains: int = 4,
    num_draws: int | None = None,
    num_burnin: int | None = None,
    num_steps_bw_draws: int = 1,
    target_error: float | None = None,
    max_seconds: float | None = None,
    max_gradients: int | None = None,
    batch_size: int | None = None,
    params: Any = None,
    bias_correction: bool | None = None,
    observables: Mapping[str, Observable] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    execution: Execution | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = INTERVAL,
    warm_start: LLCResult | None = None,
    keep_ends: bool = False,
    sensitivity: bool = False,
    progress: bool | ProgressFunction = True,
    preset: str | None = None,
    refine: bool | int = False,
    preconditioner: Any = None,
    localization_metric: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **old: Any,
) -> LLCResult:
    """Estimate the local learning coefficient λ of `model` at its present parameters w*.

    Chains sample p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²) from w*, and
    λ̂ = nβ·(mean L over draws − L(w*)), with L(w*) the average of what minibatches lose at w* (Lau et al. 2023,
    arXiv 2308.12108; Watanabe 2013). The model is left exactly as it was. It is evaluated in the mode it is in:
    call ``model.eval()`` first unless dropout or batch statistics are meant to be part of the loss.

    The loss that a minibatch has at w* is a control variate: L_B(w_t) − L_B(w*) + L(w*) takes the place of L_B(w_t),
    with the same expectation and less noise, wherever a minibatch's loss is the mean of its samples' losses, or a
    loader gives the same minibatches in every pass (``settings["control_variate"]``; if not,
    ``diagnostics["unpaired_reason"]`` says why). Losses that are no such means, and random ones, are evaluated at w*
    too at every draw (``traces["reference_loss"]``). What observables see as ``draw.loss`` is L_B(w_t) itself.

    Ctrl-C ends the run after the present step and returns what there is, marked as partial; a second one raises. In
    burn-in λ̂ is that of its second half so far, and in calibration there is none, and ``settings`` has what had been
    chosen. What takes longer than ten seconds says first how long, on stderr.

    Args:
        model: the trained model, float32 or float64, or bfloat16 or float16, also mixed with float32, with chains in
            float32.
        data: tensors or arrays with samples along the first dimension, as a tuple (inputs…, target) or a dictionary; a
            Dataset; or a DataLoader of such batches.
        loss_fn: ``loss_fn(output, target)``; or ``loss_fn(model, batch)``, which its first parameter being called
            `model` says; or None for models that return their own loss, ``model(**batch).loss``. It returns the mean
            over the batch, or one loss for each sample, ``[batch]``, of which the mean is taken; also in a container,
            as its `loss` or the only number of a tuple. ``"next-token"`` is that of causal language models, on token
            sequences and in eval mode; see :class:`llc_fast.language.NextToken`. ``"behavioral"``,
            ``"behavioral-mse"`` and ``"behavioral-kl"`` compare outputs with those at w*, which is then the exact
            minimum, whether the model is trained or not; see :func:`llc_fast.behavioral_loss`.
        sampler: a name in ``llc_fast.samplers.SAMPLERS``, or a sampler object with its options, such as
            ``RMSpropSGLDSampler(eps=1e-3)``. None: ``"sgld"``; if `lr` is None too, also ``"sghmc"``, the same with
            momentum, where the pilot chains find room for it, or ``"kfac-sgld"`` where a short one shows that it gives
            at least twice the effective samples at equal cost (``diagnostics["sampler_reason"]``). All three sample
            the same posterior. ``"mala"`` and ``"hmc"`` are Metropolis-adjusted: exact at any
            step size, for small problems, as each draw takes one gradient, or ten, over all data. Metrics that adapt
            are frozen at the end of burn-in, unless the object's ``adapt_steps`` says otherwise.
        lr: step size ε; None: chosen by pilot chains, see :func:`calibrate`. Adjusted samplers start from
            0.2 / (nβ·h_max + γ) and adapt it in burn-in, each chain for itself, to an acceptance of 0.574 (MALA) or
            0.8 (HMC).
        nbeta: nβ; None: n / log n with n the number of samples in `data`. 0: localization alone, N(w*, 1/γ), the
            control that says what draws do without the loss: λ̂ is 0 by definition, and no pilot chains are needed.
        localization: γ, which sets the scale that λ̂ is at: the larger, the closer to w*. None: P / (½‖w*‖)² over the
            sampled parameters (:func:`llc_fast.default_localization`).
        num_chains: independent chains.
        num_draws: draws in each chain, for a run of fixed length. None, with `num_burnin` None too: as many as λ̂ needs
            (see `target_error`); with `num_burnin` given, 2000.
        num_burnin: steps before the first draw, of a run of fixed length; None: as many as there are draws.
        num_steps_bw_draws: steps from a draw to the next.
        target_error: chains go on, half of their steps being burn-in, until the total error of λ̂ is this share of it:
            the standard error plus what slow directions likely lack (:attr:`LLCResult.relative_error`), with nothing
            left that the length would mend. They are looked at after
            1250 steps and then at each doubling. None: 0.02, unless a length was given. What ended them is in
            ``diagnostics["ended_by"]``.
        max_seconds: time that the run may take, from the call on; chains stop at the step that they then have reached,
            so that results differ from run to run. Pilot chains are not cut short by it. None: no limit.
        max_gradients: gradients that the run may take, pilot chains included. None: 10,000 steps of each chain, and
            fewer for a model so large that this would take more than about ten minutes (:mod:`llc_fast.cost`).
        batch_size: samples in a minibatch; None: min(512, n), down to 32 for a model so large that the run would take
            more than about ten minutes, or what the loader gives. Adjusted samplers take all n.
        params: the parameters to sample: a name, glob pattern, module, parameter or component (``"l3 h5"``, see
            :func:`llc_fast.components`), several of these, or a mapping from these to boolean masks (weight-refined
            LLC); None: all that require a gradient. The others stay at w*.
        bias_correction: whether ``result.loss_trace`` is cleared of bias, what step size and gradient noise add to the
            loss, measured at every step (:meth:`llc_fast.samplers.Sampler.bias`). None: if `lr` is None, since the
            step size is then chosen for it; with a step size of your own you get the plain average. Minibatches of
            data addressed by index are then independent from step to step, as the correction assumes; otherwise, and
            from a loader, they come without replacement within an epoch.
        observables: functions of a :class:`llc_fast.Draw` by name; what they return at every draw is recorded in
            ``result.observables``.
        seed: equal seeds give equal results on the same machine.
        device: where to compute; None: where the model's parameters are.
        execution: how it is computed: strategy, microbatches, autocast, processes. None: chosen; see
            :class:`llc_fast.Execution`.
        checkpoint: file that the state is written to at intervals. The same call resumes from it and ends with the
            same bits as if it had never stopped; once done, it returns the result at once. A call with a smaller
            `target_error`, a larger budget or more draws goes on from there (models up to 10 million parameters).
        checkpoint_interval: seconds between writes.
        warm_start: an earlier result with as many chains, made with ``keep_ends=True``: each chain starts where that of
            the earlier result ended, moved by as much as w* has moved since. None: at w*.
        keep_ends: keep where the chains end in ``result.ends``, as much memory as all chains' parameters.
        sensitivity: measure dλ̂/dlog nβ and dλ̂/dlog γ, for ``result.sensitivity``: four short runs with the same random
            numbers go on from the chains' ends, at γ, and nβ with γ, times and over √2 (:mod:`llc_fast.twins`). They
            take as many gradients as the chains, and are no part of the checkpoint.
        progress: show progress with λ̂ so far: a bar on a terminal or in a notebook, a line each 10 % in a log; or a
            function that is called a few times a second with the steps done, the steps in all and λ̂ so far (NaN before
            the first draw).
        preset: values for arguments that are not given, by name. ``"language-model"``: nβ = 30 and γ = 300.
            ``"paper"``, as in the papers named above and arXiv 2402.03698: plain SGLD without bias correction, γ = 1,
            minibatches of 500, and chains of 10,000 steps of which the last 1,000 are draws.
        refine: look for a better minimum first, by quasi-Newton steps with gradients over all data, which γ holds near
            w*: L(w*), γ's centre and the start of chains are then those of the place found, and the model stays as it
            is. A number: of passes over the data at most; True: as many as a quarter of the run's gradients are, but
            20 at least. What it did is in ``result.diagnostics`` (``refine_fall``, …) and ``summary()``.
        preconditioner: A, of samplers in a given metric (``"preconditioned-sgld"``, which it chooses if `sampler` is
            None, ``"mala"``, ``"hmc"``): a number, or tensors by parameter. ``"curvature"``: 1 over the diagonal of the
            curvature at w*, estimated with 64 gradients and frozen, which follows every rescaling of the network by
            itself (:mod:`llc_fast.objective.metric`). None: the sampler's own.
        localization_metric: ``"sampler"``: the localization is γ/2·(w − w*)ᵀA⁻¹(w − w*), and all that is said of γ and
            of distances is in that metric: the default γ is P / (½)²·w*ᵀA⁻¹w*. With ``preconditioner="curvature"``
            chains, posterior and λ̂ are then the same for a rescaled network. ``"euclidean"``: γ/2·‖w − w*‖². None:
            ``"sampler"`` for ``"curvature"``, otherwise ``"euclidean"``.
        settings: those of an earlier result of the same model, ``result.settings``, or of another checkpoint of it: its
            sampler with its options, ε, nβ, γ, bias correction and size of minibatches take the place of those that are
            not given, and no pilots run (13 % of the gradients). Not carried over: length, seed, and what is sampled.
        **old: arguments by the names they had before, see :func:`llc_fast.settings.with_old_keywords`.

    Returns:
        An :class:`LLCResult`; what was chosen for the arguments left None is in its ``settings``. Each of its
        ``warnings`` is issued as an :class:`llc_fast.LLCWarning`, too.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, before any sampling; a checkpoint that
            is damaged or belongs to another run.
        PermissionError: the checkpoint's folder can't be written to.
        MemoryError: the run can't fit the memory; says what it needs and what would make it fit.
        llc_fast.chains.processes.ProcessFailedError: another process of a distributed run failed or died.
    """
    given = {name: value for name, value in locals().items() if name in ARGUMENTS}
    with telling_early_failures(getattr(execution, "distributed", old.get("distributed"))):
        if settings is not None:
            given = carried_over(given, settings, decides=is_loader(data))
        asked, loss = with_old_keywords(given, old, "estimate_llc"), named_loss(loss_fn)
        surroundings = Surroundings(asked, model, data, loss)
    result = run_estimate(asked, model, data, loss, surroundings)
    if surroundings.team.rank == 0:
        issue(result.warnings, stacklevel=2)
    return result


class Recorder:
    """Takes part in a run: it sees every draw, and what becomes of the chains; this one does nothing.

    All is called in the order of the methods here, in every process, inside the surroundings of the run.
    """

    def look(self, prepared: Prepared) -> None:
        """Everything has been looked at, and nothing has been sampled."""

    def begin(self, prepared: Prepared, chosen: Chosen) -> Callable[[Draw], None]:
        """The chains are about to start, or to start anew with another step size.

        Returns:
            What is called at every draw of every chain of this process, by one thread at a time.
        """
        return lambda draw: None

    def snapshot(self, traces: list[Traces]) -> None:
        """The checkpoint is about to be written: what was seen of the draws in these traces must last."""

    def end(self, result: LLCResult) -> None:
        """The chains are over, or somebody stopped them."""


def run_estimate(
    settings: Settings,
    model: nn.Module,
    data: Any,
    loss: LossFunction | NextToken | Behavioral | None,
    surroundings: Surroundings,
    recorder: Recorder | None = None,
) -> LLCResult:
    """The four calls.

    Raises:
        TypeError, ValueError, PermissionError, MemoryError: as :func:`estimate_llc`; whatever `recorder` raises.
    """
    with surroundings:
        prepared = prepare(settings, model, data, loss, surroundings)
        if recorder is not None:
            prepared = dataclasses.replace(prepared, recorder=recorder)
            recorder.look(prepared)
        chosen = choose(prepared)
        run = sample(prepared, chosen)
        while may_begin_again(prepared, chosen, run):
            # The checkpoint goes on with the new step size as soon as it is written.
            prepared = dataclasses.replace(prepared, saved=None)
            lr, restarts = chosen.lr * RESTART_STEP, chosen.restarts + 1
            chosen = dataclasses.replace(chosen, lr=lr, friction=1.0, restarts=restarts)
            run = sample(prepared, chosen)
        slopes = sensitivity_of(prepared, chosen, run) if settings.sensitivity else None
        result = report(prepared, chosen, run)
        if slopes is not None:
            result.diagnostics["sensitivity"] = {k: None if math.isnan(v) else v for k, v in slopes._asdict().items()}
        if recorder is not None:
            recorder.end(result)
    return result


class Calibration(dict[str, Any]):
    """Settings that :func:`estimate_llc` accepts, ``estimate_llc(model, data, loss_fn, **calibration)``.

    Attributes:
        reason: what was chosen and why, for people.
    """

    reason: str = ""


def calibrate(
    model: nn.Module, data: Any, loss_fn: LossFunction | NextToken | Behavioral | str | None, **settings: Any
) -> Calibration:
    """Choose what :func:`estimate_llc` needs and was not given, as it does itself when ``lr`` is None.

    The step size ε begins at 1 / (nβ·h_max + γ), with h_max the largest curvature of the loss at w* in the sampler's
    metric, and pilot chains of growing length lower it until bias (:meth:`llc_fast.samplers.Sampler.bias`) is no more
    than a tenth of nβ·(L − L(w*)); for samplers without bias correction it is 0.2 / (nβ·h_max + γ), with no pilot.
    All of it takes 13 % of the gradients of a run of 4000 steps, or of fewer if fewer are planned. Equal seeds choose
    equally.

    Args:
        model, data, loss_fn: as for :func:`estimate_llc`.
        **settings: any other argument of :func:`estimate_llc`; what is given is kept. A step size that is given is
            chosen all the same.

    Returns:
        A dictionary of settings, to be passed on as they are or changed; its ``reason`` says why.

    Raises:
        TypeError, ValueError: as :func:`estimate_llc`.
    """
    old = {name: settings.pop(name) for name in list(settings) if name not in ARGUMENTS}
    if isinstance(sampler := settings.get("sampler"), Sampler):
        settings["sampler"] = dataclasses.replace(sampler, lr=None)
    asked, loss = with_old_keywords(settings | {"lr": None, "checkpoint": None}, old, "calibrate"), named_loss(loss_fn)
    with Surroundings(asked, model, data, loss, alone=True) as surroundings:
        prepared = prepare(asked, model, data, loss, surroundings)
        chosen = choose(prepared)
    settings_used = prepared.settings
    sampler, schedule = completed(settings_used, chosen)
    decides, is_exact = isinstance(prepared.objective.source, LoaderSource), sampler.kind == "metropolis"
    if isinstance(getattr(sampler, "preconditioner", None), EstimatedMetric):  # the estimate makes its own
        sampler = dataclasses.replace(sampler, preconditioner=CURVATURE)  # type: ignore[call-arg]
    is_plain = SAMPLERS.get(sampler.name) is type(sampler) and not _options(sampler)
    found = Calibration(
        sampler=sampler.name if is_plain else dataclasses.replace(sampler, lr=None, nbeta=None, localization=None),
        lr=chosen.lr,
        nbeta=chosen.nbeta,
        localization=sampler.localization,
        num_chains=asked.num_chains,
        num_draws=None if settings_used.by_need else schedule.num_draws,
        num_burnin=None if settings_used.by_need else schedule.num_burnin,
        num_steps_bw_draws=schedule.num_steps_bw_draws,
        target_error=settings_used.target_error,
        max_seconds=settings_used.max_seconds,
        max_gradients=settings_used.max_gradients,
        # A loader decides for itself, and adjusted samplers take everything.
        batch_size=None if decides else asked.batch_size if is_exact else prepared.objective.source.batch_size,
        bias_correction=chosen.bias_correction,
        **({"refine": asked.refine} if asked.refine else {}),
    )
    found.reason = _why(chosen, settings_used)
    return found


ARGUMENTS = frozenset(field.name for field in dataclasses.fields(Settings))
"""Names of the arguments of :func:`estimate_llc` after model, data and loss."""


@contextlib.contextmanager
def prepared_alone(
    settings: Settings, model: nn.Module, data: Any, loss_fn: LossFunction | NextToken | str | None
) -> Iterator[Prepared]:
    """Inside ``with`` a run that may begin, in this process alone, for a look at the model.

    Raises:
        TypeError, ValueError, MemoryError: as :func:`estimate_llc`.
    """
    loss = named_loss(loss_fn)
    with Surroundings(settings, model, data, loss, alone=True) as surroundings:
        yield prepare(settings, model, data, loss, surroundings)


def _why(chosen: Chosen, settings: Settings) -> str:
    """What calibration chose, and why."""
    schedule, lr = settings.longest, f"lr={chosen.lr:.3g}"
    length = f"{schedule.num_burnin} steps of burn-in and {schedule.num_draws} draws"
    if settings.by_need:
        length = f"up to {schedule.num_steps} steps of a chain, until the error of λ̂ is {settings.target:.2g} of it"
    if chosen.is_interrupted:
        return (
            f"{lr}: what pilot chains had found after {chosen.pilot_steps} steps, when they were interrupted; {length}"
        )
    if not chosen.nbeta and settings.lr is None:
        return f"{lr}: {PRIOR_STIFFNESS} / γ, since nβ = 0 leaves the localization alone; {length}"
    if chosen.pilot_bias_share is None:
        reason = "the run is too short for pilot chains" if chosen.bias_correction else "there is no bias correction"
        return f"{lr}: {STIFFNESS} / (nβ·h_max + γ), since {reason}; {length}"
    if math.isnan(chosen.pilot_bias_share):
        return (
            f"{lr}: pilot chains of {chosen.pilot_steps} steps found no loss above L(w*) to compare bias with; {length}"
        )
    why = f"; {chosen.reason}" if chosen.reason else ""
    return (
        f"{lr}: pilot chains of {chosen.pilot_steps} steps ended with bias at {chosen.pilot_bias_share:.1%} of "
        f"nβ·(L − L(w*)), which is subtracted{why}; {length}"
    )


# ---- prepare -----------------------------------------------------------------------------------------------


class Surroundings:
    """What holds while a run lasts: its processes, its random numbers, its memory; afterwards all is as it was.

    Attributes:
        device: where to compute.
        team: the processes.
        generators: of random numbers that model, loss and data may draw from.
        interrupts: what Ctrl-C does.
        started: when.
    """

    def __init__(
        self, settings: Settings, model: nn.Module, data: Any, loss_fn: object, *, alone: bool = False
    ) -> None:
        self.started = time.perf_counter()
        given = settings.device
        self.device = _device_of(model) if given is None else default_device(check_device(given))
        self.generators = Generators(self.device, [model, loss_fn, data])
        self.interrupts = Interrupts(Surroundings.__enter__, Surroundings.__exit__)
        self._model, self._loss_fn = model, loss_fn
        self._is_large = self.device.type == "cpu" and _num_elements(model) > LARGE_MODEL
        self._stack = contextlib.ExitStack()
        self.team = join(False if alone else settings.execution.distributed)  # last: now nothing fails before it works

    def __enter__(self) -> Surroundings:
        try:
            self._stack.push(self.interrupts)  # before: Ctrl-C may come as soon as its handler is there
            self.interrupts.__enter__()
            turn = one_at_a_time()
            while not turn.try_for(0.05):  # other runs have to end
                if self.interrupts.is_pending:
                    raise KeyboardInterrupt
            self._stack.push(turn)
            self._begin()
            if self.interrupts.is_pending:
                raise KeyboardInterrupt
        except BaseException as error:  # no second interrupt comes before what has begun is ended
            self.__exit__(type(error), error, None)
            raise
        return self

    def _begin(self) -> None:
        self._stack.enter_context(threads(None))
        self._stack.enter_context(self.team.working())
        # What model and data draw from: in states of their own, which follow the seed.
        self._stack.enter_context(self.generators.kept())
        self._stack.enter_context(torch.inference_mode(False))
        self._stack.enter_context(large_blocks_apart(self._is_large))
        snapshot = ModelSnapshot(self._model, self._loss_fn)
        self._stack.callback(snapshot.restore)
        snapshot.silence()
        self._stack.enter_context(mode_for(self._model, self._loss_fn))
        self._stack.enter_context(modes_kept())  # last, to end before what is put back

    def __exit__(self, *error: Any) -> bool:
        handled = bool(self._stack.__exit__(*error))
        if self.interrupts.is_pending:
            raise KeyboardInterrupt
        if (raised := error[1]) is not None and not handled and _is_of_an_interrupt(raised):
            raise KeyboardInterrupt from raised
        return handled


def _is_of_an_interrupt(error: BaseException) -> bool:
    """Whether it was raised while an interrupt was on its way: by what that had left half done, as torch's modes."""
    while (context := error.__context__) is not None and not isinstance(error, KeyboardInterrupt):
        if isinstance(context, KeyboardInterrupt):
            return True
        error = context
    return False


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: everything has been looked at, and nothing has been sampled.

    Attributes:
        settings: what was asked for.
        model: the user's.
        objective: model, loss and data on their device.
        shortened: what was made smaller than the defaults, in words.
        plan: how gradients are computed.
        start: where chains start, as w − w* by parameter, a row for each chain; None: at w*.
        reference_losses: the losses at w*.
        keeper: of the checkpoint; None: there is none.
        identity: what names the run.
        saved: what an earlier process has done of it; None: nothing.
        surroundings: what holds while the run lasts.
        mode: the mode in which the model is evaluated.
        refined: what was done for a better w*; None: nothing, or it is what was saved.
        reference: w* by parameter, where it is not the model's.
        recorder: sees the draws; None: nobody does.
        metric: what was estimated of the preconditioner ``"curvature"``; None: there is none.
    """

    settings: Settings
    model: nn.Module
    objective: Objective
    shortened: str
    plan: Plan
    start: dict[str, NDArray[Any]] | None
    reference_losses: ReferenceLosses
    keeper: Checkpoint | None
    identity: dict[str, Any]
    saved: Saved | None
    surroundings: Surroundings
    mode: _Mode
    refined: dict[str, Any] | None = None
    reference: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    recorder: Recorder | None = None
    metric: CurvatureMetric | None = None


@dataclass(frozen=True)
class _Mode:
    """The mode in which a model is evaluated, which may be another one when the run is over.

    Attributes:
        is_training: of the model as a whole.
        random_modules: modules in training mode that make the loss depend on dropout or batch statistics.
        batch_statistics: modules in evaluation mode that use the statistics of the minibatch, having no others.
    """

    is_training: bool
    random_modules: list[str]
    batch_statistics: list[str]

    @classmethod
    def of(cls, objective: Objective) -> _Mode:
        model = objective.model
        return cls(model.training, _random_modules(objective), _batch_statistics(model))


def prepare(
    settings: Settings,
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | None,
    surroundings: Surroundings,
) -> Prepared:
    """Look at model, loss, data and checkpoint, and take L(w*).

    Raises:
        TypeError, ValueError, PermissionError, MemoryError: as :func:`estimate_llc`.
    """
    execution, team = settings.execution, surroundings.team
    keeper = None
    if settings.checkpoint is not None:
        rank = team.rank if team.size > 1 else None
        keeper = Checkpoint(settings.checkpoint, rank=rank, interval=settings.checkpoint_interval)
    asked = settings
    objective, settings, shortened = _affordable(asked, model, data, loss_fn, surroundings)
    start = None if settings.warm_start is None else _ends_of(settings.warm_start, objective, settings.num_chains)
    template = settings.complete_sampler(1.0, 1.0)
    if template.localization is None:  # for the plan it is enough that there is one
        template = dataclasses.replace(template, localization=1.0)
    chains = -(-settings.num_chains // team.size)  # the largest share: the same plan in all processes
    planned = functools.partial(
        make_plan,
        objective,
        template,
        chains,
        release_gradients=execution.release_gradients,
    )
    plan = planned(strategy=execution.strategy)
    objective.runs_compiled = plan.runs_compiled
    # Pilots may find room for momentum, which is a tensor more like w for each chain.
    may_gain_momentum = settings.is_default_sampler and settings.lr is None and not plan.release
    largest = settings.complete_sampler(1.0, 1.0, friction=MIN_FRICTION) if may_gain_momentum else template
    check_memory(objective, largest, plan)
    identity: dict[str, Any] = {}
    saved = None
    if keeper is not None or team.size > 1:
        identity = {**asked.identity(), **objective.identity()}  # not the length, by which a run may be extended
        identity["warm_start"] = None if start is None else arrays_identity(start)
        if isinstance(objective.loss_fn, BehavioralLoss):  # L(w*) is 0 with any of them
            identity["loss_fn"] = objective.loss_fn.settings["loss_fn"]
        team.agree(identity | {"schedule": vars(asked.longest)} | _more_identity(objective, loss_fn, keeper))
    if keeper is not None and (saved := keeper.load(identity)) is not None:
        saved = _fitted(saved, settings, keeper)
    if settings.progress is True and team.rank == 0 and saved is None:
        with threads(plan.num_threads):
            announce(announcement(settings, objective, seconds_of_gradient(objective, settings.seed), shortened))
    metric = None
    if settings.needs_metric:
        with threads(plan.num_threads):
            settings, metric = _in_metric(settings, objective, team)
    settings = settings.localized(objective.num_parameters, reference_norm(settings.template, objective))
    nbeta = settings.nbeta_for(objective.source.num_samples)
    refined, reference = None, dict[str, NDArray[Any]]()
    if settings.refine:
        with threads(plan.num_threads):
            refined, reference = _refined(settings, objective, nbeta, saved, team)
    # One sample costs at most what a forward pass does, a third of a gradient: a twelfth of a run.
    affordable = settings.num_chains * settings.schedule.num_steps // 4
    with threads(plan.num_threads):
        # At nβ = 0 no difference of losses matters to λ̂, but those of draws are to be told apart all the same.
        at_reference = reference_losses(objective, nbeta or 1.0, settings.seed, affordable)
    # Other processors may round otherwise; what moves λ̂ by a thousandth, or less than its error, is no difference.
    is_coarse = execution.autocast is not None or any(map(is_low_precision, objective.reference.values()))
    error = at_reference.stderr if math.isfinite(at_reference.stderr) else 0.0
    atol, rtol = max(1e-3 / (nbeta or 1.0), 6 * error), 1e-2 if is_coarse else 1e-4
    team.agree_on_number("the loss at w*", at_reference.mean, atol=atol, rtol=rtol)
    if at_reference.pairing == "draws" and plan.strategy == "cuda-graph":  # it can't stop at draws
        why = "the minibatches of draws are evaluated at w* too"
        if plan.is_given:
            raise ValueError(f'strategy="cuda-graph" is not possible here: {why}; use Execution(strategy="batched")')
        plan = planned(failed={"cuda-graph": why})
    return Prepared(
        settings,
        model,
        objective,
        shortened,
        plan,
        start,
        at_reference,
        keeper,
        identity,
        saved,
        surroundings,
        _Mode.of(objective),
        refined,
        reference,
        metric=metric,
    )


def _in_metric(settings: Settings, objective: Objective, team: Team) -> tuple[Settings, CurvatureMetric]:
    """The settings with the metric that is estimated at w*, and what was found."""
    found = curvature_metric(objective)
    if team.size > 1:  # one process's metric for all: another number of threads may round differently
        arrays = {name: a.cpu().numpy() for name, a in found.preconditioner.items()} if team.rank == 0 else {}
        tensors = {name: torch.from_numpy(a) for name, a in team.gather(arrays)[0].items()}
        moved = {name: a.to(found.preconditioner[name].device) for name, a in tensors.items()}
        found = dataclasses.replace(found, preconditioner=moved, norm=metric_norm(objective, moved))
    return settings.in_metric(found.preconditioner), found


def reference_norm(sampler: Sampler, objective: Objective) -> float:
    """‖w*‖ over the elements that are sampled, in the metric of the localization."""
    return metric_norm(objective, metric_of(sampler, objective)) if sampler.localizes_in_metric else _norm(objective)


def _refined(
    settings: Settings, objective: Objective, nbeta: float, saved: Saved | None, team: Team
) -> tuple[dict[str, Any] | None, dict[str, NDArray[Any]]]:
    """Move w* to a better minimum, or to that of the run that is resumed.

    Returns:
        What was done, where it was done now, and the new w* for the checkpoint.

    Raises:
        ValueError: there is no gradient over all data.
    """
    done, arrays = None, {} if saved is None else saved.reference
    if isinstance(objective.loss_fn, BehavioralLoss):
        return dataclasses.asdict(Refinement(0.0, 0.0, 0.0, 0.0, 0, 0, True)), {}  # w* is its minimum
    if not arrays:
        found, refinement = refine(
            objective,
            nbeta,
            settings.complete_sampler(1.0, nbeta).localization or 0.0,
            max_passes=refining_passes(settings, objective),
        )
        done = dataclasses.asdict(refinement)
        # One process's place for all: another number of threads may round differently.
        arrays = {name: widened(w).cpu().numpy() for name, w in found.items()}
        arrays = team.gather(arrays if team.rank == 0 else {})[0]
    objective.move_to({name: torch.from_numpy(values) for name, values in arrays.items()})
    return done, arrays


def _loss_settings(objective: Objective) -> dict[str, Any]:
    """What settings say of a loss that has a name."""
    loss_fn = objective.loss_fn
    return loss_fn.settings if isinstance(loss_fn, (TokenLoss, BehavioralLoss)) else {}


def _fitted(saved: Saved, settings: Settings, keeper: Checkpoint) -> Saved:
    """The saved chains as a part of the run at hand, which may be longer than the one that saved them.

    Raises:
        ValueError: they have done more, or other things, or their state was not kept.
    """
    asked, name = settings.longest, f"checkpoint={str(keeper.path)!r}"
    before = Schedule(**saved.schedule)
    done = max((t.step for t in saved.traces), default=0)
    later = asked.num_burnin - before.num_burnin
    if asked == before:
        return saved
    if later < 0 or later % asked.num_steps_bw_draws or asked.num_steps < min(done, before.num_steps):
        limit = "max_gradients" if settings.by_need else "num_draws"
        raise ValueError(
            f"{name} belongs to another run: it has {done} steps of each chain, {before.num_burnin} of them burn-in, "
            f"and this one would have {asked.num_steps} and {asked.num_burnin}. Raise {limit}=, give another path, or "
            "delete the file to start again"
        )
    if any(t.step and t.state is None and t.step < asked.num_steps for t in saved.traces):
        raise ValueError(
            f"{name} can't be extended: it is of a run that is over, of a model so large that the state of its chains "
            "was not kept. Give another path, or delete the file to start again"
        )
    first_look = settings.first_look
    old, new = (check_steps(schedule, first_look)[0] for schedule in (before, asked))
    places = [old.index(step) if step in old else None for step in new]
    traces = [
        t.resized(asked.num_steps, later // asked.num_steps_bw_draws, asked.num_draws, places) for t in saved.traces
    ]
    return dataclasses.replace(saved, schedule=vars(asked), traces=traces)


def _more_identity(objective: Objective, loss_fn: object, keeper: Checkpoint | None) -> dict[str, Any]:
    """What processes compare beyond what names a run in its checkpoint."""
    tensors = objective.reference.values()
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in tensors})
    inner = loss_fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    return {
        "params": f"{len(tensors)} tensors, {objective.num_parameters} elements, {', '.join(dtypes)}",
        "loss_fn": None if inner is None else getattr(inner, "__qualname__", type(inner).__qualname__),
        "checkpoint": "none" if keeper is None else "given",
        "torch's version": torch.__version__.partition("+")[0],
    }


def _affordable(
    settings: Settings,
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | None,
    surroundings: Surroundings,
) -> tuple[Objective, Settings, str]:
    """Model, loss and data, tried once, in minibatches and for a length that a user who gave neither can wait for.

    By the operations of the trial gradient, at a nominal speed: a clock would choose otherwise on another day.

    Returns:
        The objective, the settings, and what was made smaller for it, in words.
    """
    source, loss_fn = _source(settings, model, data, loss_fn, surroundings.device)
    size, device = source.batch_size, surroundings.device
    if isinstance(source, IndexedSource) and settings.batch_size is None and settings.template.kind != "metropolis":
        assert size is not None
        # The trial itself must be affordable, too.
        tried = min(size, max(_LEAST_TRIED, int(_SMALL / max(_num_elements(model), 1))))
        objective = _objective(settings, model, loss_fn, source.with_batch_size(tried), surroundings)
        affordable = affordable_batch(settings, objective.trial.flops / tried, size, device)
        if affordable != tried:
            objective = _objective(settings, model, loss_fn, source.with_batch_size(affordable), surroundings)
    else:
        objective = _objective(settings, model, loss_fn, source, surroundings)
    affordable_settings = affordable_length(settings, objective.trial.flops, device, objective.num_parameters)
    smaller, steps = [], affordable_settings.longest.num_steps
    if objective.source.batch_size != size:
        smaller.append(f"minibatches of {objective.source.batch_size} samples instead of {size}")
    if steps < settings.longest.num_steps and affordable_settings.schedule != settings.schedule:
        smaller.append(f"{steps} steps of a chain instead of {settings.schedule.num_steps} or more")
    return objective, affordable_settings, " and ".join(smaller)


def _source(
    settings: Settings,
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | None,
    device: torch.device,
) -> tuple[DataSource, LossFunction | None]:
    """The data as asked for, and the loss as a function."""
    size = settings.batch_size
    if settings.preset is not None and size == PRESETS[settings.preset].get("batch_size") and is_loader(data):
        size = None  # which a preset can't know
    options: dict[str, Any] = {
        "num_wanted": settings.num_chains * settings.schedule.num_steps * (size or 512),
        "max_batches": settings.schedule.num_steps,
        "independent": settings.wants_bias_correction,
        "whole": settings.template.kind == "metropolis",
    }
    source: DataSource
    if isinstance(loss_fn, (Behavioral, BehavioralLoss)):
        source, loss_fn = behavioral_source(loss_fn, model, data, size, device, **options)
    elif isinstance(loss_fn, NextToken):
        source, loss_fn = token_source(loss_fn, model, data, size, device, **options)
    else:
        data = columns_of_own_loss(model, data) if loss_fn is None else data
        source = make_source(data, size, device, pairs=not takes_model(loss_fn), **options)
    settings.nbeta_for(source.num_samples)
    return source, loss_fn


def _objective(
    settings: Settings,
    model: nn.Module,
    loss_fn: LossFunction | None,
    source: DataSource,
    surroundings: Surroundings,
) -> Objective:
    """Model and loss on their device, tried once; seeds torch's generator."""
    execution, template, device = settings.execution, settings.template, surroundings.device
    surroundings.generators.seed(settings.seed)
    with threads(1 if _num_elements(model) * (source.batch_size or 1) < _SMALL else None):
        objective = Objective(
            model,
            loss_fn,
            source,
            device=device,
            params=settings.params,
            autocast=execution.autocast,
            microbatch_size=execution.microbatch_size,
            generators=surroundings.generators,
            max_checks=int(_CHECKS_SHARE * _FORWARD_PASSES * settings.num_chains * settings.schedule.num_steps),
        )
    if isinstance(loss_fn, TokenLoss):
        loss_fn.check_causal(objective)
    if isinstance(loss_fn, BehavioralLoss):
        loss_fn.check(objective, settings.nbeta_for(source.num_samples))
    if template.kind == "metropolis":
        _check_exact(template, objective, execution)
    return objective


def _check_exact(sampler: Sampler, objective: Objective, execution: Execution) -> None:
    """Refuse a loss that is no function of the parameters alone, or too coarse to show differences of order 1/nβ.

    Raises:
        ValueError: it is one of these.
    """
    trial = objective.trial
    if trial.is_random or trial.writes_buffers:
        why = "draws random numbers (dropout?)" if trial.is_random else "changes buffers (batch or spectral norm?)"
        raise ValueError(
            f"sampler={sampler.name!r} needs a loss that is a function of the parameters alone, and this one {why}: "
            "call model.eval(), or use an unadjusted sampler such as 'sgld'"
        )
    low = next((name for name, p in objective.reference.items() if is_low_precision(p)), None)
    if low is not None or execution.autocast is not None:
        dtype = execution.autocast if low is None else objective.reference[low].dtype
        what = f"autocast={dtype}" if low is None else f"parameter {low!r} in {dtype}"
        raise ValueError(
            f"sampler={sampler.name!r} compares losses times nβ, for which {what} is too coarse: use float32 or "
            "float64, or an unadjusted sampler such as 'sgld'"
        )


def _ends_of(warm_start: LLCResult, objective: Objective, num_chains: int) -> dict[str, NDArray[Any]]:
    """Where the chains of an earlier result ended, checked to fit.

    Raises:
        ValueError: it was not kept, or is of other chains or parameters.
    """
    if warm_start.ends is None:
        raise ValueError("warm_start does not know where its chains ended: make it with keep_ends=True")
    shapes = {name: (num_chains, *w.shape) for name, w in objective.reference.items()}
    given = {name: a.shape for name, a in warm_start.ends.items()}
    if shapes != given:
        name = next(n for n in {**shapes, **given} if shapes.get(n) != given.get(n))
        raise ValueError(
            f"warm_start is of other chains or parameters: {name!r} is {given.get(name)} there and {shapes.get(name)} "
            "here, [chain, …]; pass the same num_chains and params as to the earlier estimate"
        )
    return warm_start.ends


# ---- choose ------------------------------------------------------------------------------------------------


def choose(prepared: Prepared) -> Chosen:
    """What the settings leave open: measured by pilot chains, or that of the run that is resumed.

    Raises:
        ValueError: no step size can be chosen; the checkpoint is of a run with another loss.
    """
    settings, team = prepared.settings, prepared.surroundings.team
    with threads(prepared.plan.num_threads):
        if prepared.saved is not None and prepared.keeper is not None:
            chosen = _chosen_before(prepared.saved, prepared.keeper, prepared.reference_losses)
        else:
            # Several processes would stop at different steps, and wait for each other: there Ctrl-C raises.
            stopping = prepared.surroundings.interrupts.stopping if team.size == 1 else contextlib.nullcontext
            with _PilotMonitor(settings, team) as monitor:
                chosen = choose_settings(
                    settings,
                    prepared.objective,
                    prepared.reference_losses,
                    prepared.plan,
                    start=prepared.start,
                    monitor=monitor,
                    stopping=stopping,
                )
            chosen = dataclasses.replace(chosen, refined=prepared.refined)
    # One process's numbers for all: another number of threads may round differently.
    return Chosen(**team.gather(dataclasses.asdict(chosen))[0])


def _chosen_before(saved: Saved, keeper: Checkpoint, at_reference: ReferenceLosses) -> Chosen:
    chosen, init_loss = Chosen(**saved.chosen), at_reference.mean
    if abs(chosen.init_loss - init_loss) > max(
        1e-5 * abs(init_loss), 6 * at_reference.stderr, 1e-6 / (chosen.nbeta or 1.0)
    ):
        raise ValueError(
            f"checkpoint={str(keeper.path)!r} belongs to another run: the loss at w* was {chosen.init_loss:.6g}, is "
            f"{init_loss:.6g}. Other data or another loss_fn?"
        )
    return chosen


class _PilotMonitor(Monitor):
    """Shows the progress of the pilot chains; it leaves when they are done."""

    def __init__(self, settings: Settings, team: Team) -> None:
        self._is_shown, self._team, self._done = settings.progress is True and team.rank == 0, team, 0
        self._total = num_pilot_steps(settings)
        self._progress: Progress | None = None

    def __enter__(self) -> _PilotMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def report(self, traces: Callable[[], list[Traces]], steps: int) -> None:
        self._team.check()
        if self._is_shown and self._progress is None:  # short pilots show nothing
            self._progress = make_progress(True, self._total, "calibration", stays=False)
        if self._progress is not None:  # chains that diverged are run again, and are beyond the total
            self._progress.update(min(self._done + steps, self._total))

    def snapshot(self, traces: list[Traces]) -> None:  # at the end of each
        self._done += sum(t.step for t in traces)


def completed(settings: Settings, chosen: Chosen) -> tuple[Sampler, Schedule]:
    """The sampler and the schedule of the chains."""
    sampler = settings.complete_sampler(chosen.lr, chosen.nbeta, friction=chosen.friction, name=chosen.sampler)
    return sampler, settings.longest


# ---- sample ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """What all processes have sampled.

    Attributes:
        traces: of all chains.
        steps_done: of each chain.
        until: steps that each chain was to take.
        run: of this process.
        interrupted: whether somebody stopped a process early.
        ended_by: what ended a run whose length is by need, see :class:`_Ending`; empty for others.
        problem: why the checkpoint could not be written; empty if it was.
        seconds_of_setup: from the start to the first step.
    """

    traces: Traces
    steps_done: list[int]
    until: int
    run: ChainRun
    interrupted: bool
    ended_by: str = ""
    problem: str = ""
    seconds_of_setup: float = 0.0


def sample(prepared: Prepared, chosen: Chosen) -> Sampled:
    """Run the chains, those of this process, and gather what all processes have done."""
    settings, objective, keeper = prepared.settings, prepared.objective, prepared.keeper
    team, saved, at_reference = prepared.surroundings.team, prepared.saved, prepared.reference_losses
    sampler, schedule = completed(settings, chosen)
    recorder = prepared.recorder
    spec = RunSpec(
        objective,
        sampler,
        schedule,
        prepared.plan,
        settings.seed,
        observables=dict(settings.observables or {}),
        watch=None if recorder is None else recorder.begin(prepared, chosen),
        control_variate=at_reference.control_variate(objective.source.batch_size, chosen.init_loss),
        evaluates_reference=at_reference.pairing == "draws",
        start=prepared.start,
        keep_ends=settings.needs_ends,
        keep_state=_keeps_state(prepared),
        first_look=settings.first_look,
    )
    setup = time.perf_counter() - prepared.surroundings.started
    chains = team.share(settings.num_chains)
    if chosen.is_interrupted:
        run = ChainRun([spec.blank_traces(chains)], True, prepared.plan, "")
        return Sampled(run.traces[0], [0] * len(chains), 0, run, True, seconds_of_setup=setup)
    # Ctrl-C reaches all processes, those that wait for others too: these must not leave without the results.
    # When another process fails this one stops too, with a snapshot of its own chains; `gather` says why.
    with (
        _RunMonitor(prepared, chosen, schedule, chains) as monitor,
        prepared.surroundings.interrupts.stopping() as stop,
        team.stopping(stop),
    ):
        resumed = saved.traces if saved is not None else ()
        ending = _Ending(prepared, chosen, setup)
        with RunningChains(spec, chains, resumed=resumed, monitor=monitor, stop=stop) as running:
            until, following = 0, ending.first(resumed)
            while following:
                monitor.until(until := following)
                run = running.run(until)
                following = ending.following(ending.gather(run, until)) if settings.by_need else 0
            run = running.finish()
        sampled = dataclasses.replace(ending.gather(run, until), ended_by=ending.ended_by)
        if keeper is not None and team.rank == 0 and not sampled.interrupted:
            chosen_values = dataclasses.asdict(chosen)
            keeper.merge(Saved(prepared.identity, chosen_values, vars(schedule), ending.gathered, prepared.reference))
        problems = team.gather("" if keeper is None else keeper.problem)
        problem = next(filter(None, problems if sampled.interrupted else problems[:1]), "")
    return dataclasses.replace(sampled, problem=problem)


def _keeps_state(prepared: Prepared) -> bool:
    """Whether the checkpoint of a run that is over has what its chains need to go on."""
    most = LARGE_MODEL if prepared.surroundings.team.size == 1 else _SENT
    return prepared.keeper is not None and prepared.objective.num_parameters <= most


class _Ending:
    """Says how far chains go, and when a run is over whose length is by need; all processes agree.

    Attributes:
        gathered: the traces of all processes, with what chains need to go on, where that is kept.
        ended_by: ``"target"``: λ̂ is known well enough. ``"budget"``, ``"time"``: it is not, and no more may be spent.
            ``"negative"``, ``"diverged"``: more steps would not help. Empty for a run of given length.
    """

    def __init__(self, prepared: Prepared, chosen: Chosen, setup: float) -> None:
        self._prepared, self._chosen, self._setup = prepared, chosen, setup
        self._settings, self._team = prepared.settings, prepared.surroundings.team
        self._began, self._done_before = time.perf_counter(), 0
        self.gathered: list[Traces] = []
        self.ended_by = ""

    def first(self, resumed: Sequence[Traces]) -> int:
        """Steps after which to look for the first time: where the chains are, if that was a time to look."""
        last = self._settings.longest.num_steps
        self._done_before = max((t.step for t in resumed if t.step < last), default=0)
        return self._agreed(self._within_time(self._look_from(max(self._done_before, 1)), 0))

    def gather(self, run: ChainRun, until: int) -> Sampled:
        """What all processes have done."""
        keeps_state = _keeps_state(self._prepared)
        mine = [t if keeps_state else dataclasses.replace(t, state=None) for t in run.traces]
        runs = self._team.gather(([t.to_arrays() for t in mine], run.interrupted)) if self._team.size > 1 else []
        traces = [Traces.from_arrays(*t) for found, _ in runs for t in found] if runs else mine
        interrupted = run.interrupted or any(stopped for _, stopped in runs)
        self.gathered = traces
        steps_done = [t.step for t in traces for _ in t.chains]
        stacked = Traces.stack([dataclasses.replace(t, state=None) for t in traces])
        return Sampled(stacked, steps_done, until, run, interrupted, seconds_of_setup=self._setup)

    def following(self, sampled: Sampled) -> int:
        """Steps after which to look next; 0: the run is over."""
        if sampled.interrupted:
            return 0
        until = sampled.until
        is_last = until >= self._settings.longest.num_steps
        if until in self._settings.looks:
            self.ended_by = self._reason_to_end(sampled) or ("budget" if is_last else "")
        following = 0
        if not self.ended_by:
            following = self._within_time(self._look_from(until + 1), until)
            self.ended_by = "" if following else "time"
        agreed = self._team.gather([following, self.ended_by])[0]
        self.ended_by = agreed[1]
        return int(agreed[0])

    def _agreed(self, steps: int) -> int:
        return int(self._team.gather(steps)[0])

    def _look_from(self, step: int) -> int:
        looks = self._settings.looks or (self._settings.longest.num_steps,)
        return next((look for look in looks if look >= step), looks[-1])

    def _within_time(self, look: int, until: int) -> int:
        """As many of these steps as there is time for, by what steps have taken so far; 0: none."""
        most = self._settings.max_seconds
        if most is None:
            return look
        now, between = time.perf_counter(), self._settings.num_steps_bw_draws
        if until <= self._done_before:  # nobody knows yet what a step takes
            return min(look, self._done_before + UNUSED + 2 * between)
        speed = (until - self._done_before) / (now - self._began)
        affordable = int(_TIME_SHARE * speed * (most - (now - self._prepared.surroundings.started)))
        affordable -= affordable % between
        return min(look, until + affordable) if affordable > 0.01 * until else 0

    def _reason_to_end(self, sampled: Sampled) -> str:
        result = report(self._prepared, self._chosen, sampled)
        if not self._chosen.nbeta:  # λ̂ is known: it is the draws that somebody wants
            if not result.kept_draws.size:
                return "diverged"
            return "target" if (result.diagnostics["ess_bulk"] or 0.0) >= _PRIOR_ESS else ""
        codes = {warning.code for warning in result.warnings}
        if not result.kept_draws.size:
            return "diverged"
        if "negative" in codes and self._settings.target:
            return "negative"
        # A standard error that is small by chance would end the run just when it is wrong: those of shorter chains say
        # what it should be by now.
        earlier = [error / 2 ** (k / 2) for k, error in enumerate(result.diagnostics["growth_stderrs"][-2:-5:-1], 1)]
        lucky = max(0.0, float(np.mean(earlier or [0.0])) - result.llc_stderr) / abs(result.llc_mean or math.inf)
        is_known = result.relative_error + lucky <= self._settings.target and not codes & LENGTH_CODES
        return "target" if is_known else ""


def sensitivity_of(prepared: Prepared, chosen: Chosen, sampled: Sampled) -> Sensitivity | None:
    """How λ̂ answers to nβ and γ, by twins of the chains; None if somebody stopped them, or the chains before."""
    settings, team = prepared.settings, prepared.surroundings.team
    start = sampled.traces.ends
    if sampled.interrupted or start is None:
        return None
    sampler, _ = completed(settings, chosen)
    if sampler.kind == "metropolis" and vars(sampler)["adapt_steps"]:
        last = sampled.traces.steps["lr"][:, sampled.until - 1]
        last = last[np.isfinite(last)]
        sampler = dataclasses.replace(sampler, lr=float(np.exp(np.log(last).mean()))) if last.size else sampler
    schedule, chains = twin_schedule(sampled.until), team.share(settings.num_chains)
    with prepared.surroundings.interrupts.stopping() as stop, team.stopping(stop):
        found = twin_traces(
            prepared.objective,
            sampler,
            schedule,
            sampled.run.plan,
            prepared.reference_losses,
            init_loss=chosen.init_loss,
            bias_correction=chosen.bias_correction,
            start=start,
            seed=settings.seed,
            chains=chains,
            stop=stop,
        )
        parts = team.gather(found)
    if any(part is None for part in parts):
        return None
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    each = sampler.trajectory()[0] if sampler.kind == "metropolis" else 1  # type: ignore[attr-defined]
    gradients = len(joined) * settings.num_chains * schedule.num_steps * each
    return slopes_of(joined, 2 * math.log(HALF_FACTOR), gradients)


class _RunMonitor(Monitor):
    """Shows progress, and keeps the checkpoint."""

    def __init__(self, prepared: Prepared, chosen: Chosen, schedule: Schedule, chains: range) -> None:
        self._prepared, self._chosen, self._schedule = prepared, chosen, schedule
        settings, team = prepared.settings, prepared.surroundings.team
        wanted = settings.progress
        title = "LLC" if team.size == 1 else f"LLC (1 of {team.size} processes)"
        shown = wanted if callable(wanted) or (wanted and team.rank == 0) else False
        self._progress = make_progress(shown, len(chains) * schedule.num_steps, title)
        self._num_chains = len(chains)

    def __enter__(self) -> _RunMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def until(self, steps: int) -> None:
        """So many steps of each chain are to be done now."""
        self._progress.extend(self._num_chains * steps)

    def report(self, traces: Callable[[], list[Traces]], steps: int) -> None:
        if self._progress.is_shown:
            self._progress.update(steps, self._llc_so_far(traces()))

    def _llc_so_far(self, traces: list[Traces]) -> float:
        """λ̂ of the steps since burn-in, without chains that diverged; NaN before."""
        chosen, means = self._chosen, list[float]()
        for t in traces:
            by_need = self._prepared.settings.by_need
            steps = slice(max(self._schedule.num_burnin, t.step // 2 if by_need else 0), t.step)
            if t.step > steps.start:
                rows = losses_of_draws(t, chosen, steps)
                means += [float(row.mean()) for row in rows if np.isfinite(row).all()]
        return chosen.nbeta * (float(np.mean(means)) - chosen.init_loss) if means else math.nan

    def wants_snapshot(self) -> bool:
        return self._prepared.keeper is not None and self._prepared.keeper.is_due

    def snapshot(self, traces: list[Traces]) -> None:
        self.report(lambda: traces, sum(t.step * len(t.chains) for t in traces))
        if self._prepared.recorder is not None:
            self._prepared.recorder.snapshot(traces)
        if self._prepared.keeper is not None:
            chosen = dataclasses.asdict(self._chosen)
            saved = Saved(dict(self._prepared.identity), chosen, vars(self._schedule), traces, self._prepared.reference)
            self._prepared.keeper.save(saved)


def losses_of_draws(traces: Traces, chosen: Chosen, steps: slice = slice(None)) -> NDArray[np.float64]:
    """The losses of these steps that λ̂ is made of, ``[chain, step]``, about L(w*) as it was before the draws."""
    rows = _corrected(traces, chosen, steps)
    if REFERENCE_LOSS in traces.steps:
        rows = rows - np.nan_to_num(traces.steps[REFERENCE_LOSS][:, steps], nan=chosen.init_loss)
        rows += chosen.init_loss
    return rows


def _corrected(traces: Traces, chosen: Chosen, steps: slice = slice(None)) -> NDArray[np.float64]:
    """The losses of these steps, less the bias where it is corrected for."""
    losses = traces.loss[:, steps]
    if not chosen.bias_correction:
        return losses
    with np.errstate(invalid="ignore"):  # of a chain that diverged
        corrected: NDArray[np.float64] = losses - traces.steps["bias"][:, steps] / chosen.nbeta
    return corrected


def may_begin_again(prepared: Prepared, chosen: Chosen, sampled: Sampled) -> bool:
    """Whether most chains diverged, with a step size that was chosen for them and can be smaller."""
    if prepared.settings.lr is not None or sampled.interrupted or chosen.restarts >= MAX_RESTARTS:
        return False
    losses = _corrected(sampled.traces, chosen, slice(sampled.until))  # as the report has them
    diverged = ~np.isfinite(losses).all(axis=1)
    return bool(2 * diverged.sum() > len(losses)) and prepared.settings.template.kind != "metropolis"


# ---- report ------------------------------------------------------------------------------------------------


def report(prepared: Prepared, chosen: Chosen, sampled: Sampled) -> LLCResult:
    """The result, examined."""
    settings, objective, run = prepared.settings, prepared.objective, sampled.run
    sampler, planned = completed(settings, chosen)
    traces, schedule = _so_far(sampled, settings)
    planned = schedule if settings.by_need else planned
    losses = _corrected(traces, chosen).copy()
    losses[(~np.isfinite(losses)).cumsum(axis=1) > 0] = np.nan
    result = LLCResult(
        loss_trace=losses,
        init_loss=chosen.init_loss,
        nbeta=chosen.nbeta,
        schedule=schedule,
        settings={
            "sampler": sampler.name,
            "lr": chosen.lr,
            "nbeta": chosen.nbeta,
            "bias_correction": chosen.bias_correction,
            "localization": sampler.localization,
            **{name: value for name, value in _options(sampler).items() if isinstance(value, (bool, int, float, str))},
            **_metric_settings(prepared.metric, sampler),
            "num_chains": settings.num_chains,
            "num_burnin": planned.num_burnin,
            "num_draws": planned.num_draws,
            "num_steps_bw_draws": planned.num_steps_bw_draws,
            "batch_size": objective.source.batch_size,
            "num_samples": objective.source.num_samples,
            **_loss_settings(objective),
            **({} if settings.preset is None else {"preset": settings.preset}),
            **({"refine": settings.refine} if settings.refine else {}),
            **({} if (selected := described(settings.params)) is None else {"params": selected}),
            "num_parameters": objective.num_parameters,
            "control_variate": prepared.reference_losses.pairing in ("samples", "passes"),
            "device": str(objective.device),
            "seed": settings.seed,
            "training_mode": prepared.mode.is_training,
            "strategy": run.plan.strategy,
            "seconds": time.perf_counter() - prepared.surroundings.started,
        },
        traces={name: values for name, values in traces.steps.items() if name != LOSS},
        ends=traces.ends if settings.keep_ends and not sampled.interrupted else None,
        observables=traces.draws,
        steps_done=[min(s, schedule.num_steps) for s in sampled.steps_done] if sampled.interrupted else None,
    )
    result, init_loss_stderr = _with_reference(result, chosen, objective)
    saved = prepared.saved
    result.diagnostics.update(
        strategy_reason="; ".join(
            filter(None, (run.plan.reason, run.note and f"not recorded: {run.note}", run.by_python, run.metric))
        ),
        unpaired_reason=chosen.unpaired_reason,
        paired_with=prepared.reference_losses.pairing,
        shortened=prepared.shortened,
        restarts=chosen.restarts,
        ended_by=sampled.ended_by,
        seconds_of_data=run.seconds_of_data,
        chains_per_group=run.plan.group_size,
        workers=run.plan.num_workers,
        seconds_of_setup=sampled.seconds_of_setup,
        resumed_steps=0 if saved is None else _steps_of(saved),
    )
    if chosen.pilot_bias_share is not None:
        share = None if math.isnan(chosen.pilot_bias_share) else chosen.pilot_bias_share
        result.diagnostics.update(pilot_steps=chosen.pilot_steps, pilot_bias_share=share)
    if chosen.reason:
        result.diagnostics["sampler_reason"] = chosen.reason
    if (metric := prepared.metric) is not None:
        result.diagnostics.update(metric_gradients=metric.gradients, metric_undetermined=metric.undetermined)
    if chosen.refined is not None:
        result.diagnostics.update({f"refine_{name}": value for name, value in chosen.refined.items()})
    if sampler.kind == "metropolis":
        if vars(sampler)["adapt_steps"]:
            result.settings["lr"] = _adapted_lr(result)
        result.diagnostics["gradients_per_draw"] = sampler.trajectory()[0] * schedule.num_steps_bw_draws  # type: ignore[attr-defined]
    if settings.by_need:
        result.diagnostics["target_error"] = settings.target
    examine(result, _facts(prepared, chosen, sampler, sampled, traces, init_loss_stderr))
    return result


def _so_far(sampled: Sampled, settings: Settings) -> tuple[Traces, Schedule]:
    """The traces, and which steps are draws.

    Those that were planned; or, where the length is by need and of a run that was interrupted before the first of them,
    the second half of what there is, the best estimate that can be had.
    """
    traces, planned = sampled.traces, settings.longest
    reached = max((steps for steps in sampled.steps_done if steps <= sampled.until), default=sampled.until)
    between = planned.num_steps_bw_draws
    if settings.by_need and reached >= planned.num_burnin + 2 * between:
        burnin = max(reached // 2 // between * between, planned.num_burnin)
        schedule = Schedule((reached - burnin) // between, burnin, between)
        first = (burnin - planned.num_burnin) // between
        draws = {name: values[:, first : first + schedule.num_draws] for name, values in traces.draws.items()}
    elif sampled.interrupted and reached >= 2 and not len(range(reached)[planned.draws]):
        schedule, draws = Schedule(reached - reached // 2, reached // 2), {}
    else:
        return traces, planned
    steps = {name: values[:, : schedule.num_steps] for name, values in traces.steps.items()}
    checks = traces.checks
    if settings.by_need:
        places = check_steps(planned, settings.first_look)[0]
        checks = checks[:, [schedule.num_burnin <= step < schedule.num_steps for step in places]]
    return dataclasses.replace(traces, steps=steps, draws=draws, checks=checks), schedule


def _with_reference(result: LLCResult, chosen: Chosen, objective: Objective) -> tuple[LLCResult, float]:
    """The result with L(w*), and the error of L(w*) that is part of λ̂'s.

    Where draws were evaluated at w* too, L(w*) is the mean of that over the draws that λ̂ is the mean of. Its error is
    then no part of λ̂'s, but for rounding.
    """
    reference = result.traces.get(REFERENCE_LOSS)
    if reference is None:
        return result, chosen.init_loss_stderr
    at_draws = reference[result.kept_chains, result.schedule.draws][:, : result.kept_draws.shape[1]]
    init_loss = float(at_draws.mean()) if at_draws.size else chosen.init_loss
    rounding = objective.rounding * abs(init_loss)
    return dataclasses.replace(result, init_loss=init_loss), rounding


def _steps_of(saved: Saved) -> int:
    """The steps of all chains; of a chain that several files have, the most."""
    steps: dict[int, int] = {}
    for t in saved.traces:
        steps |= {chain: max(t.step, steps.get(chain, 0)) for chain in t.chains}
    return sum(steps.values())


def _adapted_lr(result: LLCResult) -> float:
    """The geometric mean of the chains' step sizes after their last draws; before the first draw, what was given."""
    rows = result.traces["lr"][:, result.schedule.draws]
    last = [row[np.isfinite(row)][-1] for row in rows if np.isfinite(row).any()]
    return math.exp(float(np.log(last).mean())) if last else float(result.settings["lr"])


def _facts(
    prepared: Prepared, chosen: Chosen, sampler: Sampler, sampled: Sampled, traces: Traces, init_loss_stderr: float
) -> Facts:
    objective, options, at_reference = prepared.objective, vars(sampler), prepared.reference_losses
    settings = prepared.settings
    planned_steps = settings.num_chains * (sampled.until if settings.by_need else settings.longest.num_steps)
    adapts, norm = sampler.kind == "metropolis" and bool(options["adapt_steps"]), reference_norm(sampler, objective)
    return Facts(
        step_checks=traces.checks,
        reference_norm=norm,
        init_loss_stderr=init_loss_stderr,
        planned_steps=planned_steps,
        in_calibration=chosen.is_interrupted,
        descent=None if chosen.descent is None else Descent(*(tuple(values) for values in chosen.descent)),
        wells=None if chosen.wells is None or chosen.sampler else Wells(*chosen.wells),
        time_of_step=(sampler.lr or 0.0) / float(options.get("momentum_decay", 1.0)),
        refining_passes=None if chosen.refined is None else chosen.refined["passes"],
        local_localization=default_localization(objective.num_parameters, norm),
        random_modules=prepared.mode.random_modules,
        batch_statistics=prepared.mode.batch_statistics,
        not_sampled=objective.not_sampled,
        writes_parameters=objective.trial.writes_parameters,
        data_notes=_data_notes(objective),
        standing=None if at_reference.is_still else at_reference.standing,
        unused_parameters=list(objective.trial.unused),
        checkpoint_problem=sampled.problem,
        resumable=prepared.keeper is not None,
        target_acceptance=options["target_acceptance"] if adapts else None,
        injected_noise=sampler.injected_noise(options),
        euclidean=sampler.metric == "identity" or sampler.localizes_in_metric,
    )


def _metric_settings(metric: CurvatureMetric | None, sampler: Sampler) -> dict[str, Any]:
    """What settings say of a metric that was estimated, or given as tensors."""
    if metric is not None:
        return {"preconditioner": CURVATURE, "curvature": metric.method}
    is_number = isinstance(getattr(sampler, "preconditioner", 1.0), (int, float))
    return {} if is_number else {"preconditioner": GIVEN}


def _options(sampler: Sampler) -> dict[str, Any]:
    """The options of a sampler that are not its defaults, apart from what every sampler is given."""
    given = {f.name: (f.default, getattr(sampler, f.name)) for f in dataclasses.fields(sampler)}
    shared = ("lr", "nbeta", "localization")
    return {k: value for k, (default, value) in given.items() if k not in shared and value is not default}


def _norm(objective: Objective) -> float:
    """‖w*‖ over the elements that are sampled."""
    moving = ((w[objective.masks[k]] if k in objective.masks else w) for k, w in objective.reference.items())
    return math.hypot(*(float(torch.linalg.vector_norm(w)) for w in moving))


def _random_modules(objective: Objective) -> list[str]:
    """Modules in training mode that make the loss depend on dropout or batch statistics."""
    training = [(name, module) for name, module in objective.model.named_modules() if module.training]
    found = [name for name, module in training if normalizes_batches(module)]
    if objective.trial.is_random and training:
        found += [name for name, module in training if drops(module)] or ["it draws random numbers"]
    return found


def _data_notes(objective: Objective) -> dict[str, str]:
    """What is to be said of the data, by code."""
    notes = dict(objective.source.sampling.notes)
    if not objective.trial.is_reproducible:
        notes.setdefault(
            "irreproducible",
            "The loss is another one each time it is evaluated, though all random generators are in the same state (a "
            "clock, a counter, state of the model's own?), so equal seeds do not give equal results.",
        )
    return notes


def _batch_statistics(model: nn.Module) -> list[str]:
    """Modules in evaluation mode that use the statistics of the minibatch, having no others."""
    modules = ((name, module) for name, module in model.named_modules() if not module.training)
    return [name for name, module in modules if normalizes_batches(module) and module.running_mean is None]


# ---- devices -----------------------------------------------------------------------------------------------


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a torch.device on which memory can be had; a ValueError that says why if not."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} can't be used: {error}") from None
    return where


def _device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model has parameters on several devices ({names}): pass device= to compute on one")
    return devices.pop() if devices else torch.device("cpu")


def _num_elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
