"""Where λ̂ is wrong, and whether it says so: step sizes, minibatches, localizations and temperatures on three networks.

λ̂ depends on numbers that people choose: the step size ε, the minibatch size B, the localization γ and the inverse
temperature nβ. Two questions are asked, since there are two ways to be wrong.

**Does the sampler return what it is asked for?** That is the mean of nβ·(L − L(w*)) over the posterior
∝ exp(−nβ·L − γ/2·‖w − w*‖²) at this γ and nβ. It is known here from Hamiltonian Monte Carlo, which accepts or rejects
by the exact loss over all data and so has no bias of step size or minibatch. SGLD is run beside it for every step size
of a grid over four decades, in units of 1/(nβ·h_max + γ) with h_max the largest curvature at w* (at 0.2 the variance of
the stiffest direction is 5 % too large, at 1 a third, from 4 on it has none), and for the step size that llc_fast
chooses if it is given none: with three minibatch sizes, four γ and two nβ, on lines through one centre. An estimate is
*wrong* if it is off by more than 10 % and by more than three standard errors, its own and the reference's; or if its
chains diverged. ``result.warnings`` is then a detector of wrong estimates like any other: how many of these does it
report (recall), and how many of its reports are right (precision)?

What stays silent is of one kind: small minibatches of noisy data, and chains too short for the flat directions. The
noise then looks like good mixing, all chains are on their way from w* together, and the loss rises too slowly to be
told from chance; only ‖w − w*‖² still grows (``diagnostics["distance_growth"]``), as it does in runs whose λ̂ is right.

**Is that the learning coefficient?** No warning can tell: γ and nβ define what is sampled. The exact means are
therefore compared with λ, which is known for all three networks.

The networks sit exactly at a global minimum of their loss, so that nothing but the sampler moves the chains away:

- a deep linear network at a most singular point, λ by Aoyagi's formula, no noise (Furman & Lau 2024, arXiv 2402.03698,
  and in 2308.12108v2);
- tanh regression with noise, λ = half the rank of its Fisher information;
- a transformer of one layer of attention, cross entropy with noise, likewise
  (:mod:`llc_fast.problems.exact_minima`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import llc_fast
from llc_fast.calibration import STIFFNESS
from llc_fast.plots import CLASSES, errorbar_by_warning, new_figure
from llc_fast.problems import deep_linear
from llc_fast.problems.exact_minima import ExactMinimum, tanh_regression, transformer_distillation
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, column, estimate_row, in_words, is_warned, that_count
from llc_fast.reproduce.study import Study
from llc_fast.samplers import HMCSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRONG, VERY_WRONG, ERRORS = 0.10, 0.30, 3.0
"""An estimate is wrong from this relative error on, if that is more than so many standard errors."""
MIN_RECALL, MIN_PRECISION = 0.9, 0.5
MAX_REFERENCE_ERROR = 0.03
"""Standard error of a reference, relative, up to which it can judge."""


@dataclass(frozen=True)
class Settings:
    """What is varied, and for how long.

    Attributes:
        architectures: of `ARCHITECTURES`.
        step_sizes: ε·(nβ·h_max + γ); the step size that llc_fast chooses comes on top.
        batch_sizes: beside the whole data set; the last is that of the other planes.
        localizations: γ; the first is that of the other planes.
        temperatures: nβ in units of n/log n; the first is that of the other planes.
        num_chains, num_draws: of each estimate, with as many steps of burn-in as draws.
        reference_draws: of the exact sampler, with half as many steps of burn-in; the next number is tried if the one
            before leaves a warning, or too large a standard error.
        reference_leapfrog: gradients for each of them.
    """

    architectures: tuple[str, ...] = ("deep linear", "tanh regression", "transformer")
    step_sizes: tuple[float, ...] = (5e-4, 2e-3, 0.01, 0.05, 0.2, 1.0, 5.0)
    batch_sizes: tuple[int, ...] = (16, 64)
    localizations: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    temperatures: tuple[float, ...] = (1.0, 0.1)
    num_chains: int = 4
    num_draws: int = 1000
    reference_draws: tuple[int, ...] = (500, 2000)
    reference_leapfrog: int = 10


SCALES = {
    "small": Settings(),
    "paper": Settings(
        step_sizes=tuple(5e-4 * 10 ** (k / 4) for k in range(17)),
        batch_sizes=(8, 16, 32, 128, 64),
        localizations=(1.0, 0.1, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
        temperatures=(1.0, 0.01, 0.03, 0.1, 0.3, 3.0, 10.0),
        num_draws=5000,
        reference_draws=(5000, 20_000, 80_000),
        reference_leapfrog=30,
    ),
}


# ---- networks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network at a minimum.

    Attributes:
        exact_data: fewer samples, with the same loss but for a constant: for the exact sampler.
    """

    model: nn.Module
    data: Any
    exact_data: tuple[torch.Tensor, torch.Tensor]
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    num_samples: int
    learning_coefficient: float


