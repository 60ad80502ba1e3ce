"""Cadences, the intervals between events of a run: `500 steps`, `1 epoch`, `10 minutes`, `never`."""

import math
import re
from functools import cache
from typing import Annotated, Literal, cast

from pydantic import AfterValidator

from opsin.clock.timeline import Timeline

Unit = Literal["steps", "epochs", "minutes", "never"]
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(step|epoch|minute)s?")


@cache
def parse(text: str) -> tuple[float, Unit]:
    """The number and the unit of a cadence.

    Raises:
        ValueError: another form, zero, or a fraction of a step.
    """
    if text == "never":
        return 0.0, "never"
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} does not fit; must be like '500 steps', '1 epoch', '10 minutes' or 'never'")
    number, unit = float(match[1]), cast(Unit, f"{match[2]}s")
    if number == 0:
        raise ValueError(f"{text!r} does not fit; must be more than zero: write 'never' to switch it off")
    if unit == "steps" and not number.is_integer():
        raise ValueError(f"{text!r} does not fit; must be a whole number of steps")
    return number, unit


def _check(text: str) -> str:
    parse(text)
    return text


Every = Annotated[str, AfterValidator(_check)]
"""A recipe key of this type holds a cadence; `is_due` reads it."""


def _check_without_clock(text: str) -> str:
    if parse(text)[1] == "minutes":
        raise ValueError(f"{text!r} does not fit; must be in steps or epochs, for every run to do it at the same steps")
    return text


StepEvery = Annotated[str, AfterValidator(_check_without_clock)]
"""A cadence that depends on the step alone."""


def is_due(every: str, timeline: Timeline, step: int, minutes: float = 0.0) -> bool:
    """True if an event of this cadence is due after `step` updates.

    A pure function of the step, except for cadences in minutes: `minutes` is the training time since the last event.
    """
    number, unit = parse(every)
    if unit == "never" or step <= 0:
        return False
    if unit == "steps":
        return step % int(number) == 0
    if unit == "minutes":
        return minutes >= number
    # Epoch k * number ends between two steps: it is the first step at or after it. The tolerance takes
    # the rounding of step / steps_per_epoch.
    return int(timeline.epoch(step) / number + 1e-9) > int(timeline.epoch(step - 1) / number + 1e-9)


def longest_gap(every: str, timeline: Timeline) -> int:
    """Largest number of steps between two events of a cadence in steps or epochs; 0 for `never`."""
    number, unit = parse(every)
    assert unit != "minutes", "minutes are not a number of steps"
    per_unit = max(stage.steps_per_epoch for stage in timeline.stages) if unit == "epochs" else 1
    return math.ceil(number * per_unit)
