"""Writing a checkpoint: whole or not at all, whenever the process is killed or the power fails.

It is written under a hidden name, synced, then renamed. One that replaces another is first renamed to
`.replacing-step-...`: from then on the replacement is certain.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from opsin.__version__ import __version__
from opsin.storage.compression import SUFFIX, Compressor
from opsin.storage.files import nearest_folder, put_in_place, reason_of, sync
from opsin.training.checkpoints.format import MANIFEST, STATE, digest, name_of
from opsin.training.checkpoints.snapshot import Snapshot

_MIB = 2**20
_GATHERED = 2**18
_EACH_TENSOR, _MANIFEST_BYTES = 320, 4096  # for names and alignment in both files, measured: 270


def write_checkpoint(folder: Path, snapshot: Snapshot, about: Mapping[str, Any], *, level: int | None) -> Path:
    """Write `snapshot` to `folder/step-N`; it survives a power cut once this returns.

    `about` has further facts for the manifest. `level` is that of the compression, None for none.

    Raises:
        OSError: it cannot be written (a full disk, say); nothing of it is left.
    """
    path = folder / name_of(snapshot.step)
    partial = folder / f".writing-{snapshot.step}-{os.getpid()}"
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    try:
        partial.mkdir()
        name = STATE if level is None else f"{STATE}{SUFFIX}"
        facts: dict[str, Any] = {
            "format": 1 if level is None and not snapshot.detours else 2,
            "step": snapshot.step,
            "elapsed_s": snapshot.elapsed_s,
            "opsin": __version__,
            "torch": torch.__version__,
            **about,
            "optimizer": snapshot.optimizer,
            "files": {name: _write_state(partial / name, snapshot, level)},
        }
        if snapshot.detours:
            facts["detours"] = [asdict(detour) for detour in snapshot.detours]
        text = json.dumps({**facts, "sha256": digest(facts)}, indent=2) + "\n"
        with _SyncedFile(partial / MANIFEST) as file:
            file.write(text.encode())
        sync(partial)
        put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def room(folder: Path, snapshot: Snapshot) -> tuple[int, int]:
    """The largest size of a checkpoint of `snapshot` without compression, and the free space, in bytes."""
    needed = snapshot.num_bytes + snapshot.num_tensors * _EACH_TENSOR + _MANIFEST_BYTES
    return needed, shutil.disk_usage(nearest_folder(folder)).free


def write_fault(error: OSError, folder: Path, snapshot: Snapshot) -> str:
    """The reason why `snapshot` could not be written into `folder`."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return reason_of(error)
    needed, free = room(folder, snapshot)
    return f"no space left (needs about {needed / _MIB:.1f} MiB, {free / _MIB:.1f} MiB are free)"


class _SyncedFile:
    """A new file, compressed and hashed while it is written, and synced when closed.

    An error is raised when the file is closed: torch writes from C++, where no exception may pass. Small pieces, of
    which each tensor has several, are gathered: after every system call a thread may wait for the interpreter.
    """

    def __init__(self, path: Path, level: int | None = None) -> None:
        self._file = path.open("xb", buffering=0)
        self._compressor = None if level is None else Compressor(level)
        self._gathered = bytearray()
        self._sha256 = hashlib.sha256()
        self._error: OSError | None = None
        self._bytes = 0

    @property
    def entry(self) -> dict[str, str | int]:
        """The facts about the file in the manifest."""
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def __enter__(self) -> "_SyncedFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._pass_on()
            if self._compressor is not None:
                self._write(memoryview(self._compressor.finish()))
            if self._error is None:
                os.fsync(self._file.fileno())
        if self._error is not None:
            raise self._error

    def write(self, data: bytes | memoryview) -> int:
        piece = memoryview(data).cast("B")
        if len(piece) + len(self._gathered) <= _GATHERED:
            self._gathered += piece
        else:
            self._pass_on()
            self._pass_on(piece)
        return len(piece)

    def flush(self) -> None:
        pass

    def _pass_on(self, piece: memoryview | None = None) -> None:
        if piece is None:
            piece, self._gathered = memoryview(self._gathered), bytearray()
        for made in (piece,) if self._compressor is None else self._compressor.feed(piece):
            self._write(memoryview(made))

    def _write(self, rest: memoryview) -> None:
        if self._error is not None:
            return
        self._sha256.update(rest)
        self._bytes += len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error


def _write_state(path: Path, snapshot: Snapshot, level: int | None) -> dict[str, str | int]:
    with _SyncedFile(path, level) as file:
        torch.save(snapshot.content, file)  # type: ignore[arg-type]  # it asks for `write` and `flush` only
    return file.entry
