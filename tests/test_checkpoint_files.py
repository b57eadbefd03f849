"""Which files are checkpoints, in which order, and what is in them: files that each library has made itself."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import gpt2, transformers
from runs import mlp
from torch import Tensor, nn

from llc_fast.checkpoint_files import by_step, checkpoints_in, found, has_weights, is_pattern, matching, read
from llc_fast.weights import WeightReader

# ---- which, and in what order ------------------------------------------------------------------------------


def _touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


_STEPS = {
    "Trainer": ["checkpoint-500", "checkpoint-1000", "checkpoint-90"],
    "Lightning": ["epoch=3-step=500.ckpt", "epoch=0-step=1000.ckpt", "epoch=9-step=90.ckpt"],
    "OLMo": ["step1000-unsharded", "step90-unsharded", "step500-tokens4B-unsharded"],
    "zeros": ["net_step000500.pt", "net_step000090.pt", "net_step001000.pt"],
    "iterations": ["iter_0000500.pth", "iter_0000090.pth", "iter_0001000.pth"],
    "DeepSpeed": ["global_step500", "global_step90", "global_step1000"],
    "epochs": ["epoch_3.pt", "epoch_20.pt", "epoch_100.pt"],
    "one number": ["my_model_v2_500.pt", "my_model_v2_1000.pt", "my_model_v2_90.pt"],
    "inside": [
        "checkpoint-500/model.safetensors",
        "checkpoint-1000/model.safetensors",
        "checkpoint-90/model.safetensors",
    ],
}


@pytest.mark.parametrize("kind", _STEPS)
def test_steps_are_numbers(tmp_path: Path, kind: str) -> None:
    """90 before 500 before 1000, whoever wrote the names; the folders' own numbers (of pytest here) are no steps."""
    names = [name if "." in name else f"{name}/model.pt" for name in _STEPS[kind]]
    _touch(tmp_path, *names)
    expected = [20, 100, 3] if kind == "epochs" else None
    ordered = by_step([tmp_path / name for name in _STEPS[kind]], "it")
    assert [step for step, _ in ordered] == sorted(expected or [90, 500, 1000])
    assert all(str(step) in path.relative_to(tmp_path).as_posix() for step, path in ordered)


