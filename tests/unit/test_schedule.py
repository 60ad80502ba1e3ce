import math
from typing import Literal

import pytest

from opsin.schedule import Constant, Cosine, Linear, OneCycle, Schedule
from opsin.timeline import Stage, Timeline

TIMELINE = Timeline([Stage(epochs=10, batch_size=1, steps_per_epoch=10)])


def factors(schedule: Schedule) -> list[float]:
    return [schedule(TIMELINE.clock(step)) for step in range(101)]


def test_constant_stays() -> None:
    assert set(factors(Constant())) == {1.0}


def test_linear_goes_straight_to_its_end() -> None:
    expected = [1 - 0.9 * step / 100 for step in range(101)]
    assert factors(Linear(end=0.1)) == pytest.approx(expected)


def test_cosine_follows_the_published_formula() -> None:
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)]
    assert factors(Cosine(end=0.1)) == pytest.approx(expected)


def test_warmup_rises_in_a_straight_line_and_then_the_decay_takes_the_rest_of_the_run() -> None:
    values = factors(Cosine(warmup_epochs=2, warmup_start=0.2))
    assert values[:20] == pytest.approx([0.2 + 0.8 * step / 20 for step in range(20)])
    assert values[20] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_onecycle_touches_start_peak_and_end(shape: Literal["linear", "cosine"]) -> None:
    values = factors(OneCycle(start=0.2, peak=0.25, end=0.05, shape=shape))
    assert (values[0], values[25], values[100]) == pytest.approx((0.2, 1.0, 0.05))
    assert values == sorted(values[:26]) + sorted(values[26:], reverse=True)


def test_a_warmup_longer_than_the_run_never_reaches_the_full_value() -> None:
    values = factors(Cosine(warmup_epochs=20))
    assert max(values[:100]) < 0.5
