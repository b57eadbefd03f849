"""The explanation of each warning: there is one for every code that the package can issue, and no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llc_fast
from llc_fast.checks import CODES
from llc_fast.result import Warning
from llc_fast.support.entries import DOCUMENTATION, command, entries, url

PACKAGE = Path(llc_fast.__file__).parent
PARTS = ("- **Found by:** ", "- **Effect on λ̂:** ", "- **Do:** ")


def _strings(node: ast.AST | None, scope: ast.AST) -> set[str]:
    """The literal that an argument is, or those that its name is given in a function."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    found = set[str]()
    if isinstance(node, ast.Name):
        for assignment in ast.walk(scope):
            if isinstance(assignment, ast.Assign):
                for target in assignment.targets:
                    pairs = [(target, assignment.value)]
                    if isinstance(target, ast.Tuple) and isinstance(assignment.value, ast.Tuple):
                        pairs = list(zip(target.elts, assignment.value.elts, strict=True))
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and name.id == node.id:
                            found |= _strings(value, scope)
    return found


def _issued(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Of each call in a file that makes a warning, where it is and its codes: none of a variable that is not known.

    Whoever repeats a warning passes on its ``code``.
    """
    tree = ast.parse(path.read_text())
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                if call.func.id == "Warning" and len(call.args) == 2 and not isinstance(call.args[1], ast.Attribute):
                    yield f"{path.name}:{call.lineno}", _strings(call.args[1], scope)
                if call.func.id == "_check":
                    yield f"{path.name}:{call.lineno}", _strings(call.args[0], scope)


def _all_issued() -> set[str]:
    return {code for path in PACKAGE.rglob("*.py") for _, codes in _issued(path) for code in codes}


def test_the_walk_sees_codes() -> None:
    """Of checks, literal ones, and those in a variable."""
    assert {"ess", "scale", "uncached", "partial", "diverged", "left-out"} <= _all_issued()


def test_codes_that_are_passed_on_are_few() -> None:
    """Sweeps, scans and susceptibilities gather the warnings of results by their codes."""
    unseen = {where.partition(":")[0] for path in PACKAGE.rglob("*.py") for where, codes in _issued(path) if not codes}
    assert unseen <= {"sweep.py", "grid.py", "susceptibility.py"}


def test_each_code_has_an_entry_and_each_entry_a_code() -> None:
    assert sorted(entries()) == sorted(_all_issued())


def test_entries_have_the_order_of_the_checks() -> None:
    """What comes first in a list of warnings is read first."""
    assert [code for code in entries() if code in CODES] == list(CODES)


@pytest.mark.parametrize("code", list(entries()))
def test_an_entry(code: str) -> None:
    """A sentence, how it is found, what it does, what to do, and whether it may be ignored, in this order."""
    first, rest = entries()[code].split("\n\n", 1)
    assert first.endswith(".") and "\n" not in first
    places = [rest.find(part) for part in PARTS]
    last = max(rest.find("- **Ignore it if** "), rest.find("- **Don't ignore it"))
    assert places[0] == 0 and 0 < places[1] < places[2] < last


def test_addresses() -> None:
    """A warning knows its own; the base is that of the project's metadata."""
    assert Warning("Too short.", "ess").url == url("ess") == f"{DOCUMENTATION}warnings.html#ess"
    said = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'Documentation = "{DOCUMENTATION}"' in said


def test_the_command_has_each_code_once() -> None:
    assert command(["ess", "rhat", "ess"]) == "llc-fast explain ess rhat"
