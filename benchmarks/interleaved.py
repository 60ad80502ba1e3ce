"""Timing in turns: each round runs every contestant once, so that all see the same machine.

Other work on a machine changes times by far more than it changes the ratio of two neighbours, so a
ratio is taken within each round and the median over the rounds is reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """What one contestant took, round by round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.seconds)

    def speed_over(self, other: "Timing") -> float:
        """How many times faster than `other`: the median of the ratios of the rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    finish: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Time every contestant `rounds` times; `finish` waits until a device has done its work.

    The order is turned around in every second round, so that nobody always runs in a warm cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warmup, rounds):
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in order:
            finish()
            start = time.perf_counter()
            contestants[name]()
            finish()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return [Timing(name, tuple(taken)) for name, taken in seconds.items()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = [
        "  ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])
