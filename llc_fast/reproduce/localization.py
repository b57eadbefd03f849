"""What γ does to λ̂: the default, from a 64th of it to 16 times it, on eight networks.

λ̂ = nβ·(mean L − L(w*)) is taken under exp(−nβ·L − γ/2·‖w − w*‖²), so γ is a part of what is asked, and so is nβ. Left
open, γ is P/(½‖w*‖)² (:func:`llc_fast.default_localization`): where only γ holds them, weights go half of ‖w*‖ away.
Here it is held against others, at three nβ, with chains that go on from where those at the next larger γ ended:

- a residual network and a perceptron that classify digits, an autoencoder of digits, a transformer on text, all trained
  until the loss hardly falls;
- regression by a tanh network exactly at a minimum, λ known, for which Hamiltonian Monte Carlo gives the exact answers
  at the γ of ``reproduce sensitivity``;
- deep linear networks, whose known λ is a global one: that of chains that are free to go where the loss lets them. They
  are estimated at γ = 1 from w* on, too.

Beside λ̂ and its error each cell has how far chains went (‖w − w*‖/‖w*‖), their loss, and dλ̂/dlog γ by the difference
to the next cell, and the share of what the network knows that its draws have lost: 0 at L(w*), 1 at the loss of the
best constant. What a single run says of the latter (``diagnostics["localization_slope"]``) is compared with pairs of
runs that share all random numbers and differ in γ alone: their chains stay side by side, so that the difference of
their λ̂ has a small part of the error that independent runs would leave in it.

Two other ways to choose γ are tried. *For each tensor*: γ_k = P_k/(½‖w_k‖)², which rescaled layers of a ReLU network do
not change, though they change the one for all. It is emulated by weights in units of 1/√γ_k, which is a metric of the
sampler, too. *Twice as far*: r = 1 in place of r = ½, which is the cell at a quarter of the default.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from llc_fast.plots import CLASSES, label_hollow, new_figure
from llc_fast.problems import deep_linear
from llc_fast.problems.digits import load_digits
from llc_fast.problems.exact_minima import tanh_regression
from llc_fast.problems.resnet import resnet
from llc_fast.problems.text import load_text
from llc_fast.problems.transformer import Transformer, sequence_losses
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import (
    Row,
    Tables,
    column,
    estimate_row,
    in_words,
    number,
    numbers,
    plus_minus,
    relative_error,
)
from llc_fast.reproduce.study import Study
from llc_fast.result import LLCResult
from llc_fast.samplers import SAMPLERS, HMCSampler
from llc_fast.settings import DEFAULT_REACH, default_localization, default_nbeta
from llc_fast.stats.errors import standard_error
from llc_fast.support.runtime import threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLACK, ERRORS = 1.4, 3.0
"""Chains may go further than ½‖w*‖ by this factor: before a normalization longer weights make the loss flatter, so that
more room lies outwards. Numbers agree within so many standard errors."""
LOCAL = ("resnet", "transformer", "tanh regression")
"""Networks whose chains have to stay within the share of ‖w*‖ that the default says."""
PUSH = 0.1
"""Of log γ, to either side, in runs with the same random numbers."""
REFERENCE = 0.05
"""λ̂ may differ from the exact answer by so much, beside the errors of both."""


@dataclass(frozen=True)
class Settings:
    """What is varied, and for how long.

    Attributes:
        networks: of `NETWORKS`.
        deep_linear: seeds of deep linear networks of the class "1k".
        factors: γ over the default, 1 among them.
        absolute: further γ.
        temperatures: nβ over n/log n; the first is that of everything else.
        few: factors at the other temperatures, where absolute γ are left out.
        num_chains, num_draws, num_burnin: of each estimate.
        tensor_factors: γ_k over P_k/(½‖w_k‖)².
        tensor_networks: of `networks`, where that is tried.
        rescaled: what a hidden ReLU layer is multiplied by, and the next one divided.
        exact: γ of the exact sampler, on the tanh regression.
        exact_draws: of it.
        training: steps, as a share of what the networks are trained for.
    """

    networks: tuple[str, ...] = ("resnet", "transformer", "autoencoder", "perceptron", "tanh regression")
    deep_linear: tuple[int, ...] = (820008,)
    factors: tuple[float, ...] = (16.0, 4.0, 1.0, 0.25, 1 / 16, 1 / 64)
    absolute: tuple[float, ...] = (1.0,)
    temperatures: tuple[float, ...] = (1.0,)
    few: tuple[float, ...] = ()
    num_chains: int = 4
    num_draws: int = 250
    num_burnin: int = 250
    tensor_factors: tuple[float, ...] = (4.0, 1.0, 0.25)
    tensor_networks: tuple[str, ...] = ("perceptron", "tanh regression")
    rescaled: tuple[float, ...] = (1.0, 5.0)
    exact: tuple[float, ...] = (1.0, 100.0)
    exact_draws: int = 400
    training: float = 0.5


_FACTORS = (16.0, 4.0, 1.0, 0.25, 1 / 16, 1 / 64)
SCALES = {
    "small": Settings(),
    "paper": Settings(
        deep_linear=(820001, 820006, 820008),
        absolute=(100.0, 10.0, 1.0),
        temperatures=(1.0, 0.25, 4.0),
        few=(4.0, 1.0, 0.25, 1 / 16),
        num_draws=1000,
        num_burnin=1000,
        tensor_factors=_FACTORS,
        tensor_networks=("resnet", "transformer", "autoencoder", "perceptron", "tanh regression"),
        rescaled=(1.0, 2.0, 5.0, 10.0),
        exact=(1.0, 10.0, 100.0, 1000.0),
        exact_draws=2000,
        training=1.0,
    ),
}


# ---- networks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network at the parameters that λ̂ is of.

    Attributes:
        batch_size: of its chains; None: what is the default.
        length: of its chains, over that of others.
        learning_coefficient: λ, where it is known.
        exact_data: for the exact sampler: fewer samples with the same loss but for a constant.
    """

    model: nn.Module
    data: Any
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    num_samples: int
    batch_size: int | None = None
    length: float = 1.0
    learning_coefficient: float | None = None
    exact_data: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def norm(self) -> float:
        """‖w*‖"""
        return math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.model.parameters()))


