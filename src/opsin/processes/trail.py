"""The trail of a training process: its current work, in files that outlive every crash, for its supervisor.

A supervisor makes a folder and names it in the environment. The training process, its threads and its workers record
there which update is being made, with the ids of its images, and which images are being read. Each record is one small
write into the page cache, which the end of the process does not undo. Without a supervisor nothing is written.
"""

import ctypes
import json
import os
import signal
import struct
import sys
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "OPSIN_TRAIL"
"""The environment variable with the folder."""
SUPERVISOR = "OPSIN_SUPERVISOR"
"""The environment variable with the process id of the supervisor."""
_PR_SET_PDEATHSIG = 1
_STEP = "step"
_READING = "reading"
_VERDICT = "verdict"
_HEAD = struct.Struct("<qq")


class Trail:
    """The records of this process. It can be pickled into a worker process; without a folder it does nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._step: int | None = None
        self._of_thread = threading.local()

    @classmethod
    def from_environment(cls) -> "Trail":
        """Return the trail in the folder of the supervisor; without a supervisor one that does nothing."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder) if folder else None)

    def __reduce__(self) -> tuple[type["Trail"], tuple[Path | None]]:
        return Trail, (self.folder,)

    def at_step(self, step: int, ids: bytes = b"") -> None:
        """Record that the batch of `step` is being read, or with `ids` (int64, packed) that its update runs."""
        if self.folder is not None:
            if self._step is None:
                self._step = _create(self.folder / _STEP)
            _put(self._step, _HEAD.pack(step, len(ids)) + ids)

    def begin_reading(self, index: int, location: str) -> None:
        """Record that this thread reads image `index` of the training images, which is stored at `location`."""
        if self.folder is None:
            return
        file = getattr(self._of_thread, "file", None)
        if file is None:
            name = f"{_READING}-{os.getpid()}-{threading.get_native_id()}"
            file = self._of_thread.file = _create(self.folder / name)
        text = json.dumps([index, location]).encode()
        _put(file, _HEAD.pack(1, len(text)) + text)

    def end_reading(self) -> None:
        """Record that this thread has read its image, or found it unreadable."""
        if self.folder is not None:
            _put(self._of_thread.file, _HEAD.pack(0, 0))

    def verdict(self, text: str) -> None:
        """Record that training ends for a reason that a restart does not change."""
        if self.folder is not None:
            _put(_create(self.folder / _VERDICT), text.encode())


@dataclass(frozen=True, slots=True)
class Reading:
    """An image that a process was reading when it ended."""

    pid: int
    index: int
    location: str


@dataclass(frozen=True, slots=True)
class LastActivity:
    """The last records of a process and its workers."""

    step: int | None = None
    """The update that was being prepared or made, from 0; None before the first."""
    ids: tuple[int, ...] = ()
    """The images of that update, if they were read."""
    reading: tuple[Reading, ...] = ()
    verdict: str | None = None


def follow(folder: Path) -> LastActivity:
    """Return the last records in `folder`."""
    step, ids = _read_step(folder / _STEP)
    verdict = folder / _VERDICT
    text = verdict.read_text(errors="replace") if verdict.exists() else None
    found = [reading for path in sorted(folder.glob(f"{_READING}-*")) for reading in _readings(path)]
    return LastActivity(step, ids, tuple(found), text)


def end_with_supervisor() -> None:
    """Make a supervised process stop as by SIGTERM when its supervisor ends, so that no training goes on unwatched."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(supervisor):  # it ended before the request
        os.kill(os.getpid(), signal.SIGTERM)


def _read_step(path: Path) -> tuple[int | None, tuple[int, ...]]:
    data = path.read_bytes() if path.exists() else b""
    if len(data) < _HEAD.size:
        return None, ()
    step, size = _HEAD.unpack_from(data)
    ids = array("q")
    held = data[_HEAD.size : _HEAD.size + size]
    ids.frombytes(held[: len(held) // 8 * 8])
    return step, tuple(ids)


def _readings(path: Path) -> Sequence[Reading]:
    data = path.read_bytes()
    try:
        is_open, size = _HEAD.unpack_from(data)
        index, location = json.loads(data[_HEAD.size : _HEAD.size + size]) if is_open else (0, "")
    except (struct.error, ValueError):  # the process ended before the first record was complete
        return ()
    return (Reading(int(path.name.split("-")[1]), index, location),) if is_open else ()


def _create(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # the folder is full or gone: training does not need it
        return None


def _put(file: int | None, data: bytes) -> None:
    if file is not None:
        try:
            os.pwrite(file, data, 0)
        except OSError:
            return
