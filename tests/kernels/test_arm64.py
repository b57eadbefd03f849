"""The kernels for arm64, run by an emulator: the same bits as those for x86 with fused multiply-add."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llc_fast import _native

ROOT = Path(__file__).parents[2]
CROSS = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-static"]


def output(compiler: list[str], isa: str, emulator: list[str], folder: Path) -> bytes:
    """What print_kernels.cpp writes, with the kernels as setup.py compiles them."""
    sources = [str(ROOT / "csrc" / "step_cpu.cpp"), str(Path(__file__).with_name("print_kernels.cpp"))]
    program = str(folder / isa)
    command = [*compiler, *FLAGS, f"-DLLC_ISA={isa}", f"-I{ROOT / 'csrc'}", *sources, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    return subprocess.run([*emulator, program], check=True, capture_output=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not (CROSS and EMULATOR),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86")
def test_arm64_has_the_bits_of_x86(tmp_path: Path) -> None:
    assert CROSS and EMULATOR
    arm = output([CROSS], "baseline", [EMULATOR], tmp_path)
    x86 = output(["g++", "-mavx2", "-mfma"], "avx2", [], tmp_path)
    assert len(arm) > 2_000_000
    assert arm == x86
    if _native.info()["instruction_set"] != "baseline":  # which has no fused multiply-add
        # The installed module's, too.
        normals = np.empty(100_000, np.float32)
        _native.normals("float32", normals.ctypes.data, 3, normals.size, 0x123456789ABCDEF0, 2**33 + 5, 7, 0, None)
        assert arm[: normals.nbytes] == normals.tobytes()
