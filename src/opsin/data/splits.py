"""Which images train and which validate, as the stored data says it."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from opsin.data.base import Source

Labels = Literal["auto", "folders", "none"]
"""`auto` finds out; `folders`: the first folder below the root is the class; `none`: labels are not used."""

TRAIN = "train"
VALIDATION = ("val", "valid", "validation", "test")
"""Names of a validation split, the preferred one first."""

_SPLIT_WORD = re.compile(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])")


@dataclass(frozen=True)
class Opened:
    """What a path holds. `val` is None where nothing is set apart; `said` is one sentence for the user."""

    kind: str
    train: Source
    val: Source | None
    said: str


def choose_validation(splits: Container[str]) -> str | None:
    """The split to validate on: the first of `VALIDATION` that is there."""
    return next((name for name in VALIDATION if name in splits), None)


def split_in_name(name: str) -> str | None:
    """The split that a file name states: `train` for `train-00000-of-00002.parquet`."""
    found = _SPLIT_WORD.search(name.lower())
    return found.group(1) if found else None


def describe(found: str, train: Source, val: Source | None, *notes: str) -> str:
    """`FOUND: 120 training images, 30 validation images`, then the notes that are not empty."""
    counts = counted(len(train), "training image")
    counts += ", no validation images" if val is None else f", {counted(len(val), 'validation image')}"
    return "; ".join([f"{found}: {counts}", *filter(None, notes)])


def counted(number: int, noun: str) -> str:
    """`1 image`, `1,200 images`, `2 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
