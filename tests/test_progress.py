"""Progress on a terminal, in a log file, in a notebook, for a function, and for nobody."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from llc_fast import progress as progress_module
from llc_fast.progress import make_progress, print_line


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def _stderr(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Not a fixture: pytest puts its own stderr in place between a fixture and its test."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Clock]:
    found = _Clock()
    monkeypatch.setattr(progress_module, "time", found)
    yield found


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn over itself, and ends with what was said last."""
    terminal = _stderr(_Terminal(), monkeypatch)
    with make_progress(True, 200, "LLC") as progress:
        assert progress.is_shown
        for done in (40, 80, 200):
            progress.update(done, math.nan if done == 40 else done / 7)
    text = terminal.getvalue()
    assert "LLC:  20%|" in text and text.count("\n") == 1
    last = text.rstrip("\n").split("\r")[-1]
    assert last.startswith("LLC: 100%|") and "200 of 200 steps, λ̂ ≈ 28.57]" in last


def test_a_bar_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unknown length, and gone when its job is done."""
    terminal = _stderr(_Terminal(), monkeypatch)
    with make_progress(True, None, "pilot chains", stays=False) as progress:
        progress.update(30)
    text = terminal.getvalue()
    assert "pilot chains [" in text and "30 steps]" in text and "\n" not in text
    assert not text.split("\r")[-1].strip()


def test_what_is_done_again(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """A bar goes back; a log says nothing twice, and ends with what was said last."""
    terminal = _stderr(_Terminal(), monkeypatch)
    with make_progress(True, 100, "LLC") as progress:
        progress.update(90)
        progress.update(50)
    assert terminal.getvalue().split("\r")[-1].startswith("LLC:  50%|")
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, 100, "LLC") as progress:
        progress.update(90)
        progress.update(100, 1.0)
        progress.update(50)
        progress.update(100, 2.0)
    assert log.getvalue().splitlines() == [
        "LLC: 90 % (90 of 100 steps)",
        "LLC: 100 % (100 of 100 steps), λ̂ ≈ 2, 0:00 in all",
    ]


def test_a_job_that_was_stopped(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """Its log does not say that it was done."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, 100, "LLC") as progress:
        progress.update(25)
    assert log.getvalue() == "LLC: 25 % (25 of 100 steps)\n"


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """One for each tenth, with steps, λ̂ and the time left, however often somebody reports."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, 1000, "LLC") as progress:
        assert progress.is_shown
        for done in range(0, 1001, 10):
            progress.update(done, None if done < 500 else 12.3456)
            clock.now += 0.5
    lines = log.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "LLC: 10 % (100 of 1000 steps), 0:45 left"
    assert lines[4] == "LLC: 50 % (500 of 1000 steps), λ̂ ≈ 12.35, 0:25 left"
    assert lines[9] == "LLC: 100 % (1000 of 1000 steps), λ̂ ≈ 12.35, 0:50 in all"


def test_a_short_job_is_one_line(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """Steps that were leapt over are not made up for."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, 60, "LLC") as progress:
        clock.now += 3723.4
        progress.update(60, 2.0)
    assert log.getvalue() == "LLC: 100 % (60 of 60 steps), λ̂ ≈ 2, 1:02:03 in all\n"


def test_time_left_of_a_resumed_job(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """The speed is that of this run: 10 steps in 5 seconds, with 20 steps to go."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, 100, "LLC") as progress:
        progress.update(70)
        clock.now += 5
        progress.update(80)
    assert log.getvalue().splitlines() == [
        "LLC: 70 % (70 of 100 steps)",
        "LLC: 80 % (80 of 100 steps), 0:10 left",
    ]


def test_a_log_of_jobs_of_unknown_number(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """A line for each that is done, and none for its parts."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, None, "LLC at a", unit="checkpoint") as progress:
        for done in (0.0, 0.5, 1.0, 1.3, 2.0):
            progress.update(done, 10 + done)
        progress.title = "LLC at c"
        progress.update(3, 20.0)
    assert log.getvalue().splitlines() == [
        "LLC at a: 1 checkpoint, λ̂ ≈ 11",
        "LLC at a: 2 checkpoints, λ̂ ≈ 12",
        "LLC at c: 3 checkpoints, λ̂ ≈ 20",
        "LLC at c: 3 checkpoints, λ̂ ≈ 20, 0:00 in all",
    ]


def test_a_log_of_a_job_of_unknown_length(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """One line, when it is done, or none if nothing was."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, None, "pilot chains", stays=False) as progress:
        progress.update(10)
        clock.now += 7
        progress.update(30)
        assert log.getvalue() == ""
        progress.close()
    assert log.getvalue() == "pilot chains: 30 steps, 0:07 in all\n"
    with make_progress(True, None, "pilot chains"):
        pass
    assert log.getvalue().count("\n") == 1


def test_titles_and_units(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """A title may change on the way, and parts of a unit count."""
    log = _stderr(io.StringIO(), monkeypatch)
    with make_progress(True, 4, "LLC", unit="checkpoint") as progress:
        progress.title = "LLC at a"
        progress.update(0.5)
        progress.title = "LLC at b"
        progress.update(2)
    assert [line.partition(",")[0] for line in log.getvalue().splitlines()] == [
        "LLC at a: 12 % (0.5 of 4 checkpoints)",
        "LLC at b: 50 % (2 of 4 checkpoints)",
    ]


def test_a_function() -> None:
    """It is called at every update, with integers and a λ̂ that is NaN as long as there is none."""
    seen: list[tuple[int, int, float]] = []
    with make_progress(lambda *numbers: seen.append(numbers), 50, "LLC") as progress:
        assert progress.is_shown
        progress.update(1)
        progress.update(50, 3.5)
    assert seen[0][:2] == (1, 50) and math.isnan(seen[0][2]) and seen[1] == (50, 50, 3.5)


def test_a_functions_error_is_raised() -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), make_progress(fails, 50, "LLC") as progress:
        progress.update(1)


@pytest.mark.parametrize("stream", [_Terminal, io.StringIO])
def test_no_progress(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is printed, and nobody needs to compute λ̂."""
    monkeypatch.setattr(sys, "stderr", stream())
    with make_progress(False, 50, "LLC") as progress:
        progress.update(50, 3.5)
        assert not progress.is_shown
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs without a console have none."""
    monkeypatch.setattr(sys, "stderr", None)
    assert not make_progress(True, 50, "LLC").is_shown


@pytest.mark.parametrize(("config", "is_bar"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_notebooks_show_bars(config: dict[str, Any], is_bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's stderr is no terminal, and yet somebody looks; an IPython whose output goes to a file is a log."""
    log = _stderr(io.StringIO(), monkeypatch)
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with make_progress(True, 10, "LLC") as progress:
        progress.update(10)
    assert ("%|" in log.getvalue()) is is_bar


def test_lines_above_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line goes to stdout, whole, and the bar is drawn again below it."""
    terminal = _stderr(_Terminal(), monkeypatch)
    with make_progress(True, 10, "LLC") as progress:
        progress.update(5)
        print_line("row 1 of 2")
    assert capsys.readouterr().out == "row 1 of 2\n"
    assert "LLC:  50%|" in terminal.getvalue().split("\r")[-1]
