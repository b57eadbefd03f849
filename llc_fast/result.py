"""The result of an estimate: numbers, error bars, plots, files."""

from __future__ import annotations

import html
import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure
from llc_fast.schedule import Schedule
from llc_fast.stats.errors import StandardError, standard_error
from llc_fast.stats.sensitivity import Sensitivity
from llc_fast.support import entries
from llc_fast.support.arrays import read_arrays, write_arrays
from llc_fast.support.files import atomic_write, replacing_folder
from llc_fast.support.optional import require

_FORMAT = 5
_READABLE = (4, 5)
"""4 has the names of arrays as they are, which did not come back for all names."""
_LIBRARY = "llc_fast"
_SAMPLE_STATS = {"acceptance": "acceptance_rate", "lr": "step_size"}
"""Traces that ArviZ has a name for."""


_REFINED = ("fall", "distance", "gradient_before", "gradient_after", "gradients")
_ENDED = {
    "target": "ended when the total error was {:.2g} of λ̂ (target_error={:.2g})",
    "budget": "ended when the gradients were spent, with a total error of {:.2g} of λ̂ (target_error={:.2g})",
    "time": "ended when the time was spent, with a total error of {:.2g} of λ̂ (target_error={:.2g})",
    "negative": "ended because λ̂ is negative, which more steps would not mend",
    "diverged": "ended because chains diverged",
}
_MUCH_WAITING = 2.0
"""Seconds of waiting for a loader that are worth a word."""


class Warning(str):
    """A reason not to trust an estimate: a sentence, and a code that stays the same when the sentence changes.

    Attributes:
        code: one of those that :mod:`llc_fast.checks` lists, such as ``"ess"``. ``llc-fast explain ess`` says what it
            means, how it is found, and what to do.
    """

    __slots__ = ("code",)
    code: str

    @property
    def url(self) -> str:
        """Where the documentation explains it."""
        return entries.url(self.code)

    def __new__(cls, message: str, code: str) -> Warning:
        self = super().__new__(cls, message)
        object.__setattr__(self, "code", code)
        return self

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name} can't be changed: a warning is immutable, like every string")

    def __reduce__(self) -> tuple[type[Warning], tuple[str, str]]:
        return Warning, (str(self), self.code)


_OLD_NAMES = {
    "distance_over_anchor": "distance_over_reference",
    "drift": "trend",
    "drift_stderr": "trend_stderr",
    "heating": "bias_share",
}


class Diagnostics(dict[str, Any]):
    """Statistics by name; those that have another name since still answer to the old one, with a DeprecationWarning."""

    def __missing__(self, name: str) -> Any:
        if (new := _OLD_NAMES.get(name, "")) not in self:
            raise KeyError(name)
        warnings.warn(f"diagnostics[{name!r}] is now called {new!r}", DeprecationWarning, stacklevel=2)
        return self[new]


