"""What monitors find is told once, and again by no resume."""

import io
import math
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opsin.clock.timeline import Stage, Timeline
from opsin.errors import Stopped, TrainingError
from opsin.methods.base import Clock
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal, Row, read_events
from opsin.reporting.teller import RunTeller
from opsin.training.agenda import Agenda
from opsin.training.alerts import Alerts
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.loop import Run, fit
from opsin.training.monitor import CANCELLED, Action, Finding, Monitor, RollBack
from tests.story import Calm
from tests.unit.training.test_loop import Numbers, run_in
from tests.unit.training.tiny_run import Tiny, equal
from tests.unit.training.tiny_run import fresh as fresh_state

TIMELINE = Timeline([Stage(epochs=100, batch_size=4, steps_per_epoch=100)])


class High(Monitor):
    """Finds rows whose value is high, and notes all that it judges."""

    def __init__(self, *, remembers: bool = True) -> None:
        self.remembers = remembers
        self.rows: list[Row] = []

    def judge(self, row: Row) -> Finding | None:
        self.rows.append(row)
        return Finding("high", f"high since step {row.step}", row.step) if row.values.get("value", 0) > 1 else None


class Advised(Tiny):
    """A method that knows what to do."""

    def advice(self, finding: str, clock: Clock) -> str:
        return f"against {finding} at {clock.step} do nothing"


