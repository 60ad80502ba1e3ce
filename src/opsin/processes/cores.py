"""Processor cores that this process may use: those of its affinity, within the quota of its control group."""

import os
from collections.abc import Iterator
from pathlib import Path


def num_cores(root: Path = Path("/")) -> int:
    """The number of cores that this process may use, at least 1.

    A quota that is not a whole number of cores is rounded. `root` is the folder with `proc/` and the control groups.
    """
    allowed = num_allowed()
    quota = cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota + 0.5)))


def num_allowed() -> int:
    """The number of cores on which the kernel runs this process, whatever its quota."""
    return len(allowed_cores()) or os.cpu_count() or 1


def allowed_cores() -> frozenset[int]:
    """The numbers of these cores; empty on a system that does not say."""
    ask = getattr(os, "sched_getaffinity", None)
    return frozenset() if ask is None else frozenset(ask(0))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups of this process grant it: the least on the way up; None without a limit."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    for folder in _control_groups(root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # the root group has no limit; another is not ours to read
            continue


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups that may limit it, each with those above, of both versions."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        number, controllers, inside = group.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            kind, _, options = after.split(" ", 2)
            is_same = kind == "cgroup2" if number == "0" else kind == "cgroup" and "cpu" in options.split(",")
            if is_same:
                mounted, at = before.split()[3:5]
                top = root / at.lstrip("/")
                # In a container the group may be named as the host sees it, and only its own part is mounted.
                relative = inside.removeprefix(mounted.rstrip("/")).strip("/")
                folder = top / relative
                yield from (one for one in (folder, *folder.parents) if one == top or top in one.parents)
