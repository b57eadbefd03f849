"""What a GPU was measured to do against what it was to do: report.md, from the files that gpu.sh leaves.

    python benchmarks/gpu/gpu_report.py FOLDER [FOLDER …]

Several folders are those of several calls: where two measured the same, the later one counts. The report, printed and
written to the first folder, is a table of the targets (held, missed, or not measured), then the measurements. Needs
nothing but Python.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
LAYOUTS = ("1 chain", "4 chains", "bfloat16 model")
SAMPLERS = ("sgld", "preconditioned-sgld", "rmsprop-sgld", "adam-sgld", "sghmc", "sgnht")
NCU = {
    "Duration": "duration",
    "Memory Throughput": "memory",
    "DRAM Throughput": "DRAM",
    "Compute (SM) Throughput": "arithmetic",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy",
}
"""Nsight Compute's metrics that get a column."""
FULL: dict[str, dict[str, float]] = {
    "step": {"parameters": 10**8},
    "samplers": {"parameters": 10**8},
    "kernels": {"parameters": 10**8},
    "chains": {"steps": 10_000},
    "memory": {"parameters": 10**8},
    "large-tf32": {"parameters": 0.99e8, "steps": 50_000},
    "large-whole": {"parameters": 0.99e8, "steps": 50_000},
    "large-float32": {"parameters": 0.99e8, "steps": 50_000},
    "step-devinterp2": {"parameters": 10**8},
    "language-large": {"parameters": 6.8e9},
}
"""What the targets are for, at least."""
LARGE = {"llc_fast:tf32": "TF32", "llc_fast:float32": "float32"}
LARGE_STAGES = ("large-whole", "large-tf32", "large-float32")
"""Where a contender is in several, the first counts: `large-whole` makes all steps."""


class Target(NamedTuple):
    """A line of the first table; `holds` is None where nothing was measured."""

    what: str
    measured: str
    target: str
    holds: bool | None


class Results:
    """What gpu.sh left in some folders: tables by stage, exit statuses, the log."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.tables: dict[str, Row] = {}
        self.status: dict[str, int] = {}
        self.log, self.ncu = "", []
        for folder in folders:
            for path in sorted(folder.glob("*.json")):
                self.tables[path.stem] = json.loads(path.read_text())
            for line in _text(folder / "stages.tsv").splitlines():
                name, status, _ = line.split("\t")
                self.status[name] = int(status)
            self.log += _text(folder / "gpu.log")
            if text := _text(folder / "ncu.csv"):
                self.ncu = ncu_rows(text)
        self.networks = [row for folder in folders for row in _networks(folder / "dln-scaling" / "data.json")]

    def rows(self, stage: str, key: str = "rows") -> list[Row]:
        return self.tables.get(stage, {}).get(key) or []

    def is_full(self, stage: str) -> bool:
        """Whether it ran on a GPU, at the size that the targets are for."""
        table = self.tables.get(stage, {})
        given = {**table, **table.get("work", {}), **table.get("network", {})}
        return given.get("device") == "cuda" and all(given.get(k, v) >= v for k, v in FULL[stage].items())

    def last_in_log(self, pattern: str, stage: str) -> str:
        """The last match of a pattern in what a stage printed last; empty if there is none."""
        printed = self.log.rpartition(f"==> {stage}\n")[2].partition("\n==> ")[0]
        return str((re.findall(pattern, printed) or [""])[-1])


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _networks(path: Path) -> list[Row]:
    return list(json.loads(_text(path) or "{}").get("tables", {}).get("networks", {}).values())


def ncu_rows(text: str) -> list[Row]:
    """A row for each kernel launch of `ncu --csv --page details`."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, Row] = {}
    for line in csv.DictReader(lines):
        row = found.setdefault(line.get("ID", ""), {"kernel": _short(line.get("Kernel Name", ""))})
        if (name := line.get("Metric Name")) in NCU:
            row[NCU[name]] = f"{line.get('Metric Value', '')} {line.get('Metric Unit', '')}".strip()
    return list(found.values())