class Scenario:
    """A run of which only the rows are real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = fresh_state()
        self.screen = io.StringIO()
        self.open()

    def open(
        self,
        action: Action = "warn",
        *,
        remembers: bool = True,
        rows: int = 1,
    ) -> None:
        """A new session."""
        self.journal = Journal(self.folder, teller=Calm())
        self.monitor = High(remembers=remembers)
        teller = RunTeller(self.journal, Console(self.screen))
        agenda = Agenda(TIMELINE, TIMELINE.total_steps, rows=rows)
        self.alerts = Alerts(teller, agenda, {"mine": (action, self.monitor)})

    def rows(self, *values: float, every: int = 50) -> None:
        with self.alerts.watch(self.state):
            self.alerts.judge(self.state)
            for value in values:
                self.state.step += every
                self.journal.log(self.state.step, 0.0, {"value": value}, time_s=1.0)
                self.alerts.judge(self.state)
                self.alerts.judge(self.state)

    def told(self) -> list[int]:
        return [event.step for event in self.events()]

    def events(self) -> list[Any]:
        return [event for event in read_events(self.folder / "events.jsonl") if event.kind == "alert"]

    def warnings(self) -> list[str]:
        return [line for line in self.screen.getvalue().splitlines() if line.startswith("warning: ")]


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    return Scenario(tmp_path)


def test_a_finding_is_told_once_while_it_lasts(scenario: Scenario) -> None:
    scenario.rows(0, 2, 2, 2, 2, 2, 2, 2)
    assert scenario.told() == [100]
    assert dict(scenario.events()[0].facts) == {
        "monitor": "mine",
        "finding": "high",
        "message": "high since step 100",
    }
    assert scenario.warnings() == ["warning: step 100: high since step 100"]


def test_a_finding_that_comes_back_soon_is_the_same(scenario: Scenario) -> None:
    scenario.rows(2, 0, 0, 0, 2, 0, 0, 2)
    assert scenario.told() == [50]


def test_a_finding_that_comes_back_later_is_told_again(scenario: Scenario) -> None:
    scenario.rows(2, 0, 0, 0, 0, 2)
    assert scenario.told() == [50, 300]


def test_rows_far_apart_make_one_finding(scenario: Scenario) -> None:
    scenario.rows(2, 2, 2, every=1000)
    assert scenario.told() == [1000]


def test_the_method_is_asked_for_advice(scenario: Scenario) -> None:
    scenario.state.method = Advised()
    scenario.rows(2)
    assert scenario.warnings() == ["warning: step 50: high since step 50; against high at 49 do nothing"]


def test_every_row_is_judged_once_and_in_order(scenario: Scenario) -> None:
    scenario.rows(0, 2, 0)
    assert [row.step for row in scenario.monitor.rows] == [50, 100, 150]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_a_resumed_run_finds_what_an_undisturbed_one_finds(scenario: Scenario, at: int) -> None:
    values = [0.0, 2.0, 2.0, 0.0, math.inf, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    scenario.rows(*values[:at])
    said = len(scenario.warnings())
    before = scenario.monitor.rows
    scenario.open()
    with scenario.alerts.watch(scenario.state):
        scenario.alerts.judge(scenario.state)
    assert len(scenario.warnings()) == said, "nothing is said twice"
    assert [row.step for row in scenario.monitor.rows] == [row.step for row in before]
    scenario.open()
    scenario.rows(*values[at:])
    assert scenario.told() == [100, 600]


def test_what_a_killed_run_had_no_time_to_tell_is_told_by_the_next(scenario: Scenario) -> None:
    scenario.rows(0)
    scenario.state.step = 100
    scenario.journal.log(100, 0.0, {"value": 2.0}, time_s=1.0)
    scenario.open()
    scenario.rows(2)
    assert scenario.told() == [100]


def test_a_monitor_may_forget_earlier_sessions(scenario: Scenario) -> None:
    scenario.rows(2, 2, 2)
    scenario.open(remembers=False)
    scenario.rows(0)
    assert [row.step for row in scenario.monitor.rows] == [150, 200]


def test_values_are_judged_as_the_file_holds_them(scenario: Scenario) -> None:
    scenario.rows(math.inf)
    assert math.isnan(scenario.monitor.rows[0].values["value"])


def test_a_row_that_is_written_when_the_run_breaks_is_judged(scenario: Scenario) -> None:
    scenario.open("stop")
    with suppress(KeyError), scenario.alerts.watch(scenario.state):
        scenario.journal.log(50, 0.0, {"value": 2.0}, time_s=1.0)
        raise KeyError
    assert scenario.told() == [50]


def test_a_stop_ends_the_run_where_a_finding_begins(scenario: Scenario) -> None:
    scenario.open("stop")
    with pytest.raises(TrainingError) as caught:
        scenario.rows(0, 2, 2)
    assert str(caught.value) == (
        "step 100: high since step 100; monitors.mine.action=stop ends the run here; opsin resume goes on"
    )
    assert caught.value.exit_status == 4
    scenario.open("stop")
    scenario.rows(2, 2, 0, 0, 0, 0)
    with pytest.raises(TrainingError, match="step 450: high"):
        scenario.rows(2)
    assert scenario.told() == [100, 450]


def test_what_is_ignored_is_not_even_judged(scenario: Scenario) -> None:
    scenario.open("ignore")
    scenario.rows(0, 2, 2)
    assert scenario.told() == []
    assert scenario.monitor.rows == []


def test_a_rollback_is_asked_for_with_the_step_where_all_was_well(scenario: Scenario) -> None:
    scenario.open("rollback")
    with pytest.raises(RollBack) as caught:
        scenario.rows(0, 0, 2)
    asked = caught.value
    assert (asked.monitor, asked.began, asked.found) == ("mine", 100, 150)
    assert asked.finding == Finding("high", "high since step 150", 150)
    assert asked.message == "step 150: high since step 150"


def test_a_rollback_that_a_session_had_no_time_for_is_asked_for_by_the_next(scenario: Scenario) -> None:
    scenario.open("rollback")
    with pytest.raises(RollBack):
        scenario.rows(0, 2)
    said = scenario.warnings()
    scenario.open("rollback")
    with pytest.raises(RollBack):
        scenario.rows()
    assert scenario.warnings() == said, "it is told once"
    assert scenario.told() == [100]


def test_a_row_that_a_stop_has_split_is_judged_as_one(scenario: Scenario) -> None:
    scenario.open(rows=100)
    with scenario.alerts.watch(scenario.state):
        for step, values in {
            100: {"value": 0.5, "train/lr": 0.4},
            130: {"value": 1.0, "train/lr": 0.3, "early": 7.0},
            150: {"value": 3.0, "train/lr": 0.25, CANCELLED: 10.0},
            200: {"value": 2.5, "train/lr": 0.2, CANCELLED: 5.0},
        }.items():
            scenario.state.step = step
            scenario.journal.log(step, 0.0, values, time_s=step / 10)
            scenario.alerts.judge(scenario.state)
    first, second = scenario.monitor.rows
    assert first.values == {"value": 0.5, "train/lr": 0.4}
    # 30 updates of 1, 10 of 3 and 45 of 2.5.
    assert dict(second.values) == pytest.approx(
        {"value": (30 * 1 + 10 * 3 + 45 * 2.5) / 85, "train/lr": 0.2, "early": 7.0, CANCELLED: 15.0}, rel=1e-12
    )
    assert second.step == 200
    assert scenario.told() == [200]


def test_a_resume_joins_the_same_rows(scenario: Scenario) -> None:
    scenario.open(rows=100)
    scenario.rows(0, 0, 2, every=50)
    assert [row.step for row in scenario.monitor.rows] == [100]
    scenario.open(rows=100)
    scenario.rows(2, every=50)
    assert [row.step for row in scenario.monitor.rows] == [100, 200]
    assert scenario.told() == [200]


class LateSteps(Monitor):
    """Finds the steps from the ninth on."""

    def judge(self, row: Row) -> Finding | None:
        return Finding("late", "it is late", row.step) if row.step >= 9 else None


def watched_run(folder: Path, at: Callable[[int], None] = lambda step: None) -> Run:
    return run_in(folder, Numbers(at), monitors={"late": ("stop", LateSteps())})


def test_nothing_is_lost_by_a_stop(tmp_path: Path) -> None:
    straight = fit(run_in(tmp_path / "straight", Numbers()))
    folder = tmp_path / "stopped"
    with pytest.raises(TrainingError, match="step 10: it is late"):
        fit(watched_run(folder))
    assert list(find_checkpoints(folder / "checkpoints")) == [10], "the state as it was when the row was judged"
    assert [row.step for row in Journal(folder, teller=Calm()).rows()] == [4, 5, 8, 10]
    assert equal(fit(watched_run(folder)), straight)


def test_a_signal_is_still_a_signal_where_a_monitor_would_stop(tmp_path: Path) -> None:
    def stop_at(wanted: int, step: int) -> None:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        fit(watched_run(tmp_path, partial(stop_at, 8)))
    assert [event.step for event in read_events(tmp_path / "events.jsonl") if event.kind == "alert"] == [9]
