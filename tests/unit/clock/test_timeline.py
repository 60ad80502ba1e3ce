from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.clock.cadence import is_due, longest_gap, parse
from opsin.clock.timeline import Stage, Timeline

stages = st.lists(
    st.builds(Stage, epochs=st.floats(0.1, 4), batch_size=st.integers(1, 64), steps_per_epoch=st.integers(1, 20)),
    min_size=1,
    max_size=4,
)


def test_one_stage_counts_plainly() -> None:
    timeline = Timeline([Stage(epochs=3, batch_size=8, steps_per_epoch=10)])
    assert timeline.total_steps == 30
    assert timeline.clock(15).epoch == 1.5
    position = timeline.position(25)
    assert (position.epoch, position.batch) == (2, 5)
    assert [step for step in range(31) if timeline.ends_epoch(step)] == [10, 20, 30]


@given(stages)
def test_positions_agree_with_walking_through_the_run(plan: list[Stage]) -> None:
    timeline = Timeline(plan)
    walked, epoch = [], 0
    for index, stage in enumerate(plan):
        batch = 0
        for _ in range(stage.steps):
            if batch == stage.steps_per_epoch:
                epoch, batch = epoch + 1, 0
            walked.append((index, epoch, batch))
            batch += 1
        epoch += 1
    found = [timeline.position(step) for step in range(timeline.total_steps)]
    assert [(p.stage, p.epoch, p.batch) for p in found] == walked


@given(stages)
def test_the_clock_starts_at_zero_never_goes_back_and_ends_at_the_total(plan: list[Stage]) -> None:
    timeline = Timeline(plan)
    epochs = [timeline.clock(step).epoch for step in range(timeline.total_steps + 1)]
    assert epochs[0] == 0
    assert all(a < b for a, b in pairwise(epochs))
    assert epochs[-1] == pytest.approx(timeline.clock(0).total_epochs)


@pytest.mark.parametrize("text", ["1 epochs", "500 steps", "0.5 epoch", "10 minutes", "never"])
def test_cadences_that_are_understood(text: str) -> None:
    parse(text)


@pytest.mark.parametrize("text", ["", "often", "0 steps", "1.5 steps", "-1 epoch", "1 hour", "5"])
def test_cadences_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'.*' (does not fit; must be|is not more than zero)"):
        parse(text)


def test_cadence_by_steps_epochs_and_minutes() -> None:
    timeline = Timeline([Stage(epochs=4, batch_size=8, steps_per_epoch=3)])
    assert [s for s in range(13) if is_due("5 steps", timeline, s)] == [5, 10]
    assert [s for s in range(13) if is_due("1 epoch", timeline, s)] == [3, 6, 9, 12]
    assert [s for s in range(13) if is_due("2 epochs", timeline, s)] == [6, 12]
    assert [s for s in range(13) if is_due("0.5 epochs", timeline, s)] == [2, 3, 5, 6, 8, 9, 11, 12]
    assert not is_due("never", timeline, 12)
    assert is_due("2 minutes", timeline, 1, minutes=2.5)
    assert not is_due("2 minutes", timeline, 1, minutes=1.5)


@given(st.integers(1, 97), st.integers(1, 5))
def test_whole_epochs_are_due_exactly_once_whatever_the_rounding(steps_per_epoch: int, every: int) -> None:
    timeline = Timeline([Stage(epochs=30, batch_size=1, steps_per_epoch=steps_per_epoch)])
    due = [s for s in range(timeline.total_steps + 1) if is_due(f"{every} epochs", timeline, s)]
    assert due == [every * steps_per_epoch * k for k in range(1, 30 // every + 1)]


@given(stages, st.sampled_from(["3 steps", "1 epoch", "0.3 epochs", "2.5 epochs", "never"]))
def test_no_gap_is_longer_than_the_longest(plan: list[Stage], every: str) -> None:
    timeline = Timeline(plan)
    due = [0, *(step for step in range(1, timeline.total_steps + 1) if is_due(every, timeline, step))]
    assert max((after - before for before, after in pairwise(due)), default=0) <= longest_gap(every, timeline)


@given(stages)
def test_the_clock_knows_the_stage_and_the_time_in_it(plan: list[Stage]) -> None:
    timeline = Timeline(plan)
    first = 0
    begins: dict[int, int] = {}
    for number, stage in enumerate(plan):
        begins[first] = number
        for step in range(first, first + stage.steps):
            clock = timeline.clock(step)
            assert clock.stage is stage
            assert clock.stage_epoch == pytest.approx((step - first) / stage.steps_per_epoch)
        first += stage.steps
    assert [timeline.starts_stage(step) for step in range(first + 1)] == [begins.get(step) for step in range(first + 1)]
