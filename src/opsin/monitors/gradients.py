"""Whether gradients stay within their usual size."""

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
"""Rows before which nothing is usual; the first norms of a run are the largest."""


class GradientsConfig(MonitorConfig):
    """Tells when the gradient norm, before any clip, is large as such and for this run; measures nothing."""

    name: Literal["gradients"] = "gradients"
    limit: float = Field(10.0, gt=0)
    """Gradient norm that is never too large, since large networks have large ones."""
    factor: float = Field(5.0, gt=1)
    """Multiple of its median over the 50 rows before that is not too large either."""

    def build(self, timeline: Timeline) -> "Gradients":
        return Gradients(self)


class Gradients(Monitor):
    """Judges `train/grad_norm`, the mean over the updates of a row."""

    def __init__(self, config: GradientsConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=_HISTORY)
        self._since: int | None = None
        self._good = 0
        """The step of the last row whose norm was not too large."""

    def judge(self, row: Row) -> Finding | None:
        norm = row.values.get("train/grad_norm", math.nan)
        if math.isnan(norm):
            return None
        usual = median(self._norms) if len(self._norms) >= _FEWEST else math.inf
        self._norms.append(norm)
        if norm <= max(self._config.limit, self._config.factor * usual):
            self._since, self._good = None, row.step
            return None
        self._since = row.step if self._since is None else self._since
        return Finding(
            "gradient_explosion",
            f"gradient explosion: norm {norm:.3g}, {norm / max(usual, 1e-9):.0f} times its median, "
            f"since step {self._since}; lower optim.lr, or set optim.clip_norm",
            self._since,
            self._good,
        )
