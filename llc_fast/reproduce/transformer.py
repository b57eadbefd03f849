"""A small transformer over its training on text, and each of its attention heads.

A decoder-only transformer learns to predict the next character of the manual of Python. At checkpoints along its
training λ̂ = nβ·(mean L − L(w*)) is estimated for all of its weights, and at some of them for the weights of each
attention head alone, everything else held at w* (the weight-refined LLC). This is what Hoogland et al. 2024 (arXiv
2402.02364) and Wang et al. 2024 (arXiv 2410.02984) do with larger models, and as they do it, the posterior

    p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²)

is held close to w* by a large γ, at a small nβ. Without that there is nothing to see before training ends: w* is no
minimum yet, chains go on training, and λ̂ is negative or tells how far they got. Near w* a direction of curvature h
adds ½·nβh/(nβh + γ), so λ̂ counts the directions in which the loss is steeper than γ/nβ; and as far as the gradient
g at w* is still there, it takes off nβ²‖g‖²/γ at most. The figures show the latter beside λ̂.

At the last checkpoint, on a part of the data that is small enough, the same posterior is sampled by minibatches and by
gradients over all samples: by SGLD, and by MALA, which is exact at any step size. The three have to agree.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llc_fast.plots import label_hollow, new_figure
from llc_fast.problems.text import load_text
from llc_fast.problems.transformer import Transformer, head_masks, sequence_losses
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, column, estimate_row, in_words, is_warned, plus_minus
from llc_fast.reproduce.study import Study
from llc_fast.support.runtime import threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ERRORS, MAX_DIFFERENCE = 3.0, 0.05
"""Estimates of one posterior may differ by three combined standard errors, and by 5 %."""
MAX_R_HAT, MIN_ESS = 1.05, 100
"""Figures beyond which an estimate has to carry a warning."""


@dataclass(frozen=True)
class Chains:
    """How a posterior is sampled.

    Attributes:
        num_chains, num_draws, num_burnin: as of ``estimate_llc``.
    """

    num_chains: int
    num_draws: int
    num_burnin: int


@dataclass(frozen=True)
class Settings:
    """What is trained, and how it is measured.

    nβ and γ are the same at all checkpoints and for all heads: λ̂ depends on both, and compares only at equal ones.
    They are of the size that the papers above use for language models. γ is the distance: P parameters go √(P/γ) far,
    here 0.3 to 0.4 of ‖w*‖ and a seventeenth of what γ = 1 allows; closer still, the noise of minibatches, which falls
    as 1/√γ while λ̂ falls as 1/γ, hides λ̂. nβ then is the resolution: directions count that are steeper than
    γ/nβ = 10. What λ̂ loses to the gradient at w* grows with nβ² and what curvature adds with nβ: at nβ = 100 the same γ
    gave −23 for the untrained network, at 30 −0.3. (n/log n would be 890.)

    Attributes:
        context: characters that are predicted in each sequence.
        width, heads, layers: of the transformer.
        num_train, num_test: sequences; None: all there are.
        learning_rate, training_batch: of Adam, constant.
        checkpoints: training steps, the last of them the length of training.
        head_checkpoints: those of them at which each head is measured.
        nbeta, localization: nβ and γ.
        batch_size: sequences in a minibatch of a chain.
        whole, single: chains for all weights, and for a head.
        subset: sequences of which all are taken at every step, to compare.
        minibatches, full_gradients, mala: chains there.
    """

    context: int = 32
    width: int = 32
    heads: int = 4
    layers: int = 2
    num_train: int | None = 8000
    num_test: int | None = 1024
    learning_rate: float = 3e-3
    training_batch: int = 32
    checkpoints: tuple[int, ...] = (0, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
    head_checkpoints: tuple[int, ...] = (320, 640, 1280)
    nbeta: float = 30.0
    localization: float = 300.0
    batch_size: int = 32
    whole: Chains = Chains(4, 400, 200)
    single: Chains = Chains(2, 300, 100)
    subset: int = 128
    minibatches: Chains = Chains(4, 400, 200)
    full_gradients: Chains = Chains(2, 400, 150)
    mala: Chains = Chains(2, 600, 400)


_LONG = Chains(8, 2000, 1000)
SCALES = {
    "small": Settings(),
    "paper": Settings(
        context=64,
        width=64,
        heads=8,
        layers=4,
        num_train=None,
        num_test=None,
        learning_rate=1e-3,
        checkpoints=(0, *(round(10 * 10 ** (k / 6)) for k in range(19))),
        head_checkpoints=tuple(round(10 * 10 ** (k / 6)) for k in range(6, 19)),
        whole=_LONG,
        single=replace(_LONG, num_chains=4),
        subset=1024,
        minibatches=_LONG,
        full_gradients=_LONG,
        mala=_LONG,
    ),
}


# ---- measured ----------------------------------------------------------------------------------------------


def measure(study: Study, settings: Settings) -> None:
    """Train, then estimate over training, head by head, and by minibatches and full gradients."""
    text = load_text(settings.context + 1, settings.num_train, settings.num_test)
    train, test = text.train.to(study.device), text.test.to(study.device)
    data = train[:, :-1].contiguous(), train[:, 1:].contiguous()
    model = Transformer(
        len(text.vocabulary),
        settings.context,
        width=settings.width,
        heads=settings.heads,
        layers=settings.layers,
        seed=study.seed,
    ).to(study.device)
    initial = {name: p.clone() for name, p in model.state_dict().items()}
    trained: list[dict[str, Any]] = study.once("training", lambda: _train(study, settings, model, initial, train, test))
    by_step = {kept["step"]: kept for kept in trained}

    def swept(table: str, key: str, steps: Sequence[int], chains: Chains, about: Row, params: Any = None) -> None:
        study.sweep(
            table,
            key,
            model,
            steps,
            lambda: [by_step[step]["state"] for step in steps],
            data,
            sequence_losses,
            lambda step: about | {name: by_step[step][name] for name in ("test_loss", "gradient_norm")},
            in_words,
            params=params,
            nbeta=settings.nbeta,
            localization=settings.localization,
            batch_size=settings.batch_size,
            **asdict(chains),
        )

    about = {"num_parameters": model.num_parameters, "sequences": len(train), "python": platform.python_version()}
    swept("training", "training", settings.checkpoints, settings.whole, about)
    for layer in range(settings.layers):
        for head in range(settings.heads):
            about, masks = {"layer": layer, "head": head}, head_masks(model, layer, head)
            swept("heads", f"layer {layer} head {head}", settings.head_checkpoints, settings.single, about, masks)

    few = data[0][: settings.subset], data[1][: settings.subset]
    same = {"nbeta": settings.nbeta, "localization": settings.localization}
    ways: dict[str, dict[str, Any]] = {
        "SGLD, minibatches": {"batch_size": settings.batch_size, **asdict(settings.minibatches)},
        "SGLD, full gradients": {"batch_size": len(few[0]), **asdict(settings.full_gradients)},
        "MALA, full gradients": {"sampler": "mala", **asdict(settings.mala)},
    }
    model.load_state_dict(trained[-1]["state"])

    def estimate(way: str) -> Row:
        result = study.estimate(way, model, few, sequence_losses, **same, **ways[way])
        return estimate_row(result) | {"acceptance": result.diagnostics.get("acceptance")}

    study.rows("agreement", {way: way for way in ways}, estimate, in_words)


_FOR_GRADIENT = 1024
"""Training sequences that ‖∇L‖ is taken over: more would take longer than training."""


def _train(
    study: Study, settings: Settings, model: Transformer, initial: Mapping[str, Tensor], train: Tensor, test: Tensor
) -> list[dict[str, Any]]:
    """Adam on random minibatches; at each checkpoint its weights, its loss on `test`, and ‖∇L‖ on some of `train`."""
    model.load_state_dict(dict(initial))
    generator = torch.Generator().manual_seed(study.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    kept: list[dict[str, Any]] = []
    with threads(1):  # a step is too small to be shared out
        for step in study.steps(settings.checkpoints[-1] + 1, "training"):
            if step in settings.checkpoints:
                state = {name: p.detach().clone() for name, p in model.state_dict().items()}
                with torch.no_grad():
                    loss = float(_losses(model, test).mean())
                norm = _gradient_norm(model, train[:_FOR_GRADIENT])
                kept.append({"step": step, "state": state, "test_loss": loss, "gradient_norm": norm})
            batch = torch.randint(len(train), (settings.training_batch,), generator=generator).to(study.device)
            optimizer.zero_grad()
            _losses(model, train[batch]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return kept


def _losses(model: Transformer, sequences: Tensor) -> Tensor:
    return sequence_losses(model(sequences[:, :-1]), sequences[:, 1:])


def _gradient_norm(model: Transformer, sequences: Tensor) -> float:
    """‖∇L‖ over all sequences."""
    model.zero_grad()
    for part in torch.split(sequences, 512):
        (_losses(model, part).sum() / len(sequences)).backward()  # type: ignore[no-untyped-call]
    return math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))


# ---- claimed -----------------------------------------------------------------------------------------------


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Error bars everywhere, no silence, and agreement of minibatches with full gradients."""
    curve, heads = list(tables["training"].values()), list(tables["heads"].values())
    agreement = tables["agreement"]
    wanted = {"checkpoint": len(settings.checkpoints)}
    wanted["head"] = settings.layers * settings.heads * len(settings.head_checkpoints)
    found = []
    for (what, count), rows in zip(wanted.items(), (curve, heads), strict=True):
        known = sum(row["llc"] is not None and row["stderr"] is not None for row in rows)
        warned = sum(map(is_warned, rows))
        found.append(
            Claim(
                f"every {what} has an estimate with an error bar",
                f"{known} of {count}, {warned} of them with a warning",
                known == count,
            )
        )
    everything = [*curve, *heads, *agreement.values()]
    silent = [row for row in everything if not is_warned(row) and not _is_sound(row)]
    found.append(
        Claim(
            f"what is not positive, has R̂ above {MAX_R_HAT} or less than {MIN_ESS} effective draws carries a warning",
            f"{len(silent)} of {len(everything)} do not",
            not silent,
        )
    )
    reference = agreement["SGLD, minibatches"]
    found += [_agree(reference, row, way) for way, row in agreement.items() if row is not reference]
    return found


