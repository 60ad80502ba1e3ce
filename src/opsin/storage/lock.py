"""The lock of a run directory: one process writes it, and a dead process blocks no other.

The kernel holds the lock (`flock`) and releases it when the process ends, however it ends. The file names the holder.
A file system without `flock` gets a lease instead: the holder renews the time of the file while it lives, and a process
that finds an expired lease takes it over. Two processes that start at the same instant may still clash.
"""

import errno
import fcntl
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opsin.errors import DataError, LockLost, RunError
from opsin.storage.records import RecordFormat

_RENEWED_S, _EXPIRES_S = 5.0, 60.0
_SETTLE_S = 0.2
_OPENED = 10  # times the file is opened, where it is moved away in the same moment
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock, or held it when it died."""

    pid: int | None
    host: str
    since: str
    token: str = ""
    """A random name that distinguishes two holders with the same pid."""
    pid_scope: Annotated[str, Field(alias="numbers")] = ""
    """The start of the machine and the PID namespace in which `pid` is valid; empty where they are unknown."""

    @classmethod
    def this_process(cls) -> "Holder":
        """Return the holder that this process would be."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), since, uuid.uuid4().hex, _pid_scope())

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Return the holder that the file names; None where it names none."""
        try:
            text = path.read_text().strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        if not text:
            return None
        try:
            return _HOLDER.parse(text.encode())
        except ValueError:  # an older opsin wrote its pid alone
            return cls(int(text) if text.isdecimal() else None, "an unknown host", "an unknown time")

    @property
    def process(self) -> str:
        """`process 4711`."""
        return f"process {'of unknown number' if self.pid is None else self.pid}"

    def is_dead(self) -> bool:
        """True if this machine knows that the process has ended."""
        # Containers may share the name of their host, but not its pids.
        if self.pid is None or not self.pid_scope or self.pid_scope != _pid_scope():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


_HOLDER = RecordFormat(Holder)


class RunLock:
    """The lock file of a run. The end of the process releases the lock, too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._release: Callable[[], object] = lambda: None
        self._lease: Holder | None = None
        self._seen_s = 0.0

    def take(self) -> list[str]:
        """Hold the lock. Return sentences for people if a dead process had it, or the file system has no locks.

        Raises:
            RunError: another process holds it.
            OSError: the file cannot be written.
        """
        self.release()
        me, notes = Holder.this_process(), []
        descriptor, has_flock = self._open()
        try:
            before = Holder.read(self._path)
            if not has_flock:
                self._check_lease(before)
            _write_holder(descriptor, me, needed=not has_flock)
        except BaseException:
            os.close(descriptor)
            raise
        if has_flock:
            self._release = weakref.finalize(self, _let_go, descriptor, os.getpid())
        else:
            os.close(descriptor)
            self._release = weakref.finalize(self, _end_lease, self._path, me, _keep_renewing(self._path, me))
            self._settle(me)
            self._lease, self._seen_s = me, time.time()
            notes.append(
                f"{self._path.parent}: this file system has no locks: {self._path.name} is renewed every "
                f"{_RENEWED_S:g} s instead, and a process that finds it {_EXPIRES_S:g} s old takes it over; "
                "start no two runs here at the same moment"
            )
        if before is not None:
            notes.append(
                f"{self._path.parent}: took over the lock of {before.process} on {before.host}, "
                f"which wrote this run since {before.since} and has died"
            )
        return notes

    def check(self) -> None:
        """Check that a lease is still held: it may have expired while the machine slept. The kernel's lock never does.

        Raises:
            LockLost: another process has taken it over.
        """
        # By the clock that goes on in sleep; if somebody sets it, the file is read once more than needed.
        if self._lease is None or abs(time.time() - self._seen_s) < _RENEWED_S:
            return
        try:
            now = Holder.read(self._path)
            if now == self._lease:
                os.utime(self._path)
                self._seen_s = time.time()
                return
        except OSError:  # for a moment, on a network
            return
        who = "another process" if now is None else f"{now.process} on {now.host} (since {now.since})"
        raise LockLost(
            f"{self._path.parent}: {who} has taken over this run, whose lock was not renewed for {_EXPIRES_S:g} s (did "
            "this machine sleep?): nothing more is written here; what was not saved is done again there"
        )

    def release(self) -> None:
        """Let other processes take the lock."""
        self._lease = None
        self._release()
        self._release = lambda: None

    def _open(self) -> tuple[int, bool]:
        """Return the open lock file, and True if the kernel's lock on it is held."""
        for _ in range(_OPENED):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                has_flock = self._flock(descriptor)
                if _is_at(self._path, descriptor):
                    return descriptor, has_flock
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the run was moved away meanwhile, with its lock file
        raise self._busy(Holder.read(self._path))

    def _flock(self, descriptor: int) -> bool:
        """Take the kernel's lock. False if the file system has no locks."""
        for _ in range(10):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.02)  # `is_held` of another process has it for a moment
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                return False
        raise self._busy(Holder.read(self._path))

    def _check_lease(self, before: Holder | None) -> None:
        if before is not None and not before.is_dead() and (left := _lease_left_s(self._path)) > 0:
            raise self._busy(before, f"; if it is dead, its lease ends in {left:.0f} s")

    def _settle(self, me: Holder) -> None:
        """Wait: another process may have found the same expired lease, and the last one that wrote holds it."""
        time.sleep(_SETTLE_S)
        now = Holder.read(self._path)
        if now != me:
            self.release()
            raise self._busy(now)

    def _busy(self, holder: Holder | None, more: str = "") -> RunError:
        who = "a process" if holder is None else holder.process
        where = "" if holder is None else f" (it has been on {holder.host} since {holder.since}{more})"
        return RunError(
            f"{self._path.parent}: {who} is writing this run; stop it first, or choose another --out{where}"
        )


