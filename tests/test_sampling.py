"""llc_fast.sample: losses of probes at every draw, the estimate beside them, and stores that survive."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from processes import all_well, launch
from regression import mlp, samples
from runs import Script, arguments, interrupted_after, no_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import llc_fast
from llc_fast import Samples

pytest.importorskip("zarr")
pytest.importorskip("xarray")
pytestmark = pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "nbeta": 5.0,
    "localization": 1.0,
    "num_chains": 3,
    "num_draws": 15,
    "num_burnin": 4,
    "batch_size": 6,
    "progress": False,
}
SAMPLING = ("probes", "per", "store", "probe_dtype", "probe_loss")


def both(model: Any = None, data: Any = None, loss_fn: Any = F.mse_loss, **options: Any) -> tuple[Any, Samples]:
    """The estimate alone, and the same with probes."""
    model = mlp() if model is None else model
    data = samples() if data is None else data
    chosen = arguments(SETTINGS | options)
    alone = {name: value for name, value in chosen.items() if name not in SAMPLING}
    plain = llc_fast.estimate_llc(copy.deepcopy(model), data, loss_fn, **alone)
    return plain, llc_fast.sample(model, data, loss_fn, **chosen)


def weights(draw: llc_fast.Draw) -> Tensor:
    return torch.cat([p.flatten() for p in draw.params.values()])


def assert_same_estimate(found: llc_fast.LLCResult, expected: llc_fast.LLCResult) -> None:
    runs.assert_same(found, expected)
    assert found.interval() == expected.interval() and found.warnings == expected.warnings
    for name, values in expected.traces.items():
        np.testing.assert_array_equal(found.traces[name], values)


VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {"strategy": "sequential"},
    "batched": {"strategy": "batched"},
    "as chosen": {},
    "many chains": {"num_chains": 18, "strategy": "sequential"},
    "thinned, without burn-in": {"num_steps_bw_draws": 3, "num_burnin": 0},
    "chosen step size": {"lr": None, "num_draws": 300, "num_burnin": 100},
    "MALA": {"sampler": "mala", "batch_size": None, "lr": 1e-3},
    "released": {"release_gradients": True},
    "microbatches": {"microbatch_size": 2},
    "localization alone": {"nbeta": 0},
}


@pytest.mark.parametrize("what", VARIANTS)
def test_losses_of_probes(what: str) -> None:
    """The closed form at the draw's parameters, for every strategy; the chains have the bits of estimate_llc's."""
    x, y = samples()
    options = {"observables": {"w": weights}} | VARIANTS[what]
    count = 1 if what == "MALA" else 2  # all data are its batch
    plain, found = both(probes={"train": (x, y), "some": ((x, y), count)}, **options)
    assert_same_estimate(found.llc(), plain)
    w = torch.from_numpy(plain.observables["w"])
    first, bias, last, offset = w[..., :12].unflatten(-1, (4, 3)), w[..., 12:16], w[..., 16:20], w[..., 20:]
    hidden = torch.tanh(torch.einsum("cdhi,ni->cdnh", first, x) + bias[:, :, None])
    expected = ((hidden @ last[..., None])[..., 0] + offset - y[:, 0]) ** 2
    np.testing.assert_allclose(found.losses("train").values, expected, rtol=1e-5, atol=1e-7)
    order = found.dataset["indices_some"].values
    assert len(set(order)) == len(order) == count * found.settings["batch_size"] and list(order) != sorted(order)
    np.testing.assert_array_equal(found.losses("some").values, found.losses("train").values[:, :, order])
    at_reference = found.init_losses("train")
    assert at_reference is not None and at_reference.mean() == pytest.approx(plain.init_loss, rel=1e-5)


def test_probes_that_a_run_of_whole_batches_lacks() -> None:
    x, y = samples()
    with pytest.raises(ValueError, match=r"probes\['a'\] has 24 samples, fewer than 2 batches of 24: give 1 or fewer"):
        both(probes={"a": ((x, y), 2)}, batch_size=None)


class Noisy(nn.Module):
    """Dropout and statistics of batches, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.drop = nn.Dropout(0.3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(torch.tanh(self.first(x)))))


