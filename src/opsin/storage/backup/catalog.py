"""What a backup says about itself, so that nothing half sent or damaged is taken for a run.

PLACE/
├── backup.json                     which run this is, and the sha256 of every file that is no checkpoint
├── recipe.yaml, metrics.jsonl ...  the files of the run directory under their own names
└── checkpoints/
    ├── step-00000123/              the files of a checkpoint
    └── step-00000123.json          its mark: written last, so a checkpoint without it does not exist

Files of a run change while it goes on. `backup.json` is written before them and lists every content that may be there.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from opsin.errors import RunError
from opsin.storage.backup.store import BackupStore, put_bytes, read_bytes

FORMAT = 1
"""The newest format that this code reads, and the one that it writes."""

INDEX = "backup.json"
CHECKPOINTS = "checkpoints"

_MARK = re.compile(r"step-(\d+)\.json")
_STEP = re.compile(r"step-(\d+)")
_DAMAGED = re.compile(r"damaged-step-(\d+)")


class DamagedCatalog(Exception):
    """An index or a mark that is not what was written."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The content of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """The run that a backup is of, and what its files may hold."""

    run: str
    """A random name that a run keeps for life."""
    files: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """The contents that each file may have, the newest first."""


def step_folder(step: int) -> str:
    """Where the files of a checkpoint are, here and there."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def is_of_checkpoint(name: str) -> bool:
    """Whether a file belongs to a checkpoint, be it the file of a mark."""
    parts = PurePosixPath(name).parts
    return parts[0] == CHECKPOINTS and (len(parts) > 2 or _MARK.fullmatch(parts[-1]) is not None)


def entry_of(path: Path) -> Entry:
    """The content of a file that is there.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(file.tell(), digest)


def local_steps(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a run directory, oldest first."""
    return dict(sorted(_steps(folder, _STEP)))


def damaged_steps(folder: Path) -> set[int]:
    """The steps of the checkpoints that a run directory has set aside because they were damaged."""
    return {step for step, _ in _steps(folder, _DAMAGED)}


def marked_steps(store: BackupStore) -> list[int]:
    """The steps whose checkpoints were sent whole, oldest first.

    Raises:
        StoreError: out of reach.
    """
    names = (PurePosixPath(name) for name in store.names(CHECKPOINTS))
    return sorted(int(m[1]) for p in names if p.parent.name == CHECKPOINTS and (m := _MARK.fullmatch(p.name)))


def read_mark(store: BackupStore, step: int) -> dict[str, Entry] | None:
    """The files of a checkpoint; None where it has no mark.

    Raises:
        DamagedCatalog: the mark is not what was written.
        StoreError: out of reach.
        RunError: written by a newer opsin.
    """
    name = f"{step_folder(step)}.json"
    facts = _read(store, name)
    if facts is None:
        return None
    try:
        if facts["step"] != step:
            raise DamagedCatalog(f"{store.shown}: {name}: is of step {facts['step']}")
        return {_checked_name(key): Entry(**value) for key, value in facts["files"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedCatalog(f"{store.shown}: {name}: cannot be read") from error


def write_mark(store: BackupStore, step: int, files: Mapping[str, Entry]) -> None:
    """Make a checkpoint exist whose files are all there.

    Raises:
        StoreError: it is not written.
    """
    facts = {"format": FORMAT, "step": step, "files": {name: asdict(files[name]) for name in sorted(files)}}
    put_bytes(store, f"{step_folder(step)}.json", _text(facts))


def read_index(store: BackupStore) -> Index | None:
    """The index of the backup in `store`; None where there is none.

    Raises:
        DamagedCatalog: it is not what was written.
        StoreError: out of reach.
        RunError: written by a newer opsin.
    """
    facts = _read(store, INDEX)
    if facts is None:
        return None
    try:
        listed = {_checked_name(name): tuple(Entry(**e) for e in entries) for name, entries in facts["files"].items()}
        return Index(str(facts["run"]), listed)
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedCatalog(f"{store.shown}: {INDEX}: cannot be read") from error


def write_index(store: BackupStore, index: Index) -> None:
    """Put `index` in exchange for the one before.

    Raises:
        StoreError: it is not written.
    """
    files = {name: [asdict(entry) for entry in index.files[name]] for name in sorted(index.files)}
    put_bytes(store, INDEX, _text({"format": FORMAT, "run": index.run, "files": files}))


def _steps(folder: Path, form: re.Pattern[str]) -> Iterator[tuple[int, Path]]:
    places = (folder / CHECKPOINTS).glob("*")
    return ((int(m[1]), path) for path in places if (m := form.fullmatch(path.name)) and path.is_dir())


def _read(store: BackupStore, name: str) -> dict[str, Any] | None:
    data = read_bytes(store, name)
    if data is None:
        return None
    try:
        facts: dict[str, Any] = json.loads(data)
        too_new = facts["format"] > FORMAT
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedCatalog(f"{store.shown}: {name}: cannot be read") from error
    if too_new:
        raise RunError(
            f"{store.shown}: {name}: too new: format {facts['format']}, this opsin reads up to {FORMAT}; upgrade opsin"
        )
    return facts


def _checked_name(name: str) -> str:
    """`name`, which is never outside of the folder that it will be written to."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or any(part.startswith(".") for part in path.parts) or "\\" in name:
        raise DamagedCatalog(f"{name!r} is no name of a file in a run directory")
    return name


def _text(facts: Mapping[str, object]) -> bytes:
    return (json.dumps(facts, indent=1) + "\n").encode()
