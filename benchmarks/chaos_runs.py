"""Trainings to be disturbed: forked from this program, which has imported everything, so that one takes a second.

What a condition changes holds in the forked process alone.
"""

import errno
import io
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

from opsin.rundir import RunDirectory, last_step

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


def nothing() -> None:
    """The condition of an undisturbed training."""


class Training:
    """A process that runs one command of `opsin`; what it says stands in `messages`."""

    def __init__(
        self, arguments: list[str], messages: Path, condition: Callable[[], None], environment: Mapping[str, str]
    ) -> None:
        self._status: int | None = None
        self.messages = messages
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.environ.update(environment)
                _say_into(messages)
                condition()
                from opsin.cli import main

                status = main(arguments)
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        """Its exit status once it has ended.

        Raises:
            Hung: it does not end; it was killed.
        """
        end = time.monotonic() + _PATIENCE_S
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise Hung(self.messages.read_text())
            time.sleep(0.002)
        return status

    def kill(self) -> None:
        """Send SIGKILL; does nothing where it has ended."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; does nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@dataclass(slots=True)
class Case:
    """A run to be disturbed: everything random about it comes from `draw`."""

    folder: Path
    draw: random.Random
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
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

    def command(self) -> list[str]:
        """What trains the run, or goes on with it."""
        return ["train", "quickstart", *SETTINGS, *self.overrides, "--quiet", "--out", str(self.run.path)]

    def start(self, condition: Callable[[], None] = nothing) -> Training:
        """Begin the run or go on with it."""
        return self.opsin(self.command(), condition)

    def opsin(self, arguments: list[str], condition: Callable[[], None] = nothing) -> Training:
        """Run any command."""
        self.started += 1
        messages = self.folder / f"messages-{self.started}"
        return Training(arguments, messages, condition, self.environment)

    def reach(self, poll: Callable[[], int | None], first: int = 1, last: int = STEPS - 1) -> int:
        """Wait until the run has done a random number of steps and is anywhere in the next; gives that number."""
        wanted = self.draw.randint(first, last)
        delay_s = self.draw.uniform(0.0, 0.02)
        end = time.monotonic() + _PATIENCE_S
        while poll() is None and (last_step(self.run.metrics) or 0) < wanted:
            if time.monotonic() > end:
                raise Hung(f"step {wanted} is never reached")
            time.sleep(0.001)
        time.sleep(delay_s)
        return wanted

    def tell(self, text: str) -> None:
        """Add to the story."""
        self.story.append(text)


def said(case: Case) -> str:
    """What the newest command said; nothing where none was started."""
    messages = case.folder / f"messages-{case.started}"
    return messages.read_text() if messages.exists() else ""


def clock_jumps(shift_s: float, after: int) -> Callable[[], None]:
    """The clock of the day moves by `shift_s` seconds when it is asked for the `after`-th time."""

    def condition() -> None:
        real, asked = time.time, 0

        def shift() -> float:
            nonlocal asked
            asked += 1
            return shift_s if asked > after else 0.0

        class Shifted(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Self:
                return super().now(tz) + timedelta(seconds=shift())

        time.time = lambda: real() + shift()
        for name, module in list(sys.modules.items()):
            if name.startswith("opsin") and getattr(module, "datetime", None) is datetime:
                module.datetime = Shifted  # type: ignore[attr-defined]

    return condition


def syncs_take(seconds: float) -> Callable[[], None]:
    """Each fsync takes so much longer."""

    def condition() -> None:
        real = os.fsync

        def slow(descriptor: int) -> None:
            time.sleep(seconds)
            real(descriptor)

        os.fsync = slow  # type: ignore[assignment]

    return condition


def files_end_at(size_bytes: int) -> Callable[[], None]:
    """No file can grow beyond this size (EFBIG)."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def writes_fail(folder: Path, first: int, count: int) -> Callable[[], None]:
    """Of all writes and syncs of files in `folder`, those from number `first` on end with EIO, `count` of them."""

    def condition() -> None:
        real_open, real_sync, made = io.open, os.fsync, 0

        def check() -> None:
            nonlocal made
            made += 1
            if first <= made < first + count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        class Failing(io.FileIO):
            def write(self, data: Any) -> int:
                check()
                return super().write(data)

        def is_there(file: object) -> bool:
            return isinstance(file, str | os.PathLike) and os.fspath(file).startswith(str(folder))

        def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
            if not is_there(file) or not set(mode) & set("wxa+"):
                return real_open(file, mode, buffering, *text, **named)
            raw = Failing(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **named)

        def sync(descriptor: int) -> None:
            check()
            real_sync(descriptor)

        io.open = opened
        os.fsync = sync  # type: ignore[assignment]

    return condition


def _say_into(messages: Path) -> None:
    descriptor = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
