"""Who watches a run, and the way back from what they find."""

from collections.abc import Callable, Mapping

from opsin.clock.cadence import is_due
from opsin.clock.timeline import Timeline
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.run.recipe import Recipe
from opsin.training.alerts import Alerts
from opsin.training.monitor import Finding, Monitor


def build_alerts(
    recipe: Recipe,
    timeline: Timeline,
    journal: Journal,
    console: Console,
    monitors: Mapping[str, Monitor],
    *,
    last_step: int,
) -> Alerts:
    """What has the rows of a run judged by its monitors."""

    def is_regular(step: int) -> bool:
        # What is due by the minute is not: it falls elsewhere in each run.
        cadences = [
            recipe.checkpoints.every,
            recipe.checkpoints.milestones or "never",
            *(wanted.every for wanted in recipe.monitors.values()),
            *(wanted.every for wanted in recipe.evaluators.values()),
        ]
        return (
            step in (0, last_step)
            or step % recipe.log.every == 0
            or timeline.ends_epoch(step)
            or timeline.starts_stage(step) is not None
            or any(is_due(every, timeline, step) for every in cadences)
        )

    actions = {name: (recipe.monitors[name].action, monitor) for name, monitor in monitors.items()}
    return Alerts(journal, timeline, console, actions, is_regular=is_regular)


def streak_answer(recipe: Recipe, alerts: Alerts) -> Callable[[Finding, int], None]:
    """What follows from many cancelled updates in a row before they end the run."""

    def roll_back(finding: Finding, step: int) -> None:
        alerts.roll_back("cancelled", finding, finding.text, found=step)

    return roll_back if recipe.guard.cancelled == "rollback" else lambda finding, step: None


def reach(recipe: Recipe, timeline: Timeline) -> Callable[[int], int] | None:
    """How many steps a rollback may go back from a step; None where nothing asks for one."""
    asking = [wanted for wanted in recipe.monitors.values() if wanted.action == "rollback"]
    delays = [wanted.delay(recipe.log.every, timeline) for wanted in asking]
    if recipe.guard.cancelled == "rollback":
        delays.append(recipe.limits.cancelled_in_a_row + recipe.log.every)
    if not delays:
        return None
    delay = max(delays)

    def steps(step: int) -> int:
        # The margin is that of the stage in which the trouble began, which may have longer epochs.
        margins = [recipe.guard.margin_steps(timeline, began) for began in (max(0, step - delay), step)]
        return delay + max(margins)

    return steps
