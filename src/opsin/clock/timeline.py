"""Steps and epochs: the only clock of a run.

A step is one optimizer update, an epoch one pass over the images that its stage trains on. A
`Timeline` is a sequence of `Stage`s; each has its own batch size and images, hence its own number of
steps per epoch.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of a run with settings of its own. `epochs` may have a fraction."""

    epochs: float
    batch_size: int
    steps_per_epoch: int
    name: str = "whole run"
    image_size: int = 0
    """Side of the training images in pixels."""
    data_fraction: float = 1.0
    """Share of the images of each class that it trains on; a smaller share is part of a larger one."""
    lr_scale: float = 1.0
    """Factor on every learning rate."""
    mix: bool = True
    """True if images are mixed by a method that mixes them."""
    label_smoothing: float | None = None
    """Label smoothing of this stage instead of the method's own."""
    train: tuple[str, ...] = ("*",)
    """Patterns of the names of the parameters that learn; the others are frozen."""

    @property
    def steps(self) -> int:
        """Updates in this stage, at least one."""
        return max(1, round(self.epochs * self.steps_per_epoch))

    @property
    def passes(self) -> float:
        """`epochs`, rounded to whole steps."""
        return self.steps / self.steps_per_epoch


@dataclass(frozen=True, slots=True)
class Clock:
    """Time before an update. Epochs count passes over the data, with fraction."""

    step: int
    total_steps: int
    epoch: float
    total_epochs: float
    stage: Stage
    stage_epoch: float
    """Passes since the stage began."""


@dataclass(frozen=True, slots=True)
class StepPosition:
    """Position of a step in its stage: the pass over the data, and the batch within the pass."""

    stage: int
    epoch: int
    batch: int
    batch_size: int


class Timeline:
    """The steps of a run. A stage starts a new pass over the data."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        assert stages, "a run has at least one stage"
        self.stages = tuple(stages)
        self._first_step = [0]
        self._first_epoch = [0.0]
        for stage in self.stages:
            self._first_step.append(self._first_step[-1] + stage.steps)
            self._first_epoch.append(self._first_epoch[-1] + stage.passes)

    @property
    def total_steps(self) -> int:
        """Updates in the whole run."""
        return self._first_step[-1]

    def clock(self, step: int) -> Clock:
        """The time before update `step`; `total_steps` gives the time at the end."""
        index = self._stage_of(step)
        stage = self.stages[index]
        inside = (step - self._first_step[index]) / stage.steps_per_epoch
        epoch = self._first_epoch[index] + inside
        return Clock(step, self.total_steps, epoch, self._first_epoch[-1], stage, inside)

    def epoch(self, step: int) -> float:
        """Passes over the data finished before update `step`, with fraction."""
        return self.clock(step).epoch

    def position(self, step: int) -> StepPosition:
        """Position of the batch that update `step` trains on."""
        index = self._stage_of(step)
        stage = self.stages[index]
        passes, batch = divmod(step - self._first_step[index], stage.steps_per_epoch)
        # A pass cut short by the end of its stage is still a pass of its own: no two stages share an order.
        earlier = sum(-(-before.steps // before.steps_per_epoch) for before in self.stages[:index])
        return StepPosition(index, earlier + passes, batch, stage.batch_size)

    def starts_stage(self, step: int) -> int | None:
        """Number of the stage that begins after `step` updates; None if none begins there."""
        return self._first_step.index(step) if step in self._first_step[:-1] else None

    def ends_epoch(self, step: int) -> bool:
        """True if `step` updates complete a pass over the data or a stage."""
        if step <= 0:
            return False
        index = self._stage_of(step - 1)
        inside = step - self._first_step[index]
        stage = self.stages[index]
        return inside % stage.steps_per_epoch == 0 or inside == stage.steps

    def _stage_of(self, step: int) -> int:
        return min(bisect.bisect_right(self._first_step, step), len(self.stages)) - 1
