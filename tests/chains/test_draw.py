"""Observables: what they see of a draw, and what a result keeps of what they return."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from regression import NUM_SAMPLES, estimate, mlp, sample_losses, samples
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from llc_fast import Draw
from llc_fast.result import LLCResult

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("chains", [1, 3, 18])
def test_observables_see_their_draw(chains: int, strategy: str) -> None:
    """Chain, draw and step, loss, batch and parameters belong together, in groups and threads of any number."""
    model, (x, y) = mlp(), samples()
    at_anchor = {name: p.detach().clone() for name, p in model.named_parameters()}

    def again(draw: Draw) -> Tensor:
        batch_x, batch_y = draw.batch
        hidden = torch.tanh(F.linear(batch_x, draw.params["0.weight"], draw.params["0.bias"]))
        return F.mse_loss(F.linear(hidden, draw.params["2.weight"], draw.params["2.bias"]), batch_y)

    def known(draw: Draw) -> bool:
        rows = (draw.batch[0][:, None] == x).all(dim=2)
        return bool(torch.equal(draw.batch[1][:, 0], (rows.double() @ y)[:, 0])) and draw.batch[0].shape == (5, 3)

    result = estimate(
        model,
        strategy=strategy,
        batch_size=5,
        num_chains=chains,
        num_draws=6,
        num_burnin=4,
        num_steps_bw_draws=3,
        observables={
            "names": lambda draw: torch.tensor([draw.chain, draw.draw, draw.step]),
            "loss": lambda draw: draw.loss,
            "again": again,
            "at w*": lambda draw: again(dataclasses.replace(draw, params=at_anchor)),
            "known": known,
        },
    )
    values = result.observables
    steps = np.arange(6, 23, 3)
    for chain in range(chains):
        assert np.array_equal(values["names"][chain], np.stack([np.full(6, chain), np.arange(6), steps], axis=1))
    paired = values["loss"] - values["at w*"] + result.init_loss
    np.testing.assert_allclose(result.loss_trace[:, steps], paired, rtol=1e-12)
    np.testing.assert_allclose(values["again"], values["loss"], rtol=1e-12)
    assert values["known"].all() and values["known"].shape == (chains, 6)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_observables_do_not_change_the_chains(strategy: str) -> None:
    """Looking is not touching: the same bits."""
    plain = estimate(mlp(), strategy=strategy, batch_size=5)
    watched = estimate(mlp(), strategy=strategy, batch_size=5, observables={"loss": lambda draw: draw.loss})
    assert np.array_equal(plain.loss_trace, watched.loss_trace) and plain.observables == {}


VALUES: dict[str, tuple[Callable[[Draw], Any], tuple[int, ...]]] = {
    "number": (lambda draw: draw.step, ()),
    "bool": (lambda draw: draw.chain > 0, ()),
    "numpy number": (lambda draw: np.float32(draw.step), ()),
    "numpy array": (lambda draw: np.arange(6).reshape(2, 3), (2, 3)),
    "list": (lambda draw: [draw.chain, draw.draw], (2,)),
    "scalar tensor": (lambda draw: draw.loss, ()),
    "tensor with a graph": (lambda draw: torch.ones(2, requires_grad=True) * 2, (2,)),
    "parameter": (lambda draw: draw.params["0.weight"], (4, 3)),
    "integers": (lambda draw: torch.arange(3), (3,)),
    "bfloat16": (lambda draw: torch.ones(2, dtype=torch.bfloat16), (2,)),
    "empty": (lambda draw: torch.zeros(0, 2), (0, 2)),
}


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("kind", VALUES)
def test_values_of_observables(kind: str, strategy: str) -> None:
    """Numbers and tensors of any kind and fixed shape become float64 [chain, draw, …]."""
    function, shape = VALUES[kind]
    values = estimate(mlp(), strategy=strategy, observables={kind: function}).observables[kind]
    assert values.shape == (2, 15, *shape) and values.dtype == np.float64 and np.isfinite(values).all()


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_recorded_parameters_are_copies(strategy: str) -> None:
    """What is recorded of a chain's memory does not move on with it: each draw is another point."""
    values = estimate(mlp(), strategy=strategy, observables={"w": lambda draw: draw.params["2.bias"]}).observables
    assert len(np.unique(values["w"])) == values["w"].size == 30


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("size", [5, NUM_SAMPLES])
def test_losses_of_samples_in_observables(size: int, strategy: str) -> None:
    """sample_losses is [batch], in the batch's order, with the draw's loss as its mean; None without them."""

    def check(draw: Draw) -> Tensor:
        assert draw.sample_losses is not None and draw.sample_losses.shape == (size,)
        hidden = torch.tanh(F.linear(draw.batch[0], draw.params["0.weight"], draw.params["0.bias"]))
        output = F.linear(hidden, draw.params["2.weight"], draw.params["2.bias"])
        torch.testing.assert_close(draw.sample_losses, sample_losses(output, draw.batch[1]), rtol=1e-10, atol=1e-12)
        return draw.sample_losses.mean() - draw.loss

    result = estimate(mlp(), loss_fn=sample_losses, batch_size=size, strategy=strategy, observables={"check": check})
    np.testing.assert_allclose(result.observables["check"], 0, atol=1e-14)
    absent = estimate(mlp(), strategy=strategy, observables={"none": lambda draw: draw.sample_losses is None})
    assert absent.observables["none"].all()


