"""λ̂ while a model is trained: the right numbers at the right steps, and training that nobody can tell apart."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import LENGTH, VOCABULARY, gpt2, transformers
from processes import all_well, launch
from runs import interrupted_after
from torch import Tensor, nn

import llc_fast
from llc_fast.logs import Metrics
from llc_fast.monitor import LLCMonitor, unwrapped
from llc_fast.result import LLCResult
from llc_fast.support.randomness import same_states

mse = nn.functional.mse_loss
SHORT: dict[str, Any] = {"num_chains": 2, "num_draws": 12, "num_burnin": 6, "lr": 1e-4, "progress": False}
"""Estimates of a moment."""


def numbers() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(48, 3, generator=generator), torch.randn(48, 1, generator=generator)


def network() -> nn.Module:
    """With dropout, running averages, and a part that is frozen in another mode than the rest."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1)
    )
    model[4].eval().requires_grad_(False)
    return model


def monitor_of(**more: Any) -> LLCMonitor:
    return LLCMonitor(numbers(), mse, **{**SHORT, **more})


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training goes on from, and what estimates might have touched."""
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": list(np.random.get_state()),  # type: ignore[arg-type]
        "python": list(random.getstate()),
        "threads": [torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")],
        "flags": [torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()],
        "inference": [torch.is_inference_mode_enabled(), str(torch.get_default_dtype())],
    }


def trained(monitor: LLCMonitor | None, where: str = "plain") -> tuple[list[float], dict[str, Any]]:
    """A loop with accumulated gradients; the monitor comes by between two of them, when gradients are there."""
    model, losses = network(), list[float]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*numbers()), batch_size=8, shuffle=True)
    step = 0
    for _ in range(2):
        for x, y in loader:
            x = x + 0.01 * np.random.randn() + 0.01 * random.random()
            loss = mse(model(x), y)
            loss.backward()
            losses.append(loss.item())
            step += 1
            if monitor is not None:
                before = [p.grad for p in model.parameters()]
                with {
                    "plain": torch.enable_grad(),
                    "no_grad": torch.no_grad(),
                    "inference": torch.inference_mode(),
                    "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
                }[where]:
                    monitor(model, step)
                assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))
            if step % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
    return losses, everything(model, optimizer)


# ---- a loop of your own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["plain", "no_grad", "inference", "autocast"])
def test_training_is_the_same_bit_for_bit(where: str) -> None:
    without, monitor = trained(None), monitor_of(every=3)
    watched = trained(monitor, where)
    assert sorted(monitor.results) == [3, 6, 9, 12] and not monitor.errors
    assert watched[0] == without[0]
    for name, value in without[1].items():
        assert same_states(watched[1][name], value), name
    assert any(grad is not None for grad in watched[1]["gradients"]) is any(
        grad is not None for grad in without[1]["gradients"]
    )


@pytest.mark.parametrize("where", ["no_grad", "inference", "autocast"])
def test_it_does_not_matter_where_it_is_called(where: str) -> None:
    plain, other = monitor_of(steps=[5]), monitor_of(steps=[5])
    trained(plain), trained(other, where)
    np.testing.assert_array_equal(plain.results[5].loss_trace, other.results[5].loss_trace)


def test_it_is_estimate_llc_in_eval_mode() -> None:
    """Dropout and batch statistics are left out; ``mode="unchanged"`` has them, and the result says so."""
    model, monitor = network(), monitor_of()
    result = monitor(model, 7)
    assert result is not None and monitor.results == {7: result}
    model.eval()
    given = {**SHORT, "progress": False}
    same = llc_fast.estimate_llc(model, numbers(), mse, **given)
    np.testing.assert_array_equal(result.loss_trace, same.loss_trace)
    assert "training-mode" not in [w.code for w in result.warnings]
    model.train()
    as_is = monitor_of(mode="unchanged")(model, 7)
    assert as_is is not None and "training-mode" in [w.code for w in as_is.warnings]


def test_modes_are_flags() -> None:
    """Modules that do more in ``train()`` than that, such as merging weights, are not called."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            if hasattr(self, "is_made"):
                raise AssertionError("train() was called")
            return super().train(mode)

    model = nn.Sequential(Merging(3, 1))
    model[0].is_made = True
    assert monitor_of()(model, 1) is not None
    assert model[0].training


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"every": 4}, [0, 4, 8]),
        ({"steps": [9, 1, 4]}, [1, 4, 9]),
        ({}, list(range(10))),
        ({"every": "epoch"}, list(range(10))),
    ],
)
def test_when_it_is_due(options: dict[str, Any], due: list[int]) -> None:
    monitor, model = monitor_of(num_draws=2, num_burnin=0, **{**options}), nn.Linear(3, 1)
    returned = [step for step in range(10) if monitor(model, step) is not None]
    assert returned == due == list(monitor.results)


