"""The load on the cores of this process, its own and that of others, as Linux counts it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from opsin.processes.cores import allowed_cores

_IDLE = (3, 4)
"""Columns of a line of /proc/stat in which a core has nothing to do, or waits for a disk."""
_COUNTED = 8
"""Columns that add up to the time of a core; those after them are in the others already."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor time up to a moment, in seconds."""

    at_s: float
    busy_s: float
    """Of all programs, on the cores that this process may use."""
    own_s: float
    """Of this process with all its threads."""
    waited_s: float
    """Seconds in which threads of this process were ready and had no core."""

    def cores_of_others(self, before: "Usage") -> float:
        """The number of cores that other processes, workers of this one too, used between both moments."""
        busy = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return max(0.0, busy / max(self.at_s - before.at_s, 1e-9))

    def cores_waited_for(self, before: "Usage") -> float:
        """The number of threads of this process that waited for a core, on average between both moments."""
        return max(0.0, (self.waited_s - before.waited_s) / max(self.at_s - before.at_s, 1e-9))


def look(root: Path = Path("/")) -> Usage | None:
    """Return the processor time up to now; None on a system that does not count it as Linux does."""
    busy = _busy_s(root)
    return None if busy is None else Usage(time.monotonic(), busy, time.process_time(), _waited_s(root))


def family_s(root: Path = Path("/")) -> float:
    """Processor time of the processes that descend from this one, in seconds."""
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    for path in (root / "proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], times[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / _ticks()
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
    return sum(seconds for pid, seconds in times.items() if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    own = os.getpid()
    for _ in range(len(parents)):
        pid = parents.get(pid, 0)
        if pid in (own, 0):
            break
    return pid == own


def _busy_s(root: Path) -> float | None:
    allowed = {f"cpu{number}" for number in allowed_cores()}
    try:
        lines = [line.split() for line in (root / "proc/stat").read_text().splitlines()]
    except OSError:
        return None
    counts = [[int(text) for text in line[1 : 1 + _COUNTED]] for line in lines if line and line[0] in allowed]
    if not counts:
        return None
    return sum(sum(count) - sum(count[column] for column in _IDLE) for count in counts) / _ticks()


def _waited_s(root: Path) -> float:
    waited = 0
    for path in (root / "proc/self/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except (OSError, ValueError, IndexError):  # the thread has ended, or this kernel does not count
            continue
    return waited / 1e9


def _ticks() -> int:
    return os.sysconf("SC_CLK_TCK")
