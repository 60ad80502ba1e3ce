"""Pictures of a run: which are drawn, that they follow the log, and that they touch nothing else."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.errors import RunError
from opsin.reporting import curves
from opsin.reporting.curves import EPOCH, HIGH, LOW, MAX_POINTS, MEAN, MINUTES, Curve, History
from opsin.reporting.journal import PERCENTS, Journal, Row, parse_row
from opsin.reporting.plots import RunPlots, draw_run
from tests.digits_run import train_digits
from tests.story import Calm

EVERYTHING = {
    "train/top1": 0.5,
    "train/loss": 1.5,
    "train/lr": 0.01,
    "train/momentum": 0.9,
    "train/images_per_s": 800.0,
    "time/data_ms": 1.0,
    "time/forward_ms": 20.0,
    "time/backward_ms": 40.0,
    "time/optimizer_ms": 5.0,
}


def open_journal(folder: Path) -> Journal:
    return Journal(folder, teller=Calm())


def write_rows(folder: Path, last_step: int, **values: float) -> Journal:
    journal = open_journal(folder)
    for step in range(1, last_step + 1):
        journal.log(step, step / 10, {**EVERYTHING, **values, "train/loss": 2 / step}, time_s=6.0 * step)
    return journal


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def all_of(folder: Path) -> History:
    history = History(folder / "metrics.jsonl", wanted=re.compile(".*"))
    history.refresh()
    return history


def column(history: History, name: str, which: int) -> list[float]:
    table = history.table(name)
    assert table is not None
    return [float(value) for value in table[:, which]]


def test_a_real_run_is_drawn_whole(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", "log.plots=false")
    drawn = draw_run(tmp_path / "run")
    assert {"accuracy.png", "loss.png", "schedule.png", "speed.png"} == set(names(drawn))
    for path in drawn:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            # Lines on white: neither an empty sheet nor a sheet full of ink.
            assert 0.02 < np.mean(np.asarray(picture.convert("L")) < 250) < 0.5
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == set(names(drawn))


def test_only_what_has_numbers_is_drawn(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    assert draw_run(tmp_path) == []
    assert not (tmp_path / "plots").exists()
    journal.log(1, 1.0, {"train/loss": 1.0, "train/top1": math.nan}, time_s=1.0)
    assert names(draw_run(tmp_path)) == ["loss.png"]


def test_the_picture_widens_with_the_number_of_panels(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.log(1, 1.0, {"train/lr": 0.1}, time_s=1.0)
    with Image.open(draw_run(tmp_path)[0]) as one:
        width = one.width
    journal.log(2, 2.0, {"train/lr": 0.1, "train/momentum": 0.9}, time_s=2.0)
    with Image.open(draw_run(tmp_path)[0]) as two:
        assert two.width == 2 * width


def test_gradients_are_drawn_by_part(tmp_path: Path) -> None:
    parts = {
        f"gradients/{part}_q{percent:02}": 10.0 ** (depth - 4 + percent / 100)
        for depth, part in enumerate(["layer_00", "layer_01", "head"])
        for percent in PERCENTS
    }
    journal = open_journal(tmp_path)
    for step in (1, 2):
        journal.log(step, float(step), parts, time_s=step)
    assert names(draw_run(tmp_path)) == ["gradients.png"]
    with Image.open(tmp_path / "plots" / "gradients.png") as picture:
        assert 0.02 < np.mean(np.asarray(picture.convert("L")) < 250) < 0.5


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({f"gradients/a_q{percent:02}": 0.0 for percent in PERCENTS}, id="gradients of nothing"),
        pytest.param({"gradients/a_q50": 1.0}, id="a quantile alone"),
        pytest.param(
            {f"gradients/part_{n}_q{percent:02}": 1e-3 for n in range(80) for percent in PERCENTS}, id="many parts"
        ),
        pytest.param({"train/lr": 0.0, "train/momentum": 0.0}, id="zeros"),
        pytest.param({"train/loss": -3.0}, id="negative loss"),
        pytest.param({"train/loss": math.nan, "train/lr": 1e-12}, id="nothing finite"),
        pytest.param({"train/loss": 1e30, "val/loss": 1e-30}, id="far apart"),
        pytest.param({"time/forward_ms": math.nan}, id="a part of the time is missing"),
        pytest.param({"$val_1/top1": 0.5, "_x/top1": 0.25}, id="names with signs of formulas"),
        pytest.param({f"v{index}/top1": 0.1 for index in range(12)}, id="more curves than colours"),
    ],
)
def test_odd_numbers_are_drawn_without_a_word(tmp_path: Path, values: dict[str, float]) -> None:
    journal = open_journal(tmp_path)
    for step in (1, 2, 3):
        journal.log(step, step / 2, {**EVERYTHING, **values}, time_s=step)
    journal.event("stage", 0, name="$one")
    for number in range(12):
        journal.event("stage", 2, name=f"{number} is a name longer than the sheet " * 5)
    assert draw_run(tmp_path)  # warnings are errors here


def test_stages_change_the_picture_and_a_single_one_does_not(tmp_path: Path) -> None:
    journal = write_rows(tmp_path, 20)

    def picture() -> bytes:
        draw_run(tmp_path)
        return (tmp_path / "plots" / "schedule.png").read_bytes()

    bare = picture()
    journal.event("stage", 0, name="small")
    assert picture() == bare
    journal.event("stage", 10, name="small")  # told again by a resume
    assert picture() == bare
    journal.event("stage", 12, name="large")
    assert picture() != bare


def test_a_stage_stands_where_its_step_is(tmp_path: Path) -> None:
    write_rows(tmp_path, 20)
    history = all_of(tmp_path)
    assert history.position(0) == (0.0, 0.0)
    assert history.position(10) == pytest.approx((1.0, 1.0))
    assert history.position(13) == pytest.approx((1.3, 1.3))


def test_a_short_curve_keeps_every_value(tmp_path: Path) -> None:
    journal = write_rows(tmp_path, 5)
    journal.log(5, 0.5, {"val/top1": 0.75}, time_s=30.0)
    history = all_of(tmp_path)
    assert column(history, "train/loss", MEAN) == [2 / step for step in range(1, 6)]
    assert column(history, "train/loss", EPOCH) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert column(history, "train/loss", MINUTES) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert column(history, "val/top1", MEAN) == [0.75]
    assert history.table("val/top5") is None


def test_a_long_curve_tells_mean_and_range_of_neighbours() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=100_000)
    values[70_001] = math.nan
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step / 1000, step / 60, value)
    table = curve.table()
    width = 64  # the smallest power of two that makes fewer than 2,000 points of 100,000 values
    assert len(table) == math.ceil(len(values) / width) <= MAX_POINTS
    blocks = [values[start : start + width] for start in range(0, len(values), width)]
    # The one gap weighs twice in a joint of joints: that point is compared loosely.
    exact = np.arange(len(blocks)) != 70_001 // width
    means = np.array([np.nanmean(block) for block in blocks])
    np.testing.assert_allclose(table[exact, MEAN], means[exact], atol=1e-12)
    np.testing.assert_allclose(table[:, MEAN], means, atol=0.1)
    np.testing.assert_array_equal(table[:, LOW], [np.nanmin(block) for block in blocks])
    np.testing.assert_array_equal(table[:, HIGH], [np.nanmax(block) for block in blocks])
    np.testing.assert_allclose(table[0, EPOCH], (width - 1) / 2 / 1000)


def test_reading_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write_rows(tmp_path, 30)
    history = all_of(tmp_path)
    parsed: list[bytes] = []
    parse = parse_row

    def noted(line: bytes) -> Row | None:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(curves, "parse_row", noted)
    history.refresh()
    journal.log(30, 3.0, {"val/top1": 0.5}, time_s=180.0)  # replaces the last line
    history.refresh()
    journal.log(31, 3.1, {"val/top1": 0.75}, time_s=186.0)
    history.refresh()
    steps = [json.loads(line)["step"] for line in parsed if line]
    assert steps == [30, 30, 30, 31]
    assert column(history, "val/top1", MEAN) == [0.5, 0.75]
    assert column(history, "step", MEAN) == list(range(1, 32))


def test_a_torn_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    write_rows(tmp_path, 3)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-10])
    history = all_of(tmp_path)
    assert column(history, "step", MEAN) == [1, 2]
    metrics.write_bytes(whole)
    history.refresh()
    assert column(history, "step", MEAN) == [1, 2, 3]


def test_after_a_rewind_the_curve_has_no_step_twice(tmp_path: Path) -> None:
    journal = write_rows(tmp_path, 40)
    history = all_of(tmp_path)
    journal.rewind(20)
    for step in range(21, 61):  # longer than before: the size alone does not tell
        journal.log(step, step / 10, {"train/loss": -1.0}, time_s=6.0 * step)
    history.refresh()
    assert column(history, "step", MEAN) == list(range(1, 61))
    assert column(history, "train/loss", MEAN)[20:] == [-1.0] * 40


def test_new_pictures_are_those_that_a_fresh_drawing_makes(tmp_path: Path) -> None:
    journal = write_rows(tmp_path, 10)
    plots = RunPlots(tmp_path)
    plots.draw()
    journal.log(11, 1.1, {**EVERYTHING, "val/top1": 0.5}, time_s=66.0)
    again = {path.name: path.read_bytes() for path in plots.draw()}
    assert again == {path.name: path.read_bytes() for path in draw_run(tmp_path)}


def test_drawing_draws_no_random_numbers_and_leaves_matplotlib_as_it_is(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    write_rows(tmp_path, 10)
    settings = dict(matplotlib.rcParams)
    state = random.getstate(), json.dumps([str(part) for part in np.random.get_state()])
    draw_run(tmp_path)
    assert state == (random.getstate(), json.dumps([str(part) for part in np.random.get_state()]))
    assert dict(matplotlib.rcParams) == settings


def test_drawing_needs_neither_torch_nor_pyplot(tmp_path: Path) -> None:
    write_rows(tmp_path, 10)
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from pathlib import Path; "
        "from opsin.reporting.plots import draw_run; "
        "print(len(draw_run(Path(sys.argv[1])))); print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "4\nset()\n"


def test_a_folder_that_cannot_be_written_is_told_with_its_name(tmp_path: Path) -> None:
    write_rows(tmp_path, 2)
    (tmp_path / "plots").touch()  # a file where the folder should be
    with pytest.raises(RunError, match="plots: cannot be written"):
        draw_run(tmp_path)
