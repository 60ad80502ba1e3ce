"""The images of each step: a pure function of the seed, the step and the detours.

Shapes: b images of a batch over all processes, N of a source, n of a stage.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opsin.clock import seeding
from opsin.clock.timeline import StepPosition, Timeline
from opsin.data.base import Detour
from opsin.errors import ConfigError

_EPOCHS = 1 << 32
"""More than any run has; even, since some things alternate from epoch to epoch."""


class Order:
    """The images of every step of a run. Each epoch shows every image of its stage once, in its own order.

    `labels` is int64 [N]. With `drop_last` the images after the last full batch of an epoch are skipped; without it
    they form a short batch.

    Raises:
        ConfigError: the data cannot fill one batch.
    """

    def __init__(self, *, seed: int, labels: Tensor, timeline: Timeline, drop_last: bool) -> None:
        self.timeline = timeline
        self.seed = seed
        self._members = [class_share(labels, stage.data_fraction, seed) for stage in timeline.stages]
        self._passes: dict[tuple[object, ...], Tensor] = {}
        for stage, members in zip(timeline.stages, self._members, strict=True):
            steps_per_epoch(len(members), stage.batch_size, drop_last=drop_last)

    def ids(self, step: int, detours: Sequence[Detour] = ()) -> tuple[StepPosition, Tensor]:
        """The position of `step`, and the ids of its batch, int64 [b].

        In a detour (the newest comes last) these are images of the same pass that no step of a detour showed before,
        while there are such images. The position then has its own epoch, so that all random numbers differ.
        """
        position = self.timeline.position(step)
        first = position.batch * position.batch_size
        ids = self._pass(step, position, detours)[first : first + position.batch_size]
        attempt = max((detour.attempt for detour in detours if detour.first <= step < detour.last), default=0)
        return replace(position, epoch=position.epoch + attempt * _EPOCHS), ids

    def _pass(self, step: int, position: StepPosition, detours: Sequence[Detour]) -> Tensor:
        """The ids of the pass over the data that `step` belongs to, in order, int64 [n]."""
        start = step - position.batch
        length = self.timeline.stages[position.stage].steps_per_epoch
        inside = tuple(
            (detour.attempt, max(detour.first - start, 0), min(detour.last - start, length))
            for detour in detours
            if detour.first < start + length and start < detour.last
        )
        key = (position.epoch, inside)
        if key not in self._passes:
            # The end of one pass and the start of the next are asked for in turns by loaders that read ahead.
            for old in list(self._passes)[:-1]:
                del self._passes[old]
            self._passes[key] = self._shuffle(position, inside)
        return self._passes[key]

    def _shuffle(self, position: StepPosition, detours: Sequence[tuple[int, int, int]]) -> Tensor:
        """Return the ids of a pass; each detour is an attempt and the first and last batch that it replaces."""
        members = self._members[position.stage]
        number = seeding.permutation(self.seed, position.epoch, len(members))
        left_out = torch.zeros(len(members), dtype=torch.bool)
        for attempt, first, last in detours:
            batches = slice(first * position.batch_size, last * position.batch_size)
            left_out[number[batches]] = True
            others = seeding.permutation(seeding.fold_in(self.seed, "detour", attempt), position.epoch, len(members))
            others = others[left_out[others].argsort(stable=True)]
            number[batches] = others[: len(number[batches])]
        return members[number]


def class_share(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Return the ids of the rounded `fraction` of each class, int64 [n], ascending.

    Those of a smaller fraction are among them. `labels` is int64 [N]; unlabelled images (-1) count as one class.
    """
    ids = torch.arange(len(labels))
    if fraction == 1:
        return ids
    shuffled = seeding.uniform(seed, 0, ids, "share", 1)[:, 0].argsort(stable=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, each in random order
    classes = labels[by_class] + 1
    sizes = torch.bincount(classes)
    rank_in_class = ids - (sizes.cumsum(0) - sizes)[classes]
    kept = rank_in_class < _kept(sizes, fraction)[classes]
    return by_class[kept].sort().values


def _kept(sizes: Tensor, fraction: float) -> Tensor:
    """The rounded `fraction` of int64 `sizes`, halves upwards."""
    # 0.29 * 50 is 14.499999999999998: a half that the fraction means must not depend on how it is stored.
    return torch.floor(sizes.double() * fraction + 0.5 + 1e-9).long()


def check_share(labels: Tensor, fraction: float, classes: Sequence[str], *, key: str) -> None:
    """Check that every class keeps an image in `fraction`, whose key in the recipe is `key`.

    Raises:
        ConfigError: the smallest class loses all images; the fault states the least fraction.
    """
    sizes = torch.bincount(labels + 1)
    sizes = torch.where(sizes > 0, sizes, len(labels) + 1)
    smallest = int(sizes.argmin())
    count = int(sizes[smallest])
    if _kept(sizes[smallest], fraction) < 1:
        name = repr(classes[smallest - 1]) if smallest else "without a label"
        least = math.ceil(0.5 / count * 1e4) / 1e4
        raise ConfigError(
            f"{key}={fraction:g}: of the {count} images of class {name} none would be left; use at least {least:g}"
        )


def steps_per_epoch(samples: int, batch_size: int, *, drop_last: bool, key: str = "batch_size", share: str = "") -> int:
    """Return the number of batches in one pass over the data.

    `key` is the batch size in the recipe; `share` explains the number of images (` in data_fraction=0.5`).

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
    """The part of a batch of `total` images that process `rank` of `world` computes; sizes differ by at most one."""
    return slice(total * rank // world, total * (rank + 1) // world)