def test_a_pattern_is_what_the_shell_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted or not, and as a folder; what a trainer writes beside is no checkpoint."""
    _touch(tmp_path, *(f"checkpoint-{k}/model.safetensors" for k in (1000, 500, 60)), "trainer_state.json")
    _touch(tmp_path, "checkpoint-500/optimizer.pt", "checkpoint-500/rng_state.pth", "checkpoint-500/scheduler.pt")
    _touch(tmp_path, "checkpoint-500/training_args.bin", "optimizer.bin", "logs/events", "rng_state_0.pth")
    monkeypatch.chdir(tmp_path)
    expected = [(60, "checkpoint-60"), (500, "checkpoint-500"), (1000, "checkpoint-1000")]
    for given in (
        ["checkpoint-*"],
        sorted(map(str, Path().glob("checkpoint-*"))),
        ["*"],
        ["."],
        ["checkpoint-?0", "c*00"],
    ):
        assert [(step, path.name) for step, path in found(given)] == expected, given
    assert found(["checkpoint-*/*"]) == [(k, Path(f"checkpoint-{k}/model.safetensors")) for k in (60, 500, 1000)]
    assert found(["checkpoint-500"]) == [(500, Path("checkpoint-500"))]  # the shell found one only
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [path for _, path in found(["~/checkpoint-*"])] == [tmp_path / name for _, name in expected]
    assert [path for _, path in found(["~/checkpoint-60", "~/checkpoint-500"])] == [
        tmp_path / n for _, n in expected[:2]
    ]


def test_one_folder(tmp_path: Path) -> None:
    """A trainer's, with the last model beside the checkpoints; a checkpoint, also with DeepSpeed's folder in it."""
    _touch(tmp_path, "model.safetensors", "checkpoint-5/pytorch_model.bin", "checkpoint-5/global_step5/x.pt")
    _touch(tmp_path, "checkpoint-40/pytorch_model.bin", "final/model.safetensors", "single/step_7.pt")
    checkpoints = [(5, tmp_path / "checkpoint-5"), (40, tmp_path / "checkpoint-40")]
    assert found([str(tmp_path)]) == checkpoints
    assert found([str(tmp_path / "checkpoint-5")]) == checkpoints[:1]
    assert found([str(tmp_path / "final")]) == [(0, tmp_path / "final")]
    assert found([str(tmp_path / "single")]) == [(7, tmp_path / "single" / "step_7.pt")]


def test_names_with_letters_of_patterns(tmp_path: Path) -> None:
    """A file that is there is meant itself."""
    [path] = _touch(tmp_path, "step_5[best].pt")
    _touch(tmp_path, "step_5b.pt")
    assert not is_pattern(str(path)) and found([str(path)]) == [(5, path)]
    assert is_pattern(str(tmp_path / "step_6[best].pt"))
    assert matching(str(tmp_path / "step_5[a-z].pt")) == [tmp_path / "step_5b.pt"]


def test_orders_that_nobody_can_tell(tmp_path: Path) -> None:
    """Nothing is guessed, and the error says what to do."""

    def refused(words: str, *names: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=words):
            found([str(tmp_path / name) for name in names])

    _touch(tmp_path, "a.pt", "b.pt", "seed1_500.pt", "seed2_600.pt", "last.ckpt", "epoch=1-step=5.ckpt", "notes.txt")
    _touch(tmp_path, "one/checkpoint-5/model.pt", "two/checkpoint-5/model.pt")
    refused(r"say no step.*pass a list in the order that you want, and labels", "[ab].pt")
    refused(r"do not differ in one number alone", "seed*.pt")
    refused(r"last.ckpt' says no step, and others do: leave it out", "*.ckpt")
    refused(r"two checkpoints of step 5, '.*one/checkpoint-5' and '.*two/checkpoint-5'", "*/checkpoint-5")
    refused(r"has no checkpoint among its 1 files and folders, such as 'notes.txt'", "*.txt")
    refused(r"matches no file or folder: '.*' has a.pt, b.pt", "checkpoint-*", error=FileNotFoundError)
    refused(r"there is no folder '.*nowhere'", "nowhere/checkpoint-*", error=FileNotFoundError)
    refused(r"nowhere.pt' does not exist", "a.pt", "nowhere.pt", error=FileNotFoundError)


def test_checkpoints_in_a_folder(tmp_path: Path) -> None:
    """By their step, of Trainer's folders, Lightning's files and others; what says no step is left alone."""
    for name in ("checkpoint-1000", "checkpoint-200", "runs"):
        (tmp_path / name).mkdir()
    _touch(tmp_path, "model.safetensors", "trainer_state.json", "step_3.json", "last.ckpt", "epoch=1-step=30.ckpt")
    _touch(tmp_path, "net_step000005.pt")
    expected = {5: "net_step000005.pt", 30: "epoch=1-step=30.ckpt", 200: "checkpoint-200", 1000: "checkpoint-1000"}
    assert [(step, path.name) for step, path in checkpoints_in(tmp_path)] == list(expected.items())
    (tmp_path / "epoch=0-step=200.ckpt").touch()
    with pytest.raises(ValueError, match=r"two checkpoints of step 200, 'checkpoint-200' and 'epoch=0-step=200.ckpt'"):
        checkpoints_in(tmp_path)


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without names like checkpoint-500 .*: pass a list of files"):
        checkpoints_in(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="it is one model, so put it in a list"):
        checkpoints_in(tmp_path)


# ---- files made by each library ----------------------------------------------------------------------------


def _assert_is(source: Path, saved: nn.Module, into: nn.Module) -> None:
    """Bit for bit, with nothing left out; and said before the values are read."""
    reader = WeightReader(into)
    reader.check(source)
    into.load_state_dict(reader.read(source))
    theirs = saved.state_dict()
    assert into.state_dict().keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in into.state_dict().items())


@pytest.fixture(scope="module")
def saved() -> Any:
    """A GPT-2, whose head is tied to its embedding, with values of its own."""
    return gpt2(seed=1)


def _other() -> Any:
    return gpt2(seed=2)


def test_what_transformers_writes(tmp_path: Path, saved: Any) -> None:
    """One file, shards with an index, and pickles: what `save_pretrained` of older versions wrote is what `torch.save`
    of the state dict gives."""
    saved.save_pretrained(tmp_path / "whole")
    saved.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    (tmp_path / "pickle").mkdir()
    torch.save(saved.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("whole", "shards", "pickle", "whole/model.safetensors", "shards/model.safetensors.index.json"):
        _assert_is(tmp_path / name, saved, _other())
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "pickle")
    again = transformers().GPT2LMHeadModel.from_pretrained(tmp_path / "pickle")  # their own reader agrees
    torch.testing.assert_close(again.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_what_the_trainer_writes(tmp_path: Path) -> None:
    """Its checkpoints, with optimizer, scheduler and random states beside the weights, as the model was at each."""
    made = transformers()
    pytest.importorskip("accelerate")
    model, seen = _other(), {}

    class Keep(made.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen[state.global_step] = copy.deepcopy(given["model"])

    options = {"max_steps": 10, "save_steps": 2, "save_strategy": "steps", "report_to": [], "use_cpu": True}
    args = made.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True, **options
    )
    rows = [{"input_ids": torch.arange(8) + k, "labels": torch.arange(8) + k} for k in range(4)]
    made.Trainer(model=model, args=args, train_dataset=rows, callbacks=[Keep()]).train()
    for given in ([str(tmp_path)], [str(tmp_path / "checkpoint-*")], [str(tmp_path / "*")]):
        ordered = found(given)
        assert [step for step, _ in ordered] == [2, 4, 6, 8, 10] == list(seen)
    assert (ordered[0][1] / "optimizer.pt").exists()
    for step, path in ordered:
        _assert_is(path, seen[step], _other())


def test_what_lightning_writes(tmp_path: Path) -> None:
    """A checkpoint of its trainer, for the module and for the model in it."""
    transformers()
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(3, width)
            self.register_buffer("scale", torch.ones(2))

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    module, quiet = Module(4), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(48, 3)), 4)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, save_last=True
    )
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=[saver], **quiet)
    trainer.fit(module, batches)
    assert (tmp_path / "last.ckpt").exists()
    ordered = checkpoints_in(tmp_path)
    assert [step for step, _ in ordered] == [4, 8, 12]
    assert found([str(tmp_path / "*step=*.ckpt")]) == ordered
    _assert_is(ordered[-1][1], module.net, nn.Linear(3, 4))
    _assert_is(ordered[-1][1], module, Module(4))
    first = WeightReader(nn.Linear(3, 4)).read(ordered[0][1])
    assert not torch.equal(first["weight"], module.net.weight)


def test_what_accelerate_writes(tmp_path: Path, saved: Any) -> None:
    """`save_state` and `save_model`: safetensors and pickles, whole and in shards."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = accelerator.prepare(saved, torch.optim.Adam(saved.parameters()))
    for name, safe in (("safe", True), ("pickle", False)):
        accelerator.save_state(str(tmp_path / f"state {name}"), safe_serialization=safe)
        accelerator.save_model(model, str(tmp_path / f"model {name}"), safe_serialization=safe)
        accelerator.save_model(model, str(tmp_path / f"parts {name}"), max_shard_size="4KB", safe_serialization=safe)
    assert list((tmp_path / "parts pickle").glob("pytorch_model*.index.json"))
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 6 and all(map(has_weights, folders))
    for folder in folders:
        _assert_is(folder, saved, _other())


