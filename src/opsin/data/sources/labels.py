"""Labels as class numbers, and the words by which stored data names its training and validation images."""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opsin.data.base import Source
from opsin.errors import DataError

Labels = Literal["auto", "folders", "none"]
"""Labels as in `data.labels`: `auto`, the first folder below the root, or none."""

TRAIN = "train"
VALIDATION = ("val", "valid", "validation", "test")
"""Names of a validation split, the preferred one first."""

_SPLIT_WORD = re.compile(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])")


@dataclass(frozen=True)
class Opened:
    """The images of a path. `val` is None without validation images; `said` is one sentence for the user."""

    kind: str
    train: Source
    val: Source | None
    said: str


def choose_validation(splits: Container[str]) -> str | None:
    """Return the split to validate on: the first of `VALIDATION` that is there."""
    return next((name for name in VALIDATION if name in splits), None)


def split_in_name(name: str) -> str | None:
    """Return the split in a file name: `train` for `train-00000-of-00002.parquet`."""
    found = _SPLIT_WORD.search(name.lower())
    return found.group(1) if found else None


def describe(found: str, train: Source, val: Source | None, *notes: str) -> str:
    """Return `FOUND: 120 training images, 30 validation images`, then the notes that are not empty."""
    counts = counted(len(train), "training image")
    counts += ", no validation images" if val is None else f", {counted(len(val), 'validation image')}"
    return "; ".join([f"{found}: {counts}", *filter(None, notes)])


def counted(number: int, noun: str) -> str:
    """Return `1 image`, `1,200 images`, `2 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def find_classes(names: Iterable[str | None]) -> tuple[str, ...]:
    """Return every class once, sorted, in numeric order if all are whole numbers. None is not a class."""
    distinct = {name for name in names if name is not None}
    if all(name.isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def index_labels(names: Sequence[str | None], classes: Sequence[str], location: str) -> Tensor:
    """Return class numbers int64 [N]; None becomes -1, unlabelled.

    Raises:
        DataError: a name is not among `classes`, those of the training images.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    numbers[None] = -1
    unknown = find_classes(name for name in set(names) if name not in numbers)
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise DataError(
            f"{location}: validation images of classes without training images ({shown}; {len(unknown)} in all); "
            f"both splits need the same classes: add training images, or remove these validation images"
        )
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)


def no_labels(count: int) -> Tensor:
    """Return -1 for each of `count` images: int64 [N]."""
    return torch.full((count,), -1, dtype=torch.int64)
