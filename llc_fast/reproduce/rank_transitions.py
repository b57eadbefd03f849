"""λ̂ along saddle-to-saddle training: it steps up when the rank of the network's product steps up.

A deep linear network f_w(x) = W_L ⋯ W_1 x that starts from small weights learns the singular values of a linear
teacher one by one (Jacot et al. 2021, arXiv 2106.15933). The rank of its product steps up from 0 to the teacher's,
and the learning coefficient of a product of rank r is known exactly (:func:`llc_fast.theory.deep_linear`). So the
estimate can be held against the answer all along a training run (Furman & Lau 2024, arXiv 2402.03698;
also in 2308.12108v2).

**Which loss.** On the way w* is a saddle of the training loss and no minimum: the chains find lower loss, and λ̂ =
nβ·(mean of L − L(w*)) is negative, by as much as there is left to learn. What theory has an answer for is the loss
whose truth is the network as it is, the *behavioural* loss E‖f_w(x) − f_{w*}(x)‖² (Bushnaq et al. 2024, arXiv
2405.10927). w* is a minimum of it at every checkpoint. That is the curve that is compared; the training loss is shown
beside it. Once the teacher is learned they are the same.

**Which rank.** No singular value of a trained network is zero; what counts is whether it can be seen from n samples.
To lose a singular value s costs

    e(s) = nβ·s²·E[x²] / outputs

(inputs of covariance E[x²]·1, the mean taken over outputs too). By the free energy nβ·L + λ·log nβ, the posterior
gives the k-th one up for the smaller λ of rank k − 1 as soon as e < (λ_k − λ_{k−1})·log nβ. Twice that and it is
*visible*. All of which the energies add up to less than 1/20, a tenth of what a single direction holds, are
*invisible*: given up, they add no more than that to λ̂. A checkpoint is on the *plateau* of rank r if its r largest
singular values are visible, and the others invisible. In between, in the transitions, nothing is claimed: e crosses
three decades there, and λ̂ rises by about e until it meets the next level.

**Traps.** Theory gives the λ of the most singular w* with the same product. Trained from small weights, all layers
share the product's rank, which is checked: what a layer has beyond it is small against 1/√γ, the distance that chains
cover. λ is an asymptote, which networks with hidden layers as wide as the outer ones approach slowly: for widths (10,
10, 10, 10) and n = 10,000 an exact sampler too (HMC) gives 5 to 8 % less. One with a bottleneck is closer to it;
networks of exactly rank 0, 1, … are estimated first, as a control. Chains start at each checkpoint's own w*
(`warm=False`): chains carried over from one rank to the next have forgotten the directions in which w* has just
learned something, and may stay on the saddle where it is missing (λ̂ = 470 ± 40 instead of 40.5 was seen, with
warnings).

All checkpoints are estimated with the same noise, so that differences between them are more precise than each of
them, and deviations on a plateau are alike.

What must come out: the ranks come one by one, and on every plateau λ lies within the error bar of λ̂.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llc_fast import default_nbeta, theory
from llc_fast.plots import errorbar_by_warning, new_figure
from llc_fast.problems.deep_linear import end_to_end
from llc_fast.problems.saddle_to_saddle import (
    LinearDeviation,
    SaddleToSaddle,
    balanced_weights,
    behavioural,
    mean_square,
    small_weights,
)
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, column, estimate_row, in_words, is_warned, number, numbers
from llc_fast.reproduce.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INVISIBLE = 1 / 20
"""Energy of all singular values that do not count together; one direction holds ½."""
CONFIDENCE = 0.95
STRETCH = 30
"""λ is estimated from this fraction of training on: before, the product is nothing but small."""


@dataclass(frozen=True)
class Settings:
    """A network, its teacher and how it is trained and looked at.

    Attributes:
        widths: of the network: inputs, hidden layers, outputs.
        singular_values: of the teacher, largest first.
        num_samples: n.
        scale: of the first weights, which have standard deviation scale/√fan_in.
        lr: of gradient descent.
        tolerance: training has learned the teacher when the loss has fallen by this factor; half as many steps follow.
        most_steps: of training.
        num_checkpoints: at which λ is estimated.
        num_training_loss: of these, how many also with the training loss.
        num_draws, num_burnin: of a chain.
        batch_size: of minibatches.
    """

    widths: tuple[int, ...] = (12, 5, 5, 12)
    singular_values: tuple[float, ...] = (4.0, 2.4, 1.4, 0.85)
    num_samples: int = 100_000
    scale: float = 0.02
    lr: float = 0.12
    tolerance: float = 1e-6
    most_steps: int = 40_000
    num_checkpoints: int = 36
    num_training_loss: int = 8
    num_draws: int = 4000
    num_burnin: int = 4000
    batch_size: int = 512

    @property
    def levels(self) -> list[float]:
        """λ of a product of rank 0, 1, …"""
        return [theory.deep_linear(self.widths, rank).value for rank in range(len(self.singular_values) + 1)]

    @property
    def energy_scale(self) -> float:
        """e/s²: nβ·E[x²]/outputs, of standard normal inputs."""
        return default_nbeta(self.num_samples) / self.widths[-1]

    @property
    def visible(self) -> list[float]:
        """The energy from which on the k-th singular value counts."""
        free_energy = math.log(default_nbeta(self.num_samples))
        levels = self.levels
        return [2 * (after - before) * free_energy for before, after in itertools.pairwise(levels)]

    def rank(self, singular_values: Sequence[float]) -> int | None:
        """How many singular values count; None in a transition."""
        energies = self.energy_scale * np.square(singular_values)
        rank = 0
        while rank < len(self.visible) and energies[rank] >= self.visible[rank]:
            rank += 1
        return rank if energies[rank:].sum() <= INVISIBLE else None


SCALES = {
    "small": Settings(),
    "paper": Settings(
        widths=(50, 16, 16, 50),
        singular_values=(5.0, 3.8, 2.9, 2.2, 1.7, 1.3, 1.0, 0.78),
        num_samples=1_000_000,
        lr=0.5,
        most_steps=200_000,
        num_checkpoints=120,
        num_training_loss=30,
        num_draws=20_000,
        num_burnin=20_000,
    ),
}


# ---- measured ----------------------------------------------------------------------------------------------


def measure(study: Study, settings: Settings) -> None:
    """The control, training, and λ̂ at its checkpoints."""
    generator = torch.Generator().manual_seed(study.seed)
    inputs, outputs = settings.widths[0], settings.widths[-1]
    problem = SaddleToSaddle.make(inputs, outputs, settings.singular_values, settings.num_samples, generator)
    first = small_weights(settings.widths, settings.scale, generator)
    truncated = [
        balanced_weights(settings.widths, settings.singular_values[:rank], generator)
        for rank in range(len(settings.levels))
    ]
    data = (problem.inputs.to(study.device),)
    sampling = {name: getattr(settings, name) for name in ("num_draws", "num_burnin", "batch_size")}

    def control(rank: int) -> Row:
        # A little off the saddle, as training is: at zero itself there is no curvature to choose a step size by.
        weights = [exact + small for exact, small in zip(truncated[rank], first, strict=True)]
        model = behavioural(weights).to(study.device)
        result = study.estimate(f"control {rank}", model, data, mean_square, **sampling)
        return {"rank": rank, "known": settings.levels[rank], **estimate_row(result)}

    ranks = {f"rank {k}": k for k in range(len(settings.levels))}
    study.rows("control", ranks, control, lambda row: f"{in_words(row)}; λ = {row['known']:g}")
    path = study.once("training", lambda: _train(study, settings, problem, first))
    study.rows("training", {"curve": path}, lambda path: _curve(settings, problem, path), _say_training)
    chosen = _choose(settings, study.tables["training"]["curve"])
    few = [chosen[round(k)] for k in np.linspace(0, len(chosen) - 1, settings.num_training_loss)]

    def sweep(table: str, positions: list[int]) -> None:
        weights = {int(path["steps"][k]): [layer[k] for layer in path["weights"]] for k in positions}

        def deviation(w: list[Tensor]) -> LinearDeviation:
            return behavioural(w) if table == BEHAVIOURAL else LinearDeviation(w, problem.teacher)

        def about(step: int) -> Row:
            layers = [torch.linalg.svdvals(layer).tolist() for layer in weights[step]]
            return {"singular_values": _singular_values(weights[step]), "layers": layers}

        study.sweep(
            table,
            table,
            deviation(next(iter(weights.values()))).to(study.device),
            list(weights),
            lambda: [deviation(w).state_dict() for w in weights.values()],
            data,
            mean_square,
            about,
            in_words,
            warm=False,
            localization=LOCALIZATION,
            **sampling,
        )

    sweep(BEHAVIOURAL, chosen)
    sweep(TRAINING, few)


BEHAVIOURAL, TRAINING = "behavioural loss", "training loss"
"""Two tables, one row for each checkpoint."""
LOCALIZATION = 1.0


def _train(study: Study, settings: Settings, problem: SaddleToSaddle, weights: list[Tensor]) -> dict[str, Any]:
    """Weights at steps that lie one percent apart, until the teacher is learned and half as long again."""
    steps, kept = [0], [weights]
    first, end = problem.loss(weights), settings.most_steps
    for step in study.steps(settings.most_steps, "training"):
        if step >= end:
            break
        weights = problem.step(weights, settings.lr)
        if step + 1 >= 1.01 * steps[-1]:
            steps.append(step + 1)
            kept.append(weights)
            if end == settings.most_steps and problem.loss(weights) < settings.tolerance * first:
                end = min(end, step * 3 // 2)
    return {"steps": steps, "weights": [torch.stack(layer) for layer in zip(*kept, strict=True)]}


def _singular_values(weights: Sequence[Tensor]) -> list[float]:
    """Of the product, as many as it can have."""
    values = torch.linalg.svdvals(end_to_end(weights)).tolist()
    return values[: min(min(w.shape) for w in weights)]  # type: ignore[no-any-return]


def _curve(settings: Settings, problem: SaddleToSaddle, path: dict[str, Any]) -> Row:
    """Loss and singular values all along training."""
    weights = list(zip(*path["weights"], strict=True))
    values = [_singular_values(w) for w in weights]
    return {"step": path["steps"], "loss": [problem.loss(w) for w in weights], "singular_values": values}


def _choose(settings: Settings, curve: Row) -> list[int]:
    """Where on the curve λ is estimated.

    Half of the checkpoints lie evenly over log(step), from a thirtieth of training on, half evenly over the
    transitions, over log(e) from invisible to visible.
    """
    steps, values = np.array(curve["step"]), np.array(curve["singular_values"], dtype=np.float64)
    energies = settings.energy_scale * values[:, : len(settings.visible)] ** 2
    top = np.array(settings.visible)
    crossed = np.clip(np.log(np.maximum(energies, 1e-300) / INVISIBLE) / np.log(top / INVISIBLE), 0, 1).mean(axis=1)
    begin = int(np.argmax(steps >= steps[-1] / STRETCH))
    passed = np.log(np.maximum(steps, 1) / steps[-1]) / math.log(STRETCH)
    way = np.maximum.accumulate(crossed + passed)[begin:]
    return sorted(
        {begin + int(np.abs(way - p).argmin()) for p in np.linspace(way[0], way[-1], settings.num_checkpoints)}
    )


def _say_training(row: Row) -> str:
    return f"{row['step'][-1]} steps, loss from {row['loss'][0]:.2g} to {row['loss'][-1]:.2g}"


# ---- claimed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimate:
    """λ̂ where λ is known; values that could not be had are NaN."""

    rank: int
    known: float
    row: Row

    @property
    def half(self) -> float:
        """Of the 95 % error bar."""
        low, high = map(number, self.row["interval"])
        return (high - low) / 2

    @property
    def distance(self) -> float:
        """|λ̂ − λ| in 95 % error bars; infinite if it is not known."""
        distance = abs(number(self.row["llc"]) - self.known) / self.half if self.half else math.inf
        return distance if math.isfinite(distance) else math.inf


def _on_plateaus(tables: Tables, settings: Settings) -> list[_Estimate]:
    """The estimates of checkpoints whose rank is beyond doubt."""
    rows = tables[BEHAVIOURAL].values()
    ranks = [(settings.rank(row["singular_values"]), row) for row in rows]
    return [_Estimate(rank, settings.levels[rank], row) for rank, row in ranks if rank is not None]


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """The ranks come one by one, and λ̂ follows."""
    controls = [_Estimate(row["rank"], row["known"], row) for row in tables["control"].values()]
    plateaus = _on_plateaus(tables, settings)
    ranks, wanted = [e.rank for e in plateaus], range(len(settings.levels))
    beyond = [max((value for layer in e.row["layers"] for value in layer[e.rank :]), default=0.0) for e in plateaus]
    reach, largest = 1 / math.sqrt(LOCALIZATION), max(beyond, default=0.0)
    return [
        _within("on networks of exactly rank 0 to " + str(wanted[-1]), controls, settings),
        Claim(
            f"training comes past every rank from 0 to {wanted[-1]}, one by one",
            ", ".join(f"rank {rank}: {ranks.count(rank)}" for rank in wanted)
            + f" checkpoints; {len(tables[BEHAVIOURAL]) - len(ranks)} in transitions",
            ranks == sorted(ranks) and set(ranks) == set(wanted),
            "published",
        ),
        Claim(
            f"layers have the product's rank: what they have beyond it is below 1/√γ = {reach:g}, which chains cover",
            f"{largest:.2g}",
            largest < reach,
        ),
        _within("on every plateau", plateaus, settings),
    ]


def _within(where: str, estimates: list[_Estimate], settings: Settings) -> Claim:
    """Whether λ lies in the error bars of all estimates at once, and these are short enough to tell ranks apart."""
    count = max(len(estimates), 1)
    wider = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * count)) / NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    step = min(b - a for a, b in itertools.pairwise(settings.levels))
    by_rank: dict[int, list[_Estimate]] = {}
    for e in estimates:
        by_rank.setdefault(e.rank, []).append(e)
    means = [f"{column((e.row for e in es), 'llc').mean():.4g} of {es[0].known:g}" for _, es in sorted(by_rank.items())]
    furthest = max((e.distance for e in estimates), default=math.inf)
    longest = max((e.half for e in estimates), default=math.inf)
    outside, warned = sum(not e.distance <= wider for e in estimates), sum(is_warned(e.row) for e in estimates)
    return Claim(
        f"{where} λ lies within the error bar of λ̂ ({CONFIDENCE:.0%} for all {len(estimates)} together), which is "
        "shorter than half a step",
        f"{', '.join(means) or 'no estimate'}; {outside} outside, the furthest {furthest:.2g} error bars of "
        f"{wider:.2g}; ± {longest:.2g} at most; {warned} with warnings",
        bool(estimates) and outside == 0 and longest < step / 2,
    )


# ---- figure ------------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Loss, singular values and λ̂ over the steps of training."""
    curve, rows = tables["training"]["curve"], list(tables[BEHAVIOURAL].values())
    figure, _ = new_figure(1, width=8.0, height=10.5)
    figure.clear()
    loss, values, main, other = figure.subplots(4, 1, sharex=True, height_ratios=[1.6, 2.4, 4.2, 1.8])
    figure.suptitle(_title(tables, settings), fontsize=13)
    steps = np.array(curve["step"], dtype=np.float64)
    ranks = [settings.rank(v) for v in curve["singular_values"]]
    for axes in (loss, values, main, other):
        for begin, end, rank in _spans(ranks):
            if rank is None:
                axes.axvspan(steps[max(begin - 1, 0)], steps[min(end, len(steps) - 1)], color="0.9", lw=0, zorder=0)
    loss.loglog(steps, curve["loss"], color="k", lw=1.5)
    smallest = settings.singular_values[-1] ** 2 / settings.widths[-1]
    loss.set(ylabel="training loss", ylim=(smallest / 10, 2 * curve["loss"][0]))
    _plot_values(values, steps, np.array(curve["singular_values"], dtype=np.float64), settings)
    _plot_levels(main, steps, ranks, settings)
    _plot_estimates(main, rows, settings)
    _plot_training_loss(other, list(tables[TRAINING].values()), steps, np.array(curve["loss"]), settings)
    first = rows[0]["step"]
    other.set(xlabel="step of training (full-batch gradient descent)", xlim=(first / 1.1, 1.1 * steps[-1]))
    figure.align_ylabels()
    return {"rank-transitions": figure}


