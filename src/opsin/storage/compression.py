"""Zstandard streams: Python's own from 3.14 on, before that the same code as a package (docs/decisions/0013)."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SUFFIX = ".zst"
"""The end of the name of a compressed file."""

_PIECE = 2**20


class Compressor:
    """One stream, made piece by piece: a large block holds up neither the stream nor the interpreter."""

    def __init__(self, level: int) -> None:
        self._zstd = zstd.ZstdCompressor(level=level)

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """Yield the part of the stream that is complete after `data`, bytes in one dimension."""
        for start in range(0, len(data), _PIECE):
            if made := self._zstd.compress(data[start : start + _PIECE]):
                yield made

    def finish(self) -> bytes:
        """The end of the stream."""
        return self._zstd.flush()


def decompressed(path: Path) -> io.BytesIO:
    """The content of a compressed file, in memory.

    Raises:
        OSError: it cannot be read.
        ValueError: the stream is not complete.
    """
    try:
        with zstd.open(path, "rb") as stream:
            return io.BytesIO(stream.read())
    except (zstd.ZstdError, EOFError) as error:
        raise ValueError(f"is not a complete zstd stream: {error}") from error
