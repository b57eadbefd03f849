"""The command line: ``llc-fast demo | dln | estimate | reproduce | bench | info``."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from llc_fast.support.files import plain

CALIBRATED_STEPS = 8800
"""Of a chain; half of them are draws."""
app = typer.Typer(
    help="Estimate the local learning coefficient (LLC) of PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _network_row(
    size: str, seed: int, *, paper: bool, chains: int, steps: int | None, device: str, progress: bool
) -> tuple[dict[str, Any], Any]:
    """Estimate one network of a class, calibrated or with the paper's settings; returns a table row and the result."""
    import torch

    from llc_fast.estimate import estimate_llc
    from llc_fast.problems import deep_linear

    problem = deep_linear.make_problem(size, seed, device)
    settings = deep_linear.SIZE_CLASSES[size]
    num_steps = (settings.num_steps if paper else CALIBRATED_STEPS) if steps is None else steps
    num_draws = max(1, num_steps // (5 if paper else 2))
    result = estimate_llc(
        problem.model,
        problem.data,
        torch.nn.functional.mse_loss,
        lr=settings.lr if paper else None,
        localization=deep_linear.LOCALIZATION,
        batch_size=deep_linear.BATCH_SIZE,
        num_chains=chains,
        num_draws=num_draws,
        num_burnin=num_steps - num_draws,
        seed=seed,
        progress=progress,
    )
    known = problem.learning_coefficient
    row = {
        "size": size,
        "seed": seed,
        "parameters": problem.num_parameters,
        "widths": list(problem.widths),
        "rank": problem.rank,
        "lambda_true": known,
        "llc_mean": result.llc_mean,
        "llc_stderr": result.llc_stderr,
        "rel_error": (result.llc_mean - known) / known if known else math.nan,
        "seconds": result.settings["seconds"],
        "steps": chains * num_steps + result.diagnostics.get("pilot_steps", 0),
        "warnings": result.warnings,
    }
    return row, result


_HEADER = f"{'class':>6} {'parameters':>10} {'rank':>5} {'λ':>9} {'λ̂ ± error':>19} {'error':>8} {'seconds':>8}  widths"


def _line(row: dict[str, Any]) -> str:
    estimate = f"{row['llc_mean']:.2f} ± {row['llc_stderr']:.2f}"
    text = (
        f"{row['size']:>6} {row['parameters']:>10} {row['rank']:>5} {row['lambda_true']:>9.1f} {estimate:>18} "
        f"{100 * row['rel_error']:>+7.1f}% {row['seconds']:>8.1f}  {'-'.join(map(str, row['widths']))}"
    )
    return "\n".join([text, *(f"       warning: {w}" for w in row["warnings"])])


def _run_networks(
    plan: list[tuple[str, int]], *, paper: bool, chains: int, steps: int | None, device: str, progress: bool
) -> tuple[list[dict[str, Any]], Any]:
    """Estimate the networks of `plan` (size, seed), printing a row as each is done; rows and the last result."""
    from llc_fast.estimate import check_device

    check_device(device)
    typer.echo(_HEADER)
    rows, result = [], None
    for size, seed in plan:
        row, result = _network_row(
            size, seed, paper=paper, chains=chains, steps=steps, device=device, progress=progress
        )
        rows.append(row)
        typer.echo(_line(row))
    errors = sorted(abs(r["rel_error"]) for r in rows if math.isfinite(r["rel_error"]))
    if errors:
        middle = len(errors) // 2
        median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
        typer.echo(f"median |λ̂ − λ| / λ over {len(errors)} networks: {100 * median:.1f} %")
    return rows, result


def _writable(path: Path | None) -> Path | None:
    if path is not None and not path.resolve().parent.is_dir():
        raise typer.BadParameter(f"the folder of {path} does not exist")
    return path


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    typer.echo(f"numbers written to {path}")


def _write(rows: list[dict[str, Any]], result: Any, json_path: Path | None, plot_path: Path | None) -> None:
    if json_path is not None:
        _write_json(json_path, rows)
    if plot_path is not None:
        from llc_fast.plots import plot_known

        plot_known(rows, result).savefig(plot_path, dpi=150)
        typer.echo(f"picture written to {plot_path}")


Seed = Annotated[int, typer.Option(min=0, help="First seed; network k uses seed + k.")]
JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write the rows to this file.", dir_okay=False, callback=_writable)
]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture to this file.", dir_okay=False, callback=_writable)
]
Progress = Annotated[bool, typer.Option(help="Show a progress bar.")]


@app.command()
def demo(
    seed: Seed = 0,
    json_path: JsonPath = None,
    plot_path: PlotPath = Path("llc_fast_demo.png"),
    progress: Progress = True,
) -> None:
    """Estimate deep linear networks whose learning coefficient is known, and draw the comparison."""
    typer.echo(
        "The learning coefficient λ says how fast the volume of almost-as-good parameters grows around a trained\n"
        "network: the smaller λ, the simpler the solution. For deep linear networks theory gives λ exactly, so they\n"
        "show whether an estimator works. Each row is one random network; λ̂ comes from sampling near its weights.\n"
        "Nothing is set by hand: step size, momentum and the correction of λ̂ come from short pilot chains. Where a\n"
        "warning stands below a row the chains were too short: some deep networks of low rank are that flat.\n"
    )
    plan = [("1k", seed + k) for k in range(6)] + [("10k", seed + k) for k in range(3)]
    rows, result = _run_networks(plan, paper=False, chains=2, steps=None, device="cpu", progress=progress)
    _write(rows, result, json_path, plot_path)


