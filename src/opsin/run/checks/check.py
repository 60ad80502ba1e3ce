"""A look at everything that a run depends on, in about a minute, before it begins."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from opsin.errors import OpsinError
from opsin.reporting.console import duration
from opsin.run.checks.learning import check_learning
from opsin.run.checks.machine import (
    check_clock,
    check_directory,
    check_disk,
    check_loading,
    check_memory,
    check_scores,
    check_shared_memory,
    check_threads,
)
from opsin.run.checks.pictures import check_pictures
from opsin.run.checks.verdict import Verdict
from opsin.run.choice import choose
from opsin.run.forecast import forecast_memory
from opsin.run.parts import Parts, build_parts
from opsin.run.recipe import Recipe
from opsin.storage.files import nearest_folder
from opsin.storage.table import aligned
from opsin.storage.teller import Silence, Teller
from opsin.training.evaluations import AVERAGED

_FEW_STEPS = 100


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The verdicts on a recipe."""

    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def faults(self) -> int:
        """The number of faults."""
        return sum(verdict.level == "fault" for verdict in self.verdicts)

    def as_dict(self) -> dict[str, object]:
        """The report for programs."""
        return {"faults": self.faults, "seconds": self.seconds, "checks": [asdict(one) for one in self.verdicts]}

    def lines(self) -> list[str]:
        """The report for people."""
        rows = [(verdict.level, verdict.name, verdict.text) for verdict in self.verdicts]
        looks = sum(verdict.level == "look" for verdict in self.verdicts)
        return [*aligned(rows), f"{self.faults} faults, {looks} to look at, in {duration(self.seconds)}"]


def check_recipe(reference: str, overrides: Sequence[str], out: Path, teller: Teller) -> CheckReport:
    """Look at a recipe, its pictures, its learning and this machine; a fault of one leaves the others their say.

    `teller` reports what is looked at.
    """
    started = time.monotonic()
    verdicts: list[Verdict] = []
    with _explained("recipe", verdicts):
        recipe = choose(reference, overrides, None, teller)
        parts = build_parts(recipe, Silence())
        verdicts.append(_length(recipe, parts))
        verdicts.append(_best(recipe))
        verdicts += _look(recipe, parts, out, teller)
    verdicts += [check_threads(), check_directory(out), check_clock(out)]
    return CheckReport(tuple(verdicts), time.monotonic() - started)


def _look(recipe: Recipe, parts: Parts, out: Path, teller: Teller) -> list[Verdict]:
    """Look at what a recipe without faults does with its pictures on this machine."""
    verdicts: list[Verdict] = []
    with _explained("pictures", verdicts):
        verdicts += check_pictures(recipe, parts.images)
    with _explained("scores", verdicts):
        verdicts.append(check_scores(recipe, parts))
    forecast = forecast_memory(parts)
    with _explained("memory", verdicts):
        verdicts += [check_memory(parts, forecast), check_shared_memory(parts)]
    if any(verdict.name == "memory" and verdict.level == "fault" for verdict in verdicts):
        return verdicts  # a step would end this process
    teller.notice("checking: updates on one batch, then the data path")
    with _explained("learns", verdicts):
        verdicts += check_learning(recipe, parts.images, nearest_folder(out))
    if not any(verdict.name == "learns" and verdict.level == "fault" for verdict in verdicts):
        with _explained("loading", verdicts):
            verdicts.append(check_loading(recipe, parts))
    with _explained("disk", verdicts):
        verdicts.append(check_disk(parts, forecast, out))
    return verdicts


def _length(recipe: Recipe, parts: Parts) -> Verdict:
    total = parts.timeline.total_steps
    steps = min(total, recipe.limits.steps or total)
    text = f"{steps:,} steps on {parts.numerics.device} in {parts.numerics.precision}"
    if steps < _FEW_STEPS:
        return Verdict("recipe", "look", f"{text}: few; more epochs, or a smaller batch_size")
    return Verdict("recipe", "fine", text)


@contextmanager
def _explained(name: str, verdicts: list[Verdict]) -> Iterator[None]:
    """Turn an error inside into a fault for each of its lines."""
    try:
        yield
    except OpsinError as error:
        verdicts += [Verdict(name, "fault", fault) for fault in error.faults]


def _best(recipe: Recipe) -> Verdict:
    """Look for the evaluator that gives the score by which checkpoints are kept."""
    name = recipe.checkpoints.best
    if name is None or not recipe.evaluators:
        return Verdict("best", "fine", "no checkpoint is kept for its score")
    prefix = name.partition("/")[0].removesuffix(AVERAGED)
    if prefix not in recipe.evaluators:
        known = ", ".join(recipe.evaluators)
        text = f"checkpoints.best={name}: no evaluator of this name gives a score; known: {known}"
        return Verdict("best", "fault", text)
    return Verdict("best", "fine", f"checkpoints are kept by {name}")
