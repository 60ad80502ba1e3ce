"""DINO: from parts of an image, a student predicts the output of its slow copy, the teacher, for large crops.

Caron et al. 2021, https://arxiv.org/abs/2104.14294. The published settings are the recipe `dino-imagenet-vits16`.
Rates that the paper gives per update are per image here, so that the batch size is a matter of speed.

Shapes: B images of a part, S side of a view in pixels, D width, d bottleneck, K prototypes, V student views (two
global ones first), G = 2 teacher views.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.profiler import record_function

from opsin.clock.schedule import cosine, linear
from opsin.data.base import Augment
from opsin.data.views.colour import ColorJitter, GaussianBlur, Grayscale, Solarize
from opsin.data.views.crops import Crop, RandomResizedCrop
from opsin.errors import ConfigError
from opsin.methods.base import Batch, Clock, DataFacts, Losses, Method, MethodConfig, ParamGroup, Views, split_by_decay
from opsin.nn.backbone import Backbone, ModelConfig
from opsin.nn.ema import follow
from opsin.nn.heads import Projector
from opsin.nn.prototypes import Prototypes, Targets, cross_entropy, teacher_targets
from opsin.processes.world import add_over_processes
from opsin.settings.family import Range, Settings

Share = Annotated[float, Field(ge=0, le=1)]
_GLOBAL = ("global_1", "global_2")
_SLOW_ENOUGH = 0.8
"""Smallest momentum of a teacher per update; below it, the teacher copies the student."""


# By the largest number of images. Few images support few prototypes, and their fewer updates a faster teacher.
_AUTO = {
    20_000: {"prototypes": 1024, "teacher_temperature": 0.04, "momentum": 0.99},
    100_000: {"prototypes": 4096, "teacher_temperature": 0.04, "momentum": 0.99},
    500_000: {"prototypes": 16384, "teacher_temperature": 0.05, "momentum": 0.994},
    math.inf: {"prototypes": 65536, "teacher_temperature": 0.07, "momentum": 0.996},
}


class DinoViews(Settings):
    """Two large crops for teacher and student, and small ones for the student alone."""

    global_scale: Range = (0.4, 1.0)
    """Share of the image's area in a large crop, from and to."""
    local_scale: Range = (0.05, 0.4)
    """Share of the image's area in a small crop, from and to."""
    local_count: int = Field(8, ge=0)
    """Small crops of each image."""
    local_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Side of a small crop in pixels; `auto` is 3/7 of the large ones, in whole patches."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation when a crop is resized."""
    flip: Literal["none", "random"] = "random"
    """Mirroring left to right: never, or with probability 0.5."""
    jitter: Share = 0.8
    """Probability that brightness, contrast, saturation and hue change."""
    brightness: Share = 0.4
    """Strength of the random brightness."""
    contrast: Share = 0.4
    """Strength of the random contrast."""
    saturation: Share = 0.2
    """Strength of the random saturation."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Strength of the random hue, in turns of the colour circle."""
    grayscale: Share = 0.2
    """Probability that a view becomes grey."""
    blur: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)
    """Probability of blur in the first large crop, the second, and each small one."""
    blur_px: Range = (0.1, 2.0)
    """Width of the blur in pixels, from and to."""
    solarize: Share = 0.2
    """Probability that the bright values of the second large crop are inverted."""

    def build(self, image_size: int, local_size: int) -> Views:
        """The views `global_1`, `global_2` and `local`."""
        large = RandomResizedCrop(
            size=image_size, scale=self.global_scale, flip=self.flip, interpolation=self.interpolation
        )
        crops: dict[str, Crop] = dict.fromkeys(_GLOBAL, large)
        augment = {
            "global_1": self._augment(self.blur[0]),
            "global_2": [*self._augment(self.blur[1]), *([Solarize(p=self.solarize)] if self.solarize else [])],
        }
        if self.local_count:
            crops["local"] = replace(large, size=local_size, scale=self.local_scale, count=self.local_count)
            augment["local"] = self._augment(self.blur[2])
        return Views(crops=crops, augment=augment)

    def _augment(self, blur: float) -> list[Augment]:
        jitter = ColorJitter(
            brightness=self.brightness, contrast=self.contrast, saturation=self.saturation, hue=self.hue, p=self.jitter
        )
        wanted: list[tuple[float, Augment]] = [
            (self.jitter, jitter),
            (self.grayscale, Grayscale(p=self.grayscale)),
            (blur, GaussianBlur(p=blur, sigma=self.blur_px)),
        ]
        return [op for p, op in wanted if p > 0]


