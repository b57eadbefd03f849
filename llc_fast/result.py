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

from llc_fast import diagnostics
from llc_fast.chains import Schedule

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

_FORMAT = 1


@dataclass(frozen=True)
class LLCResult:
    """An estimate of the local learning coefficient, λ̂ = nβ·(mean L over draws − L(w*)).

    Attributes:
        loss_trace: minibatch loss of every step, burn-in included, float64 ``[chain, step]``; NaN from the step
            on at which a chain was lost.
        init_loss: L(w*) over the whole data set.
        nbeta: nβ.
        schedule: which steps are draws.
        settings: everything that was used, chosen values included.
        warnings: reasons not to trust the estimate, each with what to do about it.
        diagnostics: further figures by name.
    """

    loss_trace: NDArray[np.float64]
    init_loss: float
    nbeta: float
    schedule: Schedule
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def llc_trace(self) -> NDArray[np.float64]:
        """nβ·(L − L(w*)) of every draw, ``[chain, draw]``; the mean of a row is that chain's λ̂."""
        trace: NDArray[np.float64] = self.nbeta * (self.loss_trace[:, self.schedule.draws] - self.init_loss)
        return trace

    @property
    def llc_per_chain(self) -> NDArray[np.float64]:
        """λ̂ of each chain, ``[chain]``; NaN for a lost one."""
        means: NDArray[np.float64] = self.llc_trace.mean(axis=1)
        return means

    @property
    def _good(self) -> NDArray[np.float64]:
        trace = self.llc_trace
        good: NDArray[np.float64] = trace[np.isfinite(trace).all(axis=1)]
        return good

    @property
    def llc_mean(self) -> float:
        """λ̂: the mean over all draws of all chains that were not lost; NaN if there is none."""
        return float(self._good.mean()) if len(self._good) else math.nan

    @property
    def llc_std(self) -> float:
        """Standard deviation of λ̂ over chains; NaN with fewer than two."""
        return float(self._good.mean(axis=1).std(ddof=1)) if len(self._good) > 1 else math.nan

    @property
    def llc_stderr(self) -> float:
        """Standard error of `llc_mean`; see :func:`llc_fast.diagnostics.standard_error`."""
        return diagnostics.standard_error(self._good).value

    def interval(self, prob: float = 0.95) -> tuple[float, float]:
        """A central interval for the sampler's long-run λ̂, from `llc_stderr` and Student's t.

        Monte Carlo error only: a bias of the sampler (step size, localization, too short a burn-in) is not in it.

        Raises:
            ValueError: `prob` is not between 0 and 1.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must be between 0 and 1, got {prob}")
        error = diagnostics.standard_error(self._good)
        half = error.quantile(prob) * error.value
        return self.llc_mean - half, self.llc_mean + half

    def summary(self) -> str:
        """A few lines for people."""
        low, high = self.interval()
        lost = len(self.loss_trace) - len(self._good)
        lines = [
            f"λ̂ = {self.llc_mean:.4g} ± {self.llc_stderr:.2g} (standard error; 95 % interval {low:.4g} to {high:.4g})",
            f"  {len(self._good)} chains × {self.schedule.num_draws} draws"
            + (f" ({lost} chains lost)" if lost else "")
            + f", L(w*) = {self.init_loss:.6g}, nβ = {self.nbeta:.6g}",
            "  "
            + ", ".join(f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in self.settings.items()),
        ]
        return "\n".join(lines + [f"  WARNING: {w}" for w in self.warnings])

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
        import xarray

        steps = np.arange(self.loss_trace.shape[1])
        return xarray.Dataset(
            {
                "loss": (("chain", "step"), self.loss_trace),
                "llc": (("chain", "draw"), self.llc_trace),
                "llc_per_chain": ("chain", self.llc_per_chain),
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
        import arviz

        return arviz.from_dict(posterior={"llc": self._good})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file (NumPy's npz); a crash leaves the old file or the new one, never a torn one."""
        path = Path(path)
        meta = {
            "format": _FORMAT,
            "init_loss": self.init_loss,
            "nbeta": self.nbeta,
            "schedule": vars(self.schedule),
            "settings": self.settings,
            "warnings": self.warnings,
            "diagnostics": self.diagnostics,
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez(file, loss_trace=self.loss_trace, meta=np.array(json.dumps(meta)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LLCResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is not such a file, or is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                trace, meta = file["loss_trace"], json.loads(str(file["meta"]))
            if meta.pop("format") == _FORMAT:
                return cls(loss_trace=trace, schedule=Schedule(**meta.pop("schedule")), **meta)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a file that LLCResult.save wrote, or is damaged") from error
        raise ValueError(f"{os.fspath(path)!r} was written by another version of llc_fast")
