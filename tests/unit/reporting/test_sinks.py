"""Copies of the journal: the same rows, and after a resume no step twice."""

import csv
import itertools
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from opsin.reporting.journal import Journal, Row, Sink, quantile_names, read_rows
from opsin.reporting.painter import Plots
from opsin.reporting.plots import draw_run
from opsin.reporting.sinks import CsvTable, TensorBoard, TextLog
from tests.story import Calm, Story
from tests.unit.reporting.test_journal import Lost

ALL: tuple[type[Sink], ...] = (CsvTable, TensorBoard, Plots, TextLog)


def open_journal(folder: Path, *kinds: type[Sink]) -> Journal:
    return Journal(folder, [kind(folder, Calm()) for kind in kinds], teller=Calm())


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(item.step, item.value) for item in reader.Scalars(name)]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_holds_every_row_and_gains_columns(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, CsvTable)
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
    journal = open_journal(tmp_path, TensorBoard)
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
    journal = open_journal(tmp_path, TextLog)
    journal.log(1, 0.5, {"train/loss": 1.5}, time_s=1.0)
    journal.event("checkpoint", 1, path="checkpoints/step-00000001")
    before = (tmp_path / "log.txt").read_text()
    journal.rewind(0)
    after = (tmp_path / "log.txt").read_text()
    assert after.startswith(before)
    assert "step 1  epoch 0.500  train/loss 1.5\n" in after
    assert 'step 1  checkpoint  path="checkpoints/step-00000001"\n' in after
    assert "continues after step 0" in after


def test_the_text_log_of_a_new_run_continues_nothing(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, TextLog)
    journal.rewind(0)
    journal.log(1, 0.5, {"train/loss": 1.5}, time_s=1.0)
    journal.close()
    assert "continues" not in (tmp_path / "log.txt").read_text()


def test_a_sink_of_ones_own_implements_only_what_it_needs(tmp_path: Path) -> None:
    class Steps(Sink):
        name = "steps.txt"

        def write(self, row: Row) -> None:
            with (self.folder / self.name).open("a") as file:
                file.write(f"{row.step}\n")

    journal = open_journal(tmp_path, Steps)
    journal.log(1, 0.5, {"train/loss": 1.5}, time_s=1.0)
    journal.event("checkpoint", 1)
    journal.rewind(1)
    journal.log(2, 1.0, {"train/loss": 1.25}, time_s=2.0)
    journal.close()
    assert (tmp_path / "steps.txt").read_text() == "1\n2\n"


def test_tensorboard_has_quantiles_as_a_histogram(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, TensorBoard)
    sizes = [0.0, 0.01, 0.01, 0.1, 1.0, 10.0]
    quantiles = dict(zip(quantile_names("gradients", "layer_00"), sizes, strict=True))
    journal.log(1, 0.5, {**quantiles, "train/loss": 1.0, "gradients/odd_q05": 1.0}, time_s=1.0)
    journal.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(reader.Tags()["scalars"]) == {"epoch", "gradients/odd_q05", "train/loss"}
    (seen,) = reader.Histograms("gradients/layer_00 (log10)")
    assert seen.histogram_value.bucket_limit == pytest.approx([-30, -2, -1, 0, 1])
    assert seen.histogram_value.bucket == pytest.approx([0.05, 0.45, 0.25, 0.2, 0.05])


def test_tensorboard_goes_on_after_a_folder_could_not_be_written(tmp_path: Path) -> None:
    story = Story()
    journal = Journal(tmp_path, [TensorBoard(tmp_path, story), CsvTable(tmp_path, story)], teller=story)
    (tmp_path / "tensorboard").touch()  # a file where the folder should be
    journal.log(1, 0.5, {"train/loss": 1.0}, time_s=1.0)
    (tmp_path / "tensorboard").unlink()
    journal.log(2, 0.6, {"train/loss": 0.5}, time_s=2.0)
    journal.close()
    assert len(story.warnings) == 1
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]


VALUES = {"train/loss": 1.0, "train/lr": 0.1}


def painter(sink: Plots) -> int:
    """The process that draws."""
    assert sink._painter is not None
    return sink._painter.pid


def is_drawn_again(picture: Path, journal: Journal, steps: Iterator[int]) -> bool:
    """Whether rows alone, as training writes them, bring a new picture (at most a minute is waited)."""
    picture.unlink(missing_ok=True)
    for _ in range(600):
        step = next(steps)
        journal.log(step, step / 10, {"val/loss": 1.0 / step}, time_s=step)
        if picture.exists():
            return True
        select.select([], [], [], 0.1)
    return False


def test_pictures_are_made_while_training_and_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path, [Plots(tmp_path, Calm(), every_s=0.0)], teller=Calm())
    steps = itertools.count(1)
    assert is_drawn_again(tmp_path / "plots" / "loss.png", journal, steps)
    journal.close()


