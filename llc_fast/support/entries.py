"""Where each warning is explained: an entry for each code in ``warnings.md``, which is a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

DOCUMENTATION = "https://llc-fast.readthedocs.io/en/stable/"
"""The address of the documentation."""
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


@cache
def entries() -> dict[str, str]:
    """The explanation of each code, Markdown without its heading, in the order of the page.

    Its first paragraph is a single sentence.
    """
    # A link to docs/warnings.md in the source folder, a copy of it in what is installed.
    page = files("llc_fast").joinpath("warnings.md").read_text(encoding="utf-8")
    _, *parts = _HEADING.split(page)
    return {code: text.strip() for code, text in zip(parts[::2], parts[1::2], strict=True)}


def url(code: str) -> str:
    """The address of a code's entry."""
    return f"{DOCUMENTATION}warnings.html#{code}"


def command(codes: Iterable[str]) -> str:
    """What to type for the entries of some codes, each once."""
    return " ".join(["llc-fast explain", *dict.fromkeys(codes)])
