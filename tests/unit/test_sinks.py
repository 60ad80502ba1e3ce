"""Copies of the journal: the same rows, and after a resume no step twice."""

import csv
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from opsin.reporting import Journal, read_rows
from opsin.sinks import CsvTable, SinkName, TensorBoard, open_sinks

ALL: tuple[SinkName, ...] = ("csv", "tensorboard", "text")


def open_journal(folder: Path, *names: SinkName) -> Journal:
    faults: list[str] = []
    journal = Journal(folder, open_sinks(folder, names, notice=faults.append), warn=faults.append)
    assert not faults
    return journal


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(item.step, item.value) for item in reader.Scalars(name)]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_holds_every_row_and_gains_columns(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, "csv")
    journal.log(1, 0.5, {"train/loss": 1.5}, time_s=1.0)
    journal.log(2, 1.0, {"train/loss": 1.25}, time_s=2.0)
    journal.log(2, 1.0, {"val/top1": 0.75}, time_s=2.0)
    assert len(table(tmp_path)) == 2  # a new epoch began
    journal.close()
    assert table(tmp_path) == [
        {"step": "1", "epoch": "0.5", "time_s": "1.0", "train/loss": "1.5", "val/top1": ""},
        {"step": "2", "epoch": "1.0", "time_s": "2.0", "train/loss": "1.25", "val/top1": "0.75"},
    ]


def test_tensorboard_reads_each_value_once(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        journal.log(step, step / 2, {"train/loss": 2.0**-step}, time_s=step)
        journal.log(step, step / 2, {"val/top1": 0.5}, time_s=step)
    journal.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert scalars(tmp_path, "val/top1") == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_after_a_resume_no_step_stands_twice(tmp_path: Path) -> None:
    first = open_journal(tmp_path, *ALL)
    for step in (1, 2, 3, 4):
        first.log(step, step, {"train/loss": 1.0}, time_s=step)
    resumed = open_journal(tmp_path, *ALL)  # as after a kill: nothing was closed
    resumed.rewind(2)
    for step in (3, 4, 5):
        resumed.log(step, step, {"train/loss": 0.5}, time_s=step)
    resumed.close()
    expected = [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.5)]
    assert [(row.step, row.values["train/loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == expected
    assert [(int(row["step"]), float(row["train/loss"])) for row in table(tmp_path)] == expected
    assert scalars(tmp_path, "train/loss") == expected


def test_the_text_log_is_plain_and_only_grows(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, "text")
    journal.log(1, 0.5, {"train/loss": 1.5}, time_s=1.0)
    journal.event("checkpoint", 1, path="checkpoints/step-00000001")
    before = (tmp_path / "log.txt").read_text()
    journal.rewind(0)
    after = (tmp_path / "log.txt").read_text()
    assert after.startswith(before)
    assert "step 1  epoch 0.500  train/loss 1.5\n" in after
    assert 'step 1  checkpoint  path="checkpoints/step-00000001"\n' in after
    assert "continues after step 0" in after


def test_a_missing_package_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notices: list[str] = []
    sinks = open_sinks(tmp_path, ALL, notice=notices.append)
    assert [sink.name for sink in sinks] == ["log.csv", "log.txt"]
    assert len(notices) == 1
    assert "pip install tensorboard" in notices[0]


def test_tensorboard_goes_on_after_a_folder_could_not_be_written(tmp_path: Path) -> None:
    warnings: list[str] = []
    journal = Journal(tmp_path, [TensorBoard(tmp_path), CsvTable(tmp_path)], warn=warnings.append)
    (tmp_path / "tensorboard").touch()  # a file where the folder should be
    journal.log(1, 0.5, {"train/loss": 1.0}, time_s=1.0)
    (tmp_path / "tensorboard").unlink()
    journal.log(2, 0.6, {"train/loss": 0.5}, time_s=2.0)
    journal.close()
    assert len(warnings) == 1
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]
