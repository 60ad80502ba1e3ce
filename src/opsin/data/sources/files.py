"""Images that are files of their own, and finding them in folders."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from opsin.data.base import UnreadableImage, raise_if_transient
from opsin.data.decode import decode
from opsin.data.sources.labels import find_classes, index_labels, no_labels


class Strings:
    """A fixed list of file names, stored as two arrays.

    A list of a million `str` costs each worker process ten times the memory, and its start a long unpickling.
    """

    def __init__(self, values: Iterable[str]) -> None:
        encoded = [os.fsencode(value) for value in values]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


_NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", *_NETPBM})


@dataclass
class Files:
    """Image files; `paths` are relative to `root`, or absolute."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    root: str
    paths: Strings

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W]."""
        try:
            data = Path(self.location(index)).read_bytes()
        except OSError as error:
            raise_if_transient(self.location(index), error)
            raise UnreadableImage(f"the file cannot be read ({error.strerror})") from error
        return decode(data)

    def location(self, index: int) -> str:
        """The path of the file."""
        return os.path.join(self.root, self.paths[index])


def label_files(
    root: Path, paths: Sequence[str], names: Sequence[str | None] | None, *, classes: tuple[str, ...] | None = None
) -> Files:
    """Return files with the class names `names`, or without labels if it is None.

    `classes` are those of the training images; None takes those in `names`.
    """
    if names is None:
        return Files(str(root), (), no_labels(len(paths)), str(root), Strings(paths))
    if classes is None:
        classes = find_classes(names)
    return Files(str(root), classes, index_labels(names, classes, str(root)), str(root), Strings(paths))


def find_images(root: Path) -> Iterator[str]:
    """Yield the paths, relative to `root` with "/", of all files below it that end as in `SUFFIXES`, in any order.

    Links to folders are followed, except those back to a folder that holds them. Names with a leading dot are skipped.

    Raises:
        OSError: a folder cannot be read.
    """
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if name[0] != "." and not _leads_back(folder, name)]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield prefix + name


def _refuse(error: OSError) -> None:
    raise error


def _leads_back(folder: str, name: str) -> bool:
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return os.path.commonpath([target, os.path.realpath(folder)]) == target
