"""The pace of a training: a few steps of a temporary run, timed.

The steps are real ones, with real images, on the machine as it is at this moment. Nothing of the run is kept.
"""

import io
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from opsin.data.base import Batch
from opsin.reporting.console import Console
from opsin.run.assemble import temporary_run
from opsin.run.images import Images
from opsin.run.recipe import Recipe
from opsin.training.loop import Run
from opsin.training.state import TrainState
from opsin.training.step import train_step

_ENDLESS_EPOCHS = 1e6
_WARM_UP = 2
_FEWEST_STEPS = 2


@dataclass(frozen=True, slots=True)
class Pace:
    """Rates of a training on this machine."""

    images_per_s: float
    """Images per second of updates, with their data."""
    encoded_per_s: float
    """Images per second of the network's forward pass alone, as scores compute it."""
    start_s: float
    """Seconds before the first update: weights, worker processes, images that stay in memory."""
    state_bytes: int
    """Bytes of all that a checkpoint holds."""


def measure_pace(recipe: Recipe, seconds: float, *, stage: int = 0, images: Images | None = None) -> Pace:
    """Train the given stage of `recipe` for about `seconds`, after two updates that do not count.

    `images` are those of the recipe, if they are open already, or a part of them.

    Raises:
        ConfigError: as `assemble`; so DataError and TrainingError.
    """
    started = time.perf_counter()
    with temporary_run(endless_stage(recipe, stage), silent_console(), images) as run:
        state = run.start.fresh()
        with closing(stream(run)) as batches:
            first = next(batches)
            start_s = time.perf_counter() - started
            train_on(state, run, [first])
            train_on(state, run, islice(batches, _WARM_UP - 1))
            images_per_s = rate_of(_updates(state, run, batches), seconds)
        return Pace(images_per_s, _encoding_rate(state, run, first), start_s, _bytes_of(state))


def endless_stage(recipe: Recipe, stage: int = 0) -> Recipe:
    """One stage of the recipe, too long to end while it is measured, with nothing but training."""
    changes: dict[str, object] = {
        "stages": recipe.stages[stage : stage + 1],
        "epochs": _ENDLESS_EPOCHS,
        "evaluators": {},
        "monitors": {},
        "limits": recipe.limits.model_copy(update={"steps": None}),
        # The run itself says which images are unreadable, and lists them in its directory.
        "data": recipe.data.model_copy(update={"max_unreadable": 1.0}),
    }
    if isinstance(recipe.optim.lr, str):
        # A word for a rate that is found elsewhere; no time depends on it.
        changes["optim"] = recipe.optim.model_copy(update={"lr": 1e-3})
    return recipe.model_copy(update=changes)


def small_stage(recipe: Recipe, images: int) -> Recipe:
    """As `endless_stage`, with batches of up to `images` images that are computed whole and not compiled."""
    endless = endless_stage(recipe)
    stages = [stage.model_copy(update={"batch_size": None}) for stage in endless.stages]
    changes = {"batch_size": min(images, recipe.batch_size), "stages": stages, "accumulate": 1, "compile": False}
    return endless.model_copy(update=changes)


def silent_console() -> Console:
    """A console that shows nothing."""
    return Console(io.StringIO(), quiet=True)


def stream(run: Run) -> Generator[Batch]:
    """The batches of a run from its first step; closing the generator ends the workers."""
    return cast("Generator[Batch]", run.data.batches(0, run.agenda.last_step))


def train_on(state: TrainState, run: Run, batches: Iterator[Batch] | Sequence[Batch]) -> int:
    """Train on the batches to the end of their updates; return the number of their images."""
    reports = [train_step(state, batch, run.plan) for batch in batches]
    float(reports[-1].values["train/loss"])
    return sum(report.images for report in reports)


def rate_of(work: Iterator[int], seconds: float) -> float:
    """Images per second of `work`, whose items are done when they are taken and give their images."""
    started = time.perf_counter()
    images = next(work)
    while (passed := time.perf_counter() - started) < seconds:
        images += next(work)
    return images / passed


def _updates(state: TrainState, run: Run, batches: Iterator[Batch]) -> Iterator[int]:
    while True:
        yield train_on(state, run, islice(batches, _FEWEST_STEPS))


@torch.no_grad()
def _encoding_rate(state: TrainState, run: Run, batch: Batch) -> float:
    images = next(iter(batch.views.values()))[0]
    method = state.method.eval()

    def encode() -> Iterator[int]:
        while True:
            with run.plan.autocast():
                float(method.encode(images).pooled[0, 0])
            yield len(images)

    encoded = rate_of(encode(), 0.0)  # the first pass makes buffers
    encoded = max(encoded, rate_of(encode(), 0.2))
    method.train()
    return encoded


def _bytes_of(state: TrainState) -> int:
    """Bytes of the tensors of a state: weights, buffers, moments, averages."""
    weights = list(state.method.state_dict().values())
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    averages = [] if state.ema is None else list(state.ema.average.values())
    return sum(value.nbytes for value in (*weights, *moments, *averages) if isinstance(value, Tensor))
