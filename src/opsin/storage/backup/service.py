"""The backup of a run that trains: in a thread of its own, for as long as the place takes."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from opsin.errors import ConfigError, LockLost, RunError
from opsin.settings.yaml_tree import read_file
from opsin.storage.backup.attempts import insist
from opsin.storage.backup.catalog import INDEX
from opsin.storage.backup.config import BackupConfig
from opsin.storage.backup.mirror import Mirror
from opsin.storage.backup.open import open_store
from opsin.storage.backup.outgoing import Cancelled, Throttle, Unfit
from opsin.storage.backup.secrecy import masked
from opsin.storage.backup.store import StoreError, read_bytes

Say = Callable[[str, str], None]
"""Gets the kind of an event and a sentence; called in any thread."""

_FIRST_DELAY_S = 1.0
_LAST_DELAY_S = 60.0
_BETWEEN_S = 0.2  # passes at the end
_QUIET_S = 1.0
_GRACE_S = 5.0  # for a request that is on its way when nobody waits any longer


class Backup:
    """A run that is copied nowhere. While `with` lasts the run trains."""

    def take(self, checkpoint: Path) -> None:
        """A complete checkpoint was written; called in any thread, costs a few system calls, never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def open_backup(config: BackupConfig | None, folder: Path, *, resuming: bool, say: Say) -> Backup:
    """The backup of the run directory `folder`. A place out of reach is told, and tried again while the run trains.

    Raises:
        RunError: the place holds another run, or this one further on.
        ConfigError: the place refuses (no such bucket, no permission), unless the run is `resuming`; or it is
            the run directory.
    """
    if config is None:
        return Backup()
    backup = BackgroundBackup(config, folder, say=say)
    backup.connect(must_answer=not resuming)
    return backup