def _is_sound(row: Row) -> bool:
    """Whether an estimate has no reason for a warning that can be seen from its row."""
    statistics = [row[name] for name in ("llc", "stderr", "r_hat", "ess")]
    llc, _, r_hat, ess = statistics
    return None not in statistics and llc > 0 and r_hat <= MAX_R_HAT and ess >= MIN_ESS


def _agree(one: Row, other: Row, way: str) -> Claim:
    text = f"minibatches agree with {way} within {MAX_ERRORS:g} standard errors and {MAX_DIFFERENCE:.0%}"
    if None in (one["llc"], one["stderr"], other["llc"], other["stderr"]):
        return Claim(text, "an estimate is missing", False)
    difference, error = one["llc"] - other["llc"], math.hypot(one["stderr"], other["stderr"])
    share = difference / other["llc"]
    values = [plus_minus(row["llc"], row["stderr"]) for row in (one, other)]
    found = f"{values[0]} and {values[1]}: {share:+.1%}, {difference / error:+.1f} errors"
    return Claim(text, found, abs(difference) <= MAX_ERRORS * error and abs(share) <= MAX_DIFFERENCE)


# ---- figures -----------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Losses and λ̂ over training; λ̂ of heads, and by minibatches and full gradients."""
    figure, (losses, llc) = new_figure(1, 2, width=7.2, height=2.9)
    rows = list(tables["training"].values())
    _plot_losses(losses, rows)
    _plot_curve(llc, rows, settings)
    losses.set_title(_finding(rows))
    for axes in (losses, llc):
        axes.set_xscale("symlog", linthresh=max(1, settings.checkpoints[1] if len(settings.checkpoints) > 1 else 1))
        axes.set_xticks([r["step"] for r in rows], [str(r["step"]) for r in rows])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.03)
    details, (heads, agreement) = new_figure(2, width=5.0, height=4.0)
    _plot_heads(heads, list(tables["heads"].values()), settings)
    _plot_agreement(agreement, tables["agreement"])
    return {"training": figure, "heads": details}


