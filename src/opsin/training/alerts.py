"""Monitors: numbers of a running training, and verdicts in words where something is wrong with it.

`Alerts` lets monitors judge the rows of the journal and tells what they find, once for each time it
begins. With all or none of it the weights are the same bits, unless a monitor may roll back.
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
"""A finding that comes back after so many steps without it is told again."""

_SET = ("train/lr", "train/momentum", "train/weight_decay")
"""What a row has of its last update; most other values are means over its updates."""


class _Verdict(NamedTuple):
    """A finding that was not there before, and what is to follow from it."""

    monitor: str
    action: Action
    finding: Finding
    message: str
    is_told: bool
    """Whether an earlier session has told it, and done what was to be done."""


class Alerts:
    """Has every row of the journal judged, once its scores are in it, and tells what is found."""

    def __init__(self, teller: RunTeller, agenda: Agenda, monitors: Mapping[str, tuple[Action, Monitor]]) -> None:
        """Rows that an undisturbed run does not have, as a stop leaves them, are judged together with the next.

        The two are judged as the one row that they would have been.
        """
        self._teller = teller
        self._journal = teller.journal
        self._agenda = agenda
        self._unused = {name: entry for name, entry in monitors.items() if entry[0] != "ignore"}
        self._forget()

    def _forget(self) -> None:
        """Begin with monitors that have judged nothing."""
        # The originals come first, copies after a rollback.
        self._monitors, self._unused = self._unused, deepcopy(self._unused)
        self._seen = -1
        """The step of the last row that was taken."""
        self._begun: Row | None = None
        """Rows that wait for a regular one, joined."""
        self._judged: list[int] = []
        """The steps of the rows that were judged."""
        self._found: dict[tuple[str, str], int] = {}
        """The step at which each finding that was told, by monitor and kind, was last found."""
        self._on_disk: set[tuple[int, str, str]] = set()

    @contextmanager
    def watch(self, state: TrainState) -> Iterator[None]:
        """Judge what stands in the journal, saying nothing; at the end, what is left, without ending anything.

        The row of this very step is left to `judge`: its scores may still be missing.
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
        """Judge the newest row if that was not done.

        Raises:
            TrainingError: a monitor whose action is `stop` has found something new. What the journal holds is
                written; the state is that after the row, and worth a checkpoint.
            RollBack: one whose action is `rollback` has.
        """
        verdicts = self._take_newest(state)
        stops = [one for one in verdicts if one.action == "stop" and not one.is_told]
        if stops:
            raise TrainingError(
                *(
                    f"{one.message}; monitors.{one.monitor}.action=stop ends the run here; opsin resume goes on"
                    for one in stops
                )
            )
        for one in verdicts:
            # Told or not: a session that ended between the two has left the rest to this one.
            if one.action == "rollback":
                self.roll_back(one.monitor, one.finding, one.message, found=self._seen)

    def roll_back(self, monitor: str, finding: Finding, message: str, *, found: int) -> None:
        """Ask for the state before a trouble.

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
        """What is found anew once a regular row is there."""
        # As the file holds it, so that a resume judges the same.
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
        """What one monitor finds in a row, if that is to be told; `before` is the step of the row before."""
        action, monitor = self._monitors[name]
        finding = monitor.judge(row) if aloud or monitor.remembers else None
        if finding is None:
            return None
        key = (name, finding.kind)
        last = self._found.get(key)
        known = last is not None and (last == before or row.step - last <= CALM_STEPS)
        is_told = (row.step, *key) in self._on_disk
        if known or is_told or aloud:
            self._found[key] = row.step
        # Else it was not told yet: the session ended before, or it judged by other settings.
        if known or not aloud:
            return None
        message = self._in_words(finding, row.step, state)
        if not is_told:
            facts = {"monitor": name, "finding": finding.kind, "message": message}
            self._teller.tell("alert", row.step, warn=f"step {row.step}: {message}", **facts)
        return _Verdict(name, action, finding, f"step {row.step}: {message}", is_told)

    def _in_words(self, finding: Finding, step: int, state: TrainState) -> str:
        advice = state.method.advice(finding.kind, self._agenda.timeline.clock(max(step - 1, 0)))
        return "; ".join(part for part in (finding.text, advice) if part)


def _join(first: Row, second: Row, before: int) -> Row:
    """The row that two would have been without a stop in between; `before` is the step of the row before them."""
    steps = [first.step - before, second.step - first.step]
    made = [count - row.values.get(CANCELLED, 0) for row, count in zip((first, second), steps, strict=True)]
    shares = [count / sum(made) for count in made] if any(made) else [count / sum(steps) for count in steps]
    values = {**first.values, **second.values}
    for name in first.values.keys() & second.values.keys() - {*_SET}:
        parts = (first.values[name], second.values[name])
        mean = sum(part * share for part, share in zip(parts, shares, strict=True) if share)
        values[name] = sum(parts) if name == CANCELLED else mean
    return Row(second.step, second.epoch, second.time_s, values)
