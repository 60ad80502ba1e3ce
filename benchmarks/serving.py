"""Contestants in processes of their own, timed in turns.

Some settings belong to a whole process (how freed memory is kept, which kernels are chosen), and what one contestant
sets another would enjoy. So each lives in its own process, works when told to, and sleeps meanwhile.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self


class Contestant:
    """A step in a process of its own. A context: leaving it ends the process."""

    def __init__(self, script: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> None:
        """Do the step once, and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise RuntimeError(f"{self._process.args!r} ended by itself, with status {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(step: Callable[[], object]) -> None:
    """Do `step` for every line that comes in, until there are no more."""
    for _ in sys.stdin:
        step()
        print("done", flush=True)
