"""Quantities that change during a run, as pure functions of the clock.

A `Schedule` in a recipe gives a factor around 1 which multiplies a base value (the learning rate).
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

from pydantic import Field

from opsin.config import Family
from opsin.timeline import Clock


def linear(progress: float, start: float, end: float) -> float:
    """From `start` to `end` in a straight line while `progress` goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine while `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Schedule(Family, ABC):
    """A factor as a function of time. The warm-up rises in a straight line to the full value."""

    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the rise at the beginning, in epochs."""
    warmup_start: float = Field(0.0, ge=0, le=1)
    """Factor at the first step of the warm-up."""

    def __call__(self, clock: Clock) -> float:
        """The factor for the update at `clock`."""
        if clock.epoch < self.warmup_epochs:
            return linear(clock.epoch / self.warmup_epochs, self.warmup_start, 1.0)
        rest = clock.total_epochs - self.warmup_epochs
        return self.after_warmup((clock.epoch - self.warmup_epochs) / rest if rest > 0 else 1.0)

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The factor when `progress` (0 to 1) of the time after the warm-up has passed."""


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
    """How both halves bend."""

    def after_warmup(self, progress: float) -> float:
        bend = cosine if self.shape == "cosine" else linear
        if progress < self.peak:
            return bend(progress / self.peak, self.start, 1.0)
        return bend((progress - self.peak) / (1 - self.peak), 1.0, self.end)
