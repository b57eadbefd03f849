"""When an estimate can't be trusted: the figures of a result, the thresholds, and a sentence for each one crossed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llc_fast.result import LLCResult
from llc_fast.schedule import Schedule
from llc_fast.stats import convergence
from llc_fast.stats.errors import standard_error
from llc_fast.stats.step_checks import probe_figures
from llc_fast.stats.traces import burnin_needed, chain_spread, drift, slow_part, spike_share

# ---- thresholds --------------------------------------------------------------------------------------------
# A warning needs a figure that chance gives in fewer than one of a hundred good runs, and an effect of a size that
# matters. tests/test_diagnostics.py holds both.

MIN_ESS = 100
"""Effective draws over all chains below which the error bar itself is a guess (Vehtari et al. 2021 ask for 400)."""
MAX_R_HAT = 1.05
"""1.01 is asked of posteriors that are published (Vehtari et al. 2021). With the 400 effective draws that they ask for,
chance gives 1.03 to four chains once in a thousand runs; with 200, 1.05 once in a hundred."""
MAX_SPREAD = 0.05
"""Standard deviation of λ̂ between chains, relative to it, up to which disagreement is of no consequence."""
MIN_SLOW_TIMES = 5
"""Autocorrelation times of the slow part of λ̂ that a chain spans at least, if that part is more than `MAX_SPREAD` of λ̂.
Chains start at w*, where λ̂ is 0: those that span three were still 15 to 35 % too low (``llc-fast reproduce
sensitivity``), those that mix span nine or more."""
DRIFT_ERRORS, DRIFT_SIZE = 4.0, 0.05
"""A trend counts from four of its standard errors on (batch means of slow chains are still a little correlated, which
makes four of them worth three), if λ̂ moves by more than 5 % over the run: its mean is then off by half of that."""
BURNIN_EFFECT = 0.02
"""Change of λ̂, relative, by burn-in left among the draws; and more than twice its own error."""
MAX_SPIKES = 0.01
"""Share of λ̂ that comes from spikes."""
MAX_HEATING, TARGET_HEATING = 0.10, 0.05
"""Share of λ̂ that the step size makes. The default step size leaves 5 % if all directions are equally stiff, the worst
case, and the gradient noise of minibatches comes on top."""
MAX_HEAT = 0.5
"""Share of heat in nβ·(L − L(w*)) up to which λ̂ that was cleared of it is trusted: pilots aim at a tenth, and on deep
linear networks with a known λ a half has left no error to be seen (docs/calibration.md)."""
MIN_ACCEPTANCE, ACCEPTABLE_HEATING = 0.9, 0.07
"""The mean MALA acceptance that Furman & Lau (2024, arXiv 2402.03698) ask for. With the bias of each direction as it
is, acceptance goes to 0 as their number grows (0.8 for a thousand directions and the default step size), so it is no
reason to warn where the bias of λ̂ is known to be small."""
MIN_RELAXATIONS = 10
"""Relaxation times of the stiff directions among the draws of one chain. The loss forgets twice as fast as w, so that
four chains then hold about MIN_ESS independent values of it, which the noise of minibatches may hide from the ESS."""
VALUE_ERRORS, REGULAR_SLACK = 3.0, 1.1
"""λ̂ is negative, or above the bound λ ≤ P/2, by more than this many standard errors; a step size within its limits
may add 10 % to the bound."""
MAX_RELATIVE_ERROR = 0.25
"""Standard error over λ̂ above which not even the first digit is known."""
MAX_INIT_LOSS_SENSITIVITY = 0.1
"""Change of λ̂, relative, by one standard error of L(w*)."""


def diagnose(
    result: LLCResult, probes: NDArray[np.float64], *, anchor_norm: float, init_loss_stderr: float
) -> dict[str, Any]:
    """The figures of a result, plain numbers by name; None where there is nothing to make them from.

    Chains that were lost are left out.

    Args:
        result: whose figures.
        probes: of all its chains, ``[chain, probe, column]``, see ``llc_fast.probes``.
        anchor_norm: ‖w*‖ over the parameters that are sampled.
        init_loss_stderr: of L(w*): rounding, and sampling where it is the mean over a part of the data.
    """
    settings, schedule, draws, llc = result.settings, result.schedule, result._good, result.llc_mean
    chains, count = result._kept
    seen = probe_figures(
        probes[chains],
        llc=llc,
        lr=settings["lr"],
        num_parameters=settings["num_parameters"],
        localization=settings["localization"] if settings.get("sampler") in ("sgld", "sghmc") else 0.0,
        friction=settings.get("momentum_decay", 1.0),
    )
    moved, slow = drift(draws), slow_part(draws)
    norm = math.sqrt(sum(d * d for d in seen.distance) / len(seen.distance)) if seen.distance else math.nan
    steps = count * schedule.num_steps_bw_draws
    needed = burnin_needed(result.loss_trace[chains, : schedule.num_burnin + steps])
    missed = _draws_before(needed, schedule)
    figures = {
        "r_hat": convergence.r_hat(draws),
        "ess_bulk": convergence.ess_bulk(draws),
        "ess_tail": convergence.ess_tail(draws),
        "chain_spread": chain_spread(draws),
        "slow_times": slow.times,
        "slow_size": slow.size,
        "drift": moved.value,
        "drift_stderr": moved.stderr,
        "burnin_needed": needed,
        "burnin_effect": llc - float(draws[:, missed:].mean()) if 0 < missed < count else 0.0,
        "spike_share": spike_share(draws),
        "init_loss_stderr": init_loss_stderr,
        "init_loss_sensitivity": result.nbeta * init_loss_stderr / abs(llc) if llc else math.nan,
        "acceptance": seen.acceptance,
        "gradient_noise_share": seen.gradient_noise_share,
        "heating": seen.heating,
        "heat_removed": _heat_removed(result),
        "relaxations": seen.relaxation_rate * steps,
        "distance_over_prior": norm**2 * settings["localization"] / settings["num_parameters"],
        "distance_over_anchor": norm / anchor_norm if anchor_norm else math.nan,
        "distance_growth": seen.growth,
    }
    far = [(c, trace) for c, d, trace in zip(chains, seen.distance, draws, strict=False) if d > anchor_norm > 0]
    plain: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return plain | {"distance": seen.distance, "chains_left": [c for c, trace in far if _rises(trace)]}


def _heat_removed(result: LLCResult) -> float:
    """Share of nβ·(L − L(w*)) that the correction took away; 0 without one."""
    if not result.settings.get("heat_correction") or result.heat_trace is None:
        return 0.0
    chains, count = result._kept
    if not chains or not count:
        return math.nan
    heat = float(result.heat_trace[chains][:, result.schedule.draws][:, :count].mean())
    total = heat + result.llc_mean
    return heat / total if total else math.nan


def _draws_before(step: float, schedule: Schedule) -> int:
    return max(0, math.ceil((step - schedule.num_burnin) / schedule.num_steps_bw_draws))


def _settled_error(result: LLCResult, step: float) -> float:
    """Standard error of the draws from `step` on: the way there is no noise, though it looks like slow noise."""
    return standard_error(result._good[:, _draws_before(step, result.schedule) :]).value


def _rises(trace: NDArray[np.float64]) -> bool:
    """Whether the loss of one chain goes up, among its draws."""
    moved = drift(trace[None])
    return moved.value > max(DRIFT_ERRORS * moved.stderr, DRIFT_SIZE * abs(float(trace.mean())))


class _Figures:
    """A result's figures as attributes; NaN, for which every comparison is false, where there is none."""

    def __init__(self, result: LLCResult) -> None:
        self._figures = result.diagnostics

    def __getattr__(self, name: str) -> float:
        value = self._figures.get(name)
        return math.nan if value is None else float(value)


