"""The curves of a run in bounded memory, read from a `metrics.jsonl` that may still grow.

However long the run, a curve has at most `MAX_POINTS` points: rows that share one are shown by their
mean, their lowest and their highest value.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from opsin.reporting.journal import Row, parse_row

# P points of a curve
Table: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float64]]
"""[P, 5]: the columns EPOCH, MINUTES, MEAN, LOW and HIGH."""

MAX_POINTS = 2000
EPOCH, MINUTES, MEAN, LOW, HIGH = range(5)

_Point: TypeAlias = tuple[float, float, float, float, float]


class Curve:
    """One value over time in bounded memory: beyond `MAX_POINTS`, neighbours are joined in pairs."""

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._open: list[_Point] = []
        self._width = 1

    def add(self, epoch: float, minutes: float, value: float) -> None:
        """Add a value; NaN makes a gap unless a neighbour in its point is finite."""
        self._open.append((epoch, minutes, value, value, value))
        if len(self._open) < self._width:
            return
        self._points.append(_joined(self._open))
        self._open.clear()
        if len(self._points) == MAX_POINTS:
            self._points = [_joined(pair) for pair in zip(self._points[::2], self._points[1::2], strict=True)]
            self._width *= 2

    def table(self, last: tuple[float, float, float] | None = None) -> Table:
        """The points so far, and `last` (epoch, minutes, value) as one more."""
        rest = [*self._open] if last is None else [*self._open, (*last, last[-1], last[-1])]
        points = [*self._points, *([_joined(rest)] if rest else [])]
        return np.array(points, dtype=np.float64).reshape(-1, 5)


class History:
    """The curves of a `metrics.jsonl` that may still grow, or be cut by a resume.

    Each reading continues at the end of the one before.
    """

    def __init__(self, path: Path, *, wanted: re.Pattern[str]) -> None:
        """Values are kept if `wanted` matches their whole name."""
        self._path = path
        self._wanted = wanted
        self._inode = -1
        self._offset = 0
        self._curves: dict[str, Curve] = {}
        self._last: Row | None = None

    def refresh(self) -> None:
        """Read the rows that were added; if the file was replaced, read all of it."""
        if not self._path.exists():
            self._forget(inode=-1)
            return
        with self._path.open("rb") as file:
            facts = os.fstat(file.fileno())
            # The journal cuts a file by replacing it.
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._forget(inode=facts.st_ino)
            file.seek(self._offset)
            # The journal may still add values to the last line: it is read again next time.
            last = b""
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._settle(last)
                last = line
            self._last = parse_row(last)

    def names(self, ending: str) -> list[str]:
        """The values with this ending: `train/...` first, then `val/...`, then by name."""
        found = [name for name in {**self._curves, **_values(self._last)} if name.endswith(ending)]
        return sorted(found, key=lambda name: (not name.startswith("train/"), not name.startswith("val"), name))

    def table(self, name: str) -> Table | None:
        """The points of a value; None if it has no finite one."""
        row, value = self._last, _values(self._last).get(name)
        last = None if row is None or value is None else (row.epoch, row.time_s / 60, value)
        if name not in self._curves and last is None:
            return None
        table = self._curves.get(name, Curve()).table(last)
        return table if np.isfinite(table[:, MEAN]).any() else None

    def position(self, step: int) -> tuple[float, float]:
        """Epoch and minutes after `step` updates, between those of the rows around it."""
        table = self.table("step")
        table = np.zeros((1, 5)) if table is None else np.concatenate([np.zeros((1, 5)), table])
        epoch, minutes = (float(np.interp(step, table[:, MEAN], table[:, column])) for column in (EPOCH, MINUTES))
        return epoch, minutes

    def _forget(self, *, inode: int) -> None:
        self._inode = inode
        self._offset = 0
        self._curves = {}
        self._last = None

    def _settle(self, line: bytes) -> None:
        self._offset += len(line)
        row = parse_row(line)
        for name, value in _values(row).items():
            if row is not None and (name == "step" or self._wanted.fullmatch(name)):
                self._curves.setdefault(name, Curve()).add(row.epoch, row.time_s / 60, value)


def _joined(points: Sequence[_Point]) -> _Point:
    if len(points) == 1:
        return points[0]
    epochs, minutes = (sum(point[column] for point in points) / len(points) for column in (EPOCH, MINUTES))
    finite = [point for point in points if math.isfinite(point[MEAN])]
    if not finite:
        return epochs, minutes, math.nan, math.nan, math.nan
    mean = sum(point[MEAN] for point in finite) / len(finite)
    return epochs, minutes, mean, min(point[LOW] for point in finite), max(point[HIGH] for point in finite)


def _values(row: Row | None) -> dict[str, float]:
    """The values of a row, its step among them."""
    return {} if row is None else {"step": row.step, **row.values}
