"""Calls that are repeated until they succeed, so that a log outlasts a full disk."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from opsin.storage.files import write_whole
from opsin.storage.teller import Teller

_MOST_WAITING = 10_000
_QUICK_S = 0.05


def write_if_possible(teller: Teller) -> Callable[[Path, bytes], None]:
    """`write_whole` for files that a run does not need: for each, the first fault is a warning."""
    warned: set[Path] = set()

    def write(path: Path, data: bytes) -> None:
        try:
            write_whole(path, data)
            warned.discard(path)
        except OSError as error:
            if path not in warned:
                warned.add(path)
                teller.warning(f"{path} cannot be written: {_reason(error)}; training goes on without it")

    return write


class _Call(NamedTuple):
    """A call that waits, and the step that it writes."""

    make: partial[None]
    step: int | None


class Outlet:
    """Calls made in order. One that fails waits, with all that follow, until the next is due.

    At most `_MOST_WAITING` calls wait. Beyond that the oldest is lost; or all are, and `make_good` replaces them.
    """

    def __init__(self, name: str, teller: Teller, *, make_good: partial[None] | None = None) -> None:
        self.name = name
        self.state: Literal["well", "failing", "recovered"] = "well"
        self.lost = 0
        self._teller = teller
        self._make_good = make_good
        self._warned = False
        self._waiting: deque[_Call] = deque()
        self._fault: Exception | None = None
        self._took_s: deque[float] = deque(maxlen=3)
        self._next_s = 0.0

    def put(self, call: partial[None], *, step: int | None = None) -> None:
        """Make the call after those that wait; `step` is that of the row or event it writes."""
        if len(self._waiting) >= _MOST_WAITING:
            self._shorten()
        self._waiting.append(_Call(call, step))
        if time.monotonic() >= self._next_s:
            self._make_calls()

    def drop(self) -> None:
        """Forget the waiting calls."""
        self._waiting.clear()

    def rewind(self, step: int) -> None:
        """Try the waiting calls once more, and forget those of steps after `step`."""
        self._make_calls()
        self._waiting = deque(call for call in self._waiting if call.step is None or call.step <= step)

    def give_up(self) -> None:
        """Try the waiting calls one last time; those that fail are lost, with a warning."""
        self._make_calls()
        if self._waiting:
            lost = self.lost + len(self._waiting)
            self._teller.warning(
                f"{self.name}: {lost} entries could not be written and are lost: {_reason(self._fault)}"
            )
            self.drop()

    def _shorten(self) -> None:
        if self._make_good is None:
            self._waiting.popleft()
            self.lost += 1
        else:
            self._waiting.clear()
            self._waiting.append(_Call(self._make_good, None))

    def _make_calls(self) -> None:
        while self._waiting:
            began = time.monotonic()
            try:
                self._waiting[0].make()
            except Exception as error:  # a sink is anybody's code, and no log is worth a run
                self._fail(error)
                self._pause(time.monotonic() - began)
                return
            self._waiting.popleft()
        self._took_s.clear()
        if self.state == "failing":
            self.state = "recovered"

    def _pause(self, took_s: float) -> None:
        """Ask rarely, after calls that all took long to fail, so that training hardly notices."""
        self._took_s.append(took_s)
        is_slow = len(self._took_s) == 3 and min(self._took_s) > _QUICK_S
        self._next_s = time.monotonic() + 20 * min(self._took_s) if is_slow else 0.0

    def _fail(self, error: Exception) -> None:
        self.state = "failing"
        self._fault = error
        if not self._warned:
            self._warned = True
            self._teller.warning(
                f"{self.name} cannot be written: {_reason(error)}; training goes on, its entries wait in memory"
            )


def _reason(error: Exception | None) -> str:
    """The reason without the number of a system error."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
