"""Small data sets, decoded once and kept in memory, on the GPU where there is one.

Shapes: N images of a source, B of a batch, C channels, H and W sides in pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opsin.data.base import Source
from opsin.data.quarantine import Failure, Quarantine, read_or_replace
from opsin.data.transfer import send
from opsin.data.views.crops import boxes_for, cut_copies
from opsin.data.views.resample import cut_views
from opsin.data.waiting import StopRequest, read_in_threads
from opsin.data.workers import RawBatch, Reader, Task
from opsin.errors import ConfigError
from opsin.processes.cores import num_cores
from opsin.processes.headroom import find_rooms, held_bytes

_CHUNK = 64

Residence = bool | Literal["auto"]
"""True keeps all images in memory; `auto` keeps them if they are small."""


class Resident:
    """All images of a source, of equal size, as uint8 [N, C, H, W]; cuts batches like `Reader`."""

    def __init__(self, images: Tensor, labels: Tensor, *, seed: int) -> None:
        self.images = images
        self.labels = labels
        self._seed = seed

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        seed: int,
        device: torch.device,
        quarantine: Quarantine,
        residence: Residence = "auto",
        stop: StopRequest | None = None,
    ) -> "Resident | None":
        """Decode all images if `residence` is true, or if it is `auto` and they have one size and fit `byte_limit`.

        Unreadable images are replaced as by `Reader`.

        Raises:
            ConfigError: `residence` is true and the images have several sizes.
            DataError: too many images are unreadable.
        """
        if residence is False:
            return None
        first = read_or_replace(source, 0, seed).image
        if residence == "auto" and len(source) * first.nbytes > byte_limit(device):
            return None
        images = torch.empty(len(source), *first.shape, dtype=torch.uint8)
        labels = torch.empty(len(source), dtype=torch.int64)

        filler = _Filler(source, seed, images, labels)
        chunks = torch.split(torch.arange(len(source)), _CHUNK)
        try:
            for failures in read_in_threads(filler, chunks, threads=_num_threads(), stop=stop):
                for failure in failures:
                    quarantine.add(*failure)
        except _UnequalSizesError as error:
            if residence is True:
                raise ConfigError(f"data.resident=true: {error}; use data.resident=auto") from error
            return None
        return cls(images.to(device), labels, seed=seed)

    def read(self, task: Task) -> RawBatch:
        """Return the images of `task`, as they look in its epoch, with the views on the device."""
        ids = task.ids
        images = self.images.index_select(0, send(ids, self.images.device))
        heights = torch.full_like(ids, images.shape[2])
        widths = torch.full_like(ids, images.shape[3])
        wanted = [
            (
                crop,
                [
                    boxes_for(crop, heights, widths, seed=self._seed, epoch=task.epoch, ids=ids, view=name, copy=copy)
                    for copy in range(crop.count)
                ],
            )
            for name, crop in task.crops.items()
        ]
        if images.device.type == "cpu":
            views = [cut_copies(images, boxes, crop) for crop, boxes in wanted]
        else:
            views = cut_views(images, wanted)
        return RawBatch(dict(zip(task.crops, views, strict=True)), self.labels[ids], ids)


def read_everything(reader: Reader, task: Task, device: torch.device, stop: StopRequest | None = None) -> RawBatch:
    """Return the images of a `task` of any size as one batch, with the views on `device`."""
    chunks = [Task(task.crops, task.epoch, ids) for ids in torch.split(task.ids, _CHUNK)]
    parts = list(read_in_threads(reader, chunks, threads=_num_threads(), stop=stop))
    return RawBatch(
        {name: torch.cat([part.views[name] for part in parts], dim=1).to(device) for name in task.crops},
        torch.cat([part.labels for part in parts]),
        torch.cat([part.ids for part in parts]),
        tuple(failure for part in parts for failure in part.failures),
    )


def byte_limit(device: torch.device) -> int:
    """Memory that `auto` gives to images: a quarter of what is free, at most 1 GiB; of a GPU a tenth."""
    if device.type != "cuda":
        return min([1 << 30, *(max(0, room.num_bytes - held_bytes()) // 4 for room in find_rooms())])
    free, _ = torch.cuda.mem_get_info(device)
    return free // 10


class _UnequalSizesError(Exception):
    def __init__(self, location: str, image: Tensor, first: Tensor) -> None:
        (tall, wide), (usual_tall, usual_wide) = image.shape[1:], first.shape[1:]
        super().__init__(
            f"{location} is {wide} x {tall} pixels, the first image {usual_wide} x {usual_tall}, "
            "but resident images must have one size"
        )


@dataclass(frozen=True, slots=True)
class _Filler:
    """Fills `images` and `labels`, chunk by chunk."""

    source: Source
    seed: int
    images: Tensor
    labels: Tensor

    def read(self, chunk: Tensor) -> list[Failure]:
        """Read the images of `chunk`, int64 [b]; return the unreadable ones."""
        failures: list[Failure] = []
        for index in chunk.tolist():
            read = read_or_replace(self.source, index, self.seed)
            failures += read.failures
            if read.image.shape != self.images.shape[1:]:
                raise _UnequalSizesError(self.source.location(read.index), read.image, self.images[0])
            self.images[index], self.labels[index] = read.image, read.label
        return failures


def _num_threads() -> int:
    # Decoders release the interpreter lock.
    return min(8, num_cores())
