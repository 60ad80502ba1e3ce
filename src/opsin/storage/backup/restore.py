"""Restores a run directory from its backup: the newest complete state with all files around it."""

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opsin.errors import ConfigError, RunError
from opsin.storage.backup import catalog
from opsin.storage.backup.config import check_path
from opsin.storage.backup.ledger import Ledger
from opsin.storage.backup.open import open_store
from opsin.storage.backup.store import Absent, Entry, PatientReader, StoreError, entry_of
from opsin.storage.files import sync, sync_tree, writing
from opsin.storage.lock import Holder, RunLock
from opsin.storage.teller import Teller

_LOCK = ".lock"
_RECIPE = "recipe.yaml"
_LOGS = (".jsonl", ".txt", ".csv")  # kept if damaged: the other lines are still good
_WEIGHTS = "model*.safetensors"


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a restore. `step` is None if the backup holds no checkpoint."""

    step: int | None
    num_files: int
    num_bytes: int

    def at_step(self) -> str:
        """`at step 40`."""
        return "without a checkpoint" if self.step is None else f"at step {self.step}"


def restore(url: str, folder: Path, teller: Teller, *, step: int | None = None, only: bool = False) -> Restored:
    """Write the run in the backup at `url` into `folder`, which is new or empty; every file is verified.

    The state is that of `step`, or the newest complete one; damaged ones are reported and left out. Earlier
    checkpoints come along unless `only` one is wanted, so that retention and rollback work as before. An interrupted
    restore goes on in the middle of a file. If `folder` is a link, the folder that it leads to is filled.

    Raises:
        ConfigError: `url` cannot be a store.
        RunError: there is no backup, no complete state or no such step; the store is out of reach; `folder` is in
            use, or a mount point.
    """
    try:
        url = check_path(url)
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from error
    _refuse_full(folder)
    try:
        with writing(folder, "put that right, the same command goes on"):
            return _Restore(PatientReader(open_store(url), teller), folder, teller).run(step, only=only)
    except StoreError as error:
        raise RunError(f"{error}; what was fetched stays, the same command goes on") from error


class _Restore:
    """One restore. Files come into a hidden folder beside the run directory, and take its name at the end."""

    def __init__(self, store: PatientReader, folder: Path, teller: Teller) -> None:
        self._store = store
        self._folder = folder.resolve()
        self._partial = self._folder.with_name(f".{self._folder.name}.restoring")
        self._teller = teller
        self._num_files = 0
        self._num_bytes = 0

    def run(self, wanted: int | None, *, only: bool) -> Restored:
        index, steps = self._read_index(), catalog.marked_steps(self._store)
        if _RECIPE not in index.files:
            raise RunError(f"{self._store.shown}: holds no backup of a run (no {_RECIPE})")
        if wanted is not None and wanted not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise RunError(f"{self._store.shown}: has no whole checkpoint of step {wanted}; there are: {known}")
        with self._claimed():
            return self._fill(index, steps, wanted, only=only)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Lock the hidden folder, so that no other restore writes it meanwhile."""
        if os.path.ismount(self._folder):
            raise self._mounted()
        self._partial.mkdir(parents=True, exist_ok=True)
        lock = RunLock(self._partial / _LOCK)
        try:
            lock.take()
        except RunError as error:
            holder = Holder.read(self._partial / _LOCK)
            who = "another process" if holder is None else f"{holder.process} on {holder.host}"
            raise RunError(f"{self._folder}: {who} is restoring into it; wait for it, or choose another DIR") from error
        try:
            self._make_way()
            yield
        finally:
            lock.release()

    def _make_way(self) -> None:
        """Remove the empty folder that has the name: if it cannot be removed, it could not be replaced at the end."""
        try:
            if self._folder.exists():
                self._folder.rmdir()
        except OSError as error:
            (self._partial / _LOCK).unlink()
            if not any(self._partial.iterdir()):
                self._partial.rmdir()
            if error.errno == errno.EBUSY:
                raise self._mounted() from error
            _refuse_full(self._folder)
            raise

    def _mounted(self) -> RunError:
        return RunError(
            f"{self._folder}: is a mount point, and a run directory gets its name when it is whole; restore into a new "
            f"folder in it: {self._folder / 'run'}"
        )

    def _fill(self, index: catalog.Index, steps: Sequence[int], wanted: int | None, *, only: bool) -> Restored:
        kept = self._fetch_checkpoints([s for s in steps if wanted is None or s <= wanted], only=only)
        if wanted is not None and wanted not in kept:
            raise RunError(f"{self._store.shown}: the checkpoint of step {wanted} is damaged; take another --step")
        if steps and not kept:
            raise RunError(f"{self._store.shown}: every checkpoint is damaged: step {', '.join(map(str, steps))}")
        newest = max(kept, default=None)
        is_newest = newest == max(steps, default=None)
        for name, entries in index.files.items():
            # A run that goes back must not come with the weights of its end: they would be taken for the newest.
            if is_newest or not Path(name).match(_WEIGHTS):
                self._fetch_file(name, entries)
        of_checkpoints = (f"{catalog.step_folder(step)}/{name}" for step in kept for name in kept[step])
        self._remove_others({_LOCK, *index.files, *of_checkpoints})
        ledger = Ledger(self._partial, self._store.shown, run=index.run or None)
        ledger.add(*kept)
        # The later ones, too: a run that goes on from here will not contain them. But those that came damaged may be
        # whole in the store, or be mended there.
        ledger.add(*(step for step in steps if newest is not None and step > newest), spared=wanted is None)
        sync_tree(self._partial)
        self._partial.rename(self._folder)
        sync(self._folder.parent)
        (self._folder / _LOCK).unlink()  # held until here: no other process uses the run before it is complete
        return Restored(newest, self._num_files, self._num_bytes)

    def _read_index(self) -> catalog.Index:
        try:
            return catalog.read_index(self._store) or catalog.Index("", {})
        except catalog.DamagedCatalog as error:
            self._teller.notice(f"{error}; the files of the run are taken as they are")
        names = [name for name in self._store.names() if name != catalog.INDEX and not catalog.is_of_checkpoint(name)]
        return catalog.Index("", dict.fromkeys(names, ()))

    def _fetch_checkpoints(self, steps: Sequence[int], *, only: bool) -> dict[int, dict[str, Entry]]:
        """Return the files of the checkpoints that have come whole, the newest first."""
        whole: dict[int, dict[str, Entry]] = {}
        for step in sorted(steps, reverse=True):
            if entries := self._fetch_checkpoint(step):
                whole[step] = entries
                if only:
                    break
        return whole

    def _fetch_checkpoint(self, step: int) -> dict[str, Entry]:
        """Fetch the files of a checkpoint and return what its mark lists; nothing if it is damaged."""
        folder = catalog.step_folder(step)
        try:
            entries = catalog.read_mark(self._store, step) or {}
        except catalog.DamagedCatalog as error:
            self._teller.notice(f"{error}; the checkpoint of step {step} is left out")
            return {}
        for name, entry in entries.items():
            if (fault := self._fetch(f"{folder}/{name}", (entry,))) is not None:
                shutil.rmtree(self._partial / folder, ignore_errors=True)
                self._teller.notice(f"{fault}; the checkpoint of step {step} is left out")
                return {}
        return entries

    def _fetch_file(self, name: str, entries: Sequence[Entry]) -> None:
        keeps = name.endswith(_LOGS)
        fault = self._fetch(name, entries, keep_damaged=keeps)
        if fault is not None and name == _RECIPE:
            raise RunError(f"{fault}; without its recipe the run cannot go on: mend it in the backup")
        if fault is not None:
            self._teller.notice(f"{fault}; it is {'taken as it is' if keeps else 'left out'}")

    def _fetch(self, name: str, entries: Sequence[Entry], *, keep_damaged: bool = False) -> str | None:
        """Fetch a file that is not here yet; return a sentence on its fault, None if there is none."""
        target = self._partial / name
        if entries and target.is_file() and entry_of(target) in entries:
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.fetching")
        try:
            found = self._download(name, partial, entries)
            if entries and found not in entries:
                # The store may be right: an interrupted restore may have left the beginning of another content.
                partial.unlink()
                found = self._download(name, partial, entries)
        except Absent:
            partial.unlink(missing_ok=True)
            return f"{self._store.shown}: {name} is missing"
        is_good = not entries or found in entries
        if is_good or keep_damaged:
            partial.replace(target)
            self._num_files += 1
            self._num_bytes += found.bytes
        else:
            partial.unlink()
        return None if is_good else f"{self._store.shown}: {name} is damaged"

    def _download(self, name: str, partial: Path, entries: Collection[Entry]) -> Entry:
        """Fetch what `partial` lacks of a file that should be one of `entries`; return its content then."""
        if entries and partial.is_file() and (left := entry_of(partial)).bytes <= max(e.bytes for e in entries):
            if left in entries:
                return left
        else:
            partial.unlink(missing_ok=True)
        with partial.open("ab") as file:
            for chunk in self._store.fetch(name, start=file.tell()):
                file.write(chunk)
        return entry_of(partial)

    def _remove_others(self, names: Collection[str]) -> None:
        """Remove what an interrupted restore of another state has left."""
        for path in sorted(self._partial.rglob("*"), reverse=True):  # a folder comes after its files
            if path.is_file() and path.relative_to(self._partial).as_posix() not in names:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: is not empty; restore into a new folder, or move this one away")
