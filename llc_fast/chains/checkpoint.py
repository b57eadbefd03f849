"""Runs that survive: the state of all chains in one file, written beside and renamed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from llc_fast.support.arrays import read_arrays, read_meta, write_arrays
from llc_fast.support.errors import differences
from llc_fast.support.files import atomic_write, output_path, remove_partial
from llc_fast.traces import Traces

_FORMAT = 6
INTERVAL = 60.0
"""Seconds between snapshots."""
_REFERENCE = "reference/"
_MAX_RANKS = 4096
"""Processes whose leavings are looked for."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        identity: what names the run; a checkpoint of another one is refused.
        chosen: what was chosen for settings left open, so that a resumed run goes on with them.
        schedule: of the chains, as far as they were to go.
        traces: of the chains.
        reference: w* by parameter, where it is not the model's.
    """

    identity: dict[str, Any]
    chosen: dict[str, Any]
    schedule: dict[str, int]
    traces: list[Traces]
    reference: dict[str, NDArray[Any]] = field(default_factory=dict)


class Checkpoint:
    """The checkpoint of a run at `path`; each of several processes writes to a file of its own, ``path.rank<rank>``.

    The path is made absolute here: the program may change its folder while it runs.

    Args:
        path: of the file.
        rank: of this process; None: the only one.
        interval: seconds between snapshots.

    Raises:
        TypeError: `path` is no path.
        ValueError: the folder does not exist, or something that is no file has the name.
        PermissionError: the folder can't be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int | None = None, interval: float = INTERVAL) -> None:
        self.path, self._interval, self._written = output_path("checkpoint", path), interval, time.monotonic()
        self._durations: deque[float] = deque(maxlen=2)  # of the last writes
        # Not to `path`, which holds the chains of all: it must last until they are all done, or written elsewhere.
        self._file = self.path if rank is None else _rank_file(self.path, rank)
        self.problem = ""
        """Why the last snapshot could not be written; the one before is still there."""
        if self._file != self.path:
            output_path("checkpoint", self._file)
        if not rank:
            remove_partial(self.path, *(_rank_file(self.path, other) for other in range(_MAX_RANKS)))

    def load(self, identity: Mapping[str, Any]) -> Saved | None:
        """What this run, in whatever processes, has saved; None if nothing.

        Raises:
            ValueError: a file is damaged, or belongs to another run; the differences are named.
        """
        found = []
        for path in (self.path, *self._rank_files()):
            if path.is_file():
                found.append(read(path, self.path))
                compare(path, found[-1].identity, identity)
        if not found:
            return None
        first = found[0]
        for saved in found[1:]:
            if saved.schedule != first.schedule:
                raise ValueError(
                    f"checkpoint={str(self.path)!r} can't be used: its processes were told different lengths: give "
                    "another path, or delete the files to start again"
                )
        return dataclasses.replace(first, traces=[t for saved in found for t in saved.traces])

    @property
    def is_due(self) -> bool:
        # Writing takes no more than a twentieth of the time, however large the chains. Of the last two writes the
        # faster one counts: a disk that hung once is no reason to keep less.
        pause = max(self._interval, 20 * min(self._durations, default=0.0))
        return time.monotonic() - self._written >= pause

    def save(self, saved: Saved) -> None:
        """Replace the file; a failure leaves the old one and is reported in :attr:`problem`."""
        started = time.monotonic()
        try:
            write(self._file, saved)
            self.problem = ""
        except OSError as error:
            self.problem = f"{error.strerror or error} ({self._file})"
        self._written = time.monotonic()
        self._durations.append(self._written - started)

    def merge(self, saved: Saved) -> None:
        """Replace the files of all processes by one."""
        if self._file != self.path:  # else it has just been written
            self._file = self.path
            self.save(saved)
        if not self.problem:
            for other in self._rank_files():
                if _is_part_of(other, saved.identity):  # a file of the user's may have come to be called so
                    other.unlink(missing_ok=True)

    def _rank_files(self) -> list[Path]:
        ours = re.compile(re.escape(self.path.name) + r"\.rank(0|[1-9][0-9]*)", re.ASCII)
        try:
            names = [name for name in os.listdir(self.path.parent) if ours.fullmatch(name)]
        except OSError:  # a folder that may be written to but not listed
            names = []
        return sorted(path for name in names if (path := self.path.with_name(name)).is_file())


def _rank_file(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank{rank}")


def _is_part_of(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a file is a checkpoint of this run."""
    try:
        meta = read_meta(path)
        return bool(path.is_file() and meta["format"] == _FORMAT and meta["identity"] == _as_json(identity))
    except Exception:  # of whatever kind: it is something else
        return False


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def write(path: Path, saved: Saved) -> None:
    """Write a checkpoint: NumPy's npz, whose members carry checksums.

    Raises:
        OSError: it can't be written; what was at `path` before is still there.
    """
    groups, arrays = [], {f"{_REFERENCE}{name}": values for name, values in saved.reference.items()}
    for k, traces in enumerate(saved.traces):
        numbers, named = traces.to_arrays()
        groups.append(numbers)
        arrays |= {f"{k}/{name}": a for name, a in named.items()}
    meta = {
        "format": _FORMAT,
        "identity": saved.identity,
        "chosen": saved.chosen,
        "schedule": saved.schedule,
        "groups": groups,
    }
    with atomic_write(path) as file:
        write_arrays(file, meta, arrays)


def read(path: Path, checkpoint: Path | None = None) -> Saved:
    """Read what :func:`write` wrote.

    Args:
        path: of the file.
        checkpoint: what the user gave, if this is the file of one of several processes beside it.

    Raises:
        ValueError: the file is no checkpoint, or is damaged.
    """
    try:
        meta, arrays = read_arrays(path)
        groups = meta["groups"]
        is_current = meta["format"] == _FORMAT
        traces = []
        for k, numbers in enumerate(groups if is_current else []):
            mine = {name.removeprefix(f"{k}/"): a for name, a in arrays.items() if name.startswith(f"{k}/")}
            traces.append(Traces.from_arrays(numbers, mine))
        if is_current:
            reference = {n.removeprefix(_REFERENCE): a for n, a in arrays.items() if n.startswith(_REFERENCE)}
            return Saved(meta["identity"], meta["chosen"], meta["schedule"], traces, reference)
    except (PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        if checkpoint not in (None, path):
            raise ValueError(
                f"checkpoint={str(checkpoint)!r} can't be used: beside it, {path.name} has the name of a process's "
                "part of the checkpoint, but is none, or is damaged. Give another path, or move that file away"
            ) from error
        raise ValueError(
            f"checkpoint={str(path)!r} is not a checkpoint of llc_fast, or is damaged: give another path, or move the "
            "file away to start again"
        ) from error
    raise ValueError(
        f"checkpoint={str(path)!r} was written by another version of llc_fast: give another path, or delete the file"
    )


def compare(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless both identities are the same run's."""
    if found := differences(saved, wanted):
        raise ValueError(
            f"checkpoint={str(path)!r} belongs to another run: {'; '.join(found)}. "
            "Give another path, or delete the file to start again"
        )
