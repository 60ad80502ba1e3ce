"""The plan of a run: its stages, steps, time and disk, from a few measured steps and without training."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from opsin.clock.timeline import Stage
from opsin.evaluation.features import FeatureScoreConfig
from opsin.reporting.console import duration
from opsin.run.assemble import plan_agenda
from opsin.run.images import Images
from opsin.run.pace import Pace, measure_pace
from opsin.run.parts import build_parts
from opsin.run.recipe import Recipe
from opsin.storage.table import aligned
from opsin.storage.teller import Teller
from opsin.training.checkpoints.checkpoints import most_checkpoints

_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage of the plan."""

    name: str
    image_size: int
    batch_size: int
    epochs: float
    steps: int
    images_per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it is trained."""

    stages: tuple[StagePlan, ...]
    start_s: float
    """Seconds before the first update."""
    scores_s: float
    """Seconds of all evaluations."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    checkpoints: int
    """Checkpoints that are kept, with the one that is being written."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.start_s + sum(stage.seconds for stage in self.stages) + self.scores_s

    def as_dict(self) -> dict[str, object]:
        """The plan for programs."""
        return {**asdict(self), "seconds": self.seconds}

    def lines(self) -> list[str]:
        """The plan for people."""
        rows = [("stage", "px", "batch", "epochs", "steps", "images/s", "time")]
        rows += [
            (
                stage.name,
                str(stage.image_size),
                str(stage.batch_size),
                f"{stage.epochs:g}",
                f"{stage.steps:,}",
                f"{stage.images_per_s:,.0f}",
                duration(stage.seconds),
            )
            for stage in self.stages
        ]
        disk = self.checkpoints * self.checkpoint_bytes / 2**20
        return [
            *aligned(rows, 1),
            f"about {duration(self.seconds)} in all, {duration(self.start_s)} before the first step, "
            f"{duration(self.scores_s)} for scores",
            f"disk: {disk:,.0f} MiB for {self.checkpoints} checkpoints of {self.checkpoint_bytes / 2**20:,.1f} MiB",
        ]


def plan_run(recipe: Recipe, teller: Teller) -> Plan:
    """Measure some steps of each stage of `recipe`.

    Raises:
        ConfigError: settings do not fit together, the data, or this machine.
        DataError: the images cannot be used.
    """
    parts = build_parts(recipe, teller)
    agenda = plan_agenda(recipe, parts.timeline)
    stages: list[StagePlan] = []
    paces: list[Pace] = []
    for number, stage in enumerate(parts.timeline.stages):
        pace = measure_pace(recipe, _SECONDS, stage=number, images=parts.images)
        paces.append(pace)
        stages.append(_stage(stage, pace))
    cut = agenda.last_step / parts.timeline.total_steps  # limits.steps ends a run early
    if cut < 1:
        stages = list(_cut(stages, agenda.last_step))
    scored = dict.fromkeys(recipe.evaluators, 0)
    for step in range(agenda.last_step + 1):
        for name in agenda.scores(step):
            scored[name] += 1
    scores_s = sum(
        times * _images_of(recipe, name, parts.images) / paces[-1].encoded_per_s for name, times in scored.items()
    )
    kept = most_checkpoints(recipe.checkpoints, agenda)
    return Plan(tuple(stages), paces[0].start_s, scores_s, paces[-1].state_bytes, kept)


def _stage(stage: Stage, pace: Pace) -> StagePlan:
    seconds = stage.steps * stage.batch_size / pace.images_per_s
    return StagePlan(
        stage.name, stage.image_size, stage.batch_size, stage.passes, stage.steps, pace.images_per_s, seconds
    )


def _cut(stages: Sequence[StagePlan], steps: int) -> Iterator[StagePlan]:
    """The first `steps` steps of the stages."""
    for stage in stages:
        share = min(steps, stage.steps) / stage.steps
        if share > 0:
            yield replace(
                stage, steps=min(steps, stage.steps), epochs=stage.epochs * share, seconds=stage.seconds * share
            )
        steps = max(0, steps - stage.steps)


def _images_of(recipe: Recipe, evaluator: str, images: Images) -> int:
    """The images that an evaluation encodes."""
    scored = 0 if images.val is None else len(images.val)
    wanted = recipe.evaluators[evaluator]
    if not isinstance(wanted, FeatureScoreConfig):
        return scored
    bank = min(len(images.train), wanted.bank_images or len(images.train))
    return bank + min(scored, wanted.query_images or scored)
