"""llc-fast hf."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PNG, invoke, printed
from language_models import gpt2, sequences, transformers

import llc_fast

SHORT = ["--lr", "1e-6", "--draws", "6", "--burnin", "2", "--chains", "2", "--batch-size", "8", "--no-progress"]
ROWS = sequences(20, shortest=4)


def _save(model: Any, path: Path) -> None:
    transformers().utils.logging.disable_progress_bar()
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer, and three checkpoints of a training run."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    for seed, name in enumerate(("", "checkpoint-5", "checkpoint-10", "checkpoint-100")):
        _save(gpt2(seed), path / name)
    return path


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer of single letters, which begins each text with a mark."""
    made, tokenizers = transformers(), pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("with tokenizer")
    _save(gpt2(), path)
    vocabulary = {c: k for k, c in enumerate(["<unk>", "<s>", *"abcdefghijklmnopqrstuvwxyz ."])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(path)
    return path


def _letters(text: str) -> list[int]:
    return [" .".index(c) + 28 if c in " ." else ord(c) - ord("a") + 2 for c in text]


def _expected(data: Any, model: Any = None, **options: Any) -> llc_fast.LLCResult:
    return llc_fast.estimate_llc(
        model or gpt2().eval(),
        data,
        "next-token",
        **{
            "lr": 1e-6,
            "num_draws": 6,
            "num_burnin": 2,
            "num_chains": 2,
            "batch_size": 8,
            "preset": "language-model",
            "progress": False,
        }
        | options,
    )


def _numbers(folder: Path, path: Path, dataset: Path, *more: str) -> dict[str, Any]:
    done = invoke("hf", str(folder), "--dataset", str(dataset), "--json", str(path), *SHORT, *more)
    assert done.exit_code == 0, (printed(done), done.exception)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _npy(path: Path) -> Path:
    np.save(path / "a.npy", np.array([row[:4] for row in ROWS], dtype=np.uint16))
    return path / "a.npy"


def _pt(path: Path, value: Any) -> Path:
    torch.save(value, path / "a.pt")
    return path / "a.pt"


def _dataset(path: Path, **more: Any) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"input_ids": ROWS} | more)


def _saved(path: Path, split: bool = False) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = _dataset(path, text=["a"] * len(ROWS))
    (datasets.DatasetDict(train=data) if split else data).save_to_disk(path / "data")
    return path / "data"


def _parquet(path: Path) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"input_ids": ROWS}), path / "a.parquet")
    return path / "a.parquet"


