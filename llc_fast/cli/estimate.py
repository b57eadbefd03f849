"""``llc-fast estimate``: a model of the user's own, from a function that returns it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from llc_fast.cli.options import JsonPath, PlotPath, Progress, Seed, writable, write_json


def estimate(
    problem: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION or module:FUNCTION; the function returns (model, data, loss_fn).")
    ],
    sampler: Annotated[str | None, typer.Option(help="sgld, rmsprop-sgld, sghmc, mala, …; default: chosen.")] = None,
    lr: Annotated[float | None, typer.Option(help="Step size ε; default: chosen.")] = None,
    nbeta: Annotated[float | None, typer.Option(help="nβ; default: n / log n.")] = None,
    localization: Annotated[float | None, typer.Option(help="γ; default: 1.")] = None,
    chains: Annotated[int, typer.Option(min=1)] = 4,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws of a chain; default: chosen.")] = None,
    burnin: Annotated[int | None, typer.Option(min=0, help="Steps before the first draw; default: as draws.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 512, or what the loader gives.")] = None,
    params: Annotated[list[str] | None, typer.Option(help="Name or glob of parameters to sample; repeatable.")] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: where the model is.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to resume from.", dir_okay=False, callback=writable)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the result, for LLCResult.load.", dir_okay=False, callback=writable)
    ] = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    progress: Progress = True,
) -> None:
    """Estimate the local learning coefficient of a model of your own.

    Write a file with a function that returns the trained model, its data and the loss:

        def problem():
            return model, (x, y), torch.nn.functional.mse_loss
    """
    from llc_fast.estimate import estimate_llc

    model, data, loss_fn = problem_of(problem)
    result = estimate_llc(
        model,
        data,
        loss_fn,
        sampler=sampler,
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        num_chains=chains,
        num_draws=draws,
        num_burnin=burnin,
        batch_size=batch_size,
        params=params or None,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )
    typer.echo(result.summary())
    if save is not None:
        result.save(save)
        typer.echo(f"result written to {save}")
    if json_path is not None:
        low, high = result.interval()
        numbers = {
            "llc_mean": result.llc_mean,
            "llc_stderr": result.llc_stderr,
            "interval": [low, high],
            "llc_per_chain": result.llc_per_chain.tolist(),
            "init_loss": result.init_loss,
            "nbeta": result.nbeta,
            "settings": result.settings,
            "diagnostics": result.diagnostics,
            "warnings": result.warnings,
        }
        write_json(json_path, numbers)
    if plot_path is not None:
        result.plot(plot_path)
        typer.echo(f"picture written to {plot_path}")
    if math.isnan(result.llc_mean):
        raise typer.Exit(1)


COMMANDS = (estimate,)


def problem_of(where: str) -> Any:
    """(model, data, loss_fn) from FILE.py:FUNCTION or package.module:FUNCTION."""
    import importlib
    import importlib.util
    import sys

    place, colon, name = where.rpartition(":")
    if not colon or not place or not name:
        raise typer.BadParameter(f"{where!r} is not FILE.py:FUNCTION", param_hint="PROBLEM")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise typer.BadParameter(f"there is no file {place}", param_hint="PROBLEM")
        sys.path.insert(0, str(path.resolve().parent))  # as if the file had been run
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise typer.BadParameter(f"{place} has no function {name!r}", param_hint="PROBLEM")
    found = function()
    if not isinstance(found, tuple) or len(found) != 3:
        raise typer.BadParameter(
            f"{name}() must return (model, data, loss_fn), got {type(found).__name__}", param_hint="PROBLEM"
        )
    return found
