"""Weights under the names of a model, from state dicts, files and folders as others write them."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import gpt2, transformers
from torch import Tensor, nn

from llc_fast.checkpoint_files import has_weights
from llc_fast.weights import WeightReader

# ---- models ------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weights are those of the last layer, a buffer that is not saved, and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.ones(2, 2), persistent=False)


class Holder(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def tied(seed: int = 0) -> Tied:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tied()


def _assert_reads(source: Any, expected: nn.Module, into: nn.Module, **options: Any) -> None:
    """Loading what is read gives the model the values of the expected one, with nothing left out."""
    state = WeightReader(into, **options).read(source)
    assert list(state) == list(into.state_dict())
    into.load_state_dict(state)
    theirs = expected.state_dict().values()
    for ours, value in zip(into.state_dict().values(), theirs, strict=True):
        torch.testing.assert_close(ours, value, rtol=0, atol=0)


# ---- names -------------------------------------------------------------------------------------------------

Change = Callable[[Mapping[str, Any]], Any]


def _prefixed(prefix: str) -> Change:
    return lambda state: {prefix + name: t for name, t in state.items()}


_CHANGES: dict[str, Change] = {
    "as it is": lambda state: state,
    "a plain dictionary": dict,
    "an entry": lambda state: {"model": state, "optimizer": {"state": {0: {"step": 1}}}, "epoch": 3},
    "under any key": lambda state: {"weights": state},
    "deep inside": lambda state: {"train": {"net": {"state": state}}},
    "DataParallel": _prefixed("module."),
    "torch.compile": _prefixed("_orig_mod."),
    "both": _prefixed("module._orig_mod."),
    "the other way": _prefixed("_orig_mod.module."),
    "compiled layers": lambda state: {k.replace(".", "._orig_mod."): t for k, t in state.items()},
    "FSDP": _prefixed("_fsdp_wrapped_module."),
    "a holder": _prefixed("model."),
    "a holder of a compiled one": _prefixed("net._orig_mod."),
    "holders": _prefixed("a.b.c."),
    "an entry with a prefix": lambda state: {"state_dict": _prefixed("module.")(state), "step": torch.zeros(())},
    "doubles": lambda state: {k: t.double() if t.is_floating_point() else t for k, t in state.items()},
    "without counters": lambda state: {k: t for k, t in state.items() if "num_batches" not in k},
    "Lightning": lambda state: {
        "pytorch-lightning_version": "2.6",
        "state_dict": _prefixed("net.")(state) | {"loss.weight": torch.ones(3), "net2.0.weight": torch.ones(3)},
        "optimizer_states": [{}],
    },
}


@pytest.mark.parametrize("change", _CHANGES)
def test_names_that_are_understood(change: str) -> None:
    """Of the same values, whatever has been added to the names; the model's own wrapper is no matter either."""
    saved = net(1)
    if change == "without counters":
        _assert_reads(_CHANGES[change](saved.state_dict()), saved, net())
        return
    saved[1].num_batches_tracked += 7  # type: ignore[operator,union-attr]
    given = _CHANGES[change](copy.deepcopy(saved.state_dict()))
    _assert_reads(given, saved, net())
    _assert_reads(given, saved, nn.DataParallel(net()))
    _assert_reads(given, saved, torch.compile(net(), backend="eager"))  # type: ignore[arg-type]
    _assert_reads(given, saved, nn.DataParallel(torch.compile(net(), backend="eager")))  # type: ignore[arg-type]


def test_the_model_may_be_the_one_with_the_prefix() -> None:
    """What was saved was inside: unambiguous as long as the holder has nothing else to load."""
    saved = net(1)
    _assert_reads(saved.state_dict(), saved, Holder(model=net()))
    more = Holder(model=net(), other=nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"it has no 'model.0.weight' \(and \d+ more\), and the model has no '0.weight'"
    ):
        WeightReader(more).read(saved.state_dict())


