"""The cause of a crash in words: from the exit status, the last lines and the system's counters."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.processes.trail import LastActivity, Reading

_SIGNALS = {
    signal.SIGSEGV: "a segmentation fault in native code, of a decoder or a driver, say",
    signal.SIGBUS: "a bus error: a file that was mapped got shorter, or /dev/shm is full",
    signal.SIGABRT: "native code gave up (abort)",
    signal.SIGFPE: "an arithmetic error in native code",
    signal.SIGILL: "an instruction that this processor does not have",
}
_IN_LAST_FRAME = re.compile(r'most recent call first\):\s*File "(.*?)", line (\d+) in (\S+)')
_CRASHED_THREAD = "Current thread 0x"
_WORKERS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class OomKills:
    """Numbers of processes killed for lack of memory so far; None where the system does not count them."""

    group: int | None
    """In the control group of this process."""
    system: int | None
    """On the whole machine."""

    @classmethod
    def now(cls, root: Path = Path("/")) -> "OomKills":
        """Read the counters; `root` is the folder of `proc` and `sys`."""
        return cls(_count_in_group(root), _counter(root / "proc/vmstat"))

    def since(self, before: "OomKills") -> str:
        """Describe the end of a process that was killed since `before`, by the difference of the counters."""
        if self.group is not None and before.group is not None and self.group > before.group:
            return "killed by the system for lack of memory: the memory limit of its control group was reached"
        if self.system is None or before.system is None:
            return "killed (signal 9), perhaps by the system for lack of memory"
        if self.system > before.system:
            return "killed (signal 9), very likely by the system for lack of memory"
        return "killed (signal 9); not for lack of memory, the system has counted no such kill"


@dataclass(frozen=True, slots=True)
class Crash:
    """A training process that ended by itself, without being done."""

    cause: str
    step: int | None
    """The update that was being prepared or made, from 0; None before the first."""
    images: tuple[int, ...] = ()
    """Numbers of the training images that may have caused it."""
    locations: tuple[str, ...] = ()
    """Locations of `images` if these were being read; empty if `images` are those of the whole update."""

    def is_like(self, other: "Crash") -> bool:
        """True if both crashes happened while the same image was read, or in the same update."""
        if self.locations and other.locations:
            return not set(self.images).isdisjoint(other.images)
        return self.step == other.step and bool(self.locations) == bool(other.locations)

    def narrowed(self, before: "Crash") -> "Crash":
        """Return the crash with only those images that were also suspect `before`, in a crash like this one."""
        known = dict(zip(self.images, self.locations, strict=False))
        images = tuple(image for image in self.images if image in before.images) or self.images
        return Crash(self.cause, self.step, images, tuple(known[image] for image in images if image in known))

    def moment(self) -> str:
        """Return the moment of the crash in words: `before the first update`."""
        if self.locations:
            return f"while reading {listed([f'{i} ({p})' for i, p in zip(self.images, self.locations, strict=True)])}"
        if self.step is None:
            return "before the first update"
        return f"in or right after update {self.step + 1}" if self.images else f"before update {self.step + 1}"


def describe(status: int, pid: int, stderr: str, where: LastActivity, oom_kills: str) -> Crash:
    """Return the crash of process `pid`: from its last lines, its last records, and the words on killed processes."""
    ended = {pid} | {int(number) for found in _WORKERS.findall(stderr) for number in found.split(",")}
    suspects = {reading.index: reading for reading in where.reading if reading.pid in ended}
    cause = _signal_words(-status, oom_kills) if status < 0 else last_words(stderr) or f"exit status {status}"
    if status < 0 and (frame := _last_frame(stderr)) is not None:
        cause += f", in {frame[3]} ({frame[1]}:{frame[2]})"
    if suspects:
        found: Sequence[Reading] = [suspects[index] for index in sorted(suspects)]
        return Crash(cause, where.step, tuple(r.index for r in found), tuple(r.location for r in found))
    return Crash(cause, where.step, where.ids)


def _last_frame(stderr: str) -> re.Match[str] | None:
    """The frame in which the thread that crashed was last, of several threads."""
    of_thread = stderr[stderr.find(_CRASHED_THREAD) :] if _CRASHED_THREAD in stderr else stderr
    return _IN_LAST_FRAME.search(of_thread)


def last_words(stderr: str) -> str:
    """Return the last line that names a fault; empty if there is none."""
    lines = [line.strip().removeprefix("opsin: ") for line in stderr.splitlines()]
    # The line below a traceback says whose fault it is, not which.
    return next((line for line in reversed(lines) if line and not line.startswith("the above is a fault of")), "")


def listed(items: Sequence[object]) -> str:
    """Return `images 3, 7, 12`, with the number of the others where there are many."""
    if len(items) == 1:
        return f"image {items[0]}"
    shown = ", ".join(map(str, items[:_SHOWN]))
    return f"images {shown}" + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _signal_words(number: int, oom_kills: str) -> str:
    if number == signal.SIGKILL:
        return oom_kills
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"killed by signal {number}"
    words = _SIGNALS.get(name)
    return f"killed by signal {number} ({name.name})" + (f", {words}" if words else "")


def _count_in_group(root: Path) -> int | None:
    """Read the counter of the control group of this process, of either kind."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            count = _counter(root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            count = _counter(root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control")
        else:
            continue
        if count is not None:
            return count
    return None


def _counter(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    except (OSError, ValueError, IndexError):  # an older system
        return None
