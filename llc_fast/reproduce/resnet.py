"""How learning rate and batch size shape a residual network: λ̂ along SGD, as in Lau et al. 2023 (arXiv 2308.12108).

SGD is said to prefer degenerate solutions, the more so the noisier it is: with larger learning rates and smaller
batches. The local learning coefficient λ measures degeneracy: it is half the number of parameters where nothing is
degenerate, and the less the more there is. The paper followed it along the training of ResNet-18 on CIFAR-10; here the
images are the 1797 digits that come with scikit-learn, and the network has the width that a machine bears.

Runs of plain SGD (no momentum, no weight decay) start from the same initialization and take the same number of steps,
with several learning rates at one batch size and several batch sizes at one learning rate. (Steps and not epochs: with
a sixteenth of the steps the largest batches would hardly be trained, and batch size would be how far a run got.) At
some of the steps

    λ̂ = nβ·(mean of L over draws − L(w*)),    nβ = n / log n,    L: cross-entropy over the n training images,

is measured from p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²). Everything is done again from other initializations, of which
only the last step is measured: the spread over these, and not the Monte Carlo error, tells whether runs differ.

**Localization.** γ = P/(reach·‖w₀‖)², with P parameters and the initialization w₀, is the same for all runs. Directions
that the loss does not see make up nearly all of a network with more parameters than samples, and each of them is 1/√γ
wide: chains end at a distance of √(P/γ) from w*. With γ = 1 that is many times ‖w*‖, and the loss found there is that
of a random network. It does not show in short chains: T steps of ε diffuse by √(εT) only, which makes 1/(εT) the
localization of a customary 1,000 to 3,000 steps of 10⁻⁶ to 10⁻⁷, whatever γ is. `reach` says what is meant, and chains
get there. It is not free: a direction of curvature h adds ½·nβh/(nβh + γ), not ½, so that λ̂ is smaller than λ, weighs
directions by their stiffness up to γ, and compares networks with each other only.

**Step size.** ε = pace/γ, the same for all runs: directions that only γ holds forget where they were in 2/pace steps,
so that chains of hundreds of steps are long. The bias that it adds to the loss is measured and subtracted
(bias_correction). Pilot chains (lr=None) are of no use here: they judge the bias by its share of nβ·(L − L(w*)), which
is next to nothing where chains walk downhill, and chose steps up to thirty times too small at some early checkpoints.

**Early checkpoints are no minima.** Chains there walk downhill and λ̂ comes out too low, or negative; γ limits how far.
Such estimates carry a warning, and hollow markers in the figure.

**The other reason for a low λ̂** is a low loss: where all images are classified with certainty cross-entropy is flat,
and larger learning rates get there in fewer steps. The last panel therefore has λ̂ over the training loss. With seed 0
of the small scale the order is there at equal loss too: at about 0.04, 30, 14 and 4 with learning rates of 0.03, 0.1
and 0.3 (the last with a warning); at 0.007, 15 with batches of 256 and 10 with 64. Batches of 16 have not settled after
these steps: their λ̂ is small or negative for being no minimum too, and two of three final estimates have a warning.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from llc_fast.plots import label_hollow, new_figure
from llc_fast.problems.digits import NUM_TRAIN, Digits, load_digits
from llc_fast.problems.resnet import resnet
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, column, in_words, is_warned
from llc_fast.reproduce.study import Study
from llc_fast.stats.limits import MAX_R_HAT
from llc_fast.support.runtime import threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """What is trained, and how it is looked at.

    Attributes:
        width, blocks, size: of the network and its images, see :func:`llc_fast.problems.resnet.resnet`.
        num_train: n.
        learning_rates: of runs with `batch_size`, one of them `learning_rate`.
        batch_sizes: of runs with `learning_rate`, one of them `batch_size`.
        checkpoints: numbers of SGD steps, increasing; the last one ends the training.
        trainings: of each run, from initializations of their own.
        reach: how far from w* γ alone lets chains go (root mean square), as a share of ‖w₀‖. A fifth is local, changes
            each weight by a fifth on average and the loss by something that can be measured.
        pace: ε·γ. Stiff directions are stable up to nβh = 4γ/pace − γ.
        sampling_batch_size, num_chains, num_draws, num_burnin: of the estimates.
    """

    width: int
    blocks: int
    size: int
    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    learning_rate: float
    batch_size: int
    checkpoints: tuple[int, ...]
    trainings: int
    num_draws: int
    num_burnin: int
    sampling_batch_size: int
    num_train: int = NUM_TRAIN
    num_chains: int = 4
    reach: float = 0.2
    pace: float = 0.1


SCALES = {
    "small": Settings(
        width=4,
        blocks=1,
        size=8,
        learning_rates=(0.03, 0.1, 0.3),
        batch_sizes=(16, 64, 256),
        learning_rate=0.1,
        batch_size=64,
        checkpoints=(30, 80, 160, 320, 600),
        trainings=3,
        num_draws=200,
        num_burnin=80,
        sampling_batch_size=256,
    ),
    "paper": Settings(
        width=64,
        blocks=2,
        size=16,
        learning_rates=(0.005, 0.01, 0.02, 0.05),
        batch_sizes=(16, 64, 256, 512),
        learning_rate=0.02,
        batch_size=64,
        checkpoints=(50, 150, 300, 600, 1000, 1500, 2500, 4000, 6000, 10_000),
        trainings=5,
        num_draws=1000,
        num_burnin=1000,
        sampling_batch_size=512,
    ),
}
"""The paper's scale is ResNet-18 with 11 million parameters, on the digits drawn larger."""


