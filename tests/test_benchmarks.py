"""The benchmarks run, at tiny sizes on a CPU, and the report tells targets that are held from those that are not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import llc_fast
from llc_fast import _native

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not part of this distribution")


def _is_installed(distribution: str, version: str) -> bool:
    try:
        return importlib.metadata.version(distribution) == version
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks' folders by its name."""
    for name in ("gpu", "speed"):
        monkeypatch.syspath_prepend(str(FOLDER / name))
    return importlib.import_module


def _run(script: str, *options: str, path: Path, **environment: str) -> dict[str, Any]:
    """The JSON file that a benchmark writes."""
    command = [sys.executable, str(FOLDER / script), "--device", "cpu", "--json", str(path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_what_probes_cost(tmp_path: Path) -> None:
    """Every column of every width, the ratio being that of its parts."""
    pytest.importorskip("zarr")
    options = ["--widths", "4", "8", "--draws", "3", "--probes", "10", "--repeats", "1"]
    rows = _run("speed/bench_probes.py", *options, path=tmp_path / "out.json")["probes"]
    assert [row["width"] for row in rows] == [4, 8]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["with probes s"] / (row["alone s"] + row["forwards s"]))


# ---- timing --------------------------------------------------------------------------------------------------


def test_a_gpu_is_timed_by_events_around_several_steps(benchmark_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up round is left out, and nobody waits for the GPU between the steps of a round."""
    harness: ModuleType = benchmark_module("harness")
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * harness.STEPS_BETWEEN_EVENTS * len(log)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    seconds = harness.time_in_turn({"ours": lambda: log.append("step")}, 2, "cuda")
    one_round = ["step", "synchronize", "record", *["step"] * harness.STEPS_BETWEEN_EVENTS, "record", "synchronize"]
    assert log == 3 * one_round
    assert seconds == {"ours": [2 * len(one_round), 3 * len(one_round)]}


def test_what_a_step_launches(benchmark_module: Any) -> None:
    """Kernels, copies and fills on the GPU count; what the host does, and the ranges that it marks, do not."""
    events = [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"ph": "X", "cat": "kernel", "name": "step_kernel"},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD"},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#SGLD.step"},
        {"ph": "M", "name": "process_name"},
    ]
    counts = benchmark_module("bench_step").launches_in({"traceEvents": events})
    assert counts == {"step_kernel": 1, "Memcpy HtoD": 1}


@pytest.mark.parametrize("together", [False, True])
def test_compiled_rivals_make_the_same_step(
    benchmark_module: Any, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Where gradients are large against the noise, whose size, √ε = 0.001, is right too."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    module, generator = benchmark_module("bench_step"), torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5000, generator=generator)) for _ in range(3)]
    references = [torch.randn(5000, generator=generator) for _ in params]
    torch.manual_seed(0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn(5000, generator=generator)
    module.compiled_formula(params, references, together=together)()
    for p, w, reference in zip(params, before, references, strict=True):
        noise = p.detach() - (w - 0.5e-6 * (1000 * p.grad + (w - reference)))
        assert abs(float(noise.mean())) < 5 * 0.001 / 5000**0.5
        assert float(noise.std()) == pytest.approx(0.001, rel=5 / 10000**0.5)


@pytest.mark.slow
def test_steps_by_key(tmp_path: Path) -> None:
    """Ratios to llc_fast's step are there if it is."""
    options = ["--parameters", "1000", "--tensors", "2", "--repeats", "1"]
    rows = _run("speed/bench_step.py", *options, "--contenders", "copy", "ours", path=tmp_path / "some.json")["rows"]
    assert [row["step"] for row in rows] == ["tensor copy", "llc_fast SGLD"] and rows[1]["times llc_fast"] == 1
    rows = _run("speed/bench_step.py", *options, "--contenders", "adam", path=tmp_path / "one.json")["rows"]
    assert rows[0]["µs"] > 0 and rows[0]["times llc_fast"] is None


# ---- rivals --------------------------------------------------------------------------------------------------


def _put(folder: Path, distribution: str, version: str, files: dict[str, str]) -> None:
    """A package as ``pip install --target`` leaves it in a folder of its own."""
    about = f"{distribution.replace('-', '_')}-{version}.dist-info/METADATA"
    files = files | {about: f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"}
    for name, text in files.items():
        path = folder / f"{distribution}-{version}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_two_versions_in_one_process(benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes from its folder, what it imports later in the block, too; what was there before is there again."""
    module = benchmark_module("rivals")
    for version in ("1.0", "2.0"):
        files = {"a_rival/__init__.py": f"VERSION = {version!r}", "a_rival/part.py": "from a_rival import VERSION"}
        _put(tmp_path, "a-rival", version, files)
    before = ModuleType("a_rival")
    monkeypatch.setitem(sys.modules, "a_rival", before)
    monkeypatch.setattr(sys, "path", [*sys.path])
    first = sys.path[0]
    found = []
    for version in ("1.0", "2.0", "1.0"):
        with module.importing(module.Rival("a-rival", version, "a_rival"), tmp_path) as package:
            found.append((package.VERSION, importlib.import_module("a_rival.part").VERSION))
    assert found == [("1.0", "1.0"), ("2.0", "2.0"), ("1.0", "1.0")]
    assert sys.modules["a_rival"] is before and "a_rival.part" not in sys.modules and sys.path[0] == first
    third = module.Rival("a-rival", "3.0", "a_rival", ("something<4",), ("--ignore-requires-python",))
    command = (
        f"pip install --no-deps --ignore-requires-python --target {tmp_path}/a-rival-3.0 a-rival==3.0 'something<4'"
    )
    with (
        pytest.raises(ImportError, match=re.escape(f"a-rival 3.0 is not installed: {command}")),
        module.importing(third, tmp_path),
    ):
        pass


def test_rivals_that_are_not_there(benchmark_module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said once how to install each; a folder with another version is not taken for it."""
    module = benchmark_module("rivals")
    _put(tmp_path, "posteriors", "0.1.3", {})
    (tmp_path / "posteriors-0.1.3").rename(tmp_path / "canonical-interp-0.2.7")
    found = module.paths_of(["llc_fast", "canonical", "canonical-cached", "loop"], tmp_path)
    assert found == {}
    said = capsys.readouterr().out
    assert said.count("canonical-interp 0.2.7 is not installed, its rows stay empty") == said.count("\n") == 1
    assert f"--target {tmp_path}/canonical-interp-0.2.7 canonical-interp==0.2.7" in said
    _put(tmp_path, "canonical-interp", "0.2.7", {})
    path = [str(tmp_path / "canonical-interp-0.2.7")]
    assert module.paths_of(["canonical", "canonical-cached"], tmp_path) == {"canonical": path, "canonical-cached": path}


def test_what_posteriors_differentiates(benchmark_module: Any) -> None:
    """Its gradients are those of −nβ·L − γ/2·‖w − w*‖² by autograd, for a linear L."""
    module, generator = benchmark_module("contenders"), torch.Generator().manual_seed(0)
    sizes = {"a": (3,), "b": (2, 4)}
    w, reference, grads = ({k: torch.randn(s, generator=generator) for k, s in sizes.items()} for _ in range(3))
    given = module.log_posterior(list(grads.values()), list(reference.values()), {"nbeta": 30.0, "localization": 7.0})

    def expected(params: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [-30 * (grads[k] * p).sum() - 3.5 * (p - reference[k]).square().sum() for k, p in params.items()]
        return torch.stack(parts).sum()

    found, _ = torch.func.grad_and_value(given, has_aux=True)(w, None)
    torch.testing.assert_close(found, torch.func.grad(expected)(w))


def test_steps_of_rivals_are_the_same_step(benchmark_module: Any) -> None:
    """They are called so that the update is ours, here by libraries that do what the real ones say, without noise."""
    module, generator = benchmark_module("contenders"), torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(2)]
    for p in params:
        p.grad = torch.randn(5, generator=generator)
    options = {"lr": 0.01, "nbeta": 30.0, "localization": 7.0}
    states: list[dict[str, torch.Tensor]] = []

    class Canonical:
        @staticmethod
        def sgld_step(params: dict[str, Any], grads: dict[str, Any], initial: dict[str, Any], **options: float) -> None:
            for name, p in params.items():
                assert p.shape == (1, 5)
                drift = options["nbeta"] * grads[name] + options["localization"] * (p - initial[name])
                params[name].set_(p - 0.5 * options["learning_rate"] * drift)
            states.append(params)

    class Transform:
        def __init__(self, log_posterior: Any, lr: float) -> None:
            self.gradient, self.lr = torch.func.grad_and_value(log_posterior, has_aux=True), lr

        def init(self, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return params

        def update(self, state: dict[str, torch.Tensor], batch: None, inplace: bool) -> None:
            assert inplace
            grads, _ = self.gradient(state, batch)
            for name, p in state.items():
                p.add_(grads[name], alpha=self.lr)
            states.append(state)

    posteriors = types.SimpleNamespace(sgmcmc=types.SimpleNamespace(sgld=types.SimpleNamespace(build=Transform)))
    steps = [
        module.canonical_step(Canonical, params, **options),
        module.posteriors_step(posteriors, "sgld", params, **options),
    ]
    expected = [p.detach().clone() for p in params]
    for p in params:
        assert p.grad is not None
    for _ in range(2):
        moved = zip(expected, params, strict=True)
        expected = [w - 0.005 * (30 * p.grad + 7 * (w - p.detach())) for w, p in moved]  # type: ignore[operator]
        states.clear()
        for step in steps:
            step()
        for state in states:
            for k, w in enumerate(expected):
                torch.testing.assert_close(state[str(k)].flatten(), w)


def test_the_plain_loop_samples_the_same_posterior(benchmark_module: Any) -> None:
    """Of L = (w − w*)² the chain is autoregressive, so that nβ·E[L] of a finite step is known; w stays where it was."""
    module = benchmark_module("contenders")
    model, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
    with torch.no_grad():
        model.weight.fill_(0.3)
    work = module.Work(lr=0.02, nbeta=20.0, localization=10.0, batch=2, chains=2, burnin=50, draws=1500)
    torch.manual_seed(0)
    found = module.with_loop()(model, (x, 0.3 * x), work)["llc"]
    kept = 1 - 0.01 * (2 * 20 + 10)  # of the distance, at a step
    expected = 20 * 0.02 / (1 - kept**2)
    # The variance of a mean of squares of n draws, which are correlated by kept² from one to the next.
    error = expected * (2 / 3000 * (1 + kept**2) / (1 - kept**2)) ** 0.5
    assert abs(sum(found) / 2 - expected) < 4 * error
    assert model.weight.item() == pytest.approx(0.3) and model.weight.grad is None


def test_the_table_of_all_problems(benchmark_module: Any) -> None:
    """A row for each contender, whatever it could do."""
    module = benchmark_module("bench_estimate")
    tables = {
        "1,024": [
            {"key": "llc_fast", "seconds": 0.5},
            {"key": "devinterp", "seconds": 20.0, "llc_fast is faster": 40.0},
            {"key": "canonical", "seconds": "failed"},
        ],
        "GPT-NeoX tiny": [{"key": "llc_fast", "seconds": 1.0}, {"key": "devinterp2", "seconds": "not installed"}],
    }
    rows = module.summary(["llc_fast", "devinterp", "devinterp2", "canonical"], tables)
    assert [list(row.values()) for row in rows] == [
        ["llc_fast", "0.5", "1"],
        ["devinterp 1.3.2", "20 (40×)", None],
        ["devinterp 2.0.1", None, "not installed"],
        ["canonical-interp 0.2.7", "failed", None],
    ]


_CANONICAL = """
import torch

def sgld_step(*args, **kwargs):
    raise NotImplementedError

class LLCEstimator:
    def __init__(self, **given):
        self.given = given

    def estimate_llc(self, model, loader, criterion_fn, chain_batch, devices, seed, compile, show_progress):
        x, y = next(iter(loader))
        assert len(x) == 500 and criterion_fn(model(x), y) == 0 and len(loader) == 20
        assert compile in (False, "reduce-overhead") and chain_batch == 4 and devices == ["cpu"]

    def get_metrics(self):
        g = self.given
        found = 1e6 * g["learning_rate"] + g["nbeta"] + g["localization"] + g["draws"] + g["burnin_steps"]
        return {"llcs": torch.full((g["chains"],), found)}
"""


@pytest.mark.slow
def test_whole_estimates_of_rivals(tmp_path: Path) -> None:
    """A rival is taken from its folder, in processes of its own, and is given the work; versions are in the file."""
    _put(tmp_path, "canonical-interp", "0.2.7", {"canonical_interp/__init__.py": _CANONICAL})
    options = ["--quick", "--sizes", "16", "--rivals", str(tmp_path)]
    contenders = ["llc_fast", "canonical", "canonical-eager", "devinterp2"]
    tables = _run("speed/bench_estimate.py", *options, "--contenders", *contenders, path=tmp_path / "some.json")
    ours, theirs, eager = tables["16"]  # devinterp 2.0.1 has no such networks
    assert [row["key"] for row in (ours, theirs, eager)] == contenders[:3]
    assert theirs["contender"] == "canonical-interp 0.2.7" and "canonical-interp 0.2.7" in tables["versions"]
    assert theirs["λ̂"] == eager["λ̂"] == pytest.approx(2 + 10_000 / math.log(10_000) + 1 + 10 + 10)
    assert all(row["again"] > 0 for row in (ours, theirs, eager))
    assert theirs["llc_fast is faster"] == pytest.approx(theirs["seconds"] / ours["seconds"])


@pytest.mark.slow
def test_whole_estimates_of_a_language_model(tmp_path: Path, with_transformers: dict[str, str]) -> None:
    """All that is installed, with the same weights and tokens."""
    rivals = ["devinterp"] if _is_installed("devinterp", "1.3.2") else []
    options = ["--quick", "--language", "tiny", "--rivals", str(tmp_path), "--contenders", "llc_fast", *rivals, "loop"]
    tables = _run("speed/bench_estimate.py", *options, path=tmp_path / "language.json", **with_transformers)
    rows = tables["language-tiny"]
    assert [row["key"] for row in rows] == ["llc_fast", *rivals, "loop"]
    assert all(row["seconds"] > 0 and math.isfinite(row["λ̂"]) and row["chains"] == 2 for row in rows)
    assert ("again" in rows[0]) and all("again" not in row for row in rows if row["key"] == "devinterp")


# ---- the modes that a GPU session runs -----------------------------------------------------------------------


def test_every_layout_of_every_sampler(
    benchmark_module: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("bench_samplers")
    monkeypatch.setattr(module.gc, "collect", lambda: 0)  # makes room between large networks, and takes seconds here
    for layout in module.LAYOUTS.values():
        rows = module.samplers_table(2000, "cpu", 1, layout)
        assert [row["sampler"] for row in rows] == list(module.SAMPLERS)
        assert all(row["ns per parameter"] > 0 for row in rows)
    module.step_once(2000, "cpu", module.LAYOUTS["4"])
    assert capsys.readouterr().out.count("4 chains: stepped") == len(module.SAMPLERS)


@pytest.mark.slow
def test_steps_of_an_estimate_and_its_set_up(tmp_path: Path) -> None:
    """Rivals make fewer steps, whose rest is extrapolated, and then they have no λ̂."""
    rivals = ["devinterp"] if _is_installed("devinterp", "1.3.2") else []
    options = ["--sizes", "16", "--chains", "2", "--steps", "30", "--per-step", "--rival-steps", "20"]
    tables = _run(
        "speed/bench_estimate.py", *options, "--contenders", "llc_fast", *rivals, path=tmp_path / "chains.json"
    )
    ours, *theirs = tables["16"]
    assert ours["λ̂"] > 0 and ours["chains"] == 2 and "extrapolated" not in ours["contender"]
    assert ours["seconds"] == pytest.approx(ours["set-up, s"] + 30e-6 * ours["µs per step"])
    for row in theirs:
        assert row["contender"].endswith("extrapolated from 10 steps") and "λ̂" not in row
        assert row["seconds"] == pytest.approx(row["set-up, s"] + 30e-6 * row["µs per step"])


@pytest.mark.slow
def test_the_large_network(tmp_path: Path) -> None:
    """One whole estimate, and one of few steps that is extrapolated; the network is kept for the next call."""
    network, contenders = tmp_path / "network.pt", ["llc_fast:tf32", "llc_fast:tf32:kept"]
    options = ["--size", "1k", "--seed", "0", "--steps", "60", "--short", "20", "--network", str(network)]
    tables = _run("gpu/bench_large.py", *options, "--contenders", *contenders, path=tmp_path / "large.json")
    whole, short = tables["rows"]
    assert whole["done"] == 60 and whole["λ̂"] > 0 and network.exists()
    assert whole["λ̂/λ − 1"] == pytest.approx(whole["λ̂"] / tables["network"]["lambda"] - 1)
    assert short["done"] == 20 and short["λ̂"] is None and "extrapolated" in short["contender"]


@pytest.fixture
def with_transformers(tmp_path: Path) -> dict[str, str]:
    """An environment in which language models of transformers can be imported, whatever torchvision is there."""
    pytest.importorskip("transformers")
    folder = tmp_path / "at_start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import families\n\nkept = families.import_torchvision()\n")
    places = [str(folder), str(Path(__file__).parent / "shared"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, places))}


@pytest.mark.slow
def test_a_language_model(tmp_path: Path, with_transformers: dict[str, str]) -> None:
    """What llc_fast says that it needs, and how it does it, stands beside what it takes."""
    options = ["--size", "tiny", "--steps", "6", "--context", "16", "--contenders", "llc_fast", "loop"]
    tables = _run("gpu/bench_language.py", *options, path=tmp_path / "language.json", **with_transformers)
    ours, loop = tables["rows"]
    # Embeddings of 512 tokens, and a matrix back; in each layer two norms, attention and what follows, with biases.
    layer = 2 * 2 * 64 + (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64)
    assert tables["parameters"] == 2 * 512 * 64 + 2 * layer + 2 * 64
    assert ours["steps"] == loop["steps"] == 6 and min(ours["s per step"], loop["s per step"]) > 0
    assert ours["strategy"] == "sequential" and ours["said, bytes a parameter"] > 10
    assert abs(ours["L(w*)"] - math.log(512)) < 0.1 and abs(loop["loss"] - math.log(512)) < 0.1


@pytest.mark.slow
def test_a_contender_that_takes_too_long_says_so(tmp_path: Path, with_transformers: dict[str, str]) -> None:
    """It ends after the steps that it has made, of which there are seconds a step."""
    options = ["--size", "tiny", "--steps", "100000", "--context", "16", "--seconds", "1", "--contenders", "loop"]
    path = tmp_path / "language.json"
    (row,) = _run("gpu/bench_language.py", *options, path=path, **with_transformers)["rows"]
    assert 1 < row["steps"] < 100000 and 0 < row["s per step"] < 1


def test_a_process_that_takes_too_long(benchmark_module: Any, tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text("import time\ntime.sleep(60)\n")
    found = benchmark_module("harness").in_fresh_process(str(script), {}, seconds=0.5)
    assert found == {"error": "ended after 0.5 s", "short": "timed out"}


def test_an_estimate_that_takes_too_long_is_interrupted_once(benchmark_module: Any) -> None:
    """What it has done is returned: a second interruption would raise."""
    model, x = nn.Linear(3, 1), torch.randn(50, 3)
    interrupt = benchmark_module("bench_large").interrupt_after(0.3)
    data = (x, model(x).detach())
    options: dict[str, Any] = {"lr": 1e-4, "num_chains": 1, "num_burnin": 1, "num_draws": 10**7, "progress": interrupt}
    result = llc_fast.estimate_llc(model, data, nn.functional.mse_loss, **options)
    assert result.is_partial and 0 < sum(result.steps_done) < 10**7


# ---- the script ----------------------------------------------------------------------------------------------

_FAKES = {
    # Everything but the report succeeds at once; the stage `step` takes too long.
    "python": 'case "$*" in *gpu_report.py*) exec {python} "$@";; *bench_step.py*) exit 124;; esac\necho "ran $*"',
    "compute-sanitizer": 'while [[ $1 == --* ]]; do [[ $1 == --tool ]] && tool=$2; shift 2; done; "$@" || exit\n'
    "[[ $tool == memcheck ]] && echo '========= ERROR SUMMARY: 0 errors' || "
    "echo '========= RACECHECK SUMMARY: 0 hazards displayed'",
    "ncu": 'if [[ $1 == --import ]]; then echo \'"ID","Kernel Name","Metric Name"\'; exit; fi\n'
    'while [[ $1 == --* ]]; do shift 2; done; "$@"',
}


def _gpu_script(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    (folder / "bin").mkdir()
    for name, body in _FAKES.items():
        path = folder / "bin" / name
        path.write_text(f"#!{bash}\n{body.replace('{python}', sys.executable)}\n")
        path.chmod(0o755)
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SITE": str(Path(llc_fast.__file__).parents[1])}
    command = [bash, str(FOLDER / "gpu" / "gpu.sh"), "-o", str(folder / "out"), *stages]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | paths | {"DEVICE": "cpu", "SMOKE": "1"} | environment
    )


def test_stages_of_the_script(tmp_path: Path) -> None:
    """Those that were named run, in their order; one that fails stops no other, and everything is packed."""
    python = str(tmp_path / "bin" / "python")
    done = _gpu_script(tmp_path, "ncu", "step", "memcheck", "samplers", PYTHON=python)
    out = tmp_path / "out"
    lines = [line.split("\t")[:2] for line in (out / "stages.tsv").read_text().splitlines()]
    assert lines == [["info", "0"], ["samplers", "0"], ["step", "124"], ["memcheck", "0"], ["ncu", "0"]]
    assert done.returncode == 1 and done.stdout.rstrip().endswith("FAILED: step")
    assert "| memcheck on the kernels | ERROR SUMMARY: 0 errors | passes | yes |" in (out / "report.md").read_text()
    with tarfile.open(out / "results.tar.gz") as packed:
        assert {"./gpu.log", "./stages.tsv", "./ncu.csv", "./report.md"} <= set(packed.getnames())


def test_unknown_stage(tmp_path: Path) -> None:
    done = _gpu_script(tmp_path, "stpe")
    assert done.returncode == 2 and "unknown stage 'stpe'" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path, with_transformers: dict[str, str]) -> None:
    """Every stage with the real benchmarks at tiny sizes: all options exist, all files are written."""
    done = _gpu_script(tmp_path, PYTHON=sys.executable, REPRODUCE="5", **with_transformers)
    assert done.returncode == 0, done.stdout[-3000:]
    names = {path.name for path in (tmp_path / "out").glob("*.json")}
    stages = ["samplers", "step", "chains", "large-tf32", "language", "language-large", "step-devinterp2"]
    assert names == {f"{name}.json" for name in [*stages, "step-compiled", "memory"]}


def test_a_time_limit(tmp_path: Path) -> None:
    """Stages for which no time is left are skipped, and it is said."""
    done = _gpu_script(tmp_path, "-t", "5", "samplers", PYTHON=str(tmp_path / "bin" / "python"))
    assert "==> samplers: skipped, no time left" in done.stdout
    assert not (tmp_path / "out" / "samplers.json").exists()


# ---- the report ----------------------------------------------------------------------------------------------


def _made_up(good: bool) -> dict[str, dict[str, Any]]:
    """What gpu.sh leaves after a full run, of a machine that holds all targets or misses all that can be missed."""
    info = {"gpus": ["NVIDIA H100"], "date": "2026-11-22", "llc_fast": "0.1.0", "cuda": "13.0"}
    gpu = {"info": info, "device": "cuda", "parameters": 10**8}
    samplers = [
        {"sampler": name, "share of copy's GB/s": (0.95 if name == "sgld" else 0.86) if good else 0.84}
        for name in ("sgld", "preconditioned-sgld", "rmsprop-sgld", "adam-sgld", "sghmc", "sgnht")
    ]
    kernel = "void llc::(anonymous namespace)::step_kernel<0u, llc::Sgld<float>, float>(llc::Step)"
    launches = {"llc_fast SGLD": {kernel: 1} if good else {kernel: 1, "Memcpy HtoD (Pageable -> Device)": 1}}

    def large(precision: str) -> dict[str, Any]:
        row = {"contender": f"llc_fast:{precision}", "seconds": 299.0 if good else 330.0, "asked, bytes": "≤ 8.85"}
        network = {"parameters": 99_649_917, "widths": [1374, 1032], "lambda": 393_986.5}
        row["bytes per parameter"] = 8.4 if good else 12.0
        return {"info": info, "device": "cuda", "steps": 50_000, "network": network, "rows": [row]}

    return {
        "step": gpu | {"launches": launches, "rows": [{"step": "llc_fast SGLD", "GB/s": 2900.0}]},
        "samplers": gpu | {"samplers": dict.fromkeys(("1 chain", "4 chains", "bfloat16 model"), samplers)},
        "chains": {
            "info": info,
            "work": {"steps": 10_000, "device": "cuda"},
            "1024": [{"contender": "llc_fast", "µs per step": 80.0 if good else 130.0, "µs asked": 100.0}],
        },
        "memory": gpu | {"rows": [{"contender": "sgld", "besides": 11.9 if good else 13.0, "asked": "≤ 12.50"}]},
        "large-tf32": large("tf32"),
        "large-float32": large("float32"),
        "step-devinterp2": gpu | {"rows": [{"step": "devinterp 2.0.1 SGLD", "times llc_fast": 12.0 if good else 9.0}]},
        "language-large": {
            "info": info,
            "device": "cuda",
            "parameters": 6_857_302_016,
            "rows": [{"contender": "llc_fast", "s per step": 0.3, "peak, GiB": 60.0 if good else 79.0}],
        },
    }


def _write(folder: Path, tables: dict[str, dict[str, Any]], status: int = 0, passed: bool = True) -> None:
    folder.mkdir()
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    stages = ("build", "smoke", "tests", "memcheck", "racecheck")
    (folder / "stages.tsv").write_text("".join(f"{name}\t{status}\t1\n" for name in stages))
    said = {
        "build": "",
        "smoke": "40 passed" if passed else "40 skipped",
        "tests": "145 passed, 2855 deselected in 60.00s" if passed else "145 skipped in 1.00s",
        "memcheck": "========= ERROR SUMMARY: 0 errors" if passed else "========= ERROR SUMMARY: 10 errors",
        "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" if passed else "killed",
    }
    (folder / "gpu.log").write_text("".join(f"\n==> {name}\n{text}\n" for name, text in said.items()))


def test_report_of_targets_held(benchmark_module: Any, tmp_path: Path) -> None:
    module = benchmark_module("gpu_report")
    _write(tmp_path / "a", _made_up(good=True))
    results = module.Results([tmp_path / "a"])
    found = module.targets(results)
    assert len(found) == 6 + 1 + 18 + 1 + 4 + 1 + 1 and all(target.holds is True for target in found)
    text = module.report(results)
    assert text.startswith("# NVIDIA H100, 2026-11-22\n") and "**no**" not in text and "not measured" not in text
    assert "| 1 × step_kernel<0u, Sgld<float>, float> | 1 kernel | yes |" in text


def test_report_of_targets_missed(benchmark_module: Any, tmp_path: Path) -> None:
    """A stage that ended well but tested nothing, or did not say that it found nothing, does not count either."""
    module = benchmark_module("gpu_report")
    _write(tmp_path / "a", _made_up(good=False), passed=False)
    found = module.targets(module.Results([tmp_path / "a"]))
    assert [target.what for target in found if target.holds is not False] == ["builds from source"]


def test_report_of_what_was_not_measured(benchmark_module: Any, tmp_path: Path) -> None:
    """Missing stages, failed and uninstalled contenders, and tiny or CPU runs hold no target and break nothing."""
    module = benchmark_module("gpu_report")
    (tmp_path / "empty").mkdir()
    results = module.Results([tmp_path / "empty"])
    assert all(target.holds is None for target in module.targets(results))
    assert "not measured" in module.report(results)

    tables = _made_up(good=True)
    tables["samplers"]["parameters"] = 10**6
    tables["chains"]["work"]["device"] = "cpu"
    tables["memory"]["rows"].append({"contender": "devinterp", "peak": "not installed"})
    tables["large-tf32"]["rows"] = [{"contender": "llc_fast:tf32", "seconds": "failed", "error": "exit status 1"}]
    tables["large-float32"]["steps"] = 40
    _write(tmp_path / "part", tables)
    results = module.Results([tmp_path / "part"])
    unmeasured = [target for target in module.targets(results) if target.holds is None]
    assert len(unmeasured) == 18 + 1 + 4 and "| failed |" in module.report(results)


def test_report_joins_calls(
    benchmark_module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that measured the same the later one counts; the report lies in the first folder."""
    module = benchmark_module("gpu_report")
    good, bad = _made_up(good=True), _made_up(good=False)
    _write(tmp_path / "first", {"step": bad["step"], "chains": good["chains"]})
    _write(tmp_path / "second", {"step": good["step"]})
    kernel = '"0","void llc::<unnamed>::step_kernel<(unsigned int)63, llc::Sgld<float>, float>(llc::Step)"'
    (tmp_path / "second" / "ncu.csv").write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        f'{kernel},"Duration","us","530.1"\n{kernel},"DRAM Throughput","%","91"\n'
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path / "first"), str(tmp_path / "second")])
    module.main()
    text = (tmp_path / "first" / "report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip() and "| yes |" in text and "**no**" not in text
    assert "| step_kernel<63, Sgld<float>, float> | 530.1 us | 91 % |" in text


# ---- replays -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replays_by_python_and_natively(tmp_path: Path) -> None:
    """A row for each number of chains and threads, and for each family."""
    path = tmp_path / "replay.json"
    sizes = ["--sizes", "16", "--chains", "1", "2", "--threads", "1", "2", "--rounds", "1", "--steps", "10"]
    script = [sys.executable, str(FOLDER / "speed/bench_replay.py"), "--json", str(path), *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*script, "--families", "mlp"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    tables = json.loads(path.read_text())
    assert [(row["chains"], row["threads"]) for row in tables["networks"]] == [(1, 1), (2, 1), (2, 2)]
    assert all(row["by Python"] == 0 and row["replay, native, µs"] > 0 for row in tables["networks"])
    assert [row["family"] for row in tables["families"]] == ["mlp"]


@pytest.mark.slow
def test_products_against_the_peak(tmp_path: Path) -> None:
    """A row for each width and product, with each instruction set; no product is faster than the machine."""
    if not _native.has_products():
        pytest.skip("no fused multiply-adds")
    path = tmp_path / "products.json"
    sizes = ["--widths", "7", "--batch", "20", "--chains", "2", "--rounds", "1"]
    script = [sys.executable, str(FOLDER / "speed/bench_products.py"), "--json", str(path), *sizes]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = json.loads(path.read_text())
    for rows in (table for name, table in tables.items() if name.startswith("avx")):
        assert [row["product"] for row in rows] == ["NT", "NN", "TN"]
        assert all(0 < row["replay, llc_fast × 2"] < 2 * row["peak"] for row in rows)


# ---- influence -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_influence_of_tokens(tmp_path: Path) -> None:
    """With and without errors, from one set of sequences and from two: the same entries."""
    path = tmp_path / "influence.json"
    sizes = ["--sequences", "3", "--tokens", "5", "--chains", "2", "--draws", "40", "--rounds", "1"]
    script = [sys.executable, str(FOLDER / "speed/bench_influence.py"), "--json", str(path), *sizes]
    contenders = ["--contenders", "llc_fast", "errors", "two-sets"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*script, *contenders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["contender"] for row in rows] == contenders[1:]
    assert all(row["s"] > 0 and row["largest difference"] < 1e-6 for row in rows)


@pytest.mark.slow
def test_a_whole_run_with_probes(tmp_path: Path) -> None:
    """Parts add up to the whole; the chains' mean is λ̂; what sampling costs is set against its parts."""
    pytest.importorskip("zarr")
    pytest.importorskip("transformers")
    script, path = str(FOLDER / "speed" / "bench_samples.py"), tmp_path / "run.json"
    options = ["--contenders", "llc_fast", "--sizes", "tiny", "--chains", "2", "--draws", "8", "--burnin", "2"]
    options += ["--tokens", "8", "--batch", "4", "--probe", "4", "--threads", "1", "--training", "2", "--rounds", "1"]
    command = [sys.executable, script, *options, "--parts", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    table = json.loads(path.read_text())["tables"]["tiny"]
    ours, steps, forwards = table["rows"]
    assert [ours["contender"], steps["contender"], forwards["contender"]] == [
        "llc_fast",
        "steps alone",
        "forward passes",
    ]
    parts = ("set-up, s", "chains, s", "token BIF, s", "sequence BIF, s")
    assert ours["s"] == pytest.approx(sum(ours[part] for part in parts))
    (round_,) = table["rounds"]["llc_fast"]
    expected = round_["cpu of sampling"] / (steps["CPU s"] + forwards["CPU s"])
    assert table["with probes over steps and forward passes"] == pytest.approx(expected)
    assert math.isfinite(round_["draws"][0]) and round_["store"] > 2 * 8 * 8 * 7 * 2


# ---- families ------------------------------------------------------------------------------------------------


def test_the_table_of_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command measures and writes; families that are not named stay as they were; the page gets the table."""
    path, page, script = tmp_path / "families.json", tmp_path / "families.md", str(FOLDER / "families.py")
    few = ["--json", str(path), "--budget", "0.05", "--rounds", "1", "--default-seconds", "0.1"]
    command, environment = [sys.executable, script, *few, "--families", "mlp"], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

    # The other calls without processes of their own, each of which would import torch again.
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds its folders
    module = runpy.run_path(script)
    before = torch.get_num_threads()

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *options])
        try:
            with warnings.catch_warnings():
                module["main"]()
        finally:
            torch.set_num_threads(before)

    run(*few, "--families", "lstm")
    tables = json.loads(path.read_text())
    assert [row["family"] for row in tables["rows"]] == ["lstm", "mlp"]
    for row in tables["rows"]:
        assert row["works"].startswith("yes") and row["ours, ms"] > 0 < row["plain loop, ms"]
        assert row["why not recorded"] == ""
    page.write_text("before\n")
    with pytest.raises(ValueError, match="has no place for the table"):
        run(*few, "--docs", str(page))
    begin = "<!-- table: python benchmarks/families.py --docs docs/families.md -->"
    page.write_text(f"before\n\n{begin}\n<!-- end of the table -->\nafter\n")
    for _ in range(2):
        run(*few, "--docs", str(page))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert text.count("| lstm |") == text.count("| mlp |") == 1
