import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsin.data.base import UnreadableImage
from opsin.data.views.crops import RandomResizedCrop
from opsin.data.workers import Crew, RawBatch, Reader, Task, read_batches
from opsin.errors import DataError, TransientError

SAMPLES = 40


@dataclass
class Plain:
    """Images of two sizes that are functions of their index; reading notes the process in `folder`."""

    folder: Path
    name: str = "plain"
    classes: tuple[str, ...] = ("a", "b")
    labels: Tensor = field(default_factory=lambda: torch.arange(SAMPLES) % 2)

    def __len__(self) -> int:
        return SAMPLES

    def read(self, index: int) -> Tensor:
        (self.folder / str(os.getpid())).touch()
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 12, 10 + index % 2), dtype=torch.uint8, generator=generator)

    def location(self, index: int) -> str:
        return f"image {index}"


class Broken(Plain):
    """Cannot read image 7, in a way that its author did not foresee."""

    def read(self, index: int) -> Tensor:
        if index == 7:
            raise KeyError("no such column")
        return super().read(index)


class Gone(Plain):
    """The disk with image 7 does not answer, in a reader that does not expect it."""

    def read(self, index: int) -> Tensor:
        if index == 7:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(index)


class Unreadable(Plain):
    """Has no readable image."""

    def read(self, index: int) -> Tensor:
        raise UnreadableImage("there are no bytes")


class Fatal(Plain):
    """Kills the process that reads image 7."""

    def read(self, index: int) -> Tensor:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


CROPS = {"image": RandomResizedCrop(size=8), "small": RandomResizedCrop(size=4, count=3)}


def reader(source: Plain) -> Reader:
    return Reader(source, seed=5)


def batches(source: Plain, workers: int) -> Iterator[RawBatch]:
    tasks = [
        Task(CROPS, epoch, torch.arange(first, first + 10)) for epoch in range(2) for first in range(0, SAMPLES, 10)
    ]
    return read_batches(reader(source), tasks, Crew(workers, prefetch=2))


