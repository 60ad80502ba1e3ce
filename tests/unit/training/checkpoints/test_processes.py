"""Checkpoints beside training, in processes of their own: the memory they take, and how processes end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.training.checkpoints.format import read_checkpoint
from tests.unit.training.tiny_run import Story, equal, fresh, train

MEMORY = """
import os, sys
import torch
from pathlib import Path
from torch import nn
from opsin.clock.timeline import Stage, Timeline
from opsin.training.checkpoints.checkpoints import CheckpointConfig, Checkpoints
from opsin.training.agenda import Agenda
from opsin.training.state import TrainState
from tests.story import Record
from tests.unit.training.tiny_run import Home

def peak_bytes():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

def save(width, where, compression):
    method = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    for param in method.parameters():
        optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)
    config = CheckpointConfig(background=where == "background", compression=compression)
    timeline = Timeline([Stage(epochs=1, batch_size=1, steps_per_epoch=100)])
    folder = Path(sys.argv[1], f"{where} {compression} {width}")
    checkpoints = Checkpoints(Home(folder), config, Agenda(timeline, 100), Record(), fingerprint="")
    before = peak_bytes()
    state = TrainState(method, optimizer)
    for state.step in (1, 2, 3):
        assert checkpoints.save(state, reason="test")
    return peak_bytes() - before

for way in (("background", "none"), ("background", "zstd"), ("at once", "none")):
    if os.fork() == 0:
        save(8, *way)  # what is loaded on the way
        print(save(1024, *way) / (8 * 1024 * 1024 * 4), flush=True)
        os._exit(0)
    os.wait()
"""


def program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of its own that has torch, this package and the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_saving_takes_the_memory_of_one_copy_and_a_little(tmp_path: Path) -> None:
    done = program(MEMORY, tmp_path)
    beside, compressed, at_once = map(float, done.stdout.split())
    # A quarter of these 32 MiB for everything else: pieces of 1 MiB, and what the allocator keeps.
    assert 0.9 < beside < 1.25, done.stderr
    assert compressed < 1.25
    assert at_once < 0.25


EXIT = """
import sys
from pathlib import Path
from tests.unit.training.tiny_run import Story, fresh, train

story = Story(Path(sys.argv[1]), every="1 step", background=True)
story.checkpoints.save_if_due(train(fresh(width=60_000), to=1))
print(len(story.steps()))
ENDING
"""


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(3)", 3), ("raise ValueError", 1)])
def test_a_process_does_not_end_before_its_checkpoint_is_complete(tmp_path: Path, ending: str, status: int) -> None:
    done = program(EXIT.replace("ENDING", ending), tmp_path)
    assert (done.returncode, done.stdout) == (status, "0\n"), done.stderr
    assert read_checkpoint(tmp_path / "step-00000001").step == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from opsin.training.state import Detour
from tests.unit.training.tiny_run import Story, fresh, train

sync = os.fsync

def die_at(number, folder, again):
    story = Story(folder, every="1 step", background=True)
    state = train(fresh(), to=1)
    story.checkpoints.save(state, reason="test")
    if again:
        state.detours = (Detour(2, 5, 1, 'loss_spike', 0.5, 25),)
    else:
        train(state, to=2)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    story.checkpoints.save_if_due(state)
    story.checkpoints.wait()
    os._exit(0)

train(fresh(), to=1)  # what torch imports on the way is imported once
for number in range(1, 7):
    if os.fork() == 0:
        die_at(number, Path(sys.argv[1], str(number)), sys.argv[2] == "again")
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(("save", "syncs"), [("next", 4), ("again", 5)])
def test_a_kill_at_any_moment_of_the_thread_leaves_a_whole_checkpoint(tmp_path: Path, save: str, syncs: int) -> None:
    """`again` saves a step anew, with a detour."""
    done = program(KILLED, tmp_path, save)
    assert list(map(int, done.stdout.split())) == [-signal.SIGKILL] * syncs + [0] * (6 - syncs), done.stderr
    for number in range(1, syncs + 1):
        folder = tmp_path / str(number)
        # State, manifest and their folder are synced before they get their name, the folder above after it.
        is_new = number > 3
        state = Story(folder).restore(fresh())
        assert equal(state, train(fresh(), to=2 if is_new and save == "next" else 1)), number
        assert bool(state.detours) == (is_new and save == "again"), number
        assert all(path.name.startswith("step-") for path in folder.iterdir()), number
