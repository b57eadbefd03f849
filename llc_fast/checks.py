"""Reasons not to trust an estimate: a statistic, a threshold, a sentence and a stable code for each.

:func:`examine` computes the statistics (``result.diagnostics``) and warns (``result.warnings``). A check is a function
with the decorator ``_check``; its place in this file is that of its warning in the list. The codes:

=================  =====================================================================================================
training-mode      the model is in training mode, and dropout or batch statistics enter its loss
batch-statistics   the model is in evaluation mode, and normalizes by the statistics of the minibatch all the same
unused             the loss does not depend on some of the sampled parameters
no-gradient        the loss depends on elements that have no gradient; they were not sampled
writes-parameters  forward passes write to parameters, so that chains are projected
unshuffled         a loader gives the same minibatches in the same order to all chains
dropped            a loader never gives the samples at the end of the data set
num-samples        n may be meant to be another number
irreproducible     the data are others in every run, whatever the seed
standing-still     a chain that stands still would not have λ̂ = 0
no-minimum         the gradient at w*, or the chains, lead down from it: w* is no minimum at this nβ
gradient           the gradient is not the derivative of the loss where the chains are
diverged           the loss of some chains became non-finite
partial            the run was interrupted
checkpoint         the checkpoint could not be written
acceptance         a Metropolis-adjusted chain accepts too few proposals
adaptation         the acceptance of Metropolis-adjusted chains is far from the one that their step size was adapted to
bias               the bias that was subtracted from λ̂ is too large to be subtracted safely
step-size          the step size is too large: its bias, which was not subtracted, is a large share of λ̂
short              a chain is shorter than a few relaxation times of its stiffest directions: it has hardly left w*
ess                the effective sample size is too small
rhat               the chains have not converged to the same distribution
slow               a chain spans few autocorrelation times of its slow fluctuations
trend              the loss trace still has a trend
unresolved         λ̂ still grows with the length of the chains, slowly and in all of them alike
burnin             burn-in ended before the loss reached its plateau
left               chains left the neighbourhood of w*
far                the draws are further from w* than w* is from 0
spikes             spikes of the loss make up a part of λ̂
init-loss          L(w*) is not known precisely enough
negative           λ̂ is negative
above-bound        λ̂ is above P/2, the maximum at a local minimum
imprecise          the standard error is a large share of λ̂
=================  =====================================================================================================

A threshold is chosen so that fewer than one in a hundred good runs exceeds it by chance, and that what exceeds it
matters. The tests hold both. ``docs/warnings.md``, which ``llc-fast explain`` prints, has an entry for each code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llc_fast.objective.curvature import Descent
from llc_fast.result import LLCResult
from llc_fast.result import Warning as Warning
from llc_fast.stats import convergence
from llc_fast.stats.errors import standard_error
from llc_fast.stats.growth import growth
from llc_fast.stats.limits import (
    ACCEPTABLE_BIAS,
    BURNIN_EFFECT,
    MAX_BIAS,
    MAX_DESCENT,
    MAX_GRADIENT_ERROR,
    MAX_INIT_LOSS_SENSITIVITY,
    MAX_OFF_TARGET,
    MAX_R_HAT,
    MAX_RELATIVE_ERROR,
    MAX_SPIKES,
    MAX_SPREAD,
    MAX_SUBTRACTED_BIAS,
    MIN_ACCEPTANCE,
    MIN_ESS,
    MIN_METROPOLIS_ACCEPTANCE,
    MIN_RELAXATIONS,
    MIN_SLOW_TIMES,
    REGULAR_SLACK,
    TARGET_BIAS,
    TREND_ERRORS,
    TREND_SIZE,
    UNRESOLVED_ERRORS,
    UNRESOLVED_SIZE,
    VALUE_ERRORS,
)
from llc_fast.stats.response import UNKNOWN, Response, response_if_settled, response_of_path
from llc_fast.stats.step_checks import step_check_statistics
from llc_fast.stats.traces import burnin_needed, chain_spread, fall, slow_part, spike_share, trend
from llc_fast.stats.wells import Wells

COARSEST = 0.02
"""ε·γ above which a path is too coarse for a derivative that treats time as continuous; such chains settle in some
fifty steps, and the covariance of their draws will do."""
MAX_SLOPE_ERROR = 0.25
"""Standard error of dλ̂/dlog γ, as a share of λ̂, above which it is not told."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What the checks need to know beyond the result itself.

    Attributes:
        step_checks: of all chains, ``[chain, check, column]``, see :data:`llc_fast.stats.step_checks.COLUMNS`.
        reference_norm: ‖w*‖ over the parameters that are sampled, in the metric of the localization.
        init_loss_stderr: what L(w*) adds to the standard error of λ̂, over nβ: rounding.
        planned_steps: of all chains.
        in_calibration: whether the run was interrupted while pilot chains chose its step size.
        descent: the way down from w*, in the quadratic model of nβ·L + γ/2·‖w − w*‖²; None: unknown.
        wells: the curvatures at w* that chains in the Euclidean metric have to cross; None: unknown, or another metric.
        time_of_step: ε, or ε/α with momentum.
        refining_passes: passes over the data that w* was made better with; None: it was not.
        local_localization: the γ that keeps chains nearer to w* than w* is to 0.
        injected_noise: variance of the noise that a step injects, over ε·p; NaN: unknown.
        euclidean: whether the localization is in the sampler's metric, which is 1 or given.
        target_acceptance: of Metropolis-adjusted chains that adapted their step size; None of all others.
        random_modules: what makes the loss of a model in training mode random, by the names of modules.
        batch_statistics: names of modules in evaluation mode that normalize by the minibatch's own statistics.
        not_sampled: elements that were not sampled, as the loss depends on them and they have no gradient, by
            parameter.
        writes_parameters: whether forward passes write to parameters.
        data_notes: what is to be said of the data, by code, see :class:`llc_fast.batches.Sampling`.
        standing: λ̂ of a chain that stands still, where it is not 0, and its standard error; None: it is 0.
        unused_parameters: names of sampled parameters that the loss does not depend on.
        checkpoint_problem: why the checkpoint could not be written; empty: it could.
        resumable: whether there is a checkpoint that an interrupted run can be resumed from.
    """

    step_checks: NDArray[np.float64]
    reference_norm: float
    init_loss_stderr: float = 0.0
    planned_steps: int = 0
    in_calibration: bool = False
    descent: Descent | None = None
    wells: Wells | None = None
    time_of_step: float = math.nan
    refining_passes: int | None = None
    local_localization: float = 1.0
    injected_noise: float = math.nan
    euclidean: bool = False
    target_acceptance: float | None = None
    random_modules: Sequence[str] = ()
    batch_statistics: Sequence[str] = ()
    not_sampled: Mapping[str, int] = field(default_factory=dict)
    writes_parameters: bool = False
    data_notes: Mapping[str, str] = field(default_factory=dict)
    standing: tuple[float, float] | None = None
    unused_parameters: Sequence[str] = ()
    checkpoint_problem: str = ""
    resumable: bool = False


def examine(result: LLCResult, facts: Facts) -> None:
    """Compute ``result.diagnostics`` and append to ``result.warnings``."""
    result.diagnostics.update(_diagnostics(result, facts))
    case = _Case(result, facts, result.kept_draws, result.llc_mean, result.llc_stderr)
    found: set[str] = set()
    for check in _CHECKS:
        if not result.nbeta and (check.needs_llc or check.code in _NEED_LOSS):  # λ̂ is 0, and known
            continue
        if case.draws.size >= check.min_draws and not found.intersection(check.unless):
            message = check.look(case)
            if message is not None:
                found.add(check.code)
                result.warnings.append(Warning(message, check.code))


# ---- statistics --------------------------------------------------------------------------------------------


def _diagnostics(result: LLCResult, facts: Facts) -> dict[str, Any]:
    """Statistics by name, plain numbers and lists; None where one can't be computed. Diverged chains are left out."""
    schedule, draws, chains, llc = result.schedule, result.kept_draws, result.kept_chains, result.llc_mean
    lr, localization, num_parameters = (result.settings[k] for k in ("lr", "localization", "num_parameters"))
    seen = step_check_statistics(
        facts.step_checks[chains],
        lr=lr,
        num_parameters=num_parameters,
        localization=localization if facts.euclidean else 0.0,
        injected_noise=facts.injected_noise,
    )
    moved, slow, slope = trend(draws), slow_part(draws), _localization_slope(result, facts)
    losses = draws if result.nbeta else replace(result, nbeta=1.0).kept_draws
    norm = math.sqrt(sum(d * d for d in seen.distance) / len(seen.distance)) if seen.distance else math.nan
    steps = draws.shape[1] * schedule.num_steps_bw_draws
    needed = burnin_needed(result.loss_trace[chains, : schedule.num_burnin + steps])
    missed, down = _draws_before(needed, result), facts.descent
    grown = growth(result.excess_trace[chains, : schedule.num_burnin + steps])
    significant = grown.missing if grown.is_significant else 0.0
    numbers = {
        "chains_diverged": len(result.diverged_chains),
        "r_hat": convergence.r_hat(losses),
        "ess_bulk": convergence.ess_bulk(losses),
        "ess_tail": convergence.ess_tail(losses),
        "chain_spread": chain_spread(draws),
        "slow_times": slow.times,
        "slow_size": slow.size,
        "trend": moved.value,
        "trend_stderr": moved.stderr,
        "growth": grown.rate,
        "growth_stderr": grown.rate_stderr,
        "unresolved": significant if math.isfinite(grown.missing) else math.nan,
        "extrapolation": grown.likely,
        "extrapolation_stderr": grown.likely_stderr,
        "burnin_needed": needed,
        "burnin_effect": llc - float(draws[:, missed:].mean()) if 0 < missed < draws.shape[1] else 0.0,
        "spike_share": spike_share(draws),
        "init_loss_stderr": facts.init_loss_stderr,
        "init_loss_sensitivity": result.nbeta * facts.init_loss_stderr / abs(llc) if llc else math.nan,
        "bias_share": _bias_share(result),
        "acceptance": seen.acceptance,
        "gradient_noise_share": seen.gradient_noise_share,
        "relaxations": seen.relaxation_rate * steps,
        "gradient_error": seen.gradient_error,
        "distance_over_prior": norm**2 * localization / num_parameters,
        "unreached": _unreached(result, facts, steps),
        "descent": math.nan if down is None else down.of_posterior(result.nbeta, localization),
        "descent_loss": math.nan if down is None else down.of_loss(result.nbeta, localization),
        "fall": fall(_excess(result)),
        "reach": _reach(result, facts.reference_norm),
        "localization_slope": slope.value,
        "localization_slope_stderr": slope.stderr,
        "distance_over_reference": norm / facts.reference_norm if facts.reference_norm else math.nan,
        "distance_growth": seen.distance_growth,
    }
    found: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    far = [(c, t) for c, d, t in zip(chains, seen.distance, draws, strict=False) if d > facts.reference_norm > 0]
    found |= {"growth_means": list(grown.means), "growth_stderrs": list(grown.stderrs)}
    found |= {"distance": seen.distance, "chains_left": [chain for chain, trace in far if _rises(trace)]}
    return found | _metropolis_diagnostics(result)