FORMS: dict[str, Callable[[Path], Path]] = {
    "lines of objects": lambda path: _jsonl(path / "a.jsonl", [{"input_ids": row, "id": 1} for row in ROWS]),
    "lines of ids": lambda path: _jsonl(path / "a.jsonl", ROWS),
    "list of tensors": lambda path: _pt(path, [torch.tensor(row) for row in ROWS]),
    "dictionary": lambda path: _pt(path, {"input_ids": ROWS}),
    "save_to_disk": _saved,
    "one split": lambda path: _saved(path, split=True),
    "parquet": _parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_data_of_every_form(form: str, folder: Path, tmp_path: Path) -> None:
    """The numbers of `estimate_llc` on the same sequences, with nβ = 30 and γ = 300."""
    found, expected = _numbers(folder, tmp_path / "o.json", FORMS[form](tmp_path)), _expected(ROWS)
    assert found["llc_mean"] == expected.llc_mean and found["init_loss"] == expected.init_loss
    assert (found["nbeta"], found["settings"]["localization"]) == (30.0, 300.0)
    assert found["settings"]["num_tokens"] == sum(len(row) - 1 for row in ROWS)


def test_masks_and_labels_are_kept(folder: Path, tmp_path: Path) -> None:
    """Of padded rows, and where they are cut."""
    padded = [{"input_ids": row + [0] * 3, "attention_mask": [1] * len(row) + [0] * 3} for row in ROWS]
    found = _numbers(folder, tmp_path / "o.json", _jsonl(tmp_path / "a.jsonl", padded), "--context", "4")
    cut = [row[k : k + 4] for row in ROWS for k in range(0, len(row), 4)]
    assert found["init_loss"] == pytest.approx(_expected([row for row in cut if len(row) > 1]).init_loss, rel=1e-6)
    labels = [row[:2] + [-100] * (len(row) - 2) for row in ROWS]
    path = _pt(tmp_path, {"input_ids": ROWS, "labels": labels})
    found = _numbers(folder, tmp_path / "o.json", path)
    assert found["init_loss"] == pytest.approx(_expected([row[:2] for row in ROWS]).init_loss, rel=1e-6)


def test_streams_are_cut(folder: Path, tmp_path: Path) -> None:
    """Into sequences of the length that is asked for; some of them, evenly spread."""
    stream = [token for row in ROWS for token in row]
    np.save(tmp_path / "a.npy", np.array(stream, dtype=np.uint16))
    rows = [stream[k : k + 8] for k in range(0, len(stream), 8)]
    rows = [row for row in rows if len(row) > 1]
    found = _numbers(folder, tmp_path / "o.json", tmp_path / "a.npy", "--context", "8")
    assert found["init_loss"] == pytest.approx(_expected(rows).init_loss, rel=1e-6)
    found = _numbers(folder, tmp_path / "o.json", tmp_path / "a.npy", "--context", "8", "--sequences", "3")
    some = [rows[0], rows[(len(rows) - 1) // 2], rows[-1]]
    assert found["settings"]["num_samples"] == 3
    assert found["init_loss"] == pytest.approx(_expected(some).init_loss, rel=1e-6)


def test_texts(with_tokenizer: Path, folder: Path, tmp_path: Path) -> None:
    """A text file is one stream without marks; each line of .jsonl is a text of its own with one."""
    text = "now is better than never. although never is often better than right now."
    (tmp_path / "a.txt").write_text(text)
    found = _numbers(with_tokenizer, tmp_path / "o.json", tmp_path / "a.txt")
    ids = _letters(text)
    rows = [ids[k : k + 32] for k in range(0, len(ids), 32)]
    assert found["settings"]["num_tokens"] == sum(len(row) - 1 for row in rows)
    assert found["init_loss"] == pytest.approx(_expected(rows).init_loss, rel=1e-6)
    texts = ["errors should never pass", "silently"]
    expected = _expected([[1, *_letters(t)] for t in texts]).init_loss
    for lines in (texts, [{"text": t} for t in texts]):
        path = _jsonl(tmp_path / "a.jsonl", lines)
        assert _numbers(with_tokenizer, tmp_path / "o.json", path)["init_loss"] == pytest.approx(expected, rel=1e-6)
    other = ["--tokenizer", str(with_tokenizer)]
    assert _numbers(folder, tmp_path / "o.json", path, *other)["init_loss"] == pytest.approx(expected, rel=1e-6)


def test_options_and_files(folder: Path, tmp_path: Path) -> None:
    """What is given wins over the preset; the result comes back from its file."""
    pytest.importorskip("matplotlib")
    data = _jsonl(tmp_path / "a.jsonl", ROWS)
    files = ["--output", str(tmp_path / "o.npz"), "--plot", str(tmp_path / "o.png")]
    files += ["--report", str(tmp_path / "o.html")]
    options = ["--nbeta", "5", "--localization", "7", "--params", "*.attn.*", "--seed", "3", "--dtype", "float64"]
    found = _numbers(folder, tmp_path / "o.json", data, *files, *options)
    expected = _expected(ROWS, gpt2().double().eval(), nbeta=5.0, localization=7.0, params=["*.attn.*"], seed=3)
    assert found["llc_mean"] == expected.llc_mean
    loaded = llc_fast.LLCResult.load(tmp_path / "o.npz")
    np.testing.assert_array_equal(loaded.loss_trace, expected.loss_trace)
    assert (tmp_path / "o.png").read_bytes().startswith(PNG)
    assert f"<title>{folder}</title>" in (tmp_path / "o.html").read_text(encoding="utf-8")
    options = ["--sampler", "RMSprop-SGLD", "--sampler-option", "eps=0.01", "--microbatch-size", "3"]
    found = _numbers(folder, tmp_path / "o.json", data, *options)
    rms = llc_fast.samplers.RMSpropSGLDSampler(eps=0.01)
    expected = _expected(ROWS, sampler=rms, execution=llc_fast.Execution(microbatch_size=3))
    assert found["llc_mean"] == expected.llc_mean
    without = _numbers(folder, tmp_path / "o.json", data, "--preset", "none", "--localization", "7")
    assert without["nbeta"] == pytest.approx(20 / math.log(20))
    assert "preset" not in without["settings"]


def test_behavioral_loss(folder: Path, tmp_path: Path) -> None:
    """The model's own predictions as targets."""
    data = _jsonl(tmp_path / "a.jsonl", ROWS)
    found = _numbers(folder, tmp_path / "o.json", data, "--loss", "behavioral")
    assert found["settings"]["loss_fn"] == "behavioral-kl" and found["init_loss"] == 0 < found["llc_mean"]
    assert found["settings"]["num_tokens"] == sum(len(row) - 1 for row in ROWS)


@pytest.mark.parametrize(
    ("revisions", "labels"),
    [
        ("10,checkpoint-5", ["checkpoint-10", "checkpoint-5"]),
        ("checkpoint-*", [f"checkpoint-{k}" for k in (5, 10, 100)]),
    ],
)
def test_revisions_of_a_folder(revisions: str, labels: list[str], folder: Path, tmp_path: Path) -> None:
    """Each sub-folder's own weights, in the order asked for or by number; a line, a row and a column for each."""
    xarray, _ = pytest.importorskip("xarray"), pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "o.json"), "--output", str(tmp_path / "o.nc"), "--plot", str(tmp_path / "o.png")]
    data = _jsonl(tmp_path / "a.jsonl", ROWS)
    done = invoke("hf", str(folder), "--dataset", str(data), "--revisions", revisions, *files, *SHORT)
    assert done.exit_code == 0, (printed(done), done.exception)
    rows, found = json.loads((tmp_path / "o.json").read_text()), xarray.load_dataset(tmp_path / "o.nc")
    assert [row["revision"] for row in rows] == labels == found["revision"].values.tolist()
    seeds = {"checkpoint-5": 1, "checkpoint-10": 2, "checkpoint-100": 3}
    for row, label in zip(rows, labels, strict=True):
        expected = _expected(ROWS, gpt2(seeds[label]).eval())
        assert row["init_loss"] == pytest.approx(expected.init_loss, rel=1e-6)
        assert label in printed(done)
    assert rows[0]["llc_mean"] == pytest.approx(_expected(ROWS, gpt2(seeds[labels[0]]).eval()).llc_mean, rel=1e-6)
    assert found["llc_mean"].values.tolist() == [row["llc_mean"] for row in rows]
    assert (tmp_path / "o.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{folder}/nowhere", "--dataset", "{data}"], "can't be loaded"),
        (["{folder}", "--dataset", "{folder}/no.npy"], "does not exist"),
        (["{folder}", "--dataset", "{text}"], "has no tokenizer for a text"),
        (["{folder}", "--dataset", "{other}"], "its ending none of"),
        (["{folder}", "--dataset", "{broken}"], "can't be read"),
        (["{folder}", "--dataset", "{folder}"], "can't be read"),
        (["{folder}", "--dataset", "{data}", "--context", "33"], "more than the 32"),
        (["{folder}", "--dataset", "{data}", "--dtype", "int8"], "'int8' is none of"),
        (["{folder}", "--dataset", "{data}", "--revisions", "checkpoint-7"], "it has: checkpoint-5, checkpoint-10"),
        (["{folder}", "--dataset", "{data}", "--revisions", ","], "there is none"),
        (["{folder}", "--dataset", "{data}", "--revisions", "10", "--report", "a.html"], "one revision"),
        (["{folder}", "--dataset", "{splits}"], "splits train, test: choose one"),
        (["{folder}", "--dataset", "{columns}"], "neither input_ids nor text, but words"),
        (["{folder}", "--dataset", "{short}"], "no sequence of two tokens"),
        (["{folder}", "--dataset", "{data}", "--json", "{data}"], "is the file of"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, folder: Path, tmp_path: Path) -> None:
    """As a usage error, in words, before any work."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = _dataset(tmp_path)
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "splits")
    for name, content in (("text.txt", "a text"), ("other.csv", "1,2"), ("broken.jsonl", "{")):
        (tmp_path / name).write_text(content)
    places = {
        "folder": folder,
        "data": _jsonl(tmp_path / "a.jsonl", ROWS),
        "text": tmp_path / "text.txt",
        "other": tmp_path / "other.csv",
        "broken": tmp_path / "broken.jsonl",
        "splits": tmp_path / "splits",
        "columns": _jsonl(tmp_path / "columns.jsonl", [{"words": "a"}]),
        "short": _jsonl(tmp_path / "short.jsonl", [[1], [2]]),
    }
    done = invoke("hf", *(a.format(**places) for a in arguments), *SHORT)
    assert done.exit_code == 2, (printed(done), done.exception)
    assert said in " ".join(printed(done).replace("│", " ").split())
