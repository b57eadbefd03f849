"""llc-fast demo and llc-fast dln."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import PNG, invoke, printed
from runs import interrupted_after

from llc_fast import theory
from llc_fast.cli import networks
from llc_fast.problems import deep_linear

COLUMNS = {
    "parameters",
    "widths",
    "rank",
    "lambda_true",
    "llc_mean",
    "llc_stderr",
    "rel_error",
    "seconds",
    "steps",
}


def _rows(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that `dln` writes with these arguments."""
    result = invoke("dln", "--no-progress", "--json", str(path), *arguments)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_dln_writes_rows_and_a_picture(tmp_path: Path) -> None:
    """One row a network in the JSON file and on the screen, a median error, a PNG."""
    pytest.importorskip("matplotlib")
    arguments = ["--networks", "3", "--steps", "60", "--chains", "2", "--seed", "1"]
    result = invoke(
        "dln",
        "--no-progress",
        *arguments,
        "--json",
        str(tmp_path / "rows.json"),
        "--plot",
        str(tmp_path / "plot.png"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3 and (tmp_path / "plot.png").read_bytes().startswith(PNG)
    for seed, row in enumerate(rows, start=1):
        problem = deep_linear.make_problem("1k", seed)
        assert set(row) >= COLUMNS
        assert row["parameters"] == sum(a * b for a, b in zip(row["widths"], row["widths"][1:], strict=False))
        assert (row["widths"], row["rank"]) == (list(problem.widths), problem.rank)
        assert row["lambda_true"] == pytest.approx(theory.deep_linear(problem.widths, problem.rank).value)
        assert row["rel_error"] == pytest.approx((row["llc_mean"] - row["lambda_true"]) / row["lambda_true"])
        assert row["llc_stderr"] > 0 and row["seconds"] > 0 and row["steps"] == 120
        assert f"{row['llc_mean']:.2f} ± {row['llc_stderr']:.2f}" in result.output
    errors = sorted(abs(row["rel_error"]) for row in rows)
    assert f"over 3 networks: {100 * errors[1]:.1f} %" in result.output


def test_dln_repeats_itself(tmp_path: Path) -> None:
    """Network k is a function of seed + k: the same alone or among others, here or in another run."""
    several = _rows(tmp_path / "several.json", "--networks", "2", "--steps", "20", "--seed", "3")
    (alone,) = _rows(tmp_path / "alone.json", "--networks", "1", "--steps", "20", "--seed", "4")
    for row in (*several, alone):
        del row["seconds"]
    assert several[1] == alone != several[0]


def test_dln_of_another_class(tmp_path: Path) -> None:
    """--size chooses the class; its name and its steps are in the row."""
    (row,) = _rows(tmp_path / "rows.json", "--size", "10k", "--networks", "1", "--steps", "10", "--seed", "2")
    assert row["size"] == "10k" and row["steps"] == 20
    assert row["parameters"] == deep_linear.make_problem("10k", 2).num_parameters


def test_dln_steps_default_to_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --steps a chain is as long as its class says."""
    shorter = dataclasses.replace(deep_linear.SIZE_CLASSES["1k"], num_steps=30, num_samples=2000)
    monkeypatch.setitem(deep_linear.SIZE_CLASSES, "1k", shorter)
    (row,) = _rows(tmp_path / "rows.json", "--networks", "1", "--chains", "3", "--paper")
    assert row["steps"] == 90


def test_dln_counts_the_pilots_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated estimates say what they took in all: at most a fifth more than the chains themselves."""
    monkeypatch.setattr(networks, "CALIBRATED_STEPS", 400)
    (row,) = _rows(tmp_path / "rows.json", "--networks", "1", "--chains", "3")
    assert 1200 < row["steps"] <= 1440


def test_what_can_not_be_estimated_is_null(tmp_path: Path) -> None:
    """Too few draws for an error bar: null, since NaN is no JSON; the screen says nan."""
    path = tmp_path / "rows.json"
    (row,) = _rows(path, "--paper", "--networks", "1", "--chains", "1", "--steps", "10")
    assert row["llc_stderr"] is None and math.isfinite(row["llc_mean"])
    assert "NaN" not in path.read_text()


def test_lost_estimates_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every chain is lost, the row has null and the warning, and the run and its picture go on."""
    pytest.importorskip("matplotlib")
    wild = dataclasses.replace(deep_linear.SIZE_CLASSES["1k"], lr=1e3, num_samples=2000)
    monkeypatch.setitem(deep_linear.SIZE_CLASSES, "1k", wild)
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["--paper", "--networks", "2", "--steps", "50", "--json", str(rows), "--plot", str(plot)]
    result = invoke("dln", "--no-progress", *arguments)
    assert result.exit_code == 0, result.output
    for row in json.loads(rows.read_text()):
        assert row["llc_mean"] is None and row["rel_error"] is None
        assert any("non-finite" in w for w in row["warnings"])
    assert "warning: " in result.output and "median" not in result.output
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "2k"], ["--size", "'2k'", "1k, 10k, 1M, 10M, 30M, 100M"]),
        (["--networks", "0"], ["--networks"]),
        (["--steps", "9"], ["--steps"]),
        (["--chains", "0"], ["--chains"]),
        (["--seed", "-1"], ["--seed"]),
        (["--chains", "two"], ["--chains"]),
        (["--colour", "red"], ["--colour"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_wrong_arguments(arguments: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A usage error (exit status 2) that names the option, before any network is made."""
    monkeypatch.setattr(deep_linear, "make_problem", lambda *_: pytest.fail("a network was made"))
    result = invoke("dln", *arguments)
    assert result.exit_code == 2
    for words in said:
        assert words in printed(result)


@pytest.mark.parametrize("command", ["dln", "demo"])
def test_ctrl_c_ends_it_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """In the chains of the third network: no other is begun, its row is marked, the median is that of the two others,
    the files are written, and the exit status is the usual one."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(networks, "CALIBRATED_STEPS", 60)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--no-progress",
        "--json",
        "rows.json",
        *(["--networks", "9", "--steps", "60"] if command == "dln" else []),
    ]
    with interrupted_after(2 * 60 + 30):
        result = invoke(command, *arguments, "--plot", "plot.png")
    assert result.exit_code == 130, result.output
    rows = json.loads(Path("rows.json").read_text())
    assert [row["is_partial"] for row in rows] == [False, False, True]
    assert any("interrupted after" in warning for warning in rows[2]["warnings"])
    assert "stopped: 2 of 9 networks are done" in result.output and "over 2 networks" in result.output
    assert Path("plot.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("done", [0, 2])
def test_ctrl_c_between_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """While a network is made: the rows so far."""
    pytest.importorskip("matplotlib")
    original, seeds = deep_linear.make_problem, list[int]()

    def stopped(size: str, seed: int, device: str) -> Any:
        seeds.append(seed)
        if len(seeds) > done:
            raise KeyboardInterrupt
        return original(size, seed, device)

    monkeypatch.setattr(deep_linear, "make_problem", stopped)
    arguments = ["--networks", "4", "--steps", "20", "--no-progress", "--plot", str(tmp_path / "plot.png"), "--json"]
    result = invoke("dln", *arguments)
    assert result.exit_code == 130 and len(json.loads(result.stdout)) == done
    assert f"stopped: {done} of 4 networks are done" in result.stderr
    assert (tmp_path / "plot.png").exists() is bool(done)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo estimates nine networks of two classes and leaves one picture in the working folder."""
    pytest.importorskip("matplotlib")
    for size, settings in list(deep_linear.SIZE_CLASSES.items()):
        monkeypatch.setitem(deep_linear.SIZE_CLASSES, size, dataclasses.replace(settings, num_samples=2000))
    monkeypatch.setattr(networks, "CALIBRATED_STEPS", 20)
    monkeypatch.chdir(tmp_path)
    result = invoke("demo", "--no-progress", "--json", "rows.json")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("rows.json").read_text())
    assert [row["size"] for row in rows] == ["1k"] * 6 + ["10k"] * 3
    assert {p.name for p in tmp_path.iterdir()} == {"llc_fast_demo.png", "rows.json"}
    assert Path("llc_fast_demo.png").read_bytes().startswith(PNG)