class DinoConfig(MethodConfig):
    """Self-distillation without labels; `auto` follows from the number of images."""

    published: ClassVar[str | None] = "dino-imagenet-vits16"
    name: Literal["dino"] = "dino"
    prototypes: Annotated[int, Field(gt=1)] | Literal["auto"] = "auto"
    """Outputs of the head; `auto` is 1,024 up to 20,000 images, 65,536 from 500,000."""
    hidden: int = Field(2048, gt=0)
    """Width of the head's inner layers."""
    bottleneck: int = Field(256, gt=0)
    """Width of the unit vectors that are compared with the prototypes."""
    head_layers: int = Field(3, gt=0)
    """Linear layers before the prototypes."""
    learn_scale: bool = False
    """Learn the lengths of the prototypes; true trains faster and may be unstable."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's probabilities; lower is sharper."""
    teacher_temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Temperature of the teacher's probabilities; `auto` is 0.04 to 0.07."""
    warmup_temperature: float = Field(0.04, gt=0)
    """The teacher's temperature at the beginning."""
    warmup_temperature_epochs: int = Field(0, ge=0)
    """Epochs in which the temperature rises from `warmup_temperature` to `teacher_temperature`, once an epoch."""
    momentum: Share | Literal["auto"] = "auto"
    """Share of the teacher that remains after `momentum_batch_size` images, at the start; it ends at 1."""
    center_momentum: float = Field(0.9, ge=0, le=1)
    """Share of the centre that remains after `momentum_batch_size` images; 1 disables centring."""
    momentum_batch_size: int = Field(512, gt=0)
    """Batch size of both momenta in images; batches of another size keep the same share per image."""
    freeze_epochs: float = Field(1.0, ge=0)
    """Epochs before the prototypes begin to learn."""
    views: DinoViews = DinoViews()
    """Crops and colours of the views."""

    def settled(self, samples: int) -> "DinoConfig":
        """The same settings with numbers instead of `auto`."""
        known = next(values for images, values in _AUTO.items() if samples <= images)
        return self.model_copy(update={key: value for key, value in known.items() if getattr(self, key) == "auto"})

    def build(self, model: ModelConfig, facts: DataFacts) -> "Dino":
        return Dino(self.settled(facts.samples), model, facts)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """The teacher's output for a batch, which serves all views of the student."""

    targets: Targets
    features: Tensor
    """[G B, D]"""
    reported: bool = False
    """True if a piece of the batch has reported its measures."""


