"""λ̂ along saddle-to-saddle training: it steps up when the rank of the network's product steps up.

A deep linear network f_w(x) = W_L ⋯ W_1 x that starts from small weights learns the singular values of a linear
teacher one by one (Jacot et al. 2021, arXiv 2106.15933). The rank of its product steps up from 0 to the teacher's,
and the learning coefficient of a product of rank r is known exactly (:func:`llc_fast.theory.deep_linear`). So the
estimate can be held against the answer all along a training run (Furman & Lau 2024, arXiv 2402.03698).

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

from llc_fast import theory
from llc_fast.estimate import DEFAULT_LOCALIZATION, default_nbeta
from llc_fast.plots import new_figure
from llc_fast.problems.deep_linear import end_to_end
from llc_fast.problems.saddle_to_saddle import (
    LinearDeviation,
    SaddleToSaddle,
    balanced_weights,
    behavioural,
    mean_square,
    small_weights,
)
from llc_fast.reproduce.frame import Check, Row, Study, Tables, figures_of

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
        return {"rank": rank, "known": settings.levels[rank], **figures_of(result)}

    study.rows("control", {f"rank {k}": k for k in range(len(settings.levels))}, control, _say_estimate)
    path = study.once("training", lambda: _train(study, settings, problem, first))
    study.rows("training", {"curve": path}, lambda path: _curve(settings, problem, path), _say_training)
    chosen = _choose(settings, study.tables["training"]["curve"])
    few = [chosen[round(k)] for k in np.linspace(0, len(chosen) - 1, settings.num_training_loss)]

    def sweep(case: tuple[str, list[int]]) -> Row:
        name, positions = case
        weights = [[layer[k] for layer in path["weights"]] for k in positions]
        models = [behavioural(w) if name == BEHAVIOURAL else LinearDeviation(w, problem.teacher) for w in weights]
        steps = [int(path["steps"][k]) for k in positions]
        found = study.sweep(
            name,
            models[0].to(study.device),
            [model.state_dict() for model in models],
            data,
            mean_square,
            labels=steps,
            dim="training_step",
            warm=False,
            **sampling,
        )
        names = {"llc": "llc_mean", "stderr": "llc_stderr", "low": "llc_low", "high": "llc_high"}
        same = ("lr", "r_hat", "ess_bulk", "is_warm", "gradients", "init_loss", "llc_per_chain")
        return {
            "step": steps,
            "singular_values": [_singular_values(w) for w in weights],
            "layers": [[torch.linalg.svdvals(layer).tolist() for layer in w] for w in weights],
            "warnings": [text.split("\n") if text else [] for text in found["warnings"].values.tolist()],
            **{ours: found[theirs].values for ours, theirs in (names | dict(zip(same, same, strict=True))).items()},
        }

    study.rows("sweeps", {name: (name, ks) for name, ks in ((BEHAVIOURAL, chosen), (TRAINING, few))}, sweep, _say_sweep)


BEHAVIOURAL, TRAINING = "behavioural loss", "training loss"


def _train(study: Study, settings: Settings, problem: SaddleToSaddle, weights: list[Tensor]) -> dict[str, Any]:
    """Weights at steps that lie one percent apart, until the teacher is learned and half as long again."""
    steps, kept = [0], [weights]
    first, end = problem.loss(weights), settings.most_steps
    bar = study.steps(settings.most_steps, "training")
    for step in bar:
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


def _say_estimate(row: Row) -> str:
    return (
        "all chains were lost"
        if row["llc"] is None
        else f"λ̂ = {row['llc']:.2f} ± {row['stderr']:.2f}, λ = {row['known']:g}"
    )


def _say_training(row: Row) -> str:
    return f"{row['step'][-1]} steps, loss from {row['loss'][0]:.2g} to {row['loss'][-1]:.2g}"


def _say_sweep(row: Row) -> str:
    return f"{len(row['step'])} checkpoints, {sum(map(bool, row['warnings']))} with warnings"


# ---- claimed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimate:
    """λ̂ where λ is known; values that could not be had are NaN."""

    rank: int
    known: float
    llc: float
    half: float
    is_warned: bool

    @property
    def distance(self) -> float:
        """|λ̂ − λ| in 95 % error bars; infinite if it is not known."""
        distance = abs(self.llc - self.known) / self.half if self.half else math.inf
        return distance if math.isfinite(distance) else math.inf


def _estimate(rank: int, known: float, llc: float | None, interval: Sequence[float | None], warnings: Any) -> _Estimate:
    low, high = (math.nan if bound is None else bound for bound in interval)
    return _Estimate(rank, known, math.nan if llc is None else llc, (high - low) / 2, bool(warnings))


def _controls(tables: Tables) -> list[_Estimate]:
    rows = tables["control"].values()
    return [_estimate(r["rank"], r["known"], r["llc"], r["interval"], r["warnings"]) for r in rows]


def _on_plateaus(tables: Tables, settings: Settings) -> dict[int, _Estimate]:
    """The estimates of checkpoints whose rank is beyond doubt, by their position among all."""
    row = tables["sweeps"][BEHAVIOURAL]
    ranks = {k: settings.rank(values) for k, values in enumerate(row["singular_values"])}
    return {
        k: _estimate(rank, settings.levels[rank], row["llc"][k], (row["low"][k], row["high"][k]), row["warnings"][k])
        for k, rank in ranks.items()
        if rank is not None
    }


def check(tables: Tables, settings: Settings) -> list[Check]:
    """The ranks come one by one, and λ̂ follows."""
    row, plateaus = tables["sweeps"][BEHAVIOURAL], _on_plateaus(tables, settings)
    ranks, wanted = [e.rank for e in plateaus.values()], range(len(settings.levels))
    beyond = [
        max((value for layer in row["layers"][k] for value in layer[e.rank :]), default=0.0)
        for k, e in plateaus.items()
    ]
    reach, largest = 1 / math.sqrt(DEFAULT_LOCALIZATION), max(beyond, default=0.0)
    return [
        _within("on networks of exactly rank 0 to " + str(wanted[-1]), _controls(tables), settings),
        Check(
            f"training comes past every rank from 0 to {wanted[-1]}, one by one",
            ", ".join(f"rank {rank}: {ranks.count(rank)}" for rank in wanted)
            + f" checkpoints; {len(row['step']) - len(ranks)} in transitions",
            ranks == sorted(ranks) and set(ranks) == set(wanted),
        ),
        Check(
            f"layers have the product's rank: what they have beyond it is below 1/√γ = {reach:g}, which chains cover",
            f"{largest:.2g}",
            largest < reach,
        ),
        _within("on every plateau", list(plateaus.values()), settings),
    ]


def _within(where: str, estimates: list[_Estimate], settings: Settings) -> Check:
    """Whether λ lies in the error bars of all estimates at once, and these are short enough to tell ranks apart."""
    count = max(len(estimates), 1)
    wider = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * count)) / NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    step = min(b - a for a, b in itertools.pairwise(settings.levels))
    by_rank: dict[int, list[_Estimate]] = {}
    for e in estimates:
        by_rank.setdefault(e.rank, []).append(e)
    means = [f"{np.mean([e.llc for e in es]):.4g} of {es[0].known:g}" for _, es in sorted(by_rank.items())]
    furthest = max((e.distance for e in estimates), default=math.inf)
    longest = max((e.half for e in estimates), default=math.inf)
    outside, warned = sum(not e.distance <= wider for e in estimates), sum(e.is_warned for e in estimates)
    return Check(
        f"{where} λ lies within the error bar of λ̂ ({CONFIDENCE:.0%} for all {len(estimates)} together), which is "
        "shorter than half a step",
        f"{', '.join(means) or 'no estimate'}; {outside} outside, the furthest {furthest:.2g} error bars of "
        f"{wider:.2g}; ± {longest:.2g} at most; {warned} with warnings",
        bool(estimates) and outside == 0 and longest < step / 2,
    )


# ---- drawn -------------------------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "0.45"


def draw(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Loss, singular values and λ̂ over the steps of training."""
    curve, row = tables["training"]["curve"], tables["sweeps"][BEHAVIOURAL]
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
    _draw_values(values, steps, np.array(curve["singular_values"], dtype=np.float64), settings)
    _draw_levels(main, steps, ranks, settings)
    _draw_estimates(main, row, settings)
    _draw_training_loss(other, tables["sweeps"][TRAINING], steps, np.array(curve["loss"]), settings)
    other.set(xlabel="step of training (full-batch gradient descent)", xlim=(row["step"][0] / 1.1, 1.1 * steps[-1]))
    figure.align_ylabels()
    return {"rank-transitions": figure}


