"""Progress of long jobs, in the way that suits who looks: a bar, lines in a log file, calls of a function, or nothing.

    with make_progress(True, total=8800, title="LLC") as progress:
        progress.update(880, llc=12.3)

A terminal or a notebook shows a bar. Anything else that stderr may be, a log file or a pipe, gets a line for each 10 %:

    LLC: 10 % (880 of 8800 steps), λ̂ ≈ 12.3, 0:41 left
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

ProgressFunction = Callable[[int, int, float], object]
"""Called with the steps done, all steps, and λ̂ so far (NaN before the first draw)."""
LOG_EVERY = 10
"""Percent between two lines of a log."""


class Progress:
    """How far a job is. This class shows nothing.

    Attributes:
        title: what is going on. It may be changed on the way.
        is_shown: whether anybody sees it. If not, the caller need not compute λ̂.
    """

    is_shown = False

    def __init__(self, total: int | None, title: str, unit: str) -> None:
        self.title, self._total, self._unit = title, total, unit

    def update(self, done: float, llc: float | None = None) -> None:
        """Say how far the job is.

        Args:
            done: of `total`, over the whole job. A part of a unit may be done. It is less than before where something
                is done again.
            llc: λ̂ so far; None or NaN if there is none yet.
        """

    def extend(self, total: int) -> None:
        """The job has so many units: more, or fewer, than was said before."""
        self._total = total

    def close(self) -> None:
        """The job is over, or has been stopped."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, done: float) -> str:
        """``880 of 8800 steps``."""
        number = f"{done:.0f}" if float(done).is_integer() else f"{done:.1f}"
        if self._total is None:
            return f"{number} {self._unit}{'' if number == '1' else 's'}"
        return f"{number} of {self._total} {self._unit}s"


def _so_far(llc: float | None) -> str:
    """``, λ̂ ≈ 12.3``, or nothing where there is no λ̂ yet."""
    return "" if llc is None or math.isnan(llc) else f", λ̂ ≈ {llc:.4g}"


def make_progress(
    progress: bool | ProgressFunction, total: int | None, title: str, unit: str = "step", *, stays: bool = True
) -> Progress:
    """Progress for one job.

    Args:
        progress: True: a bar, or lines in a log. False: nothing. A function: called at each update instead.
        total: how many units the job has; None if nobody knows. A log then gets a line for each unit that is no step,
            and one at the end.
        title: what is going on.
        unit: what is counted, in the singular.
        stays: whether a bar is left standing when the job is over.
    """
    if callable(progress):
        return _Calls(progress, total, title, unit)
    if not progress or sys.stderr is None:
        return Progress(total, title, unit)
    if sys.stderr.isatty() or _in_notebook():
        return _Bar(total, title, unit, stays=stays)
    return _Log(total, title, unit)


def print_line(text: str) -> None:
    """Print a line on stdout, above the bars that a terminal shows."""
    from tqdm import tqdm

    tqdm.write(text)


def announce(text: str) -> None:
    """Print a line on stderr, above the bars; nothing if it is empty."""
    if text and sys.stderr is not None:
        from tqdm import tqdm

        tqdm.write(f"LLC: {text}", file=sys.stderr)


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel, which draws bars though its stderr is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class _Calls(Progress):
    """Calls a function of the user's."""

    is_shown = True

    def __init__(self, function: ProgressFunction, total: int | None, title: str, unit: str) -> None:
        super().__init__(total, title, unit)
        self._function = function

    def update(self, done: float, llc: float | None = None) -> None:
        self._function(int(done), self._total or 0, math.nan if llc is None else llc)


class _Bar(Progress):
    """A bar on a terminal or in a notebook."""

    is_shown = True

    def __init__(self, total: int | None, title: str, unit: str, *, stays: bool) -> None:
        super().__init__(total, title, unit)
        from tqdm.auto import tqdm

        known = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        unknown = "{desc} [{elapsed}, {rate_fmt}{postfix}]"
        self._bar: Any = tqdm(
            total=total,
            desc=title,
            unit=unit,
            leave=stays,
            mininterval=0.2,
            dynamic_ncols=True,
            bar_format=unknown if total is None else known,
        )
        self._has_begun = False

    def update(self, done: float, llc: float | None = None) -> None:
        bar = self._bar
        bar.set_description_str(self.title, refresh=False)
        bar.set_postfix_str(self._count(done) + _so_far(llc), refresh=False)
        if not self._has_begun:  # what an earlier run has done is not this one's speed
            self._has_begun = True
            bar.n = bar.initial = bar.last_print_n = done
            bar.refresh()
            return
        bar.update(done - bar.n)

    def extend(self, total: int) -> None:
        super().extend(total)
        self._bar.total = total

    def close(self) -> None:
        self._bar.close()


class _Log(Progress):
    """Lines on stderr: one for each 10 %, the last of them when the job is over."""

    is_shown = True

    def __init__(self, total: int | None, title: str, unit: str) -> None:
        super().__init__(total, title, unit)
        self._began = time.monotonic()
        self._origin: tuple[float, float] | None = None  # when the first update came, and what was done by then
        self._lines = 0
        self._last: tuple[float, float | None] | None = None

    def update(self, done: float, llc: float | None = None) -> None:
        now = time.monotonic()
        self._origin = self._origin or (now, done)
        self._last = done, llc
        if self._total is None and self._unit != "step" and done >= self._lines + 1:  # a unit is a job of its own
            self._lines = int(done)
            self._print(f"{self._count(self._lines)}{_so_far(llc)}")
        if not self._total or done >= self._total:
            return
        percent = math.floor(100 * done / self._total)
        if percent // LOG_EVERY <= self._lines:
            return
        self._lines = percent // LOG_EVERY
        since, before = self._origin
        left = ""
        if done > before:  # what an earlier run has done is not this one's speed
            left = f", {_clock((now - since) * (self._total - done) / (done - before))} left"
        self._print(f"{percent} % ({self._count(done)}){_so_far(llc)}{left}")

    def extend(self, total: int) -> None:
        if self._last is not None and self._total:  # percents of another number now
            self._lines = math.floor(100 * self._last[0] / total) // LOG_EVERY
        super().extend(total)

    def close(self) -> None:
        if self._last is None:
            return
        (done, llc), self._last = self._last, None
        if self._total is None or done >= self._total:
            count = self._count(done) if self._total is None else f"100 % ({self._count(done)})"
            self._print(f"{count}{_so_far(llc)}, {_clock(time.monotonic() - self._began)} in all")

    def _print(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
