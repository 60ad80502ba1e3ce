"""`opsin tune all`: one factor after another, each on top of those that were taken before, within a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from opsin.errors import ConfigError, TrainingError
from opsin.run.forecast import heaviest
from opsin.run.parts import Parts, build_parts
from opsin.run.recipe import Recipe, read
from opsin.run.tuned import TUNED, as_overrides, tuned_recipe, write_results
from opsin.storage.table import aligned
from opsin.storage.teller import Silence, Teller
from opsin.tuning.factors import Factor, list_factors
from opsin.tuning.turns import FEWEST_ROUNDS, Bench, Timing, Variant

RESULT = "tune.json"
_AS_IS = "as it is"
_SHOWN = 100
_LAST_S = 20.0
"""Seconds more for the last comparison."""


@dataclass(slots=True)
class Comparison:
    """A factor, measured: the recipe so far, and with each value."""

    factor: Factor
    before: Timing
    others: list[Timing]
    images: int
    """Images that the whole run trains."""
    takes_inexact: bool

    @property
    def best(self) -> Timing | None:
        """The timing to take; None where nothing is gained."""
        good = [timing for timing in self.others if not self.objection(timing)]
        return max(good, key=lambda timing: (timing.gain_over(self.before), timing.rate), default=None)

    def objection(self, timing: Timing) -> str:
        """The reason for which a value is not taken; empty if it may be."""
        if timing.fault or len(timing.rates) < FEWEST_ROUNDS:
            return timing.fault or "not measured to the end"
        if self.before.fault:
            return ""
        gain, noise = timing.gain_over(self.before), timing.noise_beside(self.before)
        if gain <= noise:
            return "slower" if gain < -noise else "within the spread"
        if self.factor.changes and not self.takes_inexact:
            return f"faster, but changes {self.factor.changes}: --inexact takes it"
        saved = self.images / self.before.rate * (1 - 1 / (1 + gain))
        if saved <= timing.start_s - self.before.start_s:
            return f"faster, but the run would save {saved:.0f} s, and start later by more"
        return ""

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table."""
        mark = "*" if self.factor.changes else ""
        found = [(self.factor.name + mark, *_row(self.before, None), self.before.fault[:_SHOWN])]
        for timing in self.others:
            verdict = "<- taken" if timing is self.best else self.objection(timing) or "less than another"
            found.append(("", *_row(timing, self.before), verdict[:_SHOWN]))
        return found

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        others = [
            {**timing.as_dict(), "brings": timing.gain_over(self.before), "objection": self.objection(timing)}
            for timing in self.others
        ]
        best = None if self.best is None else self.best.variant.name
        facts = {"factor": self.factor.name, "changes": self.factor.changes, "taken": best}
        return {**facts, "before": self.before.as_dict(), "others": others}


