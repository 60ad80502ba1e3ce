"""Parquet files with images and labels, in the layout of the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from opsin.data.base import UnreadableImage, raise_if_transient
from opsin.data.decode import decode
from opsin.data.sources.columns import Columns, find_columns
from opsin.data.sources.labels import (
    TRAIN,
    Labels,
    Opened,
    choose_validation,
    counted,
    describe,
    find_classes,
    index_labels,
    no_labels,
    split_in_name,
)
from opsin.data.sources.stores import InMemory, RowGroups, Store, Unpacked, find_row_groups, unpack
from opsin.errors import DataError

IN_MEMORY_BYTES = 512 << 20
"""Tables up to this size of encoded images are kept in memory by every process; larger ones are unpacked."""


@dataclass
class Table:
    """Images in the rows of parquet files."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    rows: RowGroups
    store: Store

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W]."""
        try:
            data = self.store.read(index)
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError):
                raise_if_transient(self.location(index), error)
            raise UnreadableImage(f"the row cannot be read ({error})") from error
        if not data:
            raise UnreadableImage("the row holds no image bytes")
        return decode(data)

    def location(self, index: int) -> str:
        """`train.parquet row 17`, counted from 0 in the file."""
        return self.rows.location(index)


def find_tables(folder: Path) -> list[Path]:
    """Return the parquet files below a folder, sorted, without hidden ones."""
    files = sorted(folder.rglob("*.parquet"))
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def open_tables(
    path: Path,
    labels: Labels = "auto",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    cache: Path,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> Opened:
    """Open the images of a parquet file, or of all parquet files below a folder.

    The split is the word `train`, `val`, `valid`, `validation` or `test` in the file name, else in a folder name;
    without such words all files train. Columns that are not given are found.

    Raises:
        DataError: no files, no training split, unclear columns, a damaged file.
    """
    splits = {TRAIN: [path]} if path.is_file() else _find_splits(path)
    chosen = choose_validation(splits)
    ask = _Ask(labels, image_column, label_column)
    train_part = _read_part(splits[TRAIN], ask)
    val_part = _read_part(splits[chosen], ask) if chosen else None
    names = train_part.names
    classes = () if names is None else train_part.columns.classes or find_classes(names)
    if val_part is not None and names is not None and val_part.names is None:
        raise DataError(
            f"{val_part.files[0]}: no label column, but {train_part.files[0]} has {train_part.columns.label!r}; "
            f"both need it: add it, or set data.labels=none"
        )
    limit = in_memory_bytes
    train = _table(f"{path} {TRAIN}", train_part, classes, cache=cache, in_memory_bytes=limit)
    val = _table(f"{path} {chosen}", val_part, classes, cache=cache, in_memory_bytes=limit) if val_part else None
    unused = [name for name in splits if name not in (TRAIN, chosen)]
    notes = (
        f"not used: {', '.join(name or 'files without a split in their name' for name in unused)}" if unused else "",
        f"no label column among {', '.join(train_part.others)}, set data.label_column to use one"
        if names is None and labels == "auto"
        else "",
        f"images unpacked into {cache}" if any(isinstance(s.store, Unpacked) for s in (train, val) if s) else "",
    )
    found = counted(len(classes), "class") if classes else "images without labels"
    said = describe(f"found {found} in the parquet files of {path}", train, val, *notes)
    return Opened("parquet", train, val, said)


@dataclass(frozen=True)
class _Ask:
    labels: Labels
    image_column: str | None
    label_column: str | None


@dataclass(frozen=True)
class _Part:
    """The files of a split, with class names by row where there is a label column."""

    files: tuple[Path, ...]
    columns: Columns
    others: tuple[str, ...]
    names: list[str | None] | None
    rows: RowGroups


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files by split; under "" those without a split in their name, if others have one."""
    splits: dict[str, list[Path]] = {}
    for file in find_tables(folder):
        words = (split_in_name(part) for part in reversed(file.relative_to(folder).parts))
        splits.setdefault(next(filter(None, words), ""), []).append(file)
    if set(splits) == {""}:
        return {TRAIN: splits[""]}
    if TRAIN not in splits:
        found = f"only files of split {', '.join(filter(None, splits))}" if splits else "no .parquet files"
        raise DataError(
            f"{folder}: {found} in this folder; training needs files with {TRAIN!r} in their name: "
            f"rename them, or set data.path to one file"
        )
    return splits


def _read_part(files: list[Path], ask: _Ask) -> _Part:
    with _faults_explained(files[0]):
        schema = pq.read_schema(files[0])
    columns = find_columns(files[0], schema, ask.labels, image_column=ask.image_column, label_column=ask.label_column)
    names: list[str | None] | None = None if columns.label is None else []
    for file in files:
        with _faults_explained(file):
            if not pq.read_schema(file).equals(schema):
                raise DataError(
                    f"{file}: other columns than {files[0]}; all files of a split need the same: convert it"
                )
            if names is not None:
                names += _read_names(file, columns)
    with _faults_explained(files[0].parent):
        rows = find_row_groups(tuple(files), columns.image)
    if not rows.num_rows:
        raise DataError(f"{files[0]}: no rows; data.path needs at least one image: check the file")
    others = tuple(name for name in schema.names if name != columns.image.removesuffix(".bytes"))
    return _Part(tuple(files), columns, others, names, rows)


def _read_names(file: Path, columns: Columns) -> list[str | None]:
    """Return the class name of every row; None if the label is null, empty, or -1 with named classes."""
    values = pq.read_table(file, columns=[columns.label]).column(0).to_pylist()
    if columns.classes is None:
        return [None if value in (None, "") else str(value) for value in values]
    wrong = [value for value in values if value is not None and not -1 <= value < len(columns.classes)]
    if wrong:
        raise DataError(
            f"{file}: label {wrong[0]} in column {columns.label!r}, which names {len(columns.classes)} classes; "
            f"labels are 0 to {len(columns.classes) - 1}, or -1 for none: correct the file"
        )
    return [None if value in (None, -1) else columns.classes[value] for value in values]


def _table(name: str, part: _Part, classes: tuple[str, ...], *, cache: Path, in_memory_bytes: int) -> Table:
    labels = index_labels(part.names, classes, name) if classes and part.names else no_labels(part.rows.num_rows)
    store = InMemory(part.rows) if part.rows.num_bytes <= in_memory_bytes else unpack(part.rows, cache / "parquet")
    return Table(name, classes, labels, part.rows, store)


@contextmanager
def _faults_explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{file}: cannot be read as parquet ({reason}); replace or remove the file") from error
