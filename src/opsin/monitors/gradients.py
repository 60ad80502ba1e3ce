"""A monitor of the gradient norm."""

import math
from collections import deque
from statistics import median
from typing import Literal

from pydantic import Field

from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor, MonitorConfig

_HISTORY = 50
_FEWEST = 5
"""Rows before the first verdict; the first norms of a run are the largest."""


class GradientsConfig(MonitorConfig):
    """Reports a gradient norm, before clipping, that is large in itself and for this run; measures nothing."""

    name: Literal["gradients"] = "gradients"
    limit: float = Field(10.0, gt=0)
    """Gradient norm up to which nothing is reported, since large networks have large ones."""
    factor: float = Field(5.0, gt=1)
    """Multiple of the median norm of the last 50 rows up to which nothing is reported."""

    def build(self, timeline: Timeline) -> "Gradients":
        return Gradients(self)


class Gradients(Monitor):
    """Judges `train/grad_norm`, the mean over the updates of a row."""

    def __init__(self, config: GradientsConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=_HISTORY)
        self._since: int | None = None
        self._last_good_step = 0

    def judge(self, row: Row) -> Finding | None:
        norm = row.values.get("train/grad_norm", math.nan)
        if math.isnan(norm):
            return None
        usual = median(self._norms) if len(self._norms) >= _FEWEST else math.inf
        self._norms.append(norm)
        if norm <= max(self._config.limit, self._config.factor * usual):
            self._since, self._last_good_step = None, row.step
            return None
        self._since = row.step if self._since is None else self._since
        return Finding(
            "gradient_explosion",
            f"gradient explosion: norm {norm:.3g}, {norm / max(usual, 1e-9):.0f} times its median, "
            f"since step {self._since}; lower optim.lr, or set optim.clip_norm",
            self._since,
            self._last_good_step,
        )
