"""Do influences from draws predict retraining? The linear datamodeling score of a small network on digits.

A perceptron (64–32–10, tanh) is trained to its minimum w* of mean cross-entropy + ½λ‖w‖² on handwritten digits. The
question is how the loss of a query, a digit that it was not trained on, changes when half of the training samples are
left out. The answer is known by doing it: the network is trained again on each of 100 random halves, from several
initializations, and the query's loss is averaged over them. A method of attribution gives a matrix I_ij = dφ_j/dε_i,
the change of the query's loss φ_j when sample i has the weight 1 + ε_i, and so predicts −Σ I_ij over the samples i left
out. The score of a query is Spearman's correlation of predicted and actual loss over the halves; the linear
datamodeling score (LDS, Ilyas et al. 2022, Park et al. 2023: halves too) is its mean over queries. Its standard error
is by bootstrap over queries. All methods start from the same w*.

- *Bayesian influence function* (BIF): −β·Cov(ℓ_i, φ_j) over draws of :func:`llc_fast.sample`, β = nβ/n.
- *EK-FAC* (Grosse et al. 2023): −g_i·F⁻¹·g_j/n with the Kronecker-factored, eigenvalue-corrected Fisher matrix plus λ.
  It is written here for linear layers, with the exact mean over labels; where kronfluence can be imported, its own is
  run beside it, with damping λ, with the one label that it draws for each sample and with 20, and with its default
  damping.
- *Gauss–Newton*: the same with the exact matrix, which equals the Fisher matrix here: what EK-FAC approximates.
- *Gradient dot products*: −g_i·g_j/n.
- *Another retraining*: the losses after retraining from the initialization of w* alone, against the mean over the
  others. So much of what is to be predicted does not depend on the initialization.

**Which posterior.** The network minimizes L + ½λ‖w‖², so the chains sample exp(−nβ·(L + ½λ‖w‖²)), of which w* is the
mode: a prior of precision μ = nβ·λ around 0, and no other localization. In a Gaussian approximation Σ = (nβ·(H + λ))⁻¹,
and −β·Cov = −g_i·(H + λ)⁻¹·g_j/n, the influence function with the damping that retraining has, whatever nβ. What nβ
decides is how local this is. The package's default localization, P/(½‖w*‖)², is the precision that holds chains at half
of ‖w*‖; μ is set to it, so nβ = μ/λ. These two rules name one setting, which was fixed before anything was retrained,
and is the headline. nβ = n/log n with the same λ would let weights spread over many times ‖w*‖, and n/log n with the
default localization damps by γ/nβ, a hundred times λ or more. The table ``settings`` has what these, others, and
``sample`` with nothing set give. Nothing is chosen by the scores.

Noise of draws lowers the score: 1/LDS² falls linearly with 1/draws. The table ``draws`` has the score over the number
of draws, and a line through its later half tells what more would bring (:func:`without_noise`): an extrapolation, which
no claim rests on.

Draws are by HMC, with trajectories for the flattest directions of H + λ, since a tenth of the weights' directions have
curvatures below λ and the stiffest have a thousand times more.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

import llc_fast
from llc_fast.plots import new_figure
from llc_fast.problems.digits import NUM_CLASSES, SIDE, load_digits
from llc_fast.reproduce import figures
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, plus_minus
from llc_fast.reproduce.study import Study
from llc_fast.samplers import HMCSampler
from llc_fast.settings import default_localization
from llc_fast.stats.influence import influence
from llc_fast.support.files import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
HIDDEN = 32
DECAY = 1e-3
"""λ of the training loss, mean cross-entropy + ½λ‖w‖²."""
LR, TOGETHER = 0.03, 25
"""Adam's step size at the start, which falls to 0 by half a cosine; networks that are retrained at once."""
POLISH = 3000
"""Steps of L-BFGS in float64 that end the training of w* at its minimum."""
LABELS = 20
"""Labels drawn for each sample in the row of kronfluence with more labels."""
LEAPFROG = 8
"""Steps of a trajectory at least."""
PLAIN_STEPS = 20
"""Steps from draw to draw where the sampler is SGLD and not HMC."""
BOOTSTRAP = 4000
MARGIN = 0.02
"""How far below EK-FAC the score may be."""
MEAN, OWN, WARM = "other initializations", "same initialization", "from w*"
"""What is predicted: the mean over retraining from initializations other than that of w*; from that of w*; from w*."""
BIF, EKFAC = "BIF", "EK-FAC"
KRON, KRON_MANY = "EK-FAC, kronfluence", "EK-FAC, kronfluence, more labels"
KRON_DEFAULT = "EK-FAC, kronfluence, default damping"
GAUSS_NEWTON, DOT, AGAIN = "Gauss–Newton", "gradient dot products", "another retraining"


