"""Numbers of a training run, in the files and services that they are written to."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from llc_fast.logs import CSVLog, FunctionLog, LightningLog, TensorBoardLog, WandBLog, as_logs

FOUND: dict[str, Any] = {"llc/mean": 2.5, "llc/num_warnings": 2, "llc/warnings": "ess rhat"}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_has_a_row_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "llc.csv"
    log = CSVLog(path)
    assert not path.exists()
    for step in (10, 2, 10):
        log.write(step, {**FOUND, "llc/mean": step / 4})
    assert [(row["step"], float(row["llc/mean"])) for row in rows(path)] == [("2", 0.5), ("10", 2.5)]


def test_a_table_is_continued_with_all_its_digits_and_columns(tmp_path: Path) -> None:
    """What a later run knows more of gets a column; what it does not know stays."""
    path = tmp_path / "llc.csv"
    CSVLog(path).write(1, {"llc/mean": 1 / 3, "note": 'a, "b"\nc'})
    CSVLog(path).write(2, FOUND)
    first, second = rows(path)
    assert float(first["llc/mean"]) == 1 / 3 and first["note"] == 'a, "b"\nc' and first["llc/warnings"] == ""
    assert second["llc/warnings"] == "ess rhat" and second["note"] == ""


@pytest.mark.parametrize(
    "content", ["epoch,loss\n1,2\n", "step,loss\nlast,2\n", "step,loss\n1,2,3\n", "step,loss\n1\n"]
)
def test_another_file_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no CSV file with a column 'step': give another name"):
        CSVLog(path)
    assert path.read_text() == content


def test_what_may_be_given(tmp_path: Path) -> None:
    class Writer:
        def add_scalar(self) -> None: ...

    class Run:
        def define_metric(self) -> None: ...

        def log(self) -> None: ...

    class Logger:
        def log_metrics(self) -> None: ...

    given = [tmp_path / "a.csv", str(tmp_path / "b.CSV"), Writer(), Run(), Logger(), print]
    kinds = [CSVLog, CSVLog, TensorBoardLog, WandBLog, LightningLog, FunctionLog]
    assert [type(log) for log in as_logs(given)] == kinds
    assert [type(log) for each in given for log in as_logs(each)] == kinds
    assert as_logs(None) == as_logs(False) == as_logs([]) == []
    with pytest.raises(ValueError, match=re.escape("log='runs/a' must be a name that ends in .csv; for TensorBoard")):
        as_logs("runs/a")
    with pytest.raises(ValueError, match="does not exist"):
        as_logs(tmp_path / "nowhere" / "a.csv")
    for wrong in (3, True, FunctionLog, {"a": 1}):
        with pytest.raises(TypeError, match=r"log must be the name of a \.csv file"):
            as_logs(wrong)


def test_a_function_may_keep_what_it_is_given() -> None:
    kept = []
    FunctionLog(lambda metrics, step: kept.append((step, metrics))).write(7, FOUND)
    assert kept == [(7, FOUND)] and kept[0][1] is not FOUND


def test_tensorboard_has_numbers_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    (log,) = as_logs(SummaryWriter(str(tmp_path)))
    log.write(3, FOUND)
    log.write(5, {**FOUND, "llc/mean": 4.0, "llc/warnings": ""})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("llc/mean")] == [(3, 2.5), (5, 4.0)]
    (text,) = events.Tensors("llc/warnings/text_summary")
    assert text.step == 3 and text.tensor_proto.string_val == [b"ess rhat"]


def test_wandb_keeps_the_steps_of_whoever_trains(tmp_path: Path) -> None:
    """Numbers go into the row that training commits next, and no step is counted for them."""
    wandb = pytest.importorskip("wandb")
    log = WandBLog()
    log.write(1, FOUND)  # there is no run yet
    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        run.log({"loss": 1.0})
        log.write(100, FOUND)
        log.write(200, {**FOUND, "llc/mean": 3.5})
        assert run.step == 1
        run.log({"loss": 2.0})
        assert run.step == 2
        found = dict(run.summary)
        assert (found["llc/mean"], found["llc/step"], found["llc/warnings"]) == (3.5, 200, "ess rhat")
        WandBLog(run, axis="train/global_step").write(300, FOUND)
        assert run.step == 3 and run.summary["train/global_step"] == 300
    finally:
        run.finish()


def test_lightnings_loggers_get_numbers_alone() -> None:
    class Logger:
        written: tuple[Any, ...] = ()

        def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
            self.written = (metrics, step)

        def save(self) -> None:
            self.is_saved = True

    logger = Logger()
    LightningLog(logger).write(4, FOUND)
    assert logger.written == ({"llc/mean": 2.5, "llc/num_warnings": 2}, 4) and logger.is_saved