@dataclass(frozen=True)
class Run:
    """One training."""

    learning_rate: float
    batch_size: int
    training: int

    @property
    def name(self) -> str:
        return f"lr {self.learning_rate:g}, batch {self.batch_size}, training {self.training}"


def plan(settings: Settings) -> list[Run]:
    """All trainings; those with the full set of checkpoints first."""
    pairs = [(lr, settings.batch_size) for lr in settings.learning_rates]
    pairs += [(settings.learning_rate, size) for size in settings.batch_sizes]
    return [Run(*pair, training=k) for k in range(settings.trainings) for pair in dict.fromkeys(pairs)]


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(study: Study, settings: Settings) -> None:
    """Train every run and estimate λ along it."""
    digits = load_digits(num_train=settings.num_train, size=settings.size, seed=study.seed)
    (train, test) = ((x.to(study.device), y.to(study.device)) for x, y in digits)
    digits = Digits(train, test)
    gamma = localization(_network(settings, study.seed), settings.reach)

    for run in plan(settings):
        _measure_run(study, settings, digits, gamma, run)


def _measure_run(study: Study, settings: Settings, digits: Digits, gamma: float, run: Run) -> None:
    seed = study.seed + run.training
    first = 0 if run.training == 0 else len(settings.checkpoints) - 1

    @functools.cache
    def kept() -> dict[int, dict[str, Any]]:
        return study.once(f"training of {run.name}", lambda: _train(study, settings, digits, run, seed))

    def about(step: int) -> Row:
        accuracies = {name: kept()[step][name] for name in ("train_accuracy", "test_accuracy")}
        return {**vars(run), "localization": gamma, **accuracies}

    steps = settings.checkpoints[first:]
    study.sweep(
        "runs",
        run.name,
        _network(settings, seed).to(study.device),
        steps,
        lambda: [kept()[step]["state"] for step in steps],
        digits.train,
        F.cross_entropy,
        about,
        in_words,
        warm=False,  # burn-in is short, and networks change between checkpoints
        localization=gamma,
        lr=settings.pace / gamma,
        bias_correction=True,
        num_chains=settings.num_chains,
        num_draws=settings.num_draws,
        num_burnin=settings.num_burnin,
        batch_size=settings.sampling_batch_size,
        seed=seed,
    )


def localization(model: nn.Module, reach: float) -> float:
    """γ = P/(reach·‖w‖)², to two digits: with it alone, the root mean square distance from w* is reach·‖w‖."""
    squares = [float(p.detach().double().square().sum()) for p in model.parameters()]
    return float(f"{sum(p.numel() for p in model.parameters()) / (reach**2 * sum(squares)):.2g}")


