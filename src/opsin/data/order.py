"""Which images each step trains on: a pure function of (seed, step).

Shapes: b images of a batch over all processes.
"""

from torch import Tensor

from opsin import seeding
from opsin.errors import ConfigError
from opsin.timeline import Timeline


class Order:
    """The images of every step of a run. Each epoch shows every image once, in its own order.

    With `drop_last` the images after the last full batch of an epoch sit out until the next one;
    without it they form a short batch.

    Raises:
        ConfigError: the data cannot fill one batch.
    """

    def __init__(self, *, seed: int, samples: int, timeline: Timeline, drop_last: bool) -> None:
        for stage in timeline.stages:
            steps_per_epoch(samples, stage.batch_size, drop_last=drop_last)
        self.samples = samples
        self._seed = seed
        self._timeline = timeline
        self._epochs: dict[int, Tensor] = {}

    def ids(self, step: int) -> tuple[int, Tensor]:
        """The epoch that `step` lies in, and the ids of its batch, int64 [b]."""
        place = self._timeline.place(step)
        first = place.batch * place.batch_size
        return place.epoch, self._epoch(place.epoch)[first : first + place.batch_size]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # The end of one epoch and the start of the next are asked for in turns by loaders that read ahead.
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[epoch] = seeding.permutation(self._seed, epoch, self.samples)
        return self._epochs[epoch]


def steps_per_epoch(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Batches in one pass over the data.

    Raises:
        ConfigError: no batch at all.
    """
    if samples == 0:
        raise ConfigError("data.path: there are 0 training images, at least one is needed; check the folder or list")
    if drop_last and samples < batch_size:
        raise ConfigError(
            f"batch_size={batch_size}: there are only {samples} training images, fewer than one batch; "
            f"use batch_size={samples} or less, or data.drop_last=false"
        )
    return samples // batch_size if drop_last else -(-samples // batch_size)


def share(total: int, *, rank: int, world: int) -> slice:
    """The part of a batch of `total` images that process `rank` of `world` computes; sizes differ by one at most."""
    return slice(total * rank // world, total * (rank + 1) // world)
