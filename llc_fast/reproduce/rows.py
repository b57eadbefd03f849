"""What is kept of an estimate: one row of a table, and what experiments ask of such rows.

A row is what JSON gives back: lists for arrays and tuples, None for numbers that are not finite. λ̂ of an estimate whose
chains diverged is None, and so is what cannot be computed without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray

    from llc_fast.result import LLCResult

Row = dict[str, Any]
"""One measurement."""
Tables = dict[str, dict[str, Row]]
"""Rows by the name of their table and their own."""

DIAGNOSTICS = {
    "r_hat": "r_hat",
    "ess": "ess_bulk",
    "bias_share": "bias_share",
    "distance_over_reference": "distance_over_reference",
}
"""What a row keeps of ``LLCResult.diagnostics``: name in the row, name there."""


def estimate_row(result: LLCResult) -> Row:
    """The row of an estimate."""
    settings, diagnostics = result.settings, result.diagnostics
    return {
        "llc": result.llc_mean,
        "stderr": result.llc_stderr,
        "interval": list(result.interval()),
        "llc_per_chain": result.llc_per_chain,
        "warnings": list(result.warnings),
        "codes": [warning.code for warning in result.warnings],
        "init_loss": result.init_loss,
        "nbeta": result.nbeta,
        "lr": settings["lr"],
        "localization": settings["localization"],
        "batch_size": settings["batch_size"],
        "sampler": settings["sampler"],
        "num_parameters": settings["num_parameters"],
        "gradients": result.loss_trace.size + sum(diagnostics.get(k, 0) for k in ("pilot_steps", "metric_gradients")),
        "seconds_of_estimate": settings["seconds"],
        **{ours: diagnostics.get(theirs) for ours, theirs in DIAGNOSTICS.items()},
    }


def sweep_rows(found: xarray.Dataset) -> list[Row]:
    """The rows of a sweep, one for each checkpoint, in their order."""
    (dim,) = found["llc_mean"].dims
    return [_checkpoint_row(found.isel({dim: k})) for k in range(found.sizes[dim])]


def _checkpoint_row(found: xarray.Dataset) -> Row:
    names = {"llc": "llc_mean", "stderr": "llc_stderr", "seconds_of_estimate": "seconds", **DIAGNOSTICS}
    names |= {name: name for name in ("init_loss", "nbeta", "lr", "gradients", "is_warm")}
    return {
        **{ours: found[theirs].item() for ours, theirs in names.items()},
        "interval": [found["llc_low"].item(), found["llc_high"].item()],
        "llc_per_chain": found["llc_per_chain"].values,
        "warnings": found["warnings"].item().splitlines(),
        "codes": found["warning_codes"].item().split(),
    }


# ---- questions ---------------------------------------------------------------------------------------------


def number(value: float | None) -> float:
    """NaN for None."""
    return math.nan if value is None else float(value)


def numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    """As :func:`number`, of many."""
    return np.array([number(value) for value in values])


def column(rows: Iterable[Row], name: str) -> NDArray[np.float64]:
    """One number of each row; NaN where there is none."""
    return numbers(row[name] for row in rows)


def that_count(codes: Iterable[str]) -> list[str]:
    """Codes of warnings without that of chains far from w*: where λ is known it is so wherever chains go."""
    return [code for code in codes if code != "far"]


def is_warned(row: Row) -> bool:
    """Whether the estimate came with a warning, other than that it is not local."""
    return bool(row["warnings"]) and (not row.get("codes") or bool(that_count(row["codes"])))


def relative_error(row: Row, known: float) -> float:
    """λ̂/λ − 1; NaN without λ̂ or λ."""
    return number(row["llc"]) / known - 1 if known else math.nan


def sizes(errors: Iterable[float | None]) -> NDArray[np.float64]:
    """|error|, infinite where there is no estimate: no estimate is the worst one."""
    found = np.abs(numbers(errors))
    return np.where(np.isnan(found), math.inf, found)


def quantile(errors: NDArray[np.float64], prob: float) -> float:
    """Quantile of errors, some of which may be infinite."""
    huge = 1e300  # infinite ones would make NaN of what lies between them
    found = float(np.quantile(np.minimum(errors, huge), prob))
    return math.inf if found > 1e-6 * huge else found


def in_words(row: Row) -> str:
    """The estimate for people who watch."""
    warned = f", {_count(len(row['warnings']), 'warning')}" if is_warned(row) else ""
    return ("no estimate" if row["llc"] is None else f"λ̂ = {plus_minus(row['llc'], row['stderr'])}") + warned


def plus_minus(value: float | None, error: float | None) -> str:
    """A value with its standard error, to two digits of the error: "40.81 ± 0.23"."""
    if value is None or not math.isfinite(value):
        return "none"
    if error is None or not 0 < error < math.inf:
        return f"{value:.4g} ± ?"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
