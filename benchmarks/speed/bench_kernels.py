"""The CPU kernels of two checkouts, for each instruction set: normals, and steps of every rule.

    python benchmarks/speed/bench_kernels.py OLD NEW [--isas avx2 avx512 baseline] [--parameters 10000000] [--rounds 21]

OLD and NEW are checkouts. Their csrc/step_cpu.cpp are compiled into one program, which times them in turn: thread CPU
time, one thread, float32. Printed are medians in ns, and medians of the ratios within a round, which other processes
disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, *AVX512]}
"""As in setup.py."""


def build(checkouts: dict[str, Path], isas: list[str], folder: Path) -> Path:
    """A program with every checkout's kernels for every instruction set."""
    compiler = [os.environ.get("CXX", "c++"), *FLAGS]
    objects, backends = [], ""
    for isa in isas:
        for age, checkout in checkouts.items():
            name = f"{age}_{isa}"
            objects.append(str(folder / f"{name}.o"))
            backends += f"X({name})"
            source = str(checkout / "csrc" / "step_cpu.cpp")
            subprocess.run([*compiler, *ISAS[isa], f"-DLLC_ISA={name}", "-c", source, "-o", objects[-1]], check=True)
    include, main = f"-I{checkouts['new'] / 'csrc'}", str(Path(__file__).with_name("kernels.cpp"))
    program = folder / "kernels"
    subprocess.run([*compiler, include, f"-DBACKENDS={backends}", main, *objects, "-o", str(program)], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=["avx2", "avx512", "baseline"])
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        program = build({"old": options.old.resolve(), "new": options.new.resolve()}, options.isas, Path(folder))
        command = [str(program), str(options.parameters), str(options.rounds)]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            backend, what, _, time = line.split()
            times[backend, what].append(float(time))

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))

    rows = []
    print(f"{'':>32} {'old, ns':>9} {'new, ns':>9} {'new / old':>9}   over the noise-free step: old, new")
    for isa in options.isas:
        old, new = f"old_{isa}", f"new_{isa}"
        for what in [what for backend, what in times if backend == old]:
            medians = {age: statistics.median(times[f"{age}_{isa}", what]) for age in ("old", "new")}
            row = {"isa": isa, "what": what, **medians, "ratio": ratio((new, what), (old, what))}
            line = f"{isa:>9} {what:>22} {row['old']:>9.3f} {row['new']:>9.3f} {row['ratio']:>9.3f}"
            if (old, floor := f"{what}-noise-free") in times:
                row |= {
                    f"{age}_over_floor": ratio((f"{age}_{isa}", what), (f"{age}_{isa}", floor))
                    for age in ("old", "new")
                }
                line += f"   {row['old_over_floor']:.2f}, {row['new_over_floor']:.2f}"
            print(line)
            rows.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
