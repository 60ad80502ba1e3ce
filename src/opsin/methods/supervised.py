"""Supervised classification: cross-entropy with label smoothing on labelled images.

Label smoothing: Szegedy et al. 2016, section 7. Padded crops: He et al. 2016, section 4.2. Random
resized crops: Szegedy et al. 2015, section 6.
Shapes: B images of a part, C channels, S side in pixels, D width, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from opsin.data.base import Augment
from opsin.data.views.colour import ColorJitter, Cutout, Grayscale, RandomErasing
from opsin.data.views.crops import CenterCrop, Crop, PadCrop, RandomResizedCrop, WindowCrop
from opsin.data.views.mix import Mix
from opsin.data.views.randaugment import RandAugment
from opsin.errors import ConfigError
from opsin.methods.base import Batch, Clock, DataFacts, Losses, Method, MethodConfig, ParamGroup, Views, split_by_decay
from opsin.nn.backbone import ModelConfig
from opsin.nn.heads import Classifier
from opsin.settings.family import Range, Settings


class MixConfig(Settings):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), drawn for each image."""

    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution of Mixup's shares; 0 disables Mixup."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution of CutMix's shares; 0 disables CutMix."""
    p: float = Field(1.0, ge=0, le=1)
    """Probability that an image is mixed."""
    cutmix_share: float = Field(0.5, ge=0, le=1)
    """Share of CutMix among the mixed images, if both are enabled."""
    until: float = Field(1.0, gt=0, le=1)
    """Share of the run in which images are mixed."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of mixed images, instead of the method's own."""


class SupervisedViews(Settings):
    """Crop and colours of a training image."""

    crop: Literal["resized", "padded", "window", "center"] = "resized"
    """Crop: `resized` is a random rectangle, `padded` is shifted over a padded border, `window` is `padded` without
    resizing, so that smaller training images show a part, `center` is the centre."""
    scale: Range = (0.08, 1.0)
    """Share of the image's area in a `resized` crop, from and to."""
    ratio: Range = (0.75, 4 / 3)
    """Width over height of a `resized` crop, from and to."""
    padding_px: int = Field(4, ge=0)
    """Border of a `padded` or `window` crop in pixels."""
    padding: Literal["zero", "reflect"] = "zero"
    """Content of this border: zeros, or the mirrored image."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation when a crop is resized."""
    flip: Literal["none", "random", "alternate"] = "random"
    """Mirroring left to right; `alternate` mirrors each image in every second epoch."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Strength of the random brightness."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Strength of the random contrast."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Strength of the random saturation."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Strength of the random hue, in turns of the colour circle."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Probability that an image becomes grey."""
    randaugment_ops: int = Field(0, ge=0)
    """Number of operations of RandAugment on each image; 0 disables it."""
    randaugment_magnitude: int = Field(9, ge=0, le=30)
    """Strength of each operation of RandAugment, 0 to 30."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle is erased."""
    cutout_px: int = Field(0, ge=0)
    """Side in pixels of a square that is blanked at a random position; 0 disables it."""

    def build(self, image_size: int, mix: MixConfig | None = None) -> Views:
        """One view named `image`."""
        views = Views(crops={"image": self._crop(image_size)}, augment={"image": self._augment()})
        if mix is None:
            return views
        op = Mix(mixup=mix.mixup, cutmix=mix.cutmix, p=mix.p, cutmix_share=mix.cutmix_share)
        return replace(views, mix=op, mix_until=mix.until)

    def _crop(self, size: int) -> Crop:
        if self.crop in ("padded", "window"):
            kind = PadCrop if self.crop == "padded" else WindowCrop
            return kind(size=size, flip=self.flip, padding=self.padding, padding_px=self.padding_px)
        if self.crop == "center":
            return CenterCrop(size=size, flip=self.flip, resize=size, interpolation=self.interpolation)
        return RandomResizedCrop(
            size=size, flip=self.flip, scale=self.scale, ratio=self.ratio, interpolation=self.interpolation
        )

    def _augment(self) -> list[Augment]:
        ops: list[Augment] = []
        if self.randaugment_ops:
            ops.append(RandAugment(num_ops=self.randaugment_ops, magnitude=self.randaugment_magnitude))
        if self.brightness or self.contrast or self.saturation or self.hue:
            strengths = self.model_dump(include={"brightness", "contrast", "saturation", "hue"})
            ops.append(ColorJitter(**strengths))
        if self.grayscale:
            ops.append(Grayscale(p=self.grayscale))
        if self.erasing:
            ops.append(RandomErasing(p=self.erasing))
        if self.cutout_px:
            ops.append(Cutout(size_px=self.cutout_px))
        return ops


class SupervisedConfig(MethodConfig):
    """Classification with labels."""

    name: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the classifier."""
    head_lr_factor: float = Field(1.0, gt=0)
    """Learning rate of the classifier, as a multiple of the backbone's."""
    head_scale: float = Field(1.0, gt=0)
    """Factor on the class scores."""
    head_bias: bool = True
    """Add a bias to the class scores."""
    views: SupervisedViews = SupervisedViews()
    """Crop and colours of training images."""
    mix: MixConfig | None = None
    """Mixing of images and labels in pairs; null disables it."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "Supervised":
        if not facts.classes:
            raise ConfigError(
                "data.path: these images have no labels, which method.name=supervised needs; "
                "put each class into a folder of its own, or list path and label in a CSV file"
            )
        if len(facts.classes) == 1:
            raise ConfigError(
                f"data.path: {facts.classes[0]!r} is the only class; a classifier needs at least two folders"
            )
        if facts.unlabelled:
            raise ConfigError(
                f"data.path: {facts.unlabelled} of the {facts.samples} training images have no label, which "
                "method.name=supervised needs; label them, or take them out of the list"
            )
        return Supervised(self, model, facts)


class Supervised(Method):
    """A backbone and a linear classifier."""

    def __init__(self, config: SupervisedConfig, model: ModelConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = model.build(image_size=facts.image_size, channels=facts.channels)
        self.head = Classifier(
            self.backbone.width,
            len(facts.classes),
            dropout=config.head_dropout,
            scale=config.head_scale,
            bias=config.head_bias,
        )

    def views(self, image_size: int) -> Views:
        return self.config.views.build(image_size, self.config.mix)

    def prepare(self, first_batch: Callable[[], Batch]) -> None:
        self.backbone.prepare(lambda: first_batch().views["image"][0])

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        logits = self.logits(batch.views["image"][0]).float()  # [B, K]
        labels, blend = batch.labels, batch.blend
        smoothing = self._smoothing(clock, mixed=blend is not None)
        if blend is None:
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        else:
            # Cross-entropy is linear in its target: for a mixture it is the mixture of both.
            own, other = (
                F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
                for target in (labels, blend.labels)
            )
            loss = (blend.shares * own + (1 - blend.shares) * other).mean()
            labels = torch.where(blend.shares >= 0.5, labels, blend.labels)
        correct = (logits.detach().argmax(1) == labels).float().mean()
        return Losses(loss, measures={"top1": correct})

    def _smoothing(self, clock: Clock, *, mixed: bool) -> float:
        if mixed and self.config.mix is not None:
            return self.config.mix.label_smoothing
        own = clock.stage.label_smoothing
        return self.config.label_smoothing if own is None else own

    def param_groups(self) -> Sequence[ParamGroup]:
        return [
            *split_by_decay(self.backbone, name="backbone.", hidden=True),
            *split_by_decay(self.head, name="head.", lr_factor=self.config.head_lr_factor),
        ]

    def logits(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of normalised images."""
        scores: Tensor = self.head(self.encode(images).pooled)
        return scores
