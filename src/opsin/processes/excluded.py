"""Images excluded because training crashed while reading them: `put_aside.json` of a run.

Like unreadable images, each is replaced by a draw that follows from the seed and its number, and listed in
`quarantine.txt`. The file belongs to the run: every process that trains it, on any machine, excludes the same images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opsin.storage.records import RecordFormat


@dataclass(frozen=True, slots=True)
class ExcludedImage:
    """An image that is not read. `index` is its number among the training images."""

    index: int
    reason: str
    location: Annotated[str | None, Field(alias="place")] = None
    """Recorded by the first training without the image; a later one learns from it whether the images have changed."""


_RECORD = RecordFormat(list[ExcludedImage], indent=2)


def read_excluded(path: Path) -> tuple[ExcludedImage, ...]:
    """Return the excluded images, sorted by index; none where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    advice = "it lists the images that training crashed with: put back a copy, or delete it to read them again"
    try:
        return tuple(sorted(_RECORD.read(path, advice), key=lambda image: image.index))
    except FileNotFoundError:
        return ()


def write_excluded(path: Path, images: Sequence[ExcludedImage]) -> None:
    """Write the list of excluded images, with the first of each index.

    Raises:
        OSError: the file cannot be written.
    """
    by_index = {image.index: image for image in reversed(images)}
    _RECORD.write(path, [by_index[index] for index in sorted(by_index)])
