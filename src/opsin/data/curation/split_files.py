"""The files of a split: class folders of links or copies, or CSV lists. A split is written whole or not at all."""

import csv
import errno
import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from opsin.data.base import UnreadableImage
from opsin.data.curation.assignment import LEFT_OUT, SPLITS
from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Integers
from opsin.data.curation.encoding import find_encoding, stored_bytes
from opsin.data.quarantine import ESCAPES, Failure
from opsin.data.sources.files import SUFFIXES
from opsin.errors import ConfigError, DataError
from opsin.storage.files import writing

UNREADABLE_FILE = "unreadable.txt"
DUPLICATES_FILE = "duplicates.csv"
JOINED_LIST = "all.csv"
"""The list of all splits, with a column that names them."""

_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "PPM": ".ppm"}
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into; it gets the name `out` when the block ends well, and is removed when it fails.

    Raises:
        DataError: `out` is not empty, or cannot be written.
    """
    check_empty(out)
    target = out.resolve()  # `.` has no name of its own
    partial = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        with writing(out, "nothing is left there: make room, or choose another --out", DataError):
            partial.mkdir(parents=True)
            yield partial
            partial.replace(target)
    except UnreadableImage as error:
        raise DataError(f"{out}: not written: an image has disappeared meanwhile ({error}); try again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_empty(out: Path) -> None:
    """Check that `out` is free.

    Raises:
        DataError: it is a file, or not empty.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        what = "is not empty" if out.is_dir() else "is a file"
        raise DataError(f"{out}: {what}; a split is written into a new folder: remove it, or choose another --out")


def check_folders(collection: Collection) -> None:
    """Check that class folders can hold these images.

    Raises:
        DataError: a class name cannot name a folder, or some images have no label.
    """
    for name in collection.classes:
        if "/" in name or "\0" in name or name.startswith("."):
            raise DataError(
                f"{collection.name}: class {name!r} cannot be the name of a folder; rename it, or use --as lists"
            )
    unlabelled = int((collection.labels < 0).sum())
    if collection.classes and unlabelled:
        raise DataError(
            f"{collection.name}: {unlabelled} of {len(collection)} images have no label, and class folders need "
            "one; label them, or use --as lists"
        )


def check_lists(collection: Collection) -> None:
    """Check that lists can name these images.

    Raises:
        ConfigError: they are not stored as files.
    """
    if collection.path(0) is None:
        raise ConfigError(
            f"command line: --as lists: {collection.name} does not hold its images as files, which a list "
            "could name; use --as folders"
        )


def write_folders(collection: Collection, splits: Integers, folder: Path, *, copy: bool) -> str:
    """Write `folder`/SPLIT/CLASS/NAME for every image, and return a count of links and copies.

    Images keep their file names, or are numbered if they have none. Files become hard links if the file system can.
    """
    done: Counter[str] = Counter()
    taken: set[Path] = set()
    for index, split in enumerate(splits.tolist()):
        if split == LEFT_OUT:
            continue
        inside = folder / SPLITS[split]
        if collection.classes:
            inside /= collection.classes[int(collection.labels[index])]
        inside.mkdir(parents=True, exist_ok=True)
        target = _free_name(inside, _file_name(collection, index), taken)
        source = collection.path(index)
        done[_write_image(collection, index, target) if source is None else _link(source, target, copy=copy)] += 1
    return ", ".join(f"{number:,} {what}" for what, number in sorted(done.items()))


def write_lists(collection: Collection, splits: Integers, folder: Path, out: Path) -> str:
    """Write a list for each split, and one of all; paths are relative to `out`, the later folder of the lists."""
    base = out.parent.resolve() / out.name
    rows: dict[int, list[tuple[str, ...]]] = {number: [] for number in range(len(SPLITS))}
    for index, split in enumerate(splits.tolist()):
        path = collection.path(index)
        if split != LEFT_OUT and path is not None:
            label = int(collection.labels[index])
            named = (collection.classes[label] if label >= 0 else "",) if collection.classes else ()
            rows[split].append((os.path.relpath(path.absolute(), base), *named))
    columns = ("path", "label") if collection.classes else ("path",)
    for split, own in rows.items():
        if own:
            _write_csv(folder / f"{SPLITS[split]}.csv", columns, own)
    everything = [(*row, SPLITS[split]) for split, own in rows.items() for row in own]
    _write_csv(folder / JOINED_LIST, (*columns, "split"), everything)
    return f"{len(everything):,} lines"


def write_unreadable(failures: Sequence[Failure], path: Path) -> None:
    """Write a line `location<TAB>reason` for each image; no file if there is none."""
    lines = [f"{failure.location.translate(ESCAPES)}\t{failure.reason.translate(ESCAPES)}\n" for failure in failures]
    if lines:
        path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def write_duplicates(collection: Collection, shared: Sequence[Integers], splits: Sequence[str], path: Path) -> None:
    """Write a line for each image that has a copy; `splits` has the name of every image's split."""
    rows = [
        (str(number), splits[index], collection.class_name(int(collection.labels[index])), collection.location(index))
        for number, members in enumerate(shared, 1)
        for index in members.tolist()
    ]
    if rows:
        _write_csv(path, ("group", "split", "class", "place"), rows)


def _file_name(collection: Collection, index: int) -> str:
    """Return the name of the file if a class folder would show it, else the number of the image."""
    path = collection.path(index)
    if path is not None and path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
        return path.name
    encoding = find_encoding(collection, index)
    file_format = "PNG" if encoding is None else encoding.file_format
    return f"{index:07d}{_SUFFIXES.get(file_format, f'.{file_format.lower()}')}"


def _free_name(folder: Path, name: str, taken: set[Path]) -> Path:
    target, number = folder / name, 2
    while target in taken:
        target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    taken.add(target)
    return target


def _link(source: Path, target: Path, *, copy: bool) -> str:
    if not copy:
        try:
            # The file itself, should its name be a symbolic link.
            os.link(os.path.realpath(source), target)
            return "hard links"
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
    shutil.copy2(source, target)
    return "copies" if copy else "copies, since this file system cannot link them"


def _write_image(collection: Collection, index: int, target: Path) -> str:
    data = stored_bytes(collection, index)
    if data is None:
        file = io.BytesIO()
        Image.fromarray(collection.read(index).permute(1, 2, 0).numpy()).save(file, "PNG")
        data = file.getvalue()
    target.write_bytes(data)
    return "new files"


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path.name}: a file name is not UTF-8 ({error.object!r}), and a list is; rename the file"
        ) from error
