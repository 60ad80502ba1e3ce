"""`opsin checkpoints`: look at the stored states of a run, verify them, make room, go back to an older one."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opsin.errors import CheckpointError, RunError
from opsin.reporting.console import duration
from opsin.run.recipe import read
from opsin.storage.compression import SUFFIX
from opsin.storage.directory import RunDirectory
from opsin.storage.files import REPLACING, remove_whole
from opsin.storage.table import aligned
from opsin.storage.teller import Teller
from opsin.training.checkpoints.format import DamagedCheckpoint, find_checkpoints, name_of, read_manifest, verify
from opsin.training.checkpoints.retention import UNHEALTHY, CheckpointConfig, Retention, read_best

LATER = "later-"
"""Before the name of a checkpoint after the one that was restored: never loaded, kept until it is pruned."""

_DAMAGED = "damaged-"
_MIB = 2**20
_LOOKS = 10  # at a checkpoint that changes while it is read


@dataclass(frozen=True, slots=True)
class Stored:
    """One checkpoint in a list."""

    name: str
    step: int
    epoch: float | None
    score: str | None
    """Name and value of the score, if it is among the best."""
    bytes: int
    age_s: float
    healthy: bool | None
    """True if a rollback may go back to it; None if the run has no rollbacks, or if it is too new to tell."""
    compressed: bool
    verified: str
    """`sizes`, `sha256`, `too new` or `DAMAGED`."""
    fault: str | None

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        return asdict(self)


def list_checkpoints(path: Path, *, content: bool = False) -> list[Stored]:
    """The checkpoints of the run at `path` by step, retired ones included; with `content` every byte is hashed.

    The run may be written meanwhile; a checkpoint that is removed meanwhile is left out.

    Raises:
        RunError: there is no run, or it cannot be read which are the best.
    """
    folder = _folder(path)
    best = {scored.step: f"{scored.name} {scored.score:.4g}" for scored in read_best(folder)}
    present = max(find_checkpoints(folder), default=0)
    margin = _margin(folder)
    found = {folder / item.name for item in folder.glob("*step-*") if item.is_dir() and not item.name.startswith(".")}
    # A process that was killed while one replaced another left these; the next writer of the run finishes them.
    found |= {folder / item.name.removeprefix(REPLACING) for item in folder.glob(f"{REPLACING}step-*")}
    looked = (_look(item, best, present, margin, content=content) for item in sorted(found, key=_order))
    return [one for one in looked if one is not None]


def checkpoints_table(stored: Sequence[Stored]) -> list[str]:
    """The checkpoints as lines of aligned columns, with a head."""
    head = ("checkpoint", "epoch", "best", "MiB", "age", "healthy", "compressed", "verified")
    return aligned([head, *(_row(one) for one in stored)])


def check(stored: Iterable[Stored]) -> None:
    """Refuse checkpoints that could be loaded and are damaged.

    Raises:
        CheckpointError: a line for each that is not.
    """
    faults = [one.fault for one in stored if one.fault is not None and one.name == name_of(one.step)]
    if faults:
        raise CheckpointError(*faults)


@dataclass(frozen=True, slots=True)
class _Written:
    """The needs of a run as its checkpoints name them."""

    folder: Path
    has_milestones: bool
    margin: int | None

    def is_milestone(self, step: int) -> bool:
        return self.has_milestones and _is_milestone(self.folder / name_of(step))

    def reach(self, step: int) -> int | None:
        return self.margin


def superfluous(path: Path, *, keep: int | None = None) -> list[Path]:
    """The checkpoints that the recipe of the run does not keep, and retired ones, oldest first.

    `keep` replaces `checkpoints.keep`.

    Raises:
        RunError: there is no run, or it cannot be read which are the best.
        ConfigError: its recipe cannot be read.
    """
    folder = _folder(path)
    config = read(str(RunDirectory(path).recipe)).checkpoints
    if keep is not None:
        config = CheckpointConfig.model_validate({**config.model_dump(), "keep": keep})
    written = _Written(folder, has_milestones=config.milestones is not None, margin=_margin(folder))
    retention = Retention(folder, config, written)
    retired = [item for prefix in (UNHEALTHY, _DAMAGED, LATER) for item in folder.glob(f"{prefix}step-*")]
    found = find_checkpoints(folder)
    return sorted({*retired, *(retention.superfluous(max(found)) if found else ())}, key=_order)


def prune(path: Path, *, keep: int | None, teller: Teller) -> None:
    """Remove superfluous checkpoints, after the newest was verified.

    Raises:
        RunError: a process is writing the run; something cannot be removed.
        CheckpointError: the newest is damaged: older ones are needed.
    """
    with RunDirectory.locked(path) as run:
        for note in run.notes:
            teller.notice(note)
        folder = _folder(path)
        doomed = superfluous(path, keep=keep)
        if doomed and (found := find_checkpoints(folder)):
            newest = found[max(found)]
            try:
                verify(newest)
            except DamagedCheckpoint as error:
                raise CheckpointError(
                    f"{error}; nothing was removed: opsin checkpoints {path} restore STEP takes an older one first"
                ) from error
        for item in doomed:
            try:
                remove_whole(item)
            except OSError as error:
                raise RunError(f"{item}: cannot be removed: {error.strerror or error}") from error
            teller.notice(f"removed {item.name}")


def restore(path: Path, step: int, *, teller: Teller) -> None:
    """Make the checkpoint of `step` the one that the run goes on from; later ones become `later-step-...`.

    A checkpoint that an earlier call renamed so gets its name back. The log of later steps is forgotten when the run
    resumes.

    Raises:
        RunError: there is no such checkpoint; a process is writing the run; a name is taken.
        CheckpointError: it is damaged.
    """
    with RunDirectory.locked(path) as run:
        for note in run.notes:
            teller.notice(note)
        folder = _folder(path)
        found = find_checkpoints(folder)
        wanted = found.get(step, folder / f"{LATER}{name_of(step)}")
        if not wanted.exists():
            known = ", ".join(map(str, found)) or "none"
            raise RunError(f"{path}: has no checkpoint of step {step}; there are: {known}")
        verify(wanted)
        later = [item for number, item in found.items() if number > step]
        if taken := [item for item in later if item.with_name(f"{LATER}{item.name}").exists()]:
            raise RunError(
                f"{folder}: {LATER}{taken[0].name} is there from an earlier restore; "
                f"opsin checkpoints {path} prune --yes removes it"
            )
        # Back to its name first, then the newest first: killed in between, the same command goes on.
        if wanted.name != name_of(step):
            wanted.rename(folder / name_of(step))
        for item in reversed(later):
            item.rename(item.with_name(f"{LATER}{item.name}"))
    later_ones = f"; later ones are kept as {LATER}step-... until opsin checkpoints {path} prune --yes" if later else ""
    teller.notice(f"{path}: step {step} is the newest checkpoint now; opsin resume {path} goes on from it{later_ones}")


def _row(one: Stored) -> tuple[str, ...]:
    epoch = "-" if one.epoch is None else f"{one.epoch:g}"
    healthy = {True: "yes", False: "no", None: "-"}[one.healthy]
    size, age = f"{one.bytes / _MIB:.1f}", duration(one.age_s)
    return one.name, epoch, one.score or "-", size, age, healthy, "zstd" if one.compressed else "no", one.verified


def _folder(path: Path) -> Path:
    run = RunDirectory(path)
    if not run.checkpoints.is_dir():
        what = "has no checkpoints yet" if run.exists() else "holds no run"
        raise RunError(f"{path}: {what}; `opsin runs` lists the runs in a folder")
    return run.checkpoints


def _order(path: Path) -> tuple[int, str]:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1, path.name


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except CheckpointError:
        return {}


def _margin(folder: Path) -> int | None:
    """The number of steps by which a healthy checkpoint is older than the newest."""
    found = find_checkpoints(folder)
    margin = _manifest(found[max(found)]).get("margin") if found else None
    return margin if isinstance(margin, int) else None


def _is_milestone(path: Path) -> bool:
    # What an older opsin wrote does not say so: it stays.
    return bool(_manifest(path).get("milestone", True))


def _look(path: Path, best: dict[int, str], present: int, margin: int | None, *, content: bool) -> Stored | None:
    """The checkpoint at `path`; None if it was removed meanwhile. One that is replaced meanwhile is read again."""
    for _ in range(_LOOKS):
        before = _folder_now(path)
        if before is None:
            return None
        try:
            found = _look_at(before.path, path.name, best, present, margin, content=content)
        except FileNotFoundError:
            continue
        if _folder_now(path) == before:
            return found
    return None


def _look_at(
    folder: Path, name: str, best: dict[int, str], present: int, margin: int | None, *, content: bool
) -> Stored:
    fault, verified = None, "sha256" if content else "sizes"
    try:
        manifest = verify(folder, content=content)
    except DamagedCheckpoint as error:
        manifest, fault, verified = _manifest(folder), str(error), "DAMAGED"
    except CheckpointError as error:
        manifest, fault, verified = {}, str(error), "too new"
    step = _order(Path(name))[0]
    is_retired = name != name_of(step)
    healthy: bool | None = None
    if name.startswith((UNHEALTHY, _DAMAGED)) or verified == "DAMAGED":
        healthy = False
    elif not is_retired and margin is not None and step <= present - margin:
        healthy = True
    files = [item.stat() for item in folder.iterdir()]
    return Stored(
        name=name,
        step=step,
        epoch=manifest.get("epoch"),
        score=None if is_retired else best.get(step),
        bytes=sum(file.st_size for file in files),
        age_s=max(0.0, time.time() - max((file.st_mtime for file in files), default=time.time())),
        healthy=healthy,
        compressed=any(name.endswith(SUFFIX) for name in manifest.get("files", ())),
        verified=verified,
        fault=fault,
    )


class _Folder(NamedTuple):
    """The folder of a checkpoint; equal values are the same folder."""

    path: Path
    device: int
    inode: int


def _folder_now(path: Path) -> _Folder | None:
    """The folder of the checkpoint that is called `path`, or is about to be; None where there is none."""
    for folder in (path.with_name(f"{REPLACING}{path.name}"), path):
        try:
            found = folder.stat()
        except FileNotFoundError:
            continue
        return _Folder(folder, found.st_dev, found.st_ino)
    return None
