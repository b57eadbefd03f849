"""What experiments share: rows that are kept as they are measured, resumption, claims that are checked, pictures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

import llc_fast
from llc_fast.result import LLCResult
from llc_fast.support.files import atomic_write, plain

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

T = TypeVar("T")
Row = dict[str, Any]
"""One measurement, as JSON gives it back: lists for arrays and tuples, None for numbers that are not finite."""
Tables = dict[str, dict[str, Row]]
"""Rows by the name of their table and their own."""


@dataclass(frozen=True)
class Check:
    """Something that must come out.

    Attributes:
        claim: what is claimed, with its bound: "Spearman's ρ of λ̂ and λ is at least 0.99".
        found: the figure that was measured: "0.997".
        passed: whether it holds.
    """

    claim: str
    found: str
    passed: bool


class Experiment(Protocol):
    """What a module of this folder offers. Its docstring tells people what is done, and where it comes from."""

    __doc__: str | None
    SCALES: Mapping[str, Any]
    """Settings (a frozen dataclass of the module) for "small", minutes on two cores, and "paper", one GPU."""

    def measure(self, study: Study, settings: Any) -> None:
        """Measure row by row, through `study` alone: what is kept already is not measured again."""

    def check(self, tables: Tables, settings: Any) -> list[Check]:
        """The claims, from the tables alone."""

    def draw(self, tables: Tables, settings: Any) -> dict[str, Figure]:
        """Pictures by name, from the tables alone."""


class Study:
    """One experiment in one folder: ``data.json`` with its tables, and ``work/`` for what is needed to resume.

    Args:
        name: of the experiment.
        scale: of `Experiment.SCALES`.
        output: the folder; made if need be. What is in it already is gone on with.
        seed: of everything random.
        device: where to compute.
        progress: show progress.

    Raises:
        ValueError: the folder holds another experiment, scale, seed or version.
        OSError: it can't be written to.
    """

    def __init__(
        self, name: str, scale: str, output: Path, *, seed: int = 0, device: str = "cpu", progress: bool = True
    ) -> None:
        self.name, self.scale, self.output, self.seed = name, scale, output, seed
        self.device, self.progress = torch.device(device), progress
        self._head = {"experiment": name, "scale": scale, "seed": seed, "llc_fast": llc_fast.__version__}
        self._work = output / "work"
        self._work.mkdir(parents=True, exist_ok=True)
        self.tables: Tables = {}
        self._file = output / "data.json"
        self._opened: list[Path] = []
        if self._file.exists():
            self.tables = self._read()
        self._write()  # a folder that can't be written to is better found out now

    # ---- what experiments call -----------------------------------------------------------------------------

    def rows(
        self,
        table: str,
        cases: Mapping[str, T],
        measure: Callable[[T], Mapping[str, Any]],
        say: Callable[[Row], str] = lambda row: "",
    ) -> list[Row]:
        """Measure every case that is not kept yet, keep each as soon as it is there, and return all rows.

        Each row is given the seconds that it took, over all attempts that a resumed one needed but the interrupted.

        Args:
            table: name of the table.
            cases: what `measure` is called with, by the row's name.
            measure: gives a row: numbers, strings, booleans, lists, arrays, dictionaries of these.
            say: a few words about a row for people who watch.
        """
        kept = self.tables.setdefault(table, {})
        for position, (key, case) in enumerate(cases.items(), start=1):
            is_new = key not in kept
            if is_new:
                started = time.perf_counter()
                row = {**measure(case), "seconds": round(time.perf_counter() - started, 2)}
                kept[key] = plain(row)
                self._write()
                for path in self._opened:
                    path.unlink(missing_ok=True)
                self._opened.clear()
            time_taken = f"{kept[key]['seconds']:.0f} s" if is_new else "kept"
            self.say(f"[{table} {position}/{len(cases)}] {key}: {say(kept[key])} ({time_taken})")
        return [kept[key] for key in cases]

    def estimate(self, key: str, model: torch.nn.Module, data: Any, loss_fn: Any, **settings: Any) -> LLCResult:
        """:func:`llc_fast.estimate_llc` with this study's device, seed and progress bar, resumed if it was stopped.

        Call it while a row is measured; `key` names the estimate within the study.

        Raises:
            KeyboardInterrupt: Ctrl-C; the same study goes on from there.
        """
        path = self.path(key, ".npz")
        self._opened.append(path)
        wanted: dict[str, Any] = {"device": self.device, "seed": self.seed, "progress": self.progress} | settings
        result = llc_fast.estimate_llc(model, data, loss_fn, checkpoint=path, **wanted)
        if result.is_partial:
            raise KeyboardInterrupt
        return result

    def sweep(
        self, key: str, model: torch.nn.Module, checkpoints: Sequence[Any], data: Any, loss_fn: Any, **settings: Any
    ) -> xarray.Dataset:
        """:func:`llc_fast.sweep_checkpoints` with this study's device, seed and progress bar, resumed if stopped.

        Raises:
            KeyboardInterrupt: Ctrl-C; the same study goes on from there.
        """
        wanted: dict[str, Any] = {"device": self.device, "seed": self.seed, "progress": self.progress} | settings
        found = llc_fast.sweep_checkpoints(model, checkpoints, data, loss_fn, folder=self.path(key), **wanted)
        if found.attrs["partial"]:
            raise KeyboardInterrupt
        return found

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` returns, made once and kept for later runs of the study: tensors, numbers, strings, and lists,
        tuples and dictionaries of these. Trained models are kept this way, as state dicts."""
        path = self.path(key, ".pt")
        if path.exists():
            return torch.load(path, map_location=self.device, weights_only=True)  # type: ignore[no-any-return]
        made = make()
        with atomic_write(path) as file:
            torch.save(made, file)
        return made

    def steps(self, count: int, title: str) -> Iterable[int]:
        """``range(count)`` with a progress bar, for training: its ``set_postfix_str`` takes a useful figure."""
        bar: Iterable[int] = tqdm(range(count), desc=title, disable=not self.progress, leave=False, mininterval=0.2)
        return bar

    def path(self, key: str, suffix: str = "") -> Path:
        """A place in ``work/`` for what is called `key`."""
        return self._work / (re.sub(r"[^\w.+=-]+", "_", key) + suffix)

    def say(self, text: str) -> None:
        """A line for people who watch."""
        if self.progress:
            tqdm.write(text)

    # ---- files ---------------------------------------------------------------------------------------------

    def _read(self) -> Tables:
        try:
            found = json.loads(self._file.read_text())
            tables, head = found["tables"], {name: found[name] for name in self._head}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._file} is not the data of an experiment: choose another folder") from error
        if head != self._head:
            differences = [f"{k} is {head[k]!r}, not {v!r}" for k, v in self._head.items() if head[k] != v]
            raise ValueError(
                f"{self._file} belongs to another run ({'; '.join(differences)}): choose another folder, or "
                "--restart to measure again"
            )
        return tables  # type: ignore[no-any-return]

    def _write(self, checks: Iterable[Check] = ()) -> None:
        data = {**self._head, "checks": [vars(c) for c in checks], "machine": machine(), "tables": self.tables}
        with atomic_write(self._file) as file:
            file.write((json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def finish(self, checks: list[Check], figures: Mapping[str, Figure]) -> list[Path]:
        """Write the claims and the pictures; returns the files of the study."""
        self._write(checks)
        paths = []
        for name, figure in figures.items():
            paths.append(self.output / f"{name}.png")
            with atomic_write(paths[-1]) as file:
                figure.savefig(file, format="png", dpi=150)
        return [self._file, *paths]


def run(experiment: Experiment, study: Study, settings: Any = None) -> list[Check]:
    """Measure, check and draw.

    Args:
        experiment: what.
        study: where.
        settings: other than those of the study's scale.
    """
    settings = experiment.SCALES[study.scale] if settings is None else settings
    experiment.measure(study, settings)
    checks = experiment.check(study.tables, settings)
    study.finish(checks, experiment.draw(study.tables, settings))
    return checks


# ---- rows --------------------------------------------------------------------------------------------------


def figures_of(result: LLCResult) -> Row:
    """What is worth keeping of an estimate."""
    low, high = result.interval()
    settings, diagnostics = result.settings, result.diagnostics
    return {
        "llc": result.llc_mean,
        "stderr": result.llc_stderr,
        "interval": [low, high],
        "llc_per_chain": result.llc_per_chain,
        "warnings": result.warnings,
        "init_loss": result.init_loss,
        "nbeta": result.nbeta,
        "lr": settings["lr"],
        "localization": settings["localization"],
        "batch_size": settings["batch_size"],
        "sampler": settings["sampler"],
        "num_parameters": settings["num_parameters"],
        "gradients": result.loss_trace.size + diagnostics.get("pilot_steps", 0),
        "r_hat": diagnostics.get("r_hat"),
        "ess": diagnostics.get("ess_bulk"),
        "seconds_of_estimate": settings["seconds"],
    }


def machine() -> Row:
    """Where it was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}