def test_an_estimate_is_short_unless_somebody_says() -> None:
    for given, expected in [
        ({}, 4000),
        ({"max_seconds": 9.0}, None),
        ({"num_draws": 5}, None),
        ({"preset": "paper"}, None),
    ]:
        assert LLCMonitor(numbers(), mse, **given)._settings.get("max_gradients") == expected
    language = LLCMonitor(numbers(), mse, preset="language-model")
    assert language._settings["max_gradients"] == 4000  # nβ and γ alone


# ---- what it finds -----------------------------------------------------------------------------------------


def test_results_as_a_dataset_and_a_picture(tmp_path: Path) -> None:
    monitor = monitor_of(every=3)
    with pytest.raises(ValueError, match="no results to plot"):
        monitor.plot()
    trained(monitor)
    found = monitor.to_dataset()
    assert found.step.values.tolist() == [3, 6, 9, 12] and found.attrs["partial"] == 0
    for step, result in monitor.results.items():
        row = found.sel(step=step)
        assert float(row.llc_mean) == result.llc_mean and float(row.init_loss) == result.init_loss
        assert str(row.warning_codes.values) == " ".join(w.code for w in result.warnings)
    upper, lower = monitor.plot(tmp_path / "curve.png").axes
    assert lower.lines[0].get_ydata().tolist() == [r.init_loss for r in monitor.results.values()]
    assert upper.lines and (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_keeps_results(tmp_path: Path) -> None:
    first = monitor_of(every=6, folder=tmp_path / "run")
    trained(first)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-12.npz", "step-6.npz"]
    again = monitor_of(every=5, folder=tmp_path / "run")
    assert sorted(again.results) == [6, 12]
    trained(again)
    assert again.to_dataset().step.values.tolist() == [5, 6, 10, 12]
    assert again.results[6].llc_mean == first.results[6].llc_mean
    (tmp_path / "run" / "step-3.npz").write_text("no result")
    with pytest.raises(ValueError, match=r"step-3\.npz is no result"):
        monitor_of(folder=tmp_path / "run")


def test_each_warning_comes_once_and_says_when() -> None:
    monitor = monitor_of(every=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(monitor)
    issued = [w for w in caught if issubclass(w.category, llc_fast.LLCWarning)]
    codes = [w.message.code for w in issued]  # type: ignore[union-attr]
    assert {code for r in monitor.results.values() for code in (w.code for w in r.warnings)} == set(codes) - {"scale"}
    assert len(set(codes)) == len(codes) and str(issued[0].message).startswith("Step 3: ")
    assert issued[0].filename == __file__


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    trained(monitor_of(every=12))
    assert capsys.readouterr().err == ""
    monitor = monitor_of(every=12, progress=True)
    trained(monitor)
    assert re.fullmatch(
        r"LLC: step 12: λ̂ = -?[\d.e-]+ ± [\d.e-]+ in [\d.]+ s( \([\w, -]+\))?\n", capsys.readouterr().err
    )


def test_it_says_before_training_what_it_will_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llc_fast.cost._WORTH_SAYING", 0.0)
    monitor_of(steps=[100], progress=True)(nn.Linear(3, 1), 0)
    assert "LLC: 36 gradients on 48 samples each" in capsys.readouterr().err


# ---- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, ValueError, "every"),
        ({"every": "saves"}, ValueError, "every='saves' is unknown; choose one of: 'save', 'evaluate', 'epoch'"),
        ({"every": 5, "steps": [1]}, ValueError, "every and steps are both given"),
        ({"steps": [-1]}, ValueError, "steps"),
        ({"mode": "train"}, ValueError, "mode='train' is unknown"),
        ({"on_error": "pass"}, ValueError, "on_error='pass' is unknown"),
        ({"name": ""}, ValueError, "name=''"),
        ({"checkpoint": "x.npz"}, TypeError, "checkpoint is not for monitors: give folder="),
        ({"warm_start": None}, TypeError, "warm_start is not for monitors"),
        ({"num_chain": 3}, TypeError, "unexpected keyword argument 'num_chain'"),
        ({"num_chains": 0}, ValueError, "num_chains"),
        ({"sampler": "slgd"}, ValueError, "slgd"),
        ({"log": "runs"}, ValueError, "log='runs' must be a name that ends in .csv"),
        ({"log": 3}, TypeError, "log must be"),
    ],
)
def test_arguments_are_looked_at_first(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        monitor_of(**options)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_loss_that_fails_is_an_error_before_training(on_error: str) -> None:
    """At the first step that the monitor sees, though no estimate is due there."""
    monitor = LLCMonitor(numbers(), mse, steps=[1000], on_error=on_error, **SHORT)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        monitor(nn.Linear(4, 1), 1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        monitor(3, 1)  # type: ignore[arg-type]


def test_an_estimate_that_fails_does_not_end_training() -> None:
    """Nothing of the failure is held but its text."""
    model, monitor = nn.Linear(3, 1), monitor_of(every=1)
    assert monitor(model, 1) is not None
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.warns(
        RuntimeWarning, match=r"LLCMonitor, step 2: there is no estimate: ValueError: .*Training goes on"
    ):
        assert monitor(model, 2) is None
    assert list(monitor.results) == [1] and set(monitor.errors) == {2}
    with torch.no_grad():
        model.weight.copy_(before)
    assert monitor(model, 3) is not None
    monitor = monitor_of(every=1, on_error="raise")
    monitor(model, 1)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        monitor(model, 2)


def test_a_log_that_fails_does_not_end_training() -> None:
    written = []

    def fails(metrics: Metrics, step: int) -> None:
        raise OSError("no space left")

    monitor = monitor_of(every=1, log=[fails, lambda metrics, step: written.append(step)])
    with pytest.warns(RuntimeWarning, match="step 1: FunctionLog failed: OSError: no space left"):
        assert monitor(nn.Linear(3, 1), 1) is not None
    assert written == [1] and list(monitor.results) == [1]


def test_ctrl_c_keeps_what_there_is_and_ends_training(tmp_path: Path) -> None:
    written: list[int] = []
    monitor = monitor_of(every=1, num_draws=4000, log=lambda metrics, step: written.append(step), folder=tmp_path)
    model = nn.Linear(3, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), interrupted_after(40):
        monitor(model, 1)
    assert monitor.results[1].is_partial and written == [1] and (tmp_path / "step-1.npz").exists()
    assert monitor.to_dataset().attrs["partial"] == 1
    assert same_states(model.state_dict(), before)


# ---- models that others have wrapped -----------------------------------------------------------------------


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(3, 1)
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(nn.DataParallel(compiled)) is model  # type: ignore[arg-type]
    result, plain = monitor_of()(compiled, 1), monitor_of()(model, 1)  # type: ignore[arg-type]
    assert result is not None and plain is not None
    np.testing.assert_array_equal(result.loss_trace, plain.loss_trace)


_DISTRIBUTED = """
import torch.distributed as dist
from torch import nn
dist.init_process_group("gloo")

def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(48, 3, generator=generator), torch.randn(48, 1, generator=generator)

def trained(monitor, name):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(10 + rank)  # its own dropout
    x, y = (t[rank::size] for t in data())
    losses = []
    for step in range(1, 7):
        loss = nn.functional.mse_loss(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            monitor(wrapped, step)
            if step == 4 and rank == 0:
                torch.save(model.state_dict(), name)
    return losses, model.state_dict(), torch.get_rng_state()

without = trained(None, "")
written = []
logs = [lambda metrics, step: written.append(step), *["llc.csv"] * (rank == 0)]
monitor = llc_fast.LLCMonitor(data(), nn.functional.mse_loss, every=2, num_chains=3, num_draws=12, num_burnin=6,
    lr=1e-4, log=logs, execution=llc_fast.Execution(strategy="sequential"))
watched = trained(monitor, "step4.pt")
assert watched[0] == without[0]
assert torch.equal(watched[2], without[2])
for key, value in without[1].items():
    assert torch.equal(watched[1][key], value), key
assert written == ([2, 4, 6] if rank == 0 else []), written
for step, result in monitor.results.items():
    result.save(f"{step}.{rank}.npz")

from torch.distributed.fsdp import fully_shard
sharded = nn.Linear(3, 1)
fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (size,)))
try:
    monitor(sharded, 8)
except ValueError as error:
    print("refused", error)
dist.destroy_process_group()
"""


def test_processes_share_the_chains(tmp_path: Path) -> None:
    """Bits as of one process at the weights and averages of rank 0; training as without; rank 0 logs."""
    results = launch(tmp_path, _DISTRIBUTED, 2)
    all_well(results)
    ranks = [LLCResult.load(tmp_path / f"4.{rank}.npz") for rank in range(2)]
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)).eval()
    model.load_state_dict(torch.load(tmp_path / "step4.pt"))
    given = {**SHORT, "num_chains": 3, "execution": llc_fast.Execution(strategy="sequential")}
    alone = llc_fast.estimate_llc(model, numbers(), mse, **given)
    for found in ranks:
        np.testing.assert_array_equal(found.loss_trace, alone.loss_trace)
        assert found.llc_mean == alone.llc_mean
    assert len((tmp_path / "llc.csv").read_text().splitlines()) == 4
    assert "LLC: step 2" in results[0][2] and "LLC: step" not in results[1][2]


