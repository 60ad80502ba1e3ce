"""Logs that fail while training goes on: one notice, nothing unbounded, and what can be made good is."""

import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.reporting.journal import Journal, Row, read_events, read_rows
from opsin.reporting.lines import LineFile
from opsin.reporting.outlets import write_if_possible
from opsin.reporting.sinks import CsvTable, TensorBoard, TextLog
from opsin.training.checkpoints.format import find_checkpoints
from tests.digits_run import train_digits
from tests.story import Calm, Story
from tests.unit.reporting.test_journal import Memory
from tests.unit.reporting.test_sinks import scalars, table

MOST = 10_000
"""Entries of a file or sink that wait at most."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(options, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                if file.write(bytes(size)) < size:
                    size //= 2
            except OSError:
                size //= 2
    return path


def log(journal: Journal, step: int) -> None:
    journal.log(step, step / 10, {"train/loss": float(step)}, time_s=step)


@pytest.mark.chaos
def test_a_full_disk_costs_one_warning_for_each_log_and_no_row(small_disk: Path) -> None:
    story = Story()
    sinks = [kind(small_disk, story) for kind in (CsvTable, TensorBoard, TextLog)]
    journal = Journal(small_disk, sinks, teller=story)
    log(journal, 1)
    filler = fill(small_disk)
    for step in range(2, 60):
        log(journal, step)
        journal.log(step, step / 10, {"val/top1": 0.5}, time_s=step)
        if step % 20 == 0:
            journal.event("alert", step, message="x")
    first_words = sorted(text.split()[0] for text in story.warnings)
    assert first_words == sorted(set(first_words))
    assert "metrics.jsonl" in first_words
    filler.unlink()
    log(journal, 60)
    journal.summarize(steps=60, seconds=1.0)
    journal.close()
    steps = list(range(1, 61))
    assert [row.step for row in read_rows(small_disk / "metrics.jsonl")] == steps
    assert [step for step, _ in scalars(small_disk, "train/loss")] == steps
    assert [int(row["step"]) for row in table(small_disk)] == steps
    kinds = [event.kind for event in read_events(small_disk / "events.jsonl")]
    assert kinds.count("alert") == 2
    assert "log_recovered" in kinds


def test_no_checkpoint_survives_a_power_cut_that_its_rows_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    durable: dict[str, list[int]] = {}
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append(path.name)
        if path.suffix == ".jsonl":
            durable[path.name] = [json.loads(line)["step"] for line in path.read_text().splitlines()]

    def renamed(before: Path, after: Path) -> None:
        if (step := after.name.removeprefix("step-")).isdecimal():
            assert {"metrics.jsonl", "events.jsonl", tmp_path.name} <= {*calls}
            assert int(step) in durable["metrics.jsonl"], "the row of its step"
            calls.clear()
        rename(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    train_digits(tmp_path, "checkpoints.keep=9", "checkpoints.every=2 steps")
    monkeypatch.undo()
    assert len(find_checkpoints(tmp_path / "checkpoints")) >= 4


def test_a_log_that_cannot_be_synced_is_one_warning_and_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story()
    journal = Journal(tmp_path, teller=story)
    journal.sync()
    assert story.warnings == [], "nothing was written yet"
    log(journal, 1)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    journal.sync()
    journal.sync()
    assert story.warnings == [f"{tmp_path}: a power cut may cost rows of the log: Input/output error"]


def test_rows_that_wait_too_long_are_lost_from_the_oldest_on_and_counted(tmp_path: Path) -> None:
    story = Story()
    journal = Journal(tmp_path, teller=story)
    (tmp_path / "metrics.jsonl").mkdir()
    for step in range(1, MOST + 6):
        log(journal, step)
    journal.log(MOST + 5, 1.0, {"val/top1": 0.5}, time_s=1.0)
    (tmp_path / "metrics.jsonl").rmdir()
    log(journal, MOST + 6)
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    assert [row.step for row in rows] == list(range(8, MOST + 7))
    assert rows[-2].values["val/top1"] == 0.5
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event.facts == {"log": "metrics.jsonl", "lost": 7}
    assert len(story.warnings) == 1


def test_a_sink_that_failed_too_long_makes_good_from_the_metrics(tmp_path: Path) -> None:
    sink, story = Memory(), Story()
    journal = Journal(tmp_path, [sink], teller=story)
    sink.full = True
    for step in range(1, MOST + 3):
        log(journal, step)
    sink.full = False
    log(journal, MOST + 3)
    rows = [entry.step for entry in sink.entries if isinstance(entry, Row)]
    assert sink.entries[0] == f"catch up {MOST + 3}"
    assert rows == [MOST + 1, MOST + 2, MOST + 3]
    assert len(story.warnings) == 1


class Slow(Memory):
    """A sink that takes a while to fail."""

    asked = 0

    def write(self, row: Row) -> None:
        self.asked += 1
        time.sleep(0.06)
        raise OSError("no answer")


def test_a_sink_that_is_slow_to_fail_is_asked_rarely(tmp_path: Path) -> None:
    sink = Slow()
    journal = Journal(tmp_path, [sink], teller=Story())
    for step in range(1, 30):
        log(journal, step)
    assert sink.asked <= 5


def test_tensorboard_gets_the_rows_of_sessions_that_had_none(tmp_path: Path) -> None:
    first = Journal(tmp_path, teller=Calm())
    for step in (1, 2, 3):
        log(first, step)
    first.close()
    second = Journal(tmp_path, [TensorBoard(tmp_path, Calm())], teller=Calm())
    second.rewind(2)
    log(second, 3)
    log(second, 4)
    second.close()
    third = Journal(tmp_path, teller=Calm())
    third.rewind(4)
    for step in (5, 6):
        log(third, step)
    third.close()
    fourth = Journal(tmp_path, [TensorBoard(tmp_path, Calm())], teller=Calm())
    fourth.rewind(6)
    log(fourth, 7)
    fourth.close()
    assert scalars(tmp_path, "train/loss") == [(step, float(step)) for step in range(1, 8)]


def test_what_tensorboard_lost_at_the_end_is_there_after_a_resume(tmp_path: Path) -> None:
    story = Story()
    first = Journal(tmp_path, [TensorBoard(tmp_path, Calm())], teller=story)
    log(first, 1)
    (tmp_path / "tensorboard").rename(tmp_path / "aside")
    (tmp_path / "tensorboard").touch()  # a file where the folder should be
    log(first, 2)
    first.close()
    assert "lost" in story.warnings[-1]
    (tmp_path / "tensorboard").unlink()
    (tmp_path / "aside").rename(tmp_path / "tensorboard")
    second = Journal(tmp_path, [TensorBoard(tmp_path, Calm())], teller=Calm())
    second.rewind(2)
    log(second, 3)
    second.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_torn_tensorboard_file_is_made_whole_by_a_resume(tmp_path: Path) -> None:
    first = Journal(tmp_path, [TensorBoard(tmp_path, Calm())], teller=Calm())
    for step in (1, 2, 3):
        log(first, step)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    second = Journal(tmp_path, [TensorBoard(tmp_path, Calm())], teller=Calm())
    second.rewind(3)
    log(second, 4)
    second.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_the_table_is_made_again_after_a_failure(tmp_path: Path) -> None:
    story = Story()
    (tmp_path / "log.csv").mkdir()
    journal = Journal(tmp_path, [CsvTable(tmp_path, Calm())], teller=story)
    log(journal, 10)
    (tmp_path / "log.csv").rmdir()
    log(journal, 20)
    journal.close()
    assert [int(row["step"]) for row in table(tmp_path)] == [10, 20]
    assert len(story.warnings) == 1


def test_lines_of_the_console_wait_for_room_in_the_text_log(tmp_path: Path) -> None:
    text = TextLog(tmp_path, Calm())
    (tmp_path / "log.txt").mkdir()
    text.say("first")
    text.say("second")
    (tmp_path / "log.txt").rmdir()
    text.say("third")
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "first",
        "second",
        "third",
    ]


def test_a_file_that_a_run_can_do_without_costs_one_warning(tmp_path: Path) -> None:
    story = Story()
    write = write_if_possible(story)
    (tmp_path / "maps").touch()  # a file where the folder should be
    for _ in range(3):
        write(tmp_path / "maps" / "picture.png", b"x")
    assert len(story.warnings) == 1
    (tmp_path / "maps").unlink()
    write(tmp_path / "maps" / "picture.png", b"x")
    assert (tmp_path / "maps" / "picture.png").read_bytes() == b"x"


@pytest.mark.usefixtures("torch_switches")
def test_a_training_whose_logs_all_fail_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_digits(tmp_path / "well", "log.csv=true", "log.tensorboard=true")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_bytes((tmp_path / "well" / "recipe.yaml").read_bytes())
    blocked = ("summary.json", "log.csv", "log.txt", "confusion.json")
    for name in blocked:
        (broken / name).mkdir()  # opening it fails, for root too
    (broken / "tensorboard").touch()
    train_digits(broken, "log.csv=true", "log.tensorboard=true")
    first, second = ((path / "model.safetensors").read_bytes() for path in (tmp_path / "well", broken))
    assert first == second
    told = capsys.readouterr().out
    assert len([line for line in told.splitlines() if "cannot be written" in line]) == len(blocked) + 1
    assert "log.csv cannot be written: Is a directory; training goes on" in told
    assert "Errno" not in told


@pytest.mark.parametrize("is_over", [False, True])
def test_after_a_rewind_nothing_that_waited_stands_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_over: bool
) -> None:
    journal, write, is_full = Journal(tmp_path, teller=Story()), LineFile.write, True

    def failing(self: LineFile, line: bytes, *, step: int | None = None) -> None:
        if is_full:
            raise OSError("no space left on the device")
        write(self, line, step=step)

    log(journal, 1)
    monkeypatch.setattr(LineFile, "write", failing)
    for step in (2, 3):
        log(journal, step)
        journal.event("alert", step)
    is_full = not is_over
    journal.rewind(2)
    is_full = False
    for step in (3, 4):
        log(journal, step)
        journal.event("alert", step)
    assert [row.step for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [event.step for event in read_events(tmp_path / "events.jsonl") if event.kind == "alert"] == [2, 3, 4]
