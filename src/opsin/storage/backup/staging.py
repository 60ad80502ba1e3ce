"""Checkpoints and files on their way to the backup, so that the run may change and remove its own meanwhile.

.backup/
├── staging/step-00000123/   hard links: they cost no space while the run keeps the checkpoint
├── sending/step-00000115/   the checkpoint that is being sent
└── files/                   copies of logs as they were at one moment
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

from opsin.storage.backup.catalog import local_steps
from opsin.storage.backup.ledger import HIDDEN
from opsin.storage.backup.store import CHUNK, Entry
from opsin.storage.files import reason_of

_LINKLESS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
_REPLACED = (".safetensors", ".npy", ".npz")  # replaced whole, never added to: a link is as good as a copy


class Staging:
    """The waiting room of one run directory. `take` may be called in any thread, the others in one.

    `take` and `copy` raise an OSError if the files cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting = folder / HIDDEN / "staging"
        self._sending = folder / HIDDEN / "sending"
        self._files = folder / HIDDEN / "files"
        self._lock = threading.Lock()
        # Of an earlier process; the checkpoints that the run still has are found again.
        for folder in (self._waiting, self._sending, self._files):
            shutil.rmtree(folder, ignore_errors=True)

    def take(self, checkpoint: Path) -> None:
        """Hold a complete checkpoint until it is sent, even if the run removes it.

        A file system without links cannot hold it; then it is sent from the run itself, if it stays long enough.
        """
        with self._lock:
            target = self._waiting / checkpoint.name
            partial = self._waiting / f".{checkpoint.name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                for file in checkpoint.iterdir():
                    os.link(file, partial / file.name)
            except OSError as error:
                shutil.rmtree(partial)
                if error.errno in _LINKLESS:
                    return
                raise
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            self._forget_removed(self._waiting)

    def sources(self) -> dict[int, Path]:
        """Return the folders to send checkpoints from, by step, newest first.

        Of those that the run has removed meanwhile only the newest is kept: an outage fills no disk.
        """
        with self._lock:
            held = self._forget_removed(self._sending, self._waiting)
        return dict(sorted({**local_steps(self._folder), **held}.items(), reverse=True))

    def _forget_removed(self, *folders: Path) -> dict[int, Path]:
        """Delete the held checkpoints that the run has removed, except the newest of all; return the others.

        A checkpoint in the last of `folders` has precedence.
        """
        held = {int(path.name[5:]): path for folder in folders for path in folder.glob("step-*")}
        kept = local_steps(self._folder)
        newest = max([*kept, *held], default=None)
        for step in [step for step in held if step not in kept and step != newest]:
            shutil.rmtree(held.pop(step), ignore_errors=True)
        return held

    def begin(self, source: Path) -> Path:
        """Return the folder to send a checkpoint from: one that no newer state of the same step replaces."""
        if source.parent != self._waiting:
            return source
        target = self._sending / source.name
        with self._lock:
            shutil.rmtree(target, ignore_errors=True)
            self._sending.mkdir(exist_ok=True)
            return source.rename(target)

    def release(self, step: int) -> None:
        """Delete the links of a checkpoint that has arrived."""
        shutil.rmtree(self._sending / f"step-{step:08d}", ignore_errors=True)

    def copy(self, name: str) -> Path | None:
        """Return a copy of a file of the run as it is now; None if the file is gone."""
        target = self._files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        source = self._folder / name
        try:
            if source.suffix in _REPLACED:
                with suppress(OSError):
                    os.link(source, target)
                    return target
            shutil.copyfile(source, target)
        except FileNotFoundError:
            return None
        return target

    def discard_copies(self) -> None:
        """Delete the copies, which were sent."""
        shutil.rmtree(self._files, ignore_errors=True)


class Cancelled(Exception):
    """The run does not wait for its backup any longer."""


class Throttle:
    """Lets bytes through at a given rate on average: a chunk at once, then the pause that it costs.

    It raises `Cancelled` once the event is set, before a pause or in it.
    """

    def __init__(self, mib_per_s: float | None, cancelled: threading.Event) -> None:
        self._bytes_per_s = None if mib_per_s is None else mib_per_s * 2**20
        self._cancelled = cancelled
        self._free_at = monotonic()

    def take(self, num_bytes: int) -> None:
        """Wait until `num_bytes` more may be sent."""
        now = monotonic()
        if self._cancelled.wait(max(0.0, self._free_at - now)):
            raise Cancelled
        if self._bytes_per_s is not None:
            self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s


class Unfit(Exception):
    """A file is not what it should be, or cannot be read; nothing of it arrives."""


def outgoing(path: Path, throttle: Throttle, entry: Entry) -> Iterator[bytes]:
    """Yield the content of a file in chunks, paced; it must be that of `entry`.

    Raises:
        Unfit: the content is another one, found after the last chunk, so that the store discards all; or the file
            cannot be read, which is not a fault of the store.
        Cancelled: by the throttle.
    """
    found, sent = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                throttle.take(len(chunk))
                found.update(chunk)
                sent += len(chunk)
                yield chunk
    except OSError as error:
        raise Unfit(f"{path}: cannot be read: {reason_of(error)}") from error
    if Entry(sent, found.hexdigest()) != entry:
        raise Unfit(f"{path}: is not what was written")
