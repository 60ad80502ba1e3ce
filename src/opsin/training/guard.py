"""The way back from a trouble: to the state before it, and on from there with other images.

A rollback is a function of the steps at which a trouble began and was found, never of what lies on the disk:
steps before the replaced ones are taken again with the same bits, however far back the checkpoint is. So a run
with rollbacks resumes exactly. docs/decisions/0012-rollback.md says why it is so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
    """What a rollback does; monitors whose action is `rollback` ask for one."""

    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks before the run ends with a diagnosis instead of one more."""
    margin: Literal["auto"] | StepEvery = "auto"
    """How long before the first bad row the trouble may have begun; `auto` is 100 steps, at most a quarter of an
    epoch."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """Factor on every learning rate after a rollback ..."""
    lr_for: StepEvery = "200 steps"
    """... from the first replaced step until so long after the last; `never` lowers nothing."""
    cancelled: Literal["stop", "rollback"] = "stop"
    """What follows from `limits.cancelled_in_a_row` updates without a finite loss and gradient."""

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


class Guard:
    """Brings a run back to before a fault."""

    def __init__(
        self,
        config: GuardConfig,
        agenda: Agenda,
        checkpoints: Checkpoints,
        teller: RunTeller,
        start: Start,
    ) -> None:
        self._config = config
        self._agenda = agenda
        self._checkpoints = checkpoints
        self._teller = teller
        self._journal = teller.journal
        self._start = start

    def roll_back(self, state: TrainState, asked: RollBack) -> None:
        """Put into `state` what was before the fault, and save it with the detour around it.

        Later checkpoints are set aside, later rows of the journal forgotten. Killed in the middle, the run finds the
        trouble again, or goes on with the detour: the end is the same.

        Raises:
            Diverged: there were as many rollbacks as are allowed; says what they have shown. The checkpoints of the
                trouble are set aside, its rows stay to be looked at: a resume begins before it.
            TransientError: the disk fails on the way; training again goes the same way.
        """
        detour = self._config.detour(asked, len(state.detours) + 1, self._agenda)
        if detour.attempt > self._config.max_rollbacks:
            with _passing(asked):
                self._checkpoints.retire_after(detour.first)
            raise Diverged(self._diagnosis(state, asked))
        before, elapsed_s, told = state.detours, state.elapsed_s, self._journal.events("rollback")
        state.whole = False
        with _passing(asked):
            self._restore(state, detour.first)
            self._journal.rewind(state.step)
        state.detours, state.elapsed_s, state.whole = (*before, detour), elapsed_s, True
        self._tell_again(state.step, before, told)
        self._tell(state.step, detour, asked)
        self._checkpoints.save(state, reason="rollback")

    def _restore(self, state: TrainState, first: int) -> None:
        """The newest valid checkpoint of step `first` or before, else the start."""
        while (path := self._checkpoints.healthy(first)) is not None:
            self._checkpoints.retire_after(_step_of(path))
            try:
                load_into(path, state)
            except DamagedCheckpoint as error:
                self._teller.warning(f"{error}; set aside")
                self._checkpoints.retire_after(_step_of(path) - 1)
            else:
                return
        self._checkpoints.retire_after(-1)
        self._start.over(state)
        state.step = 0

    def _tell_again(self, step: int, detours: Sequence[Detour], told: Sequence[Event]) -> None:
        """The events of detours that are still in force, of those `told` before the journal went further back."""
        left = [event.facts for event in self._journal.events("rollback")]
        for detour in detours:
            facts = next((event.facts for event in told if _facts(detour).items() <= event.facts.items()), None)
            if facts is not None and facts not in left:
                self._journal.event("rollback", step, **facts)

    def _tell(self, step: int, detour: Detour, asked: RollBack) -> None:
        """One event for each rollback, also where the run was killed before it was saved and found it again."""
        said: dict[str, Fact] = {"monitor": asked.monitor, "message": asked.message, "since": asked.finding.since}
        facts = {**_facts(detour), **said}
        if all(event.facts != facts for event in self._journal.events("rollback")):
            self._journal.event("rollback", step, **facts)
        slower = f", learning rate x {detour.lr_factor:g} to step {detour.lr_until}" if detour.lr_factor < 1 else ""
        self._teller.warning(
            f"rollback {detour.attempt} of {self._config.max_rollbacks} ({asked.monitor}): from step {asked.found} "
            f"to step {step}; steps {detour.first} to {detour.last} get other images{slower}"
        )

    def _diagnosis(self, state: TrainState, asked: RollBack) -> str:
        if not state.detours:
            return f"{asked.message}; guard.max_rollbacks=0 allows no rollback: the run ends here"
        ways = ", ".join(f"steps {one.first} to {one.last} ({one.kind})" for one in state.detours)
        again = asked.began <= state.detours[-1].last
        cause = (
            "it comes back at the same place with other images: the cause is in the settings rather than in single "
            "images; lower optim.lr, or set optim.clip_norm"
            if again
            else "each time somewhere else: look at the images and labels, lower optim.lr, or set optim.clip_norm"
        )
        return (
            f"{asked.message}; rolled back {len(state.detours)} times before: {ways}; {cause}; "
            f"guard.max_rollbacks={self._config.max_rollbacks} allows no more"
        )


@contextmanager
def _passing(asked: RollBack) -> Iterator[None]:
    """A disk that fails on the way back is reported with the fault, and may work the next time."""
    try:
        yield
    except LockLost:
        raise
    except (OSError, RunError) as error:  # the latter where the log cannot be written
        raise TransientError(f"{asked.message}; a rollback fails: {error}; opsin resume tries again") from error


def _facts(detour: Detour) -> dict[str, Fact]:
    """A detour as its event has it."""
    return {"finding" if name == "kind" else name: value for name, value in asdict(detour).items()}


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