def is_held(path: Path) -> bool:
    """True if a living process holds the lock file at `path`."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            return True
        holder = Holder.read(path)
        return holder is not None and not holder.is_dead() and _lease_left_s(path) > 0
    return False


def _pid_scope() -> str:
    """Names of the start of the machine and of the PID namespace in which a pid means one process."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def _is_at(path: Path, descriptor: int) -> bool:
    """True if the open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, holder: Holder, *, needed: bool) -> None:
    """Write the holder into the file. It may be missing on a full disk unless it is `needed`.

    Raises:
        OSError: it cannot be written.
    """
    os.ftruncate(descriptor, 0)
    try:
        os.pwrite(descriptor, _HOLDER.dump(holder), 0)
    except OSError as error:
        if needed or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _let_go(descriptor: int, pid: int) -> None:
    # A fork of the holder must not release at its end what the holder still has.
    if os.getpid() == pid:
        os.ftruncate(descriptor, 0)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _lease_left_s(path: Path) -> float:
    """Seconds until a lease expires, by the clock of the file system: hosts may disagree on the time."""
    now = path.with_name(f"{path.name}.{uuid.uuid4().hex}.writing")
    try:
        now.touch()
        return path.stat().st_mtime + _EXPIRES_S - now.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        now.unlink(missing_ok=True)


def _keep_renewing(path: Path, me: Holder) -> threading.Event:
    """Renew the lease in a thread until the event is set, or another process has it."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEWED_S):
            try:
                if Holder.read(path) != me:
                    return
                os.utime(path)
            except OSError:  # for a moment, on a network: the lease lasts longer than that
                continue

    threading.Thread(target=renew, name="lease", daemon=True).start()
    return ended


def _end_lease(path: Path, me: Holder, ended: threading.Event) -> None:
    ended.set()
    try:
        if os.getpid() == me.pid and Holder.read(path) == me:
            os.truncate(path, 0)
    except OSError:
        return  # it expires by itself


@contextmanager
def one_process_in(folder: Path) -> Iterator[None]:
    """Create `folder`, and wait until no other process of this machine is in this block for the same folder.

    Raises:
        DataError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; the cache folder must be writable: choose another one") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
