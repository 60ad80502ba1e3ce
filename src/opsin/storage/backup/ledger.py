"""What a run directory remembers of its backup, in the hidden folder `.backup`."""

import json
import uuid
from pathlib import Path

from opsin.storage.files import write_atomic

HIDDEN = ".backup"
"""The folder in the run directory: the ledger, and files that wait to be sent."""


class Ledger:
    """The name of the run, and which checkpoints in the store are its own to remove."""

    def __init__(self, folder: Path, store: str, *, run: str | None = None) -> None:
        """The ledger of the run directory `folder`, or a new one; `run` is the name of a restored run."""
        self._path = folder / HIDDEN / "ledger.json"
        self._store = store
        self.run = run or uuid.uuid4().hex
        self.steps: frozenset[int] = frozenset()
        self.spared: frozenset[int] = frozenset()
        """Those of `steps` that came back damaged: their copies stay until the run has gone on without them."""
        if run is None:
            self._load()

    def add(self, *steps: int, spared: bool = False) -> None:
        """Note steps whose checkpoints may be removed once the run has removed its own, and the name of the run.

        Raises:
            OSError: it cannot be written down.
        """
        self._write(self.steps | set(steps), self.spared | set(steps) if spared else self.spared - set(steps))

    def drop(self, step: int) -> None:
        """The checkpoint of `step` is removed.

        Raises:
            OSError: it cannot be written down.
        """
        self._write(self.steps - {step}, self.spared - {step})

    def _load(self) -> None:
        try:
            facts = json.loads(self._path.read_bytes())
            self.run = str(facts["run"])
            if facts["place"] == self._store:
                self.steps = frozenset(int(step) for step in facts["steps"])
                self.spared = frozenset(int(step) for step in facts.get("spared", ()))
        except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: a new one loses no checkpoint
            return

    def _write(self, steps: frozenset[int], spared: frozenset[int]) -> None:
        if (steps, spared) == (self.steps, self.spared) and self._path.exists():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"run": self.run, "place": self._store, "steps": sorted(steps), "spared": sorted(spared)}
        write_atomic(self._path, (json.dumps(facts) + "\n").encode())
        self.steps, self.spared = steps, spared
