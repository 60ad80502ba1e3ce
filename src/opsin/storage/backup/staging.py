"""Checkpoints and files set aside for sending, so that the run may change and remove its own meanwhile.

.backup/
├── staging/step-00000123/   hard links: they cost no space while the run keeps the checkpoint
├── sending/step-00000115/   the one that is on its way
└── files/                   copies of logs as they were at one moment
"""

import errno
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from opsin.storage.backup.catalog import local_steps
from opsin.storage.backup.ledger import HIDDEN

_LINKLESS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
_REPLACED = (".safetensors", ".npy", ".npz")  # written anew, never added to: a link is as good as a copy


class Staging:
    """The waiting room of one run directory. `take` may be called in any thread, the others in one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting = folder / HIDDEN / "staging"
        self._sending = folder / HIDDEN / "sending"
        self._files = folder / HIDDEN / "files"
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Remove what an earlier process left; the checkpoints that the run still has are found again."""
        for place in (self._waiting, self._sending, self._files):
            shutil.rmtree(place, ignore_errors=True)

    def take(self, checkpoint: Path) -> None:
        """Hold on to a complete checkpoint until it is sent, whatever the run does with it.

        Where the file system has no links it is sent from where it is, if it is there long enough.

        Raises:
            OSError: the folder cannot be written.
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
            self._forget_removed((self._waiting,))

    def sources(self) -> dict[int, Path]:
        """Where each checkpoint that could be sent is, newest first.

        Of those that the run has removed meanwhile only the newest is kept: an outage fills no disk.
        """
        with self._lock:
            held = self._forget_removed((self._sending, self._waiting))
        kept = local_steps(self._folder)
        return dict(sorted({**kept, **held}.items(), reverse=True))

    def _forget_removed(self, places: Sequence[Path]) -> dict[int, Path]:
        """What is in `places`, the last one first, but for what the run has removed and is not the newest."""
        held = {int(path.name[5:]): path for place in places for path in place.glob("step-*")}
        kept = local_steps(self._folder)
        newest = max([*kept, *held], default=None)
        for step in [step for step in held if step not in kept and step != newest]:
            shutil.rmtree(held.pop(step), ignore_errors=True)
        return held

    def begin(self, source: Path) -> Path:
        """Where to send a checkpoint from: a place that no newer state of the same step replaces."""
        if source.parent != self._waiting:
            return source
        target = self._sending / source.name
        with self._lock:
            shutil.rmtree(target, ignore_errors=True)
            self._sending.mkdir(exist_ok=True)
            return source.rename(target)

    def release(self, step: int) -> None:
        """The checkpoint of `step` has arrived."""
        shutil.rmtree(self._sending / f"step-{step:08d}", ignore_errors=True)

    def copy(self, name: str) -> Path | None:
        """A file of the run as it is now; None if it is gone.

        Raises:
            OSError: it cannot be copied.
        """
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
        """The copies were sent."""
        shutil.rmtree(self._files, ignore_errors=True)
