"""What a release is made of: one version, files that agree with it, wheels for every Python that is promised."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import llc_fast

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no files of the repository")


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)
    return found


def _steps() -> list[dict[str, Any]]:
    workflows = [yaml.safe_load(path.read_text()) for path in WORKFLOWS]
    return [step for workflow in workflows for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_version_is_the_same_everywhere() -> None:
    """It is written in llc_fast/__init__.py; what can't read it there must agree."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not installed: run beside a build in place
        assert importlib.metadata.version("llc_fast") == llc_fast.__version__
    assert _project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llc_fast.__version__"}
    heading = re.search(r"^## (\S+) — (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert heading is not None
    assert heading.groups() == (citation["version"], citation["date-released"])
    assert citation["version"] == llc_fast.__version__


def test_every_python_that_is_promised_has_a_wheel() -> None:
    project = _project()
    promised = {
        name.rpartition(" ")[2]
        for name in project["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
    }
    pattern = project["tool"]["cibuildwheel"]["build"]
    numbers = re.fullmatch(r"cp3\{([\d,]+)\}-\*", pattern)
    assert numbers is not None
    assert {f"3.{number}" for number in numbers[1].split(",")} == promised
    script = re.search(r"for minor in (.*); do", (ROOT / ".ci" / "wheels").read_text())
    assert script is not None
    assert set(script[1].split()) == promised
    assert project["project"]["requires-python"] == f">={min(promised, key=lambda version: int(version[2:]))}"


def test_workflows_run_what_is_there() -> None:
    """Targets of the Makefile and scripts of .ci/."""
    commands = "\n".join(step["run"] for step in _steps() if "run" in step)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z-]+)", commands))
    assert used and used <= targets
    texts = commands, yaml.safe_dump(_project()["tool"]["cibuildwheel"])
    named = {name for text in texts for name in re.findall(r"\.ci/\w+", text)}
    assert named >= {".ci/run", ".ci/cuda_toolkit"}
    for name in sorted(named):
        assert (ROOT / name).stat().st_mode & stat.S_IXUSR, name


@pytest.mark.parametrize("name", ["run", "wheels", "cuda_toolkit"])
def test_scripts_are_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / ".ci" / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bug_reports_have_the_facts() -> None:
    """The first field of the template is what `llc-fast info` prints, and it must be filled in."""
    first = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())["body"][0]
    assert first["attributes"]["label"] == "llc-fast info"
    assert first["validations"] == {"required": True}


def test_the_wheel_finds_torchs_openmp() -> None:
    """On Linux the module looks for libgomp beside torch first, so that no other has to be installed."""
    from llc_fast import _native

    data = Path(_native.__file__).read_bytes()
    if data[:4] != b"\x7fELF" or not _native.info()["openmp"] or os.environ.get("LLC_FAST_SANITIZE"):
        pytest.skip("a module that is no ELF file, or has no OpenMP")
    assert b"$ORIGIN/../torch/lib\0" in data
