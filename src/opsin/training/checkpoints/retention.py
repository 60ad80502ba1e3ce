"""Which checkpoints of a run are kept, and which of them are the best."""

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
from opsin.storage.files import remove_whole, rename_over, write_atomic
from opsin.training.checkpoints.format import find_checkpoints

BEST = "best.json"
UNHEALTHY = "unhealthy-"
"""Before the name of a checkpoint that a rollback went back over: never loaded. The newest stays, to be looked at,
until the next rollback or the end of the run."""


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
    best_keep: int = Field(1, ge=1)
    """How many of the best are kept."""
    background: bool = True
    """Write while training goes on, from a copy of the state; false makes training wait, and saves the memory."""
    compression: Literal["none", "zstd"] = "none"
    """What the files are compressed with; docs/CHECKPOINTS.md says what it saves and takes."""
    compression_level: int = Field(1, ge=1, le=19)
    """Of zstd; higher ones take much longer and save little of what networks consist of."""
    make_room: bool = True
    """On a full disk, remove what the new checkpoint replaces before it is written; never the newest."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A checkpoint that is among the best."""

    step: int
    name: str
    """Of the score."""
    score: float


class DamagedMarks(RunError):
    """The file that names the best checkpoints can be read, but says nothing."""


def read_best(folder: Path) -> list[Scored]:
    """The best checkpoints in `folder`, the very best first; none where none was marked.

    Raises:
        DamagedMarks: the file says nothing.
        RunError: it cannot be read.
    """
    path = folder / BEST
    try:
        facts = json.loads(path.read_bytes())
        first = Scored(int(facts["step"]), str(facts["name"]), float(facts["score"]))
        others = [Scored(int(o["step"]), first.name, float(o["score"])) for o in facts.get("others", [])]
        return [first, *others]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror or error}; it names the best checkpoints: look at the disk, or "
            "delete it to go on without them"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedMarks(
            f"{path}: is damaged ({error!r}); it names the best checkpoints, and a resume makes it anew from the log"
        ) from error


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


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in `folder` with the best score; None where none was marked."""
    best = read_best(folder)
    return find_checkpoints(folder).get(best[0].step) if best else None


def among_best(best: Sequence[Scored], new: Scored, config: CheckpointConfig) -> list[Scored] | None:
    """The best after `new`; None where that is not among them. Of equal scores the earlier is better."""
    sign = 1 if config.best_mode == "max" else -1
    same = [other for other in best if other.name == new.name]
    if any(other.step == new.step and sign * other.score >= sign * new.score for other in same):
        return None
    others = [other for other in same if other.step != new.step]
    after = sorted([*others, new], key=lambda scored: -sign * scored.score)[: config.best_keep]
    return after if new in after else None


class Needs(Protocol):
    """The steps whose checkpoints a run needs, whatever their age; an `Agenda` says so."""

    def is_milestone(self, step: int) -> bool:
        """True if the checkpoint of `step` is kept for ever."""
        ...

    def reach(self, step: int) -> int | None:
        """The most steps that a rollback may go back from `step`; None where none may."""
        ...


class Retention:
    """The policy, and the folder that it is applied to.

    Kept are the newest, the best, the milestones, and the last healthy one, which a rollback may need: the newest
    that is older than the present by the margin of that step; with the next, which will be that in its turn.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        needs: Needs,
    ) -> None:
        self._folder = folder
        self._config = config
        self._needs = needs

    def kept(self, steps: Iterable[int], present: int) -> set[int]:
        """Those of `steps` that stay when training has done `present` steps."""
        ordered = sorted(steps)
        kept = {*ordered[-self._config.keep :], present}
        kept |= {step for step in ordered if self._needs.is_milestone(step)}
        kept |= {scored.step for scored in read_best(self._folder)}
        if (reach := self._needs.reach(present)) is not None:
            healthy = [step for step in ordered if step <= present - reach]
            # And the one that takes its place when it has become old enough.
            kept |= {*healthy[-1:], *ordered[len(healthy) : len(healthy) + 1]}
        return kept & set(ordered)

    def superfluous(self, present: int, *, keep_unhealthy: bool = True) -> list[Path]:
        """What `prune` would remove, oldest first."""
        found = find_checkpoints(self._folder)
        # With the one of the present, which may be yet to be written.
        kept = self.kept({*found, present}, present)
        # The one that was written last is nearest to the newest trouble, and says most about it.
        unhealthy = sorted(self._folder.glob(f"{UNHEALTHY}step-*"), key=_written)
        retired = unhealthy[:-1] if keep_unhealthy else unhealthy
        return [*retired, *(path for step, path in found.items() if step not in kept)]

    def prune(self, present: int, *, spared: Collection[Path] = (), keep_unhealthy: bool = True) -> list[str]:
        """Remove what is not kept; a sentence for each that cannot be removed.

        Nothing is removed where it cannot be read which are the best. Without `keep_unhealthy` the newest that a
        rollback went back over goes too.
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
        """Rename the checkpoints of later steps to `unhealthy-step-...`, and forget their scores; their old paths.

        Raises:
            OSError: one cannot be renamed.
            RunError: it cannot be read which are the best.
        """
        later = [path for number, path in find_checkpoints(self._folder).items() if number > step]
        # The newest first: killed in between, the run goes on from one that is nearer to `step`.
        for path in reversed(later):
            rename_over(path, path.with_name(f"{UNHEALTHY}{path.name}"))
        self.forget_scores_after(step)
        return later

    def refresh_marks(self, scores: Mapping[int, float]) -> list[Scored]:
        """Mark the best of the checkpoints that are there, by the scores that the log has of steps.

        Raises:
            OSError: the marks cannot be written.
        """
        best: list[Scored] = []
        for step in find_checkpoints(self._folder):
            score = scores.get(step, math.nan)
            if self._config.best is not None and math.isfinite(score):
                best = among_best(best, Scored(step, self._config.best, score), self._config) or best
        write_best(self._folder, best)
        return best

    def forget_scores_after(self, step: int) -> None:
        """Later checkpoints are not the best any more: they will be found again, or shall not be.

        Raises:
            RunError: the marks cannot be read.
            OSError: they cannot be written.
        """
        best = read_best(self._folder)
        if any(scored.step > step for scored in best):
            write_best(self._folder, [scored for scored in best if scored.step <= step])


def _written(path: Path) -> tuple[int, str]:
    """What sorts checkpoints by when they were written; of the same moment the later step is the newer."""
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # removed at this moment, or a bad disk
        return 0, path.name
