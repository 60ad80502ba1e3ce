"""`opsin tune loader`: does training wait for the data, and with which settings does it wait least?

For every setting the data path is measured alone and together with training, the training step also on one batch that
stays on the device. Training with the data counts; the other two rates show which side waits for the other.
"""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count, islice

import torch

from opsin.data.base import Batch, Source
from opsin.data.quarantine import read_or_replace
from opsin.data.resident import byte_limit
from opsin.data.workers import Crew, RawBatch, Reader, Task, read_batches
from opsin.errors import ConfigError
from opsin.processes.cores import num_cores
from opsin.run.assemble import temporary_run
from opsin.run.images import open_images
from opsin.run.pace import endless_stage, rate_of, silent_console, stream, train_on
from opsin.run.parts import build_method
from opsin.run.recipe import Recipe
from opsin.storage.table import aligned
from opsin.storage.teller import Silence, Teller
from opsin.training.precision import choose_device
from opsin.training.stages import plan_time

_PREFETCH = (2, 4)
_MAX_WORKERS = 32
_WARM_UP = 1
_STEPS_AT_ONCE = 2
_EQUAL = 0.03
"""Rates that differ by less are taken as equal."""
_UNSTEADY = 1.25
_WAITS = 0.05
"""Share of the time from which on training is said to wait."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to feed the device. `prefetch` is per worker, and means nothing without workers."""

    workers: int
    prefetch: int
    resident: bool = False

    @property
    def keys(self) -> str:
        """The setting as keys of a recipe."""
        if self.resident:
            return "data.resident=true"
        return f"data.workers={self.workers} data.prefetch={self.prefetch}"


@dataclass(frozen=True, slots=True)
class Rate:
    """Rates of a setting, in images per second."""

    setting: Setting
    pinned: bool
    data: float
    """The data path alone: read, decoded, cut, on the device, augmented."""
    training: float
    """Training with this data."""
    start_s: float
    """Seconds until the first batch: workers start, or all images are decoded."""


@dataclass(frozen=True)
class LoaderReport:
    """All measurements, and the verdict on them."""

    device: str
    stage: str
    batch_size: int
    steps: tuple[float, float]
    """Images per second of the training step on one resident batch, measured before and after all others."""
    rates: tuple[Rate, ...]
    best: Setting
    not_resident: str
    """The reason for which images cannot stay in memory; empty if they can."""
    unpinned: float | None
    """Images per second that are copied to the GPU from memory that is not pinned; None without a GPU."""
    pinned: float | None
    """The same from pinned memory."""

    @property
    def best_keys(self) -> str:
        """The best setting as keys of a recipe."""
        is_slower = not self.best.resident and any(rate.setting.resident for rate in self.rates)
        return f"{self.best.keys} data.resident=false" if is_slower else self.best.keys

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        return {**asdict(self), "best": self.best_keys, "verdict": self.verdict()}

    def lines(self) -> list[str]:
        """The table and the verdict for a terminal."""
        rows = [("workers", "prefetch", "pinned", "data alone", "training", "start")]
        for rate in self.rates:
            known = rate.setting
            what = (
                ("resident", "-")
                if known.resident
                else (str(known.workers), str(known.prefetch if known.workers else "-"))
            )
            pinned = "yes" if rate.pinned else "no"
            rows.append((*what, pinned, f"{rate.data:,.0f}", f"{rate.training:,.0f}", f"{rate.start_s:.1f} s"))
        head = f"images per second in {self.stage}, batches of {self.batch_size} on {self.device}:"
        return [head, *aligned(rows, 0), f"the step alone: {self.step:,.0f}", *self.verdict()]

    @property
    def step(self) -> float:
        """Images per second of the training step: the larger measurement, since other work can only slow it."""
        return max(self.steps)

    def verdict(self) -> list[str]:
        """Lines on the side that waits, on the best setting, and on images that stay in memory."""
        best = next(rate for rate in self.rates if rate.setting == self.best)
        lost = max(0.0, 1 - best.training / self.step)
        lines = []
        if max(self.steps) > _UNSTEADY * min(self.steps):
            lines.append(
                f"unsteady: the step alone did {self.steps[0]:,.0f} images/s at first, {self.steps[1]:,.0f} at the "
                "end; something else uses this machine, so repeat this when it is idle"
            )
        if lost < _WAITS:
            lines.append("the data waits for the step: with the best setting training is as fast as the step alone")
        else:
            lines.append(f"training waits for the data: {lost:.0%} of its time even with the best setting")
            if self.device == "cpu":
                lines.append("(on the CPU workers and the step share the cores, so that some of it cannot be won back)")
            elif not self.best.resident:
                lines.append("smaller image files, fewer operations before the crop, or more cores would help")
        lines.append(f"best: {self.best_keys}")
        resident = next((rate for rate in self.rates if rate.setting.resident), None)
        if resident is None:
            lines.append(f"data.resident=true is not possible: {self.not_resident}")
        else:
            others = max(rate.training for rate in self.rates if not rate.setting.resident)
            lines.append(f"data.resident=true: {resident.training / others:.2f} times the best of the others")
        if self.pinned is not None and self.unpinned is not None:
            rates = f"{self.pinned:,.0f} images/s from pinned memory (as in training), {self.unpinned:,.0f} without"
            lines.append(f"data path up to the GPU: {rates}")
        return lines


