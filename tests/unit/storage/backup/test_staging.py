import hashlib
import threading
from pathlib import Path

import pytest

from opsin.storage.backup.staging import Cancelled, Throttle, Unfit, outgoing
from opsin.storage.backup.store import Entry


class Time(threading.Event):
    """A clock that only waits move on; set, it cancels them."""

    now = 100.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        return self.is_set()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("opsin.storage.backup.staging.monotonic", lambda: time.now)
    return time


def test_bytes_go_at_the_rate_on_average(time: Time) -> None:
    throttle = Throttle(2.0, time)
    for _ in range(20):
        throttle.take(2**20)
    # The last chunk has gone; the half second that it costs is waited for by the next.
    assert time.now - 100 == pytest.approx(19 / 2)


def test_an_idle_hour_is_not_saved_up(time: Time) -> None:
    throttle = Throttle(1.0, time)
    throttle.take(2**20)
    time.now += 3600
    before = time.now
    for _ in range(3):
        throttle.take(2**20)
    assert time.now - before == pytest.approx(2)


def test_without_a_limit_nothing_waits(time: Time) -> None:
    throttle = Throttle(None, time)
    for _ in range(100):
        throttle.take(2**30)
    assert time.now == 100


def test_whoever_waits_can_be_told_to_give_up(time: Time, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2**21))
    throttle = Throttle(1.0, time)
    chunks = outgoing(tmp_path / "file", throttle, Entry(2**21, ""))
    next(chunks)
    time.set()
    with pytest.raises(Cancelled):
        next(chunks)


def test_a_file_is_checked_before_its_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"good")
    throttle = Throttle(None, threading.Event())
    digest = hashlib.sha256(b"good").hexdigest()
    assert b"".join(outgoing(tmp_path / "file", throttle, Entry(4, digest))) == b"good"
    (tmp_path / "file").write_bytes(b"evil")
    with pytest.raises(Unfit, match="is not what was written"):
        list(outgoing(tmp_path / "file", throttle, Entry(4, digest)))


def test_a_file_that_cannot_be_read_is_unfit(tmp_path: Path) -> None:
    throttle = Throttle(None, threading.Event())
    with pytest.raises(Unfit, match="file: cannot be read: No such file"):
        list(outgoing(tmp_path / "file", throttle, Entry(4, "")))
