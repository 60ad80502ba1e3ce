"""The checkpoints of a run that are kept, and the best of them."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from opsin.clock.cadence import Every, StepEvery
from opsin.errors import RunError
from opsin.settings.family import Settings
from opsin.storage.files import reason_of, remove_whole, rename_over, write_atomic
from opsin.storage.records import RecordFormat
from opsin.training.checkpoints.format import find_checkpoints

BEST = "best.json"
UNHEALTHY = "unhealthy-"
"""Prefix of the name of a checkpoint from after a fault: it is never loaded. The newest stays for inspection until the
next rollback or the end of the run."""


class CheckpointConfig(Settings):
    """The schedule of checkpoints, and those that are kept. The last step and a stop are always saved."""

    every: Every = "1 epoch"
    """Interval between checkpoints: `500 steps`, `1 epoch`, `10 minutes` of training, or `never`."""
    keep: int = Field(2, ge=1)
    """Number of the newest checkpoints that are kept."""
    milestones: StepEvery | None = None
    """Steps or epochs whose checkpoints are saved and kept for ever (`50 epochs`); null for none."""
    best: str | None = "val/top1"
    """The score whose best checkpoint is kept; null for none."""
    best_mode: Literal["max", "min"] = "max"
    """The best score is the highest (`max`) or the lowest (`min`)."""
    best_keep: int = Field(1, ge=1)
    """Number of the best checkpoints that are kept."""
    background: bool = True
    """Write a copy of the state while training goes on; false makes training wait and saves the memory."""
    compression: Literal["none", "zstd"] = "none"
    """Compression of the files; docs/CHECKPOINTS.md has its gain and its cost."""
    compression_level: int = Field(1, ge=1, le=19)
    """Level of zstd; higher levels take much longer and save little on weights."""
    make_room: bool = True
    """On a full disk, remove the checkpoints that the new one replaces before it is written; never the newest."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A checkpoint that is among the best."""

    step: int
    name: str
    """Name of the score."""
    score: float


@dataclass(frozen=True, slots=True)
class _Other:
    step: int
    score: float


@dataclass(frozen=True, slots=True)
class _Marks:
    """The content of `best.json`, which has `others` only if there are some."""

    step: int
    name: str
    score: float
    others: tuple[_Other, ...] = ()


_MARKS = RecordFormat(_Marks)


class DamagedMarks(RunError):
    """The file that names the best checkpoints is damaged."""


def read_best(folder: Path) -> list[Scored]:
    """The best checkpoints in `folder`, the best of all first; none if none was marked.

    Raises:
        DamagedMarks: the file is damaged.
        RunError: it cannot be read.
    """
    path = folder / BEST
    try:
        marks = _MARKS.parse(path.read_bytes())
        others = [Scored(other.step, marks.name, other.score) for other in marks.others]
        return [Scored(marks.step, marks.name, marks.score), *others]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {reason_of(error)}; it names the best checkpoints: look at the disk, or "
            "delete it to go on without them"
        ) from error
    except ValueError as error:
        advice = "it names the best checkpoints, and a resume restores it from the log"
        raise DamagedMarks(f"{path}: is damaged ({error}); {advice}") from error


def write_best(folder: Path, best: Sequence[Scored]) -> None:
    """Mark the checkpoints of these steps as the best.

    Raises:
        OSError: it cannot be written; the former marks stay.
    """
    if not best:
        (folder / BEST).unlink(missing_ok=True)
        return
    facts = asdict(best[0])
    if others := [{"step": other.step, "score": other.score} for other in best[1:]]:
        facts["others"] = others
    write_atomic(folder / BEST, (json.dumps(facts) + "\n").encode())


def among_best(best: Sequence[Scored], new: Scored, config: CheckpointConfig) -> list[Scored] | None:
    """The best after `new`; None if it is not among them. Of equal scores the earlier is better."""
    sign = 1 if config.best_mode == "max" else -1
    same = [other for other in best if other.name == new.name]
    if any(other.step == new.step and sign * other.score >= sign * new.score for other in same):
        return None
    others = [other for other in same if other.step != new.step]
    after = sorted([*others, new], key=lambda scored: -sign * scored.score)[: config.best_keep]
    return after if new in after else None