def _title(tables: Tables, settings: Settings) -> str:
    on_levels = claims(tables, settings)[-1].holds
    what = "λ̂ steps up with the rank of the product" if on_levels else "λ̂ along training, not all on the exact levels"
    widths = " → ".join(map(str, settings.widths))
    return f"{what}\ndeep linear network {widths} trained from small weights, n = {settings.num_samples:,}"


def _spans(ranks: Sequence[int | None]) -> list[tuple[int, int, int | None]]:
    """Runs of equal ranks: first position, position after the last, rank."""
    edges = [0, *(k for k in range(1, len(ranks)) if ranks[k] != ranks[k - 1]), len(ranks)]
    return [(a, b, ranks[a]) for a, b in itertools.pairwise(edges)]


def _plot_values(axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], settings: Settings) -> None:
    bounds = [math.sqrt(e / settings.energy_scale) for e in (INVISIBLE, min(settings.visible), max(settings.visible))]
    axes.axhspan(bounds[0], bounds[2], color=figures.ORANGE, alpha=0.15, lw=0)
    for height, text in ((3 * bounds[2], "visible from\nn samples"), (bounds[0] / 3, "invisible")):
        axes.text(
            1.01, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=figures.ORANGE
        )
    axes.loglog(steps, values[:, : len(settings.visible)], color=figures.BLUE, lw=1.5)
    axes.loglog(steps, values[:, len(settings.visible) :], color=figures.GREY, lw=0.8)
    axes.set(ylabel="singular values\nof the product", ylim=(1e-4, 3 * max(settings.singular_values)))