_TRAINERS = """
import test_monitor
from pathlib import Path
test_monitor.transformers()
if sys.argv[1] == "transformers":
    def trained(monitor, name):
        done = test_monitor.Trained(Path(name), monitor)
        assert type(done.trainer.model_wrapped).__name__ == "DistributedDataParallel"
        return done.losses, done.model.state_dict()
    monitor = test_monitor.token_monitor(on_error="raise")
else:
    os.environ["TORCHELASTIC_RUN_ID"] = "1"  # as torchrun does
    def trained(monitor, name):
        losses, module, trainer = test_monitor.fitted(Path(name), monitor, devices=2, strategy="ddp")
        assert trainer.world_size == 2
        return losses, module.state_dict()
    monitor = test_monitor.monitor_of(on_error="raise")
without, watched = trained(None, "without"), trained(monitor, "with")
assert watched[0] == without[0]
assert all(torch.equal(watched[1][key], value) for key, value in without[1].items())
print({step: result.llc_mean for step, result in monitor.results.items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_trainers_of_two_processes(trainer: str, tmp_path: Path) -> None:
    head = f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    results = launch(tmp_path, head + _TRAINERS, 2, trainer)
    all_well(results)
    assert results[0][1].splitlines()[-1] == results[1][1].splitlines()[-1] != "{}"


# ---- transformers ------------------------------------------------------------------------------------------


class Chunks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """What a Trainer is given: sequences with labels, as many as 40."""

    ids = torch.randint(VOCABULARY, (40, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[k], "labels": self.ids[k]}


def token_monitor(data: Any = None, **more: Any) -> LLCMonitor:
    return LLCMonitor(Chunks.ids if data is None else data, "next-token", **{**SHORT, "batch_size": 8, **more})


class Trained:
    """What a Trainer has done with a small model."""

    def __init__(
        self, folder: Path, monitor: LLCMonitor | None, *, model: Any = None, resume: Any = None, **more: Any
    ) -> None:
        package, losses = transformers(), list[float]()
        package.set_seed(3)
        made = gpt2() if model is None else model()

        class Trainer(package.Trainer):  # type: ignore[misc,name-defined]
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                loss = super().training_step(*args, **kwargs)
                losses.append(loss.item())
                return loss

        options = {
            "max_steps": 6,
            "save_steps": 2,
            "logging_steps": 3,
            "gradient_accumulation_steps": 2,
            "report_to": [],
        }
        options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
        arguments = package.TrainingArguments(str(folder), **(options | more))
        self.trainer = Trainer(
            model=made,
            args=arguments,
            train_dataset=Chunks(),
            eval_dataset=Chunks(),
            callbacks=[monitor] if monitor else None,
        )
        self.trainer.train(resume_from_checkpoint=resume)
        self.model, self.losses, self.random = made, losses, torch.get_rng_state()
        self.history: list[dict[str, Any]] = self.trainer.state.log_history


@pytest.fixture(autouse=True)
def quiet_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|accelerate|lightning|torch)\.")
        yield


def test_transformers_trains_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Dropout is on; old checkpoints are deleted on the way; λ̂ is that of each checkpoint."""
    without = Trained(tmp_path / "without", None, save_total_limit=1)
    monitor = token_monitor()
    watched = Trained(tmp_path / "with", monitor, save_total_limit=1)
    assert list(monitor.results) == [2, 4, 6] and not monitor.errors
    assert watched.losses == without.losses and len(without.losses) == 12
    assert same_states(watched.model.state_dict(), without.model.state_dict())
    assert torch.equal(watched.random, without.random)
    optimizers = [torch.load(tmp_path / name / "checkpoint-6" / "optimizer.pt") for name in ("without", "with")]
    assert same_states(*optimizers)
    assert watched.model.training
    ours = [entry for entry in watched.history if "llc/mean" in entry]
    assert [e["step"] for e in ours] == [2, 4, 6] and ours[1]["llc/mean"] == monitor.results[4].llc_mean
    timed = ("runtime", "per_second")

    def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [entry for entry in history if "llc/mean" not in entry]
        return [{k: v for k, v in e.items() if not k.endswith(timed)} for e in kept]

    assert untimed(watched.history) == untimed(without.history)
    last = transformers().GPT2LMHeadModel.from_pretrained(tmp_path / "with" / "checkpoint-6").eval()
    same = llc_fast.estimate_llc(last, Chunks.ids, "next-token", batch_size=8, **SHORT)
    np.testing.assert_array_equal(same.loss_trace, monitor.results[6].loss_trace)


