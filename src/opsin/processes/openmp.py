"""Threads of OpenMP that wait for work. They spin, which is quickest alone, or sleep, which leaves the cores to others.

The library reads its settings once, when torch loads it. But libgomp lets waiting threads sleep at once as long as it
has more threads than the process has cores (its documentation of GOMP_SPINCOUNT). A few threads without work bring
that about at any time, and their end takes it back. No result depends on it.
"""

import ctypes
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from opsin.processes.cores import num_allowed
from opsin.processes.starting import unlimited

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables of libgomp in which a user says how threads wait."""

_MOST_THREADS = 16
"""Threads without work that may be started; each reserves a stack."""


class WaitingThreads:
    """The threads of torch's libgomp that wait. At first they spin."""

    def __init__(self, library: Path, threads: int) -> None:
        """`threads` is the number with which torch computes.

        Raises:
            OSError: the library cannot be used.
            AttributeError: it lacks a function.
        """
        # Of the library that is loaded already.
        self._parallel = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        # To free nothing is work that does nothing.
        self._nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self._surplus = _surplus(threads)
        self._end = threading.Event()
        self._holder: threading.Thread | None = None

    @property
    def sleeps(self) -> bool:
        """True while waiting threads sleep."""
        return self._holder is not None

    def sleep(self) -> None:
        """Let waiting threads sleep from now on."""
        if self._holder is None:
            self._end.clear()
            holder = threading.Thread(target=self._hold, name="more-than-cores", daemon=True)
            try:
                with unlimited():
                    holder.start()
            except RuntimeError:  # no further thread is allowed: they go on spinning
                return
            self._holder = holder

    def spin(self) -> None:
        """Let waiting threads spin again."""
        if self._holder is not None:
            self._end.set()
            self._holder.join()
            self._holder = None

    def _hold(self) -> None:
        # The threads of a team belong to the thread that made it, and end with it.
        self._parallel(self._nothing, None, self._surplus, 0)
        self._end.wait()


def find_waiting_threads(threads: int, root: Path = Path("/")) -> WaitingThreads | None:
    """Return the waiting threads of torch, which is loaded; None where it computes with another library.

    Also None where many cores have no thread: what others run finds room there.
    """
    try:
        if _surplus(threads) > _MOST_THREADS:
            return None
        library = _libgomp((root / "proc/self/maps").read_text().splitlines())
        return None if library is None else WaitingThreads(library, threads)
    except (OSError, AttributeError):
        return None


def _surplus(threads: int) -> int:
    return max(2, num_allowed() - threads + 2)


def _libgomp(maps: Iterable[str]) -> Path | None:
    """The libgomp that torch uses, of several that a process may have loaded."""
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps if "libgomp" in line}
    of_torch = {path for path in paths if "torch" in path.parts or "torch.libs" in path.parts}
    found = sorted(of_torch or paths)
    return found[0] if len(found) == 1 else None
