"""Images that cannot be read: replaced, counted, listed, refused when there are too many."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from opsin.clock.seeding import fold_in
from opsin.data.base import Source, UnreadableImage
from opsin.errors import DataError, RunError, TransientError
from opsin.processes.excluded import read_excluded, write_excluded
from opsin.processes.trail import Trail

_REPLACEMENTS = 100
_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


class Failure(NamedTuple):
    """An image that could not be read: its index in the source, where it is stored, why."""

    sample: int
    location: str
    reason: str


@dataclass(frozen=True, slots=True)
class Read:
    """An image that could be read. `index` and `label` belong to `image` uint8 [3, H, W]."""

    index: int
    image: Tensor
    label: int
    failures: tuple[Failure, ...] = ()
    """What could not be read before, the wanted image first."""


def read_or_replace(source: Source, index: int, seed: int) -> Read:
    """The image at `index`, or the first readable one of the replacements that `(seed, index)` draws.

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

    `path` has one line `place<TAB>reason` for each image, and is continued by a resumed run; None keeps
    no file. Of `total` images at most the share `limit` may be listed.
    """

    def __init__(self, path: Path | None, total: int, limit: float) -> None:
        self.path = path
        self.total = total
        self.limit = limit
        self._reasons: dict[str, str] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
                place, _, reason = line.partition("\t")
                self._reasons[place] = reason

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, index: int, place: str, reason: str) -> None:
        """List an image, once only. Takes the three values of a `Failure`; the place is what counts.

        Raises:
            DataError: more images are listed than `limit` allows.
        """
        place = place.translate(_ESCAPES)
        if place not in self._reasons:
            self._reasons[place] = reason.translate(_ESCAPES)
            self._write()
        if len(self) > self.limit * self.total:
            raise DataError(self._too_many())

    def _write(self) -> None:
        if self.path is None:
            return
        lines = (f"{place}\t{reason}\n" for place, reason in sorted(self._reasons.items()))
        new = self.path.with_name(self.path.name + ".new")
        # On a full disk they are counted all the same, and written with the next one.
        with suppress(OSError):
            new.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            os.replace(new, self.path)

    def _too_many(self) -> str:
        first = ", ".join(f"{place} ({reason})" for place, reason in sorted(self._reasons.items())[:3])
        listed = "" if self.path is None else f", all are listed in {self.path}, delete that list after a repair"
        return (
            f"{len(self)} of {self.total} images are unreadable: {first}{', ...' if len(self) > 3 else ''}; "
            f"data.max_unreadable={self.limit} allows {int(self.limit * self.total)}: "
            f"repair or remove them, or raise data.max_unreadable{listed}"
        )


class ExcludingSource:
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
        self._trail.begin_reading(index, self._source.location(index))
        try:
            image = self._source.read(index)
        except (UnreadableImage, TransientError):  # neither is a crash because of this image
            self._trail.end_reading()
            raise
        self._trail.end_reading()  # not where another exception passes: the trail shall end with this image
        return image

    def location(self, index: int) -> str:
        return self._source.location(index)


def watch(source: Source, trail: Trail, put_aside: Path) -> Source:
    """The training images `source` without those that are listed in `put_aside`, each reading on the `trail`.

    Raises:
        RunError: the list is damaged or cannot be written.
        DataError: the images have changed since it was made.
    """
    listed = read_excluded(put_aside)
    for item in listed:
        place = source.location(item.index) if item.index < len(source) else None
        if place is None or item.location not in (None, place):
            raise DataError(
                f"{put_aside}: image {item.index} was {item.location or 'there'} and is {place or 'missing'} now: the "
                "images have changed since training crashed; delete this list, then it finds out again"
            )
    if any(item.location is None for item in listed):
        try:
            write_excluded(put_aside, [replace(item, location=source.location(item.index)) for item in listed])
        except OSError as error:
            raise RunError(f"{put_aside}: cannot be written: {error.strerror or error}; make room") from error
    if not listed and trail.folder is None:
        return source
    return ExcludingSource(source, trail, {item.index: item.reason for item in listed})
