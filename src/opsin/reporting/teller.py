"""Tellers of runs and of commands: reports to people and to programs."""

import sys
from collections.abc import Mapping

from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.storage.teller import Fact, Teller


class RunTeller(Teller):
    """Lines on the console of a run, events in its journal."""

    def __init__(self, journal: Journal, console: Console) -> None:
        self.journal = journal
        self.console = console

    def notice(self, text: str) -> None:
        self.console.notice(text)

    def warning(self, text: str) -> None:
        self.console.warning(text)

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        if step is None:
            step = 0 if self.journal.last is None else self.journal.last.step
        self.journal.event(kind, step, **facts)
        super().tell(kind, step, notice=notice, warn=warn)

    def sync(self) -> None:
        """Bring what was recorded to the disk; never raises."""
        self.journal.sync()

    def history(self, name: str) -> Mapping[int, float]:
        """The recorded values of a score, by step."""
        return self.journal.history(name)


class CommandTeller(Teller):
    """Lines on standard error: standard output is for the result of a command alone. Events are not recorded."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def notice(self, text: str) -> None:
        print(f"{self._prefix}{text}", file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        self.notice(f"warning: {text}")
