"""Waiting for images that never come: a read from a pipe, as from a network disk that is gone."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opsin.data import waiting
from opsin.data.waiting import read_in_threads
from opsin.errors import Stopped, StoppedWaiting
from opsin.run.recipe import read
from opsin.run.session import train_recipe
from opsin.training.checkpoints.format import find_checkpoints
from tests.unit.data.pictures import fill


@dataclass
class Request:
    requested: str | None = None


@dataclass
class Doubles:
    """Doubles numbers, notes how far it has read, and never returns from 7 unless it is let go."""

    read_so_far: list[int] = field(default_factory=list)
    hangs: bool = False
    let_go: threading.Event = field(default_factory=threading.Event)

    def read(self, task: int) -> int:
        self.read_so_far.append(task)
        if task == 7 and self.hangs:
            self.let_go.wait()
        if task == 13:
            raise ValueError("unlucky")
        return 2 * task


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.05)
    monkeypatch.setattr(waiting, "_GRACE_S", 0.1)


@pytest.mark.parametrize("threads", [1, 3, 20])
@pytest.mark.parametrize("count", [0, 1, 2, 10])
def test_results_come_in_the_order_of_their_tasks(threads: int, count: int) -> None:
    assert list(read_in_threads(Doubles(), range(count), threads=threads)) == [2 * task for task in range(count)]


def test_one_thread_reads_nothing_ahead() -> None:
    reader = Doubles()
    results = read_in_threads(reader, range(5))
    assert reader.read_so_far == []
    for task in range(5):
        next(results)
        assert reader.read_so_far == [*range(task + 1)]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_arrives_after_the_results_before_it(threads: int) -> None:
    results = read_in_threads(Doubles(), range(11, 20), threads=threads)
    assert [next(results), next(results)] == [22, 24]
    with pytest.raises(ValueError, match="unlucky"):
        next(results)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_request_to_stop_ends_a_wait_and_nothing_else(threads: int, impatient: None) -> None:
    reader, stop = Doubles(hangs=True), Request("SIGTERM")
    results = read_in_threads(reader, range(20), threads=threads, stop=stop)
    assert [next(results) for _ in range(7)] == [0, 2, 4, 6, 8, 10, 12]
    with pytest.raises(StoppedWaiting, match="SIGTERM: stopped while waiting for images"):
        next(results)
    reader.let_go.set()


def test_without_a_request_a_wait_goes_on(impatient: None) -> None:
    reader = Doubles(hangs=True)
    timer = threading.Timer(0.4, reader.let_go.set)
    timer.start()
    assert list(read_in_threads(reader, range(6, 9), stop=Request())) == [12, 14, 16]
    timer.join()


@pytest.fixture
def signalled() -> Iterator[None]:
    timer = threading.Timer(6.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_whose_images_never_come(
    tmp_path: Path, signalled: None, workers: int, torch_switches: None
) -> None:
    fill(tmp_path / "pictures", *(f"{kind}/{number:02}.png" for kind in ("cat", "dog") for number in range(16)))
    keys = ("batch_size=4", "epochs=4", "data.holdout=0", "data.image_size=8", "evaluators.val=null", "device=cpu")
    quiet = ("log.plots=false", "log.tensorboard=false", "checkpoints.every=never", "model.width=16", "model.depth=1")
    loading = (f"data.path={tmp_path / 'pictures'}", f"data.workers={workers}", "data.resident=false")
    recipe = read("quickstart", [*keys, *quiet, *loading, "model.heads=2", "log.csv=false"])
    names = sorted((tmp_path / "pictures").rglob("*.png"))
    for name in names[::3]:
        name.unlink()
        os.mkfifo(name)
    with pytest.raises(Stopped, match=r"^SIGTERM, while waiting for images: stopped after step \d+ of 32, which is"):
        train_recipe(recipe, tmp_path / "run", name="hanging", quiet=True)
    assert find_checkpoints(tmp_path / "run" / "checkpoints")
