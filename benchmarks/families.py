"""The commonest models of the PyTorch world: do they work with defaults, and is a gradient slower than a plain loop's?

    python benchmarks/families.py [--families gpt2 lstm …] [--budget SECONDS] [--rounds N] [--no-defaults]
        [--json benchmarks/results/families_cpu.json] [--docs docs/families.md]

The models are those of `tests/shared/families.py`, each as small as it can be. A model whose packages are missing is
left out. Where only some are named, the others stay in the JSON file as they were, and so does *works* with
--no-defaults. `--docs` writes the table of a JSON file that is there into the page, between two markers, and measures
nothing.

*Ours* is the difference of a long and a short `estimate_llc` with the step size given (4 chains, as many burn-in steps
as draws), divided by the difference of their gradients: what an estimate costs once is left out, what draws and checks
cost is in. The *plain loop* has the same model, loss, batch size and step: zero_grad, forward, backward, and the step
of `llc_fast.SGLD`. Both take turns; of all rounds the median of the ratio counts. Everything is on one thread, and
seconds are those of the processor: on a shared machine the clock on the wall says something of the neighbours.

*Works* is one estimate with nothing given but the model, the data and the loss; where that would take more than
`--default-seconds`, it has fewer draws, and says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "shared"), str(ROOT / "benchmarks" / "speed")]

from families import FAMILIES, Case, Family, loss_of, rows  # noqa: E402
from harness import print_table, write_json  # noqa: E402

import llc_fast  # noqa: E402

CHAINS, LR, NBETA, LOCALIZATION = 4, 1e-6, 50.0, 100.0
MARKERS = "<!-- table: python benchmarks/families.py --docs docs/families.md -->", "<!-- end of the table -->"
COLUMNS = (
    "family",
    "works",
    "strategy",
    "ours, ms",
    "plain loop, ms",
    "ours / plain",
    "paired with",
    "why not recorded",
)


def batches(case: Case, batch_size: int) -> Iterator[Any]:
    """Minibatches as a plain loop takes them."""
    if not isinstance(case.data, (tuple, dict)):
        while True:
            yield from case.data
    length = len(next(iter(case.data.values() if isinstance(case.data, dict) else case.data)))
    while True:
        yield rows(case.data, torch.randint(length, (min(batch_size, length),)))


def plain_seconds(case: Case, batch_size: int, steps: int) -> float:
    """Of one gradient and step in a plain loop."""
    kept = copy.deepcopy(case.model.state_dict())
    optimizer = llc_fast.SGLD(
        [p for p in case.model.parameters() if p.requires_grad], lr=LR, nbeta=NBETA, localization=LOCALIZATION
    )
    source = itertools.islice(batches(case, batch_size), steps)
    losses: list[Tensor] = []
    started = time.process_time()
    for batch in source:
        optimizer.zero_grad()
        loss = loss_of(case, batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    seconds = (time.process_time() - started) / steps
    optimizer.zero_grad()
    case.model.load_state_dict(kept)
    return seconds


def our_seconds(case: Case, batch_size: int | None, steps: int) -> tuple[float, llc_fast.LLCResult]:
    """Of a whole estimate of so many steps a chain."""
    half = max(1, steps // 2)
    options: dict[str, Any] = {"num_burnin": steps - half, "num_draws": half, "num_chains": CHAINS, **case.options}
    options |= {"lr": LR, "nbeta": NBETA, "localization": LOCALIZATION, "batch_size": batch_size}
    started = time.process_time()
    result = llc_fast.estimate_llc(case.model, case.data, case.loss_fn, progress=False, **options)
    return time.process_time() - started, result


def measure(family: Family, options: argparse.Namespace) -> dict[str, Any]:
    case = family.make(0)
    size = options.batch_size
    given = size if isinstance(case.data, (tuple, dict)) else None
    row: dict[str, Any] = {"family": family.name}
    try:
        our_seconds(case, given, 4)
    except Exception as error:  # whatever it is, it is what the user sees
        return row | {"works": f"refused ({type(error).__name__})", "error": str(error)}
    plain_seconds(case, size, 3)
    long = max(16, int(options.budget / (CHAINS * plain_seconds(case, size, 10))))
    short = max(4, long // 8)
    ours, plain = [], []
    for _ in range(options.rounds):
        plain.append(plain_seconds(case, size, long))
        whole, result = our_seconds(case, given, long)
        part, _ = our_seconds(case, given, short)
        ours.append((whole - part) / (CHAINS * (long - short)))
    found = result.diagnostics
    reason = found["strategy_reason"]
    row |= {
        "works": "yes",
        "strategy": result.settings["strategy"],
        "ours, ms": 1e3 * statistics.median(ours),
        "plain loop, ms": 1e3 * statistics.median(plain),
        "ours / plain": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
        "paired with": found["paired_with"],
        "why not recorded": reason.partition("not recorded: ")[2],
        "strategy_reason": reason,
        "parameters": result.settings["num_parameters"],
        "batch_size": size,
    }
    if options.defaults:
        row |= by_default(case, row["ours, ms"] / 1e3, options.default_seconds)
    return row


def by_default(case: Case, seconds: float, limit: float) -> dict[str, Any]:
    """An estimate with nothing given, or a shorter one."""
    steps = 2 * 2000
    more: dict[str, Any] = {}
    if (share := limit / (seconds * CHAINS * steps)) < 1:
        more = dict.fromkeys(("num_draws", "num_burnin"), max(25, int(steps * share / 2)))
    result = llc_fast.estimate_llc(case.model, case.data, case.loss_fn, progress=False, **case.options, **more)
    codes = [w.code for w in result.warnings]
    assert math.isfinite(result.llc_mean)
    remarks = "; ".join(filter(None, [f"{more['num_draws']} draws" if more else "", ", ".join(codes)]))
    return {
        "works": f"yes ({remarks})" if remarks else "yes",
        "draws": result.settings["num_draws"],
        "llc": result.llc_mean,
        "llc_stderr": result.llc_stderr,
        "warnings": codes,
    }


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table of a JSON file for the page."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}"
        return str(value or "").replace("|", "\\|")

    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |" for row in table]
    return "\n".join(lines)


def write_docs(page: Path, found: dict[str, Any]) -> None:
    """Put the table of a JSON file between the markers of a page, with its date and versions.

    Raises:
        ValueError: the page has none.
    """
    text, (begin, end) = page.read_text(), MARKERS
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no place for the table: write {begin!r} and {end!r} on lines of their own")
    before, _, rest = text.partition(begin)
    info = found["info"]
    where = f"on {', '.join(info['gpus'])}" if info["gpus"] else "not run on a GPU"
    versions = ", ".join(f"{name} {info[name.lower()]}" for name in ("llc_fast", "torch", "Python"))
    stamp = f"*{info['date']}: {versions}, {info['threads']} thread; {where}.*"
    page.write_text(f"{before}{begin}\n\n{as_markdown(found['rows'])}\n\n{stamp}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--no-defaults", dest="defaults", action="store_false")
    parser.add_argument("--default-seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "families_cpu.json")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    if options.docs is not None:
        write_docs(options.docs, json.loads(options.json.read_text()))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = []
    for name in options.families:
        family = FAMILIES[name]
        if missing := [package for package in family.requires if importlib.util.find_spec(package) is None]:
            print(f"{name} is left out: {', '.join(missing)} is not installed", flush=True)
            continue
        table.append(measure(family, options))
        shown = {column: table[-1].get(column) for column in COLUMNS}
        print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in shown.values()), flush=True)
    print_table("Families", [{column: row.get(column) for column in COLUMNS} for row in table])
    measured = [row for row in table if "ours / plain" in row]
    if measured:
        worst = max(measured, key=lambda row: float(row["ours / plain"]))
        print(f"\nThe slowest against the plain loop: {worst['family']}, {worst['ours / plain']:.2f}")
    work = {"chains": CHAINS, "lr": LR, "nbeta": NBETA, "localization": LOCALIZATION, "batch_size": options.batch_size}
    measured_now = {row["family"]: row for row in table}
    older = {}
    if options.json.exists():  # what is not measured now stays as it was
        older = {row["family"]: row for row in json.loads(options.json.read_text())["rows"]}
    if not options.defaults:
        kept = ("works", "draws", "llc", "llc_stderr", "warnings")
        for name, row in measured_now.items():
            if row["works"] == "yes":
                row |= {column: older[name][column] for column in kept if column in older.get(name, {})}
    if len(options.families) < len(FAMILIES):
        measured_now = {name: (older | measured_now)[name] for name in FAMILIES if name in older | measured_now}
    write_json(options.json, {"work": work, "rows": list(measured_now.values())})


if __name__ == "__main__":
    main()
