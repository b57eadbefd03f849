"""A ReLU network does not change when a hidden layer is rescaled. Do estimates of its λ?

Multiply the incoming weights and biases of a hidden ReLU layer by a and divide its outgoing weights by a: the function
is the same, the learning coefficient is the same, but gradients and noise are not. Furman & Lau 2024 (arXiv 2402.03698)
rescale a network of 30 inputs and widths 40 and 30, six of whose hidden units are copies of another, by a from 10⁻⁴ to
10⁴, and find mean λ̂ from 1102 to 1119 where SGLD has the diagonal preconditioner that undoes it: a² for the first
layer, a⁻² for the second's weights. Here:

- "undone": SGLD with that preconditioner and γ = 0, as in the paper's code;
- "undone, γ = 1": the same, localized;
- "plain": SGLD without it, γ = 0 and the same ε;
- "default": `estimate_llc` with nothing but its defaults (ε and momentum chosen by pilot chains, γ by the weights);
- "rmsprop", "adam": the metrics that adapt to gradients, at their defaults;
- "curvature": the fixed metric 1/H_ii, H the Hessian at w*, which knows nothing of the symmetry; γ = 0;
- "in metric": ``preconditioner="curvature"``, with all else as it comes: the metric is estimated, γ localizes in it and
  is chosen in it, and so is ε. Nobody says anything of the symmetry.

All see the same noise and minibatches at every a, so that what differs is the rescaling alone, and not chance.

What invariance needs: with w' = D·w and A' = D² the drift of the loss becomes that of the original, and the chain is
the same chain. The localization does not: γ(w' − w'*) pulls as γ·D² would at w, so that the posterior is another. In a
quadratic well

    λ(a) = ½ tr nβH·(nβH + γD²)⁻¹,

the dashed line: large a hold the first layer in place, small ones the second. It is what an exact sampler finds, as
"undone, γ = 1" does while its steps are stable, and where the defaults end too, once they move so little beside the
slow directions that there is nothing left to warn of. Invariance takes γ = 0, or a localization in the metric,
(γ/2)·(w' − w'*)ᵀA'⁻¹(w' − w'*): "in metric". That posterior is the same at every a, and an exact sampler, HMC on all
data, says what λ it has: with the A and γ that the estimates at a used, at the smallest, the middle and the largest a.
Its quadratic well says ½ tr nβH(nβH + γA⁻¹)⁻¹, with H from some of the data.

The same for a transformer block, whose queries and values are multiplied by a and whose keys and outputs are divided by
it, and for a network with LayerNorm (:mod:`llc_fast.problems.symmetries`), beside the defaults.

With γ = 0 there is no equilibrium to wait for (copies of a unit leave directions that no loss holds): λ̂ is that of a
stretch of diffusion, here as in the paper, and warnings say so. RMSprop's metric goes with the first power of D where
the second is needed; besides, gradients vanish at w* of a network that fits its data, so that its eps is most of it.
Adam's likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import mse_loss

from llc_fast import default_nbeta
from llc_fast.estimate import prepared_alone
from llc_fast.plots import new_figure
from llc_fast.problems.relu_network import (
    curvature_preconditioner,
    gauss_newton,
    make_data,
    make_network,
    rescale,
    scale_factors,
    undoing_preconditioner,
)
from llc_fast.problems.symmetries import Symmetry, layer_norm_network, transformer_block
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, estimate_row, in_words, plus_minus
from llc_fast.reproduce.study import Study
from llc_fast.samplers import HMCSampler, PreconditionedSGLDSampler
from llc_fast.settings import Settings as AskedFor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        factors: a; 1 among them.
        widths: of the network.
        copies: hidden units that are copies of unit 0.
        num_samples, batch_size: of the data, and of minibatches.
        lr: ε where it is not chosen.
        num_chains, num_burnin, num_draws: of every estimate.
        metric_samples, hessian_samples: that the curvature metric and the Hessian of the dashed line are taken from.
        exact_draws: of each of two chains of HMC, after a quarter as many of burn-in.
        symmetry_factors: a of the transformer block and the network with LayerNorm; 1 among them. The defaults see the
            smallest, 1 and the largest.
        symmetry_samples: of their data.
    """

    factors: tuple[float, ...]
    widths: tuple[int, ...] = (30, 40, 30)
    copies: int = 6
    num_samples: int = 10_000
    batch_size: int = 500
    lr: float = 1e-5
    num_chains: int = 4
    num_burnin: int = 1000
    num_draws: int = 2000
    metric_samples: int = 256
    hessian_samples: int = 1024
    exact_draws: int = 400
    symmetry_factors: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2, 1e4)
    symmetry_samples: int = 4000


