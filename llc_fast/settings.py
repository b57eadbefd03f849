"""Every option of an estimate: its default, its check, and what names a run."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llc_fast.chains.checkpoint import INTERVAL
from llc_fast.chains.draw import Observable
from llc_fast.objective.metric import METRIC_GRADIENTS
from llc_fast.progress import ProgressFunction
from llc_fast.result import LLCResult
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.langevin import EstimatedMetric
from llc_fast.samplers.metropolis import MetropolisSampler
from llc_fast.samplers.registry import make_sampler, sampler_class
from llc_fast.schedule import Schedule
from llc_fast.support.arguments import check_integer, check_number
from llc_fast.support.fingerprint import option_identity

DEFAULT_REACH = 0.5
"""r of the default localization: the prior width of a weight over the root mean square weight."""
DEFAULT_NUM_DRAWS = 2000
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "language-model": {"nbeta": 30.0, "localization": 300.0},
    "paper": {
        **{"sampler": "sgld", "bias_correction": False, "localization": 1.0},
        **{"batch_size": 500, "num_burnin": 9000, "num_draws": 1000},
    },
}
"""Arguments by the name of a preset; those that are given win, and a loader keeps its own minibatches.

For language models: those of arXiv 2510.12077. The papers' (Lau et al. 2023, arXiv 2308.12108; Furman & Lau 2024,
arXiv 2402.03698): plain SGLD at nβ = n / log n and γ = 1, chains of 10,000 steps of which the last tenth are draws.
They chose ε by hand for each class of networks; where no `lr` is given, it is chosen so that bias, which is not
subtracted, stays small.
"""
DEFAULT_TARGET, DEFAULT_MOST, DEFAULT_MOST_TIMED = 0.02, 10_000, 100_000
"""Of a length by need: the total relative error at which chains stop, and the draws that they stop at, burn-in counted
as draws; if time is limited instead."""
PILOT_SHARE, CHALLENGE_SHARE = 0.13, 0.033
"""Gradients of the pilot chains, of those of all chains; and of the one in another metric, if the sampler is open."""
_LEAST_CHALLENGED = 3000
"""``max_gradients`` below which no pilot tries another metric: it would be too short to show anything."""
GIVEN = "given"
"""What settings say of a preconditioner that is tensors."""
_CARRIED = ("lr", "nbeta", "localization", "bias_correction")
"""Numbers of an earlier result that another estimate may take over, beside its sampler's options."""
LIMITS = ("target_error", "max_seconds", "max_gradients")
"""Arguments that find a length, where `num_draws` and `num_burnin` give one."""
FIRST_LOOK, UNUSED = 1250, 16
"""Of a length by need: draws, burn-in counted as draws, after which chains are looked at for the first time, and then
whenever there are twice as many; and steps at the start that are no draws, whatever the length will be."""


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


