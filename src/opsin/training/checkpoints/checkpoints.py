"""The checkpoints of a run: its state is saved when due, beside training, and restored from the newest one."""

import errno
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from opsin.errors import CheckpointError, Diverged, LockLost, RunError, Stopped
from opsin.processes.starting import unlimited
from opsin.storage.files import remove_leftovers, rename_over, writing
from opsin.storage.teller import Owner, Teller
from opsin.training.agenda import Agenda
from opsin.training.checkpoints.format import Restored, find_checkpoints, load_newest, name_of
from opsin.training.checkpoints.retention import (
    BEST,
    CheckpointConfig,
    DamagedMarks,
    Retention,
    Scored,
    among_best,
    read_best,
    write_best,
)
from opsin.training.checkpoints.snapshot import Snapshot, Snapshots
from opsin.training.checkpoints.writer import room, write_checkpoint, write_fault
from opsin.training.state import Detour, TrainState

_WAY_OUT = "make room, or choose another --out"


class Home(Owner, Protocol):
    """The directory of a run as training needs it."""

    path: Path
    checkpoints: Path
    """The folder of the checkpoints."""


class Record(Teller, Protocol):
    """The journal of a run as its checkpoints need it."""

    def sync(self) -> None:
        """Write all records to the disk; never raises."""

    def history(self, name: str) -> Mapping[int, float]:
        """The recorded values of a score, by step."""


