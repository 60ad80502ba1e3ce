"""Requests to end a run early: a signal, or the time limit of this session."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupt:
    """A handler that raises KeyboardInterrupt, and remembers it: some libraries swallow one while they are imported."""

    caught: str | None = None
    """The name of the newest signal."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        raise KeyboardInterrupt(self.caught)


class Stop:
    """A request to end after the running step. While `with` lasts, signals are requests.

    SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (sent ahead of a batch system's time limit) count, also if an `Interrupt` has
    caught them before. A second Ctrl-C raises KeyboardInterrupt at once. Python gives signals to the main thread only:
    in other threads only the time limit works.
    """

    def __init__(self, *, hours: float | None = None) -> None:
        """`hours` is wall-clock time of this session, counted from this call."""
        self._hours = hours
        self._started = time.monotonic()
        self._signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """The reason to end (`SIGTERM`, `limits.hours = 0.5 reached`), else None; it never goes away again."""
        if self._signal is not None:
            return self._signal
        if self._hours is not None and time.monotonic() - self._started >= self._hours * 3600:
            return f"limits.hours = {self._hours:g} reached"
        return None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            earlier = [before.caught for before in self._before.values() if isinstance(before, Interrupt)]
            self._signal = self._signal or next(filter(None, earlier), None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None is a handler that was not set by Python; the default is the nearest that can be set.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self._signal == "SIGINT":
            raise KeyboardInterrupt
        if self._signal is None or name == "SIGINT":
            self._signal = name
