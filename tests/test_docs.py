"""What README.md and docs/ mention exists: files, links, commands. What is public is in the reference."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import llc_fast
from llc_fast.cli.app import make_app
from llc_fast.reproduce import EXPERIMENTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
SITE = ROOT / "build" / "docs"
"""What `make docs` builds."""
pytestmark = pytest.mark.skipif(not REFERENCE, reason="a source distribution has no docs")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere(page: Path) -> None:
    """To files, and to headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert anchor in [_anchor(heading) for heading in headings], target


def test_files_are_where_the_docs_say(page: Path) -> None:
    mentioned = re.findall(r"\b(?:llc_fast|csrc|tests|benchmarks|docs)/[\w./-]*\w", page.read_text())
    assert [name for name in mentioned if not (ROOT / name).exists()] == []


def test_commands_exist(page: Path) -> None:
    """Of the Makefile and of the program, experiments by name."""
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    commands = {command.callback.__name__ for command in make_app().registered_commands if command.callback}
    assert set(re.findall(r"(?:`|^    )llc-fast ([a-z]+)", text, re.MULTILINE)) <= commands
    assert set(re.findall(r"llc-fast\s+reproduce\s+([a-z-]+)", text)) <= {*EXPERIMENTS, "all"}


@pytest.mark.parametrize("name", ["performance", "reproduce", "families"])
def test_measured_tables_have_a_date_and_versions(name: str) -> None:
    """In the line below: "*2026-11-28: llc_fast 0.1.0, torch 2.13.0 (CPU), …*". In families.md a script writes it."""
    text = (ROOT / "docs" / f"{name}.md").read_text()
    if name == "families":
        text = text.partition("<!-- table: ")[2].partition("<!-- end of the table -->")[0]
    tables = re.findall(r"(?:^\|.*\n)+\n(.*)", text, re.MULTILINE)
    assert tables
    assert [line for line in tables if not re.match(r"\*20\d\d-\d\d-\d\d", line)] == []


# ---- the reference -----------------------------------------------------------------------------------------------


def _public(module: types.ModuleType = llc_fast) -> Iterator[tuple[str, object]]:
    """Every public name with its module, and what it is; those of public modules, too."""
    for name in module.__all__:
        found = getattr(module, name)
        if isinstance(found, types.ModuleType):
            assert hasattr(found, "__all__"), f"{found.__name__} is public: its __all__ says what of it is"
            yield from _public(found)
        else:
            yield f"{module.__name__}.{name}", found


PUBLIC = dict(_public())
CLASSES = {name: found for name, found in PUBLIC.items() if inspect.isclass(found)}


def _members(cls: type) -> Iterator[tuple[str, object, list[type]]]:
    """Public methods and properties of a class: name, what it is, and the classes of this package that define it."""
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "llc_fast"]
    fields = (
        {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {*getattr(cls, "_fields", ())}
    )
    for name in sorted({name for base in ours for name in vars(base) if not name.startswith("_")} - fields):
        found = inspect.getattr_static(cls, name)
        if (
            isinstance(found, property | staticmethod | classmethod)
            or inspect.isroutine(found)
            or hasattr(found, "func")
        ):
            yield name, found, [base for base in ours if name in vars(base)]


def _directives() -> dict[str, dict[str, str]]:
    """What the pages of the reference take from docstrings, by dotted name, with the options of each directive."""
    found: dict[str, dict[str, str]] = {}
    for page in REFERENCE:
        module = ""
        for directive, name, options in re.findall(
            r"^\.\. (auto\w+|py:\w+):: ([\w.]+)(?:\(\))?\n((?:   :.*\n)*)", page.read_text(), re.MULTILINE
        ):
            given = dict(re.findall(r"^   :([\w-]+): *(.*)$", options, re.MULTILINE))
            if directive in ("automodule", "py:module"):
                module = name
                listed = [part.strip() for part in given.get("members", "").split(",") if part.strip()]
                found |= {f"{name}.{member}": {"members": ""} for member in listed}
                if given.get("members") == "" and name.partition(".")[2] in llc_fast.__all__:
                    names = getattr(llc_fast, name.partition(".")[2]).__all__
                    found |= {f"{name}.{member}": {"members": ""} for member in names}
            else:
                found[name if "." in name else f"{module}.{name}"] = given
    return found


DIRECTIVES = _directives()


def test_the_walk_sees_names() -> None:
    assert {"llc_fast.estimate_llc", "llc_fast.theory.deep_linear", "llc_fast.samplers.Sampler"} <= set(PUBLIC)
    assert {name for name, _, _ in _members(llc_fast.LLCResult)} >= {"llc_mean", "interval", "load", "to_xarray"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_in_the_reference(name: str) -> None:
    assert name in DIRECTIVES, f"a page of docs/api/ needs: .. autofunction:: {name} (or autoclass, …)"
    found = PUBLIC[name]
    if inspect.isclass(found) or inspect.isroutine(found):
        assert inspect.getdoc(found), "it has no docstring"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_members_of_public_classes_are_in_the_reference(name: str) -> None:
    """With a docstring, on the page of the class itself or of the base class that has them; or under Attributes."""
    cls = CLASSES[name]
    shown = {_home(known) for known, options in DIRECTIVES.items() if "members" in options}
    for member, found, owners in _members(cls):
        if re.search(rf"^ +{member}: ", cls.__doc__ or "", re.MULTILINE):
            continue
        text = inspect.getdoc(getattr(cls, member, None)) or inspect.getdoc(found)
        assert text, f"{name}.{member} has no docstring"
        assert shown & {*owners}, f"{name}.{member} is on no page: give the directive of its class :members:"


def _home(name: str) -> object:
    """What a dotted name is."""
    module, _, last = name.rpartition(".")
    found: object = getattr(__import__(module, fromlist=[last]), last)
    return found


@pytest.mark.parametrize("name", [name for name in sorted(CLASSES) if dataclasses.is_dataclass(CLASSES[name])])
def test_fields_of_public_classes_are_described(name: str) -> None:
    """In the docstring of the class, or of the one that it has them from."""
    cls = CLASSES[name]
    texts = "\n".join(base.__doc__ or "" for base in cls.__mro__)
    for field in dataclasses.fields(cls):
        if not field.name.startswith("_"):
            assert re.search(rf"^ *(?:\w+, )*{field.name}(?:, \w+)*: ", texts, re.MULTILINE), field.name


@pytest.mark.skipif(not (SITE / "objects.inv").exists(), reason="`make docs` has not been run here")
def test_the_site_has_every_name_and_option() -> None:
    """Of the package, in the inventory that other sites read; and of the command line."""
    inventory = zlib.decompress((SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    names = {line.split()[0] for line in inventory.splitlines() if " py:" in line}
    assert set(PUBLIC) - names == set()
    for name, cls in CLASSES.items():
        for member, _, owners in _members(cls):
            ends = tuple(f".{base.__name__}.{member}" for base in owners)
            assert any(known.endswith(ends) for known in names), f"{name}.{member}"
    page = re.sub(r"<[^>]+>", "", (SITE / "api" / "command_line.html").read_text())
    for command in typer.main.get_command(make_app()).commands.values():
        assert f"llc-fast {command.name}" in page
        for option in command.params:
            assert max(option.opts, key=len) in page, option.name
