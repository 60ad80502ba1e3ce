"""Shared memory: the batches of workers pass through /dev/shm, which is small in many containers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FOLDER = "/dev/shm"
_SHARE = 0.75
"""Share of the free bytes that a loader takes: evaluations read while the loader of the training keeps its batches."""
_MOST_BYTES = 1 << 30
"""Bytes of batches that are prepared ahead, unless each worker prepares one only."""
_reserved: list[int] = []
"""Bytes of the loaders that live in this process."""
_at_first: list[int] = []
"""Free bytes when the first of them was planned."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The workers and their prefetch for which there is room, and the reason if they are fewer than wanted."""

    workers: int
    prefetch: int
    reason: str | None = None


def free_bytes() -> int | None:
    """Free bytes in /dev/shm; None on a system that has none."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def bytes_in_flight(workers: int, prefetch: int, batch_bytes: int) -> int:
    """Bytes of the batches that exist at once: all that are prepared ahead, the one in use, and the one after it."""
    return (workers * prefetch + 2) * batch_bytes if workers else batch_bytes


def available_bytes() -> int | None:
    """Bytes that a further loader of this process may fill; None if nothing is known.

    A loader that lives fills its own share sooner or later: the free bytes alone would count it twice, or not at all.
    """
    free = free_bytes()
    if free is None:
        return None
    if not _reserved:
        _at_first[:] = [free]
    return int(_SHARE * max(0, min(free, _at_first[0] - sum(_reserved))))


def fit(workers: int, prefetch: int, batch_bytes: int, available: int | None) -> Fitted:
    """Return the workers and the prefetch whose batches fit into `available` bytes.

    The prefetch is lowered first, then the workers; with 0 of them this process reads, and needs no shared memory.
    """
    if workers == 0 or batch_bytes == 0:
        return Fitted(workers, prefetch)
    bounded = min(prefetch, max(1, _MOST_BYTES // (workers * batch_bytes)))
    reason = None
    if bounded < prefetch:
        reason = f"at most {_mib(_MOST_BYTES)} of batches are prepared ahead"
    if available is None or bytes_in_flight(workers, bounded, batch_bytes) <= available:
        return Fitted(workers, bounded, reason)
    ahead = available // batch_bytes - 2
    reason = f"{_mib(available)} of {FOLDER} may be filled"
    if ahead < 1:
        return Fitted(0, prefetch, reason)
    return Fitted(min(workers, ahead), min(bounded, max(1, ahead // workers)), reason)


@contextmanager
def reserved(workers: int, prefetch: int, batch_bytes: int) -> Iterator[None]:
    """Count the batches of a loader as long as it lives."""
    own = bytes_in_flight(workers, prefetch, batch_bytes)
    _reserved.append(own)
    try:
        yield
    finally:
        _reserved.remove(own)


def describe_no_room(batch_bytes: int, error: Exception) -> str:
    """One line on a batch for which a worker found no room."""
    free = free_bytes()
    left = "" if free is None else f", {_mib(free)} are free"
    reason = " ".join(str(error).split())
    return (
        f"{FOLDER}: no room for a batch of {_mib(batch_bytes)}{left} ({reason}): give it more room (docker run "
        "--shm-size=1g), free some, or set data.workers=0, which needs none"
    )


def describe_fitted(fitted: Fitted, *, asked: tuple[int, int], batch_bytes: int) -> str:
    """One line on fewer workers or a lower prefetch than `asked`."""
    now = f"data.workers={fitted.workers} data.prefetch={fitted.prefetch}" if fitted.workers else "data.workers=0"
    return f"{now} instead of {asked[0]} and {asked[1]}: a batch takes {_mib(batch_bytes)}, and {fitted.reason}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"
