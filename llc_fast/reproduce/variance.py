"""What makes λ̂ vary from seed to seed at equal cost, what reduces that, and what is bias.

Three problems at (numerical) minima: a realizable deep linear network, a noisy regression, a classifier. Chains of SGLD
with ε as `estimate_llc` chooses it; every chain is a run of its own: one seed, its own noise and minibatches. Three
questions, all at equal numbers of gradients:

- *Control variate.* λ̂ from minibatch losses L_B(w_t) as they are, and from L_B(w_t) − L_B(w*) + L(w*), which
  `estimate_llc` records: how much smaller is the variance over chains? And how far is the standard error that one chain
  states from the standard deviation that chains have?
- *Epochs.* Minibatches with replacement, and without replacement within an epoch, which is the default. Is the mean of
  minibatch losses that of the loss over the whole data set? Not quite without replacement: a chain remembers which
  samples have pulled it in this epoch, and meets the others.
- *Antithetic chains.* Chains in pairs with opposite noise, with the control variate, with minibatches of their own or
  shared: does one's error cancel the other's? No: the loss is nearly even in w − w*, so the second chain repeats the
  first one's error.

The loop is plain PyTorch, so that noise can be turned round; the formula is SGLD's, and minibatches without replacement
and the control variate are the package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

import llc_fast
from llc_fast.kernels.native import minibatch_indices
from llc_fast.kernels.step import NoiseKey
from llc_fast.objective.control_variate import ControlVariate
from llc_fast.plots import errorbar_by_warning, new_figure
from llc_fast.problems import deep_linear
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, column
from llc_fast.reproduce.study import Study
from llc_fast.stats.errors import standard_error
from llc_fast.support.runtime import threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N, BATCH, LOCALIZATION = 5000, 50, 1.0
EPOCH = N // BATCH
SPANS = {"½ epoch": EPOCH // 2, "2½ epochs": 5 * EPOCH // 2, "10 epochs": 10 * EPOCH}
"""Draws that λ̂ is taken from."""
FULL_EVERY = 20
"""Draws from one evaluation of the loss over the whole data set to the next."""
REALIZABLE, REGRESSION, CLASSIFIER = "deep linear, realizable", "noisy regression", "classifier"
MINIBATCHES = ("with replacement", "epochs")
GAIN, SIGMAS, EPOCH_BIAS = 2.0, 3.0, 0.15
"""Least gain in variance where minibatches are noisy; standard errors that a mean may be off; bias of λ̂ by epochs."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """How much is sampled.

    Attributes:
        chains: an even number; each is one seed.
        draws: of each chain.
        burnin: steps before the first of them.
    """

    chains: int = 96
    draws: int = 10 * EPOCH
    burnin: int = 4 * EPOCH


SCALES = {"small": Settings(), "paper": Settings(chains=960)}


@dataclass(frozen=True)
class Problem:
    """A model at its minimum."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss_fn: Callable[..., Tensor]

    @property
    def nbeta(self) -> float:
        return llc_fast.default_nbeta(len(self.x))

    def sample_losses(self) -> Array:
        with torch.no_grad():
            each = vmap(lambda out, y: self.loss_fn(out[None], y[None]))(self.model(self.x), self.y)
        values: Array = each.double().cpu().numpy()
        return values


def problems(seed: int = 0) -> dict[str, Problem]:
    """Data and models; the last two are trained to numerical convergence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mse, cross_entropy = nn.functional.mse_loss, nn.functional.cross_entropy
        weights = [torch.randn(b, a) / math.sqrt(a) for a, b in ((8, 10), (10, 10), (10, 6))]
        weights[1] = weights[1] @ torch.diag((torch.arange(10) < 4).float())
        linear, x = deep_linear.network(weights), torch.empty(N, 8).uniform_(-1, 1)
        with torch.no_grad():
            realizable = Problem(linear, x, linear(x), mse)
        x = torch.randn(N, 6)
        y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3] + torch.randn(N, 1)
        regression = Problem(_trained(nn.Sequential(*_layers(6, 12, 1)), x, y, mse), x, y, mse)
        labels = torch.randint(4, (N,))
        x = 1.2 * torch.randn(4, 6)[labels] + torch.randn(N, 6)
        classifier = _trained(nn.Sequential(*_layers(6, 8, 4)), x, labels, cross_entropy)
    return {
        REALIZABLE: realizable,
        REGRESSION: regression,
        CLASSIFIER: Problem(classifier, x, labels, cross_entropy),
    }


def _layers(inputs: int, hidden: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)]


def _trained(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> nn.Module:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=600, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return model.requires_grad_(True)


# ---- chains ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What chains have seen.

    Attributes:
        raw: minibatch losses ``[chain, draw]``.
        control: L_B(w*) − L(w*) of the same minibatches.
        whole: the loss over the whole data set at every 20th draw.
    """

    raw: Array
    control: Array
    whole: Array

    @property
    def paired(self) -> Array:
        """What `estimate_llc` records."""
        return self.raw - self.control


