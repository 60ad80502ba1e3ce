import math
from typing import Literal

import pytest
import torch

from opsin.clock.schedule import Constant, Cosine, Linear, OneCycle, Schedule
from opsin.clock.timeline import Stage, Timeline

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


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_onecycle_with_momentum_is_that_of_torch(shape: Literal["linear", "cosine"]) -> None:
    own = OneCycle(start=1 / 25, peak=0.3, end=1 / 25 / 1e4, shape=shape, momentum=(0.95, 0.85))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    # torch reaches the end at its last step, one step before the end of ours.
    strategy: Literal["linear", "cos"] = "linear" if shape == "linear" else "cos"
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=0.3 + 0.7 / 101, anneal_strategy=strategy
    )
    for step in range(101):
        (group,) = optimizer.param_groups
        # pct_start counts steps from 1: the peaks meet within a hundredth of a step.
        assert own(TIMELINE.clock(step)) == pytest.approx(group["lr"], abs=2e-3)
        assert own.momentum_at(TIMELINE.clock(step)) == pytest.approx(group["momentum"], abs=2e-4)
        optimizer.step()
        if step < 100:
            theirs.step()


def test_only_onecycle_says_a_momentum_and_only_if_asked() -> None:
    for schedule in (Constant(), Linear(), Cosine(), OneCycle()):
        assert schedule.momentum_at(TIMELINE.clock(50)) is None


def test_a_schedule_over_stages_begins_anew_in_each() -> None:
    timeline = Timeline([Stage(2, 1, 10), Stage(4, 1, 5)])
    values = [Linear(over="stage")(timeline.clock(step)) for step in range(40)]
    assert values[:20] == pytest.approx([1 - step / 20 for step in range(20)])
    assert values[20:] == pytest.approx([1 - step / 20 for step in range(20)])
    warm = [Constant(over="stage", warmup_epochs=1)(timeline.clock(step)) for step in range(40)]
    assert warm[5] == 0.5
    assert warm[21] == pytest.approx(1 / 5)


def test_onecycle_has_no_warm_up_besides_its_own_rise() -> None:
    with pytest.raises(ValueError, match="onecycle rises by itself; leave warmup_epochs out"):
        OneCycle(warmup_epochs=1)
