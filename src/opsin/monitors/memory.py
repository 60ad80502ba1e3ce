"""A monitor of memory: a leak ends a run after days."""

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
"""Share of measurements that must exceed the one before."""


class MemoryCreepConfig(MonitorConfig):
    """Measures the memory of the process and of the GPU, and reports one that keeps growing."""

    judges_the_machine: ClassVar[bool] = True

    name: Literal["memory"] = "memory"
    every: StepEvery = "1 epoch"
    """Interval between measurements."""
    skip: int = Field(5, ge=0)
    """Measurements at the start of a session that are ignored, since caches are still filling."""
    measurements: int = Field(20, ge=4)
    """Number of measurements that a trend is taken from."""
    growth: float = Field(0.1, gt=0)
    """The least growth over these measurements, as a share of the first; `growth_gib` must be exceeded too."""
    growth_gib: float = Field(0.25, ge=0)
    """The least growth over these measurements, in GiB; `growth` must be exceeded too."""

    def build(self, timeline: Timeline) -> "Memory":
        return Memory(self)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Memory of one owner."""

    name: str
    kind: str
    owner: str
    advice: str


_POOLS = (
    _Pool("system/memory_gib", "memory_creep", "this process", "objects that are kept, or set fewer data.workers"),
    _Pool("gpu/memory_gib", "gpu_memory_creep", "the GPU", "tensors that are kept with their graph, or at evaluators"),
)


class Memory(Monitor):
    """Measures `system/memory_gib` and, on a GPU, `gpu/memory_gib`; judges the trend of either."""

    remembers = False

    def __init__(self, config: MemoryCreepConfig) -> None:
        self._config = config
        room = config.measurements
        self._held: dict[str, deque[tuple[int, float]]] = {pool.name: deque(maxlen=room) for pool in _POOLS}
        self._skipped = dict.fromkeys(self._held, 0)

    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        held = _resident_bytes()
        values = {} if held is None else {"system/memory_gib": held / _GIB}
        if (device := report.ids.device).type != "cpu":
            values["gpu/memory_gib"] = torch.accelerator.memory_allocated(device) / _GIB
        return values

    def judge(self, row: Row) -> Finding | None:
        found = [self._judge(pool, row) for pool in _POOLS]
        return next((finding for finding in found if finding is not None), None)

    def _judge(self, pool: _Pool, row: Row) -> Finding | None:
        gib = row.values.get(pool.name, math.nan)
        if math.isnan(gib):
            return None
        if self._skipped[pool.name] < self._config.skip:
            self._skipped[pool.name] += 1
            return None
        held = self._held[pool.name]
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
            pool.kind,
            f"memory creep: {pool.owner} held {first:.2f} GiB at step {since} and holds {gib:.2f} GiB now, "
            f"{1000 * slope:.2g} GiB more in 1,000 steps; memory leaks: look for {pool.advice}; "
            "a resume frees it",
            since,
        )


def _slope(points: list[tuple[int, float]]) -> float:
    """The median slope between all pairs of points, in GiB per step: one leap is not a trend."""
    return median(
        (gib - earlier_gib) / (step - earlier)
        for index, (step, gib) in enumerate(points)
        for earlier, earlier_gib in points[:index]
    )


def _resident_bytes() -> int | None:
    """Memory of this process; None if the system is not Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
