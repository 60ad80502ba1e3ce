"""Brings a backup up to date with its run directory, one pass after another.

A pass may fail or be killed anywhere: the backup stays whole, and the next pass goes on. It raises `StoreError` where
the store fails; `RunError` where the store holds another run, or one that has gone further than the run directory;
`OSError` or `Unfit` where a file of the run cannot be read or copied; and `Cancelled` where the throttle ends it.
"""

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, TypeAlias

from opsin.errors import RunError
from opsin.storage.backup import catalog
from opsin.storage.backup.config import BackupConfig
from opsin.storage.backup.ledger import Ledger
from opsin.storage.backup.staging import Staging, Throttle, Unfit, outgoing
from opsin.storage.backup.store import BackupStore, Entry, StoreError, entry_of
from opsin.storage.records import RecordFormat

_MANIFEST = "manifest.json"
_RECIPE = "recipe.yaml"
_Signature: TypeAlias = tuple[int, int, int]
"""Size, time of change and inode: two equal ones belong to the same content of a file."""
_MAX_CONTENTS = 8  # how many contents of a file the index remembers


class Missing(NamedTuple):
    """Checkpoints and files that are not in the backup yet."""

    steps: list[int]
    files: list[str]

    def __bool__(self) -> bool:
        return bool(self.steps or self.files)

    def __str__(self) -> str:
        words = [f"the checkpoint{'s'[: len(self.steps) > 1]} of step {', '.join(map(str, self.steps))}"]
        shown = ", ".join(self.files[:3]) + (f" and {len(self.files) - 3} more files" if len(self.files) > 3 else "")
        return "; ".join([*(words if self.steps else []), *([shown] if self.files else [])])


@dataclass(frozen=True, slots=True)
class _Manifest:
    files: dict[str, Entry]


_MANIFESTS = RecordFormat(_Manifest)


