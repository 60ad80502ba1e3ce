"""The journal keeps every row once, through crashes, resumes and full disks."""

import contextlib
import itertools
import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opsin.errors import LockLost, RunError
from opsin.reporting.journal import Event, Journal, Row, Sink, read_events, read_rows
from opsin.storage.directory import RunDirectory
from opsin.storage.teller import Teller
from tests.story import Calm, Story


class Memory(Sink):
    """A sink that keeps what reaches it, and can be full."""

    name = "memory"

    def __init__(self) -> None:
        super().__init__(Path("nowhere"), Calm())
        self.full = False
        self.entries: list[Row | Event | str] = []

    def write(self, row: Row) -> None:
        self._keep(row)

    def event(self, event: Event) -> None:
        self._keep(event)

    def catch_up(self, step: int) -> None:
        self._keep(f"catch up {step}")

    def rewind(self, step: int) -> None:
        self._keep(f"rewind {step}")

    def close(self) -> None:
        self._keep("close")

    def abandon(self) -> None:
        self._keep("abandon")

    def _keep(self, entry: Row | Event | str) -> None:
        if self.full:
            raise OSError("no space left")
        self.entries.append(entry)


class Lost(RunDirectory):
    """A run directory that another process can take over."""

    is_lost = False

    def check_held(self) -> None:
        if self.is_lost:
            raise LockLost("taken over")


def open_journal(folder: Path, *sinks: Sink, teller: Teller | None = None) -> Journal:
    return Journal(folder, sinks, teller=teller or Calm())


def log(journal: Journal, step: int, **values: float) -> None:
    journal.log(step, step / 10, {name.replace("_", "/", 1): value for name, value in values.items()}, time_s=step / 2)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[str]:
    return (folder / name).read_text().splitlines()