def test_at_the_end_the_pictures_show_the_whole_run(tmp_path: Path) -> None:
    sink = Plots(tmp_path, Calm())
    journal = Journal(tmp_path, [sink], teller=Calm())
    for step in range(1, 40):
        journal.log(step, step / 10, VALUES, time_s=step)
    assert sink._painter is None  # a short run is not disturbed
    journal.close()
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(pictures) == {"loss.png", "schedule.png"}
    assert pictures == {path.name: path.read_bytes() for path in draw_run(tmp_path)}


def test_after_a_resume_the_pictures_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    broken, straight = tmp_path / "broken" / "run", tmp_path / "straight" / "run"
    broken.mkdir(parents=True)
    straight.mkdir(parents=True)
    journal = open_journal(broken, Plots)
    for step in range(1, 30):
        journal.log(step, step / 10, VALUES if step < 20 else {"train/loss": 9.0}, time_s=step)
    journal.close()
    for folder, first in ((broken, 20), (straight, 1)):
        journal = open_journal(folder, Plots)
        journal.rewind(first - 1)
        for step in range(first, 40):
            journal.log(step, step / 10, VALUES, time_s=step)
        journal.close()
    for name in ("loss.png", "schedule.png"):
        assert (broken / "plots" / name).read_bytes() == (straight / "plots" / name).read_bytes()


def test_a_drawing_is_not_asked_for_while_one_is_made(tmp_path: Path) -> None:
    sink = Plots(tmp_path, Calm(), every_s=0.0)
    journal = Journal(tmp_path, [sink], teller=Calm())
    journal.log(1, 0.1, {"val/loss": 1.0}, time_s=1.0)
    os.kill(painter(sink), signal.SIGSTOP)  # a very slow drawing
    for step in range(2, 2000):
        journal.log(step, step / 10, {"val/loss": 1.0}, time_s=step)
    process = sink._painter
    assert process is not None
    assert process.stdin is not None
    assert process.stdout is not None
    process.send_signal(signal.SIGCONT)
    process.stdin.close()  # as when training was killed: it answers what it was asked, and ends
    assert len(process.stdout.readlines()) == 1
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_a_drawing_that_hangs_does_not_hold_the_end(tmp_path: Path) -> None:
    story = Story()
    sink = Plots(tmp_path, story, every_s=0.0, patience_s=0.2)
    journal = Journal(tmp_path, [sink], teller=Calm())
    journal.log(1, 0.1, {"val/loss": 1.0}, time_s=1.0)
    process = painter(sink)
    os.kill(process, signal.SIGSTOP)
    journal.close()
    assert len(story.warnings) == 1
    assert "not ready after 0.2 s" in story.warnings[0]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_what_cannot_be_drawn_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "plots").touch()  # a file where the folder should be
    story = Story()
    sink = Plots(tmp_path, story, every_s=0.0)
    journal = Journal(tmp_path, [sink], teller=Calm())
    for step in (1, 2, 3):
        journal.log(step, step / 10, {"val/loss": 1.0}, time_s=step)
        sink._hear(wait_s=60.0)
        sink._next_s = 0.0
    (tmp_path / "plots").unlink()
    journal.close()
    assert len(story.warnings) == 1
    assert "plots: cannot be written" in story.warnings[0]
    assert (tmp_path / "plots" / "loss.png").exists()  # there is room again


def test_a_killed_painter_is_one_warning_and_the_end_is_drawn_by_another(tmp_path: Path) -> None:
    story = Story()
    sink = Plots(tmp_path, story, every_s=0.0)
    journal = Journal(tmp_path, [sink], teller=Calm())
    journal.log(1, 0.1, {"val/loss": 1.0}, time_s=1.0)
    os.kill(painter(sink), signal.SIGKILL)
    sink._hear(wait_s=60.0)
    assert len(story.warnings) == 1
    assert "has ended" in story.warnings[0]
    journal.close()
    assert (tmp_path / "plots" / "loss.png").exists()


def test_a_run_that_was_taken_over_is_left_as_it_is_and_nothing_draws_on(tmp_path: Path) -> None:
    owner = Lost(tmp_path)
    sinks = [kind(tmp_path, Calm()) for kind in (CsvTable, TensorBoard, TextLog)]
    plots = Plots(tmp_path, Calm(), every_s=0.0)
    journal = Journal(tmp_path, [*sinks, plots], teller=Calm(), owner=owner)
    journal.log(1, 0.1, {"val/loss": 1.0}, time_s=1.0)
    process = painter(plots)
    os.kill(process, signal.SIGSTOP)  # it draws
    owner.is_lost = True
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    journal.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_run_without_rows_starts_no_process(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, Plots)
    journal.close()
    assert not (tmp_path / "plots").exists()