def advise(result: LLCResult) -> list[str]:
    """A sentence for each reason not to trust a result: what was seen, what it means, what to do."""
    if not len(result._good):
        return []  # there is no estimate, for reasons that are told elsewhere
    figures = _Figures(result)
    about = [_about_step_size, _about_mixing]
    if result._good.size >= MIN_ESS:  # else nothing more can be said
        about += [_about_chains, _about_value]
    return [sentence for look in about for sentence in look(result, figures)]


def _about_step_size(result: LLCResult, figures: _Figures) -> list[str]:
    accepted, heating, lr = figures.acceptance, figures.heating, result.settings["lr"]
    if "acceptance_per_chain" in result.diagnostics:
        return []  # proposals are accepted or rejected: no bias
    if result.settings.get("heat_correction"):  # then neither says anything about λ̂
        removed = figures.heat_removed
        if not removed > MAX_HEAT:
            return []
        return [
            f"{removed:.0%} of nβ·(L − L(w*)) was heat from the step size and the noise of minibatches, more than can "
            f"be subtracted safely; pass lr={lr * TARGET_HEATING / removed:.2g}, or a larger batch_size"
        ]
    low = accepted < MIN_ACCEPTANCE
    seen = "" if math.isnan(accepted) else f" (MALA acceptance {accepted:.2f}, {MIN_ACCEPTANCE} or more is wanted)"
    if heating > MAX_HEATING or (low and heating > ACCEPTABLE_HEATING):
        batch = ", or a larger batch_size" if figures.gradient_noise_share > 0.5 else ""
        return [
            f"the step size makes {min(heating, 1):.0%} of λ̂{seen}: it is too large, and λ̂ too high by about that; "
            f"pass lr={lr * TARGET_HEATING / heating:.2g}{batch}"
        ]
    if low and math.isnan(heating):
        return [f"the step size is too large{seen}: λ̂ is biased by an unknown amount; pass lr={lr / 10:.2g}"]
    return []


