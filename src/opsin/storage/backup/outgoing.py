"""Files on their way out: at a limited speed, hashed as they go."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from opsin.storage.backup.store import CHUNK


class Cancelled(Exception):
    """Somebody does not want to wait any longer."""


class Throttle:
    """Lets bytes through at a given rate on average; a chunk at once, then the pause that it costs."""

    def __init__(
        self,
        mib_per_s: float | None,
        *,
        pause: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pause` waits for some seconds, or gives true at once if all is to be cancelled (`Event.wait`)."""
        self._bytes_per_s = None if mib_per_s is None else mib_per_s * 2**20
        self._pause = pause
        self._clock = clock
        self._free_at = clock()

    def take(self, num_bytes: int) -> None:
        """Wait until `num_bytes` more may go.

        Raises:
            Cancelled: while it waited, or before.
        """
        now = self._clock()
        if self._pause(max(0.0, self._free_at - now)):
            raise Cancelled
        if self._bytes_per_s is not None:
            self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s


class Unfit(Exception):
    """A file is not what it should be, or cannot be read; nothing of it arrives."""


def outgoing(path: Path, throttle: Throttle, *, size: int, sha256: str) -> Iterator[bytes]:
    """The content of a file in chunks, paced; ends only if it has this size and hash.

    Raises:
        Unfit: after the last chunk, so that whoever stores them stores nothing; or where it cannot be read, which
            is no fault of the place that takes it.
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
        raise Unfit(f"{path}: cannot be read: {error.strerror or error}") from error
    if (sent, found.hexdigest()) != (size, sha256):
        raise Unfit(f"{path}: is not what was written")