def _title(tables: Tables, settings: Settings) -> str:
    found = check(tables, settings)[-1]
    what = (
        "λ̂ steps up with the rank of the product" if found.passed else "λ̂ along training, not all on the exact levels"
    )
    widths = " → ".join(map(str, settings.widths))
    return f"{what}\ndeep linear network {widths} trained from small weights, n = {settings.num_samples:,}"


def _spans(ranks: Sequence[int | None]) -> list[tuple[int, int, int | None]]:
    """Runs of equal ranks: first position, position after the last, rank."""
    edges = [0, *(k for k in range(1, len(ranks)) if ranks[k] != ranks[k - 1]), len(ranks)]
    return [(a, b, ranks[a]) for a, b in itertools.pairwise(edges)]


def _draw_values(axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], settings: Settings) -> None:
    bounds = [math.sqrt(e / settings.energy_scale) for e in (INVISIBLE, min(settings.visible), max(settings.visible))]
    axes.axhspan(bounds[0], bounds[2], color=_ORANGE, alpha=0.15, lw=0)
    for height, text in ((3 * bounds[2], "visible from\nn samples"), (bounds[0] / 3, "invisible")):
        axes.text(1.01, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=_ORANGE)
    axes.loglog(steps, values[:, : len(settings.visible)], color=_BLUE, lw=1.5)
    axes.loglog(steps, values[:, len(settings.visible) :], color=_GREY, lw=0.8)
    axes.set(ylabel="singular values\nof the product", ylim=(1e-4, 3 * max(settings.singular_values)))


