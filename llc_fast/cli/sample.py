"""``llc-fast sample``: losses of probes at every draw of a model of the user's own, in a store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from llc_fast.cli.estimate import dtype_of, problem_of, sampler_of
from llc_fast.cli.options import (
    Autocast,
    Burnin,
    Chains,
    JsonPath,
    Params,
    Progress,
    Refine,
    SamplerOptions,
    Seed,
    StepSize,
    Strategy,
    check_different,
    numbers_of,
    write_all,
    write_json,
)


def sample(
    problem: Annotated[
        str,
        typer.Argument(
            help="FILE.py:FUNCTION or module:FUNCTION; the function returns (model, data, loss_fn, probes), probes "
            "being a mapping from names to data."
        ),
    ],
    store: Annotated[Path, typer.Option(help="Folder of the Zarr store; of an interrupted run: go on.")],
    per: Annotated[str, typer.Option(help="sample or token: what has a loss of its own.")] = "sample",
    probe_dtype: Annotated[str, typer.Option(help="float32 or float16, of losses in the store.")] = "float32",
    sampler: Annotated[str | None, typer.Option(help="sgld, rmsprop-sgld, sghmc, mala, …; default: chosen.")] = None,
    sampler_option: SamplerOptions = None,
    lr: StepSize = None,
    nbeta: Annotated[float | None, typer.Option(help="nβ; default: n / log n; 0: localization alone.")] = None,
    localization: Annotated[float | None, typer.Option(help="γ; default: from the size of the weights.")] = None,
    preset: Annotated[str | None, typer.Option(help="language-model or paper; default: none.")] = None,
    refine: Refine = False,
    chains: Chains = 4,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws of a chain; default: 2000.")] = None,
    burnin: Burnin = None,
    between: Annotated[int, typer.Option("--steps-between", min=1, help="Steps from a draw to the next.")] = 1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 512, or what the loader gives.")] = None,
    params: Params = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: where the model is.")] = None,
    strategy: Strategy = None,
    autocast: Autocast = None,
    microbatch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples that pass the model at a time; default: the batch.")
    ] = None,
    json_path: JsonPath = None,
    progress: Progress = True,
) -> None:
    """Sample a model of your own, and keep the losses of probes at every draw.

    Write a file with a function that returns the trained model, its data, the loss, and the probes:

        def problem():
            return model, (x, y), torch.nn.functional.cross_entropy, {"test": (x_test, y_test)}

    The same command resumes a run that was interrupted. llc_fast.Samples.open reads the store.
    """
    place = Path(problem.rpartition(":")[0])
    check_different({"PROBLEM": place if place.is_file() else None, "--store": store, "--json": json_path})
    store = store.absolute()  # wherever the user's code goes
    from llc_fast.sampling import sample as sample_with_probes
    from llc_fast.settings import Execution

    chosen = sampler_of(sampler, sampler_option or [])
    execution = Execution(strategy=strategy, autocast=dtype_of(autocast), microbatch_size=microbatch_size)
    model, data, loss_fn, probes = problem_of(problem, ("model", "data", "loss_fn", "probes"))
    samples = sample_with_probes(
        model,
        data,
        loss_fn,
        probes=probes,
        per=per,  # type: ignore[arg-type]
        store=store,
        probe_dtype=probe_dtype,
        sampler=chosen,
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        preset=preset,
        refine=refine,
        num_chains=chains,
        num_draws=draws,
        num_burnin=burnin,
        num_steps_bw_draws=between,
        batch_size=batch_size,
        params=params or None,
        seed=seed,
        device=device,
        execution=execution,
        progress=progress,
    )
    typer.echo(str(samples))
    result = samples.llc()
    typer.echo(result.summary())
    write_all([("numbers", json_path, lambda path: write_json(path, numbers_of(result)))])
    if math.isnan(result.llc_mean):
        raise typer.Exit(1)


COMMANDS = (sample,)
