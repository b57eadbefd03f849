"""In the module that `make sanitize` builds: errors in memory end the process, with a report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llc_fast import _native

IS_SANITIZED = bool(_native.info().get("sanitized"))

_TOO_LONG = """
import numpy as np
from llc_fast import _native
room = np.zeros({room}, np.float32)
_native.normals("float32", room.ctypes.data, 0, 100, 1, 0, 0, 0, None)
print("done")
"""


def test_it_is_the_module_that_was_asked_for() -> None:
    assert (os.environ.get("LLC_FAST_SANITIZE") == "1") == IS_SANITIZED


@pytest.mark.skipif(not IS_SANITIZED, reason="the module was built without sanitizers")
@pytest.mark.parametrize(("room", "is_caught"), [(100, False), (99, True)])
def test_a_deliberate_error_is_caught(room: int, is_caught: bool, tmp_path: Path) -> None:
    """A hundred numbers written into a place for ninety-nine."""
    command = [sys.executable, "-c", _TOO_LONG.format(room=room)]
    # In a folder without a package of ours in it.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ("heap-buffer-overflow" in done.stderr) == is_caught, done.stderr
    assert (done.returncode != 0) == is_caught and ("done" in done.stdout) != is_caught