@dataclass(frozen=True)
class Settings:
    """How much is retrained and sampled.

    Attributes:
        num_train: n.
        queries: test digits whose losses are predicted.
        subsets: random halves of the training digits.
        inits: initializations other than that of w*, from which each half is trained.
        steps: of training, with all samples in each.
        chains: of the sampler.
        burnin, draws: of each chain, trajectories of HMC.
        short: draws for each row of the table of settings.
    """

    num_train: int = 600
    queries: int = 100
    subsets: int = 100
    inits: int = 3
    steps: int = 800
    chains: int = 4
    burnin: int = 100
    draws: int = 1000
    short: int = 250


SCALES = {
    "small": Settings(),
    "paper": Settings(num_train=1000, queries=300, subsets=300, inits=10, steps=3000, draws=10_000, short=2000),
}


# ---- the network, and retraining it ------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Data, float32, as :func:`llc_fast.problems.digits.load_digits` splits them."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor


def make_task(settings: Settings, seed: int = 0, device: torch.device | str = "cpu") -> Task:
    """The first digits, and the first of those not trained with."""
    train, test = load_digits(num_train=settings.num_train, seed=seed)
    x, y, query_x, query_y = (t.flatten(1) if t.ndim > 2 else t for t in (*train, *test))
    return Task(*(t.to(device) for t in (x, y, query_x[: settings.queries], query_y[: settings.queries])))


def make_network(seed: int) -> nn.Sequential:
    """As torch initializes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(SIDE * SIDE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, NUM_CLASSES))


def train_many(start: list[Tensor], x: Tensor, y: Tensor, steps: int, say: Callable[[int], Any] = int) -> list[Tensor]:
    """Networks side by side, each trained on its own samples by Adam with full gradients.

    Args:
        start: weights and biases of both layers ``[network, …]``.
        x, y: samples of each ``[network, sample, …]``.
        steps: of Adam; ε falls from `LR` to 0 by half a cosine.
        say: called with the number of steps done.

    Returns:
        What became of `start`.
    """
    params = [p.detach().clone().requires_grad_() for p in start]
    optimizer = torch.optim.Adam(params, lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    for step in range(steps):
        optimizer.zero_grad()
        loss = losses_of(params, x, y).mean(dim=1) + DECAY / 2 * sum(p.square().flatten(1).sum(1) for p in params)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        say(step + 1)
    return [p.detach() for p in params]


def losses_of(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each sample for each network, ``[network, sample]``."""
    first, first_bias, second, second_bias = params
    hidden = torch.tanh(torch.baddbmm(first_bias[:, None], x, first.mT))
    out = torch.baddbmm(second_bias[:, None], hidden, second.mT)
    return cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def train_reference(task: Task, seed: int, steps: int) -> nn.Sequential:
    """w*, float64: trained as the others are, on all samples, and then by L-BFGS until nothing is left to gain."""
    model = make_network(seed).to(task.x.device)
    found = train_many([p[None] for p in model.parameters()], task.x[None], task.y[None], steps)
    with torch.no_grad():
        for p, value in zip(model.parameters(), found, strict=True):
            p.copy_(value[0])
    model, x = model.double(), task.x.double()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=POLISH,
        history_size=50,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = cross_entropy(model(x), task.y) + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return model.requires_grad_(True)


