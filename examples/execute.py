"""Makes the notebooks of this folder: each script, cell by cell, with what its cells print and draw.

    python examples/execute.py                      # all of them, at full settings: what is committed
    python examples/execute.py quickstart heads     # these
    python examples/execute.py --text               # only text has changed: outputs stay
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
NAMES = ("quickstart", "checkpoints", "heads", "influence", "coming_from_devinterp")


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
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    nbformat.validate(notebook)
    return with_new_text(script, notebook)  # without what the kernel said of itself


def _kept(outputs: list[Any]) -> list[Any]:
    """Outputs without stderr, which has progress with its times, and Python warnings with paths of temporary files.

    What was printed between these is put together again. No warning is lost: results print their own.
    """
    kept: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def with_new_text(script: Path, executed: Any) -> Any:
    """The notebook of a script with the outputs of an earlier run.

    Raises:
        ValueError: code has changed since.
    """
    notebook = notebook_of(script)
    fresh, run = ([cell for cell in each.cells if cell.cell_type == "code"] for each in (notebook, executed))
    if [cell.source for cell in fresh] != [cell.source for cell in run]:
        raise ValueError(f"the code of {script.name} has changed since its notebook was run: execute it")
    for cell, old in zip(fresh, run, strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the notebooks of examples/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them if none is given")
    parser.add_argument("--to", type=Path, default=HERE, help="where notebooks are written")
    parser.add_argument("--text", action="store_true", help="run nothing: only text has changed, outputs stay")
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}; choose of {', '.join(NAMES)}")
    given.to.mkdir(parents=True, exist_ok=True)
    for name in given.names or NAMES:
        path, script, start = given.to / f"{name}.ipynb", HERE / f"{name}.py", time.perf_counter()
        if given.text:
            notebook = with_new_text(script, nbformat.read(path, as_version=4))
        else:
            with tempfile.TemporaryDirectory() as folder:
                notebook = execute(script, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