def test_models_that_draw_and_write() -> None:
    """The chains' random numbers and batch statistics are those of chains without probes."""
    model = Noisy()
    before = copy.deepcopy(model.state_dict())
    plain, found = both(model, probes={"a": samples()})
    assert_same_estimate(found.llc(), plain)
    assert np.isfinite(found.losses("a").values).all()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and model.training


def test_loaders() -> None:
    """Of the run and of probes; a loader decides about batches, and gives as many as it is asked for."""

    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(*samples()), 5, shuffle=True, generator=torch.Generator().manual_seed(3))

    ordered = DataLoader(TensorDataset(*samples()), 5)
    options: dict[str, Any] = {"batch_size": None, "nbeta": 5.0}
    plain = llc_fast.estimate_llc(mlp(), loader(), F.mse_loss, **(SETTINGS | options))
    probes = {"all": ordered, "two": (ordered, 2)}
    found = llc_fast.sample(mlp(), loader(), F.mse_loss, probes=probes, **(SETTINGS | options))
    assert_same_estimate(found.llc(), plain)
    values = found.losses("all").values
    assert values.shape == (3, 15, 24)
    np.testing.assert_array_equal(found.losses("two").values, values[:, :, :10])
    with pytest.raises(ValueError, match=r"probes\['many'\] gives 5 batches, fewer than 9"):
        llc_fast.sample(mlp(), samples(), F.mse_loss, probes={"many": (ordered, 9)}, **SETTINGS)


# ---- tokens ------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).cumsum(1)))