def _unreached(result: LLCResult, facts: Facts, steps: int) -> float:
    """What λ̂ lacks by the curvatures at w*, after so many steps of draws."""
    if facts.wells is None or not result.nbeta:
        return math.nan
    pull = float(result.settings["localization"]) + float(result.settings.get("weight_decay") or 0.0)
    burnin = result.schedule.num_burnin
    return facts.wells.unreached(result.nbeta, pull, facts.time_of_step, burnin, burnin + steps)


def _metropolis_diagnostics(result: LLCResult) -> dict[str, Any]:
    """Of chains whose proposals are accepted or rejected: acceptance and step sizes; nothing of others."""
    known = [
        [row[np.isfinite(row)] for row in result.traces.get(name, np.empty((0, 0)))[:, result.schedule.draws]]
        for name in ("acceptance", "lr")
    ]
    if not any(map(len, known[0])):
        return {}
    rates = [float(row.mean()) if len(row) else math.nan for row in known[0]]
    sizes = [float(row[-1]) if len(row) else math.nan for row in known[1]]
    return {"acceptance": float(np.nanmean(rates)), "acceptance_per_chain": rates, "lr_per_chain": sizes}


def _bias_share(result: LLCResult) -> float:
    """The share of step-size and gradient-noise bias in nβ·(L − L(w*)), the mean over draws before it is subtracted."""
    draws = result.kept_draws
    if result.bias_trace is None or not draws.size:
        return math.nan
    bias = float(result.bias_trace[result.kept_chains, result.schedule.draws][:, : draws.shape[1]].mean())
    total = result.llc_mean + (bias if result.settings.get("bias_correction") else 0.0)
    return bias / total if total > 0 else math.nan


