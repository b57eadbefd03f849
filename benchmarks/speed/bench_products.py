"""Products of matrices as a gradient of a small network has them, by every library at hand, against the peak.

    python benchmarks/speed/bench_products.py [--widths 16 50 160] [--batch 500] [--chains 4] [--rounds 15]
        [--json PATH]

A layer has three of them: forward x·Wᵀ ("NT"), the input's gradient g·W ("NN"), the weight's gradient gᵀ·x ("TN"), of
[batch, width] and [width, width]. In float32, on one thread, in processor time, so that a busy machine counts for
little; contenders take turns, and numbers are medians over rounds, in GFLOP/s. "replay" is a kernel of a recording, as
estimates run it: "torch" calls torch's own from the native module (on x86 MKL), "llc_fast" is the native module's
function; with "× 4" one kernel multiplies for four chains. oneDNN and OpenBLAS are called from Python, 1 to 2 µs a
call. The peak is a loop of fused multiply-adds, compiled here and run in the same rounds.

Everything is measured twice: with what the processor can, and with AVX2 alone, which is all that MKL uses on processors
of AMD, whatever they can.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import in_fresh_process, median, parse, print_table, write_json
from torch import Tensor

SECONDS = 4e-3  # of a contender in a round
AVX2 = {
    "LLC_FAST_ISA": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
REPLAYED = 20  # products in a recording


def peak_function(folder: str, flags: list[str]) -> Callable[[], float]:
    library = f"{folder}/peak.so"
    source = str(Path(__file__).with_name("peak.cpp"))
    subprocess.run(["c++", "-O3", *flags, "-shared", "-fPIC", source, "-o", library], check=True)
    function = ctypes.CDLL(library).peak
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
    return lambda: float(function(100_000))


def replayed(by: str, a: Tensor, b: Tensor) -> Callable[[], object]:
    """Products of a recording, one after another, as estimates run them."""
    from llc_fast.gradients import replay

    chosen = replay.small_product if by == "llc_fast" else lambda *_: None
    with (
        mock.patch.object(replay, "small_product", chosen),
        mock.patch.object(replay, "product_by_onednn", lambda *_: None),
    ):
        recording = replay.Recording(lambda: [a @ b for _ in range(REPLAYED)])
        assert not recording.program.by_python
    return recording.replay


def contenders(kind: str, width: int, batch: int, chains: int) -> dict[str, tuple[Callable[[], object], int]]:
    """What to call, and how many products that is."""
    from llc_fast.support.torch_private import has_onednn_linear, onednn_linear

    torch.manual_seed(0)
    x, w, g = (torch.randn(chains, *shape) for shape in ((batch, width), (width, width), (batch, width)))
    a, b = {"NT": (x, w.mT), "NN": (g, w), "TN": (g.mT, x)}[kind]
    expected = (a.double() @ b.double()).float()
    out, left, right = torch.empty_like(expected[0]), a[0].numpy(), b[0].numpy()
    found = {
        "replay, llc_fast": (replayed("llc_fast", a[0], b[0]), REPLAYED),
        "replay, torch": (replayed("torch", a[0], b[0]), REPLAYED),
        f"replay, llc_fast × {chains}": (replayed("llc_fast", a, b), REPLAYED * chains),
        f"replay, torch × {chains}": (replayed("torch", a, b), REPLAYED * chains),
        "OpenBLAS": (lambda: np.matmul(left, right, out=out.numpy()), 1),
    }
    if has_onednn_linear():
        found["oneDNN"] = (lambda: onednn_linear(a[0], b[0].t(), None), 1)
    return found


def rate(run: Callable[[], object], flops: float) -> float:
    """GFLOP/s of processor time, over a few milliseconds."""
    count, spent = 1, 0.0
    while spent < SECONDS:
        begin = time.process_time()
        for _ in range(count):
            run()
        spent = time.process_time() - begin
        if spent < SECONDS:
            count *= 2
    return 1e-9 * flops * count / spent


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peak = peak_function(folder, spec["flags"])
        for width in spec["widths"]:
            for kind in ("NT", "NN", "TN"):
                flops = 2.0 * spec["batch"] * width * width
                known = contenders(kind, width, spec["batch"], spec["chains"])
                rates: dict[str, list[float]] = {name: [] for name in (*known, "peak")}
                for round_ in range(spec["rounds"] + 1):
                    for name, (run, products) in known.items():
                        found = rate(run, flops * products)
                        if round_:  # the first one warms up
                            rates[name].append(found)
                    if round_:
                        rates["peak"].append(peak())
                rows.append({"width": width, "product": kind} | {name: median(r) for name, r in rates.items()})
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 50, 160])
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parse(parser, measure)
    from llc_fast import _native

    best = str(_native.info()["instruction_set"])
    flags = {"avx512": ["-mavx512f", "-mfma", "-mprefer-vector-width=512"], "avx2": ["-mavx2", "-mfma"]}
    if best not in flags:
        parser.error(f"this machine's instruction set is {best}: there is nothing to compare")
    os.environ.update(ONE_THREAD)
    spec = {name: getattr(options, name) for name in ("widths", "batch", "chains", "rounds")}
    tables: dict[str, Any] = {"work": spec}
    for name in dict.fromkeys((best, "avx2")):
        os.environ.update(AVX2 if name == "avx2" else {})
        done = in_fresh_process(__file__, {**spec, "flags": flags[name]})
        if "error" in done:
            parser.error(done["error"])
        tables[name] = done["rows"]
        print_table(f"GFLOP/s with {name}", done["rows"])
    write_json(options.json, tables)


if __name__ == "__main__":
    main()
