"""Speed that falls behind, and why."""

import random
from collections.abc import Iterable

from opsin.clock.timeline import Stage, Timeline
from opsin.monitors.throughput import ThroughputConfig
from opsin.training.monitor import Finding
from tests.unit.monitors.synthetic import TIMELINE, judged

USUAL = 1000.0


def found(
    speeds: Iterable[float], *, data_ms: Iterable[float] | None = None, timeline: Timeline = TIMELINE
) -> dict[int, Finding]:
    speeds = list(speeds)
    waits = [1.0] * len(speeds) if data_ms is None else data_ms
    rows = [{"train/images_per_s": speed, "time/data_ms": wait} for speed, wait in zip(speeds, waits, strict=True)]
    return judged(ThroughputConfig().build(timeline), rows, every=10)


def test_a_run_that_gets_slow_is_told_once_it_stays_slow() -> None:
    # The first row has no row before it that tells how long its steps took.
    slow = found([USUAL] * 30 + [700.0] * 6)
    assert list(slow) == [350, 360]
    assert slow[350].kind == "slow"
    assert slow[350].text.startswith("slow: 700 images/s since step 310, 1,000 before; ")


def test_a_few_slow_rows_are_nothing() -> None:
    assert found(([USUAL] * 30 + [300.0] * 4) * 3) == {}


def test_the_data_is_blamed_where_waiting_for_it_grew() -> None:
    # A row is a second for ten steps: 100 ms each.
    slow = found([USUAL] * 30 + [500.0] * 5, data_ms=[5.0] * 30 + [60.0] * 5)
    assert "waiting for data takes 60% of a step, 5% before; the data got slower" in slow[350].text


def test_the_computation_is_blamed_where_waiting_did_not_grow() -> None:
    slow = found([USUAL] * 30 + [500.0] * 5, data_ms=[5.0] * 30 + [2.0] * 5)
    assert "the computation got slower" in slow[350].text


def test_a_short_noisy_run_gives_no_alarm() -> None:
    draw = random.Random(0)
    assert found(draw.uniform(100, 2000) for _ in range(20)) == {}


def test_the_first_rows_are_no_baseline() -> None:
    assert found([9 * USUAL] * 4 + [USUAL] * 40) == {}


def test_each_stage_has_its_own_baseline() -> None:
    stages = Timeline([Stage(3, 48, 100), Stage(7, 48, 100, image_size=224)])
    assert found([USUAL] * 30 + [200.0] * 40, timeline=stages) == {}
    assert list(found([USUAL] * 30 + [200.0] * 23 + [100.0] * 5, timeline=stages)) == [580]


def test_rows_without_a_speed_are_passed_over() -> None:
    assert judged(ThroughputConfig().build(TIMELINE), [{"val/top1": 0.5}] * 40) == {}
