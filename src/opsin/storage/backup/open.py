"""Opens a store by its path or address: a folder, or a bucket of an object store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opsin.errors import ConfigError
from opsin.storage.backup.config import is_address
from opsin.storage.backup.store import CHUNK, Absent, BackupStore, StoreError, entry_of
from opsin.storage.files import reason_of, replace_file

_PARTIAL = ".{}.sending"


def open_store(path: str) -> BackupStore:
    """Return the store at a path or an address that `check_path` has accepted.

    Raises:
        ConfigError: the library for object stores is not installed.
        StoreError: the address cannot be used.
    """
    if is_address(path):
        try:
            from opsin.storage.backup.bucket import Bucket
        except ImportError as error:
            raise ConfigError(f"{path}: object stores need the package obstore; pip install obstore") from error
        return Bucket(path)
    return Folder(Path(os.path.expanduser(path)))


class Folder:
    """A second folder: of another disk, or of a server.

    The folder is made, the one above it is not: a disk that is not mounted is out of reach, and nothing is written
    where it belongs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.shown = str(self._path)

    def put(self, name: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        target = self._path / name
        with self._store_errors():
            self._path.mkdir(exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, chunks, temporary=target.with_name(_PARTIAL.format(target.name)))

    def holds(self, name: str, *, size: int, sha256: str) -> bool:
        path = self._path / name
        with self._store_errors():
            return path.is_file() and path.stat().st_size == size and entry_of(path).sha256 == sha256

    def fetch(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        with self._store_errors():
            if not (self._path / name).exists():
                raise Absent(f"{self.shown}: holds no {name}", refused=True)
            with (self._path / name).open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK):
                    yield chunk

    def names(self, folder: str = "") -> list[str]:
        with self._store_errors():
            found = [path for path in (self._path / folder).rglob("*") if path.is_file()]
            whole = (path for path in found if not path.match(_PARTIAL.format("*")))
            return sorted(path.relative_to(self._path).as_posix() for path in whole)

    def remove(self, name: str) -> None:
        path = self._path / name
        with self._store_errors():
            path.unlink(missing_ok=True)
            if path.parent != self._path and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()

    def clear(self) -> None:
        with self._store_errors():
            for path in [path for path in self._path.rglob(_PARTIAL.format("*")) if path.is_file()]:
                self.remove(path.relative_to(self._path).as_posix())

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = reason_of(error)
            if isinstance(error, FileNotFoundError) and not self._path.parent.is_dir():
                reason = f"there is no folder {self._path.parent} (make it, or mount its disk)"
            raise StoreError(f"{self.shown}: {reason}") from error