def test_a_trainer_that_resumes_continues_the_table(tmp_path: Path) -> None:
    table = tmp_path / "llc.csv"
    whole = token_monitor(log=table)
    Trained(tmp_path / "run", whole)
    expected = table.read_text().splitlines()
    assert [line.partition(",")[0] for line in expected] == ["step", "2", "4", "6"]
    again = token_monitor(log=table, folder=tmp_path / "results")
    resumed = Trained(tmp_path / "run", again, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert list(again.results) == [6]
    assert again.results[6].llc_mean == whole.results[6].llc_mean
    lines = table.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "2", "4", "6"]
    assert [line.split(",")[:4] for line in lines] == [line.split(",")[:4] for line in expected]
    history = [entry["step"] for entry in resumed.history if "llc/mean" in entry]
    assert history == [2, 6]  # checkpoint-4 was written before its estimate
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert "llc/mean" in str(state["log_history"])


@pytest.mark.parametrize(
    ("options", "more", "steps"),
    [
        ({"every": 4}, {}, [4]),
        ({"steps": [0, 1, 5]}, {}, [0, 1, 5]),
        ({"every": "evaluate"}, {"eval_strategy": "steps", "eval_steps": 3}, [3, 6]),
        ({"every": "epoch"}, {"num_train_epochs": 2, "max_steps": -1}, [5, 10]),
        ({}, {"save_strategy": "no"}, []),
    ],
)
def test_when_a_trainer_comes_by(
    options: dict[str, Any], more: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    monitor = token_monitor(**options)
    Trained(tmp_path, monitor, **more)
    assert list(monitor.results) == steps


def test_a_trainer_with_adapters_checkpoints_of_activations_and_their_data(tmp_path: Path) -> None:
    """LoRA with gradient checkpointing, on a data set of Hugging Face's; only the adapters are sampled."""
    peft, datasets = pytest.importorskip("peft"), pytest.importorskip("datasets")

    def adapted() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))

    rows = datasets.Dataset.from_dict({"input_ids": Chunks.ids.tolist()})
    more = {"gradient_checkpointing": True, "max_steps": 4}
    without = Trained(tmp_path / "without", None, model=adapted, **more)
    monitor = token_monitor(rows)
    watched = Trained(tmp_path / "with", monitor, model=adapted, **more)
    assert watched.losses == without.losses
    assert same_states(watched.model.state_dict(), without.model.state_dict())
    trainable = sum(p.numel() for p in watched.model.parameters() if p.requires_grad)
    assert [r.settings["num_parameters"] for r in monitor.results.values()] == [trainable] * 2


