"""Rows as a run would write them, for monitors to judge."""

from collections.abc import Callable, Iterable, Mapping

from opsin.clock.timeline import Stage, Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor

TIMELINE = Timeline([Stage(epochs=10, batch_size=48, steps_per_epoch=100)])


def judged(
    monitor: Monitor, rows: Iterable[Mapping[str, float]], *, every: int = 50, seconds: float = 1.0
) -> dict[int, Finding]:
    """What is found at which step, with a row for each `every` steps, that take so many `seconds`."""
    found = {}
    for index, values in enumerate(rows, start=1):
        row = Row(index * every, index * every / 100, index * seconds, values)
        if (finding := monitor.judge(row)) is not None:
            found[row.step] = finding
    return found


def course(length: int, **values: Callable[[int], float]) -> list[dict[str, float]]:
    """Rows whose values are functions of the step; `train__kl` stands for `train/kl`."""
    steps = [50 * (index + 1) for index in range(length)]
    return [{name.replace("__", "/"): value(step) for name, value in values.items()} for step in steps]