def _network(settings: Settings, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    return resnet(settings.width, blocks=settings.blocks, size=settings.size, generator=generator)


def _train(study: Study, settings: Settings, digits: Digits, run: Run, seed: int) -> dict[int, dict[str, Any]]:
    """Plain SGD, minibatches without replacement within an epoch: state dict and accuracies at each checkpoint."""
    x, y = digits.train
    model = _network(settings, seed).to(study.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    kept: dict[int, dict[str, Any]] = {}
    with threads(1 if study.device.type == "cpu" else None):  # kernels are too short to be shared
        for step in study.steps(settings.checkpoints[-1], f"training, {run.name}"):
            if len(order) < run.batch_size:
                order = torch.randperm(len(x), generator=generator)
            batch, order = order[: run.batch_size].to(study.device), order[run.batch_size :]
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step + 1 in settings.checkpoints:
                kept[step + 1] = {
                    "state": {name: value.clone() for name, value in model.state_dict().items()},
                    "train_accuracy": _accuracy(model, digits.train),
                    "test_accuracy": _accuracy(model, digits.test),
                }
    return kept


@torch.no_grad()
def _accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    x, y = data
    return float((model(x).argmax(1) == y).double().mean())


# ---- what must come out ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Final:
    """λ̂ at the end of a run.

    Attributes:
        value: mean over trainings.
        sampling: Monte Carlo error of that mean.
        spread: standard error from the spread over trainings; NaN with one.
    """

    value: float
    sampling: float
    spread: float

    @property
    def stderr(self) -> float:
        """The larger of the two: the spread contains the Monte Carlo error, but is itself known from few trainings."""
        return self.sampling if math.isnan(self.spread) else max(self.sampling, self.spread)

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.stderr:.2g}"


def final(tables: Tables, settings: Settings, learning_rate: float, batch_size: int) -> Final:
    """λ̂ at the end of a run, NaN if any of its trainings has none."""
    rows = _of_run(tables, learning_rate, batch_size)
    rows = [row for row in rows if row["step"] == settings.checkpoints[-1]]
    values, errors = column(rows, "llc"), column(rows, "stderr")
    spread = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Final(float(values.mean()), float(np.sqrt(np.square(errors).sum())) / len(rows), float(spread))


def _of_run(tables: Tables, learning_rate: float, batch_size: int) -> list[Row]:
    """All checkpoints of all trainings with these settings."""
    rows = tables["runs"].values()
    return [r for r in rows if (r["learning_rate"], r["batch_size"]) == (learning_rate, batch_size)]


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Whether estimates are stable, and runs are told apart. Which way round they come out is reported, not claimed."""
    rows = list(tables["runs"].values())
    by_rate = {f"{lr:g}": final(tables, settings, lr, settings.batch_size) for lr in settings.learning_rates}
    by_size = {f"{size}": final(tables, settings, settings.learning_rate, size) for size in settings.batch_sizes}
    values = np.array([f.value for f in (*by_rate.values(), *by_size.values())])
    error = max(f.sampling for f in (*by_rate.values(), *by_size.values()))
    share = error / (values.max() - values.min()) if len(values) > 1 else math.nan
    disagreeing = [row for row in rows if row["r_hat"] is None or row["r_hat"] > MAX_R_HAT]
    negative = [row for row in rows if row["llc"] is None or row["llc"] < 0]
    warned = sum(map(is_warned, rows))
    return [
        Claim(
            "the largest Monte Carlo error of a final λ̂ is at most a tenth of the range of final λ̂",
            f"{share:.1%}",
            bool(share <= 0.1),
        ),
        Claim(
            f"every estimate with R̂ above {MAX_R_HAT:g} is warned about",
            f"{sum(map(is_warned, disagreeing))} of {len(disagreeing)}; {warned} of all {len(rows)} estimates have a "
            "warning",
            all(map(is_warned, disagreeing)),
        ),
        Claim(
            "every negative λ̂ is warned about",
            f"{sum(map(is_warned, negative))} of {len(negative)}",
            all(map(is_warned, negative)),
        ),
        _order_claim("learning rates", by_rate),
        _order_claim("batch sizes", by_size),
    ]


def _order_claim(what: str, finals: Mapping[str, Final]) -> Claim:
    listed = ", ".join(f"{name}: {value}" for name, value in finals.items())
    return Claim(
        f"final λ̂ of neighbouring {what} differ by more than 2 standard errors",
        f"{listed}; λ̂ {direction(list(finals.values()))}",
        len(finals) > 1 and all(abs(z) > 2 for z in _steps(list(finals.values()))),
        "published",
    )


def direction(finals: Sequence[Final]) -> str:
    """In words, what becomes of λ̂ from the first to the last, as far as it is resolved."""
    up = [z > 0 for z in _steps(finals) if abs(z) > 2]
    overall = _steps([finals[0], finals[-1]])
    if up and all(up) and all(z > 2 for z in overall):
        return "rises"
    if up and not any(up) and all(z < -2 for z in overall):
        return "falls"
    return "has no clear order"


def _steps(finals: Sequence[Final]) -> list[float]:
    """Differences between neighbours in standard errors; NaN, for which every comparison is false, without λ̂."""
    pairs = itertools.pairwise(finals)
    return [(b.value - a.value) / (math.hypot(a.stderr, b.stderr) or math.nan) for a, b in pairs]


# ---- figure ------------------------------------------------------------------------------------------------

_COLORS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.PINK, figures.YELLOW, figures.SKY)
"""The run that both sides have is black."""
_MARKERS = "osD^vP"


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """λ̂ along training by learning rate and by batch size, the loss along training, and λ̂ over the loss.

    Other trainings of a run are the points to the right of its last step.
    """
    figure, axes = new_figure(2, 2, width=4.7, height=3.7)
    styles = _styles(settings)
    by_rate = {(lr, settings.batch_size): f"{lr:g}" for lr in settings.learning_rates}
    by_size = {(settings.learning_rate, size): f"{size}" for size in settings.batch_sizes}
    last = settings.checkpoints[-1]
    for panel, pairs in ((axes[0], by_rate), (axes[1], by_size)):
        for pair, name in pairs.items():
            panel.plot([], [], lw=1.2, ms=5, label=name, **styles[pair])
            rows = _of_run(tables, *pair)
            first = [row for row in rows if row["training"] == 0]
            others = [row for row in rows if row["training"] > 0]
            beside = [last * (1 + 0.03 * row["training"]) for row in others]
            figures.estimates(panel, [row["step"] for row in first], first, connect=True, **styles[pair])
            figures.estimates(panel, beside, others, **styles[pair])
    for pair, style in styles.items():
        rows = _of_run(tables, *pair)
        first = [row for row in rows if row["training"] == 0]
        axes[2].plot([row["step"] for row in first], column(first, "init_loss"), lw=1.2, ms=4, **style)
        figures.estimates(axes[3], column(rows, "init_loss"), rows, **style)
    words = [direction([final(tables, settings, *pair) for pair in pairs]) for pairs in (by_rate, by_size)]
    figure.suptitle(
        f"A ResNet on digits: after {last} SGD steps λ̂ {words[0]} with the learning rate\n"
        f"and {words[1]} with the batch size"
    )
    right = (1.03 + 0.03 * settings.trainings) * last
    for panel, title in (
        (axes[0], f"learning rates, batches of {settings.batch_size}"),
        (axes[1], f"batch sizes, learning rate {settings.learning_rate:g}"),
    ):
        panel.set(xlabel="SGD steps (right of the last: other trainings)", xlim=(0, right))
        panel.set(ylabel="λ̂ (± 2 standard errors)")
        label_hollow(panel)
        above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 6, "frameon": False}
        panel.legend(title=title, fontsize="small", handletextpad=0.4, columnspacing=1.2, **above)
    axes[2].set(xlabel="SGD steps", ylabel="training loss L(w*), nats", yscale="log", xlim=(0, right))
    axes[3].set(xlabel="training loss L(w*), nats", ylabel="λ̂, of all trainings", xscale="log")
    axes[3].invert_xaxis()
    for panel in (axes[0], axes[1], axes[3]):
        panel.axhline(0, color="0.8", lw=0.8, zorder=0)
    return {"resnet": figure}


def _styles(settings: Settings) -> dict[tuple[float, int], dict[str, Any]]:
    """Color and marker of each run."""
    pairs = dict.fromkeys((run.learning_rate, run.batch_size) for run in plan(settings))
    pairs.pop(common := (settings.learning_rate, settings.batch_size))
    styles = {
        pair: {"color": _COLORS[k % len(_COLORS)], "marker": _MARKERS[(k + 1) % len(_MARKERS)]}
        for k, pair in enumerate(pairs)
    }
    return {common: {"color": "black", "marker": _MARKERS[0]}, **styles}
