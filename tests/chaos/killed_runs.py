"""Runs of `opsin train` to be killed, each in a process of its own that starts in no time.

The processes are forked from this program, which has imported everything. It reads a JSON object per line
from stdin, trains as it says, and answers with a line of JSON; `Killer` is the other end.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from opsin.commands.verify import train_killed
from opsin.storage.directory import RunDirectory
from opsin.storage.listing import last_step
from opsin.training.evaluator import EvaluationContext, EvaluatorConfig

ROOT = Path(__file__).resolve().parent.parent.parent


class Killer:
    """Trains in other processes, and kills them."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self._program = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program.__exit__(kind, error, trace)

    def train(self, out: Path, *overrides: str) -> int:
        """Train to the end; the exit status, negative for a signal."""
        return int(self._ask(do="train", arguments=_arguments(out, overrides)))

    def stop(self, out: Path, *overrides: str, signal_number: signal.Signals, after: int) -> int:
        """Send a signal when the journal reaches step `after`; the exit status."""
        return int(self._ask(do="stop", arguments=_arguments(out, overrides), signal=signal_number, after=after))

    def train_killed(self, out: Path, *overrides: str, steps: int, kills: int, seed: int) -> list[dict[str, Any]]:
        """Train to the end through deaths; the facts of each kill."""
        asked = {"steps": steps, "kills": kills, "seed": seed}
        found: list[dict[str, Any]] = self._ask(do="kill", arguments=_arguments(out, overrides), **asked)
        return found

    def _ask(self, **asked: object) -> Any:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        print(json.dumps(asked), file=self._program.stdin, flush=True)
        answer = self._program.stdout.readline()
        assert answer, "the program that starts runs has failed: see its traceback"
        return json.loads(answer)


def _arguments(out: Path, overrides: tuple[str, ...]) -> list[str]:
    return ["train", "quickstart", *overrides, "--quiet", "--out", str(out)]


class Forked:
    """A process that runs one command of `opsin`."""

    def __init__(self, arguments: list[str], prepare: Callable[[], None]) -> None:
        """`prepare` is called first, in the new process."""
        self._status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                prepare()
                from opsin.commands.main import main

                status = main(arguments)
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """Its exit status once it has ended."""
        status = self._look(0)
        assert status is not None
        return status

    def send(self, number: signal.Signals) -> None:
        """Send a signal; does nothing where it has ended."""
        if self._look(os.WNOHANG) is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL; does nothing where it has ended."""
        self.send(signal.SIGKILL)

    def _look(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


def descendants(pid: int) -> set[int]:
    """The living processes below `pid`, as /proc has them."""
    parents = dict(_parents())
    return {child for child in parents if pid in _above(child, parents)}


def _above(child: int, parents: Mapping[int, int]) -> Iterator[int]:
    while child := parents.get(child, 0):
        yield child


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    yield int(path.name), int(parent)


class FatalConfig(EvaluatorConfig):
    """An evaluator that ends its process with SIGKILL when it runs for the first time."""

    name: Literal["fatal"] = "fatal"

    def build(self, context: EvaluationContext, prefix: str) -> "Fatal":
        return Fatal(context.folder / "has-killed")


class Fatal:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def evaluate(self, method: object) -> Mapping[str, float]:
        if not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"survived": 1.0}


def say_on_stderr() -> None:
    os.dup2(2, 1)  # stdout is for answers


@dataclass(frozen=True)
class Command:
    """One command of `opsin`, in a new process each time."""

    arguments: list[str]

    def start(self) -> Forked:
        return Forked(self.arguments, say_on_stderr)


def train(asked: Mapping[str, Any]) -> int:
    return Command(asked["arguments"]).start().wait()


def stop(asked: Mapping[str, Any]) -> int:
    process, metrics = Command(asked["arguments"]).start(), Path(asked["arguments"][-1], "metrics.jsonl")
    while process.poll() is None and (last_step(metrics) or 0) < asked["after"]:
        time.sleep(0.001)
    process.send(signal.Signals(asked["signal"]))
    return process.wait()


def kill(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    out = RunDirectory(Path(asked["arguments"][-1]))
    draw = random.Random(asked["seed"])
    kills = train_killed(Command(asked["arguments"]), out, asked["steps"], asked["kills"], draw)
    return [{"step": kill.step, "newest": kill.newest, "in_write": kill.in_write} for kill in kills]


def main() -> None:
    # What a run imports late.
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    import opsin.run.session  # noqa: F401
    import tests.chaos.poisoned  # noqa: F401  # makes its method known

    gc.freeze()  # children share the memory of what is never collected
    commands: dict[str, Callable[[Mapping[str, Any]], object]] = {"train": train, "stop": stop, "kill": kill}
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(commands[asked["do"]](asked)), flush=True)
    os._exit(0)  # without a word about what was never collected


if __name__ == "__main__":
    main()
