"""Where the numbers of a training run are written to: CSV, TensorBoard, Weights & Biases, loggers of Lightning."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llc_fast.support.files import output_path, write_csv

Metrics = Mapping[str, float | int | str]
"""Numbers by name, such as ``"llc/mean"``; texts too."""


class Log(Protocol):
    """Something that numbers are written to."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the numbers of a training step.

        Raises:
            Exception: of whatever kind: the disk is full, or the service is not to be reached.
        """


class CSVLog:
    """A file with a row for each step, in the order of the steps.

    The file is whole at any moment, and written anew for each row. A step that comes a second time, as where training
    went back to a checkpoint, replaces its row.

    Args:
        path: of the file; one that is there is continued.

    Raises:
        TypeError, ValueError, PermissionError: it can't be written.
        ValueError: there is a file that no such log has written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = output_path("log", path)
        self._rows = self._found()

    def _found(self) -> dict[int, dict[str, str]]:
        if not self._path.exists() or not self._path.stat().st_size:
            return {}
        try:
            with open(self._path, newline="", encoding="utf-8") as file:
                rows = [dict(row) for row in csv.DictReader(file, strict=True)]
            found = {int(row["step"]): row for row in rows}
            if any(None in row or None in row.values() for row in rows):  # too long, or too short
                raise ValueError
        except (KeyError, TypeError, ValueError, csv.Error):
            raise ValueError(
                f"log={str(self._path)!r} is there, and is no CSV file with a column 'step': give another name"
            ) from None
        return found

    def write(self, step: int, metrics: Metrics) -> None:
        self._rows[step] = {"step": str(step), **{name: str(value) for name, value in metrics.items()}}
        write_csv(self._path, [self._rows[k] for k in sorted(self._rows)])


class TensorBoardLog:
    """A ``torch.utils.tensorboard.SummaryWriter``, or what has its methods."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
            elif value:
                self._writer.add_text(name, value, step)
        self._writer.flush()


class WandBLog:
    """A run of Weights & Biases.

    Its own count of steps belongs to whoever trains: a row that is committed here would move the count on, and what is
    then logged under an earlier step is dropped. So the numbers wait for the next row that training commits.
    ``define_metric`` makes the training step the axis of their charts.

    Args:
        run: the run; None: the one that is active when something is written, if any is.
        axis: the number that training itself commits rows by, where that is known: then nothing has to wait.
    """

    def __init__(self, run: Any = None, axis: str | None = None) -> None:
        self._run, self._axis = run, axis
        self._defined: Any = None

    def write(self, step: int, metrics: Metrics) -> None:
        run = self._run or active_wandb_run()
        if run is None:
            return
        if self._axis is not None:
            run.log({**metrics, self._axis: step})
            return
        prefix = next(iter(metrics)).rpartition("/")[0]
        if self._defined is not run:
            run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
            self._defined = run
        run.log({**metrics, f"{prefix}/step": step}, commit=False)


def active_wandb_run() -> Any:
    """The run of Weights & Biases that this program has begun, or None."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None)


class LightningLog:
    """A logger of Lightning's, which takes numbers alone."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def write(self, step: int, metrics: Metrics) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        self._logger.log_metrics(numbers, step=step)
        self._logger.save()


class FunctionLog:
    """A function of the user's, called with the numbers and the step."""

    def __init__(self, function: Callable[[dict[str, Any], int], object]) -> None:
        self._function = function

    def write(self, step: int, metrics: Metrics) -> None:
        self._function(dict(metrics), step)


def as_logs(given: Any) -> list[Log]:
    """What the user gave as one log or several.

    Raises:
        TypeError, ValueError, PermissionError: it is none, or a file that can't be written or continued.
    """
    if given is None or given is False:
        return []
    several = isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) and not hasattr(given, "log")
    return [_as_log(each) for each in given] if several else [_as_log(given)]


def _as_log(given: Any) -> Log:
    if isinstance(given, (str, os.PathLike)):
        if Path(os.fsdecode(given)).suffix.lower() != ".csv":
            raise ValueError(
                f"log={os.fspath(given)!r} must be a name that ends in .csv; for TensorBoard give "
                f"SummaryWriter({os.fspath(given)!r})"
            )
        return CSVLog(given)
    if hasattr(given, "add_scalar"):
        return TensorBoardLog(given)
    if hasattr(given, "define_metric") and hasattr(given, "log"):
        return WandBLog(given)
    if hasattr(given, "log_metrics"):
        return LightningLog(given)
    if callable(given) and not isinstance(given, type):
        return FunctionLog(given)
    raise TypeError(
        "log must be the name of a .csv file, a SummaryWriter, a run of wandb, a function of (metrics, step), or a "
        f"list of these, got {type(given).__name__}"
    )