def test_what_safetensors_writes(tmp_path: Path, saved: Any) -> None:
    """`save_model` leaves one name of tied weights out."""
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(saved, str(tmp_path / "step_5.safetensors"))
    assert len(safetensors.load_file(tmp_path / "step_5.safetensors")) < len(saved.state_dict())
    _assert_is(tmp_path / "step_5.safetensors", saved, _other())


def test_what_peft_writes_beside_a_trainer(tmp_path: Path) -> None:
    """Adapters alone, with what a trainer writes; the model that they are for stays as it is."""
    transformers()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    saved, other = (peft.get_peft_model(gpt2(seed=1), copy.deepcopy(config)) for _ in range(2))
    with torch.no_grad():
        for name, p in saved.named_parameters():
            if "lora" in name:
                p.fill_(0.25)
    saved.save_pretrained(tmp_path / "checkpoint-3")
    _touch(tmp_path / "checkpoint-3", "optimizer.pt", "rng_state.pth", "training_args.bin")
    [(step, path)] = found([str(tmp_path / "checkpoint-*")])
    assert step == 3
    _assert_is(path, saved, other)


# ---- torch.distributed.checkpoint --------------------------------------------------------------------------


def _save(state: Any, folder: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    try:
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    except TypeError:  # torch before 2.6 finds out itself
        dcp.save(state, checkpoint_id=str(folder))


def _trained(model: Any) -> torch.optim.Optimizer:
    """Adam with a state, at another place than the model's values: its averages have the names of parameters too."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model(torch.ones(1, 4, dtype=torch.long)).logits.square().mean().backward()
    optimizer.step()
    model.zero_grad()
    return optimizer


def _stateful(model: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.stateful import Stateful

    class App(Stateful):  # as in torch's own tutorial
        def state_dict(self) -> dict[str, Any]:
            weights, states = get_state_dict(model, _trained(model))
            return {"model": weights, "optim": states}

        def load_state_dict(self, _: Any) -> None:
            raise AssertionError

    return App()


def _titan(model: Any) -> dict[str, Any]:
    """The weights at the top, and all else under keys beside them, as torchtitan does."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    states = get_optimizer_state_dict(model, _trained(model), options=flat)
    return {**model.state_dict(), "optimizer": states, "train_state": {"step": torch.tensor(5)}, "lr": {"last": 3}}


_SAVED: dict[str, Callable[[Any], Any]] = {
    "the state dict": lambda model: model.state_dict(),
    "an entry": lambda model: {"model": model.state_dict(), "optimizer": _trained(model).state_dict(), "step": 3},
    "state_dict": lambda model: {"state_dict": model.state_dict(), "optimizers": [_trained(model).state_dict()]},
    "app": lambda model: {"app": _stateful(model)},
    "torchtitan": _titan,
    "a wrapper": lambda model: {"model": {f"module.{k}": t for k, t in model.state_dict().items()}},
}


@pytest.mark.parametrize("kind", _SAVED)
def test_what_dcp_writes(tmp_path: Path, saved: Any, kind: str) -> None:
    """Whatever is beside the weights, and where; optimizer states are not read."""
    _save(_SAVED[kind](saved), tmp_path)
    assert has_weights(tmp_path)
    _assert_is(tmp_path, saved, _other())


def test_folders_around_dcp(tmp_path: Path, saved: Any) -> None:
    """FSDP of Accelerate and Trainer, OLMo, torchtitan: the weights are a folder in the checkpoint's folder."""
    _save({"model": saved.state_dict()}, tmp_path / "checkpoint-7" / "pytorch_model_fsdp_0")
    _save({"optimizer": _trained(saved).state_dict()}, tmp_path / "checkpoint-7" / "optimizer_0")
    _touch(tmp_path / "checkpoint-7", "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "training_args.bin")
    _save({"model": saved.state_dict(), "optim": _trained(saved).state_dict()}, tmp_path / "step8" / "model_and_optim")
    _touch(tmp_path / "step8", "config.json", "train/rank0.pt")
    _save(_titan(saved), tmp_path / "step-9")
    ordered = found([str(tmp_path / "*")])
    assert [step for step, _ in ordered] == [7, 8, 9] and ordered == checkpoints_in(tmp_path)
    for _, path in ordered:
        _assert_is(path, saved, _other())
    _save({"model": saved.state_dict()}, tmp_path / "checkpoint-7" / "pytorch_model_fsdp_1")
    with pytest.raises(ValueError, match=r"is a folder that has no model.safetensors"):  # which of the two models?
        WeightReader(_other()).check(tmp_path / "checkpoint-7")


def test_a_model_and_its_average_in_dcp(tmp_path: Path, saved: Any) -> None:
    """Two that fit: nothing is guessed, and `entry` says which."""
    _save({"model": saved.state_dict(), "ema": _other().state_dict()}, tmp_path)
    with pytest.raises(ValueError, match=r"fits the model in more than one way: \['model'\] and \['ema'\]"):
        WeightReader(_other()).check(tmp_path)
    into = gpt2(seed=3)
    into.load_state_dict(WeightReader(into, entry="ema").read(tmp_path))
    torch.testing.assert_close(into.state_dict(), _other().state_dict(), rtol=0, atol=0)


def test_tied_weights_that_differ_in_dcp(tmp_path: Path, saved: Any) -> None:
    """Are seen when the values are."""
    state = dict(saved.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    _save({"model": state}, tmp_path)
    WeightReader(_other()).check(tmp_path)
    with pytest.raises(ValueError, match=r"are one tensor in the model, and differ there"):
        WeightReader(_other()).read(tmp_path)


_RANKS = """
import sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
try:
    from torch.distributed.tensor import Shard, distribute_tensor
except ImportError:  # torch 2.4
    from torch.distributed._tensor import Shard, distribute_tensor

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
mesh = init_device_mesh("cpu", (2,))
state = {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in torch.load(f"{folder}/state.pt").items()}
dcp.save({"model": state}, checkpoint_id=f"{folder}/step_3")
dist.destroy_process_group()
"""


def test_what_two_ranks_write(tmp_path: Path) -> None:
    """Rows of each tensor in two files, uneven ones too, are put together in one process."""
    model = mlp(seed=1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    command = [sys.executable, "-c", _RANKS]
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)], **options) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert len(list((tmp_path / "step_3").glob("*.distcp"))) == 2
    _assert_is(tmp_path / "step_3", model, mlp(seed=2))


# ---- files that are not whole, and files that would run code -----------------------------------------------


class _Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _refuses(source: Path, words: str, error: type[Exception] = ValueError, *, when_read: bool = False) -> None:
    reader = WeightReader(mlp())
    with pytest.raises(error, match=f"(?s)^number 3.*{words}"):
        (reader.read if when_read else reader.check)(source, "number 3")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder of torch.distributed.checkpoint."""
    _save({"model": mlp(seed=1).state_dict()}, tmp_path / "step_3")
    return tmp_path / "step_3"


def test_an_index_that_would_run_code(stored: Path, tmp_path: Path) -> None:
    """Is refused, by the name of what it would make; `weights_only=False` runs it."""
    (stored / ".metadata").write_bytes(pickle.dumps(_Runs(tmp_path / "it ran")))
    _refuses(stored, r"an index, '.metadata', that holds objects of the class .*weights_only=False")
    assert not (tmp_path / "it ran").exists()
    with pytest.raises(ValueError, match="has an index that can't be read"):
        read(stored, "number 3", weights_only=False)
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "what", ["os.system", "torch.load", "torch.hub.load", "torch.distributed.checkpoint.metadata.os.getcwd"]
)
def test_no_other_names_are_looked_up(stored: Path, what: str) -> None:
    module, _, name = what.rpartition(".")
    (stored / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    _refuses(stored, f"objects of the class {what}")
    within = b"\x80\x04\x8c" + bytes([len("torch")]) + b"torch\x8c" + bytes([len("os.system")]) + b"os.system\x93."
    (stored / ".metadata").write_bytes(within)
    _refuses(stored, "objects of the class torch.os.system")


def test_parts_that_would_run_code(stored: Path, tmp_path: Path) -> None:
    """A part is a file of `torch.save`, which could be any other."""
    index = read(stored, "it", True).index
    [(key, place)] = [(k, p) for k, p in index.storage_data.items() if k.fqn == "model.0.weight"]
    file = io.BytesIO()
    torch.save(_Runs(tmp_path / "it ran"), file)
    with (stored / place.relative_path).open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        place.offset, place.length = stream.tell(), file.tell()
        stream.write(file.getvalue())
    (stored / ".metadata").write_bytes(pickle.dumps(index))
    _refuses(stored, r"\(its '__0_0.distcp'\) holds objects of the class .*weights_only=False", when_read=True)
    assert not (tmp_path / "it ran").exists()
    assert key.fqn == "model.0.weight"


def test_broken_folders_of_dcp(stored: Path) -> None:
    """A rank's file that was not copied or cut, an index that leads elsewhere or is none, a save that was stopped."""
    [part] = stored.glob("*.distcp")
    whole, index = part.read_bytes(), (stored / ".metadata").read_bytes()
    part.write_bytes(whole[:100])
    _refuses(stored, r"has a file that was cut, '__0_0.distcp'")
    part.write_bytes(bytes(len(whole)))
    _refuses(stored, r"\(its '__0_0.distcp'\) can't be read", when_read=True)
    part.unlink()
    _refuses(stored, r"lacks '__0_0.distcp', which '.metadata' names: copy all of the folder", FileNotFoundError)
    (stored / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../../secret"))
    _refuses(stored, r"an index that names a file elsewhere, '../../secret'")
    for text in (b"", b"hello", pickle.dumps({"a": 1})):
        (stored / ".metadata").write_bytes(text)
        _refuses(stored, r"has an index that can't be read, '.metadata'")
    (stored / ".metadata").unlink()
    part.write_bytes(whole)
    _refuses(stored, r"without its '.metadata', which is written last: the save was not finished")


def test_other_models_in_dcp_are_refused_unread(tmp_path: Path) -> None:
    """By what the index says."""
    _save({"model": nn.Linear(3, 1).state_dict()}, tmp_path / "step_3")
    next((tmp_path / "step_3").glob("*.distcp")).unlink()
    _refuses(tmp_path / "step_3", r"is no state dict of this model: it has no '0.weight'.*in its entry \['model'\]")


def test_deepspeed(tmp_path: Path) -> None:
    """By hand, as its documentation describes the files: the whole weights of ZeRO 1 and 2 are read; those of ZeRO 3
    and of tensor parallelism are in many files, which its own program joins."""
    folder = tmp_path / "global_step5"
    folder.mkdir()
    model = mlp(seed=1)
    torch.save({"module": model.state_dict(), "optimizer": None}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step5")
    assert [step for step, _ in found([str(tmp_path / "global_step*")])] == [5]
    for place in (folder, tmp_path):
        _assert_is(place, model, mlp(seed=2))
    (folder / "mp_rank_01_model_states.pt").touch()
    _refuses(folder, r"divided among ranks: join them .*zero_to_fp32.py")
    for name in ("mp_rank_01_model_states.pt", "mp_rank_00_model_states.pt"):
        (folder / name).unlink()
    _touch(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt")
    for place in (folder, tmp_path):
        _refuses(place, r"divided among ranks: join them .*zero_to_fp32.py")


def test_shards_with_other_names(tmp_path: Path) -> None:
    """As diffusers and others call them."""
    hub = pytest.importorskip("huggingface_hub")
    model = mlp(seed=1)
    hub.save_torch_state_dict(
        model.state_dict(), tmp_path, filename_pattern="my_model{suffix}.safetensors", max_shard_size=40
    )
    assert (tmp_path / "my_model.safetensors.index.json").exists()
    _assert_is(tmp_path, model, mlp(seed=2))


def test_one_file_in_a_folder(tmp_path: Path) -> None:
    """Is the checkpoint, beside what trainers write; of several none is chosen."""
    model = mlp(seed=1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    _touch(tmp_path, "optim.pt", "train.pt", "config.yaml", "rng_state_0.pth", "scheduler.pt", "random_states_0.pkl")
    _assert_is(tmp_path, model, mlp(seed=2))
    torch.save(model.state_dict(), tmp_path / "ema.pt")
    _refuses(tmp_path, r"but several files, such as 'ema.pt' and 'model.pt': pass the one that you want")


def test_errors_name_the_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("hello")
    _refuses(tmp_path, r"\(its 'pytorch_model.bin'\) can't be read by torch.load")
    pytest.importorskip("safetensors")
    (tmp_path / "model.safetensors").write_text("hello")
    _refuses(tmp_path, r"\(its 'model.safetensors'\) is no file of safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.weight": "a.safetensors"}}))
    _refuses(tmp_path, r"lacks 'a.safetensors', which 'model.safetensors.index.json' names", FileNotFoundError)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without the bars of transformers."""
    made = transformers()
    made.utils.logging.disable_progress_bar()
    yield
    made.utils.logging.enable_progress_bar()
