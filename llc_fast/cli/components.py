"""``llc-fast components``: the parts of a model of the user's own, by the names that ``--params`` takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from llc_fast.cli.estimate import problem_of
from llc_fast.cli.options import JsonPath, write_all, write_json

if TYPE_CHECKING:
    from llc_fast.objective.components import Components


def components(
    problem: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION or module:FUNCTION; the function returns (model, data, loss_fn).")
    ],
    name: Annotated[
        list[str] | None,
        typer.Argument(help="Components whose parameters to list, each by itself; default: all names."),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Verify each attention head by changing its elements; otherwise trust the shapes.")
    ] = True,
    json_path: JsonPath = None,
) -> None:
    """List the components of a model, which --params takes by name, with their numbers of parameters.

    PROBLEM is as for llc-fast estimate. A NAME shows what belongs to that component instead.
    """
    from llc_fast.objective.components import components as find

    model, _, _ = problem_of(problem)
    found = find(model, verify=verify)
    if name:
        parts = {known: {key: found[known].count(key) for key in found[known]} for known in name}
        totals = {key: p.numel() for key, p in model.named_parameters()}
        for known, counts in parts.items():
            typer.echo(f"{known}: {sum(counts.values()):,} parameters")
            typer.echo(_table({key: f"{count:,} of {totals[key]:,}" for key, count in counts.items()}))
        write_all([("numbers", json_path, lambda path: write_json(path, parts))])
        return
    sizes, unknown = _sizes(found)
    typer.echo(_table({label: f"{size:,}" for label, size in _grouped(sizes)}))
    for reason in dict.fromkeys(unknown.values()):
        typer.echo(f"llc-fast: {reason}", err=True)
    write_all([("numbers", json_path, lambda path: write_json(path, {**sizes, **dict.fromkeys(unknown)}))])


COMMANDS = (components,)


def _sizes(found: Components) -> tuple[dict[str, int], dict[str, str]]:
    """The number of parameters of each component; and why some are not known."""
    from llc_fast.objective.heads import ComponentError

    sizes, unknown = dict[str, int](), dict[str, str]()
    for name in found:
        try:
            sizes[name] = found[name].num_parameters
        except ComponentError as error:
            unknown[name] = str(error)
    return sizes, unknown


def _grouped(sizes: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Heads, groups and channels of one size in a line: ``l0 h0 … h11``."""
    waiting: list[str] = []

    def line() -> tuple[str, int]:
        last = waiting[-1].rpartition(" ")[2]
        return waiting[0] + (f" … {last}, each" if len(waiting) > 1 else ""), sizes[waiting[0]]

    for name in sizes:
        if waiting and (_series(name) != _series(waiting[-1]) or sizes[name] != sizes[waiting[-1]]):
            yield line()
            waiting = []
        waiting.append(name)
    if waiting:
        yield line()


def _series(name: str) -> str:
    """What a name has in common with the next head, group or channel; of other names, all of it."""
    return re.sub(r"( [hgc])\d+$", r"\1", name)


def _table(rows: dict[str, str]) -> str:
    left, right = (max(map(len, column), default=0) for column in (rows, rows.values()))
    return "\n".join(f"  {key:<{left}}  {value:>{right}}" for key, value in rows.items())
