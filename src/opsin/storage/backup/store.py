"""The interface of a backup's store, which takes and gives files by name: a folder, or a bucket of an object store.

A name is a relative path with `/` (`checkpoints/step-00000123/state.pt`). A file is there whole or not at all.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opsin.storage.teller import Teller

CHUNK = 2**20
"""Bytes that are read, sent and fetched at once."""
_ATTEMPTS = 5
_FIRST_PAUSE_S = 1.0


class StoreError(Exception):
    """A store did not do what was asked. The text is one line without secrets.

    `refused` is true if the store answers and refuses (no such bucket, no permission), false if it is out of reach.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class Absent(StoreError):
    """There is no file of this name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The content of a file."""

    bytes: int
    sha256: str


def entry_of(path: Path) -> Entry:
    """Return the content of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(file.tell(), digest)


class ReadableStore(Protocol):
    """Files by name, to read. Every method raises `StoreError`."""

    shown: str
    """The path or address in messages."""

    def fetch(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        """The content from byte `start` on, nothing where it ends before; `Absent` where there is no such file."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """All files below `folder`, sorted."""
        ...


class BackupStore(ReadableStore, Protocol):
    """Files by name, outside of the run directory. Every method raises `StoreError`."""

    def put(self, name: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        """Store a file of `size` bytes, and replace an older one. What `chunks` raises passes through."""
        ...

    def holds(self, name: str, *, size: int, sha256: str) -> bool:
        """True if a file with this content is there."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens where there is none."""
        ...

    def clear(self) -> None:
        """Delete the incomplete files of processes that died while they stored them."""
        ...


class Attempts:
    """The attempts at one request: five in a row, with pauses of 1, 2, 4 and 8 s."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self.failures = 0
        """Failures in a row; an attempt that comes further sets it to 0."""

    @contextmanager
    def one(self) -> Iterator[None]:
        """Try what is in the block. If the store fails, report that and pause; the last failure passes through."""
        try:
            yield
        except StoreError as error:
            self.failures += 1
            if error.refused or self.failures == _ATTEMPTS:
                raise
            self._teller.notice(f"{error}; trying again")
            time.sleep(_FIRST_PAUSE_S * 2.0 ** (self.failures - 1))


class PatientReader:
    """Reads from a store, and asks again if it is out of reach. For a process that has nothing else to do meanwhile."""

    def __init__(self, store: ReadableStore, teller: Teller) -> None:
        self.shown = store.shown
        self._store = store
        self._teller = teller

    def names(self, folder: str = "") -> list[str]:
        attempts = Attempts(self._teller)
        while True:
            with attempts.one():
                return self._store.names(folder)

    def fetch(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        # An interrupted transfer goes on at the byte that it has reached.
        attempts = Attempts(self._teller)
        while True:
            with attempts.one():
                for chunk in self._store.fetch(name, start=start):
                    start += len(chunk)
                    attempts.failures = 0
                    yield chunk
                return


def put_bytes(store: BackupStore, name: str, data: bytes) -> None:
    """Store a small file."""
    store.put(name, iter([data]), size=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_bytes(store: ReadableStore, name: str) -> bytes | None:
    """Return the content of a small file; None where there is none."""
    try:
        return b"".join(store.fetch(name))
    except Absent:
        return None