def _excess(result: LLCResult) -> NDArray[np.float64]:
    """nβ·(L − L(w*)) of every step of the chains that are kept, with the bias that was subtracted from it."""
    steps = result.schedule.num_burnin + result.kept_draws.shape[1] * result.schedule.num_steps_bw_draws
    excess, bias = result.excess_trace[result.kept_chains, :steps], result.bias_trace
    if bias is not None and result.settings.get("bias_correction"):
        excess = excess + bias[result.kept_chains, :steps]
    return excess


def _reach(result: LLCResult, reference_norm: float) -> float:
    """The prior width of a weight over the root mean square weight, √(P/γ)/‖w*‖; NaN without either."""
    gamma = result.settings["localization"]
    return math.sqrt(result.settings["num_parameters"] / gamma) / reference_norm if gamma * reference_norm else math.nan


def _localization_slope(result: LLCResult, facts: Facts) -> Response:
    """dλ̂/dlog γ, and its standard error; unknown where the latter is too large a share of λ̂ to say anything."""
    draws, trace = result.kept_draws, result.traces.get("squared_distance")
    gamma, settings = float(result.settings["localization"]), result.settings
    if trace is None or not draws.size or not gamma:
        return UNKNOWN
    steps = np.arange(result.loss_trace.shape[1])[result.schedule.draws][: draws.shape[1]]
    path, distance = (x[result.kept_chains, : steps[-1] + 1] for x in (result.excess_trace, trace))
    if not np.isfinite(distance).all() or not np.isfinite(path).all():
        return UNKNOWN
    plain = not settings.get("weight_decay") and "bounding_box_size" not in settings
    # Noise of this variance a step, friction included.
    time_step = float(settings["lr"]) / facts.injected_noise if facts.injected_noise > 0 else math.nan
    if facts.euclidean and plain and gamma * time_step < COARSEST:
        found = response_of_path(path, distance, draws, steps, localization=gamma, time_step=time_step)
    else:
        found = response_if_settled(draws, distance[:, steps], localization=gamma)
    # In quadratic directions it is between −λ̂ and 0.
    return found if found.stderr <= MAX_SLOPE_ERROR * abs(result.llc_mean) else UNKNOWN