SCALES = {
    "small": Settings(tuple(10.0 ** (k / 2) for k in range(-8, 9)), batch_size=100),
    "paper": Settings(tuple(10.0 ** (k / 4) for k in range(-16, 17)), num_chains=5, num_burnin=2000, num_draws=8000),
}
SAMPLERS = {
    "undone": "SGLD, scaling undone by a preconditioner, γ = 0",
    "curvature": "SGLD, metric 1/curvature, γ = 0",
    "in metric": 'preconditioner="curvature", γ and ε chosen',
    "undone, γ = 1": "SGLD, scaling undone, γ = 1",
    "plain": "SGLD, same ε, no preconditioner, γ = 0",
    "default": "estimate_llc's defaults",
    "rmsprop": "RMSprop-SGLD, ε and γ by default",
    "adam": "Adam-SGLD, ε and γ by default",
}
SYMMETRIES: Mapping[str, Callable[[int], Symmetry]] = {"block": transformer_block, "LayerNorm": layer_norm_network}
"""Other networks with symmetries, by name."""
TOLERANCE, IN_METRIC, VISIBLE, AGREEMENT = 0.02, 0.01, 0.20, 3.5
"""How flat λ̂ must be with the right preconditioner and in the metric of the curvature, and how far from flat without,
relative to a = 1; and within how many standard errors it must be of the exact sampler."""


