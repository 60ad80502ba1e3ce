"""The sink whose pictures of a run are drawn by a process of its own: docs/decisions/0009-plots-in-a-process.md."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

from opsin.reporting.journal import Row, Sink
from opsin.storage.teller import Teller


class Plots(Sink):
    """`plots/`: pictures of the curves, drawn by `reporting/plots.py` in a process of its own, and whole at the end.

    A process, because a thread that draws keeps the interpreter from training. It is asked for new
    pictures when an evaluation has scored, or after five minutes without one; never while it draws,
    and at most every `every_s` seconds or 30 times as long as drawing takes. It reads the files, and
    ends when this process does. The first fault is a warning, and costs pictures only.
    """

    name = "plots"
    package = "matplotlib"

    def __init__(self, folder: Path, teller: Teller, *, every_s: float = 30.0, patience_s: float = 60.0) -> None:
        """`close` waits at most `patience_s` seconds for the pictures."""
        super().__init__(folder.resolve(), teller)
        self._every_s = every_s
        self._patience_s = patience_s
        self._painter: subprocess.Popen[bytes] | None = None
        self._drawing = False
        self._warned = False
        # A run that ends before then is drawn once, when nothing trains any more.
        self._next_s = time.monotonic() + every_s

    def write(self, row: Row) -> None:
        """Ask for new pictures when they are due."""
        self._hear(wait_s=0.0)
        # A row without values of training holds the scores of an evaluation.
        scored = not any(name.startswith("train/") for name in row.values)
        due_s = self._next_s if scored else self._next_s + 300
        if not self._drawing and time.monotonic() >= due_s:
            self._ask()

    def close(self) -> None:
        """Wait for pictures of the whole run."""
        if (self.folder / "metrics.jsonl").exists():
            end_s = time.monotonic() + self._patience_s
            self._hear(wait_s=self._patience_s)  # the drawing in progress lacks the last rows
            if not self._drawing:
                self._ask()
                self._hear(wait_s=max(0.0, end_s - time.monotonic()))
            if self._drawing:
                self._fail(f"not ready after {self._patience_s:g} s")
        self._dismiss()

    def abandon(self) -> None:
        """End the process, in the middle of a picture where it draws one."""
        self._dismiss()

    def _ask(self) -> None:
        try:
            if self._painter is None:
                self._painter = _start_painter(self.folder)
            assert self._painter.stdin is not None
            self._painter.stdin.write(b"\n")
            self._drawing = True
        except OSError as error:
            self._dismiss()
            self._fail(str(error))

    def _hear(self, *, wait_s: float) -> None:
        if self._painter is None or not self._drawing:
            return
        assert self._painter.stdout is not None
        answered = select.poll()  # unlike select.select, at home with any number of open files
        answered.register(self._painter.stdout, select.POLLIN)
        if not answered.poll(1000 * wait_s):
            return
        seconds, _, fault = self._painter.stdout.readline().decode().strip().partition(" ")
        self._drawing = False
        if not seconds:
            self._dismiss()
            fault = "the process that draws has ended"
        if fault:
            self._fail(fault)
        self._next_s = time.monotonic() + max(self._every_s, 30 * float(seconds or 0))

    def _fail(self, fault: str) -> None:
        self._next_s = time.monotonic() + self._every_s
        if not self._warned:
            self._warned = True
            self.teller.warning(f"plots: {fault}; training goes on without new ones")

    def _dismiss(self) -> None:
        if self._painter is not None:
            self._painter.kill()
            self._painter.communicate()
            self._painter = None
        self._drawing = False


def _start_painter(run: Path) -> "subprocess.Popen[bytes]":
    # The path of this interpreter, for it may have been changed; one core; no signal of the terminal.
    path = os.pathsep.join(folder for folder in sys.path if folder)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "opsin.reporting.plots", str(run)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **threads, "PYTHONPATH": path, "MPLBACKEND": "agg"},
        start_new_session=True,
    )