def _draws_before(step: float, result: LLCResult) -> int:
    return max(0, math.ceil((step - result.schedule.num_burnin) / result.schedule.num_steps_bw_draws))


def _rises(trace: NDArray[np.float64]) -> bool:
    """Whether the loss of one chain goes up, among its draws."""
    moved = trend(trace[None])
    return moved.value > max(TREND_ERRORS * moved.stderr, TREND_SIZE * abs(float(trace.mean())))


# ---- what a check is ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Case:
    """What a check looks at; ``case["r_hat"]`` is a diagnostic, NaN, for which every comparison is false, if None."""

    result: LLCResult
    facts: Facts
    draws: NDArray[np.float64]
    llc: float
    stderr: float

    def __getitem__(self, name: str) -> float:
        value = self.result.diagnostics.get(name)
        return math.nan if value is None else float(value)

    @property
    def lr(self) -> float:
        return float(self.result.settings["lr"])

    @property
    def stronger_localization(self) -> float:
        return float(10 * self.result.settings["localization"] or 1)

    @property
    def disagrees(self) -> bool:
        """Whether the chains have different distributions."""
        differs = self["chain_spread"] > 1 and self.result.llc_std > MAX_SPREAD * abs(self.llc)
        return self["r_hat"] > MAX_R_HAT or differs


_Look = Callable[[_Case], str | None]


@dataclass(frozen=True)
class _Check:
    """See :func:`_check`."""

    code: str
    look: _Look
    min_draws: int
    unless: tuple[str, ...]

    @property
    def needs_llc(self) -> bool:
        """Whether it asks if λ̂ can be trusted; "short" asks whether the chains have moved."""
        return bool(self.min_draws) and self.code != "short"


_NEED_LOSS = ("standing-still", "no-minimum")
"""Checks that look at nβ·L before there is an estimate."""
_CHECKS: list[_Check] = []


def _check(code: str, *, min_draws: int = MIN_ESS, unless: tuple[str, ...] = ()) -> Callable[[_Look], _Look]:
    """Make a check of a function that returns the message of its warning, or None.

    Args:
        code: of the warning.
        min_draws: with fewer draws in all there is nothing to be seen; 0: the check needs no estimate.
        unless: codes of earlier warnings that say the same, or make this one meaningless.
    """

    def register(look: _Look) -> _Look:
        _CHECKS.append(_Check(code, look, min_draws, unless))
        return look

    return register


def _rounded(count: float) -> int:
    """Upwards to two digits: num_draws=19000, not 18733."""
    unit = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return int(math.ceil(count / unit) * unit)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ---- model and run -----------------------------------------------------------------------------------------


@_check("training-mode", min_draws=0)
def _training_mode(case: _Case) -> str | None:
    if not case.facts.random_modules:
        return None
    return (
        "The model is in training mode and its loss depends on dropout or batch statistics "
        f"({_some(case.facts.random_modules)}), so λ̂ is that of a random loss. Call model.eval() unless this is meant."
    )


@_check("batch-statistics", min_draws=0)
def _batch_statistics(case: _Case) -> str | None:
    names = case.facts.batch_statistics
    if not names:
        return None
    return (
        "The model is in evaluation mode, but normalizes by the batch statistics of each minibatch, having no running "
        f"statistics ({_some(names)}): its loss depends on batch_size. Use track_running_stats=True unless this is so "
        "on purpose."
    )


@_check("unused", min_draws=0)
def _unused(case: _Case) -> str | None:
    names = case.facts.unused_parameters
    if not names:
        return None
    return (
        f"The loss does not depend on {len(names)} of the parameters ({_some(names)}): they only diffuse, and count as "
        "parameters in the diagnostics. Leave them out with params=."
    )