def _deep_linear(seed: int) -> Problem:
    problem = deep_linear.most_singular((16, 16, 16, 16), 4, 1000, seed)
    n, width = len(problem.data), problem.widths[0]
    inputs, targets = problem.data.batch(torch.arange(n))
    # The loss depends on inputs through their second moments: `width` inputs have the same.
    few = torch.linalg.qr(inputs.double(), mode="r").R * math.sqrt(width / n)
    few_targets = few @ torch.linalg.lstsq(inputs.double(), targets.double()).solution
    return Problem(
        problem.model,
        (inputs, targets),
        (few.float(), few_targets.float()),
        nn.functional.mse_loss,
        n,
        problem.learning_coefficient,
    )


def _at_minimum(make: Callable[[int], ExactMinimum]) -> Callable[[int], Problem]:
    def problem(seed: int) -> Problem:
        found = make(seed)
        return Problem(
            found.model, found.data, found.means, found.loss_fn, len(found.data[0]), found.learning_coefficient
        )

    return problem


ARCHITECTURES: dict[str, Callable[[int], Problem]] = {
    "deep linear": _deep_linear,
    "tanh regression": _at_minimum(tanh_regression),
    "transformer": _at_minimum(transformer_distillation),
}


# ---- measurement -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Settings other than the step size: γ, nβ in units of n/log n, and the minibatch; None: all samples."""

    localization: float
    temperature: float
    batch_size: int | None

    @property
    def target(self) -> str:
        """What names the exact answer."""
        return f"γ={self.localization:g} nβ×{self.temperature:g}"


def places(settings: Settings) -> list[Place]:
    """The lines through the centre along which settings vary; each once."""
    gamma, temperature, batch = settings.localizations[0], settings.temperatures[0], settings.batch_sizes[-1]
    found = [Place(gamma, temperature, size) for size in (*sorted(settings.batch_sizes), None)]
    found += [Place(other, temperature, batch) for other in settings.localizations[1:]]
    found += [Place(gamma, other, batch) for other in settings.temperatures[1:]]
    return found


def measure(study: Study, settings: Settings) -> None:
    for name in settings.architectures:
        problem = ARCHITECTURES[name](study.seed)
        study.rows("network", {name: problem}, lambda problem: _network(study, problem))
        curvature = study.tables["network"][name]["curvature"]
        natural = problem.num_samples / math.log(problem.num_samples)

        def reference(place: Place, problem: Problem = problem, name: str = name, natural: float = natural) -> Row:
            gradients, row = 0, Row()
            for draws in settings.reference_draws:
                result = study.estimate(
                    f"{name} {place.target} {draws}",
                    problem.model,
                    problem.exact_data,
                    problem.loss_fn,
                    sampler=HMCSampler(num_leapfrog=settings.reference_leapfrog),
                    nbeta=natural * place.temperature,
                    localization=place.localization,
                    num_chains=settings.num_chains,
                    num_draws=draws,
                    num_burnin=draws // 2,
                )
                gradients += result.loss_trace.size * settings.reference_leapfrog
                row = {**estimate_row(result), "architecture": name, "draws": draws, "gradients": gradients}
                if _is_known(row):
                    break
            return row

        exact = {f"{name} {place.target}": place for place in places(settings)}
        study.rows("reference", exact, reference, in_words)

        def estimate(
            case: tuple[Place, float | None, int],
            problem: Problem = problem,
            name: str = name,
            natural: float = natural,
            curvature: float = curvature,
        ) -> Row:
            place, step_size, seed = case
            nbeta, gamma = natural * place.temperature, place.localization
            result = study.estimate(
                _key(name, place, step_size),
                problem.model,
                problem.data,
                problem.loss_fn,
                lr=None if step_size is None else step_size / (nbeta * curvature + gamma),
                nbeta=nbeta,
                localization=gamma,
                batch_size=place.batch_size or problem.num_samples,
                num_chains=settings.num_chains,
                num_draws=settings.num_draws,
                num_burnin=settings.num_draws,
                seed=seed,
            )
            return {
                **estimate_row(result),
                "architecture": name,
                "step_size": step_size,
                "place": list(place),
                "diagnostics": result.diagnostics,
            }

        cases = {
            _key(name, place, step_size): (place, step_size)
            for place in places(settings)
            for step_size in (*settings.step_sizes, None)
        }
        # Every estimate has its own noise, so that chance errs in each anew.
        first = (study.seed * len(ARCHITECTURES) + list(ARCHITECTURES).index(name)) * len(cases)
        seeded = {key: (*case, first + k) for k, (key, case) in enumerate(cases.items())}
        study.rows("estimate", seeded, estimate, in_words)


