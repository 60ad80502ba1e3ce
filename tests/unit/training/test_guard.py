"""A run that goes bad is brought back, and ends in the same bits whatever checkpoints and interruptions there were."""

import errno
import io
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest

from opsin.clock.timeline import Stage, Timeline
from opsin.data import base
from opsin.data.base import Batch
from opsin.errors import ConfigError, Diverged, Stopped, TransientError
from opsin.reporting.journal import Journal, Row, read_events, read_rows
from opsin.run.recipe import read
from opsin.training.agenda import Agenda
from opsin.training.checkpoints.format import find_checkpoints, read_checkpoint
from opsin.training.guard import GuardConfig
from opsin.training.loop import Run, fit
from opsin.training.monitor import Action, Finding, Monitor, RollBack
from opsin.training.state import Detour
from tests.story import Calm
from tests.unit.training.test_loop import LAST, Numbers, run_in
from tests.unit.training.tiny_run import equal, flip_byte, fresh

FEW_STEPS = GuardConfig(margin="1 steps", lr_factor=0.5, lr_for="3 steps")


class Huge(Numbers):
    """Images of the step `bad` are huge, up to the attempt `until`."""

    def __init__(self, bad: int = 6, *, until: int = 0, factor: float = 1e4, length: int = 1) -> None:
        super().__init__(self.note)
        self.bad = range(bad, bad + length)
        self.until = until
        self.factor = factor
        self.kill_at = -1

    def note(self, step: int) -> None:
        if step == self.kill_at:
            self.kill_at = -1
            os.kill(os.getpid(), signal.SIGTERM)

    def batches(self, start: int, stop: int, detours: Sequence[base.Detour] = ()) -> Iterator[Batch]:
        for step, batch in enumerate(super().batches(start, stop, detours), start):
            attempt = max((detour.attempt for detour in detours if detour.first <= step < detour.last), default=0)
            is_bad = step in self.bad and attempt <= self.until
            factor = self.factor if is_bad else 1.0
            yield replace(batch, views={name: view * factor for name, view in batch.views.items()})


class Large(Monitor):
    """Finds rows with a gradient that is large."""

    def judge(self, row: Row) -> Finding | None:
        large = row.values.get("train/grad_norm", 0.0) > 100
        return Finding("large", f"large since step {row.step}", row.step) if large else None


def guarded(
    folder: Path,
    data: Huge | None = None,
    *,
    every: str = "never",
    guard: GuardConfig = FEW_STEPS,
    screen: TextIO | None = None,
) -> Run:
    return run_in(
        folder,
        data or Huge(),
        every=every,
        monitors={"large": ("rollback", Large())},
        guard=guard,
        screen=screen,
    )


def rollbacks(folder: Path) -> list[dict[str, object]]:
    return [dict(event.facts) for event in read_events(folder / "events.jsonl") if event.kind == "rollback"]


def test_a_bad_run_goes_back_and_around_the_trouble(tmp_path: Path) -> None:
    data = Huge()
    state = fit(guarded(tmp_path, data, every="2 steps"))
    assert state.step == LAST
    # The row of step 8 is bad, that of step 5 was good: a step before it, step 4, is healthy.
    (event,) = rollbacks(tmp_path)
    assert event == {
        "first": 4,
        "last": 8,
        "attempt": 1,
        "lr_factor": 0.5,
        "lr_until": 11,
        "monitor": "large",
        "finding": "large",
        "message": "step 8: large since step 8",
        "since": 8,
    }
    assert state.detours == (Detour(4, 8, 1, "large", 0.5, 11),)
    assert data.given == [*range(8), *range(4, LAST)]
    assert [row.step for row in read_rows(tmp_path / "metrics.jsonl")] == [4, 5, 8, 10, 12, 15]
    assert [event.kind for event in read_events(tmp_path / "events.jsonl") if event.kind == "alert"] == []


@pytest.mark.parametrize("every", ["1 steps", "3 steps", "5 steps", "9 steps"])
def test_the_end_does_not_depend_on_the_checkpoints(tmp_path: Path, every: str) -> None:
    without = fit(guarded(tmp_path / "without"))
    assert equal(fit(guarded(tmp_path / "with", every=every)), without)
    assert rollbacks(tmp_path / "with") == rollbacks(tmp_path / "without")