def test_nothing_is_copied() -> None:
    """The values are those of the state dict that was given."""
    state = net(1).state_dict()
    found = WeightReader(net()).read(_prefixed("module.")(state))
    assert all(found[name] is t for name, t in state.items())


def test_versions_come_along() -> None:
    """Batch normalization of an old version lacks a counter, and says so by its version; others are complained about
    by `load_state_dict` itself."""
    saved = net(1)
    state = saved.state_dict()
    moved = OrderedDict(_prefixed("module.")(state))
    moved._metadata = OrderedDict({f"module.{k}": v for k, v in state._metadata.items()})  # type: ignore[attr-defined]
    found = WeightReader(net()).read(moved)
    assert found._metadata["1"] == state._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
    _assert_reads(moved, saved, net())


# ---- what is refused ---------------------------------------------------------------------------------------


def _most(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.startswith("2.")}


_REFUSED: dict[str, tuple[Change, str]] = {
    "nothing": (lambda state: {}, r"it has no '0.weight' \(and 7 more\)"),
    "a layer less": (_most, r"it has no '2.weight' \(and 1 more\)"),
    "a layer less in an entry": (lambda s: {"model": _most(s)}, r"it has no '2.weight'.* in its entry \['model'\]"),
    "one more": (lambda state: {**state, "3.weight": torch.ones(1)}, "the model has no '3.weight'"),
    "a larger model": (lambda state: _prefixed("a.")(state) | _prefixed("b.")(state), "it has no '0.weight'"),
    "a shape": (lambda state: state | {"2.bias": torch.zeros(2)}, r"'2.bias' has shape \(2,\) there, \(1,\) in"),
    "a dtype": (lambda state: state | {"2.bias": torch.zeros(1).long()}, "'2.bias' has dtype torch.int64 there"),
    "no values": (lambda state: state | {"2.bias": torch.zeros(1, device="meta")}, "no values there.* meta device"),
    "a list": (lambda state: [state], "it is of type list"),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_other_state_dicts_are_refused(tmp_path: Path, kind: str) -> None:
    """With what is missing, unknown or of another shape, under the name that was given for the checkpoint."""
    change, words = _REFUSED[kind]
    torch.save(change(net(1).state_dict()), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=f"^number 3 is no state dict of this model: .*{words}"):
        WeightReader(net()).read(tmp_path / "wrong.pt", "number 3")


_AMBIGUOUS: dict[str, tuple[Change, str, list[str]]] = {
    "two entries": (
        lambda state: {"state_dict": state, "state_dict_ema": {k: t + 1 for k, t in state.items()}},
        r"\['state_dict'\] and \['state_dict_ema'\]",
        ["state_dict", "state_dict_ema"],
    ),
    "two parts of a Lightning module": (
        lambda state: {
            "pytorch-lightning_version": "2.6",
            "state_dict": _prefixed("student.")(state) | _prefixed("teacher.")({k: t + 1 for k, t in state.items()}),
        },
        r"\['state_dict'\] from student\.\* and \['state_dict'\] from teacher\.\*",
        ["student", "teacher."],
    ),
}


@pytest.mark.parametrize("kind", _AMBIGUOUS)
def test_what_fits_twice_is_refused_unless_it_is_said_which(kind: str) -> None:
    change, words, entries = _AMBIGUOUS[kind]
    state = {k: t for k, t in net(1).state_dict().items() if t.is_floating_point()}
    given = change(state)
    with pytest.raises(ValueError, match=rf"fits the model in more than one way: {words}. .*entry='{entries[0]}'"):
        WeightReader(net()).read(given)
    for offset, entry in enumerate(entries):
        found = WeightReader(net(), entry=entry).read(given)
        torch.testing.assert_close(found["0.weight"], state["0.weight"] + offset, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"has no entry='other' that fits the model; its entries are 'state_dict'"):
        WeightReader(net(), entry="other").read(given)


def test_the_same_values_twice_are_no_choice() -> None:
    state = net(1).state_dict()
    _assert_reads({"model": state, "best": state}, net(1), net())


def test_an_entry_may_be_a_part() -> None:
    """Of any file, if it is asked for by name; beside what fits as it is, too."""
    first, second = net(1), net(2)
    both = _prefixed("a.")(first.state_dict()) | _prefixed("b.")(second.state_dict())
    _assert_reads(both, second, net(), entry="b")
    _assert_reads({**first.state_dict(), "ema": second.state_dict()}, second, net(), entry="ema")


@pytest.mark.parametrize(
    ("options", "said"), [({"entry": 3}, "entry must be"), ({"weights_only": 1}, "weights_only mu")]
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        WeightReader(net(), **options)


# ---- tied weights and buffers ------------------------------------------------------------------------------


def test_one_name_of_tied_weights_is_enough() -> None:
    saved = tied(1)
    state = saved.state_dict()
    for left_out in ("head.weight", "wte.weight"):
        _assert_reads({k: t for k, t in state.items() if k != left_out}, saved, tied())
    _assert_reads(_prefixed("module.")({k: t for k, t in state.items() if k != "head.weight"}), saved, tied())
    inner = {k: t for k, t in state.items() if k != "head.weight"}
    holder = Holder(body=saved.wte, norm=saved.norm, head=saved.head)
    del inner["wte.weight"]
    with pytest.raises(ValueError, match=r"it has no 'body.weight' \(and 1 more\)"):
        WeightReader(holder).read(inner)


def test_the_inner_model_of_one_with_a_tied_head() -> None:
    """As GPT-2 was published: without the prefix of the inner model, and without the head, which is tied to it."""
    model, saved = Holder(transformer=tied()), Holder(transformer=tied(1))
    for m in (model, saved):
        m.add_module("head", nn.Linear(3, 5, bias=False))
        m.head.weight = m.transformer.wte.weight  # type: ignore[union-attr,assignment]
    given = {k: t for k, t in saved.transformer.state_dict().items() if k != "head.weight"}  # type: ignore[union-attr]
    _assert_reads(given | {"mask": torch.ones(2, 2)}, saved, model)


def test_tied_weights_that_differ_are_refused() -> None:
    """They were not tied where they were saved: one of them would be lost."""
    state = copy.deepcopy(tied(1).state_dict())
    _assert_reads({**state, "head.weight": state["wte.weight"].clone()}, tied(1), tied())
    state["head.weight"] = state["wte.weight"] + 1
    with pytest.raises(
        ValueError, match=r"'\w+.weight' and '\w+.weight' are one tensor in the model, and differ there"
    ):
        WeightReader(tied()).read(state)


def test_buffers_that_are_not_saved_now_may_be_there() -> None:
    saved = tied(1)
    _assert_reads({**saved.state_dict(), "mask": torch.zeros(2, 2)}, saved, tied())
    with pytest.raises(ValueError, match="the model has no 'mask'"):
        WeightReader(tied()).read({**saved.state_dict(), "mask": torch.zeros(3)})
    saved._keys_to_ignore_on_load_unexpected = [r"masked_bias"]  # type: ignore[assignment]
    WeightReader(saved).read({**saved.state_dict(), "h.0.masked_bias": torch.zeros(3)})


# ---- files and folders -------------------------------------------------------------------------------------


def test_files_of_torch(tmp_path: Path) -> None:
    """Of today's format and that of old versions."""
    saved = net(1)
    torch.save({"model": saved.state_dict()}, tmp_path / "new.pt")
    torch.save(saved.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        _assert_reads(tmp_path / name, saved, net())


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    """The code that a file brings does not run, and the error says what the file has and what to do."""
    saved = net(1)
    torch.save({"model": saved.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    torch.save(_Runs(tmp_path / "it ran"), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"objects of the class argparse.Namespace.*weights_only=False"):
        WeightReader(net()).read(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds objects of"):
        WeightReader(net()).read(tmp_path / "b.pt")
    assert not (tmp_path / "it ran").exists()
    _assert_reads(tmp_path / "a.pt", saved, net(), weights_only=False)
    torch.save({"ema": saved}, tmp_path / "c.pt")
    _assert_reads(tmp_path / "c.pt", saved, net(), weights_only=False)


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    saved = tied(1)
    safetensors.save_model(saved, str(tmp_path / "a.safetensors"))  # without one of the tied names
    assert len(safetensors.load_file(tmp_path / "a.safetensors")) == len(saved.state_dict()) - 1
    _assert_reads(tmp_path / "a.safetensors", saved, tied())
    (tmp_path / "b.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"^number 3 is no file of safetensors: "):
        WeightReader(tied()).read(tmp_path / "b.safetensors", "number 3")


def _write_shards(folder: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Two shards with an index; names by file."""
    folder.mkdir()
    places = {name: f"pytorch_model-0000{1 + k % 2}-of-00002.bin" for k, name in enumerate(state)}
    for shard in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == shard}, folder / shard)
    _write_index(folder, places)
    return places


def _write_index(folder: Path, places: Any) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_folders(tmp_path: Path) -> None:
    """Weights in one file, and in shards with an index; safetensors before pickles, as Hugging Face has it."""
    saved = net(1)
    _write_shards(tmp_path / "shards", saved.state_dict())
    _assert_reads(tmp_path / "shards", saved, net())
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    _assert_reads(tmp_path, saved, net())
    assert has_weights(tmp_path) and has_weights(tmp_path / "shards")
    if safetensors := pytest.importorskip("safetensors.torch"):
        safetensors.save_file(net(2).state_dict(), tmp_path / "model.safetensors")
        _assert_reads(tmp_path, net(2), net())


def test_broken_folders(tmp_path: Path) -> None:
    """A shard that was not copied, an index that leads elsewhere, and one that is none."""
    folder = tmp_path / "shards"
    places = _write_shards(folder, net(1).state_dict())
    reader = WeightReader(net())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"^number 3 lacks 'pytorch_model-00002-of-00002.bin'"):
        reader.read(folder, "number 3")
    _write_index(folder, places | {"2.bias": "../secret.bin"})
    with pytest.raises(ValueError, match=r"^number 3 has an index that names a file elsewhere, '../secret.bin'"):
        reader.read(folder, "number 3")
    _write_index(folder, dict.fromkeys(places, "pytorch_model-00001-of-00002.bin"))
    with pytest.raises(ValueError, match=r"^number 3 has an index with '0.bias' \(and 3 more\), which no shard has"):
        reader.read(folder, "number 3")
    _write_index(folder, None)
    with pytest.raises(ValueError, match=r"^number 3 has an index that can't be read"):
        reader.read(folder, "number 3")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"is a folder that has no model.safetensors.*pass that folder itself"):
        reader.read(tmp_path)


# ---- what other packages know better -----------------------------------------------------------------------


_OLD = {"kernel.weight": "new.weight", "offset.bias": "new.bias"}


class _Pretrained(nn.Module):
    """Stands for a class of transformers whose values had other names in an older version."""

    def __init__(self, config: int = 3) -> None:
        super().__init__()
        self.config = config
        self.new = nn.Linear(config, 1)

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> tuple[_Pretrained, dict[str, Any]]:
        assert options["output_loading_info"] and options["local_files_only"]
        made, values = cls(options["config"]), torch.load(Path(folder) / "pytorch_model.bin", weights_only=True)
        info = made.load_state_dict({_OLD.get(name, name): t for name, t in values.items()}, strict=False)
        return made, {"missing_keys": info.missing_keys, "unexpected_keys": info.unexpected_keys}


def test_names_of_another_version_are_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which converts them, for its own models; what it would make up or leave out is refused as ever."""
    saved = _Pretrained()
    state = {old: saved.state_dict()[name] for old, name in _OLD.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    refused = r"it has no 'new.weight' \(and 1 more\), and the model has no 'kernel.weight'"
    with pytest.raises(ValueError, match=refused):  # nobody has imported transformers
        WeightReader(_Pretrained()).read(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(PreTrainedModel=_Pretrained))
    _assert_reads(tmp_path, saved, _Pretrained())
    _assert_reads(tmp_path, saved, torch.compile(_Pretrained(), backend="eager"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=refused):
        WeightReader(Holder(new=nn.Linear(3, 1))).read(tmp_path)
    for other in (state | {"more": torch.ones(1)}, {"kernel.weight": state["kernel.weight"]}):
        torch.save(other, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"it has no 'new.weight'"):
            WeightReader(_Pretrained()).read(tmp_path)


class _Adapted(nn.Module):
    """Stands for a model of peft: a frozen layer, and an adapter that is saved under a shorter name."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 1).requires_grad_(False)
        self.lora = nn.ModuleDict({"default": nn.Linear(3, 1, bias=False)})


def test_adapters_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Are enough if all that they are for is frozen, which stays as it is."""
    peft = types.SimpleNamespace(
        PeftModel=_Adapted,
        get_peft_model_state_dict=lambda model, save_embedding_layers: {
            "lora.weight": model.lora["default"].weight.detach()
        },
    )
    state = {"lora.weight": torch.full((1, 3), 2.0)}
    model = _Adapted()
    with pytest.raises(ValueError, match=r"it has no 'base.weight' \(and 2 more\)"):
        WeightReader(model).read(state)
    monkeypatch.setitem(sys.modules, "peft", peft)
    torch.save(state, tmp_path / "adapter_model.bin")
    for wrapped in (model, torch.compile(model, backend="eager")):
        for source in (state, tmp_path):
            before = copy.deepcopy(model.base.state_dict())
            nn.init.zeros_(model.lora["default"].weight)  # type: ignore[arg-type]
            wrapped.load_state_dict(WeightReader(wrapped).read(source))  # type: ignore[arg-type]
            assert model.lora["default"].weight.tolist() == [[2.0, 2.0, 2.0]]
            torch.testing.assert_close(model.base.state_dict(), before, rtol=0, atol=0)
    for wrong in ({"lora.weight": torch.zeros(1, 4)}, {**state, "lora.bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match="is no state dict of this model"):
            WeightReader(model).read(wrong)
    model.base.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"it has no 'base.weight'"):
        WeightReader(model).read(state)


def test_what_hugging_face_writes(tmp_path: Path) -> None:
    """A GPT-2 whose head is tied, in one file and in shards; a ViT, whose files have names of another version."""
    made = transformers()
    saved, other = gpt2(seed=1), gpt2(seed=2)
    saved.save_pretrained(tmp_path / "whole")
    saved.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for source in (tmp_path / "whole", tmp_path / "shards", tmp_path / "whole" / "model.safetensors"):
        _assert_reads(source, saved, copy.deepcopy(other))
    published = {k.removeprefix("transformer."): t for k, t in saved.state_dict().items() if k != "lm_head.weight"}
    _assert_reads(published | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, saved, copy.deepcopy(other))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    first, second = (made.ViTForImageClassification(made.ViTConfig(**sizes, image_size=8, patch_size=4)) for _ in "12")
    first.save_pretrained(tmp_path / "vit")
    _assert_reads(tmp_path / "vit", first, second)


def test_what_peft_writes(tmp_path: Path) -> None:
    """The adapters alone; the model that they are for stays as it is."""
    transformers()  # which makes torchvision, that peft asks for, loadable
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    saved, other = (peft.get_peft_model(gpt2(seed=1), copy.deepcopy(config)) for _ in range(2))
    with torch.no_grad():
        for name, p in saved.named_parameters():
            if "lora" in name:
                p.fill_(0.25)
    saved.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    _assert_reads(tmp_path, saved, other)
    _assert_reads(saved.state_dict(), saved, other)