@_check("no-gradient", min_draws=0)
def _no_gradient(case: _Case) -> str | None:
    found = case.facts.not_sampled
    if not found:
        return None
    return (
        f"{sum(found.values())} elements have no gradient, whether or not the loss depends on them "
        f"({_some(list(found))}: padding_idx, detached parts, hooks?): they were not sampled and stayed at w*. Leave "
        "them out with params= if this is meant."
    )


@_check("writes-parameters", min_draws=0)
def _writes_parameters(case: _Case) -> str | None:
    if not case.facts.writes_parameters:
        return None
    return (
        "The model's forward pass writes to its parameters (max_norm, weight clipping): chains are projected in the "
        "same way, and λ̂ is that of the constrained parameters. Use a parametrization if the loss is meant to be a "
        "function of all of them."
    )


@_check("unshuffled", min_draws=0)
def _unshuffled(case: _Case) -> str | None:
    return case.facts.data_notes.get("unshuffled")


@_check("dropped", min_draws=0)
def _dropped(case: _Case) -> str | None:
    return case.facts.data_notes.get("dropped")


@_check("num-samples", min_draws=0)
def _num_samples(case: _Case) -> str | None:
    return case.facts.data_notes.get("num-samples")


@_check("irreproducible", min_draws=0)
def _irreproducible(case: _Case) -> str | None:
    return case.facts.data_notes.get("irreproducible")


@_check("standing-still", min_draws=0)
def _standing_still(case: _Case) -> str | None:
    if case.facts.standing is None:
        return None
    value, error = case.facts.standing
    return (
        f"A chain that stands still at w* would have λ̂ = {value:.3g} ± {error:.2g}, not 0: the loss of minibatches and "
        "L(w*) are not the same average, and λ̂ is off by about that much. Pass tensors, or a loader whose passes all "
        "have the same samples."
    )


_ROUND_DOWN = 2
"""Digits of an nβ that is recommended."""


@_check("no-minimum", min_draws=0)
def _no_minimum(case: _Case) -> str | None:
    llc = case.llc if case.draws.size else 0.0
    falls = [value for value in (case["descent"], case["fall"]) if value > MAX_DESCENT * max(abs(llc), 1.0)]
    if not falls:
        return None
    ways = []
    if case["descent"] in falls:
        ways.append(
            f"following the gradient from w* lowers nβ·L + γ/2·‖w − w*‖² by {case['descent']:.2g} or more, and nβ·L by "
            f"{case['descent_loss']:.2g}"
        )
    if case["fall"] > 0:
        ways.append(f"along the chains nβ·L falls to {case['fall']:.2g} below that of w*")
    owed = max(value for value in (case["descent_loss"], case["fall"]) if not math.isnan(value))
    beside = f": λ̂ = {llc:.3g} is lower by that, and would be about {llc + owed:.3g} at a minimum"
    return (
        f"w* is no minimum of the loss at nβ = {case.result.nbeta:.4g}: {'; '.join(ways)}"
        f"{beside if case.draws.size else ''}. Use {_ways_out(case, max(llc + owed, 1.0))}."
    )


def _ways_out(case: _Case, llc: float) -> str:
    """What to do where w* is no minimum, and λ̂ would be about this."""
    found, down, nbeta = [], case.facts.descent, case.result.nbeta
    passes = case.facts.refining_passes
    if passes is None:
        found.append("refine=True, which looks for a better minimum first")
    elif not case.result.diagnostics.get("refine_is_complete"):
        found.append(f"refine={4 * passes}, for more passes over the data than {passes}")
    found.append('loss_fn="behavioral", of which w* is the minimum')
    if down is not None and case["descent"] > 0:
        most = down.nbeta_for(0.5 * MAX_DESCENT * llc, nbeta, case.result.settings["localization"])
        if 1 < most < nbeta:
            unit = 10.0 ** (math.floor(math.log10(most)) - _ROUND_DOWN + 1)
            found.append(f"nbeta={math.floor(most / unit) * unit:.3g}, at which w* is one")
    return "; ".join(found) + "; or train the model to convergence"


@_check("gradient", min_draws=0)
def _gradient(case: _Case) -> str | None:
    error = case["gradient_error"]
    if not (error > MAX_GRADIENT_ERROR and not case["bias_share"] > MAX_SUBTRACTED_BIAS):
        return None
    return (
        f"Along the steps of chains the loss changes otherwise than its gradients say, by {error:.0%} (maximum "
        f"{MAX_GRADIENT_ERROR:.0%}): the gradient is not the derivative of the loss (hooks, clipping, a custom "
        "backward, a loss with jumps?), or the step size is far too large. Use the true gradient, or "
        f"lr={case.lr / 10:.2g}."
    )


