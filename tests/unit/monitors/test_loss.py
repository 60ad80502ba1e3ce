"""A loss that leaps is found at once; one that falls, rises slowly or is noisy is left alone."""

import math
import random
from collections.abc import Iterable

from opsin.clock.timeline import Stage, Timeline
from opsin.monitors.loss import LossConfig
from opsin.training.monitor import Finding
from tests.unit.monitors.synthetic import TIMELINE, judged


def found(losses: Iterable[float], *, timeline: Timeline = TIMELINE, **settings: object) -> dict[int, Finding]:
    monitor = LossConfig.model_validate(settings).build(timeline)
    return judged(monitor, [{"train/loss": loss} for loss in losses], every=10)


def falling(length: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2.3 * math.exp(-index / 20) + 0.1 + draw.gauss(0, 0.02) for index in range(length)]


def test_a_loss_that_leaps_and_stays_is_found_in_the_second_row() -> None:
    spike = found([*falling(40), 4.0, 5.0, 6.0])
    assert list(spike) == [420, 430]
    assert spike[420].kind == "loss_spike"
    assert spike[420].since == spike[430].since == 410
    assert spike[420].text.startswith("loss spike: 5 where ")
    assert "since step 410" in spike[420].text


def test_one_bad_row_is_no_spike_unless_asked() -> None:
    course = [*falling(40), 9.0, 0.4, 0.4, 9.0, 0.4]
    assert found(course) == {}
    assert list(found(course, patience=1)) == [410, 440]


def test_healthy_losses_give_no_alarm() -> None:
    for seed in range(20):
        assert found(falling(100, seed)) == {}
    assert found([0.08 + 0.02 * math.sin(index / 8) for index in range(100)]) == {}, "it swings by a quarter"
    assert found([0.6 * 0.9**index for index in range(30)] + [0.026 * 1.04**index for index in range(60)]) == {}


def test_a_loss_near_zero_may_leap_by_a_small_part_of_what_it_was() -> None:
    course = [2.3 * 0.7**index for index in range(40)]
    assert found([*course, 0.02, 0.03]) == {}
    assert list(found([*course, 0.5, 0.6])) == [420]


def test_a_stage_has_a_band_of_its_own() -> None:
    stages = Timeline([Stage(4, 48, 100), Stage(6, 48, 100, image_size=224)])
    assert found([0.2] * 40 + [1.5] * 20, timeline=stages) == {}
    assert list(found([0.2] * 40 + [1.5] * 20 + [4.0] * 2, timeline=stages)) == [620]


def test_a_higher_loss_that_lasts_is_usual_in_the_end() -> None:
    lasting = found([0.2] * 40 + [2.0] * 60)
    assert next(iter(lasting)) == 420
    assert max(lasting) < 800


def test_rows_without_a_loss_neither_begin_nor_end_a_spike() -> None:
    rows = [{"train/loss": loss} for loss in falling(40)]
    rows += [{"train/loss": 5.0}, {"val/top1": 0.5}, {"train/loss": math.nan}, {"train/loss": 5.0}]
    assert list(judged(LossConfig().build(TIMELINE), rows, every=10)) == [440]