def sample(
    problem: Problem, lr: float, settings: Settings, *, replacement: bool = False, pairs: str | None = None
) -> Run:
    """SGLD, all chains at once.

    Args:
        problem: what.
        lr: ε.
        settings: how many chains, and how long.
        replacement: minibatches with replacement.
        pairs: chains in two halves with opposite noise, with ``"own"`` or ``"shared"`` minibatches; None: independent.
    """
    chains, draws = settings.chains, settings.draws
    noise, order = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    nbeta, reference_losses = problem.nbeta, problem.sample_losses()
    control_variate = ControlVariate.of_samples(reference_losses, float(reference_losses.mean()), BATCH)
    reference = {k: p.detach() for k, p in problem.model.named_parameters()}
    params = {k: p.repeat(chains, *[1] * p.ndim) for k, p in reference.items()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss_fn(functional_call(problem.model, w, (x,)), y)

    indices = torch.empty(chains // 2 if pairs == "shared" else chains, BATCH, dtype=torch.int64)
    raw, control = np.empty((2, chains, draws))
    whole = np.empty((chains, draws // FULL_EVERY))
    for step in range(settings.burnin + draws):
        if replacement:
            torch.randint(len(problem.x), indices.shape, out=indices, generator=order)
        else:
            minibatch_indices(len(problem.x), NoiseKey(3, step=step), indices)
        chosen = indices.repeat(2, 1) if pairs == "shared" else indices
        leaves = {k: p.requires_grad_() for k, p in params.items()}
        losses = vmap(loss)(leaves, problem.x[chosen], problem.y[chosen])
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        draw = step - settings.burnin
        if draw >= 0:
            raw[:, draw] = losses.detach().numpy()
            control[:, draw] = control_variate(chosen.numpy())
        full, rest = divmod(draw, FULL_EVERY)
        if rest == FULL_EVERY // 2 and 0 <= full < whole.shape[1]:
            with torch.no_grad():
                whole[:, full] = vmap(loss, in_dims=(0, None, None))(leaves, problem.x, problem.y).numpy()
        params = {}
        for (name, w), grad in zip(leaves.items(), grads, strict=True):
            drift = nbeta * grad + LOCALIZATION * (w.detach() - reference[name])
            if pairs is None:
                xi = torch.randn(w.shape, generator=noise)
            else:
                half = torch.randn(chains // 2, *w.shape[1:], generator=noise)
                xi = torch.cat([half, -half])
            params[name] = w.detach() - lr / 2 * drift + math.sqrt(lr) * xi
    return Run(raw, control, whole)


# ---- measured ----------------------------------------------------------------------------------------------


def measure(study: Study, settings: Settings) -> None:
    """Independent chains with both kinds of minibatches, then pairs of chains. On the CPU: the networks are tiny."""
    made = problems(study.seed)
    with threads(1):
        study.rows(
            "step size", made, lambda problem: {"lr": _step_size(study, problem)}, lambda r: f"ε = {r['lr']:.3g}"
        )
        lr = {name: row["lr"] for name, row in study.tables["step size"].items()}

        def independent(case: tuple[str, str]) -> Row:
            name, minibatches = case
            run = sample(made[name], lr[name], settings, replacement=minibatches == "with replacement")
            spans = {span: _spread(made[name], run, draws) for span, draws in SPANS.items() if draws <= settings.draws}
            return {"problem": name, "minibatches": minibatches, "spans": spans, **_bias(made[name], run)}

        cases = {f"{name}, {kind}": (name, kind) for name in made for kind in MINIBATCHES}
        study.rows("independent", cases, independent, _independent_in_words)

        def antithetic(case: tuple[str, str]) -> Row:
            name, pairs = case
            run = sample(made[name], lr[name], settings, pairs=pairs)
            first, second = np.split(run.paired.mean(axis=1), 2)
            correlation = float(np.corrcoef(first, second)[0, 1])
            error = (1 - correlation**2) / math.sqrt(max(1, settings.chains // 2 - 1))
            return {"problem": name, "minibatches": pairs, "correlation": correlation, "stderr": error}

        pairs = {f"{name}, {kind} minibatches": (name, kind) for name in made for kind in ("own", "shared")}
        study.rows("antithetic", pairs, antithetic, lambda r: f"correlation {r['correlation']:.2f} ± {r['stderr']:.2f}")


def _step_size(study: Study, problem: Problem) -> float:
    """That of the pilot chains."""
    data, length = (problem.x, problem.y), {"num_draws": 1, "num_burnin": 0}
    options: dict[str, Any] = {
        "batch_size": 500,
        "localization": LOCALIZATION,
        "progress": False,
        "seed": study.seed,
        **length,
    }
    return float(llc_fast.estimate_llc(problem.model, data, problem.loss_fn, **options).settings["lr"])


def _spread(problem: Problem, run: Run, draws: int) -> Row:
    """λ̂ of single chains from so many draws: mean, standard deviation, and the error that a chain states."""
    init_loss, row = float(problem.sample_losses().mean()), Row()
    for kind, trace in (("raw", run.raw), ("paired", run.paired)):
        llc = problem.nbeta * (trace[:, :draws] - init_loss)
        stated = math.sqrt(np.mean([standard_error(one[None]).value ** 2 for one in llc]))
        row[kind] = {"mean": llc.mean(), "sd": llc.mean(axis=1).std(ddof=1), "stated": stated}
    return row | {"gain": (row["raw"]["sd"] / row["paired"]["sd"]) ** 2}


def _bias(problem: Problem, run: Run) -> Row:
    """λ̂ by minibatch losses less λ̂ by the loss over the whole data set, over all draws."""
    init_loss = float(problem.sample_losses().mean())
    own, true = (problem.nbeta * (trace.mean(axis=1) - init_loss) for trace in (run.paired, run.whole))
    return {
        "llc_by_minibatches": own.mean(),
        "llc_by_all_data": true.mean(),
        "difference": (own - true).mean(),
        "difference_stderr": (own - true).std(ddof=1) / math.sqrt(len(own)),
    }


def _independent_in_words(row: Row) -> str:
    gains = ", ".join(f"{values['gain']:.3g} ({span})" for span, values in row["spans"].items())
    return f"variance over variance with control variate: {gains}"


# ---- what must come out ------------------------------------------------------------------------------------


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """The control variate changes nothing where there is nothing to gain, and gains where there is; no bias with
    replacement, a bounded one by epochs; opposite noise is of no use."""
    rows = tables["independent"]
    shortest = next(iter(SPANS))
    exact = max(
        abs(values["gain"] - 1) for kind in MINIBATCHES for values in rows[f"{REALIZABLE}, {kind}"]["spans"].values()
    )
    gains = {kind: rows[f"{REGRESSION}, {kind}"]["spans"][shortest]["gain"] for kind in MINIBATCHES}
    sigmas = {
        name: row["difference"] / row["difference_stderr"]
        for name, row in rows.items()
        if row["minibatches"] == "with replacement"
    }
    bias = {
        name: row["difference"] / row["llc_by_all_data"] for name, row in rows.items() if row["minibatches"] == "epochs"
    }
    furthest, largest = max(sigmas.values(), key=abs), max(bias.values(), key=abs)
    correlations = {key: (row["correlation"], row["stderr"]) for key, row in tables["antithetic"].items()}
    useful = [key for key, (value, error) in correlations.items() if value < -SIGMAS * error]
    return [
        Claim(
            "where the loss of each sample at w* is 0, the control variate changes nothing",
            f"{exact:.1g}",
            exact < 1e-6,
        ),
        Claim(
            f"{REGRESSION}: over {shortest} it reduces the variance of a chain's λ̂ at least by a factor of {GAIN:g}",
            ", ".join(f"{gain:.3g} ({kind})" for kind, gain in gains.items()),
            min(gains.values()) >= GAIN,
        ),
        Claim(
            f"with replacement, minibatch losses have the mean of all data's loss within {SIGMAS:g} standard errors",
            f"{furthest:+.1f} at most",
            abs(furthest) <= SIGMAS,
        ),
        Claim(
            f"by epochs they differ by at most {EPOCH_BIAS:.0%} of λ̂",
            ", ".join(f"{name.removesuffix(', epochs')} {share:+.1%}" for name, share in bias.items()),
            abs(largest) <= EPOCH_BIAS,
        ),
        Claim(
            "opposite noise does not make the errors of two chains cancel",
            ", ".join(f"{key} {value:+.2f} ± {error:.2f}" for key, (value, error) in correlations.items()),
            not useful,
        ),
    ]


# ---- figure ------------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Standard deviations of λ̂ against the number of draws, the bias of minibatch losses, and pairs of chains."""
    figure, axes = new_figure(3, 2, width=4.4, height=3.7)
    for panel, name in zip(axes, (REALIZABLE, REGRESSION, CLASSIFIER), strict=False):
        _plot_spread(panel, name, [tables["independent"][f"{name}, {kind}"] for kind in MINIBATCHES])
    axes[0].set_ylabel("standard deviation of a chain's λ̂")
    axes[0].legend(fontsize=8)
    _plot_gain(axes[3], tables)
    _plot_bias(axes[4], tables)
    _plot_pairs(axes[5], tables)
    gain = tables["independent"][f"{REGRESSION}, epochs"]["spans"][next(iter(SPANS))]["gain"]
    figure.suptitle(
        f"Losses paired with those at w*: {gain:.3g} times less variance of λ̂ over half an epoch of noisy regression; "
        "opposite noise only repeats errors"
    )
    return {"variance": figure}


_LOOKS = {"with replacement": (figures.ORANGE, "s"), "epochs": (figures.BLUE, "o")}


def _plot_spread(axes: Axes, name: str, rows: list[Row]) -> None:
    from matplotlib.ticker import LogFormatter

    for row in rows:
        color, marker = _LOOKS[row["minibatches"]]
        draws = [SPANS[span] for span in row["spans"]]
        for kind, line in (("raw", ":"), ("paired", "-")):
            deviations = [values[kind]["sd"] for values in row["spans"].values()]
            label = f"{row['minibatches']}, {'with control variate' if kind == 'paired' else 'raw'}"
            axes.plot(draws, deviations, line, color=color, marker=marker, ms=5, label=label)
        stated = [values["paired"]["stated"] for values in row["spans"].values()]
        axes.plot(draws, stated, "--", color=color, lw=0.8, label=f"{row['minibatches']}, stated by a chain")
    axes.set(xscale="log", yscale="log", xlabel="draws", title=name)
    spans = [SPANS[span] for span in rows[0]["spans"]]
    axes.set_xticks(spans, map(str, spans))
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _plot_gain(axes: Axes, tables: Tables) -> None:
    rows = list(tables["independent"].values())
    for place, row in enumerate(rows):
        color, marker = _LOOKS[row["minibatches"]]
        for k, values in enumerate(row["spans"].values()):
            axes.plot(place + 0.2 * (k - 1), values["gain"], marker, color=color, ms=5)
    axes.axhline(1, color="k", lw=1)
    _name(axes, [f"{row['problem']}\n{row['minibatches']}" for row in rows])
    axes.set(yscale="log", ylabel="variance raw / with control variate", title="gain over ½, 2½, 10 epochs")


def _plot_bias(axes: Axes, tables: Tables) -> None:
    rows = list(tables["independent"].values())
    for place, row in enumerate(rows):
        color, marker = _LOOKS[row["minibatches"]]
        error = figures.two_sigma([row], "difference_stderr")
        errorbar_by_warning(axes, [place], [row["difference"]], error, [False], color=color, marker=marker)
    axes.axhline(0, color="k", lw=1)
    _name(axes, [f"{row['problem']}\n{row['minibatches']}" for row in rows])
    axes.set(ylabel="difference of λ̂ (± 2 standard errors)", title="λ̂ by minibatches − λ̂ by all data")


def _plot_pairs(axes: Axes, tables: Tables) -> None:
    rows = list(tables["antithetic"].values())
    places, quiet = range(len(rows)), [False] * len(rows)
    errorbar_by_warning(axes, places, column(rows, "correlation"), figures.two_sigma(rows), quiet, color=figures.GREEN)
    axes.axhline(0, color="k", lw=1)
    _name(axes, [f"{row['problem']}\n{row['minibatches']} minibatches" for row in rows])
    axes.set(
        ylim=(-1.05, 1.05), ylabel="correlation of λ̂ (± 2 standard errors)", title="pairs of chains, opposite noise"
    )


def _name(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