def _key(name: str, place: Place, step_size: float | None) -> str:
    batch = "all" if place.batch_size is None else place.batch_size
    return f"{name} {place.target} B={batch} ε={'chosen' if step_size is None else f'{step_size:.3g}'}"


def _network(study: Study, problem: Problem) -> Row:
    # Calibration of an adjusted sampler looks at nothing but the curvature over all data.
    found = llc_fast.calibrate(
        problem.model,
        problem.exact_data,
        problem.loss_fn,
        sampler="mala",
        nbeta=1.0,
        localization=0.0,
        device=study.device,
        seed=study.seed,
        progress=False,
    )
    return {
        "curvature": STIFFNESS / found["lr"],
        "num_parameters": sum(p.numel() for p in problem.model.parameters()),
        "num_samples": problem.num_samples,
        "learning_coefficient": problem.learning_coefficient,
    }


# ---- judgement ---------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """An estimate beside its reference: the relative error, infinite if chains diverged, and the codes of warnings."""

    architecture: str
    place: Place
    step_size: float | None
    error: float
    sigmas: float
    codes: tuple[str, ...]

    @property
    def warned(self) -> bool:
        return bool(self.codes)

    def is_wrong(self, by: float = WRONG) -> bool:
        return abs(self.error) > by and self.sigmas > ERRORS

    @property
    def name(self) -> str:
        return _key(self.architecture, self.place, self.step_size)


def judge(tables: Tables) -> list[Judged]:
    """Every estimate against the exact answer to the same question."""
    found = []
    for row in tables["estimate"].values():
        place = Place(*row["place"])
        exact = tables["reference"][f"{row['architecture']} {place.target}"]
        error = sigmas = math.inf
        if not exact["llc"]:
            error = sigmas = math.nan  # not known: neither right nor wrong
        elif row["llc"] is not None:
            error = row["llc"] / exact["llc"] - 1
            sigmas = abs(row["llc"] - exact["llc"]) / math.hypot(row["stderr"], exact["stderr"])
        found.append(
            Judged(row["architecture"], place, row["step_size"], error, sigmas, tuple(that_count(row["codes"])))
        )
    return found


class Detection(NamedTuple):
    """Warnings as a detector: how many of the wrong were warned of, and how many of the warned were wrong."""

    wrong: int
    warned: int
    both: int
    total: int

    @property
    def recall(self) -> float:
        """1 if nothing was to be found."""
        return self.both / self.wrong if self.wrong else 1.0

    @property
    def precision(self) -> float:
        """1 if nothing was reported."""
        return self.both / self.warned if self.warned else 1.0

    @property
    def specificity(self) -> float:
        """Of those that are not wrong, the share without a warning; 1 if all are wrong."""
        right = self.total - self.wrong
        return 1 - (self.warned - self.both) / right if right else 1.0


