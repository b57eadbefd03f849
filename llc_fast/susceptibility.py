"""Susceptibilities of a model's components: a run for each, one of all weights, and the control at nβ = 0."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from torch import nn

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure
from llc_fast.behavioral import Behavioral
from llc_fast.data import is_loader
from llc_fast.language import NextToken
from llc_fast.objective.components import Component
from llc_fast.objective.components import components as components_of
from llc_fast.objective.objective import LossFunction
from llc_fast.objective.per_sample import Per, ProbeLoss
from llc_fast.objective.selection import select
from llc_fast.result import Warning
from llc_fast.samplers.base import Sampler
from llc_fast.samples import Samples
from llc_fast.sampling import CACHE_BYTES, Some, run_samples
from llc_fast.settings import PRESETS
from llc_fast.stats.convergence import ess_bulk, r_hat
from llc_fast.stats.influence import FlatDraws
from llc_fast.stats.susceptibility import Control, ProbeDraws, Susceptibilities
from llc_fast.stats.susceptibility import susceptibilities as susceptibilities_of
from llc_fast.support.optional import require
from llc_fast.support.warned import issue, shown_otherwise

Array = NDArray[np.float64]
What = Literal["chi", "z", "standardized", "difference"]

DATA = "data"
"""The probe that L̄ is the mean loss of."""
_DATA_SAMPLES = 512
"""Of the data, samples that L̄ is the mean over, if nobody gives a probe for it."""
_FULL = "all weights"
_LOOKED_AT = 32
"""Items of each probe whose chains are compared, spread over it."""
_LEAST_ESS, _MOST_R_HAT = 100.0, 1.05
_REFUSED = {
    "checkpoint": "a store has its own",
    "refine": "each component would find a w* of its own",
    "warm_start": "chains of a component and of all weights start from w*",
    "sensitivity": "it is of λ̂",
    "keep_ends": "nothing goes on from there",
}


# ---- the result --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Of:
    """χ of one probe.

    Attributes:
        found: over all its items that have a loss.
        control: the same at nβ = 0.
        keep: which items these are, ``[sample]`` or ``[sample, token]``.
    """

    found: Susceptibilities
    control: Susceptibilities | None
    keep: NDArray[np.bool_]

    def likeness(self) -> Array:
        """The correlation of χ with that of the control over items, by component; NaN where either is constant."""
        assert self.control is not None
        found, control = self.found.standardized, self.control.standardized
        result: Array = (found * control).mean(axis=1)
        return result

    def spread(self, values: NDArray[Any], fill: Any = math.nan) -> NDArray[Any]:
        """``[component, item]`` as ``[component, sample(, token)]``."""
        result = np.full((len(values), *self.keep.shape), fill, values.dtype)
        result[:, self.keep] = values
        return result


@dataclass(frozen=True, repr=False)
class SusceptibilityResult:
    """What :func:`susceptibilities` leaves behind.

    Probes are named where there is more than one.

    Attributes:
        components: names of the components that have a χ.
        left_out: why the others have none, by name.
        probes: names of the probes.
        reference_loss: L(w*) of the data that L̄ is the mean over.
        nbeta, localization: nβ and γ of all runs but the control's.
        lr: ε by run.
        convergence: the smallest effective sample size and the largest R̂ of L̄ and some items, by run.
        samples: the draws, by run: ``"all weights"``, each component, and those with ``"control: "`` before them.
        warnings: reasons not to trust something; each has a ``code``.
        is_partial: whether somebody stopped before all components had run.
    """

    components: tuple[str, ...]
    left_out: Mapping[str, str]
    probes: tuple[str, ...]
    reference_loss: float
    nbeta: float
    localization: float
    lr: Mapping[str, float]
    convergence: Mapping[str, tuple[float, float]]
    samples: Mapping[str, Samples]
    warnings: list[Warning] = field(default_factory=list)
    is_partial: bool = False
    _of: Mapping[str, _Of] = field(default_factory=dict)

    def _probe(self, probe: str | None) -> _Of:
        if probe is None and len(self.probes) == 1:
            probe = self.probes[0]
        if probe is None or probe not in self._of:
            raise ValueError(f"probe must be one of {', '.join(map(repr, self.probes))}, got {probe!r}")
        return self._of[probe]

    def chi(self, probe: str | None = None) -> Susceptibilities:
        """χ with errors, z-scores and degrees of freedom ``[component, item]``, items being those that have a loss."""
        return self._probe(probe).found

    def control(self, probe: str | None = None) -> Susceptibilities | None:
        """The same at nβ = 0; None: there is no control."""
        return self._probe(probe).control

    def against_control(self, q: float = 0.05, probe: str | None = None) -> Control:
        """χ beside the control: differences, their errors, and which χ are larger in size.

        Raises:
            ValueError: there is no control.
        """
        of = self._probe(probe)
        if of.control is None:
            raise ValueError("control was not sampled: call susceptibilities(…, control=True)")
        return of.found.against(of.control, q)

    def significant(self, q: float = 0.05, probe: str | None = None) -> NDArray[np.bool_]:
        """Entries with χ ≠ 0 at false discovery rate `q`, ``[component, sample]`` or with ``token`` after it."""
        of = self._probe(probe)
        return of.spread(of.found.significant(q), False)

    def to_xarray(self, probe: str | None = None, *, q: float = 0.05) -> xarray.Dataset:
        """All numbers of a probe over ``component``, ``sample`` and, if it has tokens, ``token``.

        ``chi``, ``stderr``, ``z`` (a test of χ = 0), ``standardized`` (compares items; no test), ``p``,
        ``significant``; with a control ``control``, ``control_stderr``, ``difference``, ``difference_stderr``,
        ``exceeds``; and of each component ``phi``, ``phi_stderr``, ``ess``, ``r_hat``, ``lr``, and with a control
        ``control_correlation``, of χ with the control's over items. Tokens that have no loss are NaN.
        """
        of = self._probe(probe)
        found = of.found
        dims = ("component", "sample", "token")[: 1 + of.keep.ndim]
        values: dict[str, NDArray[Any]] = {
            "chi": found.value,
            "stderr": found.stderr,
            "z": found.z,
            "standardized": found.standardized,
            "p": found.p,
            "significant": found.significant(q),
        }
        if of.control is not None:
            beside = found.against(of.control, q)
            values |= {"control": of.control.value, "control_stderr": of.control.stderr}
            values |= {"difference": beside.difference, "difference_stderr": beside.stderr, "exceeds": beside.exceeds}
        variables: dict[str, Any] = {
            name: (dims, of.spread(array, False if array.dtype == bool else math.nan)) for name, array in values.items()
        }
        of_components = {
            "phi": found.phi,
            "phi_stderr": found.phi_stderr,
            "ess": np.array([self.convergence[name][0] for name in self.components]),
            "r_hat": np.array([self.convergence[name][1] for name in self.components]),
            "lr": np.array([self.lr[name] for name in self.components]),
        }
        if of.control is not None:
            of_components["control_correlation"] = of.likeness()
        variables |= {name: (("component",), array) for name, array in of_components.items()}
        dataset: xarray.Dataset = require("xarray", "xarray").Dataset(
            variables,
            coords={"component": list(self.components)},
            attrs={
                "reference_loss": self.reference_loss,
                "nbeta": self.nbeta,
                "localization": self.localization,
                "q": q,
                "partial": int(self.is_partial),
            },
        )
        return dataset

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        probe: str | None = None,
        what: What = "chi",
        q: float = 0.05,
        items: Iterable[str] | None = None,
    ) -> Figure:
        """A heat map, components by items; gray: χ does not differ from 0.

        Args:
            path: where to save it, too.
            probe: which.
            what: ``"chi"``, ``"z"``, ``"standardized"`` or ``"difference"``, χ less that of the control.
            q: false discovery rate.
            items: names of the items that have a loss.

        Raises:
            ValueError: a difference without a control.
        """
        from llc_fast.plots import plot_susceptibilities

        of = self._probe(probe)
        if what not in _LABELS:
            raise ValueError(f"what must be one of {', '.join(map(repr, _LABELS))}, got {what!r}")
        if what == "difference":
            values = self.against_control(q, probe).difference
        else:
            values = {"chi": of.found.value, "z": of.found.z, "standardized": of.found.standardized}[what]
        mask = of.found.significant(q)
        named = None if items is None else list(items)
        figure = plot_susceptibilities(values, self.components, mask, items=named, label=_LABELS[what])
        if path is not None:
            figure.savefig(path)
        return figure

    def summary(self, q: float = 0.05) -> str:
        """What came out, in words."""
        lines = [
            f"Susceptibilities of {len(self.components)} components at nβ = {self.nbeta:.6g}, γ = "
            f"{self.localization:.4g}" + (" (interrupted)" if self.is_partial else "")
        ]
        for name in self.probes:
            of = self._of[name]
            total, few = of.found.value.size, int(of.found.significant(q).sum())
            known = np.isfinite(of.found.stderr).all()
            line = f"  {name}: {few} of {total} entries differ from 0 (false discovery rate {q:g})"
            if of.control is not None:
                line += f", {int(of.found.against(of.control, q).exceeds.sum())} exceed the control at nβ = 0"
                if (alike := of.likeness()[np.isfinite(of.likeness())]).size:
                    line += f"; correlation with the control's over items: {alike.min():.2f} to {alike.max():.2f}"
            lines.append(line + ("" if known else "; some have no error: chains are too short"))
        ess = min(self.convergence.items(), key=lambda entry: _or(entry[1][0], -math.inf))
        worst = max(self.convergence.items(), key=lambda entry: _or(entry[1][1], math.inf))
        lines.append(
            f"  effective draws: {ess[1][0]:.0f} at least ({ess[0]}); R̂: {worst[1][1]:.3f} at most ({worst[0]})"
        )
        lines += [f"  left out: {name}: {why}" for name, why in self.left_out.items()]
        lines += [f"  warning ({warning.code}): {warning}" for warning in self.warnings]
        return "\n".join(lines)

    __str__ = summary

    def __repr__(self) -> str:
        return self.summary()

    def close(self) -> None:
        """Close the stores; what has been computed stays."""
        for found in self.samples.values():
            found.close()


_LABELS: dict[str, str] = {
    "chi": "susceptibility χ",
    "z": "χ / standard error",
    "standardized": "χ, standardized within each component",
    "difference": "χ − χ at nβ = 0",
}


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


# ---- the call ------------------------------------------------------------------------------------------------


def susceptibilities(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | Behavioral | str | None,
    probes: Mapping[str, Any],
    components: Iterable[Any] | Mapping[str, Any] | str,
    *,
    store: str | os.PathLike[str] | None = None,
    control: bool = True,
    per: Per = "sample",
    probe_loss: ProbeLoss | None = None,
    cache_bytes: int = CACHE_BYTES,
    **settings: Any,
) -> SusceptibilityResult:
    """χ of each component of a model for each sample or token of probes, with standard errors and a control.

        χ(C) = −(E_C[φ·Δ] − E_C[φ]·E[Δ]),    φ = L̄ − L(w*),    Δ = ℓ − L̄

    E_C is the mean over chains in which only the component C moves, E that over chains in which everything does, ℓ the
    loss of a sample or token of a probe and L̄ the mean loss of the data, both at the draw. See
    :mod:`llc_fast.stats.susceptibility` for what it is the derivative of, and for its errors.

    There is one run of :func:`llc_fast.sample` for all weights and one for each component, and with `control` each of
    these again at nβ = 0, where chains see the localization alone. All have the same probes, nβ, γ, length, number of
    chains and minibatches: what is not given is that of the first run, all weights. The step size is chosen for each
    run, unless it is given; at nβ = 0 always, from γ. Each run has random numbers of its own, which follow `seed` and
    the component's name: errors take runs to be independent, and a component that is added changes no other run.

    Args:
        model, data, loss_fn: as for :func:`llc_fast.estimate_llc`.
        probes: by name, as for :func:`llc_fast.sample`. If none is called ``"data"``, a fixed random sample of `data`,
            512 or a few more, is the one that L̄ is the mean over; else yours is, and χ of its items is computed, too.
        components: names as ``params=`` takes them; a mapping from names to what ``params=`` takes, masks for example;
            or ``"heads"``, all attention heads.
        store: a folder with a store of each run; None: in memory. Killed at any moment, the same call resumes, and
            runs that are over are opened.
        control: whether to sample at nβ = 0, too.
        per: ``"sample"`` or ``"token"``.
        probe_loss, cache_bytes: as for :func:`llc_fast.sample`.
        **settings: any other argument of :func:`llc_fast.sample`. ``params`` is what "all weights" are.

    Returns:
        A :class:`SusceptibilityResult`. Components without a chain that stayed finite are left out. If somebody
        interrupts, it has those that were over.

    Raises:
        TypeError, ValueError: as :func:`llc_fast.sample`; unknown components, before any sampling; all chains of all
            weights, or of all components, diverged.
        KeyboardInterrupt: before one component was over.
    """
    if not isinstance(probes, Mapping) or not probes:
        raise ValueError("probes must be a mapping from names to data, with one at least")
    for name, why in _REFUSED.items():
        if settings.get(name):
            raise TypeError(f"{name} is not an argument of susceptibilities(): {why}. Leave it out")
    if settings.get("nbeta") == 0 or getattr(settings.get("sampler"), "nbeta", None) == 0:
        raise ValueError("nbeta=0 is the control: leave it out, or pass the nβ of the posterior")
    parts = _parts(model, components)
    runs = _Runs(model, data, loss_fn, dict(probes), per, probe_loss, cache_bytes, store, settings)
    runs.go(parts, control)
    result = runs.result(parts, control)
    issue(result.warnings, stacklevel=2)
    return result


def _parts(model: nn.Module, components: object) -> dict[str, Any]:
    """What ``params=`` takes, by the names of components; each is looked up in the model.

    Raises:
        TypeError, ValueError: not the model's; none; two of the same name.
    """
    if isinstance(components, str):
        if components not in ("heads", "all heads"):
            raise ValueError(f'components must be a list of names, a mapping, or "heads", got {components!r}')
        entries = [(name, name) for name in components_of(model) if re.search(r"\bh\d+$", name)]
        if not entries:
            raise ValueError(f'components="{components}": the model has no attention heads that are known by name')
    elif isinstance(components, Mapping) and not isinstance(components, Component):
        entries = list(components.items())
    elif isinstance(components, Iterable) and not isinstance(components, Component):
        entries = [(entry.name if isinstance(entry, Component) else entry, entry) for entry in components]
    else:
        raise TypeError(f"components must be a list of names or a mapping, got {type(components).__name__}")
    if not entries:
        raise ValueError("components is empty: name one at least")
    found: dict[str, Any] = {}
    for name, part in entries:
        if not isinstance(name, str):
            raise TypeError(f"components must have names that are texts, got {name!r:.60}: pass a mapping from names")
        if name in found or name == _FULL:
            raise ValueError(f"components has the name {name!r} twice" if name in found else f"{name!r} is taken")
        try:
            select(model, part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"components[{name!r}]: {error}") from error
        found[name] = part
    return found


class _Runs:
    """The runs, one after another."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss_fn: Any,
        probes: dict[str, Any],
        per: Per,
        probe_loss: ProbeLoss | None,
        cache_bytes: int,
        store: str | os.PathLike[str] | None,
        settings: dict[str, Any],
    ) -> None:
        self._probes = {**probes, DATA: probes.get(DATA, Some(data, _DATA_SAMPLES))}
        self.asked, self.per, self._settings = tuple(probes), per, settings
        self._shared: dict[str, Any] = {"per": per, "probe_loss": probe_loss, "cache_bytes": cache_bytes}
        self._given = model, data, loss_fn
        self._folder = None if store is None else Path(os.fsdecode(store)).absolute()
        self.samples: dict[str, Samples] = {}
        self.warnings: dict[str, list[Warning]] = {}
        self.is_partial = False

    def go(self, parts: Mapping[str, Any], control: bool) -> None:
        """All runs, or as many as somebody waits for."""
        seed = self._settings.get("seed", 0)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        first = self._run(_FULL, self._settings, seed)
        if first is None:
            raise KeyboardInterrupt
        posterior = self._settings | self._same_as(first)
        prior = self._at_zero(posterior)
        wanted: list[tuple[str, dict[str, Any]]] = []
        if control:
            wanted.append((_control(_FULL), prior))
        for name, part in parts.items():
            wanted.append((name, posterior | {"params": part}))
            if control:
                wanted.append((_control(name), prior | {"params": part}))
        for name, settings in wanted:
            if self._run(name, settings, _seed_of(seed, name)) is None:
                self.is_partial = True
                return

    def _same_as(self, first: Samples) -> dict[str, Any]:
        """What other runs have from the first one."""
        said = first.settings
        found = {"nbeta": first.nbeta, "localization": said["localization"]}
        if isinstance(sampler := self._settings.get("sampler"), Sampler):  # which may have its own
            found = {name: value for name, value in found.items() if getattr(sampler, name, None) is None}
        # A loader decides for itself, and adjusted samplers take everything.
        decides = is_loader(self._given[1]) or said.get("sampler") in ("mala", "hmc")
        if (size := said.get("batch_size")) is not None and not decides:
            found["batch_size"] = size
        return found

    @staticmethod
    def _at_zero(settings: dict[str, Any]) -> dict[str, Any]:
        """The same without the loss."""
        found = {name: value for name, value in settings.items() if name not in ("lr", "bias_correction")}
        if isinstance(sampler := found.get("sampler"), Sampler):
            found["sampler"] = dataclasses.replace(sampler, lr=None, nbeta=None)
        if (preset := found.pop("preset", None)) is not None:
            for name, value in PRESETS[preset].items():
                if name not in ("lr", "bias_correction"):
                    found.setdefault(name, value)
        return found | {"nbeta": 0.0}

    def _run(self, name: str, settings: Mapping[str, Any], seed: int) -> Samples | None:
        """One run; None: somebody stopped it."""
        place = None if self._folder is None else self._folder / _file_name(name)
        model, data, loss_fn = self._given
        try:
            with shown_otherwise():
                found, warnings = run_samples(
                    model,
                    data,
                    loss_fn,
                    probes=self._probes,
                    store=place,
                    order=self._settings.get("seed", 0),
                    settings={**settings, "seed": seed},
                    **self._shared,
                )
        except KeyboardInterrupt:
            if _FULL not in self.samples:
                raise
            return None
        if found.is_partial:
            return None
        self.samples[name] = found
        # Of a run that was over before, those of its result.
        self.warnings[name] = warnings or list(found.llc().warnings)
        return found

    # ---- what follows of them --------------------------------------------------------------------------------

    def result(self, parts: Mapping[str, Any], control: bool) -> SusceptibilityResult:
        """χ of all components that have run."""
        finite = {name: _finite_chains(found) for name, found in self.samples.items()}
        base = (_FULL, _control(_FULL)) if control else (_FULL,)
        for name in base:
            if name in finite and not finite[name]:
                remedy = "lr" if name == _FULL else "localization, or control=False"
                way = "smaller" if name == _FULL else "larger"
                raise ValueError(f"all chains of {name!r} diverged: use a {way} {remedy}")
        names, left_out = list[str](), dict[str, str]()
        for name in parts:
            needed = (name, _control(name)) if control else (name,)
            if any(each not in self.samples for each in needed):
                left_out[name] = "it has not run"
                continue
            bad = [each for each in needed if not finite[each]]
            if bad:
                left_out[name] = "all its chains diverged" + (" at nβ = 0" if bad[0] != name else "")
                continue
            names.append(name)
        if not names:
            if self.is_partial:
                raise KeyboardInterrupt
            raise ValueError("all chains of all components diverged: use a smaller lr")
        first = self.samples[_FULL]
        reference = _reference_loss(first)
        used = [*base, *(each for name in names for each in ((name, _control(name)) if control else (name,)))]
        losses = {each: _mean_loss(self.samples[each], finite[each]) for each in used}
        of: dict[str, _Of] = {}
        for probe in self.asked:
            keep = _kept_items(first, probe)

            def draws(each: str, probe: str = probe, keep: NDArray[np.bool_] = keep) -> ProbeDraws:
                array = self.samples[each].losses(probe).variable
                return ProbeDraws(FlatDraws(array, chains=finite[each], keep=keep), losses[each])

            def chi(prefix: Callable[[str], str], draws: Callable[[str], ProbeDraws] = draws) -> Susceptibilities:
                return susceptibilities_of({n: draws(prefix(n)) for n in names}, draws(prefix(_FULL)), reference)

            of[probe] = _Of(chi(str), chi(_control) if control else None, keep)
        convergence = {each: self._convergence(each, finite[each], losses[each]) for each in used}
        warnings = self._warnings(convergence, finite, left_out)
        return SusceptibilityResult(
            components=tuple(names),
            left_out=left_out,
            probes=self.asked,
            reference_loss=reference,
            nbeta=first.nbeta,
            localization=float(first.settings["localization"]),
            lr={each: float(self.samples[each].settings["lr"]) for each in used},
            convergence=convergence,
            samples=dict(self.samples),
            warnings=warnings,
            is_partial=self.is_partial,
            _of=of,
        )

    def _convergence(self, name: str, chains: list[int], loss: Array) -> tuple[float, float]:
        """The smallest ESS and the largest R̂ of L̄ and of some items' losses; of what does not move none."""
        series = [loss]
        for probe in self.asked:
            keep = _kept_items(self.samples[_FULL], probe)
            flat = FlatDraws(self.samples[name].losses(probe).variable, chains=chains, keep=keep)
            count = flat.shape[2]
            for k in np.unique(np.linspace(0, count - 1, min(_LOOKED_AT, count)).astype(int)):
                series.append(np.asarray(flat[:, :, int(k) : int(k) + 1], np.float64)[:, :, 0])
        moving = [each for each in series if np.ptp(each) > 1e-6 * max(float(np.abs(each).max()), 1e-30)]
        sizes, ratios = [ess_bulk(each) for each in moving], [r_hat(each) for each in moving]
        return (
            min((e for e in sizes if not math.isnan(e)), default=math.nan),
            max((r for r in ratios if not math.isnan(r)), default=math.nan),
        )

    def _warnings(
        self,
        convergence: Mapping[str, tuple[float, float]],
        finite: Mapping[str, list[int]],
        left_out: Mapping[str, str],
    ) -> list[Warning]:
        found = []
        if left_out:
            said = "; ".join(f"{name}: {why}" for name, why in left_out.items())
            found.append(Warning(f"{len(left_out)} components are left out ({said}).", "left-out"))
        lost = {name: len(self.samples[name].draws_done) - len(chains) for name, chains in finite.items()}
        if some := [f"{name} ({count})" for name, count in lost.items() if count and finite[name]]:
            found.append(
                Warning(f"Chains diverged and are left out, of: {_listed(some)}. Use a smaller lr.", "diverged-chains")
            )
        if few := [f"{name} ({e:.0f})" for name, (e, _) in convergence.items() if e < _LEAST_ESS]:
            found.append(
                Warning(
                    f"Effective sample sizes of losses are below {_LEAST_ESS:.0f} in {len(few)} of {len(convergence)} "
                    f"runs ({_listed(few)}): standard errors of χ are rough. Use a larger num_draws.",
                    "few-draws",
                )
            )
        if apart := [f"{name} ({r:.2f})" for name, (_, r) in convergence.items() if r > _MOST_R_HAT]:
            found.append(
                Warning(
                    f"R̂ of losses is above {_MOST_R_HAT} in {len(apart)} of {len(convergence)} runs "
                    f"({_listed(apart)}): their chains have not converged. Use a larger num_draws.",
                    "r-hat",
                )
            )
        having: dict[str, list[tuple[str, str]]] = {}
        for name, warnings in self.warnings.items():
            for warning in warnings:
                having.setdefault(warning.code, []).append((name, warning))
        for code, cases in having.items():
            said = (
                f"{len(cases)} of {len(self.samples)} runs have the warning {code!r} ({_listed(n for n, _ in cases)})."
            )
            found.append(Warning(f"{said} The first says: {cases[0][1]}", code))
        return found


