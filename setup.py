"""Builds the native module `llc_fast._native`; everything else about the package is in pyproject.toml.

setuptools decides when to build; ninja decides what is out of date, headers included, and compiles that in
parallel. The file reads in the order in which things happen: find CUDA, list what to compile, write
build.ninja and run it. docs/install.md lists the environment variables that steer it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError, PlatformError

# No -ffast-math, no silent contraction to FMA, no -march=native: the arithmetic is the source's, everywhere.
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-g0", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# They override some of CXX_FLAGS. Any error ends the process. GCC's headers of AVX-512 look uninitialized to it here.
SANITIZER_FLAGS = [
    *("-O1", "-g1", "-UNDEBUG", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", "-Wno-maybe-uninitialized"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DLLC_SANITIZED"),
]
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DNDEBUG", "--threads=2"),
    *("--fmad=false", "-Xptxas=-v"),
]
# PyTorch brings the OpenMP library. A machine may have no other, and a second one would start a second pool of threads.
TORCHS_OPENMP = "-Wl,-rpath,$ORIGIN/../torch/lib"
PORTABLE_ARCHS = ["80", "90"]
RELEASE_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]


def output(command: Sequence[str]) -> str:
    """What a tool prints, on stderr too; empty if it is missing or fails."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout


def complaint(compiler: Sequence[str], program: str, suffix: str = ".cpp") -> str:
    """The first error that the compiler finds in a program; empty if it compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text(program)
        command = [*compiler, str(source), "-o", str(source.with_suffix(".out"))]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    lines = (run.stderr + run.stdout).splitlines() or [f"exit status {run.returncode}"]
    return next((line for line in lines if "error" in line), lines[-1])


# ---- Find CUDA ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuda:
    """An nvcc that works, and the GPU architectures to compile for."""

    nvcc: str
    version: str
    library_flags: list[str]
    archs: list[str]


class CudaUnavailableError(Exception):
    """What is missing and what would help."""


def choose_cuda() -> tuple[Cuda | None, str]:
    """The toolkit to use; or None and the reason, which the module gives to whoever asks it for CUDA."""
    mode = os.environ.get("LLC_FAST_CUDA") or "auto"
    if mode not in ("auto", "1", "0"):
        raise OptionError(
            f"LLC_FAST_CUDA={mode!r} is not understood: set it to auto (the default: CUDA if nvcc works), "
            "1 (CUDA or fail) or 0 (no CUDA)"
        )
    if mode == "0":
        return None, "LLC_FAST_CUDA=0 forbade it: reinstall llc_fast with LLC_FAST_CUDA=1"
    try:
        return find_cuda(), ""
    except CudaUnavailableError as reason:
        if mode == "1":
            raise PlatformError(f"LLC_FAST_CUDA=1, but {reason}") from None
        return None, f"{reason}, then reinstall llc_fast with LLC_FAST_CUDA=1"


def find_cuda() -> Cuda:
    """The toolkit in CUDA_HOME, else the one on PATH, else the one in the usual place."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        place = f"in CUDA_HOME={home}" if home else "on PATH"
        raise CudaUnavailableError(
            f"nvcc was not found {place}: install the CUDA toolkit and set CUDA_HOME to its folder"
        )
    # Most often this fails because the host compiler is newer than nvcc allows.
    if trouble := complaint([nvcc], "int main() { return 0; }", ".cu"):
        raise CudaUnavailableError(
            f"{nvcc} could not build an empty program ({trouble}): "
            "repair the CUDA toolkit, or set NVCC_CCBIN to a C++ compiler that it supports"
        )
    version = re.search(r"release (\d+\.\d+)", output([nvcc, "--version"]))
    # nvcc may be a wrapper script far from its toolkit, so ask it where it looks for libraries itself.
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", output([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.M)
    known = sorted(re.findall(r"compute_(\d+)", output([nvcc, "--list-gpu-arch"])), key=int)
    if not (version and libraries and known):
        raise CudaUnavailableError(
            f"{nvcc} did not tell its version, libraries and GPUs: set CUDA_HOME to a CUDA toolkit's folder"
        )
    return Cuda(nvcc, version[1], shlex.split(libraries[1]), choose_archs(known))


