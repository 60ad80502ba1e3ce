"""Free memory by every limit, and a limit below it that ends an allocation and not the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from opsin.processes.headroom import LEAST_LIMIT_BYTES, Room, find_rooms

MIB = 2**20
STATUS = "Name:\tpython\nVmSize:\t  3072 kB\nVmRSS:\t  1024 kB\nVmData:\t  2048 kB\n"


def system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A made system with 100 MiB free."""
    written = {
        "proc/self/status": STATUS,
        "proc/meminfo": "MemTotal: 409600 kB\nMemFree: 1 kB\nMemAvailable: 102400 kB\n",
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUPS = {
    "no-limit": ("0::/\n", {}, []),
    "second-kind-with-the-groups-around": (
        "0::/a/b\n",
        {
            "a/b/memory.max": "max\n",
            "a/b/memory.high": f"{60 * MIB}\n",
            "a/b/memory.current": f"{20 * MIB}\n",
            "a/b/memory.stat": f"anon 5\ninactive_file {5 * MIB}\n",
            "a/memory.max": f"{50 * MIB}\n",
            "a/memory.current": f"{30 * MIB}\n",
        },
        [("memory.high of the control group", 46), ("memory.max of the control group", 21)],
    ),
    "a-container-that-sees-its-own-group-as-the-root": (
        "0::/\n",
        {"memory.max": f"{30 * MIB}\n", "memory.current": f"{10 * MIB}\n"},
        [("memory.max of the control group", 21)],
    ),
    "first-kind": (
        "7:cpu:/x\n4:memory:/x/y\n",
        {
            "memory/x/memory.limit_in_bytes": f"{40 * MIB}\n",
            "memory/x/memory.usage_in_bytes": f"{10 * MIB}\n",
            "memory/x/memory.stat": f"total_inactive_file {4 * MIB}\n",
            "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "memory/memory.usage_in_bytes": "0\n",
        },
        [("memory.limit_in_bytes of the control group", 35)],
    ),
    "a-group-that-is-not-mounted-here": ("0::/../other\n", {}, []),
    "a-damaged-file": ("0::/a\n", {"a/memory.max": "many\n", "a/memory.current": "1\n"}, []),
}


@pytest.mark.parametrize(("cgroup", "files", "expected"), GROUPS.values(), ids=GROUPS)
def test_rooms_count_what_is_held_and_what_is_left(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: list[tuple[str, int]]
) -> None:
    found = find_rooms(system(tmp_path, cgroup, files))
    machine = Room("free memory of this machine", 101 * MIB)
    assert [room for room in found if room.owner == "machine"] == [
        machine,
        *(Room(name, size * MIB) for name, size in expected),
    ]


def test_another_system_has_no_rooms(tmp_path: Path) -> None:
    assert find_rooms(tmp_path) == []


LIMITED = """
import resource
from opsin.processes.headroom import Room, find_rooms, held_bytes, own_limit
before = resource.getrlimit(resource.RLIMIT_DATA)
with own_limit([Room("made up", held_bytes() + (1 << 31))]):
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    assert hard == before[1]
    (room,) = (room for room in find_rooms() if room.limit == "ulimit -d")
    assert room.owner == "process" and room.num_bytes < held_bytes() + (1 << 31)
    kept = bytearray(1 << 30)
    try:
        bytearray(3 << 30)
    except MemoryError:
        print("refused", soft)
with own_limit([Room("made up", held_bytes() + 1)]):
    print("least", resource.getrlimit(resource.RLIMIT_DATA)[0])
assert resource.getrlimit(resource.RLIMIT_DATA) == before
with own_limit([]):
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, before[1]))
with own_limit([Room("made up", held_bytes() + (1 << 40))]):
    print("the user's", resource.getrlimit(resource.RLIMIT_DATA)[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_allocation_beyond_the_free_memory_fails_in_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert int(said["refused"]) > 2**31 * 0.7
    assert int(said["least"]) == LEAST_LIMIT_BYTES, "children that load torch must be able to"
    assert int(said["the user's"]) == 2**30
