"""What the benchmarks share: contenders timed in turn, medians, ratios round by round, a table, a JSON file.

Also measurements that need a process of their own. Importing this module does not import llc_fast: a process that
measures a rival holds nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Times = dict[str, list[float]]
STEPS_BETWEEN_EVENTS = 20
"""On a GPU: a step of 10⁸ parameters takes half a millisecond there; launching and awaiting it, a tenth of that."""


def time_in_turn(steps: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Times:
    """Seconds of one step of each contender in each round; the first round warms up and is not counted.

    Contenders run one after another within a round, so that a drift of the machine's speed hits all of them. On a GPU a
    round is several steps between two CUDA events: what a stream of steps takes there, or the host, if that is slower.
    """
    timed = _seconds_on_gpu if torch.device(device).type == "cuda" else _seconds
    seconds: Times = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        for name, step in steps.items():
            taken = timed(step)
            if round_:
                seconds[name].append(taken)
    return seconds


def _seconds(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _seconds_on_gpu(step: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()  # the host may look at other tensors than those of the contender before
    torch.cuda.synchronize()
    begin.record()
    for _ in range(STEPS_BETWEEN_EVENTS):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / STEPS_BETWEEN_EVENTS


def those_that_run(steps: Mapping[str, Callable[[], Any]], rivals: Container[str]) -> dict[str, Callable[[], Any]]:
    """The steps without those `rivals` that can't take one here; it is said why not."""
    found = dict(steps)
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            if name not in rivals:
                raise
            del found[name]
            print(f"{name} is left out: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    return found


def median(times: list[float]) -> float:
    return statistics.median(times)


def ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows as text; columns are the keys of the first row, numbers with three digits."""

    def text(value: Any) -> str:
        return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    print(f"\n{title}")
    columns = list(rows[0])
    width = {c: max(len(c), *(len(text(r.get(c))) for r in rows)) for c in columns}
    print("  ".join(c.ljust(width[c]) if k == 0 else c.rjust(width[c]) for k, c in enumerate(columns)))
    for row in rows:
        cells = (text(row.get(c)) for c in columns)
        print(
            "  ".join(
                t.ljust(width[c]) if k == 0 else t.rjust(width[c])
                for k, (c, t) in enumerate(zip(columns, cells, strict=True))
            )
        )


def write_json(path: Path | None, tables: dict[str, Any]) -> None:
    """The tables with a description of the machine they were measured on."""
    if path is not None:
        from llc_fast.support.environment import collect_info

        path.parent.mkdir(parents=True, exist_ok=True)
        info = collect_info() | {"date": time.strftime("%Y-%m-%d")}
        path.write_text(json.dumps({"info": info, **tables}, indent=1) + "\n")


def parse(
    parser: argparse.ArgumentParser, work_in_this_process: Callable[[dict[str, Any]], dict[str, Any]]
) -> argparse.Namespace:
    """The options of a script, --json among them; where :func:`in_fresh_process` runs it, its work and the end."""
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work_in_this_process(json.loads(options.worker))))
        sys.exit()
    return options


def in_fresh_process(
    script: str,
    spec: Mapping[str, Any],
    cache: str | None = None,
    *,
    seconds: float | None = None,
    paths: Sequence[str] = (),
) -> dict[str, Any]:
    """What ``python script --worker SPEC`` prints as JSON on its last line; ``{"error": …}`` if it fails.

    Args:
        script: path of a script that gets its options from :func:`parse`.
        spec: what it is to do, given to it as JSON.
        cache: folder of torch.compile's cache; None: an empty one, deleted afterwards.
        seconds: after which it is ended, and ``{"error": …, "short": "timed out"}`` is returned; None: never.
        paths: folders in front of its import path.
    """
    if cache is None:
        with tempfile.TemporaryDirectory() as empty:
            return in_fresh_process(script, spec, empty, seconds=seconds, paths=paths)
    variables = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    if paths:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, script, "--worker", json.dumps(spec)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {seconds:g} s", "short": "timed out"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def rounds_in_turn(
    script: str, spec: Mapping[str, Any], contenders: Sequence[str], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """What each contender finds in each round, in fresh processes, one contender after another within a round.

    The script ends, with what a contender said, if one fails.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            done = in_fresh_process(script, {**spec, "contender": name})
            if "error" in done:
                sys.exit(f"{name}: {done['error']}")
            found[name].append(done)
    return found


def peak_memory(device: str = "cpu", *, reset: bool = False) -> int:
    """This process's largest resident set so far, in bytes (Linux); with `reset`, forget it first.

    It is what ``getrusage`` calls ru_maxrss, but for one thing: ru_maxrss is inherited from the process that started
    this one, and would hide anything smaller than that. On a GPU it is what torch had allocated there at most.
    """
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
