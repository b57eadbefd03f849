"""Fails if a CUDA kernel spills registers or keeps a stack frame.

    python .ci/ptxas_check.py build/native-*/step_cuda.o.log

The log is what `nvcc -Xptxas=-v` printed while it compiled csrc/step_cuda.cu. The kernels are bound by memory
bandwidth: a spill costs traffic just where the design saves it, and no test of the results would show it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COMPILING = re.compile(r"Compiling entry function '\S+' for '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Usage:
    """What one kernel (or device function that was not inlined) takes on one architecture."""

    function: str
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int = 0

    @property
    def is_clean(self) -> bool:
        return self.stack == self.spill_stores == self.spill_loads == 0


def parse(log: str) -> list[Usage]:
    usages: list[Usage] = []
    arch = function = "?"
    for line in log.splitlines():
        if match := COMPILING.search(line):
            arch = match[1]
        elif match := FUNCTION.search(line):
            function = match[1]
        elif match := MEMORY.search(line):
            usages.append(Usage(function, arch, *map(int, match.groups())))
        elif usages and (match := REGISTERS.search(line)):
            usages[-1].registers = int(match[1])
    return usages


def demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path)
    usages = parse(parser.parse_args().log.read_text())
    if not usages:
        sys.exit("ptxas_check: the log names no kernel")

    usages.sort(key=lambda usage: (usage.function, int(re.sub(r"\D", "", usage.arch) or 0)))
    print("arch    registers  stack  spill stores  spill loads  kernel")
    for usage, name in zip(usages, demangle([usage.function for usage in usages]), strict=True):
        print(
            f"{usage.arch:<7} {usage.registers:>9} {usage.stack:>6} {usage.spill_stores:>13} "
            f"{usage.spill_loads:>12}  {name}{'' if usage.is_clean else '  <-- FAILED'}"
        )
    bad = sum(not usage.is_clean for usage in usages)
    if bad:
        sys.exit(f"ptxas_check: {bad} of {len(usages)} kernels spill registers or keep a stack frame")
    print(f"ptxas_check: none of {len(usages)} kernels spills registers or keeps a stack frame")


if __name__ == "__main__":
    main()
