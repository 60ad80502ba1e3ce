"""Trainings to be disturbed: forked from this program, which has imported everything, so that one takes a second."""

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from chaos_conditions import Condition, Strike, nothing
from opsin.commands.verify import digest
from opsin.reporting.journal import read_rows
from opsin.storage.directory import RunDirectory
from opsin.storage.listing import last_step
from tests.chaos.killed_runs import Forked

STEPS = 40
SETTINGS = (
    "batch_size=64",
    "epochs=3",
    f"limits.steps={STEPS}",
    "accumulate=2",
    "precision=fp32",
    "device=cpu",
    "data.holdout=0.4",
    "data.workers=0",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "model.dropout=0.1",
    "model.drop_path=0.2",
    "checkpoints.every=5 steps",
    "evaluators.val.every=1 epoch",
    "log.every=1",
    "log.tensorboard=false",
    "log.plots=false",
)
_PATIENCE_S = 600.0


class Hung(Exception):
    """A training has not ended in ten minutes."""


class Training(Forked):
    """A process that runs one command of `opsin`; what it says stands in `messages`."""

    def __init__(
        self, arguments: list[str], messages: Path, condition: Condition, strike: Strike, environment: Mapping[str, str]
    ) -> None:
        def prepare() -> None:
            os.environ.update(environment)
            _say_into(messages)
            condition(strike)

        self._end = time.monotonic() + _PATIENCE_S
        self.messages = messages
        super().__init__(arguments, prepare)

    def poll(self) -> int | None:
        """Its exit status, None while it runs.

        Raises:
            Hung: it has run for longer than anything here takes.
        """
        if super().poll() is None and time.monotonic() > self._end:
            raise Hung(f"no end after {_PATIENCE_S:g} s: {self.messages.read_text()}")
        return self._status

    def wait(self) -> int:
        """Its exit status once it has ended; raises as `poll`."""
        while (status := self.poll()) is None:
            time.sleep(0.002)
        return status

    def remove(self) -> None:
        """See that nothing is left of it."""
        self.kill()
        super().wait()


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run has come to."""

    weights: str
    losses: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, run: RunDirectory) -> "Learned":
        losses = [(row.step, row.values["train/loss"]) for row in read_rows(run.metrics) if "train/loss" in row.values]
        return cls(digest(run), tuple(losses))

    def difference(self, wanted: "Learned") -> str:
        """In words; nothing where there is none."""
        if self.weights != wanted.weights:
            return f"other weights ({self.weights[:16]})"
        if self.losses != wanted.losses:
            missing = sorted(set(wanted.losses) - set(self.losses))
            return f"other losses; of steps {[step for step, _ in missing]} they are missing or others"
        return ""


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """The run that was left alone: what it has come to, and how much there is to be disturbed in it."""

    learned: Learned
    writes: int
    """Of files, syncs included."""
    largest_bytes: int
    """The size of its largest file."""


@dataclass(slots=True)
class Case:
    """A run to be disturbed: everything random about it comes from `draw`."""

    folder: Path
    draw: random.Random
    undisturbed: Undisturbed
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    twin: RunDirectory | None = None
    """The run with these overrides that was left alone, where it is not `undisturbed`."""
    proofs: list[Callable[[], str]] = field(default_factory=list)
    """What must hold at the end besides the bytes of the run: each gives what is wrong, or nothing."""
    cleanup: ExitStack = field(default_factory=ExitStack)
    story: list[str] = field(default_factory=list)
    """What was done to the run, in words."""
    started: int = 0

    @property
    def run(self) -> RunDirectory:
        """Where the run is."""
        return RunDirectory(self.folder / "run")

    @property
    def wanted(self) -> Learned:
        """What the run must come to."""
        return self.undisturbed.learned if self.twin is None else Learned.of(self.twin)

    def strike(self) -> None:
        """The fault has struck; called in any process."""
        (self.folder / "struck").touch()

    @property
    def has_struck(self) -> bool:
        """Whether the run has felt its fault at all."""
        return (self.folder / "struck").exists()

    def command(self, run: RunDirectory | None = None) -> list[str]:
        """What trains the run, or another one with its settings, or goes on with it."""
        out = str((run or self.run).path)
        return ["train", "quickstart", *SETTINGS, *self.overrides, "--quiet", "--out", out]

    def start(self, condition: Condition = nothing) -> Training:
        """Begin the run or go on with it."""
        return self.opsin(self.command(), condition)

    def opsin(self, arguments: list[str], condition: Condition = nothing) -> Training:
        """Run any command; it ends with the case."""
        self.started += 1
        messages = self.folder / f"messages-{self.started}"
        process = Training(arguments, messages, condition, self.strike, self.environment)
        self.cleanup.callback(process.remove)
        return process

    def reach(self, process: Training, first: int = 1, last: int = STEPS - 1) -> int:
        """Wait until the run has done a random number of steps and is anywhere in the next; gives that number.

        Raises:
            Hung: it gets nowhere.
        """
        wanted = self.draw.randint(first, last)
        delay_s = self.draw.uniform(0.0, 0.02)
        while process.poll() is None and (last_step(self.run.metrics) or 0) < wanted:
            time.sleep(0.001)
        time.sleep(delay_s)
        return wanted

    def end(self, process: Training, number: signal.Signals) -> int:
        """Send a signal and wait for the exit status. It has struck where it has cut the training short."""
        process.send(number)
        if status := process.wait():
            self.strike()
        return status

    def tell(self, text: str) -> None:
        """Add to the story."""
        self.story.append(text)


def said(case: Case) -> str:
    """What the newest command said; nothing where none was started."""
    messages = case.folder / f"messages-{case.started}"
    return messages.read_text() if messages.exists() else ""


def _say_into(messages: Path) -> None:
    descriptor = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
