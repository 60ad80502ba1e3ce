"""SIGKILL at any moment of a checkpoint write: the newest complete checkpoint is always found."""

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import nn

from opsin.errors import CheckpointError
from opsin.timeline import Stage, Timeline
from opsin.training.checkpoint import CheckpointConfig, Checkpoints, find_checkpoints, read_checkpoint
from opsin.training.state import TrainState

pytestmark = pytest.mark.chaos

NUM_KILLS = 40
TIMELINE = Timeline([Stage(epochs=1, batch_size=1, steps_per_epoch=10**7)])


def state_of(step: int) -> TrainState:
    """A state whose weights and moments all say which step they belong to."""
    method = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        for param in method.parameters():
            param.fill_(step)
            optimizer.state[param]["momentum_buffer"] = torch.full_like(param, step)
    return TrainState(method, optimizer, step=step)  # type: ignore[arg-type]  # a checkpoint needs a module only


def open_checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep=2), TIMELINE, fingerprint="", say=lambda kind, facts: None)


def write_without_end(folder: Path, done: Connection) -> None:
    """Go on from the newest checkpoint, write one after another, and tell each step once it is written."""
    torch.set_num_threads(1)
    checkpoints = open_checkpoints(folder)
    step = checkpoints.restore(state_of(0)).step
    done.send(step)
    while True:
        step += 1
        assert checkpoints.save(state_of(step), reason="chaos") is not None
        done.send(step)


def start_writer(folder: Path) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "opsin.training.checkpoint"])
    here, there = context.Pipe(duplex=False)
    writer = context.Process(target=write_without_end, args=(folder, there), daemon=True)
    writer.start()
    there.close()
    return writer, here


def last_told(done: Connection) -> int:
    step = -1
    try:
        while True:
            step = done.recv()
    except (EOFError, OSError):
        return step


def whole(step: int, tensors: list[torch.Tensor]) -> bool:
    return all(bool((tensor == step).all()) for tensor in tensors)


def test_a_killed_writer_always_leaves_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    drawn = random.Random(0)
    caught_writing = 0
    for _ in range(NUM_KILLS):
        writer, done = start_writer(tmp_path)
        first = done.recv()
        time.sleep(drawn.uniform(0.0, 0.03))
        writer.kill()
        writer.join()
        told = max(first, last_told(done))
        caught_writing += any(tmp_path.glob(".writing-*"))
        state = open_checkpoints(tmp_path).restore(state_of(0))
        # Renamed into place, and killed before it was told: complete as well.
        assert state.step in (told, told + 1)
        moments = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
        assert whole(state.step, [*state.method.parameters(), *moments])
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "damaged"))]
        assert len(find_checkpoints(tmp_path)) <= 3
    assert caught_writing >= NUM_KILLS // 4, "the kills must fall into writes to prove anything"


def test_a_reader_beside_a_writer_never_sees_half_a_checkpoint_nor_an_older_one(tmp_path: Path) -> None:
    writer, done = start_writer(tmp_path)
    try:
        assert (done.recv(), done.recv()) == (0, 1)
        seen, end = [0], time.monotonic() + 1.0
        while time.monotonic() < end:
            while done.poll():
                done.recv()
            newest = list(find_checkpoints(tmp_path).values())[-1]
            try:
                stored = read_checkpoint(newest)
            except CheckpointError as error:
                # Two newer ones were written while it was read, so it was removed.
                assert "No such file" in str(error), error
                assert not newest.exists()
                continue
            assert whole(stored.step, list(stored.method.values()))
            assert stored.step >= seen[-1]
            seen.append(stored.step)
        assert len(set(seen)) > 5
    finally:
        writer.kill()
        writer.join()
