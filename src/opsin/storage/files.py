"""Files and folders that are replaced whole or not at all, whenever the process is killed or the power goes.

A file or a folder is made under a hidden name and renamed. A folder that replaces another is first renamed to
`.replacing-NAME`. From then on the replacement is certain: the next process that may write completes it.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opsin.errors import OpsinError, RunError

REPLACING = ".replacing-"
"""Prefix of the name of a complete folder that is about to replace an older one."""


@contextmanager
def writing(path: Path, advice: str, kind: type[OpsinError] = RunError) -> Iterator[None]:
    """Turn an OSError of the block into an error for the user: `path` cannot be written, the reason, and `advice`.

    Raises:
        OpsinError: of the given `kind`.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: cannot be written: {reason_of(error)}{_folder_above(path, error)}; {advice}") from error


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(above for above in (path, *path.parents) if above.is_dir())


def reason_of(error: OSError) -> str:
    """The system's words for an error, without file names."""
    return error.strerror or str(error)


def _folder_above(path: Path, error: OSError) -> str:
    """` (FOLDER)` where the fault is in a folder that leads to `path`, else nothing."""
    return f" ({error.filename})" if error.filename and Path(error.filename) in path.parents else ""


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make everything in `folder` survive a power cut, contents and names."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of the file `path` by `data`: a reader, or a crash, sees the old content or the new.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    replace_file(path, [data], temporary=path.with_name(f".{path.name}.{os.getpid()}.writing"))


def replace_file(path: Path, chunks: Iterable[bytes], *, temporary: Path) -> None:
    """Write `chunks` to the file `temporary`, in the folder of `path`, and give it the name `path`.

    What `chunks` raises passes through.

    Raises:
        OSError: it cannot be written; the old content of `path` stays, and `temporary` is gone.
    """
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def put_in_place(partial: Path, path: Path) -> None:
    """Give the folder `partial`, which is complete and synced, the name `path`; an older one there is deleted.

    Raises:
        OSError: it cannot be renamed; the older one stays, or `remove_leftovers` completes the replacement.
    """
    if not path.exists():
        partial.rename(path)
        sync(path.parent)
        return
    complete = path.with_name(f"{REPLACING}{path.name}")
    shutil.rmtree(complete, ignore_errors=True)  # of an earlier failure; the older one is still there
    partial.rename(complete)
    sync(path.parent)
    _replace(complete, path)


def rename_over(path: Path, target: Path) -> None:
    """Give a folder another name; an older folder of that name is deleted.

    Raises:
        OSError: it cannot be renamed, or the older one not be deleted.
    """
    if target.exists():
        remove_whole(target)
    path.rename(target)


def remove_whole(path: Path) -> None:
    """Delete a folder; a process killed in the middle leaves no half of it under its name.

    Raises:
        OSError: it cannot be deleted.
    """
    doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Complete or delete what killed processes left unfinished; only for the holder of the run's lock.

    Raises:
        OSError: a complete folder cannot be renamed.
    """
    for complete in folder.glob(f"{REPLACING}step-*"):
        _replace(complete, folder / complete.name.removeprefix(REPLACING))
    for pattern in (".writing-*", ".removing-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for file in folder.glob(".*.writing"):
        file.unlink(missing_ok=True)


def _replace(complete: Path, path: Path) -> None:
    """Give `complete` the name of the older folder, which is deleted."""
    doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
    if path.exists():
        path.rename(doomed)
    complete.rename(path)
    sync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Replace the content of the file `path` by `data`, and make the folders that lead to it.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
