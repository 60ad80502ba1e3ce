"""The encoded images of parquet files, by row number.

A row group is read as a whole, so that each single row in random order costs a group. Small tables are therefore kept
in memory, each row group from its first use on; large ones are written once, uncompressed, to a file in the cache,
which all processes map: one image then costs its own bytes.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opsin.errors import DataError
from opsin.storage.lock import one_process_in


class Store(Protocol):
    """Encoded images by row number. Pickles without its images."""

    def read(self, row: int) -> bytes:
        """Return the bytes of one image; none if the row is null."""
        ...


@dataclass(frozen=True)
class RowGroups:
    """The row groups of several files, one after the other: `(file, number in the file)` and rows before each."""

    column: str
    files: tuple[Path, ...]
    groups: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    num_rows: int
    num_bytes: int
    """Size of the column, uncompressed."""

    def group_of(self, row: int) -> int:
        """Return the number of the group that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def location(self, row: int) -> str:
        """`train.parquet row 17`, counted from 0 in the file."""
        file = self.groups[self.group_of(row)][0]
        first = next(start for start, group in zip(self.starts, self.groups, strict=True) if group[0] == file)
        return f"{self.files[file]} row {row - first}"

    def load(self, group: int) -> pa.ChunkedArray:
        """Return the images of a group as binary values."""
        file, number = self.groups[group]
        with pq.ParquetFile(self.files[file]) as opened:
            column = opened.read_row_group(number, columns=[self.column]).column(0)
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def find_row_groups(files: tuple[Path, ...], column: str) -> RowGroups:
    """Return the row groups of `files`, in their order."""
    groups, starts, rows, num_bytes = [], [], 0, 0
    for index, file in enumerate(files):
        with pq.ParquetFile(file) as opened:
            for number in range(opened.metadata.num_row_groups):
                group = opened.metadata.row_group(number)
                groups.append((index, number))
                starts.append(rows)
                rows += group.num_rows
                chunks = (group.column(each) for each in range(group.num_columns))
                num_bytes += sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return RowGroups(column, files, tuple(groups), tuple(starts), rows, num_bytes)


@dataclass
class InMemory:
    """Row groups that stay in memory once they were read."""

    rows: RowGroups
    _loaded: dict[int, pa.ChunkedArray] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_loaded": {}}

    def read(self, row: int) -> bytes:
        """Return the bytes of one image; none if the row is null."""
        group = self.rows.group_of(row)
        if group not in self._loaded:
            self._loaded[group] = self.rows.load(group)
        return self._loaded[group][row - self.rows.starts[group]].as_py() or b""


@dataclass
class Unpacked:
    """One file with all images end to end, mapped into memory, and the offset of each in a second file."""

    images: Path
    offsets: Path
    _mapped: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def read(self, row: int) -> bytes:
        """Return the bytes of one image; none if the row is null."""
        if self._mapped is None:
            self._mapped = np.memmap(self.images, dtype=np.uint8, mode="r"), np.load(self.offsets, mmap_mode="r")
        pixels, offsets = self._mapped
        return pixels[offsets[row] : offsets[row + 1]].tobytes()


def unpack(rows: RowGroups, folder: Path) -> Unpacked:
    """Return the images of `rows` as a file in `folder`; it is written unless the same parquet files have one there.

    Raises:
        DataError: not enough space, or the folder is not writable.
    """
    key = _key(rows)
    unpacked = Unpacked(folder / f"{key}.images", folder / f"{key}.offsets.npy")
    with one_process_in(folder):
        # The offsets get their name last: this shows that both files are whole.
        if not unpacked.offsets.exists():
            free = shutil.disk_usage(folder).free
            if free < rows.num_bytes:
                raise DataError(_no_space(rows, folder, f"{free / 2**30:.1f} GiB are free"))
            try:
                _write(rows, unpacked)
            except OSError as error:
                raise DataError(_no_space(rows, folder, str(error))) from error
    return unpacked


def _key(rows: RowGroups) -> str:
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in rows.files]
    return hashlib.blake2b(repr((rows.column, facts)).encode(), digest_size=8).hexdigest()


def _no_space(rows: RowGroups, folder: Path, reason: str) -> str:
    return (
        f"{folder}: cannot unpack the {rows.num_bytes / 2**30:.1f} GiB of images of {rows.files[0].parent} ({reason}); "
        f"tables of this size are unpacked once into the cache: make room, or choose another cache folder"
    )


def _write(rows: RowGroups, unpacked: Unpacked) -> None:
    new = unpacked.images.with_suffix(".new")
    with new.open("wb") as file:
        lengths = [0, *(file.write(image) for image in _all_images(rows))]
    os.replace(new, unpacked.images)
    with new.open("wb") as file:
        np.save(file, np.cumsum(np.array(lengths, dtype=np.int64)))
    os.replace(new, unpacked.offsets)


def _all_images(rows: RowGroups) -> Iterator[bytes]:
    for group in range(len(rows.groups)):
        for image in rows.load(group):
            yield image.as_py() or b""
