"""A monitor of the time that training waits for images."""

import math
from collections import deque
from statistics import median
from typing import ClassVar, Literal

from pydantic import Field

from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor, MonitorConfig


class StarvationConfig(MonitorConfig):
    """Reports that a large share of a step is spent waiting for data; measures nothing."""

    judges_the_machine: ClassVar[bool] = True

    name: Literal["starvation"] = "starvation"
    share: float = Field(0.5, gt=0, lt=1)
    """Share of a step that waiting must exceed, as a median over `rows`."""
    rows: int = Field(10, ge=1)
    """Number of the last rows of this session that are judged together."""
    seconds: float = Field(20.0, ge=0)
    """Seconds of waiting in these rows below which nothing is reported, since a run of a minute may wait."""

    def build(self, timeline: Timeline) -> "Starvation":
        return Starvation(self)


class Starvation(Monitor):
    """Judges `time/data_ms` against the time from row to row; evaluations and checkpoints are in neither."""

    remembers = False

    def __init__(self, config: StarvationConfig) -> None:
        self._config = config
        self._before: Row | None = None
        self._shares: deque[float] = deque(maxlen=config.rows)
        self._waited_s: deque[float] = deque(maxlen=config.rows)
        self._since: int | None = None

    def judge(self, row: Row) -> Finding | None:
        before, self._before = self._before, row
        data_ms = row.values.get("time/data_ms", math.nan)
        if before is None or math.isnan(data_ms) or row.time_s <= before.time_s:
            return None
        waited_s = data_ms * (row.step - before.step) / 1000
        share = min(waited_s / (row.time_s - before.time_s), 1.0)
        self._shares.append(share)
        self._waited_s.append(waited_s)
        if share <= self._config.share:
            self._since = None
        elif self._since is None:
            self._since = row.step
        usual = median(self._shares)
        if len(self._shares) < self._config.rows or usual <= self._config.share:
            return None
        if sum(self._waited_s) < self._config.seconds:
            return None
        since = row.step if self._since is None else self._since
        return Finding(
            "starved",
            f"starved: waiting for data takes {usual:.0%} of a step ({data_ms:,.0f} ms) since step {since}; "
            "opsin tune loader finds better data.workers and data.prefetch; faster disks or smaller files help too",
            since,
        )