@app.command()
def dln(
    size: Annotated[str, typer.Option(help="Class of networks: 1k, 10k, 1M, 10M, 30M or 100M parameters.")] = "1k",
    networks: Annotated[int, typer.Option(min=1, help="How many networks.")] = 4,
    seed: Seed = 0,
    paper: Annotated[bool, typer.Option("--paper", help="SGLD with the paper's settings, set by hand.")] = False,
    chains: Annotated[int, typer.Option(min=1, help="Chains for each network.")] = 2,
    steps: Annotated[int | None, typer.Option(min=10, help="Steps of a chain; default: 8,800, or the paper's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    progress: Progress = True,
) -> None:
    """Estimate deep linear networks of one of the classes of Furman & Lau 2024, calibrated or with its settings."""
    from llc_fast.problems.deep_linear import SIZE_CLASSES

    if size not in SIZE_CLASSES:
        raise typer.BadParameter(f"{size!r} is not one of {', '.join(SIZE_CLASSES)}", param_hint="--size")
    plan = [(size, seed + k) for k in range(networks)]
    rows, result = _run_networks(plan, paper=paper, chains=chains, steps=steps, device=device, progress=progress)
    _write(rows, result, json_path, plot_path)


def _problem_of(where: str) -> Any:
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


@app.command()
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
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: where the model is.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File to resume from.", dir_okay=False)] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the result, for LLCResult.load.", dir_okay=False, callback=_writable),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file.", dir_okay=False, callback=_writable)
    ] = None,
    plot_path: PlotPath = None,
    progress: Progress = True,
) -> None:
    """Estimate the local learning coefficient of a model of your own.

    A file with a function that returns the trained model, its data and the loss is all that is needed:

        def problem():
            return model, (x, y), torch.nn.functional.mse_loss
    """
    import sys

    from llc_fast.estimate import estimate_llc

    model, data, loss_fn = _problem_of(problem)
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
        _write_json(json_path, numbers)
    if plot_path is not None:
        result.plot(plot_path)
        typer.echo(f"picture written to {plot_path}")
    if math.isnan(result.llc_mean):
        sys.exit(1)


@app.command()
def bench(
    parameters: Annotated[int, typer.Option(min=1, help="How many, in 100 float32 tensors.")] = 10_000_000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.01, help="For each measurement.")] = 1.0,
    json_path: JsonPath = None,
) -> None:
    """Time every sampler's step on this machine, against a plain copy of the parameters."""
    from llc_fast.cli.bench import step_rows
    from llc_fast.estimate import check_device

    check_device(device)
    typer.echo(f"{'sampler':>20} {'ns/parameter':>13} {'bytes at the floor':>19} {'GB/s':>7} {'share of copy':>14}")
    rows = []
    for row in step_rows(parameters, device, seconds=seconds):
        rows.append(row)
        typer.echo(
            f"{row['sampler']:>20} {row['ns_per_parameter']:>13.3f} {row['floor_bytes']:>19g} {row['gb_per_s']:>7.1f} "
            f"{row['share_of_copy']:>13.0%}"
        )
    if json_path is not None:
        _write_json(json_path, rows)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which experiment, or all; without it they are listed.")] = None,
    scale: Annotated[str, typer.Option(help="small: minutes on two cores; paper: one GPU.")] = "small",
    output: Annotated[
        Path | None, typer.Option(help="Folder for data.json and figures; default: reproduced/NAME.", file_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU for the paper's scale.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run has measured.")] = False,
    progress: Progress = True,
) -> None:
    """Regenerate a result of the papers: its numbers, its figures, and whether what is claimed came out.

    A run that was stopped goes on where it was when the same command is given again. The exit status is 1 if a claim of
    ours does not hold; a published claim that does not hold is reported as a finding.
    """
    from llc_fast.reproduce import EXPERIMENTS

    if name is None:
        for known, words in EXPERIMENTS.items():
            typer.echo(f"{known:>18}  {words}")
        return
    from llc_fast.reproduce.run import run_experiments

    options: dict[str, Any] = {"output": output, "seed": seed, "device": device, "restart": restart}
    try:
        outcomes = run_experiments(name, scale=scale, progress=progress, say=typer.echo, **options)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def collect_info() -> dict[str, Any]:
    """Versions, backends, instruction set, CUDA and threads: what belongs in a bug report."""
    import torch

    from llc_fast import __version__
    from llc_fast.kernels.native import native_info

    native = dict(native_info())
    cuda_runs = native["cuda"] is not None and torch.cuda.is_available()
    return {
        "llc_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": f"cuda and cpu ({native['instruction_set']})" if cuda_runs else f"cpu ({native['instruction_set']})",
        "threads": torch.get_num_threads(),
        **native,
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
    }


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is installed and which code will run; paste this into bug reports."""
    facts = collect_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        typer.echo(f"{name:>20}  {', '.join(value) if isinstance(value, list) else value}")


def main() -> None:
    """Entry point: an error in what the user gave is a line, not a traceback."""
    try:
        app()
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        typer.echo(f"llc-fast: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