@_check("diverged", min_draws=0)
def _diverged(case: _Case) -> str | None:
    count, chains = len(case.result.diverged_chains), len(case.result.loss_trace)
    if not count:
        return None
    rest = "λ̂ is computed from the others" if case.draws.size else "too few are left for an estimate"
    return (
        f"{count} of {chains} chains diverged (non-finite loss): {rest}. The step size is too large: "
        f"use lr={case.lr / 10:.2g}."
    )


@_check("partial", min_draws=0)
def _partial(case: _Case) -> str | None:
    if case.result.steps_done is None:
        return None
    done, steps = sum(case.result.steps_done), max(case.facts.planned_steps, case.result.loss_trace.size)
    if case.facts.in_calibration:
        return (
            f"The run was interrupted in calibration, before its first step. lr={case.lr:.3g} is what pilot chains had "
            "found so far."
        )
    if case.result.schedule.num_burnin < case.result.settings.get("num_burnin", 0):
        rest = (
            "no draw was made, so λ̂ is that of the second half of burn-in so far, and too low if that had not settled"
        )
    else:
        rest = "λ̂ is computed from the draws so far" if case.draws.size else "there is no draw yet"
    remedy = "The same call resumes it." if case.facts.resumable else "Use checkpoint= to make a run resumable."
    return f"The run was interrupted after {done} of {steps} steps: {rest}. {remedy}"


@_check("checkpoint", min_draws=0)
def _checkpoint(case: _Case) -> str | None:
    if not case.facts.checkpoint_problem:
        return None
    return (
        f"The checkpoint could not be written ({case.facts.checkpoint_problem}): the last good one was kept, and what "
        "came after is lost if the process ends. Free space there, or use another path."
    )


# ---- Metropolis-adjusted samplers --------------------------------------------------------------------------


@_check("acceptance", min_draws=0)
def _acceptance(case: _Case) -> str | None:
    rates = case.result.diagnostics.get("acceptance_per_chain", ())
    lowest = min((rate for rate in rates if math.isfinite(rate)), default=math.inf)
    if not lowest < MIN_METROPOLIS_ACCEPTANCE:
        return None
    return (
        f"Acceptance is {lowest:.1%} in the chain where it is lowest (minimum {MIN_METROPOLIS_ACCEPTANCE:.0%}): this "
        "chain hardly moves, and the standard error does not show the places that it has not reached. "
        f"Use lr={case.lr / 4:.2g}, or lr=None with a longer burn-in."
    )


@_check("adaptation", min_draws=0, unless=("acceptance",))
def _adaptation(case: _Case) -> str | None:
    target = case.facts.target_acceptance
    if target is None or not abs(case["acceptance"] - target) > MAX_OFF_TARGET:
        return None
    return (
        f"Acceptance is {case['acceptance']:.3g}, but the step size was adapted to {target:g}: burn-in was too short "
        "for the adaptation, or ended before equilibrium. Increase num_burnin, or use a fixed lr."
    )


# ---- step size ---------------------------------------------------------------------------------------------


@_check("bias", min_draws=1)
def _bias(case: _Case) -> str | None:
    share = case["bias_share"]
    if not case.result.settings.get("bias_correction") or not share > MAX_SUBTRACTED_BIAS:
        return None
    return (
        f"Step-size and gradient-noise bias was {share:.0%} of nβ·(L − L(w*)) (maximum {MAX_SUBTRACTED_BIAS:.0%}), too "
        f"much to be subtracted safely. Use lr={case.lr * TARGET_BIAS / share:.2g}, or a larger batch_size."
    )


@_check("step-size", min_draws=1)
def _step_size(case: _Case) -> str | None:
    # Where bias is subtracted, or proposals are accepted or rejected, neither number says anything about λ̂.
    if case.result.settings.get("bias_correction") or "acceptance" in case.result.traces:
        return None
    share, acceptance = case["bias_share"], case["acceptance"]
    low = acceptance < MIN_ACCEPTANCE
    seen = "" if math.isnan(acceptance) else f"MALA acceptance {acceptance:.2f}, minimum {MIN_ACCEPTANCE}"
    if share > MAX_BIAS or (low and share > ACCEPTABLE_BIAS):
        limits = "; ".join(filter(None, [f"maximum {ACCEPTABLE_BIAS if low else MAX_BIAS:.0%}", seen]))
        batch = ", or a larger batch_size" if case["gradient_noise_share"] > 0.5 else ""
        return (
            f"Step-size and gradient-noise bias is {min(share, 1):.0%} of λ̂ ({limits}): the step size is too large, "
            f"and λ̂ is too high by about that much. Use lr={case.lr * TARGET_BIAS / share:.2g}{batch}."
        )
    if low and math.isnan(share):
        return f"The step size is too large ({seen}): λ̂ is biased by an unknown amount. Use lr={case.lr / 10:.2g}."
    return None


