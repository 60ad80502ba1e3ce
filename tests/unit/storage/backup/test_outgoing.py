import hashlib
from pathlib import Path

import pytest

from opsin.storage.backup.outgoing import Cancelled, Throttle, Unfit, outgoing


class Time:
    """A clock that only pauses move on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cancelled = False

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        return self.cancelled


def test_bytes_go_at_the_rate_on_average() -> None:
    time = Time()
    throttle = Throttle(2.0, pause=time.pause, clock=time.clock)
    for _ in range(20):
        throttle.take(2**20)
    # The last chunk has gone; the half second that it costs is waited for by the next.
    assert time.now - 100 == pytest.approx(19 / 2)


def test_an_idle_hour_is_not_saved_up() -> None:
    time = Time()
    throttle = Throttle(1.0, pause=time.pause, clock=time.clock)
    throttle.take(2**20)
    time.now += 3600
    before = time.now
    for _ in range(3):
        throttle.take(2**20)
    assert time.now - before == pytest.approx(2)


def test_without_a_limit_nothing_waits() -> None:
    time = Time()
    throttle = Throttle(None, pause=time.pause, clock=time.clock)
    for _ in range(100):
        throttle.take(2**30)
    assert time.now == 100


def test_whoever_waits_can_be_told_to_give_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2**21))
    time = Time()
    throttle = Throttle(1.0, pause=time.pause, clock=time.clock)
    chunks = outgoing(tmp_path / "file", throttle, size=2**21, sha256="")
    next(chunks)
    time.cancelled = True
    with pytest.raises(Cancelled):
        next(chunks)


def test_a_file_is_checked_before_its_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"good")
    throttle = Throttle(None, pause=lambda seconds: False)
    digest = hashlib.sha256(b"good").hexdigest()
    assert b"".join(outgoing(tmp_path / "file", throttle, size=4, sha256=digest)) == b"good"
    (tmp_path / "file").write_bytes(b"evil")
    with pytest.raises(Unfit, match="is not what was written"):
        list(outgoing(tmp_path / "file", throttle, size=4, sha256=digest))


def test_a_file_that_cannot_be_read_is_unfit(tmp_path: Path) -> None:
    throttle = Throttle(None, pause=lambda seconds: False)
    with pytest.raises(Unfit, match="file: cannot be read: No such file"):
        list(outgoing(tmp_path / "file", throttle, size=4, sha256=""))
