"""Waiting for data is told where it is long, lasts and matters."""

from opsin.monitors.starvation import StarvationConfig
from opsin.training.monitor import Finding
from tests.unit.monitors.synthetic import TIMELINE, judged


def found(waits_ms: list[float], *, row_s: float = 4.0) -> dict[int, Finding]:
    """With a row for ten steps."""
    rows = [{"time/data_ms": wait} for wait in waits_ms]
    return judged(StarvationConfig().build(TIMELINE), rows, every=10, seconds=row_s)


def test_a_run_that_waits_for_its_data_is_told_after_ten_rows() -> None:
    starved = found([300.0] * 12)
    # The first row has no row before it that tells how long its steps took.
    assert list(starved) == [110, 120]
    assert starved[110].kind == "starved"
    assert starved[110].since == 20
    assert starved[110].text.startswith("starved: waiting for data takes 75% of a step (300 ms) since step 20; ")


def test_data_that_dries_up_is_told_once_most_rows_say_so() -> None:
    starved = found([10.0] * 20 + [300.0] * 10)
    assert next(iter(starved)) == 270
    assert starved[270].since == 210


def test_some_waiting_is_normal() -> None:
    assert found([150.0] * 40) == {}
    assert found(([20.0] * 8 + [390.0] * 2) * 5) == {}


def test_a_short_run_may_wait() -> None:
    assert found([30.0] * 20, row_s=0.4) == {}


def test_rows_without_the_time_are_passed_over() -> None:
    assert judged(StarvationConfig().build(TIMELINE), [{"val/top1": 0.5}] * 40) == {}