def test_what_is_wrong_is_an_error_before_a_trainer_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data has the token id"):
        Trained(tmp_path, token_monitor(Chunks.ids + VOCABULARY))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_trainer_that_reports(tmp_path: Path) -> None:
    """To TensorBoard, beside its own run; and to wandb, by its own steps."""
    wandb = pytest.importorskip("wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        monitor = token_monitor()
        Trained(tmp_path, monitor, report_to=["tensorboard", "wandb"])
        assert run.summary["llc/mean"] == pytest.approx(monitor.results[6].llc_mean)
        assert run.summary["train/global_step"] == 6
    finally:
        run.finish()
    events = accumulator(str(tmp_path / "runs" / "llc"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("llc/mean")] == [
        (step, pytest.approx(r.llc_mean)) for step, r in monitor.results.items()
    ]


# ---- Lightning ---------------------------------------------------------------------------------------------


def fitted(folder: Path, monitor: LLCMonitor | list[LLCMonitor] | None, **more: Any) -> tuple[list[float], Any, Any]:
    """Losses, module and trainer of a small run, with validation and checkpoints every two steps."""
    lightning = pytest.importorskip("lightning")
    losses: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = mse(self(batch[0]), batch[1])
            losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val", mse(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    lightning.seed_everything(0, verbose=False)
    module, rows = Module(), torch.utils.data.TensorDataset(*numbers())
    saver = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1)
    monitors = monitor if isinstance(monitor, list) else [monitor] if monitor else []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        **(quiet | {"max_epochs": 2, "accumulate_grad_batches": 2} | more),
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*monitors, saver],
    )
    loader = torch.utils.data.DataLoader
    trainer.fit(module, loader(rows, batch_size=8, shuffle=True), loader(rows, batch_size=16))
    return losses, module, trainer


