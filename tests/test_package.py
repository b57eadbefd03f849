"""The package as a whole: what ``import llc_fast`` gives, and what it does not wait for."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import llc_fast

TOP = Path(llc_fast.__file__)
TESTS = Path(__file__).parent
OF_NO_MODULE = {
    "test_benchmarks.py": "scripts outside of the package",
    "test_devinterp.py": "another package with our optimizers in it",
    "test_examples.py": "notebooks and scripts of examples/",
    "test_docs.py": "README.md and docs/",
    "test_guides.py": "code in the pages for newcomers",
    "test_optim_faults.py": "of optim and kernels.native: what happens to tensors between steps",
    "families/test_families.py": "the commonest models of the PyTorch world",
    "families/test_given.py": "what people bring along: other packages' modules, data and layers",
    "fuzz/test_fuzz_estimates.py": "whole estimates of random models, losses and data",
    "fuzz/test_fuzz_optimizers.py": "of optim: any sequence of calls",
    "kernels/test_arm64.py": "the native module's kernels, for another processor",
    "kernels/test_sanitizers.py": "a build of the native module",
    "test_imports.py": "which module may import which",
    "test_length.py": "how long chains run when nobody gives their length",
    "test_package.py": "the package as a whole",
    "test_release.py": "version, wheels, workflows and templates",
    "test_prior.py": "nbeta=0, in settings, calibration, estimate, result and checks",
    "kernels/test_native_minibatch.py": "of native and reference: the samples of a minibatch",
    "kernels/test_noise.py": "of native and reference: the normals",
    "objective/test_standing_still.py": "L(w*) and the chains' losses, over kinds of losses, models and data",
    "samplers/test_samplers.py": "every sampler by the same tests, whichever module it is in",
    "samplers/test_stationary.py": "the law of SGLD's chain in closed form",
}
"""Test files that are named for no module, and what they test."""


def _modules_after(code: str) -> set[str]:
    """The modules that a new interpreter has imported when it has run `code`."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    beside = TOP.parents[1]  # where it finds the package that is tested, not a source folder
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=beside)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing() -> None:
    found = _modules_after("import llc_fast; llc_fast.__version__, dir(llc_fast)")
    assert {name for name in found if name.startswith("llc_fast")} == {"llc_fast"}
    assert not found & {"torch", "numpy"}


def test_public_names_import_no_more_than_torch_does() -> None:
    """Whatever else a job needs is imported by that job."""
    before = "import sys, torch; before = set(sys.modules) - {'sys'}; import llc_fast"
    after = "[getattr(llc_fast, name) for name in llc_fast.__all__]; [sys.modules.pop(name) for name in before]"
    found = _modules_after(f"{before}\n{after}")
    assert {"llc_fast.optim", "llc_fast.sweep"} <= found
    assert {name.partition(".")[0] for name in found} <= {"llc_fast", "numpy", "tqdm", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", llc_fast.__all__)
def test_public_names(name: str) -> None:
    """Each is there, is listed, and is the object of its module."""
    value = getattr(llc_fast, name)
    assert name in dir(llc_fast)
    if home := llc_fast._HOME.get(name):
        assert value is getattr(sys.modules[f"llc_fast.{home}"], name)
        assert value.__module__ == f"llc_fast.{home}" and value.__name__ == name


def test_type_checkers_are_told_the_same() -> None:
    """The imports that only type checkers read, the table that Python reads, and ``__all__``."""
    told = {}
    for node in ast.walk(ast.parse(TOP.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llc_fast"):
            told |= {alias.name: node.module.removeprefix("llc_fast").lstrip(".") for alias in node.names}
    modules = {name for name, home in told.items() if not home}
    assert {name: home for name, home in told.items() if home} == llc_fast._HOME
    assert sorted([*told, "__version__"]) == sorted(llc_fast.__all__)
    assert modules == {"language", "samplers", "theory"}


def test_star_import() -> None:
    found = _modules_after("from llc_fast import *; SGLD, estimate_llc, theory.regular, samplers.SAMPLERS")
    assert "llc_fast.sweep" in found


def test_submodules_are_attributes() -> None:
    """Without importing them first."""
    names = ["theory", "_native", "kernels", "samplers", "stats", "optim", "result", "estimate", "problems", "cli"]
    code = "\n".join(f"assert llc_fast.{name}.__name__ == 'llc_fast.{name}'" for name in names)
    assert {f"llc_fast.{name}" for name in names} <= _modules_after(f"import llc_fast\n{code}")


@pytest.mark.parametrize("name", ["estimate_lcc", "__wrapped__", "__main__"])
def test_other_names_are_attribute_errors(name: str) -> None:
    assert not hasattr(llc_fast, name)
    with pytest.raises(AttributeError, match=f"module 'llc_fast' has no attribute '{name}'"):
        getattr(llc_fast, name)


@pytest.mark.parametrize("arguments", [["-c", "import llc_fast; llc_fast.SGLD"], ["-m", "llc_fast.cli", "info"]])
def test_the_source_folder_says_that_nothing_is_built(arguments: list[str], tmp_path: Path) -> None:
    """With its name and the remedy; the program says it in one line."""
    shutil.copytree(TOP.parent, tmp_path / "llc_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, *arguments]

    def said() -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and ("Traceback" in done.stderr) is (arguments[0] == "-c")
        return done.stderr

    assert f"No module named 'llc_fast._native': {tmp_path / 'llc_fast'} lacks its native module" in said()
    (tmp_path / "setup.py").touch()
    text = said()
    assert f"llc_fast was imported from its source folder, {tmp_path}, where its native module is not built" in text
    assert "Start Python in another folder" in text and "pip install -e ." in text
    (tmp_path / "llc_fast" / "_native.cpython-39-x86_64-linux-gnu.so").touch()
    assert "is built for another Python (_native.cpython-39-x86_64-linux-gnu.so)" in said()


def test_a_broken_submodule_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that is there and needs one that is not: the error names the one that is not."""
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    monkeypatch.setattr(llc_fast, "__path__", [*llc_fast.__path__, str(tmp_path)])
    assert find_spec("llc_fast.broken") is not None
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        llc_fast.broken  # noqa: B018


def test_tests_are_where_their_module_is() -> None:
    """tests/a/test_b.py tests llc_fast/a/b.py; a file of another name, or folder, says above what it tests."""
    found = {path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    for path in sorted(found):
        assert path.parts[0] in ("families", "fuzz") or (TOP.parent / path.parent).is_dir(), path
        module = TOP.parent / path.with_name(path.name.removeprefix("test_"))
        assert module.exists() is (path.as_posix() not in OF_NO_MODULE), path
    assert {Path(name) for name in OF_NO_MODULE} <= found