def _draw_levels(axes: Axes, steps: NDArray[np.float64], ranks: Sequence[int | None], settings: Settings) -> None:
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


def _draw_estimates(axes: Axes, row: Row, settings: Settings) -> None:
    step, llc, low, high = (_numbers(row, name) for name in ("step", "llc", "low", "high"))
    plateau = np.array([settings.rank(v) is not None for v in row["singular_values"]])
    warned = np.array([bool(w) for w in row["warnings"]])
    axes.plot([], [], color="k", lw=2, label="λ of the rank, exact")
    for chosen, color, label in (
        (plateau, _BLUE, "λ̂ of the behavioural loss, 95 % error bars"),
        (~plateau, _ORANGE, "λ̂ in a transition"),
    ):
        for hollow in (False, True):
            some = chosen & (warned == hollow)
            if some.any():
                axes.errorbar(
                    step[some],
                    llc[some],
                    yerr=[(llc - low)[some], (high - llc)[some]],
                    fmt="o",
                    ms=5,
                    color=color,
                    mfc="white" if hollow else color,
                    elinewidth=1.2,
                    capsize=2.5,
                    zorder=3,
                    label=label + (", with warnings" if hollow else ""),
                )
    axes.set(ylabel="learning coefficient")
    axes.legend(loc="upper left", framealpha=1)


def _draw_training_loss(
    axes: Axes, row: Row, steps: NDArray[np.float64], loss: NDArray[np.float64], settings: Settings
) -> None:
    """λ̂ of the training loss, and what it is if chains find the teacher from wherever they start."""
    llc, warned = _numbers(row, "llc"), np.array([bool(w) for w in row["warnings"]])
    learned = settings.levels[-1] - default_nbeta(settings.num_samples) * loss
    axes.set_yscale("symlog", linthresh=100)
    axes.axhline(0, color="0.6", lw=0.7)
    axes.plot(steps, learned, "--", color=_GREY, lw=1.2, label="if chains find the teacher: λ of its rank − nβ·L(w*)")
    places = np.array(row["step"], dtype=np.float64)
    for some, fill, label in ((~warned, "k", None), (warned, "white", "with warnings: w* is no minimum")):
        axes.plot(places[some], llc[some], "o", color="k", ms=5, mfc=fill, label=label)
    axes.set(ylabel="λ̂ of the\ntraining loss", ylim=(4 * learned.min(), 50 * settings.levels[-1]))
    axes.legend(loc="upper left", framealpha=1)


def _numbers(row: Row, name: str) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in row[name]], dtype=np.float64)
