"""Variants are measured in processes that end with the bench, and gains are compared with the noise of repetitions."""

import io
import os
from pathlib import Path

import pytest

from opsin.errors import TrainingError
from opsin.run.recipe import Recipe, read
from opsin.storage.teller import Silence
from opsin.tuning.probe import Fault, Measured, Ready, from_line, serve, to_line
from opsin.tuning.turns import Bench, Timing, Variant
from tests.digits_run import OVERRIDES, SMALL_VIT


def recipe(*keys: str) -> Recipe:
    return read("quickstart", [*OVERRIDES, *SMALL_VIT, *keys])


def timing(*rates: float) -> Timing:
    return Timing(Variant({}, recipe(), "one"), rates=list(rates))


@pytest.mark.parametrize(
    ("rates", "spread"),
    [((), 0), ((100,), 0), ((90, 100, 110), 0.2), ((50, 99, 100, 101), 2 / 99.5), ((20, 95, 100, 100, 105), 0.1)],
    ids=str,
)
def test_the_spread_leaves_out_one_slow_measurement_of_four(rates: tuple[float, ...], spread: float) -> None:
    assert timing(*rates).spread == pytest.approx(spread)


def test_a_gain_is_that_of_neighbours() -> None:
    # The machine was busy in the second round; the ratios show 10 % all the same.
    before, after = timing(100, 50, 100), timing(110, 55, 111)
    assert after.gain_over(before) == pytest.approx(0.1)
    assert after.noise_beside(before) == pytest.approx(0.56 / 1.1, abs=0.01)
    assert timing(100, 100, 100).noise_beside(timing(100, 100, 100)) == 0.02


@pytest.mark.parametrize("answer", [Ready(1.5), Measured(640, 0.5, 2**30, None), Fault("no", is_memory=True)], ids=str)
def test_an_answer_survives_the_pipe(answer: Ready | Measured | Fault) -> None:
    assert from_line(to_line(answer)) == answer


def test_updates_are_answered_with_their_images_and_their_time(tmp_path: Path) -> None:
    ready, measured = serve(recipe(), 0, 1.0, io.StringIO("0.05\n\n0.05\n"))
    assert isinstance(ready, Ready)
    assert isinstance(measured, Measured)
    assert measured.images % 256 == 0
    assert measured.images > 0
    assert measured.seconds >= 0.05
    assert measured.peak_bytes > 2**20


def test_a_lack_of_memory_ends_a_process_instead_of_splitting_the_update() -> None:
    # 2^43 bytes of attention: no machine has so much, whatever memory.on_out_of_memory says.
    large = recipe(
        "data.image_size=512", "model.patch=1", "attention=explicit", "batch_size=16", "memory.on_out_of_memory=always"
    )
    with pytest.raises(TrainingError, match="memory"):
        list(serve(large, 0, 1.0, io.StringIO("")))


def children_that_measure() -> list[Path]:
    """The folders in /proc of processes that a bench of this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_mine = f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text()
            if is_mine and b"opsin.tuning.probe" in (folder / "cmdline").read_bytes():
                found.append(folder)
        except OSError:  # it has ended
            continue
    return found


def test_variants_take_turns_and_one_that_cannot_be_built_is_a_row() -> None:
    timings = [
        Timing(Variant({"accumulate": 1}, recipe(), "whole")),
        Timing(Variant({"accumulate": 2}, recipe("accumulate=2"), "halves")),
        Timing(Variant({"data.image_size": 9}, recipe("data.image_size=9"), "odd")),
    ]
    with Bench(0, 0.8, Silence()) as bench:
        bench.compare(timings, 120, rounds=1)
        assert len(children_that_measure()) == 2
    assert [len(one.rates) for one in timings[:2]] == [1, 1]
    assert all(one.start_s > 0 and one.peak_bytes > 2**20 and not one.fault for one in timings[:2])
    assert "9" in timings[2].fault
    assert "patch" in timings[2].fault
    assert not children_that_measure()
