"""A call that runs beside training."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One call in a thread of its own. The process does not end before it has, unless it is killed."""

    def __init__(self, call: Callable[[], T], *, name: str) -> None:
        self._future: Future[T] = Future()
        self._call = call
        self._thread = Thread(target=self._run, name=name, daemon=False)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` comes at once."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end of the call, whatever it is."""
        self._thread.join()

    def result(self) -> T:
        """What the call gave, or the exception that it raised; waits for either."""
        return self._future.result()

    def _run(self) -> None:
        try:
            self._future.set_result(self._call())
        except BaseException as error:  # the one who asks for the result gets it
            self._future.set_exception(error)