def choose_archs(known: list[str]) -> list[str]:
    """What LLC_FAST_CUDA_ARCHS asks for, out of the architectures that nvcc knows."""
    wish = os.environ.get("LLC_FAST_CUDA_ARCHS", "")
    if wish == "release":
        return with_ptx(RELEASE_ARCHS, known)
    if wish not in ("", "native"):
        archs = re.split("[;, ]+", wish)
    else:
        answer = output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        found = re.findall(r"^(\d+)\.(\d)$", answer, re.M)
        archs = sorted({major + minor for major, minor in found}, key=int)
        if not wish and not (archs and set(archs) <= set(known)):
            return with_ptx(PORTABLE_ARCHS, known)

    unknown = [arch for arch in archs if re.sub(r"[af]?(\+PTX)?$", "", arch) not in known]
    if unknown or not archs:
        trouble = f"nvcc does not know {', '.join(map(repr, unknown))}" if unknown else "no GPU was found"
        raise OptionError(
            f"LLC_FAST_CUDA_ARCHS={wish!r}: {trouble}; set it to native (the GPUs of this machine), "
            f"release, or a list such as '80;90+PTX' out of {', '.join(known)}"
        )
    return archs


def with_ptx(wanted: list[str], known: list[str]) -> list[str]:
    """Machine code for the wanted GPUs, and PTX of the last, which the driver compiles for any newer one."""
    *older, newest = [arch for arch in wanted if arch in known] or known[-1:]
    return [*older, f"{newest}+PTX"]


def gencode(arch: str) -> str:
    number = arch.removesuffix("+PTX")
    code = f"sm_{number}" if arch == number else f"[sm_{number},compute_{number}]"
    return f"-gencode=arch=compute_{number},code={code}"


def choose_sanitizers() -> list[str]:
    """The flags of LLC_FAST_SANITIZE=1, for a module that stops at the first error in memory or arithmetic."""
    mode = os.environ.get("LLC_FAST_SANITIZE") or "0"
    if mode not in ("0", "1"):
        raise OptionError(f"LLC_FAST_SANITIZE={mode!r} is not understood: set it to 1, or to 0 (the default)")
    return SANITIZER_FLAGS if mode == "1" else []


# ---- List what to compile ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compilation:
    """csrc/{source} becomes {object} in the build folder."""

    source: str
    object: str
    flags: list[str]


def macro(name: str, value: str | int = 1) -> str:
    """The flag that defines a macro; a string becomes a C string literal."""
    return f"-D{name}={json.dumps(value)}"


def list_compilations(
    isas: dict[str, list[str]], cuda: Cuda | None, why_no_cuda: str, include_dirs: list[str]
) -> list[Compilation]:
    about_isas = [macro("LLC_X86_ISAS")] if isas else []
    about_cuda = [macro("LLC_NO_CUDA_REASON", why_no_cuda)]
    kernels = []
    if cuda:
        about_cuda = [
            macro("LLC_WITH_CUDA"),
            macro("LLC_CUDA_ARCHS", ";".join(cuda.archs)),
            macro("LLC_CUDA_VERSION", cuda.version),
        ]
        kernels = [Compilation("step_cuda.cu", "step_cuda.o", [gencode(arch) for arch in cuda.archs])]
    includes = [f"-isystem{folder}" for folder in include_dirs]
    return [
        Compilation("module.cpp", "module.o", [*includes, *about_isas, *about_cuda]),
        Compilation("cpu_dispatch.cpp", "cpu_dispatch.o", about_isas),
        Compilation("replay.cpp", "replay.o", []),
        *(
            Compilation("step_cpu.cpp", f"step_cpu.{isa}.o", [f"-DLLC_ISA={isa}", *flags])
            for isa, flags in {"baseline": [], **isas}.items()
        ),
        *(
            Compilation("products_cpu.cpp", f"products_cpu.{isa}.o", [f"-DLLC_ISA={isa}", *flags])
            for isa, flags in isas.items()
        ),
        *kernels,
    ]


# ---- Write build.ninja and run it --------------------------------------------------------------------------

