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

import functools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llc_fast.plots import new_figure
from llc_fast.problems.text import load_text
from llc_fast.problems.transformer import Transformer, head_masks, sequence_losses
from llc_fast.reproduce.frame import Check, Row, Study, Tables, figures_of
from llc_fast.support.runtime import threads

if TYPE_CHECKING:
    import xarray
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

    def swept(table: str, steps: Sequence[int], chains: Chains, name: str, about: Row, params: Any = None) -> None:
        """Rows of a table, one for each of these steps."""

        @functools.cache  # by the first row that is missing
        def found() -> xarray.Dataset:
            states = [by_step[step]["state"] for step in steps]
            return study.sweep(
                name or "training",
                model,
                states,
                data,
                sequence_losses,
                labels=list(steps),
                params=params,
                nbeta=settings.nbeta,
                localization=settings.localization,
                batch_size=settings.batch_size,
                **asdict(chains),
            )

        def row(step: int) -> Row:
            kept = by_step[step]
            return about | {k: kept[k] for k in ("step", "test_loss", "gradient_norm")} | _row(found(), step)

        study.rows(table, {f"{name} step {step}".strip(): step for step in steps}, row, _say)

    about = {"num_parameters": model.num_parameters, "sequences": len(train), "python": platform.python_version()}
    swept("training", settings.checkpoints, settings.whole, "", about)
    for layer in range(settings.layers):
        for head in range(settings.heads):
            masks = head_masks(model, layer, head)
            name = f"layer {layer} head {head}"
            swept("heads", settings.head_checkpoints, settings.single, name, {"layer": layer, "head": head}, masks)

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
        return figures_of(result) | {"acceptance": result.diagnostics.get("acceptance")}

    study.rows("agreement", {way: way for way in ways}, estimate, _say)


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


def _row(found: xarray.Dataset, step: int) -> Row:
    """What is worth keeping of a sweep at one checkpoint."""
    at = found.sel(checkpoint=step)
    names = {"llc": "llc_mean", "stderr": "llc_stderr", "ess": "ess_bulk", "seconds_of_estimate": "seconds"}
    same = ("init_loss", "nbeta", "lr", "r_hat", "bias_share", "distance_over_reference", "gradients")
    return {
        **{name: at[variable].item() for name, variable in (names | {name: name for name in same}).items()},
        "interval": [at["llc_low"].item(), at["llc_high"].item()],
        "llc_per_chain": at["llc_per_chain"].values,
        "warnings": at["warnings"].item().splitlines(),
        "is_warm": at["is_warm"].item(),
    }


def _say(row: Row) -> str:
    warned = f", warned: {'; '.join(row['warnings'])}" if row["warnings"] else ""
    return ("no estimate" if row["llc"] is None else _number(row)) + warned


def _number(row: Row) -> str:
    error = math.nan if row["stderr"] is None else row["stderr"]
    return f"λ̂ = {row['llc']:.3g} ± {error:.1g}"


# ---- claimed -----------------------------------------------------------------------------------------------


def check(tables: Tables, settings: Settings) -> list[Check]:
    """Error bars everywhere, no silence, and agreement of minibatches with full gradients."""
    curve, heads = list(tables["training"].values()), list(tables["heads"].values())
    agreement = tables["agreement"]
    wanted = {"checkpoint": len(settings.checkpoints)}
    wanted["head"] = settings.layers * settings.heads * len(settings.head_checkpoints)
    checks = []
    for (what, count), rows in zip(wanted.items(), (curve, heads), strict=True):
        known = sum(row["llc"] is not None and row["stderr"] is not None for row in rows)
        warned = sum(bool(row["warnings"]) for row in rows)
        checks.append(
            Check(
                f"every {what} has an estimate with an error bar",
                f"{known} of {count}, {warned} of them with a warning",
                known == count,
            )
        )
    everything = [*curve, *heads, *agreement.values()]
    silent = [row for row in everything if not row["warnings"] and not _is_sound(row)]
    checks.append(
        Check(
            f"what is not positive, has R̂ above {MAX_R_HAT} or less than {MIN_ESS} effective draws carries a warning",
            f"{len(silent)} of {len(everything)} do not",
            not silent,
        )
    )
    reference = agreement["SGLD, minibatches"]
    for way, row in agreement.items():
        if row is not reference:
            checks.append(_compared(reference, row, way))
    return checks


def _is_sound(row: Row) -> bool:
    """Whether an estimate has no reason for a warning that can be seen from its row."""
    figures = [row[name] for name in ("llc", "stderr", "r_hat", "ess")]
    llc, _, r_hat, ess = figures
    return None not in figures and llc > 0 and r_hat <= MAX_R_HAT and ess >= MIN_ESS


def _compared(one: Row, other: Row, way: str) -> Check:
    claim = f"minibatches agree with {way} within {MAX_ERRORS:g} standard errors and {MAX_DIFFERENCE:.0%}"
    if None in (one["llc"], one["stderr"], other["llc"], other["stderr"]):
        return Check(claim, "an estimate is missing", False)
    difference, error = one["llc"] - other["llc"], math.hypot(one["stderr"], other["stderr"])
    share = difference / other["llc"]
    apart = f"{share:+.1%}, {difference / error:+.1f} errors"
    found = f"{_number(one)} and {other['llc']:.3g} ± {other['stderr']:.1g}: {apart}"
    return Check(claim, found, abs(difference) <= MAX_ERRORS * error and abs(share) <= MAX_DIFFERENCE)


# ---- drawn -------------------------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.45"  # Okabe & Ito's, told apart by everybody