class Needs(Protocol):
    """The steps whose checkpoints a run needs at any age; an `Agenda` knows them."""

    def is_milestone(self, step: int) -> bool:
        """True if the checkpoint of `step` is kept for ever."""

    def reach(self, step: int) -> int | None:
        """The most steps that a rollback may go back from `step`; None if there are no rollbacks."""


@dataclass(frozen=True, slots=True)
class Retention:
    """The rules for a folder of checkpoints.

    Kept are the newest, the best, the milestones, and the last healthy one, which a rollback may need: the newest that
    is older than the present by the margin of that step; also the next one, which will be the last healthy one later.
    """

    folder: Path
    config: CheckpointConfig
    needs: Needs

    def kept(self, steps: Iterable[int], present: int) -> set[int]:
        """The kept ones of `steps` after `present` steps of training."""
        ordered = sorted(steps)
        kept = {*ordered[-self.config.keep :], present}
        kept |= {step for step in ordered if self.needs.is_milestone(step)}
        kept |= {scored.step for scored in read_best(self.folder)}
        if (reach := self.needs.reach(present)) is not None:
            healthy = [step for step in ordered if step <= present - reach]
            # And its successor, once that is old enough.
            kept |= {*healthy[-1:], *ordered[len(healthy) : len(healthy) + 1]}
        return kept & set(ordered)

    def superfluous(self, present: int, *, keep_unhealthy: bool = True) -> list[Path]:
        """The checkpoints that `prune` would remove, oldest first."""
        found = find_checkpoints(self.folder)
        # Also that of the present, which may not be written yet.
        kept = self.kept({*found, present}, present)
        # The one that was written last is nearest to the newest fault.
        unhealthy = sorted(self.folder.glob(f"{UNHEALTHY}step-*"), key=_written)
        retired = unhealthy[:-1] if keep_unhealthy else unhealthy
        return [*retired, *(path for step, path in found.items() if step not in kept)]

    def prune(self, present: int, *, spared: Collection[Path] = (), keep_unhealthy: bool = True) -> list[str]:
        """Remove what is not kept; return a sentence for each that cannot be removed.

        Nothing is removed if the names of the best cannot be read. Without `keep_unhealthy` the newest one from after a
        fault is removed too.
        """
        faults = []
        try:
            doomed = self.superfluous(present, keep_unhealthy=keep_unhealthy)
        except RunError as error:
            return [f"{error}; no checkpoint is removed meanwhile"]
        for path in doomed:
            if path in spared:
                continue
            try:
                remove_whole(path)
            except OSError as error:
                faults.append(f"{path}: cannot be removed: {error}")
        return faults

    def retire_after(self, step: int) -> list[Path]:
        """Rename the checkpoints of later steps to `unhealthy-step-...`, and forget their scores; return the old paths.

        Raises:
            OSError: one cannot be renamed.
            RunError: the names of the best cannot be read.
        """
        later = [path for number, path in find_checkpoints(self.folder).items() if number > step]
        # The newest first: a run that is killed in between resumes nearer to `step`.
        for path in reversed(later):
            rename_over(path, path.with_name(f"{UNHEALTHY}{path.name}"))
        self.forget_scores_after(step)
        return later

    def refresh_marks(self, scores: Mapping[int, float]) -> list[Scored]:
        """Mark the best of the existing checkpoints, by the scores of the log by step.

        Raises:
            OSError: the marks cannot be written.
        """
        best: list[Scored] = []
        for step in find_checkpoints(self.folder):
            score = scores.get(step, math.nan)
            if self.config.best is not None and math.isfinite(score):
                best = among_best(best, Scored(step, self.config.best, score), self.config) or best
        write_best(self.folder, best)
        return best

    def forget_scores_after(self, step: int) -> None:
        """Remove later checkpoints from the best.

        Raises:
            RunError: the marks cannot be read.
            OSError: they cannot be written.
        """
        best = read_best(self.folder)
        if any(scored.step > step for scored in best):
            write_best(self.folder, [scored for scored in best if scored.step <= step])


def _written(path: Path) -> tuple[int, str]:
    """The order in which checkpoints were written; at equal times the later step is newer."""
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # removed at this moment, or a bad disk
        return 0, path.name
