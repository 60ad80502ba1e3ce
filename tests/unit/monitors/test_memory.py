"""Memory that grows and grows is told; what fills up and stays, or swings, is not."""

import random

import torch

from opsin.clock.timeline import Stage, Timeline
from opsin.monitors.memory import MemoryCreepConfig
from opsin.training.monitor import Finding
from opsin.training.state import ScheduledValues, StepReport
from opsin.training.stopwatch import Stopwatch
from tests.unit.monitors.synthetic import judged
from tests.unit.training.tiny_run import fresh

TIMELINE = Timeline([Stage(epochs=100, batch_size=48, steps_per_epoch=100)])


def found(held_gib: list[float], name: str = "system/memory_gib") -> dict[int, Finding]:
    return judged(MemoryCreepConfig().build(TIMELINE), [{name: held} for held in held_gib], every=100)


def test_what_is_never_let_go_is_told_with_its_rate() -> None:
    creep = found([2.0 + 0.05 * index for index in range(30)])
    assert next(iter(creep)) == 2500, "5 measurements are skipped, 20 make a trend"
    assert creep[2500].kind == "memory_creep"
    assert creep[2500].since == 600
    assert creep[2500].text.startswith(
        "memory creep: this process held 2.25 GiB at step 600 and holds 3.20 GiB now, 0.5 GiB more in 1,000 steps; "
    )


def test_the_gpu_is_watched_as_well() -> None:
    creep = found([10.0 + 0.2 * index for index in range(26)], "gpu/memory_gib")
    assert {finding.kind for finding in creep.values()} == {"gpu_memory_creep"}


def test_what_fills_up_and_stays_is_no_creep() -> None:
    assert found([min(1.0 + 0.5 * index, 4.0) for index in range(60)]) == {}
    assert found([2.0] * 15 + [6.0] * 30) == {}, "one leap"


def test_what_swings_or_grows_a_little_is_no_creep() -> None:
    draw = random.Random(0)
    assert found([4.0 + draw.uniform(-1, 1) for _ in range(60)]) == {}
    assert found([40.0 + 0.01 * index for index in range(60)]) == {}


def test_the_memory_of_this_process_is_measured() -> None:
    clock = TIMELINE.clock(0)
    times = Stopwatch(torch.device("cpu"))
    report = StepReport(1, clock, ScheduledValues(0.1, 0.9, 0.0), {}, torch.tensor(1.0), torch.arange(4), 4, times)
    values = MemoryCreepConfig().build(TIMELINE).measure(fresh(), report)
    assert set(values) == {"system/memory_gib"}
    assert 0.05 < values["system/memory_gib"] < 1000