def _short(kernel: str) -> str:
    """A kernel's name without namespaces, casts and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\bllc::|\bvoid ", "", kernel)
    name = re.sub(r"\((?:bool|int|unsigned int)\)", "", name)
    return name.partition("(")[0]


# ---- targets -----------------------------------------------------------------------------------------------


def targets(results: Results) -> list[Target]:
    found = [_stage(results, "build", "builds from source", r"()$")]
    found.append(_stage(results, "smoke", "every kernel against the CPU", r"\d+ passed[^\n]*", must="passed"))
    found.append(_stage(results, "tests", "tests marked `gpu`", r"\d+ passed[^\n]*", must="passed"))
    found.append(_stage(results, "memcheck", "memcheck on the kernels", r"ERROR SUMMARY: [^\n]*", must=" 0 errors"))
    found.append(
        _stage(results, "racecheck", "racecheck on the kernels", r"RACECHECK SUMMARY: [^\n]*", must=" 0 hazards")
    )
    counts = results.tables.get("step", {}).get("launches") or {}
    ours = counts.get("llc_fast SGLD")
    measured = ", ".join(f"{count} × {_short(name)}" for name, count in (ours or {}).items())
    found.append(
        Target(
            "what one SGLD step of 100 tensors launches",
            measured,
            "1 kernel",
            sum(ours.values()) == 1 if ours else None,
        )
    )
    rival = results.rows("step-devinterp2") if results.is_full("step-devinterp2") else []
    for row in rival:
        if "devinterp" in row["step"]:
            times = row.get("times llc_fast")
            found.append(_number(f"{row['step']}, 10⁸ parameters: its time over ours", times, 10.0, "≥", "{:.1f}"))
    for layout in LAYOUTS:
        rows = _samplers(results, layout) if results.is_full("samplers") else {}
        rows |= _kernels(results, layout)  # nothing of Python is in these
        for name in SAMPLERS:
            row = rows.get(name, {})
            share, asked = row.get("share of copy's GB/s"), 0.9 if name == "sgld" else 0.85
            found.append(
                _number(f"{name}, {layout}: bytes of the floor per second, of a copy's", share, asked, "≥", "{:.0%}")
            )
    small = results.rows("chains", "1024") if results.is_full("chains") else []
    step = next((row.get("µs per step") for row in small if row.get("µs asked")), None)
    found.append(_number("1,024 parameters, 4 chains: µs a step", step, 100.0, "≤", "{:.0f}"))
    for contender, precision in LARGE.items():
        row = _large(results, contender)
        what = f"10⁸ parameters, 50,000 steps, {precision}"
        seconds = row.get("seconds") if isinstance(row.get("seconds"), float) else None
        note = f" ({row['contender'].partition(', ')[2]})" if "extrapolated" in row.get("contender", "") else ""
        found.append(_number(f"{what}: seconds", seconds, 300.0, "≤", "{:.0f}", note))
        asked = float((row.get("asked, bytes") or "≤ 8.85").split()[1])
        found.append(_number(f"{what}: bytes a parameter", row.get("bytes per parameter"), asked, "≤", "{:.2f}"))
    for row in results.rows("memory") if results.is_full("memory") else ():
        if row.get("asked"):
            what = f"{row['contender']}: bytes a parameter"
            found.append(_number(what, row.get("besides"), float(row["asked"].split()[1]), "≤", "{:.2f}"))
    for row in results.rows("language-large") if results.is_full("language-large") else ():
        if row["contender"].startswith("llc_fast"):
            what, fits = "a bfloat16 model of 6.9·10⁹ parameters", isinstance(row.get("s per step"), float)
            found.append(_number(f"{what}: GiB", row.get("peak, GiB") if fits else None, 78.0, "≤", "{:.1f}"))
    return found


def _stage(results: Results, name: str, what: str, pattern: str, must: str = "") -> Target:
    """A stage that has to end well, and to have said so."""
    if name not in results.status:
        return Target(what, "", "passes", None)
    said, status = results.last_in_log(pattern, name), results.status[name]
    return Target(what, said or f"exit status {status}", "passes", status == 0 and must in said)


def _number(what: str, value: float | None, target: float, sign: str, form: str, note: str = "") -> Target:
    asked = f"{sign} {form.format(target)}"
    if value is None:
        return Target(what, "", asked, None)
    return Target(what, form.format(value) + note, asked, value >= target if sign == "≥" else value <= target)


def _samplers(results: Results, layout: str) -> dict[str, Row]:
    tables = results.tables.get("samplers", {}).get("samplers") or {}
    return {row["sampler"]: row for row in tables.get(layout, [])}


def _kernels(results: Results, layout: str) -> dict[str, Row]:
    rows = results.rows("kernels") if results.is_full("kernels") else []
    chains = {"1 chain": 1, "4 chains": 4}.get(layout)
    return {row["sampler"]: row for row in rows if row["chains"] == chains}


def _large(results: Results, contender: str) -> Row:
    """The row of one contender of bench_large, from whichever stage ran it."""
    stages = [stage for stage in LARGE_STAGES if results.is_full(stage)]
    rows = [row for stage in stages for row in results.rows(stage)]
    return next((row for row in rows if row["contender"].partition(",")[0] == contender), {})


# ---- the report --------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    info: Row = next((table["info"] for table in results.tables.values() if table.get("info")), {})
    device = next(iter(info.get("gpus") or []), "no GPU")
    lines = [f"# {device}, {info.get('date', 'date unknown')}", ""]
    lines += [
        f"llc_fast {info.get('llc_fast')} built with CUDA {info.get('cuda')}, torch {info.get('torch')}, Python "
        f"{info.get('python')}. Medians over rounds, ratios within a round; the benchmarks say what is counted.",
        "",
    ]
    lines += _table(
        [
            {"what": t.what, "measured": t.measured, "target": t.target, "holds": _verdict(t.holds)}
            for t in targets(results)
        ]
    )
    tables = results.tables
    for stage in ("step", "step-devinterp2", "step-compiled"):
        lines += _section("One SGLD step", results.rows(stage))
    for layout in LAYOUTS:
        lines += _section(f"Every sampler, {layout}", list(_samplers(results, layout).values()))
    lines += _section("The step kernels alone", results.rows("kernels"))
    lines += _section("Memory that steps allocate", results.rows("samplers", "memory"))
    lines += _section("Growth of SGLD", results.rows("samplers", "growth"))
    lines += _section("Overhead", results.rows("samplers", "overhead"))
    lines += _section("Step kernels under Nsight Compute", results.ncu)
    lines += _section("1,024 parameters, by number of chains", results.rows("chains", "1024"))
    network = next((tables[stage]["network"] for stage in LARGE_STAGES if stage in tables), {})
    title = "10⁸ parameters at the paper's setting"
    if network:
        title += f": {network['parameters']:,} in {len(network['widths']) - 1} layers, λ = {network['lambda']:,.0f}"
    lines += _section(title, [row for stage in LARGE_STAGES for row in results.rows(stage)])
    lines += _section("A language model in bfloat16, 1.4·10⁹ parameters", results.rows("language"))
    lines += _section("The same of 6.9·10⁹ parameters", results.rows("language-large"))
    for case in ("chains", "large"):
        lines += _section(f"Where a step's time goes, {case}", results.rows("profile", case))
    lines += _section("Peak memory, bytes a parameter", results.rows("memory"))
    lines += _section("Deep linear networks at the paper's scale, as far as there was time", _classes(results.networks))
    for growing in ("chains", "parameters"):
        lines += _section(f"A step as the {growing} grow", results.rows("scaling", growing))
    return "\n".join(lines) + "\n"


def _verdict(holds: bool | None) -> str:
    return "not measured" if holds is None else "yes" if holds else "**no**"


def _classes(networks: Iterable[Row]) -> list[Row]:
    classes: dict[str, list[Row]] = {}
    for row in networks:
        classes.setdefault(row["size"], []).append(row)
    found = []
    for size, rows in classes.items():
        errors = [abs(row["error"]) for row in rows if row["error"] is not None]
        found.append(
            {
                "class": size,
                "networks": len(rows),
                "median of |λ̂ − λ|/λ": f"{statistics.median(errors):.1%}" if errors else None,
                "largest": f"{max(errors):.1%}" if errors else None,
                "with a warning": sum(bool(row["warnings"]) for row in rows),
                "seconds": sum(row["seconds"] for row in rows),
            }
        )
    return found


_LEFT_OUT = ("every run", "threads", "warnings", "done", "steps", "error", "asked", "strategy")


def _section(title: str, rows: list[Row]) -> list[str]:
    return ["", f"## {title}", "", *_table(rows)] if rows else []


def _table(rows: list[Row]) -> list[str]:
    """Rows in Markdown: a column for each key that any row has a value for."""
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    shown = [key for key in columns if key not in _LEFT_OUT]
    lines = ["| " + " | ".join(map(_cell, shown)) + " |", "| " + " | ".join("---" for _ in shown) + " |"]
    return lines + ["| " + " | ".join(_cell(row.get(key)) for key in shown) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or not all(folder.is_dir() for folder in folders):
        sys.exit("usage: python gpu_report.py FOLDER [FOLDER …]")
    text = report(Results(folders))
    (folders[0] / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
