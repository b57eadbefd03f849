"""The result of an estimate: numbers, error bars, plots, files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure
from llc_fast.schedule import Schedule
from llc_fast.stats.errors import StandardError, standard_error
from llc_fast.support.files import atomic_write
from llc_fast.support.optional import require

_FORMAT = 3


@dataclass(frozen=True)
class LLCResult:
    """An estimate of the local learning coefficient, λ̂ = nβ·(mean L over draws − L(w*)).

    Attributes:
        loss_trace: loss of every step, burn-in included, float64 ``[chain, step]``: the minibatch's, L_B(w_t), or with
            ``settings["paired_baseline"]`` L_B(w_t) − L_B(w*) + L(w*), which has the same expectation and less noise;
            with ``settings["heat_correction"]`` less `heat_trace`/nβ. NaN from the step on at which a chain was lost.
        init_loss: L(w*) over the whole data set.
        nbeta: nβ.
        schedule: which steps are draws.
        settings: everything that was used, chosen values included.
        warnings: reasons not to trust the estimate, each with what to do about it.
        diagnostics: further figures by name, None where there is nothing to make them from. Of the trace: ``r_hat``,
            ``ess_bulk``, ``ess_tail`` (Vehtari et al. 2021), ``chain_spread``, ``slow_times`` (of what single draws
            hide beneath their noise, the autocorrelation times that a chain spans), ``slow_size`` (of that, in λ̂),
            ``drift`` ± ``drift_stderr`` (of λ̂ from the first draw to the last), ``burnin_needed`` (steps),
            ``burnin_effect`` (on λ̂), ``spike_share``,
            ``init_loss_stderr``, ``init_loss_sensitivity`` (its share of λ̂). Of probes: ``acceptance`` (MALA),
            ``gradient_noise_share``, ``heating`` (the share of λ̂ that the step size makes), ``relaxations`` (of the
            stiff directions, among a chain's draws), ``distance`` (‖w − w*‖ of each chain), ``distance_growth``,
            ``distance_over_anchor`` (over ‖w*‖), ``distance_over_prior`` (‖w − w*‖²·γ/P, 1 if nothing but γ held w),
            ``chains_left``. See :mod:`llc_fast.diagnostics`; what they mean is in ``warnings``.
        observables: what the functions of ``estimate_llc(observables=…)`` gave, by name, float64 ``[chain, draw, …]``.
        steps_done: steps that each chain has done; None: all. Only a partial result has fewer.
        heat_trace: what step size and gradient noise add to nβ·(L − L(w*)) at every step, measured, float64
            ``[chain, step]``, see :meth:`llc_fast.samplers.Sampler.bias`; NaN for samplers that do not tell.
        ends: w − w* of every chain after its last step, by parameter, ``[chain, …]``, if ``keep_ends`` asked for it;
            what ``estimate_llc(warm_start=…)`` goes on from.
    """

    loss_trace: NDArray[np.float64]
    init_loss: float
    nbeta: float
    schedule: Schedule
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    observables: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    steps_done: list[int] | None = None
    heat_trace: NDArray[np.float64] | None = None
    ends: dict[str, NDArray[Any]] | None = None

    @property
    def is_partial(self) -> bool:
        """Whether the run was interrupted; the numbers are then those of the draws it had made."""
        return self.steps_done is not None

    @property
    def llc_trace(self) -> NDArray[np.float64]:
        """nβ·(L − L(w*)) of every draw, ``[chain, draw]``; the mean of a row is that chain's λ̂."""
        trace: NDArray[np.float64] = self.nbeta * (self.loss_trace[:, self.schedule.draws] - self.init_loss)
        return trace

    @property
    def llc_per_chain(self) -> NDArray[np.float64]:
        """λ̂ of each chain, ``[chain]``, from the draws it has made; NaN for a lost one, or one without draws."""
        trace, lost = self.llc_trace, self.lost_chains
        means = [
            math.nan if chain in lost or not count else float(trace[chain, :count].mean())
            for chain, count in enumerate(self._draws_done)
        ]
        return np.array(means)

    @property
    def _steps_done(self) -> list[int]:
        return self.steps_done or [self.loss_trace.shape[1]] * len(self.loss_trace)

    @property
    def lost_chains(self) -> list[int]:
        """Chains whose loss became non-finite."""
        return [c for c, steps in enumerate(self._steps_done) if not np.isfinite(self.loss_trace[c, :steps]).all()]

    @property
    def _draws_done(self) -> list[int]:
        steps = np.arange(self.loss_trace.shape[1])[self.schedule.draws]
        return [int((steps < count).sum()) for count in self._steps_done]

    @property
    def _good(self) -> NDArray[np.float64]:
        """The draws that λ̂ is made from ``[chain, draw]``."""
        chains, length = self._kept
        good: NDArray[np.float64] = self.llc_trace[chains, :length]
        return good

    @property
    def _kept(self) -> tuple[list[int], int]:
        """The chains that λ̂ is made from, and how many draws of each: those that were not lost, equally many.

        None if fewer than half of the chains are left. Of an interrupted run, as many draws of as many chains as
        makes the most in all.
        """
        lost, counts = set(self.lost_chains), self._draws_done
        started = [c for c, count in enumerate(counts) if count or c in lost]
        kept = [c for c in started if c not in lost]
        if 2 * len(kept) < len(started) or not kept:
            return [], self.schedule.num_draws
        length = max({counts[c] for c in kept}, key=lambda n: n * sum(counts[c] >= n for c in kept))
        return [c for c in kept if counts[c] >= length], length

    @property
    def llc_mean(self) -> float:
        """λ̂: the mean over all draws of all chains not lost; NaN if fewer than half of the chains are left."""
        return float(self._good.mean()) if len(self._good) else math.nan

    @property
    def llc_std(self) -> float:
        """Standard deviation of λ̂ over chains; NaN with fewer than two."""
        return float(self._good.mean(axis=1).std(ddof=1)) if len(self._good) > 1 else math.nan

    @property
    def llc_stderr(self) -> float:
        """Standard error of `llc_mean`: of the draws, see :func:`llc_fast.diagnostics.standard_error`, and of L(w*)."""
        return self._error.value

    @property
    def _error(self) -> StandardError:
        error = standard_error(self._good)
        of_init_loss = self.nbeta * float(self.diagnostics.get("init_loss_stderr") or 0.0)
        return error._replace(value=math.hypot(error.value, of_init_loss))

    def interval(self, prob: float = 0.95) -> tuple[float, float]:
        """A central interval for the sampler's long-run λ̂, from `llc_stderr` and Student's t.

        Monte Carlo error only: a bias of the sampler (step size, localization, too short a burn-in) is not in it.

        Raises:
            ValueError: `prob` is not between 0 and 1.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must be between 0 and 1, got {prob}")
        error = self._error
        half = error.quantile(prob) * error.value
        return self.llc_mean - half, self.llc_mean + half

    def summary(self) -> str:
        """A few lines for people."""
        low, high = self.interval()
        lost, good = len(self.lost_chains), self._good
        lines = [
            f"λ̂ = {self.llc_mean:.4g} ± {self.llc_stderr:.2g} (standard error; 95 % interval {low:.4g} to {high:.4g})",
            f"  {len(good)} chains × {good.shape[1] if len(good) else 0} draws"
            + (f" ({lost} chains lost)" if lost else "")
            + (" (interrupted)" if self.is_partial else "")
            + f", L(w*) = {self.init_loss:.6g}, nβ = {self.nbeta:.6g}",
            *([f"  {health}"] if (health := self._health()) else []),
            "  "
            + ", ".join(f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in self.settings.items()),
        ]
        return "\n".join(lines + [f"  WARNING: {w}" for w in self.warnings])

    def _health(self) -> str:
        """The figures that matter most, in a line."""
        formats = {
            "r_hat": "R̂ = {:.3f}",
            "ess_bulk": "ESS = {:.0f}",
            "drift": "drift {:+.2g}",
            "acceptance": "acceptance {:.2f}",
            "heating": "heating {:.1%}",
            "gradient_noise_share": "gradient noise {:.0%}",
            "distance_over_anchor": "‖w − w*‖/‖w*‖ = {:.2g}",
        }
        known = {name: self.diagnostics.get(name) for name in formats}
        return ", ".join(formats[name].format(value) for name, value in known.items() if value is not None)

    def __str__(self) -> str:
        return self.summary()

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Loss traces of the chains beside their running λ̂; written to `path` if given.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed (``pip install "llc_fast[plot]"``).
        """
        from llc_fast.plots import plot_result

        figure = plot_result(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_xarray(self) -> xarray.Dataset:
        """Loss trace, draws and per-chain λ̂ as an ``xarray.Dataset``; settings as attributes.

        Raises:
            ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
        """
        require("xarray", "xarray")
        import xarray

        steps = np.arange(self.loss_trace.shape[1])
        return xarray.Dataset(
            {
                "loss": (("chain", "step"), self.loss_trace),
                "llc": (("chain", "draw"), self.llc_trace),
                "llc_per_chain": ("chain", self.llc_per_chain),
            }
            | {
                name: (("chain", "draw", *(f"{name}_{k}" for k in range(values.ndim - 2))), values)
                for name, values in self.observables.items()
            },
            coords={
                "chain": np.arange(len(self.loss_trace)),
                "step": steps,
                "draw": np.arange(self.schedule.num_draws),
                "draw_step": ("draw", steps[self.schedule.draws]),
            },
            attrs={
                "llc_mean": self.llc_mean,
                "llc_stderr": self.llc_stderr,
                "init_loss": self.init_loss,
                "nbeta": self.nbeta,
                "settings": json.dumps(self.settings),
                "warnings": json.dumps(self.warnings),
            },
        )

    def to_arviz(self) -> Any:
        """The draws of λ̂ as ArviZ inference data: variable ``llc`` with dimensions (chain, draw).

        Raises:
            ModuleNotFoundError: ArviZ is not installed (``pip install "llc_fast[xarray]"``).
        """
        return require("arviz", "xarray").from_dict(posterior={"llc": self._good})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file (NumPy's npz); a crash leaves the old file or the new one, never a torn one."""
        meta = {
            "format": _FORMAT,
            "init_loss": self.init_loss,
            "nbeta": self.nbeta,
            "schedule": vars(self.schedule),
            "settings": self.settings,
            "warnings": self.warnings,
            "diagnostics": self.diagnostics,
            "steps_done": self.steps_done,
        }
        arrays: dict[str, Any] = {f"observable.{name}": values for name, values in self.observables.items()}
        if self.heat_trace is not None:
            arrays["heat_trace"] = self.heat_trace
        arrays |= {f"end.{name}": values for name, values in (self.ends or {}).items()}
        with atomic_write(Path(path)) as file:
            np.savez(file, loss_trace=self.loss_trace, meta=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LLCResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is not such a file, or is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                trace, meta = file["loss_trace"], json.loads(str(file["meta"]))
                heats = file["heat_trace"] if "heat_trace" in file.files else None
                observables, ends = (
                    {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
                    for prefix in ("observable.", "end.")
                )
            if meta.pop("format") == _FORMAT:
                schedule = Schedule(**meta.pop("schedule"))
                traces = {"loss_trace": trace, "heat_trace": heats, "observables": observables, "ends": ends or None}
                return cls(**traces, schedule=schedule, **meta)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a file that LLCResult.save wrote, or is damaged") from error
        raise ValueError(f"{os.fspath(path)!r} was written by another version of llc_fast")
