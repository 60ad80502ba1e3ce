"""Threads of the CPU that compute: how many, and how they wait for each other.

Their number follows from the machine alone, never from its load: by it sums are rounded. How they wait changes no bit,
and follows the load: they spin while nobody else needs the cores, and sleep while others do.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from opsin.processes.cores import num_allowed, num_cores
from opsin.processes.load import Usage, family_s, look
from opsin.processes.openmp import SETTINGS, WaitingThreads, find_waiting_threads
from opsin.storage.teller import Teller

_NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_FIRST_LOOK_S = 0.15
_LOOK_EVERY_S = 1.0
_DISTURBED, _CALM = 0.15, 0.08
"""Cores that others take beside the threads here, from which on waiting threads sleep, and below which they spin."""
_CALM_LOOKS = 3
_REPORT_AFTER_S = 10.0
_REPORTED = 0.2
"""Cores of other programs from which on they are reported."""


def choose_threads(asked: int | Literal["auto"]) -> int:
    """The number of threads that compute.

    `auto` is a number of the environment if there is one, else torch's own choice within the cores of this process.
    """
    if asked != "auto":
        return asked
    usual = torch.get_num_threads()
    return usual if any(os.environ.get(name) for name in _NUMBERS) else min(usual, num_cores())


def describe_change(before: object, threads: object) -> str | None:
    """One line for a run that goes on with another number of threads than `before`; None if that is unknown."""
    if before in (None, threads):
        return None
    return (
        f"threads: {threads} instead of {before} in the session before: sums are rounded differently from here on; "
        f"threads={before} keeps the bits"
    )


@contextmanager
def computing(asked: int | Literal["auto"], device: torch.device, teller: Teller) -> Iterator[None]:
    """Compute inside with the chosen number of threads, and let them wait as the load of the machine requires."""
    before, threads = torch.get_num_threads(), choose_threads(asked)
    if threads != before:
        torch.set_num_threads(threads)
    waiting = find_waiting_threads(threads) if threads > 1 and not _setting() else None
    watch = Watch(threads, teller, waiting) if device.type == "cpu" else None
    try:
        if watch is not None:
            watch.begin()
        yield
    finally:
        if watch is not None:
            watch.end()
        if threads != before:
            torch.set_num_threads(before)


def _setting() -> str | None:
    """The variable in which the user says how threads wait."""
    return next((name for name in SETTINGS if name in os.environ), None)


class Watch:
    """Looks every second at the load of the machine, in a thread of its own."""

    def __init__(self, threads: int, teller: Teller, waiting: WaitingThreads | None) -> None:
        """`waiting` are the threads whose manner to wait may be changed."""
        self._threads = threads
        self._cores = num_allowed()
        self._teller = teller
        self._waiting = waiting
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: Usage | None = None
        self._mark: tuple[Usage, float] | None = None
        self._calm = 0
        self._is_reported = False

    def begin(self) -> None:
        """Look for a moment, decide how threads wait, and report it; then watch."""
        self._before = look()
        if self._threads > 1:
            others = self._first_look()
            self._teller.notice(f"threads: {self._threads} of {self._cores} cores; {self._manner(others)}")
        if self._before is not None:
            self._thread = threading.Thread(target=self._watch, name="load", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """End watching; waiting threads spin again."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._waiting is not None:
            self._waiting.spin()

    def see(self, now: Usage, before: Usage) -> None:
        """Choose how threads wait by the load between two moments, and report other programs once."""
        beside = now.cores_of_others(before) - (self._cores - self._threads)
        is_disturbed = beside > _DISTURBED
        self._calm = self._calm + 1 if beside < _CALM else 0
        if self._waiting is not None:
            # Where a quota leaves fewer cores than there are, what spins uses it up.
            if is_disturbed or num_cores() < self._cores:
                self._waiting.sleep()
            elif self._calm >= _CALM_LOOKS:
                self._waiting.spin()
        if is_disturbed and not self._is_reported:
            self._report(now)
        elif not is_disturbed:
            self._mark = None

    def _first_look(self) -> float:
        if self._before is None or self._waiting is None:
            return 0.0
        time.sleep(_FIRST_LOOK_S)
        now = look()
        assert now is not None
        self.see(now, self._before)
        others, self._before = now.cores_of_others(self._before), now
        return others

    def _manner(self, others: float) -> str:
        if name := _setting():
            return f"they wait as {name} says"
        if self._waiting is None:
            return "they wait as the OpenMP of this torch does"
        if not self._waiting.sleeps:
            return "they spin while they wait, and sleep when other programs come"
        reason = f"other programs take {others:.1f} cores" if num_cores() == self._cores else f"quota {num_cores()}"
        return f"they sleep while they wait ({reason})"

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_EVERY_S):
            now, before = look(), self._before
            if now is not None and before is not None:
                self.see(now, before)
            self._before = now

    def _report(self, now: Usage) -> None:
        """Report other programs that stay for some seconds; workers of this run are not among them."""
        family = family_s()
        if self._mark is None:
            self._mark = now, family
            return
        since, family_then = self._mark
        passed = now.at_s - since.at_s
        if passed < _REPORT_AFTER_S:
            return
        self._mark = now, family
        others = now.cores_of_others(since) - (family - family_then) / passed
        if others < _REPORTED:
            return
        self._is_reported = True
        waited = now.cores_waited_for(since) / self._threads
        fewer = (
            "; threads=1 may be faster for a small or convolutional network, with other roundings"
            if self._threads > 1
            else ""
        )
        self._teller.tell(
            "busy",
            notice=f"other programs take {others / self._cores:.0%} of this machine's {self._cores} cores: training "
            f"is slower beside them (its threads waited {min(waited, 1.0):.0%} of the time for a core){fewer}",
            cores=self._cores,
            others=round(others, 2),
            waited=round(waited, 2),
        )