@pytest.mark.parametrize("at", range(14))
def test_a_guarded_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path: Path, at: int) -> None:
    straight = fit(guarded(tmp_path / "straight"))
    data = Huge()
    data.kill_at = at
    with pytest.raises(Stopped):
        fit(guarded(tmp_path / "stopped", data))
    assert equal(fit(guarded(tmp_path / "stopped")), straight)
    assert rollbacks(tmp_path / "stopped") == rollbacks(tmp_path / "straight")


class Slow(Monitor):
    """Finds, once in a run, at step 12 that all has been bad from step 2 on."""

    def judge(self, row: Row) -> Finding | None:
        is_new = row.step == 12 and row.values["train/lr"] == 0.01
        return Finding("slow", "slow since step 2", 2) if is_new else None


@pytest.mark.parametrize("kill_at", [-1, 1, 5, 9])
def test_a_rollback_is_still_told_after_another_has_gone_further_back(tmp_path: Path, kill_at: int) -> None:
    def run(data: Huge) -> Run:
        monitors: dict[str, tuple[Action, Monitor]] = {"large": ("rollback", Large()), "slow": ("rollback", Slow())}
        return run_in(tmp_path, data, every="2 steps", monitors=monitors, guard=FEW_STEPS)

    data = Huge()
    data.kill_at = kill_at
    with nullcontext() if kill_at < 0 else pytest.raises(Stopped):
        fit(run(data))
    state = fit(run(Huge()))
    assert [(detour.first, detour.kind) for detour in state.detours] == [(4, "large"), (0, "slow")]
    assert [(told["attempt"], told["finding"]) for told in rollbacks(tmp_path)] == [(1, "large"), (2, "slow")]


class End(Exception):
    """The end of a process, wherever it is raised."""


class Screen(io.StringIO):
    """Ends the process when a rollback is told."""

    def write(self, text: str) -> int:
        if "rollback" in text:
            raise End
        return super().write(text)


@pytest.mark.parametrize("every", ["never", "2 steps"])
def test_a_run_that_ends_in_the_middle_of_a_rollback_goes_on_to_the_same_bits(tmp_path: Path, every: str) -> None:
    straight = fit(guarded(tmp_path / "straight"))
    with pytest.raises(End):
        fit(guarded(tmp_path / "ended", every=every, screen=Screen()))
    assert equal(fit(guarded(tmp_path / "ended", every=every)), straight)
    assert rollbacks(tmp_path / "ended") == rollbacks(tmp_path / "straight"), "told once"


def test_the_newest_unhealthy_checkpoint_stays_to_be_looked_at_until_the_end(tmp_path: Path) -> None:
    with pytest.raises(End):
        fit(guarded(tmp_path, every="2 steps", screen=Screen()))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*step-*"))
    assert names == ["step-00000004", "unhealthy-step-00000008"], "of 6 and 8, which were gone back over"
    assert read_checkpoint(tmp_path / "checkpoints" / names[1]).step == 8
    fit(guarded(tmp_path, every="2 steps"))
    assert not list((tmp_path / "checkpoints").glob("unhealthy-*"))


