"""One process at a time on a shared folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opsin.errors import DataError


@contextmanager
def one_process_in(folder: Path) -> Iterator[None]:
    """Create `folder` and wait until no other process of this machine is in this block for it.

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
