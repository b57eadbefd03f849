"""Runs that survive: the state of all chains in one file, written beside and renamed."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llc_fast.support.files import atomic_write, remove_partial
from llc_fast.traces import Traces

_FORMAT = 4
INTERVAL = 60.0
"""Seconds between snapshots."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        identity: what names the run; a checkpoint of another one is refused.
        chosen: what was chosen for settings left open, so that a resumed run goes on with them.
        traces: of the chains.
    """

    identity: dict[str, Any]
    chosen: dict[str, Any]
    traces: list[Traces]


class Checkpoint:
    """The checkpoint of a run at `path`; each of several processes writes to a file of its own, ``path.rank<rank>``.

    Args:
        path: of the file.
        rank: of this process; None: the only one.
        interval: seconds between snapshots.

    Raises:
        ValueError: the folder does not exist, or `path` is one.
        PermissionError: the folder can't be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int | None = None, interval: float = INTERVAL) -> None:
        self.path, self._interval, self._written = Path(path), interval, time.monotonic()
        # Not to `path`, which holds the chains of all: it must last until they are all done, or written elsewhere.
        self._file = self.path if rank is None else self.path.with_name(f"{self.path.name}.rank{rank}")
        self.problem = ""
        """Why the last snapshot could not be written; the one before is still there."""
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"checkpoint={str(path)!r}: the folder {folder} does not exist")
        if self.path.is_dir():
            raise ValueError(f"checkpoint={str(path)!r} is a folder: give the name of a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"checkpoint={str(path)!r}: no permission to write to the folder {folder}")
        for file in (self._file,) if rank else (self._file, self.path, *self._rank_files()):
            remove_partial(file)

    def load(self, identity: Mapping[str, Any]) -> Saved | None:
        """What this run, in whatever processes, has saved; None if nothing.

        Raises:
            ValueError: a file is damaged, or belongs to another run; the differences are named.
        """
        found = []
        for path in (self.path, *self._rank_files()):
            if path.exists():
                found.append(read(path))
                compare(path, found[-1].identity, identity)
        if not found:
            return None
        return Saved(found[0].identity, found[0].chosen, [t for saved in found for t in saved.traces])

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written >= self._interval

    def save(self, saved: Saved) -> None:
        """Replace the file; a failure leaves the old one and is reported in :attr:`problem`."""
        started = time.monotonic()
        try:
            write(self._file, saved)
            self.problem = ""
        except OSError as error:
            self.problem = f"{error.strerror or error} ({self._file})"
        # Writing takes no more than a twentieth of the time, however large the chains.
        self._interval = max(self._interval, 20 * (time.monotonic() - started))
        self._written = time.monotonic()

    def merge(self, saved: Saved) -> None:
        """Replace the files of all processes by one."""
        if self._file != self.path:  # else it has just been written
            self._file = self.path
            self.save(saved)
        if not self.problem:
            for other in self._rank_files():
                other.unlink(missing_ok=True)

    def _rank_files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*[0-9]"))


def write(path: Path, saved: Saved) -> None:
    """Write a checkpoint: NumPy's npz, whose members carry checksums.

    Raises:
        OSError: it can't be written; what was at `path` before is still there.
    """
    groups, arrays = [], dict[str, Any]()
    for k, traces in enumerate(saved.traces):
        numbers, named = traces.to_arrays()
        groups.append(numbers)
        arrays |= {f"{k}/{name}": a for name, a in named.items()}
    meta = {"format": _FORMAT, "identity": saved.identity, "chosen": saved.chosen, "groups": groups}
    with atomic_write(path) as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)


def read(path: Path) -> Saved:
    """Read what :func:`write` wrote.

    Raises:
        ValueError: the file is no checkpoint, or is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            groups = meta["groups"]
            is_current = meta["format"] == _FORMAT
            arrays = {name: file[name] for name in file.files if name != "meta"} if is_current else {}
        traces = []
        for k, numbers in enumerate(groups if is_current else []):
            mine = {name.removeprefix(f"{k}/"): a for name, a in arrays.items() if name.startswith(f"{k}/")}
            traces.append(Traces.from_arrays(numbers, mine))
        if is_current:
            return Saved(meta["identity"], meta["chosen"], traces)
    except (PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(path)!r} is not a checkpoint of llc_fast, or is damaged: delete it to start again"
        ) from error
    raise ValueError(f"checkpoint={str(path)!r} was written by another version of llc_fast: delete it")


def compare(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless both identities are the same run's."""
    differences = [
        f"{name} was {_short(saved.get(name))}, is {_short(wanted.get(name))}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"checkpoint={str(path)!r} belongs to another run: {'; '.join(differences)}. "
            "Give another path, or delete the file to start again"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