def test_a_row_is_one_line_with_its_place_first_and_sorted_values(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.log(5, 0.5, {"train/lr": 0.1, "train/loss": 2.5}, time_s=1.25)
    assert lines(tmp_path) == ['{"step": 5, "epoch": 0.5, "time_s": 1.25, "train/loss": 2.5, "train/lr": 0.1}']
    assert journal.rows() == [Row(5, 0.5, 1.25, {"train/loss": 2.5, "train/lr": 0.1})]


def test_values_of_the_last_step_are_added_to_its_row(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log(journal, 1, train_loss=2.0)
    log(journal, 2, train_loss=1.0)
    log(journal, 2, val_top1=0.5)
    assert [row.step for row in journal.rows()] == [1, 2]
    assert journal.row(2) == {"train/loss": 1.0, "val/top1": 0.5}
    assert journal.row(1) == {}


def test_a_row_that_becomes_shorter_leaves_no_rest(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log(journal, 1, train_loss=0.123456789012)
    log(journal, 1, train_loss=0.5)
    log(journal, 2, train_loss=0.25)
    assert [json.loads(line)["train/loss"] for line in lines(tmp_path)] == [0.5, 0.25]


def test_an_earlier_step_is_our_own_fault(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log(journal, 2)
    with pytest.raises(AssertionError, match="step 1 is logged after step 2"):
        log(journal, 1)


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log(journal, 1, train_loss=math.inf)
    journal.event("step_cancelled", 1, loss=math.nan, norms=[1.0, math.inf])
    assert '"train/loss": null' in lines(tmp_path)[0]
    assert math.isnan(journal.rows()[0].values["train/loss"])
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event.facts == {"loss": None, "norms": [1.0, None]}


def test_rewind_forgets_later_rows_events_and_the_torn_line(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for step in (10, 20, 30):
        log(journal, step, train_loss=1 / step)
        journal.event("checkpoint", step)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 40, "epo')
    sink = Memory()
    resumed = open_journal(tmp_path, sink)
    resumed.rewind(20)
    assert sink.entries == ["rewind 20"]
    assert [row.step for row in resumed.rows()] == [10, 20]
    assert [event.step for event in read_events(tmp_path / "events.jsonl")] == [10, 20]
    log(resumed, 20, val_top1=0.5)
    log(resumed, 30, train_loss=0.0)
    assert [row.step for row in read_rows(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    assert resumed.row(30) == {"train/loss": 0.0}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_cut_anywhere_is_continued_without_a_torn_or_double_row(tmp_path: Path, cut: int) -> None:
    journal = open_journal(tmp_path)
    for step in range(1, 4):
        log(journal, step, train_loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    journal = open_journal(tmp_path)
    for step in (3, 4):
        log(journal, step, train_loss=2.0)
    steps = [json.loads(line)["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps))
    assert steps[-2:] == [3, 4]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_bit_that_changes_costs_lines_and_no_resume(tmp_path: Path, name: str) -> None:
    journal = open_journal(tmp_path)
    for step in (1, 2):
        log(journal, step, train_loss=1.0)
        journal.event("step_cancelled", step)
    content = (tmp_path / name).read_bytes()
    for place, bit in itertools.product(range(len(content)), range(8)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        (tmp_path / name).write_bytes(damaged)
        journal = open_journal(tmp_path)
        assert len(journal.rows()) <= 2
        assert len(journal.events("step_cancelled")) <= 2


@pytest.mark.parametrize(
    "line", ["{}", '{"step": 2}', '{"step": "2", "epoch": 0, "time_s": 1}', '{"step": true, "epoch": 0, "time_s": 1}']
)
def test_a_line_without_its_place_is_skipped(tmp_path: Path, line: str) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_text(line + "\n")
    journal = open_journal(tmp_path)
    journal.rewind(2)
    log(journal, 2, train_loss=1.0)
    journal.event("resumed", 2)
    assert [row.step for row in journal.rows()] == [2]
    assert [event.step for event in journal.events("resumed")] == [2]


def test_a_folder_that_cannot_be_rewound_is_a_run_error(tmp_path: Path) -> None:
    log(open_journal(tmp_path), 1)
    journal = open_journal(tmp_path)
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(RunError, match="cannot rewind the log to step 0"):
        journal.rewind(0)


def test_nothing_is_written_once_the_run_is_another_process_s(tmp_path: Path) -> None:
    sink, owner = Memory(), Lost(tmp_path)
    journal = Journal(tmp_path, [sink], teller=Calm(), owner=owner)
    log(journal, 1, train_loss=1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    owner.is_lost = True
    calls: list[Callable[[], None]] = [lambda: log(journal, 2, train_loss=1.0), lambda: journal.rewind(0)]
    for call in calls:
        with pytest.raises(LockLost):
            call()
    journal.event("failed", 2, reason="taken over")
    journal.summarize(steps=2, seconds=1.0)
    journal.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sink.entries[1:] == ["abandon"]


def test_the_summary_holds_last_and_best_of_each_score(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log(journal, 1, val_top1=0.5, val_loss=1.0, train_lr=0.1)
    log(journal, 2, val_top1=0.7, val_loss=0.5, train_lr=0.2)
    log(journal, 3, val_top1=0.6, val_loss=math.nan, train_lr=0.3)
    journal.summarize(steps=3, seconds=1.5, peak_memory_bytes=1024)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 3,
        "seconds": 1.5,
        "peak_memory_bytes": 1024,
        "scores": {
            "train/lr": {"last": 0.3},
            "val/loss": {"last": None, "best": 0.5, "best_step": 2},
            "val/top1": {"last": 0.6, "best": 0.7, "best_step": 2},
        },
    }


def test_a_resumed_journal_knows_the_best_of_the_rows_it_keeps(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log(journal, 1, val_top1=0.5)
    log(journal, 2, val_top1=0.9)
    resumed = open_journal(tmp_path)
    assert resumed.best("val/top1") == 0.9
    resumed.rewind(1)
    assert resumed.best("val/top1") == 0.5
    assert resumed.best("val/loss") is None


def test_a_failing_sink_gets_everything_once_it_recovers(tmp_path: Path) -> None:
    sink, story = Memory(), Story()
    journal = open_journal(tmp_path, sink, teller=story)
    sink.full = True
    for step in (1, 2, 3):
        log(journal, step, train_loss=1.0)
    assert len(story.warnings) == 1
    assert "memory" in story.warnings[0]
    sink.full = False
    log(journal, 4, train_loss=1.0)
    assert [entry.step for entry in sink.entries if isinstance(entry, Row)] == [1, 2, 3, 4]
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event.kind, event.step, event.facts) == ("log_recovered", 4, {"log": "memory"})


def test_rows_wait_while_the_metrics_file_cannot_be_written(tmp_path: Path) -> None:
    story = Story()
    journal = open_journal(tmp_path, teller=story)
    log(journal, 1, train_loss=1.0)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "aside")
    (tmp_path / "metrics.jsonl").mkdir()  # opening it fails, for root too
    log(journal, 2, train_loss=1.0)
    log(journal, 2, val_top1=0.5)
    log(journal, 3, train_loss=1.0)
    assert len(story.warnings) == 1
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "aside").rename(tmp_path / "metrics.jsonl")
    log(journal, 4, train_loss=1.0)
    assert [row.step for row in journal.rows()] == [1, 2, 3, 4]
    assert journal.rows()[1].values == {"train/loss": 1.0, "val/top1": 0.5}


@contextlib.contextmanager
def room_for(path: Path, more_bytes: int) -> Iterator[None]:
    """No file may outgrow `path` by more than this: the system cuts the write that does, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_that_took_half_a_line_leaves_whole_lines(tmp_path: Path) -> None:
    story = Story()
    journal = open_journal(tmp_path, teller=story)
    log(journal, 1, train_loss=1.0)
    with room_for(tmp_path / "metrics.jsonl", 20):
        log(journal, 1, val_top1=0.5)
        log(journal, 2, train_loss=1.0)
        assert not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    log(journal, 3, train_loss=1.0)
    assert len(story.warnings) == 1
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert journal.rows()[0].values == {"train/loss": 1.0, "val/top1": 0.5}


def test_what_is_never_written_is_told_at_the_end(tmp_path: Path) -> None:
    sink, story = Memory(), Story()
    journal = open_journal(tmp_path, sink, teller=story)
    sink.full = True
    log(journal, 1, train_loss=1.0)
    journal.close()
    assert story.warnings[-1] == "memory: 2 entries could not be written and are lost: no space left"
