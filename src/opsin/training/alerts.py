"""Alerts: monitors judge the rows of the journal, and each finding is reported once, when it begins.

With or without alerts the weights are the same bits, unless a monitor may roll back.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

from opsin.errors import TrainingError
from opsin.reporting.journal import Row
from opsin.reporting.teller import RunTeller
from opsin.training.agenda import Agenda
from opsin.training.monitor import CANCELLED, Action, Finding, Monitor, RollBack
from opsin.training.state import TrainState

CALM_STEPS = 200
"""A finding that comes back is reported again after more than this number of steps without it."""

_SET = ("train/lr", "train/momentum", "train/weight_decay")
"""Values of the last update of a row; most others are means over its updates."""


class _Verdict(NamedTuple):
    """A new finding and its consequence."""

    monitor: str
    action: Action
    finding: Finding
    message: str
    is_reported: bool
    """True if an earlier session has reported it, and has done what follows from it."""


class Alerts:
    """The judge of every row of the journal once its scores are in it; findings are reported."""

    def __init__(self, teller: RunTeller, agenda: Agenda, monitors: Mapping[str, tuple[Action, Monitor]]) -> None:
        """A row that only an interrupted run has, as at a stop, is judged together with the next, as one row."""
        self._teller = teller
        self._journal = teller.journal
        self._agenda = agenda
        self._unused = {name: entry for name, entry in monitors.items() if entry[0] != "ignore"}
        self._forget()

    def _forget(self) -> None:
        """Start with monitors that have judged nothing."""
        # The originals come first, copies after a rollback.
        self._monitors, self._unused = self._unused, deepcopy(self._unused)
        self._seen = -1
        """The step of the last row that was read."""
        self._begun: Row | None = None
        """The rows since the last regular one, joined."""
        self._judged: list[int] = []
        """The steps of the rows that were judged."""
        self._found: dict[tuple[str, str], int] = {}
        """The last step of each reported finding, by monitor and kind."""
        self._on_disk: set[tuple[int, str, str]] = set()

    @contextmanager
    def watch(self, state: TrainState) -> Iterator[None]:
        """Judge the earlier rows silently; after the block, judge the newest row without consequences.

        `judge` takes the row of the present step, whose scores may still be missing.
        """
        if self._seen >= 0:
            self._forget()
        self._on_disk = {
            (event.step, str(event.facts.get("monitor")), str(event.facts.get("finding")))
            for event in self._journal.events("alert")
        }
        for row in self._journal.rows() if self._monitors else ():
            if row.step < state.step:
                self._take(row, state, aloud=False)
        try:
            yield
        finally:
            self._take_newest(state)

    def judge(self, state: TrainState) -> None:
        """Judge the newest row, once.

        Raises:
            TrainingError: a monitor whose action is `stop` has a new finding. The journal is written, and the state
                after the row is worth a checkpoint.
            RollBack: a monitor whose action is `rollback` has a finding.
        """
        verdicts = self._take_newest(state)
        stops = [one for one in verdicts if one.action == "stop" and not one.is_reported]
        if stops:
            raise TrainingError(
                *(
                    f"{one.message}; monitors.{one.monitor}.action=stop ends the run here; opsin resume goes on"
                    for one in stops
                )
            )
        for one in verdicts:
            # Reported or not: a session that ended before its rollback has left that to this one.
            if one.action == "rollback":
                self.roll_back(one.monitor, one.finding, one.message, found=self._seen)

    def roll_back(self, monitor: str, finding: Finding, message: str, *, found: int) -> None:
        """Ask for the state before a fault.

        Raises:
            RollBack: always.
        """
        before = max((step for step in self._judged if step < finding.since), default=0)
        began = before if finding.last_good_step is None else finding.last_good_step
        raise RollBack(monitor, finding, message, began=began, found=found)

    def _take_newest(self, state: TrainState) -> list[_Verdict]:
        row = self._journal.last
        if row is None or row.step <= self._seen:
            return []
        return self._take(row, state, aloud=True)

    def _take(self, row: Row, state: TrainState, *, aloud: bool) -> list[_Verdict]:
        """Return the new findings of a row; none before a regular row has come."""
        # The values are those of the file, so that a resume judges the same.
        values = {name: value if math.isfinite(value) else math.nan for name, value in row.values.items()}
        row = Row(row.step, row.epoch, row.time_s, values)
        before = self._judged[-1] if self._judged else 0
        if self._begun is not None:
            row = _join(self._begun, row, before)
        self._seen = row.step
        if not self._agenda.is_regular(row.step):
            self._begun = row
            return []
        self._begun = None
        found = [self._ask(name, row, before, state, aloud=aloud) for name in self._monitors]
        self._judged.append(row.step)
        return [verdict for verdict in found if verdict is not None]

    def _ask(self, name: str, row: Row, before: int, state: TrainState, *, aloud: bool) -> _Verdict | None:
        """Return the new finding of one monitor; `before` is the step of the row before."""
        action, monitor = self._monitors[name]
        finding = monitor.judge(row) if aloud or monitor.remembers else None
        if finding is None:
            return None
        key = (name, finding.kind)
        last = self._found.get(key)
        known = last is not None and (last == before or row.step - last <= CALM_STEPS)
        is_reported = (row.step, *key) in self._on_disk
        # What has no report is to be found again: that session ended before it, or judged by other settings.
        if known or is_reported or aloud:
            self._found[key] = row.step
        if known or not aloud:
            return None
        advice = state.method.advice(finding.kind, self._agenda.timeline.clock(max(row.step - 1, 0)))
        message = f"{finding.text}; {advice}" if advice else finding.text
        if not is_reported:
            facts = {"monitor": name, "finding": finding.kind, "message": message}
            self._teller.tell("alert", row.step, warn=f"step {row.step}: {message}", **facts)
        return _Verdict(name, action, finding, f"step {row.step}: {message}", is_reported)


def _join(first: Row, second: Row, before: int) -> Row:
    """The row that two rows were without the stop between them; `before` is the step of the row before."""
    steps = [first.step - before, second.step - first.step]
    made = [count - row.values.get(CANCELLED, 0) for row, count in zip((first, second), steps, strict=True)]
    shares = [count / sum(made) for count in made] if any(made) else [count / sum(steps) for count in steps]
    values = {**first.values, **second.values}
    for name in first.values.keys() & second.values.keys() - {*_SET}:
        parts = (first.values[name], second.values[name])
        mean = sum(part * share for part, share in zip(parts, shares, strict=True) if share)
        values[name] = sum(parts) if name == CANCELLED else mean
    return Row(second.step, second.epoch, second.time_s, values)
