"""`fit`: every step once, whatever interrupts it."""

import io
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

import pytest
import torch
import torch.nn.functional as F

from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch, DataFacts, Detour
from opsin.errors import DataError, Stopped
from opsin.methods.base import Clock, Losses, Method
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.reporting.teller import RunTeller
from opsin.storage.directory import RunDirectory
from opsin.training.agenda import Agenda
from opsin.training.alerts import Alerts
from opsin.training.checkpoints.checkpoints import Checkpoints
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.checkpoints.retention import CheckpointConfig
from opsin.training.evaluations import Evaluations
from opsin.training.evaluator import Evaluator
from opsin.training.guard import Guard, GuardConfig
from opsin.training.loop import Run, fit
from opsin.training.monitor import Action, Monitor
from opsin.training.observe import Observations
from opsin.training.state import ScheduledValues, StepPlan, TrainState
from opsin.training.stop import Stop
from tests.story import Calm
from tests.unit.training.tiny_run import Tiny, equal

TIMELINE = Timeline([Stage(epochs=3, batch_size=4, steps_per_epoch=5)])
LAST = TIMELINE.total_steps


class Learning(Tiny):
    """The tiny method with a loss, which is the larger the larger its images are."""

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        images = batch.views["image"][0]
        return Losses(F.cross_entropy(self.layers(images), batch.labels) * images.abs().max())


class Numbers:
    """Batches that follow from the step; `at` is called with each step before its batch is given."""

    facts = DataFacts(("a", "b", "c"), 20, 1, 6, (0.0,), (1.0,))

    def __init__(self, at: Callable[[int], None] = lambda step: None) -> None:
        self.at = at
        self.given: list[int] = []

    def batches(self, start: int, stop: int, detours: Sequence[Detour] = ()) -> Iterator[Batch]:
        for step in range(start, stop):
            self.at(step)
            self.given.append(step)
            attempt = max((detour.attempt for detour in detours if detour.first <= step < detour.last), default=0)
            images = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(step + 1000 * attempt))
            yield Batch({"image": images}, torch.tensor([0, 1, 2, 0]), torch.arange(4) + 4 * step)


def fresh() -> TrainState:
    method = Learning()
    return TrainState(method, torch.optim.AdamW(method.parameters(), lr=0.01, fused=True))


class Beginning:
    """The start of a run whose journal forgets what comes after the state that it goes on from."""

    def __init__(self, state: TrainState, journal: Journal) -> None:
        self._state = state
        self.commit = journal.rewind

    def fresh(self) -> TrainState:
        return self._state

    def over(self, state: TrainState) -> None:
        begun = fresh()
        state.method.load_state_dict(begun.method.state_dict())
        state.optimizer.load_state_dict(begun.optimizer.state_dict())


def set_schedule(optimizer: torch.optim.Optimizer, clock: Clock) -> ScheduledValues:
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return ScheduledValues(0.01, 0.9, 0.0)


def run_in(
    folder: Path,
    data: Numbers,
    evaluator: Evaluator | None = None,
    *,
    every: str = "never",
    monitors: Mapping[str, tuple[Action, Monitor]] = MappingProxyType({}),
    guard: GuardConfig | None = None,
    screen: TextIO | None = None,
) -> Run:
    """A run with the files of `folder`, as a new process would open it."""
    folder.mkdir(exist_ok=True)
    directory = RunDirectory(folder)
    teller = RunTeller(Journal(folder, teller=Calm()), Console(screen or io.StringIO()))
    agenda = Agenda(TIMELINE, LAST, rows=4, evaluators={} if evaluator is None else {"val": "1 epoch"})
    margin = GuardConfig().margin if guard is None else guard.margin
    saved = replace(agenda, checkpoints=every, margin=margin, delay=None if guard is None else 3)
    config = CheckpointConfig.model_validate({"best": None, "background": False})
    checkpoints = Checkpoints(directory, config, saved, teller, fingerprint="f00d")
    # Without a guard, monitors judge also the row that a stop leaves.
    alerts = Alerts(teller, agenda if guard is not None else replace(agenda, rows=1), monitors)
    answers = guard is not None and guard.cancelled == "rollback"
    observations = Observations(teller, agenda, limit=3, alerts=alerts if answers else None)
    scored = {} if evaluator is None else {"val": evaluator}
    evaluations = Evaluations(teller, agenda, scored, observations=observations, best=checkpoints)
    state = fresh()
    start = Beginning(state, teller.journal)
    rescuer = Guard(guard or GuardConfig(), saved, checkpoints, teller, start)
    plan = StepPlan(state.method, TIMELINE.clock, set_schedule, nullcontext, seed=0)
    watchers = (checkpoints, observations, evaluations, alerts, rescuer)
    return Run(start, data, plan, agenda, *watchers, Stop(), directory)


