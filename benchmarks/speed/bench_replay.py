"""Recorded kernels run again by Python, one after another, and by the native module in one call.

    python benchmarks/speed/bench_replay.py [--sizes 1024 10000] [--chains 1 2 4] [--threads 1 2] [--rounds 9]
        [--steps 400] [--strategy sequential] [--families gpt2 gru …] [--json PATH]

The work is that of bench_estimate.py: four-layer square linear networks, batches of 500, SGLD. Both ways take turns in
one process, round by round. A "step" is the difference of a long and a short estimate, for all chains together; a
"replay" the gradient alone, over and over. Times are processor time, all threads together, so that a busy machine
counts for little; medians over the rounds. "given up" is how often a step's threads gave up a core to wait, for the
interpreter's lock or at the end of a run.

`--threads 2` lets chains that are not batched run side by side; batched ones are one group in any case. `--families`
measures replays of the models of tests/shared/families.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contenders import Work, make_problem, with_llc_fast
from harness import median, parse, print_table, ratio, write_json

LAYERS, SAMPLES, BATCH = 4, 10_000, 500
LR, NBETA = 2e-6, SAMPLES / math.log(SAMPLES)
WAYS = ("Python", "native")
REPLAYS = 100


@contextlib.contextmanager
def replayed_by(way: str) -> Iterator[list[Any]]:
    """Estimates inside have their kernels replayed in this way; their recordings are in the list."""
    from llc_fast.gradients import program
    from llc_fast.gradients.replay import Recording

    recordings: list[Any] = []
    made = Recording.__init__

    def keep(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        recordings.append(self)

    reason = "this is the comparison" if way == "Python" else program.why_not_native()
    with (
        mock.patch.object(program, "why_not_native", lambda: reason),
        mock.patch.object(Recording, "__init__", keep),
    ):
        yield recordings


def spent(run: Callable[[], Any]) -> tuple[float, float, int]:
    """Processor time, time by the clock, and how often a thread gave up its core."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    clock = time.perf_counter()
    run()
    clock, now = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return cpu, clock, now.ru_nvcsw - used.ru_nvcsw


def replay_seconds(recording: Any) -> float:
    """Processor time of one replay, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recording.replay()
        return spent(lambda: [recording.replay() for _ in range(REPLAYS)])[0] / REPLAYS
    finally:
        torch.set_num_threads(threads)


def row_of(first: dict[str, Any], seconds: dict[str, dict[str, list[float]]], recording: Any) -> dict[str, Any]:
    """A table's row: medians in µs, and the median ratio of what the two ways took in a round."""
    row = {**first, "kernels": recording.num_kernels, "by Python": sum(recording.program.by_python.values())}
    for what, times in seconds.items():
        for way in WAYS:
            row[f"{what}, {way}, µs"] = 1e6 * median(times[way])
        row[f"{what}: native / Python"] = ratio(times["native"], times["Python"])
    return row


def measure_network(parameters: int, chains: int, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    model, data = make_problem(math.isqrt(parameters // LAYERS), LAYERS, SAMPLES)
    work = Work(LR, NBETA, 1.0, batch=BATCH, chains=chains, burnin=1, draws=1, seed=0, device="cpu")
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    replays: dict[str, list[float]] = {way: [] for way in WAYS}
    clocks: dict[str, list[float]] = {way: [] for way in WAYS}
    yields: dict[str, list[float]] = {way: [] for way in WAYS}
    asked = {"strategy": options.strategy} if options.strategy else {}
    estimate, kept, strategy = with_llc_fast(**asked), None, ""
    for round_ in range(options.rounds + 1):
        for way in WAYS:
            torch.set_num_threads(threads)
            with replayed_by(way) as recordings:
                short = spent(lambda: estimate(model, data, work))
                found: dict[str, Any] = {}
                long = spent(lambda f=found: f.update(estimate(model, data, replace(work, burnin=1 + options.steps))))
                replay = replay_seconds(recordings[-1])
            if round_:  # the first one warms up
                cpu, clock, given_up = ((b - a) / options.steps for a, b in zip(short, long, strict=True))
                steps[way].append(cpu)
                clocks[way].append(clock)
                yields[way].append(given_up)
                replays[way].append(replay)
            kept, strategy = recordings[-1], found["strategy"]
    first = {"parameters": parameters, "chains": chains, "threads": threads, "strategy": strategy}
    row = row_of(first, {"step": steps, "replay": replays}, kept)
    row |= {f"clock, {way}, µs": 1e6 * median(clocks[way]) for way in WAYS}
    return row | {f"given up, {way}": median(yields[way]) for way in WAYS}


def measure_family(name: str, rounds: int) -> dict[str, Any]:
    import llc_fast

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "shared"))
    from families import made

    case = made(name)
    short = {"num_chains": 1, "num_draws": 4, "num_burnin": 0, "lr": 1e-6, "progress": False}
    recordings: dict[str, Any] = {}
    for way in WAYS:
        with replayed_by(way) as found:
            llc_fast.estimate_llc(case.model, case.data, case.loss_fn, **(case.options | short))
            if not found:
                raise SystemExit(f"--families: {name} is not recorded")
            recordings[way] = found[-1]
            recordings[way].replay()
    replays: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            replays[way].append(replay_seconds(recordings[way]))
    return row_of({"family": name}, {"replay": replays}, recordings["native"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 10_000], help="parameters: 4 × a square")
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--strategy", help="default: llc_fast's choice")
    parser.add_argument("--families", nargs="+", default=[], help="names of tests/shared/families.py")
    options = parse(parser, lambda spec: spec)
    warnings.simplefilter("ignore")
    tables: dict[str, Any] = {"work": {"steps": options.steps, "rounds": options.rounds, "batch": BATCH}}
    networks = [
        measure_network(size, chains, threads, options)
        for size in options.sizes
        for chains in options.chains
        for threads in options.threads
        if threads == 1 or chains > 1
    ]
    families = [measure_family(name, options.rounds) for name in options.families]
    for title, rows in (("networks", networks), ("families", families)):
        if rows:
            tables[title] = rows
            print_table(title, rows)
    write_json(options.json, tables)


if __name__ == "__main__":
    main()
