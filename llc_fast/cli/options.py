"""Options that several commands share, what they write, and the class of all commands."""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from llc_fast.support.files import atomic_write, output_path, plain
from llc_fast.support.warned import shown_otherwise

if TYPE_CHECKING:
    from llc_fast.result import LLCResult

STDOUT = Path("-")
"""The file that stands for standard output."""
_stdout = contextvars.ContextVar[IO[str] | None]("llc_fast_stdout", default=None)
"""Where JSON goes while everything else that is printed goes to stderr."""


class Command(TyperCommand):
    """A command whose ``--json`` may stand without a file: then stdout has one JSON document and nothing else.

    Warnings are printed by the commands themselves, so that none are issued as Python's.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, taken = list[str](), list[int]()
        for k, arg in enumerate(args):
            given.append(arg)
            if arg != "--json":
                continue
            if k + 1 == len(args) or (args[k + 1].startswith("-") and args[k + 1] != "-"):
                given.append(str(STDOUT))
            else:
                taken.append(len(given))
        try:
            return super().parse_args(ctx, list(given))
        except Exception as error:
            # What follows --json was meant to be the argument that is missing now.
            if type(error).__name__ != "MissingParameter" or not taken:
                raise
            ctx.params.clear()
            return super().parse_args(ctx, [*given[: taken[-1]], str(STDOUT), *given[taken[-1] :]])

    def invoke(self, ctx: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(shown_otherwise())
            if ctx.params.get("json_path") == STDOUT:
                token = _stdout.set(sys.stdout)
                stack.callback(_stdout.reset, token)
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            return super().invoke(ctx)


def writable(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path that can be written to, tried and made absolute; a usage error otherwise.

    So no run is lost to it at its end, and the file is where it was asked for, wherever the user's code goes.
    """
    if path is None or path == STDOUT:
        return path
    try:
        return output_path(max(param.opts, key=len).lstrip("-"), path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def picture(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path for a picture: writable, with an ending that matplotlib knows. A ModuleNotFoundError if it is missing."""
    if path is not None:
        from llc_fast.plots import picture_endings

        known = picture_endings()
        if path.suffix.lower().lstrip(".") not in known:
            raise typer.BadParameter(f"{path} must end in one of: {', '.join(f'.{ending}' for ending in known)}")
    return writable(param, path)


def page(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path for a page: writable, and ending in .html. A ModuleNotFoundError if matplotlib, for its pictures, is
    missing."""
    if path is not None:
        if path.suffix.lower() not in (".html", ".htm"):
            raise typer.BadParameter(f"{path} must end in .html")
        from llc_fast.plots import picture_endings

        picture_endings()
    return writable(param, path)


def check_different(paths: dict[str, Path | None]) -> None:
    """Raise a usage error if two of a command's files, by the names of their options, are one."""
    seen = dict[str, str]()
    for name, path in paths.items():
        if path == STDOUT and name != "--json":
            raise typer.BadParameter("give the name of a file: only --json can go to standard output", param_hint=name)
        if path is not None and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise typer.BadParameter(f"{path} is the file of {other} too: give another one", param_hint=name)


def write_all(writers: list[tuple[str, Path | None, Callable[[Path], None]]]) -> None:
    """Write a command's files, and say so; one that fails does not keep the others from being written.

    Args:
        writers: what each is, its path (None: not asked for), and what writes it.

    Raises:
        typer.Exit: one could not be written, with status 1.
    """
    has_failed = False
    for what, path, write in writers:
        if path is not None:
            try:
                write(path)
                if path != STDOUT:
                    typer.echo(f"{what} written to {path}")
            except OSError as error:
                typer.echo(f"llc-fast: {what} could not be written to {path}: {error.strerror or error}", err=True)
                has_failed = True
    if has_failed:
        raise typer.Exit(1)


JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the numbers to this file; without one, print them as JSON, and all else on stderr.",
        metavar="[FILE]",
        dir_okay=False,
        allow_dash=True,
        callback=writable,
    ),
]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture to this file.", dir_okay=False, callback=picture)
]
ReportPath = Annotated[
    Path | None,
    typer.Option("--report", help="Write a page with all results: HTML.", dir_okay=False, callback=page),
]
SamplerName = Annotated[str | None, typer.Option(help="sgld, rmsprop-sgld, sghmc, mala, …; default: chosen.")]
SamplerOptions = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE of the sampler, such as eps=1e-3; repeatable.")
]
StepSize = Annotated[float | None, typer.Option(help="Step size ε; default: chosen.")]
Nbeta = Annotated[float | None, typer.Option(help="nβ; default: n / log n.")]
Localization = Annotated[float | None, typer.Option(help="γ; default: from the size of the weights.")]
Preconditioner = Annotated[
    str | None, typer.Option(help="curvature: a metric estimated at w*, which follows every rescaling; default: none.")
]
LocalizationMetric = Annotated[
    str | None, typer.Option(help="Of γ: euclidean, or sampler, that of the preconditioner; default: by that.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="language-model: nβ = 30 and γ = 300; paper: plain SGLD, γ = 1, minibatches of 500, 9,000 steps of "
        "burn-in and 1,000 draws; default: none."
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        help="In place of the problem's: behavioral (-mse, -kl), the model's own output as target; next-token."
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Default: 512, or what the loader gives.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; default: where the model is.")]
MicrobatchSize = Annotated[
    int | None, typer.Option(min=1, help="Samples that pass the model at a time; default: the batch.")
]
Chains = Annotated[int, typer.Option(min=1)]
Draws = Annotated[int | None, typer.Option(min=1, help="Draws of a chain; default: as many as λ̂ needs.")]
TargetError = Annotated[
    float | None, typer.Option(min=0, help="Total error of λ̂, relative, at which chains end; default: 0.02.")
]
MaxSeconds = Annotated[float | None, typer.Option(help="Time that the run may take; default: no limit.")]
MaxGradients = Annotated[
    int | None, typer.Option(min=1, help="Gradients that the run may take; default: 10,000 steps of each chain.")
]
Burnin = Annotated[int | None, typer.Option(min=0, help="Steps before the first draw; default: as draws.")]
Params = Annotated[
    list[str] | None,
    typer.Option(help="Name or glob of parameters, or a component such as 'l3 h5', to sample; repeatable."),
]
Strategy = Annotated[str | None, typer.Option(help="sequential, batched, compiled or cuda-graph; default: chosen.")]
Autocast = Annotated[str | None, typer.Option(help="bfloat16 or float16, of forward passes; default: none.")]
Refine = Annotated[bool, typer.Option("--refine", help="Look for a better minimum first, near the model's weights.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Progress = Annotated[bool, typer.Option(help="Show progress: a bar on a terminal, a line each 10 % in a log file.")]


def deliver(
    result: LLCResult,
    save: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
    report_path: Path | None = None,
    title: str = "",
) -> None:
    """Print an estimate, and write it where it was asked for; `title` is that of a report.

    Raises:
        typer.Exit: something could not be written, or there is no estimate, with status 1.
    """
    typer.echo(result.summary())

    def draw(path: Path) -> None:
        result.plot(path)

    write_all(
        [
            ("result", save, result.save),
            ("numbers", json_path, lambda path: write_json(path, numbers_of(result))),
            ("picture", plot_path, draw),
            ("report", report_path, lambda path: result.report(path, title=title)),
        ]
    )
    if math.isnan(result.llc_mean):
        raise typer.Exit(1)


def numbers_of(result: LLCResult) -> dict[str, Any]:
    """What is written of an estimate."""
    low, high = result.interval()
    return {
        "llc_mean": result.llc_mean,
        "llc_stderr": result.llc_stderr,
        "systematic_error": list(result.systematic_error),
        "extrapolated": result.extrapolated,
        "extrapolated_stderr": result.extrapolated_stderr,
        "interval": [low, high],
        "llc_per_chain": result.llc_per_chain.tolist(),
        "init_loss": result.init_loss,
        "nbeta": result.nbeta,
        "settings": result.settings,
        "diagnostics": result.diagnostics,
        "warnings": result.warnings,
    }


def write_json(path: Path, value: Any) -> None:
    """Write numbers to a file, or as one JSON document to standard output."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if path == STDOUT:
        stream = _stdout.get() or sys.stdout
        stream.write(text)
        stream.flush()
        return
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))
