"""Lines of JSON in a file that grows, whole whenever the process is killed.

JSON has no NaN and no infinity: a value that is not finite is written as null.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from opsin.storage.files import write_atomic

Check: TypeAlias = Callable[[Mapping[str, Any]], bool]
"""True if a line has every required field, `step` among them; a line in which a bit changed may lack one."""


class LineFile:
    """Lines of JSON; one of the same step as the last replaces it."""

    def __init__(self, path: Path, is_whole: Check) -> None:
        self._path = path
        self._is_whole = is_whole
        self._start, self._end, self._step = self._last_line()

    def write(self, line: bytes, *, step: int | None = None) -> None:
        """Add a line, or replace the last one if that is of this step. A failed write may be repeated."""
        # One write over the old line, never shorter than it: killed before or after, the file is whole.
        replace = step is not None and step == self._step
        data = line.ljust(self._end - self._start - 1) + b"\n" if replace else line + b"\n"
        start = self._start if replace else self._end
        with self._path.open("r+b" if self._path.exists() else "xb", buffering=0) as file:
            file.seek(start)
            if file.write(data) < len(data):
                raise OSError("no space left on the device")
            file.truncate()  # a torn line of an earlier process may reach further
        self._start, self._end, self._step = start, start + len(data), step

    def rewind(self, step: int) -> None:
        """Keep the whole lines up to `step`."""
        if self._path.exists():
            kept = [line + b"\n" for line, item in read_lines(self._path, self._is_whole) if item["step"] <= step]
            write_atomic(self._path, b"".join(kept))
        self._start, self._end, self._step = self._last_line()

    def _last_line(self) -> tuple[int, int, int | None]:
        """Begin, end and step of the last whole line."""
        content = self._path.read_bytes() if self._path.exists() else b""
        end = content.rfind(b"\n") + 1
        start = content.rfind(b"\n", 0, max(0, end - 1)) + 1
        try:
            item = json.loads(content[start:end] or b"null")
        except ValueError:
            item = None
        return start, end, item.get("step") if isinstance(item, dict) else None


def read_lines(path: Path, is_whole: Check) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines as bytes and as objects; damaged ones are skipped. A missing file has no lines."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (item := parse_line(line, is_whole)) is not None:
                yield line[:-1], item


def parse_line(line: bytes, is_whole: Check) -> dict[str, Any] | None:
    """The object of a line; None if the line is torn or damaged."""
    try:
        item = json.loads(line)
    except ValueError:
        return None
    return item if line.endswith(b"\n") and isinstance(item, dict) and is_whole(item) else None


def encode(item: Mapping[str, object]) -> bytes:
    """A line for `LineFile.write`."""
    return json.dumps(finite(item), allow_nan=False).encode()


def finite(value: object) -> object:
    """`value` with None for each number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
