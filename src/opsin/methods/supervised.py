"""Supervised classification: cross-entropy with label smoothing on labelled images.

Label smoothing: Szegedy et al. 2016, section 7. Padded crops: He et al. 2016, section 4.2. Random
resized crops: Szegedy et al. 2015, section 6.
Shapes: B images of a part, C channels, S side in pixels, D width, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from opsin.config import Settings
from opsin.data.augment import ColorJitter, Cutout, Grayscale, RandomErasing
from opsin.data.base import Augment
from opsin.data.crops import CenterCrop, Crop, PadCrop, RandomResizedCrop
from opsin.errors import ConfigError
from opsin.methods.base import (
    Batch,
    Clock,
    DataFacts,
    Losses,
    Method,
    MethodConfig,
    ParamGroup,
    Tokens,
    Views,
    split_by_decay,
)
from opsin.nn.backbone import ModelConfig
from opsin.nn.heads import Classifier


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high:
        raise ValueError(f"[{low:g}, {high:g}] does not fit; must be two numbers above 0, the smaller one first")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_check_range)]


class SupervisedViews(Settings):
    """How a training image is cut and coloured."""

    crop: Literal["resized", "padded", "center"] = "resized"
    """`resized`: a random rectangle; `padded`: shifted over a padded border; `center`: always the centre."""
    scale: Range = (0.08, 1.0)
    """Share of the image's area in a `resized` crop, from and to."""
    ratio: Range = (0.75, 4 / 3)
    """Width over height of a `resized` crop, from and to."""
    padding_px: int = Field(4, ge=0)
    """Border of a `padded` crop in pixels."""
    padding: Literal["zero", "reflect"] = "zero"
    """What the border of a `padded` crop shows."""
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
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle is erased."""
    cutout_px: int = Field(0, ge=0)
    """Side of a square that is blanked out at a random place; 0 for none."""

    def build(self, image_size: int) -> Views:
        """One view named `image`."""
        return Views(crops={"image": self._crop(image_size)}, augment={"image": self._augment()})

    def _crop(self, size: int) -> Crop:
        if self.crop == "padded":
            return PadCrop(size=size, flip=self.flip, padding=self.padding, padding_px=self.padding_px)
        if self.crop == "center":
            return CenterCrop(size=size, flip=self.flip, resize=size, interpolation=self.interpolation)
        return RandomResizedCrop(
            size=size, flip=self.flip, scale=self.scale, ratio=self.ratio, interpolation=self.interpolation
        )

    def _augment(self) -> list[Augment]:
        ops: list[Augment] = []
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
        return Supervised(self, model, facts)


class Supervised(Method):
    """A backbone and a linear classifier."""

    def __init__(self, config: SupervisedConfig, model: ModelConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.image_size = facts.image_size
        self.backbone = model.build(image_size=facts.image_size, channels=facts.channels)
        self.head = Classifier(
            self.backbone.width,
            len(facts.classes),
            dropout=config.head_dropout,
            scale=config.head_scale,
            bias=config.head_bias,
        )

    def views(self) -> Views:
        return self.config.views.build(self.image_size)

    def prepare(self, first_batch: Callable[[], Batch]) -> None:
        self.backbone.prepare(lambda: first_batch().views["image"][0])

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        images, labels = batch.views["image"][0], batch.labels  # [B, C, S, S], [B]
        logits = self.logits(images).float()  # [B, K]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        correct = (logits.detach().argmax(1) == labels).float().mean()
        return Losses(loss, measures={"top1": correct})

    def param_groups(self) -> Sequence[ParamGroup]:
        return [
            *split_by_decay(self.backbone, name="backbone.", hidden=True),
            *split_by_decay(self.head, name="head.", lr_factor=self.config.head_lr_factor),
        ]

    def encode(self, images: Tensor) -> Tokens:
        tokens: Tokens = self.backbone(images)
        return tokens

    def logits(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of normalised images."""
        scores: Tensor = self.head(self.encode(images).pooled)
        return scores
