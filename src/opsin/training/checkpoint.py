"""Which states of a run are saved and kept, and which one it goes on from."""

import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from opsin.cadence import Every, StepEvery, is_due
from opsin.config import Settings
from opsin.errors import CheckpointError, Diverged, RunError, Stopped
from opsin.reporting import Fact
from opsin.rundir import write_atomic
from opsin.timeline import Timeline
from opsin.training.checkpoint_format import (
    Checkpoint,
    DamagedCheckpoint,
    find_checkpoints,
    load_into,
    read_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    size_bytes,
    write_checkpoint,
)
from opsin.training.state import TrainState

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "Checkpoints",
    "DamagedCheckpoint",
    "best_checkpoint",
    "find_checkpoints",
    "load_into",
    "read_checkpoint",
]

_BEST = "best.json"
_MIB = 2**20


class CheckpointConfig(Settings):
    """When state is saved, and what is kept. The last step and a stop are always saved."""

    every: Every = "1 epoch"
    """How often: `500 steps`, `1 epoch`, `10 minutes` of training, or `never`."""
    keep: int = Field(2, ge=1)
    """How many of the newest are kept."""
    milestones: StepEvery | None = None
    """Steps or epochs whose checkpoints are saved and kept for ever (`50 epochs`); null for none."""
    best: str | None = "val/top1"
    """The score whose best checkpoint is kept; null for none."""
    best_mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest score is the best."""


class Checkpoints:
    """The checkpoints of one run. Nothing that happens to the disk stops training."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        timeline: Timeline,
        *,
        fingerprint: str,
        say: Callable[[str, Mapping[str, Fact]], None],
        last_step: int | None = None,
        on_restore: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`say` gets the kind and the facts of an event: always `step`; where all is not well `warning`, a sentence.

        `last_step` is where the run ends if not with the timeline. `on_restore` gets the step that the run goes on from
        (0 where there is no checkpoint), before any event: what was logged after it is to be forgotten.
        """
        self._folder = folder
        self._config = config
        self._timeline = timeline
        self._fingerprint = fingerprint
        self._say = say
        self._last_step = timeline.total_steps if last_step is None else last_step
        self._on_restore = on_restore
        self._newest: int | None = None
        self._tried_s = 0.0

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that this process has read or written."""
        return self._newest

    def restore(self, fresh: TrainState) -> TrainState:
        """`fresh` with the newest valid checkpoint in it, or as it is where there is none.

        Damaged ones are passed over with a warning and renamed to `damaged-step-...`.

        Raises:
            CheckpointError: all are damaged (a line for each); one is too new, does not fit, or is of a step
                after the last one.
        """
        remove_leftovers(self._folder)
        damaged: dict[Path, str] = {}
        stored: Checkpoint | None = None
        for path in reversed(find_checkpoints(self._folder).values()):
            try:
                stored = load_into(path, fresh)
                break
            except DamagedCheckpoint as error:
                damaged[path] = str(error)
        if stored is None and damaged:
            raise CheckpointError(
                *damaged.values(), f"{self._folder}: no valid checkpoint is left; start over with --fresh"
            )
        if fresh.step > self._last_step:
            raise CheckpointError(
                f"{self._folder}: the run has done {fresh.step} steps, the recipe ends after {self._last_step}; "
                "ask for more epochs, or train into another --out"
            )
        self._newest = None if stored is None else stored.step
        self._tried_s = fresh.elapsed_s
        self._on_restore(fresh.step)
        for path, fault in damaged.items():
            self._set_aside(path, fault, fresh.step)
        best = _read_best(self._folder)
        if best is not None and best.step > fresh.step:
            # It will be found again: everything is a function of the step.
            (self._folder / _BEST).unlink(missing_ok=True)
        if stored is not None:
            changed = stored.recipe != self._fingerprint
            self._say("resumed", {"step": stored.step, "elapsed_s": stored.elapsed_s, "recipe_changed": changed})
        return fresh

    def save_if_due(self, state: TrainState, *, stopping: bool = False) -> Path | None:
        """The checkpoint of this step if one is due, else None; also None where it cannot be written.

        Due are `every`, `milestones`, the last step and a stop: but for minutes, functions of the step.
        A failure at the last step shows in `newest_step`.

        Raises:
            RunError: `stopping`, and it cannot be written.
        """
        reason = "stop" if stopping else self._why(state)
        if reason is None:
            return None
        path = self.save(state, reason=reason)
        if path is None and stopping:
            raise RunError(
                f"{self._folder}: the checkpoint of step {state.step} could not be written before the stop; "
                f"{self._newest_in_words()}; free some space, then resume"
            )
        return path

    def is_due(self, state: TrainState) -> bool:
        """Whether `save_if_due` would save this state without a stop."""
        return self._why(state) is not None

    @contextmanager
    def rescue(self, state: TrainState) -> Iterator[None]:
        """An exception inside writes an emergency checkpoint, if the state is whole and worth it."""
        try:
            yield
        except (Stopped, Diverged):  # a stop has its own already
            raise
        except BaseException:
            self.emergency(state)
            raise

    def save(self, state: TrainState, *, reason: str) -> Path | None:
        """The checkpoint of this step, written if it is not there yet; None where it cannot be written.

        A failure is told as an event; the next due step tries again.
        """
        found = find_checkpoints(self._folder)
        if state.step == self._newest and state.step in found:
            return found[state.step]
        self._tried_s = state.elapsed_s
        started = time.monotonic()
        try:
            path = write_checkpoint(self._folder, state, recipe=self._fingerprint)
        except OSError as error:
            self._say("checkpoint_failed", {"step": state.step, "warning": self._failure_in_words(state, error)})
            return None
        self._newest = state.step
        seconds = round(time.monotonic() - started, 3)
        self._say("checkpoint", {"step": state.step, "path": path.name, "reason": reason, "seconds": seconds})
        self._prune(state.step)
        return path

    def emergency(self, state: TrainState) -> Path | None:
        """After an exception: the checkpoint of the last whole state; None where there is none to save."""
        if not state.whole or state.step == 0:
            return None
        try:
            return self.save(state, reason="emergency")
        except Exception as error:  # a broken device, say: the exception that led here is the one to be seen
            warning = f"no emergency checkpoint of step {state.step}: {error}; {self._newest_in_words()}"
            self._say("checkpoint_failed", {"step": state.step, "warning": warning})
            return None

    def note_scores(self, state: TrainState, scores: Mapping[str, float]) -> None:
        """Mark the state as the best where `scores` says so."""
        name = self._config.best
        if name is not None and name in scores:
            self.mark_best(state, scores[name])

    def mark_best(self, state: TrainState, score: float) -> bool:
        """Save and keep the state if `score` beats all before; whether it does and could be saved."""
        best = _read_best(self._folder)
        sign = 1 if self._config.best_mode == "max" else -1
        if not math.isfinite(score) or self._config.best is None:
            return False
        if best is not None and best.name == self._config.best and sign * score <= sign * best.score:
            return False
        if self.save(state, reason="best") is None:
            return False
        facts = asdict(_Best(state.step, self._config.best, score))
        try:
            write_atomic(self._folder / _BEST, (json.dumps(facts) + "\n").encode())
        except OSError as error:
            self._say("checkpoint_failed", {"step": state.step, "warning": f"{_BEST} was not written: {error}"})
            return False
        self._say("best", facts)
        self._prune(state.step)
        return True

    def _why(self, state: TrainState) -> str | None:
        if state.step == self._last_step:
            return "last step"
        if self._is_milestone(state.step):
            return "milestone"
        minutes = (state.elapsed_s - self._tried_s) / 60
        return self._config.every if is_due(self._config.every, self._timeline, state.step, minutes) else None

    def _prune(self, step: int) -> None:
        """Remove what is neither among the newest, nor a milestone, nor the best."""
        found = find_checkpoints(self._folder)
        best = _read_best(self._folder)
        kept = {*list(found)[-self._config.keep :], self._newest, best.step if best else None}
        for old, path in found.items():
            if old in kept or self._is_milestone(old):
                continue
            try:
                remove_checkpoint(path)
            except OSError as error:
                self._say("checkpoint_kept", {"step": step, "warning": f"{path}: cannot be removed: {error}"})

    def _set_aside(self, path: Path, fault: str, step: int) -> None:
        aside = path.with_name(f"damaged-{path.name}")
        try:
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
        except OSError as error:
            raise CheckpointError(f"{fault}; it cannot be renamed to {aside.name}: {error}") from error
        self._say(
            "checkpoint_damaged",
            {"step": step, "warning": f"{fault}; renamed to {aside.name}, going back to step {step}"},
        )

    def _is_milestone(self, step: int) -> bool:
        return self._config.milestones is not None and is_due(self._config.milestones, self._timeline, step)

    def _failure_in_words(self, state: TrainState, error: OSError) -> str:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
            needed, free = size_bytes(state) / _MIB, shutil.disk_usage(place).free / _MIB
            reason = f"no space left (needs about {needed:.1f} MiB, {free:.1f} MiB are free)"
        return (
            f"checkpoint of step {state.step} was not written: {reason}; {self._newest_in_words()}; "
            "training goes on and tries again at the next due step"
        )

    def _newest_in_words(self) -> str:
        return "there is no complete one" if self._newest is None else f"the newest complete one is step {self._newest}"


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in `folder` with the best score; None where none was marked."""
    best = _read_best(folder)
    return None if best is None else find_checkpoints(folder).get(best.step)


@dataclass(frozen=True, slots=True)
class _Best:
    step: int
    name: str
    score: float


def _read_best(folder: Path) -> _Best | None:
    try:
        facts = json.loads((folder / _BEST).read_bytes())
        return _Best(int(facts["step"]), str(facts["name"]), float(facts["score"]))
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: the next best replaces it
        return None
