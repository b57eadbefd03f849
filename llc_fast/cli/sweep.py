"""``llc-fast sweep``: a model of the user's own at the checkpoints of its training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llc_fast.cli.estimate import Problem, file_of, problem_of, settings_of
from llc_fast.cli.options import (
    Autocast,
    BatchSize,
    Burnin,
    Chains,
    Device,
    JsonPath,
    Localization,
    LocalizationMetric,
    Loss,
    MaxGradients,
    MaxSeconds,
    MicrobatchSize,
    Nbeta,
    Params,
    PlotPath,
    Preconditioner,
    Preset,
    Progress,
    Refine,
    SamplerName,
    SamplerOptions,
    Seed,
    StepSize,
    Strategy,
    check_different,
    writable,
    write_all,
    write_json,
)
from llc_fast.support.files import write_csv

if TYPE_CHECKING:
    import xarray

OUTPUT_ENDINGS = (".nc", ".zarr", ".csv")
"""Of files that a sweep's data set is written to."""


def data_set(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path for a data set: writable, with an ending that says its format."""
    if path is None:
        return None
    if path.suffix not in OUTPUT_ENDINGS:
        raise typer.BadParameter(f"{path} must end in one of: {', '.join(OUTPUT_ENDINGS)}")
    if path.suffix != ".zarr":
        return writable(param, path)
    from llc_fast.support.optional import require

    require("zarr", "samples")
    if path.exists():
        raise typer.BadParameter(f"{path} is there already: give another name, or move it away")
    return path.absolute()


OutputPath = Annotated[
    Path | None,
    typer.Option(help="Write the data set: .nc or .zarr, for xarray; or .csv, a table.", callback=data_set),
]


def sweep(
    problem: Problem,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders of weights, a pattern such as 'runs/checkpoint-*', or a folder of checkpoints."
        ),
    ],
    labels: Annotated[
        str | None, typer.Option(help="What they are called, in order, separated by commas; default: their steps.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep each finished estimate there: the same command goes on.", file_okay=False)
    ] = None,
    warm: Annotated[
        bool, typer.Option(help="Start chains where those of the checkpoint before ended: a quarter of the burn-in.")
    ] = True,
    entry: Annotated[
        str | None, typer.Option(help="Which weights, where a file has several, such as state_dict_ema.")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option(help="Read weights alone; --no-weights-only runs the code that files of objects bring.")
    ] = True,
    sampler: SamplerName = None,
    sampler_option: SamplerOptions = None,
    lr: StepSize = None,
    nbeta: Nbeta = None,
    localization: Localization = None,
    preconditioner: Preconditioner = None,
    localization_metric: LocalizationMetric = None,
    preset: Preset = None,
    loss: Loss = None,
    refine: Refine = False,
    chains: Chains = 4,
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Draws of a chain; default: 2,000, or as many as a target error or budget says."),
    ] = None,
    burnin: Burnin = None,
    target_error: Annotated[
        float | None, typer.Option(min=0, help="Total error of each λ̂, relative, at which its chains end.")
    ] = None,
    max_seconds: MaxSeconds = None,
    max_gradients: MaxGradients = None,
    batch_size: BatchSize = None,
    params: Params = None,
    seed: Seed = 0,
    device: Device = None,
    strategy: Strategy = None,
    autocast: Autocast = None,
    microbatch_size: MicrobatchSize = None,
    output: OutputPath = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    progress: Progress = True,
) -> None:
    """Estimate the local learning coefficient at each checkpoint of a training run, in the order of their steps.

    The file has a function that returns the model (its weights do not matter), the data and the loss:

        llc-fast sweep model.py:problem 'runs/checkpoint-*' --plot llc.png
    """
    settings = settings_of(locals())
    check_different({"PROBLEM": file_of(problem), "--output": output, "--json": json_path, "--plot": plot_path})
    places, names = places_of(checkpoints, labels)
    model, data, loss_fn = problem_of(problem)
    from llc_fast.sweep import sweep_checkpoints

    def tell(curve: xarray.Dataset) -> None:
        deliver_sweep(curve, len(names), output, json_path, plot_path)

    with finished_too(tell):
        curve = sweep_checkpoints(
            model,
            places,
            data,
            loss_fn if loss is None else loss,
            labels=names,
            dim="step",
            warm=warm,
            folder=folder,
            entry=entry,
            weights_only=weights_only,
            progress=progress,
            **settings,
        )
    tell(curve)


COMMANDS = (sweep,)


def places_of(given: list[str], labels: str | None) -> tuple[list[Path], list[Any]]:
    """The checkpoints in their order, and what they are called: their steps, or the labels.

    With labels, checkpoints whose names say no step, or the same one twice, are as they were given.

    Raises:
        typer.BadParameter: there are none, nobody can tell their order, or labels are not as many.
    """
    from llc_fast.checkpoint_files import found, listed

    try:
        try:
            ordered = found(given)
        except ValueError:
            if labels is None:
                raise
            ordered = list(enumerate(listed(given)))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="CHECKPOINTS") from None
    places = [place for _, place in ordered]
    if labels is None:
        return places, [step for step, _ in ordered]
    names: list[Any] = [name.strip() for name in labels.split(",")]
    if len(names) != len(places):
        raise typer.BadParameter(f"{len(names)} names for {len(places)} checkpoints", param_hint="--labels")
    with contextlib.suppress(ValueError):
        names = [float(name) if "." in name or "e" in name.lower() else int(name) for name in names]
    return places, names


# ---- what a sweep leaves behind, of whatever checkpoints ---------------------------------------------------


@contextlib.contextmanager
def finished_too(tell: Callable[[xarray.Dataset], None]) -> Iterator[None]:
    """Tell what a sweep has finished before an error, which goes on its way."""
    try:
        yield
    except Exception as error:
        if (finished := getattr(error, "finished", None)) is not None:
            with contextlib.suppress(typer.Exit):  # the error says more
                tell(finished)
        raise


def deliver_sweep(
    found: xarray.Dataset, count: int, output: Path | None, json_path: Path | None, plot_path: Path | None
) -> None:
    """Print a line for each checkpoint of a sweep, and write it where it was asked for.

    Args:
        found: what ``sweep_checkpoints`` returned.
        count: of the checkpoints there were.
        output, json_path, plot_path: the files; None: not asked for.

    Raises:
        typer.Exit: something could not be written, or there is no estimate, with status 1.
    """
    rows = rows_of(found)
    typer.echo(table(found))
    if found.attrs["partial"]:
        typer.echo(f"interrupted: {len(rows)} of {count} checkpoints")

    def draw(path: Path) -> None:
        from llc_fast.plots import plot_sweep, write_figure

        write_figure(plot_sweep(found), path)

    write_all(
        [
            ("result", output, lambda path: write_data_set(found, path)),
            ("numbers", json_path, lambda path: write_json(path, rows)),
            ("picture", plot_path, draw),
        ]
    )
    if all(math.isnan(row["llc_mean"]) for row in rows):
        raise typer.Exit(1)


def table(found: xarray.Dataset) -> str:
    """λ̂ ± error, the 95 % interval, L(w*) and the codes of warnings: a line for each checkpoint."""
    (dim,) = found["llc_mean"].dims
    cells = [(str(dim), "λ̂", "± error", "95 % interval", "L(w*)", "warnings")]
    for row in rows_of(found):
        interval = f"{row['llc_low']:.4g} to {row['llc_high']:.4g}"
        numbers = f"{row['llc_mean']:.4g}", f"{row['llc_stderr']:.2g}", interval, f"{row['init_loss']:.5g}"
        cells.append((str(row[str(dim)]), *numbers, row["warning_codes"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in cells
    )


def rows_of(found: xarray.Dataset) -> list[dict[str, Any]]:
    """What a sweep found, a dictionary for each checkpoint."""
    (dim,) = found["llc_mean"].dims
    columns = {str(name): found[name].values.tolist() for name in (dim, *found.data_vars)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def write_data_set(found: xarray.Dataset, path: Path) -> None:
    """Write a sweep in the format that the ending says; a table has what is one value for each checkpoint."""
    if path.suffix == ".zarr":
        found.to_zarr(path, mode="w-")
    elif path.suffix == ".csv":
        rows = rows_of(found)
        write_csv(path, [{name: v for name, v in row.items() if not isinstance(v, list)} for row in rows])
    else:
        found.to_netcdf(path)