def detection(judged: Iterable[Judged], by: float = WRONG) -> Detection:
    wrong = warned = both = count = 0
    for one in judged:
        wrong, warned, count = wrong + one.is_wrong(by), warned + one.warned, count + 1
        both += one.is_wrong(by) and one.warned
    return Detection(wrong, warned, both, count)


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Exact answers that are known, and warnings as a detector of wrong estimates."""
    judged = judge(tables)
    references = tables["reference"]
    worst = max(references, key=lambda key: _relative_error(references[key]))
    doubtful = [key for key, row in references.items() if is_warned(row)]
    known = all(_is_known(row) for row in references.values())
    found = [
        Claim(
            f"the exact sampler knows its answers to {MAX_REFERENCE_ERROR:.0%} (standard error), without a warning",
            f"at worst {_relative_error(references[worst]):.1%} ({worst}), "
            + (f"warnings: {', '.join(doubtful)}" if doubtful else "no warnings"),
            known,
        )
    ]
    for by, bound in ((VERY_WRONG, 1.0), (WRONG, MIN_RECALL)):
        seen = detection(judged, by)
        silent = [one for one in judged if one.is_wrong(by) and not one.warned]
        worst_first = sorted(silent, key=lambda one: -abs(one.error))
        listed = ", ".join(f"{one.name} ({one.error:+.0%})" for one in worst_first[:5])
        more = f", and {len(silent) - 5} more" if len(silent) > 5 else ""
        found.append(
            Claim(
                f"of the estimates that are off by more than {by:.0%}, at least {bound:.0%} are warned of",
                f"{seen.both} of {seen.wrong} ({_by_architecture(judged, by, 'recall')})"
                + (f"; in silence: {listed}{more}" if silent else ""),
                seen.recall >= bound,
            )
        )
    seen = detection(judged)
    found.append(
        Claim(
            f"of the estimates that are warned of, at least {MIN_PRECISION:.0%} are off by more than {WRONG:.0%}",
            f"{seen.both} of {seen.warned} ({_by_architecture(judged, WRONG, 'precision')}); to warn of every estimate "
            f"would give {seen.wrong / max(seen.total, 1):.0%}; {seen.specificity:.0%} of the others have no warning. "
            f"Right, by code: {_by_code(judged)}",
            seen.precision >= MIN_PRECISION,
        )
    )
    return found


def _is_known(row: Row) -> bool:
    """Whether a reference may judge."""
    return _relative_error(row) <= MAX_REFERENCE_ERROR and not is_warned(row)


def _relative_error(row: Row) -> float:
    return math.inf if not row["llc"] or row["stderr"] is None else float(row["stderr"] / abs(row["llc"]))


def _by_architecture(judged: Sequence[Judged], by: float, statistic: str) -> str:
    names = dict.fromkeys(one.architecture for one in judged)
    values = {
        name: getattr(detection([one for one in judged if one.architecture == name], by), statistic) for name in names
    }
    return ", ".join(f"{name} {value:.0%}" for name, value in values.items())


def _by_code(judged: Sequence[Judged]) -> str:
    """How many warnings of each code were on wrong estimates, the most frequent code first."""
    counts = Counter(code for one in judged for code in one.codes)
    right = Counter(code for one in judged for code in one.codes if one.is_wrong())
    return ", ".join(f"{code} {right[code]} of {count}" for code, count in counts.most_common()) or "none"


# ---- figure ------------------------------------------------------------------------------------------------

_EDGES = (-1.0, -0.5, -0.3, -0.1, 0.1, 0.3, 0.5, 1.0)


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Errors and warnings over all settings, warnings as a detector, and the exact answers beside λ."""
    names, judged = settings.architectures, judge(tables)
    figure, (first,) = new_figure(1, width=11.5, height=8.4)
    figure.delaxes(first)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.25, 1))
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    maps = top.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(maps, names, strict=True):
        image = _plot_map(axis, [one for one in judged if one.architecture == name], settings)
        network = tables["network"][name]
        axis.set_title(f"{name}\n{network['num_parameters']} parameters, n = {network['num_samples']}", fontsize=11)
    bar = top.colorbar(image, ax=list(maps), pad=0.01, ticks=_EDGES)
    bar.ax.set_yticklabels([f"{edge:+.0%}" for edge in _EDGES])
    bar.set_label("λ̂ ÷ exact answer − 1")
    left, right = bottom.subplots(1, 2, width_ratios=(1.5, 1))
    _plot_table(left, judged, names)
    _plot_answers(right, tables, settings)
    seen, badly = detection(judged), detection(judged, VERY_WRONG)
    figure.suptitle(
        f"Of {seen.wrong} estimates that are off by more than {WRONG:.0%}, {seen.both} carry a warning; of "
        f"{badly.wrong} off by more than {VERY_WRONG:.0%}, {badly.both}\n"
        "color: how wrong (white: within 10 %, black: diverged)    ×: llc_fast warned    ring: wrong in silence\n"
        f"what a row does not name is at {_centre(settings)}",
        fontsize=12,
    )
    return {"sensitivity": figure}


