"""llc-fast influence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PNG, invoke, printed
from torch import nn

import llc_fast
from llc_fast import Samples
from llc_fast.cli.influence import read_vocabulary

pytest.importorskip("zarr")
pytest.importorskip("xarray")
WORDS = [f"<{k}>" for k in range(6)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small language model with two probes, token by token."""
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    tokens = torch.randint(0, 6, (40, 5))
    settings = {"num_chains": 2, "num_draws": 200, "num_burnin": 50, "lr": 1e-2, "nbeta": 20.0, "localization": 5.0}
    llc_fast.sample(
        model, tokens, "next-token", probes={"a": tokens[:6], "b": tokens[6:10]}, per="token", store=path,
        batch_size=20, progress=False, **settings,
    )  # fmt: skip
    return path


def test_influence_of_a_store(store: Path, tmp_path: Path) -> None:
    """The numbers of `Samples.influence`, on the screen, as JSON, a picture and a page."""
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"out.{name}" for name in ("json", "png", "html", "zarr")}
    (tmp_path / "words.json").write_text(json.dumps({word: k for k, word in enumerate(WORDS)}))
    options = ["--json", str(files["json"]), "--plot", str(files["png"]), "--html", str(files["html"])]
    options += ["--out", str(files["zarr"]), "--vocabulary", str(tmp_path / "words.json"), "--top", "3"]
    done = invoke("influence", str(store), "--train", "a", "--query", "b", "--first-draw", "20", *options)
    assert done.exit_code == 0, done.output
    samples, text = Samples.open(store), printed(done)
    expected = samples.influence("a", "b", draws=slice(20, None))
    assert expected.summary() in text and "influence of 6 samples of 'a' on 4 samples of 'b'" in text
    best = expected.top(3, WORDS)
    assert f"{best[0].train}  " in text and f"{best[0].value:+.4g} ± {best[0].stderr:.2g}" in text
    assert f"page written to {files['html']}" in text and f"matrix written to {files['zarr']}" in text
    numbers = json.loads(files["json"].read_text())
    np.testing.assert_allclose(numbers["value"], expected.value)
    assert numbers["beta"] == expected.beta == 20 / 40 and len(numbers["top"]) == 3
    assert np.shape(numbers["significant"]) == (6, 4) and numbers["query_sample"] == [0, 1, 2, 3]
    assert files["png"].read_bytes().startswith(PNG)
    page = files["html"].read_text()
    assert page.startswith("<!doctype html>") and "influence of tokens of a on b" in page
    assert page.count('<div style="display:flex') == 3 and "&lt;4&gt;</span>" in page


def test_defaults(store: Path) -> None:
    """The first probe with itself; nothing but JSON on stdout if asked for."""
    done = invoke("influence", str(store), "--kind", "correlation", "--json")
    numbers = json.loads(done.stdout)
    np.testing.assert_allclose(numbers["value"], Samples.open(store).loss_kernel("a").value)
    assert "beta" not in numbers and "correlation of 6 samples of 'a' with each other" in done.stderr
    done = invoke("influence", str(store), "--per", "token,probe", "--query", "b")
    assert "influence of 24 tokens of 'a' on the mean loss of 'b'" in printed(done)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--train", "c"], "train: probe must be one of 'a', 'b', got 'c'"),
        (["--kind", "cov"], "kind must be one of 'influence', 'correlation', 'covariance', got 'cov'"),
        (["--q", "2"], "must be between 0 and 1, got 2.0"),
        (["--first-draw", "199"], "leaves fewer than 2 draws of 200"),
        (["--json", "a.png", "--plot", "a.png"], "a.png is the file of --json too"),
        (["--plot", "a.what"], "must end in one of"),
    ],
)
def test_what_is_refused(
    store: Path, options: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("influence", str(store), *options)
    said = str(done.exception) if done.exit_code == 1 else printed(done)
    assert done.exit_code != 0 and error in said.replace("\n", " ")
    assert not any(tmp_path.iterdir())


def test_vocabularies(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    for text in (WORDS, {word: k for k, word in enumerate(WORDS)}):
        path.write_text(json.dumps(text))
        assert read_vocabulary(path) == WORDS
    for wrong in ("[", "3", '{"a": "b"}'):
        path.write_text(wrong)
        with pytest.raises(Exception, match=r"words.json (is no JSON|must have a list of texts)"):
            read_vocabulary(path)
