"""λ̂ over a grid or a path of temperatures nβ and localizations γ: where it stands still, and how it moves."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure
from llc_fast.calibration import CORRECTED_STIFFNESS, MIN_FRICTION, default_lr
from llc_fast.data import mix
from llc_fast.estimate import Prepared, estimate_llc, prepared_alone, reference_norm
from llc_fast.language import NextToken
from llc_fast.objective.metric import metric_of
from llc_fast.objective.objective import LossFunction
from llc_fast.progress import make_progress
from llc_fast.result import LLCResult, Warning
from llc_fast.samplers import make_sampler
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.registry import sampler_class
from llc_fast.settings import Settings, default_localization, with_old_keywords
from llc_fast.stats.temperature import TemperatureFit, fit_temperature
from llc_fast.support.arguments import check_number
from llc_fast.support.files import atomic_write
from llc_fast.support.optional import require
from llc_fast.support.warned import issue, shown_otherwise

Array = NDArray[np.float64]
StepSize = float | Callable[[float, float], float] | None
"""ε of all cells; or a function of nβ and γ; None: calibrated in each cell."""

NBETA_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Of n / log n, where `nbeta` is not given."""
LOCALIZATION_FACTORS = (1 / 4, 1.0, 4.0, 16.0)
"""Of :func:`llc_fast.default_localization`, where `localization` is not given. Smaller ones let chains go far."""
SINGLES = 4.0
"""Gradients of all cells by default, in default estimates: the length of a cell follows."""
_PILOTS = 1.13
"""Gradients of a default estimate over those of its chains: with pilots."""
_RESERVE = 0.2
"""Of all gradients, what is kept for the first cell's burn-in and for cells that are run again."""
_MOST_STEPS, _LEAST_STEPS = 5 / 8, 1 / 16
"""Steps of a cell's chains, over those of a default estimate."""
_WARM_SHARE = 1 / 5
"""Of a cell's steps, those of burn-in where chains start where those of the neighbour ended."""
MAX_BIAS_SHARE = 0.2
"""Share of bias in nβ·(L − L(w*)) above which a cell is run again with a smaller step."""
_AGAIN = frozenset({"trend", "burnin", "rhat", "slow", "unresolved"})
"""Warnings after which a cell goes on from its own ends: what it has run was too short a burn-in."""
_ASTRAY = frozenset({"left", "diverged"})
"""Warnings after which a cell is run again from w*."""
MAX_ATTEMPTS = 3
"""Runs of a cell at most, of which the last one counts."""
MAX_CHANGE = 0.1
"""∂log λ̂/∂log γ and ∂log λ̂/∂log nβ on a plateau, at most."""
_OF_PRECISION = frozenset({"ess", "imprecise", "num-samples", "unshuffled", "dropped", "above-bound"})
"""Warnings that a cell of a plateau may have before those that have others are looked at."""
_PRIOR_DRAWS = 256
_PRIOR_SEED = 0x5CA4
_NUMBERS = (
    *("llc_mean", "llc_stderr", "llc_low", "llc_high", "init_loss", "mean_loss", "mean_loss_stderr", "lr", "friction"),
    *("r_hat", "ess_bulk", "bias_share", "acceptance", "distance", "distance_over_reference"),
    *("localization_slope", "localization_slope_stderr", "gradients", "seconds"),
)
_FORMAT = 1


# ---- the result --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plateau:
    """Where λ̂ changes least when nβ and γ do.

    Attributes:
        nbeta, localization: nβ and γ of the best cell.
        llc_mean, llc_stderr: λ̂ there.
        change, change_stderr: the larger of the sizes of ∂log λ̂/∂log nβ and ∂log λ̂/∂log γ there, the relative change
            of λ̂ for a factor of e.
        nbeta_range, localization_range: smallest and largest nβ and γ of the cells that are connected with it and
            change by at most 0.1.
        llc_range: smallest and largest λ̂ of these cells.
        cells: their places along the dimensions of the dataset.
        warning_codes: of these cells.
    """

    nbeta: float
    localization: float
    llc_mean: float
    llc_stderr: float
    change: float
    change_stderr: float
    nbeta_range: tuple[float, float]
    localization_range: tuple[float, float]
    llc_range: tuple[float, float]
    cells: tuple[tuple[int, ...], ...]
    warning_codes: tuple[str, ...] = ()

    def __str__(self) -> str:
        (low_n, high_n), (low_g, high_g) = self.nbeta_range, self.localization_range
        where = f"nβ from {low_n:.4g} to {high_n:.4g}" if low_n < high_n else f"nβ = {low_n:.4g}"
        where += f" and γ from {low_g:.4g} to {high_g:.4g}" if low_g < high_g else f" and γ = {low_g:.4g}"
        warned = f", with warnings ({', '.join(self.warning_codes)})" * bool(self.warning_codes)
        return (
            f"plateau at {where}{warned}: λ̂ = {self.llc_mean:.4g} ± {self.llc_stderr:.2g} at nβ = {self.nbeta:.4g}, "
            f"γ = {self.localization:.4g}, where it changes by {self.change:.1%} ± {self.change_stderr:.1%} for a "
            f"factor of e; {self.llc_range[0]:.4g} to {self.llc_range[1]:.4g} over {len(self.cells)} cells"
        )


