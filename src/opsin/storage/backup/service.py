"""The backup of a run that trains, in a thread of its own; and the command that completes a backup.

Functions raise `ConfigError` where the path of a backup cannot be used or is in the run directory, and `RunError` where
the store holds another run, or has this one further on.
"""

import json
import random
import threading
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from opsin.errors import ConfigError, LockLost, RunError
from opsin.settings.yaml_tree import read_file
from opsin.storage.backup.catalog import INDEX
from opsin.storage.backup.config import BackupConfig, masked
from opsin.storage.backup.mirror import Mirror
from opsin.storage.backup.open import open_store
from opsin.storage.backup.staging import Throttle, Unfit
from opsin.storage.backup.store import Attempts, StoreError, read_bytes
from opsin.storage.teller import Teller

_FIRST_DELAY_S = 1.0
_LAST_DELAY_S = 60.0
_BETWEEN_S = 0.2  # passes at the end
_QUIET_S = 1.0
_GRACE_S = 5.0  # for a request that is being answered when the wait ends


class Backup:
    """The backup of a run that is copied nowhere. The run trains inside its `with` block."""

    def take(self, checkpoint: Path) -> None:
        """Note that a complete checkpoint was written. Any thread may call it; a few system calls, never an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None


def open_backup(config: BackupConfig | None, folder: Path, *, resuming: bool, teller: Teller) -> Backup:
    """Return the backup of the run directory `folder`. A store out of reach is tried again while the run trains.

    A store that refuses (no such bucket, no permission) is a ConfigError, unless the run is `resuming`.
    """
    if config is None:
        return Backup()
    backup = BackgroundBackup(config, folder, teller)
    backup.connect(must_answer=not resuming)
    return backup


class BackgroundBackup(Backup):
    """Sends the files of a run in a thread. It never stops training, nor makes it wait.

    It reports once that the store fails, once that it works again, and at the end the files that are missing.
    """

    def __init__(self, config: BackupConfig, folder: Path, teller: Teller) -> None:
        self._config = config
        self._folder = folder
        self._teller = teller
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
        self._mirror = open_mirror(config, folder, cancelled=self._cancelled)
        self._failures = 0
        self._reported: set[str] = set()
        # Not the generator of the process, which belongs to the training.
        self._jitter = random.Random()

    def connect(self, *, must_answer: bool) -> None:
        """Check once that the store answers and that its backup is that of this run; errors as in `open_backup`."""
        try:
            self._mirror.connect()
        except (StoreError, OSError) as error:
            if isinstance(error, StoreError) and error.refused and must_answer:
                raise ConfigError(f"backup.path: {error}; mend it, or train without: backup=null") from error
            self._note_failure(error)

    def take(self, checkpoint: Path) -> None:
        if self._closing.is_set():
            return
        try:
            self._mirror.stage(checkpoint)
        except OSError as error:
            self._note_failure(error)
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Send the last files, for `backup.wait` seconds at most, and report what is missing."""
        self._closing.set()
        self._wake.set()
        if isinstance(error, LockLost):  # the process that has the run now copies it, too
            self._cancelled.set()
            self._thread.join(_GRACE_S)
            return
        path, wait = self._config.path, self._config.wait
        try:
            self._thread.join(min(_QUIET_S, wait))
            if self._thread.is_alive() and wait > _QUIET_S:
                text = f"backup: copying what is missing to {path}, for {wait:g} s at most"
                self._teller.tell("backup_waiting", notice=text, message=text)
                self._thread.join(wait - _QUIET_S)
        finally:
            self._cancelled.set()
        self._thread.join(_GRACE_S)
        try:
            missing = str(self._mirror.missing())
        except OSError as fault:
            missing = f"files that cannot be read here ({fault})"
        if missing:
            self._warn(
                "backup_incomplete", f"{path}: not copied yet: {missing}; opsin backup {self._folder} finishes it"
            )

    def _work(self) -> None:
        while not self._cancelled.is_set():
            self._wake.clear()
            try:
                if self._pass():
                    return
            except Exception as error:  # of any kind: a backup must never end a run
                if self._cancelled.is_set():  # the run has ended and reported what is missing
                    return
                if isinstance(error, RunError):
                    self._closing.set()  # and take no more
                    self._warn("backup_refused", f"{error}; nothing is copied; training goes on")
                    return
                self._note_failure(error)
            self._rest()

    def _pass(self) -> bool:
        """Bring the backup up to date once; return True if that was the last time."""
        was_closing = self._closing.is_set()
        faults = self._mirror.sync()
        if self._cancelled.is_set():
            return True
        for fault in faults:
            if fault not in self._reported:
                self._reported.add(fault)
                self._warn("backup_damaged", fault)
        if self._failures:
            self._failures = 0
            text = f"backup: {self._config.path} is reached again, all is copied"
            self._teller.tell("backup_recovered", notice=text, message=text)
        missing = self._mirror.missing()
        # After the end of the run no pass makes a damaged checkpoint whole.
        is_rest_damaged = was_closing and bool(faults) and not missing.files
        return self._closing.is_set() and (not missing or is_rest_damaged)

    def _rest(self) -> None:
        """Wait for the next checkpoint, the next minutes or the next attempt."""
        if self._failures:
            delay = min(_LAST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(self._failures - 1, 10))
            delay *= self._jitter.uniform(0.5, 1.0)
            # At the end of the run somebody waits; a new checkpoint is no reason for an earlier attempt.
            self._cancelled.wait(min(delay, 2.0)) if self._closing.is_set() else self._closing.wait(delay)
        elif self._closing.is_set():
            self._cancelled.wait(_BETWEEN_S)
        else:
            self._wake.wait(60 * self._config.minutes)

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            self._warn("backup_failed", f"{masked(str(error))}; training goes on, what is missing will be copied later")

    def _warn(self, kind: str, text: str) -> None:
        self._teller.tell(kind, warn=f"backup: {text}", warning=f"backup: {text}")