@dataclass(frozen=True, repr=False)
class LLCResult:
    """An estimate of the local learning coefficient, λ̂ = nβ·(mean L over draws − L(w*)).

    Attributes:
        loss_trace: loss of every step, burn-in included, float64 ``[chain, step]``: the minibatch's, L_B(w_t), or with
            ``settings["control_variate"]`` L_B(w_t) − L_B(w*) + L(w*), which has the same expectation and less noise;
            (where ``traces["reference_loss"]`` has L_B(w*), less a part of it at most);
            with ``settings["bias_correction"]`` less `bias_trace`/nβ. NaN from the step on at which a chain diverged.
        init_loss: L(w*), the average of what minibatches lose at w*: over all data, or over the draws' minibatches.
        nbeta: nβ.
        schedule: which steps are draws.
        settings: everything that was used, chosen values included.
        warnings: reasons not to trust the estimate, each with a remedy and a stable ``code``, see
            :mod:`llc_fast.checks`.
        diagnostics: further statistics by name, None where one can't be computed; `warnings` says what they mean.

            Of the loss trace:

            - ``r_hat``, ``ess_bulk``, ``ess_tail`` (Vehtari et al. 2021), ``chain_spread``
            - ``slow_times``, ``slow_size``: of fluctuations that the noise of single draws hides, the length of a chain
              in their autocorrelation times, and their standard deviation in λ̂
            - ``trend`` ± ``trend_stderr``: change of λ̂ from the first draw to the last
            - ``growth`` ± ``growth_stderr``: of λ̂ with a doubling of the chains, :mod:`llc_fast.stats.growth`
            - ``growth_means``, ``growth_stderrs``: λ̂ of the second half of chains of 1/2^k, …, ¼, ½ and the whole of
              their length, and its standard errors
            - ``unresolved``: what λ̂ lacks at most by that, 0 where it is not significant
            - ``extrapolation`` ± ``extrapolation_stderr``: what it likely lacks
            - ``ended_by``, ``target_error``: of a length by need
            - ``burnin_needed``, in steps, and ``burnin_effect`` on λ̂
            - ``spike_share``, ``init_loss_stderr``, and ``init_loss_sensitivity``, its share of λ̂

            Of the bias trace:

            - ``bias_share``: of step-size and gradient-noise bias in the mean of nβ·(L − L(w*)), before it is
              subtracted, if it is

            Of step checks, and of where chains are, in the metric of the localization:

            - ``acceptance``: of a Metropolis–Hastings test, MALA
            - ``gradient_noise_share``; ``gradient_error``, of what the loss rises by along steps
            - ``relaxations``: of the stiff directions, among a chain's draws
            - ``distance``: ‖w − w*‖ of each chain; ``distance_growth``; ``distance_over_reference``, over ‖w*‖
            - ``distance_over_prior``: ‖w − w*‖²·γ/P, 1 if nothing but γ held w
            - ``chains_left``, ``chains_diverged``

            Of γ:

            - ``reach``: prior width of a weight, 1/√γ, over the root mean square weight, in that metric, too
            - ``localization_slope`` ± ``localization_slope_stderr``: dλ̂/dlog γ of chains of this length, see
              :mod:`llc_fast.stats.response`; None where its error is above a quarter of λ̂

            Of w*:

            - ``unreached``: what λ̂ lacks for directions too flat for the length, by the curvature at w*,
              :mod:`llc_fast.stats.wells`
            - ``descent``, ``descent_loss``: how far nβ·L + γ/2·‖w − w*‖², and with it nβ·L, fall from w* in their
              quadratic model, at least
            - ``fall``: how far nβ·L falls below that of w* along the chains, for certain
            - with ``refine=`` what :class:`llc_fast.objective.refinement.Refinement` has, as ``refine_fall`` and so on
            - with ``preconditioner="curvature"`` the ``metric_gradients`` that it took, and ``metric_undetermined``:
              elements that have neither curvature nor scale

        observables: values of the functions in ``estimate_llc(observables=…)`` by name, float64 ``[chain, draw, …]``.
        steps_done: steps that each chain has done; None: all. Only a partial result has fewer.
        traces: further quantities of every step by name, float64 ``[chain, step]``:

            - ``"bias"``, see `bias_trace`
            - ``"squared_distance"``: ‖w − w*‖² where the loss was taken, (w − w*)ᵀA⁻¹(w − w*) where the localization is
              in the metric
            - ``"acceptance"``, a probability, and ``"lr"``, of Metropolis-adjusted samplers
            - ``"reference_loss"``: what the minibatches of draws lose at w*, where a minibatch's loss is not the mean
              of what its samples lose

        ends: w − w* of every chain after its last step, by parameter, ``[chain, …]``, with ``keep_ends=True``: the
            starting points of ``estimate_llc(warm_start=…)``.
    """

    loss_trace: NDArray[np.float64]
    init_loss: float
    nbeta: float
    schedule: Schedule
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[Warning] = field(default_factory=list)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    observables: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    steps_done: list[int] | None = None
    traces: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    ends: dict[str, NDArray[Any]] | None = None

    @property
    def bias_trace(self) -> NDArray[np.float64] | None:
        """What step size and gradient noise add to nβ·(L − L(w*)), measured at every step, ``[chain, step]``.

        None for samplers that do not support it, see :meth:`llc_fast.samplers.Sampler.bias`.
        """
        return self.traces.get("bias")

    @property
    def is_partial(self) -> bool:
        """Whether the run was interrupted; all numbers are then those of the draws it had made."""
        return self.steps_done is not None

    @property
    def llc_trace(self) -> NDArray[np.float64]:
        """nβ·(L − L(w*)) of every draw, ``[chain, draw]``; the mean of a row is that chain's λ̂."""
        return self.excess_trace[:, self.schedule.draws]

    @property
    def excess_trace(self) -> NDArray[np.float64]:
        """nβ·(L − L(w*)) of every step, ``[chain, step]``; L(w*) is that of the same minibatch where it is known.

        With nβ = 0 it is 0, and so is λ̂: see `loss_trace` for what the draws lose.
        """
        reference = self.traces.get("reference_loss")
        at_reference = self.init_loss if reference is None else np.where(np.isnan(reference), self.init_loss, reference)
        trace: NDArray[np.float64] = self.nbeta * (self.loss_trace - at_reference)
        return trace

    @property
    def llc_per_chain(self) -> NDArray[np.float64]:
        """λ̂ of each chain, ``[chain]``, from the draws it has made; NaN if it diverged, or has no draws."""
        trace, diverged = self.llc_trace, self.diverged_chains
        means = [
            math.nan if chain in diverged or not count else float(trace[chain, :count].mean())
            for chain, count in enumerate(self._draws_done)
        ]
        return np.array(means)

    @property
    def _steps_done(self) -> list[int]:
        return self.steps_done or [self.loss_trace.shape[1]] * len(self.loss_trace)

    @property
    def diverged_chains(self) -> list[int]:
        """Chains whose loss became non-finite."""
        return [c for c, steps in enumerate(self._steps_done) if not np.isfinite(self.loss_trace[c, :steps]).all()]

    @property
    def _draws_done(self) -> list[int]:
        steps = np.arange(self.loss_trace.shape[1])[self.schedule.draws]
        return [int((steps < count).sum()) for count in self._steps_done]

    @property
    def kept_chains(self) -> list[int]:
        """The chains that λ̂ is computed from: those that did not diverge; none if that is fewer than half of them.

        Of an interrupted run, those that have as many draws as `kept_draws` has.
        """
        return self._kept[0]

    @property
    def kept_draws(self) -> NDArray[np.float64]:
        """The draws of nβ·(L − L(w*)) that λ̂ is the mean of, ``[chain, draw]``, a row for each of `kept_chains`."""
        chains, length = self._kept
        kept: NDArray[np.float64] = self.llc_trace[chains, :length]
        return kept

    @property
    def _kept(self) -> tuple[list[int], int]:
        """The chains to be used, and how many draws of each: as many draws of as many chains as makes the most."""
        diverged, counts = set(self.diverged_chains), self._draws_done
        started = [c for c, count in enumerate(counts) if count or c in diverged]
        kept = [c for c in started if c not in diverged]
        if 2 * len(kept) < len(started) or not kept:
            return [], self.schedule.num_draws
        length = max({counts[c] for c in kept}, key=lambda n: n * sum(counts[c] >= n for c in kept))
        return [c for c in kept if counts[c] >= length], length

    @property
    def llc_mean(self) -> float:
        """λ̂: the mean of `kept_draws`; NaN if there are none."""
        draws = self.kept_draws
        return float(draws.mean()) if len(draws) else math.nan

    @property
    def llc_std(self) -> float:
        """Standard deviation of λ̂ over chains; NaN with fewer than two."""
        draws = self.kept_draws
        return float(draws.mean(axis=1).std(ddof=1)) if len(draws) > 1 else math.nan

    @property
    def llc_stderr(self) -> float:
        """Standard error of `llc_mean`, with that of L(w*); see :func:`llc_fast.stats.errors.standard_error`."""
        return self._error.value

    @property
    def _error(self) -> StandardError:
        error = standard_error(self.kept_draws)
        of_init_loss = self.nbeta * float(self.diagnostics.get("init_loss_stderr") or 0.0)
        return error._replace(value=math.hypot(error.value, of_init_loss))

    @property
    def sensitivity(self) -> Sensitivity | None:
        """dλ̂/dlog nβ and dλ̂/dlog γ with standard errors; None without ``estimate_llc(sensitivity=True)``."""
        found = self.diagnostics.get("sensitivity")
        return None if found is None else Sensitivity.from_numbers(found)

    @property
    def systematic_error(self) -> tuple[float, float]:
        """How far λ may be below and above `llc_mean` because of slow directions, both ≥ 0; (0, 0) if nothing shows.

        λ̂ grows with the length of the chains until their slowest directions are in equilibrium. Where it still does,
        significantly, this is what the slowest approach to a limit would add to it (:mod:`llc_fast.stats.growth`).
        """
        missing = float(self.diagnostics.get("unresolved") or 0.0)
        return max(0.0, -missing), max(0.0, missing)

    @property
    def extrapolated(self) -> float:
        """λ̂ of endlessly long chains, if it approaches its limit like the inverse of their length.

        It is `llc_mean` where no growth shows. Its error is `extrapolated_stderr`.
        """
        grows = any(self.systematic_error)
        return self.llc_mean + (float(self.diagnostics.get("extrapolation") or 0.0) if grows else 0.0)

    @property
    def extrapolated_stderr(self) -> float:
        """Standard error of `extrapolated`, with half of what another law of approach would change."""
        grows = any(self.systematic_error)
        added = float(self.diagnostics.get("extrapolation_stderr") or 0.0) if grows else 0.0
        return math.hypot(self.llc_stderr, added)

    @property
    def relative_error(self) -> float:
        """The total error of λ̂ over λ̂: the standard error, plus what λ̂ likely lacks (`extrapolated` − `llc_mean`).

        At nβ = 0, where λ̂ is known, it is 0.
        """
        llc = abs(self.llc_mean)
        if not self.nbeta:
            return 0.0 if len(self.kept_draws) else math.inf
        return (self.llc_stderr + abs(self.extrapolated - self.llc_mean)) / llc if llc > 0 else math.inf

    def interval(self, prob: float = 0.95) -> tuple[float, float]:
        """A central interval for the λ̂ of endlessly long chains, from `llc_stderr`, Student's t and `systematic_error`.

        It does not cover what γ and nβ leave out, nor what is wrong with a sampler whose step size was given.

        Raises:
            ValueError: `prob` is not between 0 and 1.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must be between 0 and 1, got {prob}")
        error, (below, above) = self._error, self.systematic_error
        half = error.quantile(prob) * error.value
        return self.llc_mean - half - below, self.llc_mean + half + above

    @property
    def _mean_excess(self) -> float:
        """The mean of L − L(w*) over the draws that λ̂ is the mean of."""
        if self.nbeta:
            return self.llc_mean / self.nbeta
        chains, length = self._kept
        excess = replace(self, nbeta=1.0).llc_trace[chains, :length]
        return float(excess.mean()) if excess.size else math.nan

    # ---- for people --------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The estimate, what it was made with, and all warnings, in a few lines."""
        settings = (f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in self.settings.items())
        warned = [*(f"WARNING: {w}" for w in self.warnings), *self._explained()]
        return "\n  ".join([*self._head(), ", ".join(settings), *warned])

    def _explained(self) -> list[str]:
        """Where warnings are explained."""
        codes = [w.code for w in self.warnings]
        return [f"what a warning means: {entries.command(codes)}"] * bool(codes)

    def _head(self) -> list[str]:
        """The lines that matter most."""
        low, high = self.interval()
        draws, diverged = self.kept_draws, len(self.diverged_chains)
        below, above = self.systematic_error
        grows = f" (sampling) +{above:.2g}/−{below:.2g} (slow directions; extrapolated {self.extrapolated:.4g}; 95 % "
        error = grows if below or above else " (standard error; 95 % "
        estimate = f"λ̂ = {self.llc_mean:.4g} ± {self.llc_stderr:.2g}{error}interval {low:.4g} to {high:.4g})"
        if not self.nbeta:
            estimate = "λ̂ = 0 by definition: nβ = 0, and localization alone was sampled"
        lines = [
            estimate,
            f"{len(draws)} chains × {draws.shape[1] if len(draws) else 0} draws"
            + (f" ({diverged} diverged)" if diverged else "")
            + (" (interrupted)" if self.is_partial else "")
            + f", L(w*) = {self.init_loss:.6g}, {self._mean_excess:+.2g} at the draws, nβ = {self.nbeta:.6g}",
        ]
        if tokens := self._tokens():
            lines.append(tokens)
        formats = {
            "r_hat": "R̂ = {:.3f}",
            "ess_bulk": "ESS = {:.0f}",
            "trend": "trend {:+.2g}",
            "acceptance": "acceptance {:.2f}",
            "bias_share": "bias {:.1%}" + (" (subtracted)" if self.settings.get("bias_correction") else ""),
            "gradient_noise_share": "gradient noise {:.0%}",
            "distance_over_reference": "‖w − w*‖/‖w*‖ = {:.2g}",
        }
        known = {name: self.diagnostics.get(name) for name in formats}
        health = ", ".join(formats[name].format(value) for name, value in known.items() if value is not None)
        return lines + [health] * bool(health) + [self._scale()] + self._refinement() + self._costs()

    def _refinement(self) -> list[str]:
        """What was done for a better w*."""
        found = {name: self.diagnostics.get(f"refine_{name}") for name in _REFINED}
        if found["fall"] is None:
            return []
        end = "" if self.diagnostics.get("refine_is_complete") else ", and was not done"
        moved, before, after = found["distance"], found["gradient_before"], found["gradient_after"]
        return [
            f"w* is not the model's: refining it took {found['gradients']} gradients{end}, lowered nβ·L by "
            f"{found['fall']:.3g} and moved it by {moved:.2g}·‖w*‖; ‖∇L‖ was {before:.2g}, is {after:.2g}"
        ]

    def _costs(self) -> list[str]:
        """What made the run slow, or short."""
        found, waiting = [], self.diagnostics.get("seconds_of_data") or 0.0
        if waiting > max(_MUCH_WAITING, 0.5 * self.settings.get("seconds", math.inf)):
            found.append(
                f"{waiting:.0f} of {self.settings['seconds']:.0f} seconds went into waiting for the loader: pass "
                "tensors or the data set itself if they fit the memory"
            )
        if ended_by := self.diagnostics.get("ended_by"):
            found.append(_ENDED.get(ended_by, ended_by).format(self.relative_error, self.diagnostics["target_error"]))
        if restarts := self.diagnostics.get("restarts"):
            found.append(
                f"chains diverged with larger steps: begun again {restarts} times, with a quarter of ε each time"
            )
        if shortened := self.diagnostics.get("shortened"):
            found.append(f"shortened to {shortened}, to take ten minutes rather than longer")
        return found

    def _scale(self) -> str:
        """A sentence about γ."""
        in_metric = self.settings.get("localization_metric") == "sampler"
        if not self.nbeta:
            width, gamma = "A" if in_metric else "1", self.settings.get("localization", math.nan)
            return f"draws of w are from N(w*, {width}/γ) with γ = {gamma:.4g}"
        gamma, reach = self.settings.get("localization", math.nan), self.diagnostics.get("reach")
        slope, error = (self.diagnostics.get(k) for k in ("localization_slope", "localization_slope_stderr"))
        width = "" if reach is None else f", a prior width of {reach:.2g} times the root mean square weight"
        width += " in the metric of the sampler" if in_metric else ""
        change = "" if slope is None else f"; dλ̂/dlog γ = {slope:+.2g} ± {error or math.nan:.2g}"
        return f"λ̂ is at the scale of γ = {gamma:.4g}{width}{change}"

    def _tokens(self) -> str:
        """Of a language model: n in sequences and in tokens, and which of them nβ is made of; empty for others."""
        n, tokens = self.settings.get("num_samples"), self.settings.get("num_tokens")
        if "num_tokens" not in self.settings:
            return ""
        counts = (
            "n is unknown" if n is None else f"n = {n} sequences" + (f" of {tokens} predicted tokens" * bool(tokens))
        )
        if left_out := self.settings.get("num_left_out"):
            counts += f" ({left_out} more predict none)"
        if n is not None and n > 1 and math.isclose(self.nbeta, n / math.log(n)):
            return f"{counts}; nβ = n / log n of the sequences"
        return f"{counts}; nβ is given, whatever n is"

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        codes = ", ".join(w.code for w in self.warnings)
        return "\n  ".join(["LLCResult: " + self._head()[0], *self._head()[1:], *[f"warnings: {codes}"] * bool(codes)])

    def _repr_html_(self) -> str:
        """For notebooks: summary, warnings, and a small picture of the traces if Matplotlib is installed."""
        first, *others = map(html.escape, self._head())
        warnings = "".join(
            f'<li><a href="{html.escape(w.url)}"><b>{html.escape(w.code)}</b></a>: {html.escape(w)}</li>'
            for w in self.warnings
        )
        try:
            from llc_fast.plots import small_png_of_traces

            picture = f'<img alt="traces" src="data:image/png;base64,{small_png_of_traces(self)}">'
        except Exception:  # of whatever kind: a notebook must be able to show every result
            picture = ""
        text = "".join(f"<div>{line}</div>" for line in (f"<b>{first}</b>", *others))
        return f"<div>{text}{f'<ul>{warnings}</ul>' if warnings else ''}{picture}</div>"

    def plot(self, path: str | os.PathLike[str] | None = None, *, panels: Sequence[str] | None = None) -> Figure:
        """Pictures of the chains, whose λ̂ is to be believed if they agree; written to `path` if given.

        Args:
            path: of a file; its ending says the format.
            panels: which, in which order: ``"trace"`` (loss along the chains), ``"running"`` (λ̂ over the logarithm of
                the length), ``"forest"`` (λ̂ of each chain), ``"density"`` (losses of the draws), ``"autocorr"``,
                ``"rank"`` (:func:`llc_fast.plots.plot_rank`); None: all.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed (``pip install "llc_fast[plot]"``).
            ValueError: `panels` has another name, or Matplotlib does not know the ending of `path`.
            OSError: it can't be written, as :meth:`save`.
        """
        from llc_fast.plots import plot_result, write_figure

        figure = plot_result(self, panels)
        if path is not None:
            write_figure(figure, path)
        return figure

    def report(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Write all there is to say of the estimate to one HTML page, which needs no network and no other file.

        It has λ̂ and what it means, warnings with their explanations, all pictures, diagnostics with their limits,
        settings as a call in Python, and versions. A crash leaves the old file or the new one.

        Args:
            path: of the page, such as ``"llc.html"``.
            title: of the page, such as the model's name.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed (``pip install "llc_fast[plot]"``).
            OSError: it can't be written, as :meth:`save`.
        """
        from llc_fast.report import write_report

        with np.errstate(all="ignore"):  # losses of chains that diverge may be too large to be squared
            head = self._head()
            write_report(self, path, head=head if any(self.systematic_error) else head[1:], title=title)

    # ---- for other programs ------------------------------------------------------------------------------------

    def to_xarray(self) -> xarray.Dataset:
        """All traces, draws, observables and per-chain λ̂ as an ``xarray.Dataset``; settings as attributes.

        An observable that has the name of another variable is called ``observable_…``.

        Raises:
            ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
        """
        require("xarray", "xarray")
        import xarray

        steps = np.arange(self.loss_trace.shape[1])
        coords = {
            "chain": np.arange(len(self.loss_trace)),
            "step": steps,
            "draw": np.arange(self.schedule.num_draws),
            "draw_step": ("draw", steps[self.schedule.draws]),
        }
        variables = {
            "loss": (("chain", "step"), self.loss_trace),
            **{name: (("chain", "step"), values) for name, values in self.traces.items()},
            "llc": (("chain", "draw"), self.llc_trace),
            "llc_per_chain": ("chain", self.llc_per_chain),
        }
        for name, values in _renamed(self.observables, variables | coords).items():
            variables[name] = (("chain", "draw", *(f"{name}_{k}" for k in range(values.ndim - 2))), values)
        return xarray.Dataset(
            variables,
            coords=coords,
            attrs=self._attributes(),
        )

    def _attributes(self) -> dict[str, Any]:
        """What is no array, for xarray: numbers and JSON."""
        return {
            "inference_library": _LIBRARY,
            "llc_mean": self.llc_mean,
            "llc_stderr": self.llc_stderr,
            "init_loss": self.init_loss,
            "nbeta": self.nbeta,
            "settings": json.dumps(self.settings),
            "diagnostics": json.dumps(self.diagnostics),
            "warnings": json.dumps(self.warnings),
            "warning_codes": json.dumps([w.code for w in self.warnings]),
        }

    def to_datatree(self) -> xarray.DataTree:
        """The draws that λ̂ is computed from, in the groups of ArviZ's schema, as an ``xarray.DataTree``.

        Group ``posterior`` has ``llc``, nβ·(L − L(w*)), whose mean is λ̂, and the observables; ``sample_stats`` has the
        loss and the other traces at these draws (those of Metropolis-adjusted samplers as ``acceptance_rate`` and
        ``step_size``); ``warmup_posterior`` and ``warmup_sample_stats`` have every step of burn-in. The dimensions are
        ``chain``, by its number in this result, and ``draw``. The attributes of the tree are those of
        :meth:`to_xarray`: λ̂, settings, diagnostics and warnings.

        Raises:
            ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
            ImportError: it is older than 2024.10, the first with a DataTree.
        """
        module = require("xarray", "xarray")
        if not hasattr(module, "DataTree"):
            raise ImportError(f'xarray {module.__version__} has no DataTree: pip install "xarray>=2024.10"')
        tree: xarray.DataTree = module.DataTree.from_dict({f"/{k}": group for k, group in self._groups().items()})
        tree.attrs = self._attributes()
        return tree

    def to_arviz(self) -> Any:
        """The draws that λ̂ is computed from, for ArviZ: the groups of :meth:`to_datatree`.

        Returns:
            An ``xarray.DataTree`` with ArviZ 1 or later, ``arviz.InferenceData`` with an earlier one.

        Raises:
            ModuleNotFoundError: ArviZ is not installed (``pip install "llc_fast[xarray]"``).
        """
        arviz = require("arviz", "xarray")
        if int(arviz.__version__.partition(".")[0]) >= 1:  # its InferenceData is a DataTree
            return self.to_datatree()
        return arviz.InferenceData(**self._groups(), save_warmup=True)

    def _groups(self) -> dict[str, xarray.Dataset]:
        """Data sets by the names of ArviZ's groups."""
        import xarray

        chains, count = self._kept
        traces = {"loss": self.loss_trace} | {_SAMPLE_STATS.get(k, k): values for k, values in self.traces.items()}
        observables = {name: values[chains, :count] for name, values in self.observables.items()}
        burnin = slice(0, self.schedule.num_burnin)
        arrays = {
            "posterior": {"llc": self.kept_draws, **_renamed(observables, ("llc", "chain", "draw"))},
            "sample_stats": {name: values[chains, self.schedule.draws][:, :count] for name, values in traces.items()},
            "warmup_posterior": {"llc": self.excess_trace[chains, burnin]},
            "warmup_sample_stats": {name: values[chains, burnin] for name, values in traces.items()},
        }
        attributes = {"inference_library": _LIBRARY, "init_loss": self.init_loss, "nbeta": self.nbeta}
        groups = {}
        for group, values in arrays.items():
            if group.startswith("warmup") and not self.schedule.num_burnin:
                continue
            length = self.schedule.num_burnin if group.startswith("warmup") else count
            groups[group] = xarray.Dataset(
                {
                    name: (("chain", "draw", *(f"{name}_dim_{k}" for k in range(array.ndim - 2))), array)
                    for name, array in values.items()
                },
                coords={"chain": chains, "draw": np.arange(length)},
                attrs={**attributes, "sample_dims": ["chain", "draw"]},
            )
        return groups

    def to_zarr(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_datatree` to a Zarr store, a folder: for ``xarray.open_datatree(path, engine="zarr")``.

        ``xarray.open_zarr(path, group="posterior")`` reads one group. A store of this method's that is there already is
        replaced once the new one is whole; anything else is left as it is. :meth:`load` needs a file of :meth:`save`.

        Raises:
            ModuleNotFoundError: xarray or zarr is not installed (``pip install "llc_fast[samples]"``).
            FileExistsError: something else is at `path`.
            OSError: it can't be written.
        """
        require("zarr", "samples")
        tree = self.to_datatree()
        with replacing_folder(path, _is_store) as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata")  # Zarr does not specify it yet, xarray reads it
            tree.to_zarr(folder, mode="w")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file (NumPy's npz); a crash leaves the old file or the new one, never a torn one.

        Raises:
            TypeError: something in it only a pickle could hold: settings that are no JSON, arrays of objects.
            OSError: the file can't be written, or `path` is a folder, a device, a pipe or a socket.
        """
        meta = {
            "format": _FORMAT,
            "init_loss": self.init_loss,
            "nbeta": self.nbeta,
            "schedule": vars(self.schedule),
            "settings": self.settings,
            "warnings": [[w, w.code] for w in self.warnings],
            "diagnostics": self.diagnostics,
            "steps_done": self.steps_done,
        }
        named = {"trace.": self.traces, "observable.": self.observables, "end.": self.ends or {}}
        arrays = {prefix + name: values for prefix, group in named.items() for name, values in group.items()}
        with atomic_write(path) as file:
            write_arrays(file, meta, {"loss_trace": self.loss_trace, **arrays})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LLCResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is not such a file, or is damaged.
        """
        try:
            meta, arrays = read_arrays(path)
            traces, observables, ends = (
                {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
                for prefix in ("trace.", "observable.", "end.")
            )
            if meta.pop("format") in _READABLE:
                return cls(
                    loss_trace=arrays["loss_trace"],
                    schedule=Schedule(**meta.pop("schedule")),
                    diagnostics=Diagnostics(meta.pop("diagnostics", {})),
                    warnings=[Warning(*warning) for warning in meta.pop("warnings", [])],
                    observables=observables,
                    traces=traces,
                    ends=ends or None,
                    **meta,
                )
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a file that LLCResult.save wrote, or is damaged") from error
        raise ValueError(f"{os.fspath(path)!r} was written by another version of llc_fast")


def _renamed(values: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """The same values, under names that are not taken."""
    return {f"observable_{name}" if name in taken else name: value for name, value in values.items()}


def _is_store(folder: Path) -> bool:
    """Whether :meth:`LLCResult.to_zarr` wrote it, or it is empty."""
    try:
        attributes = json.loads((folder / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return not any(folder.iterdir())
    return attributes.get("inference_library") == _LIBRARY and "warning_codes" in attributes
