"""The documentation site, made by ``make docs``: Sphinx, pages in Markdown (MyST), the reference from docstrings."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy.typing
import typer
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_T = TypeVar("_T")


class NDArray(Generic[_T]):
    """In the place of NumPy's, so that signatures have ``NDArray[float64]``, not what that is short for."""


numpy.typing.NDArray = NDArray

import llc_fast  # noqa: E402
from llc_fast.cli.app import make_app  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = {name.lower(): url for name, url in PROJECT.get("urls", {}).items()}.get("source", "").rstrip("/")
"""Where source files are linked to, from pyproject.toml; without it, they are named and not linked."""

# ---- what Sphinx reads -----------------------------------------------------------------------------------------

project = "llc_fast"
author = "the llc_fast developers"
project_copyright = author
version = release = llc_fast.__version__
html_title = f"llc_fast {release}"
html_short_title = "llc_fast"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# The tests execute the notebooks; their outputs are in the files.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline", "colon_fence"]
# As on GitHub: pages link to each other's headings by them.
myst_heading_anchors = 4
exclude_patterns = ["**.ipynb_checkpoints"]

# `name` in a docstring: a link if it is something public, else code. See _unresolved.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = False
# What a class says of its own arguments is in its docstring.
autodoc_class_signature = "mixed"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
python_maximum_signature_line_length = 88
add_module_names = False

nitpicky = True
# All else that docstrings refer to is on this site. These libraries have sites of their own; builds need no network.
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|xarray|arviz|matplotlib|pathlib|typer|collections|typing)\..*")]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
if REPOSITORY:
    html_theme_options |= {
        "source_repository": REPOSITORY,
        "source_branch": "main",
        "source_directory": "docs/",
    }
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 30
linkcheck_anchors = False
# They refuse programs.
linkcheck_ignore = [r"https://doi\.org/.*"]


# ---- what it can't know ----------------------------------------------------------------------------------------


def _copy_examples(app: Sphinx) -> None:
    """The notebooks of ``examples/`` as pages; Sphinx reads nothing outside its folder."""
    target = HERE / "examples"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.ipynb"):
        old.unlink()
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        shutil.copy2(notebook, target)


def _rewrite_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links; the options of commands; where the decisions are in the navigation."""
    folder = "" if docname.startswith("examples/") else "docs"  # where the original is
    source[0] = _with_links(source[0], os.path.dirname(os.path.join(folder, docname)))
    if docname == "api/command_line":
        source[0] += _commands()
    if docname == "decisions/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```\n"
    if docname == "index":
        source[0] = _navigation(source[0])


def _navigation(text: str) -> str:
    """The front page without patterns in its toctrees that no page is left for: Sphinx would warn of them."""
    seen: set[Path] = set()

    def pattern(found: re.Match[str]) -> str:
        pages = {page for page in HERE.glob(f"{found[0]}.*") if page.suffix in (".md", ".ipynb")} - seen
        seen.update(pages)
        return found[0] if pages else ""

    return re.sub(r"^[\w/]+\*$", pattern, text, flags=re.MULTILINE)


def _rewrite_included(app: Sphinx, path: Path, docname: str, source: list[str]) -> None:
    source[0] = _with_links(source[0], os.path.relpath(Path(app.srcdir, path).parent, ROOT))


def _with_links(text: str, folder: str) -> str:
    """Markdown whose links from file to file lead to pages of the site, and else to the repository on the web.

    Args:
        text: Markdown.
        folder: where it is in the repository.
    """

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = os.path.normpath(os.path.join(folder, target))
        if not (ROOT / path).exists():
            return found[0]  # Sphinx will say so
        if path in ("CONTRIBUTING.md", "CHANGELOG.md"):
            path = f"docs/{path.lower()}"
        if path.startswith("examples/") and path.endswith(".ipynb"):
            path = f"docs/{path}"
        if not path.startswith("docs/") or path.endswith((".py", ".json")):
            return f"[{label}]({REPOSITORY}/blob/main/{path})" if REPOSITORY else label
        if re.fullmatch(r"`?[\w./-]+\.(md|ipynb)`?", label):
            label = ""  # a file's name: MyST puts the title of the page or the section there
        return f"[{label}]({path.removeprefix('docs')}{anchor})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)", link, text)


def _commands() -> str:
    """``llc-fast --help`` of every command, as Markdown."""
    from typer.cli import get_docs_for_click

    command = typer.main.get_command(make_app())
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="llc-fast", indent=1)
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)  # they follow, each with a heading
    parts = text.split("`")  # every other one is code; the rest would get dashes for the hyphens of options
    return "`".join(part if k % 2 else re.sub(r"--[\w-]+", r"`\g<0>`", part) for k, part in enumerate(parts))


def _unresolved(app: Sphinx, env: BuildEnvironment, node: Any, contnode: nodes.TextElement) -> nodes.Node | None:
    """Where a reference leads that Sphinx knows no target of; None lets it complain.

    - What a name is by the module that it lives in: its public name.
    - What a class inherits: the class that has it.
    - A type of an argument or attribute, and `name` without a role, which may be an argument: plain text.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    names = [_public(target)]
    owner: Any = sys.modules.get(node.get("py:module") or "")
    for part in filter(None, (node.get("py:class") or "").split(".")):
        owner = getattr(owner, part, None)
    if inspect.isclass(owner):
        names += [f"{_public(f'{base.__module__}.{base.__qualname__}')}.{target}" for base in owner.__mro__]
    domain = env.domains.python_domain
    for name in names:
        if name in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
    is_type = node.get("refspecific") or any(isinstance(above, addnodes.desc_signature) for above in _above(node))
    return contnode if is_type or node["reftype"] == "obj" else None


def _public(name: str) -> str:
    """The public name of something in a module of the package, such as that of ``llc_fast.result.LLCResult.save``."""
    for module in (llc_fast, llc_fast.samplers):
        for public in module.__all__:
            home = getattr(getattr(module, public), "__module__", None)
            if home and (name == f"{home}.{public}" or name.startswith(f"{home}.{public}.")):
                return module.__name__ + name.removeprefix(home)
    return name


def _above(node: nodes.Node) -> Iterator[nodes.Node]:
    while (node := node.parent) is not None:
        yield node


def _is_skipped(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Whether a member is left out: fields of named tuples, of which the class says what they are."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _not_a_type(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking the first line of a property, "λ̂: the mean of …", for its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def _types_beside_names(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put the type of an attribute behind its name, and give each of several names a line, where napoleon does not."""
    text = "\n".join(lines)
    text = re.sub(r"^(\.\. attribute:: .+\n)((?:(?:   .*)?\n)*?)(   :type: .+)$", r"\1\3\n\2", text, flags=re.MULTILINE)
    text = re.sub(
        r"^(\.\. attribute:: )(.+, .+)$",
        lambda found: found[1] + found[2].replace(", ", "\n" + " " * len(found[1])),
        text,
        flags=re.MULTILINE,
    )
    lines[:] = text.split("\n")


def _without_source(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """No buttons that lead to the copy of a notebook, which the repository does not have."""
    if pagename.startswith("examples/"):
        context["theme_source_repository"] = ""


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _copy_examples)
    app.connect("source-read", _rewrite_source)
    app.connect("include-read", _rewrite_included)
    app.connect("missing-reference", _unresolved)
    app.connect("html-page-context", _without_source)
    app.connect("autodoc-skip-member", _is_skipped)
    app.connect("autodoc-process-docstring", _not_a_type, priority=400)  # before napoleon's, which has 500
    app.connect("autodoc-process-docstring", _types_beside_names, priority=600)
