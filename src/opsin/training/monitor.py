"""Monitors: numbers of a running training, and verdicts in words where something is wrong with it."""

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
"""How many updates of a row were cancelled; not in rows without any."""


Action = Literal["ignore", "warn", "stop", "rollback"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict: what is wrong with a training."""

    kind: str
    """One word for `Method.advice`, the journal and the documentation: `uniform_collapse`."""
    text: str
    """What was measured and since which step, for a reader."""
    since: int
    """The step of the first row that was bad."""
    good: int | None = None
    """The step of the last row that was measured and not bad, 0 where none was; None: the one before `since` was."""


class RollBack(Exception):
    """A monitor asks for the state before a trouble; `fit` does so, and nobody else sees this."""

    def __init__(self, monitor: str, finding: Finding, message: str, *, began: int, found: int) -> None:
        """`began` is the last step after which all was well, `found` the one after which the trouble was seen."""
        super().__init__(message)
        self.monitor = monitor
        self.finding = finding
        self.message = message
        self.began = began
        self.found = found


class Monitor(Protocol):
    """Numbers and verdicts of a running training; either may be left out. May keep a history of what it has judged.

    Can be copied: each session, and each rollback, begins with a monitor that has judged nothing.
    """

    remembers: bool = True
    """Whether rows of an earlier session count; speed, for one, may be that of another machine."""

    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        """Values by full name (`collapse/cosine`), or none. Must not change the state."""
        return {}

    def judge(self, row: Row) -> Finding | None:
        """What is wrong as of this row, given those before; a finding that lasts is given for every row.

        Gets every row once, in order. After a resume it gets the rows on disk again, in a fresh monitor: the verdict
        must follow from the rows alone. Values that are not finite are NaN.
        """
        return None


class MonitorConfig(Family, ABC):
    """A monitor in a recipe."""

    judges_the_machine: ClassVar[bool] = False
    """Whether verdicts depend on the machine and its load: two runs of a recipe then get different ones."""

    every: StepEvery = "50 steps"
    """How often it measures; it judges every row."""
    action: Action = "warn"
    """What follows from a finding: `ignore` nothing, `warn` tells it, `stop` also ends the run, with a checkpoint,
    `rollback` goes back to before the trouble, as `guard` says."""

    @abstractmethod
    def build(self, timeline: Timeline) -> Monitor:
        """The monitor of a run with these steps."""

    def delay(self, row_steps: int, timeline: Timeline) -> int:
        """The most steps from the last good row to that where a trouble is found, with a row for each `row_steps`.

        Not counted is the time in which a trouble seems to go away by itself.
        """
        return max(row_steps, longest_gap(self.every, timeline))

    @field_validator("action", mode="after")
    @classmethod
    def _follows_from_the_data(cls, action: Action) -> Action:
        if action == "rollback" and cls.judges_the_machine:
            raise ValueError(
                "'rollback' does not fit; what this monitor finds is of the machine, and other images would not help: "
                "must be ignore, warn or stop"
            )
        return action
