"""The load of a machine, as the files of Linux count it, and beside a real endless loop."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsin.processes.cores import allowed_cores
from opsin.processes.load import Usage, family_s, look

TICKS = os.sysconf("SC_CLK_TCK")
LOOP = [sys.executable, "-c", "while True: pass"]

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts like this")


def test_other_programs_are_what_is_busy_and_not_this_process() -> None:
    before, after = Usage(10.0, 100.0, 50.0, 1.0), Usage(14.0, 106.0, 54.0, 3.0)
    assert after.cores_of_others(before) == pytest.approx(0.5)
    assert after.cores_waited_for(before) == pytest.approx(0.5)
    assert Usage(14.0, 103.0, 54.0, 1.0).cores_of_others(before) == 0.0


@linux
def test_only_the_cores_of_this_process_are_counted_and_time_that_was_stolen_too(tmp_path: Path) -> None:
    mine, other = min(allowed_cores()), max(allowed_cores()) + 1
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text(
        f"cpu 1 2 3 4\ncpu{mine} 100 20 30 9999 8888 5 6 7 60 50\ncpu{other} 77777 0 0 0 0 0 0 0 0 0\nintr 1 2\n"
    )
    usage = look(tmp_path)
    assert usage is not None
    assert usage.busy_s == pytest.approx((100 + 20 + 30 + 5 + 6 + 7) / TICKS)


def test_a_system_that_does_not_count_is_unknown(tmp_path: Path) -> None:
    assert look(tmp_path) is None
    assert family_s(tmp_path) == 0


@linux
def test_a_loop_of_another_program_is_seen_and_known_as_a_child_of_this_process() -> None:
    before, family = look(), family_s()
    with subprocess.Popen(LOOP) as loop:
        time.sleep(1.0)
        after, grown = look(), family_s()
        loop.kill()
    assert before is not None
    assert after is not None
    # However many programs run, those that are not this process use most of a core.
    assert after.cores_of_others(before) > 0.3
    assert grown > family