def test_losses_of_samples_with_microbatches_and_loaders() -> None:
    """The pieces' losses are put together again."""
    loader = DataLoader(TensorDataset(*samples()), batch_size=8)
    observables = {"each": lambda draw: draw.sample_losses}
    whole = estimate(mlp(), loader, sample_losses, observables=observables)
    pieces = estimate(mlp(), loader, sample_losses, observables=observables, microbatch_size=3)
    assert whole.observables["each"].shape == (2, 15, 8)
    np.testing.assert_allclose(pieces.observables["each"], whole.observables["each"], rtol=1e-11)


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("odd", [lambda draw: draw.draw == 7, lambda draw: draw.chain == 1], ids=["draw", "chain"])
def test_observables_of_changing_shape(odd: Callable[[Draw], bool], strategy: str) -> None:
    """From draw to draw or from chain to chain: an error that names the observable and both shapes."""
    observables = {"odd": lambda draw: torch.ones(3) if odd(draw) else 1.0}
    with pytest.raises(
        ValueError, match=r"observables\['odd'\] returned shape \((3,)?\) after \((3,)?\): return the same shape"
    ):
        estimate(mlp(), strategy=strategy, observables=observables)


@pytest.mark.parametrize(
    ("observables", "error", "message"),
    [
        ([lambda draw: 0], TypeError, "must be a mapping from names to functions, got list"),
        ({"a": 5}, TypeError, "must map names to functions of a draw, got 'a': 5"),
        ({3: lambda draw: 0}, TypeError, "must map names to functions of a draw, got 3"),
    ],
)
def test_wrong_observables(observables: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(mlp(), observables=observables)


def test_observables_that_return_nonsense() -> None:
    """What is no number is the caller's error, and comes out."""
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        estimate(mlp(), observables={"text": lambda draw: "abc"})


def test_observables_survive_saving(tmp_path: Any) -> None:
    """In the file with the rest."""
    result = estimate(mlp(), observables={"w": lambda draw: draw.params["0.bias"]})
    result.save(tmp_path / "result.npz")
    assert np.array_equal(LLCResult.load(tmp_path / "result.npz").observables["w"], result.observables["w"])


def test_observables_see_the_minibatch_that_a_model_writes_to() -> None:
    """As the data have it, not as the model leaves it."""

    class Shifting(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    model, (x, y) = Shifting(3, 1).double(), samples()

    def known(draw: Draw) -> bool:
        return bool((draw.batch[0][:, None] == x).all(dim=2).any(dim=1).all())

    for size in (5, NUM_SAMPLES):
        before = x.clone()
        result = estimate(model, (x, y), batch_size=size, observables={"known": known})
        assert result.observables["known"].all() and torch.equal(x, before)


# ---- evaluations at draws ----------------------------------------------------------------------------------


def forward(draw: Draw, x: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(x, draw.params["0.weight"], draw.params["0.bias"]))
    return F.linear(hidden, draw.params["2.weight"], draw.params["2.bias"])


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
@pytest.mark.parametrize("chains", [1, 3, 18])
def test_evaluations_of_any_batch(chains: int, strategy: str) -> None:
    """Loss, losses of samples and outputs of a batch that is none of the run's, at the draw's parameters."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(7, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    result = estimate(
        mlp(),
        strategy=strategy,
        batch_size=5,
        num_chains=chains,
        observables={
            "loss": lambda draw: draw.loss((x, y)),
            "outputs": lambda draw: draw.outputs((x, y)),
            "samples": lambda draw: draw.evaluate_samples((x, y)),
            "again": lambda draw: draw.loss(draw.batch) - draw.loss,
            "as arrays": lambda draw: draw.loss((x.numpy(), y.numpy())),
            "by hand": lambda draw: forward(draw, x),
        },
    )
    found = result.observables
    errors = (found["by hand"] - y.numpy())[..., 0] ** 2
    np.testing.assert_allclose(found["outputs"], found["by hand"], rtol=1e-12)
    np.testing.assert_allclose(found["samples"], errors, rtol=1e-9)
    np.testing.assert_allclose(found["loss"], errors.mean(axis=2), rtol=1e-9)
    np.testing.assert_allclose(found["again"], 0, atol=1e-12)
    assert np.array_equal(found["as arrays"], found["loss"])


def test_the_loss_is_a_tensor_and_a_function() -> None:
    """Whatever is done with it gives plain tensors; copies and files hold no more than the number."""
    found: list[Draw] = []

    def look(draw: Draw) -> float:
        assert isinstance(draw.loss, Tensor) and draw.loss.shape == () and draw.sample_losses is not None
        for value in (2 * draw.loss, draw.loss.clone(), draw.loss + draw.sample_losses, copy.deepcopy(draw.loss)):
            assert type(value) is Tensor
        assert pickle.loads(pickle.dumps(draw.loss)) == draw.loss.item() == float(draw.loss)
        assert np.asarray(draw.sample_losses).shape == (5,)
        same = draw.sample_losses(draw.batch)
        torch.testing.assert_close(same, draw.sample_losses.clone())
        moved = dataclasses.replace(draw, params={name: 0 * p for name, p in draw.params.items()})
        torch.testing.assert_close(moved.loss(draw.batch), draw.batch[1].square().mean())
        found.append(draw)
        return 0.0

    estimate(mlp(), loss_fn=sample_losses, batch_size=5, observables={"look": look})
    assert len(found) == 30
    by_hand = Draw(0, 0, 0, torch.ones(()), None, {}, None)
    assert type(by_hand.loss) is Tensor
    with pytest.raises(ValueError, match="draw can't be evaluated: it was not made by a run"):
        by_hand.outputs(samples())


class Noisy(torch.nn.Module):
    """Dropout, statistics of batches, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(torch.tanh(self.first(x)))))


OTHERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "smooth": (mlp, False),
    "dropout and batch statistics": (lambda: Noisy().double().train(), False),
    "in evaluation mode": (lambda: Noisy().double().eval(), False),
    "from a loader": (mlp, True),
}


@pytest.mark.parametrize("strategy", ["sequential", "batched", None])
@pytest.mark.parametrize("what", OTHERS)
def test_evaluations_leave_no_trace(what: str, strategy: str | None) -> None:
    """The chains' bits, their random numbers, the statistics of their batches and the model are those of a run that
    nobody looks at."""
    make, is_loaded = OTHERS[what]
    if strategy == "batched" and what in ("dropout and batch statistics", "from a loader"):
        pytest.skip("not possible in a batch")
    x, y = samples()
    seen: list[Tensor] = []

    def look(draw: Draw) -> Tensor:
        torch.rand(3)
        draw.outputs((x[:9], y[:9]))
        draw.evaluate_samples((x[:4], y[:4]))
        seen.append(draw.loss((x[:9], y[:9])))
        return seen[-1]

    def run(**options: Any) -> tuple[LLCResult, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = make()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        data = DataLoader(TensorDataset(x, y), 6, shuffle=True) if is_loaded else (x, y)
        result = estimate(model, data, strategy=strategy, batch_size=None if is_loaded else 6, **options)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        return result, before

    plain, _ = run()
    watched, _ = run(observables={"look": look})
    assert np.array_equal(plain.loss_trace, watched.loss_trace)
    assert all(np.array_equal(a, watched.traces[name], equal_nan=True) for name, a in plain.traces.items())
    assert np.isfinite(watched.observables["look"]).all() and not any(t.requires_grad for t in seen)


def test_evaluations_have_the_buffers_of_the_chain() -> None:
    """In a model whose buffers move with its minibatches: those that the chain has at the draw, not the model's."""

    class Counting(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + 0 * self.calls

    model = Counting().double()
    counted: list[float] = []
    model.register_forward_hook(lambda module, inputs, output: counted.append(float(module.calls)))
    x, y = samples()

    def look(draw: Draw) -> float:
        counted.clear()
        draw.outputs((x, y))
        draw.loss((x, y))
        assert counted == [draw.step + 2.0] * 2  # the chain's own call of this step was one more
        return 0.0

    estimate(model, num_chains=1, num_draws=4, num_burnin=2, observables={"look": look})
    assert float(model.calls) == 0


def test_outputs_of_losses_that_call_the_model() -> None:
    """What the model returned to the loss; of several calls, all; and words for a loss that calls none."""
    x, y = samples()

    def twice(model: Any, batch: Any) -> Tensor:
        return (model(batch[0]) - model(-batch[0]) - batch[1]).square().mean()

    def around(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model[2](torch.tanh(model[0](batch[0]))), batch[1])

    found = estimate(mlp(), loss_fn=twice, observables={"all": lambda draw: torch.stack(draw.outputs((x, y)))})
    assert found.observables["all"].shape == (2, 15, 2, NUM_SAMPLES, 1)
    with pytest.raises(ValueError, match=r"loss_fn does not call the model as model\(…\)"):
        estimate(mlp(), loss_fn=around, observables={"none": lambda draw: draw.outputs((x, y))})
    with pytest.raises(TypeError, match=r"batch must be \(inputs…, target\), as loss_fn takes it, got Tensor"):
        estimate(mlp(), observables={"none": lambda draw: draw.loss(x)})