# ---- length and convergence --------------------------------------------------------------------------------


@_check("short", min_draws=1)
def _short(case: _Case) -> str | None:
    relaxations = case["relaxations"]
    if not relaxations < MIN_RELAXATIONS:
        return None
    factor = 5 * MIN_RELAXATIONS / relaxations
    larger = max(1.0, min(factor, TARGET_BIAS / case["bias_share"] if case["bias_share"] > 0 else math.inf))
    cause = "the step size is too small, and the chains have" if larger > 1 else "the chains have"
    remedies = [f"lr={case.lr * larger:.2g}"] if larger > 1 else []
    remedies += [f"num_draws={_rounded(case.result.schedule.num_draws * factor / larger)}"] if larger < factor else []
    return (
        f"The draws of a chain span {relaxations:.2g} relaxation times of the stiffest directions (minimum "
        f"{MIN_RELAXATIONS}): {cause} hardly left w*. Use {' and '.join(remedies)}."
    )


@_check("ess", min_draws=1, unless=("short",))
def _ess(case: _Case) -> str | None:
    ess = min(0 if math.isnan(case["ess_bulk"]) else case["ess_bulk"], case.draws.size)
    if not (case.draws.size < MIN_ESS or (ess < MIN_ESS and not case.disagrees)):
        return None
    draws = _rounded(case.result.schedule.num_draws * 2 * MIN_ESS / max(ess, 1))
    return (
        f"Effective sample size is {ess:.0f} (minimum {MIN_ESS}): λ̂ and its standard error are unreliable. "
        f"Use num_draws={draws}."
    )


@_check("rhat", unless=("short",))
def _rhat(case: _Case) -> str | None:
    if not case.disagrees:
        return None
    means = case.draws.mean(axis=1)
    return (
        f"The chains have not converged to the same distribution (R̂ = {case['r_hat']:.2f}; λ̂ of single chains from "
        f"{means.min():.4g} to {means.max():.4g}). Use num_draws={4 * case.result.schedule.num_draws}; if plot() shows "
        "jumps, also increase localization."
    )


@_check("slow", unless=("short", "ess", "rhat"))
def _slow(case: _Case) -> str | None:
    times, size = case["slow_times"], case["slow_size"]
    if not (times < MIN_SLOW_TIMES and size > MAX_SPREAD * abs(case.llc)):
        return None
    draws = _rounded(case.result.schedule.num_draws * 2 * MIN_SLOW_TIMES / times)
    return (
        f"Beneath the noise of single draws λ̂ fluctuates slowly by ± {size:.2g}, and a chain spans {times:.2g} "
        f"autocorrelation times of that (minimum {MIN_SLOW_TIMES}): chains that started at w* may not have reached "
        f"equilibrium. Use num_draws={draws}, or a larger localization."
    )


@_check("trend", unless=("short",))
def _trend(case: _Case) -> str | None:
    change, error = case["trend"], case["trend_stderr"]
    if not abs(change) > max(TREND_ERRORS * error, TREND_SIZE * abs(case.llc)):
        return None
    return (
        f"The loss trace still has a trend: λ̂ changes by {change:+.3g} ± {error:.2g} between the first and the last "
        f"draw. Use num_burnin={2 * case.result.schedule.num_steps}."
    )


@_check("unresolved", unless=("short", "trend"))
def _unresolved(case: _Case) -> str | None:
    missing, rate, error = case["unresolved"], case["growth"], case["growth_stderr"]
    steps = case.result.schedule.num_steps
    if not (abs(rate) > UNRESOLVED_ERRORS * error and abs(missing) > UNRESOLVED_SIZE * abs(case.llc)):
        if not case["unreached"] > UNRESOLVED_SIZE * abs(case.llc):
            return None
        return (
            f"By the curvature at w*, {steps} steps do not reach equilibrium in directions that are much flatter than "
            f"others, and λ̂ lacks about {case['unreached']:.2g} for them. Their traces look settled, since nothing has "
            'moved there yet. Use sampler="kfac-sgld", or preconditioner="curvature" with '
            'localization_metric="euclidean", or a larger localization.'
        )
    low_or_high = "low" if missing > 0 else "high"
    return (
        f"λ̂ changes by {rate:+.2g} ± {error:.2g} with each doubling of the chains, in all of them alike: slow "
        f"directions are not resolved, and λ̂ may be too {low_or_high} by up to {abs(missing):.2g} (extrapolated: "
        f"{case.result.extrapolated:.4g}). Use max_gradients={_rounded(4 * steps * len(case.result.loss_trace))}, or a "
        "larger localization."
    )


