"""`opsin data split`: images for training, validation and test, without copies of one in two of them."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from opsin.data.curation.assignment import LEFT_OUT, SPLITS, Fractions, assign, check_classes
from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Integers, check_max_bits, group_duplicates
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
from opsin.storage.teller import Teller

RECORD_FILE = "split.json"
"""The settings of a split, and its counts."""

_MANY_CLASSES = 20

Layout = Literal["folders", "lists"]


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """The options of `opsin data split`."""

    fractions: Fractions
    seed: int = 0
    layout: Layout = "folders"
    copy: bool = False
    """Copy files also if links would do."""
    max_bits: int | None = 8
    """Bits of 128 in which two perceptual hashes of a group may differ; None accepts equal pixels only."""
    merge: bool = False
    """Take images together that are in splits already."""


@dataclass(frozen=True)
class SplitReport:
    """The result of a split: counts by split and class, and the duplicates."""

    out: Path
    layout: Layout
    written: str
    counts: dict[str, dict[str, int]]
    """split -> class -> images; the class of a source without labels is empty."""
    num_unreadable: int
    num_duplicate_images: int
    groups_by_split: dict[str, int]
    """split -> groups of several images."""

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values."""
        return {
            "out": str(self.out),
            "counts": self.counts,
            "unreadable": self.num_unreadable,
            "duplicates": {"images": self.num_duplicate_images, "groups": self.groups_by_split},
        }

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        duplicates = "duplicates: none"
        if self.num_duplicate_images:
            groups = counted(sum(self.groups_by_split.values()), "group")
            where = ", ".join(f"{number} in {split}" for split, number in self.groups_by_split.items() if number)
            duplicates = (
                f"duplicates: {self.num_duplicate_images:,} images in {groups}, each whole in one split ({where}); "
                f"listed in {self.out / DUPLICATES_FILE}"
            )
        lines = [*_table(self.counts), duplicates]
        if self.num_unreadable:
            images = counted(self.num_unreadable, "unreadable image")
            lines.append(f"left out: {images}, listed in {self.out / UNREADABLE_FILE}")
        path = self.out / JOINED_LIST if self.layout == "lists" else self.out
        return [*lines, f"wrote {self.written}; train with data.path={path}"]


def split(collection: Collection, out: Path, settings: SplitSettings, teller: Teller) -> SplitReport:
    """Split `collection` into the new folder `out`.

    The same images and settings give the same split, whatever the names and the location of the files.

    Raises:
        DataError: `out` is not empty or cannot be written, a class is too small, or the images are split already.
        ConfigError: lists need files, and the images are not stored as files.
    """
    _check(collection, out, settings)
    if not collection.classes:
        teller.notice("these images have no labels: they are split without regard to classes")
    facts = scan(collection, teller)
    groups = group_duplicates(facts, max_bits=settings.max_bits)
    if doubts := groups.doubts(collection):
        teller.warning(doubts)
    splits = assign(collection, facts, groups, settings.fractions, seed=settings.seed)
    names = [SPLITS[number] if number != LEFT_OUT else "" for number in splits.tolist()]
    groups_of = Counter(names[int(members[0])] for members in groups.shared)
    with whole_folder(out) as folder:
        if settings.layout == "folders":
            written = write_folders(collection, splits, folder, copy=settings.copy)
        else:
            written = write_lists(collection, splits, folder, out)
        write_unreadable(facts.unreadable, folder / UNREADABLE_FILE)
        write_duplicates(collection, groups.shared, names, folder / DUPLICATES_FILE)
        report = SplitReport(
            out=out,
            layout=settings.layout,
            written=written,
            counts=_count(collection, splits, settings.fractions),
            num_unreadable=len(facts.unreadable),
            num_duplicate_images=sum(map(len, groups.shared)),
            groups_by_split={SPLITS[number]: groups_of[SPLITS[number]] for number in settings.fractions.splits},
        )
        _write_record(folder, collection, settings, report)
    return report


def _check(collection: Collection, out: Path, settings: SplitSettings) -> None:
    """Refuse what cannot be split, before any image is read."""
    check_max_bits(settings.max_bits)
    if len(collection.splits) > 1 and not settings.merge:
        sizes = zip(collection.splits, collection.sources, strict=True)
        found = ", ".join(f"{name} {len(source):,}" for name, source in sizes)
        raise DataError(
            f"{collection.name}: is split already ({found} images); give the folder or file of one split, or --merge "
            "to take all of them together and split them again"
        )
    check_empty(out)
    collection.check_outside(out)
    if settings.layout == "folders":
        check_folders(collection)
    else:
        check_lists(collection)
    check_classes(collection, Counter(collection.labels.tolist()), settings.fractions)


def _count(collection: Collection, splits: Integers, fractions: Fractions) -> dict[str, dict[str, int]]:
    """Return the images of each split and class."""
    labels = collection.labels.numpy()
    counts: dict[str, dict[str, int]] = {}
    for number in fractions.splits:
        found = Counter(labels[splits == number].tolist())
        counts[SPLITS[number]] = {
            collection.class_name(label) if collection.classes else "": found[label]
            for label in np.unique(labels).tolist()
        }
    return counts


def _write_record(folder: Path, collection: Collection, settings: SplitSettings, report: SplitReport) -> None:
    record = {
        "source": collection.name,
        "val": settings.fractions.val,
        "test": settings.fractions.test,
        "seed": settings.seed,
        "near_duplicates": "off" if settings.max_bits is None else settings.max_bits,
        **report.as_dict(),
    }
    record.pop("out")  # the folder of this file
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(counts: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for each class and a column for each split; of many classes the smallest and the largest."""
    totals = sum((Counter(by_class) for by_class in counts.values()), Counter[str]())
    shown = [name for name in next(iter(counts.values())) if name]
    left_out = len(shown) - 6 if len(shown) > _MANY_CLASSES else 0
    if left_out:
        ordered = sorted(shown, key=totals.__getitem__)
        shown = [*ordered[:3], *ordered[-3:]]
    rows = [("", *counts)]
    rows += [(name, *(f"{by_class[name]:,}" for by_class in counts.values())) for name in shown]
    rows.append(("images", *(f"{sum(by_class.values()):,}" for by_class in counts.values())))
    lines = aligned(rows, 1)
    if left_out:
        lines.insert(4, f"... {left_out:,} more classes, all in {RECORD_FILE}")
    return lines
