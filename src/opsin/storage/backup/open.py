"""A store by its path or address: a folder, or a bucket of an object store."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from opsin.storage.backup.config import is_address
from opsin.storage.backup.store import CHUNK, Absent, BackupStore, StoreError
from opsin.storage.files import replace_file

_PARTIAL = ".sending"


def open_store(path: str) -> BackupStore:
    """The store at a path or an address that `check_path` has let through.

    Raises:
        ConfigError: the library for object stores is not installed.
        StoreError: the address cannot be used.
    """
    if is_address(path):
        from opsin.storage.backup.bucket import open_bucket

        return open_bucket(path)
    return Folder(Path(os.path.expanduser(path)))


class Folder:
    """A second folder: of another disk, or of a server.

    The folder is made, the one above it is not: a disk that is not mounted is out of reach, and nothing is
    written in its stead.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.shown = str(self._path)

    def put(self, name: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        target = self._path / name
        partial = target.with_name(f".{target.name}{_PARTIAL}")
        try:
            self._path.mkdir(exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, chunks, temporary=partial)
        except OSError as error:
            raise self._error(error) from error

    def holds(self, name: str, *, size: int, sha256: str) -> bool:
        path = self._path / name
        try:
            if not path.is_file() or path.stat().st_size != size:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError as error:
            raise self._error(error) from error

    def fetch(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        try:
            with (self._path / name).open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK):
                    yield chunk
        except FileNotFoundError as error:
            raise Absent(f"{self.shown}: holds no {name}", refused=True) from error
        except OSError as error:
            raise self._error(error) from error

    def names(self, folder: str = "") -> list[str]:
        try:
            found = [path for path in (self._path / folder).rglob("*") if path.is_file()]
            return sorted(path.relative_to(self._path).as_posix() for path in found if not _is_partial(path))
        except OSError as error:
            raise self._error(error) from error

    def remove(self, name: str) -> None:
        path = self._path / name
        try:
            path.unlink(missing_ok=True)
            if path.parent != self._path and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        except OSError as error:
            raise self._error(error) from error

    def clear(self) -> None:
        try:
            left = [path for path in self._path.rglob(f".*{_PARTIAL}") if path.is_file()]
        except OSError as error:
            raise self._error(error) from error
        for path in left:
            self.remove(path.relative_to(self._path).as_posix())

    def _error(self, error: OSError) -> StoreError:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError) and not self._path.parent.is_dir():
            reason = f"there is no folder {self._path.parent} (make it, or mount its disk)"
        return StoreError(f"{self.shown}: {reason}")


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)
