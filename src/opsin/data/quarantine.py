"""Unreadable images: replaced, counted, listed, and refused when there are too many."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from opsin.clock.seeding import fold_in
from opsin.data.base import Source, UnreadableImage
from opsin.errors import DataError, TransientError
from opsin.processes.excluded import read_excluded, write_excluded
from opsin.processes.trail import Trail
from opsin.storage.files import writing

_REPLACEMENTS = 100
ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


class Failure(NamedTuple):
    """An image that cannot be read: its index in the source, its location and the reason."""

    sample: int
    location: str
    reason: str


@dataclass(frozen=True, slots=True)
class Read:
    """A readable image, uint8 [3, H, W], with its index and label."""

    index: int
    image: Tensor
    label: int
    failures: tuple[Failure, ...] = ()
    """The images that could not be read before it, the wanted one first."""


def read_or_replace(source: Source, index: int, seed: int) -> Read:
    """Return the image at `index`, or the first readable one of the replacements that `(seed, index)` draws.

    Raises:
        DataError: the image and all 100 replacements are unreadable.
    """
    failures: dict[int, Failure] = {}
    candidate = index
    for attempt in range(1, _REPLACEMENTS + 2):
        if candidate not in failures:
            try:
                return Read(candidate, source.read(candidate), int(source.labels[candidate]), tuple(failures.values()))
            except UnreadableImage as error:
                failures[candidate] = Failure(candidate, source.location(candidate), str(error))
        candidate = fold_in(seed, index, attempt) % len(source)
    first = failures[index]
    raise DataError(
        f"{first.location}: unreadable ({first.reason}), as are all {_REPLACEMENTS} images drawn to replace it "
        f"({len(failures)} of the {len(source)} images of {source.name} were tried); check data.path"
    )


class Quarantine:
    """The unreadable images of a run, as a set and as a sorted list in a file.

    The file `path` has one line `location<TAB>reason` for each image, and a resumed run adds to it; None keeps no
    file. At most the share `limit` of `total` images may be listed.
    """

    def __init__(self, path: Path | None, total: int, limit: float) -> None:
        self.path = path
        self.total = total
        self.limit = limit
        self._reasons: dict[str, str] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
                location, _, reason = line.partition("\t")
                self._reasons[location] = reason

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, index: int, location: str, reason: str) -> None:
        """List the image of a `Failure`, once for each location.

        Raises:
            DataError: more images are listed than `limit` allows.
        """
        location = location.translate(ESCAPES)
        if location not in self._reasons:
            self._reasons[location] = reason.translate(ESCAPES)
            self._write()
        if len(self) > self.limit * self.total:
            raise DataError(self._describe())

    def _write(self) -> None:
        if self.path is None:
            return
        lines = (f"{location}\t{reason}\n" for location, reason in sorted(self._reasons.items()))
        new = self.path.with_name(self.path.name + ".new")
        # On a full disk the images still count, and the next one writes them.
        with suppress(OSError):
            new.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            os.replace(new, self.path)

    def _describe(self) -> str:
        first = ", ".join(f"{location} ({reason})" for location, reason in sorted(self._reasons.items())[:3])
        listed = "" if self.path is None else f", all are listed in {self.path}, delete that list after a repair"
        return (
            f"{len(self)} of {self.total} images are unreadable: {first}{', ...' if len(self) > 3 else ''}; "
            f"data.max_unreadable={self.limit} allows {int(self.limit * self.total)}: "
            f"repair or remove them, or raise data.max_unreadable{listed}"
        )


class ExcludingSource:
    """The images of `source`, each reading on the trail. Those in `excluded`, reasons by index, count as unreadable."""

    def __init__(self, source: Source, trail: Trail, excluded: Mapping[int, str]) -> None:
        self.name = source.name
        self.classes = source.classes
        self.labels = source.labels
        self._source = source
        self._trail = trail
        self._excluded = excluded

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Tensor:
        if index in self._excluded:
            raise UnreadableImage(self._excluded[index])
        self._trail.begin_reading(index, self._source.location(index))
        try:
            image = self._source.read(index)
        except (UnreadableImage, TransientError):  # neither is a crash because of this image
            self._trail.end_reading()
            raise
        self._trail.end_reading()  # not after another exception: the trail must end with this image
        return image

    def location(self, index: int) -> str:
        return self._source.location(index)


def watch(source: Source, trail: Trail, path: Path) -> Source:
    """Return `source` without the images that the file `path` excludes, with each reading on the `trail`.

    Raises:
        RunError: the file is damaged or cannot be written.
        DataError: the images have changed since the file was written.
    """
    listed = read_excluded(path)
    for item in listed:
        location = source.location(item.index) if item.index < len(source) else None
        if location is None or item.location not in (None, location):
            raise DataError(
                f"{path}: image {item.index} was {item.location or 'there'} and is {location or 'missing'} now: the "
                "images have changed since training crashed; delete this list, and training finds such images again"
            )
    if any(item.location is None for item in listed):
        with writing(path, "make room"):
            write_excluded(path, [replace(item, location=source.location(item.index)) for item in listed])
    if not listed and trail.folder is None:
        return source
    return ExcludingSource(source, trail, {item.index: item.reason for item in listed})
