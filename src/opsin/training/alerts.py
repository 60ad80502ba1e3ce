"""Monitors: numbers of a running training, and verdicts in words where something is wrong with it.

`Alerts` lets monitors judge the rows of the journal and tells what they find, once for each time it
begins. With all or none of it the weights are the same bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from opsin.cadence import StepEvery
from opsin.config import Family
from opsin.console import Console
from opsin.errors import TrainingError
from opsin.reporting import Journal, Row
from opsin.timeline import Timeline
from opsin.training.state import StepReport, TrainState

CALM_STEPS = 200
"""A finding that comes back after so many steps without it is told again."""

Action = Literal["warn", "stop"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict: what is wrong with a training."""

    kind: str
    """One word for `Method.advice`, the journal and the documentation: `uniform_collapse`."""
    text: str
    """What was measured and since which step, for a reader."""


class Monitor(Protocol):
    """Numbers and verdicts of a running training; either may be left out. May keep a history of what it has judged."""

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

    every: StepEvery = "50 steps"
    """How often it measures; it judges every row."""
    action: Action = "warn"
    """What follows from a finding: `warn` tells it, `stop` also ends the run, with a checkpoint."""

    @abstractmethod
    def build(self, timeline: Timeline) -> Monitor:
        """The monitor of a run with these steps."""


class Alerts:
    """Has every row of the journal judged, once its scores are in it, and tells what is found."""

    def __init__(
        self,
        journal: Journal,
        timeline: Timeline,
        console: Console,
        monitors: Mapping[str, tuple[Action, Monitor]],
    ) -> None:
        self._journal = journal
        self._timeline = timeline
        self._console = console
        self._monitors = monitors
        self._judged = -1
        """The step of the last row that was judged."""
        self._found: dict[tuple[str, str], int] = {}
        """The step at which each finding that was told, by monitor and kind, was last found."""
        self._on_disk: set[tuple[int, str, str]] = set()

    @contextmanager
    def watch(self, state: TrainState) -> Iterator[None]:
        """Judge what an earlier session wrote, saying nothing; at the end, what is left, without ending anything.

        The row of this very step is left to `judge`: its scores may still be missing.
        """
        self._on_disk = {
            (event.step, str(event.facts.get("monitor")), str(event.facts.get("finding")))
            for event in self._journal.events("alert")
        }
        for row in self._journal.rows() if self._monitors else ():
            if row.step < state.step:
                self._judge(row, state, aloud=False)
        try:
            yield
        finally:
            self._judge_newest(state)

    def judge(self, state: TrainState) -> None:
        """Judge the newest row if that was not done.

        Raises:
            TrainingError: a monitor whose action is `stop` has found something new. What the journal holds is
                written; the state is that after the row, and worth a checkpoint.
        """
        faults = self._judge_newest(state)
        if faults:
            raise TrainingError(*faults)

    def _judge_newest(self, state: TrainState) -> list[str]:
        row = self._journal.last
        if row is None or row.step <= self._judged:
            return []
        return self._judge(row, state, aloud=True)

    def _judge(self, row: Row, state: TrainState, *, aloud: bool) -> list[str]:
        """Why the run is to end, a line for each reason."""
        before, self._judged = self._judged, row.step
        # As the file holds it, so that a resume judges the same.
        values = {name: value if math.isfinite(value) else math.nan for name, value in row.values.items()}
        row = Row(row.step, row.epoch, row.time_s, values)
        faults = []
        for name, (action, monitor) in self._monitors.items():
            finding = monitor.judge(row) if aloud or monitor.remembers else None
            if finding is None:
                continue
            key = (name, finding.kind)
            last = self._found.get(key)
            known = last is not None and (last == before or row.step - last <= CALM_STEPS)
            if known or (row.step, *key) in self._on_disk:
                self._found[key] = row.step
            elif aloud:  # else it was not told yet: the session ended before, or it judged by other settings
                self._found[key] = row.step
                message = self._tell(name, finding, row.step, state)
                if action == "stop":
                    faults.append(f"{message}; monitors.{name}.action=stop ends the run here; opsin resume goes on")
        return faults

    def _tell(self, name: str, finding: Finding, step: int, state: TrainState) -> str:
        clock = self._timeline.clock(max(step - 1, 0))
        advice = state.method.advice(finding.kind, clock)
        message = "; ".join(part for part in (finding.text, advice) if part)
        self._journal.event("alert", step, monitor=name, finding=finding.kind, message=message)
        self._console.warning(f"step {step}: {message}")
        return f"step {step}: {message}"
