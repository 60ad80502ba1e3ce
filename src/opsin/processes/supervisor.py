"""`opsin train --restarts N`: a process that starts the training as its child, and again after a crash.

It does not import torch, so that a fault of a driver or a lack of memory ends the child alone. Its reports go into the
events of the run, while no child holds the lock.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from opsin.errors import OpsinError, RunError
from opsin.processes.crashes import Crash, OomKills, describe, listed
from opsin.processes.excluded import ExcludedImage, read_excluded, write_excluded
from opsin.processes.trail import SUPERVISOR, VARIABLE, LastActivity, follow
from opsin.reporting.console import Console, duration, open_console
from opsin.reporting.journal import Journal, Sink
from opsin.reporting.sinks import TextLog
from opsin.reporting.webhook import Webhook, webhook_url
from opsin.settings.yaml_tree import read_file
from opsin.storage.directory import RunDirectory
from opsin.storage.files import reason_of
from opsin.storage.teller import Fact

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FINAL = (0, 2, 3)
"""Exit statuses that are not crashes: done, wrong input, stopped."""
_KEPT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Supervision:
    """The rules of a supervised run."""

    program: tuple[str, ...]
    """The program that gets the arguments of a command."""
    restarts: int
    """Restarts at most."""
    quarantine_after: int | None = None
    """Like crashes in a row after which their images are excluded; None excludes none."""
    first_wait_s: float = 2.0
    """Seconds before a restart; doubled with each crash without a new checkpoint since the last."""
    longest_wait_s: float = 300.0


def supervise(
    command: Sequence[str], out: Path, settings: Supervision, *, fresh: bool = False, quiet: bool = False
) -> int:
    """Run `opsin` with the arguments `command`, which trains in `out`, until it is done; return its exit status.

    A status of 0, 2 or 3 is final, and so is a failure of the training itself, such as divergence: only a crash
    is followed by a restart, from the newest checkpoint. SIGTERM, SIGINT and SIGUSR1 are passed to the child. With
    `fresh`, the first child that gets as far moves an earlier run out of the way.
    """
    supervisor = _Supervisor(command, out, settings, fresh=fresh, console=open_console(quiet=quiet))
    with supervisor.forwarding():
        return supervisor.run()


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a child."""

    status: int
    crash: Crash
    where: LastActivity