def wait_until(happened: Callable[[], bool], *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_batches_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    expected = list(batches(Plain(tmp_path), 0))
    assert len(expected) == 8
    assert {name: view.shape[:2] for name, view in expected[0].views.items()} == {"image": (1, 10), "small": (3, 10)}
    for workers in (1, 3):
        for batch, same in zip(batches(Plain(tmp_path), workers), expected, strict=True):
            assert torch.equal(batch.ids, same.ids)
            assert torch.equal(batch.labels, same.labels)
            assert all(torch.equal(batch.views[name], same.views[name]) for name in same.views)
    assert len(list(tmp_path.iterdir())) == 5, "all four workers and this process have read"


def test_a_batch_larger_than_the_held_memory_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(batches(Plain(tmp_path), 0))
    monkeypatch.setattr("opsin.data.workers._GROUP_BYTES", 1000)
    assert torch.equal(next(batches(Plain(tmp_path), 0)).views["small"], expected.views["small"])


def test_interleaved_views_hold_the_same_pixels(tmp_path: Path) -> None:
    task = Task({"image": RandomResizedCrop(size=8, count=2)}, epoch=1, ids=torch.arange(SAMPLES))
    view = Reader(Plain(tmp_path), seed=4).read(task).views["image"]
    interleaved = Reader(Plain(tmp_path), seed=4, interleaved=True).read(task).views["image"]
    assert torch.equal(interleaved, view)
    assert interleaved.stride()[2:] == (1, 8 * 3, 3)


def test_reading_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    list(batches(Plain(tmp_path), 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("source", "what"), [(Broken, "KeyError: 'no such column'"), (Gone, "OSError: [Errno 5] Input/output error")]
)
def test_an_error_in_a_worker_arrives_as_one_line_and_may_pass(tmp_path: Path, source: type[Plain], what: str) -> None:
    with pytest.raises(TransientError) as caught:
        list(batches(source(tmp_path), 1))
    assert str(caught.value) == (f"data.workers: reading failed in a worker with {what}; data.workers=0 shows where")


def test_an_error_for_the_user_arrives_from_a_worker_as_it_is(tmp_path: Path) -> None:
    messages = []
    for workers in (0, 1):
        with pytest.raises(DataError, match="image 0: unreadable") as caught:
            next(batches(Unreadable(tmp_path), workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"data.workers=1: a worker process ended .*fewer workers, or try again"):
        list(batches(Fatal(tmp_path), 1))


class HalfSent:
    """A batch whose worker dies before its memory is handed over: the other end of the line is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def share_memory(self) -> None:
        pass

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Exception]]:
        return hang_up, (self.error,)


def hang_up(error: Exception) -> object:
    raise error


class HangsUp(Reader):
    def read(self, task: Task) -> RawBatch:
        error = ConnectionResetError(104, "Connection reset by peer") if task.epoch else EOFError()
        return HalfSent(error)  # type: ignore[return-value]


@pytest.mark.parametrize("reason", ["EOFError", "Connection reset by peer"])
def test_a_worker_killed_while_it_hands_over_a_batch_is_reported(tmp_path: Path, reason: str) -> None:
    task = Task({}, int(reason != "EOFError"), torch.arange(2))
    with pytest.raises(TransientError, match=rf"data.workers=1: a worker process ended by itself .*{reason}.*fewer"):
        list(read_batches(HangsUp(Plain(tmp_path), seed=0), [task], Crew(workers=1)))


def test_a_fork_server_killed_while_it_is_asked_for_a_worker_is_reported_and_replaced(tmp_path: Path) -> None:
    reading = batches(Plain(tmp_path), 1)
    expected = next(reading)
    [worker] = [int(path.name) for path in tmp_path.iterdir()]
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGSTOP)
    timer = threading.Timer(0.5, os.kill, (server, signal.SIGKILL))
    timer.start()
    with pytest.raises(TransientError, match=r"data.workers=1: a worker process ended by itself .*try fewer workers"):
        next(batches(Plain(tmp_path), 1))
    timer.join()
    wait_until(lambda: not is_alive(server))
    assert torch.equal(next(batches(Plain(tmp_path), 1)).ids, expected.ids)


def test_workers_leave_signals_to_the_training_process(tmp_path: Path) -> None:
    reading = batches(Plain(tmp_path), 1)
    next(reading)
    [worker] = [int(path.name) for path in tmp_path.iterdir()]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker, number)
    assert len(list(reading)) == 7
    wait_until(lambda: not is_alive(worker))


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.data.test_workers import Plain, batches

def main():
    reading = batches(Plain(Path(sys.argv[1])), 2)
    print(len(next(reading).ids), flush=True)
    next(reading)
    {then}

{start}
"""


def start_script(tmp_path: Path, env: dict[str, str], *, then: str, guarded: bool = True) -> "subprocess.Popen[str]":
    root = str(Path(__file__).resolve().parents[3])
    start = "if __name__ == '__main__':\n    main()" if guarded else "main()"
    (tmp_path / "script.py").write_text(SCRIPT.format(root=root, then=then, start=start))
    (tmp_path / "processes").mkdir()
    return subprocess.Popen(
        [sys.executable, "script.py", "processes"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_workers_end_when_the_training_process_is_killed(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    with start_script(tmp_path, opsin_env, then="time.sleep(600)") as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "10\n"
        wait_until(lambda: len(list((tmp_path / "processes").iterdir())) == 2)
        script.kill()
    for worker in (tmp_path / "processes").iterdir():
        wait_until(lambda number=int(worker.name): not is_alive(number))  # type: ignore[misc]


def test_a_process_with_waiting_workers_can_exit(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    with start_script(tmp_path, opsin_env, then="globals()['kept'] = reading") as script:
        _, errors = script.communicate(timeout=180)
    assert (script.returncode, errors) == (0, "")


def test_a_script_without_a_guard_is_told_so(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    with start_script(tmp_path, opsin_env, then="pass", guarded=False) as script:
        _, errors = script.communicate(timeout=180)
    assert script.returncode == 1
    assert "must start training below `if __name__ == '__main__':`" in errors