def _finding(rows: Sequence[Row]) -> str:
    """What the curve shows, if it shows it."""
    known = [r for r in rows if r["llc"] is not None and r["stderr"] is not None]
    subject = "a transformer learns to predict text"
    if len(known) > 1:
        first, last = known[0], known[-1]
        if last["llc"] - first["llc"] > 3 * math.hypot(first["stderr"], last["stderr"]):
            return f"While {subject}, λ̂ grows to {last['llc']:.3g} ± {last['stderr']:.1g}"
    return f"λ̂ while {subject}"


def _plot_losses(axes: Axes, rows: Sequence[Row]) -> None:
    steps = [r["step"] for r in rows]
    axes.plot(steps, [r["init_loss"] for r in rows], "o-", color=figures.BLUE, ms=4, label="training sequences")
    axes.plot(steps, [r["test_loss"] for r in rows], "s--", color=figures.ORANGE, ms=4, label="other sequences")
    axes.set(ylabel="loss L\n(nats per character)")
    axes.legend(frameon=False)


def _plot_curve(axes: Axes, rows: Sequence[Row], settings: Settings) -> None:
    steps = [r["step"] for r in rows]
    axes.axhline(0, color="0.8", lw=1)
    axes.plot(steps, column(rows, "llc"), color=figures.BLUE, lw=1, alpha=0.6)
    figures.estimates(axes, steps, rows, ms=6, zorder=3)
    axes.plot([], [], "o", color=figures.BLUE, label="λ̂ ± 2 standard errors")
    label_hollow(axes)
    most = [settings.nbeta**2 * r["gradient_norm"] ** 2 / settings.localization for r in rows]
    axes.plot(steps, most, ":", color=figures.GREY, label="nβ²‖∇L‖²/γ: what λ̂ may lose, as w* is no minimum")
    axes.set(
        xlabel="training step",
        ylabel=f"λ̂ (nβ = {settings.nbeta:g}, γ = {settings.localization:g},\n{rows[0]['num_parameters']:,} parameters)",
    )
    axes.legend(frameon=False, loc="upper left")


