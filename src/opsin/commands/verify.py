"""Proof that a recipe resumes exactly: one straight run, one killed and resumed, equal bytes."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opsin.errors import ConfigError, OpsinError, Stopped, TrainingError
from opsin.reporting.console import open_console
from opsin.run.rates import settle_rates
from opsin.run.recipe import read
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.listing import last_step
from opsin.training.checkpoints.format import find_checkpoints

_PAUSE_S = 0.002
_STEPS_PER_KILL = 20
"""Steps that leave time for a kill, and for the checkpoint write that it may wait for, however fast they are."""


def verify(recipe: str, overrides: Sequence[str], *, steps: int, kills: int) -> int:
    """Train `steps` steps twice, the second time killed with SIGKILL `kills` times; return 0 if the weights are equal.

    Prints each kill, and both hashes of model.safetensors. `train_killed` chooses the moments of the kills.

    Raises:
        ConfigError: the recipe is wrong, steps or kills are below 1, or the run was too short for the kills.
        OpsinError: a run ended by itself; its kind follows from the exit status.
    """
    asked = f"command line: --steps {steps} --kills {kills}"
    if steps < 1 or kills < 1:
        raise ConfigError(f"{asked}: both must be at least 1")
    if steps <= kills:
        raise ConfigError(f"{asked}: each kill needs steps of its own; ask for --steps {_STEPS_PER_KILL * kills}")
    fell = 0
    own = [*overrides, f"limits.steps={steps}", "limits.hours=null", "log.tensorboard=false", "log.plots=false"]
    own += ["backup=null", "alerts.webhook=null"]
    if not any(text.startswith("checkpoints.every=") for text in overrides):
        own.append(f"checkpoints.every={max(1, steps // 10)} steps")
    # Written once: a recipe file that is edited meanwhile does not count.
    wanted = read(recipe, own)
    with tempfile.TemporaryDirectory(prefix="opsin-verify-", ignore_cleanup_errors=True) as folder:
        # One sweep for both runs, where the learning rate is to be found.
        settled = settle_rates(wanted, Path(folder, "sweep"), name=Path(recipe).stem, teller=open_console())
        text = to_yaml(settled, comments=False)
        frozen, messages = Path(folder, "recipe.yaml"), Path(folder, "messages")
        frozen.write_text(text)
        straight, killed = RunDirectory(Path(folder, "straight")), RunDirectory(Path(folder, "killed"))
        finish(Training(frozen, straight.path).start(), "straight")
        done: int = json.loads(straight.summary.read_text())["steps"]
        # Every step is logged: a kill waits for the row of its step.
        program = Training(frozen, killed.path, ("log.every=1",), messages)
        try:
            for fell, kill in enumerate(train_killed(program, killed, done, kills, random.Random()), 1):
                print(f"kill {fell}: {kill}", flush=True)
        except OpsinError:
            sys.stderr.write(messages.read_text())
            raise
        first, second = digest(straight), digest(killed)
    print(f"straight            {first}")
    print(f"killed and resumed  {second}")
    if first == second and fell < kills:
        # A run that was not killed proves nothing.
        more = max(2 * steps, _STEPS_PER_KILL * kills)
        way_out = f"ask for --steps {more}" if done == steps else f"the recipe ends after {done} steps: more epochs"
        raise ConfigError(f"{asked}: {fell} of the kills fell before the run was done; {way_out}, or fewer kills")
    print("equal" if first == second else "DIFFERENT: this recipe does not resume exactly on this machine")
    return 0 if first == second else 4


class Process(Protocol):
    """A process that trains."""

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""
        ...

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        ...

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        ...


class Program(Protocol):
    """A training that can be started again and again."""

    def start(self) -> Process:
        """Start the run, or continue it."""
        ...


@dataclass(frozen=True, slots=True)
class Training:
    """A recipe that is trained in `out`; what its process leaves in the temporary folder lies beside `out`."""

    recipe: Path
    out: Path
    overrides: Sequence[str] = ()
    messages: Path | None = None
    """The file for standard error, where the remains of a killed run may complain; None shows it."""

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the run, or continue it."""
        command = [sys.executable, "-m", "opsin", "train", str(self.recipe), *self.overrides, "--quiet"]
        command += ["--out", str(self.out)]
        environment = {**os.environ, "TMPDIR": str(self.out.parent)}
        if self.messages is None:
            return subprocess.Popen(command, env=environment)
        self.messages.unlink(missing_ok=True)  # what remains of the last process keeps the old file
        with self.messages.open("wb") as file:
            return subprocess.Popen(command, env=environment, stderr=file)


@dataclass(frozen=True, slots=True)
class Kill:
    """The state in which a kill leaves a run."""

    step: int
    """The newest step in its journal."""
    newest: int | None
    """The checkpoint from which it continues; None if it starts over."""
    in_write: bool
    """True if it was writing or removing a checkpoint."""

    def __str__(self) -> str:
        moment = "in the middle of a checkpoint write" if self.in_write else "in training"
        return f"after step {self.step}, {moment}; goes on from step {self.newest or 0}"


def train_killed(program: Program, out: RunDirectory, steps: int, kills: int, draw: random.Random) -> Iterator[Kill]:
    """Train `out` to its end through `kills` kills; yield each.

    A kill comes when the journal reaches a random step of `steps` that it had not reached before; every second one
    then waits for a checkpoint write. A run that is done earlier is killed less often.

    Raises:
        OpsinError: the run ended by itself; its kind follows from the exit status.
    """
    reached = 0
    for number in range(1, kills + 1):
        after = reached + draw.randint(1, max(1, (steps - 1 - reached) // (kills - number + 1)))
        kill = _kill(program.start(), out, after=after, in_write=number % 2 == 0)
        if kill is None:
            return
        reached = kill.step
        yield kill
    finish(program.start(), "killed and resumed")


def finish(process: Process, name: str) -> None:
    """Wait for the end of a run.

    Raises:
        OpsinError: its exit status is not 0.
    """
    try:
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    if status:
        kinds: dict[int, type[OpsinError]] = {2: ConfigError, 3: Stopped}
        raise kinds.get(status, TrainingError)(
            f"verify: the {name} run ended with exit status {status} instead of 0 (see above)"
        )


def digest(run: RunDirectory) -> str:
    """Return the sha256 of the final weights, with the averaged ones if the run keeps them."""
    files = [path for path in (run.model, run.averaged) if path.exists()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _kill(process: Process, out: RunDirectory, *, after: int, in_write: bool) -> Kill | None:
    """Kill the run after `after` steps and, with `in_write`, in a checkpoint write; return None if it ends before."""
    try:
        while (last_step(out.metrics) or 0) < after or (in_write and not _is_in_write(out)):
            if process.poll() is not None:
                break
            time.sleep(_PAUSE_S)
    finally:
        process.kill()
        status = process.wait()
    if status >= 0:
        finish(process, "killed and resumed")
        return None
    return Kill(last_step(out.metrics) or 0, max(find_checkpoints(out.checkpoints), default=None), _is_in_write(out))


def _is_in_write(out: RunDirectory) -> bool:
    return any(path.name.startswith((".writing-", ".removing-")) for path in out.checkpoints.glob(".*"))
