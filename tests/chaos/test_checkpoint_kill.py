"""SIGKILL at any moment of a checkpoint write: the newest complete checkpoint is always found.

Also a program: the writers are forked from a small process of its own that has torch loaded.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from opsin.clock.timeline import Stage, Timeline
from opsin.errors import CheckpointError
from opsin.training.agenda import Agenda
from opsin.training.checkpoints.checkpoints import Checkpoints
from opsin.training.checkpoints.format import find_checkpoints, read_checkpoint
from opsin.training.checkpoints.retention import CheckpointConfig
from opsin.training.state import TrainState
from tests.story import Record
from tests.unit.training.tiny_run import Home

pytestmark = pytest.mark.chaos

NUM_KILLS = 60
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
    agenda = Agenda(TIMELINE, TIMELINE.total_steps)
    return Checkpoints(Home(folder), CheckpointConfig(keep=2), agenda, Record(), fingerprint="")


def newest(checkpoints: Checkpoints) -> TrainState:
    state = state_of(0)
    checkpoints.settle(checkpoints.restore(state), state.step)
    return state


def is_whole(step: int, tensors: list[torch.Tensor]) -> bool:
    return all(bool((tensor == step).all()) for tensor in tensors)


def write_without_end(folder: Path, told: int) -> None:
    """Go on from the newest checkpoint, write one after another; tell each step to `told` once it is written."""
    checkpoints = open_checkpoints(folder)
    step = newest(checkpoints).step
    while True:
        os.write(told, step.to_bytes(8))
        step += 1
        assert checkpoints.save(state_of(step), reason="chaos") is not None


def killed_writer(folder: Path, after_s: float) -> int:
    """Fork a writer, kill it `after_s` seconds after it began to write; the last step that it told."""
    told, telling = os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            write_without_end(folder, telling)
        finally:
            os._exit(1)
    os.close(telling)
    step = os.read(told, 8)
    assert step, "the writer failed"
    time.sleep(after_s)
    os.kill(writer, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL, "the writer failed"
    while more := os.read(told, 8):
        step = more
    os.close(told)
    return int.from_bytes(step)


def write_s(folder: Path) -> float:
    """Seconds that the quickest of the first checkpoints takes on this machine; they stay in `folder`."""
    checkpoints = open_checkpoints(folder)
    times = []
    for step in range(1, 6):
        begun = time.monotonic()
        checkpoints.save(state_of(step), reason="chaos")
        times.append(time.monotonic() - begun)
    return min(times)


def kill_many(folder: Path) -> None:
    """Kill writers of the checkpoints in `folder`; print how many of them in the middle of a write or a removal."""
    drawn = random.Random(0)
    caught = 0
    longest_s = 3 * write_s(folder)
    for _ in range(NUM_KILLS):
        step = killed_writer(folder, drawn.uniform(0.0, longest_s))
        caught += any(path.name.startswith((".writing-", ".removing-")) for path in folder.iterdir())
        state = newest(open_checkpoints(folder))
        # A checkpoint that was renamed into place and not told yet is complete as well.
        assert state.step in (step, step + 1), (state.step, step)
        moments = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
        assert is_whole(state.step, [*state.method.parameters(), *moments])
        assert all(path.name.startswith("step-") for path in folder.iterdir()), list(folder.iterdir())
    # Writers that die between a rename and the removal of old ones leave more; the next whole save clears up.
    checkpoints = open_checkpoints(folder)
    checkpoints.save(state_of(newest(checkpoints).step + 1), reason="chaos")
    assert len(find_checkpoints(folder)) == 2
    print(caught)


def program(*arguments: str | Path) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_a_killed_writer_always_leaves_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        program("kill", tmp_path), capture_output=True, text=True, check=False, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= NUM_KILLS // 4, "the kills must fall into writes to prove anything"


def test_a_reader_beside_a_writer_never_sees_half_a_checkpoint_nor_an_older_one(tmp_path: Path) -> None:
    with subprocess.Popen(program("write", tmp_path), stdout=subprocess.DEVNULL, env=environment()) as writer:
        try:
            while not find_checkpoints(tmp_path):
                assert writer.poll() is None
                time.sleep(0.01)
            seen, began = [0], time.monotonic()
            while (passed := time.monotonic() - began) < 1.0 or (len(set(seen)) <= 5 and passed < 60.0):
                time.sleep(0.001)  # on a busy machine the writer gets its turn
                newest = list(find_checkpoints(tmp_path).values())[-1]
                try:
                    stored = read_checkpoint(newest)
                except CheckpointError:
                    # Two newer ones were written while it was read, and it was removed.
                    assert not newest.exists()
                    continue
                assert is_whole(stored.step, list(stored.method.values()))
                assert stored.step >= seen[-1]
                seen.append(stored.step)
            assert len(set(seen)) > 5
        finally:
            writer.kill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, target = sys.argv[1], Path(sys.argv[2])
    if command == "kill":
        kill_many(target)
    else:
        write_without_end(target, sys.stdout.fileno())
