"""The lock of a run: one living process has it, a dead one keeps nobody out."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opsin.errors import LockLost, RunError
from opsin.storage import lock as runlock
from opsin.storage.lock import Holder, RunLock, is_held

HOLD = """
import errno, fcntl, os, sys
from pathlib import Path
from opsin.storage.lock import RunLock

def unsupported(*_):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

if sys.argv[2] == "lease":
    fcntl.flock = unsupported
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path, kind: str = "flock") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(path), kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture(params=["flock", "lease"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one without."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if request.param == "lease":
        monkeypatch.setattr(fcntl, "flock", unsupported)
    return str(request.param)


def taken(path: Path) -> list[str]:
    """Take the lock and release it; what was said about those before."""
    lock = RunLock(path)
    notes = lock.take()
    lock.release()
    return [text for text in notes if "has no locks" not in text]


def test_a_living_process_keeps_others_out_and_is_named(path: Path, kind: str) -> None:
    with holder(path, kind) as process:
        assert is_held(path)
        words = rf"process {process.pid} is writing this run; stop it first, or choose another --out \(it has been on"
        with pytest.raises(RunError, match=rf"{words} {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\dT"):
            taken(path)


def test_a_process_killed_at_once_leaves_a_lock_that_is_taken_over_with_a_notice(path: Path, kind: str) -> None:
    with holder(path, kind) as process:
        process.kill()
        process.wait()
        assert path.read_text(), "nobody has tidied up"
        assert not is_held(path)
        (said,) = taken(path)
    assert re.fullmatch(
        rf"{re.escape(str(path.parent))}: took over the lock of process {process.pid} on "
        rf"{re.escape(socket.gethostname())}, which wrote this run since \d{{4}}\S+ and has died",
        said,
    )
    assert taken(path) == [], "it is told once"


def test_an_orderly_end_leaves_nothing_to_tell(path: Path, kind: str) -> None:
    with holder(path, kind) as process:
        process.communicate()
    assert path.read_text() == ""
    assert taken(path) == []


def stand_in(path: Path, **facts: object) -> None:
    """The lock file as a process elsewhere has left it."""
    about = {"pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00", "token": "x", **facts}
    path.write_text(json.dumps(about) + "\n")


def test_the_lock_of_another_host_that_the_kernel_does_not_hold_is_taken_over(path: Path) -> None:
    stand_in(path)
    (said,) = taken(path)
    assert "process 1 on elsewhere, which wrote this run since 2026-01-01T00:00:00+00:00 and has died" in said


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
def test_the_lease_of_another_host_counts_until_it_is_old(path: Path, kind: str) -> None:
    stand_in(path)
    with pytest.raises(
        RunError, match=r"process 1 .* on elsewhere since .*; if it is dead, its lease ends in [56]\d s"
    ):
        taken(path)
    assert is_held(path)
    old = time.time() - 61
    os.utime(path, (old, old))
    assert not is_held(path)
    assert len(taken(path)) == 1


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
@pytest.mark.parametrize("numbers", ["", "pid:[1]", None], ids=["an older opsin", "another container", "here"])
def test_the_number_of_a_process_is_believed_where_it_was_given(path: Path, kind: str, numbers: str | None) -> None:
    me = Holder.this_process()
    with subprocess.Popen(["true"]) as dead:
        pass
    own = {"numbers": me.pid_scope if numbers is None else numbers} if numbers != "" else {}
    stand_in(path, pid=dead.pid, host=me.host, **own)
    if numbers is None:
        assert "has died" in taken(path)[0]
    else:
        with pytest.raises(RunError, match=rf"process {dead.pid} is writing this run.*; if it is dead, its lease ends"):
            taken(path)


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
def test_a_lease_is_renewed_while_its_holder_lives_and_said_to_be_one(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlock, "_RENEWED_S", 0.05)
    lock = RunLock(path)
    said = lock.take()
    assert "this file system has no locks: .lock is renewed every 0.05 s instead" in said[0]
    os.utime(path, (1.0, 1.0))
    end = time.monotonic() + 20
    while path.stat().st_mtime < 2:
        assert time.monotonic() < end, "it was not renewed"
        time.sleep(0.01)
    lock.release()
    assert path.read_text() == ""
    while any(thread.name == "lease" for thread in threading.enumerate()):
        assert time.monotonic() < end, "renewing goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
def test_of_two_that_take_an_old_lease_together_the_last_has_it(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: stand_in(path, token="faster"))
    with pytest.raises(RunError, match="process 1 is writing this run"):
        taken(path)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The machine sleeps two minutes: the clock goes on, the thread that renews does not."""
    clock, late_s = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + late_s[0])
    return lambda: late_s.append(late_s.pop() + 120)


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
def test_a_holder_that_slept_while_its_lease_was_taken_over_says_so_and_leaves_it(
    path: Path, kind: str, slept: Callable[[], None]
) -> None:
    lock = RunLock(path)
    lock.take()
    lock.check()
    stand_in(path, pid=7)
    slept()
    words = rf"{re.escape(str(path.parent))}: process 7 on elsewhere \(since 2026.*\) has taken over this run, "
    for _ in range(2):
        with pytest.raises(LockLost, match=words):
            lock.check()
    lock.release()
    assert json.loads(path.read_text())["pid"] == 7


@pytest.mark.parametrize("kind", ["lease"], indirect=True)
def test_a_holder_that_slept_and_lost_nothing_renews_its_lease_at_once(
    path: Path, kind: str, slept: Callable[[], None]
) -> None:
    lock = RunLock(path)
    lock.take()
    os.utime(path, (1.0, 1.0))
    slept()
    lock.check()
    assert path.stat().st_mtime > 1
    lock.release()
    lock.check()  # nobody's, and nothing to lose


def test_the_lock_of_the_kernel_is_not_lost_in_sleep(path: Path, slept: Callable[[], None]) -> None:
    lock = RunLock(path)
    lock.take()
    stand_in(path)
    slept()
    lock.check()
    lock.release()


def test_a_lock_of_an_older_opsin_is_understood(path: Path) -> None:
    path.write_text("4711\n")
    assert "process 4711 on an unknown host" in taken(path)[0]
    path.write_text("{")
    assert "process of unknown number" in taken(path)[0]


def test_a_fork_that_ends_lets_go_of_nothing(path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom opsin.storage.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]))\nlock.take()\n"
        "if os.fork() == 0:\n    sys.exit()\n"
        "os.wait()\nprint(Path(sys.argv[1]).read_text().count('\"pid\"'), flush=True)\nsys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert is_held(path)
        other.kill()


def test_a_lock_that_was_moved_away_meanwhile_is_not_taken_for_that_of_the_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `--fresh` of another process between the opening of the file and its lock."""
    folder = tmp_path / "run"
    folder.mkdir()
    real = fcntl.flock
    moved: list[Path] = []

    def moves_first(descriptor: int, operation: int) -> None:
        if not moved:
            moved.append(folder.rename(tmp_path / "run.before-1"))
            folder.mkdir()
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", moves_first)
    lock = RunLock(folder / ".lock")
    lock.take()
    monkeypatch.undo()
    assert is_held(folder / ".lock")
    assert not is_held(tmp_path / "run.before-1" / ".lock")
    lock.release()


def test_a_full_disk_keeps_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    lock = RunLock(path)
    lock.take()  # the kernel has the lock: the name in the file is for readers
    assert is_held(path)
    lock.release()
    assert not is_held(path)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pwrite", broken)
    with pytest.raises(OSError, match="Input/output"):
        RunLock(path).take()
    assert not is_held(path)
