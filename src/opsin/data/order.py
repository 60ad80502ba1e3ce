"""Which images each step trains on: a pure function of (seed, step).

Shapes: b images of a batch over all processes, N of a source, n of a stage.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opsin import seeding
from opsin.errors import ConfigError
from opsin.timeline import Place, Timeline


class Order:
    """The images of every step of a run. Each epoch shows every image of its stage once, in its own order.

    `labels` is int64 [N]. With `drop_last` the images after the last full batch of an epoch sit out until
    the next one; without it they form a short batch.

    Raises:
        ConfigError: the data cannot fill one batch.
    """

    def __init__(self, *, seed: int, labels: Tensor, timeline: Timeline, drop_last: bool) -> None:
        self.timeline = timeline
        self._seed = seed
        self._members = [class_share(labels, stage.data_fraction, seed) for stage in timeline.stages]
        self._epochs: dict[int, Tensor] = {}
        for stage, members in zip(timeline.stages, self._members, strict=True):
            steps_per_epoch(len(members), stage.batch_size, drop_last=drop_last)

    def ids(self, step: int) -> tuple[Place, Tensor]:
        """Where `step` lies, and the ids of its batch, int64 [b]."""
        place = self.timeline.place(step)
        first = place.batch * place.batch_size
        return place, self._epoch(place)[first : first + place.batch_size]

    def _epoch(self, place: Place) -> Tensor:
        if place.epoch not in self._epochs:
            # The end of one epoch and the start of the next are asked for in turns by loaders that read ahead.
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            members = self._members[place.stage]
            self._epochs[place.epoch] = members[seeding.permutation(self._seed, place.epoch, len(members))]
        return self._epochs[place.epoch]


def class_share(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """The ids of the rounded `fraction` of each class, int64 [n], ascending.

    Those of a smaller fraction are among them. `labels` is int64 [N]; unlabelled images (-1) count as one class.
    """
    ids = torch.arange(len(labels))
    if fraction == 1:
        return ids
    shuffled = seeding.uniform(seed, 0, ids, "share", 1)[:, 0].argsort(stable=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, each in random order
    classes = labels[by_class] + 1
    sizes = torch.bincount(classes)
    place_in_class = ids - (sizes.cumsum(0) - sizes)[classes]
    kept = place_in_class < torch.floor(sizes * fraction + 0.5)[classes]
    return by_class[kept].sort().values


def check_share(labels: Tensor, fraction: float, classes: Sequence[str], *, key: str) -> None:
    """See that every class keeps an image in `fraction`, which the recipe calls `key`.

    Raises:
        ConfigError: names the smallest class, and the least fraction that serves.
    """
    sizes = torch.bincount(labels + 1)
    sizes = torch.where(sizes > 0, sizes, len(labels) + 1)
    smallest = int(sizes.argmin())
    count = int(sizes[smallest])
    if count * fraction + 0.5 < 1:
        name = repr(classes[smallest - 1]) if smallest else "without a label"
        least = math.ceil(0.5 / count * 1e4) / 1e4
        raise ConfigError(
            f"{key}={fraction:g}: of the {count} images of class {name} none would be left; use at least {least:g}"
        )


def steps_per_epoch(samples: int, batch_size: int, *, drop_last: bool, key: str = "batch_size", share: str = "") -> int:
    """Batches in one pass over the data.

    The recipe calls the batch size `key`; `share` tells why there are not more images (` (of the first stage)`).

    Raises:
        ConfigError: no batch at all.
    """
    if samples == 0:
        raise ConfigError("data.path: there are 0 training images, at least one is needed; check the folder or list")
    if drop_last and samples < batch_size:
        raise ConfigError(
            f"{key}={batch_size}: there are only {samples} training images{share}, fewer than one batch; "
            f"use {key}={samples} or less, or data.drop_last=false"
        )
    return samples // batch_size if drop_last else -(-samples // batch_size)


def share(total: int, *, rank: int, world: int) -> slice:
    """The part of a batch of `total` images that process `rank` of `world` computes; sizes differ by one at most."""
    return slice(total * rank // world, total * (rank + 1) // world)
