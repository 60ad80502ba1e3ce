"""A monitor of speed."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal

from pydantic import Field

from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor, MonitorConfig


class ThroughputConfig(MonitorConfig):
    """Reports that images per second fall behind those of earlier in this session; measures nothing."""

    judges_the_machine: ClassVar[bool] = True

    name: Literal["throughput"] = "throughput"
    share: float = Field(0.8, gt=0, lt=1)
    """Share of the baseline below which a row is slow."""
    skip: int = Field(3, ge=0)
    """Rows that are ignored when a session or a stage begins."""
    rows: int = Field(20, gt=0)
    """Number of rows after these whose median is the baseline."""
    patience: int = Field(5, gt=0)
    """Consecutive rows that must be slow."""

    def build(self, timeline: Timeline) -> "Throughput":
        return Throughput(self, timeline)


@dataclass(frozen=True, slots=True)
class _Pace:
    """Speed in a row, and the milliseconds of a step in it."""

    step: int
    images_per_s: float
    data_ms: float
    """Waiting for data."""
    other_ms: float


class Throughput(Monitor):
    """Judges `train/images_per_s`. The baseline is that of a session and a stage: others may have another speed."""

    remembers = False

    def __init__(self, config: ThroughputConfig, timeline: Timeline) -> None:
        self._config = config
        self._timeline = timeline
        self._before: Row | None = None
        self._stage = -1
        self._first: list[_Pace] = []
        self._recent: deque[_Pace] = deque(maxlen=config.patience)
        self._since: int | None = None

    def judge(self, row: Row) -> Finding | None:
        before, self._before = self._before, row
        stage = self._timeline.position(row.step - 1).stage
        if stage != self._stage:
            self._stage, self._first, self._since = stage, [], None
            self._recent.clear()
        pace = _pace(row, before)
        if pace is None:
            return None
        if len(self._first) < self._config.skip + self._config.rows:
            self._first.append(pace)
            return None
        self._recent.append(pace)
        usual = _middle(self._first[self._config.skip :])
        limit = self._config.share * usual.images_per_s
        if pace.images_per_s >= limit:
            self._since = None
            return None
        self._since = row.step if self._since is None else self._since
        if len(self._recent) < self._config.patience or any(seen.images_per_s >= limit for seen in self._recent):
            return None
        return Finding("slow", _in_words(_middle(self._recent), usual, self._since), self._since)


def _pace(row: Row, before: Row | None) -> _Pace | None:
    """The pace of a row; None if the row lacks the values."""
    images_per_s = row.values.get("train/images_per_s", math.nan)
    data_ms = row.values.get("time/data_ms", math.nan)
    if before is None or row.step <= before.step or math.isnan(images_per_s) or math.isnan(data_ms):
        return None
    step_ms = 1000 * (row.time_s - before.time_s) / (row.step - before.step)
    return _Pace(row.step, images_per_s, data_ms, max(step_ms - data_ms, 0.0))


def _middle(paces: "list[_Pace] | deque[_Pace]") -> _Pace:
    """The median of each."""
    return _Pace(
        paces[-1].step,
        median(pace.images_per_s for pace in paces),
        median(pace.data_ms for pace in paces),
        median(pace.other_ms for pace in paces),
    )


def _in_words(now: _Pace, usual: _Pace, since: int) -> str:
    shares = [f"{pace.data_ms / max(pace.data_ms + pace.other_ms, 1e-9):.0%}" for pace in (now, usual)]
    waits = now.data_ms - usual.data_ms > now.other_ms - usual.other_ms
    cause = (
        "the data got slower: look at the disk and at data.workers"
        if waits
        else "the computation got slower: look for other programs on this machine, or for heat"
    )
    return (
        f"slow: {now.images_per_s:,.0f} images/s since step {since}, {usual.images_per_s:,.0f} before; "
        f"waiting for data takes {shares[0]} of a step, {shares[1]} before; {cause}"
    )
