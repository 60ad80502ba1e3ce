"""`opsin tune batch`: the number of images that are computed at a time with which training is fastest.

The global batch, on which an update depends, is kept: `accumulate` divides it. Or it becomes what is computed at a
time, and the learning rate follows by a rule that is said.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from opsin.errors import ConfigError, TrainingError
from opsin.run.forecast import heaviest
from opsin.run.parts import Parts, build_parts
from opsin.run.recipe import Recipe, read
from opsin.run.sweep import scaled_rates
from opsin.run.tuned import TUNED, as_overrides, tuned_recipe, write_results
from opsin.storage.table import aligned
from opsin.storage.teller import Silence, Teller
from opsin.training.memory import uses_batch_statistics
from opsin.tuning.turns import Bench, Timing, Variant

Rule = Literal["keep", "linear", "sqrt"]
"""`keep` changes `accumulate` alone; the others `batch_size`, and the learning rate by the ratio or the root of it."""
RESULT = "batch.json"

_FALLEN = 0.8
"""Share of the best rate so far under which smaller parts are not tried further."""
_CLOSE = 0.85
"""Share of the best first rate from which on a variant is measured again, in turns."""
_FIRST_S = 1.0
_ENOUGH = 2
"""Sizes in a row with a fallen rate after which no further one is tried."""
_AS_IS = " (recipe)"


@dataclass
class BatchTuning:
    """The measurements of a recipe so far, and the verdict on them."""

    reference: str
    overrides: Sequence[str]
    rule: Rule
    recipe: Recipe
    stage: str
    batch_size: int
    """Images of an update of the recipe."""
    device: str
    is_exact: bool
    """False if other parts would change what is learned: batch norm sees the images of a part."""
    takes_inexact: bool
    timings: list[Timing] = field(default_factory=list)
    is_done: bool = False
    files: ClassVar = frozenset((RESULT, TUNED))

    @property
    def current(self) -> Timing:
        """The timing of the recipe as it is."""
        return self.timings[0]

    @property
    def best(self) -> Timing | None:
        """The fastest variant that may be taken, if it is clearly faster than the recipe, or that does not run."""
        usable = [timing for timing in self.timings if timing.rates and not timing.fault]
        if not self.is_exact and not self.takes_inexact:
            usable = [timing for timing in usable if timing is self.current]
        best = max(usable, key=lambda timing: timing.rate, default=None)
        if best is None or best is self.current:
            return None
        if self.current.fault or best.gain_over(self.current) > best.noise_beside(self.current):
            return best
        return None

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        best = self.best
        return {
            "recipe": self.reference,
            "overrides": list(self.overrides),
            "rule": self.rule,
            "stage": self.stage,
            "batch_size": self.batch_size,
            "device": self.device,
            "exact": self.is_exact,
            "done": self.is_done,
            "rows": [timing.as_dict() for timing in self.timings],
            "best": {} if best is None else dict(best.variant.found),
            "verdict": self.verdict(),
        }

    def lines(self) -> list[str]:
        """The table and the verdict for a terminal."""
        rows = [("", "images/s", "spread", "memory", "start", "")]
        for timing in self.timings:
            known = bool(timing.rates)
            rows.append(
                (
                    timing.variant.name,
                    f"{timing.rate:,.0f}" if known else "-",
                    f"{timing.spread:.1%}" if len(timing.rates) > 1 else "-",
                    f"{timing.peak_bytes / 2**30:.2f} GiB" if known else "-",
                    f"{timing.start_s:.1f} s" if timing.start_s else "-",
                    timing.fault or ("<- best" if timing is self.best else ""),
                )
            )
        table = aligned([row[:-1] for row in rows], 1)
        head = f"images per second in {self.stage}, updates of {self.batch_size} images, on {self.device}:"
        return [head, *(f"{line}  {row[-1]}".rstrip() for line, row in zip(table, rows, strict=True)), *self.verdict()]

    def verdict(self) -> list[str]:
        """Lines on the best variant."""
        if not self.is_done:
            return ["stopped before the end: nothing was decided"]
        best, lines = self.best, []
        if best is None and self.current.fault:
            lines.append(f"no variant ran: {self.current.fault}")
        elif best is None:
            lines.append("nothing gained: no other batch is faster by more than repeated measurements differ; keep it")
        else:
            gain = "" if self.current.fault else f", {1 + best.gain_over(self.current):.2f} times the recipe"
            lines.append(f"best: {' '.join(as_overrides(best.variant.found))}{gain}")
        if not self.is_exact:
            lines.append(
                "batch norm sees the images that are computed at a time: another number changes what is learned"
                + ("" if self.takes_inexact else "; --inexact takes it all the same")
            )
        if best is not None and self.rule != "keep":
            ratio = best.variant.recipe.batch_size / self.batch_size
            how = f"{ratio:g}" if self.rule == "linear" else f"the root of {ratio:g}"
            lines.append(
                f"batch_size {self.batch_size} -> {best.variant.recipe.batch_size}: learning rates times {how} "
                f"(--rule {self.rule}), {1 / ratio:.2g} times the updates; what counts updates (ema.decay, momentum of "
                "a teacher) stays as it is"
            )
        return lines

    def measure(self, parts: Parts, *, fraction: float, seconds: float, teller: Teller) -> None:
        """Measure batches for about `seconds`, each in a process that may take a fraction of the free memory.

        What was measured is kept, also after an interruption.

        Raises:
            TrainingError: no variant runs.
        """
        stages = parts.timeline.stages
        with Bench(stages.index(heaviest(parts)), fraction, teller) as bench:
            _look_around(self, bench, len(parts.images.train), time.monotonic() + seconds / 2)
            found = [timing for timing in self.timings if not timing.fault]
            if not found:
                raise TrainingError(f"{self.reference}: {self.current.fault}; raise --memory, or --minutes to try more")
            top = max(found, key=lambda timing: timing.rate)
            between = [Timing(variant) for variant in _between(self, top, len(parts.images.train))]
            finalists = [one for one in found if one.rate >= _CLOSE * top.rate or one is self.current] + between
            self.timings += between
            for timing in finalists:
                timing.rates.clear()
            bench.compare(finalists, seconds / 2)
        self.is_done = True

    def write(self, folder: Path) -> bool:
        """Write the measurements, and the recipe with what was found; return False if nothing was."""
        best, text = self.best if self.is_done else None, ""
        if best is not None:
            reason = f"by opsin tune batch: {best.rate:,.0f} images/s, {self.current.rate:,.0f} before"
            text = tuned_recipe(self.reference, self.overrides, best.variant.found, reason)
        write_results(folder, RESULT, self.as_dict(), text)
        return best is not None


def plan_tuning(reference: str, overrides: Sequence[str], *, rule: Rule, inexact: bool) -> tuple[BatchTuning, Parts]:
    """Return a tuning without measurements, and the parts of its recipe.

    Raises:
        ConfigError: the recipe does not fit its data or this machine, or the rule does not fit the recipe.
        DataError: the images cannot be used.
    """
    recipe = read(reference, overrides)
    if rule != "keep" and any(stage.batch_size for stage in recipe.stages):
        raise ConfigError(
            f"command line: --rule {rule}: the stages of {reference} have batch sizes of their own; use --rule keep"
        )
    parts = build_parts(recipe, Silence())
    stage = heaviest(parts)
    tuning = BatchTuning(
        reference,
        overrides,
        rule,
        recipe,
        stage=stage.name if recipe.stages else "the whole run",
        batch_size=stage.batch_size,
        device=parts.numerics.device.type,
        is_exact=rule != "keep" or not uses_batch_statistics(parts.method),
        takes_inexact=inexact,
    )
    tuning.timings.append(Timing(Variant({}, recipe, f"{_name(tuning, recipe)}{_AS_IS}")))
    return tuning, parts


def _look_around(tuning: BatchTuning, bench: Bench, images: int, ends: float) -> None:
    """Measure sizes once, from that of the recipe up until memory ends, and down; either way until rates fall."""
    bench.compare(tuning.timings, _FIRST_S, rounds=1)
    for factor in (2.0, 0.5):
        fallen, size = 0, _size(tuning, tuning.recipe)
        while fallen < _ENOUGH:
            size *= factor
            variant = _variant(tuning, size, images)
            if variant is None:
                break
            timing = Timing(variant)
            tuning.timings.append(timing)
            if time.monotonic() > ends:
                timing.fault = "not measured: the time was over"
                break
            bench.compare([timing], _FIRST_S, rounds=1)
            if timing.fault and factor > 1:
                break
            best = max(one.rate for one in tuning.timings)
            fallen = fallen + 1 if not timing.fault and timing.rate < _FALLEN * best else 0


def _size(tuning: BatchTuning, recipe: Recipe) -> float:
    """Images that are computed at a time."""
    whole = tuning.batch_size if tuning.rule == "keep" else recipe.batch_size
    return whole / recipe.accumulate


def _between(tuning: BatchTuning, best: Timing, images: int) -> Iterator[Variant]:
    """Variants between the best one and its neighbours."""
    known = {timing.variant.name.removesuffix(_AS_IS) for timing in tuning.timings}
    for factor in (0.75, 1.5):
        variant = _variant(tuning, _size(tuning, best.variant.recipe) * factor, images)
        if variant is not None and variant.name not in known:
            known.add(variant.name)
            yield variant


def _variant(tuning: BatchTuning, size: float, images: int) -> Variant | None:
    """The variant with about `size` images at a time; None without such parts of a batch, or without enough images."""
    recipe = tuning.recipe
    smallest = min([stage.batch_size or recipe.batch_size for stage in recipe.stages] or [recipe.batch_size])
    found: dict[str, object]
    if tuning.rule == "keep":
        parts = tuning.batch_size / size
        if parts < 1 or round(parts) > smallest:
            return None
        found = {"accumulate": round(parts)}
    else:
        batch_size = round(size)
        if not 1 <= batch_size <= images:
            return None
        found = {"batch_size": batch_size, "accumulate": 1} | _scaled(tuning, batch_size / tuning.batch_size)
    recipe = read(tuning.reference, [*tuning.overrides, *as_overrides(found)])
    return Variant(found, recipe, _name(tuning, recipe))


def _scaled(tuning: BatchTuning, ratio: float) -> dict[str, object]:
    """The learning rates for a batch that is `ratio` times as large; none where the recipe has a word for them."""
    lr = tuning.recipe.optim.lr
    if isinstance(lr, str):
        return {}
    factor = ratio if tuning.rule == "linear" else math.sqrt(ratio)
    rates = scaled_rates(tuning.recipe, float(f"{lr * factor:.3g}"))
    return {f"optim.{key}": rate for key, rate in rates.items()}


def _name(tuning: BatchTuning, recipe: Recipe) -> str:
    if tuning.rule != "keep":
        return f"batch_size={recipe.batch_size}"
    at_once = -(-tuning.batch_size // recipe.accumulate)
    return f"accumulate={recipe.accumulate}: {at_once} images at a time"
