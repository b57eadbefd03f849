"""One experiment in one folder: rows that are kept as they are measured, and what is needed to resume."""

from __future__ import annotations

import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import llc_fast
from llc_fast.grid import ScanResult
from llc_fast.progress import make_progress, print_line
from llc_fast.reproduce.claims import Claim
from llc_fast.reproduce.rows import Row, Tables, sweep_rows
from llc_fast.result import LLCResult
from llc_fast.support.files import atomic_write, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
FORMAT = 2
"""Of data.json: another one is not gone on with."""


class Study:
    """One experiment in one folder: ``data.json`` with its tables, and ``work/`` for what is needed to resume.

    Args:
        name: of the experiment.
        scale: "small" or "paper".
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
        self._head: Row = {"experiment": name, "scale": scale, "seed": seed, "llc_fast": llc_fast.__version__}
        self._head["format"] = FORMAT
        self._work = output / "work"
        self._work.mkdir(parents=True, exist_ok=True)
        self.tables: Tables = {}
        self._file = output / "data.json"
        self._opened: list[Path] = []
        if self._file.exists():
            self.tables = self._read()
        self._write()  # a folder that can't be written to is better found out now

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete what an earlier study has left in this folder; a folder without a study is left alone."""
        file = folder / "data.json"
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            return
        if isinstance(found, dict) and {"experiment", "llc_fast", "tables"} <= found.keys():  # not any data.json
            file.unlink()
            shutil.rmtree(folder / "work", ignore_errors=True)

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
        self,
        table: str,
        key: str,
        model: torch.nn.Module,
        steps: Sequence[int],
        states: Callable[[], Sequence[Any]],
        data: Any,
        loss_fn: Any,
        about: Callable[[int], Mapping[str, Any]] = lambda step: {},
        say: Callable[[Row], str] = lambda row: "",
        **settings: Any,
    ) -> list[Row]:
        """A row for each checkpoint of a training run, by :func:`llc_fast.sweep_checkpoints`, resumed if stopped.

        The first row takes the time of all: it is the one that the sweep is done for.

        Args:
            table: name of the table.
            key: of the sweep within the study; rows are called by it and their step.
            model: that the state dicts belong to.
            steps: of training, one for each checkpoint.
            states: gives the state dicts, if any row is still missing.
            data, loss_fn: as for :func:`llc_fast.estimate_llc`.
            about: what else a row has, by step.
            say: a few words about a row for people who watch.
            settings: of :func:`llc_fast.sweep_checkpoints`, other than this study's device, seed and progress bar.

        Raises:
            KeyboardInterrupt: Ctrl-C; the same study goes on from there.
        """

        @functools.cache
        def found() -> dict[int, Row]:
            wanted: dict[str, Any] = {"device": self.device, "seed": self.seed, "progress": self.progress} | settings
            swept = llc_fast.sweep_checkpoints(
                model, states(), data, loss_fn, labels=list(steps), dim="step", folder=self.path(key), **wanted
            )
            if swept.attrs["partial"]:
                raise KeyboardInterrupt
            return dict(zip(steps, sweep_rows(swept), strict=True))

        cases = {f"{key}, step {step}": step for step in steps}
        return self.rows(table, cases, lambda step: {"step": step, **about(step), **found()[step]}, say)

    def scan(self, key: str, model: torch.nn.Module, data: Any, loss_fn: Any, **settings: Any) -> ScanResult:
        """:func:`llc_fast.scan` with this study's device, seed and progress bar, resumed if it was stopped.

        Call it while a row is measured; `key` names the scan within the study.

        Raises:
            KeyboardInterrupt: Ctrl-C; the same study goes on from there.
        """
        wanted: dict[str, Any] = {"device": self.device, "seed": self.seed, "progress": self.progress} | settings
        found = llc_fast.scan(model, data, loss_fn, folder=self.path(key), **wanted)
        if found.is_partial:
            raise KeyboardInterrupt
        shutil.rmtree(self.path(key), ignore_errors=True)
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

    def steps(self, count: int, title: str) -> Iterator[int]:
        """``range(count)`` with progress, for training."""
        with make_progress(self.progress, count, title, stays=False) as progress:
            for step in range(count):
                yield step
                progress.update(step + 1)

    def path(self, key: str, suffix: str = "") -> Path:
        """A place in ``work/`` for what is called `key`."""
        return self._work / (re.sub(r"[^\w.+=-]+", "_", key) + suffix)

    def say(self, text: str) -> None:
        """A line for people who watch."""
        if self.progress:
            print_line(text)

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

    def _write(self, claims: Iterable[Claim] = ()) -> None:
        data = {**self._head, "claims": [vars(c) for c in claims], "machine": machine(), "tables": self.tables}
        with atomic_write(self._file) as file:
            file.write((json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def finish(self, claims: list[Claim], figures: Mapping[str, Figure]) -> list[Path]:
        """Write the claims and the figures; returns the files of the study."""
        self._write(claims)
        paths = []
        for name, figure in figures.items():
            paths.append(self.output / f"{name}.png")
            with atomic_write(paths[-1]) as file:
                figure.savefig(file, format="png", dpi=150)
        return [self._file, *paths]


def machine() -> Row:
    """Where it was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}