def signal_at(wanted: int, step: int) -> None:
    if step == wanted:
        os.kill(os.getpid(), signal.SIGTERM)


def test_every_step_is_trained_once_and_logged(tmp_path: Path) -> None:
    data = Numbers()
    run = run_in(tmp_path, data)
    state = fit(run)
    assert state.step == LAST
    assert data.given == list(range(LAST))
    assert [row.step for row in Journal(tmp_path, teller=Calm()).rows()] == [4, 5, 8, 10, 12, 15]
    assert list(find_checkpoints(run.directory.checkpoints)) == [LAST]


@pytest.mark.parametrize("stopped_at", [0, 6, 13])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, stopped_at: int) -> None:
    straight = fit(run_in(tmp_path / "straight", Numbers()))
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped, match=rf"SIGTERM: stopped after step {stopped_at + 1} of 15, which is saved"):
        fit(run_in(folder, Numbers(partial(signal_at, stopped_at))))
    assert list(find_checkpoints(folder / "checkpoints")) == [stopped_at + 1]
    rest = Numbers()
    assert equal(fit(run_in(folder, rest)), straight)
    assert rest.given == list(range(stopped_at + 1, LAST))
    rows = {path.name: [row.step for row in Journal(path, teller=Calm()).rows()] for path in tmp_path.iterdir()}
    assert rows["stopped"] == sorted({*rows["straight"], stopped_at + 1})


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    once = fit(run_in(tmp_path, Numbers()))
    again = Numbers()
    assert equal(fit(run_in(tmp_path, again)), once)
    assert again.given == []


def test_a_signal_at_the_last_step_is_no_reason_to_stop(tmp_path: Path) -> None:
    assert fit(run_in(tmp_path, Numbers(partial(signal_at, LAST - 1)))).step == LAST


def test_a_fault_of_the_data_saves_what_was_learned(tmp_path: Path) -> None:
    straight = fit(run_in(tmp_path / "straight", Numbers()))

    def fail(step: int) -> None:
        if step == 7:
            raise DataError("the disk is gone")

    folder = tmp_path / "failed"
    with pytest.raises(DataError, match="the disk is gone"):
        fit(run_in(folder, Numbers(fail)))
    assert list(find_checkpoints(folder / "checkpoints")) == [7]
    assert equal(fit(run_in(folder, Numbers())), straight)


class Fails:
    """An evaluator that does not survive its second evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[list[int]] = []

    def evaluate(self, method: Method) -> Mapping[str, float]:
        self.saved.append(list(find_checkpoints(self.folder)))
        if len(self.saved) == 2:
            raise RuntimeError("out of memory")
        return {"top1": 0.5}


def test_saving_comes_before_evaluation_which_a_resumed_run_makes_up_for(tmp_path: Path) -> None:
    evaluator = Fails(tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(run_in(tmp_path, Numbers(), evaluator, every="5 steps"))
    assert evaluator.saved == [[5], [5, 10]]
    state = fit(run_in(tmp_path, Numbers(), evaluator, every="5 steps"))
    assert state.step == LAST
    assert len(evaluator.saved) == 4, "at 5; failed at 10; again at 10; at 15"
    scored = [row.step for row in Journal(tmp_path, teller=Calm()).rows() if "val/top1" in row.values]
    assert scored == [5, 10, 15]
