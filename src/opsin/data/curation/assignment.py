"""Assignment of images to splits: stratified by class, seeded, and no group of duplicates in two splits.

The split of an image depends on the seed and on pixels, not on file names or on the order of files.

Shapes: N images of a collection.
"""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opsin.clock import seeding
from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Groups, Integers
from opsin.data.curation.scan import Scan
from opsin.data.sources.labels import counted
from opsin.errors import ConfigError, DataError

TRAIN, VAL, TEST = 0, 1, 2
SPLITS = ("train", "val", "test")
LEFT_OUT = -1
"""The split of unreadable images."""


@dataclass(frozen=True, slots=True)
class Fractions:
    """Shares of the images of each class for validation and test; the rest trains.

    Raises:
        ConfigError: no images would train, or all would.
    """

    val: float
    test: float

    def __post_init__(self) -> None:
        asked = f"--val {self.val:g} --test {self.test:g}"
        if not (self.val >= 0 and self.test >= 0):
            raise ConfigError(f"command line: {asked}: a share is 0 or more; use --val 0.1 --test 0.1")
        if self.val + self.test >= 1:
            raise ConfigError(
                f"command line: {asked}: together {self.val + self.test:g}, but below 1 leaves images to train on; "
                "use --val 0.1 --test 0.1"
            )
        if self.val + self.test == 0:
            raise ConfigError(f"command line: {asked}: no image would be held out; use --val 0.1")

    @property
    def splits(self) -> tuple[int, ...]:
        """The splits that get images."""
        return (TRAIN, *(split for split, share in ((VAL, self.val), (TEST, self.test)) if share > 0))

    def targets(self, count: int) -> dict[int, int]:
        """Return the numbers of `count` images that validate and test: rounded, at least one each, and not all."""
        shares = {VAL: self.val, TEST: self.test}
        targets = {split: max(1, round(count * share)) for split, share in shares.items() if share > 0}
        while sum(targets.values()) >= count and max(targets.values()) > 1:
            targets[max(targets, key=targets.__getitem__)] -= 1
        return targets


def assign(collection: Collection, scan: Scan, groups: Groups, fractions: Fractions, *, seed: int) -> Integers:
    """Return the split of every image, int64 [N]: a number of `SPLITS`, or `LEFT_OUT` for an unreadable one.

    Each class is divided by the rounded fractions if its groups allow it: a group that does not fit into a small split
    trains. A group with several classes counts as one of its most frequent class.

    Raises:
        DataError: a class is too small to be in every split.
    """
    labels = collection.labels.numpy()
    check_classes(collection, Counter(labels[scan.readable].tolist()), fractions)
    splits = np.full(len(labels), LEFT_OUT, dtype=np.int64)
    strata: dict[int, list[Integers]] = {}
    for members in _all_groups(scan, groups):
        counts = Counter(labels[members].tolist())
        label = min(counts, key=lambda label: (-counts[label], label))
        strata.setdefault(label, []).append(members)
    for label in sorted(strata):
        for members, split in zip(*_divide(strata[label], scan, fractions, seed=seed), strict=True):
            splits[members] = split
    _check_presence(collection, splits, fractions)
    return splits


def check_classes(collection: Collection, counts: Mapping[int, int], fractions: Fractions) -> None:
    """Check that each class has an image for every split; `counts` are the images of each label.

    Raises:
        DataError: a line for each of the first three classes that are too small.
    """
    small = [label for label in sorted(counts) if _matters(collection, label) and counts[label] < len(fractions.splits)]
    faults = [f"{_called(collection, label)} has {counted(counts[label], 'image')}" for label in small]
    _refuse(collection, fractions, faults)


def _all_groups(scan: Scan, groups: Groups) -> list[Integers]:
    """Return the readable images, each once: alone, or with all members of its group."""
    alone = scan.readable.copy()
    for members in groups.shared:
        alone[members] = False
    return [*np.flatnonzero(alone)[:, None], *groups.shared]


def _divide(
    units: Sequence[Integers], scan: Scan, fractions: Fractions, *, seed: int
) -> tuple[list[Integers], list[int]]:
    """Return the groups of one class in the order of their draws, and the split of each."""
    keys = [int(scan.exact[members].min()) for members in units]
    draws = seeding.uniform(seed, 0, torch.tensor(keys), "split", 1)[:, 0].tolist()
    # The key breaks ties: groups with one key would be one group.
    ordered = [members for _, _, members in sorted(zip(draws, keys, units, strict=True), key=operator.itemgetter(0, 1))]
    room = fractions.targets(sum(map(len, units)))
    chosen: list[int] = []
    for members in ordered:
        split = next((split for split in room if len(members) <= room[split]), TRAIN)
        if split != TRAIN:
            room[split] -= len(members)
        chosen.append(split)
    # A class of few and large groups: an empty split takes the smallest group of the fullest.
    for empty in [split for split in fractions.splits if split not in chosen]:
        fullest, number = Counter(chosen).most_common(1)[0]
        if number > 1:
            candidates = [index for index, split in enumerate(chosen) if split == fullest]
            chosen[min(candidates, key=lambda index: len(ordered[index]))] = empty
    return ordered, chosen


def _check_presence(collection: Collection, splits: Integers, fractions: Fractions) -> None:
    labels = collection.labels.numpy()
    present = {split: set(labels[splits == split].tolist()) for split in fractions.splits}
    partly = sorted(set.union(*present.values()) - set.intersection(*present.values()))
    missing = [label for label in partly if _matters(collection, label)]
    why = "images, but too many are duplicates of each other or of another class"
    _refuse(
        collection,
        fractions,
        [f"{_called(collection, label)} has {(labels[splits != LEFT_OUT] == label).sum()} {why}" for label in missing],
    )


def _refuse(collection: Collection, fractions: Fractions, faults: Sequence[str]) -> None:
    """Raise the first three faults, if there are any."""
    if not faults:
        return
    names = [SPLITS[split] for split in fractions.splits]
    rule = f"{', '.join(names[:-1])} and {names[-1]} need one each"
    more = f" (and {len(faults) - 3} more classes)" if len(faults) > 3 else ""
    way_out = "add images, take the class out, or leave out a split with --val 0 or --test 0"
    raise DataError(*(f"{collection.name}: {fault}; {rule}{more}: {way_out}" for fault in faults[:3]))


def _matters(collection: Collection, label: int) -> bool:
    """True if every split needs images of this label: all but unlabelled ones beside labelled ones."""
    return label >= 0 or not collection.classes


def _called(collection: Collection, label: int) -> str:
    return f"class {collection.classes[label]}" if collection.classes else "this source"
