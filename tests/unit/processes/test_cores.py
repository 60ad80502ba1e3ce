"""Cores that a process may use, from the files in which Linux says so."""

import os
from pathlib import Path

import pytest

from opsin.processes.cores import allowed_cores, cpu_quota, num_allowed, num_cores

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
OTHERS = "22 1 254:1 / / rw - ext4 /dev/root rw\n35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def machine(root: Path, groups: str, mounts: str, **limits: str) -> Path:
    """A machine with these files; a limit is named by its path in /sys/fs/cgroup, `__` for a slash."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups + "\n")
    (root / "proc" / "self" / "mountinfo").write_text(f"{OTHERS}\n{mounts}\n")
    for name, text in limits.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        ({}, None),
        ({"jobs__mine__cpu_max": "max 100000\n"}, None),
        ({"jobs__mine__cpu_max": "150000 100000\n"}, 1.5),
        ({"jobs__mine__cpu_max": "max 100000\n", "jobs__cpu_max": "200000 100000"}, 2.0),
        ({"jobs__mine__cpu_max": "300000 100000\n", "jobs__cpu_max": "200000 100000"}, 2.0),
        ({"jobs__mine__cpu_max": "100000 100000\n", "jobs__cpu_max": "200000 50000"}, 1.0),
        ({"jobs__mine__cpu_max": "no number\n"}, None),
        ({"other__cpu_max": "100000 100000\n"}, None),
    ],
)
def test_the_quota_is_the_least_on_the_way_up(tmp_path: Path, limits: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(machine(tmp_path, "0::/jobs/mine", V2, **limits)) == quota


def test_a_container_sees_its_own_part_of_the_groups(tmp_path: Path) -> None:
    mount = V2.replace(" / /sys", " /docker/abc /sys")
    assert cpu_quota(machine(tmp_path, "0::/docker/abc", mount, cpu_max="50000 100000")) == 0.5


@pytest.mark.parametrize(("quota", "found"), [("-1", None), ("250000", 2.5)])
def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path, quota: str, found: float | None) -> None:
    root = machine(tmp_path, "5:cpu,cpuacct:/mine\n4:memory:/mine\n0::/", V1)
    folder = root / "sys/fs/cgroup/cpu,cpuacct/mine"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(root) == found


def test_a_system_without_these_files_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert num_cores(tmp_path) == num_allowed() >= 1


@pytest.mark.parametrize(("quota", "cores"), [("1000 100000", 1), ("140000 100000", 1), ("99900000 100000", None)])
def test_cores_are_those_of_the_affinity_within_the_quota(tmp_path: Path, quota: str, cores: int | None) -> None:
    assert num_cores(machine(tmp_path, "0::/", V2, cpu_max=quota)) == (cores or num_allowed())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_bound_to_one_core_has_one(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        assert (set(allowed_cores()), num_cores(tmp_path)) == ({max(before)}, 1)
    finally:
        os.sched_setaffinity(0, before)
