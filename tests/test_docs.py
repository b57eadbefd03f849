"""What README.md and docs/ mention exists: files, links, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llc_fast.cli.app import make_app
from llc_fast.reproduce import EXPERIMENTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pytestmark = pytest.mark.skipif(not PAGES[1:], reason="a source distribution has no docs")


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
