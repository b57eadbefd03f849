"""llc-fast bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import invoke

import llc_fast


def test_bench(tmp_path: Path) -> None:
    """A row for every sampler that is one fused step, with figures that agree with each other."""
    path = tmp_path / "bench.json"
    done = invoke("bench", "--parameters", "20000", "--seconds", "0.02", "--json", str(path))
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    assert [row["sampler"] for row in rows] == list(llc_fast.samplers.samplers_with_optimizer())
    for row in rows:
        assert row["parameters"] == 20_000 and row["sampler"] in done.output
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["ns_per_parameter"])
        assert row["share_of_copy"] > 0
    assert [row["bytes_moved"] for row in rows[:1]] == [16]