class Copies(Protocol):
    """A backup as checkpoints need it."""

    def take(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint before older ones are removed; called in the writing thread, never raises."""


def most_checkpoints(config: CheckpointConfig, agenda: Agenda) -> int:
    """The most checkpoints that a run has at once: those that are kept, and the one that is being written."""
    steps = range(1, agenda.last_step + 1) if config.milestones else ()
    return config.keep + (config.best_keep if config.best else 0) + sum(map(agenda.is_milestone, steps)) + 1


class Checkpoints:
    """The checkpoints of one run. No failure of the disk stops training."""

    def __init__(
        self,
        home: Home,
        config: CheckpointConfig,
        agenda: Agenda,
        record: Record,
        backup: Copies | None = None,
        *,
        fingerprint: str,
    ) -> None:
        """`fingerprint` is that of the recipe; each checkpoint has it."""
        self._home = home
        self._folder = home.checkpoints
        self._config = config
        self._agenda = agenda
        self._record = record
        self._backup = backup
        self._fingerprint = fingerprint
        self._retention = Retention(self._folder, config, agenda)
        self._snapshots = Snapshots(beside=config.background, teller=record)
        self._writing: Future[_Written] | None = None
        self._newest: tuple[int, tuple[Detour, ...]] | None = None
        self._tried_s = 0.0

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that this process has read or written."""
        return None if self._newest is None else self._newest[0]

    def restore(self, state: TrainState) -> Restored:
        """Load the newest valid checkpoint into `state`, which is fresh; without one it stays as it is.

        Raises:
            CheckpointError: all are damaged (a line for each); one is too new, does not fit, or has a step after the
                last one.
            RunError: the folder cannot be read or written.
        """
        with writing(self._folder, _WAY_OUT):
            remove_leftovers(self._folder)
            restored = load_newest(self._folder, state)
        if state.step > self._agenda.last_step:
            raise CheckpointError(
                f"{self._folder}: the run has done {state.step} steps, the recipe ends after {self._agenda.last_step}; "
                "ask for more epochs, or train into another --out"
            )
        self._newest = None if restored.stored is None else (restored.stored.step, restored.stored.detours)
        self._tried_s = state.elapsed_s
        return restored

    def settle(self, restored: Restored, step: int) -> None:
        """Rename damaged checkpoints to `damaged-step-...`, forget scores after `step`, and report the resume.

        Raises:
            CheckpointError: a damaged one cannot be renamed.
            RunError: the folder cannot be written.
        """
        with writing(self._folder, _WAY_OUT):
            for path, fault in restored.damaged.items():
                self._retire(path, fault, step)
            self._settle_marks(step)
        if (stored := restored.stored) is not None:
            notice = f"resumed from the checkpoint of step {stored.step}"
            changed = stored.recipe != self._fingerprint
            self._record.tell("resumed", stored.step, notice=notice, elapsed_s=stored.elapsed_s, recipe_changed=changed)

    def save_if_due(self, state: TrainState, *, stopping: bool = False) -> Path | None:
        """The checkpoint of this step if one is due, else None; also None if it cannot be written.

        Due are `every`, `milestones`, the last step and a stop; all but minutes are functions of the step. The last two
        are on disk when this returns; for others the writing may go on, and a failure is reported later.
        After a failure at the last step, `newest_step` is an earlier one.

        Raises:
            RunError: `stopping`, and it cannot be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        reason = "stop" if stopping else self._why(state)
        if reason is None:
            return None
        path = self._begin(state, reason)
        if not stopping and state.step != self._agenda.last_step:
            return path
        path = self._saved(state)
        if path is None and stopping:
            raise RunError(
                f"{self._folder}: the checkpoint of step {state.step} could not be written before the stop; "
                f"{self._describe_newest()}; free some space, then resume"
            )
        return path

    def is_due(self, state: TrainState) -> bool:
        """True if `save_if_due` would save this state without a stop."""
        return self._why(state) is not None

    @contextmanager
    def rescue(self, state: TrainState) -> Iterator[None]:
        """After an exception inside, write an emergency checkpoint if the state is whole and worth it.

        Every end waits until everything is written.
        """
        try:
            yield
        except (Stopped, Diverged, LockLost):  # a stop has its own already
            raise
        except BaseException:
            self.emergency(state)
            raise
        finally:
            self._wait_ignoring_errors(state.step)

    def save(self, state: TrainState, *, reason: str) -> Path | None:
        """The checkpoint of this step, on disk when this returns; None if it cannot be written.

        A failure is recorded as an event; the next due step tries again.
        """
        self._begin(state, reason)
        return self._saved(state)

    def wait(self) -> None:
        """Wait until nothing is being written; the result is recorded as an event."""
        if self._writing is None:
            return
        wait([self._writing])  # a second Ctrl-C may end this, and the thread goes on
        done, self._writing = self._writing, None
        self._report(done.result())

    def emergency(self, state: TrainState) -> Path | None:
        """The checkpoint of the last whole state after an exception; None if there is none to save."""
        self._wait_ignoring_errors(state.step)
        if not state.whole or state.step == 0:
            return None
        try:
            return self.save(state, reason="emergency")
        except Exception as error:  # a broken device, say: the exception that led here is the one to be seen
            warning = f"no emergency checkpoint of step {state.step}: {error}; {self._describe_newest()}"
            self._warn("checkpoint_failed", state.step, warning)
            return None

    def healthy(self, before_step: int) -> Path | None:
        """The newest checkpoint of step `before_step` or an earlier one; None if there is none."""
        self.wait()
        return next(reversed([p for step, p in find_checkpoints(self._folder).items() if step <= before_step]), None)

    def retire_after(self, step: int) -> None:
        """Rename the checkpoints of later steps to `unhealthy-step-...`; none is loaded, and the next save keeps one.

        Raises:
            OSError: one cannot be renamed.
        """
        self.wait()
        self._retention.retire_after(step)
        if self._newest is not None and self._newest[0] > step:
            self._newest = None

    def note_scores(self, state: TrainState, scores: Mapping[str, float]) -> None:
        """Mark the state as one of the best if its score in `scores` is among the best."""
        name = self._config.best
        if name is not None and name in scores:
            self.mark_best(state, scores[name])

    def mark_best(self, state: TrainState, score: float) -> bool:
        """Save and keep the state if `score` is among the best; True if it is the best and was saved."""
        if not math.isfinite(score) or self._config.best is None:
            return False
        mine = Scored(state.step, self._config.best, score)
        try:
            marked = read_best(self._folder)
        except RunError as error:
            self._warn("checkpoint_failed", state.step, str(error))
            return False
        best = among_best(marked, mine, self._config)
        if best is None or self.save(state, reason="best") is None:
            return False
        try:
            write_best(self._folder, best)
        except OSError as error:
            self._warn("checkpoint_failed", state.step, f"{BEST} was not written: {error}")
            return False
        if best[0] == mine:
            self._record.tell("best", mine.step, name=mine.name, score=mine.score)
        self._report_kept(state.step, self._retention.prune(state.step))
        return best[0] == mine

    def _why(self, state: TrainState) -> str | None:
        return self._agenda.checkpoint(state.step, minutes=(state.elapsed_s - self._tried_s) / 60)

    def _warn(self, kind: str, step: int, warning: str) -> None:
        self._record.tell(kind, step, warn=warning, warning=warning)

    def _saved(self, state: TrainState) -> Path | None:
        """The checkpoint of this state if it is on disk after all writing."""
        self.wait()
        there = self._newest == (state.step, state.detours)
        return find_checkpoints(self._folder).get(state.step) if there else None

    def _begin(self, state: TrainState, reason: str) -> Path | None:
        """The path of the checkpoint that is being written; None if that has failed already."""
        if (path := self._saved(state)) is not None:
            return path
        self._home.check_held()
        self._tried_s = state.elapsed_s
        started = time.monotonic()
        try:
            snapshot = self._snapshots.take(state)
        except MemoryError as error:
            self._report(_Written(state.step, state.detours, {}, f"no memory: {error}", ()))
            return None
        write = partial(self._write, snapshot, reason, started, blocked_s=time.monotonic() - started)
        if not self._snapshots.beside:
            self._report(write())
            return self._saved(state)
        thread = ThreadPoolExecutor(1, "checkpoint")  # Python waits for it before it exits
        with unlimited():
            self._writing = thread.submit(write)
        thread.shutdown(wait=False)
        return self._folder / name_of(state.step)

    def _write(self, snapshot: Snapshot, reason: str, started: float, *, blocked_s: float) -> "_Written":
        """Write and prune, beside training; `_report` reports the result."""
        step, config = snapshot.step, self._config
        level = config.compression_level if config.compression == "zstd" else None
        about = {
            "recipe": self._fingerprint,
            "epoch": round(self._agenda.timeline.epoch(step), 4),
            "milestone": self._agenda.is_milestone(step),
            "margin": self._agenda.reach(step),
        }
        kept: list[str] = []
        try:
            snapshot.wait()
            kept += self._make_room(snapshot)
            self._record.sync()
            path = write_checkpoint(self._folder, snapshot, about, level=level)
        except OSError as error:
            return _Written(step, snapshot.detours, {}, write_fault(error, self._folder, snapshot), kept)
        except MemoryError:
            return _Written(step, snapshot.detours, {}, "no memory is left", kept)
        seconds = time.monotonic() - started
        if self._backup is not None:
            self._backup.take(path)
        kept += self._retention.prune(step, keep_unhealthy=step != self._agenda.last_step)
        blocked_s = blocked_s if self._snapshots.beside else seconds
        times = {"seconds": round(seconds, 3), "blocked_s": round(blocked_s, 3)}
        facts = {"path": path.name, "reason": reason, **times}
        return _Written(step, snapshot.detours, facts, None, kept)

    def _make_room(self, snapshot: Snapshot) -> list[str]:
        """Remove what the new checkpoint replaces if it does not fit beside it; return the faults of removing.

        Raises:
            OSError: it still does not fit; nothing was written.
        """
        faults: list[str] = []
        needed, free = room(self._folder, snapshot)
        if free < needed and self._config.make_room:
            newest = list(find_checkpoints(self._folder).values())[-1:]
            faults = self._retention.prune(snapshot.step, spared=newest, keep_unhealthy=False)
            free = room(self._folder, snapshot)[1]
        if free < needed:
            raise OSError(errno.ENOSPC, "the disk is full")
        return faults

    def _report(self, written: "_Written") -> None:
        step = written.step
        if written.fault is None:
            self._newest = (step, written.detours)
            self._record.tell("checkpoint", step, **written.facts)
        else:
            warning = (
                f"checkpoint of step {step} was not written: {written.fault}; {self._describe_newest()}; "
                "training goes on and tries again at the next due step"
            )
            self._warn("checkpoint_failed", step, warning)
        self._report_kept(step, written.kept)

    def _report_kept(self, step: int, faults: Sequence[str]) -> None:
        for fault in faults:
            self._warn("checkpoint_kept", step, fault)

    def _wait_ignoring_errors(self, step: int) -> None:
        """Wait at the end of training; an exception that ends it must not be hidden by one of writing."""
        try:
            self.wait()
        except Exception as error:
            warning = f"the last checkpoint was not written: {error}; {self._describe_newest()}"
            self._warn("checkpoint_failed", step, warning)

    def _retire(self, path: Path, fault: str, step: int) -> None:
        retired = path.with_name(f"damaged-{path.name}")
        try:
            rename_over(path, retired)
        except OSError as error:
            raise CheckpointError(f"{fault}; it cannot be renamed to {retired.name}: {error}") from error
        warning = f"{fault}; renamed to {retired.name}, going back to step {step}"
        self._warn("checkpoint_damaged", step, warning)

    def _settle_marks(self, step: int) -> None:
        """Forget the best of later steps; training finds the same again."""
        try:
            self._retention.forget_scores_after(step)
        except DamagedMarks as error:
            best = self._retention.refresh_marks(self._record.history(self._config.best or ""))
            steps = ", ".join(f"step {scored.step}" for scored in best) or "none"
            self._warn("checkpoint_damaged", step, f"{error}: {steps}")

    def _describe_newest(self) -> str:
        return (
            "there is no complete one" if self._newest is None else f"the newest complete one is step {self._newest[0]}"
        )


@dataclass(frozen=True, slots=True)
class _Written:
    """The result of writing a checkpoint."""

    step: int
    detours: tuple[Detour, ...]
    facts: Mapping[str, Any]
    """The facts of its event after success."""
    fault: str | None
    """The reason why it was not written."""
    kept: Sequence[str]
    """A sentence for each older one that could not be removed."""