def tune_loader(recipe: Recipe, *, seconds: float, teller: Teller) -> LoaderReport:
    """Measure the settings of the data path on the first stage of `recipe`, each for twice `seconds`.

    Raises:
        ConfigError: the recipe does not fit its data or this machine, or `seconds` is not above 0.
        DataError: the images cannot be used.
        TrainingError: a worker process ended by itself.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"command line: --seconds {seconds:g}: must be above 0; use --seconds 2")
    endless = endless_stage(recipe)
    device = choose_device(recipe.device)
    train = open_images(endless, teller).train
    stage = plan_time(endless, train, Silence()).stages[0]
    not_resident = why_not_resident(train, recipe.seed, device)
    settings = list(_settings(num_cores()))
    if not not_resident:
        settings.append(Setting(0, 1, resident=True))
    before = _measure_step(endless, seconds)
    rates: list[Rate] = []
    for setting in settings:
        teller.notice(f"measuring {setting.keys}")
        try:
            rates.append(_measure(endless, setting, seconds, device))
        except ConfigError:
            # Any other fault would have ended the settings before.
            if not setting.resident:
                raise
            not_resident = "the images have several sizes"
    best = choose_best(rates)
    report = LoaderReport(
        device=device.type,
        stage=stage.name if endless.stages else "the whole run",
        batch_size=stage.batch_size,
        steps=(before, _measure_step(endless, seconds)),
        rates=tuple(rates),
        best=best,
        not_resident=not_resident,
        unpinned=None,
        pinned=None,
    )
    if device.type != "cuda":
        return report
    copying = max(rates, key=lambda rate: (rate.setting.workers, rate.data)).setting
    measured = [measure_copies(endless, copying, seconds, device, pin=pin) for pin in (False, True)]
    return replace(report, unpinned=measured[0], pinned=measured[1])


def choose_best(rates: Sequence[Rate]) -> Setting:
    """The setting that trains fastest; of those within 3 % the one with fewest workers, then least prefetch."""
    fastest = max(rate.training for rate in rates)
    good = [rate.setting for rate in rates if rate.training >= (1 - _EQUAL) * fastest]
    return min(good, key=lambda setting: (setting.workers, setting.resident, setting.prefetch))


def measure_copies(recipe: Recipe, setting: Setting, seconds: float, device: torch.device, *, pin: bool) -> float:
    """Images per second that workers read and cut and that are copied to `device`, from pinned memory or not."""
    images = open_images(recipe, Silence())
    stage = plan_time(recipe, images.train, Silence()).stages[0]
    crops = build_method(recipe, images.facts).views(stage.image_size).crops

    def tasks() -> Iterator[Task]:
        first = 0
        while True:
            yield Task(crops, 0, (torch.arange(stage.batch_size) + first) % len(images.train))
            first += stage.batch_size

    def copy(raw: RawBatch) -> int:
        copied = [view.to(device, non_blocking=True) for view in raw.views.values()]
        int(copied[-1][-1, -1, -1, -1, -1])
        return len(raw.ids)

    batches = read_batches(
        Reader(images.train, recipe.seed, interleaved=device.type != "cpu"),
        tasks(),
        Crew(setting.workers, setting.prefetch, pin),
    )
    for _ in range(max(1, setting.workers)):
        copy(next(batches))
    rate = rate_of((sum(map(copy, islice(batches, max(1, setting.workers)))) for _ in count()), seconds)
    if isinstance(batches, Generator):
        batches.close()  # ends the workers
    return rate


def _settings(cores: int) -> Iterator[Setting]:
    """No workers; then one, two, four and so on up to the number of cores, with little and more prefetch."""
    yield Setting(0, _PREFETCH[0])
    workers = 1
    while workers <= min(cores, _MAX_WORKERS):
        yield from (Setting(workers, prefetch) for prefetch in _PREFETCH)
        workers *= 2


def _with(recipe: Recipe, setting: Setting) -> Recipe:
    changed = {"workers": setting.workers, "prefetch": setting.prefetch, "resident": setting.resident}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})


def why_not_resident(train: Source, seed: int, device: torch.device) -> str:
    """Return the reason for which not all images can stay in memory, judged by the first; empty if they can."""
    num_bytes = len(train) * read_or_replace(train, 0, seed).image.nbytes
    limit = byte_limit(device)
    if num_bytes <= limit:
        return ""
    return f"the images take about {num_bytes / 2**30:.1f} GiB decoded, {limit / 2**30:.1f} GiB may be used"


def _measure_step(recipe: Recipe, seconds: float) -> float:
    """Images per second of the step on one batch that is on the device already."""
    with temporary_run(_with(recipe, Setting(0, 1)), silent_console()) as run:
        state = run.start.fresh()
        with closing(stream(run)) as batches:
            batch = next(batches)
        train_on(state, run, [batch] * _WARM_UP)
        return rate_of((train_on(state, run, [batch] * _STEPS_AT_ONCE) for _ in count()), seconds)


def _measure(recipe: Recipe, setting: Setting, seconds: float, device: torch.device) -> Rate:
    # Batches arrive in rounds, one from each worker: whole rounds are counted.
    together = max(1, setting.workers)
    with temporary_run(_with(recipe, setting), silent_console()) as run:
        started = time.perf_counter()
        state = run.start.fresh()
        with closing(stream(run)) as batches:
            _take(batches, 1)
            start_s = time.perf_counter() - started
            _take(batches, together)
            data = rate_of((_take(batches, together) for _ in count()), seconds)
        with closing(stream(run)) as batches:
            train_on(state, run, [next(batches) for _ in range(together)])
            train_on(state, run, [next(batches) for _ in range(_WARM_UP)])
            number = max(together, _STEPS_AT_ONCE)
            training = rate_of((train_on(state, run, islice(batches, number)) for _ in count()), seconds)
    pinned = device.type == "cuda" and setting.workers > 0
    return Rate(setting, pinned, data, training, start_s)


def _take(batches: Iterator[Batch], number: int) -> int:
    """Take the next batches onto the device; return the number of their images."""
    taken = [next(batches) for _ in range(number)]
    float(next(iter(taken[-1].views.values()))[0, 0, 0, 0, 0])
    return sum(map(len, taken))
