"""Room in /dev/shm: its arithmetic, and workers on a small one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.data import shared_memory
from opsin.data.loading import stored_bytes
from opsin.data.shared_memory import Fitted, available_bytes, bytes_in_flight, fit, reserved
from opsin.data.views.crops import RandomResizedCrop

MIB = 2**20


@pytest.mark.parametrize(
    ("wanted", "batch", "available", "found"),
    [
        ((2, 4), 10 * MIB, None, (2, 4)),
        ((2, 4), 10 * MIB, 100 * MIB, (2, 4)),
        ((2, 4), 10 * MIB, 99 * MIB, (2, 3)),
        ((2, 4), 10 * MIB, 40 * MIB, (2, 1)),
        ((2, 4), 10 * MIB, 39 * MIB, (1, 1)),
        ((8, 4), 10 * MIB, 70 * MIB, (5, 1)),
        ((2, 4), 10 * MIB, 29 * MIB, (0, 4)),
        ((2, 4), 10 * MIB, 0, (0, 4)),
        ((0, 4), 10 * MIB, 0, (0, 4)),
        ((8, 4), 128 * MIB, None, (8, 1)),
        ((16, 4), 128 * MIB, None, (16, 1)),
        ((4, 4), 100 * MIB, None, (4, 2)),
    ],
)
def test_the_prefetch_is_lowered_first_and_then_the_workers(
    wanted: tuple[int, int], batch: int, available: int | None, found: tuple[int, int]
) -> None:
    fitted = fit(*wanted, batch, available)
    assert (fitted.workers, fitted.prefetch) == found
    assert (fitted.reason is None) == (found == wanted or wanted[0] == 0)
    if available is not None and fitted.workers:
        assert bytes_in_flight(fitted.workers, fitted.prefetch, batch) <= available


def test_a_second_loader_gets_what_the_first_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1000 * MIB]
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: free[0])
    assert available_bytes() == 750 * MIB
    with reserved(2, 2, 100 * MIB):
        assert available_bytes() == 300 * MIB  # three quarters of what is left, although nothing is filled yet
        free[0] = 500 * MIB
        assert available_bytes() == 300 * MIB
        free[0] = 100 * MIB
        assert available_bytes() == 75 * MIB
    free[0] = 2000 * MIB
    assert available_bytes() == 1500 * MIB


def test_a_system_without_shared_memory_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", "/no/such/folder")
    assert available_bytes() is None
    assert fit(2, 4, MIB, None) == Fitted(2, 4)


def test_a_batch_is_counted_in_whole_pages() -> None:
    crops = {"image": RandomResizedCrop(size=8, count=2), "small": RandomResizedCrop(size=4)}
    assert stored_bytes(crops, 64) == 2 * 64 * 3 * 64 + (64 * 3 * 16 + 1024) + 2 * 4096


ON_A_SMALL_ONE = """
import os, sys
import torch
from opsin.data.shared_memory import free_bytes
from opsin.data.sources.digits import load_digits
from opsin.data.views.crops import RandomResizedCrop
from opsin.data.workers import Crew, Reader, Task, read_batches
from opsin.errors import TransientError

def main():
    crops = {"image": RandomResizedCrop(size=32)}
    tasks = [Task(crops, 0, torch.arange(n, n + 64)) for n in range(0, 640, 64)]
    batch_bytes = 64 * 3 * 32 * 32
    whole, most = free_bytes(), 0
    for _ in read_batches(Reader(load_digits(), 0), tasks, Crew(2, 2, False, batch_bytes)):
        import time; time.sleep(0.1)
        most = max(most, whole - free_bytes())
    print(most // batch_bytes)
    try:
        for _ in read_batches(Reader(load_digits(), 0), tasks, Crew(2, 4, False, batch_bytes)):
            import time; time.sleep(0.1)
    except TransientError as error:
        print(error)

if __name__ == "__main__":
    main()
"""


def test_workers_fill_what_was_planned_and_more_is_one_line(opsin_env: dict[str, str], tmp_path: Path) -> None:
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1600k tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small /dev/shm needs root")
    script = tmp_path / "script.py"
    script.write_text(ON_A_SMALL_ONE)
    done = subprocess.run(
        [*mount, sys.executable, script], env=opsin_env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    most, error = done.stdout.splitlines()
    assert 4 <= int(most) <= 6, "2 workers with 2 batches each, the one in use, and the one after it"
    assert error.startswith("/dev/shm: no room for a batch of 0.2 MiB, ")
    assert "set data.workers=0, which needs none" in error
    assert done.stderr == ""