@_check("burnin", unless=("short", "trend"))
def _burnin(case: _Case) -> str | None:
    effect, needed = case["burnin_effect"], case["burnin_needed"]
    if not abs(effect) > BURNIN_EFFECT * abs(case.llc):
        return None
    # The approach has no noise of its own, though it looks like slow noise: the error is that of what comes after.
    settled = standard_error(case.draws[:, _draws_before(needed, case.result) :]).value
    if not abs(effect) > 2 * settled:
        return None
    return (
        f"The loss reached its plateau after {needed:.0f} steps, but num_burnin was {case.result.schedule.num_burnin}: "
        f"λ̂ is off by {effect:+.2g}. Use num_burnin={_rounded(1.5 * needed)}."
    )


# ---- chains ------------------------------------------------------------------------------------------------


@_check("left")
def _left(case: _Case) -> str | None:
    chains = [str(chain) for chain in case.result.diagnostics["chains_left"]]
    if not chains:
        return None
    *others, last = chains
    who = f"Chains {', '.join(others)} and {last}" if others else f"Chain {last}"
    return (
        f"{who} left the neighbourhood of w* (‖w − w*‖ > ‖w*‖ and the loss still rises), so λ̂ is not local to w*. "
        f"Use localization={case.stronger_localization:g}."
    )


@_check("far", min_draws=1, unless=("left",))
def _far(case: _Case) -> str | None:
    distance = case["distance_over_reference"]
    if not distance > 1:
        return None
    return (
        f"The draws are {distance:.2g}·‖w*‖ away from w* (maximum 1), so λ̂ is that of a region in which w* is one "
        f"point among many. Use localization={case.facts.local_localization:g} for one that is local to w*."
    )


@_check("spikes")
def _spikes(case: _Case) -> str | None:
    if not case["spike_share"] > MAX_SPIKES:
        return None
    return (
        f"Spikes of the loss make up {case['spike_share']:.1%} of λ̂ (maximum {MAX_SPIKES:.0%}): single steps carry "
        f"chains out of the basin. Use lr={case.lr / 3:.2g}."
    )


# ---- λ̂ -----------------------------------------------------------------------------------------------------


@_check("init-loss")
def _init_loss(case: _Case) -> str | None:
    share, error = case["init_loss_sensitivity"], case["init_loss_stderr"]
    if not share > MAX_INIT_LOSS_SENSITIVITY:
        return None
    sampled = error > 1e-3 * abs(case.result.init_loss)
    remedy = "Pass data with a length, so that all of it is used" if sampled else "Use a float64 model"
    return (
        f"L(w*) is only known to ± {error:.2g}, which changes λ̂ by ± {share:.0%} (maximum "
        f"{MAX_INIT_LOSS_SENSITIVITY:.0%}). {remedy}."
    )


@_check("negative")
def _negative(case: _Case) -> str | None:
    llc = case.llc
    if not llc < -VALUE_ERRORS * case.stderr:
        return None
    return (
        f"λ̂ = {llc:.4g} is negative: the chains find lower loss than at w*, so w* is no local minimum of this loss on "
        "these data. Train the model to convergence, or use "
        f"localization={case.stronger_localization:g} to stay closer to w*."
    )


@_check("above-bound", unless=("negative", "no-minimum"))
def _above_bound(case: _Case) -> str | None:
    llc, bound = case.llc, case.result.settings["num_parameters"] / 2
    if not llc - VALUE_ERRORS * case.stderr > REGULAR_SLACK * bound:
        return None
    return (
        f"λ̂ = {llc:.4g} is above P/2 = {bound:g}, the maximum at a local minimum: w* is no minimum, or the step size "
        f"is too large. Train the model to convergence, or use lr={case.lr / 10:.2g}."
    )


@_check("imprecise", unless=("negative", "above-bound"))
def _imprecise(case: _Case) -> str | None:
    llc, error = case.llc, case.stderr
    if not error > MAX_RELATIVE_ERROR * abs(llc):
        return None
    wanted = case.result.schedule.num_draws * (error / (0.1 * abs(llc))) ** 2 if llc else math.inf
    more = "more draws" if wanted > 1e7 else f"num_draws={_rounded(wanted)} for one of 10%"
    return (
        f"λ̂ = {llc:.3g} ± {error:.2g} is imprecise: its standard error is more than {MAX_RELATIVE_ERROR:.0%} of it. "
        f"Use {more}, or a larger batch_size."
    )


LENGTH_CODES = frozenset({"short", "ess", "rhat", "slow", "trend", "unresolved", "burnin"})
"""Codes of what longer chains would mend: runs whose length is by need go on."""
CODES = tuple(check.code for check in _CHECKS)
"""The codes of all checks, in the order of their warnings."""