def measure(study: Study, settings: Settings) -> None:
    """λ̂ of every sampler at every a, and λ(a) in the quadratic well with γ = 1."""
    network = make_network(settings.widths, study.seed, copies=settings.copies)
    data = make_data(network, settings.num_samples, study.seed)

    def options(name: str, a: float) -> dict[str, Any]:
        fixed: dict[str, Any] = {"lr": settings.lr, "localization": 0.0}
        undoing = {"sampler": PreconditionedSGLDSampler(preconditioner=undoing_preconditioner(network, 0, a))}
        if name == "undone":
            return fixed | undoing
        if name == "undone, γ = 1":
            return fixed | undoing | {"localization": 1.0}
        if name == "curvature":
            metric = curvature_preconditioner(rescale(network, 0, a), data[0][: settings.metric_samples])
            return fixed | {"sampler": PreconditionedSGLDSampler(preconditioner=metric), "lr": None}
        if name == "in metric":
            return dict(TOLD_NOTHING)
        if name == "plain":
            return fixed | {"sampler": "sgld"}
        return {} if name == "default" else {"sampler": f"{name}-sgld"}

    def estimate(case: tuple[str, float]) -> Row:
        name, a = case
        result = study.estimate(
            f"{name} {a:.3g}",
            rescale(network, 0, a),
            data,
            mse_loss,
            num_chains=settings.num_chains,
            num_burnin=settings.num_burnin,
            num_draws=settings.num_draws,
            batch_size=settings.batch_size,
            **options(name, a),
        )
        return estimate_row(result) | {"name": name, "factor": a}

    def localized(a: float) -> Row:
        hessian = study.once("hessian", lambda: gauss_newton(network, data[0][: settings.hessian_samples])).cpu()
        scales = scale_factors(network, 0, a)
        root = torch.cat([(scales[k] * torch.ones_like(p)).flatten() for k, p in network.named_parameters()])
        # tr K(K + 1)⁻¹ = d − tr (K + 1)⁻¹ with K = D⁻¹·nβH·D⁻¹ in the parameters of the rescaled network.
        curvature = default_nbeta(settings.num_samples) * hessian / root[:, None] / root
        curvature.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
        return {"llc": 0.5 * (len(root) - float(inverse.trace())), "factor": a}

    cases = {f"{name}, a = {a:.3g}": (name, a) for name in SAMPLERS for a in settings.factors}
    study.rows("estimates", cases, estimate, in_words)
    study.rows(
        "localized posterior", {f"a = {a:.3g}": a for a in settings.factors}, localized, lambda r: f"λ = {r['llc']:.5g}"
    )

    def exact(a: float) -> Row:
        model = rescale(network, 0, a)
        asked = AskedFor(batch_size=settings.batch_size, num_draws=1, num_burnin=1, **TOLD_NOTHING)
        with prepared_alone(asked, model, data, mse_loss) as prepared:
            metric, gamma = dict(vars(prepared.settings.template)["preconditioner"]), prepared.settings.localization
        assert gamma is not None
        result = study.estimate(
            f"exact {a:.3g}",
            model,
            data,
            mse_loss,
            sampler=HMCSampler(preconditioner=metric, localization_metric="sampler"),
            localization=gamma,
            num_chains=2,
            num_burnin=settings.exact_draws // 4,
            num_draws=settings.exact_draws,
        )
        hessian = study.once("hessian", lambda: gauss_newton(network, data[0][: settings.hessian_samples])).cpu()
        scales = scale_factors(network, 0, a)
        root = torch.cat(
            [(metric[k].double().cpu().sqrt() / scales[k]).flatten() for k, _ in network.named_parameters()]
        )
        curvature = default_nbeta(settings.num_samples) / gamma * hessian * root[:, None] * root
        curvature.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
        return estimate_row(result) | {"factor": a, "quadratic": 0.5 * (len(root) - float(inverse.trace()))}

    def of_symmetry(case: tuple[str, str, float]) -> Row:
        network_name, name, a = case
        symmetry = SYMMETRIES[network_name](study.seed)
        result = study.estimate(
            f"{network_name} {name} {a:.3g}",
            symmetry.rescaled(a),
            symmetry.data(settings.symmetry_samples, study.seed),
            mse_loss,
            num_chains=settings.num_chains,
            num_burnin=settings.num_burnin,
            num_draws=settings.num_draws,
            batch_size=settings.batch_size,
            **(TOLD_NOTHING if name == "in metric" else {}),
        )
        return estimate_row(result) | {"network": network_name, "name": name, "factor": a}

    places = (min(settings.factors), 1.0, max(settings.factors))
    study.rows("exact in metric", {f"a = {a:.3g}": a for a in places}, exact, in_words)
    others = {
        f"{network_name}, {name}, a = {a:.3g}": (network_name, name, a)
        for network_name in SYMMETRIES
        for name, factors in (
            ("in metric", settings.symmetry_factors),
            ("default", (min(settings.symmetry_factors), 1.0, max(settings.symmetry_factors))),
        )
        for a in factors
    }
    study.rows("symmetries", others, of_symmetry, in_words)
    for name, found in _deviations(study.tables).items():
        study.say(f"{SAMPLERS[name]}: {_furthest(found)}")
    for key, found in _symmetry_deviations(study.tables).items():
        study.say(f"{key[0]}, {SAMPLERS[key[1]]}: {_furthest(found)}")


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Flat with the right preconditioner, far from flat without."""
    deviations = _deviations(tables)
    decades = f"for a from {min(settings.factors):g} to {max(settings.factors):g}"
    flat = deviations["undone"]
    found = [
        Claim(
            f"with the preconditioner that undoes the scaling (γ = 0) λ̂ stays within {TOLERANCE:.0%} {decades}",
            _furthest(flat),
            all(d is not None and abs(d) <= TOLERANCE for d in flat.values()),
        )
    ]
    for name in ("plain", "default"):
        bent = deviations[name]
        text = f"{SAMPLERS[name]}: λ̂ is off by at least {VISIBLE:.0%} at some a"
        found.append(Claim(text, _furthest(bent), any(d is None or abs(d) >= VISIBLE for d in bent.values())))
    flat = deviations["in metric"]
    found.append(
        Claim(
            f"in the metric of the curvature, with nothing told, λ̂ stays within {IN_METRIC:.0%} {decades}",
            _furthest(flat),
            all(d is not None and abs(d) <= IN_METRIC for d in flat.values()),
        )
    )
    found.append(_exactness(tables))
    for (network, name), flat in _symmetry_deviations(tables).items():
        if name == "in metric":
            text = f"so it does in a {_NETWORKS[network]}, within {IN_METRIC:.0%}, for a from "
            text += f"{min(settings.symmetry_factors):g} to {max(settings.symmetry_factors):g}"
            found.append(
                Claim(text, _furthest(flat), all(d is not None and abs(d) <= IN_METRIC for d in flat.values()))
            )
    return found


_NETWORKS = {
    "block": "transformer block (queries and keys, values and outputs)",
    "LayerNorm": "network with LayerNorm",
}
"""In words."""


def _exactness(tables: Tables) -> Claim:
    """λ̂ in the metric against HMC."""
    ours = {row["factor"]: row for row in _rows(tables, "in metric")[0]}
    words, holds = [], True
    for row in tables["exact in metric"].values():
        mine = ours[row["factor"]]
        known = row["llc"] is not None and mine["llc"] is not None
        error = math.hypot(mine["stderr"], row["stderr"]) if known else math.nan
        holds &= known and abs(mine["llc"] - row["llc"]) <= AGREEMENT * error
        words.append(
            f"{plus_minus(mine['llc'], mine['stderr'])} and {plus_minus(row['llc'], row['stderr'])} at a = "
            f"{row['factor']:g}"
        )
    return Claim(
        f"that λ̂ is the posterior's by HMC on all data, within {AGREEMENT:g} standard errors", "; ".join(words), holds
    )


def _symmetry_deviations(tables: Tables) -> dict[tuple[str, str], dict[float, float | None]]:
    """λ̂(a)/λ̂(1) − 1 by network and sampler, and a; None where chains diverged."""
    found: dict[tuple[str, str], dict[float, float | None]] = {}
    rows = list(tables["symmetries"].values())
    for key in dict.fromkeys((row["network"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["name"]) == key]
        unit = next(row["llc"] for row in mine if row["factor"] == 1)
        found[key] = {r["factor"]: None if None in (unit, r["llc"]) else r["llc"] / unit - 1 for r in mine}
    return found


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """λ̂(a)/λ̂(1) of every sampler, and of the other networks."""
    figure, (axes, others) = new_figure(2, width=8.0, height=6.6)
    high_up = top = 1.25
    axes.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="0.85", zorder=0, label=f"± {TOLERANCE:.0%}")
    theory = list(tables["localized posterior"].values())
    at_one = next(row["llc"] for row in theory if row["factor"] == 1)
    axes.plot(
        [row["factor"] for row in theory],
        [row["llc"] / at_one for row in theory],
        color="k",
        ls="--",
        lw=1,
        zorder=1,
        label="posterior with γ = 1, by the Hessian at w*",
    )
    deviations = _deviations(tables)
    for name, label in SAMPLERS.items():
        rows, unit = _rows(tables, name)
        color, marker, size = _LOOKS[name]
        axes.plot([], [], color=color, marker=marker, ms=size, label=f"{label}: {_furthest(deviations[name])}")
        if unit is not None:
            look: dict[str, Any] = {"color": color, "marker": marker, "ms": size, "connect": True}
            figures.estimates(axes, [row["factor"] for row in rows], rows, unit=unit, **look)
        if diverged := [row["factor"] for row in rows if row["llc"] is None]:
            high_up -= 0.035
            axes.plot(diverged, [high_up] * len(diverged), ls="", marker="x", ms=6, mew=1.6, color=color)
    axes.text(min(settings.factors), high_up - 0.03, "× all chains diverged", color="0.35", va="top")
    axes.set(
        xscale="log",
        ylim=(0, top),
        xlabel="rescaling a: first layer × a, second layer's weights / a",
        ylabel="λ̂ / λ̂ at a = 1  (± 2 standard errors)",
        title="One function, rescaled: λ̂ stays the same in a metric that follows,\nwith localization in it, or none",
    )
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=1, fontsize=8.5,
        title="sampler: largest deviation (hollow: warned)",
    )  # fmt: skip
    _plot_symmetries(others, tables, settings)
    return {"rescaling": figure}


def _plot_symmetries(axes: Axes, tables: Tables, settings: Settings) -> None:
    """λ̂(a)/λ̂(1) of the transformer block and the network with LayerNorm."""
    axes.axhspan(1 - IN_METRIC, 1 + IN_METRIC, color="0.85", zorder=0, label=f"± {IN_METRIC:.0%}")
    looks = {
        "in metric": (figures.BLUE, "in the metric of the curvature"),
        "default": (figures.ORANGE, "defaults"),
    }
    for (network, name), found in _symmetry_deviations(tables).items():
        color, words = looks[name]
        rows = [r for r in tables["symmetries"].values() if (r["network"], r["name"]) == (network, name)]
        unit = next(row["llc"] for row in rows if row["factor"] == 1)
        marker = "o" if network == "block" else "^"
        axes.plot([], [], color=color, marker=marker, label=f"{_NETWORKS[network]}, {words}: {_furthest(found)}")
        if unit is not None and unit > 0:
            figures.estimates(
                axes, [row["factor"] for row in rows], rows, unit=unit, color=color, marker=marker, ms=5, connect=True
            )
    axes.set(
        xscale="log",
        ylim=(0, 1.9),
        xlabel="rescaling a",
        ylabel="λ̂ / λ̂ at a = 1  (± 2 standard errors)",
        title="Other symmetries: queries × a, keys / a, values × a, outputs / a;\nlayers before and after LayerNorm",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=1, fontsize=8.5)


TOLD_NOTHING: Mapping[str, Any] = {"sampler": "preconditioned-sgld", "preconditioner": "curvature"}
_DARK_RED = "#8c1c13"
_LOOKS = {
    "in metric": (_DARK_RED, "*", 7),
    "undone": (figures.BLUE, "o", 9),
    "curvature": (figures.SKY, "s", 4),
    "undone, γ = 1": (figures.GREEN, "D", 5),
    "plain": ("#000000", "v", 5),
    "default": (figures.ORANGE, "o", 5),
    "rmsprop": (figures.PINK, "^", 5),
    "adam": (figures.YELLOW, "P", 5),
}
"""Color, marker and its size."""


def _rows(tables: Tables, name: str) -> tuple[list[Row], float | None]:
    """The rows of a sampler, and its λ̂ at a = 1."""
    rows = [row for row in tables["estimates"].values() if row["name"] == name]
    return rows, next(row["llc"] for row in rows if row["factor"] == 1)


def _deviations(tables: Tables) -> dict[str, dict[float, float | None]]:
    """λ̂(a)/λ̂(1) − 1 by sampler and a; None where chains diverged."""
    found: dict[str, dict[float, float | None]] = {}
    for name in SAMPLERS:
        rows, unit = _rows(tables, name)
        found[name] = {r["factor"]: None if None in (unit, r["llc"]) else r["llc"] / unit - 1 for r in rows}
    return found


def _furthest(deviations: Mapping[float, float | None]) -> str:
    """The largest deviation in words."""
    known = {a: d for a, d in deviations.items() if d is not None}
    diverged = len(deviations) - len(known)
    a, d = max(known.items(), key=lambda item: abs(item[1]), default=(1.0, 0.0))
    at = np.format_float_positional(a, precision=2, fractional=False, trim="-")
    words = f"{100 * d:+.2g} % at a = {at}".replace("-", "−")
    return words + (f", diverged at {diverged} of {len(deviations)}" if diverged else "")