def draw(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """Losses and λ̂ over training; λ̂ of heads, and by minibatches and full gradients."""
    figure, (losses, llc) = new_figure(1, 2, width=7.2, height=2.9)
    rows = list(tables["training"].values())
    _draw_losses(losses, rows)
    _draw_curve(llc, rows, settings)
    losses.set_title(_finding(rows))
    for axes in (losses, llc):
        axes.set_xscale("symlog", linthresh=max(1, settings.checkpoints[1] if len(settings.checkpoints) > 1 else 1))
        axes.set_xticks([r["step"] for r in rows], [str(r["step"]) for r in rows])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.03)
    details, (heads, agreement) = new_figure(2, width=5.0, height=4.0)
    _draw_heads(heads, list(tables["heads"].values()), settings)
    _draw_agreement(agreement, tables["agreement"])
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


def _points(axes: Axes, x: Sequence[float], rows: Sequence[Row], **style: Any) -> None:
    """λ̂ with error bars of one standard error, hollow where there is a warning."""
    known = [(at, r) for at, r in zip(x, rows, strict=True) if r["llc"] is not None]
    for hollow in (False, True):
        chosen = [(at, r) for at, r in known if bool(r["warnings"]) == hollow]
        axes.errorbar(
            [at for at, _ in chosen],
            [r["llc"] for _, r in chosen],
            [r["stderr"] or 0.0 for _, r in chosen],
            fmt="o",
            capsize=3,
            zorder=3,
            **({"ms": 6} | style | ({"mfc": "white"} if hollow else {})),
        )


def _draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    steps = [r["step"] for r in rows]
    axes.plot(steps, [r["init_loss"] for r in rows], "o-", color=_BLUE, ms=4, label="training sequences")
    axes.plot(steps, [r["test_loss"] for r in rows], "s--", color=_ORANGE, ms=4, label="other sequences")
    axes.set(ylabel="loss L\n(nats per character)")
    axes.legend(frameon=False)


def _draw_curve(axes: Axes, rows: Sequence[Row], settings: Settings) -> None:
    steps = [r["step"] for r in rows]
    axes.axhline(0, color="0.8", lw=1)
    curve = [math.nan if r["llc"] is None else r["llc"] for r in rows]
    axes.plot(steps, curve, color=_BLUE, lw=1, alpha=0.6)
    _points(axes, steps, rows, color=_BLUE, label=None)
    axes.plot([], [], "o", color=_BLUE, label="λ̂ ± standard error")
    axes.plot([], [], "o", color=_BLUE, mfc="white", label="λ̂, with a warning")
    most = [settings.nbeta**2 * r["gradient_norm"] ** 2 / settings.localization for r in rows]
    axes.plot(steps, most, ":", color=_GREY, label="nβ²‖∇L‖²/γ: what λ̂ may lose, as w* is no minimum")
    axes.set(
        xlabel="training step",
        ylabel=f"λ̂ (nβ = {settings.nbeta:g}, γ = {settings.localization:g},\n{rows[0]['num_parameters']:,} parameters)",
    )
    axes.legend(frameon=False, loc="upper left")


def _draw_heads(axes: Axes, rows: Sequence[Row], settings: Settings) -> None:
    """A group of bars for each head, one for each checkpoint."""
    steps = settings.head_checkpoints
    width = 0.8 / len(steps)
    places = {(layer, head): layer * (settings.heads + 0.7) + head for layer, head in _heads(settings)}
    for k, step in enumerate(steps):
        chosen = [r for r in rows if r["step"] == step]
        x = [places[r["layer"], r["head"]] + (k - (len(steps) - 1) / 2) * width for r in chosen]
        shade = 0.25 + 0.75 * (k + 1) / len(steps)
        axes.bar(x, [r["llc"] or 0.0 for r in chosen], width, color=_BLUE, alpha=shade * 0.85, label=f"step {step}")
        _points(axes, x, chosen, color="k", ms=3, elinewidth=1, lw=1)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_xticks(list(places.values()), [str(head) for _, head in places])
    middle = (settings.heads - 1) / 2
    for layer in range(settings.layers):
        at = layer * (settings.heads + 0.7) + middle
        axes.text(at, -0.12, f"heads of layer {layer}", transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set(title="weight-refined λ̂ of each attention head", ylabel="λ̂ of the head alone")
    axes.plot([], [], "o", color="k", mfc="white", ms=3, label="with a warning")
    axes.legend(frameon=False)


def _heads(settings: Settings) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(settings.layers) for head in range(settings.heads)]


def _draw_agreement(axes: Axes, table: Mapping[str, Row]) -> None:
    """The three estimates of one posterior, in a band of 5 % about the exact sampler's."""
    x, rows = list(range(len(table))), list(table.values())
    exact = rows[-1]["llc"]
    if exact is not None:
        low, high = exact * (1 - MAX_DIFFERENCE), exact * (1 + MAX_DIFFERENCE)
        axes.axhspan(low, high, color=_GREEN, alpha=0.15, lw=0, label=f"MALA ± {MAX_DIFFERENCE:.0%}")
        axes.legend(frameon=False, loc="upper left")
        for margin in (-2.5, 2.5):  # small differences shall look small
            axes.axhline(exact * (1 + margin * MAX_DIFFERENCE), lw=0)
    _points(axes, x, rows, color=_BLUE)
    axes.set_xticks(x, [way.replace(", ", ",\n") for way in table])
    axes.set(
        title="one posterior, three ways",
        ylabel="λ̂ ± standard error",
        xlim=(-0.5, len(rows) - 0.5),
    )
