"""All images of a path, with one numbering over its splits.

Shapes: N images of a collection.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opsin.data.base import Source
from opsin.data.config import DataConfig
from opsin.data.sources.files import Files, find_images
from opsin.data.sources.labels import TRAIN, VALIDATION, Labels, choose_validation
from opsin.data.sources.open import open_sources
from opsin.errors import DataError


class ImageLocation(NamedTuple):
    """An image as number `inside` of the source that is split number `split`."""

    split: int
    source: Source
    inside: int


@dataclass(frozen=True)
class Collection:
    """The splits of a path, one after the other; itself a `Source`. A path without splits has one, named `train`."""

    name: str
    said: str
    """A sentence on the images that were found."""
    splits: tuple[str, ...]
    sources: tuple[Source, ...]
    classes: tuple[str, ...]
    labels: Tensor
    """int64 [N], -1 is unlabelled."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def split_numbers(self) -> Tensor:
        """The split of each image: int64 [N]."""
        return torch.repeat_interleave(torch.tensor([len(source) for source in self.sources]))

    def locate(self, index: int) -> ImageLocation:
        """Return the split and source of image `index`."""
        for split, source in enumerate(self.sources):
            if index < len(source):
                return ImageLocation(split, source, index)
            index -= len(source)
        raise IndexError(index)

    def read(self, index: int) -> Tensor:
        """Return the image as uint8 [3, H, W]."""
        _, source, inside = self.locate(index)
        return source.read(inside)

    def location(self, index: int) -> str:
        """The location of the image in its source."""
        _, source, inside = self.locate(index)
        return source.location(inside)

    def class_name(self, label: int) -> str:
        """Return the name of a class; `unlabelled` for -1."""
        return self.classes[label] if label >= 0 else "unlabelled"

    def path(self, index: int) -> Path | None:
        """Return the file of an image; None if it is not stored as a file."""
        _, source, inside = self.locate(index)
        return Path(source.location(inside)) if isinstance(source, Files) else None

    def check_outside(self, out: Path) -> None:
        """Refuse a folder `out` whose files would become part of these images.

        Raises:
            DataError: `out` is the folder of the images, or is inside it.
        """
        root = Path(os.path.expanduser(self.name))
        if root.is_dir() and out.resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"{out}: lies inside {self.name}, whose images would then be found twice; choose another --out"
            )


def open_collection(
    path: str, *, labels: Labels = "auto", image_column: str | None = None, label_column: str | None = None
) -> Collection:
    """Open the images of any `data.path`.

    Of a folder with more splits than training needs (train, val and test), all are opened.

    Raises:
        DataError: the path is missing, empty, unclear or damaged.
    """
    cache = Path(os.path.expanduser(DataConfig.model_fields["cache"].default))
    opened = open_sources(path, labels=labels, image_column=image_column, label_column=label_column, cache=cache)
    found = {TRAIN: opened.train}
    if opened.val is not None:
        found["validation"] = opened.val
        if opened.kind == "folder":
            found |= _unused_splits(Path(os.path.expanduser(path)), labels, cache)
    classes = list(opened.train.classes)
    for source in found.values():
        classes += [name for name in source.classes if name not in classes]
    return Collection(
        name=path,
        said=opened.said,
        splits=tuple(found),
        sources=tuple(found.values()),
        classes=tuple(classes),
        labels=torch.cat([_renumber(source, classes) for source in found.values()]),
    )


def _unused_splits(path: Path, labels: Labels, cache: Path) -> dict[str, Source]:
    """Open the folders that are splits, but neither the training nor the validation folder."""
    folders = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()}
    chosen = choose_validation(folders)
    rest = {name: folders[name] for name in VALIDATION if name in folders and name != chosen}
    return {
        name: open_sources(str(folder), kind="folder", labels=labels, cache=cache).train
        for name, folder in rest.items()
        if next(find_images(folder), None) is not None
    }


def _renumber(source: Source, classes: list[str]) -> Tensor:
    """Return the labels of a source as numbers of `classes`."""
    numbers = torch.tensor([*(classes.index(name) for name in source.classes), -1])
    return numbers[source.labels]
