"""Many strings in little memory."""

import os
from collections.abc import Iterable

import numpy as np


class Strings:
    """A fixed list of file names, stored as two arrays.

    A list of a million `str` costs each worker process ten times the memory, and its start a long unpickling.
    """

    def __init__(self, values: Iterable[str]) -> None:
        encoded = [os.fsencode(value) for value in values]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())
