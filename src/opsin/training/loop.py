"""The loop. `Run` has everything that it needs; `TrainState` has everything that changes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from opsin.data.base import Batch, Data
from opsin.errors import Stopped, StoppedWaiting
from opsin.training.agenda import Agenda
from opsin.training.alerts import Alerts
from opsin.training.checkpoints.checkpoints import Checkpoints, Home
from opsin.training.evaluations import Evaluations
from opsin.training.guard import Guard
from opsin.training.monitor import RollBack
from opsin.training.observe import Observations
from opsin.training.state import Start, StepPlan, TrainState
from opsin.training.step import train_step
from opsin.training.stop import Stop


class Profile:
    """A profile of no step."""

    def over(self, batches: Iterator[Batch], state: TrainState) -> Iterator[Batch]:
        """The same batches; each is requested when `state` is ready for it."""
        return batches

    def end_step(self, state: TrainState) -> None:
        """End the step that the last batch has begun."""


@dataclass(frozen=True, slots=True)
class Run:
    """The assembled objects of a run. Nothing in it changes what is learned except `plan` and `data`."""

    start: Start
    data: Data
    plan: StepPlan
    agenda: Agenda
    checkpoints: Checkpoints
    observations: Observations
    evaluations: Evaluations
    alerts: Alerts
    guard: Guard
    stop: Stop
    directory: Home
    profile: Profile = field(default_factory=Profile)


def fit(run: Run) -> TrainState:
    """Train to `run.agenda.last_step`, from the newest valid checkpoint if there is one.

    Only `train_step` changes weights, except for a rollback, which restores earlier ones. Saving precedes evaluation,
    so that a long or failing evaluation never costs training.

    Raises:
        Stopped: a signal or the time limit; a checkpoint of this step is on disk.
        TrainingError: too many updates in a row were cancelled, or a monitor requests a stop or one rollback more than
            are allowed.
    """
    state = run.start.fresh()
    restored = run.checkpoints.restore(state)
    run.start.commit(state.step)
    run.checkpoints.settle(restored, state.step)
    with run.stop, run.checkpoints.rescue(state):
        while True:
            try:
                return _train(run, state)
            except RollBack as asked:
                run.guard.roll_back(state, asked)


def _train(run: Run, state: TrainState) -> TrainState:
    """Train `state` to `run.agenda.last_step`."""
    with run.alerts.watch(state), run.observations.watch(state):
        try:
            _take_steps(run, state)
        except StoppedWaiting as stopped:
            run.checkpoints.save_if_due(state, stopping=True)
            raise _stopped(run, state, f"{stopped.reason}, while waiting for images") from stopped
    return state


def _take_steps(run: Run, state: TrainState) -> None:
    run.evaluations.run_if_due(state)
    run.alerts.judge(state)
    batches = run.observations.waiting(run.data.batches(state.step, run.agenda.last_step, state.detours))
    for batch in run.profile.over(batches, state):
        report = train_step(state, batch, run.plan)
        del batch  # scores and the next batch need its memory
        run.profile.end_step(state)
        stop = run.stop.requested if state.step < run.agenda.last_step else None
        run.observations.take(state, report, ends=stop is not None)
        run.checkpoints.save_if_due(state, stopping=stop is not None)
        if stop is not None:
            raise _stopped(run, state, stop)
        run.evaluations.run_if_due(state)
        run.alerts.judge(state)


def _stopped(run: Run, state: TrainState, reason: str) -> Stopped:
    return Stopped(
        f"{reason}: stopped after step {state.step} of {run.agenda.last_step}, which is saved; "
        f"opsin resume {run.directory.path} goes on"
    )