def default_localization(num_parameters: int, norm: float) -> float:
    """γ = P / (r·‖w*‖)² with r = ½: the prior exp(−γ/2·‖w − w*‖²) alone holds w within about half of ‖w*‖.

    A weight then has a prior width 1/√γ of half the root mean square weight, whatever the size of the network and the
    units of its weights. It is rounded to four digits. A model of zeros has no scale, and gets 1.

    Args:
        num_parameters: P, the elements that are sampled.
        norm: ‖w*‖ over these elements.

    Raises:
        TypeError, ValueError: P is not an integer of at least 1, or the norm is negative or not finite.
    """
    count = check_integer("num_parameters", num_parameters, 1)
    norm = check_number("norm", norm, minimum=0)
    if (DEFAULT_REACH * norm) ** 2 < sys.float_info.min:
        return 1.0
    return float(f"{count / (DEFAULT_REACH * norm) ** 2:.4g}")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an estimate is computed; it changes time and memory, and the numbers to rounding alone.

    Attributes:
        strategy: how gradients are computed: ``"sequential"``, ``"batched"``, ``"compiled"`` (torch.compile) or
            ``"cuda-graph"``; None: chosen by what a trial gradient was measured to need.
        release_gradients: consume and free each gradient during the backward pass: the same step, and no memory for
            all gradients at once. Nothing is recorded then, so that small models differ by rounding. None: above ten
            million parameters.
        microbatch_size: samples that pass the model at a time, for minibatches that do not fit the memory: gradients
            of the pieces are added up. None: the whole minibatch.
        autocast: dtype of forward passes under ``torch.autocast``, such as ``torch.bfloat16``; None: no autocast.
        distributed: spread the chains over processes. None: over those of ``torchrun`` or of an initialized
            torch.distributed, if there are several; False: never. Any number of processes gives the same chains, and
            each gets the whole result.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of range.
    """

    strategy: str | None = None
    release_gradients: bool | None = None
    microbatch_size: int | None = None
    autocast: torch.dtype | None = None
    distributed: bool | None = None

    def __post_init__(self) -> None:
        if self.microbatch_size is not None:
            check_integer("microbatch_size", self.microbatch_size, 1)
        if self.autocast is not None and not (
            isinstance(self.autocast, torch.dtype) and self.autocast.is_floating_point
        ):
            raise TypeError(f"autocast must be a floating-point dtype such as torch.bfloat16, got {self.autocast!r}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :func:`llc_fast.estimate_llc`, which documents them, checked before any work.

    `localization` and the preconditioner ``"curvature"`` may be open until the model has been looked at
    (:meth:`localized`, :meth:`in_metric`), `lr` and `nbeta` until calibration fills them in (:meth:`complete_sampler`).

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of range.
    """

    sampler: str | Sampler | None = None
    lr: float | None = None
    nbeta: float | None = None
    localization: float | None = None
    num_chains: int = 4
    num_draws: int | None = None
    num_burnin: int | None = None
    num_steps_bw_draws: int = 1
    target_error: float | None = None
    max_seconds: float | None = None
    max_gradients: int | None = None
    batch_size: int | None = None
    params: Any = None
    bias_correction: bool | None = None
    observables: Mapping[str, Observable] | None = None
    seed: int = 0
    device: torch.device | str | None = None
    execution: Execution = Execution()
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_interval: float = INTERVAL
    warm_start: LLCResult | None = None
    keep_ends: bool = False
    sensitivity: bool = False
    progress: bool | ProgressFunction = True
    preset: str | None = None
    refine: bool | int = False
    preconditioner: Any = None
    localization_metric: str | None = None

    def __post_init__(self) -> None:
        is_limited = any(getattr(self, name) is not None for name in ("target_error", "max_seconds", "max_gradients"))
        for name, value in _of_preset(self.preset).items():
            if is_limited and name in ("num_draws", "num_burnin"):
                continue
            if getattr(self, name) is None and getattr(self.sampler, name, None) is None:
                object.__setattr__(self, name, value)
        for name, minimum in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            # NumPy's integers are welcome, but neither torch nor JSON takes them everywhere.
            object.__setattr__(self, name, check_integer(name, value, minimum))
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        for name in ("lr", "max_seconds"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_number(name, number, minimum=0, exclusive=True))
        for name in ("nbeta", "localization", "target_error"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_number(name, number, minimum=0))
        check_number("checkpoint_interval", self.checkpoint_interval, minimum=0)
        if not isinstance(self.refine, bool):
            object.__setattr__(self, "refine", check_integer("refine", self.refine, 1))
        if not isinstance(self.execution, Execution):
            raise TypeError(
                f"execution must be an llc_fast.Execution, got {type(self.execution).__name__}: pass for example "
                'execution=llc_fast.Execution(strategy="sequential")'
            )
        if self.warm_start is not None and not isinstance(self.warm_start, LLCResult):
            raise TypeError(
                f"warm_start must be the result of an earlier estimate, got {type(self.warm_start).__name__}"
            )
        self._check_length()
        _check_observables(self.observables)
        template = self._template
        for name in ("lr", "nbeta", "localization"):  # which the sampler may have brought
            object.__setattr__(self, name, getattr(template, name))
        if self.bias_correction and not _can_be_corrected(template):
            free = ", noise_level or bounding_box_size: the chain has to be free"
            raise ValueError(
                f"bias_correction=True is not possible with sampler={template.name!r}"
                + (free if template.supports_bias_correction else "")
            )
        if self.nbeta == 0:
            self._check_prior()
        if self.refine and template.localizes_in_metric:
            raise ValueError(
                f'refine={self.refine} is not possible with localization_metric="sampler": it looks near w* in the '
                "Euclidean metric. Give the estimate a refined model, or leave one of them out"
            )

    def _check_prior(self) -> None:
        """Raise ValueError for what needs a loss, if localization alone is sampled."""
        if self.localization == 0:
            raise ValueError(
                "localization=0 with nbeta=0 is no distribution: pass a localization above 0, the precision of the "
                "Gaussian around w* that chains then sample"
            )
        for name, why in _NEED_LOSS.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is not possible with nbeta=0: {why}")

    # ---- the sampler ---------------------------------------------------------------------------------------

    @functools.cached_property
    def _template(self) -> Sampler:
        """The sampler as it was asked for; lr and nβ may be open.

        Raises:
            TypeError, ValueError: no such sampler or option; an option that was given twice, differently.
        """
        given: Any = self.sampler
        if given is None:
            given = "sgld" if self.preconditioner is None and self.localization_metric is None else _IN_METRIC
        if not isinstance(given, (str, Sampler)):
            raise TypeError(
                f"sampler must be a name or a sampler of llc_fast.samplers, got {type(given).__name__}: pass for "
                'example sampler="rmsprop-sgld"'
            )
        options: dict[str, float | None] = {}
        for option in ("lr", "nbeta", "localization"):
            value, inside = getattr(self, option), getattr(given, option, None)  # names have none
            if value is not None and inside is not None and value != inside:
                raise ValueError(f"{option}={value:g} contradicts sampler.{option}={inside:g}: give one of them")
            options[option] = inside if value is None else value
        return make_sampler(given, **options, **self._metric_options(given))

    def _metric_options(self, given: str | Sampler) -> dict[str, Any]:
        """Preconditioner and localization's metric, as far as they are given beside the sampler.

        Raises:
            ValueError: it takes none, or has another one itself.
        """
        names = ("preconditioner", "localization_metric")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if not found:
            return {}
        cls = sampler_class(given) if isinstance(given, str) else type(given)
        if cls.metric != "given":
            name = next(iter(found))
            raise ValueError(
                f"{name} is given, and sampler={cls.name!r} takes none: pass sampler={_IN_METRIC!r}, or leave it out"
            )
        if isinstance(given, Sampler) and "preconditioner" in found:
            inside = vars(given)["preconditioner"]
            if inside is not found["preconditioner"] and not (isinstance(inside, (int, float)) and inside == 1):
                raise ValueError("preconditioner is given beside a sampler that has another one: give one of them")
            found.setdefault("localization_metric", None)  # as is usual with this preconditioner
        return found

    @property
    def template(self) -> Sampler:
        """The sampler as it was asked for, with the steps in which it adapts; lr and nβ may be open."""
        return _adapting(self._template, self._adapts_for, self.lr)

    def localized(self, num_parameters: int, norm: float) -> Settings:
        """With γ; by default that of so many sampled elements of this norm, see :func:`default_localization`."""
        if self.localization is not None:
            return self
        return dataclasses.replace(self, localization=default_localization(num_parameters, norm))

    def complete_sampler(self, lr: float, nbeta: float, *, friction: float = 1.0, name: str = "") -> Sampler:
        """The sampler of the chains.

        Args:
            lr, nbeta: ε and nβ.
            friction: α < 1 replaces the sampler by its variant with momentum (``Sampler.momentum_variant``).
            name: of the sampler that takes its place; empty: none does.
        """
        template = self._template
        if name:
            template = make_sampler(name, **{f.name: getattr(template, f.name) for f in dataclasses.fields(Sampler)})
        elif friction != 1 and template.momentum_variant is not None:
            shared = {f.name: getattr(template, f.name) for f in dataclasses.fields(Sampler)}
            template = make_sampler(template.momentum_variant, **shared, momentum_decay=friction)
        return dataclasses.replace(_adapting(template, self._adapts_for, self.lr), lr=lr, nbeta=nbeta)

    @property
    def needs_metric(self) -> bool:
        """Whether the preconditioner is to be estimated from the curvature at w*."""
        return isinstance(getattr(self._template, "preconditioner", None), str)

    @property
    def metric_gradients(self) -> int:
        """What estimating the preconditioner takes, or has taken, of the budget; 0: it is not estimated."""
        given = getattr(self._template, "preconditioner", None)
        return METRIC_GRADIENTS if isinstance(given, (str, EstimatedMetric)) else 0

    def in_metric(self, metric: Mapping[str, Tensor]) -> Settings:
        """With the preconditioner that was estimated, in a sampler object."""
        sampler = dataclasses.replace(self._template, preconditioner=EstimatedMetric(metric))  # type: ignore[call-arg]
        return dataclasses.replace(self, sampler=sampler, preconditioner=None, localization_metric=None)

    @property
    def is_default_sampler(self) -> bool:
        """Whether the sampler may be replaced by its variant with momentum."""
        return self.sampler is None and self._template.metric == "identity"

    @property
    def needs_ends(self) -> bool:
        """Whether the chains have to say where they end."""
        return self.keep_ends or self.sensitivity

    @property
    def wants_bias_correction(self) -> bool:
        if self.nbeta == 0:
            return False
        if self.bias_correction is None:
            return self.lr is None and _can_be_corrected(self._template)
        return bool(self.bias_correction)

    def nbeta_for(self, num_samples: int | None) -> float:
        """nβ; by default that of so many samples.

        Raises:
            ValueError: it is open, and nobody knows how many samples there are.
        """
        if self.nbeta is not None:
            return self.nbeta
        if num_samples is None:
            raise ValueError(
                "nbeta=None requires the dataset size, but data has no length: pass nbeta=default_nbeta(n)."
            )
        return default_nbeta(num_samples)

    # ---- the length ----------------------------------------------------------------------------------------

    def _check_length(self) -> None:
        """Raise ValueError if the length is both given and to be found."""
        limits = [n for n in LIMITS if getattr(self, n) is not None]
        given = [n for n in ("num_draws", "num_burnin") if getattr(self, n) is not None]
        if limits and given:
            raise ValueError(
                f"{limits[0]}={getattr(self, limits[0])} finds the length of the chains, and {given[0]}="
                f"{getattr(self, given[0])} sets it: give one of them"
            )
        if self.max_gradients is not None and self.longest.num_draws < 2:
            least = (UNUSED + 2 * self.num_steps_bw_draws) * self.num_chains * self.gradients_per_step
            raise ValueError(
                f"max_gradients={self.max_gradients} is too few for {self.num_chains} chains: give at least "
                f"{math.ceil(least * (1 + PILOT_SHARE)) + 1 + self.metric_gradients}"
            )

    @property
    def by_need(self) -> bool:
        """Whether chains go on until λ̂ is known well enough, rather than for a length that was given."""
        return self.num_draws is None and self.num_burnin is None

    @property
    def gradients_per_step(self) -> int:
        template = self._template
        return template.trajectory()[0] if isinstance(template, MetropolisSampler) else 1

    @property
    def has_pilots(self) -> bool:
        """Whether pilot chains choose the step size, if the run is not too short for them."""
        return self.lr is None and self.wants_bias_correction

    @property
    def may_be_challenged(self) -> bool:
        """Whether a pilot may try another metric: the sampler is open, and a budget has room for it."""
        return self.is_default_sampler and (self.max_gradients is None or self.max_gradients >= _LEAST_CHALLENGED)

    @property
    def schedule(self) -> Schedule:
        """The length that was given; of a length by need the one that pilots and costs are measured by."""
        if self.by_need:
            draws = min(DEFAULT_NUM_DRAWS, self.longest.num_steps // (2 * self.num_steps_bw_draws))
            return Schedule(draws, draws * self.num_steps_bw_draws, self.num_steps_bw_draws)
        draws = DEFAULT_NUM_DRAWS if self.num_draws is None else self.num_draws
        return Schedule(draws, draws if self.num_burnin is None else self.num_burnin, self.num_steps_bw_draws)

    @property
    def longest(self) -> Schedule:
        """What the chains are prepared to do: of a length by need every step but the first few may become a draw."""
        if not self.by_need:
            return self.schedule
        between, most = self.num_steps_bw_draws, DEFAULT_MOST
        if self.max_gradients is not None:
            left = max(0, self.max_gradients - self.metric_gradients)
            affordable = left / (self.num_chains * self.gradients_per_step)
            if self.has_pilots:
                nominal = 2 * DEFAULT_NUM_DRAWS * between
                share = PILOT_SHARE + (CHALLENGE_SHARE if self.may_be_challenged else 0.0)
                affordable = max(affordable / (1 + share), affordable - share * nominal)
            most = int(affordable / between)
        elif self.max_seconds is not None:
            most = DEFAULT_MOST_TIMED
        return Schedule(max(0, most - -(-UNUSED // between)), -(-UNUSED // between) * between, between)

    @property
    def looks(self) -> tuple[int, ...]:
        """Steps after which chains of a length by need are looked at, the last of them all; empty for others."""
        if not self.by_need:
            return ()
        last, found = self.longest.num_steps, [FIRST_LOOK * self.num_steps_bw_draws]
        while found[-1] < last:
            found.append(2 * found[-1])
        return (*found[:-1], last)

    @property
    def target(self) -> float:
        """The total relative error at which a length by need ends; 0: where the budget does."""
        return DEFAULT_TARGET if self.target_error is None else self.target_error

    @property
    def first_look(self) -> int:
        """Steps after which chains of a length by need may be over for the first time; 0 for others."""
        return FIRST_LOOK * self.num_steps_bw_draws if self.by_need else 0

    @property
    def _adapts_for(self) -> int:
        """Steps in which samplers adapt if nobody says for how many."""
        return self.looks[0] // 2 if self.by_need else self.schedule.num_burnin

    # ---- what names a run ----------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What names a run, apart from model and data; as JSON gives it back."""
        template, execution = self.template, self.execution
        options = {k: v for k, v in vars(template).items() if k not in ("lr", "nbeta")}
        if options.get("localization_metric") == "euclidean":  # as it was before there was another
            del options["localization_metric"]
        return {
            "sampler": template.name,
            **{name: option_identity(value) for name, value in options.items()},
            "lr": self.lr,
            "nbeta": self.nbeta,
            "bias_correction": self.wants_bias_correction,
            "length": "by need" if self.by_need else "given",
            "num_steps_bw_draws": self.num_steps_bw_draws,
            "num_chains": self.num_chains,
            "microbatch_size": execution.microbatch_size,
            "autocast": None if execution.autocast is None else str(execution.autocast),
            "observables": sorted(self.observables or ()),
            "strategy": execution.strategy,
            "seed": self.seed,
            "keep_ends": self.needs_ends,
            **({"refine": self.refine} if self.refine else {}),
        }


_NEED_LOSS = {
    "bias_correction": "bias is a share of nβ·(L − L(w*)), which is 0",
    "sensitivity": "λ̂ is 0 at any localization",
    "refine": "the minimum of localization alone is w* itself",
}
"""Options that localization alone has no use for, and why."""
_IN_METRIC = "preconditioned-sgld"
"""The sampler of a preconditioner that is given without one."""
_COUNTS = {
    "num_chains": 1,
    "num_draws": 1,
    "num_burnin": 0,
    "num_steps_bw_draws": 1,
    "max_gradients": 1,
    "batch_size": 1,
    "seed": 0,
}
"""The least that each count may be."""
_OPTIONAL = ("num_draws", "num_burnin", "max_gradients", "batch_size")


def _of_preset(preset: str | None) -> Mapping[str, Any]:
    if preset is None:
        return {}
    if not isinstance(preset, str):
        raise TypeError(f"preset must be a name, got {type(preset).__name__}: choose one of: {', '.join(PRESETS)}")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; choose one of: {', '.join(PRESETS)}")
    return PRESETS[preset]


def _can_be_corrected(sampler: Sampler) -> bool:
    return sampler.supports_bias_correction and sampler.noise_level == 1 and sampler.bounding_box_size is None


def _adapting(sampler: Sampler, num_burnin: int, lr: float | None) -> Sampler:
    """With `adapt_steps` where it was left open: a metric is frozen at the end of burn-in, and so is the step size of
    a Metropolis-adjusted sampler, which adapts only if no `lr` was given."""
    if getattr(sampler, "adapt_steps", 0) is not None:
        return sampler
    steps = max(1, num_burnin) if sampler.kind != "metropolis" else num_burnin if lr is None else 0
    return dataclasses.replace(sampler, adapt_steps=steps)  # type: ignore[call-arg]


def _check_observables(observables: Mapping[str, Observable] | None) -> None:
    if observables is None:
        return
    if not isinstance(observables, Mapping):
        raise TypeError(f"observables must be a mapping from names to functions, got {type(observables).__name__}")
    for name, function in observables.items():
        if not isinstance(name, str) or not callable(function):
            raise TypeError(f"observables must map names to functions of a draw, got {name!r}: {function!r:.60}")


# ---- how options used to be called -------------------------------------------------------------------------

_MOVED = tuple(field.name for field in dataclasses.fields(Execution))
"""Options of `Execution` that used to be arguments of their own."""


def with_old_keywords(given: dict[str, Any], old: Mapping[str, Any], function: str) -> Settings:
    """Settings from today's arguments and those that were called otherwise before 0.2.

    ``strategy``, ``release_gradients``, ``microbatch_size``, ``autocast`` and ``distributed`` belong to `Execution`
    now, ``sampler_options`` to the sampler, and ``heat_correction`` is called ``bias_correction``. They still work,
    with a DeprecationWarning.

    Raises:
        TypeError: a keyword that neither is nor was an argument.
        TypeError, ValueError: as :func:`llc_fast.estimate_llc`.
    """
    known = {*_MOVED, "sampler_options", "heat_correction"}
    if unknown := sorted(set(old) - known):
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    settings = dict(given)
    if settings.get("execution", 0) is None:
        del settings["execution"]
    moved = {name: value for name, value in old.items() if name in _MOVED}
    if moved:
        if "execution" in settings:
            raise TypeError(f"{next(iter(moved))} belongs to execution=Execution(…), which is given too: move it there")
        settings["execution"] = Execution(**moved)
        _say_old(next(iter(moved)), f"execution=Execution({next(iter(moved))}=…)")
    if "heat_correction" in old:
        if settings.get("bias_correction") is not None:
            raise TypeError("heat_correction is an old name of bias_correction, which is given too: leave it out")
        settings["bias_correction"] = old["heat_correction"]
        _say_old("heat_correction", "bias_correction")
    if old.get("sampler_options"):
        sampler, options = settings.get("sampler"), dict(old["sampler_options"])
        if options.get("adapt_steps", 0) is None:  # it used to mean never
            options["adapt_steps"] = math.inf
        if isinstance(sampler, Sampler):
            raise TypeError("sampler_options is given beside a sampler object: give its options to the sampler")
        _say_old("sampler_options", "sampler=RMSpropSGLDSampler(…), a sampler object with its options")
        settings["sampler"] = make_sampler("sgld" if sampler is None else sampler, **options)
    return Settings(**settings)


def carried_over(given: Mapping[str, Any], previous: Mapping[str, Any], *, decides: bool) -> dict[str, Any]:
    """Arguments of an estimate, where those that are open are as in an earlier result: nothing is left to calibrate.

    Carried over are the sampler with its options, ε, nβ, γ, whether bias is subtracted, and the size of minibatches;
    not the length, the seed, or what is sampled. Of the sampler's options none is, where a sampler is given.

    Args:
        given: arguments by name.
        previous: ``settings`` of a result.
        decides: whether the data make minibatches of their own size.

    Raises:
        TypeError, ValueError: `previous` is not the settings of a result, or its sampler had tensors for a metric.
    """
    if not isinstance(previous, Mapping):
        raise TypeError(f"settings must be those of an earlier result (result.settings), got {type(previous).__name__}")
    if missing := [name for name in ("sampler", *_CARRIED) if name not in previous]:
        raise ValueError(f"settings has no {missing[0]!r}: pass result.settings as they are")
    found = dict(given)
    if found.get("sampler") is None:
        cls = sampler_class(previous["sampler"])
        options = {f.name: previous[f.name] for f in dataclasses.fields(cls) if f.name in previous}
        if options.get("preconditioner") == GIVEN:
            raise ValueError(
                f"settings are of a run whose sampler {cls.name!r} was given tensors as its preconditioner, which they "
                f"do not hold: pass the sampler too, sampler={cls.__name__}(preconditioner=…)"
            )
        if options.get("adapt_steps") == previous.get("num_burnin"):  # as is usual
            options.pop("adapt_steps", None)
        found["sampler"] = make_sampler(cls.name, **{k: v for k, v in options.items() if k not in _CARRIED})
    cls = sampler_class(found["sampler"]) if isinstance(found["sampler"], str) else type(found["sampler"])
    takes_all = getattr(cls, "kind", "") == "metropolis"
    for name in (*_CARRIED, *(() if decides or takes_all else ("batch_size",))):
        if found.get(name) is None and getattr(found["sampler"], name, None) is None:
            found[name] = previous.get(name)
    return found


def _say_old(name: str, now: str) -> None:
    warnings.warn(f"{name} is now given as {now}", DeprecationWarning, stacklevel=4)
