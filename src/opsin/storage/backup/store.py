"""Where a backup can be: a folder, or a bucket of an object store. Both take and give files by name.

A name is a relative path with `/` (`checkpoints/step-00000123/state.pt`). A file is there whole or not at all.
"""

import hashlib
from collections.abc import Iterator
from typing import Protocol

CHUNK = 2**20
"""Bytes that are read, sent and fetched at once."""


class StoreError(Exception):
    """A store did not do what was asked. The text is one line without secrets.

    `refused` tells a store that answers and says no (no such bucket, no permission) from one that is out of reach.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class Absent(StoreError):
    """There is no file of this name."""


class BackupStore(Protocol):
    """Files by name, somewhere else. Every method raises `StoreError`."""

    shown: str
    """What messages call it."""

    def put(self, name: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        """Store a file of `size` bytes, replacing one that is there. What `chunks` raises passes through."""
        ...

    def holds(self, name: str, *, size: int, sha256: str) -> bool:
        """Whether a file with this content is there already."""
        ...

    def fetch(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        """The content from byte `start` on, nothing where it ends before; `Absent` where there is no such file."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """All files below `folder`, sorted."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens where there is none."""
        ...

    def clear(self) -> None:
        """Delete what is left of files that were broken off by the death of the process that stored them."""
        ...


def put_bytes(store: BackupStore, name: str, data: bytes) -> None:
    """Store a small file.

    Raises:
        StoreError: it is not stored.
    """
    store.put(name, iter([data]), size=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_bytes(store: BackupStore, name: str) -> bytes | None:
    """A small file; None where there is none.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return b"".join(store.fetch(name))
    except Absent:
        return None
