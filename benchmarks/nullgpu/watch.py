"""Launches and waits on the null GPU: kernels by name, and each wait of the host with its line of opsin."""

import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

_KINDS = {
    1: "waits for all work",
    2: "to the GPU, pageable",
    3: "to the GPU, page-locked",
    4: "to the host, pageable",
    5: "to the host, page-locked",
    6: "memory of the GPU",
    7: "page-locked memory",
    8: "wrong GPU",
}
_WAITS = (1, 2, 4, 8)
"""Kinds that stop the host, or that nothing should do."""
_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)


@dataclass(slots=True)
class Seen:
    """The requests of a program."""

    launches: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    """Waits of the host: what, how, and the line."""
    host_s: float = 0.0


class NullGpu:
    """The loaded null GPU; the program runs below `run.sh`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.path.join(os.environ["NULLGPU"], "libnullgpu.so"))
        self._library.nullgpu_launches.restype = ctypes.c_size_t
        self._library.nullgpu_dump.restype = ctypes.c_size_t

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Count what happens inside."""
        seen = Seen()

        def note(kind: int, name: bytes, size: int) -> None:
            if kind in _WAITS:
                seen.waits[f"{_KINDS[kind]} ({name.decode()}), {_line()}"] += 1

        hook = _HOOK(note)
        self._library.nullgpu_reset()
        self._library.nullgpu_hook(hook)
        started = time.perf_counter()
        try:
            yield seen
        finally:
            seen.host_s = time.perf_counter() - started
            self._library.nullgpu_hook(_HOOK())
            seen.launches = self.launches()
            seen.kernels = self._kernels()

    def launches(self) -> int:
        """Kernels since the watch began."""
        return int(self._library.nullgpu_launches())

    def _kernels(self) -> Counter[str]:
        size = self._library.nullgpu_dump(None, 0)
        text = ctypes.create_string_buffer(size + 1)
        self._library.nullgpu_dump(text, size)
        pairs = (line.split("\t") for line in text.raw[:size].decode().splitlines())
        return Counter({name: int(count) for name, count in pairs})


def _line() -> str:
    """The innermost line of opsin that is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "/opsin/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "torch" if frame is None else f"{frame.f_code.co_filename.partition('/opsin/')[2]}:{frame.f_lineno}"
