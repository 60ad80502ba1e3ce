"""`opsin data split`: images into training, validation and test, no copy of one in two of them."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from opsin.data.curation.assignment import LEFT_OUT, SPLITS, Fractions, assign, check_classes
from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Groups, Integers, check_max_bits, group_duplicates
from opsin.data.curation.scan import scan
from opsin.data.curation.split_files import (
    DUPLICATES_FILE,
    JOINED_LIST,
    UNREADABLE_FILE,
    check_empty,
    check_folders,
    check_lists,
    whole_folder,
    write_duplicates,
    write_folders,
    write_lists,
    write_unreadable,
)
from opsin.data.sources.labels import counted
from opsin.errors import DataError
from opsin.storage.table import aligned

RECORD_FILE = "split.json"
"""How a split was made, and its counts."""

_MANY_CLASSES = 20

Layout = Literal["folders", "lists"]


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """What `opsin data split` is asked for."""

    fractions: Fractions
    seed: int = 0
    layout: Layout = "folders"
    copy: bool = False
    """Copy files where links would do."""
    max_bits: int | None = 8
    """How many of the 128 bits of two perceptual hashes may differ in a group; None: only equal pixels count."""
    merge: bool = False
    """Take images together that are in splits already."""


@dataclass(frozen=True)
class SplitReport:
    """What a split has become: counts by split and class, and the fate of the duplicates."""

    out: Path
    layout: Layout
    written: str
    splits: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    """split -> class -> images; the class of a source without labels is empty."""
    num_unreadable: int
    num_duplicate_images: int
    groups_by_split: dict[str, int]
    """split -> groups of several images."""

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "out": str(self.out),
            "counts": self.counts,
            "unreadable": self.num_unreadable,
            "duplicates": {"images": self.num_duplicate_images, "groups": self.groups_by_split},
        }

    def lines(self) -> list[str]:
        """The report for a terminal."""
        lines = _table(self.counts, self.splits)
        if self.num_duplicate_images:
            groups = counted(sum(self.groups_by_split.values()), "group")
            where = ", ".join(f"{number} in {split}" for split, number in self.groups_by_split.items() if number)
            lines.append(
                f"duplicates: {self.num_duplicate_images:,} images in {groups}, each whole in one split ({where}); "
                f"listed in {self.out / DUPLICATES_FILE}"
            )
        else:
            lines.append("duplicates: none")
        if self.num_unreadable:
            images = counted(self.num_unreadable, "unreadable image")
            lines.append(f"left out: {images}, listed in {self.out / UNREADABLE_FILE}")
        path = self.out / JOINED_LIST if self.layout == "lists" else self.out
        return [*lines, f"wrote {self.written}; train with data.path={path}"]


def split(collection: Collection, out: Path, settings: SplitSettings, *, say: Callable[[str], None]) -> SplitReport:
    """Split `collection` into the new folder `out`.

    The same images and settings give the same split, whatever the files are called and wherever they lie.

    Raises:
        DataError: `out` holds something or cannot be written, a class is too small, or the images are split already.
        ConfigError: lists are asked for and the images are no files.
    """
    _check(collection, out, settings)
    if not collection.classes:
        say("these images have no labels: they are split without regard to classes")
    looked = scan(collection, say=say)
    groups = group_duplicates(looked, max_bits=settings.max_bits)
    if doubts := groups.doubts(collection):
        say(f"warning: {doubts}")
    splits = assign(collection, looked, groups, settings.fractions, seed=settings.seed)
    names = [SPLITS[number] if number != LEFT_OUT else "" for number in splits.tolist()]
    with whole_folder(out) as folder:
        if settings.layout == "folders":
            written = write_folders(collection, splits, folder, copy=settings.copy)
        else:
            written = write_lists(collection, splits, folder, out)
        write_unreadable(looked.unreadable, folder / UNREADABLE_FILE)
        write_duplicates(collection, groups.shared, names, folder / DUPLICATES_FILE)
        report = _report(collection, out, settings, splits, groups, written, num_unreadable=len(looked.unreadable))
        record = {"source": collection.name, **_asked(settings), **report.as_dict()}
        record.pop("out")  # it is where this file is
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _check(collection: Collection, out: Path, settings: SplitSettings) -> None:
    """What can be checked before any image is read."""
    check_max_bits(settings.max_bits)
    if len(collection.splits) > 1 and not settings.merge:
        found = ", ".join(
            f"{name} {len(source):,}" for name, source in zip(collection.splits, collection.sources, strict=True)
        )
        raise DataError(
            f"{collection.name}: is split already ({found} images); give the folder or file of one split, or --merge "
            "to take all of them together and split anew"
        )
    check_empty(out)
    collection.check_outside(out)
    if settings.layout == "folders":
        check_folders(collection)
    else:
        check_lists(collection)
    check_classes(collection, Counter(collection.labels.tolist()), settings.fractions)


def _report(
    collection: Collection,
    out: Path,
    settings: SplitSettings,
    splits: Integers,
    groups: Groups,
    written: str,
    *,
    num_unreadable: int,
) -> SplitReport:
    used = tuple(SPLITS[number] for number in settings.fractions.splits)
    labels = collection.labels.numpy()
    counts: dict[str, dict[str, int]] = {}
    for number in settings.fractions.splits:
        found = Counter(labels[splits == number].tolist())
        counts[SPLITS[number]] = {
            collection.class_name(label) if collection.classes else "": found[label]
            for label in np.unique(labels).tolist()
        }
    by_split = Counter(SPLITS[int(splits[members[0]])] for members in groups.shared)
    return SplitReport(
        out=out,
        layout=settings.layout,
        written=written,
        splits=used,
        counts=counts,
        num_unreadable=num_unreadable,
        num_duplicate_images=sum(map(len, groups.shared)),
        groups_by_split={name: by_split[name] for name in used},
    )


def _asked(settings: SplitSettings) -> dict[str, object]:
    return {
        "val": settings.fractions.val,
        "test": settings.fractions.test,
        "seed": settings.seed,
        "near_duplicates": "off" if settings.max_bits is None else settings.max_bits,
    }


def _table(counts: dict[str, dict[str, int]], splits: Sequence[str]) -> list[str]:
    """Classes as rows, splits as columns; of many classes only the smallest and the largest."""
    classes = list(next(iter(counts.values())))
    totals = {name: sum(counts[split][name] for split in splits) for name in classes}
    shown = classes if classes != [""] else []
    left_out = 0
    if len(shown) > _MANY_CLASSES:
        ordered = sorted(shown, key=totals.__getitem__)
        left_out = len(shown) - 6
        shown = [*ordered[:3], *ordered[-3:]]
    rows = [("", *splits)]
    rows += [(name, *(f"{counts[split][name]:,}" for split in splits)) for name in shown]
    rows.append(("images", *(f"{sum(counts[split].values()):,}" for split in splits)))
    lines = aligned(rows, 1)
    if left_out:
        lines.insert(4, f"... {left_out:,} more classes, all in {RECORD_FILE}")
    return lines
