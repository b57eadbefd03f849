"""``llc-fast scan``: λ̂ of a model of the user's own over nβ and γ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llc_fast.grid import ScanResult

from llc_fast.cli.estimate import problem_of, sampler_of
from llc_fast.cli.options import (
    Burnin,
    Chains,
    JsonPath,
    Params,
    PlotPath,
    Progress,
    SamplerOptions,
    Seed,
    StepSize,
    check_different,
    writable,
    write_all,
    write_json,
)


def scan(
    problem: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION or module:FUNCTION; the function returns (model, data, loss_fn).")
    ],
    nbeta: Annotated[
        list[float] | None, typer.Option(help="nβ; repeatable; 0: the prior alone. Default: five around n / log n.")
    ] = None,
    localization: Annotated[
        list[float] | None, typer.Option(help="γ; repeatable. Default: four around that of the size of the weights.")
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Walk nβ and γ in pairs instead of all combinations.")] = False,
    fit: Annotated[bool, typer.Option("--fit", help="λ and its multiplicity from temperature, at each γ.")] = False,
    sampler: Annotated[str | None, typer.Option(help="sgld, rmsprop-sgld, sghmc, mala, …; default: chosen.")] = None,
    sampler_option: SamplerOptions = None,
    lr: StepSize = None,
    chains: Chains = 4,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws of a chain in each cell; default: chosen.")] = None,
    burnin: Burnin = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 512, or what the loader gives.")] = None,
    params: Params = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: where the model is.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished cells, to go on from.", file_okay=False)
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the result (NetCDF), for ScanResult.load.", dir_okay=False, callback=writable),
    ] = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    progress: Progress = True,
) -> None:
    """Estimate the local learning coefficient over temperatures nβ and localizations γ.

    PROBLEM is as for llc-fast estimate.
    """
    place = Path(problem.rpartition(":")[0])
    files = {"--save": save, "--json": json_path, "--plot": plot_path}
    check_different({"PROBLEM": place if place.is_file() else None} | files)
    from llc_fast.grid import scan as run

    chosen = sampler_of(sampler, sampler_option or [])
    model, data, loss_fn = problem_of(problem)
    result = run(
        model,
        data,
        loss_fn,
        nbeta=nbeta or None,
        localization=localization or None,
        path=path,
        sampler=chosen,
        lr=lr,
        num_chains=chains,
        num_draws=draws,
        num_burnin=burnin,
        batch_size=batch_size,
        params=params or None,
        seed=seed,
        device=device,
        folder=folder,
        progress=progress,
    )
    typer.echo(result.summary())
    fits = _fits(result) if fit else {}
    for gamma, found in fits.items():
        typer.echo(f"γ = {gamma}: {found}")

    def draw(target: Path) -> None:
        result.plot(target)

    write_all(
        [
            ("result", save, result.save),
            ("numbers", json_path, lambda target: write_json(target, numbers_of(result, fits))),
            ("picture", plot_path, draw),
        ]
    )


COMMANDS = (scan,)


def _fits(result: ScanResult) -> dict[str, Any]:
    """The fit at each γ, or why there is none, by γ in words."""
    found: dict[str, Any] = {}
    for gamma in sorted(set(result.dataset["localization"].values.ravel().tolist())):
        try:
            found[f"{gamma:.4g}"] = result.fit(localization=gamma)
        except ValueError as error:
            found[f"{gamma:.4g}"] = str(error)
    return found


def numbers_of(result: ScanResult, fits: dict[str, Any]) -> dict[str, Any]:
    """What is written of a scan."""
    dataset = result.to_xarray()
    values = {str(name): dataset[name].values.tolist() for name in (*dataset.data_vars, *dataset.coords)}
    plateau = result.plateau
    fitted = {
        gamma: found if isinstance(found, str) else {k: v for k, v in vars(found).items() if k != "fits"}
        for gamma, found in fits.items()
    }
    return {
        "dims": list(result.dims),
        **values,
        "partial": result.is_partial,
        "plateau": None if plateau is None else vars(plateau),
        "plateau_reason": result.plateau_reason,
        **({"fits": fitted} if fits else {}),
    }