class Mirror:
    """The backup of one run directory. Only `stage` and `missing` may be called from other threads."""

    def __init__(self, folder: Path, store: BackupStore, config: BackupConfig, throttle: Throttle) -> None:
        self._folder = folder
        self._store = store
        self._config = config
        self._throttle = throttle
        self._ledger = Ledger(folder, store.shown)
        self._staging = Staging(folder)
        self._connected = False
        self._written: set[str] = set()
        self._has_gone_on = False
        """True once a checkpoint that this process wrote has arrived."""
        self._marked: dict[int, dict[str, Entry]] = {}
        """The files of each marked checkpoint in the store; none for a damaged mark."""
        self._contents: dict[str, tuple[Entry, ...]] = {}
        self._sent: dict[str, _Signature] = {}

    def connect(self) -> None:
        """Read the catalogue of the store."""
        try:
            index = catalog.read_index(self._store)
        except catalog.DamagedCatalog:
            index = None  # it is replaced
        if index is not None and index.run != self._ledger.run:
            raise RunError(
                f"{self._store.shown}: holds the backup of another run; choose another backup.path, or go on with "
                f"that run: opsin restore {self._store.shown} DIR"
            )
        marked = {step: self._mark(step) for step in catalog.marked_steps(self._store)}
        own = catalog.local_steps(self._folder)
        ahead = [step for step in marked if step > max(own, default=0) and step not in self._ledger.steps]
        if ahead:
            raise RunError(
                f"{self._store.shown}: has a checkpoint of step {max(ahead)}, {self._folder} ends with step "
                f"{max(own, default=0)}: the run went on elsewhere; opsin restore {self._store.shown} OTHER_DIR gets "
                "it, or choose another backup.path"
            )
        self._store.clear()
        # The ledger may be of another store: checkpoints that both have belong to the run there, too.
        self._ledger.add(*(s for s, path in own.items() if marked.get(s, {}) == _stated(path)))
        self._contents = {} if index is None else dict(index.files)
        self._marked = marked
        self._sent = {}
        self._connected = True

    def stage(self, checkpoint: Path) -> None:
        """Hold a checkpoint that was just written until it is sent."""
        self._written.add(checkpoint.name)
        self._staging.take(checkpoint)

    def sync(self) -> list[str]:
        """Send what is missing, and remove what the run has removed; return a sentence for each damaged checkpoint."""
        if not self._connected:
            self.connect()
        try:
            return self._sync()
        except StoreError:
            # The store may have changed meanwhile: the next pass reads its catalogue again.
            self._connected = False
            raise

    def missing(self) -> Missing:
        """Return what is not in the backup yet, as far as this process knows."""
        own = ((step, _stated(path)) for step, path in catalog.local_steps(self._folder).items())
        # A checkpoint that is damaged here by now may be whole in the backup.
        steps = [s for s, stated in own if not self._marked.get(s) or stated not in (None, self._marked[s])]
        files = [name for name, now in self._run_files() if self._sent.get(name) != now]
        return Missing(steps, files)

    def _sync(self) -> list[str]:
        self._prune()
        faults: dict[int, str] = {}
        while (found := self._next_step(faults)) is not None:
            step, source, entries = found
            try:
                self._send_checkpoint(step, source, entries)
            except (Unfit, FileNotFoundError):
                if source.is_dir():
                    faults[step] = self._fault(step)
                elif step > max(self._staging.sources(), default=-1):  # else a newer one replaces it
                    faults[step] = f"the checkpoint of step {step} was removed before it was sent"
            self._prune()
        self._send_files()
        return list(faults.values())

    def _mark(self, step: int) -> dict[str, Entry]:
        try:
            return catalog.read_mark(self._store, step) or {}
        except catalog.DamagedCatalog:
            return {}

    def _fault(self, step: int) -> str:
        fate = "its copy stays as it is" if self._marked.get(step) else "it was not sent"
        return f"the checkpoint of step {step} is damaged here; {fate}"

    def _next_step(self, faults: dict[int, str]) -> tuple[int, Path, dict[str, Entry]] | None:
        """Return the newest checkpoint that is missing in the backup and not among `faults`, with folder and files.

        One whose manifest cannot be read is added to `faults`.
        """
        for step, source in self._staging.sources().items():
            if step in faults:
                continue
            entries = _stated(source) or _stated(source)  # it may be replaced at this moment
            if entries is None:
                if source.is_dir():  # and was not removed
                    faults[step] = self._fault(step)
            elif self._marked.get(step) == entries:
                self._staging.begin(source)
                self._staging.release(step)
            else:
                return step, self._staging.begin(source), entries
        return None

    def _send_checkpoint(self, step: int, source: Path, entries: dict[str, Entry]) -> None:
        self._ledger.add(step)
        if step in self._marked:  # another state of the same step, after a rollback
            self._store.remove(f"{catalog.step_folder(step)}.json")
            del self._marked[step]
        for name, entry in entries.items():
            target = f"{catalog.step_folder(step)}/{name}"
            if not self._store.holds(target, size=entry.bytes, sha256=entry.sha256):
                self._send(source / name, target, entry)
        # Before the mark: a run that goes on from this step needs its rows.
        self._send_files()
        catalog.write_mark(self._store, step, entries)
        self._marked[step] = entries
        self._has_gone_on = self._has_gone_on or source.name in self._written
        self._staging.release(step)

    def _send(self, source: Path, name: str, entry: Entry) -> None:
        chunks = outgoing(source, self._throttle, entry)
        self._store.put(name, chunks, size=entry.bytes, sha256=entry.sha256)

    def _send_files(self) -> None:
        """Send the files that have changed, and remove those that are gone."""
        found = dict(self._run_files())
        if _RECIPE not in found:
            text = "the run directory is gone; nothing is removed from its backup"
            raise FileNotFoundError(errno.ENOENT, text, str(self._folder))
        copies: dict[str, tuple[Path, Entry]] = {}
        for name, now in found.items():
            if self._sent.get(name) == now or (copy := self._staging.copy(name)) is None:
                continue
            entry = entry_of(copy)
            if self._contents.get(name) == (entry,):
                self._sent[name] = now
            else:
                copies[name] = copy, entry
        gone = self._contents.keys() - found.keys()
        if copies or gone:
            self._contents = {name: old for name, old in self._contents.items() if name in found}
            for name, (_, entry) in copies.items():
                before = [old for old in self._contents.get(name, ()) if old != entry]
                self._contents[name] = (entry, *before[: _MAX_CONTENTS - 1])
            catalog.write_index(self._store, self._ledger.run, self._contents)
        for name, (copy, entry) in copies.items():
            self._send(copy, name, entry)
            self._contents[name] = (entry,)
            self._sent[name] = found[name]
        for name in gone:
            self._store.remove(name)
        self._staging.discard_copies()

    def _run_files(self) -> Iterator[tuple[str, _Signature]]:
        """Yield every file of the run that does not belong to a checkpoint."""
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if "/." in f"/{name}" or name == catalog.INDEX or catalog.is_of_checkpoint(name) or not path.is_file():
                continue
            if name != _RECIPE and any(fnmatch(name, form) for form in self._config.leave_out):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # replaced or removed at this moment
                continue
            yield name, (stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def _prune(self) -> None:
        """Remove from the backup the checkpoints that the run has removed; never the last one that both have.

        A checkpoint that the run has gone back before is removed under any `backup.keep`. The copy of one that was
        damaged stays until the run has gone on without it: it may be the only whole one.
        """
        own = catalog.local_steps(self._folder)
        damaged = catalog.local_steps(self._folder, "damaged-").keys() | self._ledger.spared
        removed = sorted(self._ledger.steps - own.keys() - (set() if self._has_gone_on else damaged))
        # One that was replaced after a rollback counts once its new state is in the backup.
        if not removed or not any(self._marked.get(step, {}) == _stated(path) for step, path in own.items()):
            return
        for step in removed:
            if self._config.keep == "all" and step in self._marked and step < max(own):
                continue
            # The mark first: without it the checkpoint does not exist.
            self._store.remove(f"{catalog.step_folder(step)}.json")
            self._marked.pop(step, None)
            for name in self._store.names(catalog.step_folder(step)):
                self._store.remove(name)
            self._ledger.drop(step)


def _stated(checkpoint: Path) -> dict[str, Entry] | None:
    """Return the files of a checkpoint by its manifest; None if that cannot be read."""
    try:
        data = (checkpoint / _MANIFEST).read_bytes()
        stated = _MANIFESTS.parse(data).files
        others = [p.name for p in sorted(checkpoint.iterdir()) if p.name not in stated and p.name != _MANIFEST]
        stated.update({name: entry_of(checkpoint / name) for name in others})
    except (OSError, ValueError):
        return None
    # The manifest is sent last: it lists the contents of the others.
    return {**dict(sorted(stated.items())), _MANIFEST: Entry(len(data), hashlib.sha256(data).hexdigest())}
