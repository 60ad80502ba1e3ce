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
from opsin.methods.base import (
    Batch,
    Clock,
    DataFacts,
    Losses,
    Method,
    MethodConfig,
    ParamGroup,
    Views,
    split_by_decay,
)
from opsin.nn.backbone import ModelConfig
from opsin.nn.heads import Classifier
from opsin.settings.family import Range, Settings


class MixConfig(Settings):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), drawn for each image."""

    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution of Mixup's shares; 0 for no Mixup."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution of CutMix's shares; 0 for no CutMix."""
    p: float = Field(1.0, ge=0, le=1)
    """Probability that an image is mixed."""
    cutmix_share: float = Field(0.5, ge=0, le=1)
    """Share of CutMix among the mixed images, where both are on."""
    until: float = Field(1.0, gt=0, le=1)
    """Share of the run after which nothing is mixed any more."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Takes the place of the method's while images are mixed."""


class SupervisedViews(Settings):
    """How a training image is cut and coloured."""

    crop: Literal["resized", "padded", "window", "center"] = "resized"
    """`resized`: a random rectangle; `padded`: shifted over a padded border; `window`: the same, never resized, so that
    smaller training images show a part; `center`: always the centre."""
    scale: Range = (0.08, 1.0)
    """Share of the image's area in a `resized` crop, from and to."""
    ratio: Range = (0.75, 4 / 3)
    """Width over height of a `resized` crop, from and to."""
    padding_px: int = Field(4, ge=0)
    """Border of a `padded` or `window` crop in pixels."""
    padding: Literal["zero", "reflect"] = "zero"
    """What this border shows."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How a crop is resized."""
    flip: Literal["none", "random", "alternate"] = "random"
    """Mirror left to right; `alternate` mirrors each image in every second epoch."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Strength of the random brightness."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Strength of the random contrast."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Strength of the random saturation."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Strength of the random hue, in turns of the colour circle."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Probability of a grey image."""
    randaugment_ops: int = Field(0, ge=0)
    """Operations of RandAugment that an image goes through; 0 for none."""
    randaugment_magnitude: int = Field(9, ge=0, le=30)
    """Strength of each of them, 0 to 30."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle is erased."""
    cutout_px: int = Field(0, ge=0)
    """Side of a square that is blanked out at a random place; 0 for none."""

    def build(self, image_size: int, mix: MixConfig | None = None) -> Views:
        """One view named `image`."""
        views = Views(crops={"image": self._crop(image_size)}, augment={"image": self._augment()})
        if mix is None:
            return views
        op = Mix(mixup=mix.mixup, cutmix=mix.cutmix, p=mix.p, cutmix_share=mix.cutmix_share)
        return replace(views, mix=op, mix_until=mix.until)

    def _crop(self, size: int) -> Crop:
        if self.crop == "padded":
            return PadCrop(size=size, flip=self.flip, padding=self.padding, padding_px=self.padding_px)
        if self.crop == "window":
            return WindowCrop(size=size, flip=self.flip, padding=self.padding, padding_px=self.padding_px)
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
            ops.append(
                ColorJitter(
                    brightness=self.brightness, contrast=self.contrast, saturation=self.saturation, hue=self.hue
                )
            )
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
    """Learning rate of the classifier over that of the backbone."""
    head_scale: float = Field(1.0, gt=0)
    """Factor on the class scores."""
    head_bias: bool = True
    """Whether the classifier adds a bias."""
    views: SupervisedViews = SupervisedViews()
    """Crops and colour."""
    mix: MixConfig | None = None
    """Images and labels mixed in pairs; null for none."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "Supervised":
        if not facts.classes:
            raise ConfigError(
                "data.path: these images have no labels, which method.name=supervised needs; "
                "put each class into a folder of its own, or list path and label in a CSV file"
            )
        if len(facts.classes) == 1:
            raise ConfigError(
                f"data.path: there is only one class, {facts.classes[0]!r}; a classifier needs at least two folders"
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
            # Cross-entropy is linear in its target: that of the mixture is the mixture of both.
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
