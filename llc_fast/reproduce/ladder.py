"""The ladder of a well-known guide to learning coefficients: four ways to λ, from the definition to practice.

λ is defined by volumes and estimated by sampling, and on the way from one to the other each rung gives something up.
The rungs, for four small models whose λ is known in closed form (:mod:`llc_fast.problems.products`, true parameter 0,
prior uniform on the box |w_i| ≤ 1 for the first three):

1. *Volumes.* λ is the exponent in V(ε) = P(K(w) < ε) ~ c·ε^λ·(−log ε)^(m−1), with K the population loss above its
   minimum. Draw parameters from the prior and look at the smallest K among them. If V is a power below some ε₀, then
   λ̂ = 1/mean log(ε₀/K) is the maximum likelihood estimate (Hill 1975), with standard error λ̂/√count. With m = 2 the
   likelihood has the logarithm's size as a second parameter; without it the exponent comes out too small.
   It works for a handful of parameters and no more: V is gone.
2. *Idealized.* Sample exp(−nβ·K) instead and take λ̂ = nβ·E[K] (Watanabe 2013). That is −d log Z/d log nβ with
   Z ~ (nβ)^(−λ)·(log nβ)^(m−1), so it goes like λ − (m − 1)/log nβ: with m = 2 it is below λ at every nβ that anyone
   will ever use. Hamiltonian Monte Carlo, at several nβ.
3. *Empirical.* Nobody has K: there are n noisy samples, y = noise, and the loss over all of them. WBIC: nβ = n / log n,
   and λ̂ = nβ·(E[L_n(w)] − L_n(true w)). The noise shifts λ̂, to a different place for each data set, by amounts that
   fall only like 1/√log n.
4. *Local.* Nobody has the true parameter, nor the whole posterior: w* is where training ended, chains stay near it by a
   Gaussian of precision γ, see minibatches, and make steps of finite size. λ̂ = nβ·(E[L_n(w)] − L_n(w*)) (Lau et al.
   2023, arXiv 2308.12108): :func:`llc_fast.estimate_llc` with all its defaults. Training ends beside the origin, where
   the model may be less singular: this λ̂ may be above λ.

The second has a way out. Sampled at several nβ, the way in which nβ·E[K] tends to λ tells λ and m:
:meth:`llc_fast.ScanResult.fit` averages over the forms that −d log Z/d log nβ can take. It is told neither λ nor m, nor
which exponents the model has. Here the prior is a Gaussian of precision 1, so that it is flat over what chains explore
at the nβ that matter, and no proposal leaves a box. The same fit is made to the exact values by quadrature, as if they
had errors of 0.2 %.

The last three have exact answers too: what a sampler without any error would find at this nβ, on these data, by
quadrature. So there are two things to look at: whether the sampler is right (the estimate is where quadrature says),
and whether λ is what is being sampled (quadrature is where λ is).

Estimates must be within three standard errors of their exact answer, and what is fitted over nβ within three of its own
of λ; and m must be among those values that together have 95 % of the probability. The local estimate has a known error
on top: the bias that is subtracted is right in quadratic wells, and too large elsewhere. Of what is subtracted in a
well of degree D only the share 2/D was there (docs/calibration.md), so λ̂ may be too low by (1 − 2/D) of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import llc_fast
from llc_fast.problems.products import Box, Gaussian, ProductRegression, correlation
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, estimate_row, in_words, is_warned, plus_minus
from llc_fast.reproduce.study import Study
from llc_fast.samplers import HMCSampler
from llc_fast.stats.temperature import TemperatureFit, fit_temperature

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODELS = {
    "regular, 4 parameters": {"inputs": 4, "outputs": 1, "power": 0},
    "w₁²w₂²": {"inputs": 1, "outputs": 1, "power": 1},
    "w₁²w₂⁴": {"inputs": 1, "outputs": 1, "power": 2},
    "reduced rank, 3 → 1 → 2": {"inputs": 3, "outputs": 2, "power": 1},
}
"""Arguments of :class:`ProductRegression`."""
BOX, LOCALIZATION = Box(1.0), 1.0
SIGMAS = 3.0
EXACT_ERROR = 2e-3
"""Relative error with which exact values are fitted."""
FIT_JITTER, FIT_ACCEPTANCE = 0.9, 0.9
"""Steps of trajectories are between a tenth and twice of what adapts to this acceptance: the arms of {K = 0} need short
ones, and the middle, where most of the posterior is, long ones."""
CREDIBLE = 0.95
"""Probability of the set of m that the true one must be in."""
MAX_FIT_ERROR = 0.2
"""Of λ fitted over nβ, relative: with a larger error it would be right without saying anything."""
LEAST, MOST, BINS = -24, 1, 100
"""Powers of ten between which V(ε) is kept for the figure, and at how many places."""
LEAST_COUNT = 10
"""Draws below ε for V(ε) to be plotted."""


@dataclass(frozen=True)
class Settings:
    """How much is sampled.

    Attributes:
        points: parameters drawn from the prior.
        share: of them, those with the smallest K, that λ is fitted to, for m = 1 and 2. The more, the smaller the error
            and the larger the bias of what V has besides its leading term; where m = 2 that is the logarithm,
            which is fitted too.
        nbetas: of the idealized rung.
        num_samples: n.
        chains, burnin, draws: of Hamiltonian Monte Carlo.
        data_sets: other data sets whose exact answers show what the noise does.
        curve: values of nβ at which the exact answer is plotted.
        fit_nbetas: nβ that λ and m are fitted over.
        fit_chains, fit_burnin, fit_draws: of Hamiltonian Monte Carlo at each of them; burn-in is that of the first.
    """

    points: int = 2 * 10**7
    share: tuple[float, float] = (5e-4, 1e-2)
    nbetas: tuple[float, ...] = (1e2, 1e3, 1e4)
    num_samples: int = 1000
    chains: int = 16
    burnin: int = 500
    draws: int = 2000
    data_sets: int = 100
    curve: int = 60
    fit_nbetas: tuple[float, ...] = tuple(float(f"{t:.4g}") for t in np.logspace(1, 6, 11))
    fit_chains: int = 32
    fit_burnin: int = 600
    fit_draws: int = 1200


SCALES = {
    "small": Settings(),
    "paper": Settings(
        points=10**10,
        share=(2e-5, 1e-3),
        nbetas=(1e2, 1e3, 1e4, 1e5),
        num_samples=20_000,
        chains=128,
        burnin=2000,
        draws=10_000,
        data_sets=400,
        fit_chains=128,
        fit_burnin=2000,
        fit_draws=10_000,
    ),
}


def measure(study: Study, settings: Settings) -> None:
    """Rung by rung, each for all models."""
    models = {name: ProductRegression(**options) for name, options in MODELS.items()}
    study.rows("volume", models, lambda model: _volume_row(study, model, settings), _about_volume)
    study.rows("quadrature", models, lambda model: _quadrature_row(model, settings))
    ideal = {f"{name}, nβ = {nbeta:g}": (name, nbeta) for name in models for nbeta in settings.nbetas}
    study.rows("idealized", ideal, lambda case: _ideal_row(study, case[0], case[1], settings), _about)
    names = {name: name for name in models}
    study.rows("temperature", names, lambda name: _temperature_row(study, name, settings), _about_temperature)
    study.rows("empirical", names, lambda name: _empirical_row(study, name, settings), _about)
    study.rows("local", names, lambda name: _local_row(study, name, settings), _about)


# ---- 1: volumes --------------------------------------------------------------------------------------------


def _volume_row(study: Study, model: ProductRegression, settings: Settings) -> Row:
    generator = torch.Generator(study.device).manual_seed(study.seed)
    multiplicity = model.learning_coefficient.multiplicity
    wanted = max(3, round(settings.share[multiplicity - 1] * settings.points))
    chunk = min(settings.points, 2_000_000)
    counts = torch.zeros(BINS, dtype=torch.float64, device=study.device)
    smallest, cut = torch.empty(0, dtype=torch.float64, device=study.device), math.inf
    for _ in study.steps(settings.points // chunk, "volume"):
        excess = model.uniform_excess(chunk, BOX.half_width, generator)
        counts += excess.log10().clamp(LEAST, MOST).histc(BINS, LEAST, MOST)
        smallest = torch.cat([smallest, excess[excess < cut]])
        if len(smallest) > 2 * wanted:  # a bound on the wanted quantile: hardly more need to be kept
            smallest = smallest.topk(wanted, largest=False).values
            cut = float(smallest.max())
    smallest = smallest.topk(min(wanted, len(smallest)), largest=False).values.sort().values.cpu()
    threshold = float(smallest[-1])
    depths = np.log(threshold / smallest[:-1].numpy())
    exponent, error, log_size = fit_exponent(depths, multiplicity)
    plain, plain_error, _ = fit_exponent(depths, 1)
    return {
        "lambda": model.learning_coefficient.value,
        "multiplicity": multiplicity,
        "llc": exponent,
        "stderr": error,
        "without_log": plain,
        "without_log_stderr": plain_error,
        "log_size": log_size,
        "threshold": threshold,
        "fitted": len(depths),
        "points": settings.points // chunk * chunk,
        "below": counts.cumsum(0).long(),
        "warnings": [],
    }


def fit_exponent(depths: NDArray[np.float64], multiplicity: int) -> tuple[float, float, float]:
    """Maximum likelihood for t = log(ε₀/K) ≥ 0 with P(t' > t) = e^(−λt)·(1 + g·t)^(m−1).

    Args:
        depths: the t of all K below ε₀.
        multiplicity: m, 1 or 2.

    Returns:
        λ̂, its standard error by the information in the data, and ĝ, which is 0 if m = 1.
    """
    mean = float(depths.mean())
    if multiplicity == 1:
        return 1 / mean, 1 / (mean * math.sqrt(len(depths))), 0.0
    from scipy.optimize import minimize

    def cost(place: NDArray[np.float64]) -> float:
        rate, size = place
        density = rate + (rate * depths - 1) * size
        return math.inf if size < 0 or density.min() <= 0 else float(rate * mean - np.log(density).mean())

    found = minimize(cost, (1 / mean, 0.1 / mean), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-13})
    rate, size = found.x
    density = rate + (rate * depths - 1) * size
    scores = np.stack([(1 + size * depths) / density - depths, (rate * depths - 1) / density])
    return float(rate), math.sqrt(np.linalg.inv(scores @ scores.T)[0, 0]), float(size)


def _about_volume(row: Row) -> str:
    return f"exponent {row['llc']:.4g} ± {row['stderr']:.1g} from the smallest {row['fitted']:,} of {row['points']:,}"


# ---- 2: the population loss --------------------------------------------------------------------------------


def _hamiltonian(model: ProductRegression, nbeta: float, settings: Settings) -> dict[str, Any]:
    """Settings of chains that sample the whole box.

    The step size is that of where the posterior is narrowest, the arms of {K = 0} at the edge of the box, where the
    curvature is M or N. One that adapts is frozen at what chains have met by then, which may be the wide middle only:
    then the arms reject it, and a chain that gets into one does not come out.
    """
    return {
        "sampler": HMCSampler(bounding_box_size=BOX.half_width),
        "lr": 1 / (nbeta * max(model.inputs, model.outputs)),
        "nbeta": nbeta,
        "localization": 0.0,
        "num_chains": settings.chains,
        "num_burnin": settings.burnin,
        "num_draws": settings.draws,
    }


def _quadrature_row(model: ProductRegression, settings: Settings) -> Row:
    """nβ·E[K] without a sampler."""
    low, high = math.log10(min(settings.nbetas)) - 1, math.log10(max(settings.nbetas)) + 4
    nbetas = np.logspace(low, high, settings.curve)
    return {"nbetas": nbetas, "expected": [model.expected_excess(t, BOX) for t in nbetas]}


def _population_loss(model: ProductRegression, batch: Any) -> Tensor:
    return model.population_loss()


def _half_squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(dim=1)


def _model(name: str) -> ProductRegression:
    return ProductRegression(**MODELS[name])


def _ideal_row(study: Study, name: str, nbeta: float, settings: Settings) -> Row:
    model, no_data = _model(name), (torch.zeros(2, 1), torch.zeros(2, 1))
    options = _hamiltonian(model, nbeta, settings)
    result = study.estimate(f"{name} {nbeta:g}", model, no_data, _population_loss, **options)
    return estimate_row(result) | {"model": name, "exact": model.expected_excess(nbeta, BOX)}


def _about(row: Row) -> str:
    return f"{in_words(row)}; by quadrature {row['exact']:.4g}"


# ---- λ and m from temperature ------------------------------------------------------------------------------


def _temperature_row(study: Study, name: str, settings: Settings) -> Row:
    """The fit over nβ, to sampled values and to exact ones."""
    model, no_data = _model(name), (torch.zeros(2, 1), torch.zeros(2, 1))
    truth = model.learning_coefficient
    scanned = study.scan(
        f"{name} temperature",
        model,
        no_data,
        _population_loss,
        nbeta=settings.fit_nbetas,
        localization=LOCALIZATION,
        sampler=HMCSampler(jitter=FIT_JITTER, target_acceptance=FIT_ACCEPTANCE),
        num_chains=settings.fit_chains,
        num_burnin=settings.fit_burnin,
        num_draws=settings.fit_draws,
    )
    prior = Gaussian.around(model, LOCALIZATION)
    exact = np.array([model.expected_excess(t, prior) for t in settings.fit_nbetas])
    cells = scanned.dataset.isel(localization=0)
    found, by_quadrature = scanned.fit(), fit_temperature(np.array(settings.fit_nbetas), exact, EXACT_ERROR * exact)
    return {
        "lambda": truth.value,
        "multiplicity": truth.multiplicity,
        **_fit_row(found),
        "exact_fit": _fit_row(by_quadrature),
        "nbetas": settings.fit_nbetas,
        "mean": cells["llc_mean"].values,
        "mean_stderr": cells["llc_stderr"].values,
        "exact": exact,
        "codes_by_nbeta": [str(codes) for codes in cells["warning_codes"].values],
        "gradients": float(cells["gradients"].sum()),
        "warnings": [],
    }


def _fit_row(found: TemperatureFit) -> Row:
    best = found.fits[0]
    return {
        "llc": found.value,
        "stderr": found.stderr,
        "sampling_error": found.sampling_error,
        "form_error": found.form_error,
        "fitted_multiplicity": found.multiplicity,
        "probabilities": {str(m): p for m, p in found.probabilities.items()},
        "best_form": best.form,
        "best_from": best.smallest,
    }


def _about_temperature(row: Row) -> str:
    chances = ", ".join(f"m = {m}: {p:.2f}" for m, p in row["probabilities"].items())
    return f"λ = {plus_minus(row['llc'], row['stderr'])}, {chances}; truly {row['lambda']:g} and {row['multiplicity']}"


def credible(probabilities: Mapping[str, float]) -> set[int]:
    """The smallest set of m, the most probable first, that has 95 % of the probability."""
    chosen, total = set[int](), 0.0
    for m, p in sorted(probabilities.items(), key=lambda item: -item[1]):
        if total < CREDIBLE:
            chosen.add(int(m))
            total += p
    return chosen


# ---- 3 and 4: data -----------------------------------------------------------------------------------------


def _data(study: Study, model: ProductRegression, settings: Settings) -> tuple[Tensor, Tensor]:
    return model.noisy_data(settings.num_samples, torch.Generator().manual_seed(study.seed))


def _empirical_row(study: Study, name: str, settings: Settings) -> Row:
    model = _model(name)
    data, nbeta = _data(study, model, settings), llc_fast.default_nbeta(settings.num_samples)
    options = _hamiltonian(model, nbeta, settings)
    result = study.estimate(f"{name} empirical", model, data, _half_squares, **options)
    # What other data would have given: C is all that the answer depends on.
    shape = (settings.data_sets, model.outputs, model.inputs)
    noise = np.random.default_rng(study.seed).standard_normal(shape) / math.sqrt(settings.num_samples)
    return estimate_row(result) | {
        "model": name,
        "exact": model.expected_excess(nbeta, BOX, correlation(data)),
        "noiseless": model.expected_excess(nbeta, BOX),
        "other_data": [model.expected_excess(nbeta, BOX, c, points=80) for c in noise],
    }


def _local_row(study: Study, name: str, settings: Settings) -> Row:
    model = _model(name)
    data, nbeta = _data(study, model, settings), llc_fast.default_nbeta(settings.num_samples)
    model.load_state_dict(study.once(f"{name} trained", lambda: _trained(_model(name), data, study.seed)))
    result = study.estimate(f"{name} local", model, data, _half_squares)
    prior, noise = Gaussian.around(model, LOCALIZATION), correlation(data)
    return estimate_row(result) | {
        "model": name,
        "exact": model.expected_excess(nbeta, prior, noise) - nbeta * _loss_below_truth(model, data),
        "distance": math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters())),
    }


def _trained(model: ProductRegression, data: tuple[Tensor, Tensor], seed: int) -> dict[str, Tensor]:
    """Where training from small random parameters ends: at a minimum of the loss over these data."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (part.double() for part in data)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _half_squares(model(x), y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return model.float().state_dict()


def _loss_below_truth(model: ProductRegression, data: tuple[Tensor, Tensor]) -> float:
    """L_n(w*) − L_n(0), in float64."""
    x, y = (part.double() for part in data)
    with torch.no_grad():
        at_model = torch.func.functional_call(model, {n: p.double() for n, p in model.named_parameters()}, (x,))
        return float((_half_squares(at_model, y) - _half_squares(torch.zeros_like(y), y)).mean())


# ---- what must come out ------------------------------------------------------------------------------------


def _allowed(row: Row) -> float:
    """How far λ̂ may be from its exact answer: three standard errors, and what is subtracted too much as bias.

    NaN without an estimate.
    """
    if row["llc"] is None or row["stderr"] is None:
        return math.nan
    excess = 0.0
    if share := row.get("bias_share"):  # of what there was before it was subtracted
        excess = (1 - 2 / _model(row["model"]).degree) * share / (1 - share) * abs(row["llc"])
    return SIGMAS * float(row["stderr"]) + excess


def _claim(text: str, rows: dict[str, Row], exact: str) -> Claim:
    """Every λ̂ is within its allowance of what is called `exact`."""
    used = {
        key: abs(row["llc"] - row[exact]) / allowed if (allowed := _allowed(row)) > 0 else math.inf
        for key, row in rows.items()
    }
    worst = max(used, key=lambda key: used[key])
    found = f"all {len(used)}" if used[worst] <= 1 else f"not {', '.join(k for k, v in used.items() if v > 1)}"
    return Claim(text, f"{found}; the furthest, {worst}, uses {used[worst]:.0%} of it", used[worst] <= 1)


def _fit_claims(rows: Mapping[str, Row]) -> list[Claim]:
    """λ and m from temperature, by sampled and by exact values."""

    def judged(of: Mapping[str, Row], text: str, is_good: Callable[[str, Row], bool]) -> Claim:
        wrong = [key for key, row in of.items() if not is_good(key, row)]
        found = "; ".join(
            f"{key}: {plus_minus(row['llc'], row['stderr'])}, m = {row['fitted_multiplicity']} "
            f"({row['probabilities'][str(row['fitted_multiplicity'])]:.2f})"
            for key, row in of.items()
        )
        which = f"not {', '.join(wrong)}" if wrong else f"all {len(of)}"
        return Claim(text, f"{which}; {found}", not wrong)

    def is_near(key: str, row: Row) -> bool:
        size = rows[key]["lambda"]
        return bool(abs(row["llc"] - size) <= SIGMAS * row["stderr"] and row["stderr"] <= MAX_FIT_ERROR * size)

    exact = {key: row["exact_fit"] for key, row in rows.items()}
    bound = f"within {SIGMAS:g} of its standard errors of λ, and these are at most {MAX_FIT_ERROR:.0%} of it"
    return [
        judged(rows, f"temperature: λ fitted to sampled nβ·E[K] over nβ is {bound}", is_near),
        judged(
            rows,
            f"temperature: m is among the values that have {CREDIBLE:.0%} of the probability",
            lambda key, row: rows[key]["multiplicity"] in credible(row["probabilities"]),
        ),
        judged(
            exact,
            f"temperature: fitted to values by quadrature, with errors of {EXACT_ERROR:.1%}, λ is {bound}, and m is "
            "the most probable",
            lambda key, row: is_near(key, row) and row["fitted_multiplicity"] == rows[key]["multiplicity"],
        ),
    ]


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Each rung against its own exact answer."""
    error = f"{SIGMAS:g} standard errors"
    return [
        _claim(f"volumes: the fitted exponent is within {error} of λ", tables["volume"], "lambda"),
        _claim(f"idealized: nβ·E[K] is within {error} of quadrature at the same nβ", tables["idealized"], "exact"),
        _claim(f"empirical: λ̂ is within {error} of quadrature on the same data", tables["empirical"], "exact"),
        _claim(
            f"local: λ̂ by minibatches and defaults is within {error}, and the known error of the bias correction, of "
            "quadrature at the same w* on the same data",
            tables["local"],
            "exact",
        ),
        *_fit_claims(tables["temperature"]),
    ]


# ---- figures -----------------------------------------------------------------------------------------------


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """The ladder, a panel for each model; what lies behind its first two rungs; and λ and m from temperature."""
    return {
        "ladder": _plot_ladder(tables, settings),
        "ladder-asymptotics": _plot_asymptotics(tables),
        "ladder-temperature": _plot_temperature(tables["temperature"]),
    }


def _plot_ladder(tables: Tables, settings: Settings) -> Figure:
    from llc_fast.plots import CLASSES, errorbar_by_warning, new_figure

    figure, axes = new_figure(2, 2, width=5.6, height=3.7)
    labels = [
        "volume of {K < ε}",
        *(f"sampling K, nβ = {nbeta:,.0f}" for nbeta in settings.nbetas),
        f"all of {settings.num_samples:,} noisy samples",
        "minibatches near trained w*",
    ]
    colors = [CLASSES[k][0] for k in (0, *(1 for _ in settings.nbetas), 2, 3)]
    for panel, (axis, name) in enumerate(zip(axes, MODELS, strict=True)):
        truth = tables["volume"][name]
        rungs = [
            truth | {"exact": truth["lambda"]},
            *(tables["idealized"][f"{name}, nβ = {nbeta:g}"] for nbeta in settings.nbetas),
            tables["empirical"][name],
            tables["local"][name],
        ]
        axis.axvline(truth["lambda"], color="k", lw=1.2)
        empirical = len(rungs) - 2
        axis.barh(
            empirical,
            np.diff(np.quantile(rungs[empirical]["other_data"], [0.025, 0.975])),
            left=np.quantile(rungs[empirical]["other_data"], 0.025),
            height=0.7,
            color="0.88",
            zorder=0,
        )
        for place, (row, color) in enumerate(zip(rungs, colors, strict=True)):
            axis.plot(row["exact"], place, marker="|", ms=17, mew=2.2, color="k", zorder=2)
            look: dict[str, Any] = {"xerr": figures.two_sigma([row]), "color": color, "ms": 6, "zorder": 3}
            errorbar_by_warning(axis, [row["llc"]], [place], None, [is_warned(row)], **look)
        is_left = panel % 2 == 0
        axis.set_yticks(range(len(labels)), labels if is_left else [""] * len(labels))
        axis.set(ylim=(len(labels) - 0.4, -0.6), xlabel="λ̂" if panel > 1 else "")
        axis.set_title(f"{name}:  λ = {truth['lambda']:g}, m = {truth['multiplicity']}", fontsize=11)
        axis.grid(axis="x", color="0.93")
        axis.set_axisbelow(True)
    _explain(axes[0], figure, any(is_warned(r) for table in tables.values() for r in table.values() if "llc" in r))
    figure.suptitle(
        "Four rungs from the definition of λ to practice: samplers find what they should (thick marks),\n"
        "but at finite nβ, and with noise in the data, that is not yet λ (thin lines)"
    )
    return figure


def _explain(axis: Axes, figure: Figure, some_hollow: bool) -> None:
    """One legend for all panels, below them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color="0.4", marker="o", label="λ̂ ± 2 standard errors"),
        Line2D([], [], color="k", marker="|", ms=13, mew=2.2, ls="", label="exact at this nβ, on these data"),
        Line2D([], [], color="k", lw=1.2, label="λ"),
        Patch(color="0.88", label="exact on 95 % of other data"),
    ]
    if some_hollow:
        handles.append(Line2D([], [], color="0.4", marker="o", mfc="white", ls="", label="hollow: with a warning"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _plot_asymptotics(tables: Tables) -> Figure:
    from llc_fast.plots import CLASSES, new_figure

    figure, (left, right) = new_figure(2, width=5.6, height=4.8)
    edges = np.linspace(LEAST, MOST, BINS + 1)[1:]
    for place, ((name, row), (color, marker)) in enumerate(zip(tables["volume"].items(), CLASSES, strict=False)):
        below = np.array(row["below"])
        seen = below >= LEAST_COUNT
        left.plot(10 ** edges[seen], below[seen] / row["points"], marker, ms=3.5, color=color)
        depth = np.linspace(0, math.log(row["threshold"]) - math.log(10) * edges[seen][0], 50)
        law = np.exp(-row["llc"] * depth) * (1 + row["log_size"] * depth) * row["fitted"] / row["points"]
        label = f"{name}: λ̂ = {row['llc']:.3f} ± {row['stderr']:.3f}"
        if row["multiplicity"] > 1:
            label += f"\n   (without its logarithm {row['without_log']:.3f})"
        left.plot(row["threshold"] * np.exp(-depth), law, color=color, lw=1.5, marker=marker, label=label, markevery=[])
        curve = tables["quadrature"][name]
        right.plot(curve["nbetas"], np.array(curve["expected"]) / row["lambda"], color=color, lw=1.5)
        right.plot(
            [], [], marker, ms=5.5, color=color, label=f"{name}: λ = {row['lambda']:g}, m = {row['multiplicity']}"
        )
        points = [r for r in tables["idealized"].values() if r["model"] == name]
        side_by_side = [r["nbeta"] * 1.12**place for r in points]
        figures.estimates(right, side_by_side, points, unit=row["lambda"], color=color, marker=marker, ms=5.5)
    left.legend(fontsize=7.5, loc="upper left", title="slope, fitted where the line is", title_fontsize=8)
    left.set(xscale="log", yscale="log", xlabel="ε", ylabel="V(ε) = P(K(w) < ε) under the prior")
    left.set_title("the exponent of volumes is λ")
    right.axhline(1, color="k", lw=1)
    right.legend(fontsize=8, loc="lower right")
    right.set(xscale="log", xlabel="nβ", ylabel="nβ·E[K] / λ  (lines: exact, points: sampled)")
    right.set_title("the tempered mean tends to λ, with m = 2 as 1/log nβ")
    figure.suptitle(
        "Volumes give λ where they can be measured; sampling gives it as nβ grows,\nlogarithmically slowly "
        "where the multiplicity is 2"
    )
    return figure


def _plot_temperature(rows: Mapping[str, Row]) -> Figure:
    from llc_fast.plots import errorbar_by_warning, new_figure

    figure, axes = new_figure(4, width=3.6, height=4.2)
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.axhspan(
            row["llc"] - 2 * row["stderr"], row["llc"] + 2 * row["stderr"], color=figures.ORANGE, alpha=0.25, lw=0
        )
        axis.axhline(row["llc"], color=figures.ORANGE, lw=1.5, label="λ by the fit ± 2 standard errors")
        axis.axhline(row["lambda"], color="k", lw=1.2, label="λ")
        axis.plot(row["nbetas"], row["exact"], color=figures.GREY, lw=1.2, label="nβ·E[K], exact")
        bars = 2 * np.array(row["mean_stderr"], dtype=np.float64)
        errorbar_by_warning(axis, row["nbetas"], row["mean"], bars, row["codes_by_nbeta"], ms=4, label="sampled")
        chances = "\n".join(f"P(m = {m}) = {p:.2f}" for m, p in row["probabilities"].items())
        axis.text(0.96, 0.05, chances, transform=axis.transAxes, ha="right", va="bottom", fontsize=9)
        axis.set(xscale="log", xlabel="nβ", ylim=(0, 1.35 * row["lambda"]))
        axis.set_title(f"{name}:  λ = {row['lambda']:g}, m = {row['multiplicity']}", fontsize=10)
    axes[0].set_ylabel("nβ·E[K]")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle("λ and its multiplicity from how the tempered mean moves with nβ")
    return figure
