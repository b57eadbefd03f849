"""The direction of imports: whoever adds one against it hears of it here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llc_fast

PACKAGE = Path(llc_fast.__file__).parent
LEVELS = (
    ("theory", "schedule", "stats", "support", "kernels"),
    ("samplers", "batches", "loaders", "data", "traces", "weights", "checkpoint_files", "store"),
    ("objective", "result", "plots", "report", "influence", "optim", "problems", "language", "behavioral"),
    ("gradients",),
    ("chains",),
    ("calibration", "twins", "cost", "progress", "settings", "checks", "samples", "logs"),
    ("estimate",),
    ("sweep", "grid", "sampling", "susceptibility", "compat"),
    ("monitor",),
    ("reproduce",),
    ("cli",),
)
"""The modules and folders of the package, from the ground up: imports go to the same level or down."""


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in PACKAGE.rglob("*.py")}


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at module level and in functions, but not those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from _statements(child)


def _imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for statement in _statements(ast.parse(MODULES[module].read_text())):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert statement.level == 0, f"{module} has a relative import"
            base = statement.module or ""
            names = [f"{base}.{alias.name}" for alias in statement.names]
        for name in names:
            within = name.removeprefix("llc_fast.")
            while name.startswith("llc_fast.") and within and within not in MODULES:
                within = within.rpartition(".")[0]
            if name.startswith("llc_fast.") and within:
                found.add(within)
    return found


GRAPH = {module: _imports(module) for module in MODULES}


def _reached(module: str) -> set[str]:
    """All modules that importing and using a module may import."""
    seen, waiting = set[str](), [module]
    while waiting:
        for found in GRAPH[waiting.pop()] - seen:
            seen.add(found)
            waiting.append(found)
    return seen


def _part(module: str) -> str:
    return module.partition(".")[0]


def _of(part: str) -> list[str]:
    return [module for module in MODULES if _part(module) == part]


def test_the_walk_sees_imports() -> None:
    """At module level, in functions, of modules and of names."""
    assert "kernels.step" in GRAPH["kernels.native"]
    assert "estimate" in GRAPH["cli.estimate"]  # inside a function
    assert "chains.run" in _reached("estimate")


def test_every_module_has_a_level() -> None:
    named = [name for level in LEVELS for name in level]
    assert sorted(named) == sorted({_part(module) for module in MODULES if module})


@pytest.mark.parametrize("module", sorted(filter(None, MODULES)))
def test_imports_go_down(module: str) -> None:
    height = {name: k for k, level in enumerate(LEVELS) for name in level}
    above = {other for other in GRAPH[module] if height[_part(other)] > height[_part(module)]}
    assert not above, f"{module} imports from above itself: {', '.join(sorted(above))}"


@pytest.mark.parametrize("module", sorted(filter(None, MODULES)))
def test_there_are_no_circles(module: str) -> None:
    """A package's __init__ names what is in it, and is no part of a circle."""
    reached = _reached(module)
    assert module not in reached or MODULES[module].name == "__init__.py", f"{module} imports itself in the end"


@pytest.mark.parametrize("part", ["stats", "schedule", "theory"])
def test_the_ground_floor_stands_alone(part: str) -> None:
    for module in _of(part):
        assert {_part(other) for other in _reached(module)} <= {part}, module


def test_statistics_need_numpy_alone() -> None:
    for module in (*_of("stats"), "schedule", "theory"):
        names = {n.name.partition(".")[0] for s in _statements(ast.parse(MODULES[module].read_text())) for n in s.names}
        sources = {
            (s.module or "").partition(".")[0]
            for s in _statements(ast.parse(MODULES[module].read_text()))
            if isinstance(s, ast.ImportFrom)
        }
        assert "torch" not in names | sources, module


@pytest.mark.parametrize(
    ("parts", "never"),
    [(("result", "checks"), "chains"), (("kernels",), "objective"), (("samplers",), "objective")],
)
def test_what_is_never_reached(parts: tuple[str, ...], never: str) -> None:
    for part in parts:
        for module in _of(part):
            assert never not in {_part(other) for other in _reached(module)}, module


def test_nothing_but_the_command_line_reaches_the_experiments() -> None:
    for module in filter(None, MODULES):
        if _part(module) not in ("cli", "reproduce"):
            assert "reproduce" not in {_part(other) for other in _reached(module)}, module