NINJA_RULES = """
rule cpp
  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

# The log has ptxas's account of registers and spills, which .ci/ptxas_check.py reads.
rule cu
  command = $nvcc $nvccflags $flags -MD -MF $out.d -c $in -o $out >$out.log 2>&1 || { cat $out.log; exit 1; }
  depfile = $out.d
  deps = gcc

rule link
  command = $cxx $cxxflags $in -o $out $ldflags
"""


def ninja_file(module: str, compilations: list[Compilation], variables: dict[str, list[str]]) -> str:
    """A build.ninja that makes `module` in the folder $builddir."""

    def assign(name: str, words: list[str]) -> str:
        return f"{name} = {shlex.join(words).replace('$', '$$')}"

    lines = [assign(name, words) for name, words in variables.items()] + [NINJA_RULES]
    for item in compilations:
        rule = Path(item.source).suffix.removeprefix(".")
        lines.append(f"build $builddir/{item.object}: {rule} csrc/{item.source}")
        lines.append(f"  {assign('flags', item.flags)}")
    objects = " ".join(f"$builddir/{item.object}" for item in compilations)
    lines.append(f"build $builddir/{module}: link {objects}")
    return "\n".join(lines) + "\n"


def run_ninja(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    file.write_text(text)
    # In an environment that is not activated, ninja is beside python, but not on PATH.
    ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts"), "ninja"))
    if subprocess.run([ninja, "-f", str(file)]).returncode != 0:
        raise CompileError("the native module did not build: the compiler's message is above")


class NinjaBuild(build_ext):
    """build_ext with ninja in place of the distutils compiler, which knows neither headers nor nvcc."""

    def build_extension(self, ext: Extension) -> None:
        cxx, cxxflags, ldflags = (shlex.split(os.environ.get(name, "")) for name in ("CXX", "CXXFLAGS", "LDFLAGS"))
        cxx = cxx or ["c++"]
        if shutil.which(cxx[0]) is None:
            raise PlatformError(f"the C++ compiler {cxx[0]} was not found: install g++, or set CXX")
        if not any(Path(folder, "Python.h").exists() for folder in self.include_dirs):
            raise PlatformError("Python.h was not found: install Python's headers (Debian: python3-dev)")

        is_x86 = "#ifndef __x86_64__\n#error not x86-64\n#endif\nint main() { return 0; }"
        isas = {} if complaint([*cxx, *X86_ISAS["avx512"]], is_x86) else X86_ISAS
        uses_openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"
        no_openmp = complaint([*cxx, "-fopenmp", *cxxflags, *ldflags], uses_openmp)
        cuda, why_no_cuda = choose_cuda()
        sanitizers = choose_sanitizers()
        print(f"llc_fast: instruction sets {['baseline', *isas]}")
        print(f"llc_fast: {'no OpenMP: ' + no_openmp if no_openmp else 'OpenMP'}")
        print(f"llc_fast: {f'CUDA {cuda.version} for {cuda.archs}' if cuda else 'no CUDA: ' + why_no_cuda}")

        module = Path(self.get_ext_fullpath(ext.name))
        # Not setuptools' build_temp: for an editable install that is a new folder every time.
        folder = Path("build", f"native-{sysconfig.get_config_var('SOABI')}{'-sanitized' if sanitizers else ''}")
        on_mac = sys.platform == "darwin"
        variables = {
            "builddir": [str(folder)],
            "cxx": cxx,
            "cxxflags": [*CXX_FLAGS, macro("LLC_NO_OPENMP") if no_openmp else "-fopenmp", *sanitizers, *cxxflags],
            "ldflags": ["-bundle", "-undefined", "dynamic_lookup"] if on_mac else ["-shared", TORCHS_OPENMP],
        }
        if not (on_mac or sanitizers):
            variables["ldflags"].append("-Wl,-s")  # no symbols, which a sanitizer's report needs
        if cuda:
            variables["nvcc"], variables["nvccflags"] = [cuda.nvcc], NVCC_FLAGS
            variables["ldflags"] += [*cuda.library_flags, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        variables["ldflags"] += ldflags

        include_dirs = [pybind11.get_include(), *self.include_dirs]
        compilations = list_compilations(isas, cuda, why_no_cuda, include_dirs)
        run_ninja(folder, ninja_file(module.name, compilations, variables))
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / module.name, module)


setup(ext_modules=[Extension("llc_fast._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
