"""Statistics of a set of images before training, with warnings.

Shapes: N images of a collection.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Groups
from opsin.data.curation.scan import Scan
from opsin.data.sources.labels import counted

_IMBALANCE = 10
_SHOWN = 3
_MANY_CLASSES = 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths and heights in pixels; percentiles are the 5th, the 50th and the 95th."""

    distinct: int
    smallest: tuple[int, int]
    """Width and height of the image with the fewest pixels."""
    smallest_place: str
    largest: tuple[int, int]
    largest_place: str
    shorter_side: tuple[int, int, int]
    longer_side: tuple[int, int, int]
    aspect: tuple[float, float, float]
    """Width over height."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Copies: groups of several images, and those whose images have equal pixels."""

    groups: int
    exact_groups: int
    images: int
    leaks: Mapping[str, int]
    """`validation in train`: validation images with a copy among the training images."""


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics of a set of images. `counts` includes unreadable images; everything after it does not."""

    name: str
    counts: Mapping[str, Mapping[str, int]]
    """split -> class -> images; the only class is `unlabelled` without labels."""
    num_unreadable: int
    unreadable: tuple[tuple[str, str], ...]
    """Location and reason of the first few."""
    sizes: Sizes
    mean: tuple[float, ...]
    """Of each channel, in 0..1; every image weighs the same."""
    std: tuple[float, ...]
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    num_grey: int
    num_alpha: int
    num_16_bit: int
    duplicates: Duplicates
    warnings: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """All images, unreadable ones included."""
        return sum(sum(by_class.values()) for by_class in self.counts.values())

    @property
    def per_class(self) -> dict[str, int]:
        """Images of each class over all splits."""
        names = next(iter(self.counts.values()))
        return {name: sum(by_class[name] for by_class in self.counts.values()) for name in names}

    @property
    def keys(self) -> str:
        """Mean and standard deviation as keys of a recipe."""
        written = [",".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std)]
        return f"data.mean=[{written[0]}] data.std=[{written[1]}]"

    def as_dict(self) -> dict[str, object]:
        """Return the statistics as plain values."""
        return {"images": self.num_images, **asdict(self), "keys": self.keys}

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        sizes, copies = self.sizes, self.duplicates
        per_class = self.per_class
        lines = [f"images: {self.num_images:,}"]
        if len(self.counts) > 1:
            lines[0] += f" ({', '.join(f'{name} {sum(of.values()):,}' for name, of in self.counts.items())})"
        if set(per_class) != {"unlabelled"}:
            lines.append(f"classes: {_describe(per_class)}")
        if sizes.distinct == 1:
            lines.append(f"sizes: all {_times(sizes.largest)}")
        else:
            low, middle, high = sizes.shorter_side
            lines.append(
                f"sizes: {_times(sizes.smallest)} ({sizes.smallest_place}) to {_times(sizes.largest)} "
                f"({sizes.largest_place}); shorter side mostly {low} to {high}, median {middle}"
            )
            narrow, usual, wide = sizes.aspect
            lines.append(f"aspect (width / height): mostly {narrow:.2f} to {wide:.2f}, median {usual:.2f}")
        lines.append(self.keys)
        kinds = {"grey": self.num_grey, "with transparency": self.num_alpha, "16 bit": self.num_16_bit}
        stored = [f"{number:,} {name}" for name, number in (*self.formats.items(), *kinds.items()) if number]
        if stored:
            lines.append(f"stored as: {', '.join(stored)}")
        lines.append(f"unreadable: {self.num_unreadable:,}")
        lines += [f"  {location}: {reason}" for location, reason in self.unreadable]
        more = f" ({copies.exact_groups:,} of them with equal pixels)" if copies.groups else ""
        lines.append(f"duplicates: {copies.images:,} images in {counted(copies.groups, 'group')}{more}")
        return [*lines, *(f"warning: {text}" for text in self.warnings)]


def summarize(collection: Collection, scan: Scan, groups: Groups) -> Stats:
    """Compute the statistics of a collection from its scan and its groups."""
    split_numbers, labels = collection.split_numbers.numpy(), collection.labels.numpy()
    counts: dict[str, dict[str, int]] = {}
    present = np.unique(labels).tolist()
    for number, split in enumerate(collection.splits):
        found = Counter(labels[split_numbers == number].tolist())
        known = sorted({*range(len(collection.classes)), *present}, key=lambda label: (label < 0, label))
        counts[split] = {collection.class_name(label): found[label] for label in known}
    leaks = _leaks(collection, groups)
    return Stats(
        name=collection.name,
        counts=counts,
        num_unreadable=len(scan.unreadable),
        unreadable=tuple((failure.location, failure.reason) for failure in scan.unreadable[:_SHOWN]),
        sizes=_sizes(collection, scan),
        mean=scan.mean,
        std=scan.std,
        formats=dict(scan.formats.most_common()),
        modes=dict(scan.modes.most_common()),
        num_grey=scan.num_grey,
        num_alpha=scan.num_alpha,
        num_16_bit=scan.num_16_bit,
        duplicates=Duplicates(len(groups.shared), groups.num_exact, sum(map(len, groups.shared)), leaks),
        warnings=tuple(_warnings(collection, scan, groups, counts, leaks)),
    )


def _sizes(collection: Collection, scan: Scan) -> Sizes:
    rows = np.flatnonzero(scan.readable)
    heights, widths = scan.sizes[rows].astype(np.int64).T
    pixels = heights * widths
    ends = [rows[int(pixels.argmin())], rows[int(pixels.argmax())]]
    smallest, largest = ((int(scan.sizes[row, 1]), int(scan.sizes[row, 0])) for row in ends)
    shorter, longer = (
        tuple(np.percentile(side, (5, 50, 95)).round().astype(int).tolist())
        for side in (np.minimum(heights, widths), np.maximum(heights, widths))
    )
    aspect = np.percentile(widths / heights, (5, 50, 95)).tolist()
    distinct = len(np.unique(widths << 32 | heights))
    first, last = (collection.location(int(row)) for row in ends)
    return Sizes(distinct, smallest, first, largest, last, shorter, longer, tuple(aspect))


def _leaks(collection: Collection, groups: Groups) -> dict[str, int]:
    """Count the images of a later split that have a copy in an earlier one."""
    split_numbers = collection.split_numbers.numpy()
    found: Counter[str] = Counter()
    for members in groups.shared:
        inside = Counter(split_numbers[members].tolist())
        for earlier, later in combinations(sorted(inside), 2):
            found[f"{collection.splits[later]} in {collection.splits[earlier]}"] += inside[later]
    return dict(found)


def _warnings(
    collection: Collection,
    scan: Scan,
    groups: Groups,
    counts: Mapping[str, Mapping[str, int]],
    leaks: Mapping[str, int],
) -> Iterator[str]:
    train = counts[collection.splits[0]]
    yield from _imbalance({name: train.get(name, 0) for name in collection.classes})
    unlabelled = int((collection.labels < 0).sum())
    if collection.classes and unlabelled:
        yield f"{counted(unlabelled, 'image')} of {len(collection):,} have no label"
    if scan.unreadable:
        share = len(scan.unreadable) / len(collection)
        rule = "a run allows data.max_unreadable"
        yield f"{counted(len(scan.unreadable), 'image')} cannot be read ({share:.2%} of all; {rule})"
    names = {"train": "training"}
    for pair, number in leaks.items():
        later, earlier = pair.split(" in ")
        are = "is a near-duplicate" if number == 1 else "are near-duplicates"
        yield (
            f"{counted(number, f'{later} image')} {are} of {names.get(earlier, earlier)} images: scores on them "
            "mean little; opsin data split --merge makes other splits and keeps copies together"
        )
    labels = collection.labels.numpy()
    torn = [members for members in groups.shared if len(np.unique(labels[members])) > 1]
    if torn:
        first = torn[0][np.unique(labels[torn[0]], return_index=True)[1]][:2].tolist()
        example = " and ".join(
            f"{collection.location(index)} ({collection.class_name(int(labels[index]))})" for index in first
        )
        have = "has" if len(torn) == 1 else "have"
        yield f"{counted(len(torn), 'group')} of duplicates {have} several labels: {example}"
    if doubts := groups.doubts(collection):
        yield doubts


def _imbalance(counts: Mapping[str, int]) -> Iterator[str]:
    """Warn of classes without images, and of classes far smaller than the largest."""
    empty = [name for name, number in counts.items() if not number]
    if empty:
        more = f" (and {len(empty) - _SHOWN} more)" if len(empty) > _SHOWN else ""
        yield f"no training images of class {', '.join(empty[:_SHOWN])}{more}"
    largest = max(counts, key=counts.__getitem__, default="")
    small = sorted((n, name) for name, n in counts.items() if n and n * _IMBALANCE <= counts[largest])
    for number, name in small[:_SHOWN]:
        yield f"class {name} has {counted(number, 'image')}, {counts[largest] // number} times fewer than {largest}"
    if len(small) > _SHOWN:
        yield f"{len(small) - _SHOWN} more classes are {_IMBALANCE} or more times smaller than {largest}"


def _describe(per_class: Mapping[str, int]) -> str:
    if len(per_class) <= _MANY_CLASSES:
        return ", ".join(f"{name} {number:,}" for name, number in per_class.items())
    small, large = min(per_class, key=per_class.__getitem__), max(per_class, key=per_class.__getitem__)
    return f"{len(per_class):,}, from {small} with {per_class[small]:,} images to {large} with {per_class[large]:,}"


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
