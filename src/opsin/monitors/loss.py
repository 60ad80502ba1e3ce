"""A monitor of the loss: it reports a leap out of the usual band."""

import math
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Literal

from pydantic import Field

from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor, MonitorConfig

_HISTORY = 50
_NEAR = 3
"""Rows whose largest loss is the lower end of the band, so that a slow rise, as features spread, moves the band."""
_FEWEST = 10
"""Rows of a stage before it has a band; the first losses of a run are the largest."""
_OF_START = 0.005
"""A deviation counts as at least this share of the first losses: near zero every change is large."""
_TO_DEVIATION = 1.4826
"""Standard deviation of normally distributed values, over their median absolute deviation."""


class LossConfig(MonitorConfig):
    """Reports a loss that leaps out of its usual band and stays there; measures nothing."""

    name: Literal["loss"] = "loss"
    factor: float = Field(10.0, gt=0)
    """Height of the band above the largest of the last 3 rows, in robust deviations of the last 50."""
    floor: float = Field(0.05, ge=0)
    """The least deviation, as a share of that loss: 0.05 with a factor of 10 allows a rise by half."""
    patience: int = Field(2, ge=1)
    """Consecutive rows that must lie above the band."""

    def delay(self, row_steps: int, timeline: Timeline) -> int:
        return self.patience * row_steps

    def build(self, timeline: Timeline) -> "Loss":
        return Loss(self, timeline)


class Loss(Monitor):
    """Judges `train/loss`, the mean over the updates of a row, by the rows before and the median of their changes.

    Each stage has a band of its own: another image size or mixing has another loss.
    """

    def __init__(self, config: LossConfig, timeline: Timeline) -> None:
        self._config = config
        self._timeline = timeline
        self._stage = -1
        self._start = math.nan
        """The middle of the first losses of the stage."""
        self._usual: deque[float] = deque(maxlen=_HISTORY)
        self._high: list[tuple[int, float]] = []
        """Steps and losses of the rows above the band, up to this one."""
        self._last_good_step = 0

    def judge(self, row: Row) -> Finding | None:
        stage = self._timeline.position(row.step - 1).stage
        if stage != self._stage:
            self._stage, self._high = stage, []
            self._usual.clear()
        loss = row.values.get("train/loss", math.nan)
        if math.isnan(loss):
            return None
        limit, usual = self._band()
        if loss <= limit:
            self._usual.append(loss)
            self._high, self._last_good_step = [], row.step
            return None
        self._high.append((row.step, loss))
        if len(self._high) > _HISTORY // 2:  # after this long it is usual
            self._usual.extend(value for _, value in self._high)
        if len(self._high) < self._config.patience:
            return None
        return Finding(
            "loss_spike",
            f"loss spike: {loss:.4g} where {usual:.4g} is usual and up to {limit:.4g} normal, since step "
            f"{self._high[0][0]}; look at the images of these steps; lower optim.lr, or set optim.clip_norm",
            self._high[0][0],
            self._last_good_step,
        )

    def _band(self) -> tuple[float, float]:
        """The upper and the lower end of the band."""
        if len(self._usual) < _FEWEST:
            return math.inf, math.nan
        if len(self._usual) == _FEWEST:
            self._start = median(self._usual)
        near = max([*self._usual][-_NEAR:])
        # Of the changes from row to row: where the loss falls, its distance from the middle says nothing of the noise.
        deviation = _TO_DEVIATION * median(abs(after - before) for before, after in pairwise(self._usual))
        deviation = max(deviation, self._config.floor * abs(near), _OF_START * abs(self._start))
        return near + self._config.factor * deviation, near
