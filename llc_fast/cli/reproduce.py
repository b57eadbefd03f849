"""``llc-fast reproduce``: the papers' results, of :mod:`llc_fast.reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llc_fast.cli.options import JsonPath, Progress, Seed, write_all, write_json


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which experiment, or all; without it they are listed.")] = None,
    scale: Annotated[
        str, typer.Option(help="small: minutes on two cores; paper: one GPU; hours: on two cores.")
    ] = "small",
    output: Annotated[
        Path | None, typer.Option(help="Folder for data.json and figures; default: reproduced/NAME.", file_okay=False)
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU for the paper's scale.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run has measured.")] = False,
    json_path: JsonPath = None,
    progress: Progress = True,
) -> None:
    """Regenerate a result of the papers: its numbers, its figures, and whether what is claimed came out.

    A run that was stopped goes on where it was when the same command is given again. The exit status is 1 if a claim of
    ours does not hold. A published claim that does not hold is reported as a finding.
    """
    from llc_fast.reproduce import EXPERIMENTS

    if name is None:
        for known, words in EXPERIMENTS.items():
            typer.echo(f"{known:>18}  {words}")
        write_all([("list", json_path, lambda path: write_json(path, EXPERIMENTS))])
        return
    from llc_fast.reproduce.run import run_experiments

    try:
        outcomes = run_experiments(
            name,
            scale=scale,
            output=output,
            seed=seed,
            device=device,
            restart=restart,
            progress=progress,
            say=typer.echo,
        )
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    found = [{"name": o.name, "folder": str(o.folder), "claims": [vars(claim) for claim in o.claims]} for o in outcomes]
    write_all([("outcomes", json_path, lambda path: write_json(path, found))])
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


COMMANDS = (reproduce,)