class _Supervisor:
    def __init__(
        self, command: Sequence[str], out: Path, settings: Supervision, *, fresh: bool, console: Console
    ) -> None:
        self._command = command
        self._out = RunDirectory(out)
        self._settings = settings
        self._console = console
        # The directory that `--fresh` is to move, until another one has its name.
        self._to_move = _identity(out) if fresh and self._out.exists() else None
        self._child: subprocess.Popen[bytes] | None = None
        self._signal: str | None = None
        self._signalled = threading.Event()

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Pass signals to the child in this block; between two children they end the wait."""
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self) -> int:
        """Run children one after another; return the exit status of the last."""
        last: Crash | None = None
        repeats = standing = 0
        newest = _newest_checkpoint(self._out)
        for left in range(self._settings.restarts, -1, -1):
            end = self._train()
            if end.status in _FINAL:
                return end.status
            if end.status < 0 and -end.status in _FORWARDED:  # it was stopped before it could handle the signal
                self._console.warning(f"stopped by {signal.Signals(-end.status).name}")
                return 3
            repeats = repeats + 1 if last is not None and end.crash.is_like(last) else 1
            last = end.crash if repeats == 1 or last is None else end.crash.narrowed(last)
            before, newest = newest, _newest_checkpoint(self._out)
            standing = 0 if (newest or 0) > (before or 0) else standing + 1
            # The exponent is bounded, too: a float cannot hold any power of two.
            wait_s = min(self._settings.first_wait_s * 2 ** min(standing, 30), self._settings.longest_wait_s)
            decision = self._decide(end, last, repeats, left)
            are_excluded = self._carry_out(last, repeats, decision, left, newest, wait_s)
            if decision.ends:
                return 4
            if are_excluded:
                last, repeats = None, 0
            if self._signalled.wait(wait_s):
                self._console.warning(f"{self._signal}: stopped before the restart")
                return 3
        raise AssertionError("the last crash ends it")

    def _train(self) -> _End:
        """Run one child from its start to its end."""
        kills = OomKills.now()
        with tempfile.TemporaryDirectory(prefix="opsin-", ignore_cleanup_errors=True) as trail:
            environment = {
                **os.environ,
                VARIABLE: trail,
                SUPERVISOR: str(os.getpid()),
                # The path of this interpreter, as a script or `python -m` has set it.
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }
            fresh = ["--fresh"] if self._to_move is not None and _identity(self._out.path) == self._to_move else []
            child = subprocess.Popen(
                [*self._settings.program, *self._command, *fresh],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C in a terminal reaches it once, through this process
            )
            assert child.stderr is not None
            self._child = child
            if self._signal is not None:  # it came while the child was started
                child.send_signal(signal.Signals[self._signal])
            lines = _Lines(child.stderr)
            status = child.wait()
            self._child = None
            where = follow(Path(trail))
            crash = describe(status, child.pid, lines.end(), where, OomKills.now().since(kills))
            return _End(status, crash, where)

    def _decide(self, end: _End, crash: Crash, repeats: int, left: int) -> "_Decision":
        """Decide whether there is a restart, and which images are excluded."""
        if end.where.verdict is not None:
            return _Decision(ends="no restart: training failed for a reason that a restart does not change")
        if self._signal is not None:
            return _Decision(ends=f"no restart after {self._signal}")
        after = self._settings.quarantine_after
        if after is not None and repeats >= after and crash.images:
            known = {item.index for item in self._excluded()}
            new = tuple(image for image in crash.images if image not in known)
            if not new:
                return _Decision(ends="no restart: it crashes here without these images, too; they are not the cause")
            if left:
                return _Decision(exclude=new)
        return _Decision(ends="no restarts are left" if left == 0 else "")

    def _carry_out(
        self, crash: Crash, repeats: int, decision: "_Decision", left: int, newest: int | None, wait_s: float
    ) -> bool:
        """Exclude images, and report the crash and its consequence; return True if images were excluded."""
        with self._journal() as journal:
            fault = self._exclude(crash, repeats, decision, journal) if decision.exclude else ""
            words = self._in_words(crash, repeats, decision, fault)
            if not decision.ends:
                start = "the beginning" if newest is None else f"the checkpoint of step {newest}"
                words.append(f"goes on from {start} in {duration(wait_s)} (restart, {left - 1} left)")
            message = "; ".join(words)
            self._console.warning(message)
            are_excluded = bool(decision.exclude) and not fault
            if journal is not None:
                # With the step that training goes on from: what happened after it will be forgotten.
                journal.event("crash", newest or 0, **_facts(crash, repeats, decision, message))
                if are_excluded:
                    file = self._out.excluded.name
                    journal.event("put_aside", newest or 0, images=decision.exclude, file=file)
        return are_excluded

    def _exclude(self, crash: Crash, repeats: int, decision: "_Decision", journal: Journal | None) -> str:
        """Exclude images from now on, with the lock of the run; return the reason if that fails, else nothing."""
        if journal is None:
            return "the run cannot be locked"
        reason = f"training crashed with it {repeats} times ({crash.cause})"
        try:
            write_excluded(
                self._out.excluded, [*self._excluded(), *(ExcludedImage(image, reason) for image in decision.exclude)]
            )
        except OSError as error:
            return reason_of(error)
        return ""

    def _in_words(self, crash: Crash, repeats: int, decision: "_Decision", fault: str) -> list[str]:
        """Return the cause of a crash and the fate of its images; `fault` is the reason why they were not excluded."""
        words = [f"training crashed {crash.moment()}: {crash.cause}"]
        if repeats > 1:
            words.append(f"the {_ordinal(repeats)} crash of this kind in a row, so it will hardly pass by itself")
            if crash.images and not crash.locations:
                words.append(f"{listed(crash.images)} belong to it (events.jsonl lists all)")
            if crash.images and self._settings.quarantine_after is None:
                words.append("--quarantine-after 3 would go on without them")
        words += [decision.ends] if decision.ends else []
        if decision.exclude:
            name = self._out.excluded.name
            until = f"cannot be left out ({name}: {fault}), which is tried again after the next crash here"
            words.append(f"{listed(decision.exclude)} {until if fault else f'will be left out from now on ({name})'}")
        return words

    @contextmanager
    def _journal(self) -> Iterator[Journal | None]:
        """Open the journal of the run, with its lock; None if there is no run, or another process holds the lock."""
        if not self._out.exists():
            yield None
            return
        journal: Journal | None = None
        try:
            with RunDirectory.locked(self._out.path):
                sinks = [TextLog(self._out.path, self._console), *self._webhooks()]
                journal = Journal(self._out.path, sinks, teller=self._console)
                yield journal
                journal.close()
        except (RunError, OSError) as error:
            self._console.warning(f"not written into the run: {error}")
            if journal is None:
                yield None

    def _webhooks(self) -> list[Sink]:
        """Return the webhook of the recipe, if it has one: a killed training cannot send to it."""
        try:
            group = read_file(self._out.recipe, self._out.recipe.name).child("alerts")
            setting = None if group is None else group.child("webhook")
            if setting is None or not isinstance(setting.value, str):
                return []
            name = self._out.recipe_name() or ""
            url = webhook_url(setting.value)
            return [Webhook(self._out.path, self._console, url, recipe=name)]
        except OpsinError as error:
            self._console.warning(f"the webhook gets no message: {error}")
            return []

    def _excluded(self) -> tuple[ExcludedImage, ...]:
        return read_excluded(self._out.excluded)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._signalled.set()
        if self._child is not None:
            self._child.send_signal(number)


@dataclass(frozen=True, slots=True)
class _Decision:
    ends: str = ""
    """The reason why there is no restart; empty if there is one."""
    exclude: tuple[int, ...] = ()
    """Images to exclude from now on."""


class _Lines:
    """Copies the lines of a child to stderr, and keeps the last ones."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._kept: deque[bytes] = deque()
        self._thread = threading.Thread(target=self._hand_on, daemon=True)
        self._thread.start()

    def end(self) -> str:
        """Return the last lines. The stream may stay open in a process that the child has left behind."""
        self._thread.join(timeout=2.0)
        return b"".join(self._kept).decode(errors="replace")

    def _hand_on(self) -> None:
        with self._stream:
            self._read()

    def _read(self) -> None:
        while data := os.read(self._stream.fileno(), _KEPT_BYTES):
            self._kept.append(data)
            while sum(map(len, self._kept)) - len(self._kept[0]) > _KEPT_BYTES:
                self._kept.popleft()
            try:
                sys.stderr.write(data.decode(errors="replace"))
                sys.stderr.flush()
            except (OSError, ValueError):  # its reader has left; the child must not notice
                continue


def _facts(crash: Crash, repeats: int, decision: _Decision, message: str) -> dict[str, Fact]:
    """Return the facts of the event `crash`."""
    return {
        "cause": crash.cause,
        "update": None if crash.step is None else crash.step + 1,
        "repeats": repeats,
        "images": crash.images,
        "places": crash.locations,
        "restarts": not decision.ends,
        "message": message,
    }


def _identity(path: Path) -> tuple[int, int] | None:
    """Return a value that distinguishes a folder from another one of the same name."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _newest_checkpoint(run: RunDirectory) -> int | None:
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in run.checkpoints.glob("step-*"))
    return max((int(match[1]) for match in found if match), default=None)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(0 if number % 100 in (11, 12, 13) else number % 10, "th")
    return f"{number}{ending}"
