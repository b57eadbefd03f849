"""What is installed, and which code will run: for ``llc-fast info``, reports, and beside measurements."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any


def installed() -> dict[str, Any]:
    """Versions, and what the native module was built with: what is known without importing torch.

    Raises:
        ModuleNotFoundError: the native module was not built.
    """
    from llc_fast import __version__, _native  # llc_fast.kernels.native has the same, and imports torch

    facts: dict[str, Any] = {"llc_fast": __version__}
    try:
        facts["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # built by hand, or not there: `runs` will say
        facts["torch"] = None
    return {**facts, "python": platform.python_version(), "platform": platform.platform(), **_native.info()}


def runs(native: dict[str, Any]) -> dict[str, Any]:
    """What only torch can say: threads, GPUs, and hence which of the native module's code runs.

    Args:
        native: what :func:`installed` returns.

    Returns:
        The facts; ``torch_error`` alone if torch can't be imported.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        return {"torch_error": str(error)}
    cpu = f"cpu ({native['instruction_set']})"
    return {
        "torch": torch.__version__,
        "backend": f"cuda and {cpu}" if native["cuda"] is not None and torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
    }


def collect_info() -> dict[str, Any]:
    """All facts by name: what belongs in a bug report, and beside a measurement."""
    facts = installed()
    return facts | runs(facts)
