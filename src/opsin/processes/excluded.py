"""Images that are not read any more because training crashed with them: `put_aside.json` of a run.

They are replaced as unreadable ones are, by a draw that follows from the seed and their number, and listed beside
these in `quarantine.txt`. The file belongs to the run: whoever trains it, on whichever machine, leaves them out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.errors import RunError
from opsin.storage.files import write_atomic


@dataclass(frozen=True, slots=True)
class ExcludedImage:
    """An image that is not read. `index` is its number among the training images."""

    index: int
    reason: str
    location: str | None = None
    """Its location, once a training has looked that up; it shows whether the images have changed since."""


def read_excluded(path: Path) -> tuple[ExcludedImage, ...]:
    """What is put aside, by index; nothing where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return ()
    try:
        found = [
            ExcludedImage(int(item["index"]), str(item["reason"]), item["place"])
            for item in json.loads(path.read_bytes())
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{path}: is damaged ({error!r}); it lists the images that training crashed with: put back a copy, or "
            "delete it to read them again"
        ) from error
    return tuple(sorted(found, key=lambda item: item.index))


def write_excluded(path: Path, images: Sequence[ExcludedImage]) -> None:
    """Keep these, the first of each index.

    Raises:
        OSError: the file cannot be written.
    """
    by_index = {item.index: item for item in reversed(images)}
    facts = [
        {"index": index, "reason": by_index[index].reason, "place": by_index[index].location}
        for index in sorted(by_index)
    ]
    write_atomic(path, (json.dumps(facts, indent=2) + "\n").encode())