def _plot_heads(axes: Axes, rows: Sequence[Row], settings: Settings) -> None:
    """A group of bars for each head, one for each checkpoint."""
    steps = settings.head_checkpoints
    width = 0.8 / len(steps)
    places = {(layer, head): layer * (settings.heads + 0.7) + head for layer, head in _heads(settings)}
    for k, step in enumerate(steps):
        chosen = [r for r in rows if r["step"] == step]
        x = [places[r["layer"], r["head"]] + (k - (len(steps) - 1) / 2) * width for r in chosen]
        shade = 0.25 + 0.75 * (k + 1) / len(steps)
        axes.bar(
            x, [r["llc"] or 0.0 for r in chosen], width, color=figures.BLUE, alpha=shade * 0.85, label=f"step {step}"
        )
        figures.estimates(axes, x, chosen, color="k", ms=3, zorder=3)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_xticks(list(places.values()), [str(head) for _, head in places])
    middle = (settings.heads - 1) / 2
    for layer in range(settings.layers):
        at = layer * (settings.heads + 0.7) + middle
        axes.text(at, -0.12, f"heads of layer {layer}", transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set(title="weight-refined λ̂ of each attention head", ylabel="λ̂ of the head alone")
    label_hollow(axes)
    axes.legend(frameon=False)


def _heads(settings: Settings) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(settings.layers) for head in range(settings.heads)]


def _plot_agreement(axes: Axes, table: Mapping[str, Row]) -> None:
    """The three estimates of one posterior, in a band of 5 % about the exact sampler's."""
    x, rows = list(range(len(table))), list(table.values())
    exact = rows[-1]["llc"]
    if exact is not None:
        low, high = exact * (1 - MAX_DIFFERENCE), exact * (1 + MAX_DIFFERENCE)
        axes.axhspan(low, high, color=figures.GREEN, alpha=0.15, lw=0, label=f"MALA ± {MAX_DIFFERENCE:.0%}")
        axes.legend(frameon=False, loc="upper left")
        for margin in (-2.5, 2.5):  # small differences shall look small
            axes.axhline(exact * (1 + margin * MAX_DIFFERENCE), lw=0)
    figures.estimates(axes, x, rows, ms=6, zorder=3)
    axes.set_xticks(x, [way.replace(", ", ",\n") for way in table])
    axes.set(
        title="one posterior, three ways",
        ylabel="λ̂ ± 2 standard errors",
        xlim=(-0.5, len(rows) - 0.5),
    )
