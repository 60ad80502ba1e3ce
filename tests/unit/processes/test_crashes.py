"""Causes of death in words."""

from pathlib import Path

import pytest

from opsin.processes.crashes import Crash, OomKills, describe, last_words, listed
from opsin.processes.trail import LastActivity, Reading

TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 3, in f
ZeroDivisionError: division by zero
opsin: the above is a fault of opsin or of your own code, not of the recipe; saved steps are kept
"""
FAULT = """Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "/x/decode.py", line 31 in decode
  File "/x/files.py", line 8 in read
"""


def system(root: Path, *, group: str, events: str, killed: int) -> OomKills:
    """The counters of a machine whose `proc` and `sys` are files below `root`."""
    for name, text in {
        "proc/self/cgroup": group,
        "proc/vmstat": f"nr_free_pages 7\noom_kill {killed}\n",
        "sys/fs/cgroup/job/memory.events": events,
        "sys/fs/cgroup/memory/job/memory.oom_control": events,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return OomKills.now(root)


@pytest.mark.parametrize("group", ["0::/job\n", "4:memory:/job\n0::/none\n"], ids=["version 2", "version 1"])
def test_a_kill_for_lack_of_memory_is_known_by_the_counters(tmp_path: Path, group: str) -> None:
    before = system(tmp_path, group=group, events="low 0\noom_kill 1\n", killed=1)
    assert before == OomKills(group=1, system=1)
    after = system(tmp_path, group=group, events="low 0\noom_kill 2\n", killed=2)
    assert "memory limit of its control group" in after.since(before)
    assert "very likely" in OomKills(None, 2).since(before)
    assert "not for lack of memory" in before.since(before)
    assert "perhaps" in OomKills(None, None).since(before)


def test_a_system_that_counts_nothing_is_no_fault(tmp_path: Path) -> None:
    assert OomKills.now(tmp_path) == OomKills(None, None)


def test_the_last_words_are_those_that_name_the_fault() -> None:
    assert last_words(TRACEBACK) == "ZeroDivisionError: division by zero"
    assert last_words("opsin: data.path: gone\n\n") == "data.path: gone"
    assert last_words("") == ""


def test_a_segmentation_fault_names_the_place_in_python() -> None:
    crash = describe(-11, 7, FAULT, LastActivity(), "")
    assert "segmentation fault" in crash.cause
    assert crash.cause.endswith("in decode (/x/decode.py:31)")
    assert crash.moment() == "before the first update"


def test_only_images_in_the_hands_of_the_dead_are_suspect() -> None:
    where = LastActivity(5, (1, 2), (Reading(7, 10, "a"), Reading(8, 20, "b")))
    assert describe(-11, 8, "", where, "").images == (20,)
    worker = (
        "opsin: data.workers=2: a worker process ended by itself (DataLoader worker (pid(s) 7) exited unexpectedly)"
    )
    assert describe(4, 9, worker, where, "").images == (10,)
    assert describe(4, 9, "opsin: other", where, "").images == (1, 2)


def test_a_second_crash_narrows_the_suspects() -> None:
    first = Crash("x", 5, (10, 11), ("a", "b"))
    second = Crash("x", 9, (11, 12), ("b", "c"))
    assert second.is_like(first)
    assert second.narrowed(first) == Crash("x", 9, (11,), ("b",))
    assert not Crash("x", 5, (1, 2)).is_like(first)


def test_many_images_are_listed_in_short() -> None:
    assert listed([3]) == "image 3"
    assert listed(range(20)) == "images 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
