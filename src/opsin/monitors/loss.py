"""Whether the loss stays within the band that it has moved in."""

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
"""Rows whose largest loss the band begins above: a loss that rises slowly, as where features spread, takes it along."""
_FEWEST = 10
"""Rows of a stage before which there is no band; the first losses of a run are the largest."""
_OF_START = 0.005
"""A deviation counts as at least this share of the first losses: near zero everything leaps."""
_TO_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation, where values are spread normally."""


class LossConfig(MonitorConfig):
    """Tells when the loss leaps out of its band and stays there; measures nothing."""

    name: Literal["loss"] = "loss"
    factor: float = Field(10.0, gt=0)
    """Height of the band above the largest of the last 3 rows, in robust deviations of the last 50."""
    floor: float = Field(0.05, ge=0)
    """A deviation counts as at least this share of that loss: 0.05 times a factor of 10 allows half as much again."""
    patience: int = Field(2, ge=1)
    """Rows in a row that must lie above the band."""

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
        self._good = 0
        """The step of the last row within the band."""

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
            self._high, self._good = [], row.step
            return None
        self._high.append((row.step, loss))
        if len(self._high) > _HISTORY // 2:  # what has stayed so long is usual
            self._usual.extend(value for _, value in self._high)
        if len(self._high) < self._config.patience:
            return None
        return Finding(
            "loss_spike",
            f"loss spike: {loss:.4g} where {usual:.4g} is usual and up to {limit:.4g} normal, since step "
            f"{self._high[0][0]}; look at the images of these steps; lower optim.lr, or set optim.clip_norm",
            self._high[0][0],
            self._good,
        )

    def _band(self) -> tuple[float, float]:
        """The largest normal loss, and the usual one."""
        if len(self._usual) < _FEWEST:
            return math.inf, math.nan
        if len(self._usual) == _FEWEST:
            self._start = median(self._usual)
        near = max([*self._usual][-_NEAR:])
        # Of the changes from row to row: where the loss falls, its distance from the middle says nothing of the noise.
        deviation = _TO_DEVIATION * median(abs(after - before) for before, after in pairwise(self._usual))
        deviation = max(deviation, self._config.floor * abs(near), _OF_START * abs(self._start))
        return near + self._config.factor * deviation, near
