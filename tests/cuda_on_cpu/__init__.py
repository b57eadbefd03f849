"""CUDA emulation on the CPU, so that tests marked ``gpu`` run without a GPU: ``pytest -p cuda_on_cpu -m gpu``.

Emulated are torch's `cuda` device (device.cpp) and the threads of the kernels (cuda_runtime.h). The kernels' source,
all of llc_fast, autograd and vmap are the real ones. So this finds errors in those, races and tensors on the wrong
device included, but none of the compiler, the driver or the chip.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr,arg-type]
FLAGS = ["-O1", "-fPIC", "-fvisibility=hidden", "-w", "-ffp-contract=off", f"-isystem{TORCH / 'include'}"]
KERNELS = ["-std=c++17", "-mfma", f"-I{HERE}", f"-I{CSRC}", f"-isystem{sysconfig.get_paths()['include']}"]
KERNELS += ["-DLLC_WITH_CUDA", '-DLLC_CUDA_VERSION="13.0"', '-DLLC_CUDA_ARCHS="CPU"', "-DLLC_ISA=baseline"]
DEVICE = ["-std=c++20", "-fvisibility=default", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]


def build(folder: Path) -> None:
    """Compile ``device.so`` and ``_native.so``, which is ``llc_fast._native`` with its kernels, into `folder`."""
    source = (CSRC / "step_cuda.cu").read_text()
    # kernel<<<grid, block, …>>>(arguments); is no C++.
    kernels, launches = re.subn(r"(\w+)<<<(.*?)>>>\((.*?)\);", r"cuda_on_cpu::launch(\2)(\1, \3);", source, flags=re.S)
    assert launches == source.count("<<<")
    (folder / "step_cuda.cpp").write_text(kernels)

    def compiled(path: Path, flags: list[str]) -> str:
        out = folder / f"{path.stem}.o"
        subprocess.run(["c++", *FLAGS, *flags, "-c", str(path), "-o", str(out)], check=True)
        return str(out)

    names = "module", "cpu_dispatch", "replay", "step_cpu"
    natives = [folder / "step_cuda.cpp", *(CSRC / f"{name}.cpp" for name in names)]
    with ThreadPoolExecutor(2) as pool:
        device = pool.submit(compiled, HERE / "device.cpp", DEVICE)
        objects = list(pool.map(lambda path: compiled(path, KERNELS), natives))
    link = ["c++", "-shared", "-o"]
    subprocess.run([*link, str(folder / "_native.so"), *objects], check=True)
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*link, str(folder / "device.so"), device.result(), *libraries], check=True)


def emulate() -> None:
    """Give this process a GPU; to be called before torch is imported.

    Does nothing if torch was built with CUDA: then the tests run on a GPU, or not at all.
    """
    if (TORCH / "lib" / "libtorch_cuda.so").exists():
        return
    assert "torch" not in sys.modules, "torch must not have looked for GPUs yet"
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        device = ctypes.CDLL(f"{folder}/device.so")
        spec = importlib.util.spec_from_file_location("_native", f"{folder}/_native.so")
        assert spec and spec.loader
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
    _replace_parts_of_torch(device)

    from llc_fast.kernels import native as interface

    interface.check_interface(native.interface())
    interface._native = _Native(native, device)


def _replace_parts_of_torch(device: ctypes.CDLL) -> None:
    """What torch.cuda asks of a driver."""
    import torch

    device.random_state_bytes.restype = ctypes.c_void_p
    device.peak_memory.restype = ctypes.c_size_t
    size = torch.get_rng_state().numel()

    def random_state() -> torch.Tensor:
        bytes_ = ctypes.cast(device.random_state_bytes(), ctypes.POINTER(ctypes.c_uint8 * size)).contents
        return torch.frombuffer(bytes_, dtype=torch.uint8)

    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        random_state().copy_(state)

    def seed(number: int) -> None:
        set_rng_state(torch.Generator().manual_seed(number + 1).get_state())

    class Stream:
        numbers = itertools.count(1)

        def __init__(self, *_: Any, **__: Any) -> None:
            self.cuda_stream = next(self.numbers)

        def wait_stream(self, other: Stream) -> None: ...
        def wait_event(self, event: Event) -> None: ...
        def synchronize(self) -> None: ...

    class Event:
        def __init__(self, **_: Any) -> None: ...
        def synchronize(self) -> None: ...
        def record(self, *_: Any) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.time - self.time)

    class CUDAGraph:
        def replay(self) -> None:
            device.replay(self.number)

        def pool(self) -> int:
            return self.number

    streams, nothing = [Stream()], contextlib.nullcontext

    @contextlib.contextmanager
    def in_stream(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    @contextlib.contextmanager
    def graph(graph: Any, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        with in_stream(stream or Stream()):
            device.begin_capture()
            try:
                yield
            finally:
                graph.number = device.end_capture()

    differentiate = torch.autograd.grad

    def grad(outputs: Any, *args: Any, **options: Any) -> Any:
        """Autograd sends a leaf's gradient to the stream of its first use, while a graph of that use is there."""
        waiting = [t.grad_fn for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]
        seen, mine = set[Any](), streams[-1].cuda_stream
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if not node.name().endswith("AccumulateGrad"):
                continue
            if node.metadata.setdefault("stream", mine) != mine and device.is_capturing():
                raise RuntimeError("CUDA emulation: a gradient leaves for the stream in which its leaf was first used")
        return differentiate(outputs, *args, **options)

    torch.autograd.grad = grad
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "CUDA emulation on the CPU",
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_: True,
        "mem_get_info": lambda *_: (2**33, 2**33),
        "reset_peak_memory_stats": lambda *_: device.forget_peak_memory(None),
        "max_memory_allocated": lambda *_: device.peak_memory(None),
        "synchronize": lambda *_: None,
        "device": nothing,
        "stream": in_stream,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: streams[-1],
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "is_current_stream_capturing": lambda: bool(device.is_capturing()),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: device.refuse_to_wait(mode == "error"),
        "get_rng_state": lambda *_: random_state().clone(),
        "set_rng_state": set_rng_state,
        "manual_seed": seed,
        "manual_seed_all": seed,
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch.Tensor.pin_memory = lambda tensor, *_: tensor.clone()  # type: ignore[method-assign,assignment]

    clone_of_cpu = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type == "cpu":
            return clone_of_cpu(storage)
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()

    torch.UntypedStorage.clone = clone  # type: ignore[method-assign]


class _Native:
    """The native module; what is launched on a stream while a graph is captured waits for its replay."""

    def __init__(self, module: Any, device: ctypes.CDLL) -> None:
        self._module, self._device = module, device
        self._kept: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        def call(*arguments: Any) -> Any:
            if not self._device.is_capturing() or not arguments or arguments[-1] is None:
                return function(*arguments)
            self._kept.append(ctypes.CFUNCTYPE(None)(lambda: function(*arguments)))
            return self._device.keep(self._kept[-1])

        return call


emulate()