@dataclass(frozen=True, repr=False, eq=False)
class ScanResult:
    """λ̂ of every cell, see :func:`llc_fast.scan`.

    Attributes:
        dataset: an ``xarray.Dataset``. Its dimensions are ``nbeta`` and ``localization``, or ``cell`` of a path, which
            has them as coordinates. Variables: ``llc_mean``, ``llc_stderr``, ``llc_low`` and ``llc_high`` (the 95 %
            interval), ``init_loss`` (L(w*)), ``mean_loss`` (of the draws) ± ``mean_loss_stderr``, ``lr``, ``friction``
            (α of momentum, 1 without), ``r_hat``, ``ess_bulk``, ``bias_share``, ``acceptance``, ``distance``
            (‖w − w*‖), ``distance_over_reference`` (over ‖w*‖), ``localization_slope`` ± ``localization_slope_stderr``
            (dλ̂/dlog γ by the covariance formula, of the cell alone), ``warnings`` (one string, a line each),
            ``warning_codes`` (separated by spaces), ``is_warm``, ``attempts``, ``gradients`` (pilots and what was run
            again included), ``seconds``. NaN where there is none, and in cells that an interrupted scan did not reach.
        results: the estimates by their place along the dimensions, without the ends of chains; a scan that was loaded
            has none, and nβ = 0 is no estimate.
    """

    dataset: xarray.Dataset
    results: Mapping[tuple[int, ...], LLCResult] = field(default_factory=dict)

    # ---- the cells ---------------------------------------------------------------------------------------------

    @property
    def is_partial(self) -> bool:
        """Whether the scan was interrupted."""
        return bool(self.dataset.attrs["partial"])

    @property
    def dims(self) -> tuple[str, ...]:
        """``("nbeta", "localization")``, or ``("cell",)`` of a path."""
        return ("cell",) if "cell" in self.dataset.dims else ("nbeta", "localization")

    def _values(self, name: str) -> Array:
        found: Array = np.array(self.dataset[name].transpose(*self.dims).values)
        return found

    @property
    def _places(self) -> tuple[Array, Array]:
        """nβ and γ of every cell, in the dataset's shape."""
        nbeta, localization = (np.array(self.dataset[k].values, dtype=np.float64) for k in ("nbeta", "localization"))
        if self.dims == ("cell",):
            return nbeta, localization
        grid = np.meshgrid(nbeta, localization, indexing="ij")
        return grid[0], grid[1]

    def _codes(self, place: tuple[int, ...]) -> list[str]:
        return str(self._values("warning_codes")[place]).split()

    # ---- how it moves ------------------------------------------------------------------------------------------

    @property
    def sensitivity(self) -> xarray.Dataset:
        """∂log λ̂/∂log nβ and ∂log λ̂/∂log γ of every cell, with standard errors.

        By differences between the two neighbours of a cell, or between it and its only neighbour, along each axis;
        cells have random numbers of their own, so that errors add in squares. Variables: ``nbeta_slope`` ±
        ``nbeta_slope_stderr``, ``localization_slope`` ± ``localization_slope_stderr``, and beside the latter
        ``localization_slope_of_cell`` ± ``localization_slope_of_cell_stderr``, −(γ/2)·Cov(nβL, ‖w − w*‖²)/λ̂ over the
        draws of the cell alone. NaN where λ̂ is not positive, where there is no neighbour, and at nβ = 0.
        """
        xr = require("xarray", "xarray")
        nbeta, localization = self._places
        mean, error = self._values("llc_mean"), self._values("llc_stderr")
        slope, stderr = (self._values(f"localization_slope{end}") for end in ("", "_stderr"))
        with np.errstate(all="ignore"):
            good = np.isfinite(mean) & (mean > 0) & (nbeta > 0)
            log, relative = np.where(good, np.log(mean), np.nan), np.where(good, error / mean, np.nan)
            alone = {
                "localization_slope_of_cell": np.where(good, slope / mean, np.nan),
                "localization_slope_of_cell_stderr": np.where(good, stderr / mean, np.nan),
            }
        found = {
            "nbeta_slope": _slopes(nbeta, localization, log, relative),
            "localization_slope": _slopes(localization, nbeta, log, relative),
        }
        columns = {name: values[0] for name, values in found.items()}
        columns |= {f"{name}_stderr": values[1] for name, values in found.items()}
        return xr.Dataset(  # type: ignore[no-any-return]
            {name: (self.dims, values) for name, values in (columns | alone).items()}, coords=self.dataset.coords
        )

    @property
    def plateau(self) -> Plateau | None:
        """Where λ̂ changes least; None if it changes by more than 10 % for a factor of e everywhere.

        See :attr:`plateau_reason` for why not. Cells without a warning come first, but for those of precision.
        """
        found = self._plateau
        return found if isinstance(found, Plateau) else None

    @property
    def plateau_reason(self) -> str:
        """The plateau in a sentence, or why there is none."""
        return str(self._plateau)

    @property
    def _plateau(self) -> Plateau | str:
        slopes = self.sensitivity
        size, error = np.full(self._places[0].shape, np.nan), np.full(self._places[0].shape, np.nan)
        for axis in ("nbeta_slope", "localization_slope"):
            value = np.abs(np.array(slopes[axis].transpose(*self.dims).values))
            larger = np.isfinite(value) & ~(size >= value)
            size = np.where(larger, value, size)
            error = np.where(larger, np.array(slopes[f"{axis}_stderr"].transpose(*self.dims).values), error)
        if not np.isfinite(size).any():
            return "no plateau: there are no two neighbouring cells with a positive λ̂"
        sound = np.zeros(size.shape, dtype=bool)
        for place in np.ndindex(size.shape):
            sound[place] = not set(self._codes(place)) - _OF_PRECISION
        for candidates in (np.isfinite(size) & sound, np.isfinite(size)):
            # What is not known precisely is not taken for flat.
            least = np.where(candidates, np.hypot(size, np.nan_to_num(error)), np.inf)
            best = np.unravel_index(int(np.argmin(least)), size.shape)
            if np.isfinite(least[best]) and size[best] <= MAX_CHANGE:
                return self._around(tuple(int(k) for k in best), candidates & (size <= MAX_CHANGE), size, error)
        best = np.unravel_index(int(np.nanargmin(size)), size.shape)
        nbeta, localization = (values[best] for values in self._places)
        return (
            f"no plateau: λ̂ changes by more than {MAX_CHANGE:.0%} for a factor of e everywhere, least at nβ = "
            f"{nbeta:.4g}, γ = {localization:.4g}, by {size[best]:.1%} ± {error[best]:.1%}"
        )

    def _around(self, best: tuple[int, ...], flat: NDArray[np.bool_], size: Array, error: Array) -> Plateau:
        """The plateau of flat cells that are connected with the best."""
        reached, waiting = {best}, [best]
        while waiting:
            place = waiting.pop()
            for axis, step in itertools.product(range(len(place)), (-1, 1)):
                other = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                inside = all(0 <= k < n for k, n in zip(other, flat.shape, strict=True))
                if inside and flat[other] and other not in reached:
                    reached.add(other)
                    waiting.append(other)
        nbeta, localization = self._places
        cells = tuple(sorted(reached))
        mean, stderr = self._values("llc_mean"), self._values("llc_stderr")

        def span(values: Array) -> tuple[float, float]:
            inside = [float(values[place]) for place in cells]
            return min(inside), max(inside)

        return Plateau(
            float(nbeta[best]),
            float(localization[best]),
            float(mean[best]),
            float(stderr[best]),
            float(size[best]),
            float(error[best]),
            span(nbeta),
            span(localization),
            span(mean),
            cells,
            tuple(sorted({code for place in cells for code in self._codes(place)})),
        )

    # ---- λ from temperature ------------------------------------------------------------------------------------

    def fit(self, *, localization: float | None = None, max_multiplicity: int = 3) -> TemperatureFit:
        """λ and its multiplicity m from nβ·E[L − L*] over nβ, at one γ.

        By :func:`llc_fast.stats.temperature.fit_temperature`, which averages over asymptotic forms and ranges of nβ.
        It holds where L(w*) is the least that the loss can be near w*: the model is realizable, or the loss is
        behavioural. γ has to be small beside nβ times the curvatures that matter, so that the prior is flat over what
        the chains explore, or a box has to bound it. At one temperature λ̂ lacks (m − 1)/log nβ and more; the fit takes
        the limit.

        Args:
            localization: γ; None: the only one there is.
            max_multiplicity: the largest m that is tried, 1 to 3.

        Raises:
            ValueError: γ is not one of the scan's, or several could be meant; fewer than five nβ above 0; λ̂ is negative
                somewhere, so that L(w*) is not the minimum.
        """
        nbeta, gamma = self._places
        known = sorted(set(gamma.ravel().tolist()))
        if localization is None and len(known) > 1:
            raise ValueError(f"localization=None: the scan has several γ, {_listed(known)}: give one of them")
        wanted = known[0] if localization is None else float(localization)
        if wanted not in known:
            raise ValueError(f"localization={wanted:g} is not in the scan, whose γ are {_listed(known)}")
        mean, error = self._values("llc_mean"), self._values("llc_stderr")
        used = (gamma == wanted) & (nbeta > 0) & np.isfinite(mean) & np.isfinite(error)
        if (mean[used] + 3 * error[used] < 0).any():
            lowest = float(nbeta[used][np.argmin(mean[used])])
            raise ValueError(
                f"nbeta={lowest:.4g}: λ̂ is negative there, so w* is not the minimum of the loss, and nβ·E[L − L*] is "
                "not known: use a behavioural loss, or a w* that is trained to the end"
            )
        return fit_temperature(nbeta[used], mean[used], error[used], max_multiplicity=max_multiplicity)

    # ---- for people and programs -------------------------------------------------------------------------------

    def summary(self) -> str:
        """λ̂ ± its standard error of every cell, with a star where there are warnings; the plateau; and the cost."""
        nbeta, gamma = self._places
        mean, error, codes = (self._values(name) for name in ("llc_mean", "llc_stderr", "warning_codes"))
        shape = mean.shape if mean.ndim == 2 else (mean.shape[0], 1)
        cells = [
            ["" if math.isnan(m) else f"{m:.4g} ± {e:.2g}{'*' if c else ''}" for m, e, c in zip(*row, strict=True)]
            for row in zip(*(values.reshape(shape) for values in (mean, error, codes)), strict=True)
        ]
        if self.dims == ("cell",):
            head = ["λ̂"]
            labels = [f"nβ = {n:.4g}, γ = {g:.4g}" for n, g in zip(nbeta, gamma, strict=True)]
        else:
            head = [f"γ = {g:.4g}" for g in gamma[0]]
            labels = [f"nβ = {n:.4g}" for n in nbeta[:, 0]]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        first = max(map(len, labels))
        lines = ["  ".join([" " * first, *(text.rjust(w) for text, w in zip(head, widths, strict=True))])]
        for label, row in zip(labels, cells, strict=True):
            lines.append("  ".join([label.ljust(first), *(t.rjust(w) for t, w in zip(row, widths, strict=True))]))
        lines.append(self.plateau_reason)
        done = int(np.isfinite(mean).sum())
        lines.append(
            f"{done} of {mean.size} cells, {int(np.nansum(self._values('gradients')))} gradients"
            + (" (interrupted)" if self.is_partial else "")
        )
        if found := sorted({code for text in codes.ravel() for code in str(text).split()}):
            lines.append(f"* warnings: {', '.join(found)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"ScanResult:\n{self.summary()}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """λ̂ as a heat map, or as lines where there is one nβ or one γ; hollow where there are warnings.

        The plateau has a frame. Written to `path` if given.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed (``pip install "llc_fast[plot]"``).
            ValueError: Matplotlib does not know the ending of `path`.
            OSError: it can't be written.
        """
        from llc_fast.plots import plot_scan, write_figure

        nbeta, localization = self._places
        found = self.plateau
        figure = plot_scan(
            nbeta,
            localization,
            self._values("llc_mean"),
            self._values("llc_stderr"),
            np.array([bool(text) for text in self._values("warning_codes").ravel()]).reshape(nbeta.shape),
            cells=() if found is None else found.cells,
            title=self.plateau_reason,
        )
        if path is not None:
            write_figure(figure, path)
        return figure

    def to_xarray(self) -> xarray.Dataset:
        """:attr:`dataset` with the two sensitivities, called ``sensitivity_…``."""
        more = self.sensitivity
        return self.dataset.assign({f"sensitivity_{name}": more[name] for name in more.data_vars})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the dataset as a NetCDF file, for :meth:`load` and ``xarray.open_dataset``.

        Raises:
            ModuleNotFoundError: neither SciPy nor h5netcdf is installed.
            OSError: it can't be written.
        """
        written = bytes(self.dataset.to_netcdf(engine="scipy"))
        with atomic_write(path) as file:
            file.write(written)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScanResult:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file.
        """
        xr = require("xarray", "xarray")
        if not Path(path).exists():
            raise FileNotFoundError(f"path={os.fspath(path)!r} does not exist")
        try:
            with xr.open_dataset(path, engine="scipy") as found:
                dataset = found.load()
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a file that ScanResult.save wrote: {error}") from error
        if dataset.attrs.get("llc_fast_scan") != _FORMAT:
            raise ValueError(f"{os.fspath(path)!r} was not written by this version of ScanResult.save")
        return cls(dataset)


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def _slopes(along: Array, across: Array, log: Array, relative: Array) -> tuple[Array, Array]:
    """∂log λ̂/∂log of one coordinate, between the neighbours of each cell that share the other coordinate."""
    value, error = np.full(log.shape, np.nan), np.full(log.shape, np.nan)
    for place in np.ndindex(log.shape):
        if not (np.isfinite(log[place]) and along[place] > 0):
            continue
        same = np.isfinite(log) & (across == across[place]) & (along > 0)
        sides = []
        for side in (1, -1):
            nearest = np.where(side * along < side * along[place], side * along, -np.inf)
            masked = np.where(same, nearest, -np.inf)
            if np.isfinite(masked.max()):
                sides.append(np.unravel_index(int(np.argmax(masked)), log.shape))
        if not sides:
            continue
        first, last = sides[0], sides[1] if len(sides) > 1 else place
        distance = math.log(along[last] / along[first])
        value[place] = (log[last] - log[first]) / distance
        error[place] = math.hypot(relative[last], relative[first]) / abs(distance)
    return value, error


# ---- the scan ----------------------------------------------------------------------------------------------


def scan(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction | NextToken | str | None,
    *,
    nbeta: float | Sequence[float] | None = None,
    localization: float | Sequence[float] | None = None,
    path: bool = False,
    lr: StepSize = None,
    num_chains: int = 4,
    num_draws: int | None = None,
    num_burnin: int | None = None,
    warm: bool = True,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> ScanResult:
    """λ̂ of a model at several temperatures nβ and localizations γ, each cell as :func:`llc_fast.estimate_llc` does it.

    Cells are cheap beside single estimates. The step size is calibrated by pilot chains in the first cell; each
    further one takes over that of its neighbour, changed with nβ·h_max + γ (h_max is the largest curvature at w*) and
    with the neighbour's share of bias, and is held to its own: where bias is more than 20 % of nβ·(L − L(w*)), the cell
    is run again with a smaller step. Chains start where those of the neighbour ended, at the next smaller γ, or at the
    next smaller nβ: distributions become narrower on the way, which is fast, and not wider, which is slow. They are
    run again from w* where they diverged or left it; and where they still drift, or differ from each other, what has
    been run is taken for burn-in and they go on, as long as all gradients together are not more than planned. Random
    numbers are other ones in every cell.

    At nβ = 0 there is nothing but the prior, w = w* + ξ/√γ, of which independent draws are made: λ̂ is 0 by definition,
    and what can be seen is how far the prior reaches (``distance``) and what the loss is there (``mean_loss``).

    Ctrl-C ends the scan; the cells that were finished are returned, marked as partial.

    Args:
        model, data, loss_fn: as for :func:`llc_fast.estimate_llc`.
        nbeta: nβ, a number or several, 0 among them perhaps; None: n / log n times 1/16, 1/4, 1, 4 and 16.
        localization: γ, a number or several; None: :func:`llc_fast.default_localization` times 1/4, 1, 4 and 16.
        path: False: the grid of all pairs. True: `nbeta` and `localization` are walked together, in their order; both
            have as many numbers, or one.
        lr: step size; or a function of nβ and γ that returns it; None: calibrated.
        num_chains: of each cell.
        num_draws: of each chain in each cell; None: such that all cells together take as many gradients as four
            estimates of 2000 draws, with as much burn-in and with pilots; but a cell's steps are 250 to 2500.
        num_burnin: steps before the first draw, of chains that start at w*; those that start at the neighbour's ends
            take a quarter; None: chosen with the length.
        warm: False: all chains start at w*, with full burn-in.
        seed: equal seeds give equal results on the same machine.
        folder: keeps every finished cell, and the one under way: the same call goes on from there.
        progress: show progress with λ̂ so far: a bar, or a line each 10 % in a log.
        settings: further arguments of :func:`llc_fast.estimate_llc`.

    Returns:
        A :class:`ScanResult`. For each code of a warning a :class:`llc_fast.LLCWarning` is issued that says which cells
        have it.

    Raises:
        TypeError, ValueError: as :func:`llc_fast.estimate_llc`; values that are no numbers, negative, or twice there;
            nβ = 0 with γ = 0, which is no distribution; a path of different lengths.
        KeyboardInterrupt: Ctrl-C before there was anything to return.
        ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
    """
    require("xarray", "xarray")  # before the work
    for name, remedy in _OURS.items():
        if name in settings:
            raise TypeError(f"{name} is not for scans: {remedy}")
    if lr is not None and not callable(lr):
        lr = check_number("lr", lr, minimum=0, exclusive=True)
    asked = {
        "nbeta": _numbers("nbeta", nbeta, distinct=not path),
        "localization": _numbers("localization", localization, distinct=not path),
    }
    known = {name: value for name, value in settings.items() if name in _ARGUMENTS}
    old = {name: value for name, value in settings.items() if name not in _ARGUMENTS}
    given = known | {"num_chains": num_chains, "num_draws": num_draws, "num_burnin": num_burnin, "seed": seed}
    given |= {"lr": None if callable(lr) else lr, "progress": False, "checkpoint": None}
    for name in ("nbeta", "localization"):  # what the first look needs: the middle will do
        found = asked[name] or ()
        positive = [value for value in found if value > 0] or ([1.0] if found else [])
        given[name] = positive[len(positive) // 2] if positive else None
    with prepared_alone(with_old_keywords(given, old, "scan"), model, data, loss_fn) as prepared:
        plan = _plan(prepared, asked, path=path, num_burnin=num_burnin, num_draws=num_draws)
        runner = _Runner(plan, model, data, loss_fn, lr, warm, seed, num_chains, folder, settings)
        runner.look(prepared)
    is_stopped = runner.run(make_progress(progress, len(plan.cells), "LLC", unit="cell"))
    result = ScanResult(_dataset(plan, runner.rows, is_stopped, num_chains, seed), dict(runner.results))
    issue(_in_all(plan, runner.rows), stacklevel=2)
    return result


_OURS = {
    "checkpoint": "pass folder instead",
    **dict.fromkeys(("warm_start", "keep_ends"), "warm=True does it"),
    "refine": "each cell would find a w* of its own",
    **dict.fromkeys(("target_error", "max_seconds", "max_gradients"), "cells have one length, num_draws"),
}
_ARGUMENTS = frozenset(f.name for f in dataclasses.fields(Settings))


def _numbers(name: str, given: Any, *, distinct: bool) -> tuple[float, ...] | None:
    """The values of one coordinate; None: open.

    Raises:
        TypeError, ValueError: no numbers, negative, twice the same, or none at all.
    """
    if given is None:
        return None
    if isinstance(given, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be a number or several, got {type(given).__name__}")
    values = list(given) if isinstance(given, Iterable) and np.ndim(given) else [given]  # type: ignore[arg-type]
    if not values:
        raise ValueError(f"{name} is empty: give one number at least")
    found = tuple(check_number(name, value, minimum=0) for value in values)
    if distinct and len(set(found)) < len(found):
        raise ValueError(f"{name} has the same number twice, in {_listed(found)}: leave one out")
    return found


@dataclass(frozen=True)
class _Plan:
    """Which cells there are, and how long each takes.

    Attributes:
        shape: of the dataset.
        cells: nβ and γ by place, in the order in which they are run.
        parents: the place of the cell whose ends a cell starts from; None: it starts at w*.
        draws: of each chain in each cell.
        cold, warm: steps of burn-in of chains that start at w*, and at the ends of others.
        budget: gradients of all cells, above which nothing is run again for its length.
    """

    shape: tuple[int, ...]
    cells: dict[tuple[int, ...], tuple[float, float]]
    parents: dict[tuple[int, ...], tuple[int, ...] | None]
    draws: int
    cold: int
    warm: int
    budget: float


def _plan(
    prepared: Prepared,
    asked: Mapping[str, tuple[float, ...] | None],
    *,
    path: bool,
    num_burnin: int | None,
    num_draws: int | None,
) -> _Plan:
    objective, settings = prepared.objective, prepared.settings
    nbetas, gammas = asked["nbeta"], asked["localization"]
    if nbetas is None:
        nbetas = tuple(settings.nbeta_for(objective.source.num_samples) * f for f in NBETA_FACTORS)
    if gammas is None:
        norm = reference_norm(settings.template, objective)
        gammas = tuple(default_localization(objective.num_parameters, norm) * f for f in LOCALIZATION_FACTORS)
    cells: dict[tuple[int, ...], tuple[float, float]] = {}
    parents: dict[tuple[int, ...], tuple[int, ...] | None] = {}
    if path:
        if len({len(nbetas), len(gammas)} - {1}) > 1:
            raise ValueError(
                f"nbeta has {len(nbetas)} numbers and localization {len(gammas)}: along a path both have as many, "
                "or one"
            )
        count = max(len(nbetas), len(gammas))
        pairs = list(zip(nbetas * (count // len(nbetas)), gammas * (count // len(gammas)), strict=True))
        if len(set(pairs)) < count:
            raise ValueError("nbeta and localization have the same pair twice along the path: leave one out")
        shape: tuple[int, ...] = (count,)
        last = None
        for k, pair in enumerate(pairs):
            cells[k,], parents[k,] = pair, last
            if pair[0] > 0:
                last = (k,)
    else:
        nbetas, gammas = tuple(sorted(nbetas)), tuple(sorted(gammas))
        shape = len(nbetas), len(gammas)
        for i, j in np.ndindex(*shape):
            below = (i, j - 1) if j else (i - 1, 0) if i else None
            cells[i, j] = nbetas[i], gammas[j]
            parents[i, j] = None if below is None or cells[below][0] == 0 else below
    if (0.0, 0.0) in cells.values() and vars(prepared.settings.template)["bounding_box_size"] is None:
        raise ValueError("nbeta=0 with localization=0 is no distribution: leave one of them out")
    default = settings.schedule.num_draws if num_draws is None else Settings().schedule.num_draws
    single = _PILOTS * settings.num_chains * 2 * default
    count = sum(n > 0 for n, _ in cells.values())
    if num_draws is None:
        share = (1 - _RESERVE) * SINGLES * single / max(1, count) / settings.num_chains
        steps = int(min(max(share, 2 * default * _LEAST_STEPS), 2 * default * _MOST_STEPS))
        warm = math.ceil(_WARM_SHARE * steps)
        draws, cold = max(1, (steps - warm) // settings.num_steps_bw_draws), min(2 * default // 2, 2 * steps)
        if num_burnin is not None:
            warm, cold = -(-num_burnin // 4), num_burnin
        return _Plan(shape, cells, parents, draws, cold, warm, SINGLES * single)
    cold = num_draws if num_burnin is None else num_burnin
    warm = -(-cold // 4)
    planned = count * settings.num_chains * (warm + num_draws * settings.num_steps_bw_draws)
    return _Plan(shape, cells, parents, num_draws, cold, warm, planned / (1 - _RESERVE))


@dataclass(eq=False)
class _Runner:
    """Runs the cells, one after another.

    Attributes:
        rows: what the dataset has of each finished cell, by place.
        results: the estimates, without ends.
    """

    plan: _Plan
    model: nn.Module
    data: Any
    loss_fn: Any
    lr: StepSize
    warm: bool
    seed: int
    num_chains: int
    folder: str | os.PathLike[str] | None
    settings: dict[str, Any]
    rows: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)
    results: dict[tuple[int, ...], LLCResult] = field(default_factory=dict)
    _ends: dict[tuple[int, ...], LLCResult] = field(default_factory=dict)
    _stiffness: tuple[float, float] | None = None
    _is_default: bool = False
    _is_carried: bool = False
    _min_friction: float = 1.0
    _spent: float = 0.0

    def look(self, prepared: Prepared) -> None:
        """What is known before any chain: the stiffness at w*, and everything at nβ = 0."""
        settings, template = prepared.settings, prepared.settings.template
        self._is_default = settings.is_default_sampler
        self._min_friction = 1.0 if prepared.plan.release else MIN_FRICTION
        self._is_carried = self.lr is None and settings.wants_bias_correction
        if prepared.shortened and "batch_size" not in self.settings:
            self.settings = {**self.settings, "batch_size": prepared.objective.source.batch_size}
        if self._is_carried:
            # nβ·h_max + γ·p_max is linear in both.
            once, twice = (
                CORRECTED_STIFFNESS
                / default_lr(
                    prepared.objective,
                    dataclasses.replace(template, lr=1.0, nbeta=1.0, localization=gamma),
                    stiffness=CORRECTED_STIFFNESS,
                    seed=self.seed,
                )
                for gamma in (1.0, 2.0)
            )
            self._stiffness = 2 * once - twice, twice - once
        for place, (nbeta, gamma) in self.plan.cells.items():
            if nbeta == 0:
                self.rows[place] = _prior_row(prepared, gamma, mix(mix(self.seed, _PRIOR_SEED), _number(place)))

    def run(self, shown: Any) -> bool:
        """All cells that are not there yet; whether somebody stopped them."""
        if self.folder is not None:
            self.folder = Path(self.folder).absolute()
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with shown:
                for position, (place, pair) in enumerate(self.plan.cells.items()):
                    if place not in self.rows:
                        shown.title = f"LLC at nβ = {pair[0]:.3g}, γ = {pair[1]:.3g}"
                        if not self._cell(place, pair, position, shown):
                            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not any(row["attempts"] for row in self.rows.values()):
                raise
            return True
        return False

    def _cell(self, place: tuple[int, ...], pair: tuple[float, float], position: int, shown: Any) -> bool:
        """One cell, run until it is good enough or has been run often enough; False: somebody stopped it."""
        parent = self.plan.parents[place] if self.warm else None
        start = None if parent is None else self._ends.get(parent)
        sampler, lr = self._step_size(place, pair, start)
        gradients, seconds, is_warm, attempt = 0.0, 0.0, start is not None, 0
        while True:
            result = self._estimate(place, pair, position, attempt, shown, start, sampler, lr)
            if result.is_partial:
                return False
            attempt += 1
            spent = _gradients(result)
            gradients, seconds = gradients + spent, seconds + result.settings["seconds"]
            self._spent += spent
            again = self._again(result, start) if attempt < MAX_ATTEMPTS else ""
            if not again:
                break
            if again == "bias":
                share = result.diagnostics["bias_share"]
                sampler, lr = self._with_bias(result, _target(result) / share)
                start = result if self.warm else None
            elif again == "astray":
                start, is_warm = None, False
                if result.diverged_chains and self._is_carried:
                    sampler, lr = None, None  # by pilots of its own
            else:
                start = result
        self._ends[place] = result
        needed = {self.plan.parents[p] for p in self.plan.cells if p not in self.rows and p != place}
        self._ends = {p: r for p, r in self._ends.items() if p in needed}
        self.results[place] = dataclasses.replace(result, ends=None)
        self.rows[place] = _row(result) | {
            "is_warm": is_warm,
            "attempts": attempt,
            "gradients": gradients,
            "seconds": seconds,
        }
        return True

    def _estimate(
        self,
        place: tuple[int, ...],
        pair: tuple[float, float],
        position: int,
        attempt: int,
        shown: Any,
        start: LLCResult | None,
        sampler: Sampler | None,
        lr: float | None,
    ) -> LLCResult:
        def report(steps: int, total: int, llc: float) -> None:
            shown.update(position + steps / total, llc)

        given, number = dict(self.settings), _number(place)
        if sampler is not None:
            given["sampler"] = sampler
        if lr is not None and self._is_carried:
            given["bias_correction"] = True
        try:
            with shown_otherwise():
                return estimate_llc(
                    self.model,
                    self.data,
                    self.loss_fn,
                    **given,
                    lr=lr,
                    nbeta=pair[0],
                    localization=pair[1],
                    num_chains=self.num_chains,
                    num_draws=self.plan.draws,
                    num_burnin=self.plan.cold if start is None else self.plan.warm,
                    # Chains that went on with the numbers that led them to their start would add them up.
                    seed=mix(mix(self.seed, number), attempt) if number or attempt else self.seed,
                    warm_start=start,
                    keep_ends=self.warm,
                    checkpoint=None if self.folder is None else Path(self.folder) / f"{number:06d}-{attempt}.npz",
                    progress=report if shown.is_shown else False,
                )
        except ValueError as error:
            raise ValueError(f"nbeta={pair[0]:g}, localization={pair[1]:g}: {error}") from error

    def _step_size(
        self, place: tuple[int, ...], pair: tuple[float, float], start: LLCResult | None
    ) -> tuple[Sampler | None, float | None]:
        """The sampler, if it is another one than was asked for, and ε; None: found by the estimate itself."""
        if callable(self.lr):
            return None, check_number("lr", self.lr(*pair), minimum=0, exclusive=True)
        if not self._is_carried or start is None:
            return None, self.lr
        # The share of bias changes more with γ than with nβ: what the last nβ had at this γ says more.
        before = start
        if len(place) > 1:
            before = self.results.get((place[0] - 1, place[1]), start)
        ratio = pair[0] / before.nbeta
        effective = float(before.settings["lr"]) / float(before.settings.get("momentum_decay", 1.0))
        share = _bias_per_step(before) * effective * ratio ** self._power(place)
        return self._with_bias(before, min(max(_target(before) / max(share, 1e-12), 1 / 64), 4.0), pair)

    def _power(self, place: tuple[int, ...]) -> float:
        """The power of nβ with which the share of bias grows at the same ε, by the last two cells, if there are two.

        It is 1 for step-size bias and 2 for that of gradient noise where λ̂ is constant, and 0 where γ outweighs the
        loss.
        """
        last, one_before = (self.results.get((place[0] - k, *place[1:])) for k in (1, 2))
        if len(place) < 2 or last is None or one_before is None:
            return 1.0
        growth = math.log(_bias_per_step(last) / _bias_per_step(one_before))
        return min(max(growth / math.log(last.nbeta / one_before.nbeta), 0.0), 2.0)

    def _with_bias(
        self, result: LLCResult, change: float, pair: tuple[float, float] | None = None
    ) -> tuple[Sampler | None, float]:
        """Sampler and ε such that the bias of a result changes by a factor, as far as stability allows.

        Bias is proportional to ε/α. Where it is too much momentum goes first, where too little it comes last.
        """
        nbeta, gamma = (result.nbeta, result.settings["localization"]) if pair is None else pair
        assert self._stiffness is not None
        most = CORRECTED_STIFFNESS / (nbeta * self._stiffness[0] + gamma * self._stiffness[1])
        friction = float(result.settings.get("momentum_decay", 1.0))
        if not self._is_default:
            return None, min(most, result.settings["lr"] * change)
        if (
            sampler_class(result.settings["sampler"]).metric != "identity"
        ):  # of its own units: ε does not follow nβ and γ
            return make_sampler(result.settings["sampler"]), result.settings["lr"] * min(change, 1.0)
        wanted = result.settings["lr"] / friction * change
        lr = min(most, wanted)
        friction = min(1.0, max(lr / wanted, self._min_friction))
        return (make_sampler("sghmc", momentum_decay=friction) if friction < 1 else make_sampler("sgld")), lr

    def _again(self, result: LLCResult, start: LLCResult | None) -> str:
        """Why a cell has to be run again; empty: it need not be."""
        codes = {warning.code for warning in result.warnings}
        if codes & _ASTRAY and (start is not None or (result.diverged_chains and self._is_carried)):
            return "astray"
        share = result.diagnostics.get("bias_share")
        if self._is_carried and share is not None and share > MAX_BIAS_SHARE and not result.diverged_chains:
            return "bias"
        left = sum(place not in self.rows for place in self.plan.cells) - 1
        each = self.num_chains * (self.plan.warm + self.plan.draws)
        is_affordable = self._spent + (left + 1) * each <= self.plan.budget
        if codes & _AGAIN and self.warm and is_affordable and result.ends is not None and "left" not in codes:
            return "length"
        return ""


def _target(result: LLCResult) -> float:
    """The share of bias to aim at."""
    return sampler_class(result.settings["sampler"]).target_bias_share


def _bias_per_step(result: LLCResult) -> float:
    """The share of bias over ε/α, to which it is proportional."""
    share = result.diagnostics.get("bias_share")
    effective = float(result.settings["lr"]) / float(result.settings.get("momentum_decay", 1.0))
    return (_target(result) if share is None or share <= 0 else float(share)) / effective


def _number(place: tuple[int, ...]) -> int:
    """One number for a place."""
    return sum(k * 1000**power for power, k in enumerate(reversed(place)))


def _gradients(result: LLCResult) -> float:
    """Of all chains and pilots."""
    each = result.diagnostics.get("gradients_per_draw", 0) / result.schedule.num_steps_bw_draws or 1.0
    beside = sum(result.diagnostics.get(name, 0) for name in ("pilot_steps", "metric_gradients"))
    return result.loss_trace.size * each + float(beside)


def _row(result: LLCResult) -> dict[str, Any]:
    low, high = result.interval()
    found = {name: result.diagnostics.get(name) for name in _NUMBERS if name != "distance"}
    distance = result.diagnostics.get("distance") or []
    error = result.llc_stderr / result.nbeta
    return {name: math.nan if value is None else float(value) for name, value in found.items()} | {
        "llc_mean": result.llc_mean,
        "llc_stderr": result.llc_stderr,
        "llc_low": low,
        "llc_high": high,
        "init_loss": result.init_loss,
        "mean_loss": result.init_loss + result.llc_mean / result.nbeta,
        "mean_loss_stderr": error,
        "lr": float(result.settings["lr"]),
        "friction": float(result.settings.get("momentum_decay", 1.0)),
        "distance": math.sqrt(sum(d * d for d in distance) / len(distance)) if distance else math.nan,
        "warnings": "\n".join(result.warnings),
        "warning_codes": " ".join(w.code for w in result.warnings),
    }


@torch.no_grad()
def _prior_row(prepared: Prepared, gamma: float, seed: int) -> dict[str, Any]:
    """The row of nβ = 0: independent draws of the prior, and their losses less those of the same minibatches at w*."""
    objective, template = prepared.objective, vars(prepared.settings.template)
    generator = torch.Generator().manual_seed(seed % 2**63)
    count = min(_PRIOR_DRAWS, max(2, prepared.settings.num_chains * prepared.settings.schedule.num_draws))
    sampler = prepared.settings.template
    norm = reference_norm(sampler, objective)
    metric = metric_of(sampler, objective) if sampler.localizes_in_metric else {}
    excess, distances = np.empty(count), np.empty(count)
    batches = objective.source.minibatches(seed % 2**63)
    buffers = objective.fresh_buffers()
    for k, batch in enumerate(itertools.islice(batches, count)):
        params, squares = dict[str, Tensor](), 0.0
        for name, w in objective.reference.items():
            measure = 1 / metric[name].cpu().double() if metric else torch.ones((), dtype=torch.float64)
            offset = _prior_offset(w, gamma * measure, template, generator)
            if name in objective.masks:
                offset = offset * objective.masks[name].cpu()
            squares += float((offset.double().square() * measure).sum())
            params[name] = (w + offset.to(w.device, w.dtype)).to(w.dtype)
        distances[k] = math.sqrt(squares)
        with objective.at_reference():
            there, here = (float(objective.minibatch_loss(p, batch, buffers)) for p in (params, objective.reference))
        excess[k] = there - here
    found = np.isfinite(excess)
    init_loss, distance = prepared.reference_losses.mean, float(np.sqrt(np.mean(distances**2)))
    error = float(excess[found].std(ddof=1)) / math.sqrt(found.sum()) if found.sum() > 1 else math.nan
    row: dict[str, Any] = dict.fromkeys(_NUMBERS, math.nan)
    return row | {
        **dict.fromkeys(("llc_mean", "llc_stderr", "llc_low", "llc_high"), 0.0),
        "init_loss": init_loss,
        "mean_loss": init_loss + float(excess[found].mean()) if found.all() else math.inf,
        "mean_loss_stderr": error,
        "ess_bulk": float(count),
        "distance": distance,
        "distance_over_reference": distance / norm if norm else math.nan,
        "gradients": math.ceil(2 * count / 3),  # a loss without its gradient takes a third
        "seconds": 0.0,
        "warnings": "",
        "warning_codes": "",
        "is_warm": False,
        "attempts": 0,
    }


def _prior_offset(w: Tensor, gamma: Tensor | float, options: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """w − w* of one draw of ∝ exp(−γ/2·‖w − w*‖² − μ/2·‖w‖²), in the box if there is one, on the CPU.

    γ may be another one for each element: γ/A where the localization is in the metric.
    """
    decay, box = float(options["weight_decay"]), options["bounding_box_size"]
    precision = torch.as_tensor(gamma, dtype=torch.float64) + decay
    uniform = torch.rand(w.shape, generator=generator, dtype=torch.float64)
    if not precision.any():
        return (2 * uniform - 1) * float(box)
    width = float(options["noise_level"]) / precision.sqrt()
    middle = -decay * w.detach().cpu().double() / precision
    low = torch.zeros_like(middle) if box is None else torch.special.ndtr((-box - middle) / width)
    high = torch.ones_like(middle) if box is None else torch.special.ndtr((box - middle) / width)
    found: Tensor = middle + width * torch.special.ndtri((low + uniform * (high - low)).clamp(1e-300, 1 - 1e-16))
    return found


# ---- what comes out ----------------------------------------------------------------------------------------


def _dataset(
    plan: _Plan, rows: Mapping[tuple[int, ...], Mapping[str, Any]], is_partial: bool, num_chains: int, seed: int
) -> xarray.Dataset:
    names: dict[str, Any] = dict.fromkeys(_NUMBERS, math.nan)
    names |= {"warnings": "", "warning_codes": "", "is_warm": False, "attempts": 0}
    values = {name: np.full(plan.shape, blank, dtype=object) for name, blank in names.items()}
    for place, row in rows.items():
        for name in names:
            values[name][place] = row[name]
    kinds = {"warnings": np.str_, "warning_codes": np.str_, "is_warm": np.bool_, "attempts": np.int64}
    dims = ("cell",) if len(plan.shape) == 1 else ("nbeta", "localization")
    nbeta, localization = (np.array([plan.cells[p][k] for p in sorted(plan.cells)]) for k in (0, 1))
    coords: dict[str, Any]
    if dims == ("cell",):
        coords = {"cell": np.arange(plan.shape[0]), "nbeta": ("cell", nbeta), "localization": ("cell", localization)}
    else:
        coords = {"nbeta": np.unique(nbeta), "localization": np.unique(localization)}
    found: xarray.Dataset = require("xarray", "xarray").Dataset(
        {name: (dims, array.astype(kinds.get(name, np.float64))) for name, array in values.items()},
        coords=coords,
        attrs={
            "llc_fast_scan": _FORMAT,
            "partial": int(is_partial),
            "num_chains": num_chains,
            "num_draws": plan.draws,
            "seed": json.dumps(seed),
        },
    )
    return found


def _in_all(plan: _Plan, rows: Mapping[tuple[int, ...], Mapping[str, Any]]) -> list[Warning]:
    """A sentence for each code: which cells have it, and what is said of the first."""
    having: dict[str, list[tuple[str, str]]] = {}
    for place, row in rows.items():
        nbeta, gamma = plan.cells[place]
        for code, text in zip(row["warning_codes"].split(), row["warnings"].split("\n"), strict=False):
            having.setdefault(code, []).append((f"nβ = {nbeta:.3g} and γ = {gamma:.3g}", text))
    sentences = []
    for code, found in having.items():
        which = "; ".join(name for name, _ in found[:5]) + "; …" * (len(found) > 5)
        said = f"{len(found)} of {len(rows)} cells have the warning {code!r} ({which})."
        sentences.append(Warning(f"{said} The first says: {found[0][1]}", code))
    return sentences
