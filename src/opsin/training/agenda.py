"""The agenda of a run: which step brings a row, a score, a checkpoint, a stage, and how far back a fault may lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from opsin.clock.cadence import Every, StepEvery, is_due, parse
from opsin.clock.timeline import Timeline

_MARGIN = 100
"""Steps of the margin `auto`, where they are no more than a quarter of an epoch."""


@dataclass(frozen=True, slots=True)
class Agenda:
    """Answers from the number of finished steps alone, but for checkpoints that are due by the minute."""

    timeline: Timeline
    last_step: int
    """The step after which the run ends; the timeline may go on."""
    rows: int = 50
    """Steps between two rows."""
    checkpoints: Every = "never"
    milestones: StepEvery = "never"
    evaluators: Mapping[str, StepEvery] = field(default_factory=dict)
    """The cadence of each evaluator, by the prefix of its scores."""
    monitors: Mapping[str, StepEvery] = field(default_factory=dict)
    """The cadence of each monitor, by name."""
    margin: Literal["auto"] | StepEvery = "auto"
    """Steps or epochs before the first bad row in which a fault may have begun."""
    delay: int | None = None
    """The most steps from a fault to its rollback; None where no fault is answered by a rollback."""

    def row(self, step: int) -> bool:
        """True if `step` ends a row of the journal, whatever the monitors measure."""
        return (
            step % self.rows == 0
            or self.timeline.ends_epoch(step)
            or self.timeline.starts_stage(step) is not None
            or self.checkpoint(step) is not None
            or bool(self.scores(step))
        )

    def is_regular(self, step: int) -> bool:
        """True if a run without interruption has a row at `step`."""
        return step == 0 or self.row(step) or bool(self.measurements(step))

    def scores(self, step: int) -> list[str]:
        """The evaluators that run after `step` updates; at the end of the run all of them."""
        return [name for name, every in self.evaluators.items() if step == self.last_step or self._is_due(every, step)]

    def measurements(self, step: int) -> list[str]:
        """The monitors that measure at `step`."""
        return [name for name, every in self.monitors.items() if self._is_due(every, step)]

    def checkpoint(self, step: int, minutes: float = 0.0) -> str | None:
        """The reason to save the state after `step` updates; None where none is due.

        `minutes` is the training time since the last checkpoint was tried.
        """
        if step == self.last_step:
            return "last step"
        if self.is_milestone(step):
            return "milestone"
        return self.checkpoints if is_due(self.checkpoints, self.timeline, step, minutes) else None

    def is_milestone(self, step: int) -> bool:
        """True if the checkpoint of `step` is kept for ever."""
        return self._is_due(self.milestones, step)

    def stage_begins(self, step: int) -> int | None:
        """The number of the stage whose first update follows `step`; None where none begins or the run ends."""
        return self.timeline.starts_stage(step) if step < self.last_step else None

    def margin_steps(self, step: int) -> int:
        """`margin` in steps, as it is in the stage of `step`."""
        if self.margin == "auto":
            return min(_MARGIN, max(1, epoch_steps(self.timeline, step) // 4))
        return steps_in(self.margin, self.timeline, step)

    def reach(self, step: int) -> int | None:
        """The most steps that a rollback may go back from `step`; None where no fault is answered by a rollback."""
        if self.delay is None:
            return None
        # The margin is that of the stage in which the fault began, which may have longer epochs.
        return self.delay + max(self.margin_steps(began) for began in (max(0, step - self.delay), step))

    def _is_due(self, every: StepEvery, step: int) -> bool:
        return is_due(every, self.timeline, step)


def steps_in(length: str, timeline: Timeline, step: int) -> int:
    """A length like `200 steps` or `0.5 epochs` in steps of the stage that `step` lies in."""
    number, unit = parse(length)
    return round(number * epoch_steps(timeline, step)) if unit == "epochs" else int(number)


def epoch_steps(timeline: Timeline, step: int) -> int:
    """Updates of an epoch in the stage that `step` lies in."""
    return timeline.clock(step).stage.steps_per_epoch
