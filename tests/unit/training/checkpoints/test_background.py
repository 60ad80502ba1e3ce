"""Checkpoints written beside training: the same bytes, nothing lost, and no more than one copy of the state."""

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.errors import RunError, Stopped, TrainingError
from opsin.training.checkpoints.format import find_checkpoints, read_checkpoint
from opsin.training.checkpoints.snapshot import Buffers, take_snapshot
from opsin.training.state import Detour, TrainState
from tests.unit.training.tiny_run import Story, bits, equal, fresh, train

DETOUR = Detour(first=2, last=5, attempt=1, kind="loss_spike", lr_factor=0.5, lr_until=25)


class SlowDisk:
    """A sync of a file waits until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._going = threading.Event()
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self._wait)

    def go_on(self) -> None:
        self._going.set()

    def _wait(self, descriptor: int) -> None:
        self.reached.set()
        assert self._going.wait(60)
        self._sync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def story_in(folder: Path, **settings: object) -> Story:
    beside: dict[str, Any] = {"every": "1 step", "background": True, **settings}
    return Story(folder / "checkpoints", **beside)


def saved_bytes(folder: Path, state: TrainState, **settings: object) -> dict[str, bytes]:
    path = story_in(folder, **settings).checkpoints.save(state, reason="test")
    assert path is not None
    return {file.name: file.read_bytes() for file in path.iterdir()}


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_bytes_are_those_of_a_write_that_training_waits_for(tmp_path: Path, compression: str) -> None:
    state = train(fresh(scaled=True), to=3)
    beside = saved_bytes(tmp_path / "beside", state, compression=compression)
    assert beside == saved_bytes(tmp_path / "at once", state, compression=compression, background=False)
    assert beside.keys() == {"manifest.json", "state.pt" if compression == "none" else "state.pt.zst"}


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path: Path, disk: SlowDisk) -> None:
    story = story_in(tmp_path)
    state = train(fresh(), to=3)
    path = story.checkpoints.save_if_due(state)
    assert disk.reached.wait(60)
    train(state, to=9)
    assert story.steps() == []
    disk.go_on()
    story.checkpoints.wait()
    assert path == story.folder / "step-00000003"
    assert equal(Story(story.folder).restore(fresh()), train(fresh(), to=3))
    ((kind, facts),) = story.events
    assert (kind, facts["step"], facts["reason"]) == ("checkpoint", 3, "1 step")


def test_tensors_that_share_memory_still_do_and_views_stay_views(tmp_path: Path) -> None:
    state = fresh()
    whole = torch.arange(12.0).reshape(3, 4)
    state.method.register_buffer("whole", whole)
    state.method.register_buffer("column", whole[:, 1])
    state.method.register_buffer("empty", torch.empty(0))
    content = take_snapshot(state, Buffers()).content["method"]
    assert torch.equal(content["column"], whole[:, 1])
    assert content["column"].stride() == (4,)
    assert content["column"].untyped_storage().data_ptr() == content["whole"].untyped_storage().data_ptr()
    whole.zero_()
    assert content["whole"].sum() == 66, "it is a copy"
    assert content["empty"].numel() == 0


def test_a_compressed_checkpoint_is_restored(tmp_path: Path) -> None:
    path = story_in(tmp_path, compression="zstd").checkpoints.save(train(fresh(), to=3), reason="test")
    assert path is not None
    assert json.loads((path / "manifest.json").read_text())["format"] == 2
    assert equal(story_in(tmp_path).restore(fresh()), train(fresh(), to=3))


def test_detours_come_back_and_take_the_place_of_the_same_step_without(tmp_path: Path) -> None:
    story = story_in(tmp_path)
    state = train(fresh(), to=3)
    formats = []
    for detours in ((), (DETOUR,)):
        state.detours = detours
        path = story.checkpoints.save(state, reason="rollback")
        assert path is not None
        formats.append(json.loads((path / "manifest.json").read_text())["format"])
    assert formats == [1, 2]
    assert [path.name for path in story.folder.iterdir()] == ["step-00000003"]
    assert story_in(tmp_path).restore(fresh()).detours == (DETOUR,)


# --- memory ---------------------------------------------------------------------------------------


def test_one_copy_of_the_state_is_kept_and_used_again() -> None:
    buffers, state = Buffers(), train(fresh(), to=1)
    addresses = set()
    for step in (2, 3):
        snapshot = take_snapshot(train(state, to=step), buffers)
        addresses.add(tuple(tensor.data_ptr() for tensor in snapshot.content["method"].values()))
        assert buffers.num_bytes == snapshot.num_bytes == sum(tensor.nbytes for tensor in bits(state))
    assert len(addresses) == 1


NO_MEMORY = (MemoryError(), torch.OutOfMemoryError("of a GPU"), RuntimeError("CUDA error: out of memory"))


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_without_memory_for_a_copy_training_waits_for_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = torch.empty

    def empty(*size: int, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8 and size != (0,):
            raise error
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    story = story_in(tmp_path)
    state = fresh()
    for step in (1, 2):
        story.checkpoints.save_if_due(train(state, to=step))
        assert story.checkpoints.newest_step == step, "it is on disk at once"
    assert [kind for kind, _ in story.events] == ["checkpoint_waits", "checkpoint", "checkpoint"], "told once"
    assert story.warnings() == [
        "no memory for a copy of the state (0.0 MiB are not free): from here on training waits while a checkpoint is "
        "written, as with checkpoints.background=false"
    ]
    monkeypatch.undo()
    assert equal(Story(story.folder).restore(fresh()), train(fresh(), to=2))


def test_memory_that_ends_while_a_checkpoint_is_written_costs_that_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "save", full)
    story = story_in(tmp_path)
    state = train(fresh(), to=1)
    assert story.checkpoints.save(state, reason="test") is None
    assert "checkpoint of step 1 was not written: no memory is left; there is no complete one" in story.warnings()[0]
    monkeypatch.undo()
    assert story.checkpoints.save(train(state, to=2), reason="test") is not None
    assert story.steps() == [2]


# --- waiting --------------------------------------------------------------------------------------


def test_the_next_save_waits_and_both_are_whole(tmp_path: Path, disk: SlowDisk) -> None:
    story = story_in(tmp_path)
    state = train(fresh(), to=1)
    story.checkpoints.save_if_due(state)
    assert disk.reached.wait(60)
    threading.Timer(0.2, disk.go_on).start()
    story.checkpoints.save_if_due(train(state, to=2))
    story.checkpoints.wait()
    assert [read_checkpoint(path).step for path in find_checkpoints(story.folder).values()] == [1, 2]
    assert [facts["step"] for _, facts in story.events] == [1, 2]


@pytest.mark.parametrize("ending", ["stop", "last step", "best", "rescue", "healthy"])
def test_what_needs_the_checkpoint_waits_for_it(tmp_path: Path, ending: str) -> None:
    story = story_in(tmp_path, last_step=3)
    state = train(fresh(), to=2)
    story.checkpoints.save_if_due(state)
    if ending == "stop":
        story.checkpoints.save_if_due(state, stopping=True)
    elif ending == "last step":
        story.checkpoints.save_if_due(train(state, to=3))
        assert story.checkpoints.newest_step == 3
    elif ending == "best":
        assert story.checkpoints.mark_best(state, 0.5)
    elif ending == "rescue":
        with pytest.raises(Stopped), story.checkpoints.rescue(state):
            raise Stopped("SIGTERM")
    else:
        assert story.checkpoints.healthy(2) == story.folder / "step-00000002"
    assert 2 in story.steps()
    assert story.checkpoints.newest_step is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_an_exception_saves_the_newest_state_after_the_one_under_way(tmp_path: Path) -> None:
    story = story_in(tmp_path)
    state = train(fresh(), to=2)

    def go_on() -> None:
        with story.checkpoints.rescue(state):
            story.checkpoints.save_if_due(state)
            train(state, to=3)
            raise TrainingError("a worker died")

    with pytest.raises(TrainingError):
        go_on()
    assert story.steps() == [2, 3]


# --- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    return monkeypatch


def test_a_failure_in_the_thread_is_told_and_the_next_save_tries_again(
    tmp_path: Path, broken_disk: pytest.MonkeyPatch
) -> None:
    story = story_in(tmp_path)
    state = train(fresh(), to=1)
    assert story.checkpoints.save_if_due(state) is not None, "that it fails is not known yet"
    story.checkpoints.wait()
    assert story.warnings() == [
        "checkpoint of step 1 was not written: Input/output error; there is no complete one; "
        "training goes on and tries again at the next due step"
    ]
    assert story.checkpoints.newest_step is None
    assert list(story.folder.iterdir()) == []
    with pytest.raises(RunError, match="step 1 could not be written before the stop"):
        story.checkpoints.save_if_due(state, stopping=True)
    broken_disk.undo()
    story.checkpoints.save_if_due(train(state, to=2))
    story.checkpoints.wait()
    assert story.checkpoints.newest_step == 2


def test_a_failure_is_told_at_a_later_step_without_waiting(tmp_path: Path, broken_disk: pytest.MonkeyPatch) -> None:
    story = story_in(tmp_path, every="2 steps")
    state = train(fresh(), to=2)
    story.checkpoints.save_if_due(state)
    end = time.monotonic() + 60
    while not story.warnings():
        assert time.monotonic() < end
        train(state, to=3)
        story.checkpoints.save_if_due(state)


def test_a_fault_of_our_own_in_the_thread_is_not_taken_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch, "save", broken)
    story = story_in(tmp_path)
    state = train(fresh(), to=1)
    story.checkpoints.save_if_due(state)
    with pytest.raises(RuntimeError, match="the device is lost"):
        story.checkpoints.wait()
    story.checkpoints.save_if_due(state)
    with pytest.raises(Stopped), story.checkpoints.rescue(state):
        raise Stopped("SIGTERM")
    assert story.warnings() == ["the last checkpoint was not written: the device is lost; there is no complete one"], (
        "it hides no other exception"
    )


def test_each_complete_checkpoint_is_passed_on_before_older_ones_go(tmp_path: Path) -> None:
    seen = []

    def look(path: Path) -> None:
        seen.append((read_checkpoint(path).step, len(find_checkpoints(path.parent)), threading.current_thread().name))

    story = story_in(tmp_path, keep=1, on_written=look)
    state = fresh()
    for step in (1, 2):
        story.checkpoints.save(train(state, to=step), reason="test")
    assert seen == [(1, 1, "checkpoint_0"), (2, 2, "checkpoint_0")]
    assert story.steps() == [2]


@pytest.mark.gpu
def test_a_gpu_is_copied_in_the_order_of_its_work(tmp_path: Path) -> None:
    state = fresh()
    state.method.to("cuda")
    weight = next(iter(state.method.parameters()))
    buffers = Buffers()
    with torch.no_grad():
        for number in range(20):
            weight.fill_(number)
            snapshot = take_snapshot(state, buffers)
            weight.fill_(-1)
            snapshot.wait()
            stored = next(iter(snapshot.content["method"].values()))
            assert stored.device.type == "cpu"
            assert stored.is_pinned()
            assert bool((stored == number).all())
