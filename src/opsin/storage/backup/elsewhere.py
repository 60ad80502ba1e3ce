"""Runs whose directory is asked for in a bucket: they train in a folder of this machine and are copied there.

Functions raise `ConfigError` for an address that is wrong or holds credentials, and `RunError` where the run cannot
begin or go on with what the bucket holds or answers.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from opsin.errors import ConfigError, RunError
from opsin.storage.backup.catalog import INDEX
from opsin.storage.backup.config import check_path, is_address
from opsin.storage.backup.open import open_store
from opsin.storage.backup.restore import restore
from opsin.storage.backup.store import PatientReader, StoreError, read_bytes
from opsin.storage.teller import Teller

LOCAL = "~/.cache/opsin/runs"
"""The folder for such runs on this machine, with folders by scheme, bucket and path."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A run in a bucket, and its folder on this machine."""

    url: str
    folder: Path

    def is_new_here(self) -> bool:
        """True if nothing of the run is on this machine."""
        return not self.folder.exists() or not any(self.folder.iterdir())


def find_elsewhere(text: str, local: Path | None) -> Elsewhere | None:
    """Return the run in a bucket that `text` asks for, None for a path. `local` replaces the usual folder here."""
    if not is_address(text):
        if local is not None:
            raise ConfigError(f"command line: --local {local} goes with an address; {text} is a folder already")
        return None
    try:
        url = check_path(text)
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from error
    parts = urlsplit(url)
    usual = Path(os.path.expanduser(LOCAL), parts.scheme, parts.netloc, *Path(parts.path).parts[1:])
    return Elsewhere(url, usual if local is None else local)


def begin_elsewhere(run: Elsewhere, teller: Teller) -> None:
    """Check that a training may begin or continue in `run.folder`.

    If nothing is here the bucket has to answer: a second run that began there would never be copied. If it holds a run,
    the user has to say that this one goes on.
    """
    if not run.is_new_here():
        return
    try:
        is_there = read_bytes(PatientReader(open_store(run.url), teller), INDEX) is not None
    except StoreError as error:
        raise RunError(
            f"{error}; it is unknown whether a run is there, and nothing of it is in {run.folder}: mend it, or train "
            f"into a folder that is copied once this is mended: --out DIR backup.path={run.url}"
        ) from error
    if is_there:
        raise RunError(
            f"{run.url}: holds a run of which nothing is in {run.folder}; go on with it: opsin resume {run.url}; or "
            "begin another one with another --out"
        )


def fetch_elsewhere(run: Elsewhere, teller: Teller) -> None:
    """Restore the run if nothing of it is on this machine."""
    if run.is_new_here():
        restored = restore(run.url, run.folder, teller)
        teller.notice(f"{run.url}: restored into {run.folder}, {restored.at_step()}")