def sequences(count: int = 12, least: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(least)
    lengths = torch.randint(least, 8, (count,), generator=generator).tolist()
    lengths[0] = 7
    return [torch.randint(11, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens(dtype: str) -> None:
    """Losses of every token at every draw, NaN where there is padding; ids and masks beside them."""
    model, data = Words().eval(), sequences()
    whole = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(9))
    options: dict[str, Any] = {"observables": {"w": weights}, "batch_size": 4, "probe_dtype": dtype}
    plain, found = both(model, data, "next-token", probes={"ragged": data, "whole": whole}, per="token", **options)
    assert_same_estimate(found.llc(), plain)
    stored, mask = found.dataset["loss_ragged"].values, found.dataset["token_mask_ragged"].values
    assert stored.shape == (3, 15, 12, 6) and stored.dtype == dtype and "token_mask_whole" not in found.dataset
    lengths = np.array([len(row) for row in data])
    np.testing.assert_array_equal(mask, np.arange(6) < lengths[:, None] - 1)
    np.testing.assert_array_equal(np.isnan(stored), np.broadcast_to(~mask, stored.shape))
    ids = found.input_ids("ragged")
    assert ids is not None and ids[0].tolist() == data[0] and np.array_equal(found.input_ids("whole"), whole)
    w = torch.from_numpy(plain.observables["w"][1, 7]).float()
    params = dict(zip(dict(model.named_parameters()), torch.split(w, [66, 66, 11]), strict=True))
    shaped = {name: params[name].view(p.shape) for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model, shaped, (whole,))[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten(), reduction="none").view(4, 6)
    rtol = 1e-4 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(found.losses("whole").values[1, 7], expected.detach(), rtol=rtol)


def test_sequences_by_sample() -> None:
    """The sum over the predicted tokens of a sequence by their mean number: the mean is the run's loss. And its ids."""
    model, data = Words().eval(), sequences()
    options: dict[str, Any] = {"batch_size": 4, "probes": {"a": data}}
    found = llc_fast.sample(model, data, "next-token", **(SETTINGS | options))
    by_token = llc_fast.sample(model, data, "next-token", per="token", **(SETTINGS | options))
    tokens = by_token.dataset["loss_a"].values
    expected = np.nansum(tokens, axis=3) / (~np.isnan(tokens[0, 0])).sum(1).mean()
    np.testing.assert_allclose(found.losses("a").values, expected, rtol=1e-5)
    assert np.mean(found.init_losses("a")) == pytest.approx(found.llc().init_loss, rel=1e-5)
    ids = found.input_ids("a")
    assert ids is not None and ids[0].tolist() == data[0]


# ---- stores that survive -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """All files of a store by their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(store: Path, **options: Any) -> Samples:
    x, y = samples()
    probes = {"a": (x, y), "b": ((x, y), 1)}
    chosen = arguments(SETTINGS | {"num_draws": 120, "probes": probes, "sketch": 6} | options)
    return llc_fast.sample(mlp(), (x, y), F.mse_loss, store=store, **chosen)


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_call_opens_what_is_done(tmp_path: Path) -> None:
    first = run(tmp_path / "run.zarr", lr=None)
    before = contents(tmp_path / "run.zarr")
    with no_step():
        again = run(tmp_path / "run.zarr", lr=None)
    assert beside(tmp_path) == ["run.zarr"] and contents(tmp_path / "run.zarr") == before
    assert_same_estimate(again.llc(), first.llc())
    assert_same_estimate(Samples.open(tmp_path / "run.zarr").llc(), first.llc())
    np.testing.assert_array_equal(again.losses("a").values, first.losses("a").values)


def test_settings_of_an_earlier_estimate() -> None:
    """The same chains as with these settings given one by one, and no pilots."""
    x, y = samples()
    length: dict[str, Any] = {"num_draws": 40, "num_burnin": 20, "progress": False}
    earlier = llc_fast.estimate_llc(mlp(), (x, y), F.mse_loss, sampler="sghmc", lr=2e-4, nbeta=9.0, **length)
    found = llc_fast.sample(mlp(), (x, y), F.mse_loss, settings=earlier.settings, **length).llc()
    np.testing.assert_array_equal(found.loss_trace, earlier.loss_trace)
    assert (found.settings["sampler"], found.nbeta) == ("sghmc", 9.0)


@pytest.mark.parametrize("strategy", ["sequential", "batched", None])
def test_interrupted_and_resumed(tmp_path: Path, strategy: str | None) -> None:
    """Ctrl-C: what there is opens and says that it is partial; the same call goes on, to the same bytes."""
    whole = run(tmp_path / "whole.zarr", strategy=strategy)
    with interrupted_after(50):
        partial = run(tmp_path / "run.zarr", strategy=strategy)
    assert partial.is_partial and partial.llc().is_partial and sum(partial.draws_done) > 0
    opened = Samples.open(tmp_path / "run.zarr")
    assert opened.is_partial and opened.draws_done == partial.draws_done
    assert "run.zarr.checkpoint" in beside(tmp_path)
    for chain, count in enumerate(opened.draws_done):
        values = opened.dataset["loss_a"].values[chain]
        np.testing.assert_array_equal(values[:count], whole.dataset["loss_a"].values[chain, :count])
    resumed = run(tmp_path / "run.zarr", strategy=strategy)
    assert not resumed.is_partial and beside(tmp_path) == ["run.zarr", "whole.zarr"]
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")
    assert_same_estimate(resumed.llc(), whole.llc())


_KILLED = """
from pathlib import Path
from llc_fast.chains.run import Monitor, after_each_step
import llc_fast.chains.checkpoint
import test_sampling

left = iter(range(int(sys.argv[1]), -1, -1))
waits_for = Path(sys.argv[4])
Monitor.interval = 0.0


def kill(taken):
    if next(left, 0) == 0:
        if waits_for.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)  # whoever writes it has its turn


with after_each_step(kill):
    test_sampling.run(Path(sys.argv[2]), strategy=sys.argv[3] or None, checkpoint_interval=0.0)
"""


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_killed_and_resumed(tmp_path: Path, strategy: str) -> None:
    """kill -9 at any step, again and again: the store ends with the bytes of one that nobody killed."""
    whole = run(tmp_path / "whole.zarr", strategy=strategy)
    here = str(Path(__file__).parent)
    for count in (0, 60, 200) if strategy == "sequential" else (0, 30, 60):  # of 372 steps and 124
        environment = {"PYTHONPATH": here}
        body = f"sys.path.insert(0, {here!r})\n" + _KILLED
        waits_for = tmp_path / ("run.zarr.checkpoint" if count >= 60 else "run.zarr")
        arguments = count, tmp_path / "run.zarr", strategy, waits_for
        code, _, errors = Script(body, tmp_path, *arguments, **environment).finish()
        assert code == -9, errors
        assert Samples.open(tmp_path / "run.zarr").is_partial
    assert (tmp_path / "run.zarr.checkpoint").exists()
    resumed = run(tmp_path / "run.zarr", strategy=strategy)
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")
    assert beside(tmp_path) == ["run.zarr", "whole.zarr"]
    assert_same_estimate(resumed.llc(), whole.llc())


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    """The draws are made again."""
    whole = run(tmp_path / "whole.zarr", lr=None)
    with pytest.raises(ZeroDivisionError), llc_fast.chains.run.after_each_step(_fails_at_100):
        run(tmp_path / "run.zarr", lr=None)
    assert Samples.open(tmp_path / "run.zarr").is_partial
    assert_same_estimate(run(tmp_path / "run.zarr", lr=None).llc(), whole.llc())
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def _fails_at_100(taken: Any) -> None:
    if not taken.is_pilot and taken.step == 100:
        1 / 0  # noqa: B018


@pytest.mark.parametrize("killed", [False, True])
def test_chains_that_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    """With a smaller step size, after most of them diverged: the store is that of the new ones alone."""
    calls = iter([True])
    monkeypatch.setattr("llc_fast.estimate.may_begin_again", lambda *_: next(calls, False))
    if killed:  # at once after they have started anew
        left = iter(range(9))
        with pytest.raises(ZeroDivisionError), llc_fast.chains.run.after_each_step(lambda t: _fails_at_last(t, left)):
            run(tmp_path / "run.zarr", lr=None, strategy="batched")
        calls = iter([True])
    found = run(tmp_path / "run.zarr", lr=None, strategy="batched")
    plain = llc_fast.estimate_llc(mlp(), samples(), F.mse_loss, **arguments(SETTINGS | {"lr": None}))
    assert found.settings["lr"] == plain.settings["lr"] / 4 == found.llc().settings["lr"]
    assert found.llc().diagnostics["restarts"] == 1 and not found.is_partial
    np.testing.assert_array_equal(found.dataset["draw_loss"].values, found.llc().loss_trace[:, 4:])
    assert beside(tmp_path) == ["run.zarr"]


def _fails_at_last(taken: Any, left: Any) -> None:
    if not taken.is_pilot and taken.step == 5 and next(left) == 1:  # the second time that they come here
        1 / 0  # noqa: B018


def test_a_store_that_was_deleted(tmp_path: Path) -> None:
    """Its checkpoint is of no use, and is not gone on from."""
    with interrupted_after(50):
        run(tmp_path / "run.zarr")
    shutil.rmtree(tmp_path / "run.zarr")
    whole = run(tmp_path / "whole.zarr")
    assert_same_estimate(run(tmp_path / "run.zarr").llc(), whole.llc())
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_a_store_of_another_run(tmp_path: Path) -> None:
    """Says what differs, and leaves it as it is."""
    run(tmp_path / "run.zarr")
    before, (x, y) = contents(tmp_path / "run.zarr"), samples()
    for options, said in (
        ({"nbeta": 6.0}, "nbeta was 5.0, is 6.0"),
        ({"probes": {"a": (x, y)}}, "probes was"),
        ({"num_draws": 121}, "schedule was"),
        ({"probe_dtype": "float16"}, 'probe_dtype was "float32", is "float16"'),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: .*{said}"):
            run(tmp_path / "run.zarr", **options)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="store="):
        run(tmp_path / "file")
    assert contents(tmp_path / "run.zarr") == before and (tmp_path / "file").read_text() == "mine"


_RANKS = """
from pathlib import Path
import test_sampling

for _ in range(2):  # then it is there
    found = test_sampling.run(Path(sys.argv[1]), strategy="sequential")
    assert not found.is_partial and found.llc().loss_trace.shape[0] == 3
print("done", flush=True)
"""


def test_several_processes(tmp_path: Path) -> None:
    """Each writes its own chains, into the bytes that one process writes."""
    run(tmp_path / "whole.zarr", strategy="sequential")
    body = f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + _RANKS
    results = launch(tmp_path, body, 2, tmp_path / "run.zarr")
    all_well(results)
    assert all("done" in output for _, output, _ in results)
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")
    assert beside(tmp_path) == ["run.zarr", "whole.zarr"]


# ---- arguments ---------------------------------------------------------------------------------------------


def _each(output: Tensor, target: Tensor) -> Tensor:
    return (output - target)[:, 0].abs()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": [1]}, TypeError, "probes must be a mapping from names to data, got list"),
        ({"probes": {3: None}}, TypeError, "probes must have names that are texts, got 3"),
        ({"probes": {"a": (samples(), 0)}}, ValueError, r"probes\['a'\] must have at least 1 batch, got 0"),
        ({"per": "pixel"}, ValueError, 'per must be "sample" or "token", got \'pixel\''),
        (
            {"per": "token", "probes": {"a": samples()}, "loss_fn": _each},
            ValueError,
            "losses of single tokens can't be",
        ),
        ({"probe_dtype": "int8"}, ValueError, "probe_dtype must be"),
        ({"probe_loss": 3}, TypeError, "probe_loss must be callable"),
        ({"checkpoint": "a"}, TypeError, "checkpoint is not an argument of sample"),
        ({"target_error": 0.1}, ValueError, "target_error=0.1 finds the length of the chains on the way"),
        ({"max_seconds": 3}, ValueError, "give num_draws instead"),
        ({"num_chain": 3}, TypeError, r"sample\(\) got an unexpected keyword argument 'num_chain'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llc_fast.sample(mlp(), samples(), **(SETTINGS | {"loss_fn": F.mse_loss} | options))


def test_without_probes() -> None:
    """The estimate alone, with the losses of the draws."""
    plain, found = both()
    assert found.probes == () and np.array_equal(found.dataset["draw_loss"].values, plain.loss_trace[:, 4:])


# ---- samples of unequal length -----------------------------------------------------------------------------------


def test_samples_weigh_by_their_tokens() -> None:
    """Where the run's loss is a mean over tokens: their sum over the mean number, so that the plain mean is the run's.

    Padding counts neither as a token nor as a loss of 0; a store of tokens gives the same.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(8, (30, 6), generator=generator)
    y = torch.randint(8, (30, 6), generator=generator)
    y[:, 1:][torch.rand(30, 5, generator=generator) < 0.4] = -100
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), _Transposed())
    settings: dict[str, Any] = {"lr": 1e-3, "nbeta": 20.0, "localization": 5.0, "num_chains": 1, "batch_size": 10}
    settings |= {"num_burnin": 0, "num_draws": 3, "seed": 0, "progress": False}
    taken = list[Tensor]()

    def look(draw: llc_fast.Draw) -> float:
        out = draw.outputs((x, y))
        taken.append(nn.functional.cross_entropy(out, y, reduction="none"))
        return 0.0

    loss = nn.CrossEntropyLoss()
    stores = {
        per: llc_fast.sample(
            model, (x, y), loss, probes={"p": (x, y)}, per=per, observables={"look": look}, **settings
        )
        for per in ("sample", "token")
    }  # fmt: skip
    by_hand = np.stack([t.sum(1).numpy() / float((y != -100).sum() / 30) for t in taken[:3]])
    for found in stores.values():
        np.testing.assert_allclose(found.losses("p", per="sample").values[0], by_hand, rtol=1e-5)
    with torch.no_grad():
        assert np.mean(stores["sample"].init_losses("p")) == pytest.approx(float(loss(model(x), y)), rel=1e-5)


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
