"""Rollbacks: training returns to the state before a fault, and continues with other images.

A rollback is a function of the steps at which a fault began and was found, never of the files on disk: steps before
the replaced ones are repeated with the same bits, however old the checkpoint is. So a run with rollbacks resumes
exactly. docs/decisions/0012-rollback.md gives the reasons.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from opsin.clock.cadence import StepEvery
from opsin.errors import Diverged, LockLost, RunError, TransientError
from opsin.reporting.journal import Event
from opsin.reporting.teller import RunTeller
from opsin.settings.family import Settings
from opsin.storage.teller import Fact
from opsin.training.agenda import Agenda, steps_in
from opsin.training.checkpoints.checkpoints import Checkpoints
from opsin.training.checkpoints.format import DamagedCheckpoint, load_into
from opsin.training.monitor import RollBack
from opsin.training.state import Detour, Start, TrainState


class GuardConfig(Settings):
    """Rollbacks, which follow from monitors whose action is `rollback`."""

    max_rollbacks: int = Field(3, ge=0)
    """The largest number of rollbacks; the next fault ends the run with a diagnosis."""
    margin: Literal["auto"] | StepEvery = "auto"
    """Steps or epochs before the first bad row in which the fault may have begun; `auto` is 100 steps, at most a
    quarter of an epoch."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """Factor on every learning rate for `lr_for` steps after a rollback."""
    lr_for: StepEvery = "200 steps"
    """Steps after the last replaced step for which `lr_factor` applies; `never` disables it."""
    cancelled: Literal["stop", "rollback"] = "stop"
    """Consequence of `limits.cancelled_in_a_row` updates in a row without a finite loss and gradient."""

    def detour(self, asked: RollBack, attempt: int, agenda: Agenda) -> Detour:
        """The detour around a fault."""
        began, found = asked.began, asked.found
        first = max(0, began - agenda.margin_steps(began))
        slow = self.lr_factor < 1 and self.lr_for != "never"
        return Detour(
            first=first,
            last=found,
            attempt=attempt,
            kind=asked.finding.kind,
            lr_factor=self.lr_factor if slow else 1.0,
            lr_until=found + steps_in(self.lr_for, agenda.timeline, found) if slow else first,
        )


@dataclass(frozen=True, slots=True)
class Guard:
    """The return of a run to the state before a fault."""

    config: GuardConfig
    agenda: Agenda
    checkpoints: Checkpoints
    teller: RunTeller
    start: Start

    def roll_back(self, state: TrainState, asked: RollBack) -> None:
        """Restore `state` from before the fault, and save it with the detour around the fault.

        Later checkpoints are renamed, later rows of the journal removed. A run that is killed meanwhile finds the fault
        again, or continues with the detour: the result is the same.

        Raises:
            Diverged: all allowed rollbacks are used; the message has the diagnosis. Checkpoints since the fault are
                renamed, so that a resume begins before it; its rows stay.
            TransientError: the disk fails; the next attempt repeats the rollback.
        """
        detour = self.config.detour(asked, len(state.detours) + 1, self.agenda)
        if detour.attempt > self.config.max_rollbacks:
            with _passing(asked):
                self.checkpoints.retire_after(detour.first)
            raise Diverged(self._diagnosis(state, asked))
        before, elapsed_s, events = state.detours, state.elapsed_s, self.teller.journal.events("rollback")
        state.whole = False
        with _passing(asked):
            self._restore(state, detour.first)
            self.teller.journal.rewind(state.step)
        state.detours, state.elapsed_s, state.whole = (*before, detour), elapsed_s, True
        self._record_again(state.step, before, events)
        self._tell(state.step, detour, asked)
        self.checkpoints.save(state, reason="rollback")

    def _restore(self, state: TrainState, first: int) -> None:
        """Load the newest valid checkpoint of step `first` or before, else the start."""
        while (path := self.checkpoints.healthy(first)) is not None:
            self.checkpoints.retire_after(_step_of(path))
            try:
                load_into(path, state)
            except DamagedCheckpoint as error:
                self.teller.warning(f"{error}; an older one is used")
                self.checkpoints.retire_after(_step_of(path) - 1)
            else:
                return
        self.checkpoints.retire_after(-1)
        self.start.over(state)
        state.step = 0

    def _record_again(self, step: int, detours: Sequence[Detour], events: Sequence[Event]) -> None:
        """Record the events of detours that are still in force and that the journal has lost as it went back."""
        left = [event.facts for event in self.teller.journal.events("rollback")]
        for detour in detours:
            facts = next((event.facts for event in events if _facts(detour).items() <= event.facts.items()), None)
            if facts is not None and facts not in left:
                self.teller.journal.event("rollback", step, **facts)

    def _tell(self, step: int, detour: Detour, asked: RollBack) -> None:
        """Report a rollback; a run that was killed and rolls back again records it only once."""
        said: dict[str, Fact] = {"monitor": asked.monitor, "message": asked.message, "since": asked.finding.since}
        facts = {**_facts(detour), **said}
        if all(event.facts != facts for event in self.teller.journal.events("rollback")):
            self.teller.journal.event("rollback", step, **facts)
        slower = f", learning rate x {detour.lr_factor:g} to step {detour.lr_until}" if detour.lr_factor < 1 else ""
        self.teller.warning(
            f"rollback {detour.attempt} of {self.config.max_rollbacks} ({asked.monitor}): from step {asked.found} "
            f"to step {step}; steps {detour.first} to {detour.last} get other images{slower}"
        )

    def _diagnosis(self, state: TrainState, asked: RollBack) -> str:
        if not state.detours:
            return f"{asked.message}; guard.max_rollbacks=0 allows no rollback: the run ends here"
        ways = ", ".join(f"steps {one.first} to {one.last} ({one.kind})" for one in state.detours)
        again = asked.began <= state.detours[-1].last
        cause = (
            "it returns at the same steps with other images: the cause is in the settings rather than in single "
            "images; lower optim.lr, or set optim.clip_norm"
            if again
            else "each time at other steps: look at the images and labels, lower optim.lr, or set optim.clip_norm"
        )
        return (
            f"{asked.message}; rolled back {len(state.detours)} times before: {ways}; {cause}; "
            f"guard.max_rollbacks={self.config.max_rollbacks} allows no more"
        )


@contextmanager
def _passing(asked: RollBack) -> Iterator[None]:
    """Turn a failure of the disk into a transient error that names the fault; the next attempt may succeed."""
    try:
        yield
    except LockLost:
        raise
    except (OSError, RunError) as error:  # the latter where the log cannot be written
        raise TransientError(f"{asked.message}; a rollback fails: {error}; opsin resume tries again") from error


def _facts(detour: Detour) -> dict[str, Fact]:
    """The facts of a detour in its event."""
    return {"finding" if name == "kind" else name: value for name, value in asdict(detour).items()}


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