def random_halves(count: int, num_samples: int, seed: int) -> Tensor:
    """Samples that are kept, int64 ``[subset, num_samples // 2]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_samples, generator=generator)[: num_samples // 2] for _ in range(count)])


def retrain(task: Task, start: list[Tensor], kept: Tensor, steps: int, say: Callable[[int], Any] = int) -> Array:
    """The loss of each query after training on each subset alone, ``[subset, query]``."""
    found = []
    for first in range(0, len(kept), TOGETHER):
        chosen = kept[first : first + TOGETHER].to(task.x.device)
        many = [p.detach().float().expand(len(chosen), *p.shape) for p in start]
        done = first * steps // TOGETHER
        params = train_many(many, task.x[chosen], task.y[chosen], steps, lambda k, done=done: say(done + k))  # type: ignore[misc]
        with torch.no_grad():
            x, y = (t.expand(len(chosen), *t.shape) for t in (task.query_x, task.query_y))
            found.append(losses_of(params, x, y).double().cpu().numpy())
    return np.concatenate(found)


# ---- the score ---------------------------------------------------------------------------------------------


def predicted(matrix: Array, kept: Tensor) -> Array:
    """The change of each query's loss without the samples that are left out, ``[subset, query]``, to first order.

    Args:
        matrix: dφ_j/dε_i, ``[train, query]``.
        kept: samples that are kept, ``[subset, sample]``.
    """
    left_out = np.ones((len(kept), len(matrix)))
    np.put_along_axis(left_out, kept.numpy(), 0.0, axis=1)
    found: Array = -left_out @ matrix
    return found


def rank_correlations(one: Array, other: Array) -> Array:
    """Spearman's ρ of each column, ``[column]``; 0 where one side does not vary. Equal values share a rank."""
    ranks = [np.stack([_ranks(column) for column in side.T], axis=1) for side in (one, other)]
    a, b = (side - side.mean(axis=0) for side in ranks)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    found: Array = np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 0)
    return found


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: Array = (ends - (counts - 1) / 2)[inverse]
    return found


def bootstrap_error(scores: Array, seed: int = 0) -> float:
    """The standard error of the mean of what queries score, by bootstrap over queries."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(scores), size=(BOOTSTRAP, len(scores)))
    return float(scores[chosen].mean(axis=1).std(ddof=1))


def without_noise(draws: Array, lds: Array) -> float:
    """What LDS tends to with more draws: 1/LDS² is linear in 1/draws, as the variance of noise adds to that of what is
    predicted; a least-squares line through the points, at 1/draws = 0. NaN if it is not above 0."""
    slope, level = np.polyfit(1 / np.asarray(draws), np.asarray(lds) ** -2.0, 1)
    return float(level**-0.5) if level > 0 and slope >= 0 else math.nan


def score(values: Array, actual: Mapping[str, Array]) -> Row:
    """LDS of predicted losses ``[subset, query]`` against each kind of actual ones."""
    row = Row()
    for target, losses in actual.items():
        scores = rank_correlations(values, losses)
        row[target] = {"lds": scores.mean(), "stderr": bootstrap_error(scores), "scores": scores}
    return row


# ---- methods -----------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the loss of each sample, by the parameter's name: ``[sample, …]``."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, w, (x[None],)), y[None])

    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return found


def label_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """√p_c times the gradient of −log p_c for each label c, ``[sample, label, …]``: products of these, summed over
    labels, are a sample's part of the Fisher matrix."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def log_probs(w: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, w, (x[None],))[0].log_softmax(0)
        return found

    jacobian = vmap(jacrev(log_probs), in_dims=(None, 0))(params, x)
    with torch.no_grad():
        roots = model(x).softmax(1).sqrt()
    return {name: -roots.view(*roots.shape, *[1] * (j.ndim - 2)) * j for name, j in jacobian.items()}


def dot_products(model: nn.Module, task: Task) -> Array:
    """−g_i·g_j/n."""
    train, query = _both(model, task)
    return _array(-_flat(train) @ _flat(query).T / len(train["0.weight"]))


