"""Waiting for images, during which a request to stop is seen.

A read that never returns, from a pipe or a network disk that is gone, may not keep a run from ending.
"""

import threading
import time
from collections.abc import Generator, Iterable
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar, cast

from opsin.errors import StoppedWaiting
from opsin.processes.starting import unlimited

POLL_S = 0.5
"""Seconds between two looks at the request."""
_GRACE_S = 2.0
"""Seconds from the request on in which images that are on their way may still arrive."""

TaskT = TypeVar("TaskT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)


class StopRequest(Protocol):
    """A request to end a run, which a signal or a time limit makes."""

    @property
    def requested(self) -> str | None:
        """The reason to end; None while there is none."""
        ...


class Patience:
    """The patience of one wait: it ends two seconds after its first look at a request to stop."""

    def __init__(self, stop: StopRequest | None) -> None:
        self._stop = stop
        self._until: float | None = None

    def check(self) -> None:
        """Return if the wait may go on.

        Raises:
            StoppedWaiting: it may not.
        """
        reason = None if self._stop is None else self._stop.requested
        if reason is None:
            return
        if self._until is None:
            self._until = time.monotonic() + _GRACE_S
        elif time.monotonic() >= self._until:
            raise StoppedWaiting(reason)


class Reads(Protocol[TaskT, ResultT]):
    """Reads what a task asks for, in any thread."""

    def read(self, task: TaskT) -> ResultT:
        """Return the result of `task`."""
        ...


class _Thread(threading.Thread, Generic[TaskT, ResultT]):
    # A daemon: Python would wait at its end for a read that never returns.
    def __init__(self, reader: Reads[TaskT, ResultT]) -> None:
        super().__init__(name="reading", daemon=True)
        self.reader = reader
        self.tasks: SimpleQueue[TaskT | None] = SimpleQueue()
        self.results: SimpleQueue[tuple[ResultT | None, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        while (task := self.tasks.get()) is not None:
            try:
                self.results.put((self.reader.read(task), None))
            except BaseException as error:  # raised again in the thread that waits
                self.results.put((None, error))


def read_in_threads(
    reader: Reads[TaskT, ResultT], tasks: Iterable[TaskT], *, threads: int = 1, stop: StopRequest | None = None
) -> Generator[ResultT, None, None]:
    """Yield the results of `tasks` in their order. Of N threads N - 1 read ahead.

    Raises:
        StoppedWaiting: a stop was requested while waiting; the threads are left alone.
    """
    pool: list[_Thread[TaskT, ResultT]] = []
    number = -1
    try:
        for number, task in enumerate(tasks):
            if number < threads:
                pool.append(_Thread(reader))
                with unlimited():
                    pool[-1].start()
            else:
                yield _result(pool[number % threads], stop)
            pool[number % threads].tasks.put(task)
        for late in range(max(0, number + 1 - threads), number + 1):
            yield _result(pool[late % threads], stop)
    finally:
        for thread in pool:
            thread.tasks.put(None)


def _result(thread: _Thread[TaskT, ResultT], stop: StopRequest | None) -> ResultT:
    patience = Patience(stop)
    while True:
        try:
            result, error = thread.results.get(timeout=POLL_S)
        except Empty:
            patience.check()
            continue
        if error is not None:
            raise error
        return cast("ResultT", result)