def _plot_levels(axes: Axes, steps: NDArray[np.float64], ranks: Sequence[int | None], settings: Settings) -> None:
    """The exact λ, wherever there is one."""
    for begin, end, rank in _spans(ranks):
        if rank is not None:
            level = settings.levels[rank]
            axes.plot(steps[[begin, end - 1]], [level, level], color="k", lw=2, zorder=2)
    for rank, level in enumerate(settings.levels):
        axes.axhline(level, color="0.75", lw=0.7, ls=":", zorder=1)
        axes.text(
            1.01, level, f"rank {rank}\nλ = {level:g}", transform=axes.get_yaxis_transform(), va="center", fontsize=9
        )


def _plot_estimates(axes: Axes, rows: Sequence[Row], settings: Settings) -> None:
    axes.plot([], [], color="k", lw=2, label="λ of the rank, exact")
    on_plateau = [settings.rank(row["singular_values"]) is not None for row in rows]
    for wanted, color, label in (
        (True, figures.BLUE, "λ̂ of the behavioural loss, 95 % error bars"),
        (False, figures.ORANGE, "λ̂ in a transition"),
    ):
        chosen = [row for row, on in zip(rows, on_plateau, strict=True) if on == wanted]
        llc, bounds = column(chosen, "llc"), [numbers(row["interval"][k] for row in chosen) for k in (0, 1)]
        errorbar_by_warning(
            axes,
            [row["step"] for row in chosen],
            llc,
            [llc - bounds[0], bounds[1] - llc],
            map(is_warned, chosen),
            color=color,
            zorder=3,
            label=label,
        )
    figures.label_hollow_in(axes, rows)
    axes.set(ylabel="learning coefficient")
    axes.legend(loc="upper left", framealpha=1)


def _plot_training_loss(
    axes: Axes, rows: Sequence[Row], steps: NDArray[np.float64], loss: NDArray[np.float64], settings: Settings
) -> None:
    """λ̂ of the training loss, and what it is if chains find the teacher from wherever they start."""
    learned = settings.levels[-1] - default_nbeta(settings.num_samples) * loss
    axes.set_yscale("symlog", linthresh=100)
    axes.axhline(0, color="0.6", lw=0.7)
    label = "if chains find the teacher: λ of its rank − nβ·L(w*)"
    axes.plot(steps, learned, "--", color=figures.GREY, lw=1.2, label=label)
    places = [row["step"] for row in rows]
    errorbar_by_warning(axes, places, column(rows, "llc"), None, map(is_warned, rows), color="k")
    figures.label_hollow_in(axes, rows)
    axes.set(ylabel="λ̂ of the\ntraining loss", ylim=(4 * learned.min(), 50 * settings.levels[-1]))
    axes.legend(loc="upper left", framealpha=1)