@dataclass(slots=True)
class FullTuning:
    """The comparisons of a recipe so far, and what was found."""

    reference: str
    overrides: Sequence[str]
    recipe: Recipe
    stage: str
    batch_size: int
    device: str
    images: int
    takes_inexact: bool
    comparisons: list[Comparison] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Factors for which no time was left."""
    found: dict[str, object] = field(default_factory=dict)
    total: Comparison | None = None
    """The recipe against all that was taken together."""
    is_done: bool = False
    files: ClassVar = frozenset((RESULT, TUNED))

    @property
    def gained(self) -> dict[str, object]:
        """The keys that were found, if together they are clearly faster; before that was measured, all of them."""
        return {} if self.total is not None and self.is_done and self.total.best is None else self.found

    def variant(self, found: dict[str, object], name: str) -> Variant:
        """The recipe with other keys.

        Raises:
            ConfigError: that is no recipe.
        """
        return Variant(found, read(self.reference, [*self.overrides, *as_overrides(found)]), name)

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "recipe": self.reference,
            "overrides": list(self.overrides),
            "stage": self.stage,
            "device": self.device,
            "done": self.is_done,
            "factors": [comparison.as_dict() for comparison in self.comparisons],
            "left_out": self.left_out,
            "total": None if self.total is None else self.total.as_dict(),
            "found": self.gained,
        }

    def lines(self) -> list[str]:
        """The table and the verdict for a terminal."""
        known = [*self.comparisons, *([] if self.total is None else [self.total])]
        rows = [row for comparison in known for row in comparison.rows()]
        table = aligned([("factor", "", "images/s", "spread", "brings", "start"), *(row[:-1] for row in rows)], 2)
        ends = ["", *(row[-1] for row in rows)]
        lines = [f"images per second in {self.stage}, updates of {self.batch_size} images, on {self.device}:"]
        lines += [f"{line}  {end}".rstrip() for line, end in zip(table, ends, strict=True)]
        if any(comparison.factor.changes for comparison in known):
            lines.append("* changes what is learned beyond rounding; taken with --inexact only")
        if self.left_out:
            lines.append(f"no time was left for: {', '.join(self.left_out)}; give more with --minutes")
        if not self.is_done:
            so_far = " ".join(as_overrides(self.found)) or "nothing"
            return [*lines, f"stopped before the end; taken so far: {so_far}"]
        if self.total is None or self.total.best is None:
            return [*lines, "nothing gained: the recipe stays as it is"]
        before, after = self.total.before, self.total.best
        gain = (
            "the recipe itself does not run" if before.fault else f"{1 + after.gain_over(before):.2f} times the recipe"
        )
        return [*lines, f"best: {' '.join(as_overrides(self.found))}: {gain}"]

    def measure(self, parts: Parts, *, fraction: float, seconds: float, teller: Teller) -> None:
        """Measure each factor for its share of about `seconds`; what was measured is kept, also after an interruption.

        Raises:
            TrainingError: neither the recipe nor a variant runs.
        """
        ends = time.monotonic() + seconds
        factors = list_factors(parts)
        with Bench(parts.timeline.stages.index(heaviest(parts)), fraction, teller) as bench:
            for number, factor in enumerate(factors):
                left = ends - time.monotonic()
                if left <= 0:
                    self.left_out.append(factor.name)
                    continue
                # One share more than factors: all together are measured at the end.
                comparison = _compare(self, factor, bench, left / (len(factors) - number + 1))
                if comparison.best is not None:
                    self.found |= comparison.best.variant.found
                    bench.keep_only(comparison.best.variant)
                else:
                    bench.keep_only(comparison.before.variant)
                if comparison.before.fault and not self.found and factor is factors[-1]:
                    raise TrainingError(f"{self.reference}: no variant runs here: {comparison.before.fault}")
            if self.found:
                before = Timing(self.variant({}, "the recipe"))
                after = Timing(self.variant(self.found, "all that was taken"))
                self.total = Comparison(Factor("together", ()), before, [after], self.images, takes_inexact=True)
                starts = 2 * max((one.best or one.before).start_s for one in self.comparisons)
                bench.compare([before, after], max(ends - time.monotonic(), 0.0) + _LAST_S + starts)
        self.is_done = True

    def write(self, folder: Path) -> bool:
        """Write the measurements, and the recipe with what was found; return False if nothing was."""
        text = ""
        if self.gained:
            names = [one.factor.name for one in self.comparisons if one.best is not None]
            reason = f"by opsin tune all on {self.device}: {', '.join(names)}"
            text = tuned_recipe(self.reference, self.overrides, self.gained, reason)
        write_results(folder, RESULT, self.as_dict(), text)
        return bool(text)


def plan_full_tuning(reference: str, overrides: Sequence[str], *, inexact: bool) -> tuple[FullTuning, Parts]:
    """Return a tuning without measurements, and the parts of its recipe.

    Raises:
        ConfigError: the recipe does not fit its data or this machine.
        DataError: the images cannot be used.
    """
    recipe = read(reference, overrides)
    parts = build_parts(recipe, Silence())
    stage = heaviest(parts)
    images = sum(one.steps * one.batch_size for one in parts.timeline.stages)
    name = stage.name if recipe.stages else "the whole run"
    device = parts.numerics.device.type
    return FullTuning(reference, overrides, recipe, name, stage.batch_size, device, images, inexact), parts


def _compare(tuning: FullTuning, factor: Factor, bench: Bench, seconds: float) -> Comparison:
    """Measure the values of a factor on top of what was found."""
    comparison = Comparison(
        factor, Timing(tuning.variant(tuning.found, _AS_IS)), [], tuning.images, tuning.takes_inexact
    )
    tuning.comparisons.append(comparison)
    for values in factor.values:
        name = " ".join(as_overrides(values))
        try:
            comparison.others.append(Timing(tuning.variant({**tuning.found, **values}, name)))
        except ConfigError as error:
            before = comparison.before.variant
            refused = Variant({**tuning.found, **values}, before.recipe, name)
            comparison.others.append(Timing(refused, fault=error.faults[0]))
    usable = [timing for timing in comparison.others if not timing.fault]
    bench.compare([comparison.before, *usable], seconds)
    return comparison


def _row(timing: Timing, before: Timing | None) -> tuple[str, ...]:
    """The cells of a timing between the name of the factor and the verdict."""
    known = bool(timing.rates)
    return (
        timing.variant.name,
        f"{timing.rate:,.0f}" if known else "-",
        f"{timing.spread:.1%}" if len(timing.rates) > 1 else "-",
        f"{timing.gain_over(before):+.1%}" if before is not None and before.rates and known else "-",
        f"{timing.start_s:.1f} s" if timing.start_s else "-",
    )
