"""``llc-fast demo`` and ``llc-fast dln``: deep linear networks, whose learning coefficients are known."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llc_fast.cli.options import JsonPath, PlotPath, Progress, check_different, write_all, write_json

if TYPE_CHECKING:
    from llc_fast.result import LLCResult

Seed = Annotated[int, typer.Option(min=0, help="Seed of the first network; network k has this plus k.")]
CALIBRATED_STEPS = 8800
"""Steps of a chain; half of them are draws."""


def demo(
    seed: Seed = 0,
    json_path: JsonPath = None,
    plot_path: PlotPath = Path("llc_fast_demo.png"),
    progress: Progress = True,
) -> None:
    """Estimate deep linear networks whose learning coefficient is known, and draw the comparison.

    Ctrl-C ends it with what there is.
    """
    check_different({"--json": json_path, "--plot": plot_path})
    typer.echo(
        "The learning coefficient λ says how fast the volume of almost-as-good parameters grows around a trained\n"
        "network: the smaller λ, the simpler the solution. For deep linear networks theory gives λ exactly, so they\n"
        "show whether an estimator works. Each row is one random network; λ̂ comes from sampling near its weights.\n"
        "Nothing is set by hand: short pilot chains choose step size and momentum. A warning below a row says that\n"
        "its chains were too short, which happens to deep networks of low rank.\n"
    )
    plan = [("1k", seed + k) for k in range(6)] + [("10k", seed + k) for k in range(3)]
    found = _run_networks(plan, paper=False, chains=2, steps=None, device="cpu", progress=progress)
    _write(*found, json_path, plot_path)


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
    """Estimate deep linear networks of one of the classes of Furman & Lau 2024, calibrated or with its settings.

    Ctrl-C ends it with what there is.
    """
    from llc_fast.problems.deep_linear import SIZE_CLASSES

    check_different({"--json": json_path, "--plot": plot_path})
    if size not in SIZE_CLASSES:
        raise typer.BadParameter(f"{size!r} is not one of {', '.join(SIZE_CLASSES)}", param_hint="--size")
    plan = [(size, seed + k) for k in range(networks)]
    found = _run_networks(plan, paper=paper, chains=chains, steps=steps, device=device, progress=progress)
    _write(*found, json_path, plot_path)


COMMANDS = (demo, dln)


def _network_row(
    size: str, seed: int, *, paper: bool, chains: int, steps: int | None, device: str, progress: bool
) -> tuple[dict[str, Any], LLCResult]:
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
        "is_partial": result.is_partial,
        # λ of these is the same however far chains go from w*.
        "warnings": [warning for warning in result.warnings if warning.code != "far"],
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
) -> tuple[list[dict[str, Any]], LLCResult | None, bool]:
    """Estimate the networks of `plan` (size, seed), printing a row as each is done.

    Returns:
        The rows, the last result, and whether Ctrl-C ended it; the last row may be of what there was then.
    """
    from llc_fast.estimate import check_device

    check_device(device)
    typer.echo(_HEADER)
    rows: list[dict[str, Any]] = []
    result, is_stopped = None, False
    try:
        for size, seed in plan:
            row, result = _network_row(
                size, seed, paper=paper, chains=chains, steps=steps, device=device, progress=progress
            )
            rows.append(row)
            typer.echo(_line(row))
            if result.is_partial:
                is_stopped = True
                break
    except KeyboardInterrupt:  # between the chains of two networks
        is_stopped = True
    done = [row for row in rows if not row["is_partial"]]
    if is_stopped:
        typer.echo(f"stopped: {len(done)} of {len(plan)} networks are done")
    if errors := [abs(r["rel_error"]) for r in done if math.isfinite(r["rel_error"])]:
        median = statistics.median(errors)
        typer.echo(f"median |λ̂ − λ| / λ over {len(errors)} networks: {100 * median:.1f} %")
    return rows, result, is_stopped


def _write(
    rows: list[dict[str, Any]],
    result: LLCResult | None,
    is_stopped: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    def draw(path: Path) -> None:
        from llc_fast.plots import plot_known, write_figure

        write_figure(plot_known(rows, result), path)

    write_all(
        [("numbers", json_path, lambda path: write_json(path, rows)), ("picture", plot_path if rows else None, draw)]
    )
    if is_stopped:
        raise typer.Exit(130)
