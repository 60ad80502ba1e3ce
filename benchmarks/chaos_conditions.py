"""What a training may meet: conditions that hold in the process that trains, and in no other.

A condition is called there with a function that it calls in its turn once the training has felt it.
"""

import errno
import io
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

Strike = Callable[[], None]
Condition = Callable[[Strike], None]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def nothing(strike: Strike) -> None:
    """The condition of an undisturbed training."""


def clock_jumps(shift_s: float, after: int) -> Condition:
    """The clock of the day moves by `shift_s` seconds when it is asked for the `after`-th time."""

    def condition(strike: Strike) -> None:
        real, asked = time.time, 0

        def shift() -> float:
            nonlocal asked
            asked += 1
            if asked == after + 1:
                strike()
            return shift_s if asked > after else 0.0

        class Shifted(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Self:
                return super().now(tz) + timedelta(seconds=shift())

        time.time = lambda: real() + shift()
        for name, module in list(sys.modules.items()):
            if name.startswith("opsin") and getattr(module, "datetime", None) is datetime:
                module.datetime = Shifted  # type: ignore[attr-defined]

    return condition


def syncs_take(seconds: float) -> Condition:
    """Each fsync takes so much longer."""

    def condition(strike: Strike) -> None:
        real = os.fsync

        def slow(descriptor: int) -> None:
            strike()
            time.sleep(seconds)
            real(descriptor)

        os.fsync = slow  # type: ignore[assignment]

    return condition


def files_end_at(size_bytes: int) -> Condition:
    """No file can grow beyond this size (EFBIG)."""

    def condition(strike: Strike) -> None:
        # The system sends it along with each EFBIG.
        signal.signal(signal.SIGXFSZ, lambda number, frame: strike())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

    return condition


def writes_fail(folder: Path, first: int, count: int) -> Condition:
    """Of all writes and syncs of files in `folder`, those from number `first` on end with EIO, `count` of them."""

    def condition(strike: Strike) -> None:
        made = 0

        def fail() -> None:
            nonlocal made
            made += 1
            if first <= made < first + count:
                strike()
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        _watch_writes(folder, before=fail)

    return condition


def writes_are_counted(folder: Path, tally: Path) -> Condition:
    """`tally` gets a byte for each write and sync of files in `folder`."""

    def condition(strike: Strike) -> None:
        descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        _watch_writes(folder, before=lambda: os.write(descriptor, b"."))

    return condition


def disk_may_fill(folder: Path, needed_bytes: int) -> Condition:
    """Changes nothing; felt is a write or sync in `folder` without room, or a look at the disk that finds less."""

    def condition(strike: Strike) -> None:
        real = shutil.disk_usage

        def look(path: Any) -> Any:
            found = real(path)
            if found.free < needed_bytes:
                strike()
            return found

        shutil.disk_usage = look
        _watch_writes(folder, failed=lambda error: strike() if error.errno in _FULL else None)

    return condition


def _watch_writes(
    folder: Path,
    *,
    before: Callable[[], object] = lambda: None,
    failed: Callable[[OSError], object] = lambda error: None,
) -> None:
    """Call `before` before each write and sync of files in `folder`, and `failed` for each that the system refuses."""
    real_open, real_sync = io.open, os.fsync

    def watched(do: Callable[[], Any]) -> Any:
        before()
        try:
            return do()
        except OSError as error:
            failed(error)
            raise

    class Watched(io.FileIO):
        def write(self, data: Any) -> Any:
            return watched(lambda: super(Watched, self).write(data))

    def is_there(file: object) -> bool:
        return isinstance(file, str | os.PathLike) and os.fspath(file).startswith(str(folder))

    def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
        if not is_there(file) or not set(mode) & set("wxa+"):
            return real_open(file, mode, buffering, *text, **named)
        raw = Watched(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **named)

    io.open = opened
    os.fsync = lambda descriptor: watched(lambda: real_sync(descriptor))  # type: ignore[assignment]