class BackgroundBackup(Backup):
    """Sends what the run writes, in a thread. Nothing that happens there stops training or waits for it."""

    def __init__(self, config: BackupConfig, folder: Path, *, say: Say) -> None:
        """`say` is told once when the place fails, once when all goes well again, and what is missing at the end."""
        self._config = config
        self._folder = folder
        self._say = say
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
        self._mirror = open_mirror(config, folder, cancelled=self._cancelled)
        self._failing = False
        self._failures = 0
        self._told: set[str] = set()
        # Not the generator of the process: nobody but the training draws from that.
        self._jitter = random.Random()

    def connect(self, *, must_answer: bool) -> None:
        """Look once whether the place is there and is that of this run.

        Raises:
            RunError: it holds another run, or this one further on.
            ConfigError: it refuses, and `must_answer`.
        """
        try:
            self._mirror.connect()
        except StoreError as error:
            if error.refused and must_answer:
                raise ConfigError(f"backup.path: {error}; mend it, or train without: backup=null") from error
            self._note_failure(error)
        except OSError as error:
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the last files, for `backup.wait` seconds at most, and tell what is missing."""
        self._closing.set()
        self._wake.set()
        if isinstance(error, LockLost):  # whoever has the run now copies it, too
            self._cancelled.set()
            self._thread.join(_GRACE_S)
            return
        try:
            self._thread.join(min(_QUIET_S, self._config.wait))
            if self._thread.is_alive() and self._config.wait > _QUIET_S:
                text = f"backup: copying what is missing to {self._config.path}, for {self._config.wait:g} s at most"
                self._say("backup_waiting", text)
                self._thread.join(self._config.wait - _QUIET_S)
        finally:
            self._cancelled.set()
        self._thread.join(_GRACE_S)
        missing = self._missing_in_words()
        if missing:
            self._say(
                "backup_incomplete",
                f"backup: {self._config.path}: not copied yet: {missing}; opsin backup {self._folder} finishes it",
            )

    def _missing_in_words(self) -> str:
        try:
            return str(self._mirror.missing())
        except OSError as error:
            return f"what cannot be read here ({error})"

    def _work(self) -> None:
        while not self._cancelled.is_set():
            self._wake.clear()
            try:
                if self._pass():
                    return
            except Cancelled:
                return
            except RunError as error:
                self._closing.set()  # and take no more
                if not self._cancelled.is_set():
                    self._say("backup_refused", f"backup: {error}; nothing is copied; training goes on")
                return
            except Exception as error:  # whatever it is, no copy is worth a run
                if self._cancelled.is_set():  # the run has ended and told what is missing
                    return
                self._note_failure(error)
            self._rest()

    def _pass(self) -> bool:
        """Bring the place up to date once; gives whether that was the last time.

        Raises:
            Exception: as `Mirror.sync`.
        """
        was_closing = self._closing.is_set()
        faults = self._mirror.sync()
        if self._cancelled.is_set():
            return True
        for fault in faults:
            self._tell_once("backup_damaged", f"backup: {fault}")
        self._note_success()
        missing = self._mirror.missing()
        # After the end of the run no pass makes a damaged checkpoint whole.
        is_rest_damaged = was_closing and bool(faults) and not missing.files
        return self._closing.is_set() and (not missing or is_rest_damaged)

    def _rest(self) -> None:
        """Until there is something to do: the next checkpoint, the next minutes, the next attempt."""
        if self._failing:
            delay = min(_LAST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(self._failures - 1, 10))
            delay *= self._jitter.uniform(0.5, 1.0)
            # Who waits for the end wants to know soon; new checkpoints are no reason to try sooner.
            self._cancelled.wait(min(delay, 2.0)) if self._closing.is_set() else self._closing.wait(delay)
        elif self._closing.is_set():
            self._cancelled.wait(_BETWEEN_S)
        else:
            self._wake.wait(60 * self._config.minutes)

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if not self._failing:
            self._failing = True
            self._say(
                "backup_failed", f"backup: {masked(str(error))}; training goes on, what is missing will be copied later"
            )

    def _note_success(self) -> None:
        if self._failing:
            self._failing, self._failures = False, 0
            self._say("backup_recovered", f"backup: {self._config.path} is reached again, all is copied")

    def _tell_once(self, kind: str, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(kind, text)


def refuse_taken(config: BackupConfig | None) -> None:
    """See that a run that starts over finds no earlier one in its backup, before anything of that is moved.

    Raises:
        RunError: there is one: nothing would be copied over it.
    """
    if config is None:
        return
    try:
        is_taken = read_bytes(open_store(config.path), INDEX) is not None
    except StoreError:  # out of reach, or none: the backup itself will tell, and knows what to do about it
        return
    if is_taken:
        raise RunError(
            f"{config.path}: holds the backup of a run, over which a fresh one is not copied; give the fresh one "
            "another backup.path, or go on with that run without --fresh; nothing was moved"
        )


def open_mirror(config: BackupConfig, folder: Path, *, cancelled: threading.Event) -> Mirror:
    """What brings the backup of the run directory `folder` up to date, until `cancelled`.

    Raises:
        ConfigError: the place is in the run directory itself, or cannot be a place.
    """
    try:
        store = open_store(config.path)
    except StoreError as error:
        raise ConfigError(f"backup.path: {error}") from error
    if Path(store.shown).is_absolute() and Path(store.shown).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"backup.path: {config.path} is in the run directory {folder}; choose a folder elsewhere")
    throttle = Throttle(config.max_mib_per_s, pause=cancelled.wait)
    return Mirror(folder, store, config, throttle)


def backup_of(folder: Path, place: str | None) -> BackupConfig | None:
    """What the recipe of a run directory says about its backup, with another `place` if one is given.

    Raises:
        ConfigError: the place is none, or the recipe cannot be read.
    """
    node = read_file(folder / "recipe.yaml", str(folder / "recipe.yaml")).child("backup")
    given = node.plain() if node is not None else None
    facts = {**(given if isinstance(given, dict) else {}), **({} if place is None else {"path": place})}
    if "path" not in facts:
        return None
    try:
        return BackupConfig.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        messages = (
            f"backup.{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ConfigError(*(f"{folder}: {message}" for message in messages)) from None


def finish_backup(config: BackupConfig, folder: Path, *, say: Callable[[str], None]) -> list[str]:
    """Bring the backup of a run that does not train up to date, however long it takes; gives what is left out.

    Raises:
        RunError: another run is there, the place fails after some attempts, or a file here cannot be read.
        ConfigError: as `open_mirror`.
    """
    mirror = open_mirror(config, folder, cancelled=threading.Event())
    try:
        faults = insist(mirror.sync, say=say)
    except StoreError as error:
        raise RunError(f"{error}; what was sent stays, the same command goes on") from error
    except (OSError, Unfit) as error:
        raise RunError(f"{folder}: {error}; what was sent stays, the same command goes on") from error
    for fault in faults:
        say(f"backup: {fault}")
    return faults
