"""What the benchmarks share: contenders timed in turn, medians, ratios round by round, a table, a JSON file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llc_fast.cli import collect_info

Times = dict[str, list[float]]


def time_in_turn(steps: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Times:
    """Seconds of each contender in each round; the first round warms up and is not counted.

    Contenders run one after another within a round, so that a drift of the machine's speed hits all of them.
    """
    seconds: Times = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"info": collect_info(), **tables}, indent=1) + "\n")