class Dino(Method):
    """Student and teacher with heads of their own; `backbone`, which is evaluated, is the teacher's."""

    center: Tensor
    pairs: Tensor
    score_sum: Tensor
    score_count: Tensor

    def __init__(self, config: DinoConfig, model: ModelConfig, facts: DataFacts) -> None:
        super().__init__()
        assert isinstance(config.prototypes, int), "settled"
        self.config = config
        self.samples = facts.samples
        self.patch: int = getattr(model, "patch", 16)
        self.student = model.build(image_size=facts.image_size, channels=facts.channels)
        self.backbone = model.without_drops().build(image_size=facts.image_size, channels=facts.channels)
        sizes = {"hidden": config.hidden, "bottleneck": config.bottleneck, "layers": config.head_layers}
        self.student_head = Projector(self.student.width, **sizes)
        self.teacher_head = Projector(self.student.width, **sizes)
        self.prototypes = Prototypes(config.bottleneck, config.prototypes, learn_scale=config.learn_scale)
        self.teacher_prototypes = Prototypes(config.bottleneck, config.prototypes)
        for part in (self.backbone, self.teacher_head, self.teacher_prototypes):
            part.requires_grad_(False)
        self.register_buffer("center", torch.zeros(config.prototypes))
        # [V, G]: 1 for each pair of a student's and a teacher's view, 0 for the same view.
        pairs = torch.ones(len(_GLOBAL) + config.views.local_count, len(_GLOBAL)).fill_diagonal_(0)
        self.register_buffer("pairs", pairs, persistent=False)
        # Scores of the current update; zero between updates, hence not in a checkpoint.
        self.register_buffer("score_sum", torch.zeros(config.prototypes), persistent=False)
        self.register_buffer("score_count", torch.zeros(()), persistent=False)
        self._copy_to_teacher_heads()
        if config.views.local_count:
            self.student.check_size(self._local_size(facts.image_size), key="method.views.local_size")

    @property
    def trained_backbone(self) -> Backbone:
        return self.student

    def views(self, image_size: int) -> Views:
        return self.config.views.build(image_size, self._local_size(image_size))

    def prepare(self, first_batch: Callable[[], Batch]) -> None:
        # Starting weights were loaded into the teacher, which is exported.
        self.backbone.prepare(lambda: first_batch().views[_GLOBAL[0]][0])
        self.student.load_state_dict(self.backbone.state_dict())
        self._copy_to_teacher_heads()

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        lesson = batch.targets if isinstance(batch.targets, _Lesson) else self._teach(batch, clock)
        with record_function("student forward"):
            features = self.student.pool_sizes(_by_size(batch.views))  # [V B, D]
            vectors = self.student_head(features)
        with record_function("loss"):
            num_pairs = len(_GLOBAL) * (len(_GLOBAL) + self.config.views.local_count - 1)
            total = cross_entropy(
                vectors.view(-1, len(batch), vectors.shape[1]),
                self.prototypes,
                lesson.targets,
                self._pairs(batch.views).to(vectors.dtype) / (num_pairs * len(batch)),
                temperature=self.config.student_temperature,
                learn=clock.epoch >= self.config.freeze_epochs,
            )
        if lesson.reported:
            return Losses(total, measures={"kl": total.detach()})
        own = features.detach()[: len(lesson.features)]  # of the large crops, which come first
        shown = {"student": own, "teacher": lesson.features[: len(own)]}
        return Losses(total, measures=self._describe(lesson.targets, total.detach()), features=shown)

    def chunks(self, batch: Batch, clock: Clock, views: int) -> Iterator[Batch]:
        """Views of one size, up to `views` at a time; the teacher sees the batch once."""
        lesson = self._teach(batch, clock)
        for names in (_GLOBAL, ("local",)):
            single = [(name, view[None]) for name in names if name in batch.views for view in batch.views[name]]
            for first in range(0, len(single), views):
                grouped: dict[str, list[Tensor]] = {}
                for name, view in single[first : first + views]:
                    grouped.setdefault(name, []).append(view)
                pieces = {name: torch.cat(group) for name, group in grouped.items()}
                yield replace(batch, views=pieces, targets=lesson)
                lesson = replace(lesson, reported=True)

    def after_update(self, clock: Clock, applied: Tensor) -> None:
        with record_function("teacher update"), torch.no_grad():
            pairs = (
                (self.backbone, self.student),
                (self.teacher_head, self.student_head),
                (self.teacher_prototypes, self.prototypes),
            )
            # Parameters only: a teacher's running statistics are its own.
            teacher = [param for part, _ in pairs for param in part.parameters()]
            student = [param for _, part in pairs for param in part.parameters()]
            follow(teacher, student, applied * (1 - self.teacher_momentum(clock)))
            add_over_processes(self.score_sum, self.score_count)
            mean = self.score_sum / self.score_count.clamp(min=1)
            self.center.lerp_(mean, applied * (1 - self._for_batch(self.config.center_momentum, clock)))
            self.score_sum.zero_()
            self.score_count.zero_()

    def param_groups(self) -> Sequence[ParamGroup]:
        return [
            *split_by_decay(self.student, name="student.", hidden=True),
            *split_by_decay(self.student_head, name="head.", hidden=True),
            *split_by_decay(self.prototypes, name="prototypes."),
        ]

    def teacher_temperature(self, clock: Clock) -> float:
        """The teacher's temperature at `clock`; it changes from epoch to epoch, as published."""
        assert not isinstance(self.config.teacher_temperature, str), "settled"
        rise = self.config.warmup_temperature_epochs
        if clock.epoch >= rise:
            return self.config.teacher_temperature
        progress = math.floor(clock.epoch) / max(rise - 1, 1)
        return linear(progress, self.config.warmup_temperature, self.config.teacher_temperature)

    def teacher_momentum(self, clock: Clock) -> float:
        """Share of the teacher that remains in the update at `clock`."""
        assert not isinstance(self.config.momentum, str), "settled"
        kept = cosine(clock.epoch / clock.total_epochs, self.config.momentum, 1.0)
        return self._for_batch(kept, clock)

    def _for_batch(self, momentum: float, clock: Clock) -> float:
        """`momentum`, which is for `momentum_batch_size` images, converted to the batch size at `clock`."""
        return float(momentum ** (clock.stage.batch_size / self.config.momentum_batch_size))

    def advice(self, finding: str, clock: Clock) -> str:
        temperature, samples = self.teacher_temperature(clock), f"{self.samples:,} images"
        if finding == "uniform_collapse":
            return (
                f"the teacher's temperature {temperature:g} is high for {samples}: "
                f"try method.teacher_temperature={temperature / 2:.2g}, or fewer method.prototypes"
            )
        kept = self.teacher_momentum(clock)
        follows = f"the teacher keeps {kept:.3g} of itself in an update: try a higher method.momentum"
        if finding == "one_prototype_collapse":
            if kept < _SLOW_ENOUGH:
                return follows
            if self.config.center_momentum == 1:
                return "nothing centres the teacher's scores: set method.center_momentum=0.9"
            return (
                f"centring does not keep up (method.center_momentum={self.config.center_momentum:g}): try a smaller "
                f"one, a lower optim.lr, or a higher method.teacher_temperature than {temperature:g}"
            )
        if finding in ("feature_collapse", "no_teacher"):
            return f"{follows}, or a lower optim.lr"
        return ""

    def _local_size(self, image_size: int) -> int:
        wanted = self.config.views.local_size
        if wanted == "auto":
            return max(round(image_size * 3 / 7 / self.patch), 1) * self.patch
        if wanted > image_size and self.config.views.local_count:
            raise ConfigError(
                f"method.views.local_size={wanted}: a small crop cannot be larger than the large ones of "
                f"{image_size} px; use a smaller number, or auto"
            )
        return wanted

    def _teach(self, batch: Batch, clock: Clock) -> _Lesson:
        with record_function("teacher forward"), torch.no_grad():
            images = torch.cat([batch.views[name] for name in _GLOBAL])  # [G, B, C, S, S]
            features = self.backbone.pool(images.flatten(0, 1))
            vectors = self.teacher_head(features).view(len(_GLOBAL), len(batch), -1)
            targets = teacher_targets(vectors, self.teacher_prototypes, self.center, self.teacher_temperature(clock))
            self.score_sum += targets.mean_scores * len(batch)
            self.score_count += len(batch)
        return _Lesson(targets, features)

    def _describe(self, targets: Targets, loss: Tensor) -> Mapping[str, Tensor]:
        entropy = targets.entropy.mean()
        winners = targets.winners.flatten()
        count = len(self.center)
        used = torch.zeros(count, device=winners.device).index_fill_(0, winners, 1).sum()
        return {
            "teacher_entropy": entropy,
            "teacher_entropy_share": entropy / math.log(count),
            "kl": loss - entropy,
            "prototypes_used": used / min(count, len(winners)),
            "winners": used,
            "center_norm": self.center.norm(),
        }

    def _pairs(self, views: Mapping[str, Tensor]) -> Tensor:
        """The rows of `pairs` for these views."""
        # All small crops have equal rows: those of a piece are as good as any.
        first = {"global_1": 0, "global_2": 1, "local": len(_GLOBAL)}
        return torch.cat([self.pairs[first[name] : first[name] + len(views[name])] for name in _ordered(views)])

    def _copy_to_teacher_heads(self) -> None:
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher_prototypes.load_state_dict(self.prototypes.state_dict())


def _ordered(views: Mapping[str, Tensor]) -> list[str]:
    return [name for name in (*_GLOBAL, "local") if name in views]


def _by_size(views: Mapping[str, Tensor]) -> list[Tensor]:
    """Images of one size together, [count B, C, S, S], in the order of the views."""
    found: dict[int, list[Tensor]] = {}
    for name in _ordered(views):
        found.setdefault(views[name].shape[-1], []).append(views[name].flatten(0, 1))
    return [torch.cat(group) for group in found.values()]