def _trained(
    study: Study,
    settings: Settings,
    name: str,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    lr: float,
    **chains: Any,
) -> Network:
    """The network after AdamW with a step size that falls to nothing, kept by the study."""

    def train() -> Mapping[str, Tensor]:
        count = max(1, round(settings.training * steps))
        generator = torch.Generator().manual_seed(study.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
        with threads(1):  # a step is too small to be shared out
            for _ in study.steps(count, f"training of {name}"):
                picked = torch.randint(len(data[0]), (64,), generator=generator)
                optimizer.zero_grad()
                loss_fn(model(data[0][picked]), data[1][picked]).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return model.state_dict()

    model.load_state_dict(study.once(f"training of {name}", train))
    return Network(model, data, loss_fn, len(data[0]), **chains)


def _resnet(study: Study, settings: Settings) -> Network:
    model = resnet(2, blocks=1, size=8, generator=torch.Generator().manual_seed(study.seed))
    data = load_digits(seed=study.seed).train
    chains = {"batch_size": 64, "length": 0.25}
    return _trained(study, settings, "resnet", model, data, F.cross_entropy, steps=1500, lr=1e-2, **chains)


def _perceptron(study: Study, settings: Settings) -> Network:
    x, y = load_digits(seed=study.seed).train
    model = _dense((64, 24, 16, 10), nn.ReLU, study.seed)
    return _trained(study, settings, "perceptron", model, (x.flatten(1), y), F.cross_entropy, steps=1500, lr=1e-2)


def _autoencoder(study: Study, settings: Settings) -> Network:
    x = load_digits(seed=study.seed).train[0].flatten(1)
    model = _dense((64, 16, 64), nn.Tanh, study.seed)
    return _trained(study, settings, "autoencoder", model, (x, x), F.mse_loss, steps=4000, lr=1e-2)


def _transformer(study: Study, settings: Settings) -> Network:
    text = load_text(17, 1500, 1)
    data = text.train[:, :-1].contiguous(), text.train[:, 1:].contiguous()
    model = Transformer(len(text.vocabulary), 16, width=16, heads=2, layers=1, seed=study.seed)
    chains = {"batch_size": 64, "length": 0.5}
    return _trained(study, settings, "transformer", model, data, sequence_losses, steps=2000, lr=1e-2, **chains)


def _tanh_regression(study: Study, settings: Settings) -> Network:
    found = tanh_regression(study.seed)
    return Network(
        found.model,
        found.data,
        found.loss_fn,
        len(found.data[0]),
        learning_coefficient=found.learning_coefficient,
        exact_data=found.means,
    )


def _dense(widths: Sequence[int], activation: type[nn.Module], seed: int) -> nn.Sequential:
    generator, layers = torch.Generator().manual_seed(seed), []
    for fan_in, fan_out in itertools.pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.normal_(layer.weight, std=(2 / (fan_in + fan_out)) ** 0.5, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


NETWORKS: dict[str, Callable[[Study, Settings], Network]] = {
    "resnet": _resnet,
    "transformer": _transformer,
    "autoencoder": _autoencoder,
    "perceptron": _perceptron,
    "tanh regression": _tanh_regression,
}


def _networks(study: Study, settings: Settings) -> dict[str, Network]:
    found = {name: NETWORKS[name](study, settings) for name in settings.networks}
    for seed in settings.deep_linear:
        problem = deep_linear.make_problem("1k", seed)
        known = problem.learning_coefficient
        found[f"deep linear {seed}"] = Network(
            problem.model, problem.data, F.mse_loss, len(problem.data), length=3.0, learning_coefficient=known
        )
    return found


class InUnits(nn.Module):
    """A network whose parameters are those of `model` over a unit for each tensor: the same function, other lengths.

    Args:
        model: is left as it is, and evaluated with other parameters.
        units: one for each parameter, by name.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, float]) -> None:
        super().__init__()
        self._model, self._units = (model,), list(units.items())  # in a tuple, so that it is no part of this module
        named = dict(model.named_parameters())
        self.scaled = nn.ParameterList(named[name].detach() / unit for name, unit in self._units)

    def forward(self, *inputs: Tensor) -> Any:
        weights = {name: p * unit for p, (name, unit) in zip(self.scaled, self._units, strict=True)}
        return functional_call(self._model[0], weights, inputs)


def constant_loss(data: Any) -> float:
    """The loss of the best constant: the variance of the targets, or the entropy of their frequencies in nats."""
    targets: Tensor = data[1] if isinstance(data, tuple) else data.batch(torch.arange(len(data)))[1]
    if targets.is_floating_point():
        return float((targets - targets.mean(dim=0)).square().mean())
    frequencies = targets.flatten().bincount().double() / targets.numel()
    return -float(torch.xlogy(frequencies, frequencies).sum())


LEAST = 0.01
"""A tensor's root mean square over that of all below which its γ is that of such a tensor: biases begin at zero."""


def tensor_units(model: nn.Module) -> dict[str, float]:
    """1/√γ_k = r·rms(w_k) for each tensor; of those near zero that of a hundredth of the network's rms."""
    named = {name: p.detach().double() for name, p in model.named_parameters()}
    count = sum(p.numel() for p in named.values())
    whole = math.sqrt(sum(float(p.square().sum()) for p in named.values()) / count)
    return {name: DEFAULT_REACH * max(float(p.square().mean().sqrt()), LEAST * whole) for name, p in named.items()}


def rescaled(model: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function of a ReLU network: its first layer times `factor`, the weights of the second over it."""
    made = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in model))
    made.load_state_dict(model.state_dict())
    first, second = (m for m in itertools.islice((m for m in made if isinstance(m, nn.Linear)), 2))
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)
    return made


# ---- measurement -------------------------------------------------------------------------------------------


def gammas(default: float, factors: Sequence[float], absolute: Sequence[float]) -> list[float]:
    """All γ, falling; absolute ones that lie beside another are left out."""
    found = [default * factor for factor in factors]
    found += [g for g in absolute if all(abs(math.log(g / other)) > 0.2 for other in found)]
    return sorted(found, reverse=True)


def measure(study: Study, settings: Settings) -> None:
    networks = _networks(study, settings)
    natural = {name: default_nbeta(network.num_samples) for name, network in networks.items()}
    default = {name: default_localization(network.num_parameters, network.norm) for name, network in networks.items()}

    def chains(name: str) -> dict[str, Any]:
        length = networks[name].length
        lengths = {key: max(10, round(length * getattr(settings, key))) for key in ("num_draws", "num_burnin")}
        return {"num_chains": settings.num_chains, "batch_size": networks[name].batch_size, **lengths}

    def about(name: str) -> Row:
        network = networks[name]
        return {
            "num_parameters": network.num_parameters,
            "num_samples": network.num_samples,
            "norm": network.norm,
            "default": default[name],
            "constant_loss": constant_loss(network.data),
            "lambda": network.learning_coefficient,
        }

    study.rows("network", {name: name for name in networks}, about)

    def path(case: tuple[str, float]) -> Row:
        """λ̂ at falling γ, each from where the last chains ended."""
        name, temperature = case
        network, before = networks[name], None
        is_first = temperature == settings.temperatures[0]
        grid = (settings.factors, settings.absolute) if is_first else (settings.few, ())
        cells = []
        for gamma in gammas(default[name], *grid):
            before = study.estimate(
                f"{name} nβ×{temperature:g} γ={gamma:g}",
                network.model,
                network.data,
                network.loss_fn,
                nbeta=natural[name] * temperature,
                localization=gamma,
                warm_start=before,
                keep_ends=True,
                **chains(name),
            )
            cells.append(_cell(before))
        return {"name": name, "temperature": temperature, "cells": cells}

    cases = {f"{name} nβ×{t:g}": (name, t) for name in networks for t in settings.temperatures}
    study.rows("path", cases, path, _in_words)

    def pair(name: str) -> Row:
        """dλ̂/dlog γ at the default, as one run says it, and by two runs with the same random numbers."""
        network = networks[name]

        def at(push: float, **options: Any) -> LLCResult:
            gamma = default[name] * math.exp(push)
            return study.estimate(
                f"{name} pushed by {push:g}",
                network.model,
                network.data,
                network.loss_fn,
                nbeta=natural[name],
                localization=gamma,
                **(chains(name) | options),
            )

        middle = at(0.0)
        kept = {name: middle.settings[name] for name in ("lr", "bias_correction", "batch_size")}
        made = _sampler(middle)
        up, down = (at(push, sampler=made, **kept) for push in (PUSH, -PUSH))
        difference = (up.llc_trace - down.llc_trace) / (2 * PUSH)
        found = middle.diagnostics
        return {
            **_cell(middle),
            "difference": float(difference.mean()),
            "difference_stderr": standard_error(difference).value,
            "settled": found["distance_over_prior"],
        }

    study.rows("pair", {name: name for name in networks}, pair, _pair_in_words)

    def globally(name: str) -> Row:
        network = networks[name]
        result = study.estimate(
            f"{name} γ=1 from w*",
            network.model,
            network.data,
            network.loss_fn,
            nbeta=natural[name],
            localization=1.0,
            **chains(name),
        )
        return _cell(result)

    linear = [name for name in networks if name.startswith("deep linear")]
    study.rows("global", {name: name for name in linear}, globally, in_words)

    def by_tensor(name: str) -> Row:
        network, before = networks[name], None
        model = InUnits(network.model, tensor_units(network.model))
        cells = []
        for factor in sorted(settings.tensor_factors, reverse=True):
            before = study.estimate(
                f"{name} by tensor ×{factor:g}",
                model,
                network.data,
                network.loss_fn,
                nbeta=natural[name],
                localization=factor,
                warm_start=before,
                keep_ends=True,
                **chains(name),
            )
            away = _distance(before, model)
            cells.append({**_cell(before), "distance_over_reference": away / network.norm})
        return {"name": name, "temperature": 1.0, "cells": cells}

    study.rows("by tensor", {name: name for name in settings.tensor_networks}, by_tensor, _in_words)

    def scaled(case: tuple[str, float]) -> Row:
        way, factor = case
        network = networks["perceptron"]
        model: nn.Module = rescaled(network.model, factor)  # type: ignore[arg-type]
        if way == "by tensor":
            model = InUnits(model, tensor_units(model))
        result = study.estimate(
            f"perceptron ×{factor:g} {way}",
            model,
            network.data,
            network.loss_fn,
            nbeta=natural["perceptron"],
            localization=1.0 if way == "by tensor" else None,
            **chains("perceptron"),
        )
        return {**_cell(result), "way": way, "factor": factor}

    if "perceptron" in settings.networks:
        ways = ("one for all", "by tensor")
        every = {f"{way}, ×{factor:g}": (way, factor) for way in ways for factor in settings.rescaled}
        study.rows("rescaled", every, scaled, lambda row: plus_minus(row["llc"], row["stderr"]))

    def exact(gamma: float) -> Row:
        network = networks["tanh regression"]
        result = study.estimate(
            f"exact γ={gamma:g}",
            network.model,
            network.exact_data,
            network.loss_fn,
            sampler=HMCSampler(num_leapfrog=10),
            nbeta=natural["tanh regression"],
            localization=gamma,
            num_chains=settings.num_chains,
            num_draws=settings.exact_draws,
            num_burnin=settings.exact_draws // 2,
        )
        return _cell(result)

    if "tanh regression" in settings.networks:
        wanted = sorted({*settings.exact, default["tanh regression"]})
        study.rows(
            "exact",
            {f"γ={gamma:g}": gamma for gamma in wanted},
            exact,
            lambda row: plus_minus(row["llc"], row["stderr"]),
        )


def _cell(result: LLCResult) -> Row:
    """What is kept of an estimate here."""
    found = result.diagnostics
    return {
        **estimate_row(result),
        "slope": found["localization_slope"],
        "slope_stderr": found["localization_slope_stderr"],
        "mean_loss": result.init_loss + result.llc_mean / result.nbeta,
    }


def _sampler(result: LLCResult) -> Any:
    """The sampler of a result, with its momentum."""
    made = SAMPLERS[result.settings["sampler"]]
    decay = result.settings.get("momentum_decay")
    return made() if decay is None else made(momentum_decay=decay)  # type: ignore[call-arg]


def _distance(result: LLCResult, model: InUnits) -> float:
    """‖w − w*‖ where chains ended, in the units of the network itself, in the root mean square."""
    if result.ends is None:
        return math.nan
    units = [unit for _, unit in model._units]
    squares = [
        np.square(end.astype(np.float64) * unit).sum() for end, unit in zip(result.ends.values(), units, strict=True)
    ]
    return math.sqrt(sum(squares) / len(result.loss_trace))


def _in_words(row: Row) -> str:
    return ", ".join(
        f"γ {cell['localization']:.3g}: {plus_minus(cell['llc'], cell['stderr'])}{'*' * bool(cell['warnings'])}"
        for cell in row["cells"]
    )


def _pair_in_words(row: Row) -> str:
    said = "none" if row["slope"] is None else plus_minus(row["slope"], row["slope_stderr"])
    return f"dλ̂/dlog γ said: {said}, found: {plus_minus(row['difference'], row['difference_stderr'])}"


# ---- judgement ---------------------------------------------------------------------------------------------


def elasticity(cells: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """dlog λ̂/dlog γ between neighbouring cells: γ in the middle, the value, and its error; NaN where λ̂ ≤ 0."""
    gamma, llc, error = (column(cells, name) for name in ("localization", "llc", "stderr"))
    with np.errstate(divide="ignore", invalid="ignore"):
        log, relative = np.log(np.where(llc > 0, llc, math.nan)), error / llc
        step = np.diff(np.log(gamma))
    between = np.exp((np.log(gamma[1:]) + np.log(gamma[:-1])) / 2)
    return between, np.diff(log) / step, np.hypot(relative[1:], relative[:-1]) / np.abs(step)


def _nearest(cells: Sequence[Row], gamma: float) -> Row:
    return min(cells, key=lambda cell: abs(math.log(cell["localization"] / gamma)))


def lost(network: Row, cells: Sequence[Row]) -> NDArray[np.float64]:
    """The share of what the network knows that draws have lost: 0 at L(w*), 1 at the loss of the best constant."""
    first = column(cells, "init_loss")
    share: NDArray[np.float64] = (column(cells, "mean_loss") - first) / (network["constant_loss"] - first)
    return share


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """Chains stay near, λ̂ answers to γ as it is said to, and agrees with what is exact."""
    pairs, first = tables["pair"], settings.temperatures[0]
    paths = {row["name"]: row["cells"] for row in tables["path"].values() if row["temperature"] == first}
    bound = DEFAULT_REACH * SLACK
    away = {}
    for name in LOCAL:
        if name in pairs:
            both = (pairs[name], _nearest(paths[name], tables["network"][name]["default"]))
            away[name] = max(number(row["distance_over_reference"]) for row in both)
    found = [
        Claim(
            f"at the default γ chains of {', '.join(away)} stay within {bound:g}·‖w*‖",
            ", ".join(f"{name} {share:.2f}" for name, share in away.items()),
            all(share <= bound for share in away.values()),
        )
    ]
    said = {name: row for name, row in pairs.items() if row["slope"] is not None}
    off = {
        name: abs(row["slope"] - row["difference"]) / math.hypot(row["slope_stderr"], row["difference_stderr"])
        for name, row in said.items()
    }
    listed = ", ".join(
        f"{name} {plus_minus(row['slope'], row['slope_stderr'])} "
        f"({plus_minus(row['difference'], row['difference_stderr'])})"
        for name, row in said.items()
    )
    found.append(
        Claim(
            f"dλ̂/dlog γ as a run says it is that between runs with the same random numbers, within {ERRORS:g} errors",
            f"{listed or 'none'}; the others say nothing",
            bool(off) and max(off.values()) <= ERRORS,
        )
    )
    found += _exact_claims(tables, paths)
    if "rescaled" in tables:
        found.append(_rescaled_claim(tables))
    return found


def _exact_claims(tables: Tables, paths: Mapping[str, Sequence[Row]]) -> list[Claim]:
    networks, found = tables["network"], []
    at_minimum = [name for name in paths if networks[name]["lambda"] is not None]
    falls = []
    for name in at_minimum:
        for before, after in itertools.pairwise(paths[name]):  # γ falls
            error = math.hypot(number(before["stderr"]), number(after["stderr"]))
            if not number(after["llc"]) - number(before["llc"]) > -ERRORS * error:
                falls.append(f"{name} at γ = {after['localization']:.3g}")
    found.append(
        Claim(
            f"where w* is exactly a minimum ({', '.join(at_minimum)}) λ̂ does not fall when γ does",
            ", ".join(falls) or "it never does",
            not falls,
        )
    )
    if linear := tables["global"]:
        errors = {
            name: [relative_error(row, networks[name]["lambda"]) for row in (tables["pair"][name], linear[name])]
            for name in linear
        }
        found.append(
            Claim(
                "deep linear networks, whose λ is a global one, are nearer to it at γ = 1 than at the default",
                ", ".join(f"{name} {one:+.1%} for {local:+.1%}" for name, (local, one) in errors.items()),
                all(abs(one) < abs(local) for local, one in errors.values()),
            )
        )
    if "exact" in tables:
        cells = paths["tanh regression"]
        compared = []
        for row in tables["exact"].values():
            cell = _nearest(cells, row["localization"])
            if abs(math.log(cell["localization"] / row["localization"])) < 1e-3:
                compared.append((row, cell))
        wrong = [
            row["localization"]
            for row, cell in compared
            if not abs(number(cell["llc"]) - row["llc"])
            <= ERRORS * math.hypot(number(cell["stderr"]), row["stderr"]) + REFERENCE * row["llc"]
        ]
        shown = ", ".join(
            f"γ = {row['localization']:.3g}: {plus_minus(cell['llc'], cell['stderr'])} for "
            f"{plus_minus(row['llc'], row['stderr'])}"
            for row, cell in compared
        )
        found.append(
            Claim(
                f"tanh regression: λ̂ is the exact sampler's within {REFERENCE:.0%} and {ERRORS:g} errors at each γ",
                shown,
                bool(compared) and not wrong,
            )
        )
    return found


def _rescaled_claim(tables: Tables) -> Claim:
    """A γ for each tensor sees the same network, and one γ for all another."""
    largest, words = {}, []
    for way in ("one for all", "by tensor"):
        rows = [row for row in tables["rescaled"].values() if row["way"] == way]
        first = rows[0]
        apart = [
            abs(number(row["llc"]) - number(first["llc"])) / math.hypot(number(row["stderr"]), number(first["stderr"]))
            for row in rows[1:]
        ]
        largest[way] = max(apart)
        words.append(f"{way}: " + ", ".join(f"{plus_minus(r['llc'], r['stderr'])} at {r['factor']:g}" for r in rows))
    return Claim(
        f"a rescaled perceptron has the same λ̂ within {ERRORS:g} errors with a γ for each tensor, and not with one γ",
        "; ".join(words),
        largest["by tensor"] <= ERRORS < largest["one for all"],
    )


# ---- figures -----------------------------------------------------------------------------------------------

_COLUMNS = 4


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """λ̂ and how far chains went against γ, one network beside the other; and how steep λ̂ is, for all of them."""
    names = list(tables["network"])
    columns = min(_COLUMNS, len(names))
    bands = -(-len(names) // columns)
    figure, axes = new_figure(columns, 2 * bands, width=3.9, height=2.6)
    for axis in axes:
        axis.set_visible(False)
    for k, name in enumerate(names):
        top = axes[2 * (k // columns) * columns + k % columns]
        below = axes[(2 * (k // columns) + 1) * columns + k % columns]
        _plot_network(top, below, name, tables, settings)
    label_hollow(axes[0])
    axes[0].legend(fontsize=8)
    figure.suptitle(
        "λ̂ against the localization γ; dashed: the default, P/(½‖w*‖)²; dotted: a quarter of it; short lines: "
        "dλ̂/dlog γ as the run says it;\n"
        "below, circles: how far draws are from w*; triangles: the share of what the network knows that they have lost",
        fontsize=12,
    )
    choice, (left, right) = new_figure(2, width=5.6)
    _plot_elasticity(left, tables, settings)
    _plot_rescaled(right, tables)
    return {"localization": figure, "localization-choice": choice}


def _plot_network(top: Axes, below: Axes, name: str, tables: Tables, settings: Settings) -> None:
    from matplotlib.ticker import NullFormatter

    network = tables["network"][name]
    lines = [(row["temperature"], row["cells"]) for row in tables["path"].values() if row["name"] == name]
    colors = dict(zip(settings.temperatures, (figures.BLUE, figures.ORANGE, figures.GREEN), strict=False))
    for temperature, cells in lines:
        gamma, color = column(cells, "localization"), colors[temperature]
        label = f"nβ = {temperature:g}·n/log n"
        figures.estimates(top, gamma, cells, connect=True, color=color, label=label)
        below.plot(gamma, column(cells, "distance_over_reference"), "o-", ms=4, lw=1.2, color=color)
        if temperature != settings.temperatures[0]:
            continue
        below.plot(gamma, lost(network, cells), "v--", ms=4, lw=1.2, color=figures.SKY)
        for cell in cells:
            if cell["slope"] is not None:
                ends = np.array([-0.5, 0.5])
                top.plot(cell["localization"] * np.exp(ends), cell["llc"] + ends * cell["slope"], color="k", lw=2)
    for row in tables.get("by tensor", {}).values():
        if row["name"] == name:
            gamma = network["default"] * column(row["cells"], "localization")
            figures.estimates(
                top, gamma, row["cells"], connect=True, color=figures.PINK, marker="s", label="a γ for each tensor"
            )
            away = column(row["cells"], "distance_over_reference")
            below.plot(gamma, away, "s-", ms=4, lw=1.2, color=figures.PINK)
    if name == "tanh regression" and "exact" in tables:
        rows = list(tables["exact"].values())
        top.errorbar(
            column(rows, "localization"),
            column(rows, "llc"),
            figures.two_sigma(rows),
            ls="",
            marker="x",
            color="k",
            label="exact sampler",
        )
        top.legend(fontsize=8)
    if network["lambda"] is not None:
        top.axhline(network["lambda"], color="k", lw=1)
    below.axhline(DEFAULT_REACH, color="0.6", lw=1)
    below.axhline(1, color="0.6", lw=1)
    for axis in (top, below):
        axis.axvline(network["default"], color="0.4", lw=1, ls="--")
        axis.axvline(network["default"] / 4, color="0.4", lw=1, ls=":")
        axis.set_xscale("log")
        axis.set_visible(True)
    known = [
        c["llc"] + 2 * c["stderr"] for _, cells in lines for c in cells if 4 * number(c["stderr"]) < number(c["llc"])
    ]
    if known:
        top.set_ylim(top=1.1 * max(*known, network["lambda"] or 0))
    top.set_title(f"{name}: P = {network['num_parameters']}, n = {network['num_samples']}", fontsize=10)
    top.set(ylabel="λ̂ ± 2 standard errors")
    below.set(ylabel="‖w − w*‖/‖w*‖; ▽ share lost", xlabel="γ", yscale="log")
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_formatter(NullFormatter())


def _plot_elasticity(axes: Axes, tables: Tables, settings: Settings) -> None:
    looks = itertools.chain(((*look, "-") for look in CLASSES), ((*look, ":") for look in CLASSES))
    for row in tables["path"].values():
        if row["temperature"] != settings.temperatures[0]:
            continue
        color, marker, line = next(looks)
        gamma, value, error = elasticity(row["cells"])
        at = gamma / tables["network"][row["name"]]["default"]
        style = {"color": color, "marker": marker, "ls": line, "label": row["name"]}
        axes.errorbar(at, -value, 2 * error, ms=5, lw=1.2, capsize=2, **style)
    axes.axvline(1, color="0.4", lw=1, ls="--")
    axes.axvline(0.25, color="0.4", lw=1, ls=":")
    axes.axhline(0, color="k", lw=1)
    axes.set(
        xscale="log", xlabel="γ over the default", ylabel="−dlog λ̂/dlog γ, between neighbouring γ", ylim=(-0.5, 1.1)
    )
    axes.set_title("how steep λ̂ is: 0 would be a plateau", fontsize=11)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _plot_rescaled(axes: Axes, tables: Tables) -> None:
    rows = list(tables.get("rescaled", {}).values())
    for way, color in (("one for all", figures.BLUE), ("by tensor", figures.PINK)):
        chosen = [row for row in rows if row["way"] == way]
        factors = numbers(row["factor"] for row in chosen)
        figures.estimates(axes, factors, chosen, connect=True, color=color, label=f"γ {way}")
    figures.label_hollow_in(axes, rows)
    axes.set(
        xlabel="first layer times this, second over it", ylabel="λ̂ ± 2 standard errors", ylim=(0, None), xscale="log"
    )
    ticks = sorted({row["factor"] for row in rows})
    axes.set_xticks(ticks, [f"{factor:g}" for factor in ticks])
    axes.minorticks_off()
    axes.set_title("the perceptron, one function in other parameters", fontsize=11)
    axes.legend(fontsize=8)
