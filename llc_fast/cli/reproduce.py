"""``llc-fast reproduce``: the papers' results, of :mod:`llc_fast.reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llc_fast.cli.options import Progress, Seed


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which experiment, or all; without it they are listed.")] = None,
    scale: Annotated[str, typer.Option(help="small: minutes on two cores; paper: one GPU.")] = "small",
    output: Annotated[
        Path | None, typer.Option(help="Folder for data.json and pictures; default: reproduced/NAME.", file_okay=False)
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU for the paper's scale.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run has measured.")] = False,
    progress: Progress = True,
) -> None:
    """Regenerate a result of the papers: its numbers, its figure, and whether what is claimed came out.

    A run that was stopped goes on where it was when the same command is given again. The exit status is 1 if a claim
    does not hold.
    """
    import shutil

    from llc_fast.estimate import check_device
    from llc_fast.plots import new_figure
    from llc_fast.reproduce import EXPERIMENTS, load
    from llc_fast.reproduce.frame import Study, run

    if name is None:
        for known, words in EXPERIMENTS.items():
            typer.echo(f"{known:>18}  {words}")
        return
    if name != "all" and name not in EXPERIMENTS:
        raise typer.BadParameter(f"{name!r} is not one of all, {', '.join(EXPERIMENTS)}", param_hint="NAME")
    if scale not in ("small", "paper"):
        raise typer.BadParameter(f"{scale!r} is neither small nor paper", param_hint="--scale")
    if device is None:
        import torch

        device = "cuda" if scale == "paper" and torch.cuda.is_available() else "cpu"
    check_device(device)
    new_figure(1)  # says now what is missing to draw
    folder = output or Path("reproduced", *(() if name == "all" else (name,)))
    failed = 0
    for each in EXPERIMENTS if name == "all" else [name]:
        where = folder / each if name == "all" else folder
        if restart and (where / "data.json").exists():
            (where / "data.json").unlink()
            shutil.rmtree(where / "work", ignore_errors=True)
        experiment = load(each)
        typer.echo(f"{each}: {EXPERIMENTS[each]}")
        try:
            checks = run(experiment, Study(each, scale, where, seed=seed, device=device, progress=progress))
        except KeyboardInterrupt:
            typer.echo("\nstopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        for check in checks:
            typer.echo(f"  {'holds ' if check.passed else 'FAILS '} {check.claim}: {check.found}")
        failed += sum(not check.passed for check in checks)
        typer.echo(f"  data.json and pictures are in {where}\n")
    if failed:
        raise typer.Exit(1)


COMMANDS = (reproduce,)
