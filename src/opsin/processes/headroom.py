"""The memory that this process may still take, by each limit of the system, and a limit of its own below them.

On Linux; other systems say nothing of themselves, and there is no limit.
"""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Owner = Literal["machine", "process", "gpu"]
"""Whose memory a limit counts: this process with its workers, this process alone, or tensors on the GPU."""

LEAST_LIMIT_BYTES = 3 * 2**29
"""The smallest data limit that is set: in 1.25 GiB the libraries of torch abort the process in an update (measured)."""
_UNFILLED_BYTES = 9 * 2**26
"""Address space of glibc and threads that a process has before its first step and fills later."""
_KEPT_FREE = 0.03
"""Share of the free memory that a data limit leaves to the system."""
_LEAST_FREE = 2**28
"""Bytes that a data limit leaves to this process at least: without any, Python waits for ever for a thread to start."""


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that may be held by one limit, with what is held already."""

    limit: str
    """The name of the limit, for people: `ulimit -d`."""
    num_bytes: int
    owner: Owner = "machine"


def find_rooms(root: Path = Path("/")) -> list[Room]:
    """The rooms of the host; empty if the system is not Linux. `root` is where `/proc` and `/sys` are looked for."""
    held, data, space = (_status(root, name) for name in ("VmRSS", "VmData", "VmSize"))
    if held is None or data is None or space is None:
        return []
    rooms: list[Room] = []
    free = _field(root / "proc/meminfo", "MemAvailable:")
    if free is not None:
        rooms.append(Room("free memory of this machine", held + 1024 * free))
    rooms += [Room(name, held + left) for name, left in _groups(root)]
    for name, limit, used in (("ulimit -d", resource.RLIMIT_DATA, data), ("ulimit -v", resource.RLIMIT_AS, space)):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            rooms.append(Room(name, held + soft - used, "process"))
    return rooms


def held_bytes() -> int:
    """Memory that this process holds now; 0 if the system is not Linux."""
    return _status(Path("/"), "VmRSS") or 0


@contextmanager
def own_limit(rooms: Sequence[Room], *, others: int = 0) -> Iterator[None]:
    """Inside, an allocation beyond the free memory fails in this process, before the kernel ends it.

    `others` are bytes that other processes of the run will take. Processes that are started inside inherit the number,
    which counts for each of them alone.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held, data = held_bytes(), _status(Path("/"), "VmData")
    free = [room.num_bytes - held - others for room in rooms if room.owner == "machine"]
    if data is None or not free:
        yield
        return
    left = max(min(free), _LEAST_FREE)
    # Address space that is reserved and not filled is in `data` already, and will be filled.
    spare = min(_UNFILLED_BYTES, left // 4)
    wanted = max(data + int(left * (1 - _KEPT_FREE)) - spare, LEAST_LIMIT_BYTES)
    limit = min(number for number in (wanted, soft, hard) if number != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _groups(root: Path) -> Iterator[tuple[str, int]]:
    """The bytes that are left in the control groups of this process, and in those around them, of either kind."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            files = (("memory.max", "memory.high"), "memory.current", "inactive_file")
            yield from _up_from(root / "sys/fs/cgroup", path, *files)
        elif "memory" in controllers.split(","):
            old = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
            yield from _up_from(root / "sys/fs/cgroup/memory", path, *old)


def _up_from(top: Path, path: str, limits: tuple[str, ...], usage: str, cached: str) -> Iterator[tuple[str, int]]:
    folder = top / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(top):
            return
        used = _number(group / usage)
        if used is None:
            continue
        # Files that were read count as used, and are dropped before a process is ended.
        used -= min(_field(group / "memory.stat", cached) or 0, used)
        for name in limits:
            limit = _number(group / name)
            if limit is not None and limit < 2**60:  # an older system writes such a number for no limit
                yield f"{name} of the control group", limit - used


def _status(root: Path, name: str) -> int | None:
    kib = _field(root / "proc/self/status", f"{name}:")
    return None if kib is None else 1024 * kib


def _field(path: Path, name: str) -> int | None:
    """The number behind `name` at the beginning of a line."""
    words = (line.split() for line in _text(path).splitlines())
    found = next((line[1] for line in words if len(line) > 1 and line[0] == name), "")
    return int(found) if found.isdigit() else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