def refuse_taken(config: BackupConfig | None) -> None:
    """Refuse a fresh run whose backup holds an earlier one, before anything of that is moved."""
    if config is None:
        return
    try:
        is_taken = read_bytes(open_store(config.path), INDEX) is not None
    except StoreError:  # out of reach, or none: the backup itself reports that and tries again
        return
    if is_taken:
        raise RunError(
            f"{config.path}: holds the backup of a run, over which a fresh one is not copied; give the fresh one "
            "another backup.path, or go on with that run without --fresh; nothing was moved"
        )


def open_mirror(config: BackupConfig, folder: Path, *, cancelled: threading.Event) -> Mirror:
    """Return the mirror of the run directory `folder`, which works until `cancelled`."""
    try:
        store = open_store(config.path)
    except StoreError as error:
        raise ConfigError(f"backup.path: {error}") from error
    if Path(store.shown).is_absolute() and Path(store.shown).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"backup.path: {config.path} is in the run directory {folder}; choose a folder elsewhere")
    return Mirror(folder, store, config, Throttle(config.max_mib_per_s, cancelled))


def backup_of(folder: Path, path: str | None) -> BackupConfig | None:
    """Return the backup settings in the recipe of a run directory, with another `path` if one is given.

    Raises:
        ConfigError: they cannot be used, or the recipe cannot be read.
    """
    node = read_file(folder / "recipe.yaml", str(folder / "recipe.yaml")).child("backup")
    given = node.plain() if node is not None else None
    facts = {**(given if isinstance(given, dict) else {}), **({} if path is None else {"path": path})}
    if "path" not in facts:
        return None
    try:
        return BackupConfig.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
        lines = [f"{folder}: backup.{key}: {text.removeprefix('Value error, ')}" for key, text in faults]
        raise ConfigError(*lines) from None


def finish_backup(config: BackupConfig, folder: Path, teller: Teller) -> list[str]:
    """Complete the backup of a run that does not train; return a sentence for each checkpoint that is left out.

    It is a RunError, too, if the store fails after some attempts, or if a file here cannot be read.
    """
    mirror = open_mirror(config, folder, cancelled=threading.Event())
    attempts = Attempts(teller)
    try:
        while True:
            with attempts.one():
                faults = mirror.sync()
                break
    except StoreError as error:
        raise RunError(f"{error}; what was sent stays, the same command goes on") from error
    except (OSError, Unfit) as error:
        raise RunError(f"{folder}: {error}; what was sent stays, the same command goes on") from error
    for fault in faults:
        teller.notice(f"backup: {fault}")
    return faults
