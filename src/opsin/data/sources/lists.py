"""CSV and TSV lists of image files."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opsin.data.sources.files import Files, label_files
from opsin.data.sources.labels import TRAIN, VALIDATION, Labels, Opened, choose_validation, counted, describe
from opsin.errors import DataError

_SPLIT_COLUMN = "split"


@dataclass
class _Rows:
    paths: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)


def open_list(
    path: Path, labels: Labels = "auto", *, image_column: str | None = None, label_column: str | None = None
) -> Opened:
    """Open the images that a list names, relative to the folder of the list or absolute.

    The first line has the column names: `path`, `label` (optional with `labels="none"`) and optionally `split`
    (`train`, `val`, `valid`, `validation`, `test`). An empty label means unlabelled. Columns are separated by tabs in
    `.tsv`, by commas otherwise.

    Raises:
        DataError: columns, values or files are missing.
    """
    splits = _read(path, image_column or "path", None if labels == "none" else label_column or "label")
    if TRAIN not in splits:
        raise DataError(f"{path}: no training images; a list needs lines below its header, some with split {TRAIN}")
    _check_files(path, [image for rows in splits.values() for image in rows.paths])
    train = _source(path, splits[TRAIN], labels)
    chosen = choose_validation(splits)
    val = _source(path, splits[chosen], labels, classes=train.classes) if chosen else None
    unused = [split for split in splits if split not in (TRAIN, chosen)]
    note = f"not used: split {', '.join(unused)}" if unused else ""
    found = counted(len(train.classes), "class") if train.classes else "images without labels"
    return Opened("csv", train, val, describe(f"found {found} in {path}", train, val, note))


def _source(path: Path, rows: _Rows, labels: Labels, classes: tuple[str, ...] | None = None) -> Files:
    names = None if labels == "none" else rows.names
    source = label_files(path.parent, rows.paths, names, classes=classes)
    source.name = str(path)
    return source


def _read(path: Path, image_column: str, label_column: str | None) -> dict[str, _Rows]:
    """Return the rows by split."""
    splits: dict[str, _Rows] = {}
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            _check_columns(path, reader.fieldnames or (), image_column, label_column)
            for row in reader:
                line = f"{path}:{reader.line_num}"
                split = _split(line, row.get(_SPLIT_COLUMN, TRAIN))
                if not row[image_column]:
                    raise DataError(
                        f"{line}: column {image_column} is empty; every line names an image: fill or remove it"
                    )
                rows = splits.setdefault(split, _Rows())
                rows.paths.append(row[image_column])
                rows.names.append((row[label_column] or None) if label_column else None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); a list is text in UTF-8: check the file") from error
    return splits


def _check_columns(path: Path, columns: Sequence[str], image_column: str, label_column: str | None) -> None:
    needed = {"data.image_column": image_column} | ({"data.label_column": label_column} if label_column else {})
    faults = [
        f"{path}: no column {column!r} in the first line, which has {', '.join(columns) or 'nothing'}; "
        f"a list starts with a line of column names: add it, or set {key}"
        + (", or data.labels=none" if key == "data.label_column" else "")
        for key, column in needed.items()
        if column not in columns
    ]
    if faults:
        raise DataError(*faults)


def _split(line: str, value: str | None) -> str:
    split = (value or "").strip().lower()
    if split not in (TRAIN, *VALIDATION):
        raise DataError(f"{line}: split {value!r} is unknown; it is one of {', '.join((TRAIN, *VALIDATION))}")
    return split


def _check_files(path: Path, images: Sequence[str]) -> None:
    missing = [image for image in images if not os.path.lexists(os.path.join(path.parent, image))]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{path}: {len(missing)} of {len(images)} files do not exist ({shown}); "
            f"paths are relative to {path.parent}: correct the paths, or remove these lines"
        )
