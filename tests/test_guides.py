"""The code in the pages for newcomers runs as it is printed there, and names of other packages are what they are."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import llc_fast

DOCS = Path(__file__).parents[1] / "docs"
SHARED = Path(__file__).parent / "shared"
pytestmark = pytest.mark.skipif(not (DOCS / "guides").is_dir(), reason="a source distribution has no docs")
PAGES = {
    "quickstart.md": ("matplotlib",),
    "guides/classifier.md": ("sklearn", "matplotlib"),
    "guides/checkpoints.md": ("sklearn", "xarray", "matplotlib"),
    "guides/language_model.md": ("transformers",),
    "guides/influence.md": ("sklearn", "zarr", "xarray", "matplotlib"),
    "guides/own_loop.md": (),
    "guides/large_models.md": (),
    "guides/troubleshooting.md": ("sklearn",),
    "concepts/lambda.md": (),
    "coming_from_devinterp.md": ("devinterp",),
}
"""Pages with Python to run, and what they need beside llc_fast."""
QUICK = ("quickstart.md", "guides/own_loop.md", "guides/large_models.md", "concepts/lambda.md")
"""Those that take seconds."""
_START = """
import sys
sys.path.insert(0, {shared!r})
from families import import_torchvision
kept = import_torchvision()
"""
"""Before pages with transformers: its torchvision may be built for another torch."""


def _blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_all_pages_with_code_are_run() -> None:
    folders = [*DOCS.glob("guides/*.md"), *DOCS.glob("concepts/*.md"), DOCS / "quickstart.md"]
    found = {path.relative_to(DOCS).as_posix() for path in folders if "```python" in path.read_text()}
    assert found | {"coming_from_devinterp.md"} == set(PAGES)


@pytest.mark.parametrize("page", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PAGES])
def test_code_runs_as_printed(page: str, tmp_path: Path) -> None:
    """All blocks of a page, in order, in one interpreter and an empty folder."""
    for name in PAGES[page]:
        pytest.importorskip(name)
    if page == "coming_from_devinterp.md":
        _devinterp_1()
    start = _START.format(shared=str(SHARED)) if "transformers" in PAGES[page] else ""
    script = tmp_path / "page.py"
    script.write_text(start + "\n".join(_blocks(page)), encoding="utf-8")
    beside = os.pathsep.join(filter(None, [str(Path(llc_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": beside, "PYTHONIOENCODING": "utf-8"}
    folder = tmp_path / "empty"
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    _compare(page, done.stdout)


def _words(line: str) -> list[str]:
    """What a line says, without its numbers, which are other ones on other machines."""
    return re.findall(r"[^\W\d_]{3,}", line.split("…")[0])


def _compare(page: str, printed: str) -> None:
    """Each first line of an output in the page is a line that was printed, but for numbers."""
    said = [_words(line) for line in printed.splitlines()]
    outputs = re.findall(r"^```\n\n    (.*)$", (DOCS / page).read_text(), re.MULTILINE)
    for line in outputs:
        words = _words(line)
        assert any(words[:4] == each[: len(words[:4])] for each in said), (line, printed)


# ---- names of devinterp ------------------------------------------------------------------------------------


def _devinterp_1() -> None:
    """Skip where devinterp 1.3.2 is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("devinterp")
    except PackageNotFoundError:
        pytest.skip("pip install devinterp==1.3.2")
    if found != "1.3.2":
        pytest.skip(f"devinterp is installed as {found}, not 1.3.2")


def _table(heading: str) -> list[list[str]]:
    """The rows of the first table after a line of a page that begins like this, cell by cell."""
    text = (DOCS / "coming_from_devinterp.md").read_text()
    text = text[text.index(heading) :]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[0].splitlines()[2:]]


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("heading", "function"),
    [
        ("### Arguments of `estimate_learning_coeff_with_summary`", llc_fast.estimate_llc),
        ("### Arguments of the samplers", llc_fast.SGLD),
    ],
)
def test_our_arguments_in_tables(heading: str, function: Any) -> None:
    rows = _table(heading)
    assert len(rows) >= 8
    for row in rows:
        assert row[1] == "–" or set(_names(row[1])) <= _arguments(function), row


def test_our_arguments_beside_those_of_devinterp_2() -> None:
    ours = _arguments(llc_fast.sample) | _arguments(llc_fast.estimate_llc)
    rows = _table("| argument of their `sample` |")
    assert len(rows) >= 10
    for row in rows:
        assert row[1] == "–" or set(_names(row[1])) <= ours, row


def test_arguments_of_devinterp_1() -> None:
    """Every one of its estimate is in the table, and nothing else; those of its SGLD exist."""
    pytest.importorskip("devinterp")
    _devinterp_1()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from devinterp.optim.sgld import SGLD
        from devinterp.slt.sampler import estimate_learning_coeff_with_summary as theirs
        from devinterp.utils import default_nbeta
    named = [_names(row[0])[0] for row in _table("### Arguments of `estimate_learning_coeff_with_summary`")]
    assert sorted(named) == sorted(_arguments(theirs))
    assert {_names(row[0])[0] for row in _table("### Arguments of the samplers")} <= _arguments(SGLD)
    defaults = {name: p.default for name, p in inspect.signature(theirs).parameters.items()}
    assert (defaults["num_draws"], defaults["num_chains"], defaults["num_burnin_steps"]) == (100, 10, 0)
    sgld = {name: p.default for name, p in inspect.signature(SGLD).parameters.items()}
    assert (sgld["lr"], sgld["localization"], sgld["nbeta"]) == (0.01, 0.0, 1.0)
    assert default_nbeta(500) == pytest.approx(llc_fast.default_nbeta(500)) == pytest.approx(80.4556, rel=1e-5)


def test_callbacks_of_devinterp_1() -> None:
    pytest.importorskip("devinterp")
    _devinterp_1()
    import importlib

    homes = ("llc", "mala", "norms", "cov", "wbic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [importlib.import_module(f"devinterp.slt.{home}") for home in homes]
    for row in _table("### Callbacks"):
        for name in _names(row[0]):
            assert any(hasattr(module, name) for module in modules), name


def test_public_names_in_the_pages() -> None:
    """``llc_fast.name`` and ``result.name`` in any page for newcomers are there."""
    pages = [*DOCS.glob("guides/*.md"), *DOCS.glob("concepts/*.md")]
    pages += [DOCS / name for name in ("quickstart.md", "warnings.md", "coming_from_devinterp.md")]
    fields = {*llc_fast.LLCResult.__dataclass_fields__}
    for page in pages:
        text = page.read_text()
        for name in re.findall(r"\bllc_fast\.(\w+)", text):
            assert hasattr(llc_fast, name), (page.name, name)
        for name in re.findall(r"\bresult\.(\w+)", text):
            assert hasattr(llc_fast.LLCResult, name) or name in fields, (page.name, name)
