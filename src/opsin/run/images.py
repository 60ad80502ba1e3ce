"""The images of a recipe: opened, split, and as training and evaluators see them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from opsin.clock.timeline import Timeline
from opsin.data.base import DataFacts, Source
from opsin.data.holdout import hold_out
from opsin.data.loading import EvaluationData, LoadingPlan, TrainingData
from opsin.data.order import Order
from opsin.data.quarantine import Quarantine, watch
from opsin.data.sources.labels import Opened
from opsin.data.sources.open import open_sources
from opsin.data.waiting import StopRequest
from opsin.evaluation.labelled import LabelledImages, spread_evenly
from opsin.methods.base import Method
from opsin.processes.cores import num_cores
from opsin.processes.trail import Trail
from opsin.processes.world import World
from opsin.reporting.outlets import write_if_possible
from opsin.run.numerics import Numerics
from opsin.run.recipe import Recipe
from opsin.storage.directory import RunDirectory
from opsin.storage.teller import Teller
from opsin.training import precision
from opsin.training.evaluator import EvaluationContext

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3053, 0.3053, 0.3053), (0.3760, 0.3760, 0.3760)),
}


@dataclass(frozen=True, slots=True)
class Images:
    """Both sides of the data, and what a method may know of them."""

    train: Source
    val: Source | None
    facts: DataFacts

    def sized(self, side: int) -> "Images":
        """The same images for training at another size in pixels."""
        return replace(self, facts=replace(self.facts, image_size=side))


def open_images(recipe: Recipe, teller: Teller) -> Images:
    """The training and validation images; without a split of their own, some are held out.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    wanted = recipe.data
    opened = open_sources(
        wanted.path,
        kind=wanted.kind,
        labels=wanted.labels,
        image_column=wanted.image_column,
        label_column=wanted.label_column,
        cache=Path(os.path.expanduser(wanted.cache)),
    )
    teller.notice(f"data: {opened.said}")
    train, val = opened.train, opened.val
    if val is None and wanted.holdout > 0:
        # Also where nothing evaluates: looking never changes which images train.
        train, val = hold_out(train, wanted.holdout, recipe.seed)
        teller.notice(f"data: held out {len(val):,} of them for validation (data.holdout={wanted.holdout:g})")
    mean, std = _STATISTICS.get(opened.kind, _IMAGENET)
    facts = DataFacts(
        classes=train.classes,
        samples=len(train),
        image_size=wanted.image_size,
        channels=3,
        mean=wanted.mean or mean,
        std=wanted.std or std,
        unlabelled=int((train.labels < 0).sum()),
    )
    return Images(train, val, facts)


def evaluation_context(
    recipe: Recipe, images: Images, numerics: Numerics, plan: LoadingPlan, folder: Path
) -> EvaluationContext:
    """The context of the evaluators of a recipe; `folder` is the run directory."""
    teller = plan.teller

    def still(source: Source) -> EvaluationData:
        return _still_data(recipe, source, plan)

    def open_path(path: str) -> Opened:
        opened = open_sources(path, cache=Path(os.path.expanduser(recipe.data.cache)))
        teller.notice(f"labelled images: {opened.said}")
        return opened

    return EvaluationContext(
        None if images.val is None else still(images.val),
        LabelledImages(images.train, images.val, open_path=open_path, still=still),
        lambda count: still(spread_evenly(images.train if images.val is None else images.val, count)),
        precision.autocast(numerics.device, numerics.precision),
        numerics.device,
        folder,
        write=write_if_possible(teller),
        teller=teller,
    )


def _still_data(recipe: Recipe, source: Source, plan: LoadingPlan) -> EvaluationData:
    """The images of a source as evaluators see them, normalised as the training images."""
    unlabelled = int((source.labels < 0).sum())
    facts = replace(plan.facts, classes=source.classes, samples=len(source), unlabelled=unlabelled)
    resize = recipe.data.eval_resize or recipe.data.image_size
    return EvaluationData(replace(plan, source=source, facts=facts), resize=resize)


def training_data(
    recipe: Recipe, plan: LoadingPlan, timeline: Timeline, method: Method, directory: RunDirectory, world: World
) -> TrainingData:
    """The training images as the loop sees them: this process's part of every batch."""
    trail = Trail.from_environment()
    images = plan.source
    source = watch(images, trail, directory.excluded)
    return TrainingData(
        replace(plan, source=source, rank=world.rank, world=world.size),
        [method.views(stage.image_size) for stage in timeline.stages],
        Order(seed=recipe.seed, labels=images.labels, timeline=timeline, drop_last=recipe.data.drop_last),
        Quarantine(directory.quarantine, total=len(images), limit=recipe.data.max_unreadable),
        trail,
    )


def num_workers(recipe: Recipe) -> int:
    """The processes that read the images of a recipe; 0 if the training process reads them."""
    wanted = recipe.data.workers
    return num_cores() if wanted == "auto" else wanted


def loading_plan(
    recipe: Recipe, images: Images, numerics: Numerics, teller: Teller, stop: StopRequest | None = None
) -> LoadingPlan:
    """The path of the training images to the device; that of others differs in `source` and `facts`."""
    wanted = recipe.data
    return LoadingPlan(
        source=images.train,
        facts=images.facts,
        device=numerics.device,
        workers=num_workers(recipe),
        prefetch=wanted.prefetch,
        resident=wanted.resident,
        channels_last=numerics.channels_last,
        teller=teller,
        stop=stop,
    )
