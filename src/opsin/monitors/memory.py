"""Whether memory creeps up: what is never let go ends a run after days."""

import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

import torch
from pydantic import Field

from opsin.clock.cadence import StepEvery
from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor, MonitorConfig
from opsin.training.state import StepReport, TrainState

_GIB = 2**30
_RISING = 0.8
"""Share of the steps from one measurement to the next that lead up, where something creeps."""


class MemoryCreepConfig(MonitorConfig):
    """Memory of the process and of the GPU, and a verdict where one of them keeps growing."""

    judges_the_machine: ClassVar[bool] = True

    name: Literal["memory"] = "memory"
    every: StepEvery = "1 epoch"
    """How often it is measured."""
    skip: int = Field(5, ge=0)
    """Measurements at the start of a session that are not looked at: what is kept is still being filled."""
    measurements: int = Field(20, ge=4)
    """How many together show a trend."""
    growth: float = Field(0.1, gt=0)
    """Growth over these that counts, as a share of what was held before them ..."""
    growth_gib: float = Field(0.25, ge=0)
    """... and in GiB, both to be exceeded."""

    def build(self, timeline: Timeline) -> "Memory":
        return Memory(self)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where memory is held."""

    name: str
    kind: str
    owner: str
    advice: str


_PLACES = (
    _Place("system/memory_gib", "memory_creep", "this process", "fewer data.workers, or an object that is kept"),
    _Place("gpu/memory_gib", "gpu_memory_creep", "the GPU", "tensors that are kept with their graph, or evaluators"),
)


class Memory(Monitor):
    """Measures `system/memory_gib` and, on a GPU, `gpu/memory_gib`; judges the trend of either."""

    remembers = False

    def __init__(self, config: MemoryCreepConfig) -> None:
        self._config = config
        room = config.measurements
        self._held: dict[str, deque[tuple[int, float]]] = {place.name: deque(maxlen=room) for place in _PLACES}
        self._skipped = dict.fromkeys(self._held, 0)

    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        held = _resident_bytes()
        values = {} if held is None else {"system/memory_gib": held / _GIB}
        if (device := report.ids.device).type != "cpu":
            values["gpu/memory_gib"] = torch.accelerator.memory_allocated(device) / _GIB
        return values

    def judge(self, row: Row) -> Finding | None:
        found = [self._judge(place, row) for place in _PLACES]
        return next((finding for finding in found if finding is not None), None)

    def _judge(self, place: _Place, row: Row) -> Finding | None:
        gib = row.values.get(place.name, math.nan)
        if math.isnan(gib):
            return None
        if self._skipped[place.name] < self._config.skip:
            self._skipped[place.name] += 1
            return None
        held = self._held[place.name]
        held.append((row.step, gib))
        if len(held) < self._config.measurements:
            return None
        (since, first), sizes = held[0], [size for _, size in held]
        slope = _slope([*held])
        rising = sum(after > before for before, after in pairwise(sizes)) / (len(sizes) - 1)
        grown = slope * (row.step - since)
        if rising < _RISING or grown < max(self._config.growth * first, self._config.growth_gib):
            return None
        return Finding(
            place.kind,
            f"memory creep: {place.owner} held {first:.2f} GiB at step {since} and holds {gib:.2f} GiB now, "
            f"{1000 * slope:.2g} GiB more in 1,000 steps; something is never let go: {place.advice}; "
            "a resume begins anew",
            since,
        )


def _slope(points: list[tuple[int, float]]) -> float:
    """The middle of the slopes between all pairs of points, GiB a step: one leap does not make a trend."""
    return median(
        (gib - earlier_gib) / (step - earlier)
        for index, (step, gib) in enumerate(points)
        for earlier, earlier_gib in points[:index]
    )


def _resident_bytes() -> int | None:
    """None where the system does not tell it as Linux does."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
