"""The record that a run directory keeps of its backup, in the hidden folder `.backup`."""

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opsin.errors import RunError
from opsin.storage.records import RecordFormat

HIDDEN = ".backup"
"""The folder in the run directory with the ledger, and with files that wait to be sent."""


@dataclass(frozen=True, slots=True)
class _Facts:
    run: str
    store: Annotated[str, Field(alias="place")]
    steps: list[int]
    spared: list[int] = field(default_factory=list)


_FACTS = RecordFormat(_Facts)


class Ledger:
    """The name of the run, and the checkpoints in the store that it may remove there. Changes may raise an OSError."""

    def __init__(self, folder: Path, store: str, *, run: str | None = None) -> None:
        """Load the ledger of the run directory `folder`, or begin one; `run` is the name of a restored run."""
        self._path = folder / HIDDEN / "ledger.json"
        self._store = store
        self.run = run or uuid.uuid4().hex
        self.steps: frozenset[int] = frozenset()
        self.spared: frozenset[int] = frozenset()
        """Those of `steps` that came back damaged: their copies stay until the run has gone on without them."""
        if run is not None:
            return
        try:
            facts = _FACTS.read(self._path, "a new one is begun")
        except (OSError, RunError):  # none yet, or damaged: a new one loses no checkpoint
            return
        self.run = facts.run
        if facts.store == store:
            self.steps, self.spared = frozenset(facts.steps), frozenset(facts.spared)

    def add(self, *steps: int, spared: bool = False) -> None:
        """Add steps whose checkpoints may be removed from the store once the run has removed its own."""
        self._write(self.steps | set(steps), self.spared | set(steps) if spared else self.spared - set(steps))

    def drop(self, step: int) -> None:
        """Forget the checkpoint of `step`, which was removed from the store."""
        self._write(self.steps - {step}, self.spared - {step})

    def _write(self, steps: frozenset[int], spared: frozenset[int]) -> None:
        if (steps, spared) == (self.steps, self.spared) and self._path.exists():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _FACTS.write(self._path, _Facts(self.run, self._store, sorted(steps), sorted(spared)))
        self.steps, self.spared = steps, spared