@pytest.mark.parametrize("place", ["checkpoints", "log"])
def test_a_rollback_that_the_disk_stops_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    straight = fit(guarded(tmp_path / "straight", every="2 steps"))
    rename = Path.rename

    def broken(path: Path, target: Path | bytes) -> Path:
        if isinstance(target, bytes) or target.name.startswith("unhealthy-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    if place == "checkpoints":
        monkeypatch.setattr(Path, "rename", broken)
    else:
        monkeypatch.setattr("opsin.reporting.lines.write_atomic", broken)
    with pytest.raises(TransientError, match=r"large since step 8; a rollback fails: .*Input/output error.*resume"):
        fit(guarded(tmp_path / "run", every="2 steps"))
    monkeypatch.undo()
    assert equal(fit(guarded(tmp_path / "run", every="2 steps")), straight)
    assert rollbacks(tmp_path / "run") == rollbacks(tmp_path / "straight")


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(tmp_path: Path) -> None:
    straight = fit(guarded(tmp_path / "straight"))
    data = Huge()
    data.kill_at = 5
    with pytest.raises(Stopped):
        fit(guarded(tmp_path / "damaged", data, every="1 steps"))
    found = find_checkpoints(tmp_path / "damaged" / "checkpoints")
    flip_byte(found[max(step for step in found if step <= 4)] / "state.pt", 100)
    assert equal(fit(guarded(tmp_path / "damaged", every="1 steps")), straight)


def test_cancelled_updates_in_a_row_may_roll_back(tmp_path: Path) -> None:
    guard = FEW_STEPS.model_copy(update={"cancelled": "rollback"})
    state = fit(guarded(tmp_path, Huge(length=3, factor=math.inf), guard=guard))
    assert state.step == LAST
    assert state.detours == (Detour(4, 9, 1, "cancelled", 0.5, 12),), "three updates: those to the steps 7, 8 and 9"
    assert Journal(tmp_path, teller=Calm()).streak("step_cancelled", 9) == 0


def test_a_fault_that_comes_back_ends_in_a_diagnosis(tmp_path: Path) -> None:
    guard = FEW_STEPS.model_copy(update={"max_rollbacks": 2})
    with pytest.raises(Diverged) as caught:
        fit(guarded(tmp_path, Huge(until=2), guard=guard))
    said = str(caught.value)
    assert said.startswith("step 8: large since step 8; rolled back 2 times before: steps 4 to 8 (large), steps 4 to 8")
    assert "the cause is in the settings rather than in single images; lower optim.lr" in said
    assert said.endswith("guard.max_rollbacks=2 allows no more")
    assert caught.value.exit_status == 4
    with pytest.raises(Diverged, match="rolled back 2 times before"):
        fit(guarded(tmp_path, Huge(until=2), guard=guard))
    state = fit(guarded(tmp_path, Huge(until=2), guard=FEW_STEPS))
    assert [detour.attempt for detour in state.detours] == [1, 2, 3]
    assert equal(state, fit(guarded(tmp_path / "straight", Huge(until=2))))


@pytest.mark.parametrize("until", [-1, 1], ids=["repaired", "one more"])
def test_after_a_diagnosis_a_resume_begins_before_the_trouble(tmp_path: Path, until: int) -> None:
    once = FEW_STEPS.model_copy(update={"max_rollbacks": 1})
    with pytest.raises(Diverged):
        fit(guarded(tmp_path, Huge(until=1), every="2 steps", guard=once))
    assert list(find_checkpoints(tmp_path / "checkpoints")) == [4], "6 and 8 are of the fault"
    assert [row.step for row in read_rows(tmp_path / "metrics.jsonl")] == [4, 5, 8], "to be looked at"
    # What the diagnosis advises changes the recipe, but not necessarily how many rollbacks it allows.
    guard = once if until < 1 else FEW_STEPS
    data = Huge(until=until)
    state = fit(guarded(tmp_path, data, every="2 steps", guard=guard))
    assert (state.step, data.given[0]) == (LAST, 4)
    assert [detour.attempt for detour in state.detours] == ([1] if until < 1 else [1, 2])


def test_no_rollback_is_allowed_where_the_number_is_zero(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"large since step 8; guard.max_rollbacks=0 allows no rollback"):
        fit(guarded(tmp_path, guard=FEW_STEPS.model_copy(update={"max_rollbacks": 0})))


def test_the_learning_rate_is_lower_in_a_detour_and_for_a_while_after_it() -> None:
    state = fresh()
    state.detours = (Detour(4, 8, 1, "large", 0.5, 11), Detour(6, 9, 2, "large", 0.1, 10))
    factors = []
    for step in range(3, 12):
        state.step = step
        factors.append(state.lr_factor)
    assert factors == pytest.approx([1, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05, 0.5, 1])


def asked(began: int, found: int) -> RollBack:
    return RollBack("mine", Finding("kind", "text", found), "message", began=began, found=found)


def test_a_margin_is_a_quarter_of_an_epoch_and_100_steps_at_most() -> None:
    small, large = (Timeline([Stage(10, 8, steps)]) for steps in (28, 5000))
    assert [Agenda(timeline, 200).margin_steps(90) for timeline in (small, large)] == [7, 100]
    half = [Agenda(timeline, 200, margin="0.5 epochs") for timeline in (small, large)]
    assert [agenda.margin_steps(90) for agenda in half] == [14, 2500]
    assert GuardConfig().detour(asked(3, 20), 1, Agenda(small, 200)) == Detour(0, 20, 1, "kind", 0.5, 220)
    unchanged = Agenda(small, 200, margin="never")
    assert GuardConfig(lr_for="never").detour(asked(13, 20), 2, unchanged) == Detour(13, 20, 2, "kind", 1.0, 13)


@pytest.mark.parametrize("name", ["throughput", "starvation", "memory"])
def test_what_the_machine_does_is_no_reason_to_go_back(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"monitors.{name}.action: 'rollback' does not fit; .* ignore, warn or stop"):
        read("quickstart", [f"monitors.{name}.action=rollback"])
    assert read("quickstart", ["monitors.loss.action=rollback"]).monitors["loss"].action == "rollback"