def _control(name: str) -> str:
    return f"control: {name}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def _seed_of(seed: int, name: str) -> int:
    """A seed of its own for a run."""
    return (seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")) % 2**63


def _file_name(name: str) -> str:
    """Of a run's store; different names have different ones."""
    found = quote(name, safe=" ()[],=+")
    if len(found) > 150:
        found = f"{found[:100]} {hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return f"{found}.zarr"


def _kept_items(samples: Samples, probe: str) -> NDArray[np.bool_]:
    """Which items have a loss, ``[sample]`` or ``[sample, token]``."""
    at_reference = samples.init_losses(probe)
    assert at_reference is not None
    keep = ~np.isnan(at_reference)
    if not keep.any():
        raise ValueError(f"probes[{probe!r}] has no losses: none of its tokens counts")
    return keep


def _finite_chains(samples: Samples) -> list[int]:
    """Chains all of whose losses are finite: of the data, of probes, and of the run itself."""
    good = set(range(len(samples.draws_done))) - set(samples.llc().diverged_chains)
    for probe in samples.probes:
        keep = _kept_items(samples, probe)
        for part, values in samples.blocks(probe):
            finite = np.isfinite(values) | ~keep[part]
            good &= set(np.flatnonzero(finite.reshape(len(finite), -1).all(axis=1)).tolist())
    return sorted(good)


def _mean_loss(samples: Samples, chains: list[int]) -> Array:
    """L̄, ``[chain, draw]``: the mean over all items of the data that have a loss."""
    keep = _kept_items(samples, DATA)
    flat = FlatDraws(samples.losses(DATA).variable, chains=chains, keep=keep)
    total, count = np.zeros(flat.shape[:2]), flat.shape[2]
    step = max(1, 2**25 // (8 * total.size))
    for first in range(0, count, step):
        total += np.asarray(flat[:, :, first : first + step], np.float64).sum(axis=2)
    found: Array = total / count
    return found


def _reference_loss(samples: Samples) -> float:
    """L(w*) of the same."""
    at_reference = samples.init_losses(DATA)
    assert at_reference is not None
    return float(np.nanmean(at_reference.astype(np.float64)))
