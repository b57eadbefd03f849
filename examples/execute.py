"""Makes the notebooks of this folder: each script, cell by cell, with what its cells print and draw.

    python examples/execute.py                      # all of them, at full settings: what is committed
    python examples/execute.py quickstart heads     # these
    LLC_FAST_SMALL=1 python examples/execute.py --to FOLDER   # short runs, written to FOLDER

The scripts are the source. A notebook is never edited by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NAMES = ("quickstart", "checkpoints", "heads", "influence", "devinterp")


class ThisPython(KernelSpecManager):
    """Whatever kernels are installed: the one of the Python that runs this."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def notebook_of(script: Path) -> Any:
    """The notebook of a script, without outputs."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{script.stem}-{number}"  # the same ones each time
        cell.metadata = nbformat.from_dict({})
    return notebook


def execute(script: Path, folder: Path, *, timeout: float = 1200) -> Any:
    """The notebook of a script with its outputs, run in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = notebook_of(script)
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython()),
        resources={"metadata": {"path": str(folder)}},
        timeout=timeout,
        record_timing=False,
    )
    # IPython keeps a history of what it runs; this is nobody's.
    client.execute(env=os.environ | {"IPYTHONDIR": str(folder / ".ipython"), "PYTHONHASHSEED": "0"})
    for cell in notebook.cells:
        # Progress and Python warnings, with times and temporary paths in them. Results print their warnings.
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the notebooks of examples/.")
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="all of them if none is given")
    parser.add_argument("--to", type=Path, default=HERE, help="where notebooks are written")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    for name in given.names or NAMES:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(HERE / f"{name}.py", Path(folder))
        path = given.to / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