def test_lightning_trains_the_same_bit_for_bit(tmp_path: Path) -> None:
    """λ̂ is that of each checkpoint that is saved, the last of them too."""
    losses, module, _ = fitted(tmp_path / "without", None)
    state, drawn = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    monitor = LLCMonitor(numbers(), mse, **SHORT)
    watched, again, _ = fitted(tmp_path / "with", monitor)
    assert list(monitor.results) == [2, 4, 6] and not monitor.errors
    assert watched == losses and len(losses) == 12
    assert same_states(again.state_dict(), drawn) and torch.equal(torch.get_rng_state(), state)
    for step in (2, 4, 6):
        (file,) = (tmp_path / "with").glob(f"*step={step}.ckpt")
        saved, other = (torch.load(folder / file.name) for folder in (tmp_path / "with", tmp_path / "without"))
        assert same_states(saved["optimizer_states"], other["optimizer_states"])
        again.load_state_dict(saved["state_dict"])
        same = llc_fast.estimate_llc(again.eval(), numbers(), mse, **SHORT)
        np.testing.assert_array_equal(same.loss_trace, monitor.results[step].loss_trace)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 4}, [4]),
        ({"steps": [0, 1, 5]}, [0, 1, 5]),
        ({"every": "evaluate"}, [3, 6]),
        ({"every": "epoch"}, [3, 6]),
    ],
)
def test_when_lightning_comes_by(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    monitor = monitor_of(**options)
    fitted(tmp_path, monitor)
    assert list(monitor.results) == steps


def test_lightnings_own_step_and_loggers(tmp_path: Path) -> None:
    """The loss may be the module's `training_step`; two monitors log to the Trainer's logger under their names."""
    loggers = pytest.importorskip("lightning.pytorch.loggers")

    def loss_fn(model: Any, batch: Any) -> Any:
        return model.training_step(batch, 0)

    first = LLCMonitor(numbers(), loss_fn, every=3, **SHORT)
    second = LLCMonitor(numbers(), loss_fn, every=3, name="head", params="net.5", **SHORT)
    logger = loggers.CSVLogger(tmp_path, name="logs", version=0)
    fitted(tmp_path, [first, second], logger=logger)
    rows = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    for monitor, name in ((first, "llc/mean"), (second, "head/mean")):
        values = [row.split(",")[columns.index(name)] for row in rows[1:]]
        assert [float(v) for v in values if v] == [r.llc_mean for r in monitor.results.values()]
    assert first.results[3].settings["num_parameters"] > second.results[3].settings["num_parameters"] == 9


# ---- what trainers expect ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"), [("transformers.trainer_callback", "TrainerCallback"), ("lightning.pytorch", "Callback")]
)
def test_it_has_whatever_a_callback_has(module: str, name: str) -> None:
    transformers()
    base = getattr(pytest.importorskip(module), name)
    monitor = monitor_of()
    for attribute in dir(base):
        if not attribute.startswith("__") and attribute != "_generate_state_key":
            assert callable(getattr(base, attribute)) <= callable(getattr(monitor, attribute)), attribute
    with pytest.raises(AttributeError, match="'LLCMonitor' object has no attribute 'result'"):
        monitor.result  # noqa: B018


def test_it_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    monitor = monitor_of(every=3, log=tmp_path / "llc.csv")
    sent = pickle.loads(pickle.dumps(monitor))
    trained(monitor), trained(sent)
    assert list(sent.results) == list(monitor.results)
    copied = copy.deepcopy(sent)
    assert copied.results.keys() == sent.results.keys()


# ---- docs/monitor.md ---------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "monitor.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL) if PAGE.exists() else []
SMALLER = {
    "every=100": "every=250, num_draws=4",
    "max_steps=300, save_steps=100": "max_steps=4, save_steps=2",
    "num_draws=200": "num_draws=4",
}
"""What makes the examples short; the outputs on the page are of the examples as they are."""


@pytest.mark.skipif(not EXAMPLES, reason="a source distribution has no docs")
@pytest.mark.parametrize("k", range(3))
def test_the_examples_of_the_page(
    k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers()
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    text = EXAMPLES[k]
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    assert text != EXAMPLES[k]
    names: dict[str, Any] = {}
    exec(compile(text, "example", "exec"), names)
    assert list(names["monitor"].results) == [[250, 500], [2, 4], [250, 500]][k]
    assert all(result.schedule.num_draws == 4 for result in names["monitor"].results.values())
    assert capsys.readouterr().out
