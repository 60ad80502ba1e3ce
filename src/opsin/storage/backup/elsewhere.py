"""Runs whose directory is asked for in a bucket: they train in a folder of this machine and are copied there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from opsin.errors import ConfigError, RunError
from opsin.storage.backup.attempts import insist
from opsin.storage.backup.catalog import INDEX
from opsin.storage.backup.config import check_path, is_address
from opsin.storage.backup.open import open_store
from opsin.storage.backup.restore import restore
from opsin.storage.backup.store import StoreError, read_bytes

LOCAL = "~/.cache/opsin/runs"
"""Where such runs are on this machine, in folders by scheme, bucket and path."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A run in a bucket, and its folder here."""

    url: str
    folder: Path

    def is_new_here(self) -> bool:
        """Whether nothing of it is on this machine."""
        return not self.folder.exists() or not any(self.folder.iterdir())


def find_elsewhere(text: str, local: Path | None) -> Elsewhere | None:
    """The run that `text` asks for; None where it is a path. `local` is its folder here, if not the usual one.

    Raises:
        ConfigError: the address is wrong or holds credentials; or there is a `local` for a path.
    """
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


def begin_elsewhere(run: Elsewhere, *, say: Callable[[str], None]) -> None:
    """See that a training may begin in `run.folder`, or go on there.

    Where nothing is here the bucket has to answer: a run of it that began again would be another one, never copied.

    Raises:
        RunError: there is a run in the bucket of which nothing is here: nobody has said that it goes on; or the bucket
            refuses, or does not answer.
    """
    if not run.is_new_here():
        return
    try:
        is_there = insist(lambda: read_bytes(open_store(run.url), INDEX), say=say) is not None
    except StoreError as error:
        raise RunError(
            f"{error}; whether a run is there cannot be told, and nothing of it is in {run.folder}: mend it, or train "
            f"into a folder that is copied once this is mended: --out DIR backup.path={run.url}"
        ) from error
    if is_there:
        raise RunError(
            f"{run.url}: holds a run of which nothing is in {run.folder}; go on with it: opsin resume {run.url}; or "
            "begin another one with another --out"
        )


def fetch_elsewhere(run: Elsewhere, *, say: Callable[[str], None]) -> None:
    """Bring the run here where nothing of it is here.

    Raises:
        RunError: it cannot be restored.
    """
    if run.is_new_here():
        restored = restore(run.url, run.folder, say=say)
        say(f"{run.url}: restored into {run.folder}, {at_step(restored.step)}")


def at_step(step: int | None) -> str:
    """In words."""
    return "without a checkpoint" if step is None else f"at step {step}"
