"""The notebooks of examples/: equal to their scripts, with outputs of a full run, and executed on small settings."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llc_fast

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("quickstart", "checkpoints", "heads", "influence", "coming_from_devinterp")
NUMBER = r"(-?\d+\.\d+)"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="a source distribution may have no examples")


def _executor() -> Any:
    """The module examples/execute.py."""
    for name in ("jupytext", "nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("examples_execute", EXAMPLES / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _environment() -> dict[str, str]:
    """Short runs, with the package that is tested here, wherever the script is."""
    place = os.pathsep.join(filter(None, [str(Path(llc_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {"LLC_FAST_SMALL": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": place}


def _printed(notebook: Any) -> str:
    """All that its cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def _pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


# ---- what is committed -------------------------------------------------------------------------------------


def test_every_script_is_listed() -> None:
    """A notebook for each script but the one that makes them, each in the README."""
    assert _executor().NAMES == NAMES
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NAMES, "execute"}
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NAMES)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_equal_their_scripts(name: str) -> None:
    executor = _executor()
    nbformat = pytest.importorskip("nbformat")
    kept = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    fresh = executor.notebook_of(EXAMPLES / f"{name}.py")
    assert kept.metadata == fresh.metadata
    for there, here in zip(kept.cells, fresh.cells, strict=True):
        assert (there.cell_type, there.source, there.id) == (here.cell_type, here.source, here.id), "make notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_have_been_run(name: str) -> None:
    """From top to bottom, without an error, and nothing in them is of the machine."""
    nbformat = pytest.importorskip("nbformat")
    path = EXAMPLES / f"{name}.ipynb"
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    assert path.stat().st_size < 1e6
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert _pictures(kept) >= 1
    words = _printed(kept) + "".join(
        str(o.data.get(kind, "")) for o in outputs if "data" in o for kind in o.data if kind != "image/png"
    )
    assert not re.search(r"(?:^|[\s'\"(])/(?:home|root|tmp|usr|work|var)/|site-packages|not installed", words)
    titles = [
        line
        for cell in kept.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("# ")
    ]
    assert len(titles) == 1 and kept.cells[0].source.startswith(titles[0])


def test_text_can_be_renewed_without_a_run(tmp_path: Path) -> None:
    """Outputs are kept where the code is the same, and refused where it is not."""
    executor = _executor()
    nbformat = pytest.importorskip("nbformat")
    executed = nbformat.read(EXAMPLES / "heads.ipynb", as_version=4)
    script = tmp_path / "heads.py"
    source = (EXAMPLES / "heads.py").read_text(encoding="utf-8")
    script.write_text(source.replace("# ## The task", "# ## Something else"), encoding="utf-8")
    renewed = executor.with_new_text(script, executed)
    assert any(cell.source.startswith("## Something else") for cell in renewed.cells)
    assert _printed(renewed) == _printed(executed)
    script.write_text(source.replace("HEADS = 32, 4", "HEADS = 32, 8"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"heads\.py has changed"):
        executor.with_new_text(script, executed)


# ---- what they do --------------------------------------------------------------------------------------------


def _check_quickstart(printed: str) -> None:
    """λ̂ of networks whose λ is known; a warning that was provoked, and is gone after its remedy."""
    found = re.findall(rf"exact λ = (\S+) of \d+ parameters, λ̂ = {NUMBER} ± {NUMBER}", printed)
    assert [float(exact) for exact, _, _ in found] == [16, 27.5, 64]
    for exact, llc, stderr in found:
        assert abs(float(llc) - float(exact)) < 5 * float(stderr) + 0.05 * float(exact)
    assert "[step-size]" in printed
    coarse, mended = (float(value) for value in re.findall(rf"^λ̂ = {NUMBER} ± [\d.]+(?:$|, bias)", printed, re.M))
    first = float(re.search(rf"^{NUMBER} ± ", printed, re.M)[1])  # type: ignore[index]
    assert abs(mended - first) < 0.15 * first < coarse - first


def _check_checkpoints(printed: str) -> None:
    """An estimate for each checkpoint, larger at the end."""
    rows = re.findall(rf"^(\d+) +{NUMBER} +{NUMBER} +{NUMBER}$", printed, re.M)
    assert [int(row[0]) for row in rows] == [0, 20, 60]
    first, *_, last = [(float(llc), float(stderr), float(loss)) for _, llc, stderr, loss in rows]
    assert last[0] - first[0] > 2 * math.hypot(first[1], last[1]) and last[2] < first[2] - 0.5


def _check_heads(printed: str) -> None:
    """A row for each head, with an error."""
    rows = re.findall(rf"^(l\d h\d) +{NUMBER} ± {NUMBER} +([+-]\d+\.\d+) +{NUMBER} +{NUMBER} ", printed, re.M)
    assert [row[0] for row in rows] == [f"l{layer} h{head}" for layer in range(2) for head in range(4)]
    assert all(float(llc) > -3 * float(stderr) and float(stderr) > 0 for _, llc, stderr, *_ in rows)
    assert all(0 <= float(value) <= 1 for row in rows for value in row[4:])


def _check_influence(printed: str) -> None:
    """Influence of each kind of text on each other."""
    rows = [
        row.split() for row in printed.splitlines() if re.match(rf"(prose|grammar|source) +({NUMBER} *){{3}}$", row)
    ]
    assert [row[0] for row in rows] == ["prose", "grammar", "source"]
    assert all(math.isfinite(float(value)) for row in rows for value in row[1:])
    assert "Susceptibilities of 2 components" in printed


def _check_coming_from_devinterp(printed: str) -> None:
    """All rows, near the exact λ but for those whose step size is too large."""
    exact = float(re.search(r"exact λ = ([\d.]+)", printed)[1])  # type: ignore[index]
    rows = {name.strip(): float(llc) for name, llc in re.findall(rf"^(\S.*?) +λ̂ = +{NUMBER}, standard", printed, re.M)}
    assert len(rows) == (8 if "is not installed" not in printed else 5)
    for name, llc in rows.items():
        assert abs(llc - exact) < (1.0 if "ε" in name else 0.25) * exact, name
    assert "[step-size]" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "xarray", "zarr", "safetensors"):
        pytest.importorskip(package)
    executor = _executor()
    for key, value in _environment().items():
        monkeypatch.setenv(key, value)
    done = executor.execute(EXAMPLES / f"{name}.py", tmp_path)
    assert _pictures(done) == _pictures(pytest.importorskip("nbformat").read(EXAMPLES / f"{name}.ipynb", as_version=4))
    globals()[f"_check_{name}"](_printed(done))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


@pytest.mark.slow
def test_scripts_write_their_pictures(tmp_path: Path) -> None:
    """The script as it is, in a process of its own: pictures of whole chains, and tokens with colors behind them."""
    for name in ("zarr", "xarray", "matplotlib"):
        pytest.importorskip(name)
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "influence.py"), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | _environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    pictures = {"influence.png", "kernel.png", "llc.png", "pca.png", "susceptibilities.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*pictures, "tokens.html"}
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "tokens.html").read_text(encoding="utf-8")
    assert all(f"influence of tokens on the mean loss of held-out {kind}" in page for kind in ("prose", "grammar"))
    _check_influence(done.stdout)
    assert any(line.startswith("λ̂ = ") for line in done.stdout.splitlines())
