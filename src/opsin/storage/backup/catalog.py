"""The catalogue of a backup, by which an incomplete or damaged backup is never taken for a run.

STORE/
├── backup.json                     the name of the run, and the sha256 of every file that is not of a checkpoint
├── recipe.yaml, metrics.jsonl ...  the files of the run directory under their own names
└── checkpoints/
    ├── step-00000123/              the files of a checkpoint
    └── step-00000123.json          its mark: written last, so that a checkpoint without it does not exist

Files of a run change while it goes on. `backup.json` is written before them and lists every content that may be there.

Functions of a store raise `StoreError` where it fails. `read_mark` and `read_index` raise `DamagedCatalog` for a
content that nobody wrote, and `RunError` for one that a newer opsin wrote.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from opsin.errors import RunError
from opsin.storage.backup.store import BackupStore, Entry, ReadableStore, put_bytes, read_bytes
from opsin.storage.records import RecordFormat, Shape

FORMAT = 1
"""The newest format that this code reads, and the one that it writes."""

INDEX = "backup.json"
CHECKPOINTS = "checkpoints"

_MARK_NAME = re.compile(r"step-(\d+)\.json")


class DamagedCatalog(Exception):
    """An index or a mark that is not what was written."""


def _check_name(name: str) -> str:
    """Return `name`, which must lie within the folder that its file is written to."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or any(part.startswith(".") for part in path.parts) or "\\" in name:
        raise ValueError(f"{name!r} cannot be the name of a file in a run directory")
    return name


_Name = Annotated[str, AfterValidator(_check_name)]


@dataclass(frozen=True, slots=True)
class Index:
    """The run that a backup is of, and the contents of its files."""

    run: str
    """A random name that a run keeps for life."""
    files: Mapping[_Name, tuple[Entry, ...]]
    """The contents that each file may have, the newest first."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class _Mark:
    step: int
    files: dict[_Name, Entry]
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class _Format:
    format: int


_INDEX = RecordFormat(Index, indent=1)
_MARK = RecordFormat(_Mark, indent=1)
_FORMAT = RecordFormat(_Format)


def step_folder(step: int) -> str:
    """The folder of a checkpoint, in a run directory and in its backup."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def is_of_checkpoint(name: str) -> bool:
    """True if a file belongs to a checkpoint or is its mark."""
    parts = PurePosixPath(name).parts
    return parts[0] == CHECKPOINTS and (len(parts) > 2 or _MARK_NAME.fullmatch(parts[-1]) is not None)


def local_steps(folder: Path, prefix: str = "") -> dict[int, Path]:
    """Return the complete checkpoints of a run directory, oldest first; with `prefix` those that it has renamed so."""
    names = re.compile(rf"{prefix}step-(\d+)")
    paths = (folder / CHECKPOINTS).glob("*")
    return dict(sorted((int(m[1]), path) for path in paths if (m := names.fullmatch(path.name)) and path.is_dir()))


def marked_steps(store: ReadableStore) -> list[int]:
    """Return the steps of the complete checkpoints in a backup, oldest first."""
    names = (PurePosixPath(name) for name in store.names(CHECKPOINTS))
    return sorted(int(m[1]) for p in names if p.parent.name == CHECKPOINTS and (m := _MARK_NAME.fullmatch(p.name)))


def read_mark(store: ReadableStore, step: int) -> dict[str, Entry] | None:
    """Return the files of a checkpoint; None if it has no mark."""
    name = f"{step_folder(step)}.json"
    mark = _read(store, name, _MARK)
    if mark is not None and mark.step != step:
        raise DamagedCatalog(f"{store.shown}: {name}: is of step {mark.step}")
    return None if mark is None else mark.files


def write_mark(store: BackupStore, step: int, files: Mapping[str, Entry]) -> None:
    """Mark a checkpoint as complete: all of its files are in the backup."""
    put_bytes(store, f"{step_folder(step)}.json", _MARK.dump(_Mark(step, dict(sorted(files.items())))))


def read_index(store: ReadableStore) -> Index | None:
    """Return the index of the backup in `store`; None if there is none."""
    return _read(store, INDEX, _INDEX)


def write_index(store: BackupStore, run: str, files: Mapping[str, tuple[Entry, ...]]) -> None:
    """Replace the index."""
    put_bytes(store, INDEX, _INDEX.dump(Index(run, dict(sorted(files.items())))))


def _read(store: ReadableStore, name: str, record: RecordFormat[Shape]) -> Shape | None:
    data = read_bytes(store, name)
    if data is None:
        return None
    try:
        if (found := _FORMAT.parse(data).format) > FORMAT:
            raise RunError(
                f"{store.shown}: {name}: too new: format {found}, this opsin reads up to {FORMAT}; upgrade opsin"
            )
        return record.parse(data)
    except ValueError as error:
        raise DamagedCatalog(f"{store.shown}: {name}: cannot be read ({error})") from error