def _plot_map(axis: Axes, judged: Sequence[Judged], settings: Settings) -> Any:
    """Step sizes from left to right, other settings from top to bottom."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    rows, columns = places(settings), (*settings.step_sizes, None)
    errors = np.full((len(rows), len(columns)), np.nan)
    for one in judged:
        row, column = rows.index(one.place), columns.index(one.step_size)
        errors[row, column] = one.error
        if one.warned:
            axis.plot(column, row, "x", color="k", ms=7, mew=1.4)
        elif one.is_wrong():
            axis.plot(column, row, "o", mfc="none", mec="k", ms=12, mew=2.5)
    colours = colormaps["RdBu_r"].resampled(len(_EDGES) + 1).with_extremes(bad="0.25")
    norm = BoundaryNorm(_EDGES, colours.N, extend="both")
    shown = np.where(np.isfinite(errors), errors, np.nan)
    image = axis.imshow(shown, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axis.axvline(len(columns) - 1.5, color="k", lw=1)
    for edge in (len(settings.batch_sizes) + 0.5, len(rows) - len(settings.temperatures) + 0.5):
        axis.axhline(edge, color="k", lw=1)
    axis.set_xticks(range(len(columns)), [*(f"{s:.2g}" for s in settings.step_sizes), "chosen"], rotation=60)
    axis.set_yticks(range(len(rows)), _labels(rows))
    axis.set_xlabel("step size ε·(nβ·h_max + γ)")
    return image


def _centre(settings: Settings) -> str:
    batch, gamma, temperature = settings.batch_sizes[-1], settings.localizations[0], settings.temperatures[0]
    return f"batch {batch}, γ = {gamma:g}, nβ = {'' if temperature == 1 else f'{temperature:g}·'}n/log n"


def _labels(rows: Sequence[Place]) -> list[str]:
    """What is special about each place."""
    centre = rows[0]
    labels = []
    for place in rows:
        if place.temperature != centre.temperature:
            labels.append(f"nβ = {place.temperature:g}·n/log n")
        elif place.localization != centre.localization:
            labels.append(f"γ = {place.localization:g}")
        else:
            labels.append(f"batch {'all' if place.batch_size is None else place.batch_size}")
    return labels


def _plot_table(axis: Axes, judged: Sequence[Judged], names: Sequence[str]) -> None:
    axis.set_axis_off()
    head = ["", "all", "warned"]
    for by in (WRONG, VERY_WRONG):
        head += [f"off\n> {by:.0%}", "recall", "precision"]
    head.append("quiet")
    cells = []
    for name in (*names, "all"):
        chosen = [one for one in judged if name in (one.architecture, "all")]
        row = [name, str(len(chosen)), str(sum(one.warned for one in chosen))]
        for by in (WRONG, VERY_WRONG):
            seen = detection(chosen, by)
            row += [str(seen.wrong), f"{seen.recall:.0%}", f"{seen.precision:.0%}"]
        row.append(f"{detection(chosen).specificity:.0%}")
        cells.append(row)
    table = axis.table(cells, colLabels=head, loc="center", cellLoc="center")
    table.set_in_layout(False)
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 2)
    table.auto_set_column_width(list(range(len(head))))
    for (line, place), cell in table.get_celld().items():
        cell.set_linewidth(0.5)
        if line in (0, len(cells)) or place == 0:
            cell.set_text_props(weight="bold")
    axis.set_title("warnings as a detector of wrong estimates", fontsize=11)
    axis.text(
        0.5,
        0.02,
        "recall: of the wrong, how many were warned of; precision: of the warned, how many were wrong;\n"
        f"quiet: of those within {WRONG:.0%}, or not significantly off, how many had no warning",
        fontsize=9,
        ha="center",
        transform=axis.transAxes,
    )


def _plot_answers(axis: Axes, tables: Tables, settings: Settings) -> None:
    """The exact mean over the posterior, as a share of λ, along γ; hollow: at other temperatures."""
    for (color, marker), name in zip(CLASSES, settings.architectures, strict=False):
        known = tables["network"][name]["learning_coefficient"]
        axis.plot([], [], color=color, marker=marker, ms=6, label=f"{name}, λ = {known:g}")
        for temperature in settings.temperatures:
            gammas = sorted({p.localization for p in places(settings) if p.temperature == temperature})
            rows = [tables["reference"][f"{name} {Place(g, temperature, None).target}"] for g in gammas]
            elsewhere = temperature != settings.temperatures[0]
            answer, error = column(rows, "llc") / known, figures.two_sigma(rows) / known
            look: dict[str, Any] = {"ms": 6, "ls": "" if elsewhere else "-"}
            hollow = [elsewhere] * len(rows)
            errorbar_by_warning(axis, gammas, answer, error, hollow, color=color, marker=marker, **look)
    axis.axhline(1, color="k", lw=1, ls="--")
    axis.set(xscale="log", xlabel="localization γ", ylabel="exact mean of nβ(L − L(w*)) ÷ λ", ylim=(0, 1.6))
    others = ", ".join(f"{t:g}" for t in settings.temperatures[1:])
    axis.set_title(f"what no warning can tell: the exact answer is not λ\n(hollow: nβ times {others})", fontsize=11)
    axis.legend(fontsize=9)
