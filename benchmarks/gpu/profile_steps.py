"""Where the time of a step goes on a GPU: kernels by their share, and how long the GPU waited, for three extremes.

    python benchmarks/gpu/profile_steps.py [--device cuda] [--cases chains large language] [--network FILE]
                                           [--language SIZE] [--json PATH]

"chains" is the estimate of bench_estimate.py with 1,024 parameters and 4 chains, "large" that of bench_large.py with
10⁸ parameters in TF32 (of FILE, see there; without it it is left out), "language" that of bench_language.py (without
transformers it is left out). torch.profiler watches 100 steps in the middle, of a language model a tenth of them.
"busy" is the share of their wall time in which the GPU ran something. Kernels inside a CUDA graph count one by one.
"waits" are calls that may keep the host until the GPU has done what it was given before: copies, and synchronizing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
import bench_estimate
import bench_language
from bench_step import ON_A_GPU
from contenders import make_problem
from harness import print_table, write_json

import llc_fast
from llc_fast.problems.deep_linear import BATCH_SIZE, LOCALIZATION, SIZE_CLASSES, LinearTeacher, end_to_end, network

STEPS, WATCHED, SHOWN = 400, 100, 16


class Watch:
    """A progress function that profiles `WATCHED` steps of each chain, from half way on."""

    def __init__(self, chains: int, device: str, watched: int = WATCHED) -> None:
        self._chains, self._device, self._watched, self._profile = chains, device, watched, None
        self.seconds, self.steps, self.trace = 0.0, 0, {}

    def __call__(self, done: int, total: int, llc: float) -> None:
        if self._profile is None and done >= total // 2:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.__enter__()
            self._began, self._from = time.perf_counter(), done
        elif self._profile is not None and not self.trace and done >= self._from + self._watched * self._chains:
            if self._device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self._began
            self._profile.__exit__(None, None, None)
            self.steps = (done - self._from) // self._chains
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "trace.json")
                self._profile.export_chrome_trace(str(path))
                self.trace = json.loads(path.read_text())


def case_chains(options: argparse.Namespace) -> tuple[Watch, Callable[[Watch], Any]]:
    device = options.device
    model, data = make_problem(16, bench_estimate.LAYERS, bench_estimate.SAMPLES)
    given = {"lr": bench_estimate.LR, "nbeta": bench_estimate.NBETA, "localization": bench_estimate.LOCALIZATION}
    given |= {"batch_size": bench_estimate.BATCH, "num_chains": 4, "device": device, "seed": 0}

    def run(watch: Watch) -> Any:
        length = {"num_burnin": 10 * STEPS, "num_draws": 10 * STEPS}
        return llc_fast.estimate_llc(model, data, mse_loss, **given, **length, progress=watch)

    return Watch(4, device), run


def case_large(options: argparse.Namespace) -> tuple[Watch, Callable[[Watch], Any]] | None:
    if not (options.network and options.network.exists()):
        print("large is left out: no --network")
        return None
    torch.set_float32_matmul_precision("high")
    device, weights = options.device, torch.load(options.network)["weights"]
    setting = SIZE_CLASSES["100M"]
    product = end_to_end([w.to(device) for w in weights])
    data = LinearTeacher(product, 20 * BATCH_SIZE, torch.Generator().manual_seed(0))
    nbeta = setting.num_samples / math.log(setting.num_samples)
    given = {"lr": setting.lr, "nbeta": nbeta, "localization": LOCALIZATION, "batch_size": BATCH_SIZE, "seed": 0}

    def run(watch: Watch) -> Any:
        length = {"num_chains": 1, "num_burnin": STEPS // 2, "num_draws": STEPS // 2, "device": device}
        return llc_fast.estimate_llc(network(weights), data, mse_loss, **given, **length, progress=watch)

    return Watch(1, device), run


def case_language(options: argparse.Namespace) -> tuple[Watch, Callable[[Watch], Any]] | None:
    try:
        model = bench_language.make_model(options.language, 512, torch.bfloat16, options.device)
    except ImportError as error:
        print(f"language is left out: {error}")
        return None
    tokens = torch.randint(bench_language.SIZES[options.language].vocabulary, (32, 512))
    given = {"lr": 1e-7, "nbeta": 30.0, "localization": 300.0, "batch_size": 4, "num_chains": 1, "seed": 0}

    def run(watch: Watch) -> Any:
        length = {"num_burnin": STEPS // 20, "num_draws": STEPS // 20, "device": options.device}
        return llc_fast.estimate_llc(model, tokens, "next-token", **given, **length, progress=watch)

    return Watch(1, options.device, WATCHED // 10), run


CASES: dict[str, Callable[[argparse.Namespace], tuple[Watch, Callable[[Watch], Any]] | None]] = {
    "chains": case_chains,
    "large": case_large,
    "language": case_language,
}


def rows_of(watch: Watch) -> list[dict[str, Any]]:
    """The kernels that take longest, and what is left over."""
    events = [e for e in watch.trace.get("traceEvents", ()) if e.get("cat") in ON_A_GPU]
    times, counts = Counter[str](), Counter[str]()
    for event in events:
        times[event["name"]] += event["dur"]
        counts[event["name"]] += 1
    wall = 1e6 * watch.seconds / max(watch.steps, 1)
    rows = [{"kernel": "a step, wall time", "µs a step": wall, "a step": None, "share": None}]
    busy = sum(times.values()) / max(watch.steps, 1)
    rows.append(
        {"kernel": "busy", "µs a step": busy, "a step": len(events) / max(watch.steps, 1), "share": busy / wall}
    )
    calls = [e for e in watch.trace.get("traceEvents", ()) if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    waits = [e for e in calls if "emcpy" in e["name"] or "ynchronize" in e["name"]]
    waited = sum(e["dur"] for e in waits) / max(watch.steps, 1)
    rows.append(
        {"kernel": "waits", "µs a step": waited, "a step": len(waits) / max(watch.steps, 1), "share": waited / wall}
    )
    for name, taken in times.most_common(SHOWN):
        per_step = taken / watch.steps
        rows.append(
            {
                "kernel": name[:110],
                "µs a step": per_step,
                "a step": counts[name] / watch.steps,
                "share": per_step / wall,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--network", type=Path)
    parser.add_argument("--language", default="1.4b", choices=bench_language.SIZES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tables: dict[str, Any] = {"device": options.device}
    for name in options.cases:
        case = CASES[name](options)
        if case is None:
            continue
        watch, run = case
        result = run(watch)
        tables[name] = rows_of(watch)
        print_table(f"{name}: {watch.steps} steps, strategy {result.settings['strategy']}", tables[name])
        write_json(options.json, tables)


if __name__ == "__main__":
    main()
