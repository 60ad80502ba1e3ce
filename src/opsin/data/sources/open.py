"""Opening images: from a path, or the word `digits` or `cifar10`, to sources of training and validation images."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from opsin.data.decode import JPEG_DECODER
from opsin.data.sources import cifar10
from opsin.data.sources.digits import Digits, load_digits
from opsin.data.sources.folder import open_folder
from opsin.data.sources.kinds import KINDS, Asked, own_kinds
from opsin.data.sources.labels import Labels, Opened, describe, no_labels
from opsin.data.sources.lists import open_list
from opsin.data.sources.tables import open_tables
from opsin.errors import DataError

_Bundled = TypeVar("_Bundled", Digits, cifar10.Cifar10)

WORDS = ("digits", "cifar10")
"""Paths that name a data set instead of a file or a folder."""

_ENDINGS = {"csv": (".csv", ".tsv"), "parquet": (".parquet",), "cifar10": (".tar.gz", ".tgz")}


def open_sources(
    path: str,
    *,
    kind: str = "auto",
    labels: Labels = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    cache: Path,
) -> Opened:
    """Open the training images of a path, and its validation images if it has a split.

    `kind` is one of `KINDS`, one of `own_kinds()`, or `auto`: the words `digits` and `cifar10` are data sets (a folder
    of that name is `./digits`); a path that a kind of one's own recognises is of that kind; a file is known by its
    ending; a folder with python batches is CIFAR-10, one with parquet files in it or in its folder `data` is parquet,
    any other holds image files. The word `cifar10` looks into the folder `cache`, then downloads. `image_column` and
    `label_column` are for csv and parquet.

    Raises:
        DataError: the path is missing, empty, unclear or damaged.
    """
    root = Path(os.path.expanduser(path))
    own = own_kinds()
    if kind not in ("auto", *KINDS, *own):
        raise DataError(f"data.kind={kind} is unknown; it is auto or one of {', '.join((*KINDS, *own))}")
    if kind not in own and path not in WORDS and not root.exists():
        raise DataError(
            f"{path}: no such file or folder; data.path is a folder of images, a .csv list, .parquet files, "
            f"digits or cifar10: check the path, which is relative to {Path.cwd()}"
        )
    found = _find_kind(path, root) if kind == "auto" else kind
    if labels == "folders" and found in KINDS and found != "folder":
        raise DataError(f"{path}: data.labels=folders needs a folder of images, but this is {found}; use auto or none")
    try:
        asked = Asked(path, root, labels, image_column, label_column, cache)
        opened = own[found].open(asked) if found in own else _open(found, asked)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: {error.strerror or error}; opsin must be able to read all of data.path "
            f"as {found}: check the path, its permissions and data.kind"
        ) from error
    if JPEG_DECODER.decode is None:
        return replace(opened, said=f"{opened.said}; {JPEG_DECODER.said}")
    return opened


def _find_kind(path: str, root: Path) -> str:
    if path in WORDS:
        return path
    for kind, own in own_kinds().items():
        if own.recognises(root):
            return kind
    name = root.name.lower()
    if root.is_dir():
        if (root / cifar10.FOLDER).is_dir() or (root / cifar10.TRAIN_BATCHES[0]).is_file():
            return "cifar10"
        has_tables = any(next(folder.glob("*.parquet"), None) for folder in (root, root / "data"))
        return "parquet" if has_tables else "folder"
    for kind, group in _ENDINGS.items():
        if name.endswith(group):
            return kind
    endings = ", ".join(ending for known in _ENDINGS.values() for ending in known)
    raise DataError(f"{path}: not a known kind of file; data.path is a folder, or a file ending in {endings}")


def _open(kind: str, asked: Asked) -> Opened:
    if kind == "digits":
        return _open_digits(asked.labels)
    if kind == "cifar10":
        root = cifar10.fetch_cifar10(asked.cache) if asked.path == kind else asked.root
        return _open_cifar10(asked.path, root, asked.labels)
    if kind == "csv":
        return open_list(asked.root, asked.labels, image_column=asked.image_column, label_column=asked.label_column)
    if kind == "parquet":
        return open_tables(
            asked.root,
            asked.labels,
            image_column=asked.image_column,
            label_column=asked.label_column,
            cache=asked.cache,
        )
    return open_folder(asked.root, asked.labels)


def _open_digits(labels: Labels) -> Opened:
    digits = _label(load_digits(), labels)
    return Opened("digits", digits, None, describe("found the digits bundled with scikit-learn", digits, None))


def _open_cifar10(path: str, root: Path, labels: Labels) -> Opened:
    inner = root / cifar10.FOLDER
    train, test = (_label(part, labels) for part in cifar10.open_cifar10(inner if inner.is_dir() else root))
    found = "found CIFAR-10" + ("" if path == "cifar10" else f" in {path}")
    return Opened("cifar10", train, test, describe(found, train, test))


def _label(source: _Bundled, labels: Labels) -> _Bundled:
    return replace(source, classes=(), labels=no_labels(len(source))) if labels == "none" else source