def _about_mixing(result: LLCResult, figures: _Figures) -> list[str]:
    schedule, good, llc = result.schedule, result._good, result.llc_mean
    if figures.relaxations < MIN_RELAXATIONS:
        # The other figures would say the same thing in more words.
        factor = 5 * MIN_RELAXATIONS / figures.relaxations
        allowed = TARGET_HEATING / figures.heating if figures.heating > 0 else math.inf
        larger = max(1.0, min(factor, allowed))
        cause = "the step size is too small for chains of this length, which" if larger > 1 else "the chains"
        remedies = [f"lr={result.settings['lr'] * larger:.2g}"] if larger > 1 else []
        remedies += [f"num_draws={_rounded(schedule.num_draws * factor / larger)}"] if larger < factor else []
        return [
            f"the draws of a chain span {figures.relaxations:.2g} relaxation times of the stiffest directions, "
            f"{MIN_RELAXATIONS} are the least: {cause} have hardly left w*; pass {' and '.join(remedies)}"
        ]
    sentences = []
    ess = 0 if math.isnan(figures.ess_bulk) else figures.ess_bulk
    apart = figures.r_hat > MAX_R_HAT or (figures.chain_spread > 1 and result.llc_std > MAX_SPREAD * abs(llc))
    if good.size < MIN_ESS or (ess < MIN_ESS and not apart):
        factor = 2 * MIN_ESS / max(min(ess, good.size), 1)
        sentences.append(
            f"the draws are worth {min(ess, good.size):.0f} independent ones, {MIN_ESS} are the least: too few to tell "
            f"how far λ̂ and its error bar can be trusted; pass num_draws={_rounded(schedule.num_draws * factor)}"
        )
        if good.size < MIN_ESS:
            return sentences
    if apart:
        low, high = good.mean(axis=1).min(), good.mean(axis=1).max()
        sentences.append(
            f"the chains disagree (R̂ = {figures.r_hat:.3g}, λ̂ of single chains from {low:.4g} to {high:.4g}): they are "
            f"not one distribution, too short or in different places; pass num_draws={4 * schedule.num_draws}, and a "
            "larger localization if plot() shows jumps"
        )
    if not sentences and figures.slow_times < MIN_SLOW_TIMES and figures.slow_size > MAX_SPREAD * abs(llc):
        factor = 2 * MIN_SLOW_TIMES / figures.slow_times
        sentences.append(
            f"beneath the noise of single draws λ̂ moves by ± {figures.slow_size:.2g} so slowly that a chain spans "
            f"{figures.slow_times:.2g} of its autocorrelation times, {MIN_SLOW_TIMES} are the least: it may still be "
            f"on its way from w*; pass num_draws={_rounded(schedule.num_draws * factor)}, or a larger localization"
        )
    if abs(figures.drift) > max(DRIFT_ERRORS * figures.drift_stderr, DRIFT_SIZE * abs(llc)):
        sentences.append(
            f"the trace has not flattened: λ̂ moves by {figures.drift:+.3g} ± {figures.drift_stderr:.2g} from the first "
            f"draw to the last, so its mean depends on when the run ended; pass "
            f"num_burnin={2 * schedule.num_steps}, or a larger localization if chains wander off"
        )
    elif (effect := abs(figures.burnin_effect)) > BURNIN_EFFECT * abs(llc) and (
        effect > 2 * _settled_error(result, figures.burnin_needed)
    ):
        sentences.append(
            f"the loss reached its plateau after {figures.burnin_needed:.0f} steps, burn-in was {schedule.num_burnin}: "
            f"λ̂ is off by {figures.burnin_effect:+.2g}; pass num_burnin={_rounded(1.5 * figures.burnin_needed)}"
        )
    return sentences


