"""The interface of monitors: numbers of a running training, and verdicts if something is wrong with it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from pydantic import field_validator

from opsin.clock.cadence import StepEvery, longest_gap
from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.settings.family import Family
from opsin.training.state import StepReport, TrainState

CANCELLED = "train/cancelled"
"""Number of updates of a row that were cancelled; rows without any lack it."""


Action = Literal["ignore", "warn", "stop", "rollback"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict: a fault of a training."""

    kind: str
    """One word for `Method.advice`, the journal and the documentation: `uniform_collapse`."""
    text: str
    """The measurement and the step since which it is bad, for a reader."""
    since: int
    """The step of the first row that was bad."""
    last_good_step: int | None = None
    """The step of the last row that was measured and not bad, 0 if none was; None takes the row before `since`."""


class RollBack(Exception):
    """A monitor asks for the state before a fault; `fit` catches it."""

    def __init__(self, monitor: str, finding: Finding, message: str, *, began: int, found: int) -> None:
        """`began` is the last step before the fault, `found` the step at which it was found."""
        super().__init__(message)
        self.monitor = monitor
        self.finding = finding
        self.message = message
        self.began = began
        self.found = found


class Monitor(Protocol):
    """Numbers and verdicts of a running training; either may be left out. May keep a history of the rows it has judged.

    Can be copied: each session, and each rollback, begins with a monitor that has judged nothing.
    """

    remembers: bool = True
    """True if rows of an earlier session count; those of speed, for one, may come from another machine."""

    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        """Values by full name (`collapse/cosine`), or none. Must not change the state."""
        return {}

    def judge(self, row: Row) -> Finding | None:
        """A finding if something is wrong as of this row, given those before; while it lasts, for every row.

        Gets every row once, in order. After a resume it gets the rows on disk again, in a fresh monitor: the verdict
        must follow from the rows alone. Values that are not finite are NaN.
        """
        return None


class MonitorConfig(Family, ABC):
    """A monitor in a recipe."""

    judges_the_machine: ClassVar[bool] = False
    """True if verdicts depend on the machine and its load, so that two runs of a recipe get different ones."""

    every: StepEvery = "50 steps"
    """Interval between measurements; every row is judged."""
    action: Action = "warn"
    """Consequence of a finding: `ignore` does nothing, `warn` reports it, `stop` also ends the run, with a checkpoint,
    `rollback` also returns to a state before the fault, as `guard` says."""

    @abstractmethod
    def build(self, timeline: Timeline) -> Monitor:
        """The monitor of a run with these steps."""

    def delay(self, row_steps: int, timeline: Timeline) -> int:
        """The largest number of steps from the last good row to the finding, with a row for each `row_steps`.

        Steps in which the fault seems to disappear by itself are not counted.
        """
        return max(row_steps, longest_gap(self.every, timeline))

    @field_validator("action", mode="after")
    @classmethod
    def _follows_from_the_data(cls, action: Action) -> Action:
        if action == "rollback" and cls.judges_the_machine:
            raise ValueError(
                "'rollback' does not fit; this monitor judges the machine, and other images would not help: "
                "must be ignore, warn or stop"
            )
        return action
