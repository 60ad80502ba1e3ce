"""Stages: from the recipe to the timeline and the layers of a run."""

from collections.abc import Sequence
from typing import Protocol

from pydantic import Field

from opsin.clock.schedule import Schedule
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Source
from opsin.data.config import DataConfig
from opsin.data.order import check_share, class_share, steps_per_epoch
from opsin.errors import ConfigError
from opsin.methods.base import Method
from opsin.settings.family import Settings
from opsin.storage.teller import Teller
from opsin.training.freeze import LayerFreezer


class StageConfig(Settings):
    """A part of the run with settings of its own; settings that are left out are those of the recipe."""

    name: str | None = None
    """The name in logs and plots; null for `stage 1` and so on."""
    epochs: float = Field(gt=0)
    """Passes over the images of this stage."""
    image_size: int | None = Field(None, gt=0)
    """Side of the training images in pixels; scores always use `data.image_size`."""
    batch_size: int | None = Field(None, gt=0)
    """Images per update."""
    data_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the images of each class; a larger share contains the images of a smaller one."""
    lr_scale: float = Field(1.0, gt=0)
    """Factor on every learning rate."""
    mix: bool = True
    """True if images are mixed as `method.mix` says."""
    label_smoothing: float | None = Field(None, ge=0, lt=1)
    """Label smoothing of this stage; null for `method.label_smoothing`."""
    train: tuple[str, ...] = ("*",)
    """Patterns of the names of parameters that learn (`head.*`, `backbone.blocks.1*`); the others are frozen."""


class Timed(Protocol):
    """The keys of a recipe that determine its steps."""

    @property
    def stages(self) -> Sequence[StageConfig]: ...

    @property
    def epochs(self) -> float | None: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulate(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def data(self) -> DataConfig: ...


def plan_time(recipe: Timed, source: Source, teller: Teller) -> Timeline:
    """Return the stages of the run, and with them its steps.

    Raises:
        ConfigError: fewer images than a batch, or a share of the data that leaves a class empty.
    """
    wanted = recipe.stages
    if not wanted:
        assert recipe.epochs is not None, "the recipe checks it"
        wanted = [StageConfig(name="whole run", epochs=recipe.epochs)]
    total = sum(stage.epochs for stage in wanted)
    stretch = 1.0 if recipe.epochs is None else recipe.epochs / total
    if stretch != 1:
        teller.notice(f"stages: {total:g} epochs in all, stretched to {recipe.epochs:g} (epochs)")
    return Timeline([_stage(recipe, number, stage, stretch, source) for number, stage in enumerate(wanted)])


def _stage(recipe: Timed, number: int, wanted: StageConfig, stretch: float, source: Source) -> Stage:
    prefix = f"stages.{number}." if recipe.stages else ""
    batch_size = wanted.batch_size or recipe.batch_size
    size_key = f"{prefix if wanted.batch_size else ''}batch_size"
    if recipe.accumulate > batch_size:
        where = f" ({size_key})" if wanted.batch_size else ""
        raise ConfigError(
            f"accumulate={recipe.accumulate}: a batch of {batch_size} images{where} cannot be split into "
            f"{recipe.accumulate} parts; use accumulate={batch_size} or less"
        )
    check_share(source.labels, wanted.data_fraction, source.classes, key=f"{prefix}data_fraction")
    share = f" in {prefix}data_fraction={wanted.data_fraction:g}" if wanted.data_fraction < 1 else ""
    samples = len(class_share(source.labels, wanted.data_fraction, recipe.seed))
    return Stage(
        epochs=wanted.epochs * stretch,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch(
            samples, batch_size, drop_last=recipe.data.drop_last, key=size_key, share=share
        ),
        name=wanted.name or f"stage {number + 1}",
        image_size=wanted.image_size or recipe.data.image_size,
        data_fraction=wanted.data_fraction,
        lr_scale=wanted.lr_scale,
        mix=wanted.mix,
        label_smoothing=wanted.label_smoothing,
        train=wanted.train,
    )


def plan_stages(schedule: Schedule, timeline: Timeline, method: Method) -> LayerFreezer:
    """Return the freezer of the layers of each stage; `schedule` is that of the optimizer.

    Raises:
        ConfigError: the network cannot take a stage's images, or a pattern matches no layer.
    """
    freezer = LayerFreezer(method)
    schedules = {"optim.schedule": schedule, **method.schedules()}
    for number, stage in enumerate(timeline.stages):
        for key, schedule in schedules.items():
            if schedule.over == "stage" and schedule.warmup_epochs >= stage.passes:
                raise ConfigError(
                    f"{key}.warmup_epochs={schedule.warmup_epochs:g}: stage {number + 1} has {stage.passes:g} "
                    "epochs, all of it warm-up; make it shorter, or the stage longer"
                )
        method.backbone.check_size(stage.image_size, key=f"stages.{number}.image_size")
        freezer.check(stage.train, key=f"stages.{number}.train")
    return freezer
