"""Quantities that change during a run, as pure functions of the clock.

A `Schedule` in a recipe gives a factor around 1 which multiplies a base value (the learning rate).
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from opsin.clock.timeline import Clock
from opsin.settings.family import Family

Momentum = Annotated[float, Field(ge=0, lt=1)]


def linear(progress: float, start: float, end: float) -> float:
    """A straight line from `start` to `end` while `progress` goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end` while `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Schedule(Family, ABC):
    """A factor as a function of time. The warm-up rises in a straight line to the full value."""

    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the rise at the beginning, in epochs."""
    warmup_start: float = Field(0.0, ge=0, le=1)
    """Factor at the first step of the warm-up."""
    over: Literal["run", "stage"] = "run"
    """Span of the schedule: the whole run, or each stage by itself."""

    def __call__(self, clock: Clock) -> float:
        """The factor for the update at `clock`."""
        epoch, _ = self._span(clock)
        if epoch < self.warmup_epochs:
            return linear(epoch / self.warmup_epochs, self.warmup_start, 1.0)
        return self.after_warmup(self._progress(clock))

    def momentum_at(self, clock: Clock) -> float | None:
        """The momentum for the update at `clock`; None if the schedule leaves it alone."""
        return None

    def _progress(self, clock: Clock) -> float:
        """Share of the time after the warm-up that has passed, 0 to 1."""
        epoch, total = self._span(clock)
        rest = total - self.warmup_epochs
        return max(epoch - self.warmup_epochs, 0.0) / rest if rest > 0 else 1.0

    def _span(self, clock: Clock) -> tuple[float, float]:
        """Epochs since the beginning of the span, and in the whole span."""
        if self.over == "stage":
            return clock.stage_epoch, clock.stage.passes
        return clock.epoch, clock.total_epochs

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The factor after `progress`, 0 to 1, of the time that follows the warm-up."""


class Constant(Schedule):
    """The full value throughout."""

    name: Literal["constant"] = "constant"

    def after_warmup(self, progress: float) -> float:
        return 1.0


class Linear(Schedule):
    """A straight line from the full value to `end`."""

    name: Literal["linear"] = "linear"
    end: float = Field(0.0, ge=0)
    """Factor at the end of the run."""

    def after_warmup(self, progress: float) -> float:
        return linear(progress, 1.0, self.end)


class Cosine(Schedule):
    """Half a cosine from the full value to `end` (Loshchilov & Hutter 2017, without restarts)."""

    name: Literal["cosine"] = "cosine"
    end: float = Field(0.0, ge=0)
    """Factor at the end of the run."""

    def after_warmup(self, progress: float) -> float:
        return cosine(progress, 1.0, self.end)


class OneCycle(Schedule):
    """Up from `start` to the full value, then down to `end` (Smith & Topin 2018)."""

    name: Literal["onecycle"] = "onecycle"
    start: float = Field(0.04, ge=0, le=1)
    """Factor at the beginning."""
    peak: float = Field(0.3, gt=0, lt=1)
    """Fraction of the run at which the full value is reached."""
    end: float = Field(0.0, ge=0)
    """Factor at the end of the run."""
    shape: Literal["cosine", "linear"] = "cosine"
    """Shape of the rise and of the fall."""
    momentum: tuple[Momentum, Momentum] | None = None
    """Momentum (beta1 of Adam) at both ends and at the peak of the learning rate, such as [0.95, 0.85]."""

    @model_validator(mode="after")
    def _rises_once(self) -> "OneCycle":
        if self.warmup_epochs:
            raise ValueError("onecycle rises by itself; leave warmup_epochs out, and set start and peak")
        return self

    def after_warmup(self, progress: float) -> float:
        return self._bend(progress, self.start, 1.0, self.end)

    def momentum_at(self, clock: Clock) -> float | None:
        if self.momentum is None:
            return None
        high, low = self.momentum
        return self._bend(self._progress(clock), high, low, high)

    def _bend(self, progress: float, start: float, middle: float, end: float) -> float:
        bend = cosine if self.shape == "cosine" else linear
        if progress < self.peak:
            return bend(progress / self.peak, start, middle)
        return bend((progress - self.peak) / (1 - self.peak), middle, end)