def _about_chains(result: LLCResult, figures: _Figures) -> list[str]:
    sentences = []
    left = result.diagnostics.get("chains_left", [])
    stronger = 10 * result.settings["localization"] or 1
    if left:
        sentences.append(
            f"chains {', '.join(map(str, left))} left: they are further from w* than w* is from 0, and their loss "
            f"still rises; λ̂ is not that of w*; pass localization={stronger:g}"
        )
    if figures.spike_share > MAX_SPIKES:
        sentences.append(
            f"{figures.spike_share:.1%} of λ̂ comes from spikes of the loss: single steps carry chains out of the "
            f"basin; pass lr={result.settings['lr'] / 3:.2g}"
        )
    return sentences


def _about_value(result: LLCResult, figures: _Figures) -> list[str]:
    llc, error, bound = result.llc_mean, result.llc_stderr, result.settings["num_parameters"] / 2
    sentences = []
    if figures.init_loss_sensitivity > MAX_INIT_LOSS_SENSITIVITY:
        sampled = figures.init_loss_stderr > 1e-3 * abs(result.init_loss)
        remedy = "pass data with a length, so that it is taken over all" if sampled else "pass the model in float64"
        sentences.append(
            f"L(w*) is known to ±{figures.init_loss_stderr:.2g} only, which is {figures.init_loss_sensitivity:.0%} of "
            f"λ̂: {remedy}"
        )
    if llc < -VALUE_ERRORS * error:
        sentences.append(
            f"λ̂ = {llc:.4g} is negative: the chains find lower loss than at w*, which is no local minimum of this loss "
            "on these data; train the model to convergence, or pass "
            f"localization={10 * result.settings['localization'] or 1:g} to stay closer to it"
        )
    elif llc - VALUE_ERRORS * error > REGULAR_SLACK * bound:
        sentences.append(
            f"λ̂ = {llc:.4g} is above P/2 = {bound:g}, the most that a minimum can have: w* is no minimum, or the step "
            f"size is too large; train the model to convergence, or pass lr={result.settings['lr'] / 10:.2g}"
        )
    elif error > MAX_RELATIVE_ERROR * abs(llc):
        wanted = result.schedule.num_draws * (error / (0.1 * abs(llc))) ** 2 if llc else math.inf
        more = "more draws" if wanted > 1e7 else f"num_draws={_rounded(wanted)} for one of 10 %"
        sentences.append(
            f"λ̂ = {llc:.3g} ± {error:.2g} is hardly known: its standard error is more than {MAX_RELATIVE_ERROR:.0%} of "
            f"it; pass {more}, or a larger batch_size"
        )
    return sentences


def _rounded(count: float) -> int:
    """Upwards to two digits: nobody wants num_draws=18733."""
    unit = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return int(math.ceil(count / unit) * unit)
