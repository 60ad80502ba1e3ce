"""A source under supervision: it says which image is being read, and leaves out those that training crashed with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from opsin.data.base import Source, UnreadableImage
from opsin.errors import DataError, PassingFault, RunError
from opsin.processes.excluded import read_aside, write_aside
from opsin.processes.trail import Trail


class Watched:
    """The images of `source`; what is in `aside`, by index with the reason, counts as unreadable."""

    def __init__(self, source: Source, trail: Trail, aside: Mapping[int, str]) -> None:
        self.name = source.name
        self.classes = source.classes
        self.labels = source.labels
        self._source = source
        self._trail = trail
        self._aside = aside

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Tensor:
        if index in self._aside:
            raise UnreadableImage(self._aside[index])
        self._trail.begin_reading(index, self._source.place(index))
        try:
            image = self._source.read(index)
        except (UnreadableImage, PassingFault):  # neither is a crash because of this image
            self._trail.end_reading()
            raise
        self._trail.end_reading()  # not where another exception passes: the trail shall end with this image
        return image

    def place(self, index: int) -> str:
        return self._source.place(index)


def watch(source: Source, trail: Trail, put_aside: Path) -> Source:
    """The training images `source` without those that are listed in `put_aside`, each reading on the `trail`.

    Raises:
        RunError: the list is damaged or cannot be written.
        DataError: the images have changed since it was made.
    """
    listed = read_aside(put_aside)
    for item in listed:
        place = source.place(item.index) if item.index < len(source) else None
        if place is None or item.place not in (None, place):
            raise DataError(
                f"{put_aside}: image {item.index} was {item.place or 'there'} and is {place or 'missing'} now: the "
                "images have changed since training crashed; delete this list, then it finds out again"
            )
    if any(item.place is None for item in listed):
        try:
            write_aside(put_aside, [replace(item, place=source.place(item.index)) for item in listed])
        except OSError as error:
            raise RunError(f"{put_aside}: cannot be written: {error.strerror or error}; make room") from error
    if not listed and trail.folder is None:
        return source
    return Watched(source, trail, {item.index: item.reason for item in listed})
