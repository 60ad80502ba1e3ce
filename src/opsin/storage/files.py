"""Files and folders that take the place of others whole, whenever the process is killed or the power goes.

A file or a folder is made under a hidden name and renamed. A folder that takes the place of another is first renamed to
`.replacing-NAME`: from there on it is finished whatever happens, at the latest by the next process that may write.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

REPLACING = ".replacing-"
"""Before the name of a folder that is complete and about to take the place of an older one."""


def sync(path: Path) -> None:
    """Make the content of a file, by whomever it was written, or the names in a folder survive a power cut."""
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
    """Put `data` in the place of the file `path`: a reader, or a crash, sees the old content or the new.

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
    """Give the folder `partial`, which is complete and synced, the name `path`; an older one there goes.

    Raises:
        OSError: it cannot be renamed; the older one is there, or `remove_leftovers` brings the new one.
    """
    if not path.exists():
        partial.rename(path)
        sync(path.parent)
        return
    complete = path.with_name(f"{REPLACING}{path.name}")
    shutil.rmtree(complete, ignore_errors=True)  # of an earlier failure; the older one is still in its place
    partial.rename(complete)
    sync(path.parent)
    _replace(complete, path)


def rename_over(path: Path, target: Path) -> None:
    """Give a folder another name; an older folder of that name goes.

    Raises:
        OSError: it cannot be renamed, or the older one not be deleted.
    """
    if target.exists():
        remove_whole(target)
    path.rename(target)


def remove_whole(path: Path) -> None:
    """Delete a folder; killed in the middle, no half of it is left under its name.

    Raises:
        OSError: it cannot be deleted.
    """
    doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Finish or delete what killed processes left half done in `folder`. Only for the one that holds the run's lock.

    Raises:
        OSError: a complete folder cannot take its place.
    """
    for complete in folder.glob(f"{REPLACING}step-*"):
        _replace(complete, folder / complete.name.removeprefix(REPLACING))
    for pattern in (".writing-*", ".removing-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for file in folder.glob(".*.writing"):
        file.unlink(missing_ok=True)


def _replace(complete: Path, path: Path) -> None:
    """Give `complete` the name of the older folder, which goes."""
    doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
    if path.exists():
        path.rename(doomed)
    complete.rename(path)
    sync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` in the place of the file `path`, and make the folders that lead to it.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