def gauss_newton_matrix(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over samples of Jᵀ(diag p − ppᵀ)J, ``[parameter, parameter]``: the Fisher matrix."""
    size = sum(p.numel() for p in model.parameters())
    found = torch.zeros(size, size, dtype=x.dtype, device=x.device)
    for part in torch.split(x, 100):
        rows = torch.cat([g.flatten(2) for g in label_gradients(model, part).values()], dim=2).flatten(0, 1)
        found += rows.T @ rows / len(x)
    return found


def gauss_newton(model: nn.Module, task: Task, matrix: Tensor) -> Array:
    """−g_i·(G + λ)⁻¹·g_j/n."""
    train, query = (_flat(side) for side in _both(model, task))
    damped = matrix + DECAY * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return _array(-train @ torch.linalg.solve(damped, query.T) / len(train))


def ekfac(model: nn.Sequential, task: Task) -> Array:
    """−g_i·F⁻¹·g_j/n, with F for each linear layer (weight and bias) by itself: in the basis of the eigenvectors of
    A = E[āāᵀ] (inputs with 1 appended) and S = E[δδᵀ] (gradients of outputs), the diagonal of the Fisher matrix; plus
    λ."""
    x = task.x.double()
    train, query = _both(model, task)
    labelled = label_gradients(model, x)
    found = torch.zeros(len(x), len(task.query_x), dtype=x.dtype, device=x.device)
    inputs = {"0": x, "2": model[:2](x).detach()}
    for layer, a in inputs.items():
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        delta = labelled[f"{layer}.bias"].flatten(0, 1)
        _, basis_in = torch.linalg.eigh(a.T @ a / len(a))
        _, basis_out = torch.linalg.eigh(delta.T @ delta / len(a))

        def rotated(g: dict[str, Tensor], name: str = layer, u: Tensor = basis_out, v: Tensor = basis_in) -> Tensor:
            whole = torch.cat([g[f"{name}.weight"], g[f"{name}.bias"][..., None]], dim=-1)
            return u.T @ whole @ v

        diagonal = rotated(labelled).square().sum(dim=1).mean(dim=0) + DECAY
        found -= rotated(train).flatten(1) @ (rotated(query) / diagonal).flatten(1).T / len(x)
    return _array(found)


def has_kronfluence() -> bool:
    """Whether it can be run."""
    return importlib.util.find_spec("kronfluence") is not None


def kronfluence_ekfac(model: nn.Sequential, task: Task, damping: float | None, labels: int = 1) -> Array:
    """As :func:`ekfac`, by kronfluence, which draws labels.

    Args:
        model: at w*.
        task: the data.
        damping: what is added to the diagonal; None: kronfluence's default, 0.1 times the mean eigenvalue.
        labels: drawn for each sample; kronfluence itself draws one.
    """
    from kronfluence.analyzer import Analyzer, prepare_model  # type: ignore[import-not-found]
    from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found]
    from kronfluence.task import Task as KronfluenceTask  # type: ignore[import-not-found]

    class Classification(KronfluenceTask):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            out = model(x)
            if sample:
                with torch.no_grad():
                    y = torch.multinomial(out.softmax(1), 1).flatten()
            return cross_entropy(out, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    train = torch.utils.data.TensorDataset(task.x.double().cpu(), task.y.cpu())
    query = torch.utils.data.TensorDataset(task.query_x.double().cpu(), task.query_y.cpu())
    own = nn.Sequential(nn.Linear(SIDE * SIDE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, NUM_CLASSES)).double()
    own.load_state_dict(model.state_dict())
    names = ("activation_covariance_dtype", "gradient_covariance_dtype", "per_sample_gradient_dtype", "lambda_dtype")
    doubles = dict.fromkeys(names, torch.float64)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task_of_it = Classification()
        analyzer = Analyzer(
            "digits", prepare_model(own, task_of_it), task_of_it, cpu=True, output_dir=folder, disable_tqdm=True
        )
        analyzer.fit_all_factors(
            "ekfac",
            torch.utils.data.ConcatDataset([train] * labels),
            per_device_batch_size=100,
            factor_args=FactorArguments(strategy="ekfac", **doubles),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query,
            train,
            per_device_query_batch_size=100,
            per_device_train_batch_size=100,
            score_args=ScoreArguments(
                damping_factor=damping,
                score_dtype=torch.float64,
                per_sample_gradient_dtype=torch.float64,
                precondition_dtype=torch.float64,
            ),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return _array(-scores.T / len(task.x))


def _both(model: nn.Module, task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides = ((task.x, task.y), (task.query_x, task.query_y))
    train, query = (gradients(model, x.double(), y) for x, y in sides)
    return train, query


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


def _array(t: Tensor) -> Array:
    found: Array = t.detach().double().cpu().numpy()
    return found


# ---- draws -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """What is sampled: exp(−nβ·(L + ½λ‖w‖²) − ½γ‖w − w*‖²).

    Attributes:
        nbeta: nβ; None: nothing is set, all is as `sample` chooses it, and there is no prior.
        localization: γ.
    """

    nbeta: float | None
    localization: float = 0.0


def headline(num_parameters: int, norm: float) -> Posterior:
    """nβ at which the prior of precision nβ·λ is as tight as the package's default localization."""
    return Posterior(default_localization(num_parameters, norm) / DECAY)


def posteriors(n: int, num_parameters: int, norm: float) -> dict[str, Posterior]:
    """Those of the table of settings, the headline among them, by name."""
    ours = headline(num_parameters, norm)
    assert ours.nbeta is not None
    gamma, usual = default_localization(num_parameters, norm), n / math.log(n)
    return {
        "headline": ours,
        "nβ × 10": Posterior(10 * ours.nbeta),
        "nβ × 0.1": Posterior(ours.nbeta / 10),
        "nβ = n": Posterior(n),
        "nβ = n/log n": Posterior(usual),
        "γ = default": Posterior(ours.nbeta, gamma),
        "γ = 10 × default": Posterior(ours.nbeta, 10 * gamma),
        "γ = 100 × default": Posterior(ours.nbeta, 100 * gamma),
        "nβ = n/log n, γ = default": Posterior(usual, gamma),
        "nothing set": Posterior(None),
    }


def leapfrog_steps(posterior: Posterior, largest: float) -> int:
    """Of a trajectory: about a quarter of the flattest direction's period, at a step of 1 in the stiffest; at least
    `LEAPFROG`, as thousands of equal directions let a step be no more than about a third of that."""
    assert posterior.nbeta is not None
    damping = DECAY + posterior.localization / posterior.nbeta
    return max(LEAPFROG, math.ceil(math.pi / 2 * math.sqrt((largest + damping) / damping)))


def draw_losses(
    study: Study,
    key: str,
    model: nn.Module,
    task: Task,
    posterior: Posterior,
    largest: float,
    settings: Settings,
    draws: int,
) -> tuple[Array, Array, Row]:
    """Losses at the draws of the training samples and of the queries, ``[chain, draw, sample]``, and what a row says.

    Args:
        study: where.
        key: of the run within the study; a run that was stopped goes on.
        model: at w*.
        task: the data.
        posterior: what is sampled.
        largest: the largest curvature of L at w*, from which trajectories have their length.
        settings: numbers of chains and of burn-in.
        draws: of each chain.

    Raises:
        KeyboardInterrupt: Ctrl-C; the same study goes on from there.
    """
    options: dict[str, Any] = {"num_steps_bw_draws": PLAIN_STEPS, "num_burnin": PLAIN_STEPS * settings.burnin}
    if posterior.nbeta is not None:
        steps = leapfrog_steps(posterior, largest)
        prior = posterior.nbeta * DECAY
        options = {
            "sampler": HMCSampler(num_leapfrog=steps, jitter=0.5, weight_decay=prior),
            "nbeta": posterior.nbeta,
            "localization": posterior.localization,
            "num_burnin": settings.burnin,
        }
    samples = llc_fast.sample(
        make_float(model),
        (task.x, task.y),
        cross_entropy,
        probes={"train": (task.x, task.y), "query": (task.query_x, task.query_y)},
        store=study.path(key, ".zarr"),
        num_chains=settings.chains,
        num_draws=draws,
        seed=study.seed,
        device=study.device,
        progress=study.progress,
        **options,
    )
    with samples:
        if samples.is_partial:
            raise KeyboardInterrupt
        train, query = (np.asarray(samples.losses(name).values, np.float64) for name in ("train", "query"))
        result = samples.llc()
    row = {
        "nbeta": result.nbeta,
        "prior": 0.0 if posterior.nbeta is None else result.nbeta * DECAY,
        "localization": result.settings["localization"],
        "mean_loss": float(train.mean()),
        "acceptance": result.diagnostics.get("acceptance"),
        "distance": result.diagnostics.get("distance_over_reference"),
        "warnings": [str(warning) for warning in result.warnings],
        "codes": [warning.code for warning in result.warnings],
    }
    return train, query, plain(row)


def make_float(model: nn.Module) -> nn.Sequential:
    """The same network in float32."""
    found = make_network(0)
    found.load_state_dict(model.state_dict())
    return found.to(next(model.parameters()).device)


# ---- measured ----------------------------------------------------------------------------------------------


def measure(study: Study, settings: Settings) -> None:
    """w*, what retraining gives, what each method says of it, and BIF over numbers of draws and settings."""
    task = make_task(settings, study.seed, study.device)
    kept = random_halves(settings.subsets, settings.num_train, study.seed)
    seed = 1000 * study.seed
    model = make_network(seed).to(study.device).double()
    model.load_state_dict(study.once("reference", lambda: train_reference(task, seed, settings.steps).state_dict()))
    curvature = study.once("curvature", lambda: gauss_newton_matrix(model, task.x.double()))
    largest = float(torch.linalg.eigvalsh(curvature)[-1])
    size, norm = sum(p.numel() for p in model.parameters()), _norm(model)
    study.rows(
        "network",
        {"w*": None},
        lambda _: _reference_row(model, task) | {"num_parameters": size, "norm": norm, "largest_curvature": largest},
        lambda r: f"training loss {r['loss']:.3g}, {r['accuracy']:.1%} of the queries right",
    )
    actual = _retrained(study, settings, task, kept, model, seed)

    def posterior_draws(name: str, posterior: Posterior, draws: int) -> tuple[Tensor, Tensor, Row]:
        train, query, row = draw_losses(study, f"draws {name}", model, task, posterior, largest, settings, draws)
        return torch.from_numpy(train), torch.from_numpy(query), row

    ours = headline(size, norm)
    assert ours.nbeta is not None
    train, query, about = study.once("losses headline", lambda: posterior_draws("headline", ours, settings.draws))
    losses = train.numpy(), query.numpy()
    beta = ours.nbeta / settings.num_train

    def by_draws(count: int) -> Array:
        return influence(*(side[:, :count] for side in losses), beta=beta, stderr=False).value  # type: ignore[no-any-return]

    methods: dict[str, Callable[[], Array] | None] = {
        BIF: lambda: by_draws(settings.draws),
        EKFAC: lambda: ekfac(model, task),
        KRON: (lambda: kronfluence_ekfac(model, task, DECAY)) if has_kronfluence() else None,
        KRON_MANY: (lambda: kronfluence_ekfac(model, task, DECAY, LABELS)) if has_kronfluence() else None,
        KRON_DEFAULT: (lambda: kronfluence_ekfac(model, task, None)) if has_kronfluence() else None,
        GAUSS_NEWTON: lambda: gauss_newton(model, task, curvature),
        DOT: lambda: dot_products(model, task),
    }

    def scored(name: str) -> Row:
        if name == AGAIN:
            return {"is_installed": True, **score(actual[OWN], {MEAN: actual[MEAN]})}
        make = methods[name]
        if make is None:
            return {"is_installed": False}
        values = predicted(make(), kept)
        return {"is_installed": True, **score(values, actual)} | (about if name == BIF else {})

    study.rows("methods", {name: name for name in (*methods, AGAIN)}, scored, _in_words)

    def example(_: None) -> Row:
        scores = np.array(study.tables["methods"][BIF][MEAN]["scores"])
        chosen = int(np.argsort(scores)[len(scores) // 2])
        row: Row = {"query": chosen, "actual": actual[MEAN][:, chosen]}
        matrices = {BIF: by_draws(settings.draws), EKFAC: ekfac(model, task)}
        return row | {name: predicted(matrix, kept)[:, chosen] for name, matrix in matrices.items()}

    study.rows("example", {"query in the middle": None}, example, lambda r: f"query {r['query']}")
    counts = [k for k in (10, 25, 50, 100, 250, 500, 1000, 2500, 5000) if k < settings.draws] + [settings.draws]
    study.rows(
        "draws",
        {f"{settings.chains} × {k}": k for k in counts},
        lambda k: {"draws": k, "is_installed": True, **score(predicted(by_draws(k), kept), actual)},
        _in_words,
    )

    def with_posterior(case: tuple[str, Posterior]) -> Row:
        name, posterior = case
        if posterior == ours:
            part = [side[:, : settings.short] for side in losses]
            row = about
        else:
            *tensors, row = posterior_draws(name, posterior, settings.short)
            part = [side.numpy() for side in tensors]
        found = influence(*part, beta=row["nbeta"] / settings.num_train, stderr=False)
        said = {"autocorrelation_time": found.autocorrelation_time, "r_hat": found.r_hat.worst, "is_installed": True}
        return row | said | score(predicted(found.value, kept), actual)

    cases = posteriors(settings.num_train, size, norm)
    study.rows("settings", {name: (name, p) for name, p in cases.items()}, with_posterior, _in_words)


def _norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))


def _reference_row(model: nn.Module, task: Task) -> Row:
    model.zero_grad()
    loss = cross_entropy(model(task.x.double()), task.y)
    objective = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
    gradient = torch.autograd.grad(objective, list(model.parameters()))
    with torch.no_grad():
        out = model(task.query_x.double())
    return {
        "loss": loss.item(),
        "gradient": max(float(g.abs().max()) for g in gradient),
        "query_loss": cross_entropy(out, task.query_y).item(),
        "accuracy": (out.argmax(1) == task.query_y).double().mean().item(),
    }


def _retrained(
    study: Study, settings: Settings, task: Task, kept: Tensor, model: nn.Module, seed: int
) -> dict[str, Array]:
    """Losses of queries ``[subset, query]`` after retraining, by what is predicted."""

    def once(name: str, start: Callable[[], list[Tensor]]) -> Tensor:
        batches = math.ceil(len(kept) / TOGETHER)

        def make() -> Tensor:
            steps = iter(study.steps(batches * settings.steps, f"retraining, {name}"))
            return torch.from_numpy(retrain(task, start(), kept, settings.steps, lambda _: next(steps)))

        return study.once(f"retrained {name}", make)

    def initial(k: int) -> list[Tensor]:
        return [p.to(task.x.device) for p in make_network(seed + k).parameters()]

    found: dict[str, Tensor] = {OWN: once(OWN, lambda: initial(0)), WARM: once(WARM, lambda: list(model.parameters()))}
    others = [once(f"initialization {k}", lambda k=k: initial(k)) for k in range(1, settings.inits + 1)]  # type: ignore[misc]
    found[MEAN] = torch.stack(others).mean(dim=0)
    return {target: found[target].numpy() for target in (MEAN, OWN, WARM)}


def _in_words(row: Row) -> str:
    if not row["is_installed"]:
        return "not installed"
    return f"LDS {plus_minus(row[MEAN]['lds'], row[MEAN]['stderr'])}"


# ---- what must come out ------------------------------------------------------------------------------------


def claims(tables: Tables, settings: Settings) -> list[Claim]:
    """BIF against the better of the EK-FAC rows, and both against gradient dot products."""
    methods = tables["methods"]
    best = max(
        (name for name in (EKFAC, KRON, KRON_MANY, KRON_DEFAULT) if methods[name]["is_installed"]),
        key=lambda name: float(methods[name][MEAN]["lds"]),
    )
    less = difference(methods[BIF], methods[best])
    limit = extrapolated(tables)
    ours = difference(methods[BIF], methods[DOT])
    theirs = difference(methods[EKFAC], methods[DOT])
    return [
        Claim(
            f"the LDS of BIF is at least that of EK-FAC (the better of its rows) less {MARGIN:g}",
            f"{_lds(methods[BIF])} and {_lds(methods[best])} ({best}); difference {plus_minus(*less)}; "
            f"with ever more draws about {limit:.2f}, by extrapolation",
            less[0] >= -MARGIN,
        ),
        Claim(
            "the LDS of BIF is above that of gradient dot products",
            f"{_lds(methods[BIF])} and {_lds(methods[DOT])}; difference {plus_minus(*ours)}",
            ours[0] > figures.SIGMAS * ours[1],
        ),
        Claim(
            "the LDS of EK-FAC is above that of gradient dot products (Grosse et al. 2023)",
            f"{_lds(methods[EKFAC])} and {_lds(methods[DOT])}; difference {plus_minus(*theirs)}",
            theirs[0] > figures.SIGMAS * theirs[1],
            "published",
        ),
    ]


def extrapolated(tables: Tables, target: str = MEAN) -> float:
    """:func:`without_noise` of the larger half of the numbers of draws."""
    rows = list(tables["draws"].values())[-max(2, (len(tables["draws"]) + 1) // 2) :]
    lds = [row[target]["lds"] for row in rows]
    if len(rows) < 2 or min(lds) <= 0:
        return math.nan
    return without_noise(np.array([row["draws"] for row in rows]), np.array(lds))


def difference(one: Row, other: Row, target: str = MEAN) -> tuple[float, float]:
    """LDS less LDS, and its standard error by bootstrap over queries, which are the same on both sides."""
    scores = np.array(one[target]["scores"]) - np.array(other[target]["scores"])
    return float(scores.mean()), bootstrap_error(scores)


def _lds(row: Row, target: str = MEAN) -> str:
    return plus_minus(row[target]["lds"], row[target]["stderr"])


# ---- figure ------------------------------------------------------------------------------------------------

_LOOKS = {
    MEAN: ("mean of other initializations", figures.BLUE, "o", -0.2),
    OWN: ("the initialization of w*", figures.ORANGE, "s", 0.0),
    WARM: ("starting from w*", figures.GREEN, "D", 0.2),
}
"""Label, color, marker and place beside each other of what is predicted."""


def plot(tables: Tables, settings: Settings) -> dict[str, Figure]:
    """LDS by method; over draws and settings; predicted against actual losses of one query."""
    figure, axes = new_figure(2, 2, width=6.0, height=4.2)
    methods = {name: row for name, row in tables["methods"].items() if row["is_installed"]}
    _plot_scores(axes[0], methods)
    axes[0].set(title="LDS by method")
    axes[0].legend(fontsize=8, title="retrained from", title_fontsize=8)
    _plot_example(axes[1], tables)
    _plot_draws(axes[2], tables)
    _plot_scores(axes[3], tables["settings"])
    axes[3].set(title=f"BIF by what is sampled, {settings.chains} × {settings.short} draws")
    figure.suptitle(
        f"Leaving out half of the training digits: what influences foretell, in one number (LDS). BIF "
        f"{_lds(methods[BIF])}, EK-FAC {_lds(methods[EKFAC])}"
    )
    return {"influence": figure}


def _plot_scores(axes: Axes, rows: Mapping[str, Row]) -> None:
    for target, (label, color, marker, shift) in _LOOKS.items():
        known = [(k, row[target]) for k, row in enumerate(rows.values()) if target in row]
        axes.errorbar(
            [found["lds"] for _, found in known],
            [k + shift for k, _ in known],
            xerr=[figures.SIGMAS * found["stderr"] for _, found in known],
            fmt=marker,
            color=color,
            ms=5,
            lw=1.2,
            label=label,
        )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="LDS (± 2 standard errors over queries)")
    axes.axvline(0, color="0.8", lw=1, zorder=0)
    axes.grid(axis="x", color="0.9")


def _plot_example(axes: Axes, tables: Tables) -> None:
    (row,) = tables["example"].values()
    actual = np.array(row["actual"])
    for name, color, marker in ((EKFAC, figures.ORANGE, "s"), (BIF, figures.BLUE, "o")):
        values = np.array(row[name])
        scores = tables["methods"][name][MEAN]["scores"]
        label = f"{name}, ρ = {scores[row['query']]:.2f}"
        axes.plot(values - values.mean(), actual, marker, color=color, ms=4, alpha=0.7, label=label)
    axes.set(
        xlabel="predicted loss, less its mean over halves",
        ylabel="loss after retraining, mean over initializations",
        yscale="log",
        title="One query, whose BIF score is the median",
    )
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.legend(fontsize=8)


def _plot_draws(axes: Axes, tables: Tables) -> None:
    rows = list(tables["draws"].values())
    for target, (label, color, marker, _) in _LOOKS.items():
        lds, errors = (np.array([row[target][name] for row in rows]) for name in ("lds", "stderr"))
        draws = [row["draws"] for row in rows]
        axes.errorbar(draws, lds, figures.SIGMAS * errors, fmt=f"{marker}-", color=color, ms=5, lw=1.2, label=label)
    axes.axhline(
        tables["methods"][EKFAC][MEAN]["lds"],
        color=figures.BLUE,
        ls="--",
        lw=1.2,
        label="EK-FAC, other initializations",
    )
    limit = extrapolated(tables)
    if math.isfinite(limit):
        axes.axhline(limit, color=figures.BLUE, ls=":", lw=1.2, label="ever more draws, extrapolated")
    axes.set(xscale="log", xlabel="draws of each chain", ylabel="LDS (± 2 standard errors)", title="BIF over draws")
    axes.set_xticks([row["draws"] for row in rows], [str(row["draws"]) for row in rows])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8)
