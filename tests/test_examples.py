"""The scripts of examples/ run, and write what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llc_fast

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="a source distribution may have no examples")


@pytest.mark.slow
def test_influence(tmp_path: Path) -> None:
    """Pictures of whole chains, and tokens with colors behind them."""
    for name in ("zarr", "xarray", "matplotlib"):
        pytest.importorskip(name)
    # The package that is tested here, wherever the script is.
    place = os.pathsep.join(filter(None, [str(Path(llc_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"LLC_FAST_SMALL": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": place}
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "influence.py"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    pictures = {"influence.png", "kernel.png", "llc.png", "pca.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*pictures, "tokens.html"}
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "tokens.html").read_text()
    assert all(f"influence of tokens on the mean loss of held-out {kind}" in page for kind in ("prose", "grammar"))
    lines = done.stdout.splitlines()
    table = [line.split() for line in lines if line[:10].strip() in ("prose", "grammar", "source")]
    assert [row[0] for row in table] == ["prose", "grammar", "source"]
    assert all(float(value) for row in table for value in row[1:])
    assert any(line.startswith("λ̂ = ") for line in lines)
